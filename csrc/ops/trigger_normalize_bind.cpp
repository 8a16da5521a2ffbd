// Binds trigger_normalize and its backward.
#include "bindings.h"
#include "ops/trigger_normalize.h"
#include "ops/trigger_normalize_backward.h"

namespace pybackdoor {
namespace {

// What the forward and the backward pass of trigger_normalize share.
TriggerNormalizeArgs trigger_normalize_args(
    uintptr_t images, uintptr_t out, uintptr_t pattern, uintptr_t mask, uintptr_t trigger_id,
    uintptr_t position, uintptr_t strength, uintptr_t sample_id,
    const std::array<int64_t, 3>& image_size, const std::array<int64_t, 4>& table_size, int mode,
    const std::array<bool, 3>& flags, double strength_value, bool augment,
    const std::array<double, 5>& augment_values, int64_t seed, int64_t view, int input_layout,
    int layout, int patch_size, int dtype, const std::array<double, 3>& std) {
  TriggerNormalizeArgs args = {};
  args.images = address<const uint8_t>(images);
  args.out = address<void>(out);
  args.pattern = address<const float>(pattern);
  args.mask = address<const float>(mask);
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
  args.quantize = true;
  args.strength_value = strength_value;
  args.augment = augment;
  args.noise_p = augment_values[0];
  args.noise_std = static_cast<float>(augment_values[1]);
  args.erase_p = augment_values[2];
  args.erase_low = augment_values[3];
  args.erase_high = augment_values[4];
  args.seed = static_cast<uint64_t>(seed);
  args.view = static_cast<uint32_t>(view);
  args.input_layout = static_cast<InputLayout>(input_layout);
  args.layout = static_cast<Layout>(layout);
  args.patch_size = patch_size;
  args.dtype = static_cast<DType>(dtype);
  for (int c = 0; c < 3; ++c) args.std[c] = static_cast<float>(std[c]);
  return args;
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
                              uintptr_t stream, const std::string& isa, int threads,
                              bool quantize) {
  TriggerNormalizeArgs args = trigger_normalize_args(
      images, out, pattern, mask, trigger_id, position, strength, sample_id, image_size, table_size,
      mode, flags, strength_value, augment, augment_values, seed, view, input_layout, layout,
      patch_size, dtype, std);
  args.poisoned = address<uint8_t>(poisoned);
  args.grid = address<const float>(grid);
  args.half_noise = half_noise;
  args.quantize = quantize;
  for (int c = 0; c < 3; ++c) args.mean[c] = static_cast<float>(mean[c]);
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

// The same for the gradients of pattern and mask from `grad`, that of the output.
std::string trigger_normalize_backward(
    uintptr_t images, uintptr_t grad, uintptr_t pattern, uintptr_t mask, uintptr_t trigger_id,
    uintptr_t position, uintptr_t strength, uintptr_t sample_id, uintptr_t order, uintptr_t begin,
    uintptr_t partial, uintptr_t pattern_grad, uintptr_t mask_grad, int slices,
    std::array<int64_t, 3> image_size, std::array<int64_t, 4> table_size, int mode,
    std::array<bool, 3> flags, double strength_value, bool augment,
    std::array<double, 5> augment_values, int64_t seed, int64_t view, int input_layout, int layout,
    int patch_size, int dtype, std::array<double, 3> std, int device, uintptr_t stream,
    const std::string& isa, int threads) {
  TriggerNormalizeBackwardArgs args = {};
  args.forward = trigger_normalize_args(images, grad, pattern, mask, trigger_id, position, strength,
                                        sample_id, image_size, table_size, mode, flags,
                                        strength_value, augment, augment_values, seed, view,
                                        input_layout, layout, patch_size, dtype, std);
  args.order = address<const int64_t>(order);
  args.begin = address<const int64_t>(begin);
  args.partial = address<float>(partial);
  args.pattern_grad = address<float>(pattern_grad);
  args.mask_grad = address<float>(mask_grad);
  args.slices = slices;
  const py::gil_scoped_release release;
  if (device < 0) return trigger_normalize_backward_cpu(args, isa, threads);
#ifdef PYBACKDOOR_CUDA
  trigger_normalize_backward_cuda(args, device, address<void>(stream));
  return "cuda";
#else
  (void)stream;
  throw std::runtime_error("trigger_normalize_backward: " + cuda_obstacle());
#endif
}

}  // namespace

void bind_trigger_normalize(py::module_& m) {
  m.def("trigger_normalize", &trigger_normalize, py::kw_only(), py::arg("images"), py::arg("out"),
        py::arg("poisoned"), py::arg("pattern"), py::arg("mask"), py::arg("grid"),
        py::arg("trigger_id"), py::arg("position"), py::arg("strength"), py::arg("sample_id"),
        py::arg("image_size"), py::arg("table_size"), py::arg("mode"), py::arg("flags"),
        py::arg("strength_value"), py::arg("augment"), py::arg("augment_values"),
        py::arg("half_noise"), py::arg("seed"), py::arg("view"), py::arg("input_layout"),
        py::arg("layout"), py::arg("patch_size"), py::arg("dtype"), py::arg("mean"), py::arg("std"),
        py::arg("device"), py::arg("stream"), py::arg("isa"), py::arg("threads"),
        py::arg("quantize") = true);
  m.def("trigger_normalize_backward", &trigger_normalize_backward, py::kw_only(), py::arg("images"),
        py::arg("grad"), py::arg("pattern"), py::arg("mask"), py::arg("trigger_id"),
        py::arg("position"), py::arg("strength"), py::arg("sample_id"), py::arg("order"),
        py::arg("begin"), py::arg("partial"), py::arg("pattern_grad"), py::arg("mask_grad"),
        py::arg("slices"), py::arg("image_size"), py::arg("table_size"), py::arg("mode"),
        py::arg("flags"), py::arg("strength_value"), py::arg("augment"), py::arg("augment_values"),
        py::arg("seed"), py::arg("view"), py::arg("input_layout"), py::arg("layout"),
        py::arg("patch_size"), py::arg("dtype"), py::arg("std"), py::arg("device"),
        py::arg("stream"), py::arg("isa"), py::arg("threads"));
}

}  // namespace pybackdoor
