#include "custom.h"

#include <atomic>
#include <cstring>

#include "kernels.h"
#include "table.h"

namespace fused_rnn {

namespace {

constexpr int most_cells = 256;
Table<CustomCell, most_cells> cells;
Table<const CustomKernels*, most_cells * 4> tables;  // of four dtypes
std::atomic<CustomCompiler> compiler_in_use{nullptr};

const CustomKernels* find_kernels(CellKind kind, DType dtype, const char* isa) {
  const CustomKernels* const* found = tables.find([&](const CustomKernels* kernels) {
    return kernels->kind == kind && kernels->dtype == dtype && std::strcmp(kernels->isa, isa) == 0;
  });
  return found ? *found : nullptr;
}

}  // namespace

bool add_custom_cell(const CustomCell& cell) {
  return cells.add(cell, [&](const CustomCell& other) { return other.kind == cell.kind; });
}

bool add_custom_kernels(const CustomKernels* kernels) {
  return tables.add(kernels, [&](const CustomKernels* other) {
    return other->kind == kernels->kind && other->dtype == kernels->dtype && std::strcmp(other->isa, kernels->isa) == 0;
  });
}

const CustomCell* custom_cell(CellKind kind) {
  return cells.find([&](const CustomCell& cell) { return cell.kind == kind; });
}

void set_custom_compiler(CustomCompiler compiler) { compiler_in_use.store(compiler, std::memory_order_release); }

const CustomKernels* custom_kernels(CellKind kind, DType dtype) {
  if (const CustomKernels* found = find_kernels(kind, dtype, kernels().isa)) return found;
  if (const CustomCompiler compile = compiler_in_use.load(std::memory_order_acquire)) compile(kind, dtype);
  return find_kernels(kind, dtype, kernels().isa);
}

}  // namespace fused_rnn
