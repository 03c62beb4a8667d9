"""Attention in Triton: FlashAttention-2's schedule, with T5's bias, padding and dropout inside.

Forward: a program takes a block of queries of one head and walks over the blocks of keys that it sees, with a running maximum
and sum. Backward, without atomics and therefore the same at every run: one kernel takes a block of queries, sums
``out · dout`` of each and walks over keys (``dq``), then one takes a block of keys and walks over queries (``dk``, ``dv``).

**T5's bias** depends on the distance ``key - query`` only, so a tile of it is a Toeplitz matrix: it is read from a list of one
number per distance (a kernel of its own makes it from the table, a few KB per head, which stay in L1), two neighbours at once.
From the distance on from which all share a bucket, a whole tile is one number, and no element is looked up. The list reaches
further on both sides than a tile does, so no index is clamped. In half precision it is divided by the scale, and the matmul of
queries and keys begins at it instead of zero; the scale is then multiplied where the maximum, or the backward's sum, is
subtracted.

**The table's gradient** is the sum of the scores' gradient over the diagonals. A kernel of its own walks *along* a diagonal of
tiles, over all blocks of queries and all sequences of the batch, and adds the tiles up where they lie, in registers: so
diagonals are summed once per program, not per tile. It computes two matmuls again, for tiles near the diagonal only. What is
far is summed by the kernel of ``dq`` on its way, into two numbers. A last kernel adds everything up by bucket.

**Masks** are computed in tiles that a border crosses, found out by a comparison of numbers per tile. Of a mask of keys the
first and the last true are looked for once, and what is outside of them is never read. Of a mask of queries and keys a byte is
read for every score, where the score lies.

**Dropout**: see ``ops/attention.py``. One draw serves four elements that are in one thread. The forward draws, and writes a bit
for each element: to draw again would cost each kernel of the backward 9 to 10 instructions an element, to read and test a bit
costs 2 to 3. In half precision the backward multiplies by the share that is kept after its sums, and tests a bit once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.attention import (
    UNLIMITED,
    Extras,
    Gradients,
    Options,
    _check,
    attention_backward_reference,
    attention_reference,
    check_kept,
    new_kept,
    new_like_tokens,
    new_logsumexp,
    new_rest,
    register_kernels,
    relative_position_bucket,
    split,
)
from oslo_fusion.ops.dropout import kept_scale, kept_threshold
from oslo_fusion.triton.dropout import philox, random_key
from oslo_fusion.triton.launch import Kernel, chain, chained, compute_capability
from oslo_fusion.triton.rows import device_facts, on_device, stride_unit

_REACH = 512  # how far the list of distances goes beyond max_distance: queries and keys of a tile together at most
_LOG2E = math.log2(math.e)
_INFINITE = 1 << 30


@dataclass(frozen=True)
class AttentionBlocks:
    """How a kernel is cut.

    Attributes:
        queries, keys: of a tile.
        warps: per program.
        stages: how many tiles of the walk are under way at once.
        registers: at most, per thread; None as many as the compiler takes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class BackwardBlocks:
    """How the backward's kernels are cut.

    Attributes:
        keys: the kernel that takes a block of keys (``dk``, ``dv``).
        queries: the kernel that takes a block of queries (``dq``).
        table: the kernel of the table's gradient. Its tiles have a multiple of the queries that those of ``queries`` have.
    """

    keys: AttentionBlocks
    queries: AttentionBlocks
    table: AttentionBlocks


def padded_dim(dim: int) -> int:
    """The head size that tiles have: a power of two, at least what a tensor core multiplies."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.lru_cache(maxsize=256)
def forward_blocks(
    dim: int, itemsize: int, shared: int, table: bool = False, major: int = 0, dropout: bool = False, tokens: int = 1 << 20
) -> AttentionBlocks:
    """How the forward is cut.

    Args:
        dim: head size.
        itemsize: bytes of a number.
        shared: bytes of shared memory that a program may use.
        table: whether T5's bias is looked up.
        major: compute capability of NVIDIA's device.
        dropout: whether there is any.
        tokens: of the longest sequence, of queries or of keys; by default too many for the tiles of short texts.
    """
    width = padded_dim(dim)
    if itemsize == 4:  # multiplied without tensor cores: small tiles, or registers spill
        return AttentionBlocks(32, 32, 4, 1 if width > 64 else 2) if width <= 128 else AttentionBlocks(16, 32, 4, 1)
    if shared < 100_000:
        return AttentionBlocks(64, 32, 4, 1)
    # One H200, head size 64. Of at most 128 registers a thread four programs run at once; the limit holds the compiler to that.
    # T5 0.096 ms with three tiles under way, 0.097 with two, 128×64 with 8 warps 0.103. BERT with dropout 0.242, with 128×64
    # 0.252.
    if table and width <= 64 and major == 9:
        return AttentionBlocks(64, 64, 4, 3, 128)
    if dropout and width <= 64 and major == 9:
        return AttentionBlocks(64, 64, 4, 3)
    if table and width <= 128:
        return AttentionBlocks(64, 64, 4, 3 if width <= 64 else 2)
    if width <= 64 and major == 9 and tokens <= 256:
        # 12 heads, 128×64 in brackets: 256 texts of 16 tokens 10 µs (42), of 32 tokens 18 µs (44), 128 of 64 tokens 18 (28), 64
        # of 256 tokens 48 (52).
        if tokens <= 16:
            return AttentionBlocks(16, 16, 1, 1)
        return AttentionBlocks(32, 32, 2, 2) if tokens <= 32 else AttentionBlocks(64, 64, 4, 3)
    if width <= 64:
        return AttentionBlocks(128, 64, 8, 3)
    if width <= 128:
        return AttentionBlocks(128, 64, 8, 2 if shared < 200_000 else 3)
    return AttentionBlocks(64, 32, 4, 2) if shared < 200_000 else AttentionBlocks(128, 64, 8, 2)


@functools.lru_cache(maxsize=256)
def backward_blocks(
    dim: int, itemsize: int, shared: int, bare: bool = False, major: int = 0, dropout: bool = False, pairs: bool = False
) -> BackwardBlocks:
    """How the backward is cut.

    Args:
        dim, itemsize, shared, major: as of :func:`forward_blocks`.
        bare: whether there is T5's bias and nothing else: no dropout, mask, border or packed sequence.
        dropout: whether there is any.
        pairs: whether there is a mask of pairs.
    """
    width = padded_dim(dim)
    if itemsize == 4:
        small = AttentionBlocks(32, 32, 4, 1) if width <= 64 else AttentionBlocks(16, 16, 4, 1)
        return BackwardBlocks(small, small, small)
    if shared < 100_000:
        small = AttentionBlocks(32, 32, 4, 1)
        return BackwardBlocks(small, small, small)
    if width <= 64:
        # One H200, the whole backward. With dropout dk and dv want three tiles under way: BERT 0.507 ms, two 0.582. Without,
        # two or three are alike (T5 0.336 and 0.337), but dq and the table want two (three 0.350 and 0.351): the list of
        # distances lives in what is left of L1. 168 registers are three programs of dk, dv instead of two (T5 0.336, without
        # the limit 0.354), 128 of dq four instead of three (T5 0.336 and 0.352, with dropout 0.441 and 0.483, BERT 0.577 and
        # 0.583). Up to 130 bytes of dk, dv and 64 of dq spill for it.
        if major == 9 and shared >= 200_000 and bare:
            limited = AttentionBlocks(64, 64, 4, 2, 168)
            return BackwardBlocks(limited, AttentionBlocks(64, 64, 4, 2, 128), limited)
        if major == 9 and shared >= 200_000 and dropout:
            queries = AttentionBlocks(64, 64, 4, 3) if pairs else AttentionBlocks(64, 64, 4, 2, 128)
            return BackwardBlocks(AttentionBlocks(64, 64, 4, 3), queries, AttentionBlocks(64, 64, 4, 3))
        # On sm_80 64×64 would spill 340 to 370 bytes, and 32×64 spills 24; not measured.
        keys = AttentionBlocks(32 if shared < 200_000 else 64, 64, 4, 2)
        return BackwardBlocks(keys, AttentionBlocks(64, 64, 4, 3), AttentionBlocks(64, 64, 4, 3))
    if width <= 128:
        if shared < 200_000:
            return BackwardBlocks(AttentionBlocks(32, 64, 4, 1), AttentionBlocks(64, 32, 4, 1), AttentionBlocks(64, 32, 4, 1))
        few = AttentionBlocks(64, 64, 4, 2)
        return BackwardBlocks(AttentionBlocks(32, 128, 8, 2), few, few)
    few = AttentionBlocks(32, 64, 8, 1)
    return BackwardBlocks(few, AttentionBlocks(64, 32, 8, 1), AttentionBlocks(64, 32, 8, 1))


# --- parts of kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _sequence(offsets_ptr, batch, tokens, PACKED: tl.constexpr):
    """First token of a sequence in memory, and how many it has. Offsets that lie are cut to what there is."""
    first = batch * 0
    length = tokens
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(offsets_ptr + batch), 0), tokens)
        last = tl.minimum(tl.maximum(tl.load(offsets_ptr + batch + 1), 0), tokens)
        length = tl.maximum(last - first, 0)
    return first, length


@triton.jit
def _base(tensor_ptr, batch, head, first, batch_units, head_units, token_units, UNIT: tl.constexpr):
    offset = batch.to(tl.int64) * batch_units + head.to(tl.int64) * head_units + first.to(tl.int64) * token_units
    return tensor_ptr + offset * UNIT


@triton.jit
def _tile(pointers, mask, WHOLE: tl.constexpr):
    """A tile, with zeros where there is nothing; WHOLE: there is no such place. A loop has 20 to 110 instructions less then."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _kv_head(head, groups, GROUPED: tl.constexpr):
    return head // groups if GROUPED else head


@triton.jit
def _padding(range_ptr, batch, keys, RANGE: tl.constexpr):
    """The first key that is no padding, and the one after the last. RANGE: 0 none, 1 lengths, 2 pairs."""
    begin = batch * 0
    end = keys
    if RANGE == 1:
        end = tl.minimum(tl.maximum(tl.load(range_ptr + batch), 0), keys)
    if RANGE == 2:
        begin = tl.load(range_ptr + 2 * batch)
        end = tl.load(range_ptr + 2 * batch + 1)
    return begin, end


@triton.jit
def _look_up(pointers):
    return tl.inline_asm_elementwise(
        "ld.global.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _look_up_pair(pointers, ASM: tl.constexpr):
    if ASM > 0:
        x, y = tl.inline_asm_elementwise(
            "ld.global.v2.f32 {$0, $1}, [$2];",
            "=f,=f,l",
            [pointers.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        x, y = tl.load(pointers), tl.load(pointers + 1)
    return x, y


@triton.jit
def _bias(
    distances_ptr,
    start,
    reach,
    near_left,
    near_right,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    ASM: tl.constexpr,
):
    """T5's bias of a tile whose first key and query are ``start`` apart.

    As a load of triton's the tile would be read in another order than the tensor cores' result has, and sorted through shared
    memory. As an instruction it is read where it is needed: two neighbours along a row at once, for which the list is there
    twice, the second time one number further, so that a pair of any parity begins at 8 bytes. Eight rows below the same pairs
    are needed again, one block of eight columns later, and there the compiler reads nothing: 9 loads a thread for 32 elements.
    The pairs are joined by position, so another order in registers would be slower, and not wrong. From compute capability 10
    on, where a thread has a row, every element is read for itself.
    """
    ROWS: tl.constexpr = KEYS if KEYS_FIRST else QUERIES
    COLS: tl.constexpr = QUERIES if KEYS_FIRST else KEYS
    if (start + KEYS > 1 - near_left) & (start + 1 < near_right + QUERIES):
        if (ASM != 0) & (ASM < 10):
            rows = tl.arange(0, ROWS // 16)[:, None, None, None] * 16
            row = tl.arange(0, 8)[None, :, None, None]
            cols = tl.arange(0, COLS // 8)[None, None, :, None] * 8
            col = tl.arange(0, 4)[None, None, None, :] * 2
            if KEYS_FIRST:
                # A row is a key: along it distances fall.
                place = row + (reach + start - 1) - col
                further = rows - cols
                next_rows = 8
            else:
                place = (reach + start) - row + col
                further = cols - rows
                next_rows = -8
            odd = place & 1
            pointers = distances_ptr + (place - odd + odd * (2 * reach + 2)) + further
            x, y = _look_up_pair(pointers, ASM)
            x_next, y_next = _look_up_pair(pointers + next_rows, ASM)
            if KEYS_FIRST:
                pairs = tl.join(tl.join(y, x), tl.join(y_next, x_next))
            else:
                pairs = tl.join(tl.join(x, y), tl.join(x_next, y_next))
            # [rows / 16, 8, cols / 8, 4, bit 0 of the column, bit 3 of the row]
            bias = tl.reshape(tl.permute(pairs, (0, 5, 1, 2, 3, 4)), (ROWS, COLS))
        else:
            rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
            distance = rows - cols if KEYS_FIRST else cols - rows
            if ASM > 0:
                bias = _look_up(distances_ptr + (reach + start) + distance)
            else:
                bias = tl.load(distances_ptr + (reach + start) + distance)
    else:
        bias = tl.full((ROWS, COLS), 0.0, tl.float32) + tl.load(distances_ptr + tl.where(start > 0, 2 * reach, 0))
    return bias


@triton.jit
def _look_up_byte(pointers, ASM: tl.constexpr):
    if ASM > 0:
        result = tl.inline_asm_elementwise(
            "ld.global.u8 $0, [$1];", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = tl.load(pointers).to(tl.int32)
    return result


@triton.jit
def _products(a, b, bias, ADD: tl.constexpr):
    """With ADD the sum begins at the bias: an addition that costs no instruction."""
    return tl.dot(a, b, bias, input_precision="ieee") if ADD else tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(
    qk,
    scale,
    bias,
    q,
    k,
    q0,
    k0,
    shift,
    begin,
    end,
    slope,
    mask_ptr,
    pairs_ptr,
    pairs_query,
    queries,
    left,
    right,
    HAS_TABLE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BORDERED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ASM: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Scale and bias (unless the exponent and the product have them), and masks, on a tile of products.

    ``q``, ``k``: numbers in the tile, shaped along its dimensions. BORDERED: not every tile is seen as a whole, masks apart.
    """
    start = k0 - q0 - shift  # the distance of the tile's first key and query
    if not FOLD:
        if HAS_TABLE:
            qk = qk * scale + bias
        else:
            qk *= scale
    if HAS_SLOPES:
        qk -= slope * tl.abs((start + k).to(tl.float32) - q.to(tl.float32))
    if BORDERED:
        crossed = (k0 < begin) | (k0 + KEYS > end)
        if HAS_LEFT:
            crossed = crossed | (start < QUERIES - 1 - left)
        if HAS_RIGHT:
            crossed = crossed | (start + KEYS - 1 > right)
        if crossed:
            seen = (k0 + k >= begin) & (k0 + k < end)
            if HAS_LEFT:
                seen = seen & (start + k - q >= -left)
            if HAS_RIGHT:
                seen = seen & (start + k - q <= right)
            qk = tl.where(seen, qk, float("-inf"))
    if HAS_MASK:
        inside = (k0 + k >= begin) & (k0 + k < end)
        seen = tl.load(mask_ptr + k0 + k, mask=inside, other=0) != 0
        qk = tl.where(seen, qk, float("-inf"))
    if HAS_PAIRS:
        # What is read beyond the last query or outside of the keys is a byte of another pair, of a score that counts nowhere.
        row = tl.minimum(q0 + q, queries - 1).to(tl.int64) * pairs_query
        column = tl.maximum(tl.minimum(k0 + k, end - 1), 0)
        qk = tl.where(_look_up_byte(pairs_ptr + row + column, ASM) != 0, qk, float("-inf"))
    return qk


@triton.jit
def _kept_base(kept_ptr, batch, head, first, kept_batch, kept_head, PACKED: tl.constexpr):
    """Where the words of one head of one sequence begin: see ``ops.attention.new_kept``."""
    offset = batch.to(tl.int64) * kept_batch + head.to(tl.int64) * kept_head
    if PACKED:
        offset += (first // 64 + batch).to(tl.int64) * 128
    return kept_ptr + offset


@triton.jit
def _kept_places(base, q0, k0, queries, keys, pair, row, kept_keys, SPAN: tl.constexpr):
    """Pointers to words, or to the bytes of words that a tile of fewer than 64 keys has.

    ``queries``, ``keys``: first ones of blocks of 16 and of ``SPAN``, in the tile. ``pair``, ``row``: the word in its block.
    """
    word = ((k0 + keys) // 64).to(tl.int64) * kept_keys + (q0 + queries) * 2 + (pair * 8 + row)
    part = (k0 + keys) % 64 // SPAN
    if SPAN == 64:
        places = base + word
    elif SPAN == 32:
        places = base.to(tl.pointer_type(tl.int16)) + word * 2 + part
    else:
        places = base.to(tl.pointer_type(tl.int8)) + word * 4 + part
    return places


@triton.jit
def _look_up_word(places, wanted, SPAN: tl.constexpr, ASM: tl.constexpr):
    """Words, or parts of them with zeros before; zero where not wanted. An instruction for the reason :func:`_bias` tells."""
    zero = (places.to(tl.int64) * 0).to(tl.int32)
    wanted = tl.where(wanted, 1, 0) + zero
    if ASM > 0:
        KIND: tl.constexpr = "u32" if SPAN == 64 else "u16" if SPAN == 32 else "u8"
        ASSEMBLY: tl.constexpr = "{.reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0; @p ld.global." + KIND + " $0, [$1];}"
        words = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,l,r", [places.to(tl.int64), wanted], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        words = tl.load(places, mask=wanted != 0, other=0).to(tl.int32)
    return words


@triton.jit
def _write_kept(
    words,
    base,
    q0,
    k0,
    queries,
    kept_keys,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write what :func:`_draw_kept` made where the backward reads it. As triton's store it would be sorted on its way."""
    block = tl.arange(0, QUERIES // 16)[:, None, None, None] * 16
    row = tl.arange(0, 8)[None, :, None, None]
    span = tl.arange(0, KEYS // SPAN)[None, None, :, None] * SPAN
    pair = tl.arange(0, 4)[None, None, None, :]
    places = _kept_places(base, q0, k0, block, span, pair, row, kept_keys, SPAN)
    # Of a last tile of more than 64 queries half may be behind the words of the sequence.
    zero = (places.to(tl.int64) * 0).to(tl.int32)
    wanted = tl.where(q0 + block < (queries + 63) // 64 * 64, 1, 0) + zero
    if ASM > 0:
        KIND: tl.constexpr = "b32" if SPAN == 64 else "b16" if SPAN == 32 else "b8"
        ASSEMBLY: tl.constexpr = "{.reg .pred p; setp.ne.u32 p, $3, 0; @p st.global." + KIND + " [$1], $2; mov.u32 $0, 0;}"
        tl.inline_asm_elementwise(
            ASSEMBLY, "=r,l,r,r", [places.to(tl.int64), words, wanted], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.store(places, words.to(places.dtype.element_ty), mask=wanted != 0)


@triton.jit
def _draw_kept(q0, k0, key, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr):
    """Which elements of a tile stay, as words ``[queries / 16, 8, keys / SPAN, 4]``; ``q0`` and ``k0`` are multiples of 16.

    The elements of a word are those of one thread of the tensor cores' result, and its place in this tensor is the thread's
    place in the program: so words are drawn, written and used in one thread.
    """
    block = tl.arange(0, QUERIES // 16)[:, None, None, None] * 8
    row = tl.arange(0, 8)[None, :, None, None]
    span = tl.arange(0, KEYS // SPAN)[None, None, :, None] * (SPAN // 2)
    pair = tl.arange(0, 4)[None, None, None, :] * 2
    zero = tl.zeros((QUERIES // 16, 8, KEYS // SPAN, 4), dtype=tl.uint32)
    q_half = (q0 // 2 + block + row).to(tl.uint32) + zero
    k_half = (k0 // 2 + span + pair).to(tl.uint32) + zero
    # Bits less the threshold are below zero where an element stays, so bits 16 to 31 are its sign: the one that is wanted is
    # taken by the instruction that adds it to the others. A comparison would be one more, and its result another.
    threshold = threshold.to(tl.uint32)
    low, high = zero, zero
    bit = tl.full((), 65536, tl.uint32)
    for sixteen in tl.static_range(SPAN // 16):
        for parity in tl.static_range(2):
            x, y = philox(k_half + (sixteen * 8 + parity), q_half, key, 7)
            # Bit 3 of the key's number chooses the word, that of the query's the half.
            found = ((x & 0xFFFF) - threshold) & (bit << (sixteen % 2 * 8 + parity * 2))
            found |= ((x >> 16) - threshold) & (bit << (sixteen % 2 * 8 + parity * 2 + 1))
            found |= ((y & 0xFFFF) - threshold) & (bit << (sixteen % 2 * 8 + parity * 2 + 4))
            found |= ((y >> 16) - threshold) & (bit << (sixteen % 2 * 8 + parity * 2 + 5))
            if sixteen < 2:
                low |= found
            else:
                high |= found
    return (high | (low >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def _spread(words, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """For every element of a tile its word and its bit. Nothing is moved: the bits are numbers known to the compiler.

    Bit of an element in its word: bits 3 to 5 of the key's number, then bit 0 of it, then bit 3 of the query's.
    """
    ROWS: tl.constexpr = KEYS if KEYS_FIRST else QUERIES
    COLS: tl.constexpr = QUERIES if KEYS_FIRST else KEYS
    if KEYS_FIRST:  # words are [keys / SPAN, 4, queries / 16, 8]
        sixteen = tl.arange(0, SPAN // 16)[None, :, None, None, None, None, None, None]
        eight = tl.arange(0, 2)[None, None, :, None, None, None, None, None]
        parity = tl.arange(0, 2)[None, None, None, None, :, None, None, None]
        half = tl.arange(0, 2)[None, None, None, None, None, None, :, None]
        words = words[:, None, None, :, None, :, None, :]
        # What differs between threads is shifted away, once a word.
        shift = sixteen * 8 + parity * 2
        words = (words.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)
        words, bits = tl.broadcast(words, 1 << (eight * 4 + half))
    else:  # [queries / 16, 8, keys / SPAN, 4]
        half = tl.arange(0, 2)[None, :, None, None, None, None, None]
        eight = tl.arange(0, SPAN // 8)[None, None, None, None, :, None, None]
        parity = tl.arange(0, 2)[None, None, None, None, None, None, :]
        words, bits = tl.broadcast(words[:, None, :, :, None, :, None], 1 << (eight * 4 + parity * 2 + half))
    return tl.reshape(words, (ROWS, COLS)), tl.reshape(bits, (ROWS, COLS))


@triton.jit
def _read_kept(
    base,
    q0,
    k0,
    queries,
    begin,
    end,
    kept_keys,
    wanted,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    ASM: tl.constexpr,
):
    """What :func:`_spread` makes of the words that the forward has written; ``k0`` is a multiple of 64, or of ``KEYS``.

    Of tiles in which nothing is seen the forward has written nothing. What is read where no score counts is no matter: there
    the probability is zero.
    """
    SPAN: tl.constexpr = KEYS if KEYS < 64 else 64
    if KEYS_FIRST:
        span = tl.arange(0, KEYS // SPAN)[:, None, None, None] * SPAN
        pair = tl.arange(0, 4)[None, :, None, None]
        block = tl.arange(0, QUERIES // 16)[None, None, :, None] * 16
        row = tl.arange(0, 8)[None, None, None, :]
    else:
        block = tl.arange(0, QUERIES // 16)[:, None, None, None] * 16
        row = tl.arange(0, 8)[None, :, None, None]
        span = tl.arange(0, KEYS // SPAN)[None, None, :, None] * SPAN
        pair = tl.arange(0, 4)[None, None, None, :]
    if KEYS > 64:
        wanted = wanted & (k0 + span < end) & (k0 + span + 64 > begin)
    if QUERIES > 64:
        wanted = wanted & (q0 + block < queries)
    places = _kept_places(base, q0, k0, block, span, pair, row, kept_keys, SPAN)
    return _spread(_look_up_word(places, wanted, SPAN, ASM), QUERIES, KEYS, SPAN, KEYS_FIRST)


@triton.jit
def _read_kept_anywhere(base, q, k, kept_keys, wanted):
    """As :func:`_read_kept`, for tiles that begin anywhere: a byte per element."""
    word = (k // 64).to(tl.int64) * kept_keys + q // 16 * 32 + k % 8 // 2 * 8 + q % 8
    words = tl.load(base.to(tl.pointer_type(tl.int8)) + word * 4 + k % 64 // 16, mask=wanted, other=0).to(tl.int32)
    return words, 1 << (k % 16 // 8 * 4 + k % 2 * 2 + q % 16 // 8)


@triton.jit
def _drop(x, words, bits, ASM: tl.constexpr):
    """``x`` where the bit is set, else zero.

    As one instruction to the compiler, so that the test stands where it is needed: 64 instructions for 32 elements. Else it
    tests at once and keeps the results, of which there are more than predicates, in registers: 150.
    """
    if ASM > 0:
        result = tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.u32 p, t, 0; selp.f32 $0, $1, 0f00000000, p;}",
            "=f,f,r,r",
            [x, words, bits],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        result = tl.where((words & bits) != 0, x, 0.0)
    return result


@triton.jit
def _power(x, NATURAL: tl.constexpr):
    """Float32 keeps to base e: a score in base 2 is one more rounding, of a number of ten or twenty.

    The device's instruction is of base 2 all the same. What is lost when the exponent is rounded, three ulps of the result at
    -10, is multiplied in afterwards.
    """
    if NATURAL:
        x = tl.where(x < -200.0, -200.0, x)  # 0 as well, and no infinity is subtracted from another
        high = x * 1.4426950408889634
        low = tl.fma(x, tl.full(x.shape, 1.4426950216293335, tl.float32), -high) + x * 1.925963033500e-08
        result = tl.exp2(high) * (1.0 + low * 0.6931471805599453)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def _logarithm(x, NATURAL: tl.constexpr, ASM: tl.constexpr):
    """Of the sums of a softmax: NATURAL, or to base 2. By the device's instruction it is 2⁻²² off, what p of half precision
    never shows; as written out it is 60 instructions for every warp."""
    if NATURAL:
        found = tl.log(x)
    elif ASM > 0:
        found = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        found = tl.log2(x)
    return found


@triton.jit
def _rounded(x, KIND: tl.constexpr, ASM: tl.constexpr):
    """Two numbers by one instruction: the compiler takes one for each, at a fourth of the rate, if they are used once more."""
    if (ASM > 0) & KIND.is_bf16():
        found = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif (ASM > 0) & KIND.is_fp16():
        found = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        found = x.to(KIND)
    return found


@triton.jit
def _exponentials(s, scale, sums, FOLD: tl.constexpr):
    """``base ** (s - sums)``; with a sum in double precision its low bits are subtracted after the high ones.

    With FOLD the scale is multiplied here, by the instruction that subtracts.
    """
    if sums.dtype == tl.float64:
        high = sums.to(tl.float32)
        low = tl.where(
            high == float("inf"), 0.0, (sums - tl.where(high == float("inf"), 0.0, high).to(tl.float64)).to(tl.float32)
        )
        p = _power((s - high) - low, True)
    elif FOLD:
        p = tl.exp2(s * scale - sums)
    else:
        p = _power(s - sums, False)
    return p


@triton.jit
def _slope(slopes_ptr, head, NATURAL: tl.constexpr):
    slope = tl.load(slopes_ptr + head).to(tl.float32)
    return slope if NATURAL else slope * 1.4426950408889634


# --- kernels before the walk -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["factor", "heads", "width"])
def _attention_distances_kernel(
    table_ptr, buckets_ptr, distances_ptr, factor, heads, width, CHAIN: tl.constexpr, BLOCK: tl.constexpr
):
    chained(CHAIN)
    head = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    bucket = tl.load(buckets_ptr + cols, mask=mask, other=0)
    value = tl.load(table_ptr + bucket * heads + head, mask=mask, other=0.0).to(tl.float32)
    # Twice, the second time one number further, in rows of an even number: see _bias.
    distances_ptr += head.to(tl.int64) * (2 * width + 2)
    tl.store(distances_ptr + cols, value * factor, mask=mask)
    tl.store(distances_ptr + width + cols, value * factor, mask=mask & (cols > 0))


@triton.jit(do_not_specialize=["keys", "batch_stride", "key_stride"])
def _attention_range_kernel(mask_ptr, range_ptr, keys, batch_stride, key_stride, BLOCK: tl.constexpr):
    batch = tl.program_id(0)
    row_ptr = mask_ptr + batch.to(tl.int64) * batch_stride
    first = tl.full((BLOCK,), 2147483647, dtype=tl.int32)
    last = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, keys, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        seen = tl.load(row_ptr + cols.to(tl.int64) * key_stride, mask=cols < keys, other=0) != 0
        first = tl.where(seen, tl.minimum(first, cols), first)
        last = tl.where(seen, tl.maximum(last, cols + 1), last)
    end = tl.max(last, axis=0)
    tl.store(range_ptr + 2 * batch, tl.minimum(tl.min(first, axis=0), end))
    tl.store(range_ptr + 2 * batch + 1, end)


# --- forward -----------------------------------------------------------------------------------------------------------------

_NUMBERS = [
    "first_batch",
    "scale",
    "inverse",
    "threshold",
    "heads",
    "groups",
    "queries",
    "keys",
    "blocks",
    "reach",
    "near_left",
    "near_right",
    "left",
    "right",
    "mask_units",
    "pairs_batch",
    "pairs_head",
    "pairs_query",
    "sum_batch",
    "sum_head",
    "kept_batch",
    "kept_head",
    "kept_keys",
    "q_batch",
    "q_head",
    "q_token",
    "k_batch",
    "k_head",
    "k_token",
    "v_batch",
    "v_head",
    "v_token",
    "o_batch",
    "o_head",
    "o_token",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sums_ptr,
    rest_ptr,
    kept_ptr,
    distances_ptr,
    slopes_ptr,
    mask_ptr,
    pairs_ptr,
    range_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    rng_ptr,
    first_batch,
    scale,
    inverse,
    threshold,
    heads,
    groups,
    queries,
    keys,
    blocks,
    reach,
    near_left,
    near_right,
    left,
    right,
    mask_units,
    pairs_batch,
    pairs_head,
    pairs_query,
    sum_batch,
    sum_head,
    kept_batch,
    kept_head,
    kept_keys,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    o_batch,
    o_head,
    o_token,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    RANGE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    FOLD: tl.constexpr,
    REST: tl.constexpr,
    KEEP: tl.constexpr,
    ASM: tl.constexpr,
    CHAIN: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), first_batch + tl.program_id(2)
    if HAS_RIGHT:
        block = blocks - 1 - block  # the longest walks first
    first_query, queries = _sequence(q_offsets_ptr, batch, queries, PACKED)
    first_key, keys = _sequence(k_offsets_ptr, batch, keys, PACKED)
    begin, end = _padding(range_ptr, batch, keys, RANGE)
    if PACKED and KEEP:
        # As many keys as there are words for, should the sequence be longer than was said.
        end = tl.minimum(end, kept_head // kept_keys * 64)
    shift = keys - queries
    q0 = block * QUERIES
    rows, cols, dims = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    tokens = (q0 + rows).to(tl.int64)
    q_mask = (q0 + rows < queries)[:, None] & (dims < DIM)[None, :]
    q_base = _base(q_ptr, batch, head, first_query, q_batch, q_head, q_token, UNIT)
    q = _tile(q_base + tokens[:, None] * (q_token * UNIT) + dims[None, :], q_mask, WHOLE_QUERIES)
    k_base = _base(k_ptr, batch, _kv_head(head, groups, GROUPED), first_key, k_batch, k_head, k_token, UNIT)
    v_base = _base(v_ptr, batch, _kv_head(head, groups, GROUPED), first_key, v_batch, v_head, v_token, UNIT)
    slope, key = 0.0, tl.full((), 0, tl.uint32)
    if HAS_TABLE:
        distances_ptr += head.to(tl.int64) * (4 * reach + 4)
    if HAS_SLOPES:
        slope = _slope(slopes_ptr, head, sums_ptr.dtype.element_ty == tl.float64)
    if HAS_MASK:
        mask_ptr += batch.to(tl.int64) * mask_units
    if HAS_PAIRS:
        pairs_ptr += batch.to(tl.int64) * pairs_batch + head.to(tl.int64) * pairs_head
    if DROPOUT:
        key = random_key(rng_ptr, batch * heads + head)
    if KEEP:
        kept_ptr = _kept_base(kept_ptr, batch, head, first_query, kept_batch, kept_head, PACKED)

    low, high = begin, end
    if HAS_LEFT:
        low = tl.maximum(low, q0 + shift - left)
    if HAS_RIGHT:
        high = tl.minimum(high, tl.minimum(q0 + QUERIES, queries) + shift + right)
    low = low // KEYS * KEYS
    if q0 >= queries:
        high = low
    BORDERED: tl.constexpr = not WHOLE_KEYS or RANGE != 0 or HAS_LEFT or HAS_RIGHT
    NATURAL: tl.constexpr = sums_ptr.dtype.element_ty == tl.float64
    SPAN: tl.constexpr = KEYS if KEYS < 64 else 64
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    # A tile is further by a number, so that a pointer costs one addition of 64 bits in the loop and no product.
    k_step = k_token.to(tl.int64) * UNIT
    k_ptrs = k_base + cols[None, :] * k_step + dims[:, None]
    v_step = v_token.to(tl.int64) * UNIT
    v_ptrs = v_base + cols[:, None] * v_step + dims[None, :]
    chained(CHAIN)
    for k0 in tl.range(low, high, KEYS, num_stages=STAGES):
        inside = k0 + cols < keys
        k_mask = inside[None, :] if DIM == WIDTH else inside[None, :] & (dims < DIM)[:, None]
        k = _tile(k_ptrs + k0 * k_step, k_mask, WHOLE_KEYS)
        bias = 0.0
        if HAS_TABLE:
            bias = _bias(distances_ptr, k0 - q0 - shift, reach, near_left, near_right, QUERIES, KEYS, False, ASM)
        s = _products(q, k, bias, HAS_TABLE and FOLD)
        s = _scores(
            s,
            scale,
            bias,
            rows[:, None],
            cols[None, :],
            q0,
            k0,
            shift,
            begin,
            end,
            slope,
            mask_ptr,
            pairs_ptr,
            pairs_query,
            queries,
            left,
            right,
            HAS_TABLE,
            HAS_SLOPES,
            HAS_MASK,
            HAS_PAIRS,
            HAS_LEFT,
            HAS_RIGHT,
            BORDERED,
            QUERIES,
            KEYS,
            ASM,
            FOLD,
        )
        higher = tl.maximum(top, tl.max(s, axis=1))
        zero = higher
        if BORDERED or HAS_MASK or HAS_PAIRS:  # where nothing was seen yet, -inf - -inf would be NaN
            zero = tl.where(higher == float("-inf"), 0.0, higher)
        if FOLD:  # one multiply-add for scale and maximum
            p = tl.exp2(s * scale - (zero * scale)[:, None])
            shrink = tl.exp2((top - zero) * scale)
        else:
            p = _power(s - zero[:, None], NATURAL)
            shrink = _power(top - zero, NATURAL)
        total = total * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            words = _draw_kept(q0, k0, key, threshold, QUERIES, KEYS, SPAN)
            if KEEP:
                _write_kept(words, kept_ptr, q0, k0, queries, kept_keys, QUERIES, KEYS, SPAN, ASM)
            words, bits = _spread(words, QUERIES, KEYS, SPAN, False)
            p = _drop(p, words, bits, ASM)
        v_mask = inside[:, None] if DIM == WIDTH else inside[:, None] & (dims < DIM)[None, :]
        v = _tile(v_ptrs + k0 * v_step, v_mask, WHOLE_KEYS)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    if DROPOUT:
        acc *= inverse
    if NATURAL:
        acc = tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape))
    else:
        acc *= (1.0 / total)[:, None]
    if FOLD:
        top *= scale
    kind = sums_ptr.dtype.element_ty
    sums = tl.where(seen, top.to(kind) + _logarithm(total.to(kind), NATURAL, ASM), float("inf"))
    sums_base = sums_ptr + batch.to(tl.int64) * sum_batch + head.to(tl.int64) * sum_head + first_query
    tl.store(sums_base + q0 + rows, sums, mask=q0 + rows < queries)
    out_base = _base(out_ptr, batch, head, first_query, o_batch, o_head, o_token, UNIT)
    offsets = tokens[:, None] * (o_token * UNIT) + dims[None, :]
    out = _rounded(acc, out_ptr.dtype.element_ty, ASM)
    tl.store(out_base + offsets, out, mask=q_mask)
    if REST:
        rest_base = _base(rest_ptr, batch, head, first_query, o_batch, o_head, o_token, UNIT)
        tl.store(rest_base + offsets, (acc - out.to(tl.float32)).to(out.dtype), mask=q_mask)


# --- backward ----------------------------------------------------------------------------------------------------------------


_BACKWARD_NUMBERS = ["natural", *_NUMBERS[:-3], "g_batch", "g_head", "g_token"]


@triton.jit(do_not_specialize=[*_BACKWARD_NUMBERS, "dk_batch", "dk_head", "dk_token"])
def _attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    sums_ptr,
    delta_ptr,
    distances_ptr,
    slopes_ptr,
    mask_ptr,
    pairs_ptr,
    range_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    kept_ptr,
    natural,
    first_batch,
    scale,
    inverse,
    threshold,
    heads,
    groups,
    queries,
    keys,
    blocks,
    reach,
    near_left,
    near_right,
    left,
    right,
    mask_units,
    pairs_batch,
    pairs_head,
    pairs_query,
    sum_batch,
    sum_head,
    kept_batch,
    kept_head,
    kept_keys,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    g_batch,
    g_head,
    g_token,
    dk_batch,
    dk_head,
    dk_token,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    RANGE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    FOLD: tl.constexpr,
    ASM: tl.constexpr,
    CHAIN: tl.constexpr,
    APART: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Tiles lie with keys along their rows: so the probabilities and their gradients go from one matmul into the next without
    # leaving the registers.
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), first_batch + tl.program_id(2)
    first_query, queries = _sequence(q_offsets_ptr, batch, queries, PACKED)
    first_key, keys = _sequence(k_offsets_ptr, batch, keys, PACKED)
    begin, end = _padding(range_ptr, batch, keys, RANGE)
    shift = keys - queries
    k0 = block * KEYS
    rows, cols, dims = tl.arange(0, KEYS), tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    k_tokens = (k0 + rows).to(tl.int64)[:, None]
    k_mask = (k0 + rows < keys)[:, None] & (dims < DIM)[None, :]
    k_base = _base(k_ptr, batch, kv_head, first_key, k_batch, k_head, k_token, UNIT)
    v_base = _base(v_ptr, batch, kv_head, first_key, v_batch, v_head, v_token, UNIT)
    k = _tile(k_base + k_tokens * (k_token * UNIT) + dims[None, :], k_mask, WHOLE_KEYS)
    v = _tile(v_base + k_tokens * (v_token * UNIT) + dims[None, :], k_mask, WHOLE_KEYS)
    if HAS_MASK:
        mask_ptr += batch.to(tl.int64) * mask_units

    low, high = k0 * 0, queries
    if HAS_RIGHT:
        low = tl.maximum(low, k0 - right - shift)
    if HAS_LEFT:
        high = tl.minimum(high, k0 + KEYS + left - shift)
    low = low // QUERIES * QUERIES
    if (k0 >= end) | (k0 + KEYS <= begin):
        high = low
    # Without dropout always: in a loop without a branch Triton 3.6 and its ptxas make each matmul wait for the one before.
    BORDERED: tl.constexpr = not DROPOUT or not WHOLE_KEYS or RANGE != 0 or HAS_LEFT or HAS_RIGHT
    NATURAL: tl.constexpr = sums_ptr.dtype.element_ty == tl.float64
    # APART: queries of each head of a group are summed alone first, as eager code does. One sum over four is twice as wrong.
    dk = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    dv = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    all_dk, all_dv = dk, dv
    slope, kept_base = 0.0, kept_ptr
    chained(CHAIN)
    for member in range(0, groups if GROUPED else 1):
        head = kv_head * groups + member if GROUPED else kv_head
        q_base = _base(q_ptr, batch, head, first_query, q_batch, q_head, q_token, UNIT)
        g_base = _base(dout_ptr, batch, head, first_query, g_batch, g_head, g_token, UNIT)
        sum_offset = batch.to(tl.int64) * sum_batch + head.to(tl.int64) * sum_head + first_query
        head_distances_ptr = distances_ptr
        if HAS_TABLE:
            head_distances_ptr = distances_ptr + head.to(tl.int64) * (4 * reach + 4)
        if HAS_SLOPES:
            slope = _slope(slopes_ptr, head, sums_ptr.dtype.element_ty == tl.float64)
        head_pairs_ptr = pairs_ptr
        if HAS_PAIRS:
            head_pairs_ptr = pairs_ptr + batch.to(tl.int64) * pairs_batch + head.to(tl.int64) * pairs_head
        if DROPOUT:
            kept_base = _kept_base(kept_ptr, batch, head, first_query, kept_batch, kept_head, PACKED)
        q_step = q_token.to(tl.int64) * UNIT
        q_ptrs = q_base + cols[:, None] * q_step + dims[None, :]
        g_step = g_token.to(tl.int64) * UNIT
        g_ptrs = g_base + cols[:, None] * g_step + dims[None, :]
        for q0 in tl.range(low, high, QUERIES, num_stages=STAGES):
            inside = q0 + cols < queries
            q_mask = inside[:, None] if DIM == WIDTH else inside[:, None] & (dims < DIM)[None, :]
            q = _tile(q_ptrs + q0 * q_step, q_mask, WHOLE_QUERIES)
            if (sums_ptr.dtype.element_ty == tl.float32) & (ASM != 0):
                # One load of both, a number for every thread: of less Triton 3.6 lets each thread load all it needs, and of
                # 849 instructions for a tile of 64×64 with T5's bias 300 copied single numbers.
                places = tl.join(sums_ptr + sum_offset + q0 + cols, delta_ptr + sum_offset + q0 + cols)
                if WHOLE_QUERIES:
                    sums, delta = tl.split(tl.load(places))
                else:
                    other = tl.join(tl.full((QUERIES,), float("inf"), tl.float32), tl.zeros((QUERIES,), tl.float32))
                    sums, delta = tl.split(tl.load(places, mask=tl.join(inside, inside), other=other))
            else:
                sums = tl.load(sums_ptr + sum_offset + q0 + cols, mask=inside, other=float("inf"))
                delta = tl.load(delta_ptr + sum_offset + q0 + cols, mask=inside, other=0.0)
            bias = 0.0
            if HAS_TABLE:
                bias = _bias(head_distances_ptr, k0 - q0 - shift, reach, near_left, near_right, QUERIES, KEYS, True, ASM)
            s = _products(k, tl.trans(q), bias, HAS_TABLE and FOLD)
            s = _scores(
                s,
                scale,
                bias,
                cols[None, :],
                rows[:, None],
                q0,
                k0,
                shift,
                begin,
                end,
                slope,
                mask_ptr,
                head_pairs_ptr,
                pairs_query,
                queries,
                left,
                right,
                HAS_TABLE,
                HAS_SLOPES,
                HAS_MASK,
                HAS_PAIRS,
                HAS_LEFT,
                HAS_RIGHT,
                BORDERED,
                QUERIES,
                KEYS,
                ASM,
                FOLD,
            )
            p = _exponentials(s, scale, sums[None, :], FOLD)
            dout = _tile(g_ptrs + q0 * g_step, q_mask, WHOLE_QUERIES)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            dropped = p
            if DROPOUT:
                words, bits = _read_kept(kept_base, q0, k0, queries, begin, end, kept_keys, True, QUERIES, KEYS, True, ASM)
                dropped = _drop(p * inverse if NATURAL else p, words, bits, ASM)
                if NATURAL:
                    dp = _drop(dp * inverse, words, bits, ASM)
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision="ieee")
            ds = dropped * dp - p * delta[None, :] if DROPOUT and not NATURAL else p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        if APART:
            all_dk += dk
            all_dv += dv
            dk = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
            dv = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    if APART:
        dk = all_dk
        dv = all_dv
    if DROPOUT and not NATURAL:
        dk *= inverse
        dv *= inverse
    offsets = k_tokens * (dk_token * UNIT) + dims[None, :]
    dk_base = _base(dk_ptr, batch, kv_head, first_key, dk_batch, dk_head, dk_token, UNIT)
    dv_base = _base(dv_ptr, batch, kv_head, first_key, dk_batch, dk_head, dk_token, UNIT)
    tl.store(dk_base + offsets, (dk * natural).to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_base + offsets, dv.to(dv_ptr.dtype.element_ty), mask=k_mask)


_NEAR = ["near_first", "near_last", "near_block"]


@triton.jit
def _tiles_of(offset, queries, keys, blocks, PACKED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """First block of queries of a diagonal, and how many: those that have keys. Packed: as many as the longest has."""
    low = blocks * 0
    high = blocks
    if not PACKED:
        start = offset + keys - queries
        low = tl.maximum(QUERIES - KEYS - start, 0) // QUERIES
        high = tl.minimum(tl.maximum(keys - start + QUERIES - 1, 0) // QUERIES, blocks)
    return low, tl.maximum(high - low, 0)


@triton.jit(do_not_specialize=[*_BACKWARD_NUMBERS, "dq_batch", "dq_head", "dq_token", *_NUMBERS[-3:], "share", *_NEAR])
def _attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    far_ptr,
    sums_ptr,
    delta_ptr,
    distances_ptr,
    slopes_ptr,
    mask_ptr,
    pairs_ptr,
    range_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    kept_ptr,
    out_ptr,
    rest_ptr,
    natural,
    first_batch,
    scale,
    inverse,
    threshold,
    heads,
    groups,
    queries,
    keys,
    blocks,
    reach,
    near_left,
    near_right,
    left,
    right,
    mask_units,
    pairs_batch,
    pairs_head,
    pairs_query,
    sum_batch,
    sum_head,
    kept_batch,
    kept_head,
    kept_keys,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    g_batch,
    g_head,
    g_token,
    dq_batch,
    dq_head,
    dq_token,
    o_batch,
    o_head,
    o_token,
    share,
    near_first,
    near_last,
    near_block,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    RANGE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    FOLD: tl.constexpr,
    ASM: tl.constexpr,
    CHAIN: tl.constexpr,
    TABLE_GRADIENT: tl.constexpr,
    DELTA: tl.constexpr,
    REST: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # DELTA: 0 it is computed from the result and written down; 1 the sums of p · dp come out, and nothing else; 2 it is there.
    block, head, batch = tl.program_id(0), tl.program_id(1), first_batch + tl.program_id(2)
    if HAS_RIGHT:
        block = blocks - 1 - block
    first_query, queries = _sequence(q_offsets_ptr, batch, queries, PACKED)
    first_key, keys = _sequence(k_offsets_ptr, batch, keys, PACKED)
    begin, end = _padding(range_ptr, batch, keys, RANGE)
    if PACKED and DROPOUT:
        # As many keys as there are words for, should the sequence be longer than was said.
        end = tl.minimum(end, kept_head // kept_keys * 64)
    shift = keys - queries
    q0 = block * QUERIES
    rows, cols, dims = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    inside = q0 + rows < queries
    tokens = (q0 + rows).to(tl.int64)[:, None]
    q_mask = inside[:, None] & (dims < DIM)[None, :]
    q_base = _base(q_ptr, batch, head, first_query, q_batch, q_head, q_token, UNIT)
    g_base = _base(dout_ptr, batch, head, first_query, g_batch, g_head, g_token, UNIT)
    k_base = _base(k_ptr, batch, _kv_head(head, groups, GROUPED), first_key, k_batch, k_head, k_token, UNIT)
    v_base = _base(v_ptr, batch, _kv_head(head, groups, GROUPED), first_key, v_batch, v_head, v_token, UNIT)
    q = _tile(q_base + tokens * (q_token * UNIT) + dims[None, :], q_mask, WHOLE_QUERIES)
    dout = _tile(g_base + tokens * (g_token * UNIT) + dims[None, :], q_mask, WHOLE_QUERIES)
    sum_offset = batch.to(tl.int64) * sum_batch + head.to(tl.int64) * sum_head + first_query
    sums = tl.load(sums_ptr + sum_offset + q0 + rows, mask=inside, other=float("inf"))
    whole = tl.zeros((QUERIES,), dtype=tl.float32)
    if DELTA == 0:
        # Σ out · dout, with what was rounded away from out.
        out_base = _base(out_ptr, batch, head, first_query, o_batch, o_head, o_token, UNIT)
        places = tokens * (o_token * UNIT) + dims[None, :]
        out = _tile(out_base + places, q_mask, WHOLE_QUERIES).to(tl.float32)
        if REST:
            rest_base = _base(rest_ptr, batch, head, first_query, o_batch, o_head, o_token, UNIT)
            out += _tile(rest_base + places, q_mask, WHOLE_QUERIES).to(tl.float32)
        delta = tl.sum(out * dout.to(tl.float32), axis=1) * share
    elif DELTA == 1:
        delta = tl.zeros((QUERIES,), dtype=tl.float32)
    else:
        delta = tl.load(delta_ptr + sum_offset + q0 + rows, mask=inside, other=0.0)
    slope = 0.0
    if HAS_TABLE:
        distances_ptr += head.to(tl.int64) * (4 * reach + 4)
    if HAS_SLOPES:
        slope = _slope(slopes_ptr, head, sums_ptr.dtype.element_ty == tl.float64)
    if HAS_MASK:
        mask_ptr += batch.to(tl.int64) * mask_units
    if HAS_PAIRS:
        pairs_ptr += batch.to(tl.int64) * pairs_batch + head.to(tl.int64) * pairs_head
    if DROPOUT:
        kept_ptr = _kept_base(kept_ptr, batch, head, first_query, kept_batch, kept_head, PACKED)

    low, high = begin, end
    if HAS_LEFT:
        low = tl.maximum(low, q0 + shift - left)
    if HAS_RIGHT:
        high = tl.minimum(high, tl.minimum(q0 + QUERIES, queries) + shift + right)
    low = low // KEYS * KEYS
    if q0 >= queries:
        high = low
    # What lies before and after the tiles that the table's kernel walks over shares one bucket on each side.
    near_first += q0 // near_block * near_block + shift
    near_last += q0 // near_block * near_block + shift
    BORDERED: tl.constexpr = not WHOLE_KEYS or RANGE != 0 or HAS_LEFT or HAS_RIGHT
    NATURAL: tl.constexpr = sums_ptr.dtype.element_ty == tl.float64
    far_left = tl.zeros((QUERIES,), dtype=tl.float32)
    far_right = tl.zeros((QUERIES,), dtype=tl.float32)
    dq = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    k_step = k_token.to(tl.int64) * UNIT
    k_ptrs = k_base + cols[:, None] * k_step + dims[None, :]
    v_step = v_token.to(tl.int64) * UNIT
    v_ptrs = v_base + cols[:, None] * v_step + dims[None, :]
    chained(CHAIN)
    if DELTA == 0:
        tl.store(delta_ptr + sum_offset + q0 + rows, delta, mask=inside)
    for k0 in tl.range(low, high, KEYS, num_stages=STAGES):
        k_inside = k0 + cols < keys
        k_mask = k_inside[:, None] if DIM == WIDTH else k_inside[:, None] & (dims < DIM)[None, :]
        k = _tile(k_ptrs + k0 * k_step, k_mask, WHOLE_KEYS)
        bias = 0.0
        if HAS_TABLE:
            bias = _bias(distances_ptr, k0 - q0 - shift, reach, near_left, near_right, QUERIES, KEYS, False, ASM)
        s = _products(q, tl.trans(k), bias, HAS_TABLE and FOLD)
        s = _scores(
            s,
            scale,
            bias,
            rows[:, None],
            cols[None, :],
            q0,
            k0,
            shift,
            begin,
            end,
            slope,
            mask_ptr,
            pairs_ptr,
            pairs_query,
            queries,
            left,
            right,
            HAS_TABLE,
            HAS_SLOPES,
            HAS_MASK,
            HAS_PAIRS,
            HAS_LEFT,
            HAS_RIGHT,
            BORDERED,
            QUERIES,
            KEYS,
            ASM,
            FOLD,
        )
        p = _exponentials(s, scale, sums[:, None], FOLD)
        v = _tile(v_ptrs + k0 * v_step, k_mask, WHOLE_KEYS)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            words, bits = _read_kept(kept_ptr, q0, k0, queries, begin, end, kept_keys, True, QUERIES, KEYS, False, ASM)
            if NATURAL:
                dp = _drop(dp * inverse, words, bits, ASM)
        if DELTA == 1:
            delta += tl.sum(p * dp, axis=1)
            whole += tl.sum(p, axis=1)
        dropped = _drop(p, words, bits, ASM) if DROPOUT and not NATURAL else p
        ds = dropped * dp - p * delta[:, None] if DROPOUT and not NATURAL else p * (dp - delta[:, None])
        if TABLE_GRADIENT:
            if k0 + KEYS <= near_first:
                far_left += tl.sum(ds, axis=1)
            elif k0 >= near_last:
                far_right += tl.sum(ds, axis=1)
            elif (k0 < near_first) | (k0 + KEYS > near_last):  # tiles of keys and diagonals that begin at other numbers
                far_left += tl.sum(tl.where((k0 + cols < near_first)[None, :], ds, 0.0), axis=1)
                far_right += tl.sum(tl.where((k0 + cols >= near_last)[None, :], ds, 0.0), axis=1)
        if DELTA != 1:
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if DROPOUT and not NATURAL:
        dq *= inverse
        far_left *= inverse
        far_right *= inverse
    if DELTA == 1:
        # By the sum of p, which is one but for rounding, so that what is subtracted from dp has no rounding of p in it.
        delta = tl.where(whole > 0.0, delta / tl.where(whole > 0.0, whole, 1.0), 0.0)
        tl.store(delta_ptr + sum_offset + q0 + rows, delta, mask=inside)
    else:
        dq_base = _base(dq_ptr, batch, head, first_query, dq_batch, dq_head, dq_token, UNIT)
        dq_ptrs = dq_base + tokens * (dq_token * UNIT) + dims[None, :]
        tl.store(dq_ptrs, (dq * natural).to(dq_ptr.dtype.element_ty), mask=q_mask)
    if TABLE_GRADIENT:
        far_ptr += ((batch.to(tl.int64) * heads + head) * blocks + block) * 2
        tl.store(far_ptr, tl.sum(far_left, axis=0))
        tl.store(far_ptr + 1, tl.sum(far_right, axis=0))


@triton.jit
def _sums_by_bucket(
    tile_ptr, buckets_ptr, offset, reach, COUNT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr
):
    """A tile's sums by bucket. A column of what is read here is a distance, so each row is read from another place on."""
    ROWS: tl.constexpr = 16  # a tile has that many queries, or a multiple
    names, cols = tl.arange(0, COUNT), tl.arange(0, SPAN)
    diagonals = tl.zeros((ROWS, SPAN), dtype=tl.float32)
    for first in range(0, QUERIES, ROWS):
        rows = first + tl.arange(0, ROWS)
        place = cols[None, :] - (QUERIES - 1) + rows[:, None]
        mask = (place >= 0) & (place < KEYS)
        diagonals += tl.load(tile_ptr + rows[:, None] * KEYS + place, mask=mask, other=0.0)
    valid = cols < QUERIES + KEYS - 1
    bucket = tl.load(buckets_ptr + reach + offset + cols - (QUERIES - 1), mask=valid, other=0)
    sums = tl.where(valid, tl.sum(diagonals, axis=0), 0.0)
    return tl.sum(tl.where(names[:, None] == bucket[None, :], sums[None, :], 0.0), axis=1)


@triton.jit(do_not_specialize=[*_BACKWARD_NUMBERS, "batches", "most", "first_offset"])
def _attention_dtable_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    parts_ptr,
    sums_ptr,
    delta_ptr,
    distances_ptr,
    mask_ptr,
    pairs_ptr,
    range_ptr,
    q_offsets_ptr,
    k_offsets_ptr,
    kept_ptr,
    buckets_ptr,
    diagonals_ptr,
    natural,
    first_batch,
    scale,
    inverse,
    threshold,
    heads,
    groups,
    queries,
    keys,
    blocks,
    reach,
    near_left,
    near_right,
    left,
    right,
    mask_units,
    pairs_batch,
    pairs_head,
    pairs_query,
    sum_batch,
    sum_head,
    kept_batch,
    kept_head,
    kept_keys,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    g_batch,
    g_head,
    g_token,
    batches,
    most,
    first_offset,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    RANGE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    FOLD: tl.constexpr,
    ASM: tl.constexpr,
    CHAIN: tl.constexpr,
    WHOLE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    COUNT: tl.constexpr,
    SPAN: tl.constexpr,
):
    # Program: a part of the tiles of one diagonal of one head. Tiles of keys begin at a fixed distance from those of queries.
    part = tl.program_id(0)
    offset = (first_offset + tl.program_id(1)) * KEYS
    head = tl.program_id(2)
    rows, cols, dims = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    distances_ptr += head.to(tl.int64) * (4 * reach + 4)
    BORDERED: tl.constexpr = not WHOLE or RANGE != 0 or HAS_LEFT or HAS_RIGHT
    NATURAL: tl.constexpr = sums_ptr.dtype.element_ty == tl.float64
    total = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    low, count = _tiles_of(offset, queries, keys, blocks, PACKED, QUERIES, KEYS)
    q_step, k_step = q_token.to(tl.int64) * UNIT, k_token.to(tl.int64) * UNIT
    g_step, v_step = g_token.to(tl.int64) * UNIT, v_token.to(tl.int64) * UNIT
    q_places, k_places = rows[:, None] * q_step + dims[None, :], cols[:, None] * k_step + dims[None, :]
    g_places, v_places = rows[:, None] * g_step + dims[None, :], cols[:, None] * v_step + dims[None, :]
    last = tl.minimum((part + 1) * most, batches * count)  # the last parts of a short diagonal are empty
    count = tl.maximum(count, 1)
    chained(CHAIN)
    for item in tl.range(part * most, last, num_stages=STAGES):
        batch, q0 = item // count, (low + item % count) * QUERIES
        first_query, sequence = _sequence(q_offsets_ptr, batch, queries, PACKED)
        first_key, key_count = _sequence(k_offsets_ptr, batch, keys, PACKED)
        begin, end = _padding(range_ptr, batch, key_count, RANGE)
        if PACKED and DROPOUT:
            # As many keys as there are words for, should the sequence be longer than was said.
            end = tl.minimum(end, kept_head // kept_keys * 64)
        shift = key_count - sequence
        k0 = q0 + offset + shift
        inside = q0 + rows < sequence
        k_inside = (k0 + cols >= 0) & (k0 + cols < key_count)
        q_mask = inside[:, None] if DIM == WIDTH else inside[:, None] & (dims < DIM)[None, :]
        k_mask = k_inside[:, None] if DIM == WIDTH else k_inside[:, None] & (dims < DIM)[None, :]
        q_base = _base(q_ptr, batch, head, first_query, q_batch, q_head, q_token, UNIT)
        g_base = _base(dout_ptr, batch, head, first_query, g_batch, g_head, g_token, UNIT)
        k_base = _base(k_ptr, batch, _kv_head(head, groups, GROUPED), first_key, k_batch, k_head, k_token, UNIT)
        v_base = _base(v_ptr, batch, _kv_head(head, groups, GROUPED), first_key, v_batch, v_head, v_token, UNIT)
        q = _tile(q_base + q0 * q_step + q_places, q_mask, WHOLE)
        k = _tile(k_base + k0 * k_step + k_places, k_mask, WHOLE)
        bias = _bias(distances_ptr, offset, reach, near_left, near_right, QUERIES, KEYS, False, ASM)
        s = _products(q, tl.trans(k), bias, FOLD)
        sum_offset = batch.to(tl.int64) * sum_batch + head.to(tl.int64) * sum_head + first_query
        sums = tl.load(sums_ptr + sum_offset + q0 + rows, mask=inside, other=float("inf"))
        batch_mask_ptr = mask_ptr
        if HAS_MASK:
            batch_mask_ptr = mask_ptr + batch.to(tl.int64) * mask_units
        batch_pairs_ptr = pairs_ptr
        if HAS_PAIRS:
            batch_pairs_ptr = pairs_ptr + batch.to(tl.int64) * pairs_batch + head.to(tl.int64) * pairs_head
        s = _scores(
            s,
            scale,
            bias,
            rows[:, None],
            cols[None, :],
            q0,
            k0,
            shift,
            begin,
            end,
            0.0,
            batch_mask_ptr,
            batch_pairs_ptr,
            pairs_query,
            sequence,
            left,
            right,
            True,
            False,
            HAS_MASK,
            HAS_PAIRS,
            HAS_LEFT,
            HAS_RIGHT,
            BORDERED,
            QUERIES,
            KEYS,
            ASM,
            FOLD,
        )
        p = _exponentials(s, scale, sums[:, None], FOLD)
        dout = _tile(g_base + q0 * g_step + g_places, q_mask, WHOLE)
        v = _tile(v_base + k0 * v_step + v_places, k_mask, WHOLE)
        delta = tl.load(delta_ptr + sum_offset + q0 + rows, mask=inside, other=0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            # Of tiles without a key that is seen nothing was written down.
            kept_base = _kept_base(kept_ptr, batch, head, first_query, kept_batch, kept_head, PACKED)
            wanted = (q0 < sequence) & (k0 < end) & (k0 + KEYS > begin)
            if HAS_LEFT:
                wanted = wanted & (k0 + KEYS > q0 + shift - left)
            if ALIGNED:
                words, bits = _read_kept(kept_base, q0, k0, sequence, begin, end, kept_keys, wanted, QUERIES, KEYS, False, ASM)
            else:
                wanted = (wanted & inside)[:, None] & k_inside[None, :]
                words, bits = _read_kept_anywhere(kept_base, q0 + rows[:, None], k0 + cols[None, :], kept_keys, wanted)
        if DROPOUT and not NATURAL:
            total += _drop(p, words, bits, ASM) * dp - p * delta[:, None]
        elif DROPOUT:
            total += p * (_drop(dp * inverse, words, bits, ASM) - delta[:, None])
        else:
            total += p * (dp - delta[:, None])
    if DROPOUT and not NATURAL:
        total *= inverse
    number = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + part
    tile_ptr = parts_ptr + number * (QUERIES * KEYS)
    tl.store(tile_ptr + rows[:, None] * KEYS + cols[None, :], total)
    tl.debug_barrier()  # what is read now other threads wrote
    by_bucket = _sums_by_bucket(tile_ptr, buckets_ptr, offset, reach, COUNT, QUERIES, KEYS, SPAN)
    tl.store(diagonals_ptr + number * COUNT + tl.arange(0, COUNT), by_bucket)


@triton.jit(do_not_specialize=["heads", "batches", "blocks", "tiles", "reach"])
def _attention_dtable_sum_kernel(
    diagonals_ptr,
    far_ptr,
    buckets_ptr,
    dtable_ptr,
    heads,
    batches,
    blocks,
    tiles,
    reach,
    CHAIN: tl.constexpr,
    BUCKETS: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    FAR: tl.constexpr,
):
    chained(CHAIN)
    head = tl.program_id(0)
    names = tl.arange(0, COUNT)
    near = tl.zeros((ROWS, COUNT), dtype=tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        places = (head.to(tl.int64) * tiles + tile)[:, None] * COUNT + names[None, :]
        near += tl.load(diagonals_ptr + places, mask=(tile < tiles)[:, None], other=0.0)
    total = tl.sum(near, axis=0)
    left = tl.zeros((FAR,), dtype=tl.float32)
    right = tl.zeros((FAR,), dtype=tl.float32)
    for start in range(0, batches * blocks, FAR):
        item = start + tl.arange(0, FAR)
        mask = item < batches * blocks
        place = ((item // blocks).to(tl.int64) * heads + head) * blocks + item % blocks
        left += tl.load(far_ptr + 2 * place, mask=mask, other=0.0)
        right += tl.load(far_ptr + 2 * place + 1, mask=mask, other=0.0)
    total += tl.where(names == tl.load(buckets_ptr), tl.sum(left, axis=0), 0.0)
    total += tl.where(names == tl.load(buckets_ptr + 2 * reach), tl.sum(right, axis=0), 0.0)
    tl.store(dtable_ptr + names * heads + head, total.to(dtable_ptr.dtype.element_ty), mask=names < BUCKETS)


# --- launchers ---------------------------------------------------------------------------------------------------------------

_DISTANCES, _RANGE = Kernel(_attention_distances_kernel), Kernel(_attention_range_kernel)
_FORWARD, _DKDV, _DQ = Kernel(_attention_fwd_kernel), Kernel(_attention_dkdv_kernel), Kernel(_attention_dq_kernel)
_DTABLE, _DTABLE_SUM = Kernel(_attention_dtable_kernel), Kernel(_attention_dtable_sum_kernel)


@functools.lru_cache(maxsize=64)
def near_distances(bidirectional: bool, num_buckets: int, max_distance: int) -> tuple[int, int]:
    """From which distances on, to the left and to the right, all keys share a bucket.

    One more than is computed here: a device's logarithm may round the other way.
    """
    buckets = relative_position_bucket(-torch.arange(max_distance + 1), bidirectional, num_buckets, max_distance)
    near = int((buckets == buckets[-1]).nonzero()[0]) + 1
    return near, near if bidirectional else 0


_MOST_BATCHES = 65535
"""Of a grid's third dimension. With batches in the first one each program would divide three times before it reads anything."""

_BUCKETS: dict[tuple[Any, ...], Tensor] = {}


def _buckets(device: torch.device, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance from ``-reach`` to ``reach``, int32, computed on the device as transformers does.

    Kept: a dozen small kernels would be launched for every call. Not if they are being captured into a graph, whose memory they
    would then be in.
    """
    key = (device, bidirectional, num_buckets, max_distance)
    found = _BUCKETS.get(key)
    if found is None:
        reach = max_distance + _REACH
        distances = torch.arange(-reach, reach + 1, device=device)
        found = relative_position_bucket(distances, bidirectional, num_buckets, max_distance).to(torch.int32)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _BUCKETS[key] = found
    return found


def _base_factor(q: Tensor) -> float:
    """What scores and bias are multiplied by: half precision is computed in base 2, as the device's instruction is."""
    return 1.0 if q.dtype == torch.float32 else _LOG2E


class _Setup(NamedTuple):
    """What forward and backward have in common."""

    q: Tensor
    k: Tensor
    v: Tensor
    batches: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    distances: Tensor | None
    buckets: Tensor | None
    mask: Tensor | None
    pairs: Tensor | None
    ranges: Tensor | None
    range_kind: int
    near: tuple[int, int]
    reach: int
    options: Options
    extras: Extras

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """From the distances to the offsets of packed keys."""
        e = self.extras
        return self.distances, e.slopes, self.mask, self.pairs, self.ranges, e.q_offsets, e.k_offsets

    def numbers(self, blocks: int, sums: Tensor, kept: Tensor | None, first_batch: int = 0) -> tuple[float, ...]:
        """From the first batch to the strides of what dropout kept."""
        o = self.options
        return (
            first_batch,
            o.scale * _base_factor(self.q),
            kept_scale(o.dropout),
            kept_threshold(o.dropout),
            self.heads,
            self.heads // self.kv_heads,
            self.q.shape[0] if self.q.dim() == 3 else self.queries,
            self.k.shape[0] if self.q.dim() == 3 else self.keys,
            blocks,
            self.reach,
            *self.near,
            o.left,
            o.right,
            0 if self.mask is None else self.mask.stride(0),
            *self.pair_strides,
            0 if sums.dim() == 2 else sums.stride(0),
            sums.stride(0) if sums.dim() == 2 else sums.stride(1),
            *((0, 0, 0) if kept is None else (0 if kept.dim() == 4 else kept.stride(0), kept.stride(-4), kept.stride(-3))),
        )

    def launches(self) -> Iterator[tuple[int, int]]:
        """Batches in the third dimension of a grid: the first one, and how many."""
        for first in range(0, self.batches, _MOST_BATCHES):
            yield first, min(self.batches - first, _MOST_BATCHES)

    @property
    def pair_strides(self) -> tuple[int, ...]:
        """Of the mask of pairs, from sequence to query: 0 where one serves all."""
        if self.pairs is None:
            return 0, 0, 0
        return tuple(0 if self.pairs.shape[dim] == 1 else self.pairs.stride(dim) for dim in range(3))

    @property
    def masks(self) -> tuple[Any, ...]:
        """The constants from HAS_MASK to GROUPED."""
        o = self.options
        packed, has_left, has_right = self.q.dim() == 3, o.left != UNLIMITED, o.right != UNLIMITED
        borders = packed, has_left, has_right, o.dropout > 0.0, self.heads != self.kv_heads
        return self.mask is not None, self.pairs is not None, self.range_kind, *borders

    def whole(self, tile: AttentionBlocks) -> tuple[bool, bool]:
        """The constants WHOLE_QUERIES and WHOLE_KEYS: whether all tiles of either lie inside of what there is."""
        dim = self.q.shape[-1]
        if self.q.dim() == 3 or dim != padded_dim(dim):
            return False, False
        return self.queries % tile.queries == 0, self.keys % tile.keys == 0

    @property
    def biases(self) -> tuple[bool, bool]:
        """The constants HAS_TABLE and HAS_SLOPES."""
        return self.distances is not None, self.extras.slopes is not None


def _dense_dim(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of sequence, head and token. Sequences of packed tokens are found by their first token."""
    return (0, x.stride(1), x.stride(0)) if x.dim() == 3 else (x.stride(0), x.stride(1), x.stride(2))


def _in_units(*tensors: Tensor) -> tuple[list[int], int]:
    strides = [stride for x in tensors for stride in _strides(x)]
    unit = stride_unit(*strides)
    return [stride // unit for stride in strides], unit


def _set_up(q: Tensor, k: Tensor, v: Tensor, extras: Extras, options: Options) -> _Setup:
    if extras.q_offsets is not None:
        batches, queries, keys = extras.q_offsets.shape[0] - 1, options.max_queries, options.max_keys
    else:
        batches, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    heads, kv_heads, device = q.shape[1], k.shape[1], q.device
    distances = buckets = ranges = mask = pairs = None
    near, reach, range_kind = (0, 0), 0, 0
    if extras.key_mask is not None:
        mask = extras.key_mask if extras.key_mask.stride(1) == 1 else extras.key_mask.contiguous()
        ranges, range_kind = torch.empty((batches, 2), dtype=torch.int32, device=device), 2
        _RANGE((batches,), (mask, ranges), (keys, mask.stride(0), 1), (1024,), 4)
    elif extras.key_lengths is not None:
        ranges, range_kind = extras.key_lengths.contiguous(), 1
    if extras.mask is not None:
        pairs = _dense_dim(extras.mask)
    extras = extras._replace(
        q_offsets=None if extras.q_offsets is None else extras.q_offsets.contiguous(),
        k_offsets=None if extras.k_offsets is None else extras.k_offsets.contiguous(),
        slopes=None if extras.slopes is None else extras.slopes.contiguous(),
        rng=None if extras.rng is None or not options.dropout else extras.rng.contiguous(),
    )
    q, k, v = _dense_dim(q), _dense_dim(k), _dense_dim(v)
    if extras.table is not None:
        num_buckets = extras.table.shape[0]
        near = near_distances(options.bidirectional, num_buckets, options.max_distance)
        reach = options.max_distance + _REACH
        buckets = _buckets(device, options.bidirectional, num_buckets, options.max_distance)
        width = 2 * reach + 1
        distances = torch.empty((heads, 2, width + 1), dtype=torch.float32, device=device)
        _DISTANCES(
            (heads, -(-width // 512)),
            (extras.table.contiguous(), buckets, distances),
            (_base_factor(q) if not _folds(q, extras, options) else 1.0 / options.scale, heads, width),
            (_chain(q, batches, 2), 512),
            4,
        )
    return _Setup(
        q,
        k,
        v,
        batches,
        heads,
        kv_heads,
        queries,
        keys,
        distances,
        buckets,
        mask,
        pairs,
        ranges,
        range_kind,
        near,
        reach,
        options,
        extras,
    )


def _chain(q: Tensor, batches: int, place: int) -> int:
    """The constant CHAIN (:func:`chain`): 1 for a call's first kernel that reads before it waits, 2 for what follows, or 0.

    T5's forward has two kernels, its backward five. What stands before their loops reads what was there before the call. So
    none of these is a call's first and early, and torch launches nothing between them: what has to be copied is copied before.
    """
    one_launch_each = q.dtype != torch.float32 and batches <= _MOST_BATCHES
    return place if one_launch_each and chain(q) else 0


def _reads_by_instruction(q: Tensor) -> int:
    """The constant ASM: the major compute capability of NVIDIA's device, 0 where its instructions are not.

    A test takes -1: reads in pairs as 9 does, with loads that the interpreter has.
    """
    return compute_capability(q)


def _folds(q: Tensor, extras: Extras, options: Options) -> bool:
    """Whether the exponent has the scale, and the products begin at the bias, which is then divided by it.

    Not where the scale is so small that the quotient's size costs digits of the products that are added to it, nor where the
    sums of products are not in registers (compute capability 10).
    """
    if q.dtype == torch.float32 or extras.slopes is not None:
        return False
    if extras.table is None:
        return options.scale > 0
    return options.scale > 1e-3 and _reads_by_instruction(q) < 10


def _is_bare(extras: Extras, options: Options) -> bool:
    """Whether T5's bias is all there is: see :func:`backward_blocks`."""
    alone = all(x is None for x in extras._replace(table=None, rng=None))
    return extras.table is not None and alone and not options.dropout and options.left == options.right == UNLIMITED


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, *arguments: Any, blocks: AttentionBlocks | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.attention.attention_reference`; ``blocks`` overrides the heuristic."""
    extras, options, _ = split(arguments)
    if q.dtype == torch.float64:
        return attention_reference(q, k, v, *arguments)
    _check(q, k, v, extras, options)
    out, sums, rest, kept = new_like_tokens(q), new_logsumexp(q), new_rest(q, options), new_kept(q, k, extras, options)
    if q.numel() == 0:
        return out, sums, rest, kept
    with on_device(q):
        setup = _set_up(q, k, v, extras, options)
        cut = blocks or forward_blocks(
            q.shape[-1],
            q.element_size(),
            device_facts(q)[1],
            extras.table is not None,
            _reads_by_instruction(q),
            options.dropout > 0.0,
            max(setup.queries, setup.keys),
        )
        count = -(-setup.queries // cut.queries)
        strides, unit = _in_units(setup.q, setup.k, setup.v, out)
        words = kept if kept.numel() else None
        chain = _chain(q, setup.batches, 1 if setup.distances is None else 2)
        for first_batch, batches in setup.launches():
            _FORWARD(
                (count, setup.heads, batches),
                (
                    *(setup.q, setup.k, setup.v, out, sums),
                    rest if rest.numel() else None,
                    words,
                    *setup.pointers,
                    setup.extras.rng,
                ),
                (*setup.numbers(count, sums, words, first_batch), *strides),
                (
                    q.shape[-1],
                    padded_dim(q.shape[-1]),
                    unit,
                    *setup.biases,
                    *setup.masks,
                    _folds(q, extras, options),
                    rest.numel() > 0,
                    words is not None,
                    _reads_by_instruction(q),
                    chain,
                    *setup.whole(cut),
                    cut.queries,
                    cut.keys,
                    cut.stages,
                ),
                cut.warps,
                cut.registers,
            )
    return out, sums, rest, kept


def launch_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rest: Tensor,
    kept: Tensor,
    *arguments: Any,
    blocks: BackwardBlocks | None = None,
    gradients: Gradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.attention.attention_backward_reference`; ``blocks`` overrides the heuristic."""
    extras, options, wanted = split(arguments)
    if q.dtype == torch.float64:
        return attention_backward_reference(dout, q, k, v, out, logsumexp, rest, kept, *arguments, gradients=gradients)
    _check(q, k, v, extras, options)
    check_kept(q, k, kept, extras, options)
    table = extras.table if wanted else None
    # Those of k and v have the same strides, for which the kernel that writes both has one argument each.
    dq, dk, dv = gradients or tuple(new_like_tokens(x) for x in (q, k, v))
    if table is None:
        dtable = torch.empty((0,), dtype=torch.float32, device=q.device)
    else:
        dtable = torch.empty(table.shape, dtype=table.dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dtable.zero_()
    with on_device(q):
        dout, words = _dense_dim(dout), kept.contiguous() if options.dropout else None
        if rest.numel() and rest.stride() != out.stride():
            rest = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(rest)
        setup = _set_up(q, k, v, extras, options)
        dim, width = q.shape[-1], padded_dim(q.shape[-1])
        major = _reads_by_instruction(q)
        cut = blocks or backward_blocks(
            dim,
            q.element_size(),
            device_facts(q)[1],
            _is_bare(extras, options),
            major,
            options.dropout > 0.0,
            extras.mask is not None,
        )
        delta = torch.empty(logsumexp.shape, dtype=torch.float32, device=q.device)
        inputs = (setup.q, setup.k, setup.v, dout)
        state = (logsumexp, delta, words)
        # The diagonals of tiles in which a key is near.
        diagonal = cut.table
        first = -((setup.near[0] + diagonal.keys - 2) // diagonal.keys)
        last = (setup.near[1] + diagonal.queries - 2) // diagonal.keys
        near = first * diagonal.keys, (last + 1) * diagonal.keys
        far = None
        if table is not None:
            count = -(-setup.queries // cut.queries.queries)
            far = torch.empty((setup.batches * setup.heads * count, 2), dtype=torch.float32, device=q.device)
        if q.dtype == torch.float32:
            _walk_keys(setup, dout, dq, None, state, (out, rest), cut, (0, 0), _SUMS_ALONE)
            _walk_keys(setup, dout, dq, far, state, (out, rest), cut, near, _SUMS_ARE_THERE)
        else:
            _walk_keys(setup, dout, dq, far, state, (out, rest), cut, near, _SUMS_OF_RESULT)

        tile = cut.keys
        count = -(-setup.keys // tile.keys)
        strides, unit = _in_units(*inputs, dk)
        chain = _chain(q, setup.batches, 2)
        for first_batch, batches in setup.launches():
            _DKDV(
                (count, setup.kv_heads, batches),
                (*inputs, dk, dv, logsumexp, delta, *setup.pointers, words),
                (options.scale, *setup.numbers(count, logsumexp, words, first_batch), *strides),
                (
                    dim,
                    width,
                    unit,
                    *setup.biases,
                    *setup.masks,
                    _folds(q, extras, options),
                    _reads_by_instruction(q),
                    chain,
                    q.dtype == torch.float32 and setup.heads != setup.kv_heads,
                    *setup.whole(tile),
                    tile.queries,
                    tile.keys,
                    tile.stages,
                ),
                tile.warps,
                tile.registers,
            )

        if table is not None:
            assert far is not None
            _table_gradient(setup, dout, state, far, dtable, cut, (first, last))
    return dq, dk, dv, dtable


_SUMS_OF_RESULT, _SUMS_ALONE, _SUMS_ARE_THERE = range(3)
"""The constant DELTA."""


def _walk_keys(
    setup: _Setup,
    dout: Tensor,
    dq: Tensor,
    far: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor | None],
    result: tuple[Tensor, Tensor],
    cut: BackwardBlocks,
    near: tuple[int, int],
    delta: int,
) -> None:
    """The kernel of ``dq``, which leaves the sum ``delta`` of each query to the others.

    It is ``Σ out · dout``, ``out`` with what was rounded away, made by the program that has read ``dout`` anyway: a kernel of
    its own took 41 µs of BERT's 652 and 22 of T5's 379.

    In float32 it is ``Σ p · dp`` of a walk before, as ``delta`` must be made of the very numbers ``dp`` that it is subtracted
    from, as in eager code: a query that sees one key, or hardly another, has nothing but this difference, and eager code has an
    exact zero there. In half precision the sum over a head's numbers is exact enough.
    """
    tile, count, dim = cut.queries, -(-setup.queries // cut.queries.queries), setup.q.shape[-1]
    inputs = (setup.q, setup.k, setup.v, dout)
    (out, rest), of_result = result, delta == _SUMS_OF_RESULT
    chain = _chain(setup.q, setup.batches, 1 if setup.distances is None else 2)
    strides, unit = _in_units(*inputs, dq, out)
    # The kernels multiply by the share that dropout keeps where all is summed up, and not before it is subtracted.
    share = 1.0 / kept_scale(setup.options.dropout)
    for first_batch, batches in setup.launches():
        _DQ(
            (count, setup.heads, batches),
            (
                *(*inputs, dq, far, *state[:2], *setup.pointers, state[2]),
                out if of_result else None,
                rest if of_result and rest.numel() else None,
            ),
            (
                setup.options.scale,
                *setup.numbers(count, state[0], state[2], first_batch),
                *strides,
                share,
                *near,
                cut.table.queries,
            ),
            (
                dim,
                padded_dim(dim),
                unit,
                *setup.biases,
                *setup.masks,
                _folds(setup.q, setup.extras, setup.options),
                _reads_by_instruction(setup.q),
                chain,
                far is not None,
                delta,
                rest.numel() > 0,
                *setup.whole(tile),
                tile.queries,
                tile.keys,
                tile.stages,
            ),
            tile.warps,
            tile.registers,
        )


def _count_tiles(setup: _Setup, tile: AttentionBlocks, blocks: int, diagonal: int) -> int:
    """As :func:`_tiles_of`."""
    if setup.q.dim() == 3:
        return blocks
    start = diagonal * tile.keys + setup.keys - setup.queries
    low = max(tile.queries - tile.keys - start, 0) // tile.queries
    high = min(max(setup.keys - start + tile.queries - 1, 0) // tile.queries, blocks)
    return max(high - low, 0)


def table_parts(items: Sequence[int], heads: int, processors: int) -> tuple[int, int]:
    """Into how many parts the tiles of each diagonal go: about three programs for each multiprocessor, as long as each other.

    As many run at once of tiles of 64×64, and of larger ones three in turn leave less of the device idle at the end. T5-base
    with 512 tokens: 37 tiles for each of 33 programs of a head, where six parts of each diagonal were up to 43.

    Args:
        items: tiles of each diagonal.
        heads: of the bias.
        processors: of the device.

    Returns:
        The most parts of one diagonal, and the most tiles of a part.
    """
    programs = max(len(items), 3 * processors // heads)
    low, high = 1, max(1, *items)
    while low < high:
        middle = (low + high) // 2
        fits = sum(max(1, -(-count // middle)) for count in items) <= programs
        low, high = (low, middle) if fits else (middle + 1, high)
    return max(1, -(-max(items) // low)), low


def _table_gradient(
    setup: _Setup,
    dout: Tensor,
    state: tuple[Tensor, Tensor, Tensor | None],
    far: Tensor,
    dtable: Tensor,
    cut: BackwardBlocks,
    diagonals: tuple[int, int],
) -> None:
    assert cut.table.queries % cut.queries.queries == 0, "what is far is cut by blocks of queries"
    q, (first, last), tile = setup.q, diagonals, cut.table
    dim, count = q.shape[-1], -(-setup.queries // tile.queries)
    packed, offsets = q.dim() == 3, last - first + 1
    parts, share = table_parts(
        [setup.batches * _count_tiles(setup, tile, count, first + i) for i in range(offsets)], setup.heads, device_facts(q)[0]
    )
    sums = torch.empty((setup.heads, offsets, parts, tile.queries, tile.keys), dtype=torch.float32, device=q.device)
    buckets, span = dtable.shape[0], 1 << (tile.queries + tile.keys - 2).bit_length()
    width = 1 << (buckets - 1).bit_length()
    by_bucket = torch.empty((setup.heads, offsets * parts, width), dtype=torch.float32, device=q.device)
    strides, unit = _in_units(q, setup.k, setup.v, dout)
    distances, _, *pointers = setup.pointers
    logsumexp, delta, words = state
    same = setup.extras.q_offsets is setup.extras.k_offsets
    aligned = same if packed else (setup.keys - setup.queries) % min(tile.keys, 64) == 0
    # A tile on a diagonal lies inside of what there is as a whole, or outside, if it ends where the others do.
    whole = aligned and (setup.keys - setup.queries) % tile.keys == 0 and all(setup.whole(tile))
    chain = _chain(q, setup.batches, 2)
    _DTABLE(
        (parts, offsets, setup.heads),
        (q, setup.k, setup.v, dout, sums, logsumexp, delta, distances, *pointers, words, setup.buckets, by_bucket),
        (setup.options.scale, *setup.numbers(count, logsumexp, words), *strides, setup.batches, share, first),
        (
            dim,
            padded_dim(dim),
            unit,
            *setup.masks,
            aligned,
            _folds(q, setup.extras, setup.options),
            _reads_by_instruction(q),
            chain,
            whole,
            tile.queries,
            tile.keys,
            tile.stages,
            width,
            span,
        ),
        tile.warps,
        tile.registers,
    )
    blocks = -(-setup.queries // cut.queries.queries)
    _DTABLE_SUM(
        (setup.heads,),
        (by_bucket, far, setup.buckets, dtable),
        (setup.heads, setup.batches, blocks, offsets * parts, setup.reach),
        (chain, buckets, width, 16, 1024),
        8,
    )


register_kernels(launch_attention, launch_attention_backward, "CUDA")
