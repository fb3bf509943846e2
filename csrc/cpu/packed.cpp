#include "packed.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <random>
#include <unordered_map>
#include <vector>

#include "fingerprint.h"
#include "team.h"

namespace fused_rnn {

struct PackedMemory {
  PackedMemory(size_t bytes, size_t prints) : bytes(bytes), data(large_memory(bytes)), prints(prints) {}
  ~PackedMemory() { std::free(data); }
  PackedMemory(const PackedMemory&) = delete;
  PackedMemory& operator=(const PackedMemory&) = delete;

  const size_t bytes;
  void* const data;
  std::vector<uint64_t> prints;
};

namespace {

struct Hash {
  size_t operator()(const PackedKey& key) const {
    size_t h = size_t(key.format);
    for (const void* w : key.weights) h = h * 31 + size_t(w) / 64;
    for (int64_t n : key.sizes) h = h * 31 + size_t(n);
    return h;
  }
};

struct Entry {
  std::shared_ptr<PackedMemory> memory;  // null: these weights were seen, no more
  uint64_t used = 0;
  int changes = 0;  // calls in a row that found other weights
  int skip = 0;     // calls that do without a copy because of that
};

constexpr size_t default_limit = size_t(256) << 20;
constexpr size_t most_entries = 1024;
// Weights that always change are asked about again after so many calls at most, a power of two: it then costs little.
constexpr int most_changes = 7;

struct Cache {
  std::mutex mutex;
  std::unordered_map<PackedKey, Entry, Hash> entries;
  size_t held = 0, limit = default_limit;
  uint64_t clock = 0;

  void forget(Entry& entry) {
    if (!entry.memory) return;
    held -= entry.memory->bytes;
    entry.memory.reset();
  }

  // Makes room for `bytes` more.
  void evict(size_t bytes) {
    while (held > 0 && held + bytes > limit) forget(*oldest(true));
    while (entries.size() >= most_entries) {
      Entry* entry = oldest(false);
      forget(*entry);
      const auto it = std::find_if(entries.begin(), entries.end(), [&](auto& item) { return &item.second == entry; });
      entries.erase(it);
    }
  }

  Entry* oldest(bool with_memory) {
    Entry* found = nullptr;
    for (auto& [key, entry] : entries) {
      if (with_memory && !entry.memory) continue;
      if (!found || entry.used < found->used) found = &entry;
    }
    return found;
  }
};

// Never destroyed: calls of other threads may outlast the end of main().
Cache& cache() {
  static Cache* const instance = [] {
    static Cache* made = new Cache;
    // A child that is forked while another thread is in here could never enter.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return made;
  }();
  return *instance;
}

std::shared_ptr<PackedMemory> new_memory(size_t bytes, size_t prints) {
  try {
    auto memory = std::make_shared<PackedMemory>(bytes, prints);
    return memory->data ? memory : nullptr;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

}  // namespace

bool PackedKey::operator==(const PackedKey& other) const {
  return weights == other.weights && sizes == other.sizes && format == other.format;
}

const uint32_t* fingerprint_key() {
  static const std::vector<uint32_t> key = [] {
    std::random_device random;
    std::vector<uint32_t> words(fingerprint_key_words);
    for (uint32_t& word : words) word = random();
    return words;
  }();
  return key.data();
}

PackedCopy::PackedCopy(const PackedKey& key, size_t bytes, size_t prints) : key_(key), bytes_(bytes), prints_(prints) {
  Cache& c = cache();
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    if (bytes > c.limit) return;
    const auto found = c.entries.find(key);
    if (found == c.entries.end()) {
      c.evict(0);
      c.entries[key].used = ++c.clock;
      return;
    }
    Entry& entry = found->second;
    entry.used = ++c.clock;
    memory_ = entry.memory;
    filled_ = memory_ != nullptr;
    if (filled_) return;
    if (entry.skip > 0) {
      --entry.skip;
      return;
    }
  }
  memory_ = new_memory(bytes, prints);
}

PackedCopy::~PackedCopy() = default;

void* PackedCopy::memory() const { return memory_->data; }
uint64_t* PackedCopy::prints() const { return memory_->prints.data(); }

void PackedCopy::replace() {
  Cache& c = cache();
  std::shared_ptr<PackedMemory> mine = std::move(memory_);
  filled_ = false;
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    const auto found = c.entries.find(key_);
    if (found == c.entries.end()) return;
    Entry& entry = found->second;
    if (entry.memory == mine) c.forget(entry);
    entry.changes = std::min(entry.changes + 1, most_changes);
    if (entry.changes > 1) {
      entry.skip = 1 << entry.changes;
      return;
    }
  }
  // Nobody can find it any more: where no other call uses it, its pages serve again.
  memory_ = mine.use_count() == 1 ? std::move(mine) : new_memory(bytes_, prints_);
}

void PackedCopy::keep() {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  if (bytes_ > c.limit) return;
  c.forget(c.entries[key_]);  // another call's, filled at the same time
  c.evict(bytes_);
  Entry& entry = c.entries[key_];
  entry.memory = memory_;
  entry.used = ++c.clock;
  entry.skip = 0;
  c.held += bytes_;
}

void PackedCopy::confirm() {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.entries.find(key_);
  if (found != c.entries.end()) found->second.changes = 0;
}

size_t packed_bytes_held() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().held;
}

size_t packed_bytes_limit() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  return cache().limit;
}

void set_packed_bytes_limit(size_t bytes) {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.limit = bytes;
  c.evict(0);
}

void clear_packed() {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.entries.clear();
  c.held = 0;
}

}  // namespace fused_rnn
