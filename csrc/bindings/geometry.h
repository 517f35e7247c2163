// Describes tensors as the feature maps and frames in the params. A map has two or three spatial axes S. The params
// always have three, so a 2D map gets a leading axis of size 1.
#pragma once

#include "checks.h"
#include "params/feature_map.h"
#include "params/frame.h"

namespace swinkernels {

// Describes x (B, *S, ...), where S has `rank` axes, as a map that starts at `data`.
template <class Pointer>
FeatureMapOf<Pointer> feature_map(const Tensor& x, Pointer data, int64_t rank) {
  FeatureMapOf<Pointer> map{data, x.stride(0), {}};
  for (int64_t i = 0; i < rank; ++i) map.axis_stride[3 - rank + i] = x.stride(1 + i);
  return map;
}

// Returns the frame of a map with the spatial sizes `size`. As in the schemas, all other lists have three values.
template <class Axes>
FrameGeometry frame_geometry(const Ints& size, const Axes& window_size, const Axes& shift_size, const Axes& pad_before,
                             bool roll_then_pad) {
  const int64_t rank = static_cast<int64_t>(size.size());
  STD_TORCH_CHECK(rank == 2 || rank == 3, "swinkernels: a map has two or three axes");
  for (const Axes* list : {&window_size, &shift_size, &pad_before}) {
    STD_TORCH_CHECK(list->size() == 3, "swinkernels: every geometry list has three values, slowest axis first");
  }
  FrameGeometry g{};
  for (int64_t i = 0; i < 3; ++i) {
    const bool leading = i < 3 - rank;
    const int64_t tokens = leading ? 1 : size[i - (3 - rank)], window = window_size[i];
    STD_TORCH_CHECK(tokens > 0 && tokens <= kMaxFrame && window > 0 && window <= kMaxFrame,
                    "swinkernels: an axis of the map and of the window has 1 to ", kMaxFrame, " tokens");
    STD_TORCH_CHECK(!leading || window == 1, "swinkernels: a 2D map must have a leading window of 1");
    const int64_t num_windows = (tokens + window - 1) / window, frame = num_windows * window;
    STD_TORCH_CHECK(frame <= kMaxFrame && shift_size[i] >= 0 && shift_size[i] < frame && pad_before[i] >= 0 &&
                        pad_before[i] <= frame - tokens,
                    "swinkernels: a frame has at most ", kMaxFrame,
                    " tokens on an axis, the shift is less than the frame, and pad_before is at most the padding");
    g.size[i] = static_cast<int32_t>(tokens);
    g.window[i] = static_cast<int32_t>(window);
    g.shift[i] = static_cast<int32_t>(shift_size[i]);
    g.frame[i] = static_cast<int32_t>(frame);
    g.num_windows[i] = static_cast<int32_t>(num_windows);
    g.pad_before[i] = static_cast<int32_t>(pad_before[i]);
  }
  g.roll_then_pad = roll_then_pad;
  return g;
}

inline int64_t product(const int32_t (&v)[3]) { return int64_t{1} * v[0] * v[1] * v[2]; }

}  // namespace swinkernels
