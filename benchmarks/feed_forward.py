"""A feed-forward network with a GELU, compiled: the backward as Inductor makes it, and with GELU's kernel of ours.

    python -m benchmarks.feed_forward --out DIR    forward, and both ways; the kernel alone over its cuts (a minute on one GPU)
    python -m benchmarks.feed_forward --dry        no GPU: every code path on tiny shapes

How it is measured: :mod:`benchmarks.timing`. ``inductor`` is this backend without the pass: two kernels for GELU's gradient and
the bias's. The kernel alone is timed with the small one that adds its partial sums up. Memory is what forward and backward
allocate at their peak, gradients included, above inputs and weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, device_times, need_gpu, slug, within, write
from oslo_fusion.aot import Backend, feed_forwards
from oslo_fusion.ops.kernels import find_kernels
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

SHAPES = [("BERT base", 32768, 768, 3072), ("GPT-2", 16384, 768, 3072), ("BERT large", 16384, 1024, 4096)]
DRY_SHAPES = [("tiny", 5, 32, 96), ("tiny GPT-2", 5, 32, 96)]
CUTS = ((4, 256, 4), (8, 128, 4), (8, 256, 8), (4, 512, 8), (8, 256, 4))  # rows and columns of a tile, warps
RESIDENT = (4, 8, 16)  # programs of a multiprocessor
Call = Callable[..., Tensor]


def plain(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """The modules' own arithmetic."""
    return F.linear(F.gelu(F.linear(x, weight, bias)), out_weight, out_bias)


def plain_gpt2(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """The same of GPT-2's modules, whose weights are ``[in, out]``."""
    h = torch.addmm(bias, x, weight)
    act = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
    return torch.addmm(out_bias, act, out_weight)


def is_gpt2(name: str) -> bool:
    """Whether the row is of GPT-2's kind."""
    return "GPT-2" in name


@contextlib.contextmanager
def looking(ours: bool, device: torch.device) -> Iterator[None]:
    """The pass on or off, on this device and for any number of rows."""
    values = {"IN_COMPILED_LAYERS": ours, "_DEVICE": device.type, "FEWEST_ROWS": 1}
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(feed_forwards, name, value))
        yield


def providers(device: torch.device, given: Sequence[Tensor], function: Call = plain) -> dict[str, Call]:
    """Name → ``function`` compiled, proven to obey the law on these inputs.

    Raises:
        AssertionError: one breaks it, or has not the kernel that it is named after.
    """
    found: dict[str, Call] = {}
    for name, ours in (("inductor", False), ("ours", True)):
        backend = Backend(compiler="inductor" if device.type == "cuda" else "eager")
        found[name] = torch.compile(function, backend=backend, dynamic=False)
        with looking(ours, device):
            for comparison in prove(found[name], function, given):
                assert comparison.same, f"{name}: {comparison}"
        assert {graph.feed_forwards for graph in backend.record.graphs} == {int(ours)}, name
    return found


def drawn(rows: int, dim: int, inner: int, device: torch.device, gpt2: bool = False) -> list[Tensor]:
    """x, then weight and bias of both layers."""
    draw = drawer(torch.bfloat16, device)
    weights = [draw(inner, dim) / dim**0.5, draw(dim, inner) / inner**0.5]
    if gpt2:
        weights = [weight.t().contiguous() for weight in weights]
    return [draw(rows, dim), weights[0], draw(inner), weights[1], draw(dim)]


def kernel_times(rows: int, inner: int, activation: str, device: torch.device) -> dict[str, float]:
    """µs of the kernel alone, over its cuts."""
    kernels = find_kernels("feed_forward")
    assert kernels is not None
    h, d = (torch.randn(rows, inner, device=device).bfloat16() for _ in range(2))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    runs: dict[str, Callable[[int], object]] = {}
    for (tile, columns, warps), resident in ((cut, resident) for cut in CUTS for resident in RESIDENT):
        programs = max(1, resident * processors // -(-inner // columns))
        blocks = kernels.FeedForwardBlocks(tile, columns, warps, programs)
        name = f"{tile}×{columns}, {warps} warps, {programs} programs"
        runs[name] = lambda _, blocks=blocks: kernels.launch_gelu_backward_in_place(d, h, activation, blocks)
    return {name: round(value, 1) for name, value in device_times(runs).items()}


def measure(name: str, rows: int, dim: int, inner: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check, then a row with every provider's times and memory."""
    gpt2 = is_gpt2(name)
    given = drawn(rows, dim, inner, device, gpt2)
    calls = providers(device, given, plain_gpt2 if gpt2 else plain)
    leaves = [t.requires_grad_() for t in given]
    dy = torch.randn(rows, dim, device=device).bfloat16()
    both: dict[str, Callable[[int], object]] = {}
    forward: dict[str, Callable[[int], object]] = {}
    memory = {}
    for provider, call in calls.items():

        def step(_: int, call: Call = call) -> object:
            return torch.autograd.grad(call(*leaves), leaves, dy)

        step(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        memory[provider] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        both[provider] = step
        forward[provider] = lambda _, call=call: call(*leaves)
    yield {
        "op": "feed_forward",
        "model": name,
        "shape": [rows, dim, inner],
        "dtype": "bfloat16",
        "device_us": {provider: round(value, 1) for provider, value in device_times(both).items()},
        "forward_us": {provider: round(value, 1) for provider, value in device_times(forward).items()},
        "peak_mib": memory,
        "kernel_us": kernel_times(rows, inner, "gelu_tanh" if gpt2 else "gelu", device),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table, and the kernel's under it."""
    parts = [
        f"{name} {value:.0f} µs ({row['forward_us'][name]:.0f} forward) {row['peak_mib'][name]} MiB"
        for name, value in row["device_us"].items()
    ]
    cuts = [f"    {cut}: {value:.1f} µs" for cut, value in sorted(row["kernel_us"].items(), key=lambda item: item[1])]
    return "\n".join([f"{row['model']:10} {'×'.join(map(str, row['shape'])):16} " + "  ".join(parts), *cuts])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives feed_forward-<gpu>.json")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=20.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args(arguments)
    if options.dry:
        for name, *shape in DRY_SHAPES:
            device = torch.device("cpu")
            gpt2 = is_gpt2(name)
            checked = providers(device, drawn(*shape, device, gpt2), plain_gpt2 if gpt2 else plain)
            print(f"{name}: checked {', '.join(checked)}")
        return
    device = need_gpu("benchmarks.feed_forward")
    roof = copy_bandwidth(device)
    jobs = ((shape[0], functools.partial(measure, *shape, device)) for shape in SHAPES)
    results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        write(options.out / f"feed_forward-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
