"""Lesson 11, losses: the official code's numbers, segmentation-models-pytorch, gradients, refusals, half precision, extremes."""
from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qtseg.training.loss_inputs import check_labels
from qtseg.training.loss_names import LOSSES, boundary_dou_loss, weighted_loss
from qtseg.training.losses import bce_loss, binary_dice_loss, categorical_dice_loss, ce_dice_loss, cross_entropy_loss, focal_loss

# Printed by the official code, release v0.1.0, on golden_inputs.
GOLDEN = {
    (cross_entropy_loss, 2): 1.3440488576889038,
    (cross_entropy_loss, 3): 2.007802724838257,
    (categorical_dice_loss, 2): 1.0840033292770386,
    (categorical_dice_loss, 3): 2.1182687282562256,
    (binary_dice_loss, 1): 0.6247063279151917,
    (binary_dice_loss, 2): 0.6296946406364441,
    (bce_loss, 1): 1.074695110321045,
    (focal_loss, 1): 0.40649858117103577,
}
GOLDEN[ce_dice_loss, 1] = GOLDEN[bce_loss, 1] + GOLDEN[binary_dice_loss, 1]
GOLDEN[ce_dice_loss, 2] = GOLDEN[cross_entropy_loss, 2] + GOLDEN[binary_dice_loss, 2]
GOLDEN[ce_dice_loss, 3] = GOLDEN[cross_entropy_loss, 3] + GOLDEN[categorical_dice_loss, 3]

# Every loss with every kind of channel count that it takes.
CASES = [("ce", 2), ("ce", 3), ("bce", 1), ("bce", 2), ("binary_dice", 1), ("binary_dice", 2), ("categorical_dice", 2),
         ("categorical_dice", 4), ("focal", 1), ("focal", 2), ("ce_dice", 1), ("ce_dice", 2), ("ce_dice", 3), ("boundary_dou", 1), ("boundary_dou", 4)]
REFUSED = [("ce", 1), ("bce", 3), ("binary_dice", 3), ("categorical_dice", 1), ("focal", 3)]
every_case = pytest.mark.parametrize(("name", "channels"), CASES)
# One case of each loss, for what does not depend on the channels; two channels equal one, see test_two_channels_are_the_difference.
every_loss = pytest.mark.parametrize(
    ("name", "channels"), [("ce", 3), ("bce", 1), ("binary_dice", 1), ("categorical_dice", 3), ("focal", 1), ("ce_dice", 2),
                            ("boundary_dou", 3)])


def golden_inputs(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and labels of the golden numbers, by the reference's formula; the fourth label map is empty."""
    classes = max(channels, 2)
    logits = 2 * np.random.default_rng(zlib.crc32(f"logits:{channels}".encode())).standard_normal((4, channels, 24, 32))
    labels = np.random.default_rng(zlib.crc32(f"labels:{classes}".encode())).integers(0, classes, (4, 24, 32))
    labels[3] = 0
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def random_inputs(channels: int, shape=(2, 5, 4), scale=1.5, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    batch, height, width = shape
    logits = scale * torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, max(channels, 2), shape, generator=generator)


@pytest.mark.parametrize(("loss", "channels"), list(GOLDEN))
def test_golden(loss, channels):
    value = loss(*golden_inputs(channels))
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(GOLDEN[loss, channels], abs=1e-5)


def test_names():
    assert LOSSES == {"ce": cross_entropy_loss, "bce": bce_loss, "binary_dice": binary_dice_loss,
                      "categorical_dice": categorical_dice_loss, "focal": focal_loss, "ce_dice": ce_dice_loss,
                      "boundary_dou": boundary_dou_loss}


# ---- other computations of the same thing -------------------------------------------------------------------------------


def reference(name: str, logits: np.ndarray, target: np.ndarray, smooth=1e-6, alpha=0.25, gamma=2.0) -> float:
    """The definitions once more, in NumPy and float64, pixel probabilities first."""
    batch, channels = logits.shape[:2]
    if channels == 1:
        lesion = 1 / (1 + np.exp(-logits[:, 0]))
        probability = np.stack([1 - lesion, lesion], axis=1)
    else:
        probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = np.take_along_axis(probability, target[:, None], 1)[:, 0]

    def dice(of_class: int) -> float:
        losses = []
        for p, t in zip(probability[:, of_class], target == of_class, strict=True):
            losses.append(1 - (2 * p[t].sum() + smooth) / (p.sum() + t.sum() + smooth))
        return float(np.mean(losses))

    def multi() -> float:
        return sum(dice(c) for c in range(channels))

    def rim(of_class: int) -> float:
        p, t = probability[:, of_class], np.pad(target == of_class, ((0, 0), (1, 1), (1, 1)))
        inner = t[:, 1:-1, 1:-1] & t[:, :-2, 1:-1] & t[:, 2:, 1:-1] & t[:, 1:-1, :-2] & t[:, 1:-1, 2:]
        t = t[:, 1:-1, 1:-1]
        alpha = min(1 - 2 * ((t & ~inner).sum() + 1e-5) / (t.sum() + 1e-5), 0.8)
        return ((p - t) ** 2).sum() / ((p - t) ** 2 + (1 - alpha) * p * t).sum()

    ce = float(-np.log(right).mean())
    alpha_t = np.where(target == 1, alpha, 1 - alpha)
    return {
        "ce": lambda: ce,
        "bce": lambda: ce,
        "binary_dice": lambda: dice(1),
        "categorical_dice": multi,
        "focal": lambda: float((-alpha_t * (1 - right) ** gamma * np.log(right)).mean()),
        "ce_dice": lambda: ce + (multi() if channels > 2 else dice(1)),
        "boundary_dou": lambda: float(np.mean([rim(c) for c in (range(channels) if channels > 2 else [1])])),
    }[name]()


@every_case
def test_equals_the_definition(name, channels):
    logits, target = random_inputs(channels, (3, 7, 6))
    target[0] = 0
    assert LOSSES[name](logits, target).item() == pytest.approx(reference(name, logits.numpy(), target.numpy()), abs=1e-6 if name == "boundary_dou" else 1e-12)


def test_focal_keywords():
    for alpha, gamma in ((0.75, 1.0), (0.5, 0.0), (0.9, 3.5), (0.0, 2.0), (1.0, 0.5)):
        logits, target = random_inputs(1)
        expected = reference("focal", logits.numpy(), target.numpy(), alpha=alpha, gamma=gamma)
        assert focal_loss(logits, target, alpha=alpha, gamma=gamma).item() == pytest.approx(expected, abs=1e-12)


def test_dice_keyword():
    for name, loss, channels in (("binary_dice", binary_dice_loss, 1), ("categorical_dice", categorical_dice_loss, 3)):
        logits, target = random_inputs(channels)
        expected = reference(name, logits.numpy(), target.numpy(), smooth=100.0)
        assert loss(logits, target, smooth=100.0).item() == pytest.approx(expected, abs=1e-12)


def smp_losses():
    return pytest.importorskip("segmentation_models_pytorch.losses", reason="segmentation-models-pytorch is a development extra")


def test_binary_dice_is_that_of_smp_image_by_image():
    # Theirs sums over the batch and gives 0 for an empty target: they agree on one image that has a lesion. Their smooth is
    # another one (in 0.6 theirs counts twice), so only a negligible one is compared; test_dice_keyword does the rest.
    theirs = smp_losses().DiceLoss("binary", from_logits=True)
    logits, target = golden_inputs(1)
    singles = [theirs(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    for i, expected in enumerate(singles):
        torch.testing.assert_close(binary_dice_loss(logits[i : i + 1], target[i : i + 1]), expected)
    torch.testing.assert_close(binary_dice_loss(logits[:3], target[:3]), torch.stack(singles).mean())
    two = torch.cat([-logits / 2, logits / 2], dim=1)  # the same as two channels
    torch.testing.assert_close(binary_dice_loss(two[:1], target[:1]), singles[0])


@pytest.mark.parametrize("classes", [2, 5])
def test_categorical_dice_is_that_of_smp_times_the_classes(classes):
    # Theirs averages over classes, ours (the official code's) sums; one image in which every class occurs.
    theirs = smp_losses().DiceLoss("multiclass", from_logits=True)
    logits, target = random_inputs(classes, (1, 16, 16), dtype=torch.float32)
    assert len(target.unique()) == classes
    torch.testing.assert_close(categorical_dice_loss(logits, target), classes * theirs(logits, target))


def test_focal_is_that_of_smp():
    theirs = smp_losses().FocalLoss("binary", alpha=0.75, gamma=1.5)
    logits, target = golden_inputs(1)
    torch.testing.assert_close(focal_loss(logits, target, alpha=0.75, gamma=1.5), theirs(logits, target))


# ---- relations between them ---------------------------------------------------------------------------------------------


def test_two_channels_are_the_difference():
    logits, target = golden_inputs(2)
    one = logits[:, 1:] - logits[:, :1]
    for loss in (bce_loss, binary_dice_loss, focal_loss, ce_dice_loss, boundary_dou_loss):
        torch.testing.assert_close(loss(logits, target), loss(one, target))
    torch.testing.assert_close(bce_loss(logits, target), cross_entropy_loss(logits, target))


def test_focal_without_focus_is_half_of_bce():
    logits, target = golden_inputs(1)
    torch.testing.assert_close(2 * focal_loss(logits, target, alpha=0.5, gamma=0.0), bce_loss(logits, target))


@every_loss
def test_a_common_shift_and_the_order_of_images_do_not_matter(name, channels):
    logits, target = random_inputs(channels, (4, 6, 6))
    value = LOSSES[name](logits, target)
    torch.testing.assert_close(LOSSES[name](logits.flip(0, 3), target.flip(0, 2)), value)
    if channels > 1:
        torch.testing.assert_close(LOSSES[name](logits + 7, target), value)


@every_loss
def test_strided_inputs_give_the_same_numbers(name, channels):
    logits, target = random_inputs(channels, (2, 8, 6), dtype=torch.float32)
    value = LOSSES[name](logits, target)
    torch.testing.assert_close(LOSSES[name](logits.to(memory_format=torch.channels_last), target), value)
    torch.testing.assert_close(LOSSES[name](logits.transpose(2, 3), target.transpose(1, 2)), value)


@every_loss
def test_perfect_is_near_zero_and_wrong_is_not(name, channels):
    _, target = random_inputs(channels, (2, 12, 12))
    sign = 2 * F.one_hot(target, max(channels, 2)).movedim(-1, 1).float() - 1
    logits = 60 * sign[:, -channels:]
    assert 0 <= LOSSES[name](logits, target).item() < 1e-5
    assert LOSSES[name](-logits, target).item() > 0.3


# ---- gradients ----------------------------------------------------------------------------------------------------------


@every_case
def test_gradcheck(name, channels):
    logits, target = random_inputs(channels, (3, 3, 2))
    target[1] = 0  # an image without a lesion
    target[2, :, 0] = 255
    weights = [0.3, 1.2, 0.5, 0.7][: max(channels, 2)]
    logits.requires_grad_()
    for options in ({}, {"class_weights": weights}):
        loss = lambda x: LOSSES[name](x, target, ignore_index=255, **options)
        assert loss(logits).dtype == torch.float64 and torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_gradcheck_focal(gamma):
    logits, target = random_inputs(1, (2, 3, 2))
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, target, gamma=gamma), logits.requires_grad_())


# ---- half precision -----------------------------------------------------------------------------------------------------


@every_loss
def test_half_precision_is_widened_first(name, channels):
    for dtype in (torch.float16, torch.bfloat16):
        logits, target = random_inputs(channels, (2, 9, 7), dtype=dtype)
        logits.requires_grad_()
        value = LOSSES[name](logits, target)
        assert value.dtype == torch.float32
        assert torch.equal(value, LOSSES[name](logits.float(), target))
        value.backward()
        assert logits.grad.dtype == dtype and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


def test_a_large_image_in_half_precision():
    target = torch.zeros(1, 512, 512, dtype=torch.int64)
    target[:, :256] = 1
    assert torch.zeros(512, 512, dtype=torch.float16).add(0.5).sum().isinf()  # what happens without widening
    for channels in (1, 2):
        logits = torch.zeros(1, channels, 512, 512, dtype=torch.float16)
        assert binary_dice_loss(logits, target).item() == pytest.approx(0.5, abs=1e-6)
        assert ce_dice_loss(logits, target).item() == pytest.approx(0.5 + math.log(2), abs=1e-6)


@every_loss
def test_autocast_changes_nothing(name, channels):
    logits, target = random_inputs(channels, (2, 9, 7), dtype=torch.float32)
    expected = LOSSES[name](logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[name](logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


# ---- extremes -----------------------------------------------------------------------------------------------------------


@every_loss
def test_huge_logits(name, channels):
    for dtype in (torch.float32, torch.float16):
        logits, target = random_inputs(channels, (2, 8, 8))
        logits = (1e4 * logits.sign()).to(dtype).requires_grad_()
        value = LOSSES[name](logits, target)
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all(), dtype


@pytest.mark.parametrize("gamma", [0.0, 0.3, 5.0])
def test_huge_logits_focal(gamma):
    logits = torch.tensor([[[[1e4, -1e4, 50.0, -50.0]]]], requires_grad=True)
    value = focal_loss(logits, torch.ones(1, 1, 4, dtype=torch.int64), gamma=gamma)
    value.backward()
    assert value.item() == pytest.approx(0.25 * (1e4 + 50) / 4) and logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0, 1].item() == pytest.approx(-0.25 / 4)


@every_loss
def test_constant_images_and_masks(name, channels):
    for label, logit in itertools.product((0, 1), (-1e4, -20.0, 0.0, 1e4)):
        logits = torch.zeros(2, channels, 16, 16)
        logits[:, -1] = logit
        logits.requires_grad_()
        value = LOSSES[name](logits, torch.full((2, 16, 16), label))
        value.backward()
        assert value.isfinite() and value >= 0 and logits.grad.isfinite().all(), (label, logit)


def test_both_empty_is_near_zero_only_if_the_probability_is():
    nothing = torch.zeros(1, 512, 512, dtype=torch.int64)
    for logit, low, high in ((0.0, 0.999, 1), (-20.0, 0.99, 1), (-30.0, 0.01, 0.05), (-40.0, 0, 1e-5), (-1e4, 0, 0)):
        assert low <= binary_dice_loss(torch.full((1, 1, 512, 512), logit), nothing).item() <= high


def test_one_pixel():
    value = ce_dice_loss(torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64)).item()
    assert value == pytest.approx(math.log(2) + 1 / 3, abs=1e-5)


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), REFUSED)
def test_channels_refused(name, channels):
    with pytest.raises(ValueError, match=r"channels.*logits \[2, "):
        LOSSES[name](torch.zeros(2, channels, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64))


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("name", list(LOSSES))
def test_inputs_refused(name):
    for logits, target, message in [
        (zeros(2, 2, 4, 4), zeros(2, 4, 4), "floating point"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 4), "int64.*float32"),
        (torch.zeros(2, 2, 4, 4), zeros(2, 4, 4, dtype=torch.uint8), "int64.*uint8"),
        (torch.zeros(2, 2, 4, 4), zeros(2, 1, 4, 4), r"\[2, 1, 4, 4\]"),
        (torch.zeros(2, 2, 4, 4), zeros(1, 4, 4), r"\[1, 4, 4\]"),  # would broadcast
        (torch.zeros(2, 2, 4, 5), zeros(2, 5, 4), r"\[2, 5, 4\]"),
        (torch.zeros(2, 4, 4), zeros(2, 4), r"\[B, C, H, W\]"),
        (torch.zeros(2, 2, 4, 4, 4), zeros(2, 4, 4, 4), r"\[B, C, H, W\]"),
        (torch.zeros(0, 2, 4, 4), zeros(0, 4, 4), "nothing"),
        (torch.zeros(2, 0, 4, 4), zeros(2, 4, 4), "nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            LOSSES[name](logits, target)


@pytest.mark.parametrize("keywords", [{"alpha": -0.1}, {"alpha": 1.5}, {"alpha": math.nan}, {"gamma": -1.0}, {"gamma": math.nan}])
def test_focal_keywords_refused(keywords):
    with pytest.raises(ValueError, match="alpha.*gamma"):
        focal_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), **keywords)


@pytest.mark.parametrize("smooth", [0.0, -1.0, math.nan])
def test_smooth_refused(smooth):
    for loss in (binary_dice_loss, categorical_dice_loss):
        with pytest.raises(ValueError, match="smooth"):
            loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), smooth=smooth)


# ---- labels that are no class, and pixels that count nowhere -----------------------------------------------------------


@every_loss
def test_labels_outside_the_classes_are_refused(name, channels):
    # Shared case 25: focal loss gave -13,189 on a target of 0 and 255, and categorical Dice took index 5 of 3 for "no class".
    logits, target = random_inputs(channels)
    last = max(channels, 2) - 1
    for stray in (255, last + 1, -1, -100):  # -100 is what PyTorch's cross-entropy leaves out unasked
        wrong = target.clone()
        wrong[1, 2, 3] = stray
        with pytest.raises(ValueError, match=rf"holds {stray} in 1 pixels.* 0 to {last}: pass ignore_index={stray} .*\(target > 0\)"):
            LOSSES[name](logits, wrong)
        with pytest.raises(ValueError, match=f"holds {stray} "):  # another label is ignored, not this one
            LOSSES[name](logits, wrong, ignore_index=77)
        assert LOSSES[name](logits, wrong, ignore_index=stray).isfinite()


def test_the_refusal_names_at_most_five_values():
    check_labels(torch.tensor([0, 1]), 1)  # one channel separates two classes
    with pytest.raises(ValueError, match=r"holds 2, 3, 4, 5, 6, … in 8 pixels, but the classes are 0 to 1: pass ignore_index=9"):
        check_labels(torch.arange(10), 2)


@every_case
def test_ignored_pixels_count_nowhere(name, channels):
    logits, target = random_inputs(channels, (3, 6, 8))
    part = target.clone()
    part[..., 5:] = 255
    logits.requires_grad_()
    value = LOSSES[name](logits, part, ignore_index=255)
    torch.testing.assert_close(value, LOSSES[name](logits[..., :5], target[..., :5]))  # the loss of what is left
    value.backward()
    assert (logits.grad[..., 5:] == 0).all() and (logits.grad[..., :5] != 0).any()
    wild = logits.detach().clone()  # whatever a network says there
    wild[..., 5], wild[..., 6:] = torch.inf, torch.nan
    again = LOSSES[name](wild.requires_grad_(), part, ignore_index=255)
    again.backward()
    assert torch.equal(again, value) and torch.equal(wild.grad, logits.grad)
    part[1] = 255  # an image without a pixel that counts is no image
    torch.testing.assert_close(LOSSES[name](logits, part, ignore_index=255),
                               LOSSES[name](logits[[0, 2], :, :, :5], target[[0, 2], :, :5]))
    torch.testing.assert_close(LOSSES[name](logits, target, ignore_index=255), LOSSES[name](logits, target))  # none ignored
    by_name = weighted_loss({name: 2.0}, ignore_index=255)
    torch.testing.assert_close(by_name(logits, part), 2 * LOSSES[name](logits, part, ignore_index=255))


@every_case
def test_the_ignored_label_may_be_that_of_a_class(name, channels):
    logits, target = random_inputs(channels, (3, 6, 8))
    target = (2 * target).where(target < 1, 0) if channels > 2 else torch.zeros_like(target)  # no pixel is of class 1
    as_class, as_other = (target.clone() for _ in range(2))
    as_class[..., 5:], as_other[..., 5:] = 1, 255
    assert torch.equal(LOSSES[name](logits, as_class, ignore_index=1), LOSSES[name](logits, as_other, ignore_index=255))


@every_loss
def test_a_batch_without_a_pixel_that_counts_costs_nothing(name, channels):
    logits, target = random_inputs(channels)
    logits.requires_grad_()
    value = LOSSES[name](logits, torch.full_like(target, 255), ignore_index=255)
    value.backward()
    assert value.item() == 0 and (logits.grad == 0).all()


# ---- class weights and label smoothing ----------------------------------------------------------------------------------

ONE_CLASS = [("binary_dice", 1), ("binary_dice", 2), ("boundary_dou", 1)]  # no mean over classes
WEIGHTS = {2: [0.2, 0.8], 4: [0.1, 1.0, 2.5, 0.0]}


def value_and_gradient(loss, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_is_that_of_pytorch(classes, ignored, smoothing):
    logits, target = random_inputs(classes, (3, 6, 5))
    if ignored:
        target[0, 2:4], target[1] = 255, 255
    for weights in (None, WEIGHTS[classes]):
        options = {"label_smoothing": smoothing, "ignore_index": 255}
        weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        expected = value_and_gradient(lambda x: F.cross_entropy(x, target, weight=weight, **options), logits)
        ours = value_and_gradient(lambda x: cross_entropy_loss(x, target, class_weights=weights, **options), logits)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        if classes == 2:
            bce = value_and_gradient(lambda x: bce_loss(x, target, class_weights=weights, **options), logits)
            torch.testing.assert_close(bce, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ignored", [False, True])
def test_bce_of_one_channel_has_a_weight_for_the_background_and_one_for_the_lesion(ignored):
    logits, target = random_inputs(1, (3, 6, 5))
    target[0, 2:4] = 255 if ignored else 0
    counted, lesion = target != 255, target == 1
    pixels = F.binary_cross_entropy_with_logits(logits[:, 0], lesion.double(), reduction="none")
    amounts = torch.where(lesion, 0.8, 0.2).double() * counted
    torch.testing.assert_close(bce_loss(logits, target, class_weights=[0.2, 0.8], ignore_index=255),
                               (pixels * amounts).sum() / amounts.sum())
    soft = F.binary_cross_entropy_with_logits(logits[:, 0], 0.9 * lesion.double() + 0.05, reduction="none")
    torch.testing.assert_close(bce_loss(logits, target, label_smoothing=0.1, ignore_index=255),
                               (soft * counted).sum() / counted.sum())


@pytest.mark.parametrize("smooth", [1e-6, 1.0])
def test_weighted_dice_is_that_of_monai(smooth):
    # Theirs multiplies each class by its weight and averages over the classes, so with weights of mean 1 it is our sum over C.
    monai = pytest.importorskip("monai.losses", reason="MONAI is a development extra")
    logits, target = random_inputs(4, (3, 6, 5))
    weights = torch.tensor(WEIGHTS[4], dtype=torch.float64)
    theirs = monai.DiceLoss(softmax=True, to_onehot_y=True, weight=weights / weights.mean(), smooth_nr=smooth, smooth_dr=smooth)
    expected = value_and_gradient(lambda x: 4 * theirs(x, target[:, None]), logits)
    ours = value_and_gradient(lambda x: categorical_dice_loss(x, target, class_weights=WEIGHTS[4], smooth=smooth), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@every_case
def test_equal_weights_change_nothing_and_others_do(name, channels):
    logits, target = random_inputs(channels, (3, 6, 5))
    target[0, :2] = 255
    plain = LOSSES[name](logits, target, ignore_index=255)
    equal = [3.0] * max(channels, 2)
    torch.testing.assert_close(LOSSES[name](logits, target, ignore_index=255, class_weights=equal), plain)
    other = LOSSES[name](logits, target, ignore_index=255, class_weights=[0.1, *equal[1:]])
    assert torch.isclose(other, plain) == ((name, channels) in ONE_CLASS)
    by_name = weighted_loss({name: 2.0}, 255, [0.1, *equal[1:]])
    torch.testing.assert_close(by_name(logits, target), 2 * other)


@every_loss
def test_pixels_of_weight_zero_alone_cost_nothing(name, channels):
    logits, target = random_inputs(channels)
    weights = [0.0] + [1.0] * (max(channels, 2) - 1)
    value, gradient = value_and_gradient(lambda x: LOSSES[name](x, 0 * target, class_weights=weights), logits)
    assert value.isfinite() and gradient.isfinite().all()
    if name in ("ce", "bce", "focal"):
        assert value == 0 and not gradient.any()


@every_loss
def test_class_weights_refused(name, channels):
    classes = max(channels, 2)
    others = [1.0] * (classes - 1)
    for weights in (others, [1.0] * 5, [-1.0, *others], [0.0] * classes, [math.nan, *others], [math.inf, *others], []):
        with pytest.raises(ValueError, match=f"class_weights are {classes} numbers, one for each class, none below 0"):
            LOSSES[name](*random_inputs(channels), class_weights=weights)


def test_label_smoothing_of_a_sum():
    logits, target = random_inputs(3)
    smoothed = weighted_loss({"ce_dice": 1.0, "categorical_dice": 2.0}, label_smoothing=0.2)(logits, target)
    expected = F.cross_entropy(logits, target, label_smoothing=0.2) + 3 * categorical_dice_loss(logits, target)
    torch.testing.assert_close(smoothed, expected)
    with pytest.raises(ValueError, match="label_smoothing belongs to ce, bce, ce_dice, not to focal"):
        weighted_loss({"focal": 1.0}, label_smoothing=0.1)


# ---- weighted sums ------------------------------------------------------------------------------------------------------


def test_weighted_loss():
    logits, target = golden_inputs(2)
    total = weighted_loss({"ce": 1.0, "binary_dice": 1.0})(logits, target)
    torch.testing.assert_close(total, ce_dice_loss(logits, target))
    weights = {"ce": 0.25, "focal": 3, "categorical_dice": 0.5}
    expected = sum(weight * LOSSES[name](logits, target) for name, weight in weights.items())
    loss = weighted_loss(weights)
    weights["ce"] = 100.0  # what was asked for stays
    value = loss(logits, target)
    assert value.shape == ()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("weights", [{"ce": 1.0, "iou": 2.0}, {}])
def test_weighted_loss_refuses(weights):
    with pytest.raises(ValueError) as refusal:
        weighted_loss(weights)
    for name in [*LOSSES, *(name for name in weights if name not in LOSSES)]:
        assert name in str(refusal.value)


# ---- no look at the values ----------------------------------------------------------------------------------------------


@every_loss
def test_no_value_is_read(name, channels):
    # Tensors on the meta device have no values; reading one raises.
    for ignore_index, weights in itertools.product((None, 255), (None, [1.0, 2.0, 3.0][: max(channels, 2)])):
        logits = torch.empty(2, channels, 64, 64, device="meta", requires_grad=True)
        value = LOSSES[name](logits, torch.empty(2, 64, 64, dtype=torch.int64, device="meta"), ignore_index=ignore_index,
                             class_weights=weights)
        value.backward()
        assert value.shape == () and logits.grad.shape == logits.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_loss
def test_no_synchronization_on_cuda(name, channels):
    logits, target = random_inputs(channels, (2, 64, 64), dtype=torch.float32)
    loss = weighted_loss({name: 1.0}, 255, [1.0, 2.0, 3.0][: max(channels, 2)])
    expected = loss(logits, target)
    on_device, labels = logits.cuda().requires_grad_(), target.cuda()
    loss(on_device, labels).backward()  # kernels and handles are made outside the watch
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(on_device, labels)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)
