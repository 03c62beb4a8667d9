"""Models that can be run without their padding: found by their interface, proven on a ragged batch.

A site is the ``forward`` of a model of transformers, or of the part below its head. Which, and how the model numbers its
tokens and shifts its labels, is not looked up: a copy that shares the parameters is run on small ragged batches, padded and
packed, and outputs, loss and gradients must obey the law. So attention that does not keep packed texts apart is noticed,
whatever the reason.

- One output per token, labels too (language models, token classification): all of it is packed, head and loss as well.
- One output per text (classification): the part below the head is packed, and a part of that which makes one vector of a text,
  as BERT's pooler, is given padded tokens again.
- A model without a head, and the encoder of an encoder-decoder: packed as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe, surgery
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, placement, refuse
from oslo_fusion.environment import Environment
from oslo_fusion.kernels.deferred import FORWARD, REPLICATE, PlainReplica
from oslo_fusion.kernels.loss_sites import KIND as LOSS
from oslo_fusion.kernels.norm_sites import ROOM
from oslo_fusion.kernels.padding import Calls, PaddedInput, PaddingFreeForward
from oslo_fusion.ops.pack_tokens import ATTENDED, COARSE, COLUMNS, FINE, IGNORED, NOWHERE, TEXT
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Swap, Taken

KIND = "padded batches"
KEY = "padding_free"

_BEFORE = "computes the padding"
_TOKENS = "one packed sequence, head and loss too"
_BODY = "one packed sequence below the head"
_SAME = "same outputs and gradients on ragged batches"
_DRAWS, _ATTEMPTS, _NEAR = 2, 3, 4.0
_LENGTHS = (23, 5, 9, 1, 14, 7)
"""Of the proof's texts: 59 tokens are packed into 64 places, less than half of the padded batch."""

_ATTENTION = "attention"  # in the kind of a site whose module is told, in a packed call, where texts begin
_COMPARED = 1 << 14  # numbers of one gradient
_LARGE = 1 << 28  # parameters
_KEPT_LAYERS = 2
LOSS_NAME = "loss"


class PaddingPass:
    """Packs padded batches where ``padding_free`` asks for it.

    It stands after all passes that put something on ``forward``, since it stands around that.
    """

    name = ROOM
    kernels: tuple[str, ...] = ()

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per model of transformers in ``model``, or a refusal if there is none."""
        if not config.padding_free:
            return
        wish = Site(f"kernel_fusion.{KEY}", "configuration", "-")
        if not config.enable:
            yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        found, lengths = list(_models(model)), COARSE if config.aot is not None and config.aot.cuda_graphs else FINE
        for path, module in found:
            yield _propose(path, module, taken, lengths)
        if not found:
            reason = f"no part of this {type(model).__name__} is a model of transformers that takes an attention_mask"
            yield refuse(ROOM, wish, "-", reason)


def _models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models of transformers that take tokens and a mask."""
    if "transformers" not in sys.modules:
        return  # then no module can be one of its models
    from transformers import PreTrainedModel

    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if inside or not isinstance(module, PreTrainedModel) or not {"input_ids", "attention_mask"} <= _parameters(module):
            continue
        found.append(path)
        yield path, module


def _parameters(module: nn.Module) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(type(module).forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _propose(path: str, module: nn.Module, taken: Taken, lengths: int) -> Proposal:
    site, place = Site(_join(path, FORWARD), KIND, type(module).__name__), placement(module)
    if place is None or place[0].type == "meta":
        return refuse(ROOM, site, _BEFORE, "it has no memory yet (meta device)" if place else "it has no parameters")
    if place[1] not in (torch.float32, *HALF):
        return refuse(ROOM, site, _BEFORE, f"its parameters are {str(place[1]).removeprefix('torch.')}")
    if FORWARD in module.__dict__:
        return refuse(ROOM, site, _BEFORE, "its forward was replaced on the instance")
    try:
        with probe.preserved_random_state():
            found = _find(path, module, taken)
    except torch.OutOfMemoryError:
        return refuse(ROOM, site, _BEFORE, "there is not enough free memory to try it")
    except Exception as error:  # whatever a model of nobody's library does with random tokens
        text = str(error).splitlines()
        return refuse(ROOM, site, _BEFORE, f"it cannot be run on random tokens: {text[0] if text else type(error).__name__}")
    if isinstance(found, str):
        return refuse(ROOM, site, _BEFORE, found)
    calls = Calls()
    settings = {**found.settings, "lengths": lengths, "calls": calls}
    part = _join(path, found.part)
    swaps = [Swap(part, PaddingFreeForward, settings, FORWARD)]
    swaps += [Swap(_join(part, reducer), PaddedInput, {}, FORWARD) for reducer in found.reducers]
    claimed = {(swap.path, swap.attribute) for proposal in taken.values() for swap in proposal.swaps}
    swaps += [Swap(s.path, PlainReplica, {}, REPLICATE) for s in swaps if (s.path, REPLICATE) not in claimed]
    site = Site(_join(part, FORWARD), KIND, type(module.get_submodule(found.part)).__name__)
    claims = (f"{site.path} without padding",)
    return Proposal(site, ROOM, _BEFORE, found.after, "fused", _SAME, claims, tuple(swaps), runtime=calls)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


# --- proof -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """How a model can be packed: which part of it, what it is told, and which of its parts are given padded tokens."""

    part: str
    settings: Mapping[str, Any]
    after: str
    reducers: tuple[str, ...] = ()


Arguments = dict[str, Tensor]
Label = Callable[[Arguments], None]
_Results = dict[str, list[Tensor]]


def _find(path: str, module: nn.Module, taken: Taken) -> _Found | str:
    """How this model can be packed, or why it can't."""
    plain: Any = _short(probe.shadow(module).eval())
    routed: Any = _short(probe.shadow(module).eval())
    surgery.apply(routed, (swap for swap, _ in _earlier(path, routed, taken)))
    odd = _odd_layer(module, [swap for swap, kind in _earlier(path, module, taken) if _ATTENTION in kind])
    if odd:
        return f"its attention is not done as in the first layers: {_join(path, odd)}"
    sample, whole_labels = _batches(plain, left=False)[0], "labels" in _parameters(module)
    shape = tuple(sample["attention_mask"].shape)
    pair = "decoder_input_ids" in _parameters(module)
    label: Label = functools.partial(_label, classes=plain.config.vocab_size, per_token=True) if pair else _unlabelled
    label(sample)
    with torch.no_grad():
        output = plain(**sample)
    logits, hidden = (getattr(output, name, None) for name in ("logits", "last_hidden_state"))
    caches = getattr(output, "past_key_values", None) is not None and not pair
    options: dict[str, Any] = {"labels": False, "caches": caches, "shifted": False, "empty": False, "lengths": FINE}
    part = ""
    if pair:
        part = next((name for name, x in plain.named_modules() if x is plain.get_encoder()), "")
        if not part:
            return "an encoder-decoder without an encoder of its own"
    elif isinstance(logits, Tensor) and whole_labels and logits.dim() == 3 and logits.shape[:2] == shape:
        options = {**options, "labels": True, "empty": True}
        label = functools.partial(_label, classes=logits.shape[-1], per_token=True)
    elif isinstance(logits, Tensor) and whole_labels and logits.dim() == 2 and logits.shape[0] == shape[0]:
        part = _below(plain)
        if not part:
            return "no part below its head takes tokens and a mask"
        label = functools.partial(_label, classes=logits.shape[1], per_token=False)
    elif not isinstance(hidden, Tensor) or hidden.shape[:2] != shape:
        return "its output is neither one per token or text with labels for it, nor hidden states"
    compiled = any(s.attribute == FORWARD for proposal in taken.values() for s in proposal.swaps if proposal.room != ROOM)
    if compiled and not options["labels"]:
        return "scope: model compiles all of its forward; scope: layer goes with it"
    site: Any = plain.get_submodule(part)
    reducers = _reducers(plain, site, sample)
    proof = _Proof(plain, routed, part, reducers, label)
    differences, found = [], None
    for trial in _trials(plain, site, options):
        difference = proof.difference(False, trial)
        if difference is not None:
            differences.append(difference)
            continue
        left = proof.difference(True, trial) is None
        if left or found is None:
            found = _Found(part, {**trial, "left": left}, _BODY if part else _TOKENS, reducers)
        # Padded on the right, columns and attended tokens have the same numbers, so there may be a rule that serves both sides;
        # but not where a part reads one column.
        if left or reducers:
            break
    if found is None:
        return f"computes something else, as where attention does not keep packed texts apart: {differences[0]}"
    return found


def _trials(model: Any, site: Any, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings in the order in which they are tried, the likely first."""
    pad = getattr(model.config, "pad_token_id", None)
    numbered = "position_ids" in _parameters(site)
    rules = [COLUMNS, ATTENDED, *([TEXT] if isinstance(pad, int) else [])] if numbered else [NOWHERE]
    can_generate: Any = getattr(model, "can_generate", None)
    causal = bool(can_generate is not None and can_generate())
    for shifted in (causal, not causal) if options["labels"] else (False,):
        for rule in rules:
            yield {**options, "shifted": shifted, "positions": rule, "pad": pad if isinstance(pad, int) else 0, "left": False}


def _earlier(path: str, model: nn.Module, taken: Taken) -> Iterator[tuple[Swap, str]]:
    """What earlier passes do to parts of this model, attention that is told where texts begin above all, and its kind."""
    prefix = f"{path}." if path else ""
    for proposal in {id(p): p for p in taken.values()}.values():
        if proposal.room != ROOM or proposal.site.kind == LOSS:
            continue
        for swap in proposal.swaps:
            inside = swap.path.removeprefix(prefix)
            if swap.path.startswith(prefix) and _has(model, inside):
                yield replace(swap, path=inside), proposal.site.kind


def _odd_layer(model: nn.Module, swaps: list[Swap]) -> str:
    """The path of a layer whose attention gets something else than the first layers', which are all that a proof may run."""
    for path, layers in _lists(model):
        given: list[set[tuple[str, type[Any]]]] = []
        for name, _ in layers.named_children():
            prefix = f"{_join(path, name)}."
            given.append({(s.path.removeprefix(prefix), s.donor) for s in swaps if s.path.startswith(prefix)})
        for number, changes in enumerate(given):
            if changes not in given[:_KEPT_LAYERS]:
                return f"{path}.{number}"
    return ""


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of more layers of one class than a proof of a large model keeps."""
    found = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return [(path, part) for path, part in found if len(part) > _KEPT_LAYERS and len({type(item) for item in part}) == 1]


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _short(model: nn.Module) -> nn.Module:
    """The model; of a large one its first layers, because the truth is a copy in higher precision."""
    if sum(p.numel() for p in model.parameters()) < _LARGE:
        return model
    for _, layers in _lists(model):
        del layers[_KEPT_LAYERS:]
    return model


def _below(model: nn.Module) -> str:
    """The path of the first part that takes tokens and a mask itself."""
    paths = (path for path, part in model.named_modules() if path and {"input_ids", "attention_mask"} <= _parameters(part))
    return next(paths, "")


def _reducers(model: Any, site: Any, batch: Arguments) -> tuple[str, ...]:
    """Children of a site that make something else of hidden states than one vector per token."""
    shape, found, handles = tuple(batch["attention_mask"].shape), [], []

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            took = bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 3 and tuple(args[0].shape[:2]) == shape
            if took and isinstance(output, Tensor) and tuple(output.shape[:2]) != shape:
                found.append(name)

        return look

    for name, child in site.named_children():
        handles.append(child.register_forward_hook(hook(name)))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _batches(model: Any, left: bool) -> list[Arguments]:
    """Ragged batches of random tokens, padded on the right, or on both sides."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    pad, device = getattr(model.config, "pad_token_id", None), next(model.parameters()).device
    pad = pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0
    batches = []
    for draw in range(_DRAWS):
        columns = torch.arange(max(_LENGTHS))
        lengths = torch.tensor(_LENGTHS)[:, None]
        # Texts on the left, in the middle and on the right: one that begins with padding never moves by a whole batch.
        begins = (columns[-1] + 1 - lengths) * torch.tensor([0, 2, 1, 2, 0, 1])[:, None] // 2 if left else 0 * lengths
        mask = ((columns >= begins) & (columns < begins + lengths)).long()
        ids = torch.randint(0, config.vocab_size - 1, mask.shape)
        ids += ids >= pad  # no text holds the padding token, by which some models number their tokens
        ids = torch.where(mask.bool(), ids, pad).roll(draw, 0)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.roll(draw, 0).to(device)})
    return batches


def _unlabelled(batch: Arguments) -> None:
    """What a model without labels is given."""


def _label(batch: Arguments, classes: int, per_token: bool) -> None:
    """Add labels: one per token, some of which are ignored, or one per text."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shape = ids.shape if per_token else ids.shape[:1]
    labels = torch.randint(0, max(classes, 2), shape, device=ids.device)
    if per_token:
        # The first token after padding counts nowhere: where labels are shifted, it would be predicted from padding.
        labels[:, 1:][mask[:, 1:] > mask[:, :-1]] = IGNORED
        labels[(mask == 0) | (torch.rand(shape, device=ids.device) < 0.2)] = IGNORED
        labels[mask.cumsum(1) == 2] = 0  # there is one for each text but the shortest
    batch["labels"] = labels.float() if classes == 1 else labels


class _Proof:
    """Padded and packed runs of one model on the same ragged batches.

    The law is asked of many numbers at once, because the error of a few is a matter of luck: of all layers' gradients of one
    name together, and, where ours is above the bound but near it, on other batches again. A loss is one number: it may be off
    by as much as an output is.

    Args:
        plain: a copy of the model as it is.
        routed: one with what earlier passes did.
        part, reducers: where the packed forward and the padded inputs stand.
        label: adds labels to a batch.
    """

    def __init__(self, plain: nn.Module, routed: nn.Module, part: str, reducers: tuple[str, ...], label: Label) -> None:
        self.plain, self.routed, self.part, self.reducers, self.label = plain, routed, part, reducers, label
        dtype = next(p.dtype for p in plain.parameters() if p.is_floating_point())
        higher = torch.float64 if dtype == torch.float32 else torch.float32
        self.exact = copy.deepcopy(plain).to(higher)
        self._runs: dict[tuple[bool, int], tuple[list[Arguments], list[_Results], list[_Results]]] = {}

    def difference(self, left: bool, settings: Mapping[str, Any]) -> str | None:
        """What is not the same, None if all is.

        Args:
            left: texts may begin with padding.
            settings: of the packed forward.
        """
        packed, calls = probe.shadow(self.routed), Calls()
        surgery.apply(packed, self._swaps({**settings, "left": left}, calls))
        for attempt in range(_ATTEMPTS):
            batches, theirs, truth = self._known(left, attempt)
            ours = [_results(packed, batch) for batch in batches]
            if calls.left:
                return f"the proof's batch was not packed: {next(iter(calls.left))}"
            found = _worst(ours, theirs, truth)
            if found is None:
                return None
            reason, excess = found
            if excess > _NEAR:
                break
        return reason

    def _swaps(self, settings: Mapping[str, Any], calls: Calls) -> Iterator[Swap]:
        yield Swap(self.part, PaddingFreeForward, {**settings, "calls": calls}, FORWARD)
        for reducer in self.reducers:
            yield Swap(_join(self.part, reducer), PaddedInput, {}, FORWARD)

    def _known(self, left: bool, attempt: int) -> tuple[list[Arguments], list[_Results], list[_Results]]:
        if (left, attempt) not in self._runs:
            batches = _batches(self.plain, left)
            for batch in batches:
                self.label(batch)
            theirs, truth = ([_results(model, batch) for batch in batches] for model in (self.plain, self.exact))
            self._runs[left, attempt] = batches, theirs, truth
        return self._runs[left, attempt]


def _results(model: Any, batch: Arguments) -> _Results:
    """Outputs where there is text, and gradients, by name; the layers' have one name."""
    mask = batch["attention_mask"].bool()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}  # labels of a regression
    results: _Results = {}
    with torch.enable_grad():
        output = model(**batch)
        for name, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                results[name] = [value[mask] if value.shape[:2] == mask.shape else value]
        score = output["loss"] if output.get("loss") is not None else _score(results)
        if parameters and score.requires_grad:
            gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    results.setdefault(f"gradient of {re.sub(r'[0-9]+', '#', name)}", []).append(gradient)
    return {name: [_sample(value.detach().flatten()) for value in values] for name, values in results.items()}


def _sample(numbers: Tensor) -> Tensor:
    """All of few numbers; of many some, evenly spaced: of MiniLM's 22 million gradients, comparing all took a CPU 52 s."""
    step = numbers.numel() // _COMPARED | 1  # odd, so that they are not all of one column
    return numbers[::step].clone() if step > 1 else numbers


def _score(results: _Results) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = [value for column in results.values() for value in column]
    return torch.stack([(v * torch.randn(v.shape, generator=generator).to(v.device, v.dtype)).sum() for v in values]).sum()


def _worst(ours: list[_Results], theirs: list[_Results], truth: list[_Results]) -> tuple[str, float] | None:
    """What obeys the law least, and how many times its bound its error is; None if all obeys it."""
    if ours[0].keys() != theirs[0].keys():
        return f"other outputs or gradients: {', '.join(sorted(ours[0].keys() ^ theirs[0].keys()))}", float("inf")
    columns = {
        name: [torch.cat([value for run in runs for value in run[name]]) for runs in (ours, theirs, truth)] for name in ours[0]
    }
    norms = {name: float(torch.linalg.vector_norm(column[2].double())) for name, column in columns.items()}
    whole = max((norm for name, norm in norms.items() if name.startswith("gradient")), default=0.0)
    outputs = [column for name, column in columns.items() if name != LOSS_NAME and not name.startswith("gradient")]
    worst: tuple[str, float] | None = None
    for name, column in columns.items():
        comparison = probe.compare(column[0], column[1], column[2], "l2")
        bound = comparison.bound
        if name == LOSS_NAME and outputs and bound:
            bound = max(bound, *(float((out[1] - out[2]).double().square().mean().sqrt()) for out in outputs))
        elif name.startswith("gradient") and bound and comparison.theirs >= norms[name]:  # zero but for rounding
            bound = max(bound, torch.finfo(column[1].dtype).eps * whole)
        excess = comparison.ours / bound if bound else float(not comparison.same) * float("inf") if comparison.ours else 0.0
        if excess > 1 and (worst is None or excess > worst[1]):
            worst = f"{name}: {comparison}", excess
    return worst
