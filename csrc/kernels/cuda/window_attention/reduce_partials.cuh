// Sums the partial results of the backward kernels' blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../common/window_address.cuh"

namespace swinkernels::cuda {

// Each unit (arguments.cuh) has partial sums from several workers, with index w * units + u for worker w and unit u.
struct ReducePartialsArguments {
  const float* table_partials;  // (partials, table entries), or null if the table's gradient is in dense_partials
  const float* dense_partials;  // (partials, rows, rows)
  const float* pad_partials;    // (partials, 2, head_dim), for k and v
  const float* logit_partials;  // (partials)
  const float* axis_partials;   // (axis_workers, axis_entries)
  float* dbias_table;           // (table entries, types, heads), or null
  float* dbias;                 // (types, heads, N, N), or null
  float* dpad_qkv;              // (3, heads, head_dim), or null
  float* dlogit_scale;          // (heads), or null
  float* daxis_tables;          // (axis_entries), or null
  WindowLayout layout;
  int32_t num_heads, head_dim, num_tokens, bias_types;
  int32_t dense_rows;
  int32_t axis_entries;
  uint32_t workers, table_workers, dense_workers, logit_workers, axis_workers;  // with 0 workers, the sums are zero
};

cudaError_t reduce_partials(const ReducePartialsArguments& args, cudaStream_t stream);

}  // namespace swinkernels::cuda
