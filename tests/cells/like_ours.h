// The cells that are built in, as a user would write them.

struct Lstm {
  static constexpr int gates = 4;
  static constexpr int states = 1;
  template <class V>
  static void forward(const V* x, const V* r, V, const V* c_prev, V& h, V* c) {
    const V i = sigmoid(x[0] + r[0]);
    const V f = sigmoid(x[1] + r[1]);
    const V g = tanh(x[2] + r[2]);
    const V o = sigmoid(x[3] + r[3]);
    c[0] = f * c_prev[0] + i * g;
    h = o * tanh(c[0]);
  }
};

struct Gru {
  static constexpr int gates = 3;
  template <class V>
  static void forward(const V* x, const V* r, V h_prev, const V*, V& h, V*) {
    const V reset = sigmoid(x[0] + r[0]);
    const V update = sigmoid(x[1] + r[1]);
    const V n = tanh(x[2] + reset * r[2]);
    h = n + update * (h_prev - n);
  }
};

struct Rnn {
  static constexpr int gates = 1;
  template <class V>
  static void forward(const V* x, const V* r, V, const V*, V& h, V*) {
    h = relu(x[0] + r[0]);
  }
};

// With its backward step by hand.
struct LstmByHand {
  static constexpr int gates = 4;
  static constexpr int states = 1;
  static constexpr int saved = 4;
  template <class V>
  static void forward(const V* x, const V* r, V h_prev, const V* c_prev, V& h, V* c, V* saved) {
    for (int g = 0; g < 4; ++g) saved[g] = g == 2 ? tanh(x[g] + r[g]) : sigmoid(x[g] + r[g]);
    c[0] = saved[1] * c_prev[0] + saved[0] * saved[2];
    h = saved[3] * tanh(c[0]);
  }
  template <class V>
  static void backward(const V* saved, V, const V* c_prev, const V* c, V dh, const V* dc, V* dx, V*, V& dh_prev,
                       V* dc_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(c[0]);
    const V total = dc[0] + dh * o * (1 - tanh_c * tanh_c);
    dx[0] = total * g * i * (1 - i);
    dx[1] = total * c_prev[0] * f * (1 - f);
    dx[2] = total * i * (1 - g * g);
    dx[3] = dh * tanh_c * o * (1 - o);
    dh_prev = 0;
    dc_prev[0] = total * f;
  }
};
