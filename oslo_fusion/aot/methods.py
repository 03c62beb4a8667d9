"""What stands on a model instance in place of a method: ``forward`` for ``scope: model``; and ``generate``, left uncompiled.

The class is left alone, because transformers keys its recorders by it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, ClassVar

import torch
from torch import nn

from oslo_fusion.aot.layer import has_hooks_inside, is_traced
from oslo_fusion.aot.programs import Programs
from oslo_fusion.graphs import State, TrainingGraphs
from oslo_fusion.surgery import Standing, found_ahead


class _Method(Standing):
    name: ClassVar[str]

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original, which Trainer and ``generate`` ask for the names of inputs."""
        return inspect.signature(self.original())

    def original(self) -> Any:
        """The method of the model's class, bound."""
        model = self.module
        return getattr(type(model), self.name).__get__(model)


class CompiledForward(_Method):
    """The whole forward in one compiled form.

    With ``graphs`` in the settings what it launches in training is captured and replayed, where that can be done.

    The original runs wherever it does for a layer; where a key/value cache is handed in; and where hidden states or attentions
    are asked for, which transformers records by hooks.
    """

    name = "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original, programs = self.original(), self.settings["programs"]
        assert isinstance(programs, Programs)
        recorded = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        if is_traced() or programs.decoding or recorded or _has_cache(args, kwargs):
            return original(*args, **kwargs)
        module, key = original.__self__, (self.name, self.settings["part"])
        graphs: TrainingGraphs | None = self.settings["graphs"]
        replays = graphs is not None and module.training and torch.is_grad_enabled()
        ahead: State | None = (found_ahead(self) or self.look_ahead()) if replays else None
        if ahead is None and has_hooks_inside(module, programs.record):
            return original(*args, **kwargs)
        if graphs is None or not replays:
            return programs.run(original.__func__, key, module, *args, **kwargs)
        if torch.is_autocast_enabled((next(module.parameters()) if ahead is None else ahead).device.type):
            programs.record.leave("autocast: what casts the weights is not captured as a CUDA graph")
            return programs.run(original.__func__, key, module, *args, **kwargs)
        run = functools.partial(programs.run, original.__func__, key, module)
        return graphs.run(run, module, args, kwargs, programs.record.leave, ahead)

    def look_ahead(self) -> State | None:
        """The state that its graphs were captured of, if it is that and no part is hooked: most of what is asked before a
        replay. What a hook of its own does is not known ahead."""
        graphs: TrainingGraphs | None = self.settings["graphs"]
        return None if graphs is None or self.module._forward_pre_hooks else graphs.look_ahead()


class UncompiledGenerate(_Method):
    """``generate`` as it is, with everything in it uncompiled: each text has its own length, and each step a longer cache."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        programs: Programs = self.settings["programs"]
        programs.decoding += 1
        try:
            return self.original()(*args, **kwargs)
        finally:
            programs.decoding -= 1


def _has_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "transformers.cache_utils" not in sys.modules:
        return False
    from oslo_fusion.aot import cache

    return cache.find(args, kwargs) is not None


def generating(model: nn.Module) -> list[str]:
    """Paths of the modules that have a ``generate`` to tell apart."""
    return [
        path
        for path, module in model.named_modules()
        if callable(getattr(type(module), UncompiledGenerate.name, None)) and UncompiledGenerate.name not in module.__dict__
    ]
