// Computes the map coordinates of a window's tokens, whether they are padding, and their shift regions. Implements the
// definition of WindowGeometry (csrc/params/window_attention.h) as index arithmetic.
#pragma once

#include <cstdint>

#include "../../params/window_attention.h"
#include "fast_divisor.cuh"
#include "frame_layout.cuh"
#include "map_strides.cuh"

namespace swinkernels {

struct WindowLayout : FrameLayout {
  // The bias of query i and key j is entry query_index(i) - key_index(j) + table_middle of the bias table. Both indices
  // are sums over axes: the token's coordinate times query_stride or key_stride. These strides differ on an axis if the
  // table has a row for each pair of coordinates on this axis (table_pairs).
  int32_t table_window[3], query_stride[3], key_stride[3];
  int32_t table_middle;
  int32_t table_entries;
  bool table_pairs[3], has_table_pairs;
  bool has_regions[3];  // true if the axis is divided into shift regions
  bool grid;
  const int32_t* region_map;
  RowMajorDivisor windows;  // windows of an image

  static WindowLayout of(const WindowGeometry& geometry, const int32_t* region_map) {
    WindowLayout layout = {};
    static_cast<FrameLayout&>(layout) = FrameLayout::of(geometry);
    int32_t stride = 1;
    for (int axis = 2; axis >= 0; --axis) {
      const int32_t size = geometry.table_window[axis];
      layout.table_window[axis] = size;
      layout.table_pairs[axis] = geometry.table_pairs[axis];
      layout.has_table_pairs |= geometry.table_pairs[axis];
      layout.query_stride[axis] = stride;
      layout.key_stride[axis] = geometry.table_pairs[axis] ? -size * stride : stride;
      layout.table_middle += geometry.table_pairs[axis] ? 0 : (size - 1) * stride;
      stride *= layout.table_rows(axis);
      layout.has_regions[axis] = region_map == nullptr && geometry.shift[axis] > 0 && !geometry.periodic[axis];
    }
    layout.table_entries = stride;
    layout.grid = geometry.grid;
    layout.region_map = region_map;
    layout.windows = RowMajorDivisor::of(geometry.num_windows);
    return layout;
  }

  int32_t num_tokens() const { return window[0] * window[1] * window[2]; }

  // Returns the number of rows of the bias table for one axis.
  __host__ __device__ int32_t table_rows(int axis) const {
    return table_pairs[axis] ? table_window[axis] * table_window[axis] : 2 * table_window[axis] - 1;
  }

  __device__ __forceinline__ int query_index(int token) const { return weighted(token, query_stride); }
  __device__ __forceinline__ int key_index(int token) const { return weighted(token, key_stride); }

  // Returns the sum over axes of the token's coordinate times the axis's weight. The token index is row-major in
  // table_window.
  __device__ __forceinline__ int weighted(int token, const int32_t (&weights)[3]) const {
    const int row = token / table_window[2];
    return row / table_window[1] * weights[0] + row % table_window[1] * weights[1] +
           token % table_window[2] * weights[2];
  }

  // Returns i - j for the pairs of query i and key j that use this entry of the bias table. The token indices i and j
  // are row-major in table_window. If kMayHavePairs is false, no axis has table_pairs.
  template <bool kMayHavePairs>
  __device__ __forceinline__ int token_distance(int entry) const {
    int distance = 0, weight = 1;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int size = table_window[axis], rows = kMayHavePairs ? table_rows(axis) : 2 * size - 1, row = entry % rows;
      const bool pairs = kMayHavePairs && table_pairs[axis];
      distance += (pairs ? row % size - row / size : row - (size - 1)) * weight;
      entry /= rows;
      weight *= table_window[axis];
    }
    return distance;
  }
};

struct WindowIndex {
  uint32_t batch;
  uint32_t n[3];
};

__device__ __forceinline__ WindowIndex window_index(const WindowLayout& layout, uint32_t window) {
  WindowIndex index;
  index.batch = layout.windows.divide(window, index.n);
  return index;
}

// Returns true if tokens of the window may belong to different regions.
__device__ __forceinline__ bool may_be_mixed(const WindowLayout& layout, const WindowIndex& index) {
  bool mixed = layout.region_map != nullptr;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const bool last = index.n[axis] == static_cast<uint32_t>(layout.num_windows[axis] - 1);
    mixed |= layout.has_regions[axis] && (layout.grid || last);
  }
  return mixed;
}

// A token's coordinates in its window, packed into one register.
struct PackedToken {
  static constexpr int kBits = 10, kMask = (1 << kBits) - 1;

  __device__ static __forceinline__ int32_t of(const WindowLayout& layout, int token) {
    const int row = token / layout.window[2];
    return row / layout.window[1] | row % layout.window[1] << kBits | token % layout.window[2] << 2 * kBits;
  }
  __device__ static __forceinline__ int coordinate(int32_t packed, int axis) { return packed >> kBits * axis & kMask; }
};

__device__ __forceinline__ int frame_coordinate(const WindowLayout& layout, const WindowIndex& index, int32_t token,
                                                int axis) {
  const int n = index.n[axis], t = PackedToken::coordinate(token, axis);
  return layout.grid ? t * layout.num_windows[axis] + n : n * layout.window[axis] + t;
}

struct TokenSource {
  uint32_t y[3];  // coordinates in the map, unless is_pad
  bool is_pad;
};

__device__ __forceinline__ TokenSource token_source(const WindowLayout& layout, const WindowIndex& index,
                                                    int32_t token) {
  TokenSource source;
  source.is_pad = false;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    source.y[axis] = layout.source(axis, frame_coordinate(layout, index, token, axis), source.is_pad);
  }
  return source;
}

__device__ __forceinline__ int32_t token_region(const WindowLayout& layout, const WindowIndex& index, int32_t token) {
  int region = 0;
  int64_t frame_index = 0;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const int g = frame_coordinate(layout, index, token, axis), frame = layout.frame[axis];
    region *= 3;
    if (layout.has_regions[axis]) region += (g >= frame - layout.window[axis]) + (g >= frame - layout.shift[axis]);
    frame_index = frame_index * frame + g;
  }
  return layout.region_map == nullptr ? region : layout.region_map[frame_index];
}

// A token map's base address, and its strides in bytes.
struct MapAddress {
  const void* data;
  MapStrides strides;
  uint64_t head;

  template <class Pointer>
  static MapAddress of(const TokenMapOf<Pointer>& map, size_t element_bytes) {
    return {map.data, MapStrides::of(map, element_bytes), static_cast<uint64_t>(map.head_stride) * element_bytes};
  }

  // Returns the address of a token's row.
  __device__ __forceinline__ uint64_t row(uint32_t batch_index, uint32_t head_index, const uint32_t (&y)[3]) const {
    return strides.offset(batch_index, y, reinterpret_cast<uint64_t>(data) + head_index * head);
  }
};

}  // namespace swinkernels
