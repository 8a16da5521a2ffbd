// The module pybackdoor._C: addresses, sizes, codes and names in; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>

#include "core/buffer_pool.h"
#include "core/check.h"
#include "core/cuda_info.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "ops/adamw_ema.h"
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

// hypers: lr, beta1, beta2, eps, weight_decay of each group; lr_tensors: addresses, 0 for none;
// ranges: first tensor, tensors, first chunk, chunks. "lanes<n>" as isa runs the test driver.
std::string adamw_ema(uintptr_t tensors, uintptr_t chunks, uintptr_t scalars, uintptr_t partials,
                      uintptr_t status, uintptr_t inv_scale, uintptr_t found_inf,
                      std::array<int64_t, 3> sizes,
                      const std::vector<std::array<double, 5>>& hypers,
                      const std::vector<uintptr_t>& lr_tensors,
                      const std::vector<std::array<int64_t, 4>>& ranges, bool norm_wanted,
                      double clip_norm, double ema_decay, double radius, double noise_std,
                      int64_t seed, int device, uintptr_t stream, const std::string& isa) {
  AdamwEmaArgs args = {};
  args.tensors = address<const AdamwEmaTensor>(tensors);
  args.chunks = address<const AdamwEmaChunk>(chunks);
  args.scalars = address<AdamwEmaScalars>(scalars);
  args.partials = address<double>(partials);
  args.status = address<AdamwEmaStatus>(status);
  args.inv_scale = address<const float>(inv_scale);
  args.found_inf = address<const float>(found_inf);
  args.num_tensors = sizes[0];
  args.num_chunks = sizes[1];
  args.chunk = sizes[2];
  args.norm_wanted = norm_wanted;
  args.clip_norm = clip_norm;
  args.ema_decay = ema_decay;
  args.radius = radius;
  args.noise_std = static_cast<float>(noise_std);
  args.seed = static_cast<uint64_t>(seed);
  PB_CHECK(hypers.size() == ranges.size() && lr_tensors.size() == ranges.size(),
           "adamw_ema: hypers, lr_tensors and ranges must have one entry per group");
  std::vector<AdamwEmaGroup> groups;
  for (size_t k = 0; k < ranges.size(); ++k) {
    const auto& h = hypers[k];
    const auto& r = ranges[k];
    groups.push_back({h[0], h[1], h[2], h[3], h[4], address<const float>(lr_tensors[k]), r[0], r[1],
                      r[2], r[3]});
  }
  const py::gil_scoped_release release;
  if (device < 0) {
    PB_CHECK(isa.rfind("lanes", 0) == 0, "adamw_ema: the CPU has lanes<n> alone, got " + isa);
    adamw_ema_lanes(args, groups, std::atoi(isa.c_str() + 5));
    return isa;
  }
#ifdef PYBACKDOOR_CUDA
  adamw_ema_cuda(args, groups, device, address<void>(stream));
  return "cuda";
#else
  (void)stream;
  throw std::runtime_error("adamw_ema: " + cuda_obstacle());
#endif
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
  m.def("adamw_ema", &adamw_ema, py::kw_only(), py::arg("tensors"), py::arg("chunks"),
        py::arg("scalars"), py::arg("partials"), py::arg("status"), py::arg("inv_scale"),
        py::arg("found_inf"), py::arg("sizes"), py::arg("hypers"), py::arg("lr_tensors"),
        py::arg("ranges"), py::arg("norm_wanted"), py::arg("clip_norm"), py::arg("ema_decay"),
        py::arg("radius"), py::arg("noise_std"), py::arg("seed"), py::arg("device"),
        py::arg("stream"), py::arg("isa"));
}
