"""A study keeps its promises: checked before anything runs, nothing lost, nothing run twice to completion, clear ends."""
from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import nbformat
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, refused_parameters, run_notebook
from distributed import LocalCluster, Security
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook

from qtseg.study import cluster as study_cluster, sweep as study_sweep
from qtseg.study.cluster import connected_client, local_client, slurm_client
from qtseg.study.plan import Run, read_study
from qtseg.study.runs import run_arm, study_table
from qtseg.cli import main
from qtseg.files.yaml import read_yaml
from qtseg.study.sweep import find_notebooks, run_study
from qtseg.training.loss_names import weighted_loss
from qtseg.training.config import TrainConfig

STUDIES = sorted((ROOT / "nbs" / "experiments" / "studies").glob("*.yaml"))
TINY = {"study": "tiny", "question": "Does it run?", "reference": "plain", "seeds": [1, 2], "arms": {"plain": {}, "heads": {"heads": 4}},
        "common": {"data": "phantoms:dermoscopy:24", "size": 32, "width": 4, "depths": [1, 1, 1], "mlp_width": 16, "epochs": 2, "batch": 4,
                   "device": "cpu", "progress": False}}


# the study file

@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_can_be_run(path):
    study = read_study(path)
    assert study.name == path.stem and study.question.endswith("?")
    names = [study.config(run, "runs").name for run in study.runs()]
    assert len(set(names)) == len(names) == len(study.arms) * len(study.seeds) * len(study.folds or [None])
    assert set(find_notebooks(study)) == set(study.arms)
    for arm in study.arms:
        config = study.config(Run(arm, study.seeds[0]))
        assert weighted_loss(config.losses)(torch.zeros(1, config.classes, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64)) > 0


def test_every_question_of_the_plan_has_its_file():
    assert {path.stem for path in STUDIES} >= {"bridge_decoder", "depth", "heads", "mlp_width", "position", "resize", "color", "loss", "augmentation",
                                               "width", "size", "encoder_frozen", "baselines", "phantoms_quick", "isic2018_128"}


def test_runs_are_every_arm_seed_and_fold_and_the_first_seed_comes_first():
    study = read_study(TINY | {"folds": [0, 2], "folds_of": 3})
    names = [run.name for run in study.runs()]
    assert names[:4] == ["plain-seed1-fold0", "heads-seed1-fold0", "plain-seed1-fold2", "heads-seed1-fold2"] and len(names) == 8
    config = study.config(Run("heads", 2, 2), "somewhere")
    assert (config.heads, config.seed, config.fold, config.folds, config.resume) == (4, 2, 2, 3, True)
    assert config.folder == Path("somewhere/tiny/heads-seed2-fold2")
    assert read_study(study.to_dict()) == study


def test_a_grid_is_a_product_with_speaking_names():
    study = read_study({key: value for key, value in TINY.items() if key != "arms"} | {
        "grid": {"heads": [4, 8], "depths": [[1, 1, 1], [1, 2, 3]]}, "reference": "heads=8,depths=1-2-3"})
    assert list(study.arms) == ["heads=4,depths=1-1-1", "heads=4,depths=1-2-3", "heads=8,depths=1-1-1", "heads=8,depths=1-2-3"]


@pytest.mark.parametrize("changes, said", [
    ({"sedes": [1]}, "sedes is an unknown key"), ({"seeds": None}, "seeds is missing"),
    ({"seeds": [1, "2", True]}, "seeds.1 should be a valid integer, not '2'; seeds.2 should be a valid integer, not True"),
    ({"seeds": [1, 1]}, "seeds lists a number twice"), ({"folds": []}, "folds lists at least one"), ({"seeds": [-1]}, "greater than or equal to 0, not -1"),
    ({"reference": "none"}, "reference names the arm 'none'"), ({"reference": None}, "reference is missing"),
    ({"arms": {}}, "arms (or a grid) are missing"), ({"arms": [1]}, "arms should be a valid dictionary, not [1]"),
    ({"arms": {"plain": {"epoch": 1}}}, "unknown configuration keys: epoch"), ({"arms": {"plain": {"lr": "fast"}}}, "the arm plain: "),
    ({"arms": {"plain": {}, "same": {"heads": 8}}}, "the arms plain and same are alike"),
    ({"arms": {"plain": {}, "a/b": {"heads": 4}}}, "arms.a/b needs a name"), ({"arms": {"plain": {}, 8: {"heads": 4}}}, "arms.8 should be a valid string"),
    ({"arms": {"plain": {"seed": 3}}}, "the arm plain sets seed, which the study decides"), ({"study": "a/b"}, "study needs a name of at most 100"),
    ({"arms": {"plain": {}, "Plain": {"heads": 4}}}, "nothing but capitals"), ({"grid": {"heads": 4}}, "grid.heads should be a valid list, not 4"),
    ({"grid": {"heads": []}}, "grid.heads is empty"), ({"arms": {"plain": None}, "grid": {"heads": [2, 4]}, "reference": "heads=3"}, "names the arm 'heads=3'"),
])
def test_what_is_wrong_is_said_with_the_files_name(tmp_path, changes, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (TINY | changes).items() if value is not None}))
    with pytest.raises(ValueError) as caught:
        read_study(path)
    assert said in str(caught.value) and "mine.yaml" in str(caught.value)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as caught:
        read_study(TINY | {"arms": {"plain": {"epochs": 0}, "other": {"width": "wide"}, "third": {"runs": "x"}}, "reference": "none"})
    assert all(word in str(caught.value) for word in ("third sets runs", "reference"))
    with pytest.raises(ValueError) as caught:
        read_study(TINY | {"arms": {"plain": {"epochs": 0}, "other": {"width": "wide"}}})
    assert all(word in str(caught.value) for word in ("epochs is a whole number from 1 to 1000000, not", "width is a whole number"))


@pytest.mark.parametrize("changes, said", [
    ({"arms": {"plain": {}, "..": {"heads": 4}}}, "arms... needs a name"),
    ({"arms": {"plain": {}, "a\x1b[2J": {"heads": 4}}}, r"arms.'a\x1b[2J' needs a name"),
    ({"arms": {"plain": {}, "a" * 101: {"heads": 4}}}, "needs a name of at most 100"),
    ({"study": "../tiny"}, "study needs a name of at most 100"), ({"\x1b[2J": 1}, r"'\x1b[2J' is an unknown key"),
    ({"grid": {"data": ["../../elsewhere"]}}, "the grid's arm 'data=../../elsewhere' needs a name"),
    ({"grid": {"heads": [2, 2]}}, "the grid lists a value twice"), ({"grid": {"data": [True, "true"]}}, "the grid lists a value twice"),
    ({"grid": {f"k{number}": [1, 2] for number in range(20_000)}}, "the grid has more than 1,000 arms"),
    ({"arms": {f"a{number}": {} for number in range(1001)}, "reference": "a1"}, "more than 1,000 arms or 10,000 runs"),
    ({"seeds": list(range(6000))}, "more than 1,000 arms or 10,000 runs"), ({"seeds": [10**4000]}, "seeds.0 should be less than or equal to"),
    ({"arms": {"plain": {1: 2, "heads": 4}}}, "arms.plain.1 should be a valid string"), ({8: 1}, "8 is no text"),
    ({"arms": {f"a{number}": [number] for number in range(30)}}, "and 20 more"), ({"question": ["why"] * 10**6}, "question should be a valid string"),
    ({"arms": {"plain": {}, "lr": {"lr": 2e-3}, "LR1": {"lr": 0.002}}}, "the arms lr and LR1 are alike"),
])
def test_a_study_from_a_stranger_is_refused_in_a_sentence(changes, said):
    with pytest.raises(ValueError) as caught:
        read_study(TINY | changes)
    text = str(caught.value)
    assert said in text and len(text) < 3000 and text.isprintable()


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{number}: &a{number} [*a{number - 1}, *a{number - 1}]\n" for number in range(1, 40))


@pytest.mark.parametrize("name, text", [
    ("study.yaml", LAUGHS), ("study.yaml", LAUGHS.replace("[x, x]", "{x: 1}").replace(": &a", ": &a").replace("[*", "{<<: [*").replace("]\n", "]}\n")),
    ("study.yaml", "a: &a [*a]"), ("study.yaml", "a: " + "[" * 3000), ("study.yaml", "a: " + "9" * 5000), ("study.yaml", "a: \x07"),
    ("study.json", '{"a": ' + "[" * 100_000), ("study.json", '{"a": ' + "9" * 5000 + "}"), ("study.json", "[1]"), ("study.json", ""),
    *(("study.json", json.dumps(TINY | {"arms": None}) .replace('"arms": null', f'"arms": {{"plain": {{}}, "deep": {{"depths": {"[" * deep}{"]" * deep}}}}}'))
      for deep in (100, 700))])
def test_a_hostile_study_file_is_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        read_study(tmp_path / name)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_key_that_stands_twice_is_not_silently_dropped(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("arms:\n  conv: {decoder: conv}\n  conv: {bridge: identity}\n")
    with pytest.raises(ValueError, match="mine.yaml says twice: conv"):
        read_study(path)


def test_numbers_survive_every_way_of_writing_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{a: 1e-3, b: 1.0e-3, c: 1.e+3, d: -2E5, e: 1e-06x, f: 0.5, g: 12, h: null}")
    assert read_yaml(path) == {"a": 1e-3, "b": 1e-3, "c": 1e3, "d": -2e5, "e": "1e-06x", "f": 0.5, "g": 12, "h": None}
    for source in STUDIES:
        study = read_study(source)
        path.write_text(json.dumps(study.to_dict(), indent=2))
        assert read_study(path) == study


# one run

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny study, with a cache that all tests of this file share."""
    monkeypatch.setenv("QTSEG_CACHE", str(tmp_path.parent / "cache"))
    return read_study(TINY)


def events(root: Path) -> list[tuple[str, str]]:
    return [tuple(line.split()[1:3]) for line in (root / "log.txt").read_text().splitlines()]


def test_run_arm_leaves_what_is_needed_and_does_it_once(tiny, tmp_path):
    first = run_arm(tiny, Run("plain", 1), tmp_path)
    assert {path.name for path in first.folder.iterdir()} == {".lock", "config.json", "splits.json", "history.csv", "metrics.json", "run.json", "best_dice"}
    assert json.loads((first.folder / "run.json").read_text()) == {"arm": "plain", "seed": 1, "fold": None}
    written = (first.folder / "metrics.json").stat().st_mtime_ns
    again = run_arm(tiny, Run("plain", 1), tmp_path)
    assert again == first and (first.folder / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"holds a run with other values \(epochs: 2 -> 3\)"):
        run_arm(read_study(TINY | {"common": TINY["common"] | {"epochs": 3}}), Run("plain", 1), tmp_path)


def test_run_arm_goes_on_with_a_half_way_run_and_waits_for_its_lock(tiny, tmp_path, monkeypatch, capfd):
    class Stop:
        def after_epoch(self, state):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_arm(tiny, Run("plain", 1), tmp_path, callbacks=[Stop()])
    folder = tmp_path / "tiny" / "plain-seed1"
    assert (folder / "resume.pt").is_file() and study_table(tiny, tmp_path)[0]["epoch"] == 1
    begun = (folder / "history.csv").read_text()
    hold = subprocess.Popen([sys.executable, "-c", f"import time; from filelock import FileLock; lock = FileLock({str(folder / '.lock')!r}); lock.acquire(); "
                             "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    hold.stdout.readline()
    assert study_table(tiny, tmp_path)[0]["state"] == "running"
    threading.Timer(0.7, hold.kill).start()
    result = run_arm(tiny, Run("plain", 1), tmp_path)
    assert "waiting until it ends" in capfd.readouterr().out and hold.wait() == -signal.SIGKILL
    assert [row["epoch"] for row in result.history] == [1, 2] and not (folder / "resume.pt").exists()
    assert (folder / "history.csv").read_text().startswith(begun), "the first epoch was not trained again"


def test_a_planted_link_and_folders_of_the_user_survive(tiny, tmp_path, capsys):
    folder, precious = tmp_path / "tiny/plain-seed1", tmp_path / "precious.txt"
    (folder / "best_pictures").mkdir(parents=True)
    precious.write_text("mine")
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(FileExistsError, match="is a link to another file: delete the link"):
        run_arm(tiny, Run("plain", 1), tmp_path)
    (folder / ".lock").unlink()
    run_arm(tiny, Run("plain", 1), tmp_path)
    assert precious.read_text() == "mine" and (folder / "best_pictures").is_dir()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"test": {"dice": ' + "9" * 5000 + "}}", '{"test": 3, "config": {}}', "[]", "\x00"])
def test_a_damaged_run_is_one_sentence_with_a_remedy(stand_in, tmp_path, capsys, text):
    study, folder = stand_in("plain", seeds=[1]), tmp_path / "runs/tiny/plain-seed1"
    folder.mkdir(parents=True)
    for name in ("metrics.json", "run.json", "notebook.ipynb"):
        (folder / name).write_text(text)
    (tmp_path / "tiny.yaml").write_text(json.dumps(study.to_dict()))
    assert main(["study", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), "--list"]) == 1
    said = capsys.readouterr().err.strip()
    assert "plain-seed1/metrics.json" in said and f"delete {folder} to repeat this run" in said and said.isprintable()


def test_an_error_is_shown_in_the_terminal_without_its_control_characters(stand_in, tmp_path, capsys):
    study, folder = stand_in("plain", seeds=[1]), tmp_path / "runs/tiny/plain-seed1"
    folder.mkdir(parents=True)
    (folder / "error.txt").write_bytes(b"ValueError: no image \x1b[2J\xff.png\nmore")
    (tmp_path / "tiny.yaml").write_text(json.dumps(study.to_dict()))
    assert main(["study", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), "--list"]) == 0
    assert "ValueError: no image \\x1b[2J\ufffd.png" in capsys.readouterr().out


def test_a_run_killed_before_its_first_state_begins_again(tiny, tmp_path):
    folder = tmp_path / "tiny" / "plain-seed1"
    folder.mkdir(parents=True)
    (folder / "history.csv").write_text("epoch\n1\n")
    assert len(run_arm(tiny, Run("plain", 1), tmp_path).history) == 2


# sweeps, with a notebook that trains nothing but behaves like one that does

STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder = Path(study).parent / f"{arm}-seed{seed}"
def note(event):
    with (folder.parent / "log.txt").open("a") as file:
        file.write(f"now {folder.name} {event} {os.getpid()} {os.getppid()}\\n")
note("begun")
mended = (folder.parent / "mended").exists()
if arm == "breaks" and not mended:
    raise ValueError("the data is gone")
if arm == "exits" and not mended:
    sys.exit(0)
if arm == "dies" and not mended:
    os.kill(os.getpid(), 9)
while arm == "waits" and not (folder.parent / "go").exists():
    time.sleep(0.05)
config = json.loads((folder.parent.parent / "configs.json").read_text())[folder.name]
(folder / "config.json").write_text(json.dumps(config))
(folder / "metrics.json").write_text(json.dumps({
    "test": {"dice": 50.0 + seed, "iou": 40.0, "acc": 90.0, "mae": 1.0}, "train": {"seconds": 0.3, "epochs": 2}, "config": config,
    "images": {"train": 20, "valid": 4, "test": 0}, "hardware": {"device": "cpu"}}))
(folder / "run.json").write_text("{}")
note("trained")
"""


def write_notebook(path: Path, source: str) -> None:
    parameters = new_code_cell('study = ""\narm = ""\nseed = 1\nfold = None\nruns = "runs"', metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(source), new_code_cell("print('the end')")], metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}), path)


@pytest.fixture
def stand_in(tmp_path):
    """A function: names of arms, seeds -> a study that the stand-in notebook in tmp_path runs into tmp_path/runs."""
    write_notebook(tmp_path / "ablation.ipynb", STAND_IN)

    def make(*arms: str, seeds=(1, 2), **changes):
        study = read_study(TINY | {"arms": {arm: {"heads": 2**n} for n, arm in enumerate(arms)}, "reference": arms[0], "seeds": list(seeds)} | changes)
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / "configs.json").write_text(json.dumps({run.name: study.config(run).to_dict() for run in study.runs()}))
        return study

    return make


@pytest.fixture(scope="module")
def cluster():
    """The client of a local cluster of two workers, which the tests share."""
    with local_client(2) as client:
        yield client


def states(rows: list[dict]) -> dict[str, str]:
    return {row["run"]: row["state"] for row in rows}


def test_a_sweep_uses_its_workers_and_repeats_only_what_failed(stand_in, tmp_path, cluster, capfd):
    study, options = stand_in("plain", "breaks", "exits", "dies", seeds=[1]), {"scheduler": cluster, "notebooks": tmp_path}
    rows = run_study(study, tmp_path / "runs", **options)
    assert states(rows) == {"plain-seed1": "done", "breaks-seed1": "failed", "exits-seed1": "failed", "dies-seed1": "failed"}
    errors = {row["arm"]: row["error"] for row in rows}
    assert errors["breaks"] == "ValueError: the data is gone" and "the kernel died" in errors["dies"] and "before 2 of its cells had run" in errors["exits"]
    assert len({line[-1] for line in log_lines(tmp_path / "runs/tiny")}) == 2, "two worker processes started the kernels"
    out = capfd.readouterr().out
    assert out.count("failed: breaks-seed1: ValueError: the data is gone") == 1 and "1/4: plain-seed1: Dice 51.00" in out
    assert not any(path.name.endswith(".tmp") for path in (tmp_path / "runs").rglob("*"))

    (tmp_path / "runs/tiny/mended").touch()
    rows = run_study(study, tmp_path / "runs", **options)
    assert set(states(rows).values()) == {"done"} and not list((tmp_path / "runs").rglob("error.txt"))
    count = collections.Counter(events(tmp_path / "runs/tiny"))
    assert count["plain-seed1", "begun"] == 1 and count["breaks-seed1", "begun"] == 2 and all(count[run.name, "trained"] == 1 for run in study.runs())


def test_a_changed_arm_is_refused_and_a_new_one_is_welcome(stand_in, tmp_path, cluster):
    run_study(stand_in("plain", seeds=[1]), tmp_path / "runs", scheduler=cluster, notebooks=tmp_path)
    changed = stand_in("plain", seeds=[1], common=TINY["common"] | {"epochs": 9})
    with pytest.raises(ValueError, match=r"plain-seed1 holds a run with other values \(epochs: 2 -> 9\): give the study or the arm another name"):
        run_study(changed, tmp_path / "runs", notebooks=tmp_path)
    assert json.loads((tmp_path / "runs/tiny/study.json").read_text())["common"]["epochs"] == 2, "what was refused left nothing behind"
    run_study(stand_in("plain", "other", seeds=[1]), tmp_path / "runs", scheduler=cluster, notebooks=tmp_path)
    assert events(tmp_path / "runs/tiny").count(("plain-seed1", "begun")) == 1
    assert read_study(tmp_path / "runs/tiny/study.json") == stand_in("plain", "other", seeds=[1])


def test_two_sweeps_of_one_study_exclude_each_other(stand_in, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    with FileLock(tmp_path / "runs/tiny/.lock"), pytest.raises(OSError, match="another sweep is at work"):
        run_study(stand_in("plain"), tmp_path / "runs", notebooks=tmp_path)


def wait_for(condition, seconds: float = 240.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found


def log_lines(root: Path) -> list[list[str]]:
    path = root / "log.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


INTRUDER = """
import asyncio, json, os, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor
from distributed import Security
from distributed.core import rpc

async def ask(port, protocol, patience):
    security = Security.temporary() if protocol == "tls" else Security()
    async with rpc(f"{protocol}://127.0.0.1:{port}", timeout=patience, connection_args=security.get_connection_args("client")) as worker:
        return await worker.identity()

def answer(probe):
    port, what, patience = probe
    try:
        if what in ("tcp", "tls"):
            return bool(asyncio.run(asyncio.wait_for(ask(port, what, patience), patience)))
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/{what}", timeout=patience).read())
    except Exception:
        return False

probes = json.loads(sys.argv[1])
if os.getuid() == 0:  # only now: root's interpreter may lie where nobody else can read
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
with ThreadPoolExecutor(40) as pool:
    print(json.dumps({"user": os.getuid(), "answers": [probe[:2] for probe, yes in zip(probes, pool.map(answer, probes)) if yes]}))
"""


def listening() -> set[int]:
    """The ports on which this process and all its children listen; none of them may be open to other machines."""
    own = psutil.Process()
    found = [connection.laddr for process in [own, *own.children(recursive=True)] for connection in process.net_connections("inet")
             if connection.status == psutil.CONN_LISTEN]
    assert {address.ip for address in found} <= {"127.0.0.1"}
    return {address.port for address in found}


def test_another_user_gets_nothing_from_a_running_study(stand_in, tmp_path, cluster):
    """Every port of the cluster and of a running kernel is tried: as another user, where this one may become another (root)."""
    study, rows = stand_in("waits", seeds=[1]), []
    sweep = threading.Thread(target=lambda: rows.extend(run_study(study, tmp_path / "runs", scheduler=cluster, notebooks=tmp_path)))
    sweep.start()
    try:
        wait_for(lambda: log_lines(tmp_path / "runs/tiny"))
        guarded = listening()
        pages = {"distributed.scheduler.http.routes": ["distributed.http.scheduler.json"]}
        with dask.config.set(pages), LocalCluster(n_workers=0, processes=False, protocol="tcp://", host="127.0.0.1",
                                                  dashboard_address="127.0.0.1:0") as open_one:
            yardstick = [[open_one.scheduler.port, "tcp"], [open_one.scheduler.http_server.port, "json/counts.json"]]  # these have to answer
            probes = [[*probe, 60] for probe in yardstick] + [
                [port, what, 3] for port in guarded for what in ("tcp", "tls", "info/main/workers.html", "json/counts.json", "metrics", "health")]
            ran = subprocess.run([sys.executable, "-c", INTRUDER, json.dumps(probes)], cwd="/", env={"PATH": os.environ["PATH"], "HOME": "/"},
                                 capture_output=True, text=True, timeout=200)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout) == {"user": os.getuid() or 65534, "answers": yardstick} and len(guarded) >= 5
        folders = [Path(worker["local_directory"]).parent.parent for worker in cluster.scheduler_info()["workers"].values()]
        assert len(folders) == 2 and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)
    finally:
        (tmp_path / "runs/tiny/go").touch()
        sweep.join(240)
    assert states(rows) == {"waits-seed1": "done"}


def test_jobs_of_a_batch_system_get_a_temporary_key(tmp_path, monkeypatch):
    """dask-jobqueue's place is taken by a module that notes what it is given."""
    given = {}
    monkeypatch.setitem(sys.modules, "dask_jobqueue", type(sys)("dask_jobqueue"))
    monkeypatch.setattr(sys.modules["dask_jobqueue"], "SLURMCluster", lambda **values: given.update(values) or 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError), slurm_client({"cores": 1, "protocol": "tcp://", "security": None,
                                                         "scheduler_options": {"port": 1}}, 1, tmp_path):
        pass
    assert given["security"].require_encryption and given["protocol"] == "tls://" and given["shared_temp_directory"] == str(tmp_path)
    assert given["scheduler_options"] == {"dashboard": False, "dashboard_address": "127.0.0.1:0", "port": 1} and given["cores"] == 1
    assert "export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1" in given["job_script_prologue"]


@pytest.mark.parametrize("options, said", [({"scheduler": "tls://127.0.0.1:9", "workers": 2}, "scheduler excludes slurm, workers and threads"),
                                           ({"scheduler": "tls://127.0.0.1:9", "threads": 2}, "scheduler excludes"),
                                           ({"workers": 0}, "workers and threads are at least 1"), ({"threads": -1}, "workers and threads are at least 1")])
def test_contradicting_options_are_one_sentence(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        connected_client(tmp_path, 2, **options)


def test_local_workers_share_cores_and_gpus():
    with local_client(2, threads=3, devices=["4", "7"]) as client:
        found = client.run(lambda: (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]))
    assert sorted(found.values()) == [("3", "4"), ("3", "7")]


def test_a_notebook_beside_the_study_file_is_not_executed(stand_in, tmp_path, monkeypatch):
    executed, path = [], tmp_path / "mine/tiny.yaml"
    path.parent.mkdir()
    path.write_text(json.dumps(stand_in("plain").to_dict()))  # the stand-in notebook lies one folder above
    write_notebook(path.parent / "ablation.ipynb", STAND_IN)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(study_sweep, "connected_client", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(study_sweep, "_sweep", lambda client, study, runs, notebooks, rows: executed.extend(notebooks.values()))
    run_study(path, tmp_path / "runs")
    assert executed == [ROOT / "nbs/experiments/ablation.ipynb"]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").is_dir() else True


@pytest.fixture
def settings(tmp_path) -> dict:
    """Dask's settings with a TLS key in files, as lesson 15 sets them up; in tmp_path/dask, too, for processes of their own."""
    key, names = Security.temporary(), {"key": str(tmp_path / "key.pem"), "cert": str(tmp_path / "cert.pem")}
    Path(names["key"]).write_text(key.tls_worker_key)
    Path(names["cert"]).write_text(key.tls_ca_file)
    comm = {"require-encryption": True, "tls": {"ca-file": names["cert"], "scheduler": names, "worker": names, "client": names}}
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask/tls.yaml").write_text(json.dumps({"distributed": {"comm": comm}}))
    return {"distributed.comm.require-encryption": True, **{f"distributed.comm.tls.{name}": value for name, value in comm["tls"].items()}}


def test_a_killed_worker_loses_nothing_and_nothing_is_completed_twice(stand_in, tmp_path, settings):
    command, ready = [sys.executable, "-m", "dask"], tmp_path / "scheduler.json"
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"DASK_CONFIG": str(tmp_path / "dask")}}
    processes = [subprocess.Popen([*command, "scheduler", "--protocol", "tls", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
                                   "--scheduler-file", str(ready)], **quiet)]
    study, rows = stand_in("waits", "plain", seeds=[1]), []
    try:
        address = wait_for(lambda: ready.is_file() and ready.stat().st_size and json.loads(ready.read_text()))["address"]
        processes += [subprocess.Popen([*command, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"], **quiet) for _ in range(2)]
        with dask.config.set(settings):
            sweep = threading.Thread(target=lambda: rows.extend(run_study(study, tmp_path / "runs", scheduler=address, notebooks=tmp_path)))
            sweep.start()
            found = wait_for(lambda: [line[3:] for line in log_lines(tmp_path / "runs/tiny") if line[1:3] == ["waits-seed1", "begun"]])
            kernel, worker = map(int, found[0])
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: not alive(kernel), 30)  # the kernel does not survive its worker
            (tmp_path / "runs/tiny/go").touch()
            sweep.join(240)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert set(states(rows).values()) == {"done"}
    count = collections.Counter(events(tmp_path / "runs/tiny"))
    assert count["waits-seed1", "begun"] == 2 and all(count[run.name, "trained"] == 1 for run in study.runs())


def test_a_cancelled_future_means_that_the_scheduler_is_gone(stand_in, tmp_path, cluster):
    study, future = stand_in("plain", seeds=[1]), cluster.submit(time.sleep, 0.1)
    cluster.cancel([future])
    wait_for(future.done)
    with pytest.raises(ConnectionError, match="the scheduler is gone; what is finished is safe"):
        study_sweep._finish(study, study.runs()[0], tmp_path / "runs", future)


@pytest.mark.parametrize("address, options, said", [
    ("tcp://127.0.0.1:9", [], "other users who reach tcp://127.0.0.1:9 can run code under your name"), ("host.example:8786", [], "other users who reach host.example"),
    ("tcp://127.0.0.1:9", ["--insecure"], "no Dask scheduler answers at tcp://127.0.0.1:9"),
    ("tls://127.0.0.1:9", [], "no Dask scheduler answers at tls://127.0.0.1:9"), ("tls://a:b:c", [], "no Dask scheduler answers at tls://a:b:c")])
def test_a_scheduler_without_tls_or_without_an_answer_is_one_sentence(stand_in, tmp_path, capsys, monkeypatch, address, options, said):
    monkeypatch.setattr(study_cluster, "CONNECT_SECONDS", 0.5)
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(stand_in("plain").to_dict()))
    assert main(["study", str(path), "--runs", str(tmp_path / "runs"), "--notebooks", str(tmp_path), "--scheduler", address, *options]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"qtseg study: {said}") and "\n" not in message


def test_list_runs_nothing(stand_in, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(stand_in("plain").to_dict()))
    assert main(["study", str(path), "--runs", str(tmp_path / "runs"), "--list"]) == 0
    assert "plain-seed2  waiting" in capsys.readouterr().out and not (tmp_path / "runs/tiny").exists()


# the real notebooks

def test_ctrl_c_saves_the_running_run_and_the_same_study_goes_on(tmp_path, monkeypatch, cluster):
    monkeypatch.setenv("QTSEG_CACHE", str(tmp_path.parent / "cache"))
    study = TINY | {"seeds": [1], "arms": {"conv": {"decoder": "conv"}}, "reference": "conv", "common": TINY["common"] | {"epochs": 8}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-c", "import sys; from qtseg.cli import main; sys.exit(main())", "study", "tiny.yaml", "--workers", "1"]
    folder = tmp_path / "runs/tiny/conv-seed1"
    sweep = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                             env=os.environ | {"PYTHONPATH": str(ROOT)},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's `&` ignores it, and children inherit that
    wait_for(lambda: (folder / "resume.pt").is_file())
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: to every process
    output = sweep.communicate(timeout=240)[0]
    assert sweep.returncode == 130 and "qtseg study: stopped; the same command goes on" in output, output
    assert not (folder / "metrics.json").exists() and not (folder / "error.txt").exists()
    assert 1 <= study_table(read_study(study), tmp_path / "runs")[0]["epoch"] < 8
    begun = (folder / "history.csv").read_text()
    rows = run_study(tmp_path / "tiny.yaml", tmp_path / "runs", scheduler=cluster)
    assert states(rows) == {"conv-seed1": "done"}
    assert (folder / "history.csv").read_text().startswith(begun), "no epoch was trained again"
    assert "image/png" in str(nbformat.read(folder / "notebook.ipynb", 4).cells)


def test_baselines_runs_through_papermill_and_refuses_what_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setenv("QTSEG_CACHE", str(tmp_path.parent / "cache"))
    pytest.importorskip("segmentation_models_pytorch", reason="the baselines need segmentation-models-pytorch")
    notebook, arms = ROOT / "nbs/experiments/baselines.ipynb", {"plain": {}, "unet": {"model": "unet", "encoder": "resnet18"}}
    study = TINY | {"arms": arms, "common": TINY["common"] | {"epochs": 1}}
    run_notebook(notebook, tmp_path / "unet.ipynb", study=study, arm="unet", runs=str(tmp_path))
    run = tmp_path / "tiny/unet-seed1"
    assert TrainConfig.from_dict(json.loads((run / "metrics.json").read_text())["config"]).model == "unet" and (run / "best_dice/config.json").is_file()


@pytest.mark.parametrize("name", ["ablation", "baselines"])
def test_unknown_and_ill_typed_parameters_are_refused(name):
    said = refused_parameters(ROOT / f"nbs/experiments/{name}.ipynb", sed=1, seed="1")
    assert all(words in said for words in ("sed is an unknown key", "seed should be a valid integer, not '1'", "; the parameters are study, arm, seed"))
