"""Norms: ours beside what people use, checked first, on device time and on host time.

    python -m benchmarks.norms --out DIR            the tables (about four minutes on one GPU)
    python -m benchmarks.norms --out DIR --sweep    ours only, over tiles: what the heuristics are chosen from
    python -m benchmarks.norms --dry                no GPU: every code path on tiny shapes, with the references

How it is measured: :mod:`benchmarks.timing`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, device_times, host_time, need_gpu, rotation, slug, within, write
from oslo_fusion.ops.kernels import is_here
from oslo_fusion.ops.layer_norm import layer_norm, layer_norm_reference
from oslo_fusion.ops.rms_norm import rms_norm, rms_norm_reference
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

EPS = 1e-6
SHAPES = [
    (8, 4096),  # the only one whose host time is measured too
    *((rows, width) for rows in (32768, 4096) for width in (768, 1024, 2048, 4096, 4097, 8192, 16384)),
]
SWEEP_SHAPES = [(16384, 4096), (32768, 2048), (32768, 768), (8192, 8192), (4096, 16384), (4096, 1024)]
DRY_SHAPES = [(5, 32), (3, 33)]

Call = Callable[..., Tensor]


def providers(op: str, width: int, compiled: bool) -> dict[str, Call]:
    """Functions of ``(x, weight[, bias])``, by name.

    ``module`` is the forward of transformers' LlamaRMSNorm, line by line, or of nn.LayerNorm, which is ``F.layer_norm``.
    """
    if op == "rms_norm":

        def module(x: Tensor, weight: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            variance = wide.pow(2).mean(-1, keepdim=True)
            return weight * (wide * torch.rsqrt(variance + EPS)).to(x.dtype)

        calls: dict[str, Call] = {
            "module": module,
            "torch": lambda x, weight: F.rms_norm(x, (width,), weight, EPS),
            "ours": lambda x, weight: rms_norm(x, weight, eps=EPS, kernel="triton"),
        }
        if is_here("rms_norm", "cuda", "cuda"):
            calls["ours cuda"] = lambda x, weight: rms_norm(x, weight, eps=EPS, kernel="cuda")
    else:
        calls = {
            "module": lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias, EPS),
            "ours": lambda x, weight, bias: layer_norm(x, weight, bias, eps=EPS),
        }
    if compiled:
        calls["compile"] = torch.compile(calls["module"], dynamic=False)
        liger = liger_call(op)
        if liger is not None:
            calls["liger"] = liger
    return calls


def liger_call(op: str) -> Call | None:
    """Liger's function, or None where it is not installed."""
    try:
        if op == "rms_norm":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)
    except ImportError:
        return None


def check(op: str, calls: dict[str, Call], width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Ours under the law, output and gradients, on rows of this width. Raises before anything is timed."""
    draw = drawer(dtype, device)
    inputs = [draw(37, width), *(draw(width) for _ in range(1 if op == "rms_norm" else 2))]
    dy = draw(37, width)

    def run(call: Call, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        y = call(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    if op == "rms_norm":
        exact: Call = lambda x, w: rms_norm_reference(x, w, None, EPS, 0.0, None)[0]  # noqa: E731
    else:
        exact = lambda x, w, b: layer_norm_reference(x, w, b, None, EPS, 0.0, None)[0]  # noqa: E731
    names = ("output", "dx", "dweight", "dbias")
    for provider in (name for name in calls if name.startswith("ours")):
        call, what = calls[provider], f"{op} {width} {dtype}, {provider}"
        for name, ours, theirs, truth in zip(
            names, run(call, False), run(calls["module"], False), run(exact, True), strict=False
        ):
            assert_close_to_reference(ours, theirs, truth, f"{what}, {name}")
        with torch.no_grad():  # the path without gradients is another one
            assert_close_to_reference(call(*inputs), calls["module"](*inputs), exact(*(t.double() for t in inputs)), what)


def traffic(rows: int, width: int, itemsize: int, mode: str) -> int:
    """Bytes that must move: forward reads x and writes y; backward reads dy and x and writes dx."""
    return rows * width * itemsize * (2 if mode == "forward" else 5)


def measure(op: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Check, then time every provider on one shape: forward alone, then forward and backward."""
    torch._dynamo.reset()
    calls = providers(op, width, compiled=True)
    check(op, calls, width, dtype, device)
    parameters = [torch.randn(width, device=device, dtype=dtype) for _ in range(1 if op == "rms_norm" else 2)]
    xs = rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype))
    dys = rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype))

    def forward(call: Call) -> Callable[[int], object]:
        return lambda i: call(xs[i % len(xs)], *parameters)

    def step(call: Call) -> Callable[[int], object]:
        leaves = [p.detach().requires_grad_() for p in parameters]
        inputs = [x.detach().requires_grad_() for x in xs]

        def run(i: int) -> object:
            x = inputs[i % len(xs)]
            return torch.autograd.grad(call(x, *leaves), [x, *leaves], dys[i % len(dys)])

        return run

    small = torch.randn(8, width, device=device, dtype=dtype)
    small_dy = torch.randn_like(small)
    for mode, wrap in (("forward", forward), ("forward+backward", step)):
        size = traffic(rows, width, dtype.itemsize, mode)
        with torch.set_grad_enabled(mode != "forward"):
            times = device_times({name: wrap(call) for name, call in calls.items()})
            hosts = {}
            for name, call in calls.items():
                if rows == 8:
                    leaves = [t.detach().requires_grad_(mode != "forward") for t in (small, *parameters)]
                    if mode == "forward":
                        hosts[name] = host_time(lambda call=call, leaves=leaves: call(*leaves))
                    else:
                        hosts[name] = host_time(
                            lambda call=call, leaves=leaves: torch.autograd.grad(call(*leaves), leaves, small_dy)
                        )
        best = min(time for name, time in times.items() if not name.startswith("ours"))
        yield {
            "op": op,
            "mode": mode,
            "rows": rows,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "tensor_mb": rows * width * dtype.itemsize / 1e6,
            "device_us": {name: round(value, 2) for name, value in times.items()},
            "host_us": {name: round(value, 2) for name, value in hosts.items()},
            "percent_of_copy": {name: round(100 * size / (value * 1e-6) / roof, 1) for name, value in times.items()},
            "against_best_peer": round(best / times["ours"], 3),
        }


def tiles(width: int, rows: int, itemsize: int, device: torch.device) -> dict[str, tuple[Any, list[Any]]]:
    """For forward and backward: the tile that the heuristic chooses, and those to compare it with."""
    from oslo_fusion.triton.rows import REGISTER_COLUMNS, RowBlocks, backward_blocks, device_facts, forward_blocks

    processors, shared = device_facts(torch.empty(0, device=device))
    forward = forward_blocks(width, itemsize, rows <= 2 * processors)
    backward = backward_blocks(width, itemsize, itemsize, rows, 2, processors, shared)
    columns, reload = forward.columns, width > REGISTER_COLUMNS
    forwards = {forward} | {
        RowBlocks(tile, columns, warps)
        for tile, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16))
        if 8 <= tile * columns / (32 * warps) <= 32
    }
    backwards = {backward} | {
        RowBlocks(tile, columns, warps, min(per * processors, -(-rows // tile)), stages, reload)
        for tile, warps, per, stages in itertools.product((1, 2, 4), (4, 8, 16), (1, 2, 4), (1, 3))
        if 8 <= tile * columns / (32 * warps) <= 32
        and 8 <= per * warps <= 24
        and (stages - 1) * per * tile * columns * itemsize * (2 + reload) < shared - 8192
    }
    order = dataclasses.astuple
    return {"forward": (forward, sorted(forwards, key=order)), "backward": (backward, sorted(backwards, key=order))}


def sweep(op: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Device time of our kernels over tiles, forward and backward apart, weight gradients included."""
    from oslo_fusion.triton import layer_norm as ln
    from oslo_fusion.triton import rms_norm as rms
    from oslo_fusion.triton.rows import REGISTER_COLUMNS

    xs = rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype))
    dys = rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype))
    w, stats = torch.randn(width, device=device, dtype=dtype), torch.rand(rows, device=device)

    def one(kind: str, blocks: Any) -> Callable[[int], object]:
        if op == "rms_norm":
            if kind == "forward":
                return lambda i: rms.launch_rms_norm(xs[i % len(xs)], w, None, EPS, 0.0, None, blocks)
            return lambda i: rms.launch_rms_norm_backward(dys[i % len(dys)], None, xs[i % len(xs)], w, stats, 0.0, True, blocks)
        if kind == "forward":
            return lambda i: ln.launch_layer_norm(xs[i % len(xs)], w, w, None, EPS, 0.0, None, blocks)
        return lambda i: ln.launch_layer_norm_backward(
            dys[i % len(dys)], None, xs[i % len(xs)], w, w, stats, stats, 0.0, True, True, blocks
        )

    for kind, (chosen, options) in tiles(width, rows, dtype.itemsize, device).items():
        if kind == "backward" and op == "layer_norm" and width > REGISTER_COLUMNS:
            continue  # takes other kernels
        calls = {}
        for blocks in options:
            call = one(kind, blocks)
            try:
                call(0)
            except Exception as error:  # a tile that does not fit this device is left out, and that is said
                print(f"left out {blocks}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
                continue
            calls[str(blocks)] = call
        times = device_times(calls, turns=3)
        ranked = sorted(times.items(), key=lambda item: item[1])
        mine = times[str(chosen)]
        size = rows * width * dtype.itemsize * (2 if kind == "forward" else 3)
        yield {
            "op": op,
            "mode": kind,
            "rows": rows,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            "chosen": str(chosen),
            "chosen_us": round(mine, 2),
            "chosen_percent_of_copy": round(100 * size / (mine * 1e-6) / roof, 1),
            "all": {name: round(value, 2) for name, value in ranked},
        }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{row['op']:10} {row['mode']:16} {row['rows']:6}×{row['width']:<6}{row['dtype']:9}"
    if "chosen" in row:
        best, fastest = next(iter(row["all"].items()))
        mine = row["chosen"].removeprefix("RowBlocks")
        share = row["chosen_percent_of_copy"]
        return f"{head}{row['chosen_us']:9.1f} µs {share:5.1f}% {mine}  best {fastest:.1f} {best.removeprefix('RowBlocks')}"
    times = "  ".join(f"{name} {value:7.1f}" for name, value in row["device_us"].items())
    share, factor = row["percent_of_copy"]["ours"], row["against_best_peer"]
    host = f"  host {row['host_us']}" if row["host_us"] else ""
    return f"{head} {times}  | ours {share:5.1f}% of copy, ×{factor:.2f} of the best peer{host}"


def dry() -> None:
    """Checks, providers and the writing of rows on the CPU, with no timing."""
    for op, dtype, (_, width) in itertools.product(("rms_norm", "layer_norm"), (torch.float32, torch.bfloat16), DRY_SHAPES):
        calls = providers(op, width, compiled=False)
        check(op, calls, width, dtype, torch.device("cpu"))
        print(f"{op} {width} {dtype}: checked {', '.join(calls)}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives a JSON file per operation")
    parser.add_argument("--sweep", action="store_true", help="time tiles of our own kernels")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--op", choices=("rms_norm", "layer_norm"), action="append", help="only this one")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args()
    if options.dry:
        dry()
        return
    device = need_gpu("benchmarks.norms")
    roof = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    shapes, work = (SWEEP_SHAPES, sweep) if options.sweep else (SHAPES, measure)
    ops = options.op or ("rms_norm", "layer_norm")
    jobs = (
        (f"{op} {rows}×{width} {dtype}", functools.partial(work, op, rows, width, dtype, device, roof))
        for (rows, width), op, dtype in itertools.product(shapes, ops, (torch.bfloat16, torch.float32))
    )
    results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        for op in ops:
            rows = [row for row in results if row["op"] == op]
            missing = [job for job in left_out if job.startswith(op)]
            write(options.out / f"{op}{'_sweep' if options.sweep else ''}-{slug()}.json", roof, rows, missing)


if __name__ == "__main__":
    main()
