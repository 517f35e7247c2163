// Window attention forward for short windows of 16-bit elements, the most common calls (see is_short16() in
// short16.cuh). This kernel executes half as many instructions as the general kernel (fwd_sm80.cuh).
//
// Maths     As in fwd_sm80.cuh, but in bfloat16 p = exp2(score), without a maximum, if all row sums are between 2^-80
//           and 2^64. bfloat16 has the exponent range of float, so p is accurate at any size, and sums of p v are
//           finite for |v| < 2^62. If a row sum of a warp is outside this range (one vote per window), the warp
//           subtracts the maximum of each row, as it always does in float16. The matrix unit computes the row sums of
//           the rounded p. lse is written on request.
// Tiling    A warp has 16 queries and all keys, 32, 56 or 64; a block of up to 64 rows loops over windows of one head,
//           with bias fragments in registers. Tiles of up to 4 KB arrive in a ring of two stages by cp.async, larger
//           ones in one stage. A thread owns one or two rows of every window (OwnRows); the outputs are stored
//           through the rows of q in shared memory, by stmatrix if the GPU has it.
// Traffic   q, k, v are read once and out is written once: 8 * B * S * C bytes, plus 4 * B * S * heads for lse.
// Roofline  memory bound. B=128, 56x56, 3 heads of 32, window 7, bf16: 308 MB, 92 us at 3.35 TB/s (H100 SXM, published
//           peak). Executed instructions, counted in the sm_90 code: 1,236 per window and head, 1,304 with lse; 35 us
//           of issue slots. 123 registers, 25 KB: four blocks, 16 warps per multiprocessor.
// Limits    see short16.cuh; other calls use the general kernel.
#pragma once

#include "fwd_sm80.cuh"
#include "half_range.cuh"
#include "short16.cuh"

namespace swinkernels::cuda {

struct Short16ForwardArguments : ForwardArguments {
  Short16Geometry geometry;
  EvenMaps<1> out_map;

  // Returns false if this kernel does not support the maps.
  bool set(const WindowAttentionForwardParams& params) {
    return geometry.set(params, layout) &&
           out_map.set({&params.out}, params.batch, params.geometry.size, params.head_dim, 2);
  }
};

// If a row sum is between these limits, the row's maximum need not be subtracted.
constexpr float kSmallestRowSum = 0x1p-80f, kLargestRowSum = 0x1p64f;

// Computes p = exp2(score - shift), packed, and the row sums of p.
template <class Product, int kTiles>
__device__ __forceinline__ void exponentials(uint32_t (&p)[kTiles][2], float (&sum)[4], const float (&score)[kTiles][4],
                                             const float (&shift)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      p[j][half] = pack2<typename Product::T>(ptx::exp2_approx(score[j][2 * half] - shift[half]),
                                              ptx::exp2_approx(score[j][2 * half + 1] - shift[half]));
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = 0.0f;
  Product::add_row_sums(sum, p);
}

template <class Traits>
struct Short16ForwardSmem {
  static constexpr int kStages = Traits::kForwardStages;
  alignas(128) typename Traits::T tiles[kStages][3][Traits::kBlock * Traits::kHeadDim];  // q, k, v
  Short16Tokens<Traits::kBlock> tokens;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kForwardBlocks)
    window_attention_fwd_short16_kernel(const __grid_constant__ Short16ForwardArguments args) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = LocatedTile<SmemTile<T, Traits::kHeadDim>>;
  using Window = typename OwnRows<Traits>::Window;
  using Smem = Short16ForwardSmem<Traits>;
  constexpr int kStages = Smem::kStages, kTiles = Traits::kTiles, kTileBytes = sizeof(Smem::tiles[0][0]);
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens;
  const BlockShare share = BlockShare::of(args);
  const auto own = OwnRows<Traits>::of(args, row0, share.head);
  const LaneOffsets<SmemTile<T, Traits::kHeadDim>> lanes = LaneOffsets<SmemTile<T, Traits::kHeadDim>>::of();
  const float factor2 = args.scale * kLog2E;

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  smem.tokens.fill(args.layout, num_tokens);
  __syncthreads();
  const SeamBits seam = SeamBits::of<kTiles>(smem.tokens, row0);

  const auto copy_window = [&](int stage, uint32_t item) {
    return own.start(args, item, seam, [&](auto has_pads, const Window& found) {
      constexpr bool kPads = decltype(has_pads)::value;
      own.template copy<kPads, kTileBytes>(smem.tiles[stage][0], args.geometry.qkv, found, args.pad_qkv,
                                           args.num_heads);
    });
  };

  Window next;
  if (kStages == 2 && share.first < args.items) next = copy_window(0, share.first);
  float bias[kTiles][4];
  load_bias(bias, global_bias(args, share, smem.tokens), row0, 0, num_tokens);

  int stage = 0;
#pragma unroll 1
  for (uint32_t item = share.first; item < args.items; item += share.step) {
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
    const Tile q(smem.tiles[stage][0], lanes), k(smem.tiles[stage][1], lanes), v(smem.tiles[stage][2], lanes);
    if (row0 < num_tokens) {
      float score[kTiles][4] = {};
      Product::add_abt(score, q, row0, k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) score[j][e] = fmaf(score[j][e], factor2, bias[j][e]);
      }
      if (window.separated != 0) add_seam_mask(score, window.separated, args.mask2);

      uint32_t p[kTiles][2];
      float shift[2] = {0.0f, 0.0f}, sum[4];
      bool needs_shift = true;
      if constexpr (!kHasNarrowRange<T>) {
        exponentials<Product>(p, sum, score, shift);
        // Ignore rows past the window, whose data come from other windows.
        const float sum0 = row0 + g < num_tokens ? sum[0] : 1.0f, sum1 = row0 + g + 8 < num_tokens ? sum[2] : 1.0f;
        const bool in_range = sum0 > kSmallestRowSum && sum1 > kSmallestRowSum && fmaxf(sum0, sum1) < kLargestRowSum;
        needs_shift = __any_sync(0xffffffffu, !in_range);
      }
      if (needs_shift) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float maximum = -INFINITY;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            maximum = fmaxf(maximum, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
          }
          shift[half] = quad_max(maximum);
        }
        exponentials<Product>(p, sum, score, shift);
      }

      float o[Traits::kHeadDimTiles][4] = {};
      Product::add_pb(o, p, v);
      if (args.lse != nullptr && t == 0) {
        float* const lse = args.lse + ptx::multiply_add_wide(item * args.num_heads + share.head, num_tokens, row0 + g);
        if (row0 + g < num_tokens) lse[0] = (shift[0] + ptx::log2_approx(sum[0])) * kLn2;
        if (row0 + g + 8 < num_tokens) lse[8] = (shift[1] + ptx::log2_approx(sum[2])) * kLn2;
      }
      const float factor[2] = {ptx::reciprocal_approx(sum[0]), ptx::reciprocal_approx(sum[2])};
      uint32_t rows[Traits::kRowTiles][2];
#pragma unroll
      for (int n = 0; n < Traits::kRowTiles; ++n) {
        rows[n][0] = pack2<T>(o[n][0] * factor[0], o[n][1] * factor[0]);
        rows[n][1] = pack2<T>(o[n][2] * factor[1], o[n][3] * factor[1]);
      }
      // Only this warp reads its rows of q, and rows past the window do not affect the output of any other row.
      write_packed(q, row0, rows);
      own.store(q.data, args.out_map, 0, window);
    }
    if constexpr (kStages == 2) stage ^= 1;
  }
}

}  // namespace swinkernels::cuda
