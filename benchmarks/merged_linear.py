"""Linear layers of one input, forward and backward: apart, concatenated by plain PyTorch, and ours with both of its gradients.

    python -m benchmarks.merged_linear --out DIR    the table (two minutes on one GPU, most of it compiling)
    python -m benchmarks.merged_linear --dry        no GPU: every code path on tiny shapes

How it is measured: :mod:`benchmarks.timing`. All but ``eager`` are compiled as layers are. Beside the linear layers a residual
reads the input, so that its gradient is added as in a layer, by whatever kernel adds up the others.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, device_times, need_gpu, slug, within, write
from oslo_fusion.aot import Backend, merged_linears
from oslo_fusion.ops.merged_linear import merged_linear
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.probe import prove

SHAPES = [
    ("BERT-base", 32768, 768, (768, 768, 768), True),
    ("T5-base", 16384, 768, (768, 768, 768), False),
    ("T5-base k, v", 16384, 768, (768, 768), False),
    ("BERT-large", 16384, 1024, (1024, 1024, 1024), True),
    ("Qwen 0.5B", 16384, 896, (896, 128, 128), True),
    ("Llama 1B", 16384, 2048, (2048, 512, 512), False),
    ("Llama 1B k, v", 16384, 2048, (512, 512), False),
]
DRY_SHAPES = [("tiny", 5, 16, (16, 8), True), ("tiny", 5, 16, (8, 8, 8), False)]
Call = Callable[..., tuple[Tensor, ...]]


def _cut(count: int, bias: bool, parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    return parameters[:count], list(parameters[count:]) if bias else [None] * count


def apart(count: int, bias: bool, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """A matmul each, as the module writes them, and the residual."""
    return (*(F.linear(x, w, b) for w, b in zip(*_cut(count, bias, parameters), strict=True)), x * 2)


def concatenated(count: int, bias: bool, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """One matmul of plain PyTorch, of which autograd's own backward is one as well: gradients are slices of one tensor."""
    weights = parameters[:count]
    y = F.linear(x, torch.cat(weights), torch.cat(parameters[count:]) if bias else None)
    return (*y.split([w.shape[0] for w in weights], -1), x * 2)


def ours(form: str, count: int, bias: bool, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The operator that the pass puts in."""
    return (*merged_linear(x, *_cut(count, bias, parameters), form), x * 2)


def providers(count: int, bias: bool, compiler: str = "inductor") -> dict[str, Call]:
    """Name → a function of the input and the parameters."""
    plain = functools.partial(apart, count, bias)
    found: dict[str, Call] = {"eager": plain}
    calls: dict[str, Call] = {"apart": plain, "concatenated": functools.partial(concatenated, count, bias)}
    calls |= {form: functools.partial(ours, form, count, bias) for form in ("side_by_side", "accumulated")}
    for name, call in calls.items():

        def run(*given: Tensor, call: Call = call) -> tuple[Tensor, ...]:
            return call(*given)

        # A function of its own for each: Dynamo keeps what it compiled with the code object.
        run.__code__ = run.__code__.replace(co_name=name)
        found[name] = torch.compile(run, backend=Backend(compiler=compiler), dynamic=False)
    return found


def drawn(tokens: int, dim: int, outs: Sequence[int], bias: bool, device: torch.device) -> list[Tensor]:
    """x, the weights and the biases."""
    draw = drawer(torch.bfloat16, device)
    return [draw(tokens, dim), *(draw(out, dim) / dim**0.5 for out in outs), *(draw(out) for out in outs if bias)]


def check(calls: dict[str, Call], given: list[Tensor], count: int, bias: bool) -> None:
    """The law for every provider.

    Raises:
        AssertionError: one breaks it.
    """
    for name, call in calls.items():
        for comparison in prove(call, functools.partial(apart, count, bias), given):
            assert comparison.same, f"{name}: {comparison}"


def measure(
    name: str, tokens: int, dim: int, outs: Sequence[int], bias: bool, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Check, then a row with every provider's time and memory."""
    torch._dynamo.reset()
    calls = providers(len(outs), bias)
    leaves = drawn(tokens, dim, outs, bias, device)
    check(calls, leaves, len(outs), bias)
    leaves = [t.requires_grad_() for t in leaves]
    dys = [torch.randn(tokens, out, device=device, dtype=torch.bfloat16) for out in (*outs, dim)]
    forward: dict[str, Callable[[int], object]] = {}
    step: dict[str, Callable[[int], object]] = {}
    memory = {}
    for provider, call in calls.items():

        def only(_: int, call: Call = call) -> object:
            return call(*leaves)

        def both(_: int, call: Call = call) -> object:
            return torch.autograd.grad(call(*leaves), leaves, dys)

        both(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(0)
        memory[provider] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        forward[provider], step[provider] = only, both
    yield {
        "op": "merged_linear",
        "model": name,
        "shape": [tokens, dim, *outs],
        "bias": bias,
        "dtype": "bfloat16",
        "forward_us": {provider: round(value, 1) for provider, value in device_times(forward).items()},
        "device_us": {provider: round(value, 1) for provider, value in device_times(step).items()},
        "peak_mib": memory,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    parts = [f"{name} {row['forward_us'][name]:.0f} / {value:.0f} µs" for name, value in row["device_us"].items()]
    memory = ", ".join(str(row["peak_mib"][name]) for name in row["device_us"])
    return f"{row['model']:14} {'×'.join(map(str, row['shape'])):24} {'  '.join(parts)}  ({memory} MiB)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives merged_linear-<gpu>.json")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no shape after this long; what is left out is said")
    options = parser.parse_args(arguments)
    with mock.patch.object(merged_linears, "pays", return_value=False):  # "apart" is to stay so
        if options.dry:
            for name, tokens, dim, outs, bias in DRY_SHAPES:
                torch._dynamo.reset()
                calls = providers(len(outs), bias, "eager")
                check(calls, drawn(tokens, dim, outs, bias, torch.device("cpu")), len(outs), bias)
                print(f"{name}: checked {', '.join(calls)}")
            return
        device = need_gpu("benchmarks.merged_linear")
        roof = copy_bandwidth(device)
        jobs = ((shape[0], functools.partial(measure, *shape, device)) for shape in SHAPES)
        results, left_out = within(options.seconds, jobs, line)
    if options.out is not None:
        write(options.out / f"merged_linear-{slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
