"""Gated products: ours beside what people use, checked first, on device time and on host time.

    python -m benchmarks.glu --out DIR            the table (a minute and a half on one GPU)
    python -m benchmarks.glu --out DIR --sweep    ours only, over tiles: what the heuristic is chosen from
    python -m benchmarks.glu --dry                no GPU: every code path on tiny shapes, with the reference

How it is measured: :mod:`benchmarks.timing`. ``module`` is transformers' expression, ``act(gate) * up``. Liger's backward
writes over its inputs, so it has its own. In ``swiglu_merged`` gate and up are the halves of one tensor, as in Phi-3, and so is
their gradient.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, device_times, host_time, need_gpu, rotation, slug, within, write
from oslo_fusion.ops.glu import ACTIVATIONS, glu, halves, merged_glu
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

OPS = {"swiglu": "silu", "swiglu_merged": "silu", "geglu_tanh": "gelu_tanh", "geglu": "gelu"}
SHAPES = [
    ("swiglu", 8, 4096),  # the only one whose host time is measured too
    ("swiglu", 16384, 14336),
    ("swiglu", 32768, 4096),
    ("swiglu", 32768, 2048),
    ("swiglu", 32768, 1024),
    ("swiglu", 32768, 768),
    ("swiglu", 16384, 8192),
    ("swiglu", 8192, 16384),
    ("swiglu", 8192, 4097),
    ("swiglu", 4096, 4096),
    ("geglu_tanh", 16384, 8192),
    ("geglu", 16384, 8192),
    ("swiglu_merged", 16384, 8192),
]
SWEEP_SHAPES = [
    ("swiglu", 16384, 8192),
    ("swiglu", 4096, 4096),
    ("geglu", 16384, 8192),
    ("geglu_tanh", 16384, 8192),
    ("swiglu_merged", 16384, 8192),
    ("swiglu_merged", 16384, 11008),
]
DRY_SHAPES = [(5, 32), (3, 33)]
DTYPES = (torch.bfloat16, torch.float32)

Call = Callable[..., Tensor]


def providers(op: str, compiled: bool) -> dict[str, Call]:
    """Functions of ``(gate, up)``, or of both in one tensor, by name."""
    activation = OPS[op]
    # What transformers' ACT2FN holds for silu, gelu_pytorch_tanh and gelu is one call of ATen each.
    function = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}[activation]

    def module(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    def module_merged(merged: Tensor) -> Tensor:
        gate, up = merged.chunk(2, dim=-1)
        return up * function(gate)

    merged = op == "swiglu_merged"
    calls: dict[str, Call] = {
        "module": module_merged if merged else module,
        "ours": functools.partial(merged_glu if merged else glu, activation=activation),
    }
    if compiled:
        calls["compile"] = torch.compile(calls["module"], dynamic=False)
        liger = liger_call(op)
        if liger is not None:
            calls["liger"] = liger
    return calls


def liger_call(op: str) -> Call | None:
    """Liger's function, or None where it is not installed or has none."""
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    found: dict[str, Call] = {
        "swiglu": LigerSiLUMulFunction.apply,
        "swiglu_merged": lambda merged: LigerSiLUMulFunction.apply(*merged.chunk(2, dim=-1)),
        "geglu_tanh": LigerGELUMulFunction.apply,
    }
    return found.get(op)


def check(op: str, calls: dict[str, Call], width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Ours under the law, output and gradients, on rows of this width. Raises before anything is timed."""
    draw, function = drawer(dtype, device), ACTIVATIONS[OPS[op]][0]
    inputs = [draw(37, 2 * width)] if op == "swiglu_merged" else [draw(37, width), draw(37, width)]
    dh = draw(37, width)

    def exact(*tensors: Tensor) -> Tensor:
        gate, up = halves(tensors[0], True) if len(tensors) == 1 else tensors
        return function(gate) * up

    def run(call: Call, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        h = call(*leaves)
        return [h, *torch.autograd.grad(h, leaves, dh.to(h.dtype))]

    results = (run(calls["ours"], False), run(calls["module"], False), run(exact, True))
    for name, *three in zip(("output", "first gradient", "second gradient"), *results, strict=False):
        assert_close_to_reference(*three, f"{op} {width} {dtype}, {name}")
    with torch.no_grad():  # the path without gradients is another one
        assert_close_to_reference(calls["ours"](*inputs), calls["module"](*inputs), exact(*(t.double() for t in inputs)), op)


def traffic(rows: int, width: int, itemsize: int, mode: str) -> int:
    """Bytes that must move: forward reads gate and up and writes h; backward reads dh, gate and up and writes two gradients."""
    return rows * width * itemsize * {"forward": 3, "backward": 5, "forward+backward": 8}[mode]


def row(op: str, mode: str, rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What every row says of what was measured."""
    return {
        "op": op,
        "mode": mode,
        "rows": rows,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_mb": rows * width * dtype.itemsize / 1e6,
    }


def drawn(op: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Sets of inputs to rotate over."""
    sizes = [2 * width] if op == "swiglu_merged" else [width, width]
    columns = [rotation(lambda size=size: torch.randn(rows, size, device=device, dtype=dtype)) for size in sizes]
    return [list(inputs) for inputs in zip(*columns, strict=True)]


def measure(op: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Check, then time every provider on one shape: forward alone, then forward and backward."""
    torch._dynamo.reset()
    calls = providers(op, compiled=True)
    check(op, calls, width, dtype, device)
    shared = drawn(op, rows, width, dtype, device)
    own = [[t.clone() for t in inputs] for inputs in shared] if "liger" in calls else []
    dhs = rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype))

    def forward(call: Call, sets: Sequence[list[Tensor]]) -> Callable[[int], object]:
        return lambda i: call(*sets[i % len(sets)])

    def step(call: Call, sets: Sequence[list[Tensor]]) -> Callable[[int], object]:
        leaves = [[t.detach().requires_grad_() for t in inputs] for inputs in sets]

        def run(i: int) -> object:
            inputs = leaves[i % len(leaves)]
            return torch.autograd.grad(call(*inputs), inputs, dhs[i % len(dhs)])

        return run

    for mode, wrap in (("forward", forward), ("forward+backward", step)):
        with torch.set_grad_enabled(mode != "forward"):
            runs = {name: wrap(call, own if name == "liger" else shared) for name, call in calls.items()}
            times = device_times(runs)
            hosts = {name: host_time(lambda run=run: run(0)) for name, run in runs.items()} if rows == 8 else {}
        best, size = min(time for name, time in times.items() if name != "ours"), traffic(rows, width, dtype.itemsize, mode)
        yield {
            **row(op, mode, rows, width, dtype),
            "device_us": {name: round(value, 2) for name, value in times.items()},
            "host_us": {name: round(value, 2) for name, value in hosts.items()},
            "percent_of_copy": {name: round(100 * size / (value * 1e-6) / roof, 1) for name, value in times.items()},
            "against_best_peer": round(best / times["ours"], 3),
        }


def sweep(op: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Device time of our kernels over tiles, forward and backward apart."""
    from oslo_fusion.triton.glu import GluBlocks, glu_blocks, launch_glu, launch_glu_backward

    sets, merged, activation = drawn(op, rows, width, dtype, device), op == "swiglu_merged", OPS[op]
    pairs = [halves(inputs[0], True) if merged else inputs for inputs in sets]
    dhs = rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype))
    for mode in ("forward", "backward"):
        backward = mode == "backward"
        chosen = glu_blocks(width if merged else 0, dtype.itemsize)
        options = {chosen}
        for warps, per_thread in itertools.product((2, 4, 8, 16), (4, 8, 16, 32)):
            tile = 32 * warps * per_thread
            widths = [w for w in (256, 512, 1024, 2048) if w <= tile] if merged else [tile]
            options |= {GluBlocks(tile // w, w, warps) for w in widths if 16 <= per_thread * dtype.itemsize <= 64}
        calls: dict[str, Callable[[int], object]] = {}
        for blocks in sorted(options, key=str):

            def call(i: int, blocks: GluBlocks = blocks, backward: bool = backward) -> object:
                pair = pairs[i % len(pairs)]
                if backward:
                    return launch_glu_backward(dhs[i % len(dhs)], *pair, activation, blocks)
                return launch_glu(*pair, activation, blocks)

            try:
                call(0)
            except Exception as error:  # a tile that does not fit this device is left out, and that is said
                print(f"left out {blocks}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
                continue
            calls[str(blocks)] = call
        times = device_times(calls, turns=3)
        mine, size = times[str(chosen)], traffic(rows, width, dtype.itemsize, mode)
        yield {
            **row(op, mode, rows, width, dtype),
            "chosen": str(chosen),
            "chosen_us": round(mine, 2),
            "chosen_percent_of_copy": round(100 * size / (mine * 1e-6) / roof, 1),
            "all": {name: round(value, 2) for name, value in sorted(times.items(), key=lambda item: item[1])},
        }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{row['op']:13} {row['mode']:16} {row['rows']:6}×{row['width']:<6}{row['dtype']:9}"
    if "chosen" in row:
        best, fastest = next(iter(row["all"].items()))
        mine, share = row["chosen"].removeprefix("GluBlocks"), row["chosen_percent_of_copy"]
        return f"{head}{row['chosen_us']:9.1f} µs {share:5.1f}% {mine}  best {fastest:.1f} {best.removeprefix('GluBlocks')}"
    times = "  ".join(f"{name} {value:7.1f}" for name, value in row["device_us"].items())
    share, factor = row["percent_of_copy"]["ours"], row["against_best_peer"]
    host = f"  host {row['host_us']}" if row["host_us"] else ""
    return f"{head} {times}  | ours {share:5.1f}% of copy, ×{factor:.2f} of the best peer{host}"


def dry() -> None:
    """Checks and providers on the CPU, with no timing."""
    for op, dtype, (_, width) in itertools.product(OPS, DTYPES, DRY_SHAPES):
        calls = providers(op, compiled=False)
        check(op, calls, width, dtype, torch.device("cpu"))
        print(f"{op} {width} {dtype}: checked {', '.join(calls)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives glu-<gpu>.json, or glu_sweep-<gpu>.json")
    parser.add_argument("--sweep", action="store_true", help="time tiles of our own kernels")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--op", choices=list(OPS), action="append", help="only this one")
    parser.add_argument("--seconds", type=float, default=90.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args(arguments)
    if options.dry:
        dry()
        return
    device = need_gpu("benchmarks.glu")
    roof = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    shapes, work = (SWEEP_SHAPES, sweep) if options.sweep else (SHAPES, measure)
    jobs = (
        (f"{op} {rows}×{width} {dtype}", functools.partial(work, op, rows, width, dtype, device, roof))
        for (op, rows, width), dtype in itertools.product(shapes, DTYPES)
        if op in (options.op or OPS)
    )
    results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        write(options.out / f"{'glu_sweep' if options.sweep else 'glu'}-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
