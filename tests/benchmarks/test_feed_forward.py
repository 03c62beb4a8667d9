"""The benchmark of feed-forward networks, as far as it runs without a GPU."""

from __future__ import annotations

import pytest

from benchmarks import feed_forward


def test_it_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    feed_forward.main(["--dry"])
    assert "tiny: checked inductor, ours" in capsys.readouterr().out


def test_a_row_says_times_and_memory_and_the_cuts_fastest_first() -> None:
    row = {
        "model": "BERT",
        "shape": [4, 8, 16],
        "device_us": {"ours": 1500.0},
        "forward_us": {"ours": 400.0},
        "peak_mib": {"ours": 7},
        "kernel_us": {"slow": 300.0, "fast": 200.0},
    }
    first, *cuts = feed_forward.line(row).splitlines()
    assert "4×8×16" in first
    assert "ours 1500 µs (400 forward) 7 MiB" in first
    assert cuts == ["    fast: 200.0 µs", "    slow: 300.0 µs"]
