"""The error function of half-precision GELUs, shortened in compiled graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oslo_fusion.aot import Backend, error_functions
from oslo_fusion.testing import assert_close_to_reference

gpu = pytest.mark.gpu


class Counted(Backend):
    """A backend that knows which error functions and exponentials are left in what it compiled."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []
        super().__init__(passes=[self.graphs.append])

    def count(self) -> list[tuple[int, ...]]:
        targets = [torch.ops.aten.erf.default, torch.ops.aten.exp.default, torch.ops.aten.exp2.default]
        return [tuple(len(g.find_nodes(op="call_function", target=t)) for t in targets) for g in self.graphs]


def results(function: Any, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.float().sin().sum(), x)]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x * 1.0)


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_functions, "_DEVICE", "cpu")


@pytest.mark.usefixtures("on_any_device", "_fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_obey_the_law(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-8, -1e-8, math.inf, 65000.0, -65000.0, *torch.linspace(-12, 12, 4001).tolist()]
    x, backend = torch.tensor(values).to(dtype), Counted()
    compiled = torch.compile(gelu, backend=backend)
    found = zip(results(compiled, x), results(gelu, x), results(gelu, x.double()), strict=True)
    for name, (ours, theirs, exact) in zip(("output", "gradient"), found, strict=True):
        finite = exact.isfinite() & (exact.abs() <= torch.finfo(dtype).max)
        for norm in ("l2", "max"):
            assert_close_to_reference(ours[finite], theirs[finite], exact[finite], name, norm)
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert compiled(torch.tensor([math.nan], dtype=dtype)).isnan().all()
    assert backend.count()[:2] == [(0, 0, 1), (0, 0, 1)], "and the gradient's density is the same power"


@pytest.mark.usefixtures("on_any_device")
def test_the_formula_is_as_close_as_its_source_says() -> None:
    graph = torch.fx.Graph()
    from torch._subclasses.fake_tensor import FakeTensorMode

    u, mode = torch.linspace(-6, 6, 200_001), FakeTensorMode()
    half, single = mode.from_tensor(u.half()), mode.from_tensor(u)
    x = graph.placeholder("x")
    x.meta["val"] = half
    cast = graph.call_function(torch.ops.prims.convert_element_type.default, (x, torch.float32))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (cast, 0.7071067811865476))
    erf = graph.call_function(torch.ops.aten.erf.default, (scaled,))
    for node in (cast, scaled, erf):
        node.meta["val"] = single
    graph.output(erf)
    error_functions.shorten_error_functions(graph)
    module = torch.fx.GraphModule(nn.Module(), graph)
    source = (u * math.sqrt(2)).half()
    exact = torch.erf(source.double() * math.sqrt(0.5))
    assert float((module(source) - exact).abs().max()) < 6e-7


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("function", "dtype"), [(gelu, torch.float32), (lambda x: torch.erf(x.float() * 0.5).to(x.dtype), torch.bfloat16)]
)
def test_others_stay(function: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, of which the last digits count, and error functions that are no GELU's; on a CPU all."""
    backend = Counted()
    torch.compile(gelu, backend=backend)(torch.randn(9, dtype=torch.bfloat16))
    monkeypatch.setattr(error_functions, "_DEVICE", "cpu")
    torch.compile(function, backend=backend)(torch.randn(9, dtype=dtype))
    assert [erfs for erfs, _, _ in backend.count()] == [1, 1]


@gpu
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_obey_the_law_on_a_gpu(dtype: torch.dtype) -> None:
    x = torch.randn(1 << 16, device="cuda", dtype=dtype) * 3
    backend = Counted()
    compiled = torch.compile(gelu, backend=backend)
    found = zip(results(compiled, x), results(gelu, x), results(gelu, x.double()), strict=True)
    for name, triple in zip(("output", "gradient"), found, strict=True):
        for norm in ("l2", "max"):
            assert_close_to_reference(*triple, name, norm)
    assert backend.count()[:2] == [(0, 0, 1), (0, 0, 1)]
