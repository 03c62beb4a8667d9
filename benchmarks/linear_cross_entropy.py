"""Head and loss of a language model: ours beside what people use, forward and backward; checked first; time and peak memory.

    python -m benchmarks.linear_cross_entropy --out DIR            the table (within a minute on one GPU)
    python -m benchmarks.linear_cross_entropy --out DIR --sweep    ours over chunk sizes, and the kernel alone over its cuts
    python -m benchmarks.linear_cross_entropy --dry                no GPU: every code path on tiny shapes

Time: CUDA events around one loss and its gradients, synchronized, providers in turn, median; the host's part is in it, as it is
in training. Memory: peak above what was allocated before, gradients included. The roof: the 6 · tokens · dim · words operations
of the three matmuls at the rate of a large matmul measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, device_times, need_gpu, within, write
from oslo_fusion.ops.linear_cross_entropy import linear_cross_entropy
from oslo_fusion.testing import assert_close_to_reference

TURNS = 7


@dataclass(frozen=True)
class Shape:
    """Tokens, width and words; with a bias or without; and the share of tokens that have a label."""

    name: str
    tokens: int
    dim: int
    vocab: int
    bias: bool = False
    labelled: float = 1.0


SHAPES = [
    Shape("Llama 1.24B", 16384, 2048, 128256),
    Shape("GPT-2", 16384, 768, 50257),
    Shape("T5-base", 16384, 768, 32128),
    Shape("BERT-base, 15 % masked", 32768, 768, 30522, bias=True, labelled=0.15),
    Shape("Llama 8B", 8192, 4096, 128256),
]
DRY_SHAPES = [Shape("tiny", 23, 16, 77), Shape("tiny masked", 23, 16, 77, bias=True, labelled=0.3)]

Call = Callable[..., Tensor]


def providers(shape: Shape, compiled: bool) -> dict[str, Call]:
    """Functions of ``(hidden, weight, labels[, bias])`` to the mean loss, by name.

    ``eager`` is what a model of transformers does: its head, then ``ForCausalLMLoss`` or, with the same operations,
    ``ForMaskedLMLoss``. ``half`` sums the weight's gradient in its own dtype, which is Liger's default; ``liger float32`` sums
    it as ours does.
    """

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)

    masked = shape.labelled < 1.0

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, compact=masked)

    def half(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, compact=masked, accumulate=weight.dtype)

    calls: dict[str, Call] = {"eager": eager, "ours": ours, "ours half": half}
    if compiled:
        calls["compile"] = torch.compile(eager, dynamic=False)
        calls |= liger_calls()
    return calls


def liger_calls() -> dict[str, Call]:
    """Liger's function with both of its sums, or nothing where it is not installed."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return {}

    def call(accumulate: torch.dtype | None, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Any = None) -> Tensor:
        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, bias, None, -100, 0.0, 0.0, "mean", None, False, accumulate
        )[0]

    return {"liger": functools.partial(call, None), "liger float32": functools.partial(call, torch.float32)}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias as leaves, and labels."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    leaves = [draw(shape.tokens, shape.dim), draw(shape.vocab, shape.dim).mul_(shape.dim**-0.5)]
    leaves += [draw(shape.vocab)] if shape.bias else []
    labels = torch.randint(0, shape.vocab, (shape.tokens,), generator=generator, device=device)
    ignored = torch.rand(shape.tokens, generator=generator, device=device) >= shape.labelled
    return [leaf.requires_grad_() for leaf in leaves], labels.masked_fill_(ignored, -100)


def step(call: Call, leaves: list[Tensor], labels: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    loss = call(leaves[0], leaves[1], labels, *leaves[2:])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(shape: Shape, calls: dict[str, Call], dtype: torch.dtype, device: torch.device) -> None:
    """Ours under the law, loss and gradients, on fewer tokens and words. Raises before anything is timed.

    The loss is judged over several draws: of one number, the error of the same-dtype code is a matter of luck.
    """
    small = Shape(shape.name, min(shape.tokens, 611), min(shape.dim, 256), min(shape.vocab, 3001), shape.bias, shape.labelled)

    def exact(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), labels)

    columns: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(8):
        leaves, labels = inputs(small, dtype, device, seed)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        columns[0].append(step(calls["ours"], leaves, labels))
        columns[1].append(step(calls["eager"], leaves, labels))
        columns[2].append(step(exact, wide, labels))
    for position, name in enumerate(("loss", "dhidden", "dweight", "dbias")[: len(columns[0][0])]):
        results = [torch.cat([draw[position].flatten() for draw in column]) for column in columns]
        assert_close_to_reference(*results, f"{shape.name} {dtype}, {name}", "l2" if name == "loss" else "max")


def matmul_rate(device: torch.device) -> float:
    """The roof: operations per second of a large bfloat16 matmul on random numbers."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = device_times({"matmul": lambda i: torch.mm(a, b)}, 5, 5)
    return 2 * 8192**3 / (times["matmul"] * 1e-6)


def time_calls(calls: dict[str, Callable[[], object]], turns: int = TURNS) -> dict[str, float]:
    """Median milliseconds of one call, in turn, each synchronized."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                samples[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in samples.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak memory of one call above what is allocated already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, rate: float) -> Iterator[dict[str, Any]]:
    """Check, then time every provider on one shape."""
    torch._dynamo.reset()
    calls = providers(shape, compiled=True)
    check(shape, {name: calls[name] for name in ("eager", "ours")}, dtype, device)
    leaves, labels = inputs(shape, dtype, device)
    left_out, steps = {}, {}
    for name, call in calls.items():
        steps[name] = functools.partial(step, call, leaves, labels)
        try:
            steps[name]()
        except Exception as error:  # one provider that fails here must not hide the others
            left_out[name] = f"{type(error).__name__}: {str(error)[:120]}"
            del steps[name]
    times = time_calls(steps)
    peaks = {name: peak_bytes(call) for name, call in steps.items()}
    rows = int((labels != -100).sum())
    yield {
        "shape": shape.name,
        "tokens": shape.tokens,
        "labelled": rows,
        "dim": shape.dim,
        "vocab": shape.vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": {name: round(value, 3) for name, value in times.items()},
        "peak_mib": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        "percent_of_matmul_rate": {
            name: round(100 * 6 * rows * shape.dim * shape.vocab / (value * 1e-3) / rate, 1) for name, value in times.items()
        },
        "left_out": left_out,
    }


def sweep(shape: Shape, dtype: torch.dtype, device: torch.device, rate: float) -> Iterator[dict[str, Any]]:
    """Ours over chunk sizes, with both sums; and the kernel alone over its cuts, on one chunk."""
    from oslo_fusion.ops.linear_cross_entropy import Options
    from oslo_fusion.triton import linear_cross_entropy as kernels

    leaves, labels = inputs(shape, dtype, device)
    hidden, weight, *bias = (leaf.detach() for leaf in leaves)
    for wide in (True, False):
        options = Options(-100, 0.0, 0.0, 1.0, wide, shape.labelled < 1.0)
        chosen = kernels.chunk_rows(int(shape.tokens * shape.labelled), shape.dim, shape.vocab, dtype.itemsize, wide)
        calls: dict[str, Callable[[], object]] = {
            str(chunk): functools.partial(
                kernels.launch_linear_cross_entropy,
                *(hidden, weight, labels, bias[0] if bias else None),
                *options,
                *(True, True, bool(bias)),
                rows_per_chunk=chunk,
            )
            for chunk in sorted({chosen, 512, 1024, 2048, 4096, 8192})
        }
        times, peaks = time_calls(calls, 5), {name: peak_bytes(call) for name, call in calls.items()}
        yield {
            "shape": shape.name,
            "what": f"chunks, {'float32' if wide else 'half'} sum",
            "chosen": str(chosen),
            "ms": {name: round(value, 3) for name, value in times.items()},
            "peak_mib": {name: round(value / 2**20, 1) for name, value in peaks.items()},
        }
    rows, width = 2048, kernels.padded_width(shape.vocab)
    buffer = torch.randn(rows, width, device=device, dtype=dtype)
    losses, target = torch.empty(rows, device=device), torch.randint(0, shape.vocab, (rows,), device=device)
    chosen_blocks = kernels.loss_blocks(shape.vocab)
    cuts = {chosen_blocks} | {
        kernels.LossBlocks(columns, warps)
        for columns, warps in itertools.product((2048, 4096, 8192, 16384), (4, 8, 16, 32))
        if 8 <= columns // (32 * warps) <= 32
    }

    def launch(cut: Any, _: int) -> None:
        constants = (shape.vocab, width, 0.0, 0.0, 1.0, False, True, cut.columns)
        constants += (kernels.rest_columns(shape.vocab, cut.columns),)
        kernels._LOSS((rows,), (buffer, None, target, losses), (-100,), constants, cut.warps)

    alone = {str(cut): functools.partial(launch, cut) for cut in sorted(cuts, key=str)}
    times = device_times(alone, burst=3, turns=3)
    moved = 2 * buffer.numel() * buffer.element_size()  # read once and written once, if the second read is L2's
    yield {
        "shape": shape.name,
        "what": f"kernel alone, {rows} rows",
        "chosen": str(chosen_blocks),
        "ms": {name: round(value / 1e3, 4) for name, value in sorted(times.items(), key=lambda item: item[1])},
        "tb_per_s": {name: round(moved / (value * 1e-6) / 1e12, 2) for name, value in times.items()},
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "what" in row:
        body = "  ".join(f"{name.removeprefix('LossBlocks')} {value}" for name, value in row["ms"].items())
        return f"{row['shape']}: {row['what']}, chosen {row['chosen'].removeprefix('LossBlocks')}, ms: {body}"
    times = "  ".join(
        f"{name} {value:.2f} ms {row['peak_mib'][name]:.0f} MiB ({row['percent_of_matmul_rate'][name]:.0f} %)"
        for name, value in row["ms"].items()
    )
    return f"{row['shape']} {row['tokens']}×{row['dim']}×{row['vocab']} {row['dtype']}: {times} {row['left_out'] or ''}"


def dry() -> None:
    """Checks and every provider that runs without a GPU, with no timing."""
    for shape, dtype in itertools.product(DRY_SHAPES, (torch.float32, torch.bfloat16)):
        calls = providers(shape, compiled=False)
        check(shape, calls, dtype, torch.device("cpu"))
        leaves, labels = inputs(shape, dtype, torch.device("cpu"))
        for call in calls.values():
            step(call, leaves, labels)
        print(f"{shape.name} {dtype}: checked {', '.join(calls)}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives linear_cross_entropy.json, or …_sweep.json")
    parser.add_argument("--sweep", action="store_true", help="time chunk sizes and cuts of our own")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=50.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args()
    if options.dry:
        dry()
        return
    device = need_gpu("benchmarks.linear_cross_entropy")
    roof, rate = copy_bandwidth(device), matmul_rate(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s, matmul {rate / 1e12:.0f} TFLOP/s")
    shapes, work = (SHAPES[:2], sweep) if options.sweep else (SHAPES, measure)
    jobs = ((shape.name, functools.partial(work, shape, torch.bfloat16, device, rate)) for shape in shapes)
    results, left_out = within(options.seconds, jobs, line)
    for row in results:
        row["matmul_tflop_per_s"] = round(rate / 1e12, 1)
    if options.out is not None:
        name = "linear_cross_entropy_sweep.json" if options.sweep else "linear_cross_entropy.json"
        write(options.out / name, roof, results, left_out)


if __name__ == "__main__":
    main()
