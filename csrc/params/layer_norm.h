// The parameters of a layer norm kernel. This header compiles with g++ and nvcc, and does not depend on torch.
//
// There are kernels for the plain norm, for the norm of merged neighbours or expanded parts, and for the norm before or
// after a residual sum. Each of them normalises rows of `length` elements, z = (x - mean) * rstd * weight + bias. The
// kernels differ in the layout of the rows and in the residual sum. Sizes are in tokens, lengths and strides in
// elements.
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
  kMerging = 1,    // a row is the channels of a block of tokens of x, and becomes one token of z
  kExpanding = 2,  // a row is one part of a token of x, whose parts become a block of tokens of z
};

// The rows to normalise, in the order of z, where they are contiguous.
//
// Merging and expanding cut each axis of a map (B, D, H, W, C) into blocks of `factor` tokens: merging cuts x, and z
// has ceil(size / factor) tokens; expanding cuts z, which has size * factor tokens. The tokens of a block are numbered
// row-major. Piece p of a merged row has length / prod(factor) elements: token neighbours[p] of the block, or zeros if
// that token is outside the map. In expanding, part p of a token of x has `length` elements and becomes token p of the
// block.
struct LayerNormRows {
  RowLayout layout;
  int32_t length;
  int64_t count;
  // Unused in kPlain. A 2D map has a leading axis with one token and factor 1. Axes are listed slowest first.
  int32_t size[3];        // tokens of x
  int32_t factor[3];      // 1 or 2 for merging
  int32_t neighbours[8];  // for merging; a neighbour may occur any number of times
};

// Residual ops have kPlain rows. Every tensor is contiguous; `rows` defines the layout of x.
struct LayerNormForwardParams {
  LayerNormOp op;
  DType in_dtype;      // dtype of x and s
  DType out_dtype;     // dtype of y and z
  DType weight_dtype;  // dtype of weight
  DType bias_dtype;
  LayerNormRows rows;
  float eps;
  const void* x;
  const void* y;                 // residual ops only
  const float* drop_path_scale;  // residual ops only: one factor for each sample, or null for 1
  int64_t rows_per_sample;
  const void* weight;  // (length), or null for 1
  const void* bias;    // (length), or null for 0
  void* s;             // residual ops only
  void* z;             // unused in kPostNorm
  float* mean;         // (count)
  float* rstd;         // (count)
};

struct LayerNormBackwardParams {
  LayerNormOp op;
  DType in_dtype;   // dtype of x, s, ds and dx
  DType out_dtype;  // dtype of y, dz and dy
  DType weight_dtype;
  LayerNormRows rows;
  const void* normalised;        // x of kNorm, s of kResidual, y of kPostNorm
  const void* dz;                // unused in kPostNorm
  const void* ds;                // residual ops only
  const float* drop_path_scale;  // see LayerNormForwardParams
  int64_t rows_per_sample;
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;        // unused in kPostNorm: dx equals ds
  void* dy;        // residual ops only; null if it equals dx
  float* dweight;  // (length), or null if not needed; overwritten, not accumulated
  float* dbias;    // (length), or null if not needed; overwritten, not accumulated
  void* workspace;
};

}  // namespace swinkernels
