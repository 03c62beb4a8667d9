"""The error function of half-precision GELUs, in compiled graphs on a GPU: by a formula of which its gradient needs a part.

``erf`` of the device's library is two polynomials, the coefficients of which are chosen for each number: a GELU takes 32
instructions a number, and on Hopper is bound by them, not by memory (BERT-base 64×512 on one NVIDIA H200, bfloat16, each of 12
layers: 147 µs for 402 MB forward, 214 µs for 604 MB backward, where 4.2 TB/s would be 96 and 144). Half precision keeps none
of its last digits.

Source: M. Abramowitz, I. Stegun, *Handbook of Mathematical Functions*, 7.1.26: off by 1.5e-7 at most, in float32 by 6e-7, where
float16 rounds by 2.4e-4 at 1. Its ``exp(-u²)`` is also the density that a GELU's gradient has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_HALF = (torch.float16, torch.bfloat16)
_DEVICE = "cuda"
_STEEPNESS = 0.3275911
_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def shorten_error_functions(graph: fx.Graph) -> None:
    """A pass over a graph just before Inductor generates its code, in place."""
    for node in graph.find_nodes(op="call_function", target=_ATEN.erf.default):
        source = _source(node)
        if source is not None:
            _shorten(graph, node, source)


def _source(node: fx.Node) -> fx.Node | None:
    """The float32 form of a half-precision number of which a GELU takes the error function; None if it is another one."""
    value, scaled = node.meta.get("val"), node.args[0]
    if not isinstance(value, Tensor) or value.device.type != _DEVICE or value.dtype != torch.float32:
        return None
    if not isinstance(scaled, fx.Node) or scaled.target is not _ATEN.mul.Tensor:
        return None
    source, factor = scaled.args[:2]
    if not isinstance(source, fx.Node) or source.target is not _CAST or not isinstance(factor, float):
        return None
    before: Any = source.args[0]
    cast_from = before.meta.get("val")
    same = isinstance(cast_from, Tensor) and cast_from.dtype in _HALF and math.isclose(factor, math.sqrt(0.5), rel_tol=1e-6)
    return source if same else None


def _shorten(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        fakes = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in args]
        with node.meta["val"].fake_mode:
            made.meta["val"] = target(*fakes)
        return made

    mul, add = _ATEN.mul.Tensor, _ATEN.add.Tensor
    u: Any = node.args[0]
    with graph.inserting_before(node):
        power = call(_ATEN.exp2.default, call(mul, call(mul, u, u), -math.log2(math.e)))
        near = call(add, call(mul, call(_ATEN.abs.default, u), _STEEPNESS), 1.0)
        # 1 / near, by one instruction and without the care that a division takes of the smallest numbers.
        t = call(_ATEN.rsqrt.default, call(mul, near, near))
        polynomial = call(mul, t, _COEFFICIENTS[0])
        for coefficient in _COEFFICIENTS[1:]:
            polynomial = call(mul, t, call(add, polynomial, coefficient))
        size = call(add, call(mul, call(mul, polynomial, power), -1.0), 1.0)
        result = call(_ATEN.where.self, call(_ATEN.lt.Scalar, u, 0.0), call(_ATEN.neg.default, size), size)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    density = _density(source)
    if density is not None and _comes_before(power, density):
        density.replace_all_uses_with(power)
        graph.erase_node(density)


def _density(source: fx.Node) -> fx.Node | None:
    """``exp(-x² / 2)`` of a GELU's gradient."""
    for square in source.users:
        if square.target is not _ATEN.mul.Tensor or square.args != (source, source):
            continue
        for halved in square.users:
            if halved.target is not _ATEN.mul.Tensor or halved.args != (square, -0.5):
                continue
            for power in halved.users:
                if power.target is _ATEN.exp.default:
                    return power
    return None


def _comes_before(first: fx.Node, second: fx.Node) -> bool:
    for node in first.graph.nodes:
        if node is first or node is second:
            return node is first
    return False
