"""Timings that outlast a process: those shipped for a GPU, and those that this machine measured before.

A table belongs to one kind of GPU and one minor version of torch and of triton, which stand in its file's name; under any other
version the figures would be another program's. Shipped tables lie in ``tables/`` of the package; ``autotune: full`` makes them
(``python -m benchmarks.autotune``). A CPU has no table: its name says little about its speed.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tempfile
from pathlib import Path

from oslo_fusion.environment import environment
from oslo_fusion.plan import Timing

CACHE_VARIABLE = "OSLO_FUSION_CACHE"
"""Names the folder of the user's tables; by default ``oslo_fusion`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""

_SHIPPED = Path(__file__).parent / "tables"
_FIELDS = ("dtype", "size", "inference_before", "inference_after", "training_before", "training_after")
_log = logging.getLogger("oslo_fusion")

Table = dict[str, Timing]


def folder() -> Path:
    """Where this user's tables lie."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oslo_fusion"


def file_name(device: str) -> str:
    """The table's name for a GPU of this name, under the versions that are running."""
    facts = environment()
    parts = [device, f"torch{_minor(facts.torch)}", f"triton{_minor(facts.triton or 'none')}"]
    return "-".join(re.sub(r"[^a-z0-9.]+", "_", part.lower()) for part in parts) + ".json"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def recall(device: str, key: str) -> Timing | None:
    """What was measured under this key before, the user's own figure first; None if nothing was."""
    name = file_name(device)
    for place, source in ((folder(), "measured here before"), (_SHIPPED, f"measured on {device}, shipped")):
        found = _read(place / name).get(key)
        if found is not None:
            return found.from_source(source)
    return None


def remember(device: str, key: str, timing: Timing) -> None:
    """Keep a measurement in the user's table. Where the folder cannot be written, that is logged and nothing else happens."""
    path = folder() / file_name(device)
    _read.cache_clear()
    table = {**_read(path), key: timing}
    try:
        write(path, table)
    except OSError as error:
        _log.info("timings are kept for this process only: %s", error)
    _read.cache_clear()


def write(path: Path, table: Table) -> None:
    """Write a table at once: a reader beside sees the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {key: [getattr(timing, field) for field in _FIELDS] for key, timing in sorted(table.items())}
    text = "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()) + "\n}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {key: Timing(**dict(zip(_FIELDS, row, strict=True))) for key, row in rows.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read and is left aside: %s", path, error)
        return {}
