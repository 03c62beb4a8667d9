"""The README's tables of kernels, n-gram blocking, training steps and the sanitizer, from files in ``benchmarks/results/``.

Tables are for people who want to know whether it pays: a few rows that stand for the rest, a sentence that counts all of them,
and a link to the file that holds all. A file that is not there gives no table. :mod:`benchmarks.readme` puts them into place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
KERNELS = ("rms_norm", "layer_norm", "dropout_add_layer_norm", "glu", "rope")
MODES = ("forward", "forward+backward")
LEVEL = 0.98  # as oslo_fusion.plan.WINNING_FRACTION: closer than this is a tie
OURS = "ours"
VERSIONS = ("torch", "triton", "transformers", "liger-kernel", "python")
MODELS = {"t5": "T5-base", "llama": "Llama 1.24B", "gpt2": "GPT-2 124M", "bert": "BERT-base"}
PROFILED = {"device_ms": 1, "host_ms": 1, "launches": 0}  # of a profile, and how many digits
PROFILE_HEADINGS = {"device_ms": "kernels ms", "host_ms": "host ms", "launches": "launches"}
COLOURS = {
    "best peer": "#8d99ae",
    OURS: "#d1495b",
    "eager": "#8d99ae",
    "eager checkpointing": "#8d99ae",
    "compile": "#5c7fa3",
    "liger kernels": "#bcd2c7",
    "liger": "#5b8e7d",
    "liger compile": "#2f6f8f",
    "liger checkpointing": "#5b8e7d",
    "oslo_fusion kernels": "#e9a6ad",
    "oslo_fusion kernels and loss": "#b56576",
    "oslo_fusion": "#f2c078",
    "oslo_fusion memory-efficient checkpointing": "#6a0f21",
}
DIAL = "oslo_fusion memory-efficient"  # the provider with activation_memory_budget 1; " at 0.5" is the same with another
DIAL_COLOUR = "#d1495b"
HOLLOW = "checkpointing"  # is drawn as a ring
LOSS_NAMES = {
    "ours": "oslo_fusion",
    "ours half": "oslo_fusion, sum in bf16",
    "compile": "torch.compile",
    "liger": "Liger",
    "liger float32": "Liger, sum in fp32",
}

Data = Mapping[str, Any]


class BadResult(Exception):
    """A file is not what its name says; the message names it."""


@dataclass(frozen=True)
class Result:
    """A file of results."""

    path: Path
    kind: str
    data: dict[str, Any]


def load(directory: Path) -> list[Result]:
    """Every file that a table here is made from, by kind, then by name.

    Raises:
        BadResult: a file is no JSON object.
    """
    found = []
    for kind in (
        *KERNELS,
        "attention",
        "linear_cross_entropy",
        "rms_norm_steps",
        "no_repeat_ngram",
        "training",
        "distributed",
        "start",
        "sanitizer",
    ):
        for path in sorted(directory.glob(f"{kind}-*.json")):
            remedy = f"Remedy: run benchmarks.{kind} again, or remove the file."
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise BadResult(f"{path}: no JSON ({error}). {remedy}") from error
            if not isinstance(data, dict):
                raise BadResult(f"{path}: holds no object. {remedy}")
            found.append(Result(path, kind, data))
    return found


def sections(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    """Markdown, one piece per paragraph or table.

    Args:
        results: as :func:`load` returns them.
        link: a path as seen from the README.

    Raises:
        BadResult: a file lacks what its table is made from.
    """
    makers = (
        (("training",), _training),
        (("start",), _starts),
        (("distributed",), _distributed),
        (("linear_cross_entropy",), _losses),
        (("attention",), _attention),
        (KERNELS, _kernels),
        (("no_repeat_ngram",), _bans),
        (("rms_norm_steps",), _steps),
        (("sanitizer",), _sanitizer),
    )
    parts: list[str] = []
    for kinds, make in makers:
        chosen = [result for result in results if result.kind in kinds]
        try:
            parts += make(chosen, link) if chosen else []
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            names = ", ".join(str(result.path) for result in chosen)
            raise BadResult(
                f"{names}: not as {' or '.join(kinds)} writes it ({type(error).__name__}: {error}). Remedy: run it again."
            ) from error
    return parts


# --- where it was measured ----------------------------------------------------------------------------------------------------


def _facts(data: Data) -> dict[str, Any]:
    """Device, driver, versions and commit out of the two forms in which files hold them."""
    facts = data.get("facts", data)
    device = facts["device"]
    if isinstance(device, str):
        versions = {name: data.get(name) for name in VERSIONS}
        return {"device": device, "driver": data.get("driver"), "versions": versions, "commit": data.get("commit")}
    return {
        "device": device["name"],
        "driver": device.get("driver"),
        "versions": {name: facts["versions"].get(name) for name in VERSIONS},
        "commit": facts["commit"]["id"],
    }


def _provenance(result: Result, link: Callable[[Path], str]) -> str:
    facts = _facts(result.data)
    pieces = [f"{name} {version}" for name, version in facts["versions"].items() if version]
    if facts["driver"]:
        pieces.insert(0, f"driver {facts['driver']}")
    if facts["commit"] and facts["commit"] != "unknown":
        pieces.append(f"commit `{facts['commit'][:10]}`")
    rows = result.data.get("results")
    others = dict.fromkeys(row["commit"] for row in rows if "commit" in row) if isinstance(rows, list) else {}
    others.pop(facts["commit"], None)
    if others:  # shapes that were measured again stand beside older ones
        pieces.append("other rows " + ", ".join(f"`{commit[:10]}`" for commit in others))
    count = {1: "one", 2: "two"}[result.data.get("world", 1)]
    return f"[{result.path.name}]({link(result.path)}): {count} {facts['device']}, {', '.join(pieces)}"


def _all_provenances(results: Sequence[Result], link: Callable[[Path], str]) -> str:
    """In one line if they agree in everything but the file."""
    lines = [_provenance(result, link) for result in results]
    heads, tails = zip(*(line.split(": ", 1) for line in lines), strict=True)
    text = f"{', '.join(heads)}: {tails[0]}" if len(set(tails)) == 1 else "; ".join(lines)
    return f"Every row is in {text}."


def _grid(headings: Sequence[str], left: int, rows: Sequence[Sequence[str]]) -> str:
    """A table whose first ``left`` columns are text and the others numbers."""
    lines = [headings, ["---"] * left + ["--:"] * (len(headings) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- norms, gated products, rotations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One operation at one shape in one dtype: a row for each mode that was timed."""

    op: str
    shape: str
    width: int
    size: float
    dtype: str
    modes: dict[str, Data]


def ours_of(row: Data) -> str:
    """The provider that is ours: ``ours``, or the fastest of several such as ``ours triton``."""
    times = row["device_us"]
    return min((str(name) for name in times if name.split()[0] == OURS), key=lambda name: (name != OURS, times[name]))


def best_peer(row: Data) -> str:
    """The fastest provider that is not ours."""
    times = row["device_us"]
    return min((str(name) for name in times if name.split()[0] != OURS), key=lambda name: times[name])


def against_best(row: Data) -> float:
    """How many times as fast as the best peer ours is."""
    return float(row["device_us"][best_peer(row)]) / float(row["device_us"][ours_of(row)])


def points(result: Result) -> list[Point]:
    """The rows of a file, those of one shape and dtype together."""
    found: dict[tuple[str, str, str], Point] = {}
    for row in result.data["results"]:
        shape = row.get("shape") or f"{row['rows']}×{row['width']}"
        key = row["op"], shape, row["dtype"]
        size = float(row.get("tensor_mb", row["rows"] * row["width"]))
        found.setdefault(key, Point(row["op"], shape, row["width"], size, row["dtype"], {})).modes[row["mode"]] = row
    return list(found.values())


def representative(candidates: Sequence[Point]) -> list[Point]:
    """A few of one operation's points: bfloat16 at the narrowest, a middle, an odd and the widest width, each at its largest,
    and the middle one in float32."""

    def largest(dtype: str) -> dict[int, Point]:
        by_width: dict[int, Point] = {}
        for point in candidates:
            if point.dtype == dtype and (point.width not in by_width or point.size > by_width[point.width].size):
                by_width[point.width] = point
        return dict(sorted(by_width.items()))

    half = largest("bfloat16") or largest("float16")
    chosen: list[Point] = []
    even = [width for width in half if width % 8 == 0] or list(half)
    if even:
        middle = 4096 if 4096 in even else even[len(even) // 2]
        odd = [width for width in half if width % 8][:1]
        chosen += [half[width] for width in dict.fromkeys((even[0], middle, *odd, even[-1]))]
        chosen += [point for width, point in largest("float32").items() if width == middle]
    return chosen or list(candidates)[:5]


def _kernels(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    headings = ["operation", "rows × columns", "dtype"]
    headings += ["forward µs", "best peer", "×", "% of copy", "with backward µs", "best peer", "×", "% of copy"]
    rows, sentences = [], []
    for result in results:
        found = points(result)
        for op in dict.fromkeys(point.op for point in found):
            own = [point for point in found if point.op == op]
            for point in representative(own):
                cells = [f"`{op}`", point.shape.replace("×", " × "), SHORT.get(point.dtype, point.dtype)]
                for mode in MODES:
                    cells += _mode_cells(point.modes.get(mode))
                rows.append(cells)
            sentences.append(_count(op, [(point, mode, row) for point in own for mode, row in point.modes.items()]))
    return [
        "**Kernels alone**",
        _grid(headings, 3, rows),
        "Device time, inputs rotated past the L2 cache; *×* is the best peer's time over ours, *% of copy* the bytes that must "
        "move over the bandwidth of a large copy, both in the same run. Peers: the module's own code, `torch.nn.functional`, "
        "torch.compile of the expression, Liger. With `autotune`, a site at which ours does not win is refused.",
        " ".join(sentences),
        _all_provenances(results, link),
    ]


def _mode_cells(row: Data | None) -> list[str]:
    if row is None:
        return ["–"] * 4
    ours, peer = ours_of(row), best_peer(row)
    factor = f"{against_best(row):.2f}"
    return [
        _us(row["device_us"][ours]),
        f"{_us(row['device_us'][peer])} {peer}",
        f"**{factor}**" if round(against_best(row), 2) >= LEVEL else factor,
        f"{row['percent_of_copy'][ours]:.0f}",
    ]


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _count(op: str, rows: Sequence[tuple[Point, str, Data]]) -> str:
    level = sum(round(against_best(row), 2) >= LEVEL for _, _, row in rows)
    point, mode, worst = min(rows, key=lambda item: against_best(item[2]))
    where = f"{point.shape} {SHORT.get(point.dtype, point.dtype)} {mode.replace('+', ' + ')}"
    text = (
        f"`{op}`: level with the best peer (at least {LEVEL}×) or ahead in {level} of {len(rows)} rows, at the least "
        f"{against_best(worst):.2f}× ({where}, {best_peer(worst)})."
    )
    behind = [row for _, _, row in rows if round(against_best(row), 2) < LEVEL and best_peer(row) == "liger"]
    copied = [row["device_us"]["liger_copied"] for row in behind if row.get("rot_dim", 0) < row.get("dim", 0)]
    if copied:
        text += (
            " There Liger overwrites q and k, and of these touches the rotated part alone, which ours may not. Where it leaves "
            f"them as they were, by a copy, it takes {' and '.join(map(_us, copied))} µs."
        )
    return text


# --- the steps of the tutorial ------------------------------------------------------------------------------------------------


def _steps(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    parts = []
    for result in results:
        rows = result.data["results"]
        widths = sorted({row["width"] for row in rows})
        kept = list(dict.fromkeys((widths[0], widths[len(widths) // 2], widths[-1])))
        columns = [row for row in rows if row["width"] in kept]
        columns.sort(key=lambda row: (row["mode"] != "forward", row["width"]))
        names = dict.fromkeys(name for row in columns for name in row["device_us"])
        table = [[name, *(_us(row["device_us"].get(name)) for row in columns)] for name in sorted(names)]
        headings = ["step", *(f"{row['mode']} {row['rows']} × {row['width']}" for row in columns)]
        parts += [
            "**RMSNorm step by step**, as [the tutorial](tutorials/04_building_a_kernel.ipynb) builds it, device µs",
            _grid(headings, 1, table),
            _all_provenances([result], link),
        ]
    return parts


# --- n-gram blocking ----------------------------------------------------------------------------------------------------------


_BANS = {
    "transformers": "transformers",
    "torch.compile": "torch.compile",
    "triton in place": "Triton in place",
    "cuda in place": "CUDA in place",
    "triton functional": "Triton, new tensor",
    "cuda functional": "CUDA, new tensor",
}


def _bans(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    parts = []
    for result in results:
        shapes: dict[str, dict[str, Data]] = {}
        for row in result.data["rows"]:
            shapes.setdefault(row["shape"], {})[row["provider"]] = row
        longest = max(shapes, key=lambda shape: next(iter(shapes[shape].values()))["tokens"])
        rows = []
        for shape, found in shapes.items():
            if "copy" not in found and shape != longest:
                continue  # one of the sweep over lengths, of which the longest stands for all
            goal = next((row["goal_us"] for row in found.values() if "goal_us" in row), None)
            times = (found[name]["device_us"] if name in found else None for name in _BANS)
            rows.append([shape, *map(_us, times), "–" if goal is None else f"{goal:.0f}"])
        parts += [
            f"**n-gram blocking**, n = {result.data['n']}, device µs",
            _grid(["scores, text", *_BANS.values(), "goal in place"], 1, rows),
            "Every provider gives transformers' result bit for bit. A new tensor costs a copy of the scores, which "
            "`generate()` needs; – was not run or cannot be captured in a graph. " + _all_provenances([result], link),
        ]
    return parts


# --- training steps -----------------------------------------------------------------------------------------------------------


def _training(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    parts = []
    for result in results:
        sections = result.data["sections"]
        profiled = PROFILED if any(row.get("profile") for section in sections for row in section["rows"]) else {}
        headings = ["model", "provider", "median ms", "P90 ms", "× eager", *(PROFILE_HEADINGS[key] for key in profiled)]
        headings += ["peak GiB", "initialize s", "first step s", "% of roof"]
        rows, notes = [], []
        for section in sections:
            label = _model(section)
            for row in section["rows"]:
                cells = _training_cells(row, section["error"], profiled)
                rows.append([label, *cells, *[""] * (len(headings) - 1 - len(cells))])
            notes += _fused(label, section["rows"])
            for row in section["rows"]:
                green = row.get("check", {}).get("green", True)
                if green is False:
                    notes.append(f"The gradients of {row['provider']} on {label} are outside the law: {row['check']['found']}.")
                elif green is None:
                    notes.append(f"The gradients of {row['provider']} on {label} were not compared.")
        parts += [
            "**Training step**, bfloat16, fused AdamW",
            _grid(headings, 2, rows),
            " ".join((*_training_legend(sections, bool(profiled)), *notes)),
            _training_provenance(result, link),
        ]
    return parts


def _training_legend(sections: Sequence[Data], profiled: bool) -> Iterator[str]:
    yield "Wall clock with a synchronize per step; every provider in a process of its own, timed in turn."
    yield "*Initialize*: what oslo_fusion plans and proves before, since commit `29602b0` with the compiler's import;"
    yield "*first step*: the first that was finished, with compilation."
    cold = dict.fromkeys(row["provider"] for section in sections for row in section["rows"] if row.get("cold"))
    if cold:
        yield f"All caches were empty for {', '.join(cold)}; the others had what these left."
    if profiled:
        yield "*Kernels* is the sum of kernel times, *host* the time until the step's call returns."
    yield "*Roof*: 6 · parameters · tokens over the rate of one large matrix product in the same run."
    yield "*liger* has its fused linear cross entropy, *liger kernels* not."
    if any(row["provider"].startswith(DIAL) for section in sections for row in section["rows"]):
        yield "*memory-efficient*: `memory_efficient_fusion` and the fused loss, *at* this `activation_memory_budget`, else 1;"
        yield "*whole*: `scope: model`, *captured*: and `cuda_graphs`, *padding-free*: and `padding_free`."
    yield "Losses and gradients were compared before."


def _model(section: Data) -> str:
    load = section["workload"]
    seq = f"{load['seq']} + {load['seq']}" if load["model"].startswith("t5") else str(load["seq"])
    size = "" if load["size"] == "full" else f" ({load['size']})"
    lengths = f"{load['seq'] // 8} to " if load.get("ragged") else ""
    return f"{MODELS.get(load['model'], load['model'])}{size}, {load['batch']} × {lengths}{seq}"


def _training_provenance(result: Result, link: Callable[[Path], str]) -> str:
    """A merged file's sections may be from several commits."""
    commits = dict.fromkeys(section.get("commit", result.data["commit"])["id"] for section in result.data["sections"])
    text = _all_provenances([result], link)
    others = [commit for commit in commits if commit and commit != result.data["commit"]["id"]]
    if others:
        text = f"{text[:-1]}; some models at commit {', '.join(f'`{commit[:10]}`' for commit in others)}."
    return text


def _training_cells(row: Data, error: str | None, profiled: Mapping[str, int]) -> list[str]:
    name = row["provider"]
    if row.get("absent") or row.get("error"):
        return [f"{name}: {_cell(row['absent'] or row['error'])}"]
    if "median_s" not in row:
        return [f"{name}: not timed: {_cell(error or 'no round was run')}"]
    profile = row.get("profile")
    cells = [
        name,
        f"{row['median_s'] * 1e3:.1f}",
        f"{row['p90_s'] * 1e3:.1f}",
        f"{row['speedup']:.2f}" if "speedup" in row else "–",
        *(f"{profile[key]:.{digits}f}" if profile else "–" for key, digits in profiled.items()),
        "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        f"{row['prepare_s']:.1f}",
        f"{row['first_step_s']:.1f}",
        f"{row['percent_of_roof']:.0f}",
    ]
    return [f"**{cell}**" for cell in cells] if name.startswith("oslo_fusion") else cells


def _fused(label: str, rows: Sequence[Data]) -> list[str]:
    """What was fused and compiled, once for all providers in which it is the same."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if not row.get("fusion"):
            continue
        text = ", ".join(f"{count} × {kind}" for kind, count in row["fusion"]["fused"].items()) or "nothing"
        compiled = row["fusion"].get("compiled")
        if compiled:
            text += f" ({compiled['graphs']} graphs, {len(compiled['breaks'])} breaks, {compiled['recompiles']} recompiles)"
        said.setdefault(text, []).append(row["provider"])
    return [f"Fused in {label} by {', '.join(names)}: {text}." for text, names in said.items()]


def _cell(text: str) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 120 else line[:117] + "..."


# --- several GPUs -------------------------------------------------------------------------------------------------------------


def _distributed(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    parts = []
    for result in results:
        model, rows = result.data["model"], []
        for section in result.data["sections"]:
            if section["error"]:
                rows.append([f"{section['way']}: {_cell(section['error'])}", *[""] * 8])
            rows += [[section["way"], *_distributed_cells(row)] for row in section["rows"]]
        headings = ["parallelism", "provider", "median ms", "P90 ms", "× eager", "peak GiB per GPU", "first step s"]
        parts += [
            f"**Training step on two GPUs**, {model['dtype']}, {result.data['backend'].upper()}, fused AdamW",
            _grid([*headings, "graphs", "breaks, recompiles"], 2, rows),
            f"A Llama with {model['sizes']['num_hidden_layers']} layers, {model['sizes']['hidden_size']} wide, "
            f"{model['batch']} × {model['seq']} tokens for both together; ours with `memory_efficient_fusion: true` and "
            "nothing else. Loss and gradients, gathered from both, were compared with float32 before. "
            + _all_provenances([result], link),
        ]
    return parts


def _distributed_cells(row: Data) -> list[str]:
    compiled = row.get("compiled")
    return [
        row["provider"],
        f"{row['median_s'] * 1e3:.1f}",
        f"{row['p90_s'] * 1e3:.1f}",
        f"{row['speedup']:.2f}",
        "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
        f"{row['prepare_s'] + row['first_step_s']:.1f}",
        "–" if compiled is None else str(compiled["graphs"]),
        "–" if compiled is None else f"{len(compiled['breaks'])}, {compiled['recompiles']}",
    ]


# --- the beginning of a process -----------------------------------------------------------------------------------------------


def _starts(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    parts = []
    for result in results:
        rows = [
            [
                row["caches"],
                row["how"],
                str(sum(row["compiled"].values())),
                *(f"{row['seconds'][phase]:.1f}" for phase in ("initialize", "first step", "second step")),
            ]
            for row in result.data["rows"]
        ]
        named = MODELS.get(result.data["model"].split("-")[0], result.data["model"])
        parts += [
            f"**What a new process waits for**, {named}, " + ("kernels alone" if result.data["kernels"] else "layers compiled"),
            _grid(["caches", "the plan's kernels", "compiled here", "initialize s", "first step s", "second step s"], 2, rows),
            "Caches of Triton, Inductor and timings; *one after another*: as the plan comes to each kernel, *side by side*: by "
            "threads before, which is what it does. Inductor's own processes compile its kernels. "
            + _all_provenances([result], link),
        ]
    return parts


# --- head and loss ------------------------------------------------------------------------------------------------------------


def _losses(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for row in result.data["results"] for name in row["ms"]))
    names.sort(key=lambda name: not name.startswith(OURS))
    rows, sentences = [], []
    for result in results:
        for row in result.data["results"]:
            labelled = "" if row["labelled"] == row["tokens"] else f", {row['labelled']} with a label"
            cells = [f"{row['shape']}: {row['tokens']} × {row['dim']} × {row['vocab']}{labelled}", SHORT[row["dtype"]]]
            for name in names:
                found = f"{row['ms'][name]:.1f} / {row['peak_mib'][name]:.0f}" if name in row["ms"] else "–"
                cells.append(f"**{found}**" if name == OURS else found)
            rows.append([*cells, f"{row['percent_of_matmul_rate'][OURS]:.0f}"])
            slower = {name: ms for name, ms in row["ms"].items() if ms < LEVEL * row["ms"][OURS] and not name.startswith(OURS)}
            if slower:
                best = min(slower, key=lambda name: slower[name])
                factor = row["ms"][OURS] / slower[best]
                sentences.append(f"{row['shape']}: {LOSS_NAMES.get(best, best)} is {factor:.2f} times as fast as oslo_fusion.")
    headings = ["tokens × width × words", "dtype", *(f"{LOSS_NAMES.get(name, name)}: ms / MiB" for name in names)]
    return [
        "**Head and loss**, forward and backward",
        _grid([*headings, "oslo_fusion: % of matmul rate"], 2, rows),
        "MiB: the peak above what was there before, gradients included. The last column is what the matrix products of the "
        "labelled rows would take at the rate of one large product, measured in the same run, over the whole time. "
        + " ".join(sentences),
        _all_provenances(results, link),
    ]


# --- attention ----------------------------------------------------------------------------------------------------------------


_ATTENTIONS = {
    "ours": "oslo_fusion",
    "cudnn": "cuDNN",
    "flash": "flash",
    "efficient": "memory-efficient",
    "flex": "FlexAttention",
    "math": "math",
}


def _attention(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    """A row per shape: forward, and forward with backward, of each provider."""
    rows = []
    for result in results:
        shapes: dict[str, dict[str, Data]] = {}
        for row in result.data["results"]:
            shapes.setdefault(row["shape"], {})[row["what"]] = row
        for shape, found in shapes.items():
            forward, both = found["forward"]["ms"], found["forward + backward"]["ms"]
            size = "×".join(map(str, found["forward"]["size"]))
            cells = (f"{forward[n]:.3f} / {both[n]:.3f}" if n in forward and n in both else "–" for n in _ATTENTIONS)
            rows.append(
                [shape, size, *(f"**{cell}**" if n == OURS else cell for n, cell in zip(_ATTENTIONS, cells, strict=True))]
            )
    return [
        "**Attention**, bfloat16, ms: forward / forward and backward",
        _grid(["shape", "batch × heads × queries × keys × dim", *_ATTENTIONS.values()], 2, rows),
        "Device time, all of a shape in one run; –: cannot compute it. The peers' bias is a tensor of heads × queries × keys "
        "that is there before; ours is looked up in its table, whose gradient is part of the backward. cuDNN rounds a "
        "dropout of 0.1 to a multiple of 1/16, so a plan does not take it there.",
        _all_provenances(results, link),
    ]


# --- the sanitizer ------------------------------------------------------------------------------------------------------------


def _sanitizer(results: Sequence[Result], link: Callable[[Path], str]) -> list[str]:
    parts = []
    for result in results:
        data = result.data
        said = "; ".join(
            f"{row['tool']} {row['verdict']}{', its planted fault reported' * row['fault_caught']}" for row in data["tools"]
        )
        launches = [count for count in data["launches"].values() if count]
        text = (
            f"**compute-sanitizer** {data['sanitizer']} over {sum(launches)} launches of {len(launches)} kernels in "
            f"{data['cases']} cases of small odd shapes: {said}."
        )
        if data["not_launched"]:
            text += f" Not launched: {', '.join(data['not_launched'])}."
        if not data["cuda_extension"]:
            text += " The CUDA extension was not built there."
        parts.append(f"{text} {_all_provenances([result], link)}")
    return parts


# --- pictures -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """A panel of grouped bars: a group per label, a bar per series, None where there is none."""

    title: str
    unit: str
    labels: list[str]
    series: dict[str, list[float | None]]


@dataclass(frozen=True)
class Spots:
    """A panel of speed over memory: a spot per provider at (GiB, tokens per second)."""

    title: str
    spots: dict[str, tuple[float, float]]


Panel = Bars | Spots


def pictures(results: Sequence[Result]) -> dict[str, Sequence[Panel]]:
    """What is drawn, by file name: training's speed over its memory, and kernels against the copy."""
    found: dict[str, Sequence[Panel]] = {}
    training = [panel for result in results if result.kind == "training" for panel in _training_panels(result)]
    kernels = [panel for mode in MODES for panel in _kernel_panel([r for r in results if r.kind in KERNELS], mode)]
    if training:
        found["training.png"] = training
    if kernels:
        found["kernels.png"] = kernels
    return found


def _training_panels(result: Result) -> Iterator[Spots]:
    for section in result.data["sections"]:
        load = section["workload"]
        spots = {
            row["provider"]: (row["peak_bytes"] / 2**30, load["batch"] * load["seq"] / row["median_s"])
            for row in section["rows"]
            if "median_s" in row and row["peak_bytes"] is not None
        }
        if spots:
            yield Spots(f"{_model(section)}: training step", spots)


def budget_of(provider: str) -> float | None:
    """The ``activation_memory_budget`` of a provider on the dial, else None."""
    if provider == DIAL:
        return 1.0
    return float(provider.removeprefix(f"{DIAL} at ")) if provider.startswith(f"{DIAL} at ") else None


def _kernel_panel(results: Sequence[Result], mode: str) -> Iterator[Bars]:
    labels: list[str] = []
    ours: list[float | None] = []
    peers: list[float | None] = []
    for result in results:
        found = points(result)
        for op in dict.fromkeys(point.op for point in found):
            for point in representative([point for point in found if point.op == op]):
                row = point.modes.get(mode)
                if row is not None:
                    labels.append(f"{op}\n{point.shape}\n{SHORT.get(point.dtype, point.dtype)}")
                    ours.append(row["percent_of_copy"][ours_of(row)])
                    peers.append(row["percent_of_copy"][best_peer(row)])
    if labels:
        yield Bars(mode.replace("+", " + "), "% of copy bandwidth", labels, {"best peer": peers, "ours": ours})


def draw(panels: Sequence[Panel], path: Path, metadata: Mapping[str, str]) -> None:
    """Draw the panels, side by side if their groups are few, else one below the other. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = max((len(panel.labels) for panel in panels if isinstance(panel, Bars)), default=0)
    rows, columns = (len(panels), 1) if wide > 4 else (1, len(panels))
    size = (max(8.0, 0.75 * wide), 3.2 * rows) if wide > 4 else (4.6 * columns, 3.7)
    if isinstance(panels[0], Spots):
        size = (4.2 * columns, 4.8)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=True):
        if isinstance(panel, Bars):
            _draw_bars(axes, panel, 4 if wide > 4 else 2)
        else:
            _draw_spots(axes, panel)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    if isinstance(panels[0], Spots):
        found = [axes.get_legend_handles_labels() for axes in grid.flat]
        handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(4, 2 * columns), frameon=False, fontsize=8
        )
    figure.savefig(path, dpi=130, metadata=dict(metadata))
    pyplot.close(figure)


def _draw_bars(axes: Any, panel: Bars, columns: int) -> None:
    width = 0.84 / len(panel.series)
    for number, (name, heights) in enumerate(panel.series.items()):
        places = [group + (number - (len(panel.series) - 1) / 2) * width for group in range(len(panel.labels))]
        kept = [(place, height) for place, height in zip(places, heights, strict=True) if height is not None]
        axes.bar([p for p, _ in kept], [h for _, h in kept], width * 0.94, color=COLOURS.get(name, "#457b9d"), label=name)
        for place, height in kept:
            axes.text(place, height, f"{height:.3g}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(panel.labels)), panel.labels, fontsize=7)
    axes.set_ylabel(panel.unit)
    axes.set_ylim(0, 1.25 * max(height or 0.0 for heights in panel.series.values() for height in heights))
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=columns)


def _draw_spots(axes: Any, panel: Spots) -> None:
    for name, place in panel.spots.items():
        if budget_of(name) is not None:
            continue
        colour = COLOURS.get(name, "#457b9d")
        face = "white" if name.endswith(HOLLOW) else colour
        axes.scatter(*place, s=48, color=face, edgecolors=colour, linewidths=1.6, label=name, zorder=2)
    dial = sorted((budget, panel.spots[name]) for name in panel.spots if (budget := budget_of(name)) is not None)
    if dial:
        label = f"{DIAL}, by activation_memory_budget"
        axes.plot(*zip(*(place for _, place in dial), strict=True), "D-", color=DIAL_COLOUR, lw=1, ms=6, label=label, zorder=3)
    for budget, place in dial:
        axes.annotate(f"{budget:g}", place, xytext=(4, 5), textcoords="offset points", fontsize=8, color=DIAL_COLOUR)
    axes.set_xlim(0, 1.08 * max(gib for gib, _ in panel.spots.values()))
    axes.set_ylim(0, 1.1 * max(speed for _, speed in panel.spots.values()))
    axes.set_xlabel("peak GiB")
    axes.set_ylabel("tokens per second")
