"""What a routed attention module calls in place of transformers' ``sdpa_attention_forward``. Importing this registers its name.

The same meaning: causal without a mask where the module or the call says so and there is more than one query, then over the
first keys only (an empty static cache has more); groups of heads; boolean masks. What the plan does not know, a mask that is
added, a bias, or attentions that are asked for, is handed to transformers' function as it came. Whether the process has
switched a backend off (``torch.nn.attention.sdpa_kernel``) is asked when the plan is made, not at each call.

Packed calls, of a batch of one, carry the names of transformers' ``FlashAttentionKwargs``: ``cu_seq_lens_q`` and
``cu_seq_lens_k`` (int32, on the device), ``max_length_q`` and ``max_length_k`` (numbers). The offsets alone describe the
sequences: a mask is not looked at, causality and a window hold within each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from oslo_fusion.errors import ConfigError
from oslo_fusion.kernels.attention_routing import INTERFACE, OFFSETS, ROUTING, SDPA, Observer, packed_arguments
from oslo_fusion.ops import attention_backends as backends
from oslo_fusion.ops.kernels import is_plain


def routed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' ``sdpa_attention_forward`` has it, by the backend that was planned for this module.

    Returns:
        ``[batch, tokens, heads, dim]``, contiguous, and None.

    Raises:
        ConfigError: a packed call lacks an argument, or has a bias.
    """
    routing = getattr(module.config, ROUTING, None)
    if isinstance(routing, Observer):
        given = {
            "dropout": dropout,
            "scaling": scaling,
            "causal": _is_causal(module, is_causal),
            "bias": position_bias,
            **kwargs,
        }
        routing.calls.append(((query, key, value), given))
        routing = None
    if routing is not None and kwargs.get(OFFSETS) is not None and query.shape[0] == 1:
        return _packed(routing, module, query, key, value, dropout, scaling, is_causal, position_bias, kwargs), None
    backend = SDPA
    if routing is not None:
        if kwargs.get("output_attentions"):
            routing.noted.note("attentions were asked for: transformers' own function ran, which returns none under sdpa")
        elif position_bias is None:
            backend = _choose(routing, query, key, value, attention_mask)
    if backend == SDPA:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
        return result
    causal = attention_mask is None and _is_causal(module, is_causal)
    if causal and key.shape[2] > query.shape[2]:  # an empty cache of a fixed size: the queries are its first
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    query, key, value = _cast(query, key, value)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and torch.compiler.is_compiling():
        plain = _choose(routing, query, key, value, None)
        plain = backend if plain == SDPA else plain
        out = backends.run_masked(query, key, value, attention_mask, False, backend, plain, scale, dropout)
    else:
        out = backends.run(backend, query, key, value, scale=scale, causal=causal, mask=attention_mask, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def as_it_was(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, scaling: float) -> Tensor:
    """transformers' own function, for a plan to compare with.

    Args:
        module: anything with its attributes ``num_key_value_groups`` and ``is_causal``.
        q, k, v, mask, dropout, scaling: as for the function itself.
    """
    out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling)[0]
    return out


def is_interface(found: object) -> bool:
    """Whether it is transformers' mapping of names to functions, with transformers' own under ``sdpa``."""
    return isinstance(found, AttentionInterface) and found.get(SDPA) is sdpa_attention_forward


def _choose(routing: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """The planned backend, or ``sdpa`` where something about the call is not what was planned for."""
    dense = q.stride(3) == 1 and k.stride(3) == 1 and v.stride(3) == 1
    if not dense or v.shape != k.shape or k.shape[3] != q.shape[3] or k.device != q.device:
        return SDPA
    # Single queries are steps of a decoder, which nobody planned for; no kernel here is made for a single key.
    if q.shape[2] <= 1 or k.shape[2] <= 1 or q.shape[0] == 0:
        return SDPA
    if mask is None:
        if k.shape[2] < q.shape[2]:
            return SDPA
    elif mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2] != q.shape[2] or mask.shape[3] != k.shape[2]:
        return SDPA
    if not torch.compiler.is_compiling() and not _can_be_launched(q, k, v, mask):
        return SDPA
    kind, dtype = q.device.type, q.dtype
    if _autocasts(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif k.dtype != dtype or v.dtype != dtype:
        return SDPA
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    backend: str = routing.backend(kind, dtype, q.shape[3], training, mask is not None, q.shape[2])
    return backend


def _can_be_launched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether these are tensors of memory, aligned as the vendors' kernels read them. Shards and tracers are neither."""
    if not is_plain(q, k, v, mask):
        return False
    return all(x.storage_offset() * x.element_size() % 16 == 0 for x in (q, k, v))


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True)) if given is None else bool(given)


def _autocasts(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch raises for devices that it cannot cast on


def _cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast makes of them for ``F.scaled_dot_product_attention``, and not for the operators beneath."""
    kind = q.device.type
    if not _autocasts(kind) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _packed(
    routing: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    if position_bias is not None:
        raise ConfigError(
            f"packed attention: position_bias: received a tensor of {list(position_bias.shape)}. Allowed: none, as it would "
            "have to begin anew in each sequence. Remedy: run this model on padded batches."
        )
    if kwargs.get("output_attentions"):
        routing.noted.note("attentions were asked for in a packed call: there are none")
    q_offsets, k_offsets, *longest = packed_arguments(kwargs)
    query, key, value = _cast(query, key, value)
    # Not x[0], whose gradient is a copy into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = backends.run_packed(
        routing.packed_backend(q.device.type, q.dtype, q.shape[2], backends.OURS),
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        (longest[0], longest[1]),
        scale=q.shape[2] ** -0.5 if scaling is None else scaling,
        causal=_is_causal(module, is_causal),
        window=kwargs.get("sliding_window"),
        dropout=dropout,
    )
    return out.contiguous().unsqueeze(0)


AttentionInterface.register(INTERFACE, routed_attention_forward)
AttentionMaskInterface.register(INTERFACE, sdpa_mask)  # for a module that makes a mask of its own, by its configuration's name
