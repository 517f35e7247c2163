// The frame: a feature map padded to whole windows. This header compiles with g++ and nvcc, and does not depend on
// torch.
//
// A 2D map is a 3D map whose leading axis has one token (size 1, window 1, shift 0). Axes are listed slowest first.
// Sizes are in tokens.
#pragma once

#include <cstdint>

namespace swinkernels {

// The mapping between map and frame, axis by axis. For window index n and token t of an axis:
//   frame coordinate   g = n * window + t
//   source coordinate  pad_then_roll  y = (g + shift) mod frame - pad_before
//                      roll_then_pad  y = g - pad_before, and if 0 <= y < size then y = (y + shift) mod size
//   pad token          y < 0 or y >= size on any axis
// Every token of the map lies in the frame exactly once.
struct FrameGeometry {
  int32_t size[3];         // S, tokens of the map
  int32_t window[3];       // tokens of a window; their product is N
  int32_t shift[3];        // 0 <= shift < frame
  int32_t frame[3];        // P, the size rounded up to whole windows
  int32_t num_windows[3];  // frame / window
  int32_t pad_before[3];   // pad tokens before the data; frame - size is their total
  bool roll_then_pad;      // timm's order; otherwise pad_then_roll
};

// The longest supported frame. Frame coordinates have 32 bits, and a coordinate plus a shift is less than twice the
// frame.
constexpr int32_t kMaxFrame = INT32_MAX / 2;

}  // namespace swinkernels
