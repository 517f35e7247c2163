"""Run inference of a model on a CPU with OpenVINO or ONNX Runtime, if installed."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

RUNTIMES = ("openvino", "onnxruntime")
_PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def why_not(name: str, device: torch.device, dtype: torch.dtype, mode: str, arguments: int) -> str | None:
    """Return the reason why a runtime cannot be timed, or None if it can.

    ``arguments`` is the number of the model's inputs. Only models with one input tensor are supported.
    """
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if device.type != "cpu" or mode != "inference" or arguments != 1:
        return "it only runs inference of whole models on a CPU"
    dtypes = (torch.float32, torch.bfloat16) if name == "openvino" else (torch.float32,)
    return None if dtype in dtypes else f"it does not support {dtype} on a CPU"


def prepare(name: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Convert a float32 module; return a function that runs one step of inference with torch's number of threads."""
    return (_openvino if name == "openvino" else _onnxruntime)(module.eval(), x, dtype)


def _openvino(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    import openvino

    core = openvino.Core()
    converted = openvino.convert_model(module, example_input=x)
    converted.reshape(list(x.shape))
    # On a CPU without products of bfloat16, OpenVINO by itself infers in float32, which is many times as fast there.
    is_low = dtype == torch.bfloat16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if is_low else "f32",
    }
    request = core.compile_model(converted, "CPU", options).create_infer_request()
    given = x.numpy()

    def infer() -> Tensor:
        return torch.from_numpy(next(iter(request.infer({0: given}).values())).copy())

    return infer


def _onnxruntime(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    import onnxruntime

    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}

    def infer() -> Tensor:
        return torch.from_numpy(session.run(None, given)[0])

    return infer
