"""Every lesson and reference notebook runs top to bottom on a fresh kernel, and so does every exercise's folded solution, in its place."""
from __future__ import annotations

import re
from pathlib import Path

import nbformat
import notebooks as tool
import pytest
from conftest import ROOT
from nbclient import NotebookClient

SOLUTION = re.compile(r"<details>(.*?)</details>", re.S)
FENCE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def with_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with each solution as a code cell right after the exercise that it belongs to."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            blocks = [code for solution in SOLUTION.findall(cell.source) for code in FENCE.findall(solution)]
            cells += [nbformat.v4.new_code_cell(code) for code in blocks]
    notebook.cells = cells
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run a notebook in a fresh kernel, started in `folder`."""
    NotebookClient(notebook, timeout=300, startup_timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.parametrize("lesson", tool.lessons(), ids=lambda path: path.stem)
def test_lesson_and_its_solutions_run(lesson):
    notebook = nbformat.read(lesson, as_version=4)
    before = len(notebook.cells)
    notebook = with_solutions(notebook)
    assert len(notebook.cells) >= before + 3, "at least three exercises with solutions that run"
    execute(notebook, ROOT / "nbs")


@pytest.mark.parametrize("notebook", tool.references(), ids=lambda path: path.stem)
def test_reference_runs(notebook):
    execute(nbformat.read(notebook, as_version=4), notebook.parent)
