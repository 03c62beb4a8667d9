"""Gated MLPs in Dynamo's graph: where the dial is low, their backward runs in parts (:mod:`oslo_fusion.ops.gated_mlp`).

A site is two linear layers of one input, an activation of one of them, the product, and a linear layer of that, with nobody
else looking at what lies between. Gate and up may be the halves of one layer's output. The activation is recognised by its
values, however it is written. The forward stays plain PyTorch, which the compiler fuses as before.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from oslo_fusion.aot.nodes import LINEAR, activation, argument, erase_unused, example, is_function, is_method, writes
from oslo_fusion.ops.gated_mlp import gated_mlp
from oslo_fusion.ops.glu import DTYPES

CUT_AT = 0.25
"""The largest budget at which it is done. Gate and up are two thirds of what a layer of Llama's widths keeps (512 of 800 MiB at
16384 tokens): up to a quarter neither fits, so a backward that computes them again costs nothing. Above, they may be kept."""

_PRODUCT = (operator.mul, torch.mul)
_HALVES = (torch.chunk, torch.split)
_NAMED = (F.silu, F.gelu, torch._C._nn.gelu)


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
    whole: list[str] = []
    replaced: list[fx.Node] = []
    if torch.is_grad_enabled():
        for node in list(graph.graph.nodes):
            try:
                down = _cut(graph.graph, node)
            except _LeaveError as reason:
                whole.append(str(reason))
                continue
            if down is not None:
                replaced.append(down)
    if replaced:
        erase_unused(replaced)
        for node in list(graph.graph.nodes):
            _write_residual(node)
        graph.recompile()
    return Parts(len(replaced), tuple(dict.fromkeys(whole)))


def _cut(graph: fx.Graph, product: fx.Node) -> fx.Node | None:
    """Put the operator in place of a product's MLP. Its last layer, which nobody reads any more; None without a site."""
    found = _activated(product) if _is_product(product) else None
    if found is None:
        return None
    gate, formula, inside, up = found
    (x, gate_weight, gate_bias), between = _projection(gate, "gate")
    (also_x, up_weight, up_bias), more = _projection(up, "up")
    if also_x is not x:
        raise _LeaveError("gate and up have different inputs")
    down, after = _down(product)
    _only_users({*inside, *between, *more, product, *after}, down)
    down_weight, down_bias = argument(down, 1, "weight"), argument(down, 2, "bias")
    arguments = (x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    _check_values(x, *(a.of if isinstance(a, _Half) else a for a in arguments[1:]))
    with graph.inserting_before(down):
        given = [a.insert(graph) if isinstance(a, _Half) else a for a in arguments]
        new = graph.call_function(gated_mlp, (*given, formula))
    new.meta.update(down.meta)
    down.replace_all_uses_with(new)
    return down


def _activated(product: fx.Node) -> tuple[fx.Node, str, list[fx.Node], Any] | None:
    """The gate, its activation's formula and nodes, and the other factor; None for any other product."""
    factors: tuple[Any, ...] = product.args
    for act, up in (factors, factors[::-1]):
        found = activation(act)
        if found is not None:
            return *found, up
    if any(is_function(act, _NAMED) and isinstance(argument(act, 0, "input"), fx.Node) for act in factors):
        raise _LeaveError("its gate is not the output of a linear layer alone (an adapter, or shared out between devices)")
    return None


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
    if not (is_function(node, (operator.add, torch.add)) and len(node.args) == 2 and not node.kwargs and len(node.users) > 1):
        return
    for residual, linear in (node.args, node.args[::-1]):
        if not isinstance(residual, fx.Node) or not isinstance(linear, fx.Node) or not is_function(linear, LINEAR):
            continue
        x, weight, bias = linear.args[0], argument(linear, 1, "weight"), argument(linear, 2, "bias")
        values = [example(n) for n in (residual, linear, x, weight)]
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


def _is_product(node: fx.Node) -> bool:
    named = is_function(node, _PRODUCT) or is_method(node, "mul")
    return named and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _projection(node: Any, role: str) -> tuple[tuple[fx.Node, Any, Any], list[fx.Node]]:
    """Input, weight and bias of the linear layer whose output, or half of it, the node is; and the nodes down to it."""
    if is_function(node, LINEAR):
        return (node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")), [node]
    if is_function(node, (operator.getitem,)) and node.args[1] in (0, 1):
        halves = node.args[0]
        cut = is_function(halves, _HALVES) or is_method(halves, "chunk", "split")
        linear = halves.args[0] if cut else None
        pieces = example(halves)
        in_two = isinstance(pieces, (tuple, list)) and len(pieces) == 2 and pieces[0].shape == pieces[1].shape
        if (
            in_two
            and linear is not None
            and is_function(linear, LINEAR)
            and 2 * pieces[0].shape[-1] == example(linear).shape[-1]
        ):
            x, weight, bias = linear.args[0], argument(linear, 1, "weight"), argument(linear, 2, "bias")
            index = node.args[1]
            return (x, _Half(weight, index), None if bias is None else _Half(bias, index)), [node, halves, linear]
    raise _LeaveError(f"its {role} is not the output of a linear layer alone (an adapter, or shared out between devices)")


def _down(product: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The linear layer of the product, and the dropouts between that do nothing."""
    between: list[fx.Node] = []
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if is_function(user, LINEAR) and user.args[0] is node:
            return user, between
        if not is_function(user, (F.dropout, torch.dropout)):
            break
        chance, training = argument(user, 1, "p"), argument(user, 2, "training")
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
    values = [example(t) for t in (x, *tensors) if t is not None]
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
    if any(map(writes, x.users)):
        raise _LeaveError("its input is written to")
