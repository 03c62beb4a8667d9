"""The meaning of layer_norm: what nn.LayerNorm computes, under the law, with gradients, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.layer_norm import ADD_LAYER_NORM, LAYER_NORM, LAYER_NORM_BACKWARD, _Norm, layer_norm
from oslo_fusion.ops.row_cases import ROW_CASES, drawer, draws_of
from oslo_fusion.probe import prove
from oslo_fusion.testing import assert_close_to_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
EPS = 1e-5


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """What PyTorch code in the same dtype computes; in float64 the truth. With a residual the two outputs side by side."""
    s = x if residual is None else x + residual
    y = F.layer_norm(s, (s.shape[-1],), weight + offset, bias, EPS)
    return y if residual is None else torch.cat([y, s], -1)


def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    result = layer_norm(x, weight, bias, eps=EPS, residual=residual, weight_offset=offset)
    return torch.cat(result, -1) if isinstance(result, tuple) else result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(ROW_CASES))
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_law_holds(case: str, dtype: torch.dtype, with_residual: bool, device: str) -> None:
    draws = []
    for seed in range(draws_of(case)):
        draw = drawer(dtype, device, seed)
        x = ROW_CASES[case](draw)
        draws.append([x, draw(x.shape[-1]), draw(x.shape[-1]), *([draw(*x.shape)] if with_residual else [])])
    for what, comparison in zip(("output", "dx", "dweight", "dbias", "dresidual"), prove(ours, plain, *draws), strict=False):
        if case != "one number" or what not in ("dx", "dresidual"):  # zero but for rounding
            assert comparison.same, f"{case}, {what}: {comparison}"
    with torch.no_grad():  # prove clones its inputs, so the strides are seen here only
        assert_close_to_reference(ours(*draws[0]), plain(*draws[0]), plain(*(t.double() for t in draws[0])), case)


@pytest.mark.parametrize("device", DEVICES)
def test_without_parameters_and_with_offset(device: str) -> None:
    def bare(x: Tensor) -> Tensor:
        y = layer_norm(x, eps=EPS)
        assert isinstance(y, Tensor)
        return y

    draws = [[drawer(torch.bfloat16, device, seed)(4, 96)] for seed in range(3)]
    assert all(c.same for c in prove(bare, lambda x: F.layer_norm(x, (96,), eps=EPS), *draws))
    draws = [[*inputs, drawer(torch.bfloat16, device, 9)(96)] for inputs in draws]
    for comparison in prove(lambda x, w: ours(x, w, offset=1.0), lambda x, w: plain(x, w, offset=1.0), *draws):
        assert comparison.same, str(comparison)


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes(device: str) -> None:
    x, weight = drawer(torch.bfloat16, device)(6, 64), drawer(torch.float32, device, 1)(64)
    assert layer_norm(x, weight, eps=EPS).dtype == torch.bfloat16
    assert layer_norm(x, weight, eps=EPS, out_dtype=torch.float32).dtype == torch.float32
    y, s = layer_norm(x, weight, eps=EPS, residual=x.float())
    assert (y.dtype, s.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_does_not_cancel(device: str) -> None:
    x = torch.randn(4, 256, device=device) + 1000.0
    weight = torch.ones(256, device=device)
    assert all(c.same for c in prove(ours, plain, [x, weight], gradients=False))


@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draw = drawer(dtype, device)
        x, residual, weight = draw(3, 5, 16), draw(3, 5, 16), draw(16)
        for t in (x, residual, weight):
            t.requires_grad_()
        rstd = draw(3, 5).float()
        torch.library.opcheck(LAYER_NORM, (x, weight, weight, EPS, 0.0, None))
        torch.library.opcheck(LAYER_NORM, (x.transpose(0, 1), None, None, EPS, 1.0, torch.float32))
        torch.library.opcheck(ADD_LAYER_NORM, (x, residual, weight, None, EPS, 1.0, None))
        x, residual, weight = x.detach(), residual.detach(), weight.detach()
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        torch.library.opcheck(LAYER_NORM_BACKWARD, (residual, None, x, weight, weight, rstd, rstd, 0.0, True, True))
        torch.library.opcheck(
            LAYER_NORM_BACKWARD,
            (residual, x, strided, None, None, rstd, rstd, 0.0, False, False),
        )


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, s = layer_norm(x, weight, eps=EPS, residual=residual, weight_offset=1.0)
    return y, s


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_twice_and_of_one_output_only(device: str) -> None:
    draw = drawer(torch.float64, device)
    x, residual, weight = (t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7)))
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, eps=EPS), (x, weight, weight))
    assert torch.autograd.gradgradcheck(lambda *a: layer_norm(*a, eps=EPS), (x, weight, residual[0].detach().requires_grad_()))
    both = (x, residual, weight)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a)[0] * add_norm(*a)[1], both)
    assert torch.autograd.gradgradcheck(lambda *a: add_norm(*a), both)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a)[0], both)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a, weight.detach())[1], (x, residual))
    frozen = weight.detach().float()
    leaf = draw(5, 7).float().requires_grad_()
    layer_norm(leaf, frozen, eps=EPS).sum().backward()
    assert leaf.grad is not None
    assert frozen.grad is None


def test_the_eager_function_has_the_same_gradients_twice() -> None:
    pytest.importorskip("triton")
    draw = drawer(torch.float64)
    x, residual, weight, bias = (t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7), draw(7)))
    assert torch.autograd.gradgradcheck(lambda x, w, b: _Norm.apply(x, None, w, b, EPS, 1.0, None), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *a: _Norm.apply(*a, EPS, 0.0, None), (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda x, r: _Norm.apply(x, r, weight.detach(), None, EPS, 0.0, None)[1], (x, residual))


def test_torch_compile_takes_it_whole() -> None:
    draw = drawer(torch.float32)
    inputs = [t.requires_grad_() for t in (draw(4, 32), draw(32), draw(32), draw(4, 32))]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, result = ours(*inputs), compiled(*inputs)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x: received dtype torch.int64"),
    ({"x": torch.tensor(1.0)}, "x: received shape []"),
    ({"x": torch.zeros(4, 0)}, "x: received shape [4, 0]"),
    ({"weight": torch.ones(7)}, "weight: received shape [7], must be [8]"),
    ({"weight": torch.ones(1, 8)}, "weight: received shape [1, 8]"),
    ({"weight": torch.ones(8, dtype=torch.int32)}, "weight: received dtype torch.int32"),
    ({"weight": torch.ones(8, device="meta")}, "weight: is on meta"),
    ({"bias": torch.ones(7)}, "bias: received shape [7], must be [8]"),
    ({"bias": torch.ones(8, dtype=torch.int32)}, "bias: received dtype torch.int32"),
    ({"residual": torch.ones(1, 8)}, "residual: received shape [1, 8]"),
    ({"residual": torch.ones(4, 8, dtype=torch.bool)}, "residual: received dtype torch.bool"),
    ({"residual": torch.ones(4, 8, device="meta")}, "residual: is on meta"),
    ({"eps": -1e-6}, "eps: received -1e-06"),
    ({"eps": float("nan")}, "eps: received nan"),
    ({"out_dtype": torch.int8}, "out_dtype: received torch.int8"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "eps": EPS, **arguments}
    with pytest.raises(ConfigError) as error:
        layer_norm(given.pop("x"), given.pop("weight"), **given)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16).expand(600_000, 4096)
    y = layer_norm(x, eps=EPS)
    assert torch.equal(y[-1], y[0])
    assert torch.isfinite(y[-1]).all()
