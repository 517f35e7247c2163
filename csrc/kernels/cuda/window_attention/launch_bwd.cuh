// The backward launch and its workspace; one .cu file per product policy instantiates it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bwd_sm80.cuh"
#include "dispatch.cuh"
#include "reduce_partials.cuh"

namespace swinkernels::cuda {

// A long window's dbias takes N * N floats for every block of the grid; no more blocks than fill this.
constexpr int64_t kMostDenseBytes = int64_t{64} << 20;

// The TF32 backward of these would spill registers; the float kernels, which are at least as exact, take them.
template <class Traits, bool kLong>
constexpr bool kBackwardInFloat = std::is_same_v<typename Traits::Product, Tf32Product> &&
                                  (Traits::kHeadDim > 64 || (kLong && Traits::kHeadDim > 16));

template <class Product>
cudaError_t launch_backward(const WindowAttentionBackwardParams& params, cudaStream_t stream, int64_t* bytes) {
  const WindowAttentionForwardParams& forward = params.forward;
  BackwardArguments args = {};
  static_cast<WindowArguments<7>&>(args) = WindowArguments<7>::of(forward);
  args.maps[3] = MapAddress::of(params.dout, args.element_bytes());
  args.maps[4] = MapAddress::of(params.dq, args.element_bytes());
  args.maps[5] = MapAddress::of(params.dk, args.element_bytes());
  args.maps[6] = MapAddress::of(params.dv, args.element_bytes());
  args.lse = forward.lse;
  args.scale = forward.scale;

  ReducePartialsArguments reduction = {};
  reduction.dbias_table = params.dbias_table;
  reduction.dpad_qkv = params.dpad_qkv;
  reduction.num_heads = args.num_heads;
  reduction.head_dim = args.head_dim;
  reduction.table_entries = args.layout.table_entries;
  if (args.num_windows == 0) {
    if (bytes == nullptr) return reduce_partials(reduction, stream);
    *bytes = 0;
    return cudaSuccess;
  }

  bool in_float = false;
  const cudaError_t status = dispatch<Product>(forward, [&](auto traits, auto is_long) {
    using Traits = decltype(traits);
    constexpr bool kLong = decltype(is_long)::value;
    if constexpr (kBackwardInFloat<Traits, kLong>) {
      in_float = true;
      return backward_float(params, stream, bytes);
    } else {
      constexpr size_t kSmemBytes = kLong ? sizeof(BackwardLongSmem<Traits>) : sizeof(BackwardShortSmem<Traits>);
      void (*kernel)(BackwardArguments);
      if constexpr (kLong) {
        kernel = window_attention_bwd_long_kernel<Traits>;
      } else {
        kernel = window_attention_bwd_short_kernel<Traits>;
      }
      int64_t resident;
      const cudaError_t occupancy_status = resident_blocks(kernel, Traits::kThreads, kSmemBytes, &resident);
      if (occupancy_status != cudaSuccess) return occupancy_status;
      int64_t dense_floats = 0;
      if (kLong && params.dbias_table != nullptr) {
        const int64_t rows = (args.num_tokens + Traits::kBlock - 1) / Traits::kBlock * Traits::kBlock;
        dense_floats = rows * rows;
        resident = std::min(resident, kMostDenseBytes / static_cast<int64_t>(dense_floats * sizeof(float)));
      }
      const GridPlan plan = plan_grid(args.num_windows, args.num_heads, resident);
      reduction.workers = plan.workers;

      // The workspace: dense partials (16-byte rows), then those of the table and of the pad tokens.
      const int64_t table_floats = params.dbias_table == nullptr ? 0 : args.layout.table_entries;
      const int64_t pad_floats = params.dpad_qkv == nullptr ? 0 : 2 * args.head_dim;
      if (bytes != nullptr) {
        *bytes = plan.blocks * (dense_floats + table_floats + pad_floats) * static_cast<int64_t>(sizeof(float));
        return cudaSuccess;
      }
      float* partials = static_cast<float*>(params.workspace);
      if (dense_floats > 0) args.dense_partials = partials;
      partials += plan.blocks * dense_floats;
      if (table_floats > 0) args.table_partials = partials;
      partials += plan.blocks * table_floats;
      if (pad_floats > 0) args.pad_partials = partials;
      return launch(kernel, dim3(plan.blocks), dim3(Traits::kThreads), kSmemBytes, stream, args);
    }
  });
  if (status != cudaSuccess || bytes != nullptr || in_float) return status;
  reduction.table_partials = args.table_partials;
  reduction.pad_partials = args.pad_partials;
  return reduce_partials(reduction, stream);
}

}  // namespace swinkernels::cuda
