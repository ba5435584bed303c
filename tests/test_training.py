"""A training run keeps its promises: checked configuration, the same result after a crash, nothing half-written, clear ends."""
from __future__ import annotations

import copy
import csv
import json
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT, parameters_of, refused_parameters, shared_folder
from PIL import Image

from qtseg.training import callbacks as training_callbacks, hardware as training_hardware, loop as training_loop, run_folder, trainer as training_trainer
from qtseg.colors import PREDICTION
from qtseg.training.augmentation import Augmentation
from qtseg.data.dataset import normalize
from qtseg.data.reading import read_image
from qtseg.data.segmentation import SegmentationData
from qtseg.evaluation.runs import evaluate_checkpoint
from qtseg.evaluation.scores import SIZES
from qtseg.prediction.export import export_onnx
from qtseg.prediction.folders import predict_files
from qtseg.prediction.networks import OnnxNetwork
from qtseg.prediction.predictor import Predictor
from qtseg.training.losses import ce_dice_loss
from qtseg.network.baselines import BASELINES, Baseline, pretrained
from qtseg.network.model import QTSeg
from qtseg.data.phantom_sets import write_prepared
from qtseg.training.callbacks import EMA, EarlyStopping, mask_pictures
from qtseg.training.config import BEST, OPTIMIZERS, SCHEDULERS, TrainConfig, read_stored_config
from qtseg.training.loop import fit
from qtseg.training.trainer import Trainer, draw_seed
from qtseg.training.validation import validate

PARAMS = sorted(path for path in (ROOT / "nbs" / "experiments" / "params").glob("*.yaml") if not path.name.startswith("benchmark"))  # train.ipynb's


def scores(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {part: metrics[part] for part in ("valid", "test")} | {"best": metrics["best"]}


class Calling:
    """A callback that hands each epoch's state to a function."""

    def __init__(self, function):
        self.after_epoch = function


def timeless(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith(("seconds", "second", "waited_percent"))} for row in history]


def same_threads() -> dict[str, str]:
    """The environment of a process that adds up in the order of this one: results are compared to the last digit."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def run_in_a_process(config: TrainConfig, before: str = "") -> subprocess.Popen:
    code = (f"import json, sys\n{before}\nfrom qtseg.training.config import TrainConfig; from qtseg.training.loop import fit\n"
            f"fit(TrainConfig.from_dict(json.loads({json.dumps(json.dumps(config.to_dict()))})))")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=same_threads())


SLOW = """
import time
from qtseg.training import trainer as training_trainer
step = training_trainer.Trainer.step
def slow(self, batch):
    if (self.progress.epoch, self.progress.step) == (1, 2):
        print("IN", flush=True)
        time.sleep(20)
    return step(self, batch)
training_trainer.Trainer.step = slow
"""


def wait_until_mid_epoch(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if line.startswith("IN"):
            return
    raise AssertionError("the run ended before its second epoch")


# configuration

def test_the_defaults_are_the_papers_recipe():
    c = TrainConfig()
    assert (c.size, c.batch, c.drop_last, c.optimizer, c.lr, c.weight_decay, c.betas) == (512, 32, True, "adamw", 1e-3, 1e-4, [0.9, 0.999])
    assert (c.scheduler, c.step_epochs, c.gamma, c.min_lr, c.epochs, c.seed, c.freeze_epochs) == ("step", 50, 0.5, 1e-5, 350, 1996, 50)


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown configuration keys: epoch, learning_rate; known: data"):
        TrainConfig.from_dict({"epoch": 3, "learning_rate": 1, "size": 64})
    with pytest.raises(ValueError, match="a configuration maps names to values, and this is None: an empty"):
        TrainConfig.from_dict(None)


@pytest.mark.parametrize("key, value, said", [
    ("epochs", 2.5, "epochs is a whole number from 1 to 1000000, not 2.5"), ("epochs", True, "epochs is a whole number from 1 to 1000000, not True"),
    ("lr", "1e-3", "lr is a number > 0, not '1e-3'"), ("augment", "true", "augment is true or false, not 'true'"),
    ("fold", "0", "fold is a whole number from 0 to 9999 or null, not '0'"), ("depths", [1, "2"], "depths is a list of 3 whole numbers from 0 to 100, not [1, '2']"),
    ("losses", {"ce": "1"}, "losses is a mapping of one or more of ce, bce,"), ("milestones", [1.5], "milestones is a list of epochs from 1 on, in rising order, not [1.5]"), ("betas", [float("nan"), 0.9], "betas is a list of 2 numbers >= 0 and < 1, not [nan, 0.9]"), ("epochs", "10", "in YAML write 10, without"), ("fold", "0", "in YAML write 0, without"), ("betas", 0.9, "betas is a list"), ("lr", float("nan"), "lr is a number"),
    ("lr", 0.0, "lr is a number > 0, not 0.0"), ("epochs", 0, "epochs is a whole number from 1"), ("optimizer", "lion", "optimizer is one of adamw, adam, sgd"),
    ("losses", {"dice": 1.0}, "to numbers >= 0, one above 0, not {'dice': 1.0}"), ("losses", {}, "one above 0, not {}"),
    ("operations", ["flip"], "operations is a list of different names out of vertical_flip, horizontal_flip"), ("name", "a/b", "name is the name of one folder"),
    ("name", "", "name is the name of one folder"), ("select", "f1", "select is one of"), ("amp", "fp8", "amp is one of none, bf16, fp16"),
    ("model", "vnet", "model is one of qtseg, unet"), ("position", "rotary", "position is one of fourier, learned, none"),
    ("model", "unet", "encoder fpn is QTSeg's own: model unet needs another, such as encoder: efficientnet_lite0 or resnet34"),
    ("encoder_weights", "imagenet", "encoder_weights imagenet need another encoder, such as efficientnet_lite0"), ("freeze_norm", 1, "freeze_norm is true"),
    ("betas", [0.9], "betas is a list of 2 numbers >= 0 and < 1, not [0.9]"), ("betas", [0.9, 1.0], "betas is a list of 2 numbers"), ("betas", [-0.1, 0.9], "betas is a list of 2"),
    ("valid_share", 5, "valid_share is a number > 0 and < 1, not 5"), ("valid_share", 0, "valid_share"), ("valid_share", 1.0, "valid_share"),
    ("gamma", -3, "gamma is a number > 0 and <= 1, not -3"), ("gamma", 0, "gamma is a number > 0"), ("power", 0.0, "power is a number > 0"), ("momentum", 1.0, "momentum is a number >= 0 and < 1"),
    ("depths", [-1, 0], "depths is a list of 3 whole numbers"), ("depths", [1, 2], "depths is a list of 3"), ("depths", [1, 1, -1], "depths is a list of 3"),
    ("folds", 1, "folds is a whole number from 2 to 10000 or null, not 1"), ("fold", -1, "fold is a whole number from 0"), ("lr", float("inf"), "lr is a number > 0, not inf"), ("lr", 10**400, "lr is a number"),
    ("milestones", [3, 2], "milestones is a list of epochs from 1 on, in rising order"),
    ("milestones", [2, 2], "milestones is a list"), ("milestones", [0], "milestones is a list"), ("losses", {"ce": -1.0}, "losses is a mapping of one or more of ce"),
    ("losses", {"ce": 0.0}, "numbers >= 0, one above 0"), ("heads", 3, "heads divides twice the width, 32: 3 does not"), ("heads", -1, "heads is a whole number from 1"),
    ("size", 60000, "size is a whole number from 32 to 16384, not 60000"), ("seed", 2**64, "seed is a whole number from 0 to 9223372036854775807"), ("data", "", "data is a folder, a .zip or phantoms"), ("data", "a\0b", "data is a folder"),
    ("runs", " ", "runs is the name of a folder"), ("cache", "a\nb", "cache is the name of a folder"), ("name", "..", "name is the name of one folder"),
    ("name", ".", "name is the name of one folder"), ("name", "a\\b", "name is the name of one folder"), ("name", "a\x1b[2J", "name is the name of one folder"),
    ("name", "x" * 300, "at most 200 bytes"), ("name", " run", "name is the name"), ("operations", ["rotate", "rotate"], "operations is a list of different names"),
    ("strength", 2.5, "strength is a number from 0 to 2, not 2.5"), ("lr", 1e-6, "min_lr, 1e-05, must be at most lr"), ("data", b"d", "data is a folder, a .zip or phantoms[:family[:number]], not b'd'"), ("mask_values", [0, 1.5], "mask_values is a list"),
])
def test_wrong_values_are_refused_by_name(key, value, said):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{key: value})
    assert said in str(caught.value) and len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize("changes, said", [
    ({"losses": {"bce": 1.0}, "classes": 3}, "losses bce does not go with classes 3 (this loss needs logits with 1 to 2 channels)"),
    ({"losses": {"ce": 1.0}, "classes": 1}, "losses ce does not go with classes 1"), ({"fold": 2, "folds": 2}, "fold is below folds, 2: counted from 0, 2 is not there"),
    ({"optimizer": "sgd", "nesterov": True, "momentum": 0.0}, "nesterov needs a momentum above 0"),
    ({"scheduler": "plateau", "gamma": 1.0}, "scheduler plateau needs a gamma below 1"),
    ({"model": "unet", "epochs": 0}, "encoder fpn is QTSeg's own"), ({"init": "phantoms", "encoder_weights": "a.pth"}, "init phantoms brings its own encoder"),
])
def test_values_that_do_not_go_together_are_refused(changes, said):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**changes)
    assert said in str(caught.value)


def test_texts_that_stand_for_other_values_come_with_what_to_write():
    """papermill -p compile false hands over the text 'false', YAML 1.1 reads 1e-3 as a text."""
    with pytest.raises(ValueError) as caught:
        TrainConfig(compile="false", fold="null", milestones="[1, 2]", losses="{ce: 1}", lr="1e-3", epochs="many")
    for said in ("compile is true or false, not 'false' (a text; with papermill -p compile False)", "(a text; with papermill -p fold None)",
                 "(a text; with papermill -y \"milestones: [1, 2]\")", "-y \"losses: {ce: 1}\"", "lr is a number > 0, not '1e-3' (a text; in YAML write 0.001, without quotes)",
                 "epochs is a whole number from 1 to 1000000, not 'many'"):
        assert said in str(caught.value)


def test_paths_numpys_numbers_tuples_and_arrays_become_plain_values(tmp_path):
    config = TrainConfig(data=tmp_path, runs=Path("r"), size=np.int64(64), batch=torch.tensor(4), seed=np.array(3), lr=np.float32(0.5), betas=(0.9, np.float64(0.99)),
                         depths=np.array([1, 1, 2]), compile=np.bool_(True), losses={np.str_("ce"): np.float16(2)}, operations=("rotate",), mask_values=(0, np.uint8(7)))
    plain = TrainConfig(data=str(tmp_path), runs="r", size=64, batch=4, seed=3, lr=0.5, betas=[0.9, 0.99], depths=[1, 1, 2], compile=True, losses={"ce": 2.0},
                        operations=["rotate"], mask_values=[0, 7])
    assert config == plain and json.loads(json.dumps(config.to_dict())) == plain.to_dict()
    assert {type(value) for value in config.to_dict().values()} <= {str, int, float, bool, list, dict, type(None)}
    with pytest.raises(ValueError, match="epochs is a whole number from 1 to 1000000, not a very long int"):
        TrainConfig(epochs=10**5000)  # Python refuses to print it
    for wrong in (np.datetime64("2020"), object(), {1, 2}, 1j):
        with pytest.raises(ValueError, match="lr is a number"):
            TrainConfig(lr=wrong)


def test_unknown_keys_are_named_whatever_they_are():
    with pytest.raises(ValueError, match=r"unknown configuration keys: 3, None, \\x1bepoch; known"):
        TrainConfig.from_dict({3: 1, "\x1bepoch": 2, None: 3})


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as caught:
        TrainConfig(epochs=0, lr=-1.0, scheduler="none", size=8, compile="true", fold=3, folds=2, epoch=1)
    said = str(caught.value)
    assert all(f"{name} is " in said for name in ("epochs", "lr", "scheduler", "size", "compile"))
    assert "unknown configuration keys: epoch;" in said and "fold is below folds" in said and "min_lr" not in said.split("; size is")[1]


def test_a_copy_with_other_values_is_checked_and_nothing_is_assigned(monkeypatch):
    config = TrainConfig(epochs=3)
    assert config.replace(lr=0.01) == TrainConfig(epochs=3, lr=0.01) and config.lr == 1e-3
    with pytest.raises(ValueError, match="lr is a number > 0, not -1"):
        config.replace(lr=-1)
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 0.01
    with pytest.raises(ValueError, match="scheduler is one of constant, "):
        TrainConfig(scheduler="mine")
    monkeypatch.setitem(SCHEDULERS, "mine", SCHEDULERS["step"])  # a choice that is added is accepted, and named
    assert TrainConfig(scheduler="mine").scheduler == "mine" and TrainConfig.allowed()["scheduler"].endswith("mine")


def test_the_config_of_a_run_of_version_0_1_loads_with_defaults_for_younger_keys(tmp_path):
    first = ["data", "classes", "masks", "size", "resize", "color", "fold", "valid_share", "cache", "model", "encoder", "bridge", "decoder", "width", "depths",
             "heads", "mlp_width", "position", "encoder_weights", "freeze_epochs", "epochs", "batch", "drop_last", "losses", "optimizer", "lr", "weight_decay",
             "betas", "scheduler", "step_epochs", "gamma", "min_lr", "clip", "augment", "device", "seed", "select", "runs", "name", "resume"]
    config = TrainConfig(lr=0.01, depths=[1, 1, 1])
    (tmp_path / "config.json").write_text(json.dumps({key: config.to_dict()[key] for key in first}))
    assert read_stored_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_parameter_files_hold_valid_configurations(path):
    config = TrainConfig.from_dict(yaml.safe_load(path.read_text()))
    assert config.resume


def test_the_parameter_files_are_there():
    assert {path.stem for path in PARAMS} >= {"isic2016", "busi", "bkai_binary", "bkai_three_class", "demo", "isic2018_cpu", "bkai_cpu"}


# the loop

@pytest.fixture(scope="session")
def uninterrupted(phantoms, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed; the interrupted ones must end like it."""
    values = dict(data=str(phantoms), cache=str(phantoms.parent / "cache"), size=64, width=4, depths=[1, 1, 1], mlp_width=32, epochs=3, batch=4,
                  valid_batch=4, device="cpu", runs=str(tmp_path_factory.mktemp("runs")), name="run", progress=False)
    return fit(TrainConfig(**values)).folder


def test_a_run_leaves_its_folder(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"config.json", "splits.json", "history.csv", "metrics.json", "resume.pt", "last", *(f"best_{name}" for name in BEST)}
    for checkpoint in ("last", "best_dice"):
        assert {path.name for path in (uninterrupted / checkpoint).iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
        QTSeg.from_pretrained(uninterrupted / checkpoint)
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    assert {"mae", "acc", "dice", "iou", "loss"} <= metrics["test"].keys() & metrics["valid"].keys()
    assert metrics["train"]["epochs"] == 3 and metrics["hardware"]["processor"] and metrics["versions"]["torch"] == torch.__version__
    rows = list(csv.DictReader((uninterrupted / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and float(rows[-1]["valid_dice"]) >= 0


def test_the_best_checkpoint_has_the_best_score(uninterrupted, phantoms):
    best = json.loads((uninterrupted / "metrics.json").read_text())["best"]
    rows = list(csv.DictReader((uninterrupted / "history.csv").open()))
    for name, better in BEST.items():
        assert best[name]["value"] == better(float(row[f"valid_{name}"]) for row in rows)
    data = SegmentationData.open(str(phantoms), size=64, cache=str(phantoms.parent / "cache"), progress=False)
    scored = validate(QTSeg.from_pretrained(uninterrupted / "best_iou"), data.valid, 2, batch=3)
    assert scored["iou"] == pytest.approx(best["iou"]["value"], abs=0.05)


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(tiny, uninterrupted):
    torch.manual_seed(123)  # what the caller drew before must not matter
    assert scores(fit(tiny(name="again")).folder) == scores(uninterrupted)
    assert scores(fit(tiny(name="other", seed=3)).folder) != scores(uninterrupted)


def test_killed_in_mid_epoch_a_run_resumes_to_the_same_result(tiny, uninterrupted):
    config = tiny(resume=True)
    process = run_in_a_process(config, SLOW)
    wait_until_mid_epoch(process)
    process.kill()
    process.wait()
    assert not (config.folder / "metrics.json").exists()
    result = fit(config)
    assert scores(result.folder) == scores(uninterrupted)
    expected = torch.load(uninterrupted / "resume.pt", weights_only=True)["progress"]["history"]
    assert timeless(result.history) == timeless(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_in_mid_epoch_and_the_run_goes_on_to_the_same_result(tiny, uninterrupted, number):
    config = tiny(resume=True)
    process = run_in_a_process(config, SLOW.replace("time.sleep(20)", "time.sleep(2)"))
    wait_until_mid_epoch(process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "saved in" in output and "resume=True" in output
    progress = torch.load(config.folder / "resume.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 3)
    assert scores(fit(config).folder) == scores(uninterrupted)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tiny, uninterrupted):
    config = tiny(resume=True)
    full = SLOW.replace('print("IN", flush=True)', "import resource, signal as s; s.signal(s.SIGXFSZ, s.SIG_IGN); "
                        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))").replace("time.sleep(20)", "")
    process = run_in_a_process(config, full)
    output = process.communicate(timeout=120)[0]
    last = output.strip().splitlines()[-1]
    assert process.returncode != 0 and "could not write" in last and "resume=True" in last, output
    assert not list(config.folder.rglob("*.tmp"))
    assert torch.load(config.folder / "resume.pt", weights_only=True)["progress"]["epoch"] == 1
    QTSeg.from_pretrained(config.folder / "last")
    assert scores(fit(config).folder) == scores(uninterrupted)


def test_a_loss_that_is_not_finite_stops_with_the_ids_of_its_batch(tiny, monkeypatch):
    seen, step = [], Trainer.step

    def poisoned(self, batch):
        loss, counts = step(self, batch)
        if self.progress.epoch == 1 and self.progress.step == 1:
            seen.extend(batch.ids)
            loss = loss * float("nan")
        return loss, counts

    monkeypatch.setattr(Trainer, "step", poisoned)
    config = tiny()
    with pytest.raises(FloatingPointError) as caught:
        fit(config)
    assert f"the loss became nan in epoch 2 on the images {', '.join(seen)}" in str(caught.value) and "lower lr" in str(caught.value)
    assert torch.load(config.folder / "resume.pt", weights_only=True)["progress"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in QTSeg.from_pretrained(config.folder / "last").state_dict().values())


def test_ids_in_messages_are_shown_and_not_obeyed(tiny):
    config = tiny()
    trainer = Trainer(config, training_loop.open_data(config))
    pending = (torch.tensor(float("nan")), torch.zeros(1, 1, 4, dtype=torch.int64), ["a\x1b[2Jb"])
    with pytest.raises(FloatingPointError) as caught:
        training_loop._settle(trainer, pending, ["c\rd"])
    assert "a\\x1b[2Jb" in str(caught.value) and "c\\rd" in str(caught.value) and str(caught.value).isprintable()
    counts = torch.tensor([[[4, 0, 0, 4]], [[0, 0, 0, 0]]])  # of the second image no pixel counts: it has no Dice
    training_loop._settle(trainer, (torch.tensor(1.0), counts, ["a", "b"]), [])
    assert trainer.progress.sums["dice"] == 100


def test_a_huge_learning_rate_is_stopped(tiny):
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit(tiny(lr=1e30, optimizer="sgd", momentum=0.0))


def test_a_folder_with_a_run_is_not_overwritten(tiny, uninterrupted):
    config = tiny(runs=str(uninterrupted.parent))
    with pytest.raises(FileExistsError, match="holds a run already: set resume=True"):
        fit(config)


@pytest.mark.parametrize("mistake", [{"data": "nowhere"}, {"batch": 64}, {"device": "warp"}, {"size": 32, "batch": 1}, {"lr": 1e30, "optimizer": "sgd", "momentum": 0.0}])
def test_a_start_that_failed_leaves_its_name_free(tiny, mistake):
    with pytest.raises((ValueError, OSError, FloatingPointError)):
        fit(tiny(**mistake))
    assert fit(tiny(epochs=1)).metrics["train"]["epochs"] == 1


def test_a_finished_run_without_its_state_is_not_overwritten(tiny, uninterrupted):
    runs = Path(tiny().runs)
    shutil.copytree(uninterrupted, runs / "run")
    (runs / "run" / "resume.pt").unlink()
    before = (runs / "run" / "metrics.json").read_bytes()
    with pytest.raises(FileExistsError, match="without its resume.pt"):
        fit(tiny(resume=True))
    assert (runs / "run" / "metrics.json").read_bytes() == before


def test_a_finished_run_resumes_to_itself(tiny, uninterrupted):
    before = (uninterrupted / "resume.pt").stat().st_mtime_ns
    assert fit(tiny(runs=str(uninterrupted.parent), resume=True)).metrics["test"] == scores(uninterrupted)["test"]
    assert (uninterrupted / "resume.pt").stat().st_mtime_ns == before


def test_another_recipe_does_not_continue_a_run(tiny, uninterrupted):
    stored = (uninterrupted / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"begun with another configuration \(lr: 0.001 -> 0.01\)"):
        fit(tiny(runs=str(uninterrupted.parent), resume=True, lr=0.01))
    assert (uninterrupted / "config.json").read_bytes() == stored


def test_a_run_begun_before_a_field_existed_goes_on_with_its_default(tiny, uninterrupted):
    runs = Path(tiny().runs)
    shutil.copytree(uninterrupted, runs / "run")
    stored = json.loads((runs / "run" / "config.json").read_text())
    for name in ("model", "encoder", "position", "freeze_norm"):
        del stored[name]
    (runs / "run" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"another configuration \(position: 'fourier' -> 'none'\)"):
        fit(tiny(resume=True, position="none"))
    assert scores(fit(tiny(resume=True)).folder) == scores(uninterrupted)


@pytest.fixture(scope="module")
def standing(uninterrupted) -> dict:
    return torch.load(uninterrupted / "resume.pt", weights_only=True)


def refused_state(tiny, write) -> str:
    """What `fit` says about a resume.pt that `write` wrote; nothing else is left."""
    config = tiny(resume=True)
    config.folder.mkdir()
    write(config.folder / "resume.pt")
    with pytest.raises(ValueError) as caught:
        fit(config)
    assert {path.name for path in config.folder.iterdir()} == {"resume.pt"} and str(caught.value).isprintable()
    return str(caught.value)


def swelling(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"PK\x03\x04 not a checkpoint"), lambda path: path.write_bytes(pickle.dumps({"model": 1})), swelling,
                                   lambda path: torch.save({"model": Path("x")}, path), lambda path: path.write_bytes(b"")],
                         ids=["zip", "pickle", "swells", "an object", "empty"])
def test_a_damaged_resume_file_is_one_sentence(tiny, write):
    assert "resume.pt is damaged" in refused_state(tiny, write)


def endless(tensor: torch.Tensor) -> torch.Tensor:
    """A few bytes that claim 40 GB."""
    return torch.zeros(1).expand(10_000_000_000)


CHANGES = {"no dictionary": ("its parts", lambda state: [1]), "a part missing": ("its parts", lambda state: state.pop("scaler")),
           "a part more": ("its parts", lambda state: state.update(code="x")),
           "a weight missing": ("its model", lambda state: state["model"].popitem()),
           "another shape": ("its model", lambda state: state["model"].update({"encoder.down2.conv.weight": endless(None)})),
           "right shape, few numbers": ("its model", lambda state: state["model"].update({"encoder.down2.conv.weight": torch.zeros(1).expand(4, 3, 3, 3)})),
           "another type": ("its model", lambda state: state["model"].update({name: value.double() for name, value in state["model"].items()})),
           "a NaN": ("its model", lambda state: state["model"]["encoder.down2.norm.bias"].fill_(math.nan)),
           "endless moments": ("its optimizer", lambda state: state["optimizer"]["state"][0].update(exp_avg=endless(None))),
           "moments missing": ("its optimizer", lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq")),
           "moments of nothing": ("its optimizer", lambda state: state["optimizer"]["state"].update({10**6: {}})),
           "a group's text": ("its optimizer", lambda state: state["optimizer"]["param_groups"][0].update(lr="fast")),
           "a method replaced": ("its scheduler", lambda state: state["scheduler"].update(step=5)),
           "a text for a number": ("its scheduler", lambda state: state["scheduler"].update(last_epoch="3")),
           "epochs beyond the history": ("its progress", lambda state: state["progress"].update(epoch=10**9)),
           "a row of texts": ("its progress", lambda state: state["progress"]["history"][0].update(lr="=cmd()")),
           "a column that is a formula": ("its progress", lambda state: state["progress"]["history"][0].update({"=cmd()": 1.0})),
           "a field more": ("its progress", lambda state: state["progress"].update(folder="..")), "a step back": ("its progress", lambda state: state["progress"].update(step=-1)),
           "no sums": ("its progress", lambda state: state["progress"].update(step=2)), "a best of nothing": ("its progress", lambda state: state["progress"].update(best={"x": {}}))}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_built_or_copied(tiny, standing, name):
    part, change = CHANGES[name]
    state = copy.deepcopy(standing)
    changed = change(state)
    said = refused_state(tiny, lambda path: torch.save(changed if name == "no dictionary" else state, path))
    assert f"resume.pt does not fit this run ({part}" in said and "start again" in said


@pytest.mark.parametrize("text, said", [("{", "config.json is no JSON that can be read"), ("[" * 100_000, "config.json is no JSON that can be read"),
                                        ('{"epochs": ' + "9" * 5000 + "}", "config.json"), ('{"epochs": "\x1b"}', "config.json"), ("[1]", "config.json is no JSON object"),
                                        ('{"epoch": 3}', "config.json is no configuration of a run (the training configuration cannot be used: unknown configuration keys: epoch"),
                                        ('{"name": ".."}', "config.json is no configuration of a run (the training configuration cannot be used: name is")])
def test_a_stored_configuration_that_cannot_be_read_is_one_sentence(tiny, text, said):
    config = tiny(resume=True)
    config.folder.mkdir()
    (config.folder / "resume.pt").touch()
    (config.folder / "config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        fit(config)
    assert said in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 2500
    assert (config.folder / "config.json").read_text() == text


@pytest.mark.parametrize("device", ["meta", "cpu:7x", "", "hpu", None])
def test_odd_devices_are_one_sentence(device):
    with pytest.raises(ValueError, match="device .* cannot be used"):
        training_hardware.choose_device(device)


def test_a_file_where_a_folder_must_be_is_one_sentence(tiny, tmp_path):
    (tmp_path / "taken").touch()
    for changes in ({"runs": str(tmp_path / "taken")}, {"runs": str(tmp_path), "name": "taken"}, {"runs": str(tmp_path / "taken" / "deep")}):
        with pytest.raises(NotADirectoryError, match="taken is a file, where .* needs a folder"):
            fit(tiny(**changes))


# going on

def copied(uninterrupted: Path, runs: Path) -> Path:
    return Path(shutil.copytree(uninterrupted, runs / "run"))


def test_a_finished_run_goes_on_to_more_epochs_as_if_it_had_had_them_all(tiny, uninterrupted):
    """A schedule that does not ask for the number of epochs: the same weights as a run that was not interrupted."""
    whole = fit(tiny(epochs=4, name="whole"))
    copied(uninterrupted, Path(tiny().runs))
    more = fit(tiny(epochs=4, resume=True))
    assert timeless(more.history) == timeless(whole.history) and scores(more.folder) == scores(whole.folder)
    assert json.loads((more.folder / "config.json").read_text())["epochs"] == 4 and not any("epochs became" in note for note in more.metrics["notes"])
    less = fit(tiny(epochs=3, resume=True))  # done already: it stays what it is
    assert len(less.history) == 4 and scores(less.folder) == scores(whole.folder) and less.metrics["config"]["epochs"] == 4


@pytest.mark.parametrize("name", ["cosine", "polynomial"])
def test_schedules_that_depend_on_epochs_follow_the_new_number_from_there_on(tiny, capsys, name):
    short, long = (fit(tiny(size=32, epochs=epochs, scheduler=name, name=run)) for epochs, run in ((2, "run"), (4, "long")))
    more = fit(tiny(size=32, epochs=4, scheduler=name, resume=True, progress=True))
    rates = [row["lr"] for row in more.history]
    assert rates[:2] == [row["lr"] for row in short.history] and rates[2:] == pytest.approx([row["lr"] for row in long.history][2:], rel=1e-6)
    said = f"2 epochs became 4 after epoch 2: from there on the rate follows the {name} curve of 4 epochs"
    assert capsys.readouterr().out.count(said) == 1 and sum(said in note for note in more.metrics["notes"]) == 1
    again = fit(tiny(size=32, epochs=4, scheduler=name, resume=True))  # done: nothing changes any more
    assert scores(again.folder) == scores(more.folder) and sum(said in note for note in again.metrics["notes"]) == 1


def test_a_run_goes_on_after_its_data_were_moved_and_not_with_others(tiny, uninterrupted, phantoms, tmp_path):
    moved = shutil.copytree(phantoms, tmp_path / "moved")
    for path in moved.rglob("*"):
        os.utime(path, (0, 0))  # another time of change, as after a download
    copied(uninterrupted, Path(tiny().runs))
    result = fit(tiny(data=str(moved), resume=True))
    assert scores(result.folder) == scores(uninterrupted) and json.loads((result.folder / "config.json").read_text())["data"] == str(moved)
    record = next(path for path in sorted((moved / "masks").iterdir()))
    for change in (lambda: record.write_bytes((sorted((moved / "masks").iterdir())[1]).read_bytes()), lambda: shutil.copy(record, moved / "masks" / "more.png")):
        change()
        before = (result.folder / "config.json").read_bytes()
        with pytest.raises(ValueError, match="was begun with other images or masks|no image|in the manifest"):
            fit(tiny(data=str(moved), resume=True))
        assert (result.folder / "config.json").read_bytes() == before
    other = write_prepared(tmp_path / "other", "dermoscopy", 24, 64, 1)
    with pytest.raises(ValueError, match="was begun with other images or masks .* name the same data, or choose another name"):
        fit(tiny(data=str(other), resume=True))


def test_a_run_without_its_datas_digest_goes_on_where_it_was_and_nowhere_else(tiny, uninterrupted, standing, phantoms, tmp_path):
    folder = copied(uninterrupted, Path(tiny().runs))
    torch.save({name: part for name, part in standing.items() if name != "data"}, folder / "resume.pt")
    with pytest.raises(ValueError, match="was begun with other images or masks"):
        fit(tiny(data=str(shutil.copytree(phantoms, tmp_path / "moved")), resume=True))
    assert scores(fit(tiny(resume=True)).folder) == scores(uninterrupted)


def test_an_image_that_changed_is_seen_though_its_size_and_name_are_the_same(tiny, uninterrupted, monkeypatch):
    """`data_digest` opens some files of each split, splits.json knows all images by their content."""
    folder = copied(uninterrupted, Path(tiny().runs))
    known = json.loads((folder / "splits.json").read_text())
    data = training_loop.open_data(tiny())
    assert {name: known[name] for name in ("train", "valid", "test")} == run_folder.split_table(data) and known["folder"] == str(data.folder)
    assert known["train"][0] == [data.train.ids[0], data.train.digests[0], 64, 64]
    monkeypatch.setattr(data.train, "digests", ["0" * 24, *data.train.digests[1:]])
    with pytest.raises(ValueError, match="was begun with other images or masks"):
        fit(tiny(resume=True), data=data)
    for text in ("{}", '{"folder": "d", "ignored": false, "train": [["a", "b", 1]], "valid": [], "test": []}'):
        (folder / "splits.json").write_text(text)
        with pytest.raises(ValueError, match="splits.json is damaged"):
            fit(tiny(resume=True))


def test_fewer_epochs_than_were_done_are_validated_before_the_end(tiny):
    """No epoch had been validated, and the sentence blamed the learning rate."""
    class Stop(Exception):
        pass

    def stop(state):
        if len(state.history) == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(tiny(size=32, epochs=6, validate_every=10, scheduler="cosine"), callbacks=[Calling(stop)])
    result = fit(tiny(size=32, epochs=2, validate_every=10, scheduler="cosine", resume=True))
    assert len(result.history) == 2 and result.history[1]["valid_dice"] >= 0 and result.metrics["best"]["dice"]["epoch"] == 2
    assert "valid_dice" in (result.folder / "history.csv").read_text()


def test_the_folder_names_the_data_wherever_one_stands(tiny, phantoms, monkeypatch):
    monkeypatch.chdir(phantoms.parent)
    folder = fit(tiny(size=32, data=phantoms.name, epochs=1)).folder
    assert json.loads((folder / "config.json").read_text())["data"] == str(phantoms.resolve())
    monkeypatch.chdir("/")
    assert fit(tiny(size=32, epochs=2, resume=True)).metrics["train"]["epochs"] == 2


# one image in the last batch

@pytest.mark.parametrize("changes, said", [
    ({"batch": 5, "drop_last": False}, "the last batch of an epoch holds one image (16 training images, batch 5), of which BatchNorm would see one value per "
                                       "channel at size 32: set drop_last=True, another batch or a larger size"),
    ({"batch": 1}, "a batch holds one image (16 training images, batch 1)"),
    ({"batch": 5, "drop_last": False, "model": "deeplabv3plus", "encoder": "mobilenet_v2", "size": 64}, "at size 64: set drop_last=True"),
])
def test_a_batch_of_one_that_cannot_train_is_known_before_the_first_step(tiny, monkeypatch, changes, said):
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError) as caught:
        fit(tiny(**{"size": 32} | changes))
    assert said in str(caught.value) and not tiny().folder.exists()


@pytest.mark.parametrize("part", ["training", "validation", None])
def test_parts_that_are_ignored_altogether_are_known_before_the_first_step(part, tiny, phantoms, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    shutil.copytree(phantoms, folder)
    data = SegmentationData.open(folder, size=64, cache=tmp_path / "cache", progress=False)
    chosen = {"training": data.train, "validation": data.valid}.get(part, data.train)
    for image, mask in chosen.paths if part else chosen.paths[:3]:
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(mask)
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"ignore": 255}))
    if part is None:  # some masks of it: they take no part
        result = fit(tiny(data=str(folder), cache=str(tmp_path / "cache"), epochs=1))
        assert all(math.isfinite(value) for value in result.history[0].values())
        return
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=f"every pixel of the {part} images in .* is ignored: label some of them"):
        fit(tiny(data=str(folder), cache=str(tmp_path / "cache")))


def test_a_single_image_and_a_teams_shares_of_one_are_told_too(tiny):
    config, shape = tiny(size=32, batch=2), (3, 32, 32)
    network = training_trainer.build_network(config)
    with pytest.raises(ValueError, match="a process's share of a batch holds one image"):
        training_trainer._refuse_lone_images(config, 16, network, shape, 2, torch.device("cpu"))
    training_trainer._refuse_lone_images(config, 16, network, shape, 2, torch.device("cuda"))  # there BatchNorm sees the team's batch
    with pytest.raises(ValueError) as caught:
        training_trainer._refuse_lone_images(tiny(size=32, drop_last=False), 1, network, shape, 1, torch.device("cpu"))
    assert "drop_last" not in str(caught.value), "which would leave no batch at all"


@pytest.mark.parametrize("changes", [{"size": 64}, {"size": 33}])
def test_a_batch_of_one_that_can_train_does(tiny, changes):
    assert np.isfinite(fit(tiny(epochs=1, **{"size": 32, "batch": 5, "drop_last": False} | changes)).history[0]["train_loss"])


# what is alarming, and what costs nothing

def with_masks(folder: Path, mask, count: int = 12) -> Path:
    """Pairs of noise and of masks that `mask(number)` makes: [64, 64] uint8."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask(number)).save(folder / "masks" / f"{number}.png")
    return folder


def test_the_best_constant_mask_stands_beside_the_network(tiny, uninterrupted, phantoms):
    stored = json.loads((uninterrupted / "metrics.json").read_text())
    data = SegmentationData.open(str(phantoms), size=64, cache=str(phantoms.parent / "cache"), progress=False)
    usual = data.train.batch(range(len(data.train))).masks.double().mean(dim=0) > 0.5
    for part in ("valid", "test"):
        masks = getattr(data, part).batch(range(len(getattr(data, part)))).masks.bool()
        dice = {"all background": 0.0, "all foreground": 1.0, "each pixel's most frequent class in the training split": usual}
        for name, mask in dice.items():
            mask = torch.as_tensor(mask).bool().expand(masks.shape)
            dice[name] = (200 * (mask & masks).sum(dim=(1, 2)) / (mask.sum(dim=(1, 2)) + masks.sum(dim=(1, 2)))).mean().item()
        best = max(dice, key=dice.get)
        assert stored["best_constant_mask"][part]["mask"] == best and stored["best_constant_mask"][part]["dice"] == pytest.approx(dice[best], rel=1e-4)


@pytest.mark.parametrize("value", [0, 255])
def test_masks_without_foreground_or_without_background_are_told_loudly(tiny, tmp_path, value):
    source = with_masks(tmp_path / "flat", lambda number: np.full((64, 64), value, np.uint8))
    config = tiny(data=str(source), cache=str(tmp_path / "cache"), epochs=1)
    data = training_loop.open_data(config)
    assert data.census.warnings
    with pytest.warns(UserWarning) as told:
        result = fit(config, data=data)
    assert all(any(sentence in str(one.message) for one in told) for sentence in data.census.warnings)
    assert set(data.census.warnings) <= set(result.metrics["notes"]) and result.metrics["census"] == data.census.to_dict()
    constant = result.metrics["best_constant_mask"]["valid"]
    assert constant["mask"] == ("all foreground" if value else "all background") and constant["dice"] == 100


def test_ignored_pixels_count_in_no_loss_and_no_score(tiny, tmp_path):
    def mask(number: int, ignored: int) -> np.ndarray:
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 16:48], mask[:8] = 1, ignored
        return mask

    histories = []
    for ignored in (7, 9):  # two stored values, one meaning
        source = with_masks(tmp_path / f"ignored{ignored}", lambda number: mask(number, ignored))
        config = tiny(data=str(source), cache=str(tmp_path / "cache"), masks="index", mask_values=[0, 1], ignore_value=ignored, epochs=2, name=f"run{ignored}")
        data = training_loop.open_data(config)
        assert data.ignore_index is not None
        result = fit(config, data=data)
        histories.append(timeless(result.history))
        perfect = torch.nn.Identity()
        perfect.forward = lambda images: torch.nn.functional.one_hot(torch.tensor(mask(0, 0)).long(), 2).permute(2, 0, 1)[None].expand(len(images), -1, -1, -1) * 9.0
        assert validate(perfect, data.valid, 2, ignore_index=data.ignore_index)["dice"] == 100
        assert json.loads((result.folder / "config.json").read_text())["ignore_value"] == ignored
    assert histories[0] == histories[1]


def test_a_score_that_is_no_number_neither_wins_nor_blocks(tiny, monkeypatch):
    losses = iter([0.5, math.nan, 9.0, 0.4])
    monkeypatch.setattr(training_loop, "validate", lambda *_, **__: {"loss": next(losses, 0.4), "mae": 1.0, "acc": 99.0, "dice": 50.0, "iou": 40.0})
    assert fit(tiny(size=32, epochs=4, select="loss")).metrics["best"]["loss"] == {"epoch": 4, "value": 0.4}
    losses = iter([math.nan, 9.0, 0.5, math.nan])
    assert fit(tiny(size=32, epochs=4, select="loss", name="first")).metrics["best"]["loss"] == {"epoch": 3, "value": 0.5}
    losses = iter([math.nan] * 4)
    with pytest.raises(FloatingPointError, match="no epoch of .* has a validation loss that is a number"):
        fit(tiny(size=32, epochs=4, select="loss", name="never"))


def test_plateau_watches_the_validation_loss_alone(tiny, monkeypatch):
    monkeypatch.setattr(training_loop, "validate", lambda *_, **__: {"loss": 1e-9, "mae": 1.0, "acc": 99.0, "dice": 50.0, "iou": 40.0})
    seen, step = [], torch.optim.lr_scheduler.ReduceLROnPlateau.step
    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", lambda self, loss, *more: (seen.append(loss), step(self, loss, *more))[1])
    result = fit(tiny(size=32, epochs=5, scheduler="plateau", step_epochs=1, validate_every=2))
    assert seen == [1e-9] * 3 and [row["lr"] for row in result.history] == [1e-3] * 5, "epochs 2, 4 and 5 were validated; two without progress are borne"


def test_the_host_process_keeps_its_memory_as_it_was(tiny, monkeypatch):
    monkeypatch.setattr(training_hardware, "ctypes", SimpleNamespace(CDLL=lambda name: pytest.fail("fit is a guest in this process")))
    with pytest.raises(pytest.fail.Exception, match="guest"):
        training_hardware.keep_freed_memory()
    fit(tiny(size=32, epochs=1))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_steps_and_stays_above_the_floor(tiny, phantoms, name):
    config = tiny(scheduler=name, step_epochs=2, milestones=[1, 2], min_lr=4e-4, epochs=5)
    trainer = Trainer(config, training_loop.open_data(config))
    rates = []
    for _ in range(5):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        training_trainer.step_rate(trainer.scheduler, config, 1.0)  # a loss that never improves
    assert rates[0] == 1e-3 and min(rates) >= 4e-4
    assert (len(set(rates)) == 1) == (name == "constant")


def test_the_papers_schedule_by_hand(tiny):
    config = tiny(scheduler="step", step_epochs=2, epochs=20)
    trainer = Trainer(config, training_loop.open_data(config))
    rates = []
    for _ in range(20):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        training_trainer.step_rate(trainer.scheduler, config, 1.0)
    assert rates == pytest.approx([max(1e-3 * 0.5 ** (epoch // 2), 1e-5) for epoch in range(20)])


@pytest.mark.parametrize("changes", [*({"optimizer": name} for name in OPTIMIZERS), {"amp": "bf16"}, {"clip": 0.5}, {"classes": 1, "losses": {"bce": 1.0}},
                                     {"augment": False}, {"drop_last": False, "batch": 5}, {"validate_every": 2}, {"bridge": "identity"}],
                         ids=lambda changes: "-".join(map(str, changes.values())))
def test_every_option_trains(tiny, changes):
    result = fit(tiny(epochs=2, **changes))
    assert np.isfinite(result.history[-1]["train_loss"]) and 0 <= result.metrics["test"]["dice"] <= 100
    assert ("valid_dice" in result.history[0]) == (changes.get("validate_every") != 2)


@pytest.mark.parametrize("changes", [{"bridge": "projection", "position": "learned"}, {"bridge": "single", "decoder": "conv"},
                                     {"decoder": "mqm_single", "position": "none"}, {"encoder": "mobilenet_v2"}], ids=lambda changes: "-".join(changes.values()))
def test_every_variant_of_the_network_trains(tiny, changes):
    result = fit(tiny(size=32, epochs=1, **changes))
    assert np.isfinite(result.history[0]["train_loss"])
    assert {key: pretrained(result.checkpoint_dir).config[key] for key in changes} == changes


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains_and_comes_back(tiny, name):
    encoder = "mit_b0" if name == "segformer" else "mobilenet_v2"  # small ones: a run writes seven copies of its network
    result = fit(tiny(size=32, epochs=1, model=name, encoder=encoder))
    assert np.isfinite(result.history[0]["train_loss"]) and 0 <= result.metrics["test"]["dice"] <= 100
    network = pretrained(result.checkpoint_dir)
    assert isinstance(network, Baseline) and (network.config["model"], network.config["encoder"]) == (name, encoder)
    data = SegmentationData.open(tiny().data, size=32, cache=tiny().cache, progress=False)
    assert validate(network, data.test, 2, batch=4)["dice"] == pytest.approx(result.metrics["test"]["dice"], abs=1e-6)


def test_dropout_repeats(tiny):
    changes = dict(size=32, epochs=1, model="segformer", encoder="mit_b0", validate_every=2)
    torch.manual_seed(1)
    first = fit(tiny(name="first", **changes))
    torch.manual_seed(2)
    assert scores(fit(tiny(name="second", **changes)).folder) == scores(first.folder)


def test_an_unknown_encoder_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="unknown encoder 'resnet35'"):
        fit(tiny(model="unet", encoder="resnet35"))


def test_three_classes_train_from_phantom_masks(tmp_path):
    config = TrainConfig(data="phantoms:endoscopy:20", classes=3, size=64, width=4, depths=[1, 1, 1], mlp_width=32, epochs=1, batch=4,
                         cache=str(tmp_path / "cache"), runs=str(tmp_path), name="three", progress=False, device="cpu")
    assert {"dice_1", "dice_2"} <= fit(config).metrics["test"].keys()


def test_the_frozen_encoder_keeps_its_weights_while_its_batch_norm_follows_the_data(tiny, tmp_path):
    from qtseg.network.official import to_official

    source = QTSeg(width=4, depths=[1, 1, 1], mlp_width=32)
    torch.save({name: tensor for name, tensor in to_official(source).items() if name.startswith("image_encoder.")}, tmp_path / "encoder.pth")
    config = tiny(encoder_weights=str(tmp_path / "encoder.pth"), freeze_epochs=1, epochs=1)
    fit(config)
    after = QTSeg.from_pretrained(config.folder / "last").encoder.state_dict()
    for name, value in source.encoder.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, after[name]) != ("running" in name), name
    fit(tiny(encoder_weights=str(tmp_path / "encoder.pth"), freeze_epochs=0, epochs=1, name="free"))
    free = QTSeg.from_pretrained(config.folder.parent / "free" / "last").encoder.state_dict()
    assert not torch.equal(source.encoder.state_dict()["down2.conv.weight"], free["down2.conv.weight"])


def test_an_encoder_comes_from_a_checkpoint_of_an_earlier_run(tiny, uninterrupted):
    fit(tiny(encoder_weights=str(uninterrupted / "last"), freeze_epochs=1, epochs=1, freeze_norm=True))
    expected = QTSeg.from_pretrained(uninterrupted / "last").encoder.state_dict()
    found = QTSeg.from_pretrained(tiny().folder / "last").encoder.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_freeze_norm_keeps_all_running_statistics_and_trains_the_rest(tiny):
    config = tiny(freeze_norm=True, epochs=2)  # validation lies between the epochs
    fresh = Trainer(config, training_loop.open_data(config)).model.state_dict()
    after = QTSeg.from_pretrained(fit(config).folder / "last").state_dict()
    for name, value in fresh.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, after[name]), name
    training_trainer._refuse_lone_images(config.replace(batch=1), 9, training_trainer.build_network(config), (3, 32, 32), 1, torch.device("cpu"))  # no batch is looked at
    moved = [name for name in fresh if ".norm." in name and name.endswith(("weight", "bias")) and not torch.equal(fresh[name], after[name])]
    assert len(moved) > 50


def test_a_missing_encoder_file_is_named(tiny):
    with pytest.raises(FileNotFoundError, match="fpn-nano.pth"):
        fit(tiny(encoder_weights="nowhere/fpn-nano.pth"))


def test_too_few_images_for_a_batch(tiny):
    with pytest.raises(ValueError, match="do not fill a batch of 64"):
        fit(tiny(batch=64))


def test_an_absent_device_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="device 'warp' cannot be used"):
        fit(tiny(device="warp"))


def test_seeds_of_batches_differ_and_repeat():
    drawn = {draw_seed(seed, epoch, step) for seed in range(3) for epoch in range(10) for step in range(-1, 20)}
    assert len(drawn) == 3 * 10 * 21 and draw_seed(1996, 3, 4) == draw_seed(1996, 3, 4)


class Recorded:
    """A team of one that writes down what it is asked."""

    rank, size, leads = 0, 1, True

    def __init__(self):
        self.asked = []

    def wrap(self, model, shape):
        self.asked.append("wrap")
        return model

    def share(self, batch):
        self.asked.append(("share", len(batch)))
        return batch

    def mean(self, values):
        return values

    def lead(self, function):
        self.asked.append("lead")
        return function()


def test_a_team_is_asked_for_everything_that_several_processes_do_differently(tiny, uninterrupted):
    team = Recorded()
    result = fit(tiny(), team=team)
    assert scores(result.folder) == scores(uninterrupted)
    steps = len(training_loop.open_data(tiny()).train) // 4 * 3
    assert team.asked.count("wrap") == 1 and team.asked.count(("share", 4)) == 2 * steps and team.asked.count("lead") >= 3


def test_a_process_that_does_not_lead_writes_and_says_nothing(tiny, capsys):
    class Follower(Recorded):
        rank, size, leads = 1, 2, False

        def lead(self, function):  # as if the leader had done it
            return {"loss": 1.0, "dice": 50.0, "iou": 40.0, "mae": 5.0, "acc": 95.0} if getattr(function, "func", None) is validate else None

    config = tiny(epochs=1, progress=True, track=False)
    seen = []
    result = fit(config, data=training_loop.open_data(config), callbacks=[Calling(seen.append)], team=Follower())
    assert result.history[0]["valid_dice"] == 50 and not config.folder.exists() and not seen
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("changes, said", [({"batch": 5}, "a batch of 5 cannot be shared equally by 2 processes: choose a multiple of 2"),
                                           ({"drop_last": False}, "set drop_last=True")])
def test_a_team_refuses_unequal_shares_before_anything_is_read(tiny, changes, said):
    with pytest.raises(ValueError, match=said):
        fit(tiny(data="nowhere", **changes), team=SimpleNamespace(size=2))


def test_pictures_show_target_and_prediction(phantoms):
    data = SegmentationData.open(str(phantoms), size=64, cache=str(phantoms.parent / "cache"), progress=False)
    batch = data.valid.batch([0, 1])
    picture = mask_pictures(batch, torch.zeros_like(batch.masks))
    assert picture.shape == (64, 128, 3) and picture.dtype == np.uint8
    assert (picture == (255, 255, 255)).all(axis=2).any() and not (picture == PREDICTION).all(axis=2).any()


def resident() -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_stays_flat_over_epochs(tiny):
    seen = []
    fit(tiny(epochs=30, validate_every=10), callbacks=[Calling(lambda state: seen.append(resident()))])
    assert max(seen[12:]) - max(seen[:12]) < 30, f"MiB after each epoch: {seen}"


def test_mlflow_holds_parameters_metrics_and_pictures(tiny):
    config = tiny(track=True, epochs=2)
    code = (f"import json, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom qtseg.training.config import TrainConfig; from qtseg.training.loop import fit\n"
            f"fit(TrainConfig.from_dict(json.loads({json.dumps(json.dumps(config.to_dict()))})))\n"
            "import mlflow\n"
            "run = mlflow.search_runs(search_all_experiments=True, output_format='list')[0]\n"
            "client = mlflow.MlflowClient()\n"
            "print(json.dumps([run.info.status, run.data.params['lr'], sorted(run.data.metrics), "
            "[a.path for a in client.list_artifacts(run.info.run_id, 'masks')], [m.step for m in client.get_metric_history(run.info.run_id, 'lr')]]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=config.runs, capture_output=True, text=True, timeout=300, env=same_threads())
    assert done.returncode == 0, done.stderr[-2000:]
    status, lr, metrics, pictures, steps = json.loads(done.stdout.strip().splitlines()[-1])
    assert status == "FINISHED" and lr == "0.001" and {"lr", "train_loss", "valid_dice", "test_dice"} <= set(metrics)
    assert any(path.startswith("masks/epoch_0002") for path in pictures) and steps == [1, 2]
    assert not (Path(config.runs) / "mlruns").exists()


# parts of the user's own

def small_network(classes: int = 2, channels: int = 3) -> torch.nn.Module:
    """Two convolutions around a BatchNorm; the same weights each time."""
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, classes, 1))


class Stop(Exception):
    pass


class StopAfter:
    """A callback that fails after some steps of all, as a process that is killed would."""

    def __init__(self, steps: int):
        self.left = steps

    def after_batch(self, state):
        self.left -= 1
        if not self.left:
            raise Stop


class Pairs(torch.utils.data.Dataset):
    """Some pairs in memory; `change` makes something else of each."""

    def __init__(self, split, change=lambda image, mask, name: (image, mask, name)):
        self.split, self.change = split, change

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        return self.change(*self.split[index])


@pytest.fixture(scope="module")
def opened(phantoms) -> SegmentationData:
    return SegmentationData.open(str(phantoms), size=64, cache=str(phantoms.parent / "cache"), progress=False)


def test_a_given_network_is_trained_kept_scored_and_resumed_to_the_same_result(tiny):
    whole = fit(tiny(name="whole"), small_network())
    best = json.loads((whole.checkpoint_dir / "config.json").read_text())
    assert best["model_type"] == "module" and best["class"] == "torch.nn.modules.container.Sequential" and "build it again" in best["note"]
    network = small_network()
    safetensors.torch.load_model(network, whole.checkpoint_dir / "model.safetensors")
    data = training_loop.open_data(tiny())
    assert validate(network, data.test, 2, batch=4)["dice"] == whole.metrics["test"]["dice"]
    assert whole.metrics["given"]["model"] == best["class"] and (whole.checkpoint_dir / "preprocessor_config.json").is_file()
    with pytest.raises(Stop):
        fit(tiny(), small_network(), callbacks=[StopAfter(6)])
    resumed = fit(tiny(resume=True), small_network())
    assert scores(resumed.folder) == scores(whole.folder) and timeless(resumed.history) == timeless(whole.history)
    with pytest.raises(ValueError, match="resume.pt does not fit this run .its model"):
        fit(tiny(resume=True), torch.nn.Conv2d(3, 2, 1))
    with pytest.raises(ValueError, match="does not describe a network of this repository"):
        pretrained(whole.checkpoint_dir)


def test_a_run_starts_from_the_weights_of_another_with_other_classes(tiny, uninterrupted, phantoms, tmp_path, capsys, monkeypatch):
    """The trunk and the classes that fit are kept; what was kept is printed, and a note of the run."""
    source = shutil.copytree(uninterrupted / "best_dice", tmp_path / "source")
    three = tiny(data="phantoms:endoscopy:20", classes=3, epochs=1, init=str(source), progress=True)
    kept, first = pretrained(source).state_dict(), {}
    monkeypatch.setattr(Trainer, "begin_epoch", lambda self, begin=Trainer.begin_epoch: first.update(copy.deepcopy(self.model.state_dict())) or begin(self))
    result = fit(three)
    (note,) = [note for note in result.metrics["notes"] if note.startswith("started from")]
    assert "classes 0, 1 kept, 2 drawn" in note and capsys.readouterr().out.count(note) == 1
    assert all(torch.equal(first[name], kept[name]) for name in kept if name.startswith(("encoder.", "bridge.")))
    assert json.loads((result.folder / "config.json").read_text())["init"] == str(source)
    shutil.rmtree(source)  # a run that goes on has its weights in resume.pt
    again = fit(three.replace(epochs=2, resume=True))
    assert len(again.history) == 2 and note in again.metrics["notes"] and note not in capsys.readouterr().out
    with pytest.raises(ValueError, match="begun with another configuration .init: "):
        fit(three.replace(init=None, resume=True))
    with pytest.raises(ValueError, match="holds another network .width 4 instead of 8"):
        fit(tiny(init=str(uninterrupted / "best_dice"), width=8, name="other"))


def test_a_class_that_no_mask_holds_is_refused(tiny):
    with pytest.raises(ValueError, match="no mask of phantoms: dermoscopy holds class 2, which cannot be learned: lower classes, now 3"):
        fit(tiny(data="phantoms:dermoscopy:16", classes=3))
    assert not tiny().folder.exists()


def test_a_run_on_given_datasets_goes_on_with_the_same_names_only(tiny, opened):
    def pairs(prefix: str = ""):
        return tuple(Pairs(split, lambda image, mask, name: (image, mask, prefix + name)) for split in (opened.train, opened.valid))

    fit(tiny(epochs=1, augment=False), data=pairs())
    assert len(fit(tiny(epochs=2, augment=False, resume=True), data=pairs()).history) == 2
    with pytest.raises(ValueError, match="was begun with other images or masks"):
        fit(tiny(epochs=3, augment=False, resume=True), data=pairs("other_"))


@pytest.mark.parametrize("model, changes, said", [
    (torch.nn.Conv2d(3, 5, 1), {}, "Conv2d makes [1, 5, 64, 64] of images [1, 3, 64, 64]: logits [1, 2, 64, 64] are needed, for classes=2"),
    (torch.nn.Conv2d(3, 2, 3), {}, "Conv2d makes [1, 2, 62, 62] of images"), (torch.nn.Conv2d(1, 2, 1), {}, "Conv2d does not take images [1, 3, 64, 64]: "),
    (torch.nn.LSTM(64, 2), {}, "LSTM does not take images"), (torch.nn.ReLU(), {}, "ReLU cannot be trained: a model is an nn.Module with weights"),
    (len, {}, "builtins.len cannot be trained"), (small_network(), {"encoder_weights": "imagenet", "encoder": "resnet18"}, "encoder_weights imagenet is for the network that"),
    (small_network(), {"init": "phantoms"}, "init phantoms is for the network that the configuration describes"),
])
def test_a_network_that_does_not_fit_is_one_sentence(tiny, model, changes, said):
    with pytest.raises(ValueError) as caught:
        fit(tiny(**changes), model)
    assert said in str(caught.value) and "\n" not in str(caught.value) and not tiny().folder.exists()


def test_a_qtseg_of_ones_own_is_kept_as_one(tiny):
    result = fit(tiny(epochs=1), QTSeg(width=4, depths=[1, 1, 1], mlp_width=32, bridge="identity"))
    assert pretrained(result.checkpoint_dir).config["bridge"] == "identity"


def test_datasets_loss_and_augmentation_that_do_the_same_give_the_same_run(tiny, uninterrupted, opened):
    """Through a DataLoader, with or without a worker process, and with given functions: to the last bit what the configuration does."""
    pairs = tuple(Pairs(split) for split in (opened.train, opened.valid, opened.test))
    for name, workers in (("here", 0), ("worker", 1)):
        given = fit(tiny(name=name, workers=workers), data=pairs, loss=ce_dice_loss, augment=Augmentation(fill=opened.black))
        assert scores(given.folder) == scores(uninterrupted)
        assert given.metrics["given"]["loss"].endswith("ce_dice_loss") and given.metrics["images"] == {"train": 16, "valid": 4, "test": 4}
    assert not (given.folder / "splits.json").exists() and not (given.folder / "last" / "preprocessor_config.json").exists()
    assert json.loads((given.folder / "config.json").read_text())["data"] == "Pairs, given to fit"
    assert scores(fit(tiny(name="worker", resume=True), data=pairs).folder)["test"] == scores(uninterrupted)["test"]
    with pytest.raises(ValueError, match="was begun with other images or masks"):
        fit(tiny(name="worker", resume=True), data=(pairs[0], pairs[0]))


def test_floats_three_classes_and_ignored_pixels_come_from_a_dataset(tiny, opened):
    def change(image, mask, name):
        mask = mask.long().masked_fill(mask == 0, -1)  # the background counts nowhere
        mask[:8] = 2
        return image.numpy().astype(np.float64) / 127.5 - 1, mask.numpy()

    pairs = [Pairs(split, change) for split in (opened.train, opened.valid)]
    with pytest.raises(ValueError, match="Pairs yields float images, .* set augment=False"):
        fit(tiny(classes=3, ignore_value=-1), data=pairs)
    result = fit(tiny(classes=3, ignore_value=-1, augment=False, epochs=1), data=pairs)
    assert np.isfinite(result.history[0]["train_loss"]) and {"dice_1", "dice_2"} <= result.metrics["valid"].keys()
    assert any("validation split" in result.metrics[key] for key in ("test_is",))


@pytest.mark.parametrize("change, said", [
    (lambda image, mask, name: (image, mask * 255), "Pairs[0]: its mask holds 255, where class indices 0 to 1 are needed"),
    (lambda image, mask, name: (image.permute(1, 2, 0), mask), "Pairs[0]: its mask is torch.uint8 [64, 64], where whole numbers [64, 3] are needed"),
    (lambda image, mask, name: (image, mask.float()), "Pairs[0]: its mask is torch.float32 [64, 64], where whole numbers [64, 64] are needed"),
    (lambda image, mask, name: (image.int(), mask), "Pairs[0]: its image is torch.int32 [3, 64, 64], where uint8 or float [C, H, W] is needed"),
    (lambda image, mask, name: image, "Pairs[0] is no (image, mask) or (image, mask, id): Tensor"), (lambda image, mask, name: ("a", mask), "Pairs[0] is no pair of tensors"),
    (lambda image, mask, name: (image[:, : 32 + 32 * (name[-1] == "0")], mask[: 32 + 32 * (name[-1] == "0")]), "all must be alike"),
])
def test_a_pair_that_cannot_be_used_is_one_sentence(tiny, opened, change, said):
    with pytest.raises(ValueError) as caught:
        fit(tiny(), data=(Pairs(opened.train, change), Pairs(opened.valid)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data, said", [(lambda data: data.train, "data is a SegmentationData, or two or three Datasets"), (lambda data: [data.train], "two or three"),
                                        (lambda data: (data.train, iter([1])), "is needed, and list_iterator lacks them"), (lambda data: (data.train, []), "list holds no pairs"),
                                        (lambda data: (data.train, Pairs(data.valid, lambda image, mask, name: (image[:1], mask))), "differ in their channels: 3, 1")])
def test_data_that_cannot_be_used_are_one_sentence(tiny, opened, data, said):
    with pytest.raises(ValueError) as caught:
        fit(tiny(), data=data(opened))
    assert said in str(caught.value) and not tiny().folder.exists()


def test_an_augmentation_of_ones_own_draws_the_same_after_a_continuation(tiny):
    def augment(images, masks, generator):
        noisy = images.float() / 127.5 - 1 + 0.1 * torch.randn(images.shape, generator=generator) + 0.1 * torch.rand(1)  # both kinds of draws
        return noisy, masks

    whole = fit(tiny(name="whole"), augment=augment)
    with pytest.raises(Stop):
        fit(tiny(), augment=augment, callbacks=[StopAfter(6)])
    assert scores(fit(tiny(resume=True), augment=augment).folder) == scores(whole.folder)
    with pytest.raises(ValueError, match=r"returned \[\[4, 3, 64, 64\], \[4, 3, 64, 64\]\]: images"):
        fit(tiny(name="wrong"), augment=lambda images, masks: (images, images))


def test_a_loss_that_is_no_scalar_is_one_sentence(tiny):
    for loss, said in ((lambda logits, labels: logits.mean(dim=0), r"returned a tensor \[2, 64, 64\]"), (lambda logits, labels: 1.0, "returned float: a scalar tensor")):
        with pytest.raises(ValueError, match=said):
            fit(tiny(), loss=loss)


# callbacks

class Told:
    """A callback that writes down when it was called."""

    def __init__(self):
        self.calls = []

    def before_fit(self, state):
        self.calls.append(("before_fit", state.epoch, state.metrics))

    def after_batch(self, state):
        self.calls.append(("after_batch", state.epoch, state.step, float(state.loss) > 0))

    def after_epoch(self, state):
        self.calls.append(("after_epoch", state.epoch, len(state.history)))
        state.history[-1]["added"] = float(state.epoch)

    def after_fit(self, state):
        self.calls.append(("after_fit", state.metrics is not None))


def test_callbacks_are_called_in_order_and_may_add_numbers_and_stop(tiny):
    told = Told()

    def stop(state):
        state.stop = state.epoch == 2

    result = fit(tiny(epochs=9, validate_every=5), callbacks=[told, Calling(stop)])
    steps = [[("after_batch", epoch, step, True) for step in range(1, 5)] + [("after_epoch", epoch, epoch)] for epoch in (1, 2)]
    assert told.calls == [("before_fit", 0, None), *steps[0], *steps[1], ("after_fit", True)]
    assert [row["added"] for row in csv.DictReader((result.folder / "history.csv").open())] == ["1.0", "2.0"]
    assert result.metrics["train"]["epochs"] == 2 and "valid_dice" in result.history[1], "the last epoch is validated"
    assert result.metrics["given"]["callbacks"] == [f"{__name__}.Told", f"{__name__}.Calling"]
    told.calls.clear()
    with pytest.raises(Stop):
        fit(tiny(name="failed"), callbacks=[told, StopAfter(2)])
    assert told.calls[-1] == ("after_fit", False)
    with pytest.raises(ValueError, match="a callback is an object with one of before_fit, after_batch, after_epoch, after_fit, and <built-in function print> has none"):
        fit(tiny(name="function"), callbacks=[print])


def test_what_a_callback_does_wrong_costs_no_epoch(tiny, uninterrupted):
    def fail(state):
        raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            fit(tiny(resume=True), callbacks=[Calling(fail)])
    assert torch.load(tiny().folder / "resume.pt", weights_only=True)["progress"]["epoch"] == 2
    assert scores(fit(tiny(resume=True)).folder) == scores(uninterrupted)


def test_early_stopping_counts_validations_since_the_best_and_stays_stopped(tiny, monkeypatch):
    dices = iter([50.0, 60.0, 55.0, math.nan, 58.0, 70.0])
    monkeypatch.setattr(training_loop, "validate", lambda *_, **__: {"loss": 1.0, "mae": 1.0, "acc": 99.0, "dice": next(dices, 60.0), "iou": 40.0})
    config = dict(size=32, epochs=9)
    stopped = fit(tiny(**config), callbacks=[EarlyStopping(patience=3)])
    assert [row["epoch"] for row in stopped.history] == [1, 2, 3, 4, 5] and stopped.metrics["best"]["dice"] == {"epoch": 2, "value": 60.0}
    again = fit(tiny(**config, resume=True), callbacks=[EarlyStopping(patience=3)])
    assert len(again.history) == 5
    more = fit(tiny(**config, resume=True), callbacks=[EarlyStopping(patience=9)])
    assert len(more.history) == 9
    for wrong in ({"patience": 0}, {"measure": "f1"}):
        with pytest.raises(ValueError, match="patience is at least 1 and measure one of"):
            EarlyStopping(**wrong)


class Averaging:
    """The moving average by hand, beside the one that is tested."""

    def __init__(self, decay: float):
        self.decay, self.average = decay, None

    def after_batch(self, state):
        now = {name: value.double() for name, value in state.model.state_dict().items() if value.is_floating_point()}
        self.average = now if self.average is None else {name: self.decay * self.average[name] + (1 - self.decay) * now[name] for name in now}


def test_the_moving_average_is_validated_kept_and_resumed(tiny):
    by_hand = Averaging(0.8)
    whole = fit(tiny(name="whole", validate_every=3), callbacks=[EMA(0.8), by_hand])
    kept = QTSeg.from_pretrained(whole.checkpoint_dir).state_dict()
    last = QTSeg.from_pretrained(whole.folder / "last").state_dict()
    trained = torch.load(whole.folder / "resume.pt", weights_only=True)["model"]
    for name, value in by_hand.average.items():
        torch.testing.assert_close(kept[name].double(), value, rtol=1e-4, atol=1e-6)
    assert torch.equal(kept["encoder.down2.conv.weight"], last["encoder.down2.conv.weight"])
    assert not torch.equal(kept["encoder.down2.conv.weight"], trained["encoder.down2.conv.weight"])
    plain = fit(tiny(name="plain", validate_every=3))
    assert [row["train_loss"] for row in whole.history] == [row["train_loss"] for row in plain.history], "training itself is the same"
    assert scores(whole.folder) != scores(plain.folder)
    with pytest.raises(Stop):
        fit(tiny(validate_every=3), callbacks=[EMA(0.8), StopAfter(6)])
    with pytest.raises(ValueError, match="was begun with the callbacks EMA: give them again"):
        fit(tiny(validate_every=3, resume=True))
    assert scores(fit(tiny(validate_every=3, resume=True), callbacks=[EMA(0.8)]).folder) == scores(whole.folder)
    with pytest.raises(ValueError, match="decay is above 0 and below 1"):
        EMA(1.0)


def test_a_damaged_average_is_refused(tiny):
    with pytest.raises(Stop):
        fit(tiny(), callbacks=[EMA(0.8), StopAfter(6)])
    state = torch.load(tiny().folder / "resume.pt", weights_only=True)
    for change in (lambda kept: kept.popitem(), lambda kept: kept.update({"module.encoder.down2.conv.weight": endless(None)})):
        damaged = copy.deepcopy(state)
        change(damaged["callbacks"]["EMA"])
        torch.save(damaged, tiny().folder / "resume.pt")
        with pytest.raises(ValueError, match="the average of the weights in resume.pt does not fit the network"):
            fit(tiny(resume=True), callbacks=[EMA(0.8)])


# one channel, and splits as Datasets

def test_gray_images_stay_one_channel_from_the_folder_to_the_checkpoint(tiny, tmp_path):
    source = tmp_path / "gray"
    for part in ("images", "masks"):
        (source / part).mkdir(parents=True)
    for number in range(12):
        image = np.random.default_rng(number).integers(0, 4096, (64, 64)).astype(np.uint16)
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8 * (number % 4) : 8 * (number % 4) + 24] = 255
        Image.fromarray(image).save(source / "images" / f"{number}.png")
        Image.fromarray(mask).save(source / "masks" / f"{number}.png")
    config = tiny(data=str(source), cache=str(tmp_path / "cache"), channels=1, epochs=2)
    data = training_loop.open_data(config)
    assert data.shape == (1, 64, 64) and data.white == 4095 and data.train[0][0].shape == (1, 64, 64)
    three = training_loop.open_data(config.replace(channels=3))
    assert torch.equal(three.train[0][0], data.train[0][0].expand(3, -1, -1))
    result = fit(config)
    network = pretrained(result.checkpoint_dir)
    assert network.config["in_channels"] == 1 and validate(network, data.test or data.valid, 2)["dice"] == pytest.approx(result.metrics["test"]["dice"], abs=1e-6)
    assert json.loads((result.checkpoint_dir / "preprocessor_config.json").read_text())["channels"] == 1
    path, _ = data.valid.paths[0]
    with torch.no_grad():
        logits = network(normalize(data.valid.batch([0]).images))
    mask = Predictor(result.checkpoint_dir, device="cpu")(path)
    assert (mask == logits.argmax(dim=1)[0].numpy()).all()
    scored = evaluate_checkpoint(result.folder, device="cpu")
    assert scored.dice(SIZES[0]).mean() == pytest.approx(result.metrics["test"]["dice"], abs=1e-4) and scored.ids == data.valid.ids
    assert export_onnx(result.checkpoint_dir) < 1e-3
    onnx = OnnxNetwork(result.checkpoint_dir / "model.onnx", 1)(normalize(data.valid.batch([0]).images))
    torch.testing.assert_close(onnx, logits, atol=1e-3, rtol=0)


def test_images_in_color_are_not_opened_as_gray_ones(tiny):
    with pytest.raises(ValueError, match=r"images/.*png: holds colors: open the set with channels=3"):
        fit(tiny(channels=1))
    with pytest.raises(ValueError, match=r"images/.*png: has 3 channel\(s\), where channels=4 is asked for"):
        fit(tiny(channels=4))


@pytest.fixture
def measured(tmp_path):
    """A function: channels, bits -> a folder whose target can be seen in the last channel alone."""

    def make(channels: int, deep: bool) -> Path:
        source = tmp_path / f"of {channels}"
        for part in ("images", "masks"):
            (source / part).mkdir(parents=True)
        for number in range(12):
            image = np.random.default_rng(number).integers(0, 1000, (64, 64, channels)).astype(np.uint16)
            mask = np.zeros((64, 64), np.uint8)
            mask[16:48, 8 * (number % 4) : 8 * (number % 4) + 24] = 255
            image[..., -1] = 1500 + 8 * (mask > 0) * image[..., -1] // 4
            Image.fromarray(mask).save(source / "masks" / f"{number}.png")
            if deep:  # a page of 12 bits in 16 for each channel
                first, *others = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(channels)]
                first.save(source / "images" / f"{number}.tif", save_all=True, append_images=others)
            else:  # an alpha channel that was measured
                Image.fromarray((image // 16).astype(np.uint8)).save(source / "images" / f"{number}.png")
        return source

    return make


@pytest.mark.parametrize("channels, deep, normalize_by", [(4, False, "range"), (5, True, "statistics")])
def test_any_number_of_channels_goes_the_whole_way(channels, deep, normalize_by, tiny, measured, tmp_path):
    """From PNG with alpha or TIFF pages through training and evaluation to predictions, by PyTorch; TIFF pages by ONNX Runtime, too."""
    source = measured(channels, deep)
    config = tiny(data=str(source), cache=str(tmp_path / "cache"), channels=channels, epochs=2, normalize=normalize_by)
    data = training_loop.open_data(config)
    assert data.shape == (channels, 64, 64) and data.white == (4095 if deep else 65535)
    images = data.train.batch(range(len(data.train))).images.double() / 255
    told = data.preprocessing
    np.testing.assert_allclose(told.mean, images.mean(dim=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(told.std, images.std(dim=(0, 2, 3), correction=0), atol=1e-6)
    result = fit(config)
    network, stored = pretrained(result.checkpoint_dir), json.loads((result.checkpoint_dir / "preprocessor_config.json").read_text())
    assert (stored["channels"], stored["mean"], stored["std"]) == (channels, list(told.mean), list(told.std))
    assert network.config.get("statistics") == ([list(told.mean), list(told.std)] if normalize_by == "statistics" else None)
    path, batch = data.valid.paths[0][0], data.valid.batch([0]).images
    with torch.no_grad():
        logits = network(normalize(batch))
        if normalize_by == "statistics":
            plain = QTSeg(**{name: value for name, value in network.config.items() if name != "statistics"}).eval()
            plain.load_state_dict(network.state_dict())
            mean, std = (torch.tensor(values)[:, None, None] for values in (told.mean, told.std))
            torch.testing.assert_close(plain((batch / 255 - mean) / std), logits, atol=1e-3, rtol=1e-4)
    assert not deep or export_onnx(result.checkpoint_dir) < 1e-3
    array = read_image(path, data.white, channels)
    for engine in ("torch", "onnx")[:1 + deep]:
        predictor = Predictor(result.checkpoint_dir, device="cpu", engine=engine)
        for given in (path, array):
            assert (predictor(given) != logits.argmax(dim=1)[0].numpy()).mean() < 0.001
        with pytest.raises(ValueError, match=f"{channels} channels is an array"):
            predictor(array[..., :3])
    scored = evaluate_checkpoint(result.folder, device="cpu")
    assert scored.dice(SIZES[0]).mean() == pytest.approx(result.metrics["test"]["dice"], abs=1e-4)
    summary = predict_files(Predictor(result.checkpoint_dir, device="cpu"), [source / "images"], tmp_path / "out", overlay=True, progress=False)
    assert (summary.done, summary.failed) == (12, 0)


def test_statistics_are_of_the_training_images_without_their_padding(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "d" / part).mkdir(parents=True)
        for number in range(4):
            array = np.full((32, 64, 3), (40 * number + 10, 100, 250), np.uint8) if part == "images" else np.zeros((32, 64), np.uint8)
            Image.fromarray(array).save(tmp_path / "d" / part / f"{number}.png")
    told = SegmentationData.open(tmp_path / "d", size=64, resize="pad", folds=2, fold=1, cache=tmp_path / "cache", progress=False).preprocessing
    np.testing.assert_allclose([told.mean, told.std], [[30 / 255, 100 / 255, 250 / 255], [20 / 255, 0, 0]], atol=1e-6)


def test_statistics_are_refused_where_there_are_none(tiny, phantoms):
    with pytest.raises(ValueError, match="normalize statistics is for the network that the configuration describes"):
        fit(tiny(normalize="statistics"), model=torch.nn.Conv2d(3, 2, 1))
    pairs = [(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.uint8))] * 8
    with pytest.raises(ValueError, match="normalize statistics needs data that SegmentationData opened"):
        fit(tiny(normalize="statistics"), data=(pairs, pairs))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_split_is_a_dataset_for_a_dataloader(opened, workers):
    context = {"multiprocessing_context": "spawn"} if workers else {}
    batches = list(torch.utils.data.DataLoader(opened.train, batch_size=5, num_workers=workers, **context))
    expected = opened.train.batch(range(len(opened.train)))
    assert torch.equal(torch.cat([images for images, _, _ in batches]), expected.images)
    assert torch.equal(torch.cat([masks for _, masks, _ in batches]), expected.masks)
    assert [name for _, _, names in batches for name in names] == expected.ids and isinstance(opened.train, torch.utils.data.Dataset)
    assert len(pickle.dumps(opened.train)) < 10_000, "the cache's bytes do not travel to a worker"
    with pytest.raises(IndexError):
        opened.train[len(opened.train)]


def test_albumentations_take_the_pairs_of_a_split(opened):
    albumentations = pytest.importorskip("albumentations", reason="albumentations is not installed")
    flip = albumentations.HorizontalFlip(p=1.0)

    def change(image, mask, name):
        both = flip(image=image.permute(1, 2, 0).numpy(), mask=mask.numpy())
        return torch.from_numpy(both["image"].copy()).permute(2, 0, 1), torch.from_numpy(both["mask"].copy()), name

    image, mask, _ = Pairs(opened.train, change)[3]
    assert torch.equal(image, opened.train[3][0].flip(2)) and torch.equal(mask, opened.train[3][1].flip(1))


# progress

def test_progress_is_a_line_for_each_epoch_and_no_bar_where_nothing_is_replaced(tiny, capsys):
    fit(tiny(size=32, epochs=2, progress=True), data=training_loop.open_data(tiny(size=32)))
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"] and lines[1].endswith("|  00:00 left")
    assert all("loss" in line and "Dice" in line and "validation" in line for line in lines)
    assert "%|" not in printed.out + printed.err
    fit(tiny(size=32, epochs=1, name="silent"))
    assert "epoch" not in capsys.readouterr().out


def test_the_time_left_is_that_of_the_epochs_to_come():
    row = {"epoch": 1, "lr": 1e-3, "train_loss": 1.0, "train_dice": 50.0, "seconds": 10.0, "images_per_second": 2.0, "waited_percent": 0.0}
    history = [row, row | {"epoch": 2, "valid_loss": 1.0, "valid_dice": 50.0, "valid_iou": 40.0, "valid_seconds": 4.0}]
    assert training_callbacks.epoch_line(history[:1], 5).endswith("00:40 left")
    assert training_callbacks.epoch_line(history, 302).endswith("1:00:00 left"), "300 epochs of 12 seconds"


def test_the_bar_of_a_resumed_run_begins_where_the_run_stands():
    bar = training_callbacks.ProgressBar()
    bar.after_fit(None)  # a run that was refused before it began
    bar.before_fit(SimpleNamespace(config=SimpleNamespace(epochs=4), history=[{}], steps=5, step=2))
    assert (bar._bar.n, bar._bar.total) == (7, 20)


# the papermill notebook

def papermill(tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess, Path]:
    output = tmp_path / "executed.ipynb"
    done = subprocess.run([sys.executable, "-m", "papermill", "--kernel", "python3", "--log-level", "ERROR", "--no-progress-bar", "--stdout-file", "-",
                           str(ROOT / "nbs/experiments/train.ipynb"), str(output), "-f", str(ROOT / "nbs/experiments/params/demo.yaml"), "-p", "runs", str(tmp_path), *options],
                          cwd=tmp_path, capture_output=True, text=True, timeout=400)
    return done, output


@pytest.mark.parametrize("path", [path for path in sorted((ROOT / "nbs/experiments/params").glob("*.yaml")) if not path.stem.startswith("benchmark")],
                         ids=lambda path: path.stem)
def test_a_parameter_file_means_the_same_in_the_notebook_and_on_the_command_line(path):
    """What a file leaves out is the notebook's value there, and the default of `TrainConfig` here."""
    given = parameters_of(ROOT / "nbs/experiments/train.ipynb")
    assert given.keys() == TrainConfig.model_fields.keys()
    values = yaml.safe_load(path.read_text())
    assert given | values == TrainConfig.from_dict(values).to_dict()


def test_the_notebook_refuses_unknown_and_ill_typed_parameters(tmp_path):
    notebook = ROOT / "nbs/experiments/train.ipynb"
    assert "unknown configuration keys: epoch" in refused_parameters(notebook, runs=str(tmp_path), epoch=3)
    assert "lr is a number > 0, not 'fast'" in refused_parameters(notebook, runs=str(tmp_path), lr="fast")
    assert not (tmp_path / "demo").exists()


def test_papermill_trains_evaluates_and_shows(tmp_path):
    small = ["-p", "data", "phantoms:nuclei:24", "-p", "size", "64", "-p", "width", "4", "-p", "epochs", "2", "-p", "batch", "4", "-p", "cache", str(tmp_path)]
    done, output = papermill(tmp_path, *small)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"] and lines[1].endswith("00:00 left"), "the terminal shows each epoch"
    assert all("Dice" in line and "loss" in line for line in lines)
    folder = tmp_path / "demo"
    assert {"metrics.json", "masks.png", "curves.png", "best_dice"} <= {path.name for path in folder.iterdir()}
    cells = json.loads(output.read_text())["cells"]
    kept = [out for cell in cells if "fit(" in "".join(cell["source"]) for out in cell["outputs"]]
    assert sum("application/vnd.jupyter.widget-view+json" in out.get("data", {}) for out in kept) == 1, "one bar, which was replaced"
    assert not any("%|" in "".join(out.get("text", "")) for out in kept) and len(kept) <= 6
    assert sum("image/png" in out.get("data", {}) for cell in cells for out in cell.get("outputs", [])) >= 3
    done, _ = papermill(tmp_path, *small)  # the same command again: nothing is trained twice
    assert done.returncode == 0 and time.time() - os.path.getmtime(folder / "resume.pt") > 3


# real images

@pytest.mark.parametrize("archive, options", [("isic2018_512.zip", {"color": "ycrcb"}), ("bkai_512.zip", {"folds": 4, "fold": 3, "masks": "any"}),
                                              ("bkai_512.zip", {"folds": 4, "fold": 3, "classes": 3})])
def test_real_images_train(tmp_path, tiny, archive, options):
    """A few real images through the whole road: archive, check, cache, a step, evaluation."""
    source = shared_folder() / "data" / archive
    if not source.is_file():
        pytest.skip(f"{source} is not there: real images never enter the repository")
    root = tmp_path / "few"
    with zipfile.ZipFile(source) as full:
        for folder in sorted({str(Path(name).parent) for name in full.namelist() if not name.endswith("/")}):
            for name in sorted(name for name in full.namelist() if str(Path(name).parent) == folder)[:12]:
                full.extract(name, root)
    result = fit(tiny(data=str(root), cache=str(tmp_path / "cache"), epochs=1, **options))
    assert np.isfinite(result.history[0]["train_loss"])


def test_threads_follow_the_neighbors(monkeypatch):
    """Fewer beside a busy process, all again when it ends, one warning, and as many as before at the end; OMP_NUM_THREADS is obeyed."""
    before, seconds, clock = torch.get_num_threads(), {"1": 0.0}, [0.0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(training_hardware, "cpu_seconds", lambda: dict(seconds))
    monkeypatch.setattr(training_hardware.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(training_hardware.time, "perf_counter", lambda: clock[0])

    def wait(duration, use=0.0):
        clock[0] += duration
        seconds["1"] += use * duration

    monkeypatch.setattr(training_hardware.time, "sleep", lambda duration: wait(duration, use=1.0))
    try:
        torch.set_num_threads(4)
        share = training_hardware.ThreadShare(torch.device("cpu"))
        with pytest.warns(UserWarning, match="other programs keep 1.0 cores busy: computing with 3 instead of 4 threads"), share:
            assert torch.get_num_threads() == 3
            wait(1)
            share.look()
            assert torch.get_num_threads() == 3, "looked too soon"
            wait(5)
            share.look()
            assert torch.get_num_threads() == 4
            wait(5, use=4.0)
            share.look()
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        with share:
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("first, given, expected", [("qtseg", {}, "10000"), ("torch", {}, "None"), ("qtseg", {"GOMP_SPINCOUNT": "7"}, "7"),
                                                    ("qtseg", {"OMP_WAIT_POLICY": "PASSIVE"}, "None")])
def test_waiting_threads_soon_sleep_unless_it_is_too_late_or_said_otherwise(first, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import sys\nif {first == 'torch'}: sys.modules['torch'] = sys\nimport os, qtseg\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_freed_memory speaks to glibc")
def test_freed_memory_is_kept():
    """Blocks of 40 MB: as it comes each is faulted in anew, page by page; kept, soon none is."""
    program = """
import resource, torch
from qtseg.training.hardware import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(20)))
keep_freed_memory()
print(min(faults() for _ in range(20)))  # the heap needs some calls to find its shape: small blocks get in the way
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert kept < fresh / 10
