// Chooses the kernel instantiation for a call, and the number of blocks to launch.
#pragma once

#include <type_traits>

#include "../../common/launch.cuh"
#include "../../common/resident_blocks.cuh"
#include "traits.h"

namespace swinkernels::cuda {

// Defined in launch_fwd.cuh and launch_bwd.cuh, and instantiated for each product policy by a file in instantiations/.
// If `bytes` is not null, launch_backward only stores the size of the workspace there and launches nothing.
template <class Product>
cudaError_t launch_forward(const WindowAttentionForwardParams& params, cudaStream_t stream);
template <class Product>
cudaError_t launch_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes);

// True if kernels for plain long windows (long_windows.cuh) exist for these traits: 16-bit elements and head_dim <= 64.
template <class Traits>
constexpr bool kHasPlainLong = sizeof(typename Traits::T) == 2 && Traits::kHeadDim <= 64;

// Returns true if a call is of the plain kind (long_windows.cuh); make_long() checks its maps and its table.
inline bool is_plain(const WindowAttentionForwardParams& params, size_t element_bytes) {
  const bool (&pairs)[3] = params.geometry.table_pairs;
  return (params.logit_scale == nullptr || params.bias == nullptr) && params.bias_types == 1 && !pairs[0] &&
         !pairs[1] && !pairs[2] && params.dropout_p == 0.0f && params.head_dim * element_bytes % 16 == 0;
}

// Returns true if there are kernels for a call with axis_tables; make_long() checks its maps.
inline bool takes_axis_tables(const WindowAttentionForwardParams& params) {
  const WindowGeometry& geometry = params.geometry;
  return params.dtype != DType::kFloat32 && geometry.window[0] == 1 && params.axis_rows[0] == 0 &&
         params.axis_rows[1] == 2 * geometry.window[1] - 1 && params.axis_rows[2] == 2 * geometry.window[2] - 1 &&
         geometry.window[1] <= kMaxAxisTablesWindow && geometry.window[2] <= kMaxAxisTablesWindow &&
         params.head_dim <= kMaxAxisTablesHeadDim && params.bias_table == nullptr && params.bias == nullptr &&
         params.logit_scale == nullptr && is_plain(params, 2);
}

// Calls f(Traits, is_long) with the smallest tiles into which the head_dim and the window fit. Rows of up to 128 bytes
// are processed in blocks of 64; wider rows, and accumulators of more than 64 columns, in blocks of 32. There is a
// kernel with 7 tiles, because windows of 49 tokens, which fit into 56 columns, are common.
template <class Product, int kHeadDim, class F>
cudaError_t dispatch_window(const WindowAttentionForwardParams& params, F&& f) {
  constexpr size_t kElementBytes = sizeof(typename Product::T);
  const WindowGeometry& geometry = params.geometry;
  const int num_tokens = geometry.window[0] * geometry.window[1] * geometry.window[2];
  const auto run_short = [&](auto tiles) {
    return f(WindowAttentionTraits<Product, kHeadDim, decltype(tiles)::value>{}, std::false_type{});
  };
  constexpr int kMostTiles = kHeadDim * kElementBytes > 128 ? 4 : 8;
  if constexpr (kElementBytes == 2 && kHeadDim >= 32 && kMostTiles == 8) {
    if (num_tokens <= 32) return run_short(std::integral_constant<int, 4>{});
    if (num_tokens <= 56) return run_short(std::integral_constant<int, 7>{});
  }
  if (num_tokens <= 8 * kMostTiles) return run_short(std::integral_constant<int, kMostTiles>{});
  return f(WindowAttentionTraits<Product, kHeadDim, kMostTiles>{}, std::true_type{});
}

// Calls f(Short16Traits) for a call that satisfies is_short16() (short16.cuh), as the most common calls do.
template <class Product, class F>
cudaError_t dispatch_short16(const WindowAttentionForwardParams& params, F&& f) {
  if constexpr (sizeof(typename Product::T) == 2) {
    const int num_tokens = params.geometry.window[1] * params.geometry.window[2];
    const auto with_head_dim = [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      if (num_tokens <= 32) return f(Short16Traits<Product, kHeadDim, 4>{});
      if (num_tokens <= 56) return f(Short16Traits<Product, kHeadDim, 7>{});
      return f(Short16Traits<Product, kHeadDim, 8>{});
    };
    if (params.head_dim == 16) return with_head_dim(std::integral_constant<int, 16>{});
    if (params.head_dim == 24) return with_head_dim(std::integral_constant<int, 24>{});
    if (params.head_dim == 32) return with_head_dim(std::integral_constant<int, 32>{});
    return with_head_dim(std::integral_constant<int, 64>{});
  }
  return cudaErrorInvalidValue;
}

template <class Product, class F>
cudaError_t dispatch(const WindowAttentionForwardParams& params, F&& f) {
  if (params.head_dim <= 16) return dispatch_window<Product, 16>(params, f);
  if (params.head_dim <= 32) return dispatch_window<Product, 32>(params, f);
  if (params.head_dim <= 64) return dispatch_window<Product, 64>(params, f);
  return dispatch_window<Product, 128>(params, f);
}

}  // namespace swinkernels::cuda
