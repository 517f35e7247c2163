// Sums the partial dweight and dbias of all blocks, in an order that depends only on the number of blocks.
//
// Tiling    Each block sums 32 columns. The partials of a column are divided into 32 slices, which are summed in
//           parallel; the sums are then added in order. The partials are read from L2, whose latency determines the
//           time, so there are many slices to keep the number of successive reads low.
// Traffic   every partial is read once: 8 * blocks * length bytes.
#include "reduce_partials.cuh"

#include "../../common/launch.cuh"
#include "../../common/ordered_sum.cuh"

namespace swinkernels::cuda {
namespace {

constexpr int kOutputs = 32;
constexpr int kSlices = 32;

__global__ void __launch_bounds__(kOutputs* kSlices) reduce_columns_kernel(const ColumnSums sums) {
  const uint32_t output = blockIdx.x * kOutputs + threadIdx.x % kOutputs;
  float* destination = nullptr;
  if (output < sums.length) {
    destination = sums.dweight == nullptr ? nullptr : sums.dweight + output;
  } else if (output < 2 * sums.length) {
    destination = sums.dbias == nullptr ? nullptr : sums.dbias + (output - sums.length);
  }
  const float* partials = destination == nullptr ? nullptr : sums.partials + output;
  const float sum = ordered_sum<kOutputs, kSlices>(partials, int64_t{2} * sums.length, sums.blocks);
  if (threadIdx.x < kOutputs && destination != nullptr) *destination = sum;
}

}  // namespace

cudaError_t reduce_partials(const ColumnSums& sums, cudaStream_t stream) {
  const unsigned blocks = (2 * sums.length + kOutputs - 1) / kOutputs;
  return launch(reduce_columns_kernel, dim3(blocks), dim3(kOutputs * kSlices), 0, stream, sums);
}

}  // namespace swinkernels::cuda
