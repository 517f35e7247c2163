// Code shared by the kernels for short windows of 16-bit elements (fwd_short16_sm80.cuh, bwd_short16_sm80.cuh): it
// decides whether they support a call, and finds, copies and stores the rows of a thread.
//
// The kernels support v1 with a table, one dense bias or none, without dropout and without a region map, on 2D maps of
// any size, padded or not, in windows (blocks or grids) of up to 64 tokens; head_dim 16, 24, 32 or 64; packed or
// separate maps with a constant distance between tokens.
//
// A thread copies and stores the same one or two rows of every window. Their coordinates in the window stay in
// registers; for each window, the thread adds the coordinates of the window's corner, wraps around at the map's end,
// and multiplies the 32-bit token index by the distance between tokens. No addresses are stored in shared memory, and
// the work is spread over all warps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common/ptx.cuh"
#include "../../common/smem_tile.cuh"
#include "arguments.cuh"
#include "bias.cuh"
#include "tokens.cuh"
#include "traits.h"

namespace swinkernels::cuda {

// Maps with the same layout, with a constant distance between tokens and contiguous heads. Token (y, x) of image b has
// index (b * H + y) * W + x.
template <int kMaps>
struct EvenMaps {
  uint64_t data[kMaps];
  uint32_t distance;  // between two tokens, in bytes

  // Returns false if the maps do not have such a layout, or if the index of a token or the distance between tokens
  // exceeds 32 bits.
  template <class Pointer>
  bool set(const TokenMapOf<Pointer>* const (&maps)[kMaps], int64_t images, const int32_t (&size)[3], int32_t head_dim,
           int64_t element_bytes) {
    // The distance is the stride of the last axis with more than one token. A map of one token has no such axis.
    const int64_t extent[3] = {images, size[1], size[2]};
    for (int map = 0; map < kMaps; ++map) {
      const TokenMapOf<Pointer>& m = *maps[map];
      const int64_t strides[3] = {m.batch_stride, m.axis_stride[1], m.axis_stride[2]};
      int64_t tokens = 1, stride = 0;  // tokens: the product of the extents of the axes after this one
      for (int axis = 2; axis >= 0; --axis) {
        if (extent[axis] == 1) continue;
        if (tokens == 1) stride = strides[axis];
        if (strides[axis] != tokens * stride) return false;
        tokens *= extent[axis];
      }
      const int64_t bytes = stride * element_bytes;
      if (bytes < 0 || bytes > UINT32_MAX || tokens >= UINT32_MAX || m.head_stride != head_dim) return false;
      if (map > 0 && bytes != distance) return false;
      data[map] = reinterpret_cast<uint64_t>(m.data);
      distance = static_cast<uint32_t>(bytes);
    }
    return true;
  }
};

// Returns true if the kernels for short windows of 16-bit elements support a call; EvenMaps::set() checks its maps.
inline bool is_short16(const WindowAttentionForwardParams& params) {
  const WindowGeometry& geometry = params.geometry;
  const int32_t d = params.head_dim;
  return params.dtype != DType::kFloat32 && params.logit_scale == nullptr && params.bias_types == 1 &&
         params.dropout_p == 0.0f && params.region_map == nullptr && geometry.size[0] == 1 && geometry.window[0] == 1 &&
         geometry.window[1] * geometry.window[2] <= 64 && (d == 16 || d == 24 || d == 32 || d == 64);
}

// Additional arguments of the kernels for short windows of 16-bit elements.
struct Short16Geometry {
  EvenMaps<3> qkv;
  // For each axis: frame coordinate = window * window_step + token * token_step.
  int32_t window_step[2], token_step[2];
  uint32_t seam[2];  // index of the window whose tokens belong to two regions, or UINT32_MAX
  bool has_pads;

  bool set(const WindowAttentionForwardParams& params, const WindowLayout& layout) {
    const WindowGeometry& g = params.geometry;
    has_pads = false;
    for (int axis = 0; axis < 2; ++axis) {
      window_step[axis] = g.grid ? 1 : g.window[axis + 1];
      token_step[axis] = g.grid ? g.num_windows[axis + 1] : 1;
      seam[axis] = layout.has_regions[axis + 1] ? g.num_windows[axis + 1] - 1 : UINT32_MAX;
      has_pads |= g.frame[axis + 1] != g.size[axis + 1];
    }
    const int64_t windows_and_heads = params.batch * g.num_windows[1] * g.num_windows[2] * params.num_heads;
    return windows_and_heads <= UINT32_MAX &&
           qkv.set({&params.q, &params.k, &params.v}, params.batch, g.size, params.head_dim, 2);
  }
};

// The data of every token: its indices in the bias table (see WindowLayout), and the side of the seam on which it lies
// in windows with a seam (bit 0 for y, bit 1 for x).
template <int kBlock>
struct Short16Tokens {
  int32_t query_index[kBlock], key_index[kBlock];
  int32_t side[kBlock];

  // The caller synchronises.
  __device__ __forceinline__ void fill(const WindowLayout& layout, int num_tokens) {
    for (int i = threadIdx.x; i < kBlock; i += blockDim.x) {
      const int token = min(i, num_tokens - 1), y = token / layout.window[2], x = token % layout.window[2];
      query_index[i] = layout.query_index(token);
      key_index[i] = layout.key_index(token);
      side[i] = (y >= layout.window[1] - layout.shift[1] ? 1 : 0) | (x >= layout.window[2] - layout.shift[2] ? 2 : 0);
    }
  }
};

// The elements of a thread's accumulator fragment whose query and key are separated by a seam: bit 4 * j + e is for
// element [j][e].
struct SeamBits {
  uint32_t y = 0, x = 0;

  template <int kTiles, int kBlock>
  __device__ static __forceinline__ SeamBits of(const Short16Tokens<kBlock>& tokens, int row0) {
    static_assert(4 * kTiles <= 32);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    SeamBits bits;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t differ = tokens.side[row0 + g + e / 2 * 8] ^ tokens.side[8 * j + 2 * t + e % 2];
        bits.y |= (differ & 1) << (4 * j + e);
        bits.x |= (differ >> 1) << (4 * j + e);
      }
    }
    return bits;
  }
};

template <int kTiles>
__device__ __forceinline__ void add_seam_mask(float (&score)[kTiles][4], uint32_t separated, float mask2) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (separated >> (4 * j + e) & 1) score[j][e] += mask2;
    }
  }
}

// A thread's data about one window.
template <int kRows>
struct Short16Window {
  uint32_t token[kRows];  // token indices of this thread's rows
  uint32_t separated;     // the elements of its fragment that are masked (SeamBits)
};

// The rows of a window, among this warp's 16, that one thread copies and stores. Two or four neighbouring lanes share a
// row, and each copies every second or fourth 16-byte chunk of the row.
template <class Traits>
struct OwnRows {
  static constexpr int kLanes = Traits::kChunks < 4 ? 2 : 4;
  static constexpr int kRows = kLanes / 2;
  static constexpr int kRowDistance = 16 / kRows;
  static constexpr uint32_t kPad = UINT32_MAX;  // the index of a token outside the map
  using Window = Short16Window<kRows>;
  using Tile = SmemTile<typename Traits::T, Traits::kHeadDim>;

  int chunk;                   // the thread's first chunk in the row
  int offset;                  // byte position of the first chunk in a tile
  uint32_t in_token;           // byte position of the first chunk in a token of a map
  bool in_window[kRows];       // true if row and chunk are in the window
  int32_t y[kRows], x[kRows];  // shift + coordinate in the window * token_step

  template <class Arguments>
  __device__ static __forceinline__ OwnRows of(const Arguments& args, int row0, int head) {
    const int lane = threadIdx.x % 32;
    OwnRows own;
    const int first = row0 + lane / kLanes;
    own.chunk = lane % kLanes;
    own.in_token = head * Traits::kRowBytes + 16 * own.chunk;
    own.offset = ptx::opaque(Tile::offset(first, own.chunk) * 2);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * kRowDistance;
      own.in_window[i] = row < args.num_tokens && own.chunk < Traits::kRowChunks;
      own.y[i] = args.layout.shift[1] + row / args.layout.window[2] * args.geometry.token_step[0];
      own.x[i] = args.layout.shift[2] + row % args.layout.window[2] * args.geometry.token_step[1];
    }
    return own;
  }

  // Finds the rows of a window and starts their copies, as one group. `copy` is called with (has_pads, window), and
  // must call the member function copy<has_pads>() below.
  template <class Arguments, class Copy>
  __device__ __forceinline__ Window start(const Arguments& args, uint32_t item, const SeamBits& seam,
                                          Copy&& copy) const {
    Window window;
    if (args.geometry.has_pads) {
      window = locate<true>(args, item, seam);
      copy(std::true_type{}, window);
    } else {
      window = locate<false>(args, item, seam);
      copy(std::false_type{}, window);
    }
    ptx::cp_async_commit();
    return window;
  }

  // Starts copying this thread's rows of kMaps maps to consecutive tiles of kTileBytes each, from `tiles` on. The rows
  // of a pad token are copied from `pads`, (maps, heads, head_dim), or are zeros if `pads` is null.
  template <bool kPads, int kTileBytes, int kMaps>
  __device__ __forceinline__ void copy(typename Traits::T* tiles, const EvenMaps<kMaps>& maps, const Window& window,
                                       const void* pads, int num_heads) const {
    uint64_t from[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) from[i] = ptx::multiply_add_wide(window.token[i], maps.distance, in_token);
#pragma unroll
    for (int n = 0; n < kTimes; ++n) {
      const ptx::SharedAddress to = ptx::shared_address(chunk_of(tiles, 0, n));
#pragma unroll
      for (int map = 0; map < kMaps; ++map) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int in_tiles = map * kTileBytes + i * kRowDistance * kTileRowBytes;
          if (!kPads || window.token[i] != kPad) {
            const uint64_t source = maps.data[map] + from[i] + n * kLanes * 16;
            if (in_window[i]) ptx::cp_async_16(to + in_tiles, reinterpret_cast<const void*>(source));
          } else if (in_window[i]) {
            const uint64_t pad = reinterpret_cast<uint64_t>(pads) + map * num_heads * Traits::kRowBytes + in_token;
            *chunk_of(tiles, in_tiles, n) =
                pads == nullptr ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(pad + n * kLanes * 16);
          }
        }
      }
    }
  }

  // Writes this thread's rows of a tile, which its warp has filled, to a map. Rows of pad tokens are skipped.
  template <int kMaps>
  __device__ __forceinline__ void store(typename Traits::T* tile, const EvenMaps<kMaps>& maps, int map,
                                        const Window& window) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint64_t to = ptx::multiply_add_wide(window.token[i], maps.distance, in_token) + maps.data[map];
      if (!in_window[i] || window.token[i] == kPad) continue;
#pragma unroll
      for (int n = 0; n < kTimes; ++n) {
        ptx::store_global_16(reinterpret_cast<void*>(to + n * kLanes * 16),
                             *chunk_of(tile, i * kRowDistance * kTileRowBytes, n));
      }
    }
  }

  // Sets is_pad for this thread's two rows of a fragment from row0 on.
  template <class Arguments>
  __device__ __forceinline__ void find_pads(bool (&is_pad)[2], const Arguments& args, const Window& window,
                                            int row0) const {
    is_pad[0] = is_pad[1] = false;
    if (!args.geometry.has_pads) return;
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t token = window.token[half % kRows];
      if constexpr (kRows == 1) token = __shfl_sync(0xffffffffu, token, (g + 8 * half) * kLanes);
      is_pad[half] = token == kPad && row0 + g + 8 * half < args.num_tokens;
    }
  }

 private:
  static constexpr int kTimes = Traits::kChunks / kLanes, kTileRowBytes = Tile::kCols * 2;

  // Finds the rows of a window. kPads: the window may contain pad tokens.
  template <bool kPads, class Arguments>
  __device__ __forceinline__ Window locate(const Arguments& args, uint32_t item, const SeamBits& seam) const {
    Window window;
    uint32_t in_image, n_x;
    const uint32_t image = args.layout.windows.volume.divide(item, &in_image);
    const uint32_t n_y = args.layout.windows.row.divide(in_image, &n_x);
    window.separated = (n_y == args.geometry.seam[0] ? seam.y : 0) | (n_x == args.geometry.seam[1] ? seam.x : 0);
    const uint32_t height = args.layout.size[1], width = args.layout.size[2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      uint32_t row = n_y * args.geometry.window_step[0] + y[i], col = n_x * args.geometry.window_step[1] + x[i];
      bool is_pad = false;
      if constexpr (kPads) {
        row = args.layout.source(1, row - args.layout.shift[1], is_pad);
        col = args.layout.source(2, col - args.layout.shift[2], is_pad);
      } else {
        row -= row >= height ? height : 0;
        col -= col >= width ? width : 0;
      }
      window.token[i] = is_pad ? kPad : (image * height + row) * width + col;
    }
    return window;
  }

  // Returns the address of the thread's n-th chunk in the row that is `bytes` after the thread's first row in the
  // tiles.
  __device__ __forceinline__ uint4* chunk_of(typename Traits::T* tiles, int bytes, int n) const {
    return reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(tiles) + bytes + (offset ^ n * kLanes * 16));
  }
};

}  // namespace swinkernels::cuda
