"""The kernels of layer_norm: the cases of the reference, on a GPU or interpreted; and compiled for GPUs that are not here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import layer_norm as op
from oslo_fusion.ops.row_cases import ROW_CASES, drawer
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import layer_norm as kernels
from oslo_fusion.triton import rows
from oslo_fusion.triton.rows import (
    backward_blocks,
    forward_blocks,
    no_weight_blocks,
    packed_forward_blocks,
    wide_backward_blocks,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5
NAMES = ("y", "s", "mean", "rstd", "dx", "dweight", "dbias")


@pytest.mark.timeout(600)  # three minutes where nothing else runs
def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return (
            torch.full(*args, float("nan"), **kwargs)
            if isinstance(args[0], (tuple, torch.Size))
            else full_line(*args, **kwargs)
        )

    def full_line(dim: int, **kwargs: Any) -> Tensor:
        return torch.full((dim,), float("nan"), **kwargs)

    monkeypatch.setattr(torch, "empty", empty)


def both_ways(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, offset: float, seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the kernels give, the reference in the same dtype, and in float64; forward, then backward from the same numbers."""
    results = []
    dy = drawer(x.dtype, x.device, 100 + seed)(*x.shape)
    ds = None if residual is None else drawer(x.dtype, x.device, 200 + seed)(*x.shape)
    saved = None
    for forward, backward, dtype in (
        (kernels.launch_layer_norm, kernels.launch_layer_norm_backward, None),
        (op.layer_norm_reference, op.layer_norm_backward_reference, None),
        (op.layer_norm_reference, op.layer_norm_backward_reference, torch.float64),
    ):
        cast = lambda t, dtype=dtype: t if t is None or dtype is None else t.to(dtype)  # noqa: E731
        y, *rest = forward(cast(x), cast(weight), cast(bias), cast(residual), EPS, offset, None)
        saved = rest if saved is None else saved
        s, mean, rstd = map(cast, saved)
        wanted = (weight is not None, bias is not None)
        gradients = backward(cast(dy), cast(ds), s, cast(weight), cast(bias), mean, rstd, offset, *wanted)
        results.append([y, *rest, *gradients])
    return results[0], results[1], results[2]


def judge(draws: list[tuple[list[Tensor], list[Tensor], list[Tensor]]], case: str, names: tuple[str, ...] = NAMES) -> None:
    for position, name in enumerate(names):
        ours, theirs, truth = (torch.cat([draw[way][position].flatten() for draw in draws]) for way in range(3))
        assert draws[0][0][position].shape == draws[0][1][position].shape
        if name in ("mean", "rstd") or (case == "one number" and name == "dx"):
            continue  # one number per row, judged through y and dx; dx of a single number: zero but for rounding
        assert_close_to_reference(ours, theirs, truth, f"{case}, {name}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(ROW_CASES))
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_law_holds(case: str, dtype: torch.dtype, with_residual: bool, device: torch.device) -> None:
    draws = []
    for seed in range(8 if case in ("one number", "odd") else 2):
        draw = drawer(dtype, device, seed)
        x = ROW_CASES[case](draw)
        draws.append(both_ways(x, draw(x.shape[-1]), draw(x.shape[-1]), draw(*x.shape) if with_residual else None, 0.0, seed))
    judge(draws, case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16])
def test_mixed_dtypes_and_offset(weight_dtype: torch.dtype | None, device: torch.device) -> None:
    draws = []
    for seed in range(2):
        weight = None if weight_dtype is None else drawer(weight_dtype, device, 7)(96)
        bias = None if weight is None else weight.float()
        draws.append(both_ways(drawer(torch.float16, device, seed)(5, 96), weight, bias, None, 1.0, seed))
    assert draws[0][0][0].dtype == torch.float16
    judge(draws, "mixed")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [8192, 9001, 12288, 16384, 16385])
@pytest.mark.parametrize("with_residual", [False, True])
def test_wide_rows(dim: int, with_residual: bool, device: torch.device) -> None:
    draw = drawer(torch.float16, device)
    residual = draw(7, dim) if with_residual else None
    judge([both_ways(draw(7, dim), draw(dim), draw(dim), residual, 1.0, 0)], f"{dim} wide")


@pytest.mark.parametrize("dim", [80, 8200])
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
def test_only_wanted_gradients_are_summed(dim: int, wanted: tuple[bool, bool], device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    x, weight, bias, dy = draw(9, dim), draw(dim), draw(dim), draw(9, dim)
    _, _, mean, rstd = kernels.launch_layer_norm(x, weight, bias, None, EPS, 0.0, None)
    arguments = (dy, None, x, weight, bias, mean, rstd)
    some = kernels.launch_layer_norm_backward(*arguments, 0.0, *wanted)
    theirs = op.layer_norm_backward_reference(*arguments, 0.0, True, True)
    wide = [t if t is None else t.double() for t in arguments]
    truth = op.layer_norm_backward_reference(*wide, 0.0, True, True)  # type: ignore[arg-type]
    for name, total, *others, is_wanted in zip(("dx", "dweight", "dbias"), some, theirs, truth, (True, *wanted), strict=True):
        if is_wanted:
            assert_close_to_reference(total, *others, f"{wanted}, {name}")
        else:
            assert total.numel() == 0


def test_weight_gradients_are_the_same_bits_every_time(device: torch.device) -> None:
    draw = drawer(torch.float16, device)
    x, weight, dy = draw(150, 64), draw(64), draw(150, 64)
    _, _, mean, rstd = kernels.launch_layer_norm(x, weight, weight, None, EPS, 0.0, None)
    first, second = (
        kernels.launch_layer_norm_backward(dy, None, x, weight, weight, mean, rstd, 0.0, True, True) for _ in range(2)
    )
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_launchers_check_first(device: torch.device) -> None:
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(ConfigError, match="weight: received shape"):
        kernels.launch_layer_norm(x, torch.ones(7, device=device), None, None, EPS, 0.0, None)
    with pytest.raises(ConfigError, match="eps"):
        kernels.launch_layer_norm(x, None, None, None, -1.0, 0.0, None)


SIGNATURE = {"eps": "fp32", "num_rows": "i32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partials_ptr": "*fp32"}
TARGETS = {
    "sm_80": (108, 166_912),
    "sm_90": (132, 232_448),
    "sm_100": (148, 232_448),
    "gfx942": (304, 65_536),
    "gfx950": (256, 163_840),
}


def signature(kernel: Any, dtype: str) -> dict[str, str]:
    kind = {"ptr": f"*{dtype}", "units": "i32"}
    return {name: SIGNATURE.get(name, kind.get(name.rsplit("_", 1)[-1], "constexpr")) for name in kernel.arg_names}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [768, 1000, 4097, 8192, 16384])
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernels_compile_for_every_target(
    dim: int, dtype: str, with_residual: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    itemsize = 2 if dtype == "bf16" else 4
    shape = {"DIM": dim, "UNIT": 16 if dim % 16 == 0 else 8 if dim % 8 == 0 else 1, "WEIGHT_OFFSET": 0.0, "HAS_WEIGHT": True}
    absent = {} if with_residual else {"residual_ptr": None, "s_ptr": None}
    kernel = kernels._layer_norm_fwd_kernel
    for few in (False, True):
        blocks = forward_blocks(dim, itemsize, few)
        tile = {"ROWS": blocks.rows, "BLOCK": blocks.columns, "HAS_RESIDUAL": with_residual, "HAS_BIAS": True}
        built = compile_for_all_targets(
            kernel,
            signature(kernel, dtype),
            {**shape, **tile, **absent},
            num_warps=blocks.warps,
            spill_allowed=16 if dim > 8192 else 0,
        )
        if dim % 8 == 0 and not few:
            assert re.search(r"ld\.global\S*\.v4", built["sm_90"].assembly), "the row is not read 16 bytes at a time"
    kernel = kernels._layer_norm_bwd_kernel
    for target, (processors, shared) in TARGETS.items():
        for weight_gradient in (True, False) if dim <= 8192 else (False,):
            blocks = (
                backward_blocks(dim, itemsize, itemsize, 32768, 2 + with_residual, 2, processors, shared)
                if weight_gradient
                else no_weight_blocks(dim, itemsize, False)
            )
            tile = {"ROWS": blocks.rows, "BLOCK": blocks.columns, "STAGES": blocks.stages}
            flags = {"HAS_DS": with_residual, "WEIGHT_GRADIENT": weight_gradient, "BIAS_GRADIENT": weight_gradient}
            absent = {} if with_residual else {"ds_ptr": None}
            absent |= {} if weight_gradient else {"partials_ptr": None}
            compile_for_all_targets(
                kernel,
                signature(kernel, dtype),
                {**shape, **tile, **flags, **absent},
                num_warps=blocks.warps,
                targets=(target,),
                # Rows that are read number by number, or are twice as wide as registers hold with ease, may spill a little.
                spill_allowed=0 if dim % 8 == 0 and dim <= 8192 else 160,
            )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [256, 768, 1024, 2048, 4096, 5120, 8192, 16384])
def test_a_walk_that_is_launched_early_fills_a_multiprocessor(
    dim: int, dtype: str, compile_for_all_targets: Callable[..., Any]
) -> None:
    itemsize, (processors, shared) = 2 if dtype == "bf16" else 4, TARGETS["sm_90"]
    values = {
        **{"DIM": dim, "UNIT": 16, "WEIGHT_OFFSET": 0.0, "HAS_WEIGHT": True, "HAS_DS": False, "ds_ptr": None},
        **{"WEIGHT_GRADIENT": True, "BIAS_GRADIENT": True},
    }
    if dim > 8192:
        halves = 2 if dtype == "bf16" else 1
        kernel, blocks = kernels._layer_norm_wide_bwd_kernel, wide_backward_blocks(itemsize, halves, False, 1 << 20, processors)
        values |= {"PARTS": dim // blocks.columns, "VECTOR": 4, "AHEAD": blocks.ahead, "HALVES": halves}
        values["BLOCK"] = blocks.columns // halves
    else:
        kernel = kernels._layer_norm_bwd_kernel
        blocks = backward_blocks(dim, itemsize, itemsize, 1 << 20, 2, 2, processors, shared)
        values |= {"ROWS": blocks.rows, "STAGES": blocks.stages, "BLOCK": blocks.columns}
    assert blocks.early == (dtype == "bf16" or dim in (5120, 8192))
    if not blocks.early:
        return
    arguments = {"num_warps": blocks.warps, "targets": ("sm_90",), "spill_allowed": 48 if dim > 8192 else 0}
    built = compile_for_all_targets(kernel, signature(kernel, dtype), values, **arguments)["sm_90"]
    assert built.resident(blocks.warps) * processors <= blocks.programs


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("dim", [10240, 16384])
def test_packed_rows_compile_for_every_target(dim: int, dtype: str, compile_for_all_targets: Callable[..., Any]) -> None:
    """With words in registers; a warp's own stay where they are: a count, a mean and a sum of each cross warps."""
    kernel, blocks = kernels._layer_norm_packed_fwd_kernel, packed_forward_blocks(dim)
    assert blocks is not None
    values = {"DIM": dim, "UNIT": 16, "WEIGHT_OFFSET": 0.0, "HAS_WEIGHT": True, "HAS_BIAS": True, "WARPS": blocks.warps}
    for target in TARGETS:
        values["BLOCK"] = blocks.warps * 4 * (32 if target.startswith("sm") else 64)
        if dim % (2 * values["BLOCK"]):
            continue  # 10240 by warps of 64: there numbers are not packed
        arguments = {"num_warps": blocks.warps, "targets": (target,), "spill_allowed": 0}
        built = compile_for_all_targets(kernel, signature(kernel, dtype), values, **arguments)[target]
        assert built.shared <= 3 * 4 * blocks.warps, "numbers are exchanged before they are summed"
        if target == "sm_90":
            assert built.resident(blocks.warps) * blocks.warps >= 40, "numbers stay in registers, not words, and 32 warps fit"
            assert re.search(r"ld\.global\S*\.v4", built.assembly), "the row is not read 16 bytes at a time"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows_are", ["plain", "far from zero", "an outlier", "one number"])
@pytest.mark.parametrize(("dim", "warps", "dtype"), [(2048, 4, torch.bfloat16), (1536, 2, torch.float16)])
def test_packed_rows_keep_the_law(dim: int, warps: int, rows_are: str, dtype: torch.dtype, device: torch.device) -> None:
    blocks = rows.RowBlocks(1, 1 << (dim - 1).bit_length(), warps, packed=True)
    results: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(2):
        draw = drawer(dtype, device, seed)
        x, dy, weight, bias = draw(5, dim), draw(5, dim), draw(dim), draw(dim)
        if rows_are == "far from zero":
            x = x + 1000.0
        elif rows_are == "an outlier":
            x[:, 7] = 10_000.0
        elif rows_are == "one number":
            x = torch.full_like(x, 3.0)
        for result, wide in zip(results, (False, False, True), strict=True):
            ours = result is results[0]
            given = [t.double() if wide else t for t in (x, weight, bias)]
            forward = functools.partial(kernels.launch_layer_norm, blocks=blocks) if ours else op.layer_norm_reference
            backward = kernels.launch_layer_norm_backward if ours else op.layer_norm_backward_reference
            y, s, mean, rstd = forward(*given, None, EPS, 1.0, None)
            gradients = backward(dy.double() if wide else dy, None, s, *given[1:], mean, rstd, 1.0, True, True)
            result.append([y, *gradients])
    for place, what in enumerate(("y", "dx", "dweight", "dbias")):
        joined = (torch.cat([outputs[place].flatten() for outputs in result]) for result in results)
        assert_close_to_reference(*joined, f"{rows_are}, {dim}: {what}")


PACKED = {
    "plain": True,
    "a stride": True,
    "chosen": True,
    "few rows": False,
    "no weight": True,
    "no bias": True,
    "float16": True,
    "not chosen": False,
    "a residual": False,
    "a wider result": False,
    "an odd stride": False,
    "between words": False,
    "a weight between words": False,
    "a weight in float32": False,
    "float32": False,
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", PACKED)
def test_rows_are_packed_where_they_can_be(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    many = 2 * rows.device_facts(torch.empty(0, device=device))[0] + 1
    dim, num_rows = {"chosen": (10240, many), "few rows": (10240, many - 1)}.get(case, (1024, 3))
    draw = drawer({"float16": torch.float16, "float32": torch.float32}.get(case, torch.bfloat16), device)
    x, weight, bias = draw(num_rows, dim), draw(dim), draw(dim)
    residual = draw(num_rows, dim) if case == "a residual" else None
    if case in ("a stride", "an odd stride"):
        x = draw(3, dim + (8 if case == "a stride" else 1))[:, :dim]
    elif case == "between words":
        x = draw(3 * dim + 1)[1:].view(3, dim)
    elif case == "a weight between words":
        weight = draw(dim + 1)[1:]
    elif case == "a weight in float32":
        weight, bias = weight.float(), bias.float()
    elif case == "a wider result":  # of which a mean that is a digit short would be seen
        x = x + 1000.0
    given = (x, None if case == "no weight" else weight, None if case == "no bias" else bias, residual, EPS, 1.0)
    out_dtype = torch.float32 if case == "a wider result" else None
    seen, launch = [], kernels._PACKED_FORWARD

    def note(grid: Any, *arguments: Any) -> None:
        seen.append(grid)
        launch(grid, *arguments)

    monkeypatch.setattr(kernels, "_PACKED_FORWARD", note)
    blocks = None if case in ("chosen", "few rows") else rows.RowBlocks(1, dim, 2, packed=case != "not chosen")
    ours = kernels.launch_layer_norm(*given, out_dtype, blocks)
    assert seen == [(num_rows,)] * PACKED[case]
    theirs = op.layer_norm_reference(*given, out_dtype)
    exact = op.layer_norm_reference(*(t.double() if isinstance(t, Tensor) else t for t in given), None)
    for mine, other, right, what in zip(ours, theirs, exact, ("y", "s", "mean", "rstd"), strict=True):
        if what in ("y", "s"):
            assert_close_to_reference(mine, other, right, f"{case}: {what}")


def test_wide_rows_of_half_precision_are_packed() -> None:
    assert [blocks and blocks.warps for blocks in map(packed_forward_blocks, (10240, 12288, 16384))] == [8, 16, 16]
    assert [packed_forward_blocks(dim) for dim in (768, 4096, 8192, 9216, 16383)] == [None] * 5


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [12288, 16384])
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_of_wide_rows_compiles_for_every_target(
    dim: int, dtype: str, with_residual: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    kernel = kernels._layer_norm_wide_bwd_kernel
    halves = 2 if dtype == "bf16" else 1
    blocks = wide_backward_blocks(4 if dtype == "fp32" else 2, halves, with_residual, 32768, 132)
    values = {
        **{"DIM": dim, "UNIT": 16, "WEIGHT_OFFSET": 0.0, "HAS_WEIGHT": True, "HAS_DS": with_residual},
        **{"WEIGHT_GRADIENT": True, "BIAS_GRADIENT": True, "BLOCK": blocks.columns // halves},
        **{"PARTS": -(-dim // blocks.columns), "VECTOR": 4, "AHEAD": blocks.ahead, "HALVES": halves},
        **({} if with_residual else {"ds_ptr": None}),
    }
    types, warps = signature(kernel, dtype), blocks.warps
    # Bytes, of 512 in registers. Triton 3.6 spills at most 8 on sm_90, with a residual 32; 3.7 up to 200 on sm_100.
    allowed = {"sm_80": 96, "sm_90": 48, "sm_100": 208, "gfx942": 0, "gfx950": 0}
    built = {}
    for target, spill_allowed in allowed.items():
        built |= compile_for_all_targets(kernel, types, values, num_warps=warps, spill_allowed=spill_allowed, targets=(target,))
    assert re.search(r"ld\.global\S*\.v[24]", built["sm_90"].assembly), "the row is read number by number"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [8200, 16384])
def test_column_sums_compile_for_every_target(dim: int, dtype: str, compile_for_all_targets: Callable[..., Any]) -> None:
    kernel = rows._column_sums_kernel
    sums = {f"{name}_ptr": f"*{dtype}" for name in ("first", "second", "third")}
    types = {"partials_ptr": "*fp32", **sums, "num_partials": "i32"}
    for halves, warps, tile in ((1, 4, (128, 32)), (1, 4, (64, 16)), (2, 2, (128, 32))):
        values = {"DIM": dim, "HALVES": halves, "ROWS": tile[0], "BLOCK": tile[1]}
        compile_for_all_targets(kernel, types, values, num_warps=warps)


@pytest.mark.parametrize(
    ("itemsize", "halves", "added", "ahead"), [(2, 1, False, 4), (2, 2, False, 3), (2, 2, True, 2), (4, 1, False, 0)]
)
@pytest.mark.parametrize("dim", [8193, 12288, 16384])
def test_parts_of_wide_rows_cover_them(dim: int, itemsize: int, halves: int, added: bool, ahead: int) -> None:
    blocks = wide_backward_blocks(itemsize, halves, added, 32768, 132)
    assert blocks.ahead == ahead, "not what the sweep chose"
    assert blocks.ahead <= -(-dim // blocks.columns), "a part that the row does not have"
    assert blocks.programs == 132
    assert wide_backward_blocks(itemsize, halves, added, 5, 132).programs == 5


def backward_under_the_law(arguments: tuple[Tensor | None, ...], what: str, blocks: rows.RowBlocks | None = None) -> None:
    ours = kernels.launch_layer_norm_backward(*arguments, 0.0, True, True, blocks)  # type: ignore[arg-type]
    theirs = op.layer_norm_backward_reference(*arguments, 0.0, True, True)  # type: ignore[arg-type]
    wide = [t if t is None else t.double() for t in arguments]
    truth = op.layer_norm_backward_reference(*wide, 0.0, True, True)  # type: ignore[arg-type]
    for name, *tensors in zip(("dx", "dweight", "dbias"), ours, theirs, truth, strict=True):
        assert_close_to_reference(*tensors, f"{what}, {name}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "cut"),
    [(torch.float16, (4096, 0)), (torch.bfloat16, (2048, 0)), (torch.float16, (2048, 4)), (torch.bfloat16, (1024, 7))],
)
def test_wide_rows_in_other_parts(cut: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    draw = drawer(dtype, device)
    x, weight, bias, dy = draw(7, 8200), draw(8200), draw(8200), draw(7, 8200)
    _, _, mean, rstd = kernels.launch_layer_norm(x, weight, bias, None, EPS, 0.0, None)
    blocks = replace(wide_backward_blocks(2, 1, False, 7, 4), columns=cut[0], ahead=cut[1])
    backward_under_the_law((dy, None, x, weight, bias, mean, rstd), f"parts of {cut[0]}, {cut[1]} ahead", blocks)


WORDS = {
    "plain": 2,
    "far from zero": 2,
    "one number": 2,
    "a gradient of its own": 2,
    "a bias alone": 2,
    "an even width": 2,
    "an odd width": 1,
    "between words": 1,
    "a weight between words": 1,
    "a weight in float32": 1,
    "float16": 1,
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", WORDS)
def test_wide_rows_are_read_as_words(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    dim = {"an even width": 8202, "an odd width": 8201}.get(case, 8200)
    draw = drawer(torch.float16 if case == "float16" else torch.bfloat16, device)
    num_rows = 5 if case == "plain" else 2  # of which a program walks over two
    x, dy, weight, bias = draw(num_rows, dim), draw(num_rows, dim), draw(dim), draw(dim)
    ds = draw(num_rows, dim) if case == "a gradient of its own" else None
    if case == "far from zero":
        x = x + 100.0
    elif case == "one number":
        x = torch.full_like(x, 3.0)
    elif case == "between words":
        x = draw(num_rows * dim + 1)[1:].view(num_rows, dim)
    elif case == "a weight between words":
        weight = draw(dim + 1)[1:]
    elif case == "a weight in float32":
        weight, bias = weight.float(), bias.float()
    _, _, mean, rstd = op.layer_norm_reference(x, weight, bias, None, EPS, 0.0, None)
    seen, launch = [], kernels._WIDE_BACKWARD

    def note(grid: Any, pointers: Any, numbers: Any, constants: Any, warps: int) -> None:
        seen.append(constants[-2])  # HALVES, before CHAIN
        launch(grid, pointers, numbers, constants, warps)

    monkeypatch.setattr(kernels, "_WIDE_BACKWARD", note)
    backward_under_the_law((dy, ds, x, None if case == "a bias alone" else weight, bias, mean, rstd), case)
    assert seen == [WORDS[case]]
