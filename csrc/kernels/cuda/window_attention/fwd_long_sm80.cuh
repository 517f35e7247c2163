// Window attention forward for long windows of the plain kind (long_windows.cuh), and for windows of any length with
// axis_tables (axis_tables.cuh). Other long windows use fwd_sm80.cuh.
//
// Maths     As in fwd_sm80.cuh and, for v2, cosine.cuh. In bfloat16, scores are not shifted by their maximum: bfloat16
//           has the exponent range of float, so exp2(score) is accurate enough from 2^-126 to 2^127. If a row's sum is
//           not between 2^-64 and 2^64, its block is recomputed with a running maximum. In float16, the running maximum
//           is always subtracted; it is only updated if a score exceeds it by more than kSlack, for which float16 has
//           enough range.
// Tiling    A block of four warps processes one or more blocks of 64 queries of one window and head, 16 queries per
//           warp, with their fragments in registers. Keys are copied in blocks of 64, each while the previous one is
//           processed in steps of 16 keys; steps past the window are skipped. Row sums are a matrix product of the
//           rounded probabilities with ones. For v2 they are sums in float: a few keys may have nearly all of a row's
//           probability, and rounding it would cause a large error in lse.
// Traffic   As in fwd_sm80.cuh; k and v are read once per block of queries, mostly from L2.
// Limits    head_dim <= 64.
#pragma once

#include <cfloat>
#include <type_traits>

#include "axis_tables.cuh"
#include "fwd_sm80.cuh"
#include "half_range.cuh"
#include "long_windows.cuh"

namespace swinkernels::cuda {

struct ForwardLongArguments : LongArguments<4> {
  float* lse;
  uint32_t splits;  // items per window; each item has row_blocks blocks of queries
  uint32_t row_blocks;
  uint32_t long_items;  // items of a unit
  const float* axis_tables;
};

template <class Traits, bool kHasAxes>
struct PlainForwardLongSmem {
  using T = typename Traits::T;
  static constexpr int kBlock = 64, kThreads = 128;
  alignas(128) T q[kBlock * Traits::kHeadDim];
  alignas(128) T out[kBlock * Traits::kHeadDim];
  alignas(128) T kv[2][2][kBlock * Traits::kHeadDim];
  alignas(16) int32_t out_of_range[kThreads / 32];

  // This struct is followed by the table, or AxisTables and ScoreColumns, then by the tokens and, for v2, the norms.
  static int bytes(const LongArguments<4>& args) {
    const int capacity = (args.num_tokens + kBlock - 1) / kBlock * kBlock;
    return static_cast<int>(sizeof(PlainForwardLongSmem)) + bias_bytes(args, capacity) +
           LongTokens::bytes(LongTokens::terms_of(args.layout), capacity) +
           (args.logit_scale == nullptr ? 0 : LongNorms::bytes(capacity));
  }
  __host__ __device__ static int bias_bytes(const LongArguments<4>& args, int capacity) {
    if constexpr (kHasAxes) {
      return static_cast<int>(sizeof(AxisTables<Traits>)) + ScoreColumns::bytes(capacity);
    }
    return 4 * args.table.floats();
  }
};

// The largest number of blocks per multiprocessor for which no registers are spilled.
template <class Traits, class RowBiasKind>
constexpr int plain_forward_long_blocks() {
  if (Traits::kHeadDim <= 32) return 4;
  constexpr bool kIsLarge =
      std::is_same_v<RowBiasKind, DenseRowBias<true>> || std::is_same_v<RowBiasKind, AxisBias<Traits>>;
  return ptx::kIsBlackwell && kIsLarge ? 2 : 3;
}

template <class Traits, class RowBiasKind, bool kCosine>  // RowBias, NoRowBias, DenseRowBias<true> or AxisBias
__global__ void __launch_bounds__(128, plain_forward_long_blocks<Traits, RowBiasKind>())
    window_attention_fwd_plain_long_kernel(const __grid_constant__ ForwardLongArguments args) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  // With axis_tables, registers are scarce, so some values are recomputed wherever they are used.
  constexpr bool kHasAxes = std::is_same_v<RowBiasKind, AxisBias<Traits>>;
  using Smem = PlainForwardLongSmem<Traits, kHasAxes>;
  constexpr int kBlock = Smem::kBlock, kThreads = Smem::kThreads, kColTiles = Traits::kHeadDimTiles;
  constexpr bool kMaximumAlwaysRuns = kHasNarrowRange<T>;
  constexpr float kSlack = 8.0f, kLargestSum = 0x1p64f, kSmallestSum = 0x1p-64f;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_tokens = args.num_tokens, blocks = (num_tokens + kBlock - 1) / kBlock;
  const BlockShare share = BlockShare::of(args);
  const int head = share.head;
  const float factor2 = (kCosine ? score_factor(args, head) : args.scale) * kLog2E;
  float* const table = reinterpret_cast<float*>(dynamic_smem() + sizeof(Smem));
  const int bias_bytes = Smem::bias_bytes(args, blocks * kBlock);
  const LongTokens tokens = LongTokens::of(reinterpret_cast<unsigned char*>(table) + bias_bytes,
                                           LongTokens::terms_of(args.layout), blocks * kBlock);
  [[maybe_unused]] const LongNorms norms =
      LongNorms::of(reinterpret_cast<unsigned char*>(tokens.offset + blocks * kBlock), blocks * kBlock);
  [[maybe_unused]] auto& axis_tables = *reinterpret_cast<AxisTables<Traits>*>(table);
  [[maybe_unused]] auto& columns = *reinterpret_cast<ScoreColumns*>(&axis_tables + 1);
  const auto copies = LongCopies<Tile, kThreads, kBlock>::of(args);
  const auto lane_offsets = LaneOffsets<Tile>::of();

  tokens.fill_constants(args, blocks * kBlock);
  if constexpr (kHasAxes) {
    axis_tables.fill(args.layout, args.axis_tables, args.head_dim, kLog2E);
    columns.fill(args.layout, blocks * kBlock);
  } else {
    stage_table<true>(args, head, table);
  }

  int stage = 0;
  for (uint32_t item = share.first; item < args.long_items; item += kHasAxes ? BlockShare::of(args).step : share.step) {
    const uint32_t window = item / args.splits;
    const int first_block = (item - window * args.splits) * args.row_blocks;
    const int end_block = min(blocks, first_block + static_cast<int>(args.row_blocks));
    const WindowIndex index = window_index(args.layout, window);
    __syncthreads();  // the constants are written, and the previous item's tokens and tiles are free
    tokens.find_terms(args, index);
    __syncthreads();
    const bool mixed = tokens.find_tokens(args, index);
    __syncthreads();
    const auto base_of = [&](int map, uint32_t batch) {
      return chunk_base(args.regular[map], batch, head, copies.chunk);
    };
    const uint64_t q_base[1] = {base_of(0, index.batch)};
    const uint64_t kv_base[2] = {base_of(1, index.batch), base_of(2, index.batch)};
    const auto copy_queries = [&](int block) {
      const auto start = [&](const uint64_t (&base)[1]) {
        copies.start(args, {0}, head, base, {smem.q}, tokens.number, block * kBlock);
      };
      if constexpr (kHasAxes) {
        start({base_of(0, ptx::opaque(index.batch))});
      } else {
        start(q_base);
      }
    };
    const auto copy_keys = [&](int to_stage, int block) {
      const auto start = [&](const uint64_t (&base)[2]) {
        copies.start(args, {1, 2}, head, base, {smem.kv[to_stage][0], smem.kv[to_stage][1]}, tokens.number,
                     block * kBlock);
      };
      if constexpr (kHasAxes) {
        const uint32_t batch = ptx::opaque(index.batch);
        start({base_of(1, batch), base_of(2, batch)});
      } else {
        start(kv_base);
      }
    };
    copy_queries(first_block);
    copy_keys(stage, 0);
    ptx::cp_async_commit();
    if constexpr (kCosine) norms.find<T>(args, index.batch, head, tokens.number, blocks * kBlock);

    const auto find_lse = [&](uint32_t of) {
      return args.lse == nullptr ? nullptr : args.lse + args.first_query(of, head);
    };
    float* lse = find_lse(window);
#pragma unroll 1
    for (int block = first_block; block < end_block; ++block) {
      const int first = block * kBlock, row = first + row0 + g;
      const bool has_rows = first + row0 < num_tokens;
      RowFragments<T, Traits::kHeadDim> q;
      RowBiasKind bias;
      int32_t row_region[2];
      float factor[2] = {factor2, factor2};  // for the scores of this thread's two rows
      float maximum[2] = {0.0f, 0.0f}, sum[4] = {}, o[kColTiles][4] = {};
      bool maximum_runs = kMaximumAlwaysRuns, again = false;
      if constexpr (kMaximumAlwaysRuns) maximum[0] = maximum[1] = -FLT_MAX;

#pragma unroll 1
      for (int key_block = 0; key_block < blocks; ++key_block) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (key_block + 1 < blocks) {
          copy_keys(stage ^ 1, key_block + 1);
        } else if (block + 1 < end_block) {
          copy_keys(stage ^ 1, 0);
          copy_queries(block + 1);  // every warp has loaded its fragments of this block
        }
        ptx::cp_async_commit();
        if (key_block == 0 && !again) {
          q.load(Tile{smem.q}, row0);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            // Queries past the window use the bias of a query in the window. Their scores are never read.
            if constexpr (!kHasAxes) bias.set(half, args, head, table, row + 8 * half, tokens.offset[row + 8 * half]);
            row_region[half] = tokens.region[row + 8 * half];
            if constexpr (kCosine) factor[half] = factor2 * norms.q[row + 8 * half];
          }
          if constexpr (kHasAxes) {
            // The warp's rows of q are no longer needed, and its rows of out are free until the last key.
            static_assert(8 * RowBiasKind::kStride * sizeof(float) <= 16 * Traits::kHeadDim * sizeof(T));
            const int own_row0 = ptx::opaque(row0);
            float* const first_rows = reinterpret_cast<float*>(smem.q + own_row0 * Traits::kHeadDim);
            float* const last_rows = reinterpret_cast<float*>(smem.out + own_row0 * Traits::kHeadDim);
            if (has_rows) {
              bias.set(q, args.layout, axis_tables, tokens.packed + first + own_row0, first_rows, last_rows);
              bias.store_low(LocatedTile<Tile>{smem.out, lane_offsets}, row0);
            }
          }
        }
        const LocatedTile<Tile> k{smem.kv[stage][0], lane_offsets}, v{smem.kv[stage][1], lane_offsets};
        stage ^= 1;
        if (has_rows) {
#pragma unroll
          for (int step = 0; step < kBlock / 16; ++step) {
            const int key = key_block * kBlock + 16 * step;
            if (key >= num_tokens) break;
            float score[2][4] = {};
            q.add_abt(score, k, 16 * step);
            if constexpr (kCosine) multiply_columns(score, norms.k + key);
            if constexpr (kHasAxes) {
              bias.load_low(Tile{smem.out}, ptx::opaque(threadIdx.x) / 32 * 16);  // because registers are scarce
              bias.add(score, factor2, columns, key);
            } else {
              bias.add(score, factor, args.table.has_pairs, key, tokens.offset + key);
            }
            if (mixed) {
              if constexpr (kHasAxes) {  // registers are scarce
                row_region[0] = tokens.region[row];
                row_region[1] = tokens.region[row + 8];
              }
              mask_regions(score, row_region, tokens.region + key, args.mask2);
            }
            if (key + 16 > num_tokens) mask_columns(score, num_tokens - key);
            if (maximum_runs) {
              float largest[2];
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                largest[half] = fmaxf(fmaxf(score[0][2 * half], score[0][2 * half + 1]),
                                      fmaxf(score[1][2 * half], score[1][2 * half + 1]));
              }
              if (__any_sync(0xffffffffu, largest[0] > maximum[0] + kSlack || largest[1] > maximum[1] + kSlack)) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  const float updated = fmaxf(maximum[half], quad_max(largest[half]));
                  const float rescale = ptx::exp2_approx(maximum[half] - updated);
                  maximum[half] = updated;
                  sum[2 * half] *= rescale;
#pragma unroll
                  for (int n = 0; n < kColTiles; ++n) {
                    o[n][2 * half] *= rescale;
                    o[n][2 * half + 1] *= rescale;
                  }
                }
              }
#pragma unroll
              for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) score[j][e] -= maximum[e / 2];
              }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) score[j][e] = ptx::exp2_approx(score[j][e]);
            }
            uint32_t p[4];
            pack_fragment<T>(p, score);
            if constexpr (kCosine) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                sum[2 * half] +=
                    (score[0][2 * half] + score[0][2 * half + 1]) + (score[1][2 * half] + score[1][2 * half + 1]);
              }
            } else {
              const uint32_t ones = pack2<T>(1.0f, 1.0f);
              ptx::mma_m16n8k16(sum, p, {ones, ones}, T{});
            }
            add_fragment_b<T>(o, p, v, 16 * step);
          }
        }
        if (kCosine && key_block + 1 == blocks) {
          sum[0] = quad_sum(sum[0]);
          sum[2] = quad_sum(sum[2]);
        }
        if constexpr (!kMaximumAlwaysRuns) {
          if (key_block + 1 < blocks || maximum_runs) continue;
          bool in_range = true;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float x = sum[2 * half];
            in_range &= row + 8 * half >= num_tokens || (x > kSmallestSum && x < kLargestSum);
          }
          in_range = __all_sync(0xffffffffu, in_range);
          if (lane == 0) smem.out_of_range[threadIdx.x / 32] = in_range ? 0 : 1;
          __syncthreads();
          const int4 votes = *reinterpret_cast<const int4*>(smem.out_of_range);
          if ((votes.x | votes.y | votes.z | votes.w) == 0) continue;
          // Repeat with the maximum. The first keys are copied again, unless the copy for the next block has begun.
          maximum_runs = again = true;
          if (block + 1 == end_block) copy_keys(stage, 0);
          ptx::cp_async_commit();
          maximum[0] = maximum[1] = -FLT_MAX;
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e] = 0.0f;
#pragma unroll
          for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) o[n][e] = 0.0f;
          }
          key_block = -1;
        }
      }
      if (has_rows) {
        if constexpr (kHasAxes) lse = find_lse(ptx::opaque(window));
        if (t == 0 && lse != nullptr) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (row + 8 * half < num_tokens) {
              lse[row + 8 * half] = (maximum[half] + ptx::log2_approx(sum[2 * half])) * kLn2;
            }
          }
        }
        const LocatedTile<Tile> out{smem.out, lane_offsets};
        write_rounded(out, row0, o, ptx::reciprocal_approx(sum[0]), ptx::reciprocal_approx(sum[2]));
        store_long_rows(args, 3, out, row0, index.batch, head, tokens.number, first);
      }
    }
  }
}

}  // namespace swinkernels::cuda
