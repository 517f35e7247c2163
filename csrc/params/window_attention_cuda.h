// Launch prototypes of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "window_attention.h"

namespace swinkernels::cuda {

// All launch on the given stream of the current device, neither allocate nor synchronise, and return
// cudaErrorInvalidValue for calls without a kernel: beyond the limits below, 2^31 windows or more, or a bias table
// (table entries times heads) of 2^31 elements or more. Rows (data pointers and every stride but head_dim's) must be
// aligned to row_alignment.
cudaError_t window_attention_forward(const WindowAttentionForwardParams& params, cudaStream_t stream);

// Depends on the geometry, on which gradients other than those of the maps are wanted (not null; nothing is read), and
// on the current device, whose blocks each keep a partial sum of these gradients. Windows of more than one block of
// keys (64 tokens, or 32 where rows are wider than 128 bytes) also store one or two numbers for each query, and N x N
// sums for a dbias or dbias_table, of 64 MB in all or, if that is more, one per head and type; but 16-bit calls of v1
// with a table, without dropout, with a head_dim of up to 64 and regular maps need none of these sums, whatever N. The
// workspace must be 16-byte aligned.
int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
cudaError_t window_attention_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream);

// The values with instantiations, listed once; the bindings export them to Python.
constexpr int32_t kMaxWindowVolume = 1024;
constexpr int32_t kMaxHeadDim = 128;
// The longest windows need this much shared memory per block; devices with less take windows of up to this many tokens.
constexpr int32_t kSharedBytesOfLongest = 160 * 1024;
constexpr int32_t kMaxWindowVolumeInLess = 256;

// Rows that are a multiple of 16 bytes are copied by 16 bytes, others by 4, or by 2 if their length is odd.
constexpr int64_t row_alignment(int64_t row_bytes) { return row_bytes % 16 == 0 ? 16 : row_bytes % 4 == 0 ? 4 : 2; }

}  // namespace swinkernels::cuda
