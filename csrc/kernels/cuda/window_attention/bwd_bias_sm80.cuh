// Window attention backward: the gradient of the bias of long windows, computed after the other gradients
// (bwd_sm80.cuh).
//
// Maths     dbias[i, j] = sum over windows of ds_ij, with lse and delta as stored by the kernel in bwd_sm80.cuh.
// Tiling    A block processes the same 64 (or 32) queries and the same number of keys in all of its windows, so that
//           the running sum stays in registers, 16 queries per warp. The sum for a whole window does not fit into
//           registers. In memory, it would cause 12 times the traffic of q, k, v and dout per window, at 343 tokens and
//           head_dim 16.
// Order     There are no atomics, as in bwd_sm80.cuh.
// Traffic   every pair of a block of queries and a block of keys reads its rows of q, dout, k and v, mostly from L2: 4
//           * N / 64 times the bytes of q in total.
// Limits    see fwd_sm80.cuh.
#pragma once

#include "bwd_common.cuh"

namespace swinkernels::cuda {

template <class Traits>
struct BackwardBiasSmem {
  using T = typename Traits::T;
  static constexpr int kStages = 2;
  static constexpr int kSlots = kStages + 1;
  alignas(128) T tiles[kStages][4][Traits::kBlock * Traits::kHeadDim];  // q, dout, k, v
  float4 bias[Traits::kTiles][Traits::kThreads];                        // fragments
  WindowTokens<2, Traits::kKeys, Traits::kBlock> queries[kSlots], keys[kSlots];
  InverseNorms<Traits::kBlock> norms;
  TokenConstants<Traits::kBlock> query_constants, key_constants;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLongBlocks)
    window_attention_bwd_bias_kernel(const BackwardArguments args, int32_t blocks) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using Smem = BackwardBiasSmem<Traits>;
  constexpr int kStages = Smem::kStages, kSlots = Smem::kSlots, kTiles = Traits::kTiles, kBlock = Traits::kBlock;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4;
  const int num_tokens = args.num_tokens;
  const BlockShare share = BlockShare::of(args);
  const uint32_t pairs = blocks * blocks, pair = share.first % pairs;
  const uint32_t worker = share.first / pairs, step = share.step / pairs;
  const int query0 = pair / blocks * kBlock, key0 = pair % blocks * kBlock;

  const auto copy_window = [&](int stage, int slot) {
    // `rows` contains only the tokens of this block, so the index of the first token is 0.
    const auto copy = [&](int map, const uint64_t* rows, int first) {
      copy_rows<Traits::kThreads, kBlock, false>(Tile{smem.tiles[stage][map]}, rows, 0, num_tokens - first,
                                                 args.row_bytes, args.has_whole_rows());
    };
    copy(0, smem.queries[slot].row(0), query0);
    copy(1, smem.queries[slot].row(1), query0);
    copy(2, smem.keys[slot].row(0), key0);
    copy(3, smem.keys[slot].row(1), key0);
  };
  const auto locate_window = [&](int slot, uint32_t item) {
    const uint32_t window = args.window_of(share.type, item);
    locate_tokens<T, 0, 3>(smem.queries[slot], smem.query_constants, args, window, share.head, query0, kBlock);
    locate_tokens<T, 1, 2>(smem.keys[slot], smem.key_constants, args, window, share.head, key0, kBlock);
  };

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_token_constants(smem.query_constants, args, query0, kBlock);
  fill_token_constants(smem.key_constants, args, key0, kBlock);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (worker + i * step < args.items) locate_window(i, worker + i * step);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (worker + i * step < args.items) copy_window(i, i);
    ptx::cp_async_commit();
  }
  {
    Bias source = global_bias(args, share, smem.query_constants);
    source.key_index = smem.key_constants.key_index;
    float bias[kTiles][4];
    load_bias(bias, source, query0 + row0, key0, num_tokens, query0, key0);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      smem.bias[j][threadIdx.x] = make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]);
    }
  }
  float dbias[kTiles][4] = {};

  int stage = 0, slot = 0;
  for (uint32_t item = worker; item < args.items; item += step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this window's rows have arrived, and the previous window's tiles are free
    const uint32_t window = args.window_of(share.type, item);
    float lse2[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query0 + row0 + g + 8 * half;
      float2 saved = make_float2(INFINITY, 0.0f);
      if (row < num_tokens) saved = args.lse2_delta[args.first_query(window, share.head) + row];
      lse2[half] = saved.x;
      delta[half] = saved.y;
    }
    const uint32_t ahead = item + (kStages - 1) * step;
    if (ahead < args.items) copy_window((stage + kStages - 1) % kStages, (slot + kStages - 1) % kSlots);
    ptx::cp_async_commit();
    if (item + kStages * step < args.items) locate_window((slot + kStages) % kSlots, item + kStages * step);

    const Tile q{smem.tiles[stage][0]}, dout{smem.tiles[stage][1]}, k{smem.tiles[stage][2]}, v{smem.tiles[stage][3]};
    if (args.is_cosine()) {
      find_inverse_norms(smem.norms, q, k, row0);
      __syncthreads();
    }
    if (query0 + row0 < num_tokens) {
      float p[kTiles][4] = {}, dp[kTiles][4] = {};
      Product::add_abt(p, q, row0, k);
      finish_scores(p, score_factor(args, share.head) * kLog2E, args.is_cosine() ? &smem.norms : nullptr, row0,
                    [&](int j) { return smem.bias[j][threadIdx.x]; });
      if (smem.queries[slot].mixed) {
        add_mask(p, smem.queries[slot].region + row0, smem.keys[slot].region, args.mask2);
      }
      to_probabilities(p, lse2);
      Product::add_abt(dp, dout, row0, v);
      if (args.has_dropout()) {
        undrop(dp, kept_weights<kTiles>(args, window, share.head, query0 + row0, key0), args.dropout_scale);
      }
      to_dscores(p, dp, delta);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dbias[j][e] += p[j][e];
      }
    }
    stage = (stage + 1) % kStages;
    slot = (slot + 1) % kSlots;
  }

  const int64_t stride = int64_t{blocks} * kBlock, unit = int64_t{share.type} * args.num_heads + share.head;
  float* const partial = args.dense_partials + (worker * args.units() + unit) * stride * stride;
  write_matrix(partial + query0 * stride + key0, static_cast<int>(stride), row0, dbias);
}

}  // namespace swinkernels::cuda
