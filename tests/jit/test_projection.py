"""The padded output projection: same numbers, same strides, gradients, and the fallbacks around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import oslo_fusion
from oslo_fusion import probe, surgery
from oslo_fusion.jit.projection import PaddedProjection, padded_linear

ALL = frozenset((torch.float32, torch.float16, torch.bfloat16))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def settings(device: str, **changes: Any) -> dict[str, Any]:
    return {"device": device, "inference": ALL, "training": ALL, "min_rows": 4, "out_first": True, **changes}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 8, 1001, 30522])
def test_padded_linear_obeys_the_law(width: int, dtype: torch.dtype, device: str) -> None:
    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight, bias = values(3, 17, 48), values(width, 48), values(width)
    for tensors in ((x, weight), (x, weight, bias)):
        for comparison in probe.prove(padded_linear, F.linear, tensors):
            assert comparison.same, comparison
        y = padded_linear(*tensors)
        assert y.is_contiguous()
        assert y.shape == (3, 17, width)


def test_a_bias_may_be_all_that_is_trained() -> None:
    linear, plain = nn.Linear(16, 1027), nn.Linear(16, 1027)
    plain.load_state_dict(linear.state_dict())
    surgery.swap(linear, PaddedProjection, settings("cpu"))
    x = torch.randn(8, 16)
    for module in (linear, plain):
        module.weight.requires_grad_(False)
        module(x).square().sum().backward()
    torch.testing.assert_close(linear.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1300])
def test_inference_in_chunks_is_the_whole(rows: int, biased: bool) -> None:
    x, weight, bias = torch.randn(rows, 24), torch.randn(1027, 24), torch.randn(1027) if biased else None
    with torch.no_grad():
        y = padded_linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert y.is_contiguous()


def test_rows_decide_and_everything_else_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from oslo_fusion.jit import projection

    calls = []
    real = projection.padded_linear
    monkeypatch.setattr(projection, "padded_linear", lambda *a: (calls.append(a), real(*a))[1])
    linear = nn.Linear(16, 1027)
    plain = nn.Linear(16, 1027)
    plain.load_state_dict(linear.state_dict())
    surgery.swap(linear, PaddedProjection, settings("cpu"))
    for x, padded in (
        (torch.randn(2, 2, 16), True),
        (torch.randn(4, 16), True),
        (torch.randn(3, 16), False),
        (torch.randn(16), False),
        (torch.randn(0, 16), False),
    ):
        before = len(calls)
        torch.testing.assert_close(linear(x), plain(x))
        assert (len(calls) > before) == padded, x.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(4, 16)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        linear(torch.randn(4, 15))
    linear.double()
    before = len(calls)
    linear(torch.randn(4, 16, dtype=torch.float64))
    assert len(calls) == before


def test_conv1d_and_tied_weights() -> None:
    conv, plain = Conv1D(1027, 16), Conv1D(1027, 16)
    plain.load_state_dict(conv.state_dict())
    surgery.swap(conv, PaddedProjection, settings("cpu", out_first=False))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(conv(x), plain(x))
    embedding, head = nn.Embedding(1027, 16), nn.Linear(16, 1027, bias=False)
    head.weight = embedding.weight
    ids = torch.randint(0, 1027, (2, 5))
    head(embedding(ids)).square().mean().backward()
    expected = embedding.weight.grad
    assert expected is not None
    expected, embedding.weight.grad = expected.clone(), None
    surgery.swap(head, PaddedProjection, settings("cpu"))
    head(embedding(ids)).square().mean().backward()
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_sites() -> None:
    config = {"kernel_fusion": {"enable": True}}
    model = nn.ModuleDict(
        {
            "aligned": nn.Linear(8, 2048),
            "narrow": nn.Linear(8, 1001),
            "wide": nn.Linear(8, 30522),
            "subclass": type("Quantised", (nn.Linear,), {})(8, 30522),
        }
    )
    (row,) = oslo_fusion.plan(model, config).proposals
    assert row.site.path == "wide"
    assert row.outcome == "refused"
    assert "does not run on a GPU" in row.reason
