"""The book lists what there is, and its check of links finds dead ones. `make site` builds it; no test does."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import notebooks as tool

from conftest import ROOT

SITE = ROOT / "site"


def listed(page: str) -> set[Path]:
    """The files that a page's tables of contents name."""
    trees = re.findall(r"```{toctree}\n(.*?)```", (SITE / page).read_text(encoding="utf-8"), re.S)
    entries = [entry.strip() for tree in trees for entry in tree.splitlines() if entry and not entry.startswith(":")]
    return {path for entry in entries for path in ROOT.glob(f"{entry.lstrip('/')}.ipynb")}


def test_the_book_holds_every_notebook():
    there = {ROOT / "nbs" / "index.ipynb"}.union(*map(listed, ("contents.md", "reference.md", "experiments.md")))
    missing = set(tool.notebooks()) - there
    assert not missing, f"site/contents.md lacks {sorted(path.name for path in missing)}"


def test_the_api_lists_every_module_with_public_names():
    public = set()
    for path in (ROOT / "qtseg").rglob("[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if ast.unparse(node).startswith("__all__ = ['"):
                public.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    page = (SITE / "api.rst").read_text(encoding="utf-8")
    assert set(re.findall(r"^   (qtseg\.[\w.]+)$", page, re.M)) == public


def test_dead_links_are_found(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="#gone"></a><img src="below/gone.png">'
        '<a href="below/page.html?q=1#one%20two"></a><a href="https://example.com/gone">x</a>')
    (tmp_path / "below" / "page.html").write_text(
        '<p id="one two"><a href="../index.html#top"></a><a href="../gone.html"></a><a href="."></a>')
    done = subprocess.run([sys.executable, str(SITE / "links.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["below/page.html: .", "below/page.html: ../gone.html",
                                        "index.html: #gone", "index.html: below/gone.png"]
