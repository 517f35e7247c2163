// The functions that run Linear layers on a CPU, and their arguments. All data has one dtype, float32 or bfloat16. In
// bfloat16, the number of input channels and the distance between rows of x or of a weight are even, and x and weights
// are aligned to 4 bytes.
#pragma once

#include "cpu.h"
#include "dtype.h"

namespace swinkernels::cpu {

enum class Activation : int32_t { kNone, kGelu, kGeluTanh };

// A weight (out_features, in_features), whose rows are row_stride elements apart, and a bias (out_features), or null.
struct LinearLayer {
  const void* weight;
  const void* bias;
  int64_t in_features, out_features, row_stride;
};

// out = residual + activation(x weight^T + bias). The rows of x are x_stride elements apart; out and residual (or null)
// are contiguous.
struct LinearParams {
  const void* x;
  const void* residual;
  void* out;
  int64_t rows, x_stride;
  LinearLayer layer;
  Activation activation;
  DType dtype;
};

// out = residual + fc2(activation(fc1(x))), in the same layout.
struct MlpParams {
  const void* x;
  const void* residual;
  void* out;
  int64_t rows, x_stride;
  LinearLayer fc1, fc2;
  Activation activation;
  DType dtype;
};

void linear_forward(const LinearParams& params, ParallelFor parallel_for);
void mlp_forward(const MlpParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
