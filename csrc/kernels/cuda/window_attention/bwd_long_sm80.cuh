// Window attention backward for long windows of the plain kind (long_windows.cuh), and for windows of any length with
// axis_tables (bwd_axis_sm80.cuh). Other long windows use bwd_sm80.cuh.
//
// Maths     As in bwd_sm80.cuh and, for v2, cosine.cuh, with seven tile products: three in the query kernel, which also
//           sums dbias, and four in the key kernel, which reads the delta that the query kernel stored.
// Queries   A block processes one strip of a head's queries after another, 16 rows per warp, against all keys of a
//           window. Each warp processes at most 64 of these keys, so P, dP and the running dbias of its part stay in
//           registers (dbias for all windows of the block), and nothing is computed twice. Warps with the same rows
//           exchange their parts of delta and dq through shared memory. At the end of each strip, the block writes its
//           share of the gradient of the table or the dense bias. For v2, unit rows replace k once the scores have been
//           computed.
// Keys      A block of four warps processes blocks of 64 keys of one window and head, 16 keys per warp; queries arrive
//           in blocks of 64. The rows of the transposed scores are keys, so the fragments of P and dS can be used
//           directly as the left operands of the products for dv and dk. For v2, the right operand for dk is a second
//           tile with the unit rows of q.
// Order     No atomics: a block accumulates over its windows and strips in order, and reduce_partials.cu adds the
//           blocks' sums in order.
// Traffic   The query kernel reads k and v once per strip, the key kernel reads q and dout once per block of keys,
//           mostly from L2; delta passes from one to the other through memory, 4 bytes per query.
// Limits    head_dim <= 64.
#pragma once

#include "bwd_axis_sm80.cuh"
#include "bwd_common.cuh"
#include "long_windows.cuh"

namespace swinkernels::cuda {

struct BackwardLongArguments : LongArguments<7> {
  const float* lse;
  float* delta;           // laid out like lse; the query kernel passes it to the key kernel
  float* table_partials;  // (blocks of the query kernel, table entries), or null if not needed
  float* pad_partials;    // (blocks of the key kernel, 2, head_dim) for k and v, or null if not needed
  // For the query kernel: the division of a strip among warps, and of a unit's strips among blocks.
  int32_t key_groups, row_tiles, strips;
  uint32_t strip_workers, window_workers;  // parallel blocks of a unit
  // For the key kernel: items per window, blocks of keys per item, and the number of items of a unit.
  uint32_t splits, key_blocks, long_items;
  float* dense_partials;  // (window workers, heads, N, N) for a dense bias, or null if not needed
  float* logit_partials;  // (blocks of the query kernel), or null if not needed
  AxisArguments axes;
};

constexpr int kMostSteps = 4;  // steps of 16 keys per warp, in the query kernel

// The maximum number of warps in a block of the query kernel: 16 leave a thread 128 registers, 12 leave 168.
template <class Traits, bool kCosine>
constexpr int kMostQueryWarps = Traits::kHeadDim <= 32 && !kCosine ? 16 : 12;

template <class Traits, bool kHasAxes>
struct QueryStripSmem {
  using T = typename Traits::T;
  using AxisSmem = AxisStripSmem<Traits>;
  static constexpr int kBiasTiles = 2 * kMostSteps;
  static constexpr int kGroups = kMostQueryWarps<Traits, false>;
  static constexpr int kGradientStride = Traits::kHeadDim + 8;  // floats per row, padded to avoid bank conflicts

  T *q, *dout, *k, *v;
  float* dq;              // (key groups, rows, kGradientStride), in place of v
  float4* fragments;      // (warps, kBiasTiles, 32): the bias; at the end of a strip, its dbias
  float* delta;           // (rows, kGroups): each key group's part
  AxisSmem axes;          // with axis_tables, in place of the fragments
  unsigned char* tokens;  // followed, in v2, by the norms

  struct Counts {
    int rows, keys, fragments, v_bytes;
  };
  __host__ __device__ static Counts counts(const BackwardLongArguments& args) {
    const int rows = 16 * args.row_tiles, keys = (args.num_tokens + 15) / 16 * 16;
    const int parts = args.key_groups + (kHasAxes ? 1 : 0);
    const int v_bytes = keys * Traits::kRowBytes, dq_bytes = 4 * parts * rows * kGradientStride;
    const int fragments = kHasAxes ? 0 : 32 * kBiasTiles * args.key_groups * args.row_tiles;
    return {rows, keys, fragments, v_bytes > dq_bytes ? v_bytes : dq_bytes};
  }
  static int bytes(const BackwardLongArguments& args) {
    const Counts n = counts(args);
    const int axis_bytes = kHasAxes ? AxisSmem::bytes(n.rows, n.keys, args.key_groups) : 0;
    return Traits::kRowBytes * (2 * n.rows + n.keys) + n.v_bytes + 16 * n.fragments + 4 * n.rows * kGroups +
           axis_bytes + LongTokens::bytes(LongTokens::terms_of(args.layout), n.keys + n.rows) +
           (args.logit_scale == nullptr ? 0 : LongNorms::bytes(n.keys + n.rows));
  }
  __device__ __forceinline__ static QueryStripSmem of(const BackwardLongArguments& args) {
    const Counts n = counts(args);
    SmemArena arena{dynamic_smem()};
    QueryStripSmem smem;
    if constexpr (kHasAxes) smem.axes = AxisSmem::of(arena, n.rows, n.keys, args.key_groups);
    smem.k = arena.take<T>(n.keys * Traits::kHeadDim);
    smem.q = arena.take<T>(n.rows * Traits::kHeadDim);
    smem.dout = arena.take<T>(n.rows * Traits::kHeadDim);
    unsigned char* const v = arena.take<unsigned char>(n.v_bytes);
    smem.v = reinterpret_cast<T*>(v);
    smem.dq = reinterpret_cast<float*>(v);
    smem.fragments = arena.take<float4>(n.fragments);
    smem.delta = arena.take<float>(n.rows * kGroups);
    smem.tokens = arena.next;
    return smem;
  }
};

// Starts copying `rows` rows of two maps, from token `first` on. All threads must call this. Rows past the window and
// columns past head_dim become zero.
template <class Traits>
__device__ __forceinline__ void copy_long_rows(const BackwardLongArguments& args, const int (&list)[2], uint32_t batch,
                                               int head, typename Traits::T* const (&tiles)[2], const uint32_t* numbers,
                                               int first, int rows) {
  using Tile = SmemTile<typename Traits::T, Traits::kHeadDim>;
  using T = typename Traits::T;
  const int chunk = threadIdx.x % Tile::kChunks;  // equal for every row, as a block consists of whole warps
  const int limit = chunk * 16 < args.row_bytes ? args.num_tokens : 0;
  const uint64_t base[2] = {chunk_base(args.regular[list[0]], batch, head, chunk),
                            chunk_base(args.regular[list[1]], batch, head, chunk)};
#pragma unroll 2
  for (int row = threadIdx.x / Tile::kChunks; row < rows; row += blockDim.x / Tile::kChunks) {
    const int at = Tile::offset(row, chunk);
    const bool in_window = first + row < limit;
    const uint32_t number = in_window ? numbers[first + row] : kPadNumber;
    if (number < kPadNumber) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint64_t source = ptx::multiply_add_wide(number, args.regular[list[n]].token, base[n]);
        ptx::cp_async_16(ptx::shared_address(tiles[n] + at), reinterpret_cast<const void*>(source));
      }
      continue;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint4 pad = make_uint4(0, 0, 0, 0);
      if (in_window && args.pad_qkv != nullptr && list[n] < 3) pad = pad_chunk<T>(args, list[n], head, chunk);
      *reinterpret_cast<uint4*>(tiles[n] + at) = pad;
    }
  }
}

// Adds a strip's dbias, which the warps have written to smem.fragments, to the block's share of the gradient of the
// table's column. An entry is the sum over the pairs of tokens with the entry's relative offset, which determines the
// key for every query.
template <class Traits>
__device__ __forceinline__ void add_strip_to_table(float* table, const BackwardLongArguments& args,
                                                   const QueryStripSmem<Traits, false>& smem, const LongTokens& tokens,
                                                   int first) {
  const WindowLayout& layout = args.layout;
  const int end_of_strip = min(first + 16 * args.row_tiles, args.num_tokens);
  const int steps = (args.num_tokens + 15) / 16;
  const int base = steps / args.key_groups, longer = steps % args.key_groups;
  for (int entry = threadIdx.x; entry < layout.table_entries; entry += blockDim.x) {
    const int distance = layout.token_distance<false>(entry),
              offset = 4 * (args.table.at(layout, entry) - args.table.middle);
    const int end = min(end_of_strip, args.num_tokens + distance);
    float sum = 0.0f;
    for (int i = max(first, distance); i < end; ++i) {
      const int j = i - distance;
      if (tokens.offset[i] - tokens.offset[j] != offset) continue;
      // Find the warp that has this key, and the key's position in the warp's fragments.
      const int step = j / 16;
      const int group = step < longer * (base + 1) ? step / (base + 1) : longer + (step - longer * (base + 1)) / base;
      const int first_step = group * base + min(group, longer);
      const int row = i - first, col = j - 16 * first_step, warp = row / 16 * args.key_groups + group;
      const int lane = row % 8 * 4 + col % 8 / 2;
      const float4* fragment = smem.fragments + (warp * smem.kBiasTiles + col / 8) * 32 + lane;
      sum += reinterpret_cast<const float*>(fragment)[row % 16 / 8 * 2 + col % 2];
    }
    table[entry] += sum;
  }
}

// A warp's part of a strip: its rows and its steps of 16 keys, packed into one register and unpacked on use.
struct WarpPlace {
  int packed;

  __device__ static __forceinline__ WarpPlace of(const BackwardLongArguments& args, int warp, int all_steps) {
    const int group = warp % args.key_groups, even = all_steps / args.key_groups, longer = all_steps % args.key_groups;
    const int first_step = group * even + min(group, longer), steps = even + (group < longer ? 1 : 0);
    return {group | warp / args.key_groups << 8 | steps << 16 | first_step << 20};
  }
  __device__ __forceinline__ WarpPlace again() const { return {ptx::opaque(packed)}; }
  __device__ __forceinline__ int group() const { return packed & 0xff; }
  __device__ __forceinline__ int row0() const { return (packed >> 8 & 0xff) * 16; }
  __device__ __forceinline__ int steps() const { return packed >> 16 & 0xf; }
  __device__ __forceinline__ int first_key() const { return (packed >> 20) * 16; }
};

// Writes this warp's dbias of a strip to the worker's matrix of partial sums.
__device__ __forceinline__ void write_strip(const BackwardLongArguments& args, const float (&dbias)[kMostSteps][2][4],
                                            const WarpPlace& place, const BlockShare& share, int first) {
  const int lane = threadIdx.x % 32, num_tokens = args.num_tokens;
  const int query = first + place.row0() + lane / 4, key = place.first_key() + 2 * (lane % 4);
  const int64_t matrix = static_cast<int64_t>(share.first / args.strip_workers) * args.num_heads + share.head;
  float* const partial = args.dense_partials + (matrix * num_tokens + query) * num_tokens + key;
#pragma unroll
  for (int j = 0; j < 2 * kMostSteps; ++j) {
    if (j / 2 >= place.steps()) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (query + e / 2 * 8 < num_tokens && key + 8 * j + e % 2 < num_tokens) {
        partial[e / 2 * 8 * num_tokens + 8 * j + e % 2] = dbias[j / 2][j % 2][e];
      }
    }
  }
}

// Normalises rows of tile `from` to unit length and writes them to tile `to`, which may be the same tile. All threads
// must call this.
template <class Tile>
__device__ __forceinline__ void copy_unit_rows(const Tile& from, const Tile& to, int rows, const float* inverse_norms) {
  using T = typename Tile::T;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * Tile::kChunks; i += blockDim.x) {
    const int row = i / Tile::kChunks, at = Tile::offset(row, i % Tile::kChunks);
    auto chunk = Chunk<T>::load(from.data + at);
#pragma unroll
    for (int e = 0; e < chunk.kCount; ++e) chunk.x[e] *= inverse_norms[row];
    chunk.store(to.data + at);
  }
}

// Replaces `sum`, eight columns of the gradient d of a unit row u of q, with the gradient of the original row
// (cosine.cuh). Adjacent lanes have the other columns of the row. Returns the dot product of u and d.
template <class Tile>
__device__ __forceinline__ float to_chunk_gradient(float (&sum)[8], const Tile& q, int row, int chunk, float inverse,
                                                   float factor) {
  auto u = Chunk<typename Tile::T>::load(q.chunk(row, chunk));
  float dot = 0.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    u.x[e] *= inverse;
    dot = fmaf(u.x[e], sum[e], dot);
  }
#pragma unroll
  for (int lanes = 1; lanes < Tile::kChunks; lanes *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
  const float along = inverse < 1.0f / kSmallestNorm ? dot : 0.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) sum[e] = (sum[e] - u.x[e] * along) * (inverse * factor);
  return dot;
}

// Writes the block's share of dlogit_scale: the total of its threads' sums. `sums` is unused shared memory.
__device__ __forceinline__ void write_logit_sum(const BackwardLongArguments& args, float* sums, float sum, int head) {
  if (args.logit_partials == nullptr) return;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += sums[warp];
  args.logit_partials[blockIdx.x] = is_clamped(args.logit_scale[head]) ? 0.0f : total;
}

template <class Traits, bool kCosine, bool kHasAxes>
__global__ void __launch_bounds__(32 * kMostQueryWarps<Traits, kCosine>, 1)
    window_attention_bwd_queries_kernel(const __grid_constant__ BackwardLongArguments args) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using Smem = QueryStripSmem<Traits, kHasAxes>;
  constexpr int kColTiles = Traits::kHeadDimTiles;
  const Smem smem = Smem::of(args);
  const int warp = threadIdx.x / 32, lane = ptx::opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens, rows = 16 * args.row_tiles;
  const int all_steps = (num_tokens + 15) / 16;
  const WarpPlace whole_place = WarpPlace::of(args, warp, all_steps);
  const BlockShare share = BlockShare::of(args);
  const int head = share.head;
  const LongTokens tokens = LongTokens::of(smem.tokens, LongTokens::terms_of(args.layout), 16 * all_steps + rows);
  const int capacity = 16 * all_steps + rows;
  [[maybe_unused]] const LongNorms norms =
      LongNorms::of(reinterpret_cast<unsigned char*>(tokens.offset + capacity), capacity);
  [[maybe_unused]] float logit_sum = 0.0f;
  const auto lane_offsets = LaneOffsets<Tile>::of();
  const LocatedTile<Tile> q{smem.q, lane_offsets}, dout{smem.dout, lane_offsets}, k{smem.k, lane_offsets},
      v{smem.v, lane_offsets};
  const int first_fragment = warp * Smem::kBiasTiles * 32 + lane;

  for (int i = threadIdx.x; i < rows * Smem::kGroups; i += blockDim.x) smem.delta[i] = 0.0f;
  float* const table = args.table_partials == nullptr
                           ? nullptr
                           : args.table_partials + static_cast<int64_t>(blockIdx.x) * args.layout.table_entries;
  if (table != nullptr) {
    for (int i = threadIdx.x; i < args.layout.table_entries; i += blockDim.x) table[i] = 0.0f;
  }
  tokens.fill_constants(args, 16 * all_steps + rows);
  if constexpr (kHasAxes) {
    smem.axes.tables->fill(args.layout, args.axes.tables, args.head_dim, 1.0f);
    smem.axes.columns->fill(args.layout, 16 * all_steps);
    smem.axes.dcolumns->fill(args.layout, 16 * all_steps);
  }
  __syncthreads();

  for (int strip = share.first % args.strip_workers; strip < args.strips; strip += args.strip_workers) {
    const int first = strip * rows;
#pragma unroll 1
    for (int j = 0; !kHasAxes && j < 2 * whole_place.again().steps(); ++j) {
      const WarpPlace place = whole_place.again();
      const int row = first + place.row0() + g;
      float bias[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = place.first_key() + 8 * j + 2 * t + e % 2, query = min(row + e / 2 * 8, num_tokens - 1);
        bias[e] = 0.0f;
        if (key >= num_tokens) {
          bias[e] = -INFINITY;
        } else if (args.bias_table != nullptr) {
          const int entry = args.layout.query_index(query) - args.layout.query_index(key) + args.layout.table_middle;
          bias[e] = args.bias_table[entry * args.num_heads + head] * kLog2E;
        } else if (args.dense_bias != nullptr) {
          const int n = ptx::opaque(args.num_tokens);  // recomputed here, because registers are scarce
          const float* const row = args.dense_bias + static_cast<int64_t>(ptx::opaque(head) * n + query) * n;
          bias[e] = row[key] * kLog2E;
        }
      }
      smem.fragments[first_fragment + 32 * j] = make_float4(bias[0], bias[1], bias[2], bias[3]);
    }
    float dbias[kMostSteps][2][4] = {};

#pragma unroll 1
    for (uint32_t item = ptx::opaque(share.first) / args.strip_workers; item < args.items;
         item += args.window_workers) {
      // `place` and the values derived from it are recomputed for every window, because registers are scarce.
      const WarpPlace place = whole_place.again();
      const int steps = place.steps(), key0 = place.first_key();
      const float4* const own_bias = smem.fragments + ptx::opaque(first_fragment);
      const WindowIndex index = window_index(args.layout, item);
      tokens.find_terms(args, index);
      __syncthreads();
      const bool mixed = tokens.find_tokens(args, index);
      __syncthreads();  // the tokens are known, and the previous window's tiles are free
      copy_long_rows<Traits>(args, {0, 3}, index.batch, head, {smem.q, smem.dout}, tokens.number, first, rows);
      copy_long_rows<Traits>(args, {1, 2}, index.batch, head, {smem.k, smem.v}, tokens.number, 0, 16 * all_steps);
      if constexpr (kHasAxes) {
        const uint32_t* const products = args.axes.products + args.first_query(item, head) * kAxisWords;
        copy_axis_products(products, smem.axes.products, first, rows, num_tokens);
      }
      ptx::cp_async_commit();
      if constexpr (kCosine) norms.find<T>(args, index.batch, head, tokens.number, capacity);
      float lse2[2];
      int32_t row_region[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // lse2 is infinite for pad queries and for rows past the window, so that their P is zero.
        const int query = first + place.row0() + g + 8 * half;
        lse2[half] = INFINITY;
        if (query < num_tokens && tokens.number[query] < kPadNumber) {
          lse2[half] = args.lse[args.first_query(item, head) + query] * kLog2E;
        }
        row_region[half] = tokens.region[query];
      }
      ptx::cp_async_wait<0>();
      __syncthreads();

      float p[kMostSteps][2][4] = {}, dp[kMostSteps][2][4] = {};
      {
        float factor2[2] = {args.scale * kLog2E, args.scale * kLog2E};  // for the scores of this thread's two rows
        if constexpr (kCosine) {
          const float* const own_norms = norms.q + first + place.row0() + g;
          const float factor = score_factor(args, head) * kLog2E;
          factor2[0] = factor * own_norms[0];
          factor2[1] = factor * own_norms[8];
        }
        RowFragments<T, Traits::kHeadDim> fragments;
        fragments.load(q, place.row0());
        [[maybe_unused]] AxisBias<Traits> axis_bias;
        if constexpr (kHasAxes) {
          axis_bias.load(SmemTile<__nv_bfloat16, 4 * kAxisColumns>{smem.axes.products}, place.row0());
        }
#pragma unroll
        for (int step = 0; step < kMostSteps; ++step) {
          if (step >= steps) break;
          const int key = key0 + 16 * step;
          fragments.add_abt(p[step], k, key);
          if constexpr (kCosine) multiply_columns(p[step], norms.k + key);
          if constexpr (kHasAxes) {
            axis_bias.add(p[step], factor2[0], *smem.axes.columns, key);
            if (key + 16 > num_tokens) mask_columns(p[step], num_tokens - key);
          } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float4 bias = own_bias[32 * (2 * step + j)];
              p[step][j][0] = fmaf(p[step][j][0], factor2[0], bias.x);
              p[step][j][1] = fmaf(p[step][j][1], factor2[0], bias.y);
              p[step][j][2] = fmaf(p[step][j][2], factor2[1], bias.z);
              p[step][j][3] = fmaf(p[step][j][3], factor2[1], bias.w);
            }
          }
          if (mixed) {
            if constexpr (kHasNarrowRange<T>) {  // reloaded, because the exponent needs a register
              const int32_t* const own_region = tokens.region + first + whole_place.again().row0() + g;
              row_region[0] = own_region[0];
              row_region[1] = own_region[8];
            }
            mask_regions(p[step], row_region, tokens.region + key, args.mask2);
          }
          to_probabilities(p[step], lse2);
        }
      }
      RowSums delta;
      {
        RowFragments<T, Traits::kHeadDim> fragments;
        fragments.load(dout, place.again().row0());
#pragma unroll
        for (int step = 0; step < kMostSteps; ++step) {
          if (step >= steps) break;
          fragments.add_abt(dp[step], v, key0 + 16 * step);
          delta.add(p[step], dp[step]);
        }
      }
      delta.finish();
      {
        const WarpPlace again = whole_place.again();
        float* const own_delta = smem.delta + (again.row0() + g) * Smem::kGroups;
        if (t == 0) {
          own_delta[again.group()] = delta.x[0];
          own_delta[8 * Smem::kGroups + again.group()] = delta.x[1];
        }
        __syncthreads();
        if constexpr (kCosine) {  // the original rows of k are no longer needed
          copy_unit_rows(Tile{smem.k}, Tile{smem.k}, 16 * all_steps, norms.k);
          __syncthreads();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          delta.x[half] = 0.0f;
          for (int i = 0; i < args.key_groups; i += 4) {
            const float4 x = *reinterpret_cast<const float4*>(own_delta + 8 * half * Smem::kGroups + i);
            delta.x[half] += (x.x + x.y) + (x.z + x.w);
          }
        }
        if (again.group() == 0 && t == 0) {
          float* const saved = args.delta + args.first_query(ptx::opaque(item), head);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int query = first + again.row0() + g + 8 * half;
            if (query < num_tokens) saved[query] = delta.x[half];
          }
        }
      }

#pragma unroll
      for (int step = 0; step < kMostSteps; ++step) {
        if (step >= steps) break;
        to_dscores(p[step], dp[step], delta.x);
        if constexpr (!kHasAxes) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) dbias[step][j][e] += p[step][j][e];
          }
        }
      }
      [[maybe_unused]] int exponent = 0;
      if constexpr (kHasNarrowRange<T>) {
#pragma unroll
        for (int step = 0; step < kMostSteps; ++step) {
          if (step < steps) exponent = max(exponent, excess_exponent(p[step]));
        }
      }
      float dq[kColTiles][4] = {};
      [[maybe_unused]] float dproducts[4][4] = {};
#pragma unroll
      for (int step = 0; step < kMostSteps; ++step) {
        if (step >= steps) break;
        if constexpr (kHasNarrowRange<T>) {
          if (exponent != 0) multiply(p[step], power_of_two(-exponent));
        }
        uint32_t ds[4];
        pack_fragment<T>(ds, p[step]);
        add_fragment_b<T>(dq, ds, k, key0 + 16 * step);
        if constexpr (kHasAxes) add_dproducts<T>(dproducts, ds, *smem.axes.dcolumns, key0 + 16 * step);
      }
      if constexpr (kHasNarrowRange<T>) {
        if (exponent != 0) multiply(dq, power_of_two(exponent));
        if (kHasAxes && exponent != 0) multiply(dproducts, power_of_two(exponent));
      }
      const WarpPlace again = whole_place.again();
      write_matrix(smem.dq + again.group() * rows * Smem::kGradientStride, Smem::kGradientStride, again.row0(), dq);
      if constexpr (kHasAxes) {
        constexpr int kStride = Smem::AxisSmem::kStride;
        write_matrix(smem.axes.dproducts + again.group() * rows * kStride, kStride, again.row0(), dproducts);
      }
      __syncthreads();
      [[maybe_unused]] float share_factor = 1.0f;
      if constexpr (kHasAxes) {
        float* const share = smem.dq + args.key_groups * rows * Smem::kGradientStride;
        const int excess = finish_dproducts<Traits>(smem.axes, args.layout, tokens.packed + first, rows,
                                                    args.key_groups, share, Smem::kGradientStride);
        if constexpr (kHasNarrowRange<T>) share_factor = power_of_two(excess);
        if (args.axes.drows != nullptr) {
          uint32_t* const drows = args.axes.drows + args.first_query(item, head) * (kAxisRows / 2);
          store_drows(smem.axes.drows, drows, first, rows, num_tokens);
          if (kHasNarrowRange<T> && threadIdx.x == 0) {
            args.axes.exponents[(int64_t{item} * args.num_heads + head) * args.strips + strip] = excess;
          }
        }
        __syncthreads();
      }

      // Sum dq over the groups of keys; each thread has eight columns of a row.
      const int chunk = ptx::opaque(threadIdx.x) % Tile::kChunks;
      const uint64_t base = chunk_base(args.regular[4], index.batch, head, chunk);
      for (int i = threadIdx.x / Tile::kChunks; i < rows; i += blockDim.x / Tile::kChunks) {
        const bool has_chunk = first + i < num_tokens && chunk * 16 < args.row_bytes;
        if (!kCosine && !has_chunk) break;
        const uint32_t number = has_chunk ? tokens.number[first + i] : kPadNumber;
        const float* partial = smem.dq + i * Smem::kGradientStride + 8 * chunk;
        float sum[8] = {};
#pragma unroll 1
        for (int n = 0; n < args.key_groups; ++n, partial += rows * Smem::kGradientStride) {
          const float4 a = *reinterpret_cast<const float4*>(partial), b = *reinterpret_cast<const float4*>(partial + 4);
          const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[e] += x[e];
        }
        float factor = args.scale;
        if constexpr (kCosine) {
          const float cosine_factor = score_factor(args, head);
          const float dot = to_chunk_gradient(sum, Tile{smem.q}, i, chunk, norms.q[first + i], cosine_factor);
          if (chunk == 0) logit_sum = fmaf(dot, cosine_factor, logit_sum);
          factor = 1.0f;
        }
        if constexpr (kHasAxes) {
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[e] = fmaf(sum[e], args.scale, partial[e] * share_factor);
          factor = 1.0f;
        }
        uint32_t packed[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) packed[e] = pack2<T>(sum[2 * e] * factor, sum[2 * e + 1] * factor);
        if (number < kPadNumber) {
          const uint64_t destination = ptx::multiply_add_wide(number, args.regular[4].token, base);
          ptx::store_global_16(reinterpret_cast<void*>(destination),
                               make_uint4(packed[0], packed[1], packed[2], packed[3]));
        }
      }
    }

    if constexpr (!kHasAxes) {
      if (args.dense_partials != nullptr) write_strip(args, dbias, whole_place.again(), share, first);
      if (table == nullptr) continue;
#pragma unroll
      for (int j = 0; j < 2 * kMostSteps; ++j) {
        if (j / 2 >= whole_place.steps()) break;
        const float (&x)[4] = dbias[j / 2][j % 2];
        smem.fragments[first_fragment + 32 * j] = make_float4(x[0], x[1], x[2], x[3]);
      }
      __syncthreads();
      add_strip_to_table(table, args, smem, tokens, first);
      __syncthreads();
    }
  }
  if constexpr (kCosine) write_logit_sum(args, smem.delta, logit_sum, head);
}

template <class Traits, bool kHasAxes>
struct KeyBlockSmem {
  using T = typename Traits::T;
  static constexpr int kBlock = 64, kThreads = 128;
  alignas(128) T kv[2][kBlock * Traits::kHeadDim];  // later dk and dv
  alignas(128) T q_dout[2][2][kBlock * Traits::kHeadDim];
  alignas(16) float pad_sums[kThreads / 32][2][Traits::kHeadDim];

  // This struct is followed by two stages of A (with axis_tables), lse and delta of every query, the table, the tokens
  // and, for v2, the norms and a tile of unit rows of q.
  static constexpr int kProductsBytes = kHasAxes ? 2 * kBlock * kAxisWords * 4 : 0;
  static int bytes(const BackwardLongArguments& args) {
    const int capacity = (args.num_tokens + kBlock - 1) / kBlock * kBlock;
    return static_cast<int>(sizeof(KeyBlockSmem)) + kProductsBytes + 8 * capacity + 4 * args.table.floats() +
           LongTokens::bytes(LongTokens::terms_of(args.layout), capacity) +
           (args.logit_scale == nullptr ? 0 : LongNorms::bytes(capacity) + kBlock * Traits::kRowBytes);
  }
};

template <class Traits, class RowBiasKind, bool kCosine>  // RowBias, NoRowBias, DenseRowBias<false> or AxisBias
__global__ void __launch_bounds__(128, Traits::kHeadDim <= 32 ? 3 : 2)
    window_attention_bwd_keys_kernel(const __grid_constant__ BackwardLongArguments args) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  constexpr bool kHasAxes = std::is_same_v<RowBiasKind, AxisBias<Traits>>;
  using Smem = KeyBlockSmem<Traits, kHasAxes>;
  using ProductTile = SmemTile<__nv_bfloat16, 4 * kAxisColumns>;
  constexpr int kBlock = Smem::kBlock, kThreads = Smem::kThreads, kColTiles = Traits::kHeadDimTiles;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens, blocks = (num_tokens + kBlock - 1) / kBlock;
  const BlockShare share = BlockShare::of(args);
  const int head = share.head;
  const float factor2 = (kCosine ? score_factor(args, head) : args.scale) * kLog2E;
  [[maybe_unused]] auto* const products = reinterpret_cast<__nv_bfloat16*>(dynamic_smem() + sizeof(Smem));
  float2* const lse2_delta = reinterpret_cast<float2*>(dynamic_smem() + sizeof(Smem) + Smem::kProductsBytes);
  float* const table = reinterpret_cast<float*>(lse2_delta + blocks * kBlock);
  const LongTokens tokens = LongTokens::of(reinterpret_cast<unsigned char*>(table + args.table.floats()),
                                           LongTokens::terms_of(args.layout), blocks * kBlock);
  [[maybe_unused]] const LongNorms norms =
      LongNorms::of(reinterpret_cast<unsigned char*>(tokens.offset + blocks * kBlock), blocks * kBlock);
  [[maybe_unused]] T* const unit_q = reinterpret_cast<T*>(norms.k + blocks * kBlock);
  const auto copies = LongCopies<Tile, kThreads, kBlock>::of(args);
  const auto lane_offsets = LaneOffsets<Tile>::of();
  [[maybe_unused]] const auto product_offsets = LaneOffsets<ProductTile>::of();

  fill_with_zeros<kThreads>(smem.pad_sums, sizeof(smem.pad_sums));
  for (int i = threadIdx.x; i < blocks * kBlock; i += kThreads) lse2_delta[i] = make_float2(INFINITY, 0.0f);
  tokens.fill_constants(args, blocks * kBlock);
  stage_table<false>(args, head, table);

  int stage = 0;
  for (uint32_t item = share.first; item < args.long_items; item += share.step) {
    const uint32_t window = item / args.splits;
    const int first_block = (item - window * args.splits) * args.key_blocks;
    const int end_block = min(blocks, first_block + static_cast<int>(args.key_blocks));
    const WindowIndex index = window_index(args.layout, window);
    __syncthreads();  // the constants are written, and the previous item's tokens and tiles are free
    tokens.find_terms(args, index);
    __syncthreads();
    const bool mixed = tokens.find_tokens(args, index);
    const int64_t first_query = args.first_query(window, head);
    for (int i = threadIdx.x; i < num_tokens; i += kThreads) {
      const bool is_pad = tokens.number[i] >= kPadNumber;  // found by this thread
      lse2_delta[i] = make_float2(is_pad ? INFINITY : args.lse[first_query + i] * kLog2E, args.delta[first_query + i]);
    }
    __syncthreads();
    const uint64_t q_base[2] = {chunk_base(args.regular[0], index.batch, head, copies.chunk),
                                chunk_base(args.regular[3], index.batch, head, copies.chunk)};
    const auto copy_queries = [&](int to_stage, int block) {
      copies.start(args, {0, 3}, head, q_base, {smem.q_dout[to_stage][0], smem.q_dout[to_stage][1]}, tokens.number,
                   block * kBlock);
      if constexpr (kHasAxes) {
        copy_axis_products(args.axes.products + first_query * kAxisWords, products + to_stage * kBlock * 2 * kAxisWords,
                           block * kBlock, kBlock, num_tokens);
      }
    };
    copy_queries(stage, 0);
    if constexpr (kCosine) norms.find<T>(args, index.batch, head, tokens.number, blocks * kBlock);

#pragma unroll 1
    for (int block = first_block; block < end_block; ++block) {
      const int first = block * kBlock, row = first + row0 + g;
      const bool has_rows = first + row0 < num_tokens;
      {
        // The addresses are recomputed for every block, because registers are scarce.
        const uint32_t batch = ptx::opaque(index.batch);
        const uint64_t kv_base[2] = {chunk_base(args.regular[1], batch, head, copies.chunk),
                                     chunk_base(args.regular[2], batch, head, copies.chunk)};
        copies.start(args, {1, 2}, head, kv_base, {smem.kv[0], smem.kv[1]}, tokens.number, first);
        ptx::cp_async_commit();
      }
      RowFragments<T, Traits::kHeadDim> k, v;
      RowBiasKind bias;  // with axis_tables, E^T of the keys
      int32_t row_region[2];
      float factors[2] = {factor2, factor2};  // for the scores of this thread's two rows
      float dk[kColTiles][4] = {}, dv[kColTiles][4] = {};
      [[maybe_unused]] int exponent = 0;  // dk is scaled by 2 ** -exponent

#pragma unroll 1
      for (int query_block = 0; query_block < blocks; ++query_block) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (query_block + 1 < blocks) {
          copy_queries(stage ^ 1, query_block + 1);
        } else if (block + 1 < end_block) {
          copy_queries(stage ^ 1, 0);
        }
        ptx::cp_async_commit();
        if (query_block == 0) {
          k.load(Tile{smem.kv[0]}, row0);
          v.load(Tile{smem.kv[1]}, row0);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            // Keys past the window use the bias of a key in the window. Their sums are never read.
            if constexpr (!kHasAxes) bias.set(half, args, head, table, row + 8 * half, tokens.offset[row + 8 * half]);
            row_region[half] = tokens.region[row + 8 * half];
            if constexpr (kCosine) factors[half] = factor2 * norms.k[row + 8 * half];
          }
          if constexpr (kHasAxes) key_fragments(bias, tokens.packed + first + row0);
        }
        if constexpr (kCosine) {
          copy_unit_rows(Tile{smem.q_dout[stage][0]}, Tile{unit_q}, kBlock, norms.q + query_block * kBlock);
          __syncthreads();
        }
        [[maybe_unused]] const LocatedTile<ProductTile> axis_products{products + stage * kBlock * 2 * kAxisWords,
                                                                      product_offsets};
        const LocatedTile<Tile> q{smem.q_dout[stage][0], lane_offsets}, dout{smem.q_dout[stage][1], lane_offsets};
        stage ^= 1;
        if (!has_rows) continue;
#pragma unroll
        for (int step = 0; step < kBlock / 16; ++step) {
          const int query = query_block * kBlock + 16 * step;
          if (query >= num_tokens) break;
          float p[2][4] = {}, ds[2][4] = {};
          k.add_abt(p, q, 16 * step);
          if constexpr (kCosine) multiply_columns(p, norms.q + query);
          if constexpr (kHasAxes) {
            float axis_bias[2][4] = {};
            bias.add_abt(axis_bias, axis_products, 16 * step);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) p[j][e] = fmaf(p[j][e], factor2, axis_bias[j][e]);
            }
          } else {
            bias.add(p, factors, args.table.has_pairs, query, tokens.offset + query);
          }
          if (mixed) mask_regions(p, row_region, tokens.region + query, args.mask2);
          v.add_abt(ds, dout, 16 * step);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            // lse and delta of two queries. An infinite lse makes P zero.
            const float4 saved_pair = *reinterpret_cast<const float4*>(lse2_delta + query + 8 * j + 2 * t);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              p[j][e] = ptx::exp2_approx(p[j][e] - (e % 2 == 0 ? saved_pair.x : saved_pair.z));
              ds[j][e] = p[j][e] * (ds[j][e] - (e % 2 == 0 ? saved_pair.y : saved_pair.w));
            }
          }
          uint32_t fragment[4];
          pack_fragment<T>(fragment, p);
          add_fragment_b<T>(dv, fragment, dout, 16 * step);
          if constexpr (kHasNarrowRange<T>) {
            // Keys past the window may have any score. Their sums are never read, but must not raise the exponent.
            if (first + row0 + 16 > num_tokens) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  if (row + e / 2 * 8 >= num_tokens) ds[j][e] = 0.0f;
                }
              }
            }
            const int needed = max(exponent, excess_exponent(ds));
            if (needed != exponent) multiply(dk, power_of_two(exponent - needed));
            exponent = needed;
            if (exponent != 0) multiply(ds, power_of_two(-exponent));
          }
          pack_fragment<T>(fragment, ds);
          if constexpr (kCosine) {
            add_fragment_b<T>(dk, fragment, LocatedTile<Tile>{unit_q, lane_offsets}, 16 * step);
          } else {
            add_fragment_b<T>(dk, fragment, q, 16 * step);
          }
        }
      }

      // Each warp has read its rows of k and v, which no other warp reads.
      float factor = kCosine ? score_factor(args, head) : args.scale;
      if constexpr (kHasNarrowRange<T>) factor *= power_of_two(exponent);
      if (has_rows) {
        const LocatedTile<Tile> dk_tile{smem.kv[0], lane_offsets}, dv_tile{smem.kv[1], lane_offsets};
        if constexpr (kCosine) {
          to_row_gradient<false>(dk, Tile{smem.kv[0]}, row0, norms.k + first, factor);
          factor = 1.0f;
          __syncwarp();
        }
        write_rounded(dk_tile, row0, dk, factor, factor);
        store_long_rows(args, 5, dk_tile, row0, index.batch, head, tokens.number, first);
        write_rounded(dv_tile, row0, dv, 1.0f, 1.0f);
        store_long_rows(args, 6, dv_tile, row0, index.batch, head, tokens.number, first);
        if (args.pad_partials != nullptr) {
          const bool is_pad[2] = {row < num_tokens && tokens.number[row] >= kPadNumber,
                                  row + 8 < num_tokens && tokens.number[row + 8] >= kPadNumber};
          add_pad_rows(smem.pad_sums[row0 / 16][0], dk, factor, is_pad);
          add_pad_rows(smem.pad_sums[row0 / 16][1], dv, 1.0f, is_pad);
        }
      }
      __syncthreads();  // the tiles of k and v are free for the next block
    }
  }
  if (args.pad_partials == nullptr) return;
  __syncthreads();
  write_pad_sums(args.pad_partials, args.head_dim, smem.pad_sums);
}

}  // namespace swinkernels::cuda
