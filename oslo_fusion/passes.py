"""The passes, in the order in which they are asked. The order is meaning: what an earlier pass claims, a later one leaves.

The end of a post-norm sublayer comes before the norms: its kernel has the norm inside, which alone would still read what the
addition wrote.

The kernels room comes before the TorchScript one: a gated product that both could fuse moves 16 bytes per thread and access
there and 2 or 4 here, and what a kernel does not take (another activation, no win on this device) TorchScript still may. The
AOT room comes before it too: it keeps out of what is compiled. Kernels stay inside, for what runs uncompiled there.

What takes the padding out of a batch stands around a model's forward, so it comes after those that stand on it: the fused loss,
and a compiled forward.
"""

from __future__ import annotations

from oslo_fusion.aot import AotPass
from oslo_fusion.generation import GenerationPass
from oslo_fusion.jit import TorchScriptPass
from oslo_fusion.kernels import AttentionPass, GatedMLPPass, LossPass, NormPass, PaddingPass, PostNormPass, RotaryPass
from oslo_fusion.plan import Pass

PASSES: tuple[Pass, ...] = (
    PostNormPass(),
    NormPass(),
    RotaryPass(),
    AttentionPass(),
    GatedMLPPass(),
    LossPass(),
    AotPass(),
    PaddingPass(),
    TorchScriptPass(),
    GenerationPass(),
)

_PROVE_KERNELS = (PostNormPass, NormPass, RotaryPass, AttentionPass, GatedMLPPass, LossPass, GenerationPass)
REHEARSED: tuple[Pass, ...] = tuple(room for room in PASSES if isinstance(room, _PROVE_KERNELS))
"""Those that prove and time single kernels, whose launches may be noted without being made (:mod:`oslo_fusion.rehearsal`).

What takes the padding out computes places of tokens in a kernel and looks there, and must not find whatever memory held. The
AOT and TorchScript rooms launch nothing of ours to plan.
"""
