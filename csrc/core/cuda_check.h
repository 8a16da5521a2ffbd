// CUDA errors as std::runtime_error (RuntimeError in Python), and the device guard. Only for .cu.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#define PB_CUDA(expression)                                                                    \
  do {                                                                                         \
    const cudaError_t pb_status = (expression);                                                \
    if (pb_status != cudaSuccess)                                                              \
      throw std::runtime_error(std::string(#expression ": ") + cudaGetErrorString(pb_status)); \
  } while (0)

#define PB_CUDA_LAUNCHED() PB_CUDA(cudaGetLastError())

namespace pybackdoor {

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    PB_CUDA(cudaGetDevice(&previous_));
    if (previous_ != device) PB_CUDA(cudaSetDevice(device));
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace pybackdoor
