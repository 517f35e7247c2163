"""Tests the Linear layers of blocks in inference on a CPU: their products are fused, or the modules are called."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

import swinkernels
from swinkernels import _extension
from swinkernels.adapters import linear_layers
from swinkernels.adapters.copies.block import StructuralBlock
from swinkernels.ops import _fused_linear, _onednn
from tests.support import published_forms
from tests.support.copied_code import refuse_forward
from tests.support.fused_products import always_fused, fused_calls
from tests.support.small_models import make_input, make_model
from tests.support.sweeps import in_turn

# For each family, the path of its first block and the names of the block's modules that make up the MLP half.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "timm": ("layers.0.blocks.0", ("mlp", "drop_path2")),
    "timm v2": ("layers.0.blocks.0", ("mlp",)),
    "timm v2-cr": ("stages.0.blocks.0", ("mlp",)),
    "torchvision": ("features.1.0", ("mlp", "stochastic_depth")),
    "torchvision v2": ("features.1.0", ("mlp",)),
    "transformers": ("model.encoder.layers.0.blocks.0", ("mlp", "dropout")),
    "transformers v2": ("model.encoder.layers.0.blocks.0", ("intermediate", "output")),
    "transformers Donut": ("model.encoder.layers.0.blocks.0", ("intermediate", "output")),
    "transformers MaskFormer": ("model.encoder.layers.0.blocks.0", ("intermediate", "output")),
    "transformers Swin2SR": ("model.encoder.stages.0.layers.0", ("intermediate", "output")),
    "transformers CLAP": ("layers.0", ("intermediate", "output")),
    "MONAI": ("model.layers1.0.blocks.0", ("mlp", "drop_path")),
    "mmpretrain": ("model.stages.0.blocks.0", ("ffn",)),
    "mmpretrain v2": ("model.stages.0.blocks.0", ("ffn",)),
    "torchvision Swin3D": ("features.0.0", ("mlp", "stochastic_depth")),
    "copy": ("blocks.0", ("mlp", "drop_path")),
    "copy v2": ("blocks.0", ("mlp",)),
    "copy for restoration": ("blocks.0", ("mlp", "drop_path")),
    "copy for segmentation": ("blocks.0", ("mlp", "drop_path")),
    "copy for video": ("blocks.0", ("mlp", "drop_path")),
    "copy of maps": ("blocks.0", ("mlp", "drop_path")),
}
every_family = pytest.mark.parametrize("family", PARTS)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad(), always_fused():
        yield


def accelerated(model: nn.Module) -> nn.Module:
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast)
    return fast


@every_family
def test_the_same_results_by_fused_products(family):
    """At least qkv, proj, fc1 and fc2 of each block are fused."""
    reason = _onednn.why_not_fused(torch.float32)
    if reason is not None:
        pytest.skip(reason)
    model, x = make_model(family).float(), make_input(family).float()
    fast = accelerated(model)
    with fused_calls() as called:
        got = fast(x)
    last = PARTS[family][1][0].split(".")[-1]
    blocks = [path for path, _ in model.named_modules() if path.split(".")[-1] == last]
    assert len(called) >= 4 * len(blocks)
    expected = model(x)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@every_family
def test_training_on_onednn(family, monkeypatch):
    """Where oneDNN's products are faster, it computes at least qkv, proj, fc1 and fc2 and their gradients.

    In training, a copy's own code computes its MLP.
    """
    reason = _onednn.why_not_fused(torch.float32)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(_onednn, "outruns_mkl", lambda: True)
    monkeypatch.setattr(_onednn, "is_large", lambda x, weight: x.numel() > 0)
    monkeypatch.setattr(_onednn, "_LEAST", 0)
    model, x = make_model(family).float(), make_input(family).float().requires_grad_()
    fast = accelerated(model)
    dy = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    with torch.enable_grad():
        for each in (model, fast):
            with fused_calls() as called:
                each(x).backward(dy)
            gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    last = PARTS[family][1][0].split(".")[-1]
    blocks = [path for path, _ in model.named_modules() if path.split(".")[-1] == last]
    layers = 2 if family.startswith("copy") else 4
    assert called.count("mkldnn::_linear_pointwise") >= 3 * layers * len(blocks)
    expected, got = gradients
    assert got.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-2 * largest), name


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_half_is_one_op(family, dtype, monkeypatch):
    """Where the kernels run, in eager and in compiled code."""
    reason = _extension.error or _fused_linear.why_not_fused(dtype)
    if reason is not None:
        pytest.skip(str(reason))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    model, x = make_model(family).to(dtype), make_input(family).to(dtype)
    fast = accelerated(model)
    with fused_calls() as called:
        got = fast(x)
    last = PARTS[family][1][0].split(".")[-1]
    blocks = sum(path.split(".")[-1] == last for path, _ in model.named_modules())
    # The attention of Swin3D is called as a module, and in bfloat16 the kernels leave out cosines of few channels.
    is_cosine = any(name.endswith(("logit_scale", "tau")) for name, _ in model.named_parameters())
    attention_is_called = family == "torchvision Swin3D" or (is_cosine and dtype == torch.bfloat16)
    assert called.count("swinkernels::fused_attention_half") == (0 if attention_is_called else 2 * blocks)
    assert called.count("swinkernels::fused_mlp") == 2 * blocks
    exact = model.double()(x.double())
    assert (got - exact).norm() <= (1e-5 if dtype == torch.float32 else 4e-2) * exact.norm()
    if dtype == torch.float32:
        torch.compiler.reset()
        compiled = torch.compile(fast, backend="eager", fullgraph=not family.startswith("copy"))
        compiled(x)
        with fused_calls() as called_compiled:
            torch.testing.assert_close(compiled(x), got, rtol=1e-4, atol=1e-5)
        # These copies pass a mask to every second block. A compiler cannot compare it with the op's mask.
        missing = 2 if family in ("copy for segmentation", "copy for video") else 0
        for kernel in ("swinkernels::fused_attention_half", "swinkernels::fused_mlp"):
            assert called_compiled.count(kernel) == called.count(kernel) - missing


def scale(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: 1.5 * out)


def scale_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def subclass(module: nn.Module) -> None:
    kind = type(module)

    def forward(self: Any, x: Tensor, **others: Any) -> Tensor:
        return 1.5 * kind.forward(self, x, **others)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x, **others: 1.5 * forward(x, **others)


EDITS: dict[str, Callable[[nn.Module], None]] = {
    edit.__name__: edit for edit in (scale, scale_input, subclass, replace_forward)
}


@pytest.mark.parametrize(("family", "edit"), in_turn(PARTS, [*EDITS]))
def test_edits_of_inner_modules_count(family, edit):
    """An edit of any module that a fused op replaces takes effect, before and after ``accelerate``."""
    path, parts = PARTS[family]
    model, x = make_model(family), make_input(family)
    unchanged = model(x)
    block = model.get_submodule(path)
    inner = [
        f"{part}.{name}" if name else part for part in parts for name, _ in block.get_submodule(part).named_modules()
    ]
    # Linear layers and norms of the attention half, some of which the library does not call.
    others = [
        name
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and name not in inner
    ]
    for name in (*inner, *others):
        for is_before in (True, False):
            plain = copy.deepcopy(model)
            fast = copy.deepcopy(model) if is_before else accelerated(model)
            EDITS[edit](plain.get_submodule(f"{path}.{name}"))
            EDITS[edit](fast.get_submodule(f"{path}.{name}"))
            if is_before:
                swinkernels.accelerate(fast)
            expected = plain(x)
            torch.testing.assert_close(fast(x), expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
            assert name in others or not torch.equal(expected, unchanged)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _activation(block: Any, part: str) -> tuple[Any, str]:
    """Return the module that contains the activation, and the name of the activation in that module."""
    mlp = block.get_submodule(part)
    *path, name = next(path for path, m in mlp.named_modules() if "GELU" in type(m).__name__).split(".")
    return mlp.get_submodule(".".join(path)), name


def other_activation(block: Any, part: str) -> None:
    owner, name = _activation(block, part)
    owner._modules[name] = nn.ReLU()


def tanh_activation(block: Any, part: str) -> None:
    owner, name = _activation(block, part)
    owner._modules[name] = nn.GELU(approximate="tanh")


def parametrised(block: Any, part: str) -> None:
    fc1 = next(m for m in block.get_submodule(part).modules() if isinstance(m, nn.Linear))
    parametrize.register_parametrization(fc1, "weight", Doubled())


def no_bias(block: Any, part: str) -> None:
    next(m for m in block.get_submodule(part).modules() if isinstance(m, nn.Linear)).bias = None


def strided_bias(block: Any, part: str) -> None:
    fc1 = next(m for m in block.get_submodule(part).modules() if isinstance(m, nn.Linear))
    fc1.bias = nn.Parameter(torch.stack([fc1.bias, -fc1.bias], 1)[:, 0])


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("edit", [other_activation, tanh_activation, parametrised, no_bias, strided_bias])
def test_other_layers_count(family, edit, dtype):
    path, (part, *_) = PARTS[family]
    model, x = make_model(family).to(dtype), make_input(family).to(dtype)
    fast = accelerated(model)
    for m in (model, fast):
        edit(m.get_submodule(path), part)
    expected = model(x)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    assert (fast(x) - expected).abs().max() <= tolerance * expected.abs().max()


@every_family
def test_a_class_of_the_library_that_is_patched(family, monkeypatch):
    path, (part, *_) = PARTS[family]
    model, x = make_model(family), make_input(family)
    fast = accelerated(model)
    owner, name = _activation(model.get_submodule(path), part)
    for kind in (type(owner), type(owner._modules[name])):
        with monkeypatch.context() as patch:
            forward = kind.forward
            patch.setattr(kind, "forward", lambda self, x, f=forward, **o: 1.5 * f(self, x, **o))
            torch.testing.assert_close(fast(x), model(x), rtol=1e-8, atol=1e-8)


@every_family
def test_dropout_in_training(family):
    """In training mode without gradients, the dropout of an MLP draws the same random numbers as in the library."""
    path, parts = PARTS[family]
    model, x = make_model(family), make_input(family)
    dropouts = [m for p in parts for m in model.get_submodule(f"{path}.{p}").modules() if type(m) is nn.Dropout]
    if not dropouts or parts[-1] == "dropout":
        pytest.skip("its MLP has no dropout of its own")
    unchanged = model(x)
    for dropout in dropouts:
        dropout.p = 0.3
        dropout.train()
    outputs = []
    for m in (model, accelerated(model)):
        torch.manual_seed(5)
        outputs.append(m(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)
    assert (outputs[0] - unchanged).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", ["dtype", "width"])
def test_errors_are_the_librarys(wrong):
    model, x = make_model("timm").float(), make_input("timm").float()
    fast = accelerated(model)
    for m in (model, fast):
        mlp = m.layers[0].blocks[0].mlp
        mlp.fc2 = mlp.fc2.double() if wrong == "dtype" else nn.Linear(7, 8)
    errors = []
    for m in (model, fast):
        with pytest.raises(RuntimeError) as error:
            m(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_autocast_and_gradients_call_the_modules():
    model, x = make_model("timm").float(), make_input("timm").float()
    fast = accelerated(model)
    with fused_calls() as called:
        with torch.autocast("cpu", torch.bfloat16):
            fast(x)
        with torch.enable_grad():
            fast(x).sum().backward()
    # Neither the MLP nor the Linear layers of attention are fused.
    assert called == []


def test_gelu_of_another_form_is_not_known():
    known = linear_layers._GELU
    gelu = next(kind for kind in known if kind.__name__ == "GELUActivation")
    assert known[gelu](gelu(use_gelu_python=True)) is None
    assert known[nn.GELU](nn.GELU("tanh")) == "tanh"


class ScaledMlp(published_forms.Mlp):
    """An MLP whose result is multiplied by 1.5."""

    factor = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


class MlpOfFewTokens(published_forms.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] <= 40 else super().forward(x).flip(-1)


class MlpOfSomeSizes(published_forms.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1) if x.shape[1] in (196, 784) else super().forward(x)


class MlpOfManyImages(published_forms.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1) if len(x) > 2 else super().forward(x)


class ClampedMlp(published_forms.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.clamp(-0.1, 0.1) if x.dtype == torch.bfloat16 else y


class CountingMlp(published_forms.Mlp):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def _copies(kind: type[nn.Module]) -> nn.Module:
    model = make_model("copy for restoration")
    for block in model.blocks:
        block.mlp.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [ScaledMlp, MlpOfFewTokens, MlpOfSomeSizes, MlpOfManyImages, ClampedMlp, CountingMlp])
def test_a_copied_mlp_that_computes_something_else_is_called(kind, monkeypatch):
    model, x = _copies(kind), make_input("copy for restoration")
    fast = accelerated(model)
    assert all(isinstance(block, StructuralBlock) for block in fast.blocks)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-8, atol=1e-8)
    refuse_forward(monkeypatch, kind)
    with pytest.raises(AssertionError, match="forward ran"):
        fast(x)


def test_a_copied_mlp_that_changed_since_its_trial_is_called():
    """If the class or the ``factor`` of the MLP changes after ``accelerate``, the MLP itself is called."""
    model, x = make_model("copy for restoration"), make_input("copy for restoration")
    fast = accelerated(model)
    for m in (model, fast):
        for block in m.blocks:
            block.mlp.__class__ = ScaledMlp
    expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-8, atol=1e-8)
    neutral = _copies(ScaledMlp)
    for block in neutral.blocks:
        block.mlp.factor = 1.0
    fast = accelerated(neutral)
    for block in fast.blocks:
        block.mlp.factor = 1.5
    torch.testing.assert_close(fast(x), expected, rtol=1e-8, atol=1e-8)


def test_a_copied_mlp_in_training_is_called(monkeypatch):
    model, x = make_model("copy for restoration"), make_input("copy for restoration")
    fast = accelerated(model)
    refuse_forward(monkeypatch, published_forms.Mlp)
    fast(x)
    fast.blocks[1].mlp.train()
    with pytest.raises(AssertionError, match="forward ran"):
        fast(x)


def test_copied_blocks_fuse_their_mlps_after_a_copy_and_a_pickle():
    model, x = make_model("copy for restoration"), make_input("copy for restoration")
    fast = accelerated(model)
    for m in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast.blocks[0]))):
        assert all(b._swinkernels_mlp is not None for b in m.modules() if isinstance(b, StructuralBlock))
    swinkernels.restore(fast)
    assert "_swinkernels_mlp" not in fast.blocks[0].__dict__
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
