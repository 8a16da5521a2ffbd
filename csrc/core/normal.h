// Standard normal numbers from random words; the same bits on the host and on CUDA.
#pragma once

#include "core/host_device.h"

namespace pybackdoor {

// ln(u) for normal u in (0, 1]; Cephes logf, relative error below 2e-7.
PB_HD float log_unit(float u) {
  const uint32_t bits = float_bits(u);
  // Shift by 1/sqrt(2), so that the mantissa m lies in [1/sqrt(2), sqrt(2)).
  const int32_t e = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = bits_float(bits - (static_cast<uint32_t>(e) << 23));
  const float x = add_rn(m, -1.f), z = mul_rn(x, x), k = static_cast<float>(e);
  float p = 7.0376836292e-2f;
  p = add_rn(mul_rn(p, x), -1.1514610310e-1f);
  p = add_rn(mul_rn(p, x), 1.1676998740e-1f);
  p = add_rn(mul_rn(p, x), -1.2420140846e-1f);
  p = add_rn(mul_rn(p, x), 1.4249322787e-1f);
  p = add_rn(mul_rn(p, x), -1.6668057665e-1f);
  p = add_rn(mul_rn(p, x), 2.0000714765e-1f);
  p = add_rn(mul_rn(p, x), -2.4999993993e-1f);
  p = add_rn(mul_rn(p, x), 3.3333331174e-1f);
  float y = mul_rn(mul_rn(p, x), z);
  y = add_rn(y, mul_rn(k, -2.12194440e-4f));  // ln 2 in two parts, the larger of few bits
  y = add_rn(y, mul_rn(z, -0.5f));
  return add_rn(add_rn(x, y), mul_rn(k, 0.693359375f));
}

// Two standard normals from two words (Box-Muller): see reference.noise_normals.
PB_HD void normal_pair(uint32_t w0, uint32_t w1, float* n0, float* n1) {
  const float u = mul_rn(static_cast<float>(static_cast<int32_t>((w0 >> 8) + 1)), 0x1p-24f);
  const float radius = sqrt_rn(mul_rn(log_unit(u), -2.f));
  const int32_t turn = static_cast<int32_t>(w1 >> 8);                 // 2^24 to the full turn
  const int32_t quadrant = (turn + (1 << 21)) >> 22;                  // nearest quarter, 0..4
  const int32_t rest = turn - (quadrant << 22);                       // in [-2^21, 2^21)
  const float r = mul_rn(static_cast<float>(rest), 0x1.921fb6p-22f);  // times (pi / 2) / 2^22
  const float z = mul_rn(r, r);
  float s = add_rn(mul_rn(z, -1.9515295891e-4f), 8.3321608736e-3f);
  s = add_rn(mul_rn(s, z), -1.6666654611e-1f);
  s = add_rn(mul_rn(mul_rn(s, z), r), r);
  float c = add_rn(mul_rn(z, 2.443315711809948e-5f), -1.388731625493765e-3f);
  c = add_rn(mul_rn(c, z), 4.166664568298827e-2f);
  c = add_rn(add_rn(mul_rn(mul_rn(c, z), z), mul_rn(z, -0.5f)), 1.f);
  const bool swap = quadrant & 1;
  const float cosine = swap ? s : c, sine = swap ? c : s;
  const bool minus_cosine = (quadrant + 1) & 2, minus_sine = quadrant & 2;
  *n0 = mul_rn(radius, minus_cosine ? -cosine : cosine);
  *n1 = mul_rn(radius, minus_sine ? -sine : sine);
}

}  // namespace pybackdoor
