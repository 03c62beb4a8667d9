"""Padding-free batches: what is packed, the same outputs, loss and gradients, and what runs as it was."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion import surgery
from oslo_fusion.aot import room as aot_room
from oslo_fusion.kernels import loss_sites, padding_sites
from oslo_fusion.kernels.padding import Batch, Calls, PaddingFreeForward, Queued, pack
from oslo_fusion.kernels.padding_sites import KIND
from oslo_fusion.ops.pack_tokens import COARSE, IGNORED, Form, Tokens, bucket
from oslo_fusion.plan import Proposal
from oslo_fusion.testing import assert_close_to_reference

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROBERTA = {"pad_token_id": 1, "bos_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}

MASKED = {"BertForMaskedLM": {}, "RobertaForMaskedLM": ROBERTA, "ModernBertForMaskedLM": {"local_attention": 12}}
CAUSAL = {
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 6},
    "Qwen2ForCausalLM": {},
    "OPTForCausalLM": OPT,
}
TAGGING = {"BertForTokenClassification": {"num_labels": 5}}
CLASSES = {
    "BertForSequenceClassification": {"num_labels": 3},
    "RobertaForSequenceClassification": {**ROBERTA, "num_labels": 3},
    "GPT2ForSequenceClassification": {**GPT2, "num_labels": 1},
    "DistilBertForSequenceClassification": {**DISTILBERT, "num_labels": 3},
}
BARE = {"BertModel": {}, "T5EncoderModel": T5}
PAIRS = {"T5ForConditionalGeneration": T5}
MODELS: dict[str, dict[str, Any]] = {**MASKED, **CAUSAL, **TAGGING, **CLASSES, **BARE, **PAIRS}

RIGHT = (30, 7, 18, 1)
WISH = {"kernel_fusion": {"enable": True, "autotune": "off", "padding_free": True}}


def make(name: str, **changes: Any) -> Any:
    """A tiny model in training mode without dropout."""
    prefix = next(p for p in ("For", "LMHead", "EncoderModel", "Model") if p in name)
    config = getattr(transformers, f"{name.split(prefix)[0]}Config")(**{**SMALL, **MODELS[name], **changes})
    torch.manual_seed(1)
    model = getattr(transformers, name)(config)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(part, attribute, None), float):
                setattr(part, attribute, 0.0)
    return model.train()


def batch(model: Any, lengths: tuple[int, ...] = RIGHT, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """A ragged batch of random tokens, with labels where the model takes some: whatever counts is predicted from text."""
    generator, columns = torch.Generator().manual_seed(seed), torch.arange(max(lengths))
    sizes, pad = torch.tensor(lengths)[:, None], model.config.pad_token_id
    mask = (columns < sizes if side == "right" else columns >= max(lengths) - sizes).long()
    ids = torch.randint(3, 131, mask.shape, generator=generator).masked_fill(mask == 0, pad)
    given = {"input_ids": ids, "attention_mask": mask}
    name = type(model).__name__
    if name in CLASSES:
        labels = torch.randint(0, 3, (len(lengths),), generator=generator)
        given["labels"] = labels.float() if model.config.num_labels == 1 else labels
    elif name not in BARE:
        classes = 5 if name in TAGGING else 131
        labels = torch.randint(0, classes, mask.shape, generator=generator).masked_fill(mask == 0, IGNORED)
        if side == "left":
            labels[:, 1:][mask[:, 1:] > mask[:, :-1]] = IGNORED
        given["labels"] = labels
    return given


def fuse(model: Any, **more: Any) -> Any:
    fused = oslo_fusion.initialize(model, {"kernel_fusion": {**WISH["kernel_fusion"], **more}})
    rows = [row for row in oslo_fusion.report(fused).plan.proposals if row.site.kind == KIND]
    assert [row.outcome for row in rows] == ["fused"], rows[0].reason
    return fused


def calls(model: nn.Module) -> Calls:
    found = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if isinstance(row.runtime, Calls))
    assert isinstance(found, Calls)
    return found


def step(model: Any, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**given)
    # Without labels the sum of what there is for text, each number with a weight of its own.
    mask = given["attention_mask"].bool()
    weights = torch.linspace(-1, 1, 32, device=mask.device)
    score = output.loss if "labels" in given else (output.last_hidden_state[mask] * weights).sum()
    score.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(grads: dict[str, Tensor], their_grads: dict[str, Tensor], true_grads: dict[str, Tensor]) -> None:
    assert grads.keys() == their_grads.keys() == true_grads.keys()
    whole = float(torch.stack([g.norm() for g in true_grads.values()]).norm())
    # Of all layers' gradients of one name together: the error of a bias of 128 numbers is a matter of luck.
    together: dict[str, list[list[Tensor]]] = {}
    for name in true_grads:
        kept = together.setdefault(re.sub("[0-9]+", "#", name), [[], [], []])
        for column, found in zip(kept, (grads, their_grads, true_grads), strict=True):
            column.append(found[name].flatten())
    for name, columns in together.items():
        mine, their, true = (torch.cat(column) for column in columns)
        if float((their - true).norm()) >= float(true.norm()):  # zero but for rounding
            assert float((mine - true).norm()) <= 80 * torch.finfo(mine.dtype).eps * whole, name
            continue
        assert_close_to_reference(mine, their, true, name, norm="l2")


def assert_same(ours: Any, theirs: Any, given: dict[str, Tensor]) -> Any:
    """Outputs where there is text and all gradients under the law, zeros at padding."""
    exact, mask = copy.deepcopy(theirs).double(), given["attention_mask"].bool()
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    (output, grads), (plain, their_grads), (truth, true_grads) = step(ours, given), step(theirs, given), step(exact, wide)
    assert output.keys() - {"past_key_values"} == plain.keys() - {"past_key_values"}
    for name, value in output.items():
        if name == "loss":
            # One number, and its error a matter of luck: a few units in the last place are allowed.
            mine, their, true = (x.loss.detach().double() for x in (output, plain, truth))
            ulp = torch.finfo(next(theirs.parameters()).dtype).eps * abs(true)
            assert abs(mine - true) <= 2 * abs(their - true) + 8 * ulp
        elif isinstance(value, Tensor):
            rows = value.shape[:2] == mask.shape
            triple = [x[mask] if rows else x for x in (value, plain[name], truth[name])]
            assert_close_to_reference(*triple, name, norm="l2")
            if rows and type(ours).__name__ not in PAIRS and calls(ours).packed:
                assert not value[~mask].any(), f"{name} at padding"
    assert_same_gradients(grads, their_grads, true_grads)
    return output


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_models_obey_the_law(name: str, side: str) -> None:
    model = make(name)
    twin, signature = copy.deepcopy(model), inspect.signature(model.forward)
    fuse(model)
    assert_same(model, twin, batch(model, side=side))
    first_column = name in ("BertForSequenceClassification", "RobertaForSequenceClassification", "BertModel")
    first_column |= name == "DistilBertForSequenceClassification"
    others = [row for row in oslo_fusion.report(model).rows if row.room == "jit"]
    assert not any("compiles it" in row.reason for row in others), "nothing is compiled here"
    if side == "left" and first_column:
        assert list(calls(model).left) == ["padding at the beginning of a row, where this model's output is read"]
    else:
        assert (calls(model).packed, calls(model).left) == (1, {})
        assert (calls(model).tokens, calls(model).computed, calls(model).given) == (56, 64, 120)
    assert inspect.signature(model.forward) == signature
    assert model.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel", "BertForSequenceClassification"])
def test_only_text_is_computed(name: str) -> None:
    """Every linear layer, norm and embedding below the head sees one row of packed tokens; a language model's head too."""
    model, seen = make(name), []
    fuse(model)
    for path, part in model.named_modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm, nn.Embedding)) and "classifier" not in path and "pooler" not in path:
            part.register_forward_hook(lambda _, args, output, path=path: seen.append((path, tuple(output.shape[:2]))))
    model(**batch(model))
    assert len(seen) >= 8  # GPT-2's projections are no linear layers
    assert {shape for _, shape in seen} == {(1, 64)}


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "BertForTokenClassification"])
def test_rows_without_a_token_count_for_nothing(name: str) -> None:
    model = make(name)
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model, (30, 0, 18, 9))
    output, theirs = step(model, given)[0], step(twin, given)[0]
    assert calls(model).packed == 1
    assert torch.allclose(output.loss, theirs.loss)
    assert not output.logits[1].any()


def test_what_is_not_packed_runs_as_it_was_and_is_said() -> None:
    model = make("GPT2LMHeadModel")
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    mask, ids = given["attention_mask"], given["input_ids"]
    stray = given["labels"].clone()
    stray[1, 12] = 5
    hole = mask.clone()
    hole[0, 5] = 0
    labels = given["labels"].masked_fill(hole == 0, IGNORED)
    labels[0, 6] = IGNORED
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids, "labels": given["labels"]}, "no attention_mask"),
        ({**given, "attention_mask": torch.ones_like(mask)}, "a mask without padding"),
        ({**given, "attention_mask": torch.ones_like(mask).index_fill_(1, torch.tensor([29]), 0)}, "next to no padding"),
        ({**given, "labels": stray}, "a label that counts"),
        ({**given, "attention_mask": hole, "labels": labels}, "padding inside of a row"),
        ({**given, "attention_mask": mask[:, None, None, :].bool()}, "that is not one number per token"),
        ({**given, "use_cache": True}, "the argument use_cache"),
        ({**given, "output_attentions": True}, "the argument output_attentions"),
        ({**given, "logits_to_keep": 1, "labels": None}, "the argument logits_to_keep"),
        ({**given, "shift_labels": given["labels"]}, "the argument shift_labels"),
        ({**given, "attention_mask": torch.zeros_like(mask), "labels": torch.full_like(ids, IGNORED)}, "a row without"),
    ]
    for number, (arguments, reason) in enumerate(cases, 1):
        ours, theirs = model(**arguments), twin(**arguments)
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-6), reason
        if ours.loss is not None:
            assert torch.allclose(ours.loss, theirs.loss, equal_nan=True), reason
        assert any(reason in known for known in calls(model).left), (reason, calls(model).left)
        assert sum(calls(model).left.values()) == number
    assert calls(model).packed == 0
    rows = [row.reason for row in oslo_fusion.report(model).rows if row.site.kind == "not packed"]
    assert len(rows) == len(cases)
    assert all(row.endswith("(1 call)") for row in rows)
    with torch.no_grad():
        assert model.eval()(input_ids=ids, attention_mask=mask).past_key_values is not None
        assert model(input_ids=ids, attention_mask=mask, use_cache=False).logits.shape == (4, 30, 131)
    assert calls(model).packed == 1
    reasons = [row.reason for row in oslo_fusion.report(model).rows if row.site.kind == KIND]
    assert reasons == ["1 call packed: 56 tokens in 64 places, 53% of the padded batch"]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_labels_beyond_the_text(name: str) -> None:
    """A label right behind a text belongs to its last token where labels are shifted, and to padding where not."""
    model = make(name)
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    given["labels"][1, 7] = given["labels"][2, 18] = 9
    assert_same(model, twin, given) if name == "GPT2LMHeadModel" else model(**given)
    assert calls(model).packed == (name == "GPT2LMHeadModel")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "LlamaForCausalLM"])
def test_positions_types_and_embeddings_that_are_given(name: str) -> None:
    model = make(name)
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    given["position_ids"] = (torch.arange(30) + 7).expand(4, -1).contiguous()
    if name != "LlamaForCausalLM":
        given["token_type_ids"] = (torch.arange(30) > 4).long().expand(4, -1).contiguous()
    assert_same(model, twin, given)
    embedded = {k: v for k, v in given.items() if k not in ("input_ids", "position_ids")}
    embedded["inputs_embeds"] = torch.randn(4, 30, 32)
    assert_same(model, twin, embedded)
    assert calls(model).packed == 2
    first = model(given["input_ids"], given["attention_mask"])  # by position
    assert calls(model).packed == 3
    assert first.logits.shape == (4, 30, 131)


def test_hidden_states_tuples_and_batches_of_one() -> None:
    model = make("BertForMaskedLM").eval()
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    mask = given["attention_mask"].bool()
    ours, theirs = model(**given, output_hidden_states=True), twin(**given, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.allclose(a[mask], b[mask], atol=1e-5)
    loss, logits = model(**given, return_dict=False)
    assert torch.equal(loss, ours.loss)
    assert torch.equal(logits, ours.logits)
    one = batch(model, (40,))
    with torch.no_grad():
        for more, packed in ((8, 2), (1, 3)):  # 40 tokens want 48 places: with 8 of padding nothing is gained
            one = {name: F.pad(x, (0, more), value=IGNORED if name == "labels" else 0) for name, x in one.items()}
            assert torch.allclose(model(**one).loss, twin(**one).loss)
            assert calls(model).packed == packed


def test_a_batch_of_nothing() -> None:
    model = make("BertForMaskedLM")
    fuse(model)
    given = {name: x[:0] for name, x in batch(model).items()}
    with pytest.raises(RuntimeError, match="of 0 elements"):  # the model's own error
        model(**given)
    assert list(calls(model).left) == ["a batch of nothing"]


def test_buckets() -> None:
    for tokens in (1, 63, 64, 65, 4095, 4096, 18_432, 65_535, 1_000_000):
        length = bucket(tokens)
        assert tokens < length
        assert length % 16 == 0
        assert length - tokens <= max(16, tokens / 64 + 1)
    for low in (1024, 16_384, 32_768):
        assert len({bucket(tokens) for tokens in range(low, 2 * low)}) <= 65
        assert len({bucket(tokens, COARSE) for tokens in range(low, 2 * low)}) <= 17


def test_a_packing_and_its_inverse() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    x = torch.arange(1, 13).view(3, 4)
    queued = Queued(mask, Tokens(labels=x), Form(shifted=True), 4)
    batch = queued.read()
    assert (batch.tokens, batch.longest, batch.texts, batch.begins, batch.pieces, batch.stray) == (5, 3, 2, 1, 2, True)
    packing = pack(queued, batch)
    assert packing.packed(x)[0, :5].tolist() == [1, 2, 10, 11, 12]
    assert torch.equal(packing.padded(packing.packed(x)), x * mask)


def test_what_stands_inside_looks_ahead_before_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told once what it found, in a call that is packed."""
    model, log = make("BertForMaskedLM"), list[str]()
    fuse(model)

    class Looking(surgery.Standing):
        def look_ahead(self) -> str:
            log.append("looks")
            return "found"

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            log.extend(str(surgery.found_ahead(self)) for _ in range(2))
            return type(self.module).forward(self.module, *args, **kwargs)

    def read(self: Queued) -> Batch:
        log.append("waits")
        return own_read(self)

    own_read, model.bert.forward = Queued.read, Looking(model.bert, {})
    monkeypatch.setattr(Queued, "read", read)
    given = batch(model)
    model(**given)
    assert log == ["looks", "waits", "found", "None"]
    log.clear()
    model(**{**given, "attention_mask": torch.ones_like(given["attention_mask"])})
    assert log == ["looks", "waits", "None", "None"]
    assert surgery.found_ahead(model.bert.forward) is None


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("MambaForCausalLM", {"state_size": 4}, "cannot be run on random tokens"),
        ("BertForQuestionAnswering", {}, "its output is neither one per token or text"),
        ("BertForMaskedLM", {"attn_implementation": "eager"}, "attention does not keep packed texts apart"),
        ("BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "computes something else"),
    ],
)
def test_refusals_say_why(name: str, changes: dict[str, Any], reason: str) -> None:
    """No attention; a loss that sees padding; attention that is not told where texts begin; positions that nobody can give."""
    config = getattr(transformers, f"{name.split('For')[0]}Config")(**{**SMALL, **changes})
    (row,) = [row for row in oslo_fusion.plan(getattr(transformers, name)(config), WISH).proposals if row.site.kind == KIND]
    assert row.outcome == "refused"
    assert reason in row.reason


def test_large_models_are_proven_by_their_first_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And refused where the attention of a later one is not done as theirs."""
    monkeypatch.setattr(padding_sites, "_LARGE", 1)
    model = make("LlamaForCausalLM", num_hidden_layers=4)
    fuse(model)
    oslo_fusion.restore(model)
    attention = model.model.layers[3].self_attn
    attention.forward = attention.forward
    (row,) = [row for row in oslo_fusion.plan(model, WISH).proposals if row.site.kind == KIND]
    assert (row.outcome, row.reason) == ("refused", "its attention is not done as in the first layers: model.layers.3")


def test_without_a_model_of_transformers_or_switched_off() -> None:
    def rows(model: nn.Module, **block: Any) -> list[Proposal]:
        planned = oslo_fusion.plan(model, {"kernel_fusion": {"padding_free": True, "autotune": "off", **block}})
        return [row for row in planned.proposals if "padding_free" in row.site.path]

    (row,) = rows(nn.Linear(2, 2), enable=True)
    assert row.outcome == "refused"
    assert "no part of this Linear" in row.reason
    assert [row.outcome for row in rows(make("BertModel"), enable=False)] == ["off"]


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    found: nn.Module = torch.load(buffer, weights_only=False)
    return found


def _pickled(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


@pytest.mark.parametrize("through", [_copied, _saved, _pickled])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_copies_are_packed_too(name: str, through: Callable[[nn.Module], nn.Module]) -> None:
    model = make(name)
    fuse(model)
    twin: Any = through(model)
    given = batch(model)
    assert torch.equal(twin(**given).loss, model(**given).loss)
    assert calls(twin).packed == calls(model).packed == 1
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(**given).loss, model(**given).loss)


def test_restore_and_a_second_initialize(tmp_path: Path) -> None:
    model = make("BertForMaskedLM")
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    fuse(model)
    fuse(model)
    given = batch(model)
    model(**given)
    assert calls(model).packed == 1
    model.save_pretrained(tmp_path)
    again: Any = transformers.BertForMaskedLM.from_pretrained(tmp_path).train()
    assert "forward" not in again.__dict__
    oslo_fusion.restore(model)
    assert {name: m.__dict__.keys() for name, m in model.named_modules()} == {n: d.keys() for n, d in before.items()}
    model(**given)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_with_the_fused_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed forward stands around the fused loss: no logits, and the loss of packed labels."""
    monkeypatch.setattr(loss_sites, "choices", lambda *where: {"auto": "triton"})
    model = make(name)
    twin = copy.deepcopy(model)
    fuse(model, custom_cuda_kernels=["FusedLinearCrossEntropy"])
    given = batch(model)
    output, theirs = step(model, given), step(twin, given)
    assert output[0].logits is None
    assert torch.allclose(output[0].loss, theirs[0].loss)
    for key, gradient in theirs[1].items():
        assert torch.allclose(output[1][key], gradient, atol=1e-6), key
    assert calls(model).packed == 1
    assert model(**given, skip_logits=False).logits.shape == (4, 30, 131)
    assert copy.deepcopy(model)(**given).logits is None
    oslo_fusion.restore(model)
    assert model(**given).logits is not None
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_compiled_code_meets_few_shapes(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    torch._dynamo.reset()
    model = make("BertForMaskedLM")
    twin = copy.deepcopy(model)
    fuse(model, memory_efficient_fusion={"scope": scope})
    batches: list[tuple[int, ...]] = [(30, 7, 18, 1), (40, 9, 40, 3), (64, 30, 30, 9), (50, 4, 9), (60, 9, 20), (64, 2, 2, 2)]
    for number, lengths in enumerate(batches if scope == "layer" else batches[:4]):
        given = batch(model, lengths, seed=number)
        ours, theirs = model(**given).loss, twin(**given).loss
        ours.backward()
        assert torch.allclose(ours, theirs)
    assert calls(model).packed == (6 if scope == "layer" else 4)
    record: Any = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if row.room == "aot")
    assert record.graphs
    assert max(graph.version for graph in record.graphs) <= 1, [
        (g.program, g.version, g.reason) for g in record.graphs if g.version
    ]
    torch._dynamo.reset()


def test_classification_is_not_packed_under_scope_model() -> None:
    model = make("BertForSequenceClassification")
    config = {"kernel_fusion": {**WISH["kernel_fusion"], "memory_efficient_fusion": {"scope": "model"}}}
    (row,) = [row for row in oslo_fusion.plan(model, config).proposals if row.site.kind == KIND]
    assert row.outcome == "refused"
    assert "scope: layer" in row.reason


def test_autocast_checkpointing_and_frozen_parameters() -> None:
    model = make("LlamaForCausalLM")
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**given).loss, twin(**given).loss
    assert abs(float(ours - theirs)) < 0.02
    for each in (model, twin):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.model.embed_tokens.requires_grad_(False)
    assert_same(model, twin, given)
    assert calls(model).packed == 2


def test_a_users_own_compiler_sees_the_untouched_forward() -> None:
    model = make("LlamaForCausalLM")
    twin = copy.deepcopy(model)
    fuse(model, custom_cuda_kernels=["all"])
    given = batch(model)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(**given).loss, twin(**given).loss)
    assert (calls(model).packed, calls(model).left) == (0, {})
    torch._dynamo.reset()


def test_generate_is_untouched() -> None:
    model = make("LlamaForCausalLM").eval()
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch(model, side="left")
    del given["labels"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**given, **options), twin.generate(**given, **options))
    assert calls(model).packed == 0


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_trainer(name: str, tmp_path: Path) -> None:
    """Texts of different lengths, padded by a collator as everybody's are: the losses of the untouched model."""
    losses = {}
    for packed in (False, True):
        model = make(name)
        if packed:
            fuse(model)
        generator = torch.Generator().manual_seed(0)
        texts: list[dict[str, Any]] = []
        for number in range(16):
            ids = torch.randint(3, 131, (5 + 7 * number % 50,), generator=generator).tolist()
            texts.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
            texts[-1]["labels"] = ids if name == "BertForMaskedLM" else number % 3

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            longest = max(len(row["input_ids"]) for row in rows)

            def padded(key: str, value: int) -> Tensor:
                return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

            token_labels = isinstance(rows[0]["labels"], list)
            labels = padded("labels", IGNORED) if token_labels else torch.tensor([row["labels"] for row in rows])
            return {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0), "labels": labels}

        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=texts, eval_dataset=texts[:6], data_collator=collate
        )
        trainer.train()
        losses[packed] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses[packed].append(trainer.evaluate()["eval_loss"])
        if packed:
            assert calls(model).packed > 8, calls(model).left
    assert len(losses[True]) == 5
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_what_stands_there_is_a_chain() -> None:
    model = make("BertForMaskedLM")
    fuse(model)
    standing = model.__dict__["forward"]
    assert isinstance(standing, PaddingFreeForward)
    assert standing.inner == type(model).forward.__get__(model)
    replica = model._replicate_for_data_parallel()
    assert "forward" not in replica.__dict__
    with pytest.raises(oslo_fusion.PlanError, match="its forward was put there"):
        surgery.put(model, surgery.Swap("", PaddingFreeForwardTwice, {}, "forward"))


class PaddingFreeForwardTwice(surgery.Standing):
    """No wrapping one: it may not be put over another."""


def on_a_gpu(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in given.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_models_obey_the_law_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Heads of 64, texts longer than a tile of attention: what the vendors' kernels for packed sequences serve."""
    if name.startswith("T5"):
        sizes = {"d_kv": 64}
    else:
        sizes = {"hidden_size": 128, "dim": 128, "head_dim": 64, "word_embed_proj_dim": 128, "max_position_embeddings": 512}
    model = make(name, **sizes).to("cuda", dtype)
    twin = copy.deepcopy(model)
    fuse(model)
    given = on_a_gpu(batch(model, (300, 7, 180, 129, 128, 1)))
    if given.get("labels") is not None and given["labels"].is_floating_point():
        given["labels"] = given["labels"].to(dtype)
    if name not in BARE:
        assert_same(model, twin, given)
    else:
        mask = given["attention_mask"].bool()
        exact = copy.deepcopy(twin).double()
        triple = [each(**given).last_hidden_state[mask] for each in (model, twin, exact)]
        assert_close_to_reference(*triple, name, norm="l2")
    assert (calls(model).packed, calls(model).left) == (1, {})


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel", "BertForSequenceClassification"])
def test_the_host_waits_once_a_step(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an event, and for nothing that torch knows; compiled by Inductor, nothing is made for the third and later lengths."""
    events, wait = [], torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (events.append(event), wait(event)))
    model = make(name).to("cuda", torch.bfloat16)
    fuse(model, memory_efficient_fusion=compiled)
    lengths = [(60, 7, 18, 1), (64, 30, 30, 30), (64, 64, 60, 2), (50, 4, 9, 30), (64, 33, 62, 3)]
    batches = [on_a_gpu(batch(model, each, seed=number)) for number, each in enumerate(lengths)]
    for given in batches[:3]:
        model(**given).loss.backward()
    torch.cuda.synchronize()
    events.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for given in batches[3:]:
                model(**given).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    assert (len(events), waits) == (2, [])
    assert calls(model).packed == 5
    if compiled:
        record: Any = next(row.runtime for row in oslo_fusion.report(model).plan.proposals if row.room == "aot")
        assert max(graph.version for graph in record.graphs) <= 1, [g.reason for g in record.graphs]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_captured_graphs_serve_packed_batches(name: str) -> None:
    """Batches of other lengths in the same bucket replay one pair of graphs; gradients are those of the padded model."""
    sizes = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 512}
    model = make(name, **sizes).to("cuda")
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    aot = {"scope": "model", "cuda_graphs": True}
    fuse(model, memory_efficient_fusion=aot, custom_cuda_kernels=["FusedLinearCrossEntropy"])
    lengths = [(300, 7, 180, 129), (310, 17, 160, 129), (300, 57, 130, 130), (299, 20, 170, 128), (320, 7, 160, 131)]
    for number, each in enumerate(lengths):
        given = on_a_gpu(batch(model, each, seed=number))
        assert_same_gradients(*(step(which, given)[1] for which in (model, twin, exact)))
    assert (calls(model).packed, calls(model).left) == (5, {})
    rows = oslo_fusion.report(model).rows
    assert not [row.reason for row in rows if "CUDA graph" in row.reason and row.outcome == "refused"]
    graphs = model.get_submodule(type(model).base_model_prefix).__dict__["forward"].settings["graphs"]
    assert graphs.captured == 1
