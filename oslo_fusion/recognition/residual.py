"""The end of a sublayer, ``residual + dropout(sublayer(x))``, with what comes before and after it in the module."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from oslo_fusion import probe
from oslo_fusion.decide import random
from oslo_fusion.recognition.trace import Trace, input_widths, linear_shape, required_arguments, same, trace

_MAX_CHILDREN = 8
_MAX_MODULES = 24


@dataclass(frozen=True)
class Residual:
    """How a module passes tensors on until it has added its residual, and after that.

    Attributes:
        arguments: how many tensors ``forward`` takes, 1 or 2.
        x, residual: which of them goes into the sublayer, and which is added.
        before: names of the children that ``x`` goes through, in order.
        dropout: the child that drops what they return.
        after: names of the children that the sum goes through.
    """

    arguments: int
    x: int
    residual: int
    before: tuple[str, ...]
    dropout: str
    after: tuple[str, ...]


def may_end_in_residual(module: nn.Module) -> bool:
    """Whether a module is small enough to be one sublayer: only such are run."""
    count = sum(1 for _ in module.children())
    return 2 <= count <= _MAX_CHILDREN and sum(1 for _ in module.modules()) <= _MAX_MODULES


def recognise_residual(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Residual | None:
    """Run a copy on random numbers and look for the addition; None if there is none.

    Args:
        module: one that :func:`may_end_in_residual`.
        device, dtype: of its parameters.
    """
    dropouts = [name for name, child in module.named_children() if type(child) is nn.Dropout]
    try:
        arguments = required_arguments(module)
    except (TypeError, ValueError):
        return None
    if len(dropouts) != 1 or arguments not in (1, 2):
        return None
    widths = input_widths(module)
    outputs = [shape[1] for part in module.modules() if (shape := linear_shape(part)) is not None]
    for sizes in itertools.product(widths, dict.fromkeys((*widths, *outputs)) if arguments == 2 else (0,)):
        with probe.preserved_random_state():
            inputs = [random(2, 3, size, device=device, dtype=dtype) for size in sizes[:arguments]]
        found = trace(module, inputs)
        if found is not None:
            return _wiring(found, dropouts[0])
    return None


def _wiring(found: Trace, dropout: str) -> Residual | None:
    names = [call.child for call in found.calls]
    if names.count(dropout) != 1 or len(set(names)) != len(names):
        return None
    at = names.index(dropout)
    if at == 0:
        return None
    for x, residual in itertools.product(range(len(found.inputs)), repeat=2):
        before, last = found.calls[: at + 1], found.calls[at]
        linked = all(same(a.returned, b.received) for a, b in itertools.pairwise(before))
        if not linked or not same(found.inputs[x], before[0].received):
            continue
        if last.returned.shape != found.inputs[residual].shape:
            continue
        total = last.returned + found.inputs[residual]
        rest = found.calls[at + 1 :]
        reached = same(total, rest[0].received) if rest else same(total, found.output)
        if reached and (not rest or (found.rest_is_chain(at + 2) and same(rest[-1].returned, found.output))):
            return Residual(len(found.inputs), x, residual, tuple(names[:at]), dropout, tuple(names[at + 1 :]))
    return None
