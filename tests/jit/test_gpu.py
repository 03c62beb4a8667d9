"""On a GPU: one kernel where one is promised, real timings in the plan, and whole models under the law in each dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import oslo_fusion
from oslo_fusion.jit.formulas import FORMULAS, GATED, gated_product
from oslo_fusion.testing import assert_close_to_reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODELS = ("gpt2", "bert", "roberta", "t5", "t5-v1_1", "bart", "vit", "opt", "llama")
SCRIPTED = [name for name, formula in FORMULAS.items() if formula.forward is not None]


def kernels(function: Any) -> int:
    """Device kernels of one settled call."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    return sum(e.count for e in events if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_activations_are_one_kernel_each_way(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(512, 768, device="cuda", dtype=dtype)
    dy, leaf = torch.randn_like(x), x.clone().requires_grad_()
    with torch.no_grad():
        assert kernels(lambda: FORMULAS[name](x)) == 1
    assert kernels(lambda: torch.autograd.grad(FORMULAS[name](leaf), leaf, dy)) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(GATED))
def test_gated_products_are_one_kernel_each_way(name: str, dtype: torch.dtype) -> None:
    gate, up, dy = (torch.randn(512, 768, device="cuda", dtype=dtype) for _ in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    with torch.no_grad():
        assert kernels(lambda: gated_product(gate, up, name)) == 1
    assert kernels(lambda: torch.autograd.grad(gated_product(*leaves, name), leaves, dy)) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autotune", ["off", "cached"])
def test_whole_models_obey_the_law(name: str, dtype: torch.dtype, autotune: str, build: Any, inputs: Any) -> None:
    model = build(name, dtype=dtype, device=torch.device("cuda"))
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "autotune": autotune}})
    fused = oslo_fusion.report(model).count("fused")
    if autotune == "off":
        assert (fused > 0) == (name not in ("bart", "vit", "opt")), str(oslo_fusion.report(model))
    for labels in (False, True):
        for m in (model, twin, exact):
            for part in m.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
        given = inputs(model, name, labels=labels)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        results = []
        for m, data in ((model, given), (twin, given), (exact, wide)):
            if not labels:
                for _ in range(3):
                    with torch.no_grad():
                        result = m(**data).logits
                results.append(result)
                continue
            for _ in range(3):
                m.zero_grad()
                m(**data).loss.backward()
        if not labels:
            assert_close_to_reference(*results, name, norm="l2")
    for (path, a), b, c in zip(model.named_parameters(), twin.parameters(), exact.parameters(), strict=True):
        if b.grad is not None:
            assert a.grad is not None, path
            assert_close_to_reference(a.grad, b.grad, c.grad, f"{name} {path}", norm="l2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpt2_full_size_fuses_what_pays(dtype: torch.dtype, build: Any) -> None:
    model = build("gpt2", dtype=dtype, device=torch.device("cuda"), size="full")
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True}})
    report = oslo_fusion.report(model)
    assert report.count("fused", "output projection") == 1, str(report)
    assert report.count("fused", "activation") + report.count("fused", "linear + activation") == 12, str(report)
    ids = torch.randint(0, 50257, (256, 16), device="cuda")
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.is_contiguous()
    assert logits.shape == (256, 16, 50257)


@pytest.mark.parametrize("name", ["gpt2", "t5-v1_1", "llama", "bert"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_training_obeys_the_law(name: str, half: torch.dtype, build: Any, inputs: Any) -> None:
    model = build(name, device=torch.device("cuda"))
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "autotune": "off"}})
    given = inputs(model, name, labels=True)
    for _ in range(3):
        for m in (model, twin):
            m.zero_grad()
            with torch.autocast("cuda", dtype=half):
                m(**given).loss.backward()
    exact(**given).loss.backward()
    for (path, a), b, c in zip(model.named_parameters(), twin.parameters(), exact.parameters(), strict=True):
        if b.grad is not None:
            assert a.grad is not None, path
            assert_close_to_reference(a.grad, b.grad, c.grad, f"{name} {path}", norm="l2")


def test_torch_compile_takes_an_initialized_model(build: Any, inputs: Any) -> None:
    model = build("llama", device=torch.device("cuda"))
    given = inputs(model, "llama")
    with torch.no_grad():
        expected = model(**given).logits
        oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "autotune": "off"}})
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(**given).logits, expected, rtol=1e-3, atol=1e-3)


def test_greedy_tokens_are_hugging_faces(build: Any) -> None:
    for name in ("gpt2", "t5-v1_1", "llama"):
        model = build(name, device=torch.device("cuda"))
        ids = torch.randint(3, 500, (2, 6), device="cuda")
        arguments = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        before = model.generate(ids, **arguments)
        oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "autotune": "off"}})
        assert torch.equal(model.generate(ids, **arguments), before)
