// The entry points of the CUDA backend. They check the kernels' assumptions and dispatch on the op and the layout.
#include <cstdint>

#include "dispatch.cuh"
#include "reduce_partials.cuh"

namespace swinkernels::cuda {
namespace {

template <class Params>
bool supported(const Params& params) {
  const LayerNormRows& rows = params.rows;
  if (rows.count < 0 || rows.count > INT32_MAX || rows.length < 1 || rows.length > kMaxRow) return false;
  if (rows.layout == RowLayout::kMerging) {
    for (int32_t factor : rows.factor) {
      if (factor != 1 && factor != 2) return false;
    }
  }
  if (params.drop_path_scale != nullptr && rows.count > 0 && params.rows_per_sample < 1) return false;
  return params.in_dtype == params.out_dtype || params.in_dtype == DType::kFloat32 ||
         params.out_dtype == DType::kFloat32;
}

// Calls f(op, source). The types of the arguments determine the op and the source of rows at compile time.
template <class Params, class F>
cudaError_t dispatch_op(const Params& params, F&& f) {
  const auto with = [&](auto op, auto source) { return f(op, source); };
  using Norm = std::integral_constant<LayerNormOp, LayerNormOp::kNorm>;
  if (params.op == LayerNormOp::kNorm) {
    if (params.rows.layout == RowLayout::kMerging) return with(Norm{}, MergedRows{});
    if (params.rows.layout == RowLayout::kExpanding) return with(Norm{}, ExpandedRows{});
  }
  if (params.rows.layout != RowLayout::kPlain) return cudaErrorInvalidValue;
  switch (params.op) {
    case LayerNormOp::kNorm:
      return with(Norm{}, PlainRows{});
    case LayerNormOp::kResidual:
      return with(std::integral_constant<LayerNormOp, LayerNormOp::kResidual>{}, PlainRows{});
    case LayerNormOp::kPostNorm:
      return with(std::integral_constant<LayerNormOp, LayerNormOp::kPostNorm>{}, PlainRows{});
  }
  return cudaErrorInvalidValue;
}

cudaError_t backward(const LayerNormBackwardParams& params, cudaStream_t stream, int64_t* bytes) {
  if (!supported(params)) return cudaErrorInvalidValue;
  if (params.rows.count == 0) {
    if (bytes != nullptr) *bytes = 0;
    if (bytes != nullptr || (params.dweight == nullptr && params.dbias == nullptr)) return cudaSuccess;
    return reduce_partials({nullptr, params.dweight, params.dbias, static_cast<uint32_t>(params.rows.length), 0},
                           stream);
  }
  return dispatch_op(params, [&](auto op, auto source) {
    return launch_backward<decltype(op)::value, decltype(source)>(params, stream, bytes);
  });
}

}  // namespace

cudaError_t layer_norm_forward(const LayerNormForwardParams& params, cudaStream_t stream) {
  if (!supported(params)) return cudaErrorInvalidValue;
  if (params.rows.count == 0) return cudaSuccess;
  return dispatch_op(params, [&](auto op, auto source) {
    return launch_forward<decltype(op)::value, decltype(source)>(params, stream);
  });
}

int64_t layer_norm_backward_workspace_bytes(const LayerNormBackwardParams& params) {
  int64_t bytes = 0;
  return backward(params, nullptr, &bytes) == cudaSuccess ? bytes : 0;  // the launch will fail with the same error
}

cudaError_t layer_norm_backward(const LayerNormBackwardParams& params, cudaStream_t stream) {
  return backward(params, stream, nullptr);
}

}  // namespace swinkernels::cuda
