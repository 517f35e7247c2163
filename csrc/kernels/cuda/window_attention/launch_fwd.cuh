// The forward launch; one .cu file per product policy instantiates it.
#pragma once

#include "dispatch.cuh"
#include "fwd_long_sm80.cuh"
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

// Launches a plain kernel for long windows if the device has enough shared memory; sets `taken` accordingly.
template <class Traits, class RowBiasKind>
cudaError_t launch_plain_long_forward(ForwardLongArguments& plain, cudaStream_t stream, bool& taken) {
  using Smem = PlainForwardLongSmem<Traits>;
  const auto kernel = window_attention_fwd_plain_long_kernel<Traits, RowBiasKind>;
  const size_t smem_bytes = Smem::template bytes<RowBiasKind>(plain);
  int shared_bytes;
  cudaError_t status = shared_bytes_of_block(&shared_bytes);
  if (status != cudaSuccess) return status;
  if (smem_bytes > static_cast<size_t>(shared_bytes)) return cudaSuccess;
  taken = true;
  int64_t resident;
  status = resident_blocks(kernel, Smem::kThreads, smem_bytes, &resident);
  if (status != cudaSuccess) return status;
  // If there are enough windows, one block processes all blocks of queries of a window and finds its tokens once.
  const uint32_t blocks = (plain.num_tokens + Smem::kBlock - 1) / Smem::kBlock;
  plain.row_blocks = int64_t{plain.items} * plain.units() >= resident ? blocks : 1;
  plain.splits = (blocks + plain.row_blocks - 1) / plain.row_blocks;
  const int64_t items = int64_t{plain.items} * plain.splits;
  if (items >= INT32_MAX) return cudaErrorInvalidValue;
  plain.long_items = static_cast<uint32_t>(items);
  const GridPlan plan = plan_grid(items, plain.units(), resident);
  return launch(kernel, dim3(plan.blocks), dim3(Smem::kThreads), smem_bytes, stream, plain);
}

// Launches the plain kernel for windows of more than one block of keys, if it supports the call and the device has
// enough shared memory; sets `taken` accordingly.
template <class Traits>
cudaError_t launch_plain_long_forward(const ForwardArguments& args, cudaStream_t stream, bool& taken) {
  ForwardLongArguments plain = {};
  static_cast<WindowArguments<4>&>(plain) = args;
  plain.lse = args.lse;
  taken = false;
  if (!make_long(plain)) return cudaSuccess;
  return args.bias_table == nullptr ? launch_plain_long_forward<Traits, NoRowBias>(plain, stream, taken)
                                    : launch_plain_long_forward<Traits, RowBias>(plain, stream, taken);
}

// Launches the kernel for axis_tables.
template <class Product>
cudaError_t launch_axis_forward(const ForwardArguments& args, const float* axis_tables, cudaStream_t stream) {
  if constexpr (sizeof(typename Product::T) == 2) {
    using Traits = WindowAttentionTraits<Product, 64, 8>;
    ForwardLongArguments plain = {};
    static_cast<WindowArguments<4>&>(plain) = args;
    plain.lse = args.lse;
    plain.axis_tables = axis_tables;
    if (!make_long(plain)) return cudaErrorInvalidValue;
    plain.table = {};  // no bias table
    bool taken = false;
    const cudaError_t status = launch_plain_long_forward<Traits, AxisBias<Traits>>(plain, stream, taken);
    return taken ? status : cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

template <class Product>
cudaError_t launch_forward(const WindowAttentionForwardParams& params, cudaStream_t stream) {
  ForwardArguments args = {};
  static_cast<WindowArguments<4>&>(args) = WindowArguments<4>::of(params);
  args.maps[3] = MapAddress::of(params.out, args.element_bytes());
  args.lse = params.lse;
  if (args.num_windows == 0) return cudaSuccess;
  if (params.axis_tables != nullptr) return launch_axis_forward<Product>(args, params.axis_tables, stream);
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
          const cudaError_t status = launch_plain_long_forward<Traits>(args, stream, taken);
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
