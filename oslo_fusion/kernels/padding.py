"""A padded batch as one packed sequence, for the length of one call of a model's own ``forward``.

A batch of texts comes as ``[rows, columns]`` tokens and an attention mask. Here its tokens, without the padding, become one row
``[1, packed]``, and the model's own code runs on that: embeddings, norms, MLPs, head and loss know no difference, and attention
is told where each text begins, by the keyword arguments that transformers has for it (``cu_seq_lens_q`` and the like). What
comes out with a place for each token goes back to where it was; at padding it is zeros.

The host waits for the device once a call, for the few numbers that :class:`Queued` asks for; transformers waits once too, where
it looks whether a mask may be left out, and does not get to that.

The packed length is rounded up (``bucket`` in ``ops/pack_tokens.py``), the offsets have as many entries as the largest batch
so far and the length of the longest text is rounded up to a power of two that only grows: so that kernels, memory and compiled
layers meet few different shapes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from oslo_fusion.kernels.norm_sites import ROOM
from oslo_fusion.ops.kernels import is_plain
from oslo_fusion.ops.pack_tokens import FINE, LONGEST_PIECE, Form, Tokens, bucket, count_tokens, pack_tokens, step
from oslo_fusion.plan import Proposal, Site
from oslo_fusion.surgery import Wrapping, ahead

_LONGEST = 512
_OFFSETS, _FORWARD = "cu_seq_lens_q", "forward"
_TOKENS = ("input_ids", "token_type_ids", "labels", "position_ids")  # of a call, as Tokens has them
_PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
_PLAIN = ("num_items_in_batch", "return_dict", "output_hidden_states", "skip_logits")
"""Arguments that mean the same for a packed batch. ``skip_logits`` is the fused loss's."""

_WITHOUT_CACHE = ("use_cache", "output_attentions", "logits_to_keep")
"""Arguments that a packed call has no answer for, unless they are off."""


@functools.cache
def _no_mask(device: torch.device) -> Tensor:
    """A mask of one number, which is none. Kept, as nobody writes to a mask: a launch less.

    Not an inference tensor, which a training step after an evaluation could not use.
    """
    with torch.inference_mode(False):
        return torch.full((1, 1, 1, 1), float("nan"), device=device)


@dataclass(frozen=True)
class Batch:
    """What the host knows about a padded batch.

    Attributes:
        shape: rows and columns.
        tokens: in all.
        longest: tokens of any row.
        texts: rows that are not all padding.
        begins: rows whose first column is text.
        pieces: of text; more than texts where a row has padding inside.
        stray: whether a label counts at a place that is padding.
    """

    shape: tuple[int, int]
    tokens: int
    longest: int
    texts: int
    begins: int
    pieces: int
    stray: bool

    @property
    def size(self) -> int:
        """Places, padding included."""
        return self.shape[0] * self.shape[1]


class Queued:
    """A padded batch before the host knows how long the packed one is: all of its places, of which it takes the first then.

    So there is nothing left to launch when the host has waited, and the device with it.

    Args:
        mask: ``[rows, columns]``, not zero where there is text.
        tokens: of the batch.
        form: how they are packed.
        sequences: how many offsets there are after the first.
    """

    def __init__(self, mask: Tensor, tokens: Tokens, form: Form, sequences: int) -> None:
        self.shape = mask.shape[0], mask.shape[1]
        self._numbers = numbers = count_tokens(mask, tokens.labels, form.shifted)
        self._ready: torch.cuda.Event | None = None
        if numbers.is_cuda:  # on their way at once, so that the host waits for nothing that is launched before it reads them
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(numbers.device))
        self.packed = pack_tokens(numbers, mask, tokens, form, sequences)

    def read(self) -> Batch:
        """The one place where the host waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        lengths, begins, later, stray = self._numbers.tolist()
        texts, first = len(lengths) - lengths.count(0), sum(begins)
        return Batch(self.shape, sum(lengths), max(lengths), texts, first, first + sum(later), any(stray))


@dataclass(frozen=True)
class Packing:
    """Where each token of a packed batch comes from.

    Attributes:
        source: ``[packed]``, the place in the flattened padded batch; of the rest, some place in it.
        tokens: how many are not the rest.
        shape: of the padded batch, rows and columns.
    """

    source: Tensor
    tokens: int
    shape: tuple[int, int]

    @property
    def length(self) -> int:
        """Places, those of the rest included."""
        return self.source.shape[0]

    def packed(self, x: Tensor) -> Tensor:
        """``[rows, columns, ...]`` → ``[1, packed, ...]``."""
        return x.flatten(0, 1).index_select(0, self.source).unsqueeze(0)

    def padded(self, x: Tensor) -> Tensor:
        """``[1, packed, ...]`` → ``[rows, columns, ...]``, zeros at padding."""
        out = x.new_zeros((self.shape[0] * self.shape[1], *x.shape[2:]))
        filled: Tensor = out.index_copy_(0, self.source[: self.tokens], x[0, : self.tokens]).unflatten(0, self.shape)
        return filled

    def padded_everywhere(self, output: Any) -> Any:
        """What a model returned, with every tensor of packed tokens padded again."""

        def back(x: Tensor) -> Tensor:
            return self.padded(x) if x.dim() >= 2 and x.shape[0] == 1 and x.shape[1] == self.length else x

        if isinstance(output, dict):
            values: dict[str, Any] = {name: pytree.tree_map_only(Tensor, back, value) for name, value in output.items()}
            return type(output)(**values)
        return pytree.tree_map_only(Tensor, back, output)


def pack(queued: Queued, batch: Batch, lengths: int = FINE) -> Packing:
    """Where a batch's packed tokens come from.

    Args:
        queued: the batch.
        batch: what was read of it.
        lengths: as for :func:`~oslo_fusion.ops.pack_tokens.bucket`.
    """
    return Packing(queued.packed.source[: bucket(batch.tokens, lengths)], batch.tokens, batch.shape)


# --- what was found at run time ----------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """How a model was called: packed, or as it was and why. The ``Runtime`` of its row."""

    packed: int = 0
    tokens: int = 0
    computed: int = 0
    given: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def leave(self, reason: str) -> None:
        """Note that a call ran as it was."""
        self.left[reason] = self.left.get(reason, 0) + 1

    def pack(self, packing: Packing) -> None:
        """Note that a call was packed."""
        self.packed += 1
        self.tokens += packing.tokens
        self.computed += packing.length
        self.given += packing.shape[0] * packing.shape[1]

    def rows(self) -> tuple[Proposal, ...]:
        """A row per reason for which calls were not packed."""
        site = Site("some calls", "not packed", "-")
        reasons = [f"{reason} ({_count(number, 'call')})" for reason, number in self.left.items()]
        return tuple(Proposal(site, ROOM, "padded", "padded", "refused", reason) for reason in reasons)

    def __str__(self) -> str:
        if not self.packed:
            return "same outputs and gradients on ragged batches; no call was packed yet"
        share = f"{self.computed / self.given:.0%} of the padded batch" if self.given else ""
        return f"{_count(self.packed, 'call')} packed: {self.tokens} tokens in {self.computed} places, {share}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


# --- what stands on the instances --------------------------------------------------------------------------------------------

_LOCAL = threading.local()


def current_packing() -> Packing | None:
    """The packing of the innermost packed call of this thread."""
    packing: Packing | None = getattr(_LOCAL, "packing", None)
    return packing


@contextlib.contextmanager
def _packed(packing: Packing) -> Iterator[None]:
    outer = current_packing()
    _LOCAL.packing = packing
    try:
        yield
    finally:
        _LOCAL.packing = outer


class PaddingFreeForward(Wrapping):
    """Stands on a model as ``forward``: packs a padded batch, runs what stood there before on it, and pads the outputs.

    What it can't pack runs as it was, and the report says why. Settings: how the model numbers tokens (``positions`` and the
    padding token ``pad``); ``labels``: whether they are one per token, and ``shifted``, that each belongs to the token before
    it; ``caches``: it returns a key/value cache unless told not to; ``left``: rows may begin with padding; ``empty``: or be
    nothing else; ``lengths``: how many packed lengths there are for each doubling.
    """

    def __init__(self, module: Any, settings: Any) -> None:
        super().__init__(module, settings)
        self._parameters: tuple[str, ...] | None = None
        self._form = Form(settings["positions"], settings["pad"], settings["shifted"], settings["lengths"])
        self._sequences = 0
        self._longest = 0

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own method: Trainer and ``generate`` read it."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.inner
        if torch.compiler.is_compiling() or not is_plain() or kwargs.get(_OFFSETS) is not None:
            return inner(*args, **kwargs)
        given = self._by_name(args, kwargs)
        reason = self._obstacle(given)
        if reason is None:
            queued = self._queued(given)
            call = self._call(given, queued)
            parts = (part.__dict__.get(_FORWARD) for part in self.module._modules.values() if part is not None)
            with ahead((inner, *parts)):
                batch = queued.read()
                reason = self._unfit(batch)
                if reason is None:
                    return self._run(inner, call, queued, batch)
        self.settings["calls"].leave(reason)
        return inner(*args, **kwargs)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what the model's own forward takes."""
        if self._parameters is None:
            self._parameters = tuple(self.__signature__.parameters)
        return self._parameters

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def _obstacle(self, given: dict[str, Any]) -> str | None:
        """Why a call runs as it was, as far as its arguments tell without waiting for the device."""
        settings = self.settings
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        ids = given.get("inputs_embeds") if ids is None else ids
        if mask is None:
            return "no attention_mask"
        if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.dim() != 2 or mask.shape != ids.shape[:2]:
            shape = f" of shape {list(mask.shape)}" if isinstance(mask, Tensor) else ""
            return f"an attention_mask{shape} that is not one number per token"
        if not mask.numel():
            return "a batch of nothing"
        if not is_plain(mask, ids):
            return "tensors of a class of their own"
        for name, value in given.items():
            if value is None or name == "attention_mask" or name in _PLAIN or name in _PER_TOKEN:
                continue
            if name == "labels" and (not settings["labels"] or value.shape == mask.shape):
                continue
            if name in _WITHOUT_CACHE and isinstance(value, (bool, int)) and not value:
                continue
            return f"the argument {name}"
        types, positions = given.get("token_type_ids"), given.get("position_ids")
        if types is not None and types.shape != mask.shape:
            return f"token_type_ids of shape {list(types.shape)} for a mask of shape {list(mask.shape)}"
        if positions is not None and positions.shape not in (mask.shape, (1, mask.shape[1]), mask.shape[1:]):
            return f"position_ids of shape {list(positions.shape)} for a mask of shape {list(mask.shape)}"
        silent = given.get("use_cache") is None and given.get("labels") is None
        if settings["caches"] and silent and not torch.is_grad_enabled():
            return "a key/value cache is returned; use_cache=False if it is not wanted"
        return None

    def _queued(self, given: dict[str, Any]) -> Queued:
        """All that a packed call is given, one number for each place, before it is known how many are packed."""
        settings, mask, ids = self.settings, given["attention_mask"], given.get("input_ids")
        device = (given["inputs_embeds"] if ids is None else ids).device
        labels = given.get("labels") if settings["labels"] else None
        tokens = Tokens(
            ids,
            given.get("token_type_ids"),
            labels if labels is None else labels.to(device),
            given.get("position_ids"),
        )
        # Where texts begin: those of the batch, the rest in pieces, and of no tokens as many as make up the number.
        pieces = -(-step(mask.numel(), settings["lengths"]) // LONGEST_PIECE)
        self._sequences = max(self._sequences, mask.shape[0] + pieces)
        return Queued(mask.to(device), tokens, self._form, self._sequences)

    def _unfit(self, batch: Batch) -> str | None:
        """Why a batch is not packed."""
        size = batch.size
        if not batch.tokens or (batch.texts < batch.shape[0] and not self.settings["empty"]):
            return "a row without a token"
        if batch.tokens == size:
            return "a mask without padding"
        if bucket(batch.tokens, self.settings["lengths"]) >= size:
            return "next to no padding"
        if batch.stray:
            return "a label that counts is predicted at padding; label it -100"
        if batch.pieces > batch.texts:
            return "padding inside of a row, between tokens"
        if batch.begins != batch.texts and not self.settings["left"]:
            return "padding at the beginning of a row, where this model's output is read"
        return None

    def _call(self, given: dict[str, Any], queued: Queued) -> dict[str, Any]:
        """What a packed call is given, as far as it does not depend on what is read."""
        call = {name: value for name, value in given.items() if value is not None}
        if self.settings["caches"] and "use_cache" in self.parameters:
            call["use_cache"] = False
        # Attention is told by the offsets. One that does not read them must not go unnoticed: it gets numbers that are none.
        call["attention_mask"] = _no_mask(queued.packed.source.device)
        call["cu_seq_lens_q"] = call["cu_seq_lens_k"] = queued.packed.offsets
        return call

    def _run(self, inner: Callable[..., Any], call: dict[str, Any], queued: Queued, batch: Batch) -> Any:
        """From the arrival of the numbers to what ``inner`` launches the device waits: here is nothing but views."""
        packing = pack(queued, batch, self.settings["lengths"])
        shape, strides = (1, packing.length), (packing.length, 1)
        for name, x in zip(_TOKENS, queued.packed.tokens, strict=True):
            if x is not None:
                call[name] = x.as_strided(shape, strides)
        if "inputs_embeds" in call:
            call["inputs_embeds"] = packing.packed(call["inputs_embeds"])
        self._longest = max(self._longest, _LONGEST, 1 << (batch.longest - 1).bit_length())
        call["max_length_q"] = call["max_length_k"] = self._longest
        with _packed(packing):
            output = inner(**call)
        self.settings["calls"].pack(packing)
        return packing.padded_everywhere(output)


class PaddedInput(Wrapping):
    """Stands on a part that makes one vector of a text, such as BERT's pooler: a packed call gives it padded tokens."""

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        packing = None if torch.compiler.is_compiling() else current_packing()
        if packing is not None and isinstance(hidden_states, Tensor) and hidden_states.shape[:2] == (1, packing.length):
            hidden_states = packing.padded(hidden_states)
        return self.inner(hidden_states, *args, **kwargs)
