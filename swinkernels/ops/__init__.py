"""The functional entry points, one file per op."""

from swinkernels.ops.window_attention import window_attention, window_attention_qkvpacked

__all__ = ["window_attention", "window_attention_qkvpacked"]
