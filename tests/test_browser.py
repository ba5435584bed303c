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
    """One widget on a page: its picture, its words, and waiting until either changes."""

    def __init__(self, page, number: int):
        self.page, self.picture = page, page.locator("img.qtseg-canvas").nth(number)
        self.picture.wait_for(state="visible", timeout=60_000)
        self.box = self.picture.locator("xpath=ancestor::div[contains(@class, 'widget-vbox')][1]")
        self.wait(lambda: self.size() > 100, "a picture")

    def wait(self, condition, what: str) -> None:
        for _ in range(200):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"waited 10 s for {what}; text: {self.text()!r}")

    def size(self) -> int:
        return self.picture.evaluate("image => image.naturalWidth")

    def text(self) -> str:
        return self.box.locator(".widget-html").last.inner_text()

    def pixels(self) -> str:
        """The picture itself, as the browser has it."""
        return self.picture.evaluate("""image => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png"); }""")

    def changes(self, act, until=None) -> None:
        """Act, then wait until the picture differs and `until(text)`, which did not hold before, holds.

        In between the widget says what it is busy with, so not every new text is the answer.
        """
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
        self.picture.focus()
        self.page.keyboard.press(key)

    def slider(self, description: str):
        return self.box.locator(".widget-slider", has_text=description).locator(".noUi-handle").first


def dice(text: str) -> float | None:
    found = re.search(r"Dice ([\d.]+)", text)
    return found and float(found[1])


def use_the_explorer(page, folder: Path, name: str) -> None:
    """Everything that issue 6 asks of a widget in a browser."""
    explorer = Widget(page, 0)
    before = dice(explorer.text())
    keep(page, folder, f"{name}_1_start")

    handle = explorer.slider("threshold")
    handle.focus()
    explorer.changes(lambda: [page.keyboard.press("PageUp") for _ in range(5)], lambda text: dice(text) not in (None, before))
    explorer.changes(lambda: explorer.press("ArrowRight"), lambda text: "image 1 (2 of 4)" in text)
    explorer.changes(lambda: explorer.picture.click(position={"x": 64, "y": 80}), lambda text: "pixel in row" in text)
    explorer.changes(lambda: page.mouse.wheel(0, -300))  # the click above gave it the focus
    keep(page, folder, f"{name}_2_enlarged")

    box = explorer.picture.bounding_box()

    def drag() -> None:
        page.mouse.move(box["x"] + 100, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 60, box["y"] + 120, steps=4)
        page.mouse.up()

    explorer.changes(drag)
    explorer.changes(lambda: explorer.box.get_by_role("button", name="worst").click(), lambda text: "image 3 (4 of 4)" in text)
    keep(page, folder, f"{name}_3_worst")


def use_the_playground(page, folder: Path, name: str) -> None:
    playground = Widget(page, 1)
    assert "nothing happens" in playground.text()
    handle = playground.slider("rotate")
    handle.focus()
    playground.changes(lambda: page.keyboard.press("PageUp"), lambda text: "rotate" in text)
    playground.changes(lambda: playground.press("d"), playground.another_text())
    keep(page, folder, f"{name}_4_playground")


def use_the_lab(page, folder: Path, name: str) -> None:
    lab = Widget(page, 2)
    lab.changes(lambda: lab.picture.click(position={"x": 40, "y": 60}), lab.another_text())
    lab.changes(lambda: lab.press("ArrowRight"), lab.another_text())
    keep(page, folder, f"{name}_5_lab")


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


def test_in_voila(page, folder):
    with server(folder, "voila", "widgets.ipynb", "--no-browser", "--Voila.ip=127.0.0.1") as address:
        page.goto(address)
        use_the_explorer(page, folder, "voila")
        use_the_playground(page, folder, "voila")
        use_the_lab(page, folder, "voila")
