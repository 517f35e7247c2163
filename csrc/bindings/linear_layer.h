// Describes the tensors of Linear layers and norms to the CPU kernels. All have the dtype of the map that the layers read:
// float32, or bfloat16, which the kernels read as uint16_t.
#pragma once

#include <cstdint>
#include <string>

#include "checks.h"
#include "params/linear_cpu.h"

namespace swinkernels {

template <class Element>
constexpr ScalarType kTypeOf = sizeof(Element) == sizeof(float) ? ScalarType::Float : ScalarType::BFloat16;

// Calls function(Element()) with the element type of the map x.
template <class Function>
Tensor with_element_of(const Tensor& x, Function function) {
  if (x.scalar_type() == ScalarType::BFloat16) return function(uint16_t());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "swinkernels: the kernels of Linear layers need a map in float32 or bfloat16");
  return function(float());
}

template <class Element>
const Element* elements_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == kTypeOf<Element>,
                  "swinkernels: the kernels of Linear layers need float32 or bfloat16 tensors, all of the map's dtype");
  return static_cast<const Element*>(data_of(x));
}

// Refuses an odd number of channels in bfloat16, of which the kernels multiply two at once.
template <class Element>
void check_channels(int64_t channels) {
  STD_TORCH_CHECK(sizeof(Element) == sizeof(float) || channels % 2 == 0,
                  "swinkernels: in bfloat16, the numbers of channels that are summed must be even, got ", channels);
}

// Replaces the weight and the bias by copies if the kernels cannot read them in place. The bias has `biases` values for
// each row of the weight.
template <class Element>
cpu::LinearLayer<Element> layer_of(Tensor& weight, OptionalTensor& bias, int64_t in_features, int64_t biases = 1) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in_features,
                  "swinkernels: a weight must have as many columns as its input");
  check_channels<Element>(in_features);
  if (weight.stride(1) != 1) weight = as_contiguous(weight);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == biases * weight.size(0),
                    "swinkernels: a bias must have one value for each row of its weights");
    if (!bias->is_contiguous()) bias = as_contiguous(*bias);
  }
  return {elements_of<Element>(weight), bias ? elements_of<Element>(*bias) : nullptr, in_features, weight.size(0),
          weight.stride(0)};
}

// Returns the norm of rows of `channels` values, or none if `norm` is not `place`. Replaces the weight and the bias by
// copies if the kernels cannot read them in place.
template <class Element>
cpu::RowNorm<Element> norm_of(OptionalTensor& weight, OptionalTensor& bias, const std::string& norm,
                              const std::string& place, double eps, int64_t channels) {
  if (norm != place) return {};
  check_channels<Element>(channels);
  for (OptionalTensor* x : {&weight, &bias}) {
    if (!*x) continue;
    STD_TORCH_CHECK((*x)->dim() == 1 && (*x)->size(0) == channels,
                    "swinkernels: the weight and the bias of a norm must have one value for each channel");
    if (!(*x)->is_contiguous()) *x = as_contiguous(**x);
  }
  return {true, weight ? elements_of<Element>(*weight) : nullptr, bias ? elements_of<Element>(*bias) : nullptr,
          static_cast<float>(eps)};
}

// Refuses a `norm` other than "" (none), "pre" (before the first layer) and "post" (after the last one).
inline void check_norm(const std::string& norm) {
  STD_TORCH_CHECK(norm.empty() || norm == "pre" || norm == "post",
                  "swinkernels: norm must be \"\", \"pre\" or \"post\"");
}

}  // namespace swinkernels
