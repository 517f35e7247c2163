#include "../launch_bwd.cuh"

template cudaError_t
swinkernels::cuda::launch_backward<swinkernels::LayerNormOp::kPostNorm, swinkernels::cuda::PlainRows>(
    const LayerNormBackwardParams& params, cudaStream_t stream, int64_t* bytes);
