// minimal.h: the minimal gated unit of Zhou et al. 2016, with the gate after the product.
struct MinimalGatedUnit {
  static constexpr int gates = 2;

  template <class V>
  static void forward(const V* x, const V* r, V h_prev, const V*, V& h, V*) {
    const V f = sigmoid(x[0] + r[0]);
    const V n = tanh(x[1] + f * r[1]);
    h = (1 - f) * h_prev + f * n;
  }
};
