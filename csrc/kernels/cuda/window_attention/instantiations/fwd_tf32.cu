#include "../launch_fwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_forward<Tf32Product>(const WindowAttentionForwardParams&, cudaStream_t);
}
