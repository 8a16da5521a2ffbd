// Codes and conversions of the floating dtypes; each conversion rounds to nearest, ties to even.
#pragma once

#include "core/host_device.h"

namespace pybackdoor {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

PB_HD uint16_t to_bfloat16(float v) {  // v not NaN
  const uint32_t bits = float_bits(v);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

PB_HD uint16_t to_float16(float v) {  // v not NaN
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
  return half;
#else
  const uint32_t bits = float_bits(v);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // >= 2^16
  if (magnitude < 0x38800000u) {  // < 2^-14: the sum's ulp is a subnormal half's, 2^-24
    const uint32_t sum = float_bits(bits_float(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

template <DType dtype>
PB_HD uint16_t to_half_bits(float v) {
  return dtype == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
}

PB_HD float from_bfloat16(uint16_t half) { return bits_float(static_cast<uint32_t>(half) << 16); }

PB_HD float from_float16(uint16_t half) {
#ifdef __CUDA_ARCH__
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(half));
  return v;
#else
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7FFFu) << 13;
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);  // subnormals too
  return bits_float(sign | (magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite));
#endif
}

// Elements of a tensor whose dtype is a template argument.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What sums over elements of T are formed in.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

PB_HD float widen(float v) { return v; }
PB_HD double widen(double v) { return v; }
PB_HD float widen(Half v) { return from_float16(v.bits); }
PB_HD float widen(BFloat16 v) { return from_bfloat16(v.bits); }

// Rounds to nearest, ties to even; NaN stays NaN.
PB_HD void narrow(float v, float* out) { *out = v; }
PB_HD void narrow(double v, double* out) { *out = v; }
PB_HD void narrow(float v, Half* out) { out->bits = v != v ? 0x7E00u : to_float16(v); }
PB_HD void narrow(float v, BFloat16* out) { out->bits = v != v ? 0x7FC0u : to_bfloat16(v); }

}  // namespace pybackdoor
