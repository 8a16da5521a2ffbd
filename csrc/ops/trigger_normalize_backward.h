// trigger_normalize_backward: dL/d(output) -> dL/d(pattern), dL/d(mask), summed over the batch.
// Map: CPU, a tile of the window stays in cache while the samples pass; CUDA, a thread owns four
// pixels of a trigger and one slice of its samples, then the slices are added in order.
// Bound: memory; the gradient and the uint8 images are read once, 1 + sizeof(T) bytes an element.
// Why: eager autograd moves some 100 B per element (ten operators, each reading and writing fp32).
// Source: the derivative of x' = a t + (1 - a) x with a = strength * mask; y = (x' - mean) / std.
//
// With u = strength * dL/dy, 0 where the clip holds x' fast or the output is erased, t the pattern,
// m the mask (1 without one), for each trigger, channel and pixel of the window:
//     G0 = sum_b u      G1 = sum_b u * level
//     dL/dt = m * G0 / std      dL/dm = (t * G0 - G1 / 255) / std   (additive: t * G0 / std)
// and dL/dm is summed over the channels if they share a mask. A trigger's samples are cut into
// `slices` parts; each is summed in order, then the parts in order: the same bits on every backend,
// with any number of threads.
#pragma once

#include "ops/trigger_normalize.h"

namespace pybackdoor {

struct TriggerNormalizeBackwardArgs {
  // As in the forward pass; `out` is the gradient of its output and is only read. Mode patch or
  // blend, nothing poisoned, no noise.
  TriggerNormalizeArgs forward;
  const int64_t* order;  // [B] samples sorted by trigger; null: as they come
  const int64_t* begin;  // [T + 1] where the samples of a trigger begin in order; with order
  float* partial;        // [T, slices, mask_grad ? 2 : 1, 3, h, w]; CUDA only
  float* pattern_grad;   // [T, 3, h, w]; or null
  float* mask_grad;      // [T, mask_channels, h, w]; or null
  int32_t slices;        // > 0
};

// Throws std::invalid_argument if a size, code or pointer would make a kernel read astray.
void check_trigger_normalize_backward(const TriggerNormalizeBackwardArgs& args);

// As the functions of the forward pass.
std::string trigger_normalize_backward_cpu(const TriggerNormalizeBackwardArgs& args,
                                           const std::string& isa, int threads);
void trigger_normalize_backward_cuda(const TriggerNormalizeBackwardArgs& args, int device,
                                     void* stream);

}  // namespace pybackdoor
