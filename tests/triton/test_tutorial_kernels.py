"""What tutorial 4 says of its kernels is what the compiler does; and they compile for GPUs that are not here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import rms_norm_steps

FLOATS = ("rstd_ptr", "partials_ptr", "dweight_ptr")


@pytest.fixture(scope="module")
def steps() -> Any:
    return rms_norm_steps.load_steps()


def signature(kernel: Any) -> dict[str, str]:
    def kind(name: str) -> str:
        if name.endswith("_ptr"):
            return "*fp32" if name in FLOATS else "*bf16"
        return "fp32" if name == "eps" else "i32"

    return {name: kind(name) for name in kernel.arg_names}


def aligned(kernel: Any, **numbers: int) -> list[str]:
    """Arguments that triton finds divisible by 16 at a launch: memory of torch's, and the numbers that are."""
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return pointers + [name for name, number in numbers.items() if number % 16 == 0]


def widest_load(assembly: str) -> int:
    """Bytes of the widest load from memory in PTX."""
    found = re.findall(r"ld\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.b(\d+)", assembly)
    return max(int(vector or 1) * int(bits) // 8 for vector, bits in found)


@pytest.mark.parametrize("dim", [768, 1000, 4096, 4097, 4104])
def test_loads_are_as_wide_as_the_notebook_says(steps: Any, dim: int, compile_for_all_targets: Callable[..., Any]) -> None:
    unit = math.gcd(16, dim)
    blocks = steps.forward_blocks(dim, 2, False)
    row, tile = steps.in_registers_kernel, steps.tiles_kernel
    columns = {"BLOCK": blocks.columns}
    second = compile_for_all_targets(row, signature(row), columns, aligned=aligned(row, dim=dim), targets=["sm_90"])
    third = compile_for_all_targets(
        tile,
        signature(tile),
        {"DIM": dim, "UNIT": unit, "ROWS": blocks.rows, **columns},
        num_warps=blocks.warps,
        aligned=aligned(tile, row_units=dim // unit),
        targets=["sm_90"],
    )
    assert widest_load(second["sm_90"].assembly) == (16 if dim % 16 == 0 else 2)
    assert widest_load(third["sm_90"].assembly) == 2 * min(8, unit)


def test_every_kernel_compiles_for_every_target(steps: Any, compile_for_all_targets: Callable[..., Any]) -> None:
    widths = {"DIM": 1000, "BLOCK": 1024}
    atomics_spill = 64  # ptxas keeps it at 32 registers on sm_80; it is the step that is given up
    for kernel, constants, warps in (
        (steps.two_passes_kernel, {"BLOCK": 128}, 4),
        (steps.in_registers_kernel, {"BLOCK": 1024}, 4),
        (steps.tiles_kernel, {**widths, "UNIT": 8, "ROWS": 4}, 4),
        (steps.atomics_kernel, widths, 4),
        (steps.partial_sums_kernel, {**widths, "ROWS": 4}, 8),
        (steps.column_sums_kernel, {"DIM": 1000, "ROWS": 128, "BLOCK": 32}, 8),
    ):
        allowed = atomics_spill if kernel is steps.atomics_kernel else 0
        compile_for_all_targets(kernel, signature(kernel), constants, num_warps=warps, spill_allowed=allowed)
