"""Each formula against its meaning, forward and backward, under the law."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from oslo_fusion.jit.formulas import FORMULAS, GATED, dropout_add, gated_product
from oslo_fusion.probe import prove
from oslo_fusion.testing import ACTIVATION_SHAPES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SCRIPTED = [name for name, formula in FORMULAS.items() if formula.forward is not None]


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return (3 * torch.randn(shape, device=device)).to(dtype)


def draws_for(shape: tuple[int, ...]) -> int:
    """Enough draws that the same-dtype code's largest error, which sets the bound, is a stable figure."""
    return min(256, 1 + 4096 // max(1, math.prod(shape)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_activations_obey_the_law(name: str, dtype: torch.dtype, device: str) -> None:
    formula = FORMULAS[name]
    for shape_name, shape in ACTIVATION_SHAPES.items():
        draws = [[values(shape, dtype, device)] for _ in range(draws_for(shape))]
        for what, comparison in zip(("output", "gradient"), prove(formula, formula.meaning, *draws), strict=True):
            assert comparison.same, f"{name}, {shape_name}, {what}: {comparison}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_activations_far_out(name: str, device: str) -> None:
    """Where exponentials overflow the result must still be the meaning's: no NaN, no wrong infinity."""
    x = torch.tensor([-1e4, -100.0, -30.0, -1e-3, 0.0, 1e-3, 30.0, 100.0, 1e4], device=device)
    formula = FORMULAS[name]
    for _ in range(4):
        with torch.no_grad():
            torch.testing.assert_close(formula(x), formula.meaning(x), rtol=1e-5, atol=1e-6)
        leaf = x.clone().requires_grad_()
        (ours,) = torch.autograd.grad(formula(leaf).sum(), leaf)
        (theirs,) = torch.autograd.grad(formula.meaning(leaf).sum(), leaf)
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", SCRIPTED)
def test_only_the_input_is_saved(name: str) -> None:
    x = torch.randn(1000, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        FORMULAS[name](x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(GATED))
def test_gated_products_obey_the_law(name: str, dtype: torch.dtype, device: str) -> None:
    for shape in ACTIVATION_SHAPES.values():
        draws = [[values(shape, dtype, device) for _ in range(2)] for _ in range(draws_for(shape))]
        found = prove(lambda g, u: gated_product(g, u, name), lambda g, u: FORMULAS[name].meaning(g) * u, *draws)
        for what, comparison in zip(("output", "gate's gradient", "up's gradient"), found, strict=True):
            assert comparison.same, f"{name} {shape} {what}: {comparison}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_add_drops_scales_and_adds(p: float, device: str) -> None:
    x = torch.rand(400, 500, device=device) + 1
    residual = torch.randn(400, 500, device=device)
    leaf = x.clone().requires_grad_()
    previous = None
    for _ in range(4):
        y = dropout_add(leaf, residual, p)
        kept = (y - residual).abs() > 0.5
        torch.testing.assert_close(y, torch.where(kept, residual + x / (1 - p), residual), rtol=1e-5, atol=1e-5)
        expected, deviation = 1 - p, math.sqrt(p * (1 - p) / x.numel())
        assert abs(float(kept.float().mean()) - expected) < 5 * deviation
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(gradient, kept / (1 - p), rtol=1e-6, atol=0)
        assert previous is None or not torch.equal(previous, kept)
        previous = kept


def test_dropout_add_edges() -> None:
    x, residual = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(dropout_add(x, residual, 1.0), residual)
    assert torch.equal(dropout_add(x, residual, 0.0), F.dropout(x, 0.0) + residual)
