// A row-major tile in shared memory whose 16-byte chunks are permuted within each row, so that ldmatrix and column-wise
// reads of eight consecutive rows access each of the 32 banks once.
#pragma once

#include "dtype.cuh"
#include "ptx.cuh"

namespace swinkernels {

template <class T_, int kCols_>
struct SmemTile {
  using T = T_;
  static constexpr int kCols = kCols_;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kCols / kVec;  // 16-byte chunks of a row
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0);
  // Eight chunks occupy all 32 banks. If rows are shorter, kRowsPerLine rows share the banks and the same permutation.
  static constexpr int kPermuted = kChunks < 8 ? kChunks : 8;
  static constexpr int kRowsPerLine = 8 / kPermuted;

  T* data;

  __device__ __forceinline__ T* chunk(int row, int c) const { return data + offset(row, c); }
  __device__ __forceinline__ T* element(int row, int col) const { return chunk(row, col / kVec) + col % kVec; }

  // Return the address that a lane passes to ldmatrix and stmatrix. `square` covers 16 rows of two chunks: the matrices
  // (rows 0-7, chunk c), (rows 8-15, c), (rows 0-7, c + 1), (rows 8-15, c + 1). `band` covers 8 rows of four chunks, or
  // of two chunks if a row has only two. row and c must be multiples of these numbers of rows and chunks.
  __device__ __forceinline__ T* square(int row, int c) const {
    return chunk(row + threadIdx.x % 16, c + threadIdx.x % 32 / 16);
  }
  __device__ __forceinline__ T* band(int row, int c) const {
    return chunk(row + threadIdx.x % 8, c + threadIdx.x % 32 / 8 % kChunks);
  }
  // Returns the address for a transposed operand: like `square`, but with the second and third matrices exchanged.
  __device__ __forceinline__ T* transposed_square(int row, int c) const {
    return chunk(row + threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, c + threadIdx.x / 8 % 2);
  }

  // Returns the number of elements from the start of the tile to a chunk.
  __device__ __forceinline__ static int offset(int row, int c) {
    return row * kCols + (c ^ (row / kRowsPerLine % kPermuted)) * kVec;
  }
};

// The byte offsets of a lane's addresses, which are the same in every tile of one shape. Keeping them in registers
// avoids computing the permutation in a loop.
template <class Tile>
struct LaneOffsets {
  int square, band, transposed_square;

  __device__ static __forceinline__ LaneOffsets of() {
    const int lane = threadIdx.x % 32, element = static_cast<int>(sizeof(typename Tile::T));
    return {ptx::opaque(Tile::offset(lane % 16, lane / 16) * element),
            ptx::opaque(Tile::offset(lane % 8, lane / 8 % Tile::kChunks) * element),
            ptx::opaque(Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) * element)};
  }
};

// A tile with its lane offsets in registers.
template <class Tile_>
struct LocatedTile : Tile_ {
  using Tile = Tile_;
  using T = typename Tile::T;
  LaneOffsets<Tile> lane;

  __device__ __forceinline__ LocatedTile(T* tile, const LaneOffsets<Tile>& offsets) : Tile{tile}, lane(offsets) {}
  __device__ __forceinline__ T* square(int row, int c) const { return at(lane.square, row, c); }
  __device__ __forceinline__ T* band(int row, int c) const { return at(lane.band, row, c); }
  __device__ __forceinline__ T* transposed_square(int row, int c) const { return at(lane.transposed_square, row, c); }

 private:
  // row is a multiple of 8, so the permutation depends only on the lane. The bits of c must not overlap the bits of the
  // lanes' chunk indices.
  __device__ __forceinline__ T* at(int offset, int row, int c) const {
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(Tile::data + row * Tile::kCols) + (offset ^ c * 16));
  }
};

// Writes a 16 x (8 * kTiles) accumulator fragment (PTX layout, see ptx.cuh) to rows row0.. of a tile, but only columns
// below col_limit and, with kLimitRows, rows below row_limit. row0 is a multiple of 8. Elements past the limits keep
// their values, because zeros there must not be overwritten with sums that may be NaN.
template <bool kLimitRows, int kTiles, class Tile>
__device__ __forceinline__ void write_fragment(const Tile& tile, int row0, const float (&x)[kTiles][4], float factor0,
                                               float factor1, int row_limit, int col_limit) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool write0 = !kLimitRows || row0 + g < row_limit, write1 = !kLimitRows || row0 + g + 8 < row_limit;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    // The chunks of row + 8 are permuted like the chunks of row.
    const int col = 8 * j + 2 * t;
    typename Tile::T* const destination = tile.element(row0 + g, col);
    const bool in_columns = col < col_limit, both = col + 1 < col_limit;
    if (write0 && in_columns) store2(destination, x[j][0] * factor0, both ? x[j][1] * factor0 : 0.0f);
    if (write1 && in_columns) store2(destination + 8 * Tile::kCols, x[j][2] * factor1, both ? x[j][3] * factor1 : 0.0f);
  }
}

// Writes an accumulator fragment, 16 x (8 * kTiles), packed by pairs, to rows row0.. of a tile of 16-bit elements:
// x[j][half] contains columns 2t, 2t + 1 of tile j in row g + 8 * half. Uses stmatrix if kByMatrix.
template <bool kByMatrix = ptx::kHasStmatrix, int kTiles, class Tile>
__device__ __forceinline__ void write_packed(const Tile& tile, int row0, const uint32_t (&x)[kTiles][2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; j += kByMatrix ? 2 : 1) {
    if constexpr (!kByMatrix) {
      uint32_t* const destination = reinterpret_cast<uint32_t*>(tile.element(row0 + g, 8 * j + 2 * t));
      destination[0] = x[j][0];
      destination[8 * Tile::kCols / 2] = x[j][1];  // the chunks of row + 8 are permuted like the chunks of row
    } else if (j + 1 < kTiles) {
      ptx::stmatrix_x4(tile.square(row0, j), {x[j][0], x[j][1], x[j + 1][0], x[j + 1][1]});
    } else {
      ptx::stmatrix_x2(tile.square(row0, j), {x[j][0], x[j][1]});
    }
  }
}

// Like write_packed, but only for rows below row_limit; other rows keep their elements.
template <int kTiles, class Tile>
__device__ __forceinline__ void write_packed_below(const Tile& tile, int row0, int row_limit,
                                                   const uint32_t (&x)[kTiles][2]) {
  if (row0 + 16 <= row_limit) return write_packed(tile, row0, x);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    uint32_t* const destination = reinterpret_cast<uint32_t*>(tile.element(row0 + g, 8 * j + 2 * t));
    if (row0 + g < row_limit) destination[0] = x[j][0];
    if (row0 + g + 8 < row_limit) destination[8 * Tile::kCols / 2] = x[j][1];
  }
}

}  // namespace swinkernels
