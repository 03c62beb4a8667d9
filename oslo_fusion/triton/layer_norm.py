"""Layer norm in Triton: one kernel forward; backward one over the rows and one that adds up the gradients of weight and bias.

Forward: a program per tile of rows; x, and the residual, are read once, the row stays in registers, s, y, mean and 1/std are
written. The variance is that of centred numbers, not mean(s²) - mean(s)², which cancels where the mean is large: of the row
about its mean, or, in a kernel of its own for wide rows of 16-bit numbers, of each warp's numbers about theirs. There the row
stays packed, two numbers in a register, and is unpacked for each of three passes, so that more rows are under way.

Backward: few programs, each of which walks over its tiles. With x̂ = (s - mean) · rstd, g = dy · (weight + offset):

    ds = rstd · (g - mean(g) - x̂ · mean(g · x̂))  (+ the gradient that reached s by another way)
    dweight = Σ over rows of dy · x̂,  dbias = Σ over rows of dy

The sums over rows are kept in registers for as long as the program lives, then written as rows of partial sums; a second kernel
adds these up in a fixed order. No atomics: the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.layer_norm import (
    _check,
    layer_norm_backward_reference,
    layer_norm_reference,
    register_kernels,
    result_dtypes,
)
from oslo_fusion.triton import ragged_rows
from oslo_fusion.triton.launch import Kernel, chain, chained, let_next_begin, wait_for_previous
from oslo_fusion.triton.rows import (
    PACKED_NUMBERS,
    RAGGED_BACKWARD,
    RAGGED_FORWARD,
    REGISTER_COLUMNS,
    RowBlocks,
    as_rows,
    backward_blocks,
    column_sums,
    device_facts,
    forward_blocks,
    is_ragged,
    must_refer,
    no_weight_blocks,
    on_device,
    packed_forward_blocks,
    ragged_backward_blocks,
    ragged_forward_blocks,
    stride_unit,
    wide_backward_blocks,
)


@triton.jit
def _join(count, mean, squares, other_count, other_mean, other_squares):
    total = count + other_count
    step = other_mean - mean
    share = other_count / total
    return total, mean + step * share, squares + other_squares + step * step * (count * share)


@triton.jit(do_not_specialize=["x_row_units", "residual_row_units", "num_rows", "eps"])
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_units,
    residual_row_units,
    num_rows,
    eps,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
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
    # What was read leaves the L2 cache last and what is written first: 128 µs instead of 132 for 32768×4096 bfloat16.
    x_ptrs = x_ptr + (rows * (x_row_units * UNIT))[:, None] + cols
    s = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy="evict_last")
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + (rows * (residual_row_units * UNIT))[:, None] + cols, mask=mask, other=0.0)
        s = (s.to(tl.float32) + residual.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + (rows * DIM)[:, None] + cols, s, mask=mask)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / DIM
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / DIM + eps)
    tl.store(mean_ptr + rows, mean, mask=rows_mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows_mask)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if WEIGHT_OFFSET != 0.0:
            weight += WEIGHT_OFFSET
        y *= weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y_ptrs = y_ptr + (rows * DIM)[:, None] + cols
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _words(ptr, HALVES: tl.constexpr):
    """Where two 16-bit numbers are read as one word of 32 bits, the pointer to such words."""
    return ptr.to(tl.pointer_type(tl.int32)) if HALVES == 2 else ptr


@triton.jit
def _number(word, HALF: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr = tl.bfloat16, none=0):
    """The first or second number of a word, in float32: an instruction each. The compiler takes two for the second bfloat16.

    A compiler that sees a word unpacked in several passes does it once, and keeps the numbers in twice the registers. With
    another ``none``, which is zero, but not to be known before the kernel runs, it unpacks again.
    """
    if HALVES == 1:
        number = word.to(tl.float32)
    elif DTYPE.is_fp16():
        number = (word >> (16 * HALF + none)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif HALF == 0:
        number = (word << (16 + none)).to(tl.float32, bitcast=True)
    else:
        number = (word & (none - 65536)).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _scale(weight, HALF: tl.constexpr, HALVES: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, DTYPE: tl.constexpr = tl.bfloat16):
    scale = _number(weight, HALF, HALVES, DTYPE)
    if WEIGHT_OFFSET != 0.0:
        scale += WEIGHT_OFFSET
    return scale


@triton.jit(do_not_specialize=["x_row_units", "num_rows", "eps"])
def _layer_norm_packed_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_units,
    num_rows,
    eps,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    CHAIN: tl.constexpr,
):
    chained(CHAIN)
    # A row in parts of BLOCK words of two numbers, as many to each warp. Words, not numbers, stay in registers: of rows of
    # 16384 numbers, by 16 warps, three are under way on a multiprocessor, and not two.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    PARTS: tl.constexpr = DIM // (2 * BLOCK)
    COUNT: tl.constexpr = DIM // WARPS
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    none = (num_rows < 0).to(tl.int32)
    x_ptrs = _words(x_ptr, 2) + row * (x_row_units * (UNIT // 2)) + cols
    words = ()
    for part in tl.static_range(PARTS):
        words = words + (tl.load(x_ptrs + part * BLOCK, eviction_policy="evict_last"),)  # noqa: RUF005
    # A warp makes the mean of its own numbers and their squared distances from that, in two passes, within itself; then these
    # are joined over the warps (Chan, Golub, LeVeque 1979): one exchange between warps. That does not cancel as mean(s²) -
    # mean(s)² would. But the rounding of the warps' means is in the distances between them, too much for float32 rows far from
    # zero: it is for 16-bit numbers.
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += _number(words[part], 0, 2, DTYPE) + _number(words[part], 1, 2, DTYPE)
    own_mean = tl.sum(tl.reshape(total, (WARPS, BLOCK // WARPS)), axis=1) / COUNT
    about = tl.reshape(tl.broadcast_to(own_mean[:, None], (WARPS, BLOCK // WARPS)), (BLOCK,))
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        first = _number(words[part], 0, 2, DTYPE, none) - about
        second = _number(words[part], 1, 2, DTYPE, none) - about
        squares += first * first + second * second
    own_squares = tl.sum(tl.reshape(squares, (WARPS, BLOCK // WARPS)), axis=1)
    count = tl.full((WARPS,), COUNT, tl.float32)
    _, mean, all_squares = tl.reduce((count, own_mean, own_squares), 0, _join)
    rstd = tl.rsqrt(all_squares / DIM + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for part in tl.static_range(PARTS):
        first = (_number(words[part], 0, 2, DTYPE, -none) - mean) * rstd
        second = (_number(words[part], 1, 2, DTYPE, -none) - mean) * rstd
        if HAS_WEIGHT:
            weight = tl.load(_words(weight_ptr, 2) + part * BLOCK + cols, eviction_policy="evict_last")
            first *= _scale(weight, 0, 2, WEIGHT_OFFSET, DTYPE)
            second *= _scale(weight, 1, 2, WEIGHT_OFFSET, DTYPE)
        if HAS_BIAS:
            bias = tl.load(_words(bias_ptr, 2) + part * BLOCK + cols, eviction_policy="evict_last")
            first += _number(bias, 0, 2, DTYPE)
            second += _number(bias, 1, 2, DTYPE)
        y_ptrs = y_ptr + row * DIM + part * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(y_ptrs, tl.interleave(first, second).to(y_ptr.dtype.element_ty), eviction_policy="evict_first")


@triton.jit(do_not_specialize=["dy_row_units", "ds_row_units", "s_row_units", "num_rows"])
def _layer_norm_bwd_kernel(
    dy_ptr,
    ds_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    dy_row_units,
    ds_row_units,
    s_row_units,
    num_rows,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DS: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
):
    wait_for_previous(CHAIN)
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)[None, :]
    cols_mask = cols < DIM
    # The weight is loaded once per row of the tile, in the tile's layout: as a single row it would have one of its own, and
    # every tile would be converted to that through shared memory.
    if HAS_WEIGHT:
        weight_ptrs = tl.broadcast_to(weight_ptr + cols, (ROWS, BLOCK))
        weight = tl.load(weight_ptrs, mask=tl.broadcast_to(cols_mask, (ROWS, BLOCK)), other=0.0)
    # One sum per row of the tile: adding up the tile's rows at every step would cross the warps.
    if WEIGHT_GRADIENT:
        dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if BIAS_GRADIENT:
        dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        rows_mask = rows < num_rows
        mask = rows_mask[:, None] & cols_mask
        s_ptrs = s_ptr + (rows * (s_row_units * UNIT))[:, None] + cols
        dy_ptrs = dy_ptr + (rows * (dy_row_units * UNIT))[:, None] + cols
        s = tl.load(s_ptrs, mask=mask, other=0.0)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows_mask, other=0.0)[:, None]
        normed = (s.to(tl.float32) - mean) * rstd
        g = dy.to(tl.float32)
        if WEIGHT_GRADIENT:
            dweight += g * normed
        if BIAS_GRADIENT:
            dbias += g
        if HAS_WEIGHT:
            scale = weight.to(tl.float32)
            if WEIGHT_OFFSET != 0.0:
                scale += WEIGHT_OFFSET
            g *= scale
        along_row = tl.sum(g * normed, axis=1)[:, None] / DIM
        along_ones = tl.sum(g, axis=1)[:, None] / DIM
        dx = (g - along_ones - normed * along_row) * rstd
        if HAS_DS:
            dx += tl.load(ds_ptr + (rows * (ds_row_units * UNIT))[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + (rows * DIM)[:, None] + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    let_next_begin(CHAIN)
    partial = program.to(tl.int64) * DIM + cols
    if WEIGHT_GRADIENT:
        tl.store(partials_ptr + partial, tl.sum(dweight, axis=0)[None, :], mask=cols_mask)
        partial += tl.num_programs(0).to(tl.int64) * DIM
    if BIAS_GRADIENT:
        tl.store(partials_ptr + partial, tl.sum(dbias, axis=0)[None, :], mask=cols_mask)


@triton.jit
def _both(first, second, other_first, other_second):
    return first + other_first, second + other_second


@triton.jit(do_not_specialize=["dy_row_units", "ds_row_units", "s_row_units", "num_rows"])
def _layer_norm_wide_bwd_kernel(
    dy_ptr,
    ds_ptr,
    s_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partials_ptr,
    dy_row_units,
    ds_row_units,
    s_row_units,
    num_rows,
    DIM: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DS: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    AHEAD: tl.constexpr,
    HALVES: tl.constexpr,
    CHAIN: tl.constexpr,
):
    wait_for_previous(CHAIN)
    # The two sums of 16384 columns are half of all registers, so a row cannot stay there. It is read twice, part by part: for
    # its means, then for its gradient, and the second time it is in the L1 cache still. One row at a time for that reason.
    # The first AHEAD parts of a row are loaded while the row before it is reduced and finished: memory would be idle there.
    # Where a word holds two numbers (HALVES), columns are words, and the sums of the first numbers stand before the others'.
    DTYPE: tl.constexpr = s_ptr.dtype.element_ty
    program, step = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    words: tl.constexpr = DIM // HALVES
    unit: tl.constexpr = UNIT // HALVES
    s_words, dy_words = _words(s_ptr, HALVES), _words(dy_ptr, HALVES)
    if HAS_WEIGHT:
        weight_words = _words(weight_ptr, HALVES)
    dweights = (tl.zeros((BLOCK,), dtype=tl.float32),) * (PARTS * HALVES)
    dbiases = (tl.zeros((BLOCK,), dtype=tl.float32),) * (PARTS * HALVES)
    next_mean = tl.load(mean_ptr + program)
    next_rstd = tl.load(rstd_ptr + program)
    s_ptrs = s_words + program.to(tl.int64) * (s_row_units * unit) + cols
    dy_ptrs = dy_words + program.to(tl.int64) * (dy_row_units * unit) + cols
    ahead_s = ()
    ahead_dy = ()
    for part in tl.static_range(AHEAD):
        mask = part * BLOCK + cols < words
        ahead_s = ahead_s + (tl.load(s_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_last"),)  # noqa: RUF005
        ahead_dy = ahead_dy + (tl.load(dy_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_last"),)  # noqa: RUF005
    for row in tl.range(program, num_rows, step, num_stages=1):
        mean, rstd = next_mean, next_rstd
        there = row + step < num_rows
        next_mean = tl.load(mean_ptr + row + step, mask=there, other=0.0)
        next_rstd = tl.load(rstd_ptr + row + step, mask=there, other=0.0)
        wide_row = row * tl.full((), 1, tl.int64)
        next_row = wide_row + step
        s_ptrs = s_words + wide_row * (s_row_units * unit) + cols
        dy_ptrs = dy_words + wide_row * (dy_row_units * unit) + cols
        next_s_ptrs = s_words + next_row * (s_row_units * unit) + cols
        next_dy_ptrs = dy_words + next_row * (dy_row_units * unit) + cols
        along_row = tl.zeros((BLOCK // VECTOR,), dtype=tl.float32)
        along_ones = tl.zeros((BLOCK // VECTOR,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            mask = part * BLOCK + cols < words
            if part >= AHEAD:
                s = tl.load(s_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_last")
                dy = tl.load(dy_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_last")
            else:
                s = ahead_s[part]
                dy = ahead_dy[part]
            if HAS_WEIGHT:
                weight = tl.load(weight_words + part * BLOCK + cols, mask=mask, other=0, eviction_policy="evict_last")
            for half in tl.static_range(HALVES):
                g = _number(dy, half, HALVES)
                if HAS_WEIGHT:
                    g *= _scale(weight, half, HALVES, WEIGHT_OFFSET)
                centred = _number(s, half, HALVES) if HALVES == 2 else s.to(tl.float32) - mean
                # What a thread has loaded at once it adds up at once: sums that are as wide as a part would spill.
                along_row += tl.sum(tl.reshape(g * centred, (BLOCK // VECTOR, VECTOR)), axis=1)
                along_ones += tl.sum(tl.reshape(g, (BLOCK // VECTOR, VECTOR)), axis=1)
        ahead_s = ()
        ahead_dy = ()
        for part in tl.static_range(AHEAD):
            mask = (part * BLOCK + cols < words) & there
            next_s = tl.load(next_s_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_last")
            next_dy = tl.load(next_dy_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_last")
            ahead_s = ahead_s + (next_s,)  # noqa: RUF005
            ahead_dy = ahead_dy + (next_dy,)  # noqa: RUF005
        sum_along_row, sum_along_ones = tl.reduce((along_row, along_ones), 0, _both)
        if HALVES == 2:  # with a multiplication with addition a number less, and as much as bfloat16 can tell
            sum_along_row -= mean * sum_along_ones
        # ds = rstd · (g - mean(g) - x̂ · mean(g · x̂)), with two multiplications with addition a number.
        of_centred = -sum_along_row * rstd * rstd * rstd / DIM
        of_one = -sum_along_ones * rstd / DIM
        new_dweights = ()
        new_dbiases = ()
        for part in tl.static_range(PARTS):
            mask = part * BLOCK + cols < words
            s = tl.load(s_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_first")
            dy = tl.load(dy_ptrs + part * BLOCK, mask=mask, other=0, eviction_policy="evict_first")
            if HAS_WEIGHT:
                weight = tl.load(weight_words + part * BLOCK + cols, mask=mask, other=0, eviction_policy="evict_last")
            if HAS_DS:
                ds_ptrs = _words(ds_ptr, HALVES) + wide_row * (ds_row_units * unit) + cols
                ds = tl.load(ds_ptrs + part * BLOCK, mask=mask, other=0)
            for half in tl.static_range(HALVES):
                g = _number(dy, half, HALVES)
                centred = _number(s, half, HALVES) - mean
                dweight, dbias = dweights[part * HALVES + half], dbiases[part * HALVES + half]
                if BIAS_GRADIENT:
                    dbias += g
                g *= rstd
                if WEIGHT_GRADIENT:
                    dweight += g * centred
                new_dweights = new_dweights + (dweight,)  # noqa: RUF005
                new_dbiases = new_dbiases + (dbias,)  # noqa: RUF005
                dx = centred * of_centred + of_one
                dx += g * _scale(weight, half, HALVES, WEIGHT_OFFSET) if HAS_WEIGHT else g
                if HAS_DS:
                    dx += _number(ds, half, HALVES)
                if half == 0:
                    first_dx = dx
            if HALVES == 2:
                both = tl.interleave(first_dx, dx).to(DTYPE)
                both_cols = part * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
                tl.store(dx_ptr + wide_row * DIM + both_cols, both, mask=both_cols < DIM)
            else:
                tl.store(dx_ptr + wide_row * DIM + part * BLOCK + cols, dx.to(DTYPE), mask=mask)
        dweights = new_dweights
        dbiases = new_dbiases
    let_next_begin(CHAIN)
    for part in tl.static_range(PARTS):
        mask = part * BLOCK + cols < words
        for half in tl.static_range(HALVES):
            partial = program.to(tl.int64) * DIM + half * words + part * BLOCK + cols
            if WEIGHT_GRADIENT:
                tl.store(partials_ptr + partial, dweights[part * HALVES + half], mask=mask)
                partial += step.to(tl.int64) * DIM
            if BIAS_GRADIENT:
                tl.store(partials_ptr + partial, dbiases[part * HALVES + half], mask=mask)


_WIDE_BACKWARD = Kernel(_layer_norm_wide_bwd_kernel)
_FORWARD, _BACKWARD = Kernel(_layer_norm_fwd_kernel), Kernel(_layer_norm_bwd_kernel)
_PACKED_FORWARD = Kernel(_layer_norm_packed_fwd_kernel)


def launch_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
    blocks: RowBlocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.layer_norm.layer_norm_reference`; ``blocks`` overrides the heuristic, for tuning."""
    _check(x, weight, bias, residual, eps, out_dtype)
    if out_dtype == torch.float64 or must_refer(x, weight, bias, residual):
        return layer_norm_reference(x, weight, bias, residual, eps, weight_offset, out_dtype)
    s_dtype, y_dtype = result_dtypes(x, residual, out_dtype)
    dim, shape = x.shape[-1], x.shape
    num_rows = x.numel() // dim
    y = torch.empty(shape, dtype=y_dtype, device=x.device)
    mean = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    s = x if residual is None else torch.empty(shape, dtype=s_dtype, device=x.device)
    if num_rows == 0:
        return y, s, mean, rstd
    vectors = (weight is not None) + (bias is not None)
    if (
        blocks is None
        and is_ragged(dim, RAGGED_FORWARD, x.element_size(), y.element_size())
        and ragged_rows.can_be_cut(x, residual, y, s)
    ):
        blocks = ragged_forward_blocks(dim, x.element_size(), vectors, residual is not None, device_facts(x)[0])
    if blocks is not None and blocks.ragged:
        with on_device(x):
            added = None if residual is None else s
            ragged_rows.launch_forward(x, residual, weight, bias, y, added, mean, rstd, eps, weight_offset, blocks)
        return y, s, mean, rstd
    rows, stride = as_rows(x)
    residual_rows, residual_stride = (None, stride) if residual is None else as_rows(residual)
    unit = stride_unit(stride, residual_stride)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    # Not where the result is wider: of a row far from zero, the joined mean is exact to a few units of float32's last place.
    packable = residual is None and y_dtype == x.dtype and unit > 1 and (dim > REGISTER_COLUMNS or blocks is not None)
    packable = packable and _are_words(rows, weight, bias)
    if blocks is None:
        few = num_rows <= 2 * device_facts(x)[0]
        blocks = packed_forward_blocks(dim) if packable and not few else None
        blocks = blocks or forward_blocks(dim, x.element_size(), few, vectors)
    with on_device(x):
        if blocks.packed and packable:
            part = blocks.warps * PACKED_NUMBERS // 2
            assert dim % (2 * part) == 0, "warps would have different shares"
            _PACKED_FORWARD(
                (num_rows,),
                (rows, weight, bias, y, mean, rstd),
                (stride // unit, num_rows, float(eps)),
                (dim, unit, weight_offset, weight is not None, bias is not None, part, blocks.warps, chain(x)),
                blocks.warps,
            )
        else:
            _FORWARD(
                (-(-num_rows // blocks.rows),),
                (rows, residual_rows, weight, bias, y, None if residual is None else s, mean, rstd),
                (stride // unit, residual_stride // unit, num_rows, float(eps)),
                (
                    dim,
                    unit,
                    weight_offset,
                    weight is not None,
                    bias is not None,
                    residual is not None,
                    blocks.rows,
                    blocks.columns,
                    chain(x),
                ),
                blocks.warps,
            )
    return y, s, mean, rstd


def _are_words(*tensors: Tensor | None) -> bool:
    """Whether all have one 16-bit dtype and lie at borders of 32 bits, so that two numbers can be read as one word."""
    there = [t for t in tensors if t is not None]
    dtype = there[0].dtype
    return dtype.itemsize == 2 and all(t.dtype == dtype and t.data_ptr() % 4 == 0 for t in there)


def launch_layer_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    weight_gradient: bool,
    bias_gradient: bool,
    blocks: RowBlocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.layer_norm.layer_norm_backward_reference`; ``blocks`` overrides the heuristic, for tuning."""
    if must_refer(dy, ds, s, weight, bias):
        return layer_norm_backward_reference(dy, ds, s, weight, bias, mean, rstd, weight_offset, weight_gradient, bias_gradient)
    dim = s.shape[-1]
    num_rows = s.numel() // dim
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dweight, dbias = s.new_empty(0), s.new_empty(0)
    if weight is not None and weight_gradient:
        dweight = torch.empty(dim, dtype=weight.dtype, device=s.device)
    if bias is not None and bias_gradient:
        dbias = torch.empty(dim, dtype=bias.dtype, device=s.device)
    sums = [total for total in (dweight, dbias) if total.numel()]
    if num_rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    if (
        blocks is None
        and dim <= REGISTER_COLUMNS
        and is_ragged(dim, RAGGED_BACKWARD, s.element_size(), dy.element_size())
        and ragged_rows.can_be_cut(dy, ds, s, dx)
    ):
        loads = 2 if ds is None else 3
        blocks = ragged_backward_blocks(dim, s.element_size(), loads, len(sums), *device_facts(s))
    if blocks is not None and blocks.ragged:
        wanted = (dweight.numel() > 0, dbias.numel() > 0)
        with on_device(s):
            partials = ragged_rows.launch_backward(dy, ds, s, weight, mean, rstd, dx, weight_offset, *wanted, blocks)
            if partials is not None:
                column_sums(partials, *sums)
        return dx, dweight, dbias
    dy_rows, dy_stride = as_rows(dy)
    ds_rows, ds_stride = (None, dy_stride) if ds is None else as_rows(ds)
    s_rows, s_stride = as_rows(s)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    unit = stride_unit(dy_stride, ds_stride, s_stride)
    together = bool(sums) and dim <= REGISTER_COLUMNS
    # Asked in this order: narrow rows need not look further. Of float16 the machine itself reads both numbers of a word.
    wide_words = dim > REGISTER_COLUMNS and s.dtype == torch.bfloat16 and unit % 2 == 0 and dim % 2 == 0
    halves = 2 if wide_words and _are_words(s_rows, dy_rows, ds_rows, weight) else 1
    if blocks is None and together:
        loads, itemsize = 2 if ds is None else 3, s.element_size()
        blocks = backward_blocks(dim, itemsize, itemsize, num_rows, loads, len(sums), *device_facts(s))
    elif blocks is None and sums:
        blocks = wide_backward_blocks(s.element_size(), halves, ds is not None, num_rows, device_facts(s)[0])
    elif blocks is None:
        blocks = no_weight_blocks(dim, s.element_size(), num_rows <= 2 * device_facts(s)[0])
    if blocks.reload:
        partials = torch.empty((len(sums), blocks.programs, dim), dtype=torch.float32, device=s.device)
        with on_device(s):
            _WIDE_BACKWARD(
                (blocks.programs,),
                (dy_rows, ds_rows, s_rows, None if weight is None else weight.contiguous(), mean, rstd, dx, partials),
                (dy_stride // unit, ds_stride // unit, s_stride // unit, num_rows),
                (
                    dim,
                    unit,
                    weight_offset,
                    weight is not None,
                    ds is not None,
                    dweight.numel() > 0,
                    dbias.numel() > 0,
                    -(-dim // blocks.columns),
                    blocks.columns // halves,
                    min(16 // s.element_size(), unit, blocks.columns // (32 * blocks.warps)) // halves,
                    blocks.ahead,
                    halves,
                    chain(s, blocks.early),
                ),
                blocks.warps,
            )
            column_sums(partials, *sums, halves=halves)
        return dx, dweight, dbias
    programs = blocks.programs or -(-num_rows // blocks.rows)
    partials = torch.empty((len(sums), programs, dim), dtype=torch.float32, device=s.device) if together else None
    with on_device(s):
        _BACKWARD(
            (programs,),
            (
                dy_rows,
                ds_rows,
                s_rows,
                None if weight is None else weight.contiguous(),
                mean,
                rstd,
                dx,
                partials,
            ),
            (dy_stride // unit, ds_stride // unit, s_stride // unit, num_rows),
            (
                dim,
                unit,
                weight_offset,
                weight is not None,
                ds is not None,
                together and dweight.numel() > 0,
                together and dbias.numel() > 0,
                blocks.rows,
                blocks.columns,
                blocks.stages,
                chain(s, blocks.early),
            ),
            blocks.warps,
        )
        if partials is not None:
            column_sums(partials, *sums)
    return dx, dweight, dbias


def _launch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = launch_layer_norm(x, weight, bias, None, eps, weight_offset, out_dtype)
    return y, mean, rstd


def _launch_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_layer_norm(x, weight, bias, residual, eps, weight_offset, out_dtype)


register_kernels(_launch_norm, _launch_add_norm, launch_layer_norm_backward, "CUDA")
