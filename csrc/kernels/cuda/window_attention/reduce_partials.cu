// Sums the partial gradients of all blocks, in an order that depends on their number alone.
//
// Tiling    A block has 32 outputs; eight slices of the workers are summed side by side, then the slices in order.
// Traffic   every partial is read once: 4 * workers * heads * (table entries + 2 * head_dim) bytes.
#include "../../common/launch.cuh"
#include "../../common/ordered_sum.cuh"
#include "reduce_partials.cuh"

namespace swinkernels::cuda {
namespace {

constexpr int kOutputs = 32;
constexpr int kSlices = 8;

__global__ void __launch_bounds__(kOutputs* kSlices) reduce_partials_kernel(const ReducePartialsArguments args) {
  const int in_block = threadIdx.x % kOutputs;
  const int64_t table_outputs =
      args.dbias_table == nullptr ? 0 : static_cast<int64_t>(args.num_heads) * args.table_entries;
  const int64_t per_map = static_cast<int64_t>(args.num_heads) * args.head_dim;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kOutputs + in_block;

  const float* partials = nullptr;
  int64_t stride = 0;
  float* destination = nullptr;
  if (output < table_outputs) {
    partials = args.table_partials + output;
    stride = table_outputs;
    destination = args.dbias_table + output % args.table_entries * args.num_heads + output / args.table_entries;
  } else if (args.dpad_qkv != nullptr && output - table_outputs < 3 * per_map) {
    const int64_t pad = output - table_outputs;
    const int64_t map = pad / per_map, head = pad % per_map / args.head_dim;
    destination = args.dpad_qkv + pad;
    if (map > 0) {  // nothing flows to q: the output of a pad query is dropped
      partials = args.pad_partials + (head * 2 + map - 1) * args.head_dim + pad % args.head_dim;
      stride = 2 * per_map;
    }
  }

  const float sum = ordered_sum<kOutputs, kSlices>(partials, stride, args.workers);
  if (threadIdx.x < kOutputs && destination != nullptr) *destination = sum;
}

}  // namespace

cudaError_t reduce_partials(const ReducePartialsArguments& args, cudaStream_t stream) {
  int64_t outputs = 0;
  if (args.dbias_table != nullptr) outputs += static_cast<int64_t>(args.num_heads) * args.table_entries;
  if (args.dpad_qkv != nullptr) outputs += int64_t{3} * args.num_heads * args.head_dim;
  if (outputs == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((outputs + kOutputs - 1) / kOutputs);
  return launch(reduce_partials_kernel, dim3(blocks), dim3(kOutputs * kSlices), 0, stream, args);
}

}  // namespace swinkernels::cuda
