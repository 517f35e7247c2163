// Window attention backward for short windows of 16-bit elements, the most common calls (see is_short16() in
// short16.cuh). This kernel executes two thirds as many instructions as the general kernel (bwd_sm80.cuh).
//
// Maths     As in bwd_sm80.cuh.
// Tiling    A warp has 16 queries with p, dp and the running dbias in registers, and 16 keys for dk and dv; bias
//           fragments are in shared memory. Rows are loaded and stored as in the forward kernel (fwd_short16_sm80.cuh):
//           dq and dv are stored through the rows of v in shared memory, dk through the rows of k. p, ds and the
//           gradients are written by stmatrix if the GPU has it.
// Order     No atomics: a block accumulates over its windows in order, and reduce_partials.cu adds the blocks' sums in
//           order.
// Traffic   q, k, v, dout are read and dq, dk, dv written once: 14 * B * S * C bytes, plus lse.
// Roofline  memory bound. B=128, 56x56, 3 heads of 32, window 7, bf16: 544 MB, 162 us at 3.35 TB/s (H100 SXM, published
//           peak). Executed instructions, counted in the sm_90 code: 2,824 per window and head; 75 us of issue
//           slots. 154 registers, 65 KB: three blocks, 12 warps per multiprocessor.
// Limits    see short16.cuh; other calls use the general kernel.
#pragma once

#include "bwd_sm80.cuh"
#include "short16.cuh"

namespace swinkernels::cuda {

struct Short16BackwardArguments : BackwardArguments {
  Short16Geometry geometry;
  EvenMaps<1> dout_map;
  EvenMaps<3> gradients;  // dq, dk, dv

  // Returns false if this kernel does not support the maps.
  bool set(const WindowAttentionBackwardParams& params) {
    const WindowAttentionForwardParams& forward = params.forward;
    const auto& size = forward.geometry.size;
    return geometry.set(forward, layout) && dout_map.set({&params.dout}, forward.batch, size, forward.head_dim, 2) &&
           gradients.set({&params.dq, &params.dk, &params.dv}, forward.batch, size, forward.head_dim, 2);
  }
};

template <class Traits>
struct Short16BackwardSmem {
  using T = typename Traits::T;
  static constexpr int kStages = Traits::kBackwardStages;
  alignas(128) T tiles[kStages][4][Traits::kBlock * Traits::kHeadDim];  // q, k, v, dout
  union {
    alignas(128) T p_ds[2][Traits::kBlock * Traits::kBlock];
    float dbias[Traits::kBlock * Traits::kBlock];  // used at the end
  };
  float4 bias[Traits::kTiles][Traits::kThreads];  // fragments; in shared memory, because dbias leaves too few registers
  Short16Tokens<Traits::kBlock> tokens;
  alignas(16) float pad_sums[Traits::kWarps][2][Traits::kHeadDim];
  int32_t exponents[Traits::kWarps];  // exponents of ds, half_range.cuh
};

// Multiplies 16 rows by a factor, rounds them and writes them to a map, through this warp's rows of a tile. In the
// tile, rows past the window stay zero.
template <class Traits, class Tile>
__device__ __forceinline__ void finish_gradient(const Tile& tile, int row0, int num_tokens,
                                                const float (&x)[Traits::kHeadDimTiles][4], float factor,
                                                const OwnRows<Traits>& own, const EvenMaps<3>& maps, int map,
                                                const typename OwnRows<Traits>::Window& window) {
  uint32_t packed[Traits::kRowTiles][2];
#pragma unroll
  for (int n = 0; n < Traits::kRowTiles; ++n) {
    packed[n][0] = pack2<typename Traits::T>(x[n][0] * factor, x[n][1] * factor);
    packed[n][1] = pack2<typename Traits::T>(x[n][2] * factor, x[n][3] * factor);
  }
  write_packed_below(tile, row0, num_tokens, packed);
  own.store(tile.data, maps, map, window);
}

// Rounds 16 rows, writes them to a tile, from row row0 on, and packs them as operands of a product.
template <class T, int kTiles, class Tile>
__device__ __forceinline__ void write_rounded(const Tile& tile, int row0, const float (&x)[kTiles][4],
                                              uint32_t (&packed)[kTiles][2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    packed[j][0] = pack2<T>(x[j][0], x[j][1]);
    packed[j][1] = pack2<T>(x[j][2], x[j][3]);
  }
  write_packed(tile, row0, packed);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBackwardBlocks)
    window_attention_bwd_short16_kernel(const __grid_constant__ Short16BackwardArguments args) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = LocatedTile<SmemTile<T, Traits::kHeadDim>>;
  using PTile = LocatedTile<SmemTile<T, Traits::kBlock>>;
  using Window = typename OwnRows<Traits>::Window;
  using Smem = Short16BackwardSmem<Traits>;
  static_assert(!Traits::kNarrow || Traits::kBackwardBlocks * (sizeof(Smem) + 1024) <= 228 * 1024,
                "the blocks that registers are shared out for do not fit on a multiprocessor of sm_90");
  constexpr int kStages = Smem::kStages, kTiles = Traits::kTiles, kColTiles = Traits::kHeadDimTiles;
  constexpr int kTileBytes = sizeof(Smem::tiles[0][0]);
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4;
  const int num_tokens = args.num_tokens;
  const BlockShare share = BlockShare::of(args);
  const auto own = OwnRows<Traits>::of(args, row0, share.head);
  const auto lanes = LaneOffsets<SmemTile<T, Traits::kHeadDim>>::of();
  const auto p_lanes = LaneOffsets<SmemTile<T, Traits::kBlock>>::of();
  const float factor2 = args.scale * kLog2E;

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_with_zeros<Traits::kThreads>(smem.p_ds, sizeof(smem.p_ds));
  fill_with_zeros<Traits::kThreads>(smem.pad_sums, sizeof(smem.pad_sums));
  if (threadIdx.x < Traits::kWarps) smem.exponents[threadIdx.x] = 0;
  smem.tokens.fill(args.layout, num_tokens);
  __syncthreads();
  const SeamBits seam = SeamBits::of<kTiles>(smem.tokens, row0);

  const auto copy_window = [&](int stage, uint32_t item) {
    return own.start(args, item, seam, [&](auto has_pads, const Window& found) {
      constexpr bool kPads = decltype(has_pads)::value;
      own.template copy<kPads, kTileBytes>(smem.tiles[stage][0], args.geometry.qkv, found, args.pad_qkv,
                                           args.num_heads);
      own.template copy<kPads, kTileBytes>(smem.tiles[stage][3], args.dout_map, found, nullptr, 0);
    });
  };

  Window next;
  if (kStages == 2 && share.first < args.items) next = copy_window(0, share.first);
  {
    float bias[kTiles][4];
    load_bias(bias, global_bias(args, share, smem.tokens), row0, 0, num_tokens);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      smem.bias[j][threadIdx.x] = make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]);
    }
  }
  float dbias[kTiles][4] = {};

  int stage = 0;
#pragma unroll 1
  for (uint32_t item = share.first; item < args.items; item += share.step) {
    // On Blackwell, offsets that are kept in registers for all windows would be spilled.
    const auto p_offsets = ptx::kIsBlackwell ? LaneOffsets<SmemTile<T, Traits::kBlock>>::of() : p_lanes;
    const PTile p_tile(smem.p_ds[0], p_offsets), ds_tile(smem.p_ds[1], p_offsets);
    float lse2[2] = {INFINITY, INFINITY};  // loaded now, used after the first product
    {
      const float* const lse =
          args.lse + ptx::multiply_add_wide(item * args.num_heads + share.head, num_tokens, row0 + g);
      if (row0 + g < num_tokens) lse2[0] = lse[0] * kLog2E;
      if (row0 + g + 8 < num_tokens) lse2[1] = lse[8] * kLog2E;
    }
    Window window;
    if constexpr (kStages == 1) {
      __syncthreads();  // all reads of the previous window's tiles are done
      window = copy_window(0, item);
      ptx::cp_async_wait<0>();
      __syncthreads();
    } else {
      ptx::cp_async_wait<0>();
      __syncthreads();
      window = next;
      if (item + share.step < args.items) next = copy_window(stage ^ 1, item + share.step);
    }
    const Tile q(smem.tiles[stage][0], lanes), k(smem.tiles[stage][1], lanes), v(smem.tiles[stage][2], lanes),
        dout(smem.tiles[stage][3], lanes);
    bool is_pad[2];
    own.find_pads(is_pad, args, window, row0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (is_pad[half]) lse2[half] = INFINITY;  // p of a pad query is zero
    }
    float dq[kColTiles][4] = {};
    if (row0 < num_tokens) {
      float p[kTiles][4] = {};
      uint32_t packed[kTiles][2];
      Product::add_abt(p, q, row0, k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float4 bias = smem.bias[j][threadIdx.x];
        p[j][0] = fmaf(p[j][0], factor2, bias.x);
        p[j][1] = fmaf(p[j][1], factor2, bias.y);
        p[j][2] = fmaf(p[j][2], factor2, bias.z);
        p[j][3] = fmaf(p[j][3], factor2, bias.w);
      }
      if (window.separated != 0) add_seam_mask(p, window.separated, args.mask2);
      to_probabilities(p, lse2);
      write_rounded<T>(p_tile, row0, p, packed);
      float dp[kTiles][4] = {};
      Product::add_abt(dp, dout, row0, v);
      RowSums delta;
      delta.add(p, dp);
      delta.finish();
      to_dscores(p, dp, delta.x);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dbias[j][e] += p[j][e];
      }
      if constexpr (kHasNarrowRange<T>) {
        const int exponent = excess_exponent(p);
        if (exponent != 0) multiply(p, power_of_two(-exponent));
        if (lane == 0) smem.exponents[row0 / 16] = exponent;
      }
      write_rounded<T>(ds_tile, row0, p, packed);
      Product::add_pb(dq, packed, k);
    }
    __syncthreads();  // p and ds are complete; k and v are free for the outputs
    float query_factor = args.scale, key_factor = args.scale;
    if constexpr (kHasNarrowRange<T>) {
      const int exponent = smem.exponents[row0 / 16];
      int largest = 0;
#pragma unroll
      for (int warp = 0; warp < Traits::kWarps; ++warp) largest = max(largest, smem.exponents[warp]);
      if (largest != 0) {
        multiply_rows(ds_tile, row0, power_of_two(exponent - largest));
        __syncthreads();
        query_factor *= power_of_two(exponent);
        key_factor *= power_of_two(largest);
      }
    }
    if (row0 < num_tokens) {
      finish_gradient<Traits>(v, row0, num_tokens, dq, query_factor, own, args.gradients, 0, window);
      {
        float dk[kColTiles][4] = {};
        Product::template add_ptb<kTiles>(dk, ds_tile, row0, q);
        finish_gradient<Traits>(k, row0, num_tokens, dk, key_factor, own, args.gradients, 1, window);
        if (args.pad_partials != nullptr) add_pad_rows(smem.pad_sums[row0 / 16][0], dk, key_factor, is_pad);
      }
      {
        // dv may overwrite the rows of v, because dq has already been stored from them.
        float dv[kColTiles][4] = {};
        Product::template add_ptb<kTiles>(dv, p_tile, row0, dout);
        finish_gradient<Traits>(v, row0, num_tokens, dv, 1.0f, own, args.gradients, 2, window);
        if (args.pad_partials != nullptr) add_pad_rows(smem.pad_sums[row0 / 16][1], dv, 1.0f, is_pad);
      }
    }
    if constexpr (kStages == 2) stage ^= 1;
  }

  __syncthreads();
  write_pad_partial<Traits>(args, smem.pad_sums);
  if (args.dense_partials != nullptr) {
    float* const partial = args.dense_partials + static_cast<int64_t>(blockIdx.x) * Traits::kBlock * Traits::kBlock;
    write_matrix(partial, Traits::kBlock, row0, dbias);
  }
  if (args.table_partials != nullptr) {
    write_matrix(smem.dbias, Traits::kBlock, row0, dbias);
    __syncthreads();
    gather_table<Traits::kThreads>(args.table_partials + static_cast<int64_t>(blockIdx.x) * args.layout.table_entries,
                                   smem.dbias, Traits::kBlock, args.layout, smem.tokens.query_index, num_tokens);
  }
}

}  // namespace swinkernels::cuda
