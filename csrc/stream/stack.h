// A stack of layers for calls of one step, or of a few, from outside of PyTorch: weights that were packed once, and
// states of as many rows as there is memory for. No framework, no exceptions; all memory is taken when a PackedStack
// and its StackStates are made, and calls after that cannot fail.
//
//   PackedStack* packed = PackedStack::create(layers, count);      // the weights; anything may use it at once
//   StackStates* states = StackStates::create(*packed, slots, rows);
//   if (states->enter()) {                                         // one call at a time
//     states->advance(call);
//     states->leave();
//   }
//   StackStates::destroy(states);
//   PackedStack::destroy(packed);                                  // after the states that were made of it
#pragma once

#include <atomic>
#include <cstddef>

#include "kernels.h"

namespace fused_rnn {

struct KernelTable;

class PackedStack {
 public:
  // Layers of float32, float64 or bfloat16, the lowest first: sizes, options, and the weights of direction 0, which are
  // not needed afterwards. Each layer's input is the output of the one below. For the instruction set in use. Null:
  // there is no memory.
  static PackedStack* create(const LayerForward* layers, int64_t count);
  static void destroy(PackedStack* packed);
  // The same in memory of the caller's, aligned to 64 bytes, for one instruction set; not to be destroyed.
  static size_t bytes_for(const KernelTable& kernels, const LayerForward* layers, int64_t count);
  static PackedStack* place(void* memory, const KernelTable& kernels, const LayerForward* layers, int64_t count);

  // Whether the other has the same layers with the same weights, bit for bit, for the same instruction set.
  bool equals(const PackedStack& other) const;
  size_t bytes() const { return bytes_; }
  const char* isa() const { return kernels_[0]->isa; }
  int64_t multiply_adds() const { return multiply_adds_; }  // of one row's step

 private:
  friend class StackStates;
  PackedStack() = default;
  static void pack(LayerForward& layer, const StreamKernel& kernel, const StreamWeights& weights);
  static PackedStack* lay_out(void* memory, const KernelTable& kernels, const LayerForward* layers, int64_t count,
                              size_t& bytes);

  int64_t count_ = 0;
  size_t bytes_ = 0;
  int64_t multiply_adds_ = 0;
  LayerForward* layers_ = nullptr;
  const KernelTable* table_ = nullptr;
  const StreamKernel** kernels_ = nullptr;
  StreamWeights* weights_ = nullptr;
  char* packed_ = nullptr;  // all weights
  size_t packed_bytes_ = 0;
};

class StackStates {
 public:
  // `slots` states, all zeros, for calls of up to `rows` rows of one step. `packed` must live as long. Null: there is
  // no memory.
  static StackStates* create(const PackedStack& packed, int64_t slots, int64_t rows);
  static void destroy(StackStates* states);
  // As PackedStack has them.
  static size_t bytes_for(const PackedStack& packed, int64_t slots, int64_t rows);
  static StackStates* place(void* memory, const PackedStack& packed, int64_t slots, int64_t rows);

  // Claims it for one call; false: another thread has it.
  bool enter() { return !in_use_.exchange(true, std::memory_order_acquire); }
  void leave() { in_use_.store(false, std::memory_order_release); }

  // Any number of steps and rows. The output must not overlap the input, unless all rows fit one block.
  void advance(const StreamRows& call);
  // Rows of a step that pass through all layers together.
  int64_t block_rows() const { return step_rows_; }

  int64_t slots() const { return slots_; }
  int64_t num_layers() const { return packed_->count_; }
  // h (P) in the layers' dtype, and c (states * H): in that, too, or, `exact`, as it is kept, in float or double. What
  // is null is not read; for write() null is zeros.
  void read(int64_t layer, int64_t slot, void* h, void* c, bool exact) const;
  void write(int64_t layer, int64_t slot, const void* h, const void* c, bool exact);
  void reset(int64_t slot);

 private:
  StackStates() = default;
  static StackStates* lay_out(void* memory, const PackedStack& packed, int64_t slots, int64_t rows, size_t& bytes);
  void advance_block(const StreamRows& call);

  const PackedStack* packed_ = nullptr;
  int64_t slots_ = 0;
  int64_t rows_ = 0, step_rows_ = 0;  // of one block: of all its steps, of a step
  LayerForward* layers_ = nullptr;
  void** objects_ = nullptr;
  StreamStates* states_ = nullptr;
  char* between_[2] = {};  // (rows, P) outputs of a layer on their way to the next
  std::atomic<bool> in_use_{false};
};

}  // namespace fused_rnn
