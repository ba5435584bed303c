"""Every lesson, reference notebook and folded solution runs top to bottom.

Each runs as `nbdev_test` runs it, in a process of its own that is forked from one that has imported PyTorch: as separate as a kernel, without the
seconds that a kernel takes to start. Real kernels run the experiments (papermill) and the widgets (JupyterLab and Voilà).
"""
from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import notebook_runner
import notebooks as tool
import pytest

SOLUTION = re.compile(r"<details>(.*?)</details>", re.S)
FENCE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
IMPORTED = ["IPython", "execnb.shell", "matplotlib_inline.backend_inline", "nbdev.test", "qtseg.cli", "qtseg.training.distributed",
            "qtseg.training.loop", "qtseg.prediction.predictor", "qtseg.view.token_explorer", "matplotlib.pyplot", "numpy.testing", "PIL.Image",
            "torch._dynamo"]  # the first optimizer and the first network without memory (device "meta") import it: two seconds


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


def assert_runs(notebook: Path) -> None:
    """Execute a notebook in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(1, mp_context=context) as process:
        failed = process.submit(notebook_runner.failure, notebook).result(timeout=300)
    assert not failed, failed


@pytest.mark.parametrize("lesson", tool.lessons(), ids=lambda path: path.stem)
def test_lesson_and_its_solutions_run(lesson, tmp_path):
    notebook = nbformat.read(lesson, as_version=4)
    before = len(notebook.cells)
    notebook = with_solutions(notebook)
    assert len(notebook.cells) >= before + 3, "at least three exercises with solutions that run"
    nbformat.write(notebook, tmp_path / lesson.name)
    assert_runs(tmp_path / lesson.name)


@pytest.mark.parametrize("notebook", tool.references(), ids=lambda path: path.stem)
def test_reference_runs(notebook):
    assert_runs(notebook)
