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

// The layer norm of a row: (x - mean) / sqrt(var + eps) * weight + bias. The weight and the bias have one value for each
// channel, or are null for ones and zeros. If no norm is given, the row stays as it is.
struct RowNorm {
  bool given;
  const float* weight;
  const float* bias;
  float eps;
};

// out = residual + activation(norm(x) weight^T + bias). The rows of x are x_stride elements apart; out and residual (or null)
// are contiguous.
struct LinearParams {
  const float* x;
  const float* residual;
  float* out;
  int64_t rows, x_stride;
  RowNorm norm;
  LinearLayer layer;
  Activation activation;
};

// out = residual + post_norm(fc2(activation(fc1(norm(x))))), in the same layout.
struct MlpParams {
  const float* x;
  const float* residual;
  float* out;
  int64_t rows, x_stride;
  RowNorm norm, post_norm;
  LinearLayer fc1, fc2;
  Activation activation;
  bool by_layers;  // compute one layer for all rows before the next one
};

// out = residual + norm(x). All rows are contiguous; out may be x.
struct NormParams {
  const float* x;
  const float* residual;
  float* out;
  int64_t rows, channels;
  RowNorm norm;
};

void linear_forward(const LinearParams& params, ParallelFor parallel_for);
void mlp_forward(const MlpParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
