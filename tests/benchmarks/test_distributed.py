"""Two processes on the CPU: a way of parallelism is checked and timed, and one that fails leaves the others."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import distributed, readme


def test_dry_run_checks_times_and_writes_what_the_readme_takes(tmp_path, capsys):
    arguments = ["--dry", "--ways", "FSDP2", "--out", str(tmp_path), "--commit", "abc", "--seconds", "200"]
    code = distributed.main(arguments)
    assert code == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("distributed-cpu-*.json")
    found = json.loads(path.read_text())
    assert found["commit"]["id"] == "abc"
    (section,) = found["sections"]
    assert section["check"]["green"]
    assert {"loss", "worst_gradient"} <= set(section["check"]["found"])
    eager, ours = section["rows"]
    assert (eager["provider"], ours["provider"]) == (distributed.EAGER, distributed.OURS)
    for row in (eager, ours):
        assert row["repeats"] == distributed.ROUNDS * distributed.CALLS
        assert row["speedup"] == eager["median_s"] / row["median_s"]
    assert (ours["compiled"]["graphs"], ours["compiled"]["breaks"], ours["compiled"]["recompiles"]) == (1, [], 0)
    page = tmp_path / "README.md"
    page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    assert readme.main(["--readme", str(page), "--results", str(tmp_path)]) == 0
    assert "| FSDP2 | oslo_fusion memory-efficient |" in page.read_text()


def test_a_process_that_fails_is_a_section(tmp_path):
    pair = distributed.Pair("no way", distributed.DRY, tmp_path)
    try:
        found = pair.result(100.0)
    finally:
        pair.close()
    assert found["rows"] == []
    assert "KeyError: 'no way'" in found["error"]


def test_a_pair_that_takes_too_long_is_a_section_and_is_ended(tmp_path):
    pair = distributed.Pair("DDP", distributed.DRY, tmp_path)
    found = pair.result(-1.0)
    pair.close()
    assert "no result within" in found["error"]
    assert not any(process.is_alive() for process in pair._processes)


def test_wrong_gradients_are_red_and_nothing_is_timed(monkeypatch):
    class Runner:
        def __init__(self, provider, *rest):
            self.wrong = provider == distributed.OURS

        def answers(self):
            gradient = torch.full((4,), 2.0 if self.wrong else 1.0)
            return distributed.Answers(torch.tensor(1.0), torch.tensor(1.0), {"weight": gradient})

        def time(self):
            pytest.fail("it was timed")

    monkeypatch.setattr(distributed, "Runner", Runner)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda *arguments: None)
    right = distributed.Answers(torch.tensor(1.0), torch.tensor(1.0), {"weight": torch.ones(4)})
    monkeypatch.setattr(distributed, "truth", lambda *arguments: right)
    section = distributed.compare("DDP", distributed.DRY, torch.device("cpu"))
    assert "gradient of weight" in section["error"]
    assert section["rows"] == []


def test_float32_answers_are_those_of_the_whole_batch():
    found = distributed.truth(distributed.DRY, torch.device("cpu"))
    model, ids = distributed.DRY.build(torch.device("cpu"), torch.float32), distributed.DRY.ids(torch.device("cpu"))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(found.loss, loss.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad.reshape(-1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry", "--ways", "pipeline"], "--ways"),
        pytest.param(
            [],
            "2 are needed",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there may be two GPUs here"),
        ),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    assert distributed.main(arguments) == 2
    assert says in capsys.readouterr().err
