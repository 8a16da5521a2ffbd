// The CUDA backend: one block works on one image, a thread on 16 pixels at a time.
#include "core/check.h"
#include "core/cuda_check.h"
#include "ops/trigger_normalize_body.h"

namespace pybackdoor {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kBlocksPerSm = 3;  // at most 80 registers: 24 warps of 32 * 48 B in flight
constexpr int kFloatBlocksPerSm = 2;
constexpr int kChunksPerThread = 2;  // spreads the block's 768 table entries over 32 pixels

template <DType dtype, bool quantized>
__global__ void __launch_bounds__(kMaxThreads, quantized ? kBlocksPerSm : kFloatBlocksPerSm)
    trigger_normalize_kernel(const __grid_constant__ TriggerNormalizeArgs args, int32_t tiles) {
  __shared__ float table[3 * 256];
  __shared__ SamplePlan shared_plan;
  const int32_t b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  for (int k = threadIdx.x; k < 3 * 256; k += blockDim.x) {
    table[k] = normalize_value(level_value(k & 255), args.mean[k >> 8], args.std[k >> 8]);
  }
  if (threadIdx.x == 0) shared_plan = sample_plan(args, b);
  __syncthreads();
  const SamplePlan plan = shared_plan;
  trigger_normalize_body<dtype, quantized>(args, plan, table, b, tile * blockDim.x + threadIdx.x,
                                           tiles * blockDim.x);
}

template <DType dtype, bool quantized>
void launch(const TriggerNormalizeArgs& args, cudaStream_t stream) {
  const int64_t chunks = (args.height * args.width + kChunk - 1) / kChunk;
  const int64_t threads = min_of(kMaxThreads, (chunks + 31) / 32 * 32);
  const int64_t per_tile = threads * kChunksPerThread;
  const int64_t tiles = (chunks + per_tile - 1) / per_tile;
  PB_CHECK(args.batch * tiles < int64_t{1} << 31, "trigger_normalize: the batch is too large");
  trigger_normalize_kernel<dtype, quantized>
      <<<static_cast<unsigned>(args.batch * tiles), static_cast<unsigned>(threads), 0, stream>>>(
          args, static_cast<int32_t>(tiles));
  PB_CUDA_LAUNCHED();
}

template <DType dtype>
void launch(const TriggerNormalizeArgs& args, cudaStream_t stream) {
  if (args.quantize) return launch<dtype, true>(args, stream);
  launch<dtype, false>(args, stream);
}

}  // namespace

void trigger_normalize_cuda(const TriggerNormalizeArgs& args, int device, void* stream) {
  check_trigger_normalize(args);
  if (args.batch == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kFloat32) return launch<DType::kFloat32>(args, queue);
  if (args.dtype == DType::kFloat16) return launch<DType::kFloat16>(args, queue);
  launch<DType::kBFloat16>(args, queue);
}

}  // namespace pybackdoor
