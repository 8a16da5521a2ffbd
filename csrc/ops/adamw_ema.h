// adamw_ema: one AdamW step of many tensors, with all that usually surrounds it: unscaling,
// clipping by the global norm, skipping non-finite steps, an L2 ball, the moving average of the
// weights and their bf16 copies.
// Map: one block per chunk of a tensor; lane k takes elements 4k, 4(k + lanes), ... as vectors.
// Bound: memory; per parameter 28 B (AdamW) + 4 (norm) + 8 (average) + 2 (bf16 copy), and 12 for
// the ball (its reference twice, the weight again; 4 more where it is moved).
// Why: the separate foreach passes move about 118 B per parameter, this 42.
// Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; torch.optim.AdamW's formula.
#pragma once

#include <cstdint>
#include <vector>

namespace pybackdoor {

// A row of the table in device memory, 11 int64: pybackdoor/ops/_adamw_ema_table.py writes it. The
// arrays hold their elements in the order of memory.
struct AdamwEmaTensor {
  float* param;            // [numel]
  const float* grad;       // [numel]; null: the tensor gets no AdamW update
  float* exp_avg;          // [numel]
  float* exp_avg_sq;       // [numel]
  float* step;             // []
  float* ema;              // [numel]; or null
  uint16_t* shadow;        // [numel] bfloat16; or null
  const float* reference;  // [numel]; with a radius
  int64_t numel;           // in [0, 2^34)
  int64_t aligned;         // 1: all addresses are multiples of 16
  int64_t id;              // of its random numbers
};

struct AdamwEmaChunk {
  int64_t tensor;  // row of the table
  int64_t start;   // first element; a multiple of `chunk`
};

// What all elements of a tensor share in one step.
struct alignas(16) AdamwEmaScalars {
  float step_size;   // lr / (1 - beta1^step)
  float bias2_sqrt;  // sqrt(1 - beta2^step)
  float decay;       // lr * weight_decay
  uint32_t step;
};

// Written by the kernels; fp32.
struct AdamwEmaStatus {
  float factor;    // of the gradients: unscaling and clipping
  float skip;      // 1: this step changes nothing
  float norm;      // of the unscaled gradients, before clipping; with norm_wanted
  float distance;  // from the references, before projecting; with a radius
  float ratio;     // of the projection, <= 1
  float skipped;   // steps skipped so far: the kernels add to it
};

struct AdamwEmaGroup {
  double lr, beta1, beta2, eps, weight_decay;
  const float* lr_tensor;           // []; or null: lr
  int64_t first_tensor, tensors;    // rows of the table
  int64_t first_chunk, num_chunks;  // of these tensors
};

struct AdamwEmaArgs {
  const AdamwEmaTensor* tensors;  // [num_tensors]
  const AdamwEmaChunk* chunks;    // [num_chunks], in the order of the tensors
  AdamwEmaScalars* scalars;       // [num_tensors]
  double* partials;               // [num_chunks]
  AdamwEmaStatus* status;         // []
  const float* inv_scale;         // []; or null: 1
  const float* found_inf;         // [], not 0: skip; or null
  int64_t num_tensors, num_chunks;
  int64_t chunk;     // elements of a chunk; a multiple of 4
  bool norm_wanted;  // a norm that is not finite skips the step
  double clip_norm;  // infinity: no clipping
  double ema_decay;
  double radius;    // infinity: no ball
  float noise_std;  // 0: none
  uint64_t seed;
};

// Throws std::invalid_argument if a size or pointer would make a kernel read astray.
void check_adamw_ema(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups);

// The test driver: the body shared with CUDA, on the host, as `lanes` lanes (1, or a multiple of
// the warp's 32; CUDA runs 256). All addresses are of host memory.
void adamw_ema_lanes(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups, int lanes);

// Queues the kernels on `stream` of `device`; does not synchronise.
void adamw_ema_cuda(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups, int device,
                    void* stream);

}  // namespace pybackdoor
