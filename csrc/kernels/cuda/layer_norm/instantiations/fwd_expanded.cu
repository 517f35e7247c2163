#include "../launch_fwd.cuh"

template cudaError_t
swinkernels::cuda::launch_forward<swinkernels::LayerNormOp::kNorm, swinkernels::cuda::ExpandedRows>(
    const LayerNormForwardParams& params, cudaStream_t stream);
