"""The widgets in a real browser: JupyterLab and Voilà serve a notebook, headless Chromium moves sliders, types keys and clicks."""
from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
              *(pytest.mark.skipif(find_spec(name) is None, reason=f"a widget needs it in a browser: pip install {name}")
                for name in ("ipywidgets", "anywidget", "jupyterlab", "voila"))]
NOTEBOOK = ROOT / "tests" / "widgets_in_browser.ipynb"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server(folder: Path, *command: str) -> Iterator[str]:
    """Run a Jupyter server in a folder of its own, settings included, and wait until it answers; yields its address."""
    port = free_port()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(folder / name.lower()) for name in names}, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (folder / "server.log").open("w")
    process = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}"], cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urlopen(address, timeout=5).close()
                break
            except (URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, folder, request) -> Iterator:
    """A page whose last sight is kept, so that a failure can be looked at."""
    page = browser.new_page(viewport={"width": 1300, "height": 1500})
    page.on("console", lambda message: print(f"browser: {message.type}: {message.text}"))
    yield page
    keep(page, folder, f"{request.node.name}_end")
    page.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copy(NOTEBOOK, tmp_path / "widgets.ipynb")
    return tmp_path


def keep(page, folder: Path, name: str) -> None:
    """A screenshot among the artifacts, to be looked at."""
    artifacts = Path(os.environ.get("QTSEG_ARTEFACTS", folder))
    artifacts.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=artifacts / f"{name}.png")


class Widget:
    """One widget on a page: its panels, its words, and waiting until either changes."""

    def __init__(self, page, number: int):
        self.page, self.grid = page, page.locator(".qtseg-canvas").nth(number)
        self.picture = self.grid.locator("canvas").first
        self.picture.wait_for(state="visible", timeout=60_000)
        self.box = self.grid.locator("xpath=ancestor::div[contains(@class, 'widget-vbox')][1]")
        self.wait(lambda: self.picture.evaluate("canvas => canvas.width") > 300, "a picture")

    def wait(self, condition, what: str) -> None:
        for _ in range(200):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"waited 10 s for {what}; text: {self.text()!r}")

    def text(self) -> str:
        return self.box.inner_text()

    def pixels(self) -> str:
        """All panels, as the browser has them."""
        return self.grid.evaluate("grid => [...grid.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL()).join()")

    def changes(self, act, until=None) -> None:
        """Act, then wait until the picture differs and `until(text)`, which did not hold before, holds."""
        picture = self.pixels()
        assert until is None or not until(self.text())
        act()
        self.wait(lambda: self.pixels() != picture, "another picture")
        if until is not None:
            self.wait(lambda: until(self.text()), "another text")

    def another_text(self):
        """A condition for `changes`: any text but the present one."""
        present = self.text()
        return lambda text: text != present

    def press(self, key: str) -> None:
        self.grid.focus()
        self.page.keyboard.press(key)

    def at(self, across: float, down: float) -> tuple[float, float]:
        """A place of the first panel, both from 0 to 1, on the page."""
        self.picture.scroll_into_view_if_needed()
        box = self.picture.bounding_box()
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    def drag(self, *places: tuple[float, float]) -> None:
        self.page.mouse.move(*self.at(*places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.at(*place), steps=4)
        self.page.mouse.up()

    def slider(self, description: str):
        return self.box.locator(".widget-slider", has_text=description).locator(".noUi-handle").first


def use_the_explorer(page, folder: Path, name: str) -> None:
    """Everything that issue 6 asks of a widget in a browser."""
    explorer = Widget(page, 0)
    keep(page, folder, f"{name}_1_start")
    handle = explorer.slider("threshold")
    handle.focus()
    explorer.changes(lambda: [page.keyboard.press("PageUp") for _ in range(5)], explorer.another_text())
    explorer.changes(lambda: explorer.press("ArrowRight"), lambda text: "image 1, 128" in text)
    explorer.changes(lambda: page.mouse.click(*explorer.at(0.5, 0.6)), lambda text: "pixel in row" in text)
    explorer.changes(lambda: page.mouse.wheel(0, -300))  # the click above gave it the focus
    keep(page, folder, f"{name}_2_enlarged")
    explorer.changes(lambda: explorer.drag((0.6, 0.6), (0.3, 0.7)))
    explorer.changes(lambda: explorer.box.get_by_title("worst image").click(), lambda text: "image 3, 128" in text)
    explorer.changes(lambda: explorer.box.locator(".qtseg-strip button").first.click(), lambda text: "image 0, 128" in text)
    keep(page, folder, f"{name}_3_worst")


def use_the_playground(page, folder: Path, name: str) -> None:
    playground = Widget(page, 1)
    assert "nothing happens" in playground.text()
    handle = playground.slider("rotate")
    handle.focus()
    playground.changes(lambda: page.keyboard.press("PageUp"), lambda text: "nothing happens" not in text)
    playground.changes(lambda: playground.drag((0.3, 0.3), (0.5, 0.4)), lambda text: "→ translate" in text)
    keep(page, folder, f"{name}_4_playground")


def use_the_lab(page, folder: Path, name: str) -> None:
    lab = Widget(page, 2)
    lab.changes(lambda: page.mouse.click(*lab.at(0.2, 0.3)), lambda text: "x\n19." in text)
    lab.changes(lambda: lab.press("ArrowRight"), lambda text: "x\n20." in text)
    keep(page, folder, f"{name}_5_lab")


def draw_on_the_canvas(page, folder: Path, name: str) -> None:
    """A stroke, a polygon, and two fingers; the words below the picture count what Python painted."""
    drawing = Widget(page, 3)
    drawing.changes(lambda: drawing.drag((0.1, 0.1), (0.3, 0.15)), lambda text: re.search("brush: 1 stroke, [1-9]", text))
    drawing.press("p")
    drawing.wait(lambda: "tool polygon" in drawing.text(), "the polygon")
    for place in ((0.6, 0.7), (0.9, 0.7), (0.8, 0.95)):
        page.mouse.click(*drawing.at(*place))
        page.wait_for_timeout(50)
    drawing.changes(lambda: page.keyboard.press("Enter"), lambda text: "polygon: 2 stroke" in text)
    keep(page, folder, f"{name}_6_drawn")
    session = page.context.new_cdp_session(page)
    def touch(kind: str, *places: tuple[float, float]) -> None:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [
            dict(zip("xy", drawing.at(*place)), id=finger) for finger, place in enumerate(places)]})
    def pinch() -> None:
        touch("touchStart", (0.4, 0.5))
        touch("touchStart", (0.4, 0.5), (0.6, 0.5))
        touch("touchMove", (0.3, 0.5), (0.7, 0.5))
        touch("touchEnd")
    drawing.changes(pinch, lambda text: re.search(r"zoom 1\.[5-9]|zoom 2", text))


def test_in_jupyterlab(page, folder):
    options = ("--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--LabApp.news_url=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder}")
    with server(folder, "jupyterlab", *options) as address:
        page.goto(f"{address}/doc/tree/widgets.ipynb?reset")
        kernel = page.locator(".jp-NotebookPanel .jp-Toolbar-kernelName", has_text="Python 3")  # "No Kernel" until there is one
        kernel.wait_for(timeout=60_000)
        prompt = page.locator(".jp-InputPrompt", has_text=re.compile(r"\[[*1]\]"))
        for _ in range(3):  # a kernel that is still connecting drops what it is asked
            page.locator(".lm-MenuBar-item", has_text="Run").click()
            page.get_by_text("Run All Cells", exact=True).click()
            page.wait_for_timeout(2000)
            if prompt.count():
                break
        use_the_explorer(page, folder, "lab")
        use_the_playground(page, folder, "lab")
        use_the_lab(page, folder, "lab")
        draw_on_the_canvas(page, folder, "lab")


def test_in_voila(page, folder):
    with server(folder, "voila", "widgets.ipynb", "--no-browser", "--Voila.ip=127.0.0.1") as address:
        page.goto(address)
        use_the_explorer(page, folder, "voila")
        use_the_playground(page, folder, "voila")
        use_the_lab(page, folder, "voila")
        draw_on_the_canvas(page, folder, "voila")
