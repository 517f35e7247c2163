"""Loads published Swin checkpoints: translates names, reorders channels and resizes bias tables for other windows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.ops.patch_merging import RUNS
from swinkernels.reference.window_attention import relative_position_index

Tensors = dict[str, Tensor]

# Source -> the pattern of a key that only its checkpoints have. The text before a match is the prefix of all keys.
_ANCHORS = {
    "torchvision": r"features\.1\.0\.norm1\.weight",
    "transformers": r"encoder\.layers\.0\.blocks\.0\.layernorm_before\.weight",
    "mmpretrain": r"stages\.0\.blocks\.0\.norm1\.weight",
    "monai": r"layers1\.0\.blocks\.0\.norm1\.weight",
    "microsoft": r"layers[._]0\.blocks\.0\.norm1\.weight",
}
_ANCHORS["timm"] = _ANCHORS["microsoft"]  # patch merging ends a stage in Microsoft's code and begins one in timm's
SOURCES = tuple(_ANCHORS)

# Source -> (pattern in the source's names, replacement in Microsoft's names). All rules that match a key are applied,
# in order.
_NAMES: dict[str, list[tuple[str, str | Callable[[re.Match[str]], str]]]] = {
    "microsoft": [],
    "timm": [(r"^layers_(\d+)\.", r"layers.\1."), (r"^head\.fc\.", "head.")],
    "torchvision": [
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.(\d*[13579])\.(\d+)\.", lambda m: f"layers.{(int(m[1]) - 1) // 2}.blocks.{m[2]}."),
        (r"^features\.(\d*[02468])\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    ],
    "transformers": [
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.layers\.", "layers."),
        (r"^layernorm\.", "norm."),
        (r"^hidden_states_norms\.stage(\d+)\.", lambda m: f"norm{int(m[1]) - 1}."),
        (r"^classifier\.", "head."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(self\.|relative_position_bias\.)?", ".attn."),
        (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attn\.(query|key|value)\.", lambda m: f".attn.{m[1][0]}."),
        (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ],
    "mmpretrain": [
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^stages\.", "layers."),
        (r"^head\.fc\.", "head."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ],
    "monai": [
        (r"^layers(\d+)\.0\.", lambda m: f"layers.{int(m[1]) - 1}."),
        (r"\.mlp\.linear([12])\.", r".mlp.fc\1."),
    ],
}

# Names of checkpoint entries for buffers that the modules compute.
_COMPUTED = ("attn_mask", "relative_position_index", "relative_coords_table")


@dataclass
class Loaded:
    """Result of :func:`load_pretrained`; ``print`` it for a summary."""

    source: str
    loaded: list[str] = field(default_factory=list)  # parameters with values from the checkpoint
    resized: dict[str, str] = field(default_factory=dict)  # bias tables resized from another window -> the rule
    left: dict[str, str] = field(default_factory=dict)  # unused entries of the checkpoint -> the reason
    kept: list[str] = field(default_factory=list)  # unchanged parameters, missing from the checkpoint

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} parameters loaded"]
        for rule in dict.fromkeys(self.resized.values()):
            names = [name for name, of in self.resized.items() if of == rule]
            lines.append(f"{len(names)} bias tables resized, such as {names[0]}: {rule}")
        for why in dict.fromkeys(self.left.values()):
            names = [name for name, of in self.left.items() if of == why]
            lines.append(f"not used: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}: {why}")
        if self.kept:
            lines.append(f"not in the checkpoint, unchanged: {', '.join(self.kept)}")
        return "\n".join(lines)


def load_pretrained(model: nn.Module, checkpoint: Mapping[str, Any], source: str = "auto") -> Loaded:
    """Load a published Swin checkpoint into a model with the parameter names of Microsoft's code.

    Names are translated, separate q, k and v layers are joined and, for mmpretrain, the channels of patch merging are
    reordered. A bias table trained with another window is resized by the rule that the checkpoint's library uses:

    - timm: linear interpolation between the source's offsets, which are placed in the new window with gaps that
      grow geometrically. This keeps the centre and the outermost offsets for a larger window, and nearly crops the
      table for a smaller one.
    - mmpretrain: interpolation between the same offsets, by cubic splines; this needs SciPy.
    - Microsoft, and libraries without a rule (torchvision, transformers, MONAI): bicubic interpolation of the table.

    Swin v2 has no table. Its position MLP is evaluated at the offsets of the new window; for this, the model must be
    created with ``pretrained_window_sizes``.

    Args:
        model: :class:`SwinTransformer`, :class:`SwinUnet`, or another module with ``patch_embed`` and stages
            ``layers`` of :class:`swinkernels.nn.BasicLayer`, in 2D or 3D. The model is changed only if all entries fit.
        checkpoint: the state dict of a model from ``source``, or a dict that contains it as "model" or "state_dict".
            Keys may have a prefix, such as "backbone." or "module.".
        source: "microsoft", "timm", "torchvision", "transformers", "mmpretrain", "monai", or "auto", which infers it
            from the keys.

    Returns:
        A :class:`Loaded`, which lists the entries that were loaded, resized (with the rule) or left out, and the
        parameters that kept their values. A head for another number of classes and entries outside the backbone are
        left out. Entries that the encoder does not need, such as the head, the norms of ``out_indices`` or a decoder,
        may be missing. As in the published code, the encoder's blocks are also copied into the decoder of a
        :class:`SwinUnet`, unless the checkpoint has a decoder.

    Raises:
        TypeError: ``model`` is not a module, or ``checkpoint`` contains no tensors.
        ValueError: the source is unknown, or entries do not fit; the message lists up to eight of them.

    Source: ``load_pretrained`` of Microsoft's Swin-Transformer; ``resize_rel_pos_bias_table`` of timm;
    ``resize_relative_position_bias_table`` of mmpretrain; ``load_from`` of Swin-Unet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_pretrained: model must be a torch.nn.Module, got {type(model).__name__}")
    state = _tensors(checkpoint)
    loaded = Loaded(source)
    loaded.source, prefix = _find_source(source, state)
    converted: Tensors = {}
    for key, value in state.items():
        if key.startswith(prefix) or not prefix or re.match(r"(head|classifier|norm)\b", key):
            converted[_rename(loaded.source, key.removeprefix(prefix))] = value
        else:
            loaded.left[key] = f"it is outside the backbone, whose keys begin with {prefix!r}"
    converted = _with_joined_qkv(converted)
    converted = _with_merging_of(model, converted)
    expected = model.state_dict()
    if loaded.source == "mmpretrain":
        converted = _with_names_of_norms(converted, expected)
        _reorder_merging(model, converted)
    if any(key.startswith("layers_up.") for key in expected) and not any(k.startswith("layers_up.") for k in converted):
        converted |= _for_decoder(converted, expected)
    _resize_tables(model, converted, expected, loaded)
    _leave(model, converted, expected, loaded)
    problems = [
        *(f"{key}: the model has no such parameter" for key in converted if key not in expected and not _computed(key)),
        *(
            f"{key}: shape {tuple(converted[key].shape)}, in the model {tuple(value.shape)}"
            for key, value in expected.items()
            if key in converted and converted[key].shape != value.shape
        ),
        *(
            f"{key}: not in the checkpoint"
            for key in expected
            if key not in converted and key.startswith(("patch_embed.", "layers."))
        ),
        *_wrong_windows(model, converted),
        *_wrong_indices(model, converted),
    ]
    if problems:
        raise ValueError(
            f"load_pretrained: {len(problems)} entries of the {loaded.source} checkpoint do not fit the model, which "
            "is unchanged: make the model with the sizes of the checkpoint. "
            + "; ".join(problems[:8])
            + ("; ..." * (len(problems) > 8))
        )
    loaded.kept = [key for key in expected if key not in converted]
    loaded.loaded = [key for key in expected if key in converted]
    model.load_state_dict(converted | {key: expected[key] for key in loaded.kept}, strict=True)
    return loaded


def _tensors(checkpoint: Mapping[str, Any]) -> Tensors:
    for name in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    state = (
        {key: v for key, v in checkpoint.items() if isinstance(v, Tensor)} if isinstance(checkpoint, Mapping) else {}
    )
    if not state:
        raise TypeError(
            "load_pretrained: checkpoint must be a state dict, or a dict that contains one as 'model' or 'state_dict', "
            f"got {type(checkpoint).__name__} without tensors"
        )
    return state


def _find_source(source: str, state: Tensors) -> tuple[str, str]:
    """Return the source of a checkpoint and the prefix of its keys."""
    if source not in ("auto", *SOURCES):
        raise ValueError(f"load_pretrained: source must be 'auto' or one of {SOURCES}, got {source!r}")
    for name in SOURCES if source == "auto" else (source,):
        for key in state:
            match = re.fullmatch(rf"(|.*\.){_ANCHORS[name]}", key)
            if match is None:
                continue
            prefix = match[1]
            if source == "auto" and name == "microsoft" and _first_merging(state, prefix) != 0:
                name = "timm"
            return name, prefix
    what = "any known source" if source == "auto" else source
    raise ValueError(
        f"load_pretrained: this is not a Swin checkpoint of {what}: no key ends with "
        f"{_ANCHORS.get(source, 'a known name')}. Got {', '.join(list(state)[:4])}, ...; "
        f"known sources are {', '.join(SOURCES)}"
    )


def _first_merging(state: Tensors, prefix: str = "") -> int | None:
    """Return the index of the first stage with patch merging (0 if it ends stages, 1 if it begins them), or None."""
    found = [re.match(rf"{re.escape(prefix)}layers[._](\d+)\.downsample\.", key) for key in state]
    return min((int(m[1]) for m in found if m is not None), default=None)


def _rename(source: str, key: str) -> str:
    for pattern, name in _NAMES[source]:
        key = re.sub(pattern, name, key)
    return key


def _with_joined_qkv(state: Tensors) -> Tensors:
    """Join the weights and biases of q, k and v into those of qkv; in v2, store the biases as q_bias and v_bias."""
    joined = dict(state)
    for key in state:
        prefix = key.removesuffix("logit_scale")
        if key.endswith(".attn.logit_scale") and f"{prefix}qkv.bias" in joined:
            joined[f"{prefix}q_bias"], _, joined[f"{prefix}v_bias"] = joined.pop(f"{prefix}qkv.bias").chunk(3)
    for key in state:
        prefix = key.removesuffix("q.weight")
        if not key.endswith(".attn.q.weight"):
            continue
        parts = [joined.pop(f"{prefix}{name}.weight", None) for name in "qkv"]
        if any(part is None for part in parts):
            raise ValueError(f"load_pretrained: the checkpoint has {key}, but lacks the weight of k or v")
        joined[f"{prefix}qkv.weight"] = torch.cat([part for part in parts if part is not None])
        biases = {name: joined.pop(f"{prefix}{name}.bias", None) for name in "qkv"}
        if biases["q"] is None or biases["v"] is None:
            continue
        if f"{prefix}logit_scale" in state:
            joined |= {f"{prefix}q_bias": biases["q"], f"{prefix}v_bias": biases["v"]}
        elif biases["k"] is not None:
            joined[f"{prefix}qkv.bias"] = torch.cat([biases["q"], biases["k"], biases["v"]])
    return joined


def _with_merging_of(model: nn.Module, state: Tensors) -> Tensors:
    """Renumber the stages in the keys of patch merging to match ``model``, where merging ends or begins stages."""
    theirs, ours = _first_merging(state), _first_merging(model.state_dict())
    if theirs is None or ours is None or theirs == ours:
        return state
    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + ours - theirs}.downsample.", key): value
        for key, value in state.items()
    }


def _with_names_of_norms(state: Tensors, expected: Tensors) -> Tensors:
    """Rename the last norm of mmpretrain's checkpoints to "norm"; mmpretrain numbers it even in a classifier."""
    if "norm.weight" not in expected:
        return state
    last = max((key for key in state if re.match(r"norm\d+\.weight$", key)), default="").removesuffix(".weight")
    return {re.sub(rf"^{last}\.", "norm.", key) if last else key: value for key, value in state.items()}


def _reorder_merging(model: nn.Module, state: Tensors) -> None:
    """Reorder the input channels of patch merging from mmcv's order, channel-major, to the model's, neighbour-major."""
    for key in [k for k in state if re.match(r"layers\.\d+\.downsample\.reduction\.weight$", k)]:
        path = key.removesuffix(".reduction.weight")
        try:
            merging: Any = model.get_submodule(path)
        except AttributeError:  # reported later: the model has no such parameter
            continue
        if merging.order == "unfold":
            continue
        runs = torch.tensor(RUNS[merging.order, merging.spatial_dims])
        width = state[key].shape[1]
        for name in (key, f"{path}.norm.weight", f"{path}.norm.bias"):
            t = state.get(name)
            if t is not None and t.shape[-1] == width:  # false for the norm in v2, which follows the reduction
                state[name] = t.unflatten(-1, (-1, len(runs)))[..., runs.to(t.device)].transpose(-1, -2).flatten(-2)


def _for_decoder(state: Tensors, expected: Tensors) -> Tensors:
    """Return the entries of the encoder's blocks under the names of the decoder stages of the same width."""
    last = max(int(m[1]) for key in expected if (m := re.match(r"layers\.(\d+)\.", key)) is not None)
    found = {}
    for key, value in state.items():
        match = re.match(r"layers\.(\d+)\.(blocks\..*)", key)
        name = "" if match is None else f"layers_up.{last - int(match[1])}.{match[2]}"
        if name in expected and expected[name].shape == value.shape:
            found[name] = value
    return found


def _computed(key: str) -> bool:
    return key.rpartition(".")[2] in _COMPUTED


def _leave(model: nn.Module, state: Tensors, expected: Tensors, loaded: Loaded) -> None:
    """Remove the entries that the model does not need from ``state``, and record them in ``loaded.left``."""
    stages = 1 + max((int(m[1]) for key in expected if (m := re.match(r"layers\.(\d+)\.", key))), default=-1)
    for key in list(state):
        if re.match(r"head\.", key):
            if key not in expected:
                loaded.left[key] = "the model has no head"
            elif state[key].shape != expected[key].shape:
                classes = state[key].shape[0], expected[key].shape[0]
                loaded.left[key] = f"the head has {classes[0]} classes; the model's head has {classes[1]}"
        elif re.match(r"norm\d*\.", key) and key not in expected:
            loaded.left[key] = "the model has no norm there"
        elif re.match(r"layers\.(\d+)\.downsample\.", key) and key not in expected:
            if int(key.split(".")[1]) + 1 >= stages:
                loaded.left[key] = "the model does not merge after its last stage"
        elif re.match(r"layers\.(\d+)\.", key) and int(key.split(".")[1]) >= stages:
            if getattr(model, "out_indices", None) is not None:
                loaded.left[key] = "the model ends with the last stage that it returns"
        elif key in ("mask_token", "embeddings.mask_token"):
            loaded.left[key] = "only pretraining uses it"
        if key in loaded.left:
            del state[key]


# --- windows


def _resize_tables(model: nn.Module, state: Tensors, expected: Tensors, loaded: Loaded) -> None:
    name = "relative_position_bias_table"
    for key in [k for k in state if k.endswith(name) and k in expected]:
        table, wanted = state[key], expected[key]
        if table.shape == wanted.shape or table.dim() != 2 or table.shape[1] != wanted.shape[1]:
            continue
        module: Any = model.get_submodule(key.removesuffix(f".{name}"))
        target = tuple(2 * w - 1 for w in module.window_size)
        axes = len(target)
        side = round(table.shape[0] ** (1 / axes))
        if side**axes != table.shape[0] or axes == 3:
            continue  # the checkpoint's window is unknown; reported later as a wrong shape
        rule, resize = _RULES.get(loaded.source, _RULES["microsoft"])
        if loaded.source not in _RULES:
            rule += f"; {loaded.source} has no rule for resizing"
        state[key] = resize(table.float(), side, target).to(table.dtype)
        loaded.resized[key] = rule
        state.pop(key.replace(name, "relative_position_index"), None)


def _bicubic(table: Tensor, side: int, target: tuple[int, ...]) -> Tensor:
    maps = table.T.reshape(1, -1, side, side)
    return F.interpolate(maps, target, mode="bicubic", align_corners=False).flatten(2)[0].T.contiguous()


def _geometric_offsets(side: int, target: int) -> Tensor:
    """Return where the ``side`` entries of a table axis lie on the offset axis of a table with ``target`` entries.

    The positions are symmetric about 0, and the gaps between them grow geometrically.
    """
    reach, wanted = side // 2, target // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**reach) / (1 - ratio) > wanted:
            high = ratio
        else:
            low = ratio
    distances = torch.cumsum(torch.tensor([ratio**i for i in range(reach)], dtype=torch.float64), 0)
    return torch.cat([-distances.flip(0), torch.zeros(1, dtype=torch.float64), distances])


def _linear_weights(at: Tensor, wanted: Tensor) -> Tensor:
    """Return the (len(wanted), len(at)) matrix of linear interpolation from offsets ``at`` to ``wanted``.

    Beyond the ends of ``at``, the interpolation is constant.
    """
    right = torch.searchsorted(at, wanted).clamp(1, len(at) - 1)
    share = ((wanted - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    weights = torch.zeros(len(wanted), len(at), dtype=at.dtype)
    rows = torch.arange(len(wanted))
    weights[rows, right - 1] = 1 - share
    weights[rows, right] = share
    return weights


def _offsets(target: int) -> Tensor:
    return torch.arange(-(target // 2), target // 2 + 1, dtype=torch.float64)


def _linear_on_geometric(table: Tensor, side: int, target: tuple[int, ...]) -> Tensor:
    rows, columns = (_linear_weights(_geometric_offsets(side, n), _offsets(n)) for n in target)
    maps = table.T.reshape(-1, side, side).double().cpu()
    return (rows @ maps @ columns.T).flatten(1).T.to(table)


def _cubic_on_geometric(table: Tensor, side: int, target: tuple[int, ...]) -> Tensor:
    try:
        from scipy.interpolate import RectBivariateSpline
    except ImportError as error:
        raise ImportError(
            "load_pretrained: resizing tables as mmpretrain does needs SciPy: pip install scipy"
        ) from error
    (y, x), (to_y, to_x) = [[of(n) for n in target] for of in (lambda n: _geometric_offsets(side, n), _offsets)]
    maps = [
        torch.from_numpy(RectBivariateSpline(y, x, values, kx=3, ky=3)(to_y, to_x))
        for values in table.T.reshape(-1, side, side).double().cpu().numpy()
    ]
    return torch.stack(maps).flatten(1).T.to(table)


_RULES: dict[str, tuple[str, Callable[[Tensor, int, tuple[int, ...]], Tensor]]] = {
    "microsoft": ("bicubic, as in Microsoft's code", _bicubic),
    "timm": ("linear between geometric offsets, as in timm", _linear_on_geometric),
    "mmpretrain": ("cubic between geometric offsets, as in mmpretrain", _cubic_on_geometric),
}


def _wrong_windows(model: nn.Module, state: Tensors) -> list[str]:
    """Remove v2 offset tables and masks from ``state``; return a message for each table that does not fit the model."""
    problems = []
    for key in [k for k in state if k.endswith(".relative_coords_table")]:
        path = key.rpartition(".")[0]
        theirs = state.pop(key)
        try:
            module: Any = model.get_submodule(path)
        except AttributeError:
            continue
        sizes = theirs.reshape(1, *theirs.shape[-1 - theirs.shape[-1] :]).shape[1:-1]
        trained = tuple((n + 1) // 2 for n in sizes)
        if trained == module.window_size:
            same = torch.allclose(
                theirs.reshape(-1, theirs.shape[-1]).double().cpu(),
                module.relative_coords_table.double().cpu(),
                atol=1e-5,
            )
        else:
            same = tuple(module.pretrained_window_size) == trained
            state.pop(f"{path}.relative_position_index", None)
        if not same:
            problems.append(
                f"{key}: the checkpoint has offsets of a window {trained}; the model has window {module.window_size}, "
                f"pretrained_window_size {tuple(module.pretrained_window_size)}. Make the model with the "
                "checkpoint's pretrained_window_sizes or, if those are 0, with the windows of its training"
            )
    for key in [k for k in state if k.endswith(".attn_mask")]:
        del state[key]
    return problems


def _wrong_indices(model: nn.Module, state: Tensors) -> list[str]:
    """Remove bias-table indices from ``state``; return a message for each that differs from the model's."""
    problems = []
    for key in [k for k in state if k.endswith(".relative_position_index")]:
        theirs = state.pop(key)
        try:
            module: Any = model.get_submodule(key.rpartition(".")[0])
        except AttributeError:  # reported already: the model has no such parameters
            continue
        ours = relative_position_index(module.window_size, device="cpu").reshape(-1)
        if not theirs.is_meta and not torch.equal(theirs.reshape(-1).to("cpu", ours.dtype), ours):
            problems.append(f"{key}: differs from the index of Microsoft's code for window_size {module.window_size}")
    return problems
