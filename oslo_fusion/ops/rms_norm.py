"""Root-mean-square norm of rows, with the scale of T5, Llama and Gemma, and optionally the residual addition before it.

    s = x + residual                                    (or x, without a residual)
    y = s / sqrt(mean(s²) + eps) · (weight + weight_offset)

Shapes: ``x``, ``residual``, ``s``, ``y`` ``[*batch, dim]``; ``weight`` ``[dim]``; the saved ``1 / sqrt(…)`` ``[*batch]``.

Dtype law: ``s`` is rounded once, to the promoted dtype of ``x`` and ``residual``, as the addition it replaces does. The norm is
computed in float32 (float64 for float64 inputs) from the rounded ``s`` and ``y`` is rounded once, to the promoted dtype of
``s`` and ``weight`` unless told otherwise: what ``weight * normed.to(x.dtype)`` gives in Llama, and T5 with float32 weights.
Gemma, which returns the dtype of ``x``, and T5 with half weights under a float32 ``x`` are asked for with ``out_dtype``.
Gradients are computed in float32 and rounded once, to the dtype of what they belong to.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; transformers' ``LlamaRMSNorm``,
``T5LayerNorm``, ``GemmaRMSNorm``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import kernels
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, out_dtype: torch.dtype | None) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher.

    Those in C++ have the same conditions in ``csrc/rms_norm.h``.
    """
    if x.dtype not in DTYPES:
        raise ConfigError(
            f"rms_norm: x: received dtype {x.dtype}, allowed are half, bfloat16, float and double. Remedy: x.float()"
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ConfigError(f"rms_norm: x: received shape {list(x.shape)}, needs a last dimension of at least one number to norm")
    if weight is not None:
        if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
            raise ConfigError(
                f"rms_norm: weight: received shape {list(weight.shape)}, must be [{x.shape[-1]}], the last dimension of x "
                f"{list(x.shape)}"
            )
        if weight.dtype not in DTYPES:
            raise ConfigError(
                f"rms_norm: weight: received dtype {weight.dtype}, must be floating point. Remedy: weight.float()"
            )
        if weight.device != x.device:
            raise ConfigError(f"rms_norm: weight: is on {weight.device}, x on {x.device}. Remedy: weight.to(x.device)")
    if residual is not None:
        if residual.shape != x.shape:
            raise ConfigError(
                f"rms_norm: residual: received shape {list(residual.shape)}, must be that of x, {list(x.shape)}. Remedy: "
                "residual.expand_as(x)"
            )
        if residual.dtype not in DTYPES:
            raise ConfigError(f"rms_norm: residual: received dtype {residual.dtype}, must be floating point")
        if residual.device != x.device:
            raise ConfigError(f"rms_norm: residual: is on {residual.device}, x on {x.device}. Remedy: residual.to(x.device)")
    if not eps >= 0.0:
        raise ConfigError(f"rms_norm: eps: received {eps}, must be zero or positive")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise ConfigError(f"rms_norm: out_dtype: received {out_dtype}, must be floating point or None")


def result_dtypes(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``s`` and ``y`` under the law above."""
    summed = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if out_dtype is not None:
        return summed, out_dtype
    return summed, summed if weight is None else torch.promote_types(summed, weight.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale(weight: Tensor, offset: float, wide: torch.dtype) -> Tensor:
    return weight.to(wide) + offset if offset else weight.to(wide)


def _reciprocal(x: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))
    return torch.rsqrt((wide * wide).mean(-1) + eps)


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning, in plain PyTorch.

    Returns:
        ``y``, ``s`` (``x`` itself without a residual), and the reciprocal root mean square of each row.
    """
    _check(x, weight, residual, eps, out_dtype)
    summed_dtype, y_dtype = result_dtypes(x, weight, residual, out_dtype)
    s, wide = x, _wide(summed_dtype)
    if residual is not None:
        s = (x.to(wide) + residual.to(wide)).to(summed_dtype).contiguous()
    rstd = _reciprocal(s, eps)
    y = s.to(wide) * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * _scale(weight, weight_offset, wide)
    return y.to(y_dtype).contiguous(), s, rstd.contiguous()


def rms_norm_backward_reference(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient, in plain PyTorch, which can itself be differentiated.

    Args:
        dy: gradient of ``y``.
        ds: gradient that reached ``s`` by another way than ``y``, or None.
        s, weight, rstd, weight_offset: as in the forward.
        weight_gradient: whether the second result is wanted.

    Returns:
        The gradient of ``s`` in its dtype, and of ``weight`` in its dtype (no elements unless wanted).
    """
    wide = _wide(s.dtype)
    normed, g = s.to(wide) * rstd.unsqueeze(-1), dy.to(wide)
    scaled = g if weight is None else g * _scale(weight, weight_offset, wide)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if ds is not None:
        dx = dx + ds.to(wide)
    dx = dx.to(s.dtype).contiguous()
    if weight is None or not weight_gradient:
        return dx, s.new_empty(0)
    return dx, (g * normed).reshape(-1, s.shape[-1]).sum(0).to(weight.dtype)


# --- which kernel answers ----------------------------------------------------------------------------------------------------


class Launchers(NamedTuple):
    """What computes the norm: functions with the arguments of the references."""

    forward: Any
    backward: Any


def implementation(device_type: str, kernel: str = "auto") -> str:
    """Which implementation answers on a device, see :func:`oslo_fusion.ops.kernels.implementation`. Loads it.

    ``auto`` takes Triton's on a GPU, which is the one that is measured, and the extension's where there is no triton.
    """
    return kernels.implementation("rms_norm", device_type, kernel, first="triton")


@functools.cache
def launchers(device_type: str, kernel: str = "auto") -> Launchers:
    """The functions to call past the dispatcher, for tensors of a device."""
    answers = implementation(device_type, kernel)
    triton = find_kernels("rms_norm") if answers == "triton" else None
    if triton is not None:
        return Launchers(triton.launch_rms_norm, triton.launch_rms_norm_backward)
    if answers == "c++":
        return _compiled_launchers("", torch._C.DispatchKey.CPU)
    if answers == "cuda":
        return _compiled_launchers("_cuda", torch._C.DispatchKey.CUDA)
    return Launchers(rms_norm_reference, rms_norm_backward_reference)


def _compiled_launchers(suffix: str, key: Any) -> Launchers:
    """The extension's kernels. Called without the keys above theirs, which would cost 4 µs a call and do nothing."""
    namespace, keys = torch.ops.oslo_fusion, torch._C.DispatchKeySet(key)
    norm = getattr(namespace, f"{_NORM}{suffix}").default.redispatch
    add_norm = getattr(namespace, f"{_ADD_NORM}{suffix}").default.redispatch
    backward = getattr(namespace, f"{_BACKWARD}{suffix}").default.redispatch

    def launch(
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        weight_offset: float,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        try:
            if residual is None:
                y, rstd = norm(keys, x, weight, eps, weight_offset, out_dtype)
                return y, x, rstd
            y, s, rstd = add_norm(keys, x, residual, weight, eps, weight_offset, out_dtype)
        except ValueError:
            _check(x, weight, residual, eps, out_dtype)  # the same condition as a ConfigError
            raise
        return y, s, rstd

    return Launchers(launch, functools.partial(backward, keys))


# --- the operators -----------------------------------------------------------------------------------------------------------
# Two forward operators, because an operator may return neither its input nor None. The registrations are torch.library's
# plainest (define and impl): `custom_op` and `triton_op` cost 7 to 10 µs more per call.
#
# One dispatch key holds one kernel, so the extension's CUDA kernels, which stand beside Triton's, have names of their own, with
# _cuda behind them. Whichever kernel is missing, the reference answers.

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_NORM, _ADD_NORM, _BACKWARD = "rms_norm", "add_rms_norm", "rms_norm_backward"
_TAG = torch.Tag.pt2_compliant_tag
_OPTIONS = "float eps, float weight_offset, ScalarType? out_dtype"
_SCHEMAS = {
    _NORM: f"(Tensor x, Tensor? weight, {_OPTIONS}) -> (Tensor y, Tensor rstd)",
    _ADD_NORM: f"(Tensor x, Tensor residual, Tensor? weight, {_OPTIONS}) -> (Tensor y, Tensor s, Tensor rstd)",
    _BACKWARD: "(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor rstd, float weight_offset, bool weight_gradient)"
    " -> (Tensor dx, Tensor dweight)",
}
for _name, _schema in _SCHEMAS.items():
    for _suffix in ("", "_cuda"):
        _LIBRARY.define(f"{_name}{_suffix}{_schema}", tags=_TAG)


# Finding the kernels registers them over these, so that each sees at most one tensor of a device that has some.


def _norm_default(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    y, _, rstd = launchers(x.device.type).forward(x, weight, None, eps, weight_offset, out_dtype)
    return y, rstd


def _add_norm_default(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = launchers(x.device.type).forward(x, weight, residual, eps, weight_offset, out_dtype)
    return y, s, rstd


def _backward_default(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dx, dweight = launchers(s.device.type).backward(dy, ds, s, weight, rstd, weight_offset, weight_gradient)
    return dx, dweight


def _norm_cuda_default(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    y, _, rstd = rms_norm_reference(x, weight, None, eps, weight_offset, out_dtype)
    return y, rstd


def _add_norm_cuda_default(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return rms_norm_reference(x, weight, residual, eps, weight_offset, out_dtype)


for _name, _default in (
    (_NORM, _norm_default),
    (_ADD_NORM, _add_norm_default),
    (_BACKWARD, _backward_default),
    (f"{_NORM}_cuda", _norm_cuda_default),
    (f"{_ADD_NORM}_cuda", _add_norm_cuda_default),
    (f"{_BACKWARD}_cuda", rms_norm_backward_reference),
):
    _LIBRARY.impl(_name, _default, "CompositeExplicitAutograd")


def register_kernels(norm: Any, add_norm: Any, backward: Any, key: str) -> None:
    """Register faster implementations of the three operators for one dispatch key, such as ``CUDA``."""
    for name, function in ((_NORM, norm), (_ADD_NORM, add_norm), (_BACKWARD, backward)):
        _LIBRARY.impl(name, function, key)


def _norm_fake(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    _check(x, weight, None, eps, out_dtype)
    summed, result = result_dtypes(x, weight, None, out_dtype)
    return x.new_empty(x.shape, dtype=result), x.new_empty(x.shape[:-1], dtype=_wide(summed))


def _add_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, residual, eps, out_dtype)
    summed, result = result_dtypes(x, weight, residual, out_dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=_wide(summed))
    return x.new_empty(x.shape, dtype=result), x.new_empty(x.shape, dtype=summed), rstd


def _backward_fake(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dx = s.new_empty(s.shape)
    return dx, s.new_empty(0) if weight is None or not weight_gradient else weight.new_empty(weight.shape)


for _name, _fake in ((_NORM, _norm_fake), (_ADD_NORM, _add_norm_fake), (_BACKWARD, _backward_fake)):
    for _suffix in ("", "_cuda"):
        torch.library.register_fake(f"oslo_fusion::{_name}{_suffix}", _fake, lib=_LIBRARY)

# --- the gradient ------------------------------------------------------------------------------------------------------------


def _gradients(
    dy: Tensor | None,
    ds: Tensor | None,
    saved: tuple[Tensor, ...],
    eps: float,
    weight_offset: float,
    weight_wanted: bool,
    kernel: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``s`` and ``weight`` from those of ``y`` and ``s``, None where nothing arrives."""
    s, weight, rstd = saved
    if dy is None:
        return ds, None
    if torch.is_grad_enabled():  # create_graph: only plain PyTorch can be differentiated once more, through rstd as well
        dx, dweight = rms_norm_backward_reference(dy, ds, s, weight, _reciprocal(s, eps), weight_offset, weight_wanted)
    else:
        plain = is_plain(dy, ds, s, weight)
        backward = launchers(s.device.type, kernel).backward if plain else _operators(kernel)[2]
        dx, dweight = backward(dy, ds, s, weight, rstd, weight_offset, weight_wanted)
    return dx, dweight if weight_wanted else None


def _register_gradients(suffix: str, kernel: str) -> None:
    def norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps, ctx.weight_offset, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def norm_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1]
        dx, dweight = _gradients(dy, None, ctx.saved_tensors, ctx.eps, ctx.weight_offset, wanted, kernel)
        return dx, dweight, None, None, None

    def add_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, residual, weight, ctx.eps, ctx.weight_offset, _ = inputs
        ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
        ctx.save_for_backward(output[1], weight, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    def add_norm_backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2]
        d, dweight = _gradients(dy, ds, ctx.saved_tensors, ctx.eps, ctx.weight_offset, wanted, kernel)
        if d is None:
            return None, None, dweight, None, None, None
        return d.to(ctx.x_dtype), d.to(ctx.residual_dtype), dweight, None, None, None

    register = functools.partial(torch.library.register_autograd, lib=_LIBRARY)
    register(f"oslo_fusion::{_NORM}{suffix}", norm_backward, setup_context=norm_context)
    register(f"oslo_fusion::{_ADD_NORM}{suffix}", add_norm_backward, setup_context=add_norm_context)


_register_gradients("", "auto")
_register_gradients("_cuda", "cuda")

RMS_NORM = torch.ops.oslo_fusion.rms_norm.default
ADD_RMS_NORM = torch.ops.oslo_fusion.add_rms_norm.default
RMS_NORM_BACKWARD = torch.ops.oslo_fusion.rms_norm_backward.default
_CUDA = tuple(getattr(torch.ops.oslo_fusion, f"{name}_cuda").default for name in _SCHEMAS)


def _operators(kernel: str) -> tuple[Any, ...]:
    return _CUDA if kernel == "cuda" else (RMS_NORM, ADD_RMS_NORM, RMS_NORM_BACKWARD)


class _Norm(torch.autograd.Function):
    """The operators and their gradient for plain eager code: launches, and nothing between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_offset: float,
        out_dtype: torch.dtype | None,
        kernel: str,
    ) -> Any:
        y, s, rstd = launchers(x.device.type, kernel).forward(x, weight, residual, eps, weight_offset, out_dtype)
        ctx.save_for_backward(s, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.weight_offset, ctx.kernel = eps, weight_offset, kernel
        ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
        return y if residual is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> Any:
        x_wanted, residual_wanted, weight_wanted, *_ = ctx.needs_input_grad
        d, dweight = _gradients(dy, ds, ctx.saved_tensors, ctx.eps, ctx.weight_offset, weight_wanted, ctx.kernel)
        dx = d.to(ctx.dtypes[0]) if x_wanted and d is not None else None
        dresidual = d.to(ctx.dtypes[1]) if residual_wanted and d is not None else None
        return dx, dresidual, dweight, None, None, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale every row to a root mean square of one, then by ``weight``: in one kernel forward and two backward.

    ``s / sqrt(mean(s²) + eps) · (weight + weight_offset)`` with ``s = x + residual``, or ``x`` without a residual.

    Args:
        x: ``[*batch, dim]``, half, bfloat16, float or double; any strides, zero rows allowed.
        weight: ``[dim]``, or None for no scale.
        eps: added to the mean square, in units of ``x²``.
        residual: ``[*batch, dim]`` to add to ``x`` first, or None.
        weight_offset: added to the weight in float32: 1 for Gemma.
        out_dtype: dtype of the norm; by default the promoted dtype of ``s`` and ``weight``.
        kernel: ``triton``, ``cuda`` or ``auto``, see :func:`implementation`.

    Returns:
        The norm ``[*batch, dim]``, contiguous. With a residual: the norm and ``s``, both contiguous.

    Raises:
        ConfigError: a shape, dtype, device, eps or kernel that has no meaning here.
        ImportError: the kernel that is asked for is not here.
    """
    if not torch.compiler.is_compiling():
        answers = launchers(x.device.type, kernel)
        if is_plain(x, weight, residual):
            if wants_gradient(x, weight, residual):
                result: Tensor | tuple[Tensor, Tensor] = _Norm.apply(x, residual, weight, eps, weight_offset, out_dtype, kernel)
                return result
            y, s, _ = answers.forward(x, weight, residual, eps, weight_offset, out_dtype)
            return y if residual is None else (y, s)
    norm_operator, add_norm_operator, _ = _operators(kernel)
    if residual is None:
        norm: Tensor = norm_operator(x, weight, eps, weight_offset, out_dtype)[0]
        return norm
    y, s, _ = add_norm_operator(x, residual, weight, eps, weight_offset, out_dtype)
    return y, s
