"""Export and sharing: the same logits in every engine, cards that say only what is known, and files that are refused."""
from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, one_sentence
from safetensors.torch import load_file, save_file

from qtseg.prediction import cards as prediction_cards, export as prediction_export
from qtseg.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from qtseg.prediction.cards import data_name, model_card, pack, push_to_hub, write_card
from qtseg.prediction.export import AnySize, export_onnx, largest_difference, parity_images, record_graph
from qtseg.cli import main
from qtseg.evaluation.runs import weights_sha256
from qtseg.prediction.networks import OnnxNetwork
from qtseg.prediction.predictor import Predictor
from qtseg.network.hub import download_checkpoint
from qtseg.network.state import find_checkpoint
from qtseg.network.model import QTSeg
from qtseg.data.phantoms import phantom
from qtseg.training.config import TrainConfig

SMALL = dict(width=4, depths=[1, 1, 1], heads=2, mlp_width=16)
SHAPES = [(1, 32, 32), (2, 32, 45), (3, 100, 77), (1, 64, 128), (4, 33, 95)]
METRICS = {"test": {"loss": 0.3, "mae": 4.25, "acc": 95.75, "dice": 87.654321, "iou": 81.5}, "test_is": "the test split", "selected_by": "dice",
           "images": {"train": 60, "valid": 20, "test": 11}, "train": {"seconds": 754.0, "epochs": 3},
           "hardware": {"device": "cpu", "processor": "A | processor", "system": "Linux-secret"}, "versions": {"torch": "2.15.0"}}


def small_network(classes: int = 2, in_channels: int = 3, seed: int = 0, **changes) -> QTSeg:
    """A small network whose every tensor is random, BatchNorm's statistics included, so that fusing changes all of them."""
    torch.manual_seed(seed)
    model = QTSeg(classes, in_channels, **{**SMALL, **changes})
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand(tensor.shape))
    return model.eval()


def save_checkpoint(folder: Path, model: QTSeg, preprocessing: Preprocessing = Preprocessing(64, "pad", "ycrcb")) -> Path:
    model.save_pretrained(folder)
    (folder / PREPROCESSING_FILE).write_text(json.dumps(asdict(preprocessing)), encoding="utf-8")
    return folder


def save_run(folder: Path, config: TrainConfig, metrics: dict = METRICS) -> Path:
    """A run with a checkpoint best_dice."""
    checkpoint = save_checkpoint(folder / "best_dice", small_network())
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, float]:
    """A checkpoint with its model.onnx, exported once, and how far its logits are off."""
    checkpoint = save_run(tmp_path_factory.mktemp("run"), TrainConfig(data="phantoms:dermoscopy:91", epochs=3, batch=4))
    return checkpoint, export_onnx(checkpoint)


@pytest.fixture
def checkpoint(exported, tmp_path) -> Path:
    """A copy of it to be damaged."""
    shutil.copytree(exported[0].parent, tmp_path / "run")
    return tmp_path / "run" / "best_dice"


def images(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return 2 * torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(height)) - 1


# --- the same logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_any_size_changes_nothing(shape):
    network = small_network()
    with torch.no_grad():
        assert torch.equal(AnySize(network)(images(*shape)), network(images(*shape)))


def test_parity_images_are_what_they_claim():
    batches = parity_images(4)
    assert [tuple(batch.shape) for batch in batches] == [(b, 4, h, w) for b, h, w in prediction_export.PARITY_SHAPES for _ in range(2)]
    assert all(batch.min() >= -1 and batch.max() <= 1 and batch.std() > 0.1 for batch in batches)
    assert len({batch.shape[2:] for batch in batches}) == len({len(batch) for batch in batches}) == 3


def test_largest_difference_sees_a_single_pixel_and_a_nan():
    batches = parity_images()

    def off(amount):
        def network(batch):
            logits = batch.clone()
            if len(batch) == 2:
                logits[1, 0, 5, 7] += amount
            return logits
        return network

    assert largest_difference(torch.clone, off(0.5), batches) == pytest.approx(0.5, abs=1e-6)
    assert largest_difference(torch.clone, off(float("nan")), batches) != largest_difference(torch.clone, off(0), batches) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_runtime_computes_the_same_logits(exported, shape):
    """At five sizes and four batch sizes, sides of 32 and sides that are no multiple of 32 among them."""
    network, engine = QTSeg.from_pretrained(exported[0]), OnnxNetwork(exported[0] / "model.onnx", 1)
    batch = images(*shape)
    assert engine(batch).shape == (shape[0], 2, *shape[1:])
    assert largest_difference(network, engine, [batch]) < 1e-4
    assert network(batch).std() > 100 * 1e-4  # the logits differ among themselves by far more than that


def test_export_returns_what_it_measured(exported):
    assert 0 < exported[1] < 1e-4


def test_one_class_and_one_channel_of_the_second_version_to_another_place(tmp_path):
    """Dual-mix attention, its channel branch at work: one file for all sizes."""
    network = small_network(1, 1, bridge="identity", decoder="dma")
    assert all(gamma != 0 for name, gamma in network.state_dict().items() if name.endswith("gamma"))
    folder = save_checkpoint(tmp_path / "a", network)
    assert export_onnx(folder, tmp_path / "other.onnx") < 1e-4
    assert not (folder / "model.onnx").exists()
    engine = OnnxNetwork(tmp_path / "other.onnx", 1)
    assert engine(images(2, 40, 70, 1)).shape == (2, 1, 40, 70)
    assert largest_difference(network, engine, [images(*shape, 1) for shape in SHAPES]) < 1e-4


def test_the_onnx_file_says_what_it_is_and_nothing_about_the_machine(exported):
    import onnx

    path = exported[0] / "model.onnx"
    assert sorted(file.name for file in exported[0].iterdir()) == ["config.json", "model.onnx", "model.safetensors", PREPROCESSING_FILE]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    shapes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*model.graph.input, *model.graph.output)}
    assert shapes == {"images": ["batch", 3, "height", "width"], "logits": ["batch", 2, "height", "width"]}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["weights_sha256"] == weights_sha256(exported[0])
    assert Preprocessing(**{**json.loads(metadata["preprocessing"]), "class_names": ("a", "b")}) == Preprocessing(64, "pad", "ycrcb", ("a", "b"))
    assert json.loads(metadata["class_names"]) == ["background", "foreground"] and metadata["qtseg"]
    data = path.read_bytes()
    assert not [trace for trace in (str(ROOT), "site-packages", "/qtseg/", 'File "') if trace.encode() in data]


def test_the_predictor_answers_alike_with_both_engines(exported):
    picture, _ = phantom("dermoscopy", 5, 90)
    picture = picture[:70]
    probabilities = [Predictor(exported[0], engine=engine, device="cpu").probabilities(picture) for engine in ("torch", "onnx")]
    assert probabilities[0].shape == (70, 90, 2)
    assert abs(probabilities[0] - probabilities[1]).max() < 1e-4


def test_the_recorded_graph_computes_the_same_logits():
    """With three classes; sides of 32 are not recorded."""
    network = small_network(3, bridge="identity", decoder="conv")
    program = record_graph(network.fuse()).module()
    assert largest_difference(network, program, [images(*shape) for shape in SHAPES if min(shape[1:]) >= prediction_export.SMALLEST_RECORDED]) < 1e-4


def test_recording_leaves_the_network_as_it_was():
    network = torch.nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in network.state_dict().items()}
    program = record_graph(network)
    assert all(torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1] for name, tensor in network.state_dict().items())
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


# --- exports that must not happen -----------------------------------------------------------------------------------


class Translated:
    """Stands for a translated graph: its file is a copy of another one."""

    def __init__(self, source: Path):
        self.source, self.model = source, MagicMock()

    def save(self, path: str, external_data: bool) -> None:
        assert not external_data
        shutil.copy(self.source, path)


@pytest.fixture
def translation(exported, monkeypatch):
    """Every translation yields the file of `exported`, without the seconds that a real one takes."""
    monkeypatch.setattr(prediction_export, "record_graph", lambda *arguments: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: Translated(exported[0] / "model.onnx"))


@pytest.mark.parametrize("problem", ["other weights", "nan", "crash", "other sizes"])
def test_a_graph_that_computes_something_else_is_not_written(checkpoint, translation, monkeypatch, problem):
    """A file that was there stays; none appears where there was none."""
    old = (checkpoint / "model.onnx").read_bytes()
    if problem == "other weights":
        small_network(seed=1).save_pretrained(checkpoint)
    else:
        broken = {"nan": lambda self, batch: batch[:, :2] * float("nan"), "other sizes": lambda self, batch: batch[:, :2, :-1],
                  "crash": lambda self, batch: 1 / 0}[problem]
        monkeypatch.setattr(OnnxNetwork, "__call__", broken)
    before = sorted(path.name for path in checkpoint.iterdir())
    with pytest.raises(ValueError) as caught:
        export_onnx(checkpoint)
    one_sentence(caught, "model.onnx", "nothing was written")
    assert (checkpoint / "model.onnx").read_bytes() == old and sorted(path.name for path in checkpoint.iterdir()) == before
    with pytest.raises(ValueError):
        export_onnx(checkpoint, checkpoint / "new.onnx")
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_a_model_of_other_weights_is_neither_packed_nor_used(checkpoint, tmp_path):
    small_network(seed=1).save_pretrained(checkpoint)
    for refused in (lambda: pack(checkpoint, tmp_path / "packed"), lambda: Predictor(checkpoint, engine="onnx")):
        with pytest.raises(ValueError) as caught:
            refused()
        one_sentence(caught, "model.onnx", "qtseg export")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_sentence(checkpoint, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(checkpoint), "--onnx"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and package in said and "pip install onnx" in said


def test_an_old_pytorch_is_one_sentence(monkeypatch):
    def export_of_old(module, arguments, *, dynamic_shapes, strict):
        raise AssertionError("not called: an argument is unknown")

    monkeypatch.setattr(torch.export, "export", export_of_old)
    with pytest.raises(RuntimeError, match="pip install --upgrade torch"):
        record_graph(torch.nn.Conv2d(3, 2, 1))


# --- the model card -------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the card's head")
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_run_knows(exported):
    card = model_card(exported[0])
    head = front_matter(card)
    assert head["license"] == "apache-2.0" and head["library_name"] == "qtseg"  # phantoms: nobody else's data
    [result] = head["model-index"][0]["results"]
    assert result["dataset"] == {"type": "phantoms:dermoscopy:91", "name": "phantoms:dermoscopy:91", "split": "test"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"dice": 87.6543, "iou": 81.5, "acc": 95.75, "mae": 4.25}
    for fact in ("| 87.65 | 81.50 | 95.75 | 4.25 |", "60 train, 20 valid, 11 test", "11 images of the test split", "3 epochs, batch 4", "12.6 minutes",
                 "A &#124; processor", "torch 2.15.0", "64×64", "ycrcb", weights_sha256(exported[0]), "Not for clinical use", "Predictor",
                 "None was found beside this checkpoint"):
        assert fact in card
    assert "unknown" not in card.lower().replace("errors are unknown", "") and "flatter" not in card and "Linux-secret" not in card


def test_the_hub_understands_the_card(exported):
    hub = pytest.importorskip("huggingface_hub", reason="the hub's own reader of cards")
    [dice, *others] = hub.ModelCard(model_card(exported[0])).data.eval_results
    assert (dice.dataset_name, dice.metric_type, dice.metric_value) == ("phantoms:dermoscopy:91", "dice", 87.6543) and len(others) == 3


def test_a_validation_score_is_called_one(tmp_path):
    metrics = {**METRICS, "images": {"train": 60, "valid": 20, "test": 0}, "test_is": "the validation split: this data has no test split"}
    card = model_card(save_run(tmp_path, TrainConfig(data="phantoms:all:80"), metrics))
    assert "20 images of the validation split" in card and "flatter" in card
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["split"] == "validation"


def test_a_card_invents_nothing(checkpoint, tmp_path):
    """Without a run, beside another program's config.json, and for weights that were not scored."""
    alone = save_checkpoint(tmp_path / "alone" / "ck", small_network())
    (tmp_path / "alone" / "config.json").write_text('{"data": "phantoms:all:9", "epochs": 5}')
    card = model_card(alone)
    assert card.count(prediction_cards.UNKNOWN) == 3 and "model-index" not in card and "phantoms" not in card
    assert front_matter(card)["license"] == "other"
    other = save_checkpoint(checkpoint.parent / "last", small_network(seed=1))
    card = model_card(other)
    assert card.count(prediction_cards.UNKNOWN) == 1 and "87.65" not in card and "phantoms:dermoscopy:91" in card and "time: unknown" in card
    shutil.copytree(checkpoint, checkpoint.parent / "best_iou")  # the same weights: scored after all
    assert "87.65" in model_card(checkpoint.parent / "best_iou")


@pytest.mark.parametrize("source, name", [("../shared/data/isic2018_512.zip", "isic2018_512"), ("phantoms:all:4", "phantoms:all:4"), ("data/busi/", "busi"),
                                          ("/home/me/a/isic.v2", "isic.v2"), ("C:\\Users\\me\\bkai", "bkai"), ("kvasir", "kvasir")])
def test_data_names(source, name):
    assert data_name(source) == name


def test_a_card_holds_no_path_and_no_image_name(tmp_path):
    config = TrainConfig(data="/home/someone/secret/isic: 2018 | \"x\".zip", cache="/home/someone/cache", runs="/home/someone/runs", name="n",
                         encoder_weights="C:\\Users\\someone\\fpn-nano.pth")
    card = model_card(save_run(tmp_path, config, {**METRICS, "notes": ["left out of train: patient_007"]}))
    for secret in ("/home", "someone", "secret", "Users", "patient_007", str(tmp_path)):
        assert secret not in card
    assert "fpn-nano.pth" in card and front_matter(card)["license"] == "other"
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"] == 'isic: 2018 | "x"'


def test_a_card_tells_of_evaluations(checkpoint):
    def score(mean, low, high):
        return {"mean": mean, "low": low, "high": high, "defined": 11}

    scores = {"own": {"mean": {"dice": score(86.5, 80.25, 91.125), "iou": score(None, None, None)}}}
    found = {"split": "test", "images": 11, "scores": scores, "missed": {"own": {"lesions": 10, "missed": 2, "false_alarms": 1}}, "checkpoint": "/home/me"}
    (checkpoint / "evaluation_test").mkdir()
    (checkpoint / "evaluation_test" / "evaluation.json").write_text(json.dumps(found))
    card = model_card(checkpoint)
    assert "Test split, 11 images" in card and "Dice 86.50 (80.25 to 91.12), IoU undefined; lesions 10, missed 2, false alarms 1." in card
    assert "/home/me" not in card
    scores["own"]["mean"]["dice"] = score(86.5, None, None)
    (checkpoint / "evaluation_test" / "evaluation.json").write_text(json.dumps(found))
    assert "Dice 86.50 (no interval)" in model_card(checkpoint), "images of one patient have no interval"
    (checkpoint / "evaluation_test" / "evaluation.json").write_text('{"split": "test"}')
    with pytest.raises(ValueError) as caught:
        model_card(checkpoint)
    one_sentence(caught, "evaluation.json", "take it away")


def test_texts_of_strangers_stay_texts_in_a_card(tmp_path):
    """Class names, the device, versions, counts: whatever a file of a run holds, it is shown and does nothing."""
    bad = "<img src=x onerror=alert(1)> | [a](javascript:b) `c`"
    metrics = {**METRICS, "selected_by": "dice", "images": {bad: 1, "train": 60, "valid": 20, "test": bad}, "versions": {bad: bad},
               "hardware": {"device": bad, "processor": bad}}
    folder = save_run(tmp_path, TrainConfig(data=f"{bad}.zip", epochs=3), metrics)
    (folder / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64, class_names=("background", f"{bad}\n# Head")))))
    (folder / "evaluation_test").mkdir()
    score = {"mean": 1.0, "low": 0.0, "high": 2.0}
    found = {"split": bad, "images": bad, "scores": {"own": {"mean": {"dice": score, "iou": score}}}, "missed": {"own": {bad: bad}}}
    (folder / "evaluation_test/evaluation.json").write_text(json.dumps(found))
    card = model_card(folder)
    body = card.split("---\n", 2)[2]
    assert body.count("onerror") >= 10 and "<img" not in body and "](javascript" not in body and "\n# Head" not in body
    assert front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"] == bad  # YAML quotes it
    for damaged in ({**METRICS, "test": {**METRICS["test"], "dice": "high"}}, {**METRICS, "train": {"seconds": "long"}}, {**METRICS, "images": 3}):
        (tmp_path / "metrics.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError) as caught:
            model_card(folder)
        one_sentence(caught, "metrics.json", "take it away")


def test_a_run_stands_for_the_checkpoint_it_selected(checkpoint, tmp_path, capsys):
    save_checkpoint(checkpoint.parent / "last", small_network(seed=1))
    assert main(["export", str(checkpoint.parent), "--card", "--pack", str(tmp_path / "packed")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(checkpoint / "README.md"), str(tmp_path / "packed")]
    assert weights_sha256(tmp_path / "packed") == weights_sha256(checkpoint) and model_card(checkpoint.parent) == model_card(checkpoint)


def test_a_card_that_is_a_link_is_not_shared(checkpoint, tmp_path):
    """A stranger's checkpoint whose README.md leads to a private file: packing it, to upload it, would publish that file."""
    (tmp_path / "private key").write_text("secret")
    (checkpoint / "README.md").symlink_to(tmp_path / "private key")
    for function in (write_card, lambda folder: pack(folder, tmp_path / "packed")):
        with pytest.raises(ValueError) as caught:
            function(checkpoint)
        one_sentence(caught, "README.md is a link", "delete it")
    assert not (tmp_path / "packed").exists() and (tmp_path / "private key").read_text() == "secret"


def test_a_card_somebody_wrote_stays(checkpoint):
    path = write_card(checkpoint)
    assert path.read_text(encoding="utf-8") == model_card(checkpoint)
    (checkpoint.parent / "metrics.json").unlink()
    assert "87.65" not in write_card(checkpoint).read_text(encoding="utf-8")  # written anew
    path.write_text("mine", encoding="utf-8")
    assert write_card(checkpoint).read_text(encoding="utf-8") == "mine"


# --- packing and the hub --------------------------------------------------------------------------------------------


def test_a_packed_folder_holds_what_others_need_and_no_more(checkpoint, tmp_path):
    for name in ("resume.pt", "notes.txt", "model.pt2"):
        (checkpoint / name).write_text("private")
    packed = pack(checkpoint, tmp_path / "new" / "packed")
    assert sorted(path.name for path in packed.iterdir()) == ["README.md", "config.json", "model.onnx", "model.safetensors", PREPROCESSING_FILE]
    assert (packed / "README.md").read_text(encoding="utf-8") == model_card(checkpoint) and not (checkpoint / "README.md").exists()
    for engine in ("torch", "onnx"):
        assert Predictor(packed, engine=engine, device="cpu")(phantom("dermoscopy", 1, 64)[0]).shape == (64, 64)
    with pytest.raises(FileExistsError, match="name a new folder"):
        pack(checkpoint, packed)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["packed"]


def test_packing_prefers_a_card_that_somebody_wrote(checkpoint, tmp_path):
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "model.onnx").unlink()
    packed = pack(checkpoint, tmp_path / "packed")
    assert (packed / "README.md").read_text() == "mine" and not (packed / "model.onnx").exists()


class Hub:
    """Stands for huggingface_hub: notes what is asked of it, fails as told."""

    def __init__(self, token=None, error=None):
        self.stored, self.error, self.asked, self.found = token, error, [], None

    def get_token(self):
        return self.stored

    def HfApi(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    def snapshot_download(self, name, *, revision, cache_dir, allow_patterns):
        self.asked.append(("download", name, revision, cache_dir, sorted(allow_patterns)))
        if self.error:
            raise self.error
        return self.found


TOKEN = "hf_VerySecretToken123"


def http_error(status: int) -> Exception:
    error = RuntimeError(f"Authorization: Bearer {TOKEN}\nrefused")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize("private", [True, False])
def test_what_is_uploaded(checkpoint, monkeypatch, capsys, private):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert push_to_hub(checkpoint, "me/skin.v1", private=private, token=TOKEN) == "https://huggingface.co/me/skin.v1"
    assert hub.asked == [("token", TOKEN), ("create", "me/skin.v1", private, True),
                         ("upload", "me/skin.v1", ["README.md", "config.json", "model.onnx", "model.safetensors", PREPROCESSING_FILE])]
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err


@pytest.mark.parametrize("error, kind, word", [(http_error(401), PermissionError, "hf auth login"), (http_error(403), PermissionError, "hf auth login"),
                                               (http_error(404), FileNotFoundError, "no such repository"), (http_error(500), ConnectionError, "500"),
                                               (TimeoutError(TOKEN), ConnectionError, "TimeoutError"), (Exception(TOKEN), ConnectionError, "connection")])
def test_a_failed_request_is_one_sentence_without_the_token(checkpoint, monkeypatch, capsys, error, kind, word):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(token=TOKEN, error=error))
    with pytest.raises(kind) as caught:
        push_to_hub(checkpoint, "me/skin")
    one_sentence(caught, "me/skin", word)
    assert TOKEN not in repr(caught.value) and caught.value.__suppress_context__
    with pytest.raises(kind) as caught:
        download_checkpoint("me/skin")
    one_sentence(caught, "me/skin", word)
    assert main(["export", str(checkpoint), "--push", "me/skin"]) == 1
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err and said.err.count("\n") == 1


def test_nothing_is_asked_of_the_hub_in_vain(checkpoint, monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(PermissionError, match="hf auth login"):
        push_to_hub(checkpoint, "me/skin")
    for name in ("skin", "me/", "/skin", "a/b/c", "../up", "me/skin ", ""):
        with pytest.raises(ValueError, match="USER/NAME"):
            push_to_hub(checkpoint, name, token=TOKEN)
    (checkpoint / PREPROCESSING_FILE).unlink()
    with pytest.raises(FileNotFoundError):
        push_to_hub(checkpoint, "me/skin", token=TOKEN)
    assert hub.asked == []


def test_a_folder_wins_over_the_hub(checkpoint, monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    shutil.copytree(checkpoint, tmp_path / "me" / "skin")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("me/skin") == Path("me/skin") and hub.asked == []
    for typo in ("me/other", tmp_path / "nowhere"):  # beside a folder that exists it is a path, mistyped
        with pytest.raises(FileNotFoundError, match="is no folder"):
            find_checkpoint(typo)
    assert hub.asked == []
    hub.found = checkpoint
    assert find_checkpoint("you/other", revision="v1", cache=tmp_path) == checkpoint
    assert hub.asked == [("download", "you/other", "v1", tmp_path, sorted(["config.json", "model.safetensors", PREPROCESSING_FILE]))]
    assert Predictor("you/other", device="cpu").identity == Predictor(checkpoint, device="cpu").identity


def test_the_real_library_offline_is_one_sentence(tmp_path):
    """With huggingface_hub itself, told to stay offline and with an empty cache."""
    code = ("from qtseg.network.hub import download_checkpoint\ntry:\n    download_checkpoint('nobody/nothing-at-all')\n"
            "except (ConnectionError, FileNotFoundError) as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "downloading nobody/nothing-at-all failed" in done.stdout


# --- files from strangers -------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it runs code: here, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').write('code ran')",))


def tampered(path: Path, **header) -> bytes:
    """A safetensors file's bytes with changed entries in its header."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    changed = json.dumps({**json.loads(data[8:8 + size]), **header}).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + size:]


def overlapping(path: Path) -> bytes:
    """Two tensors that claim the same bytes."""
    data = path.read_bytes()
    header = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])
    one, other = [name for name in header if header[name].get("shape") == header["encoder.down2.norm.weight"]["shape"]][:2]
    return tampered(path, **{other: header[one]})


def unsafe_weights(path: Path, kind: str, evidence: Path) -> None:
    data = path.read_bytes()
    if kind == "torch zip":
        torch.save({"bomb": Bomb(evidence)}, path)
        return
    size = struct.unpack("<Q", data[:8])[0]
    path.write_bytes({
        "pickle": pickle.dumps(Bomb(evidence)), "truncated": data[:-1], "half": data[:len(data) // 2], "empty": b"", "header only": data[:8 + size],
        "huge header": struct.pack("<Q", 2**62) + data[8:], "longer": data + b"x", "overlapping": overlapping(path),
        "outside": tampered(path, **{"mask": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        "text in the header": struct.pack("<Q", 4) + b"what" + data[8:], "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    }[kind])


@pytest.mark.parametrize("kind", ["pickle", "torch zip", "truncated", "half", "empty", "header only", "huge header", "longer", "overlapping", "outside",
                                  "text in the header", "nested"])
def test_unsafe_weights_are_one_sentence_and_run_no_code(checkpoint, tmp_path, capsys, kind):
    evidence = tmp_path / "evidence"
    unsafe_weights(checkpoint / "model.safetensors", kind, evidence)
    for refused in (Predictor, export_onnx, model_card, lambda folder: pack(folder, tmp_path / "packed")):
        with pytest.raises(ValueError) as caught:
            refused(checkpoint)
        one_sentence(caught, "model.safetensors")
    assert main(["export", str(checkpoint)]) == 1 and capsys.readouterr().err.count("\n") == 1
    assert not evidence.exists() and not (tmp_path / "packed").exists()


def test_the_bomb_is_a_real_one(tmp_path):
    """Unpickled, it does run: the tests above would see it."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "evidence")))
    assert (tmp_path / "evidence").read_text() == "code ran"


@pytest.mark.parametrize("file", ["config.json", PREPROCESSING_FILE])
@pytest.mark.parametrize("text", ["", "[]", "null", '"qtseg"', "{", "\udcff", "[" * 200_000, '{"a":' * 200_000, '{"model_type": "qtseg", "classes": {}}',
                                  '{"model_type": "qtseg", "width": -1}', '{"model_type": "qtseg", "depths": "many"}', '{"size": 1e400}', "1" * 5000])
def test_settings_that_are_none_are_one_sentence(checkpoint, file, text):
    (checkpoint / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        Predictor(checkpoint)
    one_sentence(caught, file)


GIGANTIC = [{"width": 10**6}, {"width": 1000}, {"mlp_width": 10**7}, {"classes": 10**5}, {"depths": [10**5, 1, 1]}, {"depths": [1, 1, 10**9]},
            {"in_channels": 10**8}, {"heads": 10**30}]


def test_a_gigantic_network_is_refused_before_it_takes_memory(checkpoint):
    """In a process of its own: one sentence each, within seconds, and in less memory than a common laptop has."""
    pytest.importorskip("resource", reason="memory is read through POSIX's resource module")
    config = json.loads((checkpoint / "config.json").read_text())
    code = ("import json, pathlib, resource, sys\nfrom qtseg.network.model import QTSeg\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"  # the peak never falls, so every network is held to what all took
            "for config in json.loads(sys.argv[2]):\n"
            "    pathlib.Path(sys.argv[1], 'config.json').write_text(json.dumps(config))\n"
            "    try:\n        QTSeg.from_pretrained(sys.argv[1])\n        print('accepted')\n"
            "    except ValueError as error:\n        print(str(error)[:300])\n"
            "    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint), json.dumps([config | change for change in GIGANTIC])], capture_output=True,
                          text=True, cwd=ROOT, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-300:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(GIGANTIC), "one sentence each"
    for change, sentence, megabytes in zip(GIGANTIC, lines[::2], lines[1::2]):
        assert str(checkpoint) in sentence and int(megabytes) < 300, change


def test_more_tensors_than_the_network_has_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    save_file({**load_file(path), "another": torch.zeros(3)}, path)
    with pytest.raises(ValueError) as caught:
        Predictor(checkpoint)
    one_sentence(caught, "unexpected", "another")


# --- the command ----------------------------------------------------------------------------------------------------


def test_without_options_it_exports_and_describes(checkpoint, translation, capsys):
    (checkpoint / "model.onnx").unlink()
    assert main(["export", str(checkpoint)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith(f"{checkpoint / 'model.onnx'}: ") and "logits within" in said[1] and said[2] == str(checkpoint / "README.md")
    assert (checkpoint / "model.onnx").is_file() and (checkpoint / "README.md").is_file()


def test_an_option_asks_for_that_alone(checkpoint, tmp_path, capsys):
    (checkpoint / "model.onnx").unlink()
    assert main(["export", str(checkpoint), "--pack", str(tmp_path / "packed")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'packed'}\n"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors", PREPROCESSING_FILE]


@pytest.mark.parametrize("prepare, word", [(lambda folder: shutil.rmtree(folder), "is no folder"), (lambda folder: (folder / "config.json").unlink(), "config.json"),
                                           (lambda folder: (folder / PREPROCESSING_FILE).unlink(), PREPROCESSING_FILE)])
def test_what_is_no_checkpoint_is_one_sentence(checkpoint, capsys, prepare, word):
    prepare(checkpoint)
    assert main(["export", str(checkpoint), "--onnx"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qtseg export: ") and said.count("\n") == 1 and word in said


@pytest.mark.parametrize("opset", ["-5", "17", "999"])
def test_an_opset_that_is_none_is_one_sentence(tmp_path, capsys, opset):
    """Refused before the minute that recording takes: nothing was said on the screen."""
    assert main(["export", str(save_checkpoint(tmp_path / "ck", small_network())), "--onnx", "--opset", opset]) == 1
    printed = capsys.readouterr()
    said = printed.err
    assert not printed.out
    assert said.startswith("qtseg export: opset is a version of ONNX's operations from 18 to ") and said.count("\n") == 1


def test_wrong_usage_exits_with_2():
    for arguments in ([], ["x", "--what"], ["x", "--opset", "new"]):
        assert main(["export", *arguments]) == 2


def test_a_readme_that_swells_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(900 * 2**20)  # sparse: it takes no room on the disk
    with pytest.raises(ValueError, match="README.md"):
        prediction_cards.keeps_own_card(tmp_path)
