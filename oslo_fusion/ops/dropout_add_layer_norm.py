"""The end of a post-norm sublayer: bias of the linear before, dropout, residual addition and layer norm.

    s = residual + dropout(x + linear_bias)
    y = (s - mean(s)) / sqrt(var(s) + eps) · weight + bias

Shapes: ``x``, ``residual``, ``s``, ``y`` ``[*batch, dim]``; ``linear_bias``, ``weight``, ``bias`` ``[dim]``; the saved mean and
``1 / sqrt(…)`` ``[*batch]``.

Dropout: by the counter of :mod:`oslo_fusion.ops.dropout`, over column and row. The backward draws the mask again, so what is
kept for it is ``s``, once, with mean and ``1 / sqrt(…)`` of each row: neither a mask nor ``x``.

Dtype law: ``s`` is computed in float32 (float64 for float64 inputs) and rounded once, to the promoted dtype of ``x`` and
``residual``, where eager code rounds after each of its steps. The norm is that of :mod:`oslo_fusion.ops.layer_norm`, its
``out_dtype`` included. Gradients are computed in float32 and rounded once, to the dtype of what they belong to.

Source: Srivastava et al., Dropout, JMLR 15 (2014); Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450; the order of
the steps is that of Vaswani et al., arXiv:1706.03762, and of BERT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.dropout import draw_rng, kept_in_rows, kept_scale
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient
from oslo_fusion.ops.layer_norm import DTYPES, layer_norm_backward_reference, layer_norm_reference

NAME = "dropout_add_layer_norm"
MAX_DIM = 8192
"""Of rows that kernels keep in registers; wider ones are the reference's."""


def _error(name: str, received: object, allowed: str, remedy: str = "") -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}, {allowed}." + (f" Remedy: {remedy}." if remedy else ""))


def _check(
    x: Tensor,
    residual: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    if x.dtype not in DTYPES:
        raise _error("x", f"dtype {x.dtype}", "allowed are half, bfloat16, float and double", "x.float()")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise _error("x", f"shape {list(x.shape)}", "needs a last dimension of at least one number to norm")
    if residual.shape != x.shape:
        raise _error(
            "residual", f"shape {list(residual.shape)}", f"must be that of x, {list(x.shape)}", "residual.expand_as(x)"
        )
    vectors = (("linear_bias", linear_bias), ("weight", weight), ("bias", bias))
    for name, vector in vectors:
        if vector is not None and vector.shape != x.shape[-1:]:
            allowed = f"must be [{x.shape[-1]}], the last dimension of x {list(x.shape)}"
            raise _error(name, f"shape {list(vector.shape)}", allowed)
    for name, tensor in (("residual", residual), *vectors):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise _error(name, f"dtype {tensor.dtype}", "must be floating point", f"{name}.float()")
    for name, tensor in (("residual", residual), *vectors, ("rng", rng)):
        if tensor is not None and tensor.device != x.device:
            raise _error(name, f"a tensor on {tensor.device}", f"x is on {x.device}", f"{name}.to(x.device)")
    if not 0.0 <= dropout < 1.0:
        raise _error("dropout", dropout, "must be from 0 up to, but not including, 1")
    if dropout and (rng is None or rng.shape != (2,) or rng.dtype != torch.int64):
        received = None if rng is None else f"{rng.dtype} {list(rng.shape)}"
        raise _error("rng", received, "must be two int64, seed and offset, where there is dropout", "leave it out")
    if not eps >= 0.0:
        raise _error("eps", eps, "must be zero or positive")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise _error("out_dtype", out_dtype, "must be floating point or None")


def result_dtypes(x: Tensor, residual: Tensor, out_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``s`` and ``y`` under the law above."""
    summed = torch.promote_types(x.dtype, residual.dtype)
    return summed, summed if out_dtype is None else out_dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _drop(h: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """What dropout makes of rows, and of their gradient."""
    if not dropout or rng is None:
        return h
    return torch.where(kept_in_rows(rng, dropout, tuple(h.shape)), h * kept_scale(dropout), 0.0)


def dropout_add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The meaning, in plain PyTorch.

    Returns:
        ``y``, ``s``, and mean and reciprocal standard deviation of each row.
    """
    _check(x, residual, linear_bias, weight, bias, rng, dropout, eps, out_dtype)
    summed, y_dtype = result_dtypes(x, residual, out_dtype)
    wide = _wide(summed)
    h = x.to(wide)
    if linear_bias is not None:
        h = h + linear_bias.to(wide)
    s = (residual.to(wide) + _drop(h, rng, dropout)).to(summed).contiguous()
    y, _, mean, rstd = layer_norm_reference(s, weight, bias, None, eps, 0.0, y_dtype)
    return y, s, mean, rstd


def dropout_add_layer_norm_backward_reference(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    linear_bias_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient, in plain PyTorch, which can itself be differentiated.

    Args:
        dy: gradient of ``y``.
        ds: gradient that reached ``s`` by another way than ``y``, or None.
        s, linear_bias, weight, bias, mean, rstd, rng, dropout: as in the forward.
        x_dtype, residual_dtype: of ``x`` and ``residual``.
        linear_bias_gradient, weight_gradient, bias_gradient: whether the last three results are wanted.

    Returns:
        The gradient of ``residual``, of ``x``, of ``linear_bias``, ``weight`` and ``bias``, each in the dtype of what it
        belongs to. The last three have no elements unless they are wanted, that of ``x`` has none without dropout: it is that
        of ``residual`` then.
    """
    wide = s.to(_wide(s.dtype))
    wanted = (weight_gradient, bias_gradient)
    d, dweight, dbias = layer_norm_backward_reference(dy, ds, wide, weight, bias, mean, rstd, 0.0, *wanted)
    dh = _drop(d, rng, dropout)
    dlinear_bias = s.new_empty(0)
    if linear_bias is not None and linear_bias_gradient:
        dlinear_bias = dh.reshape(-1, s.shape[-1]).sum(0).to(linear_bias.dtype)
    dx = dh.to(x_dtype).contiguous() if dropout else s.new_empty(0, dtype=x_dtype)
    dweight, dbias = (total if total.numel() else s.new_empty(0) for total in (dweight, dbias))
    return d.to(residual_dtype), dx, dlinear_bias, dweight, dbias


# --- the operators -----------------------------------------------------------------------------------------------------------

_BACKWARD = f"{NAME}_backward"
_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_VECTORS = "Tensor? linear_bias, Tensor? weight, Tensor? bias"
_SCHEMAS = {
    NAME: f"(Tensor x, Tensor residual, {_VECTORS}, Tensor? rng, float dropout, float eps, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    _BACKWARD: f"(Tensor dy, Tensor? ds, Tensor s, {_VECTORS}, Tensor mean, Tensor rstd, Tensor? rng, float dropout, "
    "ScalarType x_dtype, ScalarType residual_dtype, bool linear_bias_gradient, bool weight_gradient, bool bias_gradient)"
    " -> (Tensor dresidual, Tensor dx, Tensor dlinear_bias, Tensor dweight, Tensor dbias)",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(f"{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)

# Importing the kernels registers them over these, so that each sees at most one CUDA tensor where there is a triton.


def _default(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = find_kernels(NAME) if x.is_cuda else None
    launch = dropout_add_layer_norm_reference if kernels is None else kernels.launch_dropout_add_layer_norm
    result: tuple[Tensor, Tensor, Tensor, Tensor] = launch(x, *arguments)
    return result


def _backward_default(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = find_kernels(NAME) if dy.is_cuda else None
    launch = dropout_add_layer_norm_backward_reference
    if kernels is not None:
        launch = kernels.launch_dropout_add_layer_norm_backward
    return launch(dy, *arguments)


def register_kernels(forward: Any, backward: Any, key: str) -> None:
    """Register faster implementations of the two operators for one dispatch key, such as ``CUDA``."""
    _LIBRARY.impl(NAME, forward, key)
    _LIBRARY.impl(_BACKWARD, backward, key)


def _fake(
    x: Tensor,
    residual: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout: float,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, residual, linear_bias, weight, bias, rng, dropout, eps, out_dtype)
    summed, result = result_dtypes(x, residual, out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=_wide(summed)) for _ in range(2))
    return x.new_empty(x.shape, dtype=result), x.new_empty(x.shape, dtype=summed), mean, rstd


def _backward_fake(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = [
        s.new_empty(0) if vector is None or not gradient else vector.new_empty(vector.shape)
        for vector, gradient in zip((linear_bias, weight, bias), wanted, strict=True)
    ]
    dx = s.new_empty(s.shape if dropout else 0, dtype=x_dtype)
    return s.new_empty(s.shape, dtype=residual_dtype), dx, sums[0], sums[1], sums[2]


_LIBRARY.impl(NAME, _default, "CompositeExplicitAutograd")
_LIBRARY.impl(_BACKWARD, _backward_default, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{NAME}", _fake, lib=_LIBRARY)
torch.library.register_fake(f"oslo_fusion::{_BACKWARD}", _backward_fake, lib=_LIBRARY)
DROPOUT_ADD_LAYER_NORM = torch.ops.oslo_fusion.dropout_add_layer_norm.default
DROPOUT_ADD_LAYER_NORM_BACKWARD = torch.ops.oslo_fusion.dropout_add_layer_norm_backward.default

# --- the gradient ------------------------------------------------------------------------------------------------------------


def _gradients(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's arguments from those of ``y`` and ``s``, None where nothing arrives."""
    s, linear_bias, weight, bias, mean, rstd, rng = ctx.saved_tensors
    x_wanted, residual_wanted, *wanted = ctx.needs_input_grad[:5]
    nothing = (None,) * 4
    if dy is None and ds is None:
        return None, None, None, None, None, *nothing
    if dy is None:
        dy = torch.zeros_like(s)
    backward: Any = DROPOUT_ADD_LAYER_NORM_BACKWARD
    if torch.is_grad_enabled():
        # create_graph: only plain PyTorch can be differentiated once more, through mean and rstd as well
        _, _, mean, rstd = layer_norm_reference(s, None, None, None, ctx.eps, 0.0, None)
        backward = dropout_add_layer_norm_backward_reference
    elif s.is_cuda and is_plain(dy, ds, s, linear_bias, weight, bias, rng):
        kernels = find_kernels(NAME)
        backward = backward if kernels is None else kernels.launch_dropout_add_layer_norm_backward
    arguments = (dy, ds, s, linear_bias, weight, bias, mean, rstd, rng, ctx.dropout, ctx.x_dtype, ctx.residual_dtype)
    dresidual, dx, *sums = backward(*arguments, *wanted)
    if not ctx.dropout:
        dx = dresidual.to(ctx.x_dtype) if ctx.x_dtype != ctx.residual_dtype else dresidual
    return (
        dx if x_wanted else None,
        dresidual if residual_wanted else None,
        *(total if gradient else None for total, gradient in zip(sums, wanted, strict=True)),
        *nothing,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, linear_bias, weight, bias, rng, ctx.dropout, ctx.eps, _ = inputs
    _, s, mean, rstd = output
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.save_for_backward(s, linear_bias, weight, bias, mean, rstd, rng)
    ctx.set_materialize_grads(False)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, ds)


torch.library.register_autograd(f"oslo_fusion::{NAME}", _backward, setup_context=_context, lib=_LIBRARY)


class _DropoutAddNorm(torch.autograd.Function):
    """The operators and their gradient for plain eager code on a GPU: launches, and nothing between.

    ``s`` is an output, because what a second derivative goes through must be one.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        kernels = find_kernels(NAME)
        assert kernels is not None
        output = kernels.launch_dropout_add_layer_norm(*inputs)
        _keep(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> Any:
        return _gradients(ctx, dy, ds)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    dropout: float = 0.0,
    linear_bias: Tensor | None = None,
    rng: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``layer_norm(residual + dropout(x + linear_bias))``: the end of a post-norm sublayer; one kernel forward, two backward.

    Args:
        x: ``[*batch, dim]``, half, bfloat16, float or double; any strides, zero rows allowed. What the last linear of the
            sublayer gives; without its bias if that is ``linear_bias``.
        residual: ``[*batch, dim]``, what the sublayer received.
        weight, bias: ``[dim]``, scale and shift of the norm, or None.
        eps: added to the variance, in units of ``x²``.
        dropout: the probability that an element of ``x + linear_bias`` becomes zero. 0 outside of training: nothing is drawn.
        linear_bias: ``[dim]``, or None. Its gradient comes from the same kernel as the norm's, where autograd would read the
            gradient of ``x`` once more to sum it up.
        rng: int64 ``[2]``, seed and offset of the dropout; by default drawn from torch's generator of the device.
        out_dtype: dtype of the norm; by default the promoted dtype of ``x`` and ``residual``.

    Returns:
        The norm ``[*batch, dim]``, contiguous.

    Raises:
        ConfigError: a shape, dtype, device, probability or eps that has no meaning here.
    """
    if dropout and rng is None:
        rng = draw_rng(x.device)
    arguments = (x, residual, linear_bias, weight, bias, rng if dropout else None, float(dropout), float(eps), out_dtype)
    kernels = None
    if x.is_cuda and not torch.compiler.is_compiling() and is_plain(*arguments[:6]):
        kernels = find_kernels(NAME)
    result: Tensor
    if kernels is None:
        result = DROPOUT_ADD_LAYER_NORM(*arguments)[0]
    elif wants_gradient(x, residual, linear_bias, weight, bias):
        result = _DropoutAddNorm.apply(*arguments)[0]
    else:
        result = kernels.launch_dropout_add_layer_norm(*arguments, keep=False)[0]
    return result
