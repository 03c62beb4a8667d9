"""Attention masks that a traced model makes of nothing but numbers: taken away, or said by the flag that means the same.

Run eagerly, transformers looks whether a mask says more than ``is_causal`` does and hands down none if not. Traced, it cannot
look, and makes one of queries × keys for every call. With it attention visits every tile instead of half: GPT-2 16×1024 on one
NVIDIA H200, twelve layers forward and backward, 13.0 ms with the mask and 5.6 without. Such a mask depends on no input, so it
can be made and looked at when the graph is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from oslo_fusion.aot.nodes import erase_unused, writes
from oslo_fusion.ops.attention import ATTENTION, UNLIMITED, Extras, Options
from oslo_fusion.ops.attention_backends import run_masked

_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal", "poisson")
_LARGEST = 1 << 28  # elements that are made to be looked at
_MASK, _CAUSAL = "attn_mask", "is_causal"
_POSITIONAL = ("query", "key", "value", _MASK, "dropout_p", _CAUSAL)
_OURS = {name: index for index, name in enumerate(("q", "k", "v", *Extras._fields, *Options._fields))}


def keep_masks_in_sight() -> None:
    """Let Dynamo leave a routed attention and its mask in its graph as one call. Before anything is traced."""
    torch.compiler.allow_in_graph(run_masked)


def simplify_masks(graph: fx.GraphModule) -> int:
    """Take constant masks away from attentions, in place.

    A mask that is true everywhere is dropped. One that is causal, and nothing else, becomes the flag, if there are as many
    queries as keys: then torch's alignment of the flag and transformers' of the mask are one. Masks that depend on an input,
    its size where that is dynamic included, stay.

    Args:
        graph: as Dynamo gives it to a backend.

    Returns:
        How many attentions have no mask any more.
    """
    known: dict[fx.Node, str | None] = {}
    replaced: list[fx.Node] = []
    for node in list(graph.graph.nodes):
        mask = _mask_of(node)
        if mask is None:
            continue
        if mask not in known:
            known[mask] = _meaning(mask)
        meaning = known[mask]
        if meaning is not None and _set(node, causal=meaning == _CAUSAL):
            replaced.append(mask)
    if replaced:
        erase_unused(replaced)
        graph.recompile()
    return len(replaced)


def _mask_of(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function":
        return None
    if node.target is F.scaled_dot_product_attention:
        found = node.kwargs.get(_MASK, node.args[3] if len(node.args) > 3 else None)
    elif node.target is ATTENTION:
        found = node.args[_OURS["mask"]]
    elif node.target is run_masked:
        found = node.args[3]
    else:
        return None
    return found if isinstance(found, fx.Node) else None


def _set(node: fx.Node, causal: bool) -> bool:
    """Say it without the mask; False where the attention is limited in another way already."""
    if node.target is ATTENTION:
        arguments = list(node.args)
        if causal and arguments[_OURS["right"]] != UNLIMITED:
            return False
        arguments[_OURS["mask"]] = None
        if causal:
            arguments[_OURS["right"]] = 0
        node.args = tuple(arguments)
        return True
    if node.target is run_masked:
        node.args = (*node.args[:3], None, causal, *node.args[5:])
        return True
    given: dict[str, Any] = {**dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs}
    if given.get(_CAUSAL):
        return False
    given[_MASK] = None
    given[_CAUSAL] = causal
    node.args = tuple(given.pop(name) for name in ("query", "key", "value"))
    node.kwargs = given
    return True


def _meaning(mask: fx.Node) -> str | None:
    """``all`` for a mask that is true everywhere, ``is_causal``, or None for any other, and for one that is not constant."""
    example = mask.meta.get("example_value")
    if not isinstance(example, Tensor) or example.dtype != torch.bool or example.dim() != 4:
        return None
    if not all(isinstance(size, int) for size in example.shape) or example.numel() > _LARGEST:
        return None
    nodes = _made_of(mask)
    if nodes is None:
        return None
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    values: dict[fx.Node, Any] = {}
    try:
        with unset_fake_temporarily(), torch.no_grad():
            for node in nodes:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an operator that cannot be run by itself: the mask stays
        return None
    value = values[mask]
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != example.shape:
        return None
    if bool(value.all()):
        return "all"
    queries, keys = value.shape[-2:]
    return _CAUSAL if queries == keys and bool((value == torch.ones_like(value[0, 0]).tril()).all()) else None


def _made_of(mask: fx.Node) -> list[fx.Node] | None:
    """The nodes that a value is computed by, in their order; None if an input is among them, or what is no plain operator."""
    needed: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        if node.op not in ("call_function", "call_method") or _has_effect(node) or any(map(writes, node.users)):
            return None
        needed.add(node)
        waiting += node.all_input_nodes
    return [node for node in mask.graph.nodes if node in needed]


def _has_effect(node: fx.Node) -> bool:
    """vmap's levels, contexts, random numbers; and what writes."""
    module, name = getattr(node.target, "__module__", None) or "", getattr(node.target, "__name__", str(node.target))
    return "functorch" in module or name.startswith((*_RANDOM, "_enter", "_exit")) or writes(node)
