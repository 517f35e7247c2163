"""Draws random cases of window attention: from a seed for long runs, or with Hypothesis for the backends' tests."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from swinkernels.ops._arguments import MAX_WINDOW_VOLUME
from swinkernels.testing import WindowAttentionCase as Case

# In an output with fewer elements, rounding errors do not average out, so its RMS error varies too much.
MIN_ELEMENTS = 100


def draw_case(
    rng: random.Random,
    *,
    longest: int = 6,
    beyond: int = 3,
    most: int = 3,
    head_dims: Sequence[int] = range(1, 41),
    tokens: int = MAX_WINDOW_VOLUME,
    cosine: bool = True,
    small_cosine: bool = False,
) -> Case:
    """Draw a case with windows of up to ``longest`` tokens per axis and ``tokens`` tokens, maps of up to two windows
    plus ``beyond`` tokens per axis, and up to ``most`` images and heads.

    Without ``cosine``, no case has cosine attention (v2). Unless ``small_cosine`` is set, cosine attention has windows
    of 16 tokens or more, maps at least as long as the window on each axis, and heads of four channels or more.
    """
    rank = rng.randint(2, 3)
    has_logit_scale = rng.random() < 0.5 and cosine
    is_large = has_logit_scale and not small_cosine
    shortest, window = 6 - rank if is_large else 1, ()
    for axis in range(rank):
        left = tokens // (math.prod(window) * shortest ** (rank - 1 - axis))  # for this axis, if later ones are short
        window += (rng.randint(shortest, min(longest, left)),)
    key_window = tuple(w + 2 * rng.randint(0, 2) for w in window)
    has_key_window = rng.randint(0, 4) == 0 and key_window != window and math.prod(key_window) <= MAX_WINDOW_VOLUME
    grid = rng.randint(0, 3) == 0 and not has_key_window
    shift = (0,) * rank if grid or has_key_window else tuple(rng.randint(0, w - 1) for w in window)
    size = tuple(rng.randint(w if is_large else 1, 2 * w + beyond) for w in window)
    num_windows = tuple(-(-s // w) for s, w in zip(size, window, strict=True))
    types = [n for n in range(1, 28) if math.prod(num_windows) % n == 0]
    before = tuple(rng.randint(0, -s % w) for s, w in zip(size, window, strict=True))
    regions = "shift" if has_key_window else rng.choice(["shift", "shift", "periodic", "map"])
    kinds = ["none", "table", "dense", "types"]
    kinds += (
        [] if has_key_window else ["table_window", "table_pairs", *([] if has_logit_scale else ["axis_tables"] * 2)]
    )
    bias = rng.choice(kinds)
    bias_types = {"dense": 0, "types": rng.choice(types)}

    options = {"pad_order": rng.choice(["pad_then_roll", "roll_then_pad"])}
    if grid:
        options["grid"] = True
    if any(before):
        options["pad_before"] = before
    if has_key_window:
        options["key_window"] = key_window
    if regions == "periodic":
        joined = ends_that_may_meet(size, window, shift, options["pad_order"])
        options["periodic"] = tuple(rng.random() < 0.5 and may for may in joined)
    if regions == "map":
        frame = tuple(n * w for n, w in zip(num_windows, window, strict=True))
        options["region_map"] = torch.arange(math.prod(frame), dtype=torch.int32).reshape(frame) * 7919 % 3 - 1
    if bias == "table_window":
        options["table_window"] = tuple(w + rng.randint(0, 2) for w in window)
    if bias == "table_pairs":
        options["table_pairs"] = tuple(rng.random() < 0.7 for _ in window)
    if rng.random() < 0.5:
        options["mask_value"] = rng.choice([-2.0, 1.5])
    if not has_logit_scale and rng.random() < 0.5:
        options["scale"] = rng.choice([0.7, -0.3])
    has_table = bias in ("table", "table_window", "table_pairs")
    return Case(
        rng.randint(1, most),
        size,
        rng.randint(1, most),
        rng.choice([d for d in head_dims if d >= 4 or not is_large]),
        window,
        shift,
        has_table=has_table,
        has_pad_qkv=rng.random() < 0.5,
        has_logit_scale=has_logit_scale,
        bias_types=bias_types.get(bias),
        options=options,
        has_axis_tables=bias == "axis_tables",
        table_types=rng.choice(types) if has_table and rng.random() < 0.3 else None,
    )


def ends_that_may_meet(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], pad_order: str
) -> tuple[bool, ...]:
    """Return, for each axis, whether it may be periodic: no pad tokens may separate its last and first tokens."""
    return tuple(
        s == 0 or n % w == 0 or pad_order == "roll_then_pad" for n, w, s in zip(size, window, shift, strict=True)
    )


def elements(case: Case) -> int:
    """Return the number of elements in the output of ``case``."""
    return case.batch * math.prod(case.size) * case.num_heads * case.head_dim


def with_enough_images(case: Case, min_rows: int = 1) -> Case:
    """Return ``case`` with as many images as its output needs for MIN_ELEMENTS elements and ``min_rows`` rows."""
    rows = math.prod(case.size) * case.num_heads
    batch = max(case.batch, -(-MIN_ELEMENTS // (rows * case.head_dim)), -(-min_rows // rows))
    return dataclasses.replace(case, batch=batch)


@st.composite
def cases(draw, **limits) -> Case:
    """Draw cases as :func:`draw_case` does with ``limits``, but with Hypothesis, which shrinks a failing case."""
    return with_enough_images(draw_case(draw(st.randoms(use_true_random=False)), **limits))


def all_ops() -> set[str]:
    """Return the names of this package's ops that have a tensor argument."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("swinkernels::")]
    return {s.name.partition("::")[2] for s in schemas if any(str(a.type) == "Tensor" for a in s.arguments)}
