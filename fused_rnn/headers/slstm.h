// Beck et al. 2024: c, the normaliser n and the stabiliser m are private states; f is a sigmoid.
struct SLSTM {
  static constexpr int gates = 4;  // z, i, f, o
  static constexpr int states = 3;
  template <class V>
  static void forward(const V* x, const V* r, V, const V* before, V& h, V* after) {
    const V z = tanh(x[0] + r[0]);
    const V i = x[1] + r[1];
    const V log_f = -softplus(-(x[2] + r[2])) + before[2];
    after[2] = select(before[1] <= 0, i, max(i, log_f));
    const V keep = exp(log_f - after[2]);
    const V add = exp(i - after[2]);
    after[0] = keep * before[0] + add * z;
    after[1] = keep * before[1] + add;
    h = sigmoid(x[3] + r[3]) * after[0] / after[1];
  }
};
