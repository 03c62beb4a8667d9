"""The kernels room: sites that are given one kernel of :mod:`oslo_fusion.ops`, in whatever language it is fast here.

How an operation is fast stands in ``triton/`` and ``csrc/``; where it goes into a model, here.
"""

from oslo_fusion.kernels.attention_sites import AttentionPass
from oslo_fusion.kernels.glu_sites import GatedMLPPass
from oslo_fusion.kernels.loss_sites import LossPass
from oslo_fusion.kernels.norm_sites import NormPass
from oslo_fusion.kernels.padding_sites import PaddingPass
from oslo_fusion.kernels.post_norm_sites import PostNormPass
from oslo_fusion.kernels.rope_sites import RotaryPass

__all__ = ["AttentionPass", "GatedMLPPass", "LossPass", "NormPass", "PaddingPass", "PostNormPass", "RotaryPass"]
