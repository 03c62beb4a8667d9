"""The meaning of gated_mlp: what the modules it stands for compute, under the law, with gradients part by part."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops import gated_mlp as op
from oslo_fusion.ops.gated_mlp import GATED_MLP_BACKWARD, gated_mlp, gated_mlp_reference, part_width
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
CASES = {  # batch, dim, inner, out, biases
    "three parts": ((2, 9), 64, 384, 64, False),
    "with biases": ((2, 9), 64, 384, 64, True),
    "a last part that is narrower": ((21,), 48, 300, 40, True),
    "one part": ((3, 5), 33, 77, 33, False),
    "one token": ((1,), 32, 256, 32, True),
}


@pytest.fixture(autouse=True)
def _narrow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small MLPs are cut as large ones are."""
    monkeypatch.setattr(op, "_NARROWEST", 128)


def tensors(case: str, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """x, the weights, and the biases where the case has them."""
    batch, dim, inner, out, biases = CASES[case]
    draw = drawer(dtype, device, seed)
    given = [draw(*batch, dim), draw(inner, dim) / dim**0.5, draw(inner, dim) / dim**0.5, draw(out, inner) / inner**0.5]
    return [*given, *((draw(inner), draw(inner), draw(out)) if biases else ())]


def ours(activation: str) -> Any:
    return lambda *given: gated_mlp(*given, activation=activation)


def plain(activation: str) -> Any:
    """What PyTorch code in the same dtype computes; in float64 the truth."""
    return lambda *given: gated_mlp_reference(*given, *[None] * (7 - len(given)), activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_law_holds(case: str, activation: str, dtype: torch.dtype, device: str) -> None:
    draws = [tensors(case, dtype, device, seed) for seed in range(2 if case != "one token" else 6)]
    names = ("y", "dx", "dgate_weight", "dup_weight", "ddown_weight", "dgate_bias", "dup_bias", "ddown_bias")
    found = prove(ours(activation), plain(activation), *draws)
    for what, comparison in zip(names, found, strict=False):
        assert comparison.same, f"{case}, {what}: {comparison}"
    assert len(found) == 1 + len(draws[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_law_holds_at_the_widths_of_llama(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight parts of 1024 columns, whose gradients of x are added up in half precision."""
    monkeypatch.undo()
    draw = drawer(dtype, "cuda")
    given = [draw(1024, 2048), *(draw(8192, 2048) / 45 for _ in range(2)), draw(2048, 8192) / 90]
    assert part_width(8192, 2048) == 1024
    for comparison in prove(ours("silu"), plain("silu"), given):
        assert comparison.same, str(comparison)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_twice_and_of_some_inputs_only(device: str) -> None:
    draw = drawer(torch.float64, device)
    small = [draw(3, 5), draw(6, 5), draw(6, 5), draw(4, 6), draw(6), draw(6), draw(4)]
    small = [t.requires_grad_() for t in small]
    assert torch.autograd.gradcheck(ours("silu"), small)
    assert torch.autograd.gradgradcheck(ours("silu"), small)
    given = tensors("with biases", torch.float32, device)
    full = torch.autograd.grad(plain("gelu")(*(leaves := [t.clone().requires_grad_() for t in given])).sum(), leaves)
    for wanted in range(7):
        leaves = [t.clone().requires_grad_(position == wanted) for position, t in enumerate(given)]
        gated_mlp(*leaves, activation="gelu").sum().backward()
        for position, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (position == wanted)
        torch.testing.assert_close(leaves[wanted].grad, full[wanted], rtol=1e-4, atol=1e-5)


def test_nothing_but_the_inputs_is_saved() -> None:
    given = [t.requires_grad_() for t in tensors("three parts", torch.float32, "cpu")]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        gated_mlp(*given)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in given}


def test_what_is_frozen_costs_no_memory_and_no_time() -> None:
    x, *weights = tensors("three parts", torch.float32, "cpu")
    dy = torch.randn(2, 9, 64)
    found = GATED_MLP_BACKWARD(dy, x, *weights, None, None, "silu", [True, False, False, False, False, False])
    assert [t.numel() for t in found] == [x.numel(), 0, 0, 0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_passes_opcheck(device: str) -> None:
    for case in ("with biases", "three parts"):
        x, gate, up, down, *biases = tensors(case, torch.float32, device)
        pair = biases[:2] or [None, None]
        dy = drawer(torch.float32, device, 7)(*x.shape[:-1], down.shape[0])
        torch.library.opcheck(GATED_MLP_BACKWARD, (dy, x, gate, up, down, *pair, "gelu", [True] * 6))
        torch.library.opcheck(GATED_MLP_BACKWARD, (dy, x, gate, up, down, *pair, "silu", [False, True] * 3))


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_no_tokens_and_autocast(device: str) -> None:
    x, gate, up, down = tensors("three parts", torch.float32, device)
    views = [x.transpose(0, 1), gate.t().contiguous().t(), torch.cat((up, up), 1)[:, :64], down.t().contiguous().t()]
    leaves, twins = ([t.detach().requires_grad_() for t in views] for _ in range(2))
    mine = torch.autograd.grad(gated_mlp(*leaves).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad(plain("silu")(*twins).sum(), twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    none = [x[:, :0].clone().requires_grad_(), *(t.clone().requires_grad_() for t in (gate, up, down))]
    gated_mlp(*none).sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in none)
    with torch.autocast(device, dtype=torch.bfloat16):
        leaves, twins = ([t.detach().clone().requires_grad_() for t in (x, gate, up, down)] for _ in range(2))
        y, z = gated_mlp(*leaves), plain("silu")(*twins)
        assert y.dtype == z.dtype == torch.bfloat16
        mine = torch.autograd.grad(y.sum(), leaves)
    assert [t.dtype for t in mine] == [torch.float32] * 4
    for a, b in zip(mine, torch.autograd.grad(z.sum(), twins), strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm())


def test_torch_compile_takes_it_whole() -> None:
    given = [t.requires_grad_() for t in tensors("with biases", torch.float32, "cpu")]
    compiled = torch.compile(ours("silu"), fullgraph=True, backend="aot_eager")
    expected, result = gated_mlp(*given), compiled(*given)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True):
        torch.testing.assert_close(a, b)


def test_parts_are_half_as_wide_as_the_input_and_fill_the_inner_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name, inner, dim, width in (
        ("Llama 1B", 8192, 2048, 1024),
        ("Llama 8B", 14336, 4096, 2048),
        ("Qwen 0.5B", 4864, 896, 1280),
        ("Gemma 2B", 16384, 2048, 1024),
        ("T5 v1.1 base", 2048, 768, 1024),
        ("small", 96, 32, 96),
    ):
        assert part_width(inner, dim) == width, name


X, W, D = torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(8, 16)
BAD: list[tuple[Any, str]] = [
    (lambda: gated_mlp(X.long(), W, W, D), "x: received dtype torch.int64"),
    (lambda: gated_mlp(X, W[:, :7], W, D), "gate_weight: received shape [16, 7] with x of [4, 8]"),
    (lambda: gated_mlp(X, W, W[:15], D), "up_weight: received shape [15, 8]"),
    (lambda: gated_mlp(X, W, W, W), "down_weight: received shape [16, 8]. Allowed: [out, 16]"),
    (lambda: gated_mlp(X, W, W, D, X[0]), "gate_bias: received shape [8]. Allowed: [16]"),
    (lambda: gated_mlp(X, W, W, D, down_bias=W[:, 0]), "down_bias: received shape [16]. Allowed: [8]"),
    (lambda: gated_mlp(X, W.half(), W, D), "gate_weight: received dtype torch.float16. Allowed: torch.float32, that of x"),
    (lambda: gated_mlp(X, W, W, D.to("meta")), "down_weight: received a tensor on meta"),
    (lambda: gated_mlp(X, W, W, D, activation="relu"), "activation: received 'relu'. Allowed: silu, gelu, gelu_tanh"),
    (lambda: GATED_MLP_BACKWARD(X, X, W, W[:15], D, None, None, "silu", [True] * 6), "up_weight: received shape [15, 8]"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.gated_mlp; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
