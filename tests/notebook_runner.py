"""Executes one notebook as `nbdev_test` does; a module of its own, so that a process that imports it imports little else."""
from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from nbdev.test import test_nb as execute


def failure(path: Path) -> str:
    """Execute a notebook in this process; the traceback of the cell that failed, or an empty text."""
    with redirect_stderr(StringIO()) as said:
        passed, _ = execute(path)
    return "" if passed else said.getvalue() or "it failed without a traceback"
