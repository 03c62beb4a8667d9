"""Rotary embedding: ours beside what people use, checked first, on device time and on host time.

    python -m benchmarks.rope --out DIR            the table (a minute on one GPU)
    python -m benchmarks.rope --out DIR --sweep    ours only, over cuts: what the heuristic is chosen from
    python -m benchmarks.rope --dry                no GPU: every code path on tiny shapes, with the reference

How it is measured: :mod:`benchmarks.timing`. q and k are transposed views of ``[batch, seq, heads, head_dim]``, as attention
modules make them. ``module`` is transformers' function: Llama's, GPT-NeoX's for a part of a head, Cohere's for interleaved
pairs. ``liger`` works in place, on inputs and gradients of its own; ``liger_copied`` copies q and k first, which leaves them as
they were, as the others do. Of a part of a head ``liger`` moves that part only, so there it is no peer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as gpt_neox
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from benchmarks.timing import copy_bandwidth, device_times, host_time, need_gpu, rotation, slug, within, write
from oslo_fusion.ops.rope import rope, rope_reference
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

Call = Callable[..., tuple[Tensor, Tensor]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """What is rotated."""

    op: str
    batch: int
    seq: int
    heads: int
    kv_heads: int
    dim: int
    rot_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def interleaved(self) -> bool:
        """Whether pairs are neighbours."""
        return self.op == "rope_interleaved"

    @property
    def partial(self) -> bool:
        """Whether a part of each head passes through."""
        return self.rot_dim < self.dim

    @property
    def bytes(self) -> int:
        """Of q and k."""
        return self.batch * self.seq * (self.heads + self.kv_heads) * self.dim * self.dtype.itemsize

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.batch}×{self.seq} {self.heads}+{self.kv_heads} heads of {self.rot_dim}/{self.dim} {kind}"

    def traffic(self, mode: str) -> int:
        """Bytes that must move: q and k, or their gradients, are read and written."""
        return self.bytes * (4 if mode == "forward+backward" else 2)

    def facts(self, mode: str) -> dict[str, Any]:
        """What every row says of what was measured."""
        return {
            "op": self.op,
            "mode": mode,
            "rows": self.batch * self.seq,
            "width": (self.heads + self.kv_heads) * self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_mb": self.bytes / 1e6,
            **{name: getattr(self, name) for name in ("batch", "seq", "heads", "kv_heads", "dim", "rot_dim")},
        }


FP32 = torch.float32
SHAPES = [
    Shape("rope", 8, 1, 32, 8, 128, 128),  # decoding: the host's time is measured too
    Shape("rope", 8, 4096, 32, 8, 128, 128),
    Shape("rope", 8, 4096, 32, 8, 64, 64),
    Shape("rope_partial", 4, 2048, 32, 32, 128, 32),
    Shape("rope_interleaved", 4, 2048, 32, 8, 128, 128),
    Shape("rope", 4, 2048, 32, 8, 128, 128, FP32),
    Shape("rope", 2, 2048, 32, 8, 128, 128),
    Shape("rope", 2, 2048, 32, 8, 64, 64),
    Shape("rope", 3, 2731, 32, 8, 128, 128),
    Shape("rope", 8, 1, 32, 8, 64, 64),
    Shape("rope", 8, 4096, 32, 8, 64, 64, FP32),
    Shape("rope_partial", 4, 2048, 32, 32, 128, 32, FP32),
    Shape("rope_interleaved", 4, 2048, 32, 8, 128, 128, FP32),
]
SWEEP_SHAPES = [*SHAPES[:6], SHAPES[7], SHAPES[10]]
DRY_SHAPES = [
    Shape(op, 2, 5, 4, 2, 16, rot_dim, dtype)
    for (op, rot_dim), dtype in itertools.product(
        (("rope", 16), ("rope_partial", 8), ("rope_interleaved", 16)), (torch.bfloat16, FP32)
    )
]


def providers(shape: Shape, compiled: bool) -> dict[str, Call]:
    """Functions of ``(q, k, cos, sin)``, by name."""
    module = {"rope": llama, "rope_partial": gpt_neox, "rope_interleaved": cohere}[shape.op]
    calls: dict[str, Call] = {"module": module, "ours": functools.partial(rope, interleaved=shape.interleaved)}
    if compiled:
        calls["compile"] = torch.compile(module, dynamic=False)
        liger = None if shape.interleaved else liger_call()
        if liger is not None:
            calls["liger"] = liger
            calls["liger_copied"] = lambda q, k, cos, sin: liger(q.clone(), k.clone(), cos, sin)
    return calls


def liger_call() -> Call | None:
    """Liger's function, or None where it is not installed."""
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    found: Call = LigerRopeFunction.apply
    return found


def angles_of(shape: Shape, device: torch.device) -> Pair:
    """cos and sin of every position, as the models make them: both numbers of a pair have one angle."""
    steps = torch.arange(shape.rot_dim // 2, device=device) * 2 / shape.rot_dim
    angle = torch.arange(shape.seq, device=device)[:, None] / 10000**steps
    angle = angle.repeat_interleave(2, -1) if shape.interleaved else torch.cat((angle, angle), -1)
    angle = angle.expand(shape.batch, -1, -1)
    return angle.cos().to(shape.dtype), angle.sin().to(shape.dtype)


def heads_of(shape: Shape, make: Callable[..., Tensor]) -> Pair:
    """q and k, or their gradients."""
    q, k = (make(shape.batch, shape.seq, heads, shape.dim).transpose(1, 2) for heads in (shape.heads, shape.kv_heads))
    return q, k


def check(shape: Shape, calls: dict[str, Call], device: torch.device) -> None:
    """Every provider of ours under the law, outputs and gradients, on a few tokens. Raises before anything is timed."""
    small = Shape(shape.op, 2, min(shape.seq, 37), shape.heads, shape.kv_heads, shape.dim, shape.rot_dim, shape.dtype)
    draw = drawer(shape.dtype, device)
    pair, gradients, angles = heads_of(small, draw), heads_of(small, draw), angles_of(small, device)

    def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return rope_reference(q, k, cos.double(), sin.double(), small.interleaved, False, False, False, None)

    def run(call: Call, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in pair]
        rotated = call(*leaves, *angles)
        return [
            *rotated,
            *torch.autograd.grad(rotated, leaves, [g.to(y.dtype) for g, y in zip(gradients, rotated, strict=True)]),
        ]

    theirs, truth = run(calls["module"], False), run(exact, True)
    for name, *three in zip(("q", "k", "dq", "dk"), run(calls["ours"], False), theirs, truth, strict=True):
        assert_close_to_reference(*three, f"{shape}, {name}")
    with torch.no_grad():  # the path without gradients is another one
        for name, *three in zip("qk", calls["ours"](*pair, *angles), theirs, truth, strict=False):
            assert_close_to_reference(*three, f"{shape}, {name} without gradients")


def drawn(shape: Shape, device: torch.device) -> list[Pair]:
    """Sets of q and k to rotate over."""
    make = functools.partial(torch.randn, device=device, dtype=shape.dtype)
    width = (shape.heads + shape.kv_heads) * shape.dim
    sets = rotation(lambda: make(shape.batch, shape.seq, width))  # as many sets as one tensor of that size needs

    def cut(both: Tensor) -> Pair:
        q, k = both.flatten().split([both.numel() // width * heads * shape.dim for heads in (shape.heads, shape.kv_heads)])
        parts = iter((q, k))
        return heads_of(shape, lambda *sizes: next(parts).view(sizes))

    return [cut(both) for both in sets]


def measure(shape: Shape, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Check, then time every provider on one shape: forward alone, then forward and backward."""
    torch._dynamo.reset()
    calls, angles = providers(shape, compiled=True), angles_of(shape, device)
    check(shape, calls, device)
    shared, shared_gradients = drawn(shape, device), drawn(shape, device)
    own, own_gradients = shared, shared_gradients
    if "liger" in calls:
        own, own_gradients = drawn(shape, device), drawn(shape, device)

    def forward(call: Call, sets: Sequence[Pair], _: Sequence[Pair]) -> Callable[[int], object]:
        return lambda i: call(*sets[i % len(sets)], *angles)

    def step(call: Call, sets: Sequence[Pair], gradients: Sequence[Pair]) -> Callable[[int], object]:
        leaves = [[t.detach().requires_grad_() for t in pair] for pair in sets]

        def run(i: int) -> object:
            pair = leaves[i % len(leaves)]
            return torch.autograd.grad(call(*pair, *angles), pair, gradients[i % len(gradients)])

        return run

    for mode, wrap in (("forward", forward), ("forward+backward", step)):
        with torch.set_grad_enabled(mode != "forward"):
            runs = {
                name: wrap(call, *((own, own_gradients) if "liger" in name else (shared, shared_gradients)))
                for name, call in calls.items()
            }
            times = device_times(runs)
            hosts = {name: host_time(lambda run=run: run(0)) for name, run in runs.items()} if shape.seq == 1 else {}
        peers = [time for name, time in times.items() if name != "ours" and not (name == "liger" and shape.partial)]
        size = shape.traffic(mode)
        yield {
            **shape.facts(mode),
            "device_us": {name: round(value, 2) for name, value in times.items()},
            "host_us": {name: round(value, 2) for name, value in hosts.items()},
            "percent_of_copy": {name: round(100 * size / (value * 1e-6) / roof, 1) for name, value in times.items()},
            "against_best_peer": round(min(peers) / times["ours"], 3),
        }


def sweep(shape: Shape, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Device time of our kernel over cuts. The backward is the same kernel."""
    from oslo_fusion.triton.rope import RopeBlocks, _power_of_two, launch_rope, rope_blocks
    from oslo_fusion.triton.rows import device_facts

    sets, angles = drawn(shape, device), angles_of(shape, device)
    processors, _ = device_facts(sets[0][0])
    sizes = (shape.heads, shape.kv_heads, shape.dim, shape.dtype.itemsize)
    chosen = rope_blocks(*sizes, shape.interleaved, shape.batch * shape.seq, processors)
    options = {chosen}
    for tokens, tiles, warps in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8)):
        blocks = RopeBlocks(tokens, *(_power_of_two(-(-heads // tiles)) for heads in (shape.heads, shape.kv_heads)), warps)
        size = tokens * (blocks.q_heads + blocks.k_heads) * shape.dim * shape.dtype.itemsize
        if 16 <= size / (32 * warps) <= 256:
            options.add(blocks)
    calls: dict[str, Callable[[int], object]] = {}
    for blocks in sorted(options, key=str):

        def call(i: int, blocks: RopeBlocks = blocks) -> object:
            pair = sets[i % len(sets)]
            return launch_rope(*pair, *angles, shape.interleaved, False, False, False, None, blocks=blocks)

        try:
            call(0)
        except Exception as error:  # a cut that does not fit this device is left out, and that is said
            print(f"left out {blocks}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
            continue
        calls[str(blocks)] = call
    times = device_times(calls, turns=3)
    mine, size = times[str(chosen)], shape.traffic("forward")
    yield {
        **shape.facts("forward"),
        "chosen": str(chosen),
        "chosen_us": round(mine, 2),
        "chosen_percent_of_copy": round(100 * size / (mine * 1e-6) / roof, 1),
        "all": {name: round(value, 2) for name, value in sorted(times.items(), key=lambda item: item[1])},
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    heads = f"{row['heads']}+{row['kv_heads']} of {row['rot_dim']}/{row['dim']}"
    head = f"{row['op']:16} {row['mode']:16} {row['batch']:2}×{row['seq']:<5}{heads:16} {row['dtype']:9}"
    if "chosen" in row:
        best, fastest = next(iter(row["all"].items()))
        mine, share = row["chosen"].removeprefix("RopeBlocks"), row["chosen_percent_of_copy"]
        return f"{head}{row['chosen_us']:9.1f} µs {share:5.1f}% {mine}  best {fastest:.1f} {best.removeprefix('RopeBlocks')}"
    times = "  ".join(f"{name} {value:7.1f}" for name, value in row["device_us"].items())
    share, factor = row["percent_of_copy"]["ours"], row["against_best_peer"]
    host = f"  host {row['host_us']}" if row["host_us"] else ""
    return f"{head} {times}  | ours {share:5.1f}% of copy, ×{factor:.2f} of the best peer{host}"


def dry() -> None:
    """Checks and providers on the CPU, with no timing."""
    for shape in DRY_SHAPES:
        calls = providers(shape, compiled=False)
        check(shape, calls, torch.device("cpu"))
        print(f"{shape}: checked {', '.join(calls)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives rope-<gpu>.json, or rope_sweep-<gpu>.json")
    parser.add_argument("--sweep", action="store_true", help="time cuts of our own kernel")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=55.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args(arguments)
    if options.dry:
        dry()
        return
    device = need_gpu("benchmarks.rope")
    roof = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    shapes, work = (SWEEP_SHAPES, sweep) if options.sweep else (SHAPES, measure)
    jobs = ((str(shape), functools.partial(work, shape, device, roof)) for shape in shapes)
    results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        write(options.out / f"{'rope_sweep' if options.sweep else 'rope'}-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
