// The CPU passes of contrastive_par: plain C++ that the compiler vectorises, compiled once per
// instruction set with the flags that setup.py gives the including file. No FMA, and sums in an
// order fixed by sizes: all instruction sets give the same bits.
#pragma once

#include "ops/contrastive_par_body.h"

namespace pybackdoor {

constexpr int kTileColumns = 2048;  // 8 KB each of E, of its mask and of the column sums stay in L1
constexpr int kTileRows = 64;

template <typename A>
struct MaskWord;
template <>
struct MaskWord<float> {
  using type = uint32_t;
};
template <>
struct MaskWord<double> {
  using type = uint64_t;
};

// Some rows and columns of the block that exp_block works on.
template <typename A>
struct ExpTile {
  A* e;                                       // [rows, columns], rows `stride` apart
  int64_t stride, rows, columns;              // columns <= kTileColumns
  int64_t first_column;                       // minus the rank's offset: that of an owner of 0
  const A* weight;                            // [rows]
  const int32_t* owner;                       // [rows]
  const typename MaskWord<A>::type* keep;     // [columns]: all ones, 0 where masked; w > 0
  const typename MaskWord<A>::type* unlearn;  // the same for w < 0
  A scale, shift;
  A* row_sum;  // [rows], written
  A* col_sum;  // [columns], written: rows with w > 0
};

struct ContrastiveParRows {
  const char* name;
  // Lines [begin, end): text rows, then images or columns.
  void (*prep)(const ContrastiveParArgs& args, int64_t begin, int64_t end);
  void (*lse)(const ContrastiveParArgs& args, int64_t begin, int64_t end);
  void (*fixup)(const ContrastiveParArgs& args, int64_t begin, int64_t end);
  void (*normalize_backward)(const ContrastiveParArgs& args, int64_t begin, int64_t end);
  void (*exp_float)(const ExpTile<float>& tile);
  void (*exp_double)(const ExpTile<double>& tile);
  // Row `row` of the block.
  void (*scale_float)(const ContrastiveParArgs& args, int64_t row);
  void (*scale_double)(const ContrastiveParArgs& args, int64_t row);
};

// exp ---------------------------------------------------------------------------------------------

// Within 1.3 ulp (2 where the result is subnormal); 0 and inf where std::exp has them; NaN stays.
static inline float exp_of(float x) {
  constexpr float kLow = -104.f, kHigh = 89.f;  // beyond, 0 and inf
  constexpr float kLog2e = 1.44269504f;         // 1 / log 2
  constexpr float kLog2Hi = 0x1.62ep-1f;        // log 2 to 12 bits: times n it is exact
  constexpr float kLog2Lo = 0x1.0bfbe8p-15f;    // the rest
  constexpr float kRound = 0x1.8p23f;           // adding it rounds to an integer
  const float low = x < kLow ? kLow : x;
  const float t = low > kHigh ? kHigh : low;
  const float rounded = t * kLog2e + kRound;
  const float n = rounded - kRound;
  const float r = (t - n * kLog2Hi) - n * kLog2Lo;  // |r| <= log(2) / 2
  float p = 1.9875691500e-4f;                       // (exp(r) - 1 - r) / r^2, Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.f;
  // Times 2^n in two steps, as n is in [-150, 128] and a subnormal result must be rounded once:
  // the first adds to the exponent. n's bits are the low ones of `rounded`, the others fall out.
  const uint32_t bits = float_bits(rounded), half = bits >> 1, rest = bits - half;
  const float scaled = bits_float(float_bits(y) + (half << 23));
  return scaled * bits_float((rest << 23) + 0x3F800000u);
}

static inline double exp_of(double x) { return std::exp(x); }

static inline float and_bits(float v, uint32_t mask) { return bits_float(float_bits(v) & mask); }
static inline double and_bits(double v, uint64_t mask) { return mask ? v : 0.0; }

// Pairwise, so that it vectorises; scratch holds n / 2.
template <typename A>
static inline A pairwise_sum(const A* v, int64_t n, A* scratch) {
  if (n == 0) return 0;
  A odd = 0;
  for (bool first = true; n > 1; first = false) {
    const A* from = first ? v : scratch;
    const int64_t half = n / 2;
    if (n % 2) odd += from[n - 1];
    for (int64_t i = 0; i < half; ++i) scratch[i] = from[i] + from[half + i];
    n = half;
    v = scratch;
  }
  return v[0] + odd;
}

template <typename A>
static void exp_tile(const ExpTile<A>& tile) {
  alignas(64) A scratch[kTileColumns / 2];
  A* __restrict sums = tile.col_sum;
  const int64_t columns = tile.columns;
  const A scale = tile.scale, shift = tile.shift;
  for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    A* __restrict e = tile.e + i * tile.stride;
    const A weight = tile.weight[i];
    if (weight == 0) {
      for (int64_t j = 0; j < columns; ++j) e[j] = 0;
      tile.row_sum[i] = 0;
      continue;
    }
    const auto* __restrict mask = weight > 0 ? tile.keep : tile.unlearn;
    for (int64_t j = 0; j < columns; ++j) e[j] = and_bits(exp_of(scale * e[j] - shift), mask[j]);
    const int64_t target = tile.owner[i] - tile.first_column;
    if (target >= 0 && target < columns) e[target] = 0;
    tile.row_sum[i] = pairwise_sum(e, columns, scratch);
    if (weight > 0) {
      for (int64_t j = 0; j < columns; ++j) sums[j] += e[j];
    }
  }
}

template <typename A>
static void scale_row(const ContrastiveParArgs& args, int64_t row) {
  const int64_t columns = args.all_images;
  const A* from = in<A>(args.e) + row * columns;
  A* to = out<A>(args.out) + row * columns;
  const A alpha = in<A>(args.alpha)[args.first + row];
  const bool recover = in<A>(args.weight)[args.first + row] > 0;
  for (int64_t begin = 0; begin < columns; begin += kTileColumns) {
    const int64_t n = min_of(kTileColumns, columns - begin);
    A* __restrict e = to + begin;
    if (from != to) std::memcpy(e, from + begin, static_cast<size_t>(n) * sizeof(A));
    if (recover) {
      const A* __restrict beta = in<A>(args.beta) + begin;
      for (int64_t j = 0; j < n; ++j) {
        const A factor = alpha + beta[j], scaled = e[j] * factor;
        e[j] = factor == 0 ? 0 : scaled;
      }
    } else if (alpha == 0) {
      for (int64_t j = 0; j < n; ++j) e[j] = 0;
    } else {
      for (int64_t j = 0; j < n; ++j) e[j] *= alpha;
    }
  }
}

// Lines -------------------------------------------------------------------------------------------

// A chunk: `width` elements, or 0 for those that CUDA takes.
template <int width, typename T>
constexpr int kWidth = width > 0 ? width : kChunkOf<T>;

template <typename T, typename H, int width, int lanes>
static void prep_range(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    prep_line<T, H, kWidth<width, T>>(args, line, true, HostTeam<lanes>());
  }
}

template <int width, int lanes>
static void prep_lines(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  const bool wide = args.matrix_dtype == DType::kFloat32;
  auto run = prep_range<double, double, width, lanes>;
  if (args.dtype == DType::kFloat32) {
    run = wide ? prep_range<float, float, width, lanes> : prep_range<float, BFloat16, width, lanes>;
  } else if (args.dtype == DType::kFloat16) {
    run = wide ? prep_range<Half, float, width, lanes> : prep_range<Half, BFloat16, width, lanes>;
  } else if (args.dtype == DType::kBFloat16) {
    run = wide ? prep_range<BFloat16, float, width, lanes>
               : prep_range<BFloat16, BFloat16, width, lanes>;
  }
  run(args, begin, end);
}

template <typename H, int width, int lanes>
static void lse_range(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  const HostTeam<lanes> team;
  const auto wanted = [&](int64_t line) { return lse_wanted<Acc<H>>(args, line); };
  each_where(team, begin, end, wanted,
             [&](int64_t line) { lse_line<H, kWidth<width, H>>(args, line, true, team); });
}

template <int width, int lanes>
static void lse_lines(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  auto run = lse_range<double, width, lanes>;
  if (args.matrix_dtype == DType::kFloat32) run = lse_range<float, width, lanes>;
  if (args.matrix_dtype == DType::kBFloat16) run = lse_range<BFloat16, width, lanes>;
  run(args, begin, end);
}

template <typename H, int width, int lanes>
static void fixup_range(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  const HostTeam<lanes> team;
  const auto wanted = [&](int64_t line) { return fixup_wanted<Acc<H>>(args, line); };
  each_where(team, begin, end, wanted,
             [&](int64_t line) { fixup_line<H, kWidth<width, H>>(args, line, true, team); });
}

template <int width, int lanes>
static void fixup_lines(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  auto run = fixup_range<double, width, lanes>;
  if (args.matrix_dtype == DType::kFloat32) run = fixup_range<float, width, lanes>;
  if (args.matrix_dtype == DType::kBFloat16) run = fixup_range<BFloat16, width, lanes>;
  run(args, begin, end);
}

template <typename T, int width, int lanes>
static void normalize_backward_range(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    const bool is_text = line < args.rows;
    if (!(is_text ? args.d_text : args.d_image)) continue;
    normalize_backward_row<T, kWidth<width, T>>(args, is_text, is_text ? line : line - args.rows,
                                                true, HostTeam<lanes>());
  }
}

template <int width, int lanes>
static void normalize_backward_lines(const ContrastiveParArgs& args, int64_t begin, int64_t end) {
  auto run = normalize_backward_range<double, width, lanes>;
  if (args.dtype == DType::kFloat32) run = normalize_backward_range<float, width, lanes>;
  if (args.dtype == DType::kFloat16) run = normalize_backward_range<Half, width, lanes>;
  if (args.dtype == DType::kBFloat16) run = normalize_backward_range<BFloat16, width, lanes>;
  run(args, begin, end);
}

#define PB_CONTRASTIVE_PAR_ROWS(name, width, lanes) \
  {name,                                            \
   prep_lines<width, lanes>,                        \
   lse_lines<width, lanes>,                         \
   fixup_lines<width, lanes>,                       \
   normalize_backward_lines<width, lanes>,          \
   exp_tile<float>,                                 \
   exp_tile<double>,                                \
   scale_row<float>,                                \
   scale_row<double>}

#if defined(__x86_64__)
const ContrastiveParRows& contrastive_par_avx2_rows();    // call only where has_avx2()
const ContrastiveParRows& contrastive_par_avx512_rows();  // call only where has_avx512()
#endif

}  // namespace pybackdoor
