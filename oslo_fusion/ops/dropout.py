"""Dropout by a counter: whether an element stays is a function of a seed and of where the element is, not of who computes it.

So a backward draws the mask of its forward again, however it cuts its work, and no mask is kept; attention, whose backward has
three kernels, keeps a bit an element instead. An element is dropped by 16
bits of Philox 2×32 with 7 rounds, whose counter says where the element is, under a key that 10 rounds make from seed, offset
and a number of the part it is in. ``dropout`` is rounded to a multiple of 1/65536, and what is kept is divided by the share
that is really kept. Seed and offset are a tensor, so that a captured graph can change them and a compiled program hold them.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (Philox), SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEEP_BITS = 16
ROUNDS, KEY_ROUNDS = 7, 10
_PHILOX_MULTIPLIER, _PHILOX_WEYL, _WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF


def draw_rng(device: torch.device) -> Tensor:
    """Seed and offset, ``[2]`` int64, from torch's generator of the device, without waiting for it."""
    return torch.randint(-(1 << 62), 1 << 62, (2,), dtype=torch.int64, device=device)


def kept_threshold(dropout: float) -> int:
    """An element is kept if its 16 bits are smaller than this."""
    return round((1.0 - dropout) * (1 << KEEP_BITS))


def kept_scale(dropout: float) -> float:
    """What is kept is multiplied by this: one through the share that is kept after rounding."""
    return float((1 << KEEP_BITS) / max(kept_threshold(dropout), 1))


def philox(x: Tensor, y: Tensor, key: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Philox 2×32: two words of 32 bits from a counter of two and a key, all int64 tensors that broadcast."""
    for number in range(rounds):
        # A product of two words needs 64 bits without a sign: it is put together from halves.
        low, high = _PHILOX_MULTIPLIER * (x & 0xFFFF), _PHILOX_MULTIPLIER * (x >> 16)
        upper, lower = (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD
        x, y = upper ^ ((key + number * _PHILOX_WEYL) & _WORD) ^ y, lower
    return x, y


def random_key(rng: Tensor, number: Tensor) -> Tensor:
    """The key under which the elements of a part are counted.

    Args:
        rng: seed and offset.
        number: of the part, int64 of any shape.
    """
    seed, offset = rng[0], rng[1]
    x, y = philox(number, (offset & _WORD).expand_as(number), seed & _WORD, KEY_ROUNDS)
    key, _ = philox(x ^ ((offset >> 32) & _WORD), y, (seed >> 32) & _WORD, KEY_ROUNDS)
    return key


def kept_in_rows(rng: Tensor, dropout: float, shape: tuple[int, ...]) -> Tensor:
    """The random mask of rows, bool of this shape ``[*batch, dim]``: true where an element stays.

    The counter is a quarter of the column's number and the row's: one draw of 64 bits serves four neighbours, which one thread
    loads together.

    Args:
        rng: seed and offset.
        dropout: the probability to be dropped.
        shape: of the rows.
    """
    device, dim = rng.device, shape[-1]
    num_rows = 1
    for size in shape[:-1]:
        num_rows *= size
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(dim, device=device)[None, :]
    x, y = philox(column >> 2, row & _WORD, random_key(rng, torch.zeros_like(rng[0])), ROUNDS)
    bits = (torch.where((column & 2) != 0, y, x) >> ((column & 1) << 4)) & 0xFFFF
    return (bits < kept_threshold(dropout)).view(shape)
