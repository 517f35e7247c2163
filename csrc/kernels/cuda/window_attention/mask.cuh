// The mask between tokens of different shift regions.
#pragma once

#include <cstdint>

namespace swinkernels::cuda {

// Adds the mask to the scores of 16 queries and a block of keys. `queries` and `keys` point to the regions of the first
// query and of the first key.
template <int kTiles>
__device__ __forceinline__ void add_mask(float (&score)[kTiles][4], const int32_t* queries, const int32_t* keys,
                                         float mask2) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Regions past the window are undefined, which is harmless, because no result depends on those rows and columns.
  const int32_t row_region[2] = {queries[g], queries[g + 8]};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int2 cols = *reinterpret_cast<const int2*>(keys + 8 * j + 2 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row_region[half] != cols.x) score[j][2 * half] += mask2;
      if (row_region[half] != cols.y) score[j][2 * half + 1] += mask2;
    }
  }
}

}  // namespace swinkernels::cuda
