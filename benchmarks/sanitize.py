"""Every kernel of ours at small odd shapes under compute-sanitizer: no access out of bounds, race or uninitialised read.

    python -m benchmarks.sanitize --out DIR                     memcheck, racecheck, initcheck: up to three minutes on one GPU
    python -m benchmarks.sanitize --out DIR --tools memcheck

First a process without the sanitizer runs every case: it fills Triton's cache (compiling under the sanitizer is slow), compares
the results with the reference under the law, and counts the launches of each kernel. A kernel in the sources that no case
launches is an error: it needs a case in :func:`cases`. Then each tool runs the same cases in a process of its own. torch's
memory cache is off, so that every tensor is an allocation whose end the tool knows.

After the cases each process runs a kernel that is wrong on purpose (:mod:`benchmarks.faults`). A tool that does not report it,
or reports anything of ours, is red. Exit code: 0 clean, 1 red, 2 no compute-sanitizer or no GPU here.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oslo_fusion import extension, models, workload
from oslo_fusion.errors import OsloFusionError
from oslo_fusion.ops.attention import attention
from oslo_fusion.ops.attention_cases import ATTENTION_CASES, AttentionCase, eager_attention
from oslo_fusion.ops.row_cases import drawer
from oslo_fusion.testing import assert_close_to_reference

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SECONDS = 170.0
DONE = "every case ran"

FAULTS = {"memcheck": "_fault_overrun_kernel", "racecheck": "_fault_race_kernel", "initcheck": "_fault_uninitialised_kernel"}
"""The kernel of :mod:`benchmarks.faults` that each tool must report."""

OPTIONS = {
    # Space between allocations, else an overrun into the next one is legal. torch tries calls that may fail, and handles it.
    "memcheck": ["--padding", "4096", "--report-api-errors", "no"],
    "racecheck": [],
    # Copies to the host of memory that nobody wrote are not our kernels' doing.
    "initcheck": ["--check-api-memory-access", "no"],
}
FILTERED = ("memcheck", "racecheck")
"""Tools that look at our kernels alone. initcheck must see every kernel: what torch's own have written counts as written."""


# --- the cases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of ours. ``inputs`` are dense and on the CPU; ``run`` gets them on a device and returns what is compared."""

    name: str
    inputs: tuple[Tensor, ...]
    run: Callable[..., Sequence[Tensor]]

    def results(self, device: torch.device, wide: bool = False) -> Sequence[Tensor]:
        """Run it. Inputs get there by a copy from the host, which counts as initialised, not by a kernel of torch's.

        Args:
            device: where.
            wide: in float64.
        """
        given = [t.double() if wide and t.is_floating_point() else t for t in self.inputs]
        return self.run(*(t.to(device, copy=True) for t in given))


Function = Callable[..., "Tensor | tuple[Tensor, ...]"]
View = Callable[[Tensor], Tensor]

LAYOUTS: dict[str, tuple[tuple[int, ...], View]] = {
    "1×13": ((1, 13), lambda t: t),
    "3×1025": ((3, 1025), lambda t: t),
    "2×4097": ((2, 4097), lambda t: t),
    "strided rows 6×48": ((6, 2, 48), lambda t: t[:, 1]),
    "strided numbers 5×33": ((5, 66), lambda t: t[:, ::2]),
    "unaligned 4×65": ((4, 66), lambda t: t[:, 1:]),
    "133×96": ((133, 96), lambda t: t),
    "7×1032": ((7, 1032), lambda t: t),
}
WIDE = {"2×9001": ((2, 9001), lambda t: t)}  # too wide for a backward that keeps a row in registers
MANY_WIDE = {"301×10240": ((301, 10240), lambda t: t)}  # a layer norm's forward keeps words of two numbers


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _forward_and_backward(function: Function, view: View, viewed: int, *tensors: Tensor) -> list[Tensor]:
    """Outputs without gradients (another path), outputs with, and gradients. The first ``viewed`` tensors are viewed."""
    inputs = [view(t) if i < viewed else t for i, t in enumerate(tensors)]
    with torch.no_grad():
        plain = _tuple(function(*inputs))
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = _tuple(function(*leaves))
    draw = drawer(outputs[0].dtype, seed=1)
    wanted = [draw(*y.shape).to(y.device) for y in outputs]
    return [*plain, *(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, wanted)]


def _over_rows(
    name: str, kinds: Mapping[str, tuple[Function, int, int]], layouts: Mapping[str, tuple[tuple[int, ...], View]]
) -> Iterator[Case]:
    """A case per layout; kinds and dtypes take turns, since every combination is another compilation.

    Args:
        name: of the operation.
        kinds: the function, how many tensors of rows it takes, and how many of a row's length after them.
        layouts: out of :data:`LAYOUTS`.
    """
    turns = zip(layouts.items(), itertools.cycle(kinds.items()), itertools.cycle(DTYPES), strict=False)
    for (layout, (shape, view)), (kind, (function, rows, vectors)), dtype in turns:
        draw = drawer(dtype)
        width = view(torch.empty(shape)).shape[-1]
        inputs = [draw(*shape) for _ in range(rows)] + [draw(width) for _ in range(vectors)]
        run = functools.partial(_forward_and_backward, function, view, rows)
        yield Case(f"{name}{kind}, {layout} {models.dtype_name(dtype)}", tuple(inputs), run)


def _find(module: str, name: str) -> Function | None:
    """A public function of ours, or None in a version that does not have it."""
    try:
        found: Function | None = getattr(importlib.import_module(f"oslo_fusion.ops.{module}"), name, None)
    except ModuleNotFoundError as error:
        if error.name != f"oslo_fusion.ops.{module}":
            raise
        return None
    return found


def _kinds(norm: Function, vectors: int) -> dict[str, tuple[Function, int, int]]:
    """A norm with and without a residual, with and without its vectors."""
    return {
        ", weight": (functools.partial(norm, eps=EPS), 1, vectors),
        ", residual and weight": (lambda x, r, *w: norm(x, *w, eps=EPS, residual=r), 2, vectors),
        ", no weight": (functools.partial(norm, eps=EPS), 1, 0),
        ", residual, no weight": (lambda x, r: norm(x, eps=EPS, residual=r), 2, 0),
    }


def _chosen(function: Function, kernel: str) -> Function:
    """The function with this kernel where the inputs are on a GPU, if it lets one choose."""
    if "kernel" not in inspect.signature(function).parameters:
        return function
    return lambda x, *rest, **options: function(x, *rest, kernel=kernel if x.is_cuda else "auto", **options)


def _norms(cuda: bool) -> Iterator[Case]:
    for name, vectors in (("rms_norm", 1), ("layer_norm", 2)):
        norm = _find(name, name)
        assert norm is not None
        in_cuda = cuda and (ROOT / "oslo_fusion" / "csrc" / f"{name}.cu").exists()
        for kernel in ("triton", "cuda") if in_cuda else ("triton",):
            kinds = _kinds(_chosen(norm, kernel), vectors)
            yield from _over_rows(f"{name} in {kernel}", kinds, LAYOUTS)
            yield from _over_rows(f"{name} in {kernel}", {", weight": kinds[", weight"]}, WIDE)
            if name == "layer_norm":
                yield from _over_rows(f"{name} in {kernel}", {", weight": kinds[", weight"]}, MANY_WIDE)


def _post_norms(cuda: bool) -> Iterator[Case]:
    norm = _find("dropout_add_layer_norm", "dropout_add_layer_norm")
    if norm is None:
        return

    def call(dropout: float, x: Tensor, residual: Tensor, *vectors: Tensor) -> Tensor:
        linear_bias, *parameters = vectors or (None,)
        rng = torch.tensor([3, 5]).to(x.device) if dropout else None
        y = norm(x, residual, *parameters, eps=EPS, dropout=dropout, linear_bias=linear_bias, rng=rng)
        assert isinstance(y, Tensor)
        return y

    kinds: dict[str, tuple[Function, int, int]] = {
        ", dropout": (functools.partial(call, 0.25), 2, 3),
        ", no dropout": (functools.partial(call, 0.0), 2, 3),
        ", dropout, no weight": (functools.partial(call, 0.25), 2, 0),
    }
    yield from _over_rows("dropout_add_layer_norm", kinds, LAYOUTS)
    widest = {"2×8192": ((2, 8192), lambda t: t)}
    yield from _over_rows("dropout_add_layer_norm", {", dropout": kinds[", dropout"]}, widest)


def _products(cuda: bool) -> Iterator[Case]:
    swiglu, geglu = _find("glu", "swiglu"), _find("glu", "geglu")
    if swiglu is None or geglu is None:
        return
    kinds: dict[str, tuple[Function, int, int]] = {
        "swiglu": (swiglu, 2, 0),
        "geglu": (geglu, 2, 0),
        "geglu, tanh": (functools.partial(geglu, approximate="tanh"), 2, 0),
    }
    yield from _over_rows("", kinds, LAYOUTS)


def _mlps(cuda: bool) -> Iterator[Case]:
    gated_mlp = _find("gated_mlp", "gated_mlp")
    if gated_mlp is None:
        return
    # Inner widths of one part, and of two of which the second is narrower.
    for (dim, inner), dtype, activation in zip(((13, 33), (48, 2112)), DTYPES, ("gelu", "silu"), strict=False):
        draw = drawer(dtype)
        weights = (draw(inner, dim) / dim, draw(inner, dim) / dim, draw(dim, inner) / inner)
        run = functools.partial(_forward_and_backward, functools.partial(gated_mlp, activation=activation), lambda t: t, 0)
        yield Case(f"gated_mlp, {activation}, {dim} and {inner}", (draw(3, 7, dim), *weights), run)
    feed_forward = _find("feed_forward", "feed_forward")
    if feed_forward is None:
        return
    # A column that is not full, and several programs of tiles of which the last is not.
    for (rows, dim, inner), dtype, activation in zip(
        ((21, 13, 33), (131, 48, 320)), DTYPES, ("gelu", "gelu_tanh"), strict=False
    ):
        draw = drawer(dtype)
        given = (draw(rows, dim), draw(inner, dim) / dim, draw(inner), draw(dim, inner) / inner, draw(dim))
        run = functools.partial(_forward_and_backward, functools.partial(feed_forward, activation=activation), lambda t: t, 0)
        yield Case(f"feed_forward, {activation}, {rows}, {dim} and {inner}", given, run)


def _rotations(cuda: bool) -> Iterator[Case]:
    rope = _find("rope", "rope")
    if rope is None:
        return
    shapes = {"one position": (1, 1, 1, 1, 16, 16), "odd": (2, 3, 1, 5, 24, 24), "partial": (1, 4, 2, 7, 34, 10)}
    chosen = itertools.product(shapes.items(), (False, True))
    for number, ((label, (batch, heads, kv_heads, seq, dim, rotated)), interleaved) in enumerate(chosen):
        transposed = number % 3 == 1
        draw = drawer(DTYPES[number % len(DTYPES)])
        q, k = (draw(*((batch, seq, n, dim) if transposed else (batch, n, seq, dim))) for n in (heads, kv_heads))
        run = functools.partial(_rotate, rope, interleaved, (lambda t: t.transpose(1, 2)) if transposed else (lambda t: t))
        name = f"rope, {label}{', interleaved' * interleaved}{', transposed' * transposed}"
        yield Case(name, (q, k, draw(batch, seq, rotated), draw(batch, seq, rotated)), run)


def _rotate(rope: Function, interleaved: bool, view: View, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return _forward_and_backward(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), view, 2, q, k)


def _bans(cuda: bool) -> Iterator[Case]:
    texts = {
        "1×13, 5 tokens": (1, 13, 5),
        "3×1025, 40 tokens": (3, 1025, 40),
        "2×4112, 40 tokens": (2, 4112, 40),
        "4×4097, 2500 tokens": (4, 4097, 2500),
    }
    for kernel, (label, (rows, vocab, tokens)) in itertools.product(("triton", "cuda") if cuda else ("triton",), texts.items()):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(-1, min(vocab, 9) + 2, (rows, tokens), generator=generator)  # ids outside the vocabulary too
        source = torch.randint(0, 9, (1 if rows < 4 else 2, tokens), generator=generator)
        scores = drawer(torch.float32)(rows, vocab)

        def run(scores: Tensor, ids: Tensor, source: Tensor, kernel: str = kernel) -> Sequence[Tensor]:
            op: Any = importlib.import_module("oslo_fusion.ops.no_repeat_ngram")
            choice = kernel if scores.is_cuda else "auto"
            length = torch.tensor(ids.shape[1] - 1).to(scores.device)
            sizes = torch.tensor([2, 0, 60, 1][: len(ids)]).to(scores.device)
            results = [op.no_repeat_ngram(scores, ids, 2, kernel=choice), op.no_repeat_ngram(scores, ids, sizes, kernel=choice)]
            results.append(op.encoder_no_repeat_ngram(scores, ids, source, 2, kernel=choice))
            strided = torch.stack((scores, scores), -1)[..., 0]
            results.append(op.no_repeat_ngram_(strided, ids, 2, length, kernel=choice))
            results.append(op.encoder_no_repeat_ngram_(scores, ids, source, 2, kernel=choice))
            return results

        yield Case(f"no_repeat_ngram in {kernel}, {label}", (scores, ids, source), run)


def _packings(cuda: bool) -> Iterator[Case]:
    if importlib.util.find_spec("oslo_fusion.ops.pack_tokens") is None:
        return
    # A row wider than a block, more rows than one, and one token; with what there can be, and with as little as there can be.
    for number, (rows, columns) in enumerate(((1, 13), (3, 1025), (600, 7), (1, 1))):
        generator = torch.Generator().manual_seed(columns)
        mask = torch.rand(rows, columns, generator=generator) < 0.6
        ids, types, labels, positions = (torch.randint(0, 9, mask.shape, generator=generator) for _ in range(4))

        def run(mask: Tensor, *given: Tensor, all_given: bool = number % 2 == 0) -> Sequence[Tensor]:
            op: Any = importlib.import_module("oslo_fusion.ops.pack_tokens")
            found = []
            for rule, shifted in zip(op.RULES, (False, True, False, True), strict=True):
                tokens = op.Tokens(*given) if rule == op.NOWHERE and all_given else op.Tokens(given[0], None, given[2])
                tokens = op.Tokens() if rule == op.COLUMNS and not all_given else tokens
                numbers = op.count_tokens(mask, tokens.labels, shifted)
                form = op.Form(rule, 1, shifted)
                source, offsets, packed = op.pack_tokens(numbers, mask, tokens, form, mask.shape[0] + 3)
                found += [numbers, source, offsets, *(x for x in packed if x is not None)]
            return [x.double() for x in found]  # exactly: all are below 2⁵³

        yield Case(f"pack_tokens, {rows}×{columns}", (mask, ids, types, labels, positions), run)


def _attentions(cuda: bool) -> Iterator[Case]:
    names = ("T5 encoder, padded", "T5 with dropout, unaligned", "left padding", "holes", "lengths", "packed with everything")
    for name, dtype in zip(
        (*names, "a mask, T5 decoder", "a mask for each head", "head size 80", "ALiBi both ways"),
        itertools.cycle(DTYPES),
        strict=False,
    ):
        case = ATTENTION_CASES[name]

        def run(*tensors: Tensor, case: AttentionCase = case) -> Sequence[Tensor]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            options = case.options(leaves[0].device)
            if leaves[0].is_cuda:
                y = attention(*leaves[:3], bias_table=leaves[3] if case.table else None, **options)
            else:
                y = eager_attention(case)(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, drawer(y.dtype, seed=1)(*y.shape).to(y.device))]

        yield Case(f"attention, {name} {models.dtype_name(dtype)}", tuple(case.tensors(drawer(dtype))), run)


def _losses(cuda: bool) -> Iterator[Case]:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "smoothed, capped": {"label_smoothing": 0.1, "logit_softcap": 5.0},
        "scaled, labelled rows only": {"logit_scale": 0.5, "compact": True},
    }
    shapes = ((1, 9, 13), (7, 24, 37), (130, 17, 1025))
    for (label, chosen), (rows, dim, vocab), dtype in zip(options.items(), shapes, DTYPES, strict=False):
        draw, generator = drawer(dtype), torch.Generator().manual_seed(rows)
        labels = torch.randint(0, vocab, (rows,), generator=generator)
        labels[1::3] = -100

        def run(*tensors: Tensor, chosen: dict[str, Any] = chosen) -> Sequence[Tensor]:
            op: Any = importlib.import_module("oslo_fusion.ops.linear_cross_entropy")
            hidden, weight, bias = (t.detach().requires_grad_() for t in tensors[:3])
            loss = op.linear_cross_entropy(hidden, weight, tensors[3], bias=bias, **chosen)
            return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))]

        tensors = (draw(rows, dim), draw(vocab, dim), draw(vocab), labels)
        yield Case(f"linear_cross_entropy, {rows}×{dim}×{vocab}, {label} {models.dtype_name(dtype)}", tensors, run)


OPERATIONS = (_norms, _post_norms, _products, _mlps, _rotations, _bans, _packings, _attentions, _losses)
"""Where the cases of an operation come from; one that this version does not have gives none."""


def cases(cuda: bool) -> list[Case]:
    """All of them. ``cuda``: the compiled extension has its CUDA kernels."""
    return [case for operation in OPERATIONS for case in operation(cuda)]


def kernel_names(cuda: bool) -> list[str]:
    """Every kernel that stands in the sources: in Triton, and with ``cuda`` in ``csrc/``."""
    names: list[str] = []
    for path in sorted((ROOT / "oslo_fusion" / "triton").glob("*.py")):
        jitted = re.findall(r"^@triton\.jit\b.*?^def (\w+)\(", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        names += [name for name in jitted if name.endswith("_kernel")]  # the others are called by these
    for path in sorted((ROOT / "oslo_fusion" / "csrc").glob("*.cu*")) if cuda else ():
        bounds = r"(?:__launch_bounds__\([^)]*\)\s*)?"
        names += re.findall(rf"__global__\s+{bounds}void\s+{bounds}(\w+)\s*\(", path.read_text(encoding="utf-8"))
    return list(dict.fromkeys(names))


def has_cuda_kernels() -> bool:
    """Whether the compiled extension is here and was built with CUDA."""
    return extension.failure() is None and extension.build_info().get("cuda") == "yes"


# --- the child --------------------------------------------------------------------------------------------------------------


def verify(device: torch.device) -> dict[str, Any]:
    """Run every case, compare with the CPU under the law, count the launches of each kernel."""
    names, launches, host = kernel_names(has_cuda_kernels()), Counter[str](), torch.device("cpu")
    everything = cases(has_cuda_kernels())
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as trace:
        found = [[t.cpu() for t in case.results(device)] for case in everything]
        workload.synchronize(device)
    for event in trace.key_averages():
        name = owner(event.key, names)
        if name is not None and event.device_type.name != "CPU":
            launches[name] += event.count
    for case, ours in zip(everything, found, strict=True):
        theirs, truth = case.results(host), case.results(host, wide=True)
        for i, (mine, same, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
            assert_close_to_reference(mine, same, exact, f"{case.name}, result {i}")
    return {"cases": [case.name for case in everything], "launches": {name: launches[name] for name in names}}


def child(report: Path, fault: str | None) -> None:
    """What runs in the process that is looked at: the cases, then the ``fault`` of a tool; without one, :func:`verify`."""
    device = models.parse_device("cuda")
    if fault is None:
        report.write_text(json.dumps(verify(device)), encoding="utf-8")
        return
    for case in cases(has_cuda_kernels()):
        report.write_text(f"{case.name}\n", encoding="utf-8")  # where it stands, should it not come back
        case.results(device)
        workload.synchronize(device)
    report.write_text(DONE, encoding="utf-8")
    importlib.import_module("benchmarks.faults").COMMIT[fault](device)
    workload.synchronize(device)


# --- the log ----------------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """What a tool's log says."""

    summary: str | None = None
    errors: int = 0
    ours: Counter[str] = field(default_factory=Counter)
    fault: int = 0
    others: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


def owner(text: str, names: Sequence[str]) -> str | None:
    """Whose kernel a text names. The CUDA kernels are called as the Triton ones without the first underscore."""
    whole = (name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))
    mangled = (name for name in sorted(names, key=len, reverse=True) if name in text)
    return next(itertools.chain(whole, mangled), None)


_LINE = re.compile(r"^=========( .*)?$")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)s?\b.*")
_NOT_A_REPORT = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "Target application", "Error: process didn't")


def read_log(text: str, names: Sequence[str], tool: str) -> Finding:
    """Attribute every report in a log to a kernel.

    A report begins with a line ``========= Invalid __global__ read ...`` and goes on with lines that are further indented; the
    kernel's name stands after ``at``, for a race twice. What comes after the host's backtrace begins says nothing of it.

    Args:
        text: of the log file.
        names: of our kernels.
        tool: whose fault is expected.
    """
    found = Finding()
    report: list[str] = []

    def close() -> None:
        if not report:
            return
        place = "\n".join(itertools.takewhile(lambda line: "host backtrace" not in line, report))
        name = owner(place, names)
        if FAULTS[tool] in place:
            found.fault += 1
        elif name is not None:
            found.ours[name] += 1
            if len(found.examples) < 5:
                found.examples.append(place)
        else:
            found.others[report[0].strip()[:100]] += 1
        report.clear()

    for raw in text.splitlines():
        match = _LINE.match(raw.rstrip())
        if match is None:
            continue
        line = match[1] or ""
        if not line.strip():
            close()
            continue
        summary = _SUMMARY.search(line)
        if summary is not None:
            close()
            found.summary, found.errors = summary[0], int(summary[1])
        elif line.startswith("  "):
            if report:
                report.append(line)
        elif line.startswith(" and ") and report:  # the other half of a race
            report.append(line)
        else:
            close()
            if not line.strip().startswith(_NOT_A_REPORT):
                report.append(line)
    close()
    return found


def verdict(found: Finding, finished: bool, stopped: bool) -> str:
    """``clean``, or what is wrong.

    Args:
        found: what the log says.
        finished: every case ran.
        stopped: the time was up.
    """
    if found.ours:
        return "red: " + ", ".join(f"{name} ×{count}" for name, count in found.ours.items())
    if not finished:
        return "red: stopped for lack of time before every case ran" if stopped else "red: not every case ran"
    if found.summary is None:
        return "red: stopped for lack of time" if stopped else "red: the log has no summary"
    return "clean" if found.fault else "red: the fault that was put in was not reported"


# --- the parent -------------------------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """The program, on the path or where CUDA puts it."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    places = [home / part for home in homes for part in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer")]
    return next((str(place) for place in places if place.is_file()), None)


def version(text: str) -> str | None:
    """``Version 2025.3.1.0 (build 36398880) (public-release)`` → ``2025.3.1.0``."""
    match = re.search(r"[Vv]ersion\s+([\d.]+)", text)
    return match[1] if match else None


def command(program: str, tool: str, names: Sequence[str], log: Path, report: Path) -> list[str]:
    """The sanitizer's command line."""
    words = [program, "--tool", tool, "--log-file", str(log), "--print-limit", "1000", "--launch-timeout", "120"]
    words += ["--target-processes", "application-only", *OPTIONS[tool]]
    if tool in FILTERED:
        words += [word for name in (*names, FAULTS[tool]) for word in ("--kernel-name", f"kns={name}")]
    return [*words, sys.executable, "-m", "benchmarks.sanitize", "--child", str(report), "--fault", tool]


def _start(words: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code, None where the time was up, and the end of what was printed."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)  # the sanitizer and what it looks at
            process.wait()
        output.seek(0)
        return code, output.read()[-3000:]


def look(program: str, tool: str, names: Sequence[str], seconds: float, folder: Path) -> dict[str, Any]:
    """One tool over all cases."""
    log, report = folder / f"sanitizer-{tool}.log", folder / f"{tool}.txt"
    begin = time.perf_counter()
    code, output = _start(command(program, tool, names, log, report), seconds)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    reached = report.read_text(encoding="utf-8").strip() if report.exists() else "nothing"
    found = read_log(text, names, tool)
    row = {
        "tool": tool,
        "verdict": verdict(found, reached == DONE, code is None),
        "errors_of_ours": sum(found.ours.values()),
        "fault_caught": found.fault > 0,
        "of_others": dict(found.others.most_common(10)),
        "reached": reached,
        "summary": found.summary,
        "examples": found.examples,
        "filtered": tool in FILTERED,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if row["verdict"] != "clean":
        row["output"] = output or text[-3000:]
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tools; see the module's docstring.

    Returns:
        0 clean, 1 red, 2 it cannot be run here or an argument is unusable.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for sanitizer-<device>.json; without it only the table is printed")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"comma-separated (default: {','.join(TOOLS)})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything together (default: {SECONDS:.0f})")
    parser.add_argument("--commit", default=None, help="the code's commit, for a copy without its history")
    parser.add_argument("--logs", action="store_true", help="keep the tools' logs beside the JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fault", choices=TOOLS, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    tools = list(dict.fromkeys(word.strip() for word in parsed.tools.split(",") if word.strip()))
    try:
        for tool in tools or [parsed.tools]:
            if tool not in TOOLS:
                raise models.wrong_value("--tools", tool, TOOLS)
        if parsed.child is not None:
            child(parsed.child, parsed.fault)
            return 0
        program = find_sanitizer()
        if program is None:
            print("no compute-sanitizer here. Remedy: install the CUDA toolkit, and put its bin on the PATH", file=sys.stderr)
            return 2
        device = models.parse_device("cuda")
    except OsloFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        return _run(program, tools, device, parsed, Path(folder))


def _run(program: str, tools: Sequence[str], device: torch.device, parsed: argparse.Namespace, folder: Path) -> int:
    begin = time.perf_counter()
    report = folder / "verified.json"
    code, output = _start([sys.executable, "-m", "benchmarks.sanitize", "--child", str(report)], parsed.seconds)
    if code != 0:
        outcome = "took too long" if code is None else "failed"
        print(f"{output}\nwithout the sanitizer the cases {outcome}: nothing was looked at", file=sys.stderr)
        return 1
    verified = json.loads(report.read_text(encoding="utf-8"))
    names = list(verified["launches"])
    asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    result: dict[str, Any] = {
        "benchmark": "sanitizer",
        **workload.facts(device, parsed.commit),
        "sanitizer": version(asked.stdout + asked.stderr),
        "cases": len(verified["cases"]),
        "launches": verified["launches"],
        "not_launched": [name for name, count in verified["launches"].items() if not count],
        "cuda_extension": has_cuda_kernels(),
        "compiled_and_compared_s": round(time.perf_counter() - begin, 1),
        "tools": [],
    }
    for number, tool in enumerate(tools):
        left = parsed.seconds - (time.perf_counter() - begin)
        result["tools"].append(look(program, tool, names, left / (len(tools) - number), folder))
    result["seconds"] = round(time.perf_counter() - begin, 1)
    print(table(result))
    if parsed.out is not None:
        parsed.out.mkdir(parents=True, exist_ok=True)
        path = parsed.out / f"sanitizer-{result['device']['slug']}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if parsed.logs:
            for log in folder.glob("sanitizer-*.log"):
                shutil.copy(log, parsed.out / log.name)
        print(f"written: {path}")
    return 0 if not result["not_launched"] and all(row["verdict"] == "clean" for row in result["tools"]) else 1


def table(result: Mapping[str, Any]) -> str:
    """What people read."""
    lines = [
        f"compute-sanitizer {result['sanitizer']} on {result['device']['name']}: {result['cases']} cases, "
        f"{sum(result['launches'].values())} launches of {sum(map(bool, result['launches'].values()))} kernels, "
        f"{result['seconds']:.0f} s"
    ]
    for row in result["tools"]:
        others = sum(row["of_others"].values())
        lines.append(
            f"  {row['tool']:<10} {row['verdict']}; ours {row['errors_of_ours']}, others {others}, fault "
            f"{'caught' if row['fault_caught'] else 'NOT caught'}, {row['seconds']:.0f} s"
        )
        lines += [f"    reached: {row['reached']}\n{row['output']}"] if "output" in row else []
        lines += row["examples"]
    if result["not_launched"]:
        lines.append(f"no case launches {', '.join(result['not_launched'])}. Remedy: a case in benchmarks/sanitize.py")
    if not result["cuda_extension"]:
        lines.append("the extension was not built with CUDA: its kernels were not looked at")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
