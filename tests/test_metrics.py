"""Lesson 12, metrics: the official code's numbers, an independent computation, invariances and refusals."""
from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch

from qtseg.evaluation.metrics import SegmentationMetrics, confusion_counts, hard_masks, scores_in_percent

NAMES = ("mae", "acc", "dice", "iou")
# Printed by the official code, release v0.1.0, in float32 (legacy); the honest ones by an independent computation in float64.
SIX_LEGACY = {
    "partial_overlap": (16.666667938, 83.333328247, 68.627456665, 52.238803864),
    "perfect": (0.0, 100.0, 100.0, 100.0),
    "both_empty": (0.0, 100.0, 100.0, 100.0),
    "false_positive_only": (4.6875, 95.318595886, 5.263157845, 2.702702761),
    "missed_entirely": (4.6875, 95.318595886, 5.263157845, 2.702702761),
    "disjoint": (13.020833015, 86.996093750, 1.960784435, 0.990099013),
}
SIX_LEGACY_MEAN = (6.510416508, 93.494430542, 46.852424622, 43.105720520)
SIX_HONEST_MEAN = (6.510416667, 93.4896, 44.7712, 42.0398)
MULTICLASS_LEGACY = {
    "mae_1": 42.740886688, "acc_1": 57.270206451, "dice_1": 25.371545792, "iou_1": 15.267302513,
    "mae_2": 40.722656250, "acc_2": 59.287971497, "dice_2": 24.045894623, "iou_2": 14.282367706,
    "mae": 41.731773376, "acc": 58.279090881, "dice": 24.708721161, "iou": 14.774835587,
}
MULTICLASS_HONEST = {
    "mae_1": 42.740885417, "acc_1": 57.259114583, "dice_1": 25.182151943, "iou_1": 15.172243831,
    "mae_2": 40.722656250, "acc_2": 59.277343750, "dice_2": 23.848266623, "iou_2": 14.183161616,
    "mae": 41.731770833, "acc": 58.268229167, "dice": 24.515209283, "iou": 14.677702724,
}


def rectangle(top=0, bottom=0, left=0, right=0):
    mask = torch.zeros(24, 32, dtype=torch.int64)
    mask[top:bottom, left:right] = 1
    return mask


EMPTY, LARGE, SMALL = rectangle(), rectangle(4, 16, 4, 20), rectangle(2, 8, 2, 8)
CASES = {
    "partial_overlap": (rectangle(6, 18, 6, 24), LARGE), "perfect": (LARGE, LARGE), "both_empty": (EMPTY, EMPTY),
    "false_positive_only": (SMALL, EMPTY), "missed_entirely": (EMPTY, SMALL), "disjoint": (rectangle(12, 20, 12, 20), SMALL),
}


def as_logits(masks, classes):
    """Logits [B, classes, H, W] that decide for the masks."""
    if classes == 1:
        return (masks.float() * 6 - 3).unsqueeze(1)
    return torch.stack([(masks == label).float() * 6 - 3 for label in range(classes)], dim=1)


def brute_force(masks, target, classes, legacy=False):
    """[images, foreground classes, 4] by Python sets, nothing shared with the module."""
    rows = []
    for mask, true in zip(masks.tolist(), target.tolist()):
        pixels = {(y, x) for y in range(len(true)) for x in range(len(true[0]))}
        row = []
        for label in range(1, max(classes, 2)):
            found = {(y, x) for y, x in pixels if mask[y][x] == label}
            lesion = {(y, x) for y, x in pixels if true[y][x] == label}
            hit, false, missed = len(found & lesion), len(found - lesion), len(lesion - found)
            rest = len(pixels - found - lesion)
            wrong = (false + missed) / len(pixels)
            if legacy and hit == 0:
                hit = 1
            acc = (hit + rest) / (hit + rest + false + missed)
            dice = 2 * hit / (2 * hit + false + missed) if hit + false + missed else 1.0
            iou = hit / (hit + false + missed) if hit + false + missed else 1.0
            row.append([100 * wrong, 100 * acc, 100 * dice, 100 * iou])
        rows.append(row)
    return np.array(rows)


def random_pair(seed, batch, height, width, classes):
    """A random target and a prediction that agrees with about half of it; the last image's target is empty."""
    generator = torch.Generator().manual_seed(seed)
    labels = max(classes, 2)
    target = torch.randint(0, labels, (batch, height, width), generator=generator)
    other = torch.randint(0, labels, (batch, height, width), generator=generator)
    masks = torch.where(torch.rand(batch, height, width, generator=generator) < 0.5, target, other)
    target[-1] = 0
    return masks, target


def multiclass_data():
    logits = 2 * np.random.default_rng(zlib.crc32(b"logits:3")).standard_normal((4, 3, 24, 32))
    labels = np.random.default_rng(zlib.crc32(b"labels:3")).integers(0, 3, (4, 24, 32))
    labels[3] = 0
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


# ---- golden numbers

@pytest.mark.parametrize("classes", [1, 2])
def test_each_case_equals_the_official_number(classes):
    for name, pair in CASES.items():
        masks, target = (mask[None] for mask in pair)
        metrics = SegmentationMetrics(classes, legacy=True)
        metrics.update(as_logits(masks, classes), target)
        assert metrics.compute() == pytest.approx(dict(zip(NAMES, SIX_LEGACY[name])), abs=1e-3), name


@pytest.mark.parametrize("legacy, expected", [(True, SIX_LEGACY_MEAN), (False, SIX_HONEST_MEAN)])
def test_the_six_as_one_batch(legacy, expected):
    masks, target = (torch.stack(maps) for maps in zip(*CASES.values()))
    metrics = SegmentationMetrics(2, legacy=legacy)
    metrics.update(as_logits(masks, 2), target)
    assert metrics.compute() == pytest.approx(dict(zip(NAMES, expected)), abs=1e-3)


@pytest.mark.parametrize("legacy, expected", [(True, MULTICLASS_LEGACY), (False, MULTICLASS_HONEST)])
def test_multiclass_equals_the_official_numbers(legacy, expected):
    metrics = SegmentationMetrics(3, legacy=legacy)
    metrics.update(*multiclass_data())
    scores = metrics.compute()
    assert scores.keys() == expected.keys()
    assert scores == pytest.approx(expected, abs=1e-3)


# ---- an independent computation

@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_equals_brute_force_on_odd_sizes(classes, legacy):
    metrics, expected = SegmentationMetrics(classes, legacy=legacy), []
    for seed, (batch, height, width) in enumerate([(1, 13, 7), (3, 5, 19), (2, 1, 1), (4, 1, 31), (2, 11, 11)]):
        masks, target = random_pair(seed, batch, height, width, classes)
        metrics.update(as_logits(masks, classes), target)
        expected.append(brute_force(masks, target, classes, legacy))
    expected = np.concatenate(expected)
    assert len(metrics) == 12
    assert metrics.per_image().shape == (12, max(classes, 2) - 1, 4)
    np.testing.assert_allclose(metrics.per_image().numpy(), expected, rtol=0, atol=1e-9)
    scores = metrics.compute()
    assert [scores[name] for name in NAMES] == pytest.approx(expected.mean(axis=(0, 1)).tolist(), abs=1e-9)
    assert len(scores) == (4 if classes <= 2 else 4 * classes)
    for label in range(1, classes) if classes > 2 else ():
        assert [scores[f"{name}_{label}"] for name in NAMES] == pytest.approx(expected.mean(axis=0)[label - 1].tolist(), abs=1e-9)


@pytest.mark.parametrize("classes", [2, 7])
def test_hard_masks_is_argmax_ties_included(classes):
    logits = torch.randn(2, classes, 9, 15, generator=torch.Generator().manual_seed(0)).mul(2).round()  # many exact ties
    masks = hard_masks(logits)
    assert masks.shape == (2, 9, 15) and masks.dtype == torch.int64
    np.testing.assert_array_equal(masks.numpy(), logits.numpy().argmax(axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hard_masks_of_one_channel_is_sigmoid_above_a_half(dtype):
    logits = torch.tensor([-30.0, -0.1, 0.0, 0.1, 30.0], dtype=dtype).view(1, 1, 1, 5)
    masks = hard_masks(logits)
    assert masks.shape == (1, 1, 5) and masks.dtype == torch.int64
    assert masks.flatten().tolist() == [0, 0, 0, 1, 1]


# ---- what must not matter

@pytest.mark.parametrize("classes", [2, 4])
def test_batching_and_order_do_not_matter(classes):
    masks, target = random_pair(5, 12, 17, 9, classes)
    whole = SegmentationMetrics(classes)
    whole.update_masks(masks, target)
    for sizes in ([1] * 12, [5, 7], [11, 1]):
        parts = SegmentationMetrics(classes)
        for part, true in zip(masks.split(sizes), target.split(sizes)):
            parts.update_masks(part, true)
        assert torch.equal(parts.per_image(), whole.per_image()) and parts.compute() == whole.compute()
    order = list(range(12))
    random.Random(0).shuffle(order)
    shuffled = SegmentationMetrics(classes)
    shuffled.update_masks(masks[order], target[order])
    assert shuffled.compute() == pytest.approx(whole.compute(), abs=1e-10)


def test_one_and_two_classes_agree_and_mask_dtypes_do_not_matter():
    masks, target = random_pair(6, 3, 10, 11, 2)
    results = []
    for classes, given in [(1, masks), (2, masks), (2, masks.bool()), (2, masks.to(torch.uint8)), (2, masks.to(torch.int32))]:
        metrics = SegmentationMetrics(classes)
        metrics.update_masks(given, target)
        results.append(metrics.compute())
    assert all(result == results[0] for result in results)


def test_non_contiguous_inputs_and_gradients():
    logits, target = torch.randn(2, 3, 8, 6, requires_grad=True), torch.randint(0, 3, (2, 6, 8)).transpose(1, 2)
    metrics, plain = SegmentationMetrics(3), SegmentationMetrics(3)
    metrics.update(logits.to(memory_format=torch.channels_last), target)
    plain.update(logits.detach(), target.contiguous())
    assert metrics.compute() == plain.compute() and not metrics.per_image().requires_grad


def test_inference_mode_reset_and_going_on_after_compute():
    metrics = SegmentationMetrics(2)
    with torch.inference_mode():
        metrics.update_masks(LARGE[None], LARGE[None])
    assert metrics.compute()["dice"] == 100 and len(metrics) == 1
    metrics.update_masks(EMPTY[None], SMALL[None])
    assert metrics.compute()["dice"] == 50 and len(metrics) == 2
    metrics.reset()
    assert len(metrics) == 0
    metrics.update_masks(EMPTY[None], SMALL[None])
    assert metrics.compute()["dice"] == 0


# ---- nothing, everything, and large numbers

@pytest.mark.parametrize("masks, target, dice, iou, acc", [
    (0, 0, 100, 100, 100), (1, 1, 100, 100, 100), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0),
])
def test_constant_masks(masks, target, dice, iou, acc):
    metrics = SegmentationMetrics(1)
    metrics.update_masks(torch.full((1, 5, 3), masks), torch.full((1, 5, 3), target))
    assert metrics.compute() == {"mae": 100 - acc, "acc": acc, "dice": dice, "iou": iou}


def test_a_class_absent_and_not_claimed_scores_100():
    metrics = SegmentationMetrics(3)
    metrics.update_masks(LARGE[None], LARGE[None])  # only class 1 occurs
    assert metrics.compute()["dice_1"] == metrics.compute()["dice_2"] == 100
    metrics.update_masks(2 * LARGE[None], LARGE[None])  # class 1 missed, class 2 claimed in vain
    assert metrics.per_image()[1, :, 2].tolist() == [0, 0]


def test_legacy_counts_one_pixel_only_where_nothing_was_hit():
    counts = torch.tensor([[0, 0, 36, 732], [0, 36, 0, 732], [1, 0, 36, 731], [0, 0, 0, 768]])
    honest, legacy = scores_in_percent(counts), scores_in_percent(counts, legacy=True)
    assert legacy[0].tolist() == pytest.approx([100 * 36 / 768, 100 * 733 / 769, 200 / 38, 100 / 37])
    assert torch.equal(legacy[0], legacy[1]) and torch.equal(legacy[2:], honest[2:])
    assert honest[:2, 2:].count_nonzero() == 0


def test_counts_are_exact_beyond_float32():
    target = torch.ones(1, 4097, 4099, dtype=torch.int64)  # more than 2**24 pixels
    target[0, 0, 0] = 0
    counts = confusion_counts(torch.ones_like(target, dtype=torch.bool), target, 2)
    assert counts.dtype == torch.int64 and counts.tolist() == [[[4097 * 4099 - 1, 1, 0, 0]]]
    scores = scores_in_percent(counts)
    assert scores.dtype == torch.float64 and scores[0, 0, 0].item() == pytest.approx(100 / (4097 * 4099), rel=1e-12)


# ---- no waiting for the device

@pytest.mark.parametrize("classes", [1, 5])
def test_update_reads_no_pixel(classes):
    """Tensors on `meta` have no contents: what runs there cannot have synchronized."""
    metrics = SegmentationMetrics(classes)
    metrics.update(torch.empty(4, classes, 33, 65, device="meta"), torch.empty(4, 33, 65, dtype=torch.int64, device="meta"))
    assert len(metrics) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("classes", [1, 5])
def test_cuda_gives_the_same_and_does_not_synchronize(classes):
    masks, target = random_pair(7, 5, 31, 45, classes)
    logits = as_logits(masks, classes)
    here, there = SegmentationMetrics(classes), SegmentationMetrics(classes)
    here.update(logits, target)
    logits, target = logits.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.update(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.per_image().device.type == "cpu"
    assert here.compute() == there.compute()
    with pytest.raises(ValueError, match="move one"):
        there.update(logits, target.cpu())


# ---- refusals

@pytest.mark.parametrize("classes", [0, 2.0, None])
def test_refuses_impossible_class_counts(classes):
    with pytest.raises(ValueError, match="classes must be"):
        SegmentationMetrics(classes)


def test_refuses_to_score_nothing():
    metrics = SegmentationMetrics(2)
    for method in (metrics.compute, metrics.per_image):
        with pytest.raises(ValueError, match="no images yet"):
            method()
    metrics.update_masks(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.int64))
    assert len(metrics) == 0
    with pytest.raises(ValueError, match="no images yet"):
        metrics.compute()


LOGITS, TARGET = torch.randn(2, 2, 6, 7), torch.zeros(2, 6, 7, dtype=torch.int64)


@pytest.mark.parametrize("logits, target, match", [
    (torch.randn(2, 3, 6, 7), TARGET, "3 channels"),
    (torch.randn(2, 1, 6, 7), TARGET, "1 channels"),
    (LOGITS[0], TARGET, "floating-point"),
    (LOGITS.long(), TARGET, "floating-point"),
    (LOGITS, TARGET[:, None], "target must be"),
    (LOGITS, TARGET[0], "target must be"),
    (LOGITS, TARGET.float(), "target must be"),
    (LOGITS, TARGET.int(), "target must be"),
    (LOGITS, TARGET.numpy(), "target must be"),
    (LOGITS, TARGET[:1], "one shape"),
    (LOGITS, TARGET[:, :5], "one shape"),
    (LOGITS[:, :, :0], TARGET[:, :0], "without pixels"),
    (torch.randn(2, 2, 6, 7, device="meta"), TARGET, "move one"),
])
def test_update_refuses(logits, target, match):
    metrics = SegmentationMetrics(2)
    with pytest.raises(ValueError, match=match):
        metrics.update(logits, target)
    assert len(metrics) == 0


def test_update_masks_refuses_logits_and_other_shapes():
    metrics = SegmentationMetrics(2)
    for masks in (TARGET.float(), TARGET[:1], TARGET[:, None], TARGET.numpy()):
        with pytest.raises(ValueError):
            metrics.update_masks(masks, TARGET)
    assert len(metrics) == 0


@pytest.mark.parametrize("classes, stray", [(1, 2), (3, -1)])
def test_stray_labels_are_refused(classes, stray):
    wrong = TARGET.clone()
    wrong[1, 2, 3] = stray
    metrics = SegmentationMetrics(classes)
    for function in (metrics.update_masks, lambda masks, target: confusion_counts(masks, target, classes)):
        with pytest.raises(ValueError, match=f"the target holds {stray} in 1 pixels.*ignore_index={stray}"):  # at once, on the CPU
            function(TARGET, wrong)
        with pytest.raises(ValueError, match=f"the prediction holds {stray} in 1 pixels.*: use .prediction > 0..long"):
            function(wrong, TARGET)
    assert len(metrics) == 0
    metrics.update_masks(TARGET, TARGET)
    assert metrics.compute()["dice"] == 100


def test_stray_labels_that_could_not_be_read_are_refused_when_scored(monkeypatch):
    monkeypatch.setattr("qtseg.evaluation.metrics.check_labels", lambda *given, **named: None)  # as on a GPU, where nothing is read
    metrics = SegmentationMetrics(2, ignore_index=255)
    metrics.update_masks(TARGET, TARGET + 255)  # ignored, hence no strays
    metrics.update_masks(TARGET, TARGET + 3)
    with pytest.raises(ValueError, match="84 pixels of the target.*ignore_index"):
        metrics.compute()
    metrics.reset()
    metrics.update_masks(TARGET * 0 + 255, TARGET)
    with pytest.raises(ValueError, match="84 pixels of the prediction"):
        metrics.compute()


# ---- pixels that count nowhere

@pytest.mark.parametrize("classes, legacy", [(1, False), (4, True)])
def test_ignored_pixels_count_nowhere(classes, legacy):
    masks, target = random_pair(8, 4, 9, 12, classes)
    part = target.clone()
    part[..., 7:] = 255
    assert torch.equal(confusion_counts(masks, part, classes, ignore_index=255), confusion_counts(masks[..., :7], target[..., :7], classes))
    metrics, expected = SegmentationMetrics(classes, legacy, ignore_index=255), SegmentationMetrics(classes, legacy)
    metrics.update(as_logits(masks, classes), part)
    expected.update_masks(masks[..., :7], target[..., :7])
    assert torch.equal(metrics.per_image(), expected.per_image()) and metrics.compute() == expected.compute()


def test_an_image_without_a_pixel_that_counts_has_no_score():
    metrics = SegmentationMetrics(2, ignore_index=255)
    nothing = torch.full_like(LARGE, 255)
    metrics.update_masks(torch.stack([LARGE, LARGE]), torch.stack([nothing, nothing]))
    assert metrics.per_image().isnan().all()
    with pytest.raises(ValueError, match="every pixel of every image is ignored"):
        metrics.compute()
    metrics.update_masks(EMPTY[None], LARGE[None])
    assert metrics.compute()["dice"] == 0  # of the one image that has a score, not 50 or 100


@pytest.mark.parametrize("wrong", [LARGE * 255, LARGE - 1], ids=["0 and 255", "-1"])
def test_a_prediction_outside_the_classes_is_refused(wrong):
    """A perfect mask saved as 0 and 255 counted as wholly missed."""
    with pytest.raises(ValueError, match="the prediction holds"):
        confusion_counts(wrong[None], LARGE[None], 2)
    assert confusion_counts(LARGE[None].to(torch.uint16), LARGE[None], 2).tolist() == confusion_counts(LARGE[None], LARGE[None], 2).tolist()
    assert (confusion_counts(LARGE[None].bool(), LARGE[None], 2) == confusion_counts(LARGE[None], LARGE[None], np.int64(2))).all()


def test_logits_that_are_no_numbers_have_no_scores():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.full((1, 2, *LARGE.shape), torch.nan), LARGE[None])
    with pytest.raises(ValueError, match="logits are no numbers"):
        metrics.compute()
    metrics.reset()
    metrics.update(torch.full((1, 2, *LARGE.shape), torch.inf), LARGE[None])
    assert metrics.compute()["dice"] == 0


# ---- a weighted mean over classes


def test_the_weighted_mean_stands_beside_the_plain_one():
    weights = [9.0, 0.5, 0.0, 1.5]
    plain, weighted = SegmentationMetrics(4), SegmentationMetrics(4, class_weights=weights)
    for metrics in (plain, weighted):
        metrics.update_masks(*random_pair(5, 3, 9, 11, 4))
    scores, more = plain.compute(), weighted.compute()
    assert more.keys() - scores.keys() == {f"{name}_weighted" for name in NAMES} and scores.items() <= more.items()
    for name in NAMES:
        expected = np.average([scores[f"{name}_{label}"] for label in (1, 2, 3)], weights=weights[1:])
        assert more[f"{name}_weighted"] == pytest.approx(expected, abs=1e-12)
        assert more[f"{name}_weighted"] != pytest.approx(more[name], abs=1e-3)


def test_of_one_foreground_class_there_is_no_weighted_mean():
    metrics = SegmentationMetrics(2, class_weights=[0.2, 0.8])
    metrics.update_masks(LARGE[None], LARGE[None])
    assert metrics.compute().keys() == set(NAMES)


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3, 4], [1, 0, 0], [1, -1, 2], [1, float("nan"), 1], [1, float("inf"), 1]])
def test_class_weights_refused(weights):
    with pytest.raises(ValueError, match="3 numbers, one for each class, none below 0 and one of the foreground above 0, got"):
        SegmentationMetrics(3, class_weights=weights)
