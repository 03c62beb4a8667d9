"""Named attentions that every implementation must compute: one list for reference and Triton, in tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.ops.attention import kept_elements, relative_position_bucket
from oslo_fusion.ops.dropout import kept_scale
from oslo_fusion.ops.row_cases import Draw


@dataclass(frozen=True)
class AttentionCase:
    """Shapes and options of one attention.

    Attributes:
        batch, heads, kv_heads, queries, keys, dim: shapes.
        causal, window, scale, dropout: as in :func:`oslo_fusion.ops.attention.attention`.
        table: T5's bias: ``encoder`` or ``decoder`` for its buckets.
        slopes: with ALiBi.
        padding: ``right``, ``left``, ``holes`` or ``all`` of one sequence as a mask; ``lengths`` for the right as numbers.
        mask_sizes: batch, heads and queries of a mask of queries and keys; each 1 or its full size. It hides some pairs, and
            all keys from one query.
        packed: lengths of packed sequences, queries and keys alike, instead of batch, queries and keys.
        buckets, max_distance: of T5's bias. Small, so that short sequences reach what is far.
    """

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    queries: int = 17
    keys: int = 17
    dim: int = 32
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    dropout: float = 0.0
    table: str | None = None
    slopes: bool = False
    padding: str | None = None
    mask_sizes: tuple[int, int, int] | None = None
    packed: tuple[int, ...] | None = None
    buckets: int = 8
    max_distance: int = 9

    def tensors(self, draw: Draw) -> list[Tensor]:
        """``q``, ``k``, ``v`` as transposed views, as projections leave them, and the table if there is one."""
        if self.packed is not None:
            tokens = sum(self.packed)
            tensors = [draw(tokens, n, self.dim) for n in (self.heads, self.kv_heads, self.kv_heads)]
        else:
            shapes = ((self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
            tensors = [draw(self.batch, tokens, n, self.dim).transpose(1, 2) for tokens, n in shapes]
        if self.scale == 1.0:  # T5's queries are as much smaller as others' scores are scaled down
            tensors[0] = tensors[0] * self.dim**-0.5
        return tensors + ([draw(self.buckets, self.heads)] if self.table else [])

    def options(self, device: torch.device | str) -> dict[str, Any]:
        """Keyword arguments of ``attention`` but for the table."""
        given: dict[str, Any] = {"causal": self.causal, "window": self.window, "scale": self.scale}
        if self.table:
            given |= {"bidirectional": self.table == "encoder", "max_distance": self.max_distance}
        if self.slopes:
            given["alibi_slopes"] = torch.tensor([2.0**-n for n in range(1, self.heads + 1)], device=device)
        if self.padding == "lengths":
            given["key_lengths"] = self.mask().sum(1).to(device, torch.int32)
        elif self.padding:
            given["key_mask"] = self.mask().to(device)
        if self.mask_sizes:
            given["mask"] = self.pairs().to(device)
        if self.packed is not None:
            given["cu_seqlens_q"] = torch.tensor([0, *self.packed], device=device).cumsum(0).to(torch.int32)
        if self.dropout:
            given |= {"dropout": self.dropout, "rng": torch.tensor([1234567890123, 1 << 40], device=device)}
        return given

    def rounding(self, tensors: list[Tensor]) -> float:
        """The largest that a gradient may come out that is zero but for rounding.

        With one key to see, the scores' gradient is the difference of two equal sums over a head's numbers. They are float32 in
        every dtype, in two orders, and what is left is multiplied by a key or a query.
        """
        largest = max(float(t.abs().max()) for t in tensors if t.numel())
        scale: float = self.dim**-0.5 if self.scale is None else abs(self.scale)
        return torch.finfo(torch.float32).eps * self.dim * largest**3 * scale

    def pairs(self) -> Tensor:
        """``[*mask_sizes, keys]``, true where a query may see a key."""
        assert self.mask_sizes is not None
        sizes = (*self.mask_sizes, self.keys)
        b, h, i, j = (torch.arange(size).view([-1 if d == dim else 1 for d in range(4)]) for dim, size in enumerate(sizes))
        seen = (7 * b + h + 3 * i + 5 * j) % 4 != 1
        return seen & (i != 2)

    def mask(self) -> Tensor:
        """``[batch, keys]``, true where no padding is. The first sequence is whole, the others are shorter and shorter."""
        number = torch.arange(self.keys)[None, :]
        padded = (torch.arange(self.batch) * self.keys // (self.batch + 1))[:, None]
        if self.padding == "left":
            return number >= padded
        if self.padding == "holes":
            return (number >= padded // 2) & (number % 3 != 1)
        mask = number < self.keys - padded
        if self.padding == "all":
            mask[-1] = False
        return mask


def eager_attention(case: AttentionCase) -> Callable[..., Tensor]:
    """What eager code does in the dtype it is given: all scores at once, each step rounded. In float64 it is the truth."""

    def whole(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, mask: Tensor | None, number: int) -> Tensor:
        device, queries, keys, groups = q.device, q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        s = (q @ k.transpose(2, 3)) * (case.dim**-0.5 if case.scale is None else case.scale)
        distance = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None] - (keys - queries)
        if table is not None:
            buckets = relative_position_bucket(distance, case.table == "encoder", case.buckets, case.max_distance)
            s = s + F.embedding(buckets, table).permute(2, 0, 1)
        if case.slopes:
            slopes = torch.tensor([2.0**-n for n in range(1, case.heads + 1)], device=device, dtype=s.dtype)
            s = s - slopes[:, None, None] * distance.abs()
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        left, right = case.window or (None, None)
        seen = seen if left is None else seen & (distance >= -left)
        right = 0 if case.causal else right
        seen = seen if right is None else seen & (distance <= right)
        seen = seen if mask is None else seen & mask.to(device)[:, None, None, :]
        seen = seen if case.mask_sizes is None else seen & case.pairs().to(device)
        # A row without a key would be NaN.
        p = torch.softmax(s.masked_fill(~seen, float("-inf")).masked_fill(~seen.any(-1, keepdim=True), 0.0), -1)
        p = p.masked_fill(~seen, 0.0)
        if case.dropout:
            rng = case.options(device)["rng"]
            kept = kept_elements(rng, case.dropout, q.shape[0], case.heads, queries, keys, number)
            p = p * kept.to(p.dtype) * kept_scale(case.dropout)
        return p @ v

    def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        if case.packed is None:
            return whole(q, k, v, table, case.mask() if case.padding else None, 0)
        parts = zip(*(x.split(case.packed) for x in (q, k, v)), strict=True)
        results = []
        for number, part in enumerate(parts):
            queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in part)
            results.append(whole(queries, keys, values, table, None, number))
        return torch.cat([result.squeeze(0).transpose(0, 1) for result in results])

    return eager


ATTENTION_CASES: dict[str, AttentionCase] = {
    "one token": AttentionCase(queries=1, keys=1),
    "plain": AttentionCase(),
    "two blocks": AttentionCase(queries=33, keys=33, dim=64),
    "causal": AttentionCase(queries=33, keys=33, causal=True),
    "causal, a cache before": AttentionCase(queries=5, keys=38, causal=True),
    "causal, queries before the keys": AttentionCase(queries=38, keys=5, causal=True),
    "cross": AttentionCase(queries=13, keys=50, scale=1.0),
    "grouped": AttentionCase(heads=6, kv_heads=2, queries=20, keys=33, causal=True, batch=1),
    "one kv head": AttentionCase(heads=3, kv_heads=1, dim=16),
    "head size 1": AttentionCase(dim=1),
    "head size 80": AttentionCase(dim=80, queries=33, keys=33),
    "head size 96": AttentionCase(dim=96, causal=True),
    "head size 128": AttentionCase(dim=128, batch=1),
    "head size 256": AttentionCase(dim=256, batch=1),
    "causal window": AttentionCase(queries=40, keys=40, causal=True, window=(6, None)),
    "window": AttentionCase(queries=40, keys=40, window=(5, 3)),
    "negative scale": AttentionCase(scale=-0.3),
    "right padding": AttentionCase(queries=33, keys=33, padding="right", batch=3),
    "left padding": AttentionCase(queries=33, keys=33, padding="left", batch=3, causal=True),
    "holes": AttentionCase(queries=33, keys=40, padding="holes"),
    "nothing but padding": AttentionCase(queries=20, keys=33, padding="all"),
    "lengths": AttentionCase(queries=33, keys=50, padding="lengths", batch=3),
    "T5 encoder": AttentionCase(queries=90, keys=90, table="encoder", scale=1.0, batch=1),
    "T5 encoder, padded": AttentionCase(queries=50, keys=50, table="encoder", scale=1.0, padding="right"),
    "T5 decoder": AttentionCase(queries=70, keys=70, table="decoder", causal=True, scale=1.0),
    "T5 decoder, a cache before": AttentionCase(queries=3, keys=70, table="decoder", causal=True, scale=1.0),
    "T5 with dropout": AttentionCase(queries=50, keys=50, table="encoder", dropout=0.2),
    "T5 with dropout, unaligned": AttentionCase(queries=40, keys=51, table="decoder", causal=True, dropout=0.2),
    "T5 window": AttentionCase(queries=60, keys=60, table="encoder", window=(20, 30)),
    "ALiBi": AttentionCase(queries=33, keys=33, slopes=True, causal=True),
    "ALiBi both ways": AttentionCase(queries=20, keys=33, slopes=True, padding="right"),
    "dropout": AttentionCase(queries=33, keys=50, dropout=0.1),
    "dropout, causal, grouped": AttentionCase(queries=33, keys=33, heads=4, causal=True, dropout=0.5),
    "a mask for each sequence": AttentionCase(queries=33, keys=40, mask_sizes=(2, 1, 33)),
    "a mask for each head": AttentionCase(queries=20, keys=33, heads=4, mask_sizes=(1, 4, 20), dropout=0.2),
    "a mask of keys for all": AttentionCase(queries=33, keys=33, mask_sizes=(1, 1, 1), causal=True),
    "a mask, T5 decoder": AttentionCase(
        queries=50, keys=50, table="decoder", scale=1.0, mask_sizes=(2, 1, 50), padding="right", dropout=0.1
    ),
    "packed": AttentionCase(packed=(17, 1, 33, 5)),
    "packed, an empty one": AttentionCase(packed=(17, 0, 20), causal=True),
    "packed with everything": AttentionCase(
        packed=(40, 3, 17), heads=4, table="decoder", causal=True, window=(30, None), dropout=0.1, dim=40
    ),
}
