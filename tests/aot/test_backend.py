"""The Dynamo backend by itself: by name, with passes, with one's own kernels in place of patterns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import oslo_fusion
from oslo_fusion import ConfigError
from oslo_fusion.aot import Backend, Replacement
from oslo_fusion.aot.backend import dynamo_backend

calls: list[str] = []


@torch.library.custom_op("oslo_fusion_test::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor) -> Tensor:
    calls.append("forward")
    return F.silu(gate) * up


@torch.library.custom_op("oslo_fusion_test::gated_backward", mutates_args=())
def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    calls.append("backward")
    sigmoid = torch.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * F.silu(gate)


@gated.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@gated_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


gated.register_autograd(
    lambda ctx, grad: gated_backward(grad.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


GATED = Replacement(pattern=plain, kernel=lambda gate, up: gated(gate, up), example=(torch.randn(4, 8), torch.randn(4, 8)))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_kernel_of_ones_own_replaces_a_pattern_forward_and_backward() -> None:
    model = GatedMLP()
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    calls.clear()
    compiled = torch.compile(model, backend=Backend(replacements=[GATED], compiler="eager"))
    compiled(x).square().sum().backward()
    assert calls == ["forward", "backward"]
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    with torch.no_grad():
        compiled(x)
    assert calls == ["forward", "backward", "forward"], "without gradients too"
    torch.compile(GatedMLP(), backend=Backend(compiler="eager"))(x)
    assert len(calls) == 3, "another backend has nothing of it"


@torch.library.custom_op("oslo_fusion_test::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    calls.append("forward")
    return F.gelu(x, approximate="tanh")


@torch.library.custom_op("oslo_fusion_test::gelu_backward", mutates_args=())
def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    calls.append("backward")
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


gelu.register_fake(torch.empty_like)
gelu_backward.register_fake(lambda grad, x: torch.empty_like(x))
gelu.register_autograd(
    lambda ctx, grad: gelu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_a_pattern_whose_gradient_uses_a_result_of_its_own() -> None:
    """As that of a tanh does. GPT-2's activation has one in the middle."""
    from transformers.activations import NewGELUActivation

    act = NewGELUActivation()
    replacement = Replacement(pattern=lambda x: act(x), kernel=lambda x: gelu(x), example=(torch.randn(2, 3, 4),))
    x = torch.randn(3, 5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(act(x).square().sum(), x)
    compiled = torch.compile(lambda x: act(x), backend=Backend(replacements=[replacement], compiler="eager"))
    calls.clear()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(gradient, expected)
    result = torch.compile(lambda x: x.tanh(), backend=Backend(replacements=[replacement], compiler="eager"))(x)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], 1 - x.tanh().square())


def test_replacements_by_name_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from oslo_fusion.aot import room

    monkeypatch.setattr(room, "COMPILER", "eager")
    monkeypatch.setitem(sys.modules, "kernels_of_a_user", sys.modules[__name__])
    block = {"replacements": ["kernels_of_a_user:GATED"]}
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block}}
    model = nn.Module()
    model.layers = nn.ModuleList([GatedMLP(), GatedMLP()])
    oslo_fusion.initialize(model, config)
    calls.clear()
    model.layers[1](torch.randn(3, 6)).sum().backward()
    assert calls == ["forward", "backward"]
    for name, says in (("kernels_of_a_user:plain", "is function"), ("kernels_of_a_user:nothing", "cannot be imported")):
        block["replacements"] = [name]
        with pytest.raises(ConfigError, match=says):
            oslo_fusion.plan(model, config)


def test_passes_see_aten_and_our_operators() -> None:
    from oslo_fusion.ops.rms_norm import rms_norm

    seen: list[set[str]] = []

    def look(graph: fx.Graph) -> None:
        seen.append({str(node.target) for node in graph.nodes if node.op == "call_function"})

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, eps=1e-6).sin()

    x, weight = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    backend = Backend(passes=[look])
    torch.compile(function, backend=backend)(x, weight).sum().backward()
    names = set().union(*seen)
    assert any(name.startswith("oslo_fusion.") for name in names), names
    assert any(name.startswith("aten.sin") for name in names), names
    assert len(seen) == 2, "forward and backward"
    assert len(backend.record.graphs) == 1


def test_options_are_checked() -> None:
    graph = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ConfigError, match="options: received budget"):
        dynamo_backend(graph, [torch.ones(2)], options={"budget": 1})
    with pytest.raises(ConfigError, match="activation_memory_budget: received 2"):
        dynamo_backend(graph, [torch.ones(2)], options={"activation_memory_budget": 2})
    with pytest.raises(ConfigError, match="compiler: received 'ptx'"):
        Backend(compiler="ptx")


def test_the_backend_has_a_name(tmp_path: Path) -> None:
    """As after an installation: torch finds it through the entry point that pyproject.toml declares."""
    root = Path(oslo_fusion.__file__).parent.parent
    declared = root.joinpath("pyproject.toml").read_text(encoding="utf-8")
    section = declared.split("[project.entry-points.torch_dynamo_backends]\n")[1].split("\n\n")[0].replace('"', "")
    info = tmp_path / "oslo_fusion_test-1.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: oslo_fusion_test\nVersion: 1\n", encoding="utf-8")
    info.joinpath("entry_points.txt").write_text(f"[torch_dynamo_backends]\n{section}\n", encoding="utf-8")
    code = (
        "import torch\n"
        "f = torch.compile(lambda x: (x.sin() * 2).sum(), backend='oslo_fusion', options={'activation_memory_budget': 0.5})\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "f(x).backward()\n"
        "torch.testing.assert_close(x.grad, 2 * x.detach().cos())\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(root)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths}, timeout=120)
