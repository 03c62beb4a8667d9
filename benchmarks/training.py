"""Whole training steps with custom kernels alone, no compiler: eager, ours, and Liger with and without its fused loss.

    python -m benchmarks.training --out DIR          T5-base 32×512+512 and a Llama of 1.24B at 8×2048, about two minutes
    python -m benchmarks.training --dry              tiny models on the CPU: every code path, no figure worth keeping

A step is forward, backward and fused AdamW, on bfloat16 parameters and random tokens, without the cache of keys and values that
training has no use for (as transformers' Trainer).

Every provider lives in a process of its own, because Liger replaces transformers' rotary embedding for the whole process,
whether or not it is given one model. All processes hold their model at the same time and are asked in turn, round after
round, because the host's speed drifts by more than the providers differ; a process that waits gives its free memory back.

Nothing is timed before it is checked. On an eighth of the batch, without dropout, loss and every parameter's gradient obey the
law of ``workload.check``: our error against float32 is at most twice that of plain bfloat16, plus one unit in the last place.
Ours is not timed on red; of a peer it is said. The first loss of the full step may differ from eager's by at most 2⁻⁷ of it,
one unit in the last place of a bfloat16 (T5's loss is one); beyond that no provider is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from oslo_fusion import engine, models, surgery, workload
from oslo_fusion.errors import OsloFusionError
from oslo_fusion.jit import TorchScriptPass
from oslo_fusion.report import FusionReport
from oslo_fusion.workload import Answers, Stopwatch, Workload, synchronize

CONFIG = {"kernel_fusion": {"enable": True, "custom_cuda_kernels": "all"}}
LOSS = {"kernel_fusion": {"enable": True, "custom_cuda_kernels": ["all", "FusedLinearCrossEntropy"]}}


def compiled(budget: float) -> dict[str, Any]:
    """Layers compiled under a memory budget, and the fused loss."""
    block = {"scope": "layer", "activation_memory_budget": budget}
    kernels = ["all", "FusedLinearCrossEntropy"]
    return {"kernel_fusion": {"enable": True, "memory_efficient_fusion": block, "custom_cuda_kernels": kernels}}


MODELS = {"t5-base": ("t5", 32, 512), "llama-1b": ("llama", 8, 2048)}
"""Name in :data:`oslo_fusion.models.MODELS`, batch, tokens per sample (of T5 on both sides)."""

EAGER, OURS, OURS_LOSS = "eager", "oslo_fusion kernels", "oslo_fusion kernels and loss"
COMPILED = {"oslo_fusion memory-efficient": 1.0, "oslo_fusion memory-efficient at 0": 0.0}
PROVIDERS = (EAGER, OURS, OURS_LOSS, "oslo_fusion", *COMPILED, "liger kernels", "liger", "compile")
"""``oslo_fusion kernels``: what ``custom_cuda_kernels: all`` gives, without the TorchScript room; ``and loss``: with
``FusedLinearCrossEntropy`` too. ``oslo_fusion``: every room. ``memory-efficient``: layers compiled, and the fused loss.
``liger kernels``: norms, gated product and rotary embedding, like with like. ``liger``: its fused linear cross entropy too."""

DEFAULT = (EAGER, OURS, OURS_LOSS, "liger kernels", "liger")
ROUNDS = 5
CALLS = 4
SETTLE = 2  # calls before each round's timed ones: they fetch from the driver the memory that was given back
RECORDED = 3
LEARNING_RATE = 1e-4  # of the recorded steps, so that a wrong gradient shows in the next loss; then 0, and the weights stay
LAW = torch.finfo(torch.bfloat16).eps
PROFILED = {"device_ms": 1, "host_ms": 1, "launches": 0}  # columns from the profile, and their digits
PATIENCE = 150.0  # seconds for one request


class Absent(Exception):
    """This provider has nothing for this model; that is a row, not a failure."""


# --- in the provider's process ----------------------------------------------------------------------------------------------


def initialize_kernels(model: nn.Module, config: Mapping[str, Any]) -> None:
    """:func:`oslo_fusion.initialize` without the TorchScript room, so that kernels alone are measured."""
    planned = engine.plan(model, config)
    kept = dataclasses.replace(planned, proposals=tuple(p for p in planned.proposals if p.room != TorchScriptPass.name))
    with surgery.transaction(model):
        surgery.apply(model, [swap for p in kept.proposals if p.outcome == "fused" for swap in p.swaps])
        surgery.attach(model, FusionReport(kept))


def liger_recipe(model: Any) -> Any:
    """Liger's function for models of this type. Finding it changes nothing yet.

    Raises:
        Absent: there is no Liger here, or it has no recipe for this type.
    """
    try:
        patches = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise Absent(f"liger-kernel cannot be imported: {error}") from error
    kind = model.config.model_type
    recipe = patches.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if recipe is None:
        raise Absent(f"liger-kernel {liger_version()} has no recipe for {kind}")
    return recipe


def liger_version() -> str | None:
    """As its package says, or None where it is not installed."""
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def apply_provider(name: str, model: nn.Module) -> None:
    """Make ``model`` the provider's."""
    if name in (OURS, OURS_LOSS):
        initialize_kernels(model, CONFIG if name == OURS else LOSS)
    elif name == "oslo_fusion":
        engine.initialize(model, CONFIG)
    elif name in COMPILED:
        engine.initialize(model, compiled(COMPILED[name]))
    elif name == "compile":
        model.compile()
    elif name.startswith("liger"):
        # On this instance, and on transformers' globals where Liger knows no other way.
        liger_recipe(model)(model=model, fused_linear_cross_entropy=name == "liger")


def build(load: Workload) -> nn.Module:
    """The workload's model, without the cache of keys and values."""
    model = load.build()
    config: Any = model.config
    config.use_cache = False
    return model


def answers(model: nn.Module, load: Workload) -> Answers:
    """Loss and gradients. The loss stands for the output too: with a fused loss there are no logits."""
    workload.switch_off_dropout(model)
    loss = model(**load.inputs(model)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss = loss.detach()
    return Answers(loss.to(load.torch_dtype), loss, gradients)


class Runner:
    """One provider at work on one model."""

    def __init__(self, provider: str, load: Workload) -> None:
        self.provider, self.load, self.device = provider, load, load.torch_device
        self.small = dataclasses.replace(load, batch=max(1, load.batch // 8))
        importlib.import_module("transformers")
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)  # the context; all processes start at once, so this costs once

    def prepare(self) -> dict[str, Any]:
        """Build, apply, make the first steps. Plain answers come first: afterwards Liger is all over this process."""
        plain = build(self.small)
        if self.provider.startswith("liger"):
            liger_recipe(plain)
        self.before = answers(plain, self.small)
        self.reference = answers(plain.float(), dataclasses.replace(self.small, dtype="float32"))
        del plain
        workload.free_memory(self.device)
        model = build(self.load)
        synchronize(self.device)
        start = time.perf_counter()
        apply_provider(self.provider, model)
        synchronize(self.device)
        prepare_s = time.perf_counter() - start
        inputs, self.parameters = self.load.inputs(model), list(model.parameters())
        optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
        losses: list[float] = []

        def step() -> object:
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if len(losses) < RECORDED:
                losses.append(float(loss.detach()))
            return loss.detach()

        self.step, self.watch = step, Stopwatch(step, self.device)
        torch.manual_seed(self.load.seed)  # the same dropout for everybody who draws it the same way
        self.watch.warm_up(RECORDED)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.resident = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.resident -= sum(g.nbytes for a in (self.before, self.reference) for g in a.gradients.values())
        attached = surgery.attached(model)
        return {
            "losses": losses,
            "prepare_s": prepare_s,
            "parameters": sum(p.numel() for p in self.parameters),
            "fusion": outcome(attached) if isinstance(attached, FusionReport) else None,
        }

    def check(self) -> dict[str, Any]:
        """Loss and gradients of a fresh model of this provider, under the law.

        Raises:
            AssertionError: the law is broken.
        """
        model = build(self.small)
        apply_provider(self.provider, model)
        try:
            return workload.check(self.before, answers(model, self.small), self.reference)
        finally:
            del model, self.before, self.reference
            workload.free_memory(self.device)

    def time(self, calls: int) -> None:
        """A round."""
        self.watch.warm_up(SETTLE)
        self.watch.time(calls)
        workload.free_memory(self.device)

    def finish(self) -> dict[str, Any]:
        """What was measured, and where the time goes."""
        measured = dataclasses.asdict(self.watch.measurement(self.resident))
        measured["first_step_s"] = measured.pop("first_call_s")
        for name in ("warmup_s", "second_shape_s"):
            del measured[name]
        if self.device.type == "cuda":
            self.watch.warm_up(SETTLE)
            measured["profile"] = workload.profile(self.step, self.device, top=20)
            workload.free_memory(self.device)
        return measured


def outcome(report: FusionReport) -> dict[str, Any]:
    """How many sites of each kind were fused, and why others were not."""
    fused = Counter(row.site.kind for row in report.rows if row.outcome == "fused")
    refused = Counter((row.site.kind, row.reason) for row in report.rows if row.outcome == "refused")
    return {
        "fused": dict(fused),
        "refused": [{"kind": kind, "reason": reason, "sites": sites} for (kind, reason), sites in refused.items()],
    }


def serve(connection: Connection, provider: str, load: Workload, threads: int) -> None:
    """The provider's process: do what is asked, in order, until the other end hangs up."""
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")
    torch.set_num_threads(threads)
    runner = Runner(provider, load)
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = connection.recv()
            try:
                reply = "done", getattr(runner, name)(*arguments)
            except Absent as absent:
                reply = "absent", str(absent)
            except AssertionError as red:
                reply = "red", str(red)
            except Exception as error:
                reply = "error", f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:600]
            connection.send(reply)


# --- in the parent ----------------------------------------------------------------------------------------------------------


class Provider:
    """A provider's process as seen from here, and its row."""

    def __init__(self, name: str, load: Workload) -> None:
        context = multiprocessing.get_context("spawn")
        self.row: dict[str, Any] = {"provider": name, "error": None, "absent": None}
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, load, torch.get_num_threads()), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether it is still in the race."""
        return self.row["error"] is None and self.row["absent"] is None

    def ask(self, name: str, *arguments: Any) -> tuple[str, Any]:
        """Have a method of its :class:`Runner` called. ``("done", result)``, ``("red", message)``, or ``("out", None)`` for a
        provider that has failed or has nothing for this model; its row says which, and it is not asked again."""
        if not self.alive:
            return "out", None
        try:
            self._connection.send((name, arguments))
            if not self._connection.poll(PATIENCE):
                raise OSError(f"no answer to {name} within {PATIENCE:.0f} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1.0)
            kind, answer = "error", f"{name}: {str(error) or 'its process ended'} (exit code {self._process.exitcode})"
        if kind in ("absent", "error"):
            self.row[kind] = answer
            self.close()  # with it goes whatever memory it held
            return "out", None
        return kind, answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def judge(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the first losses, or None.

    Args:
        rows: with ``provider`` and ``losses``; without ``eager`` among them there is nothing to compare with.
    """
    found = {row["provider"]: row["losses"][0] for row in rows if row.get("losses")}
    if EAGER not in found:
        return None
    truth = found[EAGER]
    if not math.isfinite(truth):
        return f"the first loss of {EAGER} is {truth}"
    for name, loss in found.items():
        if not abs(loss - truth) <= LAW * abs(truth):
            return f"first loss of {name}: {loss:.6g}, of {EAGER} {truth:.6g}: more than {LAW:.2g} of it apart"
    return None


def measure(load: Workload, names: Sequence[str], rounds: int, deadline: float, rate: float) -> dict[str, Any]:
    """One model with every provider.

    Args:
        load: the model and its batch.
        names: out of :data:`PROVIDERS`.
        rounds: of :data:`CALLS` timed steps each.
        deadline: on ``time.perf_counter``; no round begins after it.
        rate: FLOP/s of the roof.
    """
    start = time.perf_counter()
    providers = [Provider(name, load) for name in names]
    try:
        parameters, error = 0, None
        for provider in providers:
            _, found = provider.ask("prepare")
            if found is not None:
                parameters = parameters or found.pop("parameters")
                provider.row.update(found)
                kind, said = provider.ask("check")
                provider.row["check"] = {"green": kind == "done", "found": said}
                if kind == "red" and provider.row["provider"].startswith("oslo_fusion"):
                    error = f"the check is red: {provider.row['provider']}: {said}"
        error = error or judge([p.row for p in providers])
        flops = 6 * parameters * load.batch * load.seq
        done = 0
        while error is None and done < rounds and (done == 0 or time.perf_counter() < deadline):
            for provider in providers:
                provider.ask("time", CALLS)
            done += 1
        for provider in providers:
            found = provider.ask("finish")[1] if error is None else None
            if found is not None:
                provider.row.update(found, percent_of_roof=100 * flops / (found["median_s"] * rate))
    finally:
        for provider in providers:
            provider.close()
    rows = [provider.row for provider in providers]
    base = next((row["median_s"] for row in rows if row["provider"] == EAGER and "median_s" in row), None)
    for row in rows:
        if base is not None and "median_s" in row:
            row["speedup"] = base / row["median_s"]
    return {
        "workload": load.to_dict(),
        "parameters": parameters,
        "flops": flops,
        "rounds": done,
        "calls": CALLS,
        "law": LAW,
        "error": error,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }


def kernels(section: Mapping[str, Any]) -> Iterator[str]:
    """The largest kernels of eager and ours, as text."""
    for row in section["rows"]:
        found = row.get("profile")
        if found is None or row["provider"] not in (EAGER, OURS):
            continue
        yield (
            f"\n{section['workload']['model']}, {row['provider']}: {found['device_ms']:.1f} ms of kernels in "
            f"{found['launches']:.0f} launches, host {found['host_ms']:.1f} ms, wall {found['wall_ms']:.1f} ms per step\n"
        )
        yield f"{'ms':>9} {'share':>6} {'calls':>6}  kernel"
        for kernel in found["kernels"]:
            yield f"{kernel['ms']:9.3f} {100 * kernel['share']:5.1f}% {kernel['calls']:6.0f}  {kernel['name'][:110]}"


def table(result: Mapping[str, Any]) -> Table:
    """What people read."""
    made = Table(title=f"Training steps on {result['device']['name']}, {result['seconds']:.0f} s in all", title_justify="left")
    made.add_column("model")
    made.add_column("provider")
    for heading in ("median ms", "P90", "× eager", "kernels ms", "host ms", "launches", "peak GiB", "first s", "% of roof"):
        made.add_column(heading, justify="right")
    made.add_column("losses, check")
    for section in result["sections"]:
        for row in section["rows"]:
            made.add_row(section["workload"]["model"], row["provider"], *_cells(row, section["error"]))
    return made


def _cells(row: Mapping[str, Any], error: str | None) -> list[str]:
    said = " ".join(f"{loss:.4f}" for loss in row.get("losses", ()))
    if "check" in row:
        said += ", green" if row["check"]["green"] else f", RED: {row['check']['found']}"
    if "median_s" not in row:
        return ["–"] * 9 + [row["error"] or row["absent"] or f"not timed: {error}; {said}"]
    found = row.get("profile")
    return [
        f"{row['median_s'] * 1e3:.1f}",
        f"{row['p90_s'] * 1e3:.1f}",
        f"{row['speedup']:.3f}" if "speedup" in row else "–",
        *(f"{found[key]:.{digits}f}" if found else "–" for key, digits in PROFILED.items()),
        "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        f"{row['prepare_s'] + row['first_step_s']:.1f}",
        f"{row['percent_of_roof']:.1f}",
        said,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's docstring.

    Returns:
        0; 1 if a check was red or a provider failed; 2 if an argument is unusable.
    """
    try:
        return _run(_parser().parse_args(arguments))
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it only the table is printed")
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (default: {','.join(MODELS)})")
    parser.add_argument("--providers", default=",".join(DEFAULT), help=f"comma-separated, out of: {', '.join(PROVIDERS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} timed steps each (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=110.0, help="begin no round after this long (default: 110)")
    parser.add_argument("--profile", action="store_true", help="write the largest kernels of eager and ours beside the JSON")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--commit", default=None, help="the code's commit, for a copy without its history")
    return parser


def _chosen(name: str, text: str, allowed: Sequence[str]) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words or [text]:
        if word not in allowed:
            raise models.wrong_value(name, word, list(allowed))
    return words


def _run(parsed: argparse.Namespace) -> int:
    names = _chosen("--providers", parsed.providers, PROVIDERS)
    chosen = _chosen("--models", parsed.models, tuple(MODELS))
    if parsed.rounds < 1:
        raise models.wrong_value("--rounds", parsed.rounds, ["a whole number from 1"])
    start = time.perf_counter()
    device = models.parse_device("cpu" if parsed.dry else "cuda")
    facts = workload.facts(device, parsed.commit)
    rate = workload.matmul_rate(torch.bfloat16, device)
    workload.free_memory(device)
    result: dict[str, Any] = {
        "benchmark": "training",
        **facts,
        "config": CONFIG,
        "roof": {"matmul_flops_per_s": rate},
        "seconds": 0.0,
        "sections": [],
    }
    result["versions"]["liger-kernel"] = liger_version()
    for number, name in enumerate(chosen, 1):
        model, batch, seq = MODELS[name]
        load = Workload(model, batch, seq, "training", "bfloat16", device)
        if parsed.dry:
            load = dataclasses.replace(load, batch=2, seq=8, size="tiny")
        deadline = start + parsed.seconds * number / len(chosen)
        result["sections"].append({"name": name, **measure(load, names, parsed.rounds, deadline, rate)})
        result["seconds"] = round(time.perf_counter() - start, 1)
        if parsed.out is not None:
            _write(result, parsed.out, parsed.profile)
    Console(width=None if sys.stdout.isatty() else 190, highlight=False).print(table(result))
    sections = result["sections"]
    return 1 if any(s["error"] or any(row["error"] for row in s["rows"]) for s in sections) else 0


def _write(result: Mapping[str, Any], out: Path, with_kernels: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    slug = result["device"]["slug"]
    (out / f"training-{slug}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if with_kernels:
        lines = [line for section in result["sections"] for line in kernels(section)]
        (out / f"training-{slug}-kernels.txt").write_text("\n".join(lines).strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
