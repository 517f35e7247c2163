// What a window attention kernel is told. Read alike by the C++ compiler and nvcc; knows nothing of torch.
//
// 2D is 3D with a leading axis of one token (size 1, window 1, shift 0). Axes are slowest first.
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

// Where the tokens of a window lie in the map, which of them attend to each other, and which bias they get.
//   frame coordinate   g = grid ? t * num_windows + n : n * window + t; FrameGeometry goes on from there
//   region             shift == 0 or periodic ? 0 : (g >= frame - window) + (g >= frame - shift)
// Two tokens of a window are masked when their regions differ on any axis, or, with a region map (int32, of the
// frame's shape), when its values at their frame coordinates differ.
// The bias of query i, key j is bias_table[r(i) - r(j) + r_max, head], where r(t) = sum over axes of the coordinate of
// t *decoded row-major in table_window* times the axis' table stride, table strides being those of a row-major (2 *
// table_window - 1) array, and r_max = sum over axes of (table_window - 1) * table stride.
// With a key margin the keys of a window are those of a larger one with M tokens, pad tokens outside the map; there is no
// shift then, no grid and no region map. The table has 2 * (window + margin) - 1 rows per axis: i is decoded in the window,
// j in the key window, and r_max = sum over axes of (key window - 1) * table stride.
// With axis_tables the bias is the sum over axes of q_i . table[coordinate of i - coordinate of j + window - 1], of the
// unscaled q.
// A dense bias is indexed by the type of the window, window / (windows of an image / bias_types), then head, i and j.
struct WindowGeometry : FrameGeometry {  // of which every shift is less than the window
  int32_t table_window[3];               // the window whose relative offsets number the bias table
  bool periodic[3];                      // no mask on this axis
  bool grid;                             // a window's tokens are strided over the map (MaxViT)
  int32_t key_margin[3];                 // tokens on each side of a window that are keys, too (HAT)
};

struct WindowAttentionForwardParams {
  DType dtype;      // of q, k, v, out and pad_qkv
  bool allow_tf32;  // float32 products may be rounded to TF32
  int32_t num_heads;
  int32_t head_dim;
  int64_t batch;
  WindowGeometry geometry;
  float scale;
  float mask_value;  // added to the score where regions differ

  ConstTokenMap q, k, v;
  TokenMap out;
  // (B, num_windows, num_heads, N), natural log-sum-exp of the final scores, pad queries undefined; or null, in a
  // forward pass that no backward pass follows.
  float* lse;

  const float* bias_table;      // (prod(2 * table_window - 1), num_heads), or null
  const float* bias;            // (bias_types, num_heads, N, M), or null; not beside a bias_table
  int32_t bias_types;           // divides the windows of an image; 1 without types
  const float* axis_tables;     // the tables of all axes, (sum of axis_rows, head_dim), or null; not beside a bias
  int32_t axis_rows[3];         // 2 * window - 1, or 0 on the leading axis of a 2D map; 0 without axis_tables
  const float* logit_scale;     // (num_heads), v2: scores are cosines times exp(min(it, ln 100)); null for v1
  const void* pad_qkv;          // (3, num_heads, head_dim): what a pad token holds, or null for zeros
  const int32_t* region_map;    // (frame), or null
  float dropout_p;              // probability of dropping an attention weight
  const int64_t* dropout_seed;  // one number in the device's memory, or null without dropout
};

struct WindowAttentionBackwardParams {
  WindowAttentionForwardParams forward;  // out is unset: the backward pass does not read it
  ConstTokenMap dout;
  TokenMap dq, dk, dv;
  float* dbias_table;   // (prod(2 * table_window - 1), num_heads), or null if not wanted; written, not added to
  float* dbias;         // like bias, or null if not wanted; written, not added to
  float* daxis_tables;  // like axis_tables, or null if not wanted; written, not added to
  float* dlogit_scale;  // (num_heads), or null if not wanted; written, not added to
  float* dpad_qkv;      // (3, num_heads, head_dim), or null if not wanted; written, not added to
  void* workspace;      // of the size that the backend's *_workspace_bytes function asks for
};

}  // namespace swinkernels
