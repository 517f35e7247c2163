#include "../launch_fwd.cuh"

cudaError_t swinkernels::cuda::forward_tf32(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward<Tf32Product>(params, stream);
}
