"""Gated MLPs: found by how they are wired, proven, timed, and given the one-kernel product of :mod:`oslo_fusion.ops.glu`.

Both forms are sites: gate and up as two projections (Llama, Mistral, Qwen, Gemma, T5 v1.1), and as the halves of one (Phi-3,
GLM). The projections, and what follows the product, are called as modules, so that their hooks, adapters and wrappers go on
working. What the fused product is compared with is the strongest that plain PyTorch has: the activation as one ATen kernel,
then the multiplication, whatever the model's own activation takes.

This file imports no triton: the operators find their kernels at the first CUDA tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import (
    HALF,
    PROVEN_SHAPE,
    Scope,
    Verdict,
    decide,
    dtypes_to_decide,
    fuses,
    mode_settings,
    propose,
    random,
    refuse,
)
from oslo_fusion.environment import Environment
from oslo_fusion.kernels.norm_sites import ROOM
from oslo_fusion.ops.glu import glu, halves, merged_glu
from oslo_fusion.ops.kernels import choices, is_plain, missing
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Taken, leave
from oslo_fusion.recognition.activation import MEANINGS
from oslo_fusion.recognition.mlp import GATED, LINEAR_ACTIVATION, MERGED, MLP, recognise_mlp
from oslo_fusion.recognition.trace import has_hooks, run_chain

KERNELS = {"FusedSwiGLU": ("silu",), "FusedGeGLU": ("gelu", "gelu_tanh")}
"""What ``custom_cuda_kernels`` calls them, and the activations of the gate."""

_TIMED_WIDTH = 4096


class FusedGLU(nn.Module):
    """Donor for ``… act(gate(x)) * up(x) …``: the product is one kernel forward and one backward.

    Whatever was not planned goes through the original's activation and multiplication; under torch.compile, where Inductor
    fuses the expression itself, and for calls of another kind the original's forward runs whole.
    """

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._oslo_fusion_settings
        if len(args) != 1 or kwargs or torch.compiler.is_compiling() or not isinstance(args[0], Tensor):
            return super().forward(*args, **kwargs)
        x = args[0]
        if x.device.type != settings["device"]:
            return super().forward(x)
        activation, formula = getattr(self, settings["activation"]), settings["formula"]
        if "merged" in settings:
            merged: Tensor = getattr(self, settings["merged"])(x)
            if _is_planned(settings, activation, merged) and merged.shape[-1] % 2 == 0:
                h = merged_glu(merged, formula, settings["gate_first"])
            else:
                gate, up = halves(merged, settings["gate_first"])
                h = activation(gate) * up
        else:
            gate, up = getattr(self, settings["gate"])(x), getattr(self, settings["up"])(x)
            alike = gate.shape == up.shape and gate.dtype == up.dtype
            h = glu(gate, up, formula) if alike and _is_planned(settings, activation, gate, up) else activation(gate) * up
        return run_chain(self, h, settings["rest"], settings["casts"])


def _is_planned(settings: dict[str, Any], activation: nn.Module, *tensors: Tensor) -> bool:
    """Whether the fused product was planned for this mode and dtype, and nothing stands between it and a kernel."""
    return fuses(settings, tensors[0]) and not has_hooks(activation) and is_plain(*tensors)


class GatedMLPPass:
    """Replaces the product in gated MLPs by one kernel each way, where ``custom_cuda_kernels`` asks for it."""

    name = ROOM
    kernels = tuple(KERNELS)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per gated MLP of a wanted kind, and a refusal for a name of which the model has none."""
        everything = "all" in config.custom_cuda_kernels
        wanted = [name for name in KERNELS if everything or name in config.custom_cuda_kernels]
        wishes = {name: Site(f"kernel_fusion.custom_cuda_kernels: {name}", "configuration", "-") for name in wanted}
        if not config.enable:
            for wish in wishes.values():
                yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        names = {activation: name for name in wanted for activation in KERNELS[name]}
        scope, found = Scope(config, environment), set()
        for path, module in model.named_modules() if wanted else ():
            mlp = None if path in taken else recognise_mlp(module, scope)
            if mlp is not None and mlp.kind != LINEAR_ACTIVATION and mlp.formula in names:
                found.add(names[mlp.formula])
                yield leave(_propose(path, module, mlp, scope), taken)
        for name in wanted:
            if not everything and name not in found:
                activations = " or ".join(KERNELS[name])
                reason = f"no MLP of this {type(model).__name__} multiplies {activations} of a gate with an up projection"
                yield refuse(ROOM, wishes[name], "-", reason)


def _propose(path: str, module: nn.Module, mlp: MLP, scope: Scope) -> Proposal:
    site = Site(path, GATED, type(module).__name__)
    before = f"{mlp.formula}(gate), times up" + (", halves of one projection" if mlp.kind == MERGED else "")
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    device, dtype = parameters[0].device, parameters[0].dtype
    if any(p.device != device for p in parameters):
        return refuse(ROOM, site, before, "its parameters are on different devices")
    if "forward" in module.__dict__:
        return refuse(ROOM, site, before, "its forward was replaced on the instance")
    if dtype not in (torch.float32, *HALF):
        return refuse(ROOM, site, before, f"no kernel for weights of {str(dtype).removeprefix('torch.')}")
    if not choices("glu", device.type, scope.config.kernel):
        return refuse(ROOM, site, before, missing("glu", device.type, scope.config.kernel))
    key = (GATED, mlp.kind, mlp.formula, mlp.gate_first, device, dtype)
    verdict: Verdict = scope.once(key, lambda: _decide(mlp, device, dtype, scope.config.autotune))
    settings = {
        **mode_settings(device, verdict),
        **mlp.roles,
        "formula": mlp.formula,
        "rest": mlp.chain.rest,
        "casts": mlp.chain.casts,
        "gate_first": mlp.gate_first,
    }
    after = f"{'swiglu' if mlp.formula == 'silu' else 'geglu'}, one Triton kernel each way"
    return propose(ROOM, site, verdict, before, after, FusedGLU, settings, [f"{path}.{mlp.roles['activation']}"])


def _decide(mlp: MLP, device: torch.device, dtype: torch.dtype, autotune: str) -> Verdict:
    """Prove and time the product in the form in which the site has it."""
    meaning, count, gate_first = MEANINGS[mlp.formula], 2, mlp.gate_first

    def before(gate: Tensor, up: Tensor) -> Tensor:
        return meaning(gate) * up

    def before_merged(merged: Tensor) -> Tensor:
        return before(*halves(merged, gate_first))

    def after(gate: Tensor, up: Tensor) -> Tensor:
        return glu(gate, up, mlp.formula)

    def after_merged(merged: Tensor) -> Tensor:
        return merged_glu(merged, mlp.formula, gate_first)

    both: tuple[probe.Function, probe.Function] = (before, after)
    width = 1
    if mlp.kind == MERGED:
        both, count, width = (before_merged, after_merged), 1, 2
    rows, columns = PROVEN_SHAPE
    timed = probe.elements_to_time(device) // _TIMED_WIDTH
    return decide(
        (ROOM, mlp.kind, mlp.formula, gate_first),
        *both,
        lambda d: [2 * random(rows, width * columns, device=device, dtype=d) for _ in range(count)],
        lambda d: [random(timed, width * _TIMED_WIDTH, device=device, dtype=d) for _ in range(count)],
        dtypes_to_decide(device, dtype),
        autotune,
    )
