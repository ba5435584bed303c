"""Synthetic dermoscopy, ultrasound, endoscopy and cell images with exact masks: the data that comes with the package."""
from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np

FAMILIES = ("dermoscopy", "ultrasound", "endoscopy", "nuclei")
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "dermoscopy": ("background", "lesion"),
    "ultrasound": ("background", "lesion"),
    "endoscopy": ("background", "non-neoplastic polyp", "neoplastic polyp"),
    "nuclei": ("background", "nucleus"),
}


# --- tools
CHANNELS = ("grey", "red", "green", "blue")


def _channel(image: np.ndarray, name: str) -> np.ndarray:
    """One of CHANNELS of an RGB image uint8 [H, W, 3]: uint8 [H, W]."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if name == "grey" else image[..., CHANNELS.index(name) - 1]


def best_threshold(images: np.ndarray, masks: np.ndarray) -> tuple[float, str, int, bool]:
    """Find the one threshold that suits a whole set best: images uint8 [N, H, W, 3], masks [N, H, W], foreground where not 0.

    Every value of every channel is tried, with the foreground above and below. Returns the mean of the images' Dice in percent,
    the channel, the threshold t, and whether the foreground is bright (value > t) or dark (value <= t).
    """
    best = (-1.0, "", 0, False)
    for name in CHANNELS:
        values = [_channel(image, name) for image in images]
        within = np.stack([np.bincount(value[mask != 0], minlength=256) for value, mask in zip(values, masks)])  # [N, 256]
        hits, marked = within.cumsum(axis=1), np.stack([np.bincount(v.ravel(), minlength=256) for v in values]).cumsum(axis=1)
        true, pixels = hits[:, -1:], marked[:, -1:]  # [N, 1]
        for bright in (False, True):
            found, hit = (pixels - marked, true - hits) if bright else (marked, hits)  # column t: what threshold t finds
            dice = np.where(found + true == 0, 100.0, 200 * hit / np.maximum(found + true, 1)).mean(axis=0)  # [256]
            if dice.max() > best[0]:
                best = (float(dice.max()), name, int(dice.argmax()), bright)
    return best


def fit_to(field: np.ndarray, size: int) -> np.ndarray:
    """Stretch or shrink a field [rows, columns] to [size, size], smoothly."""
    return cv2.resize(field, (size, size), interpolation=cv2.INTER_AREA if size < min(field.shape) else cv2.INTER_CUBIC)


def noise(rng: np.random.Generator, cells: int | tuple[int, int], size: int) -> np.ndarray:
    """Smooth random field, float32 [size, size], about -2 to 2: cells x cells (or rows x columns) normal numbers, stretched.

    The number of random numbers does not depend on the size, so one seed is one picture at every size.
    """
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    return fit_to(rng.standard_normal((rows, columns), dtype=np.float32), size)


def outline(rng: np.random.Generator, radius: float | np.ndarray, roughness: float, waves: int = 7, points: int = 128,
            ) -> np.ndarray:
    """Closed curve round the origin, [points, 2] (x, y): a circle whose radius is a Fourier series of the angle.

    Lengths are in units of the image's side. Radii [n] give n curves [n, points, 2].
    """
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    order = np.arange(2, waves + 1)  # [waves - 1]; order 1 would only shift the circle
    shape = (*np.shape(radius), len(order), 1)
    size = rng.normal(0, roughness, shape) / order[:, None]
    bulge = (size * np.cos(order[:, None] * angle + rng.uniform(0, 2 * np.pi, shape))).sum(axis=-2)  # [..., points]
    reach = np.asarray(radius)[..., None] * np.clip(1 + bulge, 0.5, 1.5)
    return np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=-1)


def stretched(curve: np.ndarray, factor: float | np.ndarray, angle: float | np.ndarray) -> np.ndarray:
    """Make curves [..., points, 2] longer along the direction `angle` and narrower across it; their area stays."""
    long, wide = np.sqrt(factor), 1 / np.sqrt(factor)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[long * cos * cos + wide * sin * sin, (long - wide) * cos * sin],
                       [(long - wide) * cos * sin, long * sin * sin + wide * cos * cos]])  # [2, 2, ...]
    return curve @ np.moveaxis(matrix, (0, 1), (-2, -1))


def paint(curves: np.ndarray, size: int, values: np.ndarray | None = None) -> np.ndarray:
    """Fill curves [n, points, 2], later ones on top: uint8 [size, size]; a pixel at an edge gets its share of both sides.

    Without values: coverage, 255 where a pixel lies wholly inside. Drawn four times finer and averaged, in whole numbers, so
    that every machine paints the same.
    """
    canvas = np.zeros((4 * size, 4 * size), np.uint8)
    corners = np.rint(curves * (4 * size * 16) - 8).astype(np.int32)  # 16ths of a fine pixel, counted from the first one's centre
    for corner, value in zip(corners, [255] * len(curves) if values is None else values.tolist()):
        cv2.fillPoly(canvas, [corner], value, shift=4)
    half = cv2.resize(canvas, (2 * size, 2 * size), interpolation=cv2.INTER_AREA)  # twice by 2 is six times faster than once by 4
    return cv2.resize(half, (size, size), interpolation=cv2.INTER_AREA)


def share(cover: np.ndarray) -> np.ndarray:
    """Coverage uint8 0..255 -> float32 0..1."""
    return cover * np.float32(1 / 255)


def blur(field: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a float32 field [size, size], sigma in units of the side; done at 64 x 64 where that loses nothing."""
    size = len(field)
    small = cv2.resize(field, (64, 64), interpolation=cv2.INTER_AREA) if sigma > 0.03 and size > 64 else field
    small = cv2.GaussianBlur(small, (0, 0), max(sigma * len(small), 0.3), borderType=cv2.BORDER_REPLICATE)
    return small if len(small) == size else cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR)


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y [size, 1] and x [1, size] of the pixels' centres in units of the image's side, float32."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centres[:, None], centres[None, :]


def colour(red: float, green: float, blue: float) -> np.ndarray:
    """A colour as float32 [3, 1, 1], ready to meet a field [size, size]. Colours come first here: that is twenty times faster."""
    return np.array([red, green, blue], np.float32)[:, None, None]


# --- dermoscopy
def _skin(rng: np.random.Generator, size: int) -> np.ndarray:
    """Skin of any tone in uneven light, float32 [3, size, size], 0..255."""
    y, x = grid(size)
    tone = rng.uniform(0, 1)
    base = (1 - tone) * colour(238, 200, 182) + tone * colour(132, 88, 66)
    light = 1 + rng.uniform(-0.45, 0.45) * (y - 0.5) + rng.uniform(-0.45, 0.45) * (x - 0.5)
    light = light + 0.03 * noise(rng, 5, size) + 0.025 * noise(rng, 64, size)  # slow changes, and pores
    blush = noise(rng, 4, size)
    return light * base * (1 + blush * colour(0.012, -0.03, -0.018))


def _pigment(rng: np.random.Generator, size: int) -> np.ndarray:
    """How strongly a lesion absorbs red, green and blue at each pixel, float32 [3, size, size]; below 0: paler than the skin."""
    network = 0.6 - np.abs(noise(rng, 20, size))  # thin lines where the field passes zero
    pattern = np.maximum(1 + 0.25 * noise(rng, 4, size) + 0.25 * network, 0.5)
    kind = rng.uniform()
    if kind < 0.15:  # pale
        return pattern * (colour(-0.08, -0.2, -0.22) * rng.uniform(0.8, 1.2))
    if kind < 0.35:  # pink, hardly any melanin
        return pattern * (colour(0.04, 0.34, 0.26) * rng.uniform(0.8, 1.3))
    return pattern * (colour(0.5, 0.85, 1.0) * rng.uniform(0.45, 1.15))  # brown


def _hairs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Up to a dozen hairs, bent lines across the skin: coverage uint8 [size, size]; a third of the images has none."""
    canvas = np.zeros((size, size), np.uint8)
    step = np.linspace(0, 1, 16)[:, None]
    lean = rng.uniform(0, np.pi)
    for _ in range(rng.integers(-7, 14)):
        start, bend, angle = rng.uniform(-0.1, 1.1, 2), rng.uniform(-0.15, 0.15, 2), lean + rng.normal(0, 0.5)
        way = rng.uniform(0.4, 1.0) * np.array([np.cos(angle), np.sin(angle)])
        curve = start + step * way + 4 * step * (1 - step) * bend  # [16, 2]
        thick = max(1, round(size * rng.uniform(0.006, 0.012)))
        cv2.polylines(canvas, [np.rint(curve * size * 16).astype(np.int32)], False, 255, thick, cv2.LINE_AA, shift=4)
    return canvas


def _lens(rng: np.random.Generator, size: int) -> np.ndarray:
    """How much light the instrument passes, float32 [size, size]: darker outwards, and at times a round black rim."""
    y, x = grid(size)
    far = np.sqrt((y - 0.5) ** 2 + (x - 0.5) ** 2)
    passed = 1 - rng.uniform(0.2, 0.9) * np.maximum(far - 0.25, 0)
    if rng.uniform() < 0.4:
        passed = passed * np.clip((rng.uniform(0.54, 0.62) - far) * (0.5 * size), 0.05, 1)
    return passed


def _dermoscopy(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 [3, size, size] and mask [size, size]: an irregular lesion, then hairs, then the lens."""
    curve = stretched(outline(rng, rng.uniform(0.19, 0.31), rng.uniform(0.05, 0.3)), rng.uniform(1, 1.5), rng.uniform(0, np.pi))
    cover = paint(curve[None] + rng.uniform(0.4, 0.6, 2), size)
    image = _skin(rng, size) * np.exp(-share(cover) * _pigment(rng, size))  # pigment takes its share of the light
    hair = rng.uniform(25, 70) * colour(1, 0.75, 0.6)
    image += 0.85 * share(_hairs(rng, size)) * (hair - image)
    return image * _lens(rng, size), cover > 127


# --- ultrasound
def speckle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Speckle, float32 [size, size], mean about 1: mean of two looks, each the length of a complex random number (Rayleigh)."""
    real, imaginary = rng.standard_normal((2, 2, 112, 72), dtype=np.float32)  # [looks, rows, columns]; finer along the beam
    looks = np.sqrt(real**2 + imaginary**2) / np.float32(np.sqrt(np.pi / 2))
    return np.maximum(fit_to(looks.mean(axis=0), size), 0)


def _tissue(rng: np.random.Generator, size: int, dark: float) -> np.ndarray:
    """Echo strength of a breast, float32 [size, size]: skin, fat, gland, fascia, muscle; fat and muscle are `dark`."""
    y, _ = grid(size)
    depth = y + 0.035 * noise(rng, (3, 4), size) + 0.012 * noise(rng, (6, 10), size)
    skin, fat, gland = rng.uniform(0.04, 0.06), rng.uniform(0.16, 0.34), rng.uniform(0.68, 0.84)  # where each layer ends
    bright = rng.uniform(0.45, 0.75)
    places = [0, skin, skin + 0.02, fat - 0.01, fat + 0.01, gland - 0.01, gland, gland + 0.02, gland + 0.03, 1.2]
    values = [1, 0.9, dark, 1.1 * dark, bright, 0.9 * bright, 1.3, 1.2, dark, 0.7 * dark]
    return np.interp(depth, places, values).astype(np.float32) * (1 + 0.22 * noise(rng, (14, 7), size))


def _shadow(rng: np.random.Generator, inside: np.ndarray) -> np.ndarray:
    """What reaches the depths, float32 [size, size]: less below a lesion (shadow), at times more (a cyst lets sound pass)."""
    below = np.maximum.accumulate(inside, axis=0) - inside  # 1 under the lesion, 0 elsewhere
    strength = rng.uniform(0.35, 0.85) if rng.uniform() < 0.8 else rng.uniform(-0.6, -0.2)
    return 1 - strength * blur(below, 0.02)


def _contact(rng: np.random.Generator, size: int) -> np.ndarray:
    """Gain, its change with depth, and up to two dark stripes of poor contact with the skin: float32 [size, size]."""
    y, x = grid(size)
    gain = rng.uniform(0.6, 1.2) + rng.uniform(-0.4, 0.4) * y
    for _ in range(rng.integers(0, 3)):
        off = (x - rng.uniform(0, 1)) / rng.uniform(0.03, 0.09)
        gain = gain * (1 - rng.uniform(0.3, 0.75) * np.exp(-off * off))
    return gain


def _ultrasound(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 [3, size, size] and mask [size, size]: a dark lesion with a bright rim in the gland, its shadow, speckle."""
    dark = rng.uniform(0.08, 0.17)
    curve = stretched(outline(rng, rng.uniform(0.17, 0.26), rng.uniform(0.03, 0.25)), rng.uniform(0.9, 1.8), rng.normal(0, 0.2))
    cover = paint(curve[None] + [rng.uniform(0.32, 0.68), rng.uniform(0.4, 0.56)], size)
    inside = share(cover)
    echo = _tissue(rng, size, dark) * _shadow(rng, inside)
    echo += rng.uniform(0.3, 0.7) * blur(inside, 0.02) * (1 - inside)  # the rim
    echo += inside * (dark * rng.uniform(0.5, 1.0) * (1 + 0.3 * noise(rng, 8, size)) - echo)
    echo *= _contact(rng, size) * speckle(rng, size)
    grey = 255 / np.float32(np.log(11)) * np.log1p(10 * np.maximum(echo, 0))  # scanners show the logarithm
    return np.broadcast_to(grey, (3, size, size)), cover > 127


# --- endoscopy
def _mucosa(rng: np.random.Generator, size: int) -> np.ndarray:
    """Wall of the gut, float32 [3, size, size]: pink, with fine vessels, and ring folds round the dark lumen."""
    y, x = grid(size)
    away = np.sqrt((y - rng.uniform(-0.1, 1.1)) ** 2 + (x - rng.uniform(-0.1, 1.1)) ** 2) + 0.06 * noise(rng, 4, size)
    wall = 1 / (1 + np.exp((rng.uniform(0.1, 0.24) - away) * 18))  # 0 in the lumen, 1 on the wall
    folds = np.sin(rng.uniform(18, 32) * np.sqrt(np.maximum(away, 0.02)) + rng.uniform(0, 6))
    light = rng.uniform(0.7, 1.1) * (0.1 + 0.9 * wall) * (1 + 0.12 * folds * np.abs(folds) + 0.06 * noise(rng, 5, size))
    light = light * (1 + 0.02 * noise(rng, 96, size))
    vessels = np.exp(-50 * noise(rng, 9, size) ** 2) * np.clip(noise(rng, 4, size), 0, 1)
    return light * (colour(218, 138, 118) + rng.uniform(-1, 1) * colour(8, 22, 20) - vessels * colour(20, 42, 34))


def _pits(rng: np.random.Generator, size: int) -> np.ndarray:
    """Surface of a non-neoplastic polyp, float32 [size, size], 0..1: round spots in loose rows."""
    y, x = grid(size)
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(75, 95)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y + 0.025 * noise(rng, 6, size)
    across = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x + 0.025 * noise(rng, 6, size)
    return np.maximum(np.sin(pitch * along) * np.sin(pitch * across), 0)


def _ridges(rng: np.random.Generator, size: int) -> np.ndarray:
    """Surface of a neoplastic polyp, float32 [size, size], 0..1: winding ridges, the level lines of a smooth field."""
    return 0.5 + 0.5 * np.sin(rng.uniform(7, 10) * noise(rng, 7, size))


def _surface(rng: np.random.Generator, size: int, label: int) -> np.ndarray:
    """What a polyp does to the wall's colour, float32 [3, size, size]: paler, with spots (1), or browner, with ridges (2)."""
    if label == 1:
        tint, marks = colour(1.02, 1.14, 1.12), 0.24 * (_pits(rng, size) - 0.1)
    else:
        tint, marks = colour(0.95, 0.82, 0.80), 0.26 * (_ridges(rng, size) - 0.5)
    return tint ** rng.uniform(-0.1, 1.4) * (1 - marks * colour(0.7, 1.15, 1.1))  # below 0: the other class's tint


def _polyps(rng: np.random.Generator) -> list[tuple[np.ndarray, float, int]]:
    """Outlines [1, 128, 2], radii and classes of an image's polyps: none (4 %), one (61 %), or two on opposite sides."""
    number, angle = int(rng.choice(3, p=[0.04, 0.61, 0.35])), rng.uniform(0, 2 * np.pi)
    polyps = []
    for side in range(number):
        radius = rng.uniform(0.17, 0.27) if number == 1 else rng.uniform(0.13, 0.18)
        far = rng.uniform(0.02, 0.16) if number == 1 else rng.uniform(0.2, 0.24)
        middle = 0.5 + far * np.array([np.cos(angle + np.pi * side), np.sin(angle + np.pi * side)])
        curve = stretched(outline(rng, radius, 0.1, waves=4), rng.uniform(1, 1.35), rng.uniform(0, np.pi))
        polyps.append((curve[None] + middle, radius, int(rng.integers(1, 3))))
    return polyps


def _gleams(rng: np.random.Generator, size: int) -> np.ndarray:
    """Specular highlights, where the wet wall mirrors the lamp: coverage uint8 [size, size]."""
    count = int(rng.integers(3, 14))
    spots = outline(rng, rng.uniform(0.006, 0.02, count), 0.25, waves=4, points=16)
    spots = stretched(spots, rng.uniform(1, 3, count), rng.uniform(0, np.pi, count))
    return paint(spots + rng.normal(0.5, 0.2, (count, 1, 2)), size)


def _endoscopy(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 [3, size, size] and mask [size, size], 0, 1, 2: polyps on the wall, highlights, at times cut corners."""
    image, mask = _mucosa(rng, size), np.zeros((size, size), np.uint8)
    for curve, radius, label in _polyps(rng):
        cover = paint(curve, size)
        inside = share(cover)
        dome = blur(inside, 0.3 * radius)
        image *= 1 - 0.7 * dome * (1 - inside)  # shade round the foot
        lit = (0.25 * image + 0.75 * image.mean(axis=(1, 2), keepdims=True)) * (0.56 + 0.58 * dome)  # the lamp is at the camera
        image += inside * (lit * _surface(rng, size, label) - image)
        mask[cover > 127] = label
    image += share(_gleams(rng, size)) * (235 - image)
    if rng.uniform() < 0.5:
        y, x = grid(size)
        image *= np.clip((rng.uniform(0.82, 0.9) - np.abs(y - 0.5) - np.abs(x - 0.5)) * size, 0.03, 1)
    return image, mask


# --- nuclei
def _cells(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Nuclei scattered over a jittered grid, a third with a partner that touches it: (stain, coverage), uint8 [size, size]."""
    rows = int(rng.integers(4, 7))
    places = (np.indices((rows, rows)).reshape(2, -1).T + rng.uniform(0.1, 0.9, (rows * rows, 2))) / rows  # [rows**2, 2]
    places = places[rng.uniform(size=len(places)) < rng.uniform(0.4, 0.85)]
    radius = rng.uniform(0.045, 0.062) * np.clip(rng.normal(1, 0.18, 2 * len(places)), 0.8, 1.5)
    angle = rng.uniform(0, 2 * np.pi, (len(places), 1))
    partners = places + 1.8 * radius[: len(places), None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    keep = np.concatenate([np.full(len(places), True), rng.uniform(size=len(places)) < 0.35])
    curves = outline(rng, radius, 0.08, waves=4, points=24)  # [2 * places, 24, 2]
    curves = stretched(curves, rng.uniform(1, 1.6, len(radius)), rng.uniform(0, np.pi, len(radius)))
    curves = curves + np.concatenate([places, partners])[:, None]
    stain = np.clip(rng.uniform(90, 200) * rng.normal(1, 0.25, len(radius)), 60, 255).astype(int)
    return paint(curves[keep], size, stain[keep]), paint(curves[keep], size)


def _histology(rng: np.random.Generator, stain: np.ndarray) -> np.ndarray:
    """Haematoxylin (blue, in nuclei) and eosin (pink): each dye takes its share of a white light, float32 [3, size, size]."""
    size = len(stain)
    eosin = np.maximum(0.35 + 0.12 * noise(rng, 5, size) + 0.14 * noise(rng, (20, 10), size), 0.05)
    haze = np.clip(noise(rng, 4, size), 0, 1.5)  # cytoplasm that took the blue dye as well
    density = rng.uniform(0.6, 1.6) * eosin * colour(0.18, 0.9, 0.4)
    density = density + (rng.uniform(0.7, 1.2) * stain + rng.uniform(0, 0.35) * haze) * colour(1.0, 1.1, 0.45)
    y, x = grid(size)
    lamp = rng.uniform(140, 245) + rng.uniform(-70, 70) * (x - 0.5) + rng.uniform(-70, 70) * (y - 0.5)
    return lamp * np.exp(-density)


def _fluorescence(rng: np.random.Generator, stain: np.ndarray) -> np.ndarray:
    """Nuclei that glow in a dark field, with haze: light adds up, float32 [3, size, size]; grey or blue."""
    size = len(stain)
    y, x = grid(size)
    haze = rng.uniform(0.06, 0.5) + rng.uniform(-0.3, 0.3) * (x - 0.5) + rng.uniform(-0.3, 0.3) * (y - 0.5)
    light = np.maximum(haze + 0.06 * noise(rng, 4, size), 0.02) + 0.015 * noise(rng, 128, size)
    light += 0.7 * stain + 0.5 * blur(stain, 0.05)  # each nucleus, and its glow
    dye = colour(1, 1, 1) if rng.uniform() < 0.5 else colour(0.35, 0.55, 1.15)
    return rng.uniform(65, 220) * light * dye  # the exposure differs from image to image


def _nuclei(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 [3, size, size] and mask [size, size]: nuclei of varying stain, in one of two appearances."""
    stain, cover = _cells(rng, size)
    stain = share(stain) * (1 + 0.12 * noise(rng, 48, size))  # chromatin
    return (_histology if rng.uniform() < 0.5 else _fluorescence)(rng, stain), cover > 127


# --- the front door
_DRAW = {"dermoscopy": _dermoscopy, "ultrasound": _ultrasound, "endoscopy": _endoscopy, "nuclei": _nuclei}


def _check(name: str, value: int, least: int, most: float = float("inf")) -> None:
    """Raise ValueError unless the value is a whole number between least and most."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value <= most:
        limit = f"from {least} to {most}" if most < float("inf") else f"of at least {least}"
        raise ValueError(f"{name} must be a whole number {limit}, got {value!r}")


def phantom(family: str, seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Draw one phantom: (image uint8 [size, size, 3] RGB, mask uint8 [size, size] of class indices, named in CLASS_NAMES).

    The same arguments give the same bytes. Another size gives the same picture, finer or coarser.
    Raises ValueError for an unknown family, a seed below 0 or a size below 32.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    _check("seed", seed, 0)
    _check("size", size, 32)
    image, mask = _DRAW[family](np.random.default_rng([FAMILIES.index(family), seed]), size)  # [3, size, size], [size, size]
    planes = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return cv2.merge(list(planes)), mask.astype(np.uint8)  # [size, size, 3]


# --- folder
COLUMNS = ("id", "image", "mask", "group", "fold", "split", "width", "height")


def write_manifest(folder: str | Path, rows: list[dict], name: str, class_names: tuple[str, ...] | list[str], **extra) -> None:
    """Make a folder a prepared one: write dataset.json (name, classes, extra entries), then manifest.csv, one line per row.

    Rows are dictionaries of COLUMNS; group, fold and split may be missing or None: left empty. The manifest comes last, at one
    stroke: a folder that has one is complete. Raises ValueError for a row that lacks a column or has an unknown one.
    """
    folder = Path(folder)
    for row in rows:
        lacking, unknown = {"id", "image", "mask", "width", "height"} - row.keys(), row.keys() - set(COLUMNS)
        if lacking or unknown:
            trouble = f"lacks {', '.join(sorted(lacking))}" if lacking else f"has the unknown column {', '.join(sorted(unknown))}"
            raise ValueError(f"{folder / 'manifest.csv'}: row {row.get('id', row)!r} {trouble}")
    description = json.dumps({"name": name, "classes": list(class_names), **extra}, indent=2)
    (folder / "dataset.json").write_text(description + "\n", encoding="utf-8")
    unfinished = folder / "manifest.csv.tmp"
    with unfinished.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, folder / "manifest.csv")


MOST = 1_000_000  # images of one folder; also the distance between the seeds of two folders
RECIPE = 1  # raised whenever the same arguments give other pictures, so that a folder of old ones is not taken for new


def _write_pair(folder: Path, family: str, seed: int, size: int, merge: bool) -> dict:
    """Write one image and its mask as PNG; return its row of the manifest, split left out."""
    image, mask = phantom(family, seed, size)
    row = {"id": f"{family}-{seed:07d}", "group": family, "width": size, "height": size}
    row |= {kind: f"{kind}s/{row['id']}.png" for kind in ("image", "mask")}
    for kind, pixels in (("image", cv2.cvtColor(image, cv2.COLOR_RGB2BGR)), ("mask", np.minimum(mask, 1) if merge else mask)):
        (folder / row[kind]).write_bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
    return row


def _split(rows: list[dict]) -> None:
    """Give each row its split, in every family the first 70 % to train, the next 15 % to valid, the rest to test."""
    for family in {row["group"] for row in rows}:
        members = [row for row in rows if row["group"] == family]
        train, valid = max(1, len(members) * 70 // 100), len(members) * 85 // 100
        for place, row in enumerate(members):
            row["split"] = "train" if place < train else "valid" if place < valid else "test"


def _made_with(folder: Path) -> dict | None:
    """The arguments that a finished phantom folder was made with, or None where it is none."""
    try:
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        return description["phantoms"] if (folder / "manifest.csv").exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_prepared(folder: str | Path, family: str = "all", n: int = 200, size: int = 128, seed: int = 0) -> Path:
    """Write n phantoms as a prepared folder and return it; where the same call has made it before, leave it as it is.

    family "all": the four in turn, masks merged to background and foreground. In every family 70 % train, 15 % valid, 15 % test.
    Nothing half-written is left behind. Raises ValueError for wrong arguments, FileExistsError for a folder with other contents.
    """
    if family not in ("all", *FAMILIES):
        raise ValueError(f"family must be all or one of {', '.join(FAMILIES)}, got {family!r}")
    _check("n", n, 1, MOST)
    _check("size", size, 32)
    _check("seed", seed, 0)
    folder = Path(folder).resolve()
    made_with = {"family": family, "n": int(n), "size": int(size), "seed": int(seed), "recipe": RECIPE}
    if _made_with(folder) == made_with:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and holds something else than these phantoms: remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _fill(unfinished, made_with)
        _move(unfinished, folder, made_with)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _fill(folder: Path, made_with: dict) -> None:
    """Write the pictures, dataset.json and manifest.csv into an empty folder."""
    family, n, size, seed = (made_with[key] for key in ("family", "n", "size", "seed"))
    for part in ("images", "masks"):
        (folder / part).mkdir()
    turn = FAMILIES if family == "all" else (family,)
    rows = [_write_pair(folder, turn[i % len(turn)], seed * MOST + i, size, merge=family == "all") for i in range(n)]
    _split(rows)
    classes = ("background", "foreground") if family == "all" else CLASS_NAMES[family]
    write_manifest(folder, rows, f"phantoms: {family}", classes, phantoms=made_with, licence="Apache-2.0, as QTSeg; shows nobody")


def _move(unfinished: Path, folder: Path, made_with: dict) -> None:
    """Rename the finished folder; if another process was faster with the same phantoms, keep its."""
    unfinished.chmod(0o755)  # mkdtemp's folders are for their owner alone
    try:
        if folder.exists():
            folder.rmdir()  # empty
        unfinished.rename(folder)
    except OSError:
        if _made_with(folder) != made_with:
            raise


def main(arguments: list[str] | None = None) -> None:
    """The command line: python -m qtseg.phantoms OUT --n 200."""
    parser = argparse.ArgumentParser(prog="python -m qtseg.phantoms", description="Write phantoms as a prepared folder.")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--n", type=int, default=200, help="number of images (200)")
    parser.add_argument("--family", default="all", help=f"all, {', '.join(FAMILIES)} (all)")
    parser.add_argument("--size", type=int, default=128, help="pixels along each side (128)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (0)")
    chosen = parser.parse_args(arguments)
    try:
        folder = write_prepared(chosen.out, chosen.family, chosen.n, chosen.size, chosen.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"qtseg.phantoms: {error}") from None
    print(f"{folder}: {chosen.n} images ({chosen.family}, seed {chosen.seed}) of {chosen.size} x {chosen.size} pixels, "
          "with masks and manifest.csv")


if __name__ == "__main__" and "__file__" in globals():  # a notebook is __main__ too, but no file
    main()
