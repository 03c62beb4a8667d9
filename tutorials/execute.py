"""Run a tutorial from start to end, and save it as readers should find it.

    python tutorials/execute.py tutorials/03_custom_kernels.ipynb ...

At small size on the CPU with one thread, which is what the notebooks say of their saved outputs. What belongs to one machine,
such as its warnings, is not saved.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

ROOT = Path(__file__).parents[1]
SMALL = {
    "OSLO_FUSION_TUTORIAL_SIZE": "small",
    "OMP_NUM_THREADS": "1",  # beside other programs, threads that wait for a core cost 8 ms per operator
    "PYTHONPATH": str(ROOT),  # the kernel imports this checkout, installed or not
}


class ThisInterpreter(KernelSpecManager):
    """Whatever kernel a notebook names, start it with the running interpreter; none need be registered."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The specification of a kernel in ``sys.executable``."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def execute(path: Path, folder: Path) -> Any:
    """Run every cell with ``folder`` as the working directory and return the notebook with its outputs.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    client = nbclient.NotebookClient(
        notebook, km=kernel, timeout=240, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def canonical(notebook: Any) -> str:
    """The notebook as text, always in the same form: one piece of standard output per cell, and no warnings."""
    plain = json.loads(json.dumps(notebook))
    plain["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in plain["cells"]:
        if cell["cell_type"] != "code":
            continue
        outputs: list[dict[str, Any]] = []
        for output in cell["outputs"]:
            if output.get("name") == "stderr":
                continue
            if outputs and output["output_type"] == outputs[-1]["output_type"] == "stream":
                outputs[-1]["text"] += output["text"]
            else:
                outputs.append(output)
        cell["outputs"] = outputs
    return nbformat.writes(nbformat.from_dict(plain)) + "\n"


def main() -> None:
    """Execute and save the notebooks named on the command line."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    os.environ.update(SMALL, CUDA_VISIBLE_DEVICES="")
    for name in sys.argv[1:]:
        path = Path(name)
        with tempfile.TemporaryDirectory() as folder:
            os.environ.update(IPYTHONDIR=folder, TORCHINDUCTOR_CACHE_DIR=folder)  # a first run, as readers have it
            text = canonical(execute(path, Path(folder)))
        path.write_text(text, encoding="utf-8")
        print(f"executed and saved: {path}")


if __name__ == "__main__":
    main()
