// Runs what nvcc made of a kernel instead of what g++ made of it: an interpreter of PTX, one call for each CUDA thread.
//
// Arithmetic, addresses and branches are those of the PTX ISA; instructions that concern other threads go to the engine
// (engine.h), so that host execution's checks hold for them too. What this adds to host execution: that the inline PTX
// of csrc/cuda/device.h names its operands in the right order and place, and that nvcc's optimiser kept the kernel's
// meaning. Not modelled: subnormal results of .ftz, payloads of NaN, caches, the order of sums inside `mma`.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace fused_rnn {
namespace cuda_host {

class PtxThread;

struct PtxOperand {
  enum class Kind {
    none,
    slot,
    value,
    parameter
  } kind = Kind::none;  // parameter: an address in the kernel's arguments
  int slot = 0;         // of a register
  int64_t value = 0;    // or what is added to a register's, in an address
};

struct PtxInstruction {
  std::string name;
  std::vector<PtxOperand> operands;  // vectors and pairs one after the other
  int guard = -1;                    // slot of its predicate
  bool guard_negated = false;
  int target = -1;  // of a branch
  int line = 0;     // in the file
  const std::function<void(PtxThread&, const PtxInstruction&)>* execute = nullptr;
};

struct PtxKernel {
  std::vector<PtxInstruction> code;
  std::map<std::string, int> parameters;  // offsets
  int slots = 0;
};

class Ptx {
 public:
  explicit Ptx(const std::string& file);

  std::vector<std::string> kernels() const;
  // As one thread of a launch. `arguments`: the kernel's parameters, each aligned to its size. Throws Failure where the
  // program has an instruction that is not known here.
  void run(const std::string& kernel, const void* arguments) const;

  // Puts a further parameter of a kernel into memory.
  template <class T>
  static void append(std::vector<char>& memory, const T& argument) {
    const size_t at = (memory.size() + alignof(T) - 1) / alignof(T) * alignof(T);
    memory.resize(at + sizeof argument);
    memcpy(memory.data() + at, &argument, sizeof argument);
  }

 private:
  std::string file_;
  std::map<std::string, PtxKernel> kernels_;
};

// The file that the environment variable FRNN_PTX names.
const Ptx& translated();

// The mangled name of a function of this program.
std::string name_of(const void* function);

// What nvcc made of a kernel, in place of what g++ made of it; until the next one of the same type is asked for.
template <class... Arguments>
auto interpreted(void (*compiled)(Arguments...)) -> void (*)(Arguments...) {
  static std::string name;
  translated();
  name = name_of(reinterpret_cast<const void*>(compiled));
  return [](Arguments... arguments) {
    std::vector<char> memory;
    (Ptx::append(memory, arguments), ...);
    translated().run(name, memory.data());
  };
}

}  // namespace cuda_host
}  // namespace fused_rnn
