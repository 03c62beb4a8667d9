"""Attention: ours beside torch's kernels and FlexAttention, forward and backward; checked first; device time and peak memory.

    python -m benchmarks.attention --out DIR               the table
    python -m benchmarks.attention --out DIR --sweep       ours over the cuts of its kernels, each checked before it is timed
    python -m benchmarks.attention --out DIR --only BERT   one shape
    python -m benchmarks.attention --dry                   no GPU: every code path on tiny shapes

Time: the device's, from events around bursts, providers in turn, median. Operations: 4 · batch · heads · queries · keys · dim
forward, halved where a causal mask halves the work, and 2.5 times that backward. ``forward + backward`` is one call and the
gradients of all inputs; the bias of the peers is a tensor of heads × queries × keys that is ready before the clock starts, as
T5 shares it between layers, and gets its gradient.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.linear_cross_entropy import matmul_rate, peak_bytes
from benchmarks.timing import copy_bandwidth, device_times, need_gpu, slug, within, write
from oslo_fusion.ops.attention import attention, relative_position_bucket, split
from oslo_fusion.ops.attention_cases import AttentionCase, eager_attention
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

TURNS, BURST = 5, 5
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
T5 = AttentionCase(32, 12, 12, 512, 512, 64, scale=1.0, table="encoder", buckets=32, max_distance=128)
BERT = AttentionCase(64, 12, 12, 512, 512, 64, dropout=0.1)
SHAPES = {
    "T5-base encoder": T5,
    "T5-base decoder": replace(T5, table="decoder", causal=True),
    "T5-base cross": replace(T5, table=None),
    "T5-base encoder, dropout": replace(T5, dropout=0.1),
    "BERT, dropout": BERT,
    "BERT": replace(BERT, dropout=0.0),
    "BERT, padded": replace(BERT, dropout=0.0, padding="lengths"),
    "GPT-2": AttentionCase(16, 12, 12, 1024, 1024, 64, causal=True, dropout=0.1),
    "Llama": AttentionCase(8, 32, 8, 2048, 2048, 64, causal=True),
    "T5, 16384 tokens": replace(T5, batch=1, queries=16384, keys=16384),
}
SWEPT = ("T5-base encoder, dropout", "BERT, dropout", "T5-base encoder")
DRY_SHAPES = {
    "tiny T5": AttentionCase(table="encoder", dim=16),
    "tiny BERT": AttentionCase(dropout=0.1, padding="lengths"),
    "tiny GPT-2": AttentionCase(causal=True),
}

Call = Callable[..., Tensor]
Tile = tuple[int, ...]  # queries, keys, warps, stages, and most registers if there is a limit

FORWARD: list[Tile] = [
    (64, 64, 4, 3),
    (64, 64, 4, 3, 128),
    (64, 64, 4, 2, 128),
    (64, 128, 4, 2),
    (128, 64, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 3, 128),
    (128, 128, 8, 2),
]
KEYS: list[Tile] = [
    (64, 64, 4, 1),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2, 168),
    (64, 64, 4, 3, 168),
    (64, 64, 4, 1, 168),
    (32, 64, 4, 2, 168),
    (32, 64, 4, 3, 168),
    (32, 64, 4, 2, 128),
    (32, 64, 4, 3),
    (64, 128, 8, 2),
]
QUERIES: list[Tile] = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2, 128),
    (64, 64, 4, 3, 128),
    (64, 64, 4, 3, 168),
    (64, 64, 4, 2, 168),
    (128, 64, 8, 3),
    (128, 64, 8, 2, 128),
    (64, 32, 4, 3, 128),
]
TABLE: list[Tile] = [
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 3, 168),
    (64, 64, 4, 2, 128),
    (128, 64, 8, 2),
    (64, 64, 4, 2, 168),
    (64, 64, 4, 1, 168),
    (64, 64, 8, 2, 128),
    (128, 64, 8, 2, 128),
]


def ours(case: AttentionCase, device: torch.device) -> Call:
    """The function of ours; leaves are ``q, k, v`` and the table if there is one."""
    options = case.options(device)
    return lambda q, k, v, table=None: attention(q, k, v, bias_table=table, **options)


def bias_of(case: AttentionCase, table: Tensor) -> Tensor:
    """T5's bias as transformers makes it for torch's kernels: ``[1, heads, queries, keys]``, causal mask included."""
    distance = torch.arange(case.keys, device=table.device)[None, :] - torch.arange(case.queries, device=table.device)[:, None]
    buckets = relative_position_bucket(distance, case.table == "encoder", case.buckets, case.max_distance)
    bias = F.embedding(buckets, table).permute(2, 0, 1)[None]
    if case.causal:
        bias = bias.masked_fill(distance > 0, torch.finfo(table.dtype).min)
    return bias.detach().contiguous()


def torch_attention(case: AttentionCase, device: torch.device, backend: SDPBackend) -> Call:
    """torch's scaled_dot_product_attention with one backend; leaves are ``q, k, v`` and the bias if there is one."""
    mask = case.mask().to(device)[:, None, None, :].expand(-1, -1, case.queries, -1) if case.padding else None

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        given = mask if bias is None else bias.expand(q.shape[0], -1, -1, -1)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                given,
                case.dropout,
                is_causal=case.causal and given is None,
                scale=case.scale,
                enable_gqa=case.heads != case.kv_heads,
            )

    return call


def flex(case: AttentionCase, device: torch.device) -> Call:
    """FlexAttention, compiled, with T5's bias looked up by distance; leaves as of ours."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    distance = torch.arange(1 - case.queries, case.keys, device=device)
    buckets = relative_position_bucket(distance, case.table == "encoder", case.buckets, case.max_distance)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped, sizes = case.heads != case.kv_heads, (case.queries, case.keys)
    lengths = case.mask().sum(1).to(device) if case.padding else None
    block_mask = None
    if case.causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, *sizes, device=device)
    elif lengths is not None:
        block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], case.batch, None, *sizes, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert table is not None
            return score + table[buckets[j - i + case.queries - 1], h]

        score_mod = biased if case.table else None
        result: Tensor = compiled(q, k, v, score_mod, block_mask, case.scale, grouped)
        return result

    return call


def providers(
    case: AttentionCase, device: torch.device, leaves: list[Tensor], compiled: bool
) -> dict[str, tuple[Call, list[Tensor]]]:
    """Each with the leaves that it takes. Not flex with dropout, which it has not."""
    peers = leaves if case.table is None else [*leaves[:3], bias_of(case, leaves[3]).requires_grad_()]
    result = {name: (torch_attention(case, device, backend), peers) for name, backend in BACKENDS.items()}
    result["ours"] = (ours(case, device), leaves)
    if compiled and not case.dropout:
        result["flex"] = (flex(case, device), leaves)
    return result


def step(call: Call, leaves: list[Tensor], g: Tensor, _: int = 0) -> list[Tensor]:
    """The attention and the gradients of its leaves."""
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def forward(call: Call, leaves: list[Tensor], _: int = 0) -> Tensor:
    """The attention alone."""
    with torch.no_grad():
        return call(*leaves)


def small(case: AttentionCase) -> AttentionCase:
    """The same on less, for the check: an odd length over several blocks, far keys included."""
    shrunk = {"batch": min(case.batch, 2), "queries": min(case.queries, 611), "keys": min(case.keys, 611)}
    return replace(case, heads=case.heads // case.kv_heads * 2, kv_heads=2, **shrunk)


def check(name: str, case: AttentionCase, dtype: torch.dtype, device: torch.device, call: Call | None = None) -> None:
    """Ours under the law, result and gradients. Raises before anything is timed.

    Args:
        name, case: out of :data:`SHAPES`.
        dtype, device: of the inputs.
        call: instead of ours, by ``(case, device)``'s leaves.
    """
    case = small(case)
    call, eager = call or ours(case, device), eager_attention(case)
    leaves = [t.detach().requires_grad_() for t in case.tensors(drawer(dtype, device))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    g = drawer(dtype, device, 1)(*leaves[0].shape)
    columns = step(call, leaves, g), step(eager, leaves, g), step(eager, wide, g.double())
    for what, mine, theirs, truth in zip(("result", "dq", "dk", "dv", "dtable"), *columns, strict=False):
        assert_close_to_reference(mine, theirs, truth, f"{name} {dtype}, {what}")


def operations(case: AttentionCase) -> float:
    """Of the forward."""
    return 4.0 * case.batch * case.heads * case.queries * case.keys * case.dim * (0.5 if case.causal else 1.0)


def measure(name: str, case: AttentionCase, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check, then time every provider on one shape."""
    torch._dynamo.reset()
    check(name, case, dtype, device)
    leaves = [t.detach().requires_grad_() for t in case.tensors(drawer(dtype, device))]
    g = drawer(dtype, device, 1)(*leaves[0].shape)
    left_out: dict[str, str] = {}
    forwards: dict[str, Callable[[int], object]] = {}
    steps: dict[str, Callable[[int], object]] = {}
    for provider, (call, given) in providers(case, device, leaves, compiled=True).items():
        alone, both = functools.partial(forward, call, given), functools.partial(step, call, given, g)
        for what, call_of, kept in (("forward", alone, forwards), ("backward", both, steps)):
            try:
                call_of(0)
                torch.cuda.synchronize()
            except Exception as error:  # one provider that fails here must not hide the others
                left_out[f"{provider}, {what}"] = f"{type(error).__name__}: {str(error)[:120]}"
            else:
                kept[provider] = call_of
    times = {"forward": device_times(forwards, BURST, TURNS), "forward + backward": device_times(steps, BURST, TURNS)}
    peaks = {provider: peak_bytes(functools.partial(call, 0)) for provider, call in steps.items()}
    count = operations(case)
    for what, found in times.items():
        amount = count * (1.0 if what == "forward" else 3.5)
        yield {
            "shape": name,
            "what": what,
            "size": [case.batch, case.heads, case.queries, case.keys, case.dim],
            "dtype": str(dtype).removeprefix("torch."),
            "ms": {provider: round(value / 1e3, 4) for provider, value in found.items()},
            "tflop_per_s": {provider: round(amount / value / 1e6, 1) for provider, value in found.items()},
            "peak_mib": {provider: round(value / 2**20, 1) for provider, value in peaks.items()} if what != "forward" else {},
            "left_out": left_out,
        }
    backward = {n: max(times["forward + backward"][n] - times["forward"][n], 1e-3) for n in steps if n in forwards}
    yield {
        "shape": name,
        "what": "backward, by difference",
        "ms": {provider: round(value / 1e3, 4) for provider, value in backward.items()},
        "tflop_per_s": {provider: round(2.5 * count / value / 1e6, 1) for provider, value in backward.items()},
        "left_out": {},
    }


def candidates(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> dict[str, list[tuple[Tile, Any]]]:
    """By kernel: a tile, and the cut of all backward kernels with this one changed; for the forward the tile's cut."""
    from oslo_fusion.triton.attention import AttentionBlocks, backward_blocks, forward_blocks
    from oslo_fusion.triton.rows import device_facts

    shared = device_facts(torch.empty(0, device=device))[1]
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    bare = bool(case.table) and not (
        case.causal or case.window or case.dropout or case.padding or case.mask_sizes or case.packed
    )
    tokens = max(case.queries, case.keys)
    chosen, backward = (
        forward_blocks(case.dim, dtype.itemsize, shared, bool(case.table), major, case.dropout > 0, tokens),
        backward_blocks(case.dim, dtype.itemsize, shared, bare, major, case.dropout > 0, case.mask_sizes is not None),
    )

    def tiles(first: Any, rest: list[Tile]) -> list[Tile]:
        limit = () if first.registers is None else (first.registers,)
        return list(dict.fromkeys([(first.queries, first.keys, first.warps, first.stages, *limit), *rest]))

    result: dict[str, list[tuple[Tile, Any]]] = {"forward": [(t, AttentionBlocks(*t)) for t in tiles(chosen, FORWARD)]}
    result["dk, dv"] = [(t, replace(backward, keys=AttentionBlocks(*t))) for t in tiles(backward.keys, KEYS)]
    result["dq"] = []
    for t in tiles(backward.queries, QUERIES):
        table = backward.table if backward.table.queries % t[0] == 0 else AttentionBlocks(*t)
        result["dq"].append((t, replace(backward, queries=AttentionBlocks(*t), table=table)))
    if case.table:
        same = [t for t in TABLE if t[0] % backward.queries.queries == 0]
        result["dtable"] = [(t, replace(backward, table=AttentionBlocks(*t))) for t in tiles(backward.table, same)]
    return result


def kept(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's arguments, such that the forward keeps what its backward reads."""
    q, k, v, *rest = arguments
    extras, options, _ = split(tuple(rest))
    return q, k, v, *extras, *options._replace(keep=True)


def sweep(name: str, case: AttentionCase, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Ours over the cuts of each kernel; a cut of the backward is timed with all of the backward around it."""
    from oslo_fusion.ops import attention as op
    from oslo_fusion.triton import attention as kernels

    leaves = [t.detach() for t in case.tensors(drawer(dtype, device))]
    options = case.options(device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    arguments = kept(op.prepare(*leaves[:3], bias_table=leaves[3] if case.table else None, **options))
    out, *state = kernels.launch_attention(*arguments)
    g = drawer(dtype, device, 1)(*out.shape)

    class Cut(torch.autograd.Function):
        """Ours with a given cut, for the check."""

        blocks: Any = None
        backward_blocks: Any = None

        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
            ctx.arguments = kept(op.prepare(q, k, v, bias_table=table, **small(case).options(device)))
            y, *state = kernels.launch_attention(*ctx.arguments, blocks=Cut.blocks)
            ctx.save_for_backward(y, *state)
            result: Tensor = y
            return result

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            rest = ctx.arguments[3:]
            found = kernels.launch_attention_backward(
                dy, *ctx.arguments[:3], *ctx.saved_tensors, *rest, rest[0] is not None, blocks=Cut.backward_blocks
            )
            return (*found[:3], found[3] if rest[0] is not None else None)

    for kernel, cuts in candidates(case, dtype, device).items():
        calls: dict[str, Callable[[int], object]] = {}
        left_out: dict[str, str] = {}
        for tile, blocks in cuts:
            label = "×".join(map(str, tile))
            is_forward = kernel == "forward"
            Cut.blocks, Cut.backward_blocks = (blocks, None) if is_forward else (None, blocks)
            try:
                check(f"{name}, {kernel} {label}", case, dtype, device, lambda q, k, v, t=None: Cut.apply(q, k, v, t))
                torch.cuda.synchronize()
            except Exception as error:  # does not fit, or is wrong: out
                left_out[label] = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            if is_forward:
                calls[label] = lambda _, blocks=blocks: kernels.launch_attention(*arguments, blocks=blocks)
            else:
                calls[label] = lambda _, blocks=blocks: kernels.launch_attention_backward(
                    g, *arguments[:3], out, *state, *arguments[3:], bool(case.table), blocks=blocks
                )
        times = device_times(calls, BURST, TURNS)
        amount = operations(case) * (1.0 if kernel == "forward" else 2.5)
        yield {
            "shape": name,
            "what": f"cuts of {kernel}" + ("" if kernel == "forward" else ", whole backward"),
            "chosen": "×".join(map(str, cuts[0][0])),
            "ms": {label: round(value / 1e3, 4) for label, value in sorted(times.items(), key=lambda item: item[1])},
            "tflop_per_s": {label: round(amount / value / 1e6, 1) for label, value in times.items()},
            "left_out": left_out,
        }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    chosen = f", chosen {row['chosen']}" if "chosen" in row else ""
    body = "  ".join(f"{name} {value:.3f} ms ({row['tflop_per_s'][name]:.0f})" for name, value in row["ms"].items())
    peaks = "".join(f" {name} {value:.0f}" for name, value in row.get("peak_mib", {}).items())
    return f"{row['shape']}, {row['what']}{chosen}: {body}{'; MiB' + peaks if peaks else ''} {row['left_out'] or ''}"


def dry() -> None:
    """Checks and every provider that runs without a GPU, with no timing."""
    device = torch.device("cpu")
    for (name, case), dtype in itertools.product(DRY_SHAPES.items(), (torch.float32, torch.bfloat16)):
        check(name, case, dtype, device)
        leaves = [t.detach().requires_grad_() for t in case.tensors(drawer(dtype, device))]
        g = drawer(dtype, device, 1)(*leaves[0].shape)
        ran = []
        for provider, (call, given) in providers(case, device, leaves, compiled=False).items():
            if provider in ("ours", "math"):
                forward(call, given), step(call, given, g)
                ran.append(provider)
        print(f"{name} {dtype}: checked {', '.join(ran)}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives the JSON")
    parser.add_argument("--sweep", action="store_true", help="time the cuts of our kernels")
    parser.add_argument("--only", help="one shape by its name")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args()
    if options.dry:
        dry()
        return
    device = need_gpu("benchmarks.attention")
    roof, rate = copy_bandwidth(device), matmul_rate(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s, matmul {rate / 1e12:.0f} TFLOP/s")
    names = [options.only] if options.only else list(SWEPT if options.sweep else SHAPES)
    work = sweep if options.sweep else measure
    jobs = ((name, functools.partial(work, name, SHAPES[name], torch.bfloat16, device)) for name in names)
    results, left_out = within(options.seconds, jobs, line)
    for row in results:
        row["matmul_tflop_per_s"] = round(rate / 1e12, 1)
    if options.out is not None:
        write(options.out / f"attention{'_sweep' if options.sweep else ''}-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
