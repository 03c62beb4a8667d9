"""T5's attention: recognised by its interface, its bias handed on as a table, whole models under the law."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion.aot import room as aot_room
from oslo_fusion.errors import ConfigError
from oslo_fusion.kernels import attention_sites
from oslo_fusion.kernels.attention_sites import KIND, FusedRelativeAttention, is_site
from oslo_fusion.testing import assert_close_to_reference

SMALL = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    # Smooth: with relu an activation that rounding puts on the other side of zero decides the error of whole gradients.
    "feed_forward_proj": "gated-gelu",
}


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operator's reference runs, so its place in a model can be tested."""
    monkeypatch.setattr(attention_sites, "choices", lambda *where: {"auto": "triton"})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every attention that is computed by the operator."""
    calls: list[dict[str, Any]] = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return real(*args, **kwargs)

    real = attention_sites.attention
    monkeypatch.setattr(attention_sites, "attention", count)
    return calls


def model_of(name: str = "T5", **changes: Any) -> Any:
    """A tiny model in training mode, with a bias that matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "relative_attention_bias" in key:
                parameter.normal_()
    return model


def fuse(model: nn.Module, **more: Any) -> list[Any]:
    config = {"enable": True, "autotune": "off", "custom_cuda_kernels": ["FusedAttention"], **more}
    oslo_fusion.initialize(model, {"kernel_fusion": config})
    return [row for row in oslo_fusion.report(model).rows if row.site.kind == KIND]


def batch(device: str = "cpu", **more: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, labels = torch.randint(2, 96, (2, 21)), torch.randint(2, 96, (2, 13))
    return {name: tensor.to(device) for name, tensor in {"input_ids": ids, "labels": labels, **more}.items()}


def padding() -> Tensor:
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, 15:] = 0
    return mask


def padded(both: bool, device: str = "cpu") -> dict[str, Tensor]:
    """A batch whose source is padded on the right; with ``both`` the target too, whose padding is no label."""
    given = batch(device, attention_mask=padding())
    if both:
        seen = torch.ones(2, 13, dtype=torch.long, device=device)
        seen[1, 9:] = 0
        given |= {"decoder_attention_mask": seen, "labels": given["labels"].masked_fill(seen == 0, -100)}
        given["decoder_input_ids"] = torch.randint(2, 96, (2, 13), generator=torch.Generator().manual_seed(2)).to(device)
    return given


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss
    # As a GradScaler does: float16 has no room for the gradients of single scores otherwise, in torch's fused kernels as here.
    (loss * 1024).backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(model: Any, twin: Any, given: dict[str, Tensor]) -> None:
    exact = copy.deepcopy(twin).double()
    ours, theirs, truth = gradients(model, given), gradients(twin, given), gradients(exact, given)
    for name, reference in truth.items():
        if name == "loss":
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else ours[name].dtype
            torch.testing.assert_close(ours[name].double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=0)
        else:
            assert_close_to_reference(ours[name], theirs[name], reference, name, norm="l2")


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("name", ["T5", "MT5"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_models_obey_the_law(name: str, use_cache: bool, counted: list[Any]) -> None:
    model = model_of(name, use_cache=use_cache)
    twin, keys = copy.deepcopy(model), list(model.state_dict())
    rows = fuse(model)
    assert [row.outcome for row in rows] == ["fused"] * 9
    assert list(model.state_dict()) == keys
    counted.clear()
    assert_same(model, twin, batch())
    assert len(counted) == 9
    assert sum(call["causal"] for call in counted) == 3
    assert sum(call["bias_table"] is None for call in counted) == 3, "cross-attention has no bias"


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("block", [True, {"scope": "model"}, {"activation_memory_budget": 0}])
def test_inside_a_compiled_graph(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is part of the graph, and the table passes from one to the next."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = model_of()
    twin = copy.deepcopy(model)
    fuse(model, memory_efficient_fusion=block)
    assert_same(model, twin, batch())
    runtime = next(row.runtime for row in oslo_fusion.report(model).rows if row.room == "aot")
    assert runtime.graphs
    assert runtime.breaks == ()


@pytest.mark.usefixtures("kernels_pretended")
def test_what_runs_as_it_was_gets_a_bias_made_from_the_table(counted: list[Any]) -> None:
    """Attentions asked for in the middle of a stack: a module that got a table makes the bias of it."""
    model = model_of(dropout_rate=0.0)
    twin = copy.deepcopy(model).eval()
    fuse(model.eval())
    hidden = torch.randn(2, 7, 32)
    first, second = (model.encoder.block[i].layer[0].SelfAttention for i in (0, 1))
    counted.clear()
    _, table, _ = first(hidden)
    weight = first.relative_attention_bias.weight
    assert torch.equal(table, weight)
    assert table.data_ptr() != weight.data_ptr(), "the parameter's memory may be gone when the next layer reads it"
    output, handed_on, _ = second(hidden, position_bias=table, output_attentions=True)
    assert len(counted) == 1
    assert handed_on is table
    _, bias, _ = twin.encoder.block[0].layer[0].SelfAttention(hidden)
    expected, *_ = twin.encoder.block[1].layer[0].SelfAttention(hidden, position_bias=bias)
    torch.testing.assert_close(output, expected)
    cross = model.decoder.block[0].layer[1].EncDecAttention
    _, nothing, _ = cross(hidden, key_value_states=hidden)
    assert nothing.shape == (0, 4)
    output, *_ = cross(hidden, key_value_states=hidden, position_bias=nothing, output_attentions=True)
    expected, *_ = twin.decoder.block[0].layer[1].EncDecAttention(hidden, key_value_states=hidden)
    torch.testing.assert_close(output, expected)


@pytest.mark.usefixtures("kernels_pretended")
def test_generate_and_outputs_that_are_asked_for() -> None:
    model = model_of()
    twin = copy.deepcopy(model).eval()
    fuse(model.eval())
    given = batch()
    for options in ({}, {"num_beams": 3}, {"attention_mask": padding()}):
        ours, theirs = (m.generate(given["input_ids"], max_new_tokens=8, **options) for m in (model, twin))
        assert torch.equal(ours, theirs)
    ours, theirs = (m(**given, output_hidden_states=True) for m in (model, twin))
    for mine, other in zip(ours.encoder_hidden_states, theirs.encoder_hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("both", [False, True])
def test_padded_batches_are_computed_by_the_operator(both: bool, counted: list[Any]) -> None:
    """transformers makes a boolean mask of queries and keys of them, which holds the causal one too."""
    model = model_of()
    twin = copy.deepcopy(model)
    fuse(model)
    given = padded(both)
    counted.clear()
    assert_same(model, twin, given)
    assert len(counted) == 9, "the same table goes on through the layers"
    assert sum(call["mask"] is not None for call in counted) == (9 if both else 6)
    assert sum(call["causal"] for call in counted) == (0 if both else 3)


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("block", [True, {"scope": "model"}, {"activation_memory_budget": 0}])
@pytest.mark.parametrize("both", [False, True])
def test_padded_batches_inside_a_compiled_graph(block: Any, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = model_of()
    twin = copy.deepcopy(model)
    fuse(model, memory_efficient_fusion=block)
    for given in (padded(both), batch()):  # a mask comes and goes with the batch
        assert_same(model, twin, given)


@pytest.mark.usefixtures("kernels_pretended")
def test_other_masks_run_as_they_were(counted: list[Any]) -> None:
    """A mask that is added, or one of more keys: bias and mask meet as transformers has it."""
    model = model_of()
    twin = copy.deepcopy(model).eval()
    fuse(model.eval())
    hidden = torch.randn(2, 7, 32)
    layer, plain = (m.decoder.block[0].layer[0].SelfAttention for m in (model, twin))
    counted.clear()
    added = torch.zeros(2, 1, 7, 7)
    added[0, :, :, 4:] = torch.finfo(torch.float32).min
    expected = plain(hidden, mask=added)[0]
    torch.testing.assert_close(layer(hidden, mask=added)[0], expected)
    assert counted == []
    seen = (added == 0).contiguous()
    torch.testing.assert_close(layer(hidden, mask=seen)[0], expected)
    torch.testing.assert_close(layer(hidden, mask=seen[:, :, :1])[0], expected)  # one row for all queries
    assert len(counted) == 2


@pytest.mark.usefixtures("kernels_pretended")
def test_under_autocast_that_was_not_planned_for(counted: list[Any]) -> None:
    """On a CPU half precision is not decided for: the bias is made as always."""
    model = model_of()
    twin = copy.deepcopy(model)
    fuse(model)
    counted.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, twin, batch())
    assert not counted


@pytest.mark.usefixtures("kernels_pretended")
def test_what_is_not_planned_for_calls_each_projection_once() -> None:
    model = model_of()
    fuse(model)
    model = model.double()
    calls: list[str] = []
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.q.register_forward_hook(lambda *_: calls.append("q"))
    attention(torch.randn(2, 7, 32, dtype=torch.float64))
    assert calls == ["q"]


@pytest.mark.usefixtures("kernels_pretended")
def test_gradient_checkpointing() -> None:
    model = model_of()
    twin = copy.deepcopy(model)
    fuse(model)
    model.gradient_checkpointing_enable()
    assert_same(model, twin, batch())


@pytest.mark.usefixtures("kernels_pretended")
def test_dropout_is_random_between_steps_and_off_in_eval() -> None:
    model = model_of(dropout_rate=0.2)
    fuse(model)
    given = batch()
    attention = model.encoder.block[0].layer[0].SelfAttention
    hidden = torch.randn(2, 7, 32)
    assert not torch.equal(attention(hidden)[0], attention(hidden)[0])
    model.eval()
    assert torch.equal(attention(hidden)[0], attention(hidden)[0])
    torch.manual_seed(5)
    first = model.train()(**given).loss
    torch.manual_seed(5)
    assert torch.equal(first, model(**given).loss)


@pytest.mark.usefixtures("kernels_pretended")
def test_pickle_copy_and_restore() -> None:
    model = model_of()
    twin = copy.deepcopy(model)
    fuse(model)
    given = batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.encoder.block[1].layer[0].SelfAttention, FusedRelativeAttention)
        torch.testing.assert_close(other(**given).loss, model(**given).loss)
    oslo_fusion.restore(model)
    assert not any(isinstance(part, FusedRelativeAttention) for part in model.modules())
    assert torch.equal(model(**given).loss, twin(**given).loss)


@pytest.mark.usefixtures("kernels_pretended")
def test_all_of_a_kind_or_none() -> None:
    """A table that reached a module which does not know it would be taken for a bias."""
    model = model_of()
    odd = model.encoder.block[1].layer[0].SelfAttention
    odd.forward = odd.forward
    rows = {row.site.path: row for row in fuse(model)}
    assert [row.outcome for path, row in rows.items() if path.startswith("encoder")] == ["refused"] * 3
    assert [row.outcome for path, row in rows.items() if path.startswith("decoder")] == ["fused"] * 6
    assert rows["encoder.block.1.layer.0.SelfAttention"].reason == "its forward was replaced on the instance"
    assert rows["encoder.block.0.layer.0.SelfAttention"].reason.endswith("encoder.block.1.layer.0.SelfAttention is not fused")


def test_refusals_say_why(build: Any) -> None:
    assert [row.reason for row in fuse(model_of())] == ["no kernel on the CPU: the extension has none for attention"] * 9
    model = build("gpt2")
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "custom_cuda_kernels": ["FusedAttention"]}})
    row = oslo_fusion.report(model).rows[0]
    assert (row.outcome, row.reason) == (
        "refused",
        "no kernel on the CPU: the extension has none for attention",
    )
    assert row.site.kind == "attention through transformers' interface"
    model = nn.Sequential(nn.Linear(2, 2))
    oslo_fusion.initialize(model, {"kernel_fusion": {"enable": True, "custom_cuda_kernels": ["FusedAttention"]}})
    row = oslo_fusion.report(model).rows[0]
    assert (row.outcome, row.reason) == (
        "refused",
        "no part of this Sequential calls its attention through transformers' interface",
    )


@pytest.mark.usefixtures("kernels_pretended")
def test_another_implementation_or_meaning_is_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = fuse(model_of(attn_implementation="eager"))
    assert {row.reason for row in rows} == {"attn_implementation is 'eager', not 'sdpa'"}
    assert not any(is_site(part) for part in transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)).modules())
    model = model_of()
    kind = type(model.encoder.block[0].layer[0].SelfAttention)
    real = kind.compute_bias
    monkeypatch.setattr(kind, "compute_bias", lambda self, *args, **kwargs: 2 * real(self, *args, **kwargs))
    rows = fuse(model)
    assert [row.outcome for row in rows if "SelfAttention" in row.site.path] == ["refused"] * 6
    assert "computes something else" in rows[0].reason


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_sequences_of_an_encoder(compiled: bool, monkeypatch: pytest.MonkeyPatch, counted: list[Any]) -> None:
    """Without kernels too: each text is what it is alone, with a bias that begins anew in each."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = model_of().double()
    twin = copy.deepcopy(model)
    rows = fuse(model, custom_cuda_kernels=[], memory_efficient_fusion=compiled, padding_free=True)
    found = {row.site.path.split(".")[0]: row.outcome for row in rows}
    assert found == {"encoder": "fused", "decoder": "refused"}
    lengths = (9, 1, 14)
    texts = [torch.randint(2, 96, (1, length)) for length in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    named = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 14, "max_length_k": 14}
    counted.clear()
    ours = model.encoder(torch.cat(texts, 1), **named).last_hidden_state
    assert len(counted) == 3
    theirs = torch.cat([twin.encoder(text).last_hidden_state for text in texts], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours.pow(3).sum().backward()
    theirs.pow(3).sum().backward()
    for (path, ours), theirs in zip(model.encoder.named_parameters(), twin.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-7, msg=path)
    counted.clear()
    torch.testing.assert_close(model.encoder(texts[0]).last_hidden_state, twin.encoder(texts[0]).last_hidden_state)
    assert counted == [], "padded batches run as they were"
    with pytest.raises(ConfigError, match="packed attention: output_attentions: received True"):
        model.encoder.block[0].layer[0].SelfAttention(torch.randn(1, 24, 32).double(), output_attentions=True, **named)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_models_obey_the_law_on_a_gpu(dtype: torch.dtype, compiled: bool, counted: list[Any]) -> None:
    model = model_of(d_kv=64, d_model=128).to("cuda", dtype)
    twin = copy.deepcopy(model)
    rows = fuse(model, memory_efficient_fusion=compiled)
    assert {row.outcome for row in rows} == {"fused"}, rows[0].reason
    for given in (batch("cuda"), padded(False, "cuda"), padded(True, "cuda")):
        assert_same(model, twin, given)
