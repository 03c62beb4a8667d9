"""A kernel that is launched again is the one that its arguments need."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import oslo_fusion.triton  # noqa: E402
from oslo_fusion.ops.no_repeat_ngram import no_repeat_ngram_reference, no_repeat_ngram_reference_  # noqa: E402
from oslo_fusion.ops.rms_norm import rms_norm, rms_norm_reference  # noqa: E402
from oslo_fusion.triton import (  # noqa: E402
    feed_forward,
    glu,
    launch,
    layer_norm,
    no_repeat_ngram,
    ragged_rows,
    rope,
    rows,
)
from oslo_fusion.triton import rms_norm as kernels  # noqa: E402
from oslo_fusion.triton.launch import Kernel  # noqa: E402

NOT_EARLY = {
    "_attention_range_kernel": "not tried: once a call with a mask of keys, before a kernel that is not launched early itself",
    "_count_tokens_kernel": "once a batch, before all layers",
    "_pack_tokens_kernel": "once a batch, before all layers",
    "_loss_kernel": "0.1 ms and more, between two matmuls of milliseconds",
    "_scale_kernel": "once a step",
}
"""Kernels that begin when the one before has ended, and why a microsecond less is not worth it, or not yet."""


def every_kernel() -> Iterator[Kernel]:
    for module in pkgutil.iter_modules(oslo_fusion.triton.__path__):
        found = vars(importlib.import_module(f"oslo_fusion.triton.{module.name}"))
        yield from (value for value in found.values() if isinstance(value, Kernel))


def test_a_number_that_triton_would_specialize_is_refused() -> None:
    def kernel(x_ptr, count):  # type: ignore[no-untyped-def]
        pass

    if not isinstance(rows._column_sums_kernel, triton.runtime.JITFunction):
        pytest.skip("triton was imported for its interpreter")
    with pytest.raises(AssertionError, match=r"\['count'\]"):
        Kernel(triton.jit(kernel))


def test_every_kernel_takes_pointers_then_numbers_then_constants() -> None:
    for kernel in every_kernel():
        names = kernel.jitted.arg_names
        kinds = ["pointer" if n.endswith("_ptr") else "constant" if n.isupper() else "number" for n in names]
        assert kinds == sorted(kinds, key=["pointer", "number", "constant"].index), kernel.jitted.__name__


def test_every_kernel_begins_early_or_is_listed() -> None:
    late = {kernel.jitted.__name__ for kernel in every_kernel() if "CHAIN" not in kernel.jitted.arg_names}
    assert late == set(NOT_EARLY)


@pytest.mark.parametrize(
    ("dim", "dtype", "expected"), [(96, torch.float32, 1), (768, torch.bfloat16, 2), (257, torch.bfloat16, 1)]
)
def test_a_walk_of_which_more_fits_than_is_wanted_waits_its_turn(
    dim: int, dtype: torch.dtype, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[object, ...]] = []

    def record(grid: object, pointers: object, numbers: object, constants: tuple[object, ...], warps: int) -> None:
        launched.append(constants)

    for module, name in ((kernels, "_BACKWARD"), (ragged_rows, "_BACKWARD"), (rows, "_COLUMN_SUMS")):
        monkeypatch.setattr(module, name, record)
    x, stats = torch.zeros(4, dim, dtype=dtype), torch.zeros(4)
    for capability, chains in ((9, [expected, 2]), (8, [0, 0])):
        monkeypatch.setattr(launch, "compute_capability", lambda _, capability=capability: capability)
        kernels.launch_rms_norm_backward(x, None, x, x[0], stats, 0.0, True)
        assert [constants[-1] for constants in launched] == chains
        launched.clear()


def test_a_walk_after_a_matmul_waits_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[object, ...]] = []
    for module, name in ((feed_forward, "_BACKWARD"), (rows, "_COLUMN_SUMS")):
        monkeypatch.setattr(module, name, lambda *arguments: launched.append(arguments[3]))
    monkeypatch.setattr(launch, "compute_capability", lambda _: 9)
    feed_forward.launch_gelu_backward_in_place(torch.zeros(4, 96), torch.zeros(4, 96), "gelu")
    assert [constants[-1] for constants in launched] == [1, 2]


@pytest.mark.gpu
def test_alignment_strides_and_counts_do_not_share_a_kernel_wrongly() -> None:
    dim, eps = 1024, 1e-6
    weight = torch.randn(dim, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        storage = torch.randn(4 * 4 * dim, device="cuda", dtype=dtype)
        for offset in (0, 8, 1, 3, 0):
            for rows_, stride in ((2, dim), (1, dim), (3, dim + 16), (3, dim + 8), (3, dim + 1), (2, dim)):
                x = storage.as_strided((rows_, dim), (stride, 1), offset)
                expected = rms_norm_reference(x, weight, None, eps, 0.0, None)[0]
                torch.testing.assert_close(rms_norm(x, weight, eps=eps), expected)
                torch.testing.assert_close(rms_norm(x, weight, eps=0), rms_norm(x, weight, eps=0.0))


@pytest.mark.gpu
def test_kernels_that_begin_early_wait_for_what_they_read() -> None:
    """After a kernel of ours, one of torch's, and a memset; launched, and captured in a graph and replayed."""
    x, y = torch.randn(4096, 8192, device="cuda"), torch.empty(4096, 8192, device="cuda")
    weight = torch.randn(8192, device="cuda")

    def run() -> list[torch.Tensor]:
        y.zero_()
        results = [rms_norm(y, weight, eps=1.0)]  # after a memset
        y.copy_(x)
        results.append(rms_norm(y, weight, eps=1e-6))  # after a copy
        for _ in range(3):
            results.append(rms_norm(results[-1], weight, eps=1e-6))  # after one of ours
        y.mul_(2.0)
        return [*results, layer_norm.launch_layer_norm(y, weight, None, None, 1e-5, 0.0, None)[0]]

    expected = [torch.zeros_like(x), rms_norm_reference(x, weight, None, 1e-6, 0.0, None)[0]]
    for _ in range(3):
        expected.append(rms_norm_reference(expected[-1], weight, None, 1e-6, 0.0, None)[0])
    expected.append(torch.nn.functional.layer_norm(2.0 * x, (8192,), weight))
    for _ in range(3):
        torch.testing.assert_close(run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for result in captured:
            result.fill_(7.0)
        graph.replay()
        torch.testing.assert_close(captured, expected)


@pytest.mark.gpu
def test_rotations_and_gated_products_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel reads what the one before it wrote, or writes over it; as if each began after the end of that one."""
    x, y = torch.randn(8, 32, 512, 128, device="cuda"), torch.empty(8, 32, 512, 128, device="cuda")
    angle = torch.randn(1, 512, 128, device="cuda")
    cos, sin = angle.cos(), angle.sin()

    def run() -> list[torch.Tensor]:
        y.copy_(x)
        q, k = rope.launch_rope(y, y[:, ::4], cos, sin, False, False, False, False, None)  # after a copy
        turned, _ = rope.launch_rope(q, k, cos, sin, True, False, True, True, None)  # after one of ours
        h = glu.launch_glu(q, turned, "silu")
        dgate, dup = glu.launch_glu_backward(h, q, turned, "gelu")
        y.mul_(2.0)
        dh, gate, up = (t.view(-1, 128) for t in (y, dgate.clone(), dup.clone()))
        glu.launch_glu_backward_in_place(dh, gate, up, "silu")
        glu.launch_glu_backward_in_place(dh, gate, up, "gelu_tanh")
        return [q, k, turned, h, dgate, dup, gate, up, glu.launch_glu(dh, up, "silu")]

    with monkeypatch.context() as patch:
        for module in (rope, glu):
            patch.setattr(module, "chain", lambda _: 0)
        expected = run()
    for _ in range(3):
        torch.testing.assert_close(run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for result in captured:
            result.fill_(7.0)
        graph.replay()
        torch.testing.assert_close(captured, expected)


@pytest.mark.gpu
def test_bans_wait_for_scores_text_and_length() -> None:
    """Each of them is written by the kernel before, and what one launch has read is written over by the next."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = torch.randn(8, 32128, device="cuda", generator=generator), torch.ones(32128, device="cuda")
    long = torch.randint(0, 60, (8, 100_000), device="cuda", generator=generator)
    short, other = long[:, :300].contiguous(), long[:, 300:600].contiguous()
    text, length = torch.zeros_like(short), torch.zeros((), dtype=torch.long, device="cuda")

    def run(ban_: Callable[..., None], ban: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        scores = rms_norm(x, weight, eps=1e-6)
        ban_(scores, long, None, 3, None, 100_000, None)  # over what one of ours has written
        first = ban(scores, short, None, 2, None, 300, None)  # reads what that has banned
        ban_(scores, other, None, 1, None, 300, None)  # not seen by the one before
        second = ban(scores, other, short[:4], 2, None, 300, None)
        text.copy_(short)
        third = ban(second, text, None, 2, None, 300, None)
        length.fill_(200)
        ban_(third, text, None, 1, None, 0, length)
        text.zero_()
        length.zero_()
        return [scores, first, second, third, ban(third, text, None, 1, None, 0, length)]

    expected = run(no_repeat_ngram_reference_, no_repeat_ngram_reference)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(expected[:-1])), "every step bans something"
    ours: Any = no_repeat_ngram.launch_no_repeat_ngram_, no_repeat_ngram.launch_no_repeat_ngram
    for _ in range(3):
        assert all(map(torch.equal, run(*ours), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*ours)
    for _ in range(3):
        for result in captured:
            result.fill_(7.0)
        graph.replay()
        assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_device_has_its_own() -> None:
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        x = torch.randn(5, 768, device=device)
        torch.testing.assert_close(rms_norm(x, eps=1e-6), rms_norm_reference(x, None, None, 1e-6, 0.0, None)[0])
