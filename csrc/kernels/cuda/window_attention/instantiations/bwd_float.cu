#include "../launch_bwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_backward<FloatProduct>(const WindowAttentionBackwardParams&, cudaStream_t, int64_t*);
}
