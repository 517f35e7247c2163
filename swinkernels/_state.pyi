from typing import Any

LAYOUT: int

def tensors_if_current(module: Any, facts: tuple[Any, ...], /) -> Any:
    """Return the result of ``_State._tensors_if_current`` of swinkernels/adapters/checks.py for the state's facts."""
