"""Recognition by structure: what an activation computes, and how a small module passes tensors between its children.

Nothing here knows a model by name. A module's copy is run on random numbers; what its children received and returned says
how they are wired, and what an elementwise module returns says which formula it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oslo_fusion.jit.formulas import FORMULAS, Formula
from oslo_fusion.probe import preserved_random_state, shadow


class _Operators(TorchDispatchMode):
    """Counts the ATen operators that compute something (views and detaches launch no kernel)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Activation:
    """What was recognised in an elementwise module."""

    formula: Formula | None
    kernels: int
    operators: tuple[str, ...]
    autocast_dtype: torch.dtype | None
    """What the module returns for a half-precision input under autocast, if not that precision."""


def required_arguments(module: nn.Module) -> int:
    """How many positional arguments ``forward`` needs."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in plain for p in parameters)


def recognise_activation(module: nn.Module, device: torch.device) -> Activation | None:
    """Which elementwise formula the module computes, or None if it is no elementwise function of one tensor.

    Args:
        module: a leaf without parameters and buffers.
        device: where to count kernels and to try autocast.
    """
    if next(module.children(), None) or next(module.parameters(), None) is not None:
        return None
    if next(module.buffers(), None) is not None or isinstance(module, (nn.Dropout, nn.Identity)):
        return None
    grid = torch.linspace(-12, 12, 193, dtype=torch.float64).reshape(1, 193)
    twin = shadow(module)
    try:
        if required_arguments(module) != 1:
            return None
        with torch.no_grad(), preserved_random_state():
            y = twin(grid)
            if not isinstance(y, Tensor) or y.shape != grid.shape or y.dtype != grid.dtype:
                return None
            if not torch.equal(twin(grid[:, 64:]), y[:, 64:]) or torch.equal(y, grid):
                return None  # not elementwise, random, or the identity
            operators, on_device = _Operators(), grid.to(device, torch.float32)
            with operators:
                twin(on_device)
            half = torch.bfloat16
            with torch.autocast(device.type, dtype=half):
                autocast_dtype = twin(grid.to(device, half)).dtype
    except Exception:
        return None
    for formula in FORMULAS.values():
        if torch.allclose(y, formula.meaning(grid), rtol=1e-8, atol=1e-8):
            break
    else:
        formula = None
    names = tuple(operators.names)
    return Activation(formula, len(names), names, None if autocast_dtype == half else autocast_dtype)


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
