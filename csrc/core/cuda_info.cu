#include <cuda_runtime_api.h>

#include "core/cuda_check.h"
#include "core/cuda_info.h"

namespace pybackdoor {

std::string cuda_obstacle() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count > 0 ? "" : "the driver reports no device";
  cudaGetLastError();
  if (status != cudaErrorInsufficientDriver) return cudaGetErrorString(status);
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const auto text = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  if (driver == 0) return "there is no CUDA driver";
  return "the driver supports CUDA " + text(driver) + ", older than the " + text(runtime) +
         " of this build";
}

int cuda_capability(int device) {
  int major = 0, minor = 0;
  PB_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  PB_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major * 10 + minor;
}

}  // namespace pybackdoor
