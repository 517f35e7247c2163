// Chooses the kernel instantiation for a call, and the number of threads and blocks to launch.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "../../common/resident_blocks.cuh"
#include "rows.cuh"

namespace swinkernels::cuda {

// Instantiated for each op and source of rows in a separate .cu file. If `bytes` is not null, launch_backward only
// stores the size of the workspace there and launches nothing.
template <LayerNormOp kOp, class Source>
cudaError_t launch_forward(const LayerNormForwardParams& params, cudaStream_t stream);
template <LayerNormOp kOp, class Source>
cudaError_t launch_backward(const LayerNormBackwardParams& params, cudaStream_t stream, int64_t* bytes);

template <class In_, class Out_, int kVec_>
struct Elements {
  using In = In_;
  using Out = Out_;
  static constexpr int kVec = kVec_;
};

// Calls f(Elements) with the element types and the vector length for rows that consist of contiguous runs of `run`
// elements in x. Float32, half precision and the pairs of types in autocast have separate kernels. Their vectors have
// 16 bytes of the wider type, so that neighbouring lanes write whole 32-byte sectors of both types. A shared kernel
// supports all other row lengths and pairs of types, and all calls for which `needs_shared` is true.
template <LayerNormOp kOp, class Source, class F>
cudaError_t dispatch_elements(DType in, DType out, int64_t run, bool needs_shared, F&& f) {
  // kNarrows: x is a float32 residual stream, and y and z are in half precision. kWidens: x is the half-precision
  // result of a Linear, and z is in float32.
  constexpr bool kNarrows = !std::is_same_v<Source, ExpandedRows>;
  constexpr bool kWidens = kOp == LayerNormOp::kNorm && !std::is_same_v<Source, MergedRows>;
  if (run % 8 == 0 && !needs_shared) {
    if (in == DType::kFloat16 && out == DType::kFloat16) return f(Elements<__half, __half, 8>{});
    if (in == DType::kBFloat16 && out == DType::kBFloat16) return f(Elements<__nv_bfloat16, __nv_bfloat16, 8>{});
  }
  if (run % 4 == 0 && !needs_shared) {
    if (in == DType::kFloat32 && out == DType::kFloat32) return f(Elements<float, float, 4>{});
    if constexpr (kNarrows) {
      if (in == DType::kFloat32 && out == DType::kFloat16) return f(Elements<float, __half, 4>{});
      if (in == DType::kFloat32 && out == DType::kBFloat16) return f(Elements<float, __nv_bfloat16, 4>{});
    }
    if constexpr (kWidens) {
      if (in == DType::kFloat16 && out == DType::kFloat32) return f(Elements<__half, float, 4>{});
      if (in == DType::kBFloat16 && out == DType::kFloat32) return f(Elements<__nv_bfloat16, float, 4>{});
    }
  }
  return run % 4 == 0 ? f(Elements<AnyElement, AnyElement, 4>{}) : f(Elements<AnyElement, AnyElement, 1>{});
}

inline int64_t contiguous_run(const LayerNormRows& rows) {
  return rows.layout == RowLayout::kMerging ? rows.length / rows.factor[0] / rows.factor[1] / rows.factor[2]
                                            : rows.length;
}

// The number of threads per row and per block, and the number of vectors of each parameter in shared memory.
struct RowThreads {
  uint32_t lanes, block, block_vectors;
};

// Calls f(Traits, RowThreads) with the traits and threads of `plan`.
template <LayerNormOp kOp, class Source, class E, int kChoice = 0, class F>
cudaError_t dispatch_choice(const RowPlan& plan, F&& f) {
  if constexpr (kChoice + 1 < std::size(VectorChoices<E::kVec>::kList)) {
    if (plan.choice > kChoice) return dispatch_choice<kOp, Source, E, kChoice + 1>(plan, f);
  }
  using Traits = LayerNormTraits<kOp, Source, typename E::In, typename E::Out, E::kVec, kChoice>;
  return f(Traits{}, RowThreads{plan.lanes, std::max(plan.lanes, kBlock), plan.lanes * Traits::kVecs});
}

template <LayerNormOp kOp, class Source, class F>
cudaError_t dispatch(const LayerNormRows& rows, DType in, DType out, bool needs_shared, F&& f) {
  return dispatch_elements<kOp, Source>(in, out, contiguous_run(rows), needs_shared, [&](auto elements) {
    using E = decltype(elements);
    return dispatch_choice<kOp, Source, E>(plan_row<E::kVec>(rows.length / E::kVec), f);
  });
}

// Sets the arguments common to forward and backward. Returns false if the kernels cannot address the rows.
template <class Params, class Source>
bool fill(const Params& params, const RowThreads& threads, int vec, RowArguments<Source>* args) {
  args->rows = static_cast<uint32_t>(params.rows.count);
  args->length = static_cast<uint32_t>(params.rows.length);
  args->vectors = args->length / vec;
  while (1u << args->lanes_log2 < threads.lanes) ++args->lanes_log2;
  args->inverse_length = 1.0f / static_cast<float>(params.rows.length);
  args->in_dtype = params.in_dtype;
  args->out_dtype = params.out_dtype;
  args->drop_path_scale = params.drop_path_scale;
  if (params.drop_path_scale != nullptr) args->samples = FastDivisor::of(static_cast<uint32_t>(params.rows_per_sample));
  args->weight = {params.weight, params.weight_dtype, 1.0f};
  return Source::of(params.rows, &args->source);
}

// Sets *blocks to the number of blocks that can be resident on the device at the same time, but to no more than the
// rows need.
template <class Kernel>
cudaError_t plan_blocks(Kernel kernel, const RowThreads& threads, size_t smem_bytes, int64_t rows, int64_t* blocks) {
  const cudaError_t status = resident_blocks(kernel, threads.block, smem_bytes, blocks);
  const int64_t groups = threads.block / threads.lanes;
  *blocks = std::min(*blocks, (rows + groups - 1) / groups);
  return status;
}

}  // namespace swinkernels::cuda
