"""The rules of notebooks: `python tools/lint.py` prints every offence, one a line; tests/test_repository.py wants none.

A lesson teaches, a reference notebook documents a module, an experiment is run by papermill. CONTRIBUTING.md says why.
"""
from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from notebooks import ROOT, carried_address, colab_link, experiments, first_cell, lessons, module_of, modules, notebooks, references

FORBIDDEN = {r"^\s*(from|import)\s+(nbdev|fastcore)": "needs a development tool", r"import \*": "imports *",
             r"^#\|\s*eval:\s*false": "has a cell that is not executed", r"nbdev_export\(": "exports itself"}
FENCED = re.compile(r"^```.*?^```", re.S | re.M)  # code within prose
LINK = re.compile(r"\]\(([\w./-]+\.(?:ipynb|md|svg|png|py|ini|yaml))(?:#[^)]*)?\)")


def code(notebook: nbformat.NotebookNode) -> list[str]:
    """The source of its code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> str:
    """All Markdown of a notebook."""
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def exported(notebook: nbformat.NotebookNode) -> list[str]:
    """The cells that go into the module."""
    return [source for source in code(notebook) if re.search(r"^#\|\s*export", source, re.M)]


def too_long(source: str) -> bool:
    """Whether an exported cell has more than 40 lines; a class, which stays whole, may have 80 and a table of fields."""
    content = [node for node in ast.parse(source).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    lines, most = sum(bool(line.strip()) for line in source.splitlines()), 40
    if len(content) == 1 and isinstance(content[0], ast.ClassDef):
        most = 80 + sum(node.end_lineno - node.lineno + 1 for node in content[0].body if isinstance(node, ast.AnnAssign))
    return lines > most


def every(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What every notebook must be."""
    if path.stat().st_size > 600_000:
        yield "has over 600 KB: draw smaller or fewer pictures"
    for pattern, offence in FORBIDDEN.items():
        if re.search(pattern, "\n".join(code(notebook)), re.M):
            yield offence
    yield from dead_links(path, prose(notebook))


def teaching(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What a lesson or a reference notebook must be."""
    if code(notebook)[0] != first_cell(carried_address()):
        yield "does not begin with the Colab cell of tools/notebooks.py"
    for source in exported(notebook):
        first = next((line for line in source.splitlines() if line and not line.startswith("#|")), "")
        if too_long(source):
            yield f"has an exported cell over 40 lines, or over 80 where it is one class: {first}"
        yield from (f"exports a line over 120 columns: {line.strip()[:60]}…" for line in source.splitlines() if len(line) > 120)


def badge(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What the head of a lesson and of an experiment holds: a link that opens it in Colab."""
    if f"({colab_link(path, carried_address())})" not in notebook.cells[0].source:
        yield "has no Colab badge in its first cell"


def lesson(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What a lesson must be, beside that."""
    if "(glossary.md)" not in notebook.cells[0].source:
        yield "does not link the glossary in its first cell"
    most = 900 if path.stem == "00_start" else 2500
    if (words := len(FENCED.sub("", prose(notebook)).split())) > most or len(notebook.cells) > 60:
        yield f"has {words} words and {len(notebook.cells)} cells; it may have {most} and 60"
    if prose(notebook).count("<summary>") < 3:
        yield "has fewer than three exercises with folded solutions"
    if not any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])):
        yield "shows no picture"


def reference(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What a reference notebook must be, beside that."""
    module = module_of(path)
    if module is None or path.stem != module.replace(".", "_"):
        yield f"exports {module}, whose notebook is called otherwise"
    if not re.match(rf"# {module}\s+> ", notebook.cells[0].source):
        yield "does not begin with `# room.module` and `> one sentence`"
    if (words := len(prose(notebook).split())) > 800:
        yield f"has {words} words; a reference notebook has at most 800"
    if not any(cell.get("outputs") for cell in notebook.cells):
        yield "has no example whose output is kept"


def experiment(path: Path, notebook: nbformat.NotebookNode) -> Iterator[str]:
    """What an experiment must be. Without the tag papermill warns, exits 0, and the defaults overwrite what was passed."""
    if sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) != 1:
        yield "must have one cell tagged parameters"


def dead_links(path: Path, text: str) -> Iterator[str]:
    """Relative links in a text of the file that lead nowhere."""
    yield from (f"links to {link}, which does not exist" for link in LINK.findall(text) if not (path.parent / link).exists())


def map_gaps(root: Path = ROOT) -> Iterator[str]:
    """Lessons and experiments that the front page does not link."""
    index = (root / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    yield from (f"index.ipynb: its map lacks {path.name}" for path in [*lessons(root), *experiments(root)]
                if f"({path.relative_to(root / 'nbs').as_posix()})" not in index)


def orphans(root: Path = ROOT) -> Iterator[str]:
    """Modules without a notebook; nbdev leaves them behind when a notebook is renamed."""
    there = {".".join(path.relative_to(root / "qtseg").with_suffix("").parts)
             for path in (root / "qtseg").rglob("*.py") if not path.name.startswith("_")}
    yield from (f"qtseg.{module}: no notebook exports it" for module in sorted(there - modules(root).keys()))


def problems(root: Path = ROOT) -> list[str]:
    """Every offence, with its file."""
    found = [*map_gaps(root), *orphans(root)]
    kinds = {lesson: lessons(root), reference: references(root), teaching: [*lessons(root), *references(root)],
             badge: [*lessons(root), *experiments(root)], experiment: experiments(root), every: notebooks(root)}
    read = {path: nbformat.read(path, as_version=4) for path in notebooks(root)}
    found += [f"{path.name}: {offence}" for rule, paths in kinds.items() for path in paths for offence in rule(path, read[path])]
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "nbs/glossary.md", "results/README.md"):
        found += [f"{name}: {offence}" for offence in dead_links(root / name, (root / name).read_text(encoding="utf-8"))]
    return sorted(found)


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or 0)
