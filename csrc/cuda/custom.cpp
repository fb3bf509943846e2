#include "custom.h"

#include "../cpu/table.h"

namespace fused_rnn {
namespace cuda {

namespace {

Table<const CustomKernels*, 2048> tables;
std::atomic<CustomCompiler> compiler_in_use{nullptr};

const CustomKernels* find_kernels(CellKind kind, DType dtype, int arch) {
  const CustomKernels* const* found = tables.find([&](const CustomKernels* kernels) {
    return kernels->kind == kind && kernels->dtype == dtype && kernels->arch == arch;
  });
  return found ? *found : nullptr;
}

}  // namespace

bool add_custom_kernels(const CustomKernels* kernels) {
  return tables.add(kernels, [&](const CustomKernels* other) {
    return other->kind == kernels->kind && other->dtype == kernels->dtype && other->arch == kernels->arch;
  });
}

void set_custom_compiler(CustomCompiler compiler) { compiler_in_use.store(compiler, std::memory_order_release); }

const CustomKernels* custom_kernels(CellKind kind, DType dtype, int arch) {
  if (const CustomKernels* found = find_kernels(kind, dtype, arch)) return found;
  if (const CustomCompiler compile = compiler_in_use.load(std::memory_order_acquire)) compile(kind, dtype, arch);
  return find_kernels(kind, dtype, arch);
}

}  // namespace cuda
}  // namespace fused_rnn
