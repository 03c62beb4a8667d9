"""Linear layers of one input in Dynamo's graph: where one alone is too small for the device, they run as one matmul.

A site is two or more calls of ``F.linear`` in a row that read the same tensor with parameters of their own: attention's q, k
and v, or the k and v of a cross attention. They become one :mod:`oslo_fusion.ops.merged_linear`, whose outputs are views of one
tensor; the parameters stay what they are, and each has a gradient of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from oslo_fusion.ops.merged_linear import merged_linear

WIDEST = 1024
"""The most columns that a layer has, in and out. A matmul of 32768×768×768 (BERT-base) runs at 460 TFLOP/s on one NVIDIA H200,
one three times as wide or as deep at about 700. Layers of 2048 columns and up fill the device alone: Llama's q, k, v and gate,
up gained nothing by being merged, and the wider they are the dearer is it to copy their gradients side by side."""
NARROWEST = 64
"""The fewest columns: below is an adapter, of which nothing is gained."""
FEWEST_TOKENS = 2048
"""Below, the copy of the weights, twice a step, weighs as much as what the matmuls win."""
DEVICE = "cuda"
"""Where small matmuls leave a device idle. A CPU's do not."""
GRADIENT = "side_by_side"
"""How the input's gradient is added up. Predicted for BERT-base's q, k and v, with the addition of the residual's gradient,
which is the same kernel: three matmuls 252 µs and 58; side by side a copy of 70, a matmul of 165 and 36; accumulated 276 and
36."""

_LINEAR = (F.linear, torch._C._nn.linear)
_HALF = (torch.float16, torch.bfloat16)
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
_VIEWS = frozenset(
    {"view", "reshape", "transpose", "permute", "chunk", "split", "unsqueeze", "squeeze", "flatten", "unflatten"}
)
_VIEWS |= {"narrow", "getitem", "__getitem__", "view_as", "swapaxes", "movedim", "t", "mT", "unbind", "detach", "expand"}


@dataclass(frozen=True)
class Merged:
    """What was found in one graph.

    Attributes:
        groups: how many groups of linear layers run as one matmul.
        apart: why others stay apart, each reason once.
    """

    groups: int = 0
    apart: tuple[str, ...] = ()


class _LeaveError(Exception):
    """Why a group stays apart."""


def merge_linears(graph: fx.GraphModule) -> Merged:
    """Replace every group in the graph for which it pays, in place."""
    groups, apart = 0, []
    for found in list(_runs(graph.graph)):
        try:
            groups += _merge(graph.graph, found)
        except _LeaveError as reason:
            apart.append(str(reason))
    if groups:
        graph.recompile()
    return Merged(groups, tuple(dict.fromkeys(apart)))


def pays(tokens: int, dim: int, out: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a linear layer is one that gains by sharing a matmul.

    Args:
        tokens: rows of the input, of which a dynamic number counts as it was when the graph was made.
        dim: columns of the input.
        out: columns of the output.
        dtype: that the matmul runs in.
        device: its type.
    """
    aligned = dim % 8 == 0 and out % 8 == 0  # 16 bytes, which attention's kernels and the matmul's loads want of every stride
    fits = dim <= WIDEST and NARROWEST <= out <= WIDEST
    return device == DEVICE and dtype in _HALF and tokens >= FEWEST_TOKENS and fits and aligned


def _runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Linear layers of one input with no other and no change of mode between them.

    With others between, as the k and v of each layer's cross attention have in a whole decoder, all would be computed with the
    first, and their gradients be kept until the last was there.
    """
    run: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _LINEAR:
            if run and _argument(run[0], 0, "input") is not _argument(node, 0, "input"):
                yield run
                run = []
            run.append(node)
        elif getattr(node.target, "__name__", "") in _MODES:
            yield run
            run = []
    yield run


def _merge(graph: fx.Graph, found: list[fx.Node]) -> bool:
    if len(found) < 2 or not all(isinstance(_value(n), Tensor) for n in (_argument(found[0], 0, "input"), *found)):
        return False
    x = _argument(found[0], 0, "input")
    tokens, dim = _tokens(_value(x)), _value(x).shape[-1]
    small = [n for n in found if pays(tokens, dim, _value(n).shape[-1], _value(n).dtype, _value(n).device.type)]
    if len(small) < 2:
        if _value(x).device.type == DEVICE and _value(found[0]).dtype in _HALF and tokens >= FEWEST_TOKENS:
            columns = ", ".join(str(_value(n).shape[-1]) for n in found)
            raise _LeaveError(
                f"{dim} columns in and {columns} out: only those of {NARROWEST} to {WIDEST} gain by sharing a matmul"
            )
        return False
    weights, biases = [_argument(n, 1, "weight") for n in small], [_argument(n, 2, "bias") for n in small]
    _check_parameters(x, weights, biases, _before(graph, small[0]))
    if any(_is_written(n) for n in (x, *small)):
        raise _LeaveError("their input or an output of theirs is written to")
    with graph.inserting_before(small[0]):
        merged = graph.call_function(merged_linear, (x, weights, biases, GRADIENT))
        merged.meta["example_value"] = tuple(map(_value, small))
        for index, node in enumerate(small):
            new = graph.call_function(operator.getitem, (merged, index))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
    for node in small:
        graph.erase_node(node)
    return True


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _value(node: object) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _tokens(x: Tensor) -> int:
    """Rows of the input; of what is dynamic the number at hand, without making it one that the graph depends on."""
    tokens = 1
    for size in x.shape[:-1]:
        known: Any = getattr(size, "node", None)  # a dynamic number's, which is no int at all
        hint = size if known is None else known.hint
        tokens *= 0 if hint is None else int(hint)  # None depends on values: nobody knows
    return tokens


def _before(graph: fx.Graph, last: fx.Node) -> set[fx.Node]:
    """The parameters that are at hand where a node stands."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node is last:
            break
        if node.op in ("placeholder", "get_attr"):
            found.add(node)
    return found


def _check_parameters(x: fx.Node, weights: list[Any], biases: list[Any], at_hand: set[fx.Node]) -> None:
    given = [*weights, *(bias for bias in biases if bias is not None)]
    if any(not isinstance(node, fx.Node) or node not in at_hand for node in given):
        raise _LeaveError("a weight or bias is computed (an adapter, a parametrization)")
    if len(set(weights)) < len(weights):
        raise _LeaveError("two of them share a weight")
    values = [_value(node) for node in given]
    if any(not isinstance(value, Tensor) for value in values):
        raise _LeaveError("their shapes are not known")
    if any(is_traceable_wrapper_subclass(value) for value in (_value(x), *values)):
        raise _LeaveError(
            "their tensors are of a class of their own (DTensor, quantized): their gradients are that class' matter"
        )
    if len({value.dtype for value in values}) > 1 or any(value.dim() > 2 for value in values):
        raise _LeaveError(f"their dtypes are {', '.join(dict.fromkeys(str(value.dtype) for value in values))}")
    if len({value.requires_grad for value in values}) > 1:
        raise _LeaveError("some of their parameters are frozen and some are trained")


def _is_written(node: fx.Node) -> bool:
    """Whether something writes to a tensor, or to a view of it: views of one tensor are no place for that."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        for user in current.users:
            name = getattr(user.target, "__name__", str(user.target))
            writes = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "__setitem__", "iadd", "imul")
            if (writes and user.args and user.args[0] is current) or user.kwargs.get("out") is current:
                return True
            if name in _VIEWS and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
