"""Head and loss of language models: found, proven on the model's own code, and whole models under the law."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion import probe, rehearsal, surgery
from oslo_fusion.aot import room as aot_room
from oslo_fusion.config import FusionConfig
from oslo_fusion.environment import environment
from oslo_fusion.kernels import LossPass, deferred, loss_sites
from oslo_fusion.kernels.deferred import DeferredLogits, Frame, FusedForward, PlainReplica, defer, framed
from oslo_fusion.plan import Proposal, Timing
from oslo_fusion.testing import assert_close_to_reference

WISH = FusionConfig(enable=True, custom_cuda_kernels=("FusedLinearCrossEntropy",), autotune="off")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 5.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}
RECIPES = ("gpt2", "t5", "t5-v1_1", "bart", "bert", "roberta", "opt")
NAMES = (*CAUSAL, *RECIPES)


def language_model(name: str, build: Any, **changes: Any) -> nn.Module:
    """A tiny model in training mode without dropout, with biases and norms that are not at their neutral values."""
    if name in CAUSAL:
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **CAUSAL[name], **changes})
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    else:
        model = build(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(part, attribute, None), float):
                setattr(part, attribute, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for name_, buffer in model.named_buffers():
            if name_.endswith("final_logits_bias"):
                buffer += torch.randn_like(buffer)
    return model.train()


def batch(model: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(3, vocab, (2, 9), generator=generator) for _ in range(2))
    labels[0, 2:5] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def rows(model: nn.Module, config: FusionConfig = WISH) -> list[Proposal]:
    return list(LossPass().propose(model, config, environment()))


def fuse(model: nn.Module) -> list[Proposal]:
    proposals = rows(model)
    surgery.apply(model, [swap for proposal in proposals for swap in proposal.swaps])
    return proposals


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operator's reference runs, so its place in a model can be tested."""
    monkeypatch.setattr(loss_sites, "choices", lambda *where: {"auto": "triton"})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every fused loss that is computed."""
    calls: list[dict[str, Any]] = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return real(*args, **kwargs)

    real = deferred.linear_cross_entropy
    monkeypatch.setattr(deferred, "linear_cross_entropy", count)
    return calls


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_models_obey_the_law(name: str, dtype: torch.dtype, build: Any, counted: list[Any]) -> None:
    _whole_model(language_model(name, build).to(dtype), counted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_models_obey_the_law_on_a_gpu(name: str, dtype: torch.dtype, build: Any, counted: list[Any]) -> None:
    _whole_model(language_model(name, build).to("cuda", dtype), counted)


def _whole_model(model: Any, counted: list[Any]) -> None:
    twin, exact, classes = copy.deepcopy(model), copy.deepcopy(model).double(), [type(m) for m in model.modules()]
    state, signature = copy.deepcopy(model.state_dict()), inspect.signature(model.forward)
    random = torch.get_rng_state()
    proposals = fuse(model)
    assert [p.outcome for p in proposals] == ["fused"], proposals[0].reason
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == state.keys()
    assert inspect.signature(model.forward) == signature
    assert isinstance(model.forward, FusedForward)
    counted.clear()
    given, results = batch(model), []
    for m in (model, twin, exact):
        output = m(**given)
        output.loss.backward()
        results.append((output, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    assert len(counted) == 1
    assert results[0][0].logits is None
    assert type(results[0][0]) is type(results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert results[0][0].loss.dtype == results[1][0].loss.dtype
    ulp = torch.finfo(next(model.parameters()).dtype).eps
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss, rtol=4 * ulp, atol=0)
    ours, theirs, truth = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in results)
    assert_close_to_reference(ours, theirs, truth, "gradients", "l2")
    # Logits whenever they are asked for, and the original's code wherever the loss is not being trained on.
    assert torch.equal(model(**given, skip_logits=False).logits, twin(**given).logits)
    assert torch.equal(model(**given, return_dict=False)[1], twin(**given, return_dict=False)[1])
    with torch.no_grad():
        assert torch.equal(model(**given).logits, twin(**given).logits)
    model.eval()
    twin.eval()
    assert torch.equal(model(**given).logits, twin(**given).logits)
    assert torch.equal(model(**given).loss, twin(**given).loss)
    assert len(counted) == 1
    assert model(**given, skip_logits=True).logits is None
    surgery.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(model(**given).logits, twin(**given).logits)


@pytest.mark.usefixtures("kernels_pretended")
def test_what_the_trainer_passes(build: Any, counted: list[Any]) -> None:
    for name in ("Gemma2", "gpt2"):
        model = language_model(name, build)
        twin, given = copy.deepcopy(model), batch(model)
        fuse(model)
        counted.clear()
        for number in (torch.tensor(23), 23):
            ours, theirs = (m(**given, num_items_in_batch=number).loss for m in (model, twin))
            torch.testing.assert_close(ours, theirs)
        shifted = F.pad(given["labels"], (0, 1), value=-100)[..., 1:].contiguous()
        ours, theirs = (m(**given, shift_labels=shifted).loss for m in (model, twin))
        torch.testing.assert_close(ours, theirs)
        none = {**given, "labels": torch.full_like(given["labels"], -100)}
        assert model(**none).loss.isnan()
        assert len(counted) == 4
        assert {call["logit_softcap"] for call in counted} == {5.0 if name == "Gemma2" else None}


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, build: Any, counted: list[Any]) -> None:
    for name in ("Llama", "t5", "bert"):
        model = language_model(name, build)
        twin, given = copy.deepcopy(model), batch(model)
        fuse(model)
        counted.clear()
        losses = []
        for m in (model, twin):
            with torch.autocast("cpu", dtype=dtype):
                losses.append(m(**given).loss)
        assert len(counted) == 1
        assert losses[0].dtype == losses[1].dtype == torch.float32
        torch.testing.assert_close(losses[0], losses[1], rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.usefixtures("kernels_pretended")
def test_masked_models_leave_unmasked_rows_out(build: Any) -> None:
    (masked,), (causal,) = rows(language_model("bert", build)), rows(language_model("gpt2", build))
    assert [p.swaps[0].settings["compact"] for p in (masked, causal)] == [True, False]
    assert "labelled ones only" in masked.after


class _Odd(transformers.LlamaForCausalLM):
    """Llama with something else between head and loss."""

    way = ""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        logits = output.logits
        if self.way == "z-loss":
            output.loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + logits.logsumexp(-1).mean()
        elif self.way == "clamped":
            output.loss = F.cross_entropy(logits.flatten(0, 1).clamp(-0.1, 0.1), labels.flatten())
        elif self.way == "own gradient":
            output.loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * 0.5
        elif self.way == "no loss":
            output.loss = None
        return output


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("z-loss", None),
        ("own gradient", None),
        ("clamped", "does more with its logits than cross entropy of them"),
        ("no loss", "gives no loss through its head"),
    ],
)
def test_other_losses(way: str, reason: str | None) -> None:
    model = _Odd(transformers.LlamaConfig(**SMALL)).train()
    model.way = way
    twin = copy.deepcopy(model)
    (row,) = fuse(model)
    if reason is not None:
        assert row.outcome == "refused"
        assert reason in row.reason
        return
    assert row.outcome == "fused", row.reason
    given, results = batch(model), []
    for m in (model, twin):
        output = m(**given)
        output.loss.backward()
        results.append((output, m.lm_head.weight.grad))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][1], results[1][1])
    if way == "z-loss":  # needed them anyway, so they are there
        assert torch.equal(results[0][0].logits, results[1][0].logits)
    else:
        assert results[0][0].logits is None


@pytest.mark.usefixtures("kernels_pretended")
def test_a_wrong_loss_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = deferred.linear_cross_entropy

    def without_cap(*args: Any, **kwargs: Any) -> Tensor:
        return real(*args, **{**kwargs, "logit_softcap": None})

    monkeypatch.setattr(deferred, "linear_cross_entropy", without_cap)
    (row,) = rows(language_model("Gemma2", build, final_logit_softcapping=0.2))
    assert row.outcome == "refused"
    assert "computes something else: loss error" in row.reason


def test_names_and_refusals(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = language_model("Llama", build)
    assert rows(llama, FusionConfig(enable=True)) == []
    (row,) = rows(llama, FusionConfig(custom_cuda_kernels=("FusedLinearCrossEntropy",)))
    assert (row.outcome, row.reason) == ("off", "enable is false")
    reason = "no kernel on the CPU: the extension has none for linear_cross_entropy"
    assert [(p.outcome, p.reason) for p in rows(llama)] == [("refused", reason)]
    (row,) = rows(build("vit"))
    assert row.reason == "no part of this ViTForImageClassification takes labels and has a linear head"
    monkeypatch.setattr(loss_sites, "choices", lambda *where: {"auto": "triton"})
    assert rows(copy.deepcopy(llama).double())[0].reason == "no kernel for weights of float64"
    with torch.device("meta"):
        assert rows(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))[0].reason.startswith("it has no memory")
    llama.forward = llama.forward
    assert rows(llama)[0].reason == "the model's forward was replaced on the instance"
    (row,) = rows(transformers.BertForPreTraining(transformers.BertConfig(**SMALL)))
    assert row.outcome == "refused"


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("slower", [True, False])
def test_only_what_wins(slower: bool, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    after = 20.0 if slower else 5.0
    monkeypatch.setattr(probe, "time_pair", lambda *a, **k: Timing("float32", "1", 10.0, 1.0, 10.0, after))
    config = FusionConfig(enable=True, custom_cuda_kernels=("all", "FusedLinearCrossEntropy"))
    (row,) = rows(language_model("Llama", build), config)
    assert row.outcome == ("refused" if slower else "fused")
    assert ("not faster here" if slower else "measured") in row.reason
    assert row.timings


@pytest.mark.usefixtures("kernels_pretended")
def test_a_rehearsal_draws_once_and_judges_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], loss_sites._batch
    monkeypatch.setattr(loss_sites, "_batch", lambda *where: (drawn.append(where), draw(*where))[1])
    monkeypatch.setattr(probe, "compare", lambda *_: probe.Comparison(1.0, 0.0, 0.0))
    model = language_model("Llama", build)
    with rehearsal.under(rehearsal.Rehearsal()):
        (row,) = rows(model)
    assert (row.outcome, len(drawn)) == ("fused", 2), "once alone and once under autocast"
    (row,) = rows(model)
    assert row.reason.startswith("computes something else")
    assert len(drawn) == 2 + loss_sites._LOSSES


@pytest.mark.usefixtures("kernels_pretended")
def test_all_does_not_take_the_logits_away(build: Any) -> None:
    assert rows(language_model("Llama", build), FusionConfig(enable=True, custom_cuda_kernels=("all",))) == []


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize(("name", "parts"), [("Llama", ["model"]), ("t5", ["encoder", "decoder"])])
def test_with_the_fused_loss_the_body_is_compiled(
    name: str, parts: list[str], build: Any, counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both want the model's ``forward``: then the compiler gets what is below the head."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    block = {"enable": True, "autotune": "off", "custom_cuda_kernels": ["FusedLinearCrossEntropy"]}
    model = language_model(name, build, num_hidden_layers=2)
    twin, given = copy.deepcopy(model), batch(model)
    model.config.use_cache = twin.config.use_cache = False
    oslo_fusion.initialize(model, {"kernel_fusion": {**block, "memory_efficient_fusion": {"scope": "model"}}})
    rows = [row for row in oslo_fusion.report(model).rows if row.site.kind == "whole forward"]
    assert [(row.site.path, row.outcome) for row in rows] == [(f"{part}.forward", "fused") for part in parts]
    counted.clear()
    for part in (model, twin):
        part(**given).loss.backward()
    assert len(counted) == 1
    graphs = rows[0].runtime.graphs
    assert len(graphs) == len(parts)
    gradients = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-6)
    oslo_fusion.restore(model)
    assert all("forward" not in part.__dict__ for part in model.modules())


def test_what_stands_on_an_instance_says_when_the_instance_is_gone(build: Any) -> None:
    standing = PlainReplica(build("gpt2"), {})  # nobody else holds the model
    gc.collect()
    with pytest.raises(RuntimeError, match=r"PlainReplica: the module that was initialized is gone .*Remedy"):
        standing()


@pytest.mark.usefixtures("kernels_pretended")
def test_with_the_other_rooms_and_generate(build: Any) -> None:
    """GPT-2's head is the site of another room too, for inference; the two stand on it together."""
    model = language_model("gpt2", build)
    twin = copy.deepcopy(model).eval()
    config = {"kernel_fusion": {"enable": True, "autotune": "off", "custom_cuda_kernels": ["all", "FusedLinearCrossEntropy"]}}
    assert oslo_fusion.initialize(model, config) is model
    oslo_fusion.initialize(model, config)
    assert oslo_fusion.report(model).count("fused", loss_sites.KIND) == 1
    given = batch(model)
    assert model(**given).logits is None
    model.eval()
    ids = given["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(model.generate(ids, max_new_tokens=4), twin.generate(ids, max_new_tokens=4))
    oslo_fusion.restore(model)
    assert model.train()(**given).logits is not None


@pytest.mark.usefixtures("kernels_pretended")
def test_copies_and_pickles_are_fused_too(build: Any, counted: list[Any]) -> None:
    model = language_model("Llama", build)
    given = batch(model)
    fuse(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model(**given).loss
    for copied in copies:
        counted.clear()
        with torch.no_grad():
            copied.lm_head.weight.mul_(2.0)
        output = copied(**given)
        assert output.logits is None
        assert len(counted) == 1
        assert not torch.equal(output.loss, expected)
        assert copied.forward.module is copied
    assert torch.equal(model(**given).loss, expected)
    shallow = copies.pop()
    stale = shallow.forward
    del shallow, copied
    with pytest.raises(RuntimeError, match="gone"):
        stale(**given)


@pytest.mark.usefixtures("kernels_pretended")
def test_a_data_parallel_replica_is_unfused(build: Any) -> None:
    model = language_model("Llama", build)
    fuse(model)
    for part in (model, model.lm_head):
        replica = part._replicate_for_data_parallel()
        assert {"forward", "_replicate_for_data_parallel"}.isdisjoint(replica.__dict__)
        assert "forward" in part.__dict__


@pytest.mark.usefixtures("kernels_pretended")
def test_hooks_wrappers_and_the_compiler_get_the_heads_own_logits(build: Any, counted: list[Any]) -> None:
    model = language_model("Llama", build)
    given = batch(model)
    plain = copy.deepcopy(model)(**given)
    fuse(model)
    counted.clear()
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda m, args, y: seen.append(y))
    output = model(**given)
    assert torch.equal(output.logits, plain.logits)
    assert type(seen[0]) is Tensor
    handle.remove()
    assert not counted
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**given).loss, plain.loss)
    assert not counted
    assert model(given["input_ids"], None, None, None, None, given["labels"]).logits is None
    assert len(counted) == 1
    assert model(**given).loss.requires_grad
    assert model(given["input_ids"]).logits.requires_grad


@pytest.mark.usefixtures("kernels_pretended")
def test_inside_ddp(build: Any, counted: list[Any], tmp_path: Any) -> None:
    import torch.distributed as dist

    model = language_model("t5", build)
    twin, given = copy.deepcopy(model), batch(model)
    fuse(model)
    counted.clear()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(**given).loss.backward()
    finally:
        dist.destroy_process_group()
    twin(**given).loss.backward()
    assert len(counted) == 1
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "float": (lambda x: x.float(), True),
    "to": (lambda x: x.to(torch.float64), True),
    "to a device": (lambda x: x.to("cpu"), True),
    "view": (lambda x: x.view(-1, 11), True),
    "flatten": (lambda x: x.flatten(0, 1), True),
    "shifted": (lambda x: x[..., :-1, :].contiguous(), True),
    "sliced": (lambda x: x[:, 1:3, :], True),
    "scaled": (lambda x: 0.5 * x * 3.0, True),
    "divided": (lambda x: x / 4, True),
    "capped": (lambda x: torch.tanh(x / 2.0) * 2.0, True),
    "bias": (lambda x: x + torch.arange(11.0), True),
    "some words": (lambda x: x[..., :5], False),
    "transposed": (lambda x: x.transpose(0, 1), False),
    "viewed across words": (lambda x: x.view(-1, 22), False),
    "tanh twice": (lambda x: x.tanh().tanh(), False),
    "negative cap": (lambda x: x.tanh() * -2.0, True),
    "in place": (lambda x: x.mul_(2.0), False),
    "softmax": (lambda x: x.softmax(-1), False),
    "meta": (lambda x: x.to("meta"), False),
    "other bias": (lambda x: x + torch.ones(3, 11), False),
    "itself": (lambda x: x + x, False),
    "stacked": (lambda x: torch.stack([x, x]), False),
}


@pytest.mark.parametrize("name", list(STEPS))
def test_every_step_means_the_same(name: str) -> None:
    """Deferred or computed on the way, the values, the loss and the gradients are those of the logits."""
    step, stays = STEPS[name]
    torch.manual_seed(0)
    head, x = nn.Linear(4, 11, bias=False), torch.randn(2, 3, 4)
    labels = torch.randint(0, 11, (2, 3))
    frame, results = Frame("defer", False), []
    for is_deferred in (True, False):
        hidden = x.clone().requires_grad_()
        logits = defer(head, hidden, frame) if is_deferred else head(hidden)
        if name == "in place" and not is_deferred:
            logits = logits.clone()
        result = step(logits)
        assert isinstance(result, DeferredLogits) == (is_deferred and stays)
        assert (result.shape, result.dtype, result.device) == (result.size(), result.dtype, result.device)
        values = [deferred.materialized(result)]
        if result.dim() == 3 and result.shape[-1] == 11 and result.device.type == "cpu":
            target = labels[:, : result.shape[1]]
            if target.shape == result.shape[:2]:
                loss = F.cross_entropy(result.reshape(-1, 11), target.reshape(-1))
                values += [loss, *torch.autograd.grad(loss, [hidden, head.weight])]
        results.append(values)
    assert frame.losses == int(stays and name != "negative cap" and len(results[0]) > 1)
    for ours, theirs in zip(*results, strict=True):
        assert type(ours) is Tensor
        if ours.device.type == "cpu":
            torch.testing.assert_close(ours, theirs)


def test_logits_of_weights_that_changed_are_an_error() -> None:
    head = nn.Linear(4, 11)
    logits = defer(head, torch.randn(3, 4), Frame("defer", False))
    with torch.no_grad():
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weight changed"):
        logits.softmax(-1)


def test_a_frame_ends_with_its_forward() -> None:
    with pytest.raises(ValueError, match="stop"), framed(Frame("defer", False)):
        raise ValueError("stop")
    assert deferred.current_frame() is None


@pytest.mark.usefixtures("kernels_pretended")
def test_labels_are_counted_once_the_model_before_the_head_was_launched(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = oslo_fusion.initialize(language_model("bert", build), WISH)
    log: list[str] = []

    class Noting(deferred.LabelCount):
        def __init__(self, labels: Tensor) -> None:
            super().__init__(labels)
            log.append("labels")

        def start(self) -> None:
            log.append("count")
            super().start()

    monkeypatch.setattr(deferred, "_count", Noting)
    model.base_model.register_forward_hook(lambda *_: log.append("model"))
    ids = torch.randint(3, 90, (2, 6))
    loss = model(input_ids=ids, labels=ids).loss
    assert log[:3] == ["labels", "model", "count"]
    monkeypatch.setattr(deferred, "_count", lambda labels: None)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss, rtol=0, atol=0)


@pytest.mark.gpu
def test_labels_that_change_at_every_step_are_counted_right_on_a_gpu(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = oslo_fusion.initialize(language_model("bert", build).to("cuda", torch.bfloat16), WISH)
    ids = torch.randint(3, 90, (8, 32), device="cuda")
    for step in range(50):
        torch.cuda._sleep(1_000_000)
        kept = torch.rand(ids.shape, device="cuda") < (step + 1) / 60
        labels = torch.where(kept, ids, -100)
        loss = model(input_ids=ids, labels=labels).loss
        with monkeypatch.context() as patch:
            patch.setattr(deferred, "_count", lambda labels: None)
            assert torch.equal(model(input_ids=ids, labels=labels).loss, loss)
