"""Planted faults in the ops' frontends, in the modules, and in the adapters for other libraries."""

from __future__ import annotations

from tests.faults import Fault

_ADAPTERS = "swinkernels/adapters/"
_STATE = "csrc/python/state.cpp"

FAULTS = {
    "ops-dropout-on-the-cpu": Fault(
        "swinkernels/ops/window_attention.py",
        'if spec.dropout_p > 0.0 and backend == "cpu":',
        'if spec.dropout_p > 1.0 and backend == "cpu":',
        "tests/ops/test_window_attention.py::test_backend_says_by_name_what_it_lacks",
    ),
    "ops-known-calls-forget-autocast": Fault(
        "swinkernels/ops/window_attention.py",
        "call_key(tensors, given, autocast)",
        "call_key(tensors, given)",
        "tests/ops/test_call_cache.py::test_autocast_is_asked_at_every_call",
    ),
    "ops-dropout-of-the-default-generator": Fault(
        "swinkernels/ops/window_attention.py",
        "device=device, generator=generator)",
        "device=device, generator=None)",
        "tests/ops/test_window_attention_transforms.py::test_dropout_draws_a_seed_and_backward_has_the_same",
    ),
    "ops-lse-is-never-left-out": Fault(
        "swinkernels/ops/window_attention.py",
        "*plan.others[tf32])",
        "*plan.others[2 | tf32])",
        "tests/ops/test_call_cache.py::test_an_lse_is_computed_only_where_a_gradient_may_be_asked_for",
    ),
    "ops-recomputed-gelu-left-out": Fault(
        "swinkernels/ops/_recomputed.py",
        "F.gelu(x, approximate=approximate) if needs[1] else x",
        "x",
        "tests/ops/test_halves.py::test_output_and_every_gradient",
    ),
    "ops-pieces-of-an-mlp-add-the-first-rows": Fault(
        "swinkernels/ops/_fused_linear.py",
        "of_residual[piece]",
        "of_residual[: of_x[piece].shape[0]]",
        "tests/ops/test_fused_linear.py::test_mlp_piece_by_piece[True-torch.float32]",
    ),
    "ops-compiled-halves-lose-tangents": Fault(
        "swinkernels/ops/_fused_linear.py",
        "        and forward_ad._current_level < 0\n",
        "",
        "tests/ops/test_halves.py::test_compile_in_one_graph_without_gradients",
    ),
    "ops-training-on-onednn-without-a-bias": Fault(
        "swinkernels/ops/_onednn.py",
        "return _product(x, weight, bias) if _runs(x, weight)",
        "return _product(x, weight) if _runs(x, weight)",
        "tests/ops/test_onednn.py::test_output_and_every_gradient",
    ),
    "nn-drop-path-not-scaled": Fault(
        "swinkernels/nn/drop_path.py",
        "return scale.div_(keep) if keep > 0.0 else scale",
        "return scale",
        "tests/nn/test_blocks.py::test_drop_path_and_dropout_draw_as_timm",
    ),
    "nn-offsets-not-logarithmic": Fault(
        "swinkernels/nn/window_attention.py",
        "return (offsets.sign() * torch.log2(offsets.abs() + 1) / 3).float()",
        "return (offsets / 8).float()",
        "tests/nn/test_blocks.py::test_block_is_microsofts",
    ),
    "models-tables-resized-along-the-other-axis": Fault(
        "swinkernels/models/checkpoints.py",
        "(rows @ maps @ columns.T)",
        "(columns @ maps @ rows.T)",
        "tests/nn/test_checkpoints.py::test_table_resized_as_timm_does",
    ),
    "models-merging-in-the-order-of-unfold": Fault(
        "swinkernels/models/checkpoints.py",
        "[..., runs.to(t.device)].transpose(-1, -2)",
        ".transpose(-1, -2)",
        "tests/nn/test_checkpoints.py::test_same_logits",
    ),
    "nn-pads-without-the-bias": Fault(
        "swinkernels/nn/window_attention.py",
        "        return self.qkv.bias\n",
        "        return None if self.qkv.bias is None else 0 * self.qkv.bias\n",
        "tests/nn/test_blocks.py::test_block_is_timms",
    ),
    "adapters-timm-pads-without-the-bias": Fault(
        _ADAPTERS + "libraries/timm/swin.py",
        '"pad_qkv": child(attn, "qkv").bias,',
        '"pad_qkv": None,',
        "tests/adapters/test_timm_swin.py::test_outputs_and_every_gradient",
    ),
    "adapters-timm-windows-for-grids": Fault(
        _ADAPTERS + "libraries/timm/maxvit.py",
        "attend(self.attn_grid, x, window, True, op)",
        "attend(self.attn_grid, x, window, False, op)",
        "tests/adapters/test_timm_maxvit.py::test_map_sizes",
    ),
    "adapters-torchvision-bias-of-k": Fault(
        _ADAPTERS + "libraries/torchvision.py",
        "qkv_bias[third : 2 * third].zero_()",
        "qkv_bias[2 * third :].zero_()",
        "tests/adapters/test_torchvision.py::test_v2_takes_no_part_of_the_bias_for_k",
    ),
    "adapters-torchvision-a-draw-for-each-sample": Fault(
        _ADAPTERS + "libraries/torchvision.py",
        'drawn = y.shape[0] if stochastic_depth.mode == "row" else 1',
        "drawn = y.shape[0]",
        "tests/adapters/test_torchvision.py::test_stochastic_depth_draws_the_same",
    ),
    "adapters-transformers-masked-once": Fault(
        _ADAPTERS + "libraries/transformers/_layers.py",
        "mask[..., 1] = -1.0",
        "mask[..., 1] = -0.5",
        "tests/adapters/test_transformers.py::test_masks_of_v2_count_twice",
    ),
    "adapters-monai-table-of-the-clipped-window": Fault(
        _ADAPTERS + "libraries/monai.py",
        '"table_window": tuple(attn.window_size),',
        '"table_window": tuple(window),',
        "tests/adapters/test_monai.py::test_outputs_and_every_gradient",
    ),
    "adapters-mmpretrain-order-of-unfold": Fault(
        _ADAPTERS + "libraries/mmpretrain.py",
        'lambda merging: 4 * merging.in_channels, lambda axes: "unfold"',
        'lambda merging: 4 * merging.in_channels, lambda axes: "row_major"',
        "tests/adapters/test_mmpretrain.py::test_patch_merging_in_the_order_of_unfold",
    ),
    "adapters-copies-with-masks-of-their-own": Fault(
        _ADAPTERS + "copies/block.py",
        "return resolution is None or not is_stored_mask(mask, frame_of(resolution, window), window, shift)",
        "return False",
        "tests/adapters/test_copied_blocks.py::"
        "test_instances_that_are_not_what_their_class_is[<lambda>-attn_mask differs]",
    ),
    "adapters-any-position-index": Fault(
        _ADAPTERS + "masks.py",
        "same = x.numel() == expected.numel() and torch.equal(x.reshape(-1).to(expected.dtype), expected.reshape(-1))",
        "same = x.numel() == expected.numel()",
        "tests/adapters/test_timm_swin.py::test_another_position_index_is_left_alone",
    ),
    "adapters-kept-checks-ignore-hooks": Fault(
        _ADAPTERS + "checks.py",
        "or any(_flat(map(_hooks_of, states[1:]))):",
        "or False:",
        "tests/adapters/test_checks.py::test_a_change_discards_the_results[in Python-hook]",
    ),
    "adapters-kept-checks-take-a-tensor-for-a-number": Fault(
        _ADAPTERS + "checks.py",
        "if not all(map(is_, values, self._values)):",
        "if values != self._values:",
        "tests/adapters/test_checks.py::test_a_change_discards_the_results[in Python-equal tensor for a number]",
    ),
    "adapters-kept-checks-outlive-exchanged-modules": Fault(
        _ADAPTERS + "checks.py",
        "if not all(map(is_, children, [modules[i] for i in self._positions])):",
        "if False:",
        "tests/adapters/test_checks.py::test_a_change_discards_the_results[in Python-modules exchanged]",
    ),
    "adapters-compiled-comparison-ignores-hooks": Fault(
        _STATE,
        "(i > 0 && has_hooks(state.get()))",
        "false",
        "tests/adapters/test_checks.py::test_a_change_discards_the_results[compiled-hook]",
    ),
    "adapters-compiled-comparison-ignores-versions": Fault(
        _STATE,
        "has_equal(object, names_.version, item(version, 0))",
        "true",
        "tests/adapters/test_checks.py::test_a_change_discards_the_results[compiled-buffer in place]",
    ),
    "adapters-compiled-comparison-ignores-exchanged-modules": Fault(
        _STATE,
        "if (module != item(modules, number_of(item(facts_.positions, positions_++)))) return false;",
        "",
        "tests/adapters/test_checks.py::test_a_change_discards_the_results[compiled-modules exchanged]",
    ),
    "adapters-compiled-comparison-ignores-names": Fault(
        _STATE,
        "if (!equal(name, item(names, i))) return false;",
        "",
        "tests/adapters/test_repeated.py::test_a_change_ends_the_repetition[order of parameters]",
    ),
    "adapters-compiled-comparison-ends-at-the-first-module": Fault(
        _STATE,
        "for (Py_ssize_t i = 0; i < count; ++i) {\n      PyObject* one",
        "for (Py_ssize_t i = 0; i < 1; ++i) {\n      PyObject* one",
        "tests/adapters/test_checks.py::test_results_come_with_the_current_tensors[compiled]",
    ),
    "adapters-repeated-ops-of-a-tensor-with-two-names": Fault(
        _ADAPTERS + "repeated.py",
        "or len(place) < sum(t is not None for t in given):",
        "or False:",
        "tests/adapters/test_repeated.py::test_two_names_of_one_tensor_may_become_two_tensors",
    ),
    "adapters-repeated-ops-on-other-sizes": Fault(
        _ADAPTERS + "repeated.py",
        "key = _Ops, by, *metadata(x)",
        "key = _Ops, by",
        "tests/adapters/test_repeated.py::test_a_later_call_runs_only_the_ops",
    ),
    "adapters-repeated-ops-beside-other-code": Fault(
        _ADAPTERS + "repeated.py",
        "calls[-1].result is not result:",
        "result is None:",
        "tests/adapters/test_repeated.py::test_other_calls_are_not_repeated",
    ),
    "adapters-kept-checks-belong-to-every-replica": Fault(
        _ADAPTERS + "checks.py",
        "if self._owner() is not module:",
        "if self._owner() is None:",
        "tests/adapters/test_checks.py::test_copies_and_pickles_do_not_share_results",
    ),
    "adapters-kept-values-of-another-key": Fault(
        _ADAPTERS + "checks.py",
        "result = results.get(under, _UNKNOWN)",
        "result = next(iter(results.values()), _UNKNOWN)",
        "tests/adapters/test_checks.py::test_values_are_kept_by_key",
    ),
    "adapters-kept-decisions-for-other-arguments": Fault(
        _ADAPTERS + "halves.py",
        "(place, residual, backend, rest))",
        "(place, residual, backend))",
        "tests/adapters/test_checks.py::test_decisions_belong_to_the_arguments_of_a_call",
    ),
    "adapters-kept-decisions-for-other-tables": Fault(
        _ADAPTERS + "halves.py",
        "call_key((x, *tables),",
        "call_key((x,),",
        "tests/adapters/test_checks.py::test_decisions_belong_to_the_arguments_of_a_call",
    ),
    "adapters-position-bias-without-its-hooks": Fault(
        _ADAPTERS + "microsoft_attention.py",
        "if on_kernels and joins(offsets) and settled(module, _table_fits_op, *path):",
        "if on_kernels and joins(offsets):",
        "tests/ops/test_position_bias.py::test_libraries",
    ),
    "adapters-kept-layers-stay-alive": Fault(
        _ADAPTERS + "linear_layers.py",
        "return WeakLayers(weakref.ref(self.fc1), weakref.ref(self.fc2), self.gelu)",
        "return WeakLayers(lambda: self.fc1, lambda: self.fc2, self.gelu)",
        "tests/adapters/test_checks.py::test_results_keep_no_tensor_or_module_alive[False]",
    ),
    "adapters-verify-allows-anything": Fault(
        _ADAPTERS + "verify.py",
        "if not e <= limit:",
        "if not e >= 0:",
        "tests/adapters/test_timm_swin_v2_cr.py::test_verify_finds_a_wrong_call_and_names_the_module",
    ),
    "compiled-identity-of-inner-modules": Fault(
        "swinkernels/adapters/bypass.py",
        "def has_hooks(module: nn.Module) -> bool:",
        "@constant_when_compiled\ndef has_hooks(module: nn.Module) -> bool:",
        "tests/adapters/test_conformance.py::test_equal_blocks_share_compiled_code[timm]",
    ),
    "compiled-forward-of-the-instance": Fault(
        "swinkernels/nn/_inner.py",
        "    getattr(module, method)",
        "    pass",
        "tests/adapters/test_timm_swin.py::test_compiled_code_notices_a_changed_inner_module[forward of norm2]",
    ),
    "linear-onednn-without-a-product": Fault(
        "swinkernels/ops/_fused_linear.py",
        "has_kernels or (is_fused and _onednn.why_not_fused(x.dtype) is None)",
        "is_fused",
        "tests/ops/test_fused_linear.py::test_bfloat16_where_only_kernels_have_products",
    ),
}
