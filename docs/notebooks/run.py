"""Runs notebooks in a folder of their own and stores what their cells print.

python docs/notebooks/run.py                    every notebook beside this file
python docs/notebooks/run.py quickstart.ipynb   some of them
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SECONDS = 600
"""The longest that a cell may take."""


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in ``folder``. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for !trimtab
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would change with every run
        if cell.cell_type == "code":  # what libraries say on the side names folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(names: list[str]) -> None:
    """Run the named notebooks, or all, and write them back."""
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        # Beside the checkout's own folders, since the quickstart looks for examples/ above it.
        with tempfile.TemporaryDirectory(dir=HERE, prefix=".run-") as folder:
            nbformat.write(run(path, Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
