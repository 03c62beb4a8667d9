"""How rows are cut, without a GPU."""

from __future__ import annotations

import pytest
import torch

from oslo_fusion.triton.rows import (
    MAX_COLUMNS,
    as_rows,
    backward_blocks,
    even_programs,
    forward_blocks,
    no_weight_blocks,
    stride_unit,
    wide_backward_blocks,
)

DIMS = (1, 13, 64, 768, 1000, 1024, 4096, 4097, 8192, 16384)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("few", [False, True])
def test_forward_tiles_cover_the_row_and_fit_the_registers(dim: int, itemsize: int, few: bool) -> None:
    for blocks in (forward_blocks(dim, itemsize, few), no_weight_blocks(dim, itemsize, few)):
        assert dim <= blocks.columns < 2 * dim or dim == blocks.columns == 1
        assert blocks.rows & (blocks.rows - 1) == 0
        assert 1 <= blocks.warps <= 16
        assert blocks.rows * blocks.columns <= 64 * 32 * blocks.warps
        assert blocks.programs == 0
        assert not few or blocks.rows == 1


def test_forward_tiles_are_those_of_the_sweep() -> None:
    assert [(b.rows, b.warps) for b in (forward_blocks(dim, 2, False) for dim in (768, 4096, 8192, 16384))] == [
        (2, 2),
        (1, 4),
        (1, 8),
        (1, 8),
    ]
    assert [(b.rows, b.warps) for b in (forward_blocks(dim, 4, False) for dim in (768, 2048, 4096, 8192, 16384))] == [
        (4, 4),
        (1, 4),
        (1, 16),
        (1, 16),
        (1, 8),
    ]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shared", [65_536, 166_912, 232_448])
@pytest.mark.parametrize("loads", [2, 3])
def test_backward_tiles_wait_in_the_shared_memory_there_is(dim: int, itemsize: int, shared: int, loads: int) -> None:
    blocks = backward_blocks(dim, itemsize, itemsize, 10_000_000, loads, 2, 132, shared)
    assert dim <= blocks.columns
    assert blocks.rows * blocks.columns <= 32 * 32 * blocks.warps
    assert blocks.programs in (132, 264, 528)
    waiting = blocks.rows * blocks.columns * itemsize * (loads + blocks.reload)
    assert (blocks.stages - 1) * waiting * (blocks.programs // 132) < shared
    assert backward_blocks(dim, itemsize, itemsize, 3, loads, 2, 132, shared).programs <= 3
    assert blocks.reload == (dim > MAX_COLUMNS // 2)


@pytest.mark.parametrize("tiles", [1, 5, 131, 132, 133, 4096, 32768])
def test_tiles_are_shared_evenly_by_as_few_programs_as_take_no_longer(tiles: int) -> None:
    programs, longest = even_programs(tiles, 132), -(-tiles // 132)
    assert programs <= min(132, tiles)
    assert -(-tiles // programs) == longest
    assert programs == 1 or -(-tiles // (programs - 1)) > longest


def test_4096_wide_rows_are_32_for_each_program() -> None:
    assert wide_backward_blocks(2, 2, False, 4096, 132).programs == 128
    assert backward_blocks(8192, 2, 2, 4096, 2, 2, 132, 232_448).programs == 128
    assert backward_blocks(768, 2, 2, 4096, 2, 2, 132, 232_448).programs == 264


def test_rows_are_copied_only_where_they_must_be() -> None:
    base = torch.arange(240.0).reshape(4, 6, 10)
    for x, stride in (
        (base, 10),
        (base[:, 2], 60),
        (base[..., 2:7], 10),
        (base[:1, 0].expand(5, 10), 0),
        (base[0, 0, 0].expand(7, 1), 0),
    ):
        rows, found = as_rows(x)
        assert found == stride
        assert rows.data_ptr() == x.data_ptr()
    for x in (base.transpose(0, 1), base[..., ::2], base.transpose(1, 2), base[0, 0, 0].expand(7, 3)):
        rows, found = as_rows(x)
        assert found == x.shape[-1]
        assert torch.equal(rows, x)
        assert rows.is_contiguous()


def test_the_unit_of_strides() -> None:
    assert [stride_unit(*strides) for strides in ((1000,), (4096, 0), (4097,), (768, 1020), (0,))] == [8, 16, 1, 4, 16]
