"""A rehearsal finds out what a plan launches, decides nothing, and leaves no trace but compiled kernels."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion import engine, probe, rehearsal
from oslo_fusion.plan import Proposal, Site

CONFIG = {"kernel_fusion": {"enable": True}}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def noted() -> Iterator[rehearsal.Rehearsal]:
    made = rehearsal.Rehearsal()
    with rehearsal.under(made):
        yield made
    made.finish()


def test_a_proof_runs_ours_once_with_its_gradients_and_finds_it_the_same(noted: rehearsal.Rehearsal) -> None:
    runs: list[bool] = []

    def ours(x: Tensor, y: Tensor) -> Tensor:
        runs.append(x.requires_grad)
        return torch.full_like(x, float("nan")) * x * y

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("is not asked")

    draws = [[torch.ones(3), torch.ones(3)]] * 4
    assert [c.same for c in probe.prove(ours, theirs, *draws)] == [True] * 3
    assert [c.same for c in probe.prove(ours, theirs, *draws, gradients=False)] == [True]
    assert runs == [True, False]


@pytest.mark.parametrize("autotune", ["cached", "full"])
def test_a_timing_runs_each_once_in_each_mode_wins_and_is_forgotten(noted: rehearsal.Rehearsal, autotune: str) -> None:
    runs: list[tuple[str, bool]] = []

    def function(name: str) -> Any:
        def run(x: Tensor) -> Tensor:
            runs.append((name, torch.is_grad_enabled()))
            return x * x

        return run

    timing = probe.time_pair("key", function("before"), function("after"), lambda: [torch.ones(3)], autotune=autotune)
    assert timing.wins_inference
    assert timing.wins_training
    assert {run: runs.count(run) for run in runs} == {
        ("before", False): 1,
        ("after", False): 1,
        ("before", True): 2,  # its result's shape is asked for too
        ("after", True): 1,
    }
    assert not probe._TIMINGS


def test_a_known_timing_is_not_run(noted: rehearsal.Rehearsal) -> None:
    def fail(x: Tensor) -> Tensor:
        raise AssertionError("is known")

    x = torch.ones(3)
    known = probe.Timing("float32", "3", 1.0, 2.0)
    probe._TIMINGS["key", x.device, x.dtype, (3,)] = known
    assert probe.time_pair("key", fail, fail, lambda: [x], autotune="cached") is known


def test_gradients_are_computed_in_the_thread_that_rehearses(noted: rehearsal.Rehearsal) -> None:
    """On CUDA torch has a thread for them, to which this one's rehearsal is nothing."""
    assert not torch._C._is_multithreading_enabled()
    with rehearsal.under(noted):
        assert rehearsal.under_way()
    assert rehearsal.under_way()


class Room:
    """A pass that keeps what happens, and can fail in a rehearsal."""

    name = "kernels"
    kernels: tuple[str, ...] = ()

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.happened: list[str] = []

    def propose(self, *_: Any) -> Iterator[Proposal]:
        if not rehearsal.under_way():
            self.happened.append("plan")
            yield Proposal(Site("", "kind", "-"), self.name, "-", "-", "refused", "reason")
            return
        self.happened.append("rehearsal")
        assert rehearsal.THREAD.rehearsal is not None
        rehearsal.THREAD.rehearsal.note("kernel", self.compile)
        if self.error is not None:
            raise self.error

    def compile(self) -> None:
        time.sleep(0.2)
        self.happened.append("compiled")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    """The only one, on a machine whose models are said to lie on a GPU."""
    made = Room()
    monkeypatch.setattr(engine, "PASSES", (made,))
    monkeypatch.setattr(engine, "REHEARSED", (made,))
    monkeypatch.setattr(engine, "placement", lambda model: (torch.device("cuda"), torch.float32))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(rehearsal, "processors", lambda: 2)
    return made


def test_the_plan_begins_when_all_is_compiled(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    oslo_fusion.plan(nn.Linear(2, 2), CONFIG)
    assert room.happened == ["rehearsal", "compiled", "plan"]
    room.happened.clear()
    monkeypatch.setattr(engine, "start_compiler", lambda *_: room.happened.append("Inductor"))
    oslo_fusion.initialize(nn.Linear(2, 2), CONFIG)
    assert room.happened == ["rehearsal", "Inductor", "compiled", "plan"]
    assert threading.active_count() == before


def test_a_rehearsal_that_fails_is_said_and_the_plan_is_made(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    room.error = RuntimeError("no memory")
    with caplog.at_level(logging.INFO, "oslo_fusion"):
        (row,) = oslo_fusion.plan(nn.Linear(2, 2), CONFIG).proposals
    assert row.reason == "reason"
    assert "no memory" in caplog.text
    assert room.happened == ["rehearsal", "compiled", "plan"]
    assert not rehearsal.under_way()


def test_an_interrupt_leaves_nothing_running(room: Room) -> None:
    room.error, before = KeyboardInterrupt(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        oslo_fusion.plan(nn.Linear(2, 2), CONFIG)
    assert threading.active_count() == before
    assert not rehearsal.under_way()
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("why", ["cpu", "disabled", "one processor"])
def test_where_there_is_nothing_to_gain_there_is_no_rehearsal(room: Room, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "cpu":
        monkeypatch.setattr(engine, "placement", lambda model: (torch.device("cpu"), torch.float32))
    if why == "one processor":
        monkeypatch.setattr(rehearsal, "processors", lambda: 1)
    oslo_fusion.plan(nn.Linear(2, 2), {"kernel_fusion": {"enable": why != "disabled"}})
    assert room.happened == ["plan"]


PLANNED = """
import json, sys, threading
import torch, triton
import oslo_fusion
from oslo_fusion import engine, models

compiled = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or compiled.append(
    (src.name, threading.current_thread().name)
)
if sys.argv[2] == "without":
    engine.REHEARSED = ()
model = models.build_model(sys.argv[1], dtype=torch.bfloat16, device="cuda", size="tiny")
before, state = torch.cuda.get_rng_state(), torch.get_rng_state()
block = {"enable": True, "custom_cuda_kernels": ["all", "FusedLinearCrossEntropy"], "autotune": sys.argv[3]}
plan = oslo_fusion.plan(model, {"kernel_fusion": block})
assert torch.equal(before, torch.cuda.get_rng_state()) and torch.equal(state, torch.get_rng_state())
rows = [(p.site.path, p.site.kind, p.outcome, p.after) for p in plan.proposals]
print(json.dumps({"rows": rows, "compiled": compiled}))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_plan_finds_all_its_kernels_and_decides_what_it_did_without(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")

    def planned(how: str, autotune: str) -> dict[str, Any]:
        folder = tmp_path / f"{how} {autotune}"
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {"TRITON_CACHE_DIR": str(folder), "OSLO_FUSION_CACHE": str(folder / "timings"), "PYTHONPATH": paths}
        command = [sys.executable, "-c", PLANNED, name, how, autotune]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    rehearsed, alone = planned("with", "off"), planned("without", "off")
    assert rehearsed["rows"] == alone["rows"]
    late = [kernel for kernel, thread in rehearsed["compiled"] if "oslo_fusion" not in thread]
    assert late == [], "compiled by the plan itself"
    counts = [Counter(kernel for kernel, _ in found["compiled"]) for found in (rehearsed, alone)]
    assert counts[0] >= counts[1] > Counter()
    timed = planned("with", "full")["compiled"]
    assert [kernel for kernel, thread in timed if "oslo_fusion" not in thread] == []
    assert len(timed) > len(alone["compiled"])
