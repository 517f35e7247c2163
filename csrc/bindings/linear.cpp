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

// Returns the sizes of the map x without those of batch and channels, as three values of which a 2D map's first is 1.
Ints map_sizes(const Tensor& x, bool channels_first) {
  Ints size(5 - x.dim(), 1);
  const int64_t first = channels_first ? 2 : 1;
  for (int64_t i = first; i < first + x.dim() - 2; ++i) size.push_back(x.size(i));
  return size;
}

// Returns the pieces of a block of `factor` tokens. If the channels are last, a piece is a token, in the order of
// `neighbours`, the tokens' row-major numbers; else it is the tokens of one channel along the last axis.
std::vector<cpu::Patches::Piece> pieces_of(const Ints& factor, const Ints& neighbours, bool channels_first,
                                           int64_t channels, int64_t channel_stride, const int64_t (&strides)[3]) {
  std::vector<cpu::Patches::Piece> pieces;
  const int64_t run = channels_first ? factor[2] : 1, tokens = factor[0] * factor[1] * factor[2];
  const auto add = [&](int64_t token, int64_t offset) {
    cpu::Patches::Piece piece{{token / (factor[1] * factor[2]), token / factor[2] % factor[1], token % factor[2]},
                              offset};
    for (int i = 0; i < 3; ++i) piece.offset += piece.at[i] * strides[i];
    pieces.push_back(piece);
  };
  if (!channels_first) {
    for (const int64_t token : neighbours) add(token, 0);
    return pieces;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t token = 0; token < tokens; token += run) add(token, c * channel_stride);
  }
  return pieces;
}

Tensor fused_patch_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor norm_weight,
                          OptionalTensor norm_bias, Ints factor, Ints neighbours, bool channels_first, std::string norm,
                          double eps) {
  check_norm(norm);
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim == 4 || dim == 5, "swinkernels: a map of patches must have 4 or 5 axes");
  const int64_t channels = x.size(channels_first ? 1 : dim - 1);
  STD_TORCH_CHECK(factor.size() == 3 && factor[0] > 0 && factor[1] > 0 && factor[2] > 0 && (dim == 5 || factor[0] == 1),
                  "swinkernels: factor must be three positive numbers, of which the first is 1 for a 2D map");
  const Ints size = map_sizes(x, channels_first);
  Ints shape{x.size(0)};
  for (int64_t i = 5 - dim; i < 3; ++i) {
    STD_TORCH_CHECK(!channels_first || size[i] % factor[i] == 0,
                    "swinkernels: an image must be a multiple of the patch size");
    shape.push_back((size[i] + factor[i] - 1) / factor[i]);
  }
  for (const int64_t token : neighbours) {
    STD_TORCH_CHECK(!channels_first && token >= 0 && token < factor[0] * factor[1] * factor[2],
                    "swinkernels: neighbours must be the numbers of tokens of a block, and are only for channels last");
  }
  shape.push_back(weight.size(0));
  return with_element_of(x, [&](auto element) {
    using Element = decltype(element);
    if (!x.is_contiguous()) x = as_contiguous(x);
    const int64_t token = channels_first ? 1 : channels, plane = size[1] * size[2] * token;
    const int64_t strides[3] = {plane, size[2] * token, token};
    const auto pieces = pieces_of(factor, neighbours, channels_first, channels, size[0] * plane, strides);
    cpu::LinearParams<Element> p{};
    p.patches.pieces = pieces.data();
    p.patches.count = static_cast<int64_t>(pieces.size());
    p.patches.length = channels_first ? factor[2] : channels;
    check_channels<Element>(p.patches.length);
    for (int i = 0; i < 3; ++i) {
      p.patches.size[i] = size[i];
      p.patches.factor[i] = factor[i];
      p.patches.strides[i] = strides[i];
    }
    p.patches.image_stride = size[0] * plane * (channels_first ? channels : 1);
    p.layer = layer_of<Element>(weight, bias, p.patches.count * p.patches.length);
    p.norm = norm_of<Element>(norm_weight, norm_bias, norm, "pre", eps, p.layer.in_features);
    p.post_norm = norm_of<Element>(norm_weight, norm_bias, norm, "post", eps, p.layer.out_features);
    Tensor out = new_empty(x, shape);
    p.x = elements_of<Element>(x);
    p.out = static_cast<Element*>(out.mutable_data_ptr());
    p.rows = out.numel() == 0 ? 0 : out.numel() / p.layer.out_features;
    if (p.rows > 0) cpu::linear_forward(p, parallel_for);
    return out;
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
    p.threads = torch::stable::get_num_threads();
    p.by_layers = by_layers ? *by_layers : cpu::is_faster_by_layers(p);
    if (p.rows > 0) cpu::mlp_forward(p, parallel_for);
    return rows.out;
  });
}

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CPU, m) {
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("fused_patch_linear", TORCH_BOX(&fused_patch_linear));
  m.impl("fused_mlp", TORCH_BOX(&fused_mlp));
}

}  // namespace
}  // namespace swinkernels
#endif  // SWINKERNELS_WITHOUT_CPU
