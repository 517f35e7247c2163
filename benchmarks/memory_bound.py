"""Compare the memory-bound ops, which move and normalise tokens, with eager PyTorch and torch.compile.

Every contestant is first compared with the float64 reference, on at most two images; see benchmarks/contest.py for the
timing. A dtype label names the dtypes that are read and written, such as "float32-bfloat16" under autocast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import swinkernels
from benchmarks import contest, peers, shapes
from benchmarks.shapes import MapCase
from benchmarks.timing import Call
from swinkernels import reference, testing
from swinkernels.ops import _backends

PEERS = ("eager", "eager-compiled")
PAIRS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
}
Pair = tuple[torch.dtype, torch.dtype]
Op = Callable[..., Any]  # (**tensors) -> a tensor or a tuple of tensors


@dataclasses.dataclass(frozen=True)
class Bench:
    """An op with its inputs, its contestants and the number of bytes to move."""

    implemented: str | None  # the key in IMPLEMENTED, or None for a torch op
    inputs: Callable[[MapCase, Pair], dict[str, tuple[tuple[int, ...], torch.dtype]]]  # name -> shape and dtype
    ours: Callable[[MapCase, Pair, str], Op]  # by backend
    peer: Callable[[MapCase, Pair], Op]
    exact: Callable[[MapCase], Op]  # the reference, which computes in the dtype of its inputs
    moved: Callable[[MapCase, Pair], tuple[int, int]]  # bytes moved forward and backward
    bare_backward: bool = True  # the backward pass is one op


def _tokens(case: MapCase) -> int:
    return case.batch * math.prod(case.size)


def _frame_tokens(case: MapCase) -> int:
    return case.batch * math.prod(-(-s // case.window) * case.window for s in case.size)


def _geometry(case: MapCase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (case.window,) * len(case.size), (case.shift,) * len(case.size)


def _map(case: MapCase) -> tuple[int, ...]:
    return (case.batch, *case.size, case.channels)


def _windows(case: MapCase) -> tuple[int, ...]:
    n = case.window ** len(case.size)
    return (_frame_tokens(case) // n, n, case.channels)


def _merged_tokens(case: MapCase) -> int:
    return case.batch * math.prod(-(-s // 2) for s in case.size)


def _merged_width(case: MapCase) -> int:
    return 2 ** len(case.size) * case.channels


def _order(case: MapCase) -> str:
    return "swin" if len(case.size) == 2 else "row_major"  # as in peers.gather_neighbours


def _merging_norm(case: MapCase, pair: Pair, backend: str) -> Op:
    """Return the internal op that gathers and normalises tokens in patch merging."""
    if backend == "reference":
        return lambda x, weight, bias: _exact_merging_norm(case)(x, weight, bias).to(pair[1])
    op = getattr(torch.ops.swinkernels, f"patch_merging_norm_fwd{'_triton' if backend == 'triton' else ''}")
    factor = [1] * (3 - len(case.size)) + [2] * len(case.size)
    neighbours = [0, 2, 1, 3] if _order(case) == "swin" else list(range(8))
    return lambda x, weight, bias: op(x, weight, bias, factor, neighbours, 1e-5, pair[1])[0]


def _exact_merging_norm(case: MapCase) -> Op:
    def merge(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        keep = torch.eye(_merged_width(case), dtype=x.dtype, device=x.device)
        return reference.patch_merging(x, weight, bias, keep, order=_order(case))

    return merge


def _merge(case: MapCase, pair: Pair) -> Op:
    def merge(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
        return F.linear(peers.layer_norm(peers.gather_neighbours(x), norm_weight, norm_bias, pair[1]), weight)

    return merge


def _norm_inputs(case: MapCase, pair: Pair, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"x": (_map(case), pair[0]), "weight": ((width,), pair[0]), "bias": ((width,), pair[0])}


def _residual_inputs(case: MapCase, pair: Pair) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {**_norm_inputs(case, pair, case.channels), "y": (_map(case), pair[1])}


def _add_then_norm(case: MapCase, pair: Pair) -> Op:
    def block(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = x + y
        return s, peers.layer_norm(s, weight, bias, pair[1])

    return block


def _drop_path_inputs(case: MapCase, pair: Pair) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {**_residual_inputs(case, pair), "drop_path_scale": ((case.batch,), torch.float32)}


def _drop_then_add_then_norm(case: MapCase, pair: Pair) -> Op:
    def block(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, drop_path_scale: Tensor) -> tuple[Tensor, Tensor]:
        scale = drop_path_scale.to(y.dtype).view(-1, *(1,) * (y.dim() - 1))  # not random, because results are compared
        return _add_then_norm(case, pair)(x, y * scale, weight, bias)

    return block


def _norm_then_add(case: MapCase, pair: Pair) -> Op:
    return lambda x, y, weight, bias: x + peers.layer_norm(y, weight, bias, pair[0])


def _bytes(case: MapCase, read: Sequence[torch.dtype], written: Sequence[torch.dtype]) -> int:
    """Return the bytes moved by reading a map for each dtype in ``read`` and writing one for each in ``written``."""
    return _tokens(case) * case.channels * sum(d.itemsize for d in (*read, *written))


def _post_norm_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    # The gradient of x equals the gradient of the sum, so it is not written.
    return _bytes(case, pair, pair[:1]), _bytes(case, pair, pair[1:])


def _residual_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    # The sum and the gradients of both results are read. If x and y have the same dtype, one tensor is the gradient of
    # both.
    gradients = pair[:1] if pair[0] == pair[1] else pair
    return _bytes(case, pair, pair), _bytes(case, (pair[0], pair[1], pair[0]), gradients)


def _drop_path_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    # The branch's gradient is scaled, so it is written in addition to the residual stream's gradient.
    return _bytes(case, pair, pair), _bytes(case, (pair[0], pair[1], pair[0]), pair)


def _norm_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    return _bytes(case, pair[:1], pair[1:]), _bytes(case, pair, pair[:1])


def _merging_norm_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    x, z = (_bytes(case, [d], []) for d in pair)
    z = z * _merged_tokens(case) * 2 ** len(case.size) // _tokens(case)  # including pad tokens
    return x + z, x + z + x


def _merging_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    """Return the bytes that patch merging moves, forward and backward: the gather, the norm and the Linear."""
    forward, backward = _merging_norm_moved(case, pair)
    z, out = (_merged_tokens(case) * w * pair[1].itemsize for w in (_merged_width(case), 2 * case.channels))
    return forward + z + out, backward + 2 * z + out


def _gemm_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    z, out = (_merged_tokens(case) * w * pair[1].itemsize for w in (_merged_width(case), 2 * case.channels))
    return z + out, out + 2 * z


def _partition_moved(case: MapCase, pair: Pair) -> tuple[int, int]:
    item = case.channels * pair[0].itemsize
    return (_tokens(case) + _frame_tokens(case)) * item, 2 * _tokens(case) * item


BENCHES: dict[str, Bench] = {
    "window_partition": Bench(
        "window_partition",
        lambda case, pair: {"x": (_map(case), pair[0])},
        lambda case, pair, b: lambda x: swinkernels.window_partition(x, *_geometry(case), backend=b),
        lambda case, pair: lambda x: peers.window_partition(x, *_geometry(case)),
        lambda case: lambda x: reference.window_partition(x, *_geometry(case)),
        _partition_moved,
    ),
    "window_reverse": Bench(
        "window_partition",
        lambda case, pair: {"windows": (_windows(case), pair[0])},
        lambda case, pair, b: (
            lambda windows: swinkernels.window_reverse(windows, case.window, case.size, _geometry(case)[1], backend=b)
        ),
        lambda case, pair: (
            lambda windows: peers.window_reverse(windows, _geometry(case)[0], case.size, _geometry(case)[1])
        ),
        lambda case: lambda windows: reference.window_reverse(windows, case.window, case.size, _geometry(case)[1]),
        lambda case, pair: _partition_moved(case, pair)[::-1],
    ),
    "patch_merging_norm": Bench(
        "patch_merging",
        lambda case, pair: _norm_inputs(case, pair, _merged_width(case)),
        _merging_norm,
        lambda case, pair: lambda x, weight, bias: peers.layer_norm(peers.gather_neighbours(x), weight, bias, pair[1]),
        _exact_merging_norm,
        _merging_norm_moved,
    ),
    "patch_merging": Bench(
        "patch_merging",
        lambda case, pair: {
            "x": (_map(case), pair[0]),
            "norm_weight": ((_merged_width(case),), pair[0]),
            "norm_bias": ((_merged_width(case),), pair[0]),
            "weight": ((2 * case.channels, _merged_width(case)), pair[1]),
        },
        lambda case, pair, b: (
            lambda x, norm_weight, norm_bias, weight: F.linear(
                _merging_norm(case, pair, b)(x, norm_weight, norm_bias), weight
            )
        ),
        _merge,
        lambda case: (
            lambda x, norm_weight, norm_bias, weight: reference.patch_merging(
                x, norm_weight, norm_bias, weight, order=_order(case)
            )
        ),
        _merging_moved,
        bare_backward=False,
    ),
    "patch_merging_gemm": Bench(  # the Linear alone, for comparison with the whole op
        None,
        lambda case, pair: {
            "z": ((_merged_tokens(case), _merged_width(case)), pair[1]),
            "weight": ((2 * case.channels, _merged_width(case)), pair[1]),
        },
        lambda case, pair, b: F.linear,
        lambda case, pair: lambda z, weight: F.linear(z, weight),
        lambda case: lambda z, weight: z @ weight.T,
        _gemm_moved,
        bare_backward=False,
    ),
    "layer_norm": Bench(
        "layer_norm",
        lambda case, pair: _norm_inputs(case, pair, case.channels),
        lambda case, pair, b: lambda x, weight, bias: swinkernels.layer_norm(x, weight, bias, dtype=pair[1], backend=b),
        lambda case, pair: lambda x, weight, bias: peers.layer_norm(x, weight, bias, pair[1]),
        lambda case: reference.layer_norm,
        _norm_moved,
    ),
    "patch_expanding": Bench(  # rearranges and normalises the Linear's output, in 2D
        "layer_norm",
        lambda case, pair: _norm_inputs(case, (pair[1], pair[1]), case.channels // case.factor**2),
        lambda case, pair, b: (
            lambda x, weight, bias: swinkernels.patch_expanding(x, None, weight, bias, factor=case.factor, backend=b)
        ),
        lambda case, pair: (
            lambda x, weight, bias: peers.layer_norm(peers.expand(x, case.factor), weight, bias, pair[1])
        ),
        lambda case: lambda x, weight, bias: reference.patch_expanding(x, None, weight, bias, factor=case.factor),
        lambda case, pair: _norm_moved(case, (pair[1], pair[1])),
    ),
    "residual_layer_norm": Bench(
        "residual_layer_norm",
        _residual_inputs,
        lambda case, pair, b: lambda x, y, weight, bias: swinkernels.residual_layer_norm(x, y, weight, bias, backend=b),
        _add_then_norm,
        lambda case: reference.residual_layer_norm,
        _residual_moved,
    ),
    "residual_layer_norm_drop_path": Bench(  # as in training: drops every fifth sample's branch and scales the others
        "residual_layer_norm",
        _drop_path_inputs,
        lambda case, pair, b: (
            lambda x, y, weight, bias, drop_path_scale: swinkernels.residual_layer_norm(
                x, y, weight, bias, drop_path_scale=drop_path_scale, backend=b
            )
        ),
        _drop_then_add_then_norm,
        lambda case: reference.residual_layer_norm,
        _drop_path_moved,
    ),
    "residual_post_norm": Bench(
        "residual_layer_norm",
        _residual_inputs,
        lambda case, pair, b: lambda x, y, weight, bias: swinkernels.residual_post_norm(x, y, weight, bias, backend=b),
        _norm_then_add,
        lambda case: reference.residual_post_norm,
        _post_norm_moved,
    ),
}


def cases(op: str) -> dict[str, MapCase]:
    """Return the shapes at which ``op`` is timed, by name."""
    if op == "patch_expanding":
        return shapes.EXPANDED_MAPS
    return {**shapes.MAP_GOALS, **(shapes.PADDED_MAPS if op in ("window_partition", "window_reverse") else {})}


def contestants(op: str, device: torch.device, wanted: Sequence[str] = ()) -> list[str]:
    """Return the contestants in ``wanted`` (all if empty) that can run ``op`` on ``device``."""
    implemented = BENCHES[op].implemented
    names = list(PEERS)
    if implemented is not None:
        fast = [] if device.type == "cpu" else [b for b in _backends.IMPLEMENTED[implemented] if b != "cpu"]
        ours = [b for b in fast if _backends.unavailable(b) is None]
        names = [*ours, *(["reference"] if device.type == "cpu" else []), *names]
    return [name for name in names if not wanted or name in wanted]


def make_op(op: str, name: str, case: MapCase, pair: Pair) -> Op:
    bench = BENCHES[op]
    if name not in PEERS:
        return bench.ours(case, pair, name)
    peer = bench.peer(case, pair)
    return torch.compile(peer, fullgraph=True, dynamic=False) if name.endswith("compiled") else peer


def draw(op: str, case: MapCase, pair: Pair, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    inputs = {}
    for name, (shape, dtype) in BENCHES[op].inputs(case, pair).items():
        x = torch.randn(shape, generator=generator, device=device)
        if name == "weight" and len(shape) == 2:  # keeps the Linear's output at the magnitude of its input
            x *= shape[1] ** -0.5
        if name == "drop_path_scale":  # p = 0.2
            x = torch.full(shape, 1.25, device=device)
            x[1::5] = 0
        inputs[name] = x.to(dtype)
    return inputs


def _several(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def draw_gradients(results: Iterable[Tensor], seed: int = 0) -> list[Tensor]:
    """Draw a random gradient for each result."""
    out = list(results)
    generator = torch.Generator(out[0].device).manual_seed(seed + 1000)
    return [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in out]


def run_once(op: Op, inputs: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run an op forward and backward; return its results and the gradients of its inputs."""
    leaves = contest.leaves_of(inputs)
    out = _several(op(**leaves))
    wanted = [g.to(x.dtype) for g, x in zip(gradients, out, strict=True)]
    differentiable = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(out, list(differentiable.values()), wanted)
    results = {f"out{i}": x.detach() for i, x in enumerate(out)}
    return results | {f"d{name}": g for name, g in zip(differentiable, grads, strict=True)}


def judge(
    op: str, name: str, case: MapCase, pair: Pair, device: torch.device
) -> tuple[bool, float, dict[str, testing.Judged]]:
    """Check results and gradients on at most two images.

    Returns whether they are correct, the worst RMS error in eps of the narrower dtype and, for our ops, a verdict on
    each result by the error budget of the tests. Ops that contain torch's Linear are exempt from this budget.
    """
    case = shapes.with_batch(case, 2)
    inputs = draw(op, case, pair, device)
    mine = make_op(op, name, case, pair)
    with torch.no_grad():  # run eagerly, only to get the shapes of the results
        gradients = draw_gradients(_several(make_op(op, "eager", case, pair)(**inputs)))
    got = run_once(mine, inputs, gradients)
    exact, single = (
        run_once(BENCHES[op].exact(case), {k: x.to(wide) for k, x in inputs.items()}, gradients)
        for wide in (torch.float64, torch.float32)
    )
    eps = max(torch.finfo(dtype).eps for dtype in pair)
    right, worst = contest.compare(got, exact, single, eps)
    judged = {}
    if name not in PEERS and BENCHES[op].bare_backward:
        for key, value in got.items():
            # In float32, cancellation in the norm's gradient causes an error of several eps.
            of_dtype = torch.finfo(value.dtype).eps * (4 if value.dtype == torch.float32 else 1)
            judged[key] = testing.judge(value, exact[key], single[key], eps=of_dtype, name=key)
        right = all(found.failure is None for found in judged.values())
    return right, worst, judged


def verify(op: str, name: str, case: MapCase, pair: Pair, device: torch.device) -> tuple[bool, float]:
    """Return whether a contestant is correct, and its worst RMS error in eps."""
    return judge(op, name, case, pair, device)[:2]


def benchmark(
    op: str, shape: str, case: MapCase, pair_name: str, device: torch.device, names: Iterable[str]
) -> list[dict[str, Any]]:
    """Return one row per contestant and direction."""
    pair = PAIRS[pair_name]
    drawn: list[dict[str, Tensor]] = []
    gradients: list[list[Tensor]] = []

    def make_calls(name: str, count: int) -> dict[str, Call]:
        mine = make_op(op, name, case, pair)
        for seed in range(len(drawn), count):
            drawn.append(draw(op, case, pair, device, seed))
            with torch.no_grad():  # eager, as in verify
                gradients.append(draw_gradients(_several(make_op(op, "eager", case, pair)(**drawn[-1])), seed))
        bare = BENCHES[op].bare_backward and name not in PEERS and name != "reference"
        return contest.make_calls(mine, drawn, gradients, bare_backward=bare)

    forward, backward = BENCHES[op].moved(case, pair)
    labels = {"op": op, "shape": shape, "case": str(case), "dtype": pair_name}
    moved = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}
    return contest.run(
        contest.Contest(labels, moved, lambda name: verify(op, name, case, pair, device), make_calls, pair[1]),
        device,
        names,
    )
