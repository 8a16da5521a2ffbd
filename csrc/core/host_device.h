// What a body compiled for both host and device needs: the qualifier, and arithmetic in which every
// operation rounds by itself (nvcc contracts a * b + c into an FMA unless told otherwise; the host
// is compiled with -ffp-contract=off).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// `static` keeps each translation unit's copy to itself: those compiled for AVX-512 must never be
// the ones the linker keeps for everybody.
#ifdef __CUDACC__
#define PB_HD __host__ __device__ static inline
#else
#define PB_HD static inline
#endif

#ifdef __CUDA_ARCH__
#define PB_UNROLL _Pragma("unroll")
#define PB_ROLLED _Pragma("unroll 1")
#else
#define PB_UNROLL
#define PB_ROLLED
#endif

namespace pybackdoor {

PB_HD float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PB_HD float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PB_HD float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

PB_HD float sqrt_rn(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

PB_HD double mul_rn(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

PB_HD double add_rn(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// NaN becomes low.
PB_HD float clamp(float v, float low, float high) {
  v = v > low ? v : low;
  return v < high ? v : high;
}

PB_HD int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PB_HD int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

PB_HD uint32_t float_bits(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
#endif
}

PB_HD float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
#endif
}

struct alignas(16) Vec16 {
  uint32_t w[4];
};

PB_HD bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

struct alignas(8) Vec8 {
  uint32_t w[2];
};

PB_HD bool aligned8(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 7) == 0; }
PB_HD bool aligned4(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 3) == 0; }

PB_HD Vec8 load8(const void* p) {  // p 8 B aligned
#ifdef __CUDA_ARCH__
  const uint2 v = __ldg(static_cast<const uint2*>(p));
  return Vec8{{v.x, v.y}};
#else
  Vec8 v;
  std::memcpy(&v, p, 8);
  return v;
#endif
}

PB_HD uint32_t load4(const void* p) {  // p 4 B aligned
#ifdef __CUDA_ARCH__
  return __ldg(static_cast<const unsigned*>(p));
#else
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
#endif
}

PB_HD Vec16 load16(const void* p) {  // p 16 B aligned
#ifdef __CUDA_ARCH__
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return Vec16{{v.x, v.y, v.z, v.w}};
#else
  Vec16 v;
  std::memcpy(&v, p, 16);
  return v;
#endif
}

PB_HD void store16(void* p, const Vec16& v) {  // p 16 B aligned
#ifdef __CUDA_ARCH__
  __stcs(static_cast<uint4*>(p), make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
#else
  std::memcpy(p, &v, 16);
#endif
}

}  // namespace pybackdoor
