"""How kernels are timed: device time, host time, the roof, and the file that a table is written to.

Device time: CUDA events around a burst of calls, divided by their number; inputs rotate over more memory than the L2 cache
holds, so that every call reads from memory. Providers take turns, and the median over the turns counts. Host time: wall clock
of a burst on an input so small that the device never is the limit, without a synchronize in between. The roof is a large copy
measured in the same run: bytes that must move (inputs read once, outputs written once) over its bandwidth.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROTATION_BYTES = 256 << 20  # several times the 50 MB of an H200's L2
BURST = 10
TURNS = 7
SLOW = 4e-3  # seconds; a slower call is repeated three times in a burst


def device_times(calls: dict[str, Callable[[int], object]], burst: int = BURST, turns: int = TURNS) -> dict[str, float]:
    """Median device µs of one call. Each function takes the number of the input to use; providers take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    pauses: dict[str, int] = {}
    bursts: dict[str, int] = {}
    for name, call in calls.items():
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(3):
            call(i)
        queued = (time.perf_counter() - begin) / 3
        torch.cuda.synchronize()
        # A burst is there to make the events small beside what they time; three slow calls are as good.
        bursts[name] = burst if (time.perf_counter() - begin) / 3 < SLOW else min(burst, 3)
        # Cycles for which the device is kept busy while the host queues a burst, at up to two a nanosecond, three times over:
        # where the host is the slower of the two, its time would be taken for the device's.
        pauses[name] = int(2e9 * 3 * bursts[name] * queued)
    for _ in range(turns):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(pauses[name])
            start.record()
            for i in range(bursts[name]):
                call(i)
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / bursts[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def host_time(call: Callable[[], object], calls: int = 300) -> float:
    """Wall-clock µs of one call on the host, median of 5 bursts."""
    samples = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - begin) * 1e6 / calls)
    torch.cuda.synchronize()
    return statistics.median(samples[1:])


def copy_bandwidth(device: torch.device) -> float:
    """The roof: bytes per second of a large device-to-device copy, read and write counted."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    times = device_times({"copy": lambda i: targets[i % 2].copy_(source)}, 5, 7)
    return 2 * source.numel() / (times["copy"] * 1e-6)


def rotation(make: Callable[[], Tensor]) -> list[Tensor]:
    """Inputs of one shape, enough of them to hold several times what the L2 cache does, or one per call of a burst."""
    first = make()
    return [first, *(make() for _ in range(min(BURST, ROTATION_BYTES // (first.numel() * first.element_size()) + 1)))]


def commit() -> str:
    """The commit that is measured: ``OSLO_FUSION_COMMIT`` if it is set, for a copy of a checkout, else what git says."""
    if given := os.environ.get("OSLO_FUSION_COMMIT"):
        return given
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def within(
    seconds: float, jobs: Iterable[tuple[str, Callable[[], Iterator[dict[str, Any]]]]], line: Callable[[dict[str, Any]], str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Do one job after the other and print the rows; start none after ``seconds``, and say which were left out.

    Args:
        seconds: of wall clock, checks and compilation included.
        jobs: a name, and a function that yields the rows.
        line: one row as people read it.

    Returns:
        The rows, and the names of the jobs that were left out.
    """
    begin = time.perf_counter()
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, job in jobs:
        if time.perf_counter() - begin > seconds:
            left_out.append(name)
            continue
        for row in job():
            results.append(row)
            print(line(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if left_out:
        print("left out for lack of time: " + ", ".join(left_out))
    return results, left_out


def need_gpu(benchmark: str) -> torch.device:
    """The GPU that is timed.

    Raises:
        SystemExit: torch sees none.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"{benchmark} times kernels on a GPU, and torch sees no CUDA device here. Without one: --dry")
    return torch.device("cuda")


def slug() -> str:
    """The GPU's name as part of a file's, ``nvidia-h200``."""
    return "-".join(torch.cuda.get_device_name().lower().split())


def write(path: Path, roof: float, results: Sequence[dict[str, Any]], left_out: Sequence[str]) -> None:
    """Write the rows with the facts of the machine that they were measured on.

    Args:
        path: the file; its folder is made.
        roof: copy bandwidth in bytes per second.
        results, left_out: as :func:`within` returns them.
    """
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    record = {
        "device": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "copy_tb_per_s": round(roof / 1e12, 3),
        "left_out": list(left_out),
        "results": list(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)
