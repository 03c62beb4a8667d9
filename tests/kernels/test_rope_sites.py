"""Attention modules: their rotation recognised by value, run through a copy of their forward, and whole models unchanged."""

from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from oslo_fusion import surgery
from oslo_fusion.config import FusionConfig
from oslo_fusion.environment import environment
from oslo_fusion.kernels import rope_sites
from oslo_fusion.kernels.rope_sites import (
    GLOBAL,
    Convention,
    FusedRoPEAttention,
    RotaryPass,
    Sizes,
    convention_of,
    site_function,
    sizes_of,
    with_global,
)
from oslo_fusion.plan import Proposal
from oslo_fusion.testing import assert_close_to_reference

WISH = FusionConfig(enable=True, custom_cuda_kernels=("FusedRoPE",), autotune="off")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
# name of the classes, configuration, (interleaved, angles, partial, contiguous), rotated numbers of a head
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[bool, str, bool, bool], int]] = {
    "llama": ("Llama", GROUPED, (False, "full", False, False), 16),
    "mistral": ("Mistral", GROUPED, (False, "full", False, False), 16),
    "qwen2": ("Qwen2", {**SMALL, "num_key_value_heads": 2}, (False, "full", False, False), 16),
    "qwen3": ("Qwen3", GROUPED, (False, "full", False, False), 16),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 32}, (False, "full", False, False), 32),
    "phi": ("Phi", SMALL, (False, "full", False, False), 8),
    "glm": ("Glm", GROUPED, (True, "first half", True, True), 8),
    "cohere": ("Cohere", {**SMALL, "num_key_value_heads": 2}, (True, "full", False, False), 16),
    "gpt_neox": ("GPTNeoX", SMALL, (False, "full", True, True), 4),
    "granite": ("Granite", GROUPED, (False, "full", False, False), 16),
    "gpt_oss": ("GptOss", {**GROUPED, "num_local_experts": 4}, (False, "pairs", False, True), 16),
    "modernbert": ("ModernBert", SMALL, (False, "full", False, False), 16),
}


def family(name: str) -> nn.Module:
    """A tiny model with random weights."""
    prefix, settings, _, _ = FAMILIES[name]
    kind = "MaskedLM" if name == "modernbert" else "CausalLM"
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{prefix}For{kind}")(config)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the other one takes no float64
    return model.eval()


def rows(model: nn.Module, config: FusionConfig = WISH) -> list[Proposal]:
    return list(RotaryPass().propose(model, config, environment()))


def fuse(model: nn.Module) -> list[Proposal]:
    proposals = rows(model)
    surgery.apply(model, [swap for proposal in proposals for swap in proposal.swaps])
    return proposals


def batch(model: nn.Module, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operator's reference runs, so its place in a model can be tested."""
    monkeypatch.setattr(rope_sites, "choices", lambda *where: {"auto": "triton"})


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the q that reached our rotation."""
    seen: list[tuple[int, ...]] = []
    call = Convention.__call__

    def counted(self: Convention, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(q.shape))
        return call(self, q, *args, **kwargs)

    monkeypatch.setattr(Convention, "__call__", counted)
    return seen


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_attention_is_a_site_and_its_convention_is_found(name: str, used: list[Any], kernels_pretended: None) -> None:
    model, (_, _, expected, rotated) = family(name), FAMILIES[name]
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    proposals = fuse(model)
    assert [p.outcome for p in proposals] == ["fused"] * 2, proposals[0].reason
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for proposal in proposals:
        convention = proposal.swaps[0].settings["rotation"].convention
        assert (convention.interleaved, convention.angles, convention.partial, convention.contiguous) == expected
        module = model.get_submodule(proposal.site.path)
        assert isinstance(module, FusedRoPEAttention)
        sizes = sizes_of(module)
        assert sizes is not None
        assert sizes.rot_dim == rotated
    used.clear()
    with torch.no_grad():
        model(input_ids=batch(model)["input_ids"])
    assert len(used) == 2, "the model does not come through our rotation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_models_obey_the_law(name: str, dtype: torch.dtype, used: list[Any], kernels_pretended: None) -> None:
    _whole_model(family(name).to(dtype), used)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_models_obey_the_law_on_a_gpu(name: str, dtype: torch.dtype, used: list[Any]) -> None:
    _whole_model(family(name).to("cuda", dtype), used)


def _whole_model(model: nn.Module, used: list[Any]) -> None:
    twin, exact, classes = copy.deepcopy(model), copy.deepcopy(model).double(), [type(m) for m in model.modules()]
    proposals = fuse(model)
    assert {p.outcome for p in proposals} == {"fused"}, proposals[0].reason
    given = batch(model)
    used.clear()
    results = []
    for m in (model, twin, exact):
        m.zero_grad()
        output = m(**given)
        output.loss.backward()
        results.append((output.logits, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    assert len(used) == len(proposals)
    with torch.no_grad():
        assert_close_to_reference(model(**given).logits, twin(**given).logits, results[2][0], "inference", "l2")
    assert len(used) == 2 * len(proposals)
    assert_close_to_reference(*(logits for logits, _ in results), "logits", "l2")
    ours, theirs, truth = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in results)
    assert results[0][1].keys() == results[1][1].keys()
    assert_close_to_reference(ours, theirs, truth, "gradients", "l2")
    surgery.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**given).logits, results[1][0])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_outputs_and_tokens_are_the_models(name: str, used: list[Any], kernels_pretended: None) -> None:
    _outputs_and_tokens(family(name), used)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FAMILIES))
def test_outputs_and_tokens_are_the_models_on_a_gpu(name: str, used: list[Any]) -> None:
    _outputs_and_tokens(family(name).to("cuda"), used)


def _outputs_and_tokens(model: nn.Module, used: list[Any]) -> None:
    twin = copy.deepcopy(model)
    for m in (model, twin):
        m.set_attn_implementation("eager")  # the one that returns attentions
    fuse(model)
    ids = batch(model)["input_ids"]
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, output_hidden_states=True, output_attentions=True) for m in (model, twin))
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for a, b in zip((*ours.hidden_states, *ours.attentions), (*theirs.hidden_states, *theirs.attentions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if not hasattr(model, "generate") or not model.can_generate():
        return
    used.clear()
    tokens = [m.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (model, twin)]
    assert torch.equal(*tokens)
    assert {shape[2] for shape in used} == {9, 1}, "the cached steps do not come through our rotation"


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm", "cohere", "gpt_neox", "modernbert"])
def test_autocast_gives_the_dtypes_of_the_original(name: str, used: list[Any], kernels_pretended: None) -> None:
    model = family(name)
    twin = copy.deepcopy(model)
    fuse(model)
    heard: list[list[torch.dtype]] = [[], []]
    for m, list_ in zip((model, twin), heard, strict=True):
        for path in (p.site.path for p in rows(twin)):
            m.get_submodule(path).register_forward_hook(lambda module, args, y, list_=list_: list_.append(y[0].dtype))
    for cast in (torch.bfloat16, torch.float16):
        used.clear()
        with torch.autocast("cpu", dtype=cast), torch.no_grad():
            ours, theirs = (m(input_ids=batch(m)["input_ids"]).logits for m in (model, twin))
        assert len(used) == 2
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    assert heard[0] == heard[1]


def test_a_second_model_and_the_library_are_untouched(used: list[Any], kernels_pretended: None) -> None:
    original, forward = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    model, other = family("llama"), family("llama")
    fuse(model)
    model(**batch(model))
    used.clear()
    other(**batch(other))
    assert used == []
    assert modeling_llama.apply_rotary_pos_emb is original
    assert modeling_llama.LlamaAttention.forward is forward


def test_copies_pickles_and_restoring(used: list[Any], kernels_pretended: None, tmp_path: Path) -> None:
    model = family("gpt_neox")
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    expected = model(**given).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        used.clear()
        assert torch.equal(copied(**given).logits, expected)
        assert len(used) == 2
    torch.save((model, given, expected), tmp_path / "model.pt")
    code = """if True:
        import sys, torch
        from oslo_fusion.kernels.rope_sites import Convention
        calls, call = [], Convention.__call__
        Convention.__call__ = lambda self, *a, **k: calls.append(1) or call(self, *a, **k)
        torch.set_num_threads(1)
        model, given, expected = torch.load(sys.argv[1], weights_only=False)
        torch.testing.assert_close(model(**given).logits, expected)
        print(len(calls))
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2", done.stderr[-2000:]
    surgery.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_what_was_not_planned_is_the_originals(
    used: list[Any], kernels_pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family("llama")
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    used.clear()

    def same(change: Any = lambda m: m) -> None:
        torch.testing.assert_close(change(model)(**given).logits, change(twin)(**given).logits)

    same(lambda m: copy.deepcopy(m).double())
    same(lambda m: torch.compile(copy.deepcopy(m), backend="eager"))
    torch.func.functional_call(model, dict(model.named_parameters()), (), given)
    assert len(used) == 2  # functional_call is plain
    used.clear()
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 5, 64)
    angles = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    attention(x, angles)
    assert used == [(2, 4, 5, 16)]
    used.clear()
    attention(x, tuple(a.requires_grad_() for a in angles))[0].sum().backward()
    assert angles[0].grad is not None
    with pytest.raises(RuntimeError, match="same dtype"):  # the original turns q and k, and not v, into float64
        attention(x, tuple(a.detach().double() for a in angles))
    torch.func.vmap(lambda x: attention(x, tuple(a.detach() for a in angles))[0])(torch.stack([x, x]))
    assert used == []
    wrong = tuple(a.detach()[..., :10] for a in angles)
    with pytest.raises(RuntimeError, match="must match the size"):
        attention(x, wrong)
    called = []

    def patched(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        called.append(q.shape)
        return q, k

    monkeypatch.setattr(modeling_llama, GLOBAL, patched)  # the file's global is asked at every call
    attention(x, tuple(a.detach() for a in angles))
    assert used == []
    assert called[-1] == (2, 4, 5, 16)


# --- recognition -------------------------------------------------------------------------------------------------------------


def turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def plain(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def heads_second(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return plain(q, k, cos, sin, 2)


def with_positions(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 2) -> Any:
    return plain(q, k, cos, sin, unsqueeze_dim)


def backwards(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return plain(q, k, cos, -sin, unsqueeze_dim)


def only_q(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return plain(q, k, cos, sin, unsqueeze_dim)[0], k


def in_place(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    rotated = plain(q, k, cos, sin, unsqueeze_dim)
    return q.copy_(rotated[0]), k.copy_(rotated[1])


def strange_order(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    return tuple(t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in plain(q, k, cos, sin, unsqueeze_dim))


def other_signature(x: Any, cos: Any, sin: Any) -> Any:
    return x


def more_parameters(q: Any, k: Any, cos: Any, sin: Any, **kwargs: Any) -> Any:
    return plain(q, k, cos, sin)


def test_signatures_and_layouts_are_found() -> None:
    base = {"interleaved": False, "angles": "full", "partial": False, "contiguous": False}
    for function, options, layouts, layout in (
        (plain, ("unsqueeze_dim",), (1, 2), 1),
        (heads_second, (), (2,), 2),
        (with_positions, ("position_ids", "unsqueeze_dim"), (1, 2), 2),
    ):
        assert convention_of(function) == Convention(options=options, layouts=layouts, layout=layout, **base)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (backwards, "computes none of the rotations known here"),
        (only_q, "computes none of the rotations known here"),
        (in_place, "computes none of the rotations known here"),
        (strange_order, "unusual memory order"),
        (other_signature, "takes (x: "),
        (more_parameters, "**kwargs"),
    ],
)
def test_what_computes_something_else_is_refused(function: Any, reason: str) -> None:
    found = convention_of(function)
    assert isinstance(found, str)
    assert reason in found


def attention_file(**names: Any) -> types.ModuleType:
    """A modeling file of nobody's library, with its own globals."""
    module = types.ModuleType("attention_file")
    module.__dict__.update({"torch": torch, "nn": nn, GLOBAL: plain, "SCALE": 1.0, **names})
    sys.modules[module.__name__] = module
    source = """
class Base(nn.Module):
    num_heads, head_dim = 4, 16

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, x, cos, sin, *, twice=False):
        q = self.mix(x).unflatten(-1, (4, 16)).transpose(1, 2)
        q, k = (lambda: apply_rotary_pos_emb(q, q, cos, sin))()
        if twice:
            q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
        return SCALE * (q + k)

class WithSuper(Base):
    def forward(self, x, cos, sin):
        apply_rotary_pos_emb
        return super().forward(x, cos, sin, twice=True) + len(__class__.__name__)

class Writer(Base):
    def forward(self, x, cos, sin):
        global SCALE
        SCALE = 2.0
        return apply_rotary_pos_emb(x, x, cos, sin)[0]

class NoHeads(Base):
    num_heads = None
"""
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


@pytest.fixture
def file() -> Any:
    module = attention_file()
    yield module
    del sys.modules[module.__name__]


def test_globals_are_live_and_keywords_closures_and_super_work(
    file: types.ModuleType, used: list[Any], kernels_pretended: None
) -> None:
    inputs = torch.randn(2, 5, 64), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for make in (file.Base, file.WithSuper):
        module = make()
        twin = copy.deepcopy(module)
        (row,) = fuse(module)
        assert row.outcome == "fused", row.reason
        used.clear()
        torch.testing.assert_close(module(*inputs), twin(*inputs))
        if make is file.Base:
            assert len(used) == 1
            torch.testing.assert_close(module(*inputs, twice=True), twin(*inputs, twice=True))
            assert len(used) == 3
        expected = module(*inputs)
        file.SCALE = 3.0
        torch.testing.assert_close(module(*inputs), twin(*inputs))
        assert not torch.allclose(module(*inputs), expected)
        file.SCALE = 1.0


def test_refusals_say_why(file: types.ModuleType, kernels_pretended: None) -> None:
    class Decorated(file.Base):  # type: ignore[name-defined, misc]
        @functools.wraps(file.Base.forward)
        def forward(self, *args: Any) -> Any:
            return 2 * file.Base.forward(self, *args)

    replaced, frozen = file.Base(), file.Base()
    replaced.forward = replaced.forward
    frozen.mix = nn.Identity()
    modules = nn.ModuleList(
        [replaced, Decorated(), file.Writer(), file.NoHeads(), frozen, file.Base().to("meta"), file.Base().double()]
    )
    assert [p.reason for p in rows(modules)] == [
        "its forward was replaced on the instance",
        "its forward is decorated, and a copy would run without the decoration",
        "its forward may change the globals of its module",
        "neither it nor its configuration says how many heads it has and how wide they are",
        "it has no parameters to tell its device and dtype by",
        "it has no memory yet (meta device)",
        "no kernel for weights of float64",
    ]
    file.apply_rotary_pos_emb = functools.partial(plain)
    assert "is no function: partial" in rows(file.Base())[0].reason
    file.apply_rotary_pos_emb = backwards
    assert "computes none of the rotations" in rows(file.Base())[0].reason


def test_a_copy_sees_one_name_differently() -> None:
    scope: dict[str, Any] = {"one": 1, "two": 2}
    exec(
        "def f(a, b=3, *, c=4):\n    return one, two, [two for _ in (1,)], (lambda: one)(), len('ab'), a, b, c, missing", scope
    )
    function = scope["f"]
    copied = with_global(function, "one", "ours")
    for value in range(100):  # often enough for the interpreter to specialise both
        scope["two"], scope["missing"] = value, -value
        assert copied(0) == ("ours", value, [value], "ours", 2, 0, 3, 4, -value)
        assert function(0)[:2] == (1, value)
    del scope["missing"]
    with pytest.raises(NameError, match="missing"):
        copied(0)
    scope["len"] = lambda text: "shadowed"
    scope["missing"] = 0
    assert copied(0, c=5)[4:] == ("shadowed", 0, 3, 5, 0)


def test_names_choose() -> None:
    assert rows(family("llama"), FusionConfig(enable=True)) == []
    assert rows(family("llama"), FusionConfig(enable=True, custom_cuda_kernels=("FusedRMSNorm",))) == []
    (row,) = rows(nn.Linear(3, 3))
    assert (row.outcome, row.reason) == ("refused", f"no module of this Linear calls {GLOBAL}")
    assert rows(nn.Linear(3, 3), FusionConfig(enable=True, custom_cuda_kernels=("all",))) == []
    (row,) = rows(family("llama"), FusionConfig(custom_cuda_kernels=("FusedRoPE",)))
    assert (row.outcome, row.reason) == ("off", "enable is false")
    assert site_function(nn.Linear(3, 3)) is None


def test_the_cpu_is_refused() -> None:
    reason = "no kernel on the CPU: the extension has none for rope"
    assert {(p.outcome, p.reason) for p in rows(family("llama"))} == {("refused", reason)}


def test_sizes_are_read_off_the_module_or_its_configuration() -> None:
    assert sizes_of(family("gpt_neox").gpt_neox.layers[0].attention) == Sizes(4, 4, 16, 4)
    assert sizes_of(family("qwen2").model.layers[0].self_attn) == Sizes(4, 2, 16, 16)
    assert sizes_of(nn.Linear(3, 3)) is None


@pytest.mark.parametrize("slower", [True, False])
def test_only_what_wins(slower: bool, kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from oslo_fusion import probe
    from oslo_fusion.plan import Timing

    after = 20.0 if slower else 5.0
    monkeypatch.setattr(probe, "time_pair", lambda *a, **k: Timing("float32", "1", 10.0, after, 10.0, 10.0))
    row = rows(family("llama"), FusionConfig(enable=True, custom_cuda_kernels=("all",)))[0]
    if slower:
        assert row.outcome == "refused"
        assert "not faster here: float32 1: forward 10 → 20 µs" in row.reason
    else:
        (swap,) = row.swaps
        rotation = swap.settings["rotation"]
        assert ((torch.float32, torch.float32, None), torch.float32) in rotation.inference
        assert ((torch.bfloat16, torch.float32, torch.bfloat16), torch.float32) in rotation.inference
        assert rotation.training == ()


def test_what_fails_under_the_law_is_refused(kernels_pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Convention.__call__
    monkeypatch.setattr(Convention, "__call__", lambda *a, **k: tuple(1.01 * t for t in call(*a, **k)))
    assert "computes something else in float32: output error" in rows(family("llama"))[0].reason


def test_layers_that_differ_in_their_number_are_decided_for_once(
    kernels_pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[object] = []
    result = rope_sites._Decision.result
    monkeypatch.setattr(rope_sites._Decision, "result", lambda self: (decided.append(self), result(self))[1])
    model = family("llama")
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert [row.outcome for row in rows(model)] == ["fused"] * 2
    assert len(decided) == 1


@pytest.mark.gpu
def test_a_gpu_times_both_modes_and_says_the_figures() -> None:
    config = FusionConfig(enable=True, custom_cuda_kernels=("FusedRoPE",))
    for proposal in rows(family("llama").to("cuda"), config):
        assert proposal.timings
        assert all(t.inference_after is not None and t.training_after is not None for t in proposal.timings)
        assert "µs" in proposal.reason
