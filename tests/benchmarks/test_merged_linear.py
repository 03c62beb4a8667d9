"""The benchmark of merged linear layers, as far as it runs without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import merged_linear


def test_it_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    merged_linear.main(["--dry"])
    assert capsys.readouterr().out.count("tiny: checked eager, apart, concatenated, side_by_side, accumulated") == 2


def test_the_check_can_fail() -> None:
    given = merged_linear.drawn(5, 16, (16, 8), True, torch.device("cpu"))
    with pytest.raises(AssertionError, match="wrong"):
        merged_linear.check({"wrong": lambda x, *p: merged_linear.apart(2, True, 2 * x, *p)}, given, 2, True)


def test_a_row_says_time_and_memory() -> None:
    row = {
        "model": "T5",
        "shape": [4, 8, 16],
        "forward_us": {"ours": 15.0},
        "device_us": {"ours": 50.0},
        "peak_mib": {"ours": 7},
    }
    assert "4×8×16" in merged_linear.line(row)
    assert "ours 15 / 50 µs  (7 MiB)" in merged_linear.line(row)
