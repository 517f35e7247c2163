"""Tests modules whose parameters are not in ``_parameters``: replicas, FSDP-flattened and parametrised modules."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrize

import swinkernels
from tests.support.places import PLACES

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


def replica(model: nn.Module) -> Any:
    """Replicate ``model`` in the same way as torch.nn.parallel.replicate, which needs a GPU."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        twin._former_parameters = OrderedDict()
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, p in module._parameters.items():
            if p is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, p.detach().clone())
                twin._former_parameters[name] = getattr(twin, name)
        for name, buffer in module._buffers.items():
            twin._buffers[name] = None if buffer is None else buffer.clone()
    return copies[model]


@every_place
def test_replicas_of_data_parallel(place):
    plain = place.model()
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    expected = place.run(plain)
    torch.testing.assert_close(place.run(replica(fast)), expected, **CLOSE)
    torch.testing.assert_close(place.run(fast), expected, **CLOSE)


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 * x


@every_place
@pytest.mark.parametrize("before_accelerate", [True, False])
def test_parametrizations(place, before_accelerate):
    """All parameters of the model, or those of a single module, are parametrised."""
    plain = place.model()
    expected = place.run(plain)
    owners = [path for path, module in plain.named_modules() if module._parameters]
    for chosen in [owners, *([path] for path in owners)]:
        fast = copy.deepcopy(plain)
        if not before_accelerate:
            swinkernels.accelerate(fast)
        for path in chosen:
            module = fast.get_submodule(path)
            for name in [n for n, p in module._parameters.items() if p is not None]:
                parametrize.register_parametrization(module, name, Same())
        if before_accelerate:
            swinkernels.accelerate(fast)
        torch.testing.assert_close(place.run(fast), expected, **CLOSE)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    store: Path = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@every_place
def test_parameters_flattened_by_fsdp(place, process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = place.model()
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    sharded = FullyShardedDataParallel(fast, use_orig_params=False, device_id=torch.device("cpu"))
    torch.testing.assert_close(place.run(sharded), place.run(plain), **CLOSE)
