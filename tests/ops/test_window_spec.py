"""Tests WindowSpec: its string form, which kernels parse and exported programs contain, and symbolic sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import swinkernels
from swinkernels.ops._arguments import make_window_spec
from swinkernels.testing import WindowAttentionCase, run_case
from swinkernels.window_spec import WindowSpec


@st.composite
def specs(draw) -> WindowSpec:
    rank = draw(st.integers(2, 3))
    window = tuple(draw(st.integers(1, 8)) for _ in range(rank))
    grid = draw(st.booleans())
    return make_window_spec(
        "op",
        rank,
        draw(st.integers(1, 128)),
        window_size=window,
        shift_size=0 if grid else tuple(draw(st.integers(0, w - 1)) for w in window),
        scale=draw(st.one_of(st.none(), st.floats(-3, 3))),
        table_window=tuple(w + draw(st.integers(0, 2)) for w in window),
        pad_order=draw(st.sampled_from(["pad_then_roll", "roll_then_pad"])),
        pad_before=tuple(draw(st.integers(0, 3)) for _ in range(rank)),
        periodic=tuple(draw(st.booleans()) for _ in range(rank)),
        mask_value=draw(st.floats(-200, 0)),
        dropout_p=draw(st.floats(0, 1)),
        grid=grid,
        tables={"bias_table": torch.zeros(0)},
    )


@given(specs(), st.booleans(), st.booleans())
def test_the_wire_form_is_read_back(spec, allow_tf32, needs_lse):
    read = WindowSpec.parse(spec.wire(allow_tf32=allow_tf32, needs_lse=needs_lse), *spec.numbers)
    assert (read.allow_tf32, read.needs_lse) == (allow_tf32, needs_lse)
    assert read.options() == spec.options()
    assert hash(WindowSpec.parse(spec.wire(), *spec.numbers)) == hash(spec)
    assert WindowSpec.parse(spec.wire(), *spec.numbers) == spec


def test_the_wire_form_names_only_what_is_not_usual():
    spec = make_window_spec("op", 2, 32, window_size=7, shift_size=3)
    assert spec.wire() == "window_size=7,7;shift_size=3,3"
    assert spec.wire(needs_lse=False) == "window_size=7,7;shift_size=3,3;needs_lse=0"
    assert spec.numbers == (32**-0.5, -100.0, 0.0)
    assert (spec.volume, spec.table_rows) == (49, 169)


def test_integers_of_numpy_are_integers():
    qkv, table = torch.randn(1, 8, 8, 24), torch.randn(49, 2)
    expected = swinkernels.window_attention_qkvpacked(qkv, table, num_heads=2, window_size=4, shift_size=(1, 2))
    got = swinkernels.window_attention_qkvpacked(
        qkv, table, num_heads=np.int64(2), window_size=np.int32(4), shift_size=(np.int64(1), np.uint8(2))
    )
    assert torch.equal(got, expected)
    with pytest.raises(TypeError, match="window_size must be an int or one int per axis, got"):
        swinkernels.window_attention_qkvpacked(qkv, table, num_heads=2, window_size=np.float64(4.0))


class Attend(torch.nn.Module):
    def forward(self, qkv: torch.Tensor, table: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return swinkernels.window_attention_qkvpacked(
            qkv, table, num_heads=2, window_size=7, shift_size=3, pad_qkv=pad, pad_order="roll_then_pad"
        )


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_has_no_guard_on_divisibility(strict):
    """A program exported with a 48 x 40 map, which needs padding, also runs on maps with other padding or none."""
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> tuple[torch.Tensor, ...]:
        table, pad = torch.randn(169, 2, generator=g), torch.randn(48, generator=g)
        return torch.randn(1, *size, 48, generator=g), table, pad

    h, w = torch.export.Dim("h", min=2, max=512), torch.export.Dim("w", min=2, max=512)
    shapes = ({1: h, 2: w}, None, None)
    program = torch.export.export(Attend(), draw(48, 40), dynamic_shapes=shapes, strict=strict)
    for size in ((57, 33), (49, 14), (8, 9)):
        inputs = draw(*size)
        assert torch.equal(program.module()(*inputs), Attend()(*inputs)), size


def test_an_lse_that_is_not_needed_changes_nothing():
    case = WindowAttentionCase(2, (9, 10), 2, 8, 4, 1, has_pad_qkv=True)
    inputs = case.inputs(torch.float32)
    recorded = run_case(swinkernels.window_attention_qkvpacked, inputs, {**case.arguments(), "backend": "cpu"})
    del inputs["dout"]
    out = swinkernels.window_attention_qkvpacked(**inputs, **case.arguments(), backend="cpu")
    assert torch.equal(out, recorded["out"])
    assert math.isfinite(out.sum().item())
