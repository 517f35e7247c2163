// The entry points of the CUDA backend: checks of the kernels' assumptions, and the choice of the product policy.
#include <cstdint>

#include "../../common/tile_product.cuh"
#include "dispatch.cuh"

namespace swinkernels::cuda {
namespace {

bool supported(const WindowAttentionForwardParams& params) {
  const WindowGeometry& geometry = params.geometry;
  if (params.axis_tables != nullptr && !takes_axis_tables(params)) return false;
  int64_t num_tokens = 1, table_tokens = 1, table_entries = 1, windows = params.batch;
  for (int axis = 0; axis < 3; ++axis) {
    if (geometry.window[axis] < 1 || geometry.size[axis] < 1 || geometry.table_window[axis] < 1) return false;
    if (geometry.key_margin[axis] != 0) return false;
    const int64_t size = geometry.table_window[axis];
    if (geometry.table_pairs[axis] && size != geometry.window[axis]) return false;
    if (geometry.shift[axis] < 0 || geometry.shift[axis] >= geometry.window[axis]) return false;
    num_tokens *= geometry.window[axis];
    table_tokens *= size;
    table_entries *= geometry.table_pairs[axis] ? size * size : 2 * size - 1;
    windows *= geometry.num_windows[axis];
    if (num_tokens > kMaxWindowVolume || table_entries > INT32_MAX || windows >= INT32_MAX) return false;
  }
  // Units (pairs of head and type) and the elements of a table have 32-bit indices.
  const int64_t units = int64_t{params.bias_types} * params.num_heads;
  if (params.bias_types < 1 || units > INT32_MAX) return false;
  if (params.bias_table != nullptr && (num_tokens > table_tokens || table_entries > INT32_MAX / units)) return false;
  return params.batch >= 0 && params.num_heads >= 1 && params.head_dim >= 1 && params.head_dim <= kMaxHeadDim;
}

}  // namespace

cudaError_t window_attention_forward(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  if (!supported(params)) return cudaErrorInvalidValue;
  switch (params.dtype) {
    case DType::kBFloat16:
      return launch_forward<HalfPrecisionProduct<__nv_bfloat16>>(params, stream);
#ifndef SWINKERNELS_BFLOAT16_ALONE
    case DType::kFloat16:
      return launch_forward<HalfPrecisionProduct<__half>>(params, stream);
    case DType::kFloat32:
      return params.allow_tf32 ? launch_forward<Tf32Product>(params, stream)
                               : launch_forward<FloatProduct>(params, stream);
#else
    default:  // a dtype that is omitted in builds for comparisons
      return cudaErrorInvalidValue;
#endif
  }
  return cudaErrorInvalidValue;
}

namespace {

cudaError_t backward(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes) {
  if (!supported(params.forward)) return cudaErrorInvalidValue;
  switch (params.forward.dtype) {
    case DType::kBFloat16:
      return launch_backward<HalfPrecisionProduct<__nv_bfloat16>>(params, stream, bytes);
#ifndef SWINKERNELS_BFLOAT16_ALONE
    case DType::kFloat16:
      return launch_backward<HalfPrecisionProduct<__half>>(params, stream, bytes);
    case DType::kFloat32:
      return params.forward.allow_tf32 ? launch_backward<Tf32Product>(params, stream, bytes)
                                       : launch_backward<FloatProduct>(params, stream, bytes);
#else
    default:  // a dtype that is omitted in builds for comparisons
      return cudaErrorInvalidValue;
#endif
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params) {
  int64_t bytes = 0;
  return backward(params, nullptr, &bytes) == cudaSuccess ? bytes : 0;  // the launch will fail with the same error
}

cudaError_t window_attention_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream) {
  return backward(params, stream, nullptr);
}

}  // namespace swinkernels::cuda
