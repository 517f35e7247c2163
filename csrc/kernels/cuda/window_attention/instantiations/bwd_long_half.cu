#include "../launch_long_bwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_plain_long_backward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 16, 8>>(
    BackwardArguments&, const float*, ReducePartialsArguments&, WorkspaceArena&, bool, cudaStream_t, bool&);
template cudaError_t launch_plain_long_backward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 32, 8>>(
    BackwardArguments&, const float*, ReducePartialsArguments&, WorkspaceArena&, bool, cudaStream_t, bool&);
template cudaError_t launch_plain_long_backward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 64, 8>>(
    BackwardArguments&, const float*, ReducePartialsArguments&, WorkspaceArena&, bool, cudaStream_t, bool&);
}  // namespace swinkernels::cuda
