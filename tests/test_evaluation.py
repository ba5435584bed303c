"""Scores of a checkpoint: right at the image's own size, by an independent computation; honest where nothing is defined; whole on disk."""
from __future__ import annotations

import csv
import io
import itertools
import json
import math
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import shared_folder
from PIL import Image
from torch import nn

from qtseg import evaluation as module
from qtseg.data import SegmentationData, fitted_size
from qtseg.evaluation import (BINS, SCORES, SIZES, THRESHOLDS, Protocol, bootstrap_interval, bootstrap_means, calibration_counts,
                              calibration_error, choose_splits, class_probabilities, decide, draw_gallery, evaluate_checkpoint,
                              evaluate_network, find_checkpoints, group_rows, main, mask_scores, multiply_adds, network_cost, open_for,
                              own_size_mask, surface_scores, table_rows, threshold_counts, threshold_rows, to_dict, undo_resize)
from qtseg.metrics import MEASURES, confusion_counts, hard_masks
from qtseg.model import QTSeg
from qtseg.phantoms import write_prepared
from qtseg.training import TrainConfig, evaluate, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # inside MONAI
needs_monai = pytest.mark.skipif(module.importlib.util.find_spec("monai") is None, reason="MONAI, which computes hd95 and nsd, is not installed")


# ------------------------------------------------------------------------------------------------ probabilities and decisions
@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_decision_equals_hard_masks_ties_included(classes):
    rng = torch.Generator().manual_seed(classes)
    logits = torch.randint(-3, 4, (3, classes, 40, 50), generator=rng) / 4  # many exact ties
    probabilities = class_probabilities(logits)
    assert probabilities.shape == (3, max(classes, 2), 40, 50) and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3, 40, 50))
    mask = decide(probabilities.permute(0, 2, 3, 1).numpy())
    assert mask.dtype == np.uint8 and (mask == hard_masks(logits).numpy()).all()
    at_size = np.stack([own_size_mask(image.permute(1, 2, 0).numpy(), 40, 40, "squash") for image in probabilities[..., :40]])
    assert (at_size == mask[..., :40]).all()


def test_class_probabilities_by_hand():
    one = class_probabilities(torch.tensor([0.0, math.log(3)]).reshape(1, 1, 1, 2))
    assert torch.allclose(one[0, :, 0], torch.tensor([[0.5, 0.25], [0.5, 0.75]]))
    two = class_probabilities(torch.tensor([0.0, math.log(3)], dtype=torch.bfloat16).reshape(1, 2, 1, 1))
    assert two.dtype == torch.float32 and torch.allclose(two.flatten(), torch.tensor([0.25, 0.75]), atol=1e-2)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        class_probabilities(torch.zeros(2, 4, 4))


def test_threshold_moves_two_classes_and_leaves_the_choice_among_more():
    two = np.array([[0.7, 0.3], [0.4, 0.6], [0.1, 0.9]], dtype=np.float32)
    assert decide(two).tolist() == [0, 1, 1] and decide(two, 0.2).tolist() == [1, 1, 1] and decide(two, 0.7).tolist() == [0, 0, 1]
    assert decide(two[..., 1:], 0.7).tolist() == [0, 0, 1], "the foreground alone is enough"
    three = np.array([[0.4, 0.35, 0.25], [0.6, 0.1, 0.3], [0.1, 0.45, 0.45]], dtype=np.float32)
    assert decide(three).tolist() == [0, 0, 1] and decide(three, 0.5).tolist() == [1, 0, 1] and decide(three, 0.3).tolist() == [1, 2, 1]


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, math.nan])
def test_impossible_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        decide(np.zeros((2, 2)), threshold)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Protocol(threshold=threshold)


# ------------------------------------------------------------------------------------------------ back to the image's own size
ODD_SIZES = [(1, 1), (1, 7), (9, 1), (37, 4000), (4000, 37), (33, 65), (511, 513), (64, 64)]


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("height, width", ODD_SIZES)
def test_coordinates_come_back_to_a_fraction_of_a_pixel(height, width, resize):
    """Each place of the network's grid says where in the image it lies; undone, each pixel must find its own place."""
    size = 64
    rows, columns = fitted_size(height, width, size, resize)
    y, x = ((np.arange(size) + 0.5) * full / fitted - 0.5 for full, fitted in ((height, rows), (width, columns)))
    maps = np.stack(np.meshgrid(y, x, indexing="ij"), axis=2).astype(np.float32)  # [size, size, 2]
    back = undo_resize(maps, height, width, resize)
    assert back.shape == (height, width, 2) and back.dtype == np.float32
    for axis, (full, fitted) in enumerate(((height, rows), (width, columns))):
        place = np.moveaxis(back[..., axis], axis, 0)  # [full, other]
        error = np.abs(place - np.arange(full)[:, None])
        border = max(full / fitted, 1) / 2  # where the image ends, the outermost sample is repeated for half its width
        inside = slice(math.ceil(border), full - math.ceil(border))
        assert error[inside].max(initial=0) < 0.1 and error.max() <= border + 0.01


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_masks_come_back_pixel_for_pixel_from_a_grid_three_times_as_fine(resize, classes):
    """At 3x and above more than half of each pixel's area carries its own label, in the worst alignment too."""
    rng, tried = np.random.default_rng(classes), 0
    for _ in range(200):
        height, width = rng.integers(1, 43, 2)
        size = int(rng.integers(3 * max(height, width), 200)) if max(height, width) < 60 else 200
        rows, columns = fitted_size(height, width, max(size, 32), resize)
        if min(rows / height, columns / width) < 3:
            continue  # "pad" may round one side down
        mask = rng.integers(0, classes, (height, width)).astype(np.uint8)
        square = np.zeros((max(size, 32),) * 2, np.uint8)
        square[:rows, :columns] = cv2.resize(mask, (int(columns), int(rows)), interpolation=cv2.INTER_NEAREST_EXACT)
        probabilities = (square[..., None] == np.arange(classes)).astype(np.float32)
        assert (own_size_mask(probabilities, height, width, resize) == mask).all(), (height, width, size)
        tried += 1
    assert tried > 100


@pytest.mark.parametrize("height, width", ODD_SIZES[3:])
def test_a_rectangle_comes_back_to_half_a_grid_step(height, width):
    """Also where the image is finer than the grid: no shift, no growth, beyond what the grid can tell."""
    for resize in ("squash", "pad"):
        rows, columns = fitted_size(height, width, 96, resize)
        square = np.zeros((96, 96, 2), np.float32)
        top, bottom, left, right = rows // 4, rows - rows // 4, columns // 4, columns - columns // 4
        square[top:bottom, left:right, 1] = 1
        mask = own_size_mask(square, height, width, resize)
        found = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
        for index, first, last, full, fitted in ((found[0], top, bottom, height, rows), (found[1], left, right, width, columns)):
            step = max(full / fitted, 1)
            assert abs(index[0] - first * full / fitted) <= step / 2 + 0.5 and abs(index[-1] + 1 - last * full / fitted) <= step / 2 + 0.5


@pytest.mark.parametrize("height, width", [(10, 31), (31, 10), (200, 77), (1, 50)])
def test_padding_never_leaks(height, width):
    rows, columns = fitted_size(height, width, 64, "pad")
    maps = np.random.default_rng(0).random((64, 64, 6), dtype=np.float32)
    poisoned = maps.copy()
    poisoned[rows:] = np.nan
    poisoned[:, columns:] = np.nan
    back = undo_resize(poisoned, height, width, "pad")
    assert back.shape == (height, width, 6) and (back == undo_resize(maps, height, width, "pad")).all()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
def test_any_number_of_maps_is_undone_one_by_one(channels):
    maps = np.random.default_rng(1).random((32, 32, channels), dtype=np.float32)
    back = undo_resize(maps, 45, 20, "squash")
    assert back.shape == (45, 20, channels)
    for channel in range(channels):
        np.testing.assert_allclose(back[..., [channel]], undo_resize(maps[..., [channel]], 45, 20, "squash"), atol=1e-6)


def test_undo_resize_refuses_what_is_no_square():
    with pytest.raises(ValueError, match="size, size"):
        undo_resize(np.zeros((8, 9, 1), np.float32), 4, 4, "squash")
    with pytest.raises(ValueError, match="squash"):
        undo_resize(np.zeros((8, 8, 1), np.float32), 4, 4, "crop")


# ------------------------------------------------------------------------------------------------ an independent computation
def independent_scores(prediction: np.ndarray, target: np.ndarray, tolerance: float) -> dict[str, float]:
    """Every score of two boolean masks, from NumPy, SciPy's distance transform and scikit-image's erosion."""
    from scipy.ndimage import distance_transform_edt
    from skimage.morphology import erosion

    both, either = np.logical_and(prediction, target).sum(), np.logical_or(prediction, target).sum()
    wrong = np.logical_xor(prediction, target)
    found = {"mae": wrong.mean(), "acc": (prediction == target).mean(), "dice": 2 * both / (prediction.sum() + target.sum()),
             "iou": both / either, "precision": target[prediction].mean(), "recall": prediction[target].mean(),
             "specificity": (~prediction[~target]).mean()}
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    padded = [np.pad(mask, 1) for mask in (prediction, target)]  # outside the image there is nothing
    borders = [mask & ~erosion(mask.astype(np.uint8), cross).astype(bool) for mask in padded]
    there, back = (distance_transform_edt(~other)[own] for own, other in (borders, borders[::-1]))
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return {name: 100 * value for name, value in found.items()} | {
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)), "nsd": 100 * near / (len(there) + len(back))}


@needs_monai
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 3.5])
def test_every_score_of_random_blobs_equals_an_independent_one(tolerance):
    pytest.importorskip("skimage", reason="scikit-image, the independent yardstick, is not installed")
    rng = np.random.default_rng(5)
    for trial in range(12):
        height, width = rng.integers(20, 70, 2)
        field = cv2.GaussianBlur(rng.random((2, height, width)).transpose(1, 2, 0), (0, 0), 4)
        prediction, target = ((field[..., i] > np.quantile(field[..., i], rng.uniform(0.3, 0.9))) for i in range(2))  # touch borders
        prediction |= target & (rng.random() < 0.5)
        _, scores = mask_scores(prediction.astype(np.uint8), target.astype(np.uint8), 2, tolerance=tolerance)
        expected = independent_scores(prediction, target, tolerance)
        assert scores[0] == pytest.approx([expected[name] for name in SCORES], abs=2e-4), trial


class Darkness(nn.Module):
    """A network without weights, good enough for skin and ultrasound: dark is foreground."""

    def forward(self, images):
        dark = -nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 9, 1, 4, count_include_pad=False)
        score = 6 * (dark - dark.mean(dim=(2, 3), keepdim=True) - 0.1)
        return torch.cat([-score, score], dim=1)


def real_images(folder: Path, isic: int = 25) -> Path:
    """Real images in images/ and masks/: some of ISIC, 512x512, and 25 of BUSI in their odd sizes."""
    shared = shared_folder() / "data"
    for name in ("isic2018_512.zip", "busi_raw_sample.zip"):
        if not (shared / name).is_file():
            pytest.skip(f"{shared / name} is not here: real images never enter the repository")
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    with zipfile.ZipFile(shared / "isic2018_512.zip") as archive:
        for name in sorted(name for name in archive.namelist() if "/val/inputs/" in name and name.endswith(".jpg"))[:isic]:
            (folder / "images" / Path(name).name).write_bytes(archive.read(name))
            mask = name.replace("inputs", "targets").replace(".jpg", "_segmentation.png")
            (folder / "masks" / f"{Path(name).stem}.png").write_bytes(archive.read(mask))
    with zipfile.ZipFile(shared / "busi_raw_sample.zip") as archive:
        names = {name for name in archive.namelist() if name.endswith("_mask.png")}
        for name in sorted(name for name in names if name.replace("_mask", "_mask_1") not in names)[:25]:
            image = Image.open(io.BytesIO(archive.read(name.replace("_mask", "")))).convert("RGB")
            mask = Image.open(io.BytesIO(archive.read(name))).convert("L")
            stem = Path(name).stem.removesuffix("_mask").replace(" ", "_")
            image.save(folder / "images" / f"{stem}.png")
            mask.save(folder / "masks" / f"{stem}.png")
    return folder


@needs_monai
@pytest.mark.parametrize("resize, isic", [("squash", 25), ("pad", 0)], ids=["50 squashed", "25 padded"])
def test_own_size_scores_of_real_images_equal_an_independent_computation(resize, isic, tmp_path):
    """Read, resized, decided and scored anew with Pillow, scikit-image, NumPy and SciPy; only the network is shared."""
    skimage = pytest.importorskip("skimage.transform", reason="scikit-image, the independent yardstick, is not installed")
    folder = real_images(tmp_path / "real", isic)
    data = SegmentationData.open(folder, size=128, resize=resize, cache=tmp_path / "cache", progress=False)
    network = Darkness()
    result = evaluate_network(network, data, "all")
    assert len(result.ids) == 25 + isic and len(set(result.image_sizes)) > 10
    _, splits = choose_splits(data, "all")
    places = [(split, position) for split in splits for position in range(len(split))]
    for number, (split, position) in enumerate(places):
        image, mask = (np.asarray(Image.open(path)) for path in split.paths[position])
        height, width = image.shape[:2]
        stored = split.batch([position]).images
        probability = network(stored / 127.5 - 1)[0].softmax(dim=0)[1].double().numpy()  # [128, 128]
        scale = 128 / max(height, width)
        rows, columns = (128, 128) if resize == "squash" else (round(height * scale), round(width * scale))
        own = skimage.resize(probability[:rows, :columns], (height, width), order=1, mode="edge", anti_aliasing=False)
        prediction, target = own > 0.5, mask > mask.max() / 2 if mask.max() else np.zeros((height, width), bool)
        counts = [(prediction & target).sum(), (prediction & ~target).sum(), (~prediction & target).sum(), (~prediction & ~target).sum()]
        assert result.counts[1, number, 0].tolist() == counts, split.ids[position]
        if prediction.any() and target.any():
            expected = independent_scores(prediction, target, 2.0)
            assert result.scores[1, number, 0] == pytest.approx([expected[name] for name in SCORES], abs=5e-4), split.ids[position]
    empty = (result.counts[1, :, 0, 0] + result.counts[1, :, 0, 2]) == 0
    assert empty.sum() < 10, "normal ultrasound images have empty targets; most images must not"


# ------------------------------------------------------------------------------------------------ where nothing is defined
EMPTY, SPOT, FULL = np.zeros((6, 6), np.uint8), np.zeros((6, 6), np.uint8), np.ones((6, 6), np.uint8)
SPOT[2:4, 2:4] = 1
OTHER = np.roll(SPOT, 2, axis=0)
NAN = math.nan


@needs_monai
@pytest.mark.parametrize("prediction, target, expected", [
    (EMPTY, EMPTY, {"dice": 100, "iou": 100, "precision": 100, "recall": 100, "specificity": 100, "hd95": 0, "nsd": 100}),
    (EMPTY, SPOT, {"dice": 0, "iou": 0, "precision": NAN, "recall": 0, "specificity": 100, "hd95": NAN, "nsd": 0}),
    (SPOT, EMPTY, {"dice": 0, "iou": 0, "precision": 0, "recall": NAN, "specificity": 100 * 32 / 36, "hd95": NAN, "nsd": 0}),
    (OTHER, SPOT, {"dice": 0, "iou": 0, "precision": 0, "recall": 0, "specificity": 100 * 28 / 32, "hd95": 2, "nsd": 100}),
    (SPOT, SPOT, {"dice": 100, "iou": 100, "precision": 100, "recall": 100, "specificity": 100, "hd95": 0, "nsd": 100}),
    (FULL, FULL, {"dice": 100, "iou": 100, "precision": 100, "recall": 100, "specificity": 100, "hd95": 0, "nsd": 100}),
    (SPOT, FULL, {"precision": 100, "recall": 100 * 4 / 36, "specificity": NAN, "dice": 100 * 8 / 40}),
    (FULL, SPOT, {"precision": 100 * 4 / 36, "recall": 100, "specificity": 0}),
], ids=["both empty", "nothing predicted", "nothing there", "beside it", "perfect", "everything", "target is all", "all predicted"])
def test_conventions(prediction, target, expected):
    scores = dict(zip(SCORES, mask_scores(prediction, target, 2)[1][0]))
    assert {name: scores[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert scores["mae"] + scores["acc"] == pytest.approx(100)


@needs_monai
def test_surface_distances_of_single_pixels_and_one_pixel_images():
    one = np.ones((1, 1), bool)
    assert surface_scores(one, one) == (0, 100)
    far = np.zeros((1, 400), bool), np.zeros((1, 400), bool)
    far[0][0, 0] = far[1][0, 300] = True
    assert surface_scores(*far) == (300, 0) and surface_scores(*far, tolerance=300) == (300, 100)


def test_legacy_touches_the_papers_scores_only():
    honest, legacy = (dict(zip(SCORES, mask_scores(EMPTY, SPOT, 2, legacy=legacy, surface=False)[1][0])) for legacy in (False, True))
    assert honest["dice"] == 0 < legacy["dice"] and honest["recall"] == legacy["recall"] == 0 and honest["mae"] == legacy["mae"]


def test_without_monai(monkeypatch):
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "monai" else real(name))
    assert Protocol().surface is False and Protocol().measures == SCORES[:-2]
    with pytest.raises(ModuleNotFoundError, match="pip install monai"):
        Protocol(surface=True)


# ------------------------------------------------------------------------------------------------ curves
def test_calibration_equals_a_loop_over_pixels():
    rng = np.random.default_rng(2)
    foreground, target = rng.random((20, 30), dtype=np.float32), rng.integers(0, 3, (20, 30)).astype(np.uint8)
    foreground[0, :3] = 0, 1, 0.5
    expected = np.zeros((BINS, 3))
    for probability, label in zip(foreground.flat, target.flat):
        expected[min(int(probability * np.float32(BINS)), BINS - 1)] += 1, probability, label > 0
    counts = calibration_counts(foreground, target)
    np.testing.assert_allclose(counts, expected, rtol=1e-6)
    error = sum(row[0] / 600 * abs(row[1] / row[0] - row[2] / row[0]) for row in expected if row[0])
    assert calibration_error(counts) == pytest.approx(100 * error)


def test_a_calibrated_network_has_no_calibration_error_and_a_bold_one_has():
    rng = np.random.default_rng(3)
    foreground = rng.random((400, 400), dtype=np.float32)
    target = (rng.random((400, 400)) < foreground).astype(np.uint8)
    assert calibration_error(calibration_counts(foreground, target)) < 0.7
    assert calibration_error(calibration_counts((foreground > 0.5).astype(np.float32), target)) == pytest.approx(25, abs=1)


@pytest.mark.parametrize("classes", [2, 3])
def test_threshold_counts_equal_deciding_again_and_again(classes):
    rng = np.random.default_rng(classes)
    probabilities = np.round(rng.dirichlet(np.ones(classes), (24, 31)), 2).astype(np.float32)  # exactly on thresholds, too
    target = rng.integers(0, classes, (24, 31)).astype(np.uint8)
    counts = threshold_counts(probabilities, target)
    assert counts.shape == (len(THRESHOLDS), classes - 1, 4)
    for threshold, row in zip(THRESHOLDS, counts):
        mask = torch.from_numpy(decide(probabilities, float(threshold)).astype(np.int64))[None]
        expected = confusion_counts(mask, torch.from_numpy(target.astype(np.int64))[None], classes)[0]
        assert row.tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------ intervals
def test_bootstrap_equals_drawing_images_by_hand():
    values = np.random.default_rng(0).normal(80, 10, (12, 2))
    groups = ["a", "a", "a", "b", "b", "c", "", "", "d", "d", "d", "d"]
    means = bootstrap_means(values, groups, draws=50, seed=7)
    units = [[0, 1, 2], [3, 4], [5], [6], [7], [8, 9, 10, 11]]
    rng = np.random.default_rng(7)
    for row in means:
        drawn = [image for unit in rng.integers(len(units), size=len(units)) for image in units[unit]]
        assert row == pytest.approx(values[drawn].mean(axis=0))
    assert (means == bootstrap_means(values, groups, draws=50, seed=7)).all()


def test_the_interval_covers_the_truth_about_19_times_in_20():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(300):
        values = 100 * rng.beta(8, 2, (60, 1))
        low, high = bootstrap_interval(bootstrap_means(values, [""] * 60, 200, trial))
        hits += int(low[0] <= 80 <= high[0])
    assert 0.88 <= hits / 300 <= 0.98


def test_images_of_one_patient_widen_the_interval():
    rng = np.random.default_rng(4)
    values = (rng.normal(80, 10, (20, 1)) + rng.normal(0, 1, (20, 10))).reshape(200, 1)  # 20 patients, 10 images each
    groups = [f"patient {index // 10}" for index in range(200)]
    width = {name: np.diff(bootstrap_interval(bootstrap_means(values, chosen, 500)), axis=0).item()
             for name, chosen in {"patients": groups, "images": [""] * 200}.items()}
    assert width["patients"] > 2.5 * width["images"]


def test_undefined_scores_are_left_out_and_one_unit_gives_no_interval():
    values = np.array([[80.0, NAN], [90.0, NAN], [NAN, NAN]])
    means = bootstrap_means(values, ["", "", ""], 300)
    interval = bootstrap_interval(means)
    assert 80 <= interval[0, 0] <= interval[1, 0] <= 90 and np.isnan(interval[:, 1]).all()
    np.testing.assert_array_equal(bootstrap_means(values, ["p", "p", "p"], 300), means, "one group for all tells nothing apart")
    assert np.isnan(bootstrap_interval(bootstrap_means(values[:1], [""], 10))).all()


# ------------------------------------------------------------------------------------------------ a network on a split
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of seconds: a tiny network on phantoms of 48x48, trained at 32."""
    folder = tmp_path_factory.mktemp("run")
    data = write_prepared(folder / "set", "dermoscopy", 20, 48, 0)
    fit(TrainConfig.from_dict(dict(data=str(data), cache=str(folder / "cache"), size=32, width=4, depths=[1, 1, 1], mlp_width=32, epochs=4,
                                   batch=4, valid_batch=4, lr=3e-3, device="cpu", runs=str(folder), name="run", progress=False)))
    return folder / "run"


@pytest.fixture(scope="module")
def endoscopy(tmp_path_factory) -> SegmentationData:
    """Three classes, 96x96 images on a grid of 64."""
    folder = tmp_path_factory.mktemp("endoscopy")
    return SegmentationData.open(write_prepared(folder / "set", "endoscopy", 16, 96, 0), classes=3, size=64, cache=folder / "cache",
                                 progress=False)


class Guess(nn.Module):
    """Smooth logits that depend on the image, for any number of classes."""

    def __init__(self, classes: int):
        super().__init__()
        torch.manual_seed(3)
        self.mix = nn.Conv2d(3, classes, 1)

    def forward(self, images):
        return 8 * self.mix(nn.functional.avg_pool2d(images, 7, 1, 3))


@pytest.fixture
def no_stopwatch(monkeypatch):
    """Timings take seconds and are tested where they belong."""
    monkeypatch.setattr(module, "_median_seconds", lambda *arguments: 1.0)


QUICK = dict(surface=False, draws=50)


def test_training_size_equals_trainings_own_evaluation(endoscopy):
    network = Guess(3)
    result = evaluate_network(network, endoscopy, "train", Protocol(**QUICK), batch=3)
    expected = evaluate(network, endoscopy.train, 3)
    summary = result.summary["training"]
    for measure in MEASURES:
        assert summary["mean"][measure]["mean"] == pytest.approx(expected[measure], abs=1e-9)
        for label, name in enumerate(endoscopy.class_names[1:], start=1):
            assert summary[name][measure]["mean"] == pytest.approx(expected[f"{measure}_{label}"], abs=1e-9)


def test_rows_groups_and_counts_of_three_classes(endoscopy):
    result = evaluate_network(Guess(3), endoscopy, "all", Protocol(**QUICK), batch=5)
    rows = list(result.rows())
    assert len(rows) == 16 * 2 * 2 and [row["size"] for row in rows[:2]] == list(SIZES)
    assert {(row["height"], row["width"]) for row in rows if row["size"] == "own"} == {(96, 96)}
    assert {(row["height"], row["width"]) for row in rows if row["size"] == "training"} == {(64, 64)}
    for row in rows:
        tp = row["dice"] / 200 * (row["target_pixels"] + row["predicted_pixels"])
        assert row["target_pixels"] == 0 or row["recall"] == pytest.approx(100 * tp / row["target_pixels"])
    assert result.missed["own"]["lesions"] == sum(row["target_pixels"] > 0 for row in rows if row["size"] == "own")
    assert result.missed["own"]["missed"] == sum(row["target_pixels"] > 0 and row["dice"] == 0 for row in rows if row["size"] == "own")
    assert result.missed["own"]["false_alarms"] == sum(row["target_pixels"] == 0 < row["predicted_pixels"] for row in rows if row["size"] == "own")
    groups = group_rows(result)
    assert [(row["size"], row["group"], row["images"]) for row in groups] == [(size, "endoscopy", 16) for size in SIZES]
    assert groups[1]["dice"] == pytest.approx(result.summary["own"]["mean"]["dice"]["mean"])
    assert threshold_rows(result)[9]["threshold"] == 0.5 and len(threshold_rows(result)) == len(THRESHOLDS)
    json.dumps(to_dict(result), allow_nan=False)


def test_threshold_is_used_at_both_sizes(run):
    data = open_for(run / "best_dice")
    network = QTSeg.from_pretrained(run / "best_dice")
    bold, shy = (evaluate_network(network, data, "all", Protocol(threshold=threshold, **QUICK)) for threshold in (0.05, 0.95))
    for size in range(2):
        predicted = [(result.counts[size, ..., 0] + result.counts[size, ..., 1]).sum() for result in (bold, shy)]
        assert predicted[0] > predicted[1]
    sweep = {row["threshold"]: row["dice"] for row in threshold_rows(bold)}
    assert sweep[0.05] == pytest.approx(bold.summary["training"]["mean"]["dice"]["mean"])


def test_batch_size_order_and_mode_do_not_matter(endoscopy):
    network = Guess(3).train()
    one, many = (evaluate_network(network, endoscopy, "train", Protocol(**QUICK), batch=batch) for batch in (1, 16))
    assert network.training and one.ids == many.ids == endoscopy.train.ids
    np.testing.assert_array_equal(one.counts, many.counts)


def test_splits(endoscopy):
    assert choose_splits(endoscopy) == ("test", [endoscopy.test]) and choose_splits(endoscopy, "valid")[1] == [endoscopy.valid]
    with pytest.raises(ValueError, match="one of test"):
        choose_splits(endoscopy, "validation")


def test_gallery_has_nine_pictures_or_as_many_as_there_are(endoscopy):
    network = Guess(3)
    for split, count in (("all", 9), ("valid", 3 * min(3, len(endoscopy.valid)))):
        figure = draw_gallery(evaluate_network(network, endoscopy, split, Protocol(**QUICK)), network, endoscopy)
        assert len(figure.axes) == count and all(len(axes.images) == 1 for axes in figure.axes)


def test_cost_counts_what_the_model_chapter_counts():
    assert multiply_adds(QTSeg(), 512) == pytest.approx(2.256e9, rel=1e-3)
    cost = network_cost(QTSeg(width=4, depths=[1, 1, 1], mlp_width=32), 32, batch=2, budget=0.01)
    assert cost["latency_ms"] > 0 and cost["images_per_second"] > 0 and cost["device"] and cost["batch"] == 2


# ------------------------------------------------------------------------------------------------ a checkpoint, on disk
def test_checkpoint_of_a_run_is_scored_on_the_runs_test_split(run):
    result = evaluate_checkpoint(run / "best_dice", protocol=Protocol(draws=50), device="cpu")
    assert result.split == "test" and result.folder == run / "best_dice" / "evaluation_test"
    expected = json.loads((run / "metrics.json").read_text())["test"]
    for measure in MEASURES:
        assert result.summary["training"]["mean"][measure]["mean"] == pytest.approx(expected[measure], abs=1e-9)
    files = {path.name for path in result.folder.iterdir()}
    assert files == {"evaluation.json", "images.csv", "groups.csv", "gallery.png", "calibration.png", "thresholds.png"}
    stored = json.loads((result.folder / "evaluation.json").read_text())
    assert stored["scores"]["own"]["mean"]["dice"]["mean"] == result.summary["own"]["mean"]["dice"]["mean"]
    assert stored["cost"][0]["parameters"] == sum(p.numel() for p in QTSeg.from_pretrained(run / "best_dice").parameters())
    with (result.folder / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(result.ids)
    assert np.mean([float(row["dice"]) for row in rows if row["size"] == "own"]) == pytest.approx(stored["scores"]["own"]["mean"]["dice"]["mean"])
    assert not [path for path in (run / "best_dice").iterdir() if path.name.startswith(".")], "no private folder stays"


def test_an_old_result_stays_until_the_new_one_is_whole(run, tmp_path, monkeypatch, no_stopwatch):
    def again(**options):
        return evaluate_checkpoint(run / "best_dice", output=tmp_path / "out", protocol=Protocol(**QUICK), device="cpu", pictures=False,
                                   **options)

    again(split="test")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write = module.write_evaluation

    def full_disk(*arguments):
        write(*arguments)
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_evaluation", full_disk)
    with pytest.raises(OSError, match="no space"):
        again(split="valid")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    monkeypatch.setattr(module, "write_evaluation", write)
    again(split="valid")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["split"] == "valid"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_data_is_opened_as_the_checkpoint_wants_it(run, tmp_path, no_stopwatch):
    source = write_prepared(tmp_path / "other", "ultrasound", 10, 64, 5)
    result = evaluate_checkpoint(run / "last", source, tmp_path / "out", split="all", protocol=Protocol(**QUICK), device="cpu",
                                 pictures=False, cache=tmp_path / "cache")
    assert len(result.ids) == 10 and result.size == 32 and set(result.image_sizes) == {(64, 64)} and result.folder == tmp_path / "out"
    wrong = SegmentationData.open(source, size=64, cache=tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="prepared as"):
        evaluate_checkpoint(run / "last", wrong, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_checkpoints_of_a_run_identical_weights_once(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    network = QTSeg.from_pretrained(copy / "last")
    with torch.no_grad():
        next(network.parameters()).add_(0.01)
    network.save_pretrained(copy / "last")
    for name in ("best_iou", "best_acc", "best_mae", "best_loss"):
        shutil.copytree(copy / "best_dice", copy / name, dirs_exist_ok=True)
    assert find_checkpoints(copy) == {copy / "best_dice": ["best_acc", "best_iou", "best_loss", "best_mae"], copy / "last": []}
    assert find_checkpoints(copy / "last") == {copy / "last": []}


# ------------------------------------------------------------------------------------------------ the command
FAST = ["--no-surface", "--no-pictures", "--no-progress", "--device", "cpu"]


def test_command_scores_every_checkpoint_in_one_table(run, tmp_path, capsys, no_stopwatch):
    assert main([str(run), "--output", str(tmp_path / "out"), *FAST]) == 0
    output = capsys.readouterr().out
    found = find_checkpoints(run)
    head = next(line for line in output.splitlines() if " at own size" in line)
    assert all(f"{checkpoint.name} at 32x32" in head and f"{checkpoint.name} at own size" in head for checkpoint in found)
    assert output.count("Dice, %") == 1 and "missed lesions" in output and "pip install monai" in output
    for checkpoint in found:
        folder = tmp_path / "out" / checkpoint.name if len(found) > 1 else tmp_path / "out"
        assert (folder / "evaluation.json").is_file()


def truncate(run: Path) -> None:
    weights = run / "best_dice" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def tamper(run: Path) -> None:
    (run / "best_dice" / "preprocessor_config.json").write_text('{"size": 32}')


def other_names(run: Path) -> None:
    path = run / "best_dice" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": ["background", "a", "b"]}))


def take_the_run_away(run: Path) -> None:
    (run / "config.json").unlink()


def move_the_data(run: Path) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "nowhere/at/all"}))


def foreign_folder(run: Path) -> None:
    (run / "best_dice" / "evaluation_test").mkdir()
    (run / "best_dice" / "evaluation_test" / "thesis.txt").write_text("do not lose me")


WRONG = {
    "no such folder": (None, ["{run}/nothing"], "nothing is no folder"),
    "no checkpoint": (None, ["{empty}"], "config.json is missing"),
    "truncated weights": (truncate, ["{run}/best_dice"], "truncated"),
    "damaged preprocessing": (tamper, ["{run}/best_dice"], "does not say how images are prepared"),
    "names that do not fit": (other_names, ["{run}/best_dice"], "the network has 2 classes, preprocessing names 3"),
    "in no run": (take_the_run_away, ["{run}/best_dice"], "name the data"),
    "the run's data is gone": (move_the_data, ["{run}/best_dice"], "nowhere/at/all does not exist"),
    "no such data": (None, ["{run}/best_dice", "--data", "{run}/nothing"], "does not exist"),
    "other classes": (None, ["{run}/best_dice", "--data", "phantoms:endoscopy:8"], "tells 2 classes apart"),
    "another folder's output": (foreign_folder, ["{run}/best_dice"], "holds no evaluation"),
    "impossible threshold": (None, ["{run}/best_dice", "--threshold", "1.5"], "between 0 and 1"),
    "impossible device": (None, ["{run}/best_dice", "--device", "abacus"], "abacus"),
    "empty batches": (None, ["{run}/best_dice", "--batch", "0"], "batch must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_command_answers_wrong_input_with_one_sentence(case, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    harm, arguments, complaint = WRONG[case]
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluation_*"))
    (tmp_path / "empty").mkdir()
    if harm:
        harm(copy)
    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    device = [] if "--device" in arguments else FAST[-2:]
    assert main([argument.format(run=copy, empty=tmp_path / "empty") for argument in arguments] + FAST[:-2] + device) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("qtseg-evaluate: ") and complaint in captured.err and len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err and sorted(path.relative_to(copy) for path in copy.rglob("*")) == before


@pytest.mark.parametrize("arguments", [[], ["run", "--split", "exam"], ["run", "--batch", "many"]])
def test_command_answers_wrong_usage_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and "usage: qtseg-evaluate" in capsys.readouterr().err


def test_table_says_how_many_scores_are_defined(endoscopy):
    result = evaluate_network(Guess(3), endoscopy, "all", Protocol(**QUICK))
    table = {row[0]: row[1:] for row in table_rows({"guess": result})}
    undefined = int(np.isnan(result.scores[1, ..., SCORES.index("recall")]).sum())
    assert undefined > 0 and table["recall, %"][1].endswith(f", {32 - undefined} of 32")
    assert table["Dice, %"][1].count("of") == 0 and list(itertools.islice(table, 1)) == [""]
