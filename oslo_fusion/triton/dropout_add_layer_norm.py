"""Bias, dropout, residual addition and layer norm in Triton: a kernel forward; backward one over the rows, one that adds up.

Forward: a program per tile of whole rows, as in ``layer_norm.py``. x and residual are read once; y is written, and s where a
backward follows. The dropout's mask is drawn in registers and kept nowhere.

Backward: few programs, each of which walks over its tiles. It reads dy and s, draws the mask again, and writes the gradients of
residual and x; without dropout these are one tensor. With x̂ = (s - mean) · rstd, g = dy · weight:

    dresidual = rstd · (g - mean(g) - x̂ · mean(g · x̂)),   dx = dropout(dresidual)
    dlinear_bias = Σ over rows of dx,   dweight = Σ over rows of dy · x̂,   dbias = Σ over rows of dy

The three sums are kept in registers for as long as the program lives, then written as rows of partial sums; a second kernel
adds these up in a fixed order. No atomics: the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.dropout import kept_scale, kept_threshold
from oslo_fusion.ops.dropout_add_layer_norm import (
    MAX_DIM,
    _check,
    dropout_add_layer_norm_backward_reference,
    dropout_add_layer_norm_reference,
    register_kernels,
    result_dtypes,
)
from oslo_fusion.triton.dropout import kept_in_rows, random_key
from oslo_fusion.triton.launch import Kernel, chain, chained, let_next_begin, wait_for_previous
from oslo_fusion.triton.rows import (
    RowBlocks,
    as_rows,
    column_sums,
    device_facts,
    forward_blocks,
    must_refer,
    on_device,
    stride_unit,
)

_FEWEST_COLUMNS = 16  # a tile is drawn in quarters
_MAX_WARPS = 16


@functools.lru_cache(maxsize=4096)
def add_norm_forward_blocks(dim: int, itemsize: int, few: bool) -> RowBlocks:
    """How the forward is cut: as that of a norm, since the residual is read beside x and nothing else is new in memory.

    Args:
        dim, itemsize, few: as in :func:`oslo_fusion.triton.rows.forward_blocks`.
    """
    blocks = forward_blocks(dim, itemsize, few)
    return replace(blocks, columns=max(_FEWEST_COLUMNS, blocks.columns))


@functools.lru_cache(maxsize=4096)
def add_norm_backward_blocks(dim: int, itemsize: int, num_rows: int, dropout: bool, processors: int, shared: int) -> RowBlocks:
    """How the backward is cut: as that of a norm, with half the rows in a tile, for it keeps three sums and not two.

    Args:
        dim: numbers in a row, up to 8192.
        itemsize: bytes of a number that is read.
        num_rows: how many rows there are.
        dropout: whether the mask is drawn again, which takes registers.
        processors: multiprocessors of the device.
        shared: bytes of shared memory that a multiprocessor has.
    """
    columns, wide = max(_FEWEST_COLUMNS, triton.next_power_of_2(dim)), itemsize > 2
    # A thread has 16 numbers of each tensor, 48 in sums; 8 in float32, whose numbers are registers of their own when loaded.
    numbers = 8 if wide else 16
    if columns <= 1024:
        warps, per_processor = 4, (4 if wide else 3)
    elif columns <= 4096:
        warps, per_processor = 8, (2 if wide else 1)
    else:
        warps, per_processor = _MAX_WARPS, 1
    rows = max(1, 32 * warps * numbers // columns)
    # At 8192 columns three sums are 48 of a thread's 128 registers: the weight is read again, from the L1 cache.
    reload = columns > 4096
    tile = rows * columns * itemsize * (2 + reload)
    # A tile less than there are stages waits in shared memory. A little of it is needed for reductions.
    stages = next((stages for stages in (3, 2) if (stages - 1) * tile * per_processor <= shared - 8192), 1)
    programs = min(per_processor * processors, -(-num_rows // rows))
    # As in :func:`oslo_fusion.triton.rows.backward_blocks`: more programs fit in float32 up to 2048 columns, 6 for 4 that are
    # wanted at 768. In 16-bit numbers 4 for 3 at 1024 (with a mask 133 registers in Triton 3.6, 128 in 3.7), and without a mask
    # 2 for 1 at 4096.
    early = columns > 2048 if wide else dim != 1024 and (dropout or dim != 4096)
    return RowBlocks(rows, columns, warps, programs, stages, reload, early=early)


@triton.jit(do_not_specialize=["x_row_units", "residual_row_units", "num_rows", "eps", "scale", "threshold"])
def _dropout_add_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    linear_bias_ptr,
    weight_ptr,
    bias_ptr,
    rng_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_units,
    residual_row_units,
    num_rows,
    eps,
    scale,
    threshold,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_LINEAR_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    chained(CHAIN)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    rows_mask = rows < num_rows
    cols_mask = cols < DIM
    mask = rows_mask[:, None] & cols_mask
    x_ptrs = x_ptr + (rows * (x_row_units * UNIT))[:, None] + cols
    h = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    residual = tl.load(residual_ptr + (rows * (residual_row_units * UNIT))[:, None] + cols, mask=mask, other=0.0)
    if HAS_LINEAR_BIAS:
        h += tl.load(linear_bias_ptr + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if DROPOUT:
        key = random_key(rng_ptr, tl.full((), 0, tl.uint32))
        h = tl.where(kept_in_rows(rows, key, threshold, ROWS, BLOCK), h * scale, 0.0)
    # The norm is that of s as it is kept: the backward has no other.
    s = (residual.to(tl.float32) + h).to(s_ptr.dtype.element_ty)
    if KEEP:
        tl.store(s_ptr + (rows * DIM)[:, None] + cols, s, mask=mask)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / DIM
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / DIM + eps)
    tl.store(mean_ptr + rows, mean, mask=rows_mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows_mask)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y_ptrs = y_ptr + (rows * DIM)[:, None] + cols
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["dy_row_units", "s_row_units", "num_rows", "scale", "threshold"])
def _dropout_add_layer_norm_bwd_kernel(
    dy_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    rng_ptr,
    dresidual_ptr,
    dx_ptr,
    partials_ptr,
    dy_row_units,
    s_row_units,
    num_rows,
    scale,
    threshold,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LINEAR_BIAS_GRADIENT: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    RELOAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
):
    wait_for_previous(CHAIN)
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)[None, :]
    cols_mask = cols < DIM
    # The weight is loaded once per row of the tile, in the tile's layout, and there is one sum per row of the tile: see
    # ``layer_norm.py``.
    if HAS_WEIGHT:
        weight_ptrs = tl.broadcast_to(weight_ptr + cols, (ROWS, BLOCK))
        weight_mask = tl.broadcast_to(cols_mask, (ROWS, BLOCK))
        if not RELOAD:
            weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
    if LINEAR_BIAS_GRADIENT:
        dlinear_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if WEIGHT_GRADIENT:
        dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if BIAS_GRADIENT:
        dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if DROPOUT:
        key = random_key(rng_ptr, tl.full((), 0, tl.uint32))
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        rows_mask = rows < num_rows
        mask = rows_mask[:, None] & cols_mask
        s = tl.load(s_ptr + (rows * (s_row_units * UNIT))[:, None] + cols, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + (rows * (dy_row_units * UNIT))[:, None] + cols, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows_mask, other=0.0)[:, None]
        normed = (s.to(tl.float32) - mean) * rstd
        g = dy.to(tl.float32)
        if WEIGHT_GRADIENT:
            dweight += g * normed
        if BIAS_GRADIENT:
            dbias += g
        if HAS_WEIGHT:
            if RELOAD:
                weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0, eviction_policy="evict_last")
            g *= weight.to(tl.float32)
        along_row = tl.sum(g * normed, axis=1)[:, None] / DIM
        along_ones = tl.sum(g, axis=1)[:, None] / DIM
        d = (g - along_ones - normed * along_row) * rstd
        written = (rows * DIM)[:, None] + cols
        tl.store(dresidual_ptr + written, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            d = tl.where(kept_in_rows(rows, key, threshold, ROWS, BLOCK), d * scale, 0.0)
            tl.store(dx_ptr + written, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if LINEAR_BIAS_GRADIENT:
            dlinear_bias += d
    let_next_begin(CHAIN)
    partial = program.to(tl.int64) * DIM + cols
    if LINEAR_BIAS_GRADIENT:
        tl.store(partials_ptr + partial, tl.sum(dlinear_bias, axis=0)[None, :], mask=cols_mask)
        partial += tl.num_programs(0).to(tl.int64) * DIM
    if WEIGHT_GRADIENT:
        tl.store(partials_ptr + partial, tl.sum(dweight, axis=0)[None, :], mask=cols_mask)
        partial += tl.num_programs(0).to(tl.int64) * DIM
    if BIAS_GRADIENT:
        tl.store(partials_ptr + partial, tl.sum(dbias, axis=0)[None, :], mask=cols_mask)


_FORWARD, _BACKWARD = Kernel(_dropout_add_layer_norm_fwd_kernel), Kernel(_dropout_add_layer_norm_bwd_kernel)


def launch_dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout: float,
    eps: float,
    out_dtype: torch.dtype | None,
    blocks: RowBlocks | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference in ``ops/dropout_add_layer_norm.py``; ``blocks`` overrides the heuristic, for tuning.

    Without ``keep`` the sum has no elements: where there is no backward it is a quarter of what would be moved.
    """
    _check(x, residual, linear_bias, weight, bias, rng, dropout, eps, out_dtype)
    dim, shape = x.shape[-1], x.shape
    refer = dim > MAX_DIM or must_refer(x, residual, linear_bias, weight, bias)
    if refer or out_dtype == torch.float64:
        return dropout_add_layer_norm_reference(x, residual, linear_bias, weight, bias, rng, dropout, eps, out_dtype)
    s_dtype, y_dtype = result_dtypes(x, residual, out_dtype)
    num_rows = x.numel() // dim
    y = torch.empty(shape, dtype=y_dtype, device=x.device)
    s = torch.empty(shape if keep else (0,), dtype=s_dtype, device=x.device)
    mean = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return y, s, mean, rstd
    x_rows, x_stride = as_rows(x)
    residual_rows, residual_stride = as_rows(residual)
    unit = stride_unit(x_stride, residual_stride)
    if blocks is None:
        itemsize = max(x.element_size(), residual.element_size())
        blocks = add_norm_forward_blocks(dim, itemsize, num_rows <= 2 * device_facts(x)[0])
    with on_device(x):
        _FORWARD(
            (-(-num_rows // blocks.rows),),
            (
                x_rows,
                residual_rows,
                None if linear_bias is None else linear_bias.contiguous(),
                None if weight is None else weight.contiguous(),
                None if bias is None else bias.contiguous(),
                rng.contiguous() if rng is not None and dropout else None,
                y,
                s,
                mean,
                rstd,
            ),
            (x_stride // unit, residual_stride // unit, num_rows, float(eps), kept_scale(dropout), kept_threshold(dropout)),
            (
                dim,
                unit,
                linear_bias is not None,
                weight is not None,
                bias is not None,
                dropout > 0.0,
                keep,
                blocks.rows,
                blocks.columns,
                chain(x),
            ),
            blocks.warps,
        )
    return y, s, mean, rstd


def launch_dropout_add_layer_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    linear_bias_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    blocks: RowBlocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference in ``ops/dropout_add_layer_norm.py``; ``blocks`` overrides the heuristic, for tuning.

    A gradient that reaches ``s`` by another way is a second derivative's; the reference adds it.
    """
    wanted = (linear_bias_gradient, weight_gradient, bias_gradient)
    dim, vectors = s.shape[-1], (linear_bias, weight, bias)
    if ds is not None or dim > MAX_DIM or must_refer(dy, s, *vectors):
        return dropout_add_layer_norm_backward_reference(
            dy, ds, s, linear_bias, weight, bias, mean, rstd, rng, dropout, x_dtype, residual_dtype, *wanted
        )
    num_rows = s.numel() // dim
    dresidual = torch.empty(s.shape, dtype=residual_dtype, device=s.device)
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device) if dropout else s.new_empty(0, dtype=x_dtype)
    gradients = [
        s.new_empty(0) if vector is None or not gradient else torch.empty(dim, dtype=vector.dtype, device=s.device)
        for vector, gradient in zip(vectors, wanted, strict=True)
    ]
    dlinear_bias, dweight, dbias = gradients
    if num_rows == 0:
        return dresidual, dx, dlinear_bias.zero_(), dweight.zero_(), dbias.zero_()
    sums = [total for total in gradients if total.numel()]
    dy_rows, dy_stride = as_rows(dy)
    s_rows, s_stride = as_rows(s)
    unit = stride_unit(dy_stride, s_stride)
    if blocks is None:
        itemsize = max(s.element_size(), dy.element_size())
        blocks = add_norm_backward_blocks(dim, itemsize, num_rows, dropout > 0.0, *device_facts(s))
    partials = torch.empty((len(sums), blocks.programs, dim), dtype=torch.float32, device=s.device) if sums else None
    with on_device(s):
        _BACKWARD(
            (blocks.programs,),
            (
                dy_rows,
                s_rows,
                None if weight is None else weight.contiguous(),
                mean.contiguous(),
                rstd.contiguous(),
                rng.contiguous() if rng is not None and dropout else None,
                dresidual,
                dx if dropout else None,
                partials,
            ),
            (dy_stride // unit, s_stride // unit, num_rows, kept_scale(dropout), kept_threshold(dropout)),
            (
                dim,
                unit,
                weight is not None,
                dropout > 0.0,
                dlinear_bias.numel() > 0,
                dweight.numel() > 0,
                dbias.numel() > 0,
                blocks.reload,
                blocks.rows,
                blocks.columns,
                blocks.stages,
                chain(s, blocks.early),
            ),
            blocks.warps,
        )
        if partials is not None:
            column_sums(partials, *sums)
    return dresidual, dx, dlinear_bias, dweight, dbias


register_kernels(launch_dropout_add_layer_norm, launch_dropout_add_layer_norm_backward, "CUDA")
