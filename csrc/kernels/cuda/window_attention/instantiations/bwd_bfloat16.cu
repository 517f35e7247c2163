#include "../launch_bwd.cuh"

cudaError_t swinkernels::cuda::backward_bfloat16(const WindowAttentionBackwardParams& params, cudaStream_t stream,
                                                 int64_t* bytes) {
  return launch_backward<HalfPrecisionProduct<__nv_bfloat16>>(params, stream, bytes);
}
