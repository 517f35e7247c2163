// The binding of the continuous position bias on a CPU, on torch's stable ABI. swinkernels/ops checks the arguments; the
// checks here guard the kernel's assumptions.
#ifndef SWINKERNELS_WITHOUT_CPU
#include "params/position_bias_cpu.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE
#include "checks.h"
#include "linear_layer.h"

namespace swinkernels {
namespace {

Tensor fused_position_bias(Tensor offsets, Tensor fc1_weight, OptionalTensor fc1_bias, Tensor fc2_weight) {
  return with_element_of(offsets, [&](auto element) {
    using Element = decltype(element);
    cpu::PositionBiasParams<Element> p{};
    const int64_t axes = offsets.size(offsets.dim() - 1);
    OptionalTensor no_bias;
    p.fc1 = layer_of<Element>(fc1_weight, fc1_bias, axes);
    p.fc2 = layer_of<Element>(fc2_weight, no_bias, p.fc1.out_features);
    if (!offsets.is_contiguous()) offsets = as_contiguous(offsets);
    p.offsets = elements_of<Element>(offsets);
    p.rows = axes == 0 ? 0 : offsets.numel() / axes;
    Tensor table = new_empty(offsets, {p.rows, p.fc2.out_features}, ScalarType::Float);
    p.table = static_cast<float*>(table.mutable_data_ptr());
    if (table.numel() > 0) cpu::position_bias_forward(p, parallel_for);
    return table;
  });
}

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CPU, m) {
  m.impl("fused_position_bias", TORCH_BOX(&fused_position_bias));
}

}  // namespace
}  // namespace swinkernels
#endif  // SWINKERNELS_WITHOUT_CPU
