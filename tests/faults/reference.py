"""Planted faults in the reference, with which all kernels are compared, and in the code that compares them."""

from __future__ import annotations

from tests.faults import Fault

_GEOMETRY = "swinkernels/reference/_geometry.py"
_ATTENTION = "swinkernels/reference/window_attention.py"

FAULTS = {
    "reference-seam-one-token-late": Fault(
        _GEOMETRY,
        "(g >= p - w).long() + (g >= p - s).long()",
        "(g >= p - w).long() + (g > p - s).long()",
        "tests/reference/test_window_attention.py::test_padding_and_regions_against_literal_code",
    ),
    "reference-shift-the-other-way": Fault(
        _GEOMETRY,
        "y = (g + shift[axis]) % frame[axis] - pad_before[axis]",
        "y = (g - shift[axis]) % frame[axis] - pad_before[axis]",
        "tests/reference/test_window_partition.py::test_sign_of_the_shift",
    ),
    "reference-relative-positions-transposed": Fault(
        _ATTENTION,
        "index * (2 * w - 1) + i - j + w - 1",
        "index * (2 * w - 1) + j - i + w - 1",
        "tests/reference/test_window_attention.py::test_timm_v1",
    ),
    "reference-no-unit-rows": Fault(
        _ATTENTION,
        "keepdim=True).clamp(min=1e-12) for x in (q, k))",
        "keepdim=True).clamp(min=1.0) for x in (q, k))",
        "tests/reference/test_window_attention.py::test_timm_v2",
    ),
    "reference-types-of-the-fastest-axis": Fault(
        _ATTENTION,
        "bias = bias.repeat_interleave(num_windows // bias.shape[0], dim=0)",
        "bias = bias.repeat(num_windows // bias.shape[0], 1, 1, 1)",
        "tests/reference/test_window_attention.py::test_bias_of_window_types",
    ),
    "reference-order-of-merged-neighbours": Fault(
        "swinkernels/reference/patch_merging.py",
        "return tuple(offset[::-1] for offset",
        "return tuple(offset for offset",
        "tests/reference/test_patches.py::test_merging_timm_and_torchvision",
    ),
    "reference-gelu": Fault(
        "swinkernels/reference/mlp_half.py",
        "0.044715",
        "0.047715",
        "tests/reference/test_blocks.py::test_mlp_half_without_residual",
    ),
    "testing-mean-error-of-one-eps": Fault(
        "swinkernels/testing.py",
        "0.75 * eps * _rms(size)",
        "1.0 * eps * _rms(size)",
        "tests/ops/test_testing.py::test_one_rounding_passes_and_nine_tenths_of_eps_do_not",
    ),
    "testing-largest-error-of-four-eps": Fault(
        "swinkernels/testing.py",
        "2 * eps * size.abs()",
        "4 * eps * size.abs()",
        "tests/ops/test_testing.py::test_no_element_is_off_by_more_than_two_eps_of_the_largest",
    ),
}
