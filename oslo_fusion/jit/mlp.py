"""MLPs: an activation in the matmul's epilogue, and the product of an activated gate with its up projection.

Both are found by running a copy of the module and looking at what its children passed to each other; no model is known by
name. Children are called as modules, so that their hooks, adapters and wrappers go on working.
"""

from __future__ import annotations

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
)
from oslo_fusion.jit.formulas import FORMULAS, GATED, gated_product
from oslo_fusion.jit.script import ROOM
from oslo_fusion.plan import Proposal, Site
from oslo_fusion.recognition import mlp
from oslo_fusion.recognition.mlp import MLP, recognise_mlp
from oslo_fusion.recognition.trace import has_hooks, linear_shape, run_chain

_EPILOGUES = {"gelu_tanh": True, "relu": False}  # formula → use_gelu of aten::_addmm_activation
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


def propose_mlp(path: str, module: nn.Module, scope: Scope) -> Proposal | None:
    """Propose one of the two MLP fusions for a module, or refuse it; None if the module has neither form."""
    found = recognise_mlp(module, scope)
    where = placement(module)
    if found is None or where is None or found.kind == mlp.MERGED:
        return None
    if found.kind == mlp.GATED:
        return _propose_gated(path, module, found, *where, scope)
    return _propose_epilogue(path, module, found, *where, scope)


def _settings(found: MLP) -> dict[str, Any]:
    return {**found.roles, "formula": found.formula, "rest": found.chain.rest, "casts": found.chain.casts}


def _propose_gated(
    path: str, module: nn.Module, found: MLP, device: torch.device, dtype: torch.dtype, scope: Scope
) -> Proposal:
    site = Site(path, mlp.GATED, type(module).__name__)
    formula = FORMULAS[found.formula]
    before = f"{formula.name}(gate), times up"
    if formula.name not in GATED:
        return refuse(ROOM, site, before, f"no fused product for {formula.name}; there is one for {', '.join(GATED)}")
    if has_hooks(module):
        return refuse(ROOM, site, before, "its forward was replaced on the instance or is hooked")
    if not (fuser := scope.fuser(device)).available:
        return refuse(ROOM, site, before, fuser.reason)
    verdict = scope.once(
        (mlp.GATED, formula.name, device, dtype),
        lambda: decide(
            (mlp.GATED, formula.name),
            lambda gate, up: formula(gate) * up,
            lambda gate, up: gated_product(gate, up, formula.name),
            lambda d: tuple(2 * random(*PROVEN_SHAPE, device=device, dtype=d) for _ in range(2)),
            lambda d: tuple(random(probe.elements_to_time(device) // 4096, 4096, device=device, dtype=d) for _ in range(2)),
            dtypes_to_decide(device, dtype),
            scope.config.autotune,
        ),
    )
    settings = {**mode_settings(device, verdict), **_settings(found)}
    claims = [f"{path}.{found.roles['activation']}"]
    after = "one TorchScript kernel for the product"
    return propose(ROOM, site, verdict, before, after, FusedGatedMLP, settings, claims)


def _propose_epilogue(
    path: str, module: nn.Module, found: MLP, device: torch.device, dtype: torch.dtype, scope: Scope
) -> Proposal | None:
    site = Site(path, mlp.LINEAR_ACTIVATION, type(module).__name__)
    formula, linear = FORMULAS[found.formula], getattr(module, found.roles["linear"])
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
        (mlp.LINEAR_ACTIVATION, formula.name, shape, device, dtype),
        lambda: decide(
            (mlp.LINEAR_ACTIVATION, formula.name, shape),
            lambda x, weight, bias: formula(torch.addmm(bias, x, weight)),
            lambda x, weight, bias: _addmm_activation(x, weight, bias, formula.name),
            lambda d: operands(5, d),
            lambda d: operands(_TIMED_ROWS, d),
            (dtype,),
            scope.config.autotune,
            training=False,
        ),
    )
    settings = {**mode_settings(device, verdict), **_settings(found)}
    claims = [f"{path}.{found.roles['activation']}"]
    after = "activation in the matmul's epilogue; one ATen kernel in training"
    return propose(ROOM, site, verdict, before, after, FusedLinearActivation, settings, claims)
