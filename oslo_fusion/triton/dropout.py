"""The counter of dropout in Triton: what a kernel draws with, forward and again in its backward. See ``ops/dropout.py``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# A kernel's arguments carry no types: triton would take an annotation for a value to be used on the device.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(x, y, key, ROUNDS: tl.constexpr):
    multiplier = tl.full((), 0xD256D193, tl.uint32)
    weyl = tl.full((), 0x9E3779B9, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        upper = tl.umulhi(x, multiplier)
        lower = x * multiplier
        x = upper ^ key ^ y
        y = lower
        key = key + weyl
    return x, y


@triton.jit
def random_key(rng_ptr, number):
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    x, y = philox(number.to(tl.uint32), offset.to(tl.uint32), seed.to(tl.uint32), 10)
    key, _ = philox(x ^ (offset >> 32).to(tl.uint32), y, (seed >> 32).to(tl.uint32), 10)
    return key


@triton.jit
def kept_in_rows(rows, key, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a tile of whole rows stay: one draw for four neighbours, which lie in one thread.

    Joined twice and reshaped, the four words of a draw are the last two bits of the column's number: nothing crosses threads.
    """
    quarters = tl.arange(0, BLOCK // 4)[None, :]
    zero = tl.zeros((ROWS, BLOCK // 4), dtype=tl.uint32)
    x, y = philox(quarters.to(tl.uint32) + zero, rows[:, None].to(tl.uint32) + zero, key, 7)
    evens = tl.join((x & 0xFFFF).to(tl.int32), (y & 0xFFFF).to(tl.int32))
    odds = tl.join((x >> 16).to(tl.int32), (y >> 16).to(tl.int32))
    bits = tl.reshape(tl.join(evens, odds), (ROWS, BLOCK))
    return bits < threshold
