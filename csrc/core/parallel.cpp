#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#endif

namespace pybackdoor {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string path;
};

#ifdef __linux__
int collect(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string name = path.substr(path.rfind('/') + 1);
  for (const char* stem : {"libgomp", "libiomp5", "libomp"}) {
    if (name.rfind(stem, 0) == 0) static_cast<std::vector<std::string>*>(data)->push_back(path);
  }
  return 0;
}
#endif

#ifdef __linux__
// GOMP_parallel as the library `name`, already loaded, or one that it needs defines it.
Runtime runtime_of(const char* name) {
  void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
  if (!symbol) return {};
  Dl_info info = {};
  const bool known = dladdr(symbol, &info) && info.dli_fname;
  return {reinterpret_cast<GompParallel>(symbol), known ? info.dli_fname : name};
}
#endif

Runtime find_runtime() {
#ifdef __linux__
  // Another package may have brought a runtime of its own, so torch is asked first.
  std::vector<std::string> names = {"libtorch_cpu.so"};
  dl_iterate_phdr(collect, &names);
  for (const std::string& name : names) {
    Runtime found = runtime_of(name.c_str());
    if (found.parallel) return found;
  }
#endif
  return {};
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t size, parts;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;

  // Takes parts until none is left, however many threads the runtime gave us.
  void work() {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) {
      try {
        (*body)(size* part / parts, size * (part + 1) / parts);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

}  // namespace

void parallel_for(int64_t size, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  const int64_t parts = std::min<int64_t>(threads, (size + grain - 1) / grain);
  if (parts <= 1) return body(0, size);
  Job job;
  job.body = &body;
  job.size = size;
  job.parts = parts;
  if (runtime().parallel) {
    const auto enter = [](void* data) { static_cast<Job*>(data)->work(); };
    runtime().parallel(enter, &job, static_cast<unsigned>(parts), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(parts));
    try {
      for (int64_t i = 1; i < parts; ++i) others.emplace_back([&job] { job.work(); });
    } catch (const std::exception&) {
      // The system grants no more threads: those started, and this one, do all parts.
    }
    job.work();
    for (std::thread& other : others) other.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

std::string parallel_runtime() { return runtime().path; }

}  // namespace pybackdoor
