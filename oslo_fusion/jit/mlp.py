"""MLPs: an activation in the matmul's epilogue, and the product of an activated gate with its up projection.

Both are found by running a copy of the module and looking at what its children passed to each other; no model is known by
name. Children are called as modules, so that their hooks, adapters and wrappers go on working.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.decide import (
    HALF,
    PROVEN_SHAPE,
    Scope,
    decide,
    dtypes_to_decide,
    fuses,
    mode_settings,
    placement,
    propose,
    random,
    refuse,
    signature,
)
from oslo_fusion.jit.activation import recognise
from oslo_fusion.jit.formulas import FORMULAS, GATED, gated_product
from oslo_fusion.jit.script import ROOM
from oslo_fusion.jit.trace import Activation, Call, Trace, has_hooks, linear_shape, same, trace
from oslo_fusion.plan import Proposal, Site

EPILOGUE = "linear + activation"
GATED_KIND = "gate · up"
_EPILOGUES = {"gelu_tanh": True, "relu": False}  # formula → use_gelu of aten::_addmm_activation
_MAX_CHILDREN = 8
_MAX_MODULES = 24
_TIMED_ROWS = 4096


class FusedLinearActivation(nn.Module):
    """Donor for ``… act(linear(x)) …``: cuBLASLt applies bias and activation to the float32 accumulators.

    Inference in half precision only: the epilogue has no gradient. In training, and wherever something listens to the
    linear module, the linear module is called and its activation follows as one kernel.
    """

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._oslo_fusion_settings
        linear, activation = (getattr(self, settings[name]) for name in ("linear", "activation"))
        if len(args) != 1 or kwargs or args[0].device.type != settings["device"] or has_hooks(activation):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        gradient = torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad)
        plain = linear_shape(linear) is not None and linear.bias is not None and not has_hooks(linear)
        usual = gradient or not plain or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
        if usual or not fuses(settings, x) or x.numel() == 0:
            h = FORMULAS[settings["formula"]](linear(x))
        else:
            h = linear_activation(x, linear, settings["formula"])
        return run_chain(self, h, settings["rest"], settings["casts"])


def linear_activation(x: Tensor, linear: nn.Module, formula: str) -> Tensor:
    """``act(x W + b)`` in one matmul.

    Args:
        x: ``[*batch, in]``.
        linear: a plain ``nn.Linear`` or ``Conv1D`` with bias, in x's dtype.
        formula: ``gelu_tanh`` or ``relu``.

    Returns:
        ``[*batch, out]`` in x's dtype.
    """
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    matrix = weight.t() if isinstance(linear, nn.Linear) else weight
    return _addmm_activation(x.reshape(-1, x.shape[-1]), matrix, bias, formula).view(*x.shape[:-1], -1)


def _addmm_activation(x: Tensor, weight: Tensor, bias: Tensor, formula: str) -> Tensor:
    h: Tensor = torch._addmm_activation(bias, x, weight, use_gelu=_EPILOGUES[formula])
    return h


class FusedGatedMLP(nn.Module):
    """Donor for ``… act(gate(x)) * up(x) …``: the product is one kernel forward and one backward."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._oslo_fusion_settings
        if len(args) != 1 or kwargs or args[0].device.type != settings["device"]:
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        gate, up = getattr(self, settings["gate"])(x), getattr(self, settings["up"])(x)
        activation = getattr(self, settings["activation"])
        formula, alike = settings["formula"], gate.shape == up.shape and gate.dtype == up.dtype
        if has_hooks(activation):
            h = activation(gate) * up
        elif alike and fuses(settings, gate) and not torch.compiler.is_compiling():
            h = gated_product(gate, up, formula)
        else:
            h = FORMULAS[formula](gate) * up
        return run_chain(self, h, settings["rest"], settings["casts"])


def run_chain(module: nn.Module, h: Tensor, names: Sequence[str], casts: Sequence[str] = ()) -> Tensor:
    """Call the named children one after the other; those in ``casts`` get their weight's dtype first."""
    for name in names:
        child = getattr(module, name)
        if name in casts and isinstance(getattr(child, "weight", None), Tensor):
            h = h.to(child.weight.dtype)
        h = child(h)
    return h


@dataclass(frozen=True)
class _Chain:
    """What follows the fused part, up to the module's output."""

    rest: tuple[str, ...]
    casts: tuple[str, ...]


@dataclass(frozen=True)
class _Pattern:
    kind: str
    roles: dict[str, str]
    activation: Activation
    chain: _Chain


def input_widths(module: nn.Module) -> list[int]:
    """Widths that the module may expect of its input: those of its linear layers and norms, in order."""
    widths: dict[int, None] = {}
    for part in module.modules():
        shape = linear_shape(part)
        if shape is not None:
            widths[shape[0]] = None
        elif part.__dict__.get("_parameters") and not next(part.children(), None):
            for parameter in part.parameters(recurse=False):
                if parameter.dim() == 1:
                    widths[parameter.numel()] = None
    return list(widths)


def _chain(found: Trace, start: int) -> _Chain | None:
    if not found.rest_is_chain(start):
        return None
    calls = found.calls[start:]
    names = [call.child for call in calls]
    if len(set(names)) != len(names):
        return None
    casts = [
        call.child
        for previous, call in zip(found.calls[start - 1 :], calls, strict=False)
        if previous.returned.dtype != call.received.dtype
    ]
    return _Chain(tuple(names), tuple(casts))


def _recognise_pattern(module: nn.Module, device: torch.device, dtype: torch.dtype, scope: Scope) -> _Pattern | None:
    activations = {
        name: activation
        for name, child in module.named_children()
        if (activation := recognise(child, device, scope)) is not None and activation.formula is not None
    }
    if not activations:
        return None
    for width in input_widths(module):
        with probe.preserved_random_state():
            x = random(2, 3, width, device=device, dtype=dtype)
        found = trace(module, (x,))
        if found is not None:
            return _gated(module, found, activations) or _linear_activation(module, found, activations)
    return None


def _linear_activation(module: nn.Module, found: Trace, activations: dict[str, Activation]) -> _Pattern | None:
    if len(found.calls) < 2:
        return None
    linear, act = found.calls[:2]
    if act.child not in activations or linear_shape(getattr(module, linear.child)) is None:
        return None
    if not same(found.inputs[0], linear.received) or not same(linear.returned, act.received):
        return None
    chain = _chain(found, 2)
    if chain is None:
        return None
    return _Pattern(EPILOGUE, {"linear": linear.child, "activation": act.child}, activations[act.child], chain)


def _gated(module: nn.Module, found: Trace, activations: dict[str, Activation]) -> _Pattern | None:
    calls = found.calls
    acts = [call for call in calls if call.child in activations]
    if len(acts) != 1 or len(calls) < 4:
        return None
    act = acts[0]
    fed = [c for c in calls if linear_shape(getattr(module, c.child)) is not None and same(found.inputs[0], c.received)]
    gates = [c for c in fed if same(c.returned, act.received)]
    ups: list[Call] = [c for c in fed if c not in gates and c.returned.shape == act.returned.shape]
    if len(gates) != 1 or len(ups) != 1:
        return None
    start = max(calls.index(call) for call in (act, gates[0], ups[0])) + 1
    if start != 3 or start >= len(calls) or not same(act.returned * ups[0].returned, calls[start].received):
        return None
    product = act.returned * ups[0].returned
    joined = Trace(found.inputs, (*calls[:2], Call("product", product, product), *calls[start:]), found.output)
    chain = _chain(joined, 3)
    if chain is None:
        return None
    roles = {"gate": gates[0].child, "up": ups[0].child, "activation": act.child}
    return _Pattern(GATED_KIND, roles, activations[act.child], chain)


def propose_mlp(path: str, module: nn.Module, scope: Scope) -> Proposal | None:
    """Propose one of the two MLP fusions for a module, or refuse it; None if the module has neither form."""
    children = dict(module.named_children())
    if not 2 <= len(children) <= _MAX_CHILDREN or sum(1 for _ in module.modules()) > _MAX_MODULES:
        return None
    where = placement(module)
    if where is None or where[0].type == "meta":
        return None
    device, dtype = where
    key = ("mlp", signature(module), device, dtype)
    pattern: _Pattern | None = scope.once(key, lambda: _recognise_pattern(module, device, dtype, scope))
    if pattern is None:
        return None
    if pattern.kind == GATED_KIND:
        return _propose_gated(path, module, pattern, device, dtype, scope)
    return _propose_epilogue(path, module, pattern, device, dtype, scope)


def _settings(pattern: _Pattern, formula: str) -> dict[str, Any]:
    return {**pattern.roles, "formula": formula, "rest": pattern.chain.rest, "casts": pattern.chain.casts}


def _propose_gated(
    path: str, module: nn.Module, pattern: _Pattern, device: torch.device, dtype: torch.dtype, scope: Scope
) -> Proposal:
    site = Site(path, GATED_KIND, type(module).__name__)
    activation = pattern.activation
    formula = activation.formula
    assert formula is not None
    before = f"{formula.name}(gate), times up"
    if formula.name not in GATED:
        return refuse(ROOM, site, before, f"no fused product for {formula.name}; there is one for {', '.join(GATED)}")
    if has_hooks(module):
        return refuse(ROOM, site, before, "its forward was replaced on the instance or is hooked")
    if not (fuser := scope.fuser(device)).available:
        return refuse(ROOM, site, before, fuser.reason)
    verdict = scope.once(
        (GATED_KIND, formula.name, device, dtype),
        lambda: decide(
            (GATED_KIND, formula.name),
            lambda gate, up: formula(gate) * up,
            lambda gate, up: gated_product(gate, up, formula.name),
            lambda d: tuple(2 * random(*PROVEN_SHAPE, device=device, dtype=d) for _ in range(2)),
            lambda d: tuple(random(probe.elements_to_time(device) // 4096, 4096, device=device, dtype=d) for _ in range(2)),
            dtypes_to_decide(device, dtype),
            scope.config.autotune,
        ),
    )
    settings = {**mode_settings(device, verdict), **_settings(pattern, formula.name)}
    claims = [f"{path}.{pattern.roles['activation']}"]
    after = "one TorchScript kernel for the product"
    return propose(ROOM, site, verdict, before, after, FusedGatedMLP, settings, claims)


def _propose_epilogue(
    path: str, module: nn.Module, pattern: _Pattern, device: torch.device, dtype: torch.dtype, scope: Scope
) -> Proposal | None:
    site = Site(path, EPILOGUE, type(module).__name__)
    formula, linear = pattern.activation.formula, getattr(module, pattern.roles["linear"])
    assert formula is not None
    before = f"{type(linear).__name__}, then {formula.name}"
    if formula.name not in _EPILOGUES:
        return refuse(ROOM, site, before, f"the matmul has no epilogue for {formula.name}; it has for {', '.join(_EPILOGUES)}")
    if linear.bias is None:
        return refuse(ROOM, site, before, "the matmul's epilogue needs a bias, and this layer has none")
    if device.type != "cuda":
        return refuse(ROOM, site, before, "an activation in the matmul's epilogue needs a CUDA device")
    if dtype not in HALF:
        return refuse(ROOM, site, before, "the matmul's epilogue pays in half precision only")
    if has_hooks(module) or has_hooks(linear):
        return refuse(ROOM, site, before, "its forward was replaced on the instance or is hooked")
    shape = linear_shape(linear)
    assert shape is not None

    def operands(rows: int, d: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        width, out = shape
        weight = random(width, out, device=device, dtype=d) / width**0.5
        return random(rows, width, device=device, dtype=d), weight, random(out, device=device, dtype=d)

    verdict = scope.once(
        (EPILOGUE, formula.name, shape, device, dtype),
        lambda: decide(
            (EPILOGUE, formula.name, shape),
            lambda x, weight, bias: formula(torch.addmm(bias, x, weight)),
            lambda x, weight, bias: _addmm_activation(x, weight, bias, formula.name),
            lambda d: operands(5, d),
            lambda d: operands(_TIMED_ROWS, d),
            (dtype,),
            scope.config.autotune,
            training=False,
        ),
    )
    settings = {**mode_settings(device, verdict), **_settings(pattern, formula.name)}
    claims = [f"{path}.{pattern.roles['activation']}"]
    after = "activation in the matmul's epilogue; one ATen kernel in training"
    return propose(ROOM, site, verdict, before, after, FusedLinearActivation, settings, claims)
