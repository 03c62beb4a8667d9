"""Linear layers of one input in compiled graphs: found where they are small, one matmul, every parameter's gradient its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, distributed, fx, nn
from torch.nn import functional as F

import oslo_fusion
from oslo_fusion.aot import Backend, Replacement, backend, merged_linears, room
from oslo_fusion.aot.record import Graph, Record
from oslo_fusion.ops.merged_linear import GRADIENTS, SUM_OF_MATMULS, merged_linear
from oslo_fusion.testing import assert_close_to_reference

DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 64, "decoder_start_token_id": 0}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[int]]] = {  # class, sizes, and groups in each program of its layers
    "BERT": ("BertForMaskedLM", {**BERT, **DROPLESS}, [1]),
    "T5": ("T5ForConditionalGeneration", {**T5, "dropout_rate": 0.0}, [1, 1, 2, 2]),  # decoders: q, k, v; then k and v
    "Llama": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 2}, [2]),  # q, k, v of two widths; gate and up
}


def everything_pays(tokens: int, dim: int, out: int, dtype: torch.dtype, device: str) -> bool:
    return out >= 16


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "COMPILER", "eager")
    monkeypatch.setattr(merged_linears, "pays", everything_pays)


def family(name: str) -> nn.Module:
    cls, sizes, _ = FAMILIES[name]
    model = getattr(transformers, cls)
    return model(model.config_class(**sizes)).double().train()  # type: ignore[no-any-return]


def fuse(model: nn.Module, budget: float = 1.0, scope: str = "layer") -> nn.Module:
    block = {"activation_memory_budget": budget, "scope": scope}
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block}}
    return oslo_fusion.initialize(model, config)


def gradients(model: nn.Module, length: int = 7) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(3)).to(device)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def graphs(model: nn.Module) -> list[Graph]:
    found = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if row.room == "aot")
    assert isinstance(found, Record)
    return found.graphs


@pytest.mark.parametrize(
    ("name", "budget", "scope"),
    [("BERT", 1.0, "layer"), ("BERT", 0.0, "model"), ("T5", 1.0, "layer"), ("Llama", 1.0, "layer")],
)
def test_every_family_has_its_groups_and_the_same_gradients(name: str, budget: float, scope: str) -> None:
    model = family(name)
    twin = copy.deepcopy(model)
    fuse(model, budget, scope)
    for length in (7, 9):
        mine, theirs = gradients(model, length), gradients(twin, length)
        assert mine.keys() == theirs.keys()
        for key, gradient in theirs.items():
            torch.testing.assert_close(mine[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    found = [graph.merged for graph in graphs(model) if graph.version == 0]
    assert found == (FAMILIES[name][2] if scope == "layer" else [2])
    assert [graph.merged for graph in graphs(model) if graph.version] == found, "with a length that is dynamic"
    row = next(row for row in oslo_fusion.report(model).rows if row.site.kind == "linear layers of one input")
    assert (row.outcome, row.after) == ("fused", "one matmul")
    assert str(max(found)) in row.reason


@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients_own_their_memory(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do elsewhere: accumulated, zeroed in place and clipped without a look at what lies beside them."""
    monkeypatch.setattr(merged_linears, "GRADIENT", form)
    model = family("BERT")
    twin = copy.deepcopy(model)
    fuse(model)
    for _ in range(2):
        found = gradients(model)
    expected = gradients(twin)
    memory = {gradient.untyped_storage().data_ptr() for gradient in found.values()}
    assert len(memory) == len(found)
    for key, gradient in found.items():
        assert gradient.is_contiguous()
        assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size(), key
    for each in (model, twin):
        each.zero_grad(set_to_none=False)
        ids = torch.arange(3, 17).reshape(2, 7)
        for _ in range(2):
            each(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(each.parameters(), 0.5)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert expected.keys() == found.keys()


@pytest.mark.parametrize("form", GRADIENTS)
def test_what_runs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matmul forward and no copy of its outputs, for attention reads views; backward as the form says."""
    seen: list[fx.GraphModule] = []
    run = backend._as_it_is
    monkeypatch.setattr(backend, "_as_it_is", lambda graph, *given, **named: (seen.append(graph), run(graph, *given))[1])
    monkeypatch.setattr(merged_linears, "GRADIENT", form)
    layer = transformers.models.bert.modeling_bert.BertSelfAttention(
        transformers.BertConfig(**BERT, **DROPLESS, attn_implementation="sdpa")
    ).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    made = Backend(compiler="eager")
    torch.compile(layer, backend=made)(x)[0].sum().backward()
    assert made.record.graphs[0].merged == 1
    aten = torch.ops.aten
    counts = [[sum(n.target is t for n in g.graph.nodes) for t in (aten.addmm.default, aten.mm.default)] for g in seen]
    sums = sum(n.target is SUM_OF_MATMULS for n in seen[1].graph.nodes)
    assert (counts[0], counts[1], sums) == ([1, 0], *(([0, 4], 0) if form == "side_by_side" else ([0, 3], 1)))
    assert not any(n.target in (aten.clone.default, aten.copy.default) for n in seen[0].graph.nodes)
    kept = seen[0].graph.output_node().args[0]
    assert not any(n.target is aten.cat.default for n in kept), "a copy of the parameters is kept for the backward"


class Parts(nn.Module):
    """Three linear layers of one input, and what a test puts around them."""

    def __init__(
        self,
        run: Callable[..., Any] = lambda self, x: (self.q(x), self.k(x), self.v(x)),
        bias: tuple[bool, bool, bool] = (True, True, True),
        width: int = 16,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, width, bias=b) for b in bias)
        self.low = nn.Linear(16, 2)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def compiled(model: nn.Module, x: Tensor, **options: Any) -> tuple[Graph, Any]:
    made = Backend(compiler="eager", **options)
    result = torch.compile(model, backend=made, fullgraph=True)(x)
    return made.record.graphs[0], result


def frozen(model: Parts) -> Parts:
    model.q.requires_grad_(False)
    return model


def tied(model: Parts) -> Parts:
    model.k.weight = model.q.weight
    return model


def in_modes(self: Parts, x: Tensor) -> tuple[Tensor, ...]:
    q = self.q(x)
    with torch.no_grad():
        k = self.k(x)
    return q, k.detach(), self.v(x)


@pytest.mark.parametrize(
    ("model", "groups", "reason"),
    [
        (Parts, 1, ""),
        (lambda: Parts(bias=(False, False, False)), 1, ""),
        (lambda: Parts(bias=(True, False, True)), 1, ""),  # Whisper's k
        (lambda: Parts(lambda s, x: (s.q(x), F.linear(input=x, weight=s.k.weight), s.low(x))), 1, ""),
        (lambda: Parts(lambda s, x: (s.q(x), s.k(x).unflatten(-1, (2, 8)).transpose(1, 2))), 1, ""),
        (lambda: Parts(lambda s, x: (s.q(x), s.k(x + 1), s.v(x))), 0, ""),  # another input between
        (lambda: Parts(lambda s, x: (s.q(x), s.k(x + 1))), 0, ""),
        (lambda: Parts(in_modes), 0, ""),
        (lambda: Parts(lambda s, x: (s.q(x), s.low(x))), 0, ""),
        (lambda: frozen(Parts()), 0, "some of their parameters are frozen"),
        (lambda: tied(Parts()), 0, "share a weight"),
        (lambda: Parts(lambda s, x: (s.q(x), F.linear(x, s.k.weight * 2))), 0, "a weight or bias is computed"),
        (lambda: Parts(lambda s, x: (s.q(x).mul_(2), s.k(x))), 0, "is written to"),
        (lambda: Parts(lambda s, x: (s.q(x), s.k(x).view(-1, 8).add_(1))), 0, "is written to"),
    ],
)
def test_what_is_a_group_and_why_not(model: Callable[[], Parts], groups: int, reason: str) -> None:
    module, x = model(), torch.randn(3, 5, 16)
    twin = copy.deepcopy(module)
    found, results = compiled(module, x.clone())
    expected = twin(x.clone())
    assert found.merged == groups
    assert reason in found.apart[0] if reason else not found.apart
    for each in (results, expected):
        sum(t.square().sum() for t in each).backward()
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_an_output_that_nobody_uses_has_no_gradient() -> None:
    module = Parts()
    found, (q, _, _) = compiled(module, torch.randn(3, 16))
    q.sum().backward()
    assert found.merged == 1
    assert module.q.weight.grad is not None
    assert module.k.weight.grad is None or not module.k.weight.grad.any()


def test_autocast_no_gradients_and_kernels_of_the_users_own() -> None:
    module, x = Parts(), torch.randn(3, 16)
    twin = copy.deepcopy(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, results = compiled(module, x)
        expected = twin(x)
    assert found.merged == 1
    for each in (results, expected):
        sum(t.float().square().sum() for t in each).backward()
    for mine, theirs in zip(results, expected, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert mine.grad.dtype == torch.float32
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-2)

    with torch.no_grad():
        found, results = compiled(Parts(), x)
    assert found.merged == 1

    pattern = Replacement(lambda x: x.sinh(), lambda x: x.sinh(), (torch.randn(2, 3),), gradient=False)
    found, _ = compiled(Parts(), x, replacements=[pattern])
    assert found.merged == 0, "one of them may be part of it"


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    half = torch.bfloat16
    pays = merged_linears.pays
    assert pays(32768, 768, 768, half, "cuda")  # BERT-base, T5-base
    assert pays(2048, 1024, 1024, torch.float16, "cuda")
    assert pays(16384, 896, 128, half, "cuda")  # Qwen 0.5B's k and v
    assert not pays(16384, 2048, 512, half, "cuda"), "Llama 1B's k and v: the device is full"
    assert not pays(32768, 768, 3072, half, "cuda")
    assert not pays(32768, 768, 8, half, "cuda"), "an adapter"
    assert not pays(32768, 768, 100, half, "cuda"), "attention would copy what is not aligned"
    assert not pays(2047, 768, 768, half, "cuda")
    assert not pays(32768, 768, 768, torch.float32, "cuda")
    assert not pays(32768, 768, 768, half, "cpu")

    monkeypatch.setattr(merged_linears, "DEVICE", "cpu")  # where it would pay, what is too wide or narrow says so
    monkeypatch.setattr(merged_linears, "FEWEST_TOKENS", 8)
    x = torch.randn(8, 16, dtype=half)
    found, _ = compiled(Parts(width=64).to(half), x)
    assert (found.merged, found.apart) == (1, ())
    found, _ = compiled(Parts(width=32).to(half), x)
    assert (found.merged, len(found.apart)) == (0, 1)
    assert "16 columns in and 32, 32, 32 out" in found.apart[0]
    assert compiled(Parts(width=32).to(half), x[:4])[0].apart == ()
    assert compiled(Parts(width=64), x.float())[0].merged == 0


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_tensors_spread_over_devices_are_left_alone() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = Parts(bias=(False, False, False))
        for linear in (model.q, model.k, model.v):
            linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
        x = distribute_tensor(torch.randn(3, 16), mesh, [Replicate()])
        found, results = compiled(model, x)
        sum(results).to_local().sum().backward()
        assert found.merged == 0
        assert "DTensor" in found.apart[0]
        assert isinstance(model.q.weight.grad, DTensor)
    finally:
        distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("form", GRADIENTS)
@pytest.mark.parametrize("name", ["BERT", "T5"])
def test_the_law_on_a_gpu(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of the base sizes, compiled by Inductor, every gradient beside float32 and the untouched model's."""
    monkeypatch.undo()
    monkeypatch.setattr(merged_linears, "GRADIENT", form)
    cls, sizes, groups = FAMILIES[name]
    wide = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 1024}
    wide = wide if name == "BERT" else {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12}
    make = getattr(transformers, cls)
    truth = make(make.config_class(**{**sizes, **wide})).cuda().train()
    plain = copy.deepcopy(truth).to(torch.bfloat16)
    ours = fuse(copy.deepcopy(plain))
    assert torch.get_float32_matmul_precision() == "highest"
    expected, same, mine = (gradients(model, 1024) for model in (truth, plain, ours))
    assert [graph.merged for graph in graphs(ours)] == groups
    assert mine.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_close_to_reference(mine[key], same[key], gradient, key, norm="l2")


def test_the_operator_is_what_the_pass_puts_in() -> None:
    module, x = Parts(), torch.randn(3, 16)
    seen: list[fx.GraphModule] = []

    def look(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        assert merged_linears.merge_linears(graph) == merged_linears.Merged(1)
        seen.append(graph)
        return graph.forward

    for mine, theirs in zip(torch.compile(module, backend=look)(x), module(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    targets = [node.target for node in seen[0].graph.nodes if node.op == "call_function"]
    assert targets.count(merged_linear) == 1
    assert not any(target in (F.linear, torch._C._nn.linear) for target in targets)
