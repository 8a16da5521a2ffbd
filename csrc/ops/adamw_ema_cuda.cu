// The CUDA backend: one block per chunk; one block alone for what the tensors share.
#include "core/check.h"
#include "core/cuda_check.h"
#include "ops/adamw_ema_body.h"

namespace pybackdoor {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // 1024 threads with 80 B each in flight
constexpr int kOneBlock = 1024;  // threads of the kernels of one block
constexpr unsigned kWarp = 0xFFFFFFFFu;

template <typename T>
__device__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = add_rn(v, __shfl_xor_sync(kWarp, v, offset));
  return v;
}

// The block's sum, in thread 0 alone.
template <typename T>
__device__ double block_sum(T v) {
  __shared__ double warps[32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = static_cast<double>(v);
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int k = 0; k < static_cast<int>(blockDim.x) / 32; ++k) sum = add_rn(sum, warps[k]);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    adamw_ema_norm_kernel(const __grid_constant__ AdamwEmaArgs args) {
  const int64_t chunk = blockIdx.x;
  const double sum = block_sum(norm_chunk(args, chunk, threadIdx.x, blockDim.x));
  if (threadIdx.x == 0) args.partials[chunk] = sum;
}

// One block: the decision about the step, if this is the first group, then the group's scalars.
__global__ void __launch_bounds__(kOneBlock)
    adamw_ema_prepare_kernel(const __grid_constant__ AdamwEmaArgs args,
                             const __grid_constant__ AdamwEmaGroup group, bool first) {
  if (first) {
    double sum = 0.0;
    if (args.norm_wanted) sum = block_sum(partial_sum(args, threadIdx.x, blockDim.x));
    if (threadIdx.x == 0) finish_norm(args, sum);
    __syncthreads();
  }
  for (int64_t k = threadIdx.x; k < group.tensors; k += blockDim.x) {
    prepare_tensor(args, group, group.first_tensor + k);
  }
}

template <bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    adamw_ema_update_kernel(const __grid_constant__ AdamwEmaArgs args,
                            const __grid_constant__ AdamwEmaGroup group) {
  if (args.status->skip != 0.f) return;
  const int64_t chunk = group.first_chunk + blockIdx.x;
  const float distance = update_chunk<kNoise>(args, group, chunk, threadIdx.x, blockDim.x);
  if (isinf(args.radius)) return;
  const double sum = block_sum(distance);
  if (threadIdx.x == 0) args.partials[chunk] = sum;
}

__global__ void __launch_bounds__(kOneBlock)
    adamw_ema_distance_kernel(const __grid_constant__ AdamwEmaArgs args) {
  if (args.status->skip != 0.f) return;
  const double sum = block_sum(partial_sum(args, threadIdx.x, blockDim.x));
  if (threadIdx.x == 0) finish_distance(args, sum);
}

template <bool kNoise>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    adamw_ema_project_kernel(const __grid_constant__ AdamwEmaArgs args) {
  if (args.status->skip != 0.f) return;
  project_chunk<kNoise>(args, blockIdx.x, threadIdx.x, blockDim.x);
}

template <bool kNoise>
void launch(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups,
            cudaStream_t stream) {
  const unsigned chunks = static_cast<unsigned>(args.num_chunks);
  if (args.norm_wanted && chunks > 0) {
    adamw_ema_norm_kernel<<<chunks, kThreads, 0, stream>>>(args);
    PB_CUDA_LAUNCHED();
  }
  for (size_t k = 0; k < groups.size(); ++k) {
    adamw_ema_prepare_kernel<<<1, kOneBlock, 0, stream>>>(args, groups[k], k == 0);
    PB_CUDA_LAUNCHED();
    if (groups[k].num_chunks == 0) continue;
    adamw_ema_update_kernel<kNoise>
        <<<static_cast<unsigned>(groups[k].num_chunks), kThreads, 0, stream>>>(args, groups[k]);
    PB_CUDA_LAUNCHED();
  }
  if (std::isinf(args.radius) || chunks == 0) return;
  adamw_ema_distance_kernel<<<1, kOneBlock, 0, stream>>>(args);
  PB_CUDA_LAUNCHED();
  adamw_ema_project_kernel<kNoise><<<chunks, kThreads, 0, stream>>>(args);
  PB_CUDA_LAUNCHED();
}

}  // namespace

void adamw_ema_cuda(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups, int device,
                    void* stream) {
  check_adamw_ema(args, groups);
  if (args.num_tensors == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args.noise_std != 0.f) return launch<true>(args, groups, queue);
  launch<false>(args, groups, queue);
}

}  // namespace pybackdoor
