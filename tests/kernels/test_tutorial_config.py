"""OSLO's configuration of custom kernels on T5, with and without a GPU: it trains, infers and generates as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import oslo_fusion as oslo
from oslo_fusion.ops.kernels import choices, missing
from oslo_fusion.testing import assert_close_to_reference

BLOCK = {"enable": True, "custom_cuda_kernels": ["FusedNoRepeatNGram", "FusedRMSNorm"], "autotune": "off"}


def _run(device: str, kernel: str, build: Any, inputs: Any) -> None:
    model = build("t5-v1_1", device=torch.device(device))
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:  # norms start as ones, which would hide a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    oslo.initialize(model, {"kernel_fusion": {**BLOCK, "kernel": kernel}})

    by_room = {row.room: [r.outcome for r in oslo.report(model).rows if r.room == row.room] for row in oslo.report(model).rows}
    expected = {room: "fused" if choices(op, device, kernel) else "refused" for room, op in _OPERATIONS.items()}
    for room, outcome in expected.items():
        assert set(by_room[room]) == {outcome}, room
    assert len(by_room["kernels"]) == 12
    assert "fused" in by_room["jit"], "TorchScript fusion goes on beside the kernels"

    given = inputs(model, "t5-v1_1", labels=True)
    results = []
    for m in (model, plain, exact):
        output = m(**given)
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        results.append((output.logits.detach(), gradients))
    for what, tensors in zip(("logits", "gradients"), zip(*results, strict=True), strict=True):
        assert_close_to_reference(*tensors, what, "l2")

    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        tokens = [
            m.generate(input_ids=given["input_ids"], no_repeat_ngram_size=3, max_new_tokens=24, do_sample=False, **options)
            for m in (model, plain)
        ]
        assert torch.equal(*tokens), options
    oslo.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


_OPERATIONS = {"kernels": "rms_norm", "generation": "no_repeat_ngram"}


def test_on_the_cpu(build: Any, inputs: Any) -> None:
    _run("cpu", "auto", build, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "triton", "cuda"])
def test_on_a_gpu(kernel: str, build: Any, inputs: Any) -> None:
    if not choices("rms_norm", "cuda", kernel):
        pytest.skip(missing("rms_norm", "cuda", kernel))
    _run("cuda", kernel, build, inputs)
