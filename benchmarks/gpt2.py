"""GPT-2 on 256 × 16 tokens, OSLO's own example: forward and training step in fp32, fp16 and bf16, with every provider.

    python -m benchmarks.gpt2                                # on a GPU: benchmarks/results/gpt2-<device>.json
    python -m benchmarks.gpt2 --memory-efficient             # the forward, compiled: gpt2-memory-efficient-<device>.json
    python -m benchmarks.gpt2 --size tiny --device cpu --providers eager,oslo_fusion --out /tmp/gpt2

The answers of ``oslo_fusion`` are checked before each section; a section whose check is red is not timed, and the
exit code is 1. On CUDA the JSON also says where the time of ``eager`` and ``oslo_fusion`` goes, kernel by kernel. The
file is written again after each section, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from oslo_fusion import models, workload
from oslo_fusion.errors import ConfigError, OsloFusionError

CONFIG = {"kernel_fusion": {"enable": True}}
# The whole forward in one graph: with graphs per layer, 12 of them, 16 tokens wait for the host (6.2 ms for 3.4 of kernels).
MEMORY_EFFICIENT = {
    "kernel_fusion": {"enable": True, "memory_efficient_fusion": {"scope": "model"}, "custom_cuda_kernels": "all"}
}
RESULTS = Path(__file__).parent / "results"
SCRATCH = Path(__file__).parent / "scratch"
# The longest compilation of all; --providers includes it.
NOT_BY_DEFAULT = {("training", "compile reduce-overhead")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's docstring.

    Args:
        arguments: the words of the command line; by default those of the process.

    Returns:
        0, or 1 if a check was red or a provider failed, or 2 if an argument is unusable.
    """
    parsed = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")
    try:
        return _run(parsed)
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpt2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=256, help="samples per call (default: 256)")
    parser.add_argument("--seq", type=int, default=16, help="tokens per sample (default: 16)")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls per provider (default: 50)")
    parser.add_argument("--size", default="full", help="full, or tiny for a smoke test (default: full)")
    parser.add_argument("--device", default=None, help="default: cuda if there is one")
    parser.add_argument("--dtypes", default="fp32,fp16,bf16", help="comma-separated (default: fp32,fp16,bf16)")
    parser.add_argument("--modes", default=None, help="comma-separated (default: forward,training)")
    parser.add_argument(
        "--memory-efficient",
        action="store_true",
        help="memory_efficient_fusion and custom kernels as configuration, the forward only, in a file of its own",
    )
    parser.add_argument(
        "--providers",
        default=None,
        help=f"comma-separated, out of: {', '.join(workload.PROVIDERS)} (default: all; in training without the third)",
    )
    parser.add_argument("--config", default=None, help="a configuration file (default: fusion enabled, nothing else)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no section after this long")
    parser.add_argument("--commit", default=None, help="the code's commit, for a copy without its history")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="directory (default: benchmarks/results; scratch beside it for tiny)",
    )
    return parser


def _run(parsed: argparse.Namespace) -> int:
    device = models.parse_device(parsed.device or models.default_device())
    if parsed.memory_efficient and parsed.config:
        raise ConfigError("--memory-efficient: received together with --config. Remedy: one of them.")
    modes = _words(parsed.modes or ("forward" if parsed.memory_efficient else "forward,training"))
    dtypes = [models.parse_dtype(word) for word in _words(parsed.dtypes)]
    plan = [
        (
            workload.Workload("gpt2", parsed.batch, parsed.seq, mode, dtype, device, parsed.size),
            _words(parsed.providers)
            if parsed.providers
            else [name for name in workload.PROVIDERS if (mode, name) not in NOT_BY_DEFAULT],
        )
        for dtype in dtypes
        for mode in modes
    ]
    facts = workload.facts(device, parsed.commit)
    out = parsed.out or (RESULTS if parsed.size == "full" else SCRATCH)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpt2-{'memory-efficient-' if parsed.memory_efficient else ''}{facts['device']['slug']}.json"
    result: dict[str, Any] = {"benchmark": "gpt2", **facts, "seconds": 0.0, "sections": []}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=sum(3 + len(providers) for _, providers in plan))
        for load, providers in plan:
            if time.perf_counter() - start > parsed.seconds:
                break
            section_start = time.perf_counter()
            label = f"{models.dtype_name(load.torch_dtype)} {load.mode}"

            def on_stage(text: str, label: str = label) -> None:
                progress.update(task, description=f"{label}: {text}", advance=1)

            try:
                section = workload.compare(
                    load,
                    parsed.config or (MEMORY_EFFICIENT if parsed.memory_efficient else CONFIG),
                    providers,
                    repeats=parsed.repeats,
                    with_profile=True,
                    on_stage=on_stage,
                )
            except AssertionError as error:
                section = {"workload": load.to_dict(), "error": f"the check is red: {error}", "rows": []}
            section["seconds"] = round(time.perf_counter() - section_start, 1)
            result["sections"].append(section)
            result["seconds"] = round(time.perf_counter() - start, 1)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(result, path)
    failed = [s for s in result["sections"] if s.get("error") or any(row["error"] for row in s["rows"])]
    return 1 if failed else 0


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _print(result: dict[str, Any], path: Path) -> None:
    table = Table(title=f"GPT-2 on {result['device']['name']}, {result['seconds']:.0f} s in all", title_justify="left")
    for heading in ("mode", "dtype", "provider"):
        table.add_column(heading)
    for heading in ("median ms", "P90 ms", "× eager", "first result s", "peak GiB", "% of roof"):
        table.add_column(heading, justify="right")
    for section in result["sections"]:
        load = section["workload"]
        if section.get("error"):
            table.add_row(load["mode"], load["dtype"], Text("not timed", style="red"))
        for row in section["rows"]:
            names = load["mode"], load["dtype"], row["provider"]
            if row["error"]:
                table.add_row(*names, Text("failed", style="red"))
                continue
            table.add_row(
                *names,
                f"{row['median_s'] * 1e3:.3f}",
                f"{row['p90_s'] * 1e3:.3f}",
                f"{row['speedup']:.2f}" if "speedup" in row else "-",
                f"{row['prepare_s'] + row['first_call_s']:.2f}",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['percent_of_roof']:.1f}",
            )
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(table)
    for section in result["sections"]:
        label = f"{section['workload']['mode']} {section['workload']['dtype']}"
        errors = [section["error"]] if section.get("error") else []
        errors += [f"{row['provider']}: {row['error']}" for row in section["rows"] if row["error"]]
        for error in errors:
            console.print(Text(f"{label}: {error}", style="red"), soft_wrap=True)
    console.print(Text(f"written: {path}"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
