// The functions that launch the CUDA backend's layer norm kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "layer_norm.h"

namespace swinkernels::cuda {

// layer_norm_forward and layer_norm_backward launch on the given stream of the current device, and neither allocate nor
// synchronise. They return cudaErrorInvalidValue for calls that no kernel supports, such as rows longer than kMaxRow,
// 2^31 or more rows, patch merging of neighbours that are 2^31 or more elements apart, or two different half-precision
// dtypes. Pointers to tensors of rows must be 16-byte aligned.
cudaError_t layer_norm_forward(const LayerNormForwardParams& params, cudaStream_t stream);

// Returns the size of the workspace that the backward pass needs. It depends on the op, on the dtypes, on the number,
// length and layout of the rows, and on whether dweight or dbias is requested (is not null; the pointers are not read).
// It also depends on the current device: each thread block keeps partial sums of dweight and dbias, and at most as many
// blocks are launched as fit on the device at the same time.
int64_t layer_norm_backward_workspace_bytes(const LayerNormBackwardParams& params);
cudaError_t layer_norm_backward(const LayerNormBackwardParams& params, cudaStream_t stream);

// The longest supported row; the bindings export this limit to Python.
constexpr int32_t kMaxRow = 8192;

}  // namespace swinkernels::cuda
