// The parameters of window partition and window reverse. This header compiles with g++ and nvcc, and does not depend on
// torch.
//
// Sizes and strides are in elements.
#pragma once

#include <cstdint>

#include "feature_map.h"
#include "frame.h"

namespace swinkernels {

// A (B * num_windows, N, C) tensor. Windows and their tokens are in row-major order. The stride of C is 1.
template <class Pointer>
struct WindowsOf {
  Pointer data;
  int64_t window_stride, token_stride;
};

// Elements are moved as bytes, without interpretation.
template <class MapPointer, class WindowsPointer>
struct WindowCopyParams {
  int32_t element_bytes;
  int64_t channels;
  int64_t batch;
  FrameGeometry geometry;
  FeatureMapOf<MapPointer> map;  // (B, D, H, W, C), the stride of C is 1
  WindowsOf<WindowsPointer> windows;
};
using WindowPartitionParams = WindowCopyParams<const void*, void*>;
using WindowReverseParams = WindowCopyParams<void*, const void*>;

}  // namespace swinkernels
