"""The wiring of MLPs: a linear layer before its activation, and an activated gate times an up projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.decide import Scope, placement, random, signature
from oslo_fusion.recognition.activation import Activation, recognise
from oslo_fusion.recognition.trace import Call, Trace, input_widths, linear_shape, same, trace

LINEAR_ACTIVATION = "linear + activation"
GATED = "gate · up"
MERGED = "merged gate · up"
_MAX_CHILDREN = 8
_MAX_MODULES = 24


@dataclass(frozen=True)
class Chain:
    """What follows the fused part, up to the module's output.

    Attributes:
        rest: names of the children, in order.
        casts: those of them that receive their input in another dtype than the one before returned.
    """

    rest: tuple[str, ...]
    casts: tuple[str, ...]


@dataclass(frozen=True)
class MLP:
    """What was recognised in a module.

    Attributes:
        kind: ``LINEAR_ACTIVATION``: ``act(linear(x))``; ``GATED``: ``act(gate(x)) · up(x)``; ``MERGED``: the same with gate and
            up as the halves of one projection.
        roles: names of the children that do it: ``linear``, ``gate``, ``up``, ``merged``, ``activation``.
        activation: what the activation computes; its formula is known.
        chain: what follows.
        gate_first: in ``MERGED``, whether the gate is the first half.
    """

    kind: str
    roles: dict[str, str]
    activation: Activation
    chain: Chain
    gate_first: bool = True

    @property
    def formula(self) -> str:
        """The name of the activation's formula."""
        assert self.activation.formula is not None
        return self.activation.formula


def recognise_mlp(module: nn.Module, scope: Scope) -> MLP | None:
    """Which of the three forms a module has, once for modules that are alike; None if it has none or cannot be run."""
    children = sum(1 for _ in module.children())
    if not 2 <= children <= _MAX_CHILDREN or sum(1 for _ in module.modules()) > _MAX_MODULES:
        return None
    where = placement(module)
    if where is None or where[0].type == "meta":
        return None
    found: MLP | None = scope.once(("mlp", signature(module), *where), lambda: _recognise(module, *where, scope))
    return found


def _recognise(module: nn.Module, device: torch.device, dtype: torch.dtype, scope: Scope) -> MLP | None:
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
            for form in (_gated, _merged, _linear_activation):
                mlp = form(module, found, activations)
                if mlp is not None:
                    return mlp
            return None
    return None


def _chain(found: Trace, start: int) -> Chain | None:
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
    return Chain(tuple(names), tuple(casts))


def _chain_from(found: Trace, start: int, product: Tensor) -> Chain | None:
    """What follows a product that no child computed, from call ``start`` on."""
    joined = (*found.calls[: start - 1], Call("product", product, product), *found.calls[start:])
    return _chain(Trace(found.inputs, joined, found.output), start)


def _linear_activation(module: nn.Module, found: Trace, activations: dict[str, Activation]) -> MLP | None:
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
    return MLP(LINEAR_ACTIVATION, {"linear": linear.child, "activation": act.child}, activations[act.child], chain)


def _gated(module: nn.Module, found: Trace, activations: dict[str, Activation]) -> MLP | None:
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
    product = act.returned * ups[0].returned
    start = max(calls.index(call) for call in (act, gates[0], ups[0])) + 1
    if start != 3 or start >= len(calls) or not same(product, calls[start].received):
        return None
    chain = _chain_from(found, 3, product)
    if chain is None:
        return None
    roles = {"gate": gates[0].child, "up": ups[0].child, "activation": act.child}
    return MLP(GATED, roles, activations[act.child], chain)


def _merged(module: nn.Module, found: Trace, activations: dict[str, Activation]) -> MLP | None:
    if len(found.calls) < 3:
        return None
    merged, act, following = found.calls[:3]
    width = merged.returned.shape[-1]
    if act.child not in activations or linear_shape(getattr(module, merged.child)) is None or width % 2:
        return None
    if not same(found.inputs[0], merged.received):
        return None
    halves = merged.returned.chunk(2, -1)
    for gate, up in (halves, halves[::-1]):
        if not same(gate, act.received):
            continue
        product = act.returned * up
        if same(product, following.received):
            chain = _chain_from(found, 2, product)
            if chain is None:
                return None
            roles = {"merged": merged.child, "activation": act.child}
            return MLP(MERGED, roles, activations[act.child], chain, gate_first=gate is halves[0])
    return None
