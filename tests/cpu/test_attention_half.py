"""Tests the C++ kernel of a block's attention half, and which calls of the public function it computes."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import swinkernels
from swinkernels import _extension, reference
from swinkernels.ops import _fused_linear
from swinkernels.testing import assert_within_budget
from tests.support import instruction_sets
from tests.support.fused_products import computed_by_layers, fused_calls

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

OP = torch.ops.swinkernels.fused_attention_half


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(cast(t, dtype) for t in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of attention_half except its tensors, and which tensors there are."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    channels: int = 24
    heads: int = 3
    head_dim: int = 8
    batch: int = 2
    norm: str = "pre"
    residual: bool = True
    separate: bool = False  # three weights for q, k and v
    has_biases: bool = True
    has_norm_parameters: bool = True
    bias: str = "table"  # or "dense", "types" (of windows) or ""
    is_cosine: bool = False
    is_masked: bool = False  # by a region map
    others: tuple[tuple[str, Any], ...] = ()

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional arguments of attention_half and its keyword arguments, with tensors of a dtype."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        width, windows, volume, rows = self.heads * self.head_dim, 1, 1, 1
        for s, w in zip(self.size, self.window, strict=True):
            windows, volume, rows = windows * -(-s // w), volume * w, rows * (2 * w - 1)
        qkv = [draw(width, self.channels) / self.channels**0.5 for _ in range(3)]
        biases = (draw(3 * width), draw(self.channels)) if self.has_biases else (None, None)
        of_norm = (draw(self.channels), draw(self.channels)) if self.has_norm_parameters else (None, None)
        positional = [
            draw(self.batch, *self.size, self.channels) + 0.5, *of_norm,
            tuple(qkv) if self.separate else torch.cat(qkv), biases[0],
            draw(self.channels, width) / width**0.5, biases[1],
            draw(rows, self.heads) if self.bias == "table" else None,
        ]  # fmt: skip
        options: dict[str, Any] = {
            "num_heads": self.heads, "window_size": self.window, "norm": self.norm, "residual": self.residual,
            **dict(self.others),
        }  # fmt: skip
        if self.bias in ("dense", "types"):
            types = (windows,) if self.bias == "types" else ()
            options["bias"] = draw(*types, self.heads, volume, volume)
        if self.is_cosine:
            options["logit_scale"] = draw(self.heads) + 2
        if self.is_masked:
            frame = [-(-s // w) * w for s, w in zip(self.size, self.window, strict=True)]
            options["region_map"] = torch.randint(3, frame, generator=generator, dtype=torch.int32)
        return [cast(t, dtype) for t in positional], {name: cast(t, dtype) for name, t in options.items()}

    def __str__(self) -> str:
        fields = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields).replace(" ", "")


SHIFTED = (("shift_size", 3),)
CASES = [
    Case((14, 21), (7, 7), others=SHIFTED),
    Case((14, 21), (7, 7), norm="post", is_cosine=True, heads=2, head_dim=16, others=SHIFTED),
    Case((14, 21), (7, 7), is_cosine=True),
    Case((16, 16), (8, 8), channels=96, head_dim=32, others=(("shift_size", 4),)),
    Case((13, 17), (5, 6), channels=20, head_dim=5, others=(("shift_size", (2, 0)),)),
    Case((13, 17), (5, 6), norm="post", separate=True, residual=False, others=(("pad_order", "roll_then_pad"),)),
    Case((9, 9), (4, 4), has_biases=False, has_norm_parameters=False, others=(("pad_before", 1),)),
    Case((12, 12), (12, 12), heads=2, others=(("mask_value", -torch.inf), ("shift_size", (6, 0)))),
    Case((32, 16), (16, 16), heads=1, is_cosine=True, channels=33, head_dim=33),
    Case((4, 6, 9), (2, 4, 3), others=(("shift_size", (1, 2, 1)),), separate=True),
    Case((7, 7, 8), (7, 7, 7), channels=16, heads=2, head_dim=8, norm="post"),
    Case((6, 8), (2, 4), bias="types", residual=False),
    Case((6, 8), (3, 4), bias="dense", has_biases=False),
    Case((6, 8), (3, 4), bias="", others=(("grid", True), ("scale", 0.7))),
    Case((7, 9), (3, 4), is_masked=True, bias="dense", norm="post", has_norm_parameters=False),
    Case((5, 5), (1, 1), channels=1, heads=1, head_dim=1, norm="post"),
    Case((6, 12), (3, 3), others=(("shift_size", 1), ("periodic", (False, True)))),
    Case((4, 4), (2, 2), channels=5, heads=7, head_dim=3),
    Case((4, 4), (2, 2), channels=40, heads=1, head_dim=3, batch=1),
]


either = pytest.mark.parametrize("by_layers", [False, True], ids=["one pass", "by layers"])


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def as_double(x: Any) -> Any:
    return cast(x, torch.float64)


def run(positional: list[Any], options: dict[str, Any], kernels: bool = True, by_layers: bool = False) -> Tensor:
    """Call attention_half without gradients: with the op, for any number of windows, or without it."""
    with (
        torch.no_grad(),
        mock.patch.object(_fused_linear, "_has_kernels", return_value=kernels),
        computed_by_layers(by_layers),
    ):
        return swinkernels.attention_half(*positional, **options)


@dtypes
@either
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case: Case, by_layers: bool, dtype: torch.dtype) -> None:
    positional, options = case.tensors(dtype=dtype)
    with fused_calls() as called:
        y = run(positional, options, by_layers=by_layers)
    has_pairs, has_few = case.channels % 2 == 0 and case.head_dim % 2 == 0, case.is_cosine and case.head_dim < 16
    if dtype == torch.float32 or (has_pairs and not has_few):
        assert called == ["swinkernels::fused_attention_half"] * 2
    else:
        assert "swinkernels::fused_attention_half" not in called
    weight = positional[3]
    wide = [as_double(torch.cat(weight) if isinstance(t, tuple) else t) for t in positional]
    exact = reference.attention_half(*wide, **{name: as_double(value) for name, value in options.items()})
    if dtype == torch.float32:
        assert torch.equal(y, run(positional, options, by_layers=not by_layers))
    if y.numel() >= 500:
        assert_within_budget(y, exact, lambda: run(positional, options, kernels=False))
    else:  # too few results to compare mean errors
        low, high = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 2**-5)
        torch.testing.assert_close(y.double(), exact, rtol=low, atol=high)


@dtypes
@either
def test_results_do_not_depend_on_threads_or_other_images(by_layers: bool, dtype: torch.dtype) -> None:
    """The number of windows in a group, and thus each row's place in a panel, depends on threads and batch."""
    before = torch.get_num_threads()
    # 24 windows of 49 tokens, 32 of 64 and 27 of 30; with one thread, the last group of the latter has fewer windows.
    for case in (dataclasses.replace(CASES[i], batch=batch) for i, batch in ((0, 4), (1, 4), (3, 8), (4, 3))):
        positional, options = case.tensors(dtype=dtype)
        x, *rest = positional
        try:
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(run(positional, options, by_layers=by_layers))
                alone = [run([one, *rest], options, by_layers=by_layers) for one in x.split(1)]
                assert torch.equal(torch.cat(alone), results[0])
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def behind_an_offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@dtypes
@either
@pytest.mark.parametrize(
    "placed", [every_second, behind_an_offset, lambda x: x.transpose(0, -1).clone().transpose(0, -1)]
)
def test_any_strides(placed: Any, by_layers: bool, dtype: torch.dtype) -> None:
    for case in (Case((13, 9), (4, 4), others=(("shift_size", 2),)), Case((8, 8), (4, 4), bias="dense", separate=True)):
        positional, options = case.tensors(dtype=dtype)
        expected = run(positional, options, by_layers=by_layers)
        others = {name: placed(value) if isinstance(value, Tensor) else value for name, value in options.items()}
        for weights in ((), (3, 5)):  # those left in place, because torch's functions run on strided weights
            moved = [
                t if i in weights or t is None else tuple(map(placed, t)) if isinstance(t, tuple) else placed(t)
                for i, t in enumerate(positional)
            ]
            with fused_calls() as called:
                y = run(moved, others, by_layers=by_layers)
            assert y.is_contiguous()
            if weights:
                assert "swinkernels::fused_attention_half" in called
            if placed is behind_an_offset or weights:
                assert torch.equal(y, expected)
            elif dtype == torch.float32:
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            else:
                torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-5)
        cut = [torch.cat([positional[0], positional[0]], -1)[..., :24], *positional[1:]]  # rows are 48 apart
        assert torch.equal(run(cut, options, by_layers=by_layers), expected)


@dtypes
@either
def test_special_values(by_layers: bool, dtype: torch.dtype) -> None:
    """NaN and infinities affect only the windows that contain them, and huge scores do not overflow."""
    positional, options = CASES[0].tensors(dtype=dtype)
    expected = run(positional, options, by_layers=by_layers)
    x = positional[0]
    x[0, 3, 3, 5], x[1, 13, 20, 0] = torch.nan, torch.inf  # with a shift of 3, in windows of rows and columns 3-9, ...
    y = run(positional, options, by_layers=by_layers)
    assert y[0, 3:10, 3:10].isnan().all()
    assert torch.equal(y[0, 10:], expected[0, 10:])
    assert torch.equal(y[1, 3:10, 3:17], expected[1, 3:10, 3:17])
    positional, options = CASES[0].tensors(dtype=dtype)
    for row, column in ((3, 10), (3, 17), (10, 3), (10, 10)):  # the first token of a window that follows another one
        given = [positional[0].clone(), *positional[1:]]
        given[0][0, row, column, 1] = torch.nan
        exact = reference.attention_half(*map(as_double, given), **options)
        assert torch.equal(run(given, options, by_layers=by_layers).isnan(), exact.isnan())
    positional, options = CASES[0].tensors(dtype=dtype)
    positional[3] = positional[3] * 1e4
    exact = reference.attention_half(*map(as_double, positional), **options)
    y = run(positional, options, by_layers=by_layers)
    if dtype == torch.float32:
        assert (y - exact).abs().max() < 1e-6 * exact.abs().max()
    else:  # rounding q and k changes which score of a row is the largest
        assert y.isfinite().all()


@either
def test_special_values_of_the_bias(by_layers: bool) -> None:
    """A NaN with any payload stays NaN, and a key with a bias of -inf has no weight, in both ways of bfloat16."""
    positional, options = Case((8, 8), (4, 4), bias="dense").tensors(dtype=torch.bfloat16)
    options["bias"] = options["bias"].float()
    for bits in (0x7F800001, 0x7FC00000, 0x7FC00001, -0x3FFFFF):
        broken = options["bias"].clone()
        broken[..., 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert run(positional, {**options, "bias": broken}, by_layers=by_layers).isnan().all()
    options["bias"][..., 5] = -torch.inf
    options["norm"], (x, *rest) = "post", positional
    huge = x.clone()
    huge[:, 1::4, 1::4] *= 2.0**100  # the sixth token of each window
    one, other = (run([each, *rest], options, by_layers=by_layers) for each in (x, huge))
    others = torch.ones(8, 8, dtype=torch.bool)
    others[1::4, 1::4] = False
    assert torch.equal(one[:, others], other[:, others])


@either
def test_an_empty_batch(by_layers: bool) -> None:
    positional, options = CASES[0].tensors()
    positional[0] = positional[0][:0]
    assert run(positional, options, by_layers=by_layers).shape == (0, 14, 21, 24)


# x, q, k, v, qkv bias, proj, proj bias, norm weight, norm bias, bias table, bias, logit_scale and region map, and the
# other arguments of the op
def arguments_of_op() -> list[Any]:
    positional, options = Case((8, 12), (4, 4), separate=True, is_cosine=True, is_masked=True).tensors()
    x, norm_weight, norm_bias, qkv, qkv_bias, *proj, table = positional
    tables = [table, None, options["logit_scale"], options["region_map"][None]]
    return [
        x, *qkv, qkv_bias, *proj, norm_weight, norm_bias, *tables, "window_size=4,4", 1.0, -100.0, 3, True, "pre", 1e-5,
        False,
    ]  # fmt: skip


@pytest.mark.parametrize("index", [i for i in range(13) if i != 10])
def test_freed_memory(index: int) -> None:
    """A tensor whose memory was freed, as sharding and offloading do with parameters, raises an error."""
    arguments = arguments_of_op()
    arguments[index] = arguments[index].clone()
    arguments[index].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        OP(*arguments)


@pytest.mark.parametrize(
    ("index", "change", "words"),
    [
        ((5, 6), lambda t: t[:-1], "as many channels as x"),
        (0, lambda x: x.double(), "need a map in float32 or bfloat16"),
        (0, lambda x: x.half(), "need a map in float32 or bfloat16"),
        (0, lambda x: x.bfloat16(), "all of the map's dtype"),
        (1, lambda q: q[:-1], "one value for each row"),
        (range(9), lambda t: t.bfloat16()[..., 1:], "must be even, got 23"),
        (1, lambda q: q[:, 1:], "as many columns"),
        (2, lambda k: None, "come together"),
        (3, lambda v: v[:-1], "same number of channels"),
        (4, lambda bias: bias[:-1], "one value for each row"),
        (5, lambda proj: proj[:-1], "one value for each row"),
        (5, lambda proj: proj.half(), "need float32"),
        (7, lambda weight: weight[1:], "one value for each channel"),
        (9, lambda table: table[1:], "bias_table must be"),
        (11, lambda scale: scale[1:], "logit_scale must be"),
        (12, lambda regions: regions[..., 1:], "region_map must be"),
        (13, lambda wire: wire + ";key_window=6,6", "no axis_tables and no key window"),
        (16, lambda heads: 5, "num_heads"),
        (16, lambda heads: 0, "num_heads"),
        (18, lambda norm: "both", "norm must be"),
    ],
)
def test_wrong_arguments(index: int | tuple[int, ...] | range, change: Any, words: str) -> None:
    arguments = arguments_of_op()
    for i in (index,) if isinstance(index, int) else index:
        arguments[i] = change(arguments[i])
    with pytest.raises(RuntimeError, match=words):
        OP(*arguments)


def test_opcheck_and_no_derivative() -> None:
    names = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP.default, tuple(arguments_of_op()), test_utils=names)
    arguments = arguments_of_op()
    arguments[5].requires_grad_()
    with pytest.raises(NotImplementedError, match="no derivative"):
        OP(*arguments).sum().backward()


def test_which_calls_are_by_layers() -> None:
    """Those of few windows or many channels. In bfloat16, rounded maps between the layers show which way was taken."""
    before = torch.get_num_threads()
    least = 2 if torch.ops.swinkernels.cpu_instruction_set().endswith("amx") else 4
    try:
        for windows, threads, channels, expected in (
            (2 * least, 2, 64, False), (2 * least - 1, 2, 64, True), (2 * least - 1, 1, 64, False),
            (least - 1, 1, 64, True), (8, 1, 768, False), (8, 1, 770, True),
        ):  # fmt: skip
            torch.set_num_threads(threads)
            case = Case((4, 4 * windows), (4, 4), channels=channels, batch=1)
            given = case.tensors(dtype=torch.bfloat16)
            ways = [run(*given, by_layers=way) for way in (False, True)]
            assert not torch.equal(*ways)
            with mock.patch.object(_fused_linear, "_has_kernels", return_value=True), torch.no_grad():
                assert torch.equal(swinkernels.attention_half(*given[0], **given[1]), ways[expected])
    finally:
        torch.set_num_threads(before)


def test_layers_of_many_images() -> None:
    """With maps of more than 16 MiB between the layers, some images are computed at a time, and then the others."""
    for batch, size in ((5, (128, 128)), (2, (256, 256))):  # 2 MiB and 8 MiB for each of 4 maps of an image
        positional, options = Case(size, (8, 8), channels=32, heads=4, batch=batch, others=SHIFTED).tensors()
        x, *rest = positional
        y = run(positional, options, by_layers=True)
        alone = [run([one, *rest], options, by_layers=True) for one in x.split(1)]
        assert torch.equal(torch.cat(alone), y)
        torch.testing.assert_close(y, run(positional, options), rtol=1e-4, atol=1e-5)


def is_one_op(positional: list[Any], options: dict[str, Any]) -> bool:
    with mock.patch.object(_fused_linear, "_has_kernels", return_value=True), torch.no_grad(), fused_calls() as called:
        swinkernels.attention_half(*positional, **options)
    return "swinkernels::fused_attention_half" in called


def test_which_calls_are_one_op() -> None:
    case = Case((32, 32), (4, 4))
    positional, options = case.tensors()
    assert is_one_op(positional, options)
    assert is_one_op(positional, {**options, "backend": "cpu"})
    assert is_one_op(positional, {**options, "layer_scale": torch.ones(24)})
    for other in (
        {"backend": "torch"},
        {"drop_path_scale": torch.ones(2)},
        {"dropout_p": 0.5},
        {"key_window": 6},
        {"axis_tables": [torch.randn(7, 8), torch.randn(7, 8)]},
    ):
        has_table = not {"axis_tables", "key_window"} & {*other}
        given = [*positional[:-1], positional[-1] if has_table else None]
        assert not is_one_op(given, {**options, **other}), other
    assert is_one_op(*Case((32, 32), (4, 4), channels=1024, heads=2, head_dim=2).tensors())
    for i, value in ((3, positional[3].t().contiguous().t()), (1, positional[1].double())):
        assert not is_one_op([*positional[:i], value, *positional[i + 1 :]], options)
    assert is_one_op([*positional[:7], positional[7].double()], options)  # the tables are converted
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one_op(positional, options)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_one_op(positional, options)
    assert is_one_op(*case.tensors(dtype=torch.bfloat16))
    assert not is_one_op(*case.tensors(dtype=torch.float16))
    with fused_calls() as called:
        y = swinkernels.attention_half(positional[0].requires_grad_(), *positional[1:], **options)
    assert y.requires_grad
    assert "swinkernels::fused_attention_half" not in called


def test_post_norm_with_layer_scale() -> None:
    for norm in ("pre", "post"):
        positional, options = dataclasses.replace(CASES[0], norm=norm).tensors()
        options["layer_scale"] = torch.linspace(-1, 2, 24)
        torch.testing.assert_close(
            run(positional, options), run(positional, options, kernels=False), rtol=1e-4, atol=2e-5
        )


def test_a_replaced_layer_norm_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    positional, options = Case((32, 32), (4, 4)).tensors()
    published, unchanged = torch.nn.functional.layer_norm, run(positional, options)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *args: 2 * published(*args))
    y = run(positional, options)
    torch.testing.assert_close(y, run(positional, options, kernels=False), rtol=1e-4, atol=1e-5)
    assert (y - unchanged).abs().max() > 0.1


@pytest.mark.parametrize("name", instruction_sets.SETS)
def test_instruction_set(name: str) -> None:
    code = """
from tests.cpu import test_attention_half as tests
for dtype in (torch.float32, torch.bfloat16):
    for by_layers in (False, True):
        for case in tests.CASES:
            tests.test_results(case, by_layers, dtype)
        tests.test_results_do_not_depend_on_threads_or_other_images(by_layers, dtype)
        tests.test_special_values(by_layers, dtype)
"""
    instruction_sets.check_with(name, code)
