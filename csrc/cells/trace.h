// What a custom cell's step is made of, written down: its header, whose functions are templates on the value V, is
// compiled once with V = Traced, and a program runs it and prints each operation as a line of JSON. fused_rnn/custom.py
// makes kernels and PyTorch formulas of that.
//
//   struct MyCell {
//     static constexpr int gates = 2;   // rows of weight_ih and weight_hh for each unit
//     static constexpr int states = 1;  // private states of a unit beside h, if any; one of an LSTM
//     template <class V>
//     static void forward(const V* x, const V* r, V h_prev, const V* states_prev, V& h, V* states);
//   };
//
// x[g]: of gate g, W_ih x + b_ih; r[g]: W_hh h + b_hh. Values are combined by + - * / among each other and with
// numbers, and by the functions below, which argument-dependent lookup finds. There are no branches on values, as every
// vector of units takes the same way: select(a < b, x, y) chooses.
//
// A cell that has its backward step by hand says how many values it keeps, `static constexpr int saved`, has
// `V* saved` as the last argument of forward, and
//
//     template <class V>
//     static void backward(const V* saved, V h_prev, const V* states_prev, const V* states, V dh, const V* dstates,
//                          V* dx, V* dr, V& dh_prev, V* dstates_prev);
//
// dx[g], dr[g]: gradients of x[g] and r[g], of which dr[g] counts only where forward uses r[g] otherwise than in
// x[g] + r[g]. states: those after the step, which are kept in any case. dh_prev: without what goes through W_hh.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>

namespace fused_rnn {

namespace trace {

inline int count = 0;

// Prints the operation and returns its number.
inline int record(const char* operation, int a = -1, int b = -1, int c = -1) {
  std::printf("[\"%s\"", operation);
  for (const int argument : {a, b, c}) {
    if (argument >= 0) std::printf(", %d", argument);
  }
  std::printf("]\n");
  return count++;
}

inline int input(const char* name, int index) {
  std::printf("[\"input\", \"%s\", %d]\n", name, index);
  return count++;
}

inline int constant(double value) {
  if (!(value == value) || value - value != 0) {
    std::fprintf(stderr, "a number in the cell's step is not finite\n");
    std::exit(3);
  }
  std::printf("[\"constant\", %.17g]\n", value);
  return count++;
}

}  // namespace trace

struct Condition {
  int id;
};

struct Traced {
  int id = -1;  // -1: nothing was assigned

  Traced() = default;
  Traced(double value) : id(trace::constant(value)) {}  // NOLINT: numbers are values
  static Traced of(int id) {
    Traced t;
    t.id = id;
    return t;
  }

  int read() const {
    if (id < 0) {
      std::fprintf(stderr, "a value in the cell's step is read before anything was assigned to it\n");
      std::exit(3);
    }
    return id;
  }

  Traced& operator+=(const Traced& b) { return *this = *this + b; }
  Traced& operator-=(const Traced& b) { return *this = *this - b; }
  Traced& operator*=(const Traced& b) { return *this = *this * b; }
  Traced& operator/=(const Traced& b) { return *this = *this / b; }

#define FRNN_TRACE_BINARY(function, name) \
  friend Traced function(const Traced& a, const Traced& b) { return of(trace::record(name, a.read(), b.read())); }
#define FRNN_TRACE_UNARY(function, name) \
  friend Traced function(const Traced& a) { return of(trace::record(name, a.read())); }
#define FRNN_TRACE_COMPARISON(op, name) \
  friend Condition operator op(const Traced& a, const Traced& b) { return {trace::record(name, a.read(), b.read())}; }
  FRNN_TRACE_BINARY(operator+, "add")
  FRNN_TRACE_BINARY(operator-, "sub")
  FRNN_TRACE_BINARY(operator*, "mul")
  FRNN_TRACE_BINARY(operator/, "div")
  FRNN_TRACE_BINARY(max, "max")
  FRNN_TRACE_BINARY(min, "min")
  FRNN_TRACE_UNARY(operator-, "neg")
  FRNN_TRACE_UNARY(tanh, "tanh")
  FRNN_TRACE_UNARY(sigmoid, "sigmoid")
  FRNN_TRACE_UNARY(exp, "exp")
  FRNN_TRACE_UNARY(log, "log")
  FRNN_TRACE_UNARY(softplus, "softplus")  // log(1 + e^x)
  FRNN_TRACE_UNARY(relu, "relu")
  FRNN_TRACE_UNARY(abs, "abs")
  FRNN_TRACE_COMPARISON(<, "less")
  FRNN_TRACE_COMPARISON(<=, "less_equal")
#undef FRNN_TRACE_BINARY
#undef FRNN_TRACE_UNARY
#undef FRNN_TRACE_COMPARISON
  friend Condition operator>(const Traced& a, const Traced& b) { return b < a; }
  friend Condition operator>=(const Traced& a, const Traced& b) { return b <= a; }
  friend Traced select(Condition condition, const Traced& a, const Traced& b) {
    return of(trace::record("select", condition.id, a.read(), b.read()));
  }
};

namespace trace {

template <class Cell, class = void>
struct States {
  static constexpr int count = 0;
};
template <class Cell>
struct States<Cell, std::void_t<decltype(Cell::states)>> {
  static constexpr int count = Cell::states;
};
template <class Cell, class = void>
struct Saved {
  static constexpr int count = 0;
};
template <class Cell>
struct Saved<Cell, std::void_t<decltype(Cell::saved)>> {
  static constexpr int count = Cell::saved;
};

inline void output(const char* name, int index, const Traced& value) {
  if (value.id < 0) {
    std::fprintf(stderr, "the cell's step assigns nothing to %s[%d]\n", name, index);
    std::exit(3);
  }
  std::printf("[\"output\", \"%s\", %d, %d]\n", name, index, value.id);
}

template <class Cell>
int run() {
  constexpr int gates = Cell::gates, states = States<Cell>::count, saved = Saved<Cell>::count;
  static_assert(gates >= 1 && gates <= 6, "a cell has 1 to 6 gates");
  static_assert(states >= 0 && states <= 4, "a cell has 0 to 4 private states");
  static_assert(saved >= 0 && saved <= 16, "a cell keeps 0 to 16 values");
  std::printf("[\"cell\", %d, %d, %d]\n", gates, states, saved);
  Traced x[gates], r[gates], before[states + 1], after[states + 1], kept[saved + 1], h;
  for (int g = 0; g < gates; ++g) {
    x[g].id = input("x", g);
    r[g].id = input("r", g);
  }
  Traced h_prev = Traced::of(input("h", 0));
  for (int i = 0; i < states; ++i) before[i].id = input("state", i);
  if constexpr (saved > 0) {
    Cell::template forward<Traced>(x, r, h_prev, before, h, after, kept);
  } else {
    Cell::template forward<Traced>(x, r, h_prev, before, h, after);
  }
  output("h", 0, h);
  for (int i = 0; i < states; ++i) output("state", i, after[i]);
  for (int i = 0; i < saved; ++i) output("saved", i, kept[i]);
  if constexpr (saved > 0) {
    Traced values[saved], dh = Traced::of(input("dh", 0)), dstates[states + 1], dx[gates], dr[gates], dh_prev;
    Traced dstates_prev[states + 1];
    for (int i = 0; i < saved; ++i) values[i].id = input("saved", i);
    for (int i = 0; i < states; ++i) dstates[i].id = input("dstate", i);
    Traced known[states + 1];
    for (int i = 0; i < states; ++i) known[i].id = input("after", i);
    Cell::template backward<Traced>(values, h_prev, before, known, dh, dstates, dx, dr, dh_prev, dstates_prev);
    for (int g = 0; g < gates; ++g) {
      output("dx", g, dx[g]);
      if (dr[g].id >= 0) output("dr", g, dr[g]);
    }
    if (dh_prev.id >= 0) output("dh_prev", 0, dh_prev);
    for (int i = 0; i < states; ++i) output("dstate_prev", i, dstates_prev[i]);
  }
  return 0;
}

}  // namespace trace
}  // namespace fused_rnn
