"""Tests ``accelerate`` on the norms, residual connections and patch merging of timm's Swin, v1 and v2.

The norm and patch-merging ops have only GPU kernels, so the tests run the reference, or stand-ins for the kernels
in plain PyTorch.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import DropPath, LayerNorm

import swinkernels
from swinkernels.adapters import VerificationError, halves, linear_layers, norms
from swinkernels.adapters.adapter import Accelerated
from swinkernels.ops import fallback
from swinkernels.ops._library import autocast_dtype
from tests.support.parity import assert_as_noisy
from tests.support.published import publish
from tests.support.timm_swin import (
    CONFIGURATIONS,
    assert_as_good,
    check_parity,
    make_image,
    make_model,
    replaceable,
    run,
)

OPS = ("layer_norm", "residual_layer_norm", "residual_post_norm", "patch_merging")
# Number of op calls in one forward pass of make_model's models, which have four blocks and one patch merging.
CALLS = {1: {"residual_layer_norm": 4, "patch_merging": 1}, 2: {"residual_post_norm": 8, "patch_merging": 1}}
GEOMETRIES = ("divisible", "padded-9x13-5x7", "odd-window-17x11-9x6", "clamped-on-one-axis-3x8")

versions = pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])


class Calls(list):
    """The recorded op calls: name of the op, dtypes of its tensors and results, and keyword arguments."""

    def by_op(self) -> dict[str, int]:
        return dict(Counter(call["op"] for call in self))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    def watch(name: str) -> None:
        op = getattr(norms, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = op(*args, **kwargs)
            results = out if isinstance(out, tuple) else (out,)
            dtypes = [t.dtype for t in args[: 2 if name.startswith("residual") else 1]]
            seen.append({"op": name, "dtypes": dtypes, "results": [t.dtype for t in results], **kwargs})
            return out

        monkeypatch.setattr(norms, name, watched)

    for name in OPS:
        watch(name)
    return seen


@pytest.fixture
def a_gpu(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a GPU, on which autocast also computes norms in float32."""
    forward = nn.LayerNorm.forward

    def forward_as_on_a_gpu(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return forward(norm, x.float() if norm_dtype(x, x.dtype) == torch.float32 else x)

    def norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if autocast_dtype(x) is not None else dtype

    publish(monkeypatch, nn.LayerNorm, "forward", forward_as_on_a_gpu)
    monkeypatch.setattr(norms, "norm_dtype", norm_dtype)


def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the plain PyTorch backend raise an error if it is called for one of OPS."""
    for name in OPS:
        monkeypatch.setattr(fallback, name, None)


def accelerated(model: Any, backend: str = "reference") -> Any:
    fast = copy.deepcopy(model)
    assert len(swinkernels.accelerate(fast, backend=backend).replaced) == len(replaceable(model))
    return fast


def with_own_attention(model: Any) -> Any:
    """Register hooks in ``model``'s attention, so that timm's own attention runs on every backend; return ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Softmax):
            module.register_forward_hook(lambda *_: None)
    return model


def child(model: Any, path: str) -> nn.Module:
    return model.get_submodule(path)


# Same results as the library


@versions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_outputs_and_every_gradient(version, name, dtype, calls):
    model = make_model(version, **CONFIGURATIONS[name]).to(dtype)
    check_parity(model, make_image(model), backend="reference")
    assert calls.by_op() == CALLS[version]


@versions
def test_outputs_and_every_gradient_on_a_gpu(version, calls, a_gpu, monkeypatch):
    model = make_model(version)
    kernels_only(monkeypatch)
    check_parity(model, make_image(model))
    assert calls.by_op() == CALLS[version]


@versions
def test_three_stages_of_odd_maps(version, calls):
    model = make_model(version, img_size=(44, 60), depths=(1, 1, 1), num_heads=(2, 2, 2)).double()  # 11x15, 6x8, 3x4
    check_parity(model, make_image(model), backend="reference")
    assert calls.by_op()["patch_merging"] == 2


@versions
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_draws_the_same(version, scale_by_keep, calls):
    model = make_model(version, drop_path_rate=0.6).double().train()
    for m in model.modules():
        if isinstance(m, DropPath):
            m.scale_by_keep = scale_by_keep
    x, results = make_image(model, batch=4), []
    for m in (model, accelerated(model)):
        torch.manual_seed(7)
        results.append(run(m, x))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_as_good(results[1], results[0], results[0])
    assert calls.by_op() == CALLS[version]
    assert sum(call.get("drop_path_scale") is not None for call in calls) == (3 if version == 1 else 6)  # one rate is 0
    assert not torch.equal(results[0]["out"], model.eval()(x)), "drop path was not active"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_factor_of_drop_path_is_timms(p, dtype):
    drop_path = DropPath(p).train()
    for batch in (1, 5, 1000):
        y = torch.ones(batch, 3, 2, 4, dtype=dtype)
        factors, states = [], []
        for draw in (lambda y: drop_path(y)[:, 0, 0, 0], lambda y: norms.drop_path_scale(drop_path, y, y.dtype)):
            torch.manual_seed(3)
            factors.append(draw(y))
            states.append(torch.get_rng_state())
        assert torch.equal(*factors)
        assert torch.equal(*states)
    assert norms.drop_path_scale(drop_path.eval(), y, y.dtype) is None
    assert norms.drop_path_scale(DropPath(0.0).train(), y, y.dtype) is None
    assert norms.drop_path_scale(nn.Identity(), y, y.dtype) is None


@versions
def test_drop_path_draws_in_timms_dtype_under_autocast(version, calls, a_gpu):
    """timm computes the scale 1 / (1 - p) in the branch's dtype; the bfloat16 scale differs from the float32 one."""
    model = make_model(version, drop_path_rate=0.3).train()
    fast, x = accelerated(model, "auto"), make_image(model)
    dtypes = []
    for name, module in model.named_modules():
        if isinstance(module, DropPath) and (version == 2 or name.endswith("drop_path1")):
            module.register_forward_pre_hook(lambda _m, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        fast(x)
    scales = [call["drop_path_scale"] for call in calls if call.get("drop_path_scale") is not None]
    assert [scale.dtype for scale in scales] == dtypes
    assert set(dtypes) == {torch.bfloat16 if version == 1 else torch.float32}


@versions
def test_gradient_checkpointing(version, calls):
    model = make_model(version, drop_path_rate=0.3).double().train()
    fast = accelerated(model)
    fast.set_grad_checkpointing()
    x, results = make_image(model), []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append(run(m, x))
    assert_as_good(results[1], results[0], results[0])
    assert calls.by_op()["patch_merging"] == 1  # outside the recomputed part
    assert sum(calls.by_op().values()) > sum(CALLS[version].values())


@versions
@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_autocast_bfloat16(version, where, calls, request):
    """The values match timm's, and hooks and callers observe the same dtypes as in timm."""
    model = make_model(version)
    if where == "gpu":
        request.getfixturevalue("a_gpu")
    fast, x = accelerated(model, "reference" if where == "cpu" else "auto"), make_image(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    seen: dict[nn.Module, list[torch.dtype]] = {model: [], fast: []}
    for m, dtypes in seen.items():
        for module in replaceable(m):
            module.register_forward_hook(lambda _m, i, out, d=dtypes: d.extend((i[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, got = run(model, x), run(fast, x)
    assert seen[fast] == seen[model]
    assert got["out"].dtype == plain["out"].dtype
    assert_as_noisy(got, plain, exact)

    assert calls.by_op() == (CALLS[version] if version == 2 else {"layer_norm": 4, **CALLS[version]})
    half = torch.bfloat16
    first, second = ([c for c in calls if c["op"] != "patch_merging"][i] for i in (0, -1))  # in stages 1 and 2
    # Dtype of the residual stream: under autocast, the convolution and v1's merging return bfloat16, and norms return
    # the dtype that autocast uses for them on the device.
    wide = half if where == "cpu" else torch.float32
    assert {t for c in calls for t in c["dtypes"]} == {half, wide}
    if version == 1:
        assert (first["op"], first["dtypes"], first["results"]) == ("layer_norm", [wide], [half])
        assert (second["dtypes"], second["results"]) == ([half, half], [half, half])
    else:
        assert (first["dtypes"], first["results"]) == ([wide, half], [wide])
        assert (second["dtypes"], second["results"]) == ([wide, half], [wide])


def test_autocast_leaves_an_mlp_that_it_does_not_know_its_dtype(calls):
    """norm2 keeps the residual stream's float32 unless an unhooked timm Mlp follows: its fc1 casts the input anyway."""
    stage = accelerated(make_model(depths=(4,), num_heads=(2,))).layers[0]
    dtypes = []
    for block, path in ((0, "mlp"), (1, "mlp"), (2, "mlp.fc1")):
        hooked = child(stage.blocks[block], path)
        hooked.register_forward_pre_hook(lambda _m, i: dtypes.append(i[0].dtype))
    plain = type(stage.blocks[0].mlp)
    stage.blocks[0].mlp = (other := type("OtherMlp", (plain,), {})(16))
    other.register_forward_pre_hook(lambda _m, i: dtypes.append(i[0].dtype))
    x = torch.randn(2, *stage.blocks[0].input_resolution, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stage(x)
    assert dtypes == [torch.float32] * 3
    assert [c["results"] for c in calls if c["op"].startswith("residual")] == [[torch.float32, torch.bfloat16]]
    calls.clear()
    stage(x)
    assert calls.by_op() == {"residual_layer_norm": 4}, "without autocast, norms keep the stream's dtype"


@versions
def test_a_branch_narrower_than_the_stream(version, calls):
    """Without autocast, the MLP's input and the output of the block have the residual stream's wider dtype."""
    plain = make_model(version).layers[0].blocks[0]
    fast = accelerated(plain)
    for block in (plain, fast):
        block.attn.proj.register_forward_hook(lambda _m, _i, out: out.bfloat16())
        if version == 2:
            block.norm1.bfloat16()
    x = torch.randn(2, *plain.input_resolution, 16, generator=torch.Generator().manual_seed(1))
    assert fast(x).dtype == torch.float32
    torch.testing.assert_close(fast(x), plain(x), rtol=2e-2, atol=2e-2)
    assert all(call["op"] == "residual_post_norm" and call["results"] == [torch.float32] for call in calls)


@pytest.mark.parametrize(("version", "dtype"), [(1, torch.float16), (2, torch.bfloat16)], ids=["v1", "v2"])
def test_a_stream_narrower_than_the_sum_under_autocast(version, dtype, calls, a_gpu):
    """The residual stream is in half precision and the branch in another dtype, so timm's sum of both is in float32."""
    plain = make_model(version).layers[0].blocks[0]
    fast = accelerated(plain)
    x = torch.randn(2, *plain.input_resolution, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = plain(x), fast(x)
    assert got.dtype == expected.dtype == torch.float32
    exact = copy.deepcopy(plain).double()(x.double())
    assert (got - exact).norm() <= 1.5 * (expected - exact).norm()
    assert "residual_layer_norm" not in calls.by_op()


@versions
def test_norms_without_parameters_and_with_another_eps(version, calls):
    model = make_model(version)
    for path in ("layers.0.blocks.1.norm2", "layers.1.downsample.norm"):
        replace(model, path, lambda norm: nn.LayerNorm(norm.normalized_shape, eps=0.1, elementwise_affine=False))
    model.layers[1].blocks[0].norm2.bias = None
    check_parity(model, make_image(model), backend="reference")
    assert calls.by_op() == CALLS[version]


# torch.compile and tracing


@versions
def test_compile_fullgraph_without_compiling_again_for_every_batch(version, a_gpu):
    torch._dynamo.reset()
    model = make_model(version, depths=(1, 1))
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(accelerated(model, "auto"), fullgraph=True, backend=graphs)
    for batch in (2, 3, 4):
        x = make_image(model, batch=batch)
        exact, plain, got = run(copy.deepcopy(model).double(), x.double()), run(model, x), run(compiled, x)
        assert_as_good({name.removeprefix("_orig_mod."): value for name, value in got.items()}, plain, exact)
    assert graphs.frame_count == 2, "one graph for the first batch, one for any other"
    nodes = Counter(getattr(node.target, "__name__", "").split(".")[0] for node in graphs.graphs[0].graph.nodes)
    if version == 1:  # norms still computed by torch: patch embedding, head, and norm1 of each v1 block
        expected = {"layer_norm": 4, "residual_layer_norm_fwd": 2, "patch_merging_norm_fwd": 1}
    else:
        expected = {"layer_norm": 2, "residual_post_norm_fwd": 4, "window_partition": 1, "layer_norm_fwd": 1}
    assert {name: nodes[name] for name in expected} == expected


@versions
def test_compiled_training_with_drop_path_and_autocast_is_that_of_eager(version):
    torch._dynamo.reset()
    model = accelerated(make_model(version, depths=(2,), num_heads=(2,), drop_path_rate=0.5)).train()
    x = make_image(model, batch=4)
    outs = []
    for m in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(m(x))
    torch.testing.assert_close(outs[1], outs[0], rtol=2e-2, atol=2e-2)


@versions
def test_fx_tracing_traces_timms_code(version):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return True

    for block in replaceable(accelerated(make_model(version).double()))[1:3]:
        block._attn = nn.Identity()  # type: ignore[assignment]  torch.fx cannot trace attention's use of sizes
        graph = Tracer().trace(block)
        assert any("norm" in str(node.target) for node in graph.nodes)


# Choice of the backend


@versions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_auto_on_a_cpu_is_plain_pytorch(version, dtype, calls):
    model = make_model(version).to(dtype)
    report = swinkernels.accelerate(copy.deepcopy(model))
    check_parity(model, make_image(model), backend="auto")
    assert calls.by_op() == CALLS[version]
    assert [e.backend for e in report.replaced if "Merging" in e.module_class] == ["torch"]
    assert any(
        r.startswith("Residual and norm: torch. Not cpu: it does not implement residual_layer_norm")
        for r in report.replaced[1].remarks
    )


def test_a_backend_that_has_no_such_op_leaves_it_to_auto_and_says_so():
    model = with_own_attention(make_model(2))
    fast, x = copy.deepcopy(model), make_image(model)
    report = swinkernels.accelerate(fast, backend="cpu")
    assert {entry.backend for entry in report.replaced if "Merging" in entry.module_class} == {"torch"}
    for entry in report.replaced:
        assert "torch. Not cpu: it does not implement " in entry.remarks[-1]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_backend_that_has_the_op_and_cannot_run_the_call_refuses_it():
    model = with_own_attention(make_model(2))
    report = swinkernels.accelerate(model, backend="cuda")
    for entry in report.replaced[1:]:
        assert "cuda cannot run it: " in entry.remarks[-1]
    with pytest.raises(NotImplementedError, match="residual_post_norm: backend='cuda' cannot run this call"):
        model(make_image(model))


@versions
def test_auto_decides_at_the_call(version, calls, a_gpu, monkeypatch):
    """The call's dtypes and device determine the backend: a model may be cast or moved after accelerate."""
    model = make_model(version)
    report = swinkernels.accelerate(model)
    merging = next(e for e in report.replaced if "Merging" in e.module_class)
    assert (merging.backend, merging.remarks) == ("cuda", ())
    assert not any("own code" in r for e in report.replaced for r in e.remarks if "Attention" not in r)
    x = make_image(model)
    with monkeypatch.context() as patch:
        kernels_only(patch)
        model(x)
    assert calls.by_op() == CALLS[version]
    model.double()(x.double())  # no kernel supports float64
    model.to("meta")(x.double().to("meta"))


def test_triton_has_patch_merging_alone(calls, a_gpu):
    model = with_own_attention(make_model(2))
    fast, x = copy.deepcopy(model), make_image(model)
    report = swinkernels.accelerate(fast, backend="triton")
    assert [e.backend for e in report.replaced if "Merging" in e.module_class] == ["triton"]
    remark = "Residual and norm: cuda. Not triton: it does not implement residual_layer_norm"
    assert all(remark in e.remarks for e in report.replaced if "Block" in e.module_class)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert {call["op"]: call["backend"] for call in calls} == {"residual_post_norm": "auto", "patch_merging": "triton"}


# Cases in which timm's own code has to run


HOOKS = [
    *[(1, "layers.0.blocks.1.norm2", kind) for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook")],
    (1, "layers.0.blocks.0.drop_path1", "forward_hook"),  # an Identity
    (1, "layers.0.blocks.1.drop_path1", "forward_pre_hook"),
    (1, "layers.1.downsample.norm", "forward_hook"),
    (1, "layers.1.downsample.reduction", "full_backward_hook"),
    (2, "layers.0.blocks.0.drop_path1", "full_backward_hook"),
    (2, "layers.0.blocks.1.norm1", "forward_hook"),
    (2, "layers.0.blocks.1.drop_path2", "forward_hook"),
    (2, "layers.1.downsample.norm", "full_backward_hook"),
    (2, "layers.1.downsample.reduction", "forward_pre_hook"),
]


@pytest.mark.parametrize(("version", "where", "kind"), HOOKS)
def test_a_hook_on_an_inner_module_fires(version, where, kind, calls, monkeypatch):
    model = accelerated(make_model(version, drop_path_rate=0.3)).train()
    fired: list[nn.Module] = []
    handle = getattr(child(model, where), f"register_{kind}")(lambda m, *_: fired.append(m))
    x = make_image(model).requires_grad_()
    model(x).sum().backward()
    assert fired == [child(model, where)]
    assert sum(calls.by_op().values()) == sum(CALLS[version].values()) - 1
    path, _, name = where.rpartition(".")
    report = swinkernels.accelerate(copy.deepcopy(model), backend="reference")
    if path.endswith("downsample"):
        assert [(e.path, e.reason) for e in report.skipped] == [(path, f"a hook is registered on {name}")]
    else:
        assert not report.skipped
        entry = next(e for e in report.replaced if e.path == path)
        assert f"Residual and norm: timm's own code; a hook is registered on {name}" in entry.remarks
    handle.remove()
    calls.clear()
    for module, name in ((linear_layers, "fuses"), (halves, "joins")):  # otherwise a fused op may add the residual
        monkeypatch.setattr(module, name, lambda x: False)
    with torch.no_grad():
        model(x)
    assert calls.by_op() == CALLS[version]


def test_hooks_on_what_is_called_all_the_same_see_what_they_saw(calls):
    """Hooks on modules that are still called (norm1 without autocast, v1's drop_path2 and mlp) see timm's tensors."""
    model = make_model(drop_path_rate=0.1).double()
    fast, x = accelerated(model), make_image(model)
    seen: dict[nn.Module, list[Tensor]] = {model: [], fast: []}
    for m, tensors in seen.items():
        for path in ("norm1", "drop_path2", "mlp", "mlp.fc1"):
            hooked = child(m.layers[0].blocks[1], path)
            hooked.register_forward_hook(lambda _m, i, out, t=tensors: t.extend((i[0], out)))
        for module in replaceable(m):
            module.register_forward_hook(lambda _m, i, out, t=tensors: t.extend((i[0], out)))
        m(x)
    assert calls.by_op() == CALLS[1]
    assert len(seen[fast]) == 2 * (4 + 6)
    for got, expected in zip(seen[fast], seen[model], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


class OwnNorm(nn.LayerNorm):
    pass


class OwnDropPath(DropPath):
    pass


class OwnLinear(nn.Linear):
    pass


def replace(model: Any, path: str, make: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(child(model, parent), name, make(child(model, path)))


def replaced_forward(module: nn.Module) -> nn.Module:
    cls = type(module).__bases__[1] if isinstance(module, Accelerated) else type(module)
    module.forward = functools.partial(cls.forward, module)  # type: ignore[method-assign]
    return module


# Version; path of the replaced module in its stage; replacement; text in the report; number of missing op calls.
REPLACEMENTS: dict[str, tuple[int, str, Any, str, int]] = {
    "subclass of a norm": (
        1,
        "blocks.0.norm2",
        lambda m: OwnNorm(m.normalized_shape),
        "OwnNorm, not an nn.LayerNorm",
        1,
    ),
    "timm's LayerNorm": (2, "blocks.0.norm1", lambda m: LayerNorm(16), "timm.layers.norm.LayerNorm, not an nn", 1),
    "norm of the map": (1, "blocks.0.norm2", lambda m: nn.LayerNorm((108, 16)), "normalise rows of 16 elements", 1),
    "no norm": (2, "blocks.0.norm2", lambda m: nn.Identity(), "Identity, not an nn.LayerNorm", 1),
    "own drop path": (1, "blocks.0.drop_path1", lambda m: OwnDropPath(0.2), "OwnDropPath, not timm's DropPath", 1),
    "dropout for drop path": (2, "blocks.0.drop_path2", lambda m: nn.Dropout(0.2), "Dropout, not timm's DropPath", 1),
    "forward of the norm": (1, "blocks.0.norm2", replaced_forward, "norm2.forward was replaced on the instance", 1),
    "forward of the block": (2, "blocks.0", replaced_forward, "its forward was replaced on the instance", 2),
    "merging's norm": (1, "downsample.norm", lambda m: OwnNorm(m.normalized_shape), "OwnNorm, not an nn.LayerNorm", 1),
    "reduction with a bias": (1, "downsample.reduction", lambda m: nn.Linear(64, 32), "reduction has a bias", 1),
    "own reduction": (
        2,
        "downsample.reduction",
        lambda m: OwnLinear(64, 32, bias=False),
        "OwnLinear, not an nn.Linear",
        1,
    ),
    "forward of the merging": (2, "downsample", replaced_forward, "its forward was replaced on the instance", 1),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_is_not_known_runs_timms_code(name, calls):
    version, path, make, words, missing = REPLACEMENTS[name]
    path = f"layers.{int(path.startswith('downsample'))}.{path}"
    model = make_model(version, img_size=(36, 48)).double().train()
    fast = accelerated(model)
    for m in (model, fast):
        torch.manual_seed(3)
        replace(m, path, make)
        m.double()
    report = swinkernels.accelerate(fast, backend="reference")
    texts = [e.reason for e in report.skipped] + [r for e in report.replaced for r in e.remarks]
    assert any(words in text for text in texts), texts
    x, results = make_image(model), []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append(run(m, x))
    assert_as_good(results[1], results[0], results[0])
    assert sum(calls.by_op().values()) == sum(CALLS[version].values()) - missing
    assert ("patch_merging" in calls.by_op()) == ("downsample" not in path)


def test_a_v2_block_of_which_nothing_can_be_replaced_is_left_alone():
    model = make_model(2)
    block = model.layers[0].blocks[0]
    block.norm1, block.norm2 = OwnNorm(16), nn.Identity()
    block.attn.softmax = nn.Softmax2d()
    (entry,) = swinkernels.accelerate(model, backend="reference").skipped
    assert (entry.path, entry.module_class) == ("layers.0.blocks.0", "SwinTransformerV2Block")
    assert "attn.softmax is a Softmax2d" in entry.reason
    assert "norm1 is a" in entry.reason
    assert "norm2 is a" in entry.reason


# The model's state and interface


@versions
def test_subclasses_and_closed_modules_are_left_alone(version):
    model = make_model(version)
    merging = type(model.layers[1].downsample)
    model.layers[1].downsample.__class__ = type("OwnMerging", (merging,), {})
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    report = swinkernels.accelerate(model)
    assert [(e.path, e.module_class) for e in report.skipped] == [
        ("layers.0", "OptimizedModule"),
        ("layers.1.downsample", "OwnMerging"),
    ]
    scripted = torch.jit.script(make_model(version, depths=(1, 1)))
    (entry,) = swinkernels.accelerate(scripted).skipped  # one entry for the whole scripted model
    assert "TorchScript" in entry.reason


def test_scripted_modules_of_another_library_are_not_taken_for_timms():
    models = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    scripted = torch.jit.script(models.PatchMerging(8))
    assert [e.adapter for e in swinkernels.accelerate(scripted).skipped] == ["torchvision"]


@versions
def test_a_whole_model_has_twelve_blocks_and_three_mergings(version):
    import timm

    name = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
    with torch.device("meta"):
        model = timm.create_model(name, depths=(2, 2, 6, 2))
    kinds = Counter(e.module_class for e in swinkernels.accelerate(model).replaced)
    block = "SwinTransformerBlock" if version == 1 else "SwinTransformerV2Block"
    assert kinds == {"PatchEmbed": 1, block: 12, "PatchMerging": 3}


# verify


@versions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_verify_passes(version, dtype, calls):
    model = make_model(version, drop_path_rate=0.1).to(dtype).train()
    fired: list[Any] = []
    model.layers[0].blocks[1].mlp.register_forward_hook(lambda *_: fired.append(0))
    before = [t.clone() for t in (*model.parameters(), torch.get_rng_state())]
    report = swinkernels.accelerate(model, backend="reference", verify=True)
    assert len(report.replaced) == 1 + 4 + 1
    assert calls.by_op() == CALLS[version]
    assert not fired
    assert len(model.layers[0].blocks[1].mlp._forward_hooks) == 1
    assert all(torch.equal(a, b) for a, b in zip((*model.parameters(), torch.get_rng_state()), before, strict=True))


def test_verify_passes_where_timm_itself_overflows():
    """In float16, timm's cosine attention (v2) returns NaN for windows that contain zero padding."""
    model = make_model(2, qkv_bias=False).half()
    block = model.layers[0].blocks[0]
    assert block(torch.ones(1, *block.input_resolution, 16).half()).isnan().any()
    assert swinkernels.accelerate(model, backend="reference", verify=True).replaced


@pytest.mark.parametrize(
    ("version", "op", "path"),
    [
        (1, "residual_layer_norm", r"layers\.0\.blocks\.0"),
        (1, "patch_merging", r"layers\.1\.downsample"),
        (2, "residual_post_norm", r"layers\.0\.blocks\.0"),
        (2, "patch_merging", r"layers\.1\.downsample"),
    ],
)
def test_verify_finds_a_wrong_op_and_names_the_module(version, op, path, monkeypatch):
    model = make_model(version)
    right = getattr(norms, op)
    monkeypatch.setattr(norms, op, lambda *args, eps, **kwargs: right(*args, eps=eps + 0.01, **kwargs))
    with pytest.raises(VerificationError, match=rf"{path}: the output is off by"):
        swinkernels.accelerate(model, backend="reference", verify=True)
    assert not any(isinstance(m, Accelerated) for m in model.modules())
