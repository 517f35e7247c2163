// The bindings of Linear layers on a CPU, on torch's stable ABI. swinkernels/ops checks the arguments; the checks here
// guard the kernels' assumptions.
#ifndef SWINKERNELS_WITHOUT_CPU
#include "params/linear_cpu.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <vector>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE
#include "checks.h"
#include "linear_layer.h"

namespace swinkernels {
namespace {

cpu::Activation activation_of(const std::string& gelu) {
  if (gelu.empty()) return cpu::Activation::kNone;
  STD_TORCH_CHECK(gelu == "none" || gelu == "tanh", "swinkernels: gelu must be \"none\" or \"tanh\"");
  return gelu == "tanh" ? cpu::Activation::kGeluTanh : cpu::Activation::kGelu;
}

// The input, the residual and the output of a call, as the kernels read and write them.
struct Rows {
  Tensor x, out;
  OptionalTensor residual;

  Rows(Tensor given, OptionalTensor added, int64_t out_features) : x(std::move(given)), residual(std::move(added)) {
    if (!x.is_contiguous()) x = as_contiguous(x);
    std::vector<int64_t> shape = sizes(x, x.dim() - 1);
    shape.push_back(out_features);
    if (residual) {
      STD_TORCH_CHECK(sizes(*residual, residual->dim()) == shape, "swinkernels: residual must have the result's shape");
      if (!residual->is_contiguous()) residual = as_contiguous(*residual);
    }
    out = new_empty(x, shape);
  }

  template <class Element, template <class> class Params>
  void fill(Params<Element>& p) {
    p.x = elements_of<Element>(x);
    p.residual = residual ? elements_of<Element>(*residual) : nullptr;
    p.out = static_cast<Element*>(out.mutable_data_ptr());
    p.x_stride = x.size(x.dim() - 1);
    p.rows = out.numel() == 0 ? 0 : out.numel() / out.size(out.dim() - 1);
  }
};

Tensor fused_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor norm_weight,
                    OptionalTensor norm_bias, std::string gelu, std::string norm, double eps) {
  check_norm(norm);
  STD_TORCH_CHECK(norm != "post", "swinkernels: fused_linear has no norm after its layer");
  return with_element_of(x, [&](auto element) {
    using Element = decltype(element);
    cpu::LinearParams<Element> p{};
    p.layer = layer_of<Element>(weight, bias, x.size(x.dim() - 1));
    p.norm = norm_of<Element>(norm_weight, norm_bias, norm, "pre", eps, p.layer.in_features);
    p.activation = activation_of(gelu);
    Rows rows(std::move(x), std::move(residual), p.layer.out_features);
    rows.fill(p);
    if (p.rows > 0) cpu::linear_forward(p, parallel_for);
    return rows.out;
  });
}

Tensor fused_mlp(Tensor x, Tensor fc1_weight, OptionalTensor fc1_bias, Tensor fc2_weight, OptionalTensor fc2_bias,
                 OptionalTensor residual, OptionalTensor norm_weight, OptionalTensor norm_bias, std::string gelu,
                 std::string norm, double eps, std::optional<bool> by_layers) {
  check_norm(norm);
  return with_element_of(x, [&](auto element) {
    using Element = decltype(element);
    cpu::MlpParams<Element> p{};
    p.fc1 = layer_of<Element>(fc1_weight, fc1_bias, x.size(x.dim() - 1));
    p.fc2 = layer_of<Element>(fc2_weight, fc2_bias, p.fc1.out_features);
    p.norm = norm_of<Element>(norm_weight, norm_bias, norm, "pre", eps, p.fc1.in_features);
    p.post_norm = norm_of<Element>(norm_weight, norm_bias, norm, "post", eps, p.fc2.out_features);
    p.activation = activation_of(gelu);
    Rows rows(std::move(x), std::move(residual), p.fc2.out_features);
    rows.fill(p);
    p.by_layers = by_layers ? *by_layers : cpu::is_faster_by_layers(p, torch::stable::get_num_threads());
    if (p.rows > 0) cpu::mlp_forward(p, parallel_for);
    return rows.out;
  });
}

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CPU, m) {
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("fused_mlp", TORCH_BOX(&fused_mlp));
}

}  // namespace
}  // namespace swinkernels
#endif  // SWINKERNELS_WITHOUT_CPU
