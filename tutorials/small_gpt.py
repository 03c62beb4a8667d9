"""A character-level GPT that a CPU can train, on text that ships with Python. Tutorial 5, the demo and tests share it.

The text is the language reference as ``help()`` shows it (the standard library's ``pydoc_data.topics``), half a million
characters. The model is transformers' GPT-2 class with random weights and dropout; a token is a character.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Text:
    """Python's language reference as character ids. The last tenth is held out for evaluation."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name].strip() for name in sorted(topics))
        # ASCII, so that the alphabet hardly depends on Python's version.
        text = "".join(character for character in text if character == "\n" or " " <= character <= "~")
        self.alphabet = "".join(sorted(set(text)))
        ids = self.encode(text)
        cut = len(ids) * 9 // 10
        self.train, self.held_out = ids[:cut], ids[cut:]

    def encode(self, text: str) -> Tensor:
        """Ids ``[characters]``, int64, on the CPU.

        Raises:
            ValueError: a character is not in the alphabet.
        """
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        unknown = sorted(set(text) - set(self.alphabet))
        if unknown:
            raise ValueError(f"text: received {unknown}. Allowed: {self.alphabet!r}. Remedy: leave them out.")
        return torch.tensor([numbers[character] for character in text])

    def decode(self, ids: Tensor) -> str:
        """The characters of ids ``[characters]``."""
        return "".join(self.alphabet[number] for number in ids.tolist())

    def batches(self, size: Size, seed: int) -> Callable[[], Tensor]:
        """A function that draws pieces of the training text, ``[rows, characters]``: the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            starts = torch.randint(len(self.train) - size.characters, (size.rows,), generator=generator)
            return torch.stack([self.train[start : start + size.characters] for start in starts.tolist()])

        return draw


@dataclass(frozen=True)
class Size:
    """How large the model, and how many pieces of how many characters a batch."""

    layers: int
    width: int
    heads: int
    rows: int
    characters: int


SIZES = {
    "tiny": Size(layers=2, width=32, heads=2, rows=8, characters=32),  # for tests
    "small": Size(layers=4, width=128, heads=4, rows=16, characters=64),  # a tenth of a second a step on one core
    "full": Size(layers=6, width=384, heads=6, rows=64, characters=256),  # for a GPU
}


def build(
    text: Text, size: Size, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, dropout: float = 0.1
) -> Any:
    """The GPT in training mode, always with the same random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        n_positions=size.characters,
        vocab_size=len(text.alphabet),
        bos_token_id=0,
        eos_token_id=None,  # a text ends where its length says, not at a character
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,  # nobody reads keys and values in training; generate() asks for them itself
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers would take it anyway, with a warning from inside of the forward
    return model.to(device, dtype).train()


class Training:
    """An ordinary training loop's state: AdamW, a short warm-up of the learning rate, gradients clipped at norm 1.

    Args:
        model: in training mode; it is changed in place.
        batch_seed: of the pieces of text, in their order.
        autocast: dtype of the matrix products; None is that of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Text,
        size: Size,
        *,
        batch_seed: int = 0,
        learning_rate: float = 1e-3,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.autocast = model, autocast
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, fused=True)
        self.warm_up = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 20))
        self.draw = text.batches(size, batch_seed)
        self.losses: list[float] = []

    def step(self) -> None:
        """Forward, backward and the optimizer, on the next piece of text; returns when the device is done."""
        ids = self.draw().to(self.device)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.warm_up.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))


@dataclass
class Run:
    """What a training run recorded: the loss and the seconds of each step, and what ``every`` returned."""

    losses: list[float]
    seconds: list[float] = field(default_factory=list)
    notes: dict[int, Any] = field(default_factory=dict)


def train(
    model: nn.Module,
    text: Text,
    size: Size,
    steps: int,
    *,
    dropout_seed: int = 0,
    every: tuple[int, Callable[[nn.Module], Any]] | None = None,
    **options: Any,
) -> Run:
    """Train for a number of steps.

    Args:
        dropout_seed: of torch's global generator, from which dropout draws. Its state afterwards is what it was before.
        every: ``(n, function)`` calls ``function(model)`` after each n steps, outside of the measured seconds.
        options: of :class:`Training`.
    """
    training = Training(model, text, size, **options)
    run = Run(training.losses)
    with torch.random.fork_rng(devices=[training.device] if training.device.type == "cuda" else []):
        torch.manual_seed(dropout_seed)
        for step in range(1, steps + 1):
            begin = time.perf_counter()
            training.step()
            run.seconds.append(time.perf_counter() - begin)
            if every is not None and step % every[0] == 0:
                run.notes[step] = every[1](model)
    return run


def held_out_loss(model: nn.Module, text: Text, size: Size, batches: int = 4) -> float:
    """The mean loss on text that was not trained on, in evaluation mode; the model's mode stays what it was."""
    device, training = next(model.parameters()).device, model.training
    pieces = text.held_out[: batches * size.rows * size.characters].reshape(batches, size.rows, size.characters).to(device)
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in pieces]
    model.train(training)
    return sum(losses) / len(losses)


def write(model: Any, text: Text, start: str, characters: int, seed: int = 0) -> str:
    """What the model writes after ``start``, drawn from its ten most probable characters; its mode stays what it was."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = text.encode(start)[None].to(device)
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=10, max_new_tokens=characters, pad_token_id=0
        )
    model.train(training)
    return text.decode(written[0])
