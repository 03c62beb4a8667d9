"""Attention reached through transformers' interface: sites by family, same answers, packed sequences, and a way back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

import oslo_fusion
from oslo_fusion import surgery
from oslo_fusion.aot import masks
from oslo_fusion.aot import room as aot_room
from oslo_fusion.errors import ConfigError, PlanError
from oslo_fusion.kernels import attention_routes, rope_sites
from oslo_fusion.kernels.attention_routes import KIND, is_site
from oslo_fusion.kernels.attention_routing import INTERFACE, ROUTING, Noted, RoutedConfig, Routing, Rule
from oslo_fusion.ops import attention_backends
from oslo_fusion.ops.attention_backends import OURS
from oslo_fusion.plan import Site, Swap
from oslo_fusion.testing import assert_close_to_reference

WORDS, WIDTH, LAYERS = 96, 32, 2
TEXT = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
DECODER = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"image_size": 12, "patch_size": 4, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "bert": ("BertConfig", "BertForMaskedLM", {**TEXT, **NO_DROPOUT, "intermediate_size": 48}, 2),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**TEXT, **NO_DROPOUT, "intermediate_size": 48}, 2),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0},
        2,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, 2),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER, 2),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 5}, 2),
    "vit": ("ViTConfig", "ViTForImageClassification", {**VIT, "intermediate_size": 48, **NO_DROPOUT}, 2),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "dropout": 0.0,
            "pad_token_id": 0,
        },
        6,
    ),
}
CAUSAL = ("gpt2", "llama", "qwen2", "mistral")


@pytest.fixture
def kernels_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has kernels: the operator's reference runs, so its place in a model can be tested."""
    monkeypatch.setattr(attention_backends, "choices", lambda *where: {"auto": "triton"})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every attention that is not transformers' own."""
    calls: list[str] = []
    real, real_packed = attention_backends.run, attention_backends.run_packed

    def run(backend: str, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(backend)
        return real(backend, *args, **kwargs)

    def run_packed(backend: str, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(f"{backend} packed")
        return real_packed(backend, *args, **kwargs)

    monkeypatch.setattr(attention_backends, "run", run)
    monkeypatch.setattr(attention_backends, "run_packed", run_packed)
    return calls


def model_of(name: str, **changes: Any) -> Any:
    """A tiny model in training mode, with weights that make its attention matter."""
    torch.manual_seed(0)
    config, cls, sizes, _ = FAMILIES[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **changes})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def fuse(model: nn.Module, **more: Any) -> list[Any]:
    config = {"enable": True, "autotune": "off", "custom_cuda_kernels": ["FusedAttention"], **more}
    oslo_fusion.initialize(model, {"kernel_fusion": config})
    return [row for row in oslo_fusion.report(model).rows if row.site.kind == KIND]


def batch(name: str, padding: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """Input with labels; ``padding`` is ``left``, ``right`` or nothing."""
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12).to(device), "labels": torch.tensor([0, 1]).to(device)}
    ids = torch.randint(3, WORDS, (2, 11))
    given = {"input_ids": ids, "labels": ids.clone()}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, slice(4) if padding == "left" else slice(7, None)] = 0
        given |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {key: value.to(device) for key, value in given.items()}


def gradients(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (model(**given).loss * 1024).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, twin: Any, given: dict[str, Tensor]) -> None:
    """Every gradient obeys the law, against the untouched model in the same dtype and in float64."""
    exact = copy.deepcopy(twin).double()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    ours, theirs, truth = gradients(model, given), gradients(twin, given), gradients(exact, wide)
    assert ours.keys() == theirs.keys()
    for name, reference in truth.items():
        # Of a bias of keys, which changes no softmax, the gradient is zero and what is left are the roundings of either.
        if reference.norm() > 1e-6 * truth.get(name.replace("bias", "weight"), reference).norm():
            assert_close_to_reference(ours[name], theirs[name], reference, name, norm="l2")


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("name", FAMILIES)
def test_models_obey_the_law(name: str, counted: list[str]) -> None:
    model = model_of(name)
    twin, keys, sites = copy.deepcopy(model), list(model.state_dict()), FAMILIES[name][3]
    rows = fuse(model)
    assert [row.outcome for row in rows] == ["fused"] * sites
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == twin.config.to_dict()
    for padding in ("", "right", *(("left",) if name in CAUSAL else ())):
        counted.clear()
        assert_same(model, twin, batch(name, padding))
        assert counted == [OURS] * sites, padding


def test_refusals_say_why() -> None:
    rows = fuse(model_of("bert"))
    assert [row.reason for row in rows] == ["no kernel on the CPU: the extension has none for attention"] * 2
    rows = fuse(model_of("bert", attn_implementation="eager"))
    assert {row.reason for row in rows} == {"attn_implementation is 'eager', not 'sdpa'"}
    model = model_of("gpt2")
    model.transformer.h[1].attn.forward = model.transformer.h[1].attn.forward
    assert fuse(model)[1].reason == "its forward was replaced on the instance"
    assert not any(is_site(part) for part in nn.TransformerEncoderLayer(8, 2).modules())


@pytest.mark.usefixtures("kernels_pretended")
def test_a_module_that_asks_for_the_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is run under both names, so whatever a forward does with them shows."""
    model = model_of("llama")
    kind = type(model.model.layers[0].self_attn)
    real = kind.forward

    @functools.wraps(real)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = real(self, *args, **kwargs)
        return (out if self.config._attn_implementation == "sdpa" else 2 * out), weights

    monkeypatch.setattr(kind, "forward", forward)
    assert {row.reason for row in fuse(model)} == {"its forward does something else under another attention function"}


@pytest.mark.usefixtures("kernels_pretended")
def test_what_was_not_planned_for_runs_as_it_was(counted: list[str]) -> None:
    model = model_of("bert")
    twin = copy.deepcopy(model)
    fuse(model)
    layer, plain = (m.bert.encoder.layer[0].attention.self.eval() for m in (model, twin))
    hidden = torch.randn(2, 7, WIDTH)
    added = torch.zeros(2, 1, 7, 7).masked_fill(torch.rand(2, 1, 7, 7) < 0.3, -1e9)
    for given in ({"attention_mask": added}, {"position_bias": torch.randn(1, 4, 7, 7)}, {"output_attentions": True}):
        torch.testing.assert_close(layer(hidden, **given)[0], plain(hidden, **given)[0], rtol=0, atol=0)
    torch.testing.assert_close(layer(hidden[:, :1])[0], plain(hidden[:, :1])[0], rtol=0, atol=0)
    torch.testing.assert_close(layer.double()(hidden.double())[0], plain.double()(hidden.double())[0], rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer.float()(hidden)[0], plain.float()(hidden)[0], rtol=0, atol=0)
    assert counted == []


@pytest.mark.usefixtures("kernels_pretended")
def test_attentions_asked_for_make_a_row() -> None:
    model = model_of("bert").eval()
    rows = fuse(model)
    given = batch("bert")
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(model(**given, output_attentions=True).logits, expected)
    found = [row for row in oslo_fusion.report(model).rows if row.site.kind == KIND]
    assert len(found) == len(rows) + 1
    assert (found[-1].outcome, "attentions were asked for" in found[-1].reason) == ("refused", True)
    model.set_attn_implementation("eager")
    output = model(**given, output_attentions=True)
    assert output.attentions[0].shape == (2, 4, 11, 11), "the model's own configuration wins"
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(name: str, cache: str, counted: list[str]) -> None:
    model = model_of(name).eval()
    given = {key: value for key, value in batch(name, "left").items() if key != "labels"}
    if cache == "static":
        given = {"input_ids": given["input_ids"]}  # an empty cache of a fixed size, and no mask
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    expected = model.generate(**given, **more, disable_compile=True)
    fuse(model)
    assert torch.equal(model.generate(**given, **more, disable_compile=True), expected)
    assert counted, "the first pass takes the planned way"


@pytest.mark.usefixtures("kernels_pretended")
def test_copy_pickle_restore_and_a_second_model(tmp_path: Any) -> None:
    model, other = model_of("bert").eval(), model_of("bert").eval()
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    fuse(model)
    given = batch("bert", "right")
    expected = model(**given).loss
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        view = twin.bert.encoder.layer[1].attention.self.config
        assert isinstance(view, RoutedConfig)
        assert view._oslo_fusion_config is twin.config, "a view of the copy's own configuration"
        assert twin.config is not model.config
        torch.testing.assert_close(twin(**given).loss, expected)
        oslo_fusion.restore(twin)
        assert twin.bert.encoder.layer[1].attention.self.config is twin.config
    assert not any(isinstance(getattr(part, "config", None), RoutedConfig) for part in other.modules())
    fuse(model)
    assert sum(isinstance(getattr(part, "config", None), RoutedConfig) for part in model.modules()) == 2
    model.save_pretrained(tmp_path)
    assert INTERFACE not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    oslo_fusion.restore(model)
    assert [part.config for part in model.modules() if hasattr(part, "config")] == configs
    assert not any(name.startswith("_oslo_fusion") for part in model.modules() for name in part.__dict__)


@pytest.mark.usefixtures("kernels_pretended")
def test_the_view_reads_and_writes_the_real_one() -> None:
    model = model_of("bert")
    fuse(model)
    view: Any = model.bert.encoder.layer[0].attention.self.config
    assert (view._attn_implementation, model.config._attn_implementation) == (INTERFACE, "sdpa")
    assert view.hidden_size == WIDTH
    view.hidden_size = 7
    assert model.config.hidden_size == 7
    assert view.to_dict() == model.config.to_dict()
    assert repr(view) == repr(model.config)
    assert not hasattr(view, "nothing_of_this_name")


@pytest.mark.usefixtures("kernels_pretended")
def test_beside_the_rotary_donor_on_the_same_module(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One changes the forward, the other what it finds in its configuration: two claims, and both go back."""
    monkeypatch.setattr(rope_sites, "choices", lambda *where: {"auto": "triton"})
    model = model_of("llama")
    twin = copy.deepcopy(model)
    fuse(model, custom_cuda_kernels=["FusedRoPE", "FusedAttention"])
    rows = [row for row in oslo_fusion.report(model).rows if row.room == "kernels"]
    assert [row.outcome for row in rows] == ["fused"] * 4
    assert {path for row in rows for path in row.claims} >= {"model.layers.0.self_attn", "model.layers.0.self_attn.config"}
    assert isinstance(model.model.layers[0].self_attn, rope_sites.FusedRoPEAttention)
    counted.clear()
    assert_same(model, twin, batch("llama", "left"))
    assert counted == [OURS] * 2
    oslo_fusion.restore(model)
    attention = model.model.layers[0].self_attn
    assert (type(attention), attention.config) == (type(twin.model.layers[0].self_attn), model.config)


def test_surgery_gives_a_replaced_attribute_back() -> None:
    class Put:
        def __init__(self, module: Any, settings: Any) -> None:
            self.old = module.config

    model: Any = nn.Linear(2, 2)
    model.config = old = object()
    change = Swap("", Put, {}, "config", replaces=True)
    surgery.apply(model, [change])
    assert model.config.old is old
    put = model.config
    with surgery.as_restored(model):
        assert model.config is old
    assert model.config is put
    with pytest.raises(PlanError, match="was put there by a plan"):
        surgery.apply(model, [change])
    surgery.restore(model)
    assert model.config is old
    with pytest.raises(PlanError, match="not in this Linear"), surgery.transaction(model):
        surgery.apply(model, [change, Swap("part", Put, {})])
    assert model.config is old
    with pytest.raises(PlanError, match="has no attribute other to replace"):
        surgery.apply(model, [Swap("", Put, {}, "other", replaces=True)])
    assert not any(name.startswith("_oslo_fusion") for name in model.__dict__)


# --- packed ------------------------------------------------------------------------------------------------------------------


LENGTHS = (7, 1, 4)


def packed(name: str) -> tuple[dict[str, Any], list[Tensor]]:
    """A packed batch, and the texts that it is made of."""
    torch.manual_seed(3)
    texts = [torch.randint(3, WORDS, (1, length)) for length in LENGTHS]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    position = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    position = position + 2 if name == "roberta" else position  # those of padding come first there
    given = {"input_ids": torch.cat(texts, 1), "position_ids": position, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    return {**given, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}, texts


@pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, False) for name in ("bert", "roberta", "gpt2", "llama", "qwen2", "mistral")), ("bert", True), ("mistral", True)],
)
def test_packed_sequences_are_the_sequences(
    name: str, compiled: bool, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without kernels too, where nothing else is routed."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    changes = {"sliding_window": 3} if name == "mistral" else {}
    model = model_of(name, **changes).double()
    twin = copy.deepcopy(model)
    rows = fuse(model, custom_cuda_kernels=[], padding_free=True, memory_efficient_fusion=compiled)
    assert [row.outcome for row in rows] == ["fused"] * 2
    assert "kept for packed calls" in rows[0].reason
    given, texts = packed(name)
    counted.clear()
    more = {} if name in ("bert", "roberta") else {"use_cache": False}
    ours = model(**given, **more).logits
    assert counted == ["triton packed"] * 2
    theirs = torch.cat([twin(input_ids=text, **more).logits for text in texts], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (path, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            scale = float(theirs.grad.abs().max()) + 1e-3
            torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=0, atol=1e-9, msg=path)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_faster_kernel_is_taken_for_packed_sequences(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_routes, "packed_obstacle", lambda *_: "")
    monkeypatch.setattr(attention_routes, "torch_obstacle", lambda *_: "")
    monkeypatch.setattr(attention_routes._Trial, "packed_proof", lambda *_: "")
    monkeypatch.setattr(attention_routes._Trial, "packed_race", lambda self, dtype, first, second: attention_routes.FLASH)
    model = model_of("gpt2")
    fuse(model, custom_cuda_kernels=[], padding_free=True, memory_efficient_fusion=compiled, autotune="full")
    routing = getattr(model.transformer.h[0].attn.config, ROUTING)
    assert dict(routing.packed)[torch.float32] == attention_routes.FLASH


def test_packed_calls_that_make_no_sense_are_errors() -> None:
    model = model_of("bert")
    fuse(model, padding_free=True)
    given, _ = packed("bert")
    with pytest.raises(ConfigError, match="max_length_k: received None"):
        model(**{**given, "max_length_k": None})
    with pytest.raises(ConfigError, match="position_bias: received a tensor of"):
        model.bert.encoder.layer[0].attention.self(
            torch.randn(1, 12, WIDTH),
            position_bias=torch.randn(1, 4, 12, 12),
            **{k: v for k, v in given.items() if "_" in k[2:]},
        )
    with pytest.raises(ConfigError, match="cu_seqlens_q"):
        model(**{**given, "cu_seq_lens_q": given["cu_seq_lens_q"] + 1})


def test_without_kernels_only_packed_calls_are_ours(counted: list[str]) -> None:
    model = model_of("bert")
    twin = copy.deepcopy(model)
    fuse(model, padding_free=True)
    counted.clear()
    assert torch.equal(model(**batch("bert", "right")).loss, twin(**batch("bert", "right")).loss)
    assert counted == []


# --- compiled ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("kernels_pretended", "_fresh_compiler")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_is_one_graph_that_holds_its_attentions(name: str) -> None:
    model = model_of(name).eval()
    twin = copy.deepcopy(model)
    fuse(model)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    inner = {"bert": lambda m: m.bert, "gpt2": lambda m: m.transformer, "llama": lambda m: m.model}[name]
    given = {"input_ids": batch(name)["input_ids"]} | ({} if name == "bert" else {"use_cache": False})
    masks.keep_masks_in_sight()
    compiled = torch.compile(inner(model), backend=keep, fullgraph=True)
    expected = inner(twin)(**given).last_hidden_state
    torch.testing.assert_close(compiled(**given).last_hidden_state, expected)
    assert len(graphs[0].graph.find_nodes(op="call_function", target=attention_backends.run_masked)) == LAYERS


@pytest.mark.usefixtures("kernels_pretended", "_fresh_compiler")
@pytest.mark.parametrize(("name", "budget"), [("bert", 0), ("llama", 1)])
def test_in_compiled_layers(name: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all layers, without a mask and with one; what is recomputed is the same."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = model_of(name)
    twin = copy.deepcopy(model)
    rows = fuse(model, memory_efficient_fusion={"activation_memory_budget": budget})
    assert "kept under memory_efficient_fusion" in rows[0].reason
    for padding in ("", "right"):
        assert_same(model, twin, batch(name, padding))
    runtime = next(row.runtime for row in oslo_fusion.report(model).rows if row.room == "aot")
    assert (len(runtime.graphs), runtime.breaks) == (2, ())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "masked"), [("cudnn", False), ("cudnn", True), ("flash", False), ("efficient", True), ("packed", False)]
)
def test_vendors_are_nodes_of_compiled_layers(backend: str, masked: bool) -> None:
    """Without a device, so without numbers. With dropout each is called once, and its gradient once."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    half, dropout = torch.bfloat16, 0.125
    layer: Any = model_of("bert", attention_probs_dropout_prob=dropout).bert.encoder.layer[0].to("meta", half)
    rules = (Rule(half, True, masked, ((0, backend),)),)
    packs = ((half, "flash"),) if backend == "packed" else ()
    routing = Routing("meta", 8, rules, packs, Noted("", Site("", "", ""), ""))
    surgery.apply(layer, [Swap("attention.self", RoutedConfig, {"routing": routing}, "config", replaces=True)])
    x = torch.empty(1 if packs else 2, 11, WIDTH, device="meta", dtype=half, requires_grad=True)
    given: dict[str, Any] = {}
    if masked:
        given["attention_mask"] = torch.empty(2, 1, 11, 11, device="meta", dtype=torch.bool)
    if packs:
        offsets = torch.empty(4, device="meta", dtype=torch.int32)
        given = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    masks.keep_masks_in_sight()
    partition = min_cut_rematerialization_partition
    traced = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    compiled = torch.compile(layer.forward, backend=traced, fullgraph=True)
    compiled(x, **given).sum().backward()
    name = "aten._flash_attention_forward" if packs else f"aten._scaled_dot_product_{backend}_attention"
    gradient = f"{name.removesuffix('_forward')}_backward"
    forward, backward = graphs
    assert (forward.count(f"{name}.default"), backward.count(f"{name}.default")) == (1, 0)
    assert backward.count(f"{gradient}.default") == 1


@pytest.mark.usefixtures("kernels_pretended", "_fresh_compiler")
def test_a_whole_model_takes_what_is_chosen_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, transformers makes a mask of every call; one that says nothing is not what a backend is chosen for."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    name = "gpt2"
    model = model_of(name)
    model.config.use_cache = False
    twin = copy.deepcopy(model)
    fuse(model, memory_efficient_fusion={"scope": "model"})
    counts: list[int] = []
    real = masks.simplify_masks
    monkeypatch.setattr("oslo_fusion.aot.backend.simplify_masks", lambda graph: counts.append(real(graph)))
    assert_same(model, twin, batch(name))
    assert sum(counts) == LAYERS
    assert_same(model, twin, batch(name, "right"))
    assert sum(counts) == LAYERS, "a mask that is an input stays"


@pytest.mark.usefixtures("kernels_pretended", "_fresh_compiler")
def test_other_lengths_are_no_other_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every length is a version, and the winner's limits are none but where the winner changes."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = model_of("bert")
    fuse(model, memory_efficient_fusion=True)
    for shape in ((2, 9), (3, 12), (5, 31), (2, 17)):
        ids = torch.randint(3, WORDS, shape)
        model(input_ids=ids, labels=ids).loss.backward()
    runtime = next(row.runtime for row in oslo_fusion.report(model).rows if row.room == "aot")
    assert [graph.version for graph in runtime.graphs] == [0, 1]


@pytest.mark.usefixtures("kernels_pretended", "_fresh_compiler")
def test_dropout_in_compiled_layers_is_the_same_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directional derivative against finite differences, with the same draw: another mask in the backward is far off."""
    monkeypatch.setattr(aot_room, "COMPILER", "eager")
    model = model_of("bert", attention_probs_dropout_prob=0.3).double()
    monkeypatch.setattr(attention_routes, "dtypes_to_decide", lambda device, dtype: (dtype,))
    monkeypatch.setattr(attention_routes, "HALF", (torch.float64,))
    monkeypatch.setattr(attention_routes._Trial, "proof", lambda *_: "")  # in float64 the other is the truth itself
    rows = fuse(model, memory_efficient_fusion={"activation_memory_budget": 0})
    assert {row.outcome for row in rows} == {"fused"}, rows[0].reason
    weight, given = model.bert.encoder.layer[0].attention.self.value.weight, batch("bert")
    direction = torch.randn_like(weight)

    def loss() -> Tensor:
        torch.manual_seed(11)
        result: Tensor = model(**given).loss
        return result

    assert not torch.equal(model(**given).loss, model(**given).loss)
    model.zero_grad()
    loss().backward()
    slope, step, losses = float((weight.grad * direction).sum()), 1e-6, []
    for move in (step, -2 * step):
        with torch.no_grad():
            weight.add_(direction, alpha=move)
        losses.append(float(loss().detach()))
    measured = (losses[0] - losses[1]) / (2 * step)
    assert measured == pytest.approx(slope, rel=1e-5)


# --- decisions ---------------------------------------------------------------------------------------------------------------


def test_the_nearest_length_decides() -> None:
    merged = attention_routes._merged((128, 512, 2048), ("flash", "flash", "cudnn"))
    assert merged == ((1024, "flash"), (0, "cudnn"))
    assert attention_routes._merged((128, 512, 2048), ("flash", "flash", "flash")) == ((0, "flash"),)
    rule = Rule(torch.float16, True, False, merged)
    assert [rule.winner(tokens) for tokens in (1, 1024, 1025, 9999)] == ["flash", "flash", "cudnn", "cudnn"]


@pytest.mark.parametrize(
    ("dropout", "masked", "tried"), [(0.0, False, False), (0.125, False, False), (0.1, False, True), (0.0, True, True)]
)
def test_ours_is_tried_where_it_may_win(dropout: float, masked: bool, tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under masks, and without one where there is a dropout that cuDNN does not know."""
    monkeypatch.setattr(attention_routes, "torch_obstacle", lambda *_: "")
    monkeypatch.setattr(attention_routes._Trial, "proof", lambda *_: "")
    real = attention_routes.obstacle

    def obstacle(backend: str, case: Any, kernel: str) -> str:
        return "" if backend == OURS else real(backend, dataclasses.replace(case, device="cuda"), kernel)

    monkeypatch.setattr(attention_routes, "obstacle", obstacle)
    facts = attention_routes.Facts(12, 12, 64, 1, 0.125, False, dropout, None)
    config = oslo_fusion.FusionConfig(enable=True)
    trial = attention_routes._Trial(facts, torch.device("cpu"), torch.bfloat16, config)
    assert (OURS in [found.backend for found in trial.candidates(torch.bfloat16, masked)]) == tried


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_graph_is_made_anew_where_the_winner_changes() -> None:
    rule, count = Rule(torch.float16, True, False, ((1024, "flash"), (0, "cudnn"))), [0]

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        count[0] += 1
        return graph

    @torch.compile(backend=backend)
    def function(x: Tensor) -> Tensor:
        return x + (1 if rule.winner(x.shape[0]) == "flash" else 2)

    for tokens, graphs in ((100, 1), (200, 2), (900, 2), (1024, 2), (1025, 3), (4000, 3), (300, 3), (2000, 3)):
        assert float(function(torch.zeros(tokens))[0]) == (1 if tokens <= 1024 else 2)
        assert count[0] == graphs, tokens


@pytest.mark.usefixtures("kernels_pretended")
@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_wins(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is faster at the longest length with backward; under a compiler it is taken elsewhere too."""
    from oslo_fusion.plan import Timing

    times: list[Any] = []

    def time_pair(key: Any, before: Any, after: Any, inputs: Any, *, autotune: str, training: bool = True) -> Timing:
        first = inputs()[0]
        faster = 120.0
        if key[1] == KIND:
            times.append((key[2], key[3], first.shape[2]))
            faster = 50.0 if first.shape[2] == 2048 else 120.0
        return Timing("float32", "", 100.0, 120.0, 100.0, faster)

    monkeypatch.setattr(attention_routes.probe, "time_pair", time_pair)
    monkeypatch.setattr(attention_routes, "_TOKENS", 2048)
    model = model_of("gpt2")
    rows = fuse(model, autotune="full", memory_efficient_fusion=compiled)
    assert times == [(OURS, mask, tokens) for mask in ("plain", "masked") for tokens in attention_routes.LENGTHS]
    assert [row.outcome for row in rows] == ["fused"] * 2
    assert "float32, with backward, 1×2048: triton (sdpa 100, triton 50 µs)" in rows[0].reason
    routing = getattr(model.transformer.h[0].attn.config, ROUTING)
    ours = ((0, OURS),) if compiled else ((1024, "sdpa"), (0, OURS))
    assert {(rule.training, rule.winners) for rule in routing.rules} == {(True, ours)} | (
        {(False, ours)} if compiled else set()
    )
    monkeypatch.setattr(attention_routes.probe, "time_pair", lambda *_, **__: Timing("float32", "", 100.0, 99.0, 100.0, 99.0))
    rows = fuse(model, autotune="full")
    assert {row.outcome for row in rows} == {"refused"}
    assert "not faster here" in rows[0].reason


def test_an_unfit_backend_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "choices", lambda *where: {"auto": "triton"})
    monkeypatch.setattr(
        attention_routes, "run", lambda backend, q, k, v, **rest: attention_backends.run(OURS, q, k, v, scale=1.0)
    )
    rows = fuse(model_of("llama"))
    assert {row.outcome for row in rows} == {"refused"}


# --- on a GPU ----------------------------------------------------------------------------------------------------------------

WIDE = {"bert": {"hidden_size": 128, "num_attention_heads": 2}, "gpt2": {"n_embd": 128, "n_head": 2}}
WIDE["llama"] = WIDE["mistral"] = {"hidden_size": 256}


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_models_obey_the_law_on_a_gpu(name: str, dtype: torch.dtype, compiled: bool, counted: list[str]) -> None:
    model = model_of(name, **WIDE[name]).to("cuda", dtype)
    twin = copy.deepcopy(model)
    rows = fuse(model, memory_efficient_fusion=compiled)
    assert {row.outcome for row in rows} == {"fused"}, rows[0].reason
    counted.clear()
    for padding in ("", "right", *(("left",) if name in CAUSAL else ())):
        assert_same(model, twin, batch(name, padding, "cuda"))
    assert counted


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_sequences_on_a_gpu(name: str, compiled: bool) -> None:
    """In half precision by the faster kernel: as far from float64 as the texts one by one are, twice that at most."""
    model = model_of(name, **WIDE[name]).to("cuda", torch.bfloat16)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse(model, custom_cuda_kernels=[], padding_free=True, memory_efficient_fusion=compiled, autotune="full")
    given, texts = packed(name)
    given = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in given.items()}
    more = {} if name == "bert" else {"use_cache": False}
    weight = torch.randn(1, sum(LENGTHS), WORDS, device="cuda")
    found = []
    for which, run in ((model, None), (twin, texts), (exact, texts)):
        calls = [which(**given, **more)] if run is None else [which(input_ids=text.cuda(), **more) for text in run]
        logits = torch.cat([call.logits for call in calls], 1)
        (logits * weight).sum().backward()
        found.append({"logits": logits.detach(), **{key: p.grad for key, p in which.named_parameters() if p.grad is not None}})
    ours, theirs, truth = found
    for key, reference in truth.items():
        if reference.norm() > 1e-6 * truth.get(key.replace("bias", "weight"), reference).norm():
            assert_close_to_reference(ours[key], theirs[key], reference, key, norm="l2")


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("budget", [1, 0])
@pytest.mark.parametrize("dropout", [0.1, 0.125])
def test_dropout_is_the_same_in_the_backward_on_a_gpu(budget: float, dropout: float) -> None:
    """Attention's is the only one: from one seed the compiled layers drop what the uncompiled ones do, forward and backward."""
    compiled = model_of("bert", attention_probs_dropout_prob=dropout, **WIDE["bert"]).to("cuda", torch.bfloat16)
    eager, given = copy.deepcopy(compiled), batch("bert", "", "cuda")
    fuse(eager)
    fuse(compiled, memory_efficient_fusion={"activation_memory_budget": budget})
    found = []
    for model in (compiled, eager):
        gradients(model, given)  # the compiler draws numbers of its own
        torch.manual_seed(11)
        found.append(gradients(model, given)["bert.encoder.layer.0.attention.self.value.weight"].float())
    # A rounding of bfloat16 in each of some ten steps; another mask is half of the gradient off.
    assert float((found[0] - found[1]).norm()) <= 10 * 2**-8 * float(found[1].norm())


@pytest.mark.gpu
def test_the_plan_measures_on_a_gpu() -> None:
    model = model_of("bert", attention_probs_dropout_prob=0.1, hidden_size=256, num_attention_heads=4).to(
        "cuda", torch.bfloat16
    )
    rows = fuse(model, autotune="full")
    print(oslo_fusion.report(model))
    assert "µs" in rows[0].reason
    assert len(rows[0].timings) >= 8
    assert "not cudnn: a dropout of 0.1" in rows[0].reason
