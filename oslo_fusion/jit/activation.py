"""Activations: modules that compute an elementwise function in several kernels, made one forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.decide import (
    PROVEN_SHAPE,
    Scope,
    decide,
    dtypes_to_decide,
    fuses,
    mode_settings,
    propose,
    random,
    refuse,
)
from oslo_fusion.jit.formulas import FORMULAS
from oslo_fusion.jit.script import ROOM
from oslo_fusion.plan import Proposal, Site
from oslo_fusion.recognition.activation import recognise
from oslo_fusion.recognition.trace import has_hooks

KIND = "activation"
_TIMED_WIDTH = 4096


class FusedActivation(nn.Module):
    """Donor for an activation module. Shape, dtype (also under autocast) and device are the original's."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._oslo_fusion_settings
        if len(args) != 1 or kwargs or not fuses(settings, args[0]):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        formula = FORMULAS[settings["formula"]]
        if formula.aten is None and torch.compiler.is_compiling():
            return super().forward(x)  # Inductor fuses the plain expression itself
        wide = settings["autocast_dtype"]
        if wide is not None and x.dtype != wide and torch.is_autocast_enabled(x.device.type):
            x = x.to(wide)  # the original's pow or softplus is promoted by autocast
        return formula(x)


def propose_activation(path: str, module: nn.Module, device: torch.device, dtype: torch.dtype, scope: Scope) -> Proposal | None:
    """Propose the one-kernel form of an activation module, or refuse it; None if the module is no activation.

    Args:
        path, module: the candidate.
        device, dtype: where its parent's parameters are, and their dtype.
        scope: the planning run.
    """
    site = Site(path, KIND, type(module).__name__)
    if any(True for _ in module.parameters()):
        if type(module).__module__ == "transformers.activations":
            return refuse(
                ROOM, site, type(module).__name__, "has learned parameters; their gradients are sums, which stay apart"
            )
        return None
    found = recognise(module, device, scope)
    if found is None:
        return None
    before = f"{type(module).__name__}, {found.kernels} kernel{'s' if found.kernels > 1 else ''}"
    if found.kernels <= 1:
        return refuse(ROOM, site, before, f"already one kernel ({found.operators[0] if found.operators else 'none'})")
    if found.formula is None:
        return refuse(ROOM, site, before, f"no known formula; its operators are {', '.join(found.operators)}")
    if has_hooks(module):
        return refuse(ROOM, site, before, "its forward was replaced or is hooked")
    formula, twin = FORMULAS[found.formula], probe.shadow(module)
    if formula.aten is None and not (fuser := scope.fuser(device)).available:
        return refuse(ROOM, site, before, fuser.reason)
    verdict = scope.once(
        (KIND, formula.name, found.operators, device, dtype),
        lambda: decide(
            (KIND, formula.name, found.operators),
            twin,
            formula,
            lambda d: (3 * random(*PROVEN_SHAPE, device=device, dtype=d),),
            lambda d: (random(probe.elements_to_time(device) // _TIMED_WIDTH, _TIMED_WIDTH, device=device, dtype=d),),
            dtypes_to_decide(device, dtype),
            scope.config.autotune,
        ),
    )
    after = f"{formula.name}, one ATen kernel" if formula.aten else f"{formula.name}, one TorchScript kernel"
    settings = {
        **mode_settings(device, verdict),
        "formula": formula.name,
        "autocast_dtype": found.autocast_dtype,
    }
    return propose(ROOM, site, verdict, before, after, FusedActivation, settings)
