// Dropout of attention weights. The seed, the window, the head, the query and the key determine whether an attention
// weight is dropped. The backward pass therefore drops the same attention weights as the forward pass, even with other
// tile sizes.
#pragma once

#include <cstdint>

#include "../../common/philox.cuh"
#include "arguments.cuh"

namespace swinkernels::cuda {

// Draws random numbers for 16 queries from row0 on (a multiple of 16) and a block of keys from col0 on (a multiple of
// 2). In the result, bit 4 * j + e is set if element [j][e] of this thread's fragment is kept. One call of philox gives
// the random numbers of queries i, i + 8 and keys j, j + 1: that of query i and key j in a window and head is word
// 2 * (i / 8 % 2) + j % 2 for counter (j / 2, i / 16 * 8 + i % 8, window * num_heads + head).
template <int kTiles, int kMaps>
__device__ __forceinline__ uint32_t kept_weights(const WindowArguments<kMaps>& args, uint32_t window, int head,
                                                 int row0, int col0) {
  static_assert(4 * kTiles <= 32);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint64_t seed = static_cast<uint64_t>(*args.dropout_seed);
  const uint2 key = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t of_head = static_cast<uint64_t>(window) * args.num_heads + head;
  uint32_t kept = 0;
#pragma unroll 1
  for (int j = 0; j < kTiles; ++j) {
    const uint4 drawn = philox(key, make_uint4(col0 / 2 + 4 * j + t, row0 / 2 + g, static_cast<uint32_t>(of_head),
                                               static_cast<uint32_t>(of_head >> 32)));
    const uint32_t below = args.dropout_below;
    const uint32_t bits = static_cast<uint32_t>(drawn.x >= below) | static_cast<uint32_t>(drawn.y >= below) << 1 |
                          static_cast<uint32_t>(drawn.z >= below) << 2 | static_cast<uint32_t>(drawn.w >= below) << 3;
    kept |= bits << 4 * j;
  }
  return kept;
}

// Keeps the elements of x whose bits are set, and zeroes the others.
template <int kTiles>
__device__ __forceinline__ void drop(float (&x)[kTiles][4], uint32_t kept) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if ((kept >> (4 * j + e) & 1) == 0) x[j][e] = 0.0f;
    }
  }
}

}  // namespace swinkernels::cuda
