// Window attention forward, map to map.
//
// Maths     out_i = sum_j softmax_j(scale * q_i.k_j + bias[i, j] + mask[i, j]) v_j for the tokens i, j of a window, one
//           head; lse_i = log sum_j exp(...). WindowGeometry says where the tokens lie and what bias and mask are.
// Tiling    One block per window and head at a time. A warp has 16 queries, whose scores stay in registers.
//           Up to 64 tokens (short) a block loops over windows of one head: bias fragments are loaded once, and the
//           next window's rows arrive by cp.async while this one is computed. Longer windows (long) go by blocks of
//           keys with a running maximum and sum, 64 or 32 queries a block.
// Traffic   q, k, v are read once and out is written once: 4 * B * S * C * sizeof(T) bytes, plus 4 * B * S * heads for
//           lse. A long window reads k and v once per block of queries, mostly from L2.
// Roofline  memory bound. B=128, 56x56, 3 heads of 32, window 7, bf16: 313 MB, 93 us at 3.35 TB/s (H100 SXM, published
//           peak). Instructions, counted in the sm_90 code: about 710 per warp, 2,840 per window and head, of which
//           there are 24,576: 75 us of issue slots. 114 registers, 32 KB: four blocks, 16 warps per multiprocessor.
// Limits    N <= 256, head_dim a multiple of 8 up to 128, 16-byte aligned pointers and strides, fewer than 2^31
// windows.
#pragma once

#include "scores.cuh"

namespace swinkernels::cuda {

struct ForwardArguments : WindowArguments<4> {
  float* lse;
};

// For rounded outputs the approximate functions are exact enough.
template <class T>
__device__ __forceinline__ float reciprocal(float x) {
  return sizeof(T) == 4 ? 1.0f / x : __fdividef(1.0f, x);
}
template <class T>
__device__ __forceinline__ float log2_of(float x) {
  return sizeof(T) == 4 ? log2f(x) : __log2f(x);
}

// The output rows of a warp, normalised, through its rows of a tile to the map; and their lse.
template <class Traits, class Tile>
__device__ __forceinline__ void finish_rows(const ForwardArguments& args, const Tile& tile,
                                            const float (&o)[Traits::kHeadDimTiles][4], const float (&maximum)[2],
                                            const float (&sum)[2], const uint64_t* rows, int row0, int first,
                                            uint32_t window, int head) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* lse = args.lse + (static_cast<int64_t>(window) * args.num_heads + head) * args.num_tokens;
  if (t == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + row0 + g + 8 * half;
      if (row < args.num_tokens) lse[row] = (maximum[half] + log2_of<typename Traits::T>(sum[half])) * kLn2;
    }
  }
  write_fragment<false>(tile, row0, o, reciprocal<typename Traits::T>(sum[0]), reciprocal<typename Traits::T>(sum[1]),
                        args.num_tokens - first, args.head_dim);
  store_rows(tile, row0, rows, first, args.num_tokens, args.head_dim);
}

template <class Traits>
struct ForwardShortSmem {
  static constexpr int kStages = Traits::kForwardStages;
  static constexpr int kSlots = kStages + 1;
  alignas(128) typename Traits::T tiles[kStages][3][Traits::kBlock * Traits::kHeadDim];  // q, k, v
  WindowTokens<4, Traits::kBlock> tokens[kSlots];
  TokenConstants<Traits::kBlock> constants;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kForwardBlocks)
    window_attention_fwd_short_kernel(const ForwardArguments args) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using Smem = ForwardShortSmem<Traits>;
  constexpr int kStages = Smem::kStages, kSlots = Smem::kSlots, kTiles = Traits::kTiles;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16;
  const int num_tokens = args.num_tokens;
  const int head = blockIdx.x % args.num_heads;
  const uint32_t first = blockIdx.x / args.num_heads, step = gridDim.x / args.num_heads;

  const auto copy_window = [&](int stage, int slot) {
#pragma unroll
    for (int map = 0; map < 3; ++map) {
      copy_rows<Traits::kThreads, Traits::kBlock, false>(Tile{smem.tiles[stage][map]}, smem.tokens[slot].row[map], 0,
                                                         num_tokens, args.head_dim);
    }
  };

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_token_constants(smem.constants, args);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (first + i * step < args.num_windows)
      locate_tokens<T>(smem.tokens[i], smem.constants, args, first + i * step, head);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i * step < args.num_windows) copy_window(i, i);
    ptx::cp_async_commit();
  }
  float bias[kTiles][4];
  load_bias(bias,
            {args.bias_table == nullptr ? nullptr : args.bias_table + head, args.num_heads, smem.constants.table_index},
            args.layout.table_middle, row0, 0, num_tokens);

  int stage = 0, slot = 0;
  for (uint32_t window = first; window < args.num_windows; window += step) {
    if constexpr (kStages == 1) {
      __syncthreads();  // nobody reads the tiles of the window before
      copy_window(0, slot);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    } else {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      const uint32_t ahead = window + (kStages - 1) * step;
      if (ahead < args.num_windows) copy_window((stage + kStages - 1) % kStages, (slot + kStages - 1) % kSlots);
      ptx::cp_async_commit();
    }
    if (window + kStages * step < args.num_windows) {
      locate_tokens<T>(smem.tokens[(slot + kStages) % kSlots], smem.constants, args, window + kStages * step, head);
    }

    if (row0 < num_tokens) {
      const Tile q{smem.tiles[stage][0]}, k{smem.tiles[stage][1]}, v{smem.tiles[stage][2]};
      const auto& tokens = smem.tokens[slot];
      float score[kTiles][4] = {};
      Product::add_abt(score, q, row0, k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[j][e] = fmaf(score[j][e], args.scale2, bias[j][e]);
      }
      if (tokens.mixed) add_mask(score, tokens.region, args.mask2, row0, 0);

      float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) maximum[e / 2] = fmaxf(maximum[e / 2], score[j][e]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum[half] = quad_max(maximum[half]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[j][e] = ptx::exp2_approx(score[j][e] - maximum[e / 2]);
          sum[e / 2] += score[j][e];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[half] = quad_sum(sum[half]);

      float o[Traits::kHeadDimTiles][4] = {};
      Product::add_pb(o, score, v);
      finish_rows<Traits>(args, q, o, maximum, sum, tokens.row[3], row0, 0, window,
                          head);  // only this warp reads its q
    }
    stage = (stage + 1) % kStages;
    slot = (slot + 1) % kSlots;
  }
}

template <class Traits>
struct ForwardLongSmem {
  static constexpr int kStages = 2;
  alignas(128) typename Traits::T q[Traits::kBlock * Traits::kHeadDim];
  alignas(128) typename Traits::T kv[kStages][2][Traits::kBlock * Traits::kHeadDim];
  WindowTokens<4, kLongestWindow> tokens;
  TokenConstants<kLongestWindow> constants;
  float table[Traits::kSharedTableEntries + 1];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLongBlocks)
    window_attention_fwd_long_kernel(const ForwardArguments args, uint32_t row_blocks, uint32_t num_items) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using Smem = ForwardLongSmem<Traits>;
  static_assert(Traits::kKeys == Traits::kBlock);
  constexpr int kTiles = Traits::kTiles;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16;
  const int num_tokens = args.num_tokens;
  const int head = blockIdx.x % args.num_heads;
  const uint32_t step = gridDim.x / args.num_heads;
  const int key_blocks = (num_tokens + Traits::kKeys - 1) / Traits::kKeys;

  const auto copy_block = [&](T* tile, int map, int block) {
    copy_rows<Traits::kThreads, Traits::kBlock, true>(Tile{tile}, smem.tokens.row[map], block * Traits::kBlock,
                                                      num_tokens, args.head_dim);
  };

  fill_with_zeros<Traits::kThreads>(smem.q, sizeof(smem.q));
  fill_with_zeros<Traits::kThreads>(smem.kv, sizeof(smem.kv));
  fill_token_constants(smem.constants, args);
  const BiasColumn column = stage_bias_column<Traits>(args, head, smem.table, smem.constants.table_index);

  for (uint32_t item = blockIdx.x / args.num_heads; item < num_items; item += step) {
    const uint32_t window = item / row_blocks;
    const int row_block = item % row_blocks, first = row_block * Traits::kBlock;
    __syncthreads();  // the constants are there, and nobody reads the tiles and addresses of the item before
    locate_tokens<T>(smem.tokens, smem.constants, args, window, head);
    __syncthreads();
    copy_block(smem.q, 0, row_block);
    copy_block(smem.kv[0][0], 1, 0);
    copy_block(smem.kv[0][1], 2, 0);
    ptx::cp_async_commit();

    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    float o[Traits::kHeadDimTiles][4] = {};
    for (int block = 0; block < key_blocks; ++block) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (block + 1 < key_blocks) {
        copy_block(smem.kv[(block + 1) % 2][0], 1, block + 1);
        copy_block(smem.kv[(block + 1) % 2][1], 2, block + 1);
        ptx::cp_async_commit();
      }
      if (first + row0 < num_tokens) {
        const Tile q{smem.q}, k{smem.kv[block % 2][0]}, v{smem.kv[block % 2][1]};
        float score[kTiles][4] = {};
        Product::add_abt(score, q, row0, k);
        {
          float bias[kTiles][4];
          load_bias(bias, column, args.layout.table_middle, first + row0, block * Traits::kKeys, num_tokens);
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) score[j][e] = fmaf(score[j][e], args.scale2, bias[j][e]);
          }
        }
        if (smem.tokens.mixed) {
          add_mask(score, smem.tokens.region, args.mask2, first + row0, block * Traits::kKeys);
        }
        float rescale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float block_maximum = -INFINITY;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            block_maximum = fmaxf(block_maximum, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
          }
          const float updated = fmaxf(maximum[half], quad_max(block_maximum));
          rescale[half] = ptx::exp2_approx(maximum[half] - updated);
          maximum[half] = updated;
          sum[half] *= rescale[half];
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            score[j][e] = ptx::exp2_approx(score[j][e] - maximum[e / 2]);
            sum[e / 2] += score[j][e];
          }
        }
#pragma unroll
        for (int n = 0; n < Traits::kHeadDimTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] *= rescale[e / 2];
        }
        Product::add_pb(o, score, v);
      }
    }
    if (first + row0 < num_tokens) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[half] = quad_sum(sum[half]);
      finish_rows<Traits>(args, Tile{smem.q}, o, maximum, sum, smem.tokens.row[3], row0, first, window, head);
    }
  }
}

}  // namespace swinkernels::cuda
