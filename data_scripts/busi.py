"""BUSI, breast ultrasound: 437 benign and 210 malignant images with masks. python data_scripts/busi.py --root data"""
import re
from collections import Counter
from pathlib import Path

from qtseg.data.layout import list_pictures
from qtseg.data.kaggle import fetch_kaggle
from qtseg.data.pairing import Found, find_folders, one_folder, pair_up
from qtseg.data.preparation import DataSet, command_line, run

KAGGLE = "aryashah2k/breast-ultrasound-images-dataset"
MASK = re.compile(r"_mask(_\d+)?$")  # "benign (195)_mask", "…_mask_1", "…_mask_2"


def find(roots: list[Path]) -> Found:
    """Benign and malignant pairs, each image with all its masks; normal images, which show no lesion, are not used."""
    found = Found()
    for kind in ("benign", "malignant"):
        if folder := one_folder(found, roots, kind):
            pictures = list_pictures(folder)
            pair_up(found, [path for path in pictures if not MASK.search(path.stem)],
                    [path for path in pictures if MASK.search(path.stem)], lambda stem: MASK.sub("", stem), several=True,
                    stratum=kind)
    several = Counter(len(pair.masks) for pair in found.pairs if len(pair.masks) > 1)
    found.notes += [f"{count} image(s) with {masks} masks, united" for masks, count in sorted(several.items())]
    normal = [path for folder in find_folders(roots, "normal") for path in list_pictures(folder) if not MASK.search(path.stem)]
    found.notes += [f"{len(normal)} normal images, without a lesion, are not used"] if normal else []
    return found


BUSI = DataSet(
    name="busi",
    title="BUSI, dataset of breast ultrasound images",
    licence="CC0 1.0, public domain (as its Kaggle page states)",
    citation="Al-Dhabyani W, Gomaa M, Khaled H, Fahmy A. Dataset of breast ultrasound images. Data in Brief 28, 104863 (2020).",
    page=f"https://www.kaggle.com/datasets/{KAGGLE}",
    class_names=("background", "lesion"),
    download=lambda folder: [fetch_kaggle("dataset", KAGGLE, folder, checksums=folder / "checksums.json")],
    find=find,
    folds=5,  # by name within each stratum: 87 benign and 42 malignant images per fold; the last two benign ones always train
)

if __name__ == "__main__":
    run(command_line(BUSI.title), lambda chosen: BUSI)
