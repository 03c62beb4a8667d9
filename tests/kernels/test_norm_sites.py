"""Norm modules: recognised by what they compute, replaced only where planned, and whole models under the law."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oslo_fusion import extension, probe, surgery, timings
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import Scope
from oslo_fusion.environment import environment
from oslo_fusion.kernels import norm_sites
from oslo_fusion.kernels.norm_sites import FusedNorm, Norm, NormPass, recognise, recognise_norm
from oslo_fusion.ops.kernels import choices, missing
from oslo_fusion.plan import Proposal, Timing
from oslo_fusion.testing import assert_close_to_reference

ALL = FusionConfig(enable=True, custom_cuda_kernels=("all",), autotune="off")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
}


def family(name: str, build: Any) -> nn.Module:
    """A tiny model, from our recipes or from transformers' configuration classes."""
    if name in ("gemma", "qwen3", "mixtral", "nemotron"):
        import transformers

        config = getattr(transformers, f"{name.capitalize()}Config")(**SMALL, pad_token_id=0)
        return getattr(transformers, f"{name.capitalize()}ForCausalLM")(config).eval()
    model: nn.Module = build(name)
    return model


def rows(model: nn.Module, config: FusionConfig = ALL) -> list[Proposal]:
    return list(NormPass().propose(model, config, environment()))


def fuse(model: nn.Module) -> list[Proposal]:
    proposals = rows(model)
    surgery.apply(model, [swap for proposal in proposals for swap in proposal.swaps])
    return proposals


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operators' references run, so their place in a model can be tested."""
    monkeypatch.setattr(norm_sites, "choices", lambda *where, first: {"auto": "triton"})
    monkeypatch.setattr(norm_sites, "is_here", lambda *where: True)


@pytest.mark.parametrize(
    ("name", "operation", "offset", "count"),
    [
        ("llama", "rms_norm", 0.0, 5),
        ("t5", "rms_norm", 0.0, 12),
        ("gemma", "rms_norm", 1.0, 5),
        ("qwen3", "rms_norm", 0.0, 9),
        ("mixtral", "rms_norm", 0.0, 5),
        ("bert", "layer_norm", 0.0, 6),
        ("gpt2", "layer_norm", 0.0, 5),
        ("nemotron", "layer_norm", 1.0, 5),
    ],
)
def test_every_norm_of_a_family_is_a_site(name: str, operation: str, offset: float, count: int, build: Any) -> None:
    model = family(name, build)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scope = Scope(ALL, environment())
    found = {path: norm for path, module in model.named_modules() if (norm := recognise(module, scope)) is not None}
    assert {type(model.get_submodule(path)).__name__ for path in found} == {
        type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__
    }
    assert {(n.operation, n.weight_offset) for n in found.values()} == {(operation, offset)}
    assert len(rows(model)) == len(found) >= count
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class _Scaled(nn.Module):
    """RMS norm, with ways to be something else."""

    def __init__(self, width: int = 24, deviation: str = "") -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.depth, self.tiny, self.deviation = 0.1, 1e-5, deviation

    def forward(self, x: Tensor) -> Tensor:
        if self.deviation == "scale only":
            return self.gain * x
        if self.deviation == "largest":
            return self.gain * x / (x.abs().amax(-1, keepdim=True) + self.tiny)
        if self.deviation == "eps outside":
            return self.gain * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.tiny)
        if self.deviation == "training" and self.training:
            x = x * 1.5 + 1
        if self.deviation == "two":
            return 2 * self.gain * F.rms_norm(x, x.shape[-1:], eps=self.tiny)
        return self.gain * F.rms_norm(x, x.shape[-1:], eps=self.tiny)


def test_eps_is_found_by_value_and_parameters_by_their_use() -> None:
    assert recognise_norm(_Scaled()) == Norm("rms_norm", ("gain",), 1e-5, 0.0)
    assert recognise_norm(nn.LayerNorm(24, eps=1e-3)) == Norm("layer_norm", ("weight", "bias"), 1e-3, 0.0)
    assert recognise_norm(nn.LayerNorm(24, bias=False)) == Norm("layer_norm", ("weight",), 1e-5, 0.0)


@pytest.mark.parametrize("deviation", ["scale only", "largest", "eps outside", "training", "two"])
def test_what_computes_something_else_is_no_site(deviation: str) -> None:
    assert recognise_norm(_Scaled(deviation=deviation)) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.GroupNorm(1, 24),
        nn.GroupNorm(1, 3),
        nn.BatchNorm1d(24),
        nn.InstanceNorm1d(24, affine=True),
        nn.LayerNorm((3, 8)),
        nn.LayerNorm(24, elementwise_affine=False),
        nn.PReLU(24),
        nn.Linear(24, 1),
    ],
    ids=str,
)
def test_other_modules_are_no_sites(module: nn.Module) -> None:
    assert recognise_norm(module) is None


def test_names_choose_the_kind(build: Any) -> None:
    wish = FusionConfig(enable=True, custom_cuda_kernels=("FusedRMSNorm",))
    assert rows(build("llama"), FusionConfig(enable=True)) == []
    assert {p.site.kind for p in rows(build("llama"), wish)} == {"norm"}
    (row,) = rows(build("gpt2"), wish)
    assert (row.outcome, row.reason) == ("refused", "no module of this GPT2LMHeadModel computes rms norm")
    (row,) = rows(build("llama"), FusionConfig(custom_cuda_kernels=("FusedRMSNorm",)))
    assert (row.outcome, row.reason) == ("off", "enable is false")


def test_refusals_say_why(build: Any, kernels_pretended: None) -> None:
    model = nn.ModuleList([_Scaled().double(), _Scaled().to("meta"), _Scaled()])
    model[2].forward = model[2].forward  # type: ignore[method-assign]
    assert [p.reason for p in rows(model)] == [
        "no kernel for weights of float64",
        "it has no memory yet (meta device)",
        "its forward was replaced on the instance",
    ]


def test_the_cpu_has_the_extensions_kernel_or_the_reason(build: Any) -> None:
    reason = extension.failure()
    found = {(p.outcome, p.room, p.after, p.reason) for p in rows(build("llama"))}
    if reason is None:
        assert found == {("fused", "kernels", "rms_norm, one C++ kernel", "same results; not timed (autotune: off)")}
    else:
        assert found == {("refused", "kernels", "LlamaRMSNorm", f"no kernel on the CPU: {reason}")}
    (layer_norm, *_) = rows(build("gpt2"))
    assert (layer_norm.outcome, layer_norm.reason) == (
        "refused",
        "no kernel on the CPU: the extension has none for layer_norm",
    )


@pytest.mark.parametrize(("kernel", "language"), [("triton", "Triton"), ("cuda", "CUDA")])
def test_a_forced_kernel_that_the_cpu_has_not_is_refused(kernel: str, language: str, build: Any) -> None:
    wish = FusionConfig(enable=True, custom_cuda_kernels=("all",), autotune="off", kernel=kernel)
    for name in ("llama", "gpt2"):
        assert {(p.outcome, p.reason) for p in rows(build(name), wish)} == {
            ("refused", f"kernel: {kernel}, and no {language} kernel runs on the CPU")
        }


def test_a_forced_kernel_that_does_not_exist_is_refused_by_name() -> None:
    assert choices("layer_norm", "cuda", "cuda") == {}
    assert missing("layer_norm", "cuda", "cuda").startswith("no CUDA kernel here: it has no CUDA kernel")
    assert missing("rms_norm", "mps", "auto") == "no kernel for mps"
    if extension.failure() is not None or extension.build_info()["cuda"] == "no":
        assert choices("rms_norm", "cuda", "cuda") == {}
        assert missing("rms_norm", "cuda", "cuda").startswith("no CUDA kernel here: the ")


def test_without_the_extension_everything_works() -> None:
    code = """
import sys
from pathlib import Path
sys.modules["oslo_fusion._C"] = None  # as if it had not been built
import torch, oslo_fusion
from oslo_fusion import models
model = models.build_model("t5", dtype=torch.float32, device=torch.device("cpu"), size="tiny").eval()
ids = torch.randint(3, 500, (2, 9))
before = model(input_ids=ids, decoder_input_ids=ids).logits
names = ["FusedNoRepeatNGram", "FusedRMSNorm"]
oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "custom_cuda_kernels": names, "autotune": "off"}})
assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, before)
rows = [r for r in oslo_fusion.report(model).rows if r.room in ("kernels", "generation")]
assert len(rows) == 13, len(rows)
print({(r.outcome, r.reason) for r in rows})
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    reason = "no kernel on the CPU: it was not built when oslo_fusion was installed"
    assert done.stdout.strip() == str({("refused", reason)})


def test_where_there_are_two_each_mode_and_dtype_has_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA wins float32 inference, Triton training; in half precision neither wins but Triton's training."""
    monkeypatch.setattr(norm_sites, "choices", lambda *where, first: {"triton": "triton", "cuda": "cuda"})
    monkeypatch.setattr(norm_sites, "is_here", lambda *where: True)
    figures = {
        ("triton", torch.float32): (10.0, 8.0, 30.0, 20.0),
        ("cuda", torch.float32): (10.0, 6.0, 30.0, 25.0),
        ("triton", torch.bfloat16): (10.0, 11.0, 30.0, 20.0),
        ("cuda", torch.bfloat16): (10.0, 10.0, 30.0, 40.0),
    }

    def time_pair(key: Any, before: Any, after: Any, inputs: Any, **options: Any) -> Timing:
        dtype = inputs()[0].dtype
        return Timing(str(dtype).removeprefix("torch."), "1", *figures[key[-1], dtype])

    monkeypatch.setattr(probe, "time_pair", time_pair)
    (row,) = rows(_Scaled(), FusionConfig(enable=True, custom_cuda_kernels=("all",)))
    assert row.after == "rms_norm, one CUDA or Triton kernel"
    assert "Triton: measured float32 1: forward 10 → 8 µs" in row.reason
    assert "CUDA: measured float32 1: forward 10 → 6 µs" in row.reason
    assert len(row.timings) == 4
    ((settings),) = (swap.settings for swap in row.swaps)
    assert {case[0]: use.kernel for case, use in settings["inference"].items()} == {torch.float32: "cuda"}
    assert {use.kernel for use in settings["training"].values()} == {"triton"}
    assert {case[0] for case in settings["training"]} == {torch.float32, torch.bfloat16, torch.float16}


def test_a_timing_serves_norms_of_every_eps(kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def time_pair(key: Any, *_: Any, **__: Any) -> Timing:
        asked.append(repr(key))
        return Timing("float32", "1", 10.0, 5.0, 10.0, 5.0)

    monkeypatch.setattr(probe, "time_pair", time_pair)
    config = FusionConfig(enable=True, custom_cuda_kernels=("all",))
    proposals = [row for eps in (1e-5, 1e-6) for row in rows(nn.RMSNorm(24, eps=eps), config)]
    assert [row.swaps[0].settings["norm"].eps for row in proposals] == [1e-5, 1e-6]
    assert len(asked) == 4
    assert len(set(asked)) == 2
    shipped = Path(timings.__file__).parent / "tables"
    keys = [key for path in shipped.glob("*.json") for key in timings._read(path) if key.startswith(f"(({norm_sites.KIND!r}")]
    assert keys
    assert all(f"eps={norm_sites._TIMED_EPS}" in key for key in keys)


def test_one_that_was_unpickled_where_its_kernel_is_not_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = _Scaled(), torch.randn(3, 24)
    expected = module(x)
    with monkeypatch.context() as patch:
        patch.setattr(norm_sites, "choices", lambda *where, first: {"cuda": "cuda"})
        fuse(module)
    assert isinstance(module, FusedNorm)
    monkeypatch.setattr(norm_sites, "is_here", lambda *where: False)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("slower", [True, False])
def test_only_what_wins(slower: bool, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    after = 20.0 if slower else 5.0
    monkeypatch.setattr(probe, "time_pair", lambda *a, **k: Timing("float32", "1", 10.0, after, 10.0, 10.0))
    (row,) = rows(_Scaled(), FusionConfig(enable=True, custom_cuda_kernels=("all",)))
    if slower:
        assert row.outcome == "refused"
        assert "not faster here: float32 1: forward 10 → 20 µs" in row.reason
    else:
        (swap,) = row.swaps
        assert (torch.float32, None) in swap.settings["inference"]
        assert swap.settings["training"] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "t5", "gemma", "qwen3", "bert", "gpt2", "nemotron"])
def test_models_obey_the_law(name: str, dtype: torch.dtype, build: Any, inputs: Any, kernels_pretended: None) -> None:
    _whole_model(family(name, build).to(dtype), name, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "t5", "gemma", "qwen3", "bert", "gpt2", "nemotron"])
def test_models_obey_the_law_on_a_gpu(name: str, dtype: torch.dtype, build: Any, inputs: Any) -> None:
    _whole_model(family(name, build).to("cuda", dtype), name, inputs)


def _whole_model(model: nn.Module, name: str, inputs: Any) -> None:
    for parameter in model.parameters():  # norms start as ones and zeros, which would hide a mistake
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    twin, exact, classes = copy.deepcopy(model), copy.deepcopy(model).double(), [type(m) for m in model.modules()]
    proposals = fuse(model)
    assert {p.outcome for p in proposals} == {"fused"}, proposals[0].reason
    given = inputs(model, name, labels=True)
    results = []
    for m in (model, twin, exact):
        m.zero_grad()
        output = m(**given)
        output.loss.backward()
        results.append((output.logits, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    with torch.no_grad():
        assert_close_to_reference(model(**given).logits, twin(**given).logits, results[2][0], "inference", "l2")
    assert_close_to_reference(*(logits for logits, _ in results), "logits", "l2")
    ours, theirs, truth = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in results)
    assert results[0][1].keys() == results[1][1].keys()
    assert_close_to_reference(ours, theirs, truth, "gradients", "l2")
    surgery.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**given).logits, results[1][0])


@pytest.mark.parametrize("name", ["llama", "t5", "gemma", "bert"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_the_originals(name: str, weight: torch.dtype, build: Any, kernels_pretended: None) -> None:
    module = next(m for m in family(name, build).modules() if recognise_norm(m) is not None).to(weight)
    fused = copy.deepcopy(module)
    assert fuse(fused)[0].outcome == "fused"
    for x_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for cast in (None, torch.bfloat16, torch.float16):
            x = torch.randn(3, 64, dtype=x_dtype)
            with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
                try:
                    expected = module(x)
                except RuntimeError:
                    with pytest.raises(RuntimeError):
                        fused(x)
                    continue
                got = fused(x)
            assert got.dtype == expected.dtype, (x_dtype, cast)
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class _Counted(Norm):
    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def test_what_was_not_planned_is_the_originals(kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Scaled()
    fuse(module)
    assert isinstance(module, FusedNorm)
    assert isinstance(module, _Scaled)
    settings = module._oslo_fusion_settings
    settings["norm"] = _Counted(**vars(settings["norm"]))
    monkeypatch.setattr(_Counted, "calls", 0)
    x = torch.randn(3, 24)
    heard = []
    handle = module.register_forward_hook(lambda m, args, y: heard.append(y.shape))
    module(x)
    assert (_Counted.calls, len(heard)) == (1, 1)
    handle.remove()
    module(x=x)
    module(x.double())
    torch.func.vmap(module)(x)
    torch.func.jvp(module, (x,), (x,))
    torch.jit.trace(module, x, check_trace=False)
    torch.compile(module, backend="eager", fullgraph=True)(x)
    module.double()(x)
    assert _Counted.calls == 1
    module.float()(x)
    assert _Counted.calls == 2
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))


@pytest.mark.gpu
def test_a_gpu_times_both_modes_and_says_the_figures(build: Any) -> None:
    model = build("llama", device=torch.device("cuda"))
    proposals = rows(model, FusionConfig(enable=True, custom_cuda_kernels=("all",)))
    assert proposals
    for proposal in proposals:
        assert proposal.timings
        assert all(t.inference_after is not None and t.training_after is not None for t in proposal.timings)
        assert "µs" in proposal.reason
