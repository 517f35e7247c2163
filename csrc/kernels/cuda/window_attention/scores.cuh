// What the forward and the backward kernels share: their arguments, the tokens' addresses, copies between the map and
// shared memory, and the scores with bias and mask.
//
// Scores are kept in base 2: score2 = (scale * q.k + bias + mask) * log2(e), so that probabilities are exp2 of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../../common/launch.cuh"
#include "../../common/ptx.cuh"
#include "../../common/smem_tile.cuh"
#include "../../common/tile_product.cuh"
#include "../../common/window_address.cuh"
#include "traits.h"

namespace swinkernels::cuda {

// Of both kernels; kMaps token maps: q, k, v, out or q, k, v, dout, dq, dk, dv.
template <int kMaps>
struct WindowArguments {
  WindowLayout layout;
  MapAddress maps[kMaps];
  const void* pad_qkv;
  const float* bias_table;
  float scale2, mask2;  // scale and mask_value times log2(e)
  int32_t num_heads, head_dim, num_tokens;
  uint32_t num_windows;  // of all images
  bool is_float32;

  size_t element_bytes() const { return is_float32 ? 4 : 2; }

  static WindowArguments of(const WindowAttentionForwardParams& params) {
    WindowArguments args = {};
    args.is_float32 = params.dtype == DType::kFloat32;
    args.layout = WindowLayout::of(params.geometry, params.region_map);
    const ConstTokenMap inputs[3] = {params.q, params.k, params.v};
    for (int map = 0; map < 3; ++map) args.maps[map] = MapAddress::of(inputs[map], args.element_bytes());
    args.pad_qkv = params.pad_qkv;
    args.bias_table = params.bias_table;
    args.scale2 = params.scale * kLog2E;
    args.mask2 = params.mask_value * kLog2E;
    args.num_heads = params.num_heads;
    args.head_dim = params.head_dim;
    args.num_tokens = args.layout.num_tokens();
    args.num_windows = static_cast<uint32_t>(params.batch * args.layout.windows.volume.divisor);
    return args;
  }
};

// The tokens of one window: the address of their row in each map (a pad token's is what it holds in q, k, v; zero
// where there is nothing to read or write), and their regions if those may differ.
template <int kMaps, int kTokens>
struct WindowTokens {
  uint64_t row[kMaps][kTokens];
  int32_t region[kTokens];
  int32_t mixed;
};

// What of a token is the same in every window.
template <int kTokens>
struct TokenConstants {
  int32_t packed[kTokens];
  int32_t table_index[kTokens];
};

template <int kTokens, int kMaps>
__device__ __forceinline__ void fill_token_constants(TokenConstants<kTokens>& constants,
                                                     const WindowArguments<kMaps>& args) {
  for (int i = threadIdx.x; i < args.num_tokens; i += blockDim.x) {
    constants.packed[i] = PackedToken::of(args.layout, i);
    constants.table_index[i] = args.layout.table_index(i);
  }
}

// Thread i has token i, here and in fill_token_constants, if the block has as many threads.
template <class T, int kMaps, int kTokens>
__device__ __forceinline__ void locate_tokens(WindowTokens<kMaps, kTokens>& tokens,
                                              const TokenConstants<kTokens>& constants,
                                              const WindowArguments<kMaps>& args, uint32_t window, int head) {
  for (int i = threadIdx.x; i < args.num_tokens; i += blockDim.x) {
    const WindowIndex index = window_index(args.layout, window);
    const int32_t token = constants.packed[i];
    const TokenSource source = token_source(args.layout, index, token);
    if (source.is_pad) {
#pragma unroll
      for (int map = 0; map < kMaps; ++map) {
        const T* pad = nullptr;
        if (map < 3 && args.pad_qkv != nullptr) {
          pad = static_cast<const T*>(args.pad_qkv) + (map * args.num_heads + head) * args.head_dim;
        }
        tokens.row[map][i] = reinterpret_cast<uint64_t>(pad);
      }
    } else {
#pragma unroll
      for (int map = 0; map < kMaps; ++map) tokens.row[map][i] = args.maps[map].row(index.batch, head, source.y);
    }
    const bool mixed = may_be_mixed(args.layout, index);
    if (mixed) tokens.region[i] = token_region(args.layout, index, token);
    if (i == 0) tokens.mixed = mixed;
  }
}

// Starts the copy of the rows of tokens first..first + kRows of one map into a tile. Rows past the window get zeros,
// too, or are left alone; columns past head_dim are left alone.
template <int kThreads, int kRows, bool kZeroPastWindow, class Tile>
__device__ __forceinline__ void copy_rows(const Tile& tile, const uint64_t* rows, int first, int num_tokens,
                                          int head_dim) {
  constexpr int kCopies = kRows * Tile::kChunks / kThreads;
  constexpr int kUnroll = kZeroPastWindow ? 1 : kCopies;  // registers are dear in the kernels for long windows
#pragma unroll kUnroll
  for (int i = 0; i < kCopies; ++i) {
    const int index = threadIdx.x + i * kThreads, row = index / Tile::kChunks, chunk = index % Tile::kChunks;
    const bool in_window = first + row < num_tokens;
    if ((in_window || kZeroPastWindow) && chunk * Tile::kVec < head_dim) {
      const uint64_t source = in_window ? rows[first + row] : 0;
      ptx::cp_async_16(tile.chunk(row, chunk), reinterpret_cast<const void*>(source + 16 * chunk), source != 0);
    }
  }
}

// Writes 16 rows of a tile, which this warp has filled, to the rows of tokens first.. of a map. Pad tokens are dropped.
template <class Tile>
__device__ __forceinline__ void store_rows(const Tile& tile, int row0, const uint64_t* rows, int first, int num_tokens,
                                           int head_dim) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (16 * Tile::kChunks + 31) / 32; ++i) {
    const int index = threadIdx.x % 32 + 32 * i, row = row0 + index / Tile::kChunks, chunk = index % Tile::kChunks;
    if (index < 16 * Tile::kChunks && first + row < num_tokens && chunk * Tile::kVec < head_dim) {
      const uint64_t destination = rows[first + row];
      if (destination != 0) {
        *reinterpret_cast<uint4*>(destination + 16 * chunk) = *reinterpret_cast<const uint4*>(tile.chunk(row, chunk));
      }
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void fill_with_zeros(void* data, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) static_cast<uint4*>(data)[i] = make_uint4(0, 0, 0, 0);
}

// One head's column of the bias table; null data is a bias of zero. token_index holds r(t) of every token.
struct BiasColumn {
  const float* data;
  int stride;
  const int32_t* token_index;
};

// The bias column of this head, in `table` if it fits there. The caller synchronises.
template <class Traits, int kMaps>
__device__ __forceinline__ BiasColumn stage_bias_column(const WindowArguments<kMaps>& args, int head, float* table,
                                                        const int32_t* token_index) {
  if (args.bias_table == nullptr) return {nullptr, 0, token_index};
  const int entries = args.layout.table_entries;
  if (entries > Traits::kSharedTableEntries) return {args.bias_table + head, args.num_heads, token_index};
  for (int i = threadIdx.x; i < entries; i += Traits::kThreads) {
    table[i] = args.bias_table[static_cast<int64_t>(i) * args.num_heads + head];
  }
  return {table, 1, token_index};
}

// The bias in base 2 of 16 queries from row0 and the keys of a block from col0, as an accumulator fragment. Minus
// infinity for keys past the window, which takes them out of the softmax.
template <int kTiles>
__device__ __forceinline__ void load_bias(float (&bias)[kTiles][4], const BiasColumn& column, int middle, int row0,
                                          int col0, int num_tokens) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int row_index[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + g + 8 * half;
    row_index[half] = column.token_index[row < num_tokens ? row : num_tokens - 1] + middle;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = col0 + 8 * j + 2 * t + e;
      const bool is_key = col < num_tokens;
      const int col_index = is_key ? column.token_index[col] : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float value = is_key ? 0.0f : -INFINITY;
        if (is_key && column.data != nullptr)
          value = column.data[(row_index[half] - col_index) * column.stride] * kLog2E;
        bias[j][2 * half + e] = value;
      }
    }
  }
}

// Adds the mask to the scores of 16 queries from row0 and the keys of a block from col0.
template <int kTiles>
__device__ __forceinline__ void add_mask(float (&score)[kTiles][4], const int32_t* region, float mask2, int row0,
                                         int col0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Past the window there is nothing to read, but nothing to spoil either: no sum has those rows and columns.
  const int32_t row_region[2] = {region[row0 + g], region[row0 + g + 8]};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int2 cols = *reinterpret_cast<const int2*>(region + col0 + 8 * j + 2 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row_region[half] != cols.x) score[j][2 * half] += mask2;
      if (row_region[half] != cols.y) score[j][2 * half + 1] += mask2;
    }
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// How a grid is cut: blocks of one head are heads apart, so that blocks that run together read neighbouring heads of
// the same tokens, which share cache lines. Each block loops over every workers-th item of its head.
struct GridPlan {
  uint32_t workers;  // blocks per head
  uint32_t blocks;
};

inline GridPlan plan_grid(int64_t items, int num_heads, int64_t resident_blocks) {
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(items, resident_blocks / num_heads));
  const int64_t rounds = (items + most - 1) / most;  // the same for all, so that no block works alone at the end
  const int64_t workers = std::max<int64_t>(1, (items + rounds - 1) / std::max<int64_t>(1, rounds));
  return {static_cast<uint32_t>(workers), static_cast<uint32_t>(workers * num_heads)};
}

}  // namespace swinkernels::cuda
