"""``scope: layer``: each repeated layer runs the one compiled form that all layers of its kind share."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from oslo_fusion.aot.programs import Programs
from oslo_fusion.aot.record import Record


class CompiledLayer(nn.Module):
    """Donor for a repeated layer: its own forward, compiled once for all of its kind; parameters are inputs of the graph.

    The original runs under the user's own ``torch.compile``, tracing, functorch and dispatch modes; where a part is hooked; in
    ``generate``; and with a key/value cache, unless the layer's entry in it is empty.
    """

    _oslo_fusion_settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = super().forward
        if is_traced():
            return original(*args, **kwargs)
        settings = self._oslo_fusion_settings
        programs: Programs = settings["programs"]
        function = getattr(original, "__func__", None)
        if function is None or programs.decoding or has_hooks_inside(self, programs.record):
            return original(*args, **kwargs)
        if "transformers.cache_utils" in sys.modules:  # else none of its objects can be among the arguments
            from oslo_fusion.aot import cache

            found = cache.find(args, kwargs)
            if found is not None:
                place, given = found
                index = settings["index"]
                if index is None or not cache.is_empty(given, index):
                    return original(*args, **kwargs)
                pair = cache.is_pair(given)
                key = (settings["kind"], function)
                rest = cache.without(place, args, kwargs)
                result, own, cross = programs.run(cache.run_with_stand_in, key, self, function, pair, place, *rest)
                cache.fill(given, index, own, cross)
                return result
        return programs.run(function, settings["kind"], self, *args, **kwargs)


def is_traced() -> bool:
    """Whether something else is looking at the operators: what it sees must be the original's."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def has_hooks_inside(module: nn.Module, record: Record) -> bool:
    """Whether something listens to a part of the module. Dynamo does not guard against hooks: the compiled form of a layer
    without would serve one with, and not call them.

    transformers' recorders stay once a model was asked for its attentions; they do nothing where nothing is being recorded.
    """
    parts = list(module._modules.values())
    for part in parts:  # which grows as it goes: asked at every call, while the device may wait
        if part is None:
            continue
        held = part.__dict__
        if held["_modules"]:
            parts += held["_modules"].values()
        hooked = held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]
        if hooked and not _only_idle_recorders(part):
            record.leave("a hook on a part of it: it runs as it is, so that the hook is called")
            return True
    return False


def _only_idle_recorders(part: nn.Module) -> bool:
    recorders = sys.modules.get("transformers.utils.output_capturing")
    if recorders is None or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    if any(getattr(hook, "__module__", "") != recorders.__name__ for hook in part._forward_hooks.values()):
        return False
    collector = getattr(recorders, "_active_collector", None)
    return collector is not None and collector.get() is None
