"""The meaning of rms_norm: what the modules it replaces compute, under the law, with gradients, and clear errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.rms_norm import ADD_RMS_NORM, RMS_NORM, RMS_NORM_BACKWARD, _Norm, rms_norm
from oslo_fusion.ops.row_cases import ROW_CASES, drawer, draws_of
from oslo_fusion.probe import prove
from oslo_fusion.testing import assert_close_to_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
EPS = 1e-5


def plain(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """What PyTorch code in the same dtype computes; in float64 the truth. With a residual the two outputs side by side."""
    s = x if residual is None else x + residual
    wide = s if s.dtype == torch.float64 else s.float()
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(s.dtype)
    y = y if weight is None else y * (weight + offset)
    return y if residual is None else torch.cat([y, s], -1)


def ours(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None, offset: float = 0.0) -> Tensor:
    result = rms_norm(x, weight, eps=EPS, residual=residual, weight_offset=offset)
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
        draws.append([x, draw(x.shape[-1]), *([draw(*x.shape)] if with_residual else [])])
    for what, comparison in zip(("output", "dx", "dweight", "dresidual"), prove(ours, plain, *draws), strict=False):
        if case != "one number" or what not in ("dx", "dresidual"):  # zero but for rounding
            assert comparison.same, f"{case}, {what}: {comparison}"
    with torch.no_grad():  # prove clones its inputs, so the strides are seen here only
        assert_close_to_reference(ours(*draws[0]), plain(*draws[0]), plain(*(t.double() for t in draws[0])), case)


@pytest.mark.parametrize("device", DEVICES)
def test_without_weight_and_with_offset(device: str) -> None:
    draws = [[drawer(torch.bfloat16, device, seed)(4, 96)] for seed in range(3)]
    assert all(c.same for c in prove(ours, plain, *draws))
    draws = [[*inputs, drawer(torch.bfloat16, device, 9)(96)] for inputs in draws]
    for comparison in prove(lambda x, w: ours(x, w, offset=1.0), lambda x, w: plain(x, w, offset=1.0), *draws):
        assert comparison.same, str(comparison)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_those_of_the_modules_it_replaces(dtype: torch.dtype, weight_dtype: torch.dtype, device: str) -> None:
    draw = drawer(dtype, device)
    x, weight = draw(6, 64), drawer(weight_dtype, device, 1)(64)
    for make, options in (
        (LlamaRMSNorm, {}),
        (T5LayerNorm, {"out_dtype": weight_dtype} if weight_dtype != torch.float32 else {}),
        (GemmaRMSNorm, {"out_dtype": dtype, "weight_offset": 1.0}),
    ):
        module = make(64, eps=EPS).to(device, weight_dtype)
        with torch.no_grad():
            module.weight.copy_(weight)
            expected = module(x)
            result = rms_norm(x, module.weight, eps=EPS, **options)
        assert result.dtype == expected.dtype, make.__name__
        ulp = max(torch.finfo(d).eps for d in (dtype, weight_dtype, expected.dtype))
        torch.testing.assert_close(result.double(), expected.double(), rtol=4 * ulp, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draw = drawer(dtype, device)
        x, residual, weight = draw(3, 5, 16), draw(3, 5, 16), draw(16)
        for t in (x, residual, weight):
            t.requires_grad_()
        rstd = draw(3, 5).float()
        torch.library.opcheck(RMS_NORM, (x, weight, EPS, 0.0, None))
        torch.library.opcheck(RMS_NORM, (x.transpose(0, 1), None, EPS, 1.0, torch.float32))
        torch.library.opcheck(ADD_RMS_NORM, (x, residual, weight, EPS, 1.0, None))
        x, residual, weight = x.detach(), residual.detach(), weight.detach()
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        torch.library.opcheck(RMS_NORM_BACKWARD, (residual, None, x, weight, rstd, 0.0, True))
        torch.library.opcheck(RMS_NORM_BACKWARD, (residual, x, strided, None, rstd, 0.0, False))


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, s = rms_norm(x, weight, eps=EPS, residual=residual, weight_offset=1.0)
    return y, s


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_twice_and_of_one_output_only(device: str) -> None:
    draw = drawer(torch.float64, device)
    x, residual, weight = (t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7)))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, eps=EPS), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *a: rms_norm(*a, eps=EPS), (x, weight))
    both = (x, residual, weight)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a)[0] * add_norm(*a)[1], both)
    assert torch.autograd.gradgradcheck(lambda *a: add_norm(*a), both)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a)[0], both)
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a, weight.detach())[1], (x, residual))
    frozen = weight.detach().float()
    leaf = draw(5, 7).float().requires_grad_()
    rms_norm(leaf, frozen, eps=EPS).sum().backward()
    assert leaf.grad is not None
    assert frozen.grad is None


def test_the_eager_function_has_the_same_gradients_twice() -> None:
    pytest.importorskip("triton")
    draw = drawer(torch.float64)
    x, residual, weight = (t.requires_grad_() for t in (draw(3, 7), draw(3, 7), draw(7)))
    assert torch.autograd.gradgradcheck(lambda x, w: _Norm.apply(x, None, w, EPS, 1.0, None), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *a: _Norm.apply(*a, EPS, 0.0, None), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r: _Norm.apply(x, r, weight.detach(), EPS, 0.0, None)[1], (x, residual))
    half = draw(2, 4).bfloat16().requires_grad_()
    wide = draw(2, 4).requires_grad_()
    y, s = _Norm.apply(half, wide, None, EPS, 0.0, None)
    (y + s).sum().backward()
    assert half.grad is not None
    assert wide.grad is not None
    assert (half.grad.dtype, wide.grad.dtype) == (torch.bfloat16, torch.float64)


def test_torch_compile_takes_it_whole() -> None:
    draw = drawer(torch.float32)
    inputs = [t.requires_grad_() for t in (draw(4, 32), draw(32), draw(4, 32))]
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
        rms_norm(given.pop("x"), given.pop("weight"), **given)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16).expand(600_000, 4096)
    y = rms_norm(x, eps=EPS)
    assert torch.equal(y[-1], y[0])
    assert torch.isfinite(y[-1]).all()


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.rms_norm, oslo_fusion.ops.layer_norm; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
