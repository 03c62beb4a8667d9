"""The generation room's pass: one site per part of the model that generates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe, rehearsal
from oslo_fusion.config import FusionConfig
from oslo_fusion.environment import Environment
from oslo_fusion.ops.kernels import choices, missing
from oslo_fusion.ops.no_repeat_ngram import NAME
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Swap, Taken, Timing, leave

ROOM = "generation"
KIND = "n-gram blocking"
KERNEL_NAME = "FusedNoRepeatNGram"

_BEFORE = "transformers' n-gram processors"
_TIMED_ROWS, _TIMED_TOKENS, _USUAL_VOCAB = 8, 128, 32000
_PROVEN = ((1, 1, 1), (3, 7, 1), (4, 40, 2), (2, 40, 3), (2, 300, 3), (1, 3, 4))
"""Rows, tokens and n; with 5 different tokens nearly every window repeats."""


class GenerationPass:
    """Replaces the n-gram processors inside ``generate`` of the given model, for every way of asking for them."""

    name = ROOM
    kernels: tuple[str, ...] = (KERNEL_NAME,)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per generating model, if ``custom_cuda_kernels`` names ``FusedNoRepeatNGram`` or ``all``."""
        named = KERNEL_NAME in config.custom_cuda_kernels
        if not named and "all" not in config.custom_cuda_kernels:
            return
        wish = Site(f"kernel_fusion.custom_cuda_kernels: {KERNEL_NAME}", "configuration", "-")
        if not config.enable:
            yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        sites = list(_generating(model))
        for path, module in sites:
            yield leave(_propose(path, module, config), taken)
        if named and not sites:
            yield Proposal(wish, ROOM, "-", "-", "refused", f"no part of this {type(model).__name__} generates")


def _generating(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if "transformers" not in sys.modules:
        return  # then no module can be one of its models
    from transformers import GenerationMixin

    for path, module in model.named_modules():
        can_generate: Any = getattr(module, "can_generate", None)
        if issubclass(type(module), GenerationMixin) and can_generate is not None and can_generate():
            yield path, module


def _propose(path: str, module: nn.Module, config: FusionConfig) -> Proposal:
    from oslo_fusion.generation.no_repeat_ngram import METHOD, FusedLogitsProcessors

    site = Site(f"{path}.generate" if path else "generate", KIND, type(module).__name__)
    timings: tuple[Timing, ...] = ()

    def refuse(reason: str) -> Proposal:
        return Proposal(site, ROOM, _BEFORE, _BEFORE, "refused", reason, timings=timings)

    if not hasattr(type(module), METHOD):
        return refuse(f"this transformers has no {METHOD}")
    if not isinstance(module.__dict__.get(METHOD, None), (FusedLogitsProcessors, type(None))):
        return refuse(f"its {METHOD} was replaced on the instance")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return refuse("it has no memory yet (meta device)")
    kernels = choices(NAME, device.type, config.kernel)
    if not kernels:
        return refuse(missing(NAME, device.type, config.kernel))
    try:
        for kernel in kernels:
            difference = _find_difference(device, kernel)
            if difference is not None:
                return refuse(f"computes something else ({kernels[kernel]}): {difference}")
        if config.autotune == "off":
            kernel = next(iter(kernels))
            reason = "same results; not timed (autotune: off)"
        else:
            timed = {kernel: _time(device, _vocabulary(module), kernel, config.autotune) for kernel in kernels}
            kernel = min(timed, key=lambda name: timed[name].inference_after or float("inf"))
            timings = tuple(timed.values())
            figures = "; ".join(f"{kernels[name]} {timing}" for name, timing in timed.items())
            if not timed[kernel].wins_inference:
                return refuse(f"not faster here: {figures}")
            reason = f"measured {figures}"
    except torch.OutOfMemoryError:
        return refuse("there is not enough free memory to try it")
    except RuntimeError as error:
        return refuse(f"cannot be tried here: {str(error).splitlines()[0]}")
    swap = Swap(path, FusedLogitsProcessors, {"kernel": kernel}, METHOD)
    after = f"one launch ({kernels[kernel]})"
    return Proposal(site, ROOM, _BEFORE, after, "fused", reason, (site.path,), (swap,), timings)


def _vocabulary(module: nn.Module) -> int:
    config: Any = getattr(module, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else _USUAL_VOCAB


def _find_difference(device: torch.device, kernel: str) -> str | None:
    """Where our processors' scores differ from transformers' on small random texts, or None: the law here is equality."""
    from transformers import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor

    from oslo_fusion.generation.no_repeat_ngram import (
        FusedEncoderNoRepeatNGramLogitsProcessor,
        FusedNoRepeatNGramLogitsProcessor,
    )

    for rows, tokens, n in _PROVEN:
        with probe.preserved_random_state():
            ids = torch.randint(0, 5, (rows, tokens), device=device)
            source: Any = torch.randint(0, 5, (1, tokens), device=device)
            scores = torch.randn(rows, 11, device=device)
        kept = scores.clone()
        pairs = (
            (NoRepeatNGramLogitsProcessor(n), FusedNoRepeatNGramLogitsProcessor(n, kernel)),
            (EncoderNoRepeatNGramLogitsProcessor(n, source), FusedEncoderNoRepeatNGramLogitsProcessor(n, source, kernel)),
        )
        for theirs, ours in pairs:
            if not torch.equal(theirs(ids, scores), ours(ids, scores)) and not rehearsal.under_way():
                return f"{type(theirs).__name__}, n = {n}, {tokens} tokens"
            if not torch.equal(scores, kept):
                return f"{type(theirs).__name__} changed its input"
    return None


def _time(device: torch.device, vocab: int, kernel: str, autotune: str) -> Timing:
    from transformers import NoRepeatNGramLogitsProcessor

    from oslo_fusion.generation.no_repeat_ngram import FusedNoRepeatNGramLogitsProcessor

    theirs, ours = NoRepeatNGramLogitsProcessor(3), FusedNoRepeatNGramLogitsProcessor(3, kernel)

    def inputs() -> tuple[Tensor, Tensor]:
        scores = torch.randn(_TIMED_ROWS, vocab, device=device)
        return scores, torch.randint(0, vocab, (_TIMED_ROWS, _TIMED_TOKENS), device=device)

    def before(scores: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = theirs(ids, scores)
        return result

    def after(scores: Tensor, ids: Tensor) -> Tensor:
        return ours(ids, scores)

    return probe.time_pair((KIND, kernel), before, after, inputs, autotune=autotune, training=False)
