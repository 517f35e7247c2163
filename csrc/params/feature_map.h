// The layout of a feature map in memory. This header compiles with g++ and nvcc, and does not depend on torch.
//
// A 2D map is a 3D map whose leading axis has one token. Axes are listed slowest first. Strides are in elements.
#pragma once

#include <cstdint>

namespace swinkernels {

// A (B, D, H, W, ...) tensor in image order, that is, not divided into windows.
template <class Pointer>
struct FeatureMapOf {
  Pointer data;
  int64_t batch_stride;
  int64_t axis_stride[3];
};

}  // namespace swinkernels
