"""Scores of a checkpoint: right at the image's own size, by an independent computation; honest where nothing is defined; whole on disk."""
from __future__ import annotations

import csv
import io
import itertools
import json
import math
import shutil
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import shared_folder
from PIL import Image
from torch import nn

from qtseg.evaluation import runs as evaluation_runs, scores as evaluation_scores, tables as evaluation_tables, timing as evaluation_timing
from qtseg.data.preprocessing import fitted_size
from qtseg.data.segmentation import SegmentationData
from qtseg.cli import main
from qtseg.evaluation.evaluate import choose_splits, evaluate, image_rows, predict_batch, stratum_rows, threshold_rows
from qtseg.evaluation.figures import draw_gallery
from qtseg.evaluation.run_data import open_for, training_notes
from qtseg.evaluation.runs import evaluate_checkpoint, evaluate_run, find_checkpoints
from qtseg.evaluation.scores import (BINS, SCORES, SIZES, THRESHOLDS, Protocol, calibration_counts, calibration_error, constant_counts, score_image,
                                     class_probabilities, decide, lesion_counts, mask_scores, own_size_mask,
                                     surface_scores, threshold_counts, undo_resize)
from qtseg.evaluation.tables import FILES, aligned, markdown, replaced_results, require_replaceable, table_rows, to_dict
from qtseg.evaluation.timing import multiply_adds, network_cost
from qtseg.evaluation.uncertainty import bootstrap_interval, bootstrap_means, sampling_units, student_quantile
from qtseg.prediction.predictor import Predictor
from qtseg.training.validation import class_frequencies
from qtseg.evaluation.metrics import MEASURES, confusion_counts, hard_masks
from qtseg.network.model import QTSeg
from qtseg.data.phantom_sets import write_prepared
from qtseg.training.config import TrainConfig
from qtseg.training.loop import fit, open_data
from qtseg.training.run_folder import split_table
from qtseg.training.validation import validate

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # inside MONAI
needs_monai = pytest.mark.skipif(evaluation_scores.importlib.util.find_spec("monai") is None, reason="MONAI, which computes hd95 and nsd, is not installed")


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
    result = evaluate(network, data, "all")
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
NAN, DIAGONAL = math.nan, math.hypot(6, 6)


@needs_monai
@pytest.mark.parametrize("prediction, target, expected", [
    (EMPTY, EMPTY, {"dice": 100, "iou": 100, "precision": 100, "recall": 100, "specificity": 100, "hd95": 0, "nsd": 100}),
    (EMPTY, SPOT, {"dice": 0, "iou": 0, "precision": NAN, "recall": 0, "specificity": 100, "hd95": DIAGONAL, "nsd": 0}),
    (SPOT, EMPTY, {"dice": 0, "iou": 0, "precision": 0, "recall": NAN, "specificity": 100 * 32 / 36, "hd95": DIAGONAL, "nsd": 0}),
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


@pytest.mark.parametrize("shape, classes", [((30, 40), 2), ((12, 5), 4)])
def test_a_missed_lesion_costs_the_images_diagonal(shape, classes):
    target = np.zeros(shape, np.uint8)
    target[1:3, 1:3] = 1
    nothing = np.zeros_like(target)
    for pair in ((nothing, target), (target, nothing)):
        scores = mask_scores(*pair, classes)[1][:, SCORES.index("hd95")]
        assert scores.tolist() == [math.hypot(*shape)] + [0.0] * (classes - 2)  # absent and not claimed: perfect


# ------------------------------------------------------------------------------------------------ lesions, one by one
def test_a_lesion_is_found_by_its_share_that_is_covered():
    """A stray pixel used to find it; now 10 % of its area must be covered, to the pixel."""
    target, prediction = np.zeros((2, 30, 30), bool)
    target[5:15, 5:12] = True  # 70 pixels
    for pixels in range(9):
        prediction[:] = False
        prediction[5, 5:5 + pixels] = True  # eight pixels, the last one beside it
        assert lesion_counts(prediction, target).tolist() == [1, int(pixels >= 7), int(pixels > 0), 0], pixels
    assert lesion_counts(prediction, target, overlap=7 / 70)[1] == 1 and lesion_counts(prediction, target, overlap=0.11)[1] == 0
    assert lesion_counts(target, target, overlap=1.0).tolist() == [1, 1, 1, 0]


def test_lesions_are_counted_one_by_one_and_may_touch_at_a_corner():
    target, prediction = np.zeros((2, 40, 40), bool)
    target[2:6, 2:6] = target[6, 6] = True  # one: 8 neighbors
    target[20:24, 2:6] = target[30:34, 20:24] = True  # two more
    prediction[2:6, 2:6] = prediction[20:24, 2:6] = prediction[30, 20] = True  # two found, one 6 % covered
    prediction[10, 30] = prediction[12, 32] = True  # two false alarms
    assert lesion_counts(prediction, target).tolist() == [3, 2, 5, 2]
    assert lesion_counts(prediction, target, overlap=1 / 16).tolist() == [3, 3, 5, 2]
    assert lesion_counts(target, np.zeros_like(target)).tolist() == [0, 0, 3, 3]
    assert lesion_counts(np.ones_like(target), target).tolist() == [3, 3, 1, 0]


@pytest.mark.parametrize("overlap", [0.0, -0.1, 1.5, NAN])
def test_impossible_overlaps_are_refused(overlap):
    with pytest.raises(ValueError, match="share of a lesion's area"):
        Protocol(lesion_overlap=overlap, surface=False)


# ------------------------------------------------------------------------------------------------ masks that look at no image
def test_constant_masks_are_counted_as_masks_are():
    rng = np.random.default_rng(4)
    target = rng.integers(0, 3, (14, 17)).astype(np.uint8)
    target[:, :4] = 255
    frequent = rng.integers(0, 3, (14, 17)).astype(np.uint8)
    counts = constant_counts(frequent, target, 3, ignore_index=255)
    expected = [mask_scores(mask, target, 3, surface=False, ignore_index=255)[0]
                for mask in (*(np.full_like(target, label) for label in range(3)), frequent)]
    np.testing.assert_array_equal(counts, expected)


# ------------------------------------------------------------------------------------------------ pixels that count nowhere
def test_scores_are_those_of_the_pixels_that_count():
    rng = np.random.default_rng(6)
    prediction, target = rng.integers(0, 3, (2, 20, 24)).astype(np.uint8)
    part = target.copy()
    part[:, 15:] = 255
    found, scores = mask_scores(prediction, part, 3, surface=False, ignore_index=255)
    counts, expected = mask_scores(prediction[:, :15], target[:, :15], 3, surface=False)
    np.testing.assert_array_equal(found, counts)
    np.testing.assert_array_equal(scores, expected)
    nothing = np.full_like(target, 255)
    assert np.isnan(mask_scores(prediction, nothing, 3, surface=False, ignore_index=255)[1]).all(), "no pixel counts: no score, not 100"
    with pytest.raises(ValueError, match="ignore_index=255"):
        mask_scores(prediction, part, 3, surface=False)


@needs_monai
def test_every_number_of_an_image_leaves_ignored_pixels_out():
    """An image of which the right part is ignored is scored as its left part, whatever the network says on the right."""
    rng = np.random.default_rng(7)
    soft = cv2.GaussianBlur(rng.random((32, 32)).astype(np.float32), (0, 0), 3)
    soft = (soft - soft.min()) / np.ptp(soft)
    maps = np.stack([1 - soft, soft], axis=2)
    target = (cv2.GaussianBlur(rng.random((32, 32)), (0, 0), 3) > 0.5).astype(np.uint8)
    target[:, 18:22] = 0  # background at the border of what is ignored: no region is cut
    maps[:, 18:] = (1, 0)
    part = target.copy()
    part[:, 20:] = 255
    loud = maps.copy()
    loud[:, 20:] = (0.02, 0.98)  # false alarms, were they counted
    even = np.full((32, 32, 2), 0.5, np.float32)
    quiet, ignored = (score_image(given, decide(given), true, true, "squash", Protocol(), even, ignore)
                      for given, true, ignore in ((maps[:, :], np.where(part == 255, 0, part), None), (loud, part, 255)))
    assert ignored.lesions.tolist() == quiet.lesions.tolist() and ignored.counts[..., :3].tolist() == quiet.counts[..., :3].tolist()
    assert ignored.counts.sum(axis=-1).tolist() == [[32 * 20]] * 2 and ignored.calibration[:, 0].sum() == 32 * 20
    assert (ignored.thresholds.sum(axis=2) == 32 * 20).all() and (ignored.constants.sum(axis=3) == 32 * 20).all()
    for name in ("dice", "iou", "recall", "precision", "hd95", "nsd"):
        assert ignored.scores[..., SCORES.index(name)] == pytest.approx(quiet.scores[..., SCORES.index(name)]), name


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
    monkeypatch.setitem(sys.modules, "monai", None)
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
def test_bootstrap_equals_drawing_patients_by_hand():
    values = np.random.default_rng(0).normal(80, 10, (12, 2))
    patients = ["a", "a", "a", "b", "b", "c", "", "", "d", "d", "d", "d"]
    means = bootstrap_means(values, patients=patients, draws=50, seed=7)
    units = [[0, 1, 2], [3, 4], [5], [6], [7], [8, 9, 10, 11]]
    rng = np.random.default_rng(7)
    for row in means:
        drawn = [image for unit in rng.integers(len(units), size=len(units)) for image in units[unit]]
        assert row == pytest.approx(values[drawn].mean(axis=0))
    assert (means == bootstrap_means(values, patients=patients, draws=50, seed=7)).all()


def test_bootstrap_equals_drawing_patients_within_strata_by_hand():
    values = np.random.default_rng(0).normal(80, 10, (10, 1))
    patients = ["a", "a", "b", "", "c", "c", "d", "e", "e", "f"]
    strata = ["x", "x", "x", "x", "y", "y", "y", "x", "y", "y"]  # "e" has images in both: joined with the largest stratum
    units = {"x": [[0, 1], [2], [3], [7, 8]], "y": [[4, 5], [6], [9]]}
    rng = np.random.default_rng(7)
    for row in bootstrap_means(values, strata, patients, draws=50, seed=7):
        drawn = [image for inside in units.values() for unit in rng.integers(len(inside), size=len(inside)) for image in inside[unit]]
        assert row == pytest.approx(values[drawn].mean(axis=0))


def test_strata_are_kept_and_are_no_patients():
    """Shared case 13: two strata drawn as two patients gave an interval from one stratum's mean to the other's."""
    rng = np.random.default_rng(0)
    dice = np.r_[rng.normal(92, 4, 60), rng.normal(72, 4, 40)]
    strata = ["benign"] * 60 + ["malignant"] * 40
    low, high = bootstrap_interval(bootstrap_means(dice, strata))
    draws = [np.r_[rng.choice(dice[:60], 60), rng.choice(dice[60:], 40)].mean() for _ in range(2000)]
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.1) and high - low < 2
    all_of_them = bootstrap_interval(bootstrap_means(dice))
    assert np.diff(all_of_them) > 2 * (high - low), "the strata's shares are no matter of chance"


@pytest.mark.parametrize("strata, patients, strata_of_units", [
    (["x", "x", "y", "y"], None, [0, 0, 1, 1]),
    (["x", "y", "x", "y", "x", "y"], ["a", "a", "b", "b", "c", "c"], [0, 0, 0]),  # every patient in both
    (["x", "y", "z"], None, [0, 0, 0]),  # a stratum of one is no stratum: all joined
    (["x", "x", "x", "y"], None, [0, 0, 0, 0]),
    (["x", "x", "y", "y", "z", "w"], None, [1, 1, 2, 2, 0, 0]),
    (["", "", "x", "x"], None, [0, 0, 1, 1]),
])
def test_strata_of_units(strata, patients, strata_of_units):
    units = sampling_units(len(strata), strata, patients)
    assert units.stratum.tolist() == strata_of_units and units.name == ("patients" if patients else "images")
    means = bootstrap_means(np.arange(float(len(strata))), strata, patients, draws=200)
    assert means.std() > 0, "something is drawn"


def simulated(seed: int, strata: bool, sets: int = 500) -> tuple[np.ndarray, list[str] | None, list[str], float]:
    """Dice of 40 patients with 1 to 8 images each, [images, sets], strata, patients and the true mean; skewed as Dice scores are."""
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 9, 40)
    who, hard = np.repeat(np.arange(40), images), np.arange(40) >= (24 if strata else 40)  # 16 patients of a harder kind

    def scores(patients, count):
        effect = (2.0 - hard)[patients, None]
        patient, noise = rng.normal(0, 0.9, (40, count))[patients], rng.normal(0, 0.7, (len(patients), count))
        return 100 / (1 + np.exp(-(effect + patient + noise)))

    means = scores(np.arange(40), 20_000).mean(axis=1)  # of each patient's population
    truth = (means[~hard].mean() * images[~hard].sum() + (means[hard].mean() if hard.any() else 0) * images[hard].sum()) / images.sum()
    names = [f"patient {number}" for number in who]
    return scores(who, sets), ["hard" if hard[number] else "easy" for number in who] if strata else None, names, truth


@pytest.mark.parametrize("strata", [False, True], ids=["one stratum", "two strata"])
def test_the_interval_covers_the_truth_about_19_times_in_20(strata):
    covered = {"widened": [], "plain": [], "images": []}
    for seed in range(4):
        values, kinds, patients, truth = simulated(seed, strata)
        draws = bootstrap_means(values, kinds, patients, draws=1000)
        for name, means, units in (("widened", draws, sampling_units(len(values), kinds, patients)), ("plain", draws, None),
                                   ("images", bootstrap_means(values, kinds, draws=1000), None)):
            low, high = bootstrap_interval(means, units=units)
            covered[name].append(100 * ((low <= truth) & (truth <= high)).mean())
    assert all(93 <= share <= 97 for share in covered["widened"]), covered["widened"]  # on average 93.9, with strata 95.4
    assert np.mean(covered["plain"]) < np.mean(covered["widened"]) and np.mean(covered["images"]) < 80


def test_student_quantiles():
    for degrees, quantile in ((3, 3.1824), (5, 2.5706), (10, 2.2281), (39, 2.0227), (1e6, 1.96)):
        assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=0.012)


def test_images_of_one_patient_widen_the_interval():
    rng = np.random.default_rng(4)
    values = (rng.normal(80, 10, (20, 1)) + rng.normal(0, 1, (20, 10))).reshape(200, 1)  # 20 patients, 10 images each
    patients = [f"patient {index // 10}" for index in range(200)]
    width = {name: np.diff(bootstrap_interval(bootstrap_means(values, patients=chosen, draws=500)), axis=0).item()
             for name, chosen in {"patients": patients, "images": None}.items()}
    assert width["patients"] > 2.5 * width["images"]


def test_undefined_scores_are_left_out_and_one_unit_gives_no_interval():
    values = np.array([[80.0, NAN], [90.0, NAN], [NAN, NAN]])
    means = bootstrap_means(values, draws=300)
    for units in (None, sampling_units(3)):
        interval = bootstrap_interval(means, units=units)
        assert 80 <= interval[0, 0] <= interval[1, 0] <= 90 and np.isnan(interval[:, 1]).all()
    for one in (bootstrap_means(values[:1], draws=10), bootstrap_means(values, patients=["p", "p", "p"], draws=10)):
        assert np.isnan(bootstrap_interval(one, units=sampling_units(1))).all(), "one patient says nothing about others"


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
    monkeypatch.setattr(evaluation_timing, "interleaved_times", lambda jobs, *arguments, **options: {name: [1.0] for name in jobs})


QUICK = dict(surface=False, draws=50)


def test_training_size_equals_trainings_own_evaluation(endoscopy):
    network = Guess(3)
    result = evaluate(network, endoscopy, "train", Protocol(**QUICK), batch=3)
    expected = validate(network, endoscopy.train, 3)
    summary = result.summary["training"]
    for measure in MEASURES:
        assert summary["mean"][measure]["mean"] == pytest.approx(expected[measure], abs=1e-9)
        for label, name in enumerate(endoscopy.class_names[1:], start=1):
            assert summary[name][measure]["mean"] == pytest.approx(expected[f"{measure}_{label}"], abs=1e-9)


def test_rows_strata_and_counts_of_three_classes(endoscopy):
    result = evaluate(Guess(3), endoscopy, "all", Protocol(**QUICK), batch=5)
    rows = list(image_rows(result))
    assert len(rows) == 16 * 2 * 2 and [row["size"] for row in rows[:2]] == list(SIZES)
    assert {(row["height"], row["width"]) for row in rows if row["size"] == "own"} == {(96, 96)}
    assert {(row["height"], row["width"]) for row in rows if row["size"] == "training"} == {(64, 64)}
    for row in rows:
        tp = row["dice"] / 200 * (row["target_pixels"] + row["predicted_pixels"])
        assert row["target_pixels"] == 0 or row["recall"] == pytest.approx(100 * tp / row["target_pixels"])
    own = [row for row in rows if row["size"] == "own"]
    for key in ("lesions", "missed", "regions", "false_alarms"):
        assert result.missed["own"][key] == sum(row[key] for row in own), key
    assert result.missed["own"]["marked"] == sum(row["target_pixels"] == 0 < row["predicted_pixels"] for row in own)
    assert all((row["lesions"] > 0) == (row["target_pixels"] > 0) for row in rows) and result.missed["own"]["lesions"] > 0
    strata = stratum_rows(result)
    assert [(row["size"], row["stratum"], row["images"]) for row in strata] == [(size, "endoscopy", 16) for size in SIZES]
    assert strata[1]["dice"] == pytest.approx(result.summary["own"]["mean"]["dice"]["mean"])
    assert threshold_rows(result)[9]["threshold"] == 0.5 and len(threshold_rows(result)) == len(THRESHOLDS)
    json.dumps(to_dict(result), allow_nan=False)


def test_threshold_is_used_at_both_sizes(run):
    data = open_for(run / "best_dice")
    network = QTSeg.from_pretrained(run / "best_dice")
    bold, shy = (evaluate(network, data, "all", Protocol(threshold=threshold, **QUICK)) for threshold in (0.05, 0.95))
    for size in range(2):
        predicted = [(result.counts[size, ..., 0] + result.counts[size, ..., 1]).sum() for result in (bold, shy)]
        assert predicted[0] > predicted[1]
    sweep = {row["threshold"]: row["dice"] for row in threshold_rows(bold)}
    assert sweep[0.05] == pytest.approx(bold.summary["training"]["mean"]["dice"]["mean"])


def test_evaluation_with_flips_scores_what_prediction_with_flips_makes(run):
    data, network = open_for(run / "best_dice"), QTSeg.from_pretrained(run / "best_dice")
    plain, flipped = (evaluate(network, data, "all", Protocol(tta=tta, **QUICK)) for tta in (False, True))
    assert (plain.counts != flipped.counts).any() and to_dict(flipped)["protocol"]["tta"]
    predictor = Predictor(run / "best_dice", device="cpu", tta=True)
    _, splits = choose_splits(data, "all")
    paths = [image for split in splits for image, _ in split.paths]
    for place in (0, 7):
        tp, fp, *_ = flipped.counts[1, place, 0]
        assert (predictor(paths[place]) > 0).sum() == tp + fp


def test_batch_size_order_and_mode_do_not_matter(endoscopy):
    network = Guess(3).train()
    one, many = (evaluate(network, endoscopy, "train", Protocol(**QUICK), batch=batch) for batch in (1, 16))
    assert network.training and one.ids == many.ids == endoscopy.train.ids
    np.testing.assert_array_equal(one.counts, many.counts)


def test_impossible_requests_are_refused_before_anything_is_read(tmp_path):
    for wrong, sentence in (({"batch": 0}, "batch must be at least 1, got 0"), ({"sizes": [64, 8]}, "from 32 to 4096, got 8")):
        for function in (evaluate_run, evaluate_checkpoint):
            with pytest.raises(ValueError, match=sentence):
                function(tmp_path / "nowhere", **wrong)


def test_splits(endoscopy):
    assert choose_splits(endoscopy) == ("test", [endoscopy.test]) and choose_splits(endoscopy, "valid")[1] == [endoscopy.valid]
    with pytest.raises(ValueError, match="one of test"):
        choose_splits(endoscopy, "validation")


def test_the_best_constant_mask_stands_in_every_table(endoscopy):
    result = evaluate(Guess(3), endoscopy, "test", Protocol(**QUICK))
    majority = decide(class_frequencies([endoscopy.train], 3))
    training = [split.batch(range(len(split))).masks.numpy() for split in (endoscopy.train, endoscopy.test)]
    np.testing.assert_array_equal(majority, (training[0][..., None] == np.arange(3)).sum(axis=0).argmax(axis=2))
    dice = [np.mean([mask_scores(mask, target, 3, surface=False)[1][:, SCORES.index("dice")].mean() for target in training[1]])
            for mask in (*(np.full((64, 64), label, np.uint8) for label in range(3)), majority)]
    found = result.constant
    names = ["all background", *(f"all {name}" for name in endoscopy.class_names[1:]), "each pixel's most frequent class in the training split"]
    assert found["scores"]["training"]["dice"] == pytest.approx(dice[names.index(found["mask"])])
    assert found["scores"]["training"]["dice"] >= max(dice) - 1, "the best one, chosen at own size"
    table = {row[0]: row[1:] for row in table_rows({"guess": result})}
    assert table["best constant mask: Dice, %"] == [f"{found['scores'][size]['dice']:.2f}" for size in SIZES]
    assert to_dict(result)["constant"] == found


def test_logits_that_are_not_finite_are_refused(run, tmp_path, endoscopy):
    class Diverged(nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 3, *images.shape[2:])
            logits[-1, 1, 3, 4] = self.value
            return logits

    for value in (NAN, math.inf, -math.inf):
        network = Diverged()
        network.value = value
        with pytest.raises(FloatingPointError, match="not finite"):
            predict_batch(network, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        with pytest.raises(FloatingPointError, match="not finite"):
            evaluate(network, endoscopy, "test", Protocol(**QUICK))


def test_a_checkpoint_whose_logits_overflow_is_named(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluation_*"))
    network = QTSeg.from_pretrained(copy / "best_dice")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e30)  # finite, and still too much for float32
    network.save_pretrained(copy / "best_dice")
    assert main(["evaluate", str(copy / "best_dice"), *FAST]) == 1
    error = capsys.readouterr().err
    assert "best_dice: the network returns logits that are not finite" in error and error.count("\n") == 1
    assert not (copy / "best_dice" / "evaluation_test").exists()


def test_gallery_has_nine_pictures_or_as_many_as_there_are(endoscopy):
    network = Guess(3)
    for split, count in (("all", 9), ("valid", 3 * min(3, len(endoscopy.valid)))):
        figure = draw_gallery(evaluate(network, endoscopy, split, Protocol(**QUICK)), network, endoscopy)
        assert len(figure.axes) == count and all(len(axes.images) == 1 for axes in figure.axes)


def test_cost_counts_what_the_model_chapter_counts():
    assert multiply_adds(QTSeg(), 512) == pytest.approx(2.256e9, rel=1e-3)
    for channels in (1, 4):  # as many as the network was built for
        network = QTSeg(width=4, depths=[1, 1, 1], mlp_width=32, in_channels=channels)
        assert multiply_adds(network, 32) > 0 and network_cost(network, 32, batch=1, budget=0)["parameters"] > 0
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
    assert files == set(FILES)
    stored = json.loads((result.folder / "evaluation.json").read_text())
    assert stored["files"] == sorted(FILES) and stored["protocol"]["lesion_overlap"] == 0.1 and "diagonal" in stored["undefined_hd95"]
    assert stored["notes"] and set(result.notes) >= set(open_for(run / "best_dice").notes)
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
    write = evaluation_tables.write_evaluation

    def full_disk(*arguments):
        write(*arguments)
        raise OSError("no space left")

    monkeypatch.setattr(evaluation_runs, "write_evaluation", full_disk)
    with pytest.raises(OSError, match="no space"):
        again(split="valid")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    monkeypatch.setattr(evaluation_runs, "write_evaluation", write)
    again(split="valid")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["split"] == "valid"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------ what is replaced, and what stays
def results(folder: Path, *names: str) -> None:
    """Write a result of some files into a folder."""
    with replaced_results(folder, "marker.json") as private:
        for name in (*names, "marker.json"):
            (private / name).write_text(json.dumps({"made of": names}))


def test_only_files_of_the_earlier_result_are_replaced(tmp_path):
    """A user's notes and folder beside the results were deleted."""
    out = tmp_path / "out"
    results(out, "a.csv", "b.png")
    (out / "notes.txt").write_text("mine")
    (out / "drafts").mkdir()
    (out / "drafts" / "b.png").write_text("mine, too")
    results(out, "b.png", "c.csv")
    assert sorted(path.name for path in out.iterdir()) == ["b.png", "c.csv", "drafts", "marker.json", "notes.txt"]
    assert (out / "notes.txt").read_text() == "mine" and (out / "drafts" / "b.png").read_text() == "mine, too"
    assert json.loads((out / "marker.json").read_text()) == {"made of": ["b.png", "c.csv"], "files": ["b.png", "c.csv", "marker.json"]}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("content", ["mine", None], ids=["file", "folder"])
def test_a_file_that_no_result_lists_is_not_overwritten(content, tmp_path):
    out = tmp_path / "out"
    results(out, "a.csv")
    (out / "b.png").write_text(content) if content else (out / "b.png").mkdir()
    before = {path.name: path.is_file() and path.read_text() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="b.png, which its marker.json does not list"):
        results(out, "a.csv", "b.png")
    assert {path.name: path.is_file() and path.read_text() for path in out.iterdir()} == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("files", [["../thesis.txt", "a.csv"], [["a.csv"], 7, "drafts"], "thesis.txt", {"a.csv": 1}])
def test_a_forged_list_reaches_no_other_file(files, tmp_path):
    out = tmp_path / "out"
    results(out, "a.csv")
    (out / "drafts").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    (out / "marker.json").write_text(json.dumps({"files": files}))
    if "a.csv" not in files or not isinstance(files, list):
        with pytest.raises(FileExistsError, match="a.csv"):
            results(out, "a.csv")
    results(out, "c.csv")
    assert (tmp_path / "thesis.txt").read_text() == "mine" and (out / "drafts").is_dir()


def test_a_damaged_marker_is_replaced_and_nothing_else(tmp_path):
    results(tmp_path, "a.csv")
    (tmp_path / "marker.json").write_text("[" * 100_000)
    with pytest.raises(FileExistsError, match="a.csv"):
        require_replaceable(tmp_path, "marker.json", ["a.csv"])
    results(tmp_path, "b.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "marker.json"]


def test_evaluating_twice_leaves_notes_alone(run, tmp_path, no_stopwatch):
    out = tmp_path / "out"
    for _ in range(2):
        evaluate_checkpoint(run / "best_dice", output=out, protocol=Protocol(**QUICK), device="cpu", pictures=False)
        (out / "notes.txt").write_text("mine")
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "images.csv", "strata.csv", "notes.txt"}
    (out / "gallery.png").write_text("mine: none was written, without pictures")
    with pytest.raises(FileExistsError, match="gallery.png"):
        evaluate_checkpoint(run / "best_dice", output=out, protocol=Protocol(**QUICK), device="cpu")
    assert (out / "gallery.png").read_text().startswith("mine")


# ------------------------------------------------------------------------------------------------ which data, split how
def pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """images/ and masks/ without splits: ellipses in 40x40 pixels."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        mask = cv2.ellipse(np.zeros((40, 40), np.uint8), (20, 20), (6 + number % 7, 9), 10 * number, 0, 360, 255, -1)
        image = (rng.integers(120, 256, (40, 40, 3)) - mask[..., None] // 3).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")
    return folder


@pytest.fixture
def trained(run, tmp_path, monkeypatch):
    """A function: a run folder with a recipe of its own, on 30 pictures without splits. Only its weights are from another run."""
    monkeypatch.setenv("QTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    data = pictures(tmp_path / "d", 30)
    config = json.loads((run / "config.json").read_text()) | {"data": str(data), "cache": None}

    def make(**recipe) -> Path:
        folder = tmp_path / "runs" / f"run{len(list(tmp_path.glob('runs/*')))}"
        shutil.copytree(run / "best_dice", folder / "best_dice", ignore=shutil.ignore_patterns("evaluation_*"))
        opened = open_data(TrainConfig.from_dict(config | recipe))
        splits = {"folder": str(opened.folder), "ignored": opened.ignore_index is not None, **split_table(opened)}
        (folder / "splits.json").write_text(json.dumps(splits))
        (folder / "config.json").write_text(json.dumps(config | recipe))
        return folder

    return make


RECIPES = {"seed": {"seed": 5}, "fold": {"folds": 3, "fold": 2}, "share": {"valid_share": 0.3}}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_runs_own_data_is_split_as_the_run_split_it(recipe, trained, tmp_path):
    """Shared case 11: --data with the run's folder scored images that had trained the network."""
    folder = trained(**RECIPES[recipe])
    own = open_for(folder / "best_dice")
    shutil.copytree("d", "copy")
    for source in ("d", tmp_path / "d", tmp_path / "copy" / ".." / "d", "copy"):
        named = open_for(folder, source)  # a run is accepted where a checkpoint is
        assert named.valid.ids == own.valid.ids and named.train.ids == own.train.ids
        assert any("split as there" in note for note in named.notes)
    assert not training_notes(folder / "best_dice", [own.valid])


def test_what_is_asked_for_goes_before_the_run(trained):
    folder = trained(folds=3, fold=2)
    assert open_for(folder, "d", fold=0).valid.ids == open_for(trained(folds=3, fold=0)).valid.ids
    assert len(open_for(folder, "d", folds=5).valid) == 6
    warned = training_notes(folder / "best_dice", [open_for(folder, fold=0).valid])
    assert warned and warned[0].startswith("WARNING: 10 of the 10 scored images trained this network (00.png")


def test_paths_survive_another_working_folder(trained, tmp_path, monkeypatch):
    folder = trained(data="d", seed=5)
    expected = open_for(folder).valid.ids
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pictures(tmp_path / "elsewhere" / "d", 12, seed=9)  # another set of that name, which is not the run's
    assert open_for(folder).valid.ids == expected and open_for("../runs/run0").valid.ids == expected


def test_moved_data_is_known_by_its_content_and_no_other(trained, tmp_path):
    folder = trained(seed=5)
    expected = open_for(folder).valid.ids
    (tmp_path / "disk").mkdir()
    (tmp_path / "d").rename(tmp_path / "disk" / "e")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_for(folder)
    assert open_for(folder, "disk/e").valid.ids == expected
    pictures(tmp_path / "other" / "d", 30, seed=9)  # another hospital: same names, sizes and numbers
    data = open_for(folder, "other/d")
    assert len(data.train) == 30 and "every image is scored" in data.notes[-1]
    warned = training_notes(folder / "best_dice", [data.train])
    assert len(warned) == 1 and warned[0].startswith("WARNING: 27 of the 30 scored images have the name and the size of images that trained")


def test_a_folder_that_has_grown_or_shrunk_keeps_the_runs_split(trained, tmp_path):
    """The split was drawn anew from what was there now, and images that had trained were scored without a word."""
    folder = trained(seed=5)
    before = open_for(folder)
    more = pictures(tmp_path / "more", 10, seed=8)
    for kind in ("images", "masks"):
        for path in (more / kind).iterdir():
            shutil.copy(path, tmp_path / "d" / kind / f"a{path.name}")
        for name in before.train.ids[:2]:
            (tmp_path / "d" / kind / f"{name}.png").unlink()
    shutil.copytree("d", "copy")
    for source in (None, "d"):
        now = open_for(folder, source)
        assert now.valid.ids == before.valid.ids and now.train.ids == before.train.ids[2:] and "split as there" in now.notes[-2]
        assert now.notes[-1].endswith("since the run: 10 images are new and in no split of it, 2 of its images are gone")
        assert not training_notes(folder / "best_dice", [now.valid])
    assert "every image is scored" in open_for(folder, "copy").notes[-1], "a part of the run's images among others is other data"


def test_images_saved_anew_keep_their_split_in_the_runs_folder(trained, tmp_path):
    folder = trained(seed=5)
    before = open_for(folder)
    shutil.copytree("d", "copy")
    for path in (tmp_path / "d" / "images").iterdir():
        Image.open(path).save(path, compress_level=0)
    now = open_for(folder, "d")
    assert now.valid.ids == before.valid.ids and now.notes[-1].endswith("the run: 30 of its images have another content")
    shutil.rmtree("d")
    pictures(tmp_path / "d", 4, seed=3)
    for path in (tmp_path / "d" / "images").iterdir():
        path.rename(path.with_name(f"b{path.name}"))
        (tmp_path / "d" / "masks" / path.name).rename(tmp_path / "d" / "masks" / f"b{path.name}")
    with pytest.raises(ValueError, match="holds none of the images of the run"):
        open_for(folder)


def test_a_test_set_of_one_image_is_scored(trained, tmp_path, no_stopwatch):
    one = pictures(tmp_path / "one", 1, seed=4)
    result = evaluate_checkpoint(trained(), one, tmp_path / "out", protocol=Protocol(**QUICK), device="cpu", pictures=False)
    assert result.split == "all" and result.ids == ["00"]


def test_a_checkpoint_behind_a_link_has_its_run_and_a_copy_has_none(trained, tmp_path):
    folder = trained(seed=5)
    (tmp_path / "link").symlink_to(folder / "best_dice")
    shutil.copytree(folder / "best_dice", tmp_path / "alone" / "copied")
    assert open_for("link", "d").valid.ids == open_for(folder).valid.ids
    assert not training_notes(tmp_path / "link", [open_for(folder).valid])
    data = open_for("alone/copied", "d")
    assert len(data.train) == 30
    assert training_notes(tmp_path / "alone" / "copied", [data.train]) == [
        "this checkpoint lies in no run: whether the images scored here trained it was not checked"]


def test_a_run_of_an_earlier_version_is_split_by_its_recipe_and_not_checked(trained):
    folder = trained(seed=5)
    expected = open_for(folder).valid.ids
    (folder / "splits.json").unlink()
    for source in (None, "d"):
        assert open_for(folder, source).valid.ids == expected
    assert "not checked" in training_notes(folder / "best_dice", [open_for(folder).valid])[0]


def recolored(folder: Path, values: dict[int, int], ignored: int | None = None) -> Path:
    """Other values in the masks; those of the first row, all of it, `ignored`."""
    for path in (folder / "masks").iterdir():
        old = np.array(Image.open(path))
        new = np.zeros_like(old)
        for value, other in values.items():
            new[old == value] = other
        if ignored is not None:
            new[0] = ignored
        Image.fromarray(new).save(path)
    return folder


@pytest.mark.parametrize("said", [255, None], ids=["said", "found"])
def test_other_data_is_read_as_the_run_read_its_masks(said, trained, tmp_path):
    """255 was ignored in the run; in healthy images that hold 0 and 255 only, it became the lesion."""
    recolored(tmp_path / "d", {255: 1}, ignored=255)
    folder = trained(ignore_value=said)
    healthy = recolored(pictures(tmp_path / "healthy", 6, seed=2), {}, ignored=255)
    data = open_for(folder, healthy)
    assert data.ignore_index == 255 and set(np.unique(data.train.original_mask(0))) == {0, 255}
    assert any("masks are read as in the run (ignore_value 255)" in note for note in data.notes)
    asked = open_for(folder, healthy, masks="binary")
    assert asked.ignore_index is None and set(np.unique(asked.train.original_mask(0))) == {0, 1}


def test_mask_values_of_the_run_and_of_the_command(run, trained, tmp_path, no_stopwatch, capsys):
    recolored(tmp_path / "d", {255: 120})
    folder, odd = trained(mask_values=[0, 120]), recolored(pictures(tmp_path / "odd", 6, seed=2), {255: 120})
    assert set(np.unique(open_for(folder, odd).train.original_mask(0))) == {0, 1}
    other = recolored(pictures(tmp_path / "other", 6, seed=2), {255: 7}, ignored=9)
    arguments = [str(folder), "--data", str(other), "--mask-values", "0,7", "--ignore-value", "9", "--output", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, *FAST]) == 0 and "6 images (all split)" in capsys.readouterr().out
    assert main(["evaluate", *arguments, "--mask-values", "0,x"]) == 2
    assert "'x' is neither a whole number nor a color" in capsys.readouterr().err


def test_other_data_gets_the_white_of_the_checkpoint(trained, tmp_path):
    """Each set had its own white: a 12-bit network saw a set that uses 10 bits four times as bright."""
    folder, dark = trained(), pictures(tmp_path / "dark", 4, seed=2)
    for path in (dark / "images").iterdir():
        Image.fromarray((np.array(Image.open(path))[..., 0].astype(np.uint16) * 4)).save(path)
    path = folder / "best_dice" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"white": 4095}))
    data = open_for(folder, dark)
    assert data.white == 4095 and data.train.batch([0]).images.max() < 70
    with pytest.raises(ValueError, match="prepared as"):
        evaluate_checkpoint(folder, SegmentationData.open(dark, size=32, progress=False), tmp_path / "out")


def test_nothing_to_score_is_one_sentence(trained, tmp_path):
    void = recolored(pictures(tmp_path / "void", 3), {0: 255, 255: 255}, ignored=255)
    with pytest.raises(ValueError, match="every pixel of every image scored in .*void is ignored"):
        evaluate_checkpoint(trained(ignore_value=255), void, tmp_path / "out", device="cpu", protocol=Protocol(**QUICK))
    assert not (tmp_path / "out").exists()


def test_a_damaged_run_does_not_stand_in_the_way_of_named_data(trained, tmp_path):
    folder = trained()
    for damage in (deep_config, huge_number):
        damage(folder)
        data = open_for(folder / "best_dice", "d")
        notes = training_notes(folder / "best_dice", [data.train])
        assert len(data.train) == 30 and notes[0].startswith("WARNING: 27 of the 30 scored images trained"), "splits.json is whole"
    (folder / "splits.json").write_text('{"train": [["a", 1]]}')
    assert "not checked" in training_notes(folder / "best_dice", [data.train])[0]


def test_a_set_without_splits_is_a_test_set_whole_and_known_images_are_counted(trained, tmp_path, no_stopwatch, capsys):
    folder = trained(seed=5)
    other = pictures(tmp_path / "other", 8, seed=3)
    known = [path for path, _ in open_for(folder).train.paths[:4]]
    for number, path in enumerate(known):  # copies of training images under other names
        shutil.copy(path, other / "images" / f"new{number}.png")
        shutil.copy(path.parents[1] / "masks" / path.name, other / "masks" / f"new{number}.png")
    result = evaluate_checkpoint(folder, other, tmp_path / "out", protocol=Protocol(**QUICK), device="cpu", pictures=False)
    assert result.split == "all" and len(result.ids) == 12 and not any("held out" in note for note in result.notes)
    warning = "WARNING: 4 of the 12 scored images trained this network (new0.png, new1.png, new2.png, new3.png)"
    assert any(note.startswith(warning) for note in json.loads((tmp_path / "out" / "evaluation.json").read_text())["notes"])
    assert main(["evaluate", str(folder), "--data", str(other), "--output", str(tmp_path / "out"), *FAST]) == 0
    output = capsys.readouterr().out
    assert warning in output and "12 images (all split)" in output
    assert main(["evaluate", str(folder), "--data", str(other), "--folds", "3", "--output", str(tmp_path / "folds"), *FAST]) == 0
    assert "4 images (valid split)" in capsys.readouterr().out, "folds that are asked for make a split"


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
    assert main(["evaluate", str(run), "--output", str(tmp_path / "out"), *FAST]) == 0
    output = capsys.readouterr().out
    found = find_checkpoints(run)
    head = next(line for line in output.splitlines() if " at own size" in line)
    assert all(f"{checkpoint.name} at 32x32" in head and f"{checkpoint.name} at own size" in head for checkpoint in found)
    assert output.count("\nDice, %") == 1 and "missed lesions (under 10% of the area covered)" in output and "pip install monai" in output
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


def deep_config(run: Path) -> None:
    (run / "config.json").write_text('{"data": ' + "[" * 100_000)


def huge_number(run: Path) -> None:
    (run / "config.json").write_text('{"seed": ' + "9" * 5000 + "}")


WRONG = {
    "no such folder": (None, ["{run}/nothing"], "nothing is no folder"),
    "no checkpoint": (None, ["{empty}"], "holds no checkpoint"),
    "truncated weights": (truncate, ["{run}/best_dice"], "truncated"),
    "damaged preprocessing": (tamper, ["{run}/best_dice"], "does not say how images are prepared"),
    "names that do not fit": (other_names, ["{run}/best_dice"], "the network has 2 classes, preprocessing names 3"),
    "in no run": (take_the_run_away, ["{run}/best_dice"], "name the data"),
    "the run's data is gone": (move_the_data, ["{run}/best_dice"], "nowhere/at/all does not exist"),
    "no such data": (None, ["{run}/best_dice", "--data", "{run}/nothing"], "does not exist"),
    "other classes": (None, ["{run}/best_dice", "--data", "phantoms:endoscopy:8"], "tells 2 classes apart"),
    "another folder's output": (foreign_folder, ["{run}/best_dice"], "holds no evaluation.json"),
    "impossible threshold": (None, ["{run}/best_dice", "--threshold", "1.5"], "between 0 and 1"),
    "impossible device": (None, ["{run}/best_dice", "--device", "abacus"], "abacus"),
    "empty batches": (None, ["{run}/best_dice", "--batch", "0"], "batch must be at least 1"),
    "no number": (None, ["{run}/best_dice", "--threshold", "nan"], "between 0 and 1"),
    "a device without values": (None, ["{run}/best_dice", "--device", "meta"], "meta"),
    "negative sizes": (None, ["{run}/best_dice", "--sizes", "64", "-5"], "from 32 to 4096, got -5"),
    "no size": (None, ["{run}/best_dice", "--sizes", "0"], "from 32 to 4096, got 0"),
    "impossible overlap": (None, ["{run}/best_dice", "--lesion-overlap", "10"], "share of a lesion's area"),
    "a deep configuration": (deep_config, ["{run}/best_dice"], "name the data to evaluate on"),
    "a number of 5000 digits": (huge_number, ["{run}/best_dice"], "name the data to evaluate on"),
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
    assert main(["evaluate", *(argument.format(run=copy, empty=tmp_path / "empty") for argument in arguments), *FAST[:-2], *device]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("qtseg evaluate: ") and complaint in captured.err and len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err and sorted(path.relative_to(copy) for path in copy.rglob("*")) == before


@pytest.mark.parametrize("arguments", [[], ["run", "--split", "exam"], ["run", "--batch", "many"]])
def test_command_answers_wrong_usage_with_2(arguments, capsys):
    assert main(["evaluate", *arguments]) == 2 and "Usage: qtseg evaluate" in capsys.readouterr().err


def test_table_says_how_many_scores_are_defined(endoscopy):
    result = evaluate(Guess(3), endoscopy, "all", Protocol(**QUICK))
    table = {row[0]: row[1:] for row in table_rows({"guess": result})}
    undefined = int(np.isnan(result.scores[1, ..., SCORES.index("recall")]).sum())
    assert undefined > 0 and table["recall, %"][1].endswith(f", {32 - undefined} of 32")
    assert table["Dice, %"][1].count("of") == 0 and list(itertools.islice(table, 1)) == [""]


# ------------------------------------------------------------------------------------------------ names are text
SCRIPT = "<img src=x onerror=alert(1)>"


def test_names_stay_text_in_tables():
    rows = [["", SCRIPT], ["a|b", "[link](javascript:alert(1))"]]
    table = markdown(rows)
    assert "<" not in table and "](" not in table and table.count("\n") == 2 and all(line.count("|") == 3 for line in table.split("\n"))
    assert "\x1b" not in aligned([["a\x1b[31m", "b"]]) and aligned([["a", "bbb"], ["cc", "d"]]) == "a   bbb\ncc  d"


def test_formulas_in_names_stay_text_in_csv(endoscopy, tmp_path):
    result = evaluate(Guess(3), endoscopy, "test", Protocol(**QUICK))
    result.ids[0], result.strata[0], result.patients[0] = "=1+1", "@SUM(A1)", "+patient\x1b"
    evaluation_tables.write_evaluation(result, tmp_path, {})
    with (tmp_path / "images.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["id"], first["stratum"]) == ("'=1+1", "'@SUM(A1)") and first["patient"].startswith("'+patient") and "\x1b" not in first["patient"]
    assert float(first["dice"]) >= 0 and "'@SUM(A1)" in (tmp_path / "strata.csv").read_text()
