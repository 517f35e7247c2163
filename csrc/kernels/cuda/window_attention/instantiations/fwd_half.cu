#include "../launch_fwd.cuh"

cudaError_t swinkernels::cuda::forward_half(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward<HalfPrecisionProduct<__half>>(params, stream);
}
