"""The first workload on a tiny model: it runs, it writes what the README is made from, and it refuses to time on red."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpt2, readme
from oslo_fusion import workload
from oslo_fusion.aot import room

ROOT = Path(gpt2.__file__).parent.parent
TINY = ["--size", "tiny", "--device", "cpu", "--batch", "4", "--seq", "8", "--repeats", "2", "--dtypes", "fp32,bf16"]


@pytest.fixture(autouse=True)
def one_thread():
    """Several test processes with several threads each wait for one another far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *arguments):
    code = gpt2.main([*TINY, "--providers", "eager,oslo_fusion", "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("gpt2-*.json")
    return code, json.loads(path.read_text())


def test_writes_a_section_per_dtype_and_mode_and_the_readme_takes_it(tmp_path, capsys):
    code, found = run(tmp_path, "--commit", "abc")
    assert code == 0
    kinds = [(s["workload"]["dtype"], s["workload"]["mode"]) for s in found["sections"]]
    assert kinds == [(dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("forward", "training")]
    for section in found["sections"]:
        assert [row["provider"] for row in section["rows"]] == ["eager", "oslo_fusion"]
        assert all(row["error"] is None for row in section["rows"])
        assert section["check"]["output"]["largest_value"] > 0
        assert section["fusion"]["fused"] + section["fusion"]["refused"] > 0
    assert found["commit"]["id"] == "abc"
    printed = capsys.readouterr().out
    assert printed.count("oslo_fusion") >= 4
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert readme.main(["--readme", str(page), "--results", str(tmp_path)]) == 0
    assert "(tiny), 4 × 8 tokens" in page.read_text()


def test_red_section_is_not_timed_and_the_others_are(tmp_path, monkeypatch):
    check = workload.check

    def red_in_training(before, after, reference):
        if before.loss is not None:
            raise AssertionError("loss: error 1, allowed 0")
        return check(before, after, reference)

    monkeypatch.setattr(workload, "check", red_in_training)
    code, found = run(tmp_path, "--dtypes", "fp32")
    assert code == 1
    forward, training = found["sections"]
    assert len(forward["rows"]) == 2
    assert training["rows"] == []
    assert "loss: error 1" in training["error"]


def test_default_providers_leave_out_one_in_training(monkeypatch, tmp_path):
    asked = []

    def recorded(load, config, providers, **kwargs):
        asked.append((load.mode, tuple(providers)))
        return {"workload": load.to_dict(), "rows": []}

    monkeypatch.setattr(workload, "compare", recorded)
    assert gpt2.main([*TINY, "--dtypes", "fp32", "--out", str(tmp_path)]) == 0
    assert asked == [("forward", workload.PROVIDERS), ("training", ("eager", "compile", "oslo_fusion"))]


def test_the_compiled_forward_is_timed_in_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "COMPILER", "eager")  # the graphs as they are: Inductor takes a minute here
    code, found = run(tmp_path, "--memory-efficient", "--dtypes", "fp32", "--providers", "eager,oslo_fusion", "--size", "tiny")
    assert code == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpt2-memory-efficient-cpu-")
    (section,) = found["sections"]
    assert section["workload"]["mode"] == "forward"
    assert section["fusion"]["kinds"]["whole forward"] == 1
    assert section["config"]["memory_efficient_fusion"]["scope"] == "model"


def test_no_section_begins_after_the_time(tmp_path):
    code, found = run(tmp_path, "--seconds", "0")
    assert code == 0
    assert found["sections"] == []


def test_bad_argument_is_one_message(capsys):
    assert gpt2.main(["--dtypes", "fp8"]) == 2
    assert "dtype: received 'fp8'" in capsys.readouterr().err
    assert gpt2.main(["--memory-efficient", "--config", "x.yaml"]) == 2
    assert "--memory-efficient" in capsys.readouterr().err


def test_runs_as_a_module_from_the_root():
    command = [sys.executable, "-m", "benchmarks.gpt2", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--repeats" in done.stdout
