"""Rotary position embedding in Triton: q and k in one kernel; the gradient is the same kernel with the map transposed.

A program takes all heads of one token, or a tile of them where there are many, or of several tokens where there are few. Both
numbers of every pair are in its registers, so that q and k are read once and written once, 16 bytes a thread at a time. The
cosines of a token are read once for all its heads; they stay in the L2 cache, as they are the same for all layers. As in the
norms, what was read leaves that cache last and what is written first.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.rope import Like, _check, dense_strides, memory_order, register_kernel, rope_reference
from oslo_fusion.triton.launch import Kernel, chain, chained
from oslo_fusion.triton.rows import device_facts, on_device, stride_unit

_MAX_TOKENS = 1 << 30  # a token's number is a 32-bit integer in the kernel: dividing a 64-bit one costs some 70 instructions


@dataclass(frozen=True)
class RopeBlocks:
    """How the work is cut. All numbers are powers of two.

    Attributes:
        tokens: tokens per program.
        q_heads, k_heads: heads of q and of k per program.
        warps: warps per program.
    """

    tokens: int
    q_heads: int
    k_heads: int
    warps: int

    def tiles(self, heads: int, kv_heads: int) -> int:
        """How many programs share a token."""
        return max(1, -(-heads // self.q_heads), -(-kv_heads // self.k_heads))


def _power_of_two(number: int) -> int:
    """The next one, at least 1."""
    return 1 << max(0, number - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def rope_blocks(
    heads: int, kv_heads: int, dim: int, itemsize: int, interleaved: bool, tokens: int, processors: int
) -> RopeBlocks:
    """How a rotation is cut.

    With many tokens a thread takes 32 bytes of q, 16 of each half, in a small program, so that a multiprocessor holds several
    and one loads while another stores: on an H200 82 µs for 8×4096 tokens of Llama's 32 + 8 heads of 64, where 160 bytes a
    thread took 98. Interleaved pairs are read whole: 45 µs with 128 bytes a thread where 64 took 53. With few tokens, as in a
    decoding step, heads are spread over more programs and a thread takes 16 bytes.

    Args:
        heads, kv_heads: of q and of k.
        dim: numbers in a head.
        itemsize: bytes of a number.
        interleaved: whether pairs are neighbours.
        tokens: batch times sequence.
        processors: multiprocessors of the device.
    """
    row = _power_of_two(dim) * itemsize

    def cut(tiles: int) -> tuple[int, int, int]:
        q_heads, k_heads = _power_of_two(-(-heads // tiles)), _power_of_two(-(-kv_heads // tiles))
        return q_heads, k_heads, (q_heads + k_heads) * row

    def split(limit: int) -> tuple[int, int, int]:
        tiles = 1
        while cut(tiles)[2] > limit and tiles < max(heads, kv_heads):
            tiles *= 2
        return cut(tiles)

    q_heads, k_heads, size = split(32768)
    together = max(1, 4096 // size)
    together = 1 << (together.bit_length() - 1)
    if tokens // together * (-(-heads // q_heads)) >= 4 * processors:
        return RopeBlocks(
            together, q_heads, k_heads, _warps(max(q_heads, k_heads) * row * together, 128 if interleaved else 32)
        )
    q_heads, k_heads, size = split(4096)
    return RopeBlocks(1, q_heads, k_heads, _warps(size, 16))


def _warps(size: int, per_thread: int) -> int:
    return min(8 if size > 8192 else 4, 1 << (max(1, size // (32 * per_thread)).bit_length() - 1))


@triton.jit
def _rows(seq, tokens, HEADS: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr):
    """Batch, position, head and mask of the rows of a tile: token by token, in each head by head."""
    rows = tl.arange(0, TOKENS * TILE)
    heads = tl.program_id(1) * TILE + rows % TILE
    if TOKENS == 1:  # one number for all rows: one division, one row of cosines
        token = tl.program_id(0) + tl.zeros((1,), dtype=tl.int32)
        mask = heads < HEADS
    else:
        token = tl.program_id(0) * TOKENS + rows // TILE
        mask = (heads < HEADS) & (token < tokens)
        token = tl.minimum(token, tokens - 1)
    return (token // seq).to(tl.int64), (token % seq).to(tl.int64), heads.to(tl.int64), mask[:, None]


@triton.jit
def _rotated(
    x_ptrs,
    mask,
    cos_ptrs,
    sin_ptrs,
    ROWS: tl.constexpr,
    ROT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The rotated rows: the first and the second numbers of the pairs, or both in their places, twice, if interleaved.

    Args:
        x_ptrs: ``[rows, 1]``, where the rows begin.
        mask: ``[rows, 1]``.
        cos_ptrs, sin_ptrs: ``[rows, 1]`` or ``[1, 1]``.
    """
    half = tl.arange(0, BLOCK)[None, :]
    half_mask = half < ROT // 2
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)[None, :]
        cols_mask = cols < ROT
        x = tl.load(x_ptrs + cols, mask=mask & cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if PER_PAIR:
            cos = tl.load(cos_ptrs + half, mask=half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            sin = tl.load(sin_ptrs + half, mask=half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            cos, sin = tl.interleave(cos, cos), tl.interleave(sin, sin)
        else:
            cos = tl.load(cos_ptrs + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            sin = tl.load(sin_ptrs + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x * sin if TRANSPOSED else x, (ROWS, BLOCK, 2)))
        turned = tl.interleave(-x2, x1)
        first = x * cos - turned if TRANSPOSED else x * cos + turned * sin
        second = first
    else:
        other_half = half + ROT // 2
        x1 = tl.load(x_ptrs + half, mask=mask & half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x2 = tl.load(x_ptrs + other_half, mask=mask & half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        cos1 = tl.load(cos_ptrs + half, mask=half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        sin1 = tl.load(sin_ptrs + half, mask=half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        cos2, sin2 = cos1, sin1
        if not PER_PAIR:
            cos2 = tl.load(cos_ptrs + other_half, mask=half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            sin2 = tl.load(sin_ptrs + other_half, mask=half_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        first = x1 * cos1 + x2 * sin2 if TRANSPOSED else x1 * cos1 - x2 * sin1
        second = x2 * cos2 - x1 * sin1 if TRANSPOSED else x2 * cos2 + x1 * sin2
    return first, second


@triton.jit
def _store(y_ptrs, first, second, mask, ROT: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    kind = y_ptrs.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)[None, :]
        tl.store(y_ptrs + cols, first.to(kind), mask=mask & (cols < ROT), eviction_policy="evict_first")
    else:
        half = tl.arange(0, BLOCK)[None, :]
        tl.store(y_ptrs + half, first.to(kind), mask=mask & (half < ROT // 2), eviction_policy="evict_first")
        tl.store(y_ptrs + (ROT // 2) + half, second.to(kind), mask=mask & (half < ROT // 2), eviction_policy="evict_first")


@triton.jit(
    do_not_specialize=[
        "q_batch_units",
        "q_head_units",
        "q_seq_units",
        "k_batch_units",
        "k_head_units",
        "k_seq_units",
        "q_out_batch_units",
        "q_out_head_units",
        "q_out_seq_units",
        "k_out_batch_units",
        "k_out_head_units",
        "k_out_seq_units",
        "angle_batch_units",
        "angle_seq_units",
        "seq",
        "tokens",
    ]
)
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_batch_units,
    q_head_units,
    q_seq_units,
    k_batch_units,
    k_head_units,
    k_seq_units,
    q_out_batch_units,
    q_out_head_units,
    q_out_seq_units,
    k_out_batch_units,
    k_out_head_units,
    k_out_seq_units,
    angle_batch_units,
    angle_seq_units,
    seq,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROT: tl.constexpr,
    UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    chained(CHAIN)
    b, s, h, q_mask = _rows(seq, tokens, HEADS, Q_TILE, TOKENS)
    q_ptrs = q_ptr + ((b * q_batch_units + s * q_seq_units + h * q_head_units) * UNIT)[:, None]
    q_out_ptrs = q_out_ptr + ((b * q_out_batch_units + s * q_out_seq_units + h * q_out_head_units) * UNIT)[:, None]
    angles = ((b * angle_batch_units + s * angle_seq_units) * UNIT)[:, None]
    q_first, q_second = _rotated(
        q_ptrs, q_mask, cos_ptr + angles, sin_ptr + angles, TOKENS * Q_TILE, ROT, BLOCK, INTERLEAVED, PER_PAIR, TRANSPOSED
    )
    b, s, h, k_mask = _rows(seq, tokens, KV_HEADS, K_TILE, TOKENS)
    k_ptrs = k_ptr + ((b * k_batch_units + s * k_seq_units + h * k_head_units) * UNIT)[:, None]
    k_out_ptrs = k_out_ptr + ((b * k_out_batch_units + s * k_out_seq_units + h * k_out_head_units) * UNIT)[:, None]
    angles = ((b * angle_batch_units + s * angle_seq_units) * UNIT)[:, None]
    k_first, k_second = _rotated(
        k_ptrs, k_mask, cos_ptr + angles, sin_ptr + angles, TOKENS * K_TILE, ROT, BLOCK, INTERLEAVED, PER_PAIR, TRANSPOSED
    )
    # Everything is read before anything is written: a store keeps later loads from being moved before it.
    if ROT < DIM:
        rest = ROT + tl.arange(0, REST_BLOCK)[None, :]
        q_rest = tl.load(q_ptrs + rest, mask=q_mask & (rest < DIM), other=0.0, eviction_policy="evict_last")
        k_rest = tl.load(k_ptrs + rest, mask=k_mask & (rest < DIM), other=0.0, eviction_policy="evict_last")
    _store(q_out_ptrs, q_first, q_second, q_mask, ROT, BLOCK, INTERLEAVED)
    _store(k_out_ptrs, k_first, k_second, k_mask, ROT, BLOCK, INTERLEAVED)
    if ROT < DIM:
        kind = q_out_ptr.dtype.element_ty
        tl.store(q_out_ptrs + rest, q_rest.to(kind), mask=q_mask & (rest < DIM), eviction_policy="evict_first")
        tl.store(k_out_ptrs + rest, k_rest.to(kind), mask=k_mask & (rest < DIM), eviction_policy="evict_first")


_ROPE = Kernel(_rope_kernel)


@functools.lru_cache(maxsize=4096)
def _layout(
    q_shape: Sequence[int],
    q_strides: Sequence[int],
    k_shape: Sequence[int],
    k_strides: Sequence[int],
    angle_shape: Sequence[int],
    angle_strides: Sequence[int],
    contiguous: bool,
    like: Like,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Strides of the results, the kernel's numbers, and the unit of its strides; kept, as a decoding step asks for the same."""
    q_out, k_out = (
        dense_strides(shape, memory_order(given, contiguous)) for shape, given in zip((q_shape, k_shape), like, strict=True)
    )
    strides = []
    for shape, given in ((q_shape, q_strides), (k_shape, k_strides), (q_shape, q_out), (k_shape, k_out)):
        strides += [0 if shape[i] == 1 else given[i] for i in range(3)]
    strides += [0 if angle_shape[i] == 1 else angle_strides[i] for i in range(2)]
    unit = stride_unit(*strides)
    batch, _, seq, _ = q_shape
    return q_out, k_out, (*(stride // unit for stride in strides), seq, batch * seq), unit


def launch_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    transposed: bool,
    contiguous: bool,
    out_dtype: torch.dtype | None,
    like: Like | None = None,
    blocks: RopeBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.rope.rope_reference`.

    Args:
        q, k, cos, sin, interleaved, per_pair, transposed, contiguous, out_dtype: as there.
        like: strides of tensors that the results lie in memory like, unless contiguous; by default those of ``q`` and ``k``.
        blocks: overrides the heuristic, for tuning.
    """
    _check(q, k, cos, sin, per_pair, out_dtype)
    batch, heads, seq, dim = q.shape
    if torch.float64 in (q.dtype, cos.dtype, out_dtype) or batch * seq > _MAX_TOKENS:
        return rope_reference(q, k, cos, sin, interleaved, per_pair, transposed, contiguous, out_dtype)
    if like is None:
        like = q.stride(), k.stride()
    if q.stride(3) != 1:
        q = q.contiguous()
    if k.stride(3) != 1:
        k = k.contiguous()
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    q_strides, k_strides, numbers, unit = _layout(
        q.shape, q.stride(), k.shape, k.stride(), cos.shape, cos.stride(), contiguous, like
    )
    kind = out_dtype or q.dtype
    q_out = torch.empty_strided(q.shape, q_strides, dtype=kind, device=q.device)
    k_out = torch.empty_strided(k.shape, k_strides, dtype=kind, device=q.device)
    kv_heads, rot_dim, tokens = k.shape[1], cos.shape[2] * (2 if per_pair else 1), batch * seq
    if tokens == 0 or heads + kv_heads == 0:
        return q_out, k_out
    if blocks is None:
        blocks = rope_blocks(heads, kv_heads, dim, q.element_size(), interleaved, tokens, device_facts(q)[0])
    with on_device(q):
        _ROPE(
            (-(-tokens // blocks.tokens), blocks.tiles(heads, kv_heads)),
            (q, k, cos, sin, q_out, k_out),
            numbers,
            (
                heads,
                kv_heads,
                dim,
                rot_dim,
                unit,
                interleaved,
                per_pair,
                transposed,
                blocks.tokens,
                blocks.q_heads,
                blocks.k_heads,
                _power_of_two(rot_dim // 2),
                _power_of_two(dim - rot_dim),
                chain(q),
            ),
            blocks.warps,
        )
    return q_out, k_out


register_kernel(launch_rope, "CUDA")
