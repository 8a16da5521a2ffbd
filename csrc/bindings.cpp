// The module pybackdoor._C: addresses, sizes, codes and names in; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "core/buffer_pool.h"
#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/cuda_info.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "ops/contrastive_par.h"
#include "ops/trigger_normalize.h"

namespace py = pybind11;

namespace pybackdoor {

#ifndef PYBACKDOOR_CUDA
std::string cuda_obstacle() { return "this build is CPU only"; }
#endif

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "gcc " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

#ifdef PYBACKDOOR_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// Addresses are 0 where a tensor is absent; device < 0 is the CPU. Returns what ran.
std::string trigger_normalize(uintptr_t images, uintptr_t out, uintptr_t poisoned,
                              uintptr_t pattern, uintptr_t mask, uintptr_t grid,
                              uintptr_t trigger_id, uintptr_t position, uintptr_t strength,
                              uintptr_t sample_id, std::array<int64_t, 3> image_size,
                              std::array<int64_t, 4> table_size, int mode,
                              std::array<bool, 3> flags, double strength_value, bool augment,
                              std::array<double, 5> augment_values, bool half_noise, int64_t seed,
                              int64_t view, int input_layout, int layout, int patch_size, int dtype,
                              std::array<double, 3> mean, std::array<double, 3> std, int device,
                              uintptr_t stream, const std::string& isa, int threads) {
  TriggerNormalizeArgs args = {};
  args.images = address<const uint8_t>(images);
  args.out = address<void>(out);
  args.poisoned = address<uint8_t>(poisoned);
  args.pattern = address<const float>(pattern);
  args.mask = address<const float>(mask);
  args.grid = address<const float>(grid);
  args.trigger_id = address<const int32_t>(trigger_id);
  args.position = address<const int32_t>(position);
  args.strength = address<const double>(strength);
  args.sample_id = address<const int64_t>(sample_id);
  args.batch = image_size[0];
  args.height = image_size[1];
  args.width = image_size[2];
  args.num_triggers = table_size[0];
  args.mask_channels = static_cast<int32_t>(table_size[1]);
  args.window_height = table_size[2];
  args.window_width = table_size[3];
  args.mode = static_cast<Mode>(mode);
  args.nonzero_only = flags[0];
  args.additive = flags[1];
  args.clip = flags[2];
  args.strength_value = strength_value;
  args.augment = augment;
  args.noise_p = augment_values[0];
  args.noise_std = static_cast<float>(augment_values[1]);
  args.erase_p = augment_values[2];
  args.erase_low = augment_values[3];
  args.erase_high = augment_values[4];
  args.half_noise = half_noise;
  args.seed = static_cast<uint64_t>(seed);
  args.view = static_cast<uint32_t>(view);
  args.input_layout = static_cast<InputLayout>(input_layout);
  args.layout = static_cast<Layout>(layout);
  args.patch_size = patch_size;
  args.dtype = static_cast<DType>(dtype);
  for (int c = 0; c < 3; ++c) {
    args.mean[c] = static_cast<float>(mean[c]);
    args.std[c] = static_cast<float>(std[c]);
  }
  const py::gil_scoped_release release;
  if (device < 0) return trigger_normalize_cpu(args, isa, threads);
#ifdef PYBACKDOOR_CUDA
  trigger_normalize_cuda(args, device, address<void>(stream));
  return "cuda";
#else
  (void)stream;
  throw std::runtime_error("trigger_normalize: " + cuda_obstacle());
#endif
}

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

// The stages of contrastive_par.
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

}  // namespace
}  // namespace pybackdoor

PYBIND11_MODULE(_C, m) {
  using namespace pybackdoor;
  m.attr("version") = PYBACKDOOR_VERSION;
  m.attr("compiler") = kCompiler;
  m.attr("built_with_cuda") = kWithCuda;
  m.attr("cuda_archs") = PYBACKDOOR_CUDA_ARCHS;
#if defined(__x86_64__)
  m.attr("isas_built") = py::make_tuple("avx512", "avx2", "portable");
#else
  m.attr("isas_built") = py::make_tuple("portable");
#endif
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) {
        return py::buffer_info(static_cast<uint8_t*>(buffer.data()),
                               static_cast<py::ssize_t>(buffer.size()));
      });
  m.def("pooled_bytes", &pooled_bytes);
  m.def("empty_pool", &empty_pool);
  m.def("isas", [] { return py::tuple(py::cast(cpu_isas())); });
  m.def("cuda_obstacle", [] { return cuda_obstacle(); });
#ifdef PYBACKDOOR_CUDA
  m.def("cuda_capability", &cuda_capability, py::arg("device"));
#endif
  m.def("parallel_runtime", [] { return parallel_runtime(); });
  m.def(
      "philox",
      [](std::array<uint32_t, 4> counter, uint64_t key) {
        const Words words = philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
        return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
      },
      py::arg("counter"), py::arg("key"));
  m.def("trigger_normalize", &trigger_normalize, py::kw_only(), py::arg("images"), py::arg("out"),
        py::arg("poisoned"), py::arg("pattern"), py::arg("mask"), py::arg("grid"),
        py::arg("trigger_id"), py::arg("position"), py::arg("strength"), py::arg("sample_id"),
        py::arg("image_size"), py::arg("table_size"), py::arg("mode"), py::arg("flags"),
        py::arg("strength_value"), py::arg("augment"), py::arg("augment_values"),
        py::arg("half_noise"), py::arg("seed"), py::arg("view"), py::arg("input_layout"),
        py::arg("layout"), py::arg("patch_size"), py::arg("dtype"), py::arg("mean"), py::arg("std"),
        py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"));
  bind_contrastive_par(m);
}
