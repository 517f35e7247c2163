"""Runs timm's models with this package's ops. Each module here adapts the blocks of one or more timm modules."""

from swinkernels.adapters.libraries.timm import maxvit, patch_embed, swin, swin_v2, swin_v2_cr, vit, vit_sam, windows

ADAPTERS = (
    *swin.ADAPTERS,
    *swin_v2.ADAPTERS,
    *swin_v2_cr.ADAPTERS,
    *maxvit.ADAPTERS,
    *vit.ADAPTERS,
    *vit_sam.ADAPTERS,
    *windows.ADAPTERS,
    *patch_embed.ADAPTERS,
)
