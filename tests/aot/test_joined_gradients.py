"""Attention whose q, k and v are split from one tensor: in compiled graphs its gradients are written side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from oslo_fusion.aot import Backend, backend
from oslo_fusion.aot.joined_gradients import join_gradients
from oslo_fusion.ops.attention import ATTENTION_BACKWARD, ATTENTION_BACKWARD_JOINED, attention

HEADS, DIM = 2, 16
Attend = Callable[..., Tensor]


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], -1, DIM).transpose(1, 2)


def merged(out: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def split_in_three(qkv: Tensor, **options: Any) -> Tensor:
    """As GPT-2 does."""
    return merged(attention(*map(heads, qkv.split(HEADS * DIM, dim=2)), causal=True, **options))


def grouped(qkv: Tensor) -> Tensor:
    """Keys of one head, as in GPT-BigCode and Falcon."""
    return merged(attention(*map(heads, qkv.split([3 * DIM, DIM, DIM], dim=-1)), causal=True))


def in_packed_sequences(qkv: Tensor) -> Tensor:
    """As a routed module calls it with cumulative lengths."""
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = (heads(x).squeeze(0).transpose(0, 1) for x in qkv.split(HEADS * DIM, dim=2))
    out = attention(q, k, v, cu_seqlens_q=ends, max_seqlen_q=5, causal=True)
    return out.unsqueeze(0).reshape(1, 9, -1)


def in_another_order(qkv: Tensor) -> Tensor:
    k, q, v = map(heads, qkv.split(HEADS * DIM, dim=2))
    return merged(attention(q, k, v, causal=True))


def by_head(qkv: Tensor) -> Tensor:
    """As GPT-NeoX does: the three of each head beside one another."""
    q, k, v = qkv.view(*qkv.shape[:2], HEADS, 3 * DIM).transpose(1, 2).chunk(3, dim=-1)
    return merged(attention(q, k, v, causal=True))


def looked_at(qkv: Tensor) -> Tensor:
    """The keys have a second gradient."""
    q, k, v = map(heads, qkv.split(HEADS * DIM, dim=2))
    return merged(attention(q, k, v, causal=True) + k)


def one_more(qkv: Tensor) -> Tensor:
    q, k, v, gate = qkv.split([DIM * HEADS] * 3 + [0], dim=2)
    return merged(attention(*map(heads, (q, k, v)), causal=True)) + gate.sum()


def of_half_the_heads(qkv: Tensor) -> Tensor:
    """A row of each part is half a token's."""
    rows = qkv.view(qkv.shape[0], 2 * qkv.shape[1], -1)
    q, k, v = rows.split(HEADS * DIM // 2, dim=2)
    q, k, v = (x.view(x.shape[0], -1, HEADS, DIM).transpose(1, 2) for x in (q.contiguous(), k.contiguous(), v.contiguous()))
    return merged(attention(q, k, v, causal=True))


def by_vendor(qkv: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*map(heads, qkv.split(HEADS * DIM, dim=2)), is_causal=True))


def drawn(batch: int = 2, tokens: int = 9, seed: int = 0, device: str = "cpu") -> Tensor:
    made = torch.randn(batch, tokens, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(seed))
    return made.bfloat16().to(device)


def gradient(call: Attend, given: Tensor) -> Tensor:
    torch.manual_seed(0)
    leaf = given.detach().requires_grad_()
    return torch.autograd.grad(call(leaf * 1.0).float().square().sum(), leaf)[0]


def counted(graph: fx.Graph) -> tuple[int, ...]:
    targets = (ATTENTION_BACKWARD, ATTENTION_BACKWARD_JOINED, torch.ops.aten.cat.default)
    return tuple(len(graph.find_nodes(op="call_function", target=target)) for target in targets)


def with_the_pass(call: Attend, given: Tensor, **options: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The gradient by a graph that went through the pass, without Inductor; and what is in it."""
    seen: list[tuple[int, ...]] = []

    def backward(graph: fx.GraphModule, _: Any) -> Any:
        join_gradients(graph.graph)
        graph.graph.lint()
        graph.recompile()
        seen.append(counted(graph.graph))
        return _boxed(graph)

    compiler = aot_autograd(fw_compiler=lambda graph, _: _boxed(graph), bw_compiler=backward)
    found = gradient(torch.compile(call, backend=compiler, fullgraph=True, **options), given)
    (what,) = seen
    return found, what


def _boxed(graph: fx.GraphModule) -> Any:
    from functorch.compile import make_boxed_func

    return make_boxed_func(graph.forward)


@pytest.mark.parametrize(
    ("call", "given", "found"),
    [
        (split_in_three, drawn(), (0, 1, 0)),
        (lambda qkv: split_in_three(qkv, dropout=0.25), drawn(), (0, 1, 0)),
        (lambda qkv: split_in_three(qkv.view(1, 18, -1)), drawn(), (0, 1, 0)),
        (grouped, drawn()[..., : 5 * DIM], (0, 1, 0)),
        (in_packed_sequences, drawn(1), (0, 1, 0)),
        (in_another_order, drawn(), (1, 0, 1)),
        (by_head, drawn(), (1, 0, 1)),
        (looked_at, drawn(), (1, 0, 1)),
        (one_more, drawn(), (1, 0, 1)),
        (of_half_the_heads, drawn(), (1, 0, 1)),
        (by_vendor, drawn(), (0, 0, 1)),
    ],
)
def test_the_same_bits_and_no_concatenation_where_it_can_be(call: Attend, given: Tensor, found: tuple[int, ...]) -> None:
    ours, what = with_the_pass(call, given)
    assert what == found
    assert torch.equal(ours, gradient(torch.compile(call, backend="aot_eager", fullgraph=True), given))


class Layer(nn.Module):
    """A merged projection and its attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(24, 3 * HEADS * DIM).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return split_in_three(self.project(x), dropout=0.25)


def test_any_batch_and_length() -> None:
    layer, made = Layer(), []

    def backward(graph: fx.GraphModule, _: Any) -> Any:
        join_gradients(graph.graph)
        graph.recompile()
        made.append(counted(graph.graph))
        return _boxed(graph)

    compiler = aot_autograd(fw_compiler=lambda graph, _: _boxed(graph), bw_compiler=backward)
    compiled = torch.compile(layer, backend=compiler, dynamic=True)
    for batch, tokens in ((2, 9), (3, 7), (5, 12)):
        given = drawn(batch, tokens)[..., :24].contiguous()
        assert torch.equal(gradient(compiled, given), gradient(layer, given))
    assert made == [(0, 1, 0)]


class Counted(Backend):
    """A backend that knows what is in the graphs that it compiled."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []
        super().__init__(passes=[self.graphs.append])


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_takes_it(dynamic: bool) -> None:
    compare_with_and_without(9, dynamic, "cpu")


@pytest.mark.gpu
def test_inductor_takes_it_on_a_gpu() -> None:
    compare_with_and_without(333, False, "cuda")


def compare_with_and_without(tokens: int, dynamic: bool, device: str) -> None:
    layer, given = Layer().to(device), drawn(2, tokens, device=device)[..., :24].contiguous()
    found, results = [], []
    for joins in (True, False):
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            if not joins:
                patch.setattr(backend, "join_gradients", lambda _: None)
            made = Counted()
        results.append(gradient(torch.compile(layer, backend=made, dynamic=dynamic), given))
        found.append([counted(graph) for graph in made.graphs])
    assert found == [[(0, 0, 0), (0, 1, 0)], [(0, 0, 0), (1, 0, 1)]]
    assert torch.equal(*results)
