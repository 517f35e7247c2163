// A row-major tile in shared memory whose 16-byte chunks are permuted within a row, so that ldmatrix and column-wise
// reads of eight consecutive rows touch all 32 banks once.
#pragma once

#include "dtype.cuh"

namespace swinkernels {

template <class T_, int kCols_>
struct SmemTile {
  using T = T_;
  static constexpr int kCols = kCols_;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kCols / kVec;  // 16-byte chunks of a row
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0);
  // Eight chunks fill the 32 banks once; narrower rows share them, so the permutation changes every kRowsPerLine rows.
  static constexpr int kPermuted = kChunks < 8 ? kChunks : 8;
  static constexpr int kRowsPerLine = 8 / kPermuted;

  T* data;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    return data + row * kCols + (c ^ (row / kRowsPerLine % kPermuted)) * kVec;
  }
  __device__ __forceinline__ T* element(int row, int col) const { return chunk(row, col / kVec) + col % kVec; }
};

// Writes a 16 x (8 * kTiles) accumulator fragment (PTX layout, see ptx.cuh) to rows row0.. of a tile, columns below
// col_limit (a multiple of 8 if kWholeTiles) only and, if asked, rows below row_limit only. row0 is a multiple of 8.
// What lies past the limits stays: zero there must not become NaN, even if it is a sum of products with zeros.
template <bool kLimitRows, bool kWholeTiles = false, int kTiles, class Tile>
__device__ __forceinline__ void write_fragment(const Tile& tile, int row0, const float (&x)[kTiles][4], float factor0,
                                               float factor1, int row_limit, int col_limit) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool write0 = !kLimitRows || row0 + g < row_limit, write1 = !kLimitRows || row0 + g + 8 < row_limit;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    // The chunks of row + 8 are permuted as those of row.
    const int col = 8 * j + 2 * t;
    typename Tile::T* const destination = tile.element(row0 + g, col);
    const bool in_columns = kWholeTiles ? 8 * j < col_limit : col < col_limit;
    const bool both = kWholeTiles || col + 1 < col_limit;
    if (write0 && in_columns) store2(destination, x[j][0] * factor0, both ? x[j][1] * factor0 : 0.0f);
    if (write1 && in_columns) store2(destination + 8 * Tile::kCols, x[j][2] * factor1, both ? x[j][3] * factor1 : 0.0f);
  }
}

}  // namespace swinkernels
