"""n-gram blocking inside ``generate``: Hugging Face's tokens, for this model only, and gone without a trace when restored."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process

from oslo_fusion import rehearsal, surgery
from oslo_fusion.config import FusionConfig
from oslo_fusion.environment import environment
from oslo_fusion.generation import GenerationPass, room
from oslo_fusion.generation.no_repeat_ngram import (
    METHOD,
    FusedEncoderNoRepeatNGramLogitsProcessor,
    FusedLogitsProcessors,
    FusedNoRepeatNGramLogitsProcessor,
)
from oslo_fusion.ops.kernels import LANGUAGES, choices
from oslo_fusion.plan import Swap

VOCAB = 23
FUSED = (FusedNoRepeatNGramLogitsProcessor, FusedEncoderNoRepeatNGramLogitsProcessor)
GPU = torch.cuda.is_available()
SWAP = Swap("", FusedLogitsProcessors, {"kernel": "auto"}, METHOD)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=22, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=22
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=22,
        decoder_start_token_id=2,
        forced_eos_token_id=22,
    )
    return transformers.BartForConditionalGeneration(config)


BUILDERS = {"gpt2": _gpt2, "t5": _t5, "bart": _bart}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "samples returned": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5, "top_p": 0.9},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "with other processors": {"repetition_penalty": 1.2, "bad_words_ids": [[5]], "min_new_tokens": 4},
    "scores returned": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
}
SIZES = {
    "n-gram": {"no_repeat_ngram_size": 2},
    "unigram": {"no_repeat_ngram_size": 1},
    "encoder": {"encoder_no_repeat_ngram_size": 2},
    "both": {"no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 1},
}


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    built = BUILDERS[request.param]().eval()
    for parameter in built.parameters():  # tiny models are indecisive: larger weights give repetition something to hold on to
        parameter.data.mul_(3)
    return built


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB - 1, (2, 7), generator=torch.Generator().manual_seed(5))


def generate(model: Any, ids: Tensor | None, **arguments: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(ids, **{"max_new_tokens": 9, "do_sample": False, **arguments})


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the calls of our processors' operators and of transformers' own processors."""
    calls = {"ours": 0, "theirs": 0}

    def count(cls: type, who: str) -> None:
        original = cls.__call__

        def call(self: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
            calls[who] += 1
            return original(self, input_ids, scores)

        patch.setattr(cls, "__call__", call)

    with monkeypatch.context() as patch:
        for cls in FUSED:
            count(cls, "ours")
        count(logits_process.NoRepeatNGramLogitsProcessor, "theirs")
        count(logits_process.EncoderNoRepeatNGramLogitsProcessor, "theirs")
        yield calls


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
        return
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_hugging_faces(model: Any, ids: Tensor, way: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**WAYS[way], **SIZES[size]}
    expected = generate(model, ids, **arguments)
    surgery.apply(model, [SWAP])
    with counted(monkeypatch) as calls:
        assert_equal(generate(model, ids, **arguments), expected)
    assert calls["ours"] > 0
    assert calls["theirs"] == 0


def test_blocking_has_an_effect_here(model: Any, ids: Tensor) -> None:
    plain = generate(model, ids, max_new_tokens=20)
    assert any(not torch.equal(generate(model, ids, max_new_tokens=20, **size), plain) for size in SIZES.values())


@pytest.mark.parametrize("where", ["model.generation_config", "generation_config="])
def test_sizes_from_a_generation_config(model: Any, ids: Tensor, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2}
    if where == "model.generation_config":
        model.generation_config.no_repeat_ngram_size = 2
        model.generation_config.encoder_no_repeat_ngram_size = 2
    else:
        arguments["generation_config"] = GenerationConfig(
            no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=2, max_new_tokens=9, **arguments
        )
    expected = generate(model, ids, **arguments)
    surgery.apply(model, [SWAP])
    with counted(monkeypatch) as calls:
        assert_equal(generate(model, ids, **arguments), expected)
    assert calls["ours"] > 0
    assert calls["theirs"] == 0


def test_inputs_embeds(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds = model.get_input_embeddings()(ids)
    arguments = {"inputs_embeds": embeds, "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 2}
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        expected = generate(model, None, **arguments)
    surgery.apply(model, [SWAP])
    with warnings.catch_warnings(record=True) as ours, counted(monkeypatch) as calls:
        warnings.simplefilter("always")
        assert_equal(generate(model, None, **arguments), expected)
    assert calls["ours"] > 0
    assert {str(w.message) for w in ours} == {str(w.message) for w in theirs}


def test_callers_own_processors_are_left_alone(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments() -> dict[str, Any]:
        mine = logits_process.NoRepeatNGramLogitsProcessor(1)
        return {"logits_processor": LogitsProcessorList([mine]), "no_repeat_ngram_size": 3, "max_new_tokens": 6}

    expected = generate(model, ids, **arguments())
    surgery.apply(model, [SWAP])
    with counted(monkeypatch) as calls:
        assert_equal(generate(model, ids, **arguments()), expected)
    assert calls == {"ours": 0, "theirs": 6}, "transformers lets the caller's processor take precedence"


def test_without_a_size_nothing_is_called(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery.apply(model, [SWAP])
    with counted(monkeypatch) as calls:
        generate(model, ids)
    assert calls == {"ours": 0, "theirs": 0}


def test_a_second_model_sees_nothing(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(model)
    cls, before = type(model), dict(vars(type(model)))
    surgery.apply(model, [SWAP])
    with counted(monkeypatch) as calls:
        generate(other, ids, no_repeat_ngram_size=2)
    assert calls["ours"] == 0
    assert calls["theirs"] > 0
    assert type(model) is cls
    assert dict(vars(cls)) == before
    assert list(model.state_dict()) == list(other.state_dict())


def test_restore_leaves_no_trace(model: Any, ids: Tensor) -> None:
    names = list(model.__dict__)
    surgery.apply(model, [SWAP])
    assert METHOD in model.__dict__
    surgery.restore(model)
    assert list(model.__dict__) == names


def test_an_attribute_of_its_own_is_not_overwritten(model: Any) -> None:
    model._get_logits_processor = print
    with pytest.raises(RuntimeError, match="of its own"):
        surgery.apply(model, [SWAP])
    assert model.__dict__[METHOD] is print


def _by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _by_torch}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_fused_and_its_own(model: Any, ids: Tensor, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery.apply(model, [SWAP])
    expected = generate(model, ids, no_repeat_ngram_size=2)
    twin = COPIES[way](model)
    assert twin._get_logits_processor.module is twin
    assert model._get_logits_processor.module is model
    del model
    gc.collect()
    with counted(monkeypatch) as calls:
        assert_equal(generate(twin, ids, no_repeat_ngram_size=2), expected)
    assert calls["ours"] > 0
    surgery.restore(twin)
    assert METHOD not in twin.__dict__


def test_a_fresh_process_loads_it(tmp_path: Any, ids: Tensor) -> None:
    torch.manual_seed(3)
    model: Any = _gpt2().eval()
    surgery.apply(model, [SWAP])
    torch.save({"model": model, "ids": ids, "tokens": generate(model, ids, no_repeat_ngram_size=2)}, tmp_path / "saved.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "model = saved['model']\n"
        "assert type(model._get_logits_processor).__name__ == 'FusedLogitsProcessors'\n"
        "tokens = model.generate(saved['ids'], max_new_tokens=9, do_sample=False, no_repeat_ngram_size=2)\n"
        "assert torch.equal(tokens, saved['tokens'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "saved.pt")], check=True, timeout=240)


def test_the_model_is_freed_at_once() -> None:
    model = _gpt2()
    surgery.apply(model, [SWAP])
    watch = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert watch() is None, "a cycle keeps the model's memory until the garbage collector comes by"
    finally:
        gc.enable()


def test_a_shallow_copy_that_outlives_its_model_says_so(ids: Tensor) -> None:
    model: Any = _gpt2()
    surgery.apply(model, [SWAP])
    shallow = copy.copy(model)
    del model
    with pytest.raises(RuntimeError, match="deepcopy"):
        generate(shallow, ids, no_repeat_ngram_size=2)


def test_speech_as_encoder_input_stays_with_transformers() -> None:
    model: Any = _t5()
    surgery.apply(model, [SWAP])
    config = GenerationConfig(encoder_no_repeat_ngram_size=2)
    for source, cls in (
        (torch.randn(2, 9), logits_process.EncoderNoRepeatNGramLogitsProcessor),
        (torch.zeros(2, 9, dtype=torch.long), FusedEncoderNoRepeatNGramLogitsProcessor),
    ):
        (processor,) = model._get_logits_processor(config, 1, source)
        assert type(processor) is cls


@pytest.mark.parametrize("n", [0, -1, 2.0, "2"])
def test_processors_check_their_size_as_transformers_does(n: Any) -> None:
    with pytest.raises(ValueError, match="strictly positive integer"):
        FusedNoRepeatNGramLogitsProcessor(n)
    with pytest.raises(ValueError, match="strictly positive integer"):
        FusedEncoderNoRepeatNGramLogitsProcessor(n, torch.zeros(1, 4, dtype=torch.long))


def test_processors_are_transformers_own_to_isinstance(ids: Tensor) -> None:
    scores = torch.randn(2, VOCAB)
    processor = FusedNoRepeatNGramLogitsProcessor(8)
    assert isinstance(processor, logits_process.NoRepeatNGramLogitsProcessor)
    assert processor(ids, scores) is scores, "as transformers does before there is a whole n-gram"
    encoder = FusedEncoderNoRepeatNGramLogitsProcessor(2, ids[0])
    assert isinstance(encoder, logits_process.EncoderNoRepeatNGramLogitsProcessor)
    assert encoder.batch_size == 1
    assert torch.equal(encoder(ids, scores), logits_process.EncoderNoRepeatNGramLogitsProcessor(2, ids[0])(ids, scores))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["greedy", "beams returned", "samples returned"])
@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_tokens_on_a_gpu(model: Any, ids: Tensor, way: str, kernel: str) -> None:
    if kernel not in choices("no_repeat_ngram", "cuda", "auto"):
        pytest.skip(f"no {kernel} kernel here")
    model, ids = model.cuda(), ids.cuda()
    for size in SIZES.values():
        expected = generate(model, ids, **WAYS[way], **size)
        surgery.apply(model, [Swap("", FusedLogitsProcessors, {"kernel": kernel}, METHOD)])
        assert_equal(generate(model, ids, **WAYS[way], **size), expected)
        surgery.restore(model)


# --- the pass -----------------------------------------------------------------------------------------------------------


def propose(model: nn.Module, kernels: tuple[str, ...] = ("FusedNoRepeatNGram",), **config: Any) -> list[Any]:
    fusion = FusionConfig(**{"enable": True, "custom_cuda_kernels": kernels, "autotune": "off", **config})
    return list(GenerationPass().propose(model, fusion, environment()))


@pytest.fixture
def kernel_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a kernel: the reference answers, so that the pass can be tested without one."""
    monkeypatch.setattr(room, "choices", lambda *where: {"auto": "pretended"})


@pytest.mark.usefixtures("kernel_pretended")
@pytest.mark.parametrize("kernels", [("FusedNoRepeatNGram",), ("all",)])
def test_the_pass_proposes_one_site_and_changes_nothing(model: Any, kernels: tuple[str, ...], ids: Tensor) -> None:
    names = list(model.__dict__)
    state = torch.get_rng_state()
    (proposal,) = propose(model, kernels)
    assert list(model.__dict__) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert proposal.outcome == "fused", proposal.reason
    assert proposal.site.path == "generate"
    assert proposal.to_dict()["donors"] == ["FusedLogitsProcessors"]
    expected = generate(model, ids, no_repeat_ngram_size=2)
    surgery.apply(model, proposal.swaps)
    assert_equal(generate(model, ids, no_repeat_ngram_size=2), expected)


@pytest.mark.usefixtures("kernel_pretended")
def test_a_rehearsal_goes_on_where_scores_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches are not made, so what they should have written is anything."""
    equal = torch.equal
    compared = []
    monkeypatch.setattr(torch, "equal", lambda a, b: (compared.append(a), equal(a, b) and len(compared) % 2 == 0)[1])
    with rehearsal.under(rehearsal.Rehearsal()):
        (row,) = propose(_gpt2())
    assert row.outcome == "fused"
    assert len(compared) == 4 * len(room._PROVEN)
    (row,) = propose(_gpt2())
    assert row.reason.startswith("computes something else")


@pytest.mark.usefixtures("kernel_pretended")
def test_a_model_inside_a_wrapper_is_found() -> None:
    wrapper = nn.ModuleDict({"inner": _gpt2()})
    (proposal,) = propose(wrapper)
    assert proposal.site.path == "inner.generate"
    surgery.apply(wrapper, proposal.swaps)
    assert METHOD in wrapper["inner"].__dict__


def test_what_is_not_asked_for_is_not_proposed() -> None:
    assert propose(_gpt2(), ()) == []
    assert propose(_gpt2(), ("FusedRMSNorm",)) == []
    (row,) = propose(_gpt2(), enable=False)
    assert row.outcome == "off"


def test_refusals_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = propose(nn.Linear(2, 2))
    assert row.outcome == "refused"
    assert "no part of this Linear generates" in row.reason
    assert propose(nn.Linear(2, 2), ("all",)) == []
    with torch.device("meta"):
        (row,) = propose(_gpt2())
    assert "meta" in row.reason
    for kernel in ("triton", "cuda"):
        (row,) = propose(_gpt2(), kernel=kernel)
        assert row.reason == f"kernel: {kernel}, and no {LANGUAGES[kernel]} kernel runs on the CPU"
    monkeypatch.setattr(room, "choices", lambda *where: {})
    (row,) = propose(_gpt2())
    assert "no kernel on the CPU" in row.reason
    monkeypatch.setattr(room, "choices", lambda *where: {"auto": "pretended"})
    patched: Any = _gpt2()
    patched._get_logits_processor = print
    (row,) = propose(patched)
    assert "replaced on the instance" in row.reason
    with monkeypatch.context() as patch:
        patch.setattr(FusedNoRepeatNGramLogitsProcessor, "__call__", lambda self, input_ids, scores: scores + 1)
        (row,) = propose(_gpt2())
    assert "computes something else" in row.reason


@pytest.mark.usefixtures("kernel_pretended")
@pytest.mark.parametrize(("ours", "outcome"), [(50.0, "fused"), (99.0, "refused"), (150.0, "refused")])
def test_only_what_wins(ours: float, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oslo_fusion.probe.time_calls", lambda functions, device: [100.0, ours])
    (row,) = propose(_gpt2(), autotune="cached")
    assert row.outcome == outcome
    assert "8×23" in row.reason
    assert f"100 → {ours:.0f} µs" in row.reason
    assert len(row.timings) == 1


def test_importing_the_package_imports_neither_transformers_nor_triton() -> None:
    code = "import sys, oslo_fusion.generation; sys.exit(any(name in sys.modules for name in ('transformers', 'triton')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
