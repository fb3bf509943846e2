// What the CUDA operators ask of the device beside kernels: its current stream, copies, matrix products.
//
// With FRNN_CUDA_ON_HOST, tests/cuda_host supplies the same on the CPU.
#pragma once

#if defined(FRNN_CUDA_ON_HOST)
#include "ops_on_host.h"
#else

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#include <c10/cuda/CUDAGuard.h>
#include <cublas_v2.h>

#include "operators.h"

#define FRNN_LIBRARY fused_rnn
#define FRNN_DISPATCH_KEY CUDA

namespace fused_rnn {

// Makes the device of `input` the current one for its lifetime; work goes to PyTorch's current stream there.
class Stream {
 public:
  explicit Stream(const Tensor& input) : guard_(device_of(input)), stream_(at::cuda::getCurrentCUDAStream().stream()) {}

  void* handle() const { return stream_; }
  int device() const { return guard_.current_device().index(); }

  void copy(void* to, const void* from, int64_t bytes) const {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
  }
  void clear(void* to, int64_t bytes) const { C10_CUDA_CHECK(cudaMemsetAsync(to, 0, bytes, stream_)); }

  // `rows` rows of `bytes` bytes; strides in bytes too.
  void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes,
                 int64_t rows) const {
    C10_CUDA_CHECK(cudaMemcpy2DAsync(to, to_stride, from, from_stride, bytes, rows, cudaMemcpyDeviceToDevice, stream_));
  }

 private:
  static at::Device device_of(const Tensor& input) {
    TORCH_CHECK(input.is_cuda(), "input: expected a CUDA tensor like the others, got one on ", input.device());
    return input.device();
  }

  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
};

// A row-major matrix in device memory.
struct Matrix {
  const void* data;
  int64_t stride;
  bool transposed = false;
};

// Matrix products by cuBLAS on PyTorch's handle for the current stream. at::mm is not enough: it takes the TF32 flag of
// matrix products where this is an RNN's, and rounds a recurrent product to bfloat16 before the gates see it.
class Products {
 public:
  Products(DType dtype, bool tf32) : dtype_(dtype) {
    handle_ = at::cuda::getCurrentCUDABlasHandle();
    // PyTorch sets this mode before each product of its own.
    TORCH_CUDABLAS_CHECK(cublasSetMathMode(
        handle_, cublasMath_t(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    compute_ = dtype == DType::float64           ? CUBLAS_COMPUTE_64F
               : dtype == DType::float32 && tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                 : CUBLAS_COMPUTE_32F;
  }

  // c (m, n) = a (m, k) b (k, n) + beta c. a and b are in the layer's dtype; c is too, or in the sum type.
  void operator()(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, void* c, int64_t c_stride, double beta,
                  bool c_is_sum = false) const {
    if (m == 0 || n == 0) return;
    // A single row may come with any stride.
    const auto leading = [](const Matrix& x, int64_t rows, int64_t columns) {
      return std::max(x.stride, x.transposed ? rows : columns);
    };
    const float alpha32 = 1, beta32 = float(beta);
    const double alpha64 = 1;
    const bool wide = compute_ == CUBLAS_COMPUTE_64F;
    // cuBLAS is column-major: there every row-major matrix is its transpose.
    TORCH_CUDABLAS_CHECK(cublasGemmEx_64(
        handle_, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, n, m, k,
        wide ? static_cast<const void*>(&alpha64) : &alpha32, b.data, type(false), leading(b, k, n), a.data,
        type(false), leading(a, m, k), wide ? static_cast<const void*>(&beta) : &beta32, c, type(c_is_sum),
        std::max(c_stride, n), compute_, CUBLAS_GEMM_DEFAULT));
  }

 private:
  cudaDataType_t type(bool sum) const {
    switch (dtype_) {
      case DType::float64: return CUDA_R_64F;
      case DType::float32: return CUDA_R_32F;
      case DType::bfloat16: return sum ? CUDA_R_32F : CUDA_R_16BF;
      case DType::float16: return sum ? CUDA_R_32F : CUDA_R_16F;
    }
    return CUDA_R_32F;
  }

  DType dtype_;
  cublasHandle_t handle_;
  cublasComputeType_t compute_;
};

}  // namespace fused_rnn

#endif
