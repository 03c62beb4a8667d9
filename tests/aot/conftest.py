"""What the AOT tests share: models with the room on, and a compiler that is quick because it generates no code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import oslo_fusion
from oslo_fusion.aot import room

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # one graph at a time: worker processes would cost more than they save


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo, AOT Autograd and the partitioner as always; the graphs then run as they are."""
    monkeypatch.setattr(room, "COMPILER", "eager")


@pytest.fixture
def fused(build: Any) -> Callable[..., nn.Module]:
    """``fused("gpt2", {"scope": "model"})``: a tiny model with the room on, in eval mode."""

    def make(name: str, block: object = True, **sizes: Any) -> nn.Module:
        return oslo_fusion.initialize(
            build(name, **sizes), {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block}}
        )

    return make
