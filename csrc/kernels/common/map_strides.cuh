// Offsets of tokens in a feature map.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../params/feature_map.h"

namespace swinkernels {

// Strides in bytes.
struct MapStrides {
  uint64_t batch, axis[3];

  template <class Pointer>
  static MapStrides of(const FeatureMapOf<Pointer>& map, size_t element_bytes) {
    const auto bytes = [element_bytes](int64_t stride) { return static_cast<uint64_t>(stride) * element_bytes; };
    return {bytes(map.batch_stride), {bytes(map.axis_stride[0]), bytes(map.axis_stride[1]), bytes(map.axis_stride[2])}};
  }

  // Returns `start` plus the byte offset of a token's row in the map. All factors are unsigned, so that each product
  // needs only two multiply-adds.
  __device__ __forceinline__ uint64_t offset(uint32_t batch_index, const uint32_t (&y)[3], uint64_t start = 0) const {
    return start + batch_index * batch + y[0] * axis[0] + y[1] * axis[1] + y[2] * axis[2];
  }
};

}  // namespace swinkernels
