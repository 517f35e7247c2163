#include "../launch_bwd.cuh"

namespace swinkernels::cuda {
template cudaError_t launch_backward<Tf32Product>(const WindowAttentionBackwardParams&, cudaStream_t, int64_t*);
}
