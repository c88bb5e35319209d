// Work space of the selection kernels: growing buffers for each thread, kept between calls, so that a training step
// allocates nothing after warm-up.
#pragma once

#include <cstddef>

namespace sc {

enum ScratchSlot : int { kCandidates = 0, kSample = 1, kBadMap = 2, kRegion = 3, kSlots = 4 };

// Returns at least `bytes` bytes, 64-byte aligned, with unspecified content. They are valid until the thread asks for
// more from the same slot or releases it. Throws std::bad_alloc.
void* scratch(ScratchSlot slot, size_t bytes);

// Returns the bytes held over all threads.
size_t scratch_bytes();

// Frees the buffers of the calling thread.
void release_scratch();

}  // namespace sc
