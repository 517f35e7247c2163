// Launches the forward kernel. One .cu file per op and source of rows instantiates this template.
#pragma once

#include "dispatch.cuh"
#include "fwd_sm80.cuh"

namespace swinkernels::cuda {

template <LayerNormOp kOp, class Source>
cudaError_t launch_forward(const LayerNormForwardParams& params, cudaStream_t stream) {
  return dispatch<kOp, Source>(
      params.rows, params.in_dtype, params.out_dtype, false, [&](auto traits, RowThreads threads) {
        using Traits = decltype(traits);
        ForwardArguments<Source> args = {};
        if (!fill(params, threads, Traits::kVec, &args)) return cudaErrorInvalidValue;
        args.bias = {params.bias, params.bias_dtype, 0.0f};
        args.eps = params.eps;
        args.x = params.x;
        args.y = params.y;
        args.s = params.s;
        args.z = params.z;
        args.mean = params.mean;
        args.rstd = params.rstd;

        const auto kernel = layer_norm_fwd_kernel<Traits>;
        const size_t smem_bytes = ForwardSmem::bytes(SharedParameter<Traits::kVec>::bytes(threads.block_vectors));
        int64_t blocks;
        const cudaError_t status = plan_blocks(kernel, threads, smem_bytes, params.rows.count, &blocks);
        if (status != cudaSuccess) return status;
        return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads.block), smem_bytes, stream, args);
      });
}

}  // namespace swinkernels::cuda
