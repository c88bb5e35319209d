#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace sc {
namespace {

std::atomic<size_t> total{0};

struct Buffers {
  void* data[kSlots] = {};
  size_t size[kSlots] = {};

  void drop(int slot) {
    std::free(data[slot]);
    total -= size[slot];
    data[slot] = nullptr;
    size[slot] = 0;
  }
  ~Buffers() {
    for (int slot = 0; slot < kSlots; ++slot) drop(slot);
  }
};

thread_local Buffers buffers;

}  // namespace

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffers& mine = buffers;
  if (mine.size[slot] < bytes) {
    mine.drop(slot);
    // A little more than requested, because counts vary from step to step.
    const size_t want = (bytes + bytes / 8 + 4095) / 4096 * 4096;
    mine.data[slot] = std::aligned_alloc(4096, want);
    if (!mine.data[slot]) throw std::bad_alloc();
    mine.size[slot] = want;
    total += want;
  }
  return mine.data[slot];
}

size_t scratch_bytes() { return total; }

void release_scratch() {
  for (int slot = 0; slot < kSlots; ++slot) buffers.drop(slot);
}

}  // namespace sc
