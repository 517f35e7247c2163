"""Time models and blocks of other libraries: original, with the library's fast option, and accelerated.

Each contestant is timed eagerly and compiled, after a comparison of its output and gradients with those of the original
model in float64. Inference runs in the given dtype. Training runs under autocast with float32 weights, as is usual. It
consists of the forward and backward passes; the optimizer is left out, because its time is the same for all
contestants.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import swinkernels
from benchmarks import record, runtimes
from benchmarks.contest import first_call_s
from benchmarks.shapes import BLOCKS, MODELS, ModelCase
from benchmarks.timing import Call, Timing, gpu_busy_us, host_us, time_on_cpu, time_steps
from swinkernels.demo.measure import autocast, peak_bytes

# The kinds of contestants. The suffix "-compiled" marks a compiled contestant, "-graphs" one compiled into CUDA graphs.
KINDS = ("eager", "fused", "accelerate")
PLAIN = (*KINDS, *(f"{kind}-compiled" for kind in KINDS))
GRAPHS = tuple(f"{kind}-graphs" for kind in KINDS)  # torch.compile(mode="reduce-overhead")
CONTESTANTS = (*PLAIN, *GRAPHS, *runtimes.RUNTIMES)
OURS = tuple(name for name in CONTESTANTS if name.startswith("accelerate"))
MODES = ("inference", "training")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A module and its inputs. The inputs of a block are the arguments that its model passes to the block."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def build(case: ModelCase, fused: bool = False) -> nn.Module | None:
    """Build the library's model with seeded weights; return None if ``fused`` and the library has no fast option."""
    torch.manual_seed(record.SEED)
    model = _BUILDERS[case.library](case, fused)
    if model is None:
        return None
    generator = torch.Generator().manual_seed(record.SEED)
    with torch.no_grad():
        for p in model.parameters():  # initial bias tables are all zero, which would hide errors
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model.eval()


def _timm(case: ModelCase, fused: bool) -> nn.Module | None:
    import timm

    model = timm.create_model(case.model, pretrained=False)
    switched = [m for m in model.modules() if hasattr(m, "fused_attn")]
    for module in switched:
        module.fused_attn = fused
    return model if switched or not fused else None


def _torchvision(case: ModelCase, fused: bool) -> nn.Module | None:
    import torchvision

    return None if fused else torchvision.models.get_model(case.model, weights=None)


def _transformers(case: ModelCase, fused: bool) -> nn.Module | None:
    import transformers

    kind = getattr(transformers, case.model)
    if fused and not kind._supports_sdpa:
        return None
    config = kind.config_class(image_size=case.image[-1])
    config._attn_implementation = "sdpa" if fused else "eager"
    return kind(config)


def _monai(case: ModelCase, fused: bool) -> nn.Module | None:
    from monai.networks.nets import SwinUNETR

    options = {"use_flash_attention": True} if fused else {}
    return SwinUNETR(in_channels=case.image[0], out_channels=14, feature_size=48, **options)


_BUILDERS: dict[str, Callable[[ModelCase, bool], nn.Module | None]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "monai": _monai,
}


def not_installed(names: Iterable[str]) -> dict[str, list[str]]:
    """Map each missing library to the names of the models and blocks that need it."""
    found: dict[str, list[str]] = {}
    for name in names:
        library = MODELS[BLOCKS.get(name, (name, ""))[0]].library
        if importlib.util.find_spec(library) is None:
            found.setdefault(library, []).append(name)
    return found


def images(case: ModelCase) -> Tensor:
    return torch.randn(case.batch, *case.image, generator=torch.Generator().manual_seed(record.SEED))


def subject(case: ModelCase, kind: str, path: str = "", batch: int | None = None) -> Subject | None:
    """Build a contestant's model, or its module at ``path``, with inputs, on a CPU in float32.

    The images, or the tensor that the module at ``path`` receives, are repeated to a batch of ``batch``. The result is
    None if ``kind`` is "fused" and the library has no fast option.
    """
    model = build(case, fused=kind == "fused")
    if kind == "accelerate" and case.library == "transformers":
        # accelerate leaves eager attention as it is, because users may ask it for attention weights.
        model = build(case, fused=True) or model
    if model is None:
        return None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((images(case),), {})]
    if path:
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(*calls[0][0])
        hook.remove()
    if kind == "accelerate":
        report = swinkernels.accelerate(model)
        if not report.replaced or report.skipped:
            raise RuntimeError(f"accelerate did not replace all modules of {case.model}:\n{report}")
    (x, *others), kwargs = calls[-1]  # `others`, such as a map's size or a mask, do not depend on the image
    return Subject(model.get_submodule(path), (_repeat(x, (batch or case.batch) // case.batch), *others), kwargs)


def _repeat(x: Tensor, times: int) -> Tensor:
    """Repeat a tensor along its batch axis."""
    return x.repeat(times, *(1,) * (x.dim() - 1))


def first_tensor(out: Any) -> Tensor:
    """Return the first tensor in a model's result."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def _moved(x: Any, device: torch.device, dtype: torch.dtype) -> Any:
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    return x.to(device, dtype) if is_float else x.to(device) if isinstance(x, Tensor) else x


def prepare(subject: Subject, device: torch.device, dtype: torch.dtype, mode: str, how: str) -> Callable[[], Any]:
    """Return a function that runs one step of inference or training.

    The function returns the output and, in training, the gradients of the input and the parameters.
    """
    training = mode == "training"
    wide = torch.promote_types(dtype, torch.float32) if training else dtype  # autocast keeps weights in float32
    module = copy.deepcopy(subject.module).to(device, wide).eval()  # without dropout, because results are compared
    args = tuple(_moved(x, device, wide) for x in subject.args)
    kwargs = {k: _moved(x, device, wide) for k, x in subject.kwargs.items()}
    run: Callable[..., Any] = module
    if how == "compiled":
        run = torch.compile(module, dynamic=False)
    elif how == "graphs":
        run = torch.compile(module, dynamic=False, mode="reduce-overhead")
    leaf = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())

    def infer() -> Any:
        with torch.no_grad():
            return first_tensor(run(*args, **kwargs))

    def train() -> Any:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        with autocast(device, dtype):
            out = first_tensor(run(*args, **kwargs))
        out.float().square().mean().backward() if dtype != torch.float64 else out.square().mean().backward()
        return out.detach(), leaf.grad, [p.grad for p in module.parameters()]

    if training:
        leaf.requires_grad_()
    return train if training else infer


def _flat(result: Any) -> dict[str, Tensor]:
    """Return the tensors of a step's result by name, in float64 on the CPU."""
    if isinstance(result, Tensor):
        return {"out": result.double().cpu()}
    out, dx, grads = result
    named = {f"parameter {i}": g for i, g in enumerate(grads) if g is not None}
    return {k: v.double().cpu() for k, v in {"out": out, "input": dx, **named}.items() if v is not None}


def errors(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative RMS errors of the output, of the input's gradient and of the parameters' gradients.

    The entry "parameters" is the largest error of any parameter's gradient. The errors of very small gradients are
    relative to a thousandth of the largest gradient, because some gradients, such as that of a key bias, are zero in
    exact arithmetic and consist of rounding errors only.
    """
    if got.keys() != exact.keys():
        raise AssertionError(f"only one of the compared results has gradients of {sorted(got.keys() ^ exact.keys())}")

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    sizes = {k: rms(x) for k, x in exact.items()}
    largest = max((s for k, s in sizes.items() if k.startswith("parameter")), default=0.0)
    relative = {k: rms(got[k] - exact[k]) / max(sizes[k], 1e-3 * largest * k.startswith("parameter")) for k in exact}
    parameters = [e for k, e in relative.items() if k.startswith("parameter")]
    found = {k: e for k, e in relative.items() if not k.startswith("parameter")}
    return {**found, "parameters": max(parameters)} if parameters else found


def repeated(found: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """Return the results of a step on ``times`` copies of some images, given the results ``found`` on one copy.

    The loss is a mean over all copies.
    """
    of_images = {"out": 1.0, "input": 1.0 / times}
    return {k: _repeat(x, times) * of_images[k] if k in of_images else x for k, x in found.items()}


ALLOWED_EPS = 16.0


def judge(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor], eps: float
) -> tuple[bool, float]:
    """Return whether every error is at most 16 eps plus twice the plain model's, and the worst error in eps."""
    mine, theirs = errors(got, exact), errors(plain, exact)
    right = all(mine[k] <= 2 * theirs[k] + ALLOWED_EPS * eps for k in mine)
    return right, max(mine.values()) / eps


def contestants(wanted: Sequence[str], device: torch.device, graphs: bool) -> list[str]:
    names = [*PLAIN, *(GRAPHS if graphs and device.type == "cuda" else ())]
    names += runtimes.RUNTIMES if device.type == "cpu" else ()
    return [name for name in names if not wanted or name in wanted]


def benchmark(
    suite: str,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    names: Iterable[str],
    *,
    batch: int | None = None,
    modes: Sequence[str] = MODES,
    timed: bool = True,
    before_timing: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Return one row per contestant and mode for a model, or for a block in ``shapes.BLOCKS``.

    A batch consists of copies of one or two images, so the exact results of the timed step are computed from those of a
    step on one or two images.
    """
    of, path = BLOCKS.get(name, (name, ""))
    case = dataclasses.replace(MODELS[of], batch=batch or MODELS[of].batch)
    few = dataclasses.replace(case, batch=2 if case.batch > 2 and case.batch % 2 == 0 else 1)
    labels = {
        "suite": suite,
        "op": f"{case.library} {path or case.model}",
        "shape": name,
        "case": str(case),
        "dtype": str(dtype).removeprefix("torch."),
    }
    beside_a_gpu = timed and device.type == "cuda"  # on a CPU, the whole step is host time
    torch.compiler.reset()
    rows = []
    # Contestants share code but are compiled separately; beyond dynamo's limit they would silently run eagerly.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for mode in modes:
            verdicts, calls, first = _prepared(few, case.batch, path, dtype, device, names, mode)
            times: dict[str, Timing] = {}
            before_timing()
            if timed:
                times = time_steps(calls, device) if device.type == "cuda" else time_on_cpu(calls, seconds=2.0)
            for contestant, (verdict, error) in verdicts.items():
                call = calls.get(contestant)
                rows.append(
                    record.row(
                        {**labels, "backend": contestant, "direction": mode},
                        verdict,
                        error,
                        times.get(contestant),
                        # Runtimes do not allocate with torch's allocator, which counts the bytes.
                        peak=(
                            peak_bytes(functools.partial(call, 0), device)
                            if call and contestant not in runtimes.RUNTIMES
                            else None
                        ),
                        first_call_s=first.get(contestant),
                        host_us=host_us(call, device) if call and beside_a_gpu else None,
                        gpu_busy_us=gpu_busy_us(call, device) if call and beside_a_gpu else None,
                    )
                )
    return rows


def _prepared(
    few: ModelCase,
    batch: int,
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    names: Iterable[str],
    mode: str,
) -> tuple[dict[str, tuple[str, float | None]], dict[str, Call], dict[str, float]]:
    """Return, by contestant, the verdict and error, the step to time, and the duration of its first call in seconds."""
    original = subject(few, "eager", path)
    assert original is not None
    exact, plain = (
        repeated(_flat(prepare(original, device, wide, mode, "")()), batch // few.batch)
        for wide in (torch.float64, dtype)
    )
    verdicts: dict[str, tuple[str, float | None]] = {}
    calls: dict[str, Call] = {}
    first: dict[str, float] = {}
    for contestant in names:
        kind, _, how = contestant.partition("-")
        try:
            mine = subject(few, kind, path, batch)
            if mine is None:
                continue
            if kind in runtimes.RUNTIMES:
                arguments = (*mine.args, *mine.kwargs.values())
                if runtimes.why_not(kind, device, dtype, mode, len(arguments)) is not None:
                    continue
                calls[contestant] = _without_sets(runtimes.prepare(kind, mine.module, arguments[0], dtype))
            else:
                calls[contestant] = _without_sets(prepare(mine, device, dtype, mode, how))
            first[contestant] = first_call_s(calls[contestant], device)
            right, error = judge(_flat(calls[contestant](0)), plain, exact, torch.finfo(dtype).eps)
            verdicts[contestant] = (record.RESULT_OK if right else record.RESULT_WRONG, error)
        except Exception:  # a failing contestant must not discard the others' results
            traceback.print_exc()
            verdicts[contestant] = (record.RESULT_FAILED, None)
            calls.pop(contestant, None)
    return verdicts, calls, first


def _without_sets(step: Callable[[], Any]) -> Call:
    """Wrap a step as a Call that ignores the index of the input set."""
    return lambda i: step()
