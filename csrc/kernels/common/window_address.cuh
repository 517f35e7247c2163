// Where the tokens of a window lie in the map, which of them are pad tokens, and which shift region they are of:
// WindowGeometry's definition (csrc/params/window_attention.h) as index arithmetic without divisions.
#pragma once

#include <cstdint>

#include "../../params/window_attention.h"

namespace swinkernels {

// Quotients by a divisor known at launch, for dividends below 2^31 (Granlund and Montgomery, 1994).
struct FastDivisor {
  uint32_t divisor, multiplier, shift;

  static FastDivisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1;
    return {divisor, static_cast<uint32_t>(multiplier), shift};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t x, uint32_t* remainder) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(x) * multiplier) >> 32);
    const uint32_t quotient = (high + x) >> shift;
    *remainder = x - quotient * divisor;
    return quotient;
  }
};

struct WindowLayout {
  int32_t size[3], window[3], shift[3], frame[3], num_windows[3], pad_before[3];
  int32_t shift_in_size[3];  // shift mod size: a map may be smaller than the shift
  int32_t table_window[3], table_stride[3];
  int32_t table_middle;  // the entry of relative offset zero
  int32_t table_entries;
  bool has_regions[3];  // the axis is cut into shift regions
  bool roll_then_pad, grid;
  const int32_t* region_map;
  FastDivisor windows_per_image, windows_per_slab, windows_per_row;

  static WindowLayout of(const WindowGeometry& geometry, const int32_t* region_map) {
    WindowLayout layout = {};
    int32_t stride = 1;
    for (int axis = 2; axis >= 0; --axis) {
      layout.size[axis] = geometry.size[axis];
      layout.window[axis] = geometry.window[axis];
      layout.shift[axis] = geometry.shift[axis];
      layout.frame[axis] = geometry.frame[axis];
      layout.num_windows[axis] = geometry.num_windows[axis];
      layout.pad_before[axis] = geometry.pad_before[axis];
      layout.shift_in_size[axis] = geometry.shift[axis] % geometry.size[axis];
      layout.table_window[axis] = geometry.table_window[axis];
      layout.table_stride[axis] = stride;
      layout.table_middle += (geometry.table_window[axis] - 1) * stride;
      stride *= 2 * geometry.table_window[axis] - 1;
      layout.has_regions[axis] = region_map == nullptr && geometry.shift[axis] > 0 && !geometry.periodic[axis];
    }
    layout.table_entries = stride;
    layout.roll_then_pad = geometry.roll_then_pad;
    layout.grid = geometry.grid;
    layout.region_map = region_map;
    const int32_t (&n)[3] = geometry.num_windows;
    layout.windows_per_image = FastDivisor::of(static_cast<uint32_t>(n[0]) * n[1] * n[2]);
    layout.windows_per_slab = FastDivisor::of(static_cast<uint32_t>(n[1]) * n[2]);
    layout.windows_per_row = FastDivisor::of(n[2]);
    return layout;
  }

  int32_t num_tokens() const { return window[0] * window[1] * window[2]; }

  // r(t) of the bias table: entry (r(i) - r(j) + table_middle) holds the bias of query i and key j.
  __device__ __forceinline__ int table_index(int token) const {
    const int row = token / table_window[2];
    return row / table_window[1] * table_stride[0] + row % table_window[1] * table_stride[1] +
           token % table_window[2] * table_stride[2];
  }
};

struct WindowIndex {
  uint32_t batch;
  uint32_t n[3];
};

__device__ __forceinline__ WindowIndex window_index(const WindowLayout& layout, uint32_t window) {
  WindowIndex index;
  uint32_t rest;
  index.batch = layout.windows_per_image.divide(window, &rest);
  index.n[0] = layout.windows_per_slab.divide(rest, &rest);
  index.n[1] = layout.windows_per_row.divide(rest, &index.n[2]);
  return index;
}

// Whether tokens of the window may be of different regions.
__device__ __forceinline__ bool may_be_mixed(const WindowLayout& layout, const WindowIndex& index) {
  bool mixed = layout.region_map != nullptr;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const bool last = index.n[axis] == static_cast<uint32_t>(layout.num_windows[axis] - 1);
    mixed |= layout.has_regions[axis] && (layout.grid || last);
  }
  return mixed;
}

// The coordinates of a token in its window in one register.
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
    const int size = layout.size[axis];
    int y = frame_coordinate(layout, index, token, axis);
    if (layout.roll_then_pad) {
      y -= layout.pad_before[axis];
      source.is_pad |= static_cast<uint32_t>(y) >= static_cast<uint32_t>(size);  // negative ones, too
      y += layout.shift_in_size[axis];
      if (y >= size) y -= size;
    } else {
      y += layout.shift[axis];
      if (y >= layout.frame[axis]) y -= layout.frame[axis];
      y -= layout.pad_before[axis];
      source.is_pad |= static_cast<uint32_t>(y) >= static_cast<uint32_t>(size);
    }
    source.y[axis] = static_cast<uint32_t>(y);
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

// Where a token map lies, with strides in bytes.
struct MapAddress {
  const void* data;
  uint64_t batch, axis[3], head;

  template <class Map>
  static MapAddress of(const Map& map, size_t element_bytes) {
    const auto bytes = [element_bytes](int64_t stride) { return static_cast<uint64_t>(stride) * element_bytes; };
    return {map.data,
            bytes(map.batch_stride),
            {bytes(map.axis_stride[0]), bytes(map.axis_stride[1]), bytes(map.axis_stride[2])},
            bytes(map.head_stride)};
  }

  // The row of a token. All factors are unsigned so that a product costs two multiply-adds.
  __device__ __forceinline__ uint64_t row(uint32_t batch_index, uint32_t head_index, const uint32_t (&y)[3]) const {
    return reinterpret_cast<uint64_t>(data) + batch_index * batch + head_index * head + y[0] * axis[0] +
           y[1] * axis[1] + y[2] * axis[2];
  }
};

}  // namespace swinkernels
