// Rows of a batch: which step each belongs to, the state before it, and bits that are drawn for it.
#pragma once

#include <algorithm>

#include "../cells/draw.h"
#include "cuda.h"
#include "device.h"

namespace fused_rnn {
namespace cuda {

// As many steps as the arguments of one launch hold.
constexpr int step_chunk = 480;

struct StepSizes {
  int64_t sizes[step_chunk];
};

// sizes[first ...] and offsets[first ...] of `count` steps, which begin at row `row`; and the end of the last one.
__global__ void store_steps(StepSizes chunk, int64_t first, int count, int64_t row, int64_t* sizes, int64_t* offsets) {
  for (int i = thread_index(); i <= count; i += block_size()) {
    int64_t offset = row;
    for (int j = 0; j < i; ++j) offset += chunk.sizes[j];
    offsets[first + i] = offset;
    if (i < count) sizes[first + i] = chunk.sizes[i];
  }
}

// The step of row n.
FRNN_DEVICE int64_t step_of(const Steps& steps, int64_t n) {
  if (!steps.offsets) return n / steps.B;
  int64_t low = 0, high = steps.T - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (steps.offsets[middle] <= n) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A warp a row. E: an unsigned integer of the dtype's width; null h0: zeros.
template <class E>
__global__ void gather_previous_states(int64_t size, Steps steps, bool reverse, Sequence y, const E* h0, E* out) {
  const int64_t warps = int64_t(grid_x()) * (block_size() / warp_size);
  const int64_t first = int64_t(block_x()) * (block_size() / warp_size) + warp_index();
  for (int64_t n = first; n < steps.total_rows(); n += warps) {
    const int64_t t = step_of(steps, n), b = n - steps.first_row(t);
    const int64_t previous = reverse ? t + 1 : t - 1;
    const E* from = h0 ? h0 + b * size : nullptr;
    if (previous >= 0 && previous < steps.T && b < steps.rows(previous)) {
      from = static_cast<const E*>(y.data) + steps.step(y, previous) + b * y.batch_stride;
    }
    for (int64_t i = lane_index(); i < size; i += warp_size) out[n * size + i] = from ? from[i] : E(0);
  }
}

// The same of a call in which rows begin anew, or h is multiplied by factors before W_hh.
template <class S>
__global__ void gather_multiplied_states(int64_t size, Steps steps, bool reverse, Sequence y, const S* h0,
                                         const S* reset_h, const S* dropout, S* out) {
  const int64_t warps = int64_t(grid_x()) * (block_size() / warp_size);
  const int64_t first = int64_t(block_x()) * (block_size() / warp_size) + warp_index();
  for (int64_t n = first; n < steps.total_rows(); n += warps) {
    const int64_t t = step_of(steps, n), b = n - steps.first_row(t);
    const int64_t previous = reverse ? t + 1 : t - 1;
    const S* from = h0 ? h0 + b * size : nullptr;
    if (steps.mask && !steps.mask[n]) {
      from = nullptr;
    } else if (steps.reset && steps.begins_anew(t, b, reverse)) {
      from = reset_h ? reset_h + b * size : nullptr;
    } else if (previous >= 0 && previous < steps.T && b < steps.rows(previous)) {
      from = static_cast<const S*>(y.data) + steps.step(y, previous) + b * y.batch_stride;
    }
    for (int64_t i = lane_index(); i < size; i += warp_size) {
      typename Accumulator<S>::type h = 0;
      if (from) h = dropout ? widen(from[i]) * widen(dropout[b * size + i]) : widen(from[i]);
      out[n * size + i] = narrow<S>(h);
    }
  }
}

// A thread a byte.
__global__ void draw_rows_of_bits(const int64_t* seed, int64_t rows, int64_t units, double rate, uint8_t* bits) {
  const int64_t bytes = (units + 7) / 8, step = int64_t(grid_x()) * block_size();
  const DrawThreshold threshold(rate);
  for (int64_t i = int64_t(block_x()) * block_size() + thread_index(); i < rows * bytes; i += step) {
    const int64_t row = i / bytes, unit = i % bytes * 8;
    const RowOfDraws draws(uint64_t(*seed), row);
    unsigned byte = 0;
    for (int k = 0; k < 8 && unit + k < units; ++k) {
      const bool one = threshold.all || draws.drawn(uint32_t(unit + k)) < threshold.below;
      byte |= unsigned(one) << k;
    }
    bits[i] = uint8_t(byte);
  }
}

// All take a launch(kernel, blocks, threads, arguments...).

template <class Launch>
void launch_store_steps(const int64_t* batch_sizes, int64_t T, int64_t* sizes, int64_t* offsets, Launch launch) {
  int64_t row = 0;
  for (int64_t first = 0; first < T; first += step_chunk) {
    StepSizes chunk;
    const int count = int(std::min<int64_t>(step_chunk, T - first));
    std::copy_n(batch_sizes + first, count, chunk.sizes);
    launch(store_steps, 1, 256, chunk, first, count, row, sizes, offsets);
    for (int i = 0; i < count; ++i) row += chunk.sizes[i];
  }
}

template <class Launch>
void launch_previous_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                            const Sequence& y, const void* h0, void* out, Launch launch) {
  constexpr int threads = 128, rows_of_block = threads / warp_size;
  const int blocks = int(std::min<int64_t>((rows + rows_of_block - 1) / rows_of_block, 1 << 20));
  const auto run = [&](auto element) {
    using E = decltype(element);
    launch(gather_previous_states<E>, blocks, threads, size, steps, reverse, y, static_cast<const E*>(h0),
           static_cast<E*>(out));
  };
  switch (dtype) {
    case DType::float64: run(uint64_t{}); break;
    case DType::float32: run(uint32_t{}); break;
    default: run(uint16_t{});
  }
}

template <class Launch>
void launch_multiplied_states(DType dtype, int64_t size, const Steps& steps, int64_t rows, bool reverse,
                              const Sequence& y, const void* h0, const void* reset_h, const void* dropout, void* out,
                              Launch launch) {
  constexpr int threads = 128, rows_of_block = threads / warp_size;
  const int blocks = int(std::min<int64_t>((rows + rows_of_block - 1) / rows_of_block, 1 << 20));
  const auto run = [&](auto element) {
    using S = decltype(element);
    launch(gather_multiplied_states<S>, blocks, threads, size, steps, reverse, y, static_cast<const S*>(h0),
           static_cast<const S*>(reset_h), static_cast<const S*>(dropout), static_cast<S*>(out));
  };
  switch (dtype) {
    case DType::float32: return run(float{});
    case DType::float64: return run(double{});
    case DType::bfloat16: return run(BFloat16{});
    case DType::float16: return run(Half{});
  }
}

template <class Launch>
void launch_draw_bits(const int64_t* seed, int64_t rows, int64_t units, double rate, uint8_t* bits, Launch launch) {
  constexpr int threads = 128;
  const int64_t bytes = rows * ((units + 7) / 8);
  const int blocks = int(std::min<int64_t>((bytes + threads - 1) / threads, 1 << 20));
  launch(draw_rows_of_bits, blocks, threads, seed, rows, units, rate, bits);
}

// Nothing: asked of the driver is how many blocks of it fit.
__global__ void occupy() {}

}  // namespace cuda
}  // namespace fused_rnn
