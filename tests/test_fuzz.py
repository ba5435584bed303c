"""Mutated files: a good result, or one sentence; never a traceback of another kind, a flood of memory, or a long wait.

200 cases for each reader, always the same ones. QTSEG_FUZZ=10000 tries as many others: QTSEG_FUZZ=10000 pytest tests/test_fuzz.py -k dicom
"""
from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import time
import warnings
import zipfile
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.pixels import compress
from pydicom.uid import RLELossless
from safetensors.torch import save

from qtseg.data.cache import DataProblems
from qtseg.data.layout import survey_folder
from qtseg.data.mask_values import IGNORE
from qtseg.data.reading import read_image, read_mask
from qtseg.data.segmentation import SegmentationData
from qtseg.data.sources import find_source
from qtseg.study.plan import read_study
from qtseg.files.pictures import read_picture
from qtseg.files.text import csv_cell, escape, printable, read_json
from qtseg.network.baselines import pretrained
from qtseg.network.model import QTSeg
from qtseg.network.official import load_official
from qtseg.network.state import copy_into, read_safetensors
from qtseg.training.config import TrainConfig
from qtseg.training.state import _read_state

CASES = int(os.environ.get("QTSEG_FUZZ", 200))
fuzzed = settings(max_examples=CASES, deadline=None, print_blob=False, derandomize=CASES == 200, database=None, suppress_health_check=list(HealthCheck))
slowly_fuzzed = settings(fuzzed, max_examples=max(1, CASES // 4))  # each case builds a network
COLOR = np.random.default_rng(0).integers(0, 256, (12, 17, 3)).astype(np.uint8)


# Mutations

NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
edits = st.lists(st.tuples(st.sampled_from(["flip", "set", "number", "short", "cut", "drop", "double", "splice", "text"]), st.floats(0, 1),
                           st.integers(0, 2**32 - 1), st.integers(1, 40)), min_size=1, max_size=6)


def mutated(data: bytes, other: bytes, changes) -> bytes:
    """`data` with some bytes changed, left out, repeated, cut off, or taken from `other`; half of all changes are in its first bytes."""
    out = bytearray(data)
    for kind, place, value, length in changes:
        at = int(place * 2 * min(len(out), 100)) % max(1, len(out)) if value % 2 else int(place * len(out))
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << value % 8
        elif kind == "set" and at < len(out):
            out[at] = value % 256
        elif kind in ("number", "short"):
            form = ("<", ">")[length % 2] + ("I" if kind == "number" else "H")
            packed = struct.pack(form, NUMBERS[value % len(NUMBERS)] % 2 ** (8 * struct.calcsize(form)))
            out[at:at + len(packed)] = packed
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at:at + length]
        elif kind == "double":
            out[at:at] = out[at:at + length] * (1 + value % 20)
        elif kind == "splice":
            start = value % max(1, len(other))
            out[at:at + length] = other[start:start + length]
        elif kind == "text":
            out[at:at] = [b"1e999", b"\xff\xfe", b"\n\n", b"null", b"-1", b"[[[[", b"\0", b"9" * 400, b"&a [*a]", b"NaN"][value % 10]
    return bytes(out)


@st.composite
def files(draw, seeds):
    """A mutated one of some files."""
    first, second = draw(st.sampled_from(seeds)), draw(st.sampled_from(seeds))
    return mutated(first, second, draw(edits))


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.sampled_from(NUMBERS), st.floats(), st.text(max_size=12),
                   st.sampled_from(["\udcff", "../x", "/etc/passwd", "a" * 5000, "a\nb", ".", "..", "\0", "auto", "1e3", "nan"]))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


@st.composite
def values_changed(draw, seed: dict):
    """A dictionary with some values, of any depth, replaced, some keys added and some left out."""
    out = json.loads(json.dumps(seed))
    for _ in range(draw(st.integers(1, 4))):
        place = out
        while True:
            key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(st.integers(0, len(place) - 1))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "add", "drop"]))
            if action == "replace":
                place[key] = draw(VALUES)
            elif action == "drop":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=8))] = draw(VALUES)
            else:
                place.append(draw(VALUES))
            break
        if not out:
            break
    return out


# The property

def peak_memory(anew: bool = False) -> int:
    """The most memory that this process has taken, in kB; with `anew`, counting begins again, so that a case can be replayed (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def good_or_one_sentence(call, *arguments, most=600):
    """Call a reader: its result, or None after one sentence of at most `most` characters; within five seconds and 500 MB."""
    begun, before = time.process_time(), peak_memory(anew=True)
    result = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of what they mend
            result = call(*arguments)
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError), "a sentence of ours, not Python's"
        said = str(error)
        said.encode()
        if not isinstance(error, DataProblems):
            assert "\n" not in said and 0 < len(said) <= most, said[:2000]
    assert time.process_time() - begun < 5
    assert peak_memory() - before < 500_000
    return result


def of(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# Pictures and masks

def _pictures() -> list[bytes]:
    image, gray = Image.fromarray(COLOR), Image.fromarray(COLOR[:, :, 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [(image, form, {}) for form in ("PNG", "TIFF", "BMP", "PPM", "SGI", "TGA", "PCX", "QOI", "DIB", "WEBP", "GIF", "JPEG2000", "AVIF")]
    kinds += [(image, "JPEG", {"exif": exif}), (image, "JPEG", {"progressive": True}), (gray, "PNG", {}), (gray.convert("1"), "TIFF", {"compression": "group4"}),
              (image, "TIFF", {"compression": "tiff_deflate"}), (image, "TIFF", {"compression": "jpeg"}), (gray, "TIFF", {"compression": "packbits"}),
              (image.quantize(8), "PNG", {}), (image.quantize(8), "BMP", {}), (Image.fromarray(COLOR[:, :, 0].astype(np.uint16) * 257), "PNG", {}),
              (Image.fromarray(COLOR[:, :, 0].astype(np.uint16) * 257), "TIFF", {}), (image, "GIF", {"save_all": True, "append_images": [gray, image]}),
              (image, "TIFF", {"save_all": True, "append_images": [image], "exif": exif}), (image, "PNG", {"exif": exif})]
    return [of(lambda stream: picture.save(stream, form, **options)) for picture, form, options in kinds] + [hostile.png(9, 9, 16, 6), b"P3 3 2 255\n" + b"1 2 3 " * 6]


PICTURES = _pictures()


@fuzzed
@given(data=files(PICTURES))
def test_pictures(place, data):
    path = place / "picture"
    path.write_bytes(data)
    read = good_or_one_sentence(read_picture, path)
    if read is not None:
        assert read.values.dtype in (np.uint8, np.uint16) and read.values.size and read.frames >= 1
        assert read.values.ndim == 2 or read.values.shape[2] == 3
    image = good_or_one_sentence(read_image, path)
    assert image is None or (image.dtype == np.uint8 and image.shape == (*read.values.shape[:2], 3))


@fuzzed
@given(data=files(PICTURES), masks=st.sampled_from(["index", "binary", "any"]), classes=st.sampled_from([1, 2, 5, 255]))
def test_masks(place, data, masks, classes):
    path = place / "mask"
    path.write_bytes(data)
    mask = good_or_one_sentence(read_mask, path, masks, classes)
    assert mask is None or (mask.dtype == np.uint8 and mask.ndim == 2 and {*np.unique(mask)} <= {*range(max(classes, 2)), IGNORE})


def _dicoms() -> list[bytes]:
    ramp = np.arange(64, dtype=np.uint16)
    plain = hostile.dicom(ramp.tobytes(), BitsAllocated=16, BitsStored=12, WindowCenter=30, WindowWidth=50, RescaleSlope=2, RescaleIntercept=-5, NumberOfFrames=1)
    packed = hostile.dicom(ramp.tobytes(), BitsAllocated=16)
    compress(packed, RLELossless)
    palette = hostile.dicom(bytes(range(64)), PhotometricInterpretation="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [64, 0, 16])
        setattr(palette, f"{name}PaletteColorLookupTableData", ramp.tobytes())
    color = hostile.dicom(COLOR[:8, :8].tobytes(), SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    jpeg = hostile.dicom([hostile.jpeg(8, 8)], "1.2.840.10008.1.2.4.50")
    kept = [of(lambda stream: data.save_as(stream, enforce_file_format=True)) for data in (plain, packed, palette, color, jpeg)]
    return [*kept, hostile._deflated(300)]


@fuzzed
@given(data=files(_dicoms()), cut=st.booleans())
def test_dicoms(place, data, cut):
    """Changes go past the first 128 bytes, which mean nothing."""
    path = place / "slice"
    path.write_bytes(bytes(128) + b"DICM" + data[132:])
    read = good_or_one_sentence(read_picture, path)
    assert read is None or (read.values.dtype == np.uint8 and read.format == "DICOM")


# Data sets

@pytest.fixture(scope="module")
def dataset(place):
    """A prepared folder of four pairs."""
    folder = place / "set"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rows = ["id,image,mask,patient,stratum,fold,split,width,height"]
    for i in range(4):
        Image.fromarray(np.roll(COLOR, i, 0)).save(folder / f"images/{i}.png")
        Image.fromarray((COLOR[:, :, 0] > 60 * i).astype(np.uint8)).save(folder / f"masks/{i}.png")
        rows.append(f"{i},images/{i}.png,masks/{i}.png,p{i},s{i % 2},{i % 2},,17,12")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    (folder / "dataset.json").write_text(json.dumps({"name": "set", "classes": ["background", "lesion"]}))
    return folder


@pytest.fixture(scope="module")
def archives(dataset):
    def packed(compression):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for path in sorted(dataset.rglob("*")):
                archive.write(path, path.relative_to(dataset))
        return stream.getvalue()
    return [packed(compression) for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)]


@fuzzed
@given(data=st.data(), changes=edits, at_the_end=st.booleans())
def test_zips(place, archives, data, changes, at_the_end):
    """Half of the changes go to the directory at the end."""
    first, second = data.draw(st.sampled_from(archives)), data.draw(st.sampled_from(archives))
    split = first.index(b"PK\x01\x02") if at_the_end else 0
    path = place / "set.zip"
    path.write_bytes(first[:split] + mutated(first[split:], second, changes))
    found = good_or_one_sentence(find_source, path, place / "cache", 32)
    if found is not None:
        assert found[0].is_relative_to(place)
        good_or_one_sentence(survey_folder, found[0])


@fuzzed
@given(data=st.data(), which=st.sampled_from(["manifest.csv", "dataset.json"]), changes=edits)
def test_manifests(place, dataset, data, which, changes):
    folder = place / "described"
    if not folder.exists():
        folder.mkdir()
        for part in ("images", "masks"):
            (folder / part).symlink_to(dataset / part, target_is_directory=True)
    for name in ("manifest.csv", "dataset.json"):
        stored = (dataset / name).read_bytes()
        (folder / name).write_bytes(mutated(stored, stored, changes) if name == which else stored)
    survey = good_or_one_sentence(survey_folder, folder)
    if survey is not None:
        assert all(record.image.is_file() and (record.mask is None or record.mask.is_file()) for record in survey.records)
        for sentence in (*survey.problems, *survey.notes):
            sentence.encode()
            assert "\n" not in sentence and len(sentence) <= 1000
    if data.draw(st.integers(0, 19)) == 0:  # all the way, which takes longer
        good_or_one_sentence(lambda: SegmentationData.open(folder, size=32, cache=place / "opened", progress=False, workers=1, masks="index"))


# Checkpoints

TINY = {"classes": 2, "width": 1, "depths": (1, 1, 1), "heads": 1, "mlp_width": 4}


@pytest.fixture(scope="module")
def checkpoint(place):
    folder = place / "checkpoint"
    QTSeg(**TINY).save_pretrained(folder)
    return folder


@slowly_fuzzed
@given(data=st.data())
def test_configurations(place, checkpoint, data):
    stored = json.loads((checkpoint / "config.json").read_text())
    folder = place / "configured"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(values_changed(stored))).encode()
    else:
        text = mutated(json.dumps(stored).encode(), b'{"width": 9}', data.draw(edits))
    (folder / "config.json").write_bytes(text)
    good_or_one_sentence(pretrained, folder, most=1000)  # four names for each of what is missing, left over and misfit


@pytest.fixture(scope="module")
def tensors():
    return {"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.int64), "c": torch.ones(2, 2, 2)}


@fuzzed
@given(changes=edits)
def test_safetensors(place, tensors, changes):
    stored, path = save(tensors), place / "model.safetensors"
    path.write_bytes(mutated(stored, stored, changes))
    good_or_one_sentence(lambda: copy_into({name: value.clone() for name, value in tensors.items()}, read_safetensors(path), path))


def saved(content) -> bytes:
    return of(lambda stream: torch.save(content, stream))


@fuzzed
@given(changes=edits, repaired=st.booleans())
def test_resume_states(place, tensors, changes, repaired):
    """The file as it is damaged; or its pickle damaged and packed again, so that no checksum tells."""
    stored, path = saved({"model": tensors, "progress": {"epoch": 3, "history": [{"loss": 0.5}]}, "data": "x"}), place / "resume.pt"
    if repaired:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(stored)) as old, zipfile.ZipFile(stream, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                new.writestr(entry.filename, mutated(content, stored, changes) if entry.filename.endswith(".pkl") else content)
        path.write_bytes(stream.getvalue())
    else:
        path.write_bytes(mutated(stored, stored, changes))
    good_or_one_sentence(_read_state, path)
    good_or_one_sentence(load_official, path)


# Texts

STUDY = {"study": "decoders", "question": "Which?", "reference": "own", "seeds": [1, 2], "folds": [0, 1], "folds_of": 2, "common": {"epochs": 3, "size": 64, "data": "phantoms"},
         "arms": {"own": {}, "thin": {"decoder": "thin", "lr": 0.001}}}


@fuzzed
@given(data=st.data())
def test_studies(place, data):
    path = place / "study.yaml"
    if data.draw(st.booleans()):
        path.write_text(yaml.safe_dump(data.draw(values_changed(STUDY))), encoding="utf-8", errors="surrogateescape")
    else:
        stored = yaml.safe_dump(STUDY).encode()
        path.write_bytes(mutated(stored, b"&a [*a, *a]: {x: *a}\n", data.draw(edits)))
    good_or_one_sentence(read_study, path, most=6000)  # up to ten problems


@fuzzed
@given(data=st.data())
def test_run_configurations(data):
    stored = {"name": "run", "data": "phantoms", "epochs": 3, "size": 64, "betas": [0.9, 0.999], "depths": [1, 2, 3], "lr": 0.001, "gamma": 2.0, "valid_share": 0.2, "loss": "dice_ce"}
    changed = data.draw(values_changed({key: stored[key] for key in stored if key in TrainConfig.model_fields}))
    good_or_one_sentence(lambda: TrainConfig(**changed) if all(key in TrainConfig.model_fields for key in changed) else None,
                         most=6000)  # all that is wrong


@fuzzed
@given(data=st.binary(max_size=300) | st.builds(lambda value: json.dumps(value).encode(), VALUES))
def test_json(place, data):
    path = place / "x.json"
    path.write_bytes(data)
    found = good_or_one_sentence(read_json, path)
    assert found is None or isinstance(found, dict)


@fuzzed
@given(text=st.text(st.characters(), max_size=60) | st.text("<>&\"'\\$*_`|~[]()#!-+=.:@/ www1\n\t\x1b\udcff", max_size=30))
def test_texts(text):
    assert printable(text).isprintable() or printable(text).encode()
    assert not any(character in escape(text).replace("<span>", "").replace("</span>", "") for character in "<>\n\r|`*[]")
    cell = csv_cell(text)
    assert cell == "" or cell[0] not in "=@\t\r" and "\n" not in cell
    cell.encode()
    if cell[:1] in ("+", "-"):
        assert math.isfinite(float(cell)) or "e" in cell.lower()


# Messages from a browser

@pytest.fixture(scope="module")
def panel():
    widgets = pytest.importorskip("ipywidgets")  # noqa: F841
    pytest.importorskip("anywidget")
    from qtseg.view.playground import AugmentationPlayground
    panel = AugmentationPlayground(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8))
    panel.view
    return panel


@fuzzed
@given(message=VALUES | st.fixed_dictionaries({"kind": st.sampled_from(["click", "stroke", "key"]) | VALUES},
                                              optional={name: VALUES for name in ("x", "y", "panel", "id", "tool", "points", "brush", "key")}))
def test_messages_from_a_browser(panel, message):
    """Never an exception, which would be lost in the kernel."""
    panel.page.canvas.receive(message)
