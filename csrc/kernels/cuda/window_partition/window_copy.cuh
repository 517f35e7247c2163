// Shift, padding and window partition in one pass, and the inverse: rows of a map to rows of windows, or back.
//
// Maths     partition windows[b, n, t, c] = map[b, y(n, t), c], zero if token t of window n is a pad token
//           reverse    map[b, y(n, t), c] = windows[b, n, t, c]
//           FrameGeometry defines y, a one-to-one map from the tokens that are not padding to the tokens of the map.
// Tiling    The rows of all windows, one after another, are cut into vectors, and each block copies 1,024 of them
//           regardless of the length of a row, so no lane idles. First the block computes the two offsets of each row
//           that it copies, once per row, and stores them in shared memory; then each thread loads four vectors before
//           it stores the first. Reverse also processes the rows in the order of the windows. The order of the map
//           would make its stores linear and its loads scattered, but the contiguous runs in DRAM would be the same
//           window * C elements, because a row of tokens in a window is contiguous on both sides. With one order, one
//           kernel serves both directions, and reverse has no traffic for pad tokens.
// Traffic   partition  (S + P) * B * C * sizeof(T) bytes, for maps of S tokens in frames of P
//           reverse    2 * S * B * C * sizeof(T)
// Roofline  memory bound. B=128, 56x56, C=96, window 7, bf16: 154 MB, 46 us at 3.35 TB/s (H100 SXM, published peak).
//           Instructions, counted in the sm_90 code: about 1,550 by the warps of a block, 4,704 blocks, 8 us of issue
//           slots. 34 registers: six blocks, 1,536 threads with 64 bytes in flight each, per multiprocessor.
//           A narrower vector takes as many instructions as a wide one: 54 us at C=97 in bf16, with rows aligned to two
//           bytes.
// Limits    none on size, dtype or stride. 16-byte vectors need rows, strides and pointers that are multiples
//           of 16 bytes; otherwise vectors are the widest of 8, 4, 2 and 1 bytes that these allow.
#pragma once

#include <cstdint>

#include "../../common/fast_divisor.cuh"
#include "../../common/frame_layout.cuh"
#include "../../common/launch.cuh"
#include "../../common/map_strides.cuh"

// Defaults that are still to be chosen by measurement on a GPU: gpu/variants.py builds variants with other values of
// these macros, and the step "variants" times them.
#ifndef SWINKERNELS_COPY_THREADS
#define SWINKERNELS_COPY_THREADS 256
#endif
#ifndef SWINKERNELS_COPY_VECTORS
#define SWINKERNELS_COPY_VECTORS 4
#endif

namespace swinkernels::cuda {

// The work of one block.
struct WindowCopyTile {
  static constexpr int kThreads = SWINKERNELS_COPY_THREADS;
  static constexpr int kVectorsPerThread = SWINKERNELS_COPY_VECTORS;
  static constexpr int kVectors = kThreads * kVectorsPerThread;
};

// The arguments of one launch, which copies a box of windows. The windows of a box are contiguous (see WindowBoxes).
struct WindowCopyArguments {
  // The pointer to the map points to the box's first image, the pointer to windows to the box's first window.
  const char* source;
  char* destination;
  bool to_windows;  // true if windows are the destination, false if they are the source
  FrameLayout frame;
  uint32_t first_window[3];  // coordinates of the box's first window in its image
  RowMajorDivisor windows;   // in the box
  RowMajorDivisor tokens;    // in a window
  FastDivisor vectors;       // in a row
  uint32_t num_rows;         // in the box
  MapStrides map;
  uint64_t window_stride, token_stride;  // bytes
};

// Byte offsets of a row in source and destination. A negative source means that nothing is loaded and the row is zero,
// a negative destination that the row is not stored. kNothing plus the offset of any column is still negative.
struct alignas(16) RowCopy {
  static constexpr int64_t kNothing = INT64_MIN;
  int64_t source, destination;
};

__device__ __forceinline__ RowCopy row_copy(const WindowCopyArguments& args, uint32_t row) {
  if (row >= args.num_rows) return {RowCopy::kNothing, RowCopy::kNothing};
  uint32_t token[3], n[3], y[3];
  const uint32_t window = args.tokens.divide(row, token);
  const uint32_t image = args.windows.divide(window, n);
  bool is_pad = false;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const uint32_t g = (args.first_window[axis] + n[axis]) * args.frame.window[axis] + token[axis];
    y[axis] = args.frame.source(axis, static_cast<int>(g), is_pad);
  }
  const uint32_t token_number = row - window * args.tokens.volume.divisor;
  const int64_t in_windows = window * args.window_stride + token_number * args.token_stride;
  const int64_t in_map = is_pad ? RowCopy::kNothing : static_cast<int64_t>(args.map.offset(image, y));
  if (args.to_windows) return {in_map, in_windows};
  return {is_pad ? RowCopy::kNothing : in_windows, in_map};
}

template <class Vector>
__global__ void __launch_bounds__(WindowCopyTile::kThreads) window_copy_kernel(const WindowCopyArguments args) {
  using Tile = WindowCopyTile;
  const auto rows = reinterpret_cast<RowCopy*>(dynamic_smem());
  uint32_t first_column, last_column;
  const uint32_t first_row = args.vectors.divide(blockIdx.x * Tile::kVectors, &first_column);
  const uint32_t last_row = args.vectors.divide(first_column + Tile::kVectors - 1, &last_column);
  for (uint32_t i = threadIdx.x; i <= last_row; i += Tile::kThreads) rows[i] = row_copy(args, first_row + i);
  __syncthreads();

  int64_t source[Tile::kVectorsPerThread], destination[Tile::kVectorsPerThread];
#pragma unroll
  for (int k = 0; k < Tile::kVectorsPerThread; ++k) {
    uint32_t column;
    const uint32_t i = first_column + threadIdx.x + k * Tile::kThreads;
    const RowCopy row = rows[args.vectors.divide(i, &column)];
    source[k] = row.source + column * sizeof(Vector);
    destination[k] = row.destination + column * sizeof(Vector);
  }
  // These are plain loads: with __ldg, the compiler could move a store, which waits for its own load, ahead of the
  // remaining loads.
  Vector value[Tile::kVectorsPerThread];
#pragma unroll
  for (int k = 0; k < Tile::kVectorsPerThread; ++k) {
    value[k] = source[k] < 0 ? Vector{} : *reinterpret_cast<const Vector*>(args.source + source[k]);
  }
#pragma unroll
  for (int k = 0; k < Tile::kVectorsPerThread; ++k) {
    if (destination[k] >= 0) *reinterpret_cast<Vector*>(args.destination + destination[k]) = value[k];
  }
}

}  // namespace swinkernels::cuda
