// Whether this build's CUDA code can run here.
#pragma once

#include <string>

namespace pybackdoor {

// Empty if the driver answers and has a device; else why not. Starts no context.
std::string cuda_obstacle();

// Compute capability of a device as one number, 89 for 8.9; starts no context.
int cuda_capability(int device);

}  // namespace pybackdoor
