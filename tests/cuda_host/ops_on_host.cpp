// The CUDA operators on CPU tensors: csrc/ops_cuda.cpp as it is, products by at::mm, kernels on the engine of engine.h.
// Registers fused_rnn_host::rnn_forward and the others, with the schemas of fused_rnn's, which must be loaded.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include "cpu/custom.h"
#include "cpu/table.h"
#include "cuda/custom.h"
#include "cuda/launch.cuh"
#include "cuda/persistent.cuh"
#include "cuda/rows.cuh"
#include "cuda/step.cuh"
#include "cuda/step_norm.cuh"
#include "cuda/step_options.cuh"
#include "engine.h"
#include "ops_cuda.h"
#include "ops_cuda_stream.h"

namespace fused_rnn {

// Those of the libraries that were added.
static Table<CustomCell, 64> custom_cells;

const CustomCell* custom_cell(CellKind kind) {
  return custom_cells.find([&](const CustomCell& cell) { return cell.kind == kind; });
}

namespace cuda {

namespace {

struct OnHost : OnStream {
  OnHost() : OnStream(nullptr) {}
  using OnStream::operator();
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int blocks, int threads, const Arguments&... arguments) const {
    (*this)(kernel, StepGrid{unsigned(blocks), 1, 1}, threads, 0, arguments...);
  }
};

}  // namespace

const char* read_device(int, DeviceInfo& info) {
  // An H100, but that plans for it are never asked here whether they fit.
  info.arch = 90;
  info.sms = 132;
  info.shared_per_block = 232448;
  info.shared_per_sm = 233472;
  info.registers_per_sm = 65536;
  info.l2_bytes = int64_t(50) << 20;
  info.max_cluster = 16;
  info.cooperative = true;
  info.clock_khz = 1980000;
  return nullptr;
}

const char* step_forward(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions, int count,
                         void*) {
  launch_step(kind, dtype, hidden_size, directions, count, units_for_vectors, OnHost{});
  return nullptr;
}

const char* step_backward(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions, int count,
                          void*) {
  launch_step(kind, dtype, hidden_size, directions, count, units_for_vectors, OnHost{});
  return nullptr;
}

const char* step_forward_with_options(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions,
                                      const ForwardOptions* options, const Within& within, int count, void*) {
  launch_step_with_options(kind, dtype, hidden_size, directions, options, within, count, OnHost{});
  return nullptr;
}

const char* step_backward_with_options(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions,
                                       const BackwardOptions* options, const Within& within, int count, void*) {
  launch_step_with_options(kind, dtype, hidden_size, directions, options, within, count, OnHost{});
  return nullptr;
}

const char* reset_forward(DType dtype, int64_t hidden_size, const StepForward* directions,
                          const ForwardOptions* options, const Within& within, int count, void*) {
  launch_reset(dtype, hidden_size, directions, options, within, count, OnHost{});
  return nullptr;
}

const char* reset_backward(DType dtype, int64_t hidden_size, const StepBackward* directions,
                           const BackwardOptions* options, const Within& within, int count, void*) {
  launch_reset(dtype, hidden_size, directions, options, within, count, OnHost{});
  return nullptr;
}

const char* step_forward_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const StepForward* directions,
                                   const ForwardOptions* options, const ForwardNorm* norms, const Within& within,
                                   int count, void*) {
  launch_step_with_norm(kind, dtype, hidden_size, directions, options, norms, within, count, OnHost{});
  return nullptr;
}

const char* step_backward_with_norm(CellKind kind, DType dtype, int64_t hidden_size, const StepBackward* directions,
                                    const BackwardOptions* options, const BackwardNorm* norms, const Within& within,
                                    int count, void*) {
  launch_step_with_norm(kind, dtype, hidden_size, directions, options, norms, within, count, OnHost{});
  return nullptr;
}

const char* projected_forward(DType dtype, int64_t state_size, const ProjectedForward* directions, int count, void*) {
  launch_states(dtype, state_size, directions, count, OnHost{});
  return nullptr;
}

const char* projected_backward(DType dtype, int64_t state_size, const ProjectedBackward* directions, int count, void*) {
  launch_states(dtype, state_size, directions, count, OnHost{});
  return nullptr;
}

const char* hand_back(DType dtype, int64_t state_size, int64_t cell_size, const HandedBack* directions, int count,
                      void*) {
  launch_hand_back(dtype, state_size, cell_size, directions, count, OnHost{});
  return nullptr;
}

int64_t column_sums_workspace(DType dtype, int64_t rows, int64_t columns) {
  return sum_chunks(rows) * columns * int64_t(dtype == DType::float64 ? sizeof(double) : sizeof(float));
}

const char* column_sums(DType dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, void* out,
                        void* again, void* workspace, void*) {
  launch_column_sums(dtype, data, rows, columns, stride, out, again, workspace, OnHost{});
  return nullptr;
}

const char* upload_steps(const int64_t* batch_sizes, int64_t T, int64_t* sizes, int64_t* offsets, void*) {
  launch_store_steps(batch_sizes, T, sizes, offsets, OnHost{});
  return nullptr;
}

const char* previous_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                            const Sequence& y, const void* h0, void* out, void*) {
  launch_previous_states(dtype, size, steps, rows, reverse, y, h0, out, OnHost{});
  return nullptr;
}

const char* multiplied_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                              const Sequence& y, const void* h0, const void* reset_h, const void* dropout, void* out,
                              void*) {
  launch_multiplied_states(dtype, size, steps, rows, reverse, y, h0, reset_h, dropout, out, OnHost{});
  return nullptr;
}

const char* draw_bits(const int64_t* seed, int64_t rows, int64_t units, double rate, uint8_t* bits, void*) {
  launch_draw_bits(seed, rows, units, rate, bits, OnHost{});
  return nullptr;
}

// What ran since launches() was asked last.
static std::vector<std::string> launched;

bool persistent_fits(const LayerSizes&, const Plan&, const DeviceInfo&) { return true; }
bool persistent_has_options(const LayerSizes&, const Plan&, const DeviceInfo&) { return two_roles; }

template <class Arguments, class Kernel, class Part>
const char* launch_persistent(Kernel kernel, const LayerSizes& sizes, const Steps& steps, const Part* parts,
                              const Plan& plan, void* workspace) {
  Arguments arguments = {};
  arguments.hidden_size = sizes.hidden_size;
  arguments.steps = steps;
  for (int p = 0; p < plan.parts(); ++p) arguments.part[p] = parts[p];
  arguments.tiling = plan.tiling;
  arguments.workspace = static_cast<char*>(workspace);
  memset(workspace, 0xff, size_t(plan.workspace_bytes));
  memset(workspace, 0, size_t(plan.counters) * 4);
  cuda_host::Launch launch;
  launch.grid_x = plan.tiling.blocks * plan.tiling.teams;
  launch.grid_y = plan.directions;
  launch.threads = kernel_threads;
  launch.cluster = plan.variant == Variant::cluster ? plan.tiling.blocks : 1;
  launch.shared_bytes = size_t(plan.tiling.shared_bytes);
  launch.cooperative = plan.variant == Variant::grid;
  launched.push_back(std::string(name(plan.variant)) + " " + name(plan.multiply) +
                     (plan.backward ? " backward" : " forward") +
                     (plan.layers > 1 ? " of " + std::to_string(plan.layers) + " layers" : ""));
  cuda_host::launch(launch, [&] { kernel(arguments); });
  return nullptr;
}

template <Multiply multiply>
ForwardKernel forward_kernel_of(const Plan& plan, CellKind kind) {
  if constexpr (multiply != Multiply::float32)
    if (plan.layers > 1) return forward_kernel<multiply, true>(kind, plan.shape);
  return forward_kernel<multiply, false>(kind, plan.shape);
}

template <Multiply multiply>
BackwardKernel backward_kernel_of(const Plan& plan, CellKind kind) {
  if constexpr (multiply != Multiply::float32)
    if (plan.layers > 1) return backward_kernel<multiply, true>(kind, plan.shape);
  return backward_kernel<multiply, false>(kind, plan.shape);
}

const char* persistent_forward(const LayerSizes& sizes, const Steps& steps, const PersistentForward* parts,
                               const Plan& plan, const DeviceInfo&, void* workspace, void*) {
  const auto run = [&](ForwardKernel kernel) {
    return launch_persistent<ForwardArguments>(kernel, sizes, steps, parts, plan, workspace);
  };
  switch (plan.multiply) {
    case Multiply::bfloat16: return run(forward_kernel_of<Multiply::bfloat16>(plan, sizes.kind));
    case Multiply::float16: return run(forward_kernel_of<Multiply::float16>(plan, sizes.kind));
    case Multiply::tf32: return run(forward_kernel_of<Multiply::tf32>(plan, sizes.kind));
    default: return run(forward_kernel_of<Multiply::float32>(plan, sizes.kind));
  }
}

const char* persistent_backward(const LayerSizes& sizes, const Steps& steps, const PersistentBackward* parts,
                                const Plan& plan, const DeviceInfo&, void* workspace, void*) {
  const auto run = [&](BackwardKernel kernel) {
    return launch_persistent<BackwardArguments>(kernel, sizes, steps, parts, plan, workspace);
  };
  switch (plan.multiply) {
    case Multiply::bfloat16: return run(backward_kernel_of<Multiply::bfloat16>(plan, sizes.kind));
    case Multiply::float16: return run(backward_kernel_of<Multiply::float16>(plan, sizes.kind));
    case Multiply::tf32: return run(backward_kernel_of<Multiply::tf32>(plan, sizes.kind));
    default: return run(backward_kernel_of<Multiply::float32>(plan, sizes.kind));
  }
}

}  // namespace cuda

}  // namespace fused_rnn

// Which persistent variants may run from now on.
static void allow(bool block, bool cluster, bool grid, bool none, int64_t team_blocks, int64_t most_columns,
                  int64_t most_steps, int64_t layers) {
  fused_rnn::cuda::Allowed allowed;
  allowed.block = block;
  allowed.cluster = cluster;
  allowed.grid = grid;
  allowed.none = none;
  allowed.team_blocks = int32_t(team_blocks);
  allowed.most_columns = int32_t(most_columns);
  allowed.most_steps = int32_t(most_steps);
  allowed.layers = int32_t(layers);
  fused_rnn::allow_variants(allowed);
}

// As bindings.cpp has it, of a library that was compiled for the engine.
static void add_custom_kernels(const std::string& path) {
  namespace cuda = fused_rnn::cuda;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, path, ": ", dlerror());
  const auto describe =
      reinterpret_cast<const cuda::CustomKernels* (*)()>(dlsym(library, "fused_rnn_custom_cuda_kernels"));
  TORCH_CHECK(describe, path, ": no kernels of a custom cell");
  const cuda::CustomKernels& added = *describe();
  TORCH_CHECK(added.sizes == cuda::sizes_of_steps(), path, ": compiled for another build");
  const fused_rnn::CustomCell cell{added.kind, added.gates, added.saved, added.states};
  TORCH_CHECK(fused_rnn::custom_cells.add(cell, [&](const auto& other) { return other.kind == cell.kind; }) &&
                  cuda::add_custom_kernels(&added),
              path, ": there are too many");
}

TORCH_LIBRARY(fused_rnn_host, m) {
  m.def(
      "allow(bool block, bool cluster, bool grid, bool none, int team_blocks, int most_columns, int most_steps, "
      "int layers) -> ()",
      &allow);
  m.def("add_custom_kernels(str path) -> ()", &add_custom_kernels);
  m.def("launches() -> str[]", [] { return std::exchange(fused_rnn::cuda::launched, {}); });
  for (const char* name : {"rnn_forward", "rnn_backward", "cell_forward", "cell_backward", "draw_bits"}) {
    const auto original =
        c10::Dispatcher::singleton().findSchemaOrThrow((std::string("fused_rnn::") + name).c_str(), "");
    m.def(original.schema().cloneWithName(std::string("fused_rnn_host::") + name, ""));
  }
}
