// Describes the tensors of Linear layers and norms to the CPU kernels, which compute in float32.
#pragma once

#include <cstdint>
#include <string>

#include "checks.h"
#include "params/linear_cpu.h"

namespace swinkernels {

inline const float* float_data(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "swinkernels: the kernels of Linear layers need float32");
  return static_cast<const float*>(data_of(x));
}

// Replaces the weight and the bias by copies if the kernels cannot read them in place. The bias has `biases` values for
// each row of the weight.
inline cpu::LinearLayer layer_of(Tensor& weight, OptionalTensor& bias, int64_t in_features, int64_t biases = 1) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in_features,
                  "swinkernels: a weight must have as many columns as its input");
  if (weight.stride(1) != 1) weight = as_contiguous(weight);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == biases * weight.size(0),
                    "swinkernels: a bias must have one value for each row of its weights");
    if (!bias->is_contiguous()) bias = as_contiguous(*bias);
  }
  return {float_data(weight), bias ? float_data(*bias) : nullptr, in_features, weight.size(0), weight.stride(0)};
}

// Returns the norm of rows of `channels` values, or none if `norm` is not `place`. Replaces the weight and the bias by
// copies if the kernels cannot read them in place.
inline cpu::RowNorm norm_of(OptionalTensor& weight, OptionalTensor& bias, const std::string& norm,
                            const std::string& place, double eps, int64_t channels) {
  if (norm != place) return {};
  for (OptionalTensor* x : {&weight, &bias}) {
    if (!*x) continue;
    STD_TORCH_CHECK((*x)->dim() == 1 && (*x)->size(0) == channels,
                    "swinkernels: the weight and the bias of a norm must have one value for each channel");
    if (!(*x)->is_contiguous()) *x = as_contiguous(**x);
  }
  return {true, weight ? float_data(*weight) : nullptr, bias ? float_data(*bias) : nullptr, static_cast<float>(eps)};
}

// Refuses a `norm` other than "" (none), "pre" (before the first layer) and "post" (after the last one).
inline void check_norm(const std::string& norm) {
  STD_TORCH_CHECK(norm.empty() || norm == "pre" || norm == "post",
                  "swinkernels: norm must be \"\", \"pre\" or \"post\"");
}

}  // namespace swinkernels
