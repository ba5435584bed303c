"""Random changes of images and masks together, each image its own, on the training device: ten operations, one resampling."""
from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from qtseg.data import normalise

Shape = tuple[int, int, int]  # channels, height, width of one image


class Operation(NamedTuple):
    """One entry of the recipe: what kind it is, how its numbers are drawn, and, if it changes colours, how it is applied."""

    kind: str  # "affine", "displacement" or "photometric"
    draw: Callable[[Generator, float, Shape], Any]  # (random, strength, shape) -> the numbers of one image
    apply: Callable[[Tensor, Any, Generator], Tensor] | None = None  # photometric only: (one image [C, H, W], its numbers, noise)


def uniform(random: Generator, low: float, high: float) -> float:
    """Draw one number between low and high, each equally likely."""
    return low + (high - low) * torch.rand((), generator=random, dtype=torch.float64).item()


def draw_vertical_flip(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """Upside down with probability 0.5 (imgaug's Flipud); a matrix [3, 3] in pixels about the centre."""
    return np.diag([1.0, -1.0 if uniform(random, 0, 1) < 0.5 * min(strength, 1) else 1.0, 1.0])


def draw_horizontal_flip(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """Left to right with probability 0.5 (imgaug's Fliplr); a matrix [3, 3] in pixels about the centre."""
    return np.diag([-1.0 if uniform(random, 0, 1) < 0.5 * min(strength, 1) else 1.0, 1.0, 1.0])


def draw_scale(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """Factors 0.5 to 2, one for x and one for y; a matrix [3, 3] in pixels about the centre."""
    low, high = 0.5**strength, 2.0**strength
    return np.diag([uniform(random, low, high), uniform(random, low, high), 1.0])


def draw_rotate(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """An angle within 40 degrees either way; a matrix [3, 3] in pixels about the centre."""
    angle = math.radians(uniform(random, -40 * strength, 40 * strength))
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def draw_shear(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """Vertical lines lean by up to 16 degrees either way, rows stay rows; a matrix [3, 3] in pixels about the centre."""
    angle = math.radians(uniform(random, -16 * strength, 16 * strength))
    return np.array([[1, math.tan(angle), 0], [0, 1, 0], [0, 0, 1]])


def draw_translate(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """A shift of up to 20 % of the width in x and of the height in y; a matrix [3, 3] in pixels about the centre."""
    _, height, width = shape
    shift_x, shift_y = (uniform(random, -0.2 * strength, 0.2 * strength) for _ in range(2))
    return np.array([[1, 0, shift_x * width], [0, 1, shift_y * height], [0, 0, 1]])


def draw_piecewise_affine(random: Generator, strength: float, shape: Shape) -> np.ndarray:
    """4x4 control points, each moved by a normal whose sigma is 0.008 to 0.03 of the image: float32 [2 (x, y), 4, 4], shares."""
    scale = uniform(random, 0.008 * strength, 0.03 * strength)
    return scale * torch.randn((2, 4, 4), generator=random).numpy()


def draw_gaussian_noise(random: Generator, strength: float, shape: Shape) -> float:
    """The noise's sigma: 0.005 of the full range 0..255, so 1.275 grey levels, here in units of [-1, 1]."""
    return strength * 0.005 * 255 / 127.5


def add_gaussian_noise(image: Tensor, sigma: float, noise: Generator) -> Tensor:
    """Add normal noise, one value per pixel for all its channels: [C, H, W] -> the same."""
    field = torch.randn((1, *image.shape[1:]), generator=noise, device=image.device)  # [1, H, W]
    return torch.add(image, field, alpha=sigma)


def draw_gaussian_blur(random: Generator, strength: float, shape: Shape) -> float:
    """The blur's sigma in pixels: 1."""
    return strength * 1.0


def gaussian_blur(image: Tensor, sigma: float, noise: Generator) -> Tensor:
    """Blur along y, then along x, edge pixels repeated: [C, H, W] -> the same. 5 taps for sigma 1, as imgaug takes."""
    radius = math.ceil(2 * sigma)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    image = F.pad(image[None], (radius,) * 4, mode="replicate")[0]  # [C, H + 2 radius, W + 2 radius]
    for axis in (1, 2):
        size = image.shape[axis] - 2 * radius
        shifted = [image.narrow(axis, start, size) for start in range(len(weights))]
        image = shifted[0] * (weights[0] / sum(weights))
        for one, weight in zip(shifted[1:], weights[1:]):
            image.add_(one, alpha=weight / sum(weights))
    return image


def draw_contrast(random: Generator, strength: float, shape: Shape) -> list[float]:
    """Factors 0.5 to 1.5, one per channel with probability 0.5, otherwise one for all channels."""
    low, high = 1 - 0.5 * strength, 1 + 0.5 * strength
    if uniform(random, 0, 1) < 0.5:
        return [uniform(random, low, high) for _ in range(shape[0])]
    return [uniform(random, low, high)] * shape[0]


def change_contrast(image: Tensor, factors: list[float], noise: Generator) -> Tensor:
    """Stretch each channel's distance to the grey level 127 by its factor: [C, H, W] -> the same."""
    grey = 127 / 127.5 - 1
    return torch.stack([plane * factor + grey * (1 - factor) for plane, factor in zip(image, factors)])


def _on(device: torch.device, numbers: Any) -> Tensor:
    """Drawn numbers as a float32 tensor on the device, without waiting for it."""
    return torch.as_tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


OPERATIONS: dict[str, Operation] = {
    "vertical_flip": Operation("affine", draw_vertical_flip),
    "horizontal_flip": Operation("affine", draw_horizontal_flip),
    "gaussian_noise": Operation("photometric", draw_gaussian_noise, add_gaussian_noise),
    "gaussian_blur": Operation("photometric", draw_gaussian_blur, gaussian_blur),
    "contrast": Operation("photometric", draw_contrast, change_contrast),
    "scale": Operation("affine", draw_scale),
    "rotate": Operation("affine", draw_rotate),
    "shear": Operation("affine", draw_shear),
    "piecewise_affine": Operation("displacement", draw_piecewise_affine),
    "translate": Operation("affine", draw_translate),
}

Steps = list[tuple[str, Any]]  # what one image goes through, in order: (name of the operation, its drawn numbers)


class Geometry(NamedTuple):
    """Where an output pixel q looks in the source: before · (p + field(p)) with p = after · q, in pixels about the centre."""

    before: np.ndarray  # [3, 3], float64
    field: np.ndarray | None  # [2, 4, 4], shares of the image's size, or None
    after: np.ndarray  # [3, 3], float64

    @property
    def matrix(self) -> np.ndarray:
        """Output pixel -> source pixel where the field is left out: [3, 3]."""
        return self.before @ self.after

    @property
    def flipped_axes(self) -> tuple[int, ...] | None:
        """Axes of [C, H, W] to flip if flips are all there is: (), (1,), (2,) or (1, 2); None where a warp is needed."""
        signs = np.diag(self.matrix)[:2]
        if self.field is not None or not np.array_equal(self.matrix, np.diag([*np.sign(signs), 1])):
            return None
        return tuple(axis for axis, sign in ((1, signs[1]), (2, signs[0])) if sign < 0)


def compose(steps: Steps) -> Geometry:
    """Put all geometric steps of one image, in their order, into one map from output to source."""
    matrices, field = [np.eye(3), np.eye(3)], None
    for name, numbers in steps:
        if OPERATIONS[name].kind == "affine":
            place = 0 if field is None else 1
            matrices[place] = numbers @ matrices[place]  # a later step acts on what an earlier one gave
        elif OPERATIONS[name].kind == "displacement":
            field = numbers
    return Geometry(np.linalg.inv(matrices[0]), field, np.linalg.inv(matrices[1]))


def _normalised(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """A matrix [3, 3] in pixels about the centre as [2, 3] in grid_sample's units, where the image spans -1 to 1."""
    units = np.diag([2 / width, 2 / height, 1])
    return (units @ matrix @ np.linalg.inv(units))[:2]


def affine_positions(theta: Tensor, height: int, width: int) -> Tensor:
    """Send every pixel centre of the output through a matrix: [n, 2, 3] -> [n, 2 (x, y), H, W], in grid_sample's units."""
    x, y = ((2 * torch.arange(size, device=theta.device) + 1) / size - 1 for size in (width, height))  # [W], [H]
    theta = theta[..., None, None]  # [n, 2, 3, 1, 1]
    return theta[:, :, 0] * x + (theta[:, :, 1] * y[:, None] + theta[:, :, 2])


def displace(positions: Tensor, field: Tensor) -> Tensor:
    """Add to each position the displacement found there: [2, H, W], [2, 4, 4] in shares of the image -> [2, H, W]."""
    smooth = F.interpolate(2 * field[None], size=(31, 31), mode="bicubic", align_corners=True)  # the image is 2 units wide
    there = positions.permute(1, 2, 0)[None]  # [1, H, W, 2]
    return positions + F.grid_sample(smooth, there, mode="bilinear", padding_mode="border", align_corners=True)[0]


def sampling_grid(geometries: list[Geometry], height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Where each output pixel looks in the source: [n, H, W, 2 (x, y)], float32, in grid_sample's units (align_corners=False)."""
    last = [one.matrix if one.field is None else one.after for one in geometries]
    positions = affine_positions(_on(device, np.stack([_normalised(matrix, height, width) for matrix in last])), height, width)
    for row, one in enumerate(geometries):
        if one.field is not None:
            x, y = displace(positions[row], _on(device, one.field))  # [H, W] each
            before = _normalised(one.before, height, width).tolist()
            for axis, (from_x, from_y, shift) in enumerate(before):
                positions[row, axis] = from_x * x + from_y * y + shift
    return positions.permute(0, 2, 3, 1)  # [n, 2, H, W] -> [n, H, W, 2]


def warp(images: Tensor, masks: Tensor, grid: Tensor, fill: Tensor) -> tuple[Tensor, Tensor]:
    """Resample images and masks once, on one grid: uint8 [n, C, H, W] and [n, H, W], [n, H, W, 2], uint8 [C] -> float32, float32.

    Images come out in [-1, 1], interpolated (bilinear), `fill` around them; masks take the nearest pixel's class, 0 around them.
    """
    fill = normalise(fill[None, :, None, None])  # grid_sample knows zeros around an image, so let fill be the zero
    images = F.grid_sample(normalise(images) - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    masks = F.grid_sample(masks[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return images.add_(fill), masks[:, 0]


def apply_geometry(images: Tensor, masks: Tensor, geometries: list[Geometry], fill: Tensor) -> tuple[Tensor, Tensor]:
    """Move each image and its mask: uint8 [B, C, H, W], [B, H, W], uint8 [C] -> float32 in [-1, 1], int64. Flips are exact."""
    new_images, new_masks = normalise(images), masks.to(torch.int64, copy=True)
    warped = [row for row, geometry in enumerate(geometries) if geometry.flipped_axes is None]
    for row, geometry in enumerate(geometries):
        if geometry.flipped_axes:  # axes of [C, H, W]; a mask [H, W] lacks the first
            new_images[row] = new_images[row].flip(geometry.flipped_axes)
            new_masks[row] = masks[row].flip([axis - 1 for axis in geometry.flipped_axes])
    if warped:
        grid = sampling_grid([geometries[row] for row in warped], *images.shape[2:], device=images.device)
        pairs = warp(torch.stack([images[row] for row in warped]), torch.stack([masks[row] for row in warped]), grid, fill)
        for row, image, mask in zip(warped, *pairs):
            new_images[row], new_masks[row] = image, mask
    return new_images, new_masks


def apply_photometry(images: Tensor, steps: list[Steps], noise: Generator) -> Tensor:
    """Change colours in place, each image's photometric steps in their drawn order: float [B, C, H, W]."""
    for row, one in enumerate(steps):
        for name, numbers in one:
            if OPERATIONS[name].kind == "photometric":
                images[row] = OPERATIONS[name].apply(images[row], numbers, noise)
    return images


@dataclass(frozen=True)
class Augmentation:
    """The recipe: for each image between 0 and `most` of `operations`, drawn without replacement, in random order.

    `strength` scales every range: 0 leaves all images alone, 1 is the recipe, 2 the limit. `fill` is the colour outside the
    image, a uint8 value per channel in the stored colour space. Raises ValueError for bad arguments. Source: the official recipe.
    """

    operations: tuple[str, ...] = tuple(OPERATIONS)
    most: int = 4
    strength: float = 1.0
    fill: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self):
        _check_settings(self)
        for name in ("operations", "fill"):  # lists, as YAML files have them, are welcome
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def draw(self, count: int, shape: Shape, seed: int) -> list[Steps]:
        """Decide for `count` images of `shape` (channels, height, width) what happens to each; the same seed, the same decisions."""
        random = seeded(seed)
        return [self._draw_one(shape, random) for _ in range(count)]

    def _draw_one(self, shape: Shape, random: Generator) -> Steps:
        most = min(self.most, len(self.operations)) if self.strength > 0 else 0
        chosen = int(torch.randint(most + 1, (), generator=random))
        order = torch.randperm(len(self.operations), generator=random)[:chosen].tolist()
        names = [self.operations[position] for position in order]
        return [(name, OPERATIONS[name].draw(random, self.strength, shape)) for name in names]

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 [B, C, H, W] and integer [B, H, W] on one device -> float32 [B, C, H, W] in [-1, 1] and int64 [B, H, W] there."""
        _check_batch(images, masks)
        fill = _fill_for(self.fill, images.shape[1]).to(images.device, non_blocking=True)
        steps = self.draw(len(images), tuple(images.shape[1:]), seed)
        images, masks = apply_geometry(images, masks, [compose(one) for one in steps], fill)
        images = apply_photometry(images, steps, seeded(seed, "noise", images.device))
        return images.clamp_(-1, 1), masks


def seeded(seed: int, purpose: str = "decisions", device: torch.device | str = "cpu") -> Generator:
    """A random generator for one purpose, made from every digit of a seed of any size."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    return Generator(device).manual_seed(zlib.crc32(f"{purpose} {int(seed)}".encode()))


def _check_settings(settings: Augmentation) -> None:
    """Raise ValueError for the first setting that makes no sense."""
    names, most, strength, fill = settings.operations, settings.most, settings.strength, settings.fill
    if not isinstance(names, (tuple, list)) or len(set(names)) != len(names):
        raise ValueError(f"operations must be a tuple of different names, got {names!r}")
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise ValueError(f"unknown operations {unknown}; known are {list(OPERATIONS)}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ValueError(f"most must be an integer >= 0, got {most!r}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 2:
        raise ValueError(f"strength must be a number from 0 (no change) to 2, got {strength!r}")
    if not isinstance(fill, (tuple, list)) or not fill or not all(isinstance(value, (int, np.integer)) and 0 <= value <= 255 for value in fill):
        raise ValueError(f"fill must be one integer of 0..255 per channel, got {fill!r}")


def _fill_for(fill: tuple[int, ...], channels: int) -> Tensor:
    """The fill as uint8 [C]; equal values fit any number of channels."""
    if len(set(fill)) == 1:
        fill = fill[:1] * channels
    if len(fill) != channels:
        raise ValueError(f"fill has {len(fill)} values, the images have {channels} channels")
    return torch.tensor(fill, dtype=torch.uint8)


def _check_batch(images: Tensor, masks: Tensor) -> None:
    """Raise ValueError unless images are uint8 [B, C, H, W] and masks integers [B, H, W] of the same size on the same device."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images must be uint8 [B, C, H, W], got {_described(images)}")
    if not isinstance(masks, Tensor) or masks.dtype not in (torch.uint8, torch.int64) or masks.ndim != 3:
        raise ValueError(f"masks must be uint8 or int64 [B, H, W], got {_described(masks)}")
    if masks.shape != images.shape[:1] + images.shape[2:] or masks.device != images.device:
        raise ValueError(f"images and masks must have one size on one device, got {_described(images)} and {_described(masks)}")


def _described(value: Any) -> str:
    """What came, for an error."""
    return f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
