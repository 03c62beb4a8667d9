"""The benchmark of tutorial 4's steps runs the notebook's own kernels and refuses wrong ones, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import rms_norm_steps

ROOT = Path(__file__).parents[2]


def interpreted(*arguments: str) -> str:
    """What a fresh process prints whose kernels are interpreted: triton is told when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_dry_run_checks_every_step() -> None:
    printed = interpreted("-m", "benchmarks.rms_norm_steps", "--dry")
    for name in ("1 two passes", "2 row in registers", "3 tiles", "4 atomics", "5 two stages", "7 shipped"):
        assert f"{name}: " in printed


def test_a_row_has_every_step() -> None:
    code = """
import json, torch
from benchmarks import rms_norm_steps, timing
rms_norm_steps.ELEMENTS, rms_norm_steps.CHECKED_ROWS = 1 << 10, 11
timing.device_times = lambda calls: {name: 1.0 + 0 * len([call(i) for i in (0, 1, 12)]) for name, call in calls.items()}
print(json.dumps(list(rms_norm_steps.measure(rms_norm_steps.load_steps(), 96, torch.device("cpu"), 1e12))))
"""
    forward, backward = json.loads(interpreted("-c", code).splitlines()[-1])
    assert [name[0] for name in forward["device_us"]] == list("01237t")
    assert [name[0] for name in backward["device_us"]] == list("0457t")
    assert forward["rows"] == 11
    assert forward["percent_of_copy"]["3 tiles"] == round(100 * 2 * 11 * 96 * 2 / 1e-6 / 1e12, 1)
    assert backward["percent_of_copy"]["7 shipped"] == round(100 * 3 * 11 * 96 * 2 / 1e-6 / 1e12, 1)
    assert "3 tiles 1.0 µs" in rms_norm_steps.line(forward)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight: torch.empty_like(x),  # nothing is written
        lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, None, 1e-6),  # no weight
        lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-1),  # another eps
    ],
)
def test_the_check_refuses_a_wrong_step(wrong: object) -> None:
    steps = rms_norm_steps.load_steps()
    steps.check("right", steps.expression, torch.device("cpu"))
    with pytest.raises(AssertionError, match="wrong"):
        steps.check("wrong", wrong, torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
