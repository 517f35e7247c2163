// Python interface to the launch functions of csrc/params/window_partition_cuda.h, run by the emulator. A nonzero
// max_vectors limits the vectors per launch, which splits the work into several launches, as for a huge tensor.
#include "kernels/cuda/window_partition/launch.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace swinkernels;

EXPORT int64_t sizeof_window_copy_params() { return sizeof(WindowPartitionParams); }

EXPORT int emulated_window_partition(const WindowPartitionParams* params, int64_t max_vectors) {
  return max_vectors == 0 ? cuda::window_partition(*params, nullptr)
                          : cuda::launch_window_copy(*params, nullptr, max_vectors);
}
EXPORT int emulated_window_reverse(const WindowReverseParams* params, int64_t max_vectors) {
  return max_vectors == 0 ? cuda::window_reverse(*params, nullptr)
                          : cuda::launch_window_copy(*params, nullptr, max_vectors);
}
