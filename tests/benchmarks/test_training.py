"""Training steps: the whole way on tiny models, and what is done with red checks, failures and absent recipes."""

from __future__ import annotations

import copy
import json
import os
import sys
import types
from typing import ClassVar

import pytest
import torch

from benchmarks import training
from oslo_fusion import engine
from oslo_fusion.workload import Workload

LOAD = Workload("llama", 2, 8, "training", "bfloat16", "cpu", "tiny")
MEASURED = {"median_s": 0.2, "p90_s": 0.3, "mean_s": 0.2, "peak_bytes": None, "repeats": 5}
PREPARED = {
    "losses": [11.0, 10.0, 9.0],
    "prepare_s": 0.5,
    "first_step_s": 1.0,
    "parameters": 100,
    "tokens": 16,
    "dropout": False,
    "fusion": None,
}


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
        assert len(row["losses"]) == training.RECORDED
        assert row["losses"][2] < row["losses"][0], "three steps on one batch did not lower its loss"
        assert row["median_s"] > 0
        assert row["percent_of_roof"] > 0
        assert {"prepare", "time"} <= row["seconds"].keys()
    assert "check" not in eager, "it is the yardstick"
    assert ours["check"]["green"]
    assert section["commit"]["id"] == "abc"
    assert section["roof"]["matmul_flops_per_s"] > 0
    assert eager["fusion"] is None
    assert ours["fusion"]["refused"], "without a GPU the norms are refused, and that is said"
    assert eager["speedup"] == 1.0
    assert training.OURS in printed


class Canned:
    """A provider that answers from a list instead of a process."""

    answers: ClassVar[dict[str, dict[str, tuple[str, object]]]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, name, load, caches):
        self.name, self.load, self.caches = name, load, caches.name
        self.row = {"provider": name, "error": None, "absent": None}

    def ask(self, name, *arguments):
        self.begin(name, *arguments)
        return self.end()

    def begin(self, name, *arguments):
        self.pending = name
        if self.row["error"] is None:
            self.asked.append((self.name, name))

    def end(self):
        if self.row["error"] is not None:
            return "out", None
        usual = {
            "build": ("done", None),
            "refer": ("done", None),
            "prepare": ("done", PREPARED),
            "check": ("done", {"loss": {}}),
            "time": ("done", MEASURED),
            "profile": ("done", {"device_ms": 1.0}),
        }
        kind, answer = copy.deepcopy(self.answers.get(self.name, {}).get(self.pending, usual[self.pending]))
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


def measure(*names, seconds=float("inf"), rounds=2, **more):
    return training.measure(LOAD, names, rounds, seconds, 1e12, **more)


def asked(canned, what):
    return [provider for provider, asked_for in canned.asked if asked_for == what]


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
    canned.answers["liger"] = {"prepare": ("done", {**PREPARED, "losses": [11.1, 10.0, 9.0]})}
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
    assert measure("eager", seconds=float("-inf"), rounds=5)["rounds"] == 1


def test_the_truth_is_computed_once_and_by_the_next_if_the_first_cannot(canned):
    measure("eager", training.OURS)
    assert asked(canned, "refer") == ["eager"]
    canned.answers["eager"] = {"refer": ("error", "OutOfMemoryError: no")}
    section = measure("eager", training.OURS)
    assert asked(canned, "refer") == ["eager", "eager", training.OURS]
    assert section["rows"][0]["error"] == "OutOfMemoryError: no"
    assert section["rows"][1]["check"]["green"]


def test_ours_is_first_and_each_is_checked_before_the_next_is_prepared(canned):
    measure("eager", "compile", "liger", training.OURS, training.BEST)
    order = [entry for entry in canned.asked if entry[1] in ("prepare", "check")]
    names = [training.BEST, training.OURS, "eager", "compile", "liger"]
    assert order == [(n, what) for n in names for what in ("prepare", "check") if (n, what) != ("eager", "check")]


def test_a_check_that_cannot_be_made_is_said(canned):
    canned.answers["compile"] = {"prepare": ("done", {**PREPARED, "dropout": True}), "check": ("done", None)}
    section = measure("eager", "compile")
    assert section["rows"][1]["check"] == {"green": None, "found": None}
    assert section["error"] is None


def test_progress_holds_what_is_there(canned):
    seen = []
    measure("eager", "liger", rounds=1, on_progress=lambda section: seen.append(copy.deepcopy(section)))
    assert seen[0]["rows"][0]["prepare_s"] == 0.5
    assert "prepare_s" not in seen[0]["rows"][1]
    timed = [sum("median_s" in row for row in section["rows"]) for section in seen]
    assert timed == sorted(timed)
    assert {0, 1, 2} <= set(timed)
    assert "profile" not in seen[-1]["rows"][0]
    assert measure("eager", rounds=1, with_profile=True)["rows"][0]["profile"] == {"device_ms": 1.0}


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


@pytest.mark.parametrize(("name", "dropout"), [("llama-1b", False), ("t5-base", True), ("bert-base ragged", True)])
def test_runner_goes_through_all_its_parts(name, dropout, tmp_path):
    model, _, _, ragged = training.MODELS[name]
    load = Workload(model, 6, 8, "training", "bfloat16", "cpu", "tiny", ragged=ragged)
    runner = training.Runner(training.OURS, load)
    runner.refer(str(tmp_path / "answers.pt"))
    found = runner.prepare()
    assert found["dropout"] == dropout
    assert (found["tokens"] < 48) == ragged
    assert len(found["losses"]) == training.RECORDED
    fresh = list(load.build().parameters())
    assert all(torch.equal(before, after) for before, after in zip(fresh, runner.parameters, strict=True)), "not restored"
    assert not runner.optimizer.state
    assert set(runner.check(str(tmp_path / "answers.pt"))) == {"output", "loss", "worst_gradient"}
    assert runner.time(1)["repeats"] == 1
    assert runner.time(2)["repeats"] == 3
    assert not runner.optimizer.state
    assert all(torch.equal(before, after) for before, after in zip(fresh, runner.parameters, strict=True))
    assert runner.profile() is None


def test_a_whole_model_is_not_compiled_twice_for_its_check(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: None)
    for model, checked in (("gpt2", False), ("llama", True)):
        runner = training.Runner("compile", Workload(model, 2, 8, "training", "bfloat16", "cpu", "tiny"))
        runner.refer(str(tmp_path / "answers.pt"))
        runner.prepare()
        assert (runner.check(str(tmp_path / "answers.pt")) is not None) == checked


@pytest.mark.parametrize(("model", "ragged"), [("t5", False), ("bert", True)])
def test_float32_answers_in_parts_are_those_of_the_whole(model, ragged):
    load = Workload(model, 4, 24, "training", "float32", "cpu", "tiny", ragged=ragged)
    whole, parts = (training.answers(load.build(), load, count) for count in (1, 4))
    torch.testing.assert_close(parts.loss, whole.loss)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient)


def test_sample_of_a_gradient_meets_every_column(monkeypatch):
    monkeypatch.setattr(training, "SAMPLE", 100)
    gradient = torch.arange(64.0).repeat(40, 1)
    found = training.sampled(gradient)
    assert found.numel() <= 100
    assert len(found.unique()) == 64
    assert training.sampled(gradient[0]).numel() == 64


def test_each_process_starts_with_empty_caches(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    monkeypatch.delenv("OSLO_FUSION_CACHE", raising=False)
    with training.environment_of({name: f"fresh {name}" for name in training.CACHES}):
        assert os.environ["TRITON_CACHE_DIR"] == "fresh TRITON_CACHE_DIR"
        assert os.environ["OSLO_FUSION_CACHE"] == "fresh OSLO_FUSION_CACHE"
    assert os.environ["TRITON_CACHE_DIR"] == "before"
    assert "OSLO_FUSION_CACHE" not in os.environ


@pytest.mark.parametrize("name", [training.EAGER, training.BEST])
def test_checkpointing_is_switched_on_last(name, monkeypatch):
    calls = []
    monkeypatch.setattr(training.engine, "initialize", lambda model, config: calls.append("initialize"))
    model = LOAD.build()
    monkeypatch.setattr(model, "gradient_checkpointing_enable", lambda: calls.append("checkpointing"))
    training.apply_provider(name + training.CHECKPOINTING, model)
    assert calls == ["checkpointing"] if name == training.EAGER else ["initialize", "checkpointing"]


def test_the_dial_reaches_the_configuration(monkeypatch):
    seen = []
    monkeypatch.setattr(training.engine, "initialize", lambda model, config: seen.append(config))
    for name in training.COMPILED:
        training.apply_provider(name, types.SimpleNamespace(gradient_checkpointing_enable=lambda: None))
    blocks = [found["kernel_fusion"] for found in seen]
    settings = [block["memory_efficient_fusion"] for block in blocks]
    assert [found["activation_memory_budget"] for found in settings] == [1.0, 0.0, 0.1, 0.25, 0.5, 0.75, *[1.0] * 5]
    whole, captured, packed = ("model", False, False), ("model", True, False), ("layer", False, True)
    modes = [(a["scope"], a["cuda_graphs"], b.get("padding_free", False)) for a, b in zip(settings, blocks, strict=True)]
    assert modes == [*[("layer", False, False)] * 7, packed, whole, captured, ("model", True, True)]


def part(name, commit, seconds=1.0, torch_version="2.11.0"):
    return {
        "benchmark": "training",
        "device": {"name": "X", "slug": "x"},
        "versions": {"torch": torch_version},
        "seconds": seconds,
        "commit": commit,
        "date": "today",
        "sections": [{"name": name, "rows": []}],
    }


def test_merge_keeps_the_later_section_of_each_model(tmp_path, capsys):
    files = []
    for number, found in enumerate([part("t5-base", "a"), part("llama-1b", "b"), part("t5-base", "c", 5.0)]):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(found))
    assert training.main(["--merge", *map(str, files), "--out", str(tmp_path / "out")]) == 0
    merged = json.loads((tmp_path / "out" / "training-x.json").read_text())
    assert [(s["name"], s["commit"]) for s in merged["sections"]] == [("llama-1b", "b"), ("t5-base", "c")]
    assert merged["seconds"] == 7.0
    files[2].write_text(json.dumps(part("t5-base", "c", torch_version="2.13.0")))
    assert training.main(["--merge", *map(str, files), "--out", str(tmp_path / "out")]) == 2
    assert "other versions" in capsys.readouterr().err
    files[1].write_text("[]")
    assert training.main(["--merge", *map(str, files), "--out", str(tmp_path / "out")]) == 2
    assert "1.json: no file of this benchmark" in capsys.readouterr().err
    assert training.main(["--merge", str(files[0])]) == 2
    assert "--out" in capsys.readouterr().err


def test_wrong_gradient_is_red(monkeypatch, tmp_path):
    def spoil(name, model):
        model.model.layers[0].mlp.gate_proj.weight.register_hook(lambda gradient: 1.1 * gradient)

    monkeypatch.setattr(training, "apply_provider", spoil)
    runner = training.Runner(training.OURS, LOAD)
    runner.refer(str(tmp_path / "answers.pt"))
    runner.prepare()
    with pytest.raises(AssertionError, match=r"gradient of model\.layers\.0\.mlp\.gate_proj\.weight"):
        runner.check(str(tmp_path / "answers.pt"))


@pytest.mark.parametrize("arguments", [["--models", "bert"], ["--providers", "ligr"], ["--rounds", "0"], ["--models", ","]])
def test_bad_arguments(arguments, capsys):
    assert training.main(["--dry", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
