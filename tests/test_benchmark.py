"""The benchmark notebook: every section runs and is written down, what is missing is a row, wrong parameters are refused."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, parameters_of, refused_parameters, run_notebook

NOTEBOOK = ROOT / "nbs/experiments/benchmark.ipynb"
TINY = {"width": 4, "repeats": 1, "seconds": 0.0, "memory": False, "threads": 1, "engines": ["naive", "fused"], "rivals": [],
        "training_rivals": ["unet"], "variants": ["v2", "lite0"], "training_variants": ["v2"], "inference_cases": [[64, 1]], "training_cases": [[64, 2]], "pipeline_sizes": [64], "pipeline_images": 2,
        "pipeline_draws": 4, "epoch_size": 64, "epoch_images": 12, "epoch_batch": 2, "growth_sizes": [64, 96], "growth_batches": [1, 2],
        "growth_classes": [1, 3], "busy_neighbors": [0, 1, 0], "busy_warm_up": 0.0, "busy_seconds": 0.05, "roofline_size": 64}


def benchmark(folder: Path, **given) -> dict:
    """Run the notebook; its JSON."""
    run_notebook(NOTEBOOK, folder / "executed.ipynb", output=str(folder / "out"), **given)
    return json.loads((folder / "out/benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """One tiny run of all sections."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "segmentation_models_pytorch.py").write_text("raise ImportError('this machine has none')\n")  # the notebook's folder comes first
    return {**benchmark(folder, **TINY), "files": {path.name for path in (folder / "out").iterdir()}}


def rows(report: dict, section: str) -> dict[str, dict]:
    """The rows of a section by name; of equal names the last one."""
    return {row["name"]: row for row in report["rows"] if row["section"] == section}


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/experiments/params").glob("benchmark*.yaml")), ids=lambda path: path.stem)
def test_parameter_files_name_every_parameter(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() == parameters_of(NOTEBOOK).keys()


@pytest.mark.parametrize("section, names", [
    ("inference", {"naive", "fused", "v2", "lite0"}), ("training", {"naive", "fast", "v2", "unet"}),
    ("training, memory kept", {"naive", "fast"}), ("epoch", {"fit"}), ("roofline", {"naive", "fused"}),
    ("growth", {f"{point}: {what}" for point in ("pixels, version 1, 4096", "pixels, version 1, 9216", "pixels, version 2, 4096", "pixels, version 2, 9216",
                                                 "batch, 1", "batch, 2", "classes, 1", "classes, 3") for what in ("inference", "training")}),
    ("growth exponents", {"pixels, version 1", "pixels, version 2", "batch", "classes"}), ("busy", {"torch's default", "OMP_WAIT_POLICY=PASSIVE", "as shipped"}),
    ("pipeline", {"raw", "raw, careful", "cache and Augmentation"})])
def test_every_section_is_written_down(report, section, names):
    found = rows(report, section)
    assert found.keys() == names
    if section not in ("growth exponents", "epoch"):
        assert all(row["ms"] > 0 and row["ms_q1"] <= row["ms"] <= row["ms_q3"] for row in found.values() if "missing" not in row)
    if section == "inference":
        assert found["fused"]["difference"] < 1e-4, "speed that changes the answer is no speed"
    if section == "roofline":
        assert all(0 < row["bytes_least"] < row["bytes_most"] and row["flop"] > 1e6 for row in found.values())
    if section == "growth exponents":
        assert all(isinstance(row["inference"], float) and row["memory"] is None for row in found.values())


def test_beside_busy_processes(report):
    """A row for each job, number of neighbors and setting; what is measured twice is one row. Times say nothing here."""
    found = {(row["job"], row["neighbors"], row["name"]): row for row in report["rows"] if row["section"] == "busy"}
    assert len(found) == sum(row["section"] == "busy" for row in report["rows"]) == 2 * 2 * 3
    for (job, neighbors, setting), row in found.items():
        best = min(found[job, 0, other]["ms"] for other in ("torch's default", "OMP_WAIT_POLICY=PASSIVE", "as shipped"))
        assert row["threads"] == 1 and row["fair_share"] == max(1, (1 + neighbors) / len(os.sched_getaffinity(0)))
        assert row["over_fair_share"] == pytest.approx(row["ms"] / best / row["fair_share"])
        assert row["rounds"] >= (1 if neighbors else 2)


def test_device_versions_claims_and_figures(report):
    assert report["hardware"]["threads"] == 1 and "torch" in report["versions"] and report["machine"]["bandwidth"] > 0
    measured = {claim["claim"] for claim in report["claims"] if claim["measured"] is not None}
    assert measured == {*(f"growth with pixels, version {version}, exponent of {what} time" for version in (1, 2) for what in ("inference", "training step")),
                        *(f"training step 4 × 256² beside {neighbors} busy process(es), as shipped, × fair share" for neighbors in (0, 1))}, "512² was not measured here"
    assert {"benchmark.json", "inference.png", "training.png", "growth.png"} <= report["files"]
    assert not any(name.endswith((".onnx", ".tmp")) for name in report["files"])


def test_wrong_parameters_are_refused(tmp_path):
    said = refused_parameters(NOTEBOOK, output=str(tmp_path / "out"), repeat=3, sizes=[64], inference_cases=[[64]], engines=["warp"])
    assert not (tmp_path / "out").exists()
    for words in ("repeat is an unknown key", "sizes is an unknown key", "inference_cases.0.1 is missing", "engines.0 should be 'naive', 'fast'"):
        assert words in said


def test_what_is_missing_is_a_row(report):
    """A package that cannot be imported leaves a sentence in its row."""
    assert rows(report, "training")["unet"]["missing"] == "this machine has none"
