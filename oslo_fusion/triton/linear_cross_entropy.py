"""Linear cross entropy: cuBLAS for the three matmuls of a chunk of rows, and one Triton kernel between them.

A chunk's logits go into one buffer that all chunks share. A program takes a row: it reads it once for the running maximum and
sum of the softmax in float32, then again, from L2, to write the gradient of the logits over the logits. From these cuBLAS makes
the rows of ``dhidden``, and adds to ``dweight``, which stays in float32 until backward rounds it.

The gradients written are those of the summed loss: between -1 and 1 a logit, so that half precision keeps them whatever the
number of tokens is; dividing by it, and the loss scale of mixed precision, come in the scaling that backward does anyway.

Rows of the buffer lie a multiple of 64 numbers apart, and a weight whose number of rows is no multiple of 8 is copied with
zeros below: at GPT-2's 50257 words cuBLAS would otherwise fall back to kernels that are 5 to 7 times slower (NOTES.md), and
ours would read one number at a time. The copy is 77 MB there.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.ops.linear_cross_entropy import (
    LabelCount,
    Options,
    _check,
    _sum_dtype,
    check_labels,
    linear_cross_entropy_reference,
    register_kernels,
)
from oslo_fusion.triton.launch import Kernel
from oslo_fusion.triton.rows import on_device, stride_unit

_PADDING = 64  # numbers; 128 bytes in half precision, a line of the cache
_ALIGNMENT = 8  # numbers; 16 bytes in half precision, what the tensor cores' loads and stores want
_ROW_GROUP = 128  # rows of a matmul's tile: a chunk of another size leaves part of its last tiles idle
_LEAST_CHUNK = 256 << 20
_MAX_WARPS = 16 if torch.version.hip else 32  # 1024 threads, the most that a block has


@dataclass(frozen=True)
class LossBlocks:
    """How the kernel over a chunk's rows is cut.

    Attributes:
        columns: logits that a program has in registers at a time.
        warps: warps per program.
    """

    columns: int
    warps: int


def rest_columns(vocab: int, columns: int) -> int:
    """Columns, a power of two, that hold what is left of a row after whole blocks of ``columns`` words, with its padding."""
    left = padded_width(vocab) - vocab // columns * columns
    return 1 << (left - 1).bit_length() if vocab % columns else 0


def padded_width(vocab: int) -> int:
    """Numbers from one row of the logits' buffer to the next."""
    return -(-vocab // _PADDING) * _PADDING


def chunk_rows(rows: int, dim: int, vocab: int, itemsize: int, wide: bool) -> int:
    """How many rows a chunk has, so that all chunks are about equal and the buffer is no larger than allowed.

    The buffer may take as much as the weight does: it is gone when backward makes the rounded gradient of the weight, which is
    as large. A quarter of that if the sum is in half precision, where backward makes nothing. And 256 MiB, or a quarter of it,
    where the weight is small: fewer chunks read and write the sum less often.

    Args:
        rows: how many there are.
        dim: numbers in a row of ``hidden``.
        vocab: words.
        itemsize: bytes of a logit.
        wide: the weight's gradient is summed in float32.
    """
    weight = vocab * dim * itemsize
    allowed = max(weight if wide else weight // 4, _LEAST_CHUNK if wide else _LEAST_CHUNK // 4)
    most = max(_ROW_GROUP, allowed // (padded_width(vocab) * itemsize) // _ROW_GROUP * _ROW_GROUP)
    chunks = max(1, -(-rows // most))
    return max(1, min(rows, -(-rows // (chunks * _ROW_GROUP)) * _ROW_GROUP))


@functools.lru_cache(maxsize=256)
def loss_blocks(vocab: int, most_warps: int = _MAX_WARPS) -> LossBlocks:
    """How the kernel is cut: a program takes a row.

    From a sweep on one H200, 2048 rows: 50257 words 0.125 ms in blocks of 4096 with 16 warps, 0.157 with 32 warps and blocks of
    8192; 128256 words, which do not wait in L2 for their second read, 0.414 and 0.357. Programs that walk over rows, four on a
    multiprocessor, 0.137 and 0.409.

    Args:
        vocab: words.
        most_warps: that a program may have.
    """
    columns, warps = (8192, 32) if vocab > 65536 else (4096, 16)
    columns = min(columns, 1 << max(7, (vocab - 1).bit_length()))
    return LossBlocks(columns, max(4, min(warps, most_warps, columns // 256)))


@triton.jit
def _tanh(x):
    # Near zero the quotient would leave a few bits of a small result; the series' first missing term is 6e-8 of it at 0.2.
    square = x * x
    near = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.04, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _logits(x, bias_ptr, cols, mask, SCALE: tl.constexpr, CAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    z = x.to(tl.float32)
    if HAS_BIAS:
        if mask is None:
            z += tl.load(bias_ptr + cols).to(tl.float32)
        else:
            z += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        z *= SCALE
    if CAP != 0.0:
        z = _tanh(z / CAP) * CAP
    return z


@triton.jit
def _block(
    row_ptr,
    bias_ptr,
    start,
    WIDTH: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Logits of a block, and their columns. WHOLE: all of them lie before WIDTH. KEEP: they are read once more."""
    cols = start + tl.arange(0, BLOCK)
    mask = None if WHOLE else cols < WIDTH
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if WHOLE:
        x = tl.load(row_ptr + cols, eviction_policy=policy)
    else:
        x = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy=policy)
    return _logits(x, bias_ptr, cols, mask, SCALE, CAP, HAS_BIAS), cols


# Where a maximum begins. Not at -inf: where all words of a group are forbidden, -inf - -inf would make NaN. And a power of two,
# whose product in _powers is not rounded: what rounding leaves of -10³⁸, 10³¹, would be a power of infinity.
_LOWEST = tl.constexpr(-(2.0**126))
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _powers(z, top):
    """``exp(z - top)``, one multiply-add each. ``top``'s product is rounded alike in all and in their sum: no share has it."""
    return tl.exp2(z * _LOG2E - top * _LOG2E)


@triton.jit
def _softmax_step(z, top, total, GROUP: tl.constexpr):
    """The running maximum and sum of as many numbers as ``z`` has groups of neighbours, which lie in one thread's registers."""
    grouped = tl.reshape(z, (z.shape[0] // GROUP, GROUP))
    higher = tl.maximum(top, tl.max(grouped, axis=1))
    total = total * _powers(top, higher) + tl.sum(_powers(grouped, higher[:, None]), axis=1)
    return higher, total


@triton.jit
def _gradient(
    z,
    cols,
    label,
    start,
    top,
    share,
    VOCAB: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Not exp(z - logsumexp): the rounding of that number would be an error common to all words of the row.
    d = _powers(z, top) * share
    if SMOOTHING != 0.0:
        d -= SMOOTHING / VOCAB
    if (label >= start) & (label < start + BLOCK):
        d = tl.where(cols == label, d - (1.0 - SMOOTHING), d)
    if CAP != 0.0:
        d *= 1.0 - (z / CAP) * (z / CAP)
    if SCALE != 1.0:
        d *= SCALE
    return d


@triton.jit(do_not_specialize=["ignore_index"])
def _loss_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    losses_ptr,
    ignore_index,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CAP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    # Blocks that are words as a whole, then REST columns, a power of two, for what is left. There loads and stores reach into
    # the padding (WIDTH), which leaves them whole lines; what counts ends at VOCAB.
    END: tl.constexpr = VOCAB // BLOCK * BLOCK
    GROUP: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth  # numbers of a thread's load
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * WIDTH  # may be more than 32 bits hold
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, WIDTH, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), dtype=tl.float32)
                tl.store(row_ptr + cols, zero.to(logits_ptr.dtype.element_ty), mask=cols < WIDTH)
    else:
        inside = (label >= 0) & (label < VOCAB)
        word = tl.where(inside, label, VOCAB).to(tl.int32)
        at_label = tl.load(row_ptr + word, mask=inside, other=0.0)
        at_label = _logits(at_label, bias_ptr, word, inside, SCALE, CAP, HAS_BIAS)
        # Maximum and sum of every GROUP columns apart: nothing crosses threads before the row is read.
        tops = tl.full((BLOCK // GROUP,), _LOWEST, dtype=tl.float32)
        totals = tl.zeros((BLOCK // GROUP,), dtype=tl.float32)
        means = tl.zeros((BLOCK // GROUP,), dtype=tl.float32)
        for start in range(0, END, BLOCK):
            z, cols = _block(row_ptr, bias_ptr, start, WIDTH, CAP, SCALE, HAS_BIAS, BLOCK, True, True)
            if SMOOTHING != 0.0:
                means += tl.sum(tl.reshape(z, (BLOCK // GROUP, GROUP)), axis=1)
            tops, totals = _softmax_step(z, tops, totals, GROUP)
        top = tl.max(tops, axis=0)
        total = tl.sum(totals * _powers(tops, top), axis=0)
        mean = tl.sum(means, axis=0)
        if REST > 0:
            rest, places = _block(row_ptr, bias_ptr, END, WIDTH, CAP, SCALE, HAS_BIAS, REST, False, True)
            if SMOOTHING != 0.0:
                mean += tl.sum(tl.where(places < VOCAB, rest, 0.0), axis=0)
            rest = tl.where(places < VOCAB, rest, float("-inf"))
            higher = tl.maximum(top, tl.max(rest, axis=0))
            total = total * _powers(top, higher) + tl.sum(_powers(rest, higher), axis=0)
            top = higher
        target = at_label if SMOOTHING == 0.0 else (1.0 - SMOOTHING) * at_label + SMOOTHING * (mean / VOCAB)
        tl.store(losses_ptr + row, (top - target) + tl.log(total))
        if GRADIENT:
            share = 1.0 / total
            for start in range(0, END, BLOCK):
                z, cols = _block(row_ptr, bias_ptr, start, WIDTH, CAP, SCALE, HAS_BIAS, BLOCK, True, False)
                d = _gradient(z, cols, word, start, top, share, VOCAB, SMOOTHING, CAP, SCALE, BLOCK)
                tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty))
            if REST > 0:
                rest, places = _block(row_ptr, bias_ptr, END, WIDTH, CAP, SCALE, HAS_BIAS, REST, False, False)
                slope = _gradient(rest, places, word, END, top, share, VOCAB, SMOOTHING, CAP, SCALE, REST)
                slope = tl.where(places < VOCAB, slope, 0.0)
                tl.store(row_ptr + places, slope.to(logits_ptr.dtype.element_ty), mask=places < WIDTH)


@triton.jit(do_not_specialize=["num_units"])
def _scale_kernel(d_ptr, factor_ptr, result_ptr, num_units, UNIT: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    end = num_units.to(tl.int64) * UNIT
    if IN_PLACE:
        end *= (factor != 1.0).to(tl.int64)  # nothing to do is found out here: the host would have to wait for the number
    mask = cols < end
    d = tl.load(d_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(result_ptr + cols, (d * factor).to(result_ptr.dtype.element_ty), mask=mask)


_LOSS, _SCALE = Kernel(_loss_kernel), Kernel(_scale_kernel)


def launch_scale(d: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``(d * factor).to(dtype)``: in place where the dtype is that of ``d``, which must be contiguous.

    Args:
        d: any shape.
        factor: a scalar on the same device.
        dtype: of the result.
    """
    result = d if d.dtype == dtype else torch.empty(d.shape, dtype=dtype, device=d.device)
    if d.dtype == torch.float64:
        return result.copy_(d * factor)
    if d.numel():
        unit, block = stride_unit(d.numel()), 4096
        with on_device(d):
            _SCALE((-(-d.numel() // block),), (d, factor, result), (d.numel() // unit,), (unit, result is d, block), 8)
    return result


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``=`` for the first, in the precision of ``total`` and in one pass over it."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # interpreted
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def _labelled(counts: Tensor, counted: LabelCount | None) -> Tensor:
    """Numbers of the rows that count."""
    if counted is None:
        return counts.nonzero().squeeze(1)
    # The n-th is where the running sum reaches n.
    return torch.searchsorted(counts.cumsum(0), torch.arange(1, counted.number + 1, device=counts.device))


def launch_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_softcap: float,
    logit_scale: float,
    wide: bool,
    compact: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
    rows_per_chunk: int | None = None,
    blocks: LossBlocks | None = None,
    counted: LabelCount | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`oslo_fusion.ops.linear_cross_entropy.linear_cross_entropy_reference`.

    ``rows_per_chunk`` and ``blocks`` override the heuristics; ``counted``: of these labels, so that the host need not wait.
    """
    options = Options(ignore_index, label_smoothing, logit_softcap, logit_scale, wide, compact)
    wanted = (hidden_gradient, weight_gradient, bias_gradient)
    if hidden.dtype == torch.float64:
        return linear_cross_entropy_reference(hidden, weight, labels, bias, *options, *wanted)
    _check(hidden, weight, labels, bias, options)
    vocab, dim = weight.shape
    check_labels(labels, vocab, ignore_index)
    with on_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        dtype, device = hidden.dtype, hidden.device
        flat, rows, kept = labels.reshape(-1).contiguous(), hidden.reshape(-1, dim), None
        count = (flat != ignore_index).sum().to(torch.float32)
        if compact:
            kept = _labelled(flat != ignore_index, counted)
            flat, rows = flat[kept], rows[kept]
        num_rows, width, rounded, columns = rows.shape[0], padded_width(vocab), weight.to(dtype), vocab
        if vocab % _ALIGNMENT:
            rounded, columns = F.pad(rounded, (0, 0, 0, width - vocab)), width
        chunk = rows_per_chunk or chunk_rows(num_rows, dim, vocab, dtype.itemsize, wide)
        losses = torch.empty((num_rows,), dtype=torch.float32, device=device)
        dhidden = torch.empty((num_rows if hidden_gradient else 0, dim), dtype=dtype, device=device)
        sums = torch.empty((columns if weight_gradient else 0, dim), dtype=_sum_dtype(weight, wide), device=device)
        bias_gradient = bias_gradient and bias is not None
        dbias = torch.zeros((vocab if bias_gradient else 0,), dtype=torch.float32, device=device)
        padded = None if bias is None else F.pad(bias, (0, width - vocab))
        buffer = torch.empty((min(chunk, num_rows), width), dtype=dtype, device=device)
        cut = blocks or loss_blocks(vocab)
        gradient = hidden_gradient or weight_gradient or bias_gradient
        if num_rows == 0:
            sums.zero_()
        for start in range(0, num_rows, chunk):
            part = rows[start : start + chunk]
            size = part.shape[0]
            logits = buffer[:size, :columns]
            torch.mm(part, rounded.t(), out=logits)
            _LOSS(
                (size,),
                (buffer, padded, flat[start : start + size], losses[start : start + size]),
                (ignore_index,),
                (
                    vocab,
                    width,
                    label_smoothing,
                    logit_softcap,
                    logit_scale,
                    bias is not None,
                    gradient,
                    cut.columns,
                    rest_columns(vocab, cut.columns),
                ),
                cut.warps,
            )
            if hidden_gradient:
                torch.mm(logits, rounded, out=dhidden[start : start + size])
            if weight_gradient:
                _add_product(sums, logits.t(), part, start == 0)
            if bias_gradient:
                dbias += logits[:, :vocab].sum(0, dtype=torch.float32)
        if hidden_gradient and kept is not None:
            dhidden = torch.zeros((labels.numel(), dim), dtype=dtype, device=device).index_copy_(0, kept, dhidden)
        return (
            losses.sum(),
            count,
            dhidden.view(hidden.shape) if hidden_gradient else hidden.new_empty(0),
            sums[:vocab] if weight_gradient else hidden.new_empty(0),
            dbias if bias_gradient else hidden.new_empty(0),
        )


register_kernels(launch_linear_cross_entropy, "CUDA")
