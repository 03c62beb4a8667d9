"""The meaning of dropout_add_layer_norm: the end of a post-norm sublayer, under the law, with gradients, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.dropout import kept_in_rows, kept_scale
from oslo_fusion.ops.dropout_add_layer_norm import (
    DROPOUT_ADD_LAYER_NORM,
    DROPOUT_ADD_LAYER_NORM_BACKWARD,
    _DropoutAddNorm,
    dropout_add_layer_norm,
)
from oslo_fusion.ops.row_cases import ROW_CASES, drawer, draws_of
from oslo_fusion.probe import prove
from oslo_fusion.testing import assert_close_to_reference

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
EPS = 1e-5
WHAT = ("output", "dx", "dresidual", "dlinear_bias", "dweight", "dbias")


def rng(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([7, 11], device=device)


def plain(x: Tensor, residual: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor, dropout: float = 0.25) -> Tensor:
    """What PyTorch code in the same dtype computes with that mask; in float64 the truth."""
    h = x + linear_bias
    if dropout:
        h = h * kept_in_rows(rng(x.device), dropout, tuple(x.shape)) * kept_scale(dropout)
    return F.layer_norm(h + residual, (x.shape[-1],), weight, bias, EPS)


def ours(x: Tensor, residual: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor, dropout: float = 0.25) -> Tensor:
    options: dict[str, Any] = {"eps": EPS, "dropout": dropout, "linear_bias": linear_bias}
    return dropout_add_layer_norm(x, residual, weight, bias, rng=rng(x.device), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.25), (torch.float16, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 0.25)]
)
@pytest.mark.parametrize("case", list(ROW_CASES))
def test_the_law_holds(case: str, dtype: torch.dtype, dropout: float, device: str) -> None:
    draws = []
    for seed in range(draws_of(case)):
        draw = drawer(dtype, device, seed)
        x = ROW_CASES[case](draw)
        draws.append([x, draw(*x.shape), *(draw(x.shape[-1]) for _ in range(3))])
    functions = [lambda *t, f=f: f(*t, dropout=dropout) for f in (ours, plain)]
    for what, comparison in zip(WHAT, prove(*functions, *draws), strict=True):
        if case != "one number" or what in ("output", "dweight", "dbias"):  # the others are zero but for rounding
            assert comparison.same, f"{case}, {what}: {comparison}"
    with torch.no_grad():  # prove clones its inputs, so the strides are seen here only
        x, *others = draws[0]
        for tensors in ((x, *others), (others[0], x, *others[1:])):
            results = [f(*tensors) for f in functions]
            assert_close_to_reference(*results, functions[1](*(t.double() for t in tensors)), case)


@pytest.mark.parametrize("device", DEVICES)
def test_without_parameters(device: str) -> None:
    draws = [
        [drawer(torch.bfloat16, device, seed)(4, 96), drawer(torch.bfloat16, device, 9 + seed)(4, 96)] for seed in range(3)
    ]
    for comparison in prove(
        lambda x, r: dropout_add_layer_norm(x, r, eps=EPS), lambda x, r: F.layer_norm(x + r, (96,), eps=EPS), *draws
    ):
        assert comparison.same, str(comparison)


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes(device: str) -> None:
    x, weight = drawer(torch.bfloat16, device)(6, 64).requires_grad_(), drawer(torch.float32, device, 1)(64).requires_grad_()
    residual = drawer(torch.float32, device, 2)(6, 64).requires_grad_()
    assert dropout_add_layer_norm(x, x, weight, eps=EPS).dtype == torch.bfloat16
    assert dropout_add_layer_norm(x, x, weight, eps=EPS, out_dtype=torch.float32).dtype == torch.float32
    for dropout in (0.0, 0.5):
        y = dropout_add_layer_norm(x, residual, weight, eps=EPS, linear_bias=weight, dropout=dropout)
        assert y.dtype == torch.float32
        gradients = torch.autograd.grad(y.sum(), (x, residual, weight))
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_is_unbiased_and_drawn_anew(device: str) -> None:
    torch.manual_seed(5)
    x, residual = torch.ones(512, 768, device=device), torch.zeros(512, 768, device=device)
    for dropout in (0.1, 0.5):
        s = DROPOUT_ADD_LAYER_NORM(x, residual, None, None, None, rng(device), dropout, EPS, None)[1]
        deviation = (dropout / (1 - dropout)) ** 0.5
        assert s.mean().item() == pytest.approx(1, abs=5 * deviation / s.numel() ** 0.5)
        assert s.std().item() == pytest.approx(deviation, rel=0.01)
    options = {"eps": EPS, "dropout": 0.5}
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    first, second = (dropout_add_layer_norm(x, residual, **options) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    assert torch.equal(dropout_add_layer_norm(x, residual, **options), first)
    state = torch.get_rng_state(), None
    dropout_add_layer_norm(x.cpu(), residual.cpu(), eps=EPS)
    assert torch.equal(torch.get_rng_state(), state[0]), "without dropout nothing is drawn"


@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_backward_have_one_mask(device: str) -> None:
    x, residual = (torch.randn(33, 200, device=device).requires_grad_() for _ in range(2))
    y = dropout_add_layer_norm(x, residual, eps=EPS, dropout=0.3)
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.randn_like(y))
    kept = dx != 0
    assert 0.6 < kept.float().mean() < 0.8
    torch.testing.assert_close(dx[kept], dresidual[kept] * kept_scale(0.3))
    expected = F.layer_norm(torch.where(kept, x * kept_scale(0.3), 0.0) + residual, (200,), eps=EPS)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str) -> None:
    for dtype, dropout in ((torch.float32, 0.25), (torch.bfloat16, 0.0)):
        draw = drawer(dtype, device)
        x, residual, weight = draw(3, 5, 16), draw(3, 5, 16), draw(16)
        for t in (x, residual, weight):
            t.requires_grad_()
        given, stats = (rng(device) if dropout else None), draw(3, 5).float().detach()
        torch.library.opcheck(DROPOUT_ADD_LAYER_NORM, (x, residual, weight, weight, weight, given, dropout, EPS, None))
        strided = (x.transpose(0, 1), residual.transpose(0, 1))
        torch.library.opcheck(DROPOUT_ADD_LAYER_NORM, (*strided, None, None, None, given, dropout, EPS, torch.float32))
        x, residual, weight = x.detach(), residual.detach(), weight.detach()
        options = (stats, stats, given, dropout, dtype, dtype)
        torch.library.opcheck(
            DROPOUT_ADD_LAYER_NORM_BACKWARD, (residual, None, x, weight, weight, weight, *options, True, True, True)
        )
        torch.library.opcheck(DROPOUT_ADD_LAYER_NORM_BACKWARD, (residual, x, x, None, None, None, *options, *[False] * 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_twice(dropout: float, device: str) -> None:
    draw = drawer(torch.float64, device)
    inputs = [t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7), draw(7), draw(7))]
    assert torch.autograd.gradcheck(lambda *a: ours(*a, dropout=dropout), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ours(*a, dropout=dropout), inputs)
    frozen = [inputs[0], *(t.detach() for t in inputs[1:])]
    assert torch.autograd.gradcheck(lambda x: ours(x, *frozen[1:], dropout=dropout), (inputs[0],))
    assert torch.autograd.gradcheck(lambda r, b: ours(frozen[0].detach(), r, b, *frozen[3:], dropout=dropout), inputs[1:3])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_eager_function_has_the_same_gradients_twice(dropout: float) -> None:
    pytest.importorskip("triton")
    draw = drawer(torch.float64)
    inputs = [t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7), draw(7), draw(7))]

    def function(*tensors: Tensor) -> Tensor:
        y: Tensor = _DropoutAddNorm.apply(*tensors, rng(), dropout, EPS, None)[0]
        return y

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_torch_compile_takes_it_whole() -> None:
    draw = drawer(torch.float32)
    inputs = [t.requires_grad_() for t in (draw(4, 32), draw(4, 32), draw(32), draw(32), draw(32))]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, result = ours(*inputs), compiled(*inputs)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)
    drawing = torch.compile(
        lambda x, r: dropout_add_layer_norm(x, r, eps=EPS, dropout=0.5), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(*(drawing(*inputs[:2]) for _ in range(2)))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x: received dtype torch.int64"),
    ({"x": torch.tensor(1.0)}, "x: received shape []"),
    ({"x": torch.zeros(4, 0)}, "x: received shape [4, 0]"),
    ({"residual": torch.ones(1, 8)}, "residual: received shape [1, 8], must be that of x, [4, 8]"),
    ({"residual": torch.ones(4, 8, dtype=torch.bool)}, "residual: received dtype torch.bool"),
    ({"residual": torch.ones(4, 8, device="meta")}, "residual: received a tensor on meta"),
    ({"linear_bias": torch.ones(7)}, "linear_bias: received shape [7], must be [8]"),
    ({"weight": torch.ones(1, 8)}, "weight: received shape [1, 8]"),
    ({"weight": torch.ones(8, dtype=torch.int32)}, "weight: received dtype torch.int32"),
    ({"bias": torch.ones(8, device="meta")}, "bias: received a tensor on meta"),
    ({"dropout": 1.0}, "dropout: received 1.0, must be from 0 up to, but not including, 1"),
    ({"dropout": -0.1}, "dropout: received -0.1"),
    ({"dropout": 0.1, "rng": torch.zeros(2)}, "rng: received torch.float32 [2]"),
    ({"dropout": 0.1, "rng": torch.zeros(3, dtype=torch.int64)}, "rng: received torch.int64 [3]"),
    ({"eps": -1e-6}, "eps: received -1e-06"),
    ({"eps": float("nan")}, "eps: received nan"),
    ({"out_dtype": torch.int8}, "out_dtype: received torch.int8"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(4, 8), "residual": torch.zeros(4, 8), "eps": EPS, **arguments}
    with pytest.raises(ConfigError) as error:
        dropout_add_layer_norm(given.pop("x"), given.pop("residual"), **given)
    assert message in str(error.value)
