"""The kernel of feed_forward's backward: on a GPU or interpreted, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.ops.feed_forward import GELUS, gelu_backward_in_place
from oslo_fusion.ops.glu import ACTIVATIONS
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import feed_forward as kernels
from oslo_fusion.triton.feed_forward import FeedForwardBlocks, feed_forward_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 13), (37, 96), (45, 300), (9, 1032))
NAMES = ("dh", "act", "dbias")


def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def plain(dact: Tensor, h: Tensor, activation: str) -> tuple[Tensor, ...]:
    """PyTorch's own, in the dtype of its inputs."""
    leaf = h.detach().requires_grad_()
    act = ACTIVATIONS[activation][0](leaf)
    (dh,) = torch.autograd.grad(act, leaf, dact)
    return dh, act.detach(), dh.sum(0)


def launched(dact: Tensor, h: Tensor, activation: str, blocks: FeedForwardBlocks | None = None) -> tuple[Tensor, ...]:
    mine = dact.clone()
    return mine, *kernels.launch_gelu_backward_in_place(mine, h, activation, blocks)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GELUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_holds(shape: tuple[int, int], activation: str, dtype: torch.dtype, device: torch.device) -> None:
    draws = []
    for seed in range(6 if shape[0] == 1 else 2):
        draw = drawer(dtype, device, seed)
        dact, h = draw(*shape), 2 * draw(*shape)
        mine, reference = launched(dact, h, activation), dact.clone()
        act, dbias = gelu_backward_in_place(reference, h, activation)
        assert [t.shape for t in mine] == [shape, shape, shape[1:]]
        draws.append((mine, plain(dact, h, activation), plain(dact.double(), h.double(), activation), (reference, act, dbias)))
    for position, name in enumerate(NAMES):
        ours, theirs, exact, reference = (torch.cat([draw[way][position].flatten() for draw in draws]) for way in range(4))
        assert_close_to_reference(ours, theirs, exact, f"{shape}, {name}")
        assert_close_to_reference(reference, theirs, exact, f"{shape}, {name}, the reference")


def test_large_numbers_nan_and_no_rows(device: torch.device) -> None:
    h = torch.tensor([[-1e4, -300.0, -20.0, -5.0, 0.0, 5.0, 20.0, 300.0, 1e4]], device=device).bfloat16()
    for activation in GELUS:
        dact = torch.ones_like(h)
        exact = plain(dact.double(), h.double(), activation)
        for mine, theirs, truth in zip(launched(dact, h, activation), plain(dact, h, activation), exact, strict=True):
            assert_close_to_reference(mine, theirs, truth, activation)
        assert all(t.isnan().all() for t in launched(dact, torch.full_like(h, float("nan")), activation))
    dh, act, dbias = launched(h[:0], h[:0], "gelu")
    assert dh.shape == act.shape == (0, 9)
    assert dbias.shape == (9,)
    assert not dbias.any()


@pytest.mark.parametrize(
    "blocks", [FeedForwardBlocks(1, 64, 1, 1), FeedForwardBlocks(4, 16, 2, 3), FeedForwardBlocks(16, 512, 8, 40)]
)
def test_tuned_tiles_give_the_same_bits_but_of_the_sum(blocks: FeedForwardBlocks, device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    dact, h = draw(45, 100), draw(45, 100)
    expected, tuned = (launched(dact, h, "gelu", b) for b in (None, blocks))
    assert all(torch.equal(a, b) for a, b in zip(expected[:2], tuned[:2], strict=True))
    exact = plain(dact.double(), h.double(), "gelu")[2]
    assert_close_to_reference(tuned[2], plain(dact, h, "gelu")[2], exact, "dbias")


def test_all_programs_are_resident_at_once_and_none_is_idle() -> None:
    for dim in (1, 13, 768, 3072, 4096, 16384):
        for rows in (1, 50, 2048, 32768):
            blocks = feed_forward_blocks(rows, dim, 132)
            assert blocks.rows * blocks.columns == 8 * 32 * blocks.warps
            assert blocks.programs <= -(-rows // blocks.rows)
            assert blocks.programs * -(-dim // blocks.columns) <= max(8 * 132, -(-dim // blocks.columns))
    assert feed_forward_blocks(32768, 3072, 132) == FeedForwardBlocks(4, 256, 4, 88)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("activation", GELUS)
@pytest.mark.parametrize("dim", [13, 3072])
def test_the_kernel_compiles_for_every_target(
    dim: int, activation: str, dtype: str, compile_for_all_targets: Callable[..., Any]
) -> None:
    kernel, blocks = kernels._gelu_bwd_sums_kernel, feed_forward_blocks(32768, dim, 132)
    kinds = {"partials_ptr": "*fp32", "num_rows": "i32"}
    types = {name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "constexpr") for name in kernel.arg_names}
    constants = {"ACTIVATION": activation, "HALF": dtype == "bf16", "DIM": dim, "ROWS": blocks.rows, "BLOCK": blocks.columns}
    built = compile_for_all_targets(kernel, types, constants, num_warps=blocks.warps)
    if dim % 8 == 0:
        assembly = built["sm_90"].assembly
        for wide in (r"ld\.global\S*\.v4", r"st\.global\.v4"):
            assert re.search(wide, assembly), f"numbers are not moved 16 bytes at a time: no {wide}"
        assert not re.search(r"ld\.global\S*b16", assembly)
        if dtype == "bf16":
            assert built["sm_90"].registers <= 64, "eight programs of a multiprocessor are resident"
