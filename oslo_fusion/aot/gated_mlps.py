"""Gated MLPs in Dynamo's graph: where the dial is low, their backward runs in parts (:mod:`oslo_fusion.ops.gated_mlp`).

A site is two linear layers of one input, an activation of one of them, the product, and a linear layer of that, with nobody
else looking at what lies between. Gate and up may be the halves of one layer's output. The activation is recognised by its
values, however it is written. The forward stays plain PyTorch, which the compiler fuses as before.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from oslo_fusion import probe
from oslo_fusion.ops.gated_mlp import gated_mlp
from oslo_fusion.ops.glu import ACTIVATIONS, DTYPES

CUT_AT = 0.25
"""The largest budget at which it is done. Gate and up are two thirds of what a layer of Llama's widths keeps (512 of 800 MiB at
16384 tokens): up to a quarter neither fits, so a backward that computes them again costs nothing. Above, they may be kept."""

_LINEAR = (F.linear, torch._C._nn.linear)
_ADDMM = (torch.addmm,)
_VIEWS = ("view", "reshape")
_PRODUCT = (operator.mul, torch.mul)
_HALVES = (torch.chunk, torch.split)
_NAMED = (F.silu, F.gelu, torch._C._nn.gelu)
_LONGEST = 16  # operators of an activation: transformers' spelling of the tanh form has eight


@dataclass(frozen=True)
class Parts:
    """What was found in one graph.

    Attributes:
        cut: how many gated MLPs have their backward in parts.
        whole: why others were left as they are, each reason once.
    """

    cut: int = 0
    whole: tuple[str, ...] = ()


class _LeaveError(Exception):
    """Why a gated product is no site."""


def cut_gated_mlps(graph: fx.GraphModule) -> Parts:
    """Replace every site in the graph, in place."""
    cut, whole = 0, []
    if torch.is_grad_enabled():
        for node in list(graph.graph.nodes):
            try:
                cut += _cut(graph.graph, node)
            except _LeaveError as reason:
                whole.append(str(reason))
    if cut:
        for node in list(graph.graph.nodes):
            _write_residual(node)
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return Parts(cut, tuple(dict.fromkeys(whole)))


def _cut(graph: fx.Graph, product: fx.Node) -> bool:
    if not _is_product(product):
        return False
    activation, up = _activation(product.args[0]), product.args[1]
    if activation is None:
        activation, up = _activation(product.args[1]), product.args[0]
    if activation is None:
        return False
    gate, formula, inside = activation
    (x, gate_weight, gate_bias), between = _projection(gate, "gate")
    (also_x, up_weight, up_bias), more = _projection(up, "up")
    if also_x is not x:
        raise _LeaveError("gate and up have different inputs")
    down, after = _down(product)
    _only_users({*inside, *between, *more, product, *after}, down)
    down_weight, down_bias = _argument(down, 1, "weight"), _argument(down, 2, "bias")
    arguments = (x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    _check_values(x, *(a.of if isinstance(a, _Half) else a for a in arguments[1:]))
    with graph.inserting_before(down):
        given = [a.insert(graph) if isinstance(a, _Half) else a for a in arguments]
        new = graph.call_function(gated_mlp, (*given, formula))
    new.meta.update(down.meta)
    down.replace_all_uses_with(new)
    graph.erase_node(down)
    return True


def added(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``residual + F.linear(x, weight)``, by the matmul."""
    sum_ = torch.addmm(residual.reshape(-1, residual.shape[-1]), x.reshape(-1, x.shape[-1]), weight.t())
    return sum_.view(residual.shape)


def _write_residual(node: fx.Node) -> None:
    """Let the residual addition before an MLP be a tensor of its own: the matmul before it adds.

    Left to Inductor it is computed again by each of its readers, among them the sum that is the norm's weight gradient. That
    kernel then reads the layer's input, as the one of the layer's first norm does, so the two are fused and run last. Until
    then the gradient of the MLP's input and the projected attention stay in memory, through the attention's backward, which
    has none to spare either: 128 of its 744 MiB in Llama 1.24B 8×2048.
    """
    if not (_is(node, (operator.add, torch.add)) and len(node.args) == 2 and not node.kwargs and len(node.users) > 1):
        return
    for residual, linear in (node.args, node.args[::-1]):
        if not isinstance(residual, fx.Node) or not isinstance(linear, fx.Node) or not _is(linear, _LINEAR):
            continue
        x, weight, bias = linear.args[0], _argument(linear, 1, "weight"), _argument(linear, 2, "bias")
        values = [_value(n) for n in (residual, linear, x, weight)]
        if bias is not None or len(linear.users) != 1 or not all(isinstance(v, Tensor) for v in values):
            continue
        alike = len({v.dtype for v in values}) == 1 and values[0].shape == values[1].shape and values[3].dim() == 2
        if alike and not any(is_traceable_wrapper_subclass(v) for v in values):
            node.target, node.args = added, (residual, x, weight)
            return


@dataclass(frozen=True)
class _Half:
    """One half of a merged projection's weight or bias."""

    of: fx.Node
    index: int

    def insert(self, graph: fx.Graph) -> fx.Node:
        halves = graph.call_function(torch.chunk, (self.of, 2, 0))
        return graph.call_function(operator.getitem, (halves, self.index))


def _is(node: object, targets: tuple[Callable[..., Any], ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _is_method(node: object, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def _is_product(node: fx.Node) -> bool:
    named = _is(node, _PRODUCT) or _is_method(node, "mul")
    return named and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _value(node: object) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _activation(node: Any) -> tuple[fx.Node, str, list[fx.Node]] | None:
    """The gate that is activated, by which formula, and the nodes that do it."""
    inside: list[fx.Node] = []
    sources: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, fx.Node) or current in inside:
            continue
        if current.op not in ("call_function", "call_method") or _is_source(current):
            sources[current] = None
        else:
            inside.append(current)
            waiting += current.all_input_nodes
        if len(inside) > _LONGEST or len(sources) > 1:
            break
    if inside and len(inside) <= _LONGEST and len(sources) == 1:
        (gate,) = sources
        formula = _formula(node, gate, set(inside))
        if formula is not None:
            return gate, formula, inside
    if _is(node, _NAMED) and isinstance(node.args[0], fx.Node):
        raise _LeaveError("its gate is not the output of a linear layer alone (an adapter, or shared out between devices)")
    return None


def _is_source(node: fx.Node) -> bool:
    """Whether it is no operator of an activation. Only plain functions are ever run: an all-reduce must not be, say."""
    if node.op == "call_method":
        return node.target in ("__getitem__", *_VIEWS)
    module = getattr(node.target, "__module__", None) or ""
    plain = module in ("_operator", "math", "torch") or module.startswith(("torch.nn.", "torch._C", "torch._VF"))
    is_operator = isinstance(node.target, (torch._ops.OperatorBase, torch._ops.OpOverloadPacket))
    return not plain or is_operator or node.target in (*_LINEAR, *_ADDMM, operator.getitem)


def _formula(node: fx.Node, gate: fx.Node, inside: set[fx.Node]) -> str | None:
    value = _value(gate)
    # No two dimensions are alike, and no two numbers, so that what moves them is no activation.
    shape = (*range(2, value.dim() + 1), 97) if isinstance(value, Tensor) and value.dim() else (2, 3, 97)
    grid = torch.linspace(-12, 12, math.prod(shape), dtype=torch.float64, device="cpu").reshape(shape)
    values: dict[fx.Node, Any] = {gate: grid.clone()}
    try:
        with torch.no_grad(), probe.preserved_random_state(), torch.autocast("cpu", enabled=False):
            for current in gate.graph.nodes:
                if current in inside:
                    args, kwargs = fx.map_arg((current.args, current.kwargs), values.__getitem__)
                    values[current] = (
                        getattr(args[0], current.target)(*args[1:], **kwargs)
                        if current.op == "call_method"
                        else current.target(*args, **kwargs)
                    )
            result = values[node]
            if not isinstance(result, Tensor) or result.dtype != grid.dtype or result.shape != grid.shape:
                return None
            for name, (function, _) in ACTIVATIONS.items():
                if torch.allclose(result, function(grid), rtol=1e-8, atol=1e-8):
                    return name
    except Exception:  # an operator that needs its own shapes or devices is no activation that we know
        return None
    return None


def _projection(node: Any, role: str) -> tuple[tuple[fx.Node, Any, Any], list[fx.Node]]:
    """Input, weight and bias of the linear layer whose output, or half of it, the node is; and the nodes down to it."""
    if _is(node, _LINEAR):
        return (node.args[0], _argument(node, 1, "weight"), _argument(node, 2, "bias")), [node]
    if _is(node, (operator.getitem,)) and node.args[1] in (0, 1):
        halves = node.args[0]
        cut = _is(halves, _HALVES) or _is_method(halves, "chunk", "split")
        linear = halves.args[0] if cut else None
        pieces = _value(halves)
        in_two = isinstance(pieces, (tuple, list)) and len(pieces) == 2 and pieces[0].shape == pieces[1].shape
        if in_two and linear is not None and _is(linear, _LINEAR) and 2 * pieces[0].shape[-1] == _value(linear).shape[-1]:
            x, weight, bias = linear.args[0], _argument(linear, 1, "weight"), _argument(linear, 2, "bias")
            index = node.args[1]
            return (x, _Half(weight, index), None if bias is None else _Half(bias, index)), [node, halves, linear]
    raise _LeaveError(f"its {role} is not the output of a linear layer alone (an adapter, or shared out between devices)")


def _down(product: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The linear layer of the product, and the dropouts between that do nothing."""
    between: list[fx.Node] = []
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if _is(user, _LINEAR) and user.args[0] is node:
            return user, between
        if not _is(user, (F.dropout, torch.dropout)):
            break
        chance, training = _argument(user, 1, "p"), _argument(user, 2, "training")
        if chance != 0 and training is not False:
            raise _LeaveError("dropout between the product and the projection down")
        between.append(user)
        node = user
    raise _LeaveError("something else than a linear layer reads the product")


def _only_users(inside: set[fx.Node], down: fx.Node) -> None:
    for node in inside:
        if any(user not in inside and user is not down for user in node.users):
            raise _LeaveError("something else reads its gate, its up projection or their product")


def _check_values(x: Any, *tensors: Any) -> None:
    values = [_value(t) for t in (x, *tensors) if t is not None]
    if any(not isinstance(v, Tensor) for v in values):
        raise _LeaveError("its shapes are not known")
    if any(is_traceable_wrapper_subclass(v) for v in values):
        raise _LeaveError(
            "its tensors are of a class of their own (DTensor, quantized): their gradients are that class' matter"
        )
    kind = values[0].device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    alike = all(v.dtype == values[0].dtype for v in values) or autocast
    if not alike or any(v.dtype not in DTYPES for v in values) or (autocast and torch.float64 in {v.dtype for v in values}):
        raise _LeaveError(f"its dtypes are {', '.join(dict.fromkeys(str(v.dtype) for v in values))}")
    if not any(v.requires_grad for v in values):
        raise _LeaveError("nothing of it has a gradient")
    if any(_is_method(user, "add_", "mul_", "sub_", "div_", "copy_", "zero_", "fill_") for user in x.users):
        raise _LeaveError("its input is written to")
