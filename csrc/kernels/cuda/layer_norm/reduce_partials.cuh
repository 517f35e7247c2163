// Computes dweight and dbias from the partial sums in the backward kernel's workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swinkernels::cuda {

struct ColumnSums {
  const float* partials;  // (blocks, 2, length), of dweight and dbias
  float* dweight;         // (length), or null
  float* dbias;           // (length), or null
  uint32_t length;
  uint32_t blocks;  // if 0, the sums are zero
};

cudaError_t reduce_partials(const ColumnSums& sums, cudaStream_t stream);

}  // namespace swinkernels::cuda
