"""``verify: true``: each kind of layer compiled and compared with the original under the law, on inputs of the model's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from oslo_fusion import probe, surgery
from oslo_fusion.aot.layer import CompiledLayer
from oslo_fusion.aot.layers import Repeated
from oslo_fusion.aot.programs import Programs


class _Enough(Exception):
    """Stops the sample run."""


def difference(model: nn.Module, layers: Sequence[Repeated], programs: Programs) -> dict[str, str]:
    """What is wrong with each kind of layer that does not obey the law, by kind.

    A copy of the model runs its sample input; what the first layer of a kind receives there goes into the original, the same in
    float64, and the compiled form, without dropout. The output and the gradients of all parameters and inputs are compared.

    Raises:
        ConfigError: the model has no sample input.
    """
    firsts = {layer.kind: layer for layer in reversed(layers)}
    wrong: dict[str, str] = {}
    for kind, layer in firsts.items():
        given = _received(model, layer.path)
        if given is None:
            wrong[kind] = "the sample input of verify does not reach it"
            continue
        with probe.preserved_random_state():
            reason = _compare(layer, given, programs)
        if reason:
            wrong[kind] = reason
    return wrong


def _received(model: nn.Module, path: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    twin = probe.shadow(model)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Enough

    twin.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    with contextlib.suppress(_Enough):
        probe.run_sample(twin)
    return seen[0] if seen else None


def _compare(layer: Repeated, given: tuple[tuple[Any, ...], dict[str, Any]], programs: Programs) -> str:
    plain = probe.shadow(layer.module).eval()
    exact = copy.deepcopy(plain).double()
    compiled = probe.shadow(layer.module).eval()
    surgery.swap(compiled, CompiledLayer, {"programs": programs, "kind": ("proof", layer.kind), "index": None})
    try:
        ours, theirs = _run(compiled, given), _run(plain, given)
        truth = _run(exact, pytree.tree_map_only(Tensor, _wide, given))
    except Exception as error:
        return f"cannot be tried on the sample input: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for name in theirs:
        norm = "max" if name == "output" else "l2"
        if name not in ours or name not in truth:
            return f"computes something else: no {name}"
        comparison = probe.compare(ours[name], theirs[name], truth[name], norm)
        if not comparison.same:
            return f"computes something else: {name}: {comparison}"
    return ""


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _run(layer: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Tensor]:
    """The output, and gradients by name; caches are left out, they would be filled three times."""
    args, kwargs = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, given)
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    first = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
    first.requires_grad_()
    with torch.enable_grad():
        result = layer(*args, **kwargs)
        output = next(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point())
        named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        weight = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64)
        weight = weight.reshape(output.shape).to(output.dtype)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(output, [first, *named.values()], weight, allow_unused=True)
    found = {f"gradient of {name}": g for name, g in zip(["the input", *named], gradients, strict=True) if g is not None}
    return {"output": output.detach(), **found}


def _is_cache(value: object) -> bool:
    return type(value).__module__ == "transformers.cache_utils"
