// Codes and conversions of the floating dtypes; each conversion rounds to nearest, ties to even.
#pragma once

#include "core/host_device.h"

namespace pybackdoor {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

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

}  // namespace pybackdoor
