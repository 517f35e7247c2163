// Long windows (more than one block of keys) of the plain kind: v1 with a bias table, a dense bias or no bias, or v2
// with a table or no bias; no dropout, rows whose size is a multiple of 16 bytes, and maps with a constant stride
// between tokens in image order. This file addresses their tokens and bias, and copies their rows.
//
// Tokens    The position of a token in the map is a sum of three terms, one per axis, and so is its region; a sum of at
//           least kPadNumber marks a pad token. The terms of a window are computed first, one per thread; then each of
//           its tokens takes three loads. A token is identified by its index in image order (`number`), which is the
//           same in all maps.
// Bias      The table is stored in shared memory, times log2(e), in an order in which neighbouring columns of a tile of
//           scores have neighbouring entries; columns are keys, or queries if scores are transposed. If the rows of the
//           window have even length, tokens 2n and 2n + 1 are neighbours. The rows of the table are then padded to an
//           even length, and a second copy is shifted by one entry, so that one aligned load of 8 bytes reads the bias
//           of both. A dense bias is read from global memory, and multiplied by log2(e) after the load.
// Norms     For v2, the inverse norms of a window's rows are computed once per window, from global memory.
// Copies    A thread copies the same chunk of the same rows of every block.
#pragma once

#include <cstdint>

#include "../../common/ptx.cuh"
#include "../../common/smem_tile.cuh"
#include "arguments.cuh"
#include "cosine.cuh"
#include "tokens.cuh"

namespace swinkernels::cuda {

// A map with one stride, in bytes, between consecutive tokens.
struct RegularMap {
  uint64_t data, batch, head;
  uint32_t token;
};

// The bias table in shared memory. The strides of r(t) (see WindowGeometry) differ from those in global memory.
struct SharedTable {
  int32_t stride[3];
  int32_t middle;   // the entry of relative offset zero
  int32_t entries;  // entries of one copy
  bool has_pairs;

  static SharedTable of(const WindowLayout& layout) {
    SharedTable table = {};
    const int32_t (&window)[3] = layout.table_window;
    table.has_pairs = window[2] % 2 == 0;
    table.stride[2] = 1;
    table.stride[1] = 2 * window[2] - (table.has_pairs ? 0 : 1);
    table.stride[0] = table.stride[1] * (2 * window[1] - 1);
    for (int axis = 0; axis < 3; ++axis) table.middle += (window[axis] - 1) * table.stride[axis];
    table.entries = table.stride[0] * (2 * window[0] - 1) + table.has_pairs;  // a pair may extend past the last entry
    return table;
  }

  // Return the start of the shifted copy, which is offset by 16 banks from the first copy, and the size of all
  // copies, in floats.
  __host__ __device__ int32_t copy_stride() const { return (entries + 31) / 32 * 32 + 16; }
  __host__ __device__ int32_t floats() const { return has_pairs ? 2 * copy_stride() : copy_stride(); }

  // Returns the position of an entry, given its index in the table in global memory.
  __device__ __forceinline__ int32_t at(const WindowLayout& layout, int entry) const {
    int32_t at = 0;
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int width = 2 * layout.table_window[axis] - 1;
      at += entry % width * stride[axis];
      entry /= width;
    }
    return at;
  }

  // Returns r(t) of a token.
  __device__ __forceinline__ int32_t offset(const WindowLayout& layout, int token) const {
    const int row = token / layout.table_window[2];
    return row / layout.table_window[1] * stride[0] + row % layout.table_window[1] * stride[1] +
           token % layout.table_window[2];
  }
};

template <int kMaps>
struct LongArguments : WindowArguments<kMaps> {
  RegularMap regular[kMaps];
  SharedTable table;  // for a dense bias, only has_pairs is set: true if one 8-byte load may read the bias of two keys
  bool has_pads;
};

// Calls with larger tables use the general kernels, which read the table from global memory.
constexpr int32_t kMostSharedTableFloats = 12 * 1024;

// The contribution of one axis to a token's number and to its region.
struct AxisTerm {
  uint32_t number;
  int32_t region;
};

// Token numbers from this one on denote pad tokens; maps have fewer tokens.
constexpr uint32_t kPadNumber = uint32_t{1} << 30;

// Completes `args`. Returns false if the kernels for plain long windows do not support its maps or geometry.
template <int kMaps>
bool make_long(LongArguments<kMaps>& args) {
  const WindowLayout& layout = args.layout;
  uint64_t tokens = 1;
  args.has_pads = false;
  for (int axis = 0; axis < 3; ++axis) {
    tokens *= layout.size[axis];
    if (tokens >= kPadNumber) return false;
    args.has_pads |= layout.frame[axis] != layout.size[axis];
  }
  for (int map = 0; map < kMaps; ++map) {
    const MapAddress& address = args.maps[map];
    // The stride of an axis with one token is never used.
    uint64_t expected = 0;
    bool found = false;
    for (int axis = 2; axis >= 0; --axis) {
      if (layout.size[axis] == 1) continue;
      if (found && address.strides.axis[axis] != expected) return false;
      if (!found) args.regular[map].token = static_cast<uint32_t>(address.strides.axis[axis]);
      if (!found && address.strides.axis[axis] != args.regular[map].token) return false;
      found = true;
      expected = address.strides.axis[axis] * layout.size[axis];
    }
    args.regular[map].data = reinterpret_cast<uint64_t>(address.data);
    args.regular[map].batch = address.strides.batch;
    args.regular[map].head = address.head;
  }
  if (args.dense_bias != nullptr) {
    args.table = {};
    args.table.has_pairs = args.num_tokens % 2 == 0 && reinterpret_cast<uintptr_t>(args.dense_bias) % 8 == 0;
    return true;
  }
  args.table = SharedTable::of(layout);
  return args.table.floats() <= kMostSharedTableFloats;
}

// The data of a window's tokens in shared memory. Arrays with a value per token have room for whole blocks of keys.
struct LongTokens {
  AxisTerm* terms;   // terms of the first, then the second, then the third axis
  uint32_t* number;  // for this window
  int32_t* region;   // for this window, valid if may_be_mixed
  int32_t* packed;   // for every window: PackedToken
  int32_t* offset;   // for every window: 4 * r(t); past the window, the value of the last token of even index

  // `data` is 16-byte aligned; capacity is even.
  __device__ static __forceinline__ LongTokens of(unsigned char* data, int terms, int capacity) {
    SmemArena arena{data};
    LongTokens tokens;
    tokens.terms = arena.take<AxisTerm>((terms + 1) / 2 * 2);
    tokens.number = arena.take<uint32_t>(capacity);
    tokens.region = arena.take<int32_t>(capacity);
    tokens.packed = arena.take<int32_t>(capacity);
    tokens.offset = arena.take<int32_t>(capacity);
    return tokens;
  }
  __host__ __device__ static int terms_of(const WindowLayout& layout) {
    return layout.window[0] + layout.window[1] + layout.window[2];
  }
  __host__ __device__ static int bytes(int terms, int capacity) {
    return (terms + 1) / 2 * 2 * static_cast<int>(sizeof(AxisTerm)) + capacity * 16;
  }

  template <int kMaps>
  __device__ __forceinline__ void fill_constants(const LongArguments<kMaps>& args, int capacity) const {
    for (int i = threadIdx.x; i < capacity; i += blockDim.x) {
      // Entries past the window repeat the entry of the first token of the last pair.
      const int last = args.num_tokens - 1, token = i <= last ? i : last / 2 * 2;
      packed[i] = PackedToken::of(args.layout, token);
      offset[i] = 4 * args.table.offset(args.layout, token);
    }
  }

  // The first step of finding a window's tokens, done by the first three warps. The caller must then synchronise all
  // threads.
  template <int kMaps>
  __device__ __forceinline__ void find_terms(const LongArguments<kMaps>& args, const WindowIndex& index) const {
    const WindowLayout& layout = args.layout;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = 0;
    const uint32_t strides[3] = {static_cast<uint32_t>(layout.size[1] * layout.size[2]),
                                 static_cast<uint32_t>(layout.size[2]), 1};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      if (warp == axis) {
        const int window = layout.window[axis], frame = layout.frame[axis], n = index.n[axis];
#pragma unroll 1
        for (int t = lane; t < window; t += 32) {
          const int g = layout.grid ? t * layout.num_windows[axis] + n : n * window + t;
          bool is_pad = false;
          const uint32_t y = layout.source(axis, g, is_pad);
          int region = 0;
          if (layout.has_regions[axis]) region = (g >= frame - window) + (g >= frame - layout.shift[axis]);
          constexpr int kPlace[3] = {9, 3, 1};
          terms[first + t] = {is_pad ? kPadNumber : y * strides[axis], region * kPlace[axis]};
        }
      }
      first += layout.window[axis];
    }
  }

  // The second step, done by all threads. Returns true if regions may differ.
  template <int kMaps>
  __device__ __forceinline__ bool find_tokens(const LongArguments<kMaps>& args, const WindowIndex& index) const {
    const WindowLayout& layout = args.layout;
    const bool mixed = may_be_mixed(layout, index);
    const AxisTerm* const second = terms + layout.window[0];
    const AxisTerm* const third = second + layout.window[1];
#pragma unroll 1
    for (int i = threadIdx.x; i < args.num_tokens; i += blockDim.x) {
      const int32_t token = packed[i];
      const AxisTerm a = terms[PackedToken::coordinate(token, 0)], b = second[PackedToken::coordinate(token, 1)],
                     c = third[PackedToken::coordinate(token, 2)];
      number[i] = a.number + b.number + c.number;
      if (mixed) {
        region[i] = layout.region_map == nullptr ? a.region + b.region + c.region : token_region(layout, index, token);
      }
    }
    return mixed;
  }
};

// Writes a head's column of the table to shared memory, in the order for scores whose columns are keys if
// kColumnsAreKeys, and queries otherwise.
template <bool kColumnsAreKeys, int kMaps>
__device__ __forceinline__ void stage_table(const LongArguments<kMaps>& args, int head, float* shared) {
  const SharedTable& table = args.table;
  const WindowLayout& layout = args.layout;
  for (int i = threadIdx.x; i < table.floats(); i += blockDim.x) shared[i] = 0.0f;
  if (args.bias_table == nullptr) return;
  __syncthreads();
  for (int entry = threadIdx.x; entry < layout.table_entries; entry += blockDim.x) {
    int at = table.at(layout, entry);
    if constexpr (kColumnsAreKeys) at = 2 * table.middle - at;
    const float bias = args.bias_table[static_cast<int64_t>(entry) * args.num_heads + head] * kLog2E;
    shared[at] = bias;
    if (table.has_pairs && at > 0) shared[table.copy_stride() + at - 1] = bias;
  }
}

// The addresses in the table that belong to this thread's two rows of scores. The bias of column t is 4 * r(t) bytes
// further on.
struct RowBias {
  const unsigned char* row[2];

  template <int kMaps>
  __device__ __forceinline__ void set(int half, const LongArguments<kMaps>& args, int, const float* shared, int,
                                      int32_t row_offset) {
    const SharedTable& table = args.table;
    int at = table.middle - row_offset / 4;
    if (table.has_pairs && at % 2 != 0) at += table.copy_stride() - 1;
    row[half] = reinterpret_cast<const unsigned char*>(shared + at);
  }

  // Sets x to x * factor + bias for 8 * kTiles columns, with one factor per row. `columns` has the columns' offsets.
  template <int kTiles>
  __device__ __forceinline__ void add(float (&x)[kTiles][4], const float (&factor)[2], bool has_pairs, int,
                                      const int32_t* columns) const {
    const int t = threadIdx.x % 4;
    float bias[kTiles][4];
    if (has_pairs) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int32_t offset = columns[8 * j + 2 * t];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = *reinterpret_cast<const float2*>(row[half] + offset);
          bias[j][2 * half] = pair.x;
          bias[j][2 * half + 1] = pair.y;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int2 offset = *reinterpret_cast<const int2*>(columns + 8 * j + 2 * t);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bias[j][2 * half] = *reinterpret_cast<const float*>(row[half] + offset.x);
          bias[j][2 * half + 1] = *reinterpret_cast<const float*>(row[half] + offset.y);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[j][e] = fmaf(x[j][e], factor[e / 2], bias[j][e]);
    }
  }
};

// Replaces RowBias in a call without a bias.
struct NoRowBias {
  template <int kMaps>
  __device__ __forceinline__ void set(int, const LongArguments<kMaps>&, int, const float*, int, int32_t) {}

  template <int kTiles>
  __device__ __forceinline__ void add(float (&x)[kTiles][4], const float (&factor)[2], bool, int,
                                      const int32_t*) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[j][e] *= factor[e / 2];
    }
  }
};

// Replaces RowBias in a call with a dense bias. The head's matrix, in which row i has the bias of query i, is read from
// global memory. Rows and columns past the window use the bias of the last tokens of the window.
template <bool kColumnsAreKeys>
struct DenseRowBias {
  const float* row[2];  // the row of a query, or the column of a key
  int num_tokens;

  template <int kMaps>
  __device__ __forceinline__ void set(int half, const LongArguments<kMaps>& args, int head, const float*, int token,
                                      int32_t) {
    num_tokens = args.num_tokens;
    const int last = min(token, num_tokens - 1);
    row[half] = args.dense_bias + static_cast<int64_t>(head) * num_tokens * num_tokens +
                (kColumnsAreKeys ? last * num_tokens : last);
  }

  // Like RowBias::add; the columns are the tokens from `first` on.
  template <int kTiles>
  __device__ __forceinline__ void add(float (&x)[kTiles][4], const float (&factor)[2], bool has_pairs, int first,
                                      const int32_t*) const {
    const int t = threadIdx.x % 4;
    float bias[kTiles][4];
    if (kColumnsAreKeys && has_pairs) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int column = min(first + 8 * j + 2 * t, num_tokens - 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = *reinterpret_cast<const float2*>(row[half] + column);
          bias[j][2 * half] = pair.x;
          bias[j][2 * half + 1] = pair.y;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = min(first + 8 * j + 2 * t + e, num_tokens - 1);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            bias[j][2 * half + e] = row[half][kColumnsAreKeys ? column : column * num_tokens];
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[j][e] = fmaf(x[j][e], factor[e / 2], bias[j][e] * kLog2E);
    }
  }
};

// Adds the mask to the elements of x whose row and column have different regions.
template <int kTiles>
__device__ __forceinline__ void mask_regions(float (&x)[kTiles][4], const int32_t (&rows)[2], const int32_t* columns,
                                             float mask2) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int2 pair = *reinterpret_cast<const int2*>(columns + 8 * j + 2 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rows[half] != pair.x) x[j][2 * half] += mask2;
      if (rows[half] != pair.y) x[j][2 * half + 1] += mask2;
    }
  }
}

// Excludes the columns from `end` on from the softmax.
template <int kTiles>
__device__ __forceinline__ void mask_columns(float (&x)[kTiles][4], int end) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (8 * j + 2 * t + e % 2 >= end) x[j][e] = -INFINITY;
    }
  }
}

// Returns the address of a chunk of a head's row in the first token of an image.
__device__ __forceinline__ uint64_t chunk_base(const RegularMap& map, uint32_t batch, int head, int chunk) {
  return map.data + batch * map.batch + head * map.head + 16 * chunk;
}

// Returns 16 bytes of a pad token's q, k or v.
template <class T, int kMaps>
__device__ __forceinline__ uint4 pad_chunk(const LongArguments<kMaps>& args, int map, int head, int chunk) {
  const T* const row = static_cast<const T*>(args.pad_qkv) + (map * args.num_heads + head) * args.head_dim;
  return reinterpret_cast<const uint4*>(row)[chunk];
}

// The inverse norms of a window's rows of q and of k, in shared memory, for v2.
struct LongNorms {
  float *q, *k;  // one value per token; zero past the window

  __host__ __device__ static int bytes(int capacity) { return 8 * capacity; }
  __device__ static __forceinline__ LongNorms of(unsigned char* data, int capacity) {
    float* const norms = reinterpret_cast<float*>(data);
    return {norms, norms + capacity};
  }

  // Computes the inverse norms of a window whose tokens have been found. The caller must then synchronise all threads.
  template <class T, int kMaps>
  __device__ __forceinline__ void find(const LongArguments<kMaps>& args, uint32_t batch, int head,
                                       const uint32_t* numbers, int capacity) const {
    const uint64_t base[2] = {chunk_base(args.regular[0], batch, head, 0), chunk_base(args.regular[1], batch, head, 0)};
#pragma unroll 1
    for (int i = threadIdx.x; i < capacity; i += blockDim.x) {
      const uint32_t number = i < args.num_tokens ? numbers[i] : kPadNumber;
#pragma unroll
      for (int map = 0; map < 2; ++map) {
        const T* row = nullptr;
        if (number < kPadNumber) {
          row = reinterpret_cast<const T*>(ptx::multiply_add_wide(number, args.regular[map].token, base[map]));
        } else if (args.pad_qkv != nullptr) {
          row = static_cast<const T*>(args.pad_qkv) + (map * args.num_heads + head) * args.head_dim;
        }
        float sum = 0.0f;
        if (row != nullptr) {
#pragma unroll 2
          for (int c = 0; c < args.row_bytes / 16; ++c) {
            const auto chunk = Chunk<T>::load(row + 8 * c);
#pragma unroll
            for (int e = 0; e < chunk.kCount; ++e) sum = fmaf(chunk.x[e], chunk.x[e], sum);
          }
        }
        (map == 0 ? q : k)[i] = i < args.num_tokens ? 1.0f / fmaxf(sqrtf(sum), kSmallestNorm) : 0.0f;
      }
    }
  }
};

// Multiplies x by one factor per column, such as the inverse norms of the columns' tokens.
template <int kTiles>
__device__ __forceinline__ void multiply_columns(float (&x)[kTiles][4], const float* columns) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * t);
    x[j][0] *= pair.x;
    x[j][1] *= pair.y;
    x[j][2] *= pair.x;
    x[j][3] *= pair.y;
  }
}

// Copies kRows rows at a time to shared memory, with all threads of a block.
template <class Tile, int kThreads, int kRows>
struct LongCopies {
  using T = typename Tile::T;
  static constexpr int kRowsPerPass = kThreads / Tile::kChunks, kPasses = kRows / kRowsPerPass;
  static_assert(kRowsPerPass % 8 == 0 && kRows % kRowsPerPass == 0);

  int row, chunk, offset;  // offset: in elements, from the start of a tile
  int limit;               // tokens of the window, or 0 if rows do not have this chunk

  template <int kMaps>
  __device__ static __forceinline__ LongCopies of(const LongArguments<kMaps>& args) {
    LongCopies copies;
    copies.row = threadIdx.x / Tile::kChunks;
    copies.chunk = threadIdx.x % Tile::kChunks;
    copies.offset = Tile::offset(copies.row, copies.chunk);
    copies.limit = copies.chunk * 16 < args.row_bytes ? args.num_tokens : 0;
    return copies;
  }

  // Starts copying the rows of tokens [first, first + kRows) of a window from maps to tiles; list[n] is the index of
  // the n-th map. Rows past the window and columns past head_dim become zero, and so do pad tokens that have no row in
  // pad_qkv.
  template <int kCount, int kMaps>
  __device__ __forceinline__ void start(const LongArguments<kMaps>& args, const int (&list)[kCount], int head,
                                        const uint64_t (&base)[kCount], T* const (&tiles)[kCount],
                                        const uint32_t* numbers, int first) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int token = first + row + pass * kRowsPerPass, at = offset + pass * kRowsPerPass * Tile::kCols;
      if (token < limit) {
        const uint32_t number = numbers[token];
        if (!args.has_pads || number < kPadNumber) {
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            const uint64_t source = ptx::multiply_add_wide(number, args.regular[list[n]].token, base[n]);
            ptx::cp_async_16(ptx::shared_address(tiles[n] + at), reinterpret_cast<const void*>(source));
          }
        } else {
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            uint4 pad = make_uint4(0, 0, 0, 0);
            if (args.pad_qkv != nullptr && list[n] < 3) pad = pad_chunk<T>(args, list[n], head, chunk);
            *reinterpret_cast<uint4*>(tiles[n] + at) = pad;
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < kCount; ++n) *reinterpret_cast<uint4*>(tiles[n] + at) = make_uint4(0, 0, 0, 0);
      }
    }
  }
};

// Writes 16 rows of a tile, from row0 on, which this warp has filled, to the rows of tokens from first + row0 on in a
// map. Pad tokens are skipped.
template <class Tile, int kMaps>
__device__ __forceinline__ void store_long_rows(const LongArguments<kMaps>& args, int map, const Tile& tile, int row0,
                                                uint32_t batch, int head, const uint32_t* numbers, int first) {
  constexpr int kRowsPerPass = 32 / Tile::kChunks < 16 ? 32 / Tile::kChunks : 16;
  const int lane = threadIdx.x % 32, chunk = lane % Tile::kChunks;
  const uint64_t base = chunk_base(args.regular[map], batch, head, chunk);
  const int limit = chunk * 16 < args.row_bytes ? args.num_tokens : 0;
  __syncwarp();
#pragma unroll
  for (int pass = 0; pass < 16 / kRowsPerPass; ++pass) {
    const int row = row0 + lane / Tile::kChunks + pass * kRowsPerPass;
    if (first + row >= limit) continue;
    const uint32_t number = numbers[first + row];
    if (number >= kPadNumber) continue;
    const uint64_t destination = ptx::multiply_add_wide(number, args.regular[map].token, base);
    ptx::store_global_16(reinterpret_cast<void*>(destination), *reinterpret_cast<const uint4*>(tile.chunk(row, chunk)));
  }
  __syncwarp();
}

// Products of this warp's 16 rows, whose fragments are in registers, with rows of a tile.
template <class T, int kCols>
struct RowFragments {
  uint32_t a[kCols / 16][4];

  template <class Tile>
  __device__ __forceinline__ void load(const Tile& tile, int row0) {
#pragma unroll
    for (int step = 0; step < kCols / 16; ++step) ptx::ldmatrix_x4(a[step], tile.square(row0, 2 * step));
  }

  // c += A B^T for 16 rows of B from `row` on, a multiple of 16.
  template <class Tile>
  __device__ __forceinline__ void add_abt(float (&c)[2][4], const Tile& tile, int row) const {
    if constexpr (kCols == 16) {
      // The four matrices of the square: rows 0-7 and 8-15 of the first chunk, then of the second.
      uint32_t b[4];
      ptx::ldmatrix_x4(b, tile.square(row, 0));
      ptx::mma_m16n8k16(c[0], a[0], {b[0], b[2]}, T{});
      ptx::mma_m16n8k16(c[1], a[0], {b[1], b[3]}, T{});
    } else {
#pragma unroll
      for (int step = 0; step < kCols / 16; step += 2) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, tile.band(row + 8 * j, 2 * step));
          ptx::mma_m16n8k16(c[j], a[step], {b[0], b[1]}, T{});
          ptx::mma_m16n8k16(c[j], a[step + 1], {b[2], b[3]}, T{});
        }
      }
    }
  }
};

// o += P B for 16 columns of P, packed as an A fragment, and 16 rows of B from `row` on.
template <class T, int kColTiles, class Tile>
__device__ __forceinline__ void add_fragment_b(float (&o)[kColTiles][4], const uint32_t (&p)[4], const Tile& tile,
                                               int row) {
#pragma unroll
  for (int n = 0; n < kColTiles; n += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, tile.square(row, n));
    ptx::mma_m16n8k16(o[n], p, {b[0], b[1]}, T{});
    ptx::mma_m16n8k16(o[n + 1], p, {b[2], b[3]}, T{});
  }
}

// Packs two neighbouring 16 x 8 accumulator tiles as an A fragment of 16 x 16.
template <class T>
__device__ __forceinline__ void pack_fragment(uint32_t (&a)[4], const float (&x)[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    a[2 * j] = pack2<T>(x[j][0], x[j][1]);
    a[2 * j + 1] = pack2<T>(x[j][2], x[j][3]);
  }
}

// Multiplies 16 rows by one factor each, rounds them and writes them to a tile, from row row0 on.
template <class Tile, int kColTiles>
__device__ __forceinline__ void write_rounded(const Tile& tile, int row0, const float (&x)[kColTiles][4], float factor0,
                                              float factor1) {
  uint32_t packed[kColTiles][2];
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
    packed[n][0] = pack2<typename Tile::T>(x[n][0] * factor0, x[n][1] * factor0);
    packed[n][1] = pack2<typename Tile::T>(x[n][2] * factor1, x[n][3] * factor1);
  }
  write_packed(tile, row0, packed);
}

}  // namespace swinkernels::cuda
