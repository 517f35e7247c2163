// The functions that run Linear layers on a CPU, and their arguments. All data is float32, or bfloat16 in the bits of
// uint16_t; the number of a layer's input channels must then be even.
#pragma once

#include "cpu.h"

namespace swinkernels::cpu {

enum class Activation : int32_t { kNone, kGelu, kGeluTanh };

// A weight (out_features, in_features), whose rows are row_stride elements apart, and a bias (out_features), or null.
template <class Element>
struct LinearLayer {
  const Element* weight;
  const Element* bias;
  int64_t in_features, out_features, row_stride;
};

// The layer norm of a row: (x - mean) / sqrt(var + eps) * weight + bias. The weight and the bias have one value for each
// channel, or are null for ones and zeros. If no norm is given, the row stays as it is.
template <class Element>
struct RowNorm {
  bool given;
  const Element* weight;
  const Element* bias;
  float eps;
};

// Rows that consist of pieces of a map. Each axis of the map is cut into blocks of `factor` tokens, with a row for each
// block of an image, in row-major order. A piece is `length` adjacent elements: those of token `at` of the block, or
// zeros if that token is outside the map. Sizes and factors are in tokens, lengths, strides and offsets in elements; a 2D
// map has a leading axis of one token.
struct Patches {
  struct Piece {
    int64_t at[3];
    int64_t offset;  // from the first element of the block
  };
  const Piece* pieces = nullptr;
  int64_t count = 0;  // of pieces, or 0 if the rows are not patches
  int64_t length = 0;
  int64_t size[3] = {1, 1, 1}, factor[3] = {1, 1, 1}, strides[3] = {}, image_stride = 0;
};

// out = residual + post_norm(activation(norm(x) weight^T + bias)). The rows of x are x_stride elements apart, unless they
// are patches; out and residual (or null) are contiguous.
template <class Element>
struct LinearParams {
  const Element* x;
  const Element* residual;
  Element* out;
  int64_t rows, x_stride;
  RowNorm<Element> norm, post_norm;
  LinearLayer<Element> layer;
  Activation activation;
  Patches patches;
};

// out = residual + post_norm(fc2(activation(fc1(norm(x))))), in the same layout.
template <class Element>
struct MlpParams {
  const Element* x;
  const Element* residual;
  Element* out;
  int64_t rows, x_stride;
  RowNorm<Element> norm, post_norm;
  LinearLayer<Element> fc1, fc2;
  Activation activation;
  bool by_layers;   // compute one layer for all rows before the next one; see is_faster_by_layers
  int64_t threads;  // the number of threads that the work should keep busy
};

// out = residual + norm(x). All rows are contiguous; out may be x.
template <class Element>
struct NormParams {
  const Element* x;
  const Element* residual;
  Element* out;
  int64_t rows, channels;
  RowNorm<Element> norm;
};

// Returns true if a call should compute its layers one after the other.
template <class Element>
bool is_faster_by_layers(const MlpParams<Element>& params);

template <class Element>
void linear_forward(const LinearParams<Element>& params, ParallelFor parallel_for);
template <class Element>
void mlp_forward(const MlpParams<Element>& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
