// Memory for large results on the CPU, used again once freed.
//
// malloc hands blocks beyond 32 MiB back to the system at once, so each call would pay the faults
// of fresh pages, for 77 MB about as much as the kernel that fills them
// (bench_trigger_normalize.py, pybackdoor_fresh). Blocks are whole huge pages; one serves requests
// of 4/5 of its size or more. At most kPoolBytes of free ones are kept: the oldest go first, so
// that after a change of the batch's shape the pool follows.
#pragma once

#include <cstddef>

namespace pybackdoor {

constexpr size_t kPoolBytes = size_t{512} << 20;  // three fp32 batches of 256 x 224 x 224 x 3
constexpr size_t kHugePage = size_t{2} << 20;

class Buffer {
 public:
  explicit Buffer(size_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_;
  size_t size_, capacity_;
};

size_t pooled_bytes();  // free blocks kept
void empty_pool();

}  // namespace pybackdoor
