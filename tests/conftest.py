"""What tests share: tiny models of every family, and machines that can or cannot fuse."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oslo_fusion import models, probe
from oslo_fusion.environment import Ability, Environment

CPU = torch.device("cpu")
ENABLED = {"kernel_fusion": {"enable": True, "autotune": "off"}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests with the reason where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


os.environ["OSLO_FUSION_CACHE"] = tempfile.mkdtemp()  # timings of a test are nobody else's
torch.set_num_threads(1)  # the tests' own processes share the cores; contended threads wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    probe._TIMINGS.clear()


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """``build("gpt2")``: a tiny model with random weights, in eval mode, on the CPU unless told otherwise."""

    def make(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU, size: str = "tiny") -> nn.Module:
        return models.build_model(name, dtype=dtype, device=device, size=size).eval()

    return make


@pytest.fixture
def inputs() -> Callable[..., dict[str, Any]]:
    """``inputs(model, name)``: a small batch that the model accepts, with labels if asked."""

    def make(model: nn.Module, name: str, *, labels: bool = False) -> dict[str, Any]:
        device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        generator = torch.Generator().manual_seed(1)
        if name == "vit":
            size = model.config.image_size
            pixels = torch.randn(2, 3, size, size, generator=generator).to(device, dtype)
            return {"pixel_values": pixels, **({"labels": torch.tensor([0, 1], device=device)} if labels else {})}
        ids = torch.randint(3, 500, (2, 9), generator=generator).to(device)
        if name.startswith("t5") and not labels:
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        return {"input_ids": ids, **({"labels": ids} if labels else {})}

    return make


@pytest.fixture
def fuser_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose TorchScript fuser works: the scripted code runs, if unfused, so its results can be tested."""
    monkeypatch.setattr(
        Environment, "torchscript_fuser", lambda self, device_type: Ability("fuser", True, "pretended for a test")
    )
