// The functions that launch the CUDA backend's window partition kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "window_partition.h"

namespace swinkernels::cuda {

// Both functions launch on the given stream of the current device, and neither allocate nor synchronise. They return
// cudaErrorInvalidValue for an invalid geometry, a frame of more than kMaxFrame tokens on an axis, or a window of more
// than 2^30 vectors (a vector has 1 to 16 bytes, the largest unit to which the rows are aligned). Source and
// destination must not overlap.
//
// Partition writes every row of the windows, with zeros for pad tokens. Reverse writes every token of the map exactly
// once, and does not read the rows of pad tokens.
cudaError_t window_partition(const WindowPartitionParams& params, cudaStream_t stream);
cudaError_t window_reverse(const WindowReverseParams& params, cudaStream_t stream);

}  // namespace swinkernels::cuda
