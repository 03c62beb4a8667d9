"""A gated MLP whose backward is cut along its inner width: SwiGLU and GEGLU with their projections, in little memory.

    y = (act(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd        act: silu, gelu, or gelu in its tanh form

Shapes: ``x`` ``[*batch, dim]``, ``gate_weight`` and ``up_weight`` ``[inner, dim]``, ``down_weight`` ``[out, inner]``, ``y``
``[*batch, out]``; biases ``[inner]``, ``[inner]`` and ``[out]``, each optional.

Nothing but ``x`` is kept for the backward, which computes gate and up again, as checkpointing would. It does so for a part of
the inner width at a time. In a part gate, up and the gradient of their product are what is in memory, and one kernel turns them
where they lie into the gradients of gate and up and the product. Uncut those are six tensors ``[*batch, inner]``.

Why along the inner width and not along the tokens: a part's weight gradients are slices of the whole ones, so no sum is cut
and nothing is read and written again. Only the gradient of ``x`` is a sum over parts. In each part it is one matmul over gate
and up side by side, so that it is rounded once per part, where plain PyTorch rounds gate's, up's, and their sum.

Dtype law: as plain PyTorch, which rounds each matmul's result to the dtype of ``x``; the product and the gradients of gate and
up are computed in float32 (float64 for float64) and rounded once. All tensors share a dtype; under autocast they are rounded to
its first.

Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202; Chen et al., Training Deep Nets with Sublinear Memory Cost,
arXiv:1604.06174; transformers' ``LlamaMLP``, ``GemmaMLP``, ``T5DenseGatedActDense``, ``Phi3MLP``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.glu import ACTIVATIONS, DTYPES, glu
from oslo_fusion.ops.kernels import find_kernels, is_plain

NAME = "gated_mlp"
_NARROWEST = 1024  # columns of a part: its weight gradients, 1024×2048 of 16384 tokens, still have a tile per multiprocessor
_ALIGNED = 128  # columns, of which a part's are a multiple: the side of a matmul's tile
_BLOCK = 1 << 16  # numbers of a part that plain PyTorch works on at a time: its float32 copies stay small, and in the cache
Optional = Tensor | None


def _error(name: str, received: object, allowed: str, remedy: str = "") -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}. Allowed: {allowed}." + (f" Remedy: {remedy}." if remedy else ""))


def _check(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    activation: str,
) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    if x.dtype not in DTYPES:
        raise _error("x", f"dtype {x.dtype}", "half, bfloat16, float and double", "x.float()")
    if x.dim() == 0 or gate_weight.dim() != 2 or gate_weight.shape[1] != x.shape[-1] or gate_weight.shape[0] == 0:
        allowed = "[inner, dim] for x of [*batch, dim]"
        raise _error("gate_weight", f"shape {list(gate_weight.shape)} with x of {list(x.shape)}", allowed)
    inner = gate_weight.shape[0]
    if up_weight.shape != gate_weight.shape:
        raise _error("up_weight", f"shape {list(up_weight.shape)}", f"{list(gate_weight.shape)}, that of gate_weight")
    if down_weight.dim() != 2 or down_weight.shape[1] != inner:
        raise _error("down_weight", f"shape {list(down_weight.shape)}", f"[out, {inner}]")
    for name, bias, size in (("gate_bias", gate_bias, inner), ("up_bias", up_bias, inner), ("down_bias", down_bias, None)):
        size = down_weight.shape[0] if size is None else size
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != size):
            raise _error(name, f"shape {list(bias.shape)}", f"[{size}]")
    others = {
        "gate_weight": gate_weight,
        "up_weight": up_weight,
        "down_weight": down_weight,
        "gate_bias": gate_bias,
        "up_bias": up_bias,
        "down_bias": down_bias,
    }
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise _error(name, f"dtype {tensor.dtype}", f"{x.dtype}, that of x", f"{name}.to(x.dtype)")
        if tensor is not None and tensor.device != x.device:
            raise _error(name, f"a tensor on {tensor.device}", f"{x.device}, where x is", f"{name}.to(x.device)")
    if activation not in ACTIVATIONS:
        raise _error("activation", repr(activation), ", ".join(ACTIVATIONS))


def gated_mlp_reference(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    down_bias: Optional,
    activation: str,
) -> Tensor:
    """The meaning, in plain PyTorch, which can be differentiated as often as one likes."""
    _check(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, activation)
    h = ACTIVATIONS[activation][0](F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
    return F.linear(h, down_weight, down_bias)


def part_width(inner: int, dim: int) -> int:
    """How many columns of the inner width the backward works on at a time.

    About half as many as ``x`` has: then what is in memory at once, three tensors of a part, is one and a half times ``x``,
    whatever the ratio of the two widths. Narrower parts would save less than the gradient of ``x`` takes, and round it oftener.

    Args:
        inner: the inner width.
        dim: that of ``x``.
    """
    parts = max(1, inner // max(dim // 2, _NARROWEST))
    return min(inner, -(-inner // (parts * _ALIGNED)) * _ALIGNED)


def glu_backward_in_place(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """``gate`` and ``up`` become their gradients and ``dh`` the product, in plain PyTorch. All are ``[rows, columns]``."""
    function, slope = ACTIVATIONS[activation]
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    rows = max(1, _BLOCK // max(1, gate.shape[1]))
    for d, g, u in zip(dh.split(rows), gate.split(rows), up.split(rows), strict=True):
        gradient, z, w = d.to(wide), g.to(wide), u.to(wide)
        a = function(z)
        product, dz = a * w, gradient * w * slope(z)
        u.copy_(gradient * a)
        g.copy_(dz)
        d.copy_(product)


# --- the operator ------------------------------------------------------------------------------------------------------------
# The forward is made of operators that exist: a compiler fuses them with what stands around. Only the backward is one of ours.

_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_BACKWARD = f"{NAME}_backward"
_LIBRARY.define(
    f"{_BACKWARD}(Tensor dy, Tensor x, Tensor gate_weight, Tensor up_weight, Tensor down_weight, Tensor? gate_bias, "
    "Tensor? up_bias, str activation, bool[] wanted) -> (Tensor dx, Tensor dgate_weight, Tensor dup_weight, "
    "Tensor ddown_weight, Tensor dgate_bias, Tensor dup_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Optional, ...], wanted: list[bool]) -> Gradients:
    """What the operator returns, not yet written; of no size where it is not wanted."""
    tensors = (x, *weights, *biases)
    made = [x.new_empty(t.shape) if w and t is not None else x.new_empty(0) for t, w in zip(tensors, wanted, strict=True)]
    dx, dgate_weight, dup_weight, ddown_weight, dgate_bias, dup_bias = made
    return dx, dgate_weight, dup_weight, ddown_weight, dgate_bias, dup_bias


def gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    activation: str,
    wanted: list[bool],
) -> Gradients:
    """The gradients, part by part.

    Args:
        dy: gradient of ``y``.
        x, gate_weight, up_weight, down_weight, gate_bias, up_bias, activation: as in the forward.
        wanted: which of the gradients are, in the order in which they are returned.

    Returns:
        The gradients of ``x``, the three weights and the two biases, each of no size where it is not wanted.
    """
    _check(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, None, activation)
    results = _empty_gradients(x, (gate_weight, up_weight, down_weight), (gate_bias, up_bias), wanted)
    dx, dgate_weight, dup_weight, ddown_weight, dgate_bias, dup_bias = results
    inner, dim = gate_weight.shape
    rows, dy_rows = x.reshape(-1, dim), dy.reshape(-1, dy.shape[-1])
    count, width = rows.shape[0], part_width(inner, dim)
    kernels = find_kernels("glu") if x.is_cuda and x.dtype != torch.float64 else None
    in_place = glu_backward_in_place if kernels is None else kernels.launch_glu_backward_in_place
    want_dx, want_dgate, want_dup, want_ddown, want_dgate_bias, want_dup_bias = wanted
    both_memory, h_memory = x.new_empty(2 * count * width), x.new_empty(count * width)
    dx_rows = dx.view(-1, dim) if want_dx else dx
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for start in range(0, inner, width):
            part = slice(start, min(start + width, inner))
            size = part.stop - start
            both, h = both_memory[: 2 * count * size].view(count, 2 * size), h_memory[: count * size].view(count, size)
            gate, up = both.split(size, 1)
            _project(rows, gate_weight[part], None if gate_bias is None else gate_bias[part], gate)
            _project(rows, up_weight[part], None if up_bias is None else up_bias[part], up)
            torch.mm(dy_rows, down_weight[:, part], out=h)
            in_place(h, gate, up, activation)
            if want_ddown:
                torch.mm(dy_rows.t(), h, out=ddown_weight[:, part])
            if want_dgate:
                torch.mm(gate.t(), rows, out=dgate_weight[part])
            if want_dup:
                torch.mm(up.t(), rows, out=dup_weight[part])
            if want_dgate_bias and gate_bias is not None:
                torch.sum(gate, 0, out=dgate_bias[part])
            if want_dup_bias and up_bias is not None:
                torch.sum(up, 0, out=dup_bias[part])
            if want_dx:  # the two weights are copied side by side: 16 MiB of 2048×2048 bfloat16, against a sum more per part
                weights = torch.cat((gate_weight[part], up_weight[part]))
                if start == 0:
                    torch.mm(both, weights, out=dx_rows)
                else:
                    dx_rows.addmm_(both, weights)
    return results


def _project(rows: Tensor, weight: Tensor, bias: Optional, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Optional,
    up_bias: Optional,
    activation: str,
    wanted: list[bool],
) -> Gradients:
    _check(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, None, activation)
    return _empty_gradients(x, (gate_weight, up_weight, down_weight), (gate_bias, up_bias), wanted)


_LIBRARY.impl(_BACKWARD, gated_mlp_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{_BACKWARD}", _backward_fake, lib=_LIBRARY)
GATED_MLP_BACKWARD = torch.ops.oslo_fusion.gated_mlp_backward.default

# --- the gradient ------------------------------------------------------------------------------------------------------------


class _GatedMLP(torch.autograd.Function):
    """The plain forward, with the backward in parts. Compilers trace both: forward as ATen, backward as the operator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, activation = arguments
        ctx.activation = activation
        ctx.save_for_backward(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
        gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
        if torch.compiler.is_compiling() or not is_plain(gate, up):
            h = ACTIVATIONS[activation][0](gate) * up
        else:
            h = glu(gate, up, activation)
        return F.linear(h, down_weight, down_bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dy, saved, wanted = gradients[0], ctx.saved_tensors, list(ctx.needs_input_grad[:7])
        if torch.is_grad_enabled():  # create_graph: only plain PyTorch can be differentiated once more
            again = [None if t is None else t.view_as(t) for t in saved]
            leaves = [t for t, w in zip(again, wanted, strict=True) if w and t is not None]
            y = gated_mlp_reference(*again, activation=ctx.activation)  # type: ignore[arg-type,misc]
            made = iter(torch.autograd.grad(y, leaves, dy, create_graph=True))
            return *(next(made) if w else None for w in wanted), None
        found = GATED_MLP_BACKWARD(dy, *saved[:6], ctx.activation, wanted[:6])
        results = [gradient if w else None for gradient, w in zip(found, wanted[:6], strict=True)]
        ddown_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if wanted[6] else None
        return *results, ddown_bias, None


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Optional = None,
    up_bias: Optional = None,
    down_bias: Optional = None,
    activation: str = "silu",
) -> Tensor:
    """A whole gated MLP that keeps only its input for the backward, which works on a part of the inner width at a time.

    It takes a third more time in all than a backward that keeps gate and up, as any recomputing does: worth it where memory is
    short. Under autocast the tensors are rounded to its dtype, as ``F.linear`` rounds them.

    Args:
        x: ``[*batch, dim]``; half, bfloat16, float or double; any strides, zero rows allowed.
        gate_weight, up_weight: ``[inner, dim]``, as ``nn.Linear`` keeps them.
        down_weight: ``[out, inner]``.
        gate_bias, up_bias: ``[inner]`` or None.
        down_bias: ``[out]`` or None.
        activation: of the gate: ``silu``, ``gelu`` or ``gelu_tanh``.

    Returns:
        ``[*batch, out]``, in the dtype of ``x``.

    Raises:
        ConfigError: a shape, dtype, device or activation that has no meaning here.
    """
    tensors: list[Optional] = [x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias]
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]
    _check(*tensors, activation=activation)  # type: ignore[arg-type,misc]
    y: Tensor = _GatedMLP.apply(*tensors, activation)
    return y
