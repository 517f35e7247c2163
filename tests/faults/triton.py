"""Planted faults in the Triton kernels, which the tests in Triton's interpreter must detect."""

from __future__ import annotations

from tests.faults import Fault

_ADDRESS = "swinkernels/triton/_window_address.py"
_ATTENTION = "swinkernels/triton/window_attention/"
_MERGING = "swinkernels/triton/_patch_merging_kernels.py"
_MLP = "swinkernels/triton/_mlp_half_kernels.py"
_IN_ATTENTION = "tests/triton/test_window_attention.py::test_triton"
_IN_BIAS_TABLES = "tests/triton/test_bias_tables.py::test_triton"
_IN_KEY_WINDOWS = "tests/triton/test_key_windows.py::test_triton"
_IN_AXIS_TABLES = "tests/triton/test_axis_tables.py::test_triton"
_IN_MLP_HALF = "tests/triton/test_mlp_half.py::test_triton"
_IN_MEMORY_BOUND_OPS = "tests/triton/test_memory_bound_ops.py::test_triton"

FAULTS = {
    "triton-roll-past-the-map": Fault(
        _ADDRESS,
        "y = tl.where(y >= size, y - size, y)",
        "y = tl.where(y > size, y - size, y)",
        _IN_MEMORY_BOUND_OPS + "[partition_and_reverse-odd-float32]",
    ),
    "triton-carries-of-windows": Fault(
        _ADDRESS,
        "wraps = n1 == tl.cdiv(size[1], WINDOW[1])",
        "wraps = n1 > tl.cdiv(size[1], WINDOW[1])",
        _IN_MEMORY_BOUND_OPS + "[a_program_takes_several_windows-rectangular-float32]",
    ),
    "triton-seam-of-another-axis": Fault(
        _ATTENTION + "mask.py",
        "(t1 >= cut[1]).to(tl.int32) * 2",
        "(t1 >= cut[1]).to(tl.int32)",
        _IN_ATTENTION + "[matches_reference-n4-float32]",
    ),
    "triton-gradient-along-unit-rows": Fault(
        _ATTENTION + "gradients.py",
        "d = (d - unit * along[:, None]) * inverse[:, None]",
        "d = d * inverse[:, None]",
        _IN_ATTENTION + "[matches_reference-cosine-float32]",
    ),
    "triton-dropout-scale-of-the-gradient": Fault(
        _ATTENTION + "gradients.py",
        "tl.where(keep, dprobs * call.keep_scale, 0.0)",
        "tl.where(keep, dprobs, 0.0)",
        _IN_ATTENTION + "[dropout_matches_reference_with_the_same_pairs-dropout-float32]",
    ),
    "triton-table-of-another-type": Fault(
        _ATTENTION + "scores.py",
        "row * call.table_columns + (kind * call.num_heads + head)",
        "row * call.table_columns + head",
        _IN_BIAS_TABLES + "[matches_reference-types-float32]",
    ),
    "triton-table-pairs-the-other-way-round": Fault(
        _ATTENTION + "backward_tables.py",
        "(row // WINDOW)[:, None] == key[None, :], (row % WINDOW)[:, None], -1",
        "(row % WINDOW)[:, None] == key[None, :], (row // WINDOW)[:, None], -1",
        _IN_BIAS_TABLES + "[matches_reference-pairs-float32]",
    ),
    "triton-key-window-off-its-centre": Fault(
        _ATTENTION + "key_windows.py",
        "t1 - (KEY_WINDOW[1] - WINDOW[1]) // 2",
        "t1 - (KEY_WINDOW[1] - WINDOW[1])",
        _IN_KEY_WINDOWS + "[matches_reference-padded-float16]",
    ),
    "triton-key-of-the-next-window-alone": Fault(
        _ATTENTION + "backward_keys.py",
        "for o1 in range(-FAR_1, FAR_1 + 1):",
        "for o1 in range(0, FAR_1 + 1):",
        _IN_KEY_WINDOWS + "[matches_reference-padded-float16]",
    ),
    "triton-axis-tables-row-of-the-next-offset": Fault(
        _ATTENTION + "axis_tables.py",
        "of_1 = t1 + (ROWS[0] + COLUMNS[0] + COLUMNS[1] - 1)",
        "of_1 = t1 + (ROWS[0] + COLUMNS[0] + COLUMNS[1])",
        _IN_AXIS_TABLES + "[matches_reference-grid-float32]",
    ),
    "triton-axis-tables-gradient-of-one-axis": Fault(
        _ATTENTION + "axis_tables.py",
        "later = row >= ROWS[0] + ROWS[1]\n",
        "later = row > ROWS[0] + ROWS[1] + ROWS[2]\n",
        _IN_AXIS_TABLES + "[matches_reference-grid-float32]",
    ),
    "triton-axis-tables-without-a-share-of-dq": Fault(
        _ATTENTION + "axis_tables.py",
        "dq += share if excess is None else share * excess",
        "dq += share * 0.0 if excess is None else share * excess",
        _IN_AXIS_TABLES + "[matches_reference-grid-float32]",
    ),
    "triton-axis-tables-lower-digits": Fault(
        _ATTENTION + "axis_tables.py",
        "total += tl.dot(a.low, b, tl.dot(a.high, b)) * a.factor",
        "total += tl.dot(a.high, b) * a.factor",
        _IN_AXIS_TABLES + "[keeps_the_digits_of_float32-float16]",
    ),
    "triton-variance-of-a-sample": Fault(
        _MERGING,
        "scale = tl.rsqrt(_row_sum(u * u, PARTS) / LENGTH + eps)",
        "scale = tl.rsqrt(_row_sum(u * u, PARTS) / (LENGTH - 1) + eps)",
        _IN_MEMORY_BOUND_OPS + "[merging_norm-monai_legacy-f32]",
    ),
    "triton-repeated-neighbours-count-once": Fault(
        _MERGING,
        "common *= held",
        "common *= 1.0",
        _IN_MEMORY_BOUND_OPS + "[merging_norm-monai_legacy-f32]",
    ),
    "triton-mlp-variance-of-the-first-part": Fault(
        _MLP,
        "rstd = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / C + eps)",
        "rstd = tl.rsqrt(tl.sum(a * a, axis=1) / a.shape[1] + eps)",
        _IN_MLP_HALF + "[in_float32-post]",
    ),
    "triton-mlp-bias-of-the-first-chunk": Fault(
        _MLP,
        "_add_columns(h, fc1_bias, first_hidden + hidden)",
        "_add_columns(h, fc1_bias, hidden)",
        _IN_MLP_HALF + "[in_float32-pre]",
    ),
    "triton-mlp-gelu-of-low-degree": Fault(
        _MLP,
        "p = t * _TAIL_5 + _TAIL_4",
        "p = _TAIL_4",
        _IN_MLP_HALF + "[gelu_of_every_number-tail-float16]",
    ),
    "triton-mlp-branch-read-once": Fault(
        _MLP,
        "    if branch is not None:\n        part +=",
        "    if branch is not None and not LAST:\n        part +=",
        _IN_MLP_HALF + "[in_float32-branch]",
    ),
}
