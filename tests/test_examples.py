"""The scripts of tests/examples do what they say: each is short, and runs as a user would run it."""
from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

EXAMPLES = {path.stem: path for path in (ROOT / "tests" / "examples").glob("*.py")}


def run(name: str, folder: Path, needs: str = "torch") -> str:
    """What an example prints; everything it writes lies in the folder."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: pip install {needs}")
    done = subprocess.run([sys.executable, str(EXAMPLES[name]), str(folder)], cwd=folder, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name):
    assert len(EXAMPLES[name].read_text(encoding="utf-8").splitlines()) <= 30


def test_a_network_of_ones_own_is_trained_and_kept(tmp_path):
    assert "test Dice" in run("custom_model", tmp_path)
    best = tmp_path / "unet" / "best_dice"
    assert json.loads((best / "config.json").read_text())["class"] == "__main__.SmallUNet"
    assert load_file(best / "model.safetensors")["head.weight"].shape == (2, 16, 1, 1)
    given = json.loads((tmp_path / "unet" / "metrics.json").read_text())["given"]
    assert given == {"model": "__main__.SmallUNet", "callbacks": ["qtseg.training.callbacks.EMA", "qtseg.training.callbacks.EarlyStopping"]}


def test_a_dataset_of_ones_own_with_albumentations_is_trained_on(tmp_path):
    run("custom_dataset", tmp_path, "albumentations")
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["channels"] == 4 and config["data"] == "FourChannels, given to fit"
    assert json.loads((tmp_path / "four" / "best_dice" / "config.json").read_text())["in_channels"] == 4
    assert json.loads((tmp_path / "four" / "metrics.json").read_text())["images"] == {"train": 16, "valid": 4, "test": 0}


def test_a_loss_and_a_callback_of_ones_own_are_used(tmp_path):
    run("custom_loss_and_callback", tmp_path)
    rows = list(csv.DictReader((tmp_path / "weighted" / "history.csv").open()))
    assert len(rows) == 2 and all(float(row["gradient_norm"]) > 0 for row in rows)
    assert json.loads((tmp_path / "weighted" / "metrics.json").read_text())["given"]["loss"] == "__main__.twice_the_foreground"


def test_lightning_trains_our_network_on_our_dataset(tmp_path):
    run("lightning_loop", tmp_path, "lightning")
    saved = torch.load(next((tmp_path / "checkpoints").glob("*.ckpt")), weights_only=False)
    assert saved["epoch"] == 1 and saved["global_step"] == 8 and all(value.isfinite().all() for value in saved["state_dict"].values())
