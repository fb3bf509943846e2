// How a thread computes with numbers below the smallest normal one.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn {

// While one lives, its thread takes denormal numbers, those below the smallest normal one, for zero: as operands, and
// as results. Processors compute with them in microcode, tens of times more slowly, and a sequence that carries a state
// or a gradient which fades away meets them in every step. Afterwards the thread has the mode it had. float16's
// subnormal numbers are normal ones of float32, and conversions between the two keep them in this mode too.
class DenormalsAreZero {
 public:
  DenormalsAreZero() : before_(mode()) {
    if ((before_ | bits) != before_) set_mode(before_ | bits);
  }
  ~DenormalsAreZero() {
    if ((before_ | bits) != before_) set_mode(before_);
  }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode bits = 0x8000u | 0x0040u;  // of MXCSR: results are flushed, and operands
  static Mode mode() { return _mm_getcsr(); }
  static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode bits = Mode(1) << 24;  // FZ of FPCR
  static Mode mode() {
    Mode mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) { __asm__ __volatile__("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = unsigned;
  static constexpr Mode bits = 0;
  static Mode mode() { return 0; }
  static void set_mode(Mode) {}
#endif
  const Mode before_;
};

}  // namespace fused_rnn
