"""The meaning of glu: what the MLPs it stands in compute, under the law, with gradients, and clear errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.glu import GLU, GLU_BACKWARD, geglu, glu, merged_glu, swiglu
from oslo_fusion.ops.row_cases import ROW_CASES, drawer, draws_of
from oslo_fusion.probe import prove
from oslo_fusion.testing import assert_close_to_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def ours(activation: str) -> Any:
    return lambda gate, up: glu(gate, up, activation)


def plain(activation: str) -> Any:
    """What PyTorch code in the same dtype computes; in float64 the truth."""
    return lambda gate, up: ACTIVATIONS[activation](gate) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("case", list(ROW_CASES))
def test_the_law_holds(case: str, activation: str, dtype: torch.dtype, device: str) -> None:
    draws = []
    for seed in range(draws_of(case)):
        draw = drawer(dtype, device, seed)
        draws.append([ROW_CASES[case](draw), ROW_CASES[case](draw)])
    for what, comparison in zip(("h", "dgate", "dup"), prove(ours(activation), plain(activation), *draws), strict=True):
        assert comparison.same, f"{case}, {what}: {comparison}"
    with torch.no_grad():  # prove clones its inputs, so the strides are seen here only
        for inputs in draws:
            h = ours(activation)(*inputs)
            assert h.is_contiguous()
            if case != "one number":
                wide = plain(activation)(*(t.double() for t in inputs))
                assert_close_to_reference(h, plain(activation)(*inputs), wide, case)


@pytest.mark.parametrize("device", DEVICES)
def test_public_names_are_the_modules_products(device: str) -> None:
    draw = drawer(torch.float32, device)
    gate, up = draw(5, 64), draw(5, 64)
    for result, name in (
        (swiglu(gate, up), "silu"),
        (geglu(gate, up), "gelu"),
        (geglu(gate, up, "tanh"), "gelu_pytorch_tanh"),
        (geglu(gate, up, approximate="tanh"), "gelu_new"),
    ):
        exact = ACT2FN[name](gate.double()) * up.double()
        assert_close_to_reference(result, ACT2FN[name](gate) * up, exact, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("up_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("gate_dtype", [*DTYPES, torch.float64])
def test_mixed_dtypes_promote_as_torch_does(gate_dtype: torch.dtype, up_dtype: torch.dtype, device: str) -> None:
    gate, up = drawer(gate_dtype, device, 1)(6, 64).requires_grad_(), drawer(up_dtype, device, 2)(6, 64).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    expected, result, exact = F.silu(gate) * up, swiglu(gate, up), F.silu(wide[0]) * wide[1]
    assert result.dtype == expected.dtype
    assert_close_to_reference(result, expected, exact)
    ours, plain_ones, truths = (
        torch.autograd.grad(y.sum(), leaves) for y, leaves in ((result, (gate, up)), (expected, (gate, up)), (exact, wide))
    )
    for mine, theirs, truth in zip(ours, plain_ones, truths, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close_to_reference(mine, theirs, truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_operators_pass_opcheck(activation: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draw = drawer(dtype, device)
        gate, up = draw(3, 5, 16).requires_grad_(), draw(3, 5, 16).requires_grad_()
        torch.library.opcheck(GLU, (gate, up, activation))
        torch.library.opcheck(GLU, (*draw(3, 5, 32).requires_grad_().chunk(2, -1), activation))
        torch.library.opcheck(GLU, (gate.transpose(0, 1), up.float().transpose(0, 1), activation))
        torch.library.opcheck(GLU_BACKWARD, (draw(3, 5, 16), gate.detach(), up.detach(), activation))
        torch.library.opcheck(GLU_BACKWARD, (draw(3, 5, 1).expand(3, 5, 16), *draw(3, 5, 32).chunk(2, -1), activation))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_twice_and_of_one_input_only(activation: str, device: str) -> None:
    draw = drawer(torch.float64, device)
    gate, up = draw(3, 7).requires_grad_(), draw(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(ours(activation), (gate, up))
    assert torch.autograd.gradgradcheck(ours(activation), (gate, up))
    merged = draw(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: glu(*x.chunk(2, -1), activation), (merged,))
    leaf, frozen = draw(5, 7).float().requires_grad_(), draw(5, 7).float()
    glu(leaf, frozen, activation).sum().backward()
    glu(frozen, leaf, activation).sum().backward()
    assert leaf.grad is not None
    assert frozen.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gate_first", [True, False])
def test_merged_projections(gate_first: bool, device: str) -> None:
    merged = drawer(torch.float64, device)(3, 2, 10).requires_grad_()
    first, second = merged.chunk(2, -1)
    expected = swiglu(first, second) if gate_first else swiglu(second, first)
    torch.testing.assert_close(merged_glu(merged, "silu", gate_first), expected)
    assert torch.autograd.gradcheck(lambda m: merged_glu(m, "silu", gate_first), (merged,))
    assert torch.autograd.gradgradcheck(lambda m: merged_glu(m, "silu", gate_first), (merged,))
    half = drawer(torch.bfloat16, device)(4, 6, 64).requires_grad_()
    dh = drawer(torch.bfloat16, device)(4, 6, 32)
    mine, theirs = (torch.autograd.grad(h, half, dh)[0] for h in (merged_glu(half, "gelu"), geglu(*half.chunk(2, -1))))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_gradients_in_float32(device: str) -> None:
    draw = drawer(torch.float32, device)
    leaves = [draw(4, 9).requires_grad_() for _ in range(2)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for function, given in ((swiglu, leaves), (plain("silu"), leaves), (plain("silu"), wide)):
        first = torch.autograd.grad(function(*given).square().sum(), given, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), given))
    for mine, theirs, exact in zip(*results, strict=True):
        assert_close_to_reference(mine, theirs, exact)


def test_nothing_but_the_inputs_is_saved() -> None:
    gate, up = (drawer(torch.float32, seed=i)(64, 32).requires_grad_() for i in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        swiglu(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


def test_torch_compile_takes_it_whole() -> None:
    draw = drawer(torch.float32)
    inputs = [draw(4, 32).requires_grad_() for _ in range(2)]
    compiled = torch.compile(lambda a, b: geglu(a, b, "tanh"), fullgraph=True, backend="aot_eager")
    expected, result = geglu(*inputs, "tanh"), compiled(*inputs)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


X = torch.zeros(4, 8)
BAD: list[tuple[Any, str]] = [
    (lambda: swiglu(X.long(), X), "gate: received dtype torch.int64"),
    (lambda: swiglu(X, X.bool()), "up: received dtype torch.bool"),
    (lambda: swiglu(X, X[:1]), "up: received shape [1, 8], must be that of gate, [4, 8]"),
    (lambda: swiglu(X[0], X), "up: received shape [4, 8], must be that of gate, [8]"),
    (lambda: geglu(X, X.to("meta")), "up: is on meta, gate on cpu"),
    (lambda: geglu(X, X, "erf"), "approximate: received 'erf', allowed are none, tanh"),
    (lambda: glu(X, X, "relu"), "activation: received 'relu', allowed are silu, gelu, gelu_tanh"),
    (lambda: merged_glu(X[:, :7], "silu"), "merged: received shape [4, 7]"),
    (lambda: GLU_BACKWARD(X, X, X[:, :7], "silu"), "up: received shape [4, 7]"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    line = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    expanded = line.expand(600_000, 4096)
    for gate in (expanded, expanded.contiguous()):
        up = gate.clone() if gate.is_contiguous() else gate
        h = swiglu(gate, up)
        assert torch.equal(h[-1], swiglu(line, line)[0])
        dgate, dup = GLU_BACKWARD(h, gate, up, "silu")
        assert torch.equal(dgate[-1], dgate[0])
        assert torch.equal(dup[-1], dup[0])


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.glu; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
