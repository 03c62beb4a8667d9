"""What a rehearsal compiles is what the launch after it looks for, in this process and in the next."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from oslo_fusion import rehearsal  # noqa: E402
from oslo_fusion.triton import launch, no_repeat_ngram, rms_norm  # noqa: E402
from oslo_fusion.triton import linear_cross_entropy as loss  # noqa: E402

WIDTH = 64
KERNELS = (rms_norm._FORWARD, loss._SCALE, no_repeat_ngram._BAN, no_repeat_ngram._COPY)
LAUNCHES, DIFFERENT = 9 + 3 + 1 + 3, 9 + 2 + 1 + 2
"""Of :func:`launch_all`: a count of 1 and one of 16 are the same kernel, and so are texts of 7 tokens and of 9."""


class PretendedGPU:
    """Triton's driver of an sm_90 that compiles, and counts what is launched instead of launching it."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.loaded: list[str] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        self.loaded.append(name)
        return object(), object(), 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(metadata.name)


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process does not know."""
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "_compiled", {})
        monkeypatch.setattr(kernel.jitted, "device_caches", collections.defaultdict(kernel.jitted.create_binder))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[PretendedGPU]:
    """Tensors of the CPU stand for those of a GPU; kernels and caches begin empty, and are as before at the end."""
    if not isinstance(rms_norm._rms_norm_fwd_kernel, triton.runtime.JITFunction):
        pytest.skip("an interpreted kernel cannot be compiled")
    pretended = PretendedGPU()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(launch, "_major", lambda index: 9)
    forget_kernels(monkeypatch)
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(pretended)
    yield pretended
    driver._active = before


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Name of every kernel that Triton was asked to compile, and whether it lay in the cache."""
    asked: list[tuple[str, bool]] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        asked.append((src.name, cache_hit))

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    return asked


def launch_all() -> None:
    """Kernels that differ in what the compiler looks at: dtypes, alignment, missing pointers, wide numbers, options."""
    memory = torch.zeros(8 * WIDTH)
    for x in (memory[:WIDTH], memory[1 : WIDTH + 1], memory[:WIDTH].bfloat16()):
        for rows_, residual, chain in ((1, None, 2), (16, None, 0), (1, x, 0)):
            constants = (WIDTH, 1, 0.0, True, residual is not None, 1, WIDTH, chain)
            pointers = (x, residual, memory[:WIDTH], x, residual, memory[:1])
            rms_norm._FORWARD((rows_,), pointers, (WIDTH, WIDTH, rows_, 1e-6), constants, 1)
    for number in (1, 16, 1 << 40):
        loss._SCALE((1,), (memory, memory[:1], memory), (number,), (1, True, WIDTH), 4)
    loss._SCALE((1,), (memory, memory[:1], memory), (1,), (1, True, WIDTH), 4, 64)
    scores, ids = memory.view(2, -1), torch.zeros(2, 9, dtype=torch.int64)
    no_repeat_ngram.launch_no_repeat_ngram(scores, ids, None, 2, None, 9, None)
    no_repeat_ngram.launch_no_repeat_ngram(scores, ids, None, 2, None, 7, None)
    no_repeat_ngram.launch_no_repeat_ngram_(scores, ids, None, 2, None, 9, None)


def rehearse() -> int:
    noted = rehearsal.Rehearsal()
    with rehearsal.under(noted):
        launch_all()
    return noted.finish()


def test_a_launch_finds_what_was_rehearsed(
    gpu: PretendedGPU, compiled: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = rehearse()
    assert count == len(compiled) == len(gpu.loaded) == DIFFERENT
    assert not any(hit for _, hit in compiled)
    assert gpu.launched == []
    compiled.clear()
    launch_all()
    assert len(gpu.launched) == LAUNCHES
    assert compiled == [], "a launch asked for another kernel than the rehearsal"
    forget_kernels(monkeypatch)
    launch_all()
    assert len(compiled) == DIFFERENT, "in the next process the cache on the disk is asked"
    assert all(hit for _, hit in compiled)


def test_a_rehearsal_after_a_rehearsal_compiles_nothing(gpu: PretendedGPU, compiled: list[tuple[str, bool]]) -> None:
    rehearse()
    compiled.clear()
    rehearse()
    assert compiled == []
    launch_all()
    assert rehearse() == 0, "what was launched is known"
    assert len(gpu.launched) == LAUNCHES


def test_other_threads_launch_while_one_rehearses(gpu: PretendedGPU) -> None:
    noted = rehearsal.Rehearsal()
    with rehearsal.under(noted):
        other = threading.Thread(target=launch_all)
        other.start()
        other.join()
    assert noted.finish() == 0
    assert len(gpu.launched) == LAUNCHES


def test_what_cannot_be_compiled_beforehand_is_compiled_at_its_launch(
    gpu: PretendedGPU, compiled: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room for a compiler")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "oslo_fusion"):
        for kernel in KERNELS:
            patch.setattr(kernel.jitted, "warmup", refuse)
        rehearse()
    assert "no room for a compiler" in caplog.text
    assert compiled == []
    launch_all()
    assert len(gpu.launched) == LAUNCHES
    assert len(compiled) == DIFFERENT


def test_threads_end_with_the_rehearsal(gpu: PretendedGPU) -> None:
    before = threading.active_count()
    rehearse()
    assert threading.active_count() == before


def test_interpreted_kernels_run_in_a_rehearsal(device: torch.device) -> None:
    """Nothing is compiled for them, and what they compute is what the code after them reads."""
    if device.type != "cpu":
        pytest.skip("runs interpreted")
    x = torch.ones(2, WIDTH)
    noted = rehearsal.Rehearsal()
    with rehearsal.under(noted):
        y, _, _ = rms_norm.launch_rms_norm(x, None, None, 0.0, 0.0, None)
    assert noted.finish() == 0
    torch.testing.assert_close(y, x)


def test_interpreted(rerun_interpreted: Any) -> None:
    rerun_interpreted()


def test_the_pointer_that_stands_for_a_tensor_keeps_none_of_its_memory() -> None:
    storage = torch.zeros(16)
    pointer = launch._Pointer(storage[1:])
    assert not any(isinstance(value, torch.Tensor) for value in vars(pointer).values())
    assert (pointer.dtype, pointer.data_ptr(), pointer.ptr_range()) == (torch.float32, storage[1:].data_ptr() % 16, 64)
