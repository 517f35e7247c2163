#include "../launch_bwd.cuh"

cudaError_t swinkernels::cuda::backward_tf32(const WindowAttentionBackwardParams& params, cudaStream_t stream,
                                             int64_t* bytes) {
  return launch_backward<Tf32Product>(params, stream, bytes);
}
