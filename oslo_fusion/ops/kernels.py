"""Finds an operation's kernels, says which of them answers where, and when they may be launched directly.

Kernels register themselves over the references: Triton's when their file is imported, the extension's when it is loaded.
Importing :mod:`oslo_fusion` must not import triton, and meaning must not depend on speed, so both are found by name, at the
first tensor of their device. Without them the references go on serving: that costs speed, never function.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from oslo_fusion import extension
from oslo_fusion.errors import ConfigError, ExtensionError

KERNELS = ("auto", "triton", "cuda")
LANGUAGES = {"c++": "C++", "cuda": "CUDA", "triton": "Triton"}
"""What :func:`implementation` answers, as people write it."""


@functools.cache
def find_kernels(operation: str) -> ModuleType | None:
    """The Triton file of this operation, imported at the first call; None where there is no triton."""
    try:
        return importlib.import_module(f"oslo_fusion.triton.{operation}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return None


@functools.cache
def implementation(operation: str, device_type: str, kernel: str = "auto", first: str = "cuda") -> str:
    """Which implementation of an operation answers on a device: ``c++``, ``cuda``, ``triton`` or ``reference``. Loads it.

    Args:
        operation: its name, as in ``rms_norm``. The extension's CUDA kernel has the operator's name with ``_cuda`` behind it,
            because one dispatch key holds one kernel and the plain name's is Triton's.
        device_type: ``cpu``, ``cuda``, …
        kernel: what is wanted on a GPU: ``triton``, ``cuda`` or ``auto``, which takes either if it is there, else the
            reference. On the CPU the extension's C++ kernel answers where it was built.
        first: the one that ``auto`` prefers.

    Raises:
        ConfigError: an unknown ``kernel``.
        ExtensionError: ``cuda`` is wanted and the extension cannot be used or has no such kernel.
        ImportError: ``triton`` is wanted and is not installed.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"{operation}: kernel: received {kernel!r}. Allowed: {', '.join(KERNELS)}. Remedy: kernel='auto'.")
    if device_type == "cpu":
        extension.failure()
        return "c++" if _has_kernel(operation, "CPU") else "reference"
    if device_type != "cuda":
        return "reference"
    for wanted in (first, *(name for name in KERNELS[1:] if name != first)):
        if kernel not in (wanted, "auto"):
            continue
        if wanted == "triton" and find_kernels(operation) is not None:
            return "triton"
        if wanted == "cuda":
            extension.failure()
            if _has_kernel(f"{operation}_cuda", "CUDA"):
                return "cuda"
    if kernel == "cuda":
        if not _is_in_csrc(operation):
            raise ExtensionError(f"{operation}: kernel='cuda', but it has no CUDA kernel. Remedy: use kernel='triton'.")
        extension.load()
        raise ExtensionError(
            f"{operation}: kernel='cuda', but the extension was built without CUDA. Remedy: install it again with "
            "OSLO_FUSION_CUDA=1, or use kernel='triton'."
        )
    if kernel == "triton":
        raise ImportError(
            f"{operation}: kernel='triton', but triton is not installed. Remedy: pip install triton, or kernel='auto'."
        )
    return "reference"


def _has_kernel(operator: str, key: str) -> bool:
    exists = hasattr(torch.ops.oslo_fusion, operator)
    return exists and torch._C._dispatch_has_kernel_for_dispatch_key(f"oslo_fusion::{operator}", key)


def _is_in_csrc(operation: str) -> bool:
    return hasattr(torch.ops.oslo_fusion, f"{operation}_cuda")


@functools.cache
def is_here(operation: str, device_type: str, kernel: str) -> bool:
    """Whether a kernel, and not the reference, answers when ``kernel`` is asked for."""
    try:
        return implementation(operation, device_type, kernel) != "reference"
    except ImportError:  # ExtensionError is one
        return False


def choices(operation: str, device_type: str, kernel: str, first: str = "cuda") -> dict[str, str]:
    """The kernels of an operation that a plan may measure on a device, the reference being no gain.

    Args:
        operation: its name.
        device_type: ``cpu``, ``cuda``, …
        kernel: the configuration's: ``auto`` for all, ``triton`` or ``cuda`` for that one only.
        first: the one to take where nothing is measured.

    Returns:
        What to pass as the operation's ``kernel``, with the implementation that answers. Empty where :func:`missing` has a
        reason.
    """
    if device_type == "cpu":
        names = ["auto"] if kernel == "auto" else []
    else:
        names = sorted(KERNELS[1:], key=lambda name: name != first) if kernel == "auto" else [kernel]
    return {name: implementation(operation, device_type, name) for name in names if is_here(operation, device_type, name)}


def missing(operation: str, device_type: str, kernel: str) -> str:
    """Why :func:`choices` found nothing, in words for a report."""
    if device_type == "cpu" and kernel != "auto":
        return f"kernel: {kernel}, and no {LANGUAGES[kernel]} kernel runs on the CPU"
    if device_type == "cpu":
        reason = extension.failure() if _is_in_csrc(operation) else None
        return f"no kernel on the CPU: {reason or f'the extension has none for {operation}'}"
    if device_type != "cuda":
        return f"no kernel for {device_type}"
    reasons = []
    for name in KERNELS[1:] if kernel == "auto" else (kernel,):
        try:
            implementation(operation, device_type, name)
        except ImportError as error:
            reasons.append(str(error).removeprefix(f"{operation}: kernel='{name}', but "))
    return f"no {'' if kernel == 'auto' else LANGUAGES[kernel] + ' '}kernel here: {' '.join(reasons)}"


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be launched on these tensors without passing through torch's dispatcher.

    True in plain eager code: the dispatcher costs several µs a call, and a gradient registered with ``torch.library`` hundreds,
    where an ``autograd.Function`` around the launch costs 15. False for anything that needs the dispatcher: tensor subclasses,
    fake tensors, tracing, functorch transforms, forward-mode differentiation.
    """
    for tensor in tensors:
        if tensor is not None:
            kind = type(tensor)
            if kind is not Tensor and kind is not nn.Parameter:
                return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )
