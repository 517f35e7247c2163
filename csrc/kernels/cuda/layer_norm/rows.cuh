// Code shared by the forward and backward kernels: rows, their distribution over threads, and parameters in shared
// memory.
#pragma once

#include <cstdint>

#include "../../common/launch.cuh"
#include "parameters.cuh"
#include "row_group.cuh"
#include "row_source.cuh"
#include "traits.h"

namespace swinkernels::cuda {

template <class Source>
struct RowArguments {
  uint32_t rows, length;
  uint32_t vectors;     // vectors in a row
  uint32_t lanes_log2;  // log2 of the number of threads that share a row
  float inverse_length;
  DType in_dtype, out_dtype;
  Source source;
  const float* drop_path_scale;  // or null
  FastDivisor samples;           // rows in a sample
  Parameter weight;

  // Returns the drop path factor of a row, which is 1 without drop path.
  __device__ __forceinline__ float scale(uint32_t row) const {
    if (drop_path_scale == nullptr) return 1.0f;
    uint32_t rest;
    return drop_path_scale[samples.divide(row, &rest)];
  }

  // Returns the offset of a row, in elements, for contiguous rows.
  __device__ __forceinline__ uint64_t row_offset(uint32_t row) const { return static_cast<uint64_t>(row) * length; }
};

}  // namespace swinkernels::cuda
