"""memory_efficient_fusion on whole models: the same loss and gradients, one compilation for all layers, nothing lost."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import oslo_fusion
from oslo_fusion import models, surgery
from oslo_fusion.aot.record import Record
from oslo_fusion.kernels.norm_sites import FusedNorm
from oslo_fusion.testing import assert_close_to_reference

LAYERS = {"gpt2": 2, "llama": 2, "bert": 2, "t5": 4}
KINDS = {"gpt2": 1, "llama": 1, "bert": 1, "t5": 4}  # T5's first layers compute the position bias for all


def config(block: object = True, **more: Any) -> dict[str, Any]:
    return {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": block, **more}}


def step(model: nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: nn.Module, theirs: nn.Module, given: dict[str, Any]) -> None:
    """Loss and every gradient under the law, against float64."""
    exact = copy.deepcopy(theirs).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    (a, mine), (b, plain), (c, truth) = step(ours, given), step(theirs, given), step(exact, wide)
    # A loss is one number, and its error in float32 a matter of luck: a few ulps are allowed.
    assert abs(float(a - c)) <= 2 * abs(float(b - c)) + 8 * torch.finfo(b.dtype).eps * abs(float(c))
    assert mine.keys() == plain.keys() == truth.keys()
    whole = float(torch.stack([g.norm() for g in truth.values()]).norm())
    for name, reference in truth.items():
        if float((plain[name] - reference).norm()) >= float(reference.norm()):  # zero but for rounding
            assert float((mine[name] - reference).norm()) <= 1e-5 * whole, name
            continue
        assert_close_to_reference(mine[name], plain[name], reference, name, norm="l2")


def record(model: nn.Module) -> Record:
    found = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if row.room == "aot")
    assert isinstance(found, Record)
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", LAYERS)
def test_every_gradient_is_the_same(name: str, build: Any, inputs: Any) -> None:
    model, twin = build(name), build(name)
    keys, cls = list(model.state_dict()), type(model)
    assert oslo_fusion.initialize(model, config()) is model
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    assert oslo_fusion.report(model).count("fused", "repeated layer") == LAYERS[name]
    assert_same_step(model, twin, inputs(model, name, labels=True))
    found = record(model)
    assert (len(found.graphs), found.breaks, found.recompiles) == (KINDS[name], (), 0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_whole_forward_too(name: str, fused: Any, build: Any, inputs: Any) -> None:
    model = fused(name, {"scope": "model"})
    assert_same_step(model, build(name), inputs(model, name, labels=True))
    assert record(model).graphs


@pytest.mark.parametrize("budget", [1, 0])
def test_with_code_from_inductor(budget: float, fused: Any, build: Any, inputs: Any) -> None:
    model = fused("llama", {"activation_memory_budget": budget})
    assert_same_step(model, build("llama"), inputs(model, "llama", labels=True))
    assert len(record(model).graphs) == 1


@pytest.mark.usefixtures("quick")
def test_twelve_layers_are_compiled_once_per_mode_and_shape() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=12, vocab_size=32, n_positions=64))
    oslo_fusion.initialize(model.train(), config())
    ids = torch.randint(3, 30, (2, 9))
    step(model, {"input_ids": ids, "labels": ids})
    assert len(record(model).graphs) == 1
    step(model, {"input_ids": ids, "labels": ids})
    assert len(record(model).graphs) == 1
    step(model.eval(), {"input_ids": ids, "labels": ids})
    step(model.train(), {"input_ids": ids, "labels": ids})
    assert len(record(model).graphs) == 2, "one for training, one for evaluation"
    for shape in ((3, 12), (4, 7), (5, 31)):  # the second shape makes batch and length dynamic, once for all
        ids = torch.randint(3, 30, shape)
        step(model, {"input_ids": ids, "labels": ids})
    assert len(record(model).graphs) == 3
    assert record(model).recompiles == 1
    assert "size mismatch" in record(model).graphs[-1].reason


def test_dropout_is_random_in_training_and_off_in_evaluation(fused: Any, build: Any, inputs: Any) -> None:
    model = fused("bert")
    given = inputs(model, "bert", labels=True)
    with torch.no_grad():
        expected = build("bert")(**given).logits
        torch.testing.assert_close(model(**given).logits, expected)
        model.train()
        first, second = model(**given).logits, model(**given).logits
        torch.manual_seed(7)
        third = model(**given).logits
        torch.manual_seed(7)
        assert torch.equal(model(**given).logits, third)
        assert not torch.equal(first, second)
        model.eval()
        torch.testing.assert_close(model(**given).logits, expected)
    assert len(record(model).graphs) == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, fused: Any, build: Any, inputs: Any) -> None:
    model, twin = fused("gpt2"), build("gpt2")
    from oslo_fusion.workload import switch_off_dropout

    for m in (switch_off_dropout(model), switch_off_dropout(twin)):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        m.train()
    given = inputs(model, "gpt2", labels=True)
    assert_same_step(model, twin, given)
    assert all(graph.version == 0 for graph in record(model).graphs)


@pytest.mark.usefixtures("quick")
def test_a_cache_is_filled_in_training_and_gradients_flow_through_it(build: Any) -> None:
    for name in ("gpt2", "llama", "t5"):
        results = []
        for model in (oslo_fusion.initialize(build(name).double(), config()), build(name).double()):
            ids = torch.arange(3, 15).reshape(2, 6)
            inputs = {"input_ids": ids} if name != "t5" else {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
            past = model(**inputs, use_cache=True).past_key_values
            assert past.get_seq_length() == (4 if name == "t5" else 6)
            more = {"decoder_input_ids": ids[:, 4:5]} if name == "t5" else {}
            logits = model(**{"input_ids": ids if more else ids[:, :1], **more}, past_key_values=past).logits
            logits.square().sum().backward()
            results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
        (ours, mine), (theirs, plain) = results
        torch.testing.assert_close(ours, theirs)
        for key, gradient in plain.items():
            if gradient is not None:
                torch.testing.assert_close(mine[key], gradient)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "scope"), [("t5", "layer"), ("gpt2", "model")])
def test_generate_is_untouched_also_between_training_steps(name: str, scope: str, fused: Any, build: Any, inputs: Any) -> None:
    model, plain = fused(name, {"scope": scope}), build(name)
    ids = torch.randint(3, 500, (2, 6))
    arguments = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    before = plain.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, **arguments), before)
    assert not record(model).graphs
    step(model.train(), inputs(model, name, labels=True))
    trained = len(record(model).graphs)
    assert trained > 0
    assert torch.equal(model.eval().generate(ids, **arguments), before)
    assert len(record(model).graphs) == trained


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "scope"), [("gpt2", "layer"), ("bert", "model")])
def test_copies_pickles_and_restore(name: str, scope: str, build: Any, inputs: Any, tmp_path: Path) -> None:
    model = build(name)
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    oslo_fusion.initialize(model, config({"scope": scope}))
    given = inputs(model, name, labels=True)
    loss, gradients = step(model, given)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.save_pretrained(tmp_path)
    for other in (copied, loaded):
        assert record(other) is not record(model)
        assert str(oslo_fusion.report(other)) == str(oslo_fusion.report(model))
        again, theirs = step(other, given)
        assert torch.equal(again, loss)
        assert all(torch.equal(theirs[path], gradient) for path, gradient in gradients.items())
        assert len(record(other).graphs) > len(record(model).graphs), "a copy compiles for itself"
    reread = type(model).from_pretrained(tmp_path)
    assert not any(surgery.is_fused(m) for m in reread.modules())
    model.zero_grad(set_to_none=True)
    oslo_fusion.restore(model)
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before


@pytest.mark.usefixtures("quick")
def test_two_models_have_their_own_budget_and_record(build: Any, inputs: Any) -> None:
    from torch._functorch import config as functorch

    given = None
    kept = {}
    for budget in (1.0, 0.0):
        model = oslo_fusion.initialize(build("gpt2"), config({"activation_memory_budget": budget}))
        given = inputs(model, "gpt2", labels=True)
        kept[budget] = (model, saved_bytes(model, given))
        assert functorch.activation_memory_budget == 1.0, "the process's own setting was left changed"
    assert kept[0.0][1] < 0.5 * kept[1.0][1]
    for model, size in kept.values():  # each still has its own after the other was compiled
        assert saved_bytes(model, given) == size
        assert len(record(model).graphs) == 1
    plain = build("gpt2")
    step(plain, given)
    assert len(record(kept[1.0][0]).graphs) == 1


def saved_bytes(model: nn.Module, given: dict[str, Any]) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**given, use_cache=False).loss
    total = sum(seen.values())
    loss.backward()
    return total


@pytest.mark.usefixtures("quick")
def test_autocast_accumulation_hidden_states_and_masks(build: Any, inputs: Any) -> None:
    model, plain = oslo_fusion.initialize(build("gpt2").double(), config()), build("gpt2").double()
    given = inputs(model, "gpt2", labels=True)
    losses = []
    for m in (model, plain):
        for _ in range(2):  # two micro-batches into one gradient
            m(**given).loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(**given, output_hidden_states=True, output_attentions=False)
        losses.append((out, {n: p.grad for n, p in m.named_parameters()}))
    (ours, mine), (theirs, other) = losses
    assert ours.logits.dtype == theirs.logits.dtype
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=2e-2, atol=2e-2)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient)
    mask = torch.ones_like(given["input_ids"])
    mask[0, :3] = 0
    torch.testing.assert_close(model(**given, attention_mask=mask).loss, plain(**given, attention_mask=mask).loss)


@pytest.mark.usefixtures("quick")
def test_hooks_are_called(fused: Any, inputs: Any) -> None:
    model = fused("gpt2")
    given = inputs(model, "gpt2", labels=True)
    step(model, given)  # compiled before there is a hook
    calls = []
    model.transformer.h[1].register_forward_hook(lambda *a: calls.append("layer"))
    handle = model.transformer.h[1].mlp.act.register_forward_hook(lambda *a: calls.append("inside"))
    step(model, given)
    assert calls == ["inside", "layer"]
    assert "hook" in str(oslo_fusion.report(model))
    handle.remove()
    step(model, given)
    assert calls == ["inside", "layer", "layer"]
    model.config._attn_implementation = "eager"
    attentions = model(**given, output_attentions=True).attentions
    assert len(attentions) == 2
    assert attentions[0].shape == (2, 4, 9, 9)
    assert model(**given).attentions is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_evaluation_is_compiled_and_its_cache_can_be_gone_on_with(scope: str, fused: Any, build: Any) -> None:
    ids, results = torch.arange(3, 15).reshape(2, 6), []
    for model in (fused("gpt2", {"scope": scope}), build("gpt2")):
        with torch.no_grad():
            first = model(ids)
            second = model(ids[:, :1], past_key_values=first.past_key_values)
        results.append((first.logits, second.logits))
        if not results[1:]:
            assert len(record(model).graphs) == 1
    torch.testing.assert_close(*results)


class Broken(nn.Module):
    """A layer that no graph can hold whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if x.sum().item() > 1e9:
            x = -x
        print(end="")
        return torch.relu(self.b(x)) + x


class Stack(nn.Module):
    """Nobody's model."""

    def __init__(self, layer: type[nn.Module], count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([layer() for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.usefixtures("quick")
def test_a_model_that_breaks_the_graph_trains_all_the_same_and_says_where() -> None:
    model = Stack(Broken)
    twin = copy.deepcopy(model)
    oslo_fusion.initialize(model, config())
    x = torch.randn(4, 8)
    for m in (model, twin):
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    rows = [row for row in oslo_fusion.report(model).rows if row.site.kind == "graph break"]
    assert rows
    assert any("test_models.py" in row.site.path and "item()" in row.reason for row in rows), [r.reason for r in rows]
    assert all(row.outcome == "refused" for row in rows)
    assert len(record(model).graphs) <= 5, "the parts are compiled for all layers, once more where the input has no gradient"
    assert "graph break" in str(oslo_fusion.report(model))


class Indexed(nn.Module):
    """A layer whose number is part of what it computes: each needs a version of its own."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.number = Indexed.count
        Indexed.count += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * (self.number + 1)


@pytest.mark.usefixtures("quick")
def test_too_many_versions_are_a_row() -> None:
    Indexed.count = 0
    model = oslo_fusion.initialize(Stack(Indexed, 10), config())
    x = torch.randn(2, 4)
    expected = copy.deepcopy(oslo_fusion.restore(copy.deepcopy(model)))(x)
    torch.testing.assert_close(model(x), expected)
    assert len(record(model).graphs) == 8
    rows = [row for row in oslo_fusion.report(model).rows if row.site.kind == "recompiles"]
    assert len(rows) == 1
    assert "number" in rows[0].reason


@pytest.mark.usefixtures("quick")
def test_a_failing_compiler_costs_speed_only(fused: Any, build: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from oslo_fusion.aot.backend import Backend

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no code for this")

    monkeypatch.setattr(Backend, "__call__", fail)
    model = fused("gpt2")
    assert_same_step(model, build("gpt2"), inputs(model, "gpt2", labels=True))
    rows = [row for row in oslo_fusion.report(model).rows if row.site.kind == "not compiled"]
    assert [row.reason for row in rows] == ["the compiler failed, so it runs as it is: NotImplementedError: no code for this"]


@pytest.mark.usefixtures("quick")
def test_plan_compiles_nothing_and_replaces_torchscript_inside(build: Any) -> None:
    model = build("gpt2")
    plan = oslo_fusion.plan(model, config())
    assert {(row.room, row.outcome) for row in plan.proposals} == {("aot", "fused"), ("jit", "off")}
    assert not any(row.runtime.graphs for row in plan.proposals if row.runtime is not None)
    assert "compiled at the first step" in str(plan)
    plain = nn.Sequential(nn.Linear(4, 4))
    assert oslo_fusion.plan(plain, config()).proposals[0].outcome == "refused"
    assert oslo_fusion.plan(plain, config({"scope": "model"})).count("fused", "whole forward") == 1


@pytest.mark.usefixtures("quick")
def test_custom_kernels_combine(build: Any, inputs: Any) -> None:
    model = build("llama")
    oslo_fusion.initialize(model, config(custom_cuda_kernels="all"))
    assert oslo_fusion.report(model).count("fused", "repeated layer") == 2
    for layer in model.model.layers:  # where no norm kernel is taken on this CPU: put the donors there that a GPU would get
        if not surgery.is_fused(layer.input_layernorm):
            surgery.swap(layer.input_layernorm, FusedNorm, {})
    assert_same_step(model, build("llama"), inputs(model, "llama", labels=True))
    assert (len(record(model).graphs), record(model).breaks) == (1, ())


@pytest.mark.usefixtures("quick")
def test_verify_proves_each_kind_of_layer(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = oslo_fusion.initialize(build("t5"), config(verify=True))
    assert oslo_fusion.report(model).count("fused", "repeated layer") == 4
    assert len(record(model).graphs) >= KINDS["t5"]

    from oslo_fusion.aot.layer import CompiledLayer

    real = CompiledLayer.forward

    def wrong(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(CompiledLayer, "forward", wrong)
    plan = oslo_fusion.plan(build("gpt2"), config(verify=True))
    assert plan.count("refused", "repeated layer") == 2
    assert "computes something else: output" in plan.proposals[0].reason


@pytest.mark.usefixtures("quick")
def test_the_users_own_compile_and_flop_counter_see_the_original(fused: Any, inputs: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = fused("gpt2")
    given = inputs(model, "gpt2")
    with FlopCounterMode(display=False) as counter:
        model(**given)
    assert counter.get_total_flops() > 0
    torch.compile(model, backend="aot_eager", fullgraph=True)(**given, use_cache=False)
    assert not record(model).graphs


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_trainer(fused: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = fused("gpt2")
    data = [{"input_ids": torch.randint(3, 500, (8,)), "labels": torch.randint(3, 500, (8,))} for _ in range(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True, logging_steps=1
    )
    Trainer(model, arguments, train_dataset=data).train()
    assert record(model).graphs
    again = Trainer(fused("gpt2"), arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.usefixtures("quick")
def test_lora(fused: Any, build: Any, inputs: Any) -> None:
    from peft import LoraConfig, get_peft_model

    results = []
    for model in (fused("llama"), build("llama")):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
        results.append(step(wrapped, inputs(model, "llama", labels=True)))
    (loss, mine), (expected, plain) = results
    torch.testing.assert_close(loss, expected)
    assert mine.keys() == plain.keys()
    assert len(mine) == 8
    for name, gradient in plain.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("budget", [1, 0.3])
def test_on_a_gpu(name: str, budget: float, inputs: Any) -> None:
    from oslo_fusion.workload import Workload, run_check

    load = Workload(name, 4, 32, "training", "bfloat16", "cuda", size="tiny")
    run_check(load, config({"activation_memory_budget": budget}))
    model = models.build_model(name, dtype="bfloat16", device="cuda", size="tiny").train()
    oslo_fusion.initialize(model, config({"activation_memory_budget": budget}, custom_cuda_kernels="all"))
    step(model, inputs(model, name, labels=True))
    assert record(model).graphs
    assert not record(model).breaks
