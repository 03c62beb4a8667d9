"""The gradients of queries, keys and values that one projection makes: written side by side, in compiled graphs.

GPT-2 splits the output of one matmul into the three, so its gradient is the three, side by side. Left alone, attention writes
three tensors, and a kernel of the compiler's copies them into one: 151 MB in each layer of GPT-2 16×1024, 35 µs on one NVIDIA
H200. Here our operator writes into the one (:func:`oslo_fusion.ops.attention.new_joined`), and nothing is copied. A vendor's
backward has no place for tensors that are there already, and stays.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from oslo_fusion.ops.attention import ATTENTION_BACKWARD, ATTENTION_BACKWARD_JOINED

_ATEN = torch.ops.aten
_RESHAPES = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
_VIEWS = (
    *_RESHAPES,
    _ATEN.transpose.int,
    _ATEN.permute.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.alias.default,
    _ATEN.detach.default,
)
_TABLE = 3  # place of the table's gradient in the operator's results


def join_gradients(graph: fx.Graph) -> None:
    """A pass over a graph just before Inductor generates its code, in place."""
    for node in graph.find_nodes(op="call_function", target=ATTENTION_BACKWARD):
        found = _concatenation(node)
        if found is not None:
            _join(graph, node, *found)


def _concatenation(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What puts an attention's gradients of q, k and v side by side, and the last view of the first of them; or None."""
    results: dict[Any, fx.Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(results) != len(node.users) or not {0, 1, 2} <= results.keys():
        return None
    ends = [_end(results[place]) for place in range(3)]
    users = {user for end in ends for user in end.users}
    if len(users) != 1 or any(len(end.users) != 1 for end in ends):
        return None
    (cat,) = users
    parts: Any = cat.args[0] if cat.target is _ATEN.cat.default else ()
    if list(parts) != ends:
        return None
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if dim not in (-1, cat.meta["val"].dim() - 1) or not all(map(_lies_as_written, ends, map(results.get, range(3)))):
        return None
    if not isinstance(cat.meta["val"].shape[-1], int):
        return None
    q, k = (_value(results[place]) for place in range(2))
    tokens = 0 if q.dim() == 3 else 2
    return (cat, ends[0]) if statically_known_true(q.shape[tokens] == k.shape[tokens]) else None


def _end(node: fx.Node) -> fx.Node:
    """The last of the views of a tensor that nobody else looks at."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in _VIEWS:
            break
        node = user
    return node


def _lies_as_written(end: fx.Node, result: Any) -> bool:
    """Whether the views only put heads beside one another: all in the order of memory, a row for each token.

    The operator writes ``[batch, tokens, heads, dim]``, without gaps. So does what has its numbers, its strides and a last
    dimension of heads times dim.
    """
    value, written = _value(end), _value(result)
    if end.target not in _RESHAPES or not isinstance(value, Tensor) or not isinstance(written, Tensor):
        return False
    width = written.shape[1] * written.shape[-1]
    return statically_known_true(value.shape[-1] == width) and _is_dense(value.shape, value.stride())


def _is_dense(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if not statically_known_true(stride == expected) and not statically_known_true(size == 1):
            return False
        expected = expected * size
    return True


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _join(graph: fx.Graph, node: fx.Node, cat: fx.Node, end: fx.Node) -> None:
    sizes: Any = end.args[1]  # the first view's, with the width of all three
    width = cat.meta["val"].shape[-1]
    with graph.inserting_before(node):
        made = graph.call_function(ATTENTION_BACKWARD_JOINED, node.args, node.kwargs)
        joined, table = (graph.call_function(operator.getitem, (made, place)) for place in range(2))
    with graph.inserting_before(cat):
        view = graph.call_function(_ATEN.view.default, (joined, [*sizes[:-1], width]))
    made.meta.update(node.meta)
    view.meta.update(cat.meta)
    before = node.meta["val"]
    with before[0].fake_mode:
        q, k = before[:2]
        tokens = q.shape[:1] if q.dim() == 3 else (q.shape[0], q.shape[2])
        joined.meta["val"] = q.new_empty((*tokens, q.shape[1] + 2 * k.shape[1], q.shape[-1]))
    table.meta["val"] = before[_TABLE]
    made.meta["val"] = (joined.meta["val"], table.meta["val"])
    cat.replace_all_uses_with(view)
    for user in list(node.users):
        if user.args[1] == _TABLE:
            user.replace_all_uses_with(table)
    graph.erase_node(cat)
    graph.eliminate_dead_code()
