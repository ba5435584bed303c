"""Data Science Bowl 2018, cell nuclei: 670 images, one mask file per nucleus. python data_scripts/dsb2018.py --root data"""
from pathlib import Path

from qtseg.data.layout import list_pictures
from qtseg.data.kaggle import fetch_kaggle
from qtseg.files.folders import walk
from qtseg.data.pairing import Found, Pair
from qtseg.data.preparation import DataSet, command_line, run

KAGGLE = "data-science-bowl-2018"


def cases(roots: list[Path]) -> list[Path]:
    """The folders, one per image, that hold images/ and masks/: those inside stage1_train where there is such a folder."""
    found = {path.parent.parent for root in roots for path in walk(root)[0] if path.parent.name == "images"}
    found = [path for path in found if "__MACOSX" not in path.parts]
    inside = [path for path in found if path.parent.name == "stage1_train"]
    return sorted(inside or [path for path in found if (path / "masks").is_dir()], key=lambda path: path.name)


def find(roots: list[Path]) -> Found:
    """One pair per folder of stage1_train: its image and the masks of all its nuclei."""
    found, masks = Found(), 0
    for case in cases(roots):
        images, nuclei = (list_pictures(case / part) if (case / part).is_dir() else [] for part in ("images", "masks"))
        if len(images) == 1 and nuclei:
            found.pairs.append(Pair(case.name, images[0], tuple(nuclei)))
            masks += len(nuclei)
        else:
            found.problems.append(f"{case}: expected one image and at least one mask, found {len(images)} and {len(nuclei)}")
    if not found.pairs and not found.problems:
        found.problems.append("no folders with images/ and masks/ in them (stage1_train/<id>/…)")
    found.notes += [f"{masks} masks of single nuclei, united to {len(found.pairs)}"]
    return found


DSB2018 = DataSet(
    name="dsb2018",
    title="Data Science Bowl 2018, nuclei in divergent images (stage1_train)",
    licence="CC0 1.0, public domain (BBBC038; the competition's rules apply to the download from Kaggle)",
    citation="Caicedo JC, Goodman A, Karhohs KW, et al. Nucleus segmentation across imaging experiments: the 2018 Data Science "
             "Bowl. Nature Methods 16, 1247-1253 (2019).",
    page=f"https://www.kaggle.com/competitions/{KAGGLE}",
    class_names=("background", "nucleus"),
    download=lambda folder: [fetch_kaggle("competition", KAGGLE, folder, checksums=folder / "checksums.json")],
    find=find,
    folds=5,  # by name
    archives=r"stage1_train\.zip",  # the competition's archive holds archives
)

if __name__ == "__main__":
    run(command_line(DSB2018.title), lambda chosen: DSB2018)
