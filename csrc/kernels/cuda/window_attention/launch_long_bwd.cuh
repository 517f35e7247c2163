// The backward launches for plain long windows (long_windows.cuh); one .cu file per dtype instantiates them.
#pragma once

#include <algorithm>

#include "bwd_long_sm80.cuh"
#include "launch_bwd.cuh"

namespace swinkernels::cuda {

template <class Traits>
cudaError_t launch_plain_long_backward(BackwardArguments& args, ReducePartialsArguments& reduction,
                                       WorkspaceArena& arena, bool measure, cudaStream_t stream, bool& taken) {
  using StripSmem = QueryStripSmem<Traits>;
  using BlockSmem = KeyBlockSmem<Traits>;
  BackwardLongArguments plain = {};
  static_cast<WindowArguments<7>&>(plain) = args;
  taken = false;
  const bool is_cosine = args.logit_scale != nullptr;
  const int most_warps = is_cosine ? kMostQueryWarps<Traits, true> : kMostQueryWarps<Traits, false>;
  const int32_t row_tiles = (args.num_tokens + 15) / 16;
  plain.key_groups = (row_tiles + kMostSteps - 1) / kMostSteps;
  if (!make_long(plain)) return cudaSuccess;
  int shared_bytes;
  cudaError_t status = shared_bytes_of_block(&shared_bytes);
  if (status != cudaSuccess) return status;
  // Use as many rows of warps as shared memory allows, distributed evenly over the strips.
  for (plain.row_tiles = std::min(row_tiles, most_warps / plain.key_groups);
       plain.row_tiles > 0 && StripSmem::bytes(plain) > shared_bytes; --plain.row_tiles) {
  }
  if (plain.row_tiles == 0 || BlockSmem::bytes(plain) > shared_bytes) return cudaSuccess;
  taken = true;
  plain.strips = (row_tiles + plain.row_tiles - 1) / plain.row_tiles;
  plain.row_tiles = (row_tiles + plain.strips - 1) / plain.strips;

  const size_t strip_bytes = StripSmem::bytes(plain), block_bytes = BlockSmem::bytes(plain);
  const auto query_kernel = is_cosine ? window_attention_bwd_queries_kernel<Traits, true>
                                      : window_attention_bwd_queries_kernel<Traits, false>;
  // v2 without a bias reads a table of zeros.
  const auto key_kernel = is_cosine ? window_attention_bwd_keys_kernel<Traits, RowBias, true>
                          : args.dense_bias != nullptr
                              ? window_attention_bwd_keys_kernel<Traits, DenseRowBias<false>, false>
                          : args.bias_table != nullptr ? window_attention_bwd_keys_kernel<Traits, RowBias, false>
                                                       : window_attention_bwd_keys_kernel<Traits, NoRowBias, false>;
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
  status = launch(query_kernel, dim3(query_plan.blocks), dim3(query_threads), strip_bytes, stream, plain);
  if (status != cudaSuccess) return status;
  return launch(key_kernel, dim3(key_plan.blocks), dim3(BlockSmem::kThreads), block_bytes, stream, plain);
}

}  // namespace swinkernels::cuda
