// What a layer norm kernel is told. Read alike by the C++ compiler and nvcc; knows nothing of torch.
//
// One family: the plain norm, the norm of merged neighbours or of expanded parts, and the norm beside a residual
// connection. Each normalises rows of `length` elements, z = (x - mean) * rstd * weight + bias, and what they differ in
// is where a row lies and what is added to it. Sizes are in tokens, lengths and strides in elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace swinkernels {

enum class LayerNormOp : int32_t {
  kNorm = 0,      // z = norm(x)
  kResidual = 1,  // s = x + scale * y, rounded; z = norm(s)
  kPostNorm = 2,  // s = x + scale * norm(y)
};

enum class RowLayout : int32_t {
  kPlain = 0,      // row after row
  kMerging = 1,    // a row is the channels of the tokens of a block of x, which become one token of z
  kExpanding = 2,  // a row is one of the parts of a token of x, which become a block of tokens of z
};

// The rows that are normalised, numbered as in z, where they always lie one after another.
//
// Both layouts of a map (B, D, H, W, C) cut an axis into blocks of `factor` tokens: x of merging, whose z has
// ceil(size / factor) tokens, and z of expanding, which has size * factor of them. Tokens of a block are numbered
// row-major. Piece p of a merged row, of length / prod(factor) elements, is neighbour neighbours[p] of the block, zeros
// if it is outside of the map. Part p of a token of x, of `length` elements, becomes token p of the block.
struct LayerNormRows {
  RowLayout layout;
  int32_t length;
  int64_t count;
  // Not of kPlain. 2D is 3D with a leading axis of one token and factor 1. Axes are slowest first.
  int32_t size[3];        // tokens of x
  int32_t factor[3];      // 1 or 2 of merging
  int32_t neighbours[8];  // of merging; each may be named any number of times
};

// Of residual ops rows are kPlain. Every tensor is contiguous; rows of x follow from `rows`.
struct LayerNormForwardParams {
  LayerNormOp op;
  DType in_dtype;      // of x and s
  DType out_dtype;     // of y and z
  DType weight_dtype;  // of weight, and the next of bias
  DType bias_dtype;
  LayerNormRows rows;
  float eps;
  const void* x;
  const void* y;                 // of residual ops
  const float* drop_path_scale;  // of residual ops: one factor for each sample, or null for 1
  int64_t rows_per_sample;
  const void* weight;  // (length), or null for 1
  const void* bias;    // (length), or null for 0
  void* s;             // of residual ops
  void* z;             // not of kPostNorm
  float* mean;         // (count)
  float* rstd;         // (count)
};

struct LayerNormBackwardParams {
  LayerNormOp op;
  DType in_dtype;   // of x, s, ds and dx
  DType out_dtype;  // of y, dz and dy
  DType weight_dtype;
  LayerNormRows rows;
  const void* normalised;        // x of kNorm, s of kResidual, y of kPostNorm
  const void* dz;                // not of kPostNorm
  const void* ds;                // of residual ops
  const float* drop_path_scale;  // as forward
  int64_t rows_per_sample;
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;        // not of kPostNorm, where it is ds
  void* dy;        // of residual ops; null where it is dx
  float* dweight;  // (length), or null if not wanted; written, not added to
  float* dbias;    // (length), or null if not wanted; written, not added to
  void* workspace;
};

}  // namespace swinkernels
