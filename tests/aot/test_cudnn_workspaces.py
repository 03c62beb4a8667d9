"""Backwards of cuDNN's attention that our kernel computes instead, where memory is what counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from oslo_fusion.aot import Backend, Replacement, backend
from oslo_fusion.aot.cudnn_workspaces import spare_cudnn_workspaces
from oslo_fusion.aot.masks import keep_masks_in_sight
from oslo_fusion.ops.attention import attention
from oslo_fusion.ops.attention_backends import CUDNN, FLASH, OURS, run, run_masked

BATCH, HEADS, TOKENS, DIM = 2, 4, 9, 16
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(CUDNN, q, k, v, scale=0.3, causal=True) * 2


def under_a_constant_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As a routed model calls it; the mask says nothing but what the flag does."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).tril()[None, None]
    return run_masked(q, k, v, mask, False, CUDNN, CUDNN, 0.3, 0.0) * 2


def under_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(CUDNN, q, k, v, scale=0.3, mask=(q[:1, :1, :, :1] > 0).expand(1, 1, TOKENS, TOKENS))


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(CUDNN, q, k, v, scale=0.3, dropout=0.125)


def by_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return run(FLASH, q, k, v, scale=0.3, causal=True)


def other_lengths(causal: bool) -> Attend:
    return lambda q, k, v: run(CUDNN, q, k, v, scale=0.3, causal=causal)


def masked_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without its mask another backend computes it."""
    return run_masked(q, k, v, None, True, CUDNN, OURS, 0.3, 0.0)


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(attend(q, k, v), k, v)


def leaves(kv_heads: int = 1, dim: int = DIM) -> list[Tensor]:
    torch.manual_seed(0)
    drawn = [torch.randn(BATCH, TOKENS, h, dim).bfloat16() for h in (HEADS, kv_heads, kv_heads)]
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def spared(call: Attend, given: list[Tensor]) -> int:
    """How many the pass finds in Dynamo's graph. Nothing is run: cuDNN's operator has no CPU."""
    found: list[int] = []

    def look(graph: fx.GraphModule, _: object) -> Callable[..., list[Tensor]]:
        found.append(spare_cudnn_workspaces(graph))
        graph.graph.lint()
        return lambda *inputs: [torch.zeros_like(given[0])]

    torch._dynamo.reset()
    keep_masks_in_sight()
    torch.compile(call, backend=look, fullgraph=True)(*given)
    (count,) = found
    return count


def compiled_by(made: Backend, call: Attend = attend) -> Attend:
    torch._dynamo.reset()
    keep_masks_in_sight()
    return torch.compile(call, backend=made, fullgraph=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [attend, under_a_constant_mask])
@pytest.mark.parametrize("budget", [0.0, 0.25])
def test_gradients_and_the_row(call: Attend, budget: float) -> None:
    given, made = leaves(), Backend(budget, compiler="eager")
    out = compiled_by(made, call)(*given)
    wanted = attention(*given, scale=0.3, causal=True) * 2
    assert torch.equal(out, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(x.float().sum(), given) for x in (out, wanted)), strict=True):
        assert torch.equal(ours, theirs)
    assert [graph.workspaces for graph in made.record.graphs] == [1]
    (row,) = made.record.rows()
    assert (row.site.kind, row.outcome, row.after) == ("attention", "fused", "cuDNN's forward, our backward")


@pytest.mark.parametrize(
    ("call", "given", "found"),
    [
        (attend, leaves(), 1),
        (attend, leaves(2), 1),
        (attend, leaves(HEADS), 0),
        (attend, leaves(dim=64), 1),
        (attend, leaves(dim=128), 0),
        (attend, [x.detach() for x in leaves()], 0),
        (under_a_mask, leaves(), 0),
        (with_dropout, leaves(), 0),
        (by_flash, leaves(), 0),
        (other_lengths(causal=False), [leaves()[0], *(x[:, :, :5] for x in leaves()[1:])], 1),
        (other_lengths(causal=True), [leaves()[0], *(x[:, :, :5] for x in leaves()[1:])], 0),
        (masked_elsewhere, leaves(), 0),
        (twice, leaves(), 2),
    ],
    ids=[
        "shared",
        "by two",
        "not shared",
        "64",
        "128",
        "no gradient",
        "mask",
        "dropout",
        "flash",
        "other lengths",
        "other lengths, causal",
        "masked elsewhere",
        "twice",
    ],
)
def test_what_is_spared(call: Attend, given: list[Tensor], found: int) -> None:
    assert spared(call, given) == found


def test_none_without_gradients() -> None:
    def without_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run_masked(q, k, v, None, True, CUDNN, CUDNN, 0.3, 0.0)

    assert spared(without_a_mask, leaves()) == 1
    with torch.no_grad():
        assert spared(without_a_mask, leaves()) == 0


def test_none_where_there_are_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(backend, "spare_cudnn_workspaces", lambda _: asked.append(1) or 0)
    sine = Replacement(lambda x: torch.sin(x), lambda x: torch.sin(x), (torch.randn(3),), gradient=False)
    torch._dynamo.reset()
    torch.compile(lambda x: torch.cos(x) * 2, backend=Backend(0.0, replacements=[sine]))(torch.randn(3))
    assert not asked


@pytest.mark.parametrize(("budget", "spares"), [(0.0, True), (0.25, True), (0.3, False), (1.0, False)])
def test_only_where_memory_counts(budget: float, spares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(backend, "spare_cudnn_workspaces", lambda _: asked.append(1) or 0)
    torch._dynamo.reset()
    torch.compile(lambda x: torch.sin(x) * 2, backend=Backend(budget))(torch.randn(3))
    assert bool(asked) == spares


@pytest.mark.gpu
def test_no_workspace_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cuDNN's workspace, four times the attention's result here, nothing is left."""
    shapes = [(2, 1024, heads, 64) for heads in (32, 8, 8, 32)]
    *given, dout = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for shape in shapes)
    for leaf in given:
        leaf.requires_grad_()
    peaks = []
    for spares in (True, False):
        if not spares:
            monkeypatch.setattr(backend, "spare_cudnn_workspaces", lambda _: 0)
        made = Backend(0.0)
        compiled = compiled_by(made)
        for _ in range(2):  # the first compiles
            out = compiled(*given)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(out, given, dout)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert [graph.workspaces for graph in made.record.graphs] == [int(spares)]
    assert peaks[0] < peaks[1] - 3 * dout.nbytes
