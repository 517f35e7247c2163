"""Runs every op under compute-sanitizer, forward and backward, on tiny tensors that cover its CUDA kernels.

The sanitizer's tools detect accesses out of bounds, hazards in shared memory and barriers that not all threads reach. A
rehearsal makes the calls without compute-sanitizer, because the emulator reports the same faults itself.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import swinkernels
from gpu import ROOT
from gpu.lines import SKIPPED, WRONG, Emitter
from gpu.plan import Setting
from gpu.smoke import separate
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import run_case

FOUND_SOMETHING = 86  # compute-sanitizer's exit status after a finding; Python never exits with it
DOZEN = 12
ROLL_THEN_PAD = {"pad_order": "roll_then_pad"}
# The choice of tiles and loops depends on the window's number of tokens (short to long), head_dim and the options.
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


def attention(case: Case, dtype: torch.dtype, device: str, backend: str, packed: bool) -> dict[str, Tensor]:
    op = functools.partial(swinkernels.window_attention_qkvpacked if packed else separate, backend=backend)
    return run_case(op, case.inputs(dtype, device), case.arguments(device))


def memory_bound(name: str, dtype: torch.dtype, device: str, given: dict[str, Any], *shapes: Any) -> dict[str, Tensor]:
    """Call an op with random tensors of the given shapes; return its outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = getattr(swinkernels.ops, name)(*leaves, **given)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
    return {str(i): x.detach() for i, x in enumerate([*outs, *grads])}


def memory_bound_calls() -> Iterator[tuple[str, dict[str, Any], list[tuple[int, ...]]]]:
    """Yield the calls of the memory-bound ops as (op, arguments, shapes of the tensors)."""
    for c, order in itertools.product((1, 3, 8, 40), ("pad_then_roll", "roll_then_pad")):
        given = {"window_size": (4, 3), "shift_size": (2, 1), "pad_order": order}
        yield "window_partition", given, [(2, 5, 7, c)]
        yield "window_reverse", {**given, "size": (5, 7)}, [(2 * 2 * 3, 12, c)]
    for c in (3, 32, 96, 200, 768, 1536):
        yield "layer_norm", {}, [(5, c), (c,), (c,)]
        yield "residual_layer_norm", {}, [(2, 3, c), (2, 3, c), (c,), (c,)]
        yield "residual_post_norm", {}, [(2, 3, c), (2, 3, c), (c,), (c,)]
    for c, norm in itertools.product((3, 32, 96), ("pre", "post")):
        wide = (4 if norm == "pre" else 2) * c
        yield "patch_merging", {"norm": norm}, [(2, 5, 6, c), (wide,), (wide,), (2 * c, 4 * c)]


def run(device: str, backend: str, most: int | None = None) -> int:
    """Make all calls, or at most ``most`` of them, evenly spaced; return the number of calls that the backend ran."""
    calls: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case, packed in itertools.product(ATTENTION, (True, False)):
            name = f"window_attention{'_qkvpacked' if packed else ''} {case} {dtype}"
            calls.append((name, functools.partial(attention, case, dtype, device, backend, packed)))
        for op, given, shapes in memory_bound_calls():
            given = {**given, "backend": backend}
            calls.append((f"{op} {shapes} {dtype}", functools.partial(memory_bound, op, dtype, device, given, *shapes)))
    made = 0
    for name, call in calls[:: max(1, len(calls) // most) if most else 1][:most]:
        try:
            results = call()
        except NotImplementedError:
            continue
        made += 1
        if not all(x.isfinite().all() for x in results.values()):
            raise SystemExit(f"gpu: {name}: a result is not finite")
    if made == 0:
        raise SystemExit(f"gpu: the backend {backend} ran none of the calls: see python -m swinkernels.info")
    return made


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from the PATH or the CUDA toolkit, or None."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = [os.path.join(home, folder) for home in homes for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield the case for the tool that ``group`` names."""
    yield f"{group} of the ops", functools.partial(_sanitize, group, emit, setting)


def _sanitize(tool: str, emit: Emitter, setting: Setting) -> None:
    if setting.rehearse:
        emit.line(value=run("cpu", "cuda", DOZEN), unit="calls", detail="under the emulator")
        return
    sanitizer = find_sanitizer()
    if sanitizer is None:
        emit.line(result=SKIPPED, detail="compute-sanitizer was found neither on the PATH nor in CUDA_HOME")
        return
    code = f"from gpu import sanitize; sanitize.run('cuda', 'cuda', {None if setting.whole else DOZEN})"
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING), sys.executable, "-c", code]
    # Without torch's caching allocator, an access past the end of a tensor is also outside its allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    said = [x.strip("= ") for x in done.stdout.splitlines() if x.startswith("=========") and x.strip("= ")]
    if done.returncode == FOUND_SOMETHING:
        emit.line(result=WRONG, detail=next((x for x in said if "rror" in x or "azard" in x), said[-1]))
    elif done.returncode != 0 and any("not supported" in x or "nsupported" in x for x in said):
        emit.line(result=SKIPPED, detail=said[-1])
    elif done.returncode != 0:
        raise RuntimeError(f"{tool} ended with status {done.returncode}: {said[-1] if said else done.stderr[-200:]}")
    else:
        emit.line(detail=said[-1] if said else "")
