"""Feed-forward networks in Dynamo's graph: GELU's gradient and the sum for the first bias become one kernel of ours.

A site is a linear layer with a bias, a GELU of its output, and a linear layer of that, with nobody else looking at what lies
between; in half precision, on a GPU, with enough rows. A layer is ``F.linear``, or GPT-2's ``Conv1D``: an ``addmm`` of rows,
between views, with a weight ``[in, out]``. The GELU is recognised by its values, however it is written. The forward stays plain
PyTorch, which the compiler fuses as before; what it keeps for the backward stays the same too
(:mod:`oslo_fusion.ops.feed_forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from oslo_fusion.aot.nodes import (
    ADDMM,
    LINEAR,
    VIEWS,
    activation,
    argument,
    erase_unused,
    example,
    is_function,
    is_method,
    writes,
)
from oslo_fusion.ops.feed_forward import GELUS, feed_forward

IN_COMPILED_LAYERS = True
"""Whether it is done at all. Inductor's two kernels take 190 and 59 µs a layer (BERT-base 64×512, bfloat16, one NVIDIA H200),
this one and its sums 231. The first moves 805 MB at 4.2 TB/s, the second reads 201 of them once more for the bias's gradient
alone."""

FEWEST_ROWS = 2048
"""Below, both kernels take as long as their launches, and the operator's own code would be on the host's way."""

_HALF = (torch.float16, torch.bfloat16)
_DEVICE = "cuda"


@dataclass(frozen=True)
class _Layer:
    """A linear layer of the graph.

    Attributes:
        node: what computes it.
        x, weight, bias: its arguments, a bias of None included.
        transposed: the weight is ``[in, out]``.
    """

    node: fx.Node
    x: Any
    weight: Any
    bias: Any
    transposed: bool = False

    def insert_weight(self, graph: fx.Graph) -> Any:
        """The weight as ``[out, in]``, before the graph's point of insertion."""
        return graph.call_method("t", (self.weight,)) if self.transposed else self.weight


def fuse_feed_forwards(graph: fx.GraphModule) -> int:
    """Replace every site in the graph, in place, and count them."""
    replaced: list[fx.Node] = []
    if IN_COMPILED_LAYERS and torch.is_grad_enabled():
        for node in list(graph.graph.nodes):
            out = _layer(node)
            if out is not None and _fuse(graph.graph, out):
                replaced.append(out.node)
    if replaced:
        erase_unused(replaced)
        graph.recompile()
    return len(replaced)


def _layer(node: Any) -> _Layer | None:
    """The linear layer that a node is; None for any other."""
    if is_function(node, LINEAR):
        return _Layer(node, node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias"))
    if is_function(node, ADDMM) and len(node.args) == 3 and not node.kwargs:  # neither alpha nor beta
        bias, x, weight = node.args
        value = example(bias)
        if isinstance(value, Tensor) and value.dim() == 1:
            return _Layer(node, x, weight, bias, transposed=True)
    return None


def _fuse(graph: fx.Graph, out: _Layer) -> bool:
    act, between, viewed = _without_dropout(out.x)
    found = activation(act)
    if found is None or found[1] not in GELUS:
        return False
    source, formula, inside = found
    source, views, also_viewed = _without_views(source)
    first = _layer(source)
    if first is None:
        return False
    if (viewed or also_viewed) and not (_is_rows(source) and _is_rows(out.x)):
        return False  # between rows and rows, views keep their number and order
    between += [*views, source, *inside]
    if any(user not in between and user is not out.node for n in between for user in n.users):
        return False
    if not _gains(first, out):
        return False
    with graph.inserting_before(out.node):
        weights = [layer.insert_weight(graph) for layer in (first, out)]
        new = graph.call_function(feed_forward, (first.x, weights[0], first.bias, weights[1], out.bias, formula))
    new.meta.update(out.node.meta)
    out.node.replace_all_uses_with(new)
    return True


def _without_dropout(node: Any) -> tuple[Any, list[fx.Node], bool]:
    """What a dropout that does nothing is of, or a view; those nodes; and whether there is a view."""
    node, between, viewed = _without_views(node)
    while is_function(node, (F.dropout, torch.dropout)):
        if argument(node, 1, "p") != 0 and argument(node, 2, "training") is not False:
            break
        between.append(node)
        node, views, more = _without_views(node.args[0])
        between += views
        viewed = viewed or more
    return node, between, viewed


def _without_views(node: Any) -> tuple[Any, list[fx.Node], bool]:
    """What views that leave the last dimension alone are of; they; and whether there are any."""
    views: list[fx.Node] = []
    while is_method(node, *VIEWS):
        before, after = example(node.args[0]), example(node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape[-1:] != after.shape[-1:]:
            break
        views.append(node)
        node = node.args[0]
    return node, views, bool(views)


def _is_rows(node: Any) -> bool:
    value = example(node)
    return isinstance(value, Tensor) and value.dim() == 2


def _gains(first: _Layer, out: _Layer) -> bool:
    """Whether the kernel can be used and all that it makes is wanted."""
    x = first.x
    if first.bias is None or any(map(writes, (*x.users, *_without_views(x)[0].users))):
        return False
    tensors = (x, first.weight, first.bias, out.weight, out.bias)
    h, given = example(first.node), [example(n) for n in tensors if n is not None]
    if not isinstance(h, Tensor) or any(not isinstance(v, Tensor) or is_traceable_wrapper_subclass(v) for v in given):
        return False
    if h.device.type != _DEVICE or h.dtype not in _HALF or any(v.device != h.device for v in given):
        return False
    autocast = torch.amp.is_autocast_available(_DEVICE) and torch.is_autocast_enabled(_DEVICE)
    if any(v.dtype != h.dtype and not (autocast and v.dtype in (*_HALF, torch.float32)) for v in given):
        return False
    return all(example(n).requires_grad for n in (first.weight, first.bias, out.weight)) and _rows(h) >= FEWEST_ROWS


def _rows(h: Tensor) -> int:
    """How many there are, or were when this was compiled: asked for its value, a dynamic size would no longer be dynamic."""
    rows: Any = h.numel() // h.shape[-1]
    if isinstance(rows, torch.SymInt):
        rows = rows.node.hint if rows.node.has_hint() else FEWEST_ROWS
    return int(rows)
