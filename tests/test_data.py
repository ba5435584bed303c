"""Data: every file kind read rightly, every problem found before training, folds without leakage, a cache that survives crashes."""
from __future__ import annotations

import csv
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import unicodedata
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, shared_folder, zipped
from qtseg.data import cache as data_cache, layout as data_layout, preprocessing, segmentation, sources, splits as data_splits
from qtseg.data.cache import DataProblems, cache_root, mask_bits, pack_mask, unpack_masks
from qtseg.data.dataset import normalize
from qtseg.data.preprocessing import (PREPROCESSING_FILE, Preprocessing, fitted_size, read_preprocessing, resize_pair,
                                      to_color, to_rgb)
from qtseg.data.reading import read_image, read_mask
from qtseg.data.segmentation import SegmentationData

SHARED = shared_folder() / "data"


def real(name: str):
    return pytest.mark.skipif(not (SHARED / name).is_file(), reason=f"no {name} in {SHARED}")


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A colored picture with some structure, uint8 [height, width, 3]; never gray."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    waves = [120 + 90 * np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0.05, 0.5, (3, 3))]
    return np.clip(np.stack(waves, axis=2), 0, 255).astype(np.uint8)


def blob(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A disc, bool [height, width]."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    return (y - rng.uniform(12, height - 12)) ** 2 + (x - rng.uniform(12, width - 12)) ** 2 < rng.uniform(40, 100)


def save(path: Path, array, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def plain(folder: Path, count: int = 6, first: int = 0, prefix: str = "case", images: str = "images", masks: str = "masks",
          suffix: str = "", extension: str = "png") -> Path:
    """A plain pair of folders with 0/255 masks."""
    for i in range(first, first + count):
        save(folder / images / f"{prefix}{i:03d}.{extension}", picture(i))
        save(folder / masks / f"{prefix}{i:03d}{suffix}.png", blob(i).astype(np.uint8) * 255)
    return folder


def manifest(folder: Path, rows: list[dict], classes=("background", "lesion"), columns=data_layout.COLUMNS) -> Path:
    """manifest.csv and dataset.json, by hand."""
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "dataset.json").write_text(json.dumps({"name": "by hand", "classes": list(classes)}))
    return folder


def prepared(folder: Path, count: int = 12, strata=("a", "b"), **columns) -> tuple[Path, list[dict]]:
    rows = []
    for i in range(count):
        save(folder / "images" / f"p{i:02d}.png", picture(i))
        save(folder / "masks" / f"p{i:02d}.png", blob(i).astype(np.uint8))
        rows.append({"id": f"p{i:02d}", "image": f"images/p{i:02d}.png", "mask": f"masks/p{i:02d}.png", "stratum": strata[i % len(strata)],
                     "width": 48, "height": 40} | {name: value(i) for name, value in columns.items()})
    return manifest(folder, rows), rows


@pytest.fixture
def opened(tmp_path):
    """SegmentationData.open with a private cache, no bar, and small squares."""
    def run(source, **options):
        return SegmentationData.open(source, **{"size": 32, "cache": tmp_path / "cache", "progress": False, "workers": 2} | options)
    return run


# ---------------------------------------------------------------------------------------------------------------- reading
RGB = picture(1)
GRAY = RGB[:, :, 0]


def exact(expected):
    return np.repeat(expected[:, :, None], 3, axis=2) if expected.ndim == 2 else expected


def palette_image(indices: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette(colors)
    return image


INDICES = (GRAY // 90).astype(np.uint8)
PALETTE = [200, 30, 10, 0, 90, 250, 7, 8, 9]
MODES = {
    "1": (Image.fromarray(GRAY > 120), "png", exact(((GRAY > 120) * 255).astype(np.uint8))),
    "L": (Image.fromarray(GRAY), "png", exact(GRAY)),
    "LA": (Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]), "png", exact(GRAY)),
    "RGB": (Image.fromarray(RGB), "png", RGB),
    "RGB bmp": (Image.fromarray(RGB), "bmp", RGB),
    "RGB tif": (Image.fromarray(RGB), "tif", RGB),
    "RGBA": (Image.fromarray(np.dstack([RGB, GRAY])), "png", RGB),
    "P": (palette_image(INDICES, PALETTE), "png", np.array(PALETTE, np.uint8).reshape(-1, 3)[INDICES]),
    "16 bit": (Image.fromarray(GRAY.astype(np.uint16) * 257), "png", exact(GRAY)),
    "16 bit tif": (Image.fromarray(GRAY.astype(np.uint16) * 257 + 100), "tif", exact(GRAY)),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), "tif", RGB),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_image(mode, tmp_path):
    image, extension, expected = MODES[mode]
    read = read_image(save(tmp_path / f"a.{extension}", image))
    assert read.dtype == np.uint8 and read.shape == (40, 48, 3) and read.flags.writeable
    np.testing.assert_array_equal(read, expected)


def test_transparent_palette_keeps_its_colors(tmp_path):
    image = palette_image(INDICES, PALETTE)
    path = save(tmp_path / "a.png", image, transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(read_image(path), MODES["P"][2])


def test_cmyk_jpeg_is_close(tmp_path):
    read = read_image(save(tmp_path / "a.jpg", Image.fromarray(RGB).convert("CMYK"), quality=98))
    assert abs(read.astype(int) - RGB).mean() < 4


def test_sixteen_bits_use_the_full_range(tmp_path):
    values = np.array([[0, 128, 129, 32768, 65406, 65407, 65535]], np.uint16)
    read = read_image(save(tmp_path / "a.png", Image.fromarray(values)))
    assert read[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("array", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70000, np.int32)], ids=["float", "32 bits"])
def test_pixels_of_unknown_range_are_refused(array, tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(array))
    with pytest.raises(ValueError, match="a.tif: .* 8 or 16 bits"):
        read_image(path)


TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("mode", ["RGB", "16 bit", "mask"])
def test_exif_orientation_is_honoured(orientation, mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if mode == "mask":
        stored = (blob(3) * 255).astype(np.uint8)
        read = read_mask(save(tmp_path / "a.png", stored, exif=exif), "binary")
        expected = TURNS[orientation](blob(3))
    else:
        read = read_image(save(tmp_path / "a.png", MODES[mode][0], exif=exif))
        expected = TURNS[orientation](MODES[mode][2])
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("content", [b"", b"no picture", "cut png", "cut jpg"])
def test_damaged_files_are_named(content, tmp_path):
    if isinstance(content, str):
        stream = io.BytesIO()
        Image.fromarray(RGB).save(stream, "PNG" if content == "cut png" else "JPEG")
        content = stream.getvalue()[:-len(stream.getvalue()) // 3]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png: (cannot be read|is empty)"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: (cannot be read|is empty)"):
        read_mask(tmp_path / "a.png")


BLOB = blob(5)
EIGHT = BLOB.astype(np.uint8)
BINARY = {
    "1 bit": Image.fromarray(BLOB),
    "0/1": EIGHT,
    "0/255": EIGHT * 255,
    "0/77": EIGHT * 77,
    "RGB": np.repeat(EIGHT[:, :, None] * 255, 3, axis=2),
    "RGBA": np.dstack([np.repeat(EIGHT[:, :, None] * 255, 3, axis=2), np.full_like(EIGHT, 255)]),
    "LA": Image.merge("LA", [Image.fromarray(EIGHT * 255), Image.fromarray(np.full_like(EIGHT, 9))]),
    "16 bit": EIGHT.astype(np.uint16) * 65535,
    "palette black white": palette_image(EIGHT, [0, 0, 0, 255, 255, 255]),
    "palette white black": palette_image(1 - EIGHT, [255, 255, 255, 0, 0, 0]),
    "colored": EIGHT[:, :, None] * np.array([0, 200, 0], np.uint8),
}


@pytest.mark.parametrize("kind", BINARY)
def test_binary_masks(kind, tmp_path):
    array = BINARY[kind]
    read = read_mask(save(tmp_path / "a.png", array), "binary")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, EIGHT)


def test_binary_is_above_half_of_the_maximum(tmp_path):
    values = np.repeat([[0, 60, 100, 101, 150, 200]], [20, 1, 1, 1, 1, 20], axis=1).astype(np.uint8).repeat(8, axis=0)
    expected = (values > 100).astype(np.uint8)
    assert read_mask(save(tmp_path / "a.png", values), "binary").tolist() == expected.tolist()
    assert not read_mask(save(tmp_path / "b.png", values * 0), "binary").any()
    assert read_mask(save(tmp_path / "c.png", values * 0 + 255), "binary").all()


def test_jpeg_mask_is_binary_only(tmp_path):
    path = save(tmp_path / "a.jpg", EIGHT * 255, quality=85)
    np.testing.assert_array_equal(read_mask(path, "binary"), EIGHT)
    for masks in ("index", "any"):
        with pytest.raises(ValueError, match='JPEG.*masks="binary"'):
            read_mask(path, masks)


INDEX = {
    "gray": INDICES,
    "palette": palette_image(INDICES, PALETTE),
    "RGB": np.repeat(INDICES[:, :, None], 3, axis=2),
    "16 bit": INDICES.astype(np.uint16),
    "1 bit": Image.fromarray(INDICES > 0),
}


@pytest.mark.parametrize("kind", INDEX)
def test_index_masks(kind, tmp_path):
    path = save(tmp_path / "a.png", INDEX[kind])
    expected = (INDICES > 0).astype(np.uint8) if kind == "1 bit" else INDICES
    assert INDICES.max() == 2
    np.testing.assert_array_equal(read_mask(path, "index", classes=3), expected)
    np.testing.assert_array_equal(read_mask(path, "any"), (INDICES > 0).astype(np.uint8))


@pytest.mark.parametrize("array, masks, classes, words", [
    (INDICES, "index", 2, ["class index 2", "classes=2 allows 0 to 1", "classes=3", 'masks="any"']),
    (EIGHT * 255, "index", 2, ["class index 255", 'masks="binary"']),
    (EIGHT * 255, "index", 3, ["class index 255", "allows 0 to 2"]),
    (EIGHT.astype(np.uint16) * 300, "index", 256, ["class index 300"]),
    (INDICES, "binary", 2, ["0, 1, 2", 'masks="any"', "classes=3"]),
    (EIGHT[:, :, None] * np.array([0, 200, 0], np.uint8), "index", 3, ["colored", "#00c800", 'masks="binary"']),
])
def test_masks_that_cannot_be_meant(array, masks, classes, words, tmp_path):
    path = save(tmp_path / "a.png", array)
    with pytest.raises(ValueError) as caught:
        read_mask(path, masks, classes)
    assert all(word in str(caught.value) for word in ["a.png", *words])


def test_read_mask_refuses_unknown_kinds(tmp_path):
    with pytest.raises(ValueError, match="masks must be"):
        read_mask(tmp_path / "a.png", "auto")


# ---------------------------------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("height, width", [(40, 48), (97, 61), (33, 200), (64, 64), (20, 90), (31, 17)])
def test_squash_and_pad_geometry(height, width):
    image, mask = picture(2, height, width), np.ones((height, width), np.uint8)
    for resize in preprocessing.RESIZES:
        small, small_mask = resize_pair(image, mask, 64, resize)
        assert small.shape == (64, 64, 3) and small_mask.shape == (64, 64) and small.dtype == small_mask.dtype == np.uint8
    new_height, new_width = round(height * 64 / max(height, width)), round(width * 64 / max(height, width))
    assert small_mask[:new_height, :new_width].all() and small_mask.sum() == new_height * new_width
    assert not small[new_height:].any() and not small[:, new_width:].any()
    np.testing.assert_array_equal(resize_pair(image[:, :, ::-1], mask, 64)[0], resize_pair(image, mask, 64)[0][:, :, ::-1])


def test_shrinking_is_the_area_average():
    image = picture(4, 96, 64)
    blocks = image.reshape(32, 3, 32, 2, 3).mean(axis=(1, 3))
    assert abs(resize_pair(image, blob(1, 96, 64).astype(np.uint8), 32)[0] - blocks).max() <= 0.51
    np.testing.assert_array_equal(resize_pair(image, blob(1, 96, 64).astype(np.uint8), 32)[0], cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA))


def test_an_axis_that_shrinks_is_averaged_while_the_other_grows():
    stripes = np.zeros((16, 256, 3), np.uint8)
    stripes[:, ::2] = 254  # every other column: the average is 127 everywhere
    small, _ = resize_pair(stripes, stripes[:, :, 0] // 254, 32)
    assert (small == 127).all()


def test_mask_takes_the_nearest_pixel_center():
    mask = np.arange(60, dtype=np.uint8).reshape(1, 60).repeat(60, axis=0)
    _, small = resize_pair(np.zeros((60, 60, 3), np.uint8), mask, 20)
    np.testing.assert_array_equal(small[0], np.arange(1, 60, 3))  # the middle of each three
    classes = (np.arange(60) // 20).astype(np.uint8)[None].repeat(60, axis=0)
    _, small = resize_pair(np.zeros((60, 60, 3), np.uint8), classes, 41)
    assert set(np.unique(small)) == {0, 1, 2}


@pytest.mark.parametrize("height, width, resize, expected", [(1, 1, "pad", (64, 64)), (37, 4000, "pad", (1, 64)), (4000, 37, "squash", (64, 64)),
                                                             (30, 60, "pad", (32, 64)), (97, 61, "pad", (64, 40))])
def test_the_part_of_the_square_that_an_image_fills(height, width, resize, expected):
    assert fitted_size(height, width, 64, resize) == expected


def test_color_spaces_there_and_back():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.abs(to_rgb(to_color(image, "ycrcb"), "ycrcb").astype(int) - image).max() <= 1
    assert to_rgb(image, "rgb") is image


@pytest.mark.parametrize("color", preprocessing.COLORS)
@pytest.mark.parametrize("resize", preprocessing.RESIZES)
def test_preprocessing_does_what_the_cache_did(tmp_path, resize, color):
    data = SegmentationData.open(plain(tmp_path / "plain"), size=32, resize=resize, color=color, cache=tmp_path / "cache", progress=False)
    told = data.preprocessing
    (tmp_path / PREPROCESSING_FILE).write_text(json.dumps({"size": 32, "resize": resize, "color": color, "class_names": list(data.class_names)}))
    assert told == read_preprocessing(tmp_path)
    image, mask = data.train.paths[1]
    np.testing.assert_array_equal(told.prepare(read_image(image)), data.train.batch([1]).images[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(data.train.original_mask(1), read_mask(mask, "binary"))


@pytest.mark.parametrize("text, words", [("", "does not say"), ("[]", "does not say"), ("{}", "class_names"), ('{"size": 64, "class_names": ["a", "b"], "sise": 3}', "sise"),
                                         ('{"size": 3, "class_names": ["a", "b"]}', "size is"), ('{"size": 60000, "class_names": ["a", "b"]}', "32 to 8192"),
                                         ('{"size": true, "class_names": ["a", "b"]}', "size is"), ('{"size": 64, "class_names": ["a", "b"], "white": 0}', "white"),
                                         ("[" * 100000, "does not say"), ('{"size": 64, "class_names": "a"}', "class_names")])
def test_a_damaged_preprocessing_file_is_refused(tmp_path, text, words):
    (tmp_path / PREPROCESSING_FILE).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_preprocessing(tmp_path)
    assert PREPROCESSING_FILE in str(caught.value)
    with pytest.raises(FileNotFoundError, match="name a checkpoint folder"):
        read_preprocessing(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [{"size": 31}, {"size": 64.0}, {"resize": "crop"}, {"color": "hsv"}, {"class_names": ("a",)}, {"class_names": ("a", 1)},
                                   {"channels": 0}, {"channels": 4, "color": "ycrcb"}, {"mean": (0.5,)}, {"std": (0.1, 0.1, 2.0)}])
def test_impossible_preprocessing(wrong):
    with pytest.raises(ValueError):
        Preprocessing(**wrong)


def test_resize_pair_refuses():
    with pytest.raises(ValueError, match="resize must be"):
        resize_pair(RGB, EIGHT, 32, "crop")
    with pytest.raises(ValueError, match="must be"):
        resize_pair(RGB[:-1], EIGHT, 32)


# ---------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("suffix", ["", "_segmentation", "_Segmentation", "_mask"])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_official_layout(suffix, extension, opened, tmp_path):
    source = tmp_path / "official"
    for split, first, count in (("train", 0, 5), ("val", 10, 3), ("test", 20, 2)):
        plain(source / split, count, first, images="inputs", masks="targets", suffix=suffix, extension=extension)
    (source / "train" / "inputs" / ".DS_Store").write_text("x")
    (source / "train" / "inputs" / "LICENSE.txt").write_text("x")
    data = opened(source)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [5, 3, 2] and data.notes == []
    assert data.train.ids == [f"case{i:03d}" for i in range(5)] and data.train.original_sizes == [(40, 48)] * 5
    image, mask = data.test.paths[1]
    assert image.name == f"case021.{extension}" and mask.name == f"case021{suffix}.png"
    batch = data.test.batch([1, 0])
    expected = resize_pair(read_image(image), read_mask(mask, "binary"), 32)
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), expected[0])
    np.testing.assert_array_equal(batch.masks[0], expected[1])
    assert batch.ids == ["case021", "case020"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_validation_folder(name, opened, tmp_path):
    for split, first in (("train", 0), (name, 10)):
        plain(tmp_path / "d" / split, 3, first, images="inputs", masks="targets")
    assert opened(tmp_path / "d").valid.ids == ["case010", "case011", "case012"]


def test_plain_pair_holds_out_a_seeded_share(opened, tmp_path):
    source = plain(tmp_path / "wrapping" / "pair", 20).parent
    data, again, other = opened(source), opened(source), opened(source, seed=3)
    assert len(data.train) == 18 and len(data.valid) == 2 and data.test is None
    assert data.valid.ids == again.valid.ids != other.valid.ids and not set(data.train.ids) & set(data.valid.ids)
    assert any("10 % of train, seed 1996, held out" in note for note in data.notes) and "no test part" in data.notes
    assert len(opened(source, valid_share=0.5).valid) == 10
    assert data.cache_folder == other.cache_folder, "the split is no part of the cache"


def test_unlabeled_part_is_mentioned(opened, tmp_path):
    plain(tmp_path / "d" / "train", 4, images="inputs", masks="targets")
    save(tmp_path / "d" / "test" / "inputs" / "x.png", RGB)
    assert any(note.startswith("test/ was left out") for note in opened(tmp_path / "d").notes)


def test_prepared_folder_and_split_column(opened, tmp_path):
    source, _ = prepared(tmp_path / "d", split=lambda i: ["train", "train", "valid", "test"][i % 4])
    data = opened(source)
    assert data.name == "by hand" and data.class_names == ("background", "lesion") and data.notes == []
    assert [len(part) for part in (data.train, data.valid, data.test)] == [6, 3, 3]
    assert data.train.strata == ["a", "b"] * 3 and data.folder == source
    assert SegmentationData.from_prepared(source, size=32, cache=tmp_path / "cache", progress=False).valid.ids == data.valid.ids
    with pytest.raises(ValueError, match="not a prepared folder"):
        SegmentationData.from_prepared(tmp_path)


def test_phantoms_are_a_source(opened, tmp_path):
    data = opened("phantoms:nuclei:20")
    assert len(data.train) + len(data.valid) + len(data.test) == 20
    assert opened("phantoms:nuclei:20").train.ids == data.train.ids
    with pytest.raises(ValueError, match="number of images"):
        opened("phantoms:nuclei:many")


def test_three_classes_and_their_names(opened, tmp_path):
    source, rows = prepared(tmp_path / "d")
    for i, row in enumerate(rows):
        save(source / row["mask"], (i + np.arange(48) // 16 % 3).astype(np.uint8)[None].repeat(40, 0) % 3)
    manifest(source, rows, ("background", "one", "two"))
    three = opened(source, classes=3)
    assert three.class_names == ("background", "one", "two") and set(np.unique(three.train.batch([0, 1]).masks)) == {0, 1, 2}
    two = opened(source, masks="any")
    assert two.class_names == ("background", "foreground") and two.train.batch([0]).masks.max() == 1
    assert any("3 classes" in note for note in two.notes)
    with pytest.raises(DataProblems, match='classes=3 or, .* masks="any"'):
        opened(source)


# ---------------------------------------------------------------------------------------------------------------- folds
def test_folds_are_equal_slices_by_name_and_leftovers_train(opened, tmp_path):
    source = plain(tmp_path / "d", 11)
    validated = []
    for fold in range(3):
        data = opened(source, fold=fold, folds=3)
        assert len(data.valid) == 3 and len(data.train) == 8
        assert {"case009", "case010"} <= set(data.train.ids)
        validated += data.valid.ids
    assert validated == [f"case{i:03d}" for i in range(9)]
    assert any("the last 2 always train" in note for note in data.notes)
    assert any("fold 0 validates" in note for note in opened(source, folds=3).notes)


def test_the_reference_rule_for_busi():
    """437 benign in 5 folds of 87 and 210 malignant in folds of 42; benign 436 and 437, sorted by name, always train."""
    names = sorted(f"benign ({i})" for i in range(1, 438)) + sorted(f"malignant ({i})" for i in range(1, 211))
    records = [data_layout.Record(name, Path(name), (), stratum=name.split()[0]) for name in names]
    survey = data_layout.Survey(Path("."), "busi", records)
    for fold in range(5):
        parts, _ = data_splits.assign_splits(survey, fold, 5, 0.1, 0)
        assert parts["valid"] == [*range(87 * fold, 87 * fold + 87), *range(437 + 42 * fold, 437 + 42 * fold + 42)]
        assert {435, 436} <= set(parts["train"]) and len(parts["train"]) == 647 - 129


def test_slices_within_strata_of_a_manifest(opened, tmp_path):
    source, _ = prepared(tmp_path / "d", 14, strata=("a", "a", "b"), split=lambda i: "test" if i == 13 else "")
    data = opened(source, fold=1, folds=4)  # 9 of a, 4 of b, without the test image
    assert data.valid.strata.count("a") == 2 and data.valid.strata.count("b") == 1 and data.test.ids == ["p13"]
    assert data.valid.ids == ["p03", "p04", "p05"]


@pytest.mark.parametrize("patients, words", [
    ({}, "rare (2 images, always train)"), ({"patient": lambda i: f"{i // 2}"}, "rare (2 images of 1 patient, in 1 of 4 folds)")])
def test_strata_with_fewer_members_than_folds_are_named_once(patients, words, opened, tmp_path):
    source, rows = prepared(tmp_path / "d", 14, **patients)
    manifest(source, [row | {"stratum": "rare" if i < 2 else "usual"} for i, row in enumerate(rows)])
    found = [note for note in opened(source, folds=4, fold=0).notes if "fewer members" in note]
    assert found == [f"folds: strata with fewer members than 4 folds: {words}; choose fewer folds, or join strata"]
    manifest(source, [row | {"stratum": "ab"[i // 2 % 2]} for i, row in enumerate(rows)])
    assert not any("fewer members" in note for note in opened(source, folds=3, fold=0).notes)


def test_fold_column_of_a_manifest(opened, tmp_path):
    source, _ = prepared(tmp_path / "d", fold=lambda i: "" if i in (10, 11) else i % 2 + 1, split=lambda i: "test" if i == 11 else "")
    data = opened(source, fold=2)
    assert data.valid.ids == ["p01", "p03", "p05", "p07", "p09"] and data.test.ids == ["p11"] and "p10" in data.train.ids
    with pytest.raises(ValueError, match="fold=3 is out of range: the folds are 1, 2"):
        opened(source, fold=3)
    with pytest.raises(ValueError, match="2 folds of its own"):
        opened(source, folds=5)


def test_identical_files_never_train_and_validate_across_folds(opened, tmp_path):
    source = plain(tmp_path / "d", 8)
    shutil.copy(source / "images" / "case000.png", source / "images" / "case007.png")
    data = opened(source, fold=0, folds=2)
    assert "case000" in data.valid.ids and "case007" not in data.train.ids and len(data.train) == 3
    assert any("left out of train" in note and "case007" in note for note in data.notes)
    shutil.copy(source / "images" / "case001.png", source / "images" / "case002.png")
    assert any("1 image file(s) are identical" in note for note in opened(source, fold=0, folds=2).notes)


# ---------------------------------------------------------------------------------------------------------------- patients
def patients_of(folder: Path, count: int = 40, size: int = 4, mixed: bool = False) -> tuple[Path, list[dict]]:
    """`count` phantoms of patients with `size` images each, in two strata: by patient, or mixed within patients."""
    return prepared(folder, count, patient=lambda i: f"patient {i // size}", stratum=lambda i: "ab"[(i if mixed else i // size) % 2])


def torn(*splits) -> set[str]:
    """Patients that are in more than one of the splits."""
    found = [set(split.patients) for split in splits if split]
    return {patient for i, one in enumerate(found) for other in found[i + 1:] for patient in one & other}


@pytest.mark.parametrize("mixed", [False, True])
def test_forty_phantoms_of_ten_patients_in_two_strata(mixed, opened, tmp_path):
    """No patient in two folds or splits, strata within one of even, as scikit-learn has it."""
    from sklearn.model_selection import StratifiedGroupKFold

    source, rows = patients_of(tmp_path / "d", mixed=mixed)
    yardstick = [sorted(rows[i]["id"] for i in valid) for _, valid in StratifiedGroupKFold(5).split(
        rows, [row["stratum"] for row in rows], [row["patient"] for row in rows])]
    folds = [opened(source, fold=fold, folds=5) for fold in range(5)]
    assert [data.valid.ids for data in folds] == yardstick
    assert all(not torn(data.train, data.valid) for data in folds)
    assert all(abs(data.valid.strata.count("a") - 4) <= 1 and abs(data.valid.strata.count("b") - 4) <= 1 for data in folds)
    assert sorted(name for data in folds for name in data.valid.ids) == [row["id"] for row in rows]
    assert any("8 to 8 images, each of the 10 patients in one" in note and "strata spread evenly" in note for note in folds[0].notes)
    held = opened(source, valid_share=0.2)
    assert not torn(held.train, held.valid) and held.valid.strata.count("a") == held.valid.strata.count("b") == 4
    assert held.valid.ids == opened(source, valid_share=0.2).valid.ids != opened(source, valid_share=0.2, seed=5).valid.ids
    assert any("2 whole patients" in note for note in held.notes)


def test_patients_of_different_sizes_and_images_of_nobody(opened, tmp_path):
    sizes = [1, 7, 2, 9, 3, 1, 4, 5]
    owner = [f"p{number}" for number, size in enumerate(sizes) for _ in range(size)] + [""] * 8
    source, _ = prepared(tmp_path / "d", len(owner), patient=lambda i: owner[i], stratum=lambda i: "abc"[i % 3], split=lambda i: "test" * (i in (0, 39)))
    folds = [opened(source, fold=fold, folds=4) for fold in range(4)]
    assert all(not torn(data.train, data.valid) - {""} for data in folds) and {"p00", "p39"} == set(folds[0].test.ids)
    assert sorted(name for data in folds for name in data.valid.ids) == sorted({f"p{i:02d}" for i in range(40)} - {"p00", "p39"})
    assert max(len(data.valid) for data in folds) - min(len(data.valid) for data in folds) <= max(sizes)
    held = opened(source, valid_share=0.25)
    assert not torn(held.train, held.valid, held.test) - {""} and 6 <= len(held.valid) <= 13
    with pytest.raises(ValueError, match="patients cannot make folds=16"):
        opened(source, folds=16)


def test_a_zip_whose_names_are_no_text_is_one_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images/é.png", b"x")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(ValueError, match="a.zip is damaged") as refused:
        sources.find_source(tmp_path / "a.zip", tmp_path / "cache", 32)
    assert not isinstance(refused.value, UnicodeError)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(".", b"x")
    with pytest.raises(ValueError, match="b.zip is refused: a member has no name"):
        sources.find_source(tmp_path / "b.zip", tmp_path / "cache", 32)


def test_folds_of_patients_without_strata_are_even():
    sizes = [1 + 7 * i % 20 for i in range(30)]
    records = [data_layout.Record(f"{i}-{k}", Path(), (), patient=f"p{i}") for i, size in enumerate(sizes) for k in range(size)]
    folds = np.bincount(data_splits.fold_of_each(records, 5, []))
    assert folds.sum() == sum(sizes) and folds.max() - folds.min() <= 5


def test_without_scikit_learn_folds_of_patients_say_what_to_install(opened, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    source, _ = patients_of(tmp_path / "d", 8, 2)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        opened(source, folds=2)
    assert len(opened(source).valid) == 2  # a hold-out needs nothing
    assert opened(prepared(tmp_path / "e", 8)[0], folds=2).valid.ids  # nor do the published slices


def test_hold_out_without_patients_and_strata_gives_the_rows_of_before():
    records = [data_layout.Record(str(i), Path(str(i)), ()) for i in range(60)]
    assert data_splits.hold_out(records, list(range(0, 60, 2)), 0.2, 1996, []) == [0, 10, 12, 16, 50, 58]
    assert data_splits.hold_out(records, list(range(30)), 0.1, 3, []) == [20, 23, 26]


def test_hold_out_spreads_strata():
    records = [data_layout.Record(str(i), Path(str(i)), (), stratum="rare" if i < 10 else "common") for i in range(100)]
    rows = data_splits.hold_out(records, list(range(100)), 0.2, 7, [])
    assert len(rows) == 20 and sum(row < 10 for row in rows) == 2 and rows != data_splits.hold_out(records, list(range(100)), 0.2, 8, [])
    alone = [data_layout.Record(str(i), Path(str(i)), (), "one patient") for i in range(5)]
    with pytest.raises(ValueError, match="belong to one patient"):
        data_splits.hold_out(alone, list(range(5)), 0.2, 7, [])


@pytest.mark.parametrize("columns, words", [
    ({"fold": lambda i: i % 2}, ["patient 'Ada' is in 2 parts", "fold 0: p00, p02, p04", "fold 1: p01"]),
    ({"split": lambda i: ["train", "valid"][i % 2]}, ["train: p00", "valid: p01"]),
    ({"split": lambda i: "test" * (i == 5)}, ["train: p00", "test: p05"]),
    ({"fold": lambda i: "" if i == 0 else 1}, ["train: p00", "fold 1: p01"]),
])
def test_a_patient_in_two_parts_is_refused(columns, words, opened, tmp_path):
    source, _ = prepared(tmp_path / "d", 6, patient=lambda i: "Ada", **columns)
    with pytest.raises(DataProblems) as caught:
        opened(source)
    assert [word for word in words if word not in caught.value.problems[0]] == []


def test_a_refusal_says_that_groups_are_read_as_strata_and_that_one_patient_is_not_enough(opened, tmp_path):
    source, rows = prepared(tmp_path / "p", 4)
    columns = ("id", "image", "mask", "group")
    kept = [{name: row[name] for name in columns[:3]} for row in rows]
    manifest(source, [row | {"group": f"p{i}"} for i, row in enumerate(kept)], columns=columns)
    with pytest.raises(ValueError, match="every stratum has fewer images than folds=2.*rename it to patient"):
        opened(source, folds=2)
    manifest(source, [row | {"patient": "p"} for row in kept])
    for options in ({"folds": 2}, {}):
        with pytest.raises(ValueError, match="images belong to one patient, who cannot train and validate"):
            opened(source, **options)


def test_an_old_manifest_with_groups_is_read_as_strata_with_a_note(opened, tmp_path):
    source, rows = prepared(tmp_path / "d", 14, strata=("a", "a", "b"))
    expected = opened(source, fold=1, folds=4)
    columns = ["id", "image", "mask", "group", "fold", "split", "width", "height"]
    manifest(source, [{name: row.get("stratum" if name == "group" else name, "") for name in columns} for row in rows], columns=columns)
    data = opened(source, fold=1, folds=4)
    assert data.train.strata == expected.train.strata and data.valid.ids == expected.valid.ids and set(data.train.patients) == {""}
    assert any("group is read as stratum" in note and "rename it to patient" in note for note in data.notes)
    manifest(source, rows, columns=[*data_layout.COLUMNS, "group"])
    with pytest.raises(DataProblems, match="unknown column.*'group'"):
        opened(source)


# ---------------------------------------------------------------------------------------------------------------- census
def test_census_counts_what_a_set_holds(opened, tmp_path):
    source = plain(tmp_path / "d", 8)
    save(source / "masks" / "case001.png", np.zeros((40, 48), np.uint8))
    save(source / "masks" / "case002.png", np.full((40, 48), 255, np.uint8))
    save(source / "images" / "case003.png", picture(3, 80, 96))
    save(source / "masks" / "case003.png", blob(3, 80, 96))
    (source / "images" / "notes.txt").write_text("x")
    (source / "masks" / ".hidden.png").write_text("x")
    data = opened(source, valid_share=0.25)
    rows = data.census.rows()
    assert len({len(row) for row in rows}) == 1 and rows[0] == ["", "train", "valid", "test", "all"]
    table = {row[0]: row[1:] for row in rows}
    assert table["images"] == ["6", "2", "0", "8"] and table["empty masks"][-1] == "1" and table["full masks"][-1] == "1"
    assert table["foreground: images"][-1] == "7" and table["sizes"][-1] == "48x40 to 96x80, most often 48x40 (7)"
    masks = [split.original_mask(i) for split in (data.train, data.valid) for i in range(len(split))]
    assert float(table["foreground: % of pixels"][-1]) == pytest.approx(100 * sum(m.sum() for m in masks) / sum(m.size for m in masks), rel=0.01)
    assert "masks/.hidden.png (hidden)" in table["passed over"][-1] and "images/notes.txt (no picture)" in table["passed over"][-1]
    assert table["bits"][-1] == "8 (8)" and data.census.warnings == ["1 masks are full: no pixel is background (case002)"]
    lines = str(data.census).splitlines()
    assert len(lines) == len(rows) and len({len(line) for line in lines[:6]}) == 1, "columns stand below one another"
    assert next(line for line in lines if "% of pixels" in line).endswith(f"        {table['foreground: % of pixels'][-1]:>6}")
    again = opened(source, valid_share=0.25)
    assert again.census == data.census and json.loads(json.dumps(data.census.to_dict())) == data.census.to_dict()


EMPTY_MASK = np.zeros((40, 48), np.uint8)


@pytest.mark.parametrize("masks, options, words", [
    (lambda i: EMPTY_MASK, {}, "no mask holds any foreground"),
    (lambda i: EMPTY_MASK + 255, {}, "every mask is full"),
    (lambda i: blob(i).astype(np.uint8), {"classes": 3}, "class 2 .class 2. occurs in no mask"),
    (lambda i: blob(i).astype(np.uint8) + 1, {"classes": 3}, "every mask is full.*labels begin with 1"),
    (lambda i: blob(i).astype(np.uint8) * (2 if i == 4 else 1), {"classes": 3, "folds": 2, "fold": 1}, "class 2 .class 2. occurs in 1 images, but never in train"),
])
def test_classes_that_are_missing_are_a_warning(masks, options, words, opened, tmp_path):
    source = plain(tmp_path / "d", 6)
    for i in range(6):
        save(source / "masks" / f"case{i:03d}.png", masks(i))
    data = opened(source, **options)
    assert any(re.search(words, warning) for warning in data.census.warnings), data.census.warnings
    assert set(data.census.warnings) <= set(data.notes)


@pytest.mark.parametrize("turned", ["image", "mask", "both", "differently"])
def test_pictures_turned_by_exif_are_a_warning_unless_both_are(turned, opened, tmp_path):
    source, exif, other = plain(tmp_path / "d", 4), Image.Exif(), Image.Exif()
    exif[0x0112], other[0x0112] = 3, 2 if turned == "differently" else 3
    for i in range(4):
        save(source / "images" / f"case{i:03d}.png", picture(i), **({"exif": exif} if turned != "mask" else {}))
        save(source / "masks" / f"case{i:03d}.png", blob(i), **({"exif": other} if turned != "image" else {}))
    data = opened(source)
    assert any("EXIF" in note for note in data.notes) == (turned != "both")
    assert {row[0]: row[-1] for row in data.census.rows()}["turned by EXIF"] == \
        f"{4 * (turned != 'mask')} images, {4 * (turned != 'image')} masks"


@pytest.mark.parametrize("where, words", [
    (lambda i: True, "foreground fills more than half of 8 of 8 masks: if black and white"),
    (lambda i: i == 5, "% of 1 masks .case005. and .* black and white exchanged there"),
])
def test_masks_with_black_and_white_exchanged_are_a_warning(where, words, opened, tmp_path):
    source = plain(tmp_path / "d", 8)
    for i in filter(where, range(8)):
        save(source / "masks" / f"case{i:03d}.png", np.uint8(255) - blob(i).astype(np.uint8) * np.uint8(255))
    assert [re.search(words, warning) is not None for warning in opened(source).census.warnings] == [True]


def test_masks_that_are_ignored_altogether_are_neither_empty_nor_full(opened, tmp_path):
    source = plain(tmp_path / "d", 5)
    save(source / "masks" / "case000.png", np.full((40, 48), 77, np.uint8))
    census = opened(source, ignore_value=77, valid_share=0.2).census
    table = {row[0]: row[-1] for row in census.rows()}
    assert (table["empty masks"], table["full masks"], table["ignored altogether"]) == ("0", "0", "1")
    for i in range(1, 5):
        save(source / "masks" / f"case{i:03d}.png", np.full((40, 48), 77, np.uint8))
    assert "every pixel of train is ignored" in opened(source, ignore_value=77).census.warnings[0]


@pytest.mark.parametrize("ignored, refusal", [(1, None), (3, None), (6, "every pixel of train is ignored")])
def test_prepared_masks_of_ignored_pixels_only(ignored, refusal, opened, tmp_path):
    """dataset.json says that 255 counts nowhere: masks that hold nothing else are no foreground, and are warned of."""
    source, rows = prepared(tmp_path / "d", 6)
    for i in range(6):
        mask = blob(i).astype(np.uint8)
        mask[:3] = 255
        save(source / "masks" / f"p{i:02d}.png", mask * 0 + 255 if i < ignored else mask)
    described = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(described | {"ignore": 255}))
    for masks in ("auto", "any"):
        data = opened(source, valid_share=0.5, masks=masks)
        assert data.ignore_index == 255 and {row[0]: row[-1] for row in data.census.rows()}["ignored altogether"] == str(ignored)
        warnings = data.census.warnings
        assert any(f"{ignored} masks hold ignored pixels only" in warning and "p00" in warning for warning in warnings), warnings
        assert any((refusal or "p00") in warning for warning in warnings) and not any("would score 100" in warning for warning in warnings)
    assert opened(source, masks="any", ignore_value=7).ignore_index != 255
    (source / "dataset.json").write_text(json.dumps(described | {"ignore": "white"}))
    with pytest.raises(DataProblems, match="dataset.json cannot be understood .ignore must be a whole number from 0 to 255"):
        opened(source)


def test_a_class_that_vanishes_when_masks_shrink_is_a_warning(opened, tmp_path):
    source = plain(tmp_path / "d", 4)
    for i in range(4):
        mask = np.zeros((400, 480), np.uint8)
        mask[201 + i, 101] = 255
        save(source / "images" / f"case{i:03d}.png", picture(i, 400, 480))
        save(source / "masks" / f"case{i:03d}.png", mask)
    data = opened(source)
    gone = sum(not part.batch([i]).masks.any() for part in (data.train, data.valid) for i in range(len(part)))
    assert gone > 2 and any(f"a class vanishes from {gone} masks" in warning and "larger size" in warning for warning in data.census.warnings)


def test_one_picture_of_two_patients_is_a_warning(opened, tmp_path):
    source, rows = prepared(tmp_path / "p", 8)
    shutil.copy(source / rows[0]["image"], source / rows[7]["image"])
    manifest(source, [row | {"patient": f"p{i % 4}"} for i, row in enumerate(rows)])
    assert any(f"belong to two patients ({rows[0]['id']} = {rows[7]['id']})" in warning for warning in opened(source).census.warnings)


@pytest.mark.parametrize("split", ["val", "Train"])
def test_an_unknown_split_of_every_row_is_a_sentence(split, opened, tmp_path):
    source, rows = prepared(tmp_path / "p", 4)
    manifest(source, [{name: cell for name, cell in row.items() if name != "fold"} | {"split": split} for row in rows])
    with pytest.raises(DataProblems, match=f"split must be one of train, valid, test or empty, got '{split}'"):
        opened(source)


def test_manifests_of_spreadsheets(opened, tmp_path):
    source, rows = prepared(tmp_path / "p", 4)
    text = (source / "manifest.csv").read_text()
    (source / "manifest.csv").write_text(text.replace(",", ", "))
    assert len(opened(source).train)
    (source / "manifest.csv").write_text(text.replace(",", ";"))
    with pytest.raises(DataProblems, match="by semicolons or tabs: save it with commas") as caught:
        opened(source)
    assert len(caught.value.problems) == 1
    (source / "manifest.csv").write_text(text.replace("stratum", "patient", 1))
    with pytest.raises(DataProblems, match="has a column twice"):
        opened(source)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le"])
def test_manifests_that_are_not_utf8(encoding, opened, tmp_path):
    source, rows = prepared(tmp_path / "p", 4, strata=("gutartig", "b\u00f6sartig"))
    text = (source / "manifest.csv").read_text(encoding="utf-8")
    assert set(opened(source).train.strata) == {"gutartig", "b\u00f6sartig"}
    (source / "manifest.csv").write_bytes(text.encode(encoding))
    with pytest.raises(DataProblems, match='manifest.csv is not encoded in UTF-8: .* save it as .*"CSV UTF-8"') as caught:
        opened(source)
    assert len(caught.value.problems) == 1
    (source / "manifest.csv").write_bytes(text.encode("utf-8-sig"))
    assert set(opened(source).train.strata) == {"gutartig", "b\u00f6sartig"}


def test_an_array_of_mask_values(opened, tmp_path):
    assert opened(plain(tmp_path / "d", 4), mask_values=np.array([0, 255])).class_names == ("background", "foreground")


def test_a_folder_of_each_patient_is_told_how_to_be_moved(opened, tmp_path):
    for name in ("p1", "p2"):
        plain(tmp_path / "d" / name, 2, first=2 * (name == "p2"))
    with pytest.raises(ValueError, match="move p1/images to images/p1, p1/masks to masks/p1, and so on"):
        opened(tmp_path / "d")
    (tmp_path / "e").mkdir()
    for part in ("images", "masks"):
        (tmp_path / "e" / part).mkdir()
        for name in ("p1", "p2", "@eaDir"):
            shutil.copytree(tmp_path / "d" / name.replace("@eaDir", "p1") / part, tmp_path / "e" / part / name)
    data = opened(tmp_path / "e", valid_share=0.25)
    assert sorted(data.train.ids + data.valid.ids) == ["p1/case000", "p1/case001", "p2/case002", "p2/case003"]


def test_several_pages_are_a_warning(opened, tmp_path):
    source = plain(tmp_path / "d", 5)
    save(source / "images" / "case001.tif", Image.fromarray(picture(1)), save_all=True, append_images=[Image.fromarray(picture(7))] * 2)
    (source / "images" / "case001.png").unlink()
    data = opened(source)
    assert any("1 files hold several pages" in note and "case001" in note for note in data.notes)


# ---------------------------------------------------------------------------------------------------------------- deep images
def test_stray_bright_values_that_leave_few_levels_are_a_warning(opened, tmp_path):
    source, dim = plain(tmp_path / "d", 4), (np.random.default_rng(0).integers(200, 2040, (40, 48))).astype(np.uint16)
    for i in range(4):
        save(source / "images" / f"case{i:03d}.png", dim + np.uint16(i))
    assert opened(source).census.warnings == []
    dim[3, 3] = 65535
    save(source / "images" / "case002.png", dim)
    assert any("4 images keep fewer than 22 of 256 levels" in warning and "65535 becomes white" in warning for warning in opened(source).census.warnings)


@pytest.mark.parametrize("highest, white", [(255, 255), (900, 1023), (1023, 1023), (4095, 4095), (4096, 16383), (16000, 16383), (16384, 65535), (65535, 65535)])
def test_the_range_of_a_set_decides_its_white(highest, white, opened, tmp_path):
    source, ramp = plain(tmp_path / "d", 4), np.tile(np.linspace(0, highest, 48).astype(np.uint16), (40, 1))
    for i in range(4):
        save(source / "images" / f"case{i:03d}.png", ramp if i == 2 else ramp // 3)
    data = opened(source)
    assert data.white == data.preprocessing.white == white and any(f"{white} becomes white" in note for note in data.notes)
    for split in (data.train, data.valid):
        for i, (path, _) in enumerate(split.paths):
            np.testing.assert_array_equal(split.batch([i]).images[0].permute(1, 2, 0), data.preprocessing.prepare(read_image(path, white)))
    assert opened(source).white == white  # from the finished cache


def test_deep_colors_and_mixed_depths(opened, tmp_path):
    source = plain(tmp_path / "d", 4)
    deep = np.minimum(picture(0).astype(np.uint16) * 16, 4095)
    cv2.imwrite(str(source / "images" / "case000.png"), deep[:, :, ::-1])
    data = opened(source)
    assert data.white == 4095 and any("1 images have more than 8 bits, 3 have 8" in note for note in data.notes)
    np.testing.assert_array_equal(read_image(source / "images" / "case000.png", 4095), (deep.astype(int) * 255 + 2047) // 4095)
    assert not any("becomes white" in note for note in opened(plain(tmp_path / "e", 4)).notes)


def dicom(path: Path, values: np.ndarray, bits: int = 12) -> Path:
    pydicom = pytest.importorskip("pydicom", reason="reads DICOM files")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, bits, bits - 1
    file.WindowCenter, file.WindowWidth = 2 ** (bits - 1), 2 ** bits
    file.PixelData = values.astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    return path


@pytest.mark.parametrize("name", ["IM{:04d}", "slice.{:04d}", "{}.IMA", "{}.png"])
def test_dicom_files_are_known_by_content(name, opened, tmp_path):
    ramp = np.tile(np.linspace(0, 4095, 48).astype(np.uint16), (40, 1))
    for i in range(4):
        path = dicom(tmp_path / "d" / "images" / name.format(i), np.roll(ramp, i, 1))
        stem = path.name if path.suffix[1:].isdigit() else path.stem
        save(tmp_path / "d" / "masks" / f"{stem}.png", blob(i))
    data = opened(tmp_path / "d")
    assert len(data.train) == 3 and int(data.train.batch([0]).images.max()) >= 250 and int(data.train.batch([0]).images.min()) <= 5


NAMES = [("{}", "mask_{}"), ("{}", "{}_seg"), ("{}", "{}_segmentation"), ("{}", "{}_Mask"), ("{}", "{}_label"), ("{}", "{}-GT"), ("{}", "seg_{}_mask"),
         ("img_{}", "mask_{}"), ("{}_image", "{}_masks"), ("image_{}", "{}"), ("mask_{}", "mask_{}"), ("seg_{}", "seg_{}_mask"), ("p/{}", "p/labels_{}")]


@pytest.mark.parametrize("image, mask", NAMES)
def test_what_masks_may_be_called(image, mask, opened, tmp_path):
    for i in range(4):
        save(tmp_path / "d" / "images" / f"{image.format(i)}.png", picture(i))
        save(tmp_path / "d" / "masks" / f"{mask.format(i)}.png", blob(i))
    data = opened(tmp_path / "d")
    pairs = [pair for split in (data.train, data.valid) for pair in split.paths]
    assert {(one.stem, other.stem) for one, other in pairs} == {(Path(image.format(i)).stem, Path(mask.format(i)).stem) for i in range(4)}
    assert set(data.train.ids + data.valid.ids) == {image.format(i) for i in range(4)}


@pytest.mark.parametrize("images, masks, words", [
    (["a", "b"], ["a", "mask_a", "b"], ["images/a.png: several masks, masks/a.png, masks/mask_a.png"]),
    (["img_1", "image_1", "b"], ["mask_1", "b"], ["images/img_1.png: no mask", "images/image_1.png: no mask", "masks/mask_1.png: mask without an image"]),
    (["1", "img_1"], ["mask_1", "img_1_seg"], []),
    (["a", "b"], ["mask", "b"], ["images/a.png: no mask in masks/ (of the same name and capitals, perhaps with _mask, _seg,", "masks/mask.png: mask without"]),
    (["a", "b"], ["mask_p/a", "b"], ["images/a.png: no mask", "masks/mask_p/a.png: mask without an image"])])
def test_names_that_fit_two_images_or_none(images, masks, words, opened, tmp_path):
    for i, name in enumerate(images):
        save(tmp_path / "d" / "images" / f"{name}.png", picture(i))
    for name in masks:
        save(tmp_path / "d" / "masks" / f"{name}.png", blob(1))
    if not words:
        data = opened(tmp_path / "d", valid_share=0.5)
        assert {(image.stem, mask.stem) for split in (data.train, data.valid) for image, mask in split.paths} == {("1", "mask_1"), ("img_1", "img_1_seg")}
        return
    with pytest.raises(DataProblems) as caught:
        opened(tmp_path / "d")
    assert len(caught.value.problems) == len(words) and all(any(word in problem for problem in caught.value.problems) for word in words)


# ---------------------------------------------------------------------------------------------------------------- names and kinds
def test_sub_folders_pair_by_path(opened, tmp_path):
    for number, patient in enumerate(("p1", "p2", "p3/left")):
        for i in range(2):
            save(tmp_path / "d" / "images" / patient / f"{i}.jpg", picture(10 * number + i))
            save(tmp_path / "d" / "masks" / patient / f"{i}_mask.png", blob(i))
    save(tmp_path / "d" / "images" / "top.png", picture(77))
    save(tmp_path / "d" / "masks" / "top.png", blob(7))
    data = opened(tmp_path / "d", folds=7, fold=0)
    assert sorted(data.train.ids + data.valid.ids) == ["p1/0", "p1/1", "p2/0", "p2/1", "p3/left/0", "p3/left/1", "top"]
    image, mask = data.train.paths[0]
    assert image.parent.name == mask.parent.name and data.train.original_mask(0).shape == (40, 48)
    assert any("3 sub-folders with images (p1, p2, p3/left)" in note and "no patients" in note and "qtseg prepare own --patient" in note for note in data.notes)
    assert not any("sub-folder" in note for note in opened(plain(tmp_path / "flat")).notes)
    (tmp_path / "d" / "masks" / "p2" / "0_mask.png").rename(tmp_path / "d" / "masks" / "0_mask.png")
    with pytest.raises(DataProblems) as caught:
        opened(tmp_path / "d")
    assert any("images/p2/0.jpg: no mask" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_names_in_two_unicode_forms_are_one_name(forms, opened, tmp_path):
    for i in range(4):
        save(tmp_path / "d" / "images" / unicodedata.normalize(forms[0], f"läsion é{i}.png"), picture(i))
        save(tmp_path / "d" / "masks" / unicodedata.normalize(forms[1], f"läsion é{i}_mask.png"), blob(i))
    assert opened(tmp_path / "d", folds=4, fold=1).valid.ids == [unicodedata.normalize("NFC", "läsion é1")]


def test_pictures_are_known_by_content_and_links_are_followed(opened, tmp_path):
    source = plain(tmp_path / "elsewhere", 4)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "images").symlink_to(source / "images")
    (tmp_path / "d" / "masks").mkdir()
    for i in range(4):
        shutil.copy(source / "masks" / f"case{i:03d}.png", tmp_path / "d" / "masks" / f"case{i:03d}")  # no ending
    (source / "images" / "again").symlink_to(source / "images")  # a circle
    shutil.copy(source / "images" / "case000.png", source / "images" / "thumbs.db")  # a picture, whatever it is called
    with pytest.raises(DataProblems, match="thumbs.db: no mask"):
        opened(tmp_path / "d")
    (source / "images" / "thumbs.db").write_bytes(b"no picture")
    data = opened(tmp_path / "d")
    assert len(data.train) + len(data.valid) == 4 and any("listed already" in note for note in data.notes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
@pytest.mark.parametrize("kind", ["pipe", "device", "nowhere", "eps", "empty", "text"])
@pytest.mark.parametrize("layout", ["plain", "manifest"])
def test_what_is_no_file_is_refused_by_name_without_waiting(kind, layout, opened, tmp_path):
    source = prepared(tmp_path / "d", 4)[0] if layout == "manifest" else plain(tmp_path / "d", 4)
    path = sorted((source / "images").iterdir())[1]
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "nowhere": lambda: path.symlink_to("gone"),
     "eps": lambda: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "empty": lambda: path.write_bytes(b""), "text": lambda: path.write_text("hello")}[kind]()
    with pytest.raises(DataProblems, match=path.name):
        opened(source)


def test_a_manifest_reaches_no_file_outside(opened, tmp_path):
    source, rows = prepared(tmp_path / "d", 4)
    save(tmp_path / "secret.png", picture(1))
    (source / "images" / "p01.png").unlink()
    (source / "images" / "p01.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataProblems, match="images/p01.png is a link that leads outside.*copy the file"):
        opened(source)
    rows[1]["image"] = "images/p00.png\0"
    rows[2]["width"] = "9" * 5000
    manifest(source, rows)
    with pytest.raises(DataProblems, match="relative to the manifest") as caught:
        opened(source)
    assert all(len(problem) < 400 for problem in caught.value.problems)


@pytest.mark.parametrize("file, content, words", [
    ("manifest.csv", b"id,image,mask\na," + b"x" * 200_000 + b",b\n", "manifest.csv is no table.*field larger than"),
    ("manifest.csv", b"," * 200_000, "manifest.csv is no table.*more than 64 columns"),
    ("manifest.csv", b"id,image,mask\n" + b'"a\n",' * 10**6, "manifest.csv is no table.*a row of more than 4194304 characters"),
    ("manifest.csv", b"id,image,mask\n" + b"a,b,c\n" * 51, "manifest.csv is no table.*more than 50 rows.*divide the set"),
    ("manifest.csv", b"id,image,mask\na,images/p00.png,masks/" + b"9" * 300 + b".png\n", "mask masks/9+ does not exist"),
    ("manifest.csv", b"id,image,mask," + b"9" * 5000 + b"\n", "manifest.csv has the unknown column.*9+…"),
    ("manifest.csv", b"\xff\xfe\x00", "manifest.csv is not encoded in UTF-8.*save it as"),
    ("dataset.json", b"[" * 100_000, "dataset.json cannot be understood"),
    ("dataset.json", b'{"name": ' + b"9" * 5000 + b"}", "dataset.json cannot be understood"),
    ("dataset.json", b"[]", "dataset.json cannot be understood"),
    ("dataset.json", b'{"classes": "ab"}', "classes must be a list of names"),
])
def test_hostile_descriptions_are_one_sentence(file, content, words, opened, tmp_path, monkeypatch):
    source, _ = prepared(tmp_path / "d", 4)
    (source / file).write_bytes(content)
    monkeypatch.setattr(data_layout, "MOST_IMAGES", 50)
    with pytest.raises(DataProblems, match=words) as caught:
        opened(source)
    assert all(len(problem) < 500 for problem in caught.value.problems)


def test_a_huge_manifest_is_refused_before_it_is_read(opened, tmp_path):
    source, _ = prepared(tmp_path / "d", 4)
    with open(source / "manifest.csv", "r+b") as file:
        file.truncate(10 ** 10)  # sparse
    with pytest.raises(DataProblems, match="manifest.csv is no text.*has 10000000000 bytes, more than 67108864: set the environment variable QTSEG_MAX_TABLE_BYTES"):
        opened(source)


# ---------------------------------------------------------------------------------------------------------------- problems
def test_every_problem_of_a_folder_at_once(opened, tmp_path):
    source = tmp_path / "d"
    plain(source / "train", 12, images="inputs", masks="targets")
    plain(source / "val", 3, first=50, images="inputs", masks="targets")
    train, val = source / "train", source / "val"
    (train / "targets" / "case000.png").unlink()
    save(train / "targets" / "stray_mask.png", EIGHT)
    (train / "inputs" / "case001.png").write_bytes((train / "inputs" / "case001.png").read_bytes()[:400])
    (train / "targets" / "case002.png").write_bytes(b"")
    save(train / "targets" / "case003.png", blob(3, 48, 40).astype(np.uint8) * 255)
    save(train / "targets" / "case004.png", blob(4, 41, 48).astype(np.uint8) * 255)
    save(train / "targets" / "case005.png", INDICES)
    save(train / "inputs" / "case006.jpg", picture(99))
    save(train / "targets" / "case007_mask.png", EIGHT)
    save(train / "targets" / "case008.bmp", EIGHT)
    save(val / "inputs" / "case009.png", picture(98))
    save(val / "targets" / "case009.png", EIGHT)
    shutil.copy(train / "inputs" / "case010.png", val / "inputs" / "case051.png")
    with pytest.raises(DataProblems) as caught:
        opened(source)
    text, problems = str(caught.value), caught.value.problems
    expected = [("train/inputs/case000.png", "no mask"), ("train/targets/stray_mask.png", "without an image"),
                ("train/inputs/case001.png", "cannot be read"), ("train/targets/case002.png", "is empty"),
                ("train/targets/case003.png", "40x48", "EXIF"), ("train/targets/case004.png", "48x41"),
                ("train/targets/case005.png", "0, 1, 2", 'masks="any"'), ("duplicate id 'case006'", "case006.jpg", "case006.png"),
                ("train/inputs/case007.png", "several masks", "case007_mask.png"), ("train/inputs/case008.png", "several masks", "case008.bmp"),
                ("id 'case009' is in two splits", "val/inputs/case009.png"),
                ("one image in two splits", "train/inputs/case010.png (train)", "val/inputs/case051.png (valid)")]
    for words in expected:
        assert any(all(word in problem for word in words) for problem in problems), words
        assert all(word in text for word in words)
    assert len(problems) == len(expected), problems
    assert list((tmp_path / "cache").iterdir()) == [], "nothing was built"


def test_every_problem_of_a_manifest_at_once(opened, tmp_path):
    source, rows = prepared(tmp_path / "d", 14)
    changes = [{"image": "images/gone.png"}, {"mask": "masks/gone.png"}, {"fold": "first"}, {"split": "dev"}, {"width": "47"},
               {"height": "-3"}, {"id": "p07"}, {}, {"image": "../d/images/p08.png"}, {"id": ""}, {"split": "test", "fold": 1},
               {"split": "train"}, {"split": "valid", "image": "images/p11.png"}]
    for row, change in zip(rows, changes):
        row.update(change)
    save(source / "masks" / "p13.png", EIGHT * 255)
    manifest(source, rows)
    with pytest.raises(DataProblems) as caught:
        opened(source)
    expected = [("'p00'", "image images/gone.png does not exist"), ("'p01'", "mask masks/gone.png does not exist"),
                ("'p02'", "fold", "'first'"), ("'p03'", "split", "'dev'"), ("images/p04.png is 48x40", "manifest.csv says 47x40"),
                ("'p05'", "height", "'-3'"), ("duplicate id 'p07'",), ("'p08'", "relative"), ("id is empty",),
                ("'p10'", "test image cannot be in a fold"), ("one image in two splits", "images/p11.png (train), images/p11.png (valid)"),
                ("masks/p13.png", "class index 255", 'masks="binary"')]
    problems = caught.value.problems
    for words in expected:
        assert any(all(word in problem for word in words) for problem in problems), (words, problems)
    assert len(problems) == len(expected), problems


def test_leakage_that_a_manifest_adds_later_is_found_in_a_finished_cache(opened, tmp_path):
    source, rows = prepared(tmp_path / "d", split=lambda i: ["train", "valid"][i % 2])
    shutil.copy(source / "images" / "p00.png", source / "images" / "p02.png")
    data = opened(source)
    assert any("identical" in note for note in data.notes)
    rows[2]["split"] = "valid"
    manifest(source, rows)
    with pytest.raises(DataProblems, match="two splits.*p00.png .train., images/p02.png .valid."):
        opened(source)
    assert data.cache_folder.is_dir(), "pictures that are sound stay cached"


@pytest.mark.parametrize("columns, words", [(("id", "image"), ["lacks", "mask"]), (data_layout.COLUMNS + ("flod",), ["unknown", "'flod'"])])
def test_bad_columns(columns, words, opened, tmp_path):
    source, rows = prepared(tmp_path / "d")
    manifest(source, [{name: row.get(name, "") for name in columns} for row in rows], columns=columns)
    with pytest.raises(DataProblems) as caught:
        opened(source)
    assert all(word in str(caught.value) for word in words)


def test_a_long_list_is_shortened_in_the_message_only(opened, tmp_path):
    for i in range(120):
        save(tmp_path / "d" / "images" / f"{i}.png", RGB[:4, :4])
    (tmp_path / "d" / "masks").mkdir()
    with pytest.raises(DataProblems, match="and 20 more") as caught:
        opened(tmp_path / "d")
    assert len(caught.value.problems) == 120 and isinstance(caught.value, ValueError)


def test_unfinished_preparation_and_broken_description(opened, tmp_path):
    source, _ = prepared(tmp_path / "d")
    (source / "dataset.json").write_text("{")
    with pytest.raises(DataProblems, match="dataset.json cannot be understood"):
        opened(source)
    (source / "manifest.csv").unlink()
    with pytest.raises(ValueError, match="preparation did not finish"):
        opened(source)


@pytest.mark.parametrize("options, words", [
    ({"size": 31}, "size"), ({"size": 64.0}, "size"), ({"size": 60000}, "32 to 8192"), ({"classes": 0}, "classes"), ({"classes": 300}, "classes"), ({"resize": "crop"}, "resize"),
    ({"color": "bgr"}, "color"), ({"masks": "soft"}, "masks"), ({"valid_share": 0}, "valid_share"), ({"valid_share": 1.0}, "valid_share"),
    ({"fold": -1}, "fold"), ({"folds": 1}, "folds"), ({"workers": 0}, "workers"), ({"fold": 3}, "fold=3.*pass folds=N"),
    ({"fold": 2, "folds": 2}, "out of range: the folds are 0, 1"), ({"folds": 7}, "6 images cannot make folds=7"),
    ({"valid_share": 0.99}, "nothing would be left"),
])
def test_impossible_wishes(options, words, opened, tmp_path):
    with pytest.raises(ValueError, match=words):
        opened(plain(tmp_path / "d"), **options)


def test_sources_that_are_none(opened, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds nothing; expected"):
        opened(tmp_path / "empty")
    (tmp_path / "pair" / "images").mkdir(parents=True)
    (tmp_path / "pair" / "masks").mkdir()
    with pytest.raises(ValueError, match="pair is empty"):
        opened(tmp_path / "pair")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no .zip"):
        opened(tmp_path / "notes.txt")
    plain(tmp_path / "d" / "val", 3, images="inputs", masks="targets")
    with pytest.raises(ValueError, match="no training images: 0 train, 3 valid"):
        opened(tmp_path / "d")


# ---------------------------------------------------------------------------------------------------------------- zips
@pytest.mark.parametrize("prefix", ["", "wrapping/"])
def test_zip_of_a_folder(prefix, opened, tmp_path):
    source = plain(tmp_path / "d", 6)
    (source / "__MACOSX").mkdir()
    save(source / "__MACOSX" / "x.png", EIGHT)
    archive = zipped(source, tmp_path / "set.zip", prefix)
    data = opened(archive)
    assert data.name == ("wrapping" if prefix else "set") and len(data.train) == 5
    assert data.folder.is_relative_to(tmp_path / "cache" / "unzipped")
    before = data.folder.stat().st_mtime_ns
    assert opened(archive).folder.stat().st_mtime_ns == before, "extracted once"
    assert torch.equal(opened(source, masks="binary").train.batch([0, 1]).images, data.train.batch([0, 1]).images)


@pytest.mark.parametrize("name", ["../evil.png", "images/../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:/evil.png", "C:\\evil.png"])
def test_zip_that_reaches_outside(name, opened, tmp_path):
    archive = zipped(plain(tmp_path / "d"), tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, b"x")
    with pytest.raises(ValueError, match="outside the folder"):
        opened(archive)
    assert not list(tmp_path.rglob("evil*")) and not list((tmp_path / "cache").rglob("*.png"))


def test_zip_with_a_link(opened, tmp_path):
    archive = zipped(plain(tmp_path / "d"), tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("images/link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        opened(archive)


@pytest.mark.parametrize("name", ["images/case000.png", "images/CASE000.PNG", "./images/case000.png", "images//case000.png"])
def test_zip_with_one_name_twice(name, opened, tmp_path):
    archive = zipped(plain(tmp_path / "d"), tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr(name, b"x")
    with pytest.raises(ValueError, match="would be one file"):
        opened(archive)
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_zip_of_files_without_endings(opened, tmp_path):
    source = plain(tmp_path / "d")
    for path in sorted(source.rglob("*.png")):
        path.rename(path.with_suffix(""))
    assert len(opened(zipped(source, tmp_path / "größe ü.zip")).train) == 5


def test_zip_that_swells(opened, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("images/a.png", "w") as member:
            for _ in range(300):
                member.write(bytes(1_000_000))
    with pytest.raises(ValueError, match="swell to more than 256 MB"):
        opened(tmp_path / "set.zip")


def test_zip_that_is_cut(opened, tmp_path):
    archive = zipped(plain(tmp_path / "d"), tmp_path / "set.zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no complete .zip"):
        opened(archive)
    assert not list((tmp_path / "cache").rglob("*.png"))


# ---------------------------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("classes, bits", [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
@pytest.mark.parametrize("size", [32, 33, 50])
def test_packing_masks(classes, bits, size):
    assert mask_bits(classes) == bits
    masks = np.random.default_rng(0).integers(0, max(classes, 2), (3, size, size)).astype(np.uint8)
    packed = np.stack([pack_mask(mask, bits) for mask in masks])
    assert packed.shape == (3, -(-size * size * bits // 8)) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_masks(packed, bits, size), masks)


def test_cache_is_smaller_than_the_raw_pixels(opened, tmp_path):
    colorful = opened(plain(tmp_path / "d", 6))
    used = sum(path.stat().st_size for path in colorful.cache_folder.iterdir())
    assert used < 6 * 32 * 32 * 4
    for i in range(6):
        save(tmp_path / "g" / "images" / f"{i}.png", np.repeat(picture(i)[:, :, :1], 3, axis=2))
        save(tmp_path / "g" / "masks" / f"{i}.png", blob(i))
    gray = opened(tmp_path / "g")
    assert sum(path.stat().st_size for path in gray.cache_folder.iterdir()) < used / 2
    batch = gray.train.batch([1, 3])
    expected = resize_pair(*map(lambda f, p: f(p), (read_image, lambda p: read_mask(p, "binary")), gray.train.paths[1]), 32)
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), expected[0])
    assert batch.images.shape == (2, 3, 32, 32)
    assert opened(tmp_path / "g", color="ycrcb").train.batch([0]).images[0, 1:].unique().tolist() == [128]


def test_color_spaces_and_black(opened, tmp_path):
    source = plain(tmp_path / "d")
    rgb, ycrcb = (opened(source, color=color, resize="pad") for color in ("rgb", "ycrcb"))
    assert rgb.black == (0, 0, 0) and ycrcb.black == (0, 128, 128)
    stored = rgb.train.batch([0]).images[0].permute(1, 2, 0).contiguous().numpy()
    expected = cv2.cvtColor(stored, cv2.COLOR_RGB2YCrCb)
    np.testing.assert_array_equal(ycrcb.train.batch([0]).images[0].permute(1, 2, 0), expected)
    assert ycrcb.train.batch([0]).images[0, :, -1, 0].tolist() == [0, 128, 128]  # padding is black


def test_batches(opened, tmp_path):
    data = opened(plain(tmp_path / "d", 12), valid_share=0.1)
    assert len(data.train) == 11
    batch = data.train.batch(torch.tensor([4, 0, 4]))
    assert batch.ids == [data.train.ids[i] for i in (4, 0, 4)] and torch.equal(batch.images[0], batch.images[2])
    assert batch.images.is_contiguous(memory_format=torch.channels_last) and batch.images.dtype == batch.masks.dtype == torch.uint8
    batch.images.zero_()  # a copy, not the cache
    assert data.train.batch([4]).images.any()
    with pytest.raises(IndexError):
        data.train.batch([11])

    def order(**options):
        return [name for part in data.train.batches(4, **options) for name in part.ids]

    assert order() == data.train.ids and len(order(drop_last=True)) == 8
    assert order(shuffle=1) == order(shuffle=1) != order(shuffle=2) and sorted(order(shuffle=1)) == data.train.ids
    assert order(shuffle=1, start=2) == order(shuffle=1)[8:] and order(start=3) == []
    assert [len(part.ids) for part in data.train.batches(4)] == [4, 4, 3]
    for wrong in (True, False):  # once, False shuffled and True gave one order for ever
        with pytest.raises(ValueError, match="shuffle is the seed"):
            next(data.train.batches(4, shuffle=wrong))
    with pytest.raises(ValueError, match="batch must be"):
        next(data.train.batches(0))
    float_images = normalize(batch.images + 255)
    assert float_images.dtype == torch.float32 and (float_images == 1).all() and normalize(torch.zeros(1, 1, 2, 2)).min() == -1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu(opened, tmp_path):
    data = opened(plain(tmp_path / "d", 12))
    for here, there in zip(data.train.batches(4), data.train.batches(4, device="cuda")):
        assert there.images.is_cuda and torch.equal(here.images, there.images.cpu()) and torch.equal(here.masks, there.masks.cpu())


def test_cache_is_built_once_and_rebuilt_on_change(opened, tmp_path, monkeypatch, capsys):
    source = plain(tmp_path / "d")
    first = opened(source)
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "build_cache", lambda *a: pytest.fail("built twice"))
        again = opened(source)
    assert again.cache_folder == first.cache_folder
    save(source / "masks" / "case002.png", blob(77).astype(np.uint8) * 255)
    changed = opened(source, progress=True)
    assert changed.cache_folder != first.cache_folder and "100%" in capsys.readouterr().out
    assert not torch.equal(changed.train.batch(range(5)).masks, first.train.batch(range(5)).masks)
    assert len({opened(source, **o).cache_folder for o in ({}, {"size": 40}, {"resize": "pad"}, {"color": "ycrcb"}, {"masks": "any"})}) == 5
    plain(source, 1, first=6)
    assert len(opened(source).train) + 1 == 7


def test_damaged_cache_is_built_again(opened, tmp_path):
    source = plain(tmp_path / "d")
    data = opened(source)
    expected = data.train.batch([0]).images
    for damage in ("images.npy", "masks.npy", "entries.npy", "index.json"):
        file = data.cache_folder / damage
        file.write_bytes(file.read_bytes()[:100])
        assert torch.equal(opened(source).train.batch([0]).images, expected)


def test_where_the_cache_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("QTSEG_CACHE", str(tmp_path / "env"))
    assert cache_root("x") == Path.cwd() / "x" and cache_root() == tmp_path / "env"
    monkeypatch.delenv("QTSEG_CACHE")
    assert cache_root() == Path.home() / ".cache" / "qtseg"


@pytest.mark.parametrize("how", ["free", "write"])
def test_full_disk(how, opened, tmp_path, monkeypatch):
    source = plain(tmp_path / "d")
    with monkeypatch.context() as patch:
        if how == "free":
            patch.setattr(segmentation.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000))
        else:
            real_start = data_cache.start_array

            def start(path, shape):
                file = real_start(path, shape)
                if path.name == "masks.npy":
                    class Full(io.BytesIO):
                        def write(self, data):
                            raise OSError(errno.ENOSPC, "No space left on device")
                    file.close()
                    return Full()
                return file
            patch.setattr(data_cache, "start_array", start)
        with pytest.raises(OSError, match="no space left in .*cache.*QTSEG_CACHE") as caught:
            opened(source)
    assert caught.value.errno == errno.ENOSPC and list((tmp_path / "cache").iterdir()) == []
    assert len(opened(source).train) == 5


CHILD = """
import sys, time
from qtseg.data import cache as data_cache
from qtseg.data.segmentation import SegmentationData
prepare, slow = data_cache.prepare_pair, float(sys.argv[3])
def slowly(*arguments):
    print("one", flush=True)
    time.sleep(slow)
    return prepare(*arguments)
data_cache.prepare_pair = slowly
print("ready", flush=True)
sys.stdin.readline()
data = SegmentationData.open(sys.argv[1], size=32, cache=sys.argv[2], progress=False, workers=1)
print(data.cache_folder, int(data.train.batch(range(5)).images.sum()))
"""


def child(source: Path, cache: Path, slow: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(cache), str(slow)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_builders_and_one_that_is_killed(opened, tmp_path):
    source, cache = plain(tmp_path / "d"), tmp_path / "cache"
    killed, *builders = (child(source, cache, slow) for slow in (30, 0.1, 0.1))
    for process in (killed, *builders):
        assert process.stdout.readline() == "ready\n"
    killed.stdin.write("\n")
    killed.stdin.flush()
    assert killed.stdout.readline() == "one\n"  # it is building now
    left = list(cache.glob(".building*"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(left) == 1 and left[0].is_dir() and not [path for path in cache.iterdir() if not path.name.startswith(".")]
    results = []
    for process in builders:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in builders:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out.splitlines().count("one") == 6, "both built"
        results.append(out.splitlines()[-1])
    assert results[0] == results[1]
    assert [path.name for path in cache.iterdir()] == [Path(results[0].split()[0]).name], "one cache, nothing half-built left"
    data = opened(source)
    assert f"{data.cache_folder} {int(data.train.batch(range(5)).images.sum())}" == results[0]


def test_leftovers_of_living_builders_stay(opened, tmp_path):
    cache = tmp_path / "cache"
    living = cache / f".building,{socket.gethostname()},{os.getpid()},ab"
    elsewhere, strange = cache / ".building,elsewhere,1,ab", cache / f".building,{socket.gethostname()},x,ab"
    for folder in (living, elsewhere, strange):
        folder.mkdir(parents=True)
    opened(plain(tmp_path / "d"))
    assert living.is_dir() and elsewhere.is_dir() and strange.is_dir()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_over_epochs(opened, tmp_path):
    data = opened(plain(tmp_path / "d", 24), size=128)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for epoch in range(40):
        for batch in data.train.batches(8, shuffle=epoch):
            normalize(batch.images)
        sizes.append(resident())
    assert sizes[-1] - sizes[9] < 8e6, "less than one more batch of floats"


# ---------------------------------------------------------------------------------------------------------------- real images
@real("isic2018_512.zip")
def test_isic_sample(opened, tmp_path):
    chosen = []
    with zipfile.ZipFile(SHARED / "isic2018_512.zip") as archive:
        names = archive.namelist()
        for split, count in (("train", 12), ("val", 5)):
            images = [name for name in names if f"/{split}/inputs/" in name and name.endswith(".jpg")]
            chosen += random.Random(0).sample(images, count)
        with zipfile.ZipFile(tmp_path / "isic.zip", "w") as small:
            for name in chosen:
                mask = name.replace("/inputs/", "/targets/").replace(".jpg", "_segmentation.png")
                small.writestr(name, archive.read(name))
                small.writestr(mask, archive.read(mask))
    data = opened(tmp_path / "isic.zip", size=256, color="ycrcb")
    assert len(data.train) == 12 and len(data.valid) == 5 and data.name == "isic2018_512"
    batch = data.train.batch(range(12))
    for i, (image, mask) in enumerate(data.train.paths):
        expected = cv2.resize(cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2YCrCb), (256, 256), interpolation=cv2.INTER_AREA)
        assert abs(batch.images[i].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2  # rounding before or after
        stored = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE) > 127
        centers = (2 * np.arange(256) + 1) * 512 // 512  # floor((i + 1/2) * 2)
        np.testing.assert_array_equal(batch.masks[i], stored[centers][:, centers])


@real("bkai_512.zip")
def test_bkai_sample(opened, tmp_path):
    with zipfile.ZipFile(SHARED / "bkai_512.zip") as archive:
        images = sorted(name for name in archive.namelist() if "/images/" in name and name.endswith(".jpg"))[::50]
        for name in images + [name.replace("/images/", "/masks/").replace(".jpg", ".png") for name in images]:
            (tmp_path / Path(name).parent).mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(archive.read(name))
    source = tmp_path / "bkai_512"
    three, two = opened(source, classes=3, folds=4, fold=3, size=128), opened(source, masks="any", folds=4, fold=3, size=128)
    assert three.valid.ids == [Path(name).stem for name in images][-4:] and len(three.train) == 12
    for data, lift in ((three, lambda m: m), (two, lambda m: (m > 0).astype(np.uint8))):
        batch = data.valid.batch(range(4))
        for i, (image, mask) in enumerate(data.valid.paths):
            stored = lift(cv2.imread(str(mask), cv2.IMREAD_UNCHANGED))
            np.testing.assert_array_equal(batch.masks[i], stored[2::4, 2::4])
            small = cv2.resize(cv2.imread(str(image)), (128, 128), interpolation=cv2.INTER_AREA)[:, :, ::-1]
            assert abs(batch.images[i].permute(1, 2, 0).numpy().astype(int) - small).max() <= 2


@pytest.mark.parametrize("quality", [30, 40, 75, 95])
def test_an_empty_jpeg_mask_never_becomes_a_lesion(tmp_path, quality):
    """At some qualities black comes back as 1 everywhere, which is above half of its own maximum."""
    path = tmp_path / "empty.jpg"
    Image.fromarray(np.zeros((96, 128), np.uint8)).save(path, quality=quality)
    if np.asarray(Image.open(path)).max():
        with pytest.raises(ValueError, match="noise of an empty mask: save it as PNG"):
            read_mask(path, "binary")
    else:
        assert not read_mask(path, "binary").any()
