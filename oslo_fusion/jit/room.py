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
        scope = Scope(config, environment)
        claimed = set(taken)
        for path, module in model.named_modules():
            if path in taken:
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
            if path in claimed or where is None or where[0].type == "meta":
                continue
            proposal = propose_activation(path, module, *where, scope)
            if proposal is not None:
                yield proposal


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    seen: set[nn.Module] = set()
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            if child not in seen and next(child.children(), None) is None:
                seen.add(child)
                yield (f"{prefix}.{name}" if prefix else name), parent, child
