// Cells that are not built in.

// Two gates of which x and r are apart, two of which r or x is not used; h before the step is.
struct Apart {
  static constexpr int gates = 4;
  template <class V>
  static void forward(const V* x, const V* r, V h_prev, const V*, V& h, V*) {
    const V z = sigmoid(x[0] + r[0]);
    V n = tanh(x[1]) - r[1];
    n *= 0.5;
    h = z * h_prev + (1 - z) * n + 0.25 * x[2] * h_prev - r[3] / (2 + abs(r[3]));
  }
};

// Everything that a formula may have.
struct AllFunctions {
  static constexpr int gates = 6;
  static constexpr int states = 2;
  template <class V>
  static void forward(const V* x, const V* r, V h_prev, const V* before, V& h, V* after) {
    const V a = exp(min(x[0] + r[0], 1.0));
    const V b = log(1.5 + abs(x[1] + r[1]));
    const V c = softplus(x[2] + r[2]);
    const V d = relu(x[3] + r[3]);
    const V e = select(x[4] + r[4] > 0.25, a, b / (1 + c));
    V f = max(x[5] + r[5], -0.5);
    f -= 0.125;
    f /= 3;
    after[0] = 0.5 * before[0] + tanh(e - d);
    after[1] = select(after[0] < before[1], after[0], 0.75 * before[1] + f);
    h = sigmoid(after[1] * c) + 0.25 * h_prev - -before[0];
  }
};

// One function each, to see how exact it is.
struct Functions {
  static constexpr int gates = 3;
  static constexpr int states = 2;
  template <class V>
  static void forward(const V* x, const V*, V, const V*, V& h, V* states) {
    h = exp(x[0]);
    states[0] = log(x[1]);
    states[1] = softplus(x[2]);
  }
};

// The derivative of a constant is none.
struct Constant {
  static constexpr int gates = 1;
  template <class V>
  static void forward(const V*, const V*, V, const V*, V& h, V*) {
    h = 0.5;
  }
};
