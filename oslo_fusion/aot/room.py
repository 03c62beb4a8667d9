"""The AOT room's pass: the repeated layers of a model, or its whole forward, compiled at the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from oslo_fusion.aot.backend import load_inductor
from oslo_fusion.aot.layer import CompiledLayer
from oslo_fusion.aot.layers import Repeated, repeated_layers
from oslo_fusion.aot.methods import CompiledForward, UncompiledGenerate, generating
from oslo_fusion.aot.programs import Programs, load_replacement
from oslo_fusion.aot.proof import difference
from oslo_fusion.aot.record import ROOM
from oslo_fusion.config import AOT_BLOCK, FusionConfig, MemoryEfficientFusion
from oslo_fusion.decide import placement, refuse
from oslo_fusion.environment import Environment
from oslo_fusion.graphs import TrainingGraphs
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Swap, Taken, leave

_log = logging.getLogger("oslo_fusion")
LAYER, WHOLE = "repeated layer", "whole forward"
COMPILER = "inductor"
"""What makes code of the partitioned graphs; tests take ``eager`` where it is not Inductor that they are about."""


class AotPass:
    """Compiles with AOT Autograd and Inductor where ``memory_efficient_fusion`` asks for it.

    Nothing is compiled to plan, unless ``verify: true`` wants each kind of layer proven: a compilation takes seconds.
    """

    name = ROOM
    kernels: tuple[str, ...] = ()

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per repeated layer, or one for the model."""
        wish = Site(f"kernel_fusion.{AOT_BLOCK}", "configuration", "-")
        if config.memory_efficient_fusion is not False and not config.enable:
            yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
        settings = config.aot
        if settings is None:
            return
        for name in settings.replacements:
            load_replacement(name)  # a wrong name is an error of the configuration, not of the first step
        programs = Programs(settings, COMPILER)
        layers = repeated_layers(model)
        if settings.scope == "model":
            rows = [
                leave(_propose_whole(path, part, programs, environment), taken) for path, part in _whole(model, layers, taken)
            ]
            yield from _rows_with_generate(rows, model, programs)
            return
        if not layers:
            reason = f"this {type(model).__name__} has no list of repeated layers; scope: model compiles its whole forward"
            yield refuse(ROOM, wish, "-", reason)
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(layer.kind for layer in layers))}
        different = difference(model, layers, programs) if config.verify and layers else {}
        rows = [leave(_propose_layer(x, numbers[x.kind], programs, environment, different.get(x.kind)), taken) for x in layers]
        yield from _rows_with_generate(rows, model, programs)


def start_compiler(model: nn.Module, config: FusionConfig, environment: Environment) -> None:
    """Import Inductor, and let it start its compiling processes while the plan is made, where layers will run on a GPU.

    The first step would wait for both. If they fail it says so, and the model runs uncompiled.
    """
    where = placement(model) if config.aot is not None else None
    if where is not None and where[0].type == "cuda" and environment.inductor("cuda").available:
        try:
            load_inductor()
        except Exception as error:
            _log.info("Inductor could not be started before the first step: %s", error)


def _propose_layer(layer: Repeated, kind: int, programs: Programs, environment: Environment, different: str | None) -> Proposal:
    site = Site(layer.path, LAYER, type(layer.module).__name__)
    before = "eager"
    reason = _obstacle(layer.module, environment) or different
    if reason:
        return refuse(ROOM, site, before, reason)
    settings = {"programs": programs, "kind": kind, "index": layer_index(layer.module)}
    swap = Swap(layer.path, CompiledLayer, settings)
    return _proposal(site, before, f"compiled once for all, {_describe(programs.settings)}", swap, programs)


def _whole(model: nn.Module, layers: Sequence[Repeated], taken: Taken) -> list[tuple[str, nn.Module]]:
    """The model; or, where another room stands in its ``forward``, the parts of it that hold its layers.

    Head and loss are what is left out then: the fused loss has to see the head's input, and gains nothing from a compiler.
    """
    if CompiledForward.name not in taken:
        return [("", model)]
    parts = [(path, part) for path, part in model.named_children() if any(x.path.startswith(f"{path}.") for x in layers)]
    return parts or [("", model)]


def _propose_whole(path: str, module: nn.Module, programs: Programs, environment: Environment) -> Proposal:
    name = f"{path}.{CompiledForward.name}" if path else CompiledForward.name
    site = Site(name, WHOLE, type(module).__name__)
    reason = _obstacle(module, environment)
    if reason:
        return refuse(ROOM, site, "eager", reason)
    graphs, how = None, ""
    if programs.settings.cuda_graphs:
        reason = _not_captured(module)
        graphs, how = (
            (None, f", no CUDA graphs: {reason}") if reason else (TrainingGraphs(), ", training captured as CUDA graphs")
        )
    swap = Swap(path, CompiledForward, {"programs": programs, "part": path, "graphs": graphs}, CompiledForward.name)
    return _proposal(site, "eager", f"one compiled function, {_describe(programs.settings)}{how}", swap, programs)


def _not_captured(module: nn.Module) -> str:
    """Why a module's training cannot be captured; empty if it can."""
    devices = {p.device for p in module.parameters()}
    if any(device.type != "cuda" for device in devices):
        return "its parameters are not on a CUDA device"
    if len(devices) > 1:
        return "its parameters are on several devices"
    if any(type(p.data) is not Tensor for p in module.parameters()):
        return "its parameters are sharded"
    return ""


def _rows_with_generate(rows: Sequence[Proposal], model: nn.Module, programs: Programs) -> Iterator[Proposal]:
    first = next((row for row in rows if row.swaps), None)
    for row in rows:
        yield _with_generate(row, model, programs) if row is first else row


def _with_generate(row: Proposal, model: nn.Module, programs: Programs) -> Proposal:
    """The row, which also brings what tells the programs that ``generate`` is running."""
    name, settings = UncompiledGenerate.name, {"programs": programs}
    extra = [Swap(path, UncompiledGenerate, settings, name) for path in generating(model)] if row.swaps else []
    return replace(row, swaps=(*row.swaps, *extra))


def _proposal(site: Site, before: str, after: str, swap: Swap, programs: Programs) -> Proposal:
    reason = "compiled at the first step; not timed"
    return Proposal(site, ROOM, before, after, "fused", reason, (site.path,), (swap,), runtime=programs.record)


def _describe(settings: MemoryEfficientFusion) -> str:
    return f"activation_memory_budget {settings.activation_memory_budget:g}"


def _obstacle(module: nn.Module, environment: Environment) -> str:
    where = placement(module)
    if where is None:
        return "it has no floating-point parameter"
    if where[0].type == "meta":
        return "it has no memory yet (meta device)"
    ability = environment.inductor(where[0].type)
    if not ability.available:
        return ability.reason
    return "its forward was replaced on the instance" if "forward" in module.__dict__ else ""


def layer_index(layer: nn.Module) -> int | None:
    """The layer's entry in a key/value cache: transformers puts it on the parts that use one, as ``layer_idx``."""
    found: set[Any] = {getattr(part, "layer_idx", None) for part in layer.modules()} - {None}
    index = found.pop() if len(found) == 1 else None
    return index if isinstance(index, int) else None
