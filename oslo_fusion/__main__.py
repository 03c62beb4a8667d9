"""The command line: ``python -m oslo_fusion info | plan | bench``.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done; 1 the answers before and after
differ, or a provider failed; 2 the command could not be carried out as given.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import oslo_fusion
from oslo_fusion import engine, extension, models, workload
from oslo_fusion.config import FusionConfig, parse_config
from oslo_fusion.environment import (
    SUPPORTED_PYTHON,
    SUPPORTED_TORCH,
    SUPPORTED_TRANSFORMERS,
    Ability,
    environment,
)
from oslo_fusion.errors import ConfigError, OsloFusionError

DEFAULT_CONFIG: dict[str, Any] = {"kernel_fusion": {"enable": True}}
_WIDTH = 150


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``python -m oslo_fusion``; by default those of the process.

    Returns:
        The exit code.
    """
    parsed = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")  # said in our own report, where it matters
    try:
        return int(parsed.run(parsed))
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oslo_fusion",
        description="Make Hugging Face models faster in one call: see what this machine can do, what would be changed "
        "in a model, and what that brings here.",
        epilog="Each command has its own help: python -m oslo_fusion bench --help",
    )
    parser.add_argument("--version", action="version", version=f"oslo_fusion {oslo_fusion.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,plan,bench}")

    info = commands.add_parser(
        "info",
        help="what this machine can do and, if not, why",
        description="Show versions and what is supported, the devices, and for each ability whether it is here; if it "
        "is not, why.",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    info.set_defaults(run=_info)

    plan = commands.add_parser(
        "plan",
        help="what would be changed in a model, and what would not",
        description="Build a model, print the plan that initialize() would carry out, and change nothing. Named models "
        "get random weights of the published shape; nothing is downloaded.",
    )
    _add_model_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    plan.set_defaults(run=_plan)

    bench = commands.add_parser(
        "bench",
        help="time the same workload before and after, in one run",
        description="Check that the initialized model gives the same answers, then time the same workload with each "
        "provider in one run: wall clock, synchronized, nothing trimmed. Nothing is timed if the check fails.",
    )
    _add_model_arguments(bench)
    bench.add_argument("--batch", type=int, default=8, metavar="N", help="samples per call (default: 8)")
    bench.add_argument(
        "--seq",
        type=int,
        default=128,
        metavar="N",
        help="tokens per sample; image models ignore it (default: 128)",
    )
    bench.add_argument(
        "--mode",
        default=None,
        metavar="|".join(workload.MODES),
        help="forward without gradients, or a whole training step with fused AdamW (default: forward; training in a sweep)",
    )
    bench.add_argument(
        "--providers",
        default="eager,oslo_fusion",
        metavar="NAMES",
        help=f"comma-separated, out of: {', '.join(workload.PROVIDERS)}; or all (default: eager,oslo_fusion)",
    )
    bench.add_argument("--repeats", type=int, default=50, metavar="N", help="timed calls per provider (default: 50)")
    bench.add_argument(
        "--sweep",
        choices=["activation_memory_budget"],
        default=None,
        help="instead of comparing providers, train at several settings of this dial and draw tokens/s against memory",
    )
    bench.add_argument(
        "--budgets",
        default=",".join(f"{budget:g}" for budget in workload.BUDGETS),
        metavar="NUMBERS",
        help="the settings of a sweep, from 0 to 1, comma-separated (default: %(default)s)",
    )
    bench.add_argument(
        "--memory",
        type=float,
        default=None,
        metavar="GIB",
        help="of a sweep: pick the fastest setting that needs at most this much (default: no limit)",
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("bench"),
        metavar="DIR",
        help="where the JSON and the PNG are written (default: ./bench)",
    )
    bench.set_defaults(run=_bench)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME_OR_DIR",
        help=f"one of {', '.join(models.MODELS)}; or a local directory with config.json and weights",
    )
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="a .yaml, .yml or .json file with a kernel_fusion block (default: kernel_fusion: {enable: true})",
    )
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help="fp32, fp16 or bf16 (default: fp32)")
    parser.add_argument("--device", default=None, metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--size",
        default="full",
        metavar="|".join(models.SIZES),
        help="full: the published shape; tiny: two narrow layers, for a quick look (default: full)",
    )


# --- info -----------------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    found = gather_info()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    console = _console()
    versions = Table(title=f"oslo_fusion {oslo_fusion.__version__}", title_justify="left")
    for heading in ("software", "here", "supported"):
        versions.add_column(heading, overflow="fold")
    for row in found["versions"]:
        versions.add_row(row["name"], Text(row["version"] or f"no: {row['reason']}"), Text(row["supported"]))
    console.print(versions)
    devices = Table(title="devices", title_justify="left")
    for heading in ("device", "name", "details"):
        devices.add_column(heading, overflow="fold")
    for row in found["devices"]:
        devices.add_row(row["device"], Text(row["name"]), Text(row["details"]))
    console.print(devices)
    abilities = Table(title="abilities", title_justify="left")
    for heading in ("ability", "here", "by what, or why not"):
        abilities.add_column(heading, overflow="fold")
    for row in found["abilities"]:
        here = Text("yes", style="bold green") if row["available"] else Text("no", style="yellow")
        abilities.add_row(row["name"], here, Text(row["reason"]))
    console.print(abilities)
    return 0


def gather_info() -> dict[str, Any]:
    """What ``info`` shows, as plain data: ``versions``, ``devices`` and ``abilities``, each a list of rows."""
    here = environment()
    no_cuda = _why_no_cuda()
    versions = [
        _version_row("python", here.python, SUPPORTED_PYTHON, ""),
        _version_row("torch", here.torch, SUPPORTED_TORCH, ""),
        _version_row("transformers", here.transformers, SUPPORTED_TRANSFORMERS, "not installed"),
        _version_row("triton", here.triton, "3.6 and newer; optional", "not installed"),
        _version_row("CUDA", here.cuda, "what torch was built with", "this torch is built without CUDA"),
        _version_row("HIP", here.hip, "what torch was built with", "this torch is built without ROCm"),
    ]
    devices = [{"device": "cpu", "name": here.cpu, "details": f"{here.cpu_threads} threads"}]
    devices += [
        {
            "device": f"cuda:{device.index}",
            "name": device.name,
            "details": f"capability {device.capability[0]}.{device.capability[1]}, {device.memory_gib:.1f} GiB",
        }
        for device in here.devices
    ]
    if no_cuda:
        devices.append({"device": "cuda", "name": "none", "details": no_cuda})
    on_cuda = [here.torchscript_fuser("cuda"), here.inductor("cuda")]
    if no_cuda:
        on_cuda = [dataclasses.replace(ability, reason=f"{ability.reason}: {no_cuda}") for ability in on_cuda]
    script, inductor = on_cuda
    compilers = [here.torchscript_fuser("cpu"), script, here.inductor("cpu"), inductor]
    abilities = [*compilers, _extension_ability(), _picture_ability()]
    return {"versions": versions, "devices": devices, "abilities": [dataclasses.asdict(a) for a in abilities]}


def _version_row(name: str, version: str | None, supported: str, reason: str) -> dict[str, Any]:
    return {"name": name, "version": version, "supported": supported, "reason": "" if version else reason}


def _why_no_cuda() -> str:
    if environment().devices:
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    return "torch sees no device: the driver is missing or too old, or CUDA_VISIBLE_DEVICES hides them"


def _extension_ability() -> Ability:
    failure = extension.failure()
    if failure is not None:
        return Ability("compiled extension", False, failure)
    built = ", ".join(f"{name} {value}" for name, value in extension.build_info().items())
    return Ability("compiled extension", True, built)


def _picture_ability() -> Ability:
    try:
        return Ability("pictures from bench", True, f"matplotlib {importlib.metadata.version('matplotlib')}")
    except importlib.metadata.PackageNotFoundError:
        return Ability("pictures from bench", False, "matplotlib is not installed: pip install 'oslo_fusion[bench]'")


# --- plan -----------------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    config = parse_config(arguments.config or DEFAULT_CONFIG)
    dtype = models.parse_dtype(arguments.dtype)
    device = models.parse_device(arguments.device or models.default_device())
    with _progress() as progress:
        task = progress.add_task(f"building {arguments.model}", total=2)
        model = models.build_model(arguments.model, dtype=dtype, device=device, size=arguments.size)
        progress.update(task, advance=1, description="planning")
        planned = engine.plan(model, config.fusion)
        progress.update(task, advance=1)
    planned = dataclasses.replace(planned, notes=(*planned.notes, *config.notes))
    print(json.dumps(planned.to_dict(), indent=2) if arguments.json else planned)
    return 0


# --- bench ----------------------------------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    _require_matplotlib()
    config = parse_config(arguments.config or DEFAULT_CONFIG)
    names = arguments.providers.split(",") if arguments.providers != "all" else workload.PROVIDERS
    providers = list(dict.fromkeys(name.strip() for name in names))
    load = workload.Workload(
        model=arguments.model,
        batch=arguments.batch,
        seq=arguments.seq,
        mode=arguments.mode or ("training" if arguments.sweep else "forward"),
        dtype=arguments.dtype,
        device=arguments.device or models.default_device(),
        size=arguments.size,
    )
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: received {str(out)!r}: {error.strerror}. Remedy: a directory to write to.") from None
    if arguments.sweep:
        return _sweep(load, config.fusion, arguments)
    try:
        with _progress() as progress:
            task = progress.add_task("starting", total=3 + len(providers))
            began = False

            def on_stage(text: str) -> None:
                nonlocal began
                progress.update(task, description=text, advance=int(began))
                began = True

            result = workload.compare(load, config.fusion, providers, repeats=arguments.repeats, on_stage=on_stage)
    except AssertionError as error:
        print(f"error: the answers before and after differ, so nothing was timed: {error}", file=sys.stderr)
        return 1
    result = {**workload.facts(load.torch_device), **result}
    name = workload.slug(f"{Path(load.model).name}-{load.mode}-{models.dtype_name(load.torch_dtype)}")
    stem = out / f"{name}-{load.batch}x{load.seq}"
    json_path, png_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")
    json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, png_path)
    console = _console()
    console.print(result_table(result))
    for row in result["rows"]:
        if row["error"]:
            console.print(Text(f"{row['provider']}: {row['error']}", style="red"), soft_wrap=True)
    if result["fusion"]:
        fusion = result["fusion"]
        console.print(Text(f"{fusion['fused']} sites fused, {fusion['refused']} refused"))
        for refusal in fusion["refusals"]:
            console.print(Text(f"  {refusal['sites']} × {refusal['kind']}: {refusal['reason']}"), soft_wrap=True)
    console.print(Text(f"written: {json_path} and {png_path}"), soft_wrap=True)
    return 1 if any(row["error"] for row in result["rows"]) else 0


def _sweep(load: workload.Workload, config: FusionConfig, arguments: argparse.Namespace) -> int:
    try:
        budgets = [float(word) for word in arguments.budgets.split(",")]
    except ValueError:
        raise ConfigError(
            f"--budgets: received {arguments.budgets!r}. Allowed: numbers from 0 to 1, comma-separated. Remedy: 0,0.5,1."
        ) from None
    with _progress() as progress:
        task = progress.add_task("starting", total=1 + len(budgets))
        result = workload.sweep(
            load,
            config,
            budgets,
            memory_gib=arguments.memory,
            repeats=arguments.repeats,
            on_stage=lambda text: progress.update(task, description=text, advance=1),
        )
    result = {**workload.facts(load.torch_device), **result}
    name = workload.slug(f"{Path(load.model).name}-{arguments.sweep}-{models.dtype_name(load.torch_dtype)}")
    stem = arguments.out / f"{name}-{load.batch}x{load.seq}"
    json_path, png_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")
    json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_sweep(result, png_path)
    console = _console()
    console.print(sweep_table(result))
    for row in result["rows"]:
        if row["error"] not in (None, "OOM"):
            console.print(Text(f"{_setting(row)}: {row['error']}", style="red"), soft_wrap=True)
    limit = "" if arguments.memory is None else f" within {arguments.memory:g} GiB"
    if result["picked"] is None:
        console.print(Text(f"no setting runs{limit}", style="yellow"))
    else:
        console.print(Text(f"fastest{limit}: activation_memory_budget: {result['picked']:g}"))
    console.print(Text(f"written: {json_path} and {png_path}"), soft_wrap=True)
    return 1 if any(row["error"] not in (None, "OOM") for row in result["rows"]) else 0


def _setting(row: dict[str, Any]) -> str:
    return "eager" if row["budget"] is None else f"{row['budget']:g}"


def sweep_table(result: dict[str, Any]) -> Table:
    """The rows of :func:`oslo_fusion.workload.sweep` as a table. A setting that ran out of memory says OOM."""
    table = Table(title=describe(result["workload"]), title_justify="left")
    table.add_column("activation_memory_budget")
    kept = "kept for the backward"
    memories = dict.fromkeys([result["memory"], kept])  # on the CPU the same
    for heading in ("tokens/s", "median ms", "P90 ms", *(f"GiB {memory}" for memory in memories), "first call s"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        style = "bold green" if row["budget"] is not None and row["budget"] == result["picked"] else ""
        if row["error"]:
            table.add_row(_setting(row), Text("OOM" if row["error"] == "OOM" else "failed", style="red"))
            continue
        table.add_row(
            Text(_setting(row), style=style),
            f"{row['tokens_per_s']:.0f}",
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['p90_s'] * 1e3:.3f}",
            *(f"{row['saved_bytes' if memory == kept else 'memory_bytes'] / 2**30:.3f}" for memory in memories),
            f"{row['first_call_s']:.2f}",
        )
    return table


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """Tokens per second against GiB, a point per setting; the picked one in colour. Needs matplotlib (extra ``bench``)."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    rows = [row for row in result["rows"] if not row["error"]]
    curve = sorted((row for row in rows if row["budget"] is not None), key=lambda row: row["budget"])
    axes.plot([r["memory_bytes"] / 2**30 for r in curve], [r["tokens_per_s"] for r in curve], color="#d1495b", lw=1, zorder=1)
    for row in rows:
        picked = row["budget"] is not None and row["budget"] == result["picked"]
        colour = "#8d99ae" if row["budget"] is None else "#d1495b"
        at = (row["memory_bytes"] / 2**30, row["tokens_per_s"])
        axes.scatter(
            *at, s=90 if picked else 36, color=colour if picked or row["budget"] is None else "white", edgecolors=colour
        )
        axes.annotate(_setting(row), at, xytext=(6, 4), textcoords="offset points", fontsize=9)
    if result["memory_gib"] is not None:
        axes.axvline(result["memory_gib"], color="#444444", lw=1, ls="--")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"GiB {result['memory']}")
    axes.set_ylabel("tokens per second")
    axes.set_title(
        f"activation_memory_budget\n{describe(result['workload'])}, {result['device']['name']}", fontsize=9, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def result_table(result: dict[str, Any]) -> Table:
    """The rows of :func:`oslo_fusion.workload.compare` as a table, with the workload as its title.

    ``first result`` is what initializing or wrapping and the first call take together; ``second shape`` the first
    call with another batch and length.
    """
    table = Table(title=describe(result["workload"]), title_justify="left")
    table.add_column("provider")
    for heading in ("median ms", "P90 ms", "× eager", "first result s", "second shape s", "peak GiB", "% of roof"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        if row["error"]:
            table.add_row(row["provider"], Text("failed", style="red"))
            continue
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        table.add_row(
            row["provider"],
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['p90_s'] * 1e3:.3f}",
            f"{row['speedup']:.2f}" if "speedup" in row else "-",
            f"{row['prepare_s'] + row['first_call_s']:.2f}",
            f"{row['second_shape_s']:.3f}",
            peak,
            f"{row['percent_of_roof']:.1f}",
        )
    return table


def describe(load: dict[str, Any]) -> str:
    """``gpt2, forward, float16, batch 256, seq 16, cuda``."""
    size = "" if load["size"] == "full" else f" ({load['size']})"
    return (
        f"{Path(load['model']).name}{size}, {load['mode']}, {load['dtype']}, batch {load['batch']}, seq {load['seq']}, "
        f"{load['device']}"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar per provider with its median in ms; the whisker reaches to P90. Needs matplotlib (extra ``bench``)."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    rows = [row for row in result["rows"] if not row["error"]]
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.55 * max(len(rows), 1)), layout="constrained")
    names = [row["provider"] for row in rows]
    medians = [row["median_s"] * 1e3 for row in rows]
    whiskers = [max(0.0, (row["p90_s"] - row["median_s"]) * 1e3) for row in rows]
    colours = ["#d1495b" if name == "oslo_fusion" else "#8d99ae" for name in names]
    axes.barh(names, medians, color=colours, xerr=[[0.0] * len(rows), whiskers], ecolor="#444444", capsize=2)
    for index, row in enumerate(rows):
        text = f" {medians[index]:.3g} ms" + (f"  {row['speedup']:.2f}×" if "speedup" in row else "")
        axes.text(medians[index] + whiskers[index], index, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.35 * max((m + w for m, w in zip(medians, whiskers, strict=True)), default=1.0))
    axes.invert_yaxis()
    axes.set_xlabel("ms per call (median; whisker: P90)")
    axes.set_title(f"{describe(result['workload'])}\n{result['device']['name']}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib").use("Agg")  # a file is all we want: no window, no display
    except ImportError:
        raise ConfigError(
            "bench: draws a picture, and matplotlib is not installed. Remedy: pip install 'oslo_fusion[bench]'."
        ) from None


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


if __name__ == "__main__":
    sys.exit(main())
