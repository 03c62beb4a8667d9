"""Work that is cut into rows: how many rows and threads a program gets, and the second stage of weight gradients.

A norm reads a row, reduces it, and writes a row: the row stays in registers, memory is the limit. One program takes a tile of
whole rows, ``rows × columns``, with ``columns`` the next power of two. The choice of tile is a frozen dataclass from a pure
function, so that it is tested, and tuned, without touching a kernel.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from oslo_fusion.triton.launch import WARP_SIZE, Kernel, chain, chained

MAX_COLUMNS = 16384  # a wider row does not fit into the registers of 16 warps; 32 would be no block on an AMD GPU
REGISTER_COLUMNS = 8192  # up to here a thread holds 16 numbers of each tensor, and all that a backward needs stays in registers
WIDE_PART = 2048  # four numbers per thread of 16 warps: nothing spills, with four parts of 16-bit numbers ahead
# From so many columns on, a row whose width is no multiple of 16 bytes is cut at 16-byte borders. As it lies, in tiles of many
# rows, 65536×257 bfloat16 takes 28 µs forward and 73 backward; cut, 36 and 51.
RAGGED_FORWARD, RAGGED_BACKWARD = 512, 256
PHASES = 8  # after so many rows, whatever their width, a row starts at a border of eight numbers again
PACKED_NUMBERS = 8 * WARP_SIZE  # 16-bit numbers that a warp loads at once, 16 bytes a thread
_MAX_WARPS = 16
_INTERPRETED = ("interpreter", 4, 232_448)


@dataclass(frozen=True)
class RowBlocks:
    """How a kernel over rows is cut.

    Attributes:
        rows: rows per tile.
        columns: the row's width rounded up to a power of two.
        warps: warps per program.
        programs: how many programs run; 0 means one per tile.
        stages: how many tiles of a program are under way at once; 1 means that a tile is loaded when it is needed.
        reload: the weight is read again for every tile, because a row of it does not fit into registers beside the rest.
        ahead: how much of the next row is loaded into registers while a row is computed: its parts in a wide backward, its
            middle (1) in a forward over ragged rows.
        ragged: the row is cut at 16-byte borders (``ragged_rows.py``); then ``rows`` is 1 and ``columns`` holds the middle.
        early: a backward's walk may be launched before the kernel before it is over (:func:`oslo_fusion.triton.launch.chain`),
            because no more programs fit on a multiprocessor than are meant for it.
        packed: layer norm's forward keeps its row as words of two 16-bit numbers.
    """

    rows: int
    columns: int
    warps: int
    programs: int = 0
    stages: int = 1
    reload: bool = False
    ahead: int = 0
    ragged: bool = False
    early: bool = True
    packed: bool = False


def _power_of_two(number: float) -> int:
    return 1 << max(0, math.ceil(math.log2(number))) if number > 1 else 1


def even_programs(tiles: int, most: int) -> int:
    """The fewest programs, up to ``most``, of which none walks over more tiles than it would among ``most``.

    4096 tiles over 132 programs are 31 or 32 each; over 128 they are 32 each, with four rows of partial sums less to write and
    read, and all rows of partial sums in one tile of the second stage.
    """
    return -(-tiles // -(-tiles // most))


@functools.lru_cache(maxsize=4096)
def forward_blocks(dim: int, itemsize: int, few: bool, vectors: int = 1) -> RowBlocks:
    """How a forward over rows of ``dim`` numbers of ``itemsize`` bytes is cut.

    Args:
        dim: numbers in a row.
        itemsize: bytes of a number that is read, 2 or 4.
        few: fewer rows than the device has places for: then a row is spread over as many warps as it feeds with one 16-byte
            load per thread, for the shortest time; otherwise a thread loads 64 bytes, for the most bytes under way.
        vectors: how many rows of weights every row reads, weight and bias.
    """
    columns = _power_of_two(dim)
    if few:
        return RowBlocks(1, columns, min(_MAX_WARPS, max(1, columns * itemsize // (32 * 16))))
    # From sweeps on one H200: 32768×768 bfloat16 takes 27.7 µs with 2 warps and 28.6 with 4, 32768×16384 float32 1002 µs with 8
    # warps and 1045 with 16, of which only one program would be resident.
    # Early launches want other tiles in float32: 4096×768 takes 7.2 µs with 32 numbers a thread and 7.6 with 16, 4096×4096 33.4
    # with 8 and 34.0 with 16.
    per_thread = 64 // itemsize
    if itemsize == 4 and columns <= 1024:
        per_thread = 32
    elif itemsize == 4 and columns == 4096:
        per_thread = 8
    # A weight and a bias of 16384 float32 numbers are more than the L1 cache keeps beside two such rows: with 16 warps, and one
    # row at a time, 1005 µs and not 1071.
    fits = columns * itemsize * vectors <= 64 << 10
    fewest, most = (2 if itemsize == 2 and columns <= 1024 else 4), (8 if columns > REGISTER_COLUMNS and fits else _MAX_WARPS)
    warps = min(most, max(fewest, columns // (32 * per_thread)))
    return RowBlocks(max(1, 32 * warps * per_thread // columns), columns, warps)


@functools.lru_cache(maxsize=4096)
def packed_forward_blocks(dim: int) -> RowBlocks | None:
    """How layer norm's forward is cut over many rows of 16-bit numbers, if these are wide, and warps can have as many each.

    Args:
        dim: as in :func:`forward_blocks`.
    """
    # From a sweep on one H200, 32768×16384 bfloat16: by 16 warps 499 µs, by 8 502, and 523 where numbers, not words, stay in
    # registers. At 8192 columns and less there is nothing to win.
    warps = next((warps for warps in (_MAX_WARPS, 8) if dim % (warps * PACKED_NUMBERS) == 0), 0)
    return RowBlocks(1, _power_of_two(dim), warps, packed=True) if dim > REGISTER_COLUMNS and warps else None


@functools.lru_cache(maxsize=4096)
def backward_blocks(
    dim: int, itemsize: int, weight_itemsize: int, num_rows: int, loads: int, sums: int, processors: int, shared: int
) -> RowBlocks:
    """How a backward is cut that sums the gradient of the weight on its way.

    Each program walks over tiles and keeps its sum in registers, so there are few programs: each costs a row of partial sums,
    written and read again, with the next tiles' loads under way in shared memory while a tile is computed.

    Args:
        dim, itemsize: as in :func:`forward_blocks`.
        weight_itemsize: bytes of a number of the weight.
        num_rows: how many rows there are.
        loads: how many tensors are read row by row.
        sums: how many gradients are summed.
        processors: multiprocessors of the device.
        shared: bytes of shared memory that a multiprocessor has.
    """
    columns, wide = _power_of_two(dim), itemsize > 2
    reload = columns > REGISTER_COLUMNS
    # From a sweep on one H200 (benchmarks/NOTES.md): narrow rows want several programs, wide ones one with a larger tile.
    if columns <= 1024:
        warps, elements, per_processor = 4, (1024 if wide else 4096), (4 if wide else 2)
    elif columns <= 4096:
        warps, elements, per_processor = 8, (4096 if wide else 8192), 1
    else:
        warps, elements, per_processor = _MAX_WARPS, 8192, 1
    rows = max(1, elements // columns)
    tile = rows * columns * (itemsize * loads + weight_itemsize * reload)
    # A tile less than there are stages waits in shared memory. A little of it is needed for reductions.
    stages = next((stages for stages in (3, 2) if (stages - 1) * tile * per_processor <= shared - 8192), 1)
    if columns == REGISTER_COLUMNS and wide:
        stages = 1  # enough bytes are under way without: 204 µs against 210 for 8192×8192
    tiles, programs = -(-num_rows // rows), per_processor * processors
    # Narrow rows keep the number that the sweep chose: their partial sums are small.
    programs = min(programs, tiles) if columns <= 1024 else even_programs(tiles, programs)
    # Where registers and shared memory have room for more programs than that (sm_90, Triton 3.6): float32 up to 4096 columns, 3
    # of rms norm and 2 of layer norm for 1 that is wanted, 10 and 8 for 4 at 1024, and with one sum 2 for 1 at 5120 and 6144;
    # 16-bit numbers with one sum, 3 for 2, but not between 513 and 1023 columns, whose masks take registers too.
    if wide:
        early = dim >= REGISTER_COLUMNS or (sums > 1 and columns == REGISTER_COLUMNS)
    else:
        early = sums > 1 or columns > 1024 or 512 < dim < 1024
    return RowBlocks(rows, columns, warps, programs, stages, reload, early=early)


def wide_backward_blocks(itemsize: int, halves: int, added: bool, num_rows: int, processors: int) -> RowBlocks:
    """How a layer norm's backward is cut that sums two gradients over rows too wide for the registers beside these sums.

    Args:
        itemsize: as in :func:`forward_blocks`.
        halves: 2 where two numbers are read as one word, otherwise 1.
        added: whether a gradient from elsewhere is added, for which there are registers with a part less ahead.
        num_rows, processors: as in :func:`backward_blocks`.

    Returns:
        ``columns`` is the width of a part of the row; ``ahead`` how many parts of the next row are loaded before this one is
        finished.
    """
    # From sweeps on one H200 at 32768×16384. In 16-bit numbers 873 µs against 1015 with nothing ahead; as words, with room for
    # three parts of four, 828. In float32 1686 against 2020 with two parts ahead; launched early it took 1752, though only one
    # program fits: its row, 128 KB, is read again from the L1 cache, and a guess is that this is small while shared memory is
    # set aside for the kernel before.
    ahead = 0 if itemsize > 2 else 4 if halves == 1 else 2 if added else 3
    programs = even_programs(num_rows, processors)
    return RowBlocks(1, WIDE_PART * halves, _MAX_WARPS, programs, reload=True, ahead=ahead, early=itemsize == 2)


def is_ragged(dim: int, least: int, *itemsizes: int) -> bool:
    """Whether rows of this width, in any of these sizes of a number, are better cut at 16-byte borders.

    Args:
        dim: numbers in a row.
        least: ``RAGGED_FORWARD`` or ``RAGGED_BACKWARD``.
        itemsizes: bytes of a number of the tensors that are read and written.
    """
    return dim >= least and dim * min(itemsizes) % 16 != 0


@functools.lru_cache(maxsize=4096)
def ragged_forward_blocks(dim: int, itemsize: int, vectors: int, added: bool, processors: int) -> RowBlocks:
    """How a forward over ragged rows is cut: one row at a time.

    As many programs as are resident at once, since each walks over its share of the rows: one more would run alone at the end.

    Args:
        dim, itemsize: as in :func:`forward_blocks`.
        vectors: how many rows of weights a program keeps in registers, weight and bias.
        added: whether a residual is added; with it, three programs of 16 warps are no longer resident (54 registers).
        processors: multiprocessors of the device.
    """
    columns = max(16, _power_of_two(dim // 8 * 8))
    # From sweeps on one H200 at 32768×4097: 32 numbers a thread in bfloat16 (135 µs against 147 with 16), 64 beside a bias with
    # the next row ahead (139 against 157 with 32 and nothing ahead); 8 in float32 (265 against 283), 16 beside a bias (268). At
    # 16384×8191 in bfloat16 the next row ahead gives 134 against 155. Only there: wider rows beside a bias would spill.
    ahead = itemsize == 2 and columns == (4096 if vectors == 2 else 8192)
    if itemsize == 2 and columns > 1024:
        numbers = 64 if ahead and vectors == 2 else 32
    elif itemsize == 2 or vectors == 2 or added:
        numbers = 16
    else:
        numbers = 8
    warps = min(_MAX_WARPS, max(1, columns // (32 * numbers)))
    # Warps that are resident, by what a thread needs: 163, 92 (119 ahead), 60 and 40 registers; beside a bias 255, 125, 80 and
    # 59 (sm_90).
    resident = {64: (12, 8), 32: (20, 16), 16: (32, 24), 8: (48, 32)}[max(8, columns // (32 * warps))][vectors == 2]
    return RowBlocks(1, columns, warps, max(1, min(16, resident // warps)) * processors, ahead=int(ahead), ragged=True)


@functools.lru_cache(maxsize=4096)
def ragged_backward_blocks(dim: int, itemsize: int, loads: int, sums: int, processors: int, shared: int) -> RowBlocks:
    """How a backward over ragged rows is cut: each program costs a row of partial sums, so the next rows wait in shared memory.

    Args:
        dim, itemsize: as in :func:`forward_blocks`.
        loads: how many tensors are read row by row.
        sums: how many gradients are summed.
        processors, shared: as in :func:`backward_blocks`.
    """
    columns = max(16, _power_of_two(dim // 8 * 8))
    # From sweeps on one H200 at 32768×4097. Two sums want 32 numbers a thread in bfloat16: 211 µs against 254. One sum wants 16
    # and, in float32, nothing that waits: 381 against 389. In float32 two sums want 16 at this width, in two programs: 382
    # against 387 with 32, 56.3 against 57.0 for 4096 rows; other widths were not measured so.
    numbers, resident = (32, 8) if sums == 2 and not (itemsize == 4 and columns == 4096) else (16, _MAX_WARPS)
    warps = min(_MAX_WARPS, max(1, columns // (32 * numbers)))
    per_processor = max(1, min(8, resident // warps))
    waiting = columns * itemsize * loads * per_processor
    most = (3, 2) if itemsize == 2 or sums == 2 else ()
    stages = next((stages for stages in most if (stages - 1) * waiting <= shared - 8192), 1)
    # More programs fit than these where a thread has fewer numbers than it could, and with one sum up to 2048 columns: 5 for 4
    # that are wanted, in float32 with Triton 3.6 and in 16-bit numbers with 3.7 (sm_90).
    full = columns == 32 * warps * numbers and per_processor * warps == resident
    early = full and (sums == 2 or columns > 2048)
    return RowBlocks(1, columns, warps, per_processor * processors, stages, ragged=True, early=early)


def no_weight_blocks(dim: int, itemsize: int, few: bool) -> RowBlocks:
    """How a backward is cut that sums nothing: a program per tile, as in the forward, with half the rows each."""
    blocks = forward_blocks(dim, itemsize, few)
    return replace(blocks, rows=max(1, blocks.rows // 2))


@functools.cache
def _facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 65_536)


def device_facts(x: Tensor) -> tuple[int, int]:
    """Multiprocessors of the tensor's device, and the bytes of shared memory that a program may use there."""
    return _facts(x.device.index) if x.is_cuda else _INTERPRETED[1:]


_HERE = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device the current one, which is where triton launches."""
    if not x.is_cuda or x.device.index == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(x.device)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """The tensor with rows that lie one stride apart and whose numbers lie side by side, and that stride in numbers.

    A copy is made only where the leading dimensions cannot be walked with one stride, or the last one with stride one.
    """
    dim = x.shape[-1]
    if x.is_contiguous():
        return x, dim
    if x.stride(-1) == 1 or dim == 1:
        try:
            rows = x.view(-1, dim)
        except RuntimeError:  # the leading dimensions do not collapse
            pass
        else:
            return rows, rows.stride(0)
    return x.contiguous(), dim


def must_refer(*tensors: Tensor | None) -> bool:
    """Whether the reference has to serve: double precision, or rows wider than registers."""
    return any(t is not None and (t.dtype == torch.float64 or t.shape[-1] > MAX_COLUMNS) for t in tensors)


def stride_unit(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides.

    Triton notices by itself only that an argument is divisible by 16. A width such as 1000 would then be read one number at a
    time; as ``125 × UNIT`` it is read eight at a time.
    """
    return math.gcd(16, *strides)


@triton.jit(do_not_specialize=["num_partials"])
def _column_sums_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    num_partials,
    DIM: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    cols_mask = cols < DIM
    start_ptr = partials_ptr + which.to(tl.int64) * num_partials * DIM
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    chained(CHAIN)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < num_partials)[:, None] & cols_mask[None, :]
        total += tl.load(start_ptr + rows[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if HALVES == 2:
        cols = tl.where(cols < DIM // 2, 2 * cols, 2 * cols - DIM + 1)
    if which == 0:
        tl.store(first_ptr + cols, result.to(first_ptr.dtype.element_ty), mask=cols_mask)
    elif which == 1:
        tl.store(second_ptr + cols, result.to(second_ptr.dtype.element_ty), mask=cols_mask)
    else:
        tl.store(third_ptr + cols, result.to(third_ptr.dtype.element_ty), mask=cols_mask)


_COLUMN_SUMS = Kernel(_column_sums_kernel)


def column_sums(partials: Tensor, first: Tensor, *others: Tensor, halves: int = 1) -> None:
    """Sum what every program left behind, always in the same order: the second stage of weight gradients.

    Args:
        partials: ``[1 to 3, programs, dim]`` float32, contiguous.
        first: ``[dim]``, receives the sums of ``partials[0]``, rounded once.
        others: ``[dim]`` each, receive those of ``partials[1]`` and ``partials[2]``.
        halves: 2 where the sums of even columns stand before those of odd ones.
    """
    kinds, programs, dim = partials.shape
    second, third = (*others, first, first)[:2]  # what there are no sums for is not written
    # Whole lines of 32 columns if that gives 512 programs: two sums of 16384 columns by 128 programs 4.2 µs, with 4 warps 4.5,
    # with 8 6.0, half lines 4.8. Half lines, by more programs, for fewer columns: 768, by 528 programs, 2.8 µs and not 3.4.
    rows, block = (128, 32) if kinds * dim > 8192 else (64, 16)
    constants = (dim, halves, rows, block, chain(partials))
    warps = 2 if kinds * dim > 16384 else 4
    _COLUMN_SUMS((-(-dim // block), kinds), (partials, first, second, third), (programs,), constants, warps)
