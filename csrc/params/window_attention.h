// The parameters of a window attention kernel. This header compiles with g++ and nvcc, and does not depend on torch.
//
// A 2D map is a 3D map whose leading axis has one token (size 1, window 1, shift 0). Axes are listed slowest first.
// Sizes and strides are in elements.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"
#include "frame.h"

namespace swinkernels {

// A (B, D, H, W, num_heads, head_dim) tensor in image order. The stride of head_dim is 1.
template <class Pointer>
struct TokenMapOf : FeatureMapOf<Pointer> {
  int64_t head_stride;
};
using TokenMap = TokenMapOf<void*>;
using ConstTokenMap = TokenMapOf<const void*>;

// Defines the tokens of a window, the pairs of tokens that attend to each other, and their bias:
//   frame coordinate   g = grid ? t * num_windows + n : n * window + t; FrameGeometry maps g to the map
//   region             shift == 0 or periodic ? 0 : (g >= frame - window) + (g >= frame - shift)
// Attention between two tokens of a window is masked if their regions differ on any axis, or, with a region map (int32,
// with the frame's shape), if the map's values at their frame coordinates differ.
// The bias of query i and key j is bias_table[r(i) - r(j) + r_max, head]. Here r(t) is the sum over axes of the
// coordinate of t (decoded row-major in table_window, not in window) times the table stride of the axis, and r_max is
// the sum over axes of (table_window - 1) * table stride. Table strides are those of a row-major (2 * table_window - 1)
// array.
// With a key margin, the keys of a window are the M tokens of a larger window, with pad tokens outside the map; such a
// call has no shift, grid or region map. The table has 2 * (window + margin) - 1 rows per axis: i is decoded in the
// window, j in the key window, and r_max is the sum over axes of (key window - 1) * table stride.
// On an axis with table_pairs, the table has window * window rows; coordinates i and j use row i + window * j.
// A table with bias types has bias_types columns for each row, each with num_heads values.
// With axis_tables, the bias is the sum over axes of q_i . table[coordinate of i - coordinate of j + window - 1], where
// q is not scaled.
// A dense bias is indexed by window type, head, i and j. The type of window n of an image is
// n / (windows per image / bias_types).
struct WindowGeometry : FrameGeometry {  // every shift is less than the window
  int32_t table_window[3];               // the window whose relative offsets index the rows of the bias table
  bool periodic[3];                      // no mask on this axis
  bool grid;                             // a window's tokens are strided over the map (MaxViT)
  int32_t key_margin[3];                 // tokens on each side of a window that are also keys (HAT)
  bool table_pairs[3];  // the table has rows for pairs of coordinates on this axis, not offsets (Pangu)
};

struct WindowAttentionForwardParams {
  DType dtype;      // dtype of q, k, v, out and pad_qkv
  bool allow_tf32;  // inputs of float32 products may be rounded to TF32
  int32_t num_heads;
  int32_t head_dim;
  int64_t batch;
  WindowGeometry geometry;
  float scale;
  float mask_value;  // added to the score if regions differ

  ConstTokenMap q, k, v;
  TokenMap out;
  // (B, num_windows, num_heads, N): the natural log-sum-exp of the final scores, undefined for pad queries. It is null
  // if no backward pass follows.
  float* lse;

  const float* bias_table;      // (prod(2 * table_window - 1), bias_types, num_heads), or null
  const float* bias;            // (bias_types, num_heads, N, M), or null; mutually exclusive with bias_table
  int32_t bias_types;           // window types of a table or dense bias, or 1; divides the windows per image
  const float* axis_tables;     // tables of all axes, (sum of axis_rows, head_dim), or null; never set with a bias
  int32_t axis_rows[3];         // 2 * window - 1, or 0 on the leading axis of a 2D map; 0 without axis_tables
  const float* logit_scale;     // (num_heads), v2: exp(min(logit_scale, ln 100)) multiplies cosines; null for v1
  const void* pad_qkv;          // (3, num_heads, head_dim): q, k and v of a pad token, or null for zeros
  const int32_t* region_map;    // (frame), or null
  float dropout_p;              // probability of dropping an attention weight
  const int64_t* dropout_seed;  // a scalar in device memory, or null without dropout
};

struct WindowAttentionBackwardParams {
  WindowAttentionForwardParams forward;  // out is unset: the backward pass does not read it
  ConstTokenMap dout;
  TokenMap dq, dk, dv;
  float* dbias_table;   // like bias_table, or null if not needed; overwritten, not accumulated
  float* dbias;         // like bias, or null if not needed; overwritten, not accumulated
  float* daxis_tables;  // like axis_tables, or null if not needed; overwritten, not accumulated
  float* dlogit_scale;  // (num_heads), or null if not needed; overwritten, not accumulated
  float* dpad_qkv;      // (3, num_heads, head_dim), or null if not needed; overwritten, not accumulated
  void* workspace;      // as many bytes as the backend's *_workspace_bytes function returns
};

}  // namespace swinkernels
