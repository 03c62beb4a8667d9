"""Which rows of the norms' table are measured again, and what is kept of the others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.norms import merged, parse_shapes, with_origin


def test_shapes_are_those_of_the_table() -> None:
    assert parse_shapes("4096x768:float32, 32768x16384:bfloat16") == {(4096, 768, "float32"), (32768, 16384, "bfloat16")}
    for wrong in ("4096x768", "4096x769:float32", "x768:float32", "4096x768:float16", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="ROWSxWIDTH:DTYPE"):
            parse_shapes(wrong)


def test_rows_that_are_not_measured_again_keep_their_commit(tmp_path: Path) -> None:
    path = tmp_path / "rms_norm.json"
    assert with_origin(path, "A") == []
    shape = {"op": "rms_norm", "mode": "forward", "rows": 8, "dtype": "float32"}
    newer = {**shape, "width": 3, "commit": "new", "copy_tb_per_s": 4.3}
    results = [{**shape, "width": width} for width in (1, 2)]
    path.write_text(json.dumps({"device": "A", "commit": "old", "copy_tb_per_s": 4.2, "results": [*results, newer]}))
    with pytest.raises(SystemExit, match="measured on A, this is B"):
        with_origin(path, "B")
    rows = merged(with_origin(path, "A"), [{**shape, "width": 1, "commit": "newest", "copy_tb_per_s": 4.1}])
    assert sorted((row["width"], row["commit"], row["copy_tb_per_s"]) for row in rows) == [
        (1, "newest", 4.1),
        (2, "old", 4.2),
        (3, "new", 4.3),
    ]
