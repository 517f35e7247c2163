// The launch functions of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "layer_norm.h"

namespace swinkernels::cuda {

// All functions launch on the given stream of the current device, neither allocate nor synchronise, and return
// cudaErrorInvalidValue for calls without a kernel: rows longer than the limit below, 2^31 rows or more, neighbours
// 2^31 elements apart or more, or two different half-precision dtypes. Pointers to data with rows must be 16-byte
// aligned.
cudaError_t layer_norm_forward(const LayerNormForwardParams& params, cudaStream_t stream);

// The result depends on op, dtypes and rows, on whether dweight or dbias is wanted (not null; no data is read), and on
// the current device, because each block that fits on it keeps a partial sum of both.
int64_t layer_norm_backward_workspace_bytes(const LayerNormBackwardParams& params);
cudaError_t layer_norm_backward(const LayerNormBackwardParams& params, cudaStream_t stream);

// The longest supported row; the bindings export this limit to Python.
constexpr int32_t kMaxRow = 8192;

}  // namespace swinkernels::cuda
