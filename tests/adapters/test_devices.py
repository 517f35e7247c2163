"""Tests that on devices without a kernel the library's own code runs after ``accelerate``, and the report says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import distributed, nn

import swinkernels
from swinkernels.ops import _backends, fallback, window_attention_qkvpacked
from tests.support.places import PLACES

every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    _backends._find_why_no_kernels.cache_clear()
    _backends._find_gpu_reason.cache_clear()
    yield
    monkeypatch.undo()
    _backends._find_why_no_kernels.cache_clear()
    _backends._find_gpu_reason.cache_clear()


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_devices_without_kernels(device):
    assert _backends.why_no_kernels(torch.device(device)) == f"no kernel runs on {device} tensors"


def test_devices_with_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for device in ("cpu", "cuda", "meta"):
        assert _backends.why_no_kernels(torch.device(device)) is None


def test_gpus_before_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or newer, got 7.5" in str(_backends.why_no_kernels(torch.device("cuda")))


def test_triton_on_rocm_is_taken_only_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    device = torch.device("cuda")
    assert "ROCm" in str(_backends.why_no_kernels(device))
    assert _backends.choose("op", "auto", device, lambda backend: []) == "torch"
    assert _backends.choose("op", "triton", device, lambda backend: []) == "triton"


@every_place
def test_the_librarys_own_code_runs_there(place, monkeypatch):
    """The CPU stands in for a device without kernels: a patched check reports that it has none."""
    plain = place.model()
    fast = copy.deepcopy(plain)
    monkeypatch.setattr(_backends, "_find_why_no_kernels", lambda device: "no kernel runs on such tensors")
    report = swinkernels.accelerate(fast)
    for op in ("window_attention", "window_attention_qkvpacked"):
        monkeypatch.setattr(fallback, op, None)
    main = [e for e in report.replaced if e.remarks]
    assert main
    assert all(e.backend == e.adapter for e in main)
    assert all("own code; no kernel runs on such tensors" in remark for e in main for remark in e.remarks)
    assert torch.equal(place.run(fast), place.run(plain))  # bit for bit


def test_tensors_sharded_over_devices(tmp_path):
    """The library's own code runs if inputs are DTensors, or if a weight is sharded by heads (here on one device)."""
    if not distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    place = PLACES.get("timm swin") or pytest.skip("timm is not installed")
    plain = place.model()
    fast = copy.deepcopy(plain)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        swinkernels.accelerate(fast)
        called: list[Any] = []
        fast.attn.register_forward_pre_hook(lambda *_: called.append(0))  # a hook makes the block run its own code
        distribute_module(fast, mesh)
        (x,) = place.inputs(torch.Generator().manual_seed(1))
        for how in (Shard(0), Replicate()):
            out: Any = fast(distribute_tensor(x, mesh, [how]))
            assert isinstance(out, DTensor)
            torch.testing.assert_close(out.full_tensor(), plain(x), rtol=1e-9, atol=1e-9)
        again = place.model()
        distribute_module(again, mesh, lambda name, m, mesh: _shard_heads(name, m, mesh))
        report = swinkernels.accelerate(again)
        assert any("sharded over devices" in e.reason for e in report.skipped), str(report)
    finally:
        distributed.destroy_process_group()


def _shard_heads(name: str, module: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    if name == "attn.qkv":
        weight = distribute_tensor(module.weight.data, mesh, [Shard(0)])
        module.register_parameter("weight", nn.Parameter(weight))


def test_plain_ops_there_are_pytorchs(monkeypatch):
    monkeypatch.setattr(_backends, "_find_why_no_kernels", lambda device: "no kernel runs on such tensors")
    seen = []
    monkeypatch.setitem(_backends.PREFERENCE, "cpu", ("cpu",))
    op = fallback.window_attention_qkvpacked
    monkeypatch.setattr(fallback, "window_attention_qkvpacked", lambda *a, **k: seen.append(0) or op(*a, **k))
    window_attention_qkvpacked(torch.randn(1, 5, 7, 24), num_heads=2, window_size=(5, 7))
    assert seen
