"""Random cases of window attention, which Hypothesis draws for the tests of the backends."""

from __future__ import annotations

import math

import torch
from hypothesis import assume
from hypothesis import strategies as st

from swinkernels.testing import WindowAttentionCase as Case


@st.composite
def cases(
    draw, *, longest: int = 6, beyond: int = 3, most: int = 3, head_dims: st.SearchStrategy | None = None
) -> Case:
    """Windows of up to ``longest`` tokens an axis on maps of up to two windows and ``beyond`` tokens; up to ``most``
    images and heads.
    """
    rank = draw(st.integers(2, 3))
    has_logit_scale = draw(st.booleans())  # in windows of 16 tokens and more, which are not mostly pads
    window = tuple(draw(st.integers(6 - rank if has_logit_scale else 1, longest)) for _ in range(rank))
    grid = draw(st.integers(0, 3)) == 0
    shift = (0,) * rank if grid else tuple(draw(st.integers(0, w - 1)) for w in window)
    size = tuple(draw(st.integers(w if has_logit_scale else 1, 2 * w + beyond)) for w in window)
    num_windows = tuple(-(-s // w) for s, w in zip(size, window, strict=True))
    before = tuple(draw(st.integers(0, -s % w)) for s, w in zip(size, window, strict=True))
    regions = draw(st.sampled_from(["shift", "shift", "periodic", "map"]))
    bias = draw(st.sampled_from(["none", "table", "table_window", "dense", "types"]))
    types = {"dense": 0, "types": draw(st.sampled_from([n for n in range(1, 28) if math.prod(num_windows) % n == 0]))}

    options = {"pad_order": draw(st.sampled_from(["pad_then_roll", "roll_then_pad"]))}
    if grid:
        options["grid"] = True
    if any(before):
        options["pad_before"] = before
    if regions == "periodic":
        options["periodic"] = tuple(draw(st.booleans()) for _ in range(rank))
    if regions == "map":
        frame = tuple(n * w for n, w in zip(num_windows, window, strict=True))
        options["region_map"] = torch.arange(math.prod(frame), dtype=torch.int32).reshape(frame) * 7919 % 3 - 1
    if bias == "table_window":
        options["table_window"] = tuple(w + draw(st.integers(0, 2)) for w in window)
    if draw(st.booleans()):
        options["mask_value"] = draw(st.sampled_from([-2.0, 1.5]))
    if not has_logit_scale and draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.7, -0.3]))
    case = Case(
        draw(st.integers(1, most)),
        size,
        draw(st.integers(1, most)),
        draw(st.integers(4 if has_logit_scale else 1, 40) if head_dims is None else head_dims),
        window,
        shift,
        has_table=bias in ("table", "table_window"),
        has_pad_qkv=draw(st.booleans()),
        has_logit_scale=has_logit_scale,
        bias_types=types.get(bias),
        options=options,
    )
    # The budget is one of RMS errors: of a few elements it would be a matter of luck.
    assume(case.batch * math.prod(size) * case.num_heads * case.head_dim >= 100)
    return case
