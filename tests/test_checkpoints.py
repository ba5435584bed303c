"""Saving and loading: every form of checkpoint that is accepted, and one clear sentence for everything that is not."""
from __future__ import annotations

import codecs
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import one_sentence
from PIL import Image
from safetensors.torch import load_file, save_file

import qtseg
from qtseg.cli import main
from qtseg.network import checkpoints as network_checkpoints
from qtseg.network.baselines import Baseline, pretrained
from qtseg.network.checkpoints import init_from
from qtseg.network.model import QTSeg
from qtseg.network.official import load_official, to_official
from qtseg.network.state import SHIPPED, find_checkpoint, shapes_only
from qtseg.evaluation.timing import memory_growth

SMALL = dict(classes=3, in_channels=1, width=8, depths=(1, 1, 2), mlp_width=32)


def small_model(**changes) -> QTSeg:
    """A small network whose every tensor is random, BatchNorm's statistics included, so that none can be mixed up."""
    torch.manual_seed(0)
    model = QTSeg(**{**SMALL, **changes})
    for tensor in model.state_dict().values():
        tensor.copy_(tensor + 0.05 * torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    return model.eval()


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def official(model: QTSeg) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in to_official(model).items()}


@pytest.fixture(scope="module")
def model() -> QTSeg:
    return small_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return model.save_pretrained(tmp_path / "checkpoint")


# --- our own format -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"classes": 1, "in_channels": 4}, {"bridge": "identity", "heads": 4}, {"depths": (2, 1, 1)}])
def test_round_trip(tmp_path, changes):
    """Every tensor, every constructor argument and every logit come back, to the last bit."""
    model = small_model(**changes)
    returned = model.save_pretrained(tmp_path / "a" / "b")  # folders are made
    again = QTSeg.from_pretrained(returned)
    assert same_weights(model, again)
    assert again.config == model.config and not again.training
    images = torch.rand(1, model.config["in_channels"], 40, 33)
    with torch.no_grad():
        logits = model(images)
        assert logits.isfinite().all() and torch.equal(logits, again(images))


def test_default_model_round_trip(tmp_path):
    model = QTSeg()
    assert same_weights(model, QTSeg.from_pretrained(str(model.save_pretrained(str(tmp_path)))))  # strings for paths


def test_the_folder_holds_two_plain_files(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config.pop("model_type") == "qtseg" and config == model.config
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_saving_does_not_change_the_model(tmp_path):
    model = small_model().train()
    model.to(memory_format=torch.channels_last)  # any memory layout can be saved
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert same_weights(model, QTSeg.from_pretrained(tmp_path))


def test_saving_again_replaces_both_files(folder):
    other = small_model(classes=2)
    other.save_pretrained(folder)
    assert same_weights(other, QTSeg.from_pretrained(folder))


def test_a_naive_copy_can_be_saved(model, tmp_path):
    assert same_weights(model, QTSeg.from_pretrained(model.naive().save_pretrained(tmp_path)))


def test_a_fused_copy_is_refused(model, tmp_path):
    with pytest.raises(ValueError) as caught:
        model.fuse().save_pretrained(tmp_path / "fused")
    one_sentence(caught, "fused copy", "fused from")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("broken", ["save_file", "config"])
def test_an_interrupted_save_leaves_the_old_checkpoint(model, folder, monkeypatch, broken):
    """Killed while it writes either file: the old checkpoint still loads, and no temporary file is left behind."""
    def half_a_file(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    def half_a_text(self, text, encoding=None):
        self.write_bytes(b"{")
        raise OSError("No space left on device")

    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        if broken == "save_file":
            patch.setattr(network_checkpoints, "save_file", half_a_file)
        else:
            patch.setattr(Path, "write_text", half_a_text)
        with pytest.raises((KeyboardInterrupt, OSError)):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert same_weights(model, QTSeg.from_pretrained(folder))


def test_an_interrupted_first_save_leaves_nothing(model, tmp_path, monkeypatch):
    def half_a_file(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(network_checkpoints, "save_file", half_a_file)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, name, "is missing")


def test_the_folder_of_a_run_gives_the_checkpoint_it_selected(model, tmp_path):
    """best_<select>, else best_dice, else last; every reader of a checkpoint takes the run itself."""
    run = tmp_path / "run"
    other = small_model(width=16)
    other.save_pretrained(run / "last")
    assert find_checkpoint(run) == run / "last", "no config.json yet"
    other.save_pretrained(run / "best_dice")
    (run / "config.json").write_text('{"select": "iou"}')
    assert find_checkpoint(run) == run / "best_dice", "no best_iou"
    model.save_pretrained(run / "best_iou")
    assert find_checkpoint(str(run)) == run / "best_iou" and find_checkpoint(run / "last") == run / "last"
    for load in (QTSeg.from_pretrained, pretrained):
        assert same_weights(load(run), model) and same_weights(load(run / "last"), other)
    assert same_weights(QTSeg(**SMALL).load_encoder(run).encoder, model.encoder)
    for select in ("../../elsewhere", 5, None, ["iou"]):
        (run / "config.json").write_text(json.dumps({"select": select}))
        assert find_checkpoint(run) == run / "best_dice"


def test_folders_without_a_checkpoint(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"select": "loss"}')
    cases = {"nowhere": "RUN/best_dice", "empty": "neither config.json", "run": "best_loss", "checkpoint/config.json": "no folder"}
    for name, words in cases.items():
        for load in (find_checkpoint, pretrained):
            with pytest.raises(FileNotFoundError) as caught:
                load(tmp_path / name)
            one_sentence(caught, name, words)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError) as caught:
        find_checkpoint(tmp_path / "run")
    one_sentence(caught, "run/config.json")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, "model.safetensors", "truncated or not a safetensors file")


@pytest.mark.parametrize("text", ["", "{", "not json", b"\xff\xfe\x00", "[]", "null", '"qtseg"', "{}", '{"model_type": "bert"}'])
def test_foreign_or_broken_config(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, "config.json")


@pytest.mark.parametrize("entry", ["color", "self", "__class__", "9" * 5000])
def test_unknown_config_entries(folder, entry):
    change_config(folder, **{entry: 1})
    with pytest.raises(ValueError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, "config.json", entry[:90])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("changes", [
    {"classes": "two"}, {"classes": 0}, {"classes": None}, {"in_channels": -1}, {"width": 1.5}, {"width": []}, {"heads": 0}, {"heads": 7},
    {"heads": -1}, {"heads": True}, {"heads": 8.0}, {"classes": True}, {"in_channels": False}, {"width": True}, {"classes": 257}, {"mlp_width": 10**30},
    {"depths": [-1, 1, 1]}, {"depths": [True, 1, 1]}, {"depths": [1, 1, 1, 1]}, {"depths": [50, 50, 50]}, {"depths": 3}, {"depths": [1]}, {"depths": ["a", "b", "c"]}, {"mlp_width": -5}, {"bridge": "rope"}, {"bridge": 3}, {"bridge": []},
    {"decoder": "dma2"}, {"position": "rope"}, {"position": []}, {"encoder": "resnet34x"}, {"encoder": ["fpn"]}, {"encoder": 5},
    {"encoder": "hf-hub:somebody/something"}, {"encoder": "tu-hf-hub:somebody/something"}, {"encoder": "tu-vit_tiny_patch16_224"},
    {"encoder": "resnet18", "in_channels": 10**9}, {"encoder": "tu-resnet18.nobody"},
], ids=str)
def test_impossible_config(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(ValueError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, "config.json")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"width": 10**6}, {"mlp_width": 10**9}, {"encoder": "resnext101_32x48d"}, {"encoder": "mit_b5", "width": 10**5}], ids=str)
def test_a_gigantic_config_gets_no_memory(folder, changes):
    """Refused by its shapes: the networks are built on the meta device first, encoders of other packages as well."""
    change_config(folder, **changes)
    with pytest.raises(ValueError, match="does not fit this network"):
        pretrained(folder)


def test_a_config_older_than_the_choice_of_encoder(model, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in ("position", "encoder")}))
    assert same_weights(model, QTSeg.from_pretrained(folder)) and QTSeg.from_pretrained(folder).config == model.config


# --- the Hub --------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for huggingface_hub: notes what is asked of it, and answers a download with a folder."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.asked = folder, []

    def snapshot_download(self, name, *, revision, cache_dir, allow_patterns):
        self.asked.append((name, revision, cache_dir, sorted(allow_patterns)))
        return str(self.folder)

    def get_token(self):
        return None

    def HfApi(self, token):
        self.asked.append(token)
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append((repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.asked.append(sorted(path.name for path in Path(folder_path).iterdir()))
        self.uploaded = QTSeg.from_pretrained(folder_path)


def test_a_network_from_the_hub(model, folder, monkeypatch, tmp_path):
    """Only the three files of a checkpoint are asked for, and what comes is checked like any other folder."""
    hub = Hub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for load in (QTSeg.from_pretrained, pretrained):
        assert same_weights(load("someone/skin"), model)
    assert same_weights(QTSeg.from_pretrained("someone/skin", revision="v1", cache=tmp_path), model)
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert hub.asked == [("someone/skin", None, None, files)] * 2 + [("someone/skin", "v1", tmp_path, files)]
    change_config(folder, width=10**6)
    with pytest.raises(ValueError, match="does not fit this network"):
        QTSeg.from_pretrained("someone/skin")


def test_a_path_asks_nothing_of_the_hub(model, folder, monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert same_weights(QTSeg.from_pretrained("checkpoint"), model)
    (tmp_path / "runs").mkdir()
    wrong = [Path("someone/skin"), "runs/typo", "skin", "a/b/c", "../up", str(tmp_path / "nowhere"), "checkpoint/config.json"]
    for name in wrong:
        for load in (QTSeg.from_pretrained, pretrained):
            with pytest.raises(FileNotFoundError) as caught:
                load(name)
            one_sentence(caught, str(name), "no folder")
    assert hub.asked == []


def test_a_network_goes_to_the_hub(model, monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(PermissionError, match="hf auth login"):
        model.push_to_hub("me/skin")
    with pytest.raises(ValueError, match="USER/NAME"):
        model.push_to_hub("skin", token="t")
    with pytest.raises(ValueError, match="fused copy"):
        model.fuse().push_to_hub("me/skin", token="t")
    assert hub.asked == []
    assert model.push_to_hub("me/skin", token="t") == "https://huggingface.co/me/skin"
    assert hub.asked == ["t", ("me/skin", True, True), ["config.json", "model.safetensors"]]
    assert same_weights(hub.uploaded, model)


# --- the checkpoint in this package -----------------------------------------------------------------------------------


def test_a_name_in_this_package(model, folder, monkeypatch, tmp_path):
    """From anywhere, without a request; a folder of the same name is meant by a path."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(SHIPPED, "phantoms", folder)
    monkeypatch.chdir(tmp_path)
    other = small_model(classes=2)
    other.save_pretrained("phantoms")
    for load in (QTSeg.from_pretrained, pretrained, qtseg.pretrained):
        assert same_weights(load("phantoms"), model) and same_weights(load("./phantoms"), other)
    assert same_weights(pretrained(Path("phantoms")), other)
    monkeypatch.setitem(SHIPPED, "phantoms", tmp_path / "lost")
    with pytest.raises(FileNotFoundError) as caught:
        pretrained("phantoms")
    one_sentence(caught, "phantoms is no folder")


def test_the_shipped_checkpoint():
    folder = SHIPPED["phantoms"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    halves = load_file(folder / "model.safetensors").values()
    assert {tensor.dtype for tensor in halves if tensor.is_floating_point()} == {torch.float16}
    network = qtseg.pretrained("phantoms")
    assert {p.dtype for p in network.parameters()} == {torch.float32} and not network.training
    mask = qtseg.Predictor("phantoms", device="cpu")(qtseg.phantom("dermoscopy", 1, 128)[0])
    truth = qtseg.phantom("dermoscopy", 1, 128)[1]
    assert (mask == (truth > 0)).mean() > 0.9


def test_the_command_predicts_with_it(tmp_path, capsys):
    Image.fromarray(qtseg.phantom("dermoscopy", 1, 96)[0]).save(tmp_path / "image.png")
    assert main(["predict", "phantoms", str(tmp_path / "image.png"), "--output", str(tmp_path / "masks"), "--device", "cpu", "--no-progress"]) == 0
    assert Image.open(tmp_path / "masks" / "image.png").size == (96, 96) and "weights/phantoms" in capsys.readouterr().out


def test_the_commands_evaluate_and_export_it_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QTSEG_CACHE", str(tmp_path / "cache"))
    quick = ["--data", "phantoms:dermoscopy:4", "--device", "cpu", "--no-surface", "--no-pictures", "--no-progress"]
    assert main(["evaluate", "phantoms", *quick, "--output", str(tmp_path / "results")]) == 0
    assert (tmp_path / "results" / "evaluation.json").is_file()
    assert main(["export", "phantoms", "--card", "--pack", str(tmp_path / "copy")]) == 0
    assert same_weights(pretrained(tmp_path / "copy"), qtseg.pretrained("phantoms"))
    capsys.readouterr()
    for words, said in ((["evaluate", "phantoms", *quick], "name a folder for the results, with --output"), (["export", "phantoms"], "with --pack DIR"),
                        (["evaluate", "phantom"], "phantom is no folder: name a checkpoint"), (["export", "phantom"], "phantom is no folder: name a checkpoint"),
                        (["predict", "phantom", "image.png", "--output", "masks"], "phantom is no folder: name a checkpoint")):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


# --- starting from other weights ---------------------------------------------------------------------------------------


def start(source: Path, **changes) -> tuple[QTSeg, dict, str]:
    """A new network, its drawn weights, and what `init_from` said."""
    torch.manual_seed(5)
    network = QTSeg(**{**SMALL, **changes})
    drawn = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return network, drawn, init_from(network, source)


def test_all_weights_are_kept(model, folder):
    for source in (folder, str(folder)):
        network, _, said = start(source)
        assert same_weights(network, model) and network.training and said == f"started from {folder}: all kept"


@pytest.mark.parametrize("decoder, classes, theirs, words", [
    ("mqm", 5, slice(0, 3), "classes 0, 1, 2 kept, 3, 4 drawn"), ("mqm", 2, slice(0, 2), "classes 0, 1 kept"), ("mqm", 1, slice(1, 2), "classes 1 kept"),
    ("conv", 5, slice(0, 3), "classes 0, 1, 2 kept, 3, 4 drawn"), ("mqm_single", 5, slice(0, 3), "classes 0, 1, 2 kept, 3, 4 drawn"),
    ("dma", 5, slice(0, 3), "classes 0, 1, 2 kept, 3, 4 drawn")])
def test_tokens_of_common_classes_are_kept(tmp_path, decoder, classes, theirs, words):
    """A single class is the foreground. What holds a row per class is the tokens, their MLPs and a fixed readout."""
    model = small_model(decoder=decoder)
    network, drawn, said = start(model.save_pretrained(tmp_path), decoder=decoder, classes=classes)
    assert said == f"started from {tmp_path}: {words}"
    rows, mine = 0, slice(0, min(classes, 3))
    for name, tensor in network.state_dict().items():
        given = model.state_dict()[name]
        if tensor.shape == given.shape:
            assert torch.equal(tensor, given)
        else:
            rows += 1
            assert tensor.shape[1:] == given.shape[1:] and torch.equal(tensor[mine], given[theirs])
            assert torch.equal(tensor[mine.stop:], drawn[name][mine.stop:])
    assert rows == {"mqm": 19, "dma": 19, "mqm_single": 7, "conv": 2}[decoder]


def test_one_class_becomes_the_foreground_of_two(tmp_path):
    model = small_model(classes=1)
    network, drawn, said = start(model.save_pretrained(tmp_path), classes=2)
    assert said == f"started from {tmp_path}: classes 1 kept, 0 drawn"
    tokens = network.decoder.mask_tokens.weight
    assert torch.equal(tokens[1], model.decoder.mask_tokens.weight[0]) and torch.equal(tokens[0], drawn["decoder.mask_tokens.weight"][0])


@pytest.mark.parametrize("given, wanted", [(3, 1), (1, 3), (3, 4), (4, 3), (2, 5)])
@pytest.mark.parametrize("build", [lambda channels: small_model(in_channels=channels), lambda channels: Baseline("unet", "resnet18", in_channels=channels).eval()],
                         ids=["qtseg", "unet"])
def test_input_channels_that_are_all_equal_give_the_same(tmp_path, build, given, wanted):
    model, network = build(given), build(wanted)
    said = init_from(network, model.save_pretrained(tmp_path))
    assert said == f"started from {tmp_path}: all kept, {given} input channels brought to {wanted}"
    gray = torch.rand(1, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        before, after = (one(gray.expand(-1, channels, -1, -1)) for one, channels in ((model, given), (network, wanted)))
    assert torch.allclose(before, after, atol=1e-3 * before.abs().max())


def test_standardized_input_may_differ_and_is_said(folder, tmp_path):
    """Each data set has statistics of its own, which stay."""
    statistics = [[0.5], [0.2]]
    network, _, said = start(folder, statistics=statistics)
    assert network.config["statistics"] == statistics and said.endswith("it was trained without normalize: statistics")
    network.save_pretrained(tmp_path / "standardized")
    assert start(tmp_path / "standardized")[2].endswith("it was trained with normalize: statistics")
    assert start(tmp_path / "standardized", statistics=[[0.4], [0.1]])[2].endswith("all kept")


@pytest.mark.parametrize("changes, words", [({"width": 16}, "width 8 instead of 16"), ({"encoder": "resnet18"}, "encoder fpn instead of resnet18"),
                                            ({"heads": 4, "bridge": "identity"}, "bridge mlff instead of identity"), ({"depths": (1, 1, 1)}, "depths")])
def test_another_network_gives_no_weights(folder, changes, words):
    network = QTSeg(**{**SMALL, **changes})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        init_from(network, folder)
    one_sentence(caught, str(folder), words)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_damaged_weights_start_nothing(model, folder, baseline_folder):
    for source, words in ((baseline_folder, "a baseline, not a qtseg"), (folder.parent / "nowhere", "no folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            init_from(small_model(), source)
    with pytest.raises(ValueError, match="fused copy"):
        init_from(model.fuse(), folder)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "encoder.down2.conv.weight": state["encoder.down2.conv.weight"] * torch.nan}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="a Linear starts from no checkpoint"):
        init_from(torch.nn.Linear(1, 1), folder)
    network = QTSeg(**{**SMALL, "classes": 2})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        init_from(network, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# --- other networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline_folder(tmp_path_factory) -> Path:
    return Baseline("unet", "resnet18").save_pretrained(tmp_path_factory.mktemp("baseline"))


def test_each_class_refuses_the_other_ones_folder(folder, baseline_folder):
    for network, wrong, words in ((QTSeg, baseline_folder, "a baseline, not a qtseg"), (Baseline, folder, "a qtseg, not a baseline")):
        with pytest.raises(ValueError) as caught:
            network.from_pretrained(wrong)
        one_sentence(caught, "config.json", words, "pretrained reads both")
    assert json.loads((baseline_folder / "config.json").read_text()) == {
        "model_type": "baseline", "model": "unet", "encoder": "resnet18", "classes": 2, "in_channels": 3}


@pytest.mark.parametrize("changes", [
    {"model": "transunet"}, {"model": []}, {"encoder": "fpn"}, {"encoder": "hf-hub:somebody/something"}, {"encoder": None}, {"classes": 0},
    {"classes": "two"}, {"classes": True}, {"in_channels": 10**9}, {"in_channels": 1.5}, {"model": "unetplusplus", "encoder": "mit_b0"}, {"width": 8},
], ids=str)
def test_impossible_baseline(baseline_folder, tmp_path, changes):
    config = json.loads((baseline_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError) as caught:
        pretrained(tmp_path)
    one_sentence(caught, "config.json")


def test_without_the_package(monkeypatch):
    """One sentence with the command, for encoders and for baselines; QTSeg itself does without."""
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    for build in (Baseline, lambda: QTSeg(**{**SMALL, "encoder": "resnet18"})):
        with pytest.raises(ModuleNotFoundError) as caught:
            build()
        one_sentence(caught, "pip install segmentation-models-pytorch")
    assert QTSeg(**SMALL)


# --- weights that do not fit -----------------------------------------------------------------------------------------


def test_weights_of_another_shape(folder):
    change_config(folder, classes=4)
    with pytest.raises(ValueError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, "mis-shaped", "decoder.mask_tokens.weight [3, 128] instead of [4, 128]")


def test_missing_and_unexpected_weights(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["extra.weight"] = state.pop("encoder.down2.conv.weight")
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        QTSeg.from_pretrained(folder)
    one_sentence(caught, "1 missing (encoder.down2.conv.weight)", "1 unexpected (extra.weight)")


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_weights(model, folder, tmp_path, prefix):
    """Weights saved from inside DataParallel or torch.compile load everywhere; half of them wrapped is refused by prefix."""
    path = folder / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    torch.save({prefix + name: tensor for name, tensor in official(model).items()}, tmp_path / "model.pt")
    encoder = {name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    torch.save({prefix + name: tensor for name, tensor in encoder.items()}, tmp_path / "fpn-nano.pth")
    for loaded in (QTSeg.from_pretrained(folder), pretrained(folder), load_official(tmp_path / "model.pt")):
        assert same_weights(model, loaded)
    for source in (folder, tmp_path / "fpn-nano.pth"):
        assert same_weights(model.encoder, QTSeg(**SMALL).load_encoder(source).encoder)
    some = sorted(encoder)[:3]
    torch.save({prefix + name if name in some else name: tensor for name, tensor in encoder.items()}, tmp_path / "half.pth")
    for load in (QTSeg(**SMALL).load_encoder, load_official):
        with pytest.raises(ValueError) as caught:
            load(tmp_path / "half.pth")
        one_sentence(caught, "half.pth", f"3 of {len(encoder)} names begin with {prefix.split('.')[0]}.")


def test_a_prefix_without_end_takes_no_time(tmp_path):
    torch.save({"module." * 100_000 + "a": torch.zeros(1)}, tmp_path / "long.pt")
    with pytest.raises(ValueError):
        load_official(tmp_path / "long.pt")


WRONG_NUMBERS = {  # what becomes of a weight -> what the refusal says
    "nan": (lambda t: t.fill_(float("nan")), "not finite"), "infinite": (lambda t: t.flatten()[-1:].fill_(-float("inf")), "not finite"),
    "bool": (lambda t: t.bool(), "torch.bool instead of torch.float32"), "int": (lambda t: t.int(), "torch.int32 instead of torch.float32"),
    "complex": (lambda t: t.to(torch.complex64), "torch.complex64 instead of torch.float32"),
    "too large": (lambda t: t.double() * 1e300, "not finite"),
}


@pytest.mark.parametrize("change, words", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_numbers_that_are_no_weights(model, folder, tmp_path, change, words):
    """NaN weights give empty masks and exit status 0: refused, by tensor and file, in every loader, and nothing is changed."""
    def changed(state, name):
        new = change(state[name])
        return {**state, name: state[name] if words == "not finite" and new.dtype == torch.float32 else new}

    path = folder / "model.safetensors"
    save_file(changed(load_file(path), "encoder.down2.conv.weight"), path)
    torch.save(changed(official(model), "image_encoder.conv_0.conv.weight"), tmp_path / "state.pt")
    encoder = {name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    torch.save(changed(encoder, "image_encoder.conv_0.conv.weight"), tmp_path / "encoder.pth")
    other = small_model()
    loads = {"model.safetensors": lambda: pretrained(folder), "state.pt": lambda: load_official(tmp_path / "state.pt"),
             "checkpoint": lambda: other.load_encoder(folder), "encoder.pth": lambda: other.load_encoder(tmp_path / "encoder.pth")}
    for name, load in loads.items():
        with pytest.raises(ValueError) as caught:
            load()
        one_sentence(caught, name, words, "conv.weight")
    assert same_weights(other, model)


def test_halves_are_weights_and_variances_are_not_below_zero(model, folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    assert pretrained(folder).encoder.down2.conv.weight.dtype == torch.float32
    state["encoder.down4.norm.running_var"][3] = -1e-3
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        pretrained(folder)
    one_sentence(caught, "encoder.down4.norm.running_var", "below zero")


# --- official files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict_model": state}, lambda state: {"epoch": 3, "state_dict_model": state, "optimizer": {"lr": 1.0}},
], ids=["bare", "wrapped", "wrapped with more"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_load_official(model, tmp_path, wrap, zipped):
    path = tmp_path / "weight_best_iou.pt"
    torch.save(wrap(official(model)), path, _use_new_zipfile_serialization=zipped)
    loaded = load_official(path)
    assert same_weights(model, loaded) and not loaded.training
    assert loaded.config == {**model.config, "heads": 8}
    assert same_weights(model, load_official(str(path)))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict_model": state, "epoch": 3},
                                  lambda state: {f"module.{name}": tensor for name, tensor in state.items()}],
                         ids=["bare", "wrapped", "from DataParallel"])
def test_load_official_takes_a_state_dict(model, wrap):
    """Views of a model's own memory, too: the network gets a copy."""
    loaded = load_official(wrap(to_official(model)))
    assert same_weights(model, loaded) and not loaded.training and loaded.config == {**model.config, "heads": 8}
    loaded.decoder.mask_tokens.weight.data.add_(1)
    assert not torch.equal(loaded.decoder.mask_tokens.weight, model.decoder.mask_tokens.weight)


@pytest.mark.parametrize("change, words", [
    (lambda state: {name: tensor for name, tensor in state.items() if "pe_layer" not in name}, "3 missing"),
    (lambda state: {name: torch.full_like(tensor, torch.nan) if "cv1.conv" in name else tensor for name, tensor in state.items()}, "NaN"),
    (lambda state: {name: torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}, "stored once"),
    (lambda state: {**state, "epoch": 3}, "no state dict"), (lambda state: {}, "no state dict"),
    (lambda state: {"state_dict_model": [1, 2]}, "no state dict")])
def test_a_state_dict_is_checked_like_a_file(model, change, words):
    with pytest.raises(ValueError) as caught:
        load_official(change(official(model)))
    one_sentence(caught, "the state dict", words)


def test_load_official_default_size(tmp_path):
    torch.manual_seed(0)
    model = QTSeg()
    torch.save(official(model), tmp_path / "model.pt")
    loaded = load_official(tmp_path / "model.pt")
    assert same_weights(model, loaded) and loaded.config == model.config


def test_the_position_cache_follows_loaded_weights(model, tmp_path):
    """The fast form remembers the positional encoding; weights loaded afterwards must not meet the old one."""
    torch.save(official(model), tmp_path / "model.pt")
    other = QTSeg(**SMALL).eval()
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        other(images)  # fills the cache
        for name, tensor in to_official(other).items():
            tensor.copy_(to_official(model)[name])
        assert torch.equal(other(images), load_official(tmp_path / "model.pt")(images))


def test_official_file_missing(model, tmp_path):
    for load, words in ((load_official, "is no file: name a file from the official"), (model.load_encoder, "is missing: name a checkpoint folder, a run")):
        with pytest.raises(FileNotFoundError) as caught:
            load(tmp_path / "nowhere.pt")
        one_sentence(caught, "nowhere.pt", words)
    with pytest.raises(FileNotFoundError, match="is no file.*qtseg.pretrained opens"):
        load_official(model.save_pretrained(tmp_path / "own"))


class Stowaway:
    """Asks, when it is unpickled, for a file to be written."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return _leave_a_trace, (str(self.path),)


def _leave_a_trace(path: str) -> None:
    Path(path).write_text("this code must not run")


@pytest.mark.parametrize("where", ["alone", "beside the weights"])
def test_code_in_a_pickle_does_not_run(model, tmp_path, where):
    trace, path = tmp_path / "trace", tmp_path / "stowaway.pt"
    content = Stowaway(trace) if where == "alone" else {"state_dict_model": official(model), "note": Stowaway(trace)}
    torch.save(content, path)
    for load in (load_official, small_model().load_encoder):
        with pytest.raises(ValueError) as caught:
            load(path)
        one_sentence(caught, "stowaway.pt", "could run code")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Stowaway(trace)))  # the test would notice: this does run it
    assert trace.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_official_file(model, tmp_path, zipped, share):
    path = tmp_path / "half.pt"
    torch.save(official(model), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError) as caught:
        load_official(path)
    one_sentence(caught, "half.pt", "download it again")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_official_file_never_ends_in_another_exception(tmp_path, zipped):
    """Bytes changed at random: struct.error, AssertionError and their like must not reach the reader."""
    torch.manual_seed(0)
    path = tmp_path / "damaged.pt"
    torch.save({"a": torch.randn(3, 4), "b.c": torch.zeros(5)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        content[int(torch.randint(min(len(content), 700), ()))] = int(torch.randint(256, ()))
        path.write_bytes(content)
        with pytest.raises(ValueError):  # at best it is a state dict, though not of a QTSeg
            load_official(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"state_dict_model": {"a": "text"}}, {"state_dict_model": None}, torch.zeros(2),
                                     {0: torch.zeros(2)}], ids=["list", "empty", "number", "text", "none", "tensor", "number for a name"])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError) as caught:
        load_official(tmp_path / "other.pt")
    one_sentence(caught, "other.pt", "holds no state dict")


def refused_state(tmp_path: Path, state: dict, *words: str) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError) as caught:
        load_official(tmp_path / "state.pt")
    one_sentence(caught, "state.pt", *words)


def test_official_state_that_does_not_fit(model, tmp_path):
    state = official(model)
    state["head.weight"] = state.pop("bridge.neck_0_0.conv.weight")
    state["image_encoder.conv_1.conv.weight"] = torch.zeros(2, 2)
    refused_state(tmp_path, state, "1 missing (bridge.neck_0_0.conv.weight)", "1 unexpected (head.weight)",
                  "1 mis-shaped (image_encoder.conv_1.conv.weight [2, 2] instead of [16, 8, 3, 3])")


@pytest.mark.parametrize("name", ["mask_decoder.mask_tokens.weight", "image_encoder.conv_0.conv.weight",
                                  "mask_decoder.transformer_s0.layers.0.mlp.lin1.weight"])
def test_the_weights_that_tell_the_size(model, tmp_path, name):
    """Absent, without axes, or empty: refused in a sentence, not with an IndexError."""
    state = official(model)
    refused_state(tmp_path, {**state, name: torch.tensor(1.0)}, "state.pt")
    del state[name]
    refused_state(tmp_path, state, name)


def test_encoder_only_is_not_a_model(model, tmp_path):
    state = {name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    refused_state(tmp_path, state, "not a whole QTSeg", "load_encoder")
    refused_state(tmp_path, {name.removeprefix("image_encoder."): tensor for name, tensor in state.items()}, "load_encoder")


@pytest.mark.parametrize("decoder, release", [("mqm", "v0.1.0"), ("dma", "v0.3.1")])
def test_both_releases_are_told_apart_by_their_names(tmp_path, decoder, release):
    """Bare and as a training checkpoint; a part of one is refused with its release, a mixture with an example of each."""
    model = small_model(decoder=decoder)
    state, other = official(model), official(small_model(decoder={"mqm": "dma", "dma": "mqm"}[decoder]))
    for place, content in {"bare": state, "training": {"state_dict_model": state, "epoch": 3}}.items():
        torch.save(content, tmp_path / f"{place}.pt")
        loaded = load_official(tmp_path / f"{place}.pt")
        assert loaded.config["decoder"] == decoder and same_weights(loaded, model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in to_official(loaded).items())
    refused_state(tmp_path, {name: state[name] for name in list(state) if "s0.layers" not in name}, f"not a whole QTSeg {release}")
    foreign = next(name for name in other if name not in state)
    for mixture in ({**other, **state}, {**state, foreign: other[foreign]}):
        refused_state(tmp_path, mixture, "mixes two releases", "of v0.1.0 (mask_decoder.", "of v0.3.1 (mask_decoder.")


@pytest.mark.parametrize("build", [lambda: QTSeg(**SMALL), lambda: QTSeg(**SMALL, position="learned"), lambda: QTSeg(**SMALL, decoder="conv"), Baseline])
def test_a_network_without_memory_has_the_same_names_shapes_and_types(build):
    with shapes_only():
        empty = build().state_dict()
    real = build().state_dict()
    assert {tensor.device.type for tensor in empty.values()} == {"meta"}
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in empty.items()] == [(name, tensor.shape, tensor.dtype) for name, tensor in real.items()]


def test_loading_a_checkpoint_imports_no_compiler(model, tmp_path):
    """It would double the time that qtseg predict takes to start."""
    model.save_pretrained(tmp_path)
    code = "import sys; from qtseg.network.baselines import pretrained; pretrained(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert not {"torch._dynamo", "sympy"} & set(done.stdout.split())


def stride_zero(state: dict) -> dict:
    """The weights of a network of more than a gigabyte, each of them one number that is repeated."""
    with shapes_only():
        wide = to_official(QTSeg(**{**SMALL, "width": 128, "mlp_width": 8192}))
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in wide.items()}


def one_storage(state: dict) -> dict:
    numbers = torch.zeros(2048 * 9 * 64)
    return {name: numbers[:tensor.numel()].view(tensor.shape) for name, tensor in state.items()}


class Calls:
    """Asks, when it is unpickled, for a harmless function with arguments that are not."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def doubled(times: int):
    content = b"0" * 100_000
    for _ in range(times):
        content = Calls(codecs.encode, content, "hex_codec")
    return content


HOSTILE = {
    "stride 0": (stride_zero, "stored once"), "one storage": (one_storage, "stored once"),
    "sparse": (lambda state: {"a": torch.sparse_coo_tensor(size=(10**5, 10**5), check_invariants=True)}, "other than tensors"),
    "bytes": (lambda state: {"note": Calls(bytearray, 3 * 10**9)}, "other than tensors"),
    "codec": (lambda state: {"note": doubled(16)}, "other than tensors"),
    "meta": (lambda state: {name: tensor.to("meta") for name, tensor in state.items()}, "other than tensors"),
    "steps": (lambda state: {"note": list(range(250_000))}, "download it again"),
}


@pytest.mark.parametrize("change, words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_official_files_take_no_memory(model, tmp_path, change, words):
    torch.save(change(official(model)), tmp_path / "hostile.pt")
    assert (tmp_path / "hostile.pt").stat().st_size < 5e6

    def refused():
        for load in (load_official, small_model().load_encoder):
            with pytest.raises(ValueError) as caught:
                load(tmp_path / "hostile.pt")
            one_sentence(caught, "hostile.pt", words)

    if sys.platform == "linux":
        assert memory_growth(refused) < 300
    else:
        refused()


@pytest.mark.parametrize("damage", ["compressed", "twice", "listed twice"])
def test_archives_that_pytorch_did_not_write(model, tmp_path, damage):
    """A compressed zero is small in the file and large in memory; of two records of one name two readers take different ones."""
    torch.save({**official(model), "zeros": torch.zeros(10**7)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for record in good.infolist():
            bad.writestr(record.filename, good.read(record), zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED)
        if damage == "twice":
            bad.writestr("other/data.pkl", b".")
        if damage == "listed twice":
            bad.filelist += [record for record in bad.filelist if record.file_size > 10**6]
    with pytest.raises(ValueError) as caught:
        load_official(tmp_path / "bad.pt")
    one_sentence(caught, "bad.pt", "not a PyTorch file")


def test_weights_larger_than_the_limit(model, folder, tmp_path, monkeypatch):
    torch.save(official(model), tmp_path / "model.pt")
    monkeypatch.setenv("QTSEG_MAX_FILE_BYTES", "1000")
    for load, name in ((lambda: pretrained(folder), "model.safetensors"), (lambda: load_official(tmp_path / "model.pt"), "model.pt")):
        with pytest.raises(ValueError) as caught:
            load()
        one_sentence(caught, name, "QTSEG_MAX_FILE_BYTES=")
    monkeypatch.setenv("QTSEG_MAX_FILE_BYTES", str(10**9))
    assert same_weights(pretrained(folder), load_official(tmp_path / "model.pt"))


# --- the encoder alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["image_encoder.", ""], ids=["prefixed", "bare"])
@pytest.mark.parametrize("strict", [True, False])
def test_load_encoder(model, tmp_path, prefix, strict):
    state = {prefix + name.removeprefix("image_encoder."): tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    torch.save(state, tmp_path / "fpn-nano.pth")
    torch.manual_seed(1)
    other = QTSeg(**{**SMALL, "classes": 5})
    decoder = {name: tensor.clone() for name, tensor in other.decoder.state_dict().items()}
    assert other.load_encoder(tmp_path / "fpn-nano.pth", strict=strict) is other
    assert same_weights(model.encoder, other.encoder)
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in other.decoder.state_dict().items())


@pytest.mark.parametrize("extra", ["detect_22.weight", "image_encoder.detect_22.weight", "mask_decoder.mask_tokens.weight"])
def test_load_encoder_passes_over_the_rest_only_when_told(model, tmp_path, extra):
    state = {name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    torch.save({**state, extra: torch.zeros(3)}, tmp_path / "more.pth")
    other = QTSeg(**SMALL)
    with pytest.raises(ValueError) as caught:
        other.load_encoder(tmp_path / "more.pth")
    one_sentence(caught, "more.pth", "1 unexpected", extra)
    other.load_encoder(tmp_path / "more.pth", strict=False)
    assert same_weights(model.encoder, other.encoder)


@pytest.mark.parametrize("strict", [True, False])
def test_load_encoder_refuses_a_torn_file_and_changes_nothing(model, tmp_path, strict):
    state = {name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    del state["image_encoder.c2f_21.cv2.conv.weight"]
    state["image_encoder.conv_1.conv.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "torn.pth")
    torch.manual_seed(1)
    other = QTSeg(**SMALL)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        other.load_encoder(tmp_path / "torn.pth", strict=strict)
    one_sentence(caught, "1 missing (image_encoder.c2f_21.cv2.conv.weight)", "1 mis-shaped", "[2, 2] instead of [16, 8, 3, 3]")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_fused_copy_takes_no_encoder(model, tmp_path):
    state = {name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}
    torch.save(state, tmp_path / "fpn-nano.pth")
    with pytest.raises(ValueError):
        small_model().fuse().load_encoder(tmp_path / "fpn-nano.pth")


def test_a_frozen_encoder_can_be_loaded_and_saved(model, tmp_path):
    torch.save({name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}, tmp_path / "fpn-nano.pth")
    other = QTSeg(**SMALL).freeze_encoder().load_encoder(tmp_path / "fpn-nano.pth")
    assert not any(p.requires_grad for p in other.encoder.parameters())
    assert same_weights(other, QTSeg.from_pretrained(other.save_pretrained(tmp_path / "saved")))


@pytest.mark.parametrize("changes", [{"classes": 2, "decoder": "conv", "bridge": "single"}, {"position": "none", "decoder": "mqm_single"}])
def test_the_encoder_of_a_folder(model, folder, changes):
    other = QTSeg(**{**SMALL, **changes})
    rest = {name: tensor.clone() for name, tensor in other.state_dict().items() if not name.startswith("encoder.")}
    assert other.load_encoder(str(folder)) is other
    assert same_weights(model.encoder, other.encoder)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in rest.items())


def test_the_encoder_of_a_folder_that_does_not_fit(folder, baseline_folder, tmp_path):
    narrow, other = QTSeg(**{**SMALL, "width": 16}), QTSeg(**{**SMALL, "encoder": "resnet18"})
    for network, source, words in ((narrow, folder, "mis-shaped"), (other, folder, "encoder fpn"), (other, baseline_folder, "a baseline"),
                                   (small_model().fuse(), folder, "fused copy")):
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(ValueError) as caught:
            network.load_encoder(source)
        one_sentence(caught, words)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(FileNotFoundError, match="config.json"):
        other.load_encoder(tmp_path)


def test_official_names_are_for_the_official_network(model, tmp_path):
    torch.save({name: tensor for name, tensor in official(model).items() if name.startswith("image_encoder.")}, tmp_path / "fpn-nano.pth")
    for changes in ({"decoder": "conv"}, {"decoder": "mqm_single"}, {"position": "learned"}, {"position": "none"}, {"bridge": "single"}, {"bridge": "projection"}):
        other = QTSeg(**{**SMALL, **changes})
        with pytest.raises(ValueError, match="no names for a network with"):
            to_official(other)
        assert same_weights(other.load_encoder(tmp_path / "fpn-nano.pth").encoder, model.encoder)  # the encoder is the official one
    with pytest.raises(ValueError, match="this network has resnet18"):
        QTSeg(**{**SMALL, "encoder": "resnet18"}).load_encoder(tmp_path / "fpn-nano.pth")


@pytest.mark.parametrize("build, body", [(lambda: QTSeg(**{**SMALL, "encoder": "resnet18"}), lambda network: network.encoder.body),
                                         (lambda: Baseline("deeplabv3plus", "resnet18", in_channels=1), lambda network: network.encoder)],
                         ids=["qtseg", "baseline"])
def test_imagenet_weights(monkeypatch, build, body):
    """What the package would download arrives in the encoder; offline, or for an encoder that has none, one sentence."""
    import segmentation_models_pytorch as smp

    network, get_encoder = build(), smp.encoders.get_encoder

    def fetched(name, in_channels, depth, weights):
        assert (name, in_channels, depth, weights) == ("resnet18", 1, 5, "imagenet")
        encoder = get_encoder(name, in_channels=in_channels, depth=depth, weights=None)
        for tensor in encoder.state_dict().values():
            tensor.fill_(7)
        return encoder

    def offline(*arguments, **options):
        raise OSError("cannot reach the hub\nTraceback, a page of it")

    monkeypatch.setattr(smp.encoders, "get_encoder", fetched)
    learned = {"input_range": [0, 1], "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.15]}
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda name, pretrained: learned)
    assert network.load_encoder("imagenet") is network
    assert torch.tensor(network.config["statistics"]).allclose(torch.tensor([[0.4], [0.2]])), "of one channel"
    assert all((tensor == 7).all() for tensor in body(network).state_dict().values())
    monkeypatch.setattr(smp.encoders, "get_encoder", offline)
    with pytest.raises(ConnectionError) as caught:
        network.load_encoder("imagenet")
    one_sentence(caught, "resnet18", "cannot reach the hub", "internet")
    monkeypatch.undo()
    network.config["encoder"] = "dpn68b"
    with pytest.raises(ValueError, match="has no weights called imagenet"):
        network.load_encoder("imagenet")


def test_own_encoder_has_no_imagenet_weights(model):
    with pytest.raises(ValueError) as caught:
        small_model().load_encoder("imagenet")
    one_sentence(caught, "efficientnet_lite0")
