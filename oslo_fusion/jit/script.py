"""The one file that names ``torch.jit``: functions that TorchScript compiles at their first call.

TorchScript is deprecated in torch 2.11 to 2.15 and works there; the warning is silenced here, and only for our own calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

ROOM = "jit"


class Scripted:
    """A function that is scripted at its first call, so that importing this package compiles nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                self._compiled = torch.jit.script(self.function)
        return self._compiled(*args)


def scripted(function: Callable[..., Any]) -> Scripted:
    """Decorator: let TorchScript compile this function at its first call."""
    return Scripted(function)
