#include "../launch_bwd.cuh"

template cudaError_t
swinkernels::cuda::launch_backward<swinkernels::LayerNormOp::kNorm, swinkernels::cuda::ExpandedRows>(
    const LayerNormBackwardParams& params, cudaStream_t stream, int64_t* bytes);
