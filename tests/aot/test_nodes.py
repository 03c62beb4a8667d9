"""What passes over Dynamo's graphs leave alone: what writes in place, though nobody reads its result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from oslo_fusion.aot import Backend, feed_forwards
from oslo_fusion.aot.nodes import erase_unused
from oslo_fusion.ops.attention import attention
from oslo_fusion.ops.attention_backends import CUDNN, run

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

    def step(x: Tensor, steps: Tensor, kept: Tensor, site: Site = site) -> Tensor:
        steps.add_(1)
        torch.sum(x.detach(), dim=0, out=kept)
        halved = x * 1.0
        halved.mul_(0.5)
        F.relu(halved, inplace=True)
        return site(halved * 1.0)

    found, made = [], Backend(budget, compiler="eager")
    for call in (torch.compile(step, backend=made, fullgraph=True), step):
        x = torch.linspace(-2, 2, 2 * TOKENS * DIM).view(2, TOKENS, DIM).to(dtype).requires_grad_()
        steps, kept = torch.zeros(1), torch.zeros(TOKENS, DIM, dtype=dtype)
        more = {} if call is not step or plain is None else {"site": plain}
        out = call(x, steps, kept, **more)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), x), steps, kept])
    torch._dynamo.reset()
    assert float(found[0][2]) == 1
    (graph,) = made.record.graphs
    assert graph.parts + graph.feed_forwards + graph.workspaces == (site is not masked_attention)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


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
