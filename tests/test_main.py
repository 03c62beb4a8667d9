"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from oslo_fusion import engine, models, workload
from oslo_fusion.__main__ import main

TINY = ["--model", "gpt2", "--size", "tiny", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """Several test processes with several threads each wait for one another far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refused(capsys, arguments):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.strip().startswith("error: ")
    return printed.err


def test_info_says_what_is_here_and_why_the_rest_is_not(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (torch.__version__, "3.10 to 3.13", "TorchScript fuser on cpu", "compiled extension"):
        assert text in printed


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["versions"]} >= {"python", "torch", "transformers", "triton", "CUDA", "HIP"}
    assert all(row["version"] or row["reason"] for row in found["versions"])
    assert {row["name"] for row in found["abilities"]} >= {"TorchScript fuser on cpu", "TorchScript fuser on cuda"}
    assert all(row["reason"] for row in found["abilities"])
    assert found["devices"][0]["device"] == "cpu"
    assert any(row["device"].startswith("cuda") for row in found["devices"])


def test_plan_prints_every_site(capsys):
    assert main(["plan", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "Plan for GPT2LMHeadModel" in printed
    assert "transformer.h.{0-1}" in printed


def test_plan_as_json_is_that_of_the_library(capsys):
    assert main(["plan", *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = models.build_model("gpt2", dtype="fp32", device="cpu", size="tiny")
    expected = engine.plan(model, {"kernel_fusion": {"enable": True}}).to_dict()
    assert found["model"] == "GPT2LMHeadModel"
    sites = [(row["site"], row["kind"], row["outcome"]) for row in found["rows"]]
    assert sites == [(row["site"], row["kind"], row["outcome"]) for row in expected["rows"]]
    assert len(sites) >= 2


def test_plan_reads_a_configuration_file_and_notes_its_other_blocks(capsys, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("kernel_fusion: {enable: false}\nlogging: {level: info}\n")
    assert main(["plan", *TINY, "--json", "--config", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["outcome"] for row in found["rows"]} == {"off"}
    assert sum("logging" in note for note in found["notes"]) == 1


@pytest.mark.parametrize("command", ["plan", "bench"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gtp2"], "did you mean gpt2"),
        (["--model", "gpt2", "--config", "missing.yaml"], "no such file"),
        (["--model", "gpt2", "--config", "."], "is a directory"),
        (["--model", "gpt2", "--dtype", "fp8"], "dtype: received 'fp8'"),
        (["--model", "gpt2", "--device", "tpu"], "device: received 'tpu'"),
        (["--model", "gpt2", "--size", "huge"], "size: received 'huge'"),
    ],
)
def test_bad_input_is_one_message(capsys, tmp_path, monkeypatch, command, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, [command, *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode", "generate"], "mode: received 'generate'"),
        (["--batch", "0"], "batch: received 0"),
        (["--seq", "129"], "128 positions"),
        (["--providers", "eager,ours"], "providers: received 'ours'"),
        (["--out", "a-file"], "a directory to write to"),
        (["--repeats", "0"], "repeats: received 0"),
        (["--sweep", "activation_memory_budget", "--mode", "forward"], "mode: received 'forward'"),
        (["--sweep", "activation_memory_budget", "--budgets", "0,half"], "--budgets: received '0,half'"),
        (["--sweep", "activation_memory_budget", "--budgets", "0,2"], "activation_memory_budget: received 2.0"),
        (["--sweep", "activation_memory_budget", "--memory", "-1"], "memory: received -1.0"),
    ],
)
def test_bench_refuses_bad_input(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    assert says in refused(capsys, ["bench", *TINY, *arguments])


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_bench_writes_table_json_and_picture(capsys, tmp_path, mode):
    arguments = ["bench", *TINY, "--batch", "2", "--seq", "8", "--mode", mode, "--repeats", "3", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / f"gpt2-{mode}-float32-2x8.json").read_text())
    rows = {row["provider"]: row for row in found["rows"]}
    assert list(rows) == ["eager", "oslo_fusion"]
    for name, row in rows.items():
        assert name in printed
        assert f"{row['median_s'] * 1e3:.3f}" in printed
    assert f"{found['fusion']['fused']} sites fused" in printed
    assert found["versions"]["torch"] == torch.__version__
    assert (tmp_path / f"gpt2-{mode}-float32-2x8.png").read_bytes().startswith(b"\x89PNG")


def test_bench_needs_matplotlib_and_says_so_before_any_timing(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(workload, "compare", lambda *args, **kwargs: pytest.fail("something was timed"))
    assert "pip install 'oslo_fusion[bench]'" in refused(capsys, ["bench", *TINY, "--out", str(tmp_path)])


def test_bench_times_nothing_when_the_answers_differ(capsys, tmp_path, monkeypatch):
    def red(*args):
        raise AssertionError("output: error 1, allowed 0")

    monkeypatch.setattr(workload, "check", red)
    assert main(["bench", *TINY, "--batch", "2", "--seq", "8", "--out", str(tmp_path)]) == 1
    assert "nothing was timed: output: error 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bench_with_a_failed_provider_writes_the_rest(capsys, tmp_path):
    providers = ["--providers", "eager,compile reduce-overhead", "--repeats", "1"]
    assert main(["bench", *TINY, "--batch", "2", "--seq", "8", *providers, "--out", str(tmp_path)]) == 1
    assert "CUDA graphs" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


def test_sweep_goes_on_after_oom_and_picks_what_fits(capsys, tmp_path, monkeypatch):
    from oslo_fusion.aot import room

    monkeypatch.setattr(room, "COMPILER", "eager")
    real = workload.run_check

    def oom_at_half(load, config):
        if config.aot.activation_memory_budget == 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(load, config)

    monkeypatch.setattr(workload, "run_check", oom_at_half)
    arguments = ["bench", *TINY, "--sweep", "activation_memory_budget", "--batch", "2", "--seq", "16", "--repeats", "1"]
    assert main([*arguments, "--budgets", "0,0.5,1", "--memory", "4", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "OOM" in printed
    assert "fastest within 4 GiB: activation_memory_budget: " in printed
    found = json.loads((tmp_path / "gpt2-activation-memory-budget-float32-2x16.json").read_text())
    eager, zero, half, one = found["rows"]
    assert [row["budget"] for row in found["rows"]] == [None, 0, 0.5, 1]
    assert half["error"] == "OOM"
    assert zero["saved_bytes"] < 0.6 * one["saved_bytes"] <= 0.6 * eager["saved_bytes"]
    assert found["picked"] in (0, 1)
    assert (tmp_path / "gpt2-activation-memory-budget-float32-2x16.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--budgets", "0", "--memory", "1e-6", "--out", str(tmp_path)]) == 0
    assert "no setting runs within 1e-06 GiB" in capsys.readouterr().out


def test_sweep_takes_the_fused_loss_and_outlives_eager_and_steps_that_run_out_of_memory(tmp_path, monkeypatch):
    from oslo_fusion.aot import room
    from oslo_fusion.kernels import loss_sites

    monkeypatch.setattr(room, "COMPILER", "eager")
    monkeypatch.setattr(loss_sites, "choices", lambda *where: {"auto": "triton"})
    checked, step, tight = [], workload.make_step, iter([True, False, True, False])
    real = workload.run_check
    monkeypatch.setattr(workload, "run_check", lambda load, config: (checked.append(load.batch), real(load, config)))

    def make_step(*arguments):
        if not next(tight):
            return step(*arguments)

        def run(inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(workload, "make_step", make_step)
    config = tmp_path / "config.yaml"
    config.write_text('kernel_fusion: {enable: true, autotune: "off", custom_cuda_kernels: [FusedLinearCrossEntropy]}')
    arguments = ["bench", "--model", "llama", "--size", "tiny", "--device", "cpu", "--config", str(config), "--repeats", "1"]
    sweep = ["--sweep", "activation_memory_budget", "--budgets", "1,0.5,0", "--batch", "16", "--seq", "8"]
    assert main([*arguments, *sweep, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "llama-activation-memory-budget-float32-16x8.json").read_text())
    assert [row["error"] for row in found["rows"]] == ["OOM", None, "OOM", None]
    assert found["config"]["custom_cuda_kernels"] == ["FusedLinearCrossEntropy"]
    assert checked == [2, 2, 2], "on an eighth of the batch"
    assert found["rows"][3]["saved_bytes"] < found["rows"][1]["saved_bytes"]


def test_pick_takes_the_fastest_that_fits():
    gib = 2**30
    rows = [
        {"budget": None, "error": None, "memory_bytes": 1, "tokens_per_s": 1e9},  # eager is no setting
        {"budget": 0.0, "error": None, "memory_bytes": 4 * gib, "tokens_per_s": 10},
        {"budget": 0.5, "error": None, "memory_bytes": 6 * gib, "tokens_per_s": 30},
        {"budget": 0.7, "error": None, "memory_bytes": 7 * gib, "tokens_per_s": 20},
        {"budget": 1.0, "error": "OOM"},
    ]
    assert [workload.pick(rows, limit) for limit in (None, 7, 5, 4, 3)] == [0.5, 0.5, 0.0, 0.0, None]


def test_runs_as_a_module():
    command = [sys.executable, "-m", "oslo_fusion"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert all(word in done.stdout for word in ("info", "plan", "bench"))
    done = subprocess.run([*command, "export"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
