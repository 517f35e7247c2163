"""Adds accelerated models to timm's registry when imported (``timm.list_models("swinkernels_*")``)."""

from swinkernels.integrations.timm import registry

__all__ = ["registry"]
