"""Every notebook in tutorials/ runs from start to end at small size, and is saved the way readers should find it."""

import json
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra: tutorials)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra: tutorials)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra: tutorials)")
kernelspec = pytest.importorskip("jupyter_client.kernelspec")
manager = pytest.importorskip("jupyter_client.manager")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SUMMARY = re.compile(r"^tutorial \d+ done: .+", re.MULTILINE)
LOCAL = re.compile(r"/(?:home|root|tmp|work|Users|workspace)/|site-packages|[A-Z]:\\\\")


class ThisInterpreter(kernelspec.KernelSpecManager):
    """Whatever kernel a notebook names, start it with the running interpreter; none need be registered."""

    def get_kernel_spec(self, kernel_name: str) -> object:
        """The specification of a kernel in ``sys.executable``."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return kernelspec.KernelSpec(argv=argv, display_name=kernel_name, language="python")


def printed(cell: dict) -> str:
    """What a cell wrote to standard output."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def last_code_cell(notebook: object) -> dict:
    return [cell for cell in notebook.cells if cell.cell_type == "code"][-1]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OSLO_FUSION_TUTORIAL_SIZE", "small")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other tests, threads that wait for a core cost 8 ms per operator
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel imports this checkout, installed or not
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    kernel = manager.AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    client = nbclient.NotebookClient(
        notebook, km=kernel, timeout=240, allow_errors=False, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
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
        assert not cell.metadata, "no time stamps"
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "no warnings of one machine"
    assert SUMMARY.search(printed(last_code_cell(notebook)))
    assert json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n" == text
