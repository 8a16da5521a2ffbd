// The CUDA backend of the backward pass: a block works on a slice of one trigger's samples and a
// tile of its window, then a second kernel adds the slices in order.
#include "core/check.h"
#include "core/cuda_check.h"
#include "ops/trigger_normalize_backward_body.h"

namespace pybackdoor {
namespace {

constexpr int kMaxThreads = 128;
// At most 96 registers: 20 warps with 32 * 60 B of fp32 (36 B of bf16) in flight.
constexpr int kBlocksPerSm = 5;
constexpr int kClipBlocksPerSm = 4;  // at most 128
constexpr int kPlans = 32;           // samples whose plans are made at once

template <DType dtype, bool clip>
__global__ void __launch_bounds__(kMaxThreads, clip ? kClipBlocksPerSm : kBlocksPerSm)
    accumulate_kernel(const __grid_constant__ TriggerNormalizeBackwardArgs args, int32_t tiles) {
  __shared__ SamplePlan plans[kPlans];
  __shared__ int64_t samples[kPlans];
  const TriggerNormalizeArgs& f = args.forward;
  const int32_t tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  const int32_t trigger = part / args.slices, slice = part % args.slices;
  const int64_t index = static_cast<int64_t>(tile) * blockDim.x + threadIdx.x;
  const bool works = index * kFour < f.window_height * f.window_width;
  const WindowFour four = window_four(f, works ? index : 0);
  GradSums sums = {};
  const SampleRange range = slice_samples(args, trigger, slice);
  for (int64_t begin = range.begin; begin < range.end; begin += kPlans) {
    const int32_t count = static_cast<int32_t>(min_of(kPlans, range.end - begin));
    __syncthreads();
    if (threadIdx.x < count) {
      const int64_t b = sample_at(args, begin + threadIdx.x);
      samples[threadIdx.x] = b;
      plans[threadIdx.x] = sample_plan(f, b);
    }
    __syncthreads();
    PB_ROLLED
    for (int32_t k = 0; works && k < count; ++k) {
      if (!plans[k].triggered || plans[k].trigger != trigger) continue;
      add_sample<dtype, clip>(f, plans[k], samples[k], four, &sums);
    }
  }
  if (works) store_partial(args, trigger, slice, four, sums);
}

__global__ void __launch_bounds__(kMaxThreads)
    reduce_kernel(const __grid_constant__ TriggerNormalizeBackwardArgs args, int32_t tiles) {
  const int64_t at = static_cast<int64_t>(blockIdx.x % tiles) * blockDim.x + threadIdx.x;
  if (at < args.forward.window_height * args.forward.window_width) {
    reduce_pixel(args, blockIdx.x / tiles, at);
  }
}

template <DType dtype, bool clip>
void launch(const TriggerNormalizeBackwardArgs& args, cudaStream_t stream) {
  const TriggerNormalizeArgs& f = args.forward;
  const int64_t area = f.window_height * f.window_width, fours = (area + kFour - 1) / kFour;
  const int64_t threads = min_of(kMaxThreads, (fours + 31) / 32 * 32);
  const int64_t tiles = (fours + threads - 1) / threads;
  const int64_t blocks = tiles * f.num_triggers * args.slices;
  const int64_t reduce_tiles = (area + kMaxThreads - 1) / kMaxThreads;
  PB_CHECK(blocks < int64_t{1} << 31 && reduce_tiles * f.num_triggers < int64_t{1} << 31,
           "trigger_normalize_backward: there are too many triggers");
  accumulate_kernel<dtype, clip>
      <<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(
          args, static_cast<int32_t>(tiles));
  PB_CUDA_LAUNCHED();
  reduce_kernel<<<static_cast<unsigned>(reduce_tiles * f.num_triggers), kMaxThreads, 0, stream>>>(
      args, static_cast<int32_t>(reduce_tiles));
  PB_CUDA_LAUNCHED();
}

template <DType dtype>
void launch(const TriggerNormalizeBackwardArgs& args, cudaStream_t stream) {
  if (clips_samples(args.forward)) return launch<dtype, true>(args, stream);
  launch<dtype, false>(args, stream);
}

}  // namespace

void trigger_normalize_backward_cuda(const TriggerNormalizeBackwardArgs& args, int device,
                                     void* stream) {
  check_trigger_normalize_backward(args);
  PB_CHECK(args.partial, "trigger_normalize_backward: partial is required");
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args.forward.dtype == DType::kFloat32) return launch<DType::kFloat32>(args, queue);
  if (args.forward.dtype == DType::kFloat16) return launch<DType::kFloat16>(args, queue);
  launch<DType::kBFloat16>(args, queue);
}

}  // namespace pybackdoor
