"""GELU's backward in Triton: one kernel that reads the pre-activation and the gradient of GELU's output once.

It writes GELU's output, its input's gradient where that of its output was, and on its way adds the input's gradient up by
column, which is the gradient of the bias before it. Four passes over memory; the sum is no fifth.

A program walks down some columns in tiles of rows and keeps its sums in registers. So there are as many programs as are
resident at once, each of which leaves one row of partial sums, and a small kernel adds those in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.triton.glu import _activate_with_slope
from oslo_fusion.triton.launch import Kernel, chain, let_next_begin, wait_for_previous
from oslo_fusion.triton.rows import column_sums, device_facts, on_device

_COLUMNS = 256  # of a tile: 512 bytes in half precision, which memory serves in whole bursts
_WARPS = 4
# Programs of a multiprocessor, which registers allow: 48 to 56 a thread on sm_90, where nine or ten would fit too. So they are
# not launched early, see :func:`oslo_fusion.triton.launch.chain`.
_RESIDENT = 8


@dataclass(frozen=True)
class FeedForwardBlocks:
    """How the kernel is cut.

    Attributes:
        rows: rows per tile.
        columns: numbers of each row in a tile, a power of two.
        warps: warps per program.
        programs: how many programs share the tiles of the same columns.
    """

    rows: int
    columns: int
    warps: int
    programs: int


@functools.lru_cache(maxsize=4096)
def feed_forward_blocks(num_rows: int, dim: int, processors: int) -> FeedForwardBlocks:
    """How ``num_rows`` rows of ``dim`` numbers are cut: a thread has 8 numbers of each tensor, loaded at once.

    Args:
        num_rows: how many rows there are.
        dim: numbers in a row.
        processors: multiprocessors of the device.
    """
    columns = min(_COLUMNS, 1 << max(0, dim - 1).bit_length())
    rows = 8 * 32 * _WARPS // columns
    programs = max(1, _RESIDENT * processors // -(-dim // columns))
    return FeedForwardBlocks(rows, columns, _WARPS, max(1, min(programs, -(-num_rows // rows))))


@triton.jit(do_not_specialize=["num_rows"])
def _gelu_bwd_sums_kernel(
    d_ptr,
    h_ptr,
    act_ptr,
    partials_ptr,
    num_rows,
    ACTIVATION: tl.constexpr,
    HALF: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Each number is read and written by one thread, which reads first: the gradient of the output becomes the input's."""
    wait_for_previous(CHAIN)
    cols = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    cols_mask = cols < DIM
    program = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        rows = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (rows < num_rows) & cols_mask
        at = rows.to(tl.int64) * DIM + cols
        # Nobody reads h again, and the gradient only as what it becomes.
        h = tl.load(h_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d = tl.load(d_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        act, slope = _activate_with_slope(h, ACTIVATION, HALF)
        d = d * slope
        tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), mask=mask)
        tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=mask)
        total += d  # 0 where there is nothing
    let_next_begin(CHAIN)
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(partials_ptr + program.to(tl.int64) * DIM + cols, sums, mask=cols_mask)


_BACKWARD = Kernel(_gelu_bwd_sums_kernel)


def launch_gelu_backward_in_place(
    dact: Tensor, h: Tensor, activation: str, blocks: FeedForwardBlocks | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.feed_forward.gelu_backward_in_place`: ``dact`` becomes the gradient of ``h``.

    Args:
        dact, h: ``[rows, inner]`` of one dtype, not float64, contiguous.
        activation: ``gelu`` or ``gelu_tanh``.
        blocks: overrides the heuristic, for tuning.
    """
    rows, dim = h.shape
    act, dbias = torch.empty(h.shape, dtype=h.dtype, device=h.device), torch.empty(dim, dtype=h.dtype, device=h.device)
    if rows == 0:
        return act, dbias.zero_()
    if blocks is None:
        blocks = feed_forward_blocks(rows, dim, device_facts(h)[0])
    partials = torch.empty((1, blocks.programs, dim), dtype=torch.float32, device=h.device)
    with on_device(h):
        _BACKWARD(
            (-(-dim // blocks.columns), blocks.programs),
            (dact, h, act, partials),
            (rows,),
            (activation, h.element_size() == 2, dim, blocks.rows, blocks.columns, chain(h, early=False)),
            blocks.warps,
        )
        column_sums(partials, dbias)
    return act, dbias
