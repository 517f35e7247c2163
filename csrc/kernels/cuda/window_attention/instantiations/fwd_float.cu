#include "../launch_fwd.cuh"

cudaError_t swinkernels::cuda::forward_float(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward<FloatProduct>(params, stream);
}
