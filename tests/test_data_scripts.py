"""Data scripts: real samples prepared as an independent computation has them, every set's road up to an epoch of training."""
from __future__ import annotations

import csv
import errno
import json
import re
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, shared_folder
from PIL import Image
from test_preparation import box, by_hand, picture, save

from qtseg.data import sets
from qtseg.data.cache import DataProblems
from qtseg.data.download import DownloadError
from qtseg.data.own import prepare_own
from qtseg.data.phantoms import phantom
from qtseg.data.preparation import prepare, prepare_set
from qtseg.data.segmentation import SegmentationData
from qtseg.data.sets import SETS
from qtseg.training.config import TrainConfig
from qtseg.training.loop import fit

SHARED = shared_folder() / "data"
FOLDER = ROOT / "data_scripts"


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A function: name -> (raw files as the sample holds them, the folder prepared from it); each made once."""
    made, root = {}, tmp_path_factory.mktemp("samples")

    def make(name: str) -> tuple[Path, Path]:
        archive = SHARED / f"{name}_raw_sample.zip"
        if not archive.is_file():
            pytest.skip(f"no {archive.name} in {SHARED}")
        if name not in made:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(root / "raw")
            folder = prepare(SETS[name], [archive], root / "data", progress=False)
            made[name] = root / "raw", folder
        return made[name]

    return make


def rows(folder: Path) -> dict[str, dict]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as stream:
        return {row["id"]: row for row in csv.DictReader(stream)}


def stored(folder: Path, row: dict) -> np.ndarray:
    picture = Image.open(folder / row["mask"])
    assert picture.mode == "L"
    return np.asarray(picture)


def by_table(image: np.ndarray) -> np.ndarray:
    """by_hand, each of the image's colors looked at once."""
    codes = image[..., 0].astype(np.int32) << 16 | image[..., 1].astype(np.int32) << 8 | image[..., 2]
    classes = np.zeros(1 << 24, np.uint8)
    classes[codes.reshape(-1)] = 1
    colors = np.flatnonzero(classes)
    classes[colors] = by_hand(np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=-1).astype(np.uint8))
    return classes[codes]


def one_epoch(folder: Path, tmp_path: Path, **wishes) -> dict:
    """The metrics of a tiny network after one epoch."""
    values = dict(data=str(folder), cache=str(tmp_path / "cache"), size=64, width=4, depths=[1, 1, 1], mlp_width=32, epochs=1, batch=4,
                  valid_batch=4, device="cpu", runs=str(tmp_path / "runs"), name="run", progress=False)
    result = fit(TrainConfig.from_dict(values | wishes))
    return json.loads((result.folder / "metrics.json").read_text())


# real samples

def test_bkai_sample(sample):
    raw, folder = sample("bkai")
    table = rows(folder)
    assert Counter(row["fold"] for row in table.values()) == {"0": 4, "1": 4, "2": 4, "3": 4, "4": 4, "": 3}
    assert list(table) == sorted(path.stem for path in (raw / "BKAI/train/train").iterdir()) and len(table) == 23
    assert [row["fold"] for row in table.values()] == [str(i // 4) if i < 20 else "" for i in range(23)]
    assert "3 test images without masks are not used" in json.loads((folder / "dataset.json").read_text())["notes"]
    for name, row in table.items():
        colored = np.asarray(Image.open(raw / "BKAI/train_gt/train_gt" / f"{name}.jpeg"))
        assert np.array_equal(stored(folder, row), by_table(colored)), name
        assert (folder / row["image"]).read_bytes() == (raw / "BKAI/train/train" / f"{name}.jpeg").read_bytes()


def test_busi_sample(sample):
    raw, folder = sample("busi")
    table = rows(folder)
    assert Counter((row["stratum"], row["fold"]) for row in table.values()) == {
        (kind, str(fold)): 4 for kind in ("benign", "malignant") for fold in range(5)}
    notes = json.loads((folder / "dataset.json").read_text())["notes"]
    assert "10 normal images, without a lesion, are not used" in notes and "2 image(s) with 2 masks, united" in notes
    for name, row in table.items():
        source = raw / "BUSI" / row["stratum"]
        image = Image.open(source / f"{name}.png")
        wanted = np.zeros(image.size[::-1], bool)
        for path in sorted(source.glob(f"{name}_mask*.png")):
            mask = np.asarray(Image.open(path).convert("L")) > 127
            if path.name == "benign (4)_mask_1.png":  # 555x465 over 416x416: a figure with margins, see `data.preparation`
                assert mask.shape == (465, 555) and wanted.shape == (416, 416)
                mask = mask[24:24 + 416, 69:69 + 416]
            wanted |= mask
        assert np.array_equal(stored(folder, row), wanted), name
        assert (folder / row["image"]).read_bytes() == (source / f"{name}.png").read_bytes()


def test_dsb2018_sample(sample):
    raw, folder = sample("dsb2018")
    table = rows(folder)
    cases = sorted((raw / "DSB2018" / "stage1_train").iterdir())
    assert list(table) == [case.name for case in cases] and len(table) == 60
    assert [row["fold"] for row in table.values()] == [str(i // 12) for i in range(60)]
    for case in cases:
        row = table[case.name]
        wanted = np.logical_or.reduce([np.asarray(Image.open(path)) > 127 for path in (case / "masks").glob("*.png")])
        assert np.array_equal(stored(folder, row), wanted), case.name
        alpha = np.asarray(Image.open(case / "images" / f"{case.name}.png"))
        assert alpha.shape[2] == 4 and np.array_equal(np.asarray(Image.open(folder / row["image"])), alpha[..., :3])


@pytest.mark.parametrize("name, wishes", [("busi", {"fold": 0}), ("bkai", {"fold": 1, "classes": 3}), ("dsb2018", {"fold": 4})])
def test_from_the_raw_sample_to_an_epoch(sample, tmp_path, name, wishes):
    _, folder = sample(name)
    metrics = one_epoch(folder, tmp_path, **wishes)
    assert metrics["images"]["valid"] == sum(row["fold"] == str(wishes["fold"]) for row in rows(folder).values())
    assert metrics["images"]["train"] + metrics["images"]["valid"] == len(rows(folder)) and 0 <= metrics["valid"]["dice"] <= 100


@pytest.mark.parametrize("name, inner", [("busi", "BUSI"), ("bkai", "BKAI"), ("dsb2018", "DSB2018/stage1_train")])
def test_the_unpacked_folder_does_as_well(sample, tmp_path, name, inner):
    raw, folder = sample(name)
    few = tmp_path / "few" / inner
    shutil.copytree(raw / inner, few, ignore=lambda path, names: [x for x in names if re.search(r"[(]([2-9]|1\d|25)[)]|^0[1-9]|^[1-9a-f]\w{10}", x)])
    for source in (few, tmp_path / "few"):
        found = SETS[name].find([source])
        assert found.records and not found.problems, found.problems


# fake archives in the official layouts

def pack(archive: Path, files: dict[str, np.ndarray]) -> Path:
    """Write a .zip of pictures."""
    folder = archive.with_suffix("")
    for name, array in files.items():
        save(folder / name, array)
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            packed.write(path, path.relative_to(folder).as_posix())
    shutil.rmtree(folder)
    return archive


def isic_archives(folder: Path, year: int, counts: dict[str, int], wrapped: bool = True) -> Path:
    """Archives as the challenge hands them out, under their names, with pictures drawn here."""
    folder.mkdir(parents=True)
    suffix = "_Segmentation" if year == 2016 else "_segmentation"
    for part, (images, masks) in sets.ISIC_PARTS[year].items():
        first = {"train": 0, "valid": 500, "test": 800}[part]
        names = [f"ISIC_{first + i:07d}" for i in range(counts.get(part, 0))]
        wrap = [f"{name}/" if wrapped else "" for name in (images, masks)]
        if names:
            pictures = {f"{wrap[0]}{name}.jpg": picture(first + i) for i, name in enumerate(names)}
            if year == 2017:
                pictures |= {f"{wrap[0]}{name}_superpixels.png": picture(0) for name in names}
            pack(folder / f"{images}.zip", pictures)
            pack(folder / f"{masks}.zip", {f"{wrap[1]}{name}{suffix}.png": box(i % 25, i % 30) * 255 for i, name in enumerate(names)})
    return folder


@pytest.mark.parametrize("year", [2016, 2017, 2018])
@pytest.mark.parametrize("wrapped", [True, False])
def test_isic(tmp_path, year, wrapped):
    counts = {"train": 20, "test": 6} | ({"valid": 3} if year > 2016 else {})
    source = isic_archives(tmp_path / "zips", year, counts, wrapped)
    folder = prepare(sets.isic(year), [source], tmp_path / "data", progress=False)
    table = rows(folder)
    wanted = counts if year > 2016 else {"train": 18, "valid": 2, "test": 6}
    assert folder.name == f"isic{year}" and Counter(row["split"] for row in table.values()) == wanted
    assert all((int(name[-3:]) >= 800) == (row["split"] == "test") for name, row in table.items())
    assert np.array_equal(stored(folder, table["ISIC_0000007"]), box(7, 7))
    if year == 2016:
        notes = json.loads((folder / "dataset.json").read_text())["notes"]
        assert notes == ["no validation split: 10 % of train, seed 1996, held out (2 of 20 images)"]


def test_isic_official_split_validates_on_the_test_images_and_says_so(tmp_path, capsys):
    source = isic_archives(tmp_path / "zips", 2016, {"train": 20, "test": 6})
    prepare_set(SETS["isic2016_official"], tmp_path / "data", sources=[source])
    out = capsys.readouterr().out
    assert out.startswith("*** official split: THE TEST IMAGES VALIDATE.")
    table = rows(tmp_path / "data" / "isic2016_official")
    assert Counter(row["split"] for row in table.values()) == {"train": 20, "valid": 6}
    assert all(int(name[-3:]) >= 800 for name, row in table.items() if row["split"] == "valid")
    description = json.loads((tmp_path / "data" / "isic2016_official" / "dataset.json").read_text())
    assert any("THE TEST IMAGES VALIDATE" in note for note in description["notes"]) and "test images validate" in description["title"]


def test_isic_2018_without_its_validation_part_and_with_folds(tmp_path):
    source = isic_archives(tmp_path / "zips", 2018, {"train": 20, "test": 6})
    folder = prepare(sets.isic(2018), [source], tmp_path / "a", progress=False)
    assert Counter(row["split"] for row in rows(folder).values()) == {"train": 18, "valid": 2, "test": 6}
    folder = prepare(sets.isic(2018), [source], tmp_path / "b", folds=4, progress=False)
    assert Counter(row["fold"] or row["split"] for row in rows(folder).values()) == {"0": 5, "1": 5, "2": 5, "3": 5, "test": 6}


def test_an_isic_image_that_also_tests_does_not_train(tmp_path):
    source = isic_archives(tmp_path / "zips", 2016, {"train": 20, "test": 6})
    with zipfile.ZipFile(source / "ISBI2016_ISIC_Part1_Test_Data.zip", "a") as archive:
        archive.write(save(tmp_path / "x.jpg", picture(3)), "ISBI2016_ISIC_Part1_Test_Data/ISIC_0000999.jpg")
    with zipfile.ZipFile(source / "ISBI2016_ISIC_Part1_Test_GroundTruth.zip", "a") as archive:
        archive.write(save(tmp_path / "x.png", box(1, 1) * 255), "ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_0000999_Segmentation.png")
    folder = prepare(sets.isic(2016), [source], tmp_path / "data", progress=False)
    assert "ISIC_0000003" not in rows(folder) and not (folder / "images" / "ISIC_0000003.jpg").exists()
    assert any(note.startswith("left out, because the same file") for note in json.loads((folder / "dataset.json").read_text())["notes"])


def test_the_addresses_are_those_of_the_reference():
    assert sets.isic_archives(2016) == [f"ISBI2016_ISIC_Part1_{part}_{kind}.zip" for part in ("Training", "Test")
                                   for kind in ("Data", "GroundTruth")]
    assert sets.ISIC_BUCKET == "https://isic-challenge-data.s3.amazonaws.com"
    assert [len(sets.isic_archives(year)) for year in (2016, 2017, 2018)] == [4, 6, 6]
    assert "19688169" in sets.FIVES_FILES and "19688169" in SETS["fives"].page


def fives_archive(folder: Path, train: int = 12, test: int = 4) -> Path:
    """FIVES as its authors laid it out: both parts count from 1, a letter names the disease."""
    folder.mkdir(parents=True)
    files = {}
    for part, count in (("train", train), ("test", test)):
        for i in range(count):
            name = f"{i + 1}_{'ADGN'[i % 4]}.png"
            files[f"FIVES/{part}/Original/{name}"] = picture(i + (500 if part == "test" else 0))
            files[f"FIVES/{part}/Ground truth/{name}"] = np.repeat(box(i, i)[..., None] * 255, 3, axis=2)
    return pack(folder / "FIVES.zip", files)


def test_fives(tmp_path):
    folder = prepare(SETS["fives"], [fives_archive(tmp_path / "zips", 20, 4)], tmp_path / "data", progress=False)
    table = rows(folder)
    assert Counter(row["split"] for row in table.values()) == {"train": 18, "valid": 2, "test": 4}
    assert {"train_1_A", "test_1_A"} <= set(table) and Counter(row["stratum"] for row in table.values()) == dict.fromkeys(
        sets.DISEASES.values(), 6)
    assert np.array_equal(stored(folder, table["test_3_G"]), box(2, 2))


def test_from_isic_archives_to_an_epoch(tmp_path):
    archives = isic_archives(tmp_path / "zips", 2016, {"train": 20, "test": 4})
    folder = prepare(sets.isic(2016), [archives], tmp_path / "data", progress=False)
    assert one_epoch(folder, tmp_path, color="ycrcb")["images"] == {"train": 18, "valid": 2, "test": 4}


def test_from_a_fives_archive_to_an_epoch(tmp_path):
    folder = prepare(SETS["fives"], [fives_archive(tmp_path / "zips")], tmp_path / "data", progress=False)
    metrics = one_epoch(folder, tmp_path)
    assert metrics["images"] == {"train": 11, "valid": 1, "test": 4}


def busi_like(folder: Path) -> Path:
    """Six benign and six malignant images, as BUSI lays them out; the third benign one has three masks."""
    for group in ("benign", "malignant"):
        for i in range(1, 7):
            save(folder / group / f"{group} ({i}).png", picture(i + 50 * (group == "malignant")))
            save(folder / group / f"{group} ({i})_mask.png", Image.fromarray(box(i, i) > 0))
    for number in (1, 2):
        save(folder / "benign" / f"benign (3)_mask_{number}.png", box(15 * number, 15 * number) * 255)
    return folder


def test_three_busi_masks_are_united(tmp_path):
    folder = prepare(SETS["busi"], [busi_like(tmp_path / "raw")], tmp_path / "data", folds=3, progress=False)
    wanted = box(3, 3) | box(15, 15) | box(30, 30)[:40]
    assert np.array_equal(stored(folder, rows(folder)["benign (3)"]), wanted)
    assert "1 image(s) with 3 masks, united" in json.loads((folder / "dataset.json").read_text())["notes"]


def test_dsb2018_case_without_masks_is_a_problem(tmp_path):
    for name in ("aaa", "bbb"):
        save(tmp_path / "raw" / "stage1_train" / name / "images" / f"{name}.png", np.dstack([picture(1), picture(2)[..., :1]]))
    save(tmp_path / "raw" / "stage1_train" / "aaa" / "masks" / "1.png", box(1, 1) * 255)
    save(tmp_path / "raw" / "stage1_test" / "ccc" / "images" / "ccc.png", picture(2))
    with pytest.raises(DataProblems) as caught:
        prepare(SETS["dsb2018"], [tmp_path / "raw"], tmp_path / "data", progress=False)
    assert caught.value.problems == ["raw/stage1_train/bbb: expected one image and at least one mask, found 1 and 0"]


# downloading

KAGGLE = {"busi": ("dataset", "aryashah2k/breast-ultrasound-images-dataset"), "bkai": ("competition", "bkai-igh-neopolyp"),
          "dsb2018": ("competition", "data-science-bowl-2018")}


@pytest.mark.parametrize("name", KAGGLE)
def test_kaggle_sets_ask_for_the_right_thing(monkeypatch, tmp_path, name):
    asked = []
    monkeypatch.setattr(sets, "fetch_kaggle", lambda kind, name, folder, **options: asked.append((kind, name, options)) or folder / "x")
    assert SETS[name].download(tmp_path) == [tmp_path / "x"]
    assert asked == [(*KAGGLE[name], {"checksums": tmp_path / "checksums.json"})] and SETS[name].page.endswith(KAGGLE[name][1])


def test_isic_downloads_then_prepares_then_does_nothing(monkeypatch, tmp_path, capsys):
    server, asked = isic_archives(tmp_path / "server", 2016, {"train": 20, "test": 6}), []

    def fetch(url, target, **options):
        assert "License:  CC0" in capsys.readouterr().out or asked  # the terms come first
        asked.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(server / target.name, target))

    monkeypatch.setattr(sets, "fetch", fetch)

    def prepared(**options):
        prepare_set(SETS["isic2016"], tmp_path / "data", **options)
        return capsys.readouterr().out

    assert "downloaded:" in prepared(download_only=True)
    assert asked == [f"{sets.ISIC_BUCKET}/2016/{name}" for name in sets.isic_archives(2016)]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["downloads"]
    out = prepared()
    assert re.search("train +valid +test +all", out) and "contact_sheet.png" in out and len(asked) == 8
    assert "prepared already" in prepared() and len(asked) == 8
    prepared(force=True)
    assert len(asked) == 12 and {path.name for path in (tmp_path / "data").iterdir()} == {"downloads", "isic2016"}


def test_fives_asks_figshare_for_the_archive(monkeypatch, tmp_path):
    answer = [{"name": "readme.txt", "download_url": "https://x/1"}, {"name": "FIVES.rar", "download_url": "https://x/2"}]

    def fetch(url, target, **options):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(answer) if url == sets.FIVES_FILES else f"the bytes of {url}")
        return target

    monkeypatch.setattr(sets, "fetch", fetch)
    archive, = sets.download_fives(tmp_path)
    assert archive.name == "FIVES.rar" and archive.read_text() == "the bytes of https://x/2"
    assert not (tmp_path / "fives_files.json").exists()
    for answer in ([], {"message": "gone"}, [{"name": "FIVES.rar"}]):
        with pytest.raises(DownloadError, match="another form than expected.*--from"):
            sets.download_fives(tmp_path)


def test_a_full_disk_is_told_with_its_remedy(monkeypatch, tmp_path):
    def fetch_kaggle(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sets, "fetch_kaggle", fetch_kaggle)
    with pytest.raises(OSError, match="no space left in .*: free some, or name another --root; nothing is left half-made"):
        prepare_set(SETS["busi"], tmp_path)


# the command line

def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_line(tmp_path):
    raw = busi_like(tmp_path / "raw")
    done = script("busi", "--root", tmp_path / "data", "--from", raw, "--folds", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BUSI, dataset of breast ultrasound images\nLicense:  CC0 1.0") and "12/12" in done.stdout
    assert re.search(r"malignant +2 +2 +2 +6", done.stdout) and "contact_sheet.png" in done.stdout
    wrong = script("busi", "--root", tmp_path / "data", "--from", tmp_path / "nowhere")
    assert wrong.returncode == 1 and f"{tmp_path / 'nowhere'} does not exist" in wrong.stderr and "Traceback" not in wrong.stderr


def test_own_data_from_the_command_line(tmp_path):
    for i in range(12):
        save(tmp_path / "A" / f"patient{i // 3}_{i}.png", picture(i))
        save(tmp_path / "B" / f"patient{i // 3}_{i}_mask.png", box(3, 3) + 2 * box(20, 20))
    arguments = ("--images", tmp_path / "A", "--masks", tmp_path / "B", "--classes", 3, "--root", tmp_path / "data")
    done = script("own", *arguments, "--folds", 4, "--patient", r"patient(\d+)", "--class-names", "background,cyst,node")
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / "data" / "own")
    folds = {name: {row["fold"] for key, row in table.items() if key.startswith(name)} for name in (f"patient{i}_" for i in range(4))}
    assert sorted(folds.values(), key=str) == [{"0"}, {"1"}, {"2"}, {"3"}] and {row["patient"] for row in table.values()} == set("0123")
    assert json.loads((tmp_path / "data" / "own" / "dataset.json").read_text())["classes"] == ["background", "cyst", "node"]
    again = script("own", *arguments, "--folds", 4)
    assert again.returncode == 1 and "give --force to replace it" in again.stderr and "Traceback" not in again.stderr


def own_run(tmp_path: Path, *words: str, images: str = "A", masks: str = "B") -> Path:
    """prepare_own with the options of `qtseg prepare own`."""
    options, words = {"root": tmp_path / "data"}, list(words)
    while words:
        key = words.pop(0)[2:].replace("-", "_")
        value = True if key in ("instances", "force") else words.pop(0)
        options[key] = int(value) if key in ("folds", "workers") else value
    return prepare_own(tmp_path / images, tmp_path / masks, **options)


def refused(tmp_path: Path, *words: str, **folders: str) -> list[str]:
    """The lines of the error; nothing is left behind."""
    with pytest.raises(ValueError) as caught:
        own_run(tmp_path, *words, **folders)
    assert not (tmp_path / "data" / "own").exists()
    return str(caught.value).splitlines()


def description(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def test_own_beside_a_set_with_other_folds_is_told_so_and_what_to_do(tmp_path, capsys):
    painted(tmp_path, lambda mask, i: (mask > 0).astype(np.uint8) * 255)
    own_run(tmp_path)
    capsys.readouterr()
    with pytest.raises(ValueError) as caught:
        own_run(tmp_path, "--folds", "3")
    assert re.search(r"own was prepared with other options .folds was 5, now 3.: give --force to replace it, or another --root", str(caught.value))
    assert "already" not in capsys.readouterr().out
    own_run(tmp_path)
    assert "prepared already; --force makes it anew" in capsys.readouterr().out


def test_own_wishes_that_cannot_be_met(tmp_path):
    for i in range(3):
        save(tmp_path / "A" / f"a{i}.png", picture(i))
        save(tmp_path / "B" / f"a{i}.png", box(3, 3) * 255)
    for arguments, sentence in (
            (["--classes", "1"], "--classes must be 2 to 255"), (["--classes", "many"], "--classes must be 2 to 255"),
            (["--classes", "0,0"], "or as many different values"), (["--classes", "#000000,#zz0000"], 'a color "#rrggbb", got \'#zz0000\''),
            (["--classes", "0,70000"], "a whole number from 0 to 65535"), (["--ignore", "white"], "a whole number from 0 to 65535"),
            (["--class-names", "a,b,c"], "and --class-names as many; got 2 and a, b, c"),
            (["--instances", "--classes", "3"], "leave --classes and --masks-are out"), (["--patient", "("], "--patient is no regular expression"),
            (["--name", "a/b"], "--name must be the name of one folder"), (["--name", ".."], "--name must be the name of one folder"),
            (["--folds", "1"], "--folds must be 0 or at least 2, got 1"), (["--workers", "0"], "--workers must be at least 1, got 0"),
            (["--stratum", "dog"], "--stratum 'dog' finds nothing in 3 name(s): a0, a1, a2"), (["--folds", "7"], "3 images cannot make folds=7"),
            (["--patient", "a", "--folds", "2"], "all 3 images belong to one patient"), (["--patient", ""], "--patient is empty: leave it out"),
            (["--masks-are", "index"], "holds class index 255, but --classes 2 allows 0 to 1: pass --masks-are binary")):
        assert sentence in "\n".join(refused(tmp_path, *arguments)), arguments


def test_own_writes_neither_into_its_source_nor_below_a_file(tmp_path):
    painted(tmp_path, lambda mask, i: (mask > 0).astype(np.uint8) * 255)
    before = sorted(tmp_path.rglob("*"))
    for root, sentence in (("A", "would lie in .*A, whose pictures it is made from: name another --root"), ("B/deep", "would lie in .*B,"),
                           ("A/x0.png", "would lie in"), ("file", "--root must be a folder, and .*file is a file")):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match=sentence):
            own_run(tmp_path, "--root", str(tmp_path / root))
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_own_problems_all_at_once(tmp_path):
    for i in range(4):
        save(tmp_path / "A" / f"a{i}.png", picture(i))
    save(tmp_path / "A" / "x_mask.png", picture(9))  # an image whose own name ends like a mask's
    save(tmp_path / "B" / "x_mask.png", box(1, 1) * 255)
    save(tmp_path / "B" / "a1.png", box(3, 3)[:30] * 255)
    for name in ("a2.png", "a2_mask.png", "stray.png", "a3_segmentation.png"):
        save(tmp_path / "B" / name, box(3, 3) * 255)
    (tmp_path / "A" / "broken.png").write_bytes(b"not a picture")
    save(tmp_path / "B" / "broken.png", box(3, 3) * 255)
    lines = refused(tmp_path)
    assert lines[0].startswith("5 problem(s)") and len(lines) == 6
    for sentence in ("A/a0.png: no mask", "A/a1.png: 48x40 pixels, but its mask a1.png has 48x30", "A/a2.png: several masks, B/a2.png, B/a2_mask.png",
                     "B/stray.png: mask without an image", "A/broken.png: cannot be read"):
        assert any(sentence in line for line in lines), sentence


# patients and strata

def clinic(tmp_path: Path, images_of: list[int], stratum_of) -> Path:
    """Phantoms: p00_a_0.png, …; images_of: how many each patient has; stratum_of: patient and image -> letter."""
    for patient, count in enumerate(images_of):
        for i in range(count):
            image, mask = phantom("dermoscopy", 100 * patient + i, 32)
            name = f"p{patient:02d}_{stratum_of(patient, i)}_{i}.png"
            save(tmp_path / "A" / name, image)
            save(tmp_path / "B" / name, (np.asarray(mask) > 0).astype(np.uint8) * 255)
    return tmp_path


def unevenness(strata: list[str], places: list) -> int:
    """The largest difference between two folds in the images of one stratum."""
    counts = Counter(zip(strata, places))
    return max(max(counts[stratum, place] for place in set(places)) - min(counts[stratum, place] for place in set(places)) for stratum in set(strata))


PATIENT, STRATUM = ("--patient", r"^p(\d+)_"), ("--stratum", "_([ab])_")


@pytest.mark.parametrize("images_of, stratum_of", [
    ([4] * 10, lambda patient, i: "ab"[patient % 2]),  # 40 images of 10 patients in 2 strata
    ([4] * 10, lambda patient, i: "ab"[i % 2]),  # a patient has both kinds
    ([1, 8, 3, 5, 2, 7, 4, 6, 1, 8, 2, 3, 5, 1, 4], lambda patient, i: "ab"[patient % 3 == 0])], ids=["even", "mixed", "1 to 8"])
def test_own_keeps_patients_whole_and_spreads_strata(tmp_path, images_of, stratum_of):
    model_selection = pytest.importorskip("sklearn.model_selection")
    table = list(rows(own_run(clinic(tmp_path, images_of, stratum_of), *PATIENT, *STRATUM)).values())
    assert {(row["id"][1:3], row["id"][4]) == (row["patient"], row["stratum"]) for row in table} == {True} and len(table) == sum(images_of)
    patients, strata, folds = ([row[key] for row in table] for key in ("patient", "stratum", "fold"))
    assert all(len({fold for name, fold in zip(patients, folds) if name == patient}) == 1 for patient in patients) and set(folds) == set("01234")
    yardstick = [0] * len(table)
    for fold, (_, members) in enumerate(model_selection.StratifiedGroupKFold(5).split(table, strata, patients)):
        for member in members:
            yardstick[member] = fold
    ours = unevenness(strata, folds)
    assert ours <= max(unevenness(strata, yardstick), 1)
    if len(set(images_of)) == 1:
        sizes = Counter(zip(strata, folds))
        wanted = {stratum: strata.count(stratum) / 5 for stratum in "ab"}
        assert all(abs(sizes[stratum, fold] - wanted[stratum]) <= 1 for stratum in "ab" for fold in "01234")


@pytest.mark.parametrize("images_of", [[4] * 10, [1, 8, 3, 5, 2, 7, 4, 6, 1, 8]], ids=["even", "1 to 8"])
def test_own_without_folds_holds_out_whole_patients(tmp_path, images_of):
    folder = own_run(clinic(tmp_path, images_of, lambda patient, i: "ab"[patient % 2]), *PATIENT, *STRATUM, "--folds", "0")
    assert {(row["fold"], row["split"]) for row in rows(folder).values()} == {("", "")}
    data = SegmentationData.open(folder, size=32, valid_share=0.25, progress=False, cache=tmp_path / "cache")
    assert data.train.patients and not set(data.train.patients) & set(data.valid.patients) and set(data.valid.strata) == {"a", "b"}
    assert len(data.train) + len(data.valid) == sum(images_of) and abs(len(data.valid) / sum(images_of) - 0.25) < 0.15


# odd folders

def test_own_images_and_masks_in_one_folder(tmp_path):
    """No image becomes its own mask, whichever way the two folders lie in one another."""
    for i in range(6):
        save(tmp_path / "F" / "p" / f"x{i}.jpg", picture(i))
        save(tmp_path / "F" / "p" / f"x{i}_mask.png", box(i, i) * 255)
    table = rows(own_run(tmp_path, images="F", masks="F"))
    assert list(table) == [f"p/x{i}" for i in range(6)] and table["p/x0"]["mask"] == "masks/p/x0.png"
    assert np.array_equal(stored(tmp_path / "data" / "own", table["p/x3"]), box(3, 3))
    (tmp_path / "G").mkdir()
    for i in range(6):
        save(tmp_path / "G" / f"x{i}.png", picture(i))
        save(tmp_path / "G" / "masks" / f"x{i}.png", box(i, i) * 255)
    assert len(rows(own_run(tmp_path, "--force", images="G", masks="G/masks"))) == 6
    save(tmp_path / "H" / "y.png", box(1, 1) * 255)
    save(tmp_path / "H" / "images" / "y.png", picture(0))
    assert list(rows(own_run(tmp_path, "--force", "--folds", "0", images="H/images", masks="H"))) == ["y"]
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "L").symlink_to(tmp_path / "H" / "images")  # the same folder by another name
    for images, masks in (("H/images", "H/images"), ("H/images", "L")):
        assert "is the folder of images and of masks" in refused(tmp_path, images=images, masks=masks)[1]


@pytest.mark.parametrize("image, mask", [("x{}", "mask_x{}"), ("x{}", "x{}_seg"), ("x{}", "x{}_label"), ("x{}", "x{}_gt"), ("img_{}", "mask_{}")])
@pytest.mark.parametrize("masks", ["B", "A"], ids=["two folders", "one folder"])
def test_own_what_masks_may_be_called(tmp_path, image, mask, masks):
    for i in range(6):
        save(tmp_path / "A" / f"{image.format(i)}.jpg", picture(i))
        save(tmp_path / masks / f"{mask.format(i)}.png", box(i, i) * 255)
    folder = own_run(tmp_path, masks=masks)
    table = rows(folder)
    assert list(table) == [image.format(i) for i in range(6)] and all(
        np.array_equal(stored(folder, row), box(i, i)) for i, row in enumerate(table.values()))


def test_own_masks_of_ignored_pixels_only(tmp_path):
    folder = own_run(painted(tmp_path, lambda mask, i: ignoring(mask, i) * 0 + 255 if i < 2 else ignoring(mask, i)), "--ignore", "255")
    assert any("2 masks hold ignored pixels only" in note and "(x0, x1)" in note for note in description(folder)["notes"])
    data = SegmentationData.from_prepared(folder, size=64, progress=False, cache=tmp_path / "cache")
    assert data.ignore_index == 255 and any("2 masks hold ignored pixels only" in warning for warning in data.census.warnings)


def painted(tmp_path: Path, paint, names=lambda i: f"x{i}.png") -> Path:
    """Six phantoms with two kinds of polyp; paint: class index [H, W] -> the mask's file."""
    for i in range(6):
        image, mask = phantom("endoscopy", i, 64)
        save(tmp_path / "A" / f"x{i}.png", image)
        save(tmp_path / "B" / names(i), paint(np.asarray(mask), i))
    return tmp_path


COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)


def numbered(mask: np.ndarray, i: int) -> np.ndarray:
    """25 squares, each with a number of its own."""
    numbers = np.zeros(mask.shape, np.uint8)
    for square in range(25):
        numbers[12 * (square // 5) + 2:12 * (square // 5) + 10, 12 * (square % 5) + 2:12 * (square % 5) + 10] = square + 1
    return numbers


@pytest.mark.parametrize("paint, arguments, words", [
    (lambda mask, i: np.array([0, 120, 255], np.uint8)[mask], ["--classes", "0,120,255"], ["0, 120, 255", "--classes '0,120,255'", "--ignore"]),
    (lambda mask, i: np.array([0, 127, 254], np.uint8)[mask], ["--classes", "0,127,254"], ["--classes '0,127,254'"]),
    (lambda mask, i: mask + np.uint8(1), ["--classes", "1,2,3"], ["--classes '1,2,3'"]),
    (lambda mask, i: COLORS[mask], ["--classes", "#000000,#FF0000,#00ff00"], ["colors", "--classes '#000000,#ff0000,#00ff00'", "--instances"]),
    (lambda mask, i: Image.fromarray(mask).convert("P"), ["--classes", "3"], ["--classes '0,1,2'", "--instances"])],
    ids=["0 120 255", "0 127 254", "from 1", "colors", "index"])
def test_own_masks_of_three_values(tmp_path, paint, arguments, words):
    """Read as black and white they are refused in one sentence, and the option that it names reads them right."""
    problem = refused(painted(tmp_path, paint))
    assert len(problem) == 2 and all(word in problem[1] for word in ["B/x", *words]), problem
    assert "mask_values" not in problem[1] and "ignore_value" not in problem[1]
    folder = own_run(tmp_path, *arguments)
    table = rows(folder)
    for i in range(6):
        assert np.array_equal(stored(folder, table[f"x{i}"]), phantom("endoscopy", i, 64)[1])
    said = description(folder)
    assert len(said["classes"]) == 3 and said["ignore"] is None and len(said["mask_values"]) == (3 if "," in arguments[1] else 0)


def ignoring(mask: np.ndarray, i: int) -> np.ndarray:
    """Two classes, and 255 in a band."""
    mask = (mask > 0).astype(np.uint8)
    mask[:5] = 255
    return mask


@pytest.mark.parametrize("arguments", [[], ["--ignore", "255"], ["--classes", "0,1", "--ignore", "255"]], ids=["seen", "named", "values"])
def test_own_masks_with_ignored_pixels(tmp_path, arguments):
    folder = own_run(painted(tmp_path, ignoring), *arguments)
    for i, row in enumerate(rows(folder).values()):
        assert np.array_equal(stored(folder, row), ignoring(np.asarray(phantom("endoscopy", i, 64)[1]), i))
    said = description(folder)
    assert said["ignore"] == 255 and any("ignored: % of pixels" in line for line in said["summary"])
    assert bool(arguments) != any("255" in note and "--ignore 255" in note for note in said["notes"])
    data = SegmentationData.from_prepared(folder, size=64, progress=False, cache=tmp_path / "cache")
    assert data.ignore_index == 255


def test_own_masks_of_numbered_objects(tmp_path):
    problem = refused(painted(tmp_path, numbered))
    assert len(problem) == 2 and "numbered instances" in problem[1] and "--instances" in problem[1] and "own.py" not in problem[1]
    folder = own_run(tmp_path, "--instances")
    assert all(np.array_equal(stored(folder, row), numbered(np.zeros((64, 64)), 0) > 0) for row in rows(folder).values())


def test_own_photographs_are_no_masks(tmp_path):
    for masks in ("A", "B"):  # one folder of photographs for the masks; then the two folders swapped
        for i in range(4):
            save(tmp_path / "A" / f"x{i}.png", picture(i))
            noise = np.random.default_rng(i).integers(0, 40, (40, 48, 3))
            save(tmp_path / "B" / f"x{i}.png", np.clip(picture(i + 9) + noise, 0, 255).astype(np.uint8))
        problem = refused(tmp_path)
        assert len(problem) == 2 and "look like photographs" in problem[1] and "B/x0.png" in problem[1] and "mixed up" in problem[1]
    save(tmp_path / "C" / "x0.png", box(1, 1) * 255)
    for i in range(1, 4):
        save(tmp_path / "C" / f"x{i}.png", box(i, i) * 255)
    assert any("look like photographs" in line for line in refused(tmp_path, images="C", masks="A"))


def test_own_subfolders_forms_and_links(tmp_path):
    """A folder for each patient; a Mac's names; one patient's folder lies elsewhere, behind a link."""
    for patient in range(3):
        for i in range(2):
            save(tmp_path / "A" / unicodedata.normalize("NFD", f"Jörg{patient}") / f"x{i}.png", picture(9 * patient + i))
            save(tmp_path / "B" / unicodedata.normalize("NFC", f"Jörg{patient}") / f"x{i}_mask.png", box(i, patient) * 255)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "A" / unicodedata.normalize("NFD", "Jörg2")).rename(elsewhere)
    (tmp_path / "A" / "Jörg2").symlink_to(elsewhere)
    (tmp_path / "A" / "again").symlink_to(tmp_path / "A")
    (tmp_path / "A" / "notes.txt").write_text("not a picture")
    folder = own_run(tmp_path, "--folds", "3", "--patient", "^([^/]+)/")
    table = rows(folder)
    assert list(table) == [f"Jörg{patient}/x{i}" for patient in range(3) for i in range(2)]
    assert {row["patient"]: row["fold"] for row in table.values()}.keys() == {"Jörg0", "Jörg1", "Jörg2"}
    assert np.array_equal(stored(folder, table["Jörg2/x1"]), box(1, 2))
    assert any("A/notes.txt (no picture)" in line for line in description(folder)["summary"])
    data = SegmentationData.from_prepared(folder, size=32, progress=False, cache=tmp_path / "cache")
    assert len(data.train) == 4 and len(data.valid) == 2


def test_own_names_stay_exact_in_the_table_and_harmless_on_the_terminal(tmp_path, capsys):
    names = ["=1+1", "+a", "-b", "@c", "d,e", "<img src=x onerror=alert(1)>", "'f'"]
    for i, name in enumerate(names):
        save(tmp_path / "A" / f"{name}.png", picture(i))
        save(tmp_path / "B" / f"{name}.png", box(i, i) * 255)
    assert sorted(rows(own_run(tmp_path, "--folds", "0"))) == sorted(names)
    data = SegmentationData.open(tmp_path / "data" / "own", size=32, progress=False, cache=tmp_path / "cache")
    assert sorted(data.train.ids + data.valid.ids) == sorted(names)
    shutil.rmtree(tmp_path / "data")
    for odd in ("esc\x1b[2J", "turn\u202egnp"):
        save(tmp_path / "A" / f"{odd}.png", picture(9))
        save(tmp_path / "B" / f"{odd}.png", box(9, 9) * 255)
    lines = refused(tmp_path)
    assert len(lines) == 3 and "\\x1b[2J" in lines[1] and "\\u202e" in lines[2] and "control characters" in lines[1]
    assert "\x1b" not in "".join(lines) + capsys.readouterr().out


@pytest.mark.parametrize("name", ["busi", "bkai", "dsb2018", "fives", "isic", "own"])
def test_every_script_is_thin_and_knows_its_set(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert text.startswith('"""') and f"python data_scripts/{name}.py" in text.split('"""')[1] and len(text.splitlines()) <= 20
    compile(text, name, "exec")
    if name == "isic":
        usage = script(name, "--help")
        assert usage.returncode == 0 and "--root" in usage.stdout and "--from" in usage.stdout


def test_every_description_is_complete():
    assert list(SETS) == ["busi", "bkai", "dsb2018", "fives", "isic2016", "isic2017", "isic2018",
                          "isic2016_official", "isic2017_official", "isic2018_official"]
    for name, dataset in SETS.items():
        assert dataset.name == name and dataset.title and dataset.license and dataset.citation and dataset.page.startswith("https://")
        assert dataset.class_names[0] == "background" and dataset.download
        assert all(text in dataset.terms for text in (dataset.title, dataset.license, dataset.citation, dataset.page))
        assert dataset.terms.startswith("*** official split") == name.endswith("official")
