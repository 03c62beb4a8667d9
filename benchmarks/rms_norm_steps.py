"""The steps of tutorial 4, from the first try to what is shipped: the notebook's own kernels, checked, then timed.

    python -m benchmarks.rms_norm_steps --out DIR    the table (under a minute on one GPU)
    python -m benchmarks.rms_norm_steps --dry        no GPU: the checks, under Triton's interpreter on tiny shapes

The notebook is the only source: its cells with the tag ``kernel`` are run here. How device time and the roof are measured
stands in ``benchmarks/timing.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from oslo_fusion.ops.rms_norm import rms_norm

NOTEBOOK = Path(__file__).parents[1] / "tutorials" / "04_building_a_kernel.ipynb"
WIDTHS = (768, 2048, 4096, 4104, 8192, 16384)  # 4104 = 8 · 513: wide loads are possible, but triton must be told
ELEMENTS = 1 << 26  # 134 MB in bfloat16
# Triton compiles once more for a number of rows that is divisible by 16, so none is: what was checked is what is timed. And as
# many rows to check as keep the heuristics from taking them for few.
CHECKED_ROWS = 1031
DRY_SHAPES = [(37, 96), (1, 768), (5, 1000), (3, 4097)]
TENSORS = {"forward": 2, "backward": 3}  # x in, y out; dy and x in, dx out

Forward = Callable[[Tensor, Tensor], Tensor]


def load_steps() -> ModuleType:
    """A module made of the notebook's tagged cells.

    Raises:
        RuntimeError: the notebook has none.
    """
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    tagged = [cell for cell in notebook["cells"] if "kernel" in cell["metadata"].get("tags", ())]
    if not tagged:
        raise RuntimeError(f"{NOTEBOOK.name}: no cell has the tag 'kernel'. Remedy: tag those that define the steps.")
    source = "\n\n\n".join("".join(cell["source"]) for cell in tagged) + "\n"
    name = "rms_norm_steps_of_the_notebook"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # triton reads a kernel's source
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def forwards(steps: ModuleType) -> dict[str, Forward]:
    """Functions of ``(x, weight)``, by step; ``F.rms_norm`` beside them."""
    return {
        "0 expression": steps.expression,
        "1 two passes": steps.two_passes,
        "2 row in registers": steps.in_registers,
        "3 tiles": lambda x, weight: steps.tiles(x, weight)[0],
        "7 shipped": lambda x, weight: rms_norm(x, weight, eps=steps.EPS),
        "torch F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, steps.EPS),
    }


def backwards(steps: ModuleType) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]]:
    """The notebook's functions of ``(dy, x, weight, rstd)``, by step."""
    return {"4 atomics": steps.backward_atomics, "5 two stages": steps.backward_two_stages}


def check(steps: ModuleType, device: torch.device, shapes: list[tuple[int, int]]) -> None:
    """Every step under the law, output and gradients. Raises before anything is timed."""
    ours = forwards(steps)
    for name in ("1 two passes", "2 row in registers", "3 tiles", "7 shipped"):
        steps.check(name, ours[name], device, shapes)
    for name, backward in backwards(steps).items():
        steps.check_backward(name, backward, device, shapes)
    steps.check_backward(
        "7 shipped", lambda dy, x, weight, rstd: steps.gradients(ours["7 shipped"], x, weight, dy), device, shapes
    )


def measure(steps: ModuleType, width: int, device: torch.device, roof: float) -> Iterator[dict[str, Any]]:
    """Check at this width, then time every step: forward, then the backward alone."""
    check(steps, device, [(CHECKED_ROWS, width)])
    rows = ELEMENTS // width | 1
    draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    xs, dys, weight = timing.rotation(lambda: draw(rows, width)), timing.rotation(lambda: draw(rows, width)), draw(width)

    def forward(call: Forward) -> Callable[[int], object]:
        return lambda i: call(xs[i % len(xs)], weight)

    def explicit(call: Callable[..., object]) -> Callable[[int], object]:
        return lambda i: call(dys[i % len(dys)], xs[i % len(xs)], weight, rstds[i % len(xs)])

    def by_autograd(call: Forward) -> Callable[[int], object]:
        leaf = weight.detach().requires_grad_()
        inputs = [x.detach().requires_grad_() for x in xs]
        ys = [call(x, leaf) for x in inputs]

        def run(i: int) -> object:
            i %= len(xs)
            return torch.autograd.grad(ys[i], [inputs[i], leaf], dys[i], retain_graph=True)

        return run

    def row(mode: str, calls: dict[str, Callable[[int], object]]) -> dict[str, Any]:
        times = timing.device_times(calls)
        size = TENSORS[mode] * rows * width * 2
        return {
            "op": "rms_norm_steps",
            "mode": mode,
            "rows": rows,
            "width": width,
            "dtype": "bfloat16",
            "tensor_mb": rows * width * 2 / 1e6,
            "device_us": {name: round(value, 2) for name, value in times.items()},
            "percent_of_copy": {name: round(100 * size / (value * 1e-6) / roof, 1) for name, value in times.items()},
        }

    with torch.no_grad():
        yield row("forward", {name: forward(call) for name, call in forwards(steps).items()})
    rstds = [steps.tiles(x, weight)[1] for x in xs]
    peers = {name: by_autograd(call) for name, call in forwards(steps).items() if name[0] in "07t"}
    own = {name: explicit(call) for name, call in backwards(steps).items()}
    yield row("backward", dict(sorted({**peers, **own}.items())))


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = "  ".join(f"{name} {us:.1f} µs {row['percent_of_copy'][name]:.0f}%" for name, us in row["device_us"].items())
    return f"{row['mode']:8} {row['rows']:6}×{row['width']:<6} {cells}"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that receives rms_norm_steps-<gpu>.json")
    parser.add_argument("--dry", action="store_true", help="run the checks on the CPU and time nothing")
    parser.add_argument("--seconds", type=float, default=50.0, help="start no width after this long; what is left out is said")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the notebook's cells import triton
        check(load_steps(), torch.device("cpu"), DRY_SHAPES)
        print("every step is right; nothing was timed")
        return
    device = timing.need_gpu("benchmarks.rms_norm_steps")
    steps, roof = load_steps(), timing.copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name()}: copy {roof / 1e12:.2f} TB/s")
    jobs = [(f"{width} columns", functools.partial(measure, steps, width, device, roof)) for width in WIDTHS]
    results, left_out = timing.within(options.seconds, jobs, line)
    if options.out is not None:
        timing.write(options.out / f"rms_norm_steps-{timing.slug()}.json", roof, results, left_out)


if __name__ == "__main__":
    main()
