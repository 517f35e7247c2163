// The launch functions of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "window_attention.h"

namespace swinkernels::cuda {

// All functions launch on the given stream of the current device, neither allocate nor synchronise, and return
// cudaErrorInvalidValue for calls without a kernel: beyond the limits below, 2^31 windows or more, or a bias table
// (table entries times types times heads) of 2^31 elements or more. Rows (data pointers and every stride but
// head_dim's) must be aligned to row_alignment.
cudaError_t window_attention_forward(const WindowAttentionForwardParams& params, cudaStream_t stream);

// The result depends on the geometry, on which gradients are wanted besides the maps' (not null; no data is read), and
// on the current device, because each block that fits on it keeps a partial sum of these gradients. Windows of more
// than one block of keys (64 tokens, or 32 if rows are wider than 128 bytes) also store one or two numbers for each
// query and, for dbias or dbias_table, N x N sums: 64 MB in all or, if that is more, one matrix per head and type. For
// any N, 16-bit calls of v1 with a table, without dropout, with a head_dim of up to 64 and regular maps need no such
// matrix; neither do those of v2 with up to 768 tokens, if the head_dim is at most 32. With axis_tables, each query and
// head takes 128 bytes, or 256 with daxis_tables. The workspace must be 16-byte aligned.
int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
cudaError_t window_attention_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream);

// The limits of the compiled kernels, listed only here; the bindings export them to Python.
constexpr int32_t kMaxWindowVolume = 1024;
constexpr int32_t kMaxHeadDim = 128;
// Windows of kMaxWindowVolume tokens need this much shared memory per block; devices with less support windows of up to
// kMaxWindowVolumeInLess tokens.
constexpr int32_t kSharedBytesOfLongest = 160 * 1024;
constexpr int32_t kMaxWindowVolumeInLess = 256;

// Limits of the kernels for axis_tables, which take 2D maps of 16-bit elements with whole rows of 16 bytes: tokens per
// axis, head_dim, and tokens of a window on devices with less than kSharedBytesOfLongest per block.
constexpr int32_t kMaxAxisTablesWindow = 16;
constexpr int32_t kMaxAxisTablesHeadDim = 64;
constexpr int32_t kMaxAxisTablesVolumeInLess = 196;

// Rows are copied in units of 16 bytes if their length is a multiple of 16, else of 4 bytes if it is a multiple of 4,
// else of 2 bytes.
constexpr int64_t row_alignment(int64_t row_bytes) { return row_bytes % 16 == 0 ? 16 : row_bytes % 4 == 0 ? 4 : 2; }

}  // namespace swinkernels::cuda
