"""dropout + residual: the scaling, masking and addition after a sublayer in one kernel, forward and backward.

The bias stays in the matmul, whose epilogue adds it for nothing (4096×768→3072 float16 on one H200: 30.8 µs with bias,
30.2 without), so fusing it with the dropout would cost a read and save none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.decide import (
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
from oslo_fusion.jit.formulas import dropout_add
from oslo_fusion.jit.script import ROOM
from oslo_fusion.plan import Proposal, Site
from oslo_fusion.recognition.residual import Residual, may_end_in_residual, recognise_residual
from oslo_fusion.recognition.trace import has_hooks, run_chain

KIND = "dropout + residual"


class FusedDropoutResidual(nn.Module):
    """Donor for ``… residual + dropout(sublayer(x)) …``. In eval mode, and at p = 0, the original runs."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._oslo_fusion_settings
        dropout = getattr(self, settings["dropout"])
        active = self.training and isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        if len(args) != settings["arguments"] or kwargs or not active or has_hooks(dropout):
            return super().forward(*args, **kwargs)
        h, residual = run_chain(self, args[settings["x"]], settings["before"]), args[settings["residual"]]
        if h.shape == residual.shape and h.dtype == residual.dtype and fuses(settings, h):
            h = dropout_add(h, residual, dropout.p)
        else:
            h = residual + dropout(h)
        return run_chain(self, h, settings["after"])


def propose_residual(path: str, module: nn.Module, scope: Scope) -> Proposal | None:
    """Propose to fuse dropout and residual addition of a module, or refuse it; None if it has no such end."""
    if not may_end_in_residual(module):
        return None
    where = placement(module)
    if where is None or where[0].type == "meta":
        return None
    device, dtype = where
    key = (KIND, signature(module), device, dtype)
    wiring: Residual | None = scope.once(key, lambda: recognise_residual(module, device, dtype))
    if wiring is None or getattr(module, wiring.dropout).p == 0:
        return None
    site = Site(path, KIND, type(module).__name__)
    before = f"{wiring.before[-1]}, dropout, addition"
    if has_hooks(module):
        return refuse(ROOM, site, before, "its forward was replaced on the instance or is hooked")
    if not (fuser := scope.fuser(device)).available:
        return refuse(ROOM, site, before, fuser.reason)
    p = getattr(module, wiring.dropout).p
    verdict = scope.once(
        (KIND, device, dtype),
        lambda: decide(
            KIND,
            lambda x, residual: residual + F.dropout(x, p),
            lambda x, residual: dropout_add(x, residual, p),
            lambda d: _exact_inputs(device, d),
            lambda d: [random(probe.elements_to_time(device) // 4096, 4096, device=device, dtype=d) for _ in range(2)],
            dtypes_to_decide(device, dtype),
            scope.config.autotune,
            inference=False,
        ),
    )
    settings = {**mode_settings(device, verdict), **dataclasses.asdict(wiring)}
    claims = [f"{path}.{wiring.dropout}"]
    return propose(
        ROOM, site, verdict, before, "mask, scale and addition in one kernel", FusedDropoutResidual, settings, claims
    )


def _exact_inputs(device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """Inputs on which a random function can be proven: the sublayer's output is zero, so that every mask gives the same."""
    return torch.zeros(PROVEN_SHAPE, device=device, dtype=dtype), random(*PROVEN_SHAPE, device=device, dtype=dtype)
