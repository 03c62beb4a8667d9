"""The kernels of dropout_add_layer_norm: the cases of the reference, on a GPU or interpreted; compiled for GPUs not here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import dropout_add_layer_norm as op
from oslo_fusion.ops.dropout import kept_in_rows
from oslo_fusion.ops.row_cases import ROW_CASES, drawer
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import dropout_add_layer_norm as kernels
from oslo_fusion.triton.dropout_add_layer_norm import add_norm_backward_blocks, add_norm_forward_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5
NAMES = ("y", "s", "mean", "rstd", "dresidual", "dx", "dlinear_bias", "dweight", "dbias")
KINDS = ((torch.float32, 0.25), (torch.bfloat16, 0.25), (torch.float16, 0.0))
TURNS = list(zip(ROW_CASES, itertools.cycle(KINDS), strict=False))
"""Dtype and dropout take turns over the cases: a kernel of each combination is slow to interpret, and to compile."""


def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""

    def empty(size: Any, **kwargs: Any) -> Tensor:
        return torch.full(size if isinstance(size, (tuple, torch.Size)) else (size,), float("nan"), **kwargs)

    monkeypatch.setattr(torch, "empty", empty)


def both_ways(x: Tensor, residual: Tensor, vectors: list[Tensor | None], dropout: float, seed: int) -> list[list[Tensor]]:
    """What the kernels give, the reference in the same dtype, and in float64; forward, then backward from the same numbers."""
    results = []
    rng = torch.tensor([seed, 11], device=x.device) if dropout else None
    dy = drawer(torch.promote_types(x.dtype, residual.dtype), x.device, 100 + seed)(*x.shape)
    saved = None
    for forward, backward, dtype in (
        (kernels.launch_dropout_add_layer_norm, kernels.launch_dropout_add_layer_norm_backward, None),
        (op.dropout_add_layer_norm_reference, op.dropout_add_layer_norm_backward_reference, None),
        (op.dropout_add_layer_norm_reference, op.dropout_add_layer_norm_backward_reference, torch.float64),
    ):
        cast = lambda t, dtype=dtype: t if t is None or dtype is None else t.to(dtype)  # noqa: E731
        parameters = [cast(vector) for vector in vectors]
        y, *rest = forward(cast(x), cast(residual), *parameters, rng, dropout, EPS, None)
        saved = rest if saved is None else saved
        s, mean, rstd = map(cast, saved)
        dtypes = (dtype or x.dtype, dtype or residual.dtype)
        wanted = [vector is not None for vector in vectors]
        gradients = backward(cast(dy), None, s, *parameters, mean, rstd, rng, dropout, *dtypes, *wanted)
        results.append([y, *rest, *gradients])
    return results


def judge(draws: list[list[list[Tensor]]], case: str) -> None:
    for position, name in enumerate(NAMES):
        ours, theirs, truth = (torch.cat([draw[way][position].flatten() for draw in draws]) for way in range(3))
        assert draws[0][0][position].shape == draws[0][1][position].shape
        if name in ("mean", "rstd") or (case == "one number" and name in ("dresidual", "dx", "dlinear_bias")):
            continue  # one number per row, judged through y and dx; gradients of a single number: zero but for rounding
        assert_close_to_reference(ours, theirs, truth, f"{case}, {name}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "kind"), TURNS, ids=list(ROW_CASES))
def test_the_law_holds(case: str, kind: tuple[torch.dtype, float], device: torch.device) -> None:
    dtype, dropout = kind
    draws = []
    for seed in range(8 if case in ("one number", "odd") else 2):
        draw = drawer(dtype, device, seed)
        x, residual = ROW_CASES[case](draw), ROW_CASES[case](draw).contiguous()
        pair = (x, residual) if seed % 2 == 0 else (residual, x)
        draws.append(both_ways(*pair, [draw(x.shape[-1]) for _ in range(3)], dropout, seed))
    judge(draws, case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("present", [(False, False, False), (True, False, True), (False, True, False)])
def test_mixed_dtypes_and_absent_vectors(present: tuple[bool, ...], device: torch.device) -> None:
    draws = []
    for seed in range(2):
        vectors = [drawer(torch.float32, device, 7 + n)(96) if there else None for n, there in enumerate(present)]
        x, residual = drawer(torch.float16, device, seed)(5, 96), drawer(torch.float32, device, 50 + seed)(5, 96)
        draws.append(both_ways(x, residual, vectors, 0.1, seed))
    assert [draws[0][0][NAMES.index(name)].dtype for name in ("y", "s", "dresidual")] == [torch.float32] * 3
    assert draws[0][0][NAMES.index("dx")].dtype == torch.float16
    judge(draws, "mixed")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [3000, 8192, 8193])
def test_wide_rows(dim: int, device: torch.device) -> None:
    draw = drawer(torch.float16, device)
    judge([both_ways(draw(3, dim), draw(3, dim), [draw(dim) for _ in range(3)], 0.3, 0)], f"{dim} wide")


@pytest.mark.parametrize("shape", [(9, 80), (3, 1025), (5, 1)])
def test_both_kernels_draw_the_mask_of_the_reference(shape: tuple[int, int], device: torch.device) -> None:
    rng = torch.tensor([3 + (5 << 40), -7], device=device)
    x, zero, dy = torch.ones(shape, device=device), torch.zeros(shape, device=device), drawer(torch.float32, device)(*shape)
    kept = kept_in_rows(rng, 0.4, shape)
    assert 0 < kept.sum() < kept.numel() or kept.numel() < 9
    _, s, mean, rstd = kernels.launch_dropout_add_layer_norm(x, zero, None, None, None, rng, 0.4, EPS, None)
    assert torch.equal(s != 0, kept)
    # Another s, whose rows are not all alike, so that no gradient is zero of its own.
    s, mean, rstd = drawer(torch.float32, device, 1)(*shape), torch.zeros_like(mean), torch.ones_like(rstd)
    dresidual, dx, *_ = kernels.launch_dropout_add_layer_norm_backward(
        dy, None, s, None, None, None, mean, rstd, rng, 0.4, x.dtype, x.dtype, False, False, False
    )
    assert torch.equal(dx != 0, kept & (dresidual != 0))


@pytest.mark.parametrize("wanted", [(False, False, False), (True, False, False), (False, True, False), (False, True, True)])
def test_only_wanted_gradients_are_summed(wanted: tuple[bool, bool, bool], device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    s, dy, vector, stats = draw(9, 80), draw(9, 80), draw(80), draw(9).abs()
    arguments = (dy, None, s, vector, vector, vector, stats, stats, torch.tensor([1, 2], device=device), 0.5, s.dtype, s.dtype)
    everything = kernels.launch_dropout_add_layer_norm_backward(*arguments, True, True, True)
    some = kernels.launch_dropout_add_layer_norm_backward(*arguments, *wanted)
    for mine, full in zip(some[:2], everything[:2], strict=True):
        torch.testing.assert_close(mine, full, rtol=1e-6, atol=1e-6)
    for total, expected, is_wanted in zip(some[2:], everything[2:], wanted, strict=True):
        assert torch.equal(total, expected) if is_wanted else total.numel() == 0


def test_sums_are_the_same_bits_every_time(device: torch.device) -> None:
    draw = drawer(torch.float16, device)
    s, dy, vector, stats = draw(150, 64), draw(150, 64), draw(64), drawer(torch.float32, device)(150).abs()
    rng = torch.tensor([1, 2], device=device)
    arguments = (dy, None, s, vector, vector, vector, stats, stats, rng, 0.1, s.dtype, s.dtype, True, True, True)
    first, second = (kernels.launch_dropout_add_layer_norm_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_gradient_of_the_sum_is_added(device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    s, dy, ds, stats = draw(5, 48), draw(5, 48), draw(5, 48), draw(5).abs()
    arguments = (s, None, None, None, stats, stats, None, 0.0, s.dtype, s.dtype, False, False, False)
    without, with_it = (kernels.launch_dropout_add_layer_norm_backward(dy, other, *arguments)[0] for other in (None, ds))
    torch.testing.assert_close(with_it, without + ds)


@pytest.mark.parametrize("cut", [(1, 1, 1, 1), (4, 2, 3, 2), (2, 4, 2, 3)])
def test_other_tiles_give_the_same_mask_and_sums(cut: tuple[int, int, int, int], device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    x, residual, vector, dy = draw(37, 200), draw(37, 200), draw(200), draw(37, 200)
    rng = torch.tensor([1, 2], device=device)
    rows, warps, programs, stages = cut
    tile = {"rows": rows, "warps": warps}
    blocks = replace(add_norm_forward_blocks(200, 4, True), **tile)
    inputs = (x, residual, vector, vector, vector, rng, 0.3, EPS, None)
    expected, results = (kernels.launch_dropout_add_layer_norm(*inputs, b) for b in (None, blocks))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    blocks = replace(add_norm_backward_blocks(200, 4, 37, True, 4, 200_000), **tile, programs=programs, stages=stages)
    _, s, mean, rstd = expected
    given = (dy, None, s, vector, vector, vector, mean, rstd, rng, 0.3, x.dtype, x.dtype, True, True, True)
    for a, b in zip(*(kernels.launch_dropout_add_layer_norm_backward(*given, b) for b in (None, blocks)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_sum_is_written_where_it_is_kept(device: torch.device) -> None:
    draw = drawer(torch.bfloat16, device)
    inputs = (draw(5, 96), draw(5, 96), draw(96), draw(96), draw(96), torch.tensor([1, 2], device=device), 0.3, EPS, None)
    kept, dropped = (kernels.launch_dropout_add_layer_norm(*inputs, keep=keep) for keep in (True, False))
    assert torch.equal(kept[0], dropped[0])
    assert (kept[1].numel(), dropped[1].numel()) == (480, 0)


def test_launchers_check_first(device: torch.device) -> None:
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(ConfigError, match="weight: received shape"):
        kernels.launch_dropout_add_layer_norm(x, x, None, torch.ones(7, device=device), None, None, 0.0, EPS, None)
    with pytest.raises(ConfigError, match="rng"):
        kernels.launch_dropout_add_layer_norm(x, x, None, None, None, None, 0.1, EPS, None)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_law_holds_at_the_shape_of_bert(dtype: torch.dtype, dropout: float, device: torch.device) -> None:
    draw = drawer(dtype, device)
    judge([both_ways(draw(32768, 768), draw(32768, 768), [draw(768) for _ in range(3)], dropout, 0)], "BERT")


# --- blocks and compilation --------------------------------------------------------------------------------------------------

WIDTHS = (1, 13, 96, 768, 1000, 1024, 2048, 4096, 4097, 8192)
TARGETS = {
    "sm_80": (108, 166_912),
    "sm_90": (132, 232_448),
    "sm_100": (148, 232_448),
    "gfx942": (304, 65_536),
    "gfx950": (256, 163_840),
}


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", WIDTHS)
def test_blocks_cover_a_row_and_fit(dim: int, itemsize: int) -> None:
    for few in (False, True):
        blocks = add_norm_forward_blocks(dim, itemsize, few)
        assert dim <= blocks.columns < max(17, 2 * dim)
        assert blocks.columns % 4 == 0, "a tile is drawn in quarters"
    for processors, shared in TARGETS.values():
        blocks = add_norm_backward_blocks(dim, itemsize, 1 << 20, True, processors, shared)
        assert dim <= blocks.columns < max(17, 2 * dim)
        assert blocks.rows * blocks.columns <= 32 * blocks.warps * 16, "three sums of more numbers a thread would spill"
        resident = blocks.programs // processors
        assert (blocks.stages - 1) * blocks.rows * blocks.columns * itemsize * (2 + blocks.reload) * resident <= shared
        assert 1 <= resident <= 4
        assert add_norm_backward_blocks(dim, itemsize, 3, True, processors, shared).programs <= 3


def test_blocks_of_bert_are_those_that_were_chosen() -> None:
    forward, backward = add_norm_forward_blocks(768, 2, False), add_norm_backward_blocks(768, 2, 32768, True, *TARGETS["sm_90"])
    assert (forward.rows, forward.columns, forward.warps) == (2, 1024, 2)
    assert (backward.rows, backward.columns, backward.warps, backward.programs, backward.stages) == (2, 1024, 4, 396, 3)


SIGNATURE = {
    **{"eps": "fp32", "num_rows": "i32", "scale": "fp32", "threshold": "i32", "rng_ptr": "*i64"},
    **{"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partials_ptr": "*fp32"},
}


def signature(kernel: Any, dtype: str) -> dict[str, str]:
    kind = {"ptr": f"*{dtype}", "units": "i32"}
    return {name: SIGNATURE.get(name, kind.get(name.rsplit("_", 1)[-1], "constexpr")) for name in kernel.arg_names}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("dim", "dropout"), [(768, False), (768, True), (1000, True), (8192, True)])
def test_kernels_compile_for_every_target(
    dim: int, dtype: str, dropout: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    itemsize = 2 if dtype == "bf16" else 4
    shape = {"DIM": dim, "UNIT": 16 if dim % 16 == 0 else 8, "HAS_WEIGHT": True, "DROPOUT": dropout}
    absent = {} if dropout else {"rng_ptr": None}
    # A row of 8192 numbers has all registers of 16 warps: 8 bytes of 512 spill in bfloat16, 40 in float32 (sm_100).
    allowed = 48 if dim == 8192 else 0
    kernel = kernels._dropout_add_layer_norm_fwd_kernel
    for few in (False, True):
        blocks = add_norm_forward_blocks(dim, itemsize, few)
        tile = {"ROWS": blocks.rows, "BLOCK": blocks.columns, "HAS_LINEAR_BIAS": True, "HAS_BIAS": True, "KEEP": True}
        values = {**shape, **tile, **absent}
        built = compile_for_all_targets(kernel, signature(kernel, dtype), values, num_warps=blocks.warps, spill_allowed=allowed)
        if not few:
            assert re.search(r"ld\.global\S*\.v4", built["sm_90"].assembly), "the row is not read 16 bytes at a time"
    kernel = kernels._dropout_add_layer_norm_bwd_kernel
    absent |= {} if dropout else {"dx_ptr": None}
    for target, facts in TARGETS.items():
        blocks = add_norm_backward_blocks(dim, itemsize, 32768, dropout, *facts)
        tile = {"ROWS": blocks.rows, "BLOCK": blocks.columns, "STAGES": blocks.stages, "RELOAD": blocks.reload}
        sums = {"LINEAR_BIAS_GRADIENT": True, "WEIGHT_GRADIENT": True, "BIAS_GRADIENT": True}
        values = {**shape, **tile, **sums, **absent}
        compile_for_all_targets(
            kernel,
            signature(kernel, dtype),
            values,
            num_warps=blocks.warps,
            targets=(target,),
            spill_allowed=allowed,
        )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dim", [768, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_walk_that_is_launched_early_fills_a_multiprocessor(
    dim: int, dtype: str, dropout: bool, compile_for_all_targets: Callable[..., Any]
) -> None:
    processors, shared = TARGETS["sm_90"]
    blocks = add_norm_backward_blocks(dim, 2 if dtype == "bf16" else 4, 1 << 20, dropout, processors, shared)
    assert blocks.early == (dim > 2048 if dtype == "fp32" else dim != 1024 and (dropout or dim != 4096))
    if not blocks.early:
        return
    kernel = kernels._dropout_add_layer_norm_bwd_kernel
    values = {
        **{"DIM": dim, "UNIT": 16, "HAS_WEIGHT": True, "DROPOUT": dropout, "RELOAD": blocks.reload},
        **{"LINEAR_BIAS_GRADIENT": True, "WEIGHT_GRADIENT": True, "BIAS_GRADIENT": True},
        **{"ROWS": blocks.rows, "BLOCK": blocks.columns, "STAGES": blocks.stages},
        **({} if dropout else {"rng_ptr": None, "dx_ptr": None}),
    }
    arguments = {"num_warps": blocks.warps, "targets": ("sm_90",), "spill_allowed": 48 if dim == 8192 else 0}
    built = compile_for_all_targets(kernel, signature(kernel, dtype), values, **arguments)["sm_90"]
    assert built.resident(blocks.warps) * processors <= blocks.programs


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_mask_is_drawn_where_it_is_needed(dtype: str, compile_for_all_targets: Callable[..., Any]) -> None:
    kernel = kernels._dropout_add_layer_norm_fwd_kernel
    blocks = add_norm_forward_blocks(768, 2 if dtype == "bf16" else 4, False)
    values = {"DIM": 768, "UNIT": 16, "ROWS": blocks.rows, "BLOCK": blocks.columns}
    values |= {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_LINEAR_BIAS": True, "KEEP": True}
    barriers = []
    for changed in ({"DROPOUT": False, "rng_ptr": None}, {"DROPOUT": True}):
        arguments = (signature(kernel, dtype), {**values, **changed})
        built = compile_for_all_targets(kernel, *arguments, num_warps=blocks.warps, targets=("sm_90",))
        barriers.append(built["sm_90"].assembly.count("bar.sync"))
    assert barriers[0] == barriers[1], "the mask goes from thread to thread through shared memory"
