// csrc/ops_cuda_stream.h on the CPU: memory is the CPU's, and nothing waits to be done.
#pragma once

#include <cstring>

#include "operators.h"

#define FRNN_LIBRARY fused_rnn_host
#define FRNN_DISPATCH_KEY CPU

namespace fused_rnn {

class Stream {
 public:
  explicit Stream(const Tensor&) {}
  void* handle() const { return nullptr; }
  int device() const { return 0; }
  void copy(void* to, const void* from, int64_t bytes) const { memcpy(to, from, size_t(bytes)); }
  void clear(void* to, int64_t bytes) const { memset(to, 0, size_t(bytes)); }
  void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes,
                 int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(static_cast<char*>(to) + r * to_stride, static_cast<const char*>(from) + r * from_stride, size_t(bytes));
    }
  }
};

struct Matrix {
  const void* data;
  int64_t stride;
  bool transposed = false;
};

// In the sum type, rounded once at the end, as cuBLAS is asked to.
class Products {
 public:
  Products(DType dtype, bool) : sum_(dtype == DType::float64 ? at::kDouble : at::kFloat) {
    switch (dtype) {
      case DType::float64: type_ = at::kDouble; break;
      case DType::float32: type_ = at::kFloat; break;
      case DType::bfloat16: type_ = at::kBFloat16; break;
      case DType::float16: type_ = at::kHalf; break;
    }
  }

  void operator()(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, void* c, int64_t c_stride, double beta,
                  bool c_is_sum = false) const {
    if (m == 0 || n == 0) return;
    const at::Tensor out = view(c, m, n, c_stride, c_is_sum ? sum_ : type_);
    const at::Tensor sums = at::mm(factor(a, m, k), factor(b, k, n));
    out.copy_(beta == 0 ? sums : sums + beta * out.to(sum_));
  }

 private:
  static at::Tensor view(const void* data, int64_t rows, int64_t columns, int64_t stride, at::ScalarType type) {
    TORCH_CHECK(rows <= 1 || stride >= columns, "a matrix of ", columns, " columns with rows ", stride, " apart");
    return at::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1}, at::TensorOptions().dtype(type));
  }
  at::Tensor factor(const Matrix& x, int64_t rows, int64_t columns) const {
    return x.transposed ? view(x.data, columns, rows, x.stride, type_).t().to(sum_)
                        : view(x.data, rows, columns, x.stride, type_).to(sum_);
  }

  at::ScalarType sum_, type_ = at::kFloat;
};

}  // namespace fused_rnn
