"""Feed-forward networks in compiled layers: found where it pays, under the law, with the backward's kernel in the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import oslo_fusion
from oslo_fusion.aot import Backend, Replacement, feed_forwards, room
from oslo_fusion.aot.record import Record
from oslo_fusion.ops import feed_forward as op
from oslo_fusion.testing import assert_close_to_reference

SIZES = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 1100}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with large batches, but on the CPU and without Inductor."""
    monkeypatch.setattr(room, "COMPILER", "eager")
    monkeypatch.setattr(feed_forwards, "_DEVICE", "cpu")
    monkeypatch.setattr(feed_forwards, "FEWEST_ROWS", 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the operator's implementation."""
    seen: list[int] = []
    original = op.gelu_backward_in_place
    monkeypatch.setattr(op, "gelu_backward_in_place", lambda d, h, a: (seen.append(len(h)), original(d, h, a))[1])
    return seen


def bert(act: str = "gelu") -> nn.Module:
    torch.manual_seed(0)
    found = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **QUIET, hidden_act=act)).train()
    for parameter in found.parameters():  # biases of zero would hide what the kernel does with them
        parameter.data += 0.02 * torch.randn_like(parameter)
    return found  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_inner": 88, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 1100}
    quiet = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    found = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet)).train()
    for parameter in found.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return found  # type: ignore[no-any-return]


def record(model: nn.Module) -> Record:
    found = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if row.room == "aot")
    assert isinstance(found, Record)
    return found


def gradients(model: nn.Module, *lengths: int) -> dict[str, Tensor]:
    """Of a step over batches of these lengths, accumulated."""
    model.zero_grad()
    for length in lengths:
        ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(length)).to(model.device)
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("options", "act"),
    [
        ({}, "gelu"),
        ({"scope": "model"}, "gelu"),
        ({"activation_memory_budget": 0}, "gelu_new"),
    ],
)
def test_bert_obeys_the_law_with_two_lengths_accumulated(options: dict[str, Any], act: str, calls: list[int]) -> None:
    ours = compared(bert(act), options, "cpu", 7, 9)
    assert sorted(calls) == [14, 14, 18, 18], "two layers, two lengths"
    assert all(graph.feed_forwards == (2 if options.get("scope") == "model" else 1) for graph in record(ours).graphs)


@pytest.mark.gpu
def test_bert_obeys_the_law_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ours = compared(bert(), {}, "cuda", 1024, 1030)
    assert all(graph.feed_forwards == 1 for graph in record(ours).graphs)


def test_gpt2_obeys_the_law_with_two_lengths_accumulated(calls: list[int]) -> None:
    ours = compared(gpt2(), {}, "cpu", 7, 9)
    assert sorted(calls) == [14, 14, 18, 18], "two layers, two lengths"
    assert all(graph.feed_forwards == 1 for graph in record(ours).graphs)


@pytest.mark.gpu
def test_gpt2_obeys_the_law_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ours = compared(gpt2(), {}, "cuda", 1024, 1030)
    assert all(graph.feed_forwards == 1 for graph in record(ours).graphs)


PARTS = {
    "bert": ("intermediate.dense.bias", "intermediate.dense.weight", "output.dense.bias", "output.dense.weight"),
    "gpt2": ("mlp.c_fc.bias", "mlp.c_fc.weight", "mlp.c_proj.bias", "mlp.c_proj.weight"),
}


def compared(model: Any, options: dict[str, Any], device: str, *lengths: int) -> Any:
    """A model of ours whose gradients were compared with those of the plain one, under the law."""
    plain = model.bfloat16().to(device)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    block = {"activation_memory_budget": 1, **options}
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block}}
    oslo_fusion.initialize(ours, config)
    found = [gradients(model, *lengths) for model in (ours, plain, exact)]
    row = next(row for row in oslo_fusion.report(ours).rows if row.site.kind == "feed-forward")
    assert (row.outcome, row.after) == ("fused", "both in one kernel")
    for part in PARTS[model.config.model_type]:
        names = [name for name in found[0] if name.endswith(part)]
        assert names
        columns = (torch.cat([gradient[name].flatten() for name in names]) for gradient in found)
        assert_close_to_reference(*columns, part)
    assert found[0].keys() == found[1].keys()
    return ours


class Network(nn.Module):
    def __init__(
        self,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        after: Callable[[Tensor], Tensor] = lambda h: h,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24, bias=bias), nn.Linear(24, 8)
        self.activation, self.after = activation, after

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.after(self.activation(self.first(x))))


def compiled(model: nn.Module, x: Tensor, **options: Any) -> int:
    """A step; how many sites there were. Gradients obey the law."""
    torch._dynamo.reset()  # else the next is another version of the last one's function
    twin, exact, made = copy.deepcopy(model), copy.deepcopy(model).double(), Backend(compiler="eager", **options)
    for call, given in ((torch.compile(model, backend=made, fullgraph=True), x), (twin, x), (exact, x.double())):
        call(given).float().square().sum().backward()
    for parameters in zip(model.parameters(), twin.parameters(), exact.parameters(), strict=True):
        mine, theirs, truth = (parameter.grad for parameter in parameters)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_close_to_reference(mine, theirs, truth, "gradient", norm="l2")
    (graph,) = made.record.graphs
    assert len(made.record.rows()) == bool(graph.feed_forwards)
    return graph.feed_forwards


class Rows(nn.Module):
    """As GPT-2's: ``addmm`` of rows, between views, with weights ``[in, out]``."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = lambda h: h.view(2, 2, 24),
        after: Callable[[Tensor], Tensor] = lambda h: h.view(-1, 24),
        scales: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.first, self.second = Conv1D(24, 8), Conv1D(8, 24)
        self.between, self.after, self.scales = between, after, scales or {}

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.first.bias, x[:4].view(-1, 8), self.first.weight, **self.scales)
        return torch.addmm(self.second.bias, self.after(F.gelu(self.between(h), approximate="tanh")), self.second.weight)


class Mixed(nn.Module):
    """A layer of each kind."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


X = torch.linspace(-2, 2, 40).reshape(5, 8).bfloat16()


@pytest.mark.parametrize(
    ("build", "sites"),
    [
        (Network, 1),
        (lambda: Network(lambda x: F.gelu(x, approximate="tanh")), 1),
        (lambda: Network(after=lambda h: F.dropout(h, 0.0)), 1),
        (lambda: Network(F.silu), 0),
        (lambda: Network(F.relu), 0),
        (lambda: Network(after=lambda h: h + 1), 0),
        (lambda: Network(after=lambda h: h * h), 0),
        (lambda: Network(bias=False), 0),
        (lambda: Network(after=lambda h: h.flip(0)), 0),
        (Rows, 1),
        (lambda: Rows(lambda h: h, lambda h: F.dropout(h.reshape(4, 24), 0.0)), 1),
        (lambda: Rows(scales={"alpha": 2}), 0),
        (lambda: Rows(scales={"beta": 0.5}), 0),
        (lambda: Rows(lambda h: h.view(2, 48)), 0),
        (lambda: Rows(after=lambda h: h.transpose(0, 1).reshape(-1, 24)), 0),
        (lambda: Rows(after=lambda h: h.view(2, -1).view(-1, 24)), 0),
        (lambda: Mixed(nn.Linear(8, 24), Conv1D(8, 24)), 1),
        (lambda: Mixed(Conv1D(24, 8), nn.Linear(24, 8)), 1),
    ],
)
def test_what_is_a_site(build: Callable[[], Network], sites: int) -> None:
    assert compiled(build().bfloat16(), X) == sites


def test_what_is_frozen_shared_or_the_users_own_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first.bias", "first.weight", "second.weight"):
        model = Network().bfloat16()
        model.get_parameter(name).requires_grad_(False)
        assert compiled(model, X) == 0
    model = Network().bfloat16()
    model.second.bias.requires_grad_(False)
    assert compiled(model, X) == 1

    class Looked(Network):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(F.gelu(h)) + h[..., :8]

    assert compiled(Looked().bfloat16(), X) == 0
    assert compiled(Network(), X.float()) == 0, "float32"
    pattern = Replacement(lambda x: x.sinh(), lambda x: x.sinh(), (torch.randn(2, 3),), gradient=False)
    assert compiled(Network().bfloat16(), X, replacements=[pattern]) == 0
    monkeypatch.setattr(feed_forwards, "FEWEST_ROWS", 6)
    assert compiled(Network().bfloat16(), X) == 0
    monkeypatch.undo()
    assert compiled(Network().bfloat16(), X) == 0, "not on a GPU"


@pytest.mark.parametrize("build", [Network, lambda: Mixed(Conv1D(24, 8), Conv1D(8, 24))])
def test_dynamic_rows_stay_dynamic(build: Callable[[], nn.Module]) -> None:
    model, made = build().bfloat16(), Backend(compiler="eager")
    step = torch.compile(model, backend=made, dynamic=True)
    for rows in (5, 3, 12, 40):
        step(X[:1].expand(rows, 8).contiguous()).sum().backward()
    assert [graph.feed_forwards for graph in made.record.graphs] == [1]


@pytest.mark.parametrize("build", [Network, Rows])
def test_autocast(build: Callable[[], nn.Module]) -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(model, X.float()) == 1
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_gradients_lie_as_their_weights_do() -> None:
    model = Mixed(Conv1D(24, 8), nn.Linear(24, 8)).bfloat16()
    made: list[tuple[tuple[int, ...], ...]] = []
    for name in ("first.weight", "second.weight"):
        weight = model.get_parameter(name)
        weight.register_hook(lambda gradient, weight=weight: made.append((gradient.stride(), weight.stride())))
    assert compiled(model, X) == 1
    assert made
    assert all(gradient == weight for gradient, weight in made)


@pytest.mark.usefixtures("_fresh_compiler")
def test_inductor_takes_the_operator(calls: list[int]) -> None:
    model = Network().bfloat16()
    made = Backend()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        result = torch.compile(model, backend=made)(X)
    result.sum().backward()
    assert sum(t.shape[-1] == 24 and t.numel() == 5 * 24 for t in kept) == 1, "the pre-activation, not GELU's output"
    assert (calls, made.record.graphs[0].feed_forwards) == ([5], 1)
