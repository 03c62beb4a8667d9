"""Seconds until the second step: one process, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import start

ROOT = Path(__file__).resolve().parents[2]


def test_a_process_says_its_phases() -> None:
    asked = ["--process", start.HOWS[1], "llama-1b", "--kernels", "--dry", "--began", str(time.time())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.start", *asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["seconds"]
    assert set(seconds) == set(start.PHASES)
    assert min(seconds[phase] for phase in ("imports", "model", "plan", "first step", "second step")) > 0
    assert seconds["rehearsal"] == seconds["waiting"] == 0, "there is nothing to compile on a CPU"
    assert seconds["plan"] <= seconds["initialize"]
    assert sum(found["rooms"].values()) <= seconds["plan"] + 0.01, "each is rounded"
    assert found["losses"][0] != found["losses"][1]
    console = Console(width=210, record=True)
    console.print(start.table([{"how": start.HOWS[1], "caches": "empty", **found}]))
    assert f"{seconds['first step']:.1f}" in console.export_text()


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert start.main(["--model", "lama"]) == 2
    assert "llama-1b" in capsys.readouterr().err
