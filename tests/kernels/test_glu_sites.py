"""Gated MLPs: recognised by their wiring, replaced only where planned, and whole models under the law."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion import probe, surgery
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import Scope
from oslo_fusion.environment import environment
from oslo_fusion.kernels import glu_sites
from oslo_fusion.kernels.glu_sites import FusedGLU, GatedMLPPass
from oslo_fusion.ops import glu as op
from oslo_fusion.plan import Proposal, Timing
from oslo_fusion.recognition.mlp import GATED, MERGED, recognise_mlp
from oslo_fusion.testing import assert_close_to_reference

BOTH = ("FusedSwiGLU", "FusedGeGLU")
WISH = FusionConfig(enable=True, custom_cuda_kernels=BOTH, autotune="off")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "pad_token_id": 0,
}
SMALL_MT5 = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
# family → form, activation, number of gated MLPs in two layers (of encoder and decoder each)
FAMILIES = {
    "llama": (GATED, "silu", 2),
    "Mistral": (GATED, "silu", 2),
    "Qwen2": (GATED, "silu", 2),
    "Gemma": (GATED, "gelu_tanh", 2),
    "t5-v1_1": (GATED, "gelu_tanh", 4),
    "MT5": (GATED, "gelu_tanh", 4),
    "Phi3": (MERGED, "silu", 2),
    "Glm": (MERGED, "silu", 2),
}


def family(name: str, build: Any) -> nn.Module:
    """A tiny model, from our recipes or from transformers' configuration classes."""
    if name[0].islower():
        model: nn.Module = build(name)
        return model
    import transformers

    config = getattr(transformers, f"{name}Config")(**(SMALL_MT5 if name == "MT5" else SMALL))
    kind = "ForConditionalGeneration" if name == "MT5" else "ForCausalLM"
    return getattr(transformers, f"{name}{kind}")(config).eval()


def rows(model: nn.Module, config: FusionConfig = WISH) -> list[Proposal]:
    return list(GatedMLPPass().propose(model, config, environment()))


def fuse(model: nn.Module) -> list[Proposal]:
    proposals = rows(model)
    surgery.apply(model, [swap for proposal in proposals for swap in proposal.swaps])
    return proposals


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operators' references run, so their place in a model can be tested."""
    monkeypatch.setattr(glu_sites, "choices", lambda *where: {"auto": "triton"})


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_gated_mlp_of_a_family_is_a_site(name: str, build: Any, kernels_pretended: None) -> None:
    form, activation, count = FAMILIES[name]
    model = family(name, build)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scope = Scope(WISH, environment())
    found = [mlp for m in model.modules() if (mlp := recognise_mlp(m, scope)) is not None]
    assert [(mlp.kind, mlp.formula) for mlp in found] == [(form, activation)] * count
    proposals = rows(model)[:count]
    assert [p.outcome for p in proposals] == ["fused"] * count, proposals[0].reason
    assert all(len(p.claims) == 2 for p in proposals)
    assert ("t5" in name.lower()) == ("dropout" in proposals[0].swaps[0].settings["rest"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Homemade(nn.Module):
    """Gate and up as halves of one projection, under names of nobody's library, with ways to be something else."""

    def __init__(self, kind: str = "", act: nn.Module | None = None) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 80), nn.Linear(40, 16)
        self.bend, self.kind = act or nn.SiLU(), kind

    def forward(self, x: Tensor) -> Tensor:
        merged = self.both(x)
        first, second = merged.chunk(2, -1)
        if self.kind == "interleaved":
            first, second = merged[..., ::2], merged[..., 1::2]
        if self.kind == "up first":
            first, second = second, first
        if self.kind == "own square":
            second = first
        h = self.bend(first)
        if self.kind == "added":
            return self.down(h + second)
        if self.kind == "limited":
            second = second.clamp(-0.01, 0.01)
        if self.kind == "plus one":
            second = second + 1
        h = h * second
        if self.kind == "kept":
            return self.down(h) + x
        return self.down(2 * h if self.kind == "doubled" else h)


def test_either_half_may_be_the_gate(kernels_pretended: None) -> None:
    model = nn.ModuleList([Homemade(), Homemade("up first")])
    twin, x = copy.deepcopy(model), torch.randn(5, 3, 16)
    assert [p.swaps[0].settings["gate_first"] for p in fuse(model)[:2]] == [True, False]
    for fused, original in zip(model, twin, strict=True):
        assert isinstance(fused, FusedGLU)
        torch.testing.assert_close(fused(x), original(x))


@pytest.mark.parametrize("kind", ["interleaved", "own square", "added", "limited", "plus one", "doubled", "kept"])
def test_what_computes_something_else_is_no_site(kind: str, kernels_pretended: None) -> None:
    assert [p.site.path for p in rows(nn.ModuleList([Homemade(kind)])) if p.site.kind != "configuration"] == []


def test_names_choose_the_kind(build: Any) -> None:
    swiglu, geglu = (FusionConfig(enable=True, custom_cuda_kernels=(name,)) for name in BOTH)
    assert rows(build("llama"), FusionConfig(enable=True)) == []
    assert [p.site.kind for p in rows(build("llama"), swiglu)] == [GATED] * 2
    (row,) = rows(build("llama"), geglu)
    reason = "no MLP of this LlamaForCausalLM multiplies gelu or gelu_tanh of a gate with an up projection"
    assert (row.outcome, row.reason) == ("refused", reason)
    assert [p.site.kind for p in rows(build("t5-v1_1"), geglu)] == [GATED] * 4
    assert rows(build("gpt2"), FusionConfig(enable=True, custom_cuda_kernels=("all",))) == []
    (row,) = rows(build("llama"), FusionConfig(custom_cuda_kernels=("FusedSwiGLU",)))
    assert (row.outcome, row.reason) == ("off", "enable is false")
    relu = nn.ModuleList([Homemade(act=nn.ReLU())])
    assert {p.site.kind for p in rows(relu)} == {"configuration"}


@pytest.mark.parametrize("name", ["llama", "Phi3"])
def test_the_cpu_is_refused(name: str, build: Any) -> None:
    config = FusionConfig(enable=True, custom_cuda_kernels=("all",))
    assert {(p.outcome, p.reason) for p in rows(family(name, build), config)} == {
        ("refused", "no kernel on the CPU: the extension has none for glu")
    }


def test_refusals_say_why(kernels_pretended: None) -> None:
    model = nn.ModuleList([Homemade().double(), Homemade()])
    model[1].forward = model[1].forward  # type: ignore[method-assign]
    assert [p.reason for p in rows(model)[:2]] == [
        "no kernel for weights of float64",
        "its forward was replaced on the instance",
    ]


@pytest.mark.parametrize("slower", [True, False])
def test_only_what_wins(slower: bool, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    after = 20.0 if slower else 5.0
    monkeypatch.setattr(probe, "time_pair", lambda *a, **k: Timing("float32", "1", 10.0, after, 10.0, 10.0))
    row = rows(Homemade(), FusionConfig(enable=True, custom_cuda_kernels=("FusedSwiGLU",)))[0]
    if slower:
        assert row.outcome == "refused"
        assert "not faster here: float32 1: forward 10 → 20 µs" in row.reason
    else:
        (swap,) = row.swaps
        assert swap.settings["inference"] == {torch.float32}
        assert swap.settings["training"] == frozenset()


def test_a_wrong_kernel_is_refused_with_its_size(kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Callable[..., Tensor] = lambda gate, up, name: F.silu(gate) * up * 1.01  # noqa: E731
    monkeypatch.setattr(op, "GLU", wrong)
    row = rows(Homemade())[0]
    assert row.outcome == "refused"
    assert "computes something else in float32: output error" in row.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_models_obey_the_law(name: str, dtype: torch.dtype, build: Any, inputs: Any, kernels_pretended: None) -> None:
    model = family(name, build).to(dtype)
    twin, classes = copy.deepcopy(model), [type(m) for m in model.modules()]
    assert {p.outcome for p in fuse(model) if p.site.kind == GATED} == {"fused"}
    _compare(model, twin, name, inputs)
    surgery.restore(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.gpu
@pytest.mark.parametrize("autotune", ["off", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_models_obey_the_law_on_a_gpu_beside_torchscript(
    name: str, dtype: torch.dtype, autotune: str, build: Any, inputs: Any
) -> None:
    model = family(name, build).to("cuda", dtype)
    twin = copy.deepcopy(model)
    block = {"enable": True, "autotune": autotune, "custom_cuda_kernels": list(BOTH)}
    oslo_fusion.initialize(model, {"kernel_fusion": block})
    proposals = [p for p in oslo_fusion.report(model).plan.proposals if p.room == "kernels" and p.site.kind == GATED]
    assert len(proposals) == FAMILIES[name][2]
    if autotune == "off":
        assert {p.outcome for p in proposals} == {"fused"}, proposals[0].reason
    for _ in range(2):  # the third call is the one in which TorchScript has settled
        model(**inputs(model, name.lower(), labels=True)).loss.backward()
    _compare(model, twin, name, inputs)


def _compare(model: nn.Module, twin: nn.Module, name: str, inputs: Any) -> None:
    """Forward, loss and gradients under the law, with dropout off, whose masks differ where it is fused."""
    exact = copy.deepcopy(twin).double()
    for m in (model, twin, exact):
        for part in m.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    given = inputs(model, name.lower(), labels=True)
    results = []
    for m in (model, twin, exact):
        m.zero_grad()
        output = m(**given)
        output.loss.backward()
        gradients = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results.append((output.logits, output.loss, gradients))
    with torch.no_grad():
        ours, theirs = model(**given).logits, twin(**given).logits
    assert_close_to_reference(ours, theirs, results[2][0], "inference", "l2")
    assert_close_to_reference(*(logits for logits, _, _ in results), "logits", "l2")
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=0)
    assert results[0][2].keys() == results[1][2].keys()
    flat = (torch.cat([g.flatten() for g in gradients.values()]) for _, _, gradients in results)
    assert_close_to_reference(*flat, "gradients", "l2")


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "t5-v1_1", "Phi3"])
def test_autocast_training_obeys_the_law(name: str, half: torch.dtype, build: Any, inputs: Any) -> None:
    model = family(name, build).to("cuda")
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert {p.outcome for p in fuse(model) if p.site.kind == GATED} == {"fused"}
    given = inputs(model, name.lower(), labels=True)
    gradients = []
    for m in (model, twin, exact):
        with torch.autocast("cuda", dtype=half, enabled=m is not exact):
            m(**given).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert_close_to_reference(*gradients, name, "l2")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused products that are called from here on."""
    calls: list[str] = []
    for name in ("glu", "merged_glu"):
        real = getattr(glu_sites, name)
        monkeypatch.setattr(glu_sites, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    return calls


@pytest.mark.parametrize("name", ["llama", "Phi3"])
def test_what_was_not_planned_is_the_originals(
    name: str, build: Any, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family(name, build)
    module = next(m for m in model.modules() if type(m).__name__ in ("LlamaMLP", "Phi3MLP"))
    original = copy.deepcopy(module)
    fuse(module)
    assert isinstance(module, FusedGLU)
    assert isinstance(module, type(original))
    calls, x = counted(monkeypatch), torch.randn(3, 64 if name == "Phi3" else model.config.hidden_size)
    heard: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, y: heard.append(y.shape))
    torch.testing.assert_close(module(x), original(x))
    assert (len(calls), len(heard)) == (1, 1)
    handle.remove()
    module(x=x) if name == "llama" else module(hidden_states=x)
    torch.compile(module, backend="eager", fullgraph=True)(x)
    torch.func.vmap(module)(x)
    torch.func.jvp(module, (x,), (x,))
    torch.jit.trace(module, x, check_trace=False)
    activation = module.act_fn if name == "llama" else module.activation_fn
    handle = activation.register_forward_hook(lambda m, args, y: 2 * y)
    assert not torch.allclose(module(x), original(x)), "a hook registered after initialize must be honoured"
    handle.remove()
    torch.testing.assert_close(copy.deepcopy(module).bfloat16()(x.bfloat16()), copy.deepcopy(original).bfloat16()(x.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(x), original(x))
    assert len(calls) == 1
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    module.down_proj = nn.Sequential(module.down_proj)  # an adapter put in afterwards
    torch.testing.assert_close(module(x), original(x))


@pytest.mark.gpu
def test_a_gpu_times_both_modes_and_says_the_figures(build: Any) -> None:
    model = build("llama", device=torch.device("cuda"))
    proposals = rows(model, FusionConfig(enable=True, custom_cuda_kernels=("FusedSwiGLU",)))
    assert proposals
    for proposal in proposals:
        assert proposal.outcome == "fused", proposal.reason
        assert all(t.inference_after is not None and t.training_after is not None for t in proposal.timings)
        assert "µs" in proposal.reason


@pytest.mark.gpu
def test_greedy_tokens_are_hugging_faces(build: Any) -> None:
    for name in ("llama", "t5-v1_1", "Phi3"):
        model = family(name, build).to("cuda")
        ids = torch.randint(3, 500, (2, 6), device="cuda")
        arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        before = model.generate(ids, **arguments)
        block = {"enable": True, "autotune": "off", "custom_cuda_kernels": list(BOTH)}
        oslo_fusion.initialize(model, {"kernel_fusion": block})
        assert torch.equal(model.generate(ids, **arguments), before)
