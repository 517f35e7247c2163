// The backward launches for plain long windows (long_windows.cuh); two .cu files per dtype instantiate them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bwd_long_sm80.cuh"
#include "launch_bwd.cuh"

namespace swinkernels::cuda {

// The launches of the kernels that only calls with axis_tables need.
template <class Traits>
struct AxisLaunches {
  using First = AxisProductsSmem<Traits>;
  using Last = AxisSumsSmem<Traits>;
  GridPlan first_plan, last_plan;

  static auto first_kernel() { return window_attention_bwd_axis_products_kernel<Traits, BackwardLongArguments>; }
  static auto last_kernel() { return window_attention_bwd_axis_tables_kernel<Traits, BackwardLongArguments>; }

  // Plans the grids and allocates the buffers. The sizes of A and dR are multiples of 16 bytes, because the kernels
  // copy their rows in chunks of 16 bytes.
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

struct BackwardLongKernels {
  void (*queries)(BackwardLongArguments);
  void (*keys)(BackwardLongArguments);
};

template <class Traits, bool kHasAxes>
BackwardLongKernels plain_long_backward_kernels(const BackwardArguments& args) {
  if constexpr (kHasAxes) {
    return {window_attention_bwd_queries_kernel<Traits, false, true>,
            window_attention_bwd_keys_kernel<Traits, AxisBias<Traits>, false>};
  } else {
    if (args.logit_scale != nullptr) {  // without a bias, v2 reads a table of zeros
      return {window_attention_bwd_queries_kernel<Traits, true, false>,
              window_attention_bwd_keys_kernel<Traits, RowBias, true>};
    }
    const auto keys = args.dense_bias != nullptr ? window_attention_bwd_keys_kernel<Traits, DenseRowBias<false>, false>
                      : args.bias_table != nullptr ? window_attention_bwd_keys_kernel<Traits, RowBias, false>
                                                   : window_attention_bwd_keys_kernel<Traits, NoRowBias, false>;
    return {window_attention_bwd_queries_kernel<Traits, false, false>, keys};
  }
}

template <class Traits, bool kHasAxes>
cudaError_t launch_plain_long_backward(BackwardArguments& args, const float* axis_tables,
                                       ReducePartialsArguments& reduction, WorkspaceArena& arena, bool measure,
                                       cudaStream_t stream, bool& taken) {
  using StripSmem = QueryStripSmem<Traits, kHasAxes>;
  using BlockSmem = KeyBlockSmem<Traits, kHasAxes>;
  BackwardLongArguments plain = {};
  static_cast<WindowArguments<7>&>(plain) = args;
  taken = false;
  const int most_warps = args.logit_scale != nullptr ? kMostQueryWarps<Traits, true> : kMostQueryWarps<Traits, false>;
  const int32_t row_tiles = (args.num_tokens + 15) / 16;
  plain.key_groups = (row_tiles + kMostSteps - 1) / kMostSteps;
  if (kHasAxes && row_tiles < 3) plain.key_groups = 3;  // a block needs three warps to find its tokens
  if (!make_long(plain)) return cudaSuccess;
  if (kHasAxes) plain.table = {};  // no bias table
  int shared_bytes;
  cudaError_t status = shared_bytes_of_block(&shared_bytes);
  if (status != cudaSuccess) return status;
  // Use as many rows of warps as shared memory allows, distributed evenly over the strips.
  for (plain.row_tiles = std::min(row_tiles, most_warps / plain.key_groups);
       plain.row_tiles > 0 && StripSmem::bytes(plain) > shared_bytes; --plain.row_tiles) {
  }
  if (plain.row_tiles == 0 || BlockSmem::bytes(plain) > shared_bytes) return cudaSuccess;
  taken = true;
  const int32_t most_rows = plain.row_tiles, rows_of_three_warps = (3 + plain.key_groups - 1) / plain.key_groups;
  plain.strips = (row_tiles + most_rows - 1) / most_rows;
  plain.row_tiles = (row_tiles + plain.strips - 1) / plain.strips;
  // A block needs three warps to find its tokens.
  plain.row_tiles = std::max(plain.row_tiles, std::min(most_rows, rows_of_three_warps));

  const size_t strip_bytes = StripSmem::bytes(plain), block_bytes = BlockSmem::bytes(plain);
  const auto [query_kernel, key_kernel] = plain_long_backward_kernels<Traits, kHasAxes>(args);
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
  int64_t most_blocks = query_blocks;
  const int64_t pairs = int64_t{args.num_tokens} * args.num_tokens;
  if (reduction.dbias != nullptr) {  // each worker of a unit has N * N sums
    const int64_t most_matrices = kMostDenseBytes / static_cast<int64_t>(pairs * sizeof(float));
    most_blocks = std::min(most_blocks, most_matrices * plain.strip_workers);
  }
  const GridPlan query_plan = plan_grid(args.items, args.units() * plain.strip_workers, most_blocks);
  plain.window_workers = reduction.dense_workers = query_plan.workers;
  reduction.dense_rows = args.num_tokens;
  reduction.table_workers = reduction.logit_workers = query_plan.workers * plain.strip_workers;

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
  if (reduction.dbias != nullptr) plain.dense_partials = arena.take(plain.window_workers * args.units() * pairs);
  if (reduction.dlogit_scale != nullptr) plain.logit_partials = arena.take(query_plan.blocks);
  if (reduction.dpad_qkv != nullptr) plain.pad_partials = arena.take(int64_t{key_plan.blocks} * 2 * args.head_dim);
  if (measure) return cudaSuccess;
  args.table_partials = plain.table_partials;
  args.dense_partials = plain.dense_partials;
  args.logit_partials = plain.logit_partials;
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

}  // namespace swinkernels::cuda
