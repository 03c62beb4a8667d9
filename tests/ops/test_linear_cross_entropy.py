"""The meaning of linear_cross_entropy: what transformers' lm_head and loss compute, under the law, and clear errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import fixed_cross_entropy

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, Options, Wanted, linear_cross_entropy
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "Gemma 2": {"logit_softcap": 30.0},
    "Cohere": {"logit_scale": 0.0625},
    "all at once": {"label_smoothing": 0.2, "logit_softcap": 5.0, "logit_scale": 0.5, "compact": True},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items": 7},
    "compact": {"compact": True},
}


def targets(*shape: int, vocab: int = 37, device: str = "cpu", seed: int = 0) -> Tensor:
    """Random labels, about a third of them ignored, the first one not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    labels.view(-1)[0] = vocab - 1
    return labels.to(device)


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: Any = None,
    **_: Any,
) -> Tensor:
    """What a model of transformers does in the same dtype; in float64 the truth."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcap:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if label_smoothing or reduction == "sum":
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    return fixed_cross_entropy(logits, labels, num_items)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", list(OPTIONS))
def test_the_law_holds(options: str, with_bias: bool, dtype: torch.dtype, device: str) -> None:
    labels, draws = targets(3, 7, device=device), []
    for seed in range(24):
        draw = drawer(dtype, device, seed)
        draws.append([draw(3, 7, 24), draw(37, 24) * 0.3, *([draw(37)] if with_bias else [])])
    chosen = OPTIONS[options]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **chosen)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(hidden, weight, labels, bias, **chosen)

    for what, comparison in zip(("loss", "dhidden", "dweight", "dbias"), prove(ours, theirs, *draws), strict=False):
        assert comparison.same, f"{options}, {what}: {comparison}"


@pytest.mark.parametrize("device", DEVICES)
def test_num_items_may_be_a_tensor(device: str) -> None:
    draw, labels = drawer(torch.float32, device), targets(4, 5, device=device)
    hidden, weight = draw(4, 5, 8), draw(37, 8)
    given = linear_cross_entropy(hidden, weight, labels, num_items=torch.tensor(11, device=device))
    torch.testing.assert_close(given, linear_cross_entropy(hidden, weight, labels, num_items=11))
    torch.testing.assert_close(given, linear_cross_entropy(hidden, weight, labels, reduction="sum") / 11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"num_items": 0}, {"reduction": "sum"}, {"compact": True}])
def test_every_label_ignored_is_what_torch_gives(options: dict[str, Any], device: str) -> None:
    draw, labels = drawer(torch.float32, device), torch.full((2, 3), -100, device=device)
    results = []
    for function in (linear_cross_entropy, plain):
        leaves = [draw(2, 3, 8).requires_grad_(), draw(37, 8).requires_grad_()]
        loss = function(*leaves, labels, **options)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    if not options or "compact" in options:
        assert results[0][0].isnan()
    assert not results[0][1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    hidden, weight = torch.zeros(0, 8, device=device, requires_grad=True), torch.ones(5, 8, device=device, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64, device=device), reduction="sum")
    assert loss.item() == 0
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert dhidden.shape == (0, 8)
    assert not dweight.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_weight_gets_no_gradient(device: str) -> None:
    draw, labels = drawer(torch.float32, device), targets(4, 5, device=device)
    hidden, weight, bias = draw(4, 5, 8).requires_grad_(), draw(37, 8), draw(37).requires_grad_()
    linear_cross_entropy(hidden, weight, labels, bias=bias).backward()
    assert (hidden.grad is not None, weight.grad is None, bias.grad is not None) == (True, True, True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_linear_does(dtype: torch.dtype, device: str) -> None:
    labels, draws = targets(3, 7, device=device), [drawer(torch.float32, device, seed) for seed in range(6)]
    losses, gradients = [], []
    for function in (linear_cross_entropy, plain):
        with torch.autocast(device, dtype=dtype):
            inputs = [(d(3, 7, 16).requires_grad_(), d(37, 16).requires_grad_()) for d in draws]
            here = torch.stack([function(h, w, labels) for h, w in inputs])
        losses.append(here)
        gradients.append(torch.autograd.grad(here.sum(), [t for pair in inputs for t in pair]))
        draws = [drawer(torch.float32, device, seed) for seed in range(6)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(losses[0], losses[1], rtol=2 * eps, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps * float(theirs.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_passes_opcheck(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draw, labels = drawer(dtype, device), targets(2, 5, device=device)
        hidden, weight, bias = (t.requires_grad_() for t in (draw(2, 5, 8), draw(37, 8), draw(37)))
        options, half = Options(-100, 0.1, 5.0, 0.5, True, False), Options(-100, 0.0, 0.0, 1.0, False, False)
        torch.library.opcheck(LINEAR_CROSS_ENTROPY, (hidden, weight, labels, bias, *options, *Wanted(True, True, True)))
        hidden, weight = hidden.detach(), weight.detach()
        torch.library.opcheck(LINEAR_CROSS_ENTROPY, (hidden, weight, labels, None, *half, *Wanted(False, False, False)))
        strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        torch.library.opcheck(LINEAR_CROSS_ENTROPY, (strided, weight, labels, None, *half, *Wanted(True, True, False)))


def test_gradients_in_double_and_no_second_one() -> None:
    draw, labels = drawer(torch.float64), targets(2, 5, vocab=11)
    leaves = [t.requires_grad_() for t in (draw(2, 5, 6), draw(11, 6), draw(11))]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, label_smoothing=0.1, logit_softcap=4.0, logit_scale=0.7, accumulate=torch.float64
        )

    assert torch.autograd.gradcheck(loss, leaves)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)


def test_torch_compile_takes_it_whole() -> None:
    draw, labels = drawer(torch.float32), targets(3, 4)
    leaves = [t.requires_grad_() for t in (draw(3, 4, 8), draw(37, 8))]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels, num_items=torch.tensor(5.0))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(*leaves), compiled(*leaves)
    torch.testing.assert_close(result, expected)
    for a, b in zip(torch.autograd.grad(result, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, "hidden: received torch.int64 with torch.float32"),
    ({"hidden": torch.tensor(1.0)}, "hidden: received shape []"),
    ({"hidden": torch.zeros(4, 8).half()}, "hidden: received torch.float16 with torch.float32"),
    ({"weight": torch.zeros(5, 7)}, "weight: received shape [5, 7]. Allowed: [vocab, 8]"),
    ({"weight": torch.zeros(8)}, "weight: received shape [8]"),
    ({"weight": torch.zeros(5, 8, device="meta")}, "weight: received a tensor on meta"),
    ({"bias": torch.zeros(4)}, "bias: received shape [4]. Allowed: [5]"),
    ({"labels": torch.zeros(4)}, "labels: received dtype torch.float32"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: received shape [3]. Allowed: [4]"),
    ({"labels": torch.tensor([0, 5, 1, 1])}, "labels: received 5. Allowed: 0 to 4"),
    ({"labels": torch.tensor([0, -1, 1, 1])}, "labels: received -1"),
    ({"label_smoothing": 1.5}, "label_smoothing: received 1.5"),
    ({"logit_softcap": 0.0}, "logit_softcap: received 0.0"),
    ({"logit_softcap": float("nan")}, "logit_softcap: received nan"),
    ({"logit_scale": float("inf")}, "logit_scale: received inf"),
    ({"reduction": "none"}, "reduction: received 'none'. Allowed: mean | sum"),
    ({"reduction": "sum", "num_items": 3}, "num_items"),
    ({"accumulate": torch.float16}, "accumulate: received torch.float16"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    given = {"hidden": torch.zeros(4, 8), "weight": torch.ones(5, 8), "labels": labels, **arguments}
    with pytest.raises(ConfigError) as error:
        linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)
    assert message in str(error.value)


@pytest.mark.gpu
def test_a_label_outside_the_vocabulary_is_asserted_on_the_device() -> None:
    # In a process of its own: an assertion on the device leaves its context unusable.
    code = (
        "import torch; from oslo_fusion.ops.linear_cross_entropy import linear_cross_entropy as loss\n"
        "h, w = torch.zeros(4, 8, device='cuda'), torch.zeros(5, 8, device='cuda')\n"
        "loss(h, w, torch.tensor([0, 5, 1, 1], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "assert" in done.stderr


@pytest.mark.gpu
def test_logits_of_all_rows_are_never_in_memory() -> None:
    rows, dim, vocab = 8192, 256, 65536
    hidden = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).backward()
    taken = torch.cuda.max_memory_allocated() - before
    # The buffer's 256 MiB, the weight's gradient in float32 and in bfloat16, that of hidden, and what cuBLAS works in.
    assert taken < (256 << 20) + 6 * vocab * dim + 2 * rows * dim + (64 << 20) < 2 * rows * vocab


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import oslo_fusion.ops.linear_cross_entropy; "
    code += "print({'triton', 'transformers'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
