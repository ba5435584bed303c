"""Preparation: masks united and colored ones understood, folds as published and without leaks, nothing half-made taken for done."""
from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, one_sentence, zipped
from PIL import Image

from qtseg.data import preparation as data_preparation
from qtseg.colors import class_colors
from qtseg.data.cache import DataProblems
from qtseg.data.layout import Record, Survey, list_pictures, pair_up, take_pictures
from qtseg.data.reading import read_image, read_mask
from qtseg.data.segmentation import SegmentationData
from qtseg.files.pictures import read_picture
from qtseg.data.conversion import Done, as_png, census_of, contact_sheet, copyable, drop_twins, laid_over, union_of
from qtseg.data.own import judge, label
from qtseg.data.preparation import DataSet, bad_names, gather, prepare, report
from qtseg.data.sets import POLYP_RANGES, classes_of_colors, find_folders, one_folder
from qtseg.data.splits import held_out, slices


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A colored picture with some structure, uint8 [height, width, 3]; never gray."""
    y, x = np.mgrid[:height, :width]
    waves = [120 + 90 * np.sin(x * a + y * b + c) for a, b, c in np.random.default_rng(seed).uniform(0.05, 0.5, (3, 3))]
    return np.clip(np.stack(waves, axis=2), 0, 255).astype(np.uint8)


def box(top: int, left: int, height: int = 40, width: int = 48, side: int = 10) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:top + side, left:left + side] = 1
    return mask


def save(path: Path, array, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def raw_set(folder: Path, count: int = 12) -> Path:
    """A little raw set: pictures/ and targets/ of the same names, masks 0 and 255."""
    for i in range(count):
        save(folder / "pictures" / f"case{i:02d}.png", picture(i))
        save(folder / "targets" / f"case{i:02d}.png", box(i, i) * 255)
    return folder


def find(roots: list[Path]) -> Survey:
    found = Survey()
    images, masks = one_folder(found, roots, "pictures"), one_folder(found, roots, "targets")
    if images and masks:
        pair_up(found, list_pictures(images), list_pictures(masks), str)
    return found


def described(**changes) -> DataSet:
    values = dict(name="little", title="A little set", license="CC0", citation="nobody", page="https://example.org",
                  class_names=("background", "box"), find=find, folds=3)
    return DataSet(**(values | changes))


def rows(folder: Path) -> dict[str, dict]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as stream:
        return {row["id"]: row for row in csv.DictReader(stream)}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def pairs(*specifications: tuple) -> list[Record]:
    """Each: id, stratum, split, fold."""
    labels = ("stratum", "split", "fold")
    return [Record(name, Path(f"{name}.png"), (Path(f"{name}_mask.png"),), **dict(zip(labels, rest))) for name, *rest in specifications]


# masks

def test_union_of_masks_of_every_kind(tmp_path):
    kinds = {"one bit": Image.fromarray(box(0, 0) > 0), "gray": box(5, 5) * 255, "gray, dark": box(20, 20) * 200,
             "rgb": np.repeat(box(10, 30)[..., None] * 255, 3, axis=2),
             "rgba": np.dstack([*[box(28, 0) * 255] * 3, np.full((40, 48), 255, np.uint8)]), "empty": np.zeros((40, 48), np.uint8)}
    paths = [save(tmp_path / f"{name}.png", array) for name, array in kinds.items()]
    wanted = box(0, 0) | box(5, 5) | box(20, 20) | box(10, 30) | box(28, 0)
    union = union_of(paths, (40, 48), notes := [])
    assert union.dtype == np.uint8 and np.array_equal(union, wanted) and notes == []
    assert np.array_equal(union_of(paths, None, []), wanted)


def test_union_of_antialiased_edges_is_above_half_of_the_maximum(tmp_path):
    soft = np.zeros((4, 8), np.uint8)
    soft[0] = 0, 50, 100, 101, 150, 200, 200, 0
    assert union_of([save(tmp_path / "a.png", soft)], None, [])[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]


def test_a_mask_with_margins_is_laid_over_its_image(tmp_path):
    """As benign (4)_mask_1.png of BUSI: exported from a figure, with even margins around."""
    wide = np.zeros((60, 88), np.uint8)
    wide[10:50, 20:68] = box(3, 7) * 255
    paths = [save(tmp_path / "a_mask.png", box(25, 30) * 255), save(tmp_path / "a_mask_1.png", wide)]
    union = union_of(paths, (40, 48), notes := [])
    assert np.array_equal(union, box(25, 30) | box(3, 7))
    assert notes == ["a_mask_1.png: 88x60 pixels over an image of 48x40, its empty margins cut off"]


def test_laid_over_scales_the_same_aspect_and_refuses_guesses():
    scaled, done = laid_over(cv2.resize(box(10, 10), (96, 80), interpolation=cv2.INTER_NEAREST), 40, 48)
    assert done == "scaled" and np.array_equal(scaled, box(10, 10))
    assert laid_over(box(0, 0, 60, 50), 40, 48) is None  # foreground in the margin
    assert laid_over(box(0, 0, 30, 90), 40, 48) is None  # smaller one way, larger the other
    assert laid_over(box(0, 0, 48, 40), 40, 48) is None  # turned


def test_a_mask_that_fits_in_no_clear_way_is_refused_by_name(tmp_path):
    path = save(tmp_path / "turned.png", box(0, 0, 48, 40) * 255)
    with pytest.raises(ValueError, match=r"turned.png: 40x48 pixels over an image of 48x40, and no clear way"):
        union_of([path], (40, 48), [])


def opencv_hsv(image: np.ndarray) -> np.ndarray:
    """OpenCV's 8-bit hue, saturation, value in whole numbers, written anew: [..., 3] RGB -> [..., 3]."""
    red, green, blue = (image[..., channel].astype(np.int64) for channel in range(3))
    value, least = image.max(axis=-1).astype(np.int64), image.min(axis=-1).astype(np.int64)
    span = value - least
    counts = np.arange(1, 256)
    per_value = np.concatenate([[0], np.rint((255 << 12) / counts)]).astype(np.int64)
    per_span = np.concatenate([[0], np.rint((180 << 12) / (6.0 * counts))]).astype(np.int64)
    saturation = (span * per_value[value] + (1 << 11)) >> 12
    hue = np.where(value == red, green - blue, np.where(value == green, blue - red + 2 * span, red - green + 4 * span))
    hue = (hue * per_span[span] + (1 << 11)) >> 12
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], axis=-1)


def by_hand(image: np.ndarray) -> np.ndarray:
    """The reference's rule for BKAI masks in plain comparisons."""
    hue, saturation, value = np.moveaxis(opencv_hsv(image), -1, 0)
    red = ((hue <= 10) | (hue >= 160)) & (saturation >= 100) & (value >= 20)
    green = (hue >= 36) & (hue <= 70) & (saturation >= 25) & (value >= 25)
    return np.where(red, 2, np.where(green, 1, 0)).astype(np.uint8)


def test_colors_become_classes_as_the_reference_says():
    colors = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    assert np.array_equal(classes_of_colors(colors), by_hand(colors))
    named = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 0, 40], [0, 0, 255], [255, 255, 255], [19, 0, 0], [20, 0, 0]]],
                     np.uint8)
    assert classes_of_colors(named)[0].tolist() == [0, 2, 1, 2, 0, 0, 0, 2]


def test_no_color_is_both_red_and_green():
    """So the order of the ranges cannot matter: their hues are disjoint."""
    hues = [set(range(low[0], high[0] + 1)) for _, low, high in POLYP_RANGES]
    assert all(not a & b for i, a in enumerate(hues) for b in hues[:i])


# images

@pytest.mark.parametrize("name, options, extension", [
    ("plain.png", {}, ".png"), ("plain.jpg", {"quality": 90}, ".jpg"), ("plain.jpeg", {"quality": 90}, ".jpg"),
    ("plain.bmp", {}, None), ("plain.tif", {}, None)])
def test_what_can_be_copied(tmp_path, name, options, extension):
    path = save(tmp_path / name, picture(0), **options)
    assert copyable(read_picture(path), path.read_bytes()) == extension


def test_what_must_be_rewritten(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    gray = picture(0)[..., 0]
    files = {"alpha.png": (np.dstack([picture(0), gray]), {}, None), "turned.jpg": (picture(0), {"exif": turned}, None),
             "palette.png": (Image.fromarray(picture(0)).quantize(16), {}, None), "bits.png": (Image.fromarray(gray > 99), {}, None),
             "cmyk.jpg": (Image.fromarray(picture(0)).convert("CMYK"), {}, None), "gray.jpg": (gray, {}, None),
             "grays.png": (np.dstack([gray, gray])[..., 0], {}, ".png"), "deep.png": (gray.astype(np.uint16) * 257, {}, ".png"),
             "moving.png": (Image.fromarray(gray), {"save_all": True, "append_images": [Image.fromarray(gray + 1)]}, None),
             "upright.jpg": (picture(0), {"exif": upright}, ".jpg")}
    for name, (array, options, extension) in files.items():
        path = save(tmp_path / name, array, **options)
        assert copyable(read_picture(path), path.read_bytes()) == extension, name
    cv2.imwrite(str(path := tmp_path / "deep_rgb.png"), picture(0).astype(np.uint16) * 257)
    assert copyable(read_picture(path), path.read_bytes()) == ".png"


def test_images_arrive_as_they_were_or_as_png(tmp_path):
    source = tmp_path / "raw"
    copied = save(source / "pictures" / "a.jpeg", picture(1), quality=91)
    rewritten = save(source / "pictures" / "b.png", np.dstack([picture(2), np.full((40, 48), 9, np.uint8)]))
    for name in "ab":
        save(source / "targets" / f"{name}.png", box(3, 3) * 255)
    folder = prepare(described(folds=2), [source], tmp_path / "data", progress=False)
    assert (folder / "images" / "a.jpg").read_bytes() == copied.read_bytes()
    assert Image.open(folder / "images" / "b.png").mode == "RGB"
    assert np.array_equal(read_image(folder / "images" / "b.png"), read_image(rewritten))
    mask = Image.open(folder / "masks" / "a.png")
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), box(3, 3))


# finding

def test_folders_are_found_inside_any_wrapping(tmp_path):
    save(tmp_path / "Wrapped" / "Train" / "train" / "a.png", picture(0))
    save(tmp_path / "__MACOSX" / "train" / "a.png", picture(0))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert find_folders([tmp_path], "train") == [tmp_path / "Wrapped" / "Train" / "train"]
    assert find_folders([tmp_path], "train", "train") == [tmp_path / "Wrapped" / "Train" / "train"]
    assert find_folders([tmp_path / "empty", tmp_path], "test") == []


def test_two_folders_of_one_name_are_a_problem(tmp_path):
    for wrapping in "ab":
        save(tmp_path / wrapping / "train" / "a.png", picture(0))
    found = Survey()
    assert one_folder(found, [tmp_path], "train") is None and one_folder(found, [tmp_path], "test") is None
    (tmp_path / "a" / "train" / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "train" / "more").mkdir()
    assert one_folder(found, [tmp_path / "a"], "train")
    assert found.passed == [(str(tmp_path / "a" / "train" / name), "no picture") for name in ("more", "notes.txt")]
    assert found.problems[0].startswith("several folders train: ") and found.problems[1] == "no folder test with pictures in it"


def test_pairs_and_what_does_not_pair_up(tmp_path):
    images = [Path(f"{name}.png") for name in "abc"]
    masks = [Path(name) for name in ("a_m.png", "b_m.png", "b_m.bmp", "d_m.png")]
    found = Survey()
    pair_up(found, images, masks, lambda stem: stem[:-2], stratum="g")
    assert [(pair.id, pair.stratum, len(pair.masks)) for pair in found.records] == [("a", "g", 1)]
    assert found.problems == ["b.png: several masks, b_m.png, b_m.bmp", "c.png: no mask", "d_m.png: mask without an image"]
    pair_up(found := Survey(), images, masks, lambda stem: stem[:-2], several=True)
    assert [len(pair.masks) for pair in found.records] == [1, 2]


def test_names_that_differ_by_case_only_are_a_problem():
    assert bad_names(pairs(("a",), ("A",), ("b",))) == ["the same name twice: a.png, A.png"]


def test_names_that_are_not_safe_in_a_table_are_a_problem(tmp_path):
    odd = [Record(name, Path("x.png"), ()) for name in ("line\nbreak", "escape\x1b[2J", "turned\u202egnp", os.fsdecode(b"no unicode \xff"), " ")]
    problems = bad_names(odd)
    assert len(problems) == 5 and all("x.png: its name holds control characters" in problem for problem in problems)
    assert bad_names([Record(name, Path(), ()) for name in ("=1+1", "@x", "-a", "b,c", "ä", "<b>")]) == []
    assert len(bad_names([Record(name, Path(), ()) for name in ("straße", "STRASSE", "a", " a")])) == 2


def test_a_name_in_two_unicode_forms_is_one_name():
    found = Survey()
    pair_up(found, [Path(unicodedata.normalize("NFD", "läsion.png"))], [Path(unicodedata.normalize("NFC", "läsion.png"))], str)
    assert [pair.id for pair in found.records] == ["läsion"] and not found.problems
    pair_up(found := Survey(), [Path("a/p1/IM.0001"), Path("a/p2/x.y.png")], [Path("b/p1/IM.0001"), Path("b/p2/x.y.tif")], str,
            folders=(Path("a"), Path("b")))
    assert [pair.id for pair in found.records] == ["p1/IM.0001", "p2/x.y"] and not found.problems


@pytest.fixture
def maze(tmp_path):
    """A folder with a picture, links to itself and to its parent, a pipe, a link to a device, and 1200 folders in one another."""
    save(tmp_path / "maze" / "train" / "a.png", picture(0))
    for name, target in (("self", "."), ("up", ".."), ("zero.png", "/dev/zero"), ("nowhere", "gone")):
        (tmp_path / "maze" / "train" / name).symlink_to(target)
    os.mkfifo(tmp_path / "maze" / "train" / "pipe.png")
    here = os.open(tmp_path / "maze", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    yield tmp_path / "maze"
    subprocess.run(["rm", "-rf", tmp_path / "maze"])  # Python's own walk ends at a thousand


def test_walks_end(maze, tmp_path):
    assert find_folders([maze], "train") == [maze / "train"] and find_folders([maze], "other") == []
    assert data_preparation.fingerprint(maze) == data_preparation.fingerprint(maze) != data_preparation.fingerprint(maze / "train")
    assert gather([maze], tmp_path / "out", r".*\.zip") == [maze]
    found = Survey()
    assert take_pictures(found, maze / "train") == [maze / "train" / "a.png"]
    assert sorted(problem.split("/")[-1] for problem in found.problems) == [
        f"{name}: not a file (a pipe, a socket or a device)" for name in ("pipe.png", "zero.png")]
    assert len(found.passed) == 4 and all("train" in name for name, _ in found.passed)
    (maze / "far").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "elsewhere" / "test" / "b.png", picture(1))
    assert find_folders([maze], "test") == [maze / "far" / "test"]  # a link to a folder is followed


# folds

def test_busi_folds_as_published():
    """437 benign and 210 malignant, sorted by name: 87 and 42 per fold; the last two benign ones always train."""
    names = [("benign", i) for i in range(1, 438)] + [("malignant", i) for i in range(1, 211)]
    made = sorted(pairs(*((f"{kind} ({i})", kind) for kind, i in names)), key=lambda pair: pair.id)
    notes = slices(made, 5)
    for kind, size in (("benign", 87), ("malignant", 42)):
        members = [pair for pair in made if pair.stratum == kind]
        assert [pair.fold for pair in members] == [i // size for i in range(5 * size)] + [None] * (len(members) - 5 * size)
    assert [pair.id for pair in made if pair.fold is None] == ["benign (98)", "benign (99)"]  # plain string order
    assert notes == ["folds: 5 equal slices of 129 images, sorted by name, within each stratum; the last 2 always train"]


def test_slices_leave_the_test_part_alone_and_say_when_it_cannot_be_done():
    made = pairs(*((f"{i:02d}", "", "test" if i < 4 else "train") for i in range(10)))
    slices(made, 3)
    assert [(pair.fold, pair.split) for pair in made] == [(None, "test")] * 4 + [(i // 2, "") for i in range(6)]
    with pytest.raises(ValueError, match="2 images cannot make folds=3"):
        slices(pairs(("a",), ("b",)), 3)
    assert slices(pairs(("a",), ("b",)), None) == []


def test_held_out_is_a_tenth_of_train_and_always_the_same():
    def made() -> list[Record]:
        return pairs(*((f"{i:03d}", "", "test" if i < 20 else "train") for i in range(120)))

    first, second = made(), made()
    notes = held_out(first, None)
    held_out(second, None)
    assert [pair.split for pair in first] == [pair.split for pair in second]
    assert sum(pair.split == "valid" for pair in first) == 10 and all(pair.split == "test" for pair in first[:20])
    assert notes == ["no validation split: 10 % of train, seed 1996, held out (10 of 100 images)"]


def test_held_out_keeps_a_validation_part_and_makes_folds_if_asked():
    made = pairs(("a", "", "train"), ("b", "", "valid"), ("c", "", "test"), ("d", "", "train"))
    assert held_out(made, None) == [] and [pair.split for pair in made] == ["train", "valid", "test", "train"]
    held_out(made, 3)
    assert [pair.fold for pair in made] == [0, 1, None, 2]


def test_patients_and_strata_are_found_in_names():
    found = Survey(records=pairs(*((f"p{patient}_{kind}_{i}",) for patient in range(3) for kind in "ab" for i in range(patient + 1))))
    label(found, "patient", r"p(\d+)")
    label(found, "stratum", "[ab]")
    assert [(pair.patient, pair.stratum) for pair in found.records] == [(pair.id[1], pair.id[3]) for pair in found.records]
    assert found.problems == [] and found.notes[0] == "patient: 3 by 'p(\\d+)', with 2 to 6 images each"
    for pattern in ("p0", "(x)?"):  # not in all names; matches, but nothing
        label(found := Survey(records=pairs(("p0_a",), ("p1_a",))), "patient", pattern)
        assert "--patient" in found.problems[0] and "p1_a" in found.problems[0]


def test_patients_have_no_blanks_around_them_and_those_that_differ_by_capitals_are_a_warning():
    label(found := Survey(records=pairs((" p1_a",), ("p1 _b",), ("P1_c",), ("p2_d",))), "patient", "^([^_]+)_")
    assert [pair.patient for pair in found.records] == ["p1", "p1", "P1", "p2"]
    assert [note for note in found.notes if "WARNING" in note] == [
        "WARNING: the patient names 'P1' and 'p1' differ only by capitals or blanks: are they the same?"]


def test_held_out_and_folds_keep_patients_whole():
    def made() -> list[Record]:
        rng = np.random.default_rng(5)
        return [Record(f"p{patient:02d}_{i}", Path(), (), f"p{patient:02d}", "ab"[patient % 2], split="train")
                for patient in range(20) for i in range(rng.integers(1, 9))]

    for function, folds, of in ((held_out, None, "split"), (slices, 4, "fold"), (held_out, 4, "fold")):
        function(pairs_made := made(), folds)
        where = {}
        for pair in pairs_made:
            where.setdefault(pair.patient, set()).add(getattr(pair, of))
        assert all(len(places) == 1 for places in where.values()) and len(set.union(*where.values())) == (folds or 2)


def done(**entry) -> Done:
    """A pair of which nothing but the entry matters: 4x2 pixels, all background."""
    plain = {"hash": "", "height": 2, "width": 4, "bits": 8, "deep": False, "low": 0, "high": 255, "span": 0, "alpha": False, "frames": 1, "turned": 0,
             "mask_frames": 1, "mask_turned": 0, "ignored": 0, "pixels": [8, 0]}
    return Done({}, plain | entry, [], [])


def test_twins_of_two_patients_are_a_warning():
    made = [Record("a", Path(), (), "p1", "x"), Record("b", Path(), (), "p2", "x"), Record("c", Path(), (), "p3", "y")]
    assert drop_twins(made, ["1", "1", "2"]) == (set(), [])
    for hashes, words in ((["1", "1", "2"], "two patients (a = b)"), (["1", "2", "1"], "two strata (a = c)")):
        census = census_of(Survey(records=made), [done(hash=name) for name in hashes], ("background", "x"), 65535)
        assert any(words in warning for warning in census.warnings), census.warnings


def test_twins_stay_with_the_part_that_judges():
    made = pairs(("a", "", "train"), ("b", "", "test"), ("c", "", "valid"), ("d", "", "train"), ("e", "", "test"), ("f", "", "train"))
    dropped, notes = drop_twins(made, ["1", "1", "2", "2", "3", "3"])
    assert dropped == {"a", "d", "f"} and notes == ["left out, because the same file validates or tests: a, d, f"]
    folded = pairs(("a", "", "", 0), ("b", "", "", 1))
    dropped, notes = drop_twins(folded, ["1", "1"])
    assert not dropped and "1 image file(s) occur in two folds" in notes[0]


# the prepared folder

def test_the_prepared_folder(tmp_path, capsys):
    folder = prepare(described(), [raw_set(tmp_path / "raw")], tmp_path / "data", progress=True)
    assert "12/12" in capsys.readouterr().out
    assert folder == tmp_path / "data" / "little"
    assert {path.name for path in folder.iterdir()} == {"images", "masks", "manifest.csv", "dataset.json", "LICENSE.txt",
                                                        "contact_sheet.png"}
    table = rows(folder)
    assert list(table) == [f"case{i:02d}" for i in range(12)] and [row["fold"] for row in table.values()] == list("000011112222")
    assert {(row["width"], row["height"]) for row in table.values()} == {("48", "40")}
    description = json.loads((folder / "dataset.json").read_text())
    assert description["name"] == "little" and description["classes"] == ["background", "box"]
    assert (description["license"], description["citation"], description["page"]) == ("CC0", "nobody", "https://example.org")
    assert "License:  CC0" in (folder / "LICENSE.txt").read_text()
    for i in range(12):
        assert np.array_equal(read_mask(folder / "masks" / f"case{i:02d}.png"), box(i, i))
    data = SegmentationData.from_prepared(folder, fold=1, size=32, cache=tmp_path / "cache", progress=False)
    assert (len(data.train), len(data.valid), data.test) == (8, 4, None)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500


def test_the_summary_counts_rightly(tmp_path):
    folder = prepare(described(), [raw_set(tmp_path / "raw", 7)], tmp_path / "data", progress=False)
    text = report(folder)
    assert "fold 0        fold 1        fold 2  always train           all" in text
    assert re.search("images +2 +2 +2 +1 +7\n", text) and re.search("empty masks +0 +0 +0 +0 +0\n", text)
    assert "48x40 to 48x40, most often 48x40 (7)" in text and re.search(f"box: % of pixels .* {100 * 100 / (40 * 48):.3g}\n", text)


def test_the_table_names_strata_and_splits():
    made = pairs(*((str(i), kind, split) for i, (kind, split) in enumerate(
        [("b", "train"), ("a", "test"), ("a", "valid"), ("b", "train"), ("a", "train")])))
    census = census_of(Survey(records=made), [done(height=2 + i % 2) for i in range(5)], ("background", "x"), 65535)
    rows = {row[0].strip(): row[1:] for row in census.rows()}
    assert rows[""] == ["train", "valid", "test", "all"] and rows["images"] == ["3", "1", "1", "5"]
    assert rows["a"] == ["1", "1", "1", "3"] and rows["b"] == ["2", "0", "0", "2"] and rows["empty masks"][-1] == "5"
    assert rows["sizes"][-1] == "4x2 to 4x3, most often 4x2 (3)" and rows["bits"][-1] == "8 (5)" and rows["values"][-1] == "0 to 255"
    assert [line.split() for line in str(census).splitlines()[:2]] == [["train", "valid", "test", "all"], ["images", "3", "1", "1", "5"]]
    assert any("would score 100" in warning for warning in census.warnings)


def test_the_contact_sheet_shows_every_class(tmp_path):
    mask = box(2, 2) + 2 * box(20, 20)
    for name, array in (("images/a.png", picture(0)), ("masks/a.png", mask)):
        save(tmp_path / name, array)
    sheet = contact_sheet(tmp_path, [{"id": "a", "stratum": "", "image": "images/a.png", "mask": "masks/a.png"}], ("bg", "one", "two"))
    assert sheet.shape == (16 + 144, 960, 3)
    for color in class_colors(3)[1:]:
        assert (sheet[16:] == color).all(axis=2).sum() > 40
    assert not (sheet == class_colors(4)[3]).all(axis=2).any()


def test_the_contact_sheet_shows_ignored_pixels_in_gray_and_tiny_images(tmp_path):
    save(tmp_path / "images/a.png", picture(0))
    save(tmp_path / "masks/a.png", np.where(box(2, 2) > 0, 255, box(20, 20)).astype(np.uint8))
    sheet = contact_sheet(tmp_path, [{"id": "a", "stratum": "", "image": "images/a.png", "mask": "masks/a.png"}], ("bg", "one"))
    assert (sheet[16:] == 128).all(axis=2).sum() > 400 and (sheet[16:] == class_colors(2)[1]).all(axis=2).sum() > 40


def deep_set(folder: Path, top: int, count: int = 3) -> Path:
    """Gray images of 16 bits, the brightest pixel of all is `top`."""
    for i in range(count):
        values = (picture(i)[..., 0].astype(np.uint32) * top // 255).astype(np.uint16)
        values[0, 0] = top
        save(folder / "pictures" / f"{i}.png", Image.fromarray(values))
        save(folder / "targets" / f"{i}.png", box(i, i) * 255)
    return folder


@pytest.mark.parametrize("top, white", [(4000, 4095), (900, 1023), (65535, 65535), (200, 255)])
def test_images_of_12_bits_keep_their_levels(tmp_path, top, white):
    source = deep_set(tmp_path / "raw", top)
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    assert json.loads((folder / "dataset.json").read_text())["white"] == white
    assert (folder / "images" / "1.png").read_bytes() == (source / "pictures" / "1.png").read_bytes()
    shown = read_image(folder / "images" / "1.png", white)[1:, :, 0].astype(float)
    assert np.abs(shown - picture(1)[1:, :, 0] * (top / white)).max() <= 2
    assert re.search(r"bits +16 \(3\)\n", report(folder)) and f" to {top}\n" in report(folder)


def test_images_of_every_kind_keep_what_they_show(tmp_path):
    """A palette, one bit, a 16-bit TIFF of two pages, a DICOM and a file without ending; the odd ones are warnings."""
    shown, raw = {}, tmp_path / "raw" / "pictures"
    colors = Image.fromarray(picture(0)).quantize(16)
    save(raw / "palette.png", colors)
    shown["palette"] = np.asarray(colors.convert("RGB"))
    save(raw / "bits.png", Image.fromarray(picture(1)[..., 0] > 120))
    shown["bits"] = np.repeat((picture(1)[..., :1] > 120) * np.uint8(255), 3, axis=2)
    pages = [Image.fromarray(picture(i)[..., 0].astype(np.uint16) * 257) for i in (2, 3)]
    save(raw / "pages.tif", pages[0], save_all=True, append_images=pages[1:])
    shown["pages"] = np.repeat(picture(2)[..., :1], 3, axis=2)
    save(raw / "ending.png", picture(4)).rename(raw / "ending")
    shown["ending"] = picture(4)
    if importlib.util.find_spec("pydicom"):
        from test_inference import write_dicom

        write_dicom(raw / "scan.dcm", picture(5)[..., 0].astype(np.uint16), WindowCenter=128, WindowWidth=256)
        shown["scan"] = np.repeat(picture(5)[..., :1], 3, axis=2)
    for name in shown:
        save(tmp_path / "raw" / "targets" / f"{name}.png", box(3, 3) * 255)

    def find_all(roots):
        found = Survey()
        pair_up(found, *(take_pictures(found, roots[0] / part) for part in ("pictures", "targets")), str)
        return found

    folder = prepare(described(find=find_all, folds=None), [tmp_path / "raw"], tmp_path / "data", progress=False)
    for name, wanted in shown.items():
        assert np.abs(read_image(folder / "images" / f"{name}.png").astype(int) - wanted).max() <= (1 if name == "scan" else 0), name
    text = report(folder)
    assert "WARNING: 1 files hold several pages or frames, of which only the first is read (pages)" in text
    assert "WARNING: 1 images have more than 8 bits" in text and "(pages; " in text


def test_masks_that_were_looked_at_are_warned_of_as_by_open(tmp_path):
    """EXIF orientations that differ (in one line, with pages), inverted masks, images of few levels."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(4):
        (tmp_path / "raw" / "pictures").mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / "targets").mkdir(exist_ok=True)
        deep = picture(i)[..., 0].astype(np.uint16)
        deep[5, 5] = 65535
        Image.fromarray(deep).save(tmp_path / "raw" / "pictures" / f"a{i}.png", exif=exif)
        mask = Image.fromarray((255 - box(3, 3) * 255).astype(np.uint8))
        mask.save(tmp_path / "raw" / "targets" / f"a{i}.tif", save_all=True, append_images=[mask])

    def find_all(roots):
        found = Survey()
        pair_up(found, *(take_pictures(found, roots[0] / part) for part in ("pictures", "targets")), str)
        judge(found)
        return found

    text = report(prepare(described(find=find_all, folds=None), [tmp_path / "raw"], tmp_path / "data", progress=False))
    assert re.search("turned by EXIF +4 images, 0 masks", text)
    assert "WARNING: 4 images and their masks carry different EXIF orientations" in text and "(a0, a1, a2 and 1 more)" in text
    assert text.count("pages or frames") == 1 and "WARNING: 4 mask files hold several pages or frames" in text
    assert "WARNING: foreground fills more than half of 4 of 4 masks" in text
    assert "WARNING: 4 images keep fewer than 22 of 256 levels" in text


def test_what_is_alarming_is_a_warning(tmp_path):
    source = raw_set(tmp_path / "raw", 3)
    save(source / "targets" / "case01.png", np.full((40, 48), 255, np.uint8))
    notes = json.loads((prepare(described(class_names=("background", "box", "ring")), [source], tmp_path / "data", progress=False)
                        / "dataset.json").read_text())["notes"]
    assert "WARNING: class 2 (ring) occurs in no mask" in notes and "WARNING: 1 masks are full: no pixel is background (case01)" in notes


def test_a_varying_alpha_channel_is_told(tmp_path):
    """Of 8 and of 16 bits; one that hides nothing is not worth a word."""
    source, (y, x) = raw_set(tmp_path / "raw", 4), np.mgrid[:40, :48]
    for i, alpha in enumerate((x.astype(np.uint8), np.full((40, 48), 255, np.uint8))):
        save(source / "pictures" / f"case{i:02d}.png", np.dstack([picture(i), alpha]))
    cv2.imwrite(str(source / "pictures" / "case02.png"), np.dstack([picture(2), y.astype(np.uint8)]).astype(np.uint16) * 257)
    text = report(prepare(described(), [source], tmp_path / "data", progress=False))
    assert "WARNING: 2 images have an alpha channel that varies, which is not read (case00, case02)" in text


def test_an_image_is_never_its_own_mask(tmp_path):
    source = raw_set(tmp_path / "raw", 3)
    shutil.copy(source / "pictures" / "case01.png", source / "targets" / "case01.png")
    (source / "targets" / "case02.png").unlink()
    (source / "targets" / "case02.png").symlink_to(source / "pictures" / "case02.png")
    with pytest.raises(DataProblems) as caught:
        prepare(described(read=lambda paths, shape, notes: np.zeros(shape, np.uint8)), [source], tmp_path / "data", progress=False)
    assert caught.value.problems == [f"raw/pictures/case0{i}.png: its mask case0{i}.png is the same file" for i in (1, 2)]


def test_everything_wrong_is_listed_at_once(tmp_path):
    source = raw_set(tmp_path / "raw")
    whole = source / "pictures" / "case03.png"
    whole.write_bytes(whole.read_bytes()[:200])
    (source / "targets" / "case05.png").unlink()
    save(source / "targets" / "stray.png", box(0, 0) * 255)
    save(source / "targets" / "case07.png", box(0, 0, 48, 40) * 255)
    save(source / "pictures" / "case08.jpg", picture(3))
    with pytest.raises(DataProblems) as caught:
        prepare(described(), [source], tmp_path / "data", progress=False)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5, text
    for sentence in ("raw/pictures/case05.png: no mask", "raw/targets/stray.png: mask without an image",
                     "raw/pictures/case03.png: cannot be read", "raw/targets/case07.png: 40x48 pixels over an image of 48x40",
                     "the same name twice: raw/pictures/case08.jpg, raw/pictures/case08.png"):
        assert sentence in text
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("empty", [True, False])
def test_a_source_with_something_else_in_it(tmp_path, empty):
    save(tmp_path / "raw" / "other" / "a.png", picture(0))
    with pytest.raises(DataProblems, match="no pairs of image and mask|no folder pictures with pictures in it"):
        prepare(described(find=(lambda roots: Survey()) if empty else find), [tmp_path / "raw"], tmp_path / "data", progress=False)


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the archive as downloaded, or the folder"):
        prepare(described(), [tmp_path / "nowhere"], tmp_path / "data")


# archives

@pytest.mark.parametrize("form", ["folder", "wrapped folder", "zip", "wrapped zip", "zip in a folder", "zip in a zip", "two zips"])
def test_a_source_may_come_in_any_form(tmp_path, form):
    raw = raw_set(tmp_path / "raw" / "set", 6)
    packed = tmp_path / "packed"
    packed.mkdir()
    sources = {"folder": lambda: [raw], "wrapped folder": lambda: [raw.parent], "zip": lambda: [zipped(raw, packed / "a.zip")],
               "wrapped zip": lambda: [zipped(raw, packed / "a.zip", "deep/er/")],
               "zip in a folder": lambda: [zipped(raw, packed / "a.zip").parent],
               "zip in a zip": lambda: [zipped(zipped(raw, packed / "a.zip").parent, tmp_path / "outer.zip")],
               "two zips": lambda: [zipped(raw / part, packed / f"{part}.zip") for part in ("pictures", "targets")]}[form]()
    folder = prepare(described(), sources, tmp_path / "data", progress=False)
    assert len(rows(folder)) == 6
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["little"]  # what was unpacked is gone


def test_only_the_wanted_archives_inside_are_unpacked(tmp_path):
    (tmp_path / "in").mkdir()
    zipped(raw_set(tmp_path / "raw", 3), tmp_path / "in" / "a.zip")
    assert len(gather([tmp_path / "in"], tmp_path / "out", "b.zip")) == 1
    assert len(gather([tmp_path / "in"], tmp_path / "out", "a.zip")) == 2


def test_an_archive_that_reaches_outside_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../pictures/a.png", b"x")
    with pytest.raises(DataProblems, match="outside"):
        prepare(described(), [tmp_path / "evil.zip"], tmp_path / "data", progress=False)
    assert not list(tmp_path.rglob("a.png")) and not list((tmp_path / "data").iterdir())


def test_problems_inside_an_archive_are_named_as_in_the_archive(tmp_path):
    raw = raw_set(tmp_path / "raw", 3)
    (raw / "targets" / "case01.png").unlink()
    with pytest.raises(DataProblems) as caught:
        prepare(described(), [zipped(raw, tmp_path / "set.zip")], tmp_path / "data", progress=False)
    assert caught.value.problems == ["set/pictures/case01.png: no mask"]


# again, anew, at once, interrupted

def test_a_second_run_does_nothing(tmp_path, monkeypatch):
    source = raw_set(tmp_path / "raw")
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    before = state(folder)
    monkeypatch.setattr(data_preparation, "fill", lambda *arguments: pytest.fail("it was prepared already"))
    assert prepare(described(), [source], tmp_path / "data", progress=False) == folder
    assert prepare(described(download=lambda folder: pytest.fail("no need")), None, tmp_path / "data") == folder
    assert state(folder) == before


def test_other_wishes_need_force(tmp_path):
    source, other = raw_set(tmp_path / "raw"), raw_set(tmp_path / "other", 6)
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    with pytest.raises(ValueError, match=r"with other options \(folds was 3, now 4\): give --force"):
        prepare(described(), [source], tmp_path / "data", folds=4)
    with pytest.raises(ValueError, match="with other options .sources was"):
        prepare(described(), [other], tmp_path / "data")
    with pytest.raises(ValueError, match="kind was None, now 'x'"):
        prepare(described(settings={"kind": "x"}), [source], tmp_path / "data")
    prepare(described(), [other], tmp_path / "data", folds=0, force=True, progress=False)
    assert len(rows(folder)) == 6 and {row["fold"] for row in rows(folder).values()} == {""}
    assert len(list((folder / "images").iterdir())) == 6 and [path.name for path in (tmp_path / "data").iterdir()] == ["little"]


def test_a_changed_source_is_noticed(tmp_path):
    source = raw_set(tmp_path / "raw")
    prepare(described(), [source], tmp_path / "data", progress=False)
    save(source / "targets" / "case00.png", box(20, 20) * 255)
    os.utime(source / "targets" / "case00.png", ns=(1, 1))
    with pytest.raises(ValueError, match="sources was"):
        prepare(described(), [source], tmp_path / "data", progress=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, force):
    mine = tmp_path / "data" / "little" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ValueError, match="exists, but was not made by `qtseg prepare`: remove it, or name another --root"):
        prepare(described(), [raw_set(tmp_path / "raw", 3)], tmp_path / "data", force=force, progress=False)
    assert mine.read_text() == "years of work"


def test_a_half_made_folder_is_not_taken_for_done(tmp_path):
    source = raw_set(tmp_path / "raw")
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    (folder / "manifest.csv").unlink()
    assert data_preparation.made_from(folder) is None
    with pytest.raises(ValueError, match="exists, but was not made by `qtseg prepare`"):
        prepare(described(), [source], tmp_path / "data", progress=False)


@pytest.mark.parametrize("kind", ["notes beside the images", "a folder of results", "a redrawn mask", "a picture that is not in the table"])
def test_force_deletes_nothing_that_it_did_not_make(tmp_path, kind):
    source = raw_set(tmp_path / "raw", 3)
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    name = {"notes beside the images": "notes.txt", "a folder of results": "results/table.csv", "a redrawn mask": "masks/case01.png",
            "a picture that is not in the table": "images/case99.png"}[kind]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"an evening of work")
    os.utime(folder / name, ns=(2**62, 2**62))
    (folder / ".DS_Store").write_bytes(b"")  # nobody's
    with pytest.raises(ValueError, match=f"1 file.s. that `qtseg prepare` did not write, or that were changed since .{name}.: move them elsewhere"):
        prepare(described(), [source], tmp_path / "data", force=True, progress=False)
    assert (folder / name).read_bytes() == b"an evening of work" and len(rows(folder)) == 3
    with pytest.raises(ValueError, match="move them elsewhere"):
        data_preparation.set_aside(folder)  # also where the file came while the new folder was made
    (folder / name).unlink()
    if kind != "a redrawn mask":
        prepare(described(), [source], tmp_path / "data", force=True, progress=False)
        assert not (folder / ".DS_Store").exists()


def test_a_damaged_description_is_one_sentence(tmp_path, capsys):
    source = raw_set(tmp_path / "raw", 3)
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    for text in ("{", '{"prepared": {}', '{"a":' * 100_000, '{"n": ' + "9" * 5000 + "}", "[1]"):
        (folder / "dataset.json").write_text(text)
        for force in (False, True):
            with pytest.raises(ValueError) as caught:
                prepare(described(), [source], tmp_path / "data", force=force, progress=False)
            one_sentence(caught, str(folder / "dataset.json"))
    (folder / "dataset.json").write_text('{"prepared": 7}')
    with pytest.raises(ValueError, match="was not made by `qtseg prepare`"):
        prepare(described(), [source], tmp_path / "data", progress=False)
    (folder / "dataset.json").write_text('{"notes": 5, "summary": ["\\u001b[2J"], "classes": {}}')
    assert "\\x1b[2J" in report(folder) and "\x1b" not in report(folder)


def test_a_failure_leaves_nothing_and_force_keeps_the_old_one(tmp_path):
    source = raw_set(tmp_path / "raw")
    folder = prepare(described(), [source], tmp_path / "data", progress=False)
    (source / "targets" / "case00.png").unlink()
    with pytest.raises(DataProblems):
        prepare(described(), [source], tmp_path / "data", force=True, progress=False)
    assert len(rows(folder)) == 12 and [path.name for path in (tmp_path / "data").iterdir()] == ["little"]


PROCESS = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_preparation import described
from qtseg.data import preparation
read = preparation.union_of
def slow(paths, shape, notes):
    print("IN", flush=True)
    time.sleep({sleep})
    return read(paths, shape, notes)
print(preparation.prepare(described(read=slow), [Path({source!r})], {root!r}, workers=2, progress=False), flush=True)
"""


def process(source: Path, root: Path, sleep: float) -> subprocess.Popen:
    code = PROCESS.format(tests=str(ROOT / "tests"), source=str(source), root=str(root), sleep=sleep)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_in_the_middle_then_again(tmp_path):
    source, root = raw_set(tmp_path / "raw"), tmp_path / "data"
    victim = process(source, root, 5)
    assert victim.stdout.readline().startswith("IN")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert [path.name[:9] for path in root.iterdir()] == [".building"]
    folder = prepare(described(), [source], root, progress=False)
    assert len(rows(folder)) == 12 and [path.name for path in root.iterdir()] == ["little"]


def test_two_at_once(tmp_path):
    source, root = raw_set(tmp_path / "raw"), tmp_path / "data"
    both = [process(source, root, 0.02) for _ in range(2)]
    outputs = [one.communicate(timeout=300)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    assert len(rows(root / "little")) == 12 and [path.name for path in root.iterdir()] == ["little"]


def test_the_disk_fills_up(tmp_path, monkeypatch):
    def full(pixels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_preparation, "as_png", full)
    with pytest.raises(OSError, match="no space left"):
        prepare(described(), [raw_set(tmp_path / "raw")], tmp_path / "data", progress=False)
    assert not list((tmp_path / "data").iterdir())


def test_several_workers_make_the_same_bytes(tmp_path):
    source = raw_set(tmp_path / "raw")
    one, four = (prepare(described(), [source], tmp_path / str(n), workers=n, progress=False) for n in (1, 4))
    for path in one.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (four / path.relative_to(one)).read_bytes()


def test_as_png_keeps_every_pixel():
    assert np.array_equal(cv2.imdecode(np.frombuffer(as_png(picture(0)), np.uint8), cv2.IMREAD_COLOR)[..., ::-1], picture(0))
    assert np.array_equal(cv2.imdecode(np.frombuffer(as_png(box(1, 2)), np.uint8), cv2.IMREAD_UNCHANGED), box(1, 2))
