#include "../launch_fwd.cuh"

cudaError_t swinkernels::cuda::forward_bfloat16(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward<HalfPrecisionProduct<__nv_bfloat16>>(params, stream);
}
