// What Python calls: the launch functions of csrc/params/window_partition_cuda.h, run by the emulator. With a number of
// vectors that a launch may have, the same launches cut into as many as a huge tensor would take.
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
