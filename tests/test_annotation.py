"""Annotation without a browser: strokes, undo, files that are whole at every kill, sessions that go on, wrong input."""
from __future__ import annotations

import os
import shutil
import signal
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import one_sentence

from qtseg.data.layout import survey_folder
from qtseg.data.phantoms import phantom
from qtseg.data.reading import read_mask
from qtseg.data.segmentation import SegmentationData
from qtseg.view.annotation import Annotation
from qtseg.view.drawing import Drawing
from qtseg.view.strokes import History, brushed, enclosed, flooded


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six photographs of 48 x 64 pixels: gray, colored, 16 bits, in a sub-folder; one is damaged, one is a text."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    image = phantom("dermoscopy", 0, 64)[0][:48]
    for number, name in enumerate(("a.png", "b.jpg", "c.tif", "more/d.png")):
        cv2.imwrite(str(folder / name), np.roll(image, number, axis=1))
    cv2.imwrite(str(folder / "e.png"), image[..., 0].astype(np.uint16) * 16)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_brush_covers_the_pixels_whose_centers_it_passes():
    """Against the distance of every pixel's center to the line; beyond the border, too."""
    rng, (rows, columns) = np.random.default_rng(0), np.indices((50, 60)) + 0.5
    for radius in (0.5, 1, 2.5, 9):
        points = rng.uniform(-8, 66, (6, 2))
        nearest = np.full((50, 60), np.inf)
        for (x, y), end in zip(points[:-1], points[1:]):
            way = end - (x, y)
            share = np.clip(((columns - x) * way[0] + (rows - y) * way[1]) / (way @ way), 0, 1)
            nearest = np.minimum(nearest, np.hypot(columns - x - share * way[0], rows - y - share * way[1]))
        expected = nearest <= radius
        for x, y in np.floor(points).astype(int):
            if 0 <= x < 60 and 0 <= y < 50:
                expected[y, x] = True
        drawn = np.zeros((50, 60), bool)
        region = brushed(points, radius, drawn.shape)
        drawn[region.place] = region.pixels
        assert np.array_equal(drawn, expected)


@pytest.mark.parametrize("points", [[(np.nan, 1)], "ab", [(1, 2, 3)], [], [(1e7, 0)]], ids=str)
def test_points_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match="pairs \\(x, y\\) of finite numbers") as caught:
        brushed(points, 3, (9, 9))
    one_sentence(caught)


def test_regions_beside_the_image_are_empty():
    assert not brushed([(-40, 5)], 3, (9, 9)).pixels.any() and not enclosed([(-9, -9), (-2, -9), (-2, -2)], (9, 9)).pixels.any()
    assert flooded(np.zeros((9, 9), np.uint8), 9, 3).pixels.size == 0


def test_a_thousand_strokes_are_undone_and_redone_one_by_one():
    rng, history, mask, states = np.random.default_rng(1), History(), np.zeros((200, 300), np.uint8), []
    for number in range(1000):
        states.append(zlib.crc32(mask))
        start = rng.uniform(0, (300, 200))
        assert history.paint(mask, brushed([start, start + rng.normal(0, 6, 2)], 4, mask.shape), 1 + number % 2, (True, True)) or number > 50
        states = states if len(history.done) == len(states) else states[:-1]  # a stroke that changed nothing is none
    assert sum(len(change.bits) for change in history.done) < 200 * len(states)
    end = mask.copy()
    for state in states[::-1]:
        assert history.step(mask, back=True) and zlib.crc32(mask) == state
    assert history.step(mask, back=True) is None and not mask.any()
    while history.step(mask, back=False):
        pass
    assert np.array_equal(mask, end)


def test_a_stroke_after_undo_forgets_what_was_undone():
    drawing = Drawing(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8))
    drawing.brush([(2, 2)], 1, 1)
    assert drawing.brush([(2, 2)], 1, 1) is None  # nothing changes
    assert drawing.undo() and not drawing.answered and drawing.nothing() and drawing.redo() is None and drawing.answered
    for label in (2, -1, 1.0, "1"):
        with pytest.raises(ValueError, match="class index from 0 to 1"):
            drawing.fill(1, 1, label)
        with pytest.raises(ValueError, match="class index from 0 to 1"):
            drawing.cut([(1, 1), (7, 7)], label)
    with pytest.raises(ValueError, match="no suggestion"):
        drawing.accept()


def test_a_session_goes_on_where_it_stopped(photos):
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    session = Annotation(photos, classes=("back", "mole", "hair"))
    assert session.names == ["a", "b", "broken", "c", "e", "more/d"] and session.progress == (0, 6)
    session.draw("outline", [(5, 5), (40, 5), (40, 30)], 2)
    session.draw("brush", [(50, 40)], 3, 1)
    session.draw("undo")
    session.note(" a hair ")
    session.ahead(2)  # broken is passed over
    assert session.name == "c" and "broken.png" in session.skipped["broken"]
    session.draw("nothing")
    session.ahead(2)
    session.draw("fill", 3, 3, 1)
    mask = session.drawing.mask.copy()
    session.draw("brush", [(50, 40)], 3, 2)
    session.draw("undo")

    again = Annotation(session.files.folder)  # the prepared folder alone is enough
    assert (again.name, again.progress, again.classes) == ("more/d", (3, 6), ("back", "mole", "hair"))
    assert np.array_equal(again.drawing.mask, mask) and again.files.state["notes"] == {"a": "a hair"}
    again.go("a")
    assert set(np.unique(again.drawing.mask)) == {0, 2} and again.files.state["seconds"].keys() == {"a", "c", "more/d"}
    assert again.ahead(1, unanswered=True) and again.name == "b"
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before

    survey = survey_folder(session.files.folder)
    assert [record.id for record in survey.records] == ["a", "c", "more/d"] and not survey.problems
    assert not read_mask(survey.records[1].mask, classes=3).any()
    data = SegmentationData.open(session.files.folder, classes=3, size=32, cache=photos.parent / "cache", progress=False)
    assert data.class_names == ("back", "mole", "hair")


def test_without_its_first_stroke_an_image_has_no_answer(photos):
    session = Annotation(photos)
    session.draw("brush", [(5, 5)], 3, 1)
    session.ahead(1)
    session.draw("brush", [(5, 5)], 3, 1)
    session.ahead(-1)
    session.draw("undo")  # of the visit before
    assert session.progress == (1, 6) and not (session.files.folder / "masks/a.png").exists()
    session.draw("redo")
    session.draw("reset")
    session.draw("undo")
    assert list(Annotation(photos).files.rows) == ["a", "b"]


def test_a_prepared_folder_is_annotated_in_place(phantoms, tmp_path):
    """Columns of the manifest and entries of dataset.json stay, also of an image whose answer is removed and given again."""
    folder = shutil.copytree(phantoms, tmp_path / "set")
    texts = [(folder / name).read_text() for name in ("manifest.csv", "dataset.json")]
    session = Annotation(folder)
    assert session.progress == (24, 24) and session.drawing.mask.any()
    session.draw("reset")
    assert Annotation(folder).progress == (23, 24)
    session.draw("undo")
    assert [(folder / name).read_text() for name in ("manifest.csv", "dataset.json")] == texts
    cv2.imwrite(str(folder / "images/new.png"), session.drawing.image)
    assert Annotation(folder).ahead(1, unanswered=True)


def test_a_mask_that_another_program_changed_is_not_overwritten(photos):
    session, other = Annotation(photos), Annotation(photos)
    other.draw("brush", [(30, 30)], 5, 1)
    with pytest.raises(ValueError) as caught:
        session.draw("nothing")
    one_sentence(caught, "mask of a", "draw it again")
    assert np.array_equal(session.drawing.mask, other.drawing.mask) and session.draw("nothing")


@pytest.mark.parametrize(("make", "words"), [
    (lambda folder: Annotation(folder / "absent"), ("absent", "is no folder")),
    (lambda folder: Annotation(folder / "photos", folder / "photos" / "masks"), ("would lie in",)),
    (lambda folder: Annotation(folder / "photos", folder), ("holds something else",)),
    (lambda folder: Annotation(folder / "photos", classes=["one"]), ("2 to 254 different names", "'one'")),
    (lambda folder: Annotation(folder / "photos", classes=["back", "a", "a"]), ("different names",)),
    (lambda folder: Annotation(folder / "photos" / "more", folder / "new", ["b", "a", "c"]) and Annotation(
        folder / "photos" / "more", folder / "new", ["b", "a"]), ("has the classes b, a, c",)),
    (lambda folder: Annotation(folder / "photos", network=lambda image: image).draw("suggest"), ("class indices below 2",)),
    (lambda folder: (folder / "empty").mkdir() or Annotation(folder / "empty"), ("holds no images",)),
    (lambda folder: shutil.copy(folder / "photos/a.png", folder / "photos/a.tif") and Annotation(folder / "photos"), ("same name twice", "a.tif")),
], ids=range(9))
def test_wrong_input_is_one_sentence(photos, make, words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        make(photos.parent)
    one_sentence(caught, *words)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked and killed, which Windows cannot do")
def test_a_killed_process_loses_at_most_the_stroke_that_it_was_writing(photos):
    """Killed between strokes, and in the middle of one: the files are whole, and hold every stroke that was reported."""
    def strokes(seed: int):
        for point in np.random.default_rng(seed).uniform(0, (64, 48), (1000, 2)):
            yield [point, point + 4]

    for seed in range(6):
        session = Annotation(photos)
        session.go(["a", "b", "c", "e", "more/d", "a"][seed])
        session.draw("reset")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for number, points in enumerate(strokes(seed)):
                session.draw("brush", points, 2, 1 if number % 3 else 0)
                os.write(writer, b".")
            os._exit(0)
        reported = sum(len(os.read(reader, 1)) for _ in range(seed * seed + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.set_blocking(reader, False)
        try:
            reported += len(os.read(reader, 2000))
        except BlockingIOError:
            pass
        os.close(reader)
        os.close(writer)

        again = Annotation(photos)
        assert again.name == session.name and not survey_folder(again.files.folder).problems
        history, mask, states = History(), np.zeros((48, 64), np.uint8), []
        for number, points in zip(range(reported + 1), strokes(seed)):
            history.paint(mask, brushed(points, 2, mask.shape), 1 if number % 3 else 0, (True, True))
            states.append(mask.copy())
        assert any(np.array_equal(again.drawing.mask, state) for state in states[reported - 1:])
