"""The definition of every op in plain PyTorch: slow, obvious, differentiable, and exact in float64."""

from swinkernels.reference.window_attention import window_attention, window_attention_qkvpacked

__all__ = ["window_attention", "window_attention_qkvpacked"]
