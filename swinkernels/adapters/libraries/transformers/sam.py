"""The form of the layers in SAM's vision encoder.

Source: transformers.models.sam.modeling_sam, transformers 5.
"""

from transformers.models.sam.modeling_sam import SamVisionLayer

from swinkernels.adapters.libraries.transformers._sam_layers import sam_form

ADAPTERS = (sam_form("SAM", SamVisionLayer),)
