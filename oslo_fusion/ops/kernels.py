"""Finds an operation's kernels the first time it meets a CUDA tensor, and says when they may be launched directly.

A room of kernels registers itself over the references when it is imported. Importing :mod:`oslo_fusion` must not import triton,
and meaning must not depend on speed, so the room is found by name and only then. Without triton the references go on serving:
that costs speed, never function.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@functools.cache
def find_kernels(operation: str) -> ModuleType | None:
    """The Triton file of this operation, imported at the first call; None where there is no triton."""
    try:
        return importlib.import_module(f"oslo_fusion.triton.{operation}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return None


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
