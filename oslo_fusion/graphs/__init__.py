"""CUDA graphs: what a model launches, captured once per shape and replayed without the host."""

from __future__ import annotations

from oslo_fusion.graphs.training import TrainingGraphs

__all__ = ["TrainingGraphs"]
