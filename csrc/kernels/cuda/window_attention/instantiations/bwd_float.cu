#include "../launch_bwd.cuh"

cudaError_t swinkernels::cuda::backward_float(const WindowAttentionBackwardParams& params, cudaStream_t stream,
                                              int64_t* bytes) {
  return launch_backward<FloatProduct>(params, stream, bytes);
}
