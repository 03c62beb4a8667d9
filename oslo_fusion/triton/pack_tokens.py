"""pack_tokens in Triton: two launches for what a padded batch needs before it is packed.

The first has a program a row and makes four numbers of it, all that the host waits for. The second has a program for each
stretch of a row. It counts the tokens before its own, in the rows above from the first launch's numbers and in its own row from
the mask again, so that no program waits for another, and stores what belongs to each of its tokens where that stands in the
packed batch. Places behind the last token that have its tokens' own numbers are its too: each place is written once.

Everything is a few numbers a token: a batch of 64×512 is read and written in about 5 µs. What counts is the host's launches.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops import pack_tokens as meaning
from oslo_fusion.ops.pack_tokens import Form, Packed, Tokens, _check, _check_sequences
from oslo_fusion.triton.launch import Kernel
from oslo_fusion.triton.rows import on_device

BLOCK = 512
"""Columns that a program takes at once, and rows whose numbers it adds up at once. One size, as each is a compilation."""

_WARPS = 4
_COLUMNS, _ATTENDED, _TEXT, _GIVEN = 1, 2, 3, 4  # how tokens are numbered; 0 not at all
_RULES = {meaning.NOWHERE: 0, meaning.COLUMNS: _COLUMNS, meaning.ATTENDED: _ATTENDED, meaning.TEXT: _TEXT}
_BORDER = 16  # numbers: 128 bytes, so that each packed tensor begins as one that was allocated alone does


@triton.jit(do_not_specialize=("rows", "columns"))
def _count_tokens_kernel(
    numbers_ptr,
    mask_ptr,
    labels_ptr,
    rows,
    columns,
    HAS_LABELS: tl.constexpr,
    SHIFTED: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mask_ptr += row * columns
    tokens = tl.zeros([BLOCK], tl.int32)
    rises = tl.zeros([BLOCK], tl.int32)
    stray = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        inside = cols < columns
        later = inside & (cols > 0)
        text = inside & (tl.load(mask_ptr + cols, mask=inside, other=0) != 0)
        behind = later & (tl.load(mask_ptr + cols - 1, mask=later, other=0) == 0)  # padding
        tokens += text.to(tl.int32)
        rises += (text & behind).to(tl.int32)
        if HAS_LABELS:
            labels = tl.load(labels_ptr + row * columns + cols, mask=inside, other=IGNORED)
            padding = behind if SHIFTED else inside & (text == 0)
            stray += ((labels != IGNORED) & padding).to(tl.int32)
    numbers_ptr += row
    tl.store(numbers_ptr, tl.sum(tokens, 0).to(tl.int64))
    tl.store(numbers_ptr + rows, (tl.load(mask_ptr) != 0).to(tl.int64))
    tl.store(numbers_ptr + 2 * tl.cast(rows, tl.int64), tl.sum(rises, 0).to(tl.int64))
    tl.store(numbers_ptr + 3 * tl.cast(rows, tl.int64), tl.sum(stray, 0).to(tl.int64))


@triton.jit(do_not_specialize=("rows", "columns", "positions_row_stride", "packed_stride", "pad", "sequences", "lengths"))
def _pack_tokens_kernel(
    packed_ptr,
    offsets_ptr,
    numbers_ptr,
    mask_ptr,
    ids_ptr,
    types_ptr,
    labels_ptr,
    positions_ptr,
    rows,
    columns,
    positions_row_stride,
    packed_stride,
    pad,
    sequences,
    lengths,
    HAS_IDS: tl.constexpr,
    HAS_TYPES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    SHIFTED: tl.constexpr,
    RULE: tl.constexpr,
    IGNORED: tl.constexpr,
    FINEST: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    base = row * columns
    size = tl.cast(rows, tl.int64) * columns
    stride = tl.cast(packed_stride, tl.int64)
    lanes = tl.arange(0, BLOCK)

    above = tl.zeros([BLOCK], tl.int64)  # tokens of the rows above, and of all
    every = tl.zeros([BLOCK], tl.int64)
    for first in range(0, rows, BLOCK):
        each = first + lanes
        tokens = tl.load(numbers_ptr + each, mask=each < rows, other=0)
        above += tl.where(each < row, tokens, 0)
        every += tokens
    start, total = tl.sum(above, 0), tl.sum(every, 0)

    # Of this row, in the stretches before this one. All of their columns lie inside of it.
    attended = tl.zeros([BLOCK], tl.int32)
    written = tl.zeros([BLOCK], tl.int32)
    for earlier in range(0, stretch):
        own = base + earlier * BLOCK + lanes
        attended += (tl.load(mask_ptr + own) != 0).to(tl.int32)
        if RULE == 3:
            written += (tl.load(ids_ptr + own) != pad).to(tl.int32)

    cols = stretch * BLOCK + lanes
    inside = cols < columns
    own = base + cols
    token = inside & (tl.load(mask_ptr + own, mask=inside, other=0) != 0)
    place = tl.sum(attended, 0) + tl.cumsum(token.to(tl.int32), 0) - 1  # in the row
    to = start + place
    rest = inside & (own >= total)
    last = size - 1

    tl.store(packed_ptr + to, own, mask=token)
    tl.store(packed_ptr + own, tl.zeros_like(own) + last, mask=rest)
    if HAS_IDS:
        ids = tl.load(ids_ptr + own, mask=inside, other=0)
        tl.store(packed_ptr + stride + to, ids, mask=token)
        tl.store(packed_ptr + stride + own, tl.zeros_like(own) + tl.load(ids_ptr + last), mask=rest)
    if HAS_TYPES:
        types = tl.load(types_ptr + own, mask=inside, other=0)
        tl.store(packed_ptr + 2 * stride + to, types, mask=token)
        tl.store(packed_ptr + 2 * stride + own, tl.zeros_like(own) + tl.load(types_ptr + last), mask=rest)
    if HAS_LABELS:
        labels_to = packed_ptr + 3 * stride
        nothing = tl.full([BLOCK], IGNORED, tl.int64)
        if SHIFTED:  # of the tokens are then the places 1 to their number
            labels = tl.load(labels_ptr + own + 1, mask=cols + 1 < columns, other=IGNORED)
            tl.store(labels_to + to + 1, labels, mask=token & (to < last))
            tl.store(labels_to + own, nothing, mask=inside & ((own > total) | (own == 0)))
        else:
            labels = tl.load(labels_ptr + own, mask=inside, other=IGNORED)
            tl.store(labels_to + to, labels, mask=token)
            tl.store(labels_to + own, nothing, mask=rest)
    if RULE != 0:
        of_rest = tl.zeros_like(own)
        if RULE == 1:
            positions = cols.to(tl.int64) + pad
            of_rest += columns - 1 + pad
        elif RULE == 2:
            positions = place.to(tl.int64)
        elif RULE == 3:
            texts = inside & (tl.load(ids_ptr + own, mask=inside, other=0) != pad)
            number = tl.sum(written, 0) + tl.cumsum(texts.to(tl.int32), 0)
            positions = tl.where(texts, number, 0).to(tl.int64) + pad
            of_rest += pad
        else:
            positions_ptr += row * positions_row_stride
            positions = tl.load(positions_ptr + cols, mask=inside, other=0)
            last_row = (rows - 1 - row) * positions_row_stride
            of_rest += tl.load(positions_ptr + last_row + columns - 1)
        tl.store(packed_ptr + 4 * stride + to, positions, mask=token)
        tl.store(packed_ptr + 4 * stride + own, of_rest, mask=rest)

    if stretch == 0:
        if row == 0:
            tl.store(offsets_ptr, tl.full([], 0, tl.int32))
        end = start + tl.load(numbers_ptr + row)
        tl.store(offsets_ptr + row + 1, end.to(tl.int32))
        if row == rows - 1:  # the rest's pieces, up to the packed length
            power = tl.full([], 1, tl.int64)
            while power * 2 <= total:
                power *= 2
            step = tl.maximum(power // lengths, FINEST)
            length = (total // step + 1) * step
            for first in range(0, sequences - rows, BLOCK):
                pieces = first + lanes
                ends = tl.minimum(total + (pieces + 1).to(tl.int64) * PIECE, length)
                tl.store(offsets_ptr + rows + 1 + pieces, ends.to(tl.int32), mask=pieces < sequences - rows)


_COUNT = Kernel(_count_tokens_kernel)
_PACK = Kernel(_pack_tokens_kernel)


def launch_count_tokens(mask: Tensor, labels: Tensor | None, shifted: bool) -> Tensor:
    """One launch for :func:`oslo_fusion.ops.pack_tokens.count_tokens`; labels are int64."""
    _check(mask, Tokens(labels=labels), Form(shifted=shifted))
    mask, labels = mask.contiguous(), None if labels is None else labels.contiguous()
    rows, columns = mask.shape
    numbers = torch.empty((4, rows), dtype=torch.int64, device=mask.device)
    constants = (labels is not None, shifted, meaning.IGNORED, BLOCK)
    with on_device(mask):
        _COUNT((rows,), (numbers, mask, labels), (rows, columns), constants, _WARPS)
    return numbers


def launch_pack_tokens(numbers: Tensor, mask: Tensor, tokens: Tokens, form: Form, sequences: int) -> Packed:
    """One launch for :func:`oslo_fusion.ops.pack_tokens.pack_tokens`; tokens are int64."""
    _check(mask, tokens, form)
    _check_sequences(mask, numbers, sequences)
    mask, numbers = mask.contiguous(), numbers.contiguous()
    ids, types, labels, positions = (None if x is None else x.contiguous() for x in tokens)
    rows, columns = mask.shape
    size, rule, pad = rows * columns, _RULES[form.rule], form.pad
    if positions is not None:
        rule = _GIVEN
    elif rule == _COLUMNS or (rule == _TEXT and ids is None):
        rule, pad = _COLUMNS, pad + 1 if rule == _TEXT else 0
    # One allocation, and views of it: a tensor each would be four more of both.
    stride = -(-size // _BORDER) * _BORDER
    packed = torch.empty((5, stride), dtype=torch.int64, device=mask.device)
    offsets = torch.empty(sequences + 1, dtype=torch.int32, device=mask.device)
    row_stride = 0 if positions is None or positions.numel() == columns else columns
    has = (ids is not None, types is not None, labels is not None)
    constants = (*has, form.shifted, rule, meaning.IGNORED, meaning.FINEST, meaning.LONGEST_PIECE, BLOCK)
    pointers = (packed, offsets, numbers, mask, ids, types, labels, positions)
    sizes = (rows, columns, row_stride, stride, pad, sequences, form.lengths)
    with on_device(mask):
        _PACK((rows, -(-columns // BLOCK)), pointers, sizes, constants, _WARPS)
    source, *views = packed[:, :size].unbind(0)
    found = (view if there else None for view, there in zip(views, (*has, rule != 0), strict=True))
    return Packed(source, offsets, Tokens(*found))
