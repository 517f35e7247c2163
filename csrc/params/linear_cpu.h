// The functions that run Linear layers on a CPU, and their arguments. All data is float32.
#pragma once

#include "cpu.h"

namespace swinkernels::cpu {

enum class Activation : int32_t { kNone, kGelu, kGeluTanh };

// A weight (out_features, in_features), whose rows are row_stride elements apart, and a bias (out_features), or null.
struct LinearLayer {
  const float* weight;
  const float* bias;
  int64_t in_features, out_features, row_stride;
};

// out = residual + activation(x weight^T + bias). The rows of x are x_stride elements apart; out and residual (or null)
// are contiguous.
struct LinearParams {
  const float* x;
  const float* residual;
  float* out;
  int64_t rows, x_stride;
  LinearLayer layer;
  Activation activation;
};

// out = residual + fc2(activation(fc1(x))), in the same layout.
struct MlpParams {
  const float* x;
  const float* residual;
  float* out;
  int64_t rows, x_stride;
  LinearLayer fc1, fc2;
  Activation activation;
};

void linear_forward(const LinearParams& params, ParallelFor parallel_for);
void mlp_forward(const MlpParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
