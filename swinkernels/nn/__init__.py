"""Modules on this package's ops, with the parameter names of the published codes: their checkpoints load strictly.

The submodules (``norm``, ``reduction``, ``expand``) hold the parameters, under the names and with the initialisation
that the published modules give them, but are not called: hooks on them do not run, and a replacement that computes
something else has no effect. PatchEmbed's convolution is called.

Where the published modules work on sequences of tokens, a module takes both forms. A feature map (B, \\*S, C) comes out
as a feature map. A sequence (B, L, C) needs the size S of its map, L = prod(S), and comes out as a sequence.
"""

from swinkernels.nn.patch_embed import PatchEmbed
from swinkernels.nn.patch_expand import FinalPatchExpandX4, PatchExpand
from swinkernels.nn.patch_merging import PatchMerging, PatchMergingV2

__all__ = ["FinalPatchExpandX4", "PatchEmbed", "PatchExpand", "PatchMerging", "PatchMergingV2"]
