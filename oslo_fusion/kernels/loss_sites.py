"""Head and loss of language models: found through the model's own interface, proven on its own code, timed.

A site is a part of the model that takes ``labels`` and has a linear layer as output embedding: causal, masked and
sequence-to-sequence language models. How it gets from hidden states to the loss is not looked up: a copy that shares its
parameters is run with labels, once with logits and once with deferred ones (:mod:`oslo_fusion.kernels.deferred`), and the
losses, and the gradients of the head's input, weight and bias, must obey the law. The truth is the same code behind a head in
higher precision. A model that does something else to its logits never reaches a fused loss, and is refused.

This file imports no triton: the operator finds its kernels at the first CUDA tensor.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oslo_fusion import probe, rehearsal, surgery
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, random, refuse
from oslo_fusion.environment import Environment
from oslo_fusion.kernels.deferred import FORWARD, REPLICATE, DeferringHead, Frame, FusedForward, PlainReplica, framed
from oslo_fusion.ops.kernels import choices, missing
from oslo_fusion.ops.linear_cross_entropy import NAME, linear_cross_entropy
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Swap, Taken, Timing, leave

ROOM = "kernels"
KIND = "head and loss"
KERNEL_NAME = "FusedLinearCrossEntropy"

_BEFORE = "logits of all tokens, then cross entropy"
_DRAWS, _ROWS, _TOKENS = 8, 2, 9
_LOSSES = 32
"""Draws whose losses are compared. The error of a loss in half precision is one random number: with eight of them each, GPT-2's
fused loss was refused once for 2.3 times eager's error, though both round alike."""
_WORDS = 256  # drawn words whose gradients are compared, beside those of the labels
_TIMED_ROWS = 4096
_BYTES_PER_LOGIT = 24  # logits, a float32 copy, its softmax and their gradients, with room to spare


class LossPass:
    """Computes the loss of language models in training without their logits, where ``custom_cuda_kernels`` asks for it by name.

    ``all`` does not ask for it: the output of a training forward has None for logits then, which a training script may read.
    """

    name = ROOM
    kernels: tuple[str, ...] = (KERNEL_NAME,)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per language model in ``model``, or a refusal if there is none."""
        if KERNEL_NAME not in config.custom_cuda_kernels:
            return
        wish = Site(f"kernel_fusion.custom_cuda_kernels: {KERNEL_NAME}", "configuration", "-")
        if not config.enable:
            yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        sites = list(_language_models(model))
        for path, module, head_path in sites:
            yield leave(_propose(path, module, head_path, config.autotune, config.kernel), taken)
        if not sites:
            yield refuse(ROOM, wish, "-", f"no part of this {type(model).__name__} takes labels and has a linear head")


def _language_models(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path and module of every part with labels and a linear output embedding, and the latter's path in it."""
    for path, module in model.named_modules():
        find_head: Any = getattr(module, "get_output_embeddings", None)
        if find_head is None or "labels" not in _parameters(module):
            continue
        head = find_head()
        head_path = next((name for name, part in module.named_modules() if part is head), None)
        if head_path is not None and type(head) is nn.Linear:
            yield path, module, head_path


def _parameters(module: nn.Module) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(type(module).forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _propose(path: str, module: nn.Module, head_path: str, autotune: str, kernel: str) -> Proposal:
    head = module.get_submodule(head_path)
    assert isinstance(head, nn.Linear)
    full_path = f"{path}.{head_path}" if path else head_path
    site, device, dtype = Site(full_path, KIND, type(module).__name__), head.weight.device, head.weight.dtype
    if device.type == "meta":
        return refuse(ROOM, site, _BEFORE, "it has no memory yet (meta device)")
    for name, part in (("the model's", module), ("the head's", head)):
        if FORWARD in part.__dict__:
            return refuse(ROOM, site, _BEFORE, f"{name} forward was replaced on the instance")
    if dtype not in (torch.float32, *HALF):
        return refuse(ROOM, site, _BEFORE, f"no kernel for weights of {str(dtype).removeprefix('torch.')}")
    if not choices(NAME, device.type, kernel):
        return refuse(ROOM, site, _BEFORE, missing(NAME, device.type, kernel))
    # Without generate it is no causal model: then labels are set where a token was masked, and most rows have none.
    can_generate: Any = getattr(module, "can_generate", None)
    compact = not (can_generate is not None and can_generate())
    autocast = HALF if dtype == torch.float32 else ()
    settings = {"device": device.type, "dtypes": (dtype, *autocast), "compact": compact}
    timings: tuple[Timing, ...] = ()
    try:
        for cast in (None, *autocast[1:]):
            difference = find_difference(module, head_path, settings, cast)
            if difference is not None:
                return refuse(ROOM, site, _BEFORE, difference)
        reason = "same loss and gradients; not timed (autotune: off)"
        if autotune != "off":
            timing = _time(head, compact, autotune)
            timings, reason = (timing,), f"measured {timing}"
            if not timing.wins_training:
                refused = refuse(ROOM, site, _BEFORE, f"not faster here: {timing}")
                return Proposal(**{**vars(refused), "timings": timings})
    except torch.OutOfMemoryError:
        return refuse(ROOM, site, _BEFORE, "there is not enough free memory to try it")
    after = f"{NAME} in training, chunks of rows{', labelled ones only' if compact else ''}; logits are None then"
    swaps = _swaps(path, full_path, settings)
    claims = tuple(f"{swap.path}.{swap.attribute}".lstrip(".") for swap in swaps)
    return Proposal(site, ROOM, _BEFORE, after, "fused", reason, claims, swaps, timings)


def _swaps(path: str, head_path: str, settings: dict[str, Any]) -> tuple[Swap, ...]:
    return (
        Swap(path, FusedForward, settings, FORWARD),
        Swap(path, PlainReplica, {}, REPLICATE),
        Swap(head_path, DeferringHead, settings, FORWARD),
        Swap(head_path, PlainReplica, {}, REPLICATE),
    )


# --- proof -------------------------------------------------------------------------------------------------------------------


def find_difference(module: nn.Module, head_path: str, settings: dict[str, Any], autocast: torch.dtype | None) -> str | None:
    """Why the fused loss may not stand for the model's own, found by running a copy on random tokens; None if it may.

    Args:
        module: the language model.
        head_path: of its head.
        settings: as its donors get them.
        autocast: a dtype to run under.
    """
    twin = probe.shadow(module).eval()
    surgery.apply(twin, _swaps("", head_path, settings))
    weight = module.get_submodule(head_path).weight
    assert isinstance(weight, Tensor)
    device, vocab = weight.device, weight.shape[0]
    results: dict[str, list[list[Tensor]]] = {"defer": [], "observe": [], "exact": []}
    losses: dict[str, list[Tensor]] = {mode: [] for mode in results}
    with probe.preserved_random_state(), torch.enable_grad():
        for draw in range(1 if rehearsal.under_way() else _LOSSES):
            given = _batch(module, device)
            words = torch.cat([given["labels"].clamp(min=0).flatten(), torch.randint(0, vocab, (_WORDS,), device=device)])
            for mode, runs in results.items():
                frame = Frame(mode, settings["compact"], proving=True, exact_dtype=_higher(module, head_path))
                try:
                    with (
                        framed(frame),
                        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
                        _StayDouble() if mode == "exact" else contextlib.nullcontext(),
                    ):
                        loss = twin(**given).loss
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    return f"it cannot be run on random tokens: {str(error).splitlines()[0] if str(error) else type(error)}"
                if not isinstance(loss, Tensor) or loss.dim() or not frame.leaves:
                    return "its forward gives no loss through its head"
                if mode == "defer" and not frame.losses:
                    return "does more with its logits than cross entropy of them"
                losses[mode].append(loss.detach())
                if draw >= _DRAWS:
                    continue
                hidden, *head = torch.autograd.grad(loss, frame.leaves)
                # Whole gradients of a head of 128256 words, in double precision, side by side: more than 100 GB.
                runs.append([hidden, *(gradient[words] for gradient in head)])
    if rehearsal.under_way():
        return None
    names = ("loss", "gradient of the hidden states", "gradient of the weight", "gradient of the bias")
    columns = {mode: [losses[mode], *zip(*runs, strict=True)] for mode, runs in results.items()}
    for position, name in enumerate(names[: len(columns["defer"])]):
        ours, theirs, truth = (torch.cat([t.flatten() for t in columns[mode][position]]) for mode in results)
        # l2: of the losses, or of the few rows that the gradients consist of, the largest error is a matter of luck.
        comparison = probe.compare(ours, theirs, truth, "l2")
        if not comparison.same:
            return f"computes something else: {name} {comparison}"
    return None


class _StayDouble(TorchFunctionMode):
    """Lets ``logits.float()`` leave double precision as it is: the truth about float32 must not be rounded to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _higher(module: nn.Module, head_path: str) -> torch.dtype:
    weight = module.get_submodule(head_path).weight
    return torch.float64 if weight.dtype == torch.float32 else torch.float32


def _batch(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Random tokens and labels, some of which are ignored."""
    config: Any = module.config
    vocab = config.get_text_config(decoder=True).vocab_size if hasattr(config, "get_text_config") else config.vocab_size
    ids, labels = (torch.randint(0, vocab, (_ROWS, _TOKENS), device=device) for _ in range(2))
    labels[torch.rand(labels.shape, device=device) < 0.25] = -100
    labels[0, -2] = vocab - 1
    return {"input_ids": ids, "labels": labels}


# --- timing ------------------------------------------------------------------------------------------------------------------


def _time(head: nn.Linear, compact: bool, autotune: str) -> Timing:
    """Forward and backward of head and loss on as many rows as there is memory for, up to 4096."""
    device, dtype = head.weight.device, head.weight.dtype
    vocab, dim = head.weight.shape
    has_bias = isinstance(head.bias, Tensor)  # the annotation of nn.Linear does not say that it may be None
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
    rows = max(16, min(_TIMED_ROWS, free // 2 // (vocab * _BYTES_PER_LOGIT)))
    with probe.preserved_random_state():
        labels = torch.randint(0, vocab, (rows,), device=device)

    def before(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, *bias).float(), labels)

    def after(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias[0] if bias else None, compact=compact)

    def inputs() -> list[Tensor]:
        shapes = [(rows, dim), (vocab, dim), *([(vocab,)] if has_bias else [])]
        return [random(*shape, device=device, dtype=dtype) for shape in shapes]

    with torch.autocast(device.type, enabled=False):
        return probe.time_pair((KIND, vocab, has_bias, compact), before, after, inputs, autotune=autotune)
