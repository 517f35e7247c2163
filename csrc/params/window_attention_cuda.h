// The launch functions of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "window_attention.h"

namespace swinkernels::cuda {

// window_attention_forward and window_attention_backward launch on the given stream of the current device, and neither
// allocate nor synchronise. They return cudaErrorInvalidValue for calls that no kernel supports: calls beyond the
// limits below, with a key margin, with 2^31 or more windows, or with a bias table of 2^31 or more elements (table
// entries times types times heads). Rows (data pointers and every stride but head_dim's) must be aligned to
// row_alignment.
cudaError_t window_attention_forward(const WindowAttentionForwardParams& params, cudaStream_t stream);

// Returns the size of the workspace that the backward pass needs; the workspace must be 16-byte aligned. The size
// depends on the geometry, on which gradients other than dq, dk and dv are requested (are not null; the pointers are
// not read), and on the current device: each thread block keeps partial sums of these gradients, and no more blocks
// are launched than fit on the device at the same time, but at least one per head and type. For windows of more than
// one block of keys (64 tokens, or 32 if rows are wider than 128 bytes), the workspace also holds up to two numbers for
// each query and head and, for dbias or dbias_table, N x N matrices of sums: up to 64 MB or, if larger, one matrix per
// head and type. The kernels for plain long windows (long_windows.cuh) need no such matrix for a table if a block has
// enough shared memory: 227 KB suffice at a head_dim of up to 32 for 2D windows of up to 1,024 tokens in v1, or 768
// in v2. With axis_tables, each query and head takes 128 bytes, or 256 with daxis_tables.
int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
cudaError_t window_attention_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream);

// The limits of the compiled kernels, listed only here; the bindings export them to Python.
constexpr int32_t kMaxWindowVolume = 1024;
constexpr int32_t kMaxHeadDim = 128;
// Windows of kMaxWindowVolume tokens need this much shared memory per block. A device with less shared memory supports
// windows of up to kMaxWindowVolumeInLess tokens.
constexpr int32_t kSharedBytesOfLongest = 160 * 1024;
constexpr int32_t kMaxWindowVolumeInLess = 256;

// Limits of the kernels for axis_tables: tokens per axis, head_dim, and tokens per window on devices with less than
// kSharedBytesOfLongest of shared memory per block. These kernels support 2D maps of 16-bit elements whose rows are
// multiples of 16 bytes.
constexpr int32_t kMaxAxisTablesWindow = 16;
constexpr int32_t kMaxAxisTablesHeadDim = 64;
constexpr int32_t kMaxAxisTablesVolumeInLess = 196;

// Rows are copied in units of 16 bytes if their length is a multiple of 16, else of 4 bytes if it is a multiple of 4,
// else of 2 bytes.
constexpr int64_t row_alignment(int64_t row_bytes) { return row_bytes % 16 == 0 ? 16 : row_bytes % 4 == 0 ? 4 : 2; }

}  // namespace swinkernels::cuda
