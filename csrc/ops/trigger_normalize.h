// trigger_normalize: uint8 images -> trigger, quantise, noise, normalise, erase -> model input.
// Map: CPU, runs of pixels through row kernels in L1; CUDA, a thread owns 16 pixels.
// Bound: memory; 3 B read and 3 * sizeof(T) written per pixel, the triggers stay in cache.
// Why: the eager chain moves about 87 B per element (some 20 operators), this 1 + sizeof(T).
// Source: arXiv 2412.00727 (augmentation); torchvision's ToTensor, ToPILImage, Normalize on the
// CPU.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace pybackdoor {

// The order of these codes is that of the tuples in pybackdoor/ops/trigger_normalize.py.
enum class Mode : int32_t { kNone = 0, kPatch = 1, kBlend = 2, kWarp = 3 };
enum class InputLayout : int32_t { kNhwc = 0, kNchw = 1 };
enum class Layout : int32_t { kNchw = 0, kChannelsLast = 1, kPatchified = 2 };

struct TriggerNormalizeArgs {
  const uint8_t* images;                // [B, H, W, 3] or [B, 3, H, W]
  void* out;                            // [B, 3, H, W], [B, H, W, 3] or [B, P, 3 * p * p] dtype
  uint8_t* poisoned;                    // like images; or null
  const float* pattern;                 // [T, 3, h, w]; patch, blend
  const float* mask;                    // [T, mask_channels, h, w]; blend; or null
  const float* grid;                    // [T, H, W, 2] (x, y); warp
  const int32_t* trigger_id;            // [B], outside [0, T): untouched; null: all 0
  const int32_t* position;              // [B, 2] (y, x); null: all 0
  const double* strength;               // [B]; null: strength_value
  const int64_t* sample_id;             // [B]; with augment
  int64_t batch;                        // >= 0
  int64_t height, width;                // > 0
  int64_t num_triggers;                 // > 0 unless mode is kNone
  int64_t window_height, window_width;  // h, w
  int32_t mask_channels;                // 1 or 3
  Mode mode;
  bool nonzero_only, additive, clip;
  bool quantize;  // else patch and blend keep their float values; then no noise, no poisoned
  bool augment, half_noise;
  double strength_value;
  double noise_p, erase_p;       // in [0, 1]
  double erase_low, erase_high;  // share of the image's area
  float noise_std;               // in units of [0, 1] pixels
  uint64_t seed;
  uint32_t view;  // < 2^24
  InputLayout input_layout;
  Layout layout;
  int32_t patch_size;  // p; kPatchified
  DType dtype;
  float mean[3], std[3];
};

// Throws std::invalid_argument if a size, code or pointer would make a kernel read astray.
void check_trigger_normalize(const TriggerNormalizeArgs& args);

// Runs on the CPU and names the instruction set used: avx512, avx2 or portable; `isa` forces one,
// "auto" takes the best. "lanes<n>" runs the body shared with CUDA as n lanes: a test driver.
std::string trigger_normalize_cpu(const TriggerNormalizeArgs& args, const std::string& isa,
                                  int threads);

// Queues the kernel on `stream` of `device`; does not synchronise.
void trigger_normalize_cuda(const TriggerNormalizeArgs& args, int device, void* stream);

}  // namespace pybackdoor
