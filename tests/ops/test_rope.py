"""The meaning of rope: what transformers' functions compute, under the law, with gradients, and clear errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.rope import ROPE, _Rope, dense_strides, memory_order, rope, rope_reference
from oslo_fusion.ops.rope_cases import ROPE_CASES
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove
from oslo_fusion.testing import assert_close_to_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
KINDS = list(itertools.product((False, True), (False, True)))


def halved(angle: Tensor) -> Tensor:
    """One number for each pair."""
    return angle[..., : angle.shape[-1] // 2]


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """What PyTorch code in the same dtype computes; in float64 the truth."""
    rot_dim = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        r = x[..., :rot_dim]
        if interleaved:
            turned = torch.stack((-r[..., 1::2], r[..., ::2]), -1).flatten(-2)
        else:
            turned = torch.cat((-r[..., rot_dim // 2 :], r[..., : rot_dim // 2]), -1)
        return torch.cat((r * cos.unsqueeze(1) + turned * sin.unsqueeze(1), x[..., rot_dim:]), -1)

    return rotate(q), rotate(k)


def as_one(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in pair])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(ROPE_CASES))
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_law_holds(case: str, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    draws, angles = [], None
    for seed in range(16 if case == "one pair" else 4):  # of two numbers the largest error is a matter of luck
        q, k, *angle = ROPE_CASES[case](drawer(dtype, device, seed))
        draws.append((q, k))
        angles = angles or angle

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return as_one(rope(q, k, *angles, interleaved=interleaved))

    def theirs(q: Tensor, k: Tensor) -> Tensor:
        return as_one(plain(q, k, *(a.to(q.dtype) for a in angles), interleaved))

    for what, comparison in zip(("output", "dq", "dk"), prove(ours, theirs, *draws), strict=True):
        assert comparison.same, f"{case}, {what}: {comparison}"
    with torch.no_grad():  # prove clones its inputs, so the strides are seen here only
        q, k = draws[0]
        truth = theirs(q.double(), k.double())
        assert_close_to_reference(ours(q, k), theirs(q, k), truth, case)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_transformers_functions_are_conventions_of_it(dtype: torch.dtype, device: str) -> None:
    draw = drawer(dtype, device)
    q, k, cos, sin = ROPE_CASES["fewer keys"](draw)
    part = cos[..., :8], sin[..., :8]
    for theirs, given, ours, options in (
        (llama, (cos, sin), (cos, sin), {}),
        (neox, part, part, {"contiguous": True}),
        (cohere, (cos, sin), (cos, sin), {"interleaved": True}),
        (glm, part, (halved(part[0]), halved(part[1])), {"interleaved": True, "per_pair": True, "contiguous": True}),
        (gpt_oss, (halved(cos), halved(sin)), (halved(cos), halved(sin)), {"per_pair": True, "contiguous": True}),
    ):
        expected, result = theirs(q, k, *given), rope(q, k, *ours, **options)
        exact = theirs(*(x.double() for x in (q, k, *given)))
        for a, b, truth in zip(result, expected, exact, strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert_close_to_reference(a, b, truth, theirs.__module__)


def test_dtypes_are_those_asked_for() -> None:
    q, k, cos, sin = ROPE_CASES["fewer keys"](drawer(torch.float32))
    half_q, half_k = q.bfloat16(), k.bfloat16()
    expected = llama(half_q, half_k, cos, sin)
    result = rope(half_q, half_k, cos, sin, out_dtype=torch.float32)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert {t.dtype for t in rope(half_q, half_k, cos, sin)} == {torch.bfloat16}
    assert {t.dtype for t in rope(q, k, cos.double(), sin.double())} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda: torch.randn(2, 3, 4, 8), (0, 1, 2, 3)),
        (lambda: torch.randn(2, 4, 3, 8).transpose(1, 2), (0, 2, 1, 3)),
        (lambda: torch.randn(2, 4, 3, 24)[..., :8].transpose(1, 2), (0, 2, 1, 3)),
        (lambda: torch.randn(4, 2, 3, 8).permute(1, 2, 0, 3), (2, 0, 1, 3)),
        (lambda: torch.randn(1, 3, 4, 8).expand(2, 3, 4, 8), (0, 1, 2, 3)),
    ],
)
def test_results_keep_the_order_of_their_input(make: Any, order: tuple[int, ...]) -> None:
    q = make()
    assert memory_order(q.stride()) == order
    assert (
        dense_strides(q.shape, order)
        == torch.empty([q.shape[i] for i in order]).permute([order.index(i) for i in range(4)]).stride()
    )
    angles = torch.randn(2, 2, 4, 8)
    for result in (rope(q, q, *angles), rope_reference(q, q, *angles, False, False, False, False, None)):
        assert result[0].stride() == dense_strides(q.shape, order)
    assert rope(q, q, *angles, contiguous=True)[1].is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("interleaved", "per_pair"), KINDS)
def test_operator_passes_opcheck(interleaved: bool, per_pair: bool, device: str) -> None:
    for dtype, case in itertools.product((torch.float32, torch.bfloat16), ("as many keys", "part of a head", "packed")):
        q, k, cos, sin = ROPE_CASES[case](drawer(dtype, device))
        if per_pair:
            cos, sin = halved(cos), halved(sin)
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        for transposed in (False, True):
            torch.library.opcheck(ROPE, (q, k, cos, sin, interleaved, per_pair, transposed, transposed, None))
    torch.library.opcheck(ROPE, (q, k, cos, sin, interleaved, per_pair, False, True, torch.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("interleaved", "per_pair"), KINDS)
def test_gradients_once_and_twice_also_of_the_angles(interleaved: bool, per_pair: bool, device: str) -> None:
    q, k, cos, sin = (t.detach() for t in ROPE_CASES["part of a head"](drawer(torch.float64, device)))
    q, k = q[:1, :2].requires_grad_(), k[:1, :1].requires_grad_()
    cos, sin = ((halved(a) if per_pair else a)[:1].clone() for a in (cos, sin))

    def public(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, cos, sin, interleaved=interleaved, per_pair=per_pair)

    def operator(*tensors: Tensor) -> Any:
        return ROPE(*tensors, interleaved, per_pair, False, False, None)

    for function in (public, operator):
        assert torch.autograd.gradcheck(lambda q, k, f=function: f(q, k, cos, sin), (q, k))
        assert torch.autograd.gradgradcheck(lambda q, k, f=function: f(q, k, cos, sin), (q, k))
        assert torch.autograd.gradcheck(lambda k, f=function: f(q.detach(), k, cos, sin)[1], (k,))
        everything = (q, k, cos.clone().requires_grad_(), sin.clone().requires_grad_())
        assert torch.autograd.gradcheck(function, everything)
        assert torch.autograd.gradgradcheck(function, everything)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_eager_function_has_the_same_gradients_twice(interleaved: bool) -> None:
    pytest.importorskip("triton")
    q, k, cos, sin = ROPE_CASES["part of a head"](drawer(torch.float64))
    q, k = q[:1, :2].detach().requires_grad_(), k[:1, :1].detach().requires_grad_()
    options = (cos[:1], sin[:1], interleaved, False, False, True, None, None)
    assert torch.autograd.gradgradcheck(lambda q, k: _Rope.apply(q, k, *options), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: _Rope.apply(q, k, *options), (q, k))
    rotated = _Rope.apply(q, k.detach(), *options)
    assert [t.requires_grad for t in rotated] == [True, False]


def test_turning_back_gives_what_there_was() -> None:
    q, k, *_ = ROPE_CASES["fewer keys"](drawer(torch.float64))
    angle = torch.randn(2, 5, 16, dtype=torch.float64).repeat(1, 1, 2)
    turned = rope(q, k, angle.cos(), angle.sin())
    back = ROPE(*turned, angle.cos(), angle.sin(), False, False, True, False, None)
    torch.testing.assert_close(back[0], q)
    torch.testing.assert_close(back[1], k)


def test_torch_compile_takes_it_whole() -> None:
    q, k, cos, sin = ROPE_CASES["part of a head"](drawer(torch.float32))
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    expected, result = rope(q, k, cos, sin), compiled(q, k, cos, sin)
    torch.testing.assert_close(result, expected)
    for a, b in zip(
        torch.autograd.grad(as_one(result).sum(), (q, k)), torch.autograd.grad(as_one(expected).sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(a, b)


META = torch.zeros(2, 3, 8, device="meta")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 4, 3, 8, dtype=torch.int64)}, "q: received dtype torch.int64"),
    ({"q": torch.zeros(4, 3, 8)}, "q: received shape [4, 3, 8]"),
    ({"k": torch.zeros(2, 2, 8)}, "k: received shape [2, 2, 8]"),
    ({"k": torch.zeros(1, 2, 3, 8)}, "k: received shape [1, 2, 3, 8], must be [2, kv_heads, 3, 8]"),
    ({"k": torch.zeros(2, 2, 4, 8)}, "k: received shape [2, 2, 4, 8]"),
    ({"k": torch.zeros(2, 2, 3, 6)}, "k: received shape [2, 2, 3, 6]"),
    ({"k": torch.zeros(2, 2, 3, 8).half()}, "k: received dtype torch.float16"),
    ({"k": torch.zeros(2, 2, 3, 8, device="meta")}, "k: is on meta"),
    ({"cos": torch.zeros(3, 8)}, "cos: received shape [3, 8]"),
    ({"cos": torch.zeros(3, 3, 8)}, "cos: received shape [3, 3, 8], must be [2 or 1, 3, rot_dim]"),
    ({"cos": torch.zeros(2, 1, 8)}, "cos: received shape [2, 1, 8]"),
    ({"sin": torch.zeros(1, 3, 8)}, "sin: received shape [1, 3, 8], must be that of cos, [2, 3, 8]"),
    ({"sin": torch.zeros(2, 3, 8).half()}, "cos, sin: received dtypes torch.float32 and torch.float16"),
    ({"cos": torch.zeros(2, 3, 8).int(), "sin": torch.zeros(2, 3, 8).int()}, "cos, sin: received dtypes torch.int32"),
    ({"cos": torch.zeros(2, 3, 7), "sin": torch.zeros(2, 3, 7)}, "rot_dim: received 7 (the last dimension of cos)"),
    ({"cos": torch.zeros(2, 3, 0), "sin": torch.zeros(2, 3, 0)}, "rot_dim: received 0"),
    ({"cos": torch.zeros(2, 3, 10), "sin": torch.zeros(2, 3, 10)}, "from 2 to the head_dim 8 of q"),
    ({"per_pair": True}, "rot_dim: received 16 (twice the last dimension of cos)"),
    ({"cos": META, "sin": META}, "cos: is on meta"),
    ({"sin": META}, "sin: is on meta"),
    ({"out_dtype": torch.int8}, "out_dtype: received torch.int8"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    given = {
        "q": torch.zeros(2, 4, 3, 8),
        "k": torch.zeros(2, 2, 3, 8),
        "cos": torch.zeros(2, 3, 8),
        "sin": torch.zeros(2, 3, 8),
        **arguments,
    }
    with pytest.raises(ConfigError) as error:
        rope(**given)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16).expand(1, 32, 600_000, 128)
    k = torch.randn(1, 600_000, 2, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    angle = torch.randn(1, 600_000, 128, device="cuda")
    rotated_q, rotated_k = rope(q, k, angle, angle)
    expected = rope_reference(q[:, :, -2:], k[:, :, -2:], angle[:, -2:], angle[:, -2:], False, False, False, False, None)
    torch.testing.assert_close(rotated_q[:, :, -2:], expected[0])
    torch.testing.assert_close(rotated_k[:, :, -2:], expected[1])
