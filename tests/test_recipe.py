"""Options of the recipe: each does what it says, the defaults change nothing, and a run with all of them resumes to the same result."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from qtseg.data.preprocessing import Preprocessing, read_preprocessing
from qtseg.evaluation.evaluate import evaluate
from qtseg.evaluation.runs import evaluate_checkpoint
from qtseg.evaluation.scores import Protocol
from qtseg.network.model import QTSeg
from qtseg.prediction.predictor import Predictor
from qtseg.training.callbacks import EMA, EarlyStopping
from qtseg.training.config import TrainConfig
from qtseg.training.losses import ce_dice_loss
from qtseg.training.loop import fit, open_data
from qtseg.training.recipe import weight_groups
from qtseg.training.trainer import Trainer
from qtseg.training.validation import Windowed, validate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tiny(tiny):
    """The shared configuration, two epochs long."""
    return lambda **changes: tiny(**{"epochs": 2} | changes)


def plain_network() -> nn.Module:
    """A network without BatchNorm, so that each image counts by itself."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def after_a_step(config: TrainConfig, model: nn.Module | None = None, steps: int = 1) -> dict[str, torch.Tensor]:
    """The weights after so many steps of a fresh run."""
    trainer = Trainer(config, open_data(config), model)
    batches = trainer.begin_epoch()
    for _ in range(steps):
        trainer.step(next(batches))
        trainer.progress.step += 1
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def numbers(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in ("valid", "test", "best")}


# ---- rates and groups of weights


def test_warm_up_scales_each_steps_rate_and_leaves_the_schedule_alone(tiny):
    config = tiny(warmup_epochs=2, epochs=4, scheduler="step", step_epochs=1, min_lr=0.0)
    trainer, rates = Trainer(config, open_data(config)), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    batches = trainer.begin_epoch()
    for _ in range(trainer.steps):
        trainer.step(next(batches))
        trainer.progress.step += 1
    assert rates == pytest.approx([config.lr * (step + 1) / (2 * trainer.steps) for step in range(trainer.steps)])
    assert trainer.optimizer.param_groups[0]["lr"] == config.lr
    history = fit(config).history
    assert [row["lr"] for row in history] == pytest.approx([0.5e-3, 0.5e-3, 0.25e-3, 0.125e-3])


def test_decay_spares_norms_biases_positions_and_tokens(tiny):
    strong = dict(weight_decay=0.5, lr=0.1, position="learned")
    without, all_of_them, spared = (after_a_step(tiny(**strong | changes)) for changes in
                                    ({"weight_decay": 0.0}, {}, {"decay_norms": False}))
    same = {name for name in without if torch.equal(without[name], spared[name])}
    assert {"encoder.down2.norm.weight", "encoder.down2.norm.bias", "decoder.mask_tokens.weight", "decoder.stage32.position.grid",
            "decoder.stage8.token_mlps.biases.0"} <= same
    for name, weight in without.items():
        if weight.ndim > 1 and name not in same:
            assert torch.equal(all_of_them[name], spared[name])  # pulled as before
    attention = {f"decoder.stage32.blocks.0.{part}.query.weight" for part in ("token_to_feature", "feature_to_token")}
    assert (attention | {"encoder.down2.conv.weight", "decoder.stage8.token_mlps.weights.0"}).isdisjoint(same)
    for name in ("encoder.down2.norm.weight", "decoder.mask_tokens.weight", "decoder.stage32.position.grid"):
        assert not torch.equal(without[name], all_of_them[name])


def test_the_encoder_has_a_rate_of_its_own(tiny):
    recipe = dict(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    before = after_a_step(tiny(**recipe), steps=0)
    moved, slower, still = ({name: weight - before[name] for name, weight in after_a_step(tiny(**recipe, encoder_lr_factor=factor)).items()}
                            for factor in (1.0, 0.25, 0.0))
    for name, change in moved.items():
        factor = 0.25 if name.startswith("encoder.") else 1.0
        torch.testing.assert_close(slower[name], factor * change, rtol=1e-2, atol=1e-7)
        assert not still[name].any() if name.startswith("encoder.") else torch.equal(still[name], change)
    assert any(change.any() for name, change in moved.items() if name.startswith("encoder."))
    with pytest.raises(ValueError, match="encoder_lr_factor needs a network with a part called encoder"):
        Trainer(tiny(encoder_lr_factor=0.5), open_data(tiny()), plain_network())


def test_every_weight_is_in_one_group(tiny):
    model = QTSeg(width=4, depths=[1, 1, 1], mlp_width=32)
    for changes in ({}, {"decay_norms": False}, {"encoder_lr_factor": 0.5}, {"decay_norms": False, "encoder_lr_factor": 0.5}):
        groups = weight_groups(model, tiny(**changes))
        weights = [weight for group in groups for weight in (group["params"] if isinstance(group, dict) else [group])]
        assert sorted(map(id, weights)) == sorted(map(id, model.parameters()))


def test_a_norm_over_whole_maps_does_not_decay(tiny):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.LayerNorm((2, 64, 64)), nn.Conv2d(2, 2, 1))
    spared = [id(weight) for group in weight_groups(model, tiny(decay_norms=False)) if "weight_decay" in group for weight in group["params"]]
    assert spared == [id(weight) for weight in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)]


# ---- averages, accumulation, early stopping


def test_ema_and_early_stopping_are_the_callbacks(tiny):
    by_option = fit(tiny(name="option", epochs=4, ema=0.5, early_stopping=1, lr=1e-9, min_lr=0.0))
    by_hand = fit(tiny(name="hand", epochs=4, lr=1e-9, min_lr=0.0), callbacks=[EMA(0.5), EarlyStopping(1)])
    assert numbers(by_option.folder) == numbers(by_hand.folder) and len(by_option.history) == len(by_hand.history) < 4
    with pytest.raises(ValueError, match="two callbacks of one class keep a state"):
        fit(tiny(ema=0.5), callbacks=[EMA(0.9)])


def test_the_average_is_what_every_checkpoint_holds(tiny):
    result = fit(tiny(ema=0.8))
    state = torch.load(result.folder / "resume.pt", weights_only=True)
    average = state["callbacks"]["EMA"]
    for name, weight in QTSeg.from_pretrained(result.folder / "last").state_dict().items():
        torch.testing.assert_close(weight, average[f"module.{name}"])
    assert not torch.equal(state["model"]["encoder.down2.conv.weight"], average["module.encoder.down2.conv.weight"])


@pytest.mark.parametrize("changes", [{}, {"crop": 32, "crop_foreground": 0.5}, {"clip": 0.1}, {"optimizer": "sgd", "warmup_epochs": 1}])
def test_accumulated_gradients_are_those_of_the_larger_batch(tiny, changes):
    whole = after_a_step(tiny(batch=6, **changes), plain_network(), steps=2)
    parts = after_a_step(tiny(batch=2, accumulate=3, **changes), plain_network(), steps=2)
    other = after_a_step(tiny(batch=2, **changes), plain_network(), steps=2)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other["0.weight"], whole["0.weight"], rtol=1e-4, atol=1e-6)


def test_the_last_step_of_an_epoch_may_have_fewer_images(tiny):
    data = open_data(tiny())
    left = len(data.train) % 9
    assert left % 3, "the last part is incomplete, too"
    whole = fit(tiny(name="whole", batch=9, drop_last=False), plain_network())
    parts = fit(tiny(name="parts", batch=3, accumulate=3, drop_last=False), plain_network())
    assert [row["train_loss"] for row in parts.history] == pytest.approx([row["train_loss"] for row in whole.history], rel=1e-4)
    assert len(data.train) // 9 * 9 < len(data.train)
    with pytest.raises(ValueError, match="training images do not fill a batch of 400: lower batch or accumulate, or drop_last=False"):
        fit(tiny(name="none", accumulate=100))


# ---- losses


def test_the_losses_options_reach_training_and_validation(tiny):
    config = tiny(class_weights=[0.2, 0.8], label_smoothing=0.1)
    trainer, data = Trainer(config, open_data(config)), open_data(config)
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 2, 8, 8, generator=generator), torch.randint(0, 2, (2, 8, 8), generator=generator)
    expected = (F.cross_entropy(logits, target, weight=torch.tensor([0.2, 0.8]), label_smoothing=0.1)
                + ce_dice_loss(logits, target) - F.cross_entropy(logits, target))
    torch.testing.assert_close(trainer.loss(logits, target), expected)
    result = fit(config)
    scored = validate(QTSeg.from_pretrained(result.checkpoint_dir), data.valid, 2, batch=4, loss=trainer.loss)
    assert scored["loss"] == pytest.approx(result.metrics["valid"]["loss"], abs=1e-6)
    assert scored["loss"] != pytest.approx(validate(QTSeg.from_pretrained(result.checkpoint_dir), data.valid, 2, batch=4)["loss"], abs=1e-3)


def test_three_classes_have_weighted_scores_in_training_and_evaluation(tmp_path):
    config = TrainConfig(data="phantoms:endoscopy:24", classes=3, size=32, width=4, depths=[1, 1, 1], mlp_width=32, epochs=1, batch=4,
                         device="cpu", runs=str(tmp_path), name="run", cache=str(tmp_path / "cache"), progress=False, class_weights=[1, 1, 3])
    result = fit(config)
    scores = result.metrics["valid"]
    assert scores["dice_weighted"] == pytest.approx((scores["dice_1"] + 3 * scores["dice_2"]) / 4)
    assert "valid_dice_weighted" in result.history[0]
    network, data = QTSeg.from_pretrained(result.checkpoint_dir), open_data(config)
    summary = evaluate(network, data, "valid", Protocol(surface=False, draws=50, class_weights=(1, 1, 3))).summary["training"]
    plain = evaluate(network, data, "valid", Protocol(surface=False, draws=50)).summary["training"]
    assert summary["weighted mean"]["dice"]["mean"] == pytest.approx(scores["dice_weighted"])
    low, high = (summary["weighted mean"]["dice"][name] for name in ("low", "high"))
    assert low <= summary["weighted mean"]["dice"]["mean"] <= high
    assert {name: part for name, part in summary.items() if name != "weighted mean"} == plain


# ---- crops and windows


def test_training_sees_crops_and_everything_after_it_windows(tiny, monkeypatch):
    sizes: list[tuple] = []
    config = tiny(crop=32, crop_foreground=0.5)
    model = QTSeg(2, width=4, depths=[1, 1, 1], mlp_width=32)
    model.register_forward_hook(lambda module, inputs, output: sizes.append((module.training, *inputs[0].shape[2:])))
    result = fit(config, model)
    assert {size for size in sizes if size[0]} == {(True, 32, 32)} and {size for size in sizes if not size[0]} == {(False, 32, 32)}
    assert read_preprocessing(result.checkpoint_dir) == open_data(config).preprocessing.__class__(
        **{**open_data(config).preprocessing.__dict__, "window": 32})
    assert fit(tiny(name="whole", crop=64)).metrics["test"] and read_preprocessing(tiny(name="whole").folder / "last").window is None

    data, network = open_data(config), QTSeg.from_pretrained(result.checkpoint_dir)
    windowed = validate(Windowed(network, 32), data.test or data.valid, 2)["dice"]
    assert windowed == pytest.approx(result.metrics["test"]["dice"], abs=1e-6)
    evaluation = evaluate_checkpoint(result.checkpoint_dir, protocol=Protocol(surface=False, draws=10), device="cpu", pictures=False)
    assert evaluation.summary["training"]["mean"]["dice"]["mean"] == pytest.approx(windowed, abs=1e-6)
    image = data.valid.batch([0]).images[0].permute(1, 2, 0).numpy()
    predictor = Predictor(result.checkpoint_dir, device="cpu")
    with torch.no_grad():
        logits = Windowed(network.eval(), 32)(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    np.testing.assert_allclose(predictor.probabilities(image)[..., 1], logits.softmax(1)[0, 1].numpy(), atol=1e-4)
    whole = Predictor(network, Preprocessing(64), 2, device="cpu")
    assert np.abs(whole.probabilities(image) - predictor.probabilities(image)).max() > 1e-3


def test_crops_depend_on_the_seed_of_the_step_alone(tiny):
    first, again = (after_a_step(tiny(crop=32), plain_network()) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], after_a_step(tiny(crop=32, crop_foreground=1.0), plain_network())["0.weight"])
    assert not torch.equal(first["0.weight"], after_a_step(tiny(crop=48), plain_network())["0.weight"])


def test_crops_that_do_not_fit_are_one_sentence(tiny):
    with pytest.raises(ValueError, match="crop, 96, must be at most size, 64"):
        tiny(crop=96)
    with pytest.raises(ValueError, match="crops of 96 pixels do not fit into images of 64 x 64"):
        fit(tiny(crop=96, size=512), data=open_data(tiny()))


def test_windows_agree_where_the_network_does_and_pad_what_is_narrow():
    network = Windowed(lambda images: images[:, :2], 16)
    for shape in ((1, 3, 40, 33), (2, 3, 16, 16), (1, 3, 8, 50)):
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(network(images), images[:, :2])


# ---- all of them


ALL = dict(warmup_epochs=2, decay_norms=False, encoder_lr_factor=0.5, ema=0.7, accumulate=2, batch=3, early_stopping=5, label_smoothing=0.1,
           class_weights=[0.4, 0.6], crop=32, crop_foreground=0.5, losses={"ce_dice": 1.0, "boundary_dou": 0.5}, epochs=3, position="learned")


class Stop(Exception):
    pass


class StopAfter:
    """A callback that fails after so many steps of a run."""

    def __init__(self, steps: int):
        self.left = steps

    def after_batch(self, state) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_with_all_of_them_resumes_to_the_same_result(tiny, optimizer):
    whole = fit(tiny(name="whole", optimizer=optimizer, **ALL))
    with pytest.raises(Stop):
        fit(tiny(optimizer=optimizer, **ALL), callbacks=[StopAfter(5)])
    resumed = fit(tiny(optimizer=optimizer, resume=True, **ALL))
    assert numbers(resumed.folder) == numbers(whole.folder)
    names = ("lr", "train_loss", "train_dice", "valid_loss", "valid_dice")
    assert [[row[name] for name in names] for row in resumed.history] == [[row[name] for name in names] for row in whole.history]
    with pytest.raises(ValueError, match="accumulate: 2 -> 1"):
        fit(tiny(optimizer=optimizer, resume=True, **ALL | {"accumulate": 1}))


def test_more_epochs_follow_the_schedule_with_groups_of_weights(tiny):
    changes = dict(decay_norms=False, encoder_lr_factor=0.5, scheduler="cosine")
    fit(tiny(epochs=2, **changes))
    more = fit(tiny(epochs=4, resume=True, **changes))
    direct = fit(tiny(name="direct", epochs=4, **changes))
    assert [row["lr"] for row in more.history[2:]] == pytest.approx([row["lr"] for row in direct.history[2:]])


def test_the_study_has_an_arm_for_every_option():
    study = yaml.safe_load((ROOT / "nbs/experiments/studies/recipe.yaml").read_text())
    tried = {name for arm in study["arms"].values() for name in arm}
    assert {"warmup_epochs", "decay_norms", "encoder_lr_factor", "ema", "accumulate", "early_stopping", "label_smoothing", "class_weights",
            "crop"} <= tried
    for arm in study["arms"].values():
        TrainConfig(**study["common"] | arm)


@pytest.mark.parametrize("window", [31, 65, True, 48.0])
def test_a_window_that_no_network_can_have_learned_is_refused(window):
    with pytest.raises(ValueError, match="window is a whole number from 32 to size, 64, or None"):
        Preprocessing(64, window=window)
