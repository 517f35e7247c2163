#include "../launch_long_fwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_plain_long_forward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 64, 8>, true>(
    const ForwardArguments&, const float*, cudaStream_t, bool&);
}  // namespace swinkernels::cuda
