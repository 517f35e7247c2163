// The tokens of one window: the addresses of their rows, and the copies of these rows to and from shared memory.
#pragma once

#include <cstdint>

#include "../../common/ptx.cuh"
#include "arguments.cuh"

namespace swinkernels::cuda {

// Per-token data that is the same in every window: the token's coordinates, and its indices in the bias table as a
// query and as a key (see WindowLayout).
template <int kTokens>
struct TokenConstants {
  int32_t packed[kTokens];
  int32_t query_index[kTokens], key_index[kTokens];
};

// The addresses of each token's rows in the maps, and the regions of the tokens if they may differ (`mixed`). For a pad
// token, the addresses of q, k and v are those in pad_qkv; an address is zero if there is nothing to read or write.
// Regions are read up to the end of a block, past the end of the window.
template <int kMaps, int kTokens, int kBlock>
struct WindowTokens {
  uint64_t rows[kMaps][kTokens];
  int32_t region[kBlock];
  int32_t mixed;

  __device__ __forceinline__ uint64_t* row(int map) { return rows[map]; }
  __device__ __forceinline__ const uint64_t* row(int map) const { return rows[map]; }
};

// Like TokenConstants and WindowTokens, for up to `capacity` tokens, where `capacity` is only known at run time.
struct LongTokenConstants {
  int32_t* packed;
  int32_t *query_index, *key_index;

  // query_index and key_index are the same array unless the table has table_pairs.
  __host__ __device__ static int arrays(const WindowLayout& layout) { return layout.has_table_pairs ? 3 : 2; }
  template <class Arena>
  __device__ __forceinline__ static LongTokenConstants of(Arena& arena, const WindowLayout& layout, int capacity) {
    LongTokenConstants constants = {arena.template take<int32_t>(capacity), arena.template take<int32_t>(capacity)};
    constants.key_index = constants.query_index;
    if (layout.has_table_pairs) constants.key_index = arena.template take<int32_t>(capacity);
    return constants;
  }
};

template <int kMaps>
struct LongWindowTokens {
  uint64_t* rows;
  int32_t* region;
  int32_t& mixed;
  int capacity;

  __device__ __forceinline__ uint64_t* row(int map) const { return rows + map * capacity; }
};

// Allocates arrays in the shared memory after a kernel's own struct. For alignment, arrays with larger elements must be
// allocated first.
struct SmemArena {
  unsigned char* next;

  template <class T>
  __device__ __forceinline__ T* take(int count) {
    T* taken = reinterpret_cast<T*>(next);
    next += count * sizeof(T);
    return taken;
  }
};

// Computes the constants of tokens [first, first + count), up to the end of the window.
template <class Constants, int kMaps>
__device__ __forceinline__ void fill_token_constants(Constants& constants, const WindowArguments<kMaps>& args,
                                                     int first, int count) {
  const int end = min(count, args.num_tokens - first);
  for (int i = threadIdx.x; i < end; i += blockDim.x) {
    constants.packed[i] = PackedToken::of(args.layout, first + i);
    constants.query_index[i] = args.layout.query_index(first + i);
    constants.key_index[i] = args.layout.key_index(first + i);
  }
}

// Returns the address of a token's row in a map, as stored in WindowTokens.
template <class T, int kMaps>
__device__ __forceinline__ uint64_t token_row(const WindowArguments<kMaps>& args, int map, int head,
                                              const WindowIndex& index, const TokenSource& source) {
  if (!source.is_pad) return args.maps[map].row(index.batch, head, source.y);
  if (map >= 3 || args.pad_qkv == nullptr) return 0;
  const T* pad = static_cast<const T*>(args.pad_qkv) + (map * args.num_heads + head) * args.head_dim;
  return reinterpret_cast<uint64_t>(pad);
}

// Finds the rows of tokens [first, first + count) of a window, up to its end, in the maps kMapList. Their addresses in
// the n-th map of the list are written to tokens.row(n). If the block has at least `count` threads, thread i processes
// token first + i, as in fill_token_constants.
template <class T, int... kMapList, class Tokens, class Constants, int kMaps>
__device__ __forceinline__ void locate_tokens(Tokens& tokens, const Constants& constants,
                                              const WindowArguments<kMaps>& args, uint32_t window, int head, int first,
                                              int count) {
  constexpr int kList[] = {kMapList...};
  const int end = min(count, args.num_tokens - first);
  for (int i = threadIdx.x; i < end; i += blockDim.x) {
    const WindowIndex index = window_index(args.layout, window);
    const int32_t token = constants.packed[i];
    const TokenSource source = token_source(args.layout, index, token);
#pragma unroll
    for (int n = 0; n < static_cast<int>(sizeof...(kMapList)); ++n) {
      tokens.row(n)[i] = token_row<T>(args, kList[n], head, index, source);
    }
    const bool mixed = may_be_mixed(args.layout, index);
    if (mixed) tokens.region[i] = token_region(args.layout, index, token);
    if (i == 0) tokens.mixed = mixed;
  }
}

// Starts copying the rows of tokens [first, first + kRows) of one map to a tile; rows[0] belongs to token 0. Rows past
// the window are set to zero if kZeroPastWindow and keep their values otherwise. Columns past head_dim keep their
// values. whole_rows: the size of a row is a multiple of 16 bytes.
template <int kThreads, int kRows, bool kZeroPastWindow, class Tile>
__device__ __forceinline__ void copy_rows(const Tile& tile, const uint64_t* rows, int first, int num_tokens,
                                          int row_bytes, bool whole_rows) {
  if (whole_rows) {
    constexpr int kCopies = kRows * Tile::kChunks / kThreads;
    constexpr int kUnroll = kZeroPastWindow ? 1 : kCopies;  // registers are scarce in the kernels for long windows
#pragma unroll kUnroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = threadIdx.x + i * kThreads, row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const bool in_window = first + row < num_tokens;
      if ((in_window || kZeroPastWindow) && chunk * 16 < row_bytes) {
        const uint64_t source = in_window ? rows[first + row] : 0;
        ptx::cp_async_16(tile.chunk(row, chunk), reinterpret_cast<const void*>(source + 16 * chunk), source != 0);
      }
    }
    return;
  }
  // Other rows may begin and end at any element. They are copied in words of four bytes if they consist of whole words,
  // and otherwise element by element.
  constexpr int kWords = 4 * Tile::kChunks;
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * kWords; index += kThreads) {
    const int row = index / kWords, word = index % kWords;
    const bool in_window = first + row < num_tokens;
    if ((!in_window && !kZeroPastWindow) || word * 4 >= row_bytes) continue;
    const uint64_t source = in_window ? rows[first + row] : 0;
    uint32_t* const destination = reinterpret_cast<uint32_t*>(tile.chunk(row, word / 4)) + word % 4;
    if (row_bytes % 4 == 0) {
      ptx::cp_async_4(destination, reinterpret_cast<const void*>(source + 4 * word), source != 0);
    } else {
      const uint16_t* const halves = reinterpret_cast<const uint16_t*>(source) + 2 * word;
      const uint32_t low = source == 0 ? 0 : halves[0], high = source == 0 || word * 4 + 2 >= row_bytes ? 0 : halves[1];
      *destination = low | high << 16;
    }
  }
}

// Writes 16 rows of a tile, which this warp has filled, to the rows of tokens from `first` on in a map. Rows of pad
// tokens are skipped.
template <class Tile>
__device__ __forceinline__ void store_rows(const Tile& tile, int row0, const uint64_t* rows, int first, int num_tokens,
                                           int row_bytes, bool whole_rows) {
  __syncwarp();
  if (whole_rows) {
#pragma unroll
    for (int i = 0; i < (16 * Tile::kChunks + 31) / 32; ++i) {
      const int index = threadIdx.x % 32 + 32 * i, row = row0 + index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (index < 16 * Tile::kChunks && first + row < num_tokens && chunk * 16 < row_bytes) {
        const uint64_t destination = rows[first + row];
        if (destination != 0) {
          *reinterpret_cast<uint4*>(destination + 16 * chunk) = *reinterpret_cast<const uint4*>(tile.chunk(row, chunk));
        }
      }
    }
    return;
  }
  constexpr int kWords = 4 * Tile::kChunks;
#pragma unroll 1
  for (int index = threadIdx.x % 32; index < 16 * kWords; index += 32) {
    const int row = row0 + index / kWords, word = index % kWords;
    if (first + row >= num_tokens || word * 4 >= row_bytes) continue;
    const uint64_t destination = rows[first + row];
    if (destination == 0) continue;
    const uint32_t bits = reinterpret_cast<const uint32_t*>(tile.chunk(row, word / 4))[word % 4];
    if (row_bytes % 4 == 0) {
      reinterpret_cast<uint32_t*>(destination)[word] = bits;
    } else {
      uint16_t* const halves = reinterpret_cast<uint16_t*>(destination) + 2 * word;
      halves[0] = static_cast<uint16_t>(bits);
      if (word * 4 + 2 < row_bytes) halves[1] = static_cast<uint16_t>(bits >> 16);
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void fill_with_zeros(void* data, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += kThreads) static_cast<uint4*>(data)[i] = make_uint4(0, 0, 0, 0);
}

}  // namespace swinkernels::cuda
