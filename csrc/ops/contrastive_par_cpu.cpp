// The CPU backend: checks a stage's arguments and spreads its lines or tiles over threads.
#include <vector>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/parallel.h"
#include "ops/contrastive_par_rows.h"

namespace pybackdoor {

using Stage = ContrastiveParStage;

void check_contrastive_par(const ContrastiveParArgs& a, Stage stage, bool cuda) {
  const auto need = [](std::initializer_list<const void*> pointers, const char* names) {
    for (const void* p : pointers) {
      PB_CHECK(p, std::string("contrastive_par: required: ") + names);
    }
  };
  PB_CHECK(a.dtype >= DType::kFloat32 && a.dtype <= DType::kFloat64,
           "contrastive_par: unknown dtype");
  PB_CHECK(!cuda || a.dtype != DType::kFloat64, "contrastive_par: float64 runs on the CPU only");
  if (stage == Stage::kClose) return need({a.total, a.stats}, "total, stats");
  PB_CHECK(a.rows >= 0 && a.images >= 0 && a.offset >= 0 && a.all_images >= a.offset + a.images,
           "contrastive_par: sizes must be >= 0, and offset + images <= all_images");
  PB_CHECK(a.rows < int64_t{1} << 31 && a.all_images < int64_t{1} << 31,
           "contrastive_par: sizes must be < 2^31");
  PB_CHECK(a.features > 0, "contrastive_par: features must be > 0");
  PB_CHECK(a.rows == 0 || a.images > 0, "contrastive_par: text rows need images");
  if (stage == Stage::kPrep || stage == Stage::kLse || stage == Stage::kFixup) {
    const bool is_double = a.dtype == DType::kFloat64;
    PB_CHECK(a.matrix_dtype == DType::kFloat64 ? is_double
                                               : !is_double && a.matrix_dtype != DType::kFloat16,
             "contrastive_par: matrix_dtype must be float32, bfloat16, or float64 with float64");
  }
  need({a.scale}, "scale");
  if (a.rows > 0) need({a.text, a.owner, a.weight}, "text, owner, weight");
  if (a.images > 0) need({a.image, a.segment}, "image, segment");
  if (a.all_images > 0) need({a.column_weight, a.bits}, "column_weight, bits");
  const bool rows = a.rows > 0, images = a.images > 0, columns = a.all_images > 0;
  switch (stage) {
    case Stage::kPrep:
      need({a.flagged}, "flagged");
      if (rows) need({a.that, a.inv_text, a.target, a.dist_text}, "that, inv_text, ...");
      if (images) need({a.ihat, a.inv_image, a.dist_image}, "ihat, inv_image, dist_image");
      break;
    case Stage::kExpBlock:
    case Stage::kScaleBlock:
      PB_CHECK(!cuda, "contrastive_par: exp_block and scale_block run on the CPU only");
      PB_CHECK(a.first >= 0 && a.block >= 0 && a.first + a.block <= a.rows,
               "contrastive_par: the block must lie within the text rows");
      if (stage == Stage::kExpBlock) {
        if (columns) need({a.col_partial}, "col_partial");
        if (a.block > 0) need({a.row_partial, a.scores}, "row_partial, scores");
      } else if (a.block > 0) {
        need({a.e, a.alpha, a.beta, a.out}, "e, alpha, beta, out");
      }
      break;
    case Stage::kSums:
      PB_CHECK(a.row_slices >= 0 && a.col_slices >= 0, "contrastive_par: slices must be >= 0");
      if (rows) need({a.row_partial, a.target, a.r}, "row_partial, target, r");
      if (columns) need({a.col_partial, a.c}, "col_partial, c");
      if (images) need({a.log_p}, "log_p");
      break;
    case Stage::kLse:
      if (rows) need({a.that, a.r, a.row_lse}, "that, r, row_lse");
      if (columns) need({a.ihat, a.c, a.col_lse}, "ihat, c, col_lse");
      break;
    case Stage::kFinalise:
      need({a.flagged}, "flagged");
      if (columns) need({a.c, a.log_p, a.col_lse, a.beta, a.col_fix}, "c, log_p, col_lse, ...");
      if (images) need({a.loss_col}, "loss_col");
      if (rows) {
        need({a.target, a.r, a.row_lse, a.alpha, a.coef, a.row_fix, a.loss_row},
             "target, r, row_lse, alpha, coef, row_fix, loss_row");
      }
      break;
    case Stage::kTotals:
      need({a.total}, "total");
      if (rows) need({a.loss_row, a.dist_text}, "loss_row, dist_text");
      if (images) need({a.loss_col, a.dist_image}, "loss_col, dist_image");
      break;
    case Stage::kFixup:
      need({a.flagged}, "flagged");
      if (rows) need({a.that, a.row_fix, a.row_lse}, "that, row_fix, row_lse");
      if (columns) need({a.ihat, a.col_fix, a.col_lse}, "ihat, col_fix, col_lse");
      break;
    case Stage::kNormalizeBackward:
      need({a.stats, a.total, a.grad}, "stats, total, grad");
      if (rows) need({a.inv_text, a.coef}, "inv_text, coef");
      if (images) need({a.inv_image}, "inv_image");
      if (a.d_text && rows) need({a.g_text, a.dot_text}, "g_text, dot_text");
      if (a.d_image && images) need({a.g_image, a.dot_image}, "g_image, dot_image");
      break;
    case Stage::kClose:
      break;
  }
}

namespace {

constexpr int64_t kGrain = 1 << 14;  // elements: some 5 us, a few times a fork

// Lines per share where each takes `elements`.
int64_t grain(int64_t elements) { return max_of(1, kGrain / max_of(1, elements)); }

template <typename A>
void exp_block(const ContrastiveParArgs& args, void (*exp)(const ExpTile<A>&), int threads) {
  using Word = typename MaskWord<A>::type;
  const int64_t columns = args.all_images, block = args.block;
  std::vector<Word> keep(static_cast<size_t>(columns)), unlearn(static_cast<size_t>(columns));
  for (int64_t j = 0; j < columns; ++j) {
    const bool valid = args.bits[j] & kValid;
    keep[j] = valid ? ~Word{0} : 0;
    unlearn[j] = valid && !(args.bits[j] & kSuspect) ? ~Word{0} : 0;
  }
  // The tiles are the same for any number of threads, and so is the order of all sums.
  const int64_t across = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t down = (block + kTileRows - 1) / kTileRows;
  std::vector<A> row_sums(static_cast<size_t>(across * block));
  std::vector<A> col_sums(static_cast<size_t>(down * columns));
  parallel_for(down * across, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / across * kTileRows, column = item % across * kTileColumns;
      ExpTile<A> tile = {};
      tile.e = out<A>(args.scores) + row * columns + column;
      tile.stride = columns;
      tile.rows = min_of(kTileRows, block - row);
      tile.columns = min_of(kTileColumns, columns - column);
      tile.first_column = column - args.offset;
      tile.weight = in<A>(args.weight) + args.first + row;
      tile.owner = args.owner + args.first + row;
      tile.keep = keep.data() + column;
      tile.unlearn = unlearn.data() + column;
      tile.scale = scale_of<A>(args);
      tile.shift = shift_of<A>(args);
      tile.row_sum = row_sums.data() + item % across * block + row;
      tile.col_sum = col_sums.data() + item / across * columns + column;
      exp(tile);
    }
  });
  A* row_partial = out<A>(args.row_partial) + args.first;
  for (int64_t i = 0; i < block; ++i) {
    A sum = 0;
    for (int64_t k = 0; k < across; ++k) sum += row_sums[k * block + i];
    row_partial[i] = sum;
  }
  A* col_partial = out<A>(args.col_partial);
  for (int64_t j = 0; j < columns; ++j) col_partial[j] = 0;
  for (int64_t k = 0; k < down; ++k) {
    for (int64_t j = 0; j < columns; ++j) col_partial[j] += col_sums[k * columns + j];
  }
}

template <typename A, int lanes>
void run_small(const ContrastiveParArgs& args, Stage stage, int threads) {
  if (stage == Stage::kSums) {
    const int64_t slices = max_of(args.row_slices, args.col_slices);
    parallel_for(args.rows + args.all_images, grain(slices), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t line = begin; line < end; ++line) {
                     A sum = 0;
                     for (int lane = 0; lane < lanes; ++lane) {
                       sum += partial_sum<A>(args, line, lane, lanes);
                     }
                     put_sum(args, line, sum);
                   }
                 });
    parallel_for(args.images, grain(args.rows / max_of(1, args.images)), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t j = begin; j < end; ++j) {
                     log_positive<A>(args, j, HostTeam<lanes>());
                   }
                 });
  } else if (stage == Stage::kFinalise) {
    parallel_for(args.all_images, grain(16), threads, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) finalise_image<A>(args, j, HostTeam<lanes>());
    });
  } else if (stage == Stage::kTotals) {
    if (lanes == 1) {
      totals<A, double>(args, HostTeam<lanes>());
    } else {
      totals<A, A>(args, HostTeam<lanes>());
    }
  } else {
    close<A>(args);
  }
}

const ContrastiveParRows* find_rows(const std::string& isa) {
  static constexpr ContrastiveParRows portable = PB_CONTRASTIVE_PAR_ROWS("portable", 16, 1);
  static constexpr ContrastiveParRows lanes1 = PB_CONTRASTIVE_PAR_ROWS("lanes1", 0, 1);
  static constexpr ContrastiveParRows lanes32 = PB_CONTRASTIVE_PAR_ROWS("lanes32", 0, 32);
  if (isa == lanes1.name) return &lanes1;
  if (isa == lanes32.name) return &lanes32;
#if defined(__x86_64__)
  if (has_avx512() && (isa == "auto" || isa == "avx512")) return &contrastive_par_avx512_rows();
  if (has_avx2() && (isa == "auto" || isa == "avx2")) return &contrastive_par_avx2_rows();
#endif
  return isa == "auto" || isa == portable.name ? &portable : nullptr;
}

}  // namespace

std::string contrastive_par_cpu(const ContrastiveParArgs& args, Stage stage, const std::string& isa,
                                int threads) {
  check_contrastive_par(args, stage, false);
  const ContrastiveParRows* rows = find_rows(isa);
  PB_CHECK(rows, "contrastive_par: instruction set " + isa + " is not usable on this machine");
  const bool is_double = args.dtype == DType::kFloat64;
  const int64_t lines = args.rows + args.images, all_lines = args.rows + args.all_images;
  switch (stage) {
    case Stage::kPrep:
      args.flagged[0] = args.flagged[1] = 0;
      parallel_for(lines, grain(args.features), threads,
                   [&](int64_t begin, int64_t end) { rows->prep(args, begin, end); });
      break;
    case Stage::kLse:
      parallel_for(all_lines, grain(args.features), threads,
                   [&](int64_t begin, int64_t end) { rows->lse(args, begin, end); });
      break;
    case Stage::kFixup:
      if (args.flagged[0] == 0 && args.flagged[1] == 0) break;
      parallel_for(all_lines, grain(args.features), threads,
                   [&](int64_t begin, int64_t end) { rows->fixup(args, begin, end); });
      break;
    case Stage::kNormalizeBackward:
      parallel_for(lines, grain(args.features), threads,
                   [&](int64_t begin, int64_t end) { rows->normalize_backward(args, begin, end); });
      break;
    case Stage::kExpBlock:
      if (is_double) {
        exp_block<double>(args, rows->exp_double, threads);
      } else {
        exp_block<float>(args, rows->exp_float, threads);
      }
      break;
    case Stage::kScaleBlock:
      parallel_for(args.block, grain(args.all_images), threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          (is_double ? rows->scale_double : rows->scale_float)(args, row);
        }
      });
      break;
    default: {
      const bool one = isa != "lanes32";
      if (is_double) {
        (one ? run_small<double, 1> : run_small<double, 32>)(args, stage, threads);
      } else {
        (one ? run_small<float, 1> : run_small<float, 32>)(args, stage, threads);
      }
    }
  }
  return rows->name;
}

}  // namespace pybackdoor
