"""The annotator without a browser: strokes, keys, buttons, messages that make no sense."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from traitlets import TraitError

from qtseg.data.phantoms import phantom
from qtseg.view.annotator import ACTIONS, KEYS, TOOLS, Annotator
from qtseg.view.strokes import brushed

pytest.importorskip("ipywidgets", reason="controls are ipywidgets: pip install ipywidgets")
pytest.importorskip("anywidget", reason="the canvas is an anywidget: pip install anywidget")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with `photos`, three images of 128 x 128 pixels."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "photos" / f"{number}.png"), phantom("dermoscopy", number, 128)[0][..., ::-1])
    return tmp_path


@pytest.fixture
def annotator(folder):
    made = Annotator(folder / "photos", classes=["back", "<b>mole</b>"], network=lambda image: (image[..., 0] < 128).astype(np.uint8))
    yield made
    made.close()


def stroke(annotator: Annotator, line, **changes) -> None:
    """What the browser sends when a stroke ends."""
    message = {"kind": "stroke", "id": annotator.page.canvas.seen + 1, "panel": 0, "tool": annotator.page.canvas.tool, "brush": annotator.page.canvas.brush,
               "points": [value for x, y in line for value in (x, y, 0.5)]}
    annotator.page.guarded(annotator.stroke, message | changes)


def test_strokes_of_every_tool(annotator):
    annotator.view
    line = [(20, 30), (70, 60), (50, 90)]
    drawing = annotator.session.drawing
    for tool in TOOLS:
        annotator.key(TOOLS[tool].key)
        before = drawing.mask.copy()
        if tool == "fill":
            annotator.click(0, 2, 2)
        elif tool != "move":
            stroke(annotator, line)
            assert annotator.page.canvas.seen and annotator.page.canvas.panels
        if TOOLS[tool].action == "cut":
            assert drawing.suggestion is not None and "accept it" in annotator.text() and len(annotator.panels()[0].layers) == 4
            annotator.key("Escape")
            assert drawing.suggestion is None and np.array_equal(drawing.mask, before)
        elif tool != "move":
            assert not np.array_equal(drawing.mask, before), tool
            annotator.key("ctrl+z" if tool != "brush" else "0")
    region = brushed(line, 8, drawing.mask.shape)  # the brush alone was not undone
    assert np.array_equal(drawing.mask[region.place] > 0, region.pixels) and drawing.mask.sum() == region.pixels.sum()
    assert annotator.still().size[0] >= 200 and "<b>mole" not in annotator.text()


def test_every_key_has_a_button_and_does_something(annotator):
    annotator.view
    assert len(set(KEYS)) == len(KEYS) and set(annotator.page.canvas.hears) == set(KEYS)
    annotator.key("g")
    annotator.key("Enter")
    assert annotator.session.progress == (1, 3) and annotator.session.drawing.mask.any()
    annotator.key("u")
    assert annotator.name == "1" and annotator.strip.chosen == 1 and annotator.strip.items[0]["title"] == "✓ 0"
    annotator.key("n")
    annotator.key("Delete")
    annotator.strip.chosen = 2
    assert annotator.name == "2" and annotator.session.progress == (1, 3)
    size = annotator.size
    annotator.key("]")
    assert annotator.page.canvas.brush["size"] == annotator.size > size
    annotator.note.value = "blurred"
    annotator.key("ArrowLeft")
    assert annotator.note.value == "" and annotator.session.files.state["notes"] == {"2": "blurred"}
    for action in ACTIONS:
        annotator.page.guarded(action.do, annotator)
    for name, value in (("label", 2), ("size", 0), ("opacity", 1.5), ("tool", "axe")):
        with pytest.raises(TraitError, match=name):
            annotator.set(**{name: value})


@pytest.mark.parametrize("changes", [{"brush": {}}, {"brush": {"tool": "brush", "image": "1", "size": 3, "label": 1}},
                                     {"brush": {"tool": "brush", "image": "0", "size": 3, "label": 9}}], ids=str)
def test_a_stroke_that_makes_no_sense_is_refused(annotator, changes):
    annotator.view
    stroke(annotator, [(5, 5)], **changes)
    assert annotator.session.progress == (0, 3) and "ValueError" in annotator.page.line.value and annotator.page.canvas.seen == 1


def test_a_stroke_after_the_session_went_on_is_refused(annotator):
    """A program may open another image in the session: what was drawn on the displayed one must not land there."""
    annotator.view
    brush = annotator.page.canvas.brush
    annotator.session.go("1")
    stroke(annotator, [(5, 5)], brush=brush)
    assert annotator.session.progress == (0, 3) and "another image" in annotator.page.line.value
