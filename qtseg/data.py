"""Images and masks from a folder to batches: every file checked, splits without leakage, a cache that is built once."""
from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
import uuid
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from .phantoms import write_prepared

# %% problems
class DataProblems(ValueError):
    """Everything that is wrong with a data set, in one exception: `.problems` is the whole list, one sentence per problem.

    The message shows the first 100. Nothing has been built when it is raised.
    """

    def __init__(self, source: object, problems: Iterable[str]):
        self.problems = list(problems)
        shown = self.problems[:100]
        more = [f"  … and {len(self.problems) - len(shown)} more, in .problems"] if len(self.problems) > len(shown) else []
        super().__init__("\n".join([f"{len(self.problems)} problem(s) in {source}:", *(f"  {line}" for line in shown), *more]))

# %% decode
def _decode(data: bytes) -> Image.Image:
    """Decode a whole image file and turn it upright (EXIF); ValueError with the reason if it cannot be read to its end."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ValueError(f"cannot be read to its end ({error or type(error).__name__})") from error

# %% wide
def _wide(picture: Image.Image) -> np.ndarray | None:
    """The values [H, W] of a 16-bit picture, or None for any other; ValueError for pixels of unknown range (float, 32 bits)."""
    if picture.mode == "F":
        raise ValueError("holds floating-point pixels, whose range nobody knows: save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return None
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"holds values from {values.min()} to {values.max()}, outside 16 bits: save it with 8 or 16 bits")
    return values

# %% image
def _image_from(data: bytes) -> np.ndarray:
    """The bytes of an image file -> uint8 RGB [H, W, 3]."""
    picture = _decode(data)
    values = _wide(picture)
    if values is not None:  # the full range 0..65535 becomes 0..255, because 65535 = 257 * 255
        return np.repeat(((values + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)  # [H, W] -> [H, W, 3]
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # keeps the colours of transparent palette entries
    return np.array(picture.convert("RGB"))  # alpha is dropped, not blended

# %% read_image
def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read any image file -> uint8 RGB [H, W, 3], upright.

    1-bit, grey, RGB, palette, CMYK; alpha is dropped; 16-bit grey is divided by 257 (of 16-bit colour Pillow keeps the high
    byte). The first frame of several. Raises ValueError, naming the file, if it is damaged or holds float or 32-bit pixels.
    """
    try:
        return _image_from(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

# %% mask values
def _values(data: bytes, colours: bool) -> np.ndarray:
    """The bytes of a mask file -> stored values [H, W]; `colours`: the brightest channel counts, and palettes are looked up."""
    picture = _decode(data)
    wide = _wide(picture)
    if wide is not None:
        return wide
    if picture.mode in ("1", "L", "LA", "La") or (picture.mode == "P" and not colours):
        return np.asarray(picture.getchannel(0)).astype(np.uint8)  # a palette's index, a bit, a grey value; alpha dropped
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    values = np.asarray(picture.convert("RGB"))  # [H, W, 3]
    if not colours and (values != values[:, :, :1]).any():
        raise ValueError('is a coloured mask, which holds no class index: save the index as a grey PNG, or pass masks="binary"')
    return values.max(axis=2)

# %% index
MASKS = ("auto", "index", "binary", "any")


def _check_index(values: np.ndarray, classes: int) -> None:
    """Raise ValueError, naming the index found and the remedy, if a value is no class index."""
    largest = max(classes, 2) - 1
    if values.max() <= largest:
        return
    found = np.unique(values)
    strays = ", ".join(str(value) for value in found[found > largest][:4]) + (", …" if (found > largest).sum() > 4 else "")
    remedy = 'pass masks="binary" if this is black background and white foreground'
    if found.max() < 32:
        remedy = f'pass classes={found.max() + 1} or, if every index but 0 is foreground, masks="any"'
    raise ValueError(f"holds class index {strays}, but classes={classes} allows 0 to {largest}: {remedy}")

# %% binary
def _check_binary(values: np.ndarray) -> None:
    """Raise ValueError for a mask in which half of the maximum would cut through class indices or through JPEG noise."""
    if 1 < values.max() < 32 and len(found := np.unique(values)) > 2:
        shown = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
        raise ValueError(f'is no binary mask: it holds the values {shown}; if these are class indices, pass masks="any" or '
                         f'masks="index" with classes={found.max() + 1}; if it is the noise of an empty JPEG, save it as PNG')

# %% mask
def _mask_from(data: bytes, masks: str, classes: int) -> np.ndarray:
    """The bytes of a mask file -> class index, uint8 [H, W]; ValueError with reason and remedy."""
    values = _values(data, colours=masks == "binary")
    if masks == "binary":
        _check_binary(values)
        return (values > values.max() // 2).astype(np.uint8)  # an all-zero file stays empty
    if data[:3] == b"\xff\xd8\xff":
        raise ValueError('is a JPEG, whose compression invents class indices: save it as PNG, or pass masks="binary"')
    if masks == "any":
        return (values > 0).astype(np.uint8)
    _check_index(values, classes)
    return values.astype(np.uint8)

# %% read_mask
def read_mask(path: str | os.PathLike, masks: str = "index", classes: int = 2) -> np.ndarray:
    """Read a mask file -> class index, uint8 [H, W], upright.

    masks: "index" (the stored value; a palette's index), "binary" (1 where the value, the brightest channel, is above half of the
    file's maximum) or "any" (1 where the stored index is not 0). Raises ValueError, naming file and remedy: damaged, index
    outside 0..max(classes, 2) - 1, coloured or JPEG where an index is expected, neither binary nor index.
    """
    if masks not in MASKS[1:]:
        raise ValueError(f"masks must be one of {MASKS[1:]}, got {masks!r}")
    try:
        return _mask_from(Path(path).read_bytes(), masks, classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

# %% resample
def _resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area average along each axis that shrinks, linear along each that grows: uint8 [h, w, 3] -> [height, width, 3].

    OpenCV's INTER_AREA alone falls back to linear for *both* axes as soon as one of them grows.
    """
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)

# %% resize_pair
RESIZES = ("squash", "pad")


def resize_pair(image: np.ndarray, mask: np.ndarray, size: int, resize: str = "squash") -> tuple[np.ndarray, np.ndarray]:
    """Bring a pair to size x size pixels: uint8 [H, W, 3] and [H, W] -> [size, size, 3] and [size, size].

    "squash" (the paper's v1) ignores the aspect; "pad" (v2) brings the longest side to `size` and fills zeros at the bottom or
    right. Image: area average (linear where enlarged). Mask: nearest pixel centre. Raises ValueError for sizes that differ and
    for an unknown `resize`.
    """
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {RESIZES}, got {resize!r}")
    height, width = mask.shape
    if image.shape != (height, width, 3):
        raise ValueError(f"the image must be [H, W, 3] over the mask's [H, W], got {image.shape} and {mask.shape}")
    scale = size / max(height, width)
    new = (size, size) if resize == "squash" else (max(1, round(height * scale)), max(1, round(width * scale)))
    image = _resample(image, *new)
    mask = cv2.resize(mask, new[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    below, right = size - new[0], size - new[1]
    return np.pad(image, ((0, below), (0, right), (0, 0))), np.pad(mask, ((0, below), (0, right)))

# %% colour
COLOURS = {"rgb": (0, 0, 0), "ycrcb": (0, 128, 128)}  # colour space -> its black, which padding has


def _to_colour(image: np.ndarray, colour: str) -> np.ndarray:
    """RGB [H, W, 3] -> the stored colour space."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb) if colour == "ycrcb" else image

# %% record
@dataclass
class Record:
    """One pair as the folder describes it. `size`: (height, width) if a manifest states it; `split`: train, valid, test or ""."""

    id: str
    image: Path
    mask: Path | None
    group: str = ""
    fold: int | None = None
    split: str = ""
    size: tuple[int, int] | None = None

# %% survey
@dataclass
class Survey:
    """What a folder holds, before any picture is decoded; problems are collected, not raised."""

    folder: Path
    name: str
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    prepared: bool = False

    def short(self, path: Path) -> str:
        """A path as the user knows it: relative to the folder."""
        return path.relative_to(self.folder).as_posix()

# %% listing
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
SUFFIX = re.compile(r"(_segmentation|_mask)$", re.IGNORECASE)


def _pictures(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; hidden files and other kinds are passed over."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))

# %% pairing
def _pair(survey: Survey, images: Path, masks: Path, split: str) -> None:
    """Match the images of one folder with the masks of another by name, and add records and problems to the survey."""
    by_name: dict[str, list[Path]] = {}
    for path in _pictures(masks):
        by_name.setdefault(path.stem, []).append(path)
    plain = {SUFFIX.sub("", stem): stem for stem in reversed(sorted(by_name))}  # "a" before "a_mask", if there are both
    unused = set(by_name)
    for path in _pictures(images):
        stem = path.stem if path.stem in by_name else plain.get(path.stem)
        found = by_name.get(stem, [])
        unused.discard(stem)
        if not found:
            survey.problems.append(f"{survey.short(path)}: no mask in {survey.short(masks)}/ "
                                   "(of the same name, perhaps with _segmentation or _mask)")
        elif len(found) > 1:
            survey.problems.append(f"{survey.short(path)}: several masks, {', '.join(survey.short(mask) for mask in found)}")
        survey.records.append(Record(path.stem, path, found[0] if found else None, split=split))
    for mask in (path for stem in sorted(unused) for path in by_name[stem]):
        survey.problems.append(f"{survey.short(mask)}: mask without an image in {survey.short(images)}/")

# %% layout
PAIRS = (("inputs", "targets"), ("images", "masks"), ("image", "mask"), ("images", "labels"), ("imgs", "masks"))
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test",
                 "testing": "test"}


def _pair_in(folder: Path) -> tuple[Path, Path] | None:
    """The images' and the masks' folder inside a folder, or None."""
    by_name = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return next(((by_name[i], by_name[m]) for i, m in PAIRS if i in by_name and m in by_name), None)


def _layout(folder: Path) -> list[tuple[str, Path, tuple[Path, Path] | None]]:
    """Where the pairs are, as (split, folder, pair): one entry, without a split, or one per part of the official layout."""
    if pair := _pair_in(folder):
        return [("", folder, pair)]
    inside = [(SPLIT_FOLDERS.get(path.name.lower()), path) for path in sorted(folder.iterdir()) if path.is_dir()]
    parts = [(split, path, _pair_in(path)) for split, path in inside if split]
    return parts if any(pair for _, _, pair in parts) else []

# %% manifest value
COLUMNS = ("id", "image", "mask", "group", "fold", "split", "width", "height")
SPLITS = ("train", "valid", "test")


def _whole(row: dict[str, str], column: str, problems: list[str]) -> int | None:
    """A cell as a whole number >= 0, None where it is empty; anything else becomes a problem."""
    text = (row.get(column) or "").strip()
    if text and not re.fullmatch(r"\d+", text):
        problems.append(f"{column} must be a whole number, got {text!r}")
    return int(text) if re.fullmatch(r"\d+", text) else None


def _inside(folder: Path, row: dict[str, str], column: str, problems: list[str]) -> Path | None:
    """A cell as an existing file inside the folder; anything else becomes a problem and None."""
    text = (row.get(column) or "").strip()
    path = folder / text
    if not text or Path(text).is_absolute() or ".." in Path(text).parts:
        problems.append(f"{column} must be a path relative to the manifest's folder, got {text!r}")
    elif not path.is_file():
        problems.append(f"{column} {text} does not exist")
    else:
        return path
    return None

# %% manifest row
def _record(folder: Path, row: dict[str, str]) -> tuple[Record | None, list[str]]:
    """One row of a manifest -> record (None if there is no image to look at) and what is wrong with the row."""
    problems: list[str] = []
    name, split = (row.get("id") or "").strip(), (row.get("split") or "").strip()
    image, mask = _inside(folder, row, "image", problems), _inside(folder, row, "mask", problems)
    fold, width, height = (_whole(row, column, problems) for column in ("fold", "width", "height"))
    if not name:
        problems.append("id is empty")
    if split and split not in SPLITS:
        problems.append(f"split must be one of {', '.join(SPLITS)} or empty, got {split!r}")
    if split == "test" and fold is not None:
        problems.append("a test image cannot be in a fold")
    if row.get(None):
        problems.append("has more cells than there are columns")
    size = (height, width) if height and width else None
    return (Record(name, image, mask, (row.get("group") or "").strip(), fold, split, size) if image else None), problems

# %% manifest
def _read_manifest(survey: Survey) -> None:
    """Fill the survey from manifest.csv."""
    try:
        text = (survey.folder / "manifest.csv").read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        survey.problems.append(f"manifest.csv is not a CSV file in UTF-8 ({error})")
        return
    missing = [column for column in ("id", "image", "mask") if column not in columns]
    unknown = [repr(column) for column in columns if column not in COLUMNS]
    if missing:
        survey.problems.append(f"manifest.csv lacks the column(s) {', '.join(missing)}; it may have {', '.join(COLUMNS)}")
    if unknown:
        survey.problems.append(f"manifest.csv has the unknown column(s) {', '.join(unknown)}; it may have {', '.join(COLUMNS)}")
    for row in rows if not missing else ():
        record, problems = _record(survey.folder, row)
        survey.problems += [f"manifest.csv, row of id {(row.get('id') or '')!r}: {problem}" for problem in problems]
        survey.records += [record] if record else []

# %% dataset.json
def _read_description(survey: Survey) -> None:
    """Take name and class names from dataset.json, if there is one."""
    path = survey.folder / "dataset.json"
    if not path.is_file():
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        names = entries.get("classes", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("classes must be a list of names")
        survey.name, survey.class_names = str(entries.get("name", survey.name)), tuple(names)
    except (ValueError, AttributeError) as error:
        survey.problems.append(f"dataset.json cannot be understood ({error})")

# %% look
def _look(folder: Path, name: str) -> Survey | None:
    """Survey a folder of one of the known layouts; None for any other."""
    survey = Survey(folder, name, prepared=(folder / "manifest.csv").is_file())
    if survey.prepared:
        _read_description(survey)
        _read_manifest(survey)
        return survey
    if (folder / "dataset.json").is_file():
        raise ValueError(f"{folder} has a dataset.json but no manifest.csv: its preparation did not finish, run it again")
    layout = _layout(folder)
    for split, part, pair in layout:
        if pair:
            _pair(survey, *pair, split)
        else:
            survey.notes.append(f"{part.name}/ was left out: it does not hold images and masks side by side")
    return survey if layout else None

# %% survey_folder
def survey_folder(folder: Path, name: str | None = None) -> Survey:
    """Find the pairs of a folder, or of the single folder inside it, and what is wrong with their names.

    Raises FileNotFoundError without a folder, ValueError if it is empty or laid out in no known way.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: give a folder, a .zip, or phantoms[:family[:n]]")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    survey = _look(folder, name or folder.name)
    if survey is None and len(inside) == 1 and inside[0].is_dir():
        survey = _look(inside[0], inside[0].name)
    if survey is None:
        found = ", ".join(path.name for path in inside[:8]) or "nothing"
        raise ValueError(f"{folder} holds {found}; expected manifest.csv with images/ and masks/, train/inputs with "
                         "train/targets, or images/ with masks/")
    if not survey.records and not survey.problems:
        raise ValueError(f"{survey.folder} is empty: no images ({', '.join(EXTENSIONS)}) in it")
    survey.records.sort(key=lambda record: (record.id, record.image))
    return survey

# %% duplicates
def _duplicates(survey: Survey) -> list[str]:
    """Ids that occur more than once: in one part, or worse, in two."""
    by_id: dict[str, list[Record]] = {}
    for record in survey.records:
        by_id.setdefault(record.id, []).append(record)
    problems = []
    for name, records in by_id.items():
        if len(records) > 1:
            two = len({record.split for record in records}) > 1
            files = ", ".join(survey.short(record.image) for record in records)
            problems.append(f"id {name!r} is in two splits: {files}" if two else f"duplicate id {name!r}: {files}")
    return problems

# %% slices
def _slices(records: list[Record], folds: int) -> list[int | None]:
    """Deterministic folds: equal slices by name within each group; None (always train) for what is left over at the end."""
    fold_of: list[int | None] = [None] * len(records)
    for group in sorted({record.group for record in records}):
        members = [i for i, record in enumerate(records) if record.group == group and record.split != "test"]
        slice_size = len(members) // folds
        for position, i in enumerate(members[:slice_size * folds]):
            fold_of[i] = position // slice_size
    return fold_of

# %% folds
def _fold_of(survey: Survey, fold: int | None, folds: int | None, notes: list[str]) -> list[int | None]:
    """Each record's fold: the manifest's own, else `folds` slices, else None throughout; ValueError for impossible wishes."""
    own = sorted({record.fold for record in survey.records if record.fold is not None})
    if own and folds is not None and folds != len(own):
        raise ValueError(f"the manifest of {survey.folder} has {len(own)} folds of its own: leave folds={folds} out")
    if own or folds is None:
        return [record.fold for record in survey.records]
    pool = sum(record.split != "test" for record in survey.records)
    if pool < folds:
        raise ValueError(f"{pool} images cannot make folds={folds}: choose at most {pool}")
    fold_of = _slices(survey.records, folds)
    sizes, left = Counter(value for value in fold_of if value is not None), pool - sum(value is not None for value in fold_of)
    if not sizes:
        raise ValueError(f"every group has fewer images than folds={folds}: choose fewer folds")
    grouped = ", within each group" if any(record.group for record in survey.records) else ""
    notes.append(f"folds: {folds} equal slices of {sizes[0]} images, sorted by name{grouped}"
                 + (f"; the last {left} always train" if left else ""))
    if any(record.split == "valid" for record in survey.records):
        notes.append("folds: the folder's own validation images were put back among the others before slicing")
    return fold_of

# %% hold out
def _hold_out(rows: list[int], share: float, seed: int, notes: list[str]) -> list[int]:
    """The rows that validate where nobody said which: a seeded share of the training rows."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise ValueError(f"{len(rows)} training image(s) and valid_share={share}: nothing would be left to train with")
    notes.append(f"no validation split: {100 * share:g} % of train, seed {seed}, held out ({count} of {len(rows)} images)")
    return sorted(rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count])

# %% assign
def assign_splits(survey: Survey, fold: int | None, folds: int | None, valid_share: float,
                  seed: int) -> tuple[dict[str, list[int]], list[str]]:
    """Decide which record trains, validates, tests: ({"train": rows, "valid": rows, "test": rows}, notes).

    With folds: the chosen one validates, the others train; records without a fold test if their split says so, else always train.
    Without: the split column or folder; no "valid" there -> `valid_share` of train is held out. ValueError if that is impossible.
    """
    notes = list(survey.notes)
    fold_of = _fold_of(survey, fold, folds, notes)
    known = sorted({value for value in fold_of if value is not None})
    if not known and fold not in (None, 0):
        raise ValueError(f"fold={fold}, but {survey.folder} has no folds: pass folds=N to make N of them")
    if known and fold is None:
        notes.append(f"fold not chosen: fold {known[0]} validates")
    chosen = known[0] if known and fold is None else fold
    if known and chosen not in known:
        raise ValueError(f"fold={fold} is out of range: the folds are {', '.join(map(str, known))}")
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, (record, value) in enumerate(zip(survey.records, fold_of)):
        by_fold = "valid" if value == chosen else "test" if value is None and record.split == "test" else "train"
        parts[by_fold if known else record.split or "train"].append(row)
    if not parts["train"]:
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in parts.items())
        raise ValueError(f"{survey.folder} has no training images: {counts}")
    if not parts["valid"]:
        parts["valid"] = _hold_out(parts["train"], valid_share, seed, notes)
        parts["train"] = sorted(set(parts["train"]) - set(parts["valid"]))
    if not parts["test"]:
        notes.append("no test part")
    return parts, notes

# %% bits
def mask_bits(classes: int) -> int:
    """How many bits a cached mask pixel takes: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if max(classes, 2) <= 2 ** bits)


def pack_mask(mask: np.ndarray, bits: int) -> np.ndarray:
    """Put 8 // bits mask pixels into each byte, the first one lowest: uint8 [H, W] -> [ceil(H * W * bits / 8)]."""
    per_byte = 8 // bits
    flat = np.pad(mask.reshape(-1), (0, -mask.size % per_byte)).reshape(-1, per_byte)  # [bytes, pixels in a byte]
    return np.bitwise_or.reduce(flat << (bits * np.arange(per_byte, dtype=np.uint8)), axis=1)

# %% unpack
def _unpacking_table(bits: int) -> np.ndarray:
    """For each of the 256 bytes its 8 // bits pixels, side by side in one integer: [256]."""
    per_byte = 8 // bits
    pixels = np.arange(256)[:, None] >> (bits * np.arange(per_byte)) & (2 ** bits - 1)  # [256, pixels in a byte]
    return np.ascontiguousarray(pixels, dtype=np.uint8).view(f"u{per_byte}")[:, 0]


UNPACKING_TABLES = {bits: _unpacking_table(bits) for bits in (1, 2, 4, 8)}


def unpack_masks(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Undo pack_mask for a batch, one table look-up per byte: uint8 [B, bytes] -> [B, size, size]."""
    pixels = UNPACKING_TABLES[bits].take(packed).view(np.uint8)  # [B, bytes * pixels in a byte]
    return pixels[:, :size * size].reshape(-1, size, size)

# %% settings
CACHE_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What decides the cached bytes, besides the files; `masks` is settled ("auto" replaced) before anything is cached."""

    size: int
    resize: str
    colour: str
    masks: str
    classes: int


def cache_key(survey: Survey, settings: Settings) -> str:
    """Name what goes in: relative names, sizes and times of all files, and the settings -> 32 hexadecimal digits.

    A file rewritten with the same size and the same time of change goes unnoticed.
    """
    def state(path: Path) -> tuple[str, int, int]:
        return survey.short(path), path.stat().st_size, path.stat().st_mtime_ns

    files = [(record.id, state(record.image), record.mask and state(record.mask)) for record in survey.records]
    text = json.dumps([CACHE_VERSION, asdict(settings), files])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

# %% cache root
def cache_root(cache: str | os.PathLike | None = None) -> Path:
    """Where caches go: the argument, else the environment variable QTSEG_CACHE, else ~/.cache/qtseg."""
    return Path(cache or os.environ.get("QTSEG_CACHE") or "~/.cache/qtseg").expanduser().absolute()

# %% sweep
def _alive(process: int) -> bool:
    """Whether a process of this machine still runs; where that cannot be asked harmlessly (Windows), assume so."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    return True


def _sweep(folder: Path) -> None:
    """Remove the half-built folders of builders that died: here if the process is gone, elsewhere after a week."""
    for path in folder.glob(".building,*"):
        _, host, process, _ = path.name.split(",")
        try:
            old = time.time() - path.stat().st_mtime > 7 * 86400
        except FileNotFoundError:
            continue  # its builder has just finished
        if old or (host == socket.gethostname() and not _alive(int(process))):
            shutil.rmtree(path, ignore_errors=True)

# %% atomic folder
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a private folder; at the end it becomes `target` by one rename, or vanishes if anything was raised.

    Whoever renames second finds the target there and uses it: both builders made the same bytes.
    """
    private = target.parent / f".building,{socket.gethostname()},{os.getpid()},{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        private.mkdir()
        yield private
        try:
            private.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise _no_space(target.parent) from error
        raise
    finally:
        shutil.rmtree(private, ignore_errors=True)

# %% space
def _no_space(folder: Path, needed: int | None = None) -> OSError:
    """The one sentence about a full disk."""
    what = "the disk or your share of it is full"
    if needed:
        what = f"{needed / 1e6:.0f} MB are needed, {shutil.disk_usage(folder).free / 1e6:.0f} MB are free"
    return OSError(errno.ENOSPC, f"no space left in {folder} ({what}); nothing was left half-written: "
                                 "free some, or name another place with cache=… or QTSEG_CACHE")


def _require_space(folder: Path, needed: int) -> None:
    """Raise OSError before the work starts if it cannot end well."""
    if shutil.disk_usage(folder).free < needed:
        raise _no_space(folder, needed)

# %% zip check
def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise ValueError for an archive that reaches outside its folder, holds links or passwords, or swells absurdly."""
    for member in members:
        name = member.filename.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise ValueError(f"{path} is refused: {member.filename!r} would be written outside the folder")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{path} is refused: {member.filename!r} is a link or a device, not a file")
        if member.flag_bits & 1:
            raise ValueError(f"{path} is refused: {member.filename!r} is encrypted")
    total, packed = sum(member.file_size for member in members), path.stat().st_size
    if total > 256e6 and total > 100 * packed:
        raise ValueError(f"{path} is refused: {packed / 1e6:.1f} MB would swell to {total / 1e6:.0f} MB")

# %% unzip
def _unzip(path: Path, root: Path) -> Path:
    """Extract pictures, manifest and description of a .zip into the cache, once; returns the folder."""
    state = path.stat()
    key = hashlib.blake2b(f"{path.absolute()}|{state.st_size}|{state.st_mtime_ns}".encode(), digest_size=8).hexdigest()
    target = root / "unzipped" / f"{path.stem}-{key}"
    if target.is_dir():
        return target
    try:
        with zipfile.ZipFile(path) as archive, _new_folder(target) as private:
            _check_members(path, archive.infolist())
            wanted = [member for member in archive.infolist() if not member.filename.startswith("__MACOSX")
                      and member.filename.lower().endswith((*EXTENSIONS, "manifest.csv", "dataset.json"))]
            _require_space(private, sum(member.file_size for member in wanted))
            for member in wanted:
                archive.extract(member, private)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is no complete .zip ({error}): download it again") from error
    return target

# %% source
def find_source(source: str | os.PathLike, root: Path, size: int) -> tuple[Path, str]:
    """Turn a source into a folder on disk and a name: a folder as it is, a .zip extracted, phantoms written.

    Raises FileNotFoundError, or ValueError for a file that is no .zip and for phantoms that do not exist.
    """
    kind, *wishes = source.split(":") if isinstance(source, str) else [""]
    if kind == "phantoms" and len(wishes) <= 2:
        family, number = (wishes + ["all", "200"][len(wishes):])
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"phantoms[:family[:n]]: n must be a number of images, got {number!r}")
        folder = root / "phantoms" / f"{family}-{number}-{size}"
        return Path(write_prepared(folder, family=family, n=int(number), size=size, seed=0)), source
    path = Path(source).expanduser().absolute()
    if not path.is_file():
        return path, path.name
    if path.suffix.lower() != ".zip":
        raise ValueError(f"{path} is a file, but no .zip: give a folder, a .zip, or phantoms[:family[:n]]")
    return _unzip(path, root), path.stem

# %% prepare one
class Prepared(NamedTuple):
    """One pair, ready to be written, and what is wrong with it."""

    image: np.ndarray | None  # [size, size, 3]
    mask: np.ndarray | None  # [bytes], packed
    entry: dict  # {"hash", "height", "width"} for index.json
    problems: list[str]


def _attempt(what: str, problems: list[str], function: Callable, *arguments) -> np.ndarray | None:
    """Call a reader; its complaint becomes a problem that names the file."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        problems.append(f"{what}: {error}")
        return None

# %% prepare
def _prepare(survey: Survey, settings: Settings, record: Record) -> Prepared:
    """Read, check and resize one pair; runs in several threads at once (decoding and resizing release Python's lock)."""
    problems: list[str] = []
    data = _attempt(survey.short(record.image), problems, record.image.read_bytes)
    image = None if data is None else _attempt(survey.short(record.image), problems, _image_from, data)
    mask = record.mask and _attempt(survey.short(record.mask), problems,
                                    lambda: _mask_from(record.mask.read_bytes(), settings.masks, settings.classes))
    if image is None:
        return Prepared(None, None, {}, problems)
    height, width = image.shape[:2]
    entry = {"hash": hashlib.blake2b(data, digest_size=12).hexdigest(), "height": height, "width": width}
    if mask is not None and mask.shape != (height, width):
        turned = "; one of the two carries an EXIF rotation that the other lacks?" if mask.shape == (width, height) else ""
        problems.append(f"{survey.short(record.image)} is {width}x{height} pixels, but {survey.short(record.mask)} is "
                        f"{mask.shape[1]}x{mask.shape[0]}{turned}")
    if record.size and set(record.size) != {height, width}:
        problems.append(f"{survey.short(record.image)} is {width}x{height} pixels, but manifest.csv says "
                        f"{record.size[1]}x{record.size[0]}")
    if problems or mask is None:
        return Prepared(None, None, entry, problems)
    image, mask = resize_pair(image, mask, settings.size, settings.resize)
    return Prepared(_to_colour(image, settings.colour), pack_mask(mask, mask_bits(settings.classes)), entry, [])

# %% in order
def _in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Like pool.map, but never more than `ahead` results wait in memory."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

# %% arrays
def _start_array(path: Path, shape: Sequence[int]):
    """Open an .npy file for writing and write its header.

    Plain writes, not a memory map: on a full disk a write raises an error, while a map kills the process.
    """
    file = open(path, "wb")
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return file


def _keep_one_channel(path: Path) -> None:
    """Rewrite a grey set's [N, size, size, 3] file as [N, size, size, 1]."""
    images = np.load(path, mmap_mode="r")
    with _start_array(path.with_suffix(".grey"), (*images.shape[:3], 1)) as file:
        for image in images:
            file.write(image[:, :, :1].tobytes())
    path.with_suffix(".grey").replace(path)

# %% build
def _build(folder: Path, survey: Survey, settings: Settings, workers: int, progress: bool) -> tuple[list[dict], list[str]]:
    """Check every pair and write images.npy, masks.npy and, last, index.json; returns index entries and problems."""
    count, size, bits = len(survey.records), settings.size, mask_bits(settings.classes)
    shapes = {"images": (count, size, size, 3), "masks": (count, -(-size * size * bits // 8))}
    _require_space(folder, sum(int(np.prod(shape)) for shape in shapes.values()))
    entries, problems, grey = [], [], settings.colour == "rgb"
    with (_start_array(folder / "images.npy", shapes["images"]) as images,
          _start_array(folder / "masks.npy", shapes["masks"]) as masks,
          ThreadPoolExecutor(workers) as pool,
          tqdm(total=count, desc=f"checking and caching {survey.name} at {size}x{size}", unit="image", file=sys.stdout,
               disable=not progress) as bar):
        for done in _in_order(pool, lambda record: _prepare(survey, settings, record), survey.records, 4 * workers):
            bar.update()
            entries.append(done.entry)
            problems += done.problems
            if done.image is not None and not problems:
                images.write(done.image.tobytes())
                masks.write(done.mask.tobytes())
                grey = grey and (done.image[:, :, :1] == done.image[:, :, 1:]).all()
    if not problems and not survey.problems:
        if grey:
            _keep_one_channel(folder / "images.npy")
        (folder / "index.json").write_text(json.dumps({"settings": asdict(settings), "images": entries}))
    return entries, problems

# %% twins
def _twins(survey: Survey, entries: list[dict]) -> list[list[int]]:
    """Rows whose image files are identical, byte for byte; one list per such picture."""
    where: dict[str, list[int]] = {}
    for row, entry in enumerate(entries):
        where.setdefault(entry.get("hash", f"unreadable {row}"), []).append(row)
    return [rows for rows in where.values() if len(rows) > 1]


def _leaks(survey: Survey, entries: list[dict]) -> list[str]:
    """A problem for every picture that the folder itself puts into two splits."""
    problems = []
    for records in ([survey.records[row] for row in rows] for rows in _twins(survey, entries)):
        if len({record.split or "train" for record in records}) > 1:
            files = ", ".join(f"{survey.short(record.image)} ({record.split or 'train'})" for record in records)
            problems.append(f"one image in two splits: the files {files} are identical; keep one of them")
    return problems

# %% untwin
def _leave_out_twins(survey: Survey, entries: list[dict], parts: dict[str, list[int]], notes: list[str]) -> dict[str, list[int]]:
    """Where a fold cuts between identical files, the validating one stays, and its twins do not train."""
    valid, twins = set(parts["valid"]), _twins(survey, entries)
    leaving = {row for rows in twins if valid & set(rows) for row in rows if row in set(parts["train"])}
    if leaving:
        ids = ", ".join(survey.records[row].id for row in sorted(leaving))
        notes.append(f"left out of train, because the same file validates: {ids}")
    if others := sum(len(rows) - 1 for rows in twins if not leaving & set(rows)):
        notes.append(f"{others} image file(s) are identical to another one of the same split")
    return {**parts, "train": [row for row in parts["train"] if row not in leaving]}

# %% load
def _load(folder: Path) -> tuple[list[dict], np.ndarray, np.ndarray] | None:
    """Open a finished cache: (index entries, images [N, size, size, 1 or 3], packed masks [N, bytes]); None if it is damaged."""
    try:
        entries = json.loads((folder / "index.json").read_text())["images"]
        images, masks = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("images", "masks"))
    except (OSError, EOFError, ValueError, KeyError):
        return None
    return (entries, images, masks) if len(entries) == len(images) == len(masks) else None

# %% check and cache
def _refuse(survey: Survey, more: list[str]) -> None:
    """Raise DataProblems if there are any, those of the names first."""
    if survey.problems or more:
        raise DataProblems(survey.folder, survey.problems + more)


def _check_and_cache(survey: Survey, settings: Settings, folder: Path, workers: int,
                     progress: bool) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Everything that can be wrong in one list, or the cache: taken if it is there, else built. Raises DataProblems."""
    ready = None
    if folder.is_dir() and (ready := _load(folder)) is None:
        shutil.rmtree(folder)  # damaged
    if ready is None:
        with _new_folder(folder) as private:
            entries, found = _build(private, survey, settings, workers, progress)
            _refuse(survey, found + _leaks(survey, entries))
        ready = _load(folder)
    _refuse(survey, _leaks(survey, ready[0]))  # a manifest can change its splits without touching a picture
    return ready

# %% batch
class Batch(NamedTuple):
    """Some pairs: images uint8 [B, 3, size, size] (channels_last in memory), masks uint8 [B, size, size], their ids."""

    images: Tensor
    masks: Tensor
    ids: list[str]


def normalise(images: Tensor) -> Tensor:
    """Bring bytes to what the network expects: uint8 [B, C, H, W] -> float32 in [-1, 1], x / 127.5 - 1."""
    return images.float() / 127.5 - 1

# %% split
class Split:
    """One part of a data set, on disk: len(), ids, groups, original_sizes, paths, batch(), batches().

    ids, groups: lists of str; original_sizes: list of (height, width); paths: list of (image path, mask path); by order of id.
    """

    def __init__(self, records: list[Record], entries: list[dict], rows: Sequence[int], images: np.ndarray, masks: np.ndarray,
                 bits: int):
        self._rows, self._images, self._masks, self._bits = np.asarray(rows, dtype=np.int64), images, masks, bits
        self.ids = [records[row].id for row in rows]
        self.groups = [records[row].group for row in rows]
        self.original_sizes = [(entries[row]["height"], entries[row]["width"]) for row in rows]
        self.paths = [(records[row].image, records[row].mask) for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Iterable[int]) -> Batch:
        """Read the pairs at some positions of this split, in the order asked for: copies, on the CPU. IndexError if outside."""
        positions = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        rows = self._rows[positions]
        images = torch.from_numpy(self._images[rows]).permute(0, 3, 1, 2)  # [B, size, size, C] -> [B, C, size, size], no copy
        if images.shape[1] == 1:  # a grey set
            images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        masks = torch.from_numpy(unpack_masks(self._masks[rows], self._bits, self._images.shape[1]))
        return Batch(images, masks, [self.ids[position] for position in positions])

    def batches(self, batch: int, *, shuffle: int | None = None, drop_last: bool = False, start: int = 0,
                device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Go through the split once: Batch after Batch on `device`.

        shuffle: a seed for the order, None for the order of the ids; drop_last: leave out an incomplete batch; start: skip that
        many batches, without reading them. To a GPU the copies go through pinned memory and do not wait.
        ValueError for batch < 1 or start < 0.
        """
        if batch < 1 or start < 0:
            raise ValueError(f"batch must be at least 1 and start at least 0, got {batch} and {start}")
        order = np.arange(len(self)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(self))
        end = len(order) // batch * batch if drop_last else len(order)
        for first in range(start * batch, end, batch):
            yield _to_device(self.batch(order[first:min(first + batch, end)]), torch.device(device))

# %% to device
def _to_device(batch: Batch, device: torch.device) -> Batch:
    """Send a batch to a device; to a GPU from pinned memory, so that the CPU need not wait for the copy."""
    if device.type != "cuda":
        return Batch(batch.images.to(device), batch.masks.to(device), batch.ids)
    images, masks = (tensor.pin_memory().to(device, non_blocking=True) for tensor in batch[:2])
    return Batch(images, masks, batch.ids)

# %% check wishes
def _check_wishes(settings: Settings, fold: int | None, folds: int | None, valid_share: float, workers: int | None) -> None:
    """Raise ValueError, naming the argument, for a value that can never be right."""
    def whole(value, least):
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    for name, value, choices in (("resize", settings.resize, RESIZES), ("colour", settings.colour, tuple(COLOURS)),
                                 ("masks", settings.masks, MASKS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    for name, value, least in (("size", settings.size, 32), ("classes", settings.classes, 1), ("folds", folds, 2),
                               ("fold", fold, 0), ("workers", workers, 1)):
        optional = name in ("folds", "fold", "workers")
        if not (optional and value is None) and not whole(value, least):
            raise ValueError(f"{name} must be a whole number of at least {least}{', or None' * optional}, got {value!r}")
    if settings.classes > 256:
        raise ValueError(f"classes must be at most 256, one byte per pixel, got {settings.classes}")
    if not 0 < valid_share < 1:
        raise ValueError(f"valid_share must lie between 0 and 1, got {valid_share!r}")

# %% names of classes
def _class_names(survey: Survey, settings: Settings, notes: list[str]) -> tuple[str, ...]:
    """One name per class: those of dataset.json if they fit, else made-up ones."""
    count = max(settings.classes, 2)
    if len(survey.class_names) == count and (settings.masks != "any" or count == 2):
        return survey.class_names
    if survey.class_names:
        names = ", ".join(survey.class_names)
        notes.append(f"{len(survey.class_names)} classes ({names}) are read as {count}, with masks={settings.masks!r}")
    return ("background", "foreground") if count == 2 else ("background", *(f"class {index}" for index in range(1, count)))

# %% plan
def _settle_masks(settings: Settings, survey: Survey) -> Settings:
    """Replace masks="auto" by what it means for this folder."""
    by_layout = "index" if survey.prepared or settings.classes > 2 else "binary"
    return replace(settings, masks=by_layout if settings.masks == "auto" else settings.masks)


def _plan(survey: Survey, fold: int | None, folds: int | None, valid_share: float,
          seed: int) -> tuple[dict[str, list[int]], list[str]]:
    """assign_splits; where problems with the names may be why it fails, its complaint joins their list."""
    survey.problems += _duplicates(survey)
    try:
        return assign_splits(survey, fold, folds, valid_share, seed)
    except ValueError as error:
        if not survey.problems:
            raise
        survey.problems.append(str(error))
        return {}, []

# %% OpenedData
@dataclass(repr=False)
class OpenedData:
    """What a checked and cached data set holds: train, valid and (or None) test, and how they were made.

    black: three ints, the value of padding in the stored colour space; notes: sentences on what was decided for you;
    folder: where the pictures are; cache_folder: where the arrays are.
    """

    name: str
    classes: int
    class_names: tuple[str, ...]
    size: int
    resize: str
    colour: str
    black: tuple[int, int, int]
    notes: list[str]
    folder: Path
    cache_folder: Path
    train: Split
    valid: Split
    test: Split | None

    def __repr__(self) -> str:
        parts = f"train {len(self.train)}, valid {len(self.valid)}, test {len(self.test) if self.test else 'none'}"
        return (f"SegmentationData({self.name}: {parts}; {self.classes} classes, {self.size}x{self.size}, {self.resize}, "
                f"{self.colour})")

# %% SegmentationData
class SegmentationData(OpenedData):
    """A data set, opened with `open` or `from_prepared`; its attributes are those of OpenedData."""

    @classmethod
    def open(cls, source: str | os.PathLike, *, classes: int = 2, size: int = 512, fold: int | None = None,
             folds: int | None = None, resize: str = "squash", colour: str = "rgb", masks: str = "auto", valid_share: float = 0.1,
             seed: int = 1996, cache: str | os.PathLike | None = None, workers: int | None = None,
             progress: bool = True) -> SegmentationData:
        """Find, check, split and cache a data set.

        source: a prepared folder, the official layout, images/ and masks/, a .zip of one of these, or "phantoms[:family[:n]]".
        size: side of the cached squares, in pixels (>= 32); masks: as in read_mask, "auto" is "index" for prepared folders and
        for classes > 2, else "binary"; fold, folds, valid_share, seed: see assign_splits; workers: threads (None: one per core).
        Raises DataProblems (all of them at once), ValueError, FileNotFoundError, OSError (no space).
        """
        settings = Settings(size, resize, colour, masks, classes)
        _check_wishes(settings, fold, folds, valid_share, workers)
        root = cache_root(cache)
        survey = survey_folder(*find_source(source, root, size))
        settings = _settle_masks(settings, survey)
        parts, notes = _plan(survey, fold, folds, valid_share, seed)
        names = _class_names(survey, settings, notes)
        folder = root / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', survey.name)[:40]}-{size}-{cache_key(survey, settings)}"
        entries, images, packed = _check_and_cache(survey, settings, folder, workers or os.cpu_count() or 1, progress)
        parts = _leave_out_twins(survey, entries, parts, notes)
        train, valid, test = (Split(survey.records, entries, parts[part], images, packed, mask_bits(classes)) for part in SPLITS)
        return cls(survey.name, classes, names, size, resize, colour, COLOURS[colour], notes, survey.folder, folder,
                   train, valid, test or None)

    @classmethod
    def from_prepared(cls, folder: str | os.PathLike, fold: int | None = 0, size: int = 512, **options) -> SegmentationData:
        """Open a prepared folder (one with a manifest.csv); further options as in `open`. ValueError if it is not prepared."""
        if not (Path(folder).expanduser() / "manifest.csv").is_file():
            raise ValueError(f"{folder} is not a prepared folder: it has no manifest.csv")
        return cls.open(folder, fold=fold, size=size, **options)
