#include "../launch_fwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_forward<HalfPrecisionProduct<__half>>(const WindowAttentionForwardParams&, cudaStream_t);
}
