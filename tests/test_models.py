"""Models by name: the published sizes, seeds, dtypes, local directories, and what is refused."""

from __future__ import annotations

import pytest
import torch

from oslo_fusion.errors import ConfigError
from oslo_fusion.models import MODELS, build_model

CLASSES = {
    "gpt2": ("GPT2LMHeadModel", 124_439_808),
    "bert": ("BertForMaskedLM", 109_514_298),
    "roberta": ("RobertaForMaskedLM", 124_697_433),
    "t5": ("T5ForConditionalGeneration", 222_903_552),
    "t5-v1_1": ("T5ForConditionalGeneration", 222_903_552),
    "bart": ("BartForConditionalGeneration", 139_420_416),
    "vit": ("ViTForImageClassification", 86_567_656),
    "opt": ("OPTForCausalLM", 125_239_296),
    "llama": ("LlamaForCausalLM", 1_235_814_400),
}
"""Class and number of parameters of the published models: openai-community/gpt2, google-bert/bert-base-uncased,
FacebookAI/roberta-base, google-t5/t5-base, google/t5-v1_1-base, facebook/bart-base, google/vit-base-patch16-224,
facebook/opt-125m, meta-llama/Llama-3.2-1B. T5 v1.1 has 24,674,304 more where the embeddings are not tied, as they are in
transformers 5."""


def test_every_name_is_tested():
    assert set(MODELS) == set(CLASSES)


@pytest.mark.parametrize("name", MODELS)
def test_full_size_is_the_published_one(name):
    import transformers

    recipe = MODELS[name]
    with torch.device("meta"):
        model = getattr(transformers, recipe.model)(getattr(transformers, recipe.config)(**recipe.full))
    assert (type(model).__name__, model.num_parameters()) == CLASSES[name]


@pytest.mark.parametrize("name", MODELS)
def test_tiny_model_is_seeded_narrow_and_in_its_dtype(name):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = build_model(name, dtype="bf16", device="cpu", size="tiny", seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state moved"
    again = build_model(name, dtype="bf16", device="cpu", size="tiny", seed=1)
    other = build_model(name, dtype="bf16", device="cpu", size="tiny", seed=2)
    assert type(first).__name__ == CLASSES[name][0]
    assert first.num_parameters() < 1_000_000
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    weights, same, different = (dict(m.named_parameters()) for m in (first, again, other))
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert any(not torch.equal(weights[key], different[key]) for key in weights)


def test_t5_versions_differ_as_published():
    first, second = (build_model(name, dtype="fp32", device="cpu", size="tiny").config for name in ("t5", "t5-v1_1"))
    assert (first.is_gated_act, first.scale_decoder_outputs) == (False, True)
    assert (second.is_gated_act, second.scale_decoder_outputs) == (True, False)


def test_rotary_frequencies_stay_float32():
    model = build_model("llama", dtype="bf16", device="cpu", size="tiny")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_local_directory_loads_its_weights(tmp_path):
    saved = build_model("bert", dtype="float32", device="cpu", size="tiny", seed=3)
    saved.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), dtype="fp16", device="cpu")
    assert type(loaded) is type(saved)
    assert not loaded.training
    for (name, ours), theirs in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs.half()), name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be loaded"),
        ('{"model_type": "bert"}', "'nothing'"),
        ('{"model_type": "bert", "architectures": ["BertForNothing"]}', "'BertForNothing'"),
        ('{"model_type": "bert", "architectures": ["BertModel"]}', "cannot be loaded"),
        ("{", "cannot be loaded"),
    ],
)
def test_directory_without_a_model_is_a_config_error(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        build_model(str(tmp_path), dtype="fp32", device="cpu")
    assert str(tmp_path) in str(error.value)
    assert "Remedy" in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name_or_path": "gtp2"}, "model: received 'gtp2'.*did you mean gpt2"),
        ({"name_or_path": "no/such/directory"}, "model: received 'no/such/directory'.*Allowed: gpt2"),
        ({"dtype": "fp8"}, "dtype: received 'fp8'.*Allowed: float32"),
        ({"dtype": torch.int8}, "dtype: received torch.int8"),
        ({"device": "gpu"}, "device: received 'gpu'"),
        ({"device": "meta"}, "device: received 'meta'"),
        ({"device": "cuda:99"}, "device: received 'cuda:99'.*torch sees here"),
        ({"size": "small"}, "size: received 'small'.*Allowed: full, tiny"),
        ({"name_or_path": ".", "size": "tiny"}, "size: received 'tiny' with the directory"),
    ],
)
def test_unusable_model_arguments(change, says):
    with pytest.raises(ConfigError, match=says):
        build_model(**{"name_or_path": "gpt2", "dtype": "fp32", "device": "cpu", "size": "tiny", **change})
