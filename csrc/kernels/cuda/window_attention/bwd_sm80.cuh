// Window attention backward, map to map; the scores are computed again from q, k and lse.
//
// Maths     p = exp(score - lse), dp = dout v^T, delta_i = sum_j p_ij dp_ij, ds = p * (dp - delta);
//           dv = p^T dout, dq = scale * ds k, dk = scale * ds^T q, dbias[i, j] = sum of ds over windows, from which
//           the table's gradient is gathered by relative offset. Rows of pad tokens in dk and dv add up to dpad_qkv;
//           the output of a pad query is dropped, so that its dout and p are zero and it contributes nothing. Exact
//           products divide delta by sum_j p_ij: lse is rounded, so that p sums to one only nearly, and what is left
//           over would have one sign in all of a row's ds.
// Tiling    Short windows (one block of keys): a block loops over windows of one head, a warp has 16 queries with p, dp
//           and the running dbias in registers; p and ds go through shared memory to become the transposed operands
//           of dv and dk, of which a warp has 16 keys. Long windows: per block of queries a sweep over the keys for
//           delta and one for dq and dbias, then per block of keys a sweep over the queries for dk and dv: nine
//           products of blocks where the short kernel has five (eleven for rows of more than 64 columns). Their dbias
//           is kept per block in the workspace.
// Order     No atomics: a block adds windows in its own order, reduce_partials.cu adds the blocks in theirs.
// Traffic   q, k, v, dout are read and dq, dk, dv written once: 7 * B * S * C * sizeof(T) bytes, plus lse.
// Roofline  memory bound. B=128, 56x56, 3 heads of 32, window 7, bf16: 544 MB, 162 us at 3.35 TB/s (H100 SXM, published
//           peak). Instructions, counted in the sm_90 code: about 1,220 per warp, 4,900 per window and head: 130 us of
//           issue slots. 153 registers, 75 KB: three blocks, 12 warps per multiprocessor.
// Limits    as forward.
#pragma once

#include "scores.cuh"

namespace swinkernels::cuda {

struct BackwardArguments : WindowArguments<7> {
  const float* lse;
  float scale;
  float* table_partials;  // (workers, heads, table entries), or null if dbias_table is not wanted
  float* pad_partials;    // (workers, heads, 2, head_dim) for k and v, or null if dpad_qkv is not wanted
  float* dense_partials;  // (blocks, N, N) with N rounded up to whole blocks, for long windows
};

// The log-sum-exp in base 2 of one query; infinite for a pad query, whose probabilities must be zero.
__device__ __forceinline__ float load_lse2(const BackwardArguments& args, uint32_t window, int head, int token,
                                           uint64_t dout_row) {
  if (dout_row == 0) return INFINITY;
  return args.lse[(static_cast<int64_t>(window) * args.num_heads + head) * args.num_tokens + token] * kLog2E;
}

// Turns scores in base 2, but for the mask, into probabilities; lse2 is that of this thread's two rows.
template <int kTiles>
__device__ __forceinline__ void to_probabilities(float (&score)[kTiles][4], bool mixed, const int32_t* region,
                                                 float mask2, int row0, int col0, const float (&lse2)[2]) {
  if (mixed) add_mask(score, region, mask2, row0, col0);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) score[j][e] = ptx::exp2_approx(score[j][e] - lse2[e / 2]);
  }
}

// Adds the rows of pad tokens among this warp's 16 rows to `sum`, one value per column.
template <int kColTiles>
__device__ __forceinline__ void add_pad_rows(float* sum, const float (&x)[kColTiles][4], float factor,
                                             const uint64_t* rows, int first, int num_tokens) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool pad0 = first + g < num_tokens && rows[first + g] == 0;
  const bool pad1 = first + g + 8 < num_tokens && rows[first + g + 8] == 0;
  if (!__any_sync(0xffffffffu, pad0 || pad1)) return;
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float column = (pad0 ? x[n][e] : 0.0f) + (pad1 ? x[n][2 + e] : 0.0f);
      column += __shfl_xor_sync(0xffffffffu, column, 4);
      column += __shfl_xor_sync(0xffffffffu, column, 8);
      column += __shfl_xor_sync(0xffffffffu, column, 16);
      if (g == 0) sum[8 * n + 2 * t + e] += column * factor;
    }
  }
}

// Adds ds of 16 queries to a dense dbias, which only this thread touches here; `sums` is its first element. The first
// window writes.
template <int kTiles>
__device__ __forceinline__ void add_dense(float* sums, const float (&ds)[kTiles][4], int stride, bool first) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2* sum = reinterpret_cast<float2*>(sums + 8 * half * stride + 8 * j);
      const float2 before = first ? make_float2(0.0f, 0.0f) : *sum;
      *sum = make_float2(before.x + ds[j][2 * half], before.y + ds[j][2 * half + 1]);
    }
  }
}

// Gathers the gradient of one head's column of the bias table from a dense dbias: entry e is the sum over the pairs
// (i, j) of its relative offset, which fixes j for every i. Entries that no pair has get zero.
template <int kThreads>
__device__ __forceinline__ void gather_table(float* table, const float* dense, int stride, const WindowLayout& layout,
                                             const int32_t* token_index, int num_tokens) {
  for (int entry = threadIdx.x; entry < layout.table_entries; entry += kThreads) {
    int rest = entry, distance = 0, weight = 1;  // distance: i - j, tokens numbered in the table's window
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int width = 2 * layout.table_window[axis] - 1;
      distance += (rest % width - (layout.table_window[axis] - 1)) * weight;
      rest /= width;
      weight *= layout.table_window[axis];
    }
    float sum = 0.0f;
    const int end = min(num_tokens, num_tokens + distance);
    for (int i = max(0, distance); i < end; ++i) {
      const int j = i - distance;
      if (token_index[i] - token_index[j] == entry - layout.table_middle) sum += dense[i * stride + j];
    }
    table[entry] = sum;
  }
}

// The block's share of dpad_qkv: the sums of its warps, in order.
template <class Traits>
__device__ __forceinline__ void write_pad_partial(const BackwardArguments& args,
                                                  const float (&sums)[Traits::kWarps][2][Traits::kHeadDim]) {
  if (args.pad_partials == nullptr) return;
  float* partial = args.pad_partials + static_cast<int64_t>(blockIdx.x) * 2 * args.head_dim;
  for (int i = threadIdx.x; i < 2 * args.head_dim; i += Traits::kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Traits::kWarps; ++warp) sum += sums[warp][i / args.head_dim][i % args.head_dim];
    partial[i] = sum;
  }
}

// delta of this thread's two rows, summed over blocks of keys.
template <class Product>
struct DeltaSum {
  float p_dp[2] = {0.0f, 0.0f};
  float total[2] = {0.0f, 0.0f};  // of p

  template <int kTiles>
  __device__ __forceinline__ void add(const float (&p)[kTiles][4], const float (&dp)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p_dp[e / 2] = fmaf(p[j][e], dp[j][e], p_dp[e / 2]);
        if constexpr (Product::kIsExact) total[e / 2] += p[j][e];
      }
    }
  }

  __device__ __forceinline__ void finish(float (&delta)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] = quad_sum(p_dp[half]);
      if constexpr (Product::kIsExact) {
        const float sum = quad_sum(total[half]);
        if (sum > 0.0f) delta[half] /= sum;  // a pad query's probabilities are all zero
      }
    }
  }
};

template <class Traits>
struct BackwardShortSmem {
  using T = typename Traits::T;
  static constexpr int kStages = Traits::kBackwardStages;
  static constexpr int kSlots = kStages + 1;
  alignas(128) T tiles[kStages][4][Traits::kBlock * Traits::kHeadDim];  // q, k, v, dout
  union {
    alignas(128) T p_ds[2][Traits::kBlock * Traits::kBlock];
    float dbias[Traits::kBlock * Traits::kBlock];  // at the end
  };
  float4 bias[Traits::kTiles][Traits::kThreads];  // fragments, to leave registers to those of dbias
  WindowTokens<7, Traits::kBlock> tokens[kSlots];
  alignas(16) float pad_sums[Traits::kWarps][2][Traits::kHeadDim];
  TokenConstants<Traits::kBlock> constants;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBackwardBlocks)
    window_attention_bwd_short_kernel(const BackwardArguments args) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using PTile = SmemTile<T, Traits::kBlock>;
  using Smem = BackwardShortSmem<Traits>;
  constexpr int kStages = Smem::kStages, kSlots = Smem::kSlots, kTiles = Traits::kTiles;
  constexpr int kColTiles = Traits::kHeadDimTiles;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int first_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens;
  const int head = blockIdx.x % args.num_heads;
  const uint32_t first = blockIdx.x / args.num_heads, step = gridDim.x / args.num_heads;
  const PTile p_tile{smem.p_ds[0]}, ds_tile{smem.p_ds[1]};

  const auto copy_window = [&](int stage, int slot) {
#pragma unroll
    for (int map = 0; map < 4; ++map) {
      copy_rows<Traits::kThreads, Traits::kBlock, false>(Tile{smem.tiles[stage][map]}, smem.tokens[slot].row[map], 0,
                                                         num_tokens, args.head_dim);
    }
  };

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_with_zeros<Traits::kThreads>(smem.p_ds, sizeof(smem.p_ds));
  fill_with_zeros<Traits::kThreads>(smem.pad_sums, sizeof(smem.pad_sums));
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
  {
    float bias[kTiles][4];
    load_bias(
        bias,
        {args.bias_table == nullptr ? nullptr : args.bias_table + head, args.num_heads, smem.constants.table_index},
        args.layout.table_middle, first_row, 0, num_tokens);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      smem.bias[j][threadIdx.x] = make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]);
    }
  }
  float dbias[kTiles][4] = {};

  int stage = 0, slot = 0;
  for (uint32_t window = first; window < args.num_windows; window += step) {
    ptx::cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
    __syncthreads();  // this window's rows are there if they were on their way, and the tiles of the one before are
                      // free
    const int row0 = ptx::opaque(first_row);
    const auto& tokens = smem.tokens[slot];
    float lse2[2];  // asked for now, used after the first product
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + g + 8 * half;
      lse2[half] = row < num_tokens ? load_lse2(args, window, head, row, tokens.row[3][row]) : INFINITY;
    }
    const uint32_t ahead = window + (kStages - 1) * step;
    if (ahead < args.num_windows) copy_window((stage + kStages - 1) % kStages, (slot + kStages - 1) % kSlots);
    ptx::cp_async_commit();
    if (window + kStages * step < args.num_windows) {
      locate_tokens<T>(smem.tokens[(slot + kStages) % kSlots], smem.constants, args, window + kStages * step, head);
    }
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
    }

    const Tile q{smem.tiles[stage][0]}, k{smem.tiles[stage][1]}, v{smem.tiles[stage][2]}, dout{smem.tiles[stage][3]};
    float dq[kColTiles][4] = {};
    if (row0 < num_tokens) {
      float p[kTiles][4] = {}, dp[kTiles][4] = {};
      Product::add_abt(p, q, row0, k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float4 bias = smem.bias[j][threadIdx.x];
        p[j][0] = fmaf(p[j][0], args.scale2, bias.x);
        p[j][1] = fmaf(p[j][1], args.scale2, bias.y);
        p[j][2] = fmaf(p[j][2], args.scale2, bias.z);
        p[j][3] = fmaf(p[j][3], args.scale2, bias.w);
      }
      to_probabilities(p, tokens.mixed, tokens.region, args.mask2, row0, 0, lse2);
      write_fragment<false>(p_tile, row0, p, 1.0f, 1.0f, Traits::kBlock, Traits::kBlock);
      Product::add_abt(dp, dout, row0, v);
      DeltaSum<Product> sums;
      sums.add(p, dp);
      float delta[2];
      sums.finish(delta);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[j][e] *= dp[j][e] - delta[e / 2];  // ds
          dbias[j][e] += p[j][e];
        }
      }
      write_fragment<false>(ds_tile, row0, p, 1.0f, 1.0f, Traits::kBlock, Traits::kBlock);
      Product::add_pb(dq, p, k);
    }
    __syncthreads();  // p and ds are whole; k and v are not read any more and take the outputs
    if (row0 < num_tokens) {
      write_fragment<true>(v, row0, dq, args.scale, args.scale, num_tokens, args.head_dim);
      store_rows(v, row0, tokens.row[4], 0, num_tokens, args.head_dim);
      {
        float dk[kColTiles][4] = {};
        Product::template add_ptb<kTiles>(dk, ds_tile, row0, q);
        write_fragment<true>(k, row0, dk, args.scale, args.scale, num_tokens, args.head_dim);
        store_rows(k, row0, tokens.row[5], 0, num_tokens, args.head_dim);
        if (args.pad_partials != nullptr) {
          add_pad_rows(smem.pad_sums[row0 / 16][0], dk, args.scale, tokens.row[5], row0, num_tokens);
        }
      }
      {
        float dv[kColTiles][4] = {};
        Product::template add_ptb<kTiles>(dv, p_tile, row0, dout);
        __syncwarp();  // dq has left these rows
        write_fragment<true>(v, row0, dv, 1.0f, 1.0f, num_tokens, args.head_dim);
        store_rows(v, row0, tokens.row[6], 0, num_tokens, args.head_dim);
        if (args.pad_partials != nullptr) {
          add_pad_rows(smem.pad_sums[row0 / 16][1], dv, 1.0f, tokens.row[6], row0, num_tokens);
        }
      }
    }
    stage = (stage + 1) % kStages;
    slot = (slot + 1) % kSlots;
  }

  __syncthreads();
  write_pad_partial<Traits>(args, smem.pad_sums);
  if (args.table_partials != nullptr) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float* row = smem.dbias + (first_row + g) * Traits::kBlock + 8 * j + 2 * t;
      store2(row, dbias[j][0], dbias[j][1]);
      store2(row + 8 * Traits::kBlock, dbias[j][2], dbias[j][3]);
    }
    __syncthreads();
    gather_table<Traits::kThreads>(args.table_partials + static_cast<int64_t>(blockIdx.x) * args.layout.table_entries,
                                   smem.dbias, Traits::kBlock, args.layout, smem.constants.table_index, num_tokens);
  }
}

template <class Traits>
struct BackwardLongSmem {
  using T = typename Traits::T;
  alignas(128) T tiles[4][Traits::kBlock * Traits::kHeadDim];  // q, k, v, dout
  alignas(128) T p_ds[2][Traits::kBlock * Traits::kBlock];
  WindowTokens<7, kLongestWindow> tokens;
  float lse2[kLongestWindow];
  float delta[kLongestWindow];
  alignas(16) float pad_sums[Traits::kWarps][2][Traits::kHeadDim];
  TokenConstants<kLongestWindow> constants;
  float table[Traits::kSharedTableEntries + 1];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLongBlocks)
    window_attention_bwd_long_kernel(const BackwardArguments args) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using PTile = SmemTile<T, Traits::kBlock>;
  using Smem = BackwardLongSmem<Traits>;
  static_assert(Traits::kKeys == Traits::kBlock);
  constexpr int kTiles = Traits::kTiles, kColTiles = Traits::kHeadDimTiles, kBlock = Traits::kBlock;
  constexpr bool kKeyGradientsTogether = Traits::kHeadDim <= 64;  // else registers do not hold both
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int first_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens;
  const int head = blockIdx.x % args.num_heads;
  const uint32_t first = blockIdx.x / args.num_heads, step = gridDim.x / args.num_heads;
  const int blocks = (num_tokens + kBlock - 1) / kBlock;
  const int dense_stride = blocks * kBlock;
  float* dense = args.dense_partials == nullptr
                     ? nullptr
                     : args.dense_partials + static_cast<int64_t>(blockIdx.x) * dense_stride * dense_stride;
  const Tile q{smem.tiles[0]}, k{smem.tiles[1]}, v{smem.tiles[2]}, dout{smem.tiles[3]};
  const PTile p_tile{smem.p_ds[0]}, ds_tile{smem.p_ds[1]};

  const auto copy_block = [&](int map, int block) {
    copy_rows<Traits::kThreads, kBlock, true>(Tile{smem.tiles[map]}, smem.tokens.row[map], block * kBlock, num_tokens,
                                              args.head_dim);
  };
  const auto wait_for_copies = [&]() {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  };

  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_with_zeros<Traits::kThreads>(smem.pad_sums, sizeof(smem.pad_sums));
  fill_token_constants(smem.constants, args);
  const BiasColumn column = stage_bias_column<Traits>(args, head, smem.table, smem.constants.table_index);

  // p and dp of this warp's 16 rows of the block of queries in q and dout and the block of keys in k and v.
  const auto recompute = [&](float (&p)[kTiles][4], float (&dp)[kTiles][4], int row0, int query_block, int key_block) {
    const int row = query_block * kBlock + row0, col = key_block * kBlock;
    Product::add_abt(p, q, row0, k);
    const float lse2[2] = {smem.lse2[row + g], smem.lse2[row + g + 8]};
    {
      float bias[kTiles][4];
      load_bias(bias, column, args.layout.table_middle, row, col, num_tokens);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) p[j][e] = fmaf(p[j][e], args.scale2, bias[j][e]);
      }
    }
    to_probabilities(p, smem.tokens.mixed, smem.tokens.region, args.mask2, row, col, lse2);
    Product::add_abt(dp, dout, row0, v);
  };

  // Calls add_products with p and ds of every block of queries in p_tile and ds_tile, the queries in q and dout.
  const auto for_each_query_block = [&](int key_block, auto&& add_products) {
#pragma unroll 1
    for (int query_block = 0; query_block < blocks; ++query_block) {
      const int row0 = ptx::opaque(first_row), row = query_block * kBlock + row0;
      copy_block(0, query_block);
      copy_block(3, query_block);
      wait_for_copies();
      {
        // Queries past the window have an infinite lse, hence p = 0, and zeros for delta's sake.
        float p[kTiles][4] = {}, dp[kTiles][4] = {};
        recompute(p, dp, row0, query_block, key_block);
        write_fragment<false>(p_tile, row0, p, 1.0f, 1.0f, kBlock, kBlock);
        const float delta[2] = {smem.delta[row + g], smem.delta[row + g + 8]};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) p[j][e] *= dp[j][e] - delta[e / 2];
        }
        write_fragment<false>(ds_tile, row0, p, 1.0f, 1.0f, kBlock, kBlock);
      }
      __syncthreads();
      add_products(row0);
      __syncthreads();
    }
  };

  // Stores dk (map 1) or dv (map 2) of this warp's 16 keys through a tile that nobody reads.
  const auto finish_keys = [&](const float (&x)[kColTiles][4], int map, const Tile& tile, float factor, int key_block) {
    const int row0 = ptx::opaque(first_row), first_key = key_block * kBlock;
    const uint64_t* rows = smem.tokens.row[4 + map];
    write_fragment<true>(tile, row0, x, factor, factor, num_tokens - first_key, args.head_dim);
    store_rows(tile, row0, rows, first_key, num_tokens, args.head_dim);
    if (args.pad_partials != nullptr) {
      add_pad_rows(smem.pad_sums[row0 / 16][map - 1], x, factor, rows, first_key + row0, num_tokens);
    }
  };

  for (uint32_t window = first; window < args.num_windows; window += step) {
    __syncthreads();  // the constants are there, and nobody reads the tiles and addresses of the window before
    locate_tokens<T>(smem.tokens, smem.constants, args, window, head);
    for (int i = threadIdx.x; i < kLongestWindow; i += Traits::kThreads) {
      smem.lse2[i] = i < num_tokens ? load_lse2(args, window, head, i, smem.tokens.row[3][i]) : INFINITY;
    }
    __syncthreads();

    // The first sweep over the keys gives delta, the second dq and dbias.
    for (int query_block = 0; query_block < blocks; ++query_block) {
      const int row0 = ptx::opaque(first_row);
      const int row = query_block * kBlock + row0;
      DeltaSum<Product> sums;
      float delta[2] = {0.0f, 0.0f};
      float dq[kColTiles][4] = {};
      copy_block(0, query_block);
      copy_block(3, query_block);
#pragma unroll 1
      for (int step_of_sweeps = 0; step_of_sweeps < 2 * blocks; ++step_of_sweeps) {
        const bool second = step_of_sweeps >= blocks;
        const int key_block = second ? step_of_sweeps - blocks : step_of_sweeps;
        copy_block(1, key_block);
        copy_block(2, key_block);
        wait_for_copies();
        if (row < num_tokens) {
          float p[kTiles][4] = {}, dp[kTiles][4] = {};
          recompute(p, dp, row0, query_block, key_block);
          if (!second) {
            sums.add(p, dp);
          } else {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) p[j][e] *= dp[j][e] - delta[e / 2];  // ds
            }
            if (dense != nullptr) {
              float* dense_sums = dense + (row + g) * dense_stride + key_block * kBlock + 2 * t;
              add_dense(dense_sums, p, dense_stride, window == first);
            }
            Product::add_pb(dq, p, k);
          }
        }
        if (step_of_sweeps == blocks - 1) {
          sums.finish(delta);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (t == 0) smem.delta[row + g + 8 * half] = delta[half];
          }
        }
        __syncthreads();
      }
      if (row < num_tokens) {
        write_fragment<true>(q, row0, dq, args.scale, args.scale, num_tokens - query_block * kBlock, args.head_dim);
        store_rows(q, row0, smem.tokens.row[4], query_block * kBlock, num_tokens, args.head_dim);
      }
      __syncthreads();
    }

    for (int key_block = 0; key_block < blocks; ++key_block) {
      copy_block(1, key_block);
      copy_block(2, key_block);
      if constexpr (kKeyGradientsTogether) {
        float dk[kColTiles][4] = {}, dv[kColTiles][4] = {};
        for_each_query_block(key_block, [&](int row0) {
          Product::template add_ptb<kTiles>(dv, p_tile, row0, dout);
          Product::template add_ptb<kTiles>(dk, ds_tile, row0, q);
        });
        finish_keys(dv, 2, dout, 1.0f, key_block);
        finish_keys(dk, 1, q, args.scale, key_block);
      } else {
        {
          float dv[kColTiles][4] = {};
          for_each_query_block(key_block, [&](int row0) { Product::template add_ptb<kTiles>(dv, p_tile, row0, dout); });
          finish_keys(dv, 2, dout, 1.0f, key_block);
        }
        __syncthreads();
        float dk[kColTiles][4] = {};
        for_each_query_block(key_block, [&](int row0) { Product::template add_ptb<kTiles>(dk, ds_tile, row0, q); });
        finish_keys(dk, 1, q, args.scale, key_block);
      }
      __syncthreads();
    }
  }

  __syncthreads();
  write_pad_partial<Traits>(args, smem.pad_sums);
  if (args.table_partials != nullptr) {
    gather_table<Traits::kThreads>(args.table_partials + static_cast<int64_t>(blockIdx.x) * args.layout.table_entries,
                                   dense, dense_stride, args.layout, smem.constants.table_index, num_tokens);
  }
}

}  // namespace swinkernels::cuda
