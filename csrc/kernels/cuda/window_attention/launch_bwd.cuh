// The backward launches and their workspace; one .cu file per product policy instantiates them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bwd_bias_sm80.cuh"
#include "bwd_short16_sm80.cuh"
#include "bwd_sm80.cuh"
#include "dispatch.cuh"
#include "reduce_partials.cuh"
#include "workspace.cuh"

namespace swinkernels::cuda {

// True for tiles for which the TF32 backward pass would spill registers. Calls with these tiles use the float kernels,
// which are at least as accurate.
template <class Traits, bool kLong>
constexpr bool kBackwardInFloat = std::is_same_v<typename Traits::Product, Tf32Product> &&
                                  (Traits::kHeadDim > 64 || (kLong && Traits::kHeadDim > 16));

// Launches one of the two kernels for short windows.
template <class Traits, class Arguments>
cudaError_t launch_short_backward(void (*kernel)(Arguments), size_t smem_bytes, Arguments& args,
                                  ReducePartialsArguments& reduction, WorkspaceArena& arena, bool measure,
                                  cudaStream_t stream) {
  int64_t resident;
  const cudaError_t status = resident_blocks(kernel, Traits::kThreads, smem_bytes, &resident);
  if (status != cudaSuccess) return status;
  const GridPlan plan = plan_grid(args.items, args.units(), resident);
  reduction.workers = reduction.dense_workers = plan.workers;
  reduction.dense_rows = Traits::kBlock;
  // The gradient of a table with table_pairs is gathered after the blocks' sums have been added.
  const bool wants_table = reduction.dbias_table != nullptr, has_pairs = args.layout.has_table_pairs;
  if (reduction.dbias != nullptr || (wants_table && has_pairs)) {
    args.dense_partials = arena.take(plan.blocks * Traits::kBlock * Traits::kBlock);
  }
  if (wants_table && !has_pairs) args.table_partials = arena.take(plan.blocks * args.layout.table_entries);
  if (reduction.dpad_qkv != nullptr) args.pad_partials = arena.take(plan.blocks * 2 * args.head_dim);
  if (reduction.dlogit_scale != nullptr) args.logit_partials = arena.take(plan.blocks);
  if (measure) return cudaSuccess;
  return launch(kernel, dim3(plan.blocks), dim3(Traits::kThreads), smem_bytes, stream, args);
}

template <class Traits>
cudaError_t launch_long_backward(BackwardArguments& args, ReducePartialsArguments& reduction, WorkspaceArena& arena,
                                 bool measure, cudaStream_t stream) {
  const int32_t blocks = (args.num_tokens + Traits::kBlock - 1) / Traits::kBlock;
  const size_t smem_bytes = BackwardLongSmem<Traits>::bytes(args.layout, blocks);
  const auto kernel = window_attention_bwd_long_kernel<Traits>;
  int64_t resident;
  cudaError_t status = resident_blocks(kernel, Traits::kThreads, smem_bytes, &resident);
  if (status != cudaSuccess) return status;
  const GridPlan plan = plan_grid(args.items, args.units(), resident);
  reduction.workers = plan.workers;

  constexpr size_t kBiasSmemBytes = sizeof(BackwardBiasSmem<Traits>);
  const auto bias_kernel = window_attention_bwd_bias_kernel<Traits>;
  const bool needs_bias = reduction.dbias != nullptr || reduction.dbias_table != nullptr;
  GridPlan bias_plan = {};
  if (needs_bias) {
    status = resident_blocks(bias_kernel, Traits::kThreads, kBiasSmemBytes, &resident);
    if (status != cudaSuccess) return status;
    const int64_t rows = int64_t{blocks} * Traits::kBlock, pairs = int64_t{blocks} * blocks;
    const int64_t most = kMostDenseBytes / static_cast<int64_t>(rows * rows * sizeof(float)) * pairs;
    bias_plan = plan_grid(args.items, args.units() * pairs, std::min(resident, most));
    reduction.dense_workers = bias_plan.workers;
    reduction.dense_rows = static_cast<int32_t>(rows);
    args.dense_partials = arena.take(bias_plan.workers * args.units() * rows * rows);
    args.lse2_delta =
        reinterpret_cast<float2*>(arena.take(2 * int64_t{args.num_windows} * args.num_heads * args.num_tokens));
  }
  if (reduction.dpad_qkv != nullptr) args.pad_partials = arena.take(plan.blocks * 2 * args.head_dim);
  if (reduction.dlogit_scale != nullptr) args.logit_partials = arena.take(plan.blocks);
  if (measure) return cudaSuccess;
  status = launch(kernel, dim3(plan.blocks), dim3(Traits::kThreads), smem_bytes, stream, args, blocks);
  if (status != cudaSuccess || !needs_bias) return status;
  return launch(bias_kernel, dim3(bias_plan.blocks), dim3(Traits::kThreads), kBiasSmemBytes, stream, args, blocks);
}

// Launches the plain kernels if they support the call and the device has enough shared memory, and sets `taken` to
// whether this is the case. They process windows of more than one block of keys or, with axis_tables, of any length.
// axis_tables is null unless kHasAxes. Defined in launch_long_bwd.cuh, and instantiated by the files bwd_long_*.cu and
// bwd_axis_*.cu of instantiations/.
template <class Traits, bool kHasAxes = false>
cudaError_t launch_plain_long_backward(BackwardArguments& args, const float* axis_tables,
                                       ReducePartialsArguments& reduction, WorkspaceArena& arena, bool measure,
                                       cudaStream_t stream, bool& taken);

// Compiled in bwd_float.cu only, though other policies call it.
extern template cudaError_t launch_backward<FloatProduct>(const WindowAttentionBackwardParams&, cudaStream_t, int64_t*);

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

  ReducePartialsArguments reduction = {};
  reduction.dbias_table = params.dbias_table;
  reduction.dbias = params.dbias;
  reduction.dpad_qkv = params.dpad_qkv;
  reduction.dlogit_scale = params.dlogit_scale;
  reduction.daxis_tables = params.daxis_tables;
  for (const int32_t rows : forward.axis_rows) reduction.axis_entries += rows * args.head_dim;
  reduction.layout = args.layout;
  reduction.num_heads = args.num_heads;
  reduction.head_dim = args.head_dim;
  reduction.num_tokens = args.num_tokens;
  reduction.bias_types = args.bias_types;
  const bool measure = bytes != nullptr;
  if (args.num_windows == 0) {
    if (!measure) return reduce_partials(reduction, stream);
    *bytes = 0;
    return cudaSuccess;
  }

  WorkspaceArena arena{measure ? nullptr : static_cast<float*>(params.workspace)};
  bool in_float = false;
  const auto launch_any = [&](auto traits, auto is_long) {
    using Traits = decltype(traits);
    constexpr bool kLong = decltype(is_long)::value;
    if constexpr (kBackwardInFloat<Traits, kLong>) {
      in_float = true;
      return launch_backward<FloatProduct>(params, stream, bytes);
    } else if constexpr (kLong) {
      if constexpr (kHasPlainLong<Traits>) {
        bool taken = false;
        if (is_plain(forward, sizeof(typename Traits::T))) {
          const cudaError_t status =
              launch_plain_long_backward<Traits>(args, nullptr, reduction, arena, measure, stream, taken);
          if (taken || status != cudaSuccess) return status;
        }
      }
      return launch_long_backward<Traits>(args, reduction, arena, measure, stream);
    } else {
      return launch_short_backward<Traits>(window_attention_bwd_short_kernel<Traits>, sizeof(BackwardShortSmem<Traits>),
                                           args, reduction, arena, measure, stream);
    }
  };
  cudaError_t status;
  Short16BackwardArguments short16 = {args};
  if (forward.axis_tables != nullptr) {
    status = cudaErrorInvalidValue;
    if constexpr (sizeof(typename Product::T) == 2) {
      bool taken = false;
      const cudaError_t launched = launch_plain_long_backward<WindowAttentionTraits<Product, 64, 8>, true>(
          args, forward.axis_tables, reduction, arena, measure, stream, taken);
      if (taken || launched != cudaSuccess) status = launched;
    }
  } else if (is_short16(forward) && short16.set(params)) {
    status = dispatch_short16<Product>(forward, [&](auto traits) {
      using Traits = decltype(traits);
      return launch_short_backward<Traits>(window_attention_bwd_short16_kernel<Traits>,
                                           sizeof(Short16BackwardSmem<Traits>), short16, reduction, arena, measure,
                                           stream);
    });
    args = short16;  // has the pointers to the partial sums
  } else {
    status = dispatch<Product>(forward, launch_any);
  }
  if (status != cudaSuccess || in_float) return status;
  if (measure) {
    *bytes = arena.count * static_cast<int64_t>(sizeof(float));
    return cudaSuccess;
  }
  reduction.table_partials = args.table_partials;
  reduction.dense_partials = args.dense_partials;
  reduction.pad_partials = args.pad_partials;
  reduction.logit_partials = args.logit_partials;
  if (reduction.table_workers == 0) reduction.table_workers = reduction.workers;
  if (reduction.logit_workers == 0) reduction.logit_workers = reduction.workers;
  return reduce_partials(reduction, stream);
}

}  // namespace swinkernels::cuda
