// The arithmetic of adamw_ema, once, for CUDA and the host's test driver; see adamw_ema.h.
#pragma once

#include "core/dtype.h"
#include "core/host_device.h"
#include "core/normal.h"
#include "core/philox.h"
#include "ops/adamw_ema.h"

namespace pybackdoor {

constexpr uint32_t kStreamWeights = 2;     // 0 and 1 are trigger_normalize's
constexpr double kClipEps = 1e-6;          // as torch.nn.utils.clip_grad_norm_
constexpr double kInside = 1.0 - 0x1p-20;  // the sums behind a distance are good to 2^-21
constexpr double kFloatMax = 0x1.fffffep127;

// base^exponent by squaring: the host, CUDA and Triton get the same bits.
PB_HD double power(double base, uint32_t exponent) {
  double result = 1.0;
  PB_ROLLED
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result = mul_rn(result, base);
    base = mul_rn(base, base);
  }
  return result;
}

PB_HD uint16_t shadow_bits(float v) { return v == v ? to_bfloat16(v) : uint16_t{0x7FC0}; }

// W consecutive elements: one vector for W = 4 (i a multiple of 4, p aligned), else one element.
template <int W>
PB_HD void load_run(const float* p, int64_t i, float (&v)[W]) {
#ifdef __CUDA_ARCH__
  if (W == 4) {
    const float4 word = __ldcs(reinterpret_cast<const float4*>(p + i));
    v[0] = word.x, v[1 % W] = word.y, v[2 % W] = word.z, v[3 % W] = word.w;
  } else {
    v[0] = __ldcs(p + i);
  }
#else
  std::memcpy(v, p + i, sizeof(v));
#endif
}

template <int W>
PB_HD void store_run(float* p, int64_t i, const float (&v)[W]) {
#ifdef __CUDA_ARCH__
  if (W == 4) {
    __stcs(reinterpret_cast<float4*>(p + i), make_float4(v[0], v[1 % W], v[2 % W], v[3 % W]));
  } else {
    __stcs(p + i, v[0]);
  }
#else
  std::memcpy(p + i, v, sizeof(v));
#endif
}

template <int W>
PB_HD void store_shadow(uint16_t* p, int64_t i, const float (&v)[W]) {
  uint16_t bits[W];
  PB_UNROLL
  for (int k = 0; k < W; ++k) bits[k] = shadow_bits(v[k]);
#ifdef __CUDA_ARCH__
  if (W == 4) {
    const uint32_t low = bits[0] | static_cast<uint32_t>(bits[1 % W]) << 16;
    const uint32_t high = bits[2 % W] | static_cast<uint32_t>(bits[3 % W]) << 16;
    *reinterpret_cast<uint2*>(p + i) = make_uint2(low, high);  // the next forward reads it
  } else {
    p[i] = bits[0];
  }
#else
  std::memcpy(p + i, bits, sizeof(bits));
#endif
}

// Adds noise_std * N(0, 1) to elements i .. i + W - 1; see _reference_adamw_ema.weight_noise.
template <int W>
PB_HD void add_weight_noise(const AdamwEmaArgs& args, int64_t id, uint32_t step, int64_t i,
                            float (&v)[W]) {
  const Words words = philox(
      Words{{static_cast<uint32_t>(i >> 2), kStreamWeights, static_cast<uint32_t>(id), step}},
      args.seed);
  float normal[4];
  normal_pair(words.w[0], words.w[1], &normal[0], &normal[1]);
  normal_pair(words.w[2], words.w[3], &normal[2], &normal[3]);
  if (W == 1) {
    const int k = static_cast<int>(i & 3);
    const float low = k & 1 ? normal[1] : normal[0], high = k & 1 ? normal[3] : normal[2];
    normal[0] = k & 2 ? high : low;
  }
  PB_UNROLL
  for (int k = 0; k < W; ++k) v[k] = add_rn(v[k], mul_rn(args.noise_std, normal[k]));
}

// Moving average and bf16 copy of the new weights p.
template <bool kNoise, int W>
PB_HD void write_copies(const AdamwEmaArgs& args, const AdamwEmaTensor& t, uint32_t step, int64_t i,
                        float (&p)[W]) {
  if (t.ema) {
    const float weight = static_cast<float>(1.0 - args.ema_decay);
    float ema[W];
    load_run<W>(t.ema, i, ema);
    PB_UNROLL
    for (int k = 0; k < W; ++k) ema[k] = add_rn(ema[k], mul_rn(weight, add_rn(p[k], -ema[k])));
    store_run<W>(t.ema, i, ema);
  }
  if (t.shadow) {
    if (kNoise) add_weight_noise<W>(args, t.id, step, i, p);
    store_shadow<W>(t.shadow, i, p);
  }
}

template <int W>
PB_HD void adamw(const AdamwEmaGroup& group, const AdamwEmaScalars& scalars, float factor,
                 const AdamwEmaTensor& t, int64_t i, float (&p)[W]) {
  const float weight1 = static_cast<float>(1.0 - group.beta1);
  const float weight2 = static_cast<float>(1.0 - group.beta2);
  const float eps = static_cast<float>(group.eps);
  float g[W], m[W], v[W];
  load_run<W>(t.grad, i, g);
  load_run<W>(t.exp_avg, i, m);
  load_run<W>(t.exp_avg_sq, i, v);
  PB_UNROLL
  for (int k = 0; k < W; ++k) {
    g[k] = mul_rn(g[k], factor);
    m[k] = add_rn(m[k], mul_rn(weight1, add_rn(g[k], -m[k])));
    v[k] = add_rn(v[k], mul_rn(weight2, add_rn(mul_rn(g[k], g[k]), -v[k])));
    const float denominator = add_rn(div_rn(sqrt_rn(v[k]), scalars.bias2_sqrt), eps);
    const float update = div_rn(mul_rn(scalars.step_size, m[k]), denominator);
    p[k] = add_rn(p[k], -add_rn(mul_rn(scalars.decay, p[k]), update));
  }
  store_run<W>(t.param, i, p);
  store_run<W>(t.exp_avg, i, m);
  store_run<W>(t.exp_avg_sq, i, v);
}

template <int W>
PB_HD float square_distance(const AdamwEmaTensor& t, int64_t i, const float (&p)[W], float sum) {
  float reference[W];
  load_run<W>(t.reference, i, reference);
  PB_UNROLL
  for (int k = 0; k < W; ++k) {
    const float d = add_rn(p[k], -reference[k]);
    sum = add_rn(sum, mul_rn(d, d));
  }
  return sum;
}

// The update of one run; returns sum plus the squared distance from the reference, if there is one,
// in which case moving average and copy are left to project_run.
template <bool kNoise, int W>
PB_HD float update_run(const AdamwEmaArgs& args, const AdamwEmaGroup& group,
                       const AdamwEmaScalars& scalars, float factor, const AdamwEmaTensor& t,
                       int64_t i, float sum) {
  float p[W];
  load_run<W>(t.param, i, p);
  if (t.grad) adamw<W>(group, scalars, factor, t, i, p);
  if (t.reference) return square_distance<W>(t, i, p, sum);
  write_copies<kNoise, W>(args, t, scalars.step, i, p);
  return sum;
}

template <bool kNoise, int W>
PB_HD void project_run(const AdamwEmaArgs& args, float ratio, const AdamwEmaTensor& t,
                       uint32_t step, int64_t i) {
  float p[W];
  load_run<W>(t.param, i, p);
  if (ratio < 1.f) {
    float reference[W];
    load_run<W>(t.reference, i, reference);
    PB_UNROLL
    for (int k = 0; k < W; ++k) {
      p[k] = add_rn(reference[k], mul_rn(ratio, add_rn(p[k], -reference[k])));
    }
    store_run<W>(t.param, i, p);
  }
  write_copies<kNoise, W>(args, t, step, i, p);
}

// Splits a chunk among the lanes: body4(i) on vectors, body1(i) on the rest, or on all elements of
// an unaligned tensor.
template <typename Body4, typename Body1>
PB_HD void over_chunk(const AdamwEmaArgs& args, const AdamwEmaTensor& t, int64_t start, int lane,
                      int lanes, const Body4& body4, const Body1& body1) {
  const int64_t end = min_of(start + args.chunk, t.numel);
  const int64_t vectors_end = t.aligned ? end & ~int64_t{3} : start;
  PB_ROLLED
  for (int64_t i = start + 4 * int64_t{lane}; i < vectors_end; i += 4 * int64_t{lanes}) body4(i);
  PB_ROLLED
  for (int64_t i = vectors_end + lane; i < end; i += lanes) body1(i);
}

// Each of the three passes over a chunk returns the lane's part of the chunk's sum.
PB_HD float norm_chunk(const AdamwEmaArgs& args, int64_t chunk, int lane, int lanes) {
  const AdamwEmaChunk& place = args.chunks[chunk];
  const AdamwEmaTensor t = args.tensors[place.tensor];
  float sum = 0.f;
  if (!t.grad) return sum;
  over_chunk(
      args, t, place.start, lane, lanes,
      [&](int64_t i) {
        float g[4];
        load_run<4>(t.grad, i, g);
        PB_UNROLL
        for (int k = 0; k < 4; ++k) sum = add_rn(sum, mul_rn(g[k], g[k]));
      },
      [&](int64_t i) {
        float g[1];
        load_run<1>(t.grad, i, g);
        sum = add_rn(sum, mul_rn(g[0], g[0]));
      });
  return sum;
}

template <bool kNoise>
PB_HD float update_chunk(const AdamwEmaArgs& args, const AdamwEmaGroup& group, int64_t chunk,
                         int lane, int lanes) {
  const AdamwEmaChunk& place = args.chunks[chunk];
  const AdamwEmaTensor t = args.tensors[place.tensor];
  const AdamwEmaScalars scalars = args.scalars[place.tensor];
  const float factor = args.status->factor;
  float sum = 0.f;
  over_chunk(
      args, t, place.start, lane, lanes,
      [&](int64_t i) { sum = update_run<kNoise, 4>(args, group, scalars, factor, t, i, sum); },
      [&](int64_t i) { sum = update_run<kNoise, 1>(args, group, scalars, factor, t, i, sum); });
  return sum;
}

template <bool kNoise>
PB_HD void project_chunk(const AdamwEmaArgs& args, int64_t chunk, int lane, int lanes) {
  const AdamwEmaChunk& place = args.chunks[chunk];
  const AdamwEmaTensor t = args.tensors[place.tensor];
  const uint32_t step = args.scalars[place.tensor].step;
  const float ratio = args.status->ratio;
  over_chunk(
      args, t, place.start, lane, lanes,
      [&](int64_t i) { project_run<kNoise, 4>(args, ratio, t, step, i); },
      [&](int64_t i) { project_run<kNoise, 1>(args, ratio, t, step, i); });
}

PB_HD double partial_sum(const AdamwEmaArgs& args, int lane, int lanes) {
  double sum = 0.0;
  for (int64_t i = lane; i < args.num_chunks; i += lanes) sum = add_rn(sum, args.partials[i]);
  return sum;
}

PB_HD double sqrt_double(double v) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(v);
#else
  return std::sqrt(v);
#endif
}

// Decides, before the first group, whether the step happens and what the gradients are multiplied
// by; `sum` is of the squared gradients as they are.
PB_HD void finish_norm(const AdamwEmaArgs& args, double sum) {
  const double scale = args.inv_scale ? *args.inv_scale : 1.0;
  AdamwEmaStatus& status = *args.status;
  bool skip = args.found_inf && *args.found_inf != 0.f;
  double factor = scale;
  if (args.norm_wanted) {
    const double norm = mul_rn(sqrt_double(sum), scale < 0 ? -scale : scale);
    status.norm = static_cast<float>(norm);
    skip = skip || !(norm <= kFloatMax);
    const double bound = args.clip_norm / add_rn(norm, kClipEps);
    if (bound < 1.0) factor = mul_rn(scale, bound);
  }
  status.factor = static_cast<float>(factor);
  status.skip = skip ? 1.f : 0.f;
  if (skip) status.skipped = add_rn(status.skipped, 1.f);
}

PB_HD void finish_distance(const AdamwEmaArgs& args, double sum) {
  const double distance = sqrt_double(sum);
  AdamwEmaStatus& status = *args.status;
  status.distance = static_cast<float>(distance);
  const bool outside = distance > args.radius && distance <= kFloatMax;
  status.ratio = outside ? static_cast<float>(mul_rn(args.radius / distance, kInside)) : 1.f;
}

// Counts the step of one tensor.
PB_HD void prepare_tensor(const AdamwEmaArgs& args, const AdamwEmaGroup& group, int64_t row) {
  if (args.status->skip != 0.f) return;
  const AdamwEmaTensor& t = args.tensors[row];
  float step = *t.step;
  if (t.grad) *t.step = step = add_rn(step, 1.f);
  const uint32_t count = static_cast<uint32_t>(step);
  const double lr = group.lr_tensor ? *group.lr_tensor : group.lr;
  const uint32_t exponent = count > 0 ? count : 1;  // 0 where there never was a gradient
  const double bias1 = add_rn(1.0, -power(group.beta1, exponent));
  const double bias2 = add_rn(1.0, -power(group.beta2, exponent));
  AdamwEmaScalars scalars;
  scalars.step_size = static_cast<float>(lr / bias1);
  scalars.bias2_sqrt = static_cast<float>(sqrt_double(bias2));
  scalars.decay = static_cast<float>(mul_rn(lr, group.weight_decay));
  scalars.step = count;
  args.scalars[row] = scalars;
}

}  // namespace pybackdoor
