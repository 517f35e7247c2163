// Layer norm forward: of plain rows, of merged neighbours, of expanded parts, or combined with a residual connection.
//
// Maths     z = (v - mean(v)) * rstd * weight + bias, rstd = 1 / sqrt(var(v) + eps), where v is a row of x, or of
//           s = x + scale * y, rounded to its dtype. In post norm, v is a row of y, and s = x + scale * z is written.
//           In merging, pad tokens are zeros in v. Two passes over registers compute the sum, then the sums of v - mean
//           and of its square; the sum of v - mean corrects the rounding of the mean.
// Tiling    2^n threads share a row, with 24 or 16 elements each (traits.h); blocks loop over rows. The next row is
//           loaded before this one is reduced, so reads are always in flight. Weight and bias are in shared memory.
// Traffic   every element of x (and y) is read once, every element of s and z is written once; mean and rstd take 8
//           bytes per row.
// Roofline  memory bound; H100 SXM, published peak 3.35 TB/s, for (128, 56, 56, 96). Instructions are counted in the
//           sm_90 code, per warp and 24 * 32 elements; the time after a count is how long issuing them takes.
//           merging, bf16         155 MB  46 us, 470 instructions 25 us,  72 registers, 28 warps, 43 KB in flight
//           residual, bf16        312 MB  93 us, 570 instructions 31 us,  95 registers, 20 warps, 61 KB in flight
//           residual, f32 + bf16  466 MB 139 us, 590 instructions 32 us, 126 registers, 16 warps, 74 KB in flight
// Limits    see layer_norm_cuda.h.
#pragma once

#include <cstddef>

#include "../../common/ptx.cuh"
#include "rows.cuh"

namespace swinkernels::cuda {

template <class Source>
struct ForwardArguments : RowArguments<Source> {
  Parameter bias;
  float eps;
  const void* x;
  const void* y;
  void* s;
  void* z;
  float* mean;
  float* rstd;
};

struct ForwardSmem {
  RowGroup::Smem group;
  alignas(16) float parameters[1];  // weight, bias

  static size_t bytes(size_t parameter_bytes) { return offsetof(ForwardSmem, parameters) + 2 * parameter_bytes; }
};

// Returns total / length, rounded like a division.
__device__ __forceinline__ float divide(float total, float length, float inverse_length) {
  const float quotient = total * inverse_length;
  return fmaf(fmaf(-quotient, length, total), inverse_length, quotient);
}

// Returns 1 / sqrt(x): refines the hardware's approximation y by one Newton step, in which 1 - x * y * y is computed
// with twice the precision of a float.
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  const float y = rsqrtf(x), product = x * y, rest = fmaf(x, y, -product);
  return fmaf(0.5f * y, fmaf(-rest, y, fmaf(-product, y, 1.0f)), y);
}

template <int kVec>
__device__ __forceinline__ float sum_pairwise(const float (&x)[kVec]) {
  if constexpr (kVec == 1) {
    return x[0];
  } else {
    float half[kVec / 2];
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) half[i] = x[2 * i] + x[2 * i + 1];
    return sum_pairwise(half);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads)
    layer_norm_fwd_kernel(const ForwardArguments<typename Traits::Source> args) {
  using In = typename Traits::In;
  using Out = typename Traits::Out;
  constexpr LayerNormOp kOp = Traits::kOp;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  ForwardSmem& smem = *reinterpret_cast<ForwardSmem*>(dynamic_smem());
  RowGroup group(args.lanes_log2, &smem.group);
  const Columns<kVec, kVecs> columns(group.lane(), group.lanes(), args.vectors);
  const auto slots = args.source.template slots<true>(columns);
  const uint32_t block_vectors = kVecs * group.lanes();
  SharedParameter<kVec> weight(smem.parameters, block_vectors);
  SharedParameter<kVec> bias(smem.parameters + block_vectors * kVec, block_vectors);

  // The unconverted elements of a row. Missing elements are zeros.
  struct Inputs {
    typename In::Raw x[kVecs];
    typename Out::Raw y[kVecs];
    float scale;
  };
  const auto load = [&](uint32_t row) {
    Inputs inputs = {};
    if (row >= args.rows) return inputs;
    const auto position = args.source.position(row);
    const void* x = In::row(args.x, position.offset, args.in_dtype);
    const void* y = Out::row(args.y, position.offset, args.out_dtype);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (!columns.has(i) || !slots.exists(i, position)) continue;
      inputs.x[i] = In::load(x, slots.offset(i), args.in_dtype);
      if constexpr (kOp != LayerNormOp::kNorm) inputs.y[i] = Out::load(y, slots.offset(i), args.out_dtype);
    }
    if constexpr (kOp != LayerNormOp::kNorm) inputs.scale = args.scale(row);
    return inputs;
  };

  const uint32_t groups = blockDim.x >> args.lanes_log2, step = gridDim.x * groups;
  uint32_t first = blockIdx.x * groups;
  Inputs next = {};
  if constexpr (Traits::kForwardPrefetch) next = load(first + group.index());
  weight.fill(args.weight, args.length);
  bias.fill(args.bias, args.length);
  __syncthreads();

  for (; first < args.rows; first += step) {
    const uint32_t row = first + group.index();
    const bool is_row = row < args.rows;
    void* const s = In::row(args.s, args.row_offset(row), args.in_dtype);
    void* const z = Out::row(args.z, args.row_offset(row), args.out_dtype);

    if constexpr (!Traits::kForwardPrefetch) next = load(row);
    float v[kVecs][kVec];  // the row to normalise
    const Inputs inputs = next;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (kOp == LayerNormOp::kPostNorm) {
        Out::unpack(inputs.y[i], v[i], args.out_dtype);
      } else {
        In::unpack(inputs.x[i], v[i], args.in_dtype);
      }
      if constexpr (kOp == LayerNormOp::kResidual) {
        float y[kVec];
        Out::unpack(inputs.y[i], y, args.out_dtype);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[i][e] = fmaf(inputs.scale, y[e], v[i][e]);
      }
    }
    if constexpr (kOp == LayerNormOp::kNorm) {  // otherwise the compiler keeps the raw words and converts them again
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[i][e] = ptx::opaque(v[i][e]);
      }
    }
    if constexpr (Traits::kForwardPrefetch) next = load(row + step);  // in flight while this row is processed
    if constexpr (kOp == LayerNormOp::kResidual) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const typename In::Raw sum = In::pack(v[i], args.in_dtype);
        if (is_row && columns.has(i)) In::store(s, columns.column(i), sum, args.in_dtype);
        In::unpack(sum, v[i], args.in_dtype);
      }
    }

    float total[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) total[0] += sum_pairwise(v[i]);
    group.sum(total);
    const float near_mean = total[0] * args.inverse_length;
    float sums[2] = {0.0f, 0.0f};  // sums of v - near_mean and of its square
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float square[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        v[i][e] -= near_mean;
        square[e] = v[i][e] * v[i][e];
      }
      if (!columns.has(i)) continue;
      sums[0] += sum_pairwise(v[i]);
      sums[1] += sum_pairwise(square);
    }
    group.sum(sums);
    const float correction = sums[0] * args.inverse_length;
    const float square = divide(sums[1], args.length, args.inverse_length);
    const float variance = fmaxf(fmaf(-correction, correction, square), 0.0f);
    const float mean = near_mean + correction, rstd = reciprocal_sqrt(variance + args.eps);
    const float shift = -correction * rstd;
    if (is_row && columns.lane == 0) {
      args.mean[row] = mean;
      args.rstd[row] = rstd;
    }

#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float w[kVec], b[kVec];
      weight.read(columns.vector(i), w);
      bias.read(columns.vector(i), b);
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[i][e] = fmaf(fmaf(v[i][e], rstd, shift), w[e], b[e]);
      if constexpr (kOp == LayerNormOp::kPostNorm) {
        float x[kVec];
        In::unpack(inputs.x[i], x, args.in_dtype);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[i][e] = fmaf(inputs.scale, v[i][e], x[e]);
      }
      if (!is_row || !columns.has(i)) continue;
      if constexpr (kOp == LayerNormOp::kPostNorm) {
        In::store(s, columns.column(i), In::pack(v[i], args.in_dtype), args.in_dtype);
      } else {
        Out::store(z, columns.column(i), Out::pack(v[i], args.out_dtype), args.out_dtype);
      }
    }
  }
}

}  // namespace swinkernels::cuda
