"""The benchmark of head and loss, without a GPU: its checks fail on a wrong loss, and the dry run passes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import linear_cross_entropy as bench


def test_the_dry_run_checks_every_provider(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["linear_cross_entropy", "--dry"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.endswith("checked eager, ours, ours half") for line in lines)


def test_nothing_is_timed_on_red():
    calls = bench.providers(bench.DRY_SHAPES[0], compiled=False)
    calls["ours"] = lambda *inputs: calls["eager"](*inputs) * 1.01
    with pytest.raises(AssertionError, match=r"tiny torch\.float32, loss"):
        bench.check(bench.DRY_SHAPES[0], calls, torch.float32, torch.device("cpu"))
