"""Two GPUs: DDP, FSDP2 and tensor parallelism of a Llama, eager and with ``memory_efficient_fusion``; answers, time, memory.

    python -m benchmarks.distributed --out DIR    two GPUs over NCCL, within 150 s
    python -m benchmarks.distributed --dry        two processes on the CPU over gloo, a tiny model, no figure

A step is forward, backward and fused AdamW on bfloat16 parameters. Both processes compute the same batch under tensor
parallelism and half of it each under the others. Before anything is timed, loss and gradients, gathered from both, obey the law
of ``workload.check``: our error against float32 on one GPU is at most twice that of eager under the same parallelism, plus one
unit in the last place. Then eager and ours are timed in turn, in the same two processes.

Each way of parallelism has processes of its own, so that one that fails or hangs leaves the others; all are started at once and
work one after the other. NVLink multicast is left off (``NCCL_NVLS_ENABLE=0``), because not every machine allows it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.training import CACHES, environment_of, sampled
from oslo_fusion import engine, models, workload
from oslo_fusion.aot import room
from oslo_fusion.aot.record import Record
from oslo_fusion.errors import ConfigError, OsloFusionError
from oslo_fusion.workload import Answers, Stopwatch

CONFIG = {"kernel_fusion": {"enable": True, "autotune": "off", "memory_efficient_fusion": True}}
EAGER, OURS = "eager", "oslo_fusion memory-efficient"
WORLD = 2
ROUNDS, CALLS, SETTLE, WARM_UP = 3, 5, 1, 3
PARTS = 8  # of the batch, for the float32 answers


@dataclass(frozen=True)
class Job:
    """What every process trains: a Llama with these sizes on ``batch`` samples of ``seq`` tokens, all processes together."""

    sizes: Mapping[str, Any]
    batch: int
    seq: int
    device: str
    dtype: torch.dtype = torch.bfloat16

    def build(self, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """The same model at every call, on every device of one kind."""
        transformers = importlib.import_module("transformers")
        with models.seeded(0, device), device:
            config = transformers.LlamaConfig(**self.sizes, use_cache=False)
            model = transformers.LlamaForCausalLM._from_config(config, dtype=self.dtype)
        return model.to(device=device, dtype=dtype or self.dtype).train()

    def ids(self, device: torch.device) -> Tensor:
        """The tokens, which are their own labels: ``[batch, seq]``."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(5, self.sizes["vocab_size"], (self.batch, self.seq), generator=generator).to(device)


# Of the 1.24B Llama every second layer, and words that are not tied: 0.62 billion parameters.
FULL = Job(
    {**models.MODELS["llama"].full, "num_hidden_layers": 8, "vocab_size": 32000, "tie_word_embeddings": False}, 8, 2048, "cuda"
)
DRY = Job(models.MODELS["llama"].tiny, 4, 16, "cpu")


# --- ways to use two devices ------------------------------------------------------------------------------------------------


def ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on each device, gradients averaged."""
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def fsdp2(model: Any, device: torch.device) -> nn.Module:
    """Parameters, gradients and optimizer in parts, gathered layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, device: torch.device) -> Any:
    """transformers' own by its ``tp_plan``, which puts a forward with DTensors on each projection."""
    from torch.distributed.device_mesh import init_device_mesh

    parallel = importlib.import_module("transformers.distributed.tensor_parallel")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallel.apply_tensor_parallelism(model, mesh)


WAYS: dict[str, Callable[[Any, torch.device], nn.Module]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "tensor parallelism": tensor_parallel,
}


def gathered(gradient: Any) -> Tensor:
    """The whole of a gradient of which each process may hold a part; every process must ask."""
    whole: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole


def optimizer_for(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW with a learning rate of 0. Plain and distributed parameters cannot be in one group."""
    whole = [p for p in parameters if not hasattr(p, "full_tensor")]
    parts = [p for p in parameters if hasattr(p, "full_tensor")]
    return torch.optim.AdamW([{"params": group} for group in (whole, parts) if group], lr=0.0, fused=True)


# --- in each process ----------------------------------------------------------------------------------------------------------


class Runner:
    """One provider under one way of parallelism, as one of the processes sees it."""

    def __init__(self, provider: str, way: str, job: Job, device: torch.device) -> None:
        self.provider, self.device = provider, device
        before = _allocated(device)
        model = job.build(device)
        start = time.perf_counter()
        if provider == OURS:
            engine.initialize(model, CONFIG)
        initialize_s = time.perf_counter() - start
        self.model = WAYS[way](model, device)
        ids = job.ids(device)
        share = len(ids) // dist.get_world_size()
        self.ids = ids if way == "tensor parallelism" else ids[dist.get_rank() * share :][:share].clone()
        self.optimizer = optimizer_for(list(self.model.parameters()))
        self.watch = Stopwatch(self.step, device)
        start = time.perf_counter()
        self.watch.warm_up(1)
        first_step_s = time.perf_counter() - start
        self.watch.warm_up(WARM_UP - 1)
        self.resident = _allocated(device) - before
        self.row = {"provider": provider, "error": None, "prepare_s": initialize_s, "first_step_s": first_step_s}

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss

    def step(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def answers(self) -> Answers:
        """Loss and gradients of the whole batch."""
        loss = self.loss()
        loss.backward()
        mean = gathered(loss.detach()).float()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        gradients = {
            name.removeprefix("module."): sampled(gathered(p.grad))
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        self.optimizer.zero_grad(set_to_none=True)
        return Answers(mean.to(next(iter(gradients.values())).dtype), mean, gradients)

    def time(self) -> None:
        """A round."""
        dist.barrier()
        self.watch.warm_up(SETTLE)
        self.watch.time(CALLS)

    def finish(self) -> dict[str, Any]:
        """The row."""
        measured = dataclasses.asdict(self.watch.measurement(self.resident))
        for name in ("first_call_s", "warmup_s", "second_shape_s"):
            del measured[name]
        if self.provider == OURS:
            report = engine.report(self.model)
            record = next((p.runtime for p in report.plan.proposals if isinstance(p.runtime, Record)), None)
            self.row["compiled"] = None if record is None else record.to_dict()
        return {**self.row, **measured}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def truth(job: Job, device: torch.device) -> Answers:
    """Loss and gradients in float32 on one device."""
    model, ids = job.build(device, torch.float32), job.ids(device)
    parts = ids.chunk(PARTS)
    total = torch.zeros((), device=device)
    for part in parts:
        loss = model(input_ids=part, labels=part).loss / len(parts)
        loss.backward()
        total += loss.detach()
    return Answers(total, total, {name: sampled(p.grad) for name, p in model.named_parameters() if p.grad is not None})


def compare(way: str, job: Job, device: torch.device) -> dict[str, Any]:
    """One way of parallelism: check, then time eager and ours in turn. Every process does the same; the first one's counts."""
    start = time.perf_counter()
    section: dict[str, Any] = {"way": way, "error": None, "rows": [], "rounds": ROUNDS, "calls": CALLS}
    reference = truth(job, device)
    workload.free_memory(device)
    runners = [Runner(provider, way, job, device) for provider in (EAGER, OURS)]
    before, after = (runner.answers() for runner in runners)
    verdict = torch.ones((), device=device)
    try:
        section["check"] = {"green": True, "found": workload.check(before, after, reference)}
    except AssertionError as red:
        section["check"], section["error"] = {"green": False, "found": str(red)}, f"the check is red: {red}"
        verdict.zero_()
    del before, after, reference
    workload.free_memory(device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN)  # all go on, or none
    if bool(verdict):
        for _ in range(ROUNDS):
            for runner in runners:
                runner.time()
        section["rows"] = [runner.finish() for runner in runners]
        for row in section["rows"]:
            row["speedup"] = section["rows"][0]["median_s"] / row["median_s"]
    section["seconds"] = round(time.perf_counter() - start, 1)
    return section


def work(rank: int, way: str, job: Job, meeting: str, turn: Any, results: Any) -> None:
    """A process: get ready, wait for its turn, and report."""
    importlib.import_module("transformers")
    importlib.import_module("transformers.models.llama.modeling_llama")
    torch.set_num_threads(1)
    device = torch.device(job.device, rank) if job.device == "cuda" else torch.device(job.device)
    turn.wait()
    if device.type == "cuda":
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        torch.cuda.set_device(device)
    else:
        room.COMPILER = "eager"  # the graphs as they are: a compiler would take minutes to say nothing
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=WORLD)
        section = compare(way, job, device)
        if rank == 0:
            results.put(section)
        dist.barrier()
    except Exception as error:
        said = f"process {rank}: {type(error).__name__}: {str(error).strip() or 'no message'}"[:800]
        results.put({"way": way, "error": said, "rows": []})
        results.close()
        results.join_thread()
        os._exit(1)  # the other may wait for this one in a collective, and so would an orderly end
    dist.destroy_process_group()


# --- in the parent ----------------------------------------------------------------------------------------------------------


class Pair:
    """The processes of one way of parallelism."""

    def __init__(self, way: str, job: Job, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.way = way
        self._turn, self._results = context.Event(), context.Queue()
        name = workload.slug(way)
        meeting = f"file://{folder / f'meeting-{name}'}"  # a free port found here may be taken by the time it is used
        self._processes = [
            context.Process(target=work, args=(rank, way, job, meeting, self._turn, self._results), daemon=False)
            for rank in range(WORLD)
        ]
        with environment_of({variable: str(folder / name / variable.lower()) for variable in CACHES}):
            for process in self._processes:
                process.start()

    def result(self, patience: float) -> dict[str, Any]:
        """Let it work, and wait for its section as long as this."""
        self._turn.set()
        end = time.perf_counter() + patience
        while True:
            with contextlib.suppress(queue.Empty):
                found: dict[str, Any] = self._results.get(timeout=1.0)
                return found
            codes = [process.exitcode for process in self._processes]
            if any(code for code in codes):
                return {"way": self.way, "error": f"a process ended with {codes}", "rows": []}
            if time.perf_counter() > end:
                return {"way": self.way, "error": f"no result within {patience:.0f} s", "rows": []}

    def close(self) -> None:
        """End the processes, also those that never had their turn."""
        for process in self._processes:
            process.join(5.0 if self._turn.is_set() else 0.0)
            if process.is_alive():
                process.kill()
                process.join()


def table(result: Mapping[str, Any]) -> Table:
    """What people read."""
    made = Table(title=f"Two processes, {result['backend']}, on {result['device']['name']}", title_justify="left")
    made.add_column("parallelism")
    made.add_column("provider")
    for heading in ("median ms", "P90 ms", "× eager", "peak GiB", "initialize s", "first step s"):
        made.add_column(heading, justify="right")
    made.add_column("compiled")
    for section in result["sections"]:
        if section["error"]:
            made.add_row(section["way"], "–", *["–"] * 6, section["error"])
        for row in section["rows"]:
            said = "" if "compiled" not in row else str(row["compiled"])
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
            cells = [f"{row[key] * 1e3:.1f}" for key in ("median_s", "p90_s")] + [f"{row['speedup']:.3f}", peak]
            cells += [f"{row[key]:.1f}" for key in ("prepare_s", "first_step_s")]
            made.add_row(section["way"], row["provider"], *cells, said)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's docstring.

    Returns:
        0; 1 if a check was red or a process failed; 2 if an argument is unusable.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it only the table is printed")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"comma-separated (default: {','.join(WAYS)})")
    parser.add_argument("--seconds", type=float, default=140.0, help="for everything (default: 140)")
    parser.add_argument("--dry", action="store_true", help="two processes on the CPU over gloo, a tiny model")
    parser.add_argument("--commit", default=None, help="the code's commit, for a copy without its history")
    parsed = parser.parse_args(arguments)
    try:
        return _run(parsed)
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    start = time.perf_counter()
    ways = list(dict.fromkeys(word.strip() for word in parsed.ways.split(",") if word.strip()))
    for way in ways or [parsed.ways]:
        if way not in WAYS:
            raise models.wrong_value("--ways", way, list(WAYS))
    job = DRY if parsed.dry else FULL
    if not parsed.dry and torch.cuda.device_count() < WORLD:
        raise ConfigError(f"device: torch sees {torch.cuda.device_count()} GPUs here, {WORLD} are needed. Remedy: --dry.")
    result: dict[str, Any] = {
        "benchmark": "distributed",
        **workload.facts(torch.device(job.device), parsed.commit),
        "world": WORLD,
        "backend": "gloo" if parsed.dry else "nccl",
        "config": CONFIG,
        "model": {"sizes": dict(job.sizes), "batch": job.batch, "seq": job.seq, "dtype": models.dtype_name(job.dtype)},
        "seconds": 0.0,
        "sections": [],
    }
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory(prefix="oslo-fusion-distributed-", ignore_cleanup_errors=True) as folder:
        try:
            pairs += [Pair(way, job, Path(folder)) for way in ways]
            for pair in pairs:
                result["sections"].append(pair.result(start + parsed.seconds - time.perf_counter()))
                pair.close()
                result["seconds"] = round(time.perf_counter() - start, 1)
                if parsed.out is not None:
                    parsed.out.mkdir(parents=True, exist_ok=True)
                    path = parsed.out / f"distributed-{result['device']['slug']}.json"
                    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        finally:
            for pair in pairs:
                pair.close()
    Console(width=None if sys.stdout.isatty() else 190, highlight=False).print(table(result))
    return 1 if any(section["error"] for section in result["sections"]) else 0


if __name__ == "__main__":
    sys.exit(main())
