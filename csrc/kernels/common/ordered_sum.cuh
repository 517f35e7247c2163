// Sums the blocks' partial results in an order that depends only on their number, without atomics: every run gives the
// same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swinkernels {

// A block of kOutputs * kSlices threads sums kOutputs columns. Thread i works on column i % kOutputs, whose `count`
// values begin at `partials`, `stride` apart; `partials` is null if there is no such column. Slices of a column are
// summed in parallel, then added in order. Every thread of the block calls this; threads i < kOutputs, the first slice,
// return the sums.
template <int kOutputs, int kSlices>
__device__ __forceinline__ float ordered_sum(const float* partials, int64_t stride, uint32_t count) {
  __shared__ float slices[kSlices][kOutputs];
  const int output = threadIdx.x % kOutputs, slice = threadIdx.x / kOutputs;
  const uint32_t per_slice = (count + kSlices - 1) / kSlices;
  const uint32_t begin = slice * per_slice, end = min(begin + per_slice, count);
  float sum = 0.0f;
  if (partials != nullptr) {
#pragma unroll 4
    for (uint32_t i = begin; i < end; ++i) sum += partials[i * stride];
  }
  slices[slice][output] = sum;
  __syncthreads();
  if (slice == 0) {
    for (int i = 1; i < kSlices; ++i) sum += slices[i][output];
  }
  return sum;
}

}  // namespace swinkernels
