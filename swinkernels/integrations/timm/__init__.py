"""Importing this package adds accelerated models to timm's registry (``timm.list_models("swinkernels_*")``)."""

from swinkernels.integrations.timm import registry

__all__ = ["registry"]
