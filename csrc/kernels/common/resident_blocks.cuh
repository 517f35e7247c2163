// The number of a kernel's blocks that can be resident on the device at the same time. Kernels whose blocks loop over
// their work use it as the grid size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.cuh"

namespace swinkernels {

template <class... Params>
cudaError_t resident_blocks(void (*kernel)(Params...), int threads, size_t smem_bytes, int64_t* blocks) {
  int multiprocessors, per_multiprocessor;
  cudaError_t status = multiprocessor_count(&multiprocessors);
  if (status != cudaSuccess) return status;
  status = blocks_per_multiprocessor(kernel, threads, smem_bytes, &per_multiprocessor);
  *blocks = static_cast<int64_t>(multiprocessors) * per_multiprocessor;
  return status;
}

}  // namespace swinkernels
