// Binds the stages of contrastive_par.
#include "bindings.h"
#include "ops/contrastive_par.h"

namespace pybackdoor {
namespace {

// What all stages of contrastive_par take: the problem, and where and how to run.
using Problem = std::array<uintptr_t, 10>;  // text .. scale of ContrastiveParArgs
using Sizes = std::array<int64_t, 5>;       // rows, images, all_images, features, offset

ContrastiveParArgs contrastive_par_args(const Problem& problem, const Sizes& sizes, bool normalize,
                                        int dtype) {
  ContrastiveParArgs args = {};
  args.text = address<const void>(problem[0]);
  args.image = address<const void>(problem[1]);
  args.text_ref = address<const void>(problem[2]);
  args.image_ref = address<const void>(problem[3]);
  args.owner = address<const int32_t>(problem[4]);
  args.segment = address<const int32_t>(problem[5]);
  args.weight = address<const void>(problem[6]);
  args.column_weight = address<const void>(problem[7]);
  args.bits = address<const uint8_t>(problem[8]);
  args.scale = address<const void>(problem[9]);
  args.rows = sizes[0];
  args.images = sizes[1];
  args.all_images = sizes[2];
  args.features = sizes[3];
  args.offset = sizes[4];
  args.normalize = normalize;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

std::string contrastive_par(const ContrastiveParArgs& args, ContrastiveParStage stage, int device,
                            uintptr_t stream, const std::string& isa, int threads) {
  const py::gil_scoped_release release;
  if (device < 0) return contrastive_par_cpu(args, stage, isa, threads);
#ifdef PYBACKDOOR_CUDA
  contrastive_par_cuda(args, stage, device, address<void>(stream));
  return "cuda";
#else
  (void)stream;
  throw std::runtime_error("contrastive_par: " + cuda_obstacle());
#endif
}

}  // namespace

void bind_contrastive_par(py::module_& m) {
  m.def(
      "contrastive_par_prep",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t that,
         uintptr_t ihat, uintptr_t inv_text, uintptr_t inv_image, uintptr_t target,
         uintptr_t dist_text, uintptr_t dist_image, uintptr_t flagged, int matrix_dtype, int device,
         uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.that = address<void>(that);
        args.ihat = address<void>(ihat);
        args.inv_text = address<void>(inv_text);
        args.inv_image = address<void>(inv_image);
        args.target = address<void>(target);
        args.dist_text = address<void>(dist_text);
        args.dist_image = address<void>(dist_image);
        args.flagged = address<int32_t>(flagged);
        args.matrix_dtype = static_cast<DType>(matrix_dtype);
        return contrastive_par(args, ContrastiveParStage::kPrep, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("that"), py::arg("ihat"), py::arg("inv_text"), py::arg("inv_image"),
      py::arg("target"), py::arg("dist_text"), py::arg("dist_image"), py::arg("flagged"),
      py::arg("matrix_dtype"), py::arg("device"), py::arg("stream"), py::arg("isa"),
      py::arg("threads"));
  m.def(
      "contrastive_par_exp_block",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t scores,
         uintptr_t row_partial, uintptr_t col_partial, int64_t first, int64_t block, int device,
         uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.scores = address<void>(scores);
        args.row_partial = address<void>(row_partial);
        args.col_partial = address<void>(col_partial);
        args.first = first;
        args.block = block;
        return contrastive_par(args, ContrastiveParStage::kExpBlock, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("scores"), py::arg("row_partial"), py::arg("col_partial"), py::arg("first"),
      py::arg("block"), py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"));
  m.def(
      "contrastive_par_sums",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype,
         uintptr_t row_partial, uintptr_t col_partial, uintptr_t target, uintptr_t r, uintptr_t c,
         uintptr_t log_p, std::array<int64_t, 2> slices, int device, uintptr_t stream,
         const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.row_partial = address<void>(row_partial);
        args.col_partial = address<void>(col_partial);
        args.target = address<void>(target);
        args.r = address<void>(r);
        args.c = address<void>(c);
        args.log_p = address<void>(log_p);
        args.row_slices = slices[0];
        args.col_slices = slices[1];
        return contrastive_par(args, ContrastiveParStage::kSums, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("row_partial"), py::arg("col_partial"), py::arg("target"), py::arg("r"), py::arg("c"),
      py::arg("log_p"), py::arg("slices"), py::arg("device"), py::arg("stream"), py::arg("isa"),
      py::arg("threads"));
  m.def(
      "contrastive_par_lse",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t that,
         uintptr_t ihat, uintptr_t r, uintptr_t c, uintptr_t row_lse, uintptr_t col_lse,
         int matrix_dtype, int device, uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.that = address<void>(that);
        args.ihat = address<void>(ihat);
        args.r = address<void>(r);
        args.c = address<void>(c);
        args.row_lse = address<void>(row_lse);
        args.col_lse = address<void>(col_lse);
        args.matrix_dtype = static_cast<DType>(matrix_dtype);
        return contrastive_par(args, ContrastiveParStage::kLse, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("that"), py::arg("ihat"), py::arg("r"), py::arg("c"), py::arg("row_lse"),
      py::arg("col_lse"), py::arg("matrix_dtype"), py::arg("device"), py::arg("stream"),
      py::arg("isa"), py::arg("threads"));
  m.def(
      "contrastive_par_finalise",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t target,
         uintptr_t r, uintptr_t c, uintptr_t log_p, uintptr_t row_lse, uintptr_t col_lse,
         uintptr_t alpha, uintptr_t beta, uintptr_t coef, uintptr_t row_fix, uintptr_t col_fix,
         uintptr_t loss_row, uintptr_t loss_col, uintptr_t flagged, int device, uintptr_t stream,
         const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.target = address<void>(target);
        args.r = address<void>(r);
        args.c = address<void>(c);
        args.log_p = address<void>(log_p);
        args.row_lse = address<void>(row_lse);
        args.col_lse = address<void>(col_lse);
        args.alpha = address<void>(alpha);
        args.beta = address<void>(beta);
        args.coef = address<void>(coef);
        args.row_fix = address<void>(row_fix);
        args.col_fix = address<void>(col_fix);
        args.loss_row = address<void>(loss_row);
        args.loss_col = address<void>(loss_col);
        args.flagged = address<int32_t>(flagged);
        return contrastive_par(args, ContrastiveParStage::kFinalise, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("target"), py::arg("r"), py::arg("c"), py::arg("log_p"), py::arg("row_lse"),
      py::arg("col_lse"), py::arg("alpha"), py::arg("beta"), py::arg("coef"), py::arg("row_fix"),
      py::arg("col_fix"), py::arg("loss_row"), py::arg("loss_col"), py::arg("flagged"),
      py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"));
  m.def(
      "contrastive_par_totals",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t loss_row,
         uintptr_t loss_col, uintptr_t dist_text, uintptr_t dist_image, uintptr_t total, int device,
         uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.loss_row = address<void>(loss_row);
        args.loss_col = address<void>(loss_col);
        args.dist_text = address<void>(dist_text);
        args.dist_image = address<void>(dist_image);
        args.total = address<void>(total);
        return contrastive_par(args, ContrastiveParStage::kTotals, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("loss_row"), py::arg("loss_col"), py::arg("dist_text"), py::arg("dist_image"),
      py::arg("total"), py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"));
  m.def(
      "contrastive_par_scale_block",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t e,
         uintptr_t alpha, uintptr_t beta, uintptr_t out, int64_t first, int64_t block, int device,
         uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.e = address<const void>(e);
        args.alpha = address<void>(alpha);
        args.beta = address<void>(beta);
        args.out = address<void>(out);
        args.first = first;
        args.block = block;
        return contrastive_par(args, ContrastiveParStage::kScaleBlock, device, stream, isa,
                               threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("e"), py::arg("alpha"), py::arg("beta"), py::arg("out"), py::arg("first"),
      py::arg("block"), py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"));
  m.def(
      "contrastive_par_fixup",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t that,
         uintptr_t ihat, uintptr_t row_fix, uintptr_t col_fix, uintptr_t row_lse, uintptr_t col_lse,
         uintptr_t flagged, uintptr_t g_text, uintptr_t g_image, int matrix_dtype, int device,
         uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.that = address<void>(that);
        args.ihat = address<void>(ihat);
        args.row_fix = address<void>(row_fix);
        args.col_fix = address<void>(col_fix);
        args.row_lse = address<void>(row_lse);
        args.col_lse = address<void>(col_lse);
        args.flagged = address<int32_t>(flagged);
        args.g_text = address<void>(g_text);
        args.g_image = address<void>(g_image);
        args.matrix_dtype = static_cast<DType>(matrix_dtype);
        return contrastive_par(args, ContrastiveParStage::kFixup, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("that"), py::arg("ihat"), py::arg("row_fix"), py::arg("col_fix"), py::arg("row_lse"),
      py::arg("col_lse"), py::arg("flagged"), py::arg("g_text"), py::arg("g_image"),
      py::arg("matrix_dtype"), py::arg("device"), py::arg("stream"), py::arg("isa"),
      py::arg("threads"));
  m.def(
      "contrastive_par_normalize_backward",
      [](const Problem& problem, const Sizes& sizes, bool normalize, int dtype, uintptr_t inv_text,
         uintptr_t inv_image, uintptr_t coef, uintptr_t stats, uintptr_t total, uintptr_t grad,
         uintptr_t g_text, uintptr_t g_image, uintptr_t d_text, uintptr_t d_image,
         uintptr_t dot_text, uintptr_t dot_image, double distance_weight, int device,
         uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = contrastive_par_args(problem, sizes, normalize, dtype);
        args.inv_text = address<void>(inv_text);
        args.inv_image = address<void>(inv_image);
        args.coef = address<void>(coef);
        args.stats = address<void>(stats);
        args.total = address<void>(total);
        args.grad = address<const void>(grad);
        args.g_text = address<void>(g_text);
        args.g_image = address<void>(g_image);
        args.d_text = address<void>(d_text);
        args.d_image = address<void>(d_image);
        args.dot_text = address<void>(dot_text);
        args.dot_image = address<void>(dot_image);
        args.distance_weight = distance_weight;
        return contrastive_par(args, ContrastiveParStage::kNormalizeBackward, device, stream, isa,
                               threads);
      },
      py::kw_only(), py::arg("problem"), py::arg("sizes"), py::arg("normalize"), py::arg("dtype"),
      py::arg("inv_text"), py::arg("inv_image"), py::arg("coef"), py::arg("stats"),
      py::arg("total"), py::arg("grad"), py::arg("g_text"), py::arg("g_image"), py::arg("d_text"),
      py::arg("d_image"), py::arg("dot_text"), py::arg("dot_image"), py::arg("distance_weight"),
      py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"));
  m.def(
      "contrastive_par_close",
      [](uintptr_t total, uintptr_t stats, int dtype, double distance_weight, double tau,
         int device, uintptr_t stream, const std::string& isa, int threads) {
        ContrastiveParArgs args = {};
        args.total = address<void>(total);
        args.stats = address<void>(stats);
        args.dtype = static_cast<DType>(dtype);
        args.distance_weight = distance_weight;
        args.tau = tau;
        return contrastive_par(args, ContrastiveParStage::kClose, device, stream, isa, threads);
      },
      py::kw_only(), py::arg("total"), py::arg("stats"), py::arg("dtype"),
      py::arg("distance_weight"), py::arg("tau"), py::arg("device"), py::arg("stream"),
      py::arg("isa"), py::arg("threads"));
}

}  // namespace pybackdoor
