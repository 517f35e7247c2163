// The forward launch; one .cu file per product policy instantiates it.
#pragma once

#include "dispatch.cuh"
#include "fwd_sm80.cuh"

namespace swinkernels::cuda {

template <class Product>
cudaError_t launch_forward(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  ForwardArguments args = {};
  static_cast<WindowArguments<4>&>(args) = WindowArguments<4>::of(params);
  args.maps[3] = MapAddress::of(params.out, args.element_bytes());
  args.lse = params.lse;
  if (args.num_windows == 0) return cudaSuccess;
  return dispatch<Product>(params, [&](auto traits, auto is_long) {
    using Traits = decltype(traits);
    int64_t resident;
    if constexpr (decltype(is_long)::value) {
      const uint32_t row_blocks = (args.num_tokens + Traits::kBlock - 1) / Traits::kBlock;
      const size_t smem_bytes = ForwardLongSmem<Traits>::bytes(row_blocks);
      const auto kernel = window_attention_fwd_long_kernel<Traits>;
      const cudaError_t status = resident_blocks(kernel, Traits::kThreads, smem_bytes, &resident);
      if (status != cudaSuccess) return status;
      const int64_t items = static_cast<int64_t>(args.items) * row_blocks;
      if (items >= INT32_MAX) return cudaErrorInvalidValue;
      const GridPlan plan = plan_grid(items, args.units(), resident);
      return launch(kernel, dim3(plan.blocks), dim3(Traits::kThreads), smem_bytes, stream, args, row_blocks,
                    static_cast<uint32_t>(items));
    } else {
      constexpr size_t kSmemBytes = sizeof(ForwardShortSmem<Traits>);
      const auto kernel = window_attention_fwd_short_kernel<Traits>;
      const cudaError_t status = resident_blocks(kernel, Traits::kThreads, kSmemBytes, &resident);
      if (status != cudaSuccess) return status;
      const GridPlan plan = plan_grid(args.items, args.units(), resident);
      return launch(kernel, dim3(plan.blocks), dim3(Traits::kThreads), kSmemBytes, stream, args);
    }
  });
}

}  // namespace swinkernels::cuda
