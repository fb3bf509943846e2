// Packed weights that stay from one inference call to the next.
//
// Nothing that PyTorch offers tells whether a weight is still the same: versions are not bumped by fused optimizers, by
// .data or by whoever shares the memory, and an address may come to hold another tensor. So every call that uses a kept
// copy reads the weights again and compares fingerprints of their bytes (fingerprint.h), which takes half the time of
// packing or less; only the content decides.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "../problem.h"

namespace fused_rnn {

// Random numbers of this process that fingerprints are taken with.
FRNN_EXPORT const uint32_t* fingerprint_key();

// What a copy was made of, and for which code.
struct PackedKey {
  std::array<const void*, 6> weights{};  // w_ih, w_hh and w_hr of each direction
  std::array<int64_t, 6> sizes{};
  const void* format = nullptr;  // differs between codes that pack in another way

  bool operator==(const PackedKey& other) const;
};

struct PackedMemory;

// The copy that one call uses: none, one that was filled before, or one that this call fills.
class FRNN_EXPORT PackedCopy {
 public:
  // The copy kept for `key`, of `bytes`, with `prints` numbers for fingerprints. Weights seen for the first time, and
  // those that change from call to call, get none.
  PackedCopy(const PackedKey& key, size_t bytes, size_t prints);
  ~PackedCopy();
  PackedCopy(const PackedCopy&) = delete;
  PackedCopy& operator=(const PackedCopy&) = delete;

  FRNN_HOST_DEVICE bool filled() const { return filled_; }
  FRNN_HOST_DEVICE bool filling() const { return memory_ && !filled_; }
  void* memory() const;
  uint64_t* prints() const;

  // The weights are no longer those of the copy: forgets it. After that this call fills a new one, or has none.
  void replace();
  // What this call filled is right, and may be kept.
  void keep();
  // The kept copy was right.
  void confirm();

 private:
  PackedKey key_;
  size_t bytes_ = 0, prints_ = 0;
  std::shared_ptr<PackedMemory> memory_;
  bool filled_ = false;
};

// Bytes of all copies that are kept; the most that are (beyond it those unused for longest go), 0 for none; and away
// with all of them.
size_t packed_bytes_held();
size_t packed_bytes_limit();
void set_packed_bytes_limit(size_t bytes);
void clear_packed();

}  // namespace fused_rnn
