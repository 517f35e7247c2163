// Keeps dS in the range of float16. dS = P (dP - delta) may exceed this range although the gradients, which are
// products of dS with small keys or queries, do not. If dS exceeds the range, its rows are multiplied by a power of two
// below one, and the gradients are scaled back in float.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../common/dtype.cuh"

namespace swinkernels::cuda {

template <class T>
constexpr bool kHasNarrowRange = std::is_same_v<T, __half>;

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Returns the exponent e for which a warp's fragments times 2 ** -e are below 2 ** 15. If they are already below 2 **
// 15, which is the usual case, e is 0.
template <int kTiles>
__device__ __forceinline__ int excess_exponent(const float (&x)[kTiles][4]) {
  constexpr int kLargest = 15;
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) largest = fmaxf(largest, fabsf(x[j][e]));
  }
  if (!__any_sync(0xffffffffu, largest >= power_of_two(kLargest))) return 0;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  const int exponent = (__float_as_int(largest) >> 23) - 127;
  return exponent > 127 ? 0 : exponent - kLargest + 1;  // scaling does not help if the largest is infinite
}

template <int kTiles>
__device__ __forceinline__ void multiply(float (&x)[kTiles][4], float factor) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[j][e] *= factor;
  }
}

// Multiplies this warp's 16 rows of a tile by a factor. No other warp may read these rows at the same time.
template <class Tile>
__device__ __forceinline__ void multiply_rows(const Tile& tile, int row0, float factor) {
  __syncwarp();
  for (int i = threadIdx.x % 32; i < 8 * Tile::kCols; i += 32) {
    auto* const pair = tile.data + row0 * Tile::kCols + 2 * i;
    const float2 values = load2(pair);
    store2(pair, values.x * factor, values.y * factor);
  }
}

}  // namespace swinkernels::cuda
