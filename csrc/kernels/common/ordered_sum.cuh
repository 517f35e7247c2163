// Sums the partial results of all blocks without atomics, in an order that depends only on the number of blocks, so
// that every run gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swinkernels {

// Sums kOutputs columns with a block of kOutputs * kSlices threads, all of which must call this function. Thread i
// works on column i % kOutputs: `partials` points to the first of the column's `count` values, which are `stride`
// elements apart, or is null if the column does not exist. The slices of a column are summed in parallel, and their
// sums are added in order. Threads i < kOutputs return the sums of the columns.
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
