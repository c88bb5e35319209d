// Work space of the selection kernels: one growing buffer a thread, kept between calls so that a training step
// allocates nothing after warm-up.
#pragma once

#include <cstddef>

namespace sc {

enum ScratchSlot : int { kCandidates = 0, kSample = 1, kBadMap = 2, kRegion = 3, kSlots = 4 };

// At least `bytes` bytes, 64-byte aligned, with unspecified content; valid until the thread asks for more from the
// same slot or releases. Throws std::bad_alloc.
void* scratch(ScratchSlot slot, size_t bytes);

// Bytes held over all threads.
size_t scratch_bytes();

// Frees what the calling thread holds.
void release_scratch();

}  // namespace sc
