"""no_repeat_ngram in Triton.

How the work is cut. In place: one program per row and stretch of the text; it compares ``BLOCK`` windows at once with the row's
ending and strides over the rest, so that no block is as wide as the text and the cost is linear in it. Two programs may ban
the same token: both write -inf.

Functional: one program per row and stretch of the *vocabulary*; it copies its scores, waits for its own threads, and bans
what lies in its stretch of the whole text, of which it has read the beginning with the scores, so that no program depends on
another. A long text would be read once per stretch, so beyond ``FUSED_COPY_TOKENS`` the copy is a launch of its own.

The length may lie on the device; the grid then covers the capacity, and programs beyond the length end at once. The kernel
before may have written it, as it may have written scores and ids, so a program waits before it reads anything (``chain`` in
``launch.py``).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.no_repeat_ngram import NAME, _check
from oslo_fusion.triton.launch import Kernel, chain, chained
from oslo_fusion.triton.rows import on_device, stride_unit

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


@functools.lru_cache(maxsize=4096)
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
    """The last tokens of ``BLOCK`` windows from ``first`` on, and which of them are banned and in ``lowest … highest - 1``.

    Where there are none from ``first`` on, nothing is read: the ending may then lie outside of the ids.
    """
    some = first < windows
    w = first + tl.arange(0, BLOCK)
    in_text = w < windows
    token = tl.load(text_ptr + (w + n - 1) * text_col_stride, mask=in_text, other=-1).to(tl.int64)
    banned = in_text & (token >= lowest) & (token < highest)
    if SIZE > 0:
        for k in tl.static_range(SIZE - 1):
            theirs = tl.load(text_ptr + (w + k) * text_col_stride, mask=in_text, other=0).to(tl.int64)
            banned &= theirs == tl.load(ending_ptr + k * ending_col_stride, mask=some, other=0).to(tl.int64)
    else:
        for k in range(tl.where(some, n - 1, 0)):
            theirs = tl.load(text_ptr + (w + k) * text_col_stride, mask=banned, other=0).to(tl.int64)
            banned &= theirs == tl.load(ending_ptr + k * ending_col_stride).to(tl.int64)
    return token, banned


@triton.jit
def _row_geometry(
    row,
    ids_ptr,
    source_ptr,
    sizes_ptr,
    device_length_ptr,
    ids_row_stride,
    ids_col_stride,
    source_row_stride,
    source_col_stride,
    source_length,
    rows_per_source,
    sizes_stride,
    size,
    length,
    HAS_SOURCE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_DEVICE_LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Where this row's text and ending begin, its n, and how many windows there are (none if nothing can be banned)."""
    tokens = tl.cast(length, tl.int64)
    if HAS_DEVICE_LENGTH:
        tokens = tl.minimum(tl.maximum(tl.load(device_length_ptr).to(tl.int64), 0), tokens)
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


_NUMBERS = (
    "scores_row_stride",
    "scores_row_units",
    "scores_col_stride",
    "vocab",
    "vocab_units",
    "ids_row_stride",
    "ids_col_stride",
    "source_row_stride",
    "source_col_stride",
    "source_length",
    "rows_per_source",
    "sizes_stride",
    "size",
    "length",
)


@triton.jit(do_not_specialize=_NUMBERS)
def _no_repeat_ngram_ban_kernel(
    scores_ptr,
    ids_ptr,
    source_ptr,
    sizes_ptr,
    device_length_ptr,
    scores_row_stride,
    scores_col_stride,
    vocab,
    ids_row_stride,
    ids_col_stride,
    source_row_stride,
    source_col_stride,
    source_length,
    rows_per_source,
    sizes_stride,
    size,
    length,
    HAS_SOURCE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_DEVICE_LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    TIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    chained(CHAIN)
    if TIGHT:
        scores_col_stride = 1
        ids_col_stride = 1
        source_col_stride = 1
    row = tl.program_id(0).to(tl.int64)
    text_ptr, text_col_stride, ending_ptr, windows, n = _row_geometry(
        row,
        ids_ptr,
        source_ptr,
        sizes_ptr,
        device_length_ptr,
        ids_row_stride,
        ids_col_stride,
        source_row_stride,
        source_col_stride,
        source_length,
        rows_per_source,
        sizes_stride,
        size,
        length,
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


@triton.jit(do_not_specialize=_NUMBERS)
def _no_repeat_ngram_copy_kernel(
    out_ptr,
    scores_ptr,
    ids_ptr,
    source_ptr,
    sizes_ptr,
    device_length_ptr,
    scores_row_units,
    scores_col_stride,
    vocab_units,
    ids_row_stride,
    ids_col_stride,
    source_row_stride,
    source_col_stride,
    source_length,
    rows_per_source,
    sizes_stride,
    size,
    length,
    HAS_SOURCE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_DEVICE_LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    TIGHT: tl.constexpr,
    UNIT: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    chained(CHAIN)
    if TIGHT:
        scores_col_stride = 1
        ids_col_stride = 1
        source_col_stride = 1
    row = tl.program_id(0).to(tl.int64)
    text_ptr, text_col_stride, ending_ptr, windows, n = _row_geometry(
        row,
        ids_ptr,
        source_ptr,
        sizes_ptr,
        device_length_ptr,
        ids_row_stride,
        ids_col_stride,
        source_row_stride,
        source_col_stride,
        source_length,
        rows_per_source,
        sizes_stride,
        size,
        length,
        HAS_SOURCE,
        HAS_SIZES,
        HAS_DEVICE_LENGTH,
        SIZE,
    )
    # The vocabulary too must be seen to be a multiple of UNIT: the mask of neighbours is one only then, and scores are copied
    # 16 bytes at a time. Copied one by one, 256×32128 in bfloat16 took 34 µs on an H200, of which 7 are the bytes.
    vocab = tl.cast(vocab_units, tl.int64) * UNIT
    scores_ptr += row * scores_row_units * UNIT
    out_ptr += row * vocab
    lowest = tl.program_id(1).to(tl.int64) * STRETCH
    cols = lowest + tl.arange(0, STRETCH)
    cols_mask = cols < vocab
    scores = tl.load(scores_ptr + cols * scores_col_stride, mask=cols_mask, other=0)
    # The first windows are read while the scores are on their way: else two waits of a microsecond would follow each other.
    highest = tl.minimum(lowest + STRETCH, vocab)
    begin, step = tl.full([], 0, tl.int64), tl.full([], BLOCK, tl.int64)
    token, banned = _matching_tokens(
        text_ptr, text_col_stride, ending_ptr, ids_col_stride, windows, begin, n, lowest, highest, SIZE, BLOCK
    )
    tl.store(out_ptr + cols, scores, mask=cols_mask)
    # A ban below may be written by another thread of this program than the copy of the same score.
    tl.debug_barrier()
    minus_infinity = tl.full([BLOCK], float("-inf"), tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token, minus_infinity, mask=banned)
    for first in range(step, windows, step):
        token, banned = _matching_tokens(
            text_ptr, text_col_stride, ending_ptr, ids_col_stride, windows, first, n, lowest, highest, SIZE, BLOCK
        )
        tl.store(out_ptr + token, minus_infinity, mask=banned)


_BAN = Kernel(_no_repeat_ngram_ban_kernel)
_COPY = Kernel(_no_repeat_ngram_copy_kernel)


def _texts(
    rows: int,
    scores_col_stride: int,
    ids: Tensor,
    source: Tensor | None,
    size: int,
    sizes: Tensor | None,
    length: int,
    device_length: Tensor | None,
) -> tuple[tuple[int, ...], tuple[bool | int, ...], int]:
    """Numbers and constants that both kernels take after those of the scores, and an upper bound of the windows in a row."""
    ids_row_stride, ids_col_stride = ids.stride()
    tight = scores_col_stride == 1 and ids_col_stride == 1
    if device_length is not None:
        length = ids.shape[1]  # what the device's is clamped to
    if source is None:
        searched = length
        numbers: tuple[int, ...] = (ids_row_stride, ids_col_stride, 0, 0, 0, 1)
    else:
        sources, searched = source.shape
        source_row_stride, source_col_stride = source.stride()
        tight = tight and source_col_stride == 1
        numbers = (ids_row_stride, ids_col_stride, source_row_stride, source_col_stride, searched, rows // sources)
    if sizes is None:
        sizes_stride, unrolled, least = 0, size if size <= _UNROLLED_SIZE else 0, size
    else:
        sizes_stride, unrolled, least = sizes.stride(0), 0, 1
    constants = (source is not None, sizes is not None, device_length is not None, unrolled, tight)
    return (*numbers, sizes_stride, size, length), constants, searched - least + 1


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
    rows, vocab = scores.shape
    if rows == 0 or vocab == 0:
        return
    row_stride, col_stride = scores.stride()
    numbers, constants, windows = _texts(rows, col_stride, ids, source, size, sizes, length, device_length)
    if windows < 1:
        return
    cut = choose_cut(rows, windows)
    with on_device(scores):
        _BAN(
            (rows, cut.chunks),
            (scores, ids, source, sizes, device_length),
            (row_stride, col_stride, vocab, *numbers),
            (*constants, cut.block, chain(scores)),
            cut.warps,
        )


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
    rows, vocab = scores.shape
    if rows == 0 or vocab == 0:
        return torch.empty_like(scores, memory_format=torch.contiguous_format)
    row_stride, col_stride = scores.stride()
    numbers, constants, windows = _texts(rows, col_stride, ids, source, size, sizes, length, device_length)
    if windows < 1 or windows > FUSED_COPY_TOKENS:
        result = scores.clone(memory_format=torch.contiguous_format)
        launch_no_repeat_ngram_(result, ids, source, size, sizes, length, device_length)
        return result
    result = torch.empty_like(scores, memory_format=torch.contiguous_format)
    unit = stride_unit(row_stride, vocab)
    with on_device(scores):
        _COPY(
            (rows, -(-vocab // STRETCH)),
            (result, scores, ids, source, sizes, device_length),
            (row_stride // unit, col_stride, vocab // unit, *numbers),
            (*constants, unit, STRETCH, 128 if windows <= 128 else 512, chain(scores)),
            _STRETCH_WARPS,
        )
    return result


_LIBRARY = torch.library.Library("oslo_fusion", "IMPL")
_LIBRARY.impl(f"{NAME}_", launch_no_repeat_ngram_, "CUDA")
_LIBRARY.impl(NAME, launch_no_repeat_ngram, "CUDA")
