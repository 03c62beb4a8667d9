"""What a new process waits for until its second training step: with empty caches and with filled ones, phase by phase.

    python -m benchmarks.start --out DIR     start-<device>.json: Llama 1.24B, layers compiled and the fused loss (3 minutes)
    python -m benchmarks.start --kernels     kernels alone, without Inductor
    python -m benchmarks.start --dry         a tiny model on the CPU: every code path, no figure

Each row is a process of its own. It plans with its kernels compiled beforehand, side by side (:mod:`oslo_fusion.rehearsal`), or
one after another as the plan comes to them; and it finds the caches of Triton, Inductor and our timings empty or as the process
before left them. A process that is not counted goes first, so that all read the libraries' files from memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.training import BEST, CACHES, COMPILED, LOSS, MODELS, build
from oslo_fusion import aot, engine, models, rehearsal, workload
from oslo_fusion.errors import OsloFusionError
from oslo_fusion.passes import PASSES
from oslo_fusion.plan import Pass, Proposal
from oslo_fusion.workload import Workload, synchronize

HOWS = ("one after another", "side by side")
PHASES = ("imports", "model", "rehearsal", "Inductor", "waiting", "plan", "initialize", "first step", "second step")
"""``initialize`` is all of it: the four before it, and surgery."""
BESIDE = "oslo_fusion compiles"  # how threads of a rehearsal are called


def run_process(how: str, name: str, kernels: bool, dry: bool, began: float) -> dict[str, Any]:
    """One process: seconds of each phase, and how many kernels were compiled in which.

    Args:
        how: out of :data:`HOWS`.
        name: out of :data:`benchmarks.training.MODELS`.
        kernels: without Inductor.
        dry: a tiny model on the CPU.
        began: when the process was asked for, as ``time.time`` says.
    """
    seconds, compiled = dict.fromkeys(PHASES, 0.0), Counter[str]()
    phase = ["imports"]
    seconds["imports"] = time.time() - began
    if not dry:
        _listen(compiled, phase)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            before, phase[0] = phase[0], name
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds[name] += time.perf_counter() - start
                phase[0] = before

        return call

    if how == HOWS[0]:
        engine.REHEARSED = ()
    engine._rehearse = timed("rehearsal", engine._rehearse)
    engine.start_compiler = timed("Inductor", aot.start_compiler)
    rehearsal.Rehearsal.finish = timed("waiting", rehearsal.Rehearsal.finish)  # type: ignore[method-assign]
    engine._plan = timed("plan", engine._plan)
    rooms: dict[str, float] = {}
    engine.PASSES = tuple(_Timed(room, rooms) for room in PASSES)
    model_name, batch, seq, ragged = MODELS[name]
    device = models.parse_device("cpu" if dry else "cuda")
    load = Workload(model_name, batch, seq, "training", "bfloat16", device, ragged=ragged)
    if dry:
        load = Workload(model_name, 2, 8, "training", "bfloat16", device, ragged=ragged, size="tiny")
    model: Any = timed("model", build)(load)
    inputs = load.inputs(model)
    synchronize(device)
    timed("initialize", engine.initialize)(model, LOSS if kernels else COMPILED[BEST])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return float(loss.detach())

    losses = [timed(name, step)() for name in ("first step", "second step")]
    rounded = [{name: round(value, 3) for name, value in given.items()} for given in (seconds, rooms)]
    return {"seconds": rounded[0], "rooms": rounded[1], "compiled": dict(compiled), "losses": losses}


class _Timed:
    """A pass, and how long a plan waits for it."""

    def __init__(self, room: Pass, seconds: dict[str, float]) -> None:
        self.room, self.seconds = room, seconds
        self.name, self.kernels = room.name, room.kernels

    def propose(self, *arguments: Any) -> Iterable[Proposal]:
        start = time.perf_counter()
        proposals = list(self.room.propose(*arguments))
        self.seconds[type(self.room).__name__] = time.perf_counter() - start
        return proposals


def _listen(compiled: Counter[str], phase: Sequence[str]) -> None:
    """Count what Triton compiles in this process; what Inductor's own processes compile is not seen."""
    import triton

    def listen(*, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled["beside" if threading.current_thread().name.startswith(BESIDE) else phase[0]] += 1

    triton.knobs.compilation.listener = listen


# --- in the parent ----------------------------------------------------------------------------------------------------------


def measure(name: str, kernels: bool, dry: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each process, in the order in which they ran; the first is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        _start(HOWS[0], name, kernels, dry, Path(folder) / "uncounted")
        for number in range(rounds):
            for how in HOWS if number % 2 == 0 else HOWS[::-1]:
                for caches in ("empty", "filled"):
                    found = _start(how, name, kernels, dry, Path(folder) / f"{how}-{number}".replace(" ", "-"))
                    yield {"how": how, "caches": caches, "round": number, **found}


def _start(how: str, name: str, kernels: bool, dry: bool, caches: Path) -> dict[str, Any]:
    asked = [how, name, *(["--kernels"] if kernels else []), *(["--dry"] if dry else []), "--began", str(time.time())]
    variables = {variable: str(caches / variable.lower()) for variable in CACHES}
    command = [sys.executable, "-m", "benchmarks.start", "--process", *asked]
    done = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Seconds of every phase, and where kernels were compiled."""
    made = Table(title="Seconds until the second step", title_justify="left")
    for heading in ("caches", "kernels", *PHASES, "compiled"):
        made.add_column(heading, justify="left" if heading in ("caches", "kernels", "compiled") else "right")
    for row in rows:
        counts = ", ".join(f"{phase} {count}" for phase, count in row["compiled"].items()) or "-"
        made.add_row(row["caches"], row["how"], *(f"{row['seconds'][phase]:.1f}" for phase in PHASES), counts)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it only the table is printed")
    parser.add_argument("--model", default="llama-1b", help=f"out of: {', '.join(MODELS)} (default: llama-1b)")
    parser.add_argument("--kernels", action="store_true", help="kernels and loss, without Inductor")
    parser.add_argument("--rounds", type=int, default=1, help="of four processes each (default: 1)")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--commit", default=None, help="the code's commit, for a copy without its history")
    parser.add_argument("--process", nargs=2, metavar=("HOW", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    try:
        if parsed.process:
            how, name = parsed.process
            print(json.dumps(run_process(how, name, parsed.kernels, parsed.dry, parsed.began)))
            return 0
        if parsed.model not in MODELS:
            raise models.wrong_value("--model", parsed.model, list(MODELS))
        facts = workload.facts(models.parse_device("cpu" if parsed.dry else "cuda"), parsed.commit)
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for row in measure(parsed.model, parsed.kernels, parsed.dry, parsed.rounds):
        rows.append(row)
        where = f"plan {row['rooms']}, compiled {row['compiled']}"
        print(f"{row['caches']}, {row['how']}: {row['seconds']}, {where}", file=sys.stderr, flush=True)
        if parsed.out is not None:
            parsed.out.mkdir(parents=True, exist_ok=True)
            result = {"benchmark": "start", **facts, "model": parsed.model, "kernels": parsed.kernels, "rows": rows}
            path = parsed.out / f"start-{facts['device']['slug']}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 210, highlight=False).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
