"""The end of a post-norm sublayer, ``norm(residual + dropout(linear(x)))``: BERT's, RoBERTa's and their like's.

Recognised by running a copy of the module (:mod:`oslo_fusion.recognition.residual`): a linear, an ``nn.Dropout`` and a layer
norm, whatever they are called, with the addition of an argument between the last two. It gets one kernel
(:mod:`oslo_fusion.ops.dropout_add_layer_norm`) in place of a dropout, an addition and a norm, and a backward that writes both
gradients and all sums at once.

The linear's bias goes into the kernel where the linear is a plain ``nn.Linear``: the matmul's epilogue adds a bias for nothing,
but its gradient is a sum over all rows that autograd reads once more. A linear with hooks, or another one in its place (LoRA, a
quantised one), is called as a module, with its bias.

What is claimed is the module, its dropout and its norm, before the norms' pass and TorchScript's ask for them. Where the site
is refused they may still be had.

This file imports no triton: the operator finds its kernels at the first CUDA tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from oslo_fusion import probe
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, PROVEN_SHAPE, Scope, Verdict, decide, placement, propose, random, refuse, signature
from oslo_fusion.environment import Environment
from oslo_fusion.kernels.norm_sites import ROOM, Norm, recognise
from oslo_fusion.ops.dropout import kept_in_rows, kept_scale
from oslo_fusion.ops.dropout_add_layer_norm import MAX_DIM, NAME, dropout_add_layer_norm
from oslo_fusion.ops.kernels import choices, is_plain, missing
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Taken, leave
from oslo_fusion.recognition.residual import Residual, may_end_in_residual, recognise_residual
from oslo_fusion.recognition.trace import has_hooks, linear_shape, run_chain

KERNEL = "FusedDropoutAddNorm"
KIND = "post-norm"
Case = tuple[torch.dtype, torch.dtype, torch.dtype | None]
"""Dtype of what the linear gives, of the residual, and of autocast where that is on."""

_AFTER = "dropout, addition and norm in one kernel, forward and backward"
_RNG = (7, 11)  # seed and offset in the proof


class FusedDropoutAddNorm(nn.Module):
    """Donor for ``norm(residual + dropout(linear(x)))``. Whatever was not planned for is the original's."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings, compiling = self._oslo_fusion_settings, torch.compiler.is_compiling()
        if len(args) != settings["arguments"] or kwargs:
            return super().forward(*args, **kwargs)
        linear, dropout, norm = (getattr(self, settings[name]) for name in ("linear", "dropout", "norm"))
        parameters = [getattr(norm, name) for name in settings["parameters"]]
        residual = args[settings["residual"]]
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        ordinary = type(dropout) is nn.Dropout and p < 1 and not has_hooks(dropout) and not has_hooks(norm)
        if not ordinary or not _are_ordinary((residual, *parameters), settings["device"], compiling):
            return super().forward(*args, **kwargs)
        table = settings["training" if torch.is_grad_enabled() else "inference"]
        autocast = _autocast_dtype(residual)
        apart = _is_plain_linear(linear, settings["device"], compiling)
        if apart and (autocast or linear.weight.dtype, residual.dtype, autocast) not in table:
            return super().forward(*args, **kwargs)
        h = run_chain(self, args[settings["x"]], settings["before"])
        h, linear_bias = (F.linear(h, linear.weight), linear.bias) if apart else (linear(h), None)
        out_dtype = table.get((h.dtype, residual.dtype, autocast))
        if out_dtype is None or h.shape != residual.shape or not _are_ordinary((h,), settings["device"], compiling):
            h = h if linear_bias is None else h + linear_bias.to(h.dtype)
            return norm(dropout(h) + residual)
        options = {"eps": settings["eps"], "dropout": p, "linear_bias": linear_bias, "out_dtype": out_dtype}
        return dropout_add_layer_norm(h, residual, *parameters, **options)


def _are_ordinary(tensors: tuple[Any, ...], device: str, compiling: bool) -> bool:
    """Whether these are tensors of the planned device, and nothing stands between them and a kernel."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != device:
            return False
    return compiling or is_plain()


def _is_plain_linear(linear: nn.Module, device: str, compiling: bool) -> bool:
    """Whether a linear is nothing but a matrix, and a bias that may be added elsewhere."""
    if type(linear) is not nn.Linear or has_hooks(linear):
        return False
    return _are_ordinary(tuple(linear.parameters()), device, compiling)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class PostNormPass:
    """Gives the ends of post-norm sublayers one kernel each way, where ``custom_cuda_kernels`` asks for it."""

    name = ROOM
    kernels: tuple[str, ...] = (KERNEL,)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per site, and a refusal if the name was given and there is none."""
        everything = "all" in config.custom_cuda_kernels
        if not everything and KERNEL not in config.custom_cuda_kernels:
            return
        wish = Site(f"kernel_fusion.custom_cuda_kernels: {KERNEL}", "configuration", "-")
        if not config.enable:
            yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        scope, found = Scope(config, environment), False
        for path, module in model.named_modules():
            site = recognise_site(module, scope)
            if site is not None:
                found = True
                yield leave(_propose(path, module, site, scope), taken)
        if not found and not everything:
            reason = f"no module of this {type(model).__name__} ends in a linear, dropout, residual addition and layer norm"
            yield refuse(ROOM, wish, "-", reason)


@dataclass(frozen=True)
class PostNorm:
    """What was recognised in a module.

    Attributes:
        wiring: the way of ``x`` and of the residual; its ``before`` ends before the linear.
        linear, norm_name: names of the children.
        norm: what the norm computes.
    """

    wiring: Residual
    linear: str
    norm_name: str
    norm: Norm


def recognise_site(module: nn.Module, scope: Scope) -> PostNorm | None:
    """What a post-norm sublayer's end consists of, once for modules that are alike; None if the module is none."""
    if not may_end_in_residual(module):
        return None
    where = placement(module)
    if where is None or where[0].type == "meta":
        return None
    wiring: Residual | None = scope.once((KIND, signature(module), *where), lambda: recognise_residual(module, *where))
    if wiring is None or len(wiring.after) != 1:
        return None
    linear, norm_name = wiring.before[-1], wiring.after[0]
    norm = recognise(module.get_submodule(norm_name), scope)
    if norm is None or norm.operation != "layer_norm" or norm.weight_offset or linear_shape(getattr(module, linear)) is None:
        return None
    return PostNorm(replace(wiring, before=wiring.before[:-1]), linear, norm_name, norm)


def _propose(path: str, module: nn.Module, found: PostNorm, scope: Scope) -> Proposal:
    site = Site(path, KIND, type(module).__name__)
    before = f"{found.linear}, dropout, addition, {found.norm_name}"
    linear, norm = (module.get_submodule(name) for name in (found.linear, found.norm_name))
    parameters = [*linear.parameters(), *norm.parameters()]
    device, dtype = parameters[0].device, parameters[0].dtype
    if any(p.device != device or p.dtype != dtype for p in parameters):
        return refuse(ROOM, site, before, "its parameters are on different devices or of different dtypes")
    if "forward" in module.__dict__:
        return refuse(ROOM, site, before, "its forward was replaced on the instance")
    if dtype not in (torch.float32, *HALF):
        return refuse(ROOM, site, before, f"no kernel for weights of {str(dtype).removeprefix('torch.')}")
    width = norm.get_parameter(found.norm.parameters[0]).numel()
    if width > MAX_DIM:
        return refuse(ROOM, site, before, f"no kernel for rows of {width} numbers, which is more than {MAX_DIM}")
    if not choices(NAME, device.type, scope.config.kernel):
        return refuse(ROOM, site, before, missing(NAME, device.type, scope.config.kernel))
    p = getattr(module, found.wiring.dropout).p
    decision = _Decision(linear, norm, found.norm, p, device, dtype, scope.config.autotune)
    # What is proven does not depend on the linear's sizes, what is timed does.
    kind = (decision.plain, decision.vectors) if decision.autotune == "off" else signature(linear)
    key = (KIND, kind, signature(norm), found.norm, p, device, dtype)
    verdict, tables = scope.once(key, decision.result)
    settings = {
        "arguments": found.wiring.arguments,
        "x": found.wiring.x,
        "residual": found.wiring.residual,
        "before": found.wiring.before,
        "linear": found.linear,
        "dropout": found.wiring.dropout,
        "norm": found.norm_name,
        "parameters": found.norm.parameters,
        "eps": found.norm.eps,
        "device": device.type,
        **tables,
    }
    claims = [f"{path}.{name}" for name in (found.wiring.dropout, found.norm_name)]
    return propose(ROOM, site, verdict, before, _AFTER, FusedDropoutAddNorm, settings, claims)


def cases(weight_dtype: torch.dtype) -> tuple[tuple[Case, ...], ...]:
    """The cases that a site may meet, grouped by what is timed once: the first of each group.

    Under autocast a norm returns float32, so the residual is float32 where the linear's result is half. float16 moves the same
    bytes as bfloat16, so it is proven and not timed.
    """
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    if weight_dtype == fp32:
        return ((fp32, fp32, None),), ((bf16, fp32, bf16), (fp16, fp32, fp16))
    return ((weight_dtype, weight_dtype, None),), ((weight_dtype, fp32, weight_dtype),)


@dataclass(frozen=True)
class _Decision:
    """Proves and times the end of one sublayer, in every case that it may meet.

    It is proven on what the linear gives, with one mask for both sides, so that nothing hides behind a matmul's rounding. It is
    timed with the linear, because the bias moves from there into the kernel, and with masks as they are drawn in training.
    Which of the two is asked for is seen from the inputs: the linear's weight is among those that are timed.
    """

    linear: nn.Module
    norm_module: nn.Module
    norm: Norm
    p: float
    device: torch.device
    dtype: torch.dtype
    autotune: str

    def result(self) -> tuple[Verdict, dict[str, dict[Case, torch.dtype]]]:
        """The verdict on the site, and for each mode the dtype of the result in each case for which the kernel is used."""
        tables: dict[str, dict[Case, torch.dtype]] = {"inference": {}, "training": {}}
        verdicts = []
        for group in cases(self.dtype):
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
        if not verdicts:
            return Verdict("it cannot be run here"), tables
        reason = "; ".join(dict.fromkeys(verdict.reason for verdict in verdicts))
        timings = tuple(timing for verdict in verdicts for timing in verdict.timings)
        inference, training = (frozenset(case[0] for case in tables[mode]) for mode in ("inference", "training"))
        return Verdict(reason, inference, training, timings), tables

    def output_dtype(self, case: Case) -> torch.dtype | None:
        """What the original returns, or None if it cannot be run so."""
        try:
            with torch.no_grad(), probe.preserved_random_state():
                output = self.before(case)(*self.proven(case, 2))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None
        return output.dtype

    @property
    def plain(self) -> bool:
        """Whether the linear is one whose bias goes into the kernel."""
        return type(self.linear) is nn.Linear

    @property
    def vectors(self) -> int:
        """How many vectors there are: the linear's bias, where it is the kernel's, and the norm's parameters."""
        return len(self.norm.parameters) + (self.plain and self.linear.bias is not None)

    def before(self, case: Case) -> probe.Function:
        """The original on given tensors."""
        norm = probe.shadow(self.norm_module)

        def run(*tensors: Tensor) -> Tensor:
            h, residual, bias, parameters, proof = self.split(case, tensors, with_bias=True)
            h = h if bias is None else h + bias.to(h.dtype)
            if proof and self.p:
                h = h * _mask(self.p, tuple(h.shape), self.device) * kept_scale(self.p)
            elif not proof:
                h = F.dropout(h, self.p, training=torch.is_grad_enabled())
            if h.dtype == torch.float64:
                return self.norm.meaning(h + residual, *parameters)
            values: Mapping[str, Tensor] = dict(zip(self.norm.parameters, parameters, strict=True))
            with _autocast(self.device, case[2]):
                output: Tensor = functional_call(norm, dict(values), (h + residual,))
                return output

        return run

    def after(self, case: Case, out_dtype: torch.dtype) -> probe.Function:
        """Ours on given tensors."""

        def run(*tensors: Tensor) -> Tensor:
            h, residual, bias, parameters, proof = self.split(case, tensors, with_bias=False)
            options: dict[str, Any] = {"eps": self.norm.eps, "linear_bias": bias, "out_dtype": out_dtype}
            options["dropout"] = self.p if proof or torch.is_grad_enabled() else 0.0
            rng = torch.tensor(_RNG, device=self.device) if proof and self.p else None
            with _autocast(self.device, case[2]):
                return dropout_add_layer_norm(h, residual, *parameters, rng=rng, **options)

        return run

    def split(
        self, case: Case, tensors: tuple[Tensor, ...], *, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor], bool]:
        """The linear's result, the residual, the bias still to be added, the norm's parameters; and whether it is a proof.

        Args:
            case: for autocast.
            tensors: of :meth:`proven` or :meth:`timed`.
            with_bias: whether the linear adds its own bias.
        """
        proof = len(tensors) == 2 + self.vectors
        head, vectors = tensors[: -self.vectors], list(tensors[-self.vectors :])
        bias = vectors.pop(0) if self.vectors > len(self.norm.parameters) else None
        if proof:
            return head[0], head[1], bias, vectors, True
        x, residual, *weights = head
        with _autocast(self.device, case[2]):
            if not self.plain:
                names = [name for name, _ in self.linear.named_parameters()]
                h: Tensor = functional_call(self.linear, dict(zip(names, weights, strict=True)), (x,))
            elif with_bias:
                h, bias = F.linear(x, weights[0], bias), None
            else:
                h = F.linear(x, weights[0])
        return h, residual, bias, vectors, False

    def proven(self, case: Case, rows: int = PROVEN_SHAPE[0]) -> list[Tensor]:
        """What the linear gives, residual, vectors."""
        width = self.norm_module.get_parameter(self.norm.parameters[0]).numel()
        tensors = [random(rows, width, device=self.device, dtype=dtype) for dtype in case[:2]]
        return [*tensors, *(random(width, device=self.device, dtype=self.dtype) for _ in range(self.vectors))]

    def timed(self, case: Case) -> list[Tensor]:
        """Input of the linear, residual, its weight (or all of its parameters), vectors."""
        shape = linear_shape(self.linear)
        assert shape is not None
        rows = max(1, probe.elements_to_time(self.device) // max(shape))
        weights = [p for name, p in self.linear.named_parameters() if not self.plain or name == "weight"]
        tensors = [random(rows, width, device=self.device, dtype=d) for width, d in zip(shape, case[:2], strict=True)]
        tensors += [random(*weight.shape, device=self.device, dtype=self.dtype) for weight in weights]
        return [*tensors, *(random(shape[1], device=self.device, dtype=self.dtype) for _ in range(self.vectors))]

    def decide(self, case: Case, out_dtype: torch.dtype, autotune: str) -> Verdict:
        """Prove one case, and time it unless autotune is off."""
        return decide(
            (KIND, self.norm, self.plain, self.p, linear_shape(self.linear), case, self.dtype),
            self.before(case),
            self.after(case, out_dtype),
            lambda dtype: self.proven(case),
            lambda dtype: self.timed(case),
            (case[0],),
            autotune,
        )


@functools.lru_cache(maxsize=2)  # a proof asks for one mask, and for that a hundred times
def _mask(p: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The mask that both sides have in the proof."""
    return kept_in_rows(torch.tensor(_RNG, device=device), p, shape)


@contextlib.contextmanager
def _autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield
