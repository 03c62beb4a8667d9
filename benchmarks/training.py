"""Whole training steps: eager, torch.compile, Liger, gradient checkpointing, and ours, in one run.

    python -m benchmarks.training --models llama-1b --out DIR      one model with every provider
    python -m benchmarks.training --merge A.json B.json --out DIR  the sections of several runs in one file; measures nothing
    python -m benchmarks.training --dry                            tiny models on the CPU: every code path, no figure

A step is forward, backward and fused AdamW, on bfloat16 parameters and random tokens, without the cache of keys and values that
training has no use for (as transformers' Trainer). The file is written again whenever a provider has finished something, so a
run that is cut short leaves what it has.

Every provider lives in a process of its own, because Liger replaces transformers' rotary embedding for the whole process,
whether or not it is given one model. All processes start at once, hold their model at the same time and are asked in turn,
round after round, because the host's speed drifts by more than the providers differ. A process that waits holds no memory of
the device but its context, so that ten fit beside one another on 80 GiB: it gives its free memory back, its weights, of which
it keeps a copy on the host (not on a larger device), and its optimizer's state, which is zeros again when it goes on: the
learning rate is 0 by then.

First steps of ``oslo_fusion memory-efficient`` and of whole models under ``torch.compile`` are cold: their caches of compiled
code and of timings are empty. The others have what these left. All make theirs while nothing else runs.

Nothing is timed before it is checked. Loss and every parameter's gradient obey the law of ``workload.check`` on the timed
batch: our error against float32 is at most twice that of plain bfloat16, plus one unit in the last place. The truth is computed
once, an eighth of the batch at a time, and of each gradient about 2¹⁸ numbers, evenly spaced, are compared. A model without
dropout is checked as it is timed; of one with dropout a second one without it, unless that means to compile a whole model
again (ours too: what is compiled there is checked layer by layer). Ours is not timed on red; of a peer it is said. The first
loss of the full step may differ from eager's by at most 2⁻⁷ of it, one unit in the last place of a bfloat16 (T5's loss is one);
beyond that no provider is timed.
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
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from oslo_fusion import engine, models, surgery, timings, workload
from oslo_fusion.aot.record import Record
from oslo_fusion.errors import ConfigError, OsloFusionError
from oslo_fusion.jit import TorchScriptPass
from oslo_fusion.report import FusionReport
from oslo_fusion.workload import Answers, Stopwatch, Workload, synchronize

CONFIG = {"kernel_fusion": {"enable": True, "custom_cuda_kernels": "all"}}
LOSS = {"kernel_fusion": {"enable": True, "custom_cuda_kernels": ["all", "FusedLinearCrossEntropy"]}}


def compiled(budget: float, scope: str = "layer", cuda_graphs: bool = False, **more: Any) -> dict[str, Any]:
    """Layers, or all below the head, compiled under a memory budget, and the fused loss."""
    block = {"scope": scope, "activation_memory_budget": budget, "cuda_graphs": cuda_graphs}
    kernels = ["all", "FusedLinearCrossEntropy"]
    return {"kernel_fusion": {"enable": True, "memory_efficient_fusion": block, "custom_cuda_kernels": kernels, **more}}


MODELS: dict[str, tuple[str, int, int, bool]] = {
    "llama-1b": ("llama", 8, 2048, False),
    "gpt2": ("gpt2", 16, 1024, False),
    "t5-base": ("t5", 32, 512, False),
    "bert-base": ("bert", 64, 512, False),
    "bert-base ragged": ("bert", 64, 512, True),
}
"""Name in :data:`oslo_fusion.models.MODELS`, batch, tokens per sample (of T5 on both sides), and whether texts are of different
lengths, uniformly from an eighth of that on."""

EAGER, OURS, OURS_LOSS, BEST = "eager", "oslo_fusion kernels", "oslo_fusion kernels and loss", "oslo_fusion memory-efficient"
CHECKPOINTING = " checkpointing"
DIAL = (0.0, 0.1, 0.25, 0.5, 0.75)
OURS_WHOLE, CAPTURED = f"{BEST} whole", f"{BEST} captured"
PADDING_FREE = " padding-free"
COMPILED: dict[str, dict[str, Any]] = {
    BEST: compiled(1.0),
    **{f"{BEST} at {budget:g}": compiled(budget) for budget in DIAL},
    BEST + CHECKPOINTING: compiled(1.0),
    BEST + PADDING_FREE: compiled(1.0, padding_free=True),
    OURS_WHOLE: compiled(1.0, "model"),
    CAPTURED: compiled(1.0, "model", cuda_graphs=True),
    CAPTURED + PADDING_FREE: compiled(1.0, "model", cuda_graphs=True, padding_free=True),
}
WHOLE = ("compile", "liger compile")
PEERS = (EAGER, EAGER + CHECKPOINTING, "liger kernels", "liger", "liger" + CHECKPOINTING, *WHOLE)
PROVIDERS = (*PEERS, OURS, OURS_LOSS, "oslo_fusion", *COMPILED)
"""``oslo_fusion kernels``: what ``custom_cuda_kernels: all`` gives, without the TorchScript room; ``and loss``: with
``FusedLinearCrossEntropy`` too. ``oslo_fusion``: every room. ``memory-efficient``: layers compiled, and the fused loss; ``at``:
with this ``activation_memory_budget``, else 1; ``whole``: with ``scope: model``, all below the head in one graph;
``captured``: that, and its launches as CUDA graphs; ``padding-free``: with ``padding_free: true``. ``compile``:
``model.compile()``. ``liger kernels``: norms, gated product and rotary embedding, like with like. ``liger``: its fused linear
cross entropy too. ``checkpointing``: with transformers' ``gradient_checkpointing_enable()``."""

DEFAULT = (*(name for name in PEERS if name != "liger kernels"), OURS, OURS_LOSS, BEST, f"{BEST} at 0")
ROUNDS = 3
CALLS = 5
SETTLE = 2  # calls before each round's timed ones: they fetch from the driver the memory that was given back
RECORDED = 3
LEARNING_RATE = 1e-4  # of the recorded steps, so that a wrong gradient shows in the next loss; then 0, and the weights stay
LAW = torch.finfo(torch.bfloat16).eps
IGNORED = -100  # a label that counts nowhere
ROOMY = 120 << 30  # bytes of a device on which ten models fit beside the largest step
PARTS = 8  # of the batch, for the float32 answers
SAMPLE = 1 << 18  # numbers that are compared of one gradient
PROFILED = {"device_ms": 1, "host_ms": 1, "launches": 0}  # columns from the profile, and their digits
PATIENCE = 240.0  # seconds for one request
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", timings.CACHE_VARIABLE)


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


def apply_provider(name: str, model: Any) -> None:
    """Make ``model`` the provider's."""
    if name in (OURS, OURS_LOSS):
        initialize_kernels(model, CONFIG if name == OURS else LOSS)
    elif name == "oslo_fusion":
        engine.initialize(model, CONFIG)
    elif name in COMPILED:
        engine.initialize(model, COMPILED[name])
    elif name.startswith("liger"):
        # On this instance, and on transformers' globals where Liger knows no other way.
        liger_recipe(model)(model=model, fused_linear_cross_entropy=name != "liger kernels")
    if name.endswith(CHECKPOINTING):
        model.gradient_checkpointing_enable()
    if name in WHOLE:
        model.compile()


def build(load: Workload) -> nn.Module:
    """The workload's model, without the cache of keys and values."""
    model = load.build()
    for module in model.modules():  # T5's decoder has a configuration of its own
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model


def has_dropout(model: nn.Module) -> bool:
    """Whether anything in ``model`` is random in training. See :func:`oslo_fusion.workload.switch_off_dropout`."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in module.__dict__.items()
        if "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
    )


def sampled(gradient: Tensor) -> Tensor:
    """About :data:`SAMPLE` numbers of a gradient at the most, evenly spaced, out of every column."""
    step = -(-gradient.numel() // SAMPLE)
    while math.gcd(step, gradient.shape[-1]) > 1:
        step += 1
    return gradient.detach().reshape(-1)[::step].clone()


def answers(model: nn.Module, load: Workload, parts: int = 1) -> Answers:
    """Loss and gradients without dropout. The loss stands for the output too: with a fused loss there are no logits.

    Args:
        model: is left without gradients, and without dropout.
        load: its inputs.
        parts: equal ones of the batch, one after the other, for less memory.
    """
    workload.switch_off_dropout(model)
    inputs = load.inputs(model)
    losses = []
    share = (inputs["labels"] != IGNORED).sum()
    for begin in range(0, load.batch, load.batch // parts):
        # Not a slice where it is all: nothing may give a compiler a reason to compile again.
        part = {name: tensor[begin : begin + load.batch // parts] for name, tensor in inputs.items()} if parts > 1 else inputs
        # Samples may have different numbers of labels, over all of which the loss is a mean.
        loss = model(**part).loss * ((part["labels"] != IGNORED).sum() / share if parts > 1 else 1.0)
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: sampled(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss = torch.stack(losses).sum()
    return Answers(loss.to(load.torch_dtype), loss, gradients)


class Weights:
    """A model's parameters and buffers, kept on the host while their process waits. They are the same from round to round."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == "cuda"}
        self._kept = [
            (storage, storage.nbytes(), self._bytes(storage).to("cpu", copy=True).pin_memory()) for storage in found.values()
        ]

    @staticmethod
    def _bytes(storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def give_back(self) -> None:
        """Free the device's memory. The tensors stay, without anything in them."""
        for storage, _, _ in self._kept:
            storage.resize_(0)

    def fetch(self) -> None:
        """Put everything back."""
        for storage, size, kept in self._kept:
            storage.resize_(size)
            self._bytes(storage).copy_(kept)


class Runner:
    """One provider at work on one model."""

    def __init__(self, provider: str, load: Workload) -> None:
        self.provider, self.load, self.device = provider, load, load.torch_device
        importlib.import_module("transformers")
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def build(self) -> None:
        """Build the model; all processes do it at once, so that imports and contexts cost their time once."""
        self.model = build(self.load)
        self.weights = Weights(self.model)
        self.rest()

    def refer(self, path: str) -> None:
        """Write the answers of the untouched model, and those in float32, for everybody's check."""
        plain = build(self.load)
        before = answers(plain, self.load)
        wide = dataclasses.replace(self.load, dtype="float32")
        reference = answers(plain.float(), wide, math.gcd(PARTS, self.load.batch))
        torch.save([dataclasses.asdict(said) for said in (before, reference)], path)
        del plain, before, reference
        workload.free_memory(self.device)

    def prepare(self) -> dict[str, Any]:
        """Apply, make the first steps; then the weights are as they were."""
        if self.model is None:
            self.build()
        self.weights.fetch()
        model: Any = self.model
        inputs, self.parameters = self.load.inputs(model), list(model.parameters())
        untouched = [p.detach().clone() for p in self.parameters]
        synchronize(self.device)
        start = time.perf_counter()
        apply_provider(self.provider, model)
        synchronize(self.device)
        prepare_s = time.perf_counter() - start
        self.optimizer = optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
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
        start = time.perf_counter()
        self.watch.warm_up(1)
        first_step_s = time.perf_counter() - start
        self.watch.warm_up(RECORDED - 1)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        with torch.no_grad():
            for parameter, value in zip(self.parameters, untouched, strict=True):
                parameter.copy_(value)
        del untouched
        self.resident = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.rest()
        attached = surgery.attached(model)
        return {
            "losses": losses,
            "prepare_s": prepare_s,
            "first_step_s": first_step_s,
            "parameters": sum(p.numel() for p in self.parameters),
            "tokens": int(inputs["attention_mask"].sum()) if self.load.ragged else self.load.batch * self.load.seq,
            "dropout": has_dropout(model),
            "fusion": outcome(attached) if isinstance(attached, FusionReport) else None,
        }

    def rest(self) -> None:
        """Give back what others may need meanwhile."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.weights.give_back()
        workload.free_memory(self.device)

    def check(self, path: str) -> dict[str, Any] | None:
        """Loss and gradients of this provider's model against those that :meth:`refer` wrote; None if it would have to be
        compiled as a whole once more.

        Raises:
            AssertionError: the law is broken.
        """
        model = self.model
        if has_dropout(model):
            if self.provider in (*WHOLE, OURS_WHOLE) or self.provider.startswith(CAPTURED):
                return None
            model = build(self.load)
            apply_provider(self.provider, model)
        else:
            self.weights.fetch()
        before, reference = (Answers(**said) for said in torch.load(path, map_location=self.device))
        try:
            return workload.check(before, answers(model, self.load), reference)
        finally:
            del model, before, reference
            self.rest()

    def time(self, calls: int) -> dict[str, Any]:
        """A round, and what all rounds so far measured."""
        self.weights.fetch()
        self.watch.warm_up(SETTLE)
        self.watch.time(calls)
        self.rest()
        measured = dataclasses.asdict(self.watch.measurement(self.resident))
        for name in ("first_call_s", "warmup_s", "second_shape_s"):
            del measured[name]
        return measured

    def profile(self) -> dict[str, Any] | None:
        """Where the time goes; None where there is no GPU."""
        if self.device.type != "cuda":
            return None
        self.weights.fetch()
        self.watch.warm_up(SETTLE)
        found = workload.profile(self.step, self.device, calls=1, top=20)
        self.rest()
        return found


def outcome(report: FusionReport) -> dict[str, Any]:
    """How many sites of each kind were fused, why others were not, and what was compiled."""
    fused = Counter(row.site.kind for row in report.rows if row.outcome == "fused")
    refused = Counter((row.site.kind, row.reason) for row in report.rows if row.outcome == "refused")
    record = next((found for p in report.plan.proposals if isinstance(found := p.runtime, Record)), None)
    return {
        "fused": dict(fused),
        "compiled": None if record is None else record.to_dict(),
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

    def __init__(self, name: str, load: Workload, caches: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.load = name, load
        self.row: dict[str, Any] = {"provider": name, "error": None, "absent": None, "seconds": {}}
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, load, torch.get_num_threads()), daemon=True)
        with environment_of({variable: str(caches / variable.lower()) for variable in CACHES}):
            self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether it is still in the race."""
        return self.row["error"] is None and self.row["absent"] is None

    def ask(self, name: str, *arguments: Any) -> tuple[str, Any]:
        """Have a method of its :class:`Runner` called. ``("done", result)``, ``("red", message)``, or ``("out", None)`` for a
        provider that has failed or has nothing for this model; its row says which, and it is not asked again."""
        self.begin(name, *arguments)
        return self.end()

    def begin(self, name: str, *arguments: Any) -> None:
        """Ask, and do not wait."""
        self._asked, self._since = name, time.perf_counter()
        if self.alive:
            with contextlib.suppress(OSError):  # a dead process shows when its answer is read
                self._connection.send((name, arguments))

    def end(self) -> tuple[str, Any]:
        """The answer to what was asked last."""
        if not self.alive:
            return "out", None
        try:
            if not self._connection.poll(max(0.0, self._since + PATIENCE - time.perf_counter())):
                raise OSError(f"no answer to {self._asked} within {PATIENCE:.0f} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1.0)
            kind = "error"
            answer = f"{self._asked}: {str(error) or 'its process ended'} (exit code {self._process.exitcode})"
        spent = self.row["seconds"]
        spent[self._asked] = round(spent.get(self._asked, 0.0) + time.perf_counter() - self._since, 1)
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


@contextlib.contextmanager
def environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """These environment variables for what is started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def measure(
    load: Workload,
    names: Sequence[str],
    rounds: int,
    seconds: float,
    rate: float,
    with_profile: bool = False,
    on_progress: Callable[[dict[str, Any]], None] = lambda section: None,
) -> dict[str, Any]:
    """One model with every provider.

    Args:
        load: the model and its batch.
        names: out of :data:`PROVIDERS`.
        rounds: of :data:`CALLS` timed steps each.
        seconds: no round but the first begins later than this.
        rate: FLOP/s of the roof.
        with_profile: say also where the time goes.
        on_progress: is given the section as it is whenever a provider has finished something.
    """
    start = time.perf_counter()
    section: dict[str, Any] = {"workload": load.to_dict(), "parameters": 0, "flops": 0, "rounds": 0, "calls": CALLS, "law": LAW}
    section.update(error=None, seconds=0.0, roof={"matmul_flops_per_s": rate})
    folder = tempfile.TemporaryDirectory(prefix="oslo-fusion-training-", ignore_cleanup_errors=True)
    place = Path(folder.name)
    providers = [Provider(name, load, place / (name if name in WHOLE else "shared")) for name in names]
    section["rows"] = [provider.row for provider in providers]

    def progress() -> None:
        _compare(section)
        section["seconds"] = round(time.perf_counter() - start, 1)
        on_progress(section)

    try:
        _prepare(providers, str(place / "answers.pt"), section, progress)
        section["error"] = section["error"] or judge(section["rows"])
        progress()
        while section["error"] is None and section["rounds"] < rounds:
            if section["rounds"] and time.perf_counter() > start + seconds:
                break
            for provider in providers:
                provider.row.update(provider.ask("time", CALLS)[1] or {})
                progress()
            section["rounds"] += 1
        for provider in providers if with_profile and section["error"] is None else ():
            provider.row["profile"] = provider.ask("profile")[1]
        progress()
    finally:
        for provider in providers:
            provider.close()
        folder.cleanup()
    return section


def _prepare(providers: Sequence[Provider], path: str, section: dict[str, Any], progress: Callable[[], None]) -> None:
    """Everything before the first round; ``section`` is told the number of parameters, and what is wrong."""

    def check(provider: Provider) -> None:
        kind, said = provider.ask("check", path)
        if kind == "out":
            return
        provider.row["check"] = {"green": None if said is None else kind == "done", "found": said}
        if kind == "red" and provider.name.startswith("oslo_fusion"):
            section["error"] = f"the check is red: {provider.name}: {said}"

    def take(provider: Provider) -> None:
        found = provider.ask("prepare")[1]
        if found is None:
            return
        section["parameters"] = found.pop("parameters")
        section["flops"] = 6 * section["parameters"] * found.pop("tokens")
        provider.row.update(found)
        progress()
        if provider.name != EAGER:  # the law's yardstick
            check(provider)

    for provider in providers:
        provider.begin("build")
    for provider in providers:
        provider.end()
    if not any(provider.ask("refer", path)[0] == "done" for provider in providers):
        return  # all have failed, and their rows say how
    # Ours first: the caches that it fills are the other processes'.
    for provider in sorted(providers, key=lambda p: (p.name != BEST, not p.name.startswith("oslo_fusion"))):
        provider.row["cold"] = provider.name in (BEST, *WHOLE)
        take(provider)


def _compare(section: Mapping[str, Any]) -> None:
    """Each timed row against eager's and against the roof."""
    timed = [row for row in section["rows"] if "median_s" in row]
    base = next((row["median_s"] for row in timed if row["provider"] == EAGER), None)
    for row in timed:
        row["percent_of_roof"] = 100 * section["flops"] / (row["median_s"] * section["roof"]["matmul_flops_per_s"])
        if base is not None:
            row["speedup"] = base / row["median_s"]


def kernels(section: Mapping[str, Any]) -> Iterator[str]:
    """The largest kernels of each provider, as text."""
    for row in section["rows"]:
        found = row.get("profile")
        if found is None:
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
    for heading in ("median ms", "P90", "× eager", *PROFILED, "peak GiB", "initialize s", "first step s", "% of roof"):
        made.add_column(heading, justify="right")
    made.add_column("losses, check")
    for section in result["sections"]:
        for row in section["rows"]:
            made.add_row(section["name"], row["provider"], *_cells(row, section["error"]))
    return made


def _cells(row: Mapping[str, Any], error: str | None) -> list[str]:
    said = " ".join(f"{loss:.4f}" for loss in row.get("losses", ()))
    if "check" in row:
        said += {True: ", green", None: ", not checked", False: f", RED: {row['check']['found']}"}[row["check"]["green"]]
    if "median_s" not in row or row["error"]:
        return ["–"] * 10 + [row["error"] or row["absent"] or f"not timed: {error}; {said}"]
    found = row.get("profile")
    return [
        f"{row['median_s'] * 1e3:.1f}",
        f"{row['p90_s'] * 1e3:.1f}",
        f"{row['speedup']:.3f}" if "speedup" in row else "–",
        *(f"{found[key]:.{digits}f}" if found else "–" for key, digits in PROFILED.items()),
        "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        f"{row['prepare_s']:.1f}",
        f"{row['first_step_s']:.1f}",
        f"{row['percent_of_roof']:.1f}",
        said,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's docstring.

    Returns:
        0; 1 if a check was red or a provider failed; 2 if an argument is unusable.
    """
    try:
        parsed = _parser().parse_args(arguments)
        return _merge(parsed) if parsed.merge else _run(parsed)
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it only the table is printed")
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (default: {','.join(MODELS)})")
    parser.add_argument(
        "--providers",
        default=",".join(DEFAULT),
        help=f"comma-separated, out of: {', '.join(PROVIDERS)} (default: {', '.join(DEFAULT)})",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} timed steps each (default: {ROUNDS})")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="of each model, begin no further round after this long (default: 150)"
    )
    parser.add_argument("--profile", action="store_true", help="say where the time goes, and list kernels beside the JSON")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--commit", default=None, help="the code's commit, for a copy without its history")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing: put these files' sections into one, in --out")
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
    facts["versions"]["liger-kernel"] = liger_version()
    rate = workload.matmul_rate(torch.bfloat16, device)
    workload.free_memory(device)
    result: dict[str, Any] = {"benchmark": "training", **facts, "config": CONFIG, "seconds": 0.0, "sections": []}
    own = {name: facts[name] for name in ("commit", "date")}  # a merged file's sections are from several runs
    for name in chosen:
        model, batch, seq, ragged = MODELS[name]
        load = Workload(model, batch, seq, "training", "bfloat16", device, ragged=ragged)
        if parsed.dry:
            load = dataclasses.replace(load, batch=2, seq=8, size="tiny")
        result["sections"].append({})

        def on_progress(section: dict[str, Any], name: str = name) -> None:
            result["sections"][-1] = {"name": name, **own, **section}
            result["seconds"] = round(time.perf_counter() - start, 1)
            if parsed.out is not None:
                _write(result, parsed.out, parsed.profile)

        measure(load, names, parsed.rounds, parsed.seconds, rate, parsed.profile, on_progress)
    Console(width=None if sys.stdout.isatty() else 210, highlight=False).print(table(result))
    sections = result["sections"]
    return 1 if any(s["error"] or any(row["error"] for row in s["rows"]) for s in sections) else 0


def _merge(parsed: argparse.Namespace) -> int:
    """The later of two sections of one model is kept; all rows of a model are from one run."""
    if parsed.out is None:
        raise ConfigError("--merge: received no --out. Remedy: --out with the folder for the merged file.")
    merged: dict[str, Any] = {}
    for path in parsed.merge:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            own = {name: found[name] for name in ("commit", "date")}
            sections = {section["name"]: {**own, **section} for section in found["sections"]}
            same = (found["benchmark"], found["device"], found["versions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--merge: {path}: no file of this benchmark ({type(error).__name__}: {error}).") from error
        if merged and same != (merged["benchmark"], merged["device"], merged["versions"]):
            raise ConfigError(
                f"--merge: {path}: of another device or other versions than {parsed.merge[0]}. Remedy: run it there again."
            )
        sections = {**{section["name"]: section for section in merged.get("sections", ())}, **sections}
        merged = {**found, "seconds": merged.get("seconds", 0.0) + found["seconds"]}
        merged["sections"] = [sections[name] for name in MODELS if name in sections]
    _write(merged, parsed.out, False)
    return 0


def _write(result: Mapping[str, Any], out: Path, with_kernels: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    slug = result["device"]["slug"]
    (out / f"training-{slug}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if with_kernels:
        lines = [line for section in result["sections"] for line in kernels(section)]
        (out / f"training-{slug}-kernels.txt").write_text("\n".join(lines).strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
