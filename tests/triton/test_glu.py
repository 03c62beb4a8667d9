"""The kernels of glu: the cases of the reference, on a GPU or interpreted; and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import glu as op
from oslo_fusion.ops.gated_mlp import glu_backward_in_place
from oslo_fusion.ops.row_cases import ROW_CASES, drawer, draws_of
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import glu as kernels
from oslo_fusion.triton.glu import GluBlocks, glu_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("h", "dgate", "dup")


def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def all_ways(dh: Tensor, gate: Tensor, up: Tensor, activation: str, **options: Any) -> list[list[Tensor]]:
    """What the kernels give, plain PyTorch in the same dtype, and the reference in float64; forward, then backward."""
    wide = [t.double() for t in (dh, gate, up)]
    function = op.ACTIVATIONS[activation][0]
    leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
    plain = function(leaves[0]) * leaves[1]
    return [
        [
            kernels.launch_glu(gate, up, activation, **options),
            *kernels.launch_glu_backward(dh, gate, up, activation, **options),
        ],
        [plain.detach(), *torch.autograd.grad(plain, leaves, dh.to(plain.dtype))],
        [op.glu_reference(*wide[1:], activation), *op.glu_backward_reference(*wide, activation)],
    ]


def judge(draws: list[list[list[Tensor]]], case: str) -> None:
    for position, name in enumerate(NAMES):
        assert draws[0][0][position].shape == draws[0][1][position].shape
        assert draws[0][0][position].is_contiguous()
        columns = (torch.cat([draw[way][position].flatten() for draw in draws]) for way in range(3))
        assert_close_to_reference(*columns, f"{case}, {name}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(op.ACTIVATIONS))
@pytest.mark.parametrize("case", list(ROW_CASES))
def test_the_law_holds(case: str, activation: str, dtype: torch.dtype, device: torch.device) -> None:
    draws = []
    for seed in range(max(2, draws_of(case) // 2)):
        draw = drawer(dtype, device, seed)
        gate, up = 2 * ROW_CASES[case](draw), ROW_CASES[case](draw)  # 2 times: contiguous; up as the case has it
        dh = ROW_CASES[case](draw) if seed % 2 else draw(*gate.shape)
        draws.append(all_ways(dh, gate, up, activation))
        draws.append(all_ways(dh, ROW_CASES[case](draw), up, activation))
    judge(draws, case)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [13, 300, 1000])
def test_halves_of_a_merged_projection_are_read_where_they_lie(
    dim: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = drawer(torch.bfloat16, device)
    merged = draw(3, 5, 2 * dim)
    gate, up = merged.chunk(2, -1)
    expected = all_ways(draw(3, 5, dim), gate, up, "silu")
    judge([expected], "halves")

    def copied(self: Tensor, **_: Any) -> Tensor:
        raise AssertionError("a half was copied")

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "contiguous", copied)
        assert torch.equal(kernels.launch_glu(gate, up, "silu"), expected[0][0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_gradient_of_a_merged_projection_is_written_as_one(
    dtype: torch.dtype, gate_first: bool, device: torch.device
) -> None:
    draw = drawer(dtype, device)
    merged, dh = draw(3, 5, 2 * 50).requires_grad_(), draw(3, 5, 50)
    gate, up = op.halves(merged, gate_first)
    assert (gate.data_ptr() < up.data_ptr()) == gate_first
    dgate, dup = kernels.launch_glu_backward(dh, gate.detach(), up.detach(), "gelu")
    expected = torch.cat((dgate, dup) if gate_first else (dup, dgate), -1)
    assert torch.equal(torch.autograd.grad(op._MergedGlu.apply(merged, "gelu", gate_first), merged, dh)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(op.ACTIVATIONS))
@pytest.mark.parametrize("dim", [13, 272])
def test_in_place_three_tensors_become_the_gradients_and_the_product(
    dim: int, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Whole tensors, and halves of one memory whose rest stays as it is. Gradients are the bits of the backward's kernel."""
    draw = drawer(dtype, device)
    given = [draw(37, dim), 2 * draw(37, dim), draw(37, dim)]
    wide, plain, whole = [t.double() for t in given], [t.clone() for t in given], [t.clone() for t in given]
    for tensors in (wide, plain):
        glu_backward_in_place(*tensors, activation)
    both = torch.full((37, 2 * dim + 3), 7.0, dtype=dtype, device=device)
    halves = [given[0].clone(), both[:, :dim], both[:, dim : 2 * dim]]
    for half, t in zip(halves[1:], given[1:], strict=True):
        half.copy_(t)
    for tensors in (whole, halves):
        kernels.launch_glu_backward_in_place(*tensors, activation)
        for mine, theirs, truth in zip(tensors, plain, wide, strict=True):
            assert_close_to_reference(mine, theirs, truth, "in place")
        for mine, theirs in zip(tensors[1:], kernels.launch_glu_backward(*given, activation), strict=True):
            assert torch.equal(mine, theirs)
    assert bool((both[:, 2 * dim :] == 7.0).all())


@pytest.mark.usefixtures("poisoned")
def test_mixed_dtypes(device: torch.device) -> None:
    for gate_dtype, up_dtype, dh_dtype in (
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ):
        gate, up = drawer(gate_dtype, device, 1)(7, 96), drawer(up_dtype, device, 2)(7, 96)
        draws = all_ways(drawer(dh_dtype, device, 3)(7, 96), gate, up, "gelu_tanh")
        assert [t.dtype for t in draws[0]] == [t.dtype for t in draws[1]]
        judge([draws], f"{gate_dtype} {up_dtype}")


@pytest.mark.parametrize("activation", list(op.ACTIVATIONS))
def test_large_numbers_do_what_pytorch_does(activation: str, device: torch.device) -> None:
    gate = torch.tensor([-1e4, -300.0, -88.0, -20.0, -5.0, 0.0, 5.0, 20.0, 88.0, 300.0, 1e4], device=device)
    judge([all_ways(torch.ones_like(gate), gate, torch.ones_like(gate), activation)], activation)
    x = torch.full((3,), float("nan"), device=device)
    assert all(
        t.isnan().all() for t in (kernels.launch_glu(x, x, activation), *kernels.launch_glu_backward(x, x, x, activation))
    )


@pytest.mark.parametrize("blocks", [GluBlocks(1, 64, 1), GluBlocks(4, 16, 2), GluBlocks(16, 512, 8)])
def test_tuned_tiles_give_the_same_bits(blocks: GluBlocks, device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    dh, gate, up = (draw(9, 2 * 100)[:, :100] for _ in range(3))
    expected, tuned = (all_ways(dh, gate, up, "silu", blocks=b)[0] for b in (None, blocks))
    assert all(torch.equal(a, b) for a, b in zip(expected, tuned, strict=True))


def test_plain_eager_code_launches_and_gets_its_gradients(device: torch.device) -> None:
    draw = drawer(torch.float32, device)
    leaves = [draw(6, 40).requires_grad_() for _ in range(2)]
    expected = torch.autograd.grad(op.glu_reference(*leaves, "silu").square().sum(), leaves)
    for result in (op._Glu.apply(*leaves, "silu"), op.swiglu(*leaves)):
        for mine, theirs in zip(torch.autograd.grad(result.square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_launchers_check_first(device: torch.device) -> None:
    x = torch.zeros(4, 8, device=device)
    with pytest.raises(ConfigError, match="up: received shape"):
        kernels.launch_glu(x, x[:1], "silu")
    with pytest.raises(ConfigError, match="activation: received 'relu'"):
        kernels.launch_glu_backward(x, x, x, "relu")
    with pytest.raises(ConfigError, match="up: received shape"):
        kernels.launch_glu_backward_in_place(x, x, x[:1], "silu")


DIMS = (1, 13, 768, 1000, 4097, 11008, 14336, 18944)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_feed_every_thread_with_whole_loads(itemsize: int) -> None:
    for dim in (0, *DIMS):
        blocks = glu_blocks(dim, itemsize)
        assert blocks.rows * blocks.columns * itemsize == 16 * 32 * blocks.warps
        assert blocks.columns & (blocks.columns - 1) == 0
        assert dim != 0 or blocks.rows == 1
        if dim:
            waste = -(-dim // blocks.columns) * blocks.columns / dim
            assert waste <= 1.07 or dim < 1024, (dim, blocks)
    assert glu_blocks(14336, 2).columns == 1024
    assert glu_blocks(11008, 2).columns == 256


TYPES = {"bf16": 2, "fp32": 4}


def signature(kernel: Any, dtype: str) -> dict[str, str]:
    kind = {"ptr": f"*{dtype}", "units": "i32"}
    return {name: kind.get(name.rsplit("_", 1)[-1], "constexpr") for name in kernel.arg_names}


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("activation", list(op.ACTIVATIONS))
@pytest.mark.parametrize("dim", [0, 768, 1000, 4097])
def test_kernels_compile_for_every_target(
    dim: int, activation: str, dtype: str, compile_for_all_targets: Callable[..., Any]
) -> None:
    for kernel in (kernels._glu_fwd_kernel, kernels._glu_bwd_kernel, kernels._glu_bwd_in_place_kernel):
        if kernel is kernels._glu_bwd_in_place_kernel and dim not in (0, 768):
            continue  # what it is launched on is as wide as a multiple of 128, but for small tensors
        blocks = glu_blocks(dim, TYPES[dtype])
        unit = 1 if dim % 8 else 8 if dim % 16 else 16
        formula = {"ACTIVATION": activation, "HALF": dtype == "bf16"}
        constants = {**formula, "DIM": dim, "UNIT": unit, "ROWS": blocks.rows, "BLOCK": blocks.columns}
        built = compile_for_all_targets(kernel, signature(kernel, dtype), constants, num_warps=blocks.warps)
        if unit > 1:
            assembly = built["sm_90"].assembly
            assert re.search(r"ld\.global\S*\.v4", assembly), "numbers are not read 16 bytes at a time"
            assert re.search(r"st\.global\S*\.v4", assembly), "numbers are not written 16 bytes at a time"
            assert not re.search(r"ld\.global\S*\.b16", assembly)
