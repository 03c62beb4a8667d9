"""Norms over rows that start anywhere: widths such as 4097, where no row but a few begins at a 16-byte border.

Read as it lies, such a row is read number by number, in a block of the next power of two (8192 for 4097). Here a row is cut:

    |head|           middle            |tail|
    ^ the row        ^ a 16-byte border, for 2-byte numbers and a fortiori for 4-byte ones

The middle starts at the next multiple of eight numbers and is a multiple of eight long, so it is read and written 16 bytes at a
time, and it is never longer than ``dim // 8 * 8``: a block of 4096 holds that of 4097. Head and tail, fewer than eight numbers
each, are one block of 16, the edge.

Where the border falls repeats every eight rows at most. Programs walk over the rows with a stride that is a multiple of eight,
so one program always meets the same cut: it keeps weight and bias in registers, and sums the gradients of both there, as the
kernels for aligned rows do. The edge of the next row is loaded while a row is computed; two bytes are too few for an
asynchronous copy, and its latency would be paid for every row.

One pair of kernels serves both norms: ``CENTRED`` is layer norm. What they compute is said in ``rms_norm.py`` and
``layer_norm.py`` beside this file.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.triton.launch import Kernel, chain, let_next_begin, wait_for_previous
from oslo_fusion.triton.rows import PHASES, RowBlocks, even_programs

_BORDER = 16  # bytes


@triton.jit
def _cut(row, DIM: tl.constexpr):
    """How many numbers of a row stand before the first border, how long the middle is, and the edge's columns and mask."""
    before = (8 - (row % 8) * (DIM % 8) % 8) % 8
    head = tl.minimum(before, DIM)
    middle = (DIM - head) // 8 * 8
    edge = tl.arange(0, 16)
    columns = tl.where(edge < 8, edge, head + middle + edge - 8)
    mask = columns < tl.where(edge < 8, head, DIM)
    return head, middle, columns, mask


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _ragged_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    eps,
    DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    CHAIN: tl.constexpr,
):
    wait_for_previous(CHAIN)
    first, step = tl.program_id(0), tl.num_programs(0)
    head, middle, edge, edge_mask = _cut(first, DIM)
    cols = tl.arange(0, BLOCK)
    mask = cols < middle
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + head + cols, mask=mask, other=0.0)
        edge_weight = tl.load(weight_ptr + edge, mask=edge_mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + head + cols, mask=mask, other=0.0)
        edge_bias = tl.load(bias_ptr + edge, mask=edge_mask, other=0.0)
    start = first.to(tl.int64) * DIM
    next_x = tl.load(x_ptr + start + edge, mask=edge_mask, other=0.0)
    if HAS_RESIDUAL:
        next_residual = tl.load(residual_ptr + start + edge, mask=edge_mask, other=0.0)
    if AHEAD:
        next_middle = tl.load(x_ptr + (start + 7) // 8 * 8 + cols, mask=mask, other=0.0, eviction_policy="evict_last")
    for row in tl.range(first, num_rows, step, num_stages=1):
        start = row * tl.full((), DIM, tl.int64)
        border = (start + 7) // 8 * 8
        next_start = start + step.to(tl.int64) * DIM
        there = row + step < num_rows
        if AHEAD:
            s = next_middle
            next_ptrs = x_ptr + (next_start + 7) // 8 * 8 + cols
            next_middle = tl.load(next_ptrs, mask=mask & there, other=0.0, eviction_policy="evict_last")
        else:
            s = tl.load(x_ptr + border + cols, mask=mask, other=0.0, eviction_policy="evict_last")
        edge_s = next_x
        ahead = next_start + edge
        ahead_mask = edge_mask & there
        next_x = tl.load(x_ptr + ahead, mask=ahead_mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + border + cols, mask=mask, other=0.0)
            s = (s.to(tl.float32) + residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
            edge_s = (edge_s.to(tl.float32) + next_residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
            next_residual = tl.load(residual_ptr + ahead, mask=ahead_mask, other=0.0)
            tl.store(s_ptr + border + cols, s, mask=mask)
            tl.store(s_ptr + start + edge, edge_s, mask=edge_mask)
        s = s.to(tl.float32)
        edge_s = edge_s.to(tl.float32)
        if CENTRED:
            mean = (tl.sum(s) + tl.sum(edge_s)) / DIM
            s = tl.where(mask, s - mean, 0.0)
            edge_s = tl.where(edge_mask, edge_s - mean, 0.0)
            tl.store(mean_ptr + row, mean)
        rstd = tl.rsqrt((tl.sum(s * s) + tl.sum(edge_s * edge_s)) / DIM + eps)
        tl.store(rstd_ptr + row, rstd)
        y = s * rstd
        edge_y = edge_s * rstd
        if HAS_WEIGHT:
            y *= weight.to(tl.float32) + WEIGHT_OFFSET
            edge_y *= edge_weight.to(tl.float32) + WEIGHT_OFFSET
        if HAS_BIAS:
            y += bias.to(tl.float32)
            edge_y += edge_bias.to(tl.float32)
        tl.store(y_ptr + border + cols, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        tl.store(y_ptr + start + edge, edge_y.to(y_ptr.dtype.element_ty), mask=edge_mask)


@triton.jit(do_not_specialize=["num_rows"])
def _ragged_norm_bwd_kernel(
    dy_ptr,
    ds_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    DIM: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DS: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
):
    wait_for_previous(CHAIN)
    first, step = tl.program_id(0), tl.num_programs(0)
    head, middle, edge, edge_mask = _cut(first, DIM)
    cols = tl.arange(0, BLOCK)
    mask = cols < middle
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + head + cols, mask=mask, other=0.0)
        edge_weight = tl.load(weight_ptr + edge, mask=edge_mask, other=0.0)
    if WEIGHT_GRADIENT:
        dweight = tl.zeros((BLOCK,), dtype=tl.float32)
        edge_dweight = tl.zeros((16,), dtype=tl.float32)
    if BIAS_GRADIENT:
        dbias = tl.zeros((BLOCK,), dtype=tl.float32)
        edge_dbias = tl.zeros((16,), dtype=tl.float32)
    start = first.to(tl.int64) * DIM
    next_s = tl.load(s_ptr + start + edge, mask=edge_mask, other=0.0)
    next_dy = tl.load(dy_ptr + start + edge, mask=edge_mask, other=0.0)
    if HAS_DS:
        next_ds = tl.load(ds_ptr + start + edge, mask=edge_mask, other=0.0)
    next_rstd = tl.load(rstd_ptr + first)
    if CENTRED:
        next_mean = tl.load(mean_ptr + first)
    for row in tl.range(first, num_rows, step, num_stages=STAGES):
        start = row * tl.full((), DIM, tl.int64)
        border = (start + 7) // 8 * 8
        s = tl.load(s_ptr + border + cols, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + border + cols, mask=mask, other=0.0)
        if HAS_DS:
            ds = tl.load(ds_ptr + border + cols, mask=mask, other=0.0)
            edge_ds = next_ds
        edge_s, edge_dy, rstd = next_s, next_dy, next_rstd
        there = row + step < num_rows
        ahead = start + step.to(tl.int64) * DIM + edge
        ahead_mask = edge_mask & there
        next_s = tl.load(s_ptr + ahead, mask=ahead_mask, other=0.0)
        next_dy = tl.load(dy_ptr + ahead, mask=ahead_mask, other=0.0)
        if HAS_DS:
            next_ds = tl.load(ds_ptr + ahead, mask=ahead_mask, other=0.0)
        next_rstd = tl.load(rstd_ptr + row + step, mask=there, other=0.0)
        normed = s.to(tl.float32)
        edge_normed = edge_s.to(tl.float32)
        if CENTRED:
            mean = next_mean
            next_mean = tl.load(mean_ptr + row + step, mask=there, other=0.0)
            normed -= mean
            edge_normed -= mean
        normed *= rstd
        edge_normed *= rstd
        g = dy.to(tl.float32)
        edge_g = edge_dy.to(tl.float32)
        if WEIGHT_GRADIENT:
            dweight += g * normed
            edge_dweight += edge_g * edge_normed
        if BIAS_GRADIENT:
            dbias += g
            edge_dbias += edge_g
        if HAS_WEIGHT:
            g *= weight.to(tl.float32) + WEIGHT_OFFSET
            edge_g *= edge_weight.to(tl.float32) + WEIGHT_OFFSET
        along_row = (tl.sum(g * normed) + tl.sum(edge_g * edge_normed)) / DIM
        if CENTRED:
            along_ones = (tl.sum(g) + tl.sum(edge_g)) / DIM
            g -= along_ones
            edge_g -= along_ones
        dx = (g - normed * along_row) * rstd
        edge_dx = (edge_g - edge_normed * along_row) * rstd
        if HAS_DS:
            dx += ds.to(tl.float32)
            edge_dx += edge_ds.to(tl.float32)
        tl.store(dx_ptr + border + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + start + edge, edge_dx.to(dx_ptr.dtype.element_ty), mask=edge_mask)
    let_next_begin(CHAIN)
    partial = first.to(tl.int64) * DIM
    if WEIGHT_GRADIENT:
        tl.store(partials_ptr + partial + head + cols, dweight, mask=mask)
        tl.store(partials_ptr + partial + edge, edge_dweight, mask=edge_mask)
        partial += step.to(tl.int64) * DIM
    if BIAS_GRADIENT:
        tl.store(partials_ptr + partial + head + cols, dbias, mask=mask)
        tl.store(partials_ptr + partial + edge, edge_dbias, mask=edge_mask)


_FORWARD, _BACKWARD = Kernel(_ragged_norm_fwd_kernel), Kernel(_ragged_norm_bwd_kernel)


def can_be_cut(*tensors: Tensor | None) -> bool:
    """Whether all tensors that are walked row by row have their borders at the same numbers: dense, from a border on."""
    return all(t is None or (t.is_contiguous() and t.data_ptr() % _BORDER == 0) for t in tensors)


def programs_of(blocks: RowBlocks, num_rows: int) -> int:
    """How many programs run: a multiple of the phases, or as many as there are rows, each of which then sees one row only."""
    return num_rows if num_rows <= blocks.programs else max(PHASES, blocks.programs // PHASES * PHASES)


def even_programs_of(blocks: RowBlocks, num_rows: int) -> int:
    """The fewest of :func:`programs_of` of which none takes longer: each costs a row of partial sums."""
    most = programs_of(blocks, num_rows)
    return -(-even_programs(num_rows, most) // PHASES) * PHASES if num_rows > most else most


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    s: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
    blocks: RowBlocks,
) -> None:
    """Fill ``y``, ``s`` (with a residual), ``mean`` (then it is a layer norm) and ``rstd``. For tensors that can be cut."""
    dim, num_rows = x.shape[-1], rstd.numel()
    _FORWARD(
        (programs_of(blocks, num_rows),),
        (
            x,
            residual,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            s,
            mean,
            rstd,
        ),
        (num_rows, float(eps)),
        (
            dim,
            mean is not None,
            weight_offset,
            weight is not None,
            bias is not None,
            residual is not None,
            blocks.columns,
            blocks.ahead > 0,
            chain(x),
        ),
        blocks.warps,
    )


def launch_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    weight_offset: float,
    weight_gradient: bool,
    bias_gradient: bool,
    blocks: RowBlocks,
) -> Tensor | None:
    """Fill ``dx``. For tensors that can be cut.

    Returns:
        ``[weight_gradient + bias_gradient, programs, dim]`` float32, for :func:`oslo_fusion.triton.rows.column_sums`; None if
        neither is wanted.
    """
    dim, num_rows, sums = s.shape[-1], rstd.numel(), weight_gradient + bias_gradient
    programs = even_programs_of(blocks, num_rows)
    partials = torch.empty((sums, programs, dim), dtype=torch.float32, device=s.device) if sums else None
    _BACKWARD(
        (programs,),
        (
            dy,
            ds,
            s,
            None if weight is None else weight.contiguous(),
            None if mean is None else mean.contiguous(),
            rstd.contiguous(),
            dx,
            partials,
        ),
        (num_rows,),
        (
            dim,
            mean is not None,
            weight_offset,
            weight is not None,
            ds is not None,
            weight_gradient,
            bias_gradient,
            blocks.columns,
            blocks.stages,
            chain(s, blocks.early),
        ),
        blocks.warps,
    )
    return partials
