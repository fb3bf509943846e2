// Which instruction set runs. FRNN_ISA_<NAME> is defined by the build for every source that was compiled.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

// Programs of 64-bit Arm can do without the portable table: what NEON's needs is everywhere.
#if defined(FRNN_ISA_PORTABLE) || !defined(FRNN_ISA_NEON)
#define FRNN_PORTABLE_TABLE
#endif

namespace fused_rnn {

#if defined(FRNN_ISA_AVX512_AMX)
namespace isa_avx512_amx {
extern const KernelTable table;
}
#endif
#if defined(FRNN_ISA_AVX512_BF16)
namespace isa_avx512_bf16 {
extern const KernelTable table;
}
#endif
#if defined(FRNN_ISA_AVX512)
namespace isa_avx512 {
extern const KernelTable table;
}
#endif
#if defined(FRNN_ISA_AVX2)
namespace isa_avx2 {
extern const KernelTable table;
}
#endif
#if defined(FRNN_ISA_NEON_BF16)
namespace isa_neon_bf16 {
extern const KernelTable table;
}
#endif
#if defined(FRNN_ISA_NEON)
namespace isa_neon {
extern const KernelTable table;
}
#endif
#if defined(FRNN_PORTABLE_TABLE)
namespace isa_portable {
extern const KernelTable table;
}
#endif

namespace {

const KernelTable* const tables[] = {
#if defined(FRNN_ISA_AVX512_AMX)
    &isa_avx512_amx::table,
#endif
#if defined(FRNN_ISA_AVX512_BF16)
    &isa_avx512_bf16::table,
#endif
#if defined(FRNN_ISA_AVX512)
    &isa_avx512::table,
#endif
#if defined(FRNN_ISA_AVX2)
    &isa_avx2::table,
#endif
#if defined(FRNN_ISA_NEON_BF16)
    &isa_neon_bf16::table,
#endif
#if defined(FRNN_ISA_NEON)
    &isa_neon::table,
#endif
#if defined(FRNN_PORTABLE_TABLE)
    &isa_portable::table,
#endif
    nullptr,
};

#if defined(__x86_64__)
enum class Tiles { unknown, none, of_bfloat16, of_bytes_too };

// What the processor multiplies on tiles, if the system lets this process use them: it has to be asked, because their
// registers are 8 KiB more to be saved for every thread.
Tiles find_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return Tiles::none;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return Tiles::none;
  return (d & amx_int8) != 0 ? Tiles::of_bytes_too : Tiles::of_bfloat16;
#else
  return Tiles::none;
#endif
}

// Asked once, or by threads that come at the same time once each: the answer is the same.
Tiles tiles_here() {
  static std::atomic<Tiles> known{Tiles::unknown};
  Tiles tiles = known.load(std::memory_order_relaxed);
  if (tiles == Tiles::unknown) {
    tiles = find_tiles();
    known.store(tiles, std::memory_order_relaxed);
  }
  return tiles;
}
#endif

#if defined(__aarch64__)
// Whether the processor multiplies bfloat16.
bool has_bfloat16() {
#if defined(__linux__) && defined(HWCAP2_BF16)
  return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#else
  return false;
#endif
}
#endif

std::atomic<const KernelTable*> selected{nullptr};
std::atomic<bool> byte_products_allowed{true};

const KernelTable* first_choice() {
  if (const char* wanted = std::getenv("FUSED_RNN_ISA")) {
    // A name that cannot run here is reported by the Python package when it is imported.
    if (const KernelTable* t = find_kernels(wanted)) return t;
  }
  for (const KernelTable* const* t = tables;; ++t) {
    if (runs_here(**t)) return *t;
  }
}

}  // namespace

const KernelTable* const* compiled_kernels() { return tables; }

bool runs_here(const KernelTable& table) {
#if defined(__x86_64__)
  const char* isa = table.isa;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512_bf16;
  if (std::strcmp(isa, "avx512_amx") == 0) return avx512_bf16 && tiles_here() != Tiles::none;
#elif defined(__aarch64__)
  // Every 64-bit Arm processor that runs Linux has NEON.
  if (std::strcmp(table.isa, "neon") == 0) return true;
  if (std::strcmp(table.isa, "neon_bf16") == 0) return has_bfloat16();
#endif
  return std::strcmp(table.isa, "portable") == 0;
}

const KernelTable* find_kernels(const char* isa) {
  for (const KernelTable* const* t = tables; *t; ++t) {
    if (std::strcmp((*t)->isa, isa) == 0 && runs_here(**t)) return *t;
  }
  return nullptr;
}

const KernelTable& kernels() {
  const KernelTable* t = selected.load(std::memory_order_acquire);
  if (!t) {
    t = first_choice();
    selected.store(t, std::memory_order_release);
  }
  return *t;
}

#if defined(__x86_64__)
bool follows_streams() { return __builtin_cpu_is("amd"); }  // a look at what was found when the program began
#endif

bool multiplies_bytes(const char* isa) {
  if (!byte_products_allowed.load(std::memory_order_relaxed)) return false;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) return __builtin_cpu_supports("avx512vnni");
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned avx_vnni = 1u << 4;  // a name that not every compiler knows
  if (std::strcmp(isa, "avx2") == 0) return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx_vnni) != 0;
#elif defined(__linux__) && defined(HWCAP_ASIMDDP)
  if (std::strcmp(isa, "neon") == 0) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  (void)isa;
#endif
  return false;
}

void allow_byte_products(bool allowed) { byte_products_allowed.store(allowed, std::memory_order_relaxed); }

ByteTiles byte_tiles(const KernelTable& table) {
#if defined(__x86_64__)
  const bool wanted = table.byte_tiles && byte_products_allowed.load(std::memory_order_relaxed);
  return wanted && tiles_here() == Tiles::of_bytes_too ? table.byte_tiles : nullptr;
#else
  (void)table;
  return nullptr;
#endif
}

bool select_kernels(const char* isa) {
  const KernelTable* t = find_kernels(isa);
  if (t) selected.store(t, std::memory_order_release);
  return t != nullptr;
}

}  // namespace fused_rnn
