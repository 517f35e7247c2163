"""Planted faults in the CUDA kernels, which the tests in the emulator must detect."""

from __future__ import annotations

from tests.faults import Fault

_ATTENTION = "csrc/kernels/cuda/window_attention/"
_LAYER_NORM = "csrc/kernels/cuda/layer_norm/"
_IN_ATTENTION = "tests/cuda/test_window_attention_emulated.py::"
_IN_LAYER_NORM = "tests/cuda/test_layer_norm_emulated.py::"
_IN_LONG = "tests/cuda/test_long_windows_emulated.py::"
_IN_AXES = "tests/cuda/test_axis_tables_emulated.py::"
_IN_PARTITION = "tests/cuda/test_window_partition_emulated.py::"

FAULTS = {
    "cuda-mask-of-the-key-beside": Fault(
        _ATTENTION + "mask.cuh",
        "if (row_region[half] != cols.y)",
        "if (row_region[half] != cols.x)",
        _IN_ATTENTION + "test_geometry[region map-float16]",
    ),
    "cuda-bias-of-the-pair-reversed": Fault(
        _ATTENTION + "bias.cuh",
        "bias.data[(row_index[half] - col_index) * bias.stride]",
        "bias.data[(2 * bias.middle - row_index[half] + col_index) * bias.stride]",
        _IN_ATTENTION + "test_geometry[no shift-float16]",
    ),
    "cuda-table-column-of-the-first-type": Fault(
        _ATTENTION + "arguments.cuh",
        "return bias_table + type * num_heads + head;",
        "return bias_table + head;",
        _IN_ATTENTION + "test_bias_tables_by_window_type[short-float16]",
    ),
    "cuda-pairs-of-the-other-order": Fault(
        "csrc/kernels/common/window_address.cuh",
        "(pairs ? row % size - row / size :",
        "(pairs ? row / size - row % size :",
        _IN_ATTENTION + "test_bias_tables_of_pairs[short-float16]",
    ),
    "cuda-pairs-of-keys-as-offsets": Fault(
        "csrc/kernels/common/window_address.cuh",
        "geometry.table_pairs[axis] ? -size * stride : stride;",
        "stride;",
        _IN_ATTENTION + "test_bias_tables_of_pairs[long, Pangu-bfloat16]",
    ),
    "cuda-keys-past-the-window": Fault(
        _ATTENTION + "bias.cuh",
        "< num_tokens ? 0.0f : -INFINITY;",
        "< num_tokens ? 0.0f : -1.0f;",
        _IN_ATTENTION + "test_geometry[window and shift of two sizes-float16]",
    ),
    "cuda-logit-scale-not-clamped": Fault(
        _ATTENTION + "cosine.cuh",
        "expf(is_clamped(logit_scale) ? static_cast<float>(kLargestLogitScale) : logit_scale)",
        "expf(logit_scale)",
        _IN_ATTENTION + "test_cosine_attention_and_dense_biases[v2, small window-float16]",
    ),
    "cuda-gradient-of-a-clamped-logit-scale": Fault(
        _ATTENTION + "bwd_common.cuh",
        "is_clamped(args.logit_scale[head]) ? 0.0f : total",
        "total",
        _IN_ATTENTION + "test_clamped_logit_scale_has_no_gradient",
    ),
    "cuda-gradient-along-unit-rows": Fault(
        _ATTENTION + "cosine.cuh",
        "d[n][2 * half] = (d[n][2 * half] - u.x * along)",
        "d[n][2 * half] = (d[n][2 * half] - u.y * along)",
        _IN_ATTENTION + "test_cosine_attention_and_dense_biases[v2, small window-float16]",
    ),
    "cuda-dropout-scale-of-the-gradient": Fault(
        _ATTENTION + "bwd_common.cuh",
        "  drop(dp, kept);\n  multiply(dp, dropout_scale);",
        "  drop(dp, kept);",
        _IN_ATTENTION + "test_dropout[short-bfloat16]",
    ),
    "cuda-fewer-rounds-of-philox": Fault(
        "csrc/kernels/common/philox.cuh",
        "kRounds = 10",
        "kRounds = 9",
        _IN_ATTENTION + "test_dropout[window 7, v2-float16]",
    ),
    "cuda-delta-of-a-quarter-of-the-keys": Fault(
        _ATTENTION + "bwd_sm80.cuh",
        "      delta.add(p, dp);\n      delta.finish();",
        "      delta.add(p, dp);",
        _IN_ATTENTION + "test_dropout[window 7, v2-float16]",
    ),
    "cuda-output-not-rescaled": Fault(
        _ATTENTION + "fwd_sm80.cuh",
        "o[n][e] *= rescale[e / 2];",
        "o[n][e] *= 1.0f;",
        _IN_ATTENTION + "test_geometry[2D, long window, region map-float32]",
    ),
    "cuda-pad-rows-of-half-a-warp": Fault(
        _ATTENTION + "bwd_common.cuh",
        "(is_pad[1] ? x[n][2 + e] : 0.0f)",
        "0.0f",
        _IN_ATTENTION + "test_geometry[nearly all pads-float16]",
    ),
    "cuda-outputs-of-pads-have-rows": Fault(
        _ATTENTION + "tokens.cuh",
        "if (map >= 3 || args.pad_qkv == nullptr) return 0;",
        "if (map >= 4 || args.pad_qkv == nullptr) return 0;",
        _IN_ATTENTION + "test_geometry[pads before-float32]",
    ),
    "cuda-periodic-axes-are-masked": Fault(
        "csrc/kernels/common/window_address.cuh",
        " && geometry.shift[axis] > 0 && !geometry.periodic[axis];",
        " && geometry.shift[axis] > 0;",
        _IN_ATTENTION + "test_geometry[periodic axis-float16]",
    ),
    "cuda-grid-of-the-window": Fault(
        "csrc/kernels/common/window_address.cuh",
        "t * layout.num_windows[axis] + n",
        "t * layout.window[axis] + n",
        _IN_ATTENTION + "test_geometry[grid-float32]",
    ),
    "cuda-shift-beyond-the-map": Fault(
        "csrc/kernels/common/frame_layout.cuh",
        "geometry.shift[axis] % geometry.size[axis]",
        "geometry.shift[axis]",
        _IN_ATTENTION + "test_geometry[map smaller than the shift, rolled first-float16]",
    ),
    "cuda-regions-of-the-queries-for-keys": Fault(
        _ATTENTION + "bwd_bias_sm80.cuh",
        "smem.queries[slot].region + row0, smem.keys[slot].region,",
        "smem.queries[slot].region + row0, smem.queries[slot].region,",
        _IN_ATTENTION + "test_geometry[2D, long window, region map-float32]",
    ),
    "cuda-words-of-odd-rows": Fault(
        _ATTENTION + "tokens.cuh",
        "if (row_bytes % 4 == 0) {\n      ptx::cp_async_4",
        "if (row_bytes % 2 == 0) {\n      ptx::cp_async_4",
        _IN_ATTENTION + "test_any_head_dim[b2-7x8-h2x5-w4-s1-table-pad-bfloat16]",
    ),
    "cuda-dscores-beyond-float16": Fault(
        _ATTENTION + "bwd_sm80.cuh",
        "key_factor *= power_of_two(largest);",
        "key_factor *= power_of_two(exponent);",
        _IN_ATTENTION + "test_dscores_beyond_float16",
    ),
    "cuda-copies-not-waited-for": Fault(
        _ATTENTION + "fwd_sm80.cuh",
        "ptx::cp_async_wait<kStages - 2>();",
        "ptx::cp_async_wait<kStages - 1>();",
        _IN_ATTENTION + "test_geometry[many windows-float32]",
    ),
    "cuda-short-seam-of-the-other-axis": Fault(
        _ATTENTION + "short16.cuh",
        "bits.x |= (differ >> 1)",
        "bits.x |= (differ & 1)",
        _IN_ATTENTION + "test_short_windows_in_16_bits[seam of x-float16]",
    ),
    "cuda-short-rows-past-the-map": Fault(
        _ATTENTION + "short16.cuh",
        "row -= row >= height ? height : 0;",
        "row -= row > height ? height : 0;",
        _IN_ATTENTION + "test_short_windows_in_16_bits[seams-bfloat16]",
    ),
    "cuda-short-sums-out-of-range": Fault(
        _ATTENTION + "fwd_short16_sm80.cuh",
        "needs_shift = __any_sync(0xffffffffu, !in_range);",
        "needs_shift = false;",
        _IN_ATTENTION + "test_scores_far_from_zero[200.0-dtype0]",
    ),
    "cuda-short-next-window-in-the-same-tiles": Fault(
        _ATTENTION + "fwd_short16_sm80.cuh",
        "next = copy_window(stage ^ 1, item",
        "next = copy_window(stage, item",
        _IN_ATTENTION + "test_any_number_of_multiprocessors[1]",
    ),
    "cuda-long-keys-past-the-window": Fault(
        _ATTENTION + "fwd_long_sm80.cuh",
        "if (key + 16 > num_tokens) mask_columns",
        "if (key > num_tokens) mask_columns",
        _IN_LONG + "test_what_lies_past_the_window_takes_no_part[(9, 9)-torch.float16]",
    ),
    "cuda-long-output-not-rescaled": Fault(
        _ATTENTION + "fwd_long_sm80.cuh",
        "o[n][2 * half + 1] *= rescale;",
        "o[n][2 * half + 1] *= 1.0f;",
        _IN_LONG + "test_scores_far_apart[rising-torch.float16]",
    ),
    "cuda-long-sums-out-of-range": Fault(
        _ATTENTION + "fwd_long_sm80.cuh",
        "(votes.x | votes.y | votes.z | votes.w) == 0",
        "(votes.x | votes.y | votes.z | votes.w) >= 0",
        _IN_LONG + "test_scores_far_apart[rising-torch.bfloat16]",
    ),
    "cuda-long-pairs-of-odd-tables": Fault(
        _ATTENTION + "long_windows.cuh",
        "has_pairs = window[2] % 2 == 0;",
        "has_pairs = true;",
        _IN_LONG + "test_outputs_and_gradients[table of a larger window, odd-torch.float16]",
    ),
    "cuda-long-dense-bias-transposed": Fault(
        _ATTENTION + "long_windows.cuh",
        "(kColumnsAreKeys ? last * num_tokens : last);",
        "(kColumnsAreKeys ? last : last * num_tokens);",
        _IN_LONG + "test_outputs_and_gradients[dense, seam-torch.float16]",
    ),
    "cuda-long-dense-pairs-at-odd-addresses": Fault(
        _ATTENTION + "long_windows.cuh",
        "reinterpret_cast<uintptr_t>(args.dense_bias) % 8 == 0;",
        "reinterpret_cast<uintptr_t>(args.dense_bias) % 4 == 0;",
        _IN_LONG + "test_dense_bias_at_an_odd_address",
    ),
    "cuda-long-dense-gradient-of-the-query-above": Fault(
        _ATTENTION + "bwd_long_sm80.cuh",
        "= dbias[j / 2][j % 2][e];",
        "= dbias[j / 2][j % 2][e % 2];",
        _IN_LONG + "test_outputs_and_gradients[dense, seam-torch.float16]",
    ),
    "cuda-long-gradient-along-unit-rows": Fault(
        _ATTENTION + "bwd_long_sm80.cuh",
        "sum[e] = (sum[e] - u.x[e] * along)",
        "sum[e] = (sum[e] - u.x[e] * 0.5f * along)",
        _IN_LONG + "test_outputs_and_gradients[v2, seam-torch.float16]",
    ),
    "cuda-long-logit-scale-of-every-chunk": Fault(
        _ATTENTION + "bwd_long_sm80.cuh",
        "if (chunk == 0) logit_sum",
        "if (chunk >= 0) logit_sum",
        _IN_LONG + "test_outputs_and_gradients[v2, seam-torch.float16]",
    ),
    "cuda-long-logit-scale-of-one-strip": Fault(
        _ATTENTION + "launch_long_bwd.cuh",
        "reduction.table_workers = reduction.logit_workers = query_plan.workers * plain.strip_workers;",
        "reduction.table_workers = (reduction.logit_workers = query_plan.workers) * plain.strip_workers;",
        _IN_LONG + "test_the_parts_of_dlogit_scale_are_all_added",
    ),
    "cuda-long-scale-of-keys-past-the-window": Fault(
        _ATTENTION + "bwd_long_sm80.cuh",
        "if (row + e / 2 * 8 >= num_tokens) ds[j][e] = 0.0f;",
        "if (row + e / 2 * 8 < 0) ds[j][e] = 0.0f;",
        _IN_LONG + "test_low_scores_leave_the_gradient_of_keys_alone",
    ),
    "cuda-axes-tokens-found-by-two-warps": Fault(
        _ATTENTION + "launch_long_bwd.cuh",
        "std::min(most_rows, rows_of_three_warps)",
        "std::min(most_rows, 1)",
        _IN_AXES + "test_little_shared_memory",
    ),
    "cuda-long-norm-of-the-key-beside": Fault(
        _ATTENTION + "long_windows.cuh",
        "x[j][1] *= pair.y;",
        "x[j][1] *= pair.x;",
        _IN_LONG + "test_outputs_and_gradients[v2, seam-torch.float16]",
    ),
    "cuda-long-delta-of-half-the-keys": Fault(
        _ATTENTION + "bwd_long_sm80.cuh",
        "delta.x[half] += (x.x + x.y) + (x.z + x.w);",
        "delta.x[half] += x.x + x.y;",
        _IN_LONG + "test_outputs_and_gradients[24 x 24-torch.bfloat16]",
    ),
    "cuda-long-dk-of-two-scales": Fault(
        _ATTENTION + "bwd_long_sm80.cuh",
        "multiply(dk, power_of_two(exponent - needed));",
        "multiply(dk, 1.0f);",
        _IN_ATTENTION + "test_dscores_beyond_float16",
    ),
    "cuda-axes-offset-of-the-other-sign": Fault(
        _ATTENTION + "axis_tables.cuh",
        "x[n] = 2 * t + column < window ? met[-column] : 0.0f;",
        "x[n] = 2 * t + column < window ? met[column + 4 * t - 2 * coordinate] : 0.0f;",
        _IN_AXES + "test_outputs_and_gradients[three heads-torch.float16]",
    ),
    "cuda-axes-without-the-last-coordinate": Fault(
        _ATTENTION + "axis_tables.cuh",
        "x[n] = 2 * t + column < window ?",
        "x[n] = 2 * t + column + 1 < window ?",
        _IN_AXES + "test_outputs_and_gradients[three heads-torch.float16]",
    ),
    "cuda-axes-tables-rounded-to-16-bits": Fault(
        _ATTENTION + "axis_tables.cuh",
        "q.add_abt(x, LocatedTile<Tile>{tables.low, lane_offsets}, row);",
        "",
        _IN_AXES + "test_tables_of_more_digits_than_the_maps[torch.bfloat16]",
    ),
    "cuda-axes-products-rounded-to-16-bits": Fault(
        _ATTENTION + "axis_tables.cuh",
        "for (int part = 0; part < 4; ++part)",
        "for (int part = 0; part < 2; ++part)",
        _IN_AXES + "test_tables_of_more_digits_than_the_maps[torch.bfloat16]",
    ),
    "cuda-axes-gradient-of-the-other-sign": Fault(
        _ATTENTION + "bwd_axis_sm80.cuh",
        "offset[n] = window[n] - 1 - (2",
        "offset[n] = 1 - window[n] + (2",
        _IN_AXES + "test_outputs_and_gradients[three heads-torch.float16]",
    ),
    "cuda-axes-gradient-without-the-last-coordinate": Fault(
        _ATTENTION + "bwd_axis_sm80.cuh",
        "column >= 0 && column < window[n];",
        "column >= 0 && column + 1 < window[n];",
        _IN_AXES + "test_outputs_and_gradients[three heads-torch.float16]",
    ),
    "cuda-axes-drows-of-one-scale": Fault(
        _ATTENTION + "bwd_axis_sm80.cuh",
        "sum[n][e] = fmaf(x[n][e], factor, sum[n][e]);",
        "sum[n][e] += x[n][e];",
        _IN_AXES + "test_dscores_beyond_float16",
    ),
    "cuda-layer-norm-slope": Fault(
        _LAYER_NORM + "bwd_sm80.cuh",
        "sums[1] * inputs.rstd * args.inverse_length * inputs.rstd",
        "sums[1] * inputs.rstd * args.inverse_length",
        _IN_LAYER_NORM + "test_parameters_in_half_precision[layer_norm-torch.float16]",
    ),
    "cuda-layer-norm-without-eps": Fault(
        _LAYER_NORM + "fwd_sm80.cuh",
        "reciprocal_sqrt(variance + args.eps)",
        "reciprocal_sqrt(variance)",
        _IN_LAYER_NORM + "test_without_some_parameters[layer_norm-none]",
    ),
    "cuda-drop-path-scale": Fault(
        _LAYER_NORM + "fwd_sm80.cuh",
        "v[i][e] = fmaf(inputs.scale, y[e], v[i][e]);",
        "v[i][e] += y[e];",
        _IN_LAYER_NORM + "test_parameters_in_half_precision[residual_layer_norm-torch.float16]",
    ),
    "cuda-merging-reads-past-the-map": Fault(
        _LAYER_NORM + "row_source.cuh",
        "factor == 2 && size % 2 == 1 ?",
        "factor == 2 && size % 2 == 2 ?",
        _IN_LAYER_NORM + "test_parameters_in_half_precision[patch_merging_norm-1-2-2-torch.float16]",
    ),
    "cuda-repeated-neighbours-get-it-twice": Fault(
        _LAYER_NORM + "bwd_sm80.cuh",
        "d[e] = piece.repeats ? 0.0f : d[e];",
        "d[e] = d[e];",
        _IN_LAYER_NORM + "test_repeated_neighbours",
    ),
    "cuda-sums-in-one-buffer": Fault(
        _LAYER_NORM + "row_group.cuh",
        "parity_ ^= 1;",
        "parity_ ^= 0;",
        _IN_LAYER_NORM + "test_same_bits_whatever_the_schedule",
    ),
    "cuda-partition-begins-at-the-first-window": Fault(
        "csrc/kernels/cuda/window_partition/window_copy.cuh",
        "(args.first_window[axis] + n[axis]) * args.frame.window[axis]",
        "n[axis] * args.frame.window[axis]",
        _IN_PARTITION + "test_more_launches_than_one",
    ),
    "cuda-reverse-reads-pads": Fault(
        "csrc/kernels/cuda/window_partition/window_copy.cuh",
        "return {is_pad ? RowCopy::kNothing : in_windows, in_map};",
        "return {in_windows, in_map};",
        _IN_PARTITION + "test_reverse_does_not_read_pads",
    ),
}
