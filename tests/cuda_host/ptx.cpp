#include "ptx.h"

#include <dlfcn.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <type_traits>

#include "cuda/device.h"
#include "engine.h"

namespace fused_rnn {
namespace cuda_host {

using namespace fused_rnn::cuda;

// The window of a block's own shared memory; that of rank r of the cluster is (r + 1) << window_bits above it.
constexpr uint64_t window_begin = 1024, window_bits = 24;

// Registers of one CUDA thread; narrow values stand in the low bits, zeros above.
class PtxThread {
 public:
  PtxThread(const std::string& file, const PtxKernel& kernel, const void* arguments)
      : file(file.c_str()), arguments_(static_cast<const char*>(arguments)), slots_(size_t(kernel.slots)) {}

  template <class T>
  T get(const PtxInstruction& i, int operand) const {
    const uint64_t word = this->word(i.operands.at(size_t(operand)));
    if constexpr (std::is_same_v<T, bool>) return word & 1;  // a predicate's constant for true is -1
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
  template <class T>
  void set(const PtxInstruction& i, int operand, T value) {
    const PtxOperand& to = i.operands.at(size_t(operand));
    if (to.kind == PtxOperand::Kind::none) return;  // `_`
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    slots_.at(size_t(to.slot)) = word;
  }
  bool predicate(int slot) const { return slots_.at(size_t(slot)) & 1; }

  uint64_t address(const PtxInstruction& i, int operand) const { return get<uint64_t>(i, operand); }
  // Where an address of the window stands in this process.
  char* shared(uint64_t address) const { return shared_memory() + (address % (1 << window_bits)) - window_begin; }
  static uint64_t shared_address(const char* p) { return uint64_t(p - shared_memory()) + window_begin; }
  RemoteAddress remote(const PtxInstruction& i, int operand) const {
    const uint64_t a = uint32_t(address(i, operand));
    const int rank = a >> window_bits ? int(a >> window_bits) - 1 : cluster_rank();
    return remote_address(shared(a), rank, file, i.line);
  }

  const char* const file;

 private:
  uint64_t word(const PtxOperand& o) const {
    switch (o.kind) {
      case PtxOperand::Kind::slot: return slots_[size_t(o.slot)] + uint64_t(o.value);
      case PtxOperand::Kind::parameter: return reinterpret_cast<uint64_t>(arguments_) + uint64_t(o.value);
      default: return uint64_t(o.value);
    }
  }

  const char* const arguments_;
  std::vector<uint64_t> slots_;
};

namespace {

using Execute = std::function<void(PtxThread&, const PtxInstruction&)>;
using I = PtxInstruction;

template <class T>
constexpr int bits_of = int(sizeof(T)) * 8;

// --- Arithmetic

class Table {
 public:
  Table();
  const Execute* find(const std::string& name) const {
    const auto found = table_.find(name);
    return found == table_.end() ? nullptr : &found->second;
  }

 private:
  // d = f(a), d = f(a, b), d = f(a, b, c); D and the type of all sources.
  template <class D, class T, class F>
  void unary(const std::string& name, F f) {
    table_[name] = [f](PtxThread& t, const I& i) { t.set<D>(i, 0, D(f(t.get<T>(i, 1)))); };
  }
  template <class D, class T, class F>
  void binary(const std::string& name, F f) {
    table_[name] = [f](PtxThread& t, const I& i) { t.set<D>(i, 0, D(f(t.get<T>(i, 1), t.get<T>(i, 2)))); };
  }
  template <class D, class T, class F>
  void ternary(const std::string& name, F f) {
    table_[name] = [f](PtxThread& t, const I& i) {
      t.set<D>(i, 0, D(f(t.get<T>(i, 1), t.get<T>(i, 2), t.get<T>(i, 3))));
    };
  }
  template <class T>
  void comparisons(const std::string& type);
  template <class T, class Wide>
  void integers(const std::string& type);
  template <class T>
  void bits(const std::string& type);
  template <class T>
  void floats(const std::string& type);
  template <class D, class A>
  void convert(const std::string& name) {
    unary<D, A>("cvt." + name, [](A a) { return D(a); });
  }
  void single_instructions();
  void matrices();
  void others();

  std::map<std::string, Execute> table_;
};

template <class T>
void Table::comparisons(const std::string& type) {
  binary<bool, T>("setp.eq." + type, [](T a, T b) { return a == b; });
  binary<bool, T>("setp.ne." + type, [](T a, T b) { return a < b || a > b; });
  binary<bool, T>("setp.lt." + type, [](T a, T b) { return a < b; });
  binary<bool, T>("setp.le." + type, [](T a, T b) { return a <= b; });
  binary<bool, T>("setp.gt." + type, [](T a, T b) { return a > b; });
  binary<bool, T>("setp.ge." + type, [](T a, T b) { return a >= b; });
}

template <class T, class Wide>
void Table::integers(const std::string& type) {
  using U = std::make_unsigned_t<Wide>;  // wide enough that nothing overflows on the way
  comparisons<T>(type);
  binary<T, T>("add." + type, [](T a, T b) { return U(a) + U(b); });
  binary<T, T>("sub." + type, [](T a, T b) { return U(a) - U(b); });
  binary<T, T>("mul.lo." + type, [](T a, T b) { return U(a) * U(b); });
  ternary<T, T>("mad.lo." + type, [](T a, T b, T c) { return U(a) * U(b) + U(c); });
  binary<T, T>("div." + type, [](T a, T b) { return b == 0 ? T(-1) : a / b; });
  binary<T, T>("rem." + type, [](T a, T b) { return b == 0 ? a : a % b; });
  binary<T, T>("min." + type, [](T a, T b) { return a < b ? a : b; });
  binary<T, T>("max." + type, [](T a, T b) { return a > b ? a : b; });
  unary<T, T>("neg." + type, [](T a) { return U(0) - U(a); });
  if constexpr (sizeof(T) < sizeof(Wide)) {
    binary<Wide, T>("mul.wide." + type, [](T a, T b) { return Wide(a) * Wide(b); });
    binary<T, T>("mul.hi." + type, [](T a, T b) { return (Wide(a) * Wide(b)) >> bits_of<T>; });
  }
  table_["shr." + type] = [](PtxThread& t, const I& i) {
    const uint32_t n = t.get<uint32_t>(i, 2);
    const T a = t.get<T>(i, 1);
    t.set<T>(i, 0, T(n < bits_of<T> ? a >> n : a < 0 ? -1 : 0));
  };
}

template <class T>
void Table::bits(const std::string& type) {
  binary<T, T>("and." + type, [](T a, T b) { return a & b; });
  binary<T, T>("or." + type, [](T a, T b) { return a | b; });
  binary<T, T>("xor." + type, [](T a, T b) { return a ^ b; });
  if constexpr (!std::is_same_v<T, bool>) {
    unary<T, T>("not." + type, [](T a) { return T(~a); });
    table_["shl." + type] = [](PtxThread& t, const I& i) {
      const uint32_t n = t.get<uint32_t>(i, 2);
      t.set<T>(i, 0, T(n < bits_of<T> ? t.get<T>(i, 1) << n : 0));
    };
    binary<bool, T>("setp.eq." + type, [](T a, T b) { return a == b; });
    binary<bool, T>("setp.ne." + type, [](T a, T b) { return a != b; });
    // Bits [position, position + length) of b from a.
    table_["bfi." + type] = [](PtxThread& t, const I& i) {
      const uint32_t position = t.get<uint32_t>(i, 3) & 255, length = t.get<uint32_t>(i, 4) & 255;
      T b = t.get<T>(i, 2);
      for (uint32_t k = 0; k < length && position + k < uint32_t(bits_of<T>); ++k) {
        const T bit = T(t.get<T>(i, 1) >> k & 1);
        b = T((b & ~(T(1) << (position + k))) | bit << (position + k));
      }
      t.set<T>(i, 0, b);
    };
  }
}

template <class T>
void Table::floats(const std::string& type) {
  comparisons<T>(type);
  // True, too, where one is NaN.
  binary<bool, T>("setp.equ." + type, [](T a, T b) { return !(a < b || a > b); });
  binary<bool, T>("setp.neu." + type, [](T a, T b) { return !(a == b); });
  binary<bool, T>("setp.ltu." + type, [](T a, T b) { return !(a >= b); });
  binary<bool, T>("setp.leu." + type, [](T a, T b) { return !(a > b); });
  binary<bool, T>("setp.gtu." + type, [](T a, T b) { return !(a <= b); });
  binary<bool, T>("setp.geu." + type, [](T a, T b) { return !(a < b); });
  binary<bool, T>("setp.nan." + type, [](T a, T b) { return a != a || b != b; });
  for (const char* rounding : {"", ".rn"}) {
    binary<T, T>("add" + std::string(rounding) + "." + type, [](T a, T b) { return a + b; });
    binary<T, T>("sub" + std::string(rounding) + "." + type, [](T a, T b) { return a - b; });
    binary<T, T>("mul" + std::string(rounding) + "." + type, [](T a, T b) { return a * b; });
  }
  ternary<T, T>("fma.rn." + type, [](T a, T b, T c) { return std::fma(a, b, c); });
  unary<T, T>("neg." + type, [](T a) { return -a; });
  unary<T, T>("abs." + type, [](T a) { return std::fabs(a); });
  binary<T, T>("div.rn." + type, [](T a, T b) { return a / b; });
  unary<T, T>("rcp.rn." + type, [](T a) { return 1 / a; });
  unary<T, T>("sqrt.rn." + type, [](T a) { return std::sqrt(a); });
  // Of NaN and a number the number.
  binary<T, T>("min." + type, [](T a, T b) { return std::fmin(a, b); });
  binary<T, T>("max." + type, [](T a, T b) { return std::fmax(a, b); });
}

void Table::single_instructions() {
  for (const char* type : {"b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64", "pred"}) {
    const std::string name = type;
    const int bytes = name == "pred" ? 1 : (name[1] == '6' ? 8 : name[1] == '3' ? 4 : 2);
    const uint64_t mask = name == "pred" ? 1 : ~uint64_t(0) >> (64 - 8 * bytes);
    table_["mov." + name] = [mask](PtxThread& t, const I& i) {
      // Also b64 of two b32, and the reverse.
      if (i.operands.size() == 2) return t.set<uint64_t>(i, 0, t.get<uint64_t>(i, 1) & mask);
      if (i.target == 2) {
        const uint64_t value = t.get<uint64_t>(i, 2);
        const int half = mask >> 32 ? 32 : 16;
        t.set<uint64_t>(i, 0, value & (mask >> half));
        t.set<uint64_t>(i, 1, value >> half & (mask >> half));
      } else {
        const int half = mask >> 32 ? 32 : 16;
        t.set<uint64_t>(i, 0, t.get<uint64_t>(i, 1) | t.get<uint64_t>(i, 2) << half);
      }
    };
    table_["selp." + name] = [mask](PtxThread& t, const I& i) {
      t.set<uint64_t>(i, 0, t.get<uint64_t>(i, t.get<bool>(i, 3) ? 1 : 2) & mask);
    };
  }
  unary<bool, bool>("not.pred", [](bool a) { return !a; });
  // Four bytes of the eight of (b, a), chosen by four bits each; the highest of these bits copies the sign.
  ternary<uint32_t, uint32_t>("prmt.b32", [](uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t d = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t chosen = c >> (4 * k) & 15;
      uint32_t byte = uint32_t(both >> (8 * (chosen & 7))) & 255;
      if (chosen & 8) byte = byte & 128 ? 255 : 0;
      d |= byte << (8 * k);
    }
    return d;
  });
  unary<float, float>("ex2.approx.ftz.f32", [](float a) { return std::exp2(a); });
  unary<float, float>("rcp.approx.ftz.f32", [](float a) { return 1.0f / a; });
  binary<float, float>("div.approx.f32", [](float a, float b) { return a / b; });
  convert<int64_t, int32_t>("s64.s32");
  convert<uint64_t, uint32_t>("u64.u32");
  convert<uint32_t, uint64_t>("u32.u64");
  convert<uint32_t, uint16_t>("u32.u16");
  convert<uint64_t, uint16_t>("u64.u16");
  convert<uint16_t, uint32_t>("u16.u32");
  convert<uint16_t, uint64_t>("u16.u64");
  convert<int32_t, int16_t>("s32.s16");
  convert<double, float>("f64.f32");
  convert<float, double>("rn.f32.f64");
  convert<float, int32_t>("rn.f32.s32");
  convert<float, uint32_t>("rn.f32.u32");
  convert<float, int64_t>("rn.f32.s64");
  convert<double, int64_t>("rn.f64.s64");
  unary<uint16_t, float>("cvt.rn.bf16.f32", [](float a) { return narrow<BFloat16>(a).bits; });
  unary<uint16_t, float>("cvt.rn.f16.f32", [](float a) { return narrow<Half>(a).bits; });
  unary<float, uint16_t>("cvt.f32.f16", [](uint16_t a) { return widen(Half{a}); });
  // The first source goes to the upper half.
  binary<uint32_t, float>("cvt.rn.bf16x2.f32", [](float a, float b) {
    return uint32_t(narrow<BFloat16>(a).bits) << 16 | narrow<BFloat16>(b).bits;
  });
  binary<uint32_t, float>("cvt.rn.f16x2.f32",
                          [](float a, float b) { return uint32_t(narrow<Half>(a).bits) << 16 | narrow<Half>(b).bits; });
  unary<uint32_t, float>("cvt.rna.tf32.f32", [](float a) { return to_tf32(a); });
  unary<uint64_t, uint64_t>("cvta.to.global.u64", [](uint64_t a) { return a; });
  unary<uint64_t, uint64_t>("cvta.global.u64", [](uint64_t a) { return a; });
  table_["cvta.shared.u64"] = [](PtxThread& t, const I& i) { t.set<char*>(i, 0, t.shared(t.get<uint64_t>(i, 1))); };
  table_["cvta.to.shared.u64"] = [](PtxThread& t, const I& i) {
    t.set<uint64_t>(i, 0, PtxThread::shared_address(t.get<char*>(i, 1)));
  };
}

// --- What concerns other threads

template <class T>
void multiply_fragments(PtxThread& t, const I& i) {
  // d, a, b, c: 4, 4, 2 and 4 registers.
  float d[4];
  uint32_t a[4], b[2];
  for (int k = 0; k < 4; ++k) {
    d[k] = t.get<float>(i, 10 + k);
    a[k] = t.get<uint32_t>(i, 4 + k);
  }
  for (int k = 0; k < 2; ++k) b[k] = t.get<uint32_t>(i, 8 + k);
  if constexpr (std::is_same_v<T, float>) {
    multiply_add_tf32(d, a, b, t.file, i.line);
  } else {
    multiply_add<T>(d, a, b, t.file, i.line);
  }
  for (int k = 0; k < 4; ++k) t.set<float>(i, k, d[k]);
}

template <bool transposed>
void load_fragments(PtxThread& t, const I& i) {
  uint32_t r[4];
  const char* row = t.shared(t.address(i, 4));
  if (transposed) {
    load_matrices_transposed(r, row, t.file, i.line);
  } else {
    load_matrices(r, row, t.file, i.line);
  }
  for (int k = 0; k < 4; ++k) t.set<uint32_t>(i, k, r[k]);
}

void Table::matrices() {
  table_["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = multiply_fragments<BFloat16>;
  table_["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = multiply_fragments<Half>;
  table_["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = multiply_fragments<float>;
  table_["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = load_fragments<false>;
  table_["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = load_fragments<true>;
}

template <int words>
struct alignas(4 * words) Words {
  uint32_t w[words];
};

template <int words>
Words<words> words_of(PtxThread& t, const I& i, int first) {
  Words<words> value;
  for (int k = 0; k < words; ++k) value.w[k] = t.get<uint32_t>(i, first + k);
  return value;
}

template <int words>
void store_async_words(PtxThread& t, const I& i) {
  store_async(t.remote(i, 0), words_of<words>(t, i, 1), t.remote(i, 1 + words), t.file, i.line);
}
template <int words>
void store_remote_words(PtxThread& t, const I& i) {
  store_remote(t.remote(i, 0), words_of<words>(t, i, 1), t.file, i.line);
}

Mbarrier* mbarrier(PtxThread& t, const I& i, int operand) {
  return reinterpret_cast<Mbarrier*>(t.shared(t.address(i, operand)));
}

template <class Source>
Execute shuffle_lanes(Source source) {
  return [source](PtxThread& t, const I& i) {
    // d, p, a, b, c, mask
    if (t.get<uint32_t>(i, 5) != 0xffffffffu) throw Failure("a shuffle of a part of the warp");
    const uint32_t clamp = t.get<uint32_t>(i, 4), value = t.get<uint32_t>(i, 2);
    const int from = source(lane_index(), int(t.get<uint32_t>(i, 3)));
    const bool inside = from >= 0 && from < warp_size;
    if (clamp != 31) throw Failure("a shuffle within parts of the warp");
    const uint64_t word = cuda::detail::shuffle_word(value, inside ? from : lane_index(), t.file, i.line);
    t.set<uint32_t>(i, 0, uint32_t(word));
    t.set<bool>(i, 1, inside);
  };
}

void Table::others() {
  table_["bar.sync"] = [](PtxThread& t, const I& i) { sync_threads(t.file, i.line); };
  table_["bar.warp.sync"] = [](PtxThread& t, const I& i) { sync_warp(t.file, i.line); };
  table_["barrier.sync"] = [](PtxThread& t, const I& i) {
    named_barrier(t.get<int>(i, 0), t.get<int>(i, 1), t.file, i.line);
  };
  table_["barrier.arrive"] = [](PtxThread& t, const I& i) {
    named_barrier_arrive(t.get<int>(i, 0), t.get<int>(i, 1), t.file, i.line);
  };
  table_["shfl.sync.bfly.b32"] = shuffle_lanes([](int lane, int b) { return lane ^ b; });
  table_["shfl.sync.idx.b32"] = shuffle_lanes([](int, int b) { return b & 31; });
  table_["shfl.sync.down.b32"] = shuffle_lanes([](int lane, int b) { return lane + b; });
  table_["vote.sync.any.pred"] = [](PtxThread& t, const I& i) {
    t.set<bool>(i, 0, any_in_warp(t.get<bool>(i, 1), t.file, i.line));
  };

  table_["cp.async.cg.shared.global"] = [](PtxThread& t, const I& i) {
    if (t.get<int>(i, 2) != 16) throw Failure("cp.async.cg copies 16 bytes");
    copy_async_16(t.shared(t.address(i, 0)), t.get<const void*>(i, 1), t.file, i.line);
  };
  table_["cp.async.commit_group"] = [](PtxThread&, const I&) { copy_async_commit(); };
  table_["cp.async.wait_group"] = [](PtxThread& t, const I& i) {
    cuda::detail::copy_async_wait(t.get<int>(i, 0), t.file, i.line);
  };
  table_["ld.acquire.gpu.global.u32"] = [](PtxThread& t, const I& i) {
    t.set<uint32_t>(i, 0, load_acquire(t.get<const uint32_t*>(i, 1), t.file, i.line));
  };
  table_["st.release.gpu.global.u32"] = [](PtxThread& t, const I& i) {
    store_release(t.get<uint32_t*>(i, 0), t.get<uint32_t>(i, 1), t.file, i.line);
  };
  table_["red.release.gpu.global.add.u32"] = [](PtxThread& t, const I& i) {
    add_release(t.get<uint32_t*>(i, 0), t.get<uint32_t>(i, 1), t.file, i.line);
  };
  table_["prefetch.global.L2"] = [](PtxThread&, const I&) {};
  table_["setmaxnreg.inc.sync.aligned.u32"] = table_["setmaxnreg.dec.sync.aligned.u32"] = [](PtxThread& t, const I& i) {
    cuda::detail::set_registers(t.get<int>(i, 0), t.file, i.line);
  };

  table_["barrier.cluster.arrive.release.aligned"] = [](PtxThread& t, const I& i) { cluster_arrive(t.file, i.line); };
  table_["barrier.cluster.wait.acquire.aligned"] = [](PtxThread& t, const I& i) { cluster_wait(t.file, i.line); };
  table_["mapa.shared::cluster.u32"] = [](PtxThread& t, const I& i) {
    const uint32_t a = t.get<uint32_t>(i, 1) & ((1u << window_bits) - 1);
    t.set<uint32_t>(i, 0, a | (t.get<uint32_t>(i, 2) + 1) << window_bits);
  };
  table_["mapa.u64"] = [](PtxThread& t, const I& i) {
    t.set<char*>(i, 0, map_shared(t.get<char*>(i, 1), t.get<int>(i, 2), t.file, i.line));
  };
  table_["st.shared::cluster.b32"] = store_remote_words<1>;
  table_["st.shared::cluster.v2.b32"] = store_remote_words<2>;
  table_["st.shared::cluster.v4.b32"] = store_remote_words<4>;
  table_["st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32"] = store_async_words<1>;
  table_["st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32"] = store_async_words<2>;
  table_["st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"] = store_async_words<4>;
  table_["mbarrier.init.shared::cta.b64"] = [](PtxThread& t, const I& i) {
    mbarrier_init(mbarrier(t, i, 0), t.get<int>(i, 1), t.file, i.line);
  };
  table_["fence.mbarrier_init.release.cluster"] = [](PtxThread& t, const I& i) { fence_mbarrier_init(t.file, i.line); };
  table_["mbarrier.arrive.shared::cta.b64"] = [](PtxThread& t, const I& i) {
    mbarrier_arrive(mbarrier(t, i, 1), t.file, i.line);
  };
  table_["mbarrier.arrive.expect_tx.shared::cta.b64"] = [](PtxThread& t, const I& i) {
    mbarrier_arrive_expect(mbarrier(t, i, 1), t.get<int>(i, 2), t.file, i.line);
  };
  for (const char* order : {"release", "relaxed"}) {
    table_[std::string("mbarrier.arrive.") + order + ".cluster.shared::cluster.b64"] = [](PtxThread& t, const I& i) {
      mbarrier_arrive_remote(t.remote(i, 1), t.file, i.line);
    };
  }
  for (const char* order : {"acquire", "relaxed"}) {
    table_[std::string("mbarrier.try_wait.parity.") + order + ".cluster.shared::cta.b64"] = [](PtxThread& t,
                                                                                               const I& i) {
      t.set<bool>(i, 0, mbarrier_try_wait(mbarrier(t, i, 1), t.get<int>(i, 2), t.file, i.line));
    };
  }
  // What the instructions above do here is ordered without them.
  table_["fence.acquire.sync_restrict::shared::cluster.cluster"] = [](PtxThread&, const I&) {};
  table_["fence.release.sync_restrict::shared::cta.cluster"] = [](PtxThread&, const I&) {};
}

Table::Table() {
  integers<int16_t, int32_t>("s16");
  integers<uint16_t, uint32_t>("u16");
  integers<int32_t, int64_t>("s32");
  integers<uint32_t, uint64_t>("u32");
  integers<int64_t, int64_t>("s64");
  integers<uint64_t, uint64_t>("u64");
  bits<uint16_t>("b16");
  bits<uint32_t>("b32");
  bits<uint64_t>("b64");
  bits<bool>("pred");
  floats<float>("f32");
  floats<double>("f64");
  single_instructions();
  matrices();
  others();
}

// ld and st of the generic, global, parameter and own shared space: the space, hints, a vector, a type. Alignment
// is that of the whole vector.
bool is_plain_access(const std::vector<std::string>& parts) {
  if (parts[0] != "ld" && parts[0] != "st") return false;
  for (size_t k = 1; k + 1 < parts.size(); ++k) {
    bool known = false;
    for (const char* part : {"global", "shared", "param", "volatile", "cg", "cs", "nc", "v2", "v4"})
      known |= parts[k] == part;
    if (!known) return false;
  }
  return true;
}

Execute plain_access(const std::vector<std::string>& parts) {
  const std::string& type = parts.back();
  const int bytes = std::stoi(type.substr(1)) / 8;
  int count = 1;
  bool shared = false;
  for (const std::string& part : parts) {
    if (part == "v2") count = 2;
    if (part == "v4") count = 4;
    if (part == "shared") shared = true;
  }
  const bool load = parts[0] == "ld", sign = type[0] == 's';
  return [=](PtxThread& t, const I& i) {
    const uint64_t address = t.address(i, load ? count : 0);
    char* const p = shared ? t.shared(address) : reinterpret_cast<char*>(address);
    if (shared) {
      cuda::detail::check_shared(p, size_t(bytes * count), load ? "ld" : "st", t.file, i.line);
    } else {
      cuda::detail::check_aligned(p, size_t(bytes * count), load ? "ld" : "st", t.file, i.line);
    }
    for (int k = 0; k < count; ++k) {
      uint64_t word = 0;
      if (load) {
        memcpy(&word, p + k * bytes, size_t(bytes));
        if (sign && bytes < 8 && word >> (8 * bytes - 1)) word |= ~uint64_t(0) << (8 * bytes);
        t.set<uint64_t>(i, k, word);
      } else {
        word = t.get<uint64_t>(i, 1 + k);
        memcpy(p + k * bytes, &word, size_t(bytes));
      }
    }
  };
}

const Execute* find(const std::string& name) {
  static const Table table;
  static std::map<std::string, Execute> accesses;
  if (const Execute* found = table.find(name)) return found;
  std::vector<std::string> parts;
  std::stringstream stream(name);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  if (!is_plain_access(parts)) return nullptr;
  auto& access = accesses[name];
  if (!access) access = plain_access(parts);
  return &access;
}

// --- Reading

bool is_name(char c) { return isalnum(c) || c == '_' || c == '$' || c == '%' || c == '.'; }

class Reader {
 public:
  explicit Reader(const std::string& file) : file_(file) {
    std::ifstream in(file);
    if (!in) throw Failure(file + ": no such file");
    std::stringstream text;
    text << in.rdbuf();
    text_ = text.str();
  }

  std::map<std::string, PtxKernel> read() {
    std::map<std::string, PtxKernel> kernels;
    while (!at_end()) {
      const std::string word = next_word();
      if (word == ".entry") {
        const std::string name = next_word();
        kernels[name] = read_kernel();
      }
    }
    return kernels;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Failure(file_ + ":" + std::to_string(line_) + ": " + what);
  }
  void advance() { line_ += text_[at_++] == '\n'; }
  void skip_space() {
    while (at_ < text_.size()) {
      if (text_.compare(at_, 2, "//") == 0) {
        while (at_ < text_.size() && text_[at_] != '\n') advance();
      } else if (isspace(text_[at_])) {
        advance();
      } else {
        return;
      }
    }
  }
  bool at_end() {
    skip_space();
    return at_ >= text_.size();
  }
  char peek() {
    skip_space();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    advance();
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(std::string("expected ") + c);
  }
  // A name with its dots and colons (but the one of a label), or one other character.
  std::string next_word() {
    skip_space();
    std::string word;
    while (at_ < text_.size()) {
      if (is_name(text_[at_])) {
        word += text_[at_];
        advance();
      } else if (text_.compare(at_, 2, "::") == 0) {
        word += "::";
        advance();
        advance();
      } else {
        break;
      }
    }
    if (word.empty() && at_ < text_.size()) {
      word = text_[at_];
      advance();
    }
    return word;
  }
  void skip_to(char c) {
    while (peek() != c) next_word();
    advance();
  }

  int slot_of(const std::string& name) {
    const auto [found, added] = slots_.insert({name, int(slots_.size())});
    return found->second;
  }

  PtxKernel read_kernel() {
    PtxKernel kernel;
    slots_.clear();
    labels_.clear();
    branches_.clear();
    kernel_ = &kernel;
    for (const char* name : {"%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
                             "%nctaid.z", "%cluster_ctarank", "%cluster_nctarank", "%laneid"})
      slot_of(name);
    if (take('(')) read_parameters();
    skip_to('{');
    for (int depth = 1; depth > 0;) {
      if (take('{')) {
        ++depth;
      } else if (take('}')) {
        --depth;
      } else {
        read_statement();
      }
    }
    for (const auto& [instruction, label] : branches_) {
      if (!labels_.count(label)) fail("no label " + label);
      kernel.code[size_t(instruction)].target = labels_[label];
    }
    kernel.slots = int(slots_.size());
    return kernel;
  }

  // .param [.align n] .type name[size]: each at a multiple of its alignment.
  void read_parameters() {
    int offset = 0;
    while (!take(')')) {
      int alignment = 0, bytes = 0;
      std::string name;
      while (peek() != ',' && peek() != ')') {
        const std::string word = next_word();
        if (word == ".align") {
          alignment = std::stoi(next_word());
        } else if (word == "[") {
          bytes = std::stoi(next_word());
          expect(']');
        } else if (word[0] == '.' && isdigit(word[2])) {
          bytes = std::stoi(word.substr(2)) / 8;
        } else if (word[0] != '.') {
          name = word;
        }
      }
      if (alignment == 0) alignment = bytes;
      offset = (offset + alignment - 1) / alignment * alignment;
      kernel_->parameters[name] = offset;
      offset += bytes;
      take(',');
    }
  }

  void read_statement() {
    PtxInstruction i;
    if (take('@')) {
      i.guard_negated = take('!');
      i.guard = slot_of(next_word());
    }
    skip_space();
    i.line = line_;
    i.name = next_word();
    if (i.name[0] == '.') return skip_to(';');  // registers, pragmas
    if (take(':')) {
      labels_[i.name] = int(kernel_->code.size());
      return;
    }
    if (i.name == "bra" || i.name == "bra.uni") {
      branches_.push_back({int(kernel_->code.size()), next_word()});
      expect(';');
    } else {
      while (!take(';')) read_operand(i);
      if (i.name != "ret") i.execute = find(i.name);
      if (!i.execute && i.name != "ret") fail("an instruction that this interpreter does not know: " + i.name);
    }
    kernel_->code.push_back(std::move(i));
  }

  void read_operand(PtxInstruction& i) {
    if (take('{')) {
      int count = 0;
      for (; !take('}'); ++count) read_value(i);
      if (i.operands.size() == size_t(count) && i.name.compare(0, 4, "mov.") == 0) i.target = count;
    } else if (take('[')) {
      read_value(i);
      if (take('+')) {
        const int sign = take('-') ? -1 : 1;
        i.operands.back().value += sign * std::stoll(next_word());
      }
      expect(']');
    } else {
      read_value(i);
    }
    take(',');
  }

  void read_value(PtxInstruction& i) {
    PtxOperand operand;
    const bool negative = take('-');
    const std::string word = next_word();
    if (word == "_") {
    } else if (word.compare(0, 2, "0f") == 0 || word.compare(0, 2, "0d") == 0) {
      operand.kind = PtxOperand::Kind::value;
      operand.value = int64_t(std::stoull(word.substr(2), nullptr, 16));
    } else if (isdigit(word[0])) {
      operand.kind = PtxOperand::Kind::value;
      operand.value = int64_t(std::stoull(word, nullptr, 0)) * (negative ? -1 : 1);
    } else if (kernel_->parameters.count(word)) {
      operand.kind = PtxOperand::Kind::parameter;
      operand.value = kernel_->parameters[word];
    } else if (word.find("frnn_shared_memory") != std::string::npos) {
      operand.kind = PtxOperand::Kind::value;
      operand.value = int64_t(window_begin);
    } else {
      operand.kind = PtxOperand::Kind::slot;
      operand.slot = slot_of(word);
    }
    i.operands.push_back(operand);
    if (take('|') || take(',')) {
    }
  }

  const std::string file_;
  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  PtxKernel* kernel_ = nullptr;
  std::map<std::string, int> slots_, labels_;
  std::vector<std::pair<int, std::string>> branches_;
};

}  // namespace

const Ptx& translated() {
  const char* file = getenv("FRNN_PTX");
  if (!file) throw Failure("the environment variable FRNN_PTX names no file");
  static const Ptx program(file);
  return program;
}

std::string name_of(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info) || !info.dli_sname) throw Failure("a function without a name (is -rdynamic missing?)");
  return info.dli_sname;
}

Ptx::Ptx(const std::string& file) : file_(file), kernels_(Reader(file).read()) {}

std::vector<std::string> Ptx::kernels() const {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kernels_) names.push_back(name);
  return names;
}

void Ptx::run(const std::string& name, const void* arguments) const {
  const PtxKernel& kernel = kernels_.at(name);
  PtxThread thread(file_, kernel, arguments);
  // In the order in which the reader numbered them.
  PtxInstruction special;
  const int values[] = {thread_index(), block_size(), block_x(),      block_y(),      block_z(),   grid_x(),
                        grid_y(),       grid_z(),     cluster_rank(), cluster_size(), lane_index()};
  for (int k = 0; k < 11; ++k) {
    special.operands = {{PtxOperand::Kind::slot, k, 0}};
    thread.set<int>(special, 0, values[k]);
  }
  for (size_t at = 0; at < kernel.code.size();) {
    const PtxInstruction& i = kernel.code[at++];
    if (i.guard >= 0 && thread.predicate(i.guard) == i.guard_negated) continue;
    if (i.execute) {
      (*i.execute)(thread, i);
    } else if (i.name == "ret") {
      return;
    } else {
      at = size_t(i.target);
    }
  }
}

}  // namespace cuda_host
}  // namespace fused_rnn
