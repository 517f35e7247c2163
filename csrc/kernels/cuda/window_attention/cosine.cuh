// Cosine attention (v2), in which the rows of q and k are scaled to unit length: u = x / max(norm, 1e-12).
//
// Scores are computed from the original rows, which are exact, and divided by the norms in float. Rounding the unit
// rows to the dtype would change scores of up to 100 by more than the last bit of a probability. Gradients are computed
// from unit rows rounded to the dtype; this is as accurate as rounding any other operand, and cannot overflow.
// If d is the gradient of u without the factor,
//   dx = factor (d - u (u . d)) / max(norm, 1e-12).
// For rows shorter than 1e-12, which are not scaled to unit length, u (u . d) is not subtracted. dlogit_scale is the
// sum of factor (u . d) over the rows of q, or zero if logit_scale is clamped.
#pragma once

#include <cmath>
#include <cstdint>

#include "../../common/dtype.cuh"
#include "../../common/ptx.cuh"
#include "../../common/quad.cuh"
#include "arguments.cuh"

namespace swinkernels::cuda {

constexpr float kSmallestNorm = 1e-12f;
constexpr double kLargestLogitScale = 4.605170185988092;  // ln 100; torch compares in double precision

__device__ __forceinline__ bool is_clamped(float logit_scale) {
  return static_cast<double>(logit_scale) > kLargestLogitScale;
}

// Returns the factor of the scores: the scale, or exp(min(logit_scale, ln 100)) of this head.
template <int kMaps>
__device__ __forceinline__ float score_factor(const WindowArguments<kMaps>& args, int head) {
  if (!args.is_cosine()) return args.scale;
  const float logit_scale = args.logit_scale[head];
  return expf(is_clamped(logit_scale) ? static_cast<float>(kLargestLogitScale) : logit_scale);
}

// A 16-byte chunk of a row, converted to floats.
template <class T>
struct Chunk {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  float x[kCount];

  __device__ static __forceinline__ Chunk load(const T* data) {
    Chunk chunk;
    if constexpr (sizeof(T) == 4) {
      const float4 values = *reinterpret_cast<const float4*>(data);
      chunk.x[0] = values.x;
      chunk.x[1] = values.y;
      chunk.x[2] = values.z;
      chunk.x[3] = values.w;
    } else {
      const uint4 bits = *reinterpret_cast<const uint4*>(data);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(words[i]);
        chunk.x[2 * i] = pair.x;
        chunk.x[2 * i + 1] = pair.y;
      }
    }
    return chunk;
  }

  __device__ __forceinline__ void store(T* data) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) store2(data + i, x[i], x[i + 1]);
  }
};

// The inverse norms of a block's rows of q and of k.
template <int kBlock>
struct InverseNorms {
  alignas(8) float q[kBlock];
  alignas(8) float k[kBlock];
};

template <class Tile>
__device__ __forceinline__ float inverse_norm(const Tile& tile, int row) {
  float sum = 0.0f;
#pragma unroll 1
  for (int c = 0; c < Tile::kChunks; ++c) {
    const auto chunk = Chunk<typename Tile::T>::load(tile.chunk(row, c));
#pragma unroll
    for (int i = 0; i < chunk.kCount; ++i) sum = fmaf(chunk.x[i], chunk.x[i], sum);
  }
  return 1.0f / fmaxf(sqrtf(sum), kSmallestNorm);
}

// Computes the inverse norms of this warp's 16 rows of q and of k. One half of the warp processes q, the other half k.
template <class Tile, int kBlock>
__device__ __forceinline__ void find_inverse_norms(InverseNorms<kBlock>& norms, const Tile& q, const Tile& k,
                                                   int row0) {
  const int lane = threadIdx.x % 32, row = row0 + lane % 16;
  const Tile tile{lane < 16 ? q.data : k.data};
  (lane < 16 ? norms.q : norms.k)[row] = inverse_norm(tile, row);
}

// Scales this warp's 16 rows of a tile to unit length. No other warp may read these rows at the same time.
template <class Tile>
__device__ __forceinline__ void to_unit_rows(const Tile& tile, int row0, const float* inverse_norms) {
  __syncwarp();
#pragma unroll 1
  for (int index = threadIdx.x % 32; index < 16 * Tile::kChunks; index += 32) {
    const int row = row0 + index / Tile::kChunks;
    typename Tile::T* const data = tile.chunk(row, index % Tile::kChunks);
    auto chunk = Chunk<typename Tile::T>::load(data);
#pragma unroll
    for (int i = 0; i < chunk.kCount; ++i) chunk.x[i] *= inverse_norms[row];
    chunk.store(data);
  }
}

// Multiplies the scores of 16 queries from row0 on and a block of keys by `factor2` and, if given, by the inverse
// norms, and adds the bias. bias_of(j) returns the bias of tile j's fragment as a float4.
template <int kTiles, int kBlock, class BiasOf>
__device__ __forceinline__ void finish_scores(float (&score)[kTiles][4], float factor2,
                                              const InverseNorms<kBlock>* norms, int row0, BiasOf&& bias_of) {
  if (norms == nullptr) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float4 bias = bias_of(j);
      score[j][0] = fmaf(score[j][0], factor2, bias.x);
      score[j][1] = fmaf(score[j][1], factor2, bias.y);
      score[j][2] = fmaf(score[j][2], factor2, bias.z);
      score[j][3] = fmaf(score[j][3], factor2, bias.w);
    }
    return;
  }
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float row[2] = {norms->q[row0 + g] * factor2, norms->q[row0 + g + 8] * factor2};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 bias = bias_of(j);
    const float2 col = *reinterpret_cast<const float2*>(norms->k + 8 * j + 2 * t);
    score[j][0] = fmaf(score[j][0] * col.x, row[0], bias.x);
    score[j][1] = fmaf(score[j][1] * col.y, row[0], bias.y);
    score[j][2] = fmaf(score[j][2] * col.x, row[1], bias.z);
    score[j][3] = fmaf(score[j][3] * col.y, row[1], bias.w);
  }
}

// Turns d, the gradient of 16 unit rows as an accumulator fragment, into the gradient of the original rows by the
// formula above. Rows row0.. of the tile are the original rows or, if kIsUnit, the unit rows. Returns u . d for this
// thread's two rows.
template <bool kIsUnit, int kColTiles, class Tile>
__device__ __forceinline__ float2 to_row_gradient(float (&d)[kColTiles][4], const Tile& tile, int row0,
                                                  const float* inverse_norms, float factor) {
  const int lane = ptx::opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const float inverse[2] = {inverse_norms[row0 + g], inverse_norms[row0 + g + 8]};
  float dot[2] = {0.0f, 0.0f};
  constexpr int kUnroll = kColTiles <= 8 ? 2 : 1;  // registers are scarce
#pragma unroll kUnroll
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
      // The chunks of row + 8 are permuted like the chunks of row.
      const typename Tile::T* const at = tile.element(row0 + g, 8 * n + 2 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 u = load2(at + 8 * half * Tile::kCols);
        if constexpr (!kIsUnit) {
          u.x *= inverse[half];
          u.y *= inverse[half];
        }
        if (pass == 0) {
          dot[half] = fmaf(u.x, d[n][2 * half], fmaf(u.y, d[n][2 * half + 1], dot[half]));
        } else {
          const float along = inverse[half] < 1.0f / kSmallestNorm ? dot[half] : 0.0f;
          d[n][2 * half] = (d[n][2 * half] - u.x * along) * (inverse[half] * factor);
          d[n][2 * half + 1] = (d[n][2 * half + 1] - u.y * along) * (inverse[half] * factor);
        }
      }
    }
    if (pass == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) dot[half] = quad_sum(dot[half]);
    }
  }
  return make_float2(dot[0], dot[1]);
}

}  // namespace swinkernels::cuda
