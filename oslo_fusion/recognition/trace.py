"""How a small module passes tensors between its children, seen by running a copy of it with hooks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion.probe import preserved_random_state, shadow


def required_arguments(module: nn.Module) -> int:
    """How many positional arguments ``forward`` needs."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in plain for p in parameters)


@dataclass(frozen=True)
class Call:
    """One call of a direct child: its name, the first tensor it received, and the tensor it returned."""

    child: str
    received: Tensor
    returned: Tensor


@dataclass(frozen=True)
class Trace:
    """What a module did with its inputs: the calls of its direct children in order, and its output."""

    inputs: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    output: Tensor

    def rest_is_chain(self, start: int) -> bool:
        """Whether, from call ``start`` on, each call receives what the one before returned, up to the output."""
        links = self.calls[start:]
        for previous, following in zip(self.calls[start - 1 :], links, strict=False):
            if not same(previous.returned, following.received):
                return False
        return same((links or self.calls)[-1].returned, self.output)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two recorded tensors hold the same numbers, up to a cast to the second's dtype."""
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def trace(module: nn.Module, inputs: Sequence[Tensor], *, training: bool = True) -> Trace | None:
    """Run a copy of the module and record its direct children's calls.

    Args:
        module: a module whose forward takes as many tensors as there are inputs and returns one tensor.
        inputs: the tensors, on the module's device.
        training: run the copy in training mode, so that a dropout leaves its mark.

    Returns:
        The trace; None if the module cannot be run so or returns something else.
    """
    twin = shadow(module).train(training)
    calls: list[Call] = []

    def hook(name: str) -> Any:
        def record(child: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(returned, Tensor):
                raise TypeError("not a tensor-to-tensor call")
            calls.append(Call(name, args[0].detach().clone(), returned.detach().clone()))

        return record

    for name, child in twin.named_children():
        child.register_forward_hook(hook(name))
    try:
        with torch.no_grad(), preserved_random_state():
            output = twin(*(t.clone() for t in inputs))
    except Exception:
        return None
    if not isinstance(output, Tensor) or not calls:
        return None
    return Trace(tuple(inputs), tuple(calls), output)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a plain ``nn.Linear`` or transformers ``Conv1D``; None for anything else.

    Subclasses (quantised, LoRA, tensor-parallel) compute something else and are not plain.
    """
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether anything listens to, or replaces, this module's own calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def input_widths(module: nn.Module) -> list[int]:
    """Widths that the module may expect of its input: those of its linear layers and norms, in order."""
    widths: dict[int, None] = {}
    for part in module.modules():
        shape = linear_shape(part)
        if shape is not None:
            widths[shape[0]] = None
        elif part.__dict__.get("_parameters") and not next(part.children(), None):
            for parameter in part.parameters(recurse=False):
                if parameter.dim() == 1:
                    widths[parameter.numel()] = None
    return list(widths)


def run_chain(module: nn.Module, h: Tensor, names: Sequence[str], casts: Sequence[str] = ()) -> Tensor:
    """Call the named children one after the other; those in ``casts`` get their weight's dtype first."""
    for name in names:
        child = getattr(module, name)
        if name in casts and isinstance(getattr(child, "weight", None), Tensor):
            h = h.to(child.weight.dtype)
        h = child(h)
    return h
