// The sums of what the blocks of the backward kernels left in the workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swinkernels::cuda {

struct ReducePartialsArguments {
  const float* table_partials;  // (workers, heads, table entries)
  const float* pad_partials;    // (workers, heads, 2, head_dim), of k and v
  float* dbias_table;           // (table entries, heads), or null
  float* dpad_qkv;              // (3, heads, head_dim), or null
  int32_t num_heads, head_dim, table_entries;
  uint32_t workers;  // none: the sums are zero
};

cudaError_t reduce_partials(const ReducePartialsArguments& args, cudaStream_t stream);

}  // namespace swinkernels::cuda
