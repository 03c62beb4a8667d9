"""Linear layers of one input as one matmul: attention's q, k and v, or the k and v of a cross attention.

``y_i = x · weight_iᵀ + bias_i`` for each i

Shapes: ``x`` ``[*batch, dim]``, ``weight_i`` ``[out_i, dim]``, ``bias_i`` ``[out_i]`` or None, ``y_i`` ``[*batch, out_i]``.

The outputs lie side by side in one tensor ``[*batch, Σ out_i]``, of which each is a view: the kernels of attention read them at
their stride, a copy would eat the gain. The weights are copied side by side for it, 3.5 MB and 2 µs of BERT-base's three.

Backward: the gradient of ``x`` is a sum over the layers, which autograd makes of as many matmuls and additions. Here it is one
of two forms, named by ``gradient``; bytes for three layers of 768×768 of 32768 tokens in bfloat16, a tensor 50 MB:

- ``side_by_side``: the outputs' gradients are copied side by side (300 MB, 70 µs; a compiler does it in the kernel that adds up
  the biases' gradients), and one matmul over Σ out_i adds up, in its float32 accumulators, and rounds once.
- ``accumulated``: a matmul per layer, which adds to what the one before wrote as it stores its tile (100 MB more to read,
  24 µs where it does not hide behind the matmul). In place, within one operator: out of place ``addmm`` copies first.

The gradients of the weights stay a matmul each: with 32768 tokens to sum over they run at 700 TFLOP/s as they are. So each
parameter's gradient owns its memory, and is what it would be without us, bit for bit on most devices.

Dtype law: as ``F.linear``. The gradient of ``x`` is rounded once (``side_by_side``), or once per layer, as autograd does, which
rounds the sums as well. All tensors share a dtype; under autocast they are rounded to its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.glu import DTYPES

NAME = "merged_linear"
GRADIENTS = ("side_by_side", "accumulated")
Optional = Tensor | None


def _error(name: str, received: object, allowed: str, remedy: str = "") -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}. Allowed: {allowed}." + (f" Remedy: {remedy}." if remedy else ""))


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Optional], gradient: str) -> None:
    """Raise ConfigError for what has no meaning here. Called first by the reference and by the function itself."""
    if x.dtype not in DTYPES or x.dim() == 0:
        raise _error("x", f"{list(x.shape)} of {x.dtype}", "[*batch, dim] in half, bfloat16, float or double")
    if not weights or len(weights) != len(biases):
        raise _error(
            "biases", f"{len(biases)} for {len(weights)} weights", "one or None for each weight, of which there is one"
        )
    if gradient not in GRADIENTS:
        raise _error("gradient", repr(gradient), ", ".join(GRADIENTS))
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            received = f"shape {list(weight.shape)} with x of {list(x.shape)}"
            raise _error(f"weights[{index}]", received, "[out, dim] for x of [*batch, dim]")
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            raise _error(f"biases[{index}]", f"shape {list(bias.shape)}", f"[{weight.shape[0]}]")
        for name, tensor in ((f"weights[{index}]", weight), (f"biases[{index}]", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise _error(name, f"dtype {tensor.dtype}", f"{x.dtype}, that of x", f"{name}.to(x.dtype)")
            if tensor is not None and tensor.device != x.device:
                raise _error(name, f"a tensor on {tensor.device}", f"{x.device}, where x is", f"{name}.to(x.device)")


def merged_linear_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Optional]) -> tuple[Tensor, ...]:
    """The meaning: a linear layer after the other."""
    _check(x, weights, biases, GRADIENTS[0])
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


# --- the operator ------------------------------------------------------------------------------------------------------------
# Only what must write in place is one: a compiler that sees ``addmm`` gives its result a place of its own, and copies.

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_ACCUMULATE = "sum_of_matmuls"
_LIBRARY.define(f"{_ACCUMULATE}(Tensor[] left, Tensor[] right) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def sum_of_matmuls(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """``Σ left_i · right_i``, each matmul adding to what the one before wrote.

    Args:
        left: ``[rows, inner_i]`` each.
        right: ``[inner_i, columns]`` each.

    Returns:
        ``[rows, columns]``, contiguous.
    """
    total = torch.mm(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total.addmm_(a, b)
    return total


def _sum_fake(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return left[0].new_empty(left[0].shape[0], right[0].shape[1])


_LIBRARY.impl(_ACCUMULATE, sum_of_matmuls, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{_ACCUMULATE}", _sum_fake, lib=_LIBRARY)
SUM_OF_MATMULS = torch.ops.oslo_fusion.sum_of_matmuls.default

# --- the gradient ------------------------------------------------------------------------------------------------------------


class _MergedLinear(torch.autograd.Function):
    """One matmul forward; backward as the module's docstring says. Compilers trace both."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        x, gradient, count = arguments[:3]
        weights, biases = arguments[3 : 3 + count], arguments[3 + count :]
        ctx.gradient, ctx.count = gradient, count
        ctx.set_materialize_grads(False)  # an output that nobody used has no part in the sums
        ctx.save_for_backward(x, *weights)
        bias = None
        if any(b is not None for b in biases):  # Whisper's k has none
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
        y = F.linear(x, torch.cat(weights), bias)
        return tuple(torch.split(y, [w.shape[0] for w in weights], -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        want_weights, want_biases = wanted[3 : 3 + ctx.count], wanted[3 + ctx.count :]
        rows = x.reshape(-1, x.shape[-1])
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in gradients]
        given = [(dy, w) for dy, w in zip(flat, weights, strict=True) if dy is not None]
        dx = None
        if wanted[0] and given:
            dys, theirs = [dy for dy, _ in given], [w for _, w in given]
            if ctx.gradient == "accumulated" and not torch.is_grad_enabled():  # create_graph: it has no gradient of its own
                dx = SUM_OF_MATMULS(dys, theirs)
            elif len(given) == 1:
                dx = torch.mm(dys[0], theirs[0])
            else:
                # The other way round than in the forward: a compiler that sees the same weights side by side twice keeps them
                # for the backward, a copy of a quarter of a layer's parameters, which FSDP would no longer free.
                dx = torch.mm(torch.cat(dys[::-1], 1), torch.cat(theirs[::-1]))
            dx = dx.view(x.shape)
        dweights = [
            torch.mm(dy.t(), rows) if want and dy is not None else None for dy, want in zip(flat, want_weights, strict=True)
        ]
        dbiases = [dy.sum(0) if want and dy is not None else None for dy, want in zip(flat, want_biases, strict=True)]
        return dx, None, None, *dweights, *dbiases


def merged_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Optional], gradient: str = "side_by_side"
) -> tuple[Tensor, ...]:
    """Several linear layers of one input, as one matmul.

    Worth it where one alone is too small for the device: few columns and a short sum. Under autocast the tensors are rounded to
    its dtype, as ``F.linear`` rounds them.

    Args:
        x: ``[*batch, dim]``; half, bfloat16, float or double; any strides, zero rows allowed.
        weights: ``[out_i, dim]`` each, as ``nn.Linear`` keeps them.
        biases: ``[out_i]`` or None for each weight.
        gradient: how that of ``x`` is added up: ``side_by_side`` or ``accumulated``.

    Returns:
        ``[*batch, out_i]`` for each weight, in the dtype of ``x``: views of one tensor, not to be written to.

    Raises:
        ConfigError: a shape, dtype, device or name that has no meaning here.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        wide = torch.float64  # which autocast leaves as it is
        x = x if x.dtype == wide else x.to(dtype)
        weights = [w if w.dtype == wide else w.to(dtype) for w in weights]
        biases = [b if b is None or b.dtype == wide else b.to(dtype) for b in biases]
    _check(x, weights, biases, gradient)
    results: tuple[Tensor, ...] = _MergedLinear.apply(x, gradient, len(weights), *weights, *biases)
    return results
