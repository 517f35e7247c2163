"""timm's models on this package's ops: a file for each of timm's that has blocks of its own.

Importing this package adds accelerated models to timm's registry (``timm.list_models("swinkernels_*")``).
"""

from swinkernels.integrations.timm import maxvit, registry, swin, swin_v2, swin_v2_cr, vit

__all__ = ["ADAPTERS", "registry"]

ADAPTERS = (*swin.ADAPTERS, *swin_v2.ADAPTERS, *swin_v2_cr.ADAPTERS, *maxvit.ADAPTERS, *vit.ADAPTERS)
