"""The skeleton cannot rot: what is derived equals its source, and what is published is what was meant."""
from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import audit
import lint
import nbformat
import notebooks as tool
import pytest
import results
from conftest import ROOT

import qtseg
from qtseg.study.plan import read_study
from qtseg.study.runs import require_same_values, study_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODULES = sorted(path for path in (ROOT / "qtseg").rglob("*.py") if not path.name.startswith("_"))
LAYERS = [{"files", "colors"}, {"data"}, {"network"}, {"training", "evaluation"}, {"prediction"}, {"study", "view"}, {"cli"}]  # left to right
INI = tool.settings()


def dotted(path: Path) -> str:
    """The name of a module below the package: `network.blocks`."""
    return ".".join(path.relative_to(ROOT / "qtseg").with_suffix("").parts)


def test_notebooks_follow_the_rules():
    problems = lint.problems()
    assert not problems, "\n".join(problems)


def test_what_is_derived_equals_its_source(tmp_path):
    """Modules, clean notebooks, links and first cells: derived again in a copy, they are what they were.

    The address is the one that the notebooks carry: in a new fork, or where `origin` is a folder, it is not that of the remote.
    """
    for name in ("nbs", "qtseg"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    tool.write_address(tool.carried_address(), tmp_path)
    tool.drop_widget_state(tmp_path)
    tool.run("nbdev_export", tmp_path)
    tool.run("nbdev_clean", tmp_path)
    derived = [*(ROOT / "qtseg").rglob("*.py"), *tool.notebooks()]
    stale = [path.name for path in derived if path.read_bytes() != (tmp_path / path.relative_to(ROOT)).read_bytes()]
    assert not stale, f"run `make sync`: {', '.join(stale)}"
    assert (ROOT / "README.md").read_text(encoding="utf-8") == tool.render_readme(), "run `make sync`"


def test_public_names_are_few():
    """`__all__` holds what a lesson, the front page or an example imports, and no plumbing (`#| exporti`)."""
    names = [name for path in MODULES for node in ast.parse(path.read_text(encoding="utf-8")).body
             if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for name in ast.literal_eval(node.value)]
    assert 100 < len(names) <= 160, len(names)


def test_tables_of_results_are_shown_as_they_were_measured():
    index = "\n".join(cell.source for cell in nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells)
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert results.table(results.SHORT) in index, "run `make sync`"
    assert all(table in page for table in (results.table(), results.paper_table(), results.study_table(), results.speed_table())), "run `make sync`"
    for path in (ROOT / "results").glob("*/**/*"):
        of_study = path.parts[-3] == "runs" and path.name in results.RUN or path.match("runs/study.json") or path.match("results/annotation_study/*.json")
        assert path.is_dir() or of_study or any(path.parent.parent == ROOT / place and path.name in kept for place, kept in results.KINDS.values()), f"{path} is not a number or a curve: pictures of data sets stay out"


def test_runs_of_a_published_study_go_on_from_what_was_kept(tmp_path):
    """`tools/results.py` keeps of a report what `qtseg study` and the report need to go on with the other runs."""
    study = read_study({"study": "tiny", "question": "?", "common": {"data": "phantoms:all:40", "size": 32}, "arms": {"a": {}, "b": {"decoder": "conv"}},
                             "reference": "a", "seeds": [1, 2]})
    report = tmp_path / "report/tiny"
    report.mkdir(parents=True)
    for name in results.KINDS["report.json"][1]:
        (report / name).write_text("")
    runs = [tmp_path / "runs/tiny" / run.name for run in study.runs()]
    (report / "report.json").write_text(json.dumps({"runs": [{"folder": str(run), "state": "done" if run is runs[0] else "waiting"} for run in runs]}))
    for run in runs[:2]:
        run.mkdir(parents=True)
    metrics = json.loads((ROOT / "results/bkai_lite0/metrics.json").read_text(encoding="utf-8"))
    metrics["config"] = study.config(study.runs()[0], tmp_path / "runs").to_dict()
    for name, text in {"run.json": json.dumps(dataclasses.asdict(study.runs()[0])), "history.csv": "epoch\n1\n",
                       "metrics.json": json.dumps(metrics), "best_dice": "large"}.items():
        (runs[0] / name).write_text(text)
    (tmp_path / "runs/tiny/study.json").write_text(json.dumps(study.to_dict()))
    kept = results.keep(report, tmp_path) / "runs"
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*.*")) == sorted(["study.json", *(f"{runs[0].name}/{name}" for name in results.RUN)])
    shutil.copytree(kept, tmp_path / "again/tiny")
    assert [row["state"] for row in study_table(study, tmp_path / "again")] == ["done", "waiting", "waiting", "waiting"]
    again = study.config(study.runs()[0], tmp_path / "again")
    require_same_values(again)
    with pytest.raises(ValueError, match=r"holds a run with other values \(lr: 0.001 -> 0.5\)"):
        require_same_values(again.replace(lr=0.5))


def test_the_front_page_fits_on_a_screen_or_two():
    """Under 900 words of visible text: without pictures, link targets, comments and the rules of tables."""
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|^[\s|:-]+$", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S | re.M)
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).translate(str.maketrans("|#*`·", "     ")).split()
    assert len(words) < 900, len(words)


@pytest.mark.parametrize(("remote", "owner"), [
    ("https://github.com/ann/my.seg", "ann/my.seg"), ("https://github.com/ann/seg.git", "ann/seg"), ("https://github.com/ann/seg/", "ann/seg"),
    ("https://ann:secret@github.com/ann/seg.git", "ann/seg"), ("git@github.com:ann/seg.git", "ann/seg"), ("ssh://git@github.com/ann/seg.git", "ann/seg"),
    ("/srv/git/seg.git", None), ("https://gitlab.com/ann/seg.git", None), ("https://example.com/github.com/ann/seg.git", None), (None, None)])
def test_the_address_comes_from_the_remote_if_it_is_on_github(tmp_path, remote, owner):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for command in (["init", "--quiet"], ["remote", "add", "origin", remote]):
        if remote or command[0] == "init":
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert tool.address(tmp_path) == f"{owner or INI['user'] + '/' + INI['repo']}/blob/{INI['branch']}"


def test_a_fork_gets_its_own_badges_and_first_cells(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    tool.write_address("ann/my.seg/blob/dev", tmp_path)
    assert tool.carried_address(tmp_path) == "ann/my.seg/blob/dev"
    for path in tool.notebooks(tmp_path):
        text = path.read_text(encoding="utf-8")
        assert {found[1] for found in tool.COLAB.findall(text)} <= {"ann/my.seg/blob/dev"}
        assert path.name == "index.ipynb" or "git+https://github.com/ann/my.seg@dev" in text
    assert "(https://colab.research.google.com/github/ann/my.seg/blob/dev/nbs/00_start.ipynb)" in tool.render_readme(tmp_path)


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


def test_a_module_imports_its_own_room_or_those_to_the_left():
    layer = {room: place for place, rooms in enumerate(LAYERS) for room in rooms}
    wrong = []
    for path in MODULES:
        for base, name in imports(path):
            if (base, name) != ("", "__version__") and layer[base.split(".")[0]] > layer[dotted(path).split(".")[0]]:
                wrong.append(f"{dotted(path)} imports {base}, which stands to its right")
            if name.startswith("_") and name != "__version__":
                wrong.append(f"{dotted(path)} imports {base}.{name}, which is private")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_a_detour():
    graph = {dotted(path): {base for base, _ in imports(path) if base} for path in MODULES}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these modules import each other in a circle: {sorted(graph)}"


def test_modules_are_short():
    assert not [dotted(path) for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > 400]


def test_the_names_that_people_need_come_from_the_package_itself():
    wanted = {"QTSeg", "load_official", "pretrained", "TrainConfig", "fit", "evaluate", "Predictor", "SegmentationData", "phantom", "show_masks"}
    assert set(qtseg.__all__) == wanted and all(callable(getattr(qtseg, name)) for name in wanted)


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
    weights = [path for path in (ROOT / "qtseg" / "weights").rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in [*(ROOT / "qtseg").rglob("*.py"), *(ROOT / "qtseg" / "web").iterdir(), *weights]}
    assert {name for name in names if name.startswith("qtseg/")} == wanted and sum(path.stat().st_size for path in weights) <= 6e6


def test_runtime_requirements_resolve_in_colab(tmp_path):
    """Python 3.13 with the package versions that Colab ships: nothing may force those up or down."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.13", "--constraint",
               str(ROOT / "tests" / "colab_pins.txt"), "--output-file", str(tmp_path / "resolved.txt"), "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and re.search(r"failed to fetch|error sending request|dns error|connect", done.stderr, re.I):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "torch==2.11.0" in (tmp_path / "resolved.txt").read_text()
