"""The form of the layers in SAM-HQ's vision encoder.

Source: transformers.models.sam_hq.modeling_sam_hq, transformers 5.
"""

from transformers.models.sam_hq.modeling_sam_hq import SamHQVisionLayer

from swinkernels.adapters.libraries.transformers._sam_layers import sam_form

ADAPTERS = (sam_form("SAM-HQ", SamHQVisionLayer),)
