"""Tests accelerated models exported to ONNX: ONNX Runtime and OpenVINO return the results of the original models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import swinkernels
from tests.interop.models import MODELS, image, model, shapes
from tests.support.sweeps import long_but

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def accelerated(name: str) -> nn.Module:
    fast = copy.deepcopy(model(name))
    if name != "swinkernels":
        assert swinkernels.accelerate(fast).replaced
    return fast


def export(module: nn.Module, inputs: tuple[Any, ...], path: Path, axes: tuple[int, ...] = (0,)) -> Path:
    dynamic = (dict.fromkeys(axes, Dim.DYNAMIC), *(None for _ in inputs[1:]))
    torch.onnx.export(module, inputs, path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    written = onnx.load(path)
    assert {opset.domain for opset in written.opset_import} == {""}, "only standard ONNX"
    assert written.opset_import[0].version >= 18
    return path


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.tool("`torch.onnx.export(dynamo=True)`", "onnxscript", "standard ONNX, opset 18 and newer")
@pytest.mark.tool("ONNX Runtime", "onnxruntime", "within 1e-4 of the original")
@pytest.mark.parametrize("name", long_but(MODELS, "timm v1"))
def test_onnx_runtime(name: str, tmp_path: Path) -> None:
    _, shape, axes = MODELS[name]
    path = export(accelerated(name), (image(shape),), tmp_path / "model.onnx", axes)
    for other in shapes(name):
        x = image(other)
        with torch.no_grad():
            close(run(path, x), model(name)(x))


def check_openvino(source: Any, name: str) -> None:
    """Check that ``source``, an ONNX file or an exported program, returns the original model's results in OpenVINO."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # the default is bfloat16 if the CPU supports it
    compiled = openvino.compile_model(openvino.convert_model(source), "CPU", exact)
    for shape in shapes(name):
        x = image(shape)
        with torch.no_grad():
            close(torch.from_numpy(compiled(x.numpy())[0]), model(name)(x))


@pytest.mark.long
@pytest.mark.tool("OpenVINO, from ONNX", "openvino", "within 1e-4 of the original")
@pytest.mark.parametrize("name", MODELS)
def test_openvino(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    _, shape, axes = MODELS[name]
    check_openvino(export(accelerated(name), (image(shape),), tmp_path / "model.onnx", axes), name)


@pytest.mark.long
@pytest.mark.tool("OpenVINO, from an exported program", "openvino", "with `swinkernels.decompositions()`, any size")
@pytest.mark.parametrize("name", MODELS)
def test_openvino_without_onnx(name: str) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    _, shape, axes = MODELS[name]
    dynamic = (dict.fromkeys(axes, Dim.DYNAMIC),)
    program = torch.export.export(accelerated(name), (image(shape),), dynamic_shapes=dynamic)
    check_openvino(program.run_decompositions(swinkernels.decompositions()), name)


class Others(nn.Module):
    """A model that calls the ops that have kernels for GPUs only; the exported model runs none of these kernels."""

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.swinkernels
        channels = x.shape[-1]
        s, z, *_ = ops.residual_layer_norm_fwd(x, 0.5 * x, None, None, None, 1e-5)
        s = ops.residual_post_norm_fwd(s, z, None, None, None, 1e-5)[0]
        windows = ops.window_partition(s, [1, 3, 4], [0, 1, 2], False)
        s = ops.window_reverse(windows, [x.shape[1], x.shape[2]], [1, 3, 4], [0, 1, 2], False)
        merged = ops.patch_merging_norm_fwd(s, None, None, [1, 2, 2], [0, 2, 1, 3], 1e-5, torch.float32)[0]
        return ops.layer_norm_fwd(merged[..., : 4 * (channels // 4)], None, None, [1, 2, 2], 1e-5, torch.float32)[0]


@pytest.mark.long
def test_ops_of_the_gpu(tmp_path: Path) -> None:
    path = export(Others(), (image((2, 6, 8, 12)),), tmp_path / "others.onnx", (0, 1, 2))
    for shape in ((2, 6, 8, 12), (3, 7, 9, 12)):
        x = image(shape)
        s, z = swinkernels.residual_layer_norm(x, 0.5 * x, backend="reference")
        s = swinkernels.residual_post_norm(s, z, backend="reference")
        identity = torch.eye(48)
        merged = swinkernels.patch_merging(s, None, None, identity, backend="reference")
        want = swinkernels.patch_expanding(merged[..., :12], None, None, None, backend="reference")
        close(run(path, x), want)


def test_dropout_is_refused_in_words(tmp_path: Path) -> None:
    """The exporter's error contains the decomposition's message."""

    class Dropout(nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            seed = torch.zeros(1, dtype=torch.int64)
            given = (None, None, None, None, None, seed, "window_size=2,2;shift_size=0,0", 1.0, -100.0, 0.5)
            return torch.ops.swinkernels.window_attention_qkvpacked_fwd(qkv, *given)[0]

    with pytest.raises(torch.onnx.OnnxExporterError) as refused:
        export(Dropout(), (image((2, 4, 4, 3, 1, 4)),), tmp_path / "dropout.onnx")
    said, cause = "", refused.value.__cause__
    while cause is not None:
        said, cause = f"{said}{cause}", cause.__cause__
    assert "model.eval()" in said
    assert "swinkernels.restore(model)" in said
