"""cuDNN's attention in Dynamo's graph: where the dial is low and key-value heads are shared, our kernel computes its backward.

It is as fast there and needs no workspace (:mod:`oslo_fusion.ops.cudnn_attention`): of the 10.08 GiB that Llama 1.24B 8×2048
took at a budget of 0, 258 MiB. Without shared heads cuDNN's workspace is half of that, and its backward up to 30 % faster than
ours (GPT-2 16×1024: 0.33 and 0.43 ms), so it stays.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from oslo_fusion.aot.nodes import example
from oslo_fusion.ops.attention_backends import CUDNN, HALF, run_masked
from oslo_fusion.ops.cudnn_attention import cudnn_attention

_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_WIDEST = 64  # head sizes for which ours was measured to be as fast


def spare_cudnn_workspaces(graph: fx.GraphModule) -> int:
    """Replace every site in the graph, in place, and count them."""
    spared = 0
    if torch.is_grad_enabled():
        for node in list(graph.graph.nodes):
            given = _arguments(node)
            if given is not None and _gains(given):
                _replace(graph.graph, node, given)
                spared += 1
    if spared:
        graph.recompile()
    return spared


def _arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """q, k, v, scale and the causal flag of an attention by cuDNN that has a backward and nothing else; None for any other."""
    if node.op != "call_function" or node.target not in (_CUDNN, run_masked):
        return None
    if node.target is run_masked:
        q, k, v, mask, causal, _, plain, scale, dropout = node.args
        return (q, k, v, scale, causal) if (mask, plain, dropout) == (None, CUDNN, 0.0) else None
    names = [argument.name for argument in _CUDNN._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    plain = given["attn_bias"] is None and given["compute_log_sumexp"] is True and given.get("dropout_p", 0.0) == 0
    if not plain or any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return None
    return *(given[name] for name in ("query", "key", "value")), given.get("scale"), given.get("is_causal", False)


def _gains(given: tuple[Any, ...]) -> bool:
    *nodes, scale, causal = given
    values: list[Any] = [example(node) for node in nodes]
    if not all(isinstance(x, Tensor) for x in values) or any(map(is_traceable_wrapper_subclass, values)):
        return False
    q, k, v = values
    return (
        isinstance(scale, float)
        and q.dtype in HALF
        and any(x.requires_grad for x in values)
        and q.shape[1] > k.shape[1]
        and isinstance(q.shape[-1], int)
        and q.shape[-1] == v.shape[-1] <= _WIDEST
        # With other lengths the flag means another mask to cuDNN than to us.
        and (causal is False or statically_known_true(q.shape[2] == k.shape[2]))
    )


def _replace(graph: fx.Graph, node: fx.Node, given: tuple[Any, ...]) -> None:
    outs = [node] if node.target is run_masked else list(node.users)
    with graph.inserting_before(node):
        new = graph.call_function(cudnn_attention, given)
    new.meta.update(outs[0].meta if outs else {})
    for out in outs:
        out.replace_all_uses_with(new)
        graph.erase_node(out)
    if node not in outs:
        graph.erase_node(node)
