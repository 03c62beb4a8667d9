"""Which elementwise formula a module computes, by its values in float64.

Sources: GELU, arXiv:1606.08415; SiLU, arXiv:1702.03118; squared ReLU, arXiv:2109.08668; Laplace, arXiv:2209.10655;
Mish, arXiv:1908.08681; clipped GELU, arXiv:2004.09602; sqrt-softplus, DeepSeek-V4's router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oslo_fusion.decide import Scope, signature
from oslo_fusion.probe import preserved_random_state, shadow
from oslo_fusion.recognition.trace import required_arguments


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


MEANINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.square(F.relu(x)),
    "laplace": _laplace,
    "sqrtsoftplus": lambda x: torch.sqrt(F.softplus(x)),
    "gelu_10": lambda x: torch.clip(F.gelu(x), -10, 10),
}
"""Name → the definition in plain PyTorch, any dtype, shape kept: what a module's output is matched against."""


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
    """What was recognised in an elementwise module: the key of its formula in :data:`MEANINGS`, if it is there."""

    formula: str | None
    kernels: int
    operators: tuple[str, ...]
    autocast_dtype: torch.dtype | None
    """What the module returns for a half-precision input under autocast, if not that precision."""


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
    formula = next((name for name, f in MEANINGS.items() if torch.allclose(y, f(grid), rtol=1e-8, atol=1e-8)), None)
    names = tuple(operators.names)
    return Activation(formula, len(names), names, None if autocast_dtype == half else autocast_dtype)


def recognise(module: nn.Module, device: torch.device, scope: Scope) -> Activation | None:
    """:func:`recognise_activation`, once for modules that are alike."""
    if next(module.children(), None) is not None:
        return None
    found: Activation | None = scope.once(
        ("recognise", signature(module), device),
        lambda: recognise_activation(module, device),
    )
    return found
