"""The annotator in Chromium: one session in Voilà, whose kernel is killed, and that goes on."""
from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_annotator import folder  # noqa: F401 - a fixture
from test_browser import browser, keep, page, pytestmark, server  # noqa: F401 - fixtures, and when to skip


def png(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a kernel is killed, which Windows does otherwise")
def test_a_session_in_a_browser_survives_its_kernel(page, folder):  # noqa: F811
    """Draw, undo, redo, suggest, accept, next, touch; the kernel is killed, the page loaded anew: every pixel is where it was."""
    source = ("import os; from pathlib import Path; Path('pid').write_text(str(os.getpid()))\nfrom qtseg.view.annotator import Annotator\n"
             "Annotator('photos', network=lambda image: (image[..., 0] < 128).astype('uint8'))")
    (folder / "widgets.ipynb").write_text(json.dumps({
        "cells": [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": source}],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}}, "nbformat": 4, "nbformat_minor": 5}))
    masks = folder / "photos_annotated" / "masks"

    def until(condition, what: str) -> None:
        for _ in range(300):
            if condition():
                return
            page.wait_for_timeout(50)
        raise AssertionError(f"waited 15 s for {what}")

    def text() -> str:
        return page.locator(".widget-html").last.inner_text()

    def picture():
        canvas = page.locator(".qtseg-canvas canvas").first
        canvas.wait_for(state="visible", timeout=60_000)
        until(lambda: "image" in text(), "the text")
        return canvas

    def pixels() -> str:
        page.mouse.move(5, 5)  # no brush over the picture
        page.wait_for_timeout(300)
        return picture().evaluate("canvas => canvas.toDataURL()")

    def place(x: float, y: float) -> tuple[float, float]:
        box = picture().bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def pressed(key: str, what: str, condition) -> None:
        page.keyboard.press(key)
        until(condition, what)

    with server(folder, "voila", "widgets.ipynb", "--no-browser", "--Voila.ip=127.0.0.1") as address:
        page.goto(address)
        page.mouse.move(*place(0.2, 0.2))
        page.mouse.down()
        page.mouse.move(*place(0.6, 0.3), steps=5)
        page.mouse.up()
        until((masks / "0.png").exists, "the first stroke on the disk")
        drawn = png(masks / "0.png")
        assert abs(drawn.sum() / 1045 - 1) < 0.1  # of a line of 16 x 53 pixels with round ends
        pressed("Control+z", "undo", lambda: "no answer" in text())
        pressed("Control+y", "redo", lambda: "0: answered" in text())
        assert np.array_equal(png(masks / "0.png"), drawn)
        pressed("g", "a suggestion", lambda: "accept it" in text())
        keep(page, folder, "annotator_suggestion")
        pressed("Enter", "its acceptance", lambda: "accept it" not in text())
        pressed("ArrowRight", "the next image", lambda: "image 2" in text())

        session = page.context.new_cdp_session(page)
        for kind, *where in (("touchStart", 0.3, 0.3), ("touchMove", 0.5, 0.6), ("touchEnd",)):
            points = [dict(zip("xy", place(*where)))] if where else []
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        until((masks / "1.png").exists, "the touch on the disk")
        until(lambda: "1: answered" in text(), "the answer")
        before, kept = pixels(), {name: png(masks / f"{name}.png") for name in "01"}
        assert kept["0"].sum() > drawn.sum()

        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
        page.reload()
        until(lambda: "image 2" in text() and "2 of 3" in text(), "the image where it stopped")
        until(lambda: pixels() == before, "the same pixels")
        assert all(np.array_equal(png(masks / f"{name}.png"), kept[name]) for name in "01")
        keep(page, folder, "annotator_goes_on")
