"""Accelerated entrypoints in timm's registry: ``timm.create_model("swinkernels_swin_tiny_patch4_window7_224")``.

Each model of timm's swin_transformer, swin_transformer_v2 and swin_transformer_v2_cr has such an entrypoint, with the
same pretrained tags and configurations. The entrypoint calls timm's entrypoint with the same arguments and accelerates
the model, also inside the ``features_only`` wrapper. The architecture in ``default_cfg`` has timm's name, so
checkpoints and hub uploads are interchangeable with timm's.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import nn

from swinkernels.adapters.engine import accelerate

PREFIX = "swinkernels_"

# timm.models.register_model reads the configurations from default_cfgs in the module of an entrypoint, and adds the
# entrypoint to the module's __all__.
default_cfgs: dict[str, Any] = {}
__all__ = ["PREFIX"]


def _entrypoint(name: str, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = original(pretrained=pretrained, **kwargs)
        report = accelerate(model)
        if not report.replaced:  # for example features_only with feature_cls="fx", which converts the model to a graph
            warnings.warn(f"{PREFIX}{name} runs timm's own code: {report}", stacklevel=3)
        return model

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = __name__
    create.__doc__ = f"timm's {name} on swinkernels: the same arguments, weights and results."
    return create


def _hub_id(cfg: Any, name: str, tag: str) -> str | None:
    """Return the hub id of timm's weights. timm would append the model's name, with ``PREFIX``, to a bare "timm/"."""
    return f"timm/{name}.{tag}" if cfg.hf_hub_id == "timm/" and tag else cfg.hf_hub_id


def _register(module: Any) -> None:
    for name in timm.list_models(module=module.__name__.rpartition(".")[2]):
        if timm.is_model(PREFIX + name):
            continue  # registering again would make timm warn about every name
        cfgs = module.default_cfgs.get(name)
        if cfgs is not None:
            own = {tag: replace(cfg, hf_hub_id=_hub_id(cfg, name, tag)) for tag, cfg in cfgs.cfgs.items()}
            default_cfgs[PREFIX + name] = replace(cfgs, tags=deque(cfgs.tags), cfgs=own)
        globals()[PREFIX + name] = timm.models.register_model(_entrypoint(name, timm.models.model_entrypoint(name)))


for _module in (swin_transformer, swin_transformer_v2, swin_transformer_v2_cr):
    _register(_module)
