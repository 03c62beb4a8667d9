"""What is recognised, by structure alone, and what is refused, with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oslo_fusion
from oslo_fusion import probe, surgery
from oslo_fusion.jit.formulas import FORMULAS
from oslo_fusion.plan import Proposal, Timing
from oslo_fusion.recognition.activation import recognise_activation

OFF = {"kernel_fusion": {"enable": True, "autotune": "off"}}
CPU = torch.device("cpu")

# transformers' whole registry: what each computes, and in how many kernels it is written there
REGISTRY = {
    "gelu": ("gelu", 1),
    "gelu_10": ("gelu_10", 2),
    "gelu_fast": ("gelu_tanh", 9),
    "gelu_new": ("gelu_tanh", 8),
    "gelu_python": ("gelu", 5),
    "gelu_pytorch_tanh": ("gelu_tanh", 1),
    "gelu_python_tanh": ("gelu_tanh", 8),
    "gelu_accurate": ("gelu_tanh", 8),
    "hardswish": ("hardswish", 1),
    "laplace": ("laplace", 5),
    "leaky_relu": (None, 1),
    "mish": ("mish", 1),
    "quick_gelu": ("quick_gelu", 3),
    "relu": ("relu", 1),
    "relu2": ("relu2", 2),
    "relu6": ("relu6", 1),
    "sigmoid": ("sigmoid", 1),
    "silu": ("silu", 1),
    "sqrtsoftplus": ("sqrtsoftplus", 2),
    "swish": ("silu", 1),
    "tanh": ("tanh", 1),
}
NO_ACTIVATION = {"linear", "prelu", "xielu"}  # the identity, and two with parameters


def test_every_activation_of_the_registry_is_known() -> None:
    from transformers.activations import ACT2FN

    assert set(ACT2FN.keys()) == set(REGISTRY) | NO_ACTIVATION
    for name, (formula, kernels) in REGISTRY.items():
        found = recognise_activation(ACT2FN[name], CPU)
        assert found is not None, name
        assert (found.formula, found.kernels) == (formula, kernels), name
    for name in NO_ACTIVATION:
        assert recognise_activation(ACT2FN[name], CPU) is None, name


@pytest.mark.usefixtures("fuser_pretended")
def test_every_activation_of_several_kernels_is_fused_and_stays_itself() -> None:
    from transformers.activations import ACT2FN

    for name, (_, kernels) in REGISTRY.items():
        model = nn.Sequential(nn.Linear(8, 8), ACT2FN[name])
        x = torch.randn(4, 8)
        before = model(x)
        oslo_fusion.initialize(model, OFF)
        assert surgery.is_fused(model[1]) == (kernels > 1), name
        for _ in range(3):
            torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_learned_activations_are_refused_by_name() -> None:
    from transformers.activations import ACT2FN

    model = nn.Sequential(nn.Linear(8, 8), ACT2FN["xielu"])
    (row,) = oslo_fusion.plan(model, OFF).proposals
    assert (row.outcome, row.site.path) == ("refused", "1")
    assert "learned parameters" in row.reason


def activation_row(model: nn.Module, config: object) -> Proposal:
    (row,) = (row for row in oslo_fusion.plan(model, config).proposals if row.site.kind == "activation")
    return row


class HomemadeGelu(nn.Module):
    """The same function as transformers' gelu_new, under another name and written otherwise."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * torch.sigmoid(1.5957691216057308 * (values + 0.044715 * values**3))


class OnePlus(nn.Module):
    """Elementwise, two kernels, no known formula."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + 1


class Shape(nn.Module):
    """Not elementwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1) * 2


def test_recognition_is_by_result_not_by_name() -> None:
    found = recognise_activation(HomemadeGelu(), CPU)
    assert found is not None
    assert found.formula == "gelu_tanh"
    for module in (Shape(), nn.Dropout(), nn.Identity(), nn.Linear(3, 3), nn.Softmax(-1), nn.Flatten()):
        assert recognise_activation(module, CPU) is None, module
    (row,) = oslo_fusion.plan(nn.Sequential(nn.Linear(3, 3), OnePlus()), OFF).proposals
    assert row.outcome == "refused"
    assert "no known formula; its operators are sin, add" in row.reason


class StrangeNames(nn.Module):
    """A gated MLP of nobody's library, with dropout before the way down."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.rise, self.door, self.descend = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
        self.bend, self.forget = act, nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.descend(self.forget(self.bend(self.door(x)) * self.rise(x)))


class GateAddedNotMultiplied(StrangeNames):
    """Looks alike, computes something else: must not be taken for a product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.descend(self.forget(self.bend(self.door(x)) + self.rise(x)))


class ResidualWithBoth(nn.Module):
    """dense, dropout, plus the second argument, then a norm: BERT's output block under other names."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.twice = nn.Linear(24, 16), nn.Dropout(0.5), nn.LayerNorm(16), twice

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.b(self.a(x))
        return self.c(h + 2 * y if self.twice else h + y)


@pytest.mark.usefixtures("fuser_pretended")
def test_wiring_is_recognised_under_any_names() -> None:
    model = nn.ModuleDict(
        {
            "gated": StrangeNames(nn.SiLU()),
            "added": GateAddedNotMultiplied(nn.SiLU()),
            "residual": ResidualWithBoth(),
            "doubled": ResidualWithBoth(twice=True),
        }
    )
    rows = {row.site.path: row for row in oslo_fusion.plan(model, OFF).proposals}
    assert rows["gated"].outcome == "fused"
    assert rows["residual"].outcome == "fused"
    assert "added" not in rows
    assert "doubled" not in rows
    assert "gated.bend" not in rows, "claimed by the product"
    assert rows["added.bend"].outcome == "refused"


class Called(nn.Module):
    """Keeps what it computes in an attribute, as transformers' GELU does."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_two_functions_of_one_name_are_two_functions() -> None:
    def closure(scale: float) -> Any:
        return lambda x: x * torch.sigmoid(scale * (x + 0.044715 * x**3))

    model = nn.Sequential(nn.Linear(4, 4), Called(closure(1.5957691216057308)), Called(closure(1.0)))
    rows = {row.site.path: row for row in oslo_fusion.plan(model, OFF).proposals}
    assert rows["1"].outcome == "fused"
    assert rows["2"].outcome == "refused"


@pytest.mark.usefixtures("fuser_pretended")
def test_residual_dropout_is_random_in_training_and_off_in_eval() -> None:
    model = nn.ModuleDict({"r": ResidualWithBoth()})
    x, y = torch.randn(64, 24), torch.randn(64, 16)
    model.eval()
    before = model["r"](x, y)
    oslo_fusion.initialize(model, OFF)
    assert surgery.is_fused(model["r"])
    assert torch.equal(model["r"](x, y), before)
    model.train()
    first, second = model["r"](x, y), model["r"](x, y)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    third = model["r"](x, y)
    torch.manual_seed(7)
    assert torch.equal(model["r"](x, y), third)


@pytest.mark.usefixtures("fuser_pretended")
def test_hooked_or_replaced_modules_are_respected() -> None:
    model = nn.Sequential(nn.Linear(8, 8), HomemadeGelu())
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    row = activation_row(model, OFF)
    assert row.outcome == "refused"
    assert "hooked" in row.reason
    gated = StrangeNames(nn.SiLU())
    x = torch.randn(2, 16)
    oslo_fusion.initialize(gated, OFF)
    gated.eval()
    before = gated(x)
    gated.bend.register_forward_hook(lambda module, args, out: 2 * out)
    after = gated(x)
    assert not torch.allclose(after, before), "a hook registered after initialize must be honoured"
    gated.door = nn.Sequential(nn.Linear(16, 40))  # an adapter put in afterwards
    gated(x)


@pytest.mark.usefixtures("fuser_pretended")
def test_a_wrong_fusion_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = FORMULAS["gelu_tanh"].__class__("gelu_tanh", FORMULAS["gelu_tanh"].meaning, aten=lambda x: F.gelu(x) * 1.001)
    monkeypatch.setitem(FORMULAS, "gelu_tanh", wrong)
    row = activation_row(nn.Sequential(nn.Linear(8, 8), HomemadeGelu()), OFF)
    assert row.outcome == "refused"
    assert "computes something else in float32: output error" in row.reason


def test_what_is_not_faster_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(*args: Any, **kwargs: Any) -> Timing:
        return Timing("float32", "256×4096", 100.0, 99.5, 300.0, 310.0)

    monkeypatch.setattr(probe, "time_pair", slower)
    config = {"kernel_fusion": {"enable": True}}
    row = activation_row(nn.Sequential(nn.Linear(8, 8), HomemadeGelu()), config)
    assert row.outcome == "refused"
    assert "forward 100 → 100 µs, with backward 300 → 310 µs" in row.reason


def test_a_fusion_may_win_in_one_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "time_pair", lambda *a, **k: Timing("float32", "1", 100.0, 150.0, 300.0, 200.0))
    model = nn.Sequential(nn.Linear(8, 8), HomemadeGelu())
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True}})
    settings = model[1]._oslo_fusion_settings
    assert settings["inference"] == frozenset()
    assert settings["training"] == {torch.float32}


def test_measurements_are_made_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = probe.time_calls
    monkeypatch.setattr(probe, "time_calls", lambda *a: (calls.append(a), real(*a))[1])
    model = nn.Sequential(nn.Linear(8, 8), HomemadeGelu(), HomemadeGelu())
    for autotune, expected in (("cached", 2), ("cached", 2), ("full", 4), ("off", 4)):
        oslo_fusion.plan(model, {"kernel_fusion": {"enable": True, "autotune": autotune}})
        assert len(calls) == expected, autotune


def test_meta_parameters_are_left_out() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), HomemadeGelu())
    assert oslo_fusion.plan(model, OFF).proposals == ()
