"""Counts the calls of this package's ops."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from swinkernels._namespace import NAMESPACE


@contextlib.contextmanager
def op_calls() -> Iterator[collections.Counter[str]]:
    """Count the eager calls of each op inside the context, by op name without the namespace."""
    calls: collections.Counter[str] = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == NAMESPACE:
                calls[function.name().partition("::")[2]] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        yield calls
