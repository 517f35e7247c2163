// The group of threads that share a row, and sums over the group.
#pragma once

#include <cstdint>

#include "traits.h"

namespace swinkernels::cuda {

class RowGroup {
 public:
  // Shared memory for the sums of groups of several warps.
  struct Smem {
    float sums[2][2][kMaxWarps];
  };

  __device__ __forceinline__ RowGroup(uint32_t lanes_log2, Smem* smem)
      : lanes_(1u << lanes_log2), index_(threadIdx.x >> lanes_log2), smem_(smem) {}

  __device__ __forceinline__ uint32_t lanes() const { return lanes_; }
  __device__ __forceinline__ uint32_t lane() const { return threadIdx.x & (lanes_ - 1); }
  __device__ __forceinline__ uint32_t index() const { return index_; }  // index of this group in the block

  // Replaces each value by its sum over the group, with the same bits in every thread. All threads of the block must
  // call this.
  template <int kValues>
  __device__ __forceinline__ void sum(float (&values)[kValues]) {
    static_assert(kValues <= 2);
    for (uint32_t distance = min(lanes_, kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) values[v] += __shfl_xor_sync(0xffffffffu, values[v], distance);
    }
    if (lanes_ <= kWarp) return;
    // With two alternating buffers, one barrier per sum suffices: before a thread writes to a buffer again, it passes
    // the barrier of the other buffer, which follows all reads of the first.
    parity_ ^= 1;
    float (&sums)[2][kMaxWarps] = smem_->sums[parity_];
    const uint32_t warps = lanes_ / kWarp, first = index_ * warps;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) sums[v][threadIdx.x / kWarp] = values[v];
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      float sum = 0.0f;
#pragma unroll 1
      for (uint32_t w = 0; w < warps; ++w) sum += sums[v][first + w];
      values[v] = sum;
    }
  }

 private:
  uint32_t lanes_, index_;
  Smem* smem_;
  uint32_t parity_ = 0;
};

}  // namespace swinkernels::cuda
