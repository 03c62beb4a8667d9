"""Whether a fusion is taken: it must obey the law of sameness, the fuser must exist here, and it must be faster here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.config import FusionConfig
from oslo_fusion.environment import Ability, Environment
from oslo_fusion.plan import Proposal, Settings, Site, Swap, Timing
from oslo_fusion.probe import Functions

_ENOUGH, _MOST_DRAWS = 4096, 31
PROVEN_SHAPE = (97, 211)
"""Odd, and large enough for the largest error of the same-dtype code, which sets the bound, to be a stable figure."""

HALF = (torch.float16, torch.bfloat16)
Inputs = Callable[[torch.dtype], Sequence[Tensor]]


@dataclass
class Scope:
    """What all detectors of one planning run share."""

    config: FusionConfig
    environment: Environment
    memo: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Compute once per planning run for equal modules of repeated layers."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def fuser(self, device: torch.device) -> Ability:
        """Whether TorchScript fuses on this device."""
        return self.environment.torchscript_fuser(device.type)


@dataclass(frozen=True)
class Verdict:
    """The outcome of proving and timing one fusion.

    ``inference`` and ``training`` are the input dtypes for which the fused form is used in that mode.
    """

    reason: str
    inference: frozenset[torch.dtype] = frozenset()
    training: frozenset[torch.dtype] = frozenset()
    timings: tuple[Timing, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether the fused form is used at all."""
        return bool(self.inference or self.training)


def signature(module: nn.Module) -> Hashable:
    """What makes two modules behave alike for recognition: class, printed form, and the plain attributes of every part.

    Equal layers of one model share it; two instances that differ in a flag do not.
    """
    parts = []
    for part in module.modules():
        plain = ((name, value) for name, value in part.__dict__.items() if not name.startswith("_"))
        parts.append((type(part), tuple((name, _identity(value)) for name, value in plain if name != "training")))
    return repr(module), tuple(parts)


def _identity(value: object) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    return id(value)  # a config object or a function, which layers share; two closures of one name are two functions


def placement(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and floating dtype of the module's first floating-point parameter, or None if it has none."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return None


def dtypes_to_decide(device: torch.device, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The input dtypes a site may meet: its own, and on a GPU half precision too, for autocast."""
    if device.type == "cuda" and dtype == torch.float32:
        return torch.float32, torch.bfloat16
    return (dtype,)


def decide(
    key: Hashable,
    before: Functions,
    after: Functions,
    small: Inputs,
    large: Inputs,
    dtypes: Sequence[torch.dtype],
    autotune: str,
    *,
    inference: bool = True,
    training: bool = True,
) -> Verdict:
    """Prove that ``after`` computes what ``before`` does, output and gradients, then take it where it is faster.

    Args:
        key: identifies the measurement apart from device, dtype and shape.
        before, after: functions of the inputs that return one tensor or several.
        small, large: make the inputs that are proven and timed, in a dtype.
        dtypes: what to decide for. bfloat16 also stands for float16 where both are met under autocast.
        autotune: ``off`` takes whatever is proven.
        inference, training: the modes in which the fused form can be used.
    """
    modes: dict[str, set[torch.dtype]] = {"inference": set(), "training": set()}
    timings: list[Timing] = []
    try:
        for dtype in dtypes:
            with probe.preserved_random_state():
                comparisons = probe.prove(after, before, *_draws(small, dtype), gradients=training)
                for name, comparison in zip(("output", "gradient", "gradient", "gradient"), comparisons, strict=False):
                    if not comparison.same:
                        return Verdict(f"computes something else in {_short(dtype)}: {name} {comparison}")
                covered = HALF if dtype in HALF and len(dtypes) > 1 else (dtype,)
                wins = {"inference": inference, "training": training}
                if autotune != "off":
                    inputs = functools.partial(large, dtype)
                    timing = probe.time_pair(key, before, after, inputs, autotune=autotune, training=training)
                    timings.append(timing)
                    wins["inference"] &= timing.wins_inference
                    wins["training"] &= timing.wins_training
            for mode, won in wins.items():
                if won:
                    modes[mode].update(covered)
    except torch.OutOfMemoryError:
        return Verdict("there is not enough free memory to try it")
    except RuntimeError as error:
        return Verdict(f"cannot be tried here: {str(error).splitlines()[0]}")
    verdict = Verdict("", frozenset(modes["inference"]), frozenset(modes["training"]), tuple(timings))
    return Verdict(_explain(verdict), verdict.inference, verdict.training, verdict.timings)


def _draws(small: Inputs, dtype: torch.dtype) -> list[Sequence[Tensor]]:
    """As many sets of inputs as make the largest error a stable figure for the smallest of them, a weight's gradient say."""
    first = small(dtype)
    more = min(_MOST_DRAWS, _ENOUGH // max(1, min(tensor.numel() for tensor in first)))
    return [first, *(small(dtype) for _ in range(more))]


def _explain(verdict: Verdict) -> str:
    if not verdict.timings:
        return "same results; not timed (autotune: off)"
    figures = "; ".join(map(str, verdict.timings))
    return f"measured {figures}" if verdict.fused else f"not faster here: {figures}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mode_settings(device: torch.device, verdict: Verdict) -> dict[str, Any]:
    """The settings by which a donor decides at run time (see :func:`fuses`)."""
    return {"device": device.type, "inference": verdict.inference, "training": verdict.training}


def fuses(settings: Settings, x: Tensor) -> bool:
    """Whether a donor uses the fused form for this input: planned for its device, its dtype and the mode."""
    mode = "training" if torch.is_grad_enabled() and x.requires_grad else "inference"
    return x.device.type == settings["device"] and x.dtype in settings[mode]


def random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal random numbers, drawn in float32 so that every dtype sees the same values up to rounding."""
    return torch.randn(*shape, device=device).to(dtype)


def propose(
    room: str,
    site: Site,
    verdict: Verdict,
    before: str,
    after: str,
    donor: type[nn.Module],
    settings: Mapping[str, Any],
    claims: Sequence[str] = (),
) -> Proposal:
    """A proposal to swap ``donor`` in at the site, or its refusal."""
    fused = verdict.fused
    return Proposal(
        site=site,
        room=room,
        before=before,
        after=after if fused else before,
        outcome="fused" if fused else "refused",
        reason=verdict.reason,
        claims=(site.path, *claims) if fused else (),
        swaps=(Swap(site.path, donor, settings),) if fused else (),
        timings=verdict.timings,
    )


def refuse(room: str, site: Site, before: str, reason: str) -> Proposal:
    """A refusal that needed no measurement."""
    return Proposal(site, room, before, before, "refused", reason)
