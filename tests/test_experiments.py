"""The papermill notebooks that evaluate and predict: with a checkpoint of one's own, and with parameters that nobody knows."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from conftest import ROOT, refused_parameters, run_notebook
from qtseg.data.phantoms import phantom
from qtseg.training.config import TrainConfig
from qtseg.training.loop import fit

NOTEBOOKS = ROOT / "nbs/experiments"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return fit(TrainConfig(data="phantoms:dermoscopy:24", size=32, width=4, depths=[1, 1, 1], mlp_width=16, epochs=1, batch=4, cache=str(root / "cache"),
                           runs=str(root), name="tiny", progress=False, device="cpu")).checkpoint_dir


def test_evaluate_scores_a_checkpoint(checkpoint, tmp_path):
    run_notebook(NOTEBOOKS / "evaluate.ipynb", tmp_path / "evaluated.ipynb", checkpoint=str(checkpoint.parent), split="valid",
                 output=str(tmp_path / "result"), progress=False)  # a run is taken for its checkpoint
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
    run_notebook(NOTEBOOKS / "predict.ipynb", tmp_path / "predicted.ipynb", checkpoint=str(checkpoint), inputs=[str(images)],
                 output=str(tmp_path / "masks"), progress=False)
    for number, size in enumerate((40, 64, 97)):
        assert Image.open(tmp_path / f"masks/{number}.png").size == (size, size)
    assert {row["file"] for row in csv.DictReader((tmp_path / "masks/errors.csv").open())} == {"broken.png", f"{script} broken.png"}
    shown = [output.data[kind] for cell in nbformat.read(tmp_path / "predicted.ipynb", as_version=4).cells if cell.cell_type == "code"
             for output in cell.outputs if output.output_type == "display_data" for kind in ("text/markdown", "text/html") if kind in output.data]
    tables = [text for text in shown if "onerror" in text]
    assert len(tables) == 2 and not any("<img" in text for text in shown) and all("&#60;img src" in text for text in tables)


@pytest.mark.parametrize("name, given, words", [
    ("evaluate", {"chekpoint": "x", "batch": "many"}, ["chekpoint is an unknown key", "batch should be a valid integer, not 'many'", "the parameters are checkpoint, data"]),
    ("predict", {"input": "x", "tta": "yes please"}, ["input is an unknown key", "tta should be a valid boolean"]),
    ("annotate", {"image": "x", "steps": "many"}, ["image is an unknown key", "steps should be a valid integer"]),
    ("annotation_study", {"seeds": 3, "order": "by name"}, ["seeds is an unknown key", "order should be 'random' or 'doubt', not 'by name'"])])
def test_unknown_and_ill_typed_parameters_are_refused(name, given, words):
    said = refused_parameters(NOTEBOOKS / f"{name}.ipynb", **given)
    assert all(word in said for word in words)
