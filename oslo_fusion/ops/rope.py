"""Rotary position embedding of queries and keys: pairs of numbers of each head turn by an angle that grows with the position.

    y = x · cos + turn(x) · sin                 over the first ``rot_dim`` numbers of a head; the rest passes through
    turn(x) = (-x₂, x₁)                         for the two numbers of a pair

Pairs: numbers ``i`` and ``i + rot_dim/2`` (rotate-half: Llama, GPT-NeoX), or ``2i`` and ``2i + 1`` (interleaved: GLM, Cohere).

Shapes: ``q`` ``[batch, heads, seq, head_dim]``; ``k`` ``[batch, kv_heads, seq, head_dim]``; ``cos``, ``sin``
``[batch or 1, seq, rot_dim]``, one number for each rotated one, or with ``per_pair`` ``[batch or 1, seq, rot_dim/2]``, one for
each pair (gpt-oss, and GLM, which uses half of what it is given). The two numbers of a pair may have different cos and sin. The
transposed map, which is the gradient, is ``y = x · cos - turn(x · sin)``: a rotation by the opposite angle where the numbers of
a pair agree.

Dtype law: computed in float32 (float64 for float64 inputs) and rounded once, to the dtype of ``q`` and ``k`` unless told
otherwise: under autocast some models multiply half queries with float32 cosines and get float32.

Memory: a result is dense and keeps the order of its input's dimensions, as elementwise code does, so that transposed views of
``[batch, seq, heads, head_dim]`` stay that; the numbers of a head always lie side by side.

Source: Su et al., RoFormer, arXiv:2104.09864; transformers' ``apply_rotary_pos_emb`` of Llama, GPT-NeoX, GLM and Cohere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

Like = tuple[tuple[int, ...], tuple[int, ...]]
"""For the results of ``q`` and ``k``: strides of tensors that they are to lie in memory like."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, per_pair: bool, out_dtype: torch.dtype | None) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    if q.dtype not in DTYPES:
        raise ConfigError(f"rope: q: received dtype {q.dtype}, allowed are half, bfloat16, float and double. Remedy: q.float()")
    if q.dim() != 4:
        raise ConfigError(f"rope: q: received shape {list(q.shape)}, must be [batch, heads, seq, head_dim]")
    batch, _, seq, dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2] != seq or k.shape[3] != dim:
        raise ConfigError(
            f"rope: k: received shape {list(k.shape)}, must be [{batch}, kv_heads, {seq}, {dim}], as q {list(q.shape)}"
        )
    if k.dtype != q.dtype:
        raise ConfigError(f"rope: k: received dtype {k.dtype}, q has {q.dtype}. Remedy: k.to(q.dtype)")
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != seq:
        raise ConfigError(f"rope: cos: received shape {list(cos.shape)}, must be [{batch} or 1, {seq}, rot_dim]")
    if sin.shape != cos.shape:
        raise ConfigError(f"rope: sin: received shape {list(sin.shape)}, must be that of cos, {list(cos.shape)}")
    if cos.dtype not in DTYPES or sin.dtype != cos.dtype:
        raise ConfigError(f"rope: cos, sin: received dtypes {cos.dtype} and {sin.dtype}, must be one floating-point dtype")
    rot_dim = cos.shape[2] * (2 if per_pair else 1)
    if rot_dim % 2 or not 0 < rot_dim <= dim:
        given = "twice the last dimension of cos" if per_pair else "the last dimension of cos"
        raise ConfigError(f"rope: rot_dim: received {rot_dim} ({given}), must be even, from 2 to the head_dim {dim} of q")
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        if tensor.device != q.device:
            raise ConfigError(f"rope: {name}: is on {tensor.device}, q on {q.device}. Remedy: {name}.to(q.device)")
    if out_dtype is not None and out_dtype not in DTYPES:
        raise ConfigError(f"rope: out_dtype: received {out_dtype}, must be floating point or None")


def memory_order(strides: Sequence[int], contiguous: bool = False) -> tuple[int, ...]:
    """The dimensions of a result from the outermost in memory to the innermost, for an input with these strides.

    Of the strides of ``[batch, heads, seq, head_dim]`` the largest is outermost; an expanded dimension, which has none, comes
    first; the last dimension is always innermost.
    """
    leading = len(strides) - 1
    return (
        (*range(leading + 1),)
        if contiguous
        else (*sorted(range(leading), key=lambda i: (strides[i] != 0, -strides[i])), leading)
    )


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in memory in this order."""
    strides, step = [0] * len(order), 1
    for i in reversed(order):
        strides[i] = step
        step = step * max(1, shape[i])  # as torch does for a dimension without elements
    return tuple(strides)


def _in_order(y: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, dense in this order."""
    return y.permute(*order).contiguous().permute(*(order.index(i) for i in range(len(order))))


def _turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    transposed: bool,
    contiguous: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The meaning, in plain PyTorch, differentiable in all four tensors.

    Args:
        q, k, cos, sin, interleaved, per_pair: as in :func:`rope`.
        transposed: the transposed map, which takes gradients of the results to those of ``q`` and ``k``.
        contiguous, out_dtype: as in :func:`rope`.
    """
    _check(q, k, cos, sin, per_pair, out_dtype)
    wide = torch.float64 if torch.float64 in (q.dtype, cos.dtype) else torch.float32
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    if per_pair:
        c, s = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (c, s))
    result_dtype, rot_dim = out_dtype or q.dtype, c.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., :rot_dim].to(wide), x[..., rot_dim:]
        y = turned * c - _turn(turned * s, interleaved) if transposed else turned * c + _turn(turned, interleaved) * s
        y = y.to(result_dtype)
        if rest.shape[-1]:
            y = torch.cat((y, rest.to(result_dtype)), -1)
        return _in_order(y, memory_order(x.stride(), contiguous))

    return rotate(q), rotate(k)


# --- the operator ------------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_NAME = "rope"
_LIBRARY.define(
    f"{_NAME}(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool per_pair, bool transposed, bool contiguous, "
    "ScalarType? out_dtype) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _default(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The reference, or the kernels at the first CUDA tensor; their import registers them over this."""
    kernels = find_kernels(_NAME) if q.is_cuda else None
    rotate = rope_reference if kernels is None else kernels.launch_rope
    rotated_q, rotated_k = rotate(q, k, cos, sin, *options)
    return rotated_q, rotated_k


_LIBRARY.impl(_NAME, _default, "CompositeExplicitAutograd")


def register_kernel(launch: Any, key: str) -> None:
    """Register a faster implementation of the operator for one dispatch key, such as ``CUDA``."""
    _LIBRARY.impl(_NAME, launch, key)


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    transposed: bool,
    contiguous: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, per_pair, out_dtype)

    def result(x: Tensor) -> Tensor:
        order = memory_order(x.stride(), contiguous)
        return x.new_empty_strided(x.shape, dense_strides(x.shape, order), dtype=out_dtype or x.dtype)

    return result(q), result(k)


torch.library.register_fake(f"oslo_fusion::{_NAME}", _fake, lib=_LIBRARY)

# --- the gradient: the transposed map of the same operator, so that it can be differentiated as often as one likes -----------


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, *ctx.options = inputs
    angles_wanted = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, *((q, k) if angles_wanted else ()))
    ctx.dtype = q.dtype


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, *inputs = ctx.saved_tensors
    interleaved, per_pair, transposed, _, _ = ctx.options
    gradients: list[Tensor | None] = list(ROPE(dq, dk, cos, sin, interleaved, per_pair, not transposed, False, ctx.dtype))
    if not inputs:
        return *gradients, *(None,) * 7
    with torch.enable_grad():
        outputs = rope_reference(inputs[0], inputs[1], cos, sin, *ctx.options)
        angles = [angle for angle in (cos, sin) if angle.requires_grad]
        found = iter(torch.autograd.grad(outputs, angles, (dq, dk), create_graph=True))
    gradients += [next(found) if angle.requires_grad else None for angle in (cos, sin)]
    return *gradients, *(None,) * 5


torch.library.register_autograd(f"oslo_fusion::{_NAME}", _backward, setup_context=_context, lib=_LIBRARY)

ROPE = torch.ops.oslo_fusion.rope.default


class _Rope(torch.autograd.Function):
    """The operator and its gradient for plain eager code on a GPU: launches, and nothing between."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        per_pair: bool,
        transposed: bool,
        contiguous: bool,
        out_dtype: torch.dtype | None,
        like: Like | None,
    ) -> Any:
        kernels = find_kernels(_NAME)
        assert kernels is not None
        ctx.save_for_backward(cos, sin)
        # The gradients lie in memory as q and k do, whatever the order of those that arrive: then the views that made q and k
        # of a projection's output can be undone without a copy.
        ctx.options = interleaved, per_pair, not transposed, False, q.dtype, (q.stride(), k.stride())
        rotated = kernels.launch_rope(q, k, cos, sin, interleaved, per_pair, transposed, contiguous, out_dtype, like)
        ctx.mark_non_differentiable(*(y for y, wanted in zip(rotated, ctx.needs_input_grad, strict=False) if not wanted))
        return rotated

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        if is_plain(dq, dk):
            return *_eager(dq, dk, cos, sin, *ctx.options), *(None,) * 8
        return *ROPE(dq, dk, cos, sin, *ctx.options[:-1]), *(None,) * 8


def _eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Launch without the dispatcher; ``options`` as those of the launcher, up to ``like``."""
    kernels = find_kernels(_NAME)
    assert kernels is not None
    rotate = _Rope.apply if wants_gradient(q, k) else kernels.launch_rope
    rotated_q, rotated_k = rotate(q, k, cos, sin, *options)
    return rotated_q, rotated_k


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    per_pair: bool = False,
    contiguous: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions' angles, both in one kernel; the gradient is one more.

    ``x · cos + turn(x) · sin`` with ``turn(x) = (-x₂, x₁)`` in every pair, over the first ``rot_dim`` numbers of each head.

    Args:
        q: ``[batch, heads, seq, head_dim]``, half, bfloat16, float or double; any strides, no rows allowed. A tensor
            ``[batch, seq, heads, head_dim]`` is passed as ``q.transpose(1, 2)``, and its result lies in memory as that does.
        k: ``[batch, kv_heads, seq, head_dim]``, the dtype of ``q``.
        cos, sin: ``[batch or 1, seq, rot_dim]``, or ``[batch or 1, seq, rot_dim/2]`` with ``per_pair``. If one of them requires
            a gradient, the reference serves.
        interleaved: pairs are neighbours; otherwise a pair's numbers lie half of ``rot_dim`` apart.
        per_pair: ``cos`` and ``sin`` hold one number for each pair.
        contiguous: the results are contiguous, instead of keeping the memory order of their inputs.
        out_dtype: dtype of the results; by default that of ``q``.

    Returns:
        The rotated ``q`` and ``k``.

    Raises:
        ConfigError: a shape, dtype or device that has no meaning here.
    """
    if wants_gradient(cos, sin):
        return rope_reference(q, k, cos, sin, interleaved, per_pair, False, contiguous, out_dtype)
    if q.is_cuda and not torch.compiler.is_compiling() and is_plain(q, k, cos, sin) and find_kernels(_NAME) is not None:
        return _eager(q, k, cos, sin, interleaved, per_pair, False, contiguous, out_dtype, None)
    rotated_q, rotated_k = ROPE(q, k, cos, sin, interleaved, per_pair, False, contiguous, out_dtype)
    return rotated_q, rotated_k
