#include "../launch_long_bwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_plain_long_backward<WindowAttentionTraits<HalfPrecisionProduct<__nv_bfloat16>, 64, 8>,
                                                true>(BackwardArguments&, const float*, ReducePartialsArguments&,
                                                      WorkspaceArena&, bool, cudaStream_t, bool&);
}  // namespace swinkernels::cuda
