"""ISIC challenges 2016, 2017 and 2018 (task 1), skin lesions. python data_scripts/isic.py --year 2016 --root data

The official code chooses its best epoch on the test images, so its figures are those of the kindest of hundreds of looks at them.
Here 10 % of the training images (seeded) validate, or the challenge's own validation part where it has one; the test images are
looked at once, at the end. --official-split makes the set with which the paper's own figures are compared.
"""
import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qtseg.data.layout import list_pictures
from qtseg.data.download import fetch
from qtseg.data.pairing import Found, find_folders, held_out, one_folder, pair_up
from qtseg.data.preparation import DataSet, command_line, run

BUCKET = "https://isic-challenge-data.s3.amazonaws.com"
PAGE = "https://challenge.isic-archive.com/data/"
PARTS = {  # year -> split -> names of images and masks, as archives (with .zip) and as folders
    2016: {"train": ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
           "test": ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth")},
    2017: {"train": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
           "valid": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
           "test": ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth")},
    2018: {"train": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
           "valid": ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
           "test": ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth")}}
LICENCES = {2016: "CC0 1.0", 2017: "CC0 1.0", 2018: "CC BY-NC 4.0"}
CITATIONS = {
    2016: "Gutman D, Codella NCF, Celebi E, et al. Skin lesion analysis toward melanoma detection: a challenge at ISBI 2016, "
          "hosted by ISIC. arXiv:1605.01397.",
    2017: "Codella NCF, Gutman D, Celebi ME, et al. Skin lesion analysis toward melanoma detection: a challenge at ISBI 2017, "
          "hosted by ISIC. arXiv:1710.05006.",
    2018: "Codella N, Rotemberg V, Tschandl P, et al. Skin lesion analysis toward melanoma detection 2018. arXiv:1902.03368. "
          "Tschandl P, Rosendahl C, Kittler H. The HAM10000 dataset. Scientific Data 5, 180161 (2018)."}
OFFICIAL = ("official split: THE TEST IMAGES VALIDATE. The best epoch is chosen on them, so their score is too good; use it only "
            "to compare with the paper's figures")


def archives(year: int) -> list[str]:
    """The names of a challenge's archives. Those of 2016 are the reference's; 2017 and 2018 follow the archive's pattern."""
    return [f"{name}.zip" for names in PARTS[year].values() for name in names]


def download(folder: Path, year: int) -> list[Path]:
    """All archives of one year, each resumed and checked on its own."""
    return [fetch(f"{BUCKET}/{year}/{name}", folder / name, checksums=folder / "checksums.json", page=PAGE)
            for name in archives(year)]


def find(roots: list[Path], year: int) -> Found:
    """The pairs of each part; the validation part may be missing, and is then held out from training."""
    found = Found()
    for split, (images, masks) in PARTS[year].items():
        if split == "valid" and not find_folders(roots, images):
            found.notes.append("the challenge's validation part is not there")
            continue
        pictures, targets = one_folder(found, roots, images), one_folder(found, roots, masks)
        if pictures and targets:
            pair_up(found, [path for path in list_pictures(pictures) if not path.stem.endswith("_superpixels")],
                    list_pictures(targets), partial(re.sub, r"_segmentation$", "", flags=re.IGNORECASE), split=split)
    return found


def found_officially(roots: list[Path], year: int) -> Found:
    """The split of the official code: the test part validates; there is no test part; a validation part is not used."""
    found = find(roots, year)
    unused = sum(pair.split == "valid" for pair in found.pairs)
    found.pairs = [pair for pair in found.pairs if pair.split != "valid"]
    for pair in found.pairs:
        pair.split = "valid" if pair.split == "test" else pair.split
    found.notes += [OFFICIAL] + ([f"{unused} images of the challenge's validation part are not used"] if unused else [])
    return found


def isic(year: int, official: bool = False) -> DataSet:
    """The description of one year's challenge."""
    searching: Callable = found_officially if official else find
    return DataSet(
        name=f"isic{year}{'_official' if official else ''}",
        title=f"ISIC {year} challenge, lesion segmentation{' (official split: the test images validate)' if official else ''}",
        licence=LICENCES[year], citation=CITATIONS[year], page=PAGE, class_names=("background", "lesion"),
        download=partial(download, year=year), find=partial(searching, year=year), assign=held_out, folds=None,
        archives="|".join(map(re.escape, archives(year))))


def describe(chosen: argparse.Namespace) -> DataSet:
    """The set that the command line asks for."""
    if chosen.official_split:
        print(f"*** {OFFICIAL} ***")
    return isic(chosen.year, chosen.official_split)


def arguments() -> argparse.ArgumentParser:
    """The arguments of this script."""
    parser = command_line("ISIC challenges 2016, 2017, 2018: lesion segmentation")
    parser.add_argument("--year", type=int, choices=sorted(PARTS), default=2016, help="which challenge (2016)")
    parser.add_argument("--official-split", action="store_true", help="as the official code: the test images validate")
    return parser


if __name__ == "__main__":
    run(arguments(), describe)
