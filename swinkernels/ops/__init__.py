"""The functional entry points, one file per op."""

from swinkernels.ops.window_attention import window_attention, window_attention_qkvpacked

import swinkernels.triton  # isort: skip  attaches to the ops, which are defined by now

__all__ = ["window_attention", "window_attention_qkvpacked"]
