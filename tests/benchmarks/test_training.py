"""Training steps: the whole way on tiny models, and what is done with red checks, failures and absent recipes."""

from __future__ import annotations

import json
import sys
import types
from typing import ClassVar

import pytest
import torch

from benchmarks import training
from oslo_fusion import engine
from oslo_fusion.workload import Workload

LOAD = Workload("llama", 2, 8, "training", "bfloat16", "cpu", "tiny")
MEASURED = {"median_s": 0.2, "p90_s": 0.3, "mean_s": 0.2, "first_step_s": 1.0, "peak_bytes": None, "repeats": 4}


def test_dry_run_checks_times_and_writes(tmp_path, capsys):
    names = f"{training.EAGER},{training.OURS}"
    code = training.main(
        ["--dry", "--models", "llama-1b", "--providers", names, "--rounds", "2", "--out", str(tmp_path), "--commit", "abc"]
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    (path,) = tmp_path.glob("training-cpu-*.json")
    found = json.loads(path.read_text())
    assert found["commit"]["id"] == "abc"
    (section,) = found["sections"]
    assert section["error"] is None
    assert section["rounds"] == 2
    assert section["flops"] == 6 * section["parameters"] * 2 * 8
    eager, ours = section["rows"]
    assert (eager["provider"], ours["provider"]) == (training.EAGER, training.OURS)
    for row in (eager, ours):
        assert row["error"] is row["absent"] is None
        assert row["repeats"] == 2 * training.CALLS
        assert row["check"]["green"]
        assert len(row["losses"]) == training.RECORDED
        assert row["losses"][2] < row["losses"][0], "three steps on one batch did not lower its loss"
        assert row["median_s"] > 0
        assert row["percent_of_roof"] > 0
    assert eager["fusion"] is None
    assert ours["fusion"]["refused"], "without a GPU the norms are refused, and that is said"
    assert eager["speedup"] == 1.0
    assert training.OURS in printed


class Canned:
    """A provider that answers from a list instead of a process."""

    answers: ClassVar[dict[str, dict[str, tuple[str, object]]]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, name, load):
        self.row = {"provider": name, "error": None, "absent": None}

    def ask(self, name, *arguments):
        provider = self.row["provider"]
        if self.row["error"] is not None:
            return "out", None
        self.asked.append((provider, name))
        usual = {
            "prepare": ("done", {"losses": [11.0, 10.0, 9.0], "prepare_s": 0.5, "parameters": 100, "fusion": None}),
            "check": ("done", {"loss": {}}),
            "time": ("done", None),
            "finish": ("done", dict(MEASURED)),
        }
        kind, answer = self.answers.get(provider, {}).get(name, usual[name])
        if kind == "error":
            self.row["error"] = answer
            return "out", None
        return kind, answer

    def close(self):
        self.asked.append((self.row["provider"], "close"))


@pytest.fixture
def canned(monkeypatch):
    monkeypatch.setattr(training, "Provider", Canned)
    monkeypatch.setattr(Canned, "answers", {})
    monkeypatch.setattr(Canned, "asked", [])
    return Canned


def measure(*names, deadline=float("inf"), rounds=2):
    return training.measure(LOAD, names, rounds, deadline, 1e12)


def test_providers_take_turns(canned):
    section = measure("eager", training.OURS, "liger")
    timed = [provider for provider, what in canned.asked if what == "time"]
    assert timed == ["eager", training.OURS, "liger"] * 2
    assert [row["speedup"] for row in section["rows"]] == [1.0, 1.0, 1.0]
    assert section["flops"] == 6 * 100 * 16
    assert section["rows"][0]["percent_of_roof"] == pytest.approx(100 * 9600 / (0.2 * 1e12))


def test_ours_red_is_not_timed(canned):
    canned.answers[training.OURS] = {"check": ("red", "gradient of x: error 1")}
    section = measure("eager", training.OURS)
    assert "the check is red" in section["error"]
    assert "gradient of x" in section["error"]
    assert not any(what == "time" for _, what in canned.asked)
    assert not any("median_s" in row for row in section["rows"])
    assert {provider for provider, what in canned.asked if what == "close"} == {"eager", training.OURS}


def test_a_red_peer_is_timed_and_named(canned):
    canned.answers["liger"] = {"check": ("red", "gradient of x: error 1")}
    section = measure("eager", "liger")
    assert section["error"] is None
    assert section["rows"][1]["check"] == {"green": False, "found": "gradient of x: error 1"}
    assert section["rows"][1]["median_s"] == 0.2


def test_another_first_loss_is_not_timed(canned):
    canned.answers["liger"] = {
        "prepare": ("done", {"losses": [11.1, 10.0, 9.0], "prepare_s": 0.5, "parameters": 100, "fusion": None})
    }
    section = measure("eager", "liger")
    assert "first loss of liger: 11.1" in section["error"]
    assert not any(what == "time" for _, what in canned.asked)


def test_a_failure_is_a_row_and_the_others_go_on(canned):
    canned.answers["liger"] = {"time": ("error", "OutOfMemoryError: no")}
    section = measure("eager", "liger")
    assert section["rows"][1]["error"] == "OutOfMemoryError: no"
    assert "median_s" not in section["rows"][1]
    assert section["rows"][0]["median_s"] == 0.2


def test_one_round_is_run_even_after_the_deadline(canned):
    assert measure("eager", deadline=float("-inf"), rounds=5)["rounds"] == 1


def row(provider, loss):
    return {"provider": provider, "losses": [loss]}


@pytest.mark.parametrize(
    ("loss", "wrong"), [(11.0, False), (11.0 * (1 + 2**-8), False), (11.0 * (1 + 2**-6), True), (float("nan"), True)]
)
def test_law_of_the_first_loss(loss, wrong):
    said = training.judge([row("eager", 11.0), row("liger", loss)])
    assert (said is not None) == wrong
    assert said is None or "liger" in said


def test_eager_without_a_number_is_wrong_and_without_eager_nothing_is_judged():
    assert "eager" in training.judge([row("eager", float("nan"))])
    assert training.judge([row("liger", 3.0), {"provider": "eager"}]) is None


def test_liger_recipe_is_applied_to_the_instance_or_said_to_be_absent(monkeypatch):
    seen = []
    fake = types.ModuleType("liger_kernel.transformers.monkey_patch")
    fake.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **arguments: seen.append(arguments)}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(training, "liger_version", lambda: "0.8.5")
    model = LOAD.build()
    training.apply_provider("liger kernels", model)
    training.apply_provider("liger", model)
    assert seen == [
        {"model": model, "fused_linear_cross_entropy": False},
        {"model": model, "fused_linear_cross_entropy": True},
    ]
    with pytest.raises(training.Absent, match=r"0\.8\.5 has no recipe for t5"):
        training.apply_provider("liger", Workload("t5", 2, 8, size="tiny").build())


def test_without_liger_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(training.Absent, match="cannot be imported"):
        training.apply_provider("liger", LOAD.build())


def test_kernels_alone_leave_the_torchscript_room_out(fuser_pretended, monkeypatch):
    untimed = {"kernel_fusion": {**training.CONFIG["kernel_fusion"], "autotune": "off"}}
    monkeypatch.setattr(training, "CONFIG", untimed)
    alone, everything = LOAD.build(), LOAD.build()
    training.apply_provider(training.OURS, alone)
    training.apply_provider("oslo_fusion", everything)
    assert "jit" in {row.room for row in engine.report(everything).rows}
    rooms = {row.room for row in engine.report(alone).rows}
    assert rooms
    assert "jit" not in rooms


@pytest.mark.parametrize("name", training.MODELS)
def test_runner_goes_through_all_its_parts(name):
    model, _, _ = training.MODELS[name]
    runner = training.Runner(training.OURS, Workload(model, 9, 8, "training", "bfloat16", "cpu", "tiny"))
    assert runner.small.batch == 1
    found = runner.prepare()
    assert len(found["losses"]) == training.RECORDED
    assert set(runner.check()) == {"output", "loss", "worst_gradient"}
    weights = [p.detach().clone() for p in runner.parameters]
    runner.time(1)
    assert all(torch.equal(before, after) for before, after in zip(weights, runner.parameters, strict=True))
    assert runner.finish()["repeats"] == 1


def test_wrong_gradient_is_red(monkeypatch):
    def spoil(name, model):
        model.model.layers[0].mlp.gate_proj.weight.register_hook(lambda gradient: 1.1 * gradient)

    monkeypatch.setattr(training, "apply_provider", spoil)
    runner = training.Runner(training.OURS, LOAD)
    runner.prepare()
    with pytest.raises(AssertionError, match=r"gradient of model\.layers\.0\.mlp\.gate_proj\.weight"):
        runner.check()


@pytest.mark.parametrize("arguments", [["--models", "bert"], ["--providers", "ligr"], ["--rounds", "0"], ["--models", ","]])
def test_bad_arguments(arguments, capsys):
    assert training.main(["--dry", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
