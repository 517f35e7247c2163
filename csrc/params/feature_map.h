// The layout of a feature map in memory. Compiles with g++ and nvcc alike, and does not depend on torch.
//
// 2D is 3D with a leading axis of one token. Axes are slowest first. Strides are in elements.
#pragma once

#include <cstdint>

namespace swinkernels {

// A (B, D, H, W, ...) tensor in image order.
template <class Pointer>
struct FeatureMapOf {
  Pointer data;
  int64_t batch_stride;
  int64_t axis_stride[3];
};

}  // namespace swinkernels
