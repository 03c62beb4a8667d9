"""Which backend computes the attention of each module that transformers' interface reaches: found, proven, timed, routed.

A site is a module whose ``forward`` looks a function up in transformers' ``AttentionInterface`` by its configuration's name; no
model is known by name. What it hands to that function (heads, head size, scale, causality, dropout, window) is seen by running
a copy of it that shares its parameters, and the copy must give the same numbers when it is told another name.

What is timed is the function alone, at three lengths of the same number of tokens, without a mask and with one of padding,
forward, and with backward under the dropout that the module trains with. The nearest length decides in a call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, Scope, decide, dtypes_to_decide, placement, random, refuse
from oslo_fusion.kernels.attention_routing import SDPA, Noted, Observer, RoutedConfig, Routing, Rule
from oslo_fusion.kernels.norm_sites import ROOM
from oslo_fusion.kernels.rope_sites import sizes_of
from oslo_fusion.ops.attention_backends import (
    BACKENDS,
    CUDNN,
    FLASH,
    OURS,
    PACKED,
    Case,
    obstacle,
    packed_obstacle,
    run,
    run_packed,
    torch_obstacle,
)
from oslo_fusion.ops.kernels import missing
from oslo_fusion.plan import WINNING_FRACTION, Proposal, Site, Swap, Taken, Timing, leave

KIND = "attention through transformers' interface"
GLOBAL = "ALL_ATTENTION_FUNCTIONS"
"""The global in which a forward looks its attention function up: transformers calls it so in all its modeling files."""

LENGTHS = (512, 2048)
"""Tokens of a text, at which backends are timed."""

_TOKENS = 16384
"""Of all texts together."""

_PROVEN = (3, 45)  # samples, tokens: rows of a mask that are no multiple of 16 bytes
_OBSERVED = (2, 9)
_BEFORE = "scaled_dot_product_attention, as torch chooses"
_CROSS = ("encoder_hidden_states", "key_value_states")


# --- recognition -------------------------------------------------------------------------------------------------------------


def is_site(module: nn.Module) -> bool:
    """Whether the module's own ``forward`` looks its attention up by the name that its ``config`` gives."""
    if not hasattr(module.__dict__.get("config"), "_attn_implementation"):
        return False
    try:
        function = inspect.unwrap(type(module).forward)
    except ValueError:
        return False
    return isinstance(function, FunctionType) and _names(function.__code__) and _is_interface(function.__globals__.get(GLOBAL))


def _names(code: CodeType) -> bool:
    return GLOBAL in code.co_names or any(isinstance(inner, CodeType) and _names(inner) for inner in code.co_consts)


def _is_interface(found: object) -> bool:
    """Whether it is transformers' mapping, whose ``sdpa`` is transformers' own."""
    # Imported here: a module that has this global has imported transformers, and no other comes so far.
    from oslo_fusion.kernels.attention_interface import is_interface

    return is_interface(found)


@dataclass(frozen=True)
class Facts:
    """What a module hands to its attention function.

    Attributes:
        heads, kv_heads, dim: of q; of k and v; of all.
        groups: heads of q for each of k, as the module says.
        scale: of ``q · k``.
        causal: without a mask.
        dropout: in training.
        window: how many keys a query sees, itself included, in packed sequences; None for all.
    """

    heads: int
    kv_heads: int
    dim: int
    groups: int
    scale: float
    causal: bool
    dropout: float
    window: int | None

    def __str__(self) -> str:
        groups = f" over {self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{self.heads} heads{groups} of {self.dim}{', causal' if self.causal else ''}, dropout {self.dropout:g}"


def observe(module: Any, device: torch.device, dtype: torch.dtype) -> Facts | str:
    """Run a copy of the module and see what reaches its attention function; or why that cannot be."""
    observer, results = Observer(), []
    try:
        with torch.no_grad(), probe.preserved_random_state(), torch.autocast(device.type, enabled=False):
            shadow: Any = probe.shadow(module).eval()
            arguments = _arguments(shadow, device, dtype)
            results.append(shadow(**arguments)[0])
            shadow.config = RoutedConfig(shadow, {"routing": observer})
            results.append(shadow(**arguments)[0])
            shadow.train()(**arguments)
    except torch.OutOfMemoryError:
        return "there is not enough free memory to try it"
    except Exception as error:
        return f"cannot be run alone: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if len(observer.calls) != 2:
        return f"its forward calls the attention function {len(observer.calls) // 2} times"
    if not torch.equal(*results):
        return "its forward does something else under another attention function"
    (q, k, v), given = observer.calls[1]
    if given["bias"] is not None:
        return "it has a position bias"
    if k.shape != v.shape or q.shape[3] != k.shape[3]:
        return f"head sizes that differ: q {q.shape[3]}, k {k.shape[3]}, v {v.shape[3]}"
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    scale = given["scaling"] if given["scaling"] is not None else dim**-0.5
    groups = getattr(module, "num_key_value_groups", 1)
    window = given.get("sliding_window")
    return Facts(heads, kv_heads, dim, groups, float(scale), given["causal"], float(given["dropout"]), window)


def _arguments(module: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Random input for a module that is run alone, by the names of what it takes."""
    first = next((p for p in module.modules() if isinstance(p, nn.Linear)), None)
    # transformers' Conv1D, which GPT-2 has, is not asked for its width: its configuration knows it.
    width = first.in_features if first is not None else module.config.hidden_size
    samples, tokens = _OBSERVED
    x = random(samples, tokens, width, device=device, dtype=dtype)
    given: dict[str, Any] = {}
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    cross = getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__
    for number, parameter in enumerate(parameters):
        if number == 0 or (parameter.name in _CROSS and cross):
            given[parameter.name] = x
        elif parameter.name == "position_embeddings":
            sizes = sizes_of(module)
            if sizes is None:
                raise ValueError("neither it nor its configuration says how many of its numbers are rotated")
            angle = random(1, tokens, sizes.rot_dim, device=device, dtype=torch.float32)
            given[parameter.name] = (angle.cos().to(dtype), angle.sin().to(dtype))
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            given[parameter.name] = None  # a mask, a cache
    return given


# --- proposals ---------------------------------------------------------------------------------------------------------------


def propose_routes(model: nn.Module, scope: Scope, taken: Taken, but: set[str]) -> Iterator[Proposal]:
    """A proposal for each site of a model.

    Args:
        model: read, never written.
        scope: of this planning run.
        taken: what earlier passes have claimed.
        but: paths of modules that are brought in another way.
    """
    for path, module in model.named_modules():
        if path not in but and is_site(module):
            yield leave(_propose(path, module, scope), taken)


def _propose(path: str, module: Any, scope: Scope) -> Proposal:
    site = Site(path, KIND, type(module).__name__)
    placed, packed = placement(module), scope.config.padding_free
    if placed is None:
        return refuse(ROOM, site, _BEFORE, "it has no parameters to tell its device and dtype by")
    device, dtype = placed
    if device.type == "meta":
        return refuse(ROOM, site, _BEFORE, "it has no memory yet (meta device)")
    if any(p.device != device for p in module.parameters()):
        return refuse(ROOM, site, _BEFORE, "its parameters are on different devices")
    if "forward" in module.__dict__:
        return refuse(ROOM, site, _BEFORE, "its forward was replaced on the instance")
    if module.config._attn_implementation != SDPA:
        return refuse(ROOM, site, _BEFORE, f"attn_implementation is {module.config._attn_implementation!r}, not {SDPA!r}")
    here = {backend: _first_obstacle(backend, device, dtype, scope) for backend in BACKENDS}
    if not packed and all(here.values()):
        reason = here[OURS] if device.type != "cuda" else "; ".join(f"{name}: {why}" for name, why in here.items())
        return refuse(ROOM, site, _BEFORE, reason)
    facts = observe(module, device, dtype)
    if isinstance(facts, str):
        return refuse(ROOM, site, _BEFORE, facts)
    key = (KIND, facts, device, dtype)
    decision: Decision = scope.once(key, lambda: _decide(facts, device, dtype, scope, site))
    if decision.routing is None:
        return replace(refuse(ROOM, site, _BEFORE, decision.reason), timings=decision.timings)
    swap = Swap(path, RoutedConfig, {"routing": decision.routing}, "config", replaces=True)
    return Proposal(
        site=site,
        room=ROOM,
        before=_BEFORE,
        after=decision.after,
        outcome="fused",
        reason=decision.reason,
        claims=(f"{path}.config" if path else "config",),
        swaps=(swap,),
        timings=decision.timings,
        runtime=decision.routing.noted,
    )


def _first_obstacle(backend: str, device: torch.device, dtype: torch.dtype, scope: Scope) -> str:
    """What keeps a backend from everything on this device, before anything is known of the module."""
    found = ""
    for decided in dtypes_to_decide(device, dtype):
        found = obstacle(backend, Case(device.type, decided, 1, 1, 64), scope.config.kernel)
        if not found:
            return ""
    return found


@dataclass(frozen=True)
class Decision:
    """What was decided for all modules of one kind; without a routing they are left as they are."""

    reason: str
    after: str = ""
    routing: Routing | None = None
    timings: tuple[Timing, ...] = ()


def _decide(facts: Facts, device: torch.device, dtype: torch.dtype, scope: Scope, site: Site) -> Decision:
    trial = _Trial(facts, device, dtype, scope.config)
    rules: list[Rule] = []
    supported = [d for d in dtypes_to_decide(device, dtype) if d in (torch.float32, *HALF)]
    try:
        for decided in supported:
            for masked in (False, True):
                rules += trial.rules(decided, masked)
        packed = [pair for decided in supported for pair in trial.packed(decided)] if trial.packs else []
    except torch.OutOfMemoryError:
        return Decision("there is not enough free memory to try it")
    taken = [rule for rule in rules if any(backend != SDPA for _, backend in rule.winners)]
    names = sorted({backend for rule in taken for _, backend in rule.winners if backend != SDPA}, key=BACKENDS.index)
    reason = trial.reason(bool(taken))
    if not taken and not trial.packs:
        return Decision(reason, timings=tuple(trial.timings))
    after = [f"{', '.join(names)}, chosen by length"] if names else []
    after += ["packed sequences by " + (", ".join(dict.fromkeys(name for _, name in packed)) or "plain PyTorch")] * trial.packs
    noted = Noted(reason, site, ROOM)
    routing = Routing(device.type, facts.dim, tuple(taken), tuple(packed), noted)
    return Decision(reason, "; ".join(after), routing, tuple(trial.timings))


@dataclass(frozen=True)
class _Candidate:
    """A backend for one case, and the modes in which it can serve."""

    backend: str
    inference: bool
    training: bool


class _Trial:
    """Proves and times the backends for the modules of one kind."""

    def __init__(self, facts: Facts, device: torch.device, dtype: torch.dtype, config: FusionConfig) -> None:
        self.facts, self.device, self.config = facts, device, config
        self.mixed = dtype == torch.float32 and device.type == "cuda"  # then bfloat16 stands for float16 too
        self.packs, self.compiled = config.padding_free, config.aot is not None
        self.timings: list[Timing] = []
        self.figures: list[str] = []
        self.refused: dict[str, str] = {}
        self.module = SimpleNamespace(num_key_value_groups=facts.groups, is_causal=facts.causal)

    # --- what is run ---

    def before(self, mask: Tensor | None, dropout: float) -> probe.Functions:
        """transformers' function, as the module calls it; dropout where there will be a backward."""
        from oslo_fusion.kernels.attention_interface import as_it_was

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            p = dropout if torch.is_grad_enabled() else 0.0
            out: Tensor = as_it_was(self.module, q, k, v, mask, dropout=p, scaling=self.facts.scale)
            return out

        return function

    def after(self, backend: str, mask: Tensor | None, dropout: float) -> probe.Functions:
        """The same by one backend."""
        causal = self.facts.causal and mask is None

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            p = dropout if torch.is_grad_enabled() else 0.0
            out = run(backend, q, k, v, scale=self.facts.scale, causal=causal, mask=mask, dropout=p)
            return out.transpose(1, 2).contiguous()

        return function

    def inputs(self, samples: int, tokens: int) -> Callable[[torch.dtype], list[Tensor]]:
        """Random q, k and v as projections give them: ``[batch, tokens, heads, dim]``, transposed."""
        facts = self.facts

        def make(dtype: torch.dtype) -> list[Tensor]:
            heads = (facts.heads, facts.kv_heads, facts.kv_heads)
            return [random(samples, tokens, h, facts.dim, device=self.device, dtype=dtype).transpose(1, 2) for h in heads]

        return make

    def mask(self, samples: int, tokens: int, left: bool = False) -> Tensor:
        """Padding up to half of a text, as transformers makes it; on the left there are rows that see nothing."""
        lengths = torch.linspace(tokens, math.ceil(tokens / 2), samples, device=self.device).long()
        token = torch.arange(tokens, device=self.device)
        seen = token >= tokens - lengths[:, None] if left else token < lengths[:, None]
        if not self.facts.causal:
            return seen[:, None, None, :].expand(samples, 1, tokens, tokens)
        return seen[:, None, None, :] & (token[:, None] >= token)

    # --- unpacked ---

    def rules(self, dtype: torch.dtype, masked: bool) -> list[Rule]:
        """Who computes this dtype, with a mask or without, in both modes."""
        candidates = self.candidates(dtype, masked)
        if not candidates:
            return []
        winners: dict[bool, list[str]] = {False: [], True: []}
        if self.config.autotune == "off":
            for training in winners:
                able = [c.backend for c in candidates if (c.training if training else c.inference)]
                winners[training] = [able[0] if able else SDPA]
            lengths: tuple[int, ...] = (0,)
        else:
            lengths = LENGTHS
            for tokens in lengths:
                for training, backend in self.race(dtype, masked, tokens, candidates).items():
                    winners[training].append(backend)
        covered = HALF if dtype in HALF and self.mixed else (dtype,)
        return [
            Rule(each, training, masked, _merged(lengths, tuple(backends)))
            for training, backends in winners.items()
            for each in covered
        ]

    def candidates(self, dtype: torch.dtype, masked: bool) -> list[_Candidate]:
        """The backends that can serve this, in order, each proven to compute the same."""
        facts, kernel = self.facts, self.config.kernel
        found: list[_Candidate] = []
        plain = Case(
            self.device.type, dtype, facts.heads, facts.kv_heads, facts.dim, facts.causal and not masked, 0.0, masked, False
        )
        trained = replace(plain, dropout=facts.dropout, training=True)
        for backend in BACKENDS:
            trained_by = [c.backend for c in found if c.training]
            if backend == OURS and not masked and (CUDNN in trained_by or (FLASH in trained_by and not facts.dropout)):
                # Its kernels take half a minute to compile. Flash draws dropout's numbers twice, ours once.
                self.refused.setdefault(OURS, "without a mask, where cuDNN and flash without dropout are faster")
                continue
            why = [obstacle(backend, case, kernel) or torch_obstacle(backend, case, self.device) for case in (plain, trained)]
            for reason in why:
                if reason:
                    self.refused.setdefault(backend, reason)
            if all(why):
                continue
            reason = self.proof(backend, dtype, masked, not why[1])
            if reason:
                self.refused[backend] = reason
            else:
                found.append(_Candidate(backend, not why[0], not why[1]))
        return found

    def proof(self, backend: str, dtype: torch.dtype, masked: bool, training: bool) -> str:
        """Why a backend is not the same as what ran before; empty if it is."""
        for left in (False, True) if masked else (False,):
            mask = self.mask(*_PROVEN, left) if masked else None
            make = self.inputs(*_PROVEN)
            before, after = self.before(mask, 0.0), self.after(backend, mask, 0.0)
            verdict = decide((KIND, backend), before, after, make, make, (dtype,), "off", training=training)
            if not verdict.fused:
                return verdict.reason
        return ""

    def race(self, dtype: torch.dtype, masked: bool, tokens: int, candidates: list[_Candidate]) -> dict[bool, str]:
        """The fastest at one length, in inference and in training."""
        samples, facts = max(1, _TOKENS // tokens), self.facts
        mask = self.mask(samples, tokens) if masked else None
        best: dict[bool, tuple[float, str]] = {}
        told: dict[bool, list[str]] = {False: [], True: []}
        for candidate in candidates:
            timing = probe.time_pair(
                (ROOM, KIND, candidate.backend, "masked" if masked else "plain", facts),
                self.before(mask, facts.dropout if candidate.training else 0.0),
                self.after(candidate.backend, mask, facts.dropout),
                lambda: self.inputs(samples, tokens)(dtype),
                autotune=self.config.autotune,
                training=candidate.training,
            )
            self.timings.append(timing)
            for training, able, before, after in (
                (False, candidate.inference, timing.inference_before, timing.inference_after),
                (True, candidate.training, timing.training_before, timing.training_after),
            ):
                if not able or before is None or after is None:
                    continue
                if not told[training]:
                    told[training].append(f"{SDPA} {before:.0f}")
                    if not self.compiled:
                        best[training] = (WINNING_FRACTION * before, SDPA)
                told[training].append(f"{candidate.backend} {after:.0f}")
                if training not in best or after < best[training][0]:
                    best[training] = (after, candidate.backend)
        for training, figures in told.items():
            if figures:
                what = f"{_short(dtype)}{', padded' if masked else ''}{', with backward' if training else ''}"
                winner = best[training][1]
                self.figures.append(f"{what}, {samples}×{tokens}: {winner} ({', '.join(figures)} µs)")
        return {training: best[training][1] if training in best else SDPA for training in (False, True)}

    # --- packed ---

    def packed(self, dtype: torch.dtype) -> list[tuple[torch.dtype, str]]:
        """Who computes packed sequences of this dtype; nothing where no kernel can, and the reference serves."""
        facts = self.facts
        case = Case(self.device.type, dtype, facts.heads, facts.kv_heads, facts.dim, facts.causal, facts.dropout, training=True)
        able = []
        for backend in PACKED:
            reason = packed_obstacle(backend, case, self.config.kernel) or torch_obstacle(backend, case, self.device)
            reason = reason or self.packed_proof(backend, dtype)
            if reason:
                self.refused.setdefault(f"{backend} packed", reason)
            else:
                able.append(backend)
        if len(able) > 1 and self.config.autotune != "off":
            # Where both are as fast, the first.
            able = [self.packed_race(dtype, able[0], able[1])]
        covered = HALF if dtype in HALF and self.mixed else (dtype,)
        return [(each, able[0]) for each in covered] if able else []

    def pack(self, samples: int, tokens: int) -> tuple[Tensor, int]:
        """Cumulative lengths of texts that fill half of their rows to all of it; and how many tokens they are."""
        lengths = torch.linspace(tokens, math.ceil(tokens / 2), samples).long()
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return offsets.to(self.device, torch.int32), int(offsets[-1])

    def packed_after(self, backend: str, offsets: Tensor, longest: int, dropout: float) -> probe.Functions:
        """Packed sequences by one backend."""
        facts, lengths = self.facts, (longest, longest)

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            out = run_packed(
                backend,
                q,
                k,
                v,
                offsets,
                offsets,
                lengths,
                scale=facts.scale,
                causal=facts.causal,
                window=facts.window,
                dropout=dropout if torch.is_grad_enabled() else 0.0,
            )
            return out.contiguous().unsqueeze(0)

        return function

    def packed_proof(self, backend: str, dtype: torch.dtype) -> str:
        """Compare with transformers' function under a mask that keeps sequences apart."""
        offsets, tokens = self.pack(*_PROVEN)
        token = torch.arange(tokens, device=self.device)
        number = torch.bucketize(token, offsets[1:], right=True)
        distance = token[:, None] - token
        seen = number[:, None] == number
        if self.facts.causal:
            seen &= distance >= 0
        if self.facts.window is not None:
            seen &= distance.abs() < self.facts.window
        before, after = self.before(seen[None, None], 0.0), self.packed_after(backend, offsets, _PROVEN[1], 0.0)
        make = self.inputs(1, tokens)
        verdict = decide((KIND, backend, "packed"), before, after, make, make, (dtype,), "off")
        return "" if verdict.fused else verdict.reason

    def packed_race(self, dtype: torch.dtype, first: str, second: str) -> str:
        """The faster of two in training, at the shorter length."""
        samples = max(1, _TOKENS // LENGTHS[0])
        offsets, tokens = self.pack(samples, LENGTHS[0])
        functions = [self.packed_after(name, offsets, LENGTHS[0], self.facts.dropout) for name in (first, second)]
        timing = probe.time_pair(
            (ROOM, KIND, "packed", first, second, self.facts),
            functions[0],
            functions[1],
            lambda: self.inputs(1, tokens)(dtype),
            autotune=self.config.autotune,
        )
        self.timings.append(timing)
        winner = second if timing.wins_training else first
        figures = f"{first} {timing.training_before:.0f}, {second} {timing.training_after:.0f} µs"
        self.figures.append(f"{_short(dtype)}, packed, with backward, {tokens} tokens: {winner} ({figures})")
        return winner

    # --- in words ---

    def reason(self, taken: bool) -> str:
        """Why the modules are routed or not, with all figures, and why backends did not take part."""
        parts = [f"{self.facts}"]
        if self.packs:
            parts.append("kept for packed calls")
        if taken and self.compiled:
            parts.append("kept under memory_efficient_fusion: Inductor would be free to take attention apart")
        if self.config.autotune == "off":
            parts.append("same results; not timed (autotune: off)" if taken else "no backend can serve it")
        elif self.figures:
            parts.append(("measured " if taken else "not faster here: ") + "; ".join(self.figures))
        elif not taken and not self.packs:
            parts.append(missing("attention", self.device.type, self.config.kernel) if not self.refused else "no backend here")
        if self.refused and self.device.type == "cuda":
            parts.append("; ".join(f"not {name}: {why}" for name, why in self.refused.items()))
        return ". ".join(parts)


def _merged(lengths: tuple[int, ...], backends: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Limits between the lengths, half-way as their logarithms go, where the winner changes."""
    found: list[tuple[int, str]] = []
    for number, backend in enumerate(backends):
        last = number == len(backends) - 1
        if last or backends[number + 1] != backend:
            found.append((0 if last else math.isqrt(lengths[number] * lengths[number + 1]), backend))
    return tuple(found)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
