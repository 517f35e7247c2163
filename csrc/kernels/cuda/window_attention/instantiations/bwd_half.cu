#include "../launch_bwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_backward<HalfPrecisionProduct<__half>>(const WindowAttentionBackwardParams&, cudaStream_t,
                                                                   int64_t*);
}
