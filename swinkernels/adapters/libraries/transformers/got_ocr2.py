"""The form of the layers in GOT-OCR2's vision encoder.

Source: transformers.models.got_ocr2.modeling_got_ocr2, transformers 5.
"""

from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionLayer

from swinkernels.adapters.libraries.transformers._sam_layers import sam_form

ADAPTERS = (sam_form("GOT-OCR2", GotOcr2VisionLayer),)
