// gru_d.h
struct GruD {
  static constexpr int gates = 4;   // reset, update, new, decay
  static constexpr int states = 1;  // h of the paper, before it decays

  template <class V>
  static void forward(const V* x, const V* r, V h_prev, const V*, V& h, V* state) {
    const V reset = sigmoid(x[0] + r[0]);
    const V update = sigmoid(x[1] + r[1]);
    const V candidate = tanh(x[2] + reset * r[2]);
    state[0] = (1 - update) * h_prev + update * candidate;
    h = exp(-relu(x[3])) * state[0];
  }
};
