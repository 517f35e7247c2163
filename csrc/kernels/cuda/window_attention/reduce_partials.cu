// Sums the partial gradients of all blocks, in an order that depends only on the number of blocks.
//
// Tiling    To sum over the backward kernels' blocks, a thread block computes 32 outputs; eight slices of the partial
//           sums are summed in parallel, then added in order. To gather a table's gradient from dense sums, a warp
//           computes one entry of one unit, and its lanes divide the pairs of tokens among themselves.
// Traffic   every partial is read once: 4 * partials * (table entries, or rows^2, + 2 * head_dim + 1) bytes.
#include "../../common/launch.cuh"
#include "../../common/ordered_sum.cuh"
#include "reduce_partials.cuh"

namespace swinkernels::cuda {
namespace {

constexpr int kOutputs = 32;
constexpr int kSlices = 8;
constexpr int kThreads = kOutputs * kSlices;

// An output: the location of its partial sums, and its destination.
struct Output {
  const float* partials;
  int64_t stride;
  uint32_t count;
  float* destination;
};

// The number of outputs of reduce_partials_kernel for each gradient, in order.
struct OutputCounts {
  int64_t table, dense, pad, logit, axis;

  __host__ __device__ static OutputCounts of(const ReducePartialsArguments& args) {
    const int64_t heads = args.num_heads, units = heads * args.bias_types;
    const int64_t pairs = int64_t{args.num_tokens} * args.num_tokens;
    const bool has_table = args.dbias_table != nullptr && args.dense_partials == nullptr;
    return {has_table ? units * args.layout.table_entries : 0, args.dbias == nullptr ? 0 : units * pairs,
            args.dpad_qkv == nullptr ? 0 : 3 * heads * args.head_dim, args.dlogit_scale == nullptr ? 0 : heads,
            args.daxis_tables == nullptr ? 0 : args.axis_entries};
  }
  __host__ __device__ int64_t all() const { return table + dense + pad + logit + axis; }
};

__device__ Output find_output(const ReducePartialsArguments& args, int64_t output) {
  const OutputCounts counts = OutputCounts::of(args);
  const int64_t heads = args.num_heads, units = heads * args.bias_types;
  // The partial sums of a head come from all workers of its units: they are every heads-th partial sum.
  const uint32_t of_head = args.workers * args.bias_types;
  if (output < counts.table) {
    const int64_t entries = args.layout.table_entries, unit = output / entries, entry = output % entries;
    return {args.table_partials + output, units * entries, args.table_workers, args.dbias_table + entry * units + unit};
  }
  output -= counts.table;
  if (output < counts.dense) {
    const int64_t pairs = int64_t{args.num_tokens} * args.num_tokens, unit = output / pairs, pair = output % pairs;
    const int64_t rows = args.dense_rows, at = pair / args.num_tokens * rows + pair % args.num_tokens;
    return {args.dense_partials + unit * rows * rows + at, units * rows * rows, args.dense_workers,
            args.dbias + output};
  }
  output -= counts.dense;
  if (output < counts.pad) {
    const int64_t per_map = heads * args.head_dim, map = output / per_map, head = output % per_map / args.head_dim;
    float* const destination = args.dpad_qkv + output;
    if (map == 0) return {nullptr, 0, 0, destination};  // zero, because the output of a pad query is discarded
    return {args.pad_partials + (head * 2 + map - 1) * args.head_dim + output % args.head_dim, 2 * per_map, of_head,
            destination};
  }
  output -= counts.pad;
  if (output < counts.logit) {
    return {args.logit_partials + output, heads, args.logit_workers * args.bias_types, args.dlogit_scale + output};
  }
  output -= counts.logit;
  if (output < counts.axis) {
    return {args.axis_partials + output, counts.axis, args.axis_workers, args.daxis_tables + output};
  }
  return {};
}

__global__ void __launch_bounds__(kThreads) reduce_partials_kernel(const ReducePartialsArguments args) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kOutputs + threadIdx.x % kOutputs;
  const Output output = find_output(args, number);
  const float sum = ordered_sum<kOutputs, kSlices>(output.partials, output.stride, output.count);
  if (threadIdx.x < kOutputs && output.destination != nullptr) *output.destination = sum;
}

// Gathers the gradient of a table from dense sums. An entry of a unit's column is the sum over the pairs of tokens
// (i, j) that use it; the entry and i determine j.
__global__ void __launch_bounds__(kThreads) gather_table_kernel(const ReducePartialsArguments args) {
  const int lane = threadIdx.x % 32;
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const WindowLayout& layout = args.layout;
  const int units = args.num_heads * args.bias_types;
  if (number >= static_cast<int64_t>(layout.table_entries) * units) return;
  const int entry = static_cast<int>(number / units), unit = static_cast<int>(number % units);
  const int64_t rows = args.dense_rows;
  const float* const partials = args.dense_partials + unit * rows * rows;
  const int distance = layout.token_distance<true>(entry);
  const int end = min(args.num_tokens, args.num_tokens + distance);
  float sum = 0.0f;
  for (int i = max(0, distance) + lane; i < end; i += 32) {
    const int j = i - distance;
    if (layout.query_index(i) - layout.key_index(j) != entry - layout.table_middle) continue;
    for (uint32_t worker = 0; worker < args.dense_workers; ++worker) {
      sum += partials[worker * units * rows * rows + i * rows + j];
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (lane == 0) args.dbias_table[number] = sum;
}

unsigned blocks_of(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace

cudaError_t reduce_partials(const ReducePartialsArguments& args, cudaStream_t stream) {
  const int64_t outputs = OutputCounts::of(args).all();
  if (outputs > 0) {
    const unsigned blocks = blocks_of(outputs, kOutputs);
    const cudaError_t status = launch(reduce_partials_kernel, dim3(blocks), dim3(kThreads), 0, stream, args);
    if (status != cudaSuccess) return status;
  }
  if (args.dbias_table == nullptr || args.dense_partials == nullptr) return cudaSuccess;
  const int64_t entries = static_cast<int64_t>(args.layout.table_entries) * args.num_heads * args.bias_types;
  return launch(gather_table_kernel, dim3(blocks_of(entries, kThreads / 32)), dim3(kThreads), 0, stream, args);
}

}  // namespace swinkernels::cuda
