"""Modules that use this package's ops. Published checkpoints load strictly, because parameter names are the same.

The norms, the layers ``reduction`` and ``expand`` next to them, and in v2 ``qkv``, only store their parameters, with
the published names and initialisation. These layers are not called: hooks on them do not run, and replacing one with a
layer that computes something else has no effect. All other layers are called.

A module takes a feature map (B, \\*S, C) and returns a feature map. If the published module works on sequences of
tokens, this one also accepts a sequence (B, L, C) with the size S of its map, L = prod(S), and then returns a sequence.
The same classes support 2D and 3D; a window of three values, or ``spatial_dims=3``, selects 3D.

Buffers that published checkpoints store (``relative_position_index``, ``relative_coords_table``, ``attn_mask``) are
computed and not stored. Checkpoints that contain them load, strictly or not. An index that differs from Microsoft's
raises an error, because the checkpoint's bias table has another order.
"""

from swinkernels.nn.drop_path import DropPath
from swinkernels.nn.mlp import Mlp
from swinkernels.nn.patch_embed import PatchEmbed
from swinkernels.nn.patch_expand import FinalPatchExpandX4, PatchExpand
from swinkernels.nn.patch_merging import PatchMerging, PatchMergingV2
from swinkernels.nn.swin_block import BasicLayer, BasicLayerV2, SwinTransformerBlock, SwinTransformerBlockV2
from swinkernels.nn.vit import Attention, Block, LayerScale, RelPosBias
from swinkernels.nn.window_attention import WindowAttention, WindowAttentionV2

__all__ = [
    "Attention",
    "BasicLayer",
    "BasicLayerV2",
    "Block",
    "DropPath",
    "FinalPatchExpandX4",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "PatchExpand",
    "PatchMerging",
    "PatchMergingV2",
    "RelPosBias",
    "SwinTransformerBlock",
    "SwinTransformerBlockV2",
    "WindowAttention",
    "WindowAttentionV2",
]
