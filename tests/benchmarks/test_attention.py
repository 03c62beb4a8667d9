"""The benchmark of attention, without a GPU: its checks fail on a wrong result, and the dry run passes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention as bench


def test_the_dry_run_checks_every_provider(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention", "--dry"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(bench.DRY_SHAPES)
    assert all(line.endswith("checked math, ours") for line in lines)


def test_nothing_is_timed_on_red():
    case, cpu = bench.DRY_SHAPES["tiny T5"], torch.device("cpu")

    def wrong(q, k, v, table):
        return bench.ours(case, cpu)(q, k, v, table) * 1.01

    with pytest.raises(AssertionError, match=r"tiny T5 torch\.float32, result"):
        bench.check("tiny T5", case, torch.float32, cpu, wrong)


def test_every_cut_of_the_sweep_can_be_launched():
    for case in (bench.T5, bench.BERT):
        for kernel, cuts in bench.candidates(case, torch.bfloat16, torch.device("cpu")).items():
            assert len({tile for tile, _ in cuts}) == len(cuts)
            for _, blocks in cuts if kernel != "forward" else ():
                assert blocks.table.queries % blocks.queries.queries == 0
