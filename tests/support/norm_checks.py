"""Calls the norm ops, and compares them with the float64 reference.

An implementation is any object that has the ops as functions: ``torch.ops.swinkernels``, or the emulated kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.reference.patch_merging import neighbours
from swinkernels.testing import assert_within_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Pairs of dtypes: of the norm's input or the residual stream, and of the next Linear's input. NORM_PAIRS adds norms
# that read the half-precision output of a Linear and return float32.
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
NORM_PAIRS = [*PAIRS, (F16, F32), (BF16, F32)]
# In rows shorter than this, too few rounding errors average out, and most of the gradient cancels in the norm.
SHORT_ROW = 16
EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """A call of the op named ``op``; the other fields determine shapes and arguments."""

    op: str  # "layer_norm", "patch_merging_norm", "residual_layer_norm" or "residual_post_norm"
    shape: tuple[int, ...]  # shape of x
    pair: tuple[torch.dtype, torch.dtype] = (F32, F32)  # dtypes of x and z, or of x and y
    factor: tuple[int, ...] = ()  # for merging or expanding, three values
    order: str | tuple[int, ...] = "swin"  # for merging: a published order, or the neighbours' row-major indices
    has_weight: bool = True
    has_bias: bool = True
    parameter_dtype: torch.dtype = F32
    has_drop_path: bool = False
    offset: float = 0.0  # mean of the rows

    def __str__(self) -> str:
        dtypes = "-".join(str(d).removeprefix("torch.") for d in self.pair)
        extra = f"-{'x'.join(map(str, self.factor))}" if self.factor else ""
        extra += f"-{self.order}" if self.op == "patch_merging_norm" else ""
        extra += "".join(
            f"-{name}"
            for name, given in (
                ("no_weight", not self.has_weight),
                ("no_bias", not self.has_bias),
                ("drop_path", self.has_drop_path),
            )
            if given
        )
        return f"{self.op}-{'x'.join(map(str, self.shape))}{extra}-{dtypes}"

    @property
    def merged_axes(self) -> int:
        return sum(f > 1 for f in self.factor)

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Return each neighbour's offset on the merged axes, in the order of a merged row."""
        if isinstance(self.order, str):
            return list(neighbours(self.order, self.merged_axes))
        return [tuple(n >> i & 1 for i in reversed(range(self.merged_axes))) for n in self.order]

    @property
    def numbers(self) -> list[int]:
        """Return each neighbour's row-major index, in the order of a merged row."""
        return [sum(o << i for i, o in enumerate(reversed(offset))) for offset in self.offsets]

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows to normalise, (..., L), which consist of elements of ``x`` and padding zeros."""
        if self.op == "patch_merging_norm":
            axes = range(x.dim() - 1 - self.merged_axes, x.dim() - 1)
            for axis in axes:
                if x.shape[axis] % 2 == 1:
                    x = torch.cat([x, torch.zeros_like(x.narrow(axis, 0, 1))], dim=axis)
            selections = [(..., *(slice(o, None, 2) for o in offset)) for offset in self.offsets]
            return torch.cat([x[(*s, slice(None))] for s in selections], dim=-1)
        if self.factor:
            rank = x.dim() - 2
            factor = self.factor[-rank:]
            parts = x.unflatten(-1, (*factor, -1))
            axes = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
            size = [s * f for s, f in zip(x.shape[1:-1], factor, strict=True)]
            return parts.permute(0, *axes, 2 * rank + 1).reshape(x.shape[0], *size, parts.shape[-1])
        return x

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Return random inputs, rounded to their dtypes, without the parameters that the case does not have."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        z_shape = self.rows(torch.empty(self.shape, device="meta")).shape
        inputs = {
            "x": (draw(*self.shape) + self.offset).to(self.pair[0]),
            "y": (draw(*self.shape) + self.offset).to(self.pair[1]),
            "weight": (1 + 0.5 * draw(z_shape[-1])).to(self.parameter_dtype),
            "bias": draw(z_shape[-1]).to(self.parameter_dtype),
            "dz": draw(*z_shape).to(self.pair[1]),
            "ds": draw(*self.shape).to(self.pair[0]),
            "drop_path_scale": torch.tensor([0.0, 1.25])[torch.arange(self.shape[0]) % 2],
        }
        wanted = {"weight": self.has_weight, "bias": self.has_bias, "drop_path_scale": self.has_drop_path}
        return {name: x for name, x in inputs.items() if wanted.get(name, True)}


def call(implementation: Any, case: NormCase, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the forward and backward op of ``implementation``; return all results by name, without dy if it equals dx."""
    fwd, bwd = (getattr(implementation, f"{case.op}_{direction}") for direction in ("fwd", "bwd"))
    x, weight, bias, scale = inputs["x"], inputs.get("weight"), inputs.get("bias"), inputs.get("drop_path_scale")
    needs = (weight is not None, bias is not None)
    results: dict[str, Tensor] = {}

    def keep(names: str, values: Any) -> None:
        results.update(zip(names.split(), values, strict=True))

    if case.op == "residual_layer_norm":
        keep("s z mean rstd", fwd(x, inputs["y"], scale, weight, bias, EPS))
        saved = (results["s"], scale, weight, results["mean"], results["rstd"])
        keep("dx dy dweight dbias", bwd(inputs["ds"], inputs["dz"], *saved, *needs))
        if scale is None and case.pair[0] == case.pair[1]:
            assert results["dy"].shape == (0,)
            del results["dy"]
    elif case.op == "residual_post_norm":
        keep("s mean rstd", fwd(x, inputs["y"], scale, weight, bias, EPS))
        saved = (inputs["y"], scale, weight, results["mean"], results["rstd"])
        keep("dy dweight dbias", bwd(inputs["ds"], *saved, *needs))
    else:
        where = [list(case.factor), case.numbers] if case.op == "patch_merging_norm" else [list(case.factor)]
        keep("z mean rstd", fwd(x, weight, bias, *where, EPS, case.pair[1]))
        saved = (x, weight, results["mean"], results["rstd"])
        keep("dx dweight dbias", bwd(inputs["dz"], *saved, *where, *needs))
    for name, needed in (("dweight", needs[0]), ("dbias", needs[1])):
        if not needed:
            assert results.pop(name).shape == (0,)
    return results


def define(
    case: NormCase, inputs: dict[str, Tensor], s: Tensor | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the reference's results in ``dtype``, and the magnitudes of the terms that may cancel in them.

    ``s`` is the implementation's rounded sum of x and y, which its norm reads.
    """
    wide = {name: x.to(dtype) for name, x in inputs.items()}
    leaves = {name: wide[name].requires_grad_() for name in ("x", "y", "weight", "bias") if name in wide}
    weight, bias, scale = leaves.get("weight"), leaves.get("bias"), wide.get("drop_path_scale")
    results: dict[str, Tensor] = {}
    if case.op == "residual_post_norm":
        source, dz = leaves["y"], wide["ds"]
        out = reference.residual_post_norm(leaves["x"], source, weight, bias, eps=EPS, drop_path_scale=scale)
        results["s"] = out
        if scale is not None:
            dz = dz * scale.reshape(-1, *(1,) * (dz.dim() - 1))
        leaves["y"], total = source, (out * wide["ds"]).sum()
    elif case.op == "residual_layer_norm":
        assert s is not None
        results["s"], _ = reference.residual_layer_norm(leaves["x"], leaves["y"], eps=EPS, drop_path_scale=scale)
        source, dz = s.to(dtype).requires_grad_(), wide["dz"]
        results["z"] = reference.layer_norm(source, weight, bias, eps=EPS)
        leaves["x"], total = source, (results["z"] * dz).sum() + (source * wide["ds"]).sum()
    else:
        source, dz = leaves["x"], wide["dz"]
        results["z"] = reference.layer_norm(case.rows(source), weight, bias, eps=EPS)
        total = (results["z"] * dz).sum()
    names = [name for name in ("x", "y", "weight", "bias") if name in leaves]
    grads = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    results |= {f"d{name}": g for name, g in zip(names, grads, strict=True) if g is not None}

    rows = case.rows(source)
    results["mean"] = rows.mean(-1)
    results["rstd"] = 1 / ((rows - results["mean"].unsqueeze(-1)).square().mean(-1) + EPS).sqrt()
    normalised = (rows - results["mean"].unsqueeze(-1)) * results["rstd"].unsqueeze(-1)
    dz = dz.abs()
    g = dz if weight is None else dz * weight.abs()
    size = g + g.mean(-1, keepdim=True) + normalised.abs() * (g * normalised.abs()).mean(-1, keepdim=True)
    (dsource,) = torch.autograd.grad(rows, source, size * results["rstd"].unsqueeze(-1))
    terms = {"mean": rows.abs().mean(-1)}
    for name, x in (("dweight", dz * normalised.abs()), ("dbias", dz)):
        terms[name] = x.reshape(-1, x.shape[-1]).sum(0)
    if case.op == "residual_post_norm":
        terms["dy"] = dsource
        del results["dx"]  # equals ds
    elif case.op == "residual_layer_norm":
        by_sample = 1 if scale is None else scale.reshape(-1, *(1,) * (dz.dim() - 1))
        terms["dx"] = dsource + wide["ds"].abs()
        terms["dy"] = by_sample * terms["dx"]
        results["dy"] = by_sample * results["dx"]
    else:
        terms["dx"] = dsource
    return {k: v.detach() for k, v in results.items()}, {k: v.detach() for k, v in terms.items()}


def check(implementation: Any, case: NormCase, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Check every result of ``implementation`` against the float64 reference, and return the results.

    Errors of float32 results and of short rows are judged relative to the terms that cancel in them.
    """
    inputs = case.inputs(seed)
    got = call(implementation, case, {name: x.to(device) for name, x in inputs.items()})
    got = {name: x.cpu() for name, x in got.items()}
    exact, terms = define(case, inputs, got.get("s"), torch.float64)
    f32, _ = define(case, inputs, got.get("s"), F32)
    length = case.rows(torch.empty(case.shape, device="meta")).shape[-1]
    statistics = {"mean": F32, "rstd": F32, "dweight": F32, "dbias": F32}
    for name, x in got.items():
        stream = name in ("s", "dx")
        expected = statistics.get(name, case.pair[0] if stream else case.pair[1])
        assert x.dtype == expected, f"{case} {name}: {x.dtype}"
        if case.shape[0] == 0:
            assert x.shape == exact[name].shape
            assert not x.any()
            continue
        cancels = length < SHORT_ROW or x.dtype == F32
        assert_within_budget(
            x, exact[name], f32[name], terms=terms.get(name) if cancels else None, name=f"{case} {name}"
        )
    return got


def in_every_pair(cases: list[NormCase], pairs: list[tuple[torch.dtype, torch.dtype]]) -> list[NormCase]:
    return [replace(case, pair=pair) for case in cases for pair in pairs]
