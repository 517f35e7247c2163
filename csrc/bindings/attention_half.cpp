// The binding of the attention half of a block on a CPU, on torch's stable ABI. swinkernels/ops checks the arguments; the
// checks here guard the kernels' assumptions.
#ifndef SWINKERNELS_WITHOUT_CPU
#include "params/attention_half_cpu.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <utility>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE
#include "linear_layer.h"
#include "window_call.h"

namespace swinkernels {
namespace {

// Returns a table as float32, which the kernels read. A table is small, so that calling torch to convert it would take
// longer than this loop.
OptionalTensor as_float(OptionalTensor table) {
  if (!table || table->scalar_type() != ScalarType::BFloat16) return table;
  if (!table->is_contiguous()) table = as_contiguous(*table);
  Tensor copy = new_empty(*table, sizes(*table, table->dim()), ScalarType::Float);
  const auto* from = static_cast<const uint16_t*>(data_of(*table));
  auto* to = static_cast<uint32_t*>(copy.mutable_data_ptr());
  for (int64_t i = 0; i < copy.numel(); ++i) to[i] = uint32_t{from[i]} << 16;
  return copy;
}

// Without k_weight and v_weight, q_weight has the rows of all three.
Tensor fused_attention_half(Tensor x, Tensor q_weight, OptionalTensor k_weight, OptionalTensor v_weight,
                            OptionalTensor qkv_bias, Tensor proj_weight, OptionalTensor proj_bias,
                            OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor bias_table,
                            OptionalTensor bias, OptionalTensor logit_scale, OptionalTensor region_map,
                            std::string wire, double scale, double mask_value, int64_t num_heads, bool residual,
                            std::string norm, double eps, std::optional<bool> by_layers) {
  check_norm(norm);
  return with_element_of(x, [&](auto element) {
    using Element = decltype(element);
    const WindowSpec spec(wire, scale, mask_value, 0.0);
    cpu::AttentionHalfParams<Element> p{};
    const int64_t rank = x.dim() - 2, channels = p.channels = x.size(x.dim() - 1);
    STD_TORCH_CHECK(k_weight.has_value() == v_weight.has_value(), "swinkernels: the weights of k and v come together");
    OptionalTensor none;
    cpu::LinearLayer<Element> q = layer_of<Element>(q_weight, qkv_bias, channels, k_weight ? 3 : 1);
    const int64_t width = k_weight ? q.out_features : q.out_features / 3;
    STD_TORCH_CHECK(num_heads > 0 && width > 0 && width % num_heads == 0 && (k_weight || q.out_features == 3 * width),
                    "swinkernels: q, k and v must have num_heads * head_dim channels each");
    check_channels<Element>(width / num_heads);
    for (int64_t i = 0; i < 3; ++i) {
      cpu::LinearLayer<Element> layer = q;
      if (k_weight && i > 0) {
        layer = layer_of<Element>(i == 1 ? *k_weight : *v_weight, none, channels);
        STD_TORCH_CHECK(layer.out_features == width, "swinkernels: q, k and v must have the same number of channels");
      } else {
        layer.weight += i * width * layer.row_stride;
      }
      layer.bias = q.bias == nullptr ? nullptr : q.bias + i * width;
      layer.out_features = width;
      p.qkv[i] = layer;
    }
    p.proj = layer_of<Element>(proj_weight, proj_bias, width);
    STD_TORCH_CHECK(p.proj.out_features == channels, "swinkernels: proj must return as many channels as x has");
    p.norm = norm_of<Element>(norm_weight, norm_bias, norm, "pre", eps, channels);
    p.post_norm = norm_of<Element>(norm_weight, norm_bias, norm, "post", eps, channels);
    p.residual = residual;
    p.threads = torch::stable::get_num_threads();

    p.attention.dtype = dtype_of(x);
    p.attention.batch = x.size(0);
    p.attention.num_heads = static_cast<int32_t>(num_heads);
    p.attention.head_dim = static_cast<int32_t>(width / num_heads);
    const std::vector<int64_t> shape = sizes(x, x.dim());
    spec.fill(p.attention, {shape.begin() + 1, shape.end() - 1});
    const WindowGeometry& g = p.attention.geometry;
    STD_TORCH_CHECK(!spec.axis_tables && g.key_margin[0] + g.key_margin[1] + g.key_margin[2] == 0,
                    "swinkernels: fused_attention_half has no axis_tables and no key window");
    Tables tables{as_float(bias_table), std::move(bias), as_float(logit_scale), {}, std::move(region_map), {}};
    fill_tables(p.attention, tables, spec, rank);
    Tensor out = new_empty(x, shape);
    if (out.numel() == 0) return out;
    p.by_layers = by_layers ? *by_layers : cpu::is_faster_by_layers(p);
    if (p.by_layers ? !x.is_contiguous() : x.stride(x.dim() - 1) != 1) x = as_contiguous(x);
    p.x = input_map(x, 0, rank, 0);
    p.out = output_map(out, 0, rank, 0);
    cpu::attention_half_forward(p, parallel_for);
    return out;
  });
}

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CPU, m) {
  m.impl("fused_attention_half", TORCH_BOX(&fused_attention_half));
}

}  // namespace
}  // namespace swinkernels
#endif  // SWINKERNELS_WITHOUT_CPU
