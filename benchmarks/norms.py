"""Norms: ours beside what people use, checked first, on device time and on host time.

    python -m benchmarks.norms --out DIR            the table (two to three minutes on one GPU)
    python -m benchmarks.norms --out DIR --sweep    ours only, over tiles: what the heuristics are chosen from
    python -m benchmarks.norms --dry                no GPU: every code path on tiny shapes, with the references

Device time: CUDA events around a burst of calls, divided by their number; inputs rotate over more memory than the L2 cache
holds, so that every call reads from memory. Providers take turns, and the median over the turns counts. Host time: wall clock
of a burst on an input so small that the device never is the limit, without a synchronize in between. The roof is a large copy
measured in the same run: bytes that must move (inputs read once, outputs written once) over its bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oslo_fusion.ops.layer_norm import layer_norm, layer_norm_reference
from oslo_fusion.ops.rms_norm import rms_norm, rms_norm_reference
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

EPS = 1e-6
ROTATION_BYTES = 256 << 20  # several times the 50 MB of an H200's L2
BURST = 10
TURNS = 7
SHAPES = [
    (8, 4096),  # the only one whose host time is measured too
    (32768, 4096),
    (32768, 2048),
    (32768, 768),
    (16384, 8192),
    (8192, 16384),
    (8192, 4097),
    (4096, 4096),
    (4096, 1024),
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
            "ours": lambda x, weight: rms_norm(x, weight, eps=EPS),
        }
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
    for name, ours, theirs, truth in zip(
        names, run(calls["ours"], False), run(calls["module"], False), run(exact, True), strict=False
    ):
        assert_close_to_reference(ours, theirs, truth, f"{op} {width} {dtype}, {name}")
    with torch.no_grad():  # the path without gradients is another one
        assert_close_to_reference(calls["ours"](*inputs), calls["module"](*inputs), exact(*(t.double() for t in inputs)), op)


def device_times(calls: dict[str, Callable[[int], object]], burst: int, turns: int) -> dict[str, float]:
    """Median device µs of one call. Each function takes the number of the input to use; providers take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for i in range(3):
            call(i)
    for _ in range(turns):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # The burst is queued while the device is busy with this, so that host time is hidden where it is the longer one.
            torch.cuda._sleep(burst * 400_000)
            start.record()
            for i in range(burst):
                call(i)
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / burst)
    return {name: statistics.median(times) for name, times in samples.items()}


def host_time(call: Callable[[], object], calls: int = 300) -> float:
    """Wall-clock µs of one call on the host, median of 5 bursts."""
    samples = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - begin) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(samples[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device-to-device copy, read and write counted."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    times = device_times({"copy": lambda i: targets[i % 2].copy_(source)}, 5, 7)
    return 2 * source.numel() / (times["copy"] * 1e-6)


def traffic(rows: int, width: int, itemsize: int, mode: str) -> int:
    """Bytes that must move: forward reads x and writes y; backward reads dy and x and writes dx."""
    return rows * width * itemsize * (2 if mode == "forward" else 5)


def rotation(make: Callable[[], Tensor]) -> list[Tensor]:
    first = make()
    return [first, *(make() for _ in range(min(BURST, ROTATION_BYTES // (first.numel() * first.element_size()) + 1)))]


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
            times = device_times({name: wrap(call) for name, call in calls.items()}, BURST, TURNS)
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
        best = min(time for name, time in times.items() if name != "ours")
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
        times = device_times(calls, BURST, 3)
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


def commit() -> str:
    """The commit that is measured, or ``unknown`` outside a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def dry() -> None:
    """Checks, providers and the writing of rows on the CPU, with no timing."""
    for op, dtype, (_, width) in itertools.product(("rms_norm", "layer_norm"), (torch.float32, torch.bfloat16), DRY_SHAPES):
        calls = providers(op, width, compiled=False)
        check(op, calls, width, dtype, torch.device("cpu"))
        print(f"{op} {width} {dtype}: checked {', '.join(calls)}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives norms.json, or norms_sweep.json")
    parser.add_argument("--sweep", action="store_true", help="time tiles of our own kernels")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--op", choices=("rms_norm", "layer_norm"), action="append", help="only this one")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args()
    if options.dry:
        dry()
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.norms times kernels on a GPU, and torch sees no CUDA device here. Without one: --dry")
    begin = time.perf_counter()
    device = torch.device("cuda")
    roof = copy_bandwidth(device)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    shapes, work = (SWEEP_SHAPES, sweep) if options.sweep else (SHAPES, measure)
    ops = options.op or ("rms_norm", "layer_norm")
    for (rows, width), op, dtype in itertools.product(shapes, ops, (torch.bfloat16, torch.float32)):
        if time.perf_counter() - begin > options.seconds:
            left_out.append(f"{op} {rows}×{width} {dtype}")
            continue
        for row in work(op, rows, width, dtype, device, roof):
            results.append(row)
            print(line(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if left_out:
        print("left out for lack of time: " + ", ".join(left_out))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {
            "device": torch.cuda.get_device_name(),
            "driver": driver.stdout.strip(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": commit(),
            "copy_tb_per_s": round(roof / 1e12, 3),
            "left_out": left_out,
            "results": results,
        }
        path = options.out / ("norms_sweep.json" if options.sweep else "norms.json")
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
