// csrc/cpu/dispatch.cpp on a processor and a system of the test's choosing.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <string>

namespace chosen {

// Names as /proc/cpuinfo has them, but for "avx512bf16" and "avx512vnni", as __builtin_cpu_supports does.
inline std::string features;
inline bool permitted = true;
inline int questions = 0;  // how often the system was asked

inline bool has(const char* name) {
  return (" " + features + " ").find(" " + std::string(name) + " ") != std::string::npos;
}

inline int cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = 0;
  if (leaf == 7 && subleaf == 0)
    *d = (has("amx_bf16") ? 1u << 22 : 0) | (has("amx_tile") ? 1u << 24 : 0) | (has("amx_int8") ? 1u << 25 : 0);
  if (leaf == 7 && subleaf == 1) *a = has("avx_vnni") ? 1u << 4 : 0;
  return 1;
}

inline long ask(long call, int request, int what) {
  ++questions;
  return call == SYS_arch_prctl && request == 0x1023 && what == 18 && permitted ? 0 : -1;
}

}  // namespace chosen

#define __get_cpuid_count(leaf, subleaf, a, b, c, d) chosen::cpuid(leaf, subleaf, a, b, c, d)
#define __builtin_cpu_supports(name) chosen::has(name)
#define syscall(call, request, what) chosen::ask(call, request, what)

#include "cpu/dispatch.cpp"

#undef __get_cpuid_count
#undef __builtin_cpu_supports
#undef syscall
