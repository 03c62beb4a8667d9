"""dropout + residual: the scaling, masking and addition after a sublayer in one kernel, forward and backward.

The bias stays in the matmul, whose epilogue adds it for nothing (4096×768→3072 float16 on one H200: 30.8 µs with bias,
30.2 without), so fusing it with the dropout would cost a read and save none.
"""

from __future__ import annotations

import itertools
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
from oslo_fusion.recognition.trace import (
    Trace,
    has_hooks,
    input_widths,
    linear_shape,
    required_arguments,
    run_chain,
    same,
    trace,
)

KIND = "dropout + residual"
_MAX_CHILDREN = 8
_MAX_MODULES = 24


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


def _recognise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    dropouts = [name for name, child in module.named_children() if type(child) is nn.Dropout]
    try:
        arguments = required_arguments(module)
    except (TypeError, ValueError):
        return None
    if len(dropouts) != 1 or arguments not in (1, 2) or getattr(module, dropouts[0]).p == 0:
        return None
    widths = input_widths(module)
    outputs = [shape[1] for part in module.modules() if (shape := linear_shape(part)) is not None]
    for sizes in itertools.product(widths, dict.fromkeys((*widths, *outputs)) if arguments == 2 else (0,)):
        with probe.preserved_random_state():
            inputs = [random(2, 3, size, device=device, dtype=dtype) for size in sizes[:arguments]]
        found = trace(module, inputs)
        if found is not None:
            return _wiring(found, dropouts[0])
    return None


def _wiring(found: Trace, dropout: str) -> dict[str, Any] | None:
    names = [call.child for call in found.calls]
    if names.count(dropout) != 1 or len(set(names)) != len(names):
        return None
    at = names.index(dropout)
    if at == 0:
        return None
    for x, residual in itertools.product(range(len(found.inputs)), repeat=2):
        before, last = found.calls[: at + 1], found.calls[at]
        linked = all(same(a.returned, b.received) for a, b in itertools.pairwise(before))
        if not linked or not same(found.inputs[x], before[0].received):
            continue
        if last.returned.shape != found.inputs[residual].shape:
            continue
        total = last.returned + found.inputs[residual]
        rest = found.calls[at + 1 :]
        reached = same(total, rest[0].received) if rest else same(total, found.output)
        if reached and (not rest or (found.rest_is_chain(at + 2) and same(rest[-1].returned, found.output))):
            return {
                "arguments": len(found.inputs),
                "x": x,
                "residual": residual,
                "before": tuple(names[:at]),
                "dropout": dropout,
                "after": tuple(names[at + 1 :]),
            }
    return None


def propose_residual(path: str, module: nn.Module, scope: Scope) -> Proposal | None:
    """Propose to fuse dropout and residual addition of a module, or refuse it; None if it has no such end."""
    count = sum(1 for _ in module.children())
    if not 2 <= count <= _MAX_CHILDREN or sum(1 for _ in module.modules()) > _MAX_MODULES:
        return None
    where = placement(module)
    if where is None or where[0].type == "meta":
        return None
    device, dtype = where
    key = (KIND, signature(module), device, dtype)
    wiring: dict[str, Any] | None = scope.once(key, lambda: _recognise(module, device, dtype))
    if wiring is None:
        return None
    site = Site(path, KIND, type(module).__name__)
    before = f"{wiring['before'][-1]}, dropout, addition"
    if has_hooks(module):
        return refuse(ROOM, site, before, "its forward was replaced on the instance or is hooked")
    if not (fuser := scope.fuser(device)).available:
        return refuse(ROOM, site, before, fuser.reason)
    p = getattr(module, wiring["dropout"]).p
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
    settings = {**mode_settings(device, verdict), **wiring}
    claims = [f"{path}.{wiring['dropout']}"]
    return propose(
        ROOM, site, verdict, before, "mask, scale and addition in one kernel", FusedDropoutResidual, settings, claims
    )


def _exact_inputs(device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """Inputs on which a random function can be proven: the sublayer's output is zero, so that every mask gives the same."""
    return torch.zeros(PROVEN_SHAPE, device=device, dtype=dtype), random(*PROVEN_SHAPE, device=device, dtype=dtype)
