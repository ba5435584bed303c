"""The skeleton cannot rot: what is derived equals its source, and what is published is what was meant."""
from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import audit
import nbformat
import notebooks as tool
import pytest
import results
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LESSONS = tool.lessons()
REFERENCES = tool.references()
NOTEBOOKS = tool.notebooks()
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
MODULES = sorted(path for path in (ROOT / "qtseg").rglob("*.py") if not path.name.startswith("_"))
LAYERS = [{"files", "colors"}, {"data"}, {"network"}, {"training", "evaluation"}, {"prediction"}, {"study", "view"}, {"cli"}]  # left to right
INI = tool.settings()


def by_name(path: Path) -> str:
    return path.name


def dotted(path: Path) -> str:
    """The name of a module below the package: `network.blocks`."""
    return ".".join(path.relative_to(ROOT / "qtseg").with_suffix("").parts)


@pytest.fixture(scope="module")
def derived_anew(tmp_path_factory) -> Path:
    """A copy of the repository in which everything derived has been derived again."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "qtseg"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", copy)
    tool.write_address(copy)
    tool.drop_widget_state(copy)
    tool.run("nbdev_export", copy)
    tool.run("nbdev_clean", copy)
    return copy


@pytest.mark.parametrize("module", [*MODULES, ROOT / "qtseg" / "__init__.py", ROOT / "qtseg" / "_modidx.py"], ids=dotted)
def test_module_is_what_its_notebook_exports(derived_anew, module):
    assert module.read_text(encoding="utf-8") == (derived_anew / module.relative_to(ROOT)).read_text(encoding="utf-8"), (
        f"{dotted(module)} differs from its notebook: edit the notebook and run `make sync`")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
def test_notebook_is_clean_small_and_addressed(derived_anew, notebook):
    assert notebook.read_text(encoding="utf-8") == (derived_anew / notebook.relative_to(ROOT)).read_text(encoding="utf-8"), (
        f"{notebook.name} is not clean, or its links do not follow settings.ini: run `make sync`")
    assert notebook.stat().st_size <= 600_000, f"{notebook.name} is over 600 KB: draw smaller or fewer pictures"


def test_every_module_has_a_notebook_and_every_reference_a_module():
    assert sorted(tool.modules()) == sorted(map(dotted, MODULES))
    assert all(tool.module_of(path) == path.stem.replace("_", ".", 1) or tool.module_of(path) == path.stem for path in REFERENCES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
def test_notebook_needs_no_development_tool(notebook):
    code = "\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code")
    for forbidden in (r"^\s*(from|import)\s+(nbdev|fastcore)", r"import \*", r"^#\|\s*eval:\s*false", r"nbdev_export\("):
        assert not re.search(forbidden, code, re.M), f"{notebook.name} contains {forbidden}"


@pytest.mark.parametrize("lesson", [*LESSONS, *REFERENCES], ids=by_name)
def test_first_code_cell_makes_the_chapter_run_in_colab(lesson):
    first = next(cell for cell in nbformat.read(lesson, as_version=4).cells if cell.cell_type == "code")
    assert first.source == tool.FIRST_CELL.format(user=INI["user"], repo=INI["repo"], branch=INI["branch"])


def too_long(source: str) -> bool:
    """An exported cell holds 40 lines at most; a class, which is not torn apart, 80."""
    content = [node for node in ast.parse(source).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    whole_class = len(content) == 1 and isinstance(content[0], ast.ClassDef)
    return sum(bool(line.strip()) for line in source.splitlines()) > (80 if whole_class else 40)


@pytest.mark.parametrize("lesson", LESSONS, ids=by_name)
def test_chapter_has_the_parts_of_a_lesson(lesson):
    cells = nbformat.read(lesson, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    exported = [cell.source for cell in cells if cell.cell_type == "code" and re.search(r"^#\|\s*export", cell.source, re.M)]
    assert prose.count("<summary>") >= 3, "at least three exercises with folded solutions"
    assert any("image/png" in str(output.get("data", {}).keys()) for cell in cells for output in cell.get("outputs", []))
    assert not [source for source in exported if too_long(source)], "an exported cell over 40 lines, or over 80 where it is one class"


@pytest.mark.parametrize("notebook", REFERENCES, ids=by_name)
def test_reference_is_a_page_with_examples(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    exported = [cell.source for cell in cells if cell.cell_type == "code" and re.search(r"^#\|\s*export", cell.source, re.M)]
    assert len(prose.split()) <= 800, "a reference is a page of prose"
    assert any(cell.get("outputs") for cell in cells), "its examples keep their outputs"
    assert not [source for source in exported if too_long(source)], "an exported cell over 40 lines, or over 80 where it is one class"


@pytest.mark.parametrize("notebook", EXPERIMENTS or [pytest.param(None, marks=pytest.mark.skip(reason="no experiment notebook yet"))])
def test_experiment_has_a_parameters_cell(notebook):
    """Without the tag papermill warns, exits 0, and the notebook's defaults overwrite what was passed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1


def test_readme_is_the_rendered_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == tool.render_readme(), "run `make sync`"


def test_relative_links_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *NOTEBOOKS]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":  # what a cell prints is no link of the lesson
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([^)#:\s\\]+?)(?:#[^)]*)?\)", text):
            if re.fullmatch(r"[\w./-]+\.(ipynb|md|svg|png|py|ini)", link):
                assert (path.parent / link).exists(), f"{path.name} links to {link}, which does not exist"


def test_results_stand_on_the_front_page_as_they_were_measured():
    index = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    for row in [line for table in (results.table(), results.study_table(), results.speed_table()) for line in table.splitlines()]:
        assert json.dumps(row, ensure_ascii=False)[1:-1] in index, "run `make sync`"
    for path in (ROOT / "results").rglob("*"):
        assert path.is_dir() or any(path.parent.parent == ROOT / place and path.name in kept for place, kept in results.KINDS.values()), f"{path} is not a number or a curve: pictures of data sets stay out"


def test_the_map_names_every_chapter():
    index = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    for lesson in LESSONS:
        assert f"({lesson.name})" in index and tool.colab_link(lesson) in index, f"index.ipynb's map lacks {lesson.name}"


def test_pyproject_and_settings_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == INI["lib_name"]
    assert project["description"] == INI["description"]
    assert project["requires-python"] == f">={INI['min_python']}"
    assert sorted(project["dependencies"]) == sorted(INI["requirements"].split())
    extras = project["optional-dependencies"]
    assert sorted(extras["dev"]) == sorted(INI["dev_requirements"].split())
    assert {requirement for name in extras for requirement in extras[name]} == set(extras["dev"]), "dev holds what every other extra asks for"
    assert sorted(f"{name}={place}" for name, place in project["scripts"].items()) == sorted(INI["console_scripts"].split())
    address = f"https://github.com/{INI['user']}/{INI['repo']}"
    assert f'repository-code: "{address}"' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {INI['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a module imports from this package, as `network.blocks`, `C2f`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "qtseg"):
            above = dotted(path).split(".")[:-node.level] if node.level else []
            base = ".".join([*above, *((node.module or "").split(".") if node.level else node.module.split(".")[1:])]).strip(".")
            for alias in node.names:
                yield base, alias.name


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_its_own_room_or_those_to_the_left(path):
    layer = {room: place for place, rooms in enumerate(LAYERS) for room in rooms}
    for base, name in imports(path):
        if (base, name) != ("", "__version__"):
            assert layer[base.split(".")[0]] <= layer[dotted(path).split(".")[0]], f"{dotted(path)} imports {base}, which stands to its right"
            assert not name.startswith("_"), f"{dotted(path)} imports {base}.{name}, which is private"


def test_no_module_imports_itself_by_a_detour():
    graph = {dotted(path): {base for base, _ in imports(path) if base} for path in MODULES}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these modules import each other in a circle: {sorted(graph)}"


def test_modules_are_short():
    assert not [dotted(path) for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 400]


def test_no_undefined_names():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "E9,F63,F7,F82,F401", "qtseg", "tools", "tests", "data_scripts",
                           "--exclude", "_modidx.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_unsafe_code():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "S", "qtseg", "tools", "data_scripts", "--exclude", "_modidx.py"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_audit_without_answers_is_not_clean():
    sound, unknown = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    bad = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    assert audit.judge([unknown]) == audit.judge([]) and audit.judge([])[1] == 2
    assert audit.judge([sound])[1] == 0 and audit.judge([sound, unknown])[1] == 0 and "b" in audit.judge([sound, unknown])[0][0]
    assert audit.judge([sound, bad])[1] == 1 and "CVE-1" in audit.judge([sound, bad])[0][0]


def test_import_needs_only_the_runtime_requirements():
    modules = ", ".join(f"qtseg.{dotted(path)}" for path in MODULES)
    code = (f"import sys, qtseg, {modules}; heavy = {{'segmentation_models_pytorch', 'mlflow', 'matplotlib', 'ipywidgets', "
            "'torchvision', 'kaggle', 'nbdev', 'fastcore', 'timm', 'pandas', 'dask', 'distributed', 'papermill', 'yaml', 'scipy', 'statsmodels'}; "
            "print(sorted(heavy & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_only_the_package(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", "build", "*.egg-info", "runs"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                           str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names} == {"qtseg", f"qtseg-{INI['version']}.dist-info"}
    assert {name for name in names if name.startswith("qtseg/")} == {path.relative_to(ROOT).as_posix() for path in (ROOT / "qtseg").rglob("*.py")}


def test_runtime_requirements_resolve_in_colab(tmp_path):
    """Python 3.13 with the package versions that Colab ships: nothing may force those up or down."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.13", "--constraint",
               str(ROOT / "tests" / "colab_pins.txt"), "--output-file", str(tmp_path / "resolved.txt"), "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and re.search(r"failed to fetch|error sending request|dns error|connect", done.stderr, re.I):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "torch==2.11.0" in (tmp_path / "resolved.txt").read_text()
