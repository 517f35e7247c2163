"""Every op once in every regime of its CUDA kernels, tiny, forward and backward, under NVIDIA's compute-sanitizer.

``python tests/cuda/sanitize_sweep.py`` (``make sanitize``) runs the sweep once for each tool: memcheck (accesses out of
bounds), racecheck (hazards in shared memory) and synccheck (barriers). ``--sweep`` runs it alone, and
``--sweep --device cpu`` where there is no GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (after the path that finds the sources this file belongs to)
from torch import Tensor  # noqa: E402

import swinkernels  # noqa: E402
from swinkernels.testing import WindowAttentionCase, run_case  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND_SOMETHING = 86  # no exit status of Python's
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Case = WindowAttentionCase
ROLL_THEN_PAD = {"pad_order": "roll_then_pad"}
# By what kernels choose tiles and loops: the tokens of a window (short, middle, long), head_dim, and what is added.
ATTENTION = [
    Case(1, (4, 6), 2, 8, 2, 1),
    Case(2, (10, 8), 3, 32, 7, 3, has_pad_qkv=True),
    Case(1, (8, 8), 2, 16, 8, 4, options=ROLL_THEN_PAD),
    Case(1, (12, 10), 1, 32, 12, 6, has_pad_qkv=True, options=ROLL_THEN_PAD),
    Case(1, (16, 16), 1, 32, 16, 8),
    Case(1, (20, 20), 1, 32, 20, 3),
    Case(1, (25, 24), 1, 16, (25, 24)),
    *(Case(1, (5, 7), 1, head_dim, 4, 2, has_pad_qkv=True) for head_dim in (4, 10, 20, 30, 48, 64, 96, 128)),
    *(Case(1, (9, 7), 2, 32, w, 1, has_pad_qkv=True, has_logit_scale=True) for w in (4, 7)),
    Case(1, (16, 16), 1, 32, 16, 8, has_logit_scale=True),
    Case(1, (7, 14), 2, 32, 7, 3, has_table=False, bias_types=0),
    Case(1, (8, 8), 2, 16, 4, 2, has_table=False, bias_types=2),
    Case(1, (12, 12), 1, 16, 12, 0, has_table=False, has_logit_scale=True, bias_types=0),
    Case(1, (6, 7), 2, 16, 4, 2, has_pad_qkv=True, options={"pad_before": (1, 1)}),
    Case(1, (8, 8), 2, 16, 4, 2, options={"periodic": (False, True)}),
    Case(1, (7, 8), 2, 16, 4, 1, options={"region_map": torch.arange(64, dtype=torch.int32).reshape(8, 8) % 3}),
    Case(1, (8, 12), 2, 16, 4, 0, options={"grid": True}),
    Case(1, (6, 5), 1, 16, (3, 5), options={"table_window": (7, 7)}),
    Case(1, (4, 6, 5), 1, 16, (2, 3, 4), (1, 1, 2), has_pad_qkv=True),
    Case(1, (8, 8), 2, 32, 4, 2, options={"dropout_p": 0.2}),
    Case(1, (16, 16), 1, 32, 16, 8, options={"dropout_p": 0.2}),
    Case(0, (8, 8), 2, 32, 4, 2, has_pad_qkv=True),
]


def attention(case: Case, dtype: torch.dtype, device: torch.device, backend: str, packed: bool) -> dict[str, Tensor]:
    def op(qkv: Tensor, bias_table: Tensor | None = None, **given: Any) -> Tensor:
        given["backend"] = backend
        if packed:
            return swinkernels.window_attention_qkvpacked(qkv, bias_table, **given)
        q, k, v = qkv.unflatten(-1, (3, case.num_heads, -1)).unbind(-3)
        return swinkernels.window_attention(q, k.contiguous(), v, bias_table, **given)

    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.arguments().items()}
    return run_case(op, case.inputs(dtype, device), arguments)


def differentiate(op: Callable[..., Any], dtype: torch.dtype, device: torch.device, *shapes: Any) -> dict[str, Tensor]:
    """Outputs and gradients of an op of floating-point tensors of these shapes."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = op(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
    return {str(i): x.detach() for i, x in enumerate([*outs, *grads])}


def memory_ops(backend: str) -> Iterator[tuple[str, Callable[..., Any], list[tuple[int, ...]]]]:
    """Name, op and shapes of its tensors."""
    ops = swinkernels.ops
    for channels, order in itertools.product((1, 3, 8, 40), ("pad_then_roll", "roll_then_pad")):
        given = {"window_size": (4, 3), "shift_size": (2, 1), "pad_order": order, "backend": backend}
        yield (
            f"window_partition {channels} {order}",
            functools.partial(ops.window_partition, **given),
            [(2, 5, 7, channels)],
        )
        yield (
            f"window_reverse {channels} {order}",
            functools.partial(ops.window_reverse, size=(5, 7), **given),
            [(2 * 2 * 3, 12, channels)],
        )
    for channels in (3, 32, 96, 200, 768, 1536):
        yield (
            f"layer_norm {channels}",
            functools.partial(ops.layer_norm, backend=backend),
            [(5, channels)] + [(channels,)] * 2,
        )
        for name in ("residual_layer_norm", "residual_post_norm"):
            yield f"{name} {channels}", functools.partial(getattr(ops, name), backend=backend), [
                (2, 3, channels), (2, 3, channels), (channels,), (channels,),
            ]  # fmt: skip
    for channels, norm in itertools.product((3, 32, 96), ("pre", "post")):
        wide = (4 if norm == "pre" else 2) * channels
        yield f"patch_merging {channels} {norm}", functools.partial(ops.patch_merging, norm=norm, backend=backend), [
            (2, 5, 6, channels), (wide,), (wide,), (2 * channels, 4 * channels),
        ]  # fmt: skip


def sweep(device: torch.device, backend: str) -> tuple[int, int]:
    """Run everything; how many calls there were, and how many the backend does not have."""
    calls: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    for dtype in DTYPES:
        for case, packed in itertools.product(ATTENTION, (True, False)):
            name = f"{'window_attention_qkvpacked' if packed else 'window_attention'} {case} {dtype}"
            calls.append((name, functools.partial(attention, case, dtype, device, backend, packed)))
        for name, op, shapes in memory_ops(backend):
            calls.append((f"{name} {dtype}", functools.partial(differentiate, op, dtype, device, *shapes)))
    refused = 0
    for name, call in calls:
        try:
            results = call()
        except NotImplementedError:
            refused += 1
            continue
        if not all(x.isfinite().all() for x in results.values()):
            raise SystemExit(f"sanitize_sweep: {name}: a result is not finite")
    return len(calls), refused


def find_sanitizer() -> str:
    """compute-sanitizer of the PATH or of the CUDA toolkit."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = [str(home / folder) for home in homes for folder in ("bin", "compute-sanitizer")]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))
    if found is None:
        raise SystemExit(
            "sanitize_sweep: compute-sanitizer was not found on the PATH, nor in CUDA_HOME: it comes with the CUDA "
            "toolkit (cuda-sanitizer in NVIDIA's package repositories)"
        )
    return found


def sanitize(tools: list[str], backend: str) -> None:
    """Run the sweep under each tool; exits with an error if one found something."""
    sanitizer = find_sanitizer()
    if not torch.cuda.is_available():
        raise SystemExit("sanitize_sweep: torch sees no CUDA GPU; --sweep --device cpu runs the calls without one")
    # Without torch's cache an access beyond a tensor is one beyond its allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bad = []
    for tool in tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING)]
        command += [sys.executable, __file__, "--sweep", "--device", "cuda", "--backend", backend]
        print(f"--- {tool}", flush=True)
        if subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode != 0:
            bad.append(tool)
    if bad:
        raise SystemExit(f"sanitize_sweep: {', '.join(bad)} did not end well: see the reports above")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=[*TOOLS, "initcheck"], default=TOOLS)
    parser.add_argument("--sweep", action="store_true", help="only run the calls, under no tool")
    parser.add_argument("--device", default="cuda", help="of the sweep")
    parser.add_argument("--backend", help="default: cuda on a GPU, auto elsewhere")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    backend = options.backend or ("cuda" if device.type == "cuda" else "auto")
    if not options.sweep:
        sanitize(list(options.tools), backend)
        return
    total, refused = sweep(device, backend)
    print(f"{total} calls on {device.type}, backend {backend}: {total - refused} ran, {refused} it does not have")
    if total == refused:
        raise SystemExit(f"sanitize_sweep: the backend {backend} ran nothing: see python -m swinkernels.info")


if __name__ == "__main__":
    main()
