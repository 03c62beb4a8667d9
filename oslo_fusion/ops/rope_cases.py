"""Named queries, keys and angles that a rotation must take: one list for reference and Triton, in tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from oslo_fusion.ops.row_cases import Draw

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""``q``, ``k``, ``cos``, ``sin``, with one number of cos and sin for each rotated number. They need not be cosines."""


def _case(
    draw: Draw, batch: int, heads: int, kv_heads: int, seq: int, dim: int, rot_dim: int, angle_batch: int | None = None
) -> Inputs:
    """As transformers passes them: transposed views of ``[batch, seq, heads, dim]``."""
    angles = (batch if angle_batch is None else angle_batch, seq, rot_dim)
    q, k = draw(batch, seq, heads, dim).transpose(1, 2), draw(batch, seq, kv_heads, dim).transpose(1, 2)
    return q, k, draw(*angles), draw(*angles)


def _packed(draw: Draw) -> Inputs:
    q, k, _ = draw(2, 3, 5, 3 * 16).chunk(3, -1)
    return q.transpose(1, 2), k.transpose(1, 2), draw(2, 3, 16), draw(2, 3, 16)


def _cut(draw: Draw) -> Inputs:
    q, k, cos, sin = _case(draw, 1, 3, 3, 4, 20, 20)
    return q[..., 3:15], k[..., 3:15], cos[..., :12], sin[..., 5:17]


ROPE_CASES: dict[str, Callable[[Draw], Inputs]] = {
    "one pair": lambda draw: _case(draw, 1, 1, 1, 1, 2, 2),
    "as many keys": lambda draw: _case(draw, 2, 4, 4, 5, 16, 16),
    "fewer keys": lambda draw: _case(draw, 2, 8, 2, 5, 32, 32),
    "one key": lambda draw: _case(draw, 1, 7, 1, 3, 64, 64),
    "odd": lambda draw: _case(draw, 3, 5, 3, 7, 6, 6),
    "odd halves": lambda draw: _case(draw, 1, 3, 1, 5, 80, 26),
    "part of a head": lambda draw: _case(draw, 2, 4, 2, 3, 32, 8),
    "half of a head": lambda draw: _case(draw, 1, 2, 2, 3, 96, 48),
    "more heads than a tile": lambda draw: _case(draw, 1, 71, 9, 2, 128, 128),
    "one step of many": lambda draw: _case(draw, 8, 4, 2, 1, 64, 64),
    "same angles for all": lambda draw: _case(draw, 3, 2, 2, 5, 16, 16, 1),
    "contiguous": lambda draw: (draw(2, 4, 5, 16), draw(2, 2, 5, 16), draw(2, 5, 16), draw(2, 5, 16)),
    "packed": _packed,
    "cut out of wider heads": _cut,
    "strided numbers": lambda draw: (draw(2, 2, 3, 32)[..., ::2], draw(2, 1, 3, 32)[..., ::2], draw(2, 3, 16), draw(2, 3, 16)),
    "dimensions in another order": lambda draw: (
        draw(16, 4, 2, 3).permute(2, 1, 3, 0),
        draw(3, 2, 16, 2).permute(1, 3, 0, 2),
        draw(3, 2, 16).transpose(0, 1),
        draw(2, 3, 16),
    ),
    "expanded": lambda draw: (
        draw(1, 4, 1, 16).expand(2, 4, 3, 16),
        draw(2, 1, 3, 16).expand(2, 2, 3, 16),
        draw(1, 1, 16).expand(2, 3, 16),
        draw(2, 3, 16),
    ),
    "no batch": lambda draw: _case(draw, 0, 2, 2, 3, 8, 8),
    "no position": lambda draw: _case(draw, 2, 2, 2, 0, 8, 8),
    "no keys": lambda draw: _case(draw, 2, 2, 0, 3, 8, 8),
}
