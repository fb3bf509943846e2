// One case of a persistent kernel: made-up numbers, the kernel on the CPU under the plan that csrc/cuda/plan.cpp makes
// for a made-up GPU, and the same in float64, step by step.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda/persistent.cuh"
#include "engine.h"

namespace fused_rnn {
namespace cuda_host {

using namespace fused_rnn::cuda;

// Arguments of the form name=value.
class Case {
 public:
  Case(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t at = argument.find('=');
      values_[argument.substr(0, at)] = at == std::string::npos ? "1" : argument.substr(at + 1);
    }
  }
  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : found->second;
  }
  int number(const std::string& name, int otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : atoi(found->second.c_str());
  }

 private:
  std::map<std::string, std::string> values_;
};

// Memory of exactly this size that nobody has written yet: NaN as float, bfloat16 and float16.
template <class T>
std::vector<T> unwritten(int64_t count) {
  std::vector<T> v(static_cast<size_t>(count));
  if (count) memset(static_cast<void*>(v.data()), 0xff, v.size() * sizeof(T));
  return v;
}

template <class S>
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  std::vector<S> operator()(int64_t count, double scale) {
    std::vector<S> v(static_cast<size_t>(count));
    std::uniform_real_distribution<double> number(-scale, scale);
    for (S& x : v) x = narrow<S>(float(number(engine_)));
    return v;
  }
  int below(int n) { return int(engine_() % unsigned(n)); }

 private:
  std::mt19937 engine_;
};

// Of dropout with p = 1/2.
template <class S>
std::vector<S> dropout_factors(int64_t count, int seed) {
  std::mt19937 engine(unsigned(seed) + 5);
  std::vector<S> v(static_cast<size_t>(count));
  for (S& x : v) x = narrow<S>(engine() % 2 ? 2.0f : 0.0f);
  return v;
}

template <class S>
double as_double(S x) {
  return double(widen(x));
}

// As the product of this plan sees a number.
inline double product_input(Multiply multiply, double x) {
  if (multiply != Multiply::tf32) return x;
  const uint32_t bits = to_tf32(float(x));
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Options of one direction: argument `options` with any of the letters
//   r (resets, half of the steps marked), a (what rows begin anew from), d (factors of h before W_hh), z, c (bits of
//   zoneout, of h and of c), m (zoneout of all units to the extent of a rate), k (a clip of c), g (a clip of what goes
//   back to h), t (gradients that end at every second step)
template <class S>
struct DrawnOptions {
  std::vector<uint8_t> zoneout, zoneout_cell;
  std::vector<S> reset_h, reset_c, dropout;
  std::vector<float> grad_reset_h, grad_reset_c;
  PersistentOptions options;

  void draw(const std::string& letters, bool has_cell, int64_t rows, int64_t B, int64_t H, int seed) {
    const auto has = [&](char letter) { return letters.find(letter) != std::string::npos; };
    std::mt19937 engine(unsigned(seed) + 23);
    Random<S> random(unsigned(seed) + 24);
    const auto bits = [&](std::vector<uint8_t>& of) {
      of.resize(size_t(rows * ((H + 7) / 8)));
      for (uint8_t& byte : of) byte = uint8_t(engine());
      return of.data();
    };
    options.any = !letters.empty();
    if (has('z')) options.zoneout = bits(zoneout);
    if (has('c') && has_cell) options.zoneout_cell = bits(zoneout_cell);
    if (has('m')) options.rate = 0.25f;
    if (has('m') && has_cell) options.cell_rate = 0.125f;
    if (has('a')) {
      options.reset_h = (reset_h = random(B * H, 1)).data();
      if (has_cell) options.reset_c = (reset_c = random(B * H, 1)).data();
    }
    if (has('d')) options.dropout = (dropout = dropout_factors<S>(B * H, seed)).data();
    if (has('k') && has_cell) options.cell_clip = 0.375f;
    if (has('g')) options.grad_clip = 0.25f;
    if (has('t')) options.bptt_steps = 2;
  }
  void want_gradients(bool has_cell, int64_t states) {
    options.grad_reset_h = (grad_reset_h = std::vector<float>(size_t(states), 0.0f)).data();
    if (has_cell) options.grad_reset_c = (grad_reset_c = std::vector<float>(size_t(states), 0.0f)).data();
  }

  // How much of a unit's old h, or c, is kept.
  double keeps_h(int64_t row, int64_t unit, int64_t H) const { return keeps(zoneout, options.rate, row, unit, H); }
  double keeps_c(int64_t row, int64_t unit, int64_t H) const {
    return keeps(zoneout_cell, options.cell_rate, row, unit, H);
  }
  double factor(int64_t state) const { return dropout.empty() ? 1 : double(widen(dropout[size_t(state)])); }
  double anew_h(int64_t state) const { return reset_h.empty() ? 0 : double(widen(reset_h[size_t(state)])); }
  double anew_c(int64_t state) const { return reset_c.empty() ? 0 : double(widen(reset_c[size_t(state)])); }

 private:
  static double keeps(const std::vector<uint8_t>& bits, double rate, int64_t row, int64_t unit, int64_t H) {
    if (bits.empty()) return rate;
    return bits[size_t(row * ((H + 7) / 8) + unit / 8)] >> (unit % 8) & 1;
  }
};

// Argument `without`: letters that the kernel is not told of, which must be noticed.
inline void hide_options(PersistentOptions& options, const std::string& without) {
  for (const char letter : without) {
    if (letter == 'z') options.zoneout = nullptr;
    if (letter == 'c') options.zoneout_cell = nullptr;
    if (letter == 'a') options.reset_h = options.reset_c = nullptr;
    if (letter == 'd') options.dropout = nullptr;
    if (letter == 'k') options.cell_clip = 0;
    if (letter == 'g') options.grad_clip = 0;
    if (letter == 't') options.bptt_steps = 0;
    if (letter == 'm') options.any = 0;
  }
}

// ||a - b|| / ||b||; more than anything where a number of a was never written.
struct Error {
  double difference = 0, size = 0;
  void add(double a, double b) {
    difference += a == a ? (a - b) * (a - b) : 1e30;
    size += b * b;
  }
  double value() const { return size > 0 ? std::sqrt(difference / size) : std::sqrt(difference); }
};

// Reports an error above the bound and counts it.
class Verdict {
 public:
  void expect(const char* what, const Error& error, double bound) {
    printf("%-12s %.2e%s\n", what, error.value(), error.value() <= bound ? "" : "  WRONG");
    if (!(error.value() <= bound)) ++wrong_;
  }
  int wrong() const { return wrong_; }

 private:
  int wrong_ = 0;
};

inline CellKind kind_named(const std::string& name) {
  return name == "rnn_tanh"   ? CellKind::rnn_tanh
         : name == "rnn_relu" ? CellKind::rnn_relu
         : name == "gru"      ? CellKind::gru
                              : CellKind::lstm;
}

inline DType dtype_named(const std::string& name) {
  return name == "float32" || name == "tf32" ? DType::float32 : name == "float16" ? DType::float16 : DType::bfloat16;
}

// Rows live at each step: all, a batch of falling lengths, or those of a mask, with which of three rows in turn one has
// any steps, one none and one all.
struct Batch {
  std::vector<int64_t> sizes, offsets;
  std::vector<uint8_t> mask, reset;
  Steps steps;

  explicit Batch(const Case& arguments) {
    const int T = arguments.number("T", 4), B = arguments.number("B", 3);
    std::mt19937 engine(unsigned(arguments.number("seed", 0)));
    steps.T = T;
    steps.B = B;
    if (arguments.text("options", "").find('r') != std::string::npos) {
      for (int n = 0; n < T * B; ++n) reset.push_back(uint8_t(engine() % 2 * 3));
      steps.reset = reset.data();
    }
    if (arguments.number("masked", 0)) {
      for (int n = 0; n < T * B; ++n) mask.push_back(n % B % 3 == 0 ? engine() % 2 : n % B % 3 == 2);
      steps.mask = mask.data();
      return;
    }
    if (!arguments.number("ragged", 0)) return;
    sizes.resize(size_t(T));
    offsets.assign(1, 0);
    int64_t rows = B;
    for (int t = 0; t < T; ++t) {
      if (t > 0) rows -= int64_t(engine() % unsigned(rows));
      sizes[size_t(t)] = rows;
      offsets.push_back(offsets.back() + rows);
    }
    steps.batch_sizes = sizes.data();
    steps.offsets = offsets.data();
  }

  bool keeps(int64_t n) const { return !mask.empty() && !mask[size_t(n)]; }
  // Whether a step that counts has made the h that row b has before step t, and no caller.
  bool is_made(int64_t t, int64_t b, bool reverse) const {
    while (!begins_anew(t, b, reverse)) {
      t += reverse ? 1 : -1;
      if (t < 0 || t >= steps.T || b >= steps.rows(t)) return false;
      if (!keeps(steps.first_row(t) + b)) return true;
    }
    return false;
  }
  bool begins_anew(int64_t t, int64_t b, bool reverse) const {
    return steps.reset && t >= 0 && t < steps.T && steps.begins_anew(t, b, reverse);
  }
};

// A GPU that holds a few blocks: argument `sms`; clusters of up to 16.
inline DeviceInfo made_up_device(const Case& arguments) {
  DeviceInfo device;
  device.arch = 90;
  device.sms = arguments.number("sms", 32);
  device.shared_per_block = 227 * 1024;
  device.shared_per_sm = 228 * 1024;
  device.registers_per_sm = 65536;
  device.l2_bytes = 50 << 20;
  device.max_cluster = 16;
  device.cooperative = true;
  device.clock_khz = 1755000;
  return device;
}

inline Allowed allowed(const Case& arguments) {
  Allowed a;
  const std::string exchange = arguments.text("exchange", "counted");
  a.none = false;
  a.block = exchange == "none";
  a.cluster = exchange == "counted" || exchange == "barriers";
  a.grid = exchange == "memory";
  a.counted = exchange != "barriers";
  a.team_blocks = arguments.number("blocks", 0);
  a.most_columns = arguments.number("columns", 0);
  a.layers = arguments.number("layers", 1);
  return a;
}

// Of one layer, or of `layers` in a wavefront.
inline Plan plan_of(const Case& arguments, const LayerSizes& sizes, const Steps& steps, bool backward, bool tf32) {
  const DeviceInfo device = made_up_device(arguments);
  const int layers = arguments.number("layers", 1);
  return layers == 1 ? make_plan(sizes, steps, device, backward, tf32, allowed(arguments))
                     : make_wavefront_plan(sizes, layers, steps, device, backward, tf32, allowed(arguments));
}

// Argument `threads`: of a block, where the kernels were not compiled as this program is.
inline Launch launch_of(const Case& arguments, const Plan& plan, int seed) {
  Launch l;
  l.grid_x = plan.tiling.blocks * plan.tiling.teams;
  l.grid_y = plan.directions;
  l.threads = arguments.number("threads", kernel_threads);
  l.cluster = plan.variant == Variant::cluster ? plan.tiling.blocks : 1;
  l.shared_bytes = size_t(plan.tiling.shared_bytes);
  l.cooperative = plan.variant == Variant::grid;
  l.seed = uint64_t(seed);
  return l;
}

inline void print(const Plan& plan) {
  const Tiling& t = plan.tiling;
  printf(
      "%s %s %s: %d layers, %d blocks, team %d (%d active), %d octets, %d columns in %d tiles, warps %d x %d, "
      "%d slabs, row tiles %d, weights %lld + %lld bytes, shared %d\n",
      name(plan.variant), name(t.exchange), name(plan.multiply), plan.layers, plan.blocks, t.blocks, t.active, t.octets,
      t.columns, t.column_tiles, t.warps_rows, t.warps_k, t.slabs, t.row_tiles, (long long)plan.register_bytes,
      (long long)plan.weight_bytes, t.shared_bytes);
}

// f<multiply>() for the multiplication that the case names by its dtype.
template <class F>
int with_multiply(const Case& arguments, const F& f) {
  const std::string dtype = arguments.text("dtype", "bfloat16");
#if defined(FRNN_WITHOUT_FLOAT16)
  if (dtype == "float16") throw Failure("this program is compiled without the kernels of float16");
#else
  if (dtype == "float16") return f.template operator()<Multiply::float16>();
#endif
  if (dtype == "tf32") return f.template operator()<Multiply::tf32>();
  if (dtype == "float32") return f.template operator()<Multiply::float32>();
  return f.template operator()<Multiply::bfloat16>();
}

// Exit status: 0 right, 1 wrong numbers, 2 no plan, 3 the device was misused or everybody waits.
template <class Pass>
int run_case(int argc, char** argv) {
  const Case arguments(argc, argv);
  try {
    const int status = with_multiply(arguments, Pass{arguments});
    if (arguments.number("sites", 0))
      for (const Site& site : sites()) printf("site %s %s:%d\n", site.function.c_str(), site.file.c_str(), site.line);
    return status;
  } catch (const Failure& failure) {
    printf("%s\n", failure.what());
    return 3;
  }
}

}  // namespace cuda_host
}  // namespace fused_rnn
