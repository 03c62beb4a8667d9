"""Every notebook in tutorials/ runs from start to end at small size, and is saved the way readers should find it."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("nbformat", reason="nbformat is not installed (extra: tutorials)")
pytest.importorskip("nbclient", reason="nbclient is not installed (extra: tutorials)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra: tutorials)")

import nbformat

from tutorials.execute import SMALL, canonical, execute

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SUMMARY = re.compile(r"^tutorial \d+ done: .+", re.MULTILINE)
LOCAL = re.compile(r"/(?:home|root|tmp|work|Users|workspace)/|site-packages|[A-Z]:\\\\")


def printed(cell: dict) -> str:
    """What a cell wrote to standard output."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def last_code_cell(notebook: object) -> dict:
    return [cell for cell in notebook.cells if cell.cell_type == "code"][-1]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "import triton" in path.read_text(encoding="utf-8") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (extra: tutorials; Linux only)")
    for name, value in {**SMALL, "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    notebook = execute(path, tmp_path)
    summary = printed(last_code_cell(notebook))
    assert SUMMARY.search(summary), f"the last cell printed {summary!r}"
    for cell in notebook.cells:
        if "print(plan)" in cell.source:
            assert "Plan for" in printed(cell), "a plan prints as text in a notebook too"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_saved_executed_and_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 100_000, "outputs are kept small"
    assert not LOCAL.search(text), "no path of the machine on which it was executed"
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "executed once, in order"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, "no time stamps"
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "no warnings of one machine"
    assert SUMMARY.search(printed(last_code_cell(notebook)))
    assert canonical(notebook) == text, f"save it with: python tutorials/execute.py tutorials/{path.name}"
