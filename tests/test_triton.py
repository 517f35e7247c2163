"""The Triton backend of window attention against the float64 reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from triton_checks import DEVICE, ON_GPU, Checks

import swinkernels
from swinkernels.reference.window_attention import relative_position_index, shift_region
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention, op_arguments, opcheck_forward_and_backward, run_case

CASES = {
    "n4": Case(1, (4, 6), 2, 8, 2, 1),
    "n9": Case(2, (6, 3), 1, 16, 3, 1),
    "n49": Case(1, (14, 7), 2, 32, 7, 3),
    "n49_no_shift_no_bias": Case(1, (7, 14), 1, 32, 7, has_table=False),
    "n64": Case(1, (8, 16), 1, 64, 8, 4),
    "n64_head_dim_128": Case(1, (8, 8), 1, 128, 8, 4),
    "n100": Case(1, (10, 20), 1, 32, 10, 5),
    "rectangular_window": Case(1, (10, 6), 2, 24, (5, 3), (2, 1)),
    "rectangular_window_tiled": Case(1, (8, 18), 1, 16, (8, 9), (3, 4)),
    "pad_then_roll": Case(2, (5, 7), 2, 8, 4, 2, has_pad_qkv=True),
    "roll_then_pad": Case(2, (5, 7), 2, 8, 4, 2, has_pad_qkv=True, options={"pad_order": "roll_then_pad"}),
    "pad_with_zeros": Case(1, (5, 6), 2, 8, 4, (1, 2)),
    "map_smaller_than_shift": Case(
        2, (4, 9), 2, 8, 7, (5, 2), has_pad_qkv=True, options={"pad_order": "roll_then_pad", "mask_value": -1.0}
    ),
    "nearly_all_pads": Case(
        1, (16, 1), 1, 32, (7, 6), has_table=False, has_pad_qkv=True, options={"pad_order": "roll_then_pad"}
    ),
    "nearly_all_pads_tiled": Case(1, (1, 11), 3, 24, (9, 16), has_pad_qkv=True, options={"scale": 0.1}),
    "pad_tiled": Case(1, (9, 11), 1, 8, (10, 9), (4, 3), has_pad_qkv=True),
    "pad_before": Case(
        1, (5, 6), 2, 8, 4, (2, 1), has_pad_qkv=True, options={"pad_before": (1, 2), "pad_order": "pad_then_roll"}
    ),
    "pad_before_roll_then_pad": Case(
        1, (5, 6), 2, 8, 4, (2, 1), has_pad_qkv=True, options={"pad_before": (2, 1), "pad_order": "roll_then_pad"}
    ),
    "periodic": Case(1, (6, 9), 2, 8, 3, 1, options={"periodic": (False, True)}),
    "grid": Case(1, (6, 8), 2, 8, (3, 4), options={"grid": True}),
    "grid_padded": Case(1, (5, 7), 1, 8, (3, 4), has_pad_qkv=True, options={"grid": True}),
    "region_map": Case(
        1, (6, 6), 2, 8, 3, 1, options={"region_map": torch.arange(36).reshape(6, 6).remainder(5).div(2).floor().int()}
    ),
    "region_map_tiled": Case(
        1, (10, 10), 1, 8, 10, options={"region_map": torch.arange(100).reshape(10, 10).remainder(7).div(4).int()}
    ),
    "mask_value_and_scale": Case(1, (6, 6), 2, 8, 3, 1, options={"mask_value": -1.5, "scale": 0.7}),
    "three_axes": Case(1, (2, 4, 6), 2, 8, (2, 2, 3), (1, 1, 1)),
    "three_axes_padded": Case(1, (3, 5, 4), 1, 8, (2, 4, 3), (1, 2, 0), has_pad_qkv=True),
    "three_axes_tiled": Case(1, (4, 5, 4), 1, 16, (4, 5, 4), (2, 2, 1)),
    "table_window": Case(1, (2, 6, 6), 2, 8, (2, 3, 3), (1, 1, 1), options={"table_window": (4, 3, 3)}),
    "table_window_of_other_axes": Case(1, (6, 3), 1, 8, (2, 3), (1, 0), options={"table_window": (4, 5)}),
    "head_dim_20": Case(1, (6, 9), 2, 20, 3, 1),
    "head_dim_5_padded": Case(1, (5, 7), 2, 5, 4, 2, has_pad_qkv=True),
    "head_dim_30_tiled": Case(1, (8, 9), 1, 30, 9, 4, has_pad_qkv=True),
    "many_windows_of_a_program": Case(40, (4, 4), 32, 8, 4, 2) if ON_GPU else Case(3, (6, 4), 1, 8, 2, 1),
}  # fmt: skip


check = Checks(__file__)


def on_device(case: Case) -> Case:
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    return Case(**{**case.__dict__, "options": options})


def packed(**arguments):
    return swinkernels.window_attention_qkvpacked(backend="triton", **arguments)


def split(qkv, num_heads):
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)


@check(*CASES)
def matches_reference(name, dtype):
    check_window_attention(packed, on_device(CASES[name]), dtype, DEVICE)


@check("n9", "pad_then_roll")
def opcheck(name, dtype):
    for form in ("window_attention_qkvpacked", "window_attention"):
        opcheck_forward_and_backward(form, "_triton", op_arguments(CASES[name], form, dtype, DEVICE))


@check("n49", "n100", "pad_before", "three_axes_padded")
def separate_form_matches_reference(name, dtype):
    """q, k and v are strided views of one map, all alike."""

    def separate(qkv, num_heads, **arguments):
        q, k, v = split(qkv, num_heads)
        return swinkernels.window_attention(q, k, v, num_heads=num_heads, backend="triton", **arguments)

    check_window_attention(separate, on_device(CASES[name]), dtype, DEVICE)


@check("rectangular_window", "n100")
def every_map_has_its_own_strides(name, dtype):
    """q channels first, k a slice of a wider map, v with a strided last axis, dout expanded: as contiguous ones."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    q, k, v = (x.contiguous() for x in split(inputs["qkv"], case.num_heads))
    bias_table = inputs["bias_table"]
    wide_k = torch.cat([k, k, k], dim=-1)
    strided = (
        q.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
        wide_k[..., case.head_dim : 2 * case.head_dim],
        v.repeat_interleave(2, dim=-1)[..., ::2],
    )
    results = []
    for maps in ((q, k, v), strided):
        leaves = [x.detach().requires_grad_() for x in (*maps, bias_table)]
        out = swinkernels.window_attention(*leaves, backend="triton", **case.arguments())
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@check("pad_then_roll", "pad_tiled", "n49")
def same_bits_twice(name, dtype):
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    first, second = (run_case(packed, inputs, case.arguments()) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


@check()
def inputs_are_not_modified(dtype):
    case = on_device(CASES["pad_then_roll"])
    inputs = case.inputs(dtype, DEVICE)
    before = {name: x.clone() for name, x in inputs.items()}
    run_case(packed, inputs, case.arguments())
    for name in inputs:
        assert torch.equal(inputs[name], before[name]), name


@check("n9", "n100", "pad_then_roll")
def empty_batch(name, dtype):
    case = on_device(Case(**{**CASES[name].__dict__, "batch": 0}))
    results = run_case(packed, case.inputs(dtype, DEVICE), case.arguments())
    assert results["out"].shape == (0, *case.size, case.num_heads * case.head_dim)
    for key, x in results.items():
        assert x.numel() == 0 or key in ("dbias_table", "dpad_qkv")
        assert not x.any()


@check("n9", "n100", "pad_then_roll")
def lse_is_the_log_sum_exp_of_the_scores(name, dtype):
    """With q zero the scores are the bias and the mask alone; the lse of real queries is known exactly."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    qkv = inputs["qkv"].unflatten(-1, (3, case.num_heads, case.head_dim)).clone()
    qkv.select(-3, 0).zero_()
    rank = len(case.size)
    window, shift = (v if isinstance(v, tuple) else (v,) * rank for v in (case.window_size, case.shift_size))
    before = (0,) * rank

    def three(values, leading):
        return [leading] * (3 - rank) + list(values)

    _, lse = torch.ops.swinkernels.window_attention_qkvpacked_fwd_triton(
        qkv, inputs["bias_table"], None, None, None, None, None, three(window, 1), three(shift, 0), three(window, 1),
        three(before, 0), [0, 0, 0], False, False, 0.3, -100.0, 0.0, False,
    )  # fmt: skip
    scores = inputs["bias_table"].double()[relative_position_index(window, device=DEVICE)].permute(2, 0, 1)
    region = shift_region(case.size, window, shift, periodic=(False,) * rank, device=DEVICE)
    mask = -100.0 * (region[:, :, None] != region[:, None, :]).double()
    exact = torch.logsumexp(scores + mask[:, None], dim=-1).expand(case.batch, -1, -1, -1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)


@check()
def gradients_that_are_not_needed_are_empty(dtype):
    case = on_device(CASES["pad_then_roll"])
    inputs = case.inputs(dtype, DEVICE)
    qkv = inputs["qkv"].unflatten(-1, (3, case.num_heads, case.head_dim))
    pad_qkv = inputs["pad_qkv"].reshape(3, case.num_heads, case.head_dim)
    geometry = ([1, 4, 4], [0, 2, 2], [1, 4, 4], [0, 0, 0], [0, 0, 0], False, False, 0.3, -100.0, 0.0, False)
    ops = torch.ops.swinkernels
    tables = (inputs["bias_table"], None, None, pad_qkv, None, None)
    _, lse = ops.window_attention_qkvpacked_fwd_triton(qkv, *tables, *geometry)
    backward = ops.window_attention_qkvpacked_bwd_triton
    all_of_them = backward(inputs["dout"], qkv, lse, *tables, *geometry, True, False, False, True)
    dqkv, *sums = backward(inputs["dout"], qkv, lse, *tables, *geometry, False, False, False, False)
    assert torch.equal(dqkv, all_of_them[0])
    for x in sums:
        assert x.shape == (0,) and x.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in all_of_them[1:])
    assert not all_of_them[4][0].any()  # a pad token's query has no gradient


@pytest.mark.parametrize("name", check.all)
def test_triton(name):
    check.run(name)


if __name__ == "__main__":
    check.main()
