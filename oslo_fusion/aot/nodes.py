"""Nodes of the graphs that Dynamo hands to a backend: what passes over these graphs ask of them.

An activation is recognised by its values, however it is written. These graphs write in place, which ``fx`` takes for dead code
where nobody reads the result: passes erase what they have replaced (:func:`erase_unused`) and nothing else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from oslo_fusion import probe
from oslo_fusion.ops.glu import ACTIVATIONS

LINEAR = (F.linear, torch._C._nn.linear)
ADDMM = (torch.addmm,)
VIEWS = ("view", "reshape")
_IN_PLACE = frozenset({"iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift"})
_IN_PLACE |= {"isub", "itruediv", "ixor", "setitem"}
_LONGEST = 16  # operators of an activation: transformers' spelling of the tanh form has eight


def is_function(node: object, targets: tuple[Callable[..., Any], ...]) -> bool:
    """Whether a node calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_method(node: object, *names: str) -> bool:
    """Whether a node calls one of these methods of a tensor."""
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def argument(node: fx.Node, position: int, name: str) -> Any:
    """What a call was given there, by place or by name; None where it was not."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def example(node: object) -> Any:
    """What a node returns, as a tensor without memory; None for what is no node, or has none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments."""
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    place = names.index("inplace") if "inplace" in names else len(node.args)
    if node.kwargs.get("out") is not None or argument(node, place, "inplace") is True:
        return True
    name = getattr(node.target, "__name__", str(node.target))
    if getattr(node.target, "__module__", None) == "_operator":
        return name in _IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that nobody reads, then what of their inputs nobody reads any more; but nothing that writes."""
    waiting, erased = list(nodes), set()
    while waiting:
        node = waiting.pop()
        kept = node in erased or node.users or node.op in ("placeholder", "output")
        if kept or node.is_impure() or (node.op in ("call_function", "call_method") and writes(node)):
            continue
        waiting += node.all_input_nodes
        erased.add(node)
        node.graph.erase_node(node)


def activation(node: Any) -> tuple[fx.Node, str, list[fx.Node]] | None:
    """Of what a node is an activation, by which formula (:data:`ACTIVATIONS`), and the nodes that do it; None if it is none."""
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
    return None


def _is_source(node: fx.Node) -> bool:
    """Whether it is no operator of an activation. Only plain functions are ever run: an all-reduce must not be, say."""
    if node.op == "call_method":
        return node.target in ("__getitem__", *VIEWS)
    module = getattr(node.target, "__module__", None) or ""
    plain = module in ("_operator", "math", "torch") or module.startswith(("torch.nn.", "torch._C", "torch._VF"))
    is_operator = isinstance(node.target, (torch._ops.OperatorBase, torch._ops.OpOverloadPacket))
    return not plain or is_operator or node.target in (*LINEAR, *ADDMM, operator.getitem)


def _formula(node: fx.Node, gate: fx.Node, inside: set[fx.Node]) -> str | None:
    value = example(gate)
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
