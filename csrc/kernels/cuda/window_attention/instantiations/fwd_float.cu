#include "../launch_fwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_forward<FloatProduct>(const WindowAttentionForwardParams&, cudaStream_t);
}
