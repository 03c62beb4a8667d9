"""Gated MLPs, forward and backward: in parts, with everything kept, and checkpointed; time and memory of each.

    python -m benchmarks.gated_mlp --out DIR    the table, and ours over widths of a part (half a minute on one GPU)
    python -m benchmarks.gated_mlp --dry        no GPU: every code path on tiny shapes

How it is measured: :mod:`benchmarks.timing`. ``checkpoint`` is ``torch.utils.checkpoint`` around plain PyTorch: the same
operations, except that it computes the product's projection a second time too. Memory is what a step allocates at its peak, its
gradients included, above inputs and weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import copy_bandwidth, device_times, need_gpu, slug, within, write
from oslo_fusion.ops import gated_mlp as op
from oslo_fusion.ops.gated_mlp import gated_mlp, gated_mlp_reference, part_width
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

SHAPES = [("Llama 1B", 16384, 2048, 8192), ("Llama 8B", 8192, 4096, 14336), ("Qwen 0.5B", 16384, 896, 4864)]
DRY_SHAPES = [("tiny", 5, 32, 96)]
WIDTHS = (512, 1024, 2048, 4096)
Call = Callable[..., Tensor]


def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The module's own arithmetic, everything kept."""
    return gated_mlp_reference(x, gate, up, down, None, None, None, "silu")


def checkpointed(*inputs: Tensor) -> Tensor:
    """The same, nothing kept."""
    result: Tensor = checkpoint(plain, *inputs, use_reentrant=False)
    return result


def providers(inner: int, dim: int) -> dict[str, tuple[Call, int]]:
    """Name → the function, and the width of its parts; ``ours`` is what the heuristic chooses."""
    chosen = part_width(inner, dim)
    found: dict[str, tuple[Call, int]] = {"eager": (plain, 0), "checkpoint": (checkpointed, 0), "ours": (gated_mlp, chosen)}
    return found | {f"ours, {width} columns": (gated_mlp, width) for width in WIDTHS if width < inner and width != chosen}


def drawn(tokens: int, dim: int, inner: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x and the three weights."""
    draw = drawer(dtype, device)
    weights = [draw(inner, dim) / dim**0.5, draw(inner, dim) / dim**0.5, draw(dim, inner) / inner**0.5]
    return [draw(tokens, dim), *weights]


@contextlib.contextmanager
def parts_of(width: int) -> Iterator[None]:
    """Cut into parts of this width; 0 leaves the heuristic alone."""
    with mock.patch.object(op, "part_width", return_value=width) if width else contextlib.nullcontext():
        yield


def check(dim: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    """The law for every provider, on 512 tokens at the most.

    Raises:
        AssertionError: one breaks it.
    """
    given = drawn(512 if device.type == "cuda" else 5, dim, inner, dtype, device)
    for name, (call, width) in providers(inner, dim).items():
        with parts_of(width):
            for comparison in prove(call, plain, given):
                assert comparison.same, f"{name}: {comparison}"


def measure(name: str, tokens: int, dim: int, inner: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check, then a row with every provider's time and memory."""
    dtype = torch.bfloat16
    check(dim, inner, dtype, device)
    leaves = [t.requires_grad_() for t in drawn(tokens, dim, inner, dtype, device)]
    dy = torch.randn(tokens, dim, device=device, dtype=dtype)
    runs: dict[str, Callable[[int], object]] = {}
    memory = {}
    for provider, (call, width) in providers(inner, dim).items():

        def step(_: int, call: Call = call, width: int = width) -> object:
            with parts_of(width):
                return torch.autograd.grad(call(*leaves), leaves, dy)

        step(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        memory[provider] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        runs[provider] = step
    times = device_times(runs)
    yield {
        "op": "gated_mlp",
        "model": name,
        "shape": [tokens, dim, inner],
        "dtype": "bfloat16",
        "columns": part_width(inner, dim),
        "device_us": {provider: round(value, 1) for provider, value in times.items()},
        "peak_mib": memory,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    parts = [f"{name} {value / 1e3:.2f} ms {row['peak_mib'][name]} MiB" for name, value in row["device_us"].items()]
    return f"{row['model']:10} {'×'.join(map(str, row['shape'])):16} {row['columns']:5} columns  " + "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives gated_mlp-<gpu>.json")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args(arguments)
    if options.dry:
        for name, _, dim, inner in DRY_SHAPES:
            check(dim, inner, torch.bfloat16, torch.device("cpu"))
            print(f"{name}: checked {', '.join(providers(inner, dim))}")
        return
    device = need_gpu("benchmarks.gated_mlp")
    roof = copy_bandwidth(device)
    jobs = ((shape[0], functools.partial(measure, *shape, device)) for shape in SHAPES)
    results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        write(options.out / f"gated_mlp-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
