"""The meaning of merged_linear: linear layers one after the other, under the law, whichever way the gradient is added up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.merged_linear import GRADIENTS, SUM_OF_MATMULS, merged_linear, merged_linear_reference, sum_of_matmuls
from oslo_fusion.testing import assert_close_to_reference

SHAPES = {"three": ((2, 5, 24), (16, 8, 8)), "one": ((3, 24), (7,)), "zero rows": ((0, 24), (8, 8)), "a row": ((24,), (8, 16))}


def drawn(shape: tuple[int, ...], outs: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = torch.randn(shape).to(dtype).requires_grad_()
    weights = [(torch.randn(out, shape[-1]) / shape[-1] ** 0.5).to(dtype).requires_grad_() for out in outs]
    return x, weights, [torch.randn(out).to(dtype).requires_grad_() for out in outs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", GRADIENTS)
@pytest.mark.parametrize("case", SHAPES)
def test_the_law(case: str, form: str, dtype: torch.dtype) -> None:
    x, weights, biases = drawn(*SHAPES[case], dtype)
    leaves = [x, *weights, *biases[1:]]
    dys = [torch.randn(*x.shape[:-1], w.shape[0]).to(dtype) for w in weights]

    def run(function: Any, to: torch.dtype) -> list[Tensor]:
        given = [t.detach().to(to).requires_grad_() for t in leaves]
        count = len(weights)
        results = function(given[0], given[1 : 1 + count], [None, *given[1 + count :]])
        return [*results, *torch.autograd.grad(results, given, [dy.to(to) for dy in dys])]

    mine = run(lambda *given: merged_linear(*given, gradient=form), dtype)
    same, truth = run(merged_linear_reference, dtype), run(merged_linear_reference, torch.float64)
    for index, found in enumerate(mine):
        assert found.dtype == dtype
        assert_close_to_reference(found, same[index], truth[index], f"{index}")


@pytest.mark.parametrize("form", GRADIENTS)
def test_second_gradients_and_gradients_that_are_not_wanted(form: str) -> None:
    x, weights, biases = drawn((3, 4), (2, 3), torch.float64)
    given = (x, *weights, *biases)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return merged_linear(tensors[0], tensors[1:3], tensors[3:], form)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
    weights[0].requires_grad_(False)
    merged_linear(x.detach(), weights, biases, form)[0].sum().backward()
    assert (weights[0].grad, weights[1].grad) == (None, None)
    assert biases[0].grad is not None


def test_the_sum_of_matmuls_is_an_operator() -> None:
    left, right = [torch.randn(5, n) for n in (3, 4)], [torch.randn(n, 6) for n in (3, 4)]
    torch.testing.assert_close(sum_of_matmuls(left, right), left[0] @ right[0] + left[1] @ right[1])
    torch.library.opcheck(SUM_OF_MATMULS, (left, right))
    strided = [t.t().contiguous().t() for t in left]
    torch.testing.assert_close(SUM_OF_MATMULS(strided, right), SUM_OF_MATMULS(left, right))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x.long(), w, b), "x: received"),
        (lambda x, w, b: (x, w, b[:1]), "biases: received 1 for 2 weights"),
        (lambda x, w, b: (x, [], []), "biases: received 0"),
        (lambda x, w, b: (x, [w[0], w[1].t()], b), r"weights\[1\]: received shape"),
        (lambda x, w, b: (x, w, [b[0], b[1][:1]]), r"biases\[1\]: received shape"),
        (lambda x, w, b: (x, [w[0].half(), w[1]], b), r"weights\[0\]: received dtype torch.float16"),
        (lambda x, w, b: (x, w, [b[0], b[1].to("meta")]), r"biases\[1\]: received a tensor on meta"),
        (lambda x, w, b: (x, w, b, "backwards"), "gradient: received 'backwards'. Allowed: side_by_side, accumulated"),
    ],
)
def test_errors(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged_linear(*change(*drawn((3, 4), (2, 3), torch.float32)))
