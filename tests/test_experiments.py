"""The papermill notebooks that evaluate and predict: with a checkpoint of one's own, and with parameters that nobody knows."""
from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from conftest import ROOT
from qtseg.phantoms import phantom
from qtseg.training import TrainConfig, fit


def papermill(name: str, output: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "papermill", "--kernel", "python3", "--log-level", "ERROR",
                           str(ROOT / f"nbs/experiments/{name}.ipynb"), str(output), *options], capture_output=True, text=True, cwd=output.parent)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return fit(TrainConfig(data="phantoms:dermoscopy:24", size=32, width=4, depths=[1, 1, 1], mlp_width=16, epochs=1, batch=4, cache=str(root / "cache"),
                           runs=str(root), name="tiny", progress=False, device="cpu")).checkpoint_dir


def test_evaluate_scores_a_checkpoint(checkpoint, tmp_path):
    done = papermill("evaluate", tmp_path / "evaluated.ipynb", "-p", "checkpoint", str(checkpoint.parent), "-p", "split", "valid", "-p", "output",
                     str(tmp_path / "result"), "-p", "progress", "False")  # a run is taken for its checkpoint
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result/evaluation.json").read_text())
    rows = list(csv.DictReader((tmp_path / "result/images.csv").open()))
    dice = [float(row["dice"]) for row in rows if row["size"] == "own"]
    assert result["images"] == len(dice) > 2 and result["scores"]["own"]["mean"]["dice"]["mean"] == pytest.approx(sum(dice) / len(dice))
    assert {"gallery.png", "calibration.png", "thresholds.png"} <= {path.name for path in (tmp_path / "result").iterdir()}
    shown = (tmp_path / "evaluated.ipynb").read_text()
    assert "best constant mask: Dice, %" in shown and f"{result['constant']['scores']['own']['dice']:.2f}" in shown


def test_predict_writes_masks_and_names_the_broken_file(checkpoint, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, size in enumerate((40, 64, 97)):
        Image.fromarray(phantom("dermoscopy", number, size)[0]).save(images / f"{number}.png")
    (images / "broken.png").write_bytes((images / "0.png").read_bytes()[:200])
    script = "<img src=x onerror=alert(1)>"
    (images / f"{script}.png").write_bytes((images / "0.png").read_bytes())
    (images / f"{script} broken.png").write_bytes(b"")
    done = papermill("predict", tmp_path / "predicted.ipynb", "-p", "checkpoint", str(checkpoint), "-y", json.dumps({"inputs": [str(images)]}),
                     "-p", "output", str(tmp_path / "masks"), "-p", "progress", "False")
    assert done.returncode == 0, done.stderr[-3000:]
    for number, size in enumerate((40, 64, 97)):
        assert Image.open(tmp_path / f"masks/{number}.png").size == (size, size)
    assert {row["file"] for row in csv.DictReader((tmp_path / "masks/errors.csv").open())} == {"broken.png", f"{script} broken.png"}
    shown = [output.data[kind] for cell in nbformat.read(tmp_path / "predicted.ipynb", as_version=4).cells if cell.cell_type == "code"
             for output in cell.outputs if output.output_type == "display_data" for kind in ("text/markdown", "text/html") if kind in output.data]
    tables = [text for text in shown if "onerror" in text]
    assert len(tables) == 2 and not any("<img" in text for text in shown) and all("&#60;img src" in text for text in tables)


@pytest.mark.parametrize("name, options, words", [
    ("evaluate", ["-p", "chekpoint", "x", "-p", "batch", "many"], ["unknown parameters: chekpoint", "of the wrong type: batch"]),
    ("predict", ["-p", "input", "x", "-p", "tta", "yes please"], ["unknown parameters: input", "of the wrong type: tta"])])
def test_unknown_and_ill_typed_parameters_are_refused(tmp_path, name, options, words):
    done = papermill(name, tmp_path / "out.ipynb", *options)
    assert done.returncode != 0 and all(word in done.stderr for word in words), done.stderr[-2000:]
