"""Timings are kept from process to process, per GPU and version, and never by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oslo_fusion import environment, probe, timings
from oslo_fusion.plan import Timing

GPU = "NVIDIA H200"
TIMING = Timing("bfloat16", "4096×1024", 10.0, 5.0, None, None)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(timings.CACHE_VARIABLE, str(tmp_path / "mine"))
    monkeypatch.setattr(timings, "_SHIPPED", tmp_path / "shipped")
    timings._read.cache_clear()
    return tmp_path


def test_a_figure_comes_back_and_says_where_from(home: Path) -> None:
    assert timings.recall(GPU, "key") is None
    timings.write(home / "shipped" / timings.file_name(GPU), {"key": TIMING})
    timings._read.cache_clear()
    found = timings.recall(GPU, "key")
    assert found is not None
    assert str(found) == "bfloat16 4096×1024: forward 10 → 5 µs (measured on NVIDIA H200, shipped)"
    timings.remember(GPU, "key", Timing("bfloat16", "4096×1024", 9.0, 5.0))
    timings.remember(GPU, "other", TIMING)
    found = timings.recall(GPU, "key")
    assert found is not None
    assert (found.inference_before, found.source) == (9.0, "measured here before")
    assert timings.recall(GPU, "other") is not None
    assert timings.recall("NVIDIA A100", "key") is None


def test_another_version_has_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = environment.environment()
    here = timings.file_name(GPU)
    assert here.startswith("nvidia_h200-torch2.")
    monkeypatch.setattr(timings, "environment", lambda: type(facts)(**{**vars(facts), "torch": "2.99.1+cu140"}))
    assert timings.file_name(GPU) == here.replace(here.split("-")[1], "torch2.99")


@pytest.mark.parametrize("text", ["{", "[]", '{"key": 3}', '{"key": [1, 2]}'])
def test_a_broken_table_is_left_aside_and_said(home: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = home / "mine" / timings.file_name(GPU)
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    assert timings.recall(GPU, "key") is None
    assert "left aside" in caplog.text
    timings.remember(GPU, "key", TIMING)
    assert timings.recall(GPU, "key") is not None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_costs_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(timings.CACHE_VARIABLE, str(home / "file" / "below"))
    timings.remember(GPU, "key", TIMING)
    assert timings.recall(GPU, "key") is None


def test_the_cpu_has_no_table(home: Path) -> None:
    probe.time_pair("key", torch.neg, torch.abs, lambda: [torch.ones(8)], autotune="full")
    assert not (home / "mine").exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_measuring_leaves_the_random_state(device: str) -> None:
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else torch.empty(0)
    probe.time_pair("key", F.dropout, torch.abs, lambda: [torch.randn(8, device=device)], autotune="full")
    assert torch.equal(state[0], torch.get_rng_state())
    assert device == "cpu" or torch.equal(state[1], torch.cuda.get_rng_state())


@pytest.mark.gpu
def test_a_gpu_is_measured_once_for_all_processes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(autotune: str) -> Timing:
        return probe.time_pair("key", torch.neg, torch.abs, lambda: [torch.ones(8, device="cuda")], autotune=autotune)

    first = measure("cached")
    (path,) = (home / "mine").iterdir()
    monkeypatch.setattr(probe, "_TIMINGS", {})
    assert measure("cached") == first.from_source("measured here before")
    assert measure("full").source == ""
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 1


def test_shipped_tables_can_be_read_and_hold_no_addresses() -> None:
    folder = Path(timings.__file__).parent / "tables"
    for path in folder.glob("*.json"):
        table = timings._read(path)
        assert table
        assert not any(" at 0x" in key for key in table)
