// Which persistent variant runs a layer, if any, and how it is laid out on the GPU.
//
// A team of blocks holds one copy of W_hh (one direction) on chip for the whole sequence and owns some columns of the
// batch; teams never wait for each other. A block owns hidden units of the team, in octets (8 units).
//
//   block    a team of one block: nothing travels                                                  sm_80 and later
//   cluster  a team is a thread-block cluster, states travel through distributed shared memory     sm_90 and later
//   grid     teams of any size, states travel through L2; all blocks must be resident together     sm_80 and later
//   none     W_hh does not fit, or a launch a step is predicted to be faster
//
// In a wavefront a team is a cluster that holds W_hh of several layers, and W_ih of those above the lowest: each layer
// has blocks of its own, which compute a step as soon as the layer below has sent it its h.
#pragma once

#include <string>

#include "cuda.h"

namespace fused_rnn {
namespace cuda {

// The pieces of tile.cuh.
constexpr int multiply_threads = 256, multiply_warps = 8;  // of a block
constexpr int most_units = 64;                             // of a block
constexpr int tile_columns = 8;
constexpr int slab_chunks = 4, chunk_bytes = 16;
constexpr int slab_bytes = slab_chunks * tile_columns * chunk_bytes;  // of a column tile
constexpr int tile_bytes = 2 * slab_bytes;                            // of a row tile

// Layers that a launch runs in a wavefront at the most.
constexpr int most_layers = 4;

enum class Variant : int32_t { none = 0, block = 1, cluster = 2, grid = 3 };

// How the numbers are multiplied.
enum class Multiply : int32_t { bfloat16 = 0, float16 = 1, tf32 = 2, float32 = 3 };

// How the blocks of a team hand over what they have computed.
enum class Exchange : int32_t {
  none = 0,      // a team of one block
  counted = 1,   // asynchronous remote stores that count their bytes on the receiver's mbarrier
  barriers = 2,  // remote stores and one cluster barrier a step
  memory = 3     // global memory and a counter per column tile
};

// What a kernel is instantiated for. Row tiles (16 rows) and slabs (64 bytes of k) as in tile.cuh.
struct ForwardShape {
  int32_t row_tiles;       // per warp
  int32_t register_slabs;  // of each of these row tiles, as many slabs are in registers
};
struct BackwardShape {
  int32_t group;            // row tiles that are summed together
  int32_t register_groups;  // groups whose rows are in registers
  int32_t slabs;            // the most along k
};

// A kernel of 256 threads can have 255 registers per thread. These counts are the largest without spills, next to the
// sums (4 per row tile, with float32 16), the operands under way and the addresses. Row tiles and slabs in registers
// are those of H = 512 and 768 in 16 bits and clusters of 16 (second and third of the backward pass), and smaller ones;
// what is larger stands in shared memory, but for the slabs of the backward pass, which are the most that a block may
// have. Host execution has few registers, so that small sizes need shared memory as well, unless it asks for all.
#if defined(FRNN_CUDA_ON_HOST) && !defined(FRNN_ALL_REGISTERS)
constexpr bool few_registers = true;
#else
constexpr bool few_registers = false;
#endif
constexpr bool is_half(Multiply multiply) { return multiply == Multiply::bfloat16 || multiply == Multiply::float16; }

// How many shapes there are. A cell with one gate needs no more: a block has at most 64 units.
constexpr int forward_shapes(Multiply multiply, int gates) { return is_half(multiply) && gates > 1 ? 2 : 1; }
constexpr int backward_shapes(Multiply multiply, int gates) { return is_half(multiply) && gates > 1 ? 3 : 1; }

// Which cells and products have kernels for several layers.
constexpr bool has_wavefront(Multiply multiply, int gates) { return multiply != Multiply::float32 && gates > 1; }

constexpr ForwardShape forward_shape(Multiply multiply, int index, bool wavefront) {
  if (few_registers) return {index == 0 ? 2 : 3, 1};
  if (multiply == Multiply::float32) return {2, 6};
  return index == 0 ? ForwardShape{2, 9} : ForwardShape{3, wavefront ? 6 : 7};
}
constexpr BackwardShape backward_shape(Multiply multiply, int index) {
  const int group = multiply == Multiply::float32 ? 1 : 2;
  if (!is_half(multiply)) return {group, few_registers ? 1 : 2 / group, 8};
  if (index == 0) return {group, few_registers ? 1 : 4, 2};
  if (index == 1) return {group, few_registers ? 1 : 2, 4};
  return {few_registers ? group : 3, 1, 6};
}

// What a kernel knows of its plan. Bytes are of one block's shared memory.
struct Tiling {
  Exchange exchange = Exchange::none;
  int32_t blocks = 1;        // of a team; the cluster size
  int32_t layers = 1;        // of a team; more than one: a wavefront
  int32_t active = 1;        // blocks that have units, of each layer; the others only meet at cluster barriers
  int32_t teams = 1;         // per direction
  int32_t octets = 1;        // per block
  int32_t columns = 8;       // per team
  int32_t column_tiles = 1;  // of 8 columns, per team
  // Forward: warps that share the rows of the resident matrix, and warps that share k; their product is 8. In the
  // backward pass all warps share the rows.
  int32_t warps_rows = 8;
  int32_t warps_k = 1;       // in a wavefront half of them have W_hh, the others W_ih
  int32_t slabs = 1;         // along k: of a warp (forward), of the block (backward)
  int32_t row_tiles = 1;     // of a warp, in registers and in shared memory
  int32_t own_tiles = 1;     // backward: of these, those of W_hh; the others are of W_ih
  int32_t sum_pairs = 1;     // forward: pairs of columns that partial sums have room for,
  int32_t pair_stride = 1;   // and how far, in Pairs, they are apart
  int32_t source_split = 1;  // backward: threads that share a sum over the team's blocks
  // Where in a block's shared memory:
  int32_t states = 0;    // running h and c, or the gradients of h and c that stay in the block
  int32_t biases = 0;    // forward
  int32_t sums = 0;      // forward: partial sums over k, two buffers; backward: of a split sum
  int32_t operand = 0;   // forward: h, two buffers per column tile (one in all with Exchange::memory); backward: gate
                         // gradients, two buffers
  int32_t received = 0;  // backward: partial sums of the team, two buffers per column tile
  int32_t targets = 0;   // backward: where each octet's sums go
  int32_t barriers = 0;
  int32_t credits = 0;  // wavefront: mbarriers of the blocks that take from this one
  int32_t weights = 0;  // what registers do not hold
  int32_t shared_bytes = 0;
};

struct Plan {
  Variant variant = Variant::none;
  Multiply multiply = Multiply::float32;
  bool backward = false;
  int32_t shape = 0;  // index into forward_shape or backward_shape
  Tiling tiling;
  int32_t directions = 1;
  bool merged = false;           // the launch runs a layer with a projection as one without (LayerSizes::merged)
  int32_t layers = 1;            // that the launch runs; more than one: in a wavefront
  int32_t blocks = 0;            // of the launch
  int32_t waves = 1;             // not all teams may be resident together: how often those that are follow each other
  int64_t workspace_bytes = 0;   // to be passed to the launch
  int64_t counters = 0;          // at its beginning, 32 bits each
  int64_t register_bytes = 0;    // of W_hh in registers, per block
  int64_t weight_bytes = 0;      // of W_hh in shared memory, per block
  double predicted_step_us = 0;  // of all waves; from constants that no GPU has measured yet (plan.cpp)
  double predicted_us = 0;       // of the whole launch; of all steps for Variant::none
  std::string reason;            // why no better variant was taken

  // How many structs of pointers a launch takes: one for each direction, or for each layer.
  int parts() const { return directions * layers; }
};

const char* name(Variant variant);
const char* name(Multiply multiply);
const char* name(Exchange exchange);

// What a request excludes, for measurements and tests.
struct Allowed {
  bool block = true;
  bool cluster = true;
  bool grid = true;
  bool none = true;          // else a launch a step only if nothing else can be
  bool counted = true;       // in clusters, Exchange::counted, which wavefronts need
  bool barriers = true;      // in clusters where that may not be, Exchange::barriers
  int32_t team_blocks = 0;   // 0: any
  int32_t most_columns = 0;  // per team; 0: any
  int32_t most_steps = 0;    // whose projections are there at once, in inference; 0: projection_steps
  int32_t layers = 0;        // in a wavefront: 1: none; more: these groups wherever they fit; 0: what is fastest
};

// steps: T and B are read; packed batches are taken as if all rows were live. tf32: whether float32 may be rounded to
// it.
Plan make_plan(const LayerSizes& sizes, const Steps& steps, const DeviceInfo& device, bool backward, bool tf32,
               const Allowed& allowed = {});

// How many of `layers` equal layers, the one the input of the next, run in one launch at a time, and how:
// Plan::layers of them; 1, with the reason, where one layer after the other is faster or nothing else can be. sizes are
// those of each layer.
Plan make_wavefront_plan(const LayerSizes& sizes, int64_t layers, const Steps& steps, const DeviceInfo& device,
                         bool backward, bool tf32, const Allowed& allowed = {});

// Of how many steps the projections are there at once where they need memory of their own, as in inference: all of them
// would grow with T * B * G * H. gates: G.
int64_t projection_steps(const LayerSizes& sizes, int gates, const Steps& steps);

// Steps in which row `row` is live.
FRNN_HOST_DEVICE int live_steps(const Steps& steps, int64_t row) {
  if (!steps.batch_sizes) return int(steps.T);
  int low = 0, high = int(steps.T);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (steps.batch_sizes[middle] > row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Counters stand before the rest of a workspace; they are zero when a launch begins.
FRNN_HOST_DEVICE int64_t counter_bytes(int64_t counters) { return (counters * 4 + 127) / 128 * 128; }

}  // namespace cuda
}  // namespace fused_rnn
