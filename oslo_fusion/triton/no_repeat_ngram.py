"""no_repeat_ngram in Triton.

How the work is cut. In place: one program per row and stretch of the text; it compares ``BLOCK`` windows at once with the row's
ending and strides over the rest, so that no block is as wide as the text and the cost is linear in it. Two programs may ban
the same token: both write -inf.

Functional: one program per row and stretch of the *vocabulary*; it copies its scores, waits for its own threads, then goes
through the whole text and bans what lies in its stretch, so that no program depends on another. A long text would be read once
per stretch, so beyond ``FUSED_COPY_TOKENS`` the copy is a launch of its own.

The length may lie on the device; the grid then covers the capacity, and programs beyond the length end at once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.no_repeat_ngram import NAME, _check
from oslo_fusion.rehearsal import THREAD
from oslo_fusion.triton.launch import note
from oslo_fusion.triton.rows import on_device

FUSED_COPY_TOKENS = 2048
"""Up to so many tokens the copy and the ban share a launch: 32,128 scores are 8 stretches, each reading the text again."""

STRETCH = 4096
"""Scores copied by one program of the functional form."""

_STRETCH_WARPS = 4
_PROGRAMS = 2048  # about 16 for each of an H200's 132 multiprocessors: more would only queue
_UNROLLED_SIZE = 8
"""Up to this n the comparisons are unrolled, so that all their loads are in flight at once; beyond, n is a loop's bound."""


@dataclass(frozen=True)
class Cut:
    """How the text is cut in place: windows compared at once, warps that do it, programs per row."""

    block: int
    warps: int
    chunks: int


def choose_cut(rows: int, windows: int) -> Cut:
    """The cut for ``rows`` rows of at most ``windows`` windows. Two block sizes only: each is a compilation."""
    block, warps = (128, 1) if windows <= 1024 else (512, 4)
    chunks = min(-(-windows // block), -(-_PROGRAMS // max(rows, 1)))
    return Cut(block, warps, max(chunks, 1))


@triton.jit
def _matching_tokens(
    text_ptr,
    text_col_stride,
    ending_ptr,
    ending_col_stride,
    windows,
    first,
    n,
    lowest,
    highest,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last tokens of ``BLOCK`` windows from ``first`` on, and which of them are banned and in ``lowest … highest - 1``."""
    w = first + tl.arange(0, BLOCK)
    in_text = w < windows
    token = tl.load(text_ptr + (w + n - 1) * text_col_stride, mask=in_text, other=-1).to(tl.int64)
    banned = in_text & (token >= lowest) & (token < highest)
    if SIZE > 0:
        for k in tl.static_range(SIZE - 1):
            theirs = tl.load(text_ptr + (w + k) * text_col_stride, mask=in_text, other=0).to(tl.int64)
            banned &= theirs == tl.load(ending_ptr + k * ending_col_stride).to(tl.int64)
    else:
        for k in range(n - 1):
            theirs = tl.load(text_ptr + (w + k) * text_col_stride, mask=banned, other=0).to(tl.int64)
            banned &= theirs == tl.load(ending_ptr + k * ending_col_stride).to(tl.int64)
    return token, banned


@triton.jit
def _row_geometry(
    row,
    ids_ptr,
    ids_row_stride,
    ids_col_stride,
    source_ptr,
    source_row_stride,
    source_col_stride,
    source_length,
    rows_per_source,
    sizes_ptr,
    sizes_stride,
    device_length_ptr,
    size,
    length,
    capacity,
    HAS_SOURCE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_DEVICE_LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Where this row's text and ending begin, its n, and how many windows there are (none if nothing can be banned)."""
    tokens = tl.cast(length, tl.int64)
    if HAS_DEVICE_LENGTH:
        tokens = tl.load(device_length_ptr).to(tl.int64)
        tokens = tl.minimum(tl.maximum(tokens, 0), tl.cast(capacity, tl.int64))
    if HAS_SIZES:
        n = tl.load(sizes_ptr + row * sizes_stride).to(tl.int64)
    elif SIZE > 0:
        n = tl.full([], SIZE, tl.int64)
    else:
        n = tl.cast(size, tl.int64)
    ids_ptr += row * ids_row_stride
    ending_ptr = ids_ptr + (tokens - n + 1) * ids_col_stride
    if HAS_SOURCE:
        text_ptr = source_ptr + (row // rows_per_source) * source_row_stride
        text_col_stride = tl.cast(source_col_stride, tl.int64)
        windows = tl.cast(source_length, tl.int64) - n + 1
    else:
        text_ptr = ids_ptr
        text_col_stride = tl.cast(ids_col_stride, tl.int64)
        windows = tokens - n + 1
    windows = tl.where((n >= 1) & (tokens >= n - 1), windows, 0)
    return text_ptr, text_col_stride, ending_ptr, windows, n


_VARYING = ("vocab", "source_length", "rows_per_source", "size", "length", "capacity")


@triton.jit(do_not_specialize=_VARYING)
def _no_repeat_ngram_ban_kernel(
    scores_ptr,
    scores_row_stride,
    scores_col_stride,
    vocab,
    ids_ptr,
    ids_row_stride,
    ids_col_stride,
    source_ptr,
    source_row_stride,
    source_col_stride,
    source_length,
    rows_per_source,
    sizes_ptr,
    sizes_stride,
    device_length_ptr,
    size,
    length,
    capacity,
    HAS_SOURCE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_DEVICE_LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    text_ptr, text_col_stride, ending_ptr, windows, n = _row_geometry(
        row,
        ids_ptr,
        ids_row_stride,
        ids_col_stride,
        source_ptr,
        source_row_stride,
        source_col_stride,
        source_length,
        rows_per_source,
        sizes_ptr,
        sizes_stride,
        device_length_ptr,
        size,
        length,
        capacity,
        HAS_SOURCE,
        HAS_SIZES,
        HAS_DEVICE_LENGTH,
        SIZE,
    )
    scores_ptr += row * scores_row_stride
    minus_infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(scores_ptr.dtype.element_ty)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    for first in range(start, windows, step):
        token, banned = _matching_tokens(
            text_ptr, text_col_stride, ending_ptr, ids_col_stride, windows, first, n, 0, vocab, SIZE, BLOCK
        )
        tl.store(scores_ptr + token * scores_col_stride, minus_infinity, mask=banned)


@triton.jit(do_not_specialize=_VARYING)
def _no_repeat_ngram_copy_kernel(
    out_ptr,
    out_row_stride,
    scores_ptr,
    scores_row_stride,
    scores_col_stride,
    vocab,
    ids_ptr,
    ids_row_stride,
    ids_col_stride,
    source_ptr,
    source_row_stride,
    source_col_stride,
    source_length,
    rows_per_source,
    sizes_ptr,
    sizes_stride,
    device_length_ptr,
    size,
    length,
    capacity,
    HAS_SOURCE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_DEVICE_LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    text_ptr, text_col_stride, ending_ptr, windows, n = _row_geometry(
        row,
        ids_ptr,
        ids_row_stride,
        ids_col_stride,
        source_ptr,
        source_row_stride,
        source_col_stride,
        source_length,
        rows_per_source,
        sizes_ptr,
        sizes_stride,
        device_length_ptr,
        size,
        length,
        capacity,
        HAS_SOURCE,
        HAS_SIZES,
        HAS_DEVICE_LENGTH,
        SIZE,
    )
    scores_ptr += row * scores_row_stride
    out_ptr += row * out_row_stride
    lowest = tl.program_id(1).to(tl.int64) * STRETCH
    highest = tl.minimum(lowest + STRETCH, tl.cast(vocab, tl.int64))
    cols = lowest + tl.arange(0, STRETCH)
    cols_mask = cols < highest
    scores = tl.load(scores_ptr + cols * scores_col_stride, mask=cols_mask, other=0)
    tl.store(out_ptr + cols, scores, mask=cols_mask)
    # A ban below may be written by another thread of this program than the copy of the same score.
    tl.debug_barrier()
    minus_infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(out_ptr.dtype.element_ty)
    for first in range(tl.full([], 0, tl.int64), windows, tl.full([], BLOCK, tl.int64)):
        token, banned = _matching_tokens(
            text_ptr, text_col_stride, ending_ptr, ids_col_stride, windows, first, n, lowest, highest, SIZE, BLOCK
        )
        tl.store(out_ptr + token, minus_infinity, mask=banned)


def _arguments(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What both kernels take after the scores, and an upper bound of the windows in a row."""
    rows, vocab = scores.shape
    capacity = ids.shape[1]
    searched = source.shape[1] if source is not None else (length if device_length is None else capacity)
    source_arguments: tuple[Any, ...] = (None, 0, 0, 0, 1)
    if source is not None:
        source_arguments = (source, source.stride(0), source.stride(1), source.shape[1], rows // source.shape[0])
    arguments = (
        vocab,
        ids,
        ids.stride(0),
        ids.stride(1),
        *source_arguments,
        sizes,
        0 if sizes is None else sizes.stride(0),
        device_length,
        size,
        length,
        capacity,
    )
    options = {
        "HAS_SOURCE": source is not None,
        "HAS_SIZES": sizes is not None,
        "HAS_DEVICE_LENGTH": device_length is not None,
        "SIZE": size if sizes is None and size <= _UNROLLED_SIZE else 0,
    }
    return arguments, options, searched - (size if sizes is None else 1) + 1


def _seen(argument: Any) -> Any:
    """What triton may look at in an argument: where it does not, as in numbers that vary, a kernel is noted twice."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument if argument is None else (argument == 1, argument % 16 == 0)


def _launch(kernel: Any, grid: tuple[int, int], scores: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with on_device(scores):
        if THREAD.rehearsal is not None and scores.is_cuda:
            key = (kernel, scores.device, *map(_seen, arguments), *options.items())
            note(THREAD.rehearsal, key, kernel, grid, arguments, options)
        else:
            kernel[grid](*arguments, **options)


def launch_no_repeat_ngram_(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> None:
    """One launch that bans in place; none where nothing can be banned."""
    _check(scores, ids, source, size, sizes, length, device_length, in_place=True)
    if scores.numel() == 0:
        return
    arguments, options, windows = _arguments(scores, ids, source, size, sizes, length, device_length)
    if windows < 1:
        return
    cut = choose_cut(scores.shape[0], windows)
    head = (scores, scores.stride(0), scores.stride(1))
    options |= {"BLOCK": cut.block, "num_warps": cut.warps}
    _launch(_no_repeat_ngram_ban_kernel, (scores.shape[0], cut.chunks), scores, (*head, *arguments), options)


def launch_no_repeat_ngram(
    scores: Tensor,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> Tensor:
    """Copy and ban in one launch for a short text, in two for a long one."""
    _check(scores, ids, source, size, sizes, length, device_length, in_place=False)
    if scores.numel() == 0:
        return torch.empty_like(scores, memory_format=torch.contiguous_format)
    arguments, options, windows = _arguments(scores, ids, source, size, sizes, length, device_length)
    if windows < 1 or windows > FUSED_COPY_TOKENS:
        result = scores.clone(memory_format=torch.contiguous_format)
        launch_no_repeat_ngram_(result, ids, source, size, sizes, length, device_length)
        return result
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    head = (result, result.stride(0), scores, scores.stride(0), scores.stride(1))
    options |= {"STRETCH": STRETCH, "BLOCK": 128 if windows <= 128 else 512, "num_warps": _STRETCH_WARPS}
    grid = scores.shape[0], triton.cdiv(scores.shape[1], STRETCH)
    _launch(_no_repeat_ngram_copy_kernel, grid, scores, (*head, *arguments), options)
    return result


_LIBRARY = torch.library.Library("oslo_fusion", "IMPL")
_LIBRARY.impl(f"{NAME}_", launch_no_repeat_ngram_, "CUDA")
_LIBRARY.impl(NAME, launch_no_repeat_ngram, "CUDA")
