"""The ends of post-norm sublayers: recognised by running them, replaced only where planned, whole models under the law."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion import probe, surgery
from oslo_fusion.aot import room as aot_room
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import Scope
from oslo_fusion.environment import environment
from oslo_fusion.kernels import norm_sites, post_norm_sites
from oslo_fusion.kernels.post_norm_sites import KERNEL, KIND, FusedDropoutAddNorm, PostNormPass, recognise_site
from oslo_fusion.ops import dropout_add_layer_norm as op
from oslo_fusion.plan import Proposal, Timing
from oslo_fusion.testing import assert_close_to_reference

WISH = FusionConfig(enable=True, custom_cuda_kernels=(KERNEL,), autotune="off")
BLOCK = {"enable": True, "custom_cuda_kernels": [KERNEL], "autotune": "off"}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 512,
    "pad_token_id": 0,
}
# family → number of sites in two layers; none where the layer itself writes the addition
FAMILIES = {"Bert": 4, "Roberta": 4, "Deberta": 4, "DistilBert": 0}


def family(name: str) -> nn.Module:
    import transformers

    extra = {"n_layers": 2, "n_heads": 4, "dim": 64, "hidden_dim": 96} if name == "DistilBert" else {}
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **extra})
    model: nn.Module = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    return model


def rows(model: nn.Module, config: FusionConfig = WISH) -> list[Proposal]:
    return list(PostNormPass().propose(model, config, environment()))


def fuse(model: nn.Module) -> list[Proposal]:
    proposals = rows(model)
    surgery.apply(model, [swap for proposal in proposals for swap in proposal.swaps])
    return proposals


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operators' references run, so their place in a model can be tested."""
    monkeypatch.setattr(post_norm_sites, "choices", lambda *where: {"auto": "triton"})


class End(nn.Module):
    """The end of a sublayer under names of nobody's library, with ways to be something else."""

    def __init__(self, kind: str = "", p: float = 0.3, bias: bool = True) -> None:
        super().__init__()
        self.out, self.wet, self.last = nn.Linear(24, 16, bias=bias), nn.Dropout(p), nn.LayerNorm(16, eps=1e-3)
        if kind == "rms":
            self.last = nn.RMSNorm(16)  # type: ignore[assignment]
        if kind == "no linear":
            self.out = nn.Tanh()  # type: ignore[assignment]
        self.kind = kind

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        h: Tensor = self.out(x)
        if self.kind == "dropout last":
            return self.last(self.wet(h) + 0 * kept) + kept
        if self.kind == "dropout of the sum":
            return self.last(self.wet(h + kept))
        if self.kind == "twice":
            return self.last(self.wet(h) + 2 * kept)
        if self.kind == "after the norm":
            return self.last(self.wet(h) + kept) * 2
        if self.kind == "pre-norm":
            return self.wet(h) + self.last(kept)
        return self.last(self.wet(h) + kept)


class Sublayer(nn.Module):
    """One argument, which is the residual too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.outer = nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16)
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.drop(self.outer(self.act(self.inner(x)))))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_end_of_a_family_is_a_site(name: str) -> None:
    model, scope, state = family(name), Scope(WISH, environment()), torch.get_rng_state()
    found = [site for module in model.modules() if (site := recognise_site(module, scope)) is not None]
    names = [(site.linear, site.norm_name, site.wiring.dropout) for site in found]
    assert names == [("dense", "LayerNorm", "dropout")] * FAMILIES[name]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "kind", ["dropout last", "dropout of the sum", "twice", "after the norm", "pre-norm", "rms", "no linear"]
)
def test_what_computes_something_else_is_no_site(kind: str, kernels_pretended: None) -> None:
    assert [row.site.path for row in rows(nn.ModuleList([End(kind)])) if row.site.kind == KIND] == []


def test_names_choose() -> None:
    model = nn.ModuleList([End()])
    assert rows(model, FusionConfig(enable=True)) == []
    assert rows(model, FusionConfig(enable=True, custom_cuda_kernels=("FusedLayerNorm",))) == []
    assert [r.site.kind for r in rows(model, FusionConfig(enable=True, custom_cuda_kernels=("all",)))] == [KIND]
    (row,) = rows(nn.Linear(2, 2))
    reason = "no module of this Linear ends in a linear, dropout, residual addition and layer norm"
    assert (row.outcome, row.reason) == ("refused", reason)
    (row,) = rows(model, FusionConfig(custom_cuda_kernels=(KERNEL,)))
    assert (row.outcome, row.reason) == ("off", "enable is false")


def test_refusals_say_why(kernels_pretended: None) -> None:
    model = nn.ModuleList([End().double(), End(), End().to(torch.bfloat16)])
    model[1].forward = model[1].forward  # type: ignore[method-assign]
    model[2].last.float()
    assert [row.reason for row in rows(model)] == [
        "no kernel for weights of float64",
        "its forward was replaced on the instance",
        "its parameters are on different devices or of different dtypes",
    ]


def test_the_cpu_and_wide_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no kernel on the CPU: the extension has none for dropout_add_layer_norm"
    assert [row.reason for row in rows(nn.ModuleList([End()]))] == [reason]
    monkeypatch.setattr(post_norm_sites, "MAX_DIM", 15)
    assert [row.reason for row in rows(nn.ModuleList([End()]))] == ["no kernel for rows of 16 numbers, which is more than 15"]


@pytest.mark.parametrize("slower", [True, False])
def test_only_what_wins(slower: bool, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    after = 20.0 if slower else 5.0
    monkeypatch.setattr(probe, "time_pair", lambda *a, **k: Timing("float32", "1", 10.0, 10.0, 10.0, after))
    (row,) = rows(nn.ModuleList([End()]), FusionConfig(enable=True, custom_cuda_kernels=(KERNEL,)))
    if slower:
        assert row.outcome == "refused"
        assert "not faster here: float32 1: forward 10 → 10 µs, with backward 10 → 20 µs" in row.reason
    else:
        settings = row.swaps[0].settings
        assert settings["inference"] == {}
        cases = [(torch.float32, torch.float32, None)]
        cases += [(half, torch.float32, half) for half in (torch.bfloat16, torch.float16)]
        assert settings["training"] == dict.fromkeys(cases, torch.float32)


def test_what_is_timed_runs(kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CPU_ELEMENTS", 24 * 50)
    config = FusionConfig(enable=True, custom_cuda_kernels=(KERNEL,))
    (row,) = rows(nn.ModuleList([End()]), config)
    assert [timing.size for timing in row.timings] == ["50×24"] * 2, row.reason
    assert all(timing.training_after for timing in row.timings)


def test_a_wrong_kernel_is_refused_with_its_size(kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = op.DROPOUT_ADD_LAYER_NORM
    monkeypatch.setattr(op, "DROPOUT_ADD_LAYER_NORM", lambda x, *rest: right(x * 1.01, *rest))
    (row,) = rows(nn.ModuleList([End()]))
    assert row.outcome == "refused"
    assert "computes something else in float32: output error" in row.reason


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_end_computes_what_it_did(p: float, bias: bool, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([End(p=p, bias=bias)])
    twin = copy.deepcopy(model)
    assert [row.outcome for row in fuse(model)] == ["fused"]
    x, kept = torch.randn(5, 3, 24, requires_grad=True), torch.randn(5, 3, 16, requires_grad=True)
    results = []
    for ends in (model, twin):
        y = ends.eval()[0](x, kept)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, kept, *ends.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    first, second = (model.train()[0](x, kept) for _ in range(2))
    assert torch.equal(first, second) == (p == 0)
    drawn: list[float] = []
    monkeypatch.setattr(post_norm_sites, "dropout_add_layer_norm", lambda *a, **k: drawn.append(k["dropout"]) or a[0])
    model.train()[0](x, kept)
    model[0].wet.eval()
    model[0](x, kept)
    assert drawn == [p, 0.0], "the dropout's own mode counts"


def test_a_sublayer_of_one_argument(kernels_pretended: None) -> None:
    model = nn.ModuleList([Sublayer()])
    twin, x = copy.deepcopy(model), torch.randn(4, 16)
    (row,) = fuse(model)
    assert row.swaps[0].settings["before"] == ("inner", "act")
    torch.testing.assert_close(model.eval()[0](x), twin.eval()[0](x))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the donor hands to the operator: the linear's bias at each call."""
    calls: list[Any] = []
    right = post_norm_sites.dropout_add_layer_norm

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["linear_bias"])
        return right(*args, **kwargs)

    monkeypatch.setattr(post_norm_sites, "dropout_add_layer_norm", counting)
    return calls


class Adapted(nn.Module):
    """What PEFT puts in a linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.extra(x)
        return y


def test_a_linear_with_hooks_or_an_adapter_is_called(kernels_pretended: None, counted: list[Any]) -> None:
    model = nn.ModuleList([End()]).eval()
    twin, x, kept = copy.deepcopy(model), torch.randn(5, 24), torch.randn(5, 16)
    fuse(model)
    counted.clear()
    torch.testing.assert_close(model[0](x, kept), twin[0](x, kept))
    assert [bias is not None for bias in counted] == [True]
    seen: list[Tensor] = []
    handle = model[0].out.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model[0](x, kept), twin[0](x, kept))
    handle.remove()
    assert counted[1:] == [None]
    torch.testing.assert_close(seen[0], twin[0].out(x))
    for ends in (model, twin):
        torch.manual_seed(0)
        ends[0].out = Adapted(ends[0].out)
    torch.testing.assert_close(model[0](x, kept), twin[0](x, kept))
    assert counted[2:] == [None]


def test_what_was_not_planned_is_the_originals(kernels_pretended: None, counted: list[Any]) -> None:
    model = nn.ModuleList([End()]).eval()
    twin, x, kept = copy.deepcopy(model), torch.randn(5, 24), torch.randn(5, 16)
    fuse(model)
    counted.clear()
    torch.testing.assert_close(model[0](x, kept=kept), twin[0](x, kept))
    torch.testing.assert_close(model[0](x, kept[:1]), twin[0](x, kept[:1]))  # a residual that is broadcast
    for part in (model[0].wet, model[0].last):
        handle = part.register_forward_hook(lambda module, args, output: None)
        torch.testing.assert_close(model[0](x, kept), twin[0](x, kept))
        handle.remove()
    model[0].train().wet.p = 1.0
    torch.testing.assert_close(model[0](x, kept), twin[0].last(kept))
    model[0].wet = nn.Identity()
    torch.testing.assert_close(model[0](x, kept), twin[0](x, kept))
    assert counted == []


def test_autocast(kernels_pretended: None, counted: list[Any]) -> None:
    model = nn.ModuleList([End()]).eval()
    twin, x, kept = copy.deepcopy(model), torch.randn(64, 24), torch.randn(64, 16)
    fuse(model)
    counted.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model[0](x, kept), twin[0](x, kept)
    assert len(counted) == 1
    assert_close_to_reference(ours, theirs, twin.double()[0](x.double(), kept.double()))


def test_restore_copies_and_pickles(kernels_pretended: None) -> None:
    model = nn.ModuleList([End()]).eval()
    original, x, kept = type(model[0]), torch.randn(5, 24), torch.randn(5, 16)
    fuse(model)
    assert isinstance(model[0], FusedDropoutAddNorm)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0], FusedDropoutAddNorm)
        assert torch.equal(other[0](x, kept), model[0](x, kept))
    surgery.restore(model)
    assert type(model[0]) is original


def test_it_comes_before_norms_and_torchscript(
    kernels_pretended: None, fuser_pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_sites, "choices", lambda *where, **first: {"auto": "triton"})
    names = [KERNEL, "FusedLayerNorm"]
    model = nn.ModuleList([End(), nn.LayerNorm(16)])
    plan = oslo_fusion.plan(model, {"kernel_fusion": {"enable": True, "autotune": "off", "custom_cuda_kernels": names}})
    norms = [(row.site.path, row.outcome) for row in plan.proposals if row.site.kind == "norm"]
    assert norms == [("0.last", "off"), ("1", "fused")]
    (row,) = [row for row in plan.proposals if row.site.path == "0.last"]
    assert row.reason == "taken by the kernels room: post-norm at 0"
    assert not [row for row in plan.proposals if row.site.kind == "dropout + residual"]
    without = oslo_fusion.plan(model, {"kernel_fusion": {"enable": True, "autotune": "off"}})
    kinds = [row.site.kind for row in without.proposals if row.outcome == "fused"]
    assert kinds.count("dropout + residual") == 1, "what is not taken TorchScript still may"


def test_inside_what_is_compiled(kernels_pretended: None) -> None:
    model = nn.ModuleList([End(p=0.5)]).eval()
    x, kept = torch.randn(5, 24, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    expected = model[0](x, kept)
    fuse(model)
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled = torch.compile(model[0], fullgraph=True, backend=backend)
    y = compiled(x, kept)
    torch.testing.assert_close(y, expected)
    wanted = [x, kept, *model.parameters()]
    gradients = zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected)), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [f"oslo_fusion.{op.NAME}" in code for code in graphs] == [True, True]
    model.train()
    assert not torch.equal(compiled(x, kept), compiled(x, kept))


def _compare(model: nn.Module, twin: nn.Module, inputs: Any) -> None:
    """Forward, loss and gradients under the law, with dropout off, whose masks differ where it is fused."""
    exact = copy.deepcopy(twin).double()
    for m in (model, twin, exact):
        for part in m.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    given = inputs(model, "bert", labels=True)
    results = []
    for m in (model.train(), twin.train(), exact.train()):
        m.zero_grad()
        output = m(**given)
        output.loss.backward()
        gradients = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results.append((output.logits, gradients))
    with torch.no_grad():
        ours, theirs = model.eval()(**given).logits, twin.eval()(**given).logits
    assert_close_to_reference(ours, theirs, results[2][0], "inference", "l2")
    assert_close_to_reference(*(logits for logits, _ in results), "logits", "l2")
    assert results[0][1].keys() == results[1][1].keys()
    flat = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in results)
    assert_close_to_reference(*flat, "gradients", "l2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_obeys_the_law(dtype: torch.dtype, inputs: Any, kernels_pretended: None) -> None:
    model = family("Bert").to(dtype)
    twin, classes = copy.deepcopy(model), [type(m) for m in model.modules()]
    proposals = fuse(model)
    assert [row.outcome for row in proposals] == ["fused"] * FAMILIES["Bert"], proposals[0].reason
    assert all(len(row.claims) == 3 for row in proposals), "module, dropout and norm"
    _compare(model, twin, inputs)
    surgery.restore(model)
    assert [type(m) for m in model.modules()] == classes


def test_in_layers_that_are_compiled(inputs: Any, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything recomputed in the backward, but for what is drawn."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = family("Bert")
    twin = copy.deepcopy(model)
    oslo_fusion.initialize(model, {"kernel_fusion": {**BLOCK, "memory_efficient_fusion": {"activation_memory_budget": 0}}})
    calls: list[Any] = []
    right = post_norm_sites.dropout_add_layer_norm
    monkeypatch.setattr(post_norm_sites, "dropout_add_layer_norm", lambda *a, **k: calls.append(k["dropout"]) or right(*a, **k))
    given = inputs(model, "bert", labels=True)
    first, second = (model.train()(**given).loss.item() for _ in range(2))
    assert first != second, "masks are drawn anew"
    assert set(calls) == {0.1}
    runtime = next(row.runtime for row in oslo_fusion.report(model).rows if row.room == "aot")
    assert runtime.breaks == ()
    _compare(model, twin, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("autotune", ["off", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_models_obey_the_law_on_a_gpu(name: str, dtype: torch.dtype, autotune: str, inputs: Any) -> None:
    model = family(name).to("cuda", dtype)
    twin = copy.deepcopy(model)
    oslo_fusion.initialize(model, {"kernel_fusion": {**BLOCK, "autotune": autotune}})
    found = [row for row in oslo_fusion.report(model).rows if row.site.kind == KIND]
    assert len(found) == FAMILIES[name]
    if autotune == "off":
        assert {row.outcome for row in found} == {"fused"}, found[0].reason
    _compare(model, twin, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_bert_on_a_gpu(autocast: bool, build: Any) -> None:
    """A base-sized layer with its dropout: the site is used, memory is less, and masks are new in every step."""
    import transformers

    config = transformers.BertConfig(num_hidden_layers=1)
    layer = transformers.models.bert.modeling_bert.BertLayer(config).to("cuda", torch.float32 if autocast else torch.bfloat16)
    model = nn.ModuleList([layer]).train()
    peaks, losses = [], []
    x = torch.randn(16, 512, 768, device="cuda", dtype=next(model.parameters()).dtype)
    for fused in (False, True):
        if fused:
            oslo_fusion.initialize(model, {"kernel_fusion": BLOCK})
            assert {r.outcome for r in oslo_fusion.report(model).rows if r.site.kind == KIND} == {"fused"}
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_stats()["requested_bytes.all.current"]
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                output = model[0](x)
                output = output[0] if isinstance(output, tuple) else output
            loss = (output.float() - x.float()).square().mean()
            loss.backward()
            losses.append(loss.item())
            model.zero_grad()
        # What was asked for: a block that is allocated may be up to a megabyte larger, by what was freed before.
        peaks.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - base)
    assert len(set(losses)) == 4
    assert max(losses) == pytest.approx(min(losses), rel=0.02)
    assert peaks[1] <= peaks[0]
    assert peaks[1] < peaks[0] or autocast, "under autocast the peak is elsewhere, in the activation"
