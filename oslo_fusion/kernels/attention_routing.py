"""The way of a model's attention to our function: a configuration that answers one question differently, for one module.

transformers' attention modules ask ``self.config._attn_implementation`` for a name and look it up among the registered
functions. One more name is registered, which replaces nothing, and a routed module holds as its ``config`` a view of the
real one that gives this name where the real one says ``sdpa``. So the module's ``forward`` stays its own (another donor may
stand in front of it), the model's configuration, its making of masks and ``save_pretrained`` see nothing, and a later
``set_attn_implementation`` wins: the view passes on whatever is not ``sdpa``.

What the plan decided travels with the view, as plain data.

This file imports no transformers: :mod:`oslo_fusion.kernels.attention_interface` does, and is imported with the first view.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oslo_fusion.errors import ConfigError
from oslo_fusion.plan import Proposal, Settings, Site

INTERFACE = "oslo_fusion"
"""The name that is registered with transformers' ``AttentionInterface``."""

SDPA = "sdpa"
"""transformers' function of this name: what runs unless something else was planned."""

OFFSETS = "cu_seq_lens_q"
"""The argument that tells a packed call."""

_PACKED = (OFFSETS, "cu_seq_lens_k", "max_length_q", "max_length_k")

ROUTING = "_oslo_fusion_routing"
_REAL = "_oslo_fusion_config"


@dataclass(frozen=True)
class Rule:
    """Who computes attention of one dtype, in one mode, with a mask or without.

    Attributes:
        dtype: of q, k and v, after autocast.
        training: there will be a backward.
        masked: there is a mask.
        winners: up to how many tokens a backend is taken, in rising order; the last one, for all beyond, has 0.
    """

    dtype: torch.dtype
    training: bool
    masked: bool
    winners: tuple[tuple[int, str], ...]

    def winner(self, tokens: int) -> str:
        """The backend for this length.

        A compiled graph of any length learns from the comparisons on which side of a limit it holds: it is made anew where
        another backend begins, and not for every length.
        """
        for limit, backend in self.winners[:-1]:
            if tokens <= limit:
                return backend
        return self.winners[-1][1]


@dataclass
class Noted:
    """What a kind of module was seen to do instead: the :class:`~oslo_fusion.plan.Runtime` of its rows."""

    reason: str
    site: Site
    room: str
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.reason

    def note(self, reason: str) -> None:
        """Take a reason down once. Not while a graph is compiled, whose code does not run."""
        if not torch.compiler.is_compiling() and reason not in self.left:
            self.left.append(reason)

    def rows(self) -> tuple[Proposal, ...]:
        """A row for each reason."""
        return tuple(Proposal(self.site, self.room, SDPA, SDPA, "refused", reason) for reason in self.left)


@dataclass(frozen=True)
class Routing:
    """What the plan decided for a kind of attention module.

    Attributes:
        device: type of the device.
        dim: the head size that was planned for.
        rules: who computes what. A call that has none runs as it was.
        packed: the backend for packed sequences of each dtype; where it has none, our operator, whose reference serves all.
        noted: where reasons are taken down.
    """

    device: str
    dim: int
    rules: tuple[Rule, ...]
    packed: tuple[tuple[torch.dtype, str], ...]
    noted: Noted = field(compare=False)

    def backend(self, device: str, dtype: torch.dtype, dim: int, training: bool, masked: bool, tokens: int) -> str:
        """Who computes a call: one of :data:`~oslo_fusion.ops.attention_backends.BACKENDS`, or ``sdpa``."""
        if device == self.device and dim == self.dim:
            for rule in self.rules:
                if rule.dtype == dtype and rule.training == training and rule.masked == masked:
                    return rule.winner(tokens)
        return SDPA

    def packed_backend(self, device: str, dtype: torch.dtype, dim: int, default: str) -> str:
        """Who computes packed sequences."""
        if device == self.device and dim == self.dim:
            for known, backend in self.packed:
                if known == dtype:
                    return backend
        return default


@dataclass
class Observer:
    """Stands in a routing's place while a plan looks at what a module hands to its attention function.

    Attributes:
        calls: ``q``, ``k`` and ``v``, and the other arguments, of each call.
    """

    calls: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = field(default_factory=list)


class RoutedConfig:
    """A view of a configuration, for one attention module: the same in everything but the name of the implementation.

    Reading and writing go to the real one. A copy, or a pickle, with the model is a view of the copied configuration.

    Args:
        module: whose configuration it is.
        settings: ``routing``, a :class:`Routing`, or an :class:`Observer`.
    """

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self._look_at(module.config, settings["routing"])

    def _look_at(self, config: Any, routing: object) -> None:
        importlib.import_module("oslo_fusion.kernels.attention_interface")  # which registers the name
        self.__dict__.update({_REAL: config, ROUTING: routing})

    @property
    def _attn_implementation(self) -> Any:
        name = self._oslo_fusion_config._attn_implementation
        return INTERFACE if name == SDPA else name

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_oslo_fusion", "__")):  # not there while it is being unpickled; and no method of another class
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._oslo_fusion_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._oslo_fusion_config, name, value)

    def __repr__(self) -> str:
        return repr(self._oslo_fusion_config)

    def __reduce__(self) -> tuple[Any, ...]:
        return _view, (self._oslo_fusion_config, getattr(self, ROUTING))


def _view(config: Any, routing: object) -> RoutedConfig:
    view = RoutedConfig.__new__(RoutedConfig)
    view._look_at(config, routing)
    return view


def packed_arguments(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
    """The four arguments of a packed call.

    Raises:
        ConfigError: one of them is missing.
    """
    for name in _PACKED:
        if kwargs.get(name) is None:
            raise ConfigError(
                f"packed attention: {name}: received None, beside {OFFSETS}. Allowed: all of {', '.join(_PACKED)}. Remedy: "
                "cumulative lengths as int32 tensors, the longest sequences as numbers."
            )
    return kwargs[OFFSETS], kwargs["cu_seq_lens_k"], kwargs["max_length_q"], kwargs["max_length_k"]
