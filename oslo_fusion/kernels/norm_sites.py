"""Norm modules: found by what they compute, proven, timed, and given the one-kernel norms of :mod:`oslo_fusion.ops`.

A norm is a leaf with one parameter (a scale) or two (scale and shift) of one dimension. Its copy is run on rows of very
different magnitudes, with random parameters in place of its own: what it returns says which norm it is, whether one is added to
the scale (Gemma), and which of its attributes is eps. Its name says nothing.

Dtypes are learned, not derived: norms disagree on what a half weight makes of a float32 input, and autocast changes the answer
once more. A *case* is the dtype of the input together with autocast's, if that is on. For every case that the site may meet the
original is asked what it returns; a case in which it fails, or ours cannot be proven, stays with the original.

This file imports no triton: the operators find their kernels, in whatever language, at the first tensor of their device.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from oslo_fusion import probe
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, Scope, Verdict, decide, propose, random, refuse, signature
from oslo_fusion.environment import Environment
from oslo_fusion.ops.kernels import LANGUAGES, choices, is_here, is_plain, missing
from oslo_fusion.ops.layer_norm import layer_norm, layer_norm_reference
from oslo_fusion.ops.rms_norm import rms_norm, rms_norm_reference
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Taken, Timing, leave

ROOM = "kernels"
KIND = "norm"
KERNELS = {"FusedRMSNorm": "rms_norm", "FusedLayerNorm": "layer_norm"}
"""What ``custom_cuda_kernels`` calls them, and the operation."""

Case = tuple[torch.dtype, torch.dtype | None]
"""Dtype of the input, and of autocast where that is on."""

_TIMED_EPS = 1e-6
"""Under which timings are filed, whatever a norm's is: no kernel is compiled for it, and Llama's 1e-5 would find nothing that
was shipped for 1e-6."""
_LIKELY_EPS = ("variance_epsilon", "eps", "epsilon", "rms_norm_eps", "layer_norm_eps", "norm_eps")
_PROVEN_ELEMENTS = 97 * 211


@dataclass(frozen=True)
class Norm:
    """What was recognised in a module.

    Attributes:
        operation: ``rms_norm`` or ``layer_norm``.
        parameters: names of the scale and, if there is one, the shift.
        eps: in units of the squared input.
        weight_offset: what is added to the scale, 0 or 1.
    """

    operation: str
    parameters: tuple[str, ...]
    eps: float
    weight_offset: float

    def __call__(self, x: Tensor, *parameters: Tensor, out_dtype: torch.dtype, kernel: str) -> Tensor:
        """Compute it with our operator, on the parameters in the order of their names."""
        if self.operation == "rms_norm":
            y = rms_norm(x, *parameters, eps=self.eps, weight_offset=self.weight_offset, out_dtype=out_dtype, kernel=kernel)
        else:
            y = layer_norm(x, *parameters, eps=self.eps, weight_offset=self.weight_offset, out_dtype=out_dtype)
        assert isinstance(y, Tensor)
        return y

    def meaning(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The formula in plain PyTorch, in the precision of its inputs."""
        if self.operation == "rms_norm":
            return rms_norm_reference(x, weight, None, self.eps, self.weight_offset, None)[0]
        return layer_norm_reference(x, weight, bias, None, self.eps, self.weight_offset, None)[0]


class Use(NamedTuple):
    """How a case is computed: the dtype that the original returns, and which kernel does it."""

    out_dtype: torch.dtype
    kernel: str


class FusedNorm(nn.Module):
    """Donor for a norm module. Whatever was not planned, and everything under torch.compile, is the original's."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        settings, x = self._oslo_fusion_settings, args[0]
        norm: Norm = settings["norm"]
        parameters = [getattr(self, name) for name in norm.parameters]
        if not _is_ordinary(x, parameters, settings):
            return super().forward(x)
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
        use: Use | None = settings["training" if wanted else "inference"].get(_case(x))
        if use is None or not is_here(norm.operation, x.device.type, use.kernel):  # unpickled where it was not built
            return super().forward(x)
        return norm(x, *parameters, out_dtype=use.out_dtype, kernel=use.kernel)


def _is_ordinary(x: object, parameters: Sequence[Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether input and parameters are as planned, and nothing stands between them and a kernel.

    The operators under functorch, forward-mode differentiation, tracing or a dispatch mode are the original's own.
    """
    if not is_plain() or type(x) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(x, Tensor)
    if x.device.type != settings["device"] or x.dim() == 0:
        return False
    for parameter, dtype in zip(parameters, settings["dtypes"], strict=True):
        if type(parameter) not in (Tensor, nn.Parameter) or parameter.dtype != dtype or parameter.device != x.device:
            return False
        if parameter.shape != x.shape[-1:]:
            return False
    return True


def _case(x: Tensor) -> Case:
    kind = x.device.type
    return x.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class NormPass:
    """Replaces RMS and layer norms by one kernel each way, where ``custom_cuda_kernels`` asks for it."""

    name = ROOM
    kernels = tuple(KERNELS)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per norm of a wanted kind, and a refusal for a name of which the model has no norm."""
        everything = "all" in config.custom_cuda_kernels
        wanted = {name: operation for name, operation in KERNELS.items() if everything or name in config.custom_cuda_kernels}
        if not wanted:
            return
        wishes = {name: Site(f"kernel_fusion.custom_cuda_kernels: {name}", "configuration", "-") for name in wanted}
        if not config.enable:
            for wish in wishes.values():
                yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        scope, found = Scope(config, environment), set()
        for path, module in model.named_modules():
            norm = recognise(module, scope)
            if norm is not None and norm.operation in wanted.values():
                found.add(norm.operation)
                yield leave(_propose(path, module, norm, scope), taken)
        for name, operation in wanted.items():
            if not everything and operation not in found:
                reason = f"no module of this {type(model).__name__} computes {operation.replace('_', ' ')}"
                yield refuse(ROOM, wishes[name], "-", reason)


# --- recognition -------------------------------------------------------------------------------------------------------------


def recognise(module: nn.Module, scope: Scope) -> Norm | None:
    """Which norm the module computes, once for modules that are alike; None if it is none of ours."""
    names = _parameters_of_norm(module)
    if names is None:
        return None
    width = module.get_parameter(names[0]).numel()
    found: Norm | None = scope.once(("recognise norm", signature(module), width), lambda: recognise_norm(module))
    return found


def _parameters_of_norm(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the one or two parameters of a leaf, if they look like a norm's."""
    if next(module.children(), None) is not None or next(module.buffers(), None) is not None:
        return None
    named = dict(module.named_parameters())
    if len(named) not in (1, 2) or not all(p.dim() == 1 and p.is_floating_point() and p.numel() for p in named.values()):
        return None
    if len({p.numel() for p in named.values()}) > 1 or _required_arguments(module) != 1:
        return None
    return tuple(named)


def _required_arguments(module: nn.Module) -> int:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return 0
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in plain for p in parameters)


def recognise_norm(module: nn.Module) -> Norm | None:
    """Run a copy in float64 on the CPU and compare it with every norm that its parameters and attributes allow.

    Args:
        module: a leaf with one or two parameters of one dimension.

    Returns:
        The norm, or None if it computes anything else.
    """
    names = _parameters_of_norm(module)
    if names is None:
        return None
    width = module.get_parameter(names[0]).numel()
    twin = probe.shadow(module)
    try:
        with torch.no_grad(), probe.preserved_random_state(), torch.autocast("cpu", enabled=False):
            # From rows that eps swallows to rows that do not feel it; off centre, so that a mean taken away is seen.
            scale = torch.logspace(-5, 3, 14, dtype=torch.float64).reshape(2, 7, 1)
            x = scale * (torch.randn(2, 7, width, dtype=torch.float64) + 0.5)
            values = {name: torch.randn(width, dtype=torch.float64) for name in names}
            results = [functional_call(twin.train(mode), values, (x.clone(),)) for mode in (True, False)]
            # The same rows in another shape: a group norm is a layer norm in two dimensions only.
            flat = functional_call(twin, values, (x.reshape(14, width),))
    except Exception:
        return None
    for y in (*results, flat):
        if not isinstance(y, Tensor) or y.numel() != x.numel() or not y.is_floating_point():
            return None
    if any(y.shape != x.shape for y in results):
        return None
    for norm in _candidates(module, names):
        truth = norm.meaning(x, *(values[name] for name in norm.parameters))
        if all(torch.allclose(y.double().reshape(x.shape), truth, rtol=1e-4, atol=1e-5) for y in (*results, flat)):
            return norm
    return None


def _candidates(module: nn.Module, names: tuple[str, ...]) -> Iterator[Norm]:
    orders = [names] if len(names) == 1 else [names, names[::-1]]
    operations = ("rms_norm", "layer_norm") if len(names) == 1 else ("layer_norm",)
    for eps in _possible_eps(module):
        for operation in operations:
            for order in orders:
                for offset in (0.0, 1.0):
                    yield Norm(operation, order, eps, offset)


def _possible_eps(module: nn.Module) -> list[float]:
    """Values of the attributes that may be eps, the likely names first."""
    attributes = module.__dict__
    ordered = [attributes.get(name) for name in _LIKELY_EPS]
    ordered += [value for name, value in attributes.items() if name not in _LIKELY_EPS]
    values = [value for value in ordered if isinstance(value, float) and 0.0 <= value < 1.0]
    return list(dict.fromkeys(values))


# --- decision ----------------------------------------------------------------------------------------------------------------


def _propose(path: str, module: nn.Module, norm: Norm, scope: Scope) -> Proposal:
    site, before = Site(path, KIND, type(module).__name__), type(module).__name__
    parameters = [module.get_parameter(name) for name in norm.parameters]
    device, dtypes = parameters[0].device, tuple(p.dtype for p in parameters)
    if device.type == "meta":
        return refuse(ROOM, site, before, "it has no memory yet (meta device)")
    if any(p.device != device for p in parameters):
        return refuse(ROOM, site, before, "its parameters are on different devices")
    if "forward" in module.__dict__:
        return refuse(ROOM, site, before, "its forward was replaced on the instance")
    if not set(dtypes) <= {torch.float32, *HALF}:
        return refuse(ROOM, site, before, f"no kernel for weights of {str(dtypes[0]).removeprefix('torch.')}")
    kernel, autotune = scope.config.kernel, scope.config.autotune
    # Triton's is taken where nothing is measured: it is the one whose figures are known.
    kernels = choices(norm.operation, device.type, kernel, first="triton")
    if not kernels:
        return refuse(ROOM, site, before, missing(norm.operation, device.type, kernel))
    width = parameters[0].numel()
    key = (KIND, norm, signature(module), width, dtypes, device)
    verdict, table = scope.once(key, lambda: _Decision(module, norm, device, dtypes, width, kernels, autotune).result())
    settings = {"norm": norm, "device": device.type, "dtypes": dtypes, **table}
    used = {LANGUAGES[kernels[use.kernel]] for uses in table.values() for use in uses.values()}
    after = f"{norm.operation}, one {' or '.join(sorted(used))} kernel{', 1 + weight' if norm.weight_offset else ''}"
    return propose(ROOM, site, verdict, before, after, FusedNorm, settings)


def case_groups(weight_dtype: torch.dtype) -> tuple[tuple[Case, ...], ...]:
    """The cases that a site may meet, grouped by what is timed once: the first of each group.

    float32 weights meet half inputs under autocast, and half weights meet float32 inputs where a model keeps its residual
    stream in float32. float16 moves the same bytes as bfloat16, so it is proven and not timed.
    """
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    if weight_dtype == fp32:
        return (
            ((fp32, None), (fp32, bf16), (fp32, fp16)),
            ((bf16, bf16), (bf16, None), (fp16, fp16), (fp16, None)),
        )
    return ((weight_dtype, None), (weight_dtype, weight_dtype)), ((fp32, None), (fp32, weight_dtype))


@contextlib.contextmanager
def _autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


def _time_of(verdict: Verdict, mode: str) -> float:
    """Microseconds of the fused form in a mode; nothing where it was not timed, so that the first kernel is taken."""
    (timing,) = verdict.timings or (None,)
    return 0.0 if timing is None else getattr(timing, f"{mode}_after") or 0.0


@dataclass(frozen=True)
class _Decision:
    """Proves and times one norm, in every case that it may meet."""

    module: nn.Module
    norm: Norm
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    width: int
    kernels: Mapping[str, str]
    autotune: str

    def result(self) -> tuple[Verdict, dict[str, dict[Case, Use]]]:
        """The verdict on the site, and for each mode what is used in each case for which the fused norm is used.

        Where there are several kernels, each case of each mode has the fastest that was proven for it.
        """
        tables: dict[str, dict[Case, Use]] = {"inference": {}, "training": {}}
        reasons: dict[str, list[str]] = {}
        timings: list[Timing] = []
        for group in case_groups(self.dtypes[0]):
            timed: dict[str, Verdict] = {}
            for case in group:
                out_dtype = self.output_dtype(case)
                if out_dtype is None:
                    continue  # the original fails here, and goes on doing so
                verdicts = {
                    kernel: self.decide(case, Use(out_dtype, kernel), "off" if kernel in timed else self.autotune)
                    for kernel in self.kernels
                }
                for kernel, verdict in verdicts.items():
                    if kernel not in timed or not verdict.fused:
                        reasons.setdefault(kernel, []).append(verdict.reason)
                        timings += verdict.timings
                    timed.setdefault(kernel, verdict)
                for mode, table in tables.items():
                    won = [k for k, v in verdicts.items() if getattr(v, mode) and getattr(timed[k], mode)]
                    if won:
                        table[case] = Use(out_dtype, min(won, key=lambda kernel: _time_of(timed[kernel], mode)))
        if not reasons:
            return Verdict("it cannot be run here"), tables
        inference, training = (frozenset(dtype for dtype, _ in tables[mode]) for mode in ("inference", "training"))
        return Verdict(self.explain(reasons), inference, training, tuple(timings)), tables

    def explain(self, reasons: Mapping[str, Sequence[str]]) -> str:
        """The reasons, with the kernel's language before each if there are several kernels."""
        texts = {kernel: "; ".join(dict.fromkeys(parts)) for kernel, parts in reasons.items()}
        if len(self.kernels) == 1 or len(set(texts.values())) == 1:
            return next(iter(texts.values()))
        return "; ".join(f"{LANGUAGES[self.kernels[kernel]]}: {text}" for kernel, text in texts.items())

    def output_dtype(self, case: Case) -> torch.dtype | None:
        """What the original returns, or None if it cannot be run so."""
        try:
            with torch.no_grad(), probe.preserved_random_state():
                output = self.before(case)(*self.inputs(case[0], 2))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None
        return output.dtype

    def before(self, case: Case) -> probe.Function:
        """The original on given parameters; in float64, the truth: most norms never compute in more than float32."""
        twin = probe.shadow(self.module)

        def run(x: Tensor, *parameters: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                return self.norm.meaning(x, *parameters)
            with _autocast(self.device, case[1]):
                output: Tensor = functional_call(twin, dict(zip(self.norm.parameters, parameters, strict=True)), (x,))
                return output

        return run

    def after(self, case: Case, use: Use) -> probe.Function:
        """Ours on given parameters, under the same autocast."""

        def run(x: Tensor, *parameters: Tensor) -> Tensor:
            with _autocast(self.device, case[1]):
                return self.norm(x, *parameters, out_dtype=use.out_dtype, kernel=use.kernel)

        return run

    def inputs(self, dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
        """Random input and parameters."""
        x = random(rows, self.width, device=self.device, dtype=dtype)
        return x, *(random(self.width, device=self.device, dtype=d) for d in self.dtypes)

    def decide(self, case: Case, use: Use, autotune: str) -> Verdict:
        """Prove one case, and time it unless autotune is off."""
        return decide(
            (KIND, replace(self.norm, eps=_TIMED_EPS), type(self.module).__qualname__, self.dtypes, case[1], use.kernel),
            self.before(case),
            self.after(case, use),
            lambda dtype: self.inputs(dtype, max(97, _PROVEN_ELEMENTS // self.width)),
            lambda dtype: self.inputs(dtype, max(1, probe.elements_to_time(self.device) // self.width)),
            (case[0],),
            autotune,
        )
