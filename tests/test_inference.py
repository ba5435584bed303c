"""Prediction: every kind of file, every kind of trouble, and masks that lie where the image is."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, shared_folder
from PIL import Image

from qtseg.prediction import inputs as prediction_inputs, networks, outputs as prediction_outputs
from qtseg.colors import class_colors
from qtseg.data.dataset import normalize
from qtseg.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from qtseg.data.reading import read_mask
from qtseg.data.segmentation import SegmentationData
from qtseg.evaluation.scores import FLIPS, class_probabilities, decide, own_size_mask
from qtseg.cli import main
from qtseg.prediction.folders import predict_files
from qtseg.prediction.inputs import as_rgb, find_images, name_outputs
from qtseg.prediction.networks import OnnxNetwork, keep_largest_components
from qtseg.prediction.outputs import describe_mask
from qtseg.prediction.predictor import Predictor, window_starts
from qtseg.network.model import QTSeg
from qtseg.data.phantom_sets import write_prepared



def brightness(images: torch.Tensor) -> torch.Tensor:
    """A network that anyone can follow: foreground where the pixel is brighter than gray."""
    return torch.stack([torch.zeros_like(images[:, 0]), 10 * images.mean(dim=1)], dim=1)


def simple(resize="squash", size=64, color="rgb", **options) -> Predictor:
    return Predictor(brightness, Preprocessing(size, resize, color), 2, device="cpu", **options)


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
    folder = tmp_path_factory.mktemp("run", numbered=False) / "best_dice"
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
    mask, truth = predictor(image), image[:, :, 0] > 128
    assert mask.shape == (height, width) and mask.dtype == np.uint8
    if min(height, width) >= 31 and (resize == "squash" or max(height, width) < 1000):
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95
        for axis in (0, 1):  # no shift: the centers of mass agree to a pixel of the network's square
            scale = max(height, width) / 128 if resize == "pad" else image.shape[axis] / 128
            assert abs(np.nonzero(mask)[axis].mean() - np.nonzero(truth)[axis].mean()) < 0.3 * max(scale, 1)


def test_probabilities_sum_to_one_and_decide_the_mask():
    predictor, image = simple(), scene(90, 70)
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (90, 70, 2) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=2), 1, atol=1e-6)
    for threshold in (None, 0.2, 0.9):
        predictor.threshold = threshold
        assert (predictor(image) == decide(probabilities, threshold)).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 6])
def test_any_number_of_classes(classes):
    torch.manual_seed(classes)
    names = tuple(f"class {index}" for index in range(max(classes, 2)))
    model = QTSeg(classes=classes, width=4, depths=[1, 1, 1], mlp_width=64)
    predictor = Predictor(model, Preprocessing(64, "pad", "rgb", names), classes, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (80, 50, 3), dtype=np.uint8)
    probabilities = predictor.probabilities(image)
    assert probabilities.shape == (80, 50, max(classes, 2)) and not model.training
    batch = normalize(torch.from_numpy(predictor.preprocessing.prepare(image)).permute(2, 0, 1)[None])
    with torch.no_grad():
        square = class_probabilities(model(batch))[0].permute(1, 2, 0).numpy()
    assert (predictor(image) == own_size_mask(square, 80, 50, "pad")).all()


@pytest.mark.parametrize("color", ["rgb", "ycrcb"])
def test_the_network_gets_what_it_was_trained_on(color):
    seen = []
    network = lambda images: seen.append(images) or brightness(images)  # noqa: E731
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Predictor(network, Preprocessing(64, "squash", color), 2, device="cpu")(image)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb) if color == "ycrcb" else image
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
    assert simple(size=60)(image)[10, 10] == 1 and simple(size=60, keep_largest=True)(image)[10, 10] == 0


def test_predict_many_equals_predict_in_order():
    predictor = simple("pad")
    images = [scene(40 + 7 * index, 90 - 5 * index, index) for index in range(11)]
    for batch in (1, 4, 50):
        masks = list(predictor.predict_many(iter(images), batch))
        assert len(masks) == 11 and all((mask == predictor(image)).all() for mask, image in zip(masks, images))
    with pytest.raises(ValueError, match="batch is a whole number of at least 1"):
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
        Predictor(brightness, Preprocessing(64, class_names=("a", "b", "c")), 3, device="cpu")(scene(50, 50))
    with pytest.raises(ValueError, match="cannot be used"):
        Predictor(brightness, Preprocessing(64), 2, device="nonsense")


@pytest.mark.parametrize(
    "array, sentence",
    [
        (Image.new("F", (5, 5)), "float32"),
        (Image.fromarray(np.full((5, 5), -1, np.int32)), "int32"),
        (np.zeros((5, 5, 3)), "float64"),
        (np.zeros((5, 5, 3), np.uint32), "uint32"),
        (np.zeros((5, 5), bool), "bool"),
        (np.zeros((0, 5, 3), np.uint8), "with pixels in it"),
        (np.zeros((3, 5, 5), np.uint8), r"\[H, W, 3\]"),
        (np.zeros(9, np.uint8), r"\(9,\)"),
    ],
)
def test_arrays_of_unknown_meaning_are_refused(array, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_rgb(array)


def test_deep_values_are_read_with_the_checkpoints_white(tmp_path):
    """Twelve bits in sixteen: with white=4095 they are seen as they were in training, as a file and as an array."""
    deep = ((scene(40, 50)[:, :, 0].astype(int) * 4095 + 127) // 255).astype(np.uint16)  # [H, W], 642 and 3212
    Image.fromarray(deep).save(tmp_path / "deep.png")
    narrow = Predictor(brightness, Preprocessing(64, white=4095), 2, device="cpu")
    for image in (tmp_path / "deep.png", deep, deep[:, :, None].repeat(3, axis=2), Image.fromarray(deep)):
        np.testing.assert_array_equal(narrow(image), simple()(scene(40, 50)))
        assert not simple()(image).any()  # with white=65535 all is nearly black
    np.testing.assert_array_equal(as_rgb(np.array([[0, 2048, 4095, 60000]], np.uint16), white=4095)[0, :, 0], [0, 128, 255, 255])
    predict_files(narrow, tmp_path / "deep.png", tmp_path / "out", progress=False)
    assert (read_mask(tmp_path / "out/deep.png") == narrow(deep)).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels_are_refused_before_the_first_image(channels, tmp_path):
    model = QTSeg(in_channels=channels, width=4, depths=[1, 1, 1], mlp_width=64)
    model.save_pretrained(tmp_path)
    (tmp_path / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64))))
    for build in (
        lambda: Predictor(tmp_path, device="cpu"),
        lambda: Predictor(model, Preprocessing(64), 2, device="cpu"),
    ):
        with pytest.raises(ValueError, match=rf"takes images of {channels} channel\(s\), and its preprocessing makes 3 of a file"):
            build()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("classes", [1, 2])
def test_answers_that_are_not_finite_are_refused(value, classes, tmp_path):
    """They would be empty masks: NaN is above no threshold. One image's bad answer leaves the others of its batch alone."""

    def spoilt(images):
        logits = brightness(images)[:, 2 - classes :]
        logits[images.mean(dim=(1, 2, 3)) > 0.9, -1, 3, 4] = value  # one value of an image that is all white
        return logits

    predictor = Predictor(spoilt, Preprocessing(64), classes, device="cpu")
    white = np.full((40, 40, 3), 255, np.uint8)
    for call in (predictor, predictor.probabilities, lambda image: list(predictor.predict_many([image]))):
        with pytest.raises(ValueError, match="NaN or infinity: its weights are damaged"):
            call(white)
    assert predictor(scene(40, 40)).any()
    for name, image in (("a", scene(40, 40)), ("b", white), ("c", scene(40, 40))):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    summary = predict_files(predictor, [tmp_path / f"{name}.png" for name in "abc"], tmp_path / "out", progress=False)
    assert (summary.done, summary.failed) == (2, 1) and sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "c.png"]
    assert [row["file"] for row in table(tmp_path / "out/errors.csv")] == ["b.png"]
    if classes == 2:
        pytest.importorskip("monai", reason="MONAI is not installed")
        with pytest.raises(ValueError, match="NaN or infinity"):
            predictor.predict_large(np.full((80, 80, 3), 255, np.uint8), 64)
        Image.fromarray(white.repeat(2, axis=0).repeat(2, axis=1)).save(tmp_path / "b.png")
        assert predict_files(predictor, tmp_path / "b.png", tmp_path / "slid", window=64, progress=False).failed == 1


# --- files -----------------------------------------------------------------------------------------------------------------


GRAY = (np.arange(48 * 32).reshape(48, 32) % 251).astype(np.uint8)  # upright: 48 rows, 32 columns


def write_kind(folder: Path, kind: str) -> tuple[Path, np.ndarray]:
    """One file of a kind, and the RGB pixels that it must yield."""
    rgb = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=2)
    gray3 = GRAY[:, :, None].repeat(3, axis=2)
    path = folder / f"picture.{kind.split()[-1]}"
    if kind in ("gray png", "gray bmp", "gray tiff"):
        Image.fromarray(GRAY).save(path)
        return path, gray3
    if kind == "1-bit png":
        Image.fromarray(GRAY > 100).save(path)
        return path, ((GRAY > 100) * np.uint8(255))[:, :, None].repeat(3, axis=2)
    if kind in ("16-bit png", "16-bit tiff"):
        Image.fromarray(GRAY.astype(np.uint16) * 257).save(path)
        return path, gray3
    if kind == "RGBA png":
        Image.fromarray(np.dstack([rgb, GRAY])).save(path)
        return path, rgb
    if kind == "palette png":
        picture = Image.fromarray(GRAY % 5)
        picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150])
        picture.save(path)
        return path, np.arange(10, 160, 10, dtype=np.uint8).reshape(5, 3)[GRAY % 5]
    if kind == "CMYK tiff":
        inks = [*np.ascontiguousarray((255 - rgb).transpose(2, 0, 1)), np.zeros_like(GRAY)]
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
    "gray png",
    "gray bmp",
    "gray tiff",
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
    assert simple()(path).shape == (48, 32)
    np.testing.assert_array_equal(simple()(str(path)), simple()(pixels))


def write_dicom(path: Path, values: np.ndarray, **tags) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    header = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    color = values.ndim == 3 and values.shape[2] == 3
    frames = len(values) if values.ndim == 3 and not color else 1
    header.Rows, header.Columns = values.shape[1:3] if frames > 1 else values.shape[:2]
    header.SamplesPerPixel, header.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
    if color:
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

    def gray(name, **tags):
        return as_rgb(write_dicom(tmp_path / name, stored, RescaleSlope=1, RescaleIntercept=-1024, **tags))[:, :, 0].tolist()

    assert gray("full.dcm") == [[0, 64, 66], [69, 89, 255]]  # (value + 1000) * 255 / 4000, rounded
    window = dict(WindowCenter=40.5, WindowWidth=81)  # black at 0, white at 80
    assert gray("window.dcm", **window) == [[0, 0, 128], [255, 255, 255]]
    assert gray("inverted", PhotometricInterpretation="MONOCHROME1", **window) == [[255, 255, 128], [0, 0, 0]]
    several = write_dicom(
        tmp_path / "frames.DCM",
        np.stack([np.full((4, 6), 9 * index, np.uint8) for index in range(4)]),
        WindowCenter=128,
        WindowWidth=256,
    )
    assert as_rgb(several).shape == (4, 6, 3) and as_rgb(several).max() == 0
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(as_rgb(write_dicom(tmp_path / "color.dcm", rgb)), rgb)
    write_dicom(tmp_path / "truncated.dcm", np.zeros((40, 40), np.uint8))
    (tmp_path / "truncated.dcm").write_bytes((tmp_path / "truncated.dcm").read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"truncated.dcm: cannot be read as DICOM"):
        as_rgb(tmp_path / "truncated.dcm")


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    write_dicom(tmp_path / "scan.dcm", GRAY)
    for module in [name for name in sys.modules if name.split(".")[0] == "pydicom"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"scan.dcm: .*needs pydicom: pip install"):
        as_rgb(tmp_path / "scan.dcm")


def spoil(folder: Path) -> list[str]:
    """Nine files that cannot be segmented, each in its own way."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG")):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind)
        (folder / f"truncated.{ending}").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (folder / "text.png").write_text("not an image\n")
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.random.default_rng(0).random((20, 20), dtype=np.float32)).save(folder / "float.tif")
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
    assert main(["predict", str(checkpoint), str(folder), "--output", str(output), "--batch", "4", "--no-progress"]) == 1
    printed = capfd.readouterr()
    lines = printed.err.strip().splitlines()
    assert sorted(Path(line.split(": ")[0]).name for line in lines) == bad and "Traceback" not in printed.err
    assert "13 images" in printed.out and "9 failed" in printed.out
    assert sorted(path.name for path in output.glob("*.png")) == [f"good{index:02d}.png" for index in range(13)]
    assert sorted(row["file"] for row in table(output / "errors.csv")) == bad
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in table(output / "errors.csv"))
    rows = table(output / "predictions.csv")
    assert [row["file"] for row in rows] == [f"good{index:02d}.png" for index in range(13)]
    assert [(int(row["width"]), int(row["height"])) for row in rows] == [(40, 50 + index) for index in range(13)]
    predictor = Predictor(checkpoint, device="cpu")
    for row in rows:
        mask = read_mask(output / row["mask"])
        assert (mask == predictor(folder / row["file"])).all()
        assert int(row["foreground_pixels"]) == mask.sum()
    for path in [folder / name for name in bad]:
        path.unlink()
    assert main(["predict", str(checkpoint), str(folder), "--output", str(output), "--no-progress"]) == 0
    assert (
        "0 images" in capfd.readouterr().out and not (output / "errors.csv").exists() and table(output / "predictions.csv") == rows
    )


def hostile(folder: Path) -> list[str]:
    """Files of strangers that are refused, each with its own sentence: their names."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file closefile\n%%EOF\n"
    (folder / "program.png").write_bytes(eps)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(4000))), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    (folder / "sparse.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with (folder / "huge.tif").open("wb") as file:
        file.truncate(2**35)
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "itself").symlink_to("itself")
    (folder / "nowhere.bmp").symlink_to("/nowhere/at/all")
    os.mkfifo(folder / "pipe.png")
    (folder / "fax.png").write_bytes(b"")
    Image.new("1", (20_000, 10_000)).save(folder / "fax.png")
    return ["fax.png", "huge.tif", "itself", "nowhere.bmp", "pipe.png", "program.png", "sparse.png", "zero.jpg"]


ODD_NAMES = [  # all are good images
    "a\nb.png",
    "\udcff.png",
    "=1+1.png",
    "'=1+1.png",
    "<img src=x onerror=alert(1)>.png",
    'quote",;.png',
    "u\u0308.png",
    "\u00fc.png",
    "\u56fe" * 83 + ".tif",
    "x" * 251 + ".png",
]


def test_hostile_files_among_good_ones(tmp_path, monkeypatch, capfd):
    """Every good image gets its mask, every hostile one a sentence in errors.csv; no program is started, memory stays small."""
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    bad = hostile(folder)
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "deep" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    names = [*ODD_NAMES, *(f"{i:02d}.png" for i in range(28)), "deep/1.png", "deep/no ending", "../elsewhere/2.png"]
    for name in names:
        Image.fromarray(scene(40, 50)).save(folder / name, "TIFF" if name.endswith("tif") else "PNG")
    (folder / "notes.txt").write_text("no image")
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail(f"a program was started: {arguments}"))
    wanted, predictor = simple()(scene(40, 50)), simple()

    def run(**options):
        return predict_files(predictor, folder, output, progress=False, **options)

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    summary = run()
    assert (summary.done, summary.failed, summary.ignored) == (len(names), len(bad), 1) and "1 files passed over" in str(summary)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # KiB; fax.png takes 400 MB
    assert time.monotonic() - start < 5 * len(bad)
    errors = {row["file"]: row["reason"] for row in table(output / "errors.csv")}
    assert sorted(errors) == bad and "PostScript" in errors["program.png"] and "QTSEG_MAX_PIXELS" in errors["sparse.png"]
    assert "QTSEG_MAX_FILE_BYTES" in errors["huge.tif"] and "QTSEG_MAX_SWELL" in errors["fax.png"]
    rows = table(output / "predictions.csv")
    assert len(list(output.rglob("*.png"))) == len(rows) == len(names) == len({row["file"] for row in rows})
    for row in rows:
        assert not row["file"].startswith(("=", "+", "-", "@")) and row["file"].isprintable()
        if "\\" not in row["mask"]:
            assert (read_mask(output / row["mask"]) == wanted).all() and (folder / row["file"].split(" ~")[0]).exists()
    assert "passed over: a folder that was listed already" in capfd.readouterr().err
    again = run()  # the same command goes on: nothing is left to do, and no row is lost
    assert (again.done, again.skipped, again.failed) == (0, len(names), len(bad)) and table(output / "predictions.csv") == rows
    summary = run(overlay=True)  # "_overlay.jpg" makes two names too long: their masks stay, and so do their rows
    assert (summary.done, summary.failed) == (len(names), len(bad) + 2) and len(table(output / "predictions.csv")) == len(names)
    reasons = [row["reason"] for row in table(output / "errors.csv") if row["file"] not in bad]
    assert len(reasons) == 2 and all("_overlay.jpg could not be written (File name too long)" in reason for reason in reasons)


def test_an_output_that_cannot_be_written_is_one_row(three):
    """A folder of the mask's name; a file where a folder should be. The rest is done, and the table of both outputs is right."""
    folder, output = three
    assert predict_files(simple(), folder / "a.png", output, progress=False, overwrite=True).done == 1
    (output / "b.png").mkdir()
    (output / "deep").write_bytes(b"")
    (output / "a_overlay.jpg").mkdir()
    summary = predict_files(simple(), folder, output, overlay=True, overwrite=True, progress=False)
    assert (summary.done, summary.failed) == (1, 3) and [row["file"] for row in table(output / "predictions.csv")] == ["a.png"]
    reasons = [(row["file"], row["reason"].split(" could")[0]) for row in table(output / "errors.csv")]
    assert sorted(reasons) == [("a.png", "a_overlay.jpg"), ("b.png", "b.png"), ("deep/a.png", "deep/a.png"), ("deep/a.png", "deep/a_overlay.jpg")]
    (output / "b.png").rmdir(), (output / "deep").unlink(), (output / "a_overlay.jpg").rmdir()
    assert predict_files(simple(), folder, output, overlay=True, progress=False).done == 3 and len(table(output / "predictions.csv")) == 3


def test_pages_and_links(tmp_path, capfd):
    """Of a file of several pages the first is predicted, which is said; links to folders are searched, named or found."""
    pages = [Image.fromarray(scene(40, 50, seed)) for seed in range(3)]
    (tmp_path / "real").mkdir()
    pages[0].save(tmp_path / "real/stack.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "real/film.gif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "real/one.png")
    (tmp_path / "named").symlink_to("real")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/found").symlink_to("../real")
    for index, inputs in enumerate((tmp_path / "named", tmp_path / "in")):
        assert predict_files(simple(), inputs, tmp_path / f"out{index}", progress=False).done == 3
        notes = {Path(row["file"]).name: row["note"] for row in table(tmp_path / f"out{index}/predictions.csv")}
        assert notes == {"stack.tif": "page 1 of 3 was predicted", "film.gif": "page 1 of 3 was predicted", "one.png": ""}
        assert capfd.readouterr().err.count("page 1 of 3") == 2
    np.testing.assert_array_equal(read_mask(tmp_path / "out0/stack.png"), simple()(scene(40, 50, 0)))


@pytest.mark.parametrize("where", ["real/images/masks", "real/masks/deep"])
def test_earlier_results_are_no_inputs(where, tmp_path):
    """Wherever below the input they lie, and through patterns, too; a folder of results that is named is searched."""
    (tmp_path / "real/images").mkdir(parents=True)
    for index in range(3):
        Image.fromarray(scene(40, 50, index)).save(tmp_path / f"real/images/{index}.png")
    assert predict_files(simple(), tmp_path / "real/images", tmp_path / where, overlay=True, progress=False).done == 3
    for inputs in (tmp_path / "real", tmp_path / "real/**", tmp_path / "real/**/*.png", tmp_path / "real/*/*.png"):
        assert [file.name for file in find_images([str(inputs)], tmp_path / "out").files] == ["0.png", "1.png", "2.png"]
    assert len(find_images([tmp_path / where], tmp_path / "out").files) == 6


# --- names and tables ------------------------------------------------------------------------------------------------------


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_inputs_are_found(tmp_path):
    wanted = [touch(tmp_path / name) for name in ("a/1.png", "a/deep/er/2.TIF", "a/deep/scan.dcm", "b/1.png", "b/no ending")]
    for name in ("a/.hidden.png", "a/.cache/3.png", "a/notes.txt", "a/out/old.png", "a/out/predictions.json"):
        touch(tmp_path / name)
    root, files, _ = find_images([tmp_path / "a"], tmp_path / "a/out")
    assert root == tmp_path / "a" and files == wanted[:3]
    root, files, _ = find_images([tmp_path / "a", tmp_path / "b", tmp_path / "a/1.png"], tmp_path / "a/out")
    assert root == tmp_path and files == wanted[:4]
    root, files, _ = find_images([str(tmp_path / "*" / "1.*"), tmp_path / "b/no ending"], tmp_path / "out")
    assert root == tmp_path and files == [wanted[0], wanted[3], wanted[4]]
    for pattern, expected in (("a/**/*.TIF", [wanted[1]]), ("a/**", wanted[:3]), ("a/**/er/*", [wanted[1]]), ("**/1.p?g", [wanted[0], wanted[3]])):
        assert find_images([str(tmp_path / pattern)], tmp_path / "out").files == expected
    assert len(find_images([tmp_path / "a"], tmp_path).files) == 3  # the output folder around the images hides none of them
    (tmp_path / "a/out/predictions.json").unlink()
    with pytest.raises(ValueError, match="choose another output folder"):  # somebody's images, as it is no folder of predictions
        find_images([tmp_path / "a"], tmp_path / "a/out")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        find_images([tmp_path / "c.png"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no images in"):
        find_images([str(tmp_path / "*.gif")], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no images in .*notes.txt: no picture"):
        find_images([tmp_path / "a/*.txt"], tmp_path / "out")
    with pytest.raises(ValueError, match="choose another output folder"):
        find_images([tmp_path / "b"], tmp_path / "b")


def test_equal_names_do_not_collide(tmp_path):
    files = [
        tmp_path / name
        for name in ("a/1.jpg", "b/1.jpg", "b/1.PNG", "b/2.png", "c/x.png", "c/x_probability.png", "c/x.y.png", "d/1", "d/1.dcm")
    ]
    names = [name_outputs(tmp_path, files)[file] for file in files]
    assert names == ["a/1", "b/1.jpg", "b/1.PNG", "b/2", "c/x.png", "c/x_probability.png", "c/x.y", "d/1", "d/1.dcm"]
    same = [tmp_path / name for name in ("e/A.png", "e/a.PNG", "f/\u00fc.png", "f/u\u0308.png", "f/v.png")]  # for some file systems
    names += (others := [name_outputs(tmp_path, same)[file] for file in same])
    assert others[4] == "f/v" and name_outputs(tmp_path, same[:1] + same[2:3]) == {same[0]: "e/A", same[2]: "f/\u00fc"}
    masks = {unicodedata.normalize("NFC", f"{name}{ending}").lower() for name in names for ending in prediction_inputs.OUTPUTS}
    assert len(masks) == len(files + same) * len(prediction_inputs.OUTPUTS)


def test_measures_of_a_mask():
    mask = np.zeros((10, 20), np.uint8)
    mask[1:3, 2:5], mask[5:9, 10:15], mask[9, 19] = 1, 1, 2
    assert describe_mask(mask, 3) == [26, "13.0000", 2, "10 5 5 4; 2 1 3 2", 1, "0.5000", 1, "19 9 1 1"]
    assert describe_mask(np.zeros((4, 4), np.uint8), 1) == [0, "0.0000", 0, ""]
    speckled = np.zeros((100, 100), np.uint8)
    speckled[::2, ::2] = 1
    assert describe_mask(speckled, 2)[2] == 2500 and describe_mask(speckled, 2)[3].count(";") == prediction_outputs.MOST_BOXES - 1


@pytest.mark.parametrize("classes", [2, 5, 256])
def test_every_program_reads_class_indices_from_masks(classes, tmp_path):
    """OpenCV and scikit-image read a palette's colors, so by default there is none; with one, Pillow shows colors to people."""
    skimage = pytest.importorskip("skimage.io", reason="scikit-image is not installed")
    mask, path = np.random.default_rng(0).integers(0, classes, (33, 47)).astype(np.uint8), tmp_path / "mask.png"
    path.write_bytes(prediction_outputs.mask_png(mask))
    for read in (lambda: cv2.imread(str(path), cv2.IMREAD_UNCHANGED), lambda: skimage.imread(path), lambda: np.asarray(Image.open(path)),
                 lambda: read_mask(path, classes=classes)):
        np.testing.assert_array_equal(read(), mask)
    path.write_bytes(prediction_outputs.mask_png(mask, palette=True))
    with Image.open(path) as picture:
        assert picture.mode == "P" and (np.asarray(picture) == mask).all() and (read_mask(path, classes=classes) == mask).all()
        assert (np.asarray(picture.convert("RGB")) == class_colors(256)[mask]).all()


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
    mask = predictor(image)
    assert (
        overlay.shape == image.shape and abs(overlay - image)[cv2.dilate(mask, np.ones((9, 9))) == 0].mean() < 6 < 15 < abs(overlay - image)[mask == 1].mean()
    )
    assert predict_files(predictor, tmp_path / "image.png", output, probability="npz", progress=False).done == 1
    with np.load(output / "image_probability.npz") as archive:
        np.testing.assert_allclose(archive["probabilities"], probabilities, atol=1e-6)
        assert archive["class_names"].tolist() == ["background", "foreground"]


def test_overlays_of_giants_shrink():
    picture = Image.open(
        io.BytesIO(prediction_outputs.overlay_jpg(np.full((20, 70_000, 3), 90, np.uint8), np.ones((20, 70_000), np.uint8)))
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


def wait_for_a_later_time(output: Path) -> None:
    """Return when a file that is written now gets a later time than the masks: file systems count time in steps."""
    newest, probe = max(path.stat().st_mtime_ns for path in output.rglob("*.png")), output.parent / "probe"
    while not probe.exists() or probe.stat().st_ctime_ns <= newest:
        time.sleep(0.001)
        probe.write_bytes(b"")


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
    wait_for_a_later_time(output)
    os.utime(folder / "a.png", (1, 1))  # an old date, but it was put here after the mask
    assert run().done == 1 and run().done == 0
    wait_for_a_later_time(output)
    Image.fromarray(scene(21, 34)).save(folder / "old.png")
    os.utime(folder / "old.png", (1, 1))
    os.replace(folder / "old.png", folder / "a.png")  # as cp -p, unzip and rsync do
    assert run().done == 1 and read_mask(output / "a.png").shape == (21, 34)
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
    occupied = folder.parent / "file.txt"
    occupied.write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="file.txt is a file, and the results need a folder"):
            predict_files(simple(), folder, occupied, progress=False, overwrite=overwrite)
    assert occupied.read_text() == "kept"
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
    write = prediction_outputs.write_then_rename

    def full(path, function):
        def until_full(temporary):
            function(temporary)
            if path.name == "b.png":
                os.truncate(temporary, 10)
                raise OSError(28, "No space left on device")

        return write(path, until_full)

    monkeypatch.setattr(prediction_outputs, "write_then_rename", full)
    with pytest.raises(OSError, match=r"b.png could not be written \(No space left on device\)"):
        predict_files(simple(), folder, output, batch=1, progress=False)
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp") or path.name == "b.png"]
    monkeypatch.undo()
    rows = len(table(output / "predictions.csv"))
    assert predict_files(simple(), folder, output, progress=False).done == 3 - rows
    assert len(table(output / "predictions.csv")) == 3


def test_two_runs_into_one_folder(three):
    """The second is refused while the first runs, and not after a crash."""
    folder, output = three
    inside, go_on = threading.Event(), threading.Event()

    def slow(images):
        inside.set()
        go_on.wait(60)
        return brightness(images)

    first = threading.Thread(target=predict_files, args=(Predictor(slow, Preprocessing(64), 2, device="cpu"), folder, output), kwargs=dict(progress=False))
    first.start()
    assert inside.wait(60)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=rf"another prediction is writing to {output}: wait"):
            predict_files(simple(), folder, output, progress=False, **options)
    go_on.set()
    first.join()
    assert len(table(output / "predictions.csv")) == 3 and predict_files(simple(), folder, output, progress=False).skipped == 3
    if (child := os.fork()) == 0:  # a run that crashes
        prediction_outputs.only_writer(output).__enter__()
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (output / "a.png").unlink()
    assert predict_files(simple(), folder, output, progress=False).done == 1


@pytest.mark.parametrize("text", ["", "[]", "{" * 100_000, '{"a":' * 100_000, '{"size": ' + "9" * 5000 + "}", b"\xff\xfe", '{"images": "' + "x" * 10**6 + '"}'])
def test_damaged_settings_are_one_sentence(text, three):
    folder, output = three
    output.mkdir()
    (output / "predictions.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="holds other work .*predictions.json|holds other work .*images") as refused:
        predict_files(simple(), folder, output, progress=False)
    assert len(str(refused.value)) < 4000 and "\n" not in str(refused.value)
    assert predict_files(simple(), folder, output, overwrite=True, progress=False).done == 3


def test_a_damaged_table_is_one_sentence(three):
    folder, output = three
    predict_files(simple(), folder, output, progress=False)
    with (output / "predictions.csv").open("a") as file:
        file.write("x" * 200_000 + ",1\n")
    with pytest.raises(ValueError, match="predictions.csv is no table.*delete it"):
        predict_files(simple(), folder, output, progress=False)


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


def test_ctrl_c_stops_between_two_rows_of_windows(tmp_path):
    pytest.importorskip("monai", reason="MONAI is not installed")
    calls = []

    def slow(images):
        calls.append(len(images))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return brightness(images)

    Image.fromarray(scene(400, 64)).save(tmp_path / "tall.png")
    predictor = Predictor(slow, Preprocessing(64), 2, device="cpu")
    summary = predict_files(predictor, tmp_path / "tall.png", tmp_path / "out", window=64, overlap=0, progress=False)
    assert summary.stopped and (summary.done, summary.failed) == (0, 0) and len(calls) < 5, "the rest of the image is left"
    assert predict_files(predictor, tmp_path / "tall.png", tmp_path / "out", window=64, overlap=0, progress=False).done == 1
    assert (read_mask(tmp_path / "out/tall.png") == predictor.predict_large(tmp_path / "tall.png", 64, 0)).all()


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
    assert (predictor.predict_large(image) == predictor(image)).all()


@pytest.mark.parametrize("height, width", [(150, 211), (64, 300), (300, 64), (1, 1), (20, 130), (130, 20)])
def test_rows_of_windows_equal_monai_on_the_whole_image(height, width):
    pytest.importorskip("monai", reason="MONAI is not installed")
    from monai.inferers import sliding_window_inference
    from monai.inferers.utils import compute_importance_map

    predictor, image = tiny(), np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = list(predictor.rows(image, 64, 0.25, batch=3))
    padded = np.pad(image, ((0, max(0, 64 - height)), (0, max(0, 64 - width)), (0, 0)))
    whole = torch.from_numpy(cv2.cvtColor(padded, cv2.COLOR_RGB2YCrCb)).permute(2, 0, 1)[None].float()
    bell = compute_importance_map((64,), mode="gaussian")
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
    monkeypatch.setenv("QTSEG_MAX_PIXELS", "20000")  # the picture has 25,500
    assert predict_files(tiny(), tmp_path / "large.png", tmp_path / "plain", progress=False).failed == 1
    assert "QTSEG_MAX_PIXELS=25500" in table(tmp_path / "plain/errors.csv")[0]["reason"]
    monkeypatch.undo()
    summary = predict_files(
        tiny(), tmp_path / "large.png", tmp_path / "out", window=64, overlap=0.5, probability="npz", overlay=True, progress=False
    )
    assert (summary.done, summary.failed) == (1, 0)
    assert (read_mask(tmp_path / "out/large.png") == tiny().predict_large(image, 64, 0.5)).all()
    assert np.load(tmp_path / "out/large_probability.npz")["probabilities"].shape == (150, 170, 2)
    with pytest.raises(ValueError, match="32 pixels or more"):
        tiny().predict_large(image, 16)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        predict_files(tiny(), tmp_path / "large.png", tmp_path / "x", window=64, overlap=1.0)


def test_windows_are_bounded_by_the_image_and_by_memory(tmp_path):
    pytest.importorskip("monai", reason="MONAI is not installed")
    sizes = []
    predictor = Predictor(lambda images: sizes.append(tuple(images.shape)) or brightness(images), Preprocessing(64), 2, device="cpu")
    mask = predictor.predict_large(scene(40, 40), 20_000)
    assert sizes == [(1, 3, 64, 64)] and mask.shape == (40, 40)  # black around it, as in training
    predictor.predict_large(scene(70, 150), 20_000)
    assert sizes[-1] == (1, 3, 150, 150)
    predictor.predict_large(scene(70, 150), 100, batch=4)
    assert {size[2:] for size in sizes[2:]} == {(100, 100)}
    with pytest.raises(ValueError, match="window of 9000 pixels needs too much memory: choose 8192 or less"):
        predictor.predict_large(np.zeros((10, 9000, 3), np.uint8), 20_000)
    Image.fromarray(scene(40, 40)).save(tmp_path / "small.png")
    predict_files(predictor, tmp_path / "small.png", tmp_path / "out", window=20_000, progress=False)
    assert table(tmp_path / "out/predictions.csv")[0]["note"].startswith("window of 64 pixels")


# --- checkpoints and the command -------------------------------------------------------------------------------------------


def test_from_checkpoint_refuses_what_does_not_fit(checkpoint, tmp_path):
    for change, sentence in (
        (lambda f: (f / PREPROCESSING_FILE).unlink(), "is missing"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-10]), "truncated"),
        (
            lambda f: (f / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64, class_names=("a", "b", "c"))))),
            "needs 2 class names, but its preprocessing names 3",
        ),
        (lambda f: shutil.rmtree(f), "is no folder"),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint, folder)
        change(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            Predictor(folder)
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(ValueError, match="engine is one of"):
        Predictor(checkpoint, engine="tensorflow")


def small_onnx(checkpoint: Path, path: Path, sha: str) -> None:
    """An ONNX file that says logits = (0, 10 * first channel), with the metadata that qtseg export writes."""
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
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    with pytest.raises(FileNotFoundError, match="run `qtseg export .*copy` first"):
        Predictor(folder, engine="onnx")
    small_onnx(folder, folder / "model.onnx", "0" * 64)
    with pytest.raises(ValueError, match="was not exported from the model.safetensors beside it"):
        Predictor(folder, engine="onnx")
    small_onnx(folder, folder / "model.onnx", networks.weights_sha256(folder))
    predictor = Predictor(folder, engine="onnx", threshold=0.7)
    assert predictor.device.type == "cpu" and predictor.identity.startswith("onnx ")
    (folder / PREPROCESSING_FILE).write_text(json.dumps(asdict(Preprocessing(64))))
    image = scene(70, 90)
    assert (Predictor(folder, engine="onnx")(image) == simple()(image)).all()
    with pytest.raises(ValueError, match="computes on the CPU"):
        Predictor(folder, engine="onnx", amp="bf16")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(24))
    model = onnx.load(folder / "model.onnx")
    weight = model.graph.initializer[0]
    for place in ("../secret", str(secret), "beside"):  # weights in other files: somebody's secrets, as logits
        shutil.copy(secret, folder / "beside")
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        del weight.external_data[:]
        weight.external_data.add(key="location", value=place)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match="is no ONNX model that can be run"):
            OnnxNetwork(folder / "model.onnx")
    with (folder / "model.onnx").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(ValueError, match="more than 2147483647 bytes"):
        OnnxNetwork(folder / "model.onnx")
    (folder / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no ONNX model that can be run"):
        OnnxNetwork(folder / "model.onnx")


def test_the_command_in_a_shell(checkpoint, three, capfd):
    folder, output = three
    words = [str(checkpoint), str(folder), "--output", str(output), "--device", "cpu"]
    code = "import sys; from qtseg.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", *words, "--tta", "--keep-largest", "--threshold", "0.4", "--overlay"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "3 images" in done.stdout and "images/s, network" in done.stdout, done.stderr
    assert len(list(output.rglob("*_overlay.jpg"))) == 3
    assert main(["predict", *words]) == 1
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and "--overwrite" in printed.err and not printed.out
    for run in (checkpoint.parent, checkpoint.parent / "../run"):  # a run's folder stands for its best checkpoint
        assert Predictor(run, device="cpu").identity == Predictor(checkpoint, device="cpu").identity
    assert main(["predict", str(checkpoint.parent), *words[1:3], f"{output}2", "--no-progress"]) == 0
    assert f"checkpoint: {checkpoint}" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["CKPT", "nowhere.png", "--output", "OUT"], "there is no such file or folder"),
        (["CKPT", "EMPTY", "--output", "OUT"], "no images in"),
        (["EMPTY", "IMG", "--output", "OUT"], "holds no checkpoint"),
        (["CKPT", "IMG", "--output", "IMG/a.png/x"], "could not be written"),
        (["CKPT", "IMG", "--output", "OUT", "--device", "cuda:77"], "cannot be used"),
        (["CKPT", "IMG", "--output", "OUT", "--threshold", "2"], "between 0 and 1"),
        (["CKPT", "IMG", "--output", "OUT", "--device", "meta"], "cannot be used"),
        (["CKPT", "IMG", "--output", "OUT", "--batch", "0"], "batch is a whole number of at least 1"),
        (["CKPT", "IMG", "--output", "OUT", "--window", "64", "--overlap", "nan"], "from 0 to below 1"),
        (["CKPT", "IMG", "--output", "OUT", "--overlap", "0.5"], "give window (--window), too"),
        (["CKPT", "IMG", "--output", "OUT", "--window", "-5"], "32 pixels or more"),
        (["CKPT", "IMG", "--output", "OUT", "--engine", "onnx"], "qtseg export"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_1(words, sentence, checkpoint, three, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    places = {"CKPT": checkpoint, "IMG": three[0], "OUT": three[1], "EMPTY": tmp_path / "empty"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    assert main(["predict", *words, "--no-progress"]) == 1
    printed = capfd.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and not three[1].exists()


def test_wrong_usage_is_status_2(checkpoint, capfd):
    assert main(["predict", str(checkpoint), "--output", "x"]) == 2 and "Usage: qtseg predict" in capfd.readouterr().err


# --- against the evaluation ------------------------------------------------------------------------------------------------


def test_prediction_from_files_equals_evaluation_from_the_cache(tmp_path):
    """The cache, then evaluation's way back to the image's size; the files, then the Predictor: the same masks."""
    write_prepared(tmp_path / "data", "dermoscopy", 8, 96)
    data = SegmentationData.open(
        tmp_path / "data", size=64, resize="pad", color="ycrcb", cache=tmp_path / "cache", progress=False
    )
    torch.manual_seed(0)
    model = QTSeg(width=4, depths=[1, 1, 1], mlp_width=64).eval()
    predictor = Predictor(model, data.preprocessing, 2, device="cpu")
    for index in range(len(data.train)):
        with torch.no_grad():
            square = class_probabilities(model(normalize(data.train.batch([index]).images)))[0].permute(1, 2, 0).numpy()
        height, width = data.train.original_sizes[index]
        assert (predictor(data.train.paths[index][0]) == own_size_mask(square, height, width, "pad")).all()


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


def test_masks_are_gray_pngs_of_class_indices_with_and_without_opencvs_filter_option(monkeypatch):
    mask = np.random.default_rng(0).integers(0, 5, (37, 53), dtype=np.uint8)
    for name in (None, "IMWRITE_PNG_FILTER"):
        if name and hasattr(cv2, name):
            monkeypatch.delattr(cv2, name)
        data = prediction_outputs.mask_png(mask)
        picture = Image.open(io.BytesIO(data))
        assert picture.mode == "L" and (np.array(picture) == mask).all()
        assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) == mask).all()


def test_empty_inputs_and_odd_batches_are_one_sentence(three):
    folder, output = three
    with pytest.raises(FileNotFoundError, match="an empty text names no file"):
        predict_files(simple(), "", output, progress=False)
    with pytest.raises(ValueError, match="batch is a whole number of at least 1, not 2.5"):
        predict_files(simple(), folder, output, batch=2.5, progress=False)
    assert predict_files(simple(), os.fsencode(folder / "b.png"), output, progress=False).done == 1
