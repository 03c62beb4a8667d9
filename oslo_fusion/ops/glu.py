"""Gated linear unit without its projections: an activated gate times what it lets through, SwiGLU and GEGLU.

    h = act(gate) · up        act: silu, gelu, or gelu in its tanh form

Shapes: ``gate``, ``up``, ``h`` ``[*batch, dim]``.

Dtype law: computed in float32 (float64 if one input is), rounded once, to the promoted dtype of ``gate`` and ``up``, which is
what ``act(gate) * up`` gives. Plain PyTorch rounds twice in half precision. Gradients are computed in float32 and rounded once,
to the dtype of what they belong to. The backward computes the activation again: nothing but ``gate`` and ``up`` is saved, where
autograd keeps ``act(gate)`` as well.

Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202; GELU, arXiv:1606.08415; SiLU, arXiv:1702.03118;
transformers' ``LlamaMLP``, ``GemmaMLP``, ``T5DenseGatedActDense``, ``Phi3MLP``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


# With p = sigmoid(z): p (1 - p) as sigmoid(z) · sigmoid(-z), because 1 - p is lost to rounding where z is large.


def _silu_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1.0 + x * torch.sigmoid(-x))


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    z = scale * (x + 0.044715 * x * x * x)  # (1 + tanh(z / 2)) / 2 = sigmoid(z)
    return torch.sigmoid(z) * (1.0 + x * torch.sigmoid(-z) * scale * (1.0 + 3 * 0.044715 * x * x))


_Function = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, tuple[_Function, _Function]] = {
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope),
}
"""Name → the activation and its derivative, in the precision of their input."""


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"glu: {name}: received dtype {tensor.dtype}, allowed are half, bfloat16, float and double. "
                f"Remedy: {name}.float()"
            )
    if up.shape != gate.shape:
        raise ConfigError(
            f"glu: up: received shape {list(up.shape)}, must be that of gate, {list(gate.shape)}. Remedy: up.expand_as(gate)"
        )
    if up.device != gate.device:
        raise ConfigError(f"glu: up: is on {up.device}, gate on {gate.device}. Remedy: up.to(gate.device)")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"glu: activation: received {activation!r}, allowed are {', '.join(ACTIVATIONS)}")


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The meaning, in plain PyTorch."""
    _check(gate, up, activation)
    wide = _wide(gate, up)
    h = ACTIVATIONS[activation][0](gate.to(wide)) * up.to(wide)
    return h.to(torch.promote_types(gate.dtype, up.dtype)).contiguous()


def glu_backward_reference(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradient, in plain PyTorch, which can itself be differentiated.

    Args:
        dh: gradient of ``h``.
        gate, up, activation: as in the forward.

    Returns:
        The gradients of ``gate`` and ``up``, each in its dtype.
    """
    _check(gate, up, activation)
    wide = _wide(dh, gate, up)
    function, slope = ACTIVATIONS[activation]
    g, d = gate.to(wide), dh.to(wide)
    return (d * up.to(wide) * slope(g)).to(gate.dtype).contiguous(), (d * function(g)).to(up.dtype).contiguous()


# --- the operators -----------------------------------------------------------------------------------------------------------
# Registered with torch.library's plainest (define and impl): `custom_op` and `triton_op` cost 7 to 10 µs more per call.

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_GLU, _BACKWARD = "glu", "glu_backward"
_TAG = torch.Tag.pt2_compliant_tag
_LIBRARY.define(f"{_GLU}(Tensor gate, Tensor up, str activation) -> Tensor", tags=_TAG)
_LIBRARY.define(
    f"{_BACKWARD}(Tensor dh, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
    tags=_TAG,
)


# Importing the kernels registers them over these two, so that each sees at most one CUDA tensor in a process that has triton.


def _glu_default(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    kernels = find_kernels("glu") if gate.is_cuda else None
    h: Tensor = (glu_reference if kernels is None else kernels.launch_glu)(gate, up, activation)
    return h


def _backward_default(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    kernels = find_kernels("glu") if gate.is_cuda else None
    backward = glu_backward_reference if kernels is None else kernels.launch_glu_backward
    dgate, dup = backward(dh, gate, up, activation)
    return dgate, dup


_LIBRARY.impl(_GLU, _glu_default, "CompositeExplicitAutograd")
_LIBRARY.impl(_BACKWARD, _backward_default, "CompositeExplicitAutograd")


def register_kernels(glu: Any, backward: Any, key: str) -> None:
    """Register faster implementations of the two operators for one dispatch key, such as ``CUDA``."""
    _LIBRARY.impl(_GLU, glu, key)
    _LIBRARY.impl(_BACKWARD, backward, key)


def _glu_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _backward_fake(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check(gate, up, activation)
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


torch.library.register_fake(f"oslo_fusion::{_GLU}", _glu_fake, lib=_LIBRARY)
torch.library.register_fake(f"oslo_fusion::{_BACKWARD}", _backward_fake, lib=_LIBRARY)

# --- the gradient ------------------------------------------------------------------------------------------------------------


def _gradients(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``."""
    backward: Callable[..., tuple[Tensor, Tensor]] = GLU_BACKWARD
    if torch.is_grad_enabled():  # create_graph: only plain PyTorch can be differentiated once more
        backward = glu_backward_reference
    elif gate.is_cuda and is_plain(dh, gate, up):
        kernels = find_kernels("glu")
        backward = backward if kernels is None else kernels.launch_glu_backward
    return backward(dh, gate, up, activation)


def _context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dh: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if dh is None:
        return None, None, None
    gate, up = ctx.saved_tensors
    return *_gradients(dh, gate, up, ctx.activation), None


torch.library.register_autograd(f"oslo_fusion::{_GLU}", _backward, setup_context=_context, lib=_LIBRARY)

GLU = torch.ops.oslo_fusion.glu.default
GLU_BACKWARD = torch.ops.oslo_fusion.glu_backward.default


class _Glu(torch.autograd.Function):
    """The operator and its gradient for plain eager code on a GPU: launches, and nothing between."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Any:
        kernels = find_kernels("glu")
        assert kernels is not None
        _context(ctx, (gate, up, activation), gate)
        return kernels.launch_glu(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return _backward(ctx, gradients[0])


class _MergedGlu(torch.autograd.Function):
    """The same on the halves of one tensor, whose gradient is written as one: ``chunk``'s own copies two together."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, activation: str, gate_first: bool) -> Any:
        kernels = find_kernels("glu")
        assert kernels is not None
        ctx.activation, ctx.gate_first = activation, gate_first
        ctx.save_for_backward(merged)
        return kernels.launch_glu(*halves(merged, gate_first), activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        (merged,), dh = ctx.saved_tensors, gradients[0]
        assert dh is not None
        gate, up = halves(merged, ctx.gate_first)
        kernels = find_kernels("glu") if is_plain(dh, merged) and not torch.is_grad_enabled() else None
        if kernels is None:
            dgate, dup = _gradients(dh, gate, up, ctx.activation)
            return torch.cat((dgate, dup) if ctx.gate_first else (dup, dgate), -1), None, None
        return kernels.launch_merged_glu_backward(dh, gate, up, ctx.activation, ctx.gate_first), None, None


def halves(merged: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, as views of a merged projection ``[*batch, 2 · dim]``."""
    first, second = merged.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def merged_glu(merged: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    """:func:`glu` of the two halves of one merged projection, read where they lie; so is their gradient written.

    Args:
        merged: ``[*batch, 2 · dim]``.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        gate_first: whether the gate is the first half, as in Phi-3 and GLM.

    Returns:
        ``act(gate) · up``, ``[*batch, dim]``, contiguous.

    Raises:
        ConfigError: an odd or missing last dimension, or as :func:`glu`.
    """
    if merged.dim() == 0 or merged.shape[-1] % 2:
        raise ConfigError(
            f"glu: merged: received shape {list(merged.shape)}, needs an even last dimension, gate and up side by side"
        )
    fast = merged.is_cuda and not torch.compiler.is_compiling() and is_plain(merged) and wants_gradient(merged)
    if fast and find_kernels("glu") is not None:
        h: Tensor = _MergedGlu.apply(merged, activation, gate_first)
        return h
    return glu(*halves(merged, gate_first), activation)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """An activated gate times ``up``, in one kernel forward and one backward: :func:`swiglu` and :func:`geglu` by name.

    Args:
        gate, up: ``[*batch, dim]``, same shape; half, bfloat16, float or double; any strides, zero rows allowed.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.

    Returns:
        ``act(gate) · up``, ``[*batch, dim]``, contiguous, in the promoted dtype.

    Raises:
        ConfigError: a shape, dtype, device or activation that has no meaning here.
    """
    if gate.is_cuda and not torch.compiler.is_compiling() and is_plain(gate, up):
        kernels = find_kernels("glu")
        if kernels is not None:
            wanted = wants_gradient(gate, up)
            fast: Tensor = (_Glu.apply if wanted else kernels.launch_glu)(gate, up, activation)
            return fast
    h: Tensor = GLU(gate, up, activation)
    return h


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``: the product in the MLP of Llama, Mistral, Qwen and Phi-3.

    Args:
        gate, up: ``[*batch, dim]``, same shape; half, bfloat16, float or double. Any strides: the two halves of one merged
            projection, ``projected.chunk(2, -1)``, are read where they lie.

    Returns:
        ``[*batch, dim]``, contiguous, in the promoted dtype; computed in float32 and rounded once.

    Raises:
        ConfigError: a shape, dtype or device that has no meaning here.
    """
    return glu(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(gate) · up``: the product in the MLP of T5 v1.1 and Gemma, both with ``approximate="tanh"``.

    Args:
        gate, up: as for :func:`swiglu`.
        approximate: ``none`` for the exact GELU, ``tanh`` for its approximation, as in ``torch.nn.functional.gelu``.

    Returns:
        ``[*batch, dim]``, contiguous, in the promoted dtype; computed in float32 and rounded once.

    Raises:
        ConfigError: a shape, dtype or device that has no meaning here, or another word for ``approximate``.
    """
    if approximate not in _APPROXIMATIONS:
        raise ConfigError(f"glu: approximate: received {approximate!r}, allowed are {', '.join(_APPROXIMATIONS)}")
    return glu(gate, up, _APPROXIMATIONS[approximate])
