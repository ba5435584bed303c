"""Masks: what stored values mean is decided for a whole set; what is ambiguous is refused, with the option that settles it."""
from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from qtseg.data import DataProblems, SegmentationData, read_mask
from qtseg.files import read_picture
from qtseg.masks import COLORED, IGNORE, LOSSY, MaskReading, judge_masks, look_at, looks_up, spell, stored_values, value_code


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


def judged(*masks, lossy=False, **options):
    return judge_masks([look_at(f"{i}.png", np.asarray(mask), lossy) for i, mask in enumerate(masks)], **options)


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
    "0, 1, 255": ([LESION + RING * 255, LESION.astype(np.uint8), RING * 255], [LESION + RING * 255, LESION, RING * 255]),
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
    assert bool(notes) == ("beside" in name or name == "0, 1, 255")


def test_empty_jpeg_beside_others_is_empty_and_alone_is_refused(opened):
    data = opened([B, EMPTY, B, EMPTY], extension="jpg", saving={"quality": 40})
    assert {name: int(mask.sum()) > 100 for name, mask in all_masks(data).items()} == {"0": True, "1": False, "2": True, "3": False}
    with pytest.raises(DataProblems, match="noise of an empty mask: save it as PNG"):
        opened([EMPTY, EMPTY], extension="jpg", saving={"quality": 40})


# ---------------------------------------------------------------------------------------------------------------- what is refused
REFUSED = {
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
    ([np.dstack(PHOTO)], ["photographs"]),
], ids=["two colors", "one each", "red and white", "photograph"])
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
