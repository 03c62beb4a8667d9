"""Attention with T5's relative-position bias: recognised by its interface, proven by value, timed.

transformers hands a bias of heads × queries × keys from the first layer of a stack to all others and adds it to the scores.
Since it wants a gradient, ``scaled_dot_product_attention`` leaves its fast paths, computes in float32 and keeps the scores.
Here the *table* of the bias takes the bias's place on its way through the layers: what a first layer returns as
``position_bias`` is a copy of ``relative_attention_bias.weight``, ``[buckets, heads]``, and each attention computes from it
what it needs (:mod:`oslo_fusion.ops.attention`). Cross-attention, whose bias is zeros, hands on a table without rows.

That works because nothing between looks at the bias, and because either all attentions of a kind are sites or none is. An
attention that runs as it was, for a cache, a mask that is added, or attentions that are asked for, makes the bias from the
table as the first layer would have.

Padded batches come with a boolean mask of queries and keys, which the operator reads as it is. A query that sees no key at all,
such as padding on the left of a decoder, gets zeros, where transformers gives the mean of all values, padding and future keys
included.

This file imports no triton: the operator finds its kernels at the first CUDA tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from oslo_fusion import probe, surgery
from oslo_fusion.config import FusionConfig
from oslo_fusion.decide import HALF, Scope, Verdict, decide, dtypes_to_decide, mode_settings, propose, random, refuse
from oslo_fusion.environment import Environment
from oslo_fusion.errors import ConfigError
from oslo_fusion.kernels.attention_routes import propose_routes
from oslo_fusion.kernels.attention_routing import OFFSETS, packed_arguments
from oslo_fusion.kernels.norm_sites import ROOM
from oslo_fusion.ops.attention import NAME, attention
from oslo_fusion.ops.kernels import choices, missing
from oslo_fusion.plan import NOTHING_TAKEN, Proposal, Site, Swap, Taken, leave
from oslo_fusion.recognition.trace import has_hooks

KERNEL = "FusedAttention"
KIND = "attention with relative-position bias"
TABLE = "relative_attention_bias"

_BEFORE = "scaled_dot_product_attention, bias of heads × queries × keys"
_PARAMETERS = ("hidden_states", "mask", "key_value_states", "position_bias", "past_key_values")
_PROJECTIONS = ("q", "k", "v", "o")
_NUMBERS = ("n_heads", "key_value_proj_dim", "relative_attention_num_buckets", "relative_attention_max_distance", "scaling")
_SDPA = "sdpa"
_UPDATED = "is_updated"  # what transformers' pair of caches has, and a single one has not
_PROVEN = (2, 45)  # samples, tokens
_TIMED = (8, 512)


class FusedRelativeAttention(nn.Module):
    """Donor for attention with T5's bias. The projections are called as modules, so that their hooks and adapters work.

    What was not planned for runs as it was: another device or dtype, a cache, a mask that is not boolean, attentions asked for,
    another ``attn_implementation``.

    Packed sequences (see :mod:`oslo_fusion.kernels.attention_interface`) are always ours, where there is no kernel by the
    reference: nothing that ran before knows where one ends. They have self-attention and no cache, as an encoder has.
    """

    _oslo_fusion_settings: dict[str, Any]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        this: Any = self
        table = position_bias if position_bias is not None and position_bias.dim() == 2 else None
        given = {"mask": mask, "key_value_states": key_value_states, "past_key_values": past_key_values, **kwargs}
        if kwargs.get(OFFSETS) is not None and hidden_states.shape[0] == 1:
            return self._packed(hidden_states, position_bias, key_value_states, past_key_values, kwargs)
        cross = key_value_states is not None
        source = key_value_states if key_value_states is not None else hidden_states
        planned = self._is_planned(hidden_states, past_key_values, cross, kwargs)
        if planned and _is_boolean(mask, hidden_states, source) and (table is not None or position_bias is None):
            q = self._heads(this.q(hidden_states))
            k, v = self._kept(self._heads(this.k(source)), self._heads(this.v(source)), past_key_values, cross)
            if table is None:
                table = self._own_table(q)
            out = self._attend(q, k, v, table, mask)
            return this.o(out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), table, None
        if table is None:
            return super().forward(hidden_states, position_bias=position_bias, **given)
        position_bias = self._bias(table, hidden_states, key_value_states, past_key_values)
        output, _, *rest = super().forward(hidden_states, position_bias=position_bias, **given)
        return output, table, *rest

    def _is_planned(self, x: Tensor, cache: Any, cross: bool, kwargs: dict[str, Any]) -> bool:
        this: Any = self
        settings, kind = self._oslo_fusion_settings, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if kind != settings["device"] or dtype not in settings["training" if torch.is_grad_enabled() else "inference"]:
            return False
        if kwargs.get("output_attentions") or this.config._attn_implementation != _SDPA:
            return False
        if this.has_relative_attention_bias and has_hooks(getattr(self, TABLE)):
            return False
        if cache is None:
            return True
        # A cache that grows and has nothing yet, as a training step makes one: what it is given is what it returns.
        if getattr(_part(cache, cross), "is_compileable", False):
            return False
        if cross:
            return hasattr(cache, _UPDATED) and not cache.is_updated.get(this.layer_idx)
        seen = cache.get_seq_length(this.layer_idx)
        return isinstance(seen, int) and seen == 0

    def _packed(
        self, hidden_states: Tensor, table: Tensor | None, key_value_states: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, None]:
        this: Any = self
        for name, given in (("key_value_states", key_value_states), ("past_key_values", cache)):
            if given is not None:
                raise _packed_error(name, type(given).__name__, "None: packed sequences are an encoder's")
        if table is not None and table.dim() != 2:
            raise _packed_error(
                "position_bias", f"a tensor of {list(table.shape)}", "a bucket table, as the first layer returns"
            )
        if kwargs.get("output_attentions"):
            raise _packed_error("output_attentions", True, "false: there are none; ask for them with a padded batch")
        q_offsets, k_offsets, *longest = packed_arguments(kwargs)
        q, k, v = (self._heads(projection(hidden_states)) for projection in (this.q, this.k, this.v))
        if table is None:
            table = self._own_table(q)
        out = attention(
            *(x[0].transpose(0, 1) for x in (q, k, v)),
            scale=this.scaling,
            causal=this.is_causal,
            bias_table=table if table.shape[0] else None,
            bidirectional=not this.is_decoder,
            max_distance=this.relative_attention_max_distance,
            cu_seqlens_q=q_offsets,
            cu_seqlens_k=k_offsets,
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            dropout=this.dropout if this.training else 0.0,
        )
        return this.o(out.reshape(*hidden_states.shape[:-1], -1)), table, None

    def _kept(self, k: Tensor, v: Tensor, cache: Any, cross: bool) -> tuple[Tensor, Tensor]:
        """Keys and values as the cache returns them when it is given them."""
        if cache is None:
            return k, v
        this: Any = self
        k, v = _part(cache, cross).update(k, v, this.layer_idx)
        if cross:
            cache.is_updated[this.layer_idx] = True
        return k, v

    def _heads(self, x: Tensor) -> Tensor:
        this: Any = self
        heads: Tensor = x.unflatten(-1, (-1, this.key_value_proj_dim)).transpose(1, 2)
        return heads

    def _own_table(self, q: Tensor) -> Tensor:
        this: Any = self
        if this.has_relative_attention_bias:
            # A copy, of 32 × 12 numbers: under FSDP the parameter's memory is gone when the next layer reads it.
            table: Tensor = getattr(self, TABLE).weight.clone()
            return table
        return q.new_zeros((0, q.shape[1]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        this: Any = self
        return attention(
            q,
            k,
            v,
            scale=this.scaling,
            causal=mask is None and this.is_causal and q.shape[2] > 1,  # a mask holds it, as for torch's own
            mask=mask,
            bias_table=table if table.shape[0] else None,
            bidirectional=not this.is_decoder,
            max_distance=this.relative_attention_max_distance,
            dropout=this.dropout if this.training else 0.0,
        )

    def _bias(self, table: Tensor, hidden_states: Tensor, key_value_states: Tensor | None, cache: Any) -> Tensor | None:
        """The bias that the table stands for, as the first layer makes it; None where that is zeros."""
        this: Any = self
        if not table.shape[0]:
            return None
        queries = hidden_states.shape[1]
        seen = 0 if cache is None else cache.get_seq_length(this.layer_idx)
        keys = queries + seen if key_value_states is None else key_value_states.shape[1]
        position = torch.arange(queries, device=table.device)[:, None] + seen
        buckets = this._relative_position_bucket(
            torch.arange(keys, device=table.device)[None, :] - position,
            bidirectional=not this.is_decoder,
            num_buckets=this.relative_attention_num_buckets,
            max_distance=this.relative_attention_max_distance,
        )
        return F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)


def _packed_error(name: str, received: object, allowed: str) -> ConfigError:
    return ConfigError(
        f"packed attention: {name}: received {received}. Allowed: {allowed}. Remedy: run this as a padded batch."
    )


def _is_boolean(mask: Tensor | None, queries: Tensor, keys: Tensor) -> bool:
    """Whether a mask is none, or says of each pair of these whether it is seen. Not so one that is added, or of more keys."""
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != keys.shape[1]:
        return False
    return mask.shape[0] in (1, queries.shape[0]) and mask.shape[2] in (1, queries.shape[1])


def _part(cache: Any, cross: bool) -> Any:
    """Of a pair of caches the one that an attention fills; or the cache, where there is one only."""
    if not hasattr(cache, _UPDATED):
        return cache
    return cache.cross_attention_cache if cross else cache.self_attention_cache


class AttentionPass:
    """Computes T5's attention without its scores in memory, and any other's by its fastest backend, where
    ``custom_cuda_kernels`` asks for it."""

    name = ROOM
    kernels: tuple[str, ...] = (KERNEL,)

    def propose(
        self, model: nn.Module, config: FusionConfig, environment: Environment, taken: Taken = NOTHING_TAKEN
    ) -> Iterator[Proposal]:
        """Yield one proposal per attention module, T5's all fused or none, and a refusal if it was named and there is none.

        ``padding_free`` asks for them too: packed sequences take this way.
        """
        everything, named = "all" in config.custom_cuda_kernels, KERNEL in config.custom_cuda_kernels
        if not everything and not named and not config.padding_free:
            return
        wish = Site(f"kernel_fusion.custom_cuda_kernels: {KERNEL}", "configuration", "-")
        if not config.enable:
            if everything or named:
                yield Proposal(wish, ROOM, "-", "-", "off", "enable is false")
            return
        scope = Scope(config, environment)
        found: list[tuple[str, Any]] = [(path, module) for path, module in model.named_modules() if is_site(module)]
        rows = [leave(_propose(path, module, scope), taken) for path, module in found]
        odd = {_use(module): row for (_, module), row in zip(found, rows, strict=True) if row.outcome != "fused"}
        for (_, module), row in zip(found, rows, strict=True):
            if row.outcome == "fused" and _use(module) in odd:
                # A table that reaches a module which does not know it would be taken for a bias.
                reason = f"the layers hand their bias on, and {odd[_use(module)].site.path} is not fused"
                row = refuse(ROOM, row.site, _BEFORE, reason)
            yield row
        routed = list(propose_routes(model, scope, taken, {path for path, _ in found}))
        yield from routed
        if not found and not routed and named:
            reason = f"no part of this {type(model).__name__} calls its attention through transformers' interface"
            yield refuse(ROOM, wish, "-", reason)


def is_site(module: nn.Module) -> bool:
    """Whether a module has the interface of transformers' ``T5Attention``. Whether it computes the same is proven later."""
    if any(not isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS):
        return False
    if any(not isinstance(getattr(module, name, None), (int, float)) for name in _NUMBERS):
        return False
    if not callable(getattr(module, "_relative_position_bucket", None)) or not hasattr(module, "has_relative_attention_bias"):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters)
    return tuple(name for name in parameters if name not in ("self", "kwargs")) == _PARAMETERS


def _propose(path: str, module: Any, scope: Scope) -> Proposal:
    site = Site(path, KIND, type(module).__name__)
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    device, dtype = parameters[0].device, parameters[0].dtype
    if device.type == "meta":
        return refuse(ROOM, site, _BEFORE, "it has no memory yet (meta device)")
    if any(p.device != device or p.dtype != dtype for p in parameters):
        return refuse(ROOM, site, _BEFORE, "its parameters are on different devices or of different dtypes")
    if "forward" in module.__dict__:
        return refuse(ROOM, site, _BEFORE, "its forward was replaced on the instance")
    if module.config._attn_implementation != _SDPA:
        return refuse(ROOM, site, _BEFORE, f"attn_implementation is {module.config._attn_implementation!r}, not {_SDPA!r}")
    packed = scope.config.padding_free and not module.is_decoder
    verdict: Verdict
    if dtype not in (torch.float32, *HALF):
        verdict = Verdict(f"no kernel for weights of {str(dtype).removeprefix('torch.')}")
    elif choices(NAME, device.type, scope.config.kernel):
        numbers = tuple(getattr(module, name) for name in _NUMBERS)
        key = (KIND, type(module), module.is_decoder, module.is_causal, numbers, device, dtype)
        verdict = scope.once(key, lambda: _decide(module, device, dtype, scope.config.autotune))
    else:
        verdict = Verdict(missing(NAME, device.type, scope.config.kernel))
    if packed and not verdict.fused:
        reason = f"kept for packed calls; padded batches as they were: {verdict.reason}"
        swap = Swap(path, FusedRelativeAttention, mode_settings(device, verdict))
        after = "attention, packed sequences with the bias from its table"
        return Proposal(site, ROOM, _BEFORE, after, "fused", reason, (path,), (swap,), verdict.timings)
    return propose(
        ROOM,
        site,
        verdict,
        _BEFORE,
        "attention, bias from its table inside the kernel, forward and backward",
        FusedRelativeAttention,
        mode_settings(device, verdict),
    )


def _use(module: Any) -> tuple[bool, bool]:
    """What tells the encoder's attention, the decoder's, and the decoder's of the encoder apart: each hands its own bias on."""
    return module.is_decoder, module.is_causal


def _decide(module: Any, device: torch.device, dtype: torch.dtype, autotune: str) -> Verdict:
    """Prove and time the module: self-attention with a bias table, cross-attention without."""
    cross = module.is_decoder and not module.is_causal
    before: Any = probe.shadow(module).eval()
    if not cross and not before.has_relative_attention_bias:
        before.has_relative_attention_bias = True
        with probe.preserved_random_state():
            table_of_its_own = nn.Embedding(module.relative_attention_num_buckets, module.n_heads, device=device, dtype=dtype)
        setattr(before, TABLE, table_of_its_own)
    after: Any = probe.shadow(before).eval()
    everything = frozenset((torch.float32, *HALF))
    surgery.swap(after, FusedRelativeAttention, {"device": device.type, "inference": everything, "training": everything})
    width, table = module.q.in_features, (module.relative_attention_num_buckets, module.n_heads)

    def run(which: Any) -> Callable[..., Tensor]:
        def function(hidden: Tensor, other: Tensor) -> Tensor:
            weights = {name: p.to(hidden.dtype) for name, p in which.named_parameters()}
            if not cross:
                weights[f"{TABLE}.weight"] = other
            named = {"key_value_states": other} if cross else {}
            result: Tensor = functional_call(which, weights, (hidden,), named)[0]
            return result

        return function

    def inputs(samples: int, tokens: int) -> Callable[[torch.dtype], list[Tensor]]:
        def make(wanted: torch.dtype) -> list[Tensor]:
            other = (samples, tokens, width) if cross else table
            return [random(*shape, device=device, dtype=wanted) for shape in ((samples, tokens, width), other)]

        return make

    return decide(
        (ROOM, KIND, *_use(module), module.n_heads, module.key_value_proj_dim),
        run(before),
        run(after),
        inputs(*_PROVEN),
        inputs(*_TIMED),
        dtypes_to_decide(device, dtype),
        autotune,
    )
