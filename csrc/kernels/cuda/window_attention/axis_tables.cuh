// Decomposed relative positions (axis_tables), as in SAM and ViTDet, for the plain kernels for long windows.
//
// Maths     score(i, j) += sum over the two axes a of q_i . R_a[i_a - j_a + w_a - 1], with q unscaled. The matrix A has
//           kAxisColumns columns per axis, one per key coordinate c: A[i, c of a] = q_i . R_a[i_a - c + w_a - 1].
//           E[c of a, j] is one if key j has coordinate c on axis a, else zero, so the bias is A E.
// Steps     A warp multiplies its 16 queries by all rows of both tables, writes the products to shared memory, and
//           reads A from there as fragments, once per block of queries. Each step of 16 keys then takes eight more mma
//           instructions. E is not stored: each lane has the addresses of rows of an identity matrix, from which
//           ldmatrix assembles E.
// Rounding  The tables are float32. Each entry is split into a high and a low part of the maps' type; for float16, the
//           tables are first scaled into its range by a power of two. A is split into two bfloat16 parts for maps of
//           either type, because it may exceed float16's range.
// Limits    2D windows with up to kAxisColumns tokens per axis; head_dim as for all plain kernels.
#pragma once

#include "../../common/launch.cuh"
#include "half_range.cuh"
#include "long_windows.cuh"

namespace swinkernels::cuda {

constexpr int kAxisColumns = kMaxAxisTablesWindow;  // columns of A per axis
constexpr int kAxisRows = 4 * kAxisColumns;         // rows of both tables in shared memory, at most 62 of them used
constexpr int kAxisWords = 2 * kAxisColumns;        // words in a row of A: both axes' columns, in two parts

// Returns the number of rows of both tables.
__host__ __device__ __forceinline__ int axis_rows(const WindowLayout& layout) {
  return 2 * (layout.window[1] + layout.window[2]) - 2;
}

// Splits each of two floats into the sum of a high and a low 16-bit part. `high` and `low` hold the parts of both
// floats.
template <class T>
__device__ __forceinline__ void split2(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack2<T>(first, second);
  const float2 rounded = unpack2<T>(high);
  low = pack2<T>(first - rounded.x, second - rounded.y);
}

// Both tables times a factor, in shared memory, stored as unit * (high + low).
template <class Traits>
struct AxisTables {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  alignas(128) T high[kAxisRows * Traits::kHeadDim];
  alignas(128) T low[kAxisRows * Traits::kHeadDim];
  alignas(16) float largest[16];  // largest entry found by each warp
  float unit;                     // a power of two; 1 in bfloat16

  // All threads of the block must call this and then synchronise.
  __device__ __forceinline__ void fill(const WindowLayout& layout, const float* tables, int head_dim, float factor) {
    const int rows = axis_rows(layout);
    int exponent = 0;
    if constexpr (kHasNarrowRange<T>) {
      float found = 0.0f;
      for (int i = threadIdx.x; i < rows * head_dim; i += blockDim.x) found = fmaxf(found, fabsf(tables[i]));
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) found = fmaxf(found, __shfl_xor_sync(0xffffffffu, found, lanes));
      if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = found;
      __syncthreads();
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) found = fmaxf(found, largest[warp]);
      // The largest entry becomes about 2 ** 13, so the low part of an entry is only denormal if the entry is tiny.
      exponent = max((__float_as_int(found) >> 23) - 127 - 13, -100);
      factor *= power_of_two(-exponent);
    }
    if (threadIdx.x == 0) unit = power_of_two(exponent);
    for (int i = threadIdx.x; i < kAxisRows * Traits::kHeadDim / 2; i += blockDim.x) {
      const int row = i / (Traits::kHeadDim / 2), col = i % (Traits::kHeadDim / 2) * 2;
      float2 x = make_float2(0.0f, 0.0f);
      if (row < rows && col < head_dim) x = *reinterpret_cast<const float2*>(tables + row * head_dim + col);
      uint32_t parts[2];
      split2<T>(x.x * factor, x.y * factor, parts[0], parts[1]);
      *reinterpret_cast<uint32_t*>(Tile{high}.element(row, col)) = parts[0];
      *reinterpret_cast<uint32_t*>(Tile{low}.element(row, col)) = parts[1];
    }
  }
};

// E as the right operand of matrix products, in shared memory: for A E if kKeysAreColumns, otherwise for dS E^T.
template <class T, bool kKeysAreColumns>
struct KeyColumns {
  alignas(16) T identity[2][kAxisColumns][8];  // two chunks of 8 columns

  // Returns the array that follows this struct in shared memory: for every 16 keys and each lane, the addresses of the
  // rows that the lane passes to two ldmatrix instructions, as byte offsets from the start of shared memory. The array
  // is for `keys` keys, a multiple of 16.
  __device__ __forceinline__ int2* places() { return reinterpret_cast<int2*>(this + 1); }
  __host__ __device__ static int bytes(int keys) {
    return static_cast<int>(sizeof(KeyColumns)) + 2 * keys * static_cast<int>(sizeof(int2));
  }

  // All threads of the block must call this and then synchronise.
  __device__ __forceinline__ void fill(const WindowLayout& layout, int keys) {
    for (int i = threadIdx.x; i < 8 * kAxisColumns; i += blockDim.x) {
      const int chunk = i / (4 * kAxisColumns), row = i / 4 % kAxisColumns, pair = i % 4, col = 8 * chunk + 2 * pair;
      store2(&identity[chunk][row][2 * pair], row == col ? 1.0f : 0.0f, row == col + 1 ? 1.0f : 0.0f);
    }
    const int start = static_cast<int>(reinterpret_cast<unsigned char*>(identity) - dynamic_smem());
    for (int i = threadIdx.x; i < 2 * keys; i += blockDim.x) {
      const int lane = i % 32;
      int32_t place[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        // The matrices have 8 keys and 8 columns: one ldmatrix loads both axes of 8 keys, or one axis of 16 keys.
        const int key = i / 32 * 16 + (kKeysAreColumns ? 8 * n + lane % 8 : lane % 16);
        const int axis = kKeysAreColumns ? lane / 16 : n, chunk = kKeysAreColumns ? lane / 8 % 2 : lane / 16;
        const int32_t token = PackedToken::of(layout, min(key, layout.window[1] * layout.window[2] - 1));
        place[n] = start + (chunk * kAxisColumns + PackedToken::coordinate(token, 1 + axis)) * 16;
      }
      places()[i] = make_int2(place[0], place[1]);
    }
  }

  // Loads E for 16 keys as two groups of fragments: one for every 8 keys if kKeysAreColumns, otherwise one per axis.
  __device__ __forceinline__ void load(uint32_t (&e)[2][4], int key) {
    const int2 place = places()[2 * key + threadIdx.x % 32];
    if constexpr (kKeysAreColumns) {
      ptx::ldmatrix_x4(e[0], dynamic_smem() + place.x);
      ptx::ldmatrix_x4(e[1], dynamic_smem() + place.y);
    } else {
      ptx::ldmatrix_x4_trans(e[0], dynamic_smem() + place.x);
      ptx::ldmatrix_x4_trans(e[1], dynamic_smem() + place.y);
    }
  }
};

using ScoreColumns = KeyColumns<__nv_bfloat16, true>;

// The rows of A for a warp's 16 queries: fragments of the high part for both axes, then of the low part.
template <class Traits>
struct AxisBias : RowFragments<__nv_bfloat16, 4 * kAxisColumns> {
  using T = typename Traits::T;
  static constexpr int kStride = kAxisRows;  // floats per row of products

  // Computes A for 16 queries, whose PackedTokens are in `packed`. `first_rows` and `last_rows`, 8 * kStride floats
  // each, are scratch memory for the products of the first and of the last 8 queries.
  __device__ __forceinline__ void set(const RowFragments<T, Traits::kHeadDim>& q, const WindowLayout& layout,
                                      AxisTables<Traits>& tables, const int32_t* packed, float* first_rows,
                                      float* last_rows) {
    using Tile = typename AxisTables<Traits>::Tile;
    const int lane = ptx::opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4, rows = axis_rows(layout);
    const auto lane_offsets = LaneOffsets<Tile>::of();
    float* const products[2] = {first_rows + g * kStride, last_rows + g * kStride};
    __syncwarp();
#pragma unroll 1
    for (int row = 0; row < rows; row += 16) {
      float x[2][4] = {};
      q.add_abt(x, LocatedTile<Tile>{tables.high, lane_offsets}, row);
      q.add_abt(x, LocatedTile<Tile>{tables.low, lane_offsets}, row);
      if constexpr (kHasNarrowRange<T>) multiply(x, tables.unit);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        store2(products[0] + row + 8 * j + 2 * t, x[j][0], x[j][1]);
        store2(products[1] + row + 8 * j + 2 * t, x[j][2], x[j][3]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* table = products[half];
#pragma unroll
      for (int axis = 0; axis < 2; ++axis) {
        const int window = layout.window[1 + axis],
                  coordinate = PackedToken::coordinate(packed[g + 8 * half], 1 + axis);
        const float* const met = table + coordinate + window - 1 - 2 * t;  // product for column 2t
        float x[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = n / 2 * 8 + n % 2;
          x[n] = 2 * t + column < window ? met[-column] : 0.0f;
        }
        split2<__nv_bfloat16>(x[0], x[1], this->a[axis][half], this->a[2 + axis][half]);
        split2<__nv_bfloat16>(x[2], x[3], this->a[axis][2 + half], this->a[2 + axis][2 + half]);
        table += 2 * window - 1;
      }
    }
    __syncwarp();
  }

  // Store the low part in a tile of 16-bit numbers, from row row0 on, and load it from there.
  template <class Tile>
  __device__ __forceinline__ void store_low(const Tile& tile, int row0) const {
    uint32_t packed[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      packed[n][0] = this->a[2 + n / 2][n % 2 * 2];
      packed[n][1] = this->a[2 + n / 2][n % 2 * 2 + 1];
    }
    write_packed(tile, row0, packed);
    __syncwarp();
  }
  template <class Tile>
  __device__ __forceinline__ void load_low(const Tile& tile, int row0) {
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) ptx::ldmatrix_x4(this->a[2 + axis], tile.square(row0, 2 * axis));
  }

  // Sets x to x * factor + bias, for the 16 keys from `key` on.
  __device__ __forceinline__ void add(float (&x)[2][4], float factor, ScoreColumns& columns, int key) const {
    uint32_t e[2][4];
    columns.load(e, key);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float bias[4] = {};
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        ptx::mma_m16n8k16(bias, this->a[part], {e[j][part % 2 * 2], e[j][part % 2 * 2 + 1]}, __nv_bfloat16{});
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) x[j][n] = fmaf(x[j][n], factor, bias[n]);
    }
  }
};

}  // namespace swinkernels::cuda
