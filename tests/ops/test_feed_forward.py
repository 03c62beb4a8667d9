"""The meaning of feed_forward: what the modules it stands for compute, under the law, with gradients by the operator."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.feed_forward import FEED_FORWARD_BACKWARD, GELUS, feed_forward, feed_forward_reference
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
CASES = {  # batch, dim, inner, out, a bias of the second layer
    "square": ((2, 9), 64, 256, 64, True),
    "no second bias": ((2, 9), 64, 256, 48, False),
    "odd": ((3, 5), 33, 77, 31, True),
    "one token": ((1,), 32, 128, 32, True),
}


def tensors(case: str, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """x, weight, bias, out_weight, and out_bias where the case has it."""
    batch, dim, inner, out, biased = CASES[case]
    draw = drawer(dtype, device, seed)
    given = [draw(*batch, dim), draw(inner, dim) / dim**0.5, draw(inner), draw(out, inner) / inner**0.5]
    return [*given, *((draw(out),) if biased else ())]


def ours(activation: str) -> Any:
    return lambda *given: feed_forward(*given, activation=activation)


def plain(activation: str) -> Any:
    """What PyTorch code in the same dtype computes; in float64 the truth."""
    return lambda *given: feed_forward_reference(*given, *[None] * (5 - len(given)), activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GELUS)
@pytest.mark.parametrize("case", list(CASES))
def test_the_law_holds(case: str, activation: str, dtype: torch.dtype, device: str) -> None:
    draws = [tensors(case, dtype, device, seed) for seed in range(2 if case != "one token" else 6)]
    found = prove(ours(activation), plain(activation), *draws)
    for what, comparison in zip(("y", "dx", "dweight", "dbias", "dout_weight", "dout_bias"), found, strict=False):
        assert comparison.same, f"{case}, {what}: {comparison}"
    assert len(found) == 1 + len(draws[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_law_holds_at_the_widths_of_bert(dtype: torch.dtype) -> None:
    draw = drawer(dtype, "cuda")
    given = [draw(4097, 768), draw(3072, 768) / 28, draw(3072), draw(768, 3072) / 55, draw(768)]
    for comparison in prove(ours("gelu"), plain("gelu"), given):
        assert comparison.same, str(comparison)


@pytest.mark.gpu
def test_the_same_bits_at_every_call() -> None:
    draw = drawer(torch.bfloat16, "cuda")
    dy, weight, h = draw(8192, 768), draw(768, 3072) / 28, draw(8192, 3072)
    first, again = (FEED_FORWARD_BACKWARD(dy, weight, h, "gelu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_twice_and_of_some_inputs_only(device: str) -> None:
    draw = drawer(torch.float64, device)
    small = [t.requires_grad_() for t in (draw(3, 5), draw(6, 5), draw(6), draw(4, 6), draw(4))]
    assert torch.autograd.gradcheck(ours("gelu"), small)
    assert torch.autograd.gradgradcheck(ours("gelu_tanh"), small)
    given = tensors("square", torch.float32, device)
    full = torch.autograd.grad(plain("gelu")(*(leaves := [t.clone().requires_grad_() for t in given])).sum(), leaves)
    for wanted in range(5):
        leaves = [t.clone().requires_grad_(position == wanted) for position, t in enumerate(given)]
        feed_forward(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [position == wanted for position in range(5)]
        torch.testing.assert_close(leaves[wanted].grad, full[wanted], rtol=1e-4, atol=1e-5)


def test_of_the_inner_width_only_the_pre_activation_is_saved() -> None:
    given = [t.requires_grad_() for t in tensors("square", torch.float32, "cpu")]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        feed_forward(*given)
    mine = [t for t in saved if t.data_ptr() not in {g.data_ptr() for g in given}]
    assert [t.shape for t in mine] == [(2, 9, 256)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_passes_opcheck(device: str) -> None:
    draw = drawer(torch.float32, device)
    for activation in GELUS:
        torch.library.opcheck(FEED_FORWARD_BACKWARD, (draw(7, 5), draw(5, 12), draw(7, 12), activation))


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_no_tokens_and_autocast(device: str) -> None:
    x, weight, bias, out_weight, out_bias = tensors("square", torch.float32, device)
    wide = torch.stack((bias, bias), 1)[:, 0]
    views = [x.transpose(0, 1), weight.t().contiguous().t(), wide, out_weight.t().contiguous().t(), out_bias]
    leaves, twins = ([t.detach().requires_grad_() for t in views] for _ in range(2))
    mine = torch.autograd.grad(feed_forward(*leaves).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad(plain("gelu")(*twins).sum(), twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    none = [x[:, :0].clone().requires_grad_(), *(t.clone().requires_grad_() for t in (weight, bias, out_weight, out_bias))]
    feed_forward(*none).sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in none)
    with torch.autocast(device, dtype=torch.bfloat16):
        given = (x, weight, bias, out_weight, out_bias)
        leaves, twins = ([t.detach().clone().requires_grad_() for t in given] for _ in range(2))
        y, z = feed_forward(*leaves), plain("gelu")(*twins)
        assert y.dtype == z.dtype == torch.bfloat16
        mine = torch.autograd.grad(y.sum(), leaves)
    assert [t.dtype for t in mine] == [torch.float32] * 5
    for a, b in zip(mine, torch.autograd.grad(z.sum(), twins), strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm())


X, W, B, D = torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(16), torch.zeros(8, 16)
H = torch.zeros(4, 16)
BAD: list[tuple[Any, str]] = [
    (lambda: feed_forward(X.long(), W, B, D), "x: received dtype torch.int64"),
    (lambda: feed_forward(X, W[:, :7], B, D), "weight: received shape [16, 7] with x of [4, 8]"),
    (lambda: feed_forward(X, W, B[:15], D), "bias: received shape [15]. Allowed: [16]"),
    (lambda: feed_forward(X, W, B, W), "out_weight: received shape [16, 8]. Allowed: [out, 16]"),
    (lambda: feed_forward(X, W, B, D, B), "out_bias: received shape [16]. Allowed: [8]"),
    (lambda: feed_forward(X, W.half(), B, D), "weight: received dtype torch.float16. Allowed: torch.float32, that of x"),
    (lambda: feed_forward(X, W, B, D.to("meta")), "out_weight: received a tensor on meta"),
    (lambda: feed_forward(X, W, B, D, activation="silu"), "activation: received 'silu'. Allowed: gelu, gelu_tanh"),
    (lambda: FEED_FORWARD_BACKWARD(X[:3], D, H, "gelu"), "dy: received 3 rows. Allowed: 4"),
    (lambda: FEED_FORWARD_BACKWARD(H, D, H, "gelu"), "dy: received shape [4, 16]. Allowed: [rows, 8]"),
    (lambda: FEED_FORWARD_BACKWARD(X, W, H, "gelu"), "out_weight: received shape [16, 8]. Allowed: [out, 16]"),
    (lambda: FEED_FORWARD_BACKWARD(X, D, H[0], "gelu"), "h: received shape [16]. Allowed: [rows, inner]"),
    (lambda: FEED_FORWARD_BACKWARD(X, D, H.long(), "gelu"), "h: received dtype torch.int64"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.feed_forward; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
