"""Masks that a traced model makes of nothing but numbers, taken away from attention when its graph is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from oslo_fusion import initialize, restore
from oslo_fusion.aot.masks import simplify_masks
from oslo_fusion.models import build_model
from oslo_fusion.ops.attention import ATTENTION, attention

Function = Callable[..., Tensor]


def attentions(function: Function, *inputs: Tensor, dynamic: bool | None = None) -> list[tuple[Any, bool]]:
    """Mask and flag of each attention in the function's graph, after simplification; the results are compared."""
    found: list[tuple[Any, bool]] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        simplify_masks(graph)
        for node in graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            found.append((mask, bool(node.kwargs.get("is_causal", False))))
        for node in graph.graph.find_nodes(op="call_function", target=ATTENTION):
            found.append((node.args[7], node.args[13] == 0))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    return found


def causal(size: int) -> Tensor:
    return (torch.arange(size)[:, None] >= torch.arange(size)[None, :])[None, None]


def everything(size: int) -> Tensor:
    return (torch.arange(size)[:, None] >= -torch.arange(size)[None, :])[None, None]


def window(size: int) -> Tensor:
    distance = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    return ((distance >= 0) & (distance < 3))[None, None]


def torchs(mask: Callable[[int], Tensor]) -> Function:
    def function(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, mask(k.shape[2])[:, :, -q.shape[2] :], 0.0)

    return function


def ours(mask: Callable[[int], Tensor]) -> Function:
    def function(q: Tensor, k: Tensor) -> Tensor:
        return attention(q, k, k, mask=mask(k.shape[2])[:, :, -q.shape[2] :])

    return function


@pytest.mark.parametrize("wrap", [torchs, ours])
def test_what_a_constant_mask_says_is_said_by_the_flag_or_not_at_all(wrap: Any) -> None:
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    assert attentions(wrap(causal), q, k) == [(None, True)]
    assert attentions(wrap(everything), q, k) == [(None, False)]


@pytest.mark.parametrize("wrap", [torchs, ours])
def test_masks_that_say_more_stay(wrap: Any) -> None:
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    for mask, queries in ((window, q), (causal, q[:, :, :4])):  # the flag and the mask are aligned differently in the second
        ((found, flag),) = attentions(wrap(mask), queries, k)
        assert isinstance(found, fx.Node)
        assert not flag


def test_masks_that_depend_on_an_input_or_on_its_size_stay() -> None:
    def by_value(q: Tensor, seen: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=causal(9) & seen)

    q = torch.randn(2, 2, 9, 8)
    ((found, _),) = attentions(by_value, q, torch.ones(2, 1, 1, 9, dtype=torch.bool))
    assert isinstance(found, fx.Node)
    ((found, _),) = attentions(torchs(causal), q, q.clone(), dynamic=True)
    assert isinstance(found, fx.Node)


def test_a_mask_that_something_writes_to_or_that_is_random_stays() -> None:
    def written(q: Tensor) -> Tensor:
        mask = causal(9)
        mask[..., 0] = False
        mask[..., 0, 0] = True
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    def drawn(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=(torch.rand(1, 1, 9, 9) >= 0) & causal(9))

    def tossed(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.bernoulli(torch.ones(1, 1, 9, 9)).bool() & causal(9))

    for function in (written, drawn, tossed):
        ((found, _),) = attentions(function, torch.randn(2, 2, 9, 8))
        assert isinstance(found, fx.Node)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_whole_model_has_no_mask_and_the_same_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr("oslo_fusion.aot.backend.simplify_masks", lambda graph: counts.append(simplify_masks(graph)))
    monkeypatch.setattr("oslo_fusion.aot.room.COMPILER", "eager")
    model: Any = build_model(name, size="tiny", dtype="float32", device="cpu").eval()
    model.config.use_cache = False
    ids = torch.randint(5, 500, (2, 16))
    before = model(input_ids=ids).logits
    initialize(model, {"kernel_fusion": {"enable": True, "memory_efficient_fusion": {"scope": "model"}}})
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert counts[0] == 2
    padded = torch.ones_like(ids)
    padded[0, 12:] = 0
    masked = model(input_ids=ids, attention_mask=padded).logits
    assert counts[-1] == 0
    restore(model)
    torch.testing.assert_close(masked, model(input_ids=ids, attention_mask=padded).logits)
