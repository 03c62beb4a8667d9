"""The compiled forms of one model's functions: one per function and mode, made at the first call, never pickled."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from oslo_fusion import surgery
from oslo_fusion.aot.backend import Backend, Replacement, breaks_noticed, compiler_failure
from oslo_fusion.aot.masks import keep_masks_in_sight
from oslo_fusion.aot.record import Record
from oslo_fusion.config import MemoryEfficientFusion
from oslo_fusion.errors import ConfigError

_log = logging.getLogger("oslo_fusion")
_numbers = itertools.count()


class Programs:
    """What a model's functions become, and the record of what that took.

    All layers of a model share one of these. A copy or a pickle carries the settings and the record, and compiles again.

    Args:
        settings: the ``memory_efficient_fusion`` block.
        compiler: as for :class:`Backend`.
        record: what was compiled so far.
    """

    def __init__(self, settings: MemoryEfficientFusion, compiler: str = "inductor", record: Record | None = None) -> None:
        self.settings = settings
        self.compiler = compiler
        self.record = record if record is not None else Record()
        self.decoding = 0
        """How many calls of ``generate`` are under way."""
        self._backend: Backend | None = None
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.settings, self.compiler, self.record)

    def run(self, function: Callable[..., Any], key: Hashable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call ``function(module, *args, **kwargs)`` in its compiled form.

        Each function, key and mode has a form of its own, because Dynamo makes eight versions of one form and no more:
        layers that differ in structure have different keys, and switching between training and evaluation costs no version.
        Where the compiler itself fails, the function runs as it is from then on, and the report says so.
        """
        device = next((p.device.type for p in module.parameters()), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        full_key = (function, key, module.training, torch.is_grad_enabled(), autocast)
        compiled = self._compiled.get(full_key)
        try:
            if compiled is not None:
                return compiled(module, *args, **kwargs)
            return self._compile(function, full_key, module, autocast)(module, *args, **kwargs)
        except Exception as error:
            reason = compiler_failure(error)
            if not reason:
                raise
        self.record.leave(f"the compiler failed, so it runs as it is: {reason}")
        _log.warning("%s runs uncompiled: %s", type(module).__name__, reason)
        self._compiled[full_key] = function
        return function(module, *args, **kwargs)

    def _compile(
        self, function: Callable[..., Any], full_key: Hashable, module: nn.Module, autocast: torch.dtype | None
    ) -> Callable[..., Any]:
        mode = f"{'training' if module.training else 'evaluation'}{'' if torch.is_grad_enabled() else ' without gradients'}"
        kind = type(module).__bases__[1] if surgery.is_fused(module) else type(module)
        name = f"{kind.__name__}, {mode}{f', autocast {autocast}' if autocast else ''}"

        def compile_graph(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return self.backend(graph, example_inputs, program=name)

        keep_masks_in_sight()
        self._compiled[full_key] = compiled = torch.compile(own_copy(function), backend=compile_graph)

        def first_call(*args: Any, **kwargs: Any) -> Any:
            with breaks_noticed(self.record):
                return compiled(*args, **kwargs)

        return first_call

    @property
    def backend(self) -> Backend:
        """Made at the first use, which may have to import Inductor."""
        if self._backend is None:
            self._backend = Backend(
                self.settings.activation_memory_budget,
                replacements=[load_replacement(name) for name in self.settings.replacements],
                record=self.record,
                compiler=self.compiler,
            )
        return self._backend


def own_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    Dynamo keeps compiled versions, their limit and what it has learned of dynamic shapes with the code object: without a copy,
    two models of one class, or the user's own ``torch.compile`` of it, would use up each other's versions.
    """
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}__{next(_numbers)}")
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def load_replacement(name: str) -> Replacement:
    """``package.module:name`` → the :class:`Replacement` of that name.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"kernel_fusion.memory_efficient_fusion.replacements: {name!r} cannot be imported: {error}. Remedy: "
            "'package.module:name' of an oslo_fusion.aot.Replacement that this process can import."
        ) from None
    if not isinstance(found, Replacement):
        raise ConfigError(
            f"kernel_fusion.memory_efficient_fusion.replacements: {name!r} is {type(found).__name__}. Allowed: an "
            "oslo_fusion.aot.Replacement. Remedy: Replacement(pattern=…, kernel=…, example=…)."
        )
    return found
