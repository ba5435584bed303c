"""Your own images and masks. python data_scripts/own.py --images A --masks B --folds 5 --patient 'patient(\\d+)'

A mask has its image's name, perhaps with _mask, _seg, _segmentation, _label or _gt after it, or mask_ before it.
Sub-folders are part of the name: A/p3/x.png and B/p3/x_mask.png. A and B may be the same folder, if the masks' names
say what they are. How the masks are read is decided from all of them together. Images of one patient share a fold;
each kind of case (--stratum) is spread over the folds.
"""
import argparse
import os
import re
from functools import partial
from pathlib import Path

from qtseg.data.layout import image_names, image_of
from qtseg.data.mask_values import MASKS, value_code
from qtseg.data.pairing import Found, judge, label, name_of, pair_up, pictures_below, slices
from qtseg.data.preparation import DataSet, command_line, run

EXAMPLES = """examples (--images A --masks B left out):
  --classes 3                                         masks hold 0, 1 and 2
  --classes 0,120,255 --class-names back,cyst,node    masks hold these values, one for each class
  --classes '#000000,#ff0000,#00ff00'                 masks hold these colors, one for each class
  --classes 3 --ignore 255                            pixels of 255 count neither in training nor in scores
  --instances                                         every number but 0 is one object, all of one class
  --patient 'p(\\d+)_' --stratum '(benign|malignant)'  the patient and the kind of case, found in the names
  --patient '^([^/]+)/'                               the patient is the sub-folder
  --folds 0                                           no folds; training holds out whole patients"""
WORDS = (  # what qtseg.masks says -> the options of this script
    (r"classes=\d+ and mask_values=\[(.*?)\]|mask_values=\[(.*?)\](?: and classes=\d+)?",
     lambda match: "--classes '" + re.sub(r'[" ]', "", match[1] or match[2]) + "'"),
    (r"mask_values", "--classes"), (r"classes=(\d+)", r"--classes \1"), (r' \(data_scripts/own.py: --instances\)', ""),
    (r'masks="any"', "--instances"), (r'masks="(\w+)"', r"--masks-are \1"), (r"ignore_value=(\d+)", r"--ignore \1"),
    (r"ignore_value", "--ignore"))


def in_options(text: str) -> str:
    """A sentence about masks, with the options of this script for the arguments of Python."""
    for pattern, option in WORDS:
        text = re.sub(pattern, option, text)
    return text


def listed(found: Found, folders: list[Path]) -> tuple[list[Path], list[Path]]:
    """The images and the masks. One folder may lie in the other, or be the same: then masks are told by their names."""
    if os.path.samefile(*folders):
        names = {path: name_of(path, folders[0]) for path in pictures_below(found, folders[0])}
        called = image_names(names.values())
        masks = [path for path, name in names.items() if image_of(name, called, other=True)]
        if names and not masks:
            raise ValueError(f"{folders[0]} is the folder of images and of masks, and no name in it is that of another file "
                             "with _mask, _seg, _label or _gt added: give the masks such names, or a folder of their own")
        return [path for path in names if path not in masks], masks
    images, masks = (pictures_below(found, folder) for folder in folders)
    real = [{path: os.path.realpath(path) for path in part} for part in (images, masks)]
    shared = set(real[0].values()) & set(real[1].values())
    if shared and shared not in (set(real[0].values()), set(real[1].values())):
        raise ValueError(f"{len(shared)} file(s) are in {folders[0]} and in {folders[1]}: keep images and masks apart")
    if shared == set(real[1].values()):
        return [path for path in images if real[0][path] not in shared], masks
    return images, [path for path in masks if real[1][path] not in shared]


def find(folders: list[Path], patient: str | None, stratum: str | None, **reading) -> Found:
    """The pairs of a folder of images and a folder of masks, and how the masks are read."""
    found, folders = Found(), [folders[0], folders[-1]]
    images, masks = listed(found, folders)
    names = image_names(name_of(image, folders[0]) for image in images)
    pair_up(found, images, masks, lambda name: image_of(name, names) or name, folders=tuple(folders))
    for column, pattern in (("patient", patient), ("stratum", stratum)):
        if pattern is not None:
            label(found, column, pattern)
    judge(found, **reading)
    found.problems, found.notes = list(map(in_options, found.problems)), list(map(in_options, found.notes))
    return found


def value(text: str) -> int | str:
    """A stored value or a color, as on the command line; ValueError for anything else."""
    found = int(text) if re.fullmatch("[0-9]{1,5}", text) else text
    value_code(found)
    return found


def describe(chosen: argparse.Namespace) -> DataSet:
    """The set that the command line asks for; ValueError, naming the argument, for wishes that cannot be met."""
    given = [text.strip() for text in chosen.classes.split(",")]
    values = tuple(map(value, given)) if len(given) > 1 else ()
    count = len(values) or int(given[0] if re.fullmatch("[0-9]{1,9}", given[0]) else 0)
    names = ["background", *(f"class {index}" for index in range(1, min(count, 256)))]
    names = chosen.class_names.split(",") if chosen.class_names else names
    if not 2 <= count <= 255 or len(names) != count or len(set(map(value_code, values))) != len(values):
        raise ValueError("--classes must be 2 to 255, background included, or as many different values, and --class-names "
                         f"as many; got {chosen.classes} and {', '.join(names[:9])}")
    if chosen.instances and (count > 2 or values or chosen.masks_are != "auto"):
        raise ValueError("--instances means two classes, background and all else: leave --classes and --masks-are out")
    if not re.fullmatch(r"[\w-][\w.-]*", chosen.name):
        raise ValueError(f"--name must be the name of one folder, got {chosen.name!r}")
    for option, pattern in (("--patient", chosen.patient), ("--stratum", chosen.stratum)):
        if pattern == "":
            raise ValueError(f"{option} is empty: leave it out, or give a regular expression")
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{option} is no regular expression: {error}") from error
    place = Path(chosen.root).expanduser().resolve() / chosen.name
    for folder in (chosen.images, chosen.masks):
        if place.is_relative_to(Path(folder).expanduser().resolve()):
            raise ValueError(f"the prepared folder {place} would lie in {folder}, whose pictures it is made from: "
                             "name another --root")
    kind = ("index" if count > 2 else "binary") if chosen.masks_are == "auto" else chosen.masks_are
    reading = {"masks": "any" if chosen.instances else kind, "classes": count, "mask_values": values,
               "ignore_value": None if chosen.ignore is None else value(chosen.ignore)}
    chosen.sources, chosen.download_only = list(dict.fromkeys([chosen.images, chosen.masks])), False
    return DataSet(
        name=chosen.name, title=f"{chosen.name}: {chosen.images}, {chosen.masks}", licence="your own",
        citation="your own", page="none", class_names=tuple(names), assign=slices, folds=5, archives="(?!)",
        find=partial(find, patient=chosen.patient, stratum=chosen.stratum, **reading),
        settings={**reading, "classes": names, "patient": chosen.patient, "stratum": chosen.stratum})


def arguments() -> argparse.ArgumentParser:
    """The arguments of this script."""
    parser = command_line("your own images and masks", download=False)
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.add_argument("--images", required=True, metavar="A", help="the folder of images")
    parser.add_argument("--masks", required=True, metavar="B", help="the folder of masks, named like the images")
    parser.add_argument("--classes", default="2", metavar="N_OR_VALUES",
                        help="number of classes, background included (2), or the masks' value or color of each")
    parser.add_argument("--class-names", metavar="NAMES", help="their names, separated by commas")
    parser.add_argument("--ignore", metavar="VALUE", help="the masks' value or color of pixels that count nowhere")
    parser.add_argument("--instances", action="store_true", help="masks number objects: all but 0 is foreground")
    parser.add_argument("--masks-are", choices=MASKS, default="auto",
                        help="index: pixels are class indices; binary: black and white; any: every index but 0 is "
                             "foreground (auto: binary for two classes, index for more)")
    parser.add_argument("--patient", metavar="REGEX", help="finds the patient in a file's name")
    parser.add_argument("--stratum", metavar="REGEX", help="finds the kind of case in a file's name")
    parser.add_argument("--name", default="own", help="of the prepared folder below --root (own)")
    return parser


if __name__ == "__main__":
    run(arguments(), describe)
