"""What passes over Dynamo's graphs know of nodes, and leave alone: what writes in place, though nobody reads its result."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from oslo_fusion.aot import Backend, feed_forwards
from oslo_fusion.aot.nodes import erase_unused, writes
from oslo_fusion.ops.attention import attention
from oslo_fusion.ops.attention_backends import CUDNN, run
from oslo_fusion.testing import assert_close_to_reference

Site = Callable[[Tensor], Tensor]
TOKENS, DIM = 8, 16


def heads(x: Tensor, count: int) -> Tensor:
    return x[..., : count * DIM // 4].view(*x.shape[:2], count, DIM // 4).transpose(1, 2)


def masked_attention(x: Tensor) -> Tensor:
    """Its mask says nothing but what the flag does."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    return F.scaled_dot_product_attention(heads(x, 4), heads(x, 4), heads(x, 4), attn_mask=mask)


def shared_heads(x: Tensor) -> Tensor:
    return run(CUDNN, heads(x, 4), heads(x, 2), heads(x, 2), scale=0.5, causal=True)


def shared_heads_plainly(x: Tensor) -> Tensor:
    return attention(heads(x, 4), heads(x, 2), heads(x, 2), scale=0.5, causal=True)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(F.gelu(self.first(x)))
        return result


@pytest.mark.parametrize(
    ("site", "plain", "budget", "dtype"),
    [
        (masked_attention, None, 1.0, torch.float32),
        (shared_heads, shared_heads_plainly, 0.0, torch.bfloat16),
        (GatedMLP(), None, 0.0, torch.float32),
        (FeedForward().bfloat16(), None, 1.0, torch.bfloat16),
    ],
    ids=["masks", "cudnn_workspaces", "gated_mlps", "feed_forwards"],
)
def test_what_writes_in_place_is_kept(
    site: Site, plain: Site | None, budget: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forwards, "_DEVICE", "cpu")
    monkeypatch.setattr(feed_forwards, "FEWEST_ROWS", 2)

    plain = plain or site
    exact = copy.deepcopy(plain).double() if isinstance(plain, nn.Module) else plain

    def step(x: Tensor, steps: Tensor, kept: Tensor, site: Site = site) -> Tensor:
        steps.add_(1)
        torch.sum(x.detach(), dim=0, out=kept)
        halved = x * 1.0
        halved.mul_(0.5)
        F.relu(halved, inplace=True)
        return site(halved * 1.0)

    found, made = [], Backend(budget, compiler="eager")
    compiled = torch.compile(step, backend=made, fullgraph=True)
    for call, more, wide in ((compiled, {}, False), (step, {"site": plain}, False), (step, {"site": exact}, True)):
        x = torch.linspace(-2, 2, 2 * TOKENS * DIM).view(2, TOKENS, DIM).to(dtype)
        x = (x.double() if wide else x).requires_grad_()
        steps, kept = torch.zeros(1), torch.zeros_like(x[0])
        out = call(x, steps, kept, **more)
        found.append([out, *torch.autograd.grad(out.sum(), x), kept, steps])
    torch._dynamo.reset()
    assert float(found[0].pop()) == 1
    (graph,) = made.record.graphs
    assert graph.parts + graph.feed_forwards + graph.workspaces == (site is not masked_attention)
    for what, ours, theirs, truth in zip(("out", "dx", "kept"), *found, strict=False):
        assert_close_to_reference(ours, theirs, truth, what)


@pytest.mark.parametrize(
    ("target", "arguments", "options", "expected"),
    [
        ("add_", (1,), {}, True),
        (F.relu, (True,), {}, True),
        (F.relu, (), {"inplace": True}, True),
        (F.dropout, (0.1, True, True), {}, True),
        (torch.relu_, (), {}, True),
        (torch.sin, (), {"out": 0}, True),
        (operator.iadd, (1,), {}, True),
        (operator.setitem, (0, 1), {}, True),
        ("add", (1,), {}, False),
        (F.relu, (False,), {}, False),
        (F.dropout, (0.1, True), {}, False),
        (operator.add, (1,), {}, False),
        (operator.getitem, (0,), {}, False),
        ("__getitem__", (0,), {}, False),
    ],
)
def test_what_writes(target: Any, arguments: tuple[Any, ...], options: dict[str, Any], expected: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_method if isinstance(target, str) else graph.call_function
    assert writes(call(target, (x, *arguments), options)) == expected


@pytest.mark.parametrize("site", [GatedMLP(), FeedForward().bfloat16()], ids=["gated_mlps", "feed_forwards"])
@pytest.mark.parametrize("write", [lambda x: F.relu(x, True), lambda x: operator.iadd(x, 1.0)], ids=["relu", "iadd"])
def test_a_site_whose_input_is_written_to_is_left(
    site: nn.Module, write: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forwards, "_DEVICE", "cpu")
    monkeypatch.setattr(feed_forwards, "FEWEST_ROWS", 2)
    made, dtype = Backend(0.0, compiler="eager"), next(site.parameters()).dtype

    def step(x: Tensor, site: nn.Module = site) -> Tensor:
        y = x.detach() * 1.0
        write(y)
        return site(y)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    x = torch.linspace(-2, 2, 2 * TOKENS * DIM).view(2, TOKENS, DIM).to(dtype)
    ours, exact = torch.compile(step, backend=made, fullgraph=True)(x), step(x.double(), copy.deepcopy(site).double())
    assert_close_to_reference(ours, step(x), exact)
    (graph,) = made.record.graphs
    assert graph.parts + graph.feed_forwards == 0


def test_what_a_site_has_left_is_erased_and_nothing_else() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    written = graph.call_method("add_", (x, 1))
    read, alone = graph.call_function(torch.sin, (x,)), graph.call_function(torch.cos, (x,))
    inner = graph.call_function(torch.exp, (read,))
    left = graph.call_function(torch.mul, (inner, written))
    graph.output((read,))
    erase_unused([left, left])
    assert list(graph.nodes)[:-1] == [x, written, read, alone]
