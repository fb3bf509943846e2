#include "custom.h"

#include <atomic>
#include <cstring>
#include <mutex>

#include "kernels.h"

namespace fused_rnn {

namespace {

constexpr int most_cells = 256;
const CustomCell* cells[most_cells];
std::atomic<int> count{0};
std::mutex adding;

}  // namespace

bool add_custom_cell(const CustomCell* cell) {
  const std::lock_guard<std::mutex> lock(adding);
  const int n = count.load(std::memory_order_relaxed);
  for (int i = 0; i < n; ++i) {
    if (cells[i]->kind == cell->kind && std::strcmp(cells[i]->isa, cell->isa) == 0) return true;
  }
  if (n == most_cells) return false;
  cells[n] = cell;
  count.store(n + 1, std::memory_order_release);
  return true;
}

const CustomCell* custom_cell(CellKind kind) {
  const CustomCell* found = nullptr;
  const int n = count.load(std::memory_order_acquire);
  for (int i = 0; i < n; ++i) {
    if (cells[i]->kind != kind) continue;
    if (std::strcmp(cells[i]->isa, kernels().isa) == 0) return cells[i];
    found = cells[i];
  }
  return found;
}

}  // namespace fused_rnn
