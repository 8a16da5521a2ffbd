#include "core/buffer_pool.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pybackdoor {
namespace {

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> blocks;  // free, by size
  size_t bytes = 0;
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: tensors may die after static objects
  return *instance;
}

void* allocate(size_t capacity) {
  void* data = std::aligned_alloc(kHugePage, capacity);
  if (!data) throw std::bad_alloc();
#ifdef __linux__
  madvise(data, capacity, MADV_HUGEPAGE);  // a wish: without huge pages all works as well
#endif
  return data;
}

}  // namespace

Buffer::Buffer(size_t bytes)
    : data_(nullptr), size_(bytes), capacity_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    const auto found = pool().blocks.find(capacity_);
    if (found != pool().blocks.end()) {
      data_ = found->second;
      pool().bytes -= capacity_;
      pool().blocks.erase(found);
    }
  }
  if (!data_) data_ = allocate(capacity_);
}

Buffer::~Buffer() {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().bytes + capacity_ <= kPoolBytes) {
      pool().blocks.emplace(capacity_, data_);
      pool().bytes += capacity_;
      return;
    }
  }
  std::free(data_);
}

size_t pooled_bytes() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

void empty_pool() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  for (const auto& [size, data] : pool().blocks) std::free(data);
  pool().blocks.clear();
  pool().bytes = 0;
}

}  // namespace pybackdoor
