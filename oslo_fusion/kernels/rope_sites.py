"""Attention modules: their rotary embedding found by what it computes, proven, timed, and given the one kernel of rope.

transformers' attention modules rotate q and k with a function of their modeling file, ``apply_rotary_pos_emb``, which their
``forward`` looks up among the file's globals. Replacing that global would change every model of the process. Instead the donor
runs a copy of the ``forward`` that sees one name differently: the same code, whose globals answer that one name with our
rotation and every other name with whatever the file's globals hold at that moment.

Which rotation the function computes (pairs, how many cosines, layout, part of a head) is found by running it on random numbers,
in every process anew: a function that was replaced, or changed with the version of transformers, is not taken for another.

Dtypes are learned, not derived, as for norms. A *case* is the dtype of q and k, that of the cosines, and autocast's where that
is on.

This file imports no triton: the operator finds its kernels at the first CUDA tensor.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion import probe
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, Scope, Verdict, decide, placement, propose, random, refuse
from oslo_fusion.environment import Environment
from oslo_fusion.ops.kernels import choices, is_plain, missing
from oslo_fusion.ops.rope import dense_strides, memory_order, rope, rope_reference
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Taken, leave

ROOM = "kernels"
KIND = "rope"
KERNEL = "FusedRoPE"
GLOBAL = "apply_rotary_pos_emb"
"""The global whose meaning is found by its values: transformers calls it so in all its modeling files."""

Case = tuple[torch.dtype, torch.dtype, torch.dtype | None]
"""Dtype of q and k, of cos and sin, and of autocast where that is on."""

_TOKENS = (2, 2048)
_PROVEN_TOKENS = (2, 9)
_TENSORS = ("q", "k", "cos", "sin")
_OPTIONS = (("unsqueeze_dim",), ("position_ids", "unsqueeze_dim"), ("position_ids",), ())


@dataclass(frozen=True)
class Convention:
    """What a function ``(q, k, cos, sin[, position_ids][, unsqueeze_dim])`` computes.

    Attributes:
        options: names of its parameters after ``sin``.
        interleaved: pairs are neighbours.
        angles: ``full``: one cosine for each number; ``first half``: as many are given, and the first half is used, one for
            each pair; ``pairs``: one is given for each pair.
        partial: fewer cosines than numbers are allowed, and the rest passes through.
        contiguous: results are contiguous; otherwise they keep the memory order of their input.
        layouts: where the heads may be, 1 or 2, which is what ``unsqueeze_dim`` says.
        layout: where they are unless said.
    """

    options: tuple[str, ...]
    interleaved: bool
    angles: str
    partial: bool
    contiguous: bool
    layouts: tuple[int, ...]
    layout: int

    def __str__(self) -> str:
        return f"{'interleaved' if self.interleaved else 'rotate-half'}{', part of a head' if self.partial else ''}"

    def width(self, rot_dim: int) -> int:
        """The last dimension of cos for so many rotated numbers."""
        return rot_dim // 2 if self.angles == "pairs" else rot_dim

    def rotated(self, width: int) -> int:
        """How many numbers cosines of this width rotate."""
        return 2 * width if self.angles == "pairs" else width

    def meaning(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: int) -> tuple[Tensor, Tensor]:
        """In plain PyTorch, in the precision of the inputs."""
        return self._run(_reference, q, k, cos, sin, layout)

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: int, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """With our operator."""
        return self._run(functools.partial(rope, out_dtype=out_dtype), q, k, cos, sin, layout)

    def _run(
        self, rotate: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: int
    ) -> tuple[Tensor, Tensor]:
        if self.angles == "first half":
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half], sin[..., :half]
        options = {"interleaved": self.interleaved, "per_pair": self.angles != "full"}
        if layout == 1:
            return rotate(q, k, cos, sin, contiguous=self.contiguous, **options)
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, **options)
        return q.transpose(1, 2), k.transpose(1, 2)


def _reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, per_pair: bool, contiguous: bool = False
) -> tuple[Tensor, Tensor]:
    return rope_reference(q, k, cos, sin, interleaved, per_pair, False, contiguous, None)


# --- recognition -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def convention_of(function: FunctionType) -> Convention | str:
    """Which rotation a function computes, by running it on random numbers; or why it is none of ours.

    The generator is a local one and everything is on the CPU, so that this may happen in the first forward of a process that
    loaded a fused model.
    """
    parameters = list(inspect.signature(function).parameters.values())
    names = tuple(p.name for p in parameters)
    ordinary = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if names[:4] != _TENSORS or names[4:] not in _OPTIONS or not ordinary or any(p.default is p.empty for p in parameters[4:]):
        return f"its {GLOBAL} takes ({', '.join(map(str, parameters))}), not (q, k, cos, sin[, position_ids][, unsqueeze_dim])"
    for interleaved in (False, True):
        for angles in ("full", "first half", "pairs"):
            bare = Convention(names[4:], interleaved, angles, False, False, (), 0)
            found = {layout: orders for layout in (1, 2) if (orders := _matches(function, bare, layout, 12)) is not None}
            if not found:
                continue
            orders = set.intersection(*found.values())
            if not orders:
                return f"its {GLOBAL} returns tensors in an unusual memory order"
            order = "kept" if "kept" in orders else "contiguous"
            partly = [_matches(function, bare, layout, 8) for layout in found]
            partial = all(part is not None and order in part for part in partly)
            layout = parameters[-1].default if "unsqueeze_dim" in names else next(iter(found))
            return Convention(names[4:], interleaved, angles, partial, order == "contiguous", tuple(found), layout)
    return f"its {GLOBAL} computes none of the rotations known here"


def _matches(function: FunctionType, bare: Convention, layout: int, rot_dim: int) -> set[str] | None:
    """The memory orders, out of ``kept`` and ``contiguous``, of a function that computes this; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    orders = {"kept", "contiguous"}
    for angle_batch in (2, 1):
        width = bare.width(rot_dim)
        shapes = ((2, 5, 4, 12), (2, 5, 3, 12), (angle_batch, 5, width), (angle_batch, 5, width))
        q, k, cos, sin = (torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes)
        if layout == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        given = [t.clone() for t in (q, k, cos, sin)]
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                results = function(*given, **({"unsqueeze_dim": layout} if "unsqueeze_dim" in bare.options else {}))
        except Exception:
            return None
        if not isinstance(results, tuple) or len(results) != 2:
            return None
        if any(not torch.equal(a, b) for a, b in zip(given, (q, k, cos, sin), strict=True)):
            return None  # it works in place
        for result, truth, x in zip(results, bare.meaning(q, k, cos, sin, layout), (q, k), strict=True):
            if not isinstance(result, Tensor) or result.shape != truth.shape or not result.is_floating_point():
                return None
            if not torch.allclose(result.double(), truth, rtol=1e-5, atol=1e-5):
                return None
            kept = result.stride() == dense_strides(x.shape, memory_order(x.stride()))
            orders &= {name for name, holds in (("kept", kept), ("contiguous", result.is_contiguous())) if holds}
    return orders


@functools.lru_cache(maxsize=1024)
def _globals_used(code: CodeType) -> tuple[bool, bool]:
    """Whether the code, or a function inside it, reads the global, and whether it writes any."""
    reads = writes = False
    for instruction in dis.get_instructions(code):
        reads |= instruction.opname == "LOAD_GLOBAL" and instruction.argval == GLOBAL
        writes |= instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in ("globals", "exec", "eval"):
            writes = True
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _globals_used(constant)
            reads, writes = reads or inner[0], writes or inner[1]
    return reads, writes


def site_function(module: nn.Module) -> FunctionType | None:
    """The module's own ``forward``, bare of decorators, if it reads the global."""
    try:
        function = inspect.unwrap(type(module).forward)
    except ValueError:
        return None
    if not isinstance(function, FunctionType) or not _globals_used(function.__code__)[0]:
        return None
    return function


# --- the copy of a forward ---------------------------------------------------------------------------------------------------


class _LiveGlobals(dict[str, Any]):
    """Globals of a copied function: one name is ours, the others are looked up in the module's own when they are needed.

    CPython looks a global up with ``__missing__`` where the globals are a subclass of dict, instead of the shortcut that it
    takes for a plain one; so do 3.10 to 3.13, and a test holds it. A copy of the module's dictionary would show a function
    that was patched, or a flag that was set, later than the original does. The names with two underscores are copied, because
    the interpreter reads those (``__builtins__``, ``__package__``) past any override.
    """

    def __init__(self, live: dict[str, Any], name: str, value: object) -> None:
        super().__init__({key: given for key, given in live.items() if key.startswith("__") and key.endswith("__")})
        self[name] = value
        self.live = live

    def __missing__(self, name: str) -> Any:
        return self.live[name]


def with_global(function: FunctionType, name: str, value: object) -> FunctionType:
    """A copy of the function that sees this global with another value."""
    # The code is a copy too: the interpreter keeps in it what it has specialised, which the two would spoil for each other.
    copied = FunctionType(
        function.__code__.replace(),
        _LiveGlobals(function.__globals__, name, value),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__, copied.__qualname__, copied.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    copied.__dict__.update(function.__dict__)
    return copied


@dataclass(frozen=True)
class Rotation:
    """What was planned for a module: plain data, which is pickled with it.

    Attributes:
        convention: what its function computed when the plan was made.
        device: type of the device.
        inference, training: the output dtype in each case for which the kernel is used.
    """

    convention: Convention
    device: str
    inference: tuple[tuple[Case, torch.dtype], ...]
    training: tuple[tuple[Case, torch.dtype], ...]


class _Rotary:
    """Stands where a forward finds its function. Whatever was not planned is the function's own."""

    def __init__(self, function: FunctionType, rotation: Rotation) -> None:
        self.function, self.convention, self.device = function, rotation.convention, rotation.device
        self.inference, self.training = dict(rotation.inference), dict(rotation.training)

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
        if is_plain(q, k, cos, sin) and type(q) is type(k) is type(cos) is type(sin) is Tensor:
            layout = self.convention.layout if not rest and not named else self.said(rest, named)
            out_dtype = self.out_dtype(q, k, cos, sin, layout)
            if out_dtype is not None:
                return self.convention(q, k, cos, sin, layout, out_dtype)
        return self.function(q, k, cos, sin, *rest, **named)

    def said(self, rest: tuple[Any, ...], named: dict[str, Any]) -> int:
        """The layout that a call asks for, 0 if it asks for anything else."""
        if len(rest) > len(self.convention.options):
            return 0
        given = dict(zip(self.convention.options, rest, strict=False), **named)
        layout = given.pop("unsqueeze_dim", self.convention.layout)
        return layout if type(layout) is int and all(value is None for value in given.values()) else 0

    def out_dtype(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: int) -> torch.dtype | None:
        """The dtype of the results, or None if the kernel is not used."""
        convention = self.convention
        if layout not in convention.layouts or q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or sin.shape != cos.shape:
            return None
        if q.dtype != k.dtype or cos.dtype != sin.dtype or q.device.type != self.device:
            return None
        if not q.device == k.device == cos.device == sin.device:
            return None
        seq, rot_dim = q.shape[3 - layout], convention.rotated(cos.shape[2])
        if k.shape[0] != q.shape[0] or k.shape[3 - layout] != seq or k.shape[3] != q.shape[3]:
            return None
        if cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != seq:
            return None
        if rot_dim % 2 or rot_dim == 0 or rot_dim > q.shape[3] or (rot_dim < q.shape[3] and not convention.partial):
            return None
        if convention.contiguous and layout == 2 and not (q.is_contiguous() and k.is_contiguous()):
            return None
        table = self.inference
        if torch.is_grad_enabled():
            if cos.requires_grad or sin.requires_grad:
                return None
            if q.requires_grad or k.requires_grad:
                table = self.training
        kind = self.device
        return table.get((q.dtype, cos.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None))


@functools.lru_cache(maxsize=256)
def _fused_forward(function: FunctionType, rotate: FunctionType, rotation: Rotation) -> FunctionType | None:
    """The copy of a forward, once per process; None if its function is not what it was when the plan was made."""
    if not _globals_used(function.__code__)[0] or convention_of(rotate) != rotation.convention:
        return None
    return with_global(function, GLOBAL, _Rotary(rotate, rotation))


class FusedRoPEAttention(nn.Module):
    """Donor for an attention module: its own forward, with the rotation of q and k in one kernel."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        method = super().forward
        if torch.compiler.is_compiling() or not is_plain():
            return method(*args, **kwargs)
        function = getattr(method, "__func__", None)
        rotate = getattr(function, "__globals__", {}).get(GLOBAL)
        if type(function) is not FunctionType or type(rotate) is not FunctionType:
            return method(*args, **kwargs)
        fused = _fused_forward(function, rotate, self._oslo_fusion_settings["rotation"])
        return method(*args, **kwargs) if fused is None else fused(self, *args, **kwargs)


# --- decision ----------------------------------------------------------------------------------------------------------------


class RotaryPass:
    """Rotates q and k of attention modules in one kernel, where ``custom_cuda_kernels`` asks for it."""

    name = ROOM
    kernels: tuple[str, ...] = (KERNEL,)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per attention module whose forward calls the rotation, and a refusal if the model has none."""
        everything = "all" in config.custom_cuda_kernels
        if not everything and KERNEL not in config.custom_cuda_kernels:
            return
        wish = Site(f"kernel_fusion.custom_cuda_kernels: {KERNEL}", "configuration", "-")
        if not config.enable:
            yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        scope, found = Scope(config, environment), False
        for path, module in model.named_modules():
            function = site_function(module)
            if function is not None:
                found = True
                yield leave(_propose(path, module, function, scope), taken)
        if not everything and not found:
            yield refuse(ROOM, wish, "-", f"no module of this {type(model).__name__} calls {GLOBAL}")


@dataclass(frozen=True)
class Sizes:
    """Heads of q and of k, numbers in a head, and how many of them are rotated."""

    heads: int
    kv_heads: int
    dim: int
    rot_dim: int


def sizes_of(module: nn.Module) -> Sizes | None:
    """What the module or its configuration say of its heads; None if they do not say."""
    config = getattr(module, "config", None)

    def number(*names: str) -> int | None:
        for owner in (module, config):
            for name in names:
                value = getattr(owner, name, None)
                if type(value) is int and value > 0:
                    return value
        return None

    heads = number("num_heads", "num_attention_heads")
    dim, hidden = number("head_dim", "head_size"), number("hidden_size")
    if heads is None or (dim is None and hidden is None):
        return None
    dim = dim or (hidden or 0) // heads
    parameters = getattr(config, "rope_parameters", None)
    part = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    part = part or getattr(config, "partial_rotary_factor", None)
    rot_dim = int(dim * part) if isinstance(part, float) and 0.0 < part < 1.0 else dim
    rot_dim -= rot_dim % 2
    return Sizes(heads, number("num_key_value_heads", "num_kv_heads") or heads, dim, rot_dim) if rot_dim else None


def _propose(path: str, module: nn.Module, function: FunctionType, scope: Scope) -> Proposal:
    before = type(module).__name__
    site = Site(path, KIND, before)
    if "forward" in module.__dict__:
        return refuse(ROOM, site, before, "its forward was replaced on the instance")
    if type(module).forward is not function:
        return refuse(ROOM, site, before, "its forward is decorated, and a copy would run without the decoration")
    if _globals_used(function.__code__)[1]:
        return refuse(ROOM, site, before, "its forward may change the globals of its module")
    rotate = function.__globals__.get(GLOBAL)
    if type(rotate) is not FunctionType:
        return refuse(ROOM, site, before, f"its {GLOBAL} is no function: {type(rotate).__name__}")
    convention = convention_of(rotate)
    if isinstance(convention, str):
        return refuse(ROOM, site, before, convention)
    sizes, placed = sizes_of(module), placement(module)
    if sizes is None:
        return refuse(ROOM, site, before, "neither it nor its configuration says how many heads it has and how wide they are")
    if placed is None:
        return refuse(ROOM, site, before, "it has no parameters to tell its device and dtype by")
    device, dtype = placed
    if device.type == "meta":
        return refuse(ROOM, site, before, "it has no memory yet (meta device)")
    if dtype not in (torch.float32, *HALF):
        return refuse(ROOM, site, before, f"no kernel for weights of {str(dtype).removeprefix('torch.')}")
    if not choices("rope", device.type, scope.config.kernel):
        return refuse(ROOM, site, before, missing("rope", device.type, scope.config.kernel))
    if not convention.partial and sizes.rot_dim < sizes.dim:  # the part is cut out before the function is called
        sizes = Sizes(sizes.heads, sizes.kv_heads, sizes.rot_dim, sizes.rot_dim)
    key = (KIND, convention, rotate, sizes, device, dtype)  # nothing of the module's own: layers differ in their number
    decision = _Decision(rotate, convention, sizes, device, dtype, scope.config.autotune)
    verdict, rotation = scope.once(key, decision.result)
    after = f"{before} with rope, one Triton kernel ({convention})"
    return propose(ROOM, site, verdict, before, after, FusedRoPEAttention, {"rotation": rotation})


def case_groups(dtype: torch.dtype) -> tuple[tuple[Case, ...], ...]:
    """The cases that a site with weights of this dtype may meet, grouped by what is timed once: the first of each group.

    With float32 weights autocast makes q and k half, or leaves them float32 behind a norm, and the cosines are float32 as the
    embeddings are. float16 moves the same bytes as bfloat16, so it is proven and not timed.
    """
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    if dtype == fp32:
        return (
            ((fp32, fp32, None), (fp32, fp32, bf16), (fp32, fp32, fp16)),
            ((bf16, fp32, bf16), (fp16, fp32, fp16), (bf16, bf16, bf16), (fp16, fp16, fp16)),
        )
    return (((dtype, dtype, None), (dtype, fp32, None), (dtype, dtype, dtype), (dtype, fp32, dtype)),)


@contextlib.contextmanager
def _autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


@dataclass(frozen=True)
class _Decision:
    """Proves and times one rotation, in every case that it may meet, at the sizes of the module's own heads."""

    function: FunctionType
    convention: Convention
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    autotune: str

    def result(self) -> tuple[Verdict, Rotation]:
        """The verdict on the site, and what its donor needs."""
        tables: dict[str, dict[Case, torch.dtype]] = {"inference": {}, "training": {}}
        verdicts: list[Verdict] = []
        for group in case_groups(self.dtype):
            timed: Verdict | None = None
            for case in group:
                out_dtype = self.output_dtype(case)
                if out_dtype is None:
                    continue  # the original fails here, and goes on doing so
                verdict = self.decide(case, out_dtype, self.autotune if timed is None else "off")
                if timed is None or not verdict.fused:
                    verdicts.append(verdict)
                timed = timed or verdict
                for mode, table in tables.items():
                    if getattr(verdict, mode) and getattr(timed, mode):
                        table[case] = out_dtype
        rotation = Rotation(self.convention, self.device.type, *(tuple(table.items()) for table in tables.values()))
        if not verdicts:
            return Verdict("it cannot be run here"), rotation
        timings = tuple(timing for verdict in verdicts for timing in verdict.timings)
        inference, training = (frozenset(case[0] for case in tables[mode]) for mode in ("inference", "training"))
        return Verdict("; ".join(dict.fromkeys(v.reason for v in verdicts)), inference, training, timings), rotation

    @property
    def layout(self) -> int:
        """The layout that is proven and timed: the convention's own."""
        return self.convention.layout if self.convention.layout in self.convention.layouts else self.convention.layouts[0]

    def output_dtype(self, case: Case) -> torch.dtype | None:
        """What the original returns, or None if it cannot be run so, or returns two dtypes."""
        try:
            with torch.no_grad(), probe.preserved_random_state():
                q, k = self.before(case)(*self.inputs(_PROVEN_TOKENS, case[0]))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None
        return q.dtype if q.dtype == k.dtype else None

    def angles(self, case: Case) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """``cos`` and ``sin`` for a ``q``, the same at every call; rounded to the case's dtype, and wide for a wide ``q``."""
        made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def angles(q: Tensor) -> tuple[Tensor, Tensor]:
            batch, seq = q.shape[0], q.shape[3 - self.layout]
            if (batch, seq) not in made:
                width = self.convention.width(self.sizes.rot_dim)
                angle = 3 * random(batch, seq, width, device=self.device, dtype=torch.float32)
                made[batch, seq] = angle.cos().to(case[1]), angle.sin().to(case[1])
            cos, sin = made[batch, seq]
            return (cos.double(), sin.double()) if q.dtype == torch.float64 else (cos, sin)

        return angles

    def before(self, case: Case, angles: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None) -> probe.Functions:
        """The original; in float64 the truth, as some functions never compute in more than float32."""
        angles, layout = angles or self.angles(case), self.layout
        options = {"unsqueeze_dim": layout} if "unsqueeze_dim" in self.convention.options else {}

        def run(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            if q.dtype == torch.float64:
                return self.convention.meaning(q, k, *angles(q), layout)
            with _autocast(self.device, case[2]):
                rotated: tuple[Tensor, ...] = self.function(q, k, *angles(q), **options)
                return rotated

        return run

    def after(self, case: Case, out_dtype: torch.dtype, angles: Callable[[Tensor], tuple[Tensor, Tensor]]) -> probe.Functions:
        """Ours under the same autocast."""

        def run(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            with _autocast(self.device, case[2]):
                return self.convention(q, k, *angles(q), self.layout, out_dtype)

        return run

    def inputs(self, tokens: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random q and k as attention modules make them: ``[batch, seq, heads, dim]``, transposed where heads come first."""
        batch, seq = tokens
        q, k = (
            random(batch, seq, heads, self.sizes.dim, device=self.device, dtype=dtype)
            for heads in (self.sizes.heads, self.sizes.kv_heads)
        )
        return (q.transpose(1, 2), k.transpose(1, 2)) if self.layout == 1 else (q, k)

    def decide(self, case: Case, out_dtype: torch.dtype, autotune: str) -> Verdict:
        """Prove one case, and time it unless autotune is off."""
        angles = self.angles(case)
        return decide(
            (KIND, f"{self.function.__module__}.{self.function.__qualname__}", self.convention, self.sizes, case),
            self.before(case, angles),
            self.after(case, out_dtype, angles),
            lambda dtype: self.inputs(_PROVEN_TOKENS, dtype),
            lambda dtype: self.inputs(_TOKENS, dtype),
            (case[0],),
            autotune,
        )
