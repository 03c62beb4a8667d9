"""A feed-forward network with a GELU, whose backward reads what it kept once less.

    y = gelu(x W1ᵀ + b1) W2ᵀ + b2        gelu: exact, or in its tanh form

Shapes: ``x`` ``[*batch, dim]``, ``weight`` ``[inner, dim]``, ``bias`` ``[inner]``, ``out_weight`` ``[out, inner]``,
``out_bias`` ``[out]`` or None, ``y`` ``[*batch, out]``.

The backward needs three things of the pre-activation h = x W1ᵀ + b1 and of the gradient of GELU's output: that output again,
for the gradient of ``out_weight``; dh, for those of ``x`` and ``weight``; and the sum of dh over all rows, which is the
gradient of ``bias``. A compiler makes the first two in one kernel and reads dh again for the third (BERT-base 64×512 in
bfloat16 on one NVIDIA H200, each of 12 layers: 190 and 59 µs). Here one kernel makes all three.

What is kept for the backward is as in plain PyTorch with GELU recomputed: ``x``, h and the weights. dh lies where the gradient
of GELU's output was.

Dtype law: as plain PyTorch, which rounds each matmul's result to the dtype of ``x``; GELU and its gradient are computed in
float32 (float64 for float64) and rounded once. The gradient of ``bias`` is the sum of what was not rounded yet.

Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415; transformers' ``BertIntermediate`` and
``BertOutput``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.glu import ACTIVATIONS, DTYPES
from oslo_fusion.ops.kernels import find_kernels

NAME = "feed_forward"
GELUS = ("gelu", "gelu_tanh")
_BLOCK = 1 << 16  # numbers that plain PyTorch works on at a time: its float32 copies stay small, and in the cache
Optional = Tensor | None


def _error(name: str, received: object, allowed: str, remedy: str = "") -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}. Allowed: {allowed}." + (f" Remedy: {remedy}." if remedy else ""))


def _check(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Optional, activation: str) -> None:
    """Raise ConfigError for what has no meaning here."""
    if x.dtype not in DTYPES:
        raise _error("x", f"dtype {x.dtype}", "half, bfloat16, float and double", "x.float()")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise _error("weight", f"shape {list(weight.shape)} with x of {list(x.shape)}", "[inner, dim] for x of [*batch, dim]")
    inner = weight.shape[0]
    if bias.dim() != 1 or bias.shape[0] != inner:
        raise _error("bias", f"shape {list(bias.shape)}", f"[{inner}]")
    if out_weight.dim() != 2 or out_weight.shape[1] != inner:
        raise _error("out_weight", f"shape {list(out_weight.shape)}", f"[out, {inner}]")
    if out_bias is not None and (out_bias.dim() != 1 or out_bias.shape[0] != out_weight.shape[0]):
        raise _error("out_bias", f"shape {list(out_bias.shape)}", f"[{out_weight.shape[0]}]")
    _check_alike(x, {"weight": weight, "bias": bias, "out_weight": out_weight, "out_bias": out_bias}, "x")
    _check_activation(activation)


def _check_alike(first: Tensor, others: dict[str, Optional], name: str) -> None:
    for other, tensor in others.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise _error(other, f"dtype {tensor.dtype}", f"{first.dtype}, that of {name}", f"{other}.to({name}.dtype)")
        if tensor is not None and tensor.device != first.device:
            raise _error(
                other, f"a tensor on {tensor.device}", f"{first.device}, where {name} is", f"{other}.to({name}.device)"
            )


def _check_activation(activation: str) -> None:
    if activation not in GELUS:
        raise _error("activation", repr(activation), ", ".join(GELUS))


def _check_backward(dy: Tensor, out_weight: Tensor, h: Tensor, activation: str) -> None:
    """Raise ConfigError for what no implementation of the backward can compute. Its operator and its fake call it first."""
    if h.dtype not in DTYPES:
        raise _error("h", f"dtype {h.dtype}", "half, bfloat16, float and double", "h.float()")
    if h.dim() != 2 or h.shape[1] == 0:
        raise _error("h", f"shape {list(h.shape)}", "[rows, inner], with columns")
    if out_weight.dim() != 2 or out_weight.shape[1] != h.shape[1]:
        raise _error("out_weight", f"shape {list(out_weight.shape)}", f"[out, {h.shape[1]}]")
    if dy.dim() != 2 or dy.shape[1] != out_weight.shape[0]:
        raise _error("dy", f"shape {list(dy.shape)}", f"[rows, {out_weight.shape[0]}], rows as h has them")
    _check_alike(h, {"dy": dy, "out_weight": out_weight}, "h")
    _check_activation(activation)


def feed_forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Optional, activation: str
) -> Tensor:
    """The meaning, in plain PyTorch, which can be differentiated as often as one likes."""
    _check(x, weight, bias, out_weight, out_bias, activation)
    return F.linear(ACTIVATIONS[activation][0](F.linear(x, weight, bias)), out_weight, out_bias)


def gelu_backward_in_place(dact: Tensor, h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """In plain PyTorch: ``dact``, the gradient of GELU's output, becomes that of its input ``h``. Both are ``[rows, inner]``.

    Returns:
        GELU's output, and the sum of the new ``dact`` over the rows, ``[inner]``.
    """
    function, slope = ACTIVATIONS[activation]
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    act, total = torch.empty_like(h), torch.zeros(h.shape[1], dtype=wide, device=h.device)
    rows = max(1, _BLOCK // h.shape[1])
    for a, d, z in zip(act.split(rows), dact.split(rows), h.split(rows), strict=True):
        x = z.to(wide)
        gradient = d.to(wide) * slope(x)
        a.copy_(function(x))
        d.copy_(gradient)
        total += gradient.sum(0)
    return act, total.to(h.dtype)


# --- the operator ------------------------------------------------------------------------------------------------------------
# The forward is made of operators that exist, which a compiler fuses as before. Of the backward only what ends in the three
# results is ours; the matmuls after it stay visible. The one before it is inside, because its result becomes dh where it lies:
# the argument of an operator that writes into it is copied where a compiler is not sure that nobody else reads it.

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_BACKWARD = f"{NAME}_backward"
_LIBRARY.define(
    f"{_BACKWARD}(Tensor dy, Tensor out_weight, Tensor h, str activation) -> (Tensor act, Tensor dh, Tensor dbias)",
    tags=torch.Tag.pt2_compliant_tag,
)


def feed_forward_backward(dy: Tensor, out_weight: Tensor, h: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward needs of h.

    Args:
        dy: gradient of ``y``, ``[rows, out]``.
        out_weight: as in the forward.
        h: the pre-activation, ``[rows, inner]``.
        activation: as in the forward.

    Returns:
        GELU's output, the gradient of h, and that of ``bias``.
    """
    _check_backward(dy, out_weight, h, activation)
    if dy.shape[0] != h.shape[0]:  # not in the fake, where the two may be symbols
        raise _error("dy", f"{dy.shape[0]} rows", f"{h.shape[0]}, as h has")
    kernels = find_kernels(NAME) if h.is_cuda and h.dtype != torch.float64 else None
    in_place = gelu_backward_in_place if kernels is None else kernels.launch_gelu_backward_in_place
    with torch.no_grad(), torch.autocast(h.device.type, enabled=False):
        dh = torch.mm(dy, out_weight)
        act, dbias = in_place(dh, h.contiguous(), activation)
    return act, dh, dbias


def _backward_fake(dy: Tensor, out_weight: Tensor, h: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(dy, out_weight, h, activation)
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape[1])


_LIBRARY.impl(_BACKWARD, feed_forward_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{_BACKWARD}", _backward_fake, lib=_LIBRARY)
FEED_FORWARD_BACKWARD = torch.ops.oslo_fusion.feed_forward_backward.default

# --- the gradient ------------------------------------------------------------------------------------------------------------


class _FeedForward(torch.autograd.Function):
    """The plain forward, with the operator in the backward. Compilers trace both."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, out_weight, out_bias, activation = arguments
        h = F.linear(x, weight, bias)
        ctx.activation = activation
        ctx.save_for_backward(x, weight, bias, out_weight, out_bias, h)
        return F.linear(ACTIVATIONS[activation][0](h), out_weight, out_bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dy, (*saved, h), wanted = gradients[0], ctx.saved_tensors, list(ctx.needs_input_grad[:5])
        if torch.is_grad_enabled():  # create_graph: only plain PyTorch can be differentiated once more
            again = [None if t is None else t.view_as(t) for t in saved]
            leaves = [t for t, w in zip(again, wanted, strict=True) if w and t is not None]
            y = feed_forward_reference(*again, activation=ctx.activation)  # type: ignore[arg-type,misc]
            made = iter(torch.autograd.grad(y, leaves, dy, create_graph=True))
            return *(next(made) if w else None for w in wanted), None
        x, weight, _, out_weight, _ = saved
        dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        act, dh, dbias = FEED_FORWARD_BACKWARD(dy_rows, out_weight, h.reshape(-1, h.shape[-1]), ctx.activation)
        return (
            torch.mm(dh, weight).view(x.shape) if wanted[0] else None,
            _weight_gradient(dh, x_rows, weight) if wanted[1] else None,
            dbias if wanted[2] else None,
            _weight_gradient(dy_rows, act, out_weight) if wanted[3] else None,
            dy_rows.sum(0) if wanted[4] else None,
            None,
        )


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``dyᵀ x``, in memory as the weight is: that of a transposed one is not copied where it is added to ``.grad``."""
    transposed = weight.stride(0) == 1 and weight.stride(1) != 1
    return torch.mm(x.t(), dy).t() if transposed else torch.mm(dy.t(), x)


def feed_forward(
    x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Optional = None, activation: str = "gelu"
) -> Tensor:
    """Two linear layers with a GELU between, whose gradient and the sum for the first bias are one kernel.

    Under autocast the tensors are rounded to its dtype, as ``F.linear`` rounds them.

    Args:
        x: ``[*batch, dim]``; half, bfloat16, float or double; any strides, zero rows allowed.
        weight, bias: of the first layer, ``[inner, dim]`` and ``[inner]``. Weights may be transposed views: their gradients
            are too.
        out_weight, out_bias: of the second, ``[out, inner]`` and ``[out]`` or None.
        activation: ``gelu`` or ``gelu_tanh``.

    Returns:
        ``[*batch, out]``, in the dtype of ``x``.

    Raises:
        ConfigError: a shape, dtype, device or activation that has no meaning here.
    """
    tensors: list[Optional] = [x, weight, bias, out_weight, out_bias]
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]
    _check(*tensors, activation=activation)  # type: ignore[arg-type,misc]
    y: Tensor = _FeedForward.apply(*tensors, activation)
    return y
