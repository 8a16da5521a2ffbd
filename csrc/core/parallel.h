// parallel_for on the OpenMP runtime that torch already runs.
//
// Two OpenMP runtimes in one process mean two thread pools that spin against each other, and the
// wheels of torch ship theirs under several names (libgomp.so.1, libgomp-<hash>.so.1, libiomp5).
// So this module links none. When the first parallel call comes, the runtime that libtorch_cpu
// uses, else any in the process, is looked up and entered through GOMP_parallel, which all export.
// Without one (no torch, not Linux) plain threads do the work.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace pybackdoor {

// Runs body(begin, end) on disjoint ranges that cover [0, size), on up to `threads` threads, at
// least `grain` items each. An exception leaves through the caller's thread.
void parallel_for(int64_t size, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body);

// Path of the OpenMP runtime in use; empty for plain threads.
std::string parallel_runtime();

}  // namespace pybackdoor
