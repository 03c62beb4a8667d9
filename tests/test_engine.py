"""plan, initialize, report and restore on whole models: same object, same answers, undone without a trace."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import oslo_fusion
from oslo_fusion import ConfigError, PlanError, RefusalError, engine, surgery
from oslo_fusion.aot import room
from oslo_fusion.environment import Ability, Environment
from oslo_fusion.kernels import glu_sites
from oslo_fusion.passes import PASSES
from oslo_fusion.plan import Proposal, Site, Swap, collapse_paths
from oslo_fusion.testing import assert_close_to_reference

OFF = {"kernel_fusion": {"enable": True, "autotune": "off"}}
MODELS = ("gpt2", "bert", "roberta", "t5", "t5-v1_1", "bart", "vit", "opt", "llama")

ONE, EPILOGUE, GATED, RESIDUAL = "activation", "linear + activation", "gate · up", "dropout + residual"

# (kind, outcome) → sites in the two-layer model, on a machine whose TorchScript fuser cannot fuse (a CPU).
WITHOUT_FUSER: dict[str, dict[tuple[str, str], int]] = {
    "gpt2": {(ONE, "fused"): 2, (EPILOGUE, "refused"): 2},
    "bert": {(ONE, "refused"): 3, (EPILOGUE, "refused"): 3, (RESIDUAL, "refused"): 4},
    "roberta": {(ONE, "refused"): 2, (EPILOGUE, "refused"): 2, (RESIDUAL, "refused"): 4},
    "t5": {(ONE, "refused"): 4, (EPILOGUE, "refused"): 4, (RESIDUAL, "refused"): 4},
    "t5-v1_1": {(ONE, "fused"): 4, (GATED, "refused"): 4, (RESIDUAL, "refused"): 4},
    "bart": {(ONE, "refused"): 4},
    "vit": {(ONE, "refused"): 2, (EPILOGUE, "refused"): 2},
    "opt": {(ONE, "refused"): 2},
    "llama": {(ONE, "refused"): 2, (GATED, "refused"): 2},
}

# The same on a machine whose fuser fuses; nothing is timed, so all that is proven is taken.
WITH_FUSER: dict[str, dict[tuple[str, str], int]] = {
    **WITHOUT_FUSER,
    "bert": {(ONE, "refused"): 3, (EPILOGUE, "refused"): 3, (RESIDUAL, "fused"): 4},
    "roberta": {(ONE, "refused"): 2, (EPILOGUE, "refused"): 2, (RESIDUAL, "fused"): 4},
    "t5": {(ONE, "refused"): 4, (EPILOGUE, "refused"): 4, (RESIDUAL, "fused"): 4},
    "t5-v1_1": {(GATED, "fused"): 4, (RESIDUAL, "fused"): 4},
    "llama": {(GATED, "fused"): 2},
}


def counts(plan: Any) -> dict[tuple[str, str], int]:
    return dict(Counter((row.site.kind, row.outcome) for row in plan.proposals))


def output(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("name", MODELS)
def test_every_candidate_site_is_planned_once(name: str, build: Any) -> None:
    plan = oslo_fusion.plan(build(name), OFF)
    assert counts(plan) == WITHOUT_FUSER[name]
    paths = [row.site.path for row in plan.proposals]
    assert len(paths) == len(set(paths))
    assert all(row.reason for row in plan.proposals)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("fuser_pretended")
def test_fused_models_give_the_same_answers_and_gradients(name: str, build: Any, inputs: Any) -> None:
    model = build(name)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert counts(oslo_fusion.plan(model, OFF)) == WITH_FUSER[name]
    assert oslo_fusion.initialize(model, OFF) is model
    given = inputs(model, name)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    for _ in range(3):  # TorchScript's profiling executor changes its code at the third call
        assert_close_to_reference(output(model, given), output(twin, given), output(exact, wide), name)
    for m in (model, twin, exact):
        for part in m.modules():  # dropout draws other numbers when fused: compare without
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    given = inputs(model, name, labels=True)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    for m, data in ((model, given), (twin, given), (exact, wide)):
        m(**data).loss.backward()
    for (path, a), b, c in zip(model.named_parameters(), twin.parameters(), exact.parameters(), strict=True):
        if b.grad is not None:
            assert a.grad is not None, path
            assert_close_to_reference(a.grad, b.grad, c.grad, path, norm="l2")


@pytest.mark.parametrize("name", ["gpt2", "t5-v1_1", "bert"])
@pytest.mark.usefixtures("fuser_pretended")
def test_everything_people_do_with_a_model_still_works(name: str, build: Any, inputs: Any, tmp_path: Path) -> None:
    model, original = build(name), build(name)
    keys, cls = list(model.state_dict()), type(model)
    oslo_fusion.initialize(model, OFF)
    given = inputs(model, name)
    expected = output(model, given)
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    original.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    model.save_pretrained(tmp_path / "saved")
    reread = cls.from_pretrained(tmp_path / "saved").eval()
    for other in (copied, loaded, pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, given), expected)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert str(oslo_fusion.report(other)) == str(oslo_fusion.report(model))
    assert not any(surgery.is_fused(m) for m in reread.modules())
    torch.testing.assert_close(output(reread, given), expected)
    for module, before in zip(model.modules(), original.modules(), strict=True):
        assert isinstance(module, type(before))


def test_a_pickled_model_loads_in_a_fresh_process(build: Any, tmp_path: Path) -> None:
    model = oslo_fusion.initialize(build("gpt2"), OFF)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(type(model.transformer.h[0].mlp.act).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "FusedActivation[NewGELUActivation]"


def test_restore_leaves_no_trace(build: Any) -> None:
    model = build("gpt2")
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    oslo_fusion.initialize(model, OFF)
    assert any(surgery.is_fused(m) for m in model.modules())
    assert oslo_fusion.restore(model) is model
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before
    with pytest.raises(PlanError, match="has not been initialized"):
        oslo_fusion.report(model)
    oslo_fusion.restore(model)  # twice does no harm


def test_plan_is_pure(build: Any) -> None:
    model = build("gpt2").train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = [(type(m), sorted(m.__dict__), m.training) for m in model.modules()]
    random_state = torch.get_rng_state()
    oslo_fusion.plan(model, {"kernel_fusion": {"enable": True}})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [(type(m), sorted(m.__dict__), m.training) for m in model.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_initialize_again_replaces_the_first(build: Any) -> None:
    model = oslo_fusion.initialize(build("gpt2"), OFF)
    fused = [type(m) for m in model.modules()]
    assert counts(oslo_fusion.plan(model, OFF)) == WITHOUT_FUSER["gpt2"]
    assert [type(m) for m in model.modules()] == fused, "planning an initialized model must leave it initialized"
    oslo_fusion.initialize(model, OFF)
    assert [type(m) for m in model.modules()] == fused
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": False}})
    assert not any(surgery.is_fused(m) for m in model.modules())
    assert oslo_fusion.report(model).count("off") == 1


def test_a_second_model_is_left_alone(build: Any) -> None:
    first, second = build("gpt2"), build("gpt2")
    oslo_fusion.initialize(first, OFF)
    assert not any(surgery.is_fused(m) for m in second.modules())
    assert type(second.transformer.h[0].mlp.act).__module__ == "transformers.activations"


def test_a_failure_half_way_is_rolled_back(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = oslo_fusion.initialize(build("gpt2"), OFF)
    before, report = [type(m) for m in model.modules()], oslo_fusion.report(model)
    real, calls = surgery.swap, []

    def fail_at_the_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("half-way")
        real(*args)

    monkeypatch.setattr(surgery, "swap", fail_at_the_second)
    with pytest.raises(RuntimeError, match="half-way"):
        oslo_fusion.initialize(model, OFF)
    assert len(calls) == 2
    assert [type(m) for m in model.modules()] == before
    assert oslo_fusion.report(model) is report


def test_refusals_can_raise(build: Any) -> None:
    model = build("bert")
    before = [type(m) for m in model.modules()]
    with pytest.raises(RefusalError, match="on_refusal"):
        oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "on_refusal": "raise"}})
    assert [type(m) for m in model.modules()] == before


def test_verify_puts_the_difference_into_the_report(build: Any) -> None:
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "verify": True}}
    model = oslo_fusion.initialize(build("gpt2").train(), config)
    verification = oslo_fusion.report(model).verification
    assert verification is not None
    assert 0 <= verification.max_difference < 1e-5 < verification.max_value
    assert "largest difference" in str(oslo_fusion.report(model))
    assert model.training
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="dummy_inputs"):
        oslo_fusion.initialize(plain, config)


def test_absent_rooms_are_said_aloud(build: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PASSES", tuple(room for room in engine.PASSES if "FusedRMSNorm" not in room.kernels))
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "custom_cuda_kernels": ["FusedRMSNorm"]}}
    with caplog.at_level(logging.WARNING, logger="oslo_fusion"):
        model = oslo_fusion.initialize(build("gpt2"), config)
    assert "custom_cuda_kernels: FusedRMSNorm: this kernel is not part of this version" in caplog.text
    assert oslo_fusion.report(model).count("fused", ONE) == 2


def test_two_claims_on_one_module_are_an_error() -> None:
    site = Site("a.b", "activation", "GELU")
    row = Proposal(site, "jit", "x", "y", "fused", "r", claims=("a.b",))
    other = Proposal(Site("a", "mlp", "MLP"), "other", "x", "y", "fused", "r", claims=("a", "a.b"))
    with pytest.raises(PlanError, match=r"a\.b: claimed by jit .* and by other"):
        engine._check_claims([row, other])


class Taker:
    """A pass that claims given paths, and does not look at what is taken."""

    name = "early"
    kernels: tuple[str, ...] = ()

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def propose(self, model: nn.Module, config: Any, environment: Any, taken: Any = None) -> list[Proposal]:
        return [Proposal(Site(p, "kind", "Module"), self.name, "x", "y", "fused", "r", claims=(p,)) for p in self.paths]


def with_kernels(build: Any, name: str, monkeypatch: pytest.MonkeyPatch, pretended: bool) -> Any:
    if pretended:
        monkeypatch.setattr(glu_sites, "choices", lambda *where: {"auto": "triton"})
    model = build(name)
    block = {**OFF["kernel_fusion"], "custom_cuda_kernels": ["FusedSwiGLU", "FusedGeGLU"]}
    plan = oslo_fusion.plan(model, {"kernel_fusion": block})
    return model, plan, Counter((row.room, row.site.kind, row.outcome) for row in plan.proposals)


@pytest.mark.usefixtures("fuser_pretended")
@pytest.mark.parametrize(("name", "gated"), [("llama", 2), ("t5-v1_1", 4)])
def test_two_rooms_want_one_site_and_the_first_gets_it(
    name: str, gated: int, build: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, found = with_kernels(build, name, monkeypatch, pretended=True)
    assert found["kernels", GATED, "fused"] == gated
    assert not any(room == "jit" and kind in (GATED, ONE) for room, kind, _ in found), "claimed by the kernels room"
    assert found["jit", RESIDUAL, "fused"] == WITH_FUSER[name].get((RESIDUAL, "fused"), 0), "none of it is in the way"
    given = inputs(model, name)
    before = output(model, given)
    oslo_fusion.initialize(model, plan.config)
    assert sum(type(m).__name__.startswith("FusedGLU[") for m in model.modules()) == gated
    torch.testing.assert_close(output(model, given), before)


@pytest.mark.usefixtures("fuser_pretended")
def test_what_the_first_room_refuses_the_second_takes(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, found = with_kernels(build, "llama", monkeypatch, pretended=False)
    assert found["kernels", GATED, "refused"] == found["jit", GATED, "fused"] == 2


@pytest.mark.usefixtures("fuser_pretended")
def test_a_site_that_needs_a_taken_child_is_off_and_says_so(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    activation = "model.layers.0.mlp.act_fn"
    monkeypatch.setattr(engine, "PASSES", (Taker(activation), *PASSES))
    rows = {row.site.path: row for row in oslo_fusion.plan(model, OFF).proposals}
    row = rows["model.layers.0.mlp"]
    assert (row.outcome, row.claims, row.swaps) == ("off", (), ())
    assert row.reason == f"taken by the early room: kind at {activation}"
    assert rows[activation].room == "early"
    assert rows["model.layers.1.mlp"].outcome == "fused"


def test_a_pass_that_does_not_look_is_an_error(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    activation = "transformer.h.0.mlp.act"
    monkeypatch.setattr(engine, "PASSES", (*PASSES, Taker(activation)))
    with pytest.raises(PlanError, match=r"mlp\.act: claimed by jit .* and by early"):
        oslo_fusion.plan(model, OFF)


def test_a_plan_for_another_model_changes_nothing(build: Any) -> None:
    model = build("bert")
    swap = Swap("transformer.h.0.mlp.act", nn.Identity, {})
    with pytest.raises(PlanError, match=r"transformer\.h\.0\.mlp\.act: not in this"), surgery.transaction(model):
        surgery.apply(model, [swap])


def test_report_reads_well(build: Any) -> None:
    model = oslo_fusion.initialize(build("gpt2"), {"data": 1, **OFF})
    text = str(oslo_fusion.report(model))
    assert "transformer.h.{0-1}.mlp.act" in text
    assert "4 sites: 2 fused, 2 refused" in text
    assert "left alone in the configuration, outside kernel_fusion: data" in text
    assert max(map(len, text.splitlines())) <= 150
    data = oslo_fusion.report(model).to_dict()
    assert len(data["rows"]) == 4
    assert {row["outcome"] for row in data["rows"]} == {"fused", "refused"}
    import json

    assert json.loads(json.dumps(data)) == data


def test_repeated_paths_collapse() -> None:
    assert collapse_paths(["h.0.m", "h.1.m", "h.2.m", "h.5.m"]) == "h.{0-2,5}.m"
    assert collapse_paths(["a.b"]) == "a.b"
    assert collapse_paths([f"b.{i}.l.{i + 1}" for i in range(2)]) == "b.{0-1}.l.{1-2}"


def test_importing_is_light() -> None:
    code = (
        "import sys, oslo_fusion, torch\n"
        "assert 'triton' not in sys.modules and 'transformers' not in sys.modules, 'heavy import'\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_gives_the_same_tokens(build: Any) -> None:
    for name in ("gpt2", "t5-v1_1", "llama"):
        model = build(name)
        ids = torch.randint(3, 500, (2, 6))
        arguments = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
        before = model.generate(ids, **arguments)
        oslo_fusion.initialize(model, OFF)
        assert torch.equal(model.generate(ids, **arguments), before)


def test_gradient_checkpointing_and_hidden_states(build: Any, inputs: Any) -> None:
    model = build("gpt2")
    given = inputs(model, "gpt2", labels=True)
    before = model(**given, output_hidden_states=True, output_attentions=False)
    oslo_fusion.initialize(model, OFF)
    after = model(**given, output_hidden_states=True)
    assert len(after.hidden_states) == len(before.hidden_states)
    for a, b in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_enable()
    model.train()
    model(**given, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_originals_dtypes(dtype: torch.dtype, build: Any) -> None:
    model = build("gpt2", dtype=dtype)
    activation = model.transformer.h[0].mlp.act
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = activation(x)
    oslo_fusion.initialize(model, OFF)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert activation(x).dtype == before.dtype


def test_all_beside_a_name_is_no_unknown_kernel(build: Any) -> None:
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "custom_cuda_kernels": ["all", "FusedLinearCrossEntropy"]}}
    assert oslo_fusion.plan(build("gpt2"), config).count("refused", "configuration") == 0


def test_torch_compile_takes_an_initialized_model(build: Any, inputs: Any) -> None:
    model = build("gpt2")
    given = inputs(model, "gpt2")
    expected = output(model, given)
    oslo_fusion.initialize(model, OFF)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, given), expected)


@pytest.mark.parametrize(
    ("block", "device", "expected"),
    [
        ({"enable": True, "memory_efficient_fusion": True}, "cuda", ["loaded", "planned"]),
        ({"enable": True, "memory_efficient_fusion": True}, "cpu", ["planned"]),
        ({"enable": True}, "cuda", ["planned"]),
        ({"enable": False, "memory_efficient_fusion": True}, "cuda", ["planned"]),
    ],
)
def test_the_compiler_starts_before_the_plan_is_made(
    block: dict[str, Any], device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def planned(*_: object) -> None:
        done.append("planned")
        raise PlanError("enough seen")

    monkeypatch.setattr(room, "load_inductor", lambda: done.append("loaded"))
    monkeypatch.setattr(room, "placement", lambda _: (torch.device(device), torch.float32))
    monkeypatch.setattr(Environment, "inductor", lambda *_: Ability("Inductor", True, "here"))
    monkeypatch.setattr(engine, "_plan", planned)
    with pytest.raises(PlanError, match="enough seen"):
        oslo_fusion.initialize(nn.Linear(2, 2), {"kernel_fusion": block})
    assert done == expected


def test_a_compiler_that_cannot_be_loaded_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("cannot import name 'language' from 'triton'")

    monkeypatch.setattr(room, "load_inductor", broken)
    monkeypatch.setattr(room, "placement", lambda _: (torch.device("cuda"), torch.float32))
    monkeypatch.setattr(Environment, "inductor", lambda *_: Ability("Inductor", True, "here"))
    model = nn.Linear(2, 2)
    assert oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "memory_efficient_fusion": True}}) is model
