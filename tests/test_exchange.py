"""Masks from and for COCO, labelme, Cellpose and ImageJ: there and back, wrong and hostile files."""
from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import one_sentence

from qtseg.cli import main
from qtseg.data.drawn import from_rle
from qtseg.data.exchange import WRITERS, read_drawn, share
from qtseg.data.own import prepare_own
from qtseg.data.polygons import inside, outlines
from qtseg.data.phantom_sets import write_manifest
from qtseg.data.rois import read_plain


@pytest.fixture
def prepared(tmp_path) -> Path:
    """A prepared folder of three images; masks with a hole, a diagonal contact, noise, and nothing."""
    folder, masks = tmp_path / "set", np.zeros((3, 40, 50), np.uint8)
    masks[0, 5:30, 5:30], masks[0, 10:20, 10:20], masks[0, 30:35, 30:40] = 1, 0, 1
    masks[1] = np.random.default_rng(0).random((40, 50)) < 0.4
    rows = []
    for number, mask in enumerate(masks):
        name = f"{'sub/' * (number == 1)}{number}"
        rows.append({"id": name, "image": f"images/{name}.png", "mask": f"masks/{name}.png", "width": 50, "height": 40})
        for part, pixels in (("image", mask * 3 + np.uint8(number)), ("mask", mask)):
            (folder / rows[-1][part]).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / rows[-1][part]), pixels)
    write_manifest(folder, rows, "set", ["background", "spot"])
    return folder


@pytest.mark.parametrize("format", WRITERS)
def test_there_and_back_every_pixel_is_the_same(prepared, tmp_path, format, capsys):
    if format == "imagej":
        pytest.importorskip("roifile", reason="ImageJ's ROIs need it: pip install roifile")
        (prepared / "masks/2.png").write_bytes((prepared / "masks/0.png").read_bytes())  # ImageJ has no empty .zip
    output = tmp_path / ("a.json" if format == "coco" else "out")
    assert main(["prepare", "share", str(prepared), str(output), "--format", format]) == 0
    arguments = ["prepare", "own", "--images", str(prepared / "images"), "--masks", str(output), "--format", format, "--folds", "0",
                 "--root", str(tmp_path / "data")]
    assert main(arguments) == 0 == main(arguments), capsys.readouterr().err  # the second time it is there
    for name in ("0", "sub/1", "2"):
        mask, back = (cv2.imread(str(folder / "masks" / f"{name}.png"), cv2.IMREAD_UNCHANGED) for folder in (prepared, tmp_path / "data/own"))
        assert np.array_equal(mask, back), name
    classes = json.loads((tmp_path / "data/own/dataset.json").read_text())["classes"]
    assert classes == ["background", {"imagej": "group 1", "cellpose": "foreground"}.get(format, "spot")]


def test_polygons_of_any_region_draw_it_again():
    rng = np.random.default_rng(1)
    for share_of in (0.1, 0.5, 0.9, 1):
        region = rng.random((17, 23)) < share_of
        assert np.array_equal(inside(outlines(region), 17, 23), region)


def test_run_lengths():
    """As pycocotools 2.0 compresses them; the text is of its documentation's kind, checked by hand."""
    mask = from_rle([6, 1, 40, 4, 5, 4, 5, 4, 21], 9, 10)
    assert np.array_equal(from_rle("61X13mN000`0", 9, 10), mask) and mask.sum() == 13
    for counts in ([5, 5], [-1, 91], "6", "~~", [90.0], None, {"a": 1}, "o" * 30):
        with pytest.raises(ValueError, match="run lengths"):
            from_rle(counts, 9, 10)


COCO = {"images": [{"id": 1, "file_name": "C:\\data\\0.png", "height": 40, "width": 50}], "categories": [{"id": 7, "name": "spot"}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9]]}]}


@pytest.mark.parametrize(("change", "words"), [
    (lambda coco: coco.pop("images"), ("no COCO file", "'images'")),
    (lambda coco: coco["annotations"][0].pop("segmentation"), ("annotation 5", "no segmentation")),
    (lambda coco: coco["annotations"][0].update(image_id=9), ("no COCO file", "9")),
    (lambda coco: coco["annotations"][0].update(segmentation=[[1, 2, 3]]), ("x and y in turn",)),
    (lambda coco: coco["annotations"][0].update(segmentation={"size": [4, 4], "counts": [16]}), ("annotation 5", "[40, 50]")),
    (lambda coco: coco["images"][0].update(height=10**6, width=10**6), ("MAX_PIXELS",)),
    (lambda coco: coco["images"][0].update(height=30), ("was drawn on 50x30", "has 50x40")),
    (lambda coco: coco["annotations"][0].update(segmentation=[[1, 1, 9, float("nan"), 9, 9]]), ("spot", "no finite number")),
    (lambda coco: coco["annotations"][0].update(segmentation=[[0, -1e9, 1, 1e9] * 300_000]), ("spot", "fewer corners")),
], ids=range(9))
def test_a_wrong_coco_file_is_one_sentence(prepared, tmp_path, change, words):
    coco = json.loads(json.dumps(COCO))
    change(coco)
    (tmp_path / "a.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError) as caught:
        prepare_own(prepared / "images", tmp_path / "a.json", tmp_path / "data", format="coco", folds=0)
    assert all(word in str(caught.value) for word in words) and "a.json" in str(caught.value)


def test_labelme_shapes_and_what_makes_no_mask(tmp_path):
    def write(*shapes) -> Path:
        entries = [{"label": "b", "shape_type": kind, "points": points} for kind, points in shapes]
        (tmp_path / "x.json").write_text(json.dumps({"shapes": entries, "imageHeight": 20, "imageWidth": 30}))
        return tmp_path / "x.json"

    drawn, names = read_drawn(write(("rectangle", [[9, 8], [2, 3]]), ("circle", [[20, 10], [20, 14]])), "labelme")
    mask = drawn["x"].mask(names, (20, 30))
    assert mask[3:8, 2:9].all() and abs(mask.sum() - 35 - np.pi * 16) < 4
    for shape in (("line", [[1, 1], [2, 2]]), ("mask", [[1, 1], [2, 2]]), ("polygon", "ab")):
        with pytest.raises(ValueError, match="x.json"):
            read_drawn(write(shape), "labelme")


class Harm:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_never_runs_anything(tmp_path, protocol):
    for harm in (Harm(os.mkdir, str(tmp_path / "harm")), Harm(eval, "1"), Harm(np.load, "x"), Harm(getattr, "a", "b")):
        with pytest.raises(ValueError):
            read_plain(pickle.dumps({"masks": [harm]}, protocol))
    assert not (tmp_path / "harm").exists()
    nested: tuple = ()
    for _ in range(200):
        nested = (nested, nested)
    with pytest.raises(ValueError, match="keys are no texts"):
        read_plain(pickle.dumps({(1, 2): 1}, protocol))
    read_plain(pickle.dumps({"a": nested, "b": [1.5, None, True, "x", 2**40]}, protocol))
    for data in (b"", b"\x80\x04", b"r\xff\xff\xff\xff.", b"\x80\x04e.", b"cnumpy\nndarray\nR."):
        with pytest.raises(ValueError):
            read_plain(data)


@pytest.mark.parametrize("found", [{"masks": np.zeros((2, 3, 4), np.uint16)}, {"masks": np.zeros((3, 4))}, {"flows": []}, {"masks": "x"}], ids=str)
def test_a_wrong_seg_npy_is_one_sentence(tmp_path, found):
    np.save(tmp_path / "x_seg.npy", found)
    with pytest.raises(ValueError) as caught:
        read_drawn(tmp_path, "cellpose")
    one_sentence(caught, "x_seg.npy", "save the masks as PNG")


def test_a_hostile_archive_of_rois_is_refused(tmp_path):
    roifile = pytest.importorskip("roifile", reason="ImageJ's ROIs need it: pip install roifile")
    square = roifile.ImagejRoi.frompoints(np.array([(1, 1), (5, 1), (5, 4)])).tobytes()
    for name, data, words in (("../up.roi", square, "outside the folder"), ("a.roi", square[:70], "a.roi is no ROI"), ("a.txt", b"", "holds no ROI"),
                              ("a.roi", bytes(300_000_000), "swell")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(name, data)
        with pytest.raises(ValueError, match=words) as caught:
            read_drawn(tmp_path / "x.zip", "imagej")
        one_sentence(caught, "x.zip")


def test_cellpose_knows_one_class_and_other_refusals(prepared, tmp_path):
    description = prepared / "dataset.json"
    description.write_text(description.read_text().replace('"spot"', '"spot", "dot"'))
    with pytest.raises(ValueError, match="Cellpose knows one class, and there are 2"):
        share(prepared, tmp_path / "out", "cellpose")
    with pytest.raises(FileNotFoundError, match="NAME.zip or NAME.roi"):
        read_drawn(prepared, "imagej")
    with pytest.raises(ValueError, match="expected manifest.csv"):
        share(prepared / "images", tmp_path / "out", "coco")
