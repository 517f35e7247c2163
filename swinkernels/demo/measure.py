"""Measures stage outputs, times by stage and peak memory for the demo."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INFERENCE, TRAINING = "inference step", "training step"


def photo_batch(photo: Tensor, batch: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return normalised images (batch, 3, size, size): the whole photograph, then crops.

    Every second image is mirrored.
    """
    image = photo.permute(2, 0, 1).float() / 255
    side = min(image.shape[1:])
    images = []
    for i in range(batch):
        crop = side if i == 0 else side * 4 // 5
        top, left = ((edge - crop) * j // 4 for edge, j in zip(image.shape[1:], (i % 5, i // 5 % 5), strict=True))
        x = image[:, top : top + crop, left : left + crop]
        x = x.flip(-1) if i % 2 else x
        images.append(nn.functional.interpolate(x[None], (size, size), mode="bicubic", antialias=True))
    x = torch.cat(images).clamp(0, 1)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Return a context manager that autocasts to ``dtype``; for float32, the parameters' dtype, it does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def has_stages(model: nn.Module) -> bool:
    """Return True for models built like timm's Swin v1 and v2, whose stages return (B, H, W, C)."""
    return isinstance(getattr(model, "layers", None), nn.Module)


def stages(model: nn.Module) -> dict[str, nn.Module]:
    return {f"stage {i}": stage for i, stage in enumerate(model.get_submodule("layers").children(), start=1)}


def outputs(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the logits and the output of every stage, (B, H, W, C), in float64 on the CPU."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _module, _inputs, out: seen.__setitem__(name, out.detach().double().cpu())

    handles = [stage.register_forward_hook(keep(name)) for name, stage in stages(model).items()]
    with torch.inference_mode(), autocast(x.device, dtype):
        seen["logits"] = model.eval()(x).double().cpu()
    for handle in handles:
        handle.remove()
    return seen


def step(model: nn.Module, x: Tensor, dtype: torch.dtype, mode: str) -> None:
    """Run a forward pass if ``mode`` is INFERENCE, else the forward pass, the loss and the backward pass."""
    if mode == INFERENCE:
        with torch.inference_mode(), autocast(x.device, dtype):
            model(x)
        return
    with autocast(x.device, dtype):
        logits = model(x)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)
    nn.functional.cross_entropy(logits.float(), target).backward()
    for p in model.parameters():
        p.grad = None


class Stopwatch:
    """Measures milliseconds with CUDA events on a GPU and with ``time.perf_counter`` on a CPU."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: dict[str, tuple[Any, Any]] = {}

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self._marks[name] = (start, self.now())

    @contextlib.contextmanager
    def time_calls(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Time the forward pass of each module, with hooks."""
        starts: dict[str, Any] = {}

        def before(name: str) -> Callable:
            return lambda _module, _inputs: starts.__setitem__(name, self.now())

        def after(name: str) -> Callable:
            return lambda _module, _inputs, _out: self._marks.__setitem__(name, (starts[name], self.now()))

        handles = [m.register_forward_pre_hook(before(name)) for name, m in modules.items()]
        handles += [m.register_forward_hook(after(name)) for name, m in modules.items()]
        yield
        for handle in handles:
            handle.remove()

    def read(self) -> dict[str, float]:
        if not self._cuda:
            return {name: 1e3 * (end - start) for name, (start, end) in self._marks.items()}
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in self._marks.items()}


def times(
    models: dict[str, nn.Module], x: Tensor, dtype: torch.dtype, mode: str, repeats: int, done: Callable[[], None]
) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds by model and part, where the parts are the forward pass of each stage and the "total" step.

    The models run alternately, so that a slowdown of the machine affects both. The first step of each is a warm-up and
    is not counted.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            model.train(mode == TRAINING)
            watch = Stopwatch(x.device)
            with watch.time_calls(stages(model)), watch.time("total"):
                step(model, x, dtype, mode)
            for part, ms in watch.read().items() if turn > 0 else ():
                samples[name].setdefault(part, []).append(ms)
            done()
    return samples


def peak_memory(model: nn.Module, x: Tensor, dtype: torch.dtype, mode: str) -> int:
    """Return the peak memory of one step in bytes, beyond the memory allocated before the step."""
    model.train(mode == TRAINING)
    return peak_bytes(lambda: step(model, x, dtype, mode), x.device)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, including its result, beyond the memory allocated before the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints messages between the demo's tables
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def memory_method(device: torch.device) -> str:
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated, less the bytes allocated before the step"
    return "allocations of torch's CPU allocator in one step, from torch.profiler"
