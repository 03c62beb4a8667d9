"""no_repeat_ngram in Triton: how the text is cut, the operation's tests under the interpreter, and every target's compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oslo_fusion.ops.no_repeat_ngram import no_repeat_ngram_reference_

ROOT = Path(__file__).parents[2]
kernels: Any = pytest.importorskip("oslo_fusion.triton.no_repeat_ngram", reason="needs triton", exc_type=ImportError)


@pytest.mark.parametrize("rows", [0, 1, 8, 256, 100_000])
@pytest.mark.parametrize("windows", [1, 126, 1024, 1025, 100_000, 2**33])
def test_the_cut_covers_the_text_and_stays_small(rows: int, windows: int) -> None:
    cut = kernels.choose_cut(rows, windows)
    assert cut.block in (128, 512)
    assert cut.block == 128 * cut.warps, "four windows a thread"
    assert 1 <= cut.chunks <= 65_535, "what a grid's second axis can hold"
    assert (cut.chunks - 1) * cut.block < windows, "no program without a window"
    assert rows * cut.chunks <= max(rows, 1) + 2048 + rows


@pytest.mark.timeout(600)
def test_numerically_under_the_interpreter() -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton or any_text"]
    command.append(str(ROOT / "tests" / "ops" / "test_no_repeat_ngram.py"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("scores", ["*fp16", "*bf16", "*fp32"])
@pytest.mark.parametrize("variant", ["own text", "own text, odd and strided", "encoder, all on the device"])
@pytest.mark.parametrize("form", ["in place", "functional"])
def test_compiles_for_every_target(compile_for_all_targets: Callable[..., Any], scores: str, variant: str, form: str) -> None:
    everything, whole = variant == "encoder, all on the device", variant == "own text"
    signature = {**dict.fromkeys(kernels._NUMBERS, "i32"), "out_ptr": scores, "scores_ptr": scores, "ids_ptr": "*i64"}
    constexprs: dict[str, Any] = {"HAS_SOURCE": everything, "HAS_SIZES": everything, "HAS_DEVICE_LENGTH": everything}
    optional = {"source_ptr": "*i64", "sizes_ptr": "*i64", "device_length_ptr": "*i32"}
    if everything:
        signature |= optional
    else:
        constexprs |= dict.fromkeys(optional)
    constexprs |= {"SIZE": 0 if everything else 3, "TIGHT": variant != "own text, odd and strided", "BLOCK": 512}
    kernel = kernels._no_repeat_ngram_ban_kernel
    if form == "functional":
        kernel = kernels._no_repeat_ngram_copy_kernel
        constexprs |= {"STRETCH": kernels.STRETCH, "UNIT": 16 if whole else 1}
    built = compile_for_all_targets(kernel, signature, constexprs, num_warps=4, walks=False)
    for target in built.values():
        assert target.shared <= 1024, f"{target.target}: nothing here should need shared memory"
    if form == "functional":
        assert "bar.sync" in built["sm_90"].assembly
        assert "s_barrier" in built["gfx942"].assembly
        for wide in (r"ld\.global\S*\.v4", r"st\.global\S*\.v4"):
            assert bool(re.search(wide, built["sm_90"].assembly)) == whole, (
                "scores are copied 16 bytes at a time, or one by one"
            )


@pytest.mark.parametrize(
    ("rows", "vocab", "row_stride", "unit"),
    [(2, 32128, 32128, 16), (2, 50257, 50257, 1), (2, 32128, 32136, 8), (2, 1000, 1000, 8), (3, 24, 0, 8), (2, 24, 25, 1)],
)
def test_what_divides_the_width_is_a_constant_of_the_copy(
    rows: int, vocab: int, row_stride: int, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = recorded(monkeypatch, "_COPY")
    scores = torch.zeros(rows * max(row_stride, vocab)).as_strided((rows, vocab), (row_stride, 1))
    kernels.launch_no_repeat_ngram(scores, torch.zeros(rows, 9, dtype=torch.long), None, 3, None, 9, None)
    (call,) = launched
    assert call["UNIT"] == unit
    assert (call["scores_row_units"] * unit, call["vocab_units"] * unit) == (row_stride, vocab)


def test_only_neighbours_are_taken_for_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride that is 1 at one launch is not at the next, and is no part of a key unless ``TIGHT`` says so."""
    launched = recorded(monkeypatch, "_BAN")
    scores, ids, source = torch.zeros(4, 8), torch.zeros(4, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    apart = [torch.stack((x, x), -1)[..., 0] for x in (scores, ids, source)]
    for which in (None, 0, 1, 2):
        given = [apart[i] if i == which else x for i, x in enumerate((scores, ids, source))]
        kernels.launch_no_repeat_ngram_(*given, 2, None, 6, None)
        assert launched[-1]["TIGHT"] is (which is None)
    kernels.launch_no_repeat_ngram_(scores, ids, None, 2, None, 6, None)
    assert launched[-1]["TIGHT"] is True


def test_a_length_on_the_device_is_clamped_to_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded(monkeypatch, "_BAN")
    kernels.launch_no_repeat_ngram_(torch.zeros(4, 8), torch.zeros(4, 6).long(), None, 2, None, 0, torch.tensor(3))
    assert launched[-1]["length"] == 6
    assert launched[-1]["HAS_DEVICE_LENGTH"] is True


@pytest.mark.gpu
def test_a_launch_is_not_taken_for_the_one_before() -> None:
    """Of other dtypes, alignments, strides, widths, sizes or places of the length; every one comes back."""
    check_launches_after_each_other(torch.device("cuda"), (torch.float32, torch.bfloat16), (0, 8, 1, 0))


def check_launches_after_each_other(device: torch.device, dtypes: tuple[torch.dtype, ...], offsets: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 60, (4, 41), generator=generator).to(device)
    ids, source, sizes = drawn[:, :40].contiguous(), drawn[:2, 1:].contiguous(), drawn[0, :4] % 3
    arguments = [
        (ids, None, 1, None, 40, None),
        (drawn[:, 1:], None, 1, None, 40, None),
        (ids.int(), None, 1, None, 40, None),
        (ids.t().contiguous().t(), None, 1, None, 40, None),
        (ids, None, 2, None, 40, None),
        (ids, None, 0, sizes, 40, None),
        (ids, None, 1, None, 0, torch.tensor(33, device=device)),
        (ids, None, 1, None, 0, torch.tensor([7, 35], device=device, dtype=torch.int32)[1]),
        (ids, source, 1, None, 40, None),
        (ids, None, 1, None, 40, None),
    ]
    whole, *others = [(64, 64, 1), (63, 64, 1), (64, 72, 1), (64, 65, 1), (32, 64, 2), (64, 64, 1)]
    for dtype in dtypes:
        for offset in offsets:
            memory = torch.randn(400, generator=generator).to(device, dtype)
            for given in arguments if offset == 0 else arguments[:1]:
                check_both_forms(memory, offset, whole, given)
            for shape in others:
                check_both_forms(memory, offset, shape, arguments[0])


def check_both_forms(memory: torch.Tensor, offset: int, shape: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    """As the reference, and nothing else of the memory is written."""
    vocab, row_stride, col_stride = shape

    def view(of: torch.Tensor) -> torch.Tensor:
        return of.as_strided((4, vocab), (row_stride, col_stride), offset)

    expected, owned = memory.clone(), memory.clone()
    no_repeat_ngram_reference_(view(expected), *arguments)
    assert not torch.equal(expected, memory), "something is banned"
    kernels.launch_no_repeat_ngram_(view(owned), *arguments)
    assert torch.equal(owned, expected)
    assert torch.equal(kernels.launch_no_repeat_ngram(view(memory), *arguments), view(expected))


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """The arguments by name of every launch of a kernel, which are not made."""
    names, launched = getattr(kernels, name).jitted.arg_names, []

    def record(grid: object, pointers: Any, numbers: tuple[int, ...], constants: tuple[Any, ...], warps: int) -> None:
        launched.append(dict(zip(names, (*pointers, *numbers, *constants), strict=True)))

    monkeypatch.setattr(kernels, name, record)
    return launched
