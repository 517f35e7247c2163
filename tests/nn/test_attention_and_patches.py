"""Tests swinkernels.nn against the published modules: checkpoints load strictly and give the same results."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from swinkernels.nn import FinalPatchExpandX4, PatchEmbed, PatchExpand, PatchMerging, PatchMergingV2
from tests.ops.test_window_attention_arguments import check
from tests.support.side_by_side import draw, randomised

C = 6
zeros = torch.zeros


def published(module: str, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    library = module.partition(".")[0]
    return getattr(pytest.importorskip(module, reason=f"{library} is not installed"), name)(*args, **kwargs)


timm = functools.partial(published, "timm.models.swin_transformer")
timm_v2 = functools.partial(published, "timm.models.swin_transformer_v2")
torchvision = functools.partial(published, "torchvision.models.swin_transformer")
monai = functools.partial(published, "monai.networks.nets.swin_unetr")


@functools.cache
def monai_order() -> str:
    """Return the neighbour order of MONAI's PatchMerging: "monai" since MONAI 1.5, "monai_legacy" before."""
    probe = monai("PatchMerging", 1, norm_layer=lambda n: nn.Identity(), spatial_dims=3)
    probe.reduction = nn.Identity()
    merged = probe(torch.arange(8.0).reshape(1, 2, 2, 2, 1))
    return "monai" if merged.unique().numel() == 8 else "monai_legacy"


def torchvision_embed() -> nn.Module:
    return torchvision("SwinTransformer", [4, 2], 8, [2], [1], [4, 4]).features[0]


class MicrosoftPatchMerging(nn.Module):
    """Patch merging on sequences, exactly as in Microsoft's models and Swin-Unet."""

    def __init__(self, size: tuple[int, int], dim: int, is_v2: bool = False) -> None:
        super().__init__()
        self.size = size
        self.is_v2 = is_v2
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if is_v2 else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, self.size)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1).flatten(1, 2)
        return self.norm(self.reduction(x)) if self.is_v2 else self.reduction(self.norm(x))


class SwinUnetPatchExpand(nn.Module):
    """Patch expansion on sequences with einops, as in Swin-Unet; factor=4 gives its FinalPatchExpand_X4."""

    def __init__(self, size: tuple[int, int], dim: int, factor: int) -> None:
        super().__init__()
        self.size, self.factor = size, factor
        out = dim // 2 if factor == 2 else dim
        self.expand = nn.Linear(dim, factor**2 * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        einops = importlib.import_module("einops")
        x = self.expand(x).unflatten(1, self.size)
        f = self.factor
        return self.norm(einops.rearrange(x, "b h w (p1 p2 c) -> b (h p1 w p2) c", p1=f, p2=f))


@dataclass(frozen=True)
class Pair:
    """A module of this package, its published counterpart, the shape of x, and how the two interfaces differ."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    shape: tuple[int, ...]
    size: tuple[int, ...] | None = None
    names: tuple[tuple[str, str], ...] = ()  # their parameter names -> ours
    result: Callable[[Tensor], Tensor] = lambda y: y  # converts our result to their layout

    def by_our_names(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        for old, new in self.names:
            values = {name.replace(old, new): value for name, value in values.items()}
        return values

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Return ``(ours, theirs)`` in float64, with the state dict of ``theirs`` loaded into ``ours``."""
        theirs = randomised(self.theirs())
        ours = self.ours().double()
        ours.load_state_dict(self.by_our_names(theirs.state_dict()), strict=True)
        return ours, theirs

    def run(self, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """Return the output and all gradients of ``module``, under the parameter names of ``ours``."""
        x = x.clone().requires_grad_()
        is_ours = type(module).__module__.startswith("swinkernels")
        out = self.result(module(x, size=self.size) if self.size else module(x)) if is_ours else module(x)
        parameters = dict(module.named_parameters())
        values = {"x": x, **(parameters if is_ours else self.by_our_names(parameters))}
        grads = torch.autograd.grad(out, list(values.values()), draw(*out.shape, seed=2).to(out.dtype))
        return {"out": out.detach(), **dict(zip(values, grads, strict=True))}


# Permutes channels-last output to channels-first, the layout of MONAI's PatchEmbed.
first = lambda y: y.movedim(-1, 1)  # noqa: E731
PAIRS = {
    "timm": Pair(lambda: PatchMerging(C), lambda: timm("PatchMerging", C), (2, 5, 4, C)),
    "timm_out_dim": Pair(lambda: PatchMerging(C, 7), lambda: timm("PatchMerging", C, 7), (2, 4, 6, C)),
    "timm_v2": Pair(lambda: PatchMergingV2(C), lambda: timm_v2("PatchMerging", C), (2, 5, 3, C)),
    "timm_v2_out_dim": Pair(lambda: PatchMergingV2(C, 7), lambda: timm_v2("PatchMerging", C, 7), (2, 4, 4, C)),
    "timm_eps": Pair(
        lambda: PatchMerging(C, eps=0.1),
        lambda: timm("PatchMerging", C, norm_layer=functools.partial(nn.LayerNorm, eps=0.1)),
        (2, 3, 4, C),
    ),
    "torchvision": Pair(lambda: PatchMerging(C), lambda: torchvision("PatchMerging", C), (2, 4, 5, C)),
    "torchvision_v2": Pair(lambda: PatchMergingV2(C), lambda: torchvision("PatchMergingV2", C), (2, 3, 6, C)),
    # Video-Swin merges a 3D map frame by frame; torchvision's module treats the frames as a batch axis.
    "frames": Pair(lambda: PatchMerging(C), lambda: torchvision("PatchMerging", C), (2, 3, 5, 4, C)),
    "monai_2d": Pair(
        lambda: PatchMerging(C, order="monai"), lambda: monai("PatchMerging", C, spatial_dims=2), (2, 5, 4, C)
    ),
    "monai_3d": Pair(
        lambda: PatchMerging(C, spatial_dims=3, order=monai_order()),
        lambda: monai("PatchMerging", C, spatial_dims=3),
        (2, 3, 4, 5, C),
    ),
    "monai_v2_3d": Pair(
        lambda: PatchMerging(C, spatial_dims=3, order="row_major"),
        lambda: monai("PatchMergingV2", C, spatial_dims=3),
        (2, 3, 4, 2, C),
    ),
    "microsoft": Pair(lambda: PatchMerging(C), lambda: MicrosoftPatchMerging((4, 6), C), (2, 24, C), (4, 6)),
    "microsoft_v2": Pair(lambda: PatchMergingV2(C), lambda: MicrosoftPatchMerging((4, 2), C, True), (2, 8, C), (4, 2)),
    "swin_unet": Pair(lambda: PatchExpand(C), lambda: SwinUnetPatchExpand((3, 2), C, 2), (2, 6, C), (3, 2)),
    "swin_unet_final": Pair(
        lambda: FinalPatchExpandX4(C), lambda: SwinUnetPatchExpand((3, 2), C, 4), (2, 6, C), (3, 2)
    ),
    **{
        f"embed_timm_{'norm' if norm else 'bare'}": Pair(
            lambda norm=norm: PatchEmbed(4, 3, 10, norm=norm),
            lambda norm=norm: published(
                "timm.layers", "PatchEmbed", None, 4, 3, 10, norm_layer=nn.LayerNorm if norm else None,
                output_fmt="NHWC", dynamic_img_pad=True,
            ),
            (2, 3, 9, 8),
        )
        for norm in (False, True)
    },
    "embed_timm_sequence": Pair(
        lambda: PatchEmbed(4, 3, 10, bias=False),
        lambda: published("timm.layers", "PatchEmbed", 8, 4, 3, 10, norm_layer=nn.LayerNorm, bias=False),
        (2, 3, 8, 8),
        result=lambda y: y.flatten(1, -2),
    ),
    "embed_torchvision": Pair(
        lambda: PatchEmbed((4, 2), 3, 8),
        torchvision_embed,
        (2, 3, 8, 6),
        names=(("0.", "proj."), ("2.", "norm.")),
    ),
    **{
        f"embed_monai_{len(patch)}d_{'norm' if norm else 'bare'}": Pair(
            lambda patch=patch, norm=norm: PatchEmbed(patch, 2, 7, spatial_dims=len(patch), norm=norm),
            lambda patch=patch, norm=norm: published(
                "monai.networks.blocks", "PatchEmbed", patch, 2, 7, nn.LayerNorm if norm else None, len(patch)
            ),
            (2, 2, *(2 * p + 1 for p in patch)),
            result=first,
        )
        for patch in ((4, 3), (2, 4, 3))
        for norm in (False, True)
    },
}  # fmt: skip
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))


@every_pair
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_published_module(pair, dtype, tolerance):
    ours, theirs = pair.modules()
    x = draw(*pair.shape)
    expected = pair.run(theirs, x)
    got = pair.run(ours.to(dtype), x.to(dtype))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == dtype
        limit = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


@every_pair
def test_bfloat16(pair):
    """Output and gradients of a bfloat16 module are bfloat16; the output's error is at most a few rounding errors."""
    ours, theirs = pair.modules()
    ours = ours.bfloat16()
    theirs.load_state_dict({k: v.bfloat16().double() for k, v in theirs.state_dict().items()})
    x = draw(*pair.shape).bfloat16()
    expected = pair.run(theirs, x.double())["out"]
    got = pair.run(ours, x)
    assert all(value.dtype == torch.bfloat16 for value in got.values())
    torch.testing.assert_close(got["out"].double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@every_pair
def test_state_dict_of_ours_loads_into_theirs(pair):
    ours, theirs = pair.modules()
    state = ours.state_dict()
    for old, new in pair.names:
        state = {key.replace(new, old): value for key, value in state.items()}
    theirs.load_state_dict(state, strict=True)


@every_pair
def test_initialisation_is_the_published_one(pair):
    """Both modules draw their initial parameters in the same order, so the same seed gives the same parameters."""
    pair.ours()  # the first call may run monai_order, whose probe module draws random numbers
    torch.manual_seed(3)
    expected = pair.by_our_names(pair.theirs().state_dict())
    torch.manual_seed(3)
    state = pair.ours().state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name])
        assert value.dtype == torch.float32


@every_pair
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(pair, low):
    """Under autocast, a module that ends with a norm returns float32, others ``low``, like torch's layers on a GPU."""
    ours, theirs = (m.float() for m in pair.modules())
    ends_with_norm = not isinstance(ours, PatchMerging) and ours.norm is not None
    with torch.autocast("cpu", low):
        got = pair.run(ours, draw(*pair.shape).float())
    assert got["out"].dtype == (torch.float32 if ends_with_norm else low)
    assert all(value.dtype == torch.float32 for name, value in got.items() if name != "out")
    expected = pair.run(theirs, draw(*pair.shape).float())
    for name, value in expected.items():
        limit = 8 * torch.finfo(low).eps * max(1.0, value.abs().max().item())
        torch.testing.assert_close(got[name].float(), value, rtol=0, atol=limit)


@every_pair
def test_deepcopy_pickle_and_repr(pair):
    ours, _ = pair.modules()
    x = draw(*pair.shape)
    expected = pair.run(ours, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert repr(other) == repr(ours)
        assert all(torch.equal(v, expected[n]) for n, v in pair.run(other, x).items())


@every_pair
def test_empty_batch(pair):
    ours, _ = pair.modules()
    got, whole = pair.run(ours, draw(0, *pair.shape[1:])), pair.run(ours, draw(*pair.shape))
    assert got["out"].shape == (0, *whole["out"].shape[1:])
    for name, value in got.items():
        if name not in ("out", "x"):
            assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize(
    "name",
    ["timm", "timm_v2", "monai_3d", "microsoft", "swin_unet", "embed_timm_norm", "embed_monai_3d_bare"],
)
def test_compile_fullgraph(name):
    pair = PAIRS[name]
    ours = pair.modules()[0].float()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for batch in (9, 11):
        x = draw(batch, *pair.shape[1:]).float().requires_grad_()
        arguments = {} if pair.size is None else {"size": pair.size}
        got, expected = (m(x, **arguments) for m in (compiled, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        parameters = [x, *ours.parameters()]
        dout = draw(*expected.shape, seed=2).float()
        for a, b in zip(*(torch.autograd.grad(y, parameters, dout) for y in (got, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


MODULES = {
    "PatchMerging": PatchMerging,
    "PatchMergingV2": PatchMergingV2,
    "PatchExpand": PatchExpand,
    "FinalPatchExpandX4": FinalPatchExpandX4,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (3, 4)), (2, (2, 3, 4)), (3, (2, 3, 4))])
def test_a_sequence_is_its_map(name, spatial_dims, size):
    module = MODULES[name](C, spatial_dims=spatial_dims)
    x = draw(2, *size, C).float()
    expected = module(x)
    for given in (size, list(size), torch.Size(size)):
        assert torch.equal(module(x.flatten(1, -2), size=given), expected.flatten(1, -2))


def test_expanding_in_3d():
    """``spatial_dims=2`` expands each frame separately; ``spatial_dims=3`` with factor (1, 2, 2) does the same."""
    x = draw(2, 3, 2, 4, C).float()
    frames = PatchExpand(C, 5)
    assert torch.equal(frames(x)[:, 1], frames(x[:, 1]))
    volume = PatchExpand(C, 5, factor=(1, 2, 2), spatial_dims=3)
    volume.load_state_dict(frames.state_dict())
    assert torch.equal(volume(x), frames(x))
    assert FinalPatchExpandX4(C, spatial_dims=3)(x).shape == (2, 12, 8, 16, C)


def test_backends_are_named_to_the_ops(plain_kernels):
    """The module's ``backend`` is passed to the ops: its kernel runs, or the error names the backend."""
    for module, shape in (
        (PatchMerging(C), (2, 5, 4, C)),
        (PatchMergingV2(C), (2, 5, 4, C)),
        (PatchExpand(C), (2, 5, 4, C)),
        (FinalPatchExpandX4(C), (2, 5, 4, C)),
        (PatchEmbed(2, 3, 5), (2, 3, 5, 4)),
    ):
        x = draw(*shape).float()
        expected = module(x)
        module.backend = "cuda"
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        module.backend = "cpu"
        with pytest.raises(NotImplementedError, match="backend='cpu' cannot run this call"):
            module(x)


def test_meta_device_and_dtype():
    for build in (PatchMerging, PatchMergingV2, PatchExpand, FinalPatchExpandX4):
        module = build(C, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
        assert module(torch.empty(2, 4, 4, C, device="meta", dtype=torch.bfloat16)).device.type == "meta"
    embed = PatchEmbed(device="meta", dtype=torch.bfloat16)
    assert embed(torch.empty(2, 3, 9, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 2, 96)


def test_embed_is_contiguous_channels_last():
    """The convolution writes its output channels-last, so the result is contiguous without a copy."""
    for has_norm in (False, True):
        assert PatchEmbed(norm=has_norm)(draw(2, 3, 8, 12).float()).is_contiguous()


def test_repr():
    assert repr(PatchMerging(C, order="unfold")).startswith(
        "PatchMerging(\n  dim=6, out_dim=12, spatial_dims=2, order='unfold', backend='auto'\n  (norm): LayerNorm((24,)"
    )
    assert "dim=6, out_dim=6, factor=(4, 4), spatial_dims=2" in repr(FinalPatchExpandX4(C))
    assert "patch_size=(2, 2, 2), in_chans=1, embed_dim=48, spatial_dims=3" in repr(
        PatchEmbed(2, 1, 48, spatial_dims=3)
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PatchMerging(0), ValueError, ["PatchMerging: dim", "at least 1", "got 0"]),
        (lambda: PatchMerging(6.0), TypeError, ["PatchMerging: dim", "int", "6.0"]),
        (lambda: PatchMergingV2(6, 0), ValueError, ["PatchMergingV2: out_dim", "at least 1", "got 0"]),
        (lambda: PatchMerging(6, spatial_dims=4), ValueError, ["spatial_dims", "2 or 3", "got 4"]),
        (lambda: PatchMerging(6, order="timm"), ValueError, ["PatchMerging: order", "'row_major'", "'timm'"]),
        (lambda: PatchMerging(6, eps=-1.0), ValueError, ["PatchMerging: eps", "at least 0", "-1.0"]),
        (lambda: PatchMerging(6, backend="gpu"), ValueError, ["PatchMerging: backend", "'triton'", "'gpu'"]),
        (lambda: PatchExpand(7), ValueError, ["PatchExpand: dim", "even", "got 7"]),
        (lambda: PatchExpand(6, factor=0), ValueError, ["PatchExpand: factor", "at least 1", "(0, 0)"]),
        (lambda: PatchExpand(6, factor=(1, 2, 2)), ValueError, ["PatchExpand: factor", "2 axes", "(1, 2, 2)"]),
        (lambda: FinalPatchExpandX4(-1), ValueError, ["FinalPatchExpandX4: dim", "at least 1", "got -1"]),
        (lambda: PatchEmbed(0), ValueError, ["PatchEmbed: patch_size", "at least 1", "(0, 0)"]),
        (lambda: PatchEmbed((2, 2), spatial_dims=3), ValueError, ["PatchEmbed: patch_size", "3 axes", "(2, 2)"]),
        (lambda: PatchEmbed(in_chans=0), ValueError, ["PatchEmbed: in_chans", "at least 1", "got 0"]),
        (lambda: PatchEmbed(embed_dim="96"), TypeError, ["PatchEmbed: embed_dim", "int", "'96'"]),
        (lambda: PatchEmbed(norm=nn.LayerNorm), TypeError, ["PatchEmbed: norm", "bool", "LayerNorm"]),
        (lambda: PatchEmbed(bias=0), TypeError, ["PatchEmbed: bias", "bool", "got 0"]),
        (lambda: PatchMerging(6)([1]), TypeError, ["PatchMerging: x", "tensor", "list"]),
        (
            lambda: PatchMerging(6)(zeros(2, 20, 6)),
            ValueError,
            ["x", "size=S", "(2, 20, 6)", "size=None"],
        ),
        (lambda: PatchMerging(6)(zeros(2, 4, 5, 6), size=(4, 5)), ValueError, ["if size is None", "(2, 4, 5, 6)"]),
        (lambda: PatchMerging(6)(zeros(2, 20, 6), size=(4, 4)), ValueError, ["L = 16", "(4, 4)", "(2, 20, 6)"]),
        (lambda: PatchMerging(6)(zeros(2, 20, 6), size=20), TypeError, ["PatchMerging: size", "(H, W)", "20"]),
        (lambda: PatchMerging(6)(zeros(2, 20, 6), size=(20,)), ValueError, ["PatchMerging: size", "(H, W)", "(20,)"]),
        # without this check, the op would merge two axes instead of three, because 4 * 12 = 8 * 6 channels
        (lambda: PatchMerging(6, spatial_dims=3)(zeros(2, 4, 4, 4, 12)), ValueError, ["dim = 6 channels", "got 12"]),
        (
            lambda: PatchMerging(6, spatial_dims=3)(zeros(2, 4, 4, 6)),
            ValueError,
            ["x", "3 spatial axes", "dims=3", "(4, 4)"],
        ),
        (lambda: PatchMerging(6)(zeros(2, 4, 4, 6).int()), TypeError, ["x", "bfloat16", "torch.int32"]),
        (lambda: PatchExpand(6)(zeros(2, 4, 4, 5)), ValueError, ["PatchExpand: x", "dim = 6", "got 5"]),
        (lambda: PatchEmbed()(zeros(2, 4, 8, 8)), ValueError, ["PatchEmbed: x", "(B, 3, *I)", "(2, 4, 8, 8)"]),
        (lambda: PatchEmbed()(zeros(2, 3, 8)), ValueError, ["PatchEmbed: x", "(H, W)", "(2, 3, 8)"]),
        (lambda: PatchEmbed(spatial_dims=3)(zeros(2, 3, 8, 8)), ValueError, ["PatchEmbed: x", "(D, H, W)"]),
        (lambda: PatchEmbed()(zeros(2, 3, 0, 8)), ValueError, ["at least one pixel", "(2, 3, 0, 8)"]),
        (lambda: PatchEmbed()(None), TypeError, ["PatchEmbed: x", "tensor", "NoneType"]),
    ],
)
def test_wrong_arguments(call, error, words):
    check(call, error, *words)
