// Sets the params of a window attention call from its tensors and its WindowSpec.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"
#include "geometry.h"
#include "params/window_attention.h"
#include "window_spec.h"

namespace swinkernels {

// Returns x (B, *S, ...) as a map that starts at element `offset` and whose heads are head_stride elements apart.
template <class Pointer, class Data>
TokenMapOf<Pointer> token_map(const Tensor& x, Data* data, int64_t offset, int64_t rank, int64_t head_stride) {
  const Pointer first = data + offset * static_cast<int64_t>(x.element_size());
  return {feature_map(x, first, rank), head_stride};
}

inline ConstTokenMap input_map(const Tensor& x, int64_t offset, int64_t rank, int64_t head_stride) {
  return token_map<const void*>(x, static_cast<const char*>(data_of(x)), offset, rank, head_stride);
}

inline TokenMap output_map(const Tensor& x, int64_t offset, int64_t rank, int64_t head_stride) {
  return token_map<void*>(x, static_cast<char*>(x.mutable_data_ptr()), offset, rank, head_stride);
}

// The small tensors of a call, in schema order.
struct Tables {
  OptionalTensor bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed;
};

// Sets all fields except the maps, lse and the tables. x is (B, *S, ..., num_heads, head_dim), where S has `rank` axes.
inline void fill(WindowAttentionForwardParams& p, const Tensor& x, int64_t rank, const WindowSpec& spec) {
  p.dtype = dtype_of(x);
  p.batch = x.size(0);
  p.num_heads = static_cast<int32_t>(x.size(x.dim() - 2));
  p.head_dim = static_cast<int32_t>(x.size(x.dim() - 1));
  const std::vector<int64_t> shape = sizes(x, 1 + rank);
  spec.fill(p, {shape.begin() + 1, shape.end()});
}

// Sets the fields for the tables. A table that is not contiguous is replaced by a copy in `t`, so that the caller keeps
// the copy alive.
inline void fill_tables(WindowAttentionForwardParams& p, Tables& t, const WindowSpec& spec, int64_t rank) {
  for (OptionalTensor* x : {&t.bias_table, &t.bias, &t.logit_scale, &t.pad_qkv, &t.region_map, &t.dropout_seed}) {
    if (*x && !(*x)->is_contiguous()) *x = as_contiguous(**x);
  }
  const WindowGeometry& g = p.geometry;
  p.bias_types = 1;
  if (t.bias_table) {
    const bool overlap = g.key_margin[0] + g.key_margin[1] + g.key_margin[2] > 0;
    int64_t rows = 1;
    for (int i = 0; i < 3; ++i) {
      rows *= g.table_pairs[i] ? g.window[i] * g.window[i]
                               : 2 * (overlap ? g.window[i] + g.key_margin[i] : g.table_window[i]) - 1;
    }
    STD_TORCH_CHECK(spec.table_types > 0 && product(g.num_windows) % spec.table_types == 0,
                    "swinkernels: the number of types of a bias_table must divide the number of windows of an image");
    p.bias_types = static_cast<int32_t>(spec.table_types);
    STD_TORCH_CHECK(
        t.bias_table->scalar_type() == ScalarType::Float && t.bias_table->numel() == rows * p.bias_types * p.num_heads,
        "swinkernels: bias_table must be float32 with prod(2 * table_window - 1) rows or, with a key window, "
        "prod(window + key_window - 1) rows");
    p.bias_table = static_cast<const float*>(data_of(*t.bias_table));
  }
  if (spec.axis_tables) {
    int64_t rows = 0;
    for (int64_t i = 3 - rank; i < 3; ++i) rows += p.axis_rows[i] = 2 * g.window[i] - 1;
    STD_TORCH_CHECK(t.bias && t.bias->scalar_type() == ScalarType::Float && t.bias->numel() == rows * p.head_dim &&
                        !t.bias_table && !t.logit_scale,
                    "swinkernels: axis_tables must be float32, (2 * window - 1, head_dim) per axis, the only bias");
    t.bias = packed(*t.bias, 2 * sizeof(float));  // the CUDA kernels load two entries at once
    p.axis_tables = static_cast<const float*>(data_of(*t.bias));
  } else if (t.bias) {
    const int64_t n = product(g.window), windows = product(g.num_windows);
    int64_t of_a_type = p.num_heads * n;
    for (int i = 0; i < 3; ++i) of_a_type *= g.window[i] + 2 * g.key_margin[i];
    const int64_t types = t.bias->numel() / of_a_type;
    STD_TORCH_CHECK(t.bias->scalar_type() == ScalarType::Float && types > 0 && windows % types == 0 &&
                        t.bias->numel() == types * of_a_type && !t.bias_table,
                    "swinkernels: bias must be float32, (types, num_heads, N, M), and the only bias");
    p.bias = static_cast<const float*>(data_of(*t.bias));
    p.bias_types = static_cast<int32_t>(types);
  }
  if (t.logit_scale) {
    STD_TORCH_CHECK(t.logit_scale->scalar_type() == ScalarType::Float && t.logit_scale->numel() == p.num_heads,
                    "swinkernels: logit_scale must be float32, one value for each head");
    p.logit_scale = static_cast<const float*>(data_of(*t.logit_scale));
  }
  STD_TORCH_CHECK(p.dropout_p == 0 || t.dropout_seed, "swinkernels: dropout needs a seed");
  if (t.dropout_seed) {
    STD_TORCH_CHECK(t.dropout_seed->scalar_type() == ScalarType::Long && t.dropout_seed->numel() == 1,
                    "swinkernels: dropout_seed must be one int64");
    p.dropout_seed = static_cast<const int64_t*>(data_of(*t.dropout_seed));
  }
  if (t.pad_qkv) {
    STD_TORCH_CHECK(dtype_of(*t.pad_qkv) == p.dtype && t.pad_qkv->numel() == int64_t{3} * p.num_heads * p.head_dim,
                    "swinkernels: pad_qkv must be (3, num_heads, head_dim) in the map's dtype");
    *t.pad_qkv = readable(*t.pad_qkv, 16);
    p.pad_qkv = data_of(*t.pad_qkv);
  }
  if (t.region_map) {
    STD_TORCH_CHECK(t.region_map->scalar_type() == ScalarType::Int &&
                        t.region_map->numel() == int64_t{1} * g.frame[0] * g.frame[1] * g.frame[2],
                    "swinkernels: region_map must be int32 with the frame's shape");
    p.region_map = static_cast<const int32_t*>(data_of(*t.region_map));
  }
}

}  // namespace swinkernels
