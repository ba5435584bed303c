"""Keep everything that is derived from the notebooks true to them: `python tools/notebooks.py`, or `make sync`.

Writes the repository's address into every Colab link and first cell, and the tables of results/ into the front page and into
results/README.md. Exports the modules, cleans the notebooks, and renders nbs/index.ipynb to README.md. tests/test_repository.py runs
the same functions on a copy.
"""
from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import results
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
FIRST_CELL = '''# In Colab this installs QTSeg; where it is installed already, it does nothing.
import importlib.util
if importlib.util.find_spec("qtseg") is None:
    %pip install --quiet "qtseg @ git+https://github.com/{user}/{repo}@{branch}"'''


GITHUB = re.compile(r"(?:https?://(?:[^/@]+@)?|ssh://git@|git@)github\.com(?::\d+)?[:/]([\w.-]+)/([\w.-]+?)(?:\.git)?/?")
COLAB = re.compile(r"(colab\.research\.google\.com/github)/([\w.-]+/[\w.-]+/blob/[\w.-]+)/")


def settings(root: Path = ROOT) -> configparser.SectionProxy:
    """The one place where version and requirements stand, and owner, repository and branch for a copy without a remote on GitHub."""
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks(root: Path = ROOT) -> list[Path]:
    """Every notebook of the repository."""
    return sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def lessons(root: Path = ROOT) -> list[Path]:
    """The numbered notebooks, in order: the course. Those that teach a module export it."""
    return [path for path in notebooks(root) if path.parent == root / "nbs" and re.match(r"\d\d_", path.name)]


def references(root: Path = ROOT) -> list[Path]:
    """The engine room: each notebook exports a module that no lesson teaches, and explains on a page what it does."""
    return [path for path in notebooks(root) if path.parent == root / "nbs" / "reference"]


def experiments(root: Path = ROOT) -> list[Path]:
    """The notebooks that papermill runs."""
    return [path for path in notebooks(root) if path.parent == root / "nbs" / "experiments"]


def module_of(path: Path) -> str | None:
    """The module that a notebook exports, as `network.blocks`; None if it exports none."""
    cells = nbformat.read(path, as_version=4).cells
    found = (re.match(r"#\|\s*default_exp ([\w.]+)", cell.source) for cell in cells if cell.cell_type == "code")
    return next((match[1] for match in found if match), None)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Each exported module, with its notebook."""
    return {module: path for path in [*lessons(root), *references(root)] if (module := module_of(path))}


def address(root: Path = ROOT) -> str:
    """`owner/repository/blob/branch`: owner and repository of the git remote `origin` if it is on GitHub, else of settings.ini."""
    ini, url, git = settings(root), "", shutil.which("git")
    if git and (root / ".git").exists():  # without .git here, git would ask a repository around this folder
        url = subprocess.run([git, "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True).stdout.strip()
    owner, repository = found.groups() if (found := GITHUB.fullmatch(url)) else (ini["user"], ini["repo"])
    return f"{owner}/{repository}/blob/{ini['branch']}"


def carried_address(root: Path = ROOT) -> str:
    """The address that the notebooks carry now: that of lesson 0. In a new fork it is still that of the original."""
    return COLAB.search(lessons(root)[0].read_text(encoding="utf-8"))[2]


def colab_link(path: Path, where: str, root: Path = ROOT) -> str:
    """Where Colab opens a notebook of the repository at an address."""
    return f"https://colab.research.google.com/github/{where}/{path.relative_to(root).as_posix()}"


def first_cell(where: str) -> str:
    """The first code cell of every notebook for an address."""
    user, repo, _, branch = where.split("/")
    return FIRST_CELL.format(user=user, repo=repo, branch=branch)


def write_address(where: str, root: Path = ROOT) -> None:
    """Put an address into Colab links and into the notebooks' first code cells."""
    for path in notebooks(root):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.source = COLAB.sub(rf"\g<1>/{where}/", cell.source)
        first = next((cell for cell in notebook.cells if cell.cell_type == "code"), None)
        if first is not None and "find_spec(\"qtseg\")" in first.source:
            first.source = first_cell(where)
        nbformat.write(notebook, path)


def drop_widget_state(root: Path = ROOT) -> None:
    """Take executed widgets out of the outputs: without their kernel JupyterLab shows "model not found" above the still picture."""
    for path in notebooks(root):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        nbformat.write(notebook, path)


def write_results(root: Path = ROOT) -> None:
    """Put the tables of results/ into the front page and into results/README.md, each between its two marks."""
    def filled(text: str, tables: dict[str, str]) -> str:
        for mark, table in tables.items():
            text = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.S)
        return text

    path, page = root / "nbs" / "index.ipynb", root / "results" / "README.md"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = filled(cell.source, {"results": results.table(results.SHORT, root)})
    nbformat.write(notebook, path)
    tables = {"results": results.table(results.LONG, root), "paper": results.paper_table(root), "studies": results.study_table(root), "speed": results.speed_table(root)}
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def render_readme(root: Path = ROOT) -> str:
    """nbs/index.ipynb as Markdown, its relative links rewritten to start from the repository's root."""
    body, _ = MarkdownExporter().from_filename(str(root / "nbs" / "index.ipynb"))
    body = re.sub(r"(\]\(|(?:src|href)=\")(?![a-z]+:|#|/)([^)\"]+)", lambda found: found[1] + _from_root(found[2]), body)
    return "<!-- Rendered from nbs/index.ipynb by `make sync`; edit that. -->\n\n" + body.strip() + "\n"


def _from_root(link: str) -> str:
    """A link relative to nbs/ as a link relative to the root."""
    return link[3:] if link.startswith("../") else f"nbs/{link}"


def run(command: str, root: Path) -> None:
    """An nbdev command in a repository, with its output shown only when it fails."""
    done = subprocess.run([str(Path(sys.executable).with_name(command))], cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed in {root}:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Bring everything derived up to date."""
    write_address(address())
    drop_widget_state()
    write_results()
    run("nbdev_export", ROOT)
    run("nbdev_clean", ROOT)
    (ROOT / "README.md").write_text(render_readme(), encoding="utf-8")
    print(f"Exported {len(modules())} modules, cleaned {len(notebooks())} notebooks, rendered README.md")


if __name__ == "__main__":
    main()
