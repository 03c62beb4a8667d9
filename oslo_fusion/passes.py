"""The passes, in the order in which they are asked. The order is meaning: what an earlier pass claims, a later one leaves.

The Triton room comes before the TorchScript one: a gated product that both could fuse moves 16 bytes per thread and access
there and 2 or 4 here, and what Triton does not take (another activation, no win on this device) TorchScript still may.
"""

from __future__ import annotations

from oslo_fusion.generation import GenerationPass
from oslo_fusion.jit import TorchScriptPass
from oslo_fusion.plan import Pass
from oslo_fusion.triton.glu_sites import GatedMLPPass
from oslo_fusion.triton.norm_sites import NormPass
from oslo_fusion.triton.rope_sites import RotaryPass

PASSES: tuple[Pass, ...] = (NormPass(), RotaryPass(), GatedMLPPass(), TorchScriptPass(), GenerationPass())
