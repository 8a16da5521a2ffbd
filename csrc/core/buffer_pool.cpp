#include "core/buffer_pool.h"

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pybackdoor {
namespace {

struct Block {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;  // free, oldest first
  size_t bytes = 0;

  // Removes and returns block i.
  Block take(size_t i) {
    const Block block = blocks[i];
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
    bytes -= block.capacity;
    return block;
  }
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
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.blocks.size();
    for (size_t i = 0; i < p.blocks.size(); ++i) {
      const size_t have = p.blocks[i].capacity;
      if (have < capacity_ || have - capacity_ > capacity_ / 4) continue;
      if (best == p.blocks.size() || have <= p.blocks[best].capacity) best = i;
    }
    if (best < p.blocks.size()) {
      const Block block = p.take(best);
      data_ = block.data;
      capacity_ = block.capacity;
    }
  }
  if (!data_) data_ = allocate(capacity_);
}

Buffer::~Buffer() {
  std::vector<Block> evicted;
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (capacity_ > kPoolBytes) {
      evicted.push_back({data_, capacity_});
    } else {
      while (p.bytes + capacity_ > kPoolBytes) evicted.push_back(p.take(0));
      p.blocks.push_back({data_, capacity_});
      p.bytes += capacity_;
    }
  }
  for (const Block& block : evicted) std::free(block.data);
}

size_t pooled_bytes() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().bytes;
}

void empty_pool() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  for (const Block& block : pool().blocks) std::free(block.data);
  pool().blocks.clear();
  pool().bytes = 0;
}

}  // namespace pybackdoor
