"""Complete models made of the modules in :mod:`swinkernels.nn`, with the parameter names of the published code."""

from swinkernels.models.checkpoints import Loaded, load_pretrained
from swinkernels.models.swin_transformer import SwinTransformer
from swinkernels.models.swin_unet import SwinUnet

__all__ = ["Loaded", "SwinTransformer", "SwinUnet", "load_pretrained"]
