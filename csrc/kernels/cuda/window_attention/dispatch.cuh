// Which instantiation runs a call, and how many blocks of it.
#pragma once

#include <type_traits>

#include "../../common/launch.cuh"
#include "../../common/resident_blocks.cuh"
#include "traits.h"

namespace swinkernels::cuda {

// What the instantiation files define, one function per policy and direction.
cudaError_t forward_half(const WindowAttentionForwardParams& params, cudaStream_t stream);
cudaError_t forward_bfloat16(const WindowAttentionForwardParams& params, cudaStream_t stream);
cudaError_t forward_tf32(const WindowAttentionForwardParams& params, cudaStream_t stream);
cudaError_t forward_float(const WindowAttentionForwardParams& params, cudaStream_t stream);

// Each returns the workspace's size without launching anything if `bytes` is given.
cudaError_t backward_half(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes);
cudaError_t backward_bfloat16(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes);
cudaError_t backward_tf32(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes);
cudaError_t backward_float(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes);

// Calls f(Traits, is_long) with the smallest tiles that hold the head_dim and the window. Rows of up to 128 bytes go in
// blocks of 64; wider ones, and accumulators of more than 64 columns, in blocks of 32. The 7-tile kernel exists because
// 49 tokens are the common window and 56 columns hold them.
template <class Product, int kHeadDim, class F>
cudaError_t dispatch_window(int num_tokens, F&& f) {
  constexpr bool kWide = kHeadDim * sizeof(typename Product::T) > 128;
  if constexpr (kWide) {
    using Traits = WindowAttentionTraits<Product, kHeadDim, 4>;
    return num_tokens <= 32 ? f(Traits{}, std::false_type{}) : f(Traits{}, std::true_type{});
  } else {
    if constexpr (sizeof(typename Product::T) == 2 && kHeadDim >= 32) {
      if (num_tokens <= 32) return f(WindowAttentionTraits<Product, kHeadDim, 4>{}, std::false_type{});
      if (num_tokens <= 56) return f(WindowAttentionTraits<Product, kHeadDim, 7>{}, std::false_type{});
    }
    using Traits = WindowAttentionTraits<Product, kHeadDim, 8>;
    return num_tokens <= 64 ? f(Traits{}, std::false_type{}) : f(Traits{}, std::true_type{});
  }
}

template <class Product, class F>
cudaError_t dispatch(const WindowAttentionForwardParams& params, F&& f) {
  const WindowGeometry& geometry = params.geometry;
  const int num_tokens = geometry.window[0] * geometry.window[1] * geometry.window[2];
  if (params.head_dim <= 16) return dispatch_window<Product, 16>(num_tokens, f);
  if (params.head_dim <= 32) return dispatch_window<Product, 32>(num_tokens, f);
  if (params.head_dim <= 64) return dispatch_window<Product, 64>(num_tokens, f);
  return dispatch_window<Product, 128>(num_tokens, f);
}

}  // namespace swinkernels::cuda
