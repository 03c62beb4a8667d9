"""The end of a post-norm sublayer: ours beside what people use, checked first, on device time and on host time.

    python -m benchmarks.dropout_add_layer_norm --out DIR            the table (two minutes on one GPU)
    python -m benchmarks.dropout_add_layer_norm --out DIR --sweep    ours only, over tiles
    python -m benchmarks.dropout_add_layer_norm --dry                no GPU: every code path on tiny shapes, with the reference

How it is measured: :mod:`benchmarks.timing`. ``module`` is transformers' ``BertOutput`` behind its matmul, whose epilogue adds
the bias: dropout, addition, ``F.layer_norm``. Its backward sums the bias's gradient, as a linear's does. Ours adds the bias in
the kernel; ``matmul_us`` says what that changes before it: a square linear forward, with its bias and without.

The figures that ``transformers`` trains with: dropout 0.1 in ``forward+backward``, none in ``forward``, which is inference.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, device_times, host_time, need_gpu, rotation, slug, within, write
from oslo_fusion.ops.dropout import kept_in_rows, kept_scale
from oslo_fusion.ops.dropout_add_layer_norm import dropout_add_layer_norm
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

OP = "dropout_add_layer_norm"
EPS, DROPOUT = 1e-12, 0.1
SHAPES = [
    (8, 768),  # the only one whose host time is measured too
    (32768, 768),
    (32768, 1024),
    (4096, 768),
    (4096, 1024),
    (32768, 384),
    (16384, 2048),
    (16384, 4096),
    (8192, 8192),
    (32768, 1000),
]
SWEEP_SHAPES = [(32768, 768), (32768, 1024), (4096, 768), (16384, 4096), (8192, 8192)]
DRY_SHAPES = [(5, 32), (3, 33)]
DTYPES = (torch.bfloat16, torch.float32)
NAMES = ("output", "dx", "dresidual", "dlinear_bias", "dweight", "dbias")
_SEED = (3, 5)

Call = Callable[..., Tensor]
"""Of ``x``, ``residual``, ``linear_bias``, ``weight``, ``bias`` and the dropout's probability."""


class _Epilogue(torch.autograd.Function):
    """A bias that a matmul has added already: free forward, and summed up backward, as ``F.linear``'s is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].sum(0)


def module(x: Tensor, residual: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """``BertOutput`` behind its matmul."""
    h = F.dropout(_Epilogue.apply(x, linear_bias), dropout, training=dropout > 0)
    return F.layer_norm(h + residual, (x.shape[-1],), weight, bias, EPS)


def ours(
    x: Tensor,
    residual: Tensor,
    linear_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout: float,
    rng: Tensor | None = None,
) -> Tensor:
    """The operator, with the bias that the matmul then leaves out."""
    return dropout_add_layer_norm(x, residual, weight, bias, eps=EPS, dropout=dropout, linear_bias=linear_bias, rng=rng)


def providers(compiled: bool) -> dict[str, Call]:
    """Functions by name. Liger has none of this."""
    calls: dict[str, Call] = {"module": module, "ours": ours}
    if compiled:
        calls["compile"] = torch.compile(module, dynamic=False)
    return calls


def check(call: Call, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Ours under the law, output and gradients, with and without dropout. Raises before anything is timed."""
    draw = drawer(dtype, device)
    inputs = [draw(37, width), draw(37, width), *(draw(width) for _ in range(3))]
    dy, rng = draw(37, width), torch.tensor(_SEED, device=device)

    def plain(x: Tensor, residual: Tensor, linear_bias: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> Tensor:
        h = x + linear_bias
        if dropout:
            h = h * kept_in_rows(rng, dropout, tuple(x.shape)) * kept_scale(dropout)
        return F.layer_norm(h + residual, (width,), weight, bias, EPS)

    def run(function: Call, wide: bool, dropout: float) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        y = function(*leaves, dropout)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    mine = functools.partial(call, rng=rng)
    for dropout in (0.0, DROPOUT):
        results = (run(mine, False, dropout), run(plain, False, dropout), run(plain, True, dropout))
        for name, *three in zip(NAMES, *results, strict=True):
            assert_close_to_reference(*three, f"{OP} {width} {dtype}, dropout {dropout}, {name}")
    with torch.no_grad():  # the path without gradients is another one
        exact = plain(*(t.double() for t in inputs), 0.0)
        assert_close_to_reference(mine(*inputs, 0.0), plain(*inputs, 0.0), exact, f"{OP} {width} {dtype}, no gradient")


def traffic(rows: int, width: int, itemsize: int, mode: str) -> int:
    """Bytes that must move: forward reads x and residual and writes y, in training s too; backward reads dy and s and writes
    dx and dresidual."""
    return rows * width * itemsize * {"forward": 3, "training forward": 4, "backward": 4, "forward+backward": 8}[mode]


def row(mode: str, rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What every row says of what was measured."""
    return {
        "op": OP,
        "mode": mode,
        "rows": rows,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_mb": rows * width * dtype.itemsize / 1e6,
    }


def measure(rows: int, width: int, dtype: torch.dtype, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Check, then time every provider on one shape: forward without dropout, then forward and backward with."""
    torch._dynamo.reset()
    calls = providers(compiled=True)
    check(ours, width, dtype, device)
    xs, residuals, dys = (rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype)) for _ in range(3))
    vectors = [torch.randn(width, device=device, dtype=dtype) for _ in range(3)]

    def forward(call: Call) -> Callable[[int], object]:
        return lambda i: call(xs[i % len(xs)], residuals[i % len(xs)], *vectors, 0.0)

    def step(call: Call) -> Callable[[int], object]:
        leaves = [v.detach().requires_grad_() for v in vectors]
        pairs = [[t.detach().requires_grad_() for t in pair] for pair in zip(xs, residuals, strict=True)]

        def run(i: int) -> object:
            inputs = [*pairs[i % len(pairs)], *leaves]
            return torch.autograd.grad(call(*inputs, DROPOUT), inputs, dys[i % len(dys)])

        return run

    for mode, wrap in (("forward", forward), ("forward+backward", step)):
        with torch.set_grad_enabled(mode != "forward"):
            runs = {name: wrap(call) for name, call in calls.items()}
            times = device_times(runs)
            hosts = {name: host_time(lambda run=run: run(0), 100) for name, run in runs.items()} if rows == 8 else {}
        best, size = min(time for name, time in times.items() if name != "ours"), traffic(rows, width, dtype.itemsize, mode)
        yield {
            **row(mode, rows, width, dtype),
            "device_us": {name: round(value, 2) for name, value in times.items()},
            "host_us": {name: round(value, 2) for name, value in hosts.items()},
            "percent_of_copy": {name: round(100 * size / (value * 1e-6) / roof, 1) for name, value in times.items()},
            "against_best_peer": round(best / times["ours"], 3),
            **(matmul(xs, vectors[0]) if mode == "forward" else {}),
        }


def matmul(xs: Sequence[Tensor], bias: Tensor) -> dict[str, dict[str, float]]:
    """Times of the linear before, forward, with its bias in the epilogue and without."""
    width = bias.shape[0]
    weight = torch.randn(width, width, device=bias.device, dtype=bias.dtype) / width**0.5
    with torch.no_grad():
        times = device_times(
            {
                "with bias": lambda i: F.linear(xs[i % len(xs)], weight, bias),
                "without": lambda i: F.linear(xs[i % len(xs)], weight),
            }
        )
    return {"matmul_us": {name: round(value, 2) for name, value in times.items()}}


def candidates(chosen: Any, mode: str, processors: int) -> list[Any]:
    """The chosen tile and those near it."""
    options = {chosen}
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        numbers = rows * chosen.columns // (32 * warps)
        if not 4 <= numbers <= 64:
            continue
        if mode == "training forward":
            options.add(replace(chosen, rows=rows, warps=warps))
        elif numbers <= 32:
            for share, stages in itertools.product((1, 2, 3, 4), (1, 2, 3)):
                options.add(replace(chosen, rows=rows, warps=warps, programs=share * processors, stages=stages))
    return sorted(options, key=str)


def sweep(rows: int, width: int, dtype: torch.dtype, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Device time of our kernels over tiles, forward (as in training) and backward apart."""
    from oslo_fusion.triton import dropout_add_layer_norm as kernels
    from oslo_fusion.triton.rows import device_facts

    xs, residuals = (rotation(lambda: torch.randn(rows, width, device=device, dtype=dtype)) for _ in range(2))
    vectors = [torch.randn(width, device=device, dtype=dtype) for _ in range(3)]
    stats, rng = torch.rand(rows, device=device) + 0.5, torch.tensor(_SEED, device=device)
    facts = device_facts(stats)
    for mode in ("training forward", "backward"):
        if mode == "backward":
            chosen = kernels.add_norm_backward_blocks(width, dtype.itemsize, rows, True, *facts)
        else:
            chosen = kernels.add_norm_forward_blocks(width, dtype.itemsize, rows <= 2 * facts[0])
        calls: dict[str, Callable[[int], object]] = {}
        for blocks in candidates(chosen, mode, facts[0]):

            def call(i: int, blocks: Any = blocks, backward: bool = mode == "backward") -> object:
                x, residual = xs[i % len(xs)], residuals[i % len(xs)]
                if backward:
                    options = (*vectors, stats, stats, rng, DROPOUT, dtype, dtype, True, True, True)
                    return kernels.launch_dropout_add_layer_norm_backward(residual, None, x, *options, blocks)
                return kernels.launch_dropout_add_layer_norm(x, residual, *vectors, rng, DROPOUT, EPS, None, blocks)

            try:
                call(0)
            except Exception as error:  # a tile that does not fit this device is left out, and that is said
                print(f"left out {blocks}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
                continue
            calls[_short(blocks)] = call
        times = device_times(calls, turns=3)
        mine, size = times[_short(chosen)], traffic(rows, width, dtype.itemsize, mode)
        yield {
            **row(mode, rows, width, dtype),
            "chosen": _short(chosen),
            "chosen_us": round(mine, 2),
            "chosen_percent_of_copy": round(100 * size / (mine * 1e-6) / roof, 1),
            "all": {name: round(value, 2) for name, value in sorted(times.items(), key=lambda item: item[1])},
        }


def _short(blocks: Any) -> str:
    text = f"{blocks.rows} rows, {blocks.warps} warps"
    return text + (f", {blocks.programs} programs, {blocks.stages} stages" if blocks.programs else "")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{row['mode']:16} {row['rows']:6}×{row['width']:<6}{row['dtype']:9}"
    if "chosen" in row:
        best, fastest = next(iter(row["all"].items()))
        share = row["chosen_percent_of_copy"]
        return f"{head}{row['chosen_us']:9.1f} µs {share:5.1f}% ({row['chosen']})  best {fastest:.1f} ({best})"
    times = "  ".join(f"{name} {value:7.1f}" for name, value in row["device_us"].items())
    share, factor = row["percent_of_copy"]["ours"], row["against_best_peer"]
    rest = "".join(f"  {name} {row[f'{name}_us']}" for name in ("host", "matmul") if row.get(f"{name}_us"))
    return f"{head} {times}  | ours {share:5.1f}% of copy, ×{factor:.2f} of the best peer{rest}"


def dry() -> None:
    """Checks and providers on the CPU, with no timing."""
    for dtype, (_, width) in itertools.product(DTYPES, DRY_SHAPES):
        check(ours, width, dtype, torch.device("cpu"))
        draw = drawer(dtype)
        inputs = [draw(5, width), draw(5, width), *(draw(width) for _ in range(3))]
        calls = providers(compiled=False)
        shapes = {call(*inputs, dropout).shape for call in calls.values() for dropout in (0.0, DROPOUT)}
        assert shapes == {(5, width)}
        print(f"{OP} {width} {dtype}: checked {', '.join(calls)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder that receives {OP}-<gpu>.json, or {OP}_sweep-<gpu>.json")
    parser.add_argument("--sweep", action="store_true", help="time tiles of our own kernels")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args(arguments)
    if options.dry:
        dry()
        return
    device = need_gpu(f"benchmarks.{OP}")
    roof = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    shapes, work = (SWEEP_SHAPES, sweep) if options.sweep else (SHAPES, measure)
    jobs = (
        (f"{rows}×{width} {dtype}", functools.partial(work, rows, width, dtype, device, roof))
        for (rows, width), dtype in itertools.product(shapes, DTYPES)
    )
    results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        write(options.out / f"{OP}{'_sweep' if options.sweep else ''}-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
