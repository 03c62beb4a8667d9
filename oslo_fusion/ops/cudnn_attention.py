"""Attention with cuDNN's forward and our backward: as fast where key-value heads are shared, and without cuDNN's workspace.

cuDNN's backward holds the gradient of ``q`` in float32, and those of ``k`` and ``v`` once for every query head: 258 MiB for
Llama 1.24B 8×2048, where ours holds a float32 number for each query and head. They take 1.10 and 1.11 ms there (one NVIDIA
H200, ``benchmarks.attention``). Ours reads logarithms in base 2, so cuDNN's are multiplied by a constant.

Shapes: ``q`` ``[batch, heads, queries, dim]``, ``k`` and ``v`` ``[batch, kv_heads, keys, dim]``. Causal attention has as many
queries as keys.

Dtype law: half precision only; as of :mod:`oslo_fusion.ops.attention` and of cuDNN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.attention import (
    ATTENTION_BACKWARD,
    UNLIMITED,
    Extras,
    Options,
    attention_reference,
    new_like_tokens,
    new_logsumexp,
    no_second_derivative,
)
from oslo_fusion.ops.attention_backends import HALF

NAME = "cudnn_attention"
_NO_EXTRAS: tuple[Any, ...] = (None,) * len(Extras._fields)
_BASE = 1 / math.log(2.0)


def _options(scale: float, causal: bool) -> Options:
    return Options(scale, UNLIMITED, 0 if causal else UNLIMITED, True, 0, 0.0, 0, 0)


def _check(q: Tensor) -> None:
    if q.dtype not in HALF:
        raise ConfigError(f"{NAME}: q: received {q.dtype}. Allowed: half and bfloat16. Remedy: q.bfloat16(), or attention().")


def _check_lengths(q: Tensor, k: Tensor, causal: bool) -> None:
    """Not in the fake, where they may be symbols. With other lengths cuDNN's flag means another mask than ours."""
    if causal and q.shape[2] != k.shape[2]:
        raise ConfigError(
            f"{NAME}: causal: received True with {q.shape[2]} queries and {k.shape[2]} keys. Allowed: as many of both. Remedy: "
            "attention(), whose last query stands at the last key."
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Where there is no GPU the reference computes it."""
    _check(q)
    _check_lengths(q, k, causal)
    if not q.is_cuda:
        arguments: tuple[Any, ...] = (*_NO_EXTRAS, *_options(scale, causal))
        return attention_reference(q, k, v, *arguments)[:2]
    out, logs = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out, (logs.squeeze(-1) * _BASE).contiguous()  # how they lie is torch's choice


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    _check(q)
    if not q.is_cuda:
        return new_like_tokens(q), new_logsumexp(q)
    # torch says how its result lies in memory.
    out = torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, causal, False, scale=scale)[0]
    return out, new_logsumexp(q)


_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_LIBRARY.define(
    f"{NAME}(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor out, Tensor logsumexp)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl(NAME, _forward, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{NAME}", _fake, lib=_LIBRARY)
CUDNN_ATTENTION = torch.ops.oslo_fusion.cudnn_attention.default


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = _options(scale, causal)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    no_second_derivative(NAME)
    q, k, v, out, logs = ctx.saved_tensors
    rest, kept = q.new_empty(0), torch.empty((0,), dtype=torch.int32, device=q.device)
    dq, dk, dv, _ = ATTENTION_BACKWARD(dout, q, k, v, out, logs, rest, kept, *_NO_EXTRAS, *ctx.options, False)
    return dq, dk, dv, None, None


torch.library.register_autograd(f"oslo_fusion::{NAME}", _backward, setup_context=_context, lib=_LIBRARY)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """``softmax(scale · q kᵀ) v`` by cuDNN, with a gradient by our kernel.

    Args:
        q: ``[batch, heads, queries, dim]``, half or bfloat16.
        k, v: ``[batch, kv_heads, keys, dim]``, heads a multiple of ``kv_heads``.
        scale: of the products.
        causal: a query sees no later key; as many queries as keys.

    Returns:
        The shape and dtype of ``q``.

    Raises:
        ConfigError: ``q`` is not of half precision; or ``causal`` with other numbers of queries and keys.
        RuntimeError: cuDNN does not take it; or a second derivative is wanted.
    """
    out: Tensor = CUDNN_ATTENTION(q, k, v, scale, causal)[0]
    return out
