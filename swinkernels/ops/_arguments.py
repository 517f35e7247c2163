"""Argument checks shared by the ops and independent of the backend."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from swinkernels.ops._library import autocast_dtype
from swinkernels.window_spec import WindowSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REGION_DTYPES = (torch.int32, torch.int16, torch.int8, torch.uint8)  # kernels compare regions as int32
PAD_ORDERS = ("pad_then_roll", "roll_then_pad")
MAX_WINDOW_VOLUME = 1024
MAX_AXIS_TABLES_VOLUME = 4096  # with axis_tables: enough for global attention over 1024 x 1024 images in patches of 16
MAX_HEAD_DIM = 128
MAX_ELEMENTS = 2**63 - 1
LARGEST_FLOAT = torch.finfo(torch.float32).max  # limit of numbers that multiply float32 scores or are added to them
# Kernels add this finite number for a mask_value of -inf: a masked key still gets probability exactly 0, and a tile
# that has only masked keys produces no NaN.
MASKED_OUT = -(2.0**125)

Ints = int | Sequence[int]


def why_beyond_limits(head_dim: int, window: Sequence[int] = ()) -> str | None:
    """Return the reason, for a report, why the op rejects ``head_dim`` or ``window``, or None if it accepts them."""
    if head_dim > MAX_HEAD_DIM:
        return f"its heads have {head_dim} channels, and the op accepts at most {MAX_HEAD_DIM}"
    volume = math.prod(window)
    if volume > MAX_WINDOW_VOLUME:
        return f"its windows have {volume} tokens, and the op accepts at most {MAX_WINDOW_VOLUME}"
    return None


def frame_size(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Return ``size`` rounded up to a multiple of ``window`` on each axis."""
    return tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))


def _shape(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def _index(value: Any) -> int | None:
    """Convert an integer of any type, including NumPy's, to int; return None for a bool or any other value.

    A compiler's symbolic int becomes a constant of the compiled code, because window sizes and heads select the kernel.
    """
    try:
        return None if isinstance(value, (bool, Tensor)) else operator.index(value)
    except TypeError:
        return None


def _is_symbolic_or_int(value: Any) -> bool:
    """Return True for an int or a symbolic int, without converting it, so a symbolic int stays symbolic."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def per_axis_ints(op: str, name: str, value: Any, rank: int) -> tuple[int, ...]:
    if type(value) is int:  # a fast path for the usual case
        return (operator.index(value),) * rank
    given = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,) * rank
    indices = [_index(x) for x in given]
    values = tuple([v for v in indices if v is not None])
    if len(values) != len(given):
        raise TypeError(f"{op}: {name} must be an int or one int per axis, got {value!r}")
    if len(values) != rank:
        raise ValueError(f"{op}: {name} must have one value for each of the {rank} axes of the map, got {value!r}")
    return values


def per_axis_bools(op: str, name: str, value: Any, rank: int) -> tuple[bool, ...]:
    if type(value) is bool:
        return (value,) * rank
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    if not all(isinstance(v, bool) for v in values):
        raise TypeError(f"{op}: {name} must be a bool or one bool per axis, got {value!r}")
    if len(values) != rank:
        raise ValueError(f"{op}: {name} must have one value for each of the {rank} axes of the map, got {value!r}")
    return values


def finite(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:  # dynamo cannot trace math.isfinite of a symbolic float
        raise ValueError(f"{op}: {name} must be a finite float32 number, got {value!r}")
    return float(value)


def mask_number(op: str, value: Any) -> float:
    """Check ``mask_value`` and return the finite number that kernels add to masked scores."""
    if isinstance(value, float) and value == -math.inf:
        return MASKED_OUT
    if isinstance(value, (int, float)) and not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise ValueError(f"{op}: mask_value must be a finite float32 number or -inf, got {value!r}")
    return finite(op, "mask_value", value)


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{op}: all tensors must be on the same device, got {name} on {value.device} and the map on {device}"
        )


def check_tensor(op: str, name: str, value: Any, device: torch.device, *, floating: bool = True) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    check_device(op, name, value, device)
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {value.layout}")
    if floating and value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    if not floating and value.dtype not in REGION_DTYPES:
        raise TypeError(f"{op}: {name} must be int32, int16, int8 or uint8, got {value.dtype}")


def check_qkvpacked(op: str, qkv: Any, num_heads: Any) -> Tensor:
    """Check qkv and return it as (B, *S, 3, num_heads, head_dim)."""
    _check_map(op, "qkv", qkv)
    check_count(op, "num_heads", num_heads)
    if qkv.dim() in (4, 5):
        if qkv.shape[-1] % (3 * num_heads) != 0 or qkv.shape[-1] == 0:
            raise ValueError(
                f"{op}: the last axis of qkv must be 3 * num_heads * head_dim, a multiple of {3 * num_heads} for "
                f"num_heads={num_heads}, got {qkv.shape[-1]} ({_shape(qkv)})"
            )
        return qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    if qkv.dim() not in (6, 7):
        raise ValueError(
            f"{op}: qkv must be (B, *S, 3C) or (B, *S, 3, num_heads, head_dim) with S = (H, W) or (D, H, W), "
            f"got {_shape(qkv)}"
        )
    if qkv.shape[-3] != 3 or qkv.shape[-2] != num_heads:
        raise ValueError(
            f"{op}: the last axes of qkv must be (3, num_heads, head_dim) with num_heads={num_heads}, got {_shape(qkv)}"
        )
    return qkv


def check_separate(op: str, q: Any, k: Any, v: Any, num_heads: Any) -> None:
    """Check that q, k and v are (B, *S, num_heads, head_dim) and have the same shape, dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_map(op, name, x)
        if x.dim() not in (5, 6):
            raise ValueError(
                f"{op}: {name} must be (B, *S, num_heads, head_dim) with S = (H, W) or (D, H, W), got {_shape(x)}"
            )
        if x.shape != q.shape:
            raise ValueError(f"{op}: q, k and v must have the same shape, got q {_shape(q)} and {name} {_shape(x)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: q, k and v must have the same dtype, got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(
                f"{op}: all tensors must be on the same device, got q on {q.device} and {name} on {x.device}"
            )
    check_count(op, "num_heads", num_heads)
    if q.shape[-2] != num_heads:
        raise ValueError(
            f"{op}: num_heads must be the size of the last axis but one of q, {q.shape[-2]} ({_shape(q)}), "
            f"got {num_heads}"
        )


def check_count(op: str, name: str, value: Any, *, at_least: int = 1) -> int:
    """Check an integer count, such as ``num_heads``."""
    count = value if _is_symbolic_or_int(value) else _index(value)
    if count is None:
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if count < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {value}")
    return count


def _check_map(op: str, name: str, x: Any, *, floating: bool = True) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if floating and x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {x.layout}")


def check_features(op: str, name: str, x: Any, *, floating: bool = True) -> None:
    """Check a feature map (B, *S, C)."""
    _check_map(op, name, x, floating=floating)
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: {name} must be (B, *S, C) with S = (H, W) or (D, H, W), got {_shape(x)}")
    if any(s < 1 for s in x.shape[1:]):
        raise ValueError(f"{op}: every axis of {name} but the batch must have at least one element, got {_shape(x)}")


def check_windows(op: str, windows: Any, size: Sequence[int], window: Sequence[int]) -> None:
    """Check the windows (B * num_windows, N, C) of maps with S = ``size``."""
    _check_map(op, "windows", windows, floating=False)
    n = math.prod(window)
    per_image = math.prod(frame_size(size, window)) // n
    if windows.dim() != 3 or windows.shape[1] != n or windows.shape[0] % per_image != 0 or windows.shape[2] < 1:
        raise ValueError(
            f"{op}: windows must be (B * {per_image}, {n}, C) for S = {tuple(size)} and window {tuple(window)}, "
            f"got {_shape(windows)}"
        )


def check_size(op: str, size: Any) -> tuple[int, ...]:
    """Check S, the size of a map in tokens per axis."""
    given = size if isinstance(size, (tuple, list, torch.Size)) else [None]
    tokens: list[Any] = [s if _is_symbolic_or_int(s) else _index(s) for s in given]
    counts = tuple(s for s in tokens if s is not None)
    if len(counts) != len(tokens):
        raise TypeError(f"{op}: size must be the map's number of tokens per axis, (H, W) or (D, H, W), got {size!r}")
    if len(counts) not in (2, 3) or any(s < 1 for s in counts):
        raise ValueError(f"{op}: size must be (H, W) or (D, H, W), each at least 1, got {tuple(size)}")
    return counts


def check_rows(op: str, name: str, x: Any, *, batched: bool = False) -> None:
    """Check the tokens to be normalised: (..., C), or (B, ..., C) if ``batched``."""
    _check_map(op, name, x)
    if x.dim() < 1 + batched or x.shape[-1] < 1:
        accepted = "(B, ..., C)" if batched else "(..., C)"
        raise ValueError(f"{op}: {name} must be {accepted} with at least one channel, got {_shape(x)}")


def check_weight(op: str, x: Tensor, weight: Any, *widths: int) -> None:
    """Check a Linear's weight (out, width), where ``widths`` lists the accepted input widths."""
    check_tensor(op, "weight", weight, x.device)
    if weight.dim() != 2 or weight.shape[1] not in widths or weight.shape[0] < 1:
        accepted = " or ".join(f"(out, {width})" for width in widths)
        raise ValueError(f"{op}: weight must be {accepted} for x of {_shape(x)}, got {_shape(weight)}")


def check_linear(op: str, x: Tensor, name: str, weight: Any, bias: Any, shape: tuple[int | None, int]) -> None:
    """Check the weight and the optional bias of the Linear ``name``.

    ``shape`` is (out, in); an ``out`` of None accepts any number of rows. Both parameters must have the dtype of x,
    except under autocast, which casts them.
    """
    parameters = {f"{name}_weight": weight} | ({} if bias is None else {f"{name}_bias": bias})
    for parameter, value in parameters.items():
        check_tensor(op, parameter, value, x.device)
        if value.dtype != x.dtype and autocast_dtype(x) is None:
            raise TypeError(
                f"{op}: {parameter} must have the dtype of x, {x.dtype}, got {value.dtype}: convert one of them, or "
                "use autocast"
            )
    rows, width = shape
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] != (rows or weight.shape[0]):
        expected = f"({rows or 'out'}, {width})"
        raise ValueError(f"{op}: {name}_weight must be {expected} for x of {_shape(x)}, got {_shape(weight)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{op}: {name}_bias must be ({weight.shape[0]},), one for each row of {name}_weight, got {_shape(bias)}"
        )


def check_dtype(op: str, dtype: Any, x: Tensor) -> torch.dtype:
    """Check the dtype requested for a result and return it; None means the dtype of x."""
    if dtype is None:
        return x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be float32, float16, bfloat16 or float64, got {dtype!r}")
    return dtype


def check_ints(op: str, name: str, value: Any, rank: int, *, at_least: int) -> tuple[int, ...]:
    """Check that ``value`` is an int or one int per axis, and return one int per axis."""
    values = per_axis_ints(op, name, value, rank)
    if any(v < at_least for v in values):
        raise ValueError(f"{op}: {name} must be at least {at_least} per axis, got {values}")
    return values


def check_factor(op: str, factor: Any, rank: int, name: str = "factor") -> tuple[int, ...]:
    """Check the factor by which a map grows or shrinks: an int or one int per axis."""
    return check_ints(op, name, factor, rank, at_least=1)


def check_parameters(op: str, x: Tensor, expected: tuple[int, ...], **parameters: Any) -> None:
    """Check that every parameter that is not None is a tensor of the expected shape."""
    for name, value in parameters.items():
        if value is None:
            continue
        check_tensor(op, name, value, x.device)
        if tuple(value.shape) != expected:
            raise ValueError(f"{op}: {name} must be {expected} for x of {_shape(x)}, got {_shape(value)}")


def check_eps(op: str, eps: Any) -> float:
    value = finite(op, "eps", eps)
    if value < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps!r}")
    return value


def check_choice(op: str, name: str, value: Any, accepted: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be one of {accepted}, got {value!r}")
    if value not in accepted:
        raise ValueError(f"{op}: {name} must be one of {accepted}, got {value!r}")


def check_window(op: str, window_size: Any, shift_size: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check ``window_size`` and ``shift_size``; return both with one value per axis."""
    window = per_axis_ints(op, "window_size", window_size, rank)
    if any(w < 1 for w in window):
        raise ValueError(f"{op}: window_size must be at least 1 per axis, got {window}")
    shift = per_axis_ints(op, "shift_size", shift_size, rank)
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"{op}: shift_size must be in 0..window_size - 1 per axis, got {shift} for window {window}")
    return window, shift


def check_roll(op: str, shift_size: Any, rank: int) -> tuple[int, ...]:
    """Check a cyclic shift: as for torch.roll, any number of tokens per axis, in either direction."""
    return per_axis_ints(op, "shift_size", shift_size, rank)


def check_forms(op: str, name: str, x: Any, *shapes: tuple[int, ...]) -> None:
    """Check a tensor of any dtype against the accepted shapes."""
    _check_map(op, name, x, floating=False)
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(str, shapes))}, got {_shape(x)}")


def make_window_spec(
    op: str,
    rank: int,
    head_dim: int,
    *,
    window_size: Ints,
    shift_size: Ints = 0,
    scale: float | None = None,
    table_window: Ints | None = None,
    pad_order: str = "pad_then_roll",
    pad_before: Ints = 0,
    periodic: bool | Sequence[bool] = False,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    grid: bool = False,
    key_window: Ints | None = None,
    table_pairs: bool | Sequence[bool] = False,
    tables: Mapping[str, Any] = MappingProxyType({}),
) -> WindowSpec:
    """Check the arguments of window attention's public functions for a map of ``rank`` axes and return their spec.

    ``tables`` contains the call's tensors by name; some of them cannot be combined with other arguments.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names ``op``, the value given and the values accepted.
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be 1..{MAX_HEAD_DIM}, got {head_dim}")
    window, shift = check_window(op, window_size, shift_size, rank)
    volume = math.prod(window)
    has_axis_tables = tables.get("axis_tables") is not None
    largest = MAX_AXIS_TABLES_VOLUME if has_axis_tables else MAX_WINDOW_VOLUME
    if volume > largest:
        raise ValueError(f"{op}: a window must have at most {largest} tokens, got window_size {window} with {volume}")
    before = per_axis_ints(op, "pad_before", pad_before, rank)
    check_choice(op, "pad_order", pad_order, PAD_ORDERS)
    wraps = per_axis_bools(op, "periodic", periodic, rank)
    if not isinstance(grid, bool):
        raise TypeError(f"{op}: grid must be a bool, got {grid!r}")
    if grid and any(shift):
        raise ValueError(f"{op}: shift_size must be 0 with grid=True, which has no shift, got {shift}")
    table = window if table_window is None else per_axis_ints(op, "table_window", table_window, rank)
    if table_window is not None and tables.get("bias_table") is None:
        raise ValueError(
            f"{op}: table_window must be None without the bias_table that it describes, got {table_window!r}"
        )
    pairs = per_axis_bools(op, "table_pairs", table_pairs, rank)
    bias_table = tables.get("bias_table")
    if any(pairs) and (bias_table is None or table != window):
        raise ValueError(
            f"{op}: table_pairs must be False without a bias_table that was made for window_size, got {table_pairs!r}"
        )
    if any(t < 1 for t in table):
        raise ValueError(f"{op}: table_window must be at least 1 per axis, got {table}")
    if math.prod(table) < volume:
        raise ValueError(
            f"{op}: table_window must be the window that bias_table was made for, with at least the {volume} "
            f"tokens of window_size {window}, got {table}"
        )
    if scale is not None and tables.get("logit_scale") is not None:
        raise ValueError(f"{op}: scale (v1) must be None with a logit_scale (v2), got {scale!r}")
    if has_axis_tables and tables.get("logit_scale") is not None:
        raise ValueError(f"{op}: axis_tables (for v1) must be None with a logit_scale (v2), got both")
    keys = window if key_window is None else per_axis_ints(op, "key_window", key_window, rank)
    if keys != window:
        beside = {"shift_size": any(shift), "periodic": any(wraps), "grid": grid, "table_pairs": any(pairs)}
        beside |= {name: tables.get(name) is not None for name in ("region_map", "axis_tables")}
        _check_key_window(op, window, keys, {**beside, "table_window": table_window is not None})
    p = finite(op, "dropout_p", dropout_p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in 0..1, got {p}")
    return WindowSpec(
        window_size=window,
        shift_size=shift,
        table_window=table,
        pad_before=before,
        periodic=wraps,
        key_window=keys,
        table_pairs=pairs,
        table_types=bias_table.shape[1] if isinstance(bias_table, Tensor) and bias_table.dim() == 3 else 1,
        pad_order=pad_order,
        grid=grid,
        axis_tables=has_axis_tables,
        scale=head_dim**-0.5 if scale is None else finite(op, "scale", scale),
        mask_value=mask_number(op, mask_value),
        dropout_p=p,
    )


def _check_key_window(
    op: str,
    window: tuple[int, ...],
    keys: tuple[int, ...],
    beside: Mapping[str, bool],
) -> None:
    """Check a key window that differs from the window; ``beside``: incompatible argument -> whether it is given."""
    if any(m < w or (m - w) % 2 for m, w in zip(keys, window, strict=True)):
        raise ValueError(
            f"{op}: key_window must be window_size plus an even number of tokens per axis, half of them on each side, "
            f"got {keys} for window_size {window}"
        )
    if math.prod(keys) > MAX_WINDOW_VOLUME:
        raise ValueError(
            f"{op}: a key window must have at most {MAX_WINDOW_VOLUME} tokens, got key_window {keys} with "
            f"{math.prod(keys)}"
        )
    given = [name for name, is_given in beside.items() if is_given]
    if given:
        raise ValueError(
            f"{op}: {' and '.join(given)} cannot be combined with a key_window larger than window_size, {window}; "
            f"got key_window {keys}"
        )


def axis_tables_of(op: str, axis_tables: Any) -> tuple[Any, ...]:
    """Check the container of the decomposed relative position tables, one per axis, and return them as a tuple."""
    if not isinstance(axis_tables, (tuple, list)):
        raise TypeError(
            f"{op}: axis_tables must be a tuple of one tensor for each axis of the map, got "
            f"{type(axis_tables).__name__}"
        )
    return tuple(axis_tables)


def _check_axis_tables(
    op: str, axis_tables: Any, window: tuple[int, ...], head_dim: int, device: torch.device, others: Mapping[str, Any]
) -> None:
    given = axis_tables_of(op, axis_tables)
    expected = [(2 * w - 1, head_dim) for w in window]
    if len(given) != len(window):
        raise ValueError(
            f"{op}: axis_tables must contain one table for each of the {len(window)} axes of the map, got {len(given)}"
        )
    for table in given:
        check_tensor(op, "axis_tables", table, device)
    if [tuple(table.shape) for table in given] != expected:
        raise ValueError(
            f"{op}: axis_tables must be (2 * window - 1, head_dim) per axis, {' and '.join(map(str, expected))} for "
            f"window_size {window}, got {' and '.join(str(tuple(table.shape)) for table in given)}: resize them first"
        )
    if len({table.dtype for table in given}) > 1:
        raise TypeError(f"{op}: axis_tables must have the same dtype, got {', '.join(str(t.dtype) for t in given)}")
    for name in ("bias_table", "bias"):
        if others.get(name) is not None:
            raise ValueError(f"{op}: {name} must be None with axis_tables, got both")


def check_window_call(
    op: str,
    spec: WindowSpec,
    tokens: Tensor,
    size: Sequence[int],
    num_heads: int,
    head_dim: int,
    tables: Mapping[str, Any],
) -> None:
    """Check the tensors of a call against its spec: the map of ``size`` tokens, its heads and the tables.

    Args:
        tokens: a tensor with the batch size and the device of the map.
        tables: bias_table, bias, logit_scale, pad_qkv, region_map and axis_tables by name, if given.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names ``op``, the value given and the values accepted.
    """
    size, window, n, m, device = tuple(size), spec.window_size, spec.volume, spec.key_volume, tokens.device
    if any(s < 1 for s in size):
        raise ValueError(f"{op}: every axis of the map must have at least one token, got S = {size}")
    frame = frame_size(size, window)
    # The largest tensors that a backend may allocate are the scores, with batch * windows * heads * N * M = batch *
    # frame * heads * M elements, and the padded q, k and v.
    elements = tokens.shape[0] * math.prod(frame) * num_heads * max(m, 3 * head_dim)
    if isinstance(elements, int) and elements > MAX_ELEMENTS:  # comparing a symbolic size would add a guard
        raise ValueError(
            f"{op}: the map is too large: neither the number of scores nor the number of elements of q, k and v "
            f"together may exceed 2**63 - 1 (int64), got shape {tuple(tokens.shape)} with window_size {window}; "
            "split the batch"
        )
    before = spec.pad_before
    if any(before) and any(not 0 <= b <= p - s for b, p, s in zip(before, frame, size, strict=True)):
        pads = tuple(p - s for p, s in zip(frame, size, strict=True))
        raise ValueError(
            f"{op}: pad_before must be in 0..padding per axis, where the padding is {pads} for S = {size} and window "
            f"{window}, got {before}"
        )
    if spec.pad_order == "pad_then_roll" and any(
        wraps and shift > 0 and s % w != 0
        for wraps, shift, s, w in zip(spec.periodic, spec.shift_size, size, window, strict=True)
    ):
        raise ValueError(
            f"{op}: a shifted periodic axis must consist of whole windows with pad_order='pad_then_roll', which would "
            f"pad between its last token and its first; got S = {size}, window {window} and periodic {spec.periodic}. "
            "Use pad_order='roll_then_pad', which pads after the cyclic shift; to mask the pad tokens, too, pass a "
            "region_map instead of periodic, and pad_before for padding on both sides (as in Aurora)"
        )
    bias_table, bias = tables.get("bias_table"), tables.get("bias")
    if bias_table is not None:
        check_tensor(op, "bias_table", bias_table, device)
        num_windows, types = math.prod(frame) // n, spec.table_types
        expected = (spec.table_rows, types, num_heads) if bias_table.dim() == 3 else (spec.table_rows, num_heads)
        if tuple(bias_table.shape) != expected:
            name, rows, decoded = "window_size", "2 * window - 1", spec.table_window
            if any(spec.table_pairs):
                rows = "window * window on axes with table_pairs, else 2 * window - 1"
            if spec.key_window != window:
                name, rows, decoded = "key_window", "window + key_window - 1", spec.key_window
            elif spec.table_window != window:
                name = "table_window"
            raise ValueError(
                f"{op}: bias_table must be (rows, num_heads) = ({spec.table_rows}, {num_heads}) or (rows, window "
                f"types, num_heads), with rows = prod({rows}) for {name} {decoded}, got shape {tuple(bias_table.shape)}"
            )
        if types < 1 or num_windows % types != 0:
            raise ValueError(
                f"{op}: the number of window types in bias_table must divide the {num_windows} windows of an image "
                f"(each type is for a run of consecutive windows), got shape {tuple(bias_table.shape)}"
            )
    if bias is not None:
        check_tensor(op, "bias", bias, device)
        if bias.dim() not in (3, 4) or tuple(bias.shape[-3:]) != (num_heads, n, m):
            keys, why = ("N", "") if spec.key_window == window else ("M", f" for key_window {spec.key_window}")
            raise ValueError(
                f"{op}: bias must be (num_heads, N, {keys}) = ({num_heads}, {n}, {m}) or (window types, num_heads, N, "
                f"{keys}){why}, got shape {tuple(bias.shape)}"
            )
        num_windows = math.prod(frame) // n
        if bias.dim() == 4 and (bias.shape[0] < 1 or num_windows % bias.shape[0] != 0):
            raise ValueError(
                f"{op}: the number of window types in bias must divide the {num_windows} windows of an image "
                f"(each type is for a run of consecutive windows), got shape {tuple(bias.shape)}"
            )
    if bias is not None and bias_table is not None:
        raise ValueError(
            f"{op}: bias must be None with a bias_table, got both: add the table's bias to the dense one first"
        )
    axis_tables = tables.get("axis_tables")
    if axis_tables is not None:
        _check_axis_tables(op, axis_tables, window, head_dim, device, tables)
    logit_scale, pad_qkv, region_map = (tables.get(name) for name in ("logit_scale", "pad_qkv", "region_map"))
    if logit_scale is not None:
        check_tensor(op, "logit_scale", logit_scale, device)
        if logit_scale.numel() != num_heads:
            raise ValueError(
                f"{op}: logit_scale must have one value per head ({num_heads}), got shape {tuple(logit_scale.shape)}"
            )
    if pad_qkv is not None:
        check_tensor(op, "pad_qkv", pad_qkv, device)
        if tuple(pad_qkv.shape) not in ((3 * num_heads * head_dim,), (3, num_heads, head_dim)):
            raise ValueError(
                f"{op}: pad_qkv must be (3C,) = ({3 * num_heads * head_dim},) or (3, num_heads, head_dim) = "
                f"(3, {num_heads}, {head_dim}), got shape {tuple(pad_qkv.shape)}"
            )
    if region_map is not None:
        check_tensor(op, "region_map", region_map, device, floating=False)
        if tuple(region_map.shape) != frame:
            raise ValueError(
                f"{op}: region_map must have the shape of the frame {frame} (S rounded up to whole windows), "
                f"got shape {tuple(region_map.shape)}"
            )
        if any(spec.periodic):
            raise ValueError(
                f"{op}: periodic must be False with a region_map, which replaces the regions of the shift, got "
                f"{spec.periodic}"
            )
