"""The README's results say what the JSON files say, and nothing else."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import readme

EMPTY = f"# Title\n\nbefore\n\n{readme.BEGIN}\n{readme.END}\n\nafter\n"


def row(provider, median, speedup=None, **change):
    made = {
        "provider": provider,
        "error": None,
        "median_s": median,
        "p90_s": 1.25 * median,
        "first_call_s": 2.0,
        "prepare_s": 0.5,
        "second_shape_s": 0.75,
        "peak_bytes": 3 << 30,
        "percent_of_roof": 41.7,
        **change,
    }
    return made if speedup is None else {**made, "speedup": speedup}


def section(mode, dtype, rows):
    return {"workload": {"model": "gpt2", "mode": mode, "dtype": dtype, "batch": 256, "seq": 16, "size": "full"}, "rows": rows}


RESULT = {
    "benchmark": "gpt2",
    "device": {"type": "cuda", "name": "NVIDIA Test", "driver": "580.1"},
    "versions": {"torch": "2.13.0", "transformers": "5.17.0", "python": "3.12.1"},
    "commit": {"id": "0123456789abcdef", "dirty": False},
    "date": "2026-11-20 12:00 UTC",
    "sections": [
        section(
            "forward",
            "float16",
            [row("eager", 0.010, 1.0), row("compile", 0.016, 0.625), row("oslo_fusion", 0.008, 1.25)],
        ),
        section(
            "training",
            "float16",
            [row("eager", 0.030, 1.0), row("compile", 0.020, 1.5), row("oslo_fusion", 0.040, 0.75)],
        ),
    ],
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "README.md").write_text(EMPTY)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpt2-nvidia-test.json").write_text(json.dumps(RESULT))
    return tmp_path


def run(place, *arguments):
    return readme.main(["--readme", str(place / "README.md"), "--results", str(place / "results"), *arguments])


def test_rows_and_sentences_come_from_the_numbers(place):
    assert run(place) == 0
    text = (place / "README.md").read_text()
    assert "| fp16 | HF eager | 10.00 | 12.50 | 1.00 | 2.5 | 0.75 | 3.00 | 42 |" in text
    assert "| **fp16** | **oslo_fusion** | **8.00** | **10.00** | **1.25** |" in text
    assert "Forward, speed of oslo_fusion: fp16 1.25× that of HF eager and 2.00× that of torch.compile." in text
    assert "Training step, speed of oslo_fusion: fp16 0.75× that of HF eager and 0.50× that of torch.compile." in text
    assert "NVIDIA Test: driver 580.1, torch 2.13.0, transformers 5.17.0, Python 3.12.1, commit `0123456789`," in text
    assert "(results/gpt2.png)" in text
    assert text.startswith("# Title\n\nbefore\n\n")
    assert text.endswith("\n\nafter\n")


def test_writing_twice_changes_nothing_and_check_agrees(place):
    assert run(place, "--check") == 1
    assert (place / "README.md").read_text() == EMPTY
    assert run(place) == 0
    written = (place / "README.md").read_text()
    assert run(place, "--check") == 0
    assert run(place) == 0
    assert (place / "README.md").read_text() == written


def test_check_sees_other_numbers(place, capsys):
    assert run(place) == 0
    changed = copy.deepcopy(RESULT)
    changed["sections"][0]["rows"][2]["median_s"] = 0.009
    (place / "results" / "gpt2-nvidia-test.json").write_text(json.dumps(changed))
    assert run(place, "--check") == 1
    assert "README.md" in capsys.readouterr().err


def test_check_sees_an_old_picture(place, capsys):
    assert run(place) == 0
    picture = place / "results" / readme.PICTURE
    other = copy.deepcopy(RESULT)
    other["sections"][0]["rows"][2]["median_s"] = 0.001
    readme.draw([other], picture)
    assert run(place, "--check") == 1
    assert "gpt2.png" in capsys.readouterr().err
    picture.unlink()
    assert run(place, "--check") == 1


def test_failures_are_shown(place):
    changed = copy.deepcopy(RESULT)
    changed["sections"][0]["rows"][1] = {"provider": "compile", "error": "OutOfMemoryError: too | large"}
    changed["sections"][1] = {**changed["sections"][1], "rows": [], "error": "the check is red: output"}
    (place / "results" / "gpt2-nvidia-test.json").write_text(json.dumps(changed))
    assert run(place) == 0
    text = (place / "README.md").read_text()
    assert "| fp16 | torch.compile: OutOfMemoryError: too / large |" in text
    assert "not timed: the check is red: output" in text
    assert "Training step, speed" not in text
    assert "that of torch.compile" not in text


def test_compiled_layers_are_a_table_of_their_own(place):
    forward = {**RESULT["sections"][0], "config": {"memory_efficient_fusion": {"scope": "layer"}}}
    (place / "results" / "gpt2-memory-efficient-nvidia-test.json").write_text(json.dumps({**RESULT, "sections": [forward]}))
    assert run(place) == 0
    text = (place / "README.md").read_text()
    assert text.count("**Forward, GPT-2") == text.count("**Forward with `memory_efficient_fusion`, GPT-2") == 1
    assert "Forward with `memory_efficient_fusion`, speed of oslo_fusion: fp16 1.25×" in text
    assert run(place, "--check") == 0


def test_gpus_come_first(place):
    processor = {**RESULT, "device": {"type": "cpu", "name": "A processor", "driver": None}}
    (place / "results" / "gpt2-cpu.json").write_text(json.dumps(processor))
    assert run(place) == 0
    text = (place / "README.md").read_text()
    assert text.index("NVIDIA Test") < text.index("A processor")


def test_without_results_no_figure_is_claimed(place):
    (place / "results" / "gpt2-nvidia-test.json").unlink()
    assert run(place) == 0
    assert "No results are in" in (place / "README.md").read_text()
    assert not (place / "results" / readme.PICTURE).exists()
    assert run(place, "--check") == 0


@pytest.mark.parametrize("text", ["nothing", f"{readme.END}{readme.BEGIN}", f"{EMPTY}{readme.BEGIN}"])
def test_readme_without_its_markers_is_left_alone(place, capsys, text):
    (place / "README.md").write_text(text)
    assert run(place) == 2
    assert "once each, in this order" in capsys.readouterr().err
    assert (place / "README.md").read_text() == text


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "other"}'])
def test_a_file_that_is_no_result_is_named(place, capsys, content):
    (place / "results" / "gpt2-bad.json").write_text(content)
    assert run(place) == 2
    assert "gpt2-bad.json" in capsys.readouterr().err


def test_missing_readme(place, capsys):
    (place / "README.md").unlink()
    assert run(place) == 2
    assert "cannot be read" in capsys.readouterr().err
