"""plan, initialize, report and restore: short, because the rooms propose and surgery applies."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn

from oslo_fusion import probe, rehearsal, surgery
from oslo_fusion.aot import start_compiler
from oslo_fusion.config import KERNELS, FusionConfig, ParsedConfig, parse_config
from oslo_fusion.decide import placement
from oslo_fusion.environment import environment
from oslo_fusion.errors import ConfigError, PlanError, RefusalError
from oslo_fusion.passes import PASSES, REHEARSED
from oslo_fusion.plan import FusionPlan, Proposal, Site
from oslo_fusion.report import FusionReport, Verification

_log = logging.getLogger("oslo_fusion")


def plan(model: nn.Module, config: object) -> FusionPlan:
    """What :func:`initialize` would do to ``model``, and what it would not, with a reason for each site.

    Pure: parts of the model are run on small random inputs as copies that share its parameters; the model, its
    gradients, its modes and the random state of torch stay as they are. An initialized model is planned as if restored.

    Args:
        model: any ``nn.Module``, usually a Hugging Face model, in its final dtype and on its final device.
        config: a dict or OmegaConf ``DictConfig`` with a ``kernel_fusion`` block, a :class:`FusionConfig`, or the path
            of a ``.yaml``, ``.yml`` or ``.json`` file.

    Raises:
        ConfigError: the model is not a module or the configuration is unusable.
        PlanError: a pass claims a module that an earlier one has taken, or one module twice.
    """
    parsed = _parse(model, config)
    with _compiled_beside(model, parsed.fusion):
        pass
    return _plan(model, parsed)


def _parse(model: object, config: object) -> ParsedConfig:
    """The configuration; ConfigError for it, or for a model that is none."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: received {type(model).__name__} instead of a torch.nn.Module. Remedy: pass the model itself, as in "
            "oslo_fusion.initialize(model, config)."
        )
    return parse_config(config)


@contextlib.contextmanager
def _compiled_beside(model: nn.Module, config: FusionConfig) -> Iterator[None]:
    """Compile the kernels that the plan will launch, beside the body, and wait for them: what is timed then has the host alone.

    Where that fails the plan is made as ever, and compiles them one after another.
    """
    placed = placement(model)
    if placed is None or placed[0].type != "cuda" or not config.enable or rehearsal.processors() < 2:
        yield
        return
    noted = rehearsal.Rehearsal()
    try:
        _rehearse(model, config, noted, placed[0])
        yield
        noted.finish()
    except BaseException:
        noted.abandon()
        raise


def _rehearse(model: nn.Module, config: FusionConfig, noted: rehearsal.Rehearsal, device: torch.device) -> None:
    reserved = torch.cuda.memory_reserved(device)
    taken: dict[str, Proposal] = {}
    try:
        with surgery.as_restored(model), rehearsal.under(noted):
            for room in REHEARSED:
                found = list(room.propose(model, config, environment(), taken))
                taken.update({path: proposal for proposal in found for path in proposal.claims if path not in taken})
    except Exception as error:
        _log.info("the plan was not rehearsed to its end, and compiles the rest as it goes: %s", error)
    if torch.cuda.memory_reserved(device) > reserved:
        torch.cuda.empty_cache()  # how much is timed depends on what is free, and must not on the rehearsal


def _plan(model: nn.Module, parsed: ParsedConfig) -> FusionPlan:
    proposals: list[Proposal] = []
    taken: dict[str, Proposal] = {}
    with surgery.as_restored(model):
        for room in PASSES:
            found = list(room.propose(model, parsed.fusion, environment(), taken))
            proposals += found
            taken.update({path: proposal for proposal in found for path in proposal.claims if path not in taken})
    proposals += _absent_rooms(parsed.fusion)
    _check_claims(proposals)
    return FusionPlan(type(model).__name__, parsed.fusion, tuple(proposals), parsed.notes)


def initialize(model: nn.Module, config: object) -> nn.Module:
    """Make ``model`` faster in place, as :func:`plan` says, and return the same object.

    ``generate``, ``save_pretrained``, the keys of ``state_dict``, ``train``/``eval``, ``deepcopy`` and pickling go on
    working. A model that was initialized before is restored first. :func:`report` tells what was done,
    :func:`restore` undoes it. On a GPU, threads compile the kernels that will be tried, and end with the call; with
    ``memory_efficient_fusion`` Inductor is imported and starts its compiling processes, as it would at the first step.

    Args:
        model: as for :func:`plan`.
        config: as for :func:`plan`.

    Raises:
        ConfigError: the model is not a module or the configuration is unusable.
        PlanError: a pass claims a module that an earlier one has taken, or one module twice.
        RefusalError: ``on_refusal: raise`` and at least one site was refused.

    After any error the model is as it was before the call.
    """
    parsed = _parse(model, config)
    with _compiled_beside(model, parsed.fusion):
        start_compiler(model, parsed.fusion, environment())
    planned = _plan(model, parsed)
    refused = [p for p in planned.proposals if p.outcome == "refused"]
    if refused and planned.config.on_refusal == "raise":
        raise RefusalError(
            f"kernel_fusion.on_refusal: raise, and {len(refused)} sites were refused. Remedy: on_refusal: report, or "
            f"mend the reasons.\n{planned}"
        )
    before = probe.run_sample(model) if planned.config.verify and planned.config.enable else None
    swaps = [swap for p in planned.proposals if p.outcome == "fused" for swap in p.swaps]
    with surgery.transaction(model):
        surgery.restore(model)
        surgery.apply(model, swaps)
        verification = None
        if before is not None:
            verification = Verification(*probe.difference(before, probe.run_sample(model)), sample=before.description)
        surgery.attach(model, FusionReport(planned, verification))
    for proposal in refused:
        if proposal.room == "absent":
            _log.warning("%s: %s", proposal.site.path, proposal.reason)
    return model


def report(model: nn.Module) -> FusionReport:
    """What :func:`initialize` did to ``model``: a row per site, with outcome and reason.

    Args:
        model: an initialized model, or a module that contains one (a DDP or PEFT wrapper, say).

    Raises:
        PlanError: no initialized model was found.
    """
    found = surgery.attached(model)
    if not isinstance(found, FusionReport):
        raise PlanError(
            f"report: this {type(model).__name__} has not been initialized. Remedy: call oslo_fusion.initialize(model, "
            "config) first, or oslo_fusion.plan(model, config) to see what it would do."
        )
    return found


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`initialize` and return the same object. A model that was never initialized comes back as it is.

    Args:
        model: any module; initialized models inside it are restored too.
    """
    surgery.restore(model)
    return model


def _absent_rooms(config: FusionConfig) -> list[Proposal]:
    """Rows for what OSLO's configurations ask and this version cannot give."""
    wanted = []
    served = {name for room in PASSES for name in room.kernels}
    for name in KERNELS if config.custom_cuda_kernels == ("all",) else config.custom_cuda_kernels:
        if name not in served and name != "all":
            wanted.append((f"custom_cuda_kernels: {name}", "this kernel is not part of this version"))
    return [
        Proposal(
            site=Site(f"kernel_fusion.{key}", "configuration", "-"),
            room="absent",
            before="-",
            after="-",
            outcome="refused" if config.enable else "off",
            reason=reason if config.enable else "enable is false",
        )
        for key, reason in wanted
    ]


def _check_claims(proposals: list[Proposal]) -> None:
    owners: dict[str, Proposal] = {}
    for proposal in proposals:
        for path in proposal.claims:
            other = owners.setdefault(path, proposal)
            if other is not proposal:
                raise PlanError(
                    f"{path}: claimed by {other.room} ({other.site.kind} at {other.site.path}) and by {proposal.room} "
                    f"({proposal.site.kind} at {proposal.site.path}). Remedy: switch one of the two rooms off, and report it."
                )
