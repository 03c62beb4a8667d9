"""The README's results: its tables, sentences and pictures are generated from ``benchmarks/results/*.json`` and
nothing else. GPT-2's are made here, those of kernels and training steps in :mod:`benchmarks.tables`.

    python -m benchmarks.readme            # rewrite the region between the two markers, and the pictures
    python -m benchmarks.readme --check    # exit 1 if README.md or a picture is not what the results say
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PICTURE = "gpt2.png"
SHORT = tables.SHORT
NAMES = {
    "eager": "HF eager",
    "compile": "torch.compile",
    "compile reduce-overhead": "torch.compile reduce-overhead",
    "oslo_fusion": "oslo_fusion",
}
COLOURS = {
    "eager": "#8d99ae",
    "compile": "#5b8e7d",
    "compile reduce-overhead": "#bcd2c7",
    "oslo_fusion": "#d1495b",
}
ALTERNATIVES = {
    "training.png": "tokens per second over peak memory of training steps, ours beside others",
    "kernels.png": "kernels against the bandwidth of a copy, ours beside others",
}
TITLES = {"forward": "Forward", "training": "Training step"}
_DIGEST = "Source"  # the PNG's text entry that names the results it was drawn from


class ReadmeError(Exception):
    """The README cannot take the results; the message says why and the remedy."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; see the module's docstring.

    Returns:
        0 done, or up to date; 1 stale; 2 the README or a result cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON files are")
    parsed = parser.parse_args(arguments)
    try:
        results, others = load(parsed.results), tables.load(parsed.results)
        text = _read(parsed.readme)
        picture = parsed.results / PICTURE

        def link(path: Path) -> str:
            return _relative(path, parsed.readme)

        parts = tables.sections(others, link)
        panels = {parsed.results / name: bars for name, bars in tables.pictures(others).items()}
        parts = [*(f"![{ALTERNATIVES[path.name]}]({link(path)})" for path in panels), *parts]
        body = region(results, link(picture)) if results or not parts else ""
        wanted = insert(text, "\n\n".join(filter(None, (body, *parts))), parsed.readme)
        digests = {path: digest([vars(bar) for bar in bars]) for path, bars in panels.items()}
        if parsed.check:
            stale = [] if wanted == text else [str(parsed.readme)]
            if results:
                digests[picture] = digest(results)
            stale += [str(path) for path, fingerprint in digests.items() if drawn_from(path) != fingerprint]
            if stale:
                print(f"stale: {', '.join(stale)}. Remedy: python -m benchmarks.readme", file=sys.stderr)
            return 1 if stale else 0
        if results:
            draw(results, picture)
        for path, bars in panels.items():
            _need_matplotlib()
            tables.draw(bars, path, {_DIGEST: digests[path]})
        parsed.readme.write_text(wanted, encoding="utf-8")
    except (ReadmeError, tables.BadResult) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load(directory: Path) -> list[dict[str, Any]]:
    """The results in ``directory``, GPUs first, then by name of the device.

    Raises:
        ReadmeError: a file is not a result of this benchmark.
    """
    results = []
    for path in sorted(directory.glob("gpt2-*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["benchmark"] != "gpt2":
                raise KeyError("benchmark")
            result["sections"], result["device"]["name"], result["versions"]["torch"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ReadmeError(
                f"{path}: not a result of benchmarks.gpt2 ({type(error).__name__}: {error}). Remedy: run it again, or "
                "remove the file."
            ) from error
        results.append(result)
    return sorted(results, key=lambda r: (r["device"]["type"] != "cuda", r["device"]["name"]))


def digest(results: list[dict[str, Any]]) -> str:
    """A fingerprint of the results, kept in the picture that was drawn from them."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def region(results: list[dict[str, Any]], picture: str) -> str:
    """The Markdown that stands between the markers.

    Args:
        results: as :func:`load` returns them.
        picture: the picture's path as seen from the README.
    """
    if not results:
        return "No results are in `benchmarks/results/`."
    parts = [f"![milliseconds per call of GPT-2 with each provider]({picture})"]
    for result in results:
        parts.append(_provenance(result))
        for mode in TITLES:
            sections = [s for s in result["sections"] if s["workload"]["mode"] == mode]
            if sections:
                parts += [f"**{_title(mode, sections)}, {_shape(sections[0])}**", _table(sections)]
                sentence = _sentence(mode, sections)
                parts += [sentence] if sentence else []
        profiled = _profiles(result["sections"])
        parts += [f"**Where the time goes, per call**\n\n{profiled}"] if profiled else []
    parts.append(_legend())
    return "\n\n".join(parts)


def _provenance(result: dict[str, Any]) -> str:
    device, versions = result["device"], result["versions"]
    pieces = [f"torch {versions['torch']}", f"transformers {versions['transformers']}", f"Python {versions['python']}"]
    if device.get("driver"):
        pieces.insert(0, f"driver {device['driver']}")
    commit = result["commit"]
    if commit["id"]:
        pieces.append(f"commit `{commit['id'][:10]}`" + (" with uncommitted changes" if commit["dirty"] else ""))
    return f"Measured on one {device['name']}: {', '.join(pieces)}, {result['date']}."


def _shape(section: dict[str, Any]) -> str:
    load = section["workload"]
    size = "" if load["size"] == "full" else f" ({load['size']})"
    return f"GPT-2{size}, {load['batch']} × {load['seq']} tokens"


def _title(mode: str, sections: list[dict[str, Any]]) -> str:
    compiled = any(section.get("config", {}).get("memory_efficient_fusion") for section in sections)
    return TITLES[mode] + (" with `memory_efficient_fusion`" if compiled else "")


def _table(sections: list[dict[str, Any]]) -> str:
    lines = [
        "| dtype | provider | median ms | P90 ms | × eager | first result s | second shape s | peak GiB | % of roof |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for section in sections:
        dtype = SHORT[section["workload"]["dtype"]]
        if section.get("error"):
            lines.append(f"| {dtype} | not timed: {_cell(section['error'])} | | | | | | | |")
        for row in section["rows"]:
            name = NAMES.get(row["provider"], row["provider"])
            if row["error"]:
                lines.append(f"| {dtype} | {name}: {_cell(row['error'])} | | | | | | | |")
                continue
            cells = [
                dtype,
                name,
                f"{row['median_s'] * 1e3:.2f}",
                f"{row['p90_s'] * 1e3:.2f}",
                f"{row['speedup']:.2f}" if "speedup" in row else "–",
                f"{row['prepare_s'] + row['first_call_s']:.1f}",
                f"{row['second_shape_s']:.2f}",
                "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['percent_of_roof']:.0f}",
            ]
            if row["provider"] == "oslo_fusion":
                cells = [f"**{cell}**" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _profiles(sections: list[dict[str, Any]]) -> str:
    """Kernels, host and launches of the providers that were profiled: what is above the kernels' sum, the host costs."""
    lines = []
    for section in sections:
        for row in section["rows"]:
            found = row.get("profile")
            if found is None:
                continue
            load = section["workload"]
            cells = [TITLES[load["mode"]], SHORT[load["dtype"]], NAMES.get(row["provider"], row["provider"])]
            cells += [f"{found[key]:.1f}" for key in ("device_ms", "host_ms", "wall_ms")]
            top = found["kernels"][0]
            cells += [f"{found['launches']:.0f}", f"{top['ms']:.2f} ms {_short_kernel(top['name'])}"]
            lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = (
        "| | dtype | provider | kernels ms | host ms | wall ms | launches | largest kernel |",
        "|---|---|---|--:|--:|--:|--:|---|",
    )
    return "\n".join((*head, *lines))


def _short_kernel(name: str) -> str:
    """The telling part of a kernel's mangled name."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|<.*|\(.*", "", name) or name
    return f"`{name[:48]}`"


def _cell(text: str) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 120 else line[:117] + "..."


def _sentence(mode: str, sections: list[dict[str, Any]]) -> str:
    """What the table says about ours, in words: each figure is a row's, and slower is said as plainly as faster."""
    phrases = []
    for section in sections:
        rows = {row["provider"]: row for row in section["rows"] if not row["error"]}
        if "oslo_fusion" not in rows or "eager" not in rows:
            continue
        ours = rows["oslo_fusion"]
        phrase = f"{SHORT[section['workload']['dtype']]} {_times(rows['eager']['median_s'], ours['median_s'])} HF eager"
        others = {name: row["median_s"] for name, row in rows.items() if name.startswith("compile")}
        if others:
            best = min(others, key=lambda name: others[name])
            phrase += f" and {_times(others[best], ours['median_s'])} {NAMES[best]}"
        phrases.append(phrase)
    if not phrases:
        return ""
    return f"{_title(mode, sections)}, speed of oslo_fusion: " + "; ".join(phrases) + "."


def _times(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}× that of"


def _legend() -> str:
    return (
        "Wall clock with a synchronize per call, nothing trimmed; random weights. *First result*: initialize or wrap, and "
        "the first call; `torch.compile`'s caches are off, and what oslo_fusion measures is measured once per process, so "
        "that it shows in the forward of each dtype. *Second shape*: the first call with half the batch and half the "
        "length. *Roof*: the model's FLOPs over the rate of one large matrix product, measured in the same run. Before "
        "timing, the answers of oslo_fusion were checked against float32 (for fp32, float64). A training step is forward, "
        "backward and fused AdamW, all in the stated dtype."
    )


def insert(text: str, body: str, where: Path) -> str:
    """``text`` with ``body`` between the markers.

    Raises:
        ReadmeError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReadmeError(f"{where}: needs the lines {BEGIN} and {END}, once each, in this order. Remedy: add them.")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReadmeError(f"{path}: cannot be read: {error.strerror}. Remedy: --readme with the right path.") from error


def _relative(picture: Path, readme: Path) -> str:
    picture, folder = picture.resolve(), readme.resolve().parent
    return picture.relative_to(folder).as_posix() if picture.is_relative_to(folder) else picture.as_posix()


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ReadmeError("the pictures need matplotlib. Remedy: pip install 'oslo_fusion[bench]'.")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of ms per provider, grouped by dtype: a row of panels per device, forward left, training right.

    Raises:
        ReadmeError: matplotlib is missing.
    """
    _need_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(results), len(TITLES), figsize=(10, 3.7 * len(results)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for row, result in zip(grid, results, strict=True):
        for axes, mode in zip(row, TITLES, strict=True):
            sections = [s for s in result["sections"] if s["workload"]["mode"] == mode]
            handles.update(_panel(axes, sections))
            shape = f": {_shape(sections[0])}" if sections else ""
            axes.set_title(f"{_title(mode, sections)}{shape}\n{result['device']['name']}", fontsize=10, loc="left")
            axes.set_visible(bool(sections))
    labels = [name for name in NAMES if name in handles]
    figure.legend(
        [handles[name] for name in labels],
        [NAMES[name] for name in labels],
        loc="outside lower center",
        ncols=len(labels) or 1,
        frameon=False,
    )
    figure.savefig(path, dpi=150, metadata={_DIGEST: digest(results)})
    pyplot.close(figure)


def _panel(axes: Any, sections: list[dict[str, Any]]) -> dict[str, Any]:
    handles = {}
    present = [name for name in NAMES if any(_found(section, name) for section in sections)]
    width = 0.84 / max(len(present), 1)
    top = 0.0
    for position, name in enumerate(present):
        offset = (position - (len(present) - 1) / 2) * width
        for group, section in enumerate(sections):
            row = _found(section, name)
            if row is None:
                continue
            height = row["median_s"] * 1e3
            top = max(top, height)
            bars = axes.bar(group + offset, height, width * 0.94, color=COLOURS[name])
            handles[name] = bars
            label = f"{height:.3g}"
            if name == "oslo_fusion" and "speedup" in row:
                label += f"\n{row['speedup']:.2f}×"
            weight = "bold" if name == "oslo_fusion" else "normal"
            axes.text(group + offset, height, label, ha="center", va="bottom", fontsize=8, fontweight=weight)
    axes.set_xticks(range(len(sections)), [SHORT[s["workload"]["dtype"]] for s in sections])
    axes.set_ylim(0, 1.18 * top or 1.0)
    axes.set_ylabel("ms per call (median)")
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _found(section: dict[str, Any], provider: str) -> dict[str, Any] | None:
    return next((row for row in section["rows"] if row["provider"] == provider and not row["error"]), None)


def drawn_from(path: Path) -> str | None:
    """The fingerprint of the results from which a picture was drawn; None if there is no such picture.

    Raises:
        ReadmeError: Pillow, which comes with matplotlib, is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ReadmeError("reading the picture needs Pillow. Remedy: pip install 'oslo_fusion[bench]'.") from None
    try:
        with Image.open(path) as picture:
            text: dict[str, str] = getattr(picture, "text", {})
            return text.get(_DIGEST)
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
