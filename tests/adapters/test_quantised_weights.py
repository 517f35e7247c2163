"""Tests ``accelerate`` with weights of tensor subclasses that support few ops, such as quantised weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinkernels
from tests.support.places import PLACES

every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


class Packed(Tensor):
    """A weight that only F.linear can read; any other computation raises NotImplementedError."""

    _of: Tensor

    @staticmethod
    def __new__(cls, of: Tensor) -> Packed:
        made = Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype, device=of.device, requires_grad=False)
        made._of = of
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs)
        # Attributes and methods of weights that nn.Module, copy.deepcopy and error messages use.
        name = getattr(function, "__name__", "")
        if name in (
            "__get__",
            "__set__",
            "__repr__",
            "requires_grad_",
            "__deepcopy__",
            "detach",
            "size",
            "dim",
            "numel",
        ):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        raise NotImplementedError(f"a packed weight does not support {name}")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Packed(args[0]._of)
        raise NotImplementedError(f"a packed weight does not support {function}")

    def __deepcopy__(self, memo: Any) -> Packed:
        return nn.Parameter(Packed(self._of.clone()), requires_grad=False)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight._of if isinstance(weight, Packed) else weight, bias)


def pack(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Packed(module.weight.detach().clone()), requires_grad=False)


@every_place
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("packed_first", [True, False])
def test_nothing_but_a_linear_reads_a_weight(place, packed_first, backend):
    plain = place.model()
    fast = copy.deepcopy(plain)
    pack(plain)
    if packed_first:
        pack(fast)
    report = swinkernels.accelerate(fast, backend=backend)
    str(report)
    if not packed_first:
        pack(fast)
    with torch.no_grad():
        torch.testing.assert_close(place.run(fast), place.run(plain), rtol=1e-9, atol=1e-9)


@every_place
@pytest.mark.parametrize("quantised_first", [True, False])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(place, kind, quantised_first):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao import quantization

    config = getattr(quantization, kind)()
    plain = place.model().float()
    fast = copy.deepcopy(plain)
    quantization.quantize_(plain, config)
    if quantised_first:
        quantization.quantize_(fast, config)
    swinkernels.accelerate(fast)
    if not quantised_first:
        quantization.quantize_(fast, config)
    x, *others = place.inputs(torch.Generator().manual_seed(1))
    others = [o.float() if isinstance(o, Tensor) else o for o in others]
    with torch.no_grad():
        try:
            expected = plain(x.float(), *others)
        except IndexError:  # torchao does not support F.linear with keyword arguments
            pytest.skip("torchao cannot run this library's own code")
        got = fast(x.float(), *others)
    got, expected = (out[0] if isinstance(out, tuple) else out for out in (got, expected))
    # Dynamic quantisation can turn a rounding difference in an activation into a whole int8 step.
    close = 1e-4 if kind == "Int8WeightOnlyConfig" else 0.05
    assert (got - expected).abs().max() <= close * expected.abs().max()
