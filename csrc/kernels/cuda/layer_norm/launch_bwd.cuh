// Launches the backward kernels and computes their workspace size. One .cu file per op and source of rows instantiates
// this template.
#pragma once

#include "bwd_sm80.cuh"
#include "dispatch.cuh"
#include "reduce_partials.cuh"

namespace swinkernels::cuda {

template <LayerNormOp kOp, class Source>
cudaError_t launch_backward(const LayerNormBackwardParams& params, cudaStream_t stream, int64_t* bytes) {
  const bool repeats = MergedRows::has_repeats(params.rows);
  return dispatch<kOp, Source>(
      params.rows, params.in_dtype, params.out_dtype, repeats, [&](auto traits, RowThreads threads) {
        using Traits = decltype(traits);
        BackwardArguments<Source> args = {};
        if (!fill(params, threads, Traits::kVec, &args)) return cudaErrorInvalidValue;
        args.normalised = params.normalised;
        args.dz = params.dz;
        args.ds = params.ds;
        args.mean = params.mean;
        args.rstd = params.rstd;
        args.dx = params.dx;
        args.dy = params.dy;

        const auto kernel = layer_norm_bwd_kernel<Traits>;
        const bool has_partials = params.dweight != nullptr || params.dbias != nullptr;
        const size_t smem_bytes =
            BackwardSmem::bytes(SharedParameter<Traits::kVec>::bytes(threads.block_vectors), has_partials);
        int64_t blocks;
        cudaError_t status = plan_blocks(kernel, threads, smem_bytes, params.rows.count, &blocks);
        if (status != cudaSuccess) return status;
        if (bytes != nullptr) {
          *bytes = has_partials ? blocks * 2 * params.rows.length * static_cast<int64_t>(sizeof(float)) : 0;
          return cudaSuccess;
        }
        if (has_partials) args.partials = static_cast<float*>(params.workspace);
        status = launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads.block), smem_bytes, stream, args);
        if (status != cudaSuccess || !has_partials) return status;
        return reduce_partials(
            {args.partials, params.dweight, params.dbias, args.length, static_cast<uint32_t>(blocks)}, stream);
      });
}

}  // namespace swinkernels::cuda
