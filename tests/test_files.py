"""The gate for files of strangers: what is read, what is refused before it is decoded, and text that stays text."""
from __future__ import annotations

import ast
import csv
import html.parser
import io
import json
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import zlib

import hostile
import mistune
import cv2
import numpy as np
import pytest
from conftest import ROOT, one_sentence
from PIL import Image, ImageOps
from pydicom.pixels import compress
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from qtseg.files import headers, limits, writing
from qtseg.files.folders import same_form, walk
from qtseg.files.pictures import is_picture, read_picture
from qtseg.files.text import csv_cell, escape, printable, read_json, read_table
from qtseg.files.writing import write_then_rename

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
GRAY = COLOR[:, :, 0]
DEEP = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)


def save(path, array, **options):
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


# One picture

@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "ppm", "sgi", "tga", "pcx", "qoi", "dib", "webp", "gif", "jpg", "jp2", "avif"])
def test_the_content_decides_never_the_ending(tmp_path, ending):
    path = save(tmp_path / f"x.{ending}", COLOR, **({"lossless": True} if ending == "webp" else {}))
    path = path.rename(tmp_path / "no ending")
    read = read_picture(path)
    assert is_picture(path) and read.bits == 8 and read.frames == 1 and not read.turned
    values = read.values if read.palette is None else read.palette[read.values]
    assert values.dtype == np.uint8 and values.shape == COLOR.shape and values.flags.writeable
    if ending not in ("gif", "jpg", "jp2", "avif"):
        assert (values == COLOR).all()
    assert read.format.removesuffix(" lossless") in headers.FORMATS


def test_what_is_stored_is_returned(tmp_path):
    """Gray, one bit, palette index, alpha dropped and not blended, sixteen bits."""
    indices = np.arange(600, dtype=np.uint8).reshape(20, 30) % 7
    palette = Image.frombytes("P", (30, 20), indices.tobytes())
    palette.putpalette([0, 0, 0, 250, 10, 10, 10, 250, 10] + [9] * 12)
    cases = {"gray": (GRAY, GRAY, 8), "bit": (Image.fromarray(GRAY > 99), GRAY > 99, 1), "index": (palette, indices, 8), "deep": (DEEP, DEEP, 16),
             "rgba": (np.dstack([COLOR, GRAY]), COLOR, 8), "la": (Image.merge("LA", [Image.fromarray(GRAY)] * 2), GRAY, 8)}
    for name, (stored, values, bits) in cases.items():
        read = read_picture(save(tmp_path / f"{name}.png", stored))
        assert (read.values == values).all() and read.bits == bits, name
        assert (read.palette is not None) == (name == "index")
        if name == "index":
            assert read.palette.shape == (256, 3) and read.palette[2].tolist() == [10, 250, 10]


@pytest.mark.parametrize("kind", ["png", "png with alpha", "gray with alpha", "tif", "turned tif"])
def test_colors_of_sixteen_bits_stay_sixteen(tmp_path, kind):
    import cv2
    deep = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    path = tmp_path / ("x.tif" if kind.endswith("tif") else "x.png")
    if kind == "gray with alpha":  # which no library here writes
        rows = np.stack([DEEP, DEEP], 2).astype(">u2")
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + hostile.chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 16, 4, 0, 0, 0)) + hostile.chunk(b"IDAT", data)
                         + hostile.chunk(b"IEND", b""))
    elif kind == "turned tif":
        entries = {256: (4, [30]), 257: (4, [20]), 258: (3, [16] * 3), 259: (3, [1]), 262: (3, [2]), 273: (4, [8]), 274: (3, [6]), 277: (3, [3]),
                   278: (4, [20]), 279: (4, [3600])}
        path.write_bytes(hostile.tiff(entries, deep.tobytes()))
    else:
        cv2.imwrite(str(path), np.dstack([deep[:, :, ::-1], DEEP]) if "alpha" in kind else deep[:, :, ::-1])
    read = read_picture(path)
    right = {"gray with alpha": np.stack([DEEP] * 3, 2), "turned tif": np.rot90(deep, -1)}.get(kind, deep)
    assert read.bits == 16 and read.values.dtype == np.uint16 and (read.values == right).all() and bool(read.turned) == (kind == "turned tif")


@pytest.mark.parametrize("bits", [1, 8, 12, 16])
@pytest.mark.parametrize("compression", [1, 8])
def test_white_is_zero_in_a_tiff(tmp_path, bits, compression):
    """Photometric interpretation 0: the stored 0 is white, whatever the depth."""
    width, height = 16, 10
    values = RNG.integers(0, 2**bits, (height, width))
    digits = ((values[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8)
    data = values.astype("<u2").tobytes() if bits == 16 else np.packbits(digits.reshape(height, -1), axis=1).tobytes()
    data = zlib.compress(data) if compression == 8 else data
    for photometric in (0, 1):
        entries = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits]), 259: (3, [compression]), 262: (3, [photometric]), 273: (4, [8]),
                   277: (3, [1]), 278: (4, [height]), 279: (4, [len(data)])}
        (tmp_path / "x.tif").write_bytes(hostile.tiff(entries, data))
        if bits == 12 and photometric == 0:  # Pillow has no such form
            with pytest.raises(ValueError, match="cannot be read"):
                read_picture(tmp_path / "x.tif")
            continue
        read = read_picture(tmp_path / "x.tif")
        assert read.bits == bits and (read.values == (2**bits - 1 - values if photometric == 0 else values)).all()


def test_a_tiff_says_that_twelve_of_sixteen_bits_are_used(tmp_path):
    values = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    read = read_picture(save(tmp_path / "x.tif", values, tiffinfo={281: 4095}))
    assert read.bits == 12 and (read.values == values).all()


def test_pages_and_frames_are_counted(tmp_path):
    pages = [Image.fromarray(np.roll(COLOR, i, 0)) for i in range(3)]
    for name in ("x.tif", "x.gif", "x.png", "x.webp", "x.avif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert read_picture(tmp_path / name).frames == 3, name
    pages[0].save(tmp_path / "big.tif", save_all=True, append_images=pages[1:], big_tiff=True)
    assert read_picture(tmp_path / "big.tif").frames == 3
    hostile.save(hostile.dicom(bytes(64 * 5), NumberOfFrames=5))(tmp_path / "x")
    assert read_picture(tmp_path / "x").frames == 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_carried_out_and_told(tmp_path, orientation):
    """Square pictures too, whose turn no size betrays."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, array in (("a.png", COLOR), ("b.png", COLOR[:, :20]), ("c.jpg", COLOR), ("d.tif", COLOR), ("e.webp", GRAY), ("f.png", DEEP)):
        path = save(tmp_path / name, array, exif=exif)
        read = read_picture(path)
        right = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        assert read.turned == orientation * (orientation > 1) and (read.values == right).all(), name


def test_twins_have_one_digest(tmp_path):
    one, two = save(tmp_path / "one.png", COLOR), save(tmp_path / "two.png", GRAY)
    (tmp_path / "three").write_bytes(one.read_bytes())
    assert read_picture(one).digest == read_picture(tmp_path / "three").digest != read_picture(two).digest
    assert len(read_picture(one).digest) == 24


# DICOM

def shown(tmp_path, data):
    hostile.save(data)(tmp_path / "1.2.840.113619")
    return read_picture(tmp_path / "1.2.840.113619")


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless], ids=str)
@pytest.mark.parametrize("name", ["IM0001", "x.dcm", "x.IMA", "x.png"])
def test_dicom_is_known_by_its_mark(tmp_path, syntax, name):
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = hostile.dicom(values.tobytes(), Rows=64, Columns=64, BitsAllocated=16, BitsStored=12)
    data.save_as(tmp_path / "plain", enforce_file_format=True)
    if syntax == RLELossless:
        compress(data, RLELossless)
        data.save_as(tmp_path / name, enforce_file_format=True)
    else:
        data.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            data.PixelData = values.astype(">u2").tobytes()
        data.save_as(tmp_path / name, enforce_file_format=True, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian)
    read = read_picture(tmp_path / name)
    assert read.format == "DICOM" and read.bits == 12 and read.values.dtype == np.uint8
    assert (read.values == read_picture(tmp_path / "plain").values).all() and read.values[0, 0] == 0 and read.values[-1, -1] == 255


@pytest.mark.parametrize("bits", [8, 16])
def test_dicom_shows_what_a_screen_shows(tmp_path, bits):
    """MONOCHROME1 inverted at every depth, signed values, rescaling, the window, colors of more than eight bits."""
    kind, allocated = np.dtype(f"u{bits // 8}"), {"BitsAllocated": bits}
    ramp = np.linspace(0, 2**bits - 1, 64).astype(kind)
    gray = shown(tmp_path, hostile.dicom(ramp.tobytes(), **allocated)).values.ravel()
    assert (gray == np.rint(ramp / (2**bits - 1) * 255)).all()
    assert (shown(tmp_path, hostile.dicom(ramp.tobytes(), PhotometricInterpretation="MONOCHROME1", **allocated)).values.ravel() == 255 - gray).all()
    signed = (ramp.astype(np.int64) - 2 ** (bits - 1)).astype(f"i{bits // 8}")
    assert (shown(tmp_path, hostile.dicom(signed.tobytes(), PixelRepresentation=1, **allocated)).values.ravel() == gray).all()
    upside = shown(tmp_path, hostile.dicom(ramp.tobytes(), RescaleSlope=-2, RescaleIntercept=7, **allocated)).values.ravel()
    assert (upside == np.rint((1 - ramp / (2**bits - 1)) * 255)).all()
    window = shown(tmp_path, hostile.dicom(ramp.tobytes(), WindowCenter=2 ** (bits - 1), WindowWidth=2 ** (bits - 2), **allocated)).values.ravel()
    assert window[0] == 0 and window[-1] == 255 and (np.diff(window.astype(int)) >= 0).all()
    color = RNG.integers(0, 2**bits, (8, 8, 3)).astype(kind)
    read = shown(tmp_path, hostile.dicom(color.tobytes(), SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, **allocated))
    assert (read.values == color >> bits - 8).all()


def test_dicom_colors_of_twelve_bits_are_no_night(tmp_path):
    color = RNG.integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    read = shown(tmp_path, hostile.dicom(color.tobytes(), SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=16, BitsStored=12))
    assert (read.values == color >> 4).all() and read.bits == 12


def test_dicom_palette(tmp_path):
    data = hostile.dicom(bytes(range(64)), PhotometricInterpretation="PALETTE COLOR")
    table = RNG.integers(0, 256, (3, 64))
    for name, row in zip(("Red", "Green", "Blue"), table):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [64, 0, 16])
        setattr(data, f"{name}PaletteColorLookupTableData", (row * 257).astype(np.uint16).tobytes())
    assert (shown(tmp_path, data).values.reshape(64, 3) == table.T).all()


def test_dicom_beside_its_pixels_may_hold_sequences(tmp_path):
    from pydicom.dataset import Dataset
    data = hostile.dicom(bytes(range(64)))
    inner = Dataset()
    inner.PatientName, inner.RequestedProcedureID = "nobody", "x" * 1000
    outer = Dataset()
    outer.RequestAttributesSequence = [inner, inner]
    data.ReferencedStudySequence = [outer]
    plain = shown(tmp_path, data).values
    data["ReferencedStudySequence"].is_undefined_length = True
    for item in data.ReferencedStudySequence:
        item.is_undefined_length_sequence_item = True
        item["RequestAttributesSequence"].is_undefined_length = True
    assert (shown(tmp_path, data).values == plain).all() and len(np.unique(plain)) == 64


# What is refused

@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Every hostile file through the gate, each in a process of its own: name -> (what was said, megabytes, seconds)."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile.make(folder)
    found = {}
    import pydicom.pixels.decoders  # noqa: F401  loaded once, before the processes part
    for name in hostile.FILES:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            before, code = resource.getrusage(resource.RUSAGE_SELF), 0
            try:
                read_picture(folder / name)
                said = ""
            except (ValueError, OSError) as error:
                said = f"{type(error).__name__}: {error}"
            except BaseException as error:
                said, code = f"!! {type(error).__name__}: {error}", 1
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            os.write(writer, json.dumps([said, (after.ru_maxrss - before.ru_maxrss) / 1024, seconds]).encode())
            os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as stream:
            found[name] = json.loads(stream.read() or '["!! died", 0, 0]')
        os.waitpid(child, 0)
    return found


HARMLESS = {"overlapping.tif"}  # what they hold can be read


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_in_one_sentence_cheaply(refused, name):
    said, megabytes, seconds = refused[name]
    assert said.startswith(("ValueError: ", "FileNotFoundError: ", "OSError: ")) or (name in HARMLESS and said == ""), said
    assert "\n" not in said and len(said) <= 600
    assert megabytes <= 500 and seconds <= 5, f"{megabytes} MB, {seconds} s of the processor"


@pytest.mark.parametrize("name, words", {
    "eps.png": "PostScript", "fifo.png": "pipe", "zero.png": "device", "folder.png": "folder", "empty.png": "empty", "sparse.png": "QTSEG_MAX_FILE_BYTES",
    "zeros.png": "QTSEG_MAX_PIXELS", "zeros_rgb.png": "QTSEG_MAX_SWELL", "tiles.tif": "QTSEG_MAX_PIECES", "rle.dcm": "QTSEG_MAX_PIXELS",
    "deflated.dcm": "(deflated)", "deflated_beside.dcm": "(deflated)", "comments.jpg": "QTSEG_MAX_WHOLE_BYTES", "chunk.png": "QTSEG_MAX_WHOLE_BYTES",
    "described.dcm": "QTSEG_MAX_WHOLE_BYTES", "sparse_below_the_limit": "what describes it is far larger", "elements.dcm": "QTSEG_MAX_PIECES", "nested.dcm": "as DICOM", "fragments.dcm": "8 x 8", "channels.dcm": "channel", "precincts.dcm": "blocks", "runs.dcm": "runs", "lying_jpeg.dcm": "170300000 values", "cut.png": "to its end",
    "stated_part.png": "states a part of 1862270996", "text.png": "no image"}.items())
def test_the_refusal_says_why_and_names_the_limit(refused, name, words):
    assert words in refused[name][0]


def test_a_limit_is_raised_by_the_variable_that_the_refusal_names(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", COLOR)
    for name, value in (("MAX_FILE_BYTES", "9"), ("MAX_PIXELS", "9"), ("MAX_PIECES", "1")):
        monkeypatch.setenv(f"QTSEG_{name}", value)
        with pytest.raises(ValueError) as caught:
            read_picture(path)
        if name != "MAX_PIECES":
            one_sentence(caught, f"QTSEG_{name}=")
            monkeypatch.setenv(f"QTSEG_{name}", str(caught.value).split(f"QTSEG_{name}=")[1].split()[0])
            assert read_picture(path)
        monkeypatch.delenv(f"QTSEG_{name}")
    monkeypatch.setenv("QTSEG_MAX_PIXELS", "many")
    with pytest.raises(ValueError) as caught:
        read_picture(path)
    one_sentence(caught, "QTSEG_MAX_PIXELS", "'many'")


def test_a_large_picture_leaves_pillows_own_limit_alone(tmp_path):
    """90 megapixels, above Pillow's limit: read without a warning, in threads, and the limit is what it was."""
    path = tmp_path / "x.png"
    code = """
import sys, threading, warnings
warnings.simplefilter("error")
from PIL import Image
from qtseg.files.pictures import read_picture
before, seen, read = Image.MAX_IMAGE_PIXELS, set(), []
reader = threading.Thread(target=lambda: read.append(read_picture(sys.argv[1])))
reader.start()
while reader.is_alive():
    seen.add(Image.MAX_IMAGE_PIXELS)
    reader.join(0.02)
assert read[0].values.shape == (9460, 9460) and seen | {Image.MAX_IMAGE_PIXELS} == {before}
"""
    for write in (lambda: path.write_bytes(hostile.png(9460, 9460)), lambda: Image.new("L", (9460, 9460)).save(path, "TIFF", compression="packbits")):
        write()
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_225_megapixels_are_honest_work():
    """By the header alone, which is what decides: a JPEG of 20 MB, a TIFF without compression, a PNG of 200 MB; gray even if it is flat."""
    for size, plain, peak in ((20e6, 3, 7), (675e6, 3, 7), (200e6, 3, 7), (230e3, 1, 2), (100e6, 2, 4)):
        headers.require_memory(15_000, 15_000, plain, peak, size)


def test_an_image_is_judged_as_rgb_a_mask_as_it_is(tmp_path):
    """24 kB of one bit a pixel would take 800 MB as an image; an honest flat mask of 100 megapixels is read."""
    path = tmp_path / "x.png"
    path.write_bytes(hostile.png(14_100, 14_100, 1))
    with pytest.raises(ValueError) as caught:
        read_picture(path)
    one_sentence(caught, "QTSEG_MAX_SWELL=")
    path.write_bytes(hostile.png(10_000, 10_000, 1))
    assert read_picture(path, stored_values=True).values.shape == (10_000, 10_000)


@pytest.mark.parametrize("block", ["jpg", "png"])
def test_an_exif_block_that_describes_itself_a_thousand_times(tmp_path, block):
    """Pillow would load 60,000 copies of one megabyte while it opens the file."""
    count = 60_000
    entries = b"".join(struct.pack("<HHII", tag, 7, 700_000, 8) for tag in range(1000, 1000 + count))
    exif = struct.pack("<2sHIH", b"II", 42, 8, count) + entries + bytes(4)
    if block == "png":
        data = hostile.png(8, 8)
        data = data[:33] + hostile.chunk(b"eXIf", exif) + data[33:]
    else:
        parts = [exif[i:i + 65_000] for i in range(0, len(exif), 65_000)]
        data = hostile.jpeg(8, 8)
        data = data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts) + data[2:]
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_picture(tmp_path / "x")
    one_sentence(caught, "directory")


def test_floats_and_numbers_of_32_bits_are_refused(tmp_path):
    for array in (np.full((4, 4), 0.3, np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(ValueError) as caught:
            read_picture(save(tmp_path / "x.tif", array))
        one_sentence(caught, "8 or 16 bits")


# Folders

def test_walks_end(tmp_path):
    """Links in circles, a thousand folders in each other, earlier results, hidden files, pipes: each has its reason."""
    root = tmp_path / "in"
    (root / "b" / "c").mkdir(parents=True)
    for name in ("a.png", "b/b.png", "b/c/c.png", ".hidden"):
        (root / name).write_bytes(b"x")
    (root / "0").symlink_to(root / "b", target_is_directory=True)
    (root / "b" / "self").symlink_to(".", target_is_directory=True)
    (root / "b" / "up").symlink_to("../..", target_is_directory=True)
    (root / "nowhere.png").symlink_to("nothing")
    (root / "circle").symlink_to("circle")
    os.mkfifo(root / "pipe.png")
    (root / "results").mkdir()
    (root / "results" / "predictions.json").write_text("{}")
    (root / "results" / "mask.png").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "o.png").write_bytes(b"x")
    (root / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    files_found, passed = walk(root)
    assert [path.relative_to(root).as_posix() for path in files_found] == ["a.png", "b/b.png", "b/c/c.png", "linked/o.png"]
    reasons = {path.relative_to(root).as_posix(): reason for path, reason in passed}
    assert reasons[".hidden"] == "hidden" and reasons["results"] == "results of an earlier prediction" and "pipe" in reasons["pipe.png"]
    assert reasons["nowhere.png"] == reasons["circle"] == "a link that leads nowhere"
    assert all("already" in reasons[name] for name in ("0", "b/self"))
    deep, folder = tmp_path / "deep", os.open(tmp_path, os.O_RDONLY)
    deep.mkdir()
    try:
        os.chdir(deep)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.fchdir(folder)
        os.close(folder)
        os.chdir(ROOT)
    found, passed = walk(deep)
    subprocess.run(["rm", "-r", str(deep)], check=True)  # which pytest cannot
    assert found == [] and len(passed) == 1 and "64" in passed[0][1]


def test_a_folder_that_cannot_be_opened_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    usual = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: usual(path) if "closed" not in str(path) else (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    found, passed = walk(tmp_path)
    assert found == [tmp_path / "a.png"] and passed == [(tmp_path / "closed", "a folder that cannot be opened (Permission denied)")]


def test_names_are_compared_in_one_form():
    assert same_form("Rontgen u\u0308ber") == "Rontgen \u00fcber" and same_form("\u212b") == "\u00c5"


# JSON

@pytest.mark.parametrize("data, words", [
    (b"{", "JSON"), (b"[1]", "list"), (b"", "JSON"), (b"\xff\xfe{}", "UTF-8"), (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
    (b'{"a": ' + b"9" * 5000 + b"}", "digits"), (b'{"a": 1, "a": 2}', "twice"), (b'{"a": "\\ud800"}', "surrogates"), (b'"x"', "str"), (b"\0" * 99, "JSON"),
], ids=range(10))
def test_json_that_cannot_be_read_is_one_sentence(tmp_path, data, words):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "x.json")
    one_sentence(caught, str(tmp_path / "x.json"), words)
    assert len(str(caught.value)) <= 600


def test_json_from_odd_places(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "\\u00fc"]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, "ü"]}
    os.truncate(tmp_path / "x.json", 2**31)
    os.mkfifo(tmp_path / "pipe.json")
    for path, words in ((tmp_path / "x.json", "QTSEG_MAX_TEXT_BYTES"), (tmp_path / "pipe.json", "pipe"), (tmp_path, "folder")):
        with pytest.raises(ValueError) as caught:
            read_json(path)
        one_sentence(caught, str(path), words)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


def test_tables_of_strangers_are_bounded(tmp_path):
    """A sparse file, millions of rows, of columns, a cell or a row without an end; each through the two readers of this layer's neighbors."""
    from qtseg.view.figures import read_history
    from qtseg.view.album import SavedPredictions
    path = tmp_path / "x.csv"
    path.write_text("\ufeffid,dice\na,0.5\n\"b\nc\",1\n", encoding="utf-8")
    columns, rows = read_table(path)
    assert columns == ["id", "dice"] and list(rows) == [{"id": "a", "dice": "0.5"}, {"id": "b\nc", "dice": "1"}]
    cases = {"rows": b"a,b\n" + b"1,2\n" * 100_001, "columns": b"," * 3_000_000 + b"\n1\n", "field": b"a\n" + b"1" * 10**6,
             "characters": b"a\n" + b'"\n",' * 2**21, "UTF-8": b"a\n\xff\n"}
    for words, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            list(read_table(path)[1])
        one_sentence(caught, str(path), words)
    (tmp_path / "predictions.json").write_text("{}")
    for name, read in (("history.csv", read_history), ("predictions.csv", SavedPredictions)):
        (tmp_path / name).write_bytes(b"a\n")
        os.truncate(tmp_path / name, 900_000_000)
        with pytest.raises(ValueError) as caught:
            read(tmp_path)
        one_sentence(caught, "QTSEG_MAX_TABLE_BYTES")


# Text

NAMES = ["plain_name-01.png", "<img src=x onerror=alert(1)>.png", "a|b", "*bold* _it_ __x__ `code` ~~gone~~", "[link](javascript:alert(1))", "![x](http://x/y.png)",
         "http://example.org www.example.org a@example.org", "# head", "1. item", "- item", "+ item", "> quote", "&amp; &lt;", "\"quotes' here", "a\\*b", "---", "$x$",
         "== ==", "-- -", "-1.5", "+0.41", "1.29", "    four", "&#60;script&#62;", "日本 ü.png", "<!-- -->", "{{ x }}", "a  b"]


class Text(html.parser.HTMLParser):
    """The text that a browser shows, and the tags that it obeys."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(source)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_looks_the_same_and_does_nothing(name):
    """As HTML, in a Markdown paragraph, in a Markdown table; formulas in a tag of their own, where no typesetter finds them."""
    markdown = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])
    shown = escape(name)
    assert Text(shown).text == name and Text(shown).tags <= {"span"}
    paragraph = Text(markdown(shown))
    assert paragraph.text.strip("\n") == name and paragraph.tags <= {"p", "span"}
    table = Text(markdown(f"| name | n |\n|---|---|\n| {shown} | 1 |\n"))
    assert name in table.text and table.tags <= {"table", "thead", "tbody", "tr", "th", "td", "span"}
    assert "$" not in Text(shown.replace("<span>&#36;</span>", "")).text


def test_line_breaks_and_control_characters_are_shown(capfd):
    assert printable("a\nb\tc\x1b[31m\x7f\u202e\udcff\ud800") == r"a\nb\tc\x1b[31m\x7f\u202e\xff\ud800"
    assert escape("a\n\n# b") == "a<span>&#92;</span>n<span>&#92;</span>n&#35; b"
    assert escape("it's -1.5 or +0.41") == "it's -1.5 or +0.41" and escape("-1.5") == "-1.5" and escape("1.29") == "1.29"  # reports stay readable as text
    assert printable("ü 日本 👩‍🔬") == "ü 日本 👩‍🔬"
    for text in ("\udcff", "\x1b]0;title\x07"):
        printable(text).encode("utf-8")


def test_cells_are_no_formulas(tmp_path):
    for text in ("=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "-", "＝1"):
        assert csv_cell(text).startswith("'")
    for value in ("-3.5", "+1e-3", ".5", "-7", "name", "a=b", "", 1, -2.5, None, True, np.float32(0.5)):
        assert csv_cell(value) is value or csv_cell(value) == value
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerow([csv_cell(value) for value in ("\udcff.png", "a\nb", "\0", -2.5, tmp_path)])
    assert next(csv.reader(io.StringIO((tmp_path / "x.csv").read_text(encoding="utf-8")))) == [r"\xff.png", r"a\nb", r"\x00", "-2.5", str(tmp_path)]


# Writing

def test_a_planted_link_is_not_followed(tmp_path):
    """The names that the first edition used, and any other: the file is created before it is written."""
    victim, target = tmp_path / "victim", tmp_path / "out.txt"
    victim.write_text("keep me")
    (tmp_path / f".out.txt.{os.getpid()}.tmp").symlink_to(victim)
    seen = []
    write_then_rename(target, lambda path: (seen.append((path, path.is_file(), path.is_symlink())), path.write_text("new")))
    assert victim.read_text() == "keep me" and target.read_text() == "new"
    temporary, there, link = seen[0]
    assert there and not link and temporary.parent == tmp_path and str(os.getpid()) not in temporary.name.split(".") and not temporary.exists()
    target.unlink()
    target.symlink_to(victim)  # a link at the target itself is replaced, not followed
    write_then_rename(target, lambda path: path.write_text("new"))
    assert victim.read_text() == "keep me" and not target.is_symlink()


def test_a_temporary_name_that_exists_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.secrets, "token_hex", lambda count: "guessed")
    victim = tmp_path / "victim"
    (tmp_path / ".guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_then_rename(tmp_path / "out.txt", lambda path: path.write_text("new"))
    assert not victim.exists() and (tmp_path / ".guessed.tmp").is_symlink()


def test_writing_keeps_long_names_modes_and_the_old_file(tmp_path):
    long = tmp_path / ("x" * 251 + ".txt")
    usual = os.umask(0o027)
    try:
        write_then_rename(long, lambda path: path.write_text("whole"))
    finally:
        os.umask(usual)
    assert long.read_text() == "whole" and stat.S_IMODE(long.stat().st_mode) == 0o640
    with pytest.raises(ZeroDivisionError):
        write_then_rename(long, lambda path: path.write_text("half") / (1 / 0))
    assert long.read_text() == "whole" and os.listdir(tmp_path) == [long.name]


def test_the_sweep_leaves_alone_what_it_did_not_make(tmp_path):
    for name in (".building,x", ".building,a,b,c,d,e", f".building,{os.uname().nodename},999999999999999999999,ab"):
        (tmp_path / name).mkdir()
    with writing.new_folder(tmp_path / "target") as private:
        (private / "a").write_text("x")
    assert (tmp_path / "target" / "a").is_file() and len(os.listdir(tmp_path)) == 4


# Nobody goes round the gate

READERS = {"Image.open", "json.load", "json.loads", "yaml.load", "torch.load", "np.load", "pickle.load", "pickle.loads"}
DECODERS = {"imread", "imdecode", "dcmread", "safe_load", "read_csv", "read_excel", "Unpickler", "TiffFile"}  # whatever they are called on
ALLOWED = {
    ("data/sources", "json.loads"): "what a process of our own answers",
    ("data/sets", "json.loads"): "a list of files, of 1 MB at most, whose every fault is caught",
    ("study/report", "json.loads"): "a table of pandas, in memory",
    ("network/state", "torch.load"): "tensors alone: weights_only=True",
    ("training/state", "torch.load"): "tensors alone: weights_only=True",
    ("data/cache", "np.load"): "what this package wrote; no pickles",
    ("view/album", "np.load"): "numbers alone, after their size was judged",
}
MODULES = sorted(path.relative_to(ROOT / "qtseg").with_suffix("").as_posix() for path in (ROOT / "qtseg").rglob("*.py") if not path.name.startswith("_"))


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """All calls in some code, by their dotted names."""
    source = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M)  # commands of a notebook
    return [(ast.unparse(node.func), node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def readers(source: str) -> list[tuple[str, ast.Call]]:
    """The calls that read a stranger's file; `json.loads(json.dumps(…))` reads none."""
    found = [(name, call) for name, call in calls(source) if name in READERS or name.rpartition(".")[2] in DECODERS]
    return [(name, call) for name, call in found if name != "json.loads" or not ast.unparse(call.args[0]).startswith("json.dumps(")]


def test_the_search_for_readers_finds_them():
    """The gate itself reads; every exception still has its reason, and every room is searched."""
    found = {(path, name) for path in MODULES for name, _ in readers((ROOT / f"qtseg/{path}.py").read_text(encoding="utf-8"))}
    assert found == {("files/pictures", "cv2.imdecode"), ("files/pictures", "tifffile.TiffFile"), ("files/dicom", "dcmread"), ("files/text", "json.loads"), *ALLOWED}
    assert {path.partition("/")[0] for path in MODULES if "/" in path} == {path.parent.name for path in (ROOT / "qtseg").glob("*/__init__.py")}


def test_the_security_page_names_modules_and_limits_that_exist():
    """And every limit that a variable raises, with its default."""
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`qtseg/([\w/]+)\.py`", page)
    assert {"files/headers", "files/pictures", "files/text"} <= set(named) <= set(MODULES)
    listed = dict(re.findall(r"^\| `QTSEG_(MAX_\w+)` \| ([^|(]+)", page, re.M))
    digits = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    for name, value in vars(limits).items():
        if name.startswith("MAX_") and name != "MAX_ROW":  # which no variable raises
            stated = listed.pop(name).strip().replace(",", "").translate(digits)
            assert value == int(stated) or (stated[0] == "2" and value == 2 ** int(stated[1:])), name
    assert set(listed) == {"MAX_DOWNLOAD"}  # of data.download


@pytest.mark.parametrize("path", MODULES)
def test_files_are_read_by_the_gate_alone(path):
    for name, call in readers((ROOT / f"qtseg/{path}.py").read_text(encoding="utf-8")):
        assert path.startswith("files/") or (path, name) in ALLOWED, f"{path}: {ast.unparse(call)}"
        assert name != "torch.load" or "weights_only=True" in ast.unparse(call)
        assert "allow_pickle=True" not in ast.unparse(call)


@pytest.mark.parametrize("path", sorted(set((ROOT / "nbs/experiments").glob("*.ipynb")) - {ROOT / "nbs/experiments/benchmark.ipynb"}),
                         ids=lambda path: path.stem)  # the benchmark shows its own numbers only
def test_notebooks_show_names_of_strangers_as_text(path):
    """What stands in an f-string inside Markdown(…) or HTML(…) is a formatted number, a known word, or went through `escape`."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        for name, call in calls("".join(cell["source"])):
            values = [part for part in ast.walk(call) if isinstance(part, ast.FormattedValue)] if name in ("Markdown", "HTML") else []
            for value in values:
                shown = ast.unparse(value.value)
                assert value.format_spec or shown.startswith("escape(") or re.match(r"(size|row\['(height|width)'\])", shown), shown


# Every channel

def test_every_channel_of_a_file_is_read_or_the_file_refused(tmp_path):
    """PNG with alpha, TIFF pages and TIFF samples, 8 and 16 bits; another number of channels is one sentence."""
    tifffile = pytest.importorskip("tifffile", reason="TIFF files of many samples")
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30, 6), dtype=np.uint16)
    flat = (deep // 256).astype(np.uint8)
    save(tmp_path / "rgba.png", flat[..., :4])
    assert cv2.imwrite(str(tmp_path / "rgba16.png"), deep[..., [2, 1, 0, 3]])
    save(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(flat[..., 0]), Image.fromarray(flat[..., 1])]))
    for name, values, options in (("samples", deep, {}), ("packed", flat, {"compression": "zlib"}), ("two", deep[..., :2], {})):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, planarconfig="contig", photometric="minisblack", **options)
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(deep, 2, 0), planarconfig="separate", photometric="minisblack")
    tifffile.imwrite(tmp_path / "pages.tif", np.moveaxis(deep[..., :5], 2, 0), photometric="minisblack")
    expected = {"rgba.png": flat[..., :4], "rgba16.png": deep[..., :4], "la.png": flat[..., :2], "samples.tif": deep, "packed.tif": flat,
                "two.tif": deep[..., :2], "planes.tif": deep, "pages.tif": deep[..., :5]}
    for name, values in expected.items():
        read = read_picture(tmp_path / name, channels=values.shape[2])
        assert read.frames == 1 and read.values.dtype == values.dtype and np.array_equal(read.values, values), name
        with pytest.raises(ValueError, match="asked for|cannot be read"):
            read_picture(tmp_path / name, channels=7)
    save(tmp_path / "gray.png", flat[..., 0])
    with pytest.raises(ValueError, match=r"has 1 channel\(s\), where channels=4 is asked for"):
        read_picture(tmp_path / "gray.png", channels=4)
    tifffile.imwrite(tmp_path / "float.tif", deep.astype(np.float32), planarconfig="contig", photometric="minisblack")
    with pytest.raises(ValueError, match="6 samples a pixel in a form that is not read"):
        read_picture(tmp_path / "float.tif", channels=6)


def test_a_piece_of_a_tiff_that_could_swell_is_refused(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile", reason="TIFF files of many samples")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((256, 256, 5), np.uint8), planarconfig="contig", photometric="minisblack", compression="zlib")
    assert read_picture(tmp_path / "a.tif", channels=5).values.shape == (256, 256, 5)
    monkeypatch.setenv("QTSEG_MAX_FREE_BYTES", "100000")
    with pytest.raises(ValueError, match="swell|form that is not read"):
        read_picture(tmp_path / "a.tif", channels=5)
