#include "../launch_bwd.cuh"

cudaError_t swinkernels::cuda::backward_half(const WindowAttentionBackwardParams& params, cudaStream_t stream,
                                             int64_t* bytes) {
  return launch_backward<HalfPrecisionProduct<__half>>(params, stream, bytes);
}
