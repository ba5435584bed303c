"""FIVES, vessels in fundus photographs: 600 training and 200 test images. python data_scripts/fives.py --root data

The archive is a .rar: unpacked if this machine has a tool for it (bsdtar, unar, 7z), else unpack it by hand and use --from.
"""
import json
import re
from pathlib import Path

from qtseg.data.layout import list_pictures
from qtseg.data.connection import DownloadError
from qtseg.data.download import fetch
from qtseg.data.pairing import Found, held_out, one_folder, pair_up
from qtseg.data.preparation import DataSet, command_line, run

FILES = "https://api.figshare.com/v2/articles/19688169/files"  # a JSON list: name, download_url, …
ARCHIVE = re.compile(r"\.(rar|zip)$", re.IGNORECASE)
PAGE = "https://doi.org/10.6084/m9.figshare.19688169"
DISEASES = {"A": "macular degeneration", "D": "diabetic retinopathy", "G": "glaucoma", "N": "normal"}  # last letter of the name


def download(folder: Path) -> list[Path]:
    """Ask figshare for the article's files, and download the archive among them."""
    listing = fetch(FILES, folder / "fives_files.json", page=PAGE, most=10**6)
    try:
        file = next(file for file in json.loads(listing.read_text(encoding="utf-8")) if ARCHIVE.search(file["name"]))
        return [fetch(file["download_url"], folder / Path(file["name"]).name, checksums=folder / "checksums.json", page=PAGE)]
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise DownloadError(f"figshare's list of files has another form than expected ({error!r}): download the archive from "
                            f"{PAGE} and pass it with --from") from error
    finally:
        listing.unlink()  # the next run asks again


def find(roots: list[Path]) -> Found:
    """The pairs of train and test; both number their images from 1, so the part becomes a part of the id."""
    found = Found()
    for split in ("train", "test"):
        images, masks = one_folder(found, roots, split, "Original"), one_folder(found, roots, split, "Ground truth")
        if images and masks:
            pair_up(found, list_pictures(images), list_pictures(masks), str, split=split)
    for pair in found.pairs:
        letter = re.search(r"_([ADGN])$", pair.id)
        pair.id, pair.stratum = f"{pair.split}_{pair.id}", DISEASES[letter[1]] if letter else ""
    return found


FIVES = DataSet(
    name="fives",
    title="FIVES, fundus images for vessel segmentation",
    licence="CC BY 4.0 (as its figshare page states)",
    citation="Jin K, Huang X, Zhou J, et al. FIVES: A fundus image dataset for artificial intelligence based vessel "
             "segmentation. Scientific Data 9, 475 (2022).",
    page=PAGE,
    class_names=("background", "vessel"),
    download=download,
    find=find,
    assign=held_out,
    folds=None,
)

if __name__ == "__main__":
    run(command_line(FIVES.title), lambda chosen: FIVES)
