// Row kernels of the CPU backend: each handles a run of pixels of one image that fits into L1.
// The functions here are plain C++, compiled once per instruction set (they vectorise) with the
// flags that setup.py gives the including file; trigger_normalize_avx512.cpp replaces some.
#pragma once

#include "ops/trigger_normalize_body.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace pybackdoor {

constexpr int kRun = 2048;  // pixels of a run: 6 KB of levels stay in L1 from step to step

// The normalised value of each level, in the forms that the row kernels read.
struct LevelTable {
  float value[3][256];
  uint16_t half[3][256];                 // rounded to the output's 2 byte dtype
  alignas(64) uint8_t bytes[3][4][256];  // byte k of value (4 B output) or half (2 B output)
};

struct NoiseRow {
  uint64_t seed;
  uint32_t first_block;  // Philox block of the run's first pixel
  uint32_t stream_view, id_low, id_high;
  float noise_std, mean, std;
  bool half;
  DType dtype;
};

struct WarpRow {
  const uint8_t* image;   // first byte of the image
  int64_t step, channel;  // distance of neighbouring pixels and channels
  int64_t height, width;
  const float* grid;  // [n, 2] of the run
  bool clip;
};

// Unquantised values of one channel of a window, normalised.
struct FloatRow {
  Mode mode;
  const float *t, *m;  // m may be null
  BlendRule rule;
  float mean, std;
  DType dtype;
};

constexpr int kTogether = 4;  // samples added in one pass over the sums

// What one sample adds to the batch sums of one channel of a window; see
// trigger_normalize_backward.h.
struct GradRow {
  const float* grad;  // of the output
  const uint8_t* q;
  float strength;
  float *sum, *moment;  // moment may be null
  const float *t, *m;   // with clip; m may be null
  BlendRule rule;
  bool clip;
};

struct RowOps {
  const char* name;
  // [n, 3] interleaved -> three planes, and back.
  void (*split)(const uint8_t* pixels, uint8_t* const planes[3], int64_t n);
  void (*join)(const uint8_t* const planes[3], uint8_t* pixels, int64_t n);
  // Overwrite or blend the n levels q of one channel; m may be null.
  void (*patch)(const float* t, uint8_t* q, int64_t n, bool clip);
  void (*blend)(const float* t, const float* m, uint8_t* q, int64_t n, const BlendRule& rule);
  void (*warp)(const WarpRow& row, uint8_t* const planes[3], int64_t n);
  // n levels of channel c to out; stream: past the caches (out 64 B aligned).
  void (*lookup)(const LevelTable& table, int c, DType dtype, const uint8_t* q, void* out,
                 int64_t n, bool stream);
  void (*noise)(const NoiseRow& row, const uint8_t* q, void* out, int64_t n);
  // Three planes of n elements of `size` bytes -> [n, 3].
  void (*interleave)(const void* const planes[3], void* out, int64_t n, int64_t size);
  // blend without mask and nonzero_only, then lookup; q is scratch afterwards. Null: do both in
  // turn.
  void (*blend_lookup)(const float* t, uint8_t* q, int64_t n, const BlendRule& rule,
                       const LevelTable& table, int c, DType dtype, void* out, bool stream);
  void (*window_floats)(const FloatRow& row, const uint8_t* q, void* out, int64_t n);
  // n elements of a dtype to floats; [n, 3] of a dtype to three planes of floats.
  void (*widen)(const void* values, DType dtype, float* out, int64_t n);
  void (*widen_planes)(const void* values, DType dtype, float* const planes[3], int64_t n);
  // Adds `count` <= kTogether samples, in order; they share sum, moment, t, m and clip.
  void (*accumulate)(const GradRow* rows, int count, int64_t n);
};

static inline void split_rows(const uint8_t* pixels, uint8_t* const planes[3], int64_t n) {
  uint8_t* __restrict r = planes[0];
  uint8_t* __restrict g = planes[1];
  uint8_t* __restrict b = planes[2];
  for (int64_t i = 0; i < n; ++i) {
    r[i] = pixels[3 * i];
    g[i] = pixels[3 * i + 1];
    b[i] = pixels[3 * i + 2];
  }
}

static inline void join_rows(const uint8_t* const planes[3], uint8_t* __restrict pixels,
                             int64_t n) {
  const uint8_t *r = planes[0], *g = planes[1], *b = planes[2];
  for (int64_t i = 0; i < n; ++i) {
    pixels[3 * i] = r[i];
    pixels[3 * i + 1] = g[i];
    pixels[3 * i + 2] = b[i];
  }
}

static inline void patch_row(const float* t, uint8_t* __restrict q, int64_t n, bool clip) {
  for (int64_t i = 0; i < n; ++i) q[i] = quantize(t[i], clip);
}

static inline void blend_row(const float* t, const float* m, uint8_t* __restrict q, int64_t n,
                             const BlendRule& rule) {
  const BlendRule r = rule;
  if (m) {
    for (int64_t i = 0; i < n; ++i) q[i] = blend_masked(q[i], t[i], m[i], r);
  } else {
    for (int64_t i = 0; i < n; ++i) q[i] = blend_weighted(q[i], t[i], r.a, r.b, r);
  }
}

static inline void warp_rows(const WarpRow& row, uint8_t* const planes[3], int64_t n) {
  constexpr int kBlock = 64;
  int32_t at0[kBlock], at1[kBlock], at2[kBlock], at3[kBlock];  // nw, ne, sw, se
  float w0[kBlock], w1[kBlock], w2[kBlock], w3[kBlock];
  uint8_t v0[kBlock], v1[kBlock], v2[kBlock], v3[kBlock], q[kBlock];
  float gx[kBlock] = {}, gy[kBlock] = {};
  const int32_t width = static_cast<int32_t>(row.width), height = static_cast<int32_t>(row.height);
  const int32_t step = static_cast<int32_t>(row.step);
  const bool clip = row.clip;
  for (int64_t first = 0; first < n; first += kBlock) {
    // All blocks are computed whole: beyond `count` at the last points given, which are valid.
    const int count = static_cast<int>(min_of(kBlock, n - first));
    for (int i = 0; i < count; ++i) {
      gx[i] = row.grid[2 * (first + i)];
      gy[i] = row.grid[2 * (first + i) + 1];
    }
    for (int i = 0; i < kBlock; ++i) {
      const Corners c = warp_corners(gx[i], gy[i], height, width);
      // Clamped into the image: where that moves an index its weight is 0.
      const int32_t x0 = clamp_index(c.x, width), x1 = clamp_index(c.x + 1, width);
      const int32_t y0 = clamp_index(c.y, height), y1 = clamp_index(c.y + 1, height);
      at0[i] = (y0 * width + x0) * step;
      at1[i] = (y0 * width + x1) * step;
      at2[i] = (y1 * width + x0) * step;
      at3[i] = (y1 * width + x1) * step;
      w0[i] = c.weight[0];
      w1[i] = c.weight[1];
      w2[i] = c.weight[2];
      w3[i] = c.weight[3];
    }
    for (int c = 0; c < 3; ++c) {
      const uint8_t* p = row.image + c * row.channel;
      for (int i = 0; i < kBlock; ++i) {
        v0[i] = p[at0[i]];
        v1[i] = p[at1[i]];
        v2[i] = p[at2[i]];
        v3[i] = p[at3[i]];
      }
      for (int i = 0; i < kBlock; ++i) {
        q[i] = quantize(warp_mix(v0[i], v1[i], v2[i], v3[i], w0[i], w1[i], w2[i], w3[i]), clip);
      }
      std::memcpy(planes[c] + first, q, count);
    }
  }
}

static inline void lookup_row(const LevelTable& table, int c, DType dtype, const uint8_t* q,
                              void* out, int64_t n, bool) {
  if (dtype == DType::kFloat32) {
    float* __restrict p = static_cast<float*>(out);
    const float* value = table.value[c];
    for (int64_t i = 0; i < n; ++i) p[i] = value[q[i]];
  } else {
    uint16_t* __restrict p = static_cast<uint16_t*>(out);
    const uint16_t* half = table.half[c];
    for (int64_t i = 0; i < n; ++i) p[i] = half[q[i]];
  }
}

static inline void convert_row(const float* v, DType dtype, void* out, int64_t n) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out, v, static_cast<size_t>(n) * 4);
    return;
  }
  uint16_t* __restrict p = static_cast<uint16_t*>(out);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) p[i] = to_bfloat16(v[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), half);
  }
#endif
  for (; i < n; ++i) p[i] = to_float16(v[i]);
}

static inline void noise_row(const NoiseRow& row, const uint8_t* q, void* out, int64_t n) {
  constexpr int kBlocks = 16;  // Philox blocks side by side, 64 pixels
  const NoiseRow r = row;
  uint32_t word[4][kBlocks];
  float normal[4 * kBlocks], value[4 * kBlocks];
  for (int64_t first = 0; first < n; first += 4 * kBlocks) {
    const int count = static_cast<int>(min_of(4 * kBlocks, n - first));
    const uint32_t block = r.first_block + static_cast<uint32_t>(first / 4);
    for (int k = 0; k < kBlocks; ++k) {
      const Words w = philox(
          Words{{block + static_cast<uint32_t>(k), r.stream_view, r.id_low, r.id_high}}, r.seed);
      word[0][k] = w.w[0];
      word[1][k] = w.w[1];
      word[2][k] = w.w[2];
      word[3][k] = w.w[3];
    }
    for (int k = 0; k < kBlocks; ++k) {
      normal_pair(word[0][k], word[1][k], &normal[4 * k], &normal[4 * k + 1]);
      normal_pair(word[2][k], word[3][k], &normal[4 * k + 2], &normal[4 * k + 3]);
    }
    for (int i = 0; i < count; ++i) {
      const float x = add_noise(level_value(q[first + i]), normal[i], r.noise_std, r.half);
      value[i] = normalize_value(x, r.mean, r.std);
    }
    const int64_t size = r.dtype == DType::kFloat32 ? 4 : 2;
    convert_row(value, r.dtype, static_cast<char*>(out) + first * size, count);
  }
}

template <typename T>
static inline void interleave_as(const void* const planes[3], void* out, int64_t n) {
  const T* r = static_cast<const T*>(planes[0]);
  const T* g = static_cast<const T*>(planes[1]);
  const T* b = static_cast<const T*>(planes[2]);
  T* __restrict p = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) {
    p[3 * i] = r[i];
    p[3 * i + 1] = g[i];
    p[3 * i + 2] = b[i];
  }
}

static inline void interleave_rows(const void* const planes[3], void* out, int64_t n,
                                   int64_t size) {
  if (size == 4) return interleave_as<uint32_t>(planes, out, n);
  interleave_as<uint16_t>(planes, out, n);
}

static inline void window_float_row(const FloatRow& row, const uint8_t* q, void* out, int64_t n) {
  constexpr int kBlock = 256;
  const FloatRow r = row;
  float value[kBlock];
  const int64_t size = dtype_size(r.dtype);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(min_of(kBlock, n - first));
    const float* t = r.t + first;
    const float* m = r.m ? r.m + first : nullptr;
    const uint8_t* x = q + first;
    if (r.mode == Mode::kPatch) {
      for (int i = 0; i < count; ++i) {
        value[i] = window_value(Mode::kPatch, x[i], t[i], nullptr, r.rule);
      }
    } else if (m) {
      for (int i = 0; i < count; ++i) {
        value[i] = window_value(Mode::kBlend, x[i], t[i], m + i, r.rule);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        value[i] = window_value(Mode::kBlend, x[i], t[i], nullptr, r.rule);
      }
    }
    for (int i = 0; i < count; ++i) value[i] = normalize_value(value[i], r.mean, r.std);
    convert_row(value, r.dtype, static_cast<char*>(out) + first * size, count);
  }
}

static inline void widen_row(const void* values, DType dtype, float* __restrict out, int64_t n) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out, values, static_cast<size_t>(n) * 4);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(values);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(p[i]);
    return;
  }
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) out[i] = from_float16(p[i]);
}

static inline void widen_planes_rows(const void* values, DType dtype, float* const planes[3],
                                     int64_t n) {
  constexpr int kBlock = 128;
  float* __restrict r = planes[0];
  float* __restrict g = planes[1];
  float* __restrict b = planes[2];
  float block[3 * kBlock];
  const char* p = static_cast<const char*>(values);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int count = static_cast<int>(min_of(kBlock, n - first));
    widen_row(p + 3 * first * dtype_size(dtype), dtype, block, 3 * count);
    for (int i = 0; i < count; ++i) {
      r[first + i] = block[3 * i];
      g[first + i] = block[3 * i + 1];
      b[first + i] = block[3 * i + 2];
    }
  }
}

template <bool moment, bool clip, bool masked>
static inline void accumulate_as(const GradRow& row, int64_t n) {
  const GradRow r = row;
  const float* g = r.grad;
  const uint8_t* q = r.q;
  const float *t = r.t, *m = r.m;
  float* __restrict sum = r.sum;
  float* __restrict product = r.moment;
  for (int64_t i = 0; i < n; ++i) {
    float term = mul_rn(g[i], r.strength);
    if (clip) {
      float a = r.rule.a, b = r.rule.b;
      if (masked) masked_weights(m[i], r.rule, &a, &b);
      const float value = mixed_value(q[i], t[i], a, b);
      term = (value >= 0.f) & (value <= 1.f) ? term : 0.f;
    }
    sum[i] = add_rn(sum[i], term);
    if (moment) {
      const float level = static_cast<float>(static_cast<int32_t>(q[i]));
      product[i] = add_rn(product[i], mul_rn(term, level));
    }
  }
}

template <bool moment>
static inline void accumulate_moment(const GradRow& row, int64_t n) {
  if (!row.clip) return accumulate_as<moment, false, false>(row, n);
  if (row.m) return accumulate_as<moment, true, true>(row, n);
  accumulate_as<moment, true, false>(row, n);
}

#if defined(__clang__)
#define PB_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PB_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Four streams at once: the sums are read and written once, and more of memory is in flight.
template <bool moment>
static inline void accumulate_four(const GradRow* rows, int64_t n) {
  static_assert(kTogether == 4, "one pointer each");
  const float *g0 = rows[0].grad, *g1 = rows[1].grad, *g2 = rows[2].grad, *g3 = rows[3].grad;
  const uint8_t *q0 = rows[0].q, *q1 = rows[1].q, *q2 = rows[2].q, *q3 = rows[3].q;
  const float s0 = rows[0].strength, s1 = rows[1].strength, s2 = rows[2].strength;
  const float s3 = rows[3].strength;
  float* __restrict sum = rows[0].sum;
  float* __restrict product = rows[0].moment;
  const auto level = [](uint8_t x) { return static_cast<float>(static_cast<int32_t>(x)); };
  PB_INDEPENDENT  // too many pointers for the compiler to check
      for (int64_t i = 0; i < n; ++i) {
    const float t0 = mul_rn(g0[i], s0), t1 = mul_rn(g1[i], s1);
    const float t2 = mul_rn(g2[i], s2), t3 = mul_rn(g3[i], s3);
    sum[i] = add_rn(add_rn(add_rn(add_rn(sum[i], t0), t1), t2), t3);
    if (moment) {
      float p = add_rn(product[i], mul_rn(t0, level(q0[i])));
      p = add_rn(p, mul_rn(t1, level(q1[i])));
      p = add_rn(p, mul_rn(t2, level(q2[i])));
      product[i] = add_rn(p, mul_rn(t3, level(q3[i])));
    }
  }
}

static inline void accumulate_rows(const GradRow* rows, int count, int64_t n) {
  if (count == kTogether && !rows[0].clip) {
    return rows[0].moment ? accumulate_four<true>(rows, n) : accumulate_four<false>(rows, n);
  }
  for (int k = 0; k < count; ++k) {
    rows[k].moment ? accumulate_moment<true>(rows[k], n) : accumulate_moment<false>(rows[k], n);
  }
}

#define PB_GENERIC_ROWS(name) \
  {name,                      \
   split_rows,                \
   join_rows,                 \
   patch_row,                 \
   blend_row,                 \
   warp_rows,                 \
   lookup_row,                \
   noise_row,                 \
   interleave_rows,           \
   nullptr,                   \
   window_float_row,          \
   widen_row,                 \
   widen_planes_rows,         \
   accumulate_rows}

// The rows for an instruction set, "auto" the best; throws std::invalid_argument.
const RowOps& find_rows(const std::string& isa);

const RowOps& portable_rows();
#if defined(__x86_64__)
const RowOps& avx2_rows();    // call only where the CPU has AVX2 and F16C
const RowOps& avx512_rows();  // call only where it has AVX-512 F, BW, DQ, VL and VBMI
#endif

}  // namespace pybackdoor
