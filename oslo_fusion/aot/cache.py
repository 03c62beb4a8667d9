"""Key/value caches that a layer fills while it is compiled. transformers' caches are named here, and imported with this module.

A model called without ``use_cache=False`` gives each layer a cache, in training too. A cache is an object with one entry per
layer; traced as it is, each layer would be compiled for its own number. So a layer that is to fill an empty entry gets a
stand-in, which the compiled graph returns to us, and what it received is put where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

Place = int | str
Written = list[tuple[Tensor, Tensor]]


class StandIn:
    """What a layer sees in place of an empty cache."""

    def __init__(self) -> None:
        self.written: Written = []

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take down keys and values, and return them: there were none before."""
        self.written.append((keys, values))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None yet."""
        return 0


class _NeverUpdated:
    def get(self, layer_idx: int, default: Any = None) -> bool:
        return False

    def __getitem__(self, layer_idx: int) -> bool:
        return False

    def __setitem__(self, layer_idx: int, value: bool) -> None:
        pass


class PairStandIn(EncoderDecoderCache):
    """The same for a layer with self and cross attention."""

    def __init__(self) -> None:
        self.self_attention_cache: Any = StandIn()
        self.cross_attention_cache: Any = StandIn()
        self.is_updated: Any = _NeverUpdated()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the real one does: into the cache of the self attention."""
        result: tuple[Tensor, Tensor] = self.self_attention_cache.update(key_states, value_states)
        return result

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None yet."""
        return 0


def find(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Place, Cache] | None:
    """The cache among a layer's arguments, and where it stands."""
    for index, value in enumerate(args):
        if isinstance(value, Cache):
            return index, value
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            return name, value
    return None


def is_pair(cache: Cache) -> bool:
    """Whether it is one for self and one for cross attention."""
    return isinstance(cache, EncoderDecoderCache)


def is_empty(cache: Cache, layer: int) -> bool:
    """Whether a stand-in will do: a growing cache of a known kind, with nothing in this layer's entry."""
    if type(cache) is EncoderDecoderCache:
        inner = (cache.self_attention_cache, cache.cross_attention_cache)
        return not cache.is_updated.get(layer) and all(is_empty(part, layer) for part in inner)
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if len(cache.layers) <= layer:
        return cache.layer_class_to_replicate is DynamicLayer
    entry: Any = cache.layers[layer]
    return type(entry) in (DynamicLayer, DynamicSlidingWindowLayer) and not entry.is_initialized


def run_with_stand_in(
    module: nn.Module, function: Callable[..., Any], pair: bool, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Written, Written]:
    """What is compiled: the layer with a stand-in at ``place``; its result and what the stand-in received."""
    cache: Any = PairStandIn() if pair else StandIn()
    if isinstance(place, int):
        args = (*args[:place], cache, *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: cache}
    result = function(module, *args, **kwargs)
    if pair:
        return result, cache.self_attention_cache.written, cache.cross_attention_cache.written
    return result, cache.written, []


def without(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with None for the cache."""
    if isinstance(place, int):
        return (*args[:place], None, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: None}


def fill(cache: Cache, layer: int, own: Written, cross: Written) -> None:
    """Put what a stand-in received into the real cache."""
    if isinstance(cache, EncoderDecoderCache):
        for keys, values in cross:
            _put(cache.cross_attention_cache, layer, keys, values)
            cache.is_updated[layer] = True
        cache = cache.self_attention_cache
    for keys, values in own:
        _put(cache, layer, keys, values)


def _put(cache: Cache, layer: int, keys: Tensor, values: Tensor) -> None:
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    entry: Any = cache.layers[layer]
    if type(entry) is DynamicLayer and not entry.is_initialized:
        entry.lazy_initialization(keys, values)
        entry.keys, entry.values = keys, values  # update() would copy both, to put them behind nothing
    else:
        cache.update(keys, values, layer)
