// fused_rnn._C: how the extension was built, which instruction set runs, what a call would do. Computation goes through
// torch.ops.fused_rnn, the usual call by a short way (calls.cpp).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.h"
#include "cpu/custom.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "cuda/custom.h"
#include "cuda/plan.h"
#include "derivatives.h"
#include "quantized.h"
#include "settings.h"
#include "stream_bindings.h"
#if defined(FRNN_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops_cuda.h"
#endif

namespace py = pybind11;

namespace fused_rnn {

namespace {

void add_custom_cell_of(int64_t kind, int gates, int saved, int states) {
  TORCH_CHECK_VALUE(is_custom(CellKind(kind)), "kind: expected the number of a custom cell, got ", kind);
  TORCH_CHECK_VALUE(gates >= 1 && gates <= most_custom_gates, "gates: expected 1 to ", most_custom_gates, ", got ",
                    gates);
  TORCH_CHECK(add_custom_cell({CellKind(kind), gates, saved, states}),
              "kind: there are too many custom cells in this process");
}

// What the library's function of this name describes. The library stays in the process: its kernels may be called at
// any time.
template <class Kernels>
const Kernels* custom_library(const std::string& path, const char* function) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "path: expected a library of a custom cell, got ", path, ": ", dlerror());
  const auto describe = reinterpret_cast<const Kernels* (*)()>(dlsym(library, function));
  TORCH_CHECK(describe, "path: expected a library of a custom cell, got ", path);
  return describe();
}

void check_custom_library(bool is_ours, bool has_room, const std::string& path) {
  TORCH_CHECK(is_ours, "path: expected kernels of a cell that is known here, compiled for this build, got ", path);
  TORCH_CHECK(has_room, "path: there are too many kernels of custom cells in this process");
}

void add_custom_library(const std::string& path) {
  const auto* added = custom_library<CustomKernels>(path, "fused_rnn_custom_kernels");
  const bool is_ours = added->sizes == sizes_of_layers && custom_cell(added->kind);
  check_custom_library(is_ours, is_ours && add_custom_kernels(added), path);
}

void add_custom_cuda_library(const std::string& path) {
  const auto* added = custom_library<cuda::CustomKernels>(path, "fused_rnn_custom_cuda_kernels");
  // What follows the sizes is read only where they are ours.
  const CustomCell* cell = added->sizes == cuda::sizes_of_steps() ? custom_cell(added->kind) : nullptr;
  const bool is_ours =
      cell && added->gates == cell->gates && added->saved == cell->saved && added->states == cell->states;
  check_custom_library(is_ours, is_ours && cuda::add_custom_kernels(added), path);
}

// Never freed: the last call may come after Python has ended.
py::function* custom_compiler = nullptr;

void compile_custom(CellKind kind, DType dtype) {
  const py::gil_scoped_acquire held;
  const auto problem = (*custom_compiler)(int64_t(kind), int(dtype)).cast<std::string>();
  TORCH_CHECK(problem.empty(), problem);
}

void set_compiler_of_custom_cells(const py::function& function) {
  custom_compiler = new py::function(function);
  set_custom_compiler(&compile_custom);
}

py::function* custom_cuda_compiler = nullptr;

void compile_custom_cuda(CellKind kind, DType dtype, int arch) {
  const py::gil_scoped_acquire held;
  const auto problem = (*custom_cuda_compiler)(int64_t(kind), int(dtype), arch).cast<std::string>();
  TORCH_CHECK(problem.empty(), problem);
}

void set_cuda_compiler_of_custom_cells(const py::function& function) {
  custom_cuda_compiler = new py::function(function);
  cuda::set_custom_compiler(&compile_custom_cuda);
}

std::vector<std::string> instruction_sets(bool only_supported) {
  std::vector<std::string> names;
  for (const KernelTable* const* t = compiled_kernels(); *t; ++t) {
    if (!only_supported || runs_here(**t)) names.push_back((*t)->isa);
  }
  return names;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("g++ ") + __VERSION__;
#endif
#if defined(FRNN_KERNEL_FLAGS)
  info["flags"] = FRNN_KERNEL_FLAGS;
  info["instruction_set_flags"] = FRNN_INSTRUCTION_SET_FLAGS;
#else
  info["flags"] = "";
#endif
  info["isa_compiled"] = instruction_sets(false);
#if defined(FRNN_CUDA)
  info["cuda"] = true;
  info["cuda_compiler"] = FRNN_CUDA;
  info["cuda_architectures"] = FRNN_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_compiler"] = "";
  info["cuda_architectures"] = "";
#endif
  info["torch_version"] = TORCH_VERSION;
  info["cxx11_abi"] = bool(_GLIBCXX_USE_CXX11_ABI);
  return info;
}

std::string set_isa(const std::string& name) {
  const std::string before = kernels().isa;
  if (!select_kernels(name.c_str())) {
    std::string here;
    for (const std::string& isa : instruction_sets(true)) here += (here.empty() ? "" : ", ") + isa;
    throw std::invalid_argument("isa: expected one of " + here + ", got " + name);
  }
  return before;
}

at::Tensor test_activation(const std::string& name, const at::Tensor& x, bool bfloat16) {
  TORCH_CHECK_VALUE(name == "tanh" || name == "sigmoid", "name: expected tanh or sigmoid, got ", name);
  TORCH_CHECK_VALUE(x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                    "x: expected a float32 or float64 tensor on the CPU, got ", x.scalar_type(), " on ", x.device());
  TORCH_CHECK_VALUE(!bfloat16 || x.scalar_type() == at::kFloat, "x: expected float32, got ", x.scalar_type());
  const at::Tensor in = x.contiguous(), out = at::empty_like(in);
  kernels().activation(name == "tanh" ? Activation::tanh : Activation::sigmoid,
                       bfloat16                         ? DType::bfloat16
                       : x.scalar_type() == at::kDouble ? DType::float64
                                                        : DType::float32,
                       in.const_data_ptr(), out.mutable_data_ptr(), in.numel());
  return out;
}

double peak_flops(int dtype, double seconds) {
  TORCH_CHECK_VALUE(dtype >= 0 && dtype <= int(DType::float16), "dtype: expected 0 to 3, got ", dtype);
  TORCH_CHECK_VALUE(seconds > 0 && seconds <= 1, "seconds: expected more than 0 and at most 1, got ", seconds);
  struct Work {
    DType dtype;
    double seconds;
    std::vector<double> rates;
  } work{DType(dtype), seconds, std::vector<double>(usable_threads(at::get_num_threads()))};
  const auto measure = [](void* context, int thread) {
    Work& mine = *static_cast<Work*>(context);
    mine.rates[thread] = kernels().peak(mine.dtype, mine.seconds);
  };
  TORCH_CHECK(run_team(int(work.rates.size()), measure, &work), "no ", work.rates.size(), " threads could be had");
  return std::accumulate(work.rates.begin(), work.rates.end(), 0.0);
}

LayerSizes layer_sizes(int kind, int64_t input_size, int64_t hidden_size, int64_t state_size, int directions,
                       int dtype) {
  LayerSizes sizes;
  sizes.kind = CellKind(kind);
  sizes.dtype = DType(dtype);
  sizes.input_size = input_size;
  sizes.hidden_size = hidden_size;
  sizes.state_size = state_size;
  sizes.num_directions = directions;
  return sizes;
}

Steps dense_steps(int64_t T, int64_t B) {
  Steps steps;
  steps.T = T;
  steps.B = B;
  return steps;
}

py::dict plan(int kind, int64_t T, int64_t B, const std::optional<std::vector<int64_t>>& batch_sizes,
              int64_t input_size, int64_t hidden_size, int64_t state_size, int directions, int dtype, bool backward,
              int64_t heads, bool layer_norm) {
  TORCH_CHECK_VALUE(heads >= 1 && state_size % heads == 0, "heads: expected a divisor of ", state_size, ", got ",
                    heads);
  LayerSizes sizes = layer_sizes(kind, input_size, hidden_size, state_size, directions, dtype);
  const int bytes = kernels().vector_bytes;
  const int64_t vector_units = bytes / (sizes.dtype == DType::float64 ? 8 : 4);
  sizes.heads = heads / heads_together(hidden_size, heads, vector_units);
  sizes.layer_norm = layer_norm;
  Steps steps = dense_steps(T, B);
  std::vector<int64_t> offsets{0};
  if (batch_sizes) {
    for (const int64_t n : *batch_sizes) offsets.push_back(offsets.back() + n);
    steps.batch_sizes = batch_sizes->data();
    steps.offsets = offsets.data();
  }
  const Plan p = make_plan(sizes, steps, usable_threads(at::get_num_threads()), bytes, backward);
  const Bound bound = time_bound(sizes, steps, p, bytes, backward);
  py::dict result;
  result["isa"] = kernels().isa;
  result["threads"] = p.threads();
  result["direction_groups"] = p.direction_groups;
  result["row_groups"] = p.row_groups;
  result["unit_groups"] = p.unit_groups;
  result["predicted_us"] = p.predicted_us;
  result["serial_us"] = p.serial_us;
  result["bound_us"] = bound.us;
  result["bound_by"] = bound.by;
  return result;
}

py::dict describe(const cuda::Plan& p) {
  py::dict result;
  result["variant"] = cuda::name(p.variant);
  result["multiply"] = cuda::name(p.multiply);
  result["exchange"] = cuda::name(p.tiling.exchange);
  result["reason"] = p.reason;
  result["layers"] = p.layers;
  result["merged"] = p.merged;
  result["blocks"] = p.blocks;
  result["team_blocks"] = p.tiling.blocks;
  result["teams"] = p.tiling.teams;
  result["columns"] = p.tiling.columns;
  result["waves"] = p.waves;
  result["register_bytes"] = p.register_bytes;
  result["weight_bytes"] = p.weight_bytes;
  result["shared_bytes"] = p.tiling.shared_bytes;
  result["workspace_bytes"] = p.workspace_bytes;
  result["predicted_step_us"] = p.predicted_step_us;
  result["predicted_us"] = p.predicted_us;
  return result;
}

// The GPU that a dict describes, with the names of cuda/cuda.h.
cuda::DeviceInfo device_from(const py::dict& fields) {
  cuda::DeviceInfo info;
  info.arch = fields["arch"].cast<int>();
  info.sms = fields["sms"].cast<int>();
  info.shared_per_block = fields["shared_per_block"].cast<int64_t>();
  info.shared_per_sm = fields["shared_per_sm"].cast<int64_t>();
  info.registers_per_sm = fields["registers_per_sm"].cast<int64_t>();
  info.l2_bytes = fields["l2_bytes"].cast<int64_t>();
  info.max_cluster = fields["max_cluster"].cast<int>();
  info.cooperative = fields["cooperative"].cast<bool>();
  info.clock_khz = fields["clock_khz"].cast<int>();
  return info;
}

py::dict cuda_plan_for(int kind, int64_t T, int64_t B, int64_t input_size, int64_t hidden_size, int64_t state_size,
                       int directions, int dtype, bool backward, const py::dict& device, bool tf32, int64_t layers) {
  const LayerSizes sizes = layer_sizes(kind, input_size, hidden_size, state_size, directions, dtype);
  const cuda::DeviceInfo info = device_from(device);
  const Steps steps = dense_steps(T, B);
  return describe(layers > 1 ? cuda::make_wavefront_plan(sizes, layers, steps, info, backward, tf32)
                             : cuda::make_plan(sizes, steps, info, backward, tf32));
}

#if defined(FRNN_CUDA)
py::dict cuda_plan_here(int kind, int64_t T, int64_t B, int64_t input_size, int64_t hidden_size, int64_t state_size,
                        int directions, int dtype, bool backward, int device, int64_t layers, bool options) {
  const LayerSizes sizes = layer_sizes(kind, input_size, hidden_size, state_size, directions, dtype);
  const c10::cuda::CUDAGuard guard{c10::DeviceIndex(device)};
  const Steps steps = dense_steps(T, B);
  return describe(layers > 1 ? cuda_wavefront(sizes, layers, steps, device, backward, tf32_allowed())
                             : cuda_plan(sizes, steps, device, backward, tf32_allowed(), options));
}

py::dict cuda_device(int index) {
  const cuda::DeviceInfo& info = device_info(index);
  py::dict fields;
  fields["arch"] = info.arch;
  fields["sms"] = info.sms;
  fields["shared_per_block"] = info.shared_per_block;
  fields["shared_per_sm"] = info.shared_per_sm;
  fields["registers_per_sm"] = info.registers_per_sm;
  fields["l2_bytes"] = info.l2_bytes;
  fields["max_cluster"] = info.max_cluster;
  fields["cooperative"] = info.cooperative;
  fields["clock_khz"] = info.clock_khz;
  return fields;
}

void cuda_barriers(const std::string& kind, int64_t rounds) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const cuda::DeviceInfo& device = device_info(stream.device_index());
  const char* error = "kind: expected exchange, cluster or grid";
  if (kind == "exchange") {
    error = cuda::run_cluster_exchanges(rounds, device, stream.stream());
  } else if (kind == "cluster") {
    error = cuda::run_cluster_barriers(rounds, device, stream.stream());
  } else if (kind == "grid") {
    const at::Tensor counter = at::empty({1}, at::TensorOptions().dtype(at::kInt).device(stream.device()));
    error =
        cuda::run_grid_barriers(rounds, device, static_cast<uint32_t*>(counter.mutable_data_ptr()), stream.stream());
  }
  TORCH_CHECK(!error, "fused_rnn: ", error);
}

py::dict allow(bool block, bool cluster, bool grid, bool none, bool counted, bool barriers, int team_blocks,
               int most_columns, int most_steps, int layers) {
  cuda::Allowed now;
  now.block = block;
  now.cluster = cluster;
  now.grid = grid;
  now.none = none;
  now.counted = counted;
  now.barriers = barriers;
  now.team_blocks = team_blocks;
  now.most_columns = most_columns;
  now.most_steps = most_steps;
  now.layers = layers;
  const cuda::Allowed before = allow_variants(now);
  py::dict fields;
  fields["block"] = before.block;
  fields["cluster"] = before.cluster;
  fields["grid"] = before.grid;
  fields["none"] = before.none;
  fields["counted"] = before.counted;
  fields["barriers"] = before.barriers;
  fields["team_blocks"] = before.team_blocks;
  fields["most_columns"] = before.most_columns;
  fields["most_steps"] = before.most_steps;
  fields["layers"] = before.layers;
  return fields;
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build and plan information of fused_rnn; the operators are torch.ops.fused_rnn.";
  m.def("add_custom_cell", &add_custom_cell_of, py::arg("kind"), py::arg("gates"), py::arg("saved"), py::arg("states"),
        "Tells this process of a custom cell.");
  m.def("add_custom_kernels", &add_custom_library, py::arg("path"),
        "Adds the kernels in the library at `path` to those of this process.");
  m.def("set_custom_compiler", &set_compiler_of_custom_cells, py::arg("function"),
        "Sets what adds the kernels of a custom cell where a call finds none: a function of its kind and a dtype that "
        "returns what is wrong, or an empty text.");
  m.def("add_custom_cuda_kernels", &add_custom_cuda_library, py::arg("path"),
        "Adds the CUDA kernels in the library at `path` to those of this process.");
  m.def("set_custom_cuda_compiler", &set_cuda_compiler_of_custom_cells, py::arg("function"),
        "The same as set_custom_compiler of CUDA kernels: its function gets the architecture, 90 for sm_90, as well.");
  m.def("build_info", &build_info, "Compiler, flags, instruction sets and PyTorch version of this build.");
  m.def(
      "has_derivative_kernels",
      [](const at::Tensor& input, const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& controls,
         const std::vector<int64_t>& settings, const std::vector<double>& numbers) {
        return has_derivative_kernels(input, params, controls, settings, numbers);
      },
      "Whether the operators of derivatives take a call.");
  m.def(
      "isa_supported", [] { return instruction_sets(true); },
      "Instruction sets that were compiled and run here, best first.");
  m.def("isa_used", [] { return std::string(kernels().isa); }, "The instruction set that runs.");
  m.def("set_isa", &set_isa, py::arg("name"), "Switches the instruction set; returns the name of the one before.");
  m.def(
      "multiplies_bytes", [] { return multiplies_bytes(kernels().stream(LayerSizes()).isa); },
      "Whether int8 products are made of instructions that multiply bytes, which a processor may lack.");
  m.def(
      "multiplies_bytes_on_tiles",
      [] { return multiplies_bytes(kernels().stream(LayerSizes()).isa) && byte_tiles(kernels()); },
      "Whether those of many rows are made of AMX's.");
  m.def("allow_byte_products", &allow_byte_products, py::arg("allowed"), "For tests: whether such are to be used.");
  m.def("integer_settings", &Settings::integer_names, "Names of the settings that operators take, in their order.");
  m.attr("operators_version") = operators_version;
  m.def("test_activation", &test_activation, py::arg("name"), py::arg("x"), py::arg("bfloat16") = false,
        "tanh or sigmoid as the kernels compute it, or those of a layer in bfloat16, which may be rougher.");
  m.def(
      "usable_threads", [] { return usable_threads(at::get_num_threads()); },
      "Threads that a call would use at most: torch.get_num_threads(), but no more than this process may run on.");
  m.def("available_processors", &available_processors, "Processors that this process may run on.");
  m.def("set_processors", &override_processors, py::arg("count"),
        "For tests: the number that available_processors gives from now on, 0 for the real one; returns the override "
        "before.");
  m.def("scratch_held", &scratch_held, "Bytes of buffers that are kept for this thread's next call.");
  m.def("packed_bytes_held", &packed_bytes_held, "Bytes of packed weights that are kept for later inference calls.");
  m.def("packed_bytes_limit", &packed_bytes_limit, "The most bytes of packed weights that are kept.");
  m.def("set_packed_bytes_limit", &set_packed_bytes_limit, py::arg("bytes"), "Sets that limit; 0 keeps nothing.");
  m.def(
      "clear_packed",
      [] {
        clear_packed();
        clear_quantized();
      },
      "Frees all packed weights that are kept, those of quantized layers, too.");
  m.def("quantized_bytes_held", &quantized_bytes_held, "Bytes of packed weights of quantized layers that are kept.");
  // A thread that packs holds what this waits for.
  m.def("forget_quantized", &forget_quantized, py::arg("first_param"), py::call_guard<py::gil_scoped_release>(),
        "Frees the packed weights of a quantized layer, by the first of its parameters, and those of freed tensors.");
  m.def("team_is_late", &team_is_late, "Whether calls of this thread do without a team for a while: a busy machine.");
  m.def("judge_team", &judge_team, py::arg("threads"), py::arg("wall_us"), py::arg("own_us"),
        "For tests: what a call says of its team when it is done.");
  m.def("expect_teams_in_time", &expect_teams_in_time, "For tests: forgets that teams were late.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("seconds"),
        "Floating-point operations a second that the multiply-add units reach on all threads of a call together, "
        "measured for about `seconds` on registers alone.");
  m.def("plan", &plan, py::arg("kind"), py::arg("T"), py::arg("B"), py::arg("batch_sizes"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("state_size"), py::arg("directions"), py::arg("dtype"), py::arg("backward"),
        py::arg("heads") = 1, py::arg("layer_norm") = false, "How one layer's work would be divided over threads.");
  m.def("cuda_plan_for", &cuda_plan_for, py::arg("kind"), py::arg("T"), py::arg("B"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("state_size"), py::arg("directions"), py::arg("dtype"), py::arg("backward"),
        py::arg("device"), py::arg("tf32"), py::arg("layers") = 1,
        "How one layer would run on a GPU of these properties, or so many, each the input of the next, in wavefronts "
        "(`layers` of the result: of how many; 1: of none). Needs no GPU.");
#if defined(FRNN_CUDA)
  m.def(
      "cuda_plan", &cuda_plan_here, py::arg("kind"), py::arg("T"), py::arg("B"), py::arg("input_size"),
      py::arg("hidden_size"), py::arg("state_size"), py::arg("directions"), py::arg("dtype"), py::arg("backward"),
      py::arg("device"), py::arg("layers") = 1, py::arg("options") = false,
      "How one layer would run on the CUDA device of this index, or so many, as cuda_plan_for; `options`: a layer with "
      "options that kernels of all steps may have.");
  m.def("cuda_device", &cuda_device, py::arg("index"), "What the planner knows of a CUDA device.");
  m.def("cuda_barrier", &cuda_barriers, py::arg("kind"), py::arg("rounds"),
        "So many barriers of one \"cluster\" or of the whole \"grid\", or \"exchange\"s of a word between all blocks "
        "of a cluster, one after the other, on the current stream; for benchmarks.");
  m.def("cuda_allow", &allow, py::arg("block") = true, py::arg("cluster") = true, py::arg("grid") = true,
        py::arg("none") = true, py::arg("counted") = true, py::arg("barriers") = true, py::arg("team_blocks") = 0,
        py::arg("most_columns") = 0, py::arg("most_steps") = 0, py::arg("layers") = 0,
        "For tests and measurements: which persistent variants may run from now on; returns what was allowed before.");
#endif
  add_calls(m);
  add_streams(m);
}

}  // namespace fused_rnn
