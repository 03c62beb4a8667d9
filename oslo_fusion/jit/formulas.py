"""The activations: what each computes, and the fastest correct way to compute it in one kernel, forward and backward.

A formula is either one ATen kernel (``aten``), or a scripted forward and backward that TorchScript's fuser turns into one
kernel each and that save nothing but the input. ATen is taken wherever it has the formula: its kernels move 16 bytes per
thread and access, the generated ones 2 or 4 (tanh-GELU on 4096×3072 float16, one H200: ATen 15 µs, generated 43 µs, the
eight kernels of ``gelu_new`` 110 µs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oslo_fusion.jit.script import Scripted, scripted
from oslo_fusion.recognition.activation import MEANINGS

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Formula:
    """One activation.

    Attributes:
        name: how reports call it.
        meaning: the definition in plain PyTorch, from the catalogue of :mod:`oslo_fusion.recognition.activation`.
        aten: the same as one ATen kernel, with its own gradient; None where ATen has none.
        forward: scripted ``x -> y``.
        backward: scripted ``(x, dy) -> dx``.
    """

    name: str
    meaning: Elementwise
    aten: Elementwise | None = None
    forward: Scripted | None = None
    backward: Scripted | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the fused form. Shape and dtype of ``x`` are kept."""
        if self.aten is not None:
            return self.aten(x)
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _ScriptedActivation.apply(x, self.name)
            return result
        assert self.forward is not None
        y: Tensor = self.forward(x)
        return y


class _ScriptedActivation(torch.autograd.Function):
    """Two kernels where autograd would run one per operator, and only the input is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        forward = FORMULAS[name].forward
        assert forward is not None
        y: Tensor = forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        backward = FORMULAS[ctx.name].backward
        assert backward is not None
        dx: Tensor = backward(x, grads[0])
        return dx, None


# Scripted code widens to float32 first and narrows last: the fuser would compute so anyway, but TorchScript runs the first
# two calls operator by operator, and there each would round to half precision.


@scripted
def _quick_gelu(x: Tensor) -> Tensor:
    v = x.float()
    return (v * torch.sigmoid(1.702 * v)).type_as(x)


@scripted
def _quick_gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    v = x.float()
    s = torch.sigmoid(1.702 * v)
    return (dy.float() * s * (1.0 + 1.702 * v * (1.0 - s))).type_as(x)


@scripted
def _relu2(x: Tensor) -> Tensor:
    y = torch.relu(x.float())
    return (y * y).type_as(x)


@scripted
def _relu2_backward(x: Tensor, dy: Tensor) -> Tensor:
    return (2.0 * dy.float() * torch.relu(x.float())).type_as(x)


@scripted
def _laplace(x: Tensor) -> Tensor:
    z = (x.float() - 0.707107) / 0.39894257487763823  # σ·√2, σ = 0.282095
    return (0.5 * (1.0 + torch.erf(z))).type_as(x)


@scripted
def _laplace_backward(x: Tensor, dy: Tensor) -> Tensor:
    z = (x.float() - 0.707107) / 0.39894257487763823
    return (dy.float() * torch.exp(-z * z) * 1.4142125184828966).type_as(x)  # 1 / (σ·√2·√π)


@scripted
def _sqrt_softplus(x: Tensor) -> Tensor:
    v = x.float()
    return torch.sqrt(torch.where(v > 20.0, v, torch.log1p(torch.exp(v)))).type_as(x)


@scripted
def _sqrt_softplus_backward(x: Tensor, dy: Tensor) -> Tensor:
    v = x.float()
    y = torch.sqrt(torch.where(v > 20.0, v, torch.log1p(torch.exp(v))))
    return (dy.float() * torch.sigmoid(v) / (2.0 * y)).type_as(x)


@scripted
def _clipped_gelu(x: Tensor) -> Tensor:
    v = x.float()
    return torch.clamp(0.5 * v * torch.erfc(v * -0.7071067811865476), -10.0, 10.0).type_as(x)


@scripted
def _clipped_gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    v = x.float()
    phi = 0.5 * torch.erfc(v * -0.7071067811865476)
    inside = (v * phi <= 10.0) & (v * phi >= -10.0)
    return (dy.float() * inside * (phi + v * 0.3989422804014327 * torch.exp(-0.5 * v * v))).type_as(x)


_ATEN = ("gelu_tanh", "gelu", "silu", "relu", "mish", "sigmoid", "tanh", "relu6", "hardswish")
_SCRIPTED = {
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
    "relu2": (_relu2, _relu2_backward),
    "laplace": (_laplace, _laplace_backward),
    "sqrtsoftplus": (_sqrt_softplus, _sqrt_softplus_backward),
    "gelu_10": (_clipped_gelu, _clipped_gelu_backward),
}

FORMULAS: dict[str, Formula] = {
    **{name: Formula(name, MEANINGS[name], aten=MEANINGS[name]) for name in _ATEN},
    **{name: Formula(name, MEANINGS[name], forward=both[0], backward=both[1]) for name, both in _SCRIPTED.items()},
}


# --- gate · up -------------------------------------------------------------------------------------------------------
# act(gate) * up with the activation computed again in the backward: two inputs are saved, where autograd saves three.


@scripted
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.float()
    return (g * torch.sigmoid(g) * up.float()).type_as(gate)


@scripted
def _silu_mul_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = gate.float(), up.float(), dy.float()
    s = torch.sigmoid(g)
    return (d * u * s * (1.0 + g * (1.0 - s))).type_as(gate), (d * g * s).type_as(up)


@scripted
def _gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.float()
    t = torch.tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
    return (0.5 * g * (1.0 + t) * up.float()).type_as(gate)


@scripted
def _gelu_tanh_mul_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = gate.float(), up.float(), dy.float()
    t = torch.tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
    slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * (0.7978845608028654 + 0.10703222440890037 * g * g)
    return (d * u * slope).type_as(gate), (d * 0.5 * g * (1.0 + t)).type_as(up)


@scripted
def _gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.float()
    return (0.5 * g * torch.erfc(g * -0.7071067811865476) * up.float()).type_as(gate)


@scripted
def _gelu_mul_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = gate.float(), up.float(), dy.float()
    phi = 0.5 * torch.erfc(g * -0.7071067811865476)
    return (d * u * (phi + g * 0.3989422804014327 * torch.exp(-0.5 * g * g))).type_as(gate), (d * g * phi).type_as(up)


@scripted
def _relu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (torch.relu(gate.float()) * up.float()).type_as(gate)


@scripted
def _relu_mul_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = gate.float(), up.float(), dy.float()
    return (d * u * (g > 0)).type_as(gate), (d * torch.relu(g)).type_as(up)


GATED: dict[str, tuple[Scripted, Scripted]] = {
    "silu": (_silu_mul, _silu_mul_backward),
    "gelu_tanh": (_gelu_tanh_mul, _gelu_tanh_mul_backward),
    "gelu": (_gelu_mul, _gelu_mul_backward),
    "relu": (_relu_mul, _relu_mul_backward),
}
"""Activation name → scripted ``(gate, up) -> act(gate)·up`` and ``(gate, up, dy) -> (dgate, dup)``."""


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        y: Tensor = GATED[name][0](gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = GATED[ctx.name][1](gate, up, grads[0])
        return dgate, dup, None


def gated_product(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """``act(gate) * up`` in one kernel forward and one backward.

    Args:
        gate, up: ``[*batch, dim]``, same shape and dtype; the result has them too. Computed in float32 inside.
        name: a key of :data:`GATED`.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        fused: Tensor = _GatedProduct.apply(gate, up, name)
        return fused
    y: Tensor = GATED[name][0](gate, up)
    return y


# --- dropout + residual ----------------------------------------------------------------------------------------------


@scripted
def _dropout_add(x: Tensor, residual: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (residual.float() + x.float() * keep * scale).type_as(x)


@scripted
def _dropout_backward(dy: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (dy.float() * keep * scale).type_as(dy)


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, p: float) -> Tensor:
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p)
        ctx.save_for_backward(keep)
        ctx.scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        y: Tensor = _dropout_add(x, residual, keep, ctx.scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _dropout_backward(grads[0], keep, ctx.scale), grads[0], None


def dropout_add(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """``residual + dropout(x, p)`` with scale and addition in one kernel; the mask is drawn from torch's generator.

    The mask is not the one ``F.dropout`` would draw from the same seed.

    Args:
        x, residual: ``[*batch, dim]``, same shape and dtype; the result has them too.
        p: the probability, 0..1, that an element of ``x`` is zeroed.
    """
    result: Tensor = _DropoutAdd.apply(x, residual, p)
    return result
