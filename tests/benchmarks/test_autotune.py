"""The maker of shipped tables, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import autotune


def test_every_family_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OSLO_FUSION_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["autotune", "--out", str(tmp_path), "--dry"])
    assert autotune.main() == 0
    printed = capsys.readouterr().out
    for family in (*autotune.DECODERS, *autotune.ENCODERS, "T5"):
        assert f"{family} " in printed
    assert not list(tmp_path.iterdir())


def test_one_family_without_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, plan = [], autotune.oslo_fusion.plan
    monkeypatch.setattr(autotune.oslo_fusion, "plan", lambda model, config: asked.append(config) or plan(model, config))
    arguments = ["--dry", "--models", "Bert", "--without", "FusedAttention"]
    monkeypatch.setattr("sys.argv", ["autotune", "--out", str(tmp_path), *arguments])
    assert autotune.main() == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {"Bert"}
    assert all("FusedAttention" not in config["kernel_fusion"]["custom_cuda_kernels"] for config in asked)
    assert all("FusedLayerNorm" in config["kernel_fusion"]["custom_cuda_kernels"] for config in asked)


def test_a_family_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["autotune", "--out", str(tmp_path), "--dry", "--models", "BERT"])
    with pytest.raises(SystemExit):
        autotune.main()
    assert "--models: received BERT" in (said := capsys.readouterr().err)
    assert "Bert 768" in said
