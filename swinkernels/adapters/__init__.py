"""Defines ``accelerate`` and ``restore``, and the adapters that run other libraries' modules with this package's ops.

An adapter changes a module's class and keeps the module: parameters, buffers, hooks and names stay as they are.
``libraries`` contains the adapters for known libraries, ``copies`` creates adapters for unknown classes whose code was
copied from Microsoft's, and ``forms`` runs other modules from a description of their forward.
"""

from swinkernels.adapters.adapter import Accelerated, Adapter, register
from swinkernels.adapters.engine import accelerate, restore
from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.part import Part, window_attention_part
from swinkernels.adapters.report import Check, NotRecomputed, Ran, Replaced, Report, Skipped
from swinkernels.adapters.verify import VerificationError

__all__ = [
    "Accelerated",
    "Adapter",
    "Check",
    "Form",
    "NotRecomputed",
    "Part",
    "Ran",
    "Replaced",
    "Report",
    "Skipped",
    "VerificationError",
    "accelerate",
    "register",
    "restore",
    "window_attention_part",
]
