"""Augmentation: image and mask move together, nothing is invented, nothing is resampled twice, the same seed gives the same."""
from __future__ import annotations

from collections import Counter
from itertools import product

import cv2
import numpy as np
import pytest
import torch

from qtseg.training import augmentation as training_augmentation, augmentation_cpu, resampling
from qtseg.training.augmentation import Augmentation, random_crops
from qtseg.training.operations import OPERATIONS, Operation, compose, seeded
from qtseg.training.resampling import apply_geometry, sampling_grid, warp
from qtseg.data.dataset import normalize

NAMES = ("vertical_flip", "horizontal_flip", "gaussian_noise", "gaussian_blur", "contrast", "scale", "rotate", "shear",
         "piecewise_affine", "translate")
GEOMETRIC = tuple(name for name in NAMES if OPERATIONS[name].kind != "photometric")
PHOTOMETRIC = tuple(name for name in NAMES if OPERATIONS[name].kind == "photometric")
FLIPS = ("vertical_flip", "horizontal_flip")
SHAPES = [(3, 3, 33, 47), (2, 1, 41, 20), (2, 3, 1, 1)]


@pytest.fixture(params=["OpenCV", "PyTorch"])
def reader(request, monkeypatch):
    """Tests that look at pixels run with both ways in which a CPU can do the work."""
    if request.param == "PyTorch":
        monkeypatch.setattr(training_augmentation, "OPENCV_IS_EXACT", False)
    elif not augmentation_cpu.OPENCV_IS_EXACT:
        pytest.skip("this OpenCV rounds positions to 1/32 pixel, so PyTorch reads")
    return request.param


with_both_readers = pytest.mark.usefixtures("reader")


def batch(count: int, channels: int, height: int, width: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and random masks, always the same ones."""
    random = torch.Generator().manual_seed(count * height + width)
    images = torch.randint(0, 256, (count, channels, height, width), generator=random, dtype=torch.uint8)
    return images, torch.randint(0, classes, (count, height, width), generator=random, dtype=torch.uint8)


def only(name: str, **settings) -> Augmentation:
    """An augmentation that knows a single operation."""
    return Augmentation(operations=(name,), most=1, **settings)


def seed_that_draws(augmentation: Augmentation, shape: tuple[int, int, int], names: tuple[str, ...]) -> int:
    """A seed for which one image goes through exactly these operations, in this order."""
    for seed in range(5000):
        (steps,) = augmentation.draw(1, shape, seed)
        if tuple(name for name, _ in steps) == names:
            return seed
    raise AssertionError(f"no seed draws {names}")


def pixel_matrix(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """From pixels about the center to OpenCV's pixels about the top left one: [3, 3] -> [2, 3]."""
    center = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    return (center @ matrix @ np.linalg.inv(center))[:2]


# ---------------------------------------------------------------- what comes out


def test_the_ten_operations_have_their_names():
    assert tuple(OPERATIONS) == NAMES and Augmentation().operations == NAMES


@with_both_readers
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_type_shape_and_range_at_any_size(shape):
    images, masks = batch(*shape)
    before = images.clone(), masks.clone()
    for seed, strength in product(range(6), (0.5, 1, 2)):
        new_images, new_masks = Augmentation(strength=strength)(images, masks, seed)
        assert new_images.dtype == torch.float32 and new_images.shape == images.shape
        assert new_masks.dtype == torch.int64 and new_masks.shape == masks.shape
        assert new_images.min() >= -1 and new_images.max() <= 1 and new_images.isfinite().all()
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1]), "the arguments are left alone"


@with_both_readers
def test_every_operation_alone():
    for name, shape in product(NAMES, SHAPES):
        images, masks = batch(*shape)
        results = [only(name)(images, masks, seed) for seed in range(8)]
        if min(shape[2:]) > 5:
            assert any(not torch.equal(result, normalize(images)) for result, _ in results), f"{name} never did anything to {shape}"
        if name in PHOTOMETRIC:
            assert all(torch.equal(result, masks.long()) for _, result in results), "colors do not move masks"
        for _, result in results:
            assert set(result.unique().tolist()) <= set(masks.unique().tolist()) | {0}


@with_both_readers
def test_constant_images_and_empty_masks():
    for value, seed in product((0, 3, 255), range(3)):
        images, masks = torch.full((16, 3, 37, 29), value, dtype=torch.uint8), torch.zeros(16, 37, 29, dtype=torch.uint8)
        settings = Augmentation(operations=GEOMETRIC, fill=(value,) * 3)
        new_images, new_masks = settings(images, masks, seed)
        assert (new_images - normalize(images)).abs().max() < 1e-6 and not new_masks.any()


@with_both_readers
def test_a_share_of_a_batch_gets_what_it_gets_in_the_whole_batch():
    images, masks = batch(9, 3, 40, 37)
    whole = Augmentation(most=10)(images, masks, 4)
    for first, end in ((0, 3), (3, 6), (6, 9), (8, 9), (5, 5)):
        share = Augmentation(most=10)(images[first:end], masks[first:end], 4, first)
        assert torch.equal(share[0], whole[0][first:end]) and torch.equal(share[1], whole[1][first:end])
    for first in (-1, True, 1.0, None):
        with pytest.raises(ValueError, match="first must be a row of the whole batch"):
            Augmentation()(images, masks, 4, first)


@with_both_readers
def test_an_empty_batch():
    images, masks = Augmentation()(*batch(0, 3, 8, 8), 1)
    assert images.shape == (0, 3, 8, 8) and masks.shape == (0, 8, 8)


@with_both_readers
@pytest.mark.parametrize("classes, ignored", [(3, True), (9, False)])
def test_classes_are_never_invented(classes, ignored):
    images, masks = batch(8, 3, 40, 56, classes)
    masks[masks == 1] = 255 if ignored else 7  # a gap: any mixing of 0 and 7 would show; IGNORE is 255
    allowed, seen = set(masks.unique().tolist()) | {0}, set()
    for seed in range(12):
        _, new_masks = Augmentation(operations=GEOMETRIC, most=6)(images, masks, seed)
        assert set(new_masks.unique().tolist()) <= allowed
        seen |= set(new_masks.unique().tolist())
    assert seen == allowed, "and none is lost"


# ---------------------------------------------------------------- chance


@with_both_readers
def test_the_same_seed_gives_the_same_and_another_seed_another():
    images, masks = batch(8, 3, 48, 48)
    first, again, other = (Augmentation()(images, masks, seed) for seed in (7, 7, 8))
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@with_both_readers
def test_global_randomness_is_neither_used_nor_moved():
    images, masks = batch(8, 3, 48, 48)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    Augmentation()(images, masks, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_that_differ_only_beyond_32_bits_differ():
    """PyTorch's CPU generator looks at the lower 32 bits only; epoch * 2**32 + batch must not repeat itself."""
    draws = {str(Augmentation().draw(4, (3, 32, 32), 5 + epoch * 2**32)) for epoch in range(20)}
    assert len(draws) == 20
    assert torch.rand(1, generator=seeded(5)) != torch.rand(1, generator=seeded(5, "noise"))
    for seed in (-1, 2**70, np.int64(4)):
        Augmentation().draw(1, (3, 8, 8), seed)


@with_both_readers
def test_each_image_of_a_batch_goes_its_own_way():
    images, masks = batch(1, 3, 32, 32)
    new_images, _ = Augmentation()(images.expand(32, -1, -1, -1), masks.expand(32, -1, -1), 2)
    assert len({one.numpy().tobytes() for one in new_images}) > 20


@pytest.mark.parametrize("most", [0, 4, 99])
def test_the_number_of_operations_is_uniform(most):
    draws = Augmentation(most=most).draw(3000, (3, 32, 32), 11)
    counts, highest = Counter(map(len, draws)), min(most, 10)
    assert set(counts) == set(range(highest + 1))
    expected = 3000 / (highest + 1)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())
    assert all(len({name for name, _ in steps}) == len(steps) for steps in draws), "drawn without replacement"


def test_every_operation_and_every_order_is_drawn_equally_often():
    draws = Augmentation().draw(4000, (3, 32, 32), 12)
    counts = Counter(name for steps in draws for name, _ in steps)
    assert set(counts) == set(NAMES) and all(abs(count - 800) < 140 for count in counts.values())
    pairs = Counter(tuple(name for name, _ in steps if name in ("rotate", "scale")) for steps in draws)
    assert abs(pairs["rotate", "scale"] - pairs["scale", "rotate"]) < 5 * (2 * pairs["rotate", "scale"]) ** 0.5 > 0


@pytest.mark.parametrize("strength", [1, 2])
def test_ranges_of_the_recipe(strength):
    draws = Augmentation(most=10, strength=strength).draw(2000, (3, 100, 200), 13)
    drawn = {name: [numbers for steps in draws for one, numbers in steps if one == name] for name in NAMES}
    assert all(len(numbers) > 500 for numbers in drawn.values())

    def close(values, low, high):
        assert low - 1e-9 <= min(values) < low + 0.03 * (high - low) and high - 0.03 * (high - low) < max(values) <= high + 1e-9

    for axis in (0, 1):
        close([matrix[axis, axis] for matrix in drawn["scale"]], 0.5**strength, 2**strength)
        reach = 0.2 * strength * (200, 100)[axis]
        close([matrix[axis, 2] for matrix in drawn["translate"]], -reach, reach)
    assert any(abs(matrix[0, 0] - matrix[1, 1]) > 0.2 for matrix in drawn["scale"]), "independent factors"
    close([np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])) for matrix in drawn["rotate"]], -40 * strength, 40 * strength)
    close([np.degrees(np.arctan(matrix[0, 1])) for matrix in drawn["shear"]], -16 * strength, 16 * strength)
    close([factor for factors in drawn["contrast"] for factor in factors], 1 - 0.5 * strength, 1 + 0.5 * strength)
    same = np.mean([len(set(factors)) == 1 for factors in drawn["contrast"]])
    assert 0.42 < same < 0.58, "per channel in half of the cases"
    assert set(drawn["gaussian_noise"]) == {strength * 0.01} and set(drawn["gaussian_blur"]) == {strength}
    spread = np.std(np.concatenate([field.ravel() for field in drawn["piecewise_affine"]]))
    assert abs(spread - 0.020 * strength) < 0.001 * strength  # the root of the mean of scale², scale between 0.008 and 0.03
    for name, axis in (("horizontal_flip", 0), ("vertical_flip", 1)):
        share = np.mean([matrix[axis, axis] == -1 for matrix in drawn[name]])
        assert abs(share - min(0.5 * strength, 0.5)) < 0.08


# ---------------------------------------------------------------- nothing happens


@with_both_readers
def test_identity_to_the_last_bit():
    images, masks = batch(6, 3, 21, 34)
    for settings, seed in product(({"strength": 0.0, "most": 10}, {"most": 0}, {"operations": ()}), range(5)):
        new_images, new_masks = Augmentation(**settings)(images, masks, seed)
        assert torch.equal(new_images, normalize(images)) and torch.equal(new_masks, masks.long())


@with_both_readers
def test_images_without_geometry_keep_every_bit():
    images, masks = batch(64, 3, 20, 31)
    settings = Augmentation(operations=GEOMETRIC)
    new_images, new_masks = settings(images, masks, 3)
    empty = [row for row, steps in enumerate(settings.draw(64, (3, 20, 31), 3)) if not steps]
    assert len(empty) > 4
    assert torch.equal(new_images[empty], normalize(images[empty])) and torch.equal(new_masks[empty], masks[empty].long())


# ---------------------------------------------------------------- flips


@with_both_readers
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flips_are_exact(shape):
    images, masks = batch(*shape)
    plain, labels = normalize(images), masks.long()
    settings, seen = Augmentation(operations=FLIPS, most=2), set()
    for seed in range(40):
        new_images, new_masks = settings(images, masks, seed)
        for row, steps in enumerate(settings.draw(len(images), shape[1:], seed)):
            axes = compose(steps).flipped_axes
            seen.add(axes)
            assert torch.equal(new_images[row], plain[row].flip(axes))
            assert torch.equal(new_masks[row], labels[row].flip([axis - 1 for axis in axes]))
    assert seen == {(), (1,), (2,), (1, 2)}


def test_a_flip_between_warps_is_part_of_the_warp():
    """Flip, rotate, flip equals rotating the other way: the order inside the composition is right."""
    flip, rotate = np.diag([-1.0, 1, 1]), np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    there = compose([("horizontal_flip", flip), ("rotate", rotate), ("horizontal_flip", flip)])
    assert np.allclose(there.matrix, rotate) and there.flipped_axes is None  # the inverse of the opposite rotation
    assert compose([("horizontal_flip", flip), ("horizontal_flip", flip)]).flipped_axes == ()


# ---------------------------------------------------------------- warps


@with_both_readers
@pytest.mark.parametrize("names, height, width", [(("scale", "rotate"), 64, 64), (("translate", "rotate", "horizontal_flip"), 61, 90),
                                                  (("shear", "scale", "translate", "rotate"), 64, 64)], ids=str)
def test_one_composed_warp_equals_opencv(names, height, width):
    settings = Augmentation(operations=GEOMETRIC)
    seed = seed_that_draws(settings, (3, height, width), names)
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 3)
    mask = (image[..., 0] > np.median(image[..., 0])).astype(np.uint8)
    (steps,) = settings.draw(1, (3, height, width), seed)
    forward = np.eye(3)
    for _, matrix in steps:
        forward = matrix @ forward  # the first operation acts first
    matrix = pixel_matrix(forward, height, width)
    expected = cv2.warpAffine(image.astype(np.float32), matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=(9, 8, 7))
    labels = cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_NEAREST)
    new_images, new_masks = Augmentation(operations=GEOMETRIC, fill=(9, 8, 7))(
        torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None], seed)
    difference = np.abs((new_images[0].permute(1, 2, 0).numpy() + 1) * 127.5 - expected)
    assert difference.max() < 4 and difference.mean() < 0.08, "OpenCV 4 rounds positions to 1/32 pixel; OpenCV 5 agrees to 1e-4"
    assert (new_masks[0].numpy() != labels).mean() < 0.01


@with_both_readers
def test_one_composed_warp_equals_an_exact_sum():
    """Bilinear interpolation written out in NumPy, in double precision, the rim included."""
    height, width = 23, 31
    images, masks = batch(1, 3, height, width)
    rotate = np.array([[0.9, -0.3, 2.2], [0.35, 1.2, -1.7], [0, 0, 1]])
    new_images, _ = apply_geometry(images, masks, [compose([("rotate", rotate)])], torch.tensor([10, 20, 30], dtype=torch.uint8))
    y, x = np.mgrid[:height, :width]
    source = np.linalg.inv(rotate) @ np.stack([x.ravel() - (width - 1) / 2, y.ravel() - (height - 1) / 2, np.ones(x.size)])
    x, y = source[0] + (width - 1) / 2, source[1] + (height - 1) / 2
    total = np.zeros((3, x.size))
    for i in (0, 1):
        for j in (0, 1):
            row, column = np.floor(y).astype(int) + i, np.floor(x).astype(int) + j
            weight = (1 - np.abs(y - row)) * (1 - np.abs(x - column))
            outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
            values = images[0].numpy()[:, row.clip(0, height - 1), column.clip(0, width - 1)]
            total += weight * np.where(outside, np.array([[10], [20], [30]]), values)
    assert np.abs((new_images[0].numpy().reshape(3, -1) + 1) * 127.5 - total).max() < 0.02


@with_both_readers
@pytest.mark.parametrize("names", [("piecewise_affine",), ("shear",), ("rotate", "piecewise_affine", "scale")], ids="-".join)
def test_image_and_mask_go_the_same_way(names):
    """The mask, drawn as a picture, and the mask itself agree after the warp wherever the picture is not between two classes."""
    y, x = np.mgrid[:57, :66]
    mask = ((np.hypot(x - 40, y - 20) < 15).astype(np.uint8) + (np.hypot(x - 40, y - 20) < 7))
    masks = torch.from_numpy(mask.astype(np.uint8))[None]
    images = (100 * masks)[:, None].expand(1, 3, 57, 66).contiguous()
    settings = Augmentation(operations=GEOMETRIC)
    seed = seed_that_draws(settings, (3, 57, 66), names)
    new_images, new_masks = settings(images, masks, seed)
    as_class = (new_images[0, 0] + 1) * 1.275
    certain = (as_class - as_class.round()).abs() < 0.01
    assert certain.double().mean() > 0.7 and torch.equal(as_class.round().long()[certain], new_masks[0][certain])
    assert (as_class - new_masks[0]).abs().max() < 1.01


@with_both_readers
def test_the_displacement_acts_at_its_place_in_the_order():
    """rotate, then displace, is not displace, then rotate; and each equals doing its steps one after the other."""
    height = width = 64
    smooth = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8), (0, 0), 4)
    images = torch.from_numpy(cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX))[None, None]
    masks, fill = torch.zeros(1, height, width, dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8)
    random = torch.Generator().manual_seed(0)
    turn, move = (("rotate", np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])),
                  ("piecewise_affine", 0.03 * torch.randn((2, 4, 4), generator=random).numpy()))
    results = []
    for steps in ([turn, move], [move, turn]):
        at_once = apply_geometry(images, masks, [compose(steps)], fill)[0]
        in_turn = images
        for step in steps:
            in_turn = ((apply_geometry(in_turn, masks, [compose([step])], fill)[0] + 1) * 127.5).round().to(torch.uint8)
        center = (slice(None), slice(None), slice(16, 48), slice(16, 48))
        assert ((at_once + 1) * 127.5 - in_turn)[center].abs().mean() < 1.5
        results.append(at_once)
    assert ((results[0] - results[1]) * 127.5).abs().mean() > 4


def test_on_apples_gpus_the_bend_is_read_on_the_cpu(monkeypatch):
    """They have no bicubic grid_sample; a tensor that says it is there stands for one that is."""
    class OnMps(torch.Tensor):
        device = property(lambda self: torch.device("mps"))

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    def grid_sample(field, positions, **options):
        assert not isinstance(field, OnMps) and not isinstance(positions, OnMps), "not implemented for mps"
        return read(field, positions, **options)

    read = torch.nn.functional.grid_sample
    random = torch.Generator().manual_seed(0)
    positions, field = torch.rand((2, 9, 7), generator=random) * 2 - 1, 0.03 * torch.randn((2, 4, 4), generator=random)
    expected = resampling.displace(positions, field)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", grid_sample)
    moved = resampling.displace(positions.as_subclass(OnMps), field.as_subclass(OnMps))
    assert isinstance(moved, OnMps) and torch.equal(moved.cpu(), expected)


def test_the_displacement_reaches_its_control_points():
    field = np.zeros((2, 4, 4), np.float32)
    field[0, 1, 2], field[1, 1, 2] = 0.02, -0.01
    still, moved = (sampling_grid([compose([("piecewise_affine", one)])], 61, 91) for one in (0 * field, field))
    shift = (moved - still)[0] / 2  # in shares of the image
    assert abs(shift[20, 60, 0] - 0.02) < 5e-4 and abs(shift[20, 60, 1] + 0.01) < 5e-4  # at 2/3 of the width, 1/3 of the height
    assert shift[:, :30].abs().max() < 2.5e-3 and (shift[:-1] - shift[1:]).abs().max() < 0.002, "smooth, and local"


@with_both_readers
def test_fill_outside_images_and_zero_outside_masks():
    fill, (images, masks) = (255, 0, 7), batch(1, 3, 40, 40)
    masks.fill_(2)
    shift = ("translate", np.array([[1, 0, 12.0], [0, 1, -5.0], [0, 0, 1]]))
    new_images, new_masks = apply_geometry(images, masks, [compose([shift])], torch.tensor(fill, dtype=torch.uint8))
    expected = normalize(torch.tensor(fill, dtype=torch.uint8).view(1, 3, 1, 1))
    assert torch.equal(new_images[:, :, :, :11], expected.expand(1, 3, 40, 11)) and not new_masks[:, :, :12].any()
    assert torch.equal(new_images[:, :, 36:], expected.expand(1, 3, 4, 40)) and not new_masks[:, 35:].any()
    assert (new_images[:, :, :35, 12:] - normalize(images)[:, :, 5:, :28]).abs().max() < 1e-3
    assert (new_masks[:, :35, 12:] == 2).all()


def test_warp_takes_one_grid_for_both():
    images, masks = batch(2, 3, 16, 16)
    geometries = [compose([("scale", np.diag([0.7, 1.3, 1]))])] * 2
    new_images, new_masks = warp(normalize(images), masks, sampling_grid(geometries, 16, 16), torch.full((3,), -1.0))
    assert new_images.shape == (2, 3, 16, 16) and new_masks.shape == (2, 16, 16)


# ---------------------------------------------------------------- colors


@with_both_readers
def test_noise_has_its_sigma_and_is_gray():
    images, masks = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8), torch.zeros(4, 64, 64, dtype=torch.uint8)
    new_images, _ = Augmentation(operations=("gaussian_noise",), most=1)(images, masks, 1)
    noise = 127.5 * (new_images - normalize(images))
    rows = [row for row in range(4) if noise[row].any()]
    assert 0 < len(rows) < 4 and abs(noise[rows].std() - 1.275) < 0.03
    assert torch.equal(noise[:, 0], noise[:, 1]), "one value for all channels of a pixel"


@with_both_readers
def test_blur_equals_opencv_inside():
    images, masks = batch(1, 3, 40, 50)
    settings = only("gaussian_blur")
    new_images, _ = settings(images, masks, seed_that_draws(settings, (3, 40, 50), ("gaussian_blur",)))
    expected = cv2.GaussianBlur(images[0].permute(1, 2, 0).numpy().astype(np.float32), (5, 5), 1, borderType=cv2.BORDER_REPLICATE)
    assert np.abs((new_images[0].permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() < 1e-3


@with_both_readers
def test_contrast_turns_about_gray():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).repeat(1, 3, 2, 1)
    settings = only("contrast")
    seed = seed_that_draws(settings, (3, 2, 256), ("contrast",))
    ((_, factors),) = settings.draw(1, (3, 2, 256), seed)[0]
    new_images, _ = settings(ramp, torch.zeros(1, 2, 256, dtype=torch.uint8), seed)
    expected = torch.stack([(127 + factor * (torch.arange(256.0) - 127)).clamp(0, 255) for factor in factors])
    assert ((new_images[0, :, 0] + 1) * 127.5 - expected).abs().max() < 1e-3


@with_both_readers
def test_noise_before_blur_is_not_noise_after_blur():
    images, masks = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.uint8)
    settings, spread = Augmentation(operations=("gaussian_noise", "gaussian_blur"), most=2), {}
    for names in (("gaussian_noise", "gaussian_blur"), ("gaussian_blur", "gaussian_noise")):
        spread[names[0]] = settings(images, masks, seed_that_draws(settings, (3, 64, 64), names))[0].std()
    assert spread["gaussian_noise"] < 0.4 * spread["gaussian_blur"]


# ---------------------------------------------------------------- two ways, one answer


@pytest.mark.parametrize("channels, height, width, fill", [(3, 130, 171, 77), (1, 64, 64, 0), (4, 33, 50, 77), (5, 20, 20, 0)])
@pytest.mark.parametrize("reader", ["OpenCV"], indirect=True)  # compared with the other
def test_opencv_and_pytorch_agree(reader, monkeypatch, channels, height, width, fill):
    images, masks = batch(32, channels, height, width)
    images = torch.nn.functional.avg_pool2d(images.float(), 5, 1, 2).byte()  # positions differ by rounding: so do steep values
    masks = masks.long() if channels == 5 else masks
    for layout in (torch.contiguous_format, torch.channels_last):
        for seed in range(3):
            settings = Augmentation(fill=(fill,), most=6)
            ours = settings(images.contiguous(memory_format=layout), masks, seed)
            with monkeypatch.context() as patch:
                patch.setattr(training_augmentation, "OPENCV_IS_EXACT", False)
                theirs = settings(images, masks, seed)
            assert (ours[0] - theirs[0]).abs().max() < 1e-3 and (ours[0] - theirs[0]).abs().mean() < 1e-5
            assert (ours[1] != theirs[1]).double().mean() < 1e-3
            assert ours[0].is_contiguous(memory_format=torch.channels_last)


@with_both_readers
def test_the_number_of_threads_changes_nothing():
    images, masks = batch(9, 3, 70, 65)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(Augmentation()(images, masks, 3))
    finally:
        torch.set_num_threads(threads)
    for images, masks in results[1:]:
        assert torch.equal(images, results[0][0]) and torch.equal(masks, results[0][1])


@with_both_readers
@pytest.mark.parametrize("threads", [1, 2])
def test_an_operation_of_ones_own_is_applied_and_its_error_is_seen(monkeypatch, threads):
    half = torch.nn.Parameter(torch.tensor(0.5))  # a gradient is nobody's wish here, in no thread

    def darken(image, numbers, noise):
        return (image * half).double().sub(0.5)

    def fail(image, numbers, noise):
        raise RuntimeError("the operation's own error")

    images, masks = batch(6, 3, 20, 24)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setitem(OPERATIONS, "darken", Operation("photometric", lambda *_: None, darken))
    changed, _ = Augmentation(operations=("darken",), most=1)(images, masks, 1)
    rows = [row for row, steps in enumerate(Augmentation(operations=("darken",), most=1).draw(6, (3, 20, 24), 1)) if steps]
    assert 0 < len(rows) < 6
    assert torch.equal(changed[rows], normalize(images)[rows] * 0.5 - 0.5)
    monkeypatch.setitem(OPERATIONS, "contrast", Operation("photometric", lambda *_: None, fail))  # one of the ten, replaced
    with pytest.raises(RuntimeError, match="own error"):
        Augmentation(operations=("contrast",), most=1)(images, masks, 0)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("settings, words", [
    ({"operations": ("rotate", "rotatee")}, "rotatee.*known are.*vertical_flip.*translate"),
    ({"operations": "rotate"}, "operations must be a tuple"),
    ({"operations": ("rotate", "rotate")}, "different names"),
    ({"most": -1}, "most must be an integer >= 0"), ({"most": True}, "most"),
    ({"strength": 2.1}, "strength must be a number from 0.*to 2"), ({"strength": float("nan")}, "strength"), ({"strength": "1"}, "strength"),
    ({"fill": (0, 0, 256)}, "fill must be"), ({"fill": (0.5, 0, 0)}, "fill"), ({"fill": 0}, "fill"), ({"fill": ()}, "fill"),
], ids=str)
def test_bad_settings_are_refused_in_one_sentence(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        Augmentation(**settings)
    assert "\n" not in str(caught.value)


def test_bad_batches_are_refused_in_one_sentence():
    images, masks = batch(2, 3, 8, 9)
    for arguments, words in [
        ((images.float(), masks, 1), "images must be uint8"), ((images[0], masks, 1), "images must be uint8"),
        ((images.numpy(), masks, 1), "images must be uint8.*ndarray"), ((images[:, :, :0], masks[:, :0], 1), "images must be"),
        ((images, masks.float(), 1), "masks must be"), ((images, masks[:, None], 1), "masks must be"),
        ((images, masks[:1], 1), "one size"), ((images, masks.transpose(1, 2), 1), "one size"),
        ((images, masks, 1.5), "seed"), ((images, masks, None), "seed"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            Augmentation()(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="fill has 2 values, the images have 3 channels"):
        Augmentation(fill=(1, 2))(images, masks, 1)
    Augmentation(fill=(7,))(images, masks, 1)  # equal values fit any number of channels
    Augmentation()(images[:, :1], masks, 1)


# ---------------------------------------------------------------- crops


def numbered(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose values tell image, row and column of each pixel, and masks without a foreground."""
    row, y, x = torch.meshgrid(torch.arange(count), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([row, y, x], dim=1).to(torch.uint8), torch.zeros(count, height, width, dtype=torch.uint8)


def test_a_crop_is_a_window_of_image_and_mask():
    images, masks = numbered(6, 40, 50)
    masks = images[:, 1] % 7 + images[:, 2] % 5
    for foreground in (0.0, 1.0):
        crops, labels = random_crops(images, masks, 16, 3, foreground=foreground)
        assert crops.shape == (6, 3, 16, 16) and labels.shape == (6, 16, 16) and crops.dtype == labels.dtype == torch.uint8
        assert torch.equal(labels, crops[:, 1] % 7 + crops[:, 2] % 5)
        for row, crop in enumerate(crops):
            top, left = crop[1, 0, 0], crop[2, 0, 0]
            assert torch.equal(crop, images[row, :, top : top + 16, left : left + 16])
    whole = random_crops(images[..., :40], masks[..., :40], 40, 3)
    assert torch.equal(whole[0], images[..., :40]) and torch.equal(whole[1], masks[..., :40])
    floats = random_crops(images.float(), masks.long(), 16, 3)
    assert floats[0].dtype == torch.float32 and floats[1].dtype == torch.int64  # Datasets of the user's own


def test_crops_depend_on_seed_and_row_alone_and_reach_every_place():
    images, masks = numbered(8, 24, 20)
    masks[:, 3, 4] = 1
    for foreground in (0.0, 0.5):
        whole = random_crops(images, masks, 10, 5, foreground=foreground)
        torch.manual_seed(foreground)  # the global generator plays no part
        share = random_crops(images[5:], masks[5:], 10, 5, 5, foreground=foreground)
        assert torch.equal(whole[0][5:], share[0]) and torch.equal(whole[1][5:], share[1])
        assert not torch.equal(whole[0], random_crops(images, masks, 10, 6, foreground=foreground)[0])
    corners = torch.cat([random_crops(images, masks, 10, seed)[0][:, 1:, 0, 0] for seed in range(200)])
    counts = Counter(map(tuple, corners.tolist()))
    assert set(counts) == set(product(range(15), range(11)))  # 1600 crops, 165 places


def test_crops_hold_foreground_as_often_as_asked():
    images, masks = numbered(4, 60, 60)
    masks[0, 59, 59], masks[1, 0, 30] = 1, 2  # one pixel each; image 2 has none, image 3 has ignored ones only
    masks[3] = 255
    crops = [random_crops(images, masks, 12, seed, foreground=0.5, ignore_index=255) for seed in range(300)]
    held = torch.stack([(labels > 0).flatten(1).any(1) for _, labels in crops]).double().mean(0)
    assert 0.4 < held[0] < 0.62 and 0.4 < held[1] < 0.65 and held[2] == 0
    plain = [random_crops(images, masks, 12, seed) for seed in range(300)]
    for row in (2, 3):  # where there is none, every place is as likely as without the option
        assert all(torch.equal(one[0][row], other[0][row]) for one, other in zip(crops, plain))
    always = torch.stack([random_crops(images, masks, 12, seed, foreground=1.0)[1] for seed in range(100)])
    assert (always[:, :2] > 0).flatten(2).any(2).all()
    where = Counter((labels[1] == 2).nonzero()[0, 1].item() for labels in always)
    assert len(where) == 12, "the pixel lies anywhere in the crop"


@pytest.mark.parametrize("size", [0, 21])
def test_crops_beyond_the_image_are_refused(size):
    with pytest.raises(ValueError, match=f"crops of {size} pixels do not fit into images of 30 x 20"):
        random_crops(*numbered(1, 30, 20), size, 1)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_draws_the_same_and_never_waits():
    images, masks = batch(16, 3, 65, 48)
    settings = Augmentation(operations=GEOMETRIC)
    expected_images, expected_masks = settings(images, masks, 4)
    on_device = images.cuda(), masks.cuda()
    settings(*on_device, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        new_images, new_masks = settings(*on_device, 4)
        Augmentation()(*on_device, 4)
        crops = random_crops(*on_device, 32, 4, foreground=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert new_images.is_cuda and new_masks.is_cuda
    assert all(torch.equal(there.cpu(), here) for there, here in zip(crops, random_crops(images, masks, 32, 4, foreground=0.5)))
    assert (new_images.cpu() - expected_images).abs().mean() < 1e-3 and (new_masks.cpu() != expected_masks).double().mean() < 1e-3
