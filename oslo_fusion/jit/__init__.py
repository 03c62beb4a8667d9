"""The TorchScript room: elementwise work fused into few kernels, found by structure, proven and timed before a swap."""

from oslo_fusion.jit.room import TorchScriptPass

__all__ = ["TorchScriptPass"]
