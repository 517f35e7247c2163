// Window attention backward, from and to feature maps; the scores are recomputed from q, k and lse.
//
// Maths     p = exp(score - lse), dp = d * (dout v^T) with d as in fwd_sm80.cuh, delta_i = sum_j p_ij dp_ij,
//           ds = p * (dp - delta); dv = (d p)^T dout, dq = scale * ds k, dk = scale * ds^T q (for v2 see cosine.cuh),
//           dbias[i, j] = sum of ds over windows, from which the table's gradient is gathered by relative offset.
//           dpad_qkv is the sum of the rows of dk and dv that belong to pad tokens. The output of a pad query is
//           discarded, so its dout and p are zero and it contributes nothing. With exact products, p is divided by its
//           row sum: lse is rounded, so the sum is not exactly one, and the resulting errors would have the same sign
//           in a whole row of ds.
// Tiling    Short windows (one block of keys): a block loops over windows of one head, and a warp has 16 queries with
//           p, dp and the running dbias in registers. p and ds are transposed through shared memory for dv and dk, of
//           which a warp computes 16 rows. Long windows: for each block of queries, the kernel sweeps over the keys
//           twice, for delta and for dq; then, for each block of keys, over the queries for dk and dv. This takes nine
//           tile products (eleven for rows of more than 64 columns), compared with five for short windows. A separate
//           kernel, bwd_bias_sm80.cuh, computes dbias. Most 16-bit calls use bwd_long_sm80.cuh instead.
// Order     No atomics: a block accumulates over its windows in order, and reduce_partials.cu adds the blocks' sums in
//           order.
// Traffic   q, k, v, dout are read and dq, dk, dv written once: 7 * B * S * C * sizeof(T) bytes, plus lse.
// Roofline  memory bound. The most common case runs the kernel in bwd_short16_sm80.cuh; see the figures there. At
//           window 7 and head_dim 32: three blocks, 12 warps per multiprocessor.
// Limits    see fwd_sm80.cuh.
#pragma once

#include "bwd_common.cuh"

namespace swinkernels::cuda {

// Gathers the gradient of one head's column of the bias table from a dense dbias. An entry is the sum over the pairs
// (i, j) that use it; the entry and i determine j. Entries that no pair uses are set to zero. token_index is both the
// query_index and the key_index of every token, which are equal for a table without table_pairs.
template <int kThreads>
__device__ __forceinline__ void gather_table(float* table, const float* dense, int stride, const WindowLayout& layout,
                                             const int32_t* token_index, int num_tokens) {
  for (int entry = threadIdx.x; entry < layout.table_entries; entry += kThreads) {
    const int distance = layout.token_distance<false>(entry);
    float sum = 0.0f;
    const int end = min(num_tokens, num_tokens + distance);
    for (int i = max(0, distance); i < end; ++i) {
      const int j = i - distance;
      if (token_index[i] - token_index[j] == entry - layout.table_middle) sum += dense[i * stride + j];
    }
    table[entry] = sum;
  }
}

template <class Traits>
struct BackwardShortSmem {
  using T = typename Traits::T;
  static constexpr int kStages = Traits::kBackwardStages;
  static constexpr int kSlots = kStages + 1;
  alignas(128) T tiles[kStages][4][Traits::kBlock * Traits::kHeadDim];  // q, k, v, dout
  union {
    alignas(128) T p_ds[2][Traits::kBlock * Traits::kBlock];
    float dbias[Traits::kBlock * Traits::kBlock];  // used at the end
  };
  float4 bias[Traits::kTiles][Traits::kThreads];  // fragments; in shared memory, because dbias leaves too few registers
  WindowTokens<7, Traits::kKeys, Traits::kBlock> tokens[kSlots];
  alignas(16) float pad_sums[Traits::kWarps][2][Traits::kHeadDim];
  float logit_sums[Traits::kWarps];
  int32_t exponents[Traits::kWarps];  // exponents of ds, half_range.cuh
  InverseNorms<Traits::kBlock> norms;
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
  static_assert(!Traits::kNarrow || Smem::kStages > 2 || Traits::kBackwardBlocks * (sizeof(Smem) + 1024) <= 228 * 1024,
                "the blocks that registers are shared out for do not fit on a multiprocessor of sm_90");
  constexpr int kStages = Smem::kStages, kSlots = Smem::kSlots, kTiles = Traits::kTiles;
  constexpr int kColTiles = Traits::kHeadDimTiles;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int first_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4;
  const int num_tokens = args.num_tokens;
  const BlockShare share = BlockShare::of(args);
  const int head = share.head;
  const uint32_t first = share.first, step = share.step;
  const float factor = score_factor(args, head);
  const PTile p_tile{smem.p_ds[0]}, ds_tile{smem.p_ds[1]};

  const auto copy_window = [&](int stage, int slot) {
#pragma unroll
    for (int map = 0; map < 4; ++map) {
      copy_rows<Traits::kThreads, Traits::kBlock, false>(Tile{smem.tiles[stage][map]}, smem.tokens[slot].row(map), 0,
                                                         num_tokens, args.row_bytes, args.has_whole_rows());
    }
  };
  const auto locate_window = [&](int slot, uint32_t item) {
    locate_tokens<T, 0, 1, 2, 3, 4, 5, 6>(smem.tokens[slot], smem.constants, args, args.window_of(share.type, item),
                                          head, 0, num_tokens);
  };

  // Rows past the window and columns past head_dim stay zero from here on.
  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_with_zeros<Traits::kThreads>(smem.p_ds, sizeof(smem.p_ds));
  fill_with_zeros<Traits::kThreads>(smem.pad_sums, sizeof(smem.pad_sums));
  if (threadIdx.x < Traits::kWarps) smem.exponents[threadIdx.x] = 0;
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
  {
    float bias[kTiles][4];
    load_bias(bias, global_bias(args, share, smem.constants), first_row, 0, num_tokens);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      smem.bias[j][threadIdx.x] = make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]);
    }
  }
  float dbias[kTiles][4] = {};
  float logit_sum = 0.0f;

  int stage = 0, slot = 0;
  for (uint32_t item = first; item < args.items; item += step) {
    ptx::cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
    __syncthreads();  // the previous tiles are free, and this window's rows have arrived if they were in flight
    const int row0 = ptx::opaque(first_row);
    const auto& tokens = smem.tokens[slot];
    const uint32_t window = args.window_of(share.type, item);
    float lse2[2];  // loaded now, used after the first product
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + g + 8 * half;
      lse2[half] =
          row < num_tokens ? load_lse2(args, args.first_query(window, head), row, tokens.row(3)[row]) : INFINITY;
    }
    const uint32_t ahead = item + (kStages - 1) * step;
    if (ahead < args.items) copy_window((stage + kStages - 1) % kStages, (slot + kStages - 1) % kSlots);
    ptx::cp_async_commit();
    if (item + kStages * step < args.items) locate_window((slot + kStages) % kSlots, item + kStages * step);
    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
    }

    const Tile q{smem.tiles[stage][0]}, k{smem.tiles[stage][1]}, v{smem.tiles[stage][2]}, dout{smem.tiles[stage][3]};
    if (args.is_cosine()) {
      find_inverse_norms(smem.norms, q, k, row0);
      __syncthreads();
    }
    float p[kTiles][4] = {}, dq[kColTiles][4] = {};
    if (row0 < num_tokens) {
      Product::add_abt(p, q, row0, k);
      finish_scores(p, factor * kLog2E, args.is_cosine() ? &smem.norms : nullptr, row0,
                    [&](int j) { return smem.bias[j][threadIdx.x]; });
      if (tokens.mixed) add_mask(p, tokens.region + row0, tokens.region, args.mask2);
      to_probabilities(p, lse2);
      if constexpr (Product::kIsExact) normalise(p);
      uint32_t kept = 0;
      if (args.has_dropout()) kept = kept_weights<kTiles>(args, window, head, row0, 0);
      write_weights(p_tile, row0, p, kept, args.has_dropout());
      float dp[kTiles][4] = {};
      Product::add_abt(dp, dout, row0, v);
      if (args.has_dropout()) undrop(dp, kept, args.dropout_scale);
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
      write_fragment<false>(ds_tile, row0, p, 1.0f, 1.0f, Traits::kBlock, Traits::kBlock);
    }
    if (args.is_cosine()) {
      __syncthreads();  // all reads of the original rows are done
      to_unit_rows(q, row0, smem.norms.q);
      to_unit_rows(k, row0, smem.norms.k);
      __syncthreads();
    }
    if (row0 < num_tokens) Product::add_pb(dq, p, k);
    __syncthreads();  // p and ds are complete; k and v are free for the outputs
    float query_factor = factor, key_factor = factor;
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
      {
        if (args.is_cosine()) {
          const float2 dot = to_row_gradient<true>(dq, q, row0, smem.norms.q, query_factor);
          logit_sum += (dot.x + dot.y) * query_factor;
          query_factor = 1.0f;
        }
        write_fragment<true>(v, row0, dq, query_factor, query_factor, num_tokens, args.head_dim);
        store_rows(v, row0, tokens.row(4), 0, num_tokens, args.row_bytes, args.has_whole_rows());
      }
      {
        float dk[kColTiles][4] = {};
        Product::template add_ptb<kTiles>(dk, ds_tile, row0, q);
        if (args.is_cosine()) {
          to_row_gradient<true>(dk, k, row0, smem.norms.k, key_factor);
          key_factor = 1.0f;
        }
        write_fragment<true>(k, row0, dk, key_factor, key_factor, num_tokens, args.head_dim);
        store_rows(k, row0, tokens.row(5), 0, num_tokens, args.row_bytes, args.has_whole_rows());
        if (args.pad_partials != nullptr) {
          add_pad_rows(smem.pad_sums[row0 / 16][0], dk, key_factor, tokens.row(5), row0, num_tokens);
        }
      }
      {
        const float value_factor = args.has_dropout() ? args.dropout_scale : 1.0f;
        float dv[kColTiles][4] = {};
        Product::template add_ptb<kTiles>(dv, p_tile, row0, dout);
        __syncwarp();  // dq has been stored from these rows
        write_fragment<true>(v, row0, dv, value_factor, value_factor, num_tokens, args.head_dim);
        store_rows(v, row0, tokens.row(6), 0, num_tokens, args.row_bytes, args.has_whole_rows());
        if (args.pad_partials != nullptr) {
          add_pad_rows(smem.pad_sums[row0 / 16][1], dv, value_factor, tokens.row(6), row0, num_tokens);
        }
      }
    }
    stage = (stage + 1) % kStages;
    slot = (slot + 1) % kSlots;
  }

  __syncthreads();
  write_pad_partial<Traits>(args, smem.pad_sums);
  write_logit_partial<Traits>(args, smem.logit_sums, logit_sum, head);
  if (args.dense_partials != nullptr) {
    float* const partial = args.dense_partials + static_cast<int64_t>(blockIdx.x) * Traits::kBlock * Traits::kBlock;
    write_matrix(partial, Traits::kBlock, first_row, dbias);
  }
  if (args.table_partials != nullptr) {
    write_matrix(smem.dbias, Traits::kBlock, first_row, dbias);
    __syncthreads();
    gather_table<Traits::kThreads>(args.table_partials + static_cast<int64_t>(blockIdx.x) * args.layout.table_entries,
                                   smem.dbias, Traits::kBlock, args.layout, smem.constants.query_index, num_tokens);
  }
}

template <class Traits>
struct BackwardLongSmem {
  using T = typename Traits::T;
  alignas(128) T tiles[4][Traits::kBlock * Traits::kHeadDim];  // q, k, v, dout
  alignas(128) T p_ds[2][Traits::kBlock * Traits::kBlock];
  alignas(16) float pad_sums[Traits::kWarps][2][Traits::kHeadDim];
  InverseNorms<Traits::kBlock> norms;
  float table[Traits::kSharedTableEntries + 1];
  float logit_sums[Traits::kWarps];
  int32_t exponents[Traits::kWarps];  // exponents of ds, half_range.cuh
  int32_t mixed;

  // The per-token data follows this struct in shared memory.
  static size_t bytes(const WindowLayout& layout, int blocks) {
    const size_t per_token =
        7 * sizeof(uint64_t) + 2 * sizeof(float) + (1 + LongTokenConstants::arrays(layout)) * sizeof(int32_t);
    return sizeof(BackwardLongSmem) + blocks * Traits::kBlock * per_token;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLongBlocks)
    window_attention_bwd_long_kernel(const BackwardArguments args, int32_t blocks) {
  using T = typename Traits::T;
  using Product = typename Traits::Product;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using PTile = SmemTile<T, Traits::kBlock>;
  using Smem = BackwardLongSmem<Traits>;
  static_assert(Traits::kKeys == Traits::kBlock);
  constexpr int kTiles = Traits::kTiles, kColTiles = Traits::kHeadDimTiles, kBlock = Traits::kBlock;
  constexpr bool kKeyGradientsTogether = Traits::kHeadDim <= 64;  // otherwise there are too few registers for both
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int first_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens, capacity = blocks * kBlock;
  const BlockShare share = BlockShare::of(args);
  const int head = share.head;
  const Tile q{smem.tiles[0]}, k{smem.tiles[1]}, v{smem.tiles[2]}, dout{smem.tiles[3]};
  const PTile p_tile{smem.p_ds[0]}, ds_tile{smem.p_ds[1]};
  SmemArena arena{dynamic_smem() + sizeof(Smem)};
  LongWindowTokens<7> tokens{arena.take<uint64_t>(7 * capacity), arena.take<int32_t>(capacity), smem.mixed, capacity};
  const auto constants = LongTokenConstants::of(arena, args.layout, capacity);
  float *const saved_lse2 = arena.take<float>(capacity), *const saved_delta = arena.take<float>(capacity);

  const auto copy_block = [&](int map, int block) {
    copy_rows<Traits::kThreads, kBlock, true>(Tile{smem.tiles[map]}, tokens.row(map), block * kBlock, num_tokens,
                                              args.row_bytes, args.has_whole_rows());
  };
  // Waits for the copies and, in v2, computes the inverse norms of the blocks that have arrived.
  const auto wait_for_copies = [&]() {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (args.is_cosine()) {
      find_inverse_norms(smem.norms, q, k, first_row);
      __syncthreads();
    }
  };

  fill_with_zeros<Traits::kThreads>(smem.tiles, sizeof(smem.tiles));
  fill_with_zeros<Traits::kThreads>(smem.pad_sums, sizeof(smem.pad_sums));
  fill_token_constants(constants, args, 0, num_tokens);
  const Bias bias_source = staged_bias<Traits>(args, share, smem.table, constants);
  float logit_sum = 0.0f;

  // Computes p and dp for this warp's 16 rows of the query block (tiles q and dout) and for the key block (k and v).
  // Returns one bit per attention weight, which is set if dropout keeps the weight.
  const auto recompute = [&](float (&p)[kTiles][4], float (&dp)[kTiles][4], int row0, uint32_t window, int query_block,
                             int key_block) {
    // Values derived from row and col are recomputed on use, because registers are scarce.
    const int row = ptx::opaque(query_block * kBlock + row0), col = ptx::opaque(key_block * kBlock);
    Product::add_abt(p, q, row0, k);
    const float lse2[2] = {saved_lse2[row + g], saved_lse2[row + g + 8]};
    {
      float bias[kTiles][4];
      load_bias(bias, bias_source, row, col, num_tokens);
      finish_scores(p, score_factor(args, head) * kLog2E, args.is_cosine() ? &smem.norms : nullptr, row0,
                    [&](int j) { return make_float4(bias[j][0], bias[j][1], bias[j][2], bias[j][3]); });
    }
    if (tokens.mixed) add_mask(p, tokens.region + row, tokens.region + col, args.mask2);
    to_probabilities(p, lse2);
    Product::add_abt(dp, dout, row0, v);
    if (!args.has_dropout()) return uint32_t{0};
    const uint32_t kept = kept_weights<kTiles>(args, window, head, row, col);
    undrop(dp, kept, args.dropout_scale);
    return kept;
  };

  // For every block of queries, loads the block into q and dout, computes d * p in p_tile and ds in ds_tile, and calls
  // add_products(row0, rescale). ds is scaled by 2 ** -exponent, with the same exponent for all blocks. If the exponent
  // grows, the sums over earlier blocks must be multiplied by rescale.
  const auto for_each_query_block = [&](uint32_t window, int key_block, int& exponent, auto&& add_products) {
#pragma unroll 1
    for (int query_block = 0; query_block < blocks; ++query_block) {
      const int row0 = ptx::opaque(first_row), row = query_block * kBlock + row0;
      copy_block(0, query_block);
      copy_block(3, query_block);
      wait_for_copies();
      [[maybe_unused]] int own_exponent = exponent;
      {
        // Queries past the window have an infinite lse, so p = 0, and a finite delta, so ds = 0.
        float p[kTiles][4] = {}, dp[kTiles][4] = {};
        const uint32_t kept = recompute(p, dp, row0, window, query_block, key_block);
        write_weights(p_tile, row0, p, kept, args.has_dropout());
        const float delta[2] = {saved_delta[row + g], saved_delta[row + g + 8]};
        to_dscores(p, dp, delta);
        if constexpr (kHasNarrowRange<T>) {
          own_exponent = max(exponent, excess_exponent(p));
          if (own_exponent != 0) multiply(p, power_of_two(-own_exponent));
          if (lane == 0) smem.exponents[row0 / 16] = own_exponent;
        }
        write_fragment<false>(ds_tile, row0, p, 1.0f, 1.0f, kBlock, kBlock);
      }
      if (args.is_cosine()) to_unit_rows(q, row0, smem.norms.q);  // only this warp has read these rows
      __syncthreads();
      float rescale = 1.0f;
      if constexpr (kHasNarrowRange<T>) {
        int largest = exponent;
#pragma unroll
        for (int warp = 0; warp < Traits::kWarps; ++warp) largest = max(largest, smem.exponents[warp]);
        if (largest != exponent) {
          multiply_rows(ds_tile, row0, power_of_two(own_exponent - largest));
          __syncthreads();
          rescale = power_of_two(exponent - largest);
          exponent = largest;
        }
      }
      add_products(row0, rescale);
      __syncthreads();
    }
  };

  // Stores dk (map 1) or dv (map 2) of this warp's 16 keys through a tile that is no longer read.
  const auto finish_keys = [&](float (&x)[kColTiles][4], int map, const Tile& tile, float factor, int key_block) {
    const int row0 = ptx::opaque(first_row), first_key = key_block * kBlock;
    const uint64_t* rows = tokens.row(4 + map);
    if (map == 1 && args.is_cosine()) {
      to_row_gradient<false>(x, k, row0, smem.norms.k, factor);
      factor = 1.0f;
    }
    write_fragment<true>(tile, row0, x, factor, factor, num_tokens - first_key, args.head_dim);
    store_rows(tile, row0, rows, first_key, num_tokens, args.row_bytes, args.has_whole_rows());
    if (args.pad_partials != nullptr) {
      add_pad_rows(smem.pad_sums[row0 / 16][map - 1], x, factor, rows, first_key + row0, num_tokens);
    }
  };

  for (uint32_t item = share.first; item < args.items; item += share.step) {
    const uint32_t window = args.window_of(share.type, item);
    __syncthreads();  // the constants are written, and the previous window's tiles and addresses are free
    locate_tokens<T, 0, 1, 2, 3, 4, 5, 6>(tokens, constants, args, window, head, 0, num_tokens);
    __syncthreads();
    const int64_t first_query = args.first_query(window, head);
    for (int i = threadIdx.x; i < capacity; i += Traits::kThreads) {
      saved_lse2[i] = i < num_tokens ? load_lse2(args, first_query, i, tokens.row(3)[i]) : INFINITY;
    }
    __syncthreads();

    // The first sweep over the keys computes delta, the second dq.
    for (int query_block = 0; query_block < blocks; ++query_block) {
      const int row0 = ptx::opaque(first_row);
      const int row = query_block * kBlock + row0;
      RowSums delta, total;  // total: the sum of p
      float dq[kColTiles][4] = {};
      int exponent = 0;
      copy_block(0, query_block);
      copy_block(3, query_block);
#pragma unroll 1
      for (int step_of_sweeps = 0; step_of_sweeps < 2 * blocks; ++step_of_sweeps) {
        const bool second = step_of_sweeps >= blocks;
        const int key_block = second ? step_of_sweeps - blocks : step_of_sweeps;
        copy_block(1, key_block);
        copy_block(2, key_block);
        wait_for_copies();
        float p[kTiles][4] = {};
        if (row < num_tokens) {
          float dp[kTiles][4] = {};
          recompute(p, dp, row0, window, query_block, key_block);
          if (second) {
            to_dscores(p, dp, delta.x);
          } else {
            delta.add(p, dp);
            if constexpr (Product::kIsExact) total.add(p);
          }
        }
        if (second) {
          if (args.is_cosine()) {
            __syncthreads();  // all reads of the original rows are done
            to_unit_rows(k, row0, smem.norms.k);
            __syncthreads();
          }
          if (row < num_tokens) {
            if constexpr (kHasNarrowRange<T>) {
              const int needed = max(exponent, excess_exponent(p));
              if (needed != exponent) multiply(dq, power_of_two(exponent - needed));
              exponent = needed;
              if (exponent != 0) multiply(p, power_of_two(-exponent));
            }
            Product::add_pb(dq, p, k);
          }
        }
        if (step_of_sweeps == blocks - 1) {
          delta.finish();
          if constexpr (Product::kIsExact) total.finish();
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = row + g + 8 * half;
            if constexpr (Product::kIsExact) {  // from here on, p computed from the saved lse sums to one
              if (total.x[half] > 0.0f) {
                delta.x[half] /= total.x[half];
                if (t == 0) saved_lse2[at] += log2f(total.x[half]);
              }
            }
            if (t == 0) saved_delta[at] = delta.x[half];
          }
        }
        __syncthreads();
      }
      if (row < num_tokens) {
        float factor = score_factor(args, head);
        if constexpr (kHasNarrowRange<T>) factor *= power_of_two(exponent);
        if (args.is_cosine()) {
          const float2 dot = to_row_gradient<false>(dq, q, row0, smem.norms.q, factor);
          logit_sum += (dot.x + dot.y) * factor;
          factor = 1.0f;
        }
        write_fragment<true>(q, row0, dq, factor, factor, num_tokens - query_block * kBlock, args.head_dim);
        store_rows(q, row0, tokens.row(4), query_block * kBlock, num_tokens, args.row_bytes, args.has_whole_rows());
      }
      __syncthreads();
    }
    if (args.lse2_delta != nullptr) {
      for (int i = threadIdx.x; i < num_tokens; i += Traits::kThreads) {
        args.lse2_delta[first_query + i] = make_float2(saved_lse2[i], saved_delta[i]);
      }
    }

    for (int key_block = 0; key_block < blocks; ++key_block) {
      const float value_factor = args.has_dropout() ? args.dropout_scale : 1.0f;
      int exponent = 0;
      copy_block(1, key_block);
      copy_block(2, key_block);
      if constexpr (kKeyGradientsTogether) {
        float dk[kColTiles][4] = {}, dv[kColTiles][4] = {};
        for_each_query_block(window, key_block, exponent, [&](int row0, float rescale) {
          Product::template add_ptb<kTiles>(dv, p_tile, row0, dout);
          if (rescale != 1.0f) multiply(dk, rescale);
          Product::template add_ptb<kTiles>(dk, ds_tile, row0, q);
        });
        finish_keys(dv, 2, dout, value_factor, key_block);
        finish_keys(dk, 1, q, score_factor(args, head) * power_of_two(exponent), key_block);
      } else {
        {
          float dv[kColTiles][4] = {};
          for_each_query_block(window, key_block, exponent,
                               [&](int row0, float) { Product::template add_ptb<kTiles>(dv, p_tile, row0, dout); });
          finish_keys(dv, 2, dout, value_factor, key_block);
        }
        __syncthreads();
        float dk[kColTiles][4] = {};
        exponent = 0;
        for_each_query_block(window, key_block, exponent, [&](int row0, float rescale) {
          if (rescale != 1.0f) multiply(dk, rescale);
          Product::template add_ptb<kTiles>(dk, ds_tile, row0, q);
        });
        finish_keys(dk, 1, q, score_factor(args, head) * power_of_two(exponent), key_block);
      }
      __syncthreads();
    }
  }

  __syncthreads();
  write_pad_partial<Traits>(args, smem.pad_sums);
  write_logit_partial<Traits>(args, smem.logit_sums, logit_sum, head);
}

}  // namespace swinkernels::cuda
