// Launch prototypes of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "window_attention.h"

namespace swinkernels::cuda {

// All launch on the given stream of the current device, neither allocate nor synchronise, and return
// cudaErrorInvalidValue for what no kernel was made for: more than the limits below, 2^31 windows or more, or a bias
// table (table entries times heads) of 2^31 elements or more. Rows (data pointers and every stride but head_dim's) must
// be 16-byte aligned.
cudaError_t window_attention_forward(const WindowAttentionForwardParams& params, cudaStream_t stream);

// Depends on the geometry, on which of dbias_table and dpad_qkv are wanted (not null; nothing is read), and on the
// current device: its blocks each keep a partial sum of these two gradients. Windows of more than one block of keys (64
// tokens, or 32 where rows are wider than 128 bytes) keep a dense N x N dbias per block as well, of 64 MB in all or, if
// that is more, one per head. The workspace must be 16-byte aligned.
int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
cudaError_t window_attention_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream);

// The values that instantiations exist for, listed once; the bindings export them to Python.
constexpr int32_t kMaxWindowVolume = 256;
constexpr int32_t kMaxHeadDim = 128;
constexpr int32_t kHeadDimMultiple = 8;

}  // namespace swinkernels::cuda
