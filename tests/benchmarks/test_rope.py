"""The benchmark of rope on a machine without a GPU: its checks run, a wrong result stops it, and it says what it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import rope as benchmark


def test_dry_run_checks_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--dry"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(benchmark.DRY_SHAPES)
    assert all("checked module, ours" in line for line in lines)


@pytest.mark.parametrize("shape", benchmark.DRY_SHAPES[:2], ids=str)
def test_nothing_is_timed_on_red(shape: benchmark.Shape) -> None:
    calls = benchmark.providers(shape, compiled=False)
    ours = calls["ours"]
    calls["ours"] = lambda q, k, cos, sin: ours(q, k, cos, -sin)
    with pytest.raises(AssertionError, match="rope 2×5 4\\+2 heads of 16/16"):
        benchmark.check(shape, calls, torch.device("cpu"))


def test_sets_are_dense_heads_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.ROTATION_BYTES", 1000)
    shape = benchmark.DRY_SHAPES[0]
    sets = benchmark.drawn(shape, torch.device("cpu"))
    assert len(sets) == 2
    for q, k in sets:
        assert (q.shape, k.shape) == ((2, 4, 5, 16), (2, 2, 5, 16))
        assert q.transpose(1, 2).is_contiguous()
        assert k.transpose(1, 2).is_contiguous()
        assert q.nbytes + k.nbytes == shape.bytes


@pytest.mark.parametrize("shape", benchmark.DRY_SHAPES[::2], ids=str)
def test_rows_and_their_line(shape: benchmark.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(calls: Any, **_: Any) -> dict[str, float]:
        assert all(len(call(0)) == 2 for call in calls.values())
        return {name: 1.0 if name == "ours" else 0.5 if name == "liger" else 2.0 for name in calls}

    monkeypatch.setattr(benchmark, "device_times", once)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(benchmark, "liger_call", lambda: benchmark.gpt_neox)
    monkeypatch.setattr("benchmarks.timing.ROTATION_BYTES", 1000)
    rows = list(benchmark.measure(shape, torch.device("cpu"), 4e12))
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        liger_is_a_peer = shape.op == "rope"
        assert row["against_best_peer"] == (0.5 if liger_is_a_peer else 2.0)
        assert ("liger" in row["device_us"]) == (not shape.interleaved)
        assert f"×{row['against_best_peer']:.2f} of the best peer" in benchmark.line(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(SystemExit, match="--dry"):
        benchmark.main([])


@pytest.mark.gpu
def test_a_row_has_what_the_tables_need() -> None:
    device = torch.device("cuda")
    rows = list(benchmark.measure(benchmark.DRY_SHAPES[0], device, 4e12))
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"]
    assert all({"module", "ours", "compile"} <= row["device_us"].keys() for row in rows)
    assert benchmark.line(rows[0])
    (row,) = benchmark.sweep(benchmark.DRY_SHAPES[0], device, 4e12)
    assert row["chosen"] in row["all"]
    assert benchmark.line(row)
