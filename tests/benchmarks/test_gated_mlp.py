"""The benchmark of gated MLPs, as far as it runs without a GPU."""

from __future__ import annotations

import pytest

from benchmarks import gated_mlp
from oslo_fusion.ops import gated_mlp as op


def test_it_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    gated_mlp.main(["--dry"])
    assert "tiny: checked eager, checkpoint, ours" in capsys.readouterr().out


def test_widths_are_set_for_one_call() -> None:
    whole = op.part_width
    with gated_mlp.parts_of(512):
        assert op.part_width(8192, 2048) == 512
    assert op.part_width is whole
    assert list(gated_mlp.providers(8192, 2048)) == [
        "eager",
        "checkpoint",
        "ours",
        "ours, 512 columns",
        "ours, 2048 columns",
        "ours, 4096 columns",
    ]


def test_a_row_says_time_and_memory() -> None:
    row = {"model": "Llama", "shape": [4, 8, 16], "columns": 8, "device_us": {"ours": 1500.0}, "peak_mib": {"ours": 7}}
    assert "4×8×16" in gated_mlp.line(row)
    assert "ours 1.50 ms 7 MiB" in gated_mlp.line(row)
