"""Who computes an attention: cuDNN, flash, torch's memory-efficient kernel, or ours; what each can serve, how it is called.

``F.scaled_dot_product_attention`` chooses by a fixed order, and under AOT Autograd the choice may fall on plain matmuls. Here
each vendor's kernel is called as the ATen operator that it is: a node of a compiled graph, with torch's own gradient. What
``F.scaled_dot_product_attention`` does around the operator is done here too: head sizes padded for flash, masks made a bias
whose rows are aligned, logarithms kept only where there will be a backward.

Shapes: ``q`` ``[batch, heads, queries, dim]``, ``k`` and ``v`` ``[batch, kv_heads, keys, dim]``, a mask bool
``[batch or 1, heads or 1, queries, keys]``, true where a query sees a key. Causal attention has as many queries as keys: the
kernels disagree where it has not. Packed: ``q`` ``[tokens, heads, dim]`` and int32 cumulative lengths ``[sequences + 1]``.

Dtype law: results have the dtype of ``q``; scores, softmax and sums are float32.

Source: ``sdp_utils.cpp`` of torch says what each kernel takes; on a GPU torch itself is asked too (:func:`torch_obstacle`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.attention import MAX_DIM, NAME, attention
from oslo_fusion.ops.kernels import choices, missing

CUDNN, FLASH, EFFICIENT, OURS = "cudnn", "flash", "efficient", "triton"
BACKENDS = (CUDNN, FLASH, EFFICIENT, OURS)
"""In the order in which they are taken where nothing is measured."""

PACKED = (FLASH, OURS)
"""Those that know cumulative lengths. cuDNN's has no window, and no gradient that torch 2.11 knows."""

HALF = (torch.float16, torch.bfloat16)
_FLASH_ALIGNMENT = 8
_CUDNN_DIM = 128
_CUDNN_DROPOUT_STEPS = 16
_BYTES = 16  # a row of the bias begins at a multiple of this


@dataclass(frozen=True)
class Case:
    """What an attention is like, apart from its lengths.

    Attributes:
        device: type of the device.
        dtype: of q, k and v, after autocast.
        heads, kv_heads, dim: of q; of k and v; of both.
        causal: without a mask, which holds it otherwise.
        dropout: the probability to be dropped.
        masked: there is a mask of queries and keys, or of keys.
        training: there will be a backward.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    dim: int
    causal: bool = False
    dropout: float = 0.0
    masked: bool = False
    training: bool = False


def obstacle(backend: str, case: Case, kernel: str = "auto") -> str:
    """Why a kernel cannot serve a case, by its documented limits; empty if it can.

    Args:
        backend: one of :data:`BACKENDS`.
        case: what is to be computed.
        kernel: the configuration's; a vendor's kernel is none of ``triton`` and ``cuda``.
    """
    if backend == OURS:
        if case.dim > MAX_DIM:
            return f"a head size of {case.dim}, and its largest is {MAX_DIM}"
        return "" if choices(NAME, case.device, kernel) else missing(NAME, case.device, kernel)
    if kernel != "auto":
        return f"kernel: {kernel}"
    if case.device != "cuda":
        return f"no kernel for {case.device}"
    if case.heads % case.kv_heads:
        return f"{case.heads} heads of q, and {case.kv_heads} of k do not divide them"
    if backend == EFFICIENT:
        aligned = _BYTES // case.dtype.itemsize
        if case.dtype not in (torch.float32, *HALF):
            return f"no {_short(case.dtype)}"
        if case.dtype == torch.float32 and case.training:
            return "gradients outside the law in float32"  # dk 2.7 times as far from float64 as plain PyTorch's, one H200
        return f"a head size of {case.dim}, no multiple of {aligned}" if case.dim % aligned else ""
    if case.dtype not in HALF:
        return f"no {_short(case.dtype)}"
    return _cudnn_obstacle(case) if backend == CUDNN else _flash_obstacle(case)


def _flash_obstacle(case: Case) -> str:
    if case.masked:
        return "no masks"
    return f"a head size of {case.dim}, and its largest is {MAX_DIM}" if case.dim > MAX_DIM else ""


def _cudnn_obstacle(case: Case) -> str:
    if torch.version.hip is not None:
        return "no cuDNN for AMD"
    if case.dim > _CUDNN_DIM or case.dim % _FLASH_ALIGNMENT:
        return f"a head size of {case.dim}: multiples of {_FLASH_ALIGNMENT} up to {_CUDNN_DIM}"
    if case.dropout * _CUDNN_DROPOUT_STEPS % 1:
        # It takes other probabilities too, and drops a sixteenth's multiple of the elements.
        return f"a dropout of {case.dropout:g}, no multiple of 1/{_CUDNN_DROPOUT_STEPS}"
    return ""


def packed_obstacle(backend: str, case: Case, kernel: str = "auto") -> str:
    """The same for packed sequences."""
    if backend not in PACKED:
        return "no packed sequences"
    if backend == FLASH and case.dim % _FLASH_ALIGNMENT:
        return f"a head size of {case.dim}, no multiple of {_FLASH_ALIGNMENT} (packed)"
    return obstacle(backend, case, kernel)


def torch_obstacle(backend: str, case: Case, device: torch.device) -> str:
    """Why the torch that is running does not take a vendor's kernel on this very GPU; empty if it does."""
    if device.type != "cuda" or backend == OURS:
        return ""
    tokens = 64
    heads = case.heads if backend == EFFICIENT else case.kv_heads
    q = torch.empty(1, case.heads, tokens, case.dim, device=device, dtype=case.dtype, requires_grad=case.training)
    k = torch.empty(1, heads, tokens, case.dim, device=device, dtype=case.dtype, requires_grad=case.training)
    mask = torch.ones(1, 1, tokens, tokens, device=device, dtype=torch.bool) if case.masked else None
    params = torch.backends.cuda.SDPAParams(q, k, k, mask, case.dropout, case.causal and not case.masked, heads != case.heads)
    ask = {
        CUDNN: torch.backends.cuda.can_use_cudnn_attention,
        FLASH: torch.backends.cuda.can_use_flash_attention,
        EFFICIENT: torch.backends.cuda.can_use_efficient_attention,
    }[backend]
    with torch.cuda.device(device), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if ask(params, True):
            return ""
    return "; ".join(str(warning.message).split(" (Triggered internally")[0] for warning in said) or "torch refuses it"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by one kernel, which must be able to serve it (:func:`obstacle`).

    Args:
        backend: one of :data:`BACKENDS`.
        q, k, v: as above, of one dtype, their last dimension dense.
        scale: of ``q · k``.
        causal: a query sees no later key; as many queries as keys, and no mask.
        mask: bool, of all queries and keys.
        dropout: the probability that an element of the softmax becomes zero.

    Returns:
        The shape and dtype of ``q``.
    """
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out: Tensor
    if backend == CUDNN:
        bias = None if mask is None else _additive(mask, q.dtype)
        out = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, bias, wanted, dropout, causal, False, scale=scale
        )[0]
        return out
    if backend == FLASH:
        dim, missing_numbers = q.shape[3], -q.shape[3] % _FLASH_ALIGNMENT
        if missing_numbers:  # zeros, which change no product
            q, k, v = (F.pad(x, (0, missing_numbers)) for x in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, dropout, causal, False, scale=scale)[0]
        return out[..., :dim] if missing_numbers else out
    if backend == EFFICIENT:
        bias = None if mask is None else _aligned_bias(mask, q, k)
        k, v = (_repeated(x, q.shape[1]) for x in (k, v))
        out = torch.ops.aten._scaled_dot_product_efficient_attention.default(
            q, k, v, bias, wanted, dropout, causal, scale=scale
        )[0]
        return out
    seen = None
    if mask is not None and is_of_keys(mask, k):
        seen, mask = mask[:, 0, 0], None
    elif mask is not None and mask.shape[0] == k.shape[0] and mask.shape[1] == 1:
        # transformers makes pairs of padding. Keys that no query sees are padding, and are skipped.
        seen = mask[:, 0].any(1)
    return attention(q, k, v, scale=scale, causal=causal, key_mask=seen, mask=mask, dropout=dropout)


def run_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    masked: str,
    plain: str,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention under a mask, which a compiler may find to say nothing but the flag (:mod:`oslo_fusion.aot.masks`).

    Args:
        q, k, v: as for :func:`run`.
        mask: bool; None once it was found to say nothing.
        causal: what it said instead.
        masked, plain: the backends with a mask, and without.
        scale, dropout: as for :func:`run`.
    """
    return run(plain if mask is None else masked, q, k, v, scale=scale, causal=causal, mask=mask, dropout=dropout)


def is_of_keys(mask: Tensor, k: Tensor) -> bool:
    """Whether a mask is one row for all queries and heads, as transformers expands an encoder's padding.

    Our kernel skips keys outside of a run, where it would load a byte per score from a mask of pairs.
    """
    same = mask.shape[2] == 1 or mask.stride(2) == 0
    return same and mask.shape[1] == 1 and mask.shape[0] == k.shape[0]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, float("-inf"))


def _aligned_bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as a bias of every head, each row of it beginning at a multiple of 16 bytes, which that kernel insists on."""
    keys = k.shape[2]
    bias = _additive(F.pad(mask, (0, -keys % (_BYTES // q.element_size()))), q.dtype)
    return bias[..., :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values once for each head of q: this kernel knows no groups before torch 2.13."""
    batch, kv_heads, tokens, dim = x.shape
    if kv_heads == heads:
        return x
    return x[:, :, None].expand(batch, kv_heads, heads // kv_heads, tokens, dim).reshape(batch, heads, tokens, dim)


def run_packed(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    longest: tuple[int, int],
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within each of the packed sequences.

    Args:
        backend: one of :data:`PACKED`.
        q, k, v: ``[tokens, heads, dim]``.
        q_offsets, k_offsets: int32, where sequences begin, and their end.
        longest: tokens of the longest sequence of queries, and of keys.
        scale: of ``q · k``.
        causal: a query sees no later key; the last query stands at the last key.
        window: how far a query sees, itself included, to the left, and unless causal to the right.
        dropout: the probability that an element of the softmax becomes zero.

    Returns:
        The shape and dtype of ``q``.
    """
    far = None if window is None else window - 1
    if backend == FLASH:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out: Tensor = torch.ops.aten._flash_attention_forward.default(
            q,
            k,
            v,
            q_offsets,
            k_offsets,
            *longest,
            dropout,
            causal,
            False,
            scale=scale,
            window_size_left=far,
            window_size_right=0 if causal else far,
        )[0]
        return out
    return attention(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window=(far, far),
        cu_seqlens_q=q_offsets,
        cu_seqlens_k=k_offsets,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        dropout=dropout,
    )


def by_vendor(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    mask: Tensor | None,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    longest: tuple[int, int],
    dropout: float,
    unserved: Sequence[str],
) -> Tensor:
    """:func:`~oslo_fusion.ops.attention.attention` by a vendor's kernel, for callers who choose it themselves.

    Raises:
        ConfigError: an unknown kernel, or one that cannot serve this.
    """
    if backend not in BACKENDS or backend == OURS:
        raise ConfigError(
            f"{NAME}: kernel: received {backend!r}. Allowed: {', '.join((OURS, *BACKENDS[:-1]))}. Remedy: kernel={OURS!r}."
        )
    q_offsets, k_offsets = cu_seqlens
    heads, kv_heads = (q.shape[1], k.shape[1])
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    case = Case(q.device.type, q.dtype, heads, kv_heads, q.shape[-1], causal, dropout, mask is not None, training)
    side = None if window is None else window[0]
    reason = ", ".join(unserved) and f"no {', '.join(unserved)}"
    if not reason and window is not None and (q_offsets is None or window[1] not in (side, None if causal else side)):
        reason = f"no window of {window}" if q_offsets is not None else "no window but in packed sequences"
    if not reason and q_offsets is None and causal and (mask is not None or q.shape[2] != k.shape[2]):
        reason = "causal attention has no mask, and as many queries as keys"
    reason = reason or (obstacle if q_offsets is None else packed_obstacle)(backend, case)
    if reason:
        raise ConfigError(f"{NAME}: kernel: received {backend!r}, which cannot serve this: {reason}. Remedy: kernel={OURS!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q_offsets is None or k_offsets is None:
        return run(backend, q, k, v, scale=scale, causal=causal, mask=mask, dropout=dropout)
    far = None if side is None else side + 1
    return run_packed(backend, q, k, v, q_offsets, k_offsets, longest, scale=scale, causal=causal, window=far, dropout=dropout)
