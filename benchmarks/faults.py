"""Triton kernels that are wrong on purpose, one for each tool of :mod:`benchmarks.sanitize`: what misses its own is blind.

The only file here that imports triton when it is loaded; the sanitized process does so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

NUMBERS = 128  # 4 warps of one number per thread


@triton.jit
def _fault_overrun_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(x_ptr + cols + 1, cols)  # the last one lies one number behind the tensor


@triton.jit
def _fault_uninitialised_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols))


# Triton puts a barrier wherever one is needed, so the race needs assembly: every thread writes its slot, then reads that of a
# thread in the next warp, with no barrier in between.
@triton.jit
def _fault_race_kernel(x_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    y = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 slots[128];
        .reg .b32 base, lane, own, other;
        mov.u32 base, slots;
        mov.u32 lane, %tid.x;
        shl.b32 own, lane, 2;
        xor.b32 other, own, 128;
        add.u32 own, own, base;
        add.u32 other, other, base;
        st.volatile.shared.b32 [own], $1;
        ld.volatile.shared.b32 $0, [other];
        }""",
        "=r,r",
        [tl.load(x_ptr + cols)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(x_ptr + cols, y)


def _overrun(device: torch.device) -> None:
    x = torch.zeros(NUMBERS, dtype=torch.int32).to(device)
    _fault_overrun_kernel[(1,)](x, BLOCK=NUMBERS, num_warps=4)


def _uninitialised(device: torch.device) -> None:
    x = torch.empty(NUMBERS, dtype=torch.int32, device=device)
    _fault_uninitialised_kernel[(1,)](x, torch.empty_like(x), BLOCK=NUMBERS, num_warps=4)


def _race(device: torch.device) -> None:
    x = torch.arange(NUMBERS, dtype=torch.int32).to(device)
    _fault_race_kernel[(1,)](x, BLOCK=NUMBERS, num_warps=4)


COMMIT: dict[str, Callable[[torch.device], None]] = {"memcheck": _overrun, "initcheck": _uninitialised, "racecheck": _race}
"""What to run under each tool."""
