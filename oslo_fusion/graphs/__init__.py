"""CUDA graphs: what a model launches, captured once per shape and replayed without the host."""

from __future__ import annotations

from oslo_fusion.graphs.training import State, TrainingGraphs

__all__ = ["State", "TrainingGraphs"]
