"""Feed-forward networks in Dynamo's graph: GELU's gradient and the sum for the first bias become one kernel of ours.

A site is a linear layer with a bias, a GELU of its output, and a linear layer of that, with nobody else looking at what lies
between; in half precision, on a GPU, with enough rows. The GELU is recognised by its values, however it is written. The forward
stays plain PyTorch, which the compiler fuses as before; what it keeps for the backward stays the same too
(:mod:`oslo_fusion.ops.feed_forward`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from oslo_fusion.aot.gated_mlps import _LINEAR, _activation, _argument, _is, _is_method, _LeaveError, _value
from oslo_fusion.ops.feed_forward import GELUS, feed_forward

IN_COMPILED_LAYERS = True
"""Whether it is done at all. Inductor's two kernels take 190 and 59 µs a layer (BERT-base 64×512, bfloat16, one NVIDIA H200),
this one and its sums 231. The first moves 805 MB at 4.2 TB/s, the second reads 201 of them once more for the bias's gradient
alone."""

FEWEST_ROWS = 2048
"""Below, both kernels take as long as their launches, and the operator's own code would be on the host's way."""

_HALF = (torch.float16, torch.bfloat16)
_DEVICE = "cuda"
_WRITES = ("add_", "mul_", "sub_", "div_", "copy_", "zero_", "fill_")


def fuse_feed_forwards(graph: fx.GraphModule) -> int:
    """Replace every site in the graph, in place, and count them."""
    fused = 0
    if IN_COMPILED_LAYERS and torch.is_grad_enabled():
        for node in list(graph.graph.nodes):
            if _is(node, _LINEAR):
                fused += _fuse(graph.graph, node)
    if fused:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return fused


def _fuse(graph: fx.Graph, out: fx.Node) -> bool:
    act, between = _without_dropout(out.args[0])
    try:
        activation = _activation(act)
    except _LeaveError:
        return False
    if activation is None or activation[1] not in GELUS or not _is(activation[0], _LINEAR):
        return False
    linear, formula, inside = activation
    if any(
        user not in inside and user not in between and user is not out for n in (linear, *inside, *between) for user in n.users
    ):
        return False
    weight, bias = _argument(linear, 1, "weight"), _argument(linear, 2, "bias")
    arguments = (linear.args[0], weight, bias, _argument(out, 1, "weight"), _argument(out, 2, "bias"))
    if not _gains(linear, *arguments):
        return False
    with graph.inserting_before(out):
        new = graph.call_function(feed_forward, (*arguments, formula))
    new.meta.update(out.meta)
    out.replace_all_uses_with(new)
    graph.erase_node(out)
    return True


def _without_dropout(node: Any) -> tuple[Any, list[fx.Node]]:
    """What a dropout that does nothing is of, and the dropouts."""
    between: list[fx.Node] = []
    while _is(node, (F.dropout, torch.dropout)):
        if _argument(node, 1, "p") != 0 and _argument(node, 2, "training") is not False:
            break
        between.append(node)
        node = node.args[0]
    return node, between


def _gains(linear: fx.Node, x: Any, weight: Any, bias: Any, out_weight: Any, out_bias: Any) -> bool:
    """Whether the kernel can be used and all that it makes is wanted."""
    if bias is None or any(_is_method(user, *_WRITES) for user in x.users):
        return False
    h, given = _value(linear), [_value(n) for n in (x, weight, bias, out_weight, out_bias) if n is not None]
    if not isinstance(h, Tensor) or any(not isinstance(v, Tensor) or is_traceable_wrapper_subclass(v) for v in given):
        return False
    if h.device.type != _DEVICE or h.dtype not in _HALF or any(v.device != h.device for v in given):
        return False
    autocast = torch.amp.is_autocast_available(_DEVICE) and torch.is_autocast_enabled(_DEVICE)
    if any(v.dtype != h.dtype and not (autocast and v.dtype in (*_HALF, torch.float32)) for v in given):
        return False
    return all(_value(n).requires_grad for n in (weight, bias, out_weight)) and _rows(h) >= FEWEST_ROWS


def _rows(h: Tensor) -> int:
    """How many there are, or were when this was compiled: asked for its value, a dynamic size would no longer be dynamic."""
    rows: Any = h.numel() // h.shape[-1]
    if isinstance(rows, torch.SymInt):
        rows = rows.node.hint if rows.node.has_hint() else FEWEST_ROWS
    return int(rows)
