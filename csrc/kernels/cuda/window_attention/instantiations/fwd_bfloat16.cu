#include "../launch_fwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_forward<HalfPrecisionProduct<__nv_bfloat16>>(const WindowAttentionForwardParams&,
                                                                         cudaStream_t);
}
