// Code shared by the backward kernels: the arguments, probabilities computed from lse, dS, and a block's partial sums
// of the gradients that are sums over all windows.
#pragma once

#include "../../common/launch.cuh"
#include "../../common/quad.cuh"
#include "../../common/smem_tile.cuh"
#include "../../common/tile_product.cuh"
#include "bias.cuh"
#include "cosine.cuh"
#include "dropout.cuh"
#include "half_range.cuh"
#include "mask.cuh"
#include "tokens.cuh"

namespace swinkernels::cuda {

// The partial sums of all blocks are stored in the order of the blocks. A pointer is null if the gradient is not
// needed.
struct BackwardArguments : WindowArguments<7> {
  const float* lse;
  float2* lse2_delta;     // laid out like lse; the kernel for long windows passes them to the kernel for dbias
  float* table_partials;  // (blocks, table entries), short windows
  float* dense_partials;  // (blocks, rows, rows); rows is N rounded up to whole blocks
  float* pad_partials;    // (blocks, 2, head_dim) for k and v
  float* logit_partials;  // (blocks)
};

// Returns the log-sum-exp of a query in base 2, or infinity for a pad query, so that its probabilities are zero.
__device__ __forceinline__ float load_lse2(const BackwardArguments& args, int64_t first_query, int token,
                                           uint64_t dout_row) {
  return dout_row == 0 ? INFINITY : args.lse[first_query + token] * kLog2E;
}

// Turns scores in base 2 into probabilities. lse2 is the log-sum-exp of this thread's two rows.
template <int kTiles>
__device__ __forceinline__ void to_probabilities(float (&score)[kTiles][4], const float (&lse2)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) score[j][e] = ptx::exp2_approx(score[j][e] - lse2[e / 2]);
  }
}

// Turns the probabilities p into dS.
template <int kTiles>
__device__ __forceinline__ void to_dscores(float (&p)[kTiles][4], const float (&dp)[kTiles][4],
                                           const float (&delta)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) p[j][e] *= dp[j][e] - delta[e / 2];
  }
}

// Turns the gradient of the attention weights after dropout into the gradient of the attention weights before dropout.
template <int kTiles>
__device__ __forceinline__ void undrop(float (&dp)[kTiles][4], uint32_t kept, float dropout_scale) {
  drop(dp, kept);
  multiply(dp, dropout_scale);
}

// Sums this thread's two rows over the keys, one block of keys at a time.
struct RowSums {
  float x[2] = {0.0f, 0.0f};

  // Adds a, or a * b.
  template <int kTiles>
  __device__ __forceinline__ void add(const float (&a)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e / 2] += a[j][e];
    }
  }
  template <int kTiles>
  __device__ __forceinline__ void add(const float (&a)[kTiles][4], const float (&b)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e / 2] = fmaf(a[j][e], b[j][e], x[e / 2]);
    }
  }

  // Adds up the sums of the four lanes of a quad. Call it after the last block.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) x[half] = quad_sum(x[half]);
  }
};

// Divides each row of probabilities by its sum. The rows of pad queries are zero and stay zero.
template <int kTiles>
__device__ __forceinline__ void normalise(float (&p)[kTiles][4]) {
  RowSums sums;
  sums.add(p);
  sums.finish();
  const float factor[2] = {sums.x[0] > 0.0f ? 1.0f / sums.x[0] : 0.0f, sums.x[1] > 0.0f ? 1.0f / sums.x[1] : 0.0f};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) p[j][e] *= factor[e / 2];
  }
}

// Adds the rows of pad tokens among this warp's 16 rows, times factor, to `sum`, which has one value per column. is_pad
// refers to this thread's two rows.
template <int kColTiles>
__device__ __forceinline__ void add_pad_rows(float* sum, const float (&x)[kColTiles][4], float factor,
                                             const bool (&is_pad)[2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (!__any_sync(0xffffffffu, is_pad[0] || is_pad[1])) return;
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float column = (is_pad[0] ? x[n][e] : 0.0f) + (is_pad[1] ? x[n][2 + e] : 0.0f);
      column += __shfl_xor_sync(0xffffffffu, column, 4);
      column += __shfl_xor_sync(0xffffffffu, column, 8);
      column += __shfl_xor_sync(0xffffffffu, column, 16);
      if (g == 0) sum[8 * n + 2 * t + e] += column * factor;
    }
  }
}

// Like the function above, for the 16 rows from `first` on. Tokens whose address in `rows` is zero are pad tokens.
template <int kColTiles>
__device__ __forceinline__ void add_pad_rows(float* sum, const float (&x)[kColTiles][4], float factor,
                                             const uint64_t* rows, int first, int num_tokens) {
  const int row = first + threadIdx.x % 32 / 4;
  add_pad_rows(sum, x, factor, {row < num_tokens && rows[row] == 0, row + 8 < num_tokens && rows[row + 8] == 0});
}

// Writes the block's partial sum of dpad_qkv. The sums of its warps are added in order.
template <int kWarps, int kHeadDim>
__device__ __forceinline__ void write_pad_sums(float* partials, int head_dim,
                                               const float (&sums)[kWarps][2][kHeadDim]) {
  float* const partial = partials + static_cast<int64_t>(blockIdx.x) * 2 * head_dim;
  for (int i = threadIdx.x; i < 2 * head_dim; i += blockDim.x) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][i / head_dim][i % head_dim];
    partial[i] = sum;
  }
}
template <class Traits>
__device__ __forceinline__ void write_pad_partial(const BackwardArguments& args,
                                                  const float (&sums)[Traits::kWarps][2][Traits::kHeadDim]) {
  if (args.pad_partials != nullptr) write_pad_sums(args.pad_partials, args.head_dim, sums);
}

// Writes the block's partial sum of dlogit_scale. `sum` is the sum over a thread's rows, the same in all lanes of a
// quad. All threads must call this. `sums` is unused shared memory.
template <class Traits>
__device__ __forceinline__ void write_logit_partial(const BackwardArguments& args, float (&sums)[Traits::kWarps],
                                                    float sum, int head) {
  if (args.logit_partials == nullptr) return;
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Traits::kWarps; ++warp) total += sums[warp];
  args.logit_partials[blockIdx.x] = is_clamped(args.logit_scale[head]) ? 0.0f : total;
}

// Writes p, after dropout, to the tile from which dv is computed. Dropped attention weights are zero; the others are
// not scaled up, because they might then exceed the range of float16.
template <int kTiles, class PTile>
__device__ __forceinline__ void write_weights(const PTile& tile, int row0, const float (&p)[kTiles][4], uint32_t kept,
                                              bool has_dropout) {
  if (!has_dropout) return write_fragment<false>(tile, row0, p, 1.0f, 1.0f, PTile::kCols, PTile::kCols);
  float weights[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) weights[j][e] = p[j][e];
  }
  drop(weights, kept);
  write_fragment<false>(tile, row0, weights, 1.0f, 1.0f, PTile::kCols, PTile::kCols);
}

// Writes a fragment to the 16 rows of a matrix from row0 on.
template <int kTiles>
__device__ __forceinline__ void write_matrix(float* matrix, int stride, int row0, const float (&x)[kTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float* const row = matrix + (row0 + g) * stride + 8 * j + 2 * t;
    store2(row, x[j][0], x[j][1]);
    store2(row + 8 * stride, x[j][2], x[j][3]);
  }
}

}  // namespace swinkernels::cuda
