"""n-gram blocking: transformers' processor, torch.compile of its expression, and ours in Triton and CUDA, in one run.

    python -m benchmarks.no_repeat_ngram --out DIR

Every provider is first compared bit for bit with transformers' processor at every shape; nothing is timed on red. Device time
is one call's share of a CUDA graph of many, so that the host does not show: kernels and the gaps between them, the text and the
scores as warm in the L2 cache as the call before left them. Host time is what a call keeps Python busy, without a synchronize.
``in place`` bans in the buffer it is given; ``functional`` and transformers write a new tensor: the row ``copy`` is its floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor

from oslo_fusion import models, workload
from oslo_fusion.ops import no_repeat_ngram as op

N = 3
CALLS = 20
ROUNDS = 15


@dataclass(frozen=True)
class Shape:
    """``capacity`` columns of ids hold ``tokens`` of text; ``sources`` rows of ``tokens`` make it the encoder's form."""

    rows: int
    vocab: int
    tokens: int
    sources: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        kind = f", encoder of {self.sources}" if self.sources else ""
        return f"{self.rows}×{self.vocab} {workload.dtype_name(self.dtype)}, {self.tokens} tokens{kind}"

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores, ids and the encoder's text. 300 different tokens, so that some windows match in a long text."""
        generator = torch.Generator().manual_seed(self.tokens)
        scores = torch.randn(self.rows, self.vocab, generator=generator).to(device, self.dtype)
        written = min(self.tokens, 64) if self.sources else self.tokens
        ids = torch.randint(0, 300, (self.rows, written), generator=generator).to(device)
        source = torch.randint(0, 300, (self.sources, self.tokens), generator=generator).to(device) if self.sources else None
        return scores, ids, source


ISSUE = (
    Shape(256, 32128, 20),
    Shape(256, 32128, 128),
    Shape(8, 128256, 4096),
    Shape(256, 32128, 128, dtype=torch.bfloat16),
    Shape(8, 50257, 1024),
    Shape(128, 32128, 512, sources=32),
)
SWEEP = tuple(Shape(8, 32128, tokens) for tokens in (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000))
SMALL = (Shape(4, 301, 20), Shape(4, 301, 128, sources=2))
GOALS = {(256, 32128, 20): 7.0, (256, 32128, 128): 7.0, (8, 128256, 4096): 10.0}
"""Device µs in place that the project must reach on an H200, float32."""


def expression(scores: Tensor, ids: Tensor) -> Tensor:
    """transformers' vectorised expression, for torch.compile."""
    ending = ids[:, ids.shape[1] + 1 - N :]
    windows = ids.unfold(1, N, 1)
    matches = (windows[..., :-1] == ending.unsqueeze(1)).all(-1)
    mask = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, torch.where(matches, windows[..., -1], scores.shape[1]), True)
    return scores.masked_fill(mask[:, :-1], -float("inf"))


def providers(shape: Shape, device: torch.device, sweep: bool) -> Iterator[tuple[str, Callable[[], Tensor], bool]]:
    """Name, call, and whether a CUDA graph can hold it."""
    scores, ids, source = shape.draw(device)
    buffer = scores.clone()
    length = torch.tensor(ids.shape[1], device=device)
    theirs: Any = NoRepeatNGramLogitsProcessor(N) if source is None else EncoderNoRepeatNGramLogitsProcessor(N, source)
    yield "transformers", lambda: theirs(ids, scores), source is None
    if not sweep:
        yield "copy", scores.clone, True
        if source is None and device.type == "cuda":
            torch._dynamo.reset()
            compiled = torch.compile(expression)
            yield "torch.compile", lambda: compiled(scores, ids), True
    for kernel in ("triton", "cuda") if device.type == "cuda" else ("auto",):
        try:
            label = op.implementation(device.type, kernel)
        except ImportError as error:
            print(f"{kernel}: {error}", file=sys.stderr)
            continue

        def in_place(length: Tensor | None = None, kernel: str = kernel) -> Tensor:
            if source is None:
                return op.no_repeat_ngram_(buffer, ids, N, length, kernel=kernel)
            return op.encoder_no_repeat_ngram_(buffer, ids, source, N, length, kernel=kernel)

        def functional(kernel: str = kernel) -> Tensor:
            if source is None:
                return op.no_repeat_ngram(scores, ids, N, kernel=kernel)
            return op.encoder_no_repeat_ngram(scores, ids, source, N, kernel=kernel)

        yield f"{label} in place", in_place, True
        yield f"{label} in place, length on the device", lambda f=in_place: f(length), True
        yield f"{label} functional", functional, True


def device_microseconds(call: Callable[[], Tensor], device: torch.device) -> float | None:
    """Median over rounds of one call's share of a replayed graph, or None where a graph cannot hold it."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    graph.replay()
    samples = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(samples)


def host_microseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Median time until a call returns, the device idle before each batch of calls."""
    samples = []
    for _ in range(ROUNDS):
        workload.synchronize(device)
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - begin) * 1e6 / CALLS)
    workload.synchronize(device)
    return statistics.median(samples)


def check(shape: Shape, device: torch.device, sweep: bool) -> None:
    """Every provider gives transformers' bits.

    Raises:
        AssertionError: naming the provider and the shape.
    """
    expected: Tensor | None = None
    for name, call, _ in providers(shape, device, sweep):
        result = call()
        if expected is None:
            expected = result
        elif name != "copy":
            assert torch.equal(result, expected), f"{name} differs from transformers at {shape.name}"


def measure(shape: Shape, device: torch.device, sweep: bool) -> list[dict[str, Any]]:
    """A row per provider."""
    rows = []
    for name, call, capturable in providers(shape, device, sweep):
        begin = time.perf_counter()
        call()
        workload.synchronize(device)
        first = (time.perf_counter() - begin) * 1e3
        row: dict[str, Any] = {"shape": shape.name, **{k: v for k, v in vars(shape).items() if k != "dtype"}, "provider": name}
        row |= {"dtype": workload.dtype_name(shape.dtype), "first_call_ms": round(first, 2)}
        row["device_us"] = device_microseconds(call, device) if capturable else None
        row["host_us"] = host_microseconds(call, device)
        goal = GOALS.get((shape.rows, shape.vocab, shape.tokens)) if shape.dtype == torch.float32 else None
        if "in place" in name and goal is not None and row["device_us"] is not None:
            row["goal_us"], row["reached"] = goal, row["device_us"] <= goal
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines, shape = [], None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            lines += ["", f"{shape:<52}{'device µs':>10}{'host µs':>10}"]
        device = "–" if row["device_us"] is None else f"{row['device_us']:.1f}"
        goal = f"   goal {row['goal_us']:.0f}: {'reached' if row['reached'] else 'MISSED'}" if "reached" in row else ""
        lines.append(f"  {row['provider']:<50}{device:>10}{row['host_us']:>10.1f}{goal}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it only the table is printed")
    parser.add_argument("--device", default=None)
    parser.add_argument("--commit", default=None, help="the commit of the code, where it runs from a copy without its history")
    arguments = parser.parse_args()
    device = models.default_device() if arguments.device is None else models.parse_device(arguments.device)
    on_gpu = device.type == "cuda"
    plan = [(s, False) for s in (ISSUE if on_gpu else SMALL)] + [(s, True) for s in (SWEEP if on_gpu else ())]
    with torch.no_grad():
        for shape, sweep in plan:
            check(shape, device, sweep)
        print(f"checked bit for bit at {len(plan)} shapes")
        rows = [row for shape, sweep in plan for row in measure(shape, device, sweep)]
    print(table(rows))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        facts = workload.facts(device, arguments.commit)
        path = arguments.out / f"no_repeat_ngram-{facts['device']['slug']}.json"
        result = {"facts": facts, "n": N, "calls": CALLS, "rounds": ROUNDS, "rows": rows}
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
