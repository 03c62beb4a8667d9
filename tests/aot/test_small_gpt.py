"""A small GPT trained for 200 steps: the loss curve of eager within its run-to-run spread, and dropout as dropout should be."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oslo_fusion
from oslo_fusion.aot import backend
from oslo_fusion.testing import curves_apart
from tutorials.small_gpt import SIZES, Run, Text, build, held_out_loss, train, write

STEPS, WINDOW = 200, 20
TEXT = Text()
EVERYTHING = ["all", "FusedLinearCrossEntropy"]


def config(budget: float = 1.0, **more: Any) -> dict[str, Any]:
    block = {"activation_memory_budget": budget}
    return {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block, **more}}


def curve(run: Run) -> list[float]:
    return [statistics.mean(run.losses[start : start + WINDOW]) for start in range(0, STEPS, WINDOW)]


def distance(runs: Sequence[Run], eager: Sequence[Run]) -> float:
    return curves_apart([run.losses for run in runs], [run.losses for run in eager], WINDOW)


def runs(seeds: Sequence[int], make: Callable[[], nn.Module], size: str, **options: Any) -> list[Run]:
    """The same pieces of text in the same order, and another dropout for each seed. One model, so that it is compiled once."""
    model = make()
    start = copy.deepcopy(model.state_dict())
    found = []
    for seed in seeds:
        model.load_state_dict(start)
        found.append(train(model, TEXT, SIZES[size], STEPS, dropout_seed=seed, **options))
    return found


@pytest.fixture(scope="module")
def eager() -> list[Run]:
    return runs(range(5), lambda: build(TEXT, SIZES["tiny"]), "tiny")


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_the_loss_curve_is_eagers_within_its_spread(budget: float, eager: list[Run]) -> None:
    model = oslo_fusion.initialize(build(TEXT, SIZES["tiny"]), config(budget))
    ours = runs((0, 11, 12), lambda: model, "tiny")
    assert distance(ours[1:], eager) < 3
    assert statistics.mean(curve(ours[0])[-2:]) < statistics.mean(curve(ours[0])[:2]) - 1, "it learns"
    # With the same seed the same elements are dropped on a CPU, so the two runs part by rounding only.
    assert max(abs(a - b) for a, b in zip(ours[0].losses[:50], eager[0].losses, strict=False)) < 1e-3
    report = str(oslo_fusion.report(model))
    assert "1 graph, 0 breaks, 0 recompiles" in report, report


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_another_dropout_is_outside_of_the_spread(dropout: float, eager: list[Run]) -> None:
    """What the test above would not let pass."""
    other = runs((0, 1), lambda: build(TEXT, SIZES["tiny"], dropout=dropout), "tiny")
    assert distance(other, eager) > 4


def losses(model: nn.Module, ids: torch.Tensor, count: int, seed: int) -> list[float]:
    """The loss of one batch again and again, with a backward after each."""
    torch.manual_seed(seed)
    found = []
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        found.append(float(loss.detach()))
    return found


def assert_dropout(device: str, dtype: torch.dtype) -> None:
    size = SIZES["tiny"]
    plain = build(TEXT, size, device=device, dtype=dtype, dropout=0.2)
    model = oslo_fusion.initialize(copy.deepcopy(plain), config())
    ids = TEXT.batches(size, 0)().to(device)
    ours, theirs = losses(model, ids, 60, seed=1), losses(plain, ids, 60, seed=2)
    assert len(set(ours)) > 50, "drawn anew at each step"
    mean, spread = statistics.mean(theirs), statistics.stdev(theirs)
    assert abs(statistics.mean(ours) - mean) < 5 * spread * (2 / 60) ** 0.5
    assert 0.5 < statistics.stdev(ours) / spread < 2
    assert losses(model, ids, 3, seed=1) == ours[:3], "the same seed, the same dropout"
    model.eval(), plain.eval()
    evaluated = losses(model, ids, 2, seed=3)
    assert evaluated[0] == evaluated[1], "no dropout"
    expected = losses(plain, ids, 1, seed=3)[0]
    assert abs(evaluated[0] - expected) < 8 * torch.finfo(dtype).eps * expected
    model.train()
    assert losses(model, ids, 1, seed=1) == ours[:1], "and back"


def test_dropout_is_random_between_steps_and_off_in_evaluation() -> None:
    assert_dropout("cpu", torch.float32)


def assert_the_backward_drops_what_the_forward_dropped(model: Any, vocabulary: int) -> None:
    """Against a finite difference in float64, with one seed for all forwards: a mask drawn anew in the backward would show."""
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator).to(device) for p in parameters]

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    reached = []
    for step in (1e-5, -1e-5):
        moved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        reached.append(float(loss().detach()))
        with torch.no_grad():
            for p, before in zip(parameters, moved, strict=True):
                p.copy_(before)
    assert slope == pytest.approx((reached[0] - reached[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("budget", [1.0, 0.7, 0.4, 0.1, 0.0])
@pytest.mark.usefixtures("quick")
def test_the_backward_drops_what_the_forward_dropped(budget: float) -> None:
    model = oslo_fusion.initialize(build(TEXT, SIZES["tiny"], dtype=torch.float64), config(budget))
    assert_the_backward_drops_what_the_forward_dropped(model, len(TEXT.alphabet))


def test_so_it_does_with_inductors_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one seed per mask, from which forward and backward draw the same."""
    monkeypatch.setattr(backend, "_on_a_cpu", lambda example_inputs: False)
    model = oslo_fusion.initialize(build(TEXT, SIZES["tiny"], dtype=torch.float64), config(0.4))
    assert_the_backward_drops_what_the_forward_dropped(model, len(TEXT.alphabet))


@pytest.mark.usefixtures("quick")
def test_it_writes_and_is_evaluated_between_steps() -> None:
    size = SIZES["tiny"]
    results = []
    for model in (oslo_fusion.initialize(build(TEXT, size), config()), build(TEXT, size)):
        run = train(
            model, TEXT, size, 4, every=(2, lambda m: (write(m, TEXT, "The ", 12), round(held_out_loss(m, TEXT, size, 1), 4)))
        )
        assert model.training
        assert list(run.notes) == [2, 4]
        results.append(run.notes)
    assert results[0] == results[1]
    assert all(text.startswith("The ") and len(text) == 16 for text, _ in results[0].values())


def test_a_character_outside_of_the_alphabet_is_named() -> None:
    with pytest.raises(ValueError, match=r"received \['é'\].*Remedy"):
        TEXT.encode("é")


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["bfloat16", "autocast"])
def test_the_loss_curve_on_a_gpu(autocast: torch.dtype | None) -> None:
    dtype = torch.bfloat16 if autocast is None else torch.float32

    def make(settings: dict[str, Any] | None = None, dropout: float = 0.1) -> Any:
        model = build(TEXT, SIZES["small"], device="cuda", dtype=dtype, dropout=dropout)
        return model if settings is None else oslo_fusion.initialize(model, settings)

    eager = runs(range(5), make, "small", autocast=autocast)
    assert distance(runs((0,), lambda: make(dropout=0.0), "small", autocast=autocast), eager) > 3
    for settings in (config(), config(0.3), config(custom_cuda_kernels=EVERYTHING)):
        assert distance(runs((11, 12, 13), lambda settings=settings: make(settings), "small", autocast=autocast), eager) < 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_on_a_gpu(dtype: torch.dtype) -> None:
    assert_dropout("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.4, 0.0])
def test_the_backward_drops_what_the_forward_dropped_on_a_gpu(budget: float) -> None:
    model = oslo_fusion.initialize(build(TEXT, SIZES["tiny"], device="cuda", dtype=torch.float64), config(budget))
    assert_the_backward_drops_what_the_forward_dropped(model, len(TEXT.alphabet))
