"""Output projections whose width is no multiple of 8, padded for the matmul.

GPT-2's 50257 and BERT's 30522 words give logits whose rows are not 16-byte aligned in half precision. cuBLAS then has only
its unaligned kernels, on one H200 the largest single cost of GPT-2's forward: 4096×768→50257 takes 3.35 ms, padded to 50264
and copied back to contiguous rows 1.05 ms; the two matmuls of the backward 4.56 ms, padded 0.82 ms. (Inductor's pad_mm does
the same.) The weight is padded at each call: a copy of it costs 36 to 65 µs, and nothing can go stale.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oslo_fusion.decide import (
    HALF,
    Scope,
    Verdict,
    decide,
    mode_settings,
    placement,
    propose,
    random,
    refuse,
)
from oslo_fusion.jit.script import ROOM
from oslo_fusion.plan import Proposal, Site
from oslo_fusion.recognition.trace import has_hooks, linear_shape

KIND = "output projection"
ALIGNMENT = 8
"""Columns. 8 half-precision numbers are the 16 bytes that the tensor cores' loads and stores want."""

_MIN_WIDTH = 1024
_CHUNK = 512  # rows; 51 MB of GPT-2's padded logits in half precision, inside an H200's 60 MB of L2
_ROWS = (64, 256, 1024, 4096)


class PaddedProjection(nn.Module):
    """Donor for ``nn.Linear`` or ``Conv1D``. The result has the original's shape, strides and dtype."""

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = self._oslo_fusion_settings
        if len(args) != 1 or kwargs or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        weight, bias = self.weight, getattr(self, "bias", None)
        assert isinstance(weight, Tensor)
        mode = "training" if _wants_gradient(x, weight, bias) else "inference"
        rows = x.numel() // x.shape[-1] if x.dim() else 0
        if device != settings["device"] or dtype not in settings[mode] or rows < settings["min_rows"]:
            return super().forward(x)
        if not autocast and weight.dtype != dtype:
            return super().forward(x)
        matrix = weight if settings["out_first"] else weight.t()
        return padded_linear(x.to(dtype), matrix.to(dtype), bias.to(dtype) if isinstance(bias, Tensor) else None)


def _wants_gradient(*tensors: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` through a matmul whose width is a multiple of 8.

    Args:
        x: ``[*batch, in]``.
        weight: ``[out, in]``, x's dtype.
        bias: ``[out]``, x's dtype.

    Returns:
        ``[*batch, out]``, contiguous, x's dtype, with gradients of all three.
    """
    width = weight.shape[0]
    missing = -width % ALIGNMENT
    weight, bias = F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))
    if _wants_gradient(x, weight, bias):
        return F.linear(x, weight, bias)[..., :width].contiguous()
    return _in_chunks(x.reshape(-1, x.shape[-1]), weight.t(), bias, width).view(*x.shape[:-1], width)


def _in_chunks(x: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """The same without gradients, a few rows at a time: what is padded stays small enough for the L2, not twice the logits."""
    rows = x.shape[0]
    result = x.new_empty(rows, width)
    wide = x.new_empty(min(rows, _CHUNK), weight.shape[1])
    for start in range(0, rows, _CHUNK):
        piece = x[start : start + _CHUNK]
        out = wide[: piece.shape[0]]
        if bias is None:
            torch.mm(piece, weight, out=out)
        else:
            torch.addmm(bias, piece, weight, out=out)
        result[start : start + _CHUNK].copy_(out[:, :width])
    return result


def propose_projection(path: str, module: nn.Module, scope: Scope) -> Proposal | None:
    """Propose to pad a wide linear layer of unaligned width, or refuse it; None if it is no such layer."""
    shape = linear_shape(module)
    if shape is None or shape[1] < _MIN_WIDTH or shape[1] % ALIGNMENT == 0:
        return None
    where = placement(module)
    if where is None or where[0].type == "meta":
        return None
    device, dtype = where
    site = Site(path, KIND, type(module).__name__)
    before = f"{type(module).__name__} {shape[0]}→{shape[1]}"
    if device.type != "cuda":
        return refuse(ROOM, site, before, "an aligned width helps tensor cores; this matmul does not run on a GPU")
    if dtype not in (*HALF, torch.float32):
        return refuse(ROOM, site, before, f"an aligned width helps half precision; the weight is {dtype}")
    if has_hooks(module):
        return refuse(ROOM, site, before, "its forward was replaced on the instance or is hooked")
    half = dtype if dtype in HALF else torch.bfloat16
    biased = getattr(module, "bias", None) is not None

    def operands(rows: int, d: torch.dtype) -> tuple[Tensor, ...]:
        weight = random(shape[1], shape[0], device=device, dtype=d) / shape[0] ** 0.5
        tensors = (random(rows, shape[0], device=device, dtype=d), weight)
        return (*tensors, random(shape[1], device=device, dtype=d)) if biased else tensors

    def smallest_that_wins() -> tuple[Verdict, int]:
        for rows in _ROWS if scope.config.autotune != "off" else _ROWS[1:2]:
            verdict = decide(
                (KIND, shape, biased),
                F.linear,
                padded_linear,
                functools.partial(operands, 16),
                functools.partial(operands, rows),
                (half,),
                scope.config.autotune,
            )
            if verdict.inference and verdict.training:
                break
        return verdict, rows

    verdict, min_rows = scope.once((KIND, shape, biased, device, half), smallest_that_wins)
    modes = mode_settings(device, verdict)
    if dtype not in HALF:  # float32 weights meet half precision under autocast, in either
        modes["inference"] = frozenset(HALF) if verdict.inference else frozenset()
        modes["training"] = frozenset(HALF) if verdict.training else frozenset()
    settings = {**modes, "min_rows": min_rows, "out_first": isinstance(module, nn.Linear)}
    padded = shape[1] + (-shape[1] % ALIGNMENT)
    after = f"padded to {padded} from {min_rows} rows on" + ("" if dtype in HALF else ", under autocast")
    return propose(ROOM, site, verdict, before, after, PaddedProjection, settings)
