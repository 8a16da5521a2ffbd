// Binds adamw_ema.
#include "bindings.h"
#include "ops/adamw_ema.h"

namespace pybackdoor {
namespace {

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

void bind_adamw_ema(py::module_& m) {
  m.def("adamw_ema", &adamw_ema, py::kw_only(), py::arg("tensors"), py::arg("chunks"),
        py::arg("scalars"), py::arg("partials"), py::arg("status"), py::arg("inv_scale"),
        py::arg("found_inf"), py::arg("sizes"), py::arg("hypers"), py::arg("lr_tensors"),
        py::arg("ranges"), py::arg("norm_wanted"), py::arg("clip_norm"), py::arg("ema_decay"),
        py::arg("radius"), py::arg("noise_std"), py::arg("seed"), py::arg("device"),
        py::arg("stream"), py::arg("isa"));
}

}  // namespace pybackdoor
