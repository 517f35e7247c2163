"""Fused CUDA, Triton and C++ kernels for shifted-window attention, as PyTorch ops and as drop-in Swin modules."""

from swinkernels import reference
from swinkernels._version import __version__
from swinkernels.integrations import accelerate, restore
from swinkernels.ops import window_attention, window_attention_qkvpacked

__all__ = ["__version__", "accelerate", "reference", "restore", "window_attention", "window_attention_qkvpacked"]
