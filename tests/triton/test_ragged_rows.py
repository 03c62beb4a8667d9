"""Norms over rows that are cut at 16-byte borders: both norms' law, on a GPU or interpreted; and compiled for GPUs not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.ops import layer_norm as layer_op
from oslo_fusion.ops import rms_norm as rms_op
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import layer_norm, ragged_rows, rms_norm
from oslo_fusion.triton.rows import (
    RAGGED_BACKWARD,
    RAGGED_FORWARD,
    RowBlocks,
    is_ragged,
    ragged_backward_blocks,
    ragged_forward_blocks,
)

EPS = 1e-5
WIDTHS = (1, 3, 7, 9, 15, 17, 50, 1001, 4097)
DTYPES = (torch.float32, torch.bfloat16)
FACTS = (4, 232_448)


def test_this_file_interpreted(rerun_interpreted: Callable[..., None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        shape = args[0] if isinstance(args[0], (tuple, torch.Size)) else args
        return torch.full(shape, float("nan"), **kwargs)

    monkeypatch.setattr(torch, "empty", empty)


def few_programs(blocks: RowBlocks) -> RowBlocks:
    """Eight programs, so that each walks over several rows."""
    return replace(blocks, programs=8)


def rms_both_ways(x: Tensor, others: list[Tensor | None], offset: float, blocks: Any) -> list[list[Tensor]]:
    """y, s, dx, dweight of the kernels, of the reference, and in float64."""
    weight, _, residual, dy, ds = others
    y, s, rstd = rms_norm.launch_rms_norm(x, weight, residual, EPS, offset, None, blocks[0])
    gradients = rms_norm.launch_rms_norm_backward(dy, ds, s, weight, rstd, offset, weight is not None, blocks[1])  # type: ignore[arg-type]
    results = [[y, s, *gradients]]
    for dtype in (None, torch.float64):
        x_, weight_, residual_, dy_, ds_, s_, rstd_ = (
            t if t is None or dtype is None else t.to(dtype) for t in (x, weight, residual, dy, ds, s, rstd)
        )
        y_, sum_, _ = rms_op.rms_norm_reference(x_, weight_, residual_, EPS, offset, None)
        gradients = rms_op.rms_norm_backward_reference(dy_, ds_, s_, weight_, rstd_, offset, weight is not None)
        results.append([y_, sum_, *gradients])
    return results


def layer_both_ways(x: Tensor, others: list[Tensor | None], offset: float, blocks: Any) -> list[list[Tensor]]:
    """y, s, dx, dweight, dbias of the kernels, of the reference, and in float64."""
    weight, bias, residual, dy, ds = others
    wanted = (weight is not None, bias is not None)
    y, s, mean, rstd = layer_norm.launch_layer_norm(x, weight, bias, residual, EPS, offset, None, blocks[0])
    gradients = layer_norm.launch_layer_norm_backward(dy, ds, s, weight, bias, mean, rstd, offset, *wanted, blocks[1])  # type: ignore[arg-type]
    results = [[y, s, *gradients]]
    for dtype in (None, torch.float64):
        x_, weight_, bias_, residual_, dy_, ds_, s_, mean_, rstd_ = (
            t if t is None or dtype is None else t.to(dtype) for t in (x, weight, bias, residual, dy, ds, s, mean, rstd)
        )
        y_, sum_, _, _ = layer_op.layer_norm_reference(x_, weight_, bias_, residual_, EPS, offset, None)
        gradients = layer_op.layer_norm_backward_reference(dy_, ds_, s_, weight_, bias_, mean_, rstd_, offset, *wanted)
        results.append([y_, sum_, *gradients])
    return results


BOTH_WAYS = {"rms_norm": rms_both_ways, "layer_norm": layer_both_ways}
NAMES = ("y", "s", "dx", "dweight", "dbias")


def law(op: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, plain: bool, **kinds: Any) -> None:
    """Several draws judged together: over few numbers the largest error is a matter of luck."""
    rows, dim = shape
    forward = few_programs(ragged_forward_blocks(dim, dtype.itemsize, 2, not plain, FACTS[0]))
    blocks = (
        replace(forward, ahead=kinds.get("ahead", forward.ahead)),
        few_programs(ragged_backward_blocks(dim, dtype.itemsize, 3, 2, *FACTS)),
    )
    vectors = kinds.get("vectors", dtype)
    draws = []
    for seed in range(max(1, min(6, 1024 // dim))):
        draw, vector = drawer(dtype, device, seed), drawer(vectors or dtype, device, 50 + seed)
        given: list[Tensor | None] = [None, None] if vectors is None else [vector(dim), vector(dim)]
        given += [None if plain else draw(rows, dim), draw(rows, dim), None if plain else draw(rows, dim)]
        if kinds.get("dy") is not None:
            given[3] = given[3].to(kinds["dy"])  # type: ignore[union-attr]
        draws.append(BOTH_WAYS[op](draw(rows, dim), given, kinds.get("offset", 0.0), blocks))
    for position, name in enumerate(NAMES[: len(draws[0][0])]):
        ours, theirs, truth = (torch.cat([draw[way][position].flatten() for draw in draws]) for way in range(3))
        assert draws[0][0][position].shape == draws[0][1][position].shape
        assert draws[0][0][position].dtype == draws[0][1][position].dtype
        if dim > 1 or name != "dx":  # of a single number dx is zero but for rounding
            assert_close_to_reference(ours, theirs, truth, f"{op} {rows}×{dim} {dtype}, {name}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("op", list(BOTH_WAYS))
@pytest.mark.parametrize("plain", [True, False])
def test_the_law_holds(op: str, dim: int, dtype: torch.dtype, plain: bool, device: torch.device) -> None:
    law(op, (11, dim), dtype, device, plain)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("op", list(BOTH_WAYS))
def test_fewer_rows_than_programs(op: str, rows: int, device: torch.device) -> None:
    law(op, (rows, 131), torch.bfloat16, device, False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 8, 9, 19])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("op", list(BOTH_WAYS))
def test_the_next_row_is_loaded_ahead(op: str, rows: int, plain: bool, device: torch.device) -> None:
    law(op, (rows, 131), torch.bfloat16, device, plain, ahead=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("vectors", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", list(BOTH_WAYS))
def test_mixed_dtypes_and_offset(op: str, vectors: torch.dtype | None, device: torch.device) -> None:
    law(op, (11, 133), torch.float16, device, True, vectors=vectors, offset=1.0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", list(BOTH_WAYS))
def test_a_gradient_of_another_dtype(op: str, device: torch.device) -> None:
    law(op, (11, 133), torch.bfloat16, device, True, vectors=torch.float32, dy=torch.float32)


@pytest.mark.parametrize("op", list(BOTH_WAYS))
def test_launchers_choose_the_cut_by_themselves(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for name in ("launch_forward", "launch_backward"):
        original = getattr(ragged_rows, name)
        monkeypatch.setattr(
            ragged_rows, name, lambda *a, name=name, original=original: (launched.append(name), original(*a))[1]
        )
    draw = drawer(torch.bfloat16, device)
    everything = draw(9, 1001 + 1)
    for x, expected in (
        (draw(9, 1001), ["launch_forward", "launch_backward"]),
        (draw(9, 1000), []),
        (draw(9, 255), []),
        (draw(9, 257), ["launch_backward"]),
        (everything[:, 1:], []),  # rows that are no row's width apart
        (everything.flatten()[1 : 1 + 9 * 1001].view(9, 1001), []),  # the first row starts between borders
    ):
        dim = x.shape[-1]
        given: list[Tensor | None] = [draw(dim), draw(dim), None, draw(9, dim), None]
        for ours, theirs, truth in zip(*BOTH_WAYS[op](x, given, 0.0, (None, None)), strict=True):
            assert_close_to_reference(ours, theirs, truth, f"{op}, {dim}")
        assert launched == expected
        launched.clear()


@pytest.mark.parametrize("op", list(BOTH_WAYS))
def test_no_rows(op: str, device: torch.device) -> None:
    draw = drawer(torch.bfloat16, device)
    given: list[Tensor | None] = [draw(1001), draw(1001), None, draw(0, 1001), None]
    ours, theirs, _ = BOTH_WAYS[op](draw(0, 1001), given, 0.0, (None, None))
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


def test_gradients_are_the_same_bits_every_time(device: torch.device) -> None:
    draw = drawer(torch.float16, device)
    x, weight, dy = draw(60, 515), draw(515), draw(60, 515)
    _, _, mean, rstd = layer_norm.launch_layer_norm(x, weight, weight, None, EPS, 0.0, None)
    first, second = (
        layer_norm.launch_layer_norm_backward(dy, None, x, weight, weight, mean, rstd, 0.0, True, True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
def test_only_wanted_gradients_are_summed(wanted: tuple[bool, bool], device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    x, weight, bias, dy = draw(9, 515), draw(515), draw(515), draw(9, 515)
    _, _, mean, rstd = layer_norm.launch_layer_norm(x, weight, bias, None, EPS, 0.0, None)
    arguments = (dy, None, x, weight, bias, mean, rstd, 0.0)
    everything = layer_norm.launch_layer_norm_backward(*arguments, True, True)
    some = layer_norm.launch_layer_norm_backward(*arguments, *wanted)
    torch.testing.assert_close(some[0], everything[0], rtol=1e-6, atol=1e-6)
    for total, expected, is_wanted in zip(some[1:], everything[1:], wanted, strict=True):
        assert torch.equal(total, expected) if is_wanted else total.numel() == 0


def test_which_rows_are_cut() -> None:
    for width, itemsize in ((4097, 2), (4097, 4), (4098, 2), (4100, 2)):
        assert is_ragged(width, RAGGED_FORWARD, itemsize)
        assert is_ragged(width, RAGGED_BACKWARD, itemsize)
    assert not is_ragged(4100, RAGGED_FORWARD, 4)
    assert is_ragged(4100, RAGGED_FORWARD, 4, 2), "read in float32, written in bfloat16"
    assert not is_ragged(4096, RAGGED_FORWARD, 2)
    assert not is_ragged(257, RAGGED_FORWARD, 2)
    assert is_ragged(257, RAGGED_BACKWARD, 2)
    assert not is_ragged(50, RAGGED_BACKWARD, 2)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [515, 1001, 4097, 4103, 8191, 16383])
@pytest.mark.parametrize("shared", [65_536, 166_912, 232_448])
@pytest.mark.parametrize("vectors", [1, 2])
def test_blocks_hold_the_middle_and_what_waits_fits(dim: int, itemsize: int, shared: int, vectors: int) -> None:
    forward = ragged_forward_blocks(dim, itemsize, vectors, False, 132)
    backward = ragged_backward_blocks(dim, itemsize, 3, vectors, 132, shared)
    for blocks, loads in ((forward, 1), (backward, 3)):
        assert blocks.ragged
        assert blocks.rows == 1
        assert dim // 8 * 8 <= blocks.columns < 2 * dim
        assert blocks.columns <= 64 * 32 * blocks.warps
        assert 1 <= blocks.warps <= 16
        per_processor = blocks.programs // 132
        assert per_processor * blocks.warps <= 64
        assert (blocks.stages - 1) * blocks.columns * itemsize * loads * per_processor < shared
        assert ragged_rows.programs_of(blocks, 10**6) % 8 == 0
        assert ragged_rows.programs_of(blocks, 5) == 5
    for rows in (5, 1000, 4096, 32768):
        most, fewest = ragged_rows.programs_of(backward, rows), ragged_rows.even_programs_of(backward, rows)
        assert -(-rows // fewest) == -(-rows // most)  # none of them walks over more rows
        assert fewest <= most
        assert fewest in (rows, fewest // 8 * 8)


def test_a_backward_has_the_fewest_programs_that_take_no_longer() -> None:
    backward = ragged_backward_blocks(4097, 4, 2, 2, 132, 232_448)
    assert ragged_rows.programs_of(backward, 4096) == 264
    assert ragged_rows.even_programs_of(backward, 4096) == 256  # 16 rows each, as before, and two steps of the second stage


def test_blocks_are_those_of_the_sweep() -> None:
    def cut(blocks: RowBlocks) -> tuple[int, int, int]:
        assert blocks.columns == 4096
        return blocks.warps, blocks.programs // 132, blocks.stages

    def cut_forward(dim: int, itemsize: int, vectors: int, added: bool = False) -> tuple[int, int, int]:
        blocks = ragged_forward_blocks(dim, itemsize, vectors, added, 132)
        return blocks.warps, blocks.programs // 132, blocks.ahead

    forward = {(size, vectors): cut_forward(4097, size, vectors) for size in (2, 4) for vectors in (1, 2)}
    assert forward == {(2, 1): (4, 5, 0), (2, 2): (2, 4, 1), (4, 1): (16, 3, 0), (4, 2): (8, 3, 0)}
    assert cut_forward(4097, 4, 1, True) == (8, 4, 0)
    assert cut_forward(8191, 2, 1) == (8, 2, 1)
    assert cut_forward(8191, 2, 2) == (8, 2, 0)
    backward = {
        (size, sums): cut(ragged_backward_blocks(4097, size, 2, sums, 132, 232_448)) for size in (2, 4) for sums in (1, 2)
    }
    assert backward == {(2, 1): (8, 2, 3), (2, 2): (4, 2, 3), (4, 1): (8, 2, 1), (4, 2): (8, 2, 3)}


SIGNATURE = {"eps": "fp32", "num_rows": "i32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partials_ptr": "*fp32"}
TARGETS = {
    "sm_80": (108, 166_912),
    "sm_90": (132, 232_448),
    "sm_100": (148, 232_448),
    "gfx942": (304, 65_536),
    "gfx950": (256, 163_840),
}


def signature(kernel: Any, dtype: str) -> dict[str, str]:
    return {name: SIGNATURE.get(name, f"*{dtype}" if name.endswith("ptr") else "constexpr") for name in kernel.arg_names}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [1001, 4097, 8191])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernels_compile_for_every_target(
    dim: int, dtype: str, centred: bool, with_residual: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    itemsize = 2 if dtype == "bf16" else 4
    shape = {"DIM": dim, "CENTRED": centred, "WEIGHT_OFFSET": 0.0, "HAS_WEIGHT": True}
    absent = {} if centred else {"mean_ptr": None, "bias_ptr": None}
    forward_absent = absent | ({} if with_residual else {"residual_ptr": None, "s_ptr": None})
    backward_absent = {k: v for k, v in absent.items() if k != "bias_ptr"} | ({} if with_residual else {"ds_ptr": None})
    for target, facts in TARGETS.items():
        blocks = ragged_forward_blocks(dim, itemsize, 1 + centred, with_residual, facts[0])
        kernel = ragged_rows._ragged_norm_fwd_kernel
        values = {**shape, **forward_absent, "BLOCK": blocks.columns, "HAS_BIAS": centred, "HAS_RESIDUAL": with_residual}
        values["AHEAD"] = blocks.ahead > 0
        built = compile_for_all_targets(
            kernel,
            signature(kernel, dtype),
            values,
            num_warps=blocks.warps,
            targets=(target,),
            spill_allowed=24 if blocks.ahead and centred else 0,  # of 1020 in registers: two rows of weights and a row ahead
        )[target]
        if target == "sm_90":
            assert re.search(r"ld\.global\S*\.v4", built.assembly), "the middle is not read 16 bytes at a time"
            assert re.search(r"st\.global\S*\.v4", built.assembly), "the middle is not written 16 bytes at a time"
        blocks = ragged_backward_blocks(dim, itemsize, 2 + with_residual, 1 + centred, *facts)
        tile = {"BLOCK": blocks.columns, "STAGES": blocks.stages}
        kernel = ragged_rows._ragged_norm_bwd_kernel
        flags = {"HAS_DS": with_residual, "WEIGHT_GRADIENT": True, "BIAS_GRADIENT": centred}
        built = compile_for_all_targets(
            kernel,
            signature(kernel, dtype),
            {**shape, **tile, **flags, **backward_absent},
            num_warps=blocks.warps,
            targets=(target,),
            spill_allowed=16,  # sm_80 spills 8 bytes: two programs of 8 warps want 128 registers
        )[target]
        if target == "sm_90":
            asynchronous = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
            pattern = asynchronous if blocks.stages > 1 else r"ld\.global\S*\.v4"
            assert re.search(pattern, built.assembly), "the middle is not read 16 bytes at a time"
            assert re.search(r"st\.global\S*\.v4", built.assembly), "the middle is not written 16 bytes at a time"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [257, 1001, 2049, 4097, 8191])
@pytest.mark.parametrize("centred", [False, True])
def test_a_walk_that_is_launched_early_fills_a_multiprocessor(
    dim: int, dtype: str, centred: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    itemsize, facts = 2 if dtype == "bf16" else 4, TARGETS["sm_90"]
    blocks = ragged_backward_blocks(dim, itemsize, 2, 1 + centred, *facts)
    assert blocks.early == (dim > 4096 or (centred and dim > 257))
    if not blocks.early:
        return
    kernel = ragged_rows._ragged_norm_bwd_kernel
    values = {
        **{"DIM": dim, "CENTRED": centred, "WEIGHT_OFFSET": 0.0, "HAS_WEIGHT": True, "HAS_DS": False, "ds_ptr": None},
        **{"WEIGHT_GRADIENT": True, "BIAS_GRADIENT": centred, "BLOCK": blocks.columns, "STAGES": blocks.stages},
        **({} if centred else {"mean_ptr": None}),
    }
    arguments = {"num_warps": blocks.warps, "targets": ("sm_90",)}
    built = compile_for_all_targets(kernel, signature(kernel, dtype), values, **arguments)["sm_90"]
    assert built.resident(blocks.warps) * facts[0] <= blocks.programs
