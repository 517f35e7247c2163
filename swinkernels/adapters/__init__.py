"""accelerate and restore, and the adapters that tell them how the modules of a library run on this package's ops.

An adapter swaps the class of a module, not the module: parameters, buffers, hooks and names stay as they are.
``libraries`` holds the adapters of known libraries, ``copies`` those of unknown classes of Microsoft's published form,
``forms`` runs modules of other forms by a description of their forward.
"""

from swinkernels.adapters.adapter import Accelerated, Adapter, register
from swinkernels.adapters.engine import accelerate, restore
from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.part import Part, window_attention_part
from swinkernels.adapters.report import Check, Ran, Replaced, Report, Skipped
from swinkernels.adapters.verify import VerificationError

__all__ = [
    "Accelerated",
    "Adapter",
    "Check",
    "Form",
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
