"""Norms: ours beside what people use, checked first, on device time and on host time.

    python -m benchmarks.norms --out DIR --op rms_norm   the table of an operation; --resume goes on where a run stopped
    python -m benchmarks.norms --out DIR --shapes 4096x768:float32,32768x16384:bfloat16
                                                         only these shapes; all other rows of DIR stay, each with its commit
    python -m benchmarks.norms --out DIR --sweep         ours only, over tiles: what the heuristics are chosen from
    python -m benchmarks.norms --sweep --rows-that-miss  only where a peer is ahead or too little of the bandwidth is reached
    python -m benchmarks.norms --dry                     no GPU: every code path on tiny shapes, with the references

How it is measured: :mod:`benchmarks.timing`. Nearly all of the time is compilation, so processes of their own first compile,
and check, every shape side by side; they are over before anything is timed, and what is timed finds its kernels in the caches
of Triton and Inductor. The most important shapes come first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import commit, copy_bandwidth, device_times, host_time, need_gpu, rotation, slug, within, write
from oslo_fusion.ops.kernels import is_here
from oslo_fusion.ops.layer_norm import layer_norm, layer_norm_backward_reference, layer_norm_reference
from oslo_fusion.ops.rms_norm import rms_norm, rms_norm_backward_reference, rms_norm_reference
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

EPS = 1e-6
WIDTHS = (4097, 16384, 768, 4096, 8192, 1024, 2048)
SHAPES = [
    *((32768, width) for width in WIDTHS),
    (8, 4096),  # the only one whose host time is measured too
    *((4096, width) for width in WIDTHS),
]
WORKERS = 8
WORKER_SECONDS = 90.0
NOT_ALL = 3  # exit code of a process that compiles, where memory or time was short
RED = "red: "
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
    rows = 37 if width <= 8192 else 301  # few wide rows have another tile, and layer norm's another reduction
    inputs = [draw(rows, width), *(draw(width) for _ in range(1 if op == "rms_norm" else 2))]
    dy = draw(rows, width)

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
                        hosts[name] = host_time(lambda call=call, leaves=leaves: call(*leaves), 100)
                    else:
                        hosts[name] = host_time(
                            lambda call=call, leaves=leaves: torch.autograd.grad(call(*leaves), leaves, small_dy), 100
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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A shape whose kernel is timed over tiles.

    Attributes:
        op, kind, rows, width, dtype: the operation, ``forward`` or ``backward``, and the shape.
        predicted: percent of copy bandwidth that the chosen tile is expected to reach.
        behind: a peer is ahead there, or too little of the bandwidth is reached: other tiles are timed beside the chosen one.
    """

    op: str
    kind: str
    rows: int
    width: int
    dtype: torch.dtype
    predicted: float | None = None
    behind: bool = False

    @property
    def name(self) -> str:
        """As the jobs are called."""
        return f"{self.op} {self.kind} {self.rows}×{self.width} {self.dtype}"


_HALF, _FULL = torch.bfloat16, torch.float32
SWEEPS = [
    *(Sweep("layer_norm", "forward", 32768, 16384, dtype, behind=True) for dtype in (_HALF, _FULL)),
    *(
        Sweep("layer_norm", kind, 4096, 16384, dtype, behind=True)
        for kind in ("forward", "backward")
        for dtype in (_HALF, _FULL)
    ),
    *(Sweep("layer_norm", kind, 4096, 4097, _FULL, behind=True) for kind in ("forward", "backward")),
    *(Sweep("rms_norm", "backward", 32768, width, _FULL, share) for width, share in ((4096, 99), (2048, 97), (1024, 89))),
    Sweep("rms_norm", "backward", 4096, 4096, _FULL, 91),
    *(Sweep("layer_norm", "backward", 32768, width, _FULL, share) for width, share in ((768, 91), (4096, 100))),
    Sweep("layer_norm", "backward", 32768, 16384, _HALF, 88),
    Sweep("layer_norm", "forward", 32768, 4097, _HALF, 92),
    Sweep("rms_norm", "forward", 16384, 8191, _HALF, 95),
    Sweep("layer_norm", "backward", 32768, 16384, _FULL, 91),
    Sweep("rms_norm", "forward", 32768, 4097, _HALF, 94),
    Sweep("rms_norm", "backward", 32768, 4097, _HALF, 91),
    Sweep("rms_norm", "forward", 32768, 4097, _FULL, 97),
    Sweep("rms_norm", "backward", 32768, 4097, _FULL, 101),
    Sweep("layer_norm", "backward", 32768, 4097, _HALF, 91),
    Sweep("layer_norm", "forward", 32768, 4097, _FULL, 96),
    Sweep("layer_norm", "backward", 32768, 4097, _FULL, 98),
    Sweep("rms_norm", "forward", 32768, 768, _HALF, 88),
    Sweep("rms_norm", "forward", 32768, 16384, _FULL, 102),
    Sweep("rms_norm", "forward", 32768, 4098, _HALF, 94),
    Sweep("rms_norm", "backward", 32768, 4098, _HALF, 89),
    Sweep("rms_norm", "backward", 16384, 8191, _HALF, 87),
    Sweep("rms_norm", "forward", 65536, 1001, _HALF, 87),
    Sweep("rms_norm", "backward", 65536, 1001, _HALF, 86),
    Sweep("rms_norm", "forward", 65536, 257, _HALF, 57),
    Sweep("rms_norm", "backward", 65536, 257, _HALF, 47),
]
SMALL = [(op, width, dtype) for op in ("rms_norm", "layer_norm") for width, dtype in ((3, _HALF), (17, _FULL), (515, _HALF))]


def candidates(job: Sweep, processors: int, shared: int) -> tuple[Any, dict[str, Any]]:
    """The tile that the heuristic chooses, and all that are compared, by name: to try others, put them beside it."""
    from oslo_fusion.triton import rows as tiles

    size, vectors = job.dtype.itemsize, 1 if job.op == "rms_norm" else 2
    forward = job.kind == "forward"
    ragged = tiles.is_ragged(job.width, tiles.RAGGED_FORWARD if forward else tiles.RAGGED_BACKWARD, size)
    if not forward and vectors == 2 and job.width > tiles.REGISTER_COLUMNS:
        chosen = tiles.wide_backward_blocks(size, 2 if job.dtype == _HALF else 1, False, job.rows, processors)
    elif forward and ragged:
        chosen = tiles.ragged_forward_blocks(job.width, size, vectors, False, processors)
    elif forward:
        packed = tiles.packed_forward_blocks(job.width) if vectors == 2 and size == 2 and job.rows > 2 * processors else None
        chosen = packed or tiles.forward_blocks(job.width, size, job.rows <= 2 * processors, vectors)
    elif ragged:
        chosen = tiles.ragged_backward_blocks(job.width, size, 2, vectors, processors, shared)
    else:
        chosen = tiles.backward_blocks(job.width, size, size, job.rows, 2, vectors, processors, shared)
    return chosen, {"chosen": chosen, **(_others(job, chosen, processors, shared) if job.behind else {})}


def _filling_stages(job: Sweep, tile: Any, share: int, shared: int) -> int:
    """So many stages of a backward that its tiles leave shared memory for no more programs than its share."""
    waiting = tile.rows * tile.columns * job.dtype.itemsize * (2 + tile.reload)
    return next(stages for stages in itertools.count(2) if (share + 1) * (stages - 1) * waiting > shared)


def _others(job: Sweep, chosen: Any, processors: int, shared: int) -> dict[str, Any]:
    """Tiles near the chosen one: half and twice as many rows, warps, programs; fewer and more of a row's bytes under way.

    A walk changes one of these at a time, and is launched early and in its turn.
    """
    from oslo_fusion.triton.rows import PACKED_NUMBERS

    near = [
        dataclasses.replace(chosen, rows=max(1, round(chosen.rows * f)), warps=min(16, max(1, round(chosen.warps * g))))
        for f, g in itertools.product((0.5, 1, 2), repeat=2)
        if not chosen.programs or 1 in (f, g)
    ]
    if chosen.ragged or chosen.packed or (job.kind == "backward" and job.width > 8192):
        near = [tile for tile in near if tile.rows == 1]  # these kernels take a row at a time
    if chosen.programs:
        share = -(-chosen.programs // processors)
        near += [dataclasses.replace(chosen, programs=max(1, round(f * share)) * processors) for f in (0.5, 2)]
        near += [dataclasses.replace(chosen, ahead=ahead) for ahead in (0, 1, 2, 4)] if chosen.ragged or chosen.ahead else []
        waits = not (job.op == "layer_norm" and job.width > 8192)  # else tiles are loaded when they are needed
        stages = {chosen.stages, *((1, 2, 3, _filling_stages(job, chosen, share, shared)) if waits else ())}
        near += [dataclasses.replace(chosen, stages=n, early=early) for n in sorted(stages) for early in (False, True)]
    if job.op == "layer_norm" and job.kind == "backward" and job.width > 8192:
        parts = ((2048, 5), (2048, 6), (4096, 1), (4096, 2), (4096, 3)) if job.dtype.itemsize == 2 else ((2048, 1), (4096, 0))
        near += [dataclasses.replace(chosen, columns=columns, ahead=ahead) for columns, ahead in parts]
    if job.op == "layer_norm" and not chosen.programs:
        if job.dtype.itemsize == 2 and not chosen.ragged:
            evenly = (warps for warps in (1, 2, 4, 8, 16) if job.width % (warps * PACKED_NUMBERS) == 0)
            near += [dataclasses.replace(chosen, rows=1, warps=warps, packed=True) for warps in evenly]
            near += [dataclasses.replace(chosen, packed=False)]
        elif job.width > 8192:
            near += [dataclasses.replace(chosen, warps=8 if chosen.warps == 16 else 16)]
    names = {
        tile: f"{tile.rows} rows, {tile.warps} warps, {tile.programs} programs, {tile.stages} stages, {tile.ahead} ahead, "
        + (f"parts of {tile.columns}, " if tile.columns != chosen.columns else "")
        + ("early" if tile.early else "in turn")
        + (", packed" if tile.packed else "")
        for tile in near
    }
    return {name: tile for tile, name in names.items() if tile != chosen}


def kernel_call(job: Sweep, xs: Sequence[Tensor], dys: Sequence[Tensor], w: Tensor, stats: Tensor, blocks: Any) -> Any:
    """``call(i)`` launches the kernel with a tile, weight gradients included."""
    from oslo_fusion.triton import layer_norm as ln
    from oslo_fusion.triton import rms_norm as rms

    n = len(xs)
    if job.op == "rms_norm":
        if job.kind == "forward":
            return lambda i: rms.launch_rms_norm(xs[i % n], w, None, EPS, 0.0, None, blocks)
        return lambda i: rms.launch_rms_norm_backward(dys[i % n], None, xs[i % n], w, stats, 0.0, True, blocks)
    bias = w.flip(0)  # of its own: in memory, and in the caches, a layer norm has two
    if job.kind == "forward":
        return lambda i: ln.launch_layer_norm(xs[i % n], w, bias, None, EPS, 0.0, None, blocks)
    return lambda i: ln.launch_layer_norm_backward(dys[i % n], None, xs[i % n], w, w, stats, stats, 0.0, True, True, blocks)


def check_candidates(job: Sweep, found: dict[str, Any], rows: int, device: torch.device) -> None:
    """Every tile under the law, on so many rows. Raises before anything is timed."""
    results: dict[str, list[list[Tensor]]] = {}
    for seed in range(max(1, min(8, 2048 // job.width))):  # over few numbers the largest error is a matter of luck
        draw = drawer(job.dtype, device, seed)
        x, dy, w = draw(rows, job.width), draw(rows, job.width), draw(job.width)
        stats = drawer(torch.float32, device, 100 + seed)(rows).abs() + 0.5
        for name, dtype in (("theirs", job.dtype), ("exact", torch.float64)):
            x_, dy_, w_ = (t.to(dtype) for t in (x, dy, w))
            stats_ = stats.double() if dtype == torch.float64 else stats
            if job.op == "rms_norm" and job.kind == "forward":
                outputs = [rms_norm_reference(x_, w_, None, EPS, 0.0, None)[0]]
            elif job.op == "rms_norm":
                outputs = list(rms_norm_backward_reference(dy_, None, x_, w_, stats_, 0.0, True))
            elif job.kind == "forward":
                outputs = [layer_norm_reference(x_, w_, w_.flip(0), None, EPS, 0.0, None)[0]]
            else:
                outputs = list(layer_norm_backward_reference(dy_, None, x_, w_, w_, stats_, stats_, 0.0, True, True))
            results.setdefault(name, []).append(outputs)
        for name, blocks in found.items():
            try:
                outputs = kernel_call(job, [x], [dy], w, stats, blocks)(0)
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # triton's, for a tile that does not fit this device
                    raise
                continue
            wanted = outputs[:1] if job.kind == "forward" else outputs
            results.setdefault(f"ours, {name}", []).append(list(wanted))
    joined = {
        name: [torch.cat([t.flatten() for t in same]) for same in zip(*draws, strict=True)] for name, draws in results.items()
    }
    for name in joined.keys() - {"theirs", "exact"}:
        for what, mine, other, exact in zip("123", joined[name], joined["theirs"], joined["exact"], strict=False):
            assert_close_to_reference(mine, other, exact, f"{job.name}, {name}, output {what}")


def check_small(op: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Cut rows at a small odd width, where each of eight programs walks over several."""
    from oslo_fusion.triton.rows import ragged_backward_blocks, ragged_forward_blocks

    blocks = {
        "forward": ragged_forward_blocks(width, dtype.itemsize, 1, False, 1),
        "backward": ragged_backward_blocks(width, dtype.itemsize, 2, 1, 1, 65_536),
    }
    for kind, chosen in blocks.items():
        found = {f"cut, {ahead} ahead": dataclasses.replace(chosen, programs=8, ahead=ahead) for ahead in (0, 1)}
        for rows in (37, 5):
            check_candidates(Sweep(op, kind, rows, width, dtype), found, rows, device)


def sweep(job: Sweep, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Device time of a kernel of ours over tiles."""
    from oslo_fusion.triton.rows import device_facts

    chosen, found = candidates(job, *device_facts(torch.empty(0, device=device)))
    draw = functools.partial(torch.randn, job.rows, job.width, device=device, dtype=job.dtype)
    xs, dys = rotation(draw), rotation(draw) if job.kind == "backward" else []
    w, stats = torch.randn(job.width, device=device, dtype=job.dtype), torch.rand(job.rows, device=device)
    calls = {}
    for name, blocks in found.items():
        call = kernel_call(job, xs, dys, w, stats, blocks)
        try:
            call(0)
        except Exception as error:  # a tile that does not fit this device is left out, and that is said
            print(f"left out {name}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
            continue
        calls[name] = call
    times = device_times(calls, turns=5)
    size = job.rows * job.width * job.dtype.itemsize * (2 if job.kind == "forward" else 3)
    mine = next(name for name, blocks in found.items() if blocks == chosen)
    yield {
        "op": job.op,
        "mode": job.kind,
        "rows": job.rows,
        "width": job.width,
        "dtype": str(job.dtype).removeprefix("torch."),
        "chosen": str(chosen),
        "chosen_us": round(times[mine], 2),
        "chosen_percent_of_copy": round(100 * size / (times[mine] * 1e-6) / roof, 1),
        "predicted_percent_of_copy": job.predicted,
        "all": {name: round(value, 2) for name, value in sorted(times.items(), key=lambda item: item[1])},
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{row['op']:10} {row['mode']:16} {row['rows']:6}×{row['width']:<6}{row['dtype']:9}"
    if "chosen" in row:
        share, predicted = row["chosen_percent_of_copy"], row["predicted_percent_of_copy"]
        expected = f" (predicted {predicted:.0f})" if predicted else ""
        tiles = "  ".join(f"{name}: {value:.1f}" for name, value in row["all"].items())
        return f"{head}{row['chosen_us']:9.1f} µs {share:5.1f}%{expected} | {tiles}"
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


def prepare(job: Sweep | tuple[str, int, int, torch.dtype] | tuple[str, int, torch.dtype], device: torch.device) -> None:
    """Compile and check what a job needs, so that it finds that in the caches."""
    from oslo_fusion.triton.rows import device_facts

    if isinstance(job, Sweep):
        facts = device_facts(torch.empty(0, device=device))
        _, found = candidates(job, *facts)
        programs = max((blocks.programs for blocks in found.values() if blocks.ragged), default=0)
        check_candidates(job, found, max(programs, facts[0]) + 37, device)
    elif len(job) == 3:
        check_small(*job, device)
    else:
        op, rows, width, dtype = job
        torch._dynamo.reset()
        calls = providers(op, width, compiled=True)
        check(op, calls, width, dtype, device)
        x = torch.randn(rows, width, device=device, dtype=dtype)
        parameters = [torch.randn(width, device=device, dtype=dtype) for _ in range(1 if op == "rms_norm" else 2)]
        for name in ("ours", "compile", "liger"):
            if name in calls:
                with torch.no_grad():
                    calls[name](x, *parameters)
                leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
                torch.autograd.grad(calls[name](*leaves), leaves, x)


def prepare_apart(arguments: Sequence[str], count: int) -> tuple[bool, set[str]]:
    """Run :func:`prepare` for ``count`` jobs in processes of their own.

    Returns:
        Whether all of them came to their end (if not, not everything is checked yet), and the jobs whose check failed.
    """
    begin, workers = time.perf_counter(), min(WORKERS, count)
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.norms", *arguments, "--worker"]
    complete, red = True, set()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(number) for number in range(workers)]
        running = []
        for number, log in enumerate(logs):
            with log.open("w") as file:
                running.append(
                    subprocess.Popen([*command, f"{number}/{workers}"], stdout=file, stderr=subprocess.STDOUT, env=environment)
                )
        for process, log in zip(running, logs, strict=True):
            try:
                code = process.wait(max(1.0, WORKER_SECONDS - (time.perf_counter() - begin)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = NOT_ALL
                print(f"a process that compiles took longer than {WORKER_SECONDS:.0f} s: what it left is done later")
            text = log.read_text()
            found = {line.removeprefix(RED) for line in text.splitlines() if line.startswith(RED)}
            if code not in (0, NOT_ALL) and not found:
                found = {"a process that compiles and checks ended before it was done"}
            if found:
                print(text[-3000:])
            red |= found
            complete = complete and code != NOT_ALL
    print(f"compiled and checked in {workers} processes: {time.perf_counter() - begin:.0f} s", flush=True)
    return complete, red


def name_of(job: Sweep | tuple[Any, ...]) -> str:
    """A job as it is called in what is printed."""
    return job.name if isinstance(job, Sweep) else " ".join(map(str, job))


def work(jobs: Sequence[Any], device: torch.device) -> int:
    """What a process of :func:`prepare_apart` does; its exit code."""
    code = 0
    for job in jobs:
        try:
            prepare(job, device)
        except torch.OutOfMemoryError:  # beside the other processes; the one that times is alone
            code = code or NOT_ALL
        except AssertionError as error:
            print(f"{error}\n{RED}{name_of(job)}", flush=True)
            code = 1
    return code


def earlier(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run on this kind of device, of this commit; none if it is another's."""
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["device"] != torch.cuda.get_device_name():
        return []
    return [row for row in record["results"] if row.get("commit", record["commit"]) == commit()]


def parse_shapes(text: str) -> set[tuple[int, int, str]]:
    """Rows, width and dtype of each shape in ``4096x768:float32,...``; all must be in the table."""
    known = {(rows, width, str(dtype).removeprefix("torch.")) for rows, width in SHAPES for dtype in (_HALF, _FULL)}
    found = set()
    for word in text.split(","):
        shape, _, dtype = word.strip().partition(":")
        rows, _, width = shape.partition("x")
        if not (rows.isdecimal() and width.isdecimal() and (int(rows), int(width), dtype) in known):
            names = ", ".join(sorted(f"{rows}x{width}:{dtype}" for rows, width, dtype in known))
            raise argparse.ArgumentTypeError(f"got {word!r}; write ROWSxWIDTH:DTYPE, of these: {names}")
        found.add((int(rows), int(width), dtype))
    return found


def with_origin(path: Path, device: str) -> list[dict[str, Any]]:
    """The rows of earlier runs, each with the commit that it is of and the copy bandwidth of its run.

    Raises:
        SystemExit: the file is another kind of device's, with whose rows these cannot stand in one table.
    """
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["device"] != device:
        raise SystemExit(f"{path} was measured on {record['device']}, this is {device}: give --out another folder")
    origin = {"commit": record["commit"], "copy_tb_per_s": record["copy_tb_per_s"]}
    return [origin | row for row in record["results"]]


def merged(kept: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both; what was measured again replaces what was kept, and a shape that was left out keeps its row."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("op", "mode", "rows", "width", "dtype"))

    again = {key(row) for row in measured}
    return [*(row for row in kept if key(row) not in again), *measured]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives a JSON file per operation")
    parser.add_argument("--sweep", action="store_true", help="time tiles of our own kernels")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--op", choices=("rms_norm", "layer_norm"), action="append", help="only this one")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --out has of this commit, and measure the others"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="start no shape after this long; what is left out is said")
    parser.add_argument(
        "--shapes", type=parse_shapes, help="only these, such as 4096x768:float32,...; other rows of --out are kept"
    )
    parser.add_argument("--rows-that-miss", action="store_true", help="of --sweep, only what does not reach its goal")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shapes and (options.sweep or options.resume):
        parser.error("--shapes measures these shapes of the table again: leave out --sweep and --resume")
    if options.rows_that_miss and not options.sweep:
        parser.error("--rows-that-miss chooses among the shapes of --sweep: add --sweep")
    if options.dry:
        dry()
        return
    device = need_gpu("benchmarks.norms")
    begin = time.perf_counter()
    ops = options.op or ["rms_norm", "layer_norm"]
    paths = (
        {}
        if options.out is None
        else {op: options.out / f"{op}{'_sweep' if options.sweep else ''}-{slug()}.json" for op in ops}
    )
    kept = [row for path in paths.values() for row in earlier(path)] if options.resume else []
    there = {(row["op"], row["rows"], row["width"], f"torch.{row['dtype']}") for row in kept}
    if options.sweep:
        todo: list[Any] = [job for job in SWEEPS if job.op in ops and (job.behind or not options.rows_that_miss)]
    else:
        todo = [
            (op, rows, width, dtype)
            for (rows, width), op, dtype in itertools.product(SHAPES, ops, (_HALF, _FULL))
            if (op, rows, width, str(dtype)) not in there
            and (not options.shapes or (rows, width, str(dtype).removeprefix("torch.")) in options.shapes)
        ]
    if options.shapes:  # before anything is compiled: a file that these rows cannot join is said at once
        kept = [row for path in paths.values() for row in with_origin(path, torch.cuda.get_device_name())]
    checks = [*todo, *(small for small in SMALL if small[0] in ops)] if options.sweep else todo
    if options.worker:
        number, workers = map(int, options.worker.split("/"))
        raise SystemExit(work(checks[number::workers], device))
    arguments = [word for op in ops for word in ("--op", op)]
    arguments += ["--sweep"] if options.sweep else []
    arguments += ["--rows-that-miss"] if options.rows_that_miss else []
    if options.shapes:
        arguments += ["--shapes", ",".join(f"{rows}x{width}:{dtype}" for rows, width, dtype in sorted(options.shapes))]
    if options.out is not None and options.resume:
        arguments += ["--out", str(options.out), "--resume"]
    complete, red = prepare_apart(arguments, len(checks)) if checks else (True, set())
    if red and not options.sweep:
        raise SystemExit("red, and nothing is timed: " + ", ".join(sorted(red)))
    if not complete and options.sweep:  # a table's rows are checked again anyway, before they are timed
        for job in checks:
            prepare(job, device)
    todo = [job for job in todo if name_of(job) not in red]
    roof = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    jobs = (
        (
            name_of(job),
            functools.partial(sweep, job, device, roof) if options.sweep else functools.partial(measure, *job, device, roof),
        )
        for job in todo
    )
    results, left_out = within(options.seconds - (time.perf_counter() - begin), jobs, line)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if options.shapes:
        results = [{"commit": commit(), "copy_tb_per_s": round(roof / 1e12, 3)} | row for row in results]
    for op, path in paths.items():
        rows = sorted(
            (row for row in merged(kept, results) if row["op"] == op),
            key=lambda row: (row["rows"] != 8, -row["rows"], row["width"], row["dtype"]),
        )
        write(path, roof, rows, [job for job in left_out if job.startswith(op)])
    if red:
        raise SystemExit("red, and not timed: " + ", ".join(sorted(red)))


if __name__ == "__main__":
    main()
