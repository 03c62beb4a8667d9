"""Attention with what BERT and T5 train with: relative-position bias, padding, dropout; no tensor of queries × keys in memory.

    s[i, j] = scale · q_i · k_j + bias(j - p_i)         p_i = i + (keys - queries): the queries are the last of the keys
    a = dropout(softmax(s over the keys that query i may see)),     out_i = Σ_j a[i, j] · v_j

A query sees key j if ``p_i - left ≤ j ≤ p_i + right`` (causal: ``right = 0``), aligned to the last key as transformers' masks
are, if the key is no padding, and if a mask of queries and keys says so. A query that sees no key gets zeros and gives zero
gradients, as torch's ``scaled_dot_product_attention`` has it for boolean masks; transformers' additive masks would average over
the padding.

Bias of T5: ``table[bucket(j - p_i), head]``, with the buckets of ``T5Attention._relative_position_bucket``. ALiBi:
``-slope[head] · |j - p_i|``, which for causal attention is BLOOM's up to a number that softmax takes out again.

Shapes: ``q`` ``[batch, heads, queries, dim]``, ``k`` and ``v`` ``[batch, kv_heads, keys, dim]`` with ``heads`` a multiple of
``kv_heads``; ``table`` ``[buckets, heads]``; ``slopes`` ``[heads]``. Packed: ``q`` ``[tokens, heads, dim]``, ``k`` and ``v``
``[key tokens, kv_heads, dim]`` and the cumulative lengths of the sequences, ``[batch + 1]`` int32. The logarithm saved for the
backward: ``[batch, heads, queries]``, packed ``[heads, tokens]``.

Dropout: by the counter of :mod:`oslo_fusion.ops.dropout`, which is query and key, under a key of its own for each batch and
head. What it kept goes to the backward as a bit for each element (:func:`new_kept`): 25 MB for 64 sequences of 512 tokens and
12 heads, where the result has 50. Drawn again in each kernel of the backward it would cost more than a third of its time.

Dtype law: scores, softmax, sums and the gradients between are float32 (float64 for float64); kernels round the probabilities
and the gradient of the scores to the dtype of ``q`` before their matmuls, as eager code does. What half precision rounds away
from the result is kept for the backward: the gradient of the scores subtracts ``Σ out · dout``, and where values or keys are
alike, as in the last layers of a decoder, that is a small difference of large numbers (dq of T5-base's decoder in bfloat16: 7 %
off with the rounded result, 0.8 % with the rest, torch's float32 path 0.2 %). Results have the dtype of
``q``; the table's gradient is summed in float32 and rounded once, to the table's dtype.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Raffel et al., T5, arXiv:1910.10683; Press et al., ALiBi, arXiv:2108.12409.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oslo_fusion.errors import ConfigError
from oslo_fusion.ops.dropout import ROUNDS, draw_rng, kept_scale, kept_threshold, philox, random_key
from oslo_fusion.ops.kernels import find_kernels, is_plain, wants_gradient

NAME = "attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 256
UNLIMITED = -1


class Extras(NamedTuple):
    """What attention may have beside ``q``, ``k`` and ``v``; in the operator's order.

    Attributes:
        table: T5's bias, ``[buckets, heads]``.
        slopes: of ALiBi, ``[heads]``; they get no gradient.
        key_mask: ``[batch, keys]`` bool, true where a key is no padding.
        key_lengths: ``[batch]`` int32, keys before the padding on the right.
        mask: ``[batch or 1, heads or 1, queries or 1, keys]`` bool, true where a query may see a key.
        q_offsets, k_offsets: ``[batch + 1]`` int32, where sequences of packed tokens begin, and their end.
        rng: ``[2]`` int64, seed and offset of the dropout.
    """

    table: Tensor | None
    slopes: Tensor | None
    key_mask: Tensor | None
    key_lengths: Tensor | None
    mask: Tensor | None
    q_offsets: Tensor | None
    k_offsets: Tensor | None
    rng: Tensor | None


class Options(NamedTuple):
    """The numbers of an attention; in the operator's order.

    Attributes:
        scale: of the products of queries and keys.
        left, right: how many keys beside its own a query sees; ``UNLIMITED`` for all.
        bidirectional, max_distance: of T5's buckets.
        dropout: the probability of an element to be dropped.
        max_queries, max_keys: of the longest sequence; for packed tokens only, else 0.
        keep: return what the backward needs beside the result: what was rounded away from it (half precision only), and which
            elements dropout kept.
    """

    scale: float
    left: int
    right: int
    bidirectional: bool
    max_distance: int
    dropout: float
    max_queries: int
    max_keys: int
    keep: bool = False


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of ``q``, ``k`` and ``v``."""


def _error(name: str, received: object, allowed: str, remedy: str = "") -> ConfigError:
    return ConfigError(f"{NAME}: {name}: received {received}. Allowed: {allowed}." + (f" Remedy: {remedy}." if remedy else ""))


def _check(q: Tensor, k: Tensor, v: Tensor, extras: Extras, options: Options) -> None:
    """Raise ConfigError for what no implementation can compute. Called first by the reference and by every launcher."""
    packed = extras.q_offsets is not None
    if (extras.q_offsets is None) != (extras.k_offsets is None):
        raise _error("cu_seqlens", "one of queries and keys", "both, or neither")
    if q.dtype not in DTYPES:
        raise _error("q", f"dtype {q.dtype}", "half, bfloat16, float and double", "q.float()")
    layout = "[tokens, heads, dim] with cu_seqlens" if packed else "[batch, heads, queries, dim] without cu_seqlens"
    if q.dim() != (3 if packed else 4):
        raise _error("q", f"shape {list(q.shape)}", layout)
    heads, dim = (q.shape[1], q.shape[2]) if packed else (q.shape[1], q.shape[3])
    if not 1 <= dim <= MAX_DIM:
        raise _error("q", f"a head size of {dim}", f"1 to {MAX_DIM}")
    if k.dim() != q.dim() or k.shape[-1] != dim or (not packed and k.shape[0] != q.shape[0]):
        wanted = f"[key tokens, kv_heads, {dim}]" if packed else f"[{q.shape[0]}, kv_heads, keys, {dim}]"
        raise _error("k", f"shape {list(k.shape)}", f"{wanted}, as q is {list(q.shape)}")
    if v.shape != k.shape:
        raise _error("v", f"shape {list(v.shape)}", f"{list(k.shape)}, that of k")
    kv_heads = k.shape[1]
    if heads % max(kv_heads, 1) or not kv_heads:
        raise _error("k", f"{kv_heads} heads", f"a divisor of {heads}, the heads of q")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise _error(name, f"dtype {tensor.dtype}", f"{q.dtype}, that of q", f"{name}.to(q.dtype)")
    for name, tensor in (("k", k), ("v", v), *extras._asdict().items()):
        if tensor is not None and tensor.device != q.device:
            raise _error(name, f"a tensor on {tensor.device}", f"{q.device}, where q is", f"{name}.to(q.device)")
    _check_bias(heads, extras, options)
    _check_padding(q, k, extras, options)
    if not math.isfinite(options.scale):
        raise _error("scale", options.scale, "a finite number")
    if options.left < UNLIMITED or options.right < UNLIMITED:
        raise _error("window", (options.left, options.right), "numbers of keys from 0, or None for all")
    if not 0.0 <= options.dropout < 1.0:
        raise _error("dropout", options.dropout, "0 up to, but not including, 1")
    if options.dropout and (extras.rng is None or extras.rng.shape != (2,) or extras.rng.dtype != torch.int64):
        received = None if extras.rng is None else f"{extras.rng.dtype} {list(extras.rng.shape)}"
        raise _error("rng", received, "a tensor of two int64, seed and offset, where there is dropout")


def _check_bias(heads: int, extras: Extras, options: Options) -> None:
    table, slopes = extras.table, extras.slopes
    if table is not None:
        if table.dtype not in DTYPES or table.dim() != 2 or table.shape[1] != heads:
            raise _error("bias_table", f"{table.dtype} {list(table.shape)}", f"[buckets, {heads}] of floating point")
        directions = 2 if options.bidirectional else 1
        exact = table.shape[0] // directions // 2
        if exact < 1:
            raise _error("bias_table", f"{table.shape[0]} buckets", f"at least {2 * directions}")
        if options.max_distance <= exact:
            raise _error("max_distance", options.max_distance, f"more than {exact}, the distances with a bucket of their own")
    if slopes is not None:
        if slopes.dtype not in DTYPES or slopes.shape != (heads,):
            raise _error("alibi_slopes", f"{slopes.dtype} {list(slopes.shape)}", f"[{heads}] of floating point, one per head")
        if table is not None:
            raise _error("alibi_slopes", "slopes and a bias_table", "one of the two")


def _check_padding(q: Tensor, k: Tensor, extras: Extras, options: Options) -> None:
    mask, lengths = extras.key_mask, extras.key_lengths
    if extras.q_offsets is None or extras.k_offsets is None:
        batch, keys = k.shape[0], k.shape[2]
        if extras.mask is not None:
            _check_mask(extras.mask, (*q.shape[:3], keys))
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, keys)):
            raise _error("key_mask", f"{mask.dtype} {list(mask.shape)}", f"bool [{batch}, {keys}], true where no padding is")
        if lengths is not None:
            if mask is not None:
                raise _error("key_lengths", "lengths and a key_mask", "one of the two")
            if lengths.dtype != torch.int32 or lengths.shape != (batch,):
                raise _error("key_lengths", f"{lengths.dtype} {list(lengths.shape)}", f"int32 [{batch}]", "lengths.int()")
            if _is_readable(lengths) and bool(((lengths < 0) | (lengths > keys)).any()):
                raise _error("key_lengths", lengths.tolist(), f"0 to {keys}, the number of keys")
        return
    if mask is not None or lengths is not None or extras.mask is not None:
        raise _error("mask, key_mask, key_lengths", "padding in packed sequences", "cu_seqlens alone")
    ends = (("q", extras.q_offsets, q.shape[0], options.max_queries), ("k", extras.k_offsets, k.shape[0], options.max_keys))
    for name, offsets, tokens, longest in ends:
        if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.shape[0] < 1:
            raise _error(f"cu_seqlens_{name}", f"{offsets.dtype} {list(offsets.shape)}", "int32 [batch + 1]", "offsets.int()")
        if offsets.shape != extras.q_offsets.shape:
            raise _error("cu_seqlens_k", f"shape {list(offsets.shape)}", f"{list(extras.q_offsets.shape)}, as for queries")
        if _is_readable(offsets):
            lengths = offsets.diff()
            if int(offsets[0]) != 0 or int(offsets[-1]) != tokens or bool((lengths < 0).any()):
                raise _error(
                    f"cu_seqlens_{name}", offsets.tolist(), f"numbers that rise from 0 to {tokens}, the tokens of {name}"
                )
            if lengths.numel() and int(lengths.max()) > longest:
                raise _error(f"max_seqlen_{name}", longest, f"at least {int(lengths.max())}, the longest sequence")


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    fits = mask.dim() == 4 and mask.shape[3] == shape[3]
    fits = fits and all(given in (1, full) for given, full in zip(mask.shape[:3], shape[:3], strict=True))
    if mask.dtype != torch.bool or not fits:
        allowed = f"bool {list(shape)}, true where a query may see a key; 1 for all of batch, heads or queries"
        raise _error("mask", f"{mask.dtype} {list(mask.shape)}", allowed, "mask > -1 for a mask that is added")


def _is_readable(x: Tensor) -> bool:
    """Whether values may be looked at without making a device wait. Elsewhere kernels keep to what is in memory."""
    return type(x) is Tensor and x.device.type == "cpu"


# --- the bias and the random mask --------------------------------------------------------------------------------------------


def relative_position_bucket(distance: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of ``key - query``: ``T5Attention._relative_position_bucket``, operation by operation, on the same device.

    Args:
        distance: integers of any shape.
        bidirectional, num_buckets, max_distance: as there.
    """
    start = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        start, distance = (distance > 0).to(torch.long) * num_buckets, distance.abs()
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = num_buckets // 2
    large = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    # The logarithm of zero is dropped below; as an integer it would be anything.
    large = exact + large.clamp(min=0).to(torch.long)
    large = torch.min(large, torch.full_like(large, num_buckets - 1))
    return start + torch.where(distance < exact, distance, large)


def kept_elements(rng: Tensor, dropout: float, batch: int, heads: int, queries: int, keys: int, first_batch: int = 0) -> Tensor:
    """The random mask, ``[batch, heads, queries, keys]``: true where an element stays.

    One draw of 64 bits serves four elements: bit 3 of the key's number chooses the word and bit 3 of the query's its half.
    Those are the two bits that a thread of a tensor core's result holds both values of, whether rows are queries or keys.

    Args:
        rng: seed and offset.
        dropout: the probability to be dropped.
        batch, heads, queries, keys: the shape.
        first_batch: number of the first sequence.
    """
    device = rng.device
    number = (torch.arange(batch, device=device) + first_batch)[:, None] * heads + torch.arange(heads, device=device)[None, :]
    key = random_key(rng, number)
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, :]
    x, y = philox((j >> 4 << 3) | (j & 7), (i >> 4 << 3) | (i & 7), key[:, :, None, None], ROUNDS)
    bits = (torch.where((j & 8) != 0, y, x) >> ((i & 8) << 1)) & 0xFFFF
    return bits < kept_threshold(dropout)


# --- the reference -----------------------------------------------------------------------------------------------------------


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Part(NamedTuple):
    """What the reference computes at once: the whole batch, or one sequence of packed tokens as a batch of one."""

    number: int
    queries: slice
    keys: slice


def _parts(extras: Extras) -> Iterator[_Part]:
    if extras.q_offsets is None or extras.k_offsets is None:
        yield _Part(0, slice(None), slice(None))
        return
    q_ends, k_ends = extras.q_offsets.tolist(), extras.k_offsets.tolist()
    for number in range(len(q_ends) - 1):
        yield _Part(number, slice(*q_ends[number : number + 2]), slice(*k_ends[number : number + 2]))


def _take(x: Tensor, tokens: slice, wide: torch.dtype, packed: bool) -> Tensor:
    return (x[tokens].transpose(0, 1).unsqueeze(0) if packed else x).to(wide)


def _put(target: Tensor, tokens: slice, value: Tensor, packed: bool) -> None:
    if packed:
        target[tokens] = value[0].transpose(0, 1).to(target.dtype)
    else:
        target.copy_(value)


class _Probabilities(NamedTuple):
    """``p`` without dropout, what dropout multiplies it by, the logarithm of its sum, and each element's bucket."""

    p: Tensor
    kept: Tensor | None
    logsumexp: Tensor
    buckets: Tensor | None


def _probabilities(q: Tensor, k: Tensor, number: int, extras: Extras, options: Options) -> _Probabilities:
    batch, heads, queries, _ = q.shape
    keys, device = k.shape[2], q.device
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    distance, buckets = key - position, None
    s = (q @ k.transpose(2, 3)) * options.scale
    if extras.table is not None:
        buckets = relative_position_bucket(distance, options.bidirectional, extras.table.shape[0], options.max_distance)
        s = s + extras.table.to(s.dtype)[buckets].permute(2, 0, 1)
    if extras.slopes is not None:
        s = s - extras.slopes.to(s.dtype)[:, None, None] * distance.abs()
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if options.left != UNLIMITED:
        seen = seen & (distance >= -options.left)
    if options.right != UNLIMITED:
        seen = seen & (distance <= options.right)
    if extras.key_mask is not None:
        seen = seen & extras.key_mask[:, None, None, :]
    if extras.key_lengths is not None:
        seen = seen & (key < extras.key_lengths[:, None, None, None])
    if extras.mask is not None:
        seen = seen & extras.mask
    s = s.masked_fill(~seen, float("-inf"))
    logsumexp = torch.logsumexp(s, -1) if keys else s.new_full(s.shape[:-1], float("-inf"))
    # Infinite where a query sees nothing: every probability that a kernel makes from it is then zero.
    logsumexp = logsumexp.masked_fill(logsumexp == float("-inf"), float("inf"))
    kept = None
    if options.dropout and extras.rng is not None:
        kept = kept_elements(extras.rng, options.dropout, batch, heads, queries, keys, number).to(s.dtype)
        kept = kept * kept_scale(options.dropout)
    p = torch.softmax(s, -1) if keys else s
    p = p.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return _Probabilities(p, kept, logsumexp, buckets)


def new_like_tokens(x: Tensor) -> Tensor:
    """An empty tensor of this shape; in memory ``[batch, tokens, heads, dim]``, as the projection after it reads it."""
    if x.dim() == 3:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, heads, tokens, dim = x.shape
    return torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)


def new_joined(q: Tensor, k: Tensor) -> tuple[Tensor, Gradients]:
    """One empty tensor for the gradients of ``q``, ``k`` and ``v``, and they as views of it.

    Its memory is that of what a merged projection gives before it is split: ``[batch, tokens, heads + 2 · kv_heads, dim]``, or
    ``[tokens, heads + 2 · kv_heads, dim]`` packed.

    Raises:
        ConfigError: there are not as many keys as queries.
    """
    tokens = 0 if q.dim() == 3 else 2
    if q.shape[tokens] != k.shape[tokens]:
        remedy = "attention_backward, whose gradients lie apart"
        raise _error("k", f"{k.shape[tokens]} keys", f"{q.shape[tokens]}, as many as queries", remedy)
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[-1]
    leading = (q.shape[0],) if q.dim() == 3 else (q.shape[0], q.shape[2])
    joined = torch.empty((*leading, heads + 2 * kv_heads, dim), dtype=q.dtype, device=q.device)
    dq, dk, dv = (joined if q.dim() == 3 else joined.transpose(1, 2)).split([heads, kv_heads, kv_heads], 1)
    return joined, (dq, dk, dv)


def new_logsumexp(q: Tensor) -> Tensor:
    """An empty tensor for the logarithms.

    In double for float32 too: ``2 ** (s - logsumexp)`` would else be five times as wrong as eager code's softmax, by the
    rounding of a logarithm of ten or twenty alone.
    """
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    dtype = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.empty(shape, dtype=dtype, device=q.device)


def new_rest(q: Tensor, options: Options) -> Tensor:
    """An empty tensor for what is rounded away from the result, or one without elements."""
    return new_like_tokens(q) if options.keep and q.dtype in (torch.float16, torch.bfloat16) else q.new_empty(0)


def new_kept(q: Tensor, k: Tensor, extras: Extras, options: Options) -> Tensor:
    """An empty tensor for what dropout kept, a bit for each element of the softmax; without elements where there is none.

    int32 ``[batch, heads, keys / 64, queries / 64, 128]``, rounded up: 25 MB for 64 sequences of 512 tokens and 12 heads.
    Packed ``[heads, max_keys / 64, tokens / 64 + batch, 128]``: the queries of a sequence begin at block ``first token / 64 +
    its number``, which no other sequence reaches. For the order of the bits see :func:`pack_kept`.
    """
    if not options.keep or not options.dropout:
        return torch.empty((0,), dtype=torch.int32, device=q.device)
    return torch.empty(_kept_shape(q, k, extras, options), dtype=torch.int32, device=q.device)


def _kept_shape(q: Tensor, k: Tensor, extras: Extras, options: Options) -> tuple[int, ...]:
    if extras.q_offsets is not None:
        return q.shape[1], -(-options.max_keys // 64), q.shape[0] // 64 + extras.q_offsets.shape[0] - 1, 128
    return q.shape[0], q.shape[1], -(-k.shape[2] // 64), -(-q.shape[2] // 64), 128


def check_kept(q: Tensor, k: Tensor, kept: Tensor, extras: Extras, options: Options) -> None:
    """Raise ConfigError where kernels would have to read what the forward did not keep."""
    if options.dropout and kept.shape != _kept_shape(q, k, extras, options):
        allowed = f"{list(_kept_shape(q, k, extras, options))}, what the forward has returned"
        raise _error("kept", f"shape {list(kept.shape)}", allowed, "keep=True in the forward")


def pack_kept(kept: Tensor) -> Tensor:
    """A random mask ``[..., queries, keys]`` as int32 ``[..., keys / 64, queries / 64, 128]``, rounded up with zeros.

    A word has the elements that one thread of a tensor core's result holds, of 16 queries and 64 keys: bits 3 to 5 of the key's
    number, bit 0 of it, and bit 3 of the query's say which bit. Bits 4 and 5 of the query's number, 1 and 2 of the key's, and 0
    to 2 of the query's say which of 128 words. So the thread that has drawn them writes them as they are, a thread of ``dq``
    needs one word of a tile of 64 × 64, and one of ``dk`` and ``dv``, whose rows are keys, four bits of each of eight.
    """
    queries, keys = kept.shape[-2:]
    kept = torch.nn.functional.pad(kept, (0, -keys % 64, 0, -queries % 64))
    kept = kept.unflatten(-1, (-1, 8, 4, 2)).unflatten(-5, (-1, 4, 2, 8))
    # [..., queries / 64, block, half, row, keys / 64, eight, pair, parity], 8 to 1 from the end
    kept = kept.movedim((-4, -8, -7, -2, -5, -3, -1, -6), (-8, -7, -6, -5, -4, -3, -2, -1)).flatten(-3).flatten(-4, -2)
    # The last bit is the sign.
    weights = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], device=kept.device)
    return (kept.long() * weights).sum(-1).to(torch.int32)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    slopes: Tensor | None,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
    rng: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bidirectional: bool,
    max_distance: int,
    dropout: float,
    max_queries: int,
    max_keys: int,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The meaning, in plain PyTorch. Arguments: :class:`Extras`, then :class:`Options`.

    Returns:
        The attention in the shape of ``q``; the logarithm of each query's sum of exponentials, for the backward: in base 2 for
        half precision, as kernels compute, else in base e; what was rounded away from the attention; and which elements dropout
        kept (:func:`new_kept`). The last two are without elements unless kept.
    """
    extras = Extras(table, slopes, key_mask, key_lengths, mask, q_offsets, k_offsets, rng)
    options = Options(scale, left, right, bidirectional, max_distance, dropout, max_queries, max_keys, keep)
    _check(q, k, v, extras, options)
    packed, wide, groups = q.dim() == 3, wide_dtype(q.dtype), q.shape[1] // k.shape[1]
    out, logsumexp, rest = new_like_tokens(q), new_logsumexp(q), new_rest(q, options)
    words = new_kept(q, k, extras, options).zero_()
    with torch.autocast(q.device.type, enabled=False):
        for part in _parts(extras):
            qs = _take(q, part.queries, wide, packed)
            ks, vs = (_take(x, part.keys, wide, packed).repeat_interleave(groups, 1) for x in (k, v))
            p, kept, logs, _ = _probabilities(qs, ks, part.number, extras, options)
            wide_out = (p if kept is None else p * kept) @ vs
            _put(out, part.queries, wide_out, packed)
            if rest.numel():
                _put(rest, part.queries, wide_out - wide_out.to(out.dtype), packed)
            logs = logs if q.dtype in (torch.float32, torch.float64) else logs / math.log(2.0)
            logsumexp[..., part.queries] = logs[0] if packed else logs
            if words.numel() and kept is not None:
                found = pack_kept(kept != 0)
                if packed:
                    first = (part.queries.start or 0) // 64 + part.number
                    words[:, : found.shape[2], first : first + found.shape[3]] = found[0]
                else:
                    words.copy_(found)
    return out, logsumexp, rest, words


def attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rest: Tensor,
    kept: Tensor,
    *arguments: Any,
    gradients: Gradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient, in plain PyTorch.

    Args:
        dout: gradient of the attention.
        q, k, v: as in the forward.
        out, logsumexp, rest, kept: what it returned. Not needed here, where the mask is drawn again; kernels compute the
            probabilities from them.
        arguments: :class:`Extras`, then :class:`Options`, then whether the table's gradient is wanted.
        gradients: where to write those of ``q``, ``k`` and ``v``; by default into new tensors.

    Returns:
        The gradients of ``q``, ``k``, ``v`` and of the table (no elements unless wanted).
    """
    extras, options, table_gradient = split(arguments)
    packed, wide, groups = q.dim() == 3, wide_dtype(q.dtype), q.shape[1] // k.shape[1]
    dq, dk, dv = gradients or tuple(new_like_tokens(x) for x in (q, k, v))
    table = extras.table if table_gradient else None
    dtable = q.new_zeros(0 if table is None else table.shape, dtype=wide)
    for part in _parts(extras):
        qs, g = (_take(x, part.queries, wide, packed) for x in (q, dout))
        ks, vs = (_take(x, part.keys, wide, packed).repeat_interleave(groups, 1) for x in (k, v))
        p, share, _, buckets = _probabilities(qs, ks, part.number, extras, options)
        dropped = p if share is None else p * share
        dp = g @ vs.transpose(2, 3)
        dp = dp if share is None else dp * share
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        _put(dq, part.queries, ds @ ks * options.scale, packed)
        for target, value in ((dk, ds.transpose(2, 3) @ qs * options.scale), (dv, dropped.transpose(2, 3) @ g)):
            _put(target, part.keys, value.unflatten(1, (-1, groups)).sum(2), packed)
        if table is not None and buckets is not None:
            dtable.index_add_(0, buckets.flatten(), ds.sum(0).flatten(1).t())
    return dq, dk, dv, dtable if table is None else dtable.to(table.dtype)


def split(arguments: tuple[Any, ...]) -> tuple[Extras, Options, bool]:
    """The operators' arguments by kind. The last one is the backward's."""
    extras, options = len(Extras._fields), len(Options._fields)
    given = Extras(*arguments[:extras]), Options(*arguments[extras : extras + options])
    return *given, bool(arguments[extras + options]) if len(arguments) > extras + options else False


# --- the operators -----------------------------------------------------------------------------------------------------------

_BACKWARD = "attention_backward"
_JOINED = "attention_backward_joined"
_LIBRARY = torch.library.Library("oslo_fusion", "FRAGMENT")
_ARGUMENTS = (
    "Tensor? table, Tensor? slopes, Tensor? key_mask, Tensor? key_lengths, Tensor? mask, Tensor? q_offsets, Tensor? k_offsets, "
    "Tensor? rng, float scale, int left, int right, bool bidirectional, int max_distance, float dropout, SymInt max_queries, "
    "SymInt max_keys, bool keep"
)
_SCHEMAS = {
    NAME: f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor logsumexp, Tensor rest, Tensor kept)",
    _BACKWARD: f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor rest, Tensor kept, "
    f"{_ARGUMENTS}, bool table_gradient)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable)",
}
_SCHEMAS[_JOINED] = _SCHEMAS[_BACKWARD].replace("Tensor dq, Tensor dk, Tensor dv", "Tensor joined")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(f"{_name}{_schema}", tags=torch.Tag.pt2_compliant_tag)


# Importing the kernels registers them over these, so that each sees at most one CUDA tensor where there is a triton.


def _default(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = find_kernels(NAME) if q.is_cuda else None
    launch = attention_reference if kernels is None else kernels.launch_attention
    result: tuple[Tensor, Tensor, Tensor, Tensor] = launch(q, *arguments)
    return result


def _backward_default(dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = find_kernels(NAME) if dout.is_cuda else None
    launch = attention_backward_reference if kernels is None else kernels.launch_attention_backward
    result: tuple[Tensor, Tensor, Tensor, Tensor] = launch(dout, *arguments)
    return result


def _joined_default(dout: Tensor, q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    kernels = find_kernels(NAME) if dout.is_cuda else None
    launch = attention_backward_reference if kernels is None else kernels.launch_attention_backward
    joined, gradients = new_joined(q, k)
    *_, dtable = launch(dout, q, k, *arguments, gradients=gradients)
    return joined, dtable


def register_kernels(forward: Any, backward: Any, key: str) -> None:
    """Register faster implementations of the first two operators for one dispatch key, such as ``CUDA``."""
    _LIBRARY.impl(NAME, forward, key)
    _LIBRARY.impl(_BACKWARD, backward, key)


def _fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extras, options, _ = split(arguments)
    _check(q, k, v, extras, options)
    return new_like_tokens(q), new_logsumexp(q), new_rest(q, options), new_kept(q, k, extras, options)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, rest: Tensor, kept: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extras, _, wanted = split(arguments)
    dtable = (
        q.new_empty(0, dtype=wide_dtype(q.dtype))
        if extras.table is None or not wanted
        else extras.table.new_empty(extras.table.shape)
    )
    return new_like_tokens(q), new_like_tokens(k), new_like_tokens(v), dtable


def _joined_fake(dout: Tensor, q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return new_joined(q, k)[0], _backward_fake(dout, q, k, *arguments)[3]


_LIBRARY.impl(NAME, _default, "CompositeExplicitAutograd")
_LIBRARY.impl(_BACKWARD, _backward_default, "CompositeExplicitAutograd")
_LIBRARY.impl(_JOINED, _joined_default, "CompositeExplicitAutograd")
torch.library.register_fake(f"oslo_fusion::{NAME}", _fake, lib=_LIBRARY)
torch.library.register_fake(f"oslo_fusion::{_BACKWARD}", _backward_fake, lib=_LIBRARY)
torch.library.register_fake(f"oslo_fusion::{_JOINED}", _joined_fake, lib=_LIBRARY)
ATTENTION = torch.ops.oslo_fusion.attention.default
ATTENTION_BACKWARD = torch.ops.oslo_fusion.attention_backward.default
ATTENTION_BACKWARD_JOINED = torch.ops.oslo_fusion.attention_backward_joined.default
"""The same with the three gradients in one tensor (:func:`new_joined`), for what comes of a merged projection."""


# --- the gradient ------------------------------------------------------------------------------------------------------------

_TENSORS = len(Extras._fields)


def no_second_derivative(name: str) -> None:
    """Raise RuntimeError in a gradient that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: has no second derivative. Remedy: create_graph=False, or attention of plain torch, such as transformers' "
            "attn_implementation='eager'."
        )


def _gradients(ctx: Any, dout: Tensor | None, backward: Any) -> tuple[Tensor | None, ...]:
    """Gradients of ``q``, ``k``, ``v`` and the table; None for the other arguments."""
    nothing = (None,) * (_TENSORS - 1 + len(Options._fields))
    if dout is None:
        return None, None, None, None, *nothing
    no_second_derivative(NAME)
    q, k, v, out, logsumexp, rest, kept, *extras = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, dtable = backward(dout, q, k, v, out, logsumexp, rest, kept, *extras, *ctx.options, wanted)
    return dq, dk, dv, dtable if wanted else None, *nothing


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, *arguments = inputs
    ctx.save_for_backward(q, k, v, *output, *arguments[:_TENSORS])
    ctx.options = Options(*arguments[_TENSORS:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dout, ATTENTION_BACKWARD)


torch.library.register_autograd(f"oslo_fusion::{NAME}", _backward, setup_context=_context, lib=_LIBRARY)


class _Attention(torch.autograd.Function):
    """The operators and their gradient for plain eager code on a GPU: launches, and nothing between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        kernels = find_kernels(NAME)
        assert kernels is not None
        out, *state = kernels.launch_attention(*inputs)
        ctx.save_for_backward(*inputs[:3], out, *state, *inputs[3 : 3 + _TENSORS])
        ctx.options = Options(*inputs[3 + _TENSORS :])
        ctx.set_materialize_grads(False)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Any:
        kernels = find_kernels(NAME)
        assert kernels is not None
        return _gradients(ctx, dout, kernels.launch_attention_backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias_table: Tensor | None = None,
    bidirectional: bool = True,
    max_distance: int = 128,
    alibi_slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    kernel: str = "triton",
) -> Tensor:
    """Attention in the memory of its inputs and outputs, with T5's bias, padding and dropout computed inside.

    Args:
        q: ``[batch, heads, queries, dim]``, half, bfloat16, float or double, ``dim`` up to 256; any strides: transposed
            views of ``[batch, queries, heads, dim]`` are read as they are. With cumulative lengths ``[tokens, heads, dim]``.
        k, v: ``[batch, kv_heads, keys, dim]``, or ``[key tokens, kv_heads, dim]``; ``kv_heads`` divides ``heads``.
        scale: of ``q · k``; by default ``dim ** -0.5``. T5 has 1.
        causal: a query sees no key after its own position; the last query stands at the last key, as in transformers.
        window: how many keys to the left and to the right of its own a query sees; None for all. transformers'
            ``sliding_window=w`` is ``(w - 1, None)`` with ``causal``, and ``(w, w)`` in encoders.
        bias_table: T5's ``[buckets, heads]``, the weight of ``relative_attention_bias``; gets a gradient.
        bidirectional, max_distance: of its buckets: ``not is_decoder`` and ``relative_attention_max_distance``.
        alibi_slopes: ``[heads]``: ``-slope · |distance|`` is added. They get no gradient.
        key_mask: ``[batch, keys]`` bool, true where a key is no padding. A run of true is fastest: what is outside is skipped.
        key_lengths: ``[batch]`` int32 instead: keys before the padding on the right.
        mask: ``[batch or 1, heads or 1, queries or 1, keys]`` bool, true where a query may see a key, as transformers gives it
            to ``scaled_dot_product_attention``. A byte is read per score: what the others can say is faster said by them.
        cu_seqlens_q, cu_seqlens_k: ``[batch + 1]`` int32, cumulative lengths of packed sequences; that of keys defaults to that
            of queries. On a GPU their values are not looked at, and never lead outside of the tensors.
        max_seqlen_q, max_seqlen_k: the longest sequence; where missing, the host waits for it.
        dropout: the probability that an element of the softmax becomes zero.
        rng: int64 ``[2]``, seed and offset of the dropout; by default drawn from torch's generator of the device.
        kernel: ``triton``, which is ours, the reference where there is none; or a vendor's for what it can serve: ``cudnn``,
            ``flash``, ``efficient`` (see :mod:`oslo_fusion.ops.attention_backends`).

    Returns:
        The shape and dtype of ``q``; in memory ``[batch, queries, heads, dim]``. Zeros where a query sees no key.

    Raises:
        ConfigError: a shape, dtype, device, length or option that has no meaning here, or that the kernel cannot serve.
    """
    if kernel != "triton":
        from oslo_fusion.ops import attention_backends  # which calls this function for ours

        unserved = {"bias_table": bias_table, "alibi_slopes": alibi_slopes, "key_lengths": key_lengths, "rng": rng}
        return attention_backends.by_vendor(
            kernel,
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            window=window,
            mask=mask if key_mask is None else _of_pairs(key_mask, mask, q),
            cu_seqlens=(cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k),
            longest=(_longest(cu_seqlens_q, max_seqlen_q), _longest(cu_seqlens_k, max_seqlen_k or max_seqlen_q)),
            dropout=dropout,
            unserved=[name for name, given in unserved.items() if given is not None],
        )
    q, k, v, *arguments = prepare(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window=window,
        bias_table=bias_table,
        bidirectional=bidirectional,
        max_distance=max_distance,
        alibi_slopes=alibi_slopes,
        key_mask=key_mask,
        key_lengths=key_lengths,
        mask=mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout=dropout,
        rng=rng,
    )
    kernels = None
    if q.is_cuda and not torch.compiler.is_compiling() and is_plain(q, k, v, *arguments[:_TENSORS]):
        kernels = find_kernels(NAME)
    result: Tensor
    if kernels is None:
        result, *_ = ATTENTION(q, k, v, *arguments)
    elif wants_gradient(q, k, v, bias_table):
        result = _Attention.apply(q, k, v, *arguments)
    else:
        result, *_ = kernels.launch_attention(q, k, v, *arguments)
    return result


def _of_pairs(key_mask: Tensor, mask: Tensor | None, q: Tensor) -> Tensor:
    pairs = key_mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    return pairs if mask is None else pairs & mask


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    bias_table: Tensor | None = None,
    bidirectional: bool = True,
    max_distance: int = 128,
    alibi_slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Any, ...]:
    """The operator's arguments from those of :func:`attention`."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    left, right = (UNLIMITED if side is None else side for side in (window or (None, None)))
    if causal:
        right = 0
    if alibi_slopes is not None and wants_gradient(alibi_slopes):
        raise _error("alibi_slopes", "slopes that require a gradient", "slopes that do not", "alibi_slopes.detach()")
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_k or max_seqlen_q
    if dropout and rng is None:
        rng = draw_rng(q.device)
    return (
        q,
        k,
        v,
        bias_table,
        alibi_slopes,
        key_mask,
        key_lengths,
        mask,
        cu_seqlens_q,
        cu_seqlens_k,
        rng if dropout else None,
        float(scale if scale is not None else q.shape[-1] ** -0.5),
        left,
        right,
        bidirectional,
        max_distance,
        float(dropout),
        _longest(cu_seqlens_q, max_seqlen_q),
        _longest(cu_seqlens_k, max_seqlen_k),
        wants_gradient(q, k, v, bias_table),
    )


def _longest(offsets: Tensor | None, given: int | None) -> int:
    if offsets is None or given is not None:
        return given or 0
    return int(offsets.diff().max()) if offsets.numel() > 1 else 0
