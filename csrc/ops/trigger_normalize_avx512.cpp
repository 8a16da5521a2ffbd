// Row kernels for AVX-512 with VBMI. Levels are handled 64 at a time as bytes: pixels are taken
// apart and joined by vpermi2b, and a 256-entry table of 4 B or 2 B values is four or two byte
// tables, each of them two vpermi2b of 128 entries.
#include <immintrin.h>

#include "ops/trigger_normalize_rows.h"

namespace pybackdoor {
namespace {

struct Index {
  alignas(64) uint8_t at[64];
};

// Byte i of plane c lies at 3 * i + c of 192 bytes: the first two vectors are reached by one
// vpermi2b, the third (marked in `third`) by a vpermb on top.
struct SplitIndex {
  Index two, last;
  uint64_t third;
};

constexpr SplitIndex split_index(int c) {
  SplitIndex s = {};
  for (int i = 0; i < 64; ++i) {
    const int at = 3 * i + c;
    s.two.at[i] = static_cast<uint8_t>(at & 127);
    s.last.at[i] = static_cast<uint8_t>(at & 63);
    if (at >= 128) s.third |= uint64_t{1} << i;
  }
  return s;
}

// Byte k of interleaved vector v is pixel (64 v + k) / 3 of plane (64 v + k) % 3.
constexpr SplitIndex join_index(int v) {
  SplitIndex s = {};
  for (int k = 0; k < 64; ++k) {
    const int pixel = (64 * v + k) / 3, plane = (64 * v + k) % 3;
    s.two.at[k] = static_cast<uint8_t>(pixel + (plane == 1 ? 64 : 0));
    s.last.at[k] = static_cast<uint8_t>(pixel);
    if (plane == 2) s.third |= uint64_t{1} << k;
  }
  return s;
}

constexpr SplitIndex kSplit[3] = {split_index(0), split_index(1), split_index(2)};
constexpr SplitIndex kJoin[3] = {join_index(0), join_index(1), join_index(2)};

inline __m512i pick(const SplitIndex& s, __m512i a, __m512i b, __m512i c) {
  const __m512i two = _mm512_permutex2var_epi8(a, _mm512_load_si512(s.two.at), b);
  return _mm512_mask_permutexvar_epi8(two, s.third, _mm512_load_si512(s.last.at), c);
}

inline __mmask64 first_lanes(int64_t n) {  // the first n of 64, n may lie outside [0, 64]
  return n >= 64 ? ~uint64_t{0} : n <= 0 ? 0 : (uint64_t{1} << n) - 1;
}

void split(const uint8_t* pixels, uint8_t* const planes[3], int64_t n) {
  for (int64_t i = 0; i < n; i += 64) {
    const int64_t rest = 3 * (n - i);
    __m512i v[3];
    for (int k = 0; k < 3; ++k) {
      v[k] = _mm512_maskz_loadu_epi8(first_lanes(rest - 64 * k), pixels + 3 * i + 64 * k);
    }
    for (int c = 0; c < 3; ++c) {
      const __m512i plane = pick(kSplit[c], v[0], v[1], v[2]);
      _mm512_mask_storeu_epi8(planes[c] + i, first_lanes(n - i), plane);
    }
  }
}

void join(const uint8_t* const planes[3], uint8_t* pixels, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) {
    __m512i v[3];
    for (int c = 0; c < 3; ++c) {
      v[c] = _mm512_maskz_loadu_epi8(first_lanes(n - i), planes[c] + i);
    }
    for (int k = 0; k < 3; ++k) {
      _mm512_mask_storeu_epi8(pixels + 3 * i + 64 * k, first_lanes(3 * (n - i) - 64 * k),
                              pick(kJoin[k], v[0], v[1], v[2]));
    }
  }
}

// 16 levels of one channel, the results as 32 bit integers whose low byte counts. vcvttps2dq gives
// 2^31 where the value does not fit: 0 modulo 256, and so is every float of that size.
template <bool nonzero_only, bool clip>
inline __m512i blend16(const uint8_t* q, const float* t, __m512 a, __m512 b) {
  const __m512i levels = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
  const __m512 x = _mm512_cvtepi32_ps(levels), pattern = _mm512_loadu_ps(t);
  const __m512 hi = _mm512_set1_ps(kInv255Hi), lo = _mm512_set1_ps(kInv255Lo);
  const __m512 value = _mm512_fmadd_ps(x, hi, _mm512_mul_ps(x, lo));
  __m512 mixed = _mm512_add_ps(_mm512_mul_ps(a, pattern), _mm512_mul_ps(b, value));
  if (clip) {
    mixed = _mm512_min_ps(_mm512_max_ps(mixed, _mm512_setzero_ps()), _mm512_set1_ps(1.f));
  }
  const __m512i mixed_levels = _mm512_cvttps_epi32(_mm512_mul_ps(mixed, _mm512_set1_ps(255.f)));
  if (!nonzero_only) return mixed_levels;
  const __mmask16 nonzero = _mm512_cmp_ps_mask(pattern, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_mask_mov_epi32(levels, nonzero, mixed_levels);
}

constexpr Index low_bytes() {  // of two vectors of 32 bit integers, in the first 32 bytes
  Index index = {};
  for (int k = 0; k < 64; ++k) index.at[k] = static_cast<uint8_t>(4 * k & 127);
  return index;
}

constexpr Index kLowBytes = low_bytes();

template <bool nonzero_only, bool clip>
inline __m512i blend64(const float* t, const uint8_t* q, __m512 a, __m512 b) {
  const __m512i index = _mm512_load_si512(kLowBytes.at);
  const __m512i v0 = blend16<nonzero_only, clip>(q, t, a, b);
  const __m512i v1 = blend16<nonzero_only, clip>(q + 16, t + 16, a, b);
  const __m512i v2 = blend16<nonzero_only, clip>(q + 32, t + 32, a, b);
  const __m512i v3 = blend16<nonzero_only, clip>(q + 48, t + 48, a, b);
  const __m512i low = _mm512_permutex2var_epi8(v0, index, v1);
  const __m512i high = _mm512_permutex2var_epi8(v2, index, v3);
  return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
}

template <bool nonzero_only, bool clip>
void blend_unmasked(const float* t, uint8_t* q, int64_t n, const BlendRule& rule) {
  const __m512 a = _mm512_set1_ps(rule.a), b = _mm512_set1_ps(rule.b);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    _mm512_storeu_si512(q + i, blend64<nonzero_only, clip>(t + i, q + i, a, b));
  }
  if (i == n) return;
  alignas(64) uint8_t last[64] = {};
  alignas(64) float pattern[64] = {};
  std::memcpy(last, q + i, n - i);
  std::memcpy(pattern, t + i, (n - i) * sizeof(float));
  _mm512_store_si512(last, blend64<nonzero_only, clip>(pattern, last, a, b));
  std::memcpy(q + i, last, n - i);
}

void blend(const float* t, const float* m, uint8_t* q, int64_t n, const BlendRule& rule) {
  if (m) return blend_row(t, m, q, n, rule);
  if (rule.nonzero_only && rule.clip) return blend_unmasked<true, true>(t, q, n, rule);
  if (rule.nonzero_only) return blend_unmasked<true, false>(t, q, n, rule);
  if (rule.clip) return blend_unmasked<false, true>(t, q, n, rule);
  blend_unmasked<false, false>(t, q, n, rule);
}

// One byte of the table entries of 64 levels.
struct ByteTable {
  __m512i part[4];
};

inline ByteTable load_table(const uint8_t* bytes) {
  ByteTable table;
  for (int k = 0; k < 4; ++k) table.part[k] = _mm512_load_si512(bytes + 64 * k);
  return table;
}

inline __m512i look_up(const ByteTable& table, __m512i levels, __mmask64 upper) {
  const __m512i low = _mm512_permutex2var_epi8(table.part[0], levels, table.part[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.part[2], levels, table.part[3]);
  return _mm512_mask_blend_epi8(upper, low, high);
}

template <bool streamed>
inline void put(void* p, __m512i v) {
  if (streamed) {
    _mm512_stream_si512(static_cast<__m512i*>(p), v);
  } else {
    _mm512_storeu_si512(p, v);
  }
}

// The unpack instructions work within 16 B lanes. Reordering the levels first (a transpose of
// 4 x 4 groups of 4, or of 4 x 2 groups of 8) makes their results come out in order.
inline void expand4(const ByteTable (&table)[4], __m512i q, __m512i (&out)[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  q = _mm512_permutexvar_epi32(order, q);
  const __mmask64 upper = _mm512_movepi8_mask(q);
  const __m512i b0 = look_up(table[0], q, upper), b1 = look_up(table[1], q, upper);
  const __m512i b2 = look_up(table[2], q, upper), b3 = look_up(table[3], q, upper);
  const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
  const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
  out[0] = _mm512_unpacklo_epi16(low01, low23);
  out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23);
  out[3] = _mm512_unpackhi_epi16(high01, high23);
}

inline void expand2(const ByteTable (&table)[2], __m512i q, __m512i (&out)[2]) {
  q = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), q);
  const __mmask64 upper = _mm512_movepi8_mask(q);
  const __m512i b0 = look_up(table[0], q, upper), b1 = look_up(table[1], q, upper);
  out[0] = _mm512_unpacklo_epi8(b0, b1);
  out[1] = _mm512_unpackhi_epi8(b0, b1);
}

template <bool streamed>
void lookup4(const uint8_t (&bytes)[4][256], const uint8_t* q, float* out, int64_t n) {
  const ByteTable table[4] = {load_table(bytes[0]), load_table(bytes[1]), load_table(bytes[2]),
                              load_table(bytes[3])};
  __m512i v[4];
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    expand4(table, _mm512_loadu_si512(q + i), v);
    for (int k = 0; k < 4; ++k) put<streamed>(out + i + 16 * k, v[k]);
  }
  if (i == n) return;
  expand4(table, _mm512_maskz_loadu_epi8(first_lanes(n - i), q + i), v);
  for (int k = 0; k < 4; ++k) {
    const __mmask16 lanes = static_cast<__mmask16>(first_lanes(n - i - 16 * k));
    _mm512_mask_storeu_epi32(out + i + 16 * k, lanes, v[k]);
  }
}

template <bool streamed>
void lookup2(const uint8_t (&bytes)[4][256], const uint8_t* q, uint16_t* out, int64_t n) {
  const ByteTable table[2] = {load_table(bytes[0]), load_table(bytes[1])};
  __m512i v[2];
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    expand2(table, _mm512_loadu_si512(q + i), v);
    for (int k = 0; k < 2; ++k) put<streamed>(out + i + 32 * k, v[k]);
  }
  if (i == n) return;
  expand2(table, _mm512_maskz_loadu_epi8(first_lanes(n - i), q + i), v);
  for (int k = 0; k < 2; ++k) {
    const __mmask32 lanes = static_cast<__mmask32>(first_lanes(n - i - 32 * k));
    _mm512_mask_storeu_epi16(out + i + 32 * k, lanes, v[k]);
  }
}

void lookup(const LevelTable& table, int c, DType dtype, const uint8_t* q, void* out, int64_t n,
            bool stream) {
  if (dtype == DType::kFloat32) {
    float* p = static_cast<float*>(out);
    return stream ? lookup4<true>(table.bytes[c], q, p, n)
                  : lookup4<false>(table.bytes[c], q, p, n);
  }
  uint16_t* p = static_cast<uint16_t*>(out);
  stream ? lookup2<true>(table.bytes[c], q, p, n) : lookup2<false>(table.bytes[c], q, p, n);
}

// blend and lookup in one loop, so that the stores of one 64 drain while the next is computed.
template <bool clip, bool streamed>
void blend_lookup4(const float* t, uint8_t* q, int64_t n, const BlendRule& rule,
                   const uint8_t (&bytes)[4][256], float* out) {
  const ByteTable table[4] = {load_table(bytes[0]), load_table(bytes[1]), load_table(bytes[2]),
                              load_table(bytes[3])};
  const __m512 a = _mm512_set1_ps(rule.a), b = _mm512_set1_ps(rule.b);
  __m512i v[4];
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    expand4(table, blend64<false, clip>(t + i, q + i, a, b), v);
    for (int k = 0; k < 4; ++k) put<streamed>(out + i + 16 * k, v[k]);
  }
  if (i == n) return;
  blend_unmasked<false, clip>(t + i, q + i, n - i, rule);
  lookup4<streamed>(bytes, q + i, out + i, n - i);
}

template <bool clip, bool streamed>
void blend_lookup2(const float* t, uint8_t* q, int64_t n, const BlendRule& rule,
                   const uint8_t (&bytes)[4][256], uint16_t* out) {
  const ByteTable table[2] = {load_table(bytes[0]), load_table(bytes[1])};
  const __m512 a = _mm512_set1_ps(rule.a), b = _mm512_set1_ps(rule.b);
  __m512i v[2];
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    expand2(table, blend64<false, clip>(t + i, q + i, a, b), v);
    for (int k = 0; k < 2; ++k) put<streamed>(out + i + 32 * k, v[k]);
  }
  if (i == n) return;
  blend_unmasked<false, clip>(t + i, q + i, n - i, rule);
  lookup2<streamed>(bytes, q + i, out + i, n - i);
}

template <bool clip, bool streamed>
void blend_lookup_as(const float* t, uint8_t* q, int64_t n, const BlendRule& rule,
                     const LevelTable& table, int c, DType dtype, void* out) {
  if (dtype == DType::kFloat32) {
    float* p = static_cast<float*>(out);
    return blend_lookup4<clip, streamed>(t, q, n, rule, table.bytes[c], p);
  }
  blend_lookup2<clip, streamed>(t, q, n, rule, table.bytes[c], static_cast<uint16_t*>(out));
}

void blend_lookup(const float* t, uint8_t* q, int64_t n, const BlendRule& rule,
                  const LevelTable& table, int c, DType dtype, void* out, bool stream) {
  const auto run = rule.clip
                       ? (stream ? blend_lookup_as<true, true> : blend_lookup_as<true, false>)
                       : (stream ? blend_lookup_as<false, true> : blend_lookup_as<false, false>);
  run(t, q, n, rule, table, c, dtype, out);
}

}  // namespace

const RowOps& avx512_rows() {
  static constexpr RowOps ops = {"avx512",
                                 split,
                                 join,
                                 patch_row,
                                 blend,
                                 warp_rows,
                                 lookup,
                                 noise_row,
                                 interleave_rows,
                                 blend_lookup,
                                 window_float_row,
                                 widen_row,
                                 widen_planes_rows,
                                 accumulate_rows};
  return ops;
}

}  // namespace pybackdoor
