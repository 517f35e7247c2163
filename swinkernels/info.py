"""Prints versions, the build, and the available backends: ``python -m swinkernels.info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
from typing import Any

import torch

from swinkernels import _extension
from swinkernels._version import __version__
from swinkernels.ops import _backends
from swinkernels.ops._fused_linear import why_not_fused


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, or None. torch does not report the version, so nvidia-smi is called."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split() if result.returncode == 0 else []
    return lines[0] if lines else None


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def collect() -> dict[str, Any]:
    """Return the report as plain values that can be serialised as JSON.

    Returns:
        ``versions`` (of Python, torch, CUDA, Triton, timm, the driver and this package; None if not installed),
        ``platform``, ``gpus``, ``build`` (the result of the op ``build_info``, or None without the extension),
        ``extension_error`` (the reason why the extension is not loaded, or None), ``cpu_instruction_set`` (the
        instruction set that the CPU kernels use here, or None), ``backends`` (for each, the reason why it cannot run
        here, or None) and ``fused_products`` (for each dtype, the reason why inference on this CPU cannot fuse a matrix
        product with bias, GELU and residual connection, or None).
    """
    return {
        "versions": {
            "swinkernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _installed_version("triton"),
            "timm": _installed_version("timm"),
            "driver": _driver(),
        },
        "platform": platform.platform(),
        "gpus": _gpus(),
        "build": _extension.build,
        "extension_error": _extension.error,
        "cpu_instruction_set": None if _extension.error else _extension.ops.cpu_instruction_set(),
        "backends": {name: _backends.unavailable(name) for name in _backends.BACKENDS},
        "fused_products": {name: why_not_fused(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")},
    }


def describe(info: dict[str, Any]) -> str:
    """Return the result of :func:`collect` as readable text."""
    versions, build = info["versions"], info["build"]
    lines = [
        f"swinkernels {versions['swinkernels']}, Python {versions['python']}, torch {versions['torch']}, "
        f"triton {versions['triton'] or 'not installed'}, timm {versions['timm'] or 'not installed'}",
        info["platform"],
    ]
    lines += [
        f"GPU {index}: {gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} "
        f"multiprocessors, {gpu['memory_gib']} GiB, driver {versions['driver'] or 'unknown'}"
        for index, gpu in enumerate(info["gpus"])
    ] or ["GPU: torch sees none"]
    if build is None:
        lines.append(f"extension: not loaded: {info['extension_error']}")
    else:
        lines.append(
            f"extension: {build['version']}, built by {build['compiler']} with torch {build['torch_version']}, "
            f"CPU instruction sets {', '.join(build['cpu_instruction_sets'])}: {info['cpu_instruction_set']} runs here"
        )
        if build["cuda"]:
            limits = "; ".join(
                f"{op}: " + ", ".join(f"{name} {value}" for name, value in build[f"{op}_limits"].items())
                for op in ("window_attention", "layer_norm")
            )
            lines.append(
                f"CUDA kernels: nvcc {build['cuda_version']}, architectures {' '.join(build['arch_list'])}, "
                f"{len(build['cuda_sources'])} sources; {limits}"
            )
        else:
            lines.append(f"CUDA kernels: none: {build['cuda_missing']}")
    lines.append("backends:")
    for name, reason in info["backends"].items():
        lines.append(f"  {name:<9}  " + ("available" if reason is None else f"not available because {reason}"))
    lines.append("products fused with bias, GELU and residual connection, in inference on a CPU:")
    lines += [f"  {name:<9}  {reason or 'fused if large enough'}" for name, reason in info["fused_products"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m swinkernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else describe(info))


if __name__ == "__main__":
    main()
