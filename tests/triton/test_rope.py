"""The kernel of rope: the cases of the reference, on a GPU or interpreted; how it is cut; and compiled for GPUs not here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.rope import _Rope, rope_reference
from oslo_fusion.ops.rope_cases import ROPE_CASES
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference
from oslo_fusion.triton import rope as kernels
from oslo_fusion.triton.rope import RopeBlocks, rope_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_this_file_interpreted(rerun_interpreted: Callable[[], None]) -> None:
    rerun_interpreted()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a launcher allocates is full of NaN, so that a number that was not written is seen."""
    empty = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def halved(angle: Tensor) -> Tensor:
    return angle[..., : angle.shape[-1] // 2]


def judge(draws: list[tuple[Tensor, ...]], options: tuple[Any, ...], case: str, blocks: RopeBlocks | None = None) -> None:
    """Kernels under the law, q and k apart, all draws together; shapes, strides and dtypes as the reference's."""
    results = []
    for inputs in draws:
        ours = kernels.launch_rope(*inputs, *options, blocks=blocks)
        theirs = rope_reference(*inputs, *options)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.stride() == b.stride() or 1 in a.shape or a.numel() == 0
        results.append(
            (ours, same_dtype(*inputs, *options), rope_reference(*(t.double() for t in inputs), *options[:-1], None))
        )
    for position, name in enumerate("qk"):
        ours, theirs, truth = (torch.cat([draw[way][position].flatten() for draw in results]) for way in range(3))
        assert_close_to_reference(ours, theirs, truth, f"{case}, {name}")


def same_dtype(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    transposed: bool,
    contiguous: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """The formula in the dtype of its inputs, step by step."""
    if per_pair:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    cos, sin, rot_dim = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return torch.cat((-x[..., rot_dim // 2 :], x[..., : rot_dim // 2]), -1)

    def rotate(x: Tensor) -> Tensor:
        r = x[..., :rot_dim]
        y = r * cos - turn(r * sin) if transposed else r * cos + turn(r) * sin
        return torch.cat((y, x[..., rot_dim:]), -1).to(out_dtype or x.dtype)

    return rotate(q), rotate(k)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(ROPE_CASES))
def test_the_law_holds(case: str, dtype: torch.dtype, device: torch.device) -> None:
    draws = [ROPE_CASES[case](drawer(dtype, device, seed)) for seed in range(16 if case == "one pair" else 1)]
    forms = itertools.product((False, True), repeat=3)
    if dtype != torch.float32:  # the other dtypes differ in loads and stores only
        forms = iter(((False, False, False), (True, False, True)))
    for interleaved, per_pair, transposed in forms:
        inputs = [(q, k, *(map(halved, angles) if per_pair else angles)) for q, k, *angles in draws]
        judge(inputs, (interleaved, per_pair, transposed, per_pair, None), f"{case} {interleaved} {per_pair} {transposed}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("blocks", [RopeBlocks(1, 4, 1, 2), RopeBlocks(4, 8, 2, 1), RopeBlocks(2, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_cut_gives_the_same(blocks: RopeBlocks, interleaved: bool, device: torch.device) -> None:
    for case in ("fewer keys", "odd halves", "part of a head", "one key", "same angles for all"):
        inputs = ROPE_CASES[case](drawer(torch.float32, device))
        judge([inputs], (interleaved, False, False, False, None), case, blocks)


@pytest.mark.usefixtures("poisoned")
def test_mixed_dtypes(device: torch.device) -> None:
    for angle_dtype, out_dtype in ((torch.float32, torch.float32), (torch.float32, None), (torch.float16, torch.float32)):
        inputs = []
        for seed in range(2):
            q, k, cos, sin = ROPE_CASES["part of a head"](drawer(torch.bfloat16, device, seed))
            inputs.append((q, k, cos.to(angle_dtype), sin.to(angle_dtype)))
        judge(inputs, (False, False, False, False, out_dtype), f"{angle_dtype} {out_dtype}")
    q, k, cos, sin = ROPE_CASES["fewer keys"](drawer(torch.float32, device))
    options = (False, False, False, False)
    for doubled in ((q.double(), k.double(), cos, sin, *options, None), (q, k, cos, sin, *options, torch.float64)):
        for a, b in zip(kernels.launch_rope(*doubled), rope_reference(*doubled), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == torch.float64


def test_gradients_lie_in_memory_as_the_inputs_do(device: torch.device) -> None:
    q, k, cos, sin = ROPE_CASES["fewer keys"](drawer(torch.float32, device))
    q, k = (torch.empty_strided(t.shape, t.stride(), device=device).copy_(t).requires_grad_() for t in (q, k))
    rotated = _Rope.apply(q, k, cos, sin, False, False, False, True, None, None)
    assert all(t.is_contiguous() for t in rotated)
    gradients = torch.autograd.grad(rotated, (q, k), [torch.ones_like(t) for t in rotated])
    assert [t.stride() for t in gradients] == [q.stride(), k.stride()]
    ones = [torch.ones_like(t) for t in rotated]
    for a, b in zip(gradients, rope_reference(*ones, cos, sin, False, False, True, False, None), strict=True):
        torch.testing.assert_close(a, b)


def test_launcher_checks_first(device: torch.device) -> None:
    q, cos = torch.zeros(1, 2, 3, 8, device=device), torch.zeros(1, 3, 8, device=device)
    with pytest.raises(ConfigError, match="sin: received shape"):
        kernels.launch_rope(q, q, cos, cos[..., :6], False, False, False, False, None)


# --- how it is cut -----------------------------------------------------------------------------------------------------------

SHAPES = [
    (32, 8, 64, 64),
    (32, 8, 128, 128),
    (64, 64, 128, 32),
    (16, 4, 256, 256),
    (12, 12, 64, 64),
    (14, 2, 80, 80),
    (71, 1, 64, 64),
    (4, 2, 16, 16),
    (8, 8, 96, 48),
    (1, 1, 2, 2),
]


@pytest.mark.parametrize("tokens", [1, 8, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [shape[:3] for shape in SHAPES])
def test_cuts_cover_all_heads_and_fit_the_registers(
    heads: int, kv_heads: int, dim: int, itemsize: int, interleaved: bool, tokens: int
) -> None:
    blocks = rope_blocks(heads, kv_heads, dim, itemsize, interleaved, tokens, 132)
    tiles = blocks.tiles(heads, kv_heads)
    assert tiles * blocks.q_heads >= heads
    assert tiles * blocks.k_heads >= kv_heads
    assert all(n & (n - 1) == 0 for n in (blocks.tokens, blocks.q_heads, blocks.k_heads, blocks.warps))
    assert 1 <= blocks.warps <= 8
    padded = 1 << (dim - 1).bit_length()
    size = blocks.tokens * (blocks.q_heads + blocks.k_heads) * padded * itemsize
    assert size <= 256 * 32 * blocks.warps
    if tokens == 1 << 20:
        assert size >= 2048
    elif tokens <= 8:  # a decoding step: as many programs as heads allow, of at most 4 KB
        assert blocks.tokens == 1
        assert size <= 4096


SIGNATURE = {"bf16": 2, "fp32": 4}


def compiled(
    shape: tuple[int, int, int, int],
    dtype: str,
    interleaved: bool,
    per_pair: bool,
    tokens: int,
    compile_for_all_targets: Callable[..., Any],
    angles: str = "",
) -> Any:
    heads, kv_heads, dim, rot_dim = shape
    blocks = rope_blocks(heads, kv_heads, dim, SIGNATURE[dtype], interleaved, tokens, 132)
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "ROT": rot_dim,
        "UNIT": 16 if dim % 16 == 0 == rot_dim % 16 else 8 if dim % 8 == 0 == rot_dim % 8 else 1,
        "INTERLEAVED": interleaved,
        "PER_PAIR": per_pair,
        "TRANSPOSED": per_pair,  # half of the forms are compiled forward, half backward
        "TOKENS": blocks.tokens,
        "Q_TILE": blocks.q_heads,
        "K_TILE": blocks.k_heads,
        "BLOCK": kernels._power_of_two(rot_dim // 2),
        "REST_BLOCK": kernels._power_of_two(dim - rot_dim),
    }
    kernel = kernels._rope_kernel
    kinds = {"cos_ptr": angles or dtype, "sin_ptr": angles or dtype}
    signature = {n: f"*{kinds.get(n, dtype)}" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    return compile_for_all_targets(kernel, signature, constants, num_warps=blocks.warps)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [8, 32768])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_compiles_for_every_target(
    shape: tuple[int, int, int, int], tokens: int, dtype: str, compile_for_all_targets: Callable[..., Any]
) -> None:
    for interleaved, per_pair in ((False, False), (True, True)):
        built = compiled(shape, dtype, interleaved, per_pair, tokens, compile_for_all_targets)
        if tokens > 8 and shape[2] % 16 == 0:
            assembly = built["sm_90"].assembly
            assert re.search(r"ld\.global\S*\.v4", assembly), "heads are not read 16 bytes at a time"
            assert re.search(r"st\.global\S*\.v4", assembly), "heads are not written 16 bytes at a time"


@pytest.mark.parametrize(("interleaved", "per_pair"), [(False, True), (True, False)])
def test_other_forms_compile(interleaved: bool, per_pair: bool, compile_for_all_targets: Callable[..., Any]) -> None:
    for dtype, angles in (("bf16", ""), ("fp32", ""), ("bf16", "fp32")):
        compiled((32, 8, 128, 128), dtype, interleaved, per_pair, 32768, compile_for_all_targets, angles)


@pytest.mark.gpu
def test_alignment_and_wide_strides_do_not_share_a_kernel_wrongly() -> None:
    storage = torch.randn(1 << 16, device="cuda")
    cos, sin = torch.randn(2, 3, 16, device="cuda"), torch.randn(2, 3, 16, device="cuda")
    for offset, stride in itertools.product((0, 4, 1, 0), (16, 20, 17)):
        q = storage.as_strided((2, 4, 3, 16), (12 * stride, stride, 4 * stride, 1), offset)
        for a, b in zip(
            kernels.launch_rope(q, q[:, :2], cos, sin, False, False, False, False, None),
            rope_reference(q, q[:, :2], cos, sin, False, False, False, False, None),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
