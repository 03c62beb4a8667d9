"""The passes, in the order in which they are asked. The order is meaning: what an earlier pass claims, a later one leaves."""

from __future__ import annotations

from oslo_fusion.generation import GenerationPass
from oslo_fusion.jit import TorchScriptPass
from oslo_fusion.plan import Pass
from oslo_fusion.triton.norm_sites import NormPass

PASSES: tuple[Pass, ...] = (NormPass(), TorchScriptPass(), GenerationPass())
