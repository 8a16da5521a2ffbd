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

PB_HD float from_bfloat16(uint16_t v) { return bits_float(static_cast<uint32_t>(v) << 16); }

PB_HD float from_float16(uint16_t v) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(v & 0x8000u) << 16, magnitude = v & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | magnitude << 13);
  // The exponent's bias grows by 112: a product with a power of two, exact for subnormals too.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

template <DType dtype>
PB_HD float from_bits(const void* values, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return dtype == DType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

template <DType dtype>
PB_HD uint16_t to_half_bits(float v) {
  return dtype == DType::kFloat16 ? to_float16(v) : to_bfloat16(v);
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
