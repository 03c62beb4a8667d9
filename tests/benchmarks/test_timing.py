"""What the kernel benchmarks share, without a GPU: jobs within their time, enough inputs, and the dry run of the norms."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("facts", [(132, 232_448), (304, 65_536)])
def test_a_sweep_has_the_chosen_tile(facts):
    pytest.importorskip("triton")
    for job in norms.SWEEPS:
        chosen, found = norms.candidates(job, *facts)
        assert list(found.values()).count(chosen) == 1, job.name


CHECKS = """
import dataclasses, torch
from benchmarks import norms
for small in norms.SMALL[::2]:
    norms.check_small(*small, torch.device("cpu"))
wide = norms.Sweep("layer_norm", "backward", 5, 9000, torch.bfloat16)
norms.check_candidates(wide, norms.candidates(wide, 2, 232_448)[1], 5, torch.device("cpu"))
print("green")
"""


def test_what_a_sweep_checks_first():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("green\n"), done.stderr[-3000:]


def test_rows_of_another_commit_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(norms, "commit", lambda: "abc")
    path = tmp_path / "rows.json"
    assert norms.earlier(path) == []
    for record, kept in (
        ({"device": "GPU", "commit": "abc"}, 1),
        ({"device": "GPU", "commit": "abd"}, 0),
        ({"device": "X", "commit": "abc"}, 0),
    ):
        path.write_text(json.dumps({**record, "results": [{"op": "rms_norm"}]}))
        assert len(norms.earlier(path)) == kept
