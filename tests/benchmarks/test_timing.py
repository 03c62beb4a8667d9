"""What the kernel benchmarks share, without a GPU: jobs within their time, enough inputs, and the dry run of the norms."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import norms, timing


def test_jobs_stop_in_time_and_what_is_left_out_is_said(monkeypatch, capsys):
    clock = itertools.count(step=10)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    jobs = [(name, lambda name=name: iter([{"name": name}])) for name in ("a", "b", "c")]
    assert timing.within(15, jobs, lambda row: f"row {row['name']}") == ([{"name": "a"}], ["b", "c"])
    assert capsys.readouterr().out.splitlines() == ["row a", "left out for lack of time: b, c"]


def test_inputs_rotate_over_more_than_the_cache_or_once_per_call():
    assert len(timing.rotation(lambda: torch.empty(128 << 20, dtype=torch.uint8))) == 4
    assert len(timing.rotation(lambda: torch.empty(8))) == timing.BURST + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(SystemExit, match=r"benchmarks\.norms .* --dry"):
        timing.need_gpu("benchmarks.norms")


def test_norms_run_dry(capsys):
    norms.dry()
    assert len(capsys.readouterr().out.splitlines()) == 8
