// Arguments common to the forward and backward kernels, and the distribution of the windows over the blocks of a grid.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../../common/dtype.cuh"
#include "../../common/fast_divisor.cuh"
#include "../../common/window_address.cuh"
#include "traits.h"

namespace swinkernels::cuda {

// Arguments of a forward or backward kernel. The kMaps token maps are q, k, v, out (forward) or q, k, v, dout, dq, dk,
// dv (backward).
//
// A unit is a set of windows that have the same bias: for one head, all windows of one type, or all windows if there
// are no types. The windows of a unit are its items. Each block processes items of one unit. The index of a unit is
// type * num_heads + head, so that concurrent blocks read neighbouring heads of the same tokens.
template <int kMaps>
struct WindowArguments {
  WindowLayout layout;
  MapAddress maps[kMaps];
  const void* pad_qkv;
  const float* bias_table;
  const float* dense_bias;
  const float* logit_scale;
  const int64_t* dropout_seed;
  uint32_t dropout_below;  // attention weights whose random number is below this are dropped
  float dropout_scale;     // factor of the attention weights that are not dropped
  float scale, mask2;      // mask2: the mask value times log2(e)
  int32_t num_heads, head_dim, num_tokens, row_bytes;
  int32_t bias_types;
  FastDivisor windows_of_type;  // windows of one type in one image
  uint32_t items;               // windows of a unit, in all images
  uint32_t num_windows;         // in all images
  bool is_float32;

  size_t element_bytes() const { return is_float32 ? 4 : 2; }
  __host__ __device__ int64_t units() const { return int64_t{1} * num_heads * bias_types; }

  static WindowArguments of(const WindowAttentionForwardParams& params) {
    WindowArguments args = {};
    args.is_float32 = params.dtype == DType::kFloat32;
    args.layout = WindowLayout::of(params.geometry, params.region_map);
    const ConstTokenMap inputs[3] = {params.q, params.k, params.v};
    for (int map = 0; map < 3; ++map) args.maps[map] = MapAddress::of(inputs[map], args.element_bytes());
    args.pad_qkv = params.pad_qkv;
    args.bias_table = params.bias_table;
    args.dense_bias = params.bias;
    args.logit_scale = params.logit_scale;
    if (params.dropout_p > 0.0f) {
      args.dropout_seed = params.dropout_seed;
      args.dropout_below = static_cast<uint32_t>(std::min(std::ldexp(double{params.dropout_p}, 32), 4294967295.0));
      args.dropout_scale = params.dropout_p < 1.0f ? 1.0f / (1.0f - params.dropout_p) : 0.0f;
    }
    args.scale = params.scale;
    args.mask2 = params.mask_value * kLog2E;
    args.num_heads = params.num_heads;
    args.head_dim = params.head_dim;
    args.num_tokens = args.layout.num_tokens();
    args.row_bytes = params.head_dim * static_cast<int32_t>(args.element_bytes());
    args.bias_types = params.bias_types;
    const uint32_t of_image = args.layout.windows.volume.divisor;
    args.windows_of_type = FastDivisor::of(of_image / params.bias_types);
    args.num_windows = static_cast<uint32_t>(params.batch * of_image);
    args.items = args.num_windows / params.bias_types;
    return args;
  }

  // Return the column of the bias table for a unit, and the stride between its entries in floats.
  __device__ __forceinline__ const float* table_column(uint32_t type, int head) const {
    return bias_table + type * num_heads + head;
  }
  __device__ __forceinline__ int32_t table_columns() const { return num_heads * bias_types; }

  // Returns the window index, over all images, of an item of a unit.
  __device__ __forceinline__ uint32_t window_of(uint32_t type, uint32_t item) const {
    if (bias_types == 1) return item;
    uint32_t in_type;
    const uint32_t image = windows_of_type.divide(item, &in_type);
    return (image * bias_types + type) * windows_of_type.divisor + in_type;
  }

  // Returns the index of the first query of a window and head in arrays that have one element per query of every window
  // and head.
  __device__ __forceinline__ int64_t first_query(uint32_t window, int head) const {
    return (static_cast<int64_t>(window) * num_heads + head) * num_tokens;
  }

  __device__ __forceinline__ bool is_cosine() const { return logit_scale != nullptr; }
  __device__ __forceinline__ bool has_dropout() const { return dropout_seed != nullptr; }
  __device__ __forceinline__ bool has_whole_rows() const { return row_bytes % 16 == 0; }
};

// The number of blocks of a grid. Each unit has `workers` blocks, and each block loops over every workers-th item of
// its unit.
struct GridPlan {
  uint32_t workers;  // blocks per unit
  uint32_t blocks;
};

inline GridPlan plan_grid(int64_t items, int64_t units, int64_t resident_blocks) {
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(items, resident_blocks / units));
  const int64_t rounds = (items + most - 1) / most;  // items per block, balanced so that no block runs alone at the end
  const int64_t workers = std::max<int64_t>(1, (items + rounds - 1) / std::max<int64_t>(1, rounds));
  return {static_cast<uint32_t>(workers), static_cast<uint32_t>(workers * units)};
}

// The items that a block processes. Consecutive blocks have consecutive units.
struct BlockShare {
  int head;
  uint32_t type;
  uint32_t first, step;  // first item and stride

  template <int kMaps>
  __device__ __forceinline__ static BlockShare of(const WindowArguments<kMaps>& args) {
    const uint32_t units = args.num_heads * args.bias_types, unit = blockIdx.x % units;
    return {static_cast<int>(unit % args.num_heads), unit / args.num_heads, blockIdx.x / units, gridDim.x / units};
  }
};

}  // namespace swinkernels::cuda
