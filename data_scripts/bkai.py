"""BKAI-IGH NeoPolyp-Small, colonoscopy: 1000 images, polyps in two classes. python data_scripts/bkai.py --root data

One set of masks serves both of the paper's tasks: three classes as they are (classes: 3), binary with masks: any (classes: 2).
"""
from pathlib import Path

from qtseg.data.layout import list_pictures
from qtseg.data.kaggle import fetch_kaggle
from qtseg.data.pairing import Found, colors_of, find_folders, one_folder, pair_up
from qtseg.data.preparation import DataSet, command_line, run

KAGGLE = "bkai-igh-neopolyp"


def find(roots: list[Path]) -> Found:
    """Training images and their colored masks by name; the test images, whose masks are secret, are not used."""
    found = Found()
    images, masks = one_folder(found, roots, "train"), one_folder(found, roots, "train_gt")
    if images and masks:
        pair_up(found, list_pictures(images), list_pictures(masks), str)
    tests = [path for folder in find_folders(roots, "test") for path in list_pictures(folder)]
    found.notes += [f"{len(tests)} test images without masks are not used"] if tests else []
    return found


BKAI = DataSet(
    name="bkai",
    title="BKAI-IGH NeoPolyp-Small, polyps in colonoscopy images",
    licence="research and education only, see the competition's rules",
    citation="Lan PN, An NS, Hang DV, et al. NeoUNet: Towards accurate colon polyp segmentation and neoplasm detection. "
             "International Symposium on Visual Computing (2021).",
    page=f"https://www.kaggle.com/competitions/{KAGGLE}",
    class_names=("background", "non-neoplastic polyp", "neoplastic polyp"),
    download=lambda folder: [fetch_kaggle("competition", KAGGLE, folder, checksums=folder / "checksums.json")],
    find=find,
    read=colors_of,
    folds=5,  # 200 images each, by name
)

if __name__ == "__main__":
    run(command_line(BKAI.title), lambda chosen: BKAI)
