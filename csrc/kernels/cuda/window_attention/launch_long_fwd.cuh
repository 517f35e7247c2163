// The forward launch for plain long windows (long_windows.cuh); two .cu files per dtype instantiate it.
#pragma once

#include "fwd_long_sm80.cuh"
#include "launch_fwd.cuh"

namespace swinkernels::cuda {

template <class Traits, bool kHasAxes>
auto plain_long_forward_kernel(const ForwardArguments& args) {
  if constexpr (kHasAxes) {
    return window_attention_fwd_plain_long_kernel<Traits, AxisBias<Traits>, false>;
  } else {
    // v2 without a bias reads a table of zeros.
    return args.logit_scale != nullptr  ? window_attention_fwd_plain_long_kernel<Traits, RowBias, true>
           : args.dense_bias != nullptr ? window_attention_fwd_plain_long_kernel<Traits, DenseRowBias<true>, false>
           : args.bias_table != nullptr ? window_attention_fwd_plain_long_kernel<Traits, RowBias, false>
                                        : window_attention_fwd_plain_long_kernel<Traits, NoRowBias, false>;
  }
}

template <class Traits, bool kHasAxes>
cudaError_t launch_plain_long_forward(const ForwardArguments& args, const float* axis_tables, cudaStream_t stream,
                                      bool& taken) {
  using Smem = PlainForwardLongSmem<Traits, kHasAxes>;
  ForwardLongArguments plain = {};
  static_cast<WindowArguments<4>&>(plain) = args;
  plain.lse = args.lse;
  plain.axis_tables = axis_tables;
  taken = false;
  if (!make_long(plain)) return cudaSuccess;
  if (kHasAxes) plain.table = {};  // no bias table
  const auto kernel = plain_long_forward_kernel<Traits, kHasAxes>(args);
  const size_t smem_bytes = Smem::bytes(plain);
  int shared_bytes;
  cudaError_t status = shared_bytes_of_block(&shared_bytes);
  if (status != cudaSuccess) return status;
  if (smem_bytes > static_cast<size_t>(shared_bytes)) return cudaSuccess;
  taken = true;
  int64_t resident;
  status = resident_blocks(kernel, Smem::kThreads, smem_bytes, &resident);
  if (status != cudaSuccess) return status;
  // If there are enough windows, one block processes all blocks of queries of a window and finds its tokens once.
  const uint32_t blocks = (args.num_tokens + Smem::kBlock - 1) / Smem::kBlock;
  plain.row_blocks = int64_t{args.items} * args.units() >= resident ? blocks : 1;
  plain.splits = (blocks + plain.row_blocks - 1) / plain.row_blocks;
  const int64_t items = int64_t{args.items} * plain.splits;
  if (items >= INT32_MAX) return cudaErrorInvalidValue;
  plain.long_items = static_cast<uint32_t>(items);
  const GridPlan plan = plan_grid(items, args.units(), resident);
  return launch(kernel, dim3(plan.blocks), dim3(Smem::kThreads), smem_bytes, stream, plain);
}

}  // namespace swinkernels::cuda
