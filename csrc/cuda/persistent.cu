// Launches of the persistent kernels, and what the driver says of their residency.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "persistent.cuh"

namespace fused_rnn {
namespace cuda {

namespace {

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <template <Multiply> class Select>
const void* select(const Plan& plan, CellKind kind) {
  const bool wavefront = plan.layers > 1;
  switch (plan.multiply) {
    case Multiply::bfloat16: return Select<Multiply::bfloat16>::kernel(kind, plan.shape, wavefront);
    case Multiply::float16: return Select<Multiply::float16>::kernel(kind, plan.shape, wavefront);
    case Multiply::tf32: return Select<Multiply::tf32>::kernel(kind, plan.shape, wavefront);
    default: return Select<Multiply::float32>::kernel(kind, plan.shape, wavefront);
  }
}

template <Multiply multiply>
struct Forward {
  static const void* kernel(CellKind kind, int shape, bool wavefront) {
    if constexpr (multiply != Multiply::float32)
      if (wavefront) return reinterpret_cast<const void*>(forward_kernel<multiply, true>(kind, shape));
    return reinterpret_cast<const void*>(forward_kernel<multiply, false>(kind, shape));
  }
};
template <Multiply multiply>
struct Backward {
  static const void* kernel(CellKind kind, int shape, bool wavefront) {
    if constexpr (multiply != Multiply::float32)
      if (wavefront) return reinterpret_cast<const void*>(backward_kernel<multiply, true>(kind, shape));
    return reinterpret_cast<const void*>(backward_kernel<multiply, false>(kind, shape));
  }
};

const void* kernel_of(const Plan& plan, CellKind kind) {
  return plan.backward ? select<Backward>(plan, kind) : select<Forward>(plan, kind);
}

// Lets a kernel take all shared memory of a block and any cluster size, on the current device, and reads how many
// threads its blocks have there: whether its warps have two roles depends on what it was compiled for. These limits
// belong to the kernel, for all host threads: if each launch set its own, another's smaller one could come between.
// Once, because setting them may wait for copies.
cudaError_t prepare(const void* kernel, const DeviceInfo& device, int& threads) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared.find({device.index, kernel});
  if (found != prepared.end()) {
    threads = found->second;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(device.shared_per_block));
  if (error == cudaSuccess && device.max_cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  threads = attributes.maxThreadsPerBlock;
  if (error == cudaSuccess) prepared[{device.index, kernel}] = threads;
  return error;
}

// How a plan is launched. Not to be copied: the configuration points at the attribute.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  cudaError_t error = cudaSuccess;
  int threads = 0;

  Configuration(const void* kernel, const Plan& plan, const DeviceInfo& device, cudaStream_t stream) {
    const Tiling& t = plan.tiling;
    config.gridDim = dim3(unsigned(t.blocks * t.teams), unsigned(plan.directions));
    error = prepare(kernel, device, threads);
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(t.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    if (plan.variant == Variant::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(t.blocks);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.numAttrs = 1;
    } else if (plan.variant == Variant::grid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
    }
  }
  Configuration(const Configuration&) = delete;
};

// Blocks of the kernel that an SM holds, or clusters that the GPU holds; -1: the driver refuses.
int resident(const void* kernel, const Plan& plan, const DeviceInfo& device) {
  Configuration c(kernel, plan, device, nullptr);
  int count = 0;
  cudaError_t error = c.error;
  if (error == cudaSuccess) {
    error = plan.variant == Variant::cluster
                ? cudaOccupancyMaxActiveClusters(&count, kernel, &c.config)
                : cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, c.threads, c.config.dynamicSmemBytes);
  }
  if (error == cudaSuccess) return count;
  cudaGetLastError();  // not an error of whoever asks next
  return -1;
}

// Whether the kernels, in which rows and strides have 31 bits (row_at), can address what a part points at.
bool has_short_strides(const PersistentForward& part) {
  return std::max({part.projection_stride, part.y_stride, part.factors_stride}) <= INT32_MAX;
}
bool has_short_strides(const PersistentBackward& part) {
  return std::max({part.y_stride, part.grad_y_stride, part.factors_stride}) <= INT32_MAX;
}

template <class Arguments, class Part>
const char* launch(const LayerSizes& sizes, const Steps& steps, const Part* parts, const Plan& plan,
                   const DeviceInfo& device, void* workspace, void* stream) {
  if (plan.variant == Variant::none) return "this plan has no persistent kernel";
  for (int p = 0; p < plan.parts(); ++p)
    if (!has_short_strides(parts[p])) return "rows of a sequence are 2^31 elements apart or more";
  Arguments arguments = {};
  arguments.hidden_size = sizes.hidden_size;
  arguments.steps = steps;
  for (int p = 0; p < plan.parts(); ++p) arguments.part[p] = parts[p];
  arguments.tiling = plan.tiling;
  arguments.workspace = static_cast<char*>(workspace);
  const void* const kernel = kernel_of(plan, sizes.kind);
  Configuration c(kernel, plan, device, cudaStream_t(stream));
  cudaError_t error = c.error;
  if (error == cudaSuccess && plan.counters > 0)
    error = cudaMemsetAsync(workspace, 0, size_t(plan.counters) * sizeof(uint32_t), cudaStream_t(stream));
  void* pointers[] = {&arguments};
  if (error == cudaSuccess) error = cudaLaunchKernelExC(&c.config, kernel, pointers);
  if (error != cudaSuccess) cudaGetLastError();  // told here, so not again by the next call
  return text_of(error);
}

}  // namespace

bool persistent_has_options(const LayerSizes& sizes, const Plan& plan, const DeviceInfo& device) {
  int threads = 0;
  if (prepare(kernel_of(plan, sizes.kind), device, threads) == cudaSuccess) return threads > multiply_threads;
  cudaGetLastError();  // persistent_fits says so, too
  return false;
}

bool persistent_fits(const LayerSizes& sizes, const Plan& plan, const DeviceInfo& device) {
  const int count = resident(kernel_of(plan, sizes.kind), plan, device);
  return plan.variant == Variant::grid ? count * device.sms >= plan.blocks : count >= 1;
}

const char* persistent_forward(const LayerSizes& sizes, const Steps& steps, const PersistentForward* parts,
                               const Plan& plan, const DeviceInfo& device, void* workspace, void* stream) {
  return launch<ForwardArguments>(sizes, steps, parts, plan, device, workspace, stream);
}

const char* persistent_backward(const LayerSizes& sizes, const Steps& steps, const PersistentBackward* parts,
                                const Plan& plan, const DeviceInfo& device, void* workspace, void* stream) {
  return launch<BackwardArguments>(sizes, steps, parts, plan, device, workspace, stream);
}

}  // namespace cuda
}  // namespace fused_rnn
