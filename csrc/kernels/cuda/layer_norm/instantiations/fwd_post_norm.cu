#include "../launch_fwd.cuh"

template cudaError_t
swinkernels::cuda::launch_forward<swinkernels::LayerNormOp::kPostNorm, swinkernels::cuda::PlainRows>(
    const LayerNormForwardParams& params, cudaStream_t stream);
