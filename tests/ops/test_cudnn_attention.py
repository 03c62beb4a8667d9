"""Attention with cuDNN's forward and our backward: the law, and the operator's manners."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.attention import ATTENTION, prepare
from oslo_fusion.ops.cudnn_attention import CUDNN_ATTENTION, cudnn_attention
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

HALF = (torch.float16, torch.bfloat16)
CASES = {  # batch, heads, kv_heads, queries, keys, dim
    "shared": (2, 8, 2, 9, 9, 16),
    "one for all": (1, 4, 1, 17, 17, 32),
    "not shared": (2, 3, 3, 8, 8, 64),
    "other keys": (2, 4, 2, 5, 12, 8),
}


def tensors(case: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    batch, heads, kv_heads, queries, keys, dim = CASES[case]
    draw = drawer(dtype, device, seed)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [draw(batch, tokens, h, dim).transpose(1, 2) for h, tokens in shapes]


def plain(causal: bool):  # type: ignore[no-untyped-def]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)


# Causal attention has as many queries as keys.
WAYS = [(case, causal) for case in CASES for causal in (True, False) if not (causal and case == "other keys")]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("case", "causal"), WAYS)
def test_the_law_holds(case: str, causal: bool, dtype: torch.dtype) -> None:
    compare(case, causal, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("case", "causal"), [("long", True), ("long", False), *WAYS])
def test_the_law_holds_on_a_gpu(case: str, causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "long", (2, 8, 2, 333, 333, 64))
    compare(case, causal, dtype, "cuda")


def compare(case: str, causal: bool, dtype: torch.dtype, device: str) -> None:
    draws = [tensors(case, dtype, device, seed) for seed in range(4)]
    found = prove(lambda q, k, v: cudnn_attention(q, k, v, 0.3, causal), plain(causal), *draws)
    for what, comparison in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert comparison.same, f"{case}, {what}: {comparison}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("causal", [True, False])
def test_logarithms_are_those_of_our_forward(causal: bool, device: str) -> None:
    q, k, v = tensors("shared", torch.bfloat16, device)
    wanted = ATTENTION(*prepare(q, k, v, scale=0.3, causal=causal))[1]
    torch.testing.assert_close(CUDNN_ATTENTION(q, k, v, 0.3, causal)[1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ["shared", "other keys"])
def test_it_is_a_good_operator(case: str, device: str) -> None:
    given = [x.requires_grad_() for x in tensors(case, torch.bfloat16, device)]
    # Half precision is compared by the law, above.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(CUDNN_ATTENTION, (*given, 0.3, False), test_utils=checks)


def test_logarithms_have_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in tensors("shared", torch.bfloat16))
    logs = CUDNN_ATTENTION(q, k, v, 0.3, True)[1]
    assert not logs.requires_grad


def test_single_precision_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cudnn_attention: q: received torch.float32\. .*Remedy: q.bfloat16\(\)"):
        cudnn_attention(*tensors("shared", torch.float32), 0.3, True)


def test_a_causal_mask_of_other_lengths_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"causal: received True with 5 queries and 12 keys\. .*Remedy: attention\(\)"):
        cudnn_attention(*tensors("other keys", torch.bfloat16), 0.3, True)


def test_a_second_derivative_is_an_error() -> None:
    q, k, v = (x.requires_grad_() for x in tensors("shared", torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"cudnn_attention: has no second derivative\. Remedy: create_graph=False"):
        torch.autograd.grad(cudnn_attention(q, k, v, 0.3, True).sum(), q, create_graph=True)
