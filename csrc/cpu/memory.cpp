#include <sys/mman.h>

#include <cstdlib>

#include "team.h"

namespace fused_rnn {

void* large_memory(size_t bytes) {
  // Huge pages: a step streams megabytes of packed weights, and 4 KiB pages would miss the TLB.
  const size_t alignment = bytes >= (size_t(1) << 20) ? (size_t(2) << 20) : 64;
  const size_t size = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, size);
#if defined(MADV_HUGEPAGE)
  if (memory && alignment > 64) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace fused_rnn
