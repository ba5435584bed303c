"""Masks: what stored values mean is decided for a whole set; what is ambiguous is refused, with the option that settles it."""
from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import hostile
import numpy as np
import pytest
from PIL import Image

from qtseg.data.cache import DataProblems
from qtseg.data.reading import read_mask
from qtseg.data.segmentation import SegmentationData
from qtseg.files.pictures import read_picture
from qtseg.data.mask_values import COLORED, IGNORE, LOSSY, MaskReading, look_at, spell, stored_values, value_code
from qtseg.data.masks import judge_masks, looks_up


def disc(x: int = 32, y: int = 32, r: int = 14) -> np.ndarray:
    j, i = np.mgrid[:64, :64]
    return (i - x) ** 2 + (j - y) ** 2 < r * r


LESION, SMALL, RING = disc(), disc(12, 12, 6), disc(r=18) & ~disc()
EMPTY = np.zeros((64, 64), np.uint8)
SOFT = cv2.GaussianBlur(LESION.astype(np.uint8) * 255, (0, 0), 1.2)
PHOTO = [np.random.default_rng(i).integers(0, 256, (64, 64)).astype(np.uint8) for i in range(3)]
SMOOTH = cv2.GaussianBlur(PHOTO[0].astype(float), (0, 0), 6)
SMOOTH = ((SMOOTH - SMOOTH.min()) / np.ptp(SMOOTH) * 255).astype(np.uint8)
NUMBERED = [sum((k + 1) * disc(8 + 12 * (k % 5), 8 + 12 * (k // 5), 5) for k in range(count)).astype(np.uint8) for count in (14, 20)]


def levels(*values: int) -> np.ndarray:
    """0 and discs of the given values."""
    mask = EMPTY.astype(np.int64)
    for place, value in enumerate(values):
        mask[disc(12 + 20 * (place % 3), 14 + 28 * (place // 3), 8)] = value
    return mask.astype(np.uint16 if max(values) > 255 else np.uint8)


def colors(*rgb: tuple[int, int, int]) -> np.ndarray:
    """Black and discs of the given colors."""
    mask = np.zeros((64, 64, 3), np.uint8)
    for place, color in enumerate(rgb):
        mask[disc(12 + 20 * place, 30, 8)] = color
    return mask


def written(array: np.ndarray | Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def data_set(folder: Path, masks: list, extension: str = "png", **saving) -> Path:
    for i, mask in enumerate(masks):
        written(np.random.default_rng(i).integers(0, 256, (64, 64, 3)).astype(np.uint8), folder / "images" / f"{i}.png")
        written(mask, folder / "masks" / f"{i}.{extension}", **saving)
    return folder


@pytest.fixture
def opened(tmp_path):
    def run(stored: list, *, extension="png", saving=None, **options):
        folder = data_set(tmp_path / f"set{len(list(tmp_path.iterdir()))}", stored, extension, **(saving or {}))
        return SegmentationData.open(folder, **{"size": 64, "cache": tmp_path / "cache", "progress": False, "workers": 2, "valid_share": 0.25} | options)
    return run


def all_masks(data) -> dict[str, np.ndarray]:
    """id -> cached mask, of train and valid."""
    return {name: mask for split in (data.train, data.valid) for name, mask in zip(split.ids, split.batch(range(len(split))).masks.numpy())}


def jpeg(mask: np.ndarray, quality: int) -> np.ndarray:
    """What a mask holds after JPEG."""
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def judged(*masks, **options):
    return judge_masks([look_at(f"{i}.png", np.asarray(mask)) for i, mask in enumerate(masks)], **options)


# ---------------------------------------------------------------------------------------------------------------- what is read
B = (LESION * 255).astype(np.uint8)
READ = {
    "0 and 1": ([LESION.astype(np.uint8), EMPTY, SMALL.astype(np.uint8)], [LESION, EMPTY, SMALL]),
    "0 and 255, one empty, one full": ([B, EMPTY, EMPTY + 255], [LESION, EMPTY, EMPTY + 1]),
    "0/1 beside 0/255": ([LESION.astype(np.uint8), B, EMPTY + 1, EMPTY], [LESION, LESION, EMPTY + 1, EMPTY]),
    "0/255 beside 0/65535": ([B, LESION.astype(np.uint16) * 65535], [LESION, LESION]),
    "0 and 77": ([LESION.astype(np.uint8) * 77, EMPTY], [LESION, EMPTY]),
    "softened": ([SOFT, EMPTY, B], [SOFT > 127, EMPTY, LESION]),
    "halved, 2x2 averages": ([cv2.resize(cv2.resize(B, (128, 128), interpolation=cv2.INTER_NEAREST)[1:127, 1:127], (64, 64), interpolation=cv2.INTER_AREA)], None),
    "16 bits": ([LESION.astype(np.uint16) * 65535, EMPTY.astype(np.uint16)], [LESION, EMPTY]),
    "JPEG noise saved as PNG": ([jpeg(B, 75), jpeg((SMALL * 255).astype(np.uint8), 75)], [LESION, SMALL]),
    "JPEG noise at a low quality": ([jpeg(B, 30), jpeg(EMPTY, 30)], [LESION, EMPTY]),
    "all full": ([EMPTY + 255, EMPTY + 255], [EMPTY + 1, EMPTY + 1]),
    "all ones": ([EMPTY + 1, EMPTY + 1], [EMPTY + 1, EMPTY + 1]),
    "0, 1, 255": ([LESION + RING * 255, LESION.astype(np.uint8), EMPTY], [LESION + RING * 255, LESION, EMPTY]),
    "255 alone in one of eleven": ([LESION + RING * 255] * 10 + [RING * 255], [LESION + RING * 255] * 10 + [RING * 255]),
}


@pytest.mark.parametrize("name", READ)
def test_sets_that_have_one_meaning(name):
    stored, expected = READ[name]
    stored = [np.asarray(mask, mask.dtype if mask.dtype == np.uint16 else np.uint8) for mask in stored]
    reading, problems, notes = judged(*stored)
    assert not problems and reading is not None
    for mask, right in zip(stored, expected or [mask > 127 for mask in stored]):
        found = reading.classes_of(mask)
        assert (found != right).mean() < (0.005 if "JPEG" in name else 1e-9)
        counted, ignored = reading.pixels(look_at("x", mask))
        assert counted == [int((found == 0).sum()), int((found == 1).sum())] and ignored == (found == IGNORE).sum()
    assert bool(notes) == ("beside" in name or "255 alone" in name or name == "0, 1, 255")


def test_empty_jpeg_beside_others_is_empty_and_alone_is_refused(opened):
    data = opened([B, EMPTY, B, EMPTY], extension="jpg", saving={"quality": 40})
    assert {name: int(mask.sum()) > 100 for name, mask in all_masks(data).items()} == {"0": True, "1": False, "2": True, "3": False}
    with pytest.raises(DataProblems, match="noise of an empty mask: save it as PNG"):
        opened([EMPTY, EMPTY], extension="jpg", saving={"quality": 40})


# ---------------------------------------------------------------------------------------------------------------- what is refused
AROUND = [cv2.GaussianBlur((disc(24 + i, 40 - i, 10 + i) * 255).astype(np.uint8), (0, 0), 1.2) for i in range(6)]
DARK = cv2.resize(PHOTO[0][:16, :16], (64, 64), interpolation=cv2.INTER_CUBIC) // 6
DOT = B.copy()
DOT[5, 5] = 1
REFUSED = {
    "one stray 1 among 0 and 255": ([B, B, B, DOT], {}, ["(3.png)", "alone or only with 0 in 3 (0.png", "ignore_value=255", "correct the values"]),
    "0 and 255 among 0, 1, 2, 255": ([levels(1, 2, 255), B], {"masks": "index", "classes": 3}, ["(1.png)", "ignore_value=255", "mask_values=[0, 1, 2, 255]"]),
    "0 120 255": ([levels(120, 255)] * 2, {}, ["0, 120, 255", "0.png", "mask_values=[0, 120, 255]", "classes=3", 'masks="any"']),
    "0 127 254": ([levels(127, 254)], {}, ["mask_values=[0, 127, 254]"]),
    "0 128 255, each in its own file": ([levels(128), levels(255)], {}, ["0, 128", "0, 255", "mask_values=[0, 128, 255]"]),
    "0 254 255": ([levels(254, 255)], {}, ["mask_values=[0, 254, 255]"]),
    "0 85 170 255": ([levels(85, 170, 255)], {}, ["mask_values=[0, 85, 170, 255]", "classes=4"]),
    "0 120 255, softened": ([cv2.GaussianBlur(np.kron(levels(120, 255), np.ones((4, 4), np.uint8)), (0, 0), 1.5)], {}, ["120", "mask_values"]),
    "labels from 1": ([LESION + np.uint8(1), EMPTY + 1], {}, ["1, 2", "mask_values=[1, 2]", "1.png"]),
    "labels from 1, as index": ([LESION + np.uint8(1), EMPTY + 1], {"masks": "index"}, ["class index 2", "mask_values=[1, 2]"]),
    "labels 1 to 3 of 3 classes": ([levels(1, 2) + np.uint8(1)], {"masks": "index", "classes": 3}, ["mask_values=[1, 2, 3]"]),
    "labels from 1, any": ([LESION + np.uint8(1)], {"masks": "any"}, ["every pixel would be foreground", "mask_values=[1, 2]"]),
    "1 and 255": ([np.where(LESION, 255, 1).astype(np.uint8)], {}, ["mask_values=[1, 255]"]),
    "class indices": ([levels(1, 2)], {}, ["0, 1, 2", "classes=3", 'masks="any"']),
    "class indices beside 0/255": ([levels(1, 2), B], {}, ["0, 1, 2 in 0.png", "0, 255 in 1.png"]),
    "0 and 2 beside 0/255": ([levels(2), B], {}, ["0, 2 in 0.png"]),
    "numbered": (NUMBERED, {}, ['masks="any"', "--instances", "0.png"]),
    "numbered, as index": (NUMBERED, {"masks": "index"}, ['masks="any"', "--instances"]),
    "numbered with 16 bits": ([NUMBERED[1].astype(np.uint16) * 900], {}, ['masks="any"']),
    "few numbers, differing": ([levels(1, 2, 3), levels(1, 2, 3, 4, 5)], {}, ['masks="any"']),
    "photographs": (PHOTO, {}, ["photographs", "images and masks"]),
    "smooth photographs": ([SMOOTH], {}, ["photographs"]),
    "a photograph among masks": ([B, B, B, PHOTO[1], B], {}, ["1 of 5", "3.png"]),
    "photographs, any": (PHOTO, {"masks": "any"}, ["photographs"]),
    "255 without classes, as index": ([B, LESION.astype(np.uint8)], {"masks": "index"}, ["class index 255", 'masks="binary"', "ignore_value=255"]),
    "a dark photograph among masks": ([B, B, B, DARK], {}, ["1 of 4", "photographs", "3.png"]),
    "0/120 among softened masks": ([*AROUND, B // 2 - 7 * LESION.astype(np.uint8)], {}, ["6.png: flat regions of 120", "white is 255"]),
    "softened 0/100 among softened masks": ([*AROUND, (SOFT // 2.55).astype(np.uint8)], {}, ["6.png: flat regions of 100"]),
    "a class of 3 beside 255": ([np.where(RING, 3, B).astype(np.uint8)] * 2, {}, ["0, 3, 255", "mask_values"]),
    "0 1 2 255 of two classes": ([levels(1, 2, 255)] * 2, {}, ["0, 1, 2, 255", "classes=3 if 255 counts nowhere", "mask_values=[0, 1, 2, 255]"]),
    "0 1 2 beside 0 255": ([levels(1, 2), B, B], {}, ["0, 1, 2 in 0.png", "mask_values=[0, 1, 2, 255]"]),
    "a colored photograph as index": ([LESION.astype(np.uint32), PHOTO[0] + (PHOTO[1].astype(np.uint32) << 8) + COLORED], {"masks": "index"}, ["photographs"]),
    "300 as index": ([levels(300)], {"masks": "index", "classes": 256}, ["class index 300"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sets_that_are_refused(name):
    masks, options, words = REFUSED[name]
    reading, problems, _ = judged(*masks, **options)
    assert reading is None and len(problems) == 1
    assert [word for word in words if word not in problems[0]] == [], problems[0]


@pytest.mark.parametrize("masks, words", [
    ([colors((255, 0, 0), (0, 0, 90))], ['mask_values=["#000000", "', '"#ff0000"', '"#00005a"', "classes=3"]),
    ([colors((0, 200, 0)), colors((200, 0, 0))], ["#00c800", "#c80000"]),  # one color a file, two in the set
    ([colors((255, 0, 0), (255, 255, 255))], ["#ff0000", "#ffffff"]),
    ([B, B, colors((255, 0, 0))], ["2.png", "while 8 masks hold only 0, 255: save it as they are"]),
    ([colors((255, 0, 0)), colors((255, 0, 0)), colors((100, 0, 0))], ["several strengths", '"#640000"', "2.png"]),
    ([np.dstack(PHOTO)], ["photographs"]),
], ids=["two colors", "one each", "red and white", "red among white", "two strengths", "photograph"])
def test_colors_are_refused_by_name(masks, words, opened):
    with pytest.raises(DataProblems) as caught:
        opened(masks * 4)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_palette_is_looked_at_by_color_or_by_index(opened):
    image = Image.fromarray(levels(1, 2), "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 90])
    with pytest.raises(DataProblems, match='"#00005a"'):
        opened([image] * 4)
    by_index, by_color = opened([image] * 4, classes=3), opened([image] * 4, classes=3, mask_values=["#000000", "#00005a", "#ff0000"])
    assert (all_masks(by_index)["0"] == levels(1, 2)).all() and (all_masks(by_color)["0"] == levels(2, 1)).all()
    void = Image.fromarray(np.where(RING, 255, LESION).astype(np.uint8), "P")
    void.putpalette([0, 0, 0, 128, 0, 0] + [0] * 759 + [224, 224, 192])
    data = opened([void] * 4, masks="index")
    assert data.ignore_index == IGNORE and (all_masks(data)["1"] == np.where(RING, 255, LESION)).all()


def paletted(indices: np.ndarray, *rgb: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for color in rgb for value in color])
    return image


BLACK, RED, GREEN, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 255)


def test_palettes_that_contradict_each_other_are_refused(opened):
    one, other = paletted(levels(1, 2), BLACK, RED, GREEN), paletted(levels(2, 1), BLACK, GREEN, RED)
    with pytest.raises(DataProblems, match='index 1 is "#ff0000" in masks/0.png, "#00ff00" in masks/1.png: name the colors.* mask_values=."#000000", "#00ff00", "#ff0000".*mask_values=.0, 1, 2.'):
        opened([one, other] * 2, classes=3)
    by_color = all_masks(opened([one, other] * 2, classes=3, mask_values=["#000000", "#ff0000", "#00ff00"]))
    assert all((mask == levels(1, 2)).all() for mask in by_color.values())
    by_index = all_masks(opened([one, other] * 2, classes=3, mask_values=[0, 1, 2]))
    assert (by_index["0"] == levels(1, 2)).all() and (by_index["1"] == levels(2, 1)).all()
    with pytest.raises(DataProblems, match="index 0 is"):
        opened([paletted(LESION, BLACK, WHITE), paletted(~LESION, WHITE, BLACK)] * 2, masks="any")
    anything = all_masks(opened([one, other] * 2, masks="any"))  # numbered objects may have any colors
    assert (anything["1"] == (levels(1, 2) > 0)).all()


@pytest.mark.parametrize("options", [{"masks": "index"}, {"masks": "any"}], ids=str)
def test_a_background_that_is_not_black_is_a_warning_where_another_index_is(options, opened):
    data = opened([paletted(~LESION, WHITE, BLACK)] * 4, **options)
    assert any('index 0, the background, is "#ffffff"' in warning and "index 1 is black" in warning for warning in data.census.warnings)
    assert not any("palette" in warning for warning in opened([paletted(LESION, WHITE, RED)] * 4, **options).census.warnings)


def test_numbers_name_the_indices_of_a_palette(opened):
    """Also of two classes, and beside ignored pixels."""
    assert looks_up("binary") and not looks_up("binary", [0, 1]) and not looks_up("binary", (), 255)
    with pytest.raises(DataProblems, match="holds 1 .*indices of a palette: name them, or its colors"):
        opened([paletted(LESION, BLACK, WHITE)] * 4, mask_values=[0, 255])
    void = paletted(np.where(RING, 2, LESION), BLACK, RED, WHITE)
    assert (all_masks(opened([void] * 4, ignore_value=2))["0"] == np.where(RING, IGNORE, LESION)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_masks_in_the_alpha_channel_are_refused(mode, opened):
    hidden = Image.new(mode, (64, 64), "white")
    hidden.putalpha(Image.fromarray(B))
    with pytest.raises(DataProblems, match="alpha channel, which is not read, holds 0 to 255 .masks/0.png"):
        opened([hidden] * 4)
    opaque = Image.fromarray(B).convert(mode)
    assert (all_masks(opened([opaque] * 4))["0"] == LESION).all()


@pytest.mark.parametrize("value", [120, 140])
@pytest.mark.parametrize("where", [slice(5, 6), slice(5, 7)])
def test_a_third_value_in_dots_is_a_warning(value, where, opened):
    dotted = B.copy()
    dotted[5, where] = value
    warnings = opened([dotted, B, B, B]).census.warnings
    assert any("(masks/0.png)" in text and f"hold {value}, taken for edges" in text and "up to 127" in text for text in warnings), warnings


def test_a_border_of_one_pixel_is_a_warning(opened):
    border = np.where(cv2.dilate(LESION.astype(np.uint8), np.ones((3, 3))) > LESION, 128, LESION * 255).astype(np.uint8)
    assert any("hold 128" in text and "ignore_value" in text for text in opened([border] * 4).census.warnings)


@pytest.mark.parametrize("extension, word", [("webp", "a WEBP"), ("jpg", "a JPEG")])
def test_compressed_indices_are_refused_by_the_name_of_their_format(extension, word, opened):
    with pytest.raises(DataProblems, match=word):
        opened([levels(1, 2)] * 4, extension=extension, classes=3)


@pytest.mark.parametrize("kind", ["lossless", "lossless with EXIF", "lossy", "lossy with alpha", "animation", "lossy animation"])
def test_lossless_webp_is_known_by_its_container(kind, opened, tmp_path):
    indices = Image.fromarray(np.repeat(levels(1, 2)[..., None], 3, axis=2))
    if "alpha" in kind:
        indices.putalpha(Image.fromarray(EMPTY + 255 - B // 2))
    exif = Image.Exif()
    exif[0x010E] = "a description"
    options = {"lossless": kind.startswith("lossless") or kind == "animation"} | ({"exif": exif} if "EXIF" in kind else {})
    options |= {"save_all": True, "append_images": [Image.fromarray(np.full((64, 64, 3), 9, np.uint8))]} if "animation" in kind else {}
    picture = read_picture(written(indices, tmp_path / "a.webp", **options))
    assert picture.format == ("WEBP" if "lossy" in kind else "WEBP lossless")
    if "lossy" in kind:
        with pytest.raises(DataProblems, match="a WEBP, whose compression may invent class indices"):
            opened([indices] * 4, extension="webp", saving=options, classes=3)
    else:
        assert all((mask == levels(1, 2)).all() for mask in all_masks(opened([indices] * 4, extension="webp", saving=options, classes=3)).values())


def test_masks_of_255_only_are_told_what_255_may_mean():
    assert "pass ignore_value=255 if these pixels count nowhere" in judged(EMPTY + 255, masks="index").problems[0]


def test_a_flat_gray_among_softened_edges_is_a_warning():
    marked = [mask.copy() for mask in AROUND * 4]
    marked[2][50:60, 50:60] = 120
    assert any("1 masks hold flat regions of 120 (2.png)" in note and "read as background" in note for note in judged(*marked).notes)
    assert not judged(*AROUND * 4).notes


def test_two_whites_beside_ignored_pixels(opened):
    """The ignored value is no file's white: neither where it is brighter than 1, nor in the cache."""
    stored = [np.where(RING, 200, LESION * white).astype(np.uint8) for white in (1, 255, 1, 255)]
    data = opened(stored, ignore_value=200)
    assert all((mask == np.where(RING, IGNORE, LESION)).all() for mask in all_masks(data).values())
    assert (data.valid.original_mask(0) == np.where(RING, IGNORE, LESION)).all() and data.census.rows()[2][-1] == "0"


def test_colored_jpegs_are_no_photographs_and_photographs_are_no_masks(opened):
    red, saving = colors((255, 0, 0)), {"quality": 75}
    with pytest.raises(DataProblems, match="a colored mask of .* save it with its few exact colors"):
        opened([red] * 4, extension="jpg", saving=saving)
    data = opened([red] * 4, extension="jpg", saving=saving, mask_values=["#000000", "#ff0000"])
    assert (all_masks(data)["0"] != (red[..., 0] > 0)).mean() < 0.03
    with pytest.raises(DataProblems, match="flat regions of 1[12].*mask_values=.0, 255. does not name: add it"):
        opened([levels(120, 255)] * 4, extension="jpg", saving={"quality": 90}, mask_values=[0, 255])
    with pytest.raises(DataProblems, match="4 of 4 masks look like photographs"):
        opened([np.dstack(PHOTO)] * 4, extension="jpg", saving=saving, mask_values=["#000000", "#ff0000"])


def test_pgm_masks_keep_their_stored_values(tmp_path):
    """Pillow brings the range that the file states to 0 to 255."""
    for highest in (1, 2):
        (tmp_path / "x.pgm").write_bytes(b"P5 3 1 %d\n" % highest + bytes([0, 1, highest]))
        assert read_mask(tmp_path / "x.pgm", classes=3).tolist() == [[0, 1, highest]]
        assert read_picture(tmp_path / "x.pgm").values[0, 2] == 255


def test_ignored_pixels_of_a_jpeg_are_the_nearest(opened):
    stored, saving = np.where(RING, 128, B).astype(np.uint8), {"quality": 90}
    with pytest.raises(DataProblems, match="JPEG, whose compression changes ignored pixels, too: name every value"):
        opened([stored] * 4, extension="jpg", saving=saving, ignore_value=128)
    data = opened([stored] * 4, extension="jpg", saving=saving, mask_values=[0, 255], ignore_value=128)
    found = all_masks(data)["0"]
    assert (found[RING] == IGNORE).mean() > 0.8 and data.census.rows() and (found[LESION] == 1).mean() > 0.95
    split, row = data.train, data.train._cache.entries
    assert int(row["ignored"].sum()) == sum(int((split.original_mask(i) == IGNORE).sum()) for i in range(len(split))) + int((data.valid.original_mask(0) == IGNORE).sum())


def test_dicom_masks_keep_their_stored_values(opened, tmp_path):
    """Also where a file lacks the highest class, or holds one class alone."""
    stored = [levels(1, 2), levels(1), EMPTY + 1, EMPTY]
    folder = data_set(tmp_path / "dicom", stored)
    for i, mask in enumerate(stored):
        (folder / "masks" / f"{i}.png").unlink()
        hostile.save(hostile.dicom(mask.astype(np.uint8).tobytes(), Rows=64, Columns=64))(folder / "masks" / f"{i}.dcm")
    data = SegmentationData.open(folder, size=64, classes=3, cache=tmp_path / "cache", progress=False, valid_share=0.25)
    assert all((mask == stored[int(name)]).all() for name, mask in all_masks(data).items())
    assert (data.train.original_mask(0) == stored[int(data.train.ids[0])]).all()
    assert (read_mask(folder / "masks" / "2.dcm") == 1).all()


# ---------------------------------------------------------------------------------------------------------------- options
def test_values_and_colors_by_name(opened):
    three = all_masks(opened([levels(120, 255)] * 4, classes=3, mask_values=[0, 120, 255]))["0"]
    assert (three == np.searchsorted([0, 120, 255], levels(120, 255))).all()
    assert (all_masks(opened([LESION + np.uint8(1)] * 4, mask_values=[1, 2]))["1"] == LESION).all()
    red = all_masks(opened([colors((255, 0, 0), (0, 0, 90))] * 4, classes=3, mask_values=["#000000", "#FF0000", "#00005a"]))["0"]
    assert {int(red[30, 12]), int(red[30, 32]), int(red[0, 0])} == {0, 1, 2}
    with pytest.raises(DataProblems, match="holds 120 .* mask_values=.0, 255. does not name: add them"):
        opened([levels(120, 255)] * 4, mask_values=[0, 255])
    data = opened([levels(128)] * 4, extension="jpg", saving={"quality": 90}, mask_values=[0, 128])
    assert (all_masks(data)["0"] != (levels(128) > 0)).mean() < 0.01 and any("nearest of mask_values" in note for note in data.notes)


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("classes", [2, 3, 4, 16])
def test_ignored_pixels_stay_ignored(classes, resize, opened):
    """Also where they need one more bit (4 classes, 16 classes), and where padding is added."""
    stored = np.vstack([np.where(RING, 255, np.where(LESION, classes - 1, 0)), EMPTY]).astype(np.uint8)[:100]
    folder = Path(opened.__closure__[0].cell_contents) / "padded"
    for i in range(4):
        written(np.full((100, 64, 3), 7 * i, np.uint8), folder / "images" / f"{i}.png")
        written(stored, folder / "masks" / f"{i}.png")
    data = SegmentationData.open(folder, size=100, resize=resize, classes=classes, cache=folder / "cache", progress=False, valid_share=0.25)
    mask = data.train.batch([0]).masks[0].numpy()
    assert data.ignore_index == IGNORE and set(np.unique(mask)) == {0, classes - 1, 255}
    assert (data.train.original_mask(0) == stored).all() and mask.dtype == np.uint8
    if resize == "pad":
        assert (mask[:, :64] == stored).all() and not mask[:, 64:].any()
    assert any('255 beside' in note and '"ignore"' in note and "ignore_value=255" in note for note in data.notes)
    again = SegmentationData.open(folder, size=100, resize=resize, classes=classes, cache=folder / "cache", progress=False, valid_share=0.25)
    assert again.notes == data.notes and again.ignore_index == IGNORE


def test_ignore_value_works_with_every_kind_of_mask(opened, tmp_path):
    def first(data):
        assert data.ignore_index == IGNORE
        return all_masks(data)["0"]

    expected = np.where(SMALL, IGNORE, LESION)
    assert (first(opened([np.where(SMALL, 77, LESION * 255).astype(np.uint8)] * 4, ignore_value=77)) == expected).all()
    assert (first(opened([np.where(SMALL, 9, LESION).astype(np.uint8)] * 4, ignore_value=9, masks="any")) == expected).all()
    assert (first(opened([np.where(SMALL, 200, LESION * 5).astype(np.uint8)] * 4, mask_values=[0, 5], ignore_value=200)) == expected).all()
    painted = np.zeros((64, 64, 3), np.uint8)
    painted[LESION], painted[SMALL] = (255, 0, 0), (0, 0, 255)
    assert (first(opened([painted] * 4, ignore_value="#0000ff")) == expected).all()
    assert (first(opened([painted] * 4, mask_values=["#000000", "#ff0000"], ignore_value="#0000ff")) == expected).all()
    assert (read_mask(written(painted, tmp_path / "one.png"), mask_values=["#000000", "#ff0000"], ignore_value="#0000ff") == expected).all()
    unused = opened([B] * 4, ignore_value=77)
    assert unused.ignore_index is None and any("ignore_value=77 occurs in no mask" in note for note in unused.notes)


@pytest.mark.parametrize("options, words", [
    ({"mask_values": [0, 120, 255]}, "names 3 values, but classes=2: pass classes=3"), ({"mask_values": [0, 0]}, "a value twice"),
    ({"mask_values": [0, "red"]}, "'red'"), ({"mask_values": [0, 70000]}, "70000"), ({"mask_values": [0, True]}, "True"),
    ({"mask_values": [0, 1], "masks": "any"}, "leave one of them out"), ({"mask_values": [0, 255], "ignore_value": 255}, "not both"),
    ({"ignore_value": -1}, "-1"), ({"classes": 256, "ignore_value": 255}, "at most 256 together"),
])
def test_options_that_contradict_each_other(options, words, opened):
    with pytest.raises(ValueError, match=words):
        opened([B] * 4, **options)


def test_codes_and_their_spelling():
    assert [value_code(value) for value in (7, "#070707", "#ff0000")] == [7, 7, COLORED + 0xFF0000]
    assert spell([0, 7]) == "0, 7" and spell([0, COLORED + 0xFF0000]) == '"#000000", "#ff0000"'
    assert looks_up("binary") and looks_up("index", ["#000000"]) and looks_up("any", (), "#000000") and not looks_up("index", [0, 1], 255)


def test_reading_in_pieces_equals_reading_at_once(tmp_path):
    """Large masks are counted in bands; a small copy is read with the brightest value of its file."""
    wide = np.zeros((2, 1 << 23), np.uint8)
    wide[1, 1:] = 255
    assert look_at("x", wide).counts == {0: (1 << 23) + 1, 255: (1 << 23) - 1}
    mixed = MaskReading("binary", mixed=True)
    assert mixed.classes_of(np.array([[0, 1]], np.uint8), top=1).tolist() == [[0, 1]]
    assert mixed.classes_of(np.array([[0, 1]], np.uint8), top=255).tolist() == [[0, 0]]
    picture = read_picture(written(B, tmp_path / "a.jpg", quality=80))
    assert picture.format in LOSSY and stored_values(picture).dtype == np.uint8


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is measured on Linux only")
def test_a_large_colored_mask_is_read_in_bands(tmp_path):
    """16 megapixels whose columns alternate, so that no run is longer than one pixel; in a process of its own."""
    for folder, size in (("small", 60), ("large", 4000)):
        for part in ("images", "masks"):
            (tmp_path / folder / part).mkdir(parents=True)
        for name, side in (("a", 60), ("b", size)):
            rows = (bytes(1) + bytes((200, 30, 30, 0, 0, 0)) * (side // 2)) * side
            head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
            (tmp_path / folder / f"masks/{name}.png").write_bytes(
                b"\x89PNG\r\n\x1a\n" + hostile.chunk(b"IHDR", head) + hostile.chunk(b"IDAT", zlib.compress(rows, 1)) + hostile.chunk(b"IEND", b""))
            Image.new("RGB", (side, side)).save(tmp_path / folder / f"images/{name}.jpg")
    code = """
import re, sys, time
from pathlib import Path
from qtseg.data.segmentation import SegmentationData

def megabytes(what):
    return int(re.search(what + r":\\s*([0-9]+)", Path("/proc/self/status").read_text())[1]) / 1024

for folder in ("small", "large"):  # the small set loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = megabytes("VmRSS"), time.process_time()
    SegmentationData.open(f"{sys.argv[1]}/{folder}", size=64, masks="any", cache=f"{sys.argv[1]}/cache", progress=False, workers=1)
print(megabytes("VmHWM") - before, time.process_time() - begun)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 250 and seconds < 3, f"{megabytes} MB, {seconds} s of the processor"


def test_255_beside_255_classes_counts_nowhere(tmp_path):
    """Found by test_fuzz: of 255 classes the last is 254."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = read_mask(written(values, tmp_path / "x.png"), "index", 255)
    assert (read == values).all() and read[-1, -1] == IGNORE
