#include "../launch_long_fwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_plain_long_forward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 16, 8>>(
    const ForwardArguments&, const float*, cudaStream_t, bool&);
template cudaError_t launch_plain_long_forward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 32, 8>>(
    const ForwardArguments&, const float*, cudaStream_t, bool&);
template cudaError_t launch_plain_long_forward<WindowAttentionTraits<HalfPrecisionProduct<__half>, 64, 8>>(
    const ForwardArguments&, const float*, cudaStream_t, bool&);
}  // namespace swinkernels::cuda
