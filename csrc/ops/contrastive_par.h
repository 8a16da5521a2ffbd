// contrastive_par: signed contrastive loss and distance to a reference, with its gradients, in
// stages around two matrix products: rows to unit length, E = exp(S - m) with its sums, loss and
// factors of dS, and the way back through the normalisation.
// Map: CUDA, a warp per row or line; CPU, rows and tiles over threads, the products are torch's.
// Bound: memory; every stage reads and writes its tensors once, the [M, A] ones are E alone.
// Why: autograd's chain keeps and moves some ten [M, A] tensors in fp32.
// Source: arXiv 2412.00727 (distance term); arXiv 2103.00020 (contrastive loss).
//
// M text rows, N images of this rank, A images of all ranks (A = N in one process), of which this
// rank's are [offset, offset + N); D features. acc is fp64 for fp64 inputs, else fp32.
// m = max(0, s - 75); S = s * cosine; the target of text row i is image owner(i).
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace pybackdoor {

constexpr uint8_t kValid = 1, kSuspect = 2;  // bits of an image

enum class ContrastiveParStage : int32_t {
  kPrep,
  kExpBlock,
  kSums,
  kLse,
  kFinalise,
  kTotals,
  kClose,
  kScaleBlock,
  kFixup,
  kNormalizeBackward,
};

struct ContrastiveParArgs {
  // The problem.
  const void* text;           // [M, D] dtype
  const void* image;          // [N, D] dtype
  const void* text_ref;       // [M, D] dtype, unit rows; or null
  const void* image_ref;      // [N, D] dtype; or null
  const int32_t* owner;       // [M] in [0, N), non-decreasing
  const int32_t* segment;     // [N + 1]: rows of image j are segment[j] .. segment[j + 1] - 1
  const void* weight;         // [M] acc: > 0 recover, < 0 unlearn, 0 skip
  const void* column_weight;  // [A] acc, >= 0; 0 where not valid
  const uint8_t* bits;        // [A]: kValid | kSuspect
  const void* scale;          // [] acc: s
  int64_t rows;               // M >= 0
  int64_t images;             // N >= 0
  int64_t all_images;         // A >= offset + N
  int64_t features;           // D > 0
  int64_t offset;             // >= 0
  bool normalize;
  DType dtype;         // of text and image; kFloat64 on the CPU only
  DType matrix_dtype;  // of that and ihat: kFloat32, kBFloat16; kFloat64 if dtype is
  // Rows of unit length.
  void* that;        // [M, D] matrix dtype
  void* ihat;        // [N, D] matrix dtype from prep; [A, D] for lse and fixup
  void* inv_text;    // [M] acc: 1 / norm
  void* inv_image;   // [N] acc
  void* target;      // [M] acc: S of the target
  void* dist_text;   // [M] acc: squared distance to the reference
  void* dist_image;  // [N] acc
  int32_t* flagged;  // [2]: rows and columns that were fixed
  // Sums of E.
  void* scores;                    // [B, A] acc: cosines; E after exp_block
  void* row_partial;               // [Kr, M] acc
  void* col_partial;               // [Kc, A] acc
  int64_t first, block;            // exp_block, scale_block: text rows first .. first + B - 1
  int64_t row_slices, col_slices;  // Kr, Kc
  void* r;                         // [M] acc
  void* c;                         // [A] acc
  void* log_p;                     // [N] acc from sums; [A] for finalise
  void* row_lse;                   // [M] acc
  void* col_lse;                   // [A] acc
  // Loss and factors of dS.
  void* alpha;     // [M] acc
  void* beta;      // [A] acc
  void* coef;      // [M] acc: dL/dS of the target
  void* row_fix;   // [M] acc
  void* col_fix;   // [A] acc
  void* loss_row;  // [M] acc
  void* loss_col;  // [N] acc
  void* total;     // [5] acc: loss; sum of dist_text, its count; sum of dist_image, its count
  void* stats;     // [6] acc: loss, contrastive, s_image, s_text, gate_image, gate_text
  double distance_weight, tau;
  // Gradients.
  const void* e;     // [B, A] acc
  void* out;         // [B, A] acc; may be e
  const void* grad;  // [] acc: dL/dloss
  void* g_text;      // [M, D] acc; or null
  void* g_image;     // [A, D] acc for fixup, [N, D] for normalize_backward; or null
  void* d_text;      // [M, D] dtype; null: tower left out
  void* d_image;     // [N, D] dtype; null: tower left out
  void* dot_text;    // [M] acc
  void* dot_image;   // [N] acc
};

// Throws std::invalid_argument if a size, code or pointer would make the stage read astray.
void check_contrastive_par(const ContrastiveParArgs& args, ContrastiveParStage stage, bool cuda);

// Runs a stage on the CPU and names the instruction set used: avx512, avx2 or portable; `isa`
// forces one, "auto" takes the best. "lanes1" and "lanes32" run the body shared with CUDA as so
// many lanes: a test driver. Results are the same bits whatever the number of threads.
std::string contrastive_par_cpu(const ContrastiveParArgs& args, ContrastiveParStage stage,
                                const std::string& isa, int threads);

// Queues a stage's kernel on `stream` of `device`; does not synchronise.
void contrastive_par_cuda(const ContrastiveParArgs& args, ContrastiveParStage stage, int device,
                          void* stream);

}  // namespace pybackdoor
