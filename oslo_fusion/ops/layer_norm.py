"""Layer norm of rows, with scale and shift, and optionally the residual addition before it.

    s = x + residual                                    (or x, without a residual)
    y = (s - mean(s)) / sqrt(var(s) + eps) · (weight + weight_offset) + bias

Shapes: ``x``, ``residual``, ``s``, ``y`` ``[*batch, dim]``; ``weight``, ``bias`` ``[dim]``; the saved mean and
``1 / sqrt(…)`` ``[*batch]``. The variance is that of the row itself: divided by ``dim``.

Dtype law: ``s`` is rounded once, to the promoted dtype of ``x`` and ``residual``, as the addition it replaces does. The norm is
computed in float32 (float64 for float64 inputs) from the rounded ``s`` and ``y`` is rounded once, to the dtype of ``s`` unless
told otherwise, as ``F.layer_norm`` does. Under autocast ``F.layer_norm`` returns float32: who replaces it there asks for that
with ``out_dtype``. Gradients are computed in float32 and rounded once, to the dtype of what they belong to.

Source: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450; ``torch.nn.LayerNorm``. The offset is Nemotron's ``1 +
weight``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    if x.dtype not in DTYPES:
        raise ConfigError(
            f"layer_norm: x: received dtype {x.dtype}, allowed are half, bfloat16, float and double. Remedy: x.float()"
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ConfigError(
            f"layer_norm: x: received shape {list(x.shape)}, needs a last dimension of at least one number to norm"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.dim() != 1 or parameter.shape[0] != x.shape[-1]:
            raise ConfigError(
                f"layer_norm: {name}: received shape {list(parameter.shape)}, must be [{x.shape[-1]}], the last dimension of x "
                f"{list(x.shape)}"
            )
        if parameter.dtype not in DTYPES:
            raise ConfigError(
                f"layer_norm: {name}: received dtype {parameter.dtype}, must be floating point. Remedy: {name}.float()"
            )
        if parameter.device != x.device:
            raise ConfigError(f"layer_norm: {name}: is on {parameter.device}, x on {x.device}. Remedy: {name}.to(x.device)")
    if residual is not None:
        if residual.shape != x.shape:
            raise ConfigError(
                f"layer_norm: residual: received shape {list(residual.shape)}, must be that of x, {list(x.shape)}. Remedy: "
                "residual.expand_as(x)"
            )
        if residual.dtype not in DTYPES:
            raise ConfigError(f"layer_norm: residual: received dtype {residual.dtype}, must be floating point")
        if residual.device != x.device:
            raise ConfigError(f"layer_norm: residual: is on {residual.device}, x on {x.device}. Remedy: residual.to(x.device)")
    if not eps >= 0.0:
        raise ConfigError(f"layer_norm: eps: received {eps}, must be zero or positive")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise ConfigError(f"layer_norm: out_dtype: received {out_dtype}, must be floating point or None")


def result_dtypes(x: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``s`` and ``y`` under the law above."""
    summed = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return summed, summed if out_dtype is None else out_dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale(weight: Tensor, offset: float, wide: torch.dtype) -> Tensor:
    return weight.to(wide) + offset if offset else weight.to(wide)


def _moments(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = s.to(_wide(s.dtype))
    mean = wide.mean(-1)
    centred = wide - mean.unsqueeze(-1)
    return mean, torch.rsqrt((centred * centred).mean(-1) + eps)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The meaning, in plain PyTorch.

    Returns:
        ``y``, ``s`` (``x`` itself without a residual), and mean and reciprocal standard deviation of each row.
    """
    _check(x, weight, bias, residual, eps, out_dtype)
    summed_dtype, y_dtype = result_dtypes(x, residual, out_dtype)
    s, wide = x, _wide(summed_dtype)
    if residual is not None:
        s = (x.to(wide) + residual.to(wide)).to(summed_dtype).contiguous()
    mean, rstd = _moments(s, eps)
    y = (s.to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * _scale(weight, weight_offset, wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(y_dtype).contiguous(), s, mean.contiguous(), rstd.contiguous()


def layer_norm_backward_reference(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, in plain PyTorch, which can itself be differentiated.

    Args:
        dy: gradient of ``y``.
        ds: gradient that reached ``s`` by another way than ``y``, or None.
        s, weight, bias, mean, rstd, weight_offset: as in the forward.
        weight_gradient, bias_gradient: whether the second and third result are wanted.

    Returns:
        The gradient of ``s``, of ``weight`` and of ``bias``, each in the dtype of what it belongs to; the last two have no
        elements unless they are wanted.
    """
    wide = _wide(s.dtype)
    normed, g = (s.to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1), dy.to(wide)
    scaled = g if weight is None else g * _scale(weight, weight_offset, wide)
    dx = scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True)
    dx = dx * rstd.unsqueeze(-1)
    if ds is not None:
        dx = dx + ds.to(wide)
    dweight, dbias = s.new_empty(0), s.new_empty(0)
    if weight is not None and weight_gradient:
        dweight = (g * normed).reshape(-1, s.shape[-1]).sum(0).to(weight.dtype)
    if bias is not None and bias_gradient:
        dbias = g.reshape(-1, s.shape[-1]).sum(0).to(bias.dtype)
    return dx.to(s.dtype).contiguous(), dweight, dbias


# --- the operators -----------------------------------------------------------------------------------------------------------
# Two forward operators, because an operator may return neither its input nor None. The registrations are torch.library's
# plainest (define and impl): `custom_op` and `triton_op` cost 7 to 10 µs more per call.

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_NORM, _ADD_NORM, _BACKWARD = "layer_norm", "add_layer_norm", "layer_norm_backward"
_TAG = torch.Tag.pt2_compliant_tag
_OPTIONS = "Tensor? weight, Tensor? bias, float eps, float weight_offset, ScalarType? out_dtype"
_LIBRARY.define(f"{_NORM}(Tensor x, {_OPTIONS}) -> (Tensor y, Tensor mean, Tensor rstd)", tags=_TAG)
_LIBRARY.define(
    f"{_ADD_NORM}(Tensor x, Tensor residual, {_OPTIONS}) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)", tags=_TAG
)
_LIBRARY.define(
    f"{_BACKWARD}(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "float weight_offset, bool weight_gradient, bool bias_gradient) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    tags=_TAG,
)


# Importing the kernels registers them over these three, so that each sees at most one CUDA tensor in a process that has triton.


def _norm_default(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = find_kernels("layer_norm") if x.is_cuda else None
    forward = layer_norm_reference if kernels is None else kernels.launch_layer_norm
    y, _, mean, rstd = forward(x, weight, bias, None, eps, weight_offset, out_dtype)
    return y, mean, rstd


def _add_norm_default(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = find_kernels("layer_norm") if x.is_cuda else None
    forward = layer_norm_reference if kernels is None else kernels.launch_layer_norm
    y, s, mean, rstd = forward(x, weight, bias, residual, eps, weight_offset, out_dtype)
    return y, s, mean, rstd


def _backward_default(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = find_kernels("layer_norm") if s.is_cuda else None
    backward = layer_norm_backward_reference if kernels is None else kernels.launch_layer_norm_backward
    dx, dweight, dbias = backward(dy, ds, s, weight, bias, mean, rstd, weight_offset, weight_gradient, bias_gradient)
    return dx, dweight, dbias


_LIBRARY.impl(_NORM, _norm_default, "CompositeExplicitAutograd")
_LIBRARY.impl(_ADD_NORM, _add_norm_default, "CompositeExplicitAutograd")
_LIBRARY.impl(_BACKWARD, _backward_default, "CompositeExplicitAutograd")


def register_kernels(norm: Any, add_norm: Any, backward: Any, key: str) -> None:
    """Register faster implementations of the three operators for one dispatch key, such as ``CUDA``."""
    for name, function in ((_NORM, norm), (_ADD_NORM, add_norm), (_BACKWARD, backward)):
        _LIBRARY.impl(name, function, key)


def _norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, None, eps, out_dtype)
    summed, result = result_dtypes(x, None, out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=_wide(summed)) for _ in range(2))
    return x.new_empty(x.shape, dtype=result), mean, rstd


def _add_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, bias, residual, eps, out_dtype)
    summed, result = result_dtypes(x, residual, out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=_wide(summed)) for _ in range(2))
    return x.new_empty(x.shape, dtype=result), x.new_empty(x.shape, dtype=summed), mean, rstd


def _backward_fake(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = s.new_empty(0) if weight is None or not weight_gradient else weight.new_empty(weight.shape)
    dbias = s.new_empty(0) if bias is None or not bias_gradient else bias.new_empty(bias.shape)
    return s.new_empty(s.shape), dweight, dbias


for _name, _fake in ((_NORM, _norm_fake), (_ADD_NORM, _add_norm_fake), (_BACKWARD, _backward_fake)):
    torch.library.register_fake(f"oslo_fusion::{_name}", _fake, lib=_LIBRARY)

# --- the gradient ------------------------------------------------------------------------------------------------------------


def _gradients(
    dy: Tensor | None,
    ds: Tensor | None,
    saved: tuple[Tensor, ...],
    eps: float,
    weight_offset: float,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``s``, ``weight`` and ``bias`` from those of ``y`` and ``s``, None where nothing arrives."""
    s, weight, bias, mean, rstd = saved
    if dy is None:
        return ds, None, None
    backward: Callable[..., Any] = LAYER_NORM_BACKWARD
    if (
        torch.is_grad_enabled()
    ):  # create_graph: only plain PyTorch can be differentiated once more, through mean and rstd as well
        mean, rstd = _moments(s, eps)
        backward = layer_norm_backward_reference
    elif s.is_cuda and is_plain(dy, ds, s, weight, bias):
        kernels = find_kernels("layer_norm")
        backward = backward if kernels is None else kernels.launch_layer_norm_backward
    dx, dweight, dbias = backward(dy, ds, s, weight, bias, mean, rstd, weight_offset, weight_wanted, bias_wanted)
    return dx, dweight if weight_wanted else None, dbias if bias_wanted else None


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps, ctx.weight_offset, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[1:3]
    return *_gradients(dy, None, ctx.saved_tensors, ctx.eps, ctx.weight_offset, *wanted), None, None, None


def _add_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.weight_offset, _ = inputs
    _, s, mean, rstd = output
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.save_for_backward(s, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_norm_backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[2:4]
    d, dweight, dbias = _gradients(dy, ds, ctx.saved_tensors, ctx.eps, ctx.weight_offset, *wanted)
    dx, dresidual = (None, None) if d is None else (d.to(ctx.x_dtype), d.to(ctx.residual_dtype))
    return dx, dresidual, dweight, dbias, None, None, None


torch.library.register_autograd(f"oslo_fusion::{_NORM}", _norm_backward, setup_context=_norm_context, lib=_LIBRARY)
torch.library.register_autograd(f"oslo_fusion::{_ADD_NORM}", _add_norm_backward, setup_context=_add_norm_context, lib=_LIBRARY)

LAYER_NORM = torch.ops.oslo_fusion.layer_norm.default
ADD_LAYER_NORM = torch.ops.oslo_fusion.add_layer_norm.default
LAYER_NORM_BACKWARD = torch.ops.oslo_fusion.layer_norm_backward.default


class _Norm(torch.autograd.Function):
    """The operators and their gradient for plain eager code on a GPU: launches, and nothing between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        weight_offset: float,
        out_dtype: torch.dtype | None,
    ) -> Any:
        kernels = find_kernels("layer_norm")
        assert kernels is not None
        y, s, mean, rstd = kernels.launch_layer_norm(x, weight, bias, residual, eps, weight_offset, out_dtype)
        ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.weight_offset = eps, weight_offset
        ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> Any:
        x_wanted, residual_wanted, *wanted = ctx.needs_input_grad[:4]
        d, dweight, dbias = _gradients(dy, ds, ctx.saved_tensors, ctx.eps, ctx.weight_offset, *wanted)
        dx = d.to(ctx.dtypes[0]) if x_wanted and d is not None else None
        dresidual = d.to(ctx.dtypes[1]) if residual_wanted and d is not None else None
        return dx, dresidual, dweight, dbias, None, None, None


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bring every row to mean zero and variance one, then scale and shift it: in one kernel forward and two backward.

    ``(s - mean(s)) / sqrt(var(s) + eps) · (weight + weight_offset) + bias`` with ``s = x + residual``, or ``x`` without a
    residual.

    Args:
        x: ``[*batch, dim]``, half, bfloat16, float or double; any strides, zero rows allowed.
        weight: ``[dim]``, or None for no scale.
        bias: ``[dim]``, or None for no shift.
        eps: added to the variance, in units of ``x²``.
        residual: ``[*batch, dim]`` to add to ``x`` first, or None.
        weight_offset: added to the weight in float32: 1 for Nemotron.
        out_dtype: dtype of the norm; by default that of ``s``.

    Returns:
        The norm ``[*batch, dim]``, contiguous. With a residual: the norm and ``s``, both contiguous.

    Raises:
        ConfigError: a shape, dtype, device or eps that has no meaning here.
    """
    if x.is_cuda and not torch.compiler.is_compiling() and is_plain(x, weight, bias, residual):
        kernels = find_kernels("layer_norm")
        if kernels is not None:
            if wants_gradient(x, weight, bias, residual):
                result: Tensor | tuple[Tensor, Tensor] = _Norm.apply(x, residual, weight, bias, eps, weight_offset, out_dtype)
                return result
            y, s, _, _ = kernels.launch_layer_norm(x, weight, bias, residual, eps, weight_offset, out_dtype)
            return y if residual is None else (y, s)
    if residual is None:
        norm: Tensor = LAYER_NORM(x, weight, bias, eps, weight_offset, out_dtype)[0]
        return norm
    y, s, _, _ = ADD_LAYER_NORM(x, residual, weight, bias, eps, weight_offset, out_dtype)
    return y, s
