// The forward launch; one .cu file per product policy instantiates it.
#pragma once

#include "dispatch.cuh"
#include "fwd_short16_sm80.cuh"
#include "fwd_sm80.cuh"

namespace swinkernels::cuda {

// Launches a kernel whose blocks loop over the windows of a unit.
template <class Arguments>
cudaError_t launch_over_windows(void (*kernel)(Arguments), int threads, size_t smem_bytes, const Arguments& args,
                                cudaStream_t stream) {
  int64_t resident;
  const cudaError_t status = resident_blocks(kernel, threads, smem_bytes, &resident);
  if (status != cudaSuccess) return status;
  const GridPlan plan = plan_grid(args.items, args.units(), resident);
  return launch(kernel, dim3(plan.blocks), dim3(threads), smem_bytes, stream, args);
}

// If the plain kernel supports the call and the device has enough shared memory, launches it and sets `taken` to true;
// otherwise sets `taken` to false. The kernel processes windows of more than one block of keys or, with axis_tables, of
// any length.
// axis_tables is null unless kHasAxes. Defined in launch_long_fwd.cuh, and instantiated by the files fwd_long_*.cu and
// fwd_axis_*.cu of instantiations/.
template <class Traits, bool kHasAxes = false>
cudaError_t launch_plain_long_forward(const ForwardArguments& args, const float* axis_tables, cudaStream_t stream,
                                      bool& taken);

template <class Product>
cudaError_t launch_forward(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  ForwardArguments args = {};
  static_cast<WindowArguments<4>&>(args) = WindowArguments<4>::of(params);
  args.maps[3] = MapAddress::of(params.out, args.element_bytes());
  args.lse = params.lse;
  if (args.num_windows == 0) return cudaSuccess;
  if (params.axis_tables != nullptr) {
    if constexpr (sizeof(typename Product::T) == 2) {
      bool taken = false;
      const cudaError_t status = launch_plain_long_forward<WindowAttentionTraits<Product, 64, 8>, true>(
          args, params.axis_tables, stream, taken);
      if (taken || status != cudaSuccess) return status;
    }
    return cudaErrorInvalidValue;
  }
  Short16ForwardArguments short16 = {args};
  if (is_short16(params) && short16.set(params)) {
    return dispatch_short16<Product>(params, [&](auto traits) {
      using Traits = decltype(traits);
      return launch_over_windows(window_attention_fwd_short16_kernel<Traits>, Traits::kThreads,
                                 sizeof(Short16ForwardSmem<Traits>), short16, stream);
    });
  }
  return dispatch<Product>(params, [&](auto traits, auto is_long) {
    using Traits = decltype(traits);
    if constexpr (decltype(is_long)::value) {
      if constexpr (kHasPlainLong<Traits>) {
        bool taken = false;
        if (is_plain(params, sizeof(typename Traits::T))) {
          const cudaError_t status = launch_plain_long_forward<Traits>(args, nullptr, stream, taken);
          if (taken || status != cudaSuccess) return status;
        }
      }
      const uint32_t row_blocks = (args.num_tokens + Traits::kBlock - 1) / Traits::kBlock;
      const size_t smem_bytes = ForwardLongSmem<Traits>::bytes(args.layout, row_blocks);
      const auto kernel = window_attention_fwd_long_kernel<Traits>;
      int64_t resident;
      const cudaError_t status = resident_blocks(kernel, Traits::kThreads, smem_bytes, &resident);
      if (status != cudaSuccess) return status;
      const int64_t items = static_cast<int64_t>(args.items) * row_blocks;
      if (items >= INT32_MAX) return cudaErrorInvalidValue;
      const GridPlan plan = plan_grid(items, args.units(), resident);
      return launch(kernel, dim3(plan.blocks), dim3(Traits::kThreads), smem_bytes, stream, args, row_blocks,
                    static_cast<uint32_t>(items));
    } else {
      return launch_over_windows(window_attention_fwd_short_kernel<Traits>, Traits::kThreads,
                                 sizeof(ForwardShortSmem<Traits>), args, stream);
    }
  });
}

}  // namespace swinkernels::cuda
