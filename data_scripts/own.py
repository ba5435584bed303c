"""Your own images and masks. python data_scripts/own.py --images A --masks B --classes 3 --folds 5 --group-by 'patient(\\d+)'

A mask has its image's name, perhaps with _mask or _segmentation. --group-by finds the patient in a file's name: all images of a
patient share a fold. The fold column of manifest.csv carries that; its group column stays empty, since it means a stratum to
report by (benign, malignant), and a patient is none.
"""
import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from qtseg.data import MASKS, SUFFIX, list_pictures, read_mask
from qtseg.preparation import DataSet, Found, command_line, grouped, pair_up, run, slices


def find(folders: list[Path]) -> Found:
    """The pairs of a folder of images and a folder of masks."""
    found, (images, masks) = Found(), map(list_pictures, folders)
    stems = {image.stem for image in images}
    pair_up(found, images, masks, lambda stem: stem if stem in stems else SUFFIX.sub("", stem))
    return found


def read(paths: Sequence[Path], shape: tuple[int, int] | None, notes: list[str], masks: str, classes: int) -> np.ndarray:
    """The one mask of an image -> class index [H, W]."""
    return read_mask(paths[0], masks, classes)


def describe(chosen: argparse.Namespace) -> DataSet:
    """The set that the command line asks for; ValueError, naming the argument, for wishes that cannot be met."""
    names = ["background", *(f"class {index}" for index in range(1, chosen.classes))]
    names = chosen.class_names.split(",") if chosen.class_names else names
    if not 2 <= chosen.classes <= 256 or len(names) != chosen.classes:
        raise ValueError("--classes must be 2 to 256, background included, and --class-names as many; got "
                         f"{chosen.classes} and {', '.join(names)}")
    if not re.fullmatch(r"[\w.-]+", chosen.name):
        raise ValueError(f"--name must be the name of one folder, got {chosen.name!r}")
    try:
        re.compile(chosen.group_by or "")
    except re.error as error:
        raise ValueError(f"--group-by is no regular expression: {error}") from error
    chosen.sources, chosen.download_only = [chosen.images, chosen.masks], False
    kind = ("index" if chosen.classes > 2 else "binary") if chosen.masks_are == "auto" else chosen.masks_are
    return DataSet(
        name=chosen.name, title=f"{chosen.name}: {chosen.images}, {chosen.masks}", licence="your own", citation="your own",
        page="none", class_names=tuple(names), find=find, read=partial(read, masks=kind, classes=chosen.classes),
        assign=partial(grouped, pattern=chosen.group_by) if chosen.group_by else slices, folds=5, archives="(?!)",
        settings={"masks": kind, "group_by": chosen.group_by, "classes": names})


def arguments() -> argparse.ArgumentParser:
    """The arguments of this script."""
    parser = command_line("your own images and masks", download=False)
    parser.add_argument("--images", required=True, help="the folder of images")
    parser.add_argument("--masks", required=True, help="the folder of masks, named like the images")
    parser.add_argument("--classes", type=int, default=2, help="number of classes, background included (2)")
    parser.add_argument("--class-names", help="their names, separated by commas")
    parser.add_argument("--masks-are", choices=MASKS, default="auto",
                        help="index: pixels are class indices; binary: black and white; any: every index but 0 is foreground "
                             "(auto: binary for two classes, index for more)")
    parser.add_argument("--group-by", metavar="REGEX", help="what finds the patient in a file's name, e.g. 'patient(\\d+)'")
    parser.add_argument("--name", default="own", help="of the prepared folder below --root (own)")
    return parser


if __name__ == "__main__":
    run(arguments(), describe)
