// tanh and sigmoid of a vector's lanes, as layers compute them. In: 0 tanh, 1 sigmoid; 0 float32, 1 float64; values.
// Out: as many values. Compiled with what csrc/cpu/isa_neon.cpp defines.
#pragma GCC diagnostic ignored "-Wignored-attributes"

#include "cpu/product.h"
#include "wire.h"

namespace fused_rnn {
namespace FRNN_ISA {

template <class A>
void run(bool is_tanh, const wire::Array& values) {
  using Values = Pack<typename Simd<A>::V, 1>;
  const int64_t count = values.bytes / int64_t(sizeof(A));
  A* at = static_cast<A*>(values.data);
  for (int64_t i = 0; i < count; i += Simd<A>::width) {
    const Values x{{Simd<A>::load_n(at + i, count - i)}};
    Simd<A>::store_n(at + i, (is_tanh ? tanh<Values>(x) : sigmoid<Values>(x)).v[0], count - i);
  }
}

}  // namespace FRNN_ISA
}  // namespace fused_rnn

int main() {
  const bool is_tanh = wire::read_integer() == 0, is_double = wire::read_integer() == 1;
  const wire::Array values = wire::read_array();
  if (is_double) {
    fused_rnn::FRNN_ISA::run<double>(is_tanh, values);
  } else {
    fused_rnn::FRNN_ISA::run<float>(is_tanh, values);
  }
  wire::write(values);
  return 0;
}
