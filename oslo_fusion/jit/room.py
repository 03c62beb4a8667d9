"""The TorchScript room's pass: every candidate site of a model, each once, with what is proposed or why not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import Scope, placement
from oslo_fusion.environment import Environment
from oslo_fusion.jit.activation import propose_activation
from oslo_fusion.jit.mlp import propose_mlp
from oslo_fusion.jit.projection import propose_projection
from oslo_fusion.jit.residual import propose_residual
from oslo_fusion.jit.script import ROOM
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Taken, leave

_AOT = "aot"  # the room that compiles; rooms are strangers, and a row knows its own


class TorchScriptPass:
    """Fuses activations, MLPs, dropout with residual, and unaligned output projections."""

    name = ROOM
    kernels: tuple[str, ...] = ()

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield a proposal for every candidate site; a single ``off`` row if fusion is not enabled."""
        if not config.enable:
            reason = "enable is false"
            yield Proposal(Site("kernel_fusion.enable", "configuration", "-"), self.name, "-", "-", "off", reason)
            return
        compiled = _compiled(taken)
        for path in compiled:
            site = Site(path or "forward", "everything inside", type(model.get_submodule(path)).__name__)
            yield Proposal(
                site, self.name, "-", "-", "off", "memory_efficient_fusion compiles it: Inductor fuses what is inside"
            )
        scope = Scope(config, environment)
        claimed = set(taken)
        for path, module in model.named_modules():
            if path in taken or _is_inside(path, compiled):
                continue  # a module is changed once, and whoever took it has given it a row
            for detect in (propose_mlp, propose_residual, propose_projection):
                proposal = detect(path, module, scope)
                if proposal is not None:
                    proposal = leave(proposal, taken)
                    claimed.update(proposal.claims)
                    yield proposal
        home = placement(model)
        for path, parent, module in _leaves(model):
            where = placement(parent) or home
            if path in claimed or _is_inside(path, compiled) or where is None or where[0].type == "meta":
                continue
            proposal = propose_activation(path, module, *where, scope)
            if proposal is not None:
                yield proposal


def _compiled(taken: Taken) -> list[str]:
    """Paths of what AOT Autograd has got instead of TorchScript, as OSLO has it; an empty path is the whole model."""
    return list(dict.fromkeys(row.swaps[0].path for row in taken.values() if row.room == _AOT and row.swaps))


def _is_inside(path: str, compiled: list[str]) -> bool:
    return any(not outer or path == outer or path.startswith(f"{outer}.") for outer in compiled)


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    seen: set[nn.Module] = set()
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            if child not in seen and next(child.children(), None) is None:
                seen.add(child)
                yield (f"{prefix}.{name}" if prefix else name), parent, child
