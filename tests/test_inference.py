"""Prediction: every kind of file, every kind of trouble, and masks that lie where the image is."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, shared_folder
from PIL import Image

from qtseg import inference
from qtseg.data import PREPROCESSING_FILE, Preprocessing, SegmentationData, normalise, read_mask
from qtseg.evaluation import class_probabilities, decide, own_size_mask
from qtseg.inference import (
    FLIPS,
    OnnxNetwork,
    Predictor,
    as_rgb,
    describe_mask,
    find_images,
    keep_largest_components,
    main,
    name_outputs,
    predict_files,
    window_starts,
)
from qtseg.model import QTSeg
from qtseg.phantoms import write_prepared

torch.set_num_threads(1)


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A network that anyone can follow: foreground where the pixel is brighter than grey."""
    return torch.stack([torch.zeros_like(images[:, 0]), 10 * images.mean(dim=1)], dim=1)


def simple(resize="squash", size=64, colour="rgb", **options) -> Predictor:
    return Predictor(brightness, Preprocessing(size, resize, colour), 2, device="cpu", **options)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A dark image with a bright ellipse, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((y - height * rng.uniform(0.4, 0.6)) / (0.3 * height)) ** 2 + (
        (x - width * rng.uniform(0.4, 0.6)) / (0.25 * width)
    ) ** 2 < 1
    return np.where(inside, 200, 40)[:, :, None].repeat(3, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder with random weights, as training writes one."""
    folder = tmp_path_factory.mktemp("run") / "best_dice"
    torch.manual_seed(0)
    QTSeg(width=4, depths=[1, 1, 1], mlp_width=64).save_pretrained(folder)
    (folder / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64, "pad", "ycrcb"))))
    return folder


def table(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- one image -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("height, width", [(300, 201), (64, 64), (37, 4000), (4000, 37), (31, 50), (1, 1), (1, 90)])
def test_mask_has_the_images_size_and_place(resize, height, width):
    image = scene(height, width)
    predictor = simple(resize, 128)
    mask, truth = predictor.predict(image), image[:, :, 0] > 128
    assert mask.shape == (height, width) and mask.dtype == np.uint8
    if min(height, width) >= 31 and (resize == "squash" or max(height, width) < 1000):
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95
        for axis in (0, 1):  # no shift: the centres of mass agree to a pixel of the network's square
            scale = max(height, width) / 128 if resize == "pad" else image.shape[axis] / 128
            assert abs(np.nonzero(mask)[axis].mean() - np.nonzero(truth)[axis].mean()) < 0.3 * max(scale, 1)


def test_probabilities_sum_to_one_and_decide_the_mask():
    predictor, image = simple(), scene(90, 70)
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (90, 70, 2) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=2), 1, atol=1e-6)
    for threshold in (None, 0.2, 0.9):
        predictor.threshold = threshold
        assert (predictor.predict(image) == decide(probabilities, threshold)).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 6])
def test_any_number_of_classes(classes):
    torch.manual_seed(classes)
    names = tuple(f"class {index}" for index in range(max(classes, 2)))
    model = QTSeg(classes=classes, width=4, depths=[1, 1, 1], mlp_width=64)
    predictor = Predictor(model, Preprocessing(64, "pad", "rgb", names), classes, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (80, 50, 3), dtype=np.uint8)
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (80, 50, max(classes, 2)) and not model.training
    batch = normalise(torch.from_numpy(predictor.preprocessing.prepare(image)).permute(2, 0, 1)[None])
    with torch.no_grad():
        square = class_probabilities(model(batch))[0].permute(1, 2, 0).numpy()
    assert (predictor.predict(image) == own_size_mask(square, 80, 50, "pad")).all()


@pytest.mark.parametrize("colour", ["rgb", "ycrcb"])
def test_the_network_gets_what_it_was_trained_on(colour):
    seen = []
    network = lambda images: seen.append(images) or brightness(images)  # noqa: E731
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Predictor(network, Preprocessing(64, "squash", colour), 2, device="cpu").predict(image)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb) if colour == "ycrcb" else image
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0), expected / 127.5 - 1, atol=1e-6)


def test_tta_is_the_mean_over_mirror_images():
    torch.manual_seed(3)
    model = QTSeg(width=4, depths=[1, 1, 1], mlp_width=64).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    got = Predictor(model, Preprocessing(64), 2, device="cpu", tta=True).forward(images)
    turned = [(lambda x: x), (lambda x: x.flip(3)), (lambda x: x.flip(2)), (lambda x: x.rot90(2, (2, 3)))]
    with torch.no_grad():
        wanted = torch.stack([turn(model(turn(images / 127.5 - 1)).softmax(dim=1)) for turn in turned]).mean(dim=0)
        plain = model(images / 127.5 - 1).softmax(dim=1)
    assert len(FLIPS) == 4
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert (got - plain).abs().max() > 1e-3


def test_keep_largest():
    mask = np.zeros((20, 30), np.uint8)
    mask[1:4, 1:4], mask[10:18, 10:20], mask[18, 20] = 1, 1, 1  # the last touches the second at a corner
    mask[1:3, 20:28], mask[6:8, 20:23] = 2, 2
    kept = keep_largest_components(mask)
    assert kept[2, 2] == 0 and kept[12, 12] == 1 and kept[18, 20] == 1 and kept[1, 21] == 2 and kept[7, 21] == 0
    assert (kept == 1).sum() == 81 and (kept == 2).sum() == 16 and mask[2, 2] == 1
    assert not keep_largest_components(np.zeros((5, 5), np.uint8)).any()
    image = np.full((60, 60, 3), 30, np.uint8)
    image[5:15, 5:15], image[30:55, 30:55] = 220, 220
    assert simple(size=60).predict(image)[10, 10] == 1 and simple(size=60, keep_largest=True).predict(image)[10, 10] == 0


def test_predict_many_equals_predict_in_order():
    predictor = simple("pad")
    images = [scene(40 + 7 * index, 90 - 5 * index, index) for index in range(11)]
    for batch in (1, 4, 50):
        masks = list(predictor.predict_many(iter(images), batch))
        assert len(masks) == 11 and all((mask == predictor.predict(image)).all() for mask, image in zip(masks, images))
    with pytest.raises(ValueError, match="batch is at least 1"):
        list(predictor.predict_many(images, 0))


def test_predict_many_reads_no_further_than_it_must():
    """Of an endless stream only a few batches are ever alive, however slow the one who takes the masks."""
    drawn, alive, most, lock = [], [0], [0], threading.Lock()

    class Counted:  # an image that knows when it dies
        def __init__(self, index):
            with lock:
                drawn.append(index)
                alive[0] += 1
                most[0] = max(most[0], alive[0])

        def __array__(self, dtype=None, copy=None):
            return np.zeros((40, 40, 3), np.uint8)

        def __del__(self):
            with lock:
                alive[0] -= 1

    masks = simple().predict_many((Counted(index) for index in range(10_000)), batch=4)
    for _ in range(40):
        next(masks)
        time.sleep(0.002)
    masks.close()
    assert len(drawn) <= 40 + 6 * 4 and most[0] <= 4 * 4


def test_wrong_arguments_are_one_sentence():
    cases = [
        (dict(amp="half"), "amp is one of"),
        (dict(threshold=1.0), "between 0 and 1"),
        (dict(threshold=0), "between 0 and 1"),
    ]
    for options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            simple(**options)
    with pytest.raises(ValueError, match="needs 3 class names, but its preprocessing names 2"):
        Predictor(brightness, Preprocessing(64), 3, device="cpu")
    with pytest.raises(ValueError, match=r"which is not 3 class\(es\)"):
        Predictor(brightness, Preprocessing(64, class_names=("a", "b", "c")), 3, device="cpu").predict(scene(50, 50))
    with pytest.raises(ValueError, match="cannot be used"):
        Predictor(brightness, Preprocessing(64), 2, device="nonsense")


@pytest.mark.parametrize(
    "array, sentence",
    [
        (Image.new("F", (5, 5)), "float32"),
        (Image.fromarray(np.full((5, 5), -1, np.int32)), "int32"),
        (np.zeros((5, 5, 3)), "float64"),
        (np.zeros((5, 5, 3), np.uint16), "uint16"),
        (np.zeros((5, 5), bool), "bool"),
        (np.zeros((0, 5, 3), np.uint8), "with pixels in it"),
        (np.zeros((3, 5, 5), np.uint8), r"\[H, W, 3\]"),
        (np.zeros(9, np.uint8), r"\(9,\)"),
    ],
)
def test_arrays_of_unknown_meaning_are_refused(array, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_rgb(array)


# --- files -----------------------------------------------------------------------------------------------------------------


GREY = (np.arange(48 * 32).reshape(48, 32) % 251).astype(np.uint8)  # upright: 48 rows, 32 columns


def write_kind(folder: Path, kind: str) -> tuple[Path, np.ndarray]:
    """One file of a kind, and the RGB pixels that it must yield."""
    rgb = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
    grey3 = GREY[:, :, None].repeat(3, axis=2)
    path = folder / f"picture.{kind.split()[-1]}"
    if kind in ("grey png", "grey bmp", "grey tiff"):
        Image.fromarray(GREY).save(path)
        return path, grey3
    if kind == "1-bit png":
        Image.fromarray(GREY > 100).save(path)
        return path, ((GREY > 100) * np.uint8(255))[:, :, None].repeat(3, axis=2)
    if kind in ("16-bit png", "16-bit tiff"):
        Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
        return path, grey3
    if kind == "RGBA png":
        Image.fromarray(np.dstack([rgb, GREY])).save(path)
        return path, rgb
    if kind == "palette png":
        picture = Image.fromarray(GREY % 5)
        picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150])
        picture.save(path)
        return path, np.arange(10, 160, 10, dtype=np.uint8).reshape(5, 3)[GREY % 5]
    if kind == "CMYK tiff":
        inks = [*np.ascontiguousarray((255 - rgb).transpose(2, 0, 1)), np.zeros_like(GREY)]
        Image.merge("CMYK", [Image.fromarray(ink) for ink in inks]).save(path)
        return path, rgb
    if kind == "EXIF tiff":
        exif = Image.Exif()
        exif[0x0112] = 6  # turn a quarter to the right to see it upright
        Image.fromarray(np.rot90(rgb).copy()).save(path, exif=exif)
        return path, rgb
    Image.fromarray(rgb).save(path, **({"lossless": True} if kind.endswith("webp") else {}))
    return path, rgb


KINDS = [
    "grey png",
    "grey bmp",
    "grey tiff",
    "1-bit png",
    "16-bit png",
    "16-bit tiff",
    "RGB png",
    "RGB tiff",
    "RGB webp",
    "RGBA png",
    "palette png",
    "CMYK tiff",
    "EXIF tiff",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind, tmp_path):
    path, pixels = write_kind(tmp_path, kind)
    np.testing.assert_array_equal(as_rgb(path), pixels)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(as_rgb(picture), pixels)
    assert simple().predict(path).shape == (48, 32)
    np.testing.assert_array_equal(simple().predict(str(path)), simple().predict(pixels))


def write_dicom(path: Path, values: np.ndarray, **tags) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    header = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    colour = values.ndim == 3 and values.shape[2] == 3
    frames = len(values) if values.ndim == 3 and not colour else 1
    header.Rows, header.Columns = values.shape[1:3] if frames > 1 else values.shape[:2]
    header.SamplesPerPixel, header.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        header.PlanarConfiguration = 0
    if frames > 1:
        header.NumberOfFrames = frames
    header.BitsAllocated = header.BitsStored = values.dtype.itemsize * 8
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(header, name, value)
    header.PixelData = values.tobytes()
    header.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    values = np.array([[-1000, 0, 40], [80, 400, 3000]], np.int16)
    stored = values + 1024  # rescale intercept -1024

    def grey(name, **tags):
        return as_rgb(write_dicom(tmp_path / name, stored, RescaleSlope=1, RescaleIntercept=-1024, **tags))[:, :, 0].tolist()

    assert grey("full.dcm") == [[0, 64, 66], [69, 89, 255]]  # (value + 1000) * 255 / 4000, rounded
    window = dict(WindowCenter=40.5, WindowWidth=81)  # black at 0, white at 80
    assert grey("window.dcm", **window) == [[0, 0, 128], [255, 255, 255]]
    assert grey("inverted", PhotometricInterpretation="MONOCHROME1", **window) == [[255, 255, 128], [0, 0, 0]]
    several = write_dicom(
        tmp_path / "frames.DCM",
        np.stack([np.full((4, 6), 9 * index, np.uint8) for index in range(4)]),
        WindowCenter=128,
        WindowWidth=256,
    )
    assert as_rgb(several).shape == (4, 6, 3) and as_rgb(several).max() == 0
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(as_rgb(write_dicom(tmp_path / "colour.dcm", rgb)), rgb)
    write_dicom(tmp_path / "truncated.dcm", np.zeros((40, 40), np.uint8))
    (tmp_path / "truncated.dcm").write_bytes((tmp_path / "truncated.dcm").read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"truncated.dcm: cannot be read as DICOM"):
        as_rgb(tmp_path / "truncated.dcm")


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ModuleNotFoundError, match=r"scan.dcm: DICOM files need pydicom: pip install"):
        as_rgb(tmp_path / "scan.dcm")


def spoil(folder: Path) -> list[str]:
    """Ten files that cannot be segmented, each in its own way."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG")):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind)
        (folder / f"truncated.{ending}").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (folder / "text.png").write_text("not an image\n")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).random((20, 20), dtype=np.float32)).save(folder / "float.tif")
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("/nowhere/at/all.png")
    with zipfile.ZipFile(folder / "archive.jpg", "w") as archive:
        archive.writestr("a.txt", "text")
    (folder / "wrong.dcm").write_bytes(bytes(128) + b"DICM" + b"nonsense" * 20)
    Image.new("1", (20000, 10000)).save(folder / "bomb.png")
    return [
        "archive.jpg",
        "bomb.png",
        "dangling.png",
        "empty.jpg",
        "float.tif",
        "folder.png",
        "text.png",
        "truncated.jpg",
        "truncated.png",
        "wrong.dcm",
    ]


def test_bad_files_are_reported_and_the_rest_is_done(tmp_path, checkpoint, capfd):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    bad = spoil(folder)
    for index in range(13):
        Image.fromarray(scene(50 + index, 40, index)).save(folder / f"good{index:02d}.png")
    assert main([str(checkpoint), str(folder), "--output", str(output), "--batch", "4", "--no-progress"]) == 1
    printed = capfd.readouterr()
    lines = printed.err.strip().splitlines()
    assert sorted(Path(line.split(": ")[0]).name for line in lines) == bad and "Traceback" not in printed.err
    assert "13 images" in printed.out and "10 failed" in printed.out
    assert sorted(path.name for path in output.glob("*.png")) == [f"good{index:02d}.png" for index in range(13)]
    assert sorted(row["file"] for row in table(output / "errors.csv")) == bad
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in table(output / "errors.csv"))
    rows = table(output / "predictions.csv")
    assert [row["file"] for row in rows] == [f"good{index:02d}.png" for index in range(13)]
    assert [(int(row["width"]), int(row["height"])) for row in rows] == [(40, 50 + index) for index in range(13)]
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu")
    for row in rows:
        mask = read_mask(output / row["mask"])
        assert (mask == predictor.predict(folder / row["file"])).all()
        assert int(row["foreground_pixels"]) == mask.sum()
    for path in [folder / name for name in bad]:
        path.unlink() if not path.is_dir() or path.is_symlink() else path.rmdir()
    assert main([str(checkpoint), str(folder), "--output", str(output), "--no-progress"]) == 0
    assert (
        "0 images" in capfd.readouterr().out and table(output / "errors.csv") == [] and table(output / "predictions.csv") == rows
    )


# --- names and tables ------------------------------------------------------------------------------------------------------


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_inputs_are_found(tmp_path):
    wanted = [touch(tmp_path / name) for name in ("a/1.png", "a/deep/er/2.TIF", "a/deep/scan.dcm", "b/1.png", "b/no ending")]
    for name in ("a/.hidden.png", "a/.cache/3.png", "a/notes.txt", "a/out/old.png", "a/out/predictions.json"):
        touch(tmp_path / name)
    root, files = find_images([tmp_path / "a"], tmp_path / "a/out")
    assert root == tmp_path / "a" and files == wanted[:3]
    root, files = find_images([tmp_path / "a", tmp_path / "b", tmp_path / "a/1.png"], tmp_path / "a/out")
    assert root == tmp_path and files == wanted[:4]
    root, files = find_images([str(tmp_path / "*" / "1.*"), tmp_path / "b/no ending"], tmp_path / "out")
    assert root == tmp_path and files == [wanted[0], wanted[3], wanted[4]]
    root, files = find_images([str(tmp_path / "a/**/*.TIF")], tmp_path / "out")
    assert root == tmp_path / "a" and files == [wanted[1]]
    assert len(find_images([tmp_path / "a"], tmp_path)[1]) == 4  # the output folder around the images hides none of them
    (tmp_path / "a/out/predictions.json").unlink()
    with pytest.raises(ValueError, match="choose another output folder"):  # somebody's images, as it is no folder of predictions
        find_images([tmp_path / "a"], tmp_path / "a/out")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        find_images([tmp_path / "c.png"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no images in"):
        find_images([str(tmp_path / "*.gif")], tmp_path / "out")
    with pytest.raises(ValueError, match="choose another output folder"):
        find_images([tmp_path / "b"], tmp_path / "b")


def test_equal_names_do_not_collide(tmp_path):
    files = [
        tmp_path / name
        for name in ("a/1.jpg", "b/1.jpg", "b/1.PNG", "b/2.png", "c/x.png", "c/x_probability.png", "c/x.y.png", "d/1", "d/1.dcm")
    ]
    names = [name_outputs(tmp_path, files)[file] for file in files]
    assert names == ["a/1", "b/1.jpg", "b/1.PNG", "b/2", "c/x.png", "c/x_probability.png", "c/x.y", "d/1", "d/1.dcm"]
    masks = {f"{name}{ending}".lower() for name in names for ending in inference.OUTPUTS}
    assert len(masks) == len(files) * len(inference.OUTPUTS)


def test_measures_of_a_mask():
    mask = np.zeros((10, 20), np.uint8)
    mask[1:3, 2:5], mask[5:9, 10:15], mask[9, 19] = 1, 1, 2
    assert describe_mask(mask, 3) == [26, "13.0000", 2, "10 5 5 4; 2 1 3 2", 1, "0.5000", 1, "19 9 1 1"]
    assert describe_mask(np.zeros((4, 4), np.uint8), 1) == [0, "0.0000", 0, ""]
    speckled = np.zeros((100, 100), np.uint8)
    speckled[::2, ::2] = 1
    assert describe_mask(speckled, 2)[2] == 2500 and describe_mask(speckled, 2)[3].count(";") == inference.MOST_BOXES - 1


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 20, 256])
def test_mask_files_hold_indices_and_show_colours(classes, tmp_path):
    mask = np.random.default_rng(0).integers(0, max(classes, 2), (33, 47)).astype(np.uint8)
    (tmp_path / "mask.png").write_bytes(inference.mask_png(mask, classes))
    assert (read_mask(tmp_path / "mask.png", classes=classes) == mask).all()
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P" and (np.asarray(picture) == mask).all()
        assert len({tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}) == min(max(classes, 2), 8)


def test_all_outputs(tmp_path):
    image, output = scene(90, 60), tmp_path / "out"
    Image.fromarray(image).save(tmp_path / "image.png")
    predictor = simple("pad")
    predict_files(predictor, tmp_path / "image.png", output, overlay=True, probability="png", progress=False)
    probabilities = predictor.probabilities(image)
    values = cv2.imread(str(output / "image_probability.png"), cv2.IMREAD_UNCHANGED)
    assert values.dtype == np.uint16 and values.shape == (90, 60)
    np.testing.assert_allclose(values / 65535, probabilities[..., 1], atol=1e-5)
    overlay = np.asarray(Image.open(output / "image_overlay.jpg")).astype(int)
    mask = predictor.predict(image)
    assert (
        overlay.shape == image.shape and abs(overlay - image)[mask == 0].mean() < 6 < 15 < abs(overlay - image)[mask == 1].mean()
    )
    assert predict_files(predictor, tmp_path / "image.png", output, probability="npz", progress=False).done == 1
    with np.load(output / "image_probability.npz") as archive:
        np.testing.assert_allclose(archive["probabilities"], probabilities, atol=1e-6)
        assert archive["class_names"].tolist() == ["background", "foreground"]


def test_overlays_of_giants_shrink():
    picture = Image.open(
        io.BytesIO(inference.overlay_jpg(np.full((20, 70_000, 3), 90, np.uint8), np.ones((20, 70_000), np.uint8)))
    )
    assert picture.size == (8192, 2)


# --- reruns ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path) -> tuple[Path, Path]:
    """A folder of three images, one of them deeper, and where to write."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "deep/a.png")):
        Image.fromarray(scene(40 + index, 50, index)).save(folder / name)
    return folder, tmp_path / "masks"


def test_a_rerun_does_what_is_missing(three):
    folder, output = three

    def run(**options):
        return predict_files(simple(), folder, output, progress=False, **options)

    assert (run().done, (output / "deep/a.png").is_file()) == (3, True)
    rows, before = table(output / "predictions.csv"), {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    summary = run()
    assert (summary.done, summary.skipped) == (0, 3) and table(output / "predictions.csv") == rows
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    (output / "b.png").unlink()
    Image.fromarray(scene(30, 30)).save(folder / "c.png")
    assert (run().done, len(table(output / "predictions.csv"))) == (2, 4)
    Image.fromarray(scene(33, 44)).save(folder / "a.png")
    os.utime(folder / "a.png", (time.time() + 5, time.time() + 5))
    assert run().done == 1 and read_mask(output / "a.png").shape == (33, 44)
    os.utime(folder / "a.png", (1, 1))
    assert run(overlay=True).done == 4 and run(overlay=True).done == 0 and run(overwrite=True).done == 4
    assert sorted(row["file"] for row in table(output / "predictions.csv")) == ["a.png", "b.png", "c.png", "deep/a.png"]


def test_other_settings_are_refused(three, tmp_path):
    folder, output = three
    predict_files(simple(), folder, output, progress=False)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for options in (
        dict(threshold=0.3),
        dict(tta=True),
        dict(keep_largest=True),
        dict(resize="pad"),
        dict(size=96),
        dict(amp="bf16"),
    ):
        with pytest.raises(ValueError, match="holds other work .*overwrite"):
            predict_files(simple(**options), folder, output, progress=False)
    other = simple()
    other.identity = "torch 1234"
    with pytest.raises(ValueError, match="network: '' there, 'torch 1234' now"):
        predict_files(other, folder, output, progress=False)
    with pytest.raises(ValueError, match="images: "):
        predict_files(simple(), folder / "deep", output, progress=False)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert predict_files(simple(threshold=0.3), folder / "a.png", output, overwrite=True, progress=False).done == 1
    assert len(table(output / "predictions.csv")) == 1  # rows of other settings are gone, so the rest is done again:
    assert predict_files(simple(threshold=0.3), folder, output, progress=False).done == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").write_bytes(b"annotated by hand")
    with pytest.raises(ValueError, match="no predictions.json"):
        predict_files(simple(), folder, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine/a.png").read_bytes() == b"annotated by hand"


def test_outputs_never_replace_inputs(three):
    folder, _ = three
    for output, inputs in (
        (folder, [folder]),
        (folder / "deep", [folder]),
        (folder, [folder / "deep", folder / "b.png"]),
        (folder.parent / "x/../images", [folder / "b.png"]),
    ):
        with pytest.raises(ValueError, match="choose another output folder"):
            predict_files(simple(), inputs, output, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="images/a.png is an image to be segmented"):  # images/a.png -> images/a.png
        predict_files(simple(), [folder.parent], folder.parent, overwrite=True, progress=False)
    assert not list(folder.parent.rglob("predictions.*"))


def test_a_killed_run_leaves_rows_that_count(three):
    """The table is cut in the middle of a line, as a full disk or a lost machine leaves it."""
    folder, output = three
    predict_files(simple(), folder, output, progress=False)
    text = (output / "predictions.csv").read_bytes()
    (output / "predictions.csv").write_bytes(text[:-3])
    assert predict_files(simple(), folder, output, progress=False).done == 1
    assert sorted((output / "predictions.csv").read_bytes().splitlines()) == sorted(text.splitlines())
    (output / "predictions.csv").write_bytes(b"")
    assert predict_files(simple(), folder, output, progress=False).done == 3


def test_full_disk_is_one_sentence_and_leaves_nothing_half_written(three, monkeypatch):
    folder, output = three
    write = Path.write_bytes

    def full(path, data):
        if path.name.startswith(".b.png"):
            write(path, data[:10])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"b.png could not be written \(No space left on device\)"):
        predict_files(simple(), folder, output, batch=1, progress=False)
    assert not [path for path in output.rglob("*") if path.name.startswith(".") or path.name == "b.png"]
    monkeypatch.undo()
    rows = len(table(output / "predictions.csv"))
    assert predict_files(simple(), folder, output, progress=False).done == 3 - rows
    assert len(table(output / "predictions.csv")) == 3


def test_ctrl_c_keeps_what_is_done(tmp_path):
    folder, output = tmp_path / "images", tmp_path / "masks"
    folder.mkdir()
    for index in range(30):
        Image.fromarray(scene(40, 40, index)).save(folder / f"{index:02d}.png")
    calls = []

    def slow(images):
        calls.append(len(images))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(images)

    predictor = Predictor(slow, Preprocessing(64), 2, device="cpu")
    summary = predict_files(predictor, folder, output, batch=2, progress=False)
    assert summary.stopped and 0 < summary.done < 30
    assert len(table(output / "predictions.csv")) == summary.done == len(list(output.glob("*.png")))
    assert predict_files(predictor, folder, output, batch=2, progress=False).skipped == summary.done
    assert len(table(output / "predictions.csv")) == 30


# --- large images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, window, overlap, starts",
    [
        (64, 64, 0.25, [0]),
        (65, 64, 0.25, [0, 1]),
        (112, 64, 0.25, [0, 48]),
        (200, 64, 0.25, [0, 48, 96, 136]),
        (128, 64, 0, [0, 64]),
        (66, 64, 0.99, [0, 1, 2]),
    ],
)
def test_windows_cover_everything(length, window, overlap, starts):
    assert window_starts(length, window, overlap) == starts


def tiny(**options) -> Predictor:
    torch.manual_seed(5)
    return Predictor(
        QTSeg(width=4, depths=[1, 1, 1], mlp_width=64), Preprocessing(64, "squash", "ycrcb"), 2, device="cpu", **options
    )


def test_one_window_is_a_plain_prediction():
    pytest.importorskip("monai", reason="MONAI is not installed")
    predictor, image = tiny(), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(np.concatenate(list(predictor.rows(image))), predictor.probabilities(image)[..., 1:], atol=1e-6)
    assert (predictor.predict_large(image) == predictor.predict(image)).all()


@pytest.mark.parametrize("height, width", [(150, 211), (64, 300), (300, 64), (1, 1), (20, 130), (130, 20)])
def test_rows_of_windows_equal_monai_on_the_whole_image(height, width):
    pytest.importorskip("monai", reason="MONAI is not installed")
    from monai.inferers import sliding_window_inference

    predictor, image = tiny(), np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = list(predictor.rows(image, 64, 0.25, batch=3))
    padded = np.pad(image, ((0, max(0, 64 - height)), (0, max(0, 64 - width)), (0, 0)))
    whole = torch.from_numpy(cv2.cvtColor(padded, cv2.COLOR_RGB2YCrCb)).permute(2, 0, 1)[None].float()
    bell = inference._monai().compute_importance_map((64,), mode="gaussian")
    expected = sliding_window_inference(
        whole,
        (64, 64),
        3,
        lambda part: predictor.forward(part.byte())[:, 1:],
        0.25,
        "gaussian",
        roi_weight_map=bell[:, None] * bell,
    )[0].permute(1, 2, 0)[:height, :width]
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=1e-5)
    assert max(map(len, rows)) <= 64 and predictor.predict_large(image, 64).shape == (height, width)


def test_windows_of_files(tmp_path, monkeypatch):
    pytest.importorskip("monai", reason="MONAI is not installed")
    image = np.random.default_rng(2).integers(0, 256, (150, 170, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # the picture is beyond Pillow's limit, which is twice this
    assert predict_files(tiny(), tmp_path / "large.png", tmp_path / "plain", progress=False).failed == 1
    assert "a sliding window" in table(tmp_path / "plain/errors.csv")[0]["reason"]
    summary = predict_files(
        tiny(), tmp_path / "large.png", tmp_path / "out", window=64, overlap=0.5, probability="npz", overlay=True, progress=False
    )
    assert (summary.done, summary.failed) == (1, 0) and Image.MAX_IMAGE_PIXELS == 10_000
    monkeypatch.undo()
    assert (read_mask(tmp_path / "out/large.png") == tiny().predict_large(image, 64, 0.5)).all()
    assert np.load(tmp_path / "out/large_probability.npz")["probabilities"].shape == (150, 170, 2)
    with pytest.raises(ValueError, match="32 pixels or more"):
        tiny().predict_large(image, 16)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        predict_files(tiny(), tmp_path / "large.png", tmp_path / "x", window=64, overlap=1.0)


# --- checkpoints and the command -------------------------------------------------------------------------------------------


def test_from_checkpoint_refuses_what_does_not_fit(checkpoint, tmp_path):
    for change, sentence in (
        (lambda f: (f / PREPROCESSING_FILE).unlink(), "is missing"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]), "truncated"),
        (
            lambda f: (f / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64, class_names=("a", "b", "c"))))),
            "needs 2 class names, but its preprocessing names 3",
        ),
        (lambda f: shutil.rmtree(f), "is missing"),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint, folder)
        change(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            Predictor.from_checkpoint(folder)
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(ValueError, match="engine is one of"):
        Predictor.from_checkpoint(checkpoint, engine="tensorflow")


def small_onnx(checkpoint: Path, path: Path, sha: str) -> None:
    """An ONNX file that says logits = (0, 10 * first channel), with the metadata that qtseg-export writes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[1, 0] = 10
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, "height", "width"])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"weights_sha256": sha})
    onnx.save(model, path)


def test_onnx_engine(checkpoint, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    with pytest.raises(FileNotFoundError, match="run `qtseg-export .*copy` first"):
        Predictor.from_checkpoint(folder, engine="onnx")
    small_onnx(folder, folder / "model.onnx", "0" * 64)
    with pytest.raises(ValueError, match="was not exported from the model.safetensors beside it"):
        Predictor.from_checkpoint(folder, engine="onnx")
    small_onnx(folder, folder / "model.onnx", inference.weights_sha256(folder))
    predictor = Predictor.from_checkpoint(folder, engine="onnx", threshold=0.7)
    assert predictor.device.type == "cpu" and predictor.identity.startswith("onnx ")
    (folder / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64))))
    image = scene(70, 90)
    assert (Predictor.from_checkpoint(folder, engine="onnx").predict(image) == simple().predict(image)).all()
    with pytest.raises(ValueError, match="computes on the CPU"):
        Predictor.from_checkpoint(folder, engine="onnx", amp="bf16")
    (folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no ONNX model that can be run"):
        OnnxNetwork(folder / "model.onnx")


def test_the_command_in_a_shell(checkpoint, three, capfd):
    folder, output = three
    words = [str(checkpoint), str(folder), "--output", str(output), "--device", "cpu"]
    code = "import sys; from qtseg.inference import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--tta", "--keep-largest", "--threshold", "0.4", "--overlay"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "3 images" in done.stdout and "images/s, network" in done.stdout, done.stderr
    assert len(list(output.rglob("*_overlay.jpg"))) == 3
    assert main(words) == 1
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and "--overwrite" in printed.err and not printed.out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["CKPT", "nowhere.png", "--output", "OUT"], "there is no such file or folder"),
        (["CKPT", "EMPTY", "--output", "OUT"], "no images in"),
        (["EMPTY", "IMG", "--output", "OUT"], "is missing"),
        (["CKPT", "IMG", "--output", "IMG/a.png/x"], "could not be written"),
        (["CKPT", "IMG", "--output", "OUT", "--device", "cuda:77"], "cannot be used"),
        (["CKPT", "IMG", "--output", "OUT", "--threshold", "2"], "between 0 and 1"),
        (["CKPT", "IMG", "--output", "OUT", "--batch", "0"], "batch is at least 1"),
        (["CKPT", "IMG", "--output", "OUT", "--engine", "onnx"], "qtseg-export"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_1(words, sentence, checkpoint, three, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    places = {"CKPT": checkpoint, "IMG": three[0], "OUT": three[1], "EMPTY": tmp_path / "empty"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    assert main([*words, "--no-progress"]) == 1
    printed = capfd.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and not three[1].exists()


def test_wrong_usage_is_status_2(checkpoint, capfd):
    with pytest.raises(SystemExit) as stopped:
        main([str(checkpoint), "--output", "x"])
    assert stopped.value.code == 2 and "usage:" in capfd.readouterr().err


# --- against the evaluation ------------------------------------------------------------------------------------------------


def test_prediction_from_files_equals_evaluation_from_the_cache(tmp_path):
    """The cache, then evaluation's way back to the image's size; the files, then the Predictor: the same masks."""
    write_prepared(tmp_path / "data", "dermoscopy", 8, 96)
    data = SegmentationData.open(
        tmp_path / "data", size=64, resize="pad", colour="ycrcb", cache=tmp_path / "cache", progress=False
    )
    torch.manual_seed(0)
    model = QTSeg(width=4, depths=[1, 1, 1], mlp_width=64).eval()
    predictor = Predictor(model, data.preprocessing, 2, device="cpu")
    for index in range(len(data.train)):
        with torch.no_grad():
            square = class_probabilities(model(normalise(data.train.batch([index]).images)))[0].permute(1, 2, 0).numpy()
        height, width = data.train.original_sizes[index]
        assert (predictor.predict(data.train.paths[index][0]) == own_size_mask(square, height, width, "pad")).all()


def test_real_images_of_the_shared_folder(tmp_path):
    archive = shared_folder() / "data" / "busi_raw_sample.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there: real images do not enter the repository")
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.endswith(".png")][:6]
        file.extractall(tmp_path / "in", names)
    predictor = simple("pad")
    assert predict_files(predictor, tmp_path / "in", tmp_path / "out", progress=False).done == len(names)
    for row in table(tmp_path / "out/predictions.csv"):
        with Image.open(tmp_path / "in" / row["file"]) as image:
            assert image.size == (int(row["width"]), int(row["height"]))
        assert read_mask(tmp_path / "out" / row["mask"]).shape == (int(row["height"]), int(row["width"]))
