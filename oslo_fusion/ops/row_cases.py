"""Named inputs that every operation over rows must take: one list for reference, Triton and C++, in tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[..., Tensor]
"""``draw(*shape)`` makes a tensor of the wanted dtype on the wanted device."""

ROW_CASES: dict[str, Callable[[Draw], Tensor]] = {
    "one number": lambda draw: draw(1, 1),
    "one row": lambda draw: draw(768),
    "zero rows": lambda draw: draw(0, 768),
    "odd": lambda draw: draw(3, 7, 13),
    "rows that do not fill a tile": lambda draw: draw(9, 64),
    "wider than a power of two": lambda draw: draw(5, 1025),
    "divisible by eight only": lambda draw: draw(6, 200),
    "more rows than programs": lambda draw: draw(133, 96),
    "strided rows": lambda draw: draw(6, 2, 48)[:, 1],
    "strided numbers": lambda draw: draw(5, 64)[:, ::2],
    "unaligned": lambda draw: draw(4, 65)[:, 1:],
    "transposed": lambda draw: draw(4, 3, 40).transpose(0, 1),
    "expanded": lambda draw: draw(1, 72).expand(5, 72),
    "expanded twice": lambda draw: draw(1, 1, 33).expand(2, 3, 33),
}


def drawer(dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Draw:
    """Normally distributed numbers with a mean that is not zero, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: (torch.randn(*shape, generator=generator) * 1.5 + 0.25).to(device, dtype)


def draws_of(case: str) -> int:
    """How many draws of a case to judge together: over few columns the largest error of a sum is a matter of luck."""
    columns = ROW_CASES[case](lambda *shape: torch.empty(shape, device="meta")).shape[-1]
    return max(4, min(32, 2048 // columns))
