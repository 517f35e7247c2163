// Window attention forward, from and to feature maps.
//
// Maths     out_i = sum_j d_ij p_ij v_j with p_ij = softmax_j(s_ij + bias[i, j] + mask[i, j]) for the tokens i, j of a
//           window, per head; s_ij = scale * q_i.k_j, or exp(min(logit_scale, ln 100)) cos(q_i, k_j) (cosine.cuh);
//           d_ij = 1, or 0 or 1 / (1 - dropout_p) (dropout.cuh); lse_i = log sum_j exp(...). WindowGeometry defines the
//           token positions, the bias and the mask. Scores are multiplied by log2(e) ("base 2"), so that probabilities
//           are computed with exp2.
// Tiling    A block processes one window and head at a time. A warp has 16 queries, whose scores stay in registers. For
//           short windows (up to 64 tokens) a block loops over windows of one head: bias fragments are loaded once and,
//           with two stages (traits.h), the next window's rows arrive by cp.async while this one is processed. Long
//           windows are processed one block of keys at a time, with a running maximum and sum and 64 or 32 queries per
//           block. Most 16-bit calls with long windows use fwd_long_sm80.cuh instead.
// Traffic   q, k, v are read once and out is written once: 4 * B * S * C * sizeof(T) bytes, plus 4 * B * S * heads for
//           lse. A long window reads k and v once per block of queries, mostly from L2.
// Roofline  memory bound. The figures of the most common case are in fwd_short16_sm80.cuh, whose kernel runs it.
//           Window 7, head_dim 32, v2, bf16: 3,691 instructions per window and head, counted in the sm_90 code; four
//           blocks per multiprocessor.
// Limits    N <= 1024, head_dim <= 128, fewer than 2^31 windows. Rows whose size is a multiple of 16 bytes must be
//           16-byte aligned, and are copied 16 bytes at a time. Other rows are copied 4 bytes at a time, or 2 if they
//           have an odd number of 16-bit elements.
#pragma once

#include "bias.cuh"
#include "cosine.cuh"
#include "dropout.cuh"
#include "mask.cuh"
#include "tokens.cuh"

#include "../../common/launch.cuh"
#include "../../common/quad.cuh"
#include "../../common/smem_tile.cuh"
#include "../../common/tile_product.cuh"

namespace swinkernels::cuda {

struct ForwardArguments : WindowArguments<4> {
  float* lse;
};

// The approximate functions are accurate enough if the output is rounded to 16 bits.
template <class T>
__device__ __forceinline__ float reciprocal(float x) {
  return sizeof(T) == 4 ? 1.0f / x : __fdividef(1.0f, x);
}
template <class T>
__device__ __forceinline__ float log2_of(float x) {
  return sizeof(T) == 4 ? log2f(x) : __log2f(x);
}

// Normalises the output rows of a warp, writes them to the map through the warp's rows of a tile, and writes their lse.
template <class Traits, class Tile>
__device__ __forceinline__ void finish_rows(const ForwardArguments& args, const Tile& tile,
                                            const float (&o)[Traits::kHeadDimTiles][4], const float (&maximum)[2],
                                            const float (&sum)[2], const uint64_t* rows, int row0, int first,
                                            uint32_t window, int head) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (args.lse != nullptr && t == 0) {
    float* const lse = args.lse + args.first_query(window, head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + row0 + g + 8 * half;
      if (row < args.num_tokens) lse[row] = (maximum[half] + log2_of<typename Traits::T>(sum[half])) * kLn2;
    }
  }
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factor[half] = reciprocal<typename Traits::T>(sum[half]);
    if (args.has_dropout()) factor[half] *= args.dropout_scale;
  }
  write_fragment<false>(tile, row0, o, factor[0], factor[1], args.num_tokens - first, args.head_dim);
  store_rows(tile, row0, rows, first, args.num_tokens, args.row_bytes, args.has_whole_rows());
}

template <class Traits>
struct ForwardShortSmem {
  static constexpr int kStages = Traits::kForwardStages;
  static constexpr int kSlots = kStages + 1;
  alignas(128) typename Traits::T tiles[kStages][3][Traits::kBlock * Traits::kHeadDim];  // q, k, v
  WindowTokens<4, Traits::kKeys, Traits::kBlock> tokens[kSlots];
  TokenConstants<Traits::kBlock> constants;
  InverseNorms<Traits::kBlock> norms;
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
  const BlockShare share = BlockShare::of(args);
  const uint32_t first = share.first, step = share.step;
  const float factor2 = score_factor(args, share.head) * kLog2E;

  const auto copy_window = [&](int stage, int slot) {
#pragma unroll
    for (int map = 0; map < 3; ++map) {
      copy_rows<Traits::kThreads, Traits::kBlock, false>(Tile{smem.tiles[stage][map]}, smem.tokens[slot].row(map), 0,
                                                         num_tokens, args.row_bytes, args.has_whole_rows());
    }
  };
  const auto locate_window = [&](int slot, uint32_t item) {
    locate_tokens<T, 0, 1, 2, 3>(smem.tokens[slot], smem.constants, args, args.window_of(share.type, item), share.head,
                                 0, num_tokens);
  };

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_token_constants(smem.constants, args, 0, num_tokens);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (first + i * step < args.items) locate_window(i, first + i * step);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i * step < args.items) copy_window(i, i);
    ptx::cp_async_commit();
  }
  float bias[kTiles][4];
  load_bias(bias, global_bias(args, share, smem.constants), row0, 0, num_tokens);

  int stage = 0, slot = 0;
  for (uint32_t item = first; item < args.items; item += step) {
    if constexpr (kStages == 1) {
      __syncthreads();  // all reads of the previous window's tiles are done
      copy_window(0, slot);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    } else {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      const uint32_t ahead = item + (kStages - 1) * step;
      if (ahead < args.items) copy_window((stage + kStages - 1) % kStages, (slot + kStages - 1) % kSlots);
      ptx::cp_async_commit();
    }
    if (item + kStages * step < args.items) locate_window((slot + kStages) % kSlots, item + kStages * step);

    const Tile q{smem.tiles[stage][0]}, k{smem.tiles[stage][1]}, v{smem.tiles[stage][2]};
    if (args.is_cosine()) {
      find_inverse_norms(smem.norms, q, k, row0);
      __syncthreads();
    }
    if (row0 < num_tokens) {
      const auto& tokens = smem.tokens[slot];
      const uint32_t window = args.window_of(share.type, item);
      float score[kTiles][4] = {};
      Product::add_abt(score, q, row0, k);
      finish_scores(score, factor2, args.is_cosine() ? &smem.norms : nullptr, row0,
                    [&](int j) { return make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]); });
      if (tokens.mixed) add_mask(score, tokens.region + row0, tokens.region, args.mask2);

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
      if (args.has_dropout()) drop(score, kept_weights<kTiles>(args, window, share.head, row0, 0));

      float o[Traits::kHeadDimTiles][4] = {};
      Product::add_pb(o, score, v);
      // Only this warp reads its rows of q.
      finish_rows<Traits>(args, q, o, maximum, sum, tokens.row(3), row0, 0, window, share.head);
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
  InverseNorms<Traits::kBlock> norms;
  float table[Traits::kSharedTableEntries + 1];
  int32_t mixed;

  // The per-token data follows this struct in shared memory.
  static size_t bytes(const WindowLayout& layout, int blocks) {
    const size_t per_token = 4 * sizeof(uint64_t) + (1 + LongTokenConstants::arrays(layout)) * sizeof(int32_t);
    return sizeof(ForwardLongSmem) + blocks * Traits::kBlock * per_token;
  }
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
  const BlockShare share = BlockShare::of(args);
  const int key_blocks = row_blocks, capacity = row_blocks * Traits::kBlock;
  const float factor2 = score_factor(args, share.head) * kLog2E;
  SmemArena arena{dynamic_smem() + sizeof(Smem)};
  LongWindowTokens<4> tokens{arena.take<uint64_t>(4 * capacity), arena.take<int32_t>(capacity), smem.mixed, capacity};
  const auto constants = LongTokenConstants::of(arena, args.layout, capacity);

  const auto copy_block = [&](T* tile, int map, int block) {
    copy_rows<Traits::kThreads, Traits::kBlock, true>(Tile{tile}, tokens.row(map), block * Traits::kBlock, num_tokens,
                                                      args.row_bytes, args.has_whole_rows());
  };

  fill_with_zeros<Traits::kThreads>(smem.q, sizeof(smem.q));
  fill_with_zeros<Traits::kThreads>(smem.kv, sizeof(smem.kv));
  fill_token_constants(constants, args, 0, num_tokens);
  const Bias bias_source = staged_bias<Traits>(args, share, smem.table, constants);

  for (uint32_t item = share.first; item < num_items; item += share.step) {
    const uint32_t window = args.window_of(share.type, item / row_blocks);
    const int row_block = item % row_blocks, first = row_block * Traits::kBlock;
    __syncthreads();  // the constants are written, and the previous item's tiles and addresses are free
    locate_tokens<T, 0, 1, 2, 3>(tokens, constants, args, window, share.head, 0, num_tokens);
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
      const Tile q{smem.q}, k{smem.kv[block % 2][0]}, v{smem.kv[block % 2][1]};
      if (args.is_cosine()) {
        find_inverse_norms(smem.norms, q, k, row0);
        __syncthreads();
      }
      if (first + row0 < num_tokens) {
        const int col0 = block * Traits::kKeys;
        float score[kTiles][4] = {};
        Product::add_abt(score, q, row0, k);
        {
          float bias[kTiles][4];
          load_bias(bias, bias_source, first + row0, col0, num_tokens);
          finish_scores(score, factor2, args.is_cosine() ? &smem.norms : nullptr, row0,
                        [&](int j) { return make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]); });
        }
        if (tokens.mixed) add_mask(score, tokens.region + first + row0, tokens.region + col0, args.mask2);
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
        if (args.has_dropout()) drop(score, kept_weights<kTiles>(args, window, share.head, first + row0, col0));
        Product::add_pb(o, score, v);
      }
    }
    if (first + row0 < num_tokens) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[half] = quad_sum(sum[half]);
      finish_rows<Traits>(args, Tile{smem.q}, o, maximum, sum, tokens.row(3), row0, first, window, share.head);
    }
  }
}

}  // namespace swinkernels::cuda
