// The CUDA backend: one kernel a stage, a warp per row or line; sums over partials and the factors
// of captions take a thread per column, so that neighbours read neighbours.
#include <initializer_list>

#include "core/check.h"
#include "core/cuda_check.h"
#include "ops/contrastive_par_body.h"

namespace pybackdoor {
namespace {

using Stage = ContrastiveParStage;
using Args = ContrastiveParArgs;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 3;       // at most 80 registers
constexpr int kSumLanes = 16;         // threads that share a column's partials
constexpr int kTotalLanes = 1024;     // one block
constexpr int64_t kManyRows = 4;      // rows per image from which on a warp takes the image
constexpr int64_t kLineWarps = 8192;  // enough for any GPU; more lines share a warp

__device__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ int64_t warp_id() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }

template <typename T, typename H>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    prep_kernel(const __grid_constant__ Args args, bool aligned) {
  if (blockIdx.x == 0 && threadIdx.x < 2) args.flagged[threadIdx.x] = 0;
  const int64_t line = warp_id();
  if (line >= args.rows + args.images) return;
  prep_line<T, H, kChunkOf<T>>(args, line, aligned, WarpTeam{lane_id()});
}

// Blocks of 32 x kSumLanes threads: the first ones take 32 lines each, the others images.
template <typename Team>
__global__ void __launch_bounds__(32 * kSumLanes)
    sums_kernel(const __grid_constant__ Args args, int32_t line_blocks) {
  __shared__ float part[kSumLanes][32];
  const int32_t x = static_cast<int32_t>(threadIdx.x), y = static_cast<int32_t>(threadIdx.y);
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block >= line_blocks) {
    const int64_t thread = (int64_t{block} - line_blocks) * 32 * kSumLanes + y * 32 + x;
    const int64_t image = thread / Team::lanes;
    if (image < args.images) log_positive<float>(args, image, Team{x % Team::lanes});
    return;
  }
  const int64_t line = int64_t{block} * 32 + x;
  const bool inside = line < args.rows + args.all_images;
  part[y][x] = inside ? partial_sum<float>(args, line, y, kSumLanes) : 0.f;
  __syncthreads();
  if (y > 0 || !inside) return;
  float sum = 0;
  PB_UNROLL
  for (int k = 0; k < kSumLanes; ++k) sum += part[k][x];
  put_sum(args, line, sum);
}

// A warp looks through `share` lines for wanted ones.
template <typename H>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    lse_kernel(const __grid_constant__ Args args, bool aligned, int32_t share) {
  const WarpTeam team = {lane_id()};
  const int64_t first = warp_id() * share, lines = args.rows + args.all_images;
  const auto wanted = [&](int64_t line) { return lse_wanted<float>(args, line); };
  each_where(team, first, min_of(first + share, lines), wanted,
             [&](int64_t line) { lse_line<H, kChunkOf<H>>(args, line, aligned, team); });
}

template <typename Team>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    finalise_kernel(const __grid_constant__ Args args) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t image = thread / Team::lanes;
  if (image >= args.all_images) return;
  finalise_image<float>(args, image, Team{lane_id() % Team::lanes});
}

struct BlockTeam {
  int lane;
  Sums<float, 5>* shared;  // [32]
  static constexpr int lanes = kTotalLanes;
};

template <typename F>
PB_HD Sums<float, 5> reduce(const BlockTeam& team, F f) {
#ifdef __CUDA_ARCH__
  const WarpTeam warp = {team.lane % 32};
  const Sums<float, 5> part = reduce(warp, [&](int) { return f(team.lane); });
  if (warp.lane == 0) team.shared[team.lane / 32] = part;
  __syncthreads();
  return reduce(warp, [&](int lane) { return team.shared[lane]; });
#else
  return f(team.lane);
#endif
}

PB_HD bool leads(const BlockTeam& team) { return team.lane == 0; }

__global__ void __launch_bounds__(kTotalLanes) totals_kernel(const __grid_constant__ Args args) {
  __shared__ Sums<float, 5> shared[kTotalLanes / 32];
  totals<float, float>(args, BlockTeam{static_cast<int>(threadIdx.x), shared});
}

__global__ void close_kernel(const __grid_constant__ Args args) { close<float>(args); }

template <typename H>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    fixup_kernel(const __grid_constant__ Args args, bool aligned, int32_t share) {
  if (args.flagged[0] == 0 && args.flagged[1] == 0) return;
  const WarpTeam team = {lane_id()};
  const int64_t first = warp_id() * share, lines = args.rows + args.all_images;
  const auto wanted = [&](int64_t line) { return fixup_wanted<float>(args, line); };
  each_where(team, first, min_of(first + share, lines), wanted,
             [&](int64_t line) { fixup_line<H, kChunkOf<H>>(args, line, aligned, team); });
}

// The first `texts` warps take text rows, the others images.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    normalize_backward_kernel(const __grid_constant__ Args args, bool aligned, int64_t texts,
                              int64_t images) {
  const int64_t line = warp_id();
  if (line >= texts + images) return;
  const bool is_text = line < texts;
  normalize_backward_row<T, kChunkOf<T>>(args, is_text, is_text ? line : line - texts, aligned,
                                         WarpTeam{lane_id()});
}

unsigned blocks(int64_t items, int64_t per_block) {
  const int64_t count = (items + per_block - 1) / per_block;
  PB_CHECK(count < int64_t{1} << 31, "contrastive_par: the batch is too large");
  return static_cast<unsigned>(max_of(1, count));
}

// Whether rows of D elements, `chunk` of them at a time, start on whole chunks in all tensors.
bool aligned_rows(const Args& args, int chunk, std::initializer_list<const void*> tensors) {
  bool aligned = args.features % chunk == 0;
  for (const void* p : tensors) aligned = aligned && aligned16(p);
  return aligned;
}

template <typename T, typename H>
void launch_prep(const Args& a, cudaStream_t stream) {
  const bool aligned =
      aligned_rows(a, kChunkOf<T>, {a.text, a.image, a.text_ref, a.image_ref, a.that, a.ihat});
  prep_kernel<T, H><<<blocks(a.rows + a.images, kWarps), kThreads, 0, stream>>>(a, aligned);
}

template <typename T>
void launch_prep(const Args& args, cudaStream_t stream) {
  if (args.matrix_dtype == DType::kFloat32) return launch_prep<T, float>(args, stream);
  launch_prep<T, BFloat16>(args, stream);
}

void launch_sums(const Args& args, cudaStream_t stream) {
  const dim3 threads(32, kSumLanes);
  const unsigned line_blocks = blocks(args.rows + args.all_images, 32);
  const bool many = args.rows > kManyRows * args.images;
  const unsigned grid = line_blocks + blocks(args.images * (many ? 32 : 1), 32 * kSumLanes);
  const auto kernel = many ? sums_kernel<WarpTeam> : sums_kernel<ThreadTeam>;
  kernel<<<grid, threads, 0, stream>>>(args, static_cast<int32_t>(line_blocks));
}

void launch_finalise(const Args& args, cudaStream_t stream) {
  const bool many = args.rows > kManyRows * args.images;
  const auto kernel = many ? finalise_kernel<WarpTeam> : finalise_kernel<ThreadTeam>;
  kernel<<<blocks(args.all_images * (many ? 32 : 1), kThreads), kThreads, 0, stream>>>(args);
}

// Lines that a warp looks through for wanted ones.
int32_t line_share(int64_t lines) {
  return static_cast<int32_t>(min_of(32, max_of(1, lines / kLineWarps)));
}

template <typename H>
void launch_lines(const Args& a, Stage stage, cudaStream_t stream) {
  const int64_t lines = a.rows + a.all_images;
  const int32_t share = line_share(lines);
  const bool aligned = aligned_rows(a, kChunkOf<H>, {a.that, a.ihat, a.g_text, a.g_image});
  const auto kernel = stage == Stage::kLse ? lse_kernel<H> : fixup_kernel<H>;
  kernel<<<blocks(lines, int64_t{share} * kWarps), kThreads, 0, stream>>>(a, aligned, share);
}

template <typename T>
void launch_normalize_backward(const Args& a, cudaStream_t stream) {
  const int64_t texts = a.d_text ? a.rows : 0, images = a.d_image ? a.images : 0;
  if (texts + images == 0) return;
  const bool aligned = aligned_rows(
      a, kChunkOf<T>,
      {a.text, a.image, a.text_ref, a.image_ref, a.g_text, a.g_image, a.d_text, a.d_image});
  normalize_backward_kernel<T>
      <<<blocks(texts + images, kWarps), kThreads, 0, stream>>>(a, aligned, texts, images);
}

}  // namespace

void contrastive_par_cuda(const Args& args, Stage stage, int device, void* stream) {
  check_contrastive_par(args, stage, true);
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const bool wide = args.matrix_dtype == DType::kFloat32;
  const DType dtype = args.dtype;
  switch (stage) {
    case Stage::kPrep:
      if (dtype == DType::kFloat32) launch_prep<float>(args, queue);
      if (dtype == DType::kFloat16) launch_prep<Half>(args, queue);
      if (dtype == DType::kBFloat16) launch_prep<BFloat16>(args, queue);
      break;
    case Stage::kSums:
      launch_sums(args, queue);
      break;
    case Stage::kLse:
    case Stage::kFixup:
      (wide ? launch_lines<float> : launch_lines<BFloat16>)(args, stage, queue);
      break;
    case Stage::kFinalise:
      launch_finalise(args, queue);
      break;
    case Stage::kTotals:
      totals_kernel<<<1, kTotalLanes, 0, queue>>>(args);
      break;
    case Stage::kClose:
      close_kernel<<<1, 1, 0, queue>>>(args);
      break;
    case Stage::kNormalizeBackward:
      if (dtype == DType::kFloat32) launch_normalize_backward<float>(args, queue);
      if (dtype == DType::kFloat16) launch_normalize_backward<Half>(args, queue);
      if (dtype == DType::kBFloat16) launch_normalize_backward<BFloat16>(args, queue);
      break;
    case Stage::kExpBlock:
    case Stage::kScaleBlock:
      break;  // refused above
  }
  PB_CUDA_LAUNCHED();
}

}  // namespace pybackdoor
