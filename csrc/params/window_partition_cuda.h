// The launch functions of the CUDA backend.
#pragma once

#include <cuda_runtime_api.h>

#include "window_partition.h"

namespace swinkernels::cuda {

// Both functions launch on the given stream of the current device, neither allocate nor synchronise, and return
// cudaErrorInvalidValue for a meaningless geometry, a frame of more than kMaxFrame tokens on an axis, or a window of
// more than 2^30 of the widest units (1 to 16 bytes) in which its rows can be moved. Source and destination are
// disjoint.
//
// Partition writes every row of the windows, zeros for pad tokens. Reverse writes every token of the map exactly once,
// and does not read the rows of pad tokens.
cudaError_t window_partition(const WindowPartitionParams& params, cudaStream_t stream);
cudaError_t window_reverse(const WindowReverseParams& params, cudaStream_t stream);

}  // namespace swinkernels::cuda
