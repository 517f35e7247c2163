// The backward launches and their workspace; one .cu file per product policy instantiates them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bwd_bias_sm80.cuh"
#include "bwd_long_sm80.cuh"
#include "bwd_short16_sm80.cuh"
#include "bwd_sm80.cuh"
#include "dispatch.cuh"
#include "reduce_partials.cuh"

namespace swinkernels::cuda {

// The dbias of a long window takes N * N floats for each worker of a unit. The number of workers is limited to as many
// as fit into this size, but is at least one.
constexpr int64_t kMostDenseBytes = int64_t{64} << 20;

// For these tiles the TF32 backward pass would spill registers, so they use the float kernels, which are at least as
// accurate.
template <class Traits, bool kLong>
constexpr bool kBackwardInFloat = std::is_same_v<typename Traits::Product, Tf32Product> &&
                                  (Traits::kHeadDim > 64 || (kLong && Traits::kHeadDim > 16));

// Hands out a workspace of floats, or counts the floats that are needed.
struct WorkspaceArena {
  float* next;  // null: only counts
  int64_t count = 0;

  float* take(int64_t floats) {
    count += floats;
    if (next == nullptr || floats == 0) return nullptr;
    float* const taken = next;
    next += floats;
    return taken;
  }
};

// Launches either kernel for short windows.
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
  // The gradient of a table of pairs is gathered after the blocks' sums have been added.
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

// The launches of the kernels that only calls with axis_tables have.
template <class Traits>
struct AxisLaunches {
  using First = AxisProductsSmem<Traits>;
  using Last = AxisSumsSmem<Traits>;
  GridPlan first_plan, last_plan;

  static auto first_kernel() { return window_attention_bwd_axis_products_kernel<Traits, BackwardLongArguments>; }
  static auto last_kernel() { return window_attention_bwd_axis_tables_kernel<Traits, BackwardLongArguments>; }

  // Plans the grids and takes memory, in whole multiples of 16 bytes as the kernels copy rows of it.
  cudaError_t prepare(BackwardLongArguments& args, ReducePartialsArguments& reduction, WorkspaceArena& arena,
                      const float* tables) {
    const int64_t heads = int64_t{args.num_windows} * args.num_heads, queries = heads * args.num_tokens;
    int64_t resident;
    cudaError_t status = resident_blocks(first_kernel(), First::kThreads, First::bytes(args), &resident);
    if (status != cudaSuccess) return status;
    first_plan = plan_grid(args.items, args.units(), resident);
    args.axes.tables = tables;
    args.axes.products = reinterpret_cast<uint32_t*>(arena.take(queries * kAxisWords));
    if (reduction.daxis_tables == nullptr) return cudaSuccess;
    status = resident_blocks(last_kernel(), Last::kThreads, Last::bytes(args), &resident);
    if (status != cudaSuccess) return status;
    last_plan = plan_grid(args.items, args.units(), resident);
    args.axes.drows = reinterpret_cast<uint32_t*>(arena.take(queries * (kAxisRows / 2)));
    args.axes.partials = arena.take(int64_t{last_plan.blocks} * axis_rows(args.layout) * args.head_dim);
    if (kHasNarrowRange<typename Traits::T>) {
      args.axes.exponents = reinterpret_cast<int32_t*>(arena.take(heads * args.strips));
    }
    reduction.axis_partials = args.axes.partials;
    reduction.axis_workers = last_plan.blocks;
    return cudaSuccess;
  }

  cudaError_t launch_first(const BackwardLongArguments& args, cudaStream_t stream) const {
    return launch(first_kernel(), dim3(first_plan.blocks), dim3(First::kThreads), First::bytes(args), stream, args);
  }
  cudaError_t launch_last(const BackwardLongArguments& args, cudaStream_t stream) const {
    if (args.axes.partials == nullptr) return cudaSuccess;
    return launch(last_kernel(), dim3(last_plan.blocks), dim3(Last::kThreads), Last::bytes(args), stream, args);
  }
};

// Launches the plain kernels for windows of more than one block of keys, if they support the call and the device has
// enough shared memory; sets `taken` accordingly.
template <class Traits, bool kHasAxes = false>
cudaError_t launch_plain_long_backward(BackwardArguments& args, ReducePartialsArguments& reduction,
                                       WorkspaceArena& arena, bool measure, cudaStream_t stream, bool& taken,
                                       const float* axis_tables = nullptr) {
  using StripSmem = QueryStripSmem<Traits, kHasAxes>;
  using BlockSmem = KeyBlockSmem<Traits, kHasAxes>;
  BackwardLongArguments plain = {};
  static_cast<WindowArguments<7>&>(plain) = args;
  taken = false;
  const int32_t row_tiles = (args.num_tokens + 15) / 16;
  plain.key_groups = (row_tiles + kMostSteps - 1) / kMostSteps;
  if (kHasAxes && row_tiles < 3) plain.key_groups = 3;  // a block needs three warps to find its tokens
  if (!make_long(plain)) return cudaSuccess;
  if (kHasAxes) plain.table = {};  // no bias table
  int shared_bytes;
  cudaError_t status = shared_bytes_of_block(&shared_bytes);
  if (status != cudaSuccess) return status;
  // Use as many rows of warps as shared memory allows, distributed evenly over the strips.
  for (plain.row_tiles = std::min(row_tiles, kMostQueryWarps<Traits> / plain.key_groups);
       plain.row_tiles > 0 && StripSmem::bytes(plain) > shared_bytes; --plain.row_tiles) {
  }
  if (plain.row_tiles == 0 || BlockSmem::bytes(plain) > shared_bytes) return cudaSuccess;
  taken = true;
  plain.strips = (row_tiles + plain.row_tiles - 1) / plain.row_tiles;
  plain.row_tiles = (row_tiles + plain.strips - 1) / plain.strips;

  const size_t strip_bytes = StripSmem::bytes(plain), block_bytes = BlockSmem::bytes(plain);
  const auto query_kernel = window_attention_bwd_queries_kernel<Traits, kHasAxes>;
  void (*key_kernel)(BackwardLongArguments);
  if constexpr (kHasAxes) {
    key_kernel = window_attention_bwd_keys_kernel<Traits, AxisBias<Traits>>;
  } else {
    key_kernel = args.bias_table == nullptr ? window_attention_bwd_keys_kernel<Traits, NoRowBias>
                                            : window_attention_bwd_keys_kernel<Traits, RowBias>;
  }
  const int query_threads = 32 * plain.key_groups * plain.row_tiles;
  int64_t query_blocks, resident;
  status = resident_blocks(query_kernel, query_threads, strip_bytes, &query_blocks);
  if (status != cudaSuccess) return status;
  status = resident_blocks(key_kernel, BlockSmem::kThreads, block_bytes, &resident);
  if (status != cudaSuccess) return status;

  // The strips of a unit are divided among blocks of the query kernel. If there are more blocks than strips, the
  // windows are divided, too.
  const int64_t of_unit = std::max<int64_t>(1, query_blocks / args.units());
  plain.strip_workers = static_cast<uint32_t>(std::min<int64_t>(plain.strips, of_unit));
  const GridPlan query_plan = plan_grid(args.items, args.units() * plain.strip_workers, query_blocks);
  plain.window_workers = query_plan.workers;
  reduction.table_workers = query_plan.workers * plain.strip_workers;

  const uint32_t blocks = (args.num_tokens + BlockSmem::kBlock - 1) / BlockSmem::kBlock;
  plain.key_blocks = int64_t{args.items} * args.units() >= resident ? blocks : 1;
  plain.splits = (blocks + plain.key_blocks - 1) / plain.key_blocks;
  const int64_t items = int64_t{args.items} * plain.splits;
  if (items >= INT32_MAX) return cudaErrorInvalidValue;
  plain.long_items = static_cast<uint32_t>(items);
  const GridPlan key_plan = plan_grid(items, args.units(), resident);
  reduction.workers = key_plan.workers;

  plain.lse = args.lse;
  [[maybe_unused]] std::conditional_t<kHasAxes, AxisLaunches<Traits>, bool> axes = {};
  if constexpr (kHasAxes) {
    status = axes.prepare(plain, reduction, arena, axis_tables);
    if (status != cudaSuccess) return status;
  }
  plain.delta = arena.take(int64_t{args.num_windows} * args.num_heads * args.num_tokens);
  plain.table_partials =
      arena.take(int64_t{query_plan.blocks} * (reduction.dbias_table == nullptr ? 0 : args.layout.table_entries));
  if (reduction.dpad_qkv != nullptr) plain.pad_partials = arena.take(int64_t{key_plan.blocks} * 2 * args.head_dim);
  if (measure) return cudaSuccess;
  args.table_partials = plain.table_partials;
  args.pad_partials = plain.pad_partials;
  if constexpr (kHasAxes) {
    status = axes.launch_first(plain, stream);
    if (status != cudaSuccess) return status;
  }
  status = launch(query_kernel, dim3(query_plan.blocks), dim3(query_threads), strip_bytes, stream, plain);
  if (status != cudaSuccess) return status;
  status = launch(key_kernel, dim3(key_plan.blocks), dim3(BlockSmem::kThreads), block_bytes, stream, plain);
  if constexpr (kHasAxes) {
    if (status == cudaSuccess) status = axes.launch_last(plain, stream);
  }
  return status;
}

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
          const cudaError_t status = launch_plain_long_backward<Traits>(args, reduction, arena, measure, stream, taken);
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
          args, reduction, arena, measure, stream, taken, forward.axis_tables);
      if (taken) status = launched;
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
  return reduce_partials(reduction, stream);
}

}  // namespace swinkernels::cuda
