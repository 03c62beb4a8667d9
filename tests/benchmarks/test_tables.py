"""Tables of kernels, n-grams, training steps and the sanitizer say what their files say; no file, no table."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import readme, tables, training

FACTS = {
    "device": {"type": "cuda", "name": "NVIDIA Test", "driver": "580.1", "slug": "nvidia-test"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "python": "3.12.1"},
    "commit": {"id": "0123456789abcdef", "dirty": False},
    "date": "2026-11-20 12:00 UTC",
}


def norm_row(mode, rows, width, dtype, ours, **peers):
    times = {"ours": ours, **peers}
    return {
        "op": "rms_norm",
        "mode": mode,
        "rows": rows,
        "width": width,
        "dtype": dtype,
        "tensor_mb": rows * width * 2 / 1e6,
        "device_us": times,
        "host_us": {},
        "percent_of_copy": {name: 1000 / us for name, us in times.items()},
        "against_best_peer": 99.0,
    }


NORMS = {
    "device": "NVIDIA Test",
    "driver": "580.1",
    "python": "3.12.1",
    "torch": "2.11.0",
    "commit": "unknown",
    "copy_tb_per_s": 4.2,
    "left_out": [],
    "results": [
        norm_row("forward", 8, 4096, "bfloat16", 2.0, torch=1.0),
        norm_row("forward", 4096, 768, "bfloat16", 20.0, torch=30.0, compile=19.0),
        norm_row("forward", 32768, 4096, "bfloat16", 100.0, torch=150.0, compile=125.0),
        norm_row("forward+backward", 32768, 4096, "bfloat16", 400.0, torch=600.0, compile=300.0),
        norm_row("forward", 32768, 4096, "float32", 200.0, torch=250.0),
        norm_row("forward", 4096, 4097, "bfloat16", 50.0, torch=80.0),
        norm_row("forward", 4096, 2048, "bfloat16", 11.0, torch=12.0),
        norm_row("forward", 4096, 16384, "bfloat16", 95.0, torch=94.0),
    ],
}


def start_row(how, caches, first):
    seconds = {"imports": 5.0, "model": 4.0, "initialize": 9.82, "first step": first, "second step": 0.24}
    return {"how": how, "caches": caches, "seconds": seconds, "compiled": {"beside": 28, "first step": 2}}


START = {
    **FACTS,
    "benchmark": "start",
    "model": "llama-1b",
    "kernels": False,
    "rows": [start_row("side by side", "empty", 4.335), start_row("side by side", "filled", 0.93)],
}


def ban(shape, provider, us, **more):
    return {"shape": shape, "tokens": 20, "provider": provider, "device_us": us, "host_us": 9.0, **more}


BANS = {
    "facts": FACTS,
    "n": 3,
    "rows": [
        ban("256×32128 float32, 20 tokens", "transformers", 60.4),
        ban("256×32128 float32, 20 tokens", "copy", 17.0),
        ban("256×32128 float32, 20 tokens", "triton in place", 1.52, goal_us=7.0, reached=True),
        ban("4×9 float32, encoder", "transformers", None),
        ban("4×9 float32, encoder", "copy", 5.0),
        ban("8×32128 float32, 1000 tokens", "triton in place", 1.6) | {"tokens": 1000},
        ban("8×32128 float32, 100000 tokens", "triton in place", 3.82) | {"tokens": 100000},
    ],
}


def step(provider, median=None, **change):
    made = {"provider": provider, "error": None, "absent": None, **change}
    if median is None:
        return made
    return {
        **made,
        "median_s": median,
        "p90_s": 1.1 * median,
        "speedup": 0.3 / median,
        "prepare_s": 0.5,
        "first_step_s": 1.5,
        "peak_bytes": 40 << 30,
        "percent_of_roof": 51.6,
        "losses": [11.0, 10.0, 9.0],
        "check": {"green": True, "found": {}},
        "profile": {"device_ms": 250.25, "host_ms": 90.0, "wall_ms": 300.0, "launches": 1234.0, "kernels": []},
        **change,
    }


def section(model, batch, seq, rows, error=None):
    load = {"model": model, "batch": batch, "seq": seq, "size": "full", "dtype": "bfloat16", "mode": "training"}
    return {"workload": load, "error": error, "rows": rows}


TRAINING = {
    "benchmark": "training",
    **FACTS,
    "sections": [
        section("t5", 32, 512, [step("eager", 0.3), step("liger", absent="liger-kernel 0.8.5 has no recipe for t5")]),
        section(
            "llama",
            8,
            2048,
            [
                step("eager", 0.3),
                step("oslo_fusion kernels", 0.25, fusion={"fused": {"norm": 33}, "refused": []}),
                step("liger", 0.24, check={"green": False, "found": "gradient of x: error 1"}),
            ],
        ),
    ],
}
STEPS = {
    **NORMS,
    "results": [
        {"mode": mode, "rows": 100, "width": width, "device_us": {"0 expression": 1000.0, "7 shipped": 100.0 + width}}
        for width in (768, 2048, 4096, 8192)
        for mode in ("forward", "backward")
    ],
}
SANITIZER = {
    "benchmark": "sanitizer",
    **FACTS,
    "sanitizer": "2025.3.1.0",
    "cases": 40,
    "launches": {"_a_kernel": 10, "_b_kernel": 5},
    "not_launched": [],
    "cuda_extension": True,
    "tools": [
        {"tool": "memcheck", "verdict": "clean", "fault_caught": True},
        {"tool": "racecheck", "verdict": "red: why", "fault_caught": False},
    ],
}
LOSSES = {
    **{key: value for key, value in NORMS.items() if key != "results"},
    "results": [
        {
            "shape": "A model",
            "tokens": 100,
            "labelled": labelled,
            "dim": 20,
            "vocab": 300,
            "dtype": "bfloat16",
            "ms": {"eager": 60.0, "ours": 40.0, "compile": compiled, "liger": 50.0},
            "peak_mib": {"eager": 2400.4, "ours": 150.0, "compile": 400.0, "liger": 60.0},
            "percent_of_matmul_rate": {"eager": 50.0, "ours": 75.6},
        }
        for labelled, compiled in ((100, 39.9), (15, 20.0))
    ],
}
MODEL = {"sizes": {"num_hidden_layers": 8, "hidden_size": 2048}, "batch": 8, "seq": 2048, "dtype": "bfloat16"}
TWO = {
    "benchmark": "distributed",
    **FACTS,
    "world": 2,
    "backend": "nccl",
    "model": MODEL,
    "sections": [
        {
            "way": "DDP",
            "error": None,
            "rows": [
                step("eager", 0.3),
                step("oslo_fusion memory-efficient", 0.25, compiled={"graphs": 1, "breaks": ["x"], "recompiles": 2}),
            ],
        },
        {"way": "FSDP2", "error": "process 1: RuntimeError: a | b", "rows": []},
    ],
}
ALL = {
    "linear_cross_entropy": LOSSES,
    "distributed": TWO,
    "start": START,
    "rms_norm": NORMS,
    "no_repeat_ngram": BANS,
    "training": TRAINING,
    "rms_norm_steps": STEPS,
    "sanitizer": SANITIZER,
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
    (tmp_path / "results").mkdir()
    return tmp_path


def put(place, **data):
    for kind, content in data.items():
        (place / "results" / f"{kind}-nvidia-test.json").write_text(json.dumps(content))


def run(place, *arguments):
    return readme.main(["--readme", str(place / "README.md"), "--results", str(place / "results"), *arguments])


def made(place, **data):
    put(place, **data)
    assert run(place) == 0
    return (place / "README.md").read_text()


def test_kernels(place):
    text = made(place, rms_norm=NORMS)
    assert "| `rms_norm` | 4096 × 768 | bf16 | 20.0 | 19.0 compile | 0.95 | 50 | – | – | – | – |" in text
    assert "| `rms_norm` | 32768 × 4096 | bf16 | 100 | 125 compile | **1.25** | 10 | 400 | 300 compile | 0.75 | 2 |" in text
    assert "| `rms_norm` | 4096 × 4097 | bf16 | 50.0 | 80.0 torch | **1.60** |" in text
    assert "| `rms_norm` | 4096 × 16384 | bf16 | 95.0 | 94.0 torch | **0.99** |" in text
    assert "| `rms_norm` | 32768 × 4096 | fp32 | 200 |" in text
    assert text.count("| `rms_norm` |") == 5, "the small shape and the width in between are in the file, not in the table"
    assert "in 5 of 8 rows, at the least 0.50× (8×4096 bf16 forward, torch)" in text
    assert "[rms_norm-nvidia-test.json](results/rms_norm-nvidia-test.json): one NVIDIA Test, driver 580.1, torch 2.11.0" in text
    assert "unknown" not in text
    assert "(results/kernels.png)" in text
    assert (place / "results" / "kernels.png").exists()
    assert "No results" not in text


def test_a_peer_that_overwrites_its_inputs_is_told(place):
    rotations = copy.deepcopy(NORMS)
    rotations["results"] = [norm_row("forward", 4096, 768, "bfloat16", 20.0, compile=30.0, liger=9.0, liger_copied=25.04)]
    (row,) = rotations["results"]
    row |= {"dim": 128, "rot_dim": 32}
    assert "Liger overwrites q and k" in (text := made(place, rope=rotations))
    assert "by a copy, it takes 25.0 µs." in text
    row["rot_dim"] = 128
    assert "overwrites" not in made(place, rope=rotations)
    row["rot_dim"], row["device_us"]["liger"] = 32, 21.0
    assert "overwrites" not in made(place, rope=rotations)


def test_several_operations_share_a_table(place):
    product = copy.deepcopy(NORMS)
    for row in product["results"]:
        row["op"] = "swiglu"
        row["device_us"] = {"ours triton": row["device_us"].pop("ours"), **row["device_us"]}
        row["percent_of_copy"]["ours triton"] = row["percent_of_copy"].pop("ours")
    text = made(place, rms_norm=NORMS, glu=product)
    assert text.count("**Kernels alone**") == 1
    assert "| `swiglu` | 4096 × 768 | bf16 | 20.0 | 19.0 compile |" in text
    assert "[rms_norm-nvidia-test.json](results/rms_norm-nvidia-test.json), [glu-nvidia-test.json]" in text


def test_bans(place):
    text = made(place, no_repeat_ngram=BANS)
    assert "| 256×32128 float32, 20 tokens | 60.4 | – | 1.5 | – | – | – | 7 |" in text
    assert "| 4×9 float32, encoder | – | – | – | – | – | – | – |" in text
    assert "100000 tokens | – | – | 3.8 |" in text
    assert "1000 tokens | – | – | 1.6" not in text
    assert "commit `0123456789`" in text


def test_training(place):
    text = made(place, training=TRAINING)
    assert "| T5-base, 32 × 512 + 512 | eager | 300.0 | 330.0 | 1.00 | 250.2 | 90.0 | 1234 | 40.0 | 0.5 | 1.5 | 52 |" in text
    assert "| liger: liger-kernel 0.8.5 has no recipe for t5 |" in text
    assert "| Llama 1.24B, 8 × 2048 | **oslo_fusion kernels** | **250.0** |" in text
    assert "Fused in Llama 1.24B, 8 × 2048 by oslo_fusion kernels: 33 × norm." in text
    assert "caches were empty" not in text
    assert "The gradients of liger on Llama 1.24B, 8 × 2048 are outside the law: gradient of x: error 1." in text
    assert (place / "results" / "training.png").exists()


def test_training_with_a_dial(place):
    fusion = {"fused": {"repeated layer": 16}, "refused": [], "compiled": {"graphs": 1, "breaks": [], "recompiles": 0}}
    rows = [
        step("eager", 0.3, profile=None),
        step("compile", 0.26, profile=None, check={"green": None, "found": None}),
        step("oslo_fusion memory-efficient", 0.2, profile=None, fusion=fusion, cold=True),
        step("oslo_fusion memory-efficient at 0", 0.25, profile=None, fusion=fusion, peak_bytes=9 << 30),
        step("oslo_fusion memory-efficient at 0.5", error="OutOfMemoryError"),
    ]
    found = {**TRAINING, "sections": [{**section("llama", 8, 2048, rows), "commit": {"id": "fedcba98765432"}}]}
    text = made(place, training=found)
    assert "| Llama 1.24B, 8 × 2048 | eager | 300.0 | 330.0 | 1.00 | 40.0 | 0.5 | 1.5 | 52 |" in text
    assert "oslo_fusion memory-efficient at 0.5: OutOfMemoryError |  |" in text
    assert (
        "by oslo_fusion memory-efficient, oslo_fusion memory-efficient at 0: 16 × repeated layer (1 graphs, 0 breaks," in text
    )
    assert "All caches were empty for oslo_fusion memory-efficient; the others" in text
    assert "The gradients of compile on Llama 1.24B, 8 × 2048 were not compared." in text
    assert "some models at commit `fedcba9876`." in text
    (panel,) = tables.pictures(tables.load(place / "results"))["training.png"]
    assert panel.spots["oslo_fusion memory-efficient at 0"] == (9.0, 8 * 2048 / 0.25)
    assert list(panel.spots) == [row["provider"] for row in rows[:4]]


def test_budget_of_a_provider():
    found = [tables.budget_of(name) for name in training.COMPILED]
    assert found == [1.0, *training.DIAL, *[None] * 5], "in another mode, or with checkpointing, it is no point of the dial"
    assert tables.budget_of("eager") is None


def test_two_gpus(place):
    text = made(place, distributed=TWO)
    assert "| DDP | eager | 300.0 | 330.0 | 1.00 | 40.0 | 2.0 | – | – |" in text
    assert "| DDP | oslo_fusion memory-efficient | 250.0 | 275.0 | 1.20 | 40.0 | 2.0 | 1 | 1, 2 |" in text
    assert "| FSDP2: process 1: RuntimeError: a / b |  |" in text
    assert "A Llama with 8 layers, 2048 wide, 8 × 2048 tokens" in text
    assert "two NVIDIA Test, driver" in text


def test_what_a_new_process_waits_for(place):
    text = made(place, start=START)
    assert "| empty | side by side | 30 | 9.8 | 4.3 | 0.2 |" in text
    assert "**What a new process waits for**, Llama 1.24B, layers compiled" in text
    assert "**What a new process waits for**, my-model, kernels alone" in made(
        place, start={**START, "model": "my-model", "kernels": True}
    )


def test_losses(place):
    text = made(place, linear_cross_entropy=LOSSES)
    assert "| A model: 100 × 20 × 300 | bf16 | **40.0 / 150** | 60.0 / 2400 | 39.9 / 400 | 50.0 / 60 | 76 |" in text
    assert "| A model: 100 × 20 × 300, 15 with a label | bf16 |" in text
    assert text.count("torch.compile is") == 1, "a tie is not said to be slower"
    assert "A model: torch.compile is 2.00 times as fast as oslo_fusion." in text


def test_training_that_was_not_timed(place):
    red = copy.deepcopy(TRAINING)
    red["sections"] = [section("llama", 8, 2048, [step("eager"), step("liger", error="too | much")], "the check is red: ours")]
    text = made(place, training=red)
    assert "| eager: not timed: the check is red: ours |" in text
    assert "| liger: too / much |" in text
    assert not (place / "results" / "training.png").exists()


def test_steps(place):
    text = made(place, rms_norm_steps=STEPS)
    assert "| step | forward 100 × 768 | forward 100 × 4096 | forward 100 × 8192 | backward 100 × 768 |" in text
    assert "| 7 shipped | 868 | 4196 | 8292 |" in text


def test_sanitizer(place):
    text = made(place, sanitizer=SANITIZER)
    assert "**compute-sanitizer** 2025.3.1.0 over 15 launches of 2 kernels in 40 cases" in text
    assert "memcheck clean, its planted fault reported; racecheck red: why." in text


def test_all_of_them_and_check(place, capsys):
    text = made(place, **ALL)
    assert run(place, "--check") == 0
    assert made(place, **ALL) == text
    changed = copy.deepcopy(TRAINING)
    changed["sections"][1]["rows"][1]["median_s"] = 0.2
    put(place, training=changed)
    assert run(place, "--check") == 1
    said = capsys.readouterr().err
    assert "README.md" in said
    assert "training.png" in said
    assert "kernels.png" not in said
    assert run(place) == 0
    (place / "results" / "kernels.png").unlink()
    assert run(place, "--check") == 1


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"device": "x"}', '{"results": [1], "rows": 3, "sections": [{}]}'])
def test_a_file_that_is_no_result_is_named(place, capsys, kind, content):
    (place / "results" / f"{kind}-bad.json").write_text(content)
    before = (place / "README.md").read_text()
    assert run(place) == 2
    assert f"{kind}-bad.json" in capsys.readouterr().err
    assert (place / "README.md").read_text() == before


def test_without_files_there_is_nothing(place):
    assert tables.sections(tables.load(place / "results"), str) == []
    assert tables.pictures([]) == {}


def test_the_files_of_this_repository_are_taken():
    results = tables.load(readme.ROOT / "benchmarks" / "results")
    assert {"rms_norm", "layer_norm", "no_repeat_ngram"} <= {result.kind for result in results}
    assert tables.sections(results, str)


def test_attention_has_a_row_per_shape_and_a_dash_for_who_cannot(tmp_path):
    rows = [
        {"shape": "a", "what": "forward", "size": [1, 2, 3, 4, 5], "ms": {"ours": 0.1, "cudnn": 0.2}},
        {"shape": "a", "what": "forward + backward", "size": [1, 2, 3, 4, 5], "ms": {"ours": 0.3}},
        {"shape": "a", "what": "backward, by difference", "ms": {"ours": 0.2}},
    ]
    data = {"device": "A GPU", "driver": "1", "python": "3", "torch": "2", "commit": "abcdef1", "results": rows}
    (tmp_path / "attention-a-gpu.json").write_text(json.dumps(data))
    text = "\n".join(tables.sections(tables.load(tmp_path), str))
    assert "| a | 1×2×3×4×5 | **0.100 / 0.300** | – |" in text
    assert "abcdef1" in text
