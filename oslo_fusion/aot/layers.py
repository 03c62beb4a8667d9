"""Repeated layers, found by structure: the items of a module list that share a class. No model is known by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Repeated:
    """A layer of which the model has several.

    ``kind`` is the same for layers that look the same, down to the sizes of their parts.
    """

    path: str
    module: nn.Module
    kind: str


def repeated_layers(model: nn.Module) -> list[Repeated]:
    """The items, with parts and parameters, of the outermost module lists that hold two or more of their class."""
    found: list[Repeated] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{layer.path}.") for layer in found)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        counts = Counter(type(item) for item in module)
        for name, item in module.named_children():
            if counts[type(item)] < 2 or next(item.children(), None) is None or next(item.parameters(), None) is None:
                continue
            found.append(Repeated(f"{path}.{name}" if path else name, item, repr(item)))
    return found
