// Token indices as computed by the kernels for short windows in 16 bits, for maps that are too large to allocate.
#include "kernels/cuda/window_attention/fwd_short16_sm80.cuh"

namespace swinkernels::cuda {
namespace {

using Traits = Short16Traits<HalfPrecisionProduct<__half>, 32, 7>;

__global__ void find_tokens_kernel(const Short16ForwardArguments args, uint32_t item, uint32_t* numbers) {
  const int row0 = threadIdx.x / 32 * 16;
  const auto own = OwnRows<Traits>::of(args, row0, 0);
  const auto window = own.start(args, item, SeamBits{}, [](auto, const auto&) {});
  for (int i = 0; i < own.kRows; ++i) {
    const int row = row0 + threadIdx.x % 32 / own.kLanes + i * own.kRowDistance;
    if (own.in_window[i] && own.chunk == 0) numbers[row] = window.token[i];
  }
}

}  // namespace
}  // namespace swinkernels::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace swinkernels;

// Returns true if the kernels support the call. If so, and if `numbers` is not null, writes the indices of the 33 to 56
// tokens of window `item` to `numbers`.
EXPORT bool short16_takes(const WindowAttentionForwardParams* params, uint32_t item, uint32_t* numbers) {
  cuda::Short16ForwardArguments args = {};
  static_cast<cuda::WindowArguments<4>&>(args) = cuda::WindowArguments<4>::of(*params);
  if (!cuda::is_short16(*params) || !args.set(*params)) return false;
  return numbers == nullptr ||
         launch(cuda::find_tokens_kernel, 1, cuda::Traits::kThreads, 0, nullptr, args, item, numbers) == cudaSuccess;
}
