// Launch prototypes of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "window_attention.h"

namespace swinkernels::cuda {

cudaError_t window_attention_forward(const WindowAttentionForwardParams& params, cudaStream_t stream);

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
cudaError_t window_attention_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream);

// The values that instantiations exist for, listed once; the bindings export them to Python.
constexpr int32_t kMaxWindowVolume = 256;
constexpr int32_t kMaxHeadDim = 128;
constexpr int32_t kHeadDimMultiple = 8;

}  // namespace swinkernels::cuda
