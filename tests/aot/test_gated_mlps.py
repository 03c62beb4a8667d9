"""Gated MLPs in compiled layers: found in every family, cut at low budgets only, the same gradients in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, distributed, fx, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import oslo_fusion
from oslo_fusion.aot import Backend, Replacement, backend, gated_mlps, room
from oslo_fusion.aot.record import Record
from oslo_fusion.ops import gated_mlp as op

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 88, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 64, "dropout_rate": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {  # the model's class, its sizes, and how many programs its layers make
    "Llama": ("LlamaForCausalLM", {**SIZES, "mlp_bias": True}, 1),
    "Mistral": ("MistralForCausalLM", SIZES, 1),
    "Qwen 3": ("Qwen3ForCausalLM", SIZES, 1),
    "Gemma": ("GemmaForCausalLM", SIZES, 1),
    "Phi-3": ("Phi3ForCausalLM", SIZES, 1),
    "T5 v1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}, 4),
}


def config(budget: float) -> dict[str, Any]:
    block = {"activation_memory_budget": budget}
    return {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block}}


def family(name: str) -> nn.Module:
    cls, sizes, _ = FAMILIES[name]
    model = getattr(transformers, cls)
    return model(model.config_class(**sizes)).double().train()  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def record(model: nn.Module) -> Record:
    found = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if row.room == "aot")
    assert isinstance(found, Record)
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "COMPILER", "eager")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_has_its_sites_and_the_same_gradients(name: str) -> None:
    model = family(name)
    twin = copy.deepcopy(model)
    oslo_fusion.initialize(model, config(0))
    mine, theirs = gradients(model), gradients(twin)
    assert [graph.parts for graph in record(model).graphs] == [1] * FAMILIES[name][2]
    assert record(model).recompiles == 0
    row = next(row for row in oslo_fusion.report(model).rows if row.site.kind == "gated MLP")
    assert (row.outcome, row.after) == ("fused", "backward in parts")
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-9, atol=1e-12, msg=key)


class MLP(nn.Module):
    def __init__(
        self, activation: Callable[[Tensor], Tensor] = F.silu, after: Callable[[Tensor], Tensor] = lambda h: h
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.activation, self.after = activation, after

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.after(self.activation(self.gate(x)) * self.up(x)))


def stack() -> Any:
    """A model of two layers, each an MLP."""
    model = nn.Module()
    model.layers = nn.ModuleList([MLP(), MLP()])
    return model


def test_only_where_the_dial_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[float] = []
    find = backend.cut_gated_mlps
    for budget in (0, 0.25, 0.26, 1):
        monkeypatch.setattr(backend, "cut_gated_mlps", lambda graph, b=budget: (looked.append(b), find(graph))[1])
        model = oslo_fusion.initialize(stack(), config(budget))
        model.layers[1](torch.randn(3, 8)).sum().backward()
        cut = any(row.site.kind == "gated MLP" for row in oslo_fusion.report(model).rows)
        assert cut == (budget <= 0.25)
    assert looked == [0, 0.25]


def compiled(model: Callable[..., Any], *inputs: Tensor) -> tuple[Record, Any]:
    """What a low budget makes of it, and the outcome of a step; gradients arrive where they belong."""
    made = Backend(0.1, compiler="eager")
    result = torch.compile(model, backend=made, fullgraph=True)(*inputs)
    return made.record, result


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def written_out(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@pytest.mark.parametrize(
    ("model", "parts", "reason"),
    [
        (lambda: MLP(written_out), 1, ""),
        (lambda: MLP(lambda x: F.gelu(x, approximate="tanh")), 1, ""),
        (lambda: MLP(after=lambda h: F.dropout(h, 0.0)), 1, ""),
        (lambda: MLP(quick_gelu), 0, ""),
        (lambda: MLP(F.relu), 0, ""),
        (lambda: MLP(after=lambda h: F.dropout(h, 0.1)), 0, "dropout between the product and the projection down"),
        (lambda: MLP(after=lambda h: h + 1), 0, "something else than a linear layer reads the product"),
        (lambda: MLP(lambda x: F.silu(F.dropout(x, 0.5))), 0, "its gate is not the output of a linear layer alone"),
    ],
)
def test_what_is_a_site_and_why_not(model: Callable[[], MLP], parts: int, reason: str) -> None:
    module = model()
    found, result = compiled(module, torch.randn(3, 8))
    result.sum().backward()
    assert found.graphs[0].parts == parts
    assert all(p.grad is not None for p in module.parameters())
    said = found.graphs[0].whole
    assert reason in said[0] if reason else not said
    assert len(found.rows()) == bool(parts or reason)


class LowRank(nn.Module):
    """A linear layer with an adapter, as PEFT makes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.5


def test_adapters_hooks_shared_and_frozen_weights() -> None:
    x = torch.randn(3, 8)
    for role in ("gate", "up"):
        model = MLP()
        setattr(model, role, LowRank(getattr(model, role)))
        found, result = compiled(model, x)
        result.sum().backward()
        assert (found.graphs[0].parts, len(found.graphs[0].whole)) == (0, 1)
        assert f"its {role} is not" in found.graphs[0].whole[0]
        assert getattr(model, role).a.weight.grad is not None

    model = MLP()
    model.up.weight = model.gate.weight
    model.down.requires_grad_(False)
    twin = copy.deepcopy(model)
    found, result = compiled(model, x)
    result.square().sum().backward()
    twin(x).square().sum().backward()
    assert found.graphs[0].parts == 1
    assert model.down.weight.grad is None
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)

    looked: list[Tensor] = []
    layers = oslo_fusion.initialize(stack(), config(0))
    layers.layers[0].gate.register_forward_hook(lambda *_: looked.append(x))
    layers.layers[0](x).sum().backward()
    assert looked, "a hook on a part: the layer runs as it was"
    assert not any(graph.parts for graph in record(layers).graphs)

    pattern = Replacement(lambda x: x.sinh(), lambda x: x.sinh(), (torch.randn(2, 3),), gradient=False)
    made = Backend(0, replacements=[pattern], compiler="eager")
    torch.compile(MLP(), backend=made)(x).sum().backward()
    assert made.record.graphs[0].parts == 0, "kernels of the user's own come first"

    with torch.no_grad():
        found, _ = compiled(MLP(), x)
    assert found.graphs[0].parts == 0, "without gradients there is no backward to cut"


def test_autocast() -> None:
    model, x = MLP(), torch.randn(3, 8)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, result = compiled(model, x)
        expected = twin(x)
    assert found.graphs[0].parts == 1
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert float((mine.grad - theirs.grad).norm()) <= 0.02 * float(theirs.grad.norm())


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_tensors_spread_over_devices_are_left_alone() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = MLP()
        for role, linear in model.named_children():
            place = Shard(1 if role == "down" else 0)
            linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [place]))
            linear.bias = nn.Parameter(distribute_tensor(linear.bias.detach(), mesh, [Replicate()]))
        x = distribute_tensor(torch.randn(3, 8), mesh, [Replicate()])
        found, result = compiled(model, x)
        result.to_local().sum().backward()
        assert found.graphs[0].parts == 0
        assert "DTensor" in found.graphs[0].whole[0]
        assert isinstance(model.gate.weight.grad, DTensor)
    finally:
        distributed.destroy_process_group()


def test_the_residual_before_it_is_written_by_the_matmul_that_adds_it() -> None:
    class Layer(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.mixed, self.norm, self.mlp = nn.Linear(8, 8, bias=bias), nn.RMSNorm(8), MLP()

        def forward(self, x: Tensor) -> Tensor:
            residual = x + self.mixed(x.sin())
            return residual + self.mlp(self.norm(residual))

    for bias in (False, True):
        graphs: list[fx.GraphModule] = []
        layer, x = Layer(bias), torch.randn(2, 3, 8)

        def look(graph: fx.GraphModule, inputs: list[Any], graphs: list[fx.GraphModule] = graphs) -> Any:
            assert gated_mlps.cut_gated_mlps(graph).cut == 1
            graphs.append(graph)
            return graph.forward

        torch.testing.assert_close(torch.compile(layer, backend=look)(x), layer(x))
        names = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert names.count(gated_mlps.added) == (0 if bias else 1)
        assert names.count(op.gated_mlp) == 1


def peak(function: Callable[[], Any]) -> int:
    """The most bytes of the CPU's allocator that were in use above what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_peak_of_a_layers_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of the proportions of Llama 1B, counted in tensors as large as its input."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    settings = transformers.LlamaConfig(**sizes, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(settings, 0)
    x = torch.randn(4, 512, 128, requires_grad=True)
    position = LlamaRotaryEmbedding(settings)(x, torch.arange(512)[None])
    monkeypatch.setattr(op, "_BLOCK", 1 << 12)
    monkeypatch.setattr(op, "_NARROWEST", 64)
    monkeypatch.setattr(op, "_ALIGNED", 64)
    found = {}
    for cut in (False, True):
        monkeypatch.setattr(backend, "CUT_AT", 0.25 if cut else -1.0)
        run = torch.compile(layer, backend=Backend(0, compiler="eager"))
        run(x, position_embeddings=position).sum().backward()
        layer.zero_grad()
        result = run(x, position_embeddings=position)
        gradient = torch.ones_like(result)
        found[cut] = peak(lambda result=result, gradient=gradient: result.backward(gradient)) / (x.numel() * x.element_size())
        layer.zero_grad()
    assert found[True] <= found[False] - 12, found


@pytest.mark.gpu
def test_the_peak_of_a_layers_backward_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor orders it. Predicted in tensors as large as the input, input and its gradient included: 11.6, uncut 31.5."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    settings = transformers.LlamaConfig(**sizes, head_dim=64, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(settings, 0).to("cuda", torch.bfloat16)
    x = torch.randn(8, 2048, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    position = LlamaRotaryEmbedding(settings, device="cuda")(x, torch.arange(2048, device="cuda")[None])
    found, gradients = {}, {}
    for cut in (False, True):
        monkeypatch.setattr(backend, "CUT_AT", 0.25 if cut else -1.0)
        run = torch.compile(layer, backend=Backend(0))
        for _ in range(2):  # the first call makes workspaces, the second is counted
            layer.zero_grad()
            x.grad = None
            result = run(x, position_embeddings=position)
            gradient = torch.ones_like(result)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - 2 * x.numel() * x.element_size()
            result.backward(gradient)
            found[cut] = (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())
            gradients[cut] = [p.grad.clone() for p in layer.parameters()]
    for mine, theirs in zip(gradients[True], gradients[False], strict=True):
        assert float((mine - theirs).norm()) <= 0.02 * float(theirs.norm())
    print(f"peak of the backward: {found[False]:.1f}, in parts {found[True]:.1f} inputs")
    assert found[True] <= 15, found
    assert found[False] >= 28, found
