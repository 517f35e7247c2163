"""Other libraries' models on this package's kernels: one file per library, and what puts them in place.

An adapter swaps the class of a module, not the module: parameters, buffers, hooks and names stay as they are.
"""

from swinkernels.integrations._accelerate import accelerate, restore
from swinkernels.integrations._report import Replaced, Report, Skipped
from swinkernels.integrations._verify import VerificationError

__all__ = ["Replaced", "Report", "Skipped", "VerificationError", "accelerate", "restore"]
