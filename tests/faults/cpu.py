"""Planted faults in the CPU kernels, and in the parameters that the bindings pass to them."""

from __future__ import annotations

from tests.faults import Fault

_KERNEL = "csrc/kernels/cpu/window_attention.inl"
_TESTS = "tests/cpu/test_window_attention.py::"
_LINEAR = "csrc/kernels/cpu/linear.inl"
_PANELS = "csrc/kernels/cpu/panels.inl"
_TILES = "csrc/kernels/cpu/tiles.inl"
_LINEAR_TESTS = "tests/cpu/test_linear.py::"
_HALF = "csrc/kernels/cpu/attention_half.inl"
_LAYERS = "csrc/kernels/cpu/linear.cpp"
_HALF_TESTS = "tests/cpu/test_attention_half.py::"
_FORMS = "tests/ops/test_axis_tables_and_key_windows.py::test_the_cpu_kernels"

FAULTS = {
    "cpu-mask-within-regions": Fault(
        _KERNEL,
        "(query_region != splat(region[key])) & mask_value",
        "(query_region == splat(region[key])) & mask_value",
        _TESTS + "test_geometries",
    ),
    "cpu-factor-of-the-pads": Fault(
        _KERNEL,
        "add_pad_rows(sizes, s.k_offsets, factor, s.dk, s.dpad_k);",
        "add_pad_rows(sizes, s.k_offsets, 1.0f, s.dk, s.dpad_k);",
        _TESTS + "test_geometries",
    ),
    "cpu-bias-of-another-type": Fault(
        _KERNEL,
        "bias_type = index % windows / (windows / params_.bias_types);",
        "bias_type = index % windows % params_.bias_types;",
        _TESTS + "test_cosine_attention_and_dense_bias",
    ),
    "cpu-gradient-along-short-rows": Fault(
        _KERNEL,
        "load(inverse_norms + first) < kMaxInverseNorm ? products : Vec{}",
        "products",
        _TESTS + "test_rows_too_short_to_be_normalised",
    ),
    "cpu-axis-without-its-rows": Fault(
        "csrc/kernels/cpu/axis_tables.inl",
        "outer + load(coordinate(2, c2) + i)",
        "outer",
        _FORMS,
    ),
    "cpu-axis-gradient-of-one-row": Fault(
        "csrc/kernels/cpu/axis_tables.inl",
        "load(coordinate(1, c1) + i) + of_row",
        "of_row",
        _FORMS,
    ),
    "cpu-key-of-another-window": Fault(
        "csrc/kernels/cpu/key_windows.inl",
        "of[2].first_key - c * g.window[2];",
        "of[2].first_key;",
        _FORMS,
    ),
    "cpu-partial-sums-of-one-chunk": Fault(
        "csrc/kernels/cpu/window_attention.cpp",
        "for (int64_t chunk = 0; chunk < chunks; ++chunk) {\n      const float* part",
        "for (int64_t chunk = 0; chunk < 1; ++chunk) {\n      const float* part",
        _TESTS + "test_many_windows",
    ),
    "cpu-exponential": Fault(
        "csrc/kernels/cpu/simd.inl",
        "p = p * r + 4.1668393e-2f;",
        "p = p * r + 4.2668393e-2f;",
        _TESTS + "test_windows",
    ),
    "cpu-half-a-vector-of-float16": Fault(
        "csrc/kernels/cpu/simd.inl",
        "for (int64_t j = i; j < count; ++j) target[j] = tail[j - i];",
        "for (int64_t j = i; j + 1 < count; ++j) target[j] = tail[j - i];",
        _TESTS + "test_head_dims",
    ),
    "bindings-heads-of-q-for-all": Fault(
        "csrc/bindings/window_attention.cpp",
        "rank(x), x.stride(x.dim() - 2));",
        "rank(x), xs[0].stride(x.dim() - 2));",
        _TESTS + "test_strides",
    ),
    "bindings-tables-as-if-contiguous": Fault(
        "csrc/bindings/window_call.h",
        "if (*x && !(*x)->is_contiguous()) *x =",
        "if (*x && (*x)->is_contiguous()) *x =",
        _TESTS + "test_strides",
    ),
    "cpu-linear-rows-of-the-last-vector": Fault(
        _PANELS,
        "smaller(v + r, rows - 1)",
        "smaller(r, rows - 1)",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-mlp-slices-of-other-depths": Fault(
        _LINEAR,
        "kHidden = 256 * kNumbers;",
        "kHidden = 192 * kNumbers;",
        _LINEAR_TESTS + "test_both_ways_of_an_mlp_give_the_same_bits",
    ),
    "cpu-patches-beyond-the-map": Fault(
        _LINEAR,
        "if (is_padded) {",
        "if (false) {",
        "tests/ops/test_fused_patches.py::test_special_values",
    ),
    "cpu-patches-of-the-first-image": Fault(
        _LINEAR,
        "starts[r] = x + image * p.image_stride;",
        "starts[r] = x;",
        "tests/ops/test_fused_patches.py::test_against_float64",
    ),
    "cpu-patches-skip-the-first-row-of-a-plane": Fault(
        _LINEAR,
        "if (++at[2] < grid[2]) continue;\n      at[2] = 0;",
        "if (++at[2] < grid[2]) continue;\n      at[2] = 1;",
        "tests/ops/test_fused_patches.py::test_rows_are_those_of_a_linear_layer",
    ),
    "cpu-position-bias-of-the-first-panel": Fault(
        "csrc/kernels/cpu/position_bias.inl",
        "p.table[(first + v + r) * heads + c]",
        "p.table[(v + r) * heads + c]",
        "tests/ops/test_position_bias.py::test_against_float64",
    ),
    "cpu-linear-first-slice-of-the-depth": Fault(
        _LINEAR,
        "y, c, u > 0,",
        "y, c, false,",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-linear-block-packed-once": Fault(
        _LINEAR,
        "if (block.first != packed) {",
        "if (packed < 0) {",
        _LINEAR_TESTS + "test_large",
    ),
    "cpu-mlp-hidden-bias-of-the-first-channels": Fault(
        _LINEAR,
        "activate_all<kActivation, Stored>(p.fc1, h, depth",
        "activate_all<kActivation, Stored>(p.fc1, 0, depth",
        _LINEAR_TESTS + "test_mlp",
    ),
    "cpu-linear-bias-of-the-first-slice": Fault(
        _PANELS,
        "bias_of(layer, first + smaller(c + i, count - 1))",
        "bias_of(layer, smaller(c + i, count - 1))",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-linear-last-row": Fault(
        _PANELS,
        "for (int64_t r = 0; r < last; ++r) {\n        const auto",
        "for (int64_t r = 0; r + 1 < last; ++r) {\n        const auto",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-linear-tail-of-another-slice": Fault(
        _LINEAR,
        "store(at, adds ? sums[r] + load(at) : sums[r]);",
        "store(at, sums[r]);",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-linear-tail-of-the-first-block": Fault(
        _LINEAR,
        "const int64_t at = (block.first + block.rows + r) * stride + first + c,",
        "const int64_t at = (block.rows + r) * stride + first + c,",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-linear-last-channel-of-the-tail": Fault(
        _PANELS,
        "for (int64_t i = 0; i < count; ++i) to[i] = part[i];",
        "for (int64_t i = 0; i + 1 < count; ++i) to[i] = part[i];",
        _LINEAR_TESTS + "test_linear",
    ),
    "cpu-mlp-tail-without-bias": Fault(
        _LINEAR,
        "activate(load(row + c) + biases_of(layer, first + c, smaller(kLanes, count - c)), kActivation)",
        "activate(load(row + c), kActivation)",
        _LINEAR_TESTS + "test_mlp",
    ),
    "cpu-gelu-of-negative-numbers": Fault(
        _PANELS,
        "(x < Vec{} ? Vec{} : x) - a * exp(-p)",
        "x - a * exp(-p)",
        _LINEAR_TESTS + "test_gelu",
    ),
    "cpu-norm-without-its-bias": Fault(
        _PANELS,
        "x[i] += widen(norm.bias[c + i]);",
        "x[i] += 0.0f;",
        _LINEAR_TESTS + "test_norms",
    ),
    "cpu-norm-of-the-first-tail-row": Fault(
        _LINEAR,
        "panels.packed_tail[i * kLanes + r]",
        "panels.packed_tail[i * kLanes]",
        _LINEAR_TESTS + "test_norms",
    ),
    "cpu-half-output-of-the-first-window": Fault(
        _HALF,
        "s.attended + head * dim / kNumbers * stride + at + first;",
        "s.attended + head * dim / kNumbers * stride + first;",
        _HALF_TESTS + "test_results",
    ),
    "cpu-half-norm-of-pad-tokens": Fault(
        _HALF,
        "if (s.x_offsets[r] != kPad) continue;",
        "continue;",
        _HALF_TESTS + "test_results",
    ),
    "cpu-half-bias-of-the-first-head": Fault(
        _HALF,
        "add_bias<Stored>(p.qkv[part], head * dim, dim, factor,",
        "add_bias<Stored>(p.qkv[part], 0, dim, factor,",
        _HALF_TESTS + "test_results",
    ),
    "cpu-bfloat16-hidden-bias-of-every-second-channel": Fault(
        _LINEAR,
        "bias[n] = bias_of(layer, first + c + n);",
        "bias[n] = bias_of(layer, first + c);",
        _LINEAR_TESTS + "test_instruction_set[baseline]",
    ),
    "cpu-bfloat16-slice-of-half-the-weight": Fault(
        _PANELS,
        "weight(layer.weight + first * layer.row_stride + unit * kNumbers)",
        "weight(layer.weight + first * layer.row_stride + unit)",
        _LINEAR_TESTS + "test_instruction_set[baseline]",
    ),
    "cpu-widened-slice-without-its-last-units": Fault(
        _PANELS,
        "for (; u < depth; ++u) to[u] = widen(from[u]);",
        "for (; u < depth; ++u) to[u] = 0.0f;",
        _LINEAR_TESTS + "test_instruction_set[avx2]",
    ),
    "cpu-widened-hidden-layer-is-not-rounded": Fault(
        "csrc/kernels/cpu/simd.inl",
        "{ return round_to_bfloat16(numbers[0]); }",
        "{ return numbers[0]; }",
        _LINEAR_TESTS + "test_instruction_set[avx2]",
    ),
    "cpu-widened-tail-is-not-rounded": Fault(
        "csrc/kernels/cpu/simd.inl",
        "SWINKERNELS_ISA::store(to, round_to_bfloat16(numbers));",
        "SWINKERNELS_ISA::store(to, numbers);",
        _LINEAR_TESTS + "test_instruction_set[avx2]",
    ),
    "cpu-bfloat16-gelu-of-negative-numbers": Fault(
        _PANELS,
        "(x < Vec{} ? Vec{} : x) - a * exp2_low(-p)",
        "x - a * exp2_low(-p)",
        _LINEAR_TESTS + "test_gelu_in_bfloat16",
    ),
    "cpu-bfloat16-norm-of-the-first-channels": Fault(
        _LINEAR,
        "panel + (channels - units + u) * kLanes",
        "panel + u * kLanes",
        _LINEAR_TESTS + "test_instruction_set[baseline]",
    ),
    "cpu-bfloat16-half-values-with-the-bias-of-the-first-head": Fault(
        _HALF,
        "bias_of(layer, head * dim + d)",
        "bias_of(layer, d)",
        _HALF_TESTS + "test_instruction_set[baseline]",
    ),
    "cpu-bfloat16-half-value-of-the-next-window": Fault(
        _HALF,
        "row[i] = 0;",
        "row[i] += 0;",
        _HALF_TESTS + "test_instruction_set[baseline]",
    ),
    "cpu-tiles-second-tile-of-rows": Fault(
        _TILES,
        "load_tile<5>(a + kTile * lda, a_bytes);",
        "load_tile<5>(a, a_bytes);",
        _LINEAR_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-tiles-units-that-do-not-fill-a-tile": Fault(
        _TILES,
        "a + 2 * tiled_depth, lda,",
        "a, lda,",
        _LINEAR_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-tiles-sums-of-rows-that-do-not-fill-a-tile": Fault(
        _TILES,
        "addend == nullptr ? nullptr : addend + tiled_rows * ldc,",
        "nullptr,",
        _LINEAR_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-tiles-shared-rows-added-twice": Fault(
        _TILES,
        "tiled_rows < rows && addend != c",
        "tiled_rows < rows",
        _LINEAR_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-tiles-shared-rows-without-bias": Fault(
        _TILES,
        "addend == nullptr ? nullptr : addend + first * ldc,",
        "nullptr,",
        _HALF_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-tiles-keys-of-the-first-window": Fault(
        _HALF,
        "s.keys + at * s.keys_stride, s.keys_stride, q + first,",
        "s.keys, s.keys_stride, q + first,",
        _HALF_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-tiles-probabilities-of-keys-that-do-not-exist": Fault(
        _HALF,
        "for (int64_t u = first; u < end; ++u) clear(",
        "for (int64_t u = first; u < first; ++u) clear(",
        _HALF_TESTS + "test_instruction_set[emulated_amx]",
    ),
    "cpu-bfloat16-softmax-of-a-key-too-many": Fault(
        _KERNEL,
        "add(end - 1, Constant<1>());",
        "add(end - 1, Constant<kOfUnit>());",
        _HALF_TESTS + "test_instruction_set[baseline]",
    ),
    "cpu-half-regions-of-the-first-window": Fault(
        _HALF,
        "s.masked[w], s.regions + at, b",
        "s.masked[w], s.regions, b",
        _HALF_TESTS + "test_results",
    ),
    "cpu-half-bias-type-of-the-last-window": Fault(
        _HALF,
        "s.bias.block(s.bias_types[w], head, b)",
        "s.bias.block(s.window.bias_type, head, b)",
        _HALF_TESTS + "test_results",
    ),
    "cpu-layers-of-later-rows-add-the-first-residual": Fault(
        _LAYERS,
        "nullptr : p.residual + first * out;",
        "nullptr : p.residual;",
        _LINEAR_TESTS + "test_layers_of_many_rows",
    ),
    "cpu-layers-of-a-half-on-square-maps-only": Fault(
        _LAYERS,
        "row = size[2] * token, plane = size[1] * row",
        "row = size[1] * token, plane = size[1] * row",
        _HALF_TESTS + "test_results",
    ),
    "cpu-layers-norm-without-the-last-row": Fault(
        _LINEAR,
        "const int64_t rows = smaller(kLanes, p.rows - first);",
        "const int64_t rows = smaller(kLanes, p.rows - first - 1);",
        _LINEAR_TESTS + "test_norms",
    ),
    "cpu-layers-of-a-half-without-pad-qkv": Fault(
        _LAYERS,
        "attention.pad_qkv = p.qkv[0].bias;",
        "attention.pad_qkv = nullptr;",
        _HALF_TESTS + "test_results",
    ),
    "bindings-half-table-of-other-bits": Fault(
        "csrc/bindings/attention_half.cpp",
        "uint32_t{from[i]} << 16",
        "uint32_t{from[i]} << 15",
        _HALF_TESTS + "test_results",
    ),
    "bindings-half-weight-of-q-for-all": Fault(
        "csrc/bindings/attention_half.cpp",
        "layer.weight += i * width * layer.row_stride;",
        "layer.weight += 0;",
        _HALF_TESTS + "test_results",
    ),
}
