"""no_repeat_ngram in Triton: how the text is cut, the operation's tests under the interpreter, and every target's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
kernels: Any = pytest.importorskip("oslo_fusion.triton.no_repeat_ngram", reason="needs triton", exc_type=ImportError)

STRIDES = (
    "scores_row_stride",
    "scores_col_stride",
    "ids_row_stride",
    "ids_col_stride",
    "source_row_stride",
    "source_col_stride",
)
NUMBERS = ("vocab", "source_length", "rows_per_source", "sizes_stride", "size", "length", "capacity", "out_row_stride")


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
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton or any_text"]
    command.append(str(ROOT / "tests" / "ops" / "test_no_repeat_ngram.py"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("scores", ["*fp16", "*bf16", "*fp32"])
@pytest.mark.parametrize("variant", ["own text", "encoder, all on the device"])
@pytest.mark.parametrize("form", ["in place", "functional"])
def test_compiles_for_every_target(compile_for_all_targets: Callable[..., Any], scores: str, variant: str, form: str) -> None:
    everything = variant != "own text"
    signature = dict.fromkeys((*STRIDES, *NUMBERS), "i32")
    signature |= {"out_ptr": scores, "scores_ptr": scores, "ids_ptr": "*i64"}
    constexprs: dict[str, Any] = {"HAS_SOURCE": everything, "HAS_SIZES": everything, "HAS_DEVICE_LENGTH": everything}
    optional = {"source_ptr": "*i64", "sizes_ptr": "*i64", "device_length_ptr": "*i32"}
    if everything:
        signature |= optional
    else:
        constexprs |= dict.fromkeys(optional)
    constexprs |= {"SIZE": 0 if everything else 3, "BLOCK": 512}
    kernel = kernels._no_repeat_ngram_ban_kernel
    if form == "functional":
        kernel = kernels._no_repeat_ngram_copy_kernel
        constexprs["STRETCH"] = kernels.STRETCH
    constexprs |= {"scores_col_stride": 1, "ids_col_stride": 1}  # as triton specialises a stride of 1 at a launch
    built = compile_for_all_targets(
        kernel, {k: v for k, v in signature.items() if k not in constexprs}, constexprs, num_warps=4
    )
    for target in built.values():
        assert target.shared <= 1024, f"{target.target}: nothing here should need shared memory"
    if form == "functional":
        assert "bar.sync" in built["sm_90"].assembly
        assert "s_barrier" in built["gfx942"].assembly
