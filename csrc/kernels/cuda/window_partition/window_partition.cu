#include "launch.cuh"

cudaError_t swinkernels::cuda::window_partition(const WindowPartitionParams& params, cudaStream_t stream) {
  return launch_window_copy(params, stream);
}

cudaError_t swinkernels::cuda::window_reverse(const WindowReverseParams& params, cudaStream_t stream) {
  return launch_window_copy(params, stream);
}
