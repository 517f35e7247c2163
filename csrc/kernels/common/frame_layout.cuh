// Implements the definition of FrameGeometry (csrc/params/frame.h) as index arithmetic without divisions.
#pragma once

#include <cstdint>

#include "../../params/frame.h"

namespace swinkernels {

struct FrameLayout : FrameGeometry {
  int32_t shift_in_size[3];  // shift mod size: a map may be smaller than the shift

  static FrameLayout of(const FrameGeometry& geometry) {
    FrameLayout layout = {geometry, {}};
    for (int axis = 0; axis < 3; ++axis) layout.shift_in_size[axis] = geometry.shift[axis] % geometry.size[axis];
    return layout;
  }

  // Converts a frame coordinate on one axis to a map coordinate. Sets is_pad if the result is outside the map.
  __device__ __forceinline__ uint32_t source(int axis, int frame_coordinate, bool& is_pad) const {
    const int extent = size[axis];
    int y = frame_coordinate;
    if (roll_then_pad) {
      y -= pad_before[axis];
      is_pad |= static_cast<uint32_t>(y) >= static_cast<uint32_t>(extent);  // also true for negative y
      y += shift_in_size[axis];
      if (y >= extent) y -= extent;
    } else {
      y += shift[axis];
      if (y >= frame[axis]) y -= frame[axis];
      y -= pad_before[axis];
      is_pad |= static_cast<uint32_t>(y) >= static_cast<uint32_t>(extent);
    }
    return static_cast<uint32_t>(y);
  }
};

}  // namespace swinkernels
