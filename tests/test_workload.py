"""What is timed and how: inputs, steps, the clock, the gate before timing, providers side by side."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import types

import pytest
import torch

from oslo_fusion import engine, workload
from oslo_fusion.errors import ConfigError
from oslo_fusion.kernels import loss_sites
from oslo_fusion.models import MODELS, build_model
from oslo_fusion.workload import MODES, Answers, Workload, check, compare, measure

ENABLED = {"kernel_fusion": {"enable": True}}
CPU = torch.device("cpu")


def tiny(model="gpt2", mode="forward", dtype="float32", batch=2, seq=8):
    return Workload(model, batch, seq, mode, dtype, size="tiny")


# --- workload -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 0}, "batch: received 0"),
        ({"seq": 1.5}, r"seq: received 1.5 \(float\)"),
        ({"batch": True}, "batch: received True"),
        ({"mode": "train"}, "mode: received 'train'.*did you mean training"),
        ({"mode": "generate"}, "mode: received 'generate'"),
        ({"size": "huge"}, "size: received 'huge'"),
        ({"dtype": "int8"}, "dtype: received 'int8'"),
    ],
)
def test_unusable_workload_fields(change, says):
    with pytest.raises(ConfigError, match=says):
        Workload(**{"model": "gpt2", "batch": 2, "seq": 8, **change})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_step_runs_on_every_model(name, mode):
    load = tiny(name, mode)
    model = load.build()
    assert model.training == (mode == "training")
    inputs = load.inputs(model)
    assert ("labels" in inputs) == (mode == "training")
    assert all(torch.equal(tensor, load.inputs(model)[key]) for key, tensor in inputs.items())
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    step = workload.make_step(model, list(model.parameters()), mode)
    result = step(inputs)
    if mode == "forward":
        assert result.logits.shape[0] == 2
        assert not result.logits.requires_grad
    else:
        assert result.shape == ()
        assert bool(torch.isfinite(result))
        assert not result.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[key], p) for key, p in model.named_parameters())


def test_second_shape_differs_in_both_sizes():
    assert [(s.batch, s.seq) for s in (tiny(batch=256, seq=16).second(), tiny(batch=1, seq=1).second())] == [
        (128, 8),
        (2, 2),
    ]


@pytest.mark.parametrize(("name", "limit"), [("gpt2", 128), ("bert", 128), ("roberta", 126), ("opt", 128)])
def test_length_limit_is_the_models_own(name, limit):
    model = tiny(name).build()
    with torch.no_grad():
        model(**tiny(name, seq=limit).inputs(model))  # the longest that is accepted does run
    with pytest.raises(ConfigError, match=rf"seq: received {limit + 1}.*at most {limit}"):
        tiny(name, seq=limit + 1).inputs(model)


def test_training_needs_a_loss(tmp_path):
    build_model("bert", dtype="fp32", device="cpu", size="tiny").bert.save_pretrained(tmp_path)
    load = Workload(str(tmp_path), 2, 8, "training")
    with pytest.raises(ConfigError, match="BertModel has no loss"):
        load.inputs(load.build())


# --- the clock ------------------------------------------------------------------------------------------------------


def test_measure_trims_nothing(monkeypatch):
    durations = iter([100.0, 2, 2, 2, 2, *[5, 3, 9, 1, 7, 10, 2, 8, 4, 6], 50])
    clock = {"now": 0.0}

    def step():
        clock["now"] += next(durations)

    monkeypatch.setattr(workload.time, "perf_counter", lambda: clock["now"])
    found = measure(step, CPU, repeats=10, warmup=5, second_shape=step)
    assert found == workload.Measurement(
        median_s=5.5,
        p90_s=9,
        mean_s=5.5,
        first_call_s=100,
        warmup_s=108,
        second_shape_s=50,
        peak_bytes=None,
        repeats=10,
    )
    assert next(durations, None) is None, "not every call was made"


@pytest.mark.parametrize("change", [{"repeats": 0}, {"warmup": 4}])
def test_measure_refuses_too_few_calls(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        measure(lambda: None, CPU, **{"repeats": 1, "warmup": 5, **change})


def test_flops_are_those_of_the_formula():
    tokens, width, vocabulary, layers, seq = 2 * 8, 64, 512, 2, 8
    per_layer = 2 * tokens * 12 * width**2 + 4 * tokens * seq * width
    expected = layers * per_layer + 2 * tokens * width * vocabulary
    assert workload.count_flops(tiny()) == expected
    assert workload.count_flops(tiny(batch=6)) == 3 * expected
    assert workload.count_flops(tiny(mode="training")) == 3 * expected


def test_roof_is_measured():
    assert 1e8 < workload.matmul_rate(torch.float32, CPU) < 1e14
    assert 1e7 < workload.copy_bandwidth(CPU) < 1e13


# --- the gate -------------------------------------------------------------------------------------------------------


@functools.cache
def three_answers():
    load = tiny(mode="training", dtype="bf16")
    model = workload.switch_off_dropout(load.build())
    inputs = load.inputs(model)
    before = workload.answers(model, inputs, "training")
    reference = workload.answers(model.float(), inputs, "training")
    return before, reference


def test_gate_lets_equal_answers_pass_and_says_how_far_they_are_off():
    before, reference = three_answers()
    found = check(before, before, reference)
    assert found["output"]["before"] == found["output"]["after"] > 0
    assert found["loss"]["before"] == found["loss"]["after"]
    assert 0 < found["worst_gradient"]["after"] < 0.5
    assert set(before.gradients) == {name for name, _ in tiny().build().named_parameters()}


def spoil(before, what):
    output, loss, gradients = before.output.clone(), before.loss.clone(), dict(before.gradients)
    name = "transformer.h.1.mlp.c_fc.weight"
    if what == "output":
        output[0, 0, 0] += 0.5
    elif what == "loss":
        loss += 0.5
    elif what == "gradient":
        gradients[name] = gradients[name] * 1.1
    elif what == "NaN in a gradient":
        gradients[name] = gradients[name].clone()
        gradients[name][0, 0] = float("nan")
    else:
        del gradients[name]
    return Answers(output, loss, gradients)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("output", "output"),
        ("loss", "loss"),
        ("gradient", "gradient of transformer.h.1.mlp.c_fc.weight"),
        ("NaN in a gradient", "gradient of transformer.h.1.mlp.c_fc.weight"),
        ("no gradient", "not the same parameters"),
    ],
)
def test_gate_is_red_for_wrong_answers(what, says):
    before, reference = three_answers()
    with pytest.raises(AssertionError, match=says):
        check(before, spoil(before, what), reference)


def test_gradient_that_is_zero_but_for_rounding_may_be_other_noise_yet_not_large():
    output = torch.zeros(3)
    weight = torch.full((100,), 1.0)
    noise = torch.full((4,), 1e-8)

    def said(bias):
        return Answers(output, torch.tensor(1.0), {"weight": weight, "bias": bias})

    reference = Answers(output.double(), torch.tensor(1.0).double(), {"weight": weight.double(), "bias": 0 * noise})
    check(said(noise), said(-10 * noise), reference)
    with pytest.raises(AssertionError, match="gradient of bias"):
        check(said(noise), said(1e4 * noise), reference)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_off_on_the_model_and_nowhere_else(name):
    load = tiny(name, "training")
    model, untouched = load.build(), load.build()
    inputs = load.inputs(model)
    settings = untouched.config.to_dict()
    workload.switch_off_dropout(model)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outputs.append(model(**inputs).logits)
    assert model.training
    assert torch.equal(*outputs)
    assert untouched.config.to_dict() == settings
    if name not in ("vit", "llama"):  # published without dropout
        torch.manual_seed(0)
        first = untouched(**inputs).logits
        assert not torch.equal(first, untouched(**inputs).logits)


def test_loss_without_logits_is_checked_by_loss_and_gradients():
    before, reference = three_answers()
    fused = Answers(None, before.loss, before.gradients)
    found = check(before, fused, reference)
    assert "output" not in found
    assert found["loss"]["before"] == found["loss"]["after"]
    with pytest.raises(AssertionError, match="loss"):
        check(before, Answers(None, before.loss + 0.5, before.gradients), reference)


def test_compare_takes_a_fused_loss(monkeypatch):
    monkeypatch.setattr(loss_sites, "choices", lambda *where: {"auto": "triton"})  # as on a GPU; the reference runs here
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "custom_cuda_kernels": ["FusedLinearCrossEntropy"]}}
    result = compare(tiny("llama", "training"), config, ("eager", "oslo_fusion"), repeats=1, warmup=5)
    assert [row["error"] for row in result["rows"]] == [None, None]
    assert result["fusion"]["kinds"]["head and loss"] == 1
    assert "output" not in result["check"]


# --- providers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_compare_gives_a_row_per_provider(mode):
    stages = []
    providers = ("eager", "compile reduce-overhead", "oslo_fusion")
    result = compare(tiny(mode=mode), ENABLED, providers, repeats=3, warmup=5, on_stage=stages.append)
    rows = {row["provider"]: row for row in result["rows"]}
    assert list(rows) == list(providers)
    assert len(stages) == 3 + len(providers)
    assert "CUDA graphs" in rows["compile reduce-overhead"]["error"]
    assert rows["eager"]["error"] is rows["oslo_fusion"]["error"] is None
    assert rows["eager"]["speedup"] == 1.0
    assert rows["oslo_fusion"]["speedup"] == rows["eager"]["median_s"] / rows["oslo_fusion"]["median_s"]
    for row in (rows["eager"], rows["oslo_fusion"]):
        expected = 100 * result["roof"]["flops"] / row["median_s"] / result["roof"]["matmul_flops_per_s"]
        assert row["percent_of_roof"] == pytest.approx(expected)
        assert row["repeats"] == 3
        assert row["second_shape_s"] > 0
    fusion = result["fusion"]
    assert fusion["fused"] == sum(fusion["kinds"].values())
    assert fusion["refused"] == sum(refusal["sites"] for refusal in fusion["refusals"])
    assert fusion["fused"] + fusion["refused"] > 0
    assert json.loads(json.dumps(result)) == result
    assert result["check"]["output"]["after"] >= 0
    assert ("worst_gradient" in result["check"]) == (mode == "training")


def test_nothing_is_timed_when_the_answers_differ(monkeypatch):
    initialize = engine.initialize

    def wrong(model, config):
        initialize(model, config)
        model.transformer.h[0].mlp.act = torch.nn.ReLU()
        return model

    monkeypatch.setattr(engine, "initialize", wrong)
    monkeypatch.setattr(workload, "Stopwatch", lambda *args: pytest.fail("something was timed"))
    with pytest.raises(AssertionError, match="output"):
        compare(tiny(), ENABLED, ("eager", "oslo_fusion"), repeats=1, warmup=5)


def test_provider_that_fails_is_a_row_and_the_run_goes_on(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(torch, "compile", broken)
    result = compare(tiny(), ENABLED, ("compile", "eager"), repeats=1, warmup=5)
    failed, eager = result["rows"]
    assert failed["error"] == "RuntimeError: no compiler today"
    assert "median_s" not in failed
    assert eager["error"] is None
    assert eager["speedup"] == 1.0
    assert torch.compiler.config.force_disable_caches is False


def test_what_is_timed_must_be_what_was_checked(monkeypatch):
    monkeypatch.setattr(workload, "_fused_sites", lambda model: ("some.other.site",))
    (row,) = compare(tiny(), ENABLED, ("oslo_fusion",), repeats=1, warmup=5)["rows"]
    assert "what was timed is not what was checked" in row["error"]
    assert "speedup" not in row
    assert "percent_of_roof" not in row


def test_compile_compiles(monkeypatch):
    calls = []
    compiled = torch.compile

    def recorded(model, mode):
        calls.append(mode)
        return compiled(model, backend="eager")  # the frontend is enough here, and ten times faster than Inductor

    monkeypatch.setattr(torch, "compile", recorded)
    rows = compare(tiny(), ENABLED, ("eager", "compile"), repeats=1, warmup=5)["rows"]
    assert [row["error"] for row in rows] == [None, None]
    assert calls == [None]
    assert rows[1]["first_call_s"] > rows[1]["median_s"]


def test_unknown_provider_and_unusable_config_stop_before_anything_runs(monkeypatch):
    monkeypatch.setattr(workload, "run_check", lambda *args: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=r"providers: received 'compiled'.*did you mean compile"):
        compare(tiny(), ENABLED, ("eager", "compiled"))
    with pytest.raises(ConfigError, match=r"kernel_fusion\.enabled"):
        compare(tiny(), {"kernel_fusion": {"enabled": True}})


def test_facts_name_the_machine_and_the_code():
    found = workload.facts(CPU, commit="abc")
    assert found["commit"] == {"id": "abc", "dirty": None}
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]["slug"].startswith("cpu-")
    assert json.loads(json.dumps(found)) == found


def test_slug():
    assert workload.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_importing_imports_neither_transformers_nor_triton():
    code = "import sys, oslo_fusion.workload; print([m for m in ('transformers', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- on a GPU -------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def test_waits_between_kernels_are_found():
    def event(name, start, end, kind=torch._C._autograd.DeviceType.CUDA):
        span = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=False)

    host = event("aten::mm", 0, 9000, torch._C._autograd.DeviceType.CPU)
    events = [event("c", 5000, 6000), host, event("a", 1000, 2000), event("b", 1500, 2500), event("d", 6500, 7000)]
    assert workload._idle(events) == [(2.5, "b", "c"), (0.5, "c", "d")]


def test_what_is_profiled_is_what_was_timed(monkeypatch):
    """Not the graph for any shape that a compiler makes when another one comes."""
    asked = []

    def measurement(_, second_shape):
        second_shape()
        return workload.Measurement(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, None, 1)

    monkeypatch.setattr(workload, "profile", lambda step, _: step() or {"device_ms": 1.0})
    entry = workload._Entry({"provider": "oslo_fusion", "error": None}, torch.device("cuda"))
    entry.inputs, entry.second_inputs, entry.run = "first", "second", asked.append
    entry.watch = types.SimpleNamespace(measurement=measurement)
    entry.finish(1.0, 1.0, True)
    assert asked == ["first", "second"]
    assert entry.row["profile"] == {"device_ms": 1.0}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", MODES)
def test_gpu_rows_have_memory_and_a_profile(mode):
    load = dataclasses.replace(tiny(mode=mode, dtype="fp16", batch=8, seq=16), device="cuda")
    result = compare(load, ENABLED, ("eager", "oslo_fusion"), repeats=3, warmup=5, with_profile=True)
    for row in result["rows"]:
        assert row["error"] is None
        assert row["peak_bytes"] > 0
        found = row["profile"]
        assert found["device_ms"] > 0
        assert found["launches"] > 10
        assert found["idle_ms"] >= sum(wait["ms"] for wait in found["idle"]) > 0
        assert 0 < len(found["kernels"]) <= 12
        assert sum(kernel["share"] for kernel in found["kernels"]) <= 1 + 1e-6


@pytest.mark.gpu
@needs_gpu
def test_gpu_reduce_overhead_replays_in_both_modes():
    for mode in MODES:
        load = dataclasses.replace(tiny(mode=mode, dtype="fp16"), device="cuda")
        (row,) = compare(load, ENABLED, ("compile reduce-overhead",), repeats=3, warmup=5)["rows"]
        assert row["error"] is None
