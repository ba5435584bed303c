"""The exported page in headless Chromium: the Predictor's masks, one sentence for bad files, and no request that leaves it."""
from __future__ import annotations

import csv
import io
import json
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import one_sentence
from PIL import Image, ImageCms
from test_browser import CHROMIUM, browser, playwright  # noqa: F401 - the browser is a fixture

from qtseg.cli import main
from qtseg.data.dataset import normalize
from qtseg.data.phantoms import FAMILIES, phantom
from qtseg.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from qtseg.evaluation.runs import read_checkpoint
from qtseg.evaluation.scores import class_probabilities, decide, undo_resize
from qtseg.network.model import QTSeg
from qtseg.network.state import find_checkpoint
from qtseg.prediction import web
from qtseg.prediction.predictor import Predictor
from qtseg.view.pictures import HEAT
from qtseg.view.token_explorer import TokenExplorer
from qtseg.view.tokens import DIRECTIONS

pytest.importorskip("onnxscript", reason="the page holds an ONNX file: pip install onnxscript")
browsing = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
CARD = "---\nlicense: other\n---\n<!-- mark -->\n# A <b>card</b>\n\n| a | b |\n|---|---:|\n| 1 | 2 |\n"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return find_checkpoint("phantoms")


@pytest.fixture(scope="module")
def recorded(checkpoint) -> tuple[torch.nn.Module, bytes, int]:
    """The arguments of `web.lighten` for the shipped network; recording takes longest."""
    model, preprocessing = read_checkpoint(checkpoint)
    return model, web.record_network(model, preprocessing.size), preprocessing.size


@pytest.fixture(scope="module")
def runtime() -> dict[str, bytes]:
    try:
        return web.fetch_runtime()
    except OSError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def exported(checkpoint, recorded, runtime, tmp_path_factory) -> SimpleNamespace:
    """Two pages of one network: without a network connection, and with the runtime's address."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "fetch_runtime", lambda: runtime)
        network = web.lighten(*recorded)
        patch.setattr(web, "record_network", lambda *_: recorded[1])
        patch.setattr(web, "lighten", lambda *_: network)
        cv2.imwrite(str(folder / "example.png"), phantom("nuclei", 3, 90)[0][:, :, ::-1])
        offline = web.export_web(checkpoint, folder / "offline", CARD, offline=True, examples=[folder / "example.png"])
        return SimpleNamespace(offline=offline, online=web.export_web(checkpoint, folder / "online", CARD))


@pytest.fixture(scope="module")
def context(browser):  # noqa: F811 - the fixture
    return browser.new_context(viewport={"width": 1200, "height": 1000})


def said(page, words: str) -> None:
    playwright.expect(page.locator("#status")).to_contain_text(words, timeout=180_000)


@pytest.fixture(scope="module")
def page(context, exported) -> Iterator:
    """The page from a file, ready; what it says on the console and what it requests is in `page.heard`."""
    page = context.new_page()
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    inside = ("blob:", "data:", exported.offline.as_uri())
    page.on("request", lambda request: page.heard.append(request.url) if not request.url.startswith(inside) else None)
    page.goto(exported.offline.as_uri())
    said(page, "Ready")
    yield page
    assert page.heard == []


def picture(number: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(phantom(FAMILIES[number % 4], number, max(height, width))[0][:height, :width]))


def interlaced(values: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> a PNG in the seven passes of Adam7, which no library here writes."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for top, left, down, across in passes for row in values[top::down, left::across])
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 2, 0, 0, 1)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


def write_pictures(folder: Path) -> list[Path]:
    """Every kind of file that the page reads, of odd sizes."""
    rng = np.random.default_rng(0)
    exif = [Image.Exif() for _ in range(9)]
    for orientation, block in enumerate(exif):
        block[0x0112] = orientation
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # a browser that obeys this one swaps red and blue
    profile = profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    values = np.array(picture(1, 131, 177))
    clear = Image.fromarray(np.dstack([values, rng.integers(0, 256, values.shape[:2], dtype=np.uint8)]))
    for name, image, options in [
            *((f"turned{k}.jpg", picture(k, 111 + k, 197), {"exif": exif[k], "quality": 90}) for k in (3, 5, 6, 8)),
            ("turned.webp", picture(2, 190, 110), {"exif": exif[7]}), ("turned.png", picture(3, 190, 111), {"exif": exif[6]}),
            ("gray.jpg", picture(4, 300, 401).convert("L"), {}), ("gray.png", picture(5, 401, 300).convert("LA"), {}),
            ("bits.png", picture(6, 150, 175).convert("1"), {}), ("palette.png", picture(7, 222, 331).quantize(13), {}),
            ("clear.png", clear, {}), ("clear.webp", clear, {"exact": True}), ("clear.bmp", clear, {}),
            ("palette.bmp", picture(8, 99, 333).quantize(99), {}), ("square.png", picture(11, 512, 512), {}),
            ("profile.jpg", picture(9, 222, 333), {"icc_profile": profile, "progressive": True}),
            ("profile.png", picture(9, 220, 333), {"icc_profile": profile}), ("wide.png", picture(12, 100, 700), {}),
            ("lossless.webp", picture(10, 40, 33), {"icc_profile": profile, "lossless": True}),
            ("inks.jpg", picture(13, 222, 333).convert("CMYK"), {"quality": 95})]:
        image.save(folder / name, **options)
    deep = np.array(picture(14, 222, 133)).astype(np.uint16) * 256 + rng.integers(0, 256, (222, 133, 3), dtype=np.uint16)
    cv2.imwrite(str(folder / "deep.png"), deep)
    (folder / "interlaced.png").write_bytes(interlaced(values))
    return sorted(folder.iterdir())


def masks_of(page, files: list[Path]) -> tuple[dict[str, np.ndarray], list[dict[str, str]]]:
    """What the page makes of files: masks by name, and the rows of the table, from its archive."""
    page.locator("#clear").click()
    page.set_input_files("#files", files)
    said(page, f"of {len(files)} images segmented")
    with page.expect_download() as download:
        page.locator("#zip").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        rows = list(csv.DictReader(io.StringIO(archive.read("masks.csv").decode())))
        return {name: np.array(Image.open(archive.open(name))) for name in archive.namelist() if name.endswith(".png")}, rows


@browsing
def test_masks_are_the_predictors(page, checkpoint, tmp_path):
    files, predictor = write_pictures(tmp_path), Predictor(checkpoint, device="cpu")
    masks, rows = masks_of(page, files)
    assert len(masks) == len(files) >= 20
    for file, row in zip(files, rows):
        mask, expected = masks.get(f"{file.stem}.png", masks.get(f"{file.name}.png")), predictor(file)
        assert mask.shape == expected.shape and (mask == expected).mean() >= 0.999, file.name
        found = (row["file"], row["width"], row["height"], row["foreground_pixels"], row["problem"])
        assert found == (file.name, str(mask.shape[1]), str(mask.shape[0]), str((mask == 1).sum()), "")


@browsing
def test_bad_files_get_one_sentence_each(page, tmp_path):
    stream = io.BytesIO()
    picture(0, 60, 80).save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:-300])
    picture(0, 60, 80).save(tmp_path / "broken.png")
    content = bytearray((tmp_path / "broken.png").read_bytes())
    content[100:140] = bytes(40)
    (tmp_path / "broken.png").write_bytes(content)
    Image.new("1", (10000, 5000)).save(tmp_path / "huge.png")
    (tmp_path / "words.jpg").write_text("no picture")
    picture(0, 60, 80).save(tmp_path / "moving.webp", save_all=True, append_images=[picture(1, 60, 80)])
    picture(0, 60, 80).save(tmp_path / "good.png")
    masks, rows = masks_of(page, sorted(tmp_path.iterdir()))
    assert list(masks) == ["good.png"]
    for row, words in zip(rows, ("damaged", "damaged", "", "50 million pixels", "animation", "is no JPEG")):
        assert words in row["problem"] and row["problem"].startswith(row["file"] if words else "") and row["problem"].count(". ") == 0
    assert page.locator("#images .problem").count() == 5


@browsing
def test_controls(page):
    """Example, keyboard, threshold, class, phone."""
    page.locator("#clear").click()
    for _ in range(2):
        page.get_by_role("button", name="example.png").click()
    said(page, "2 of 2 images segmented")
    first = page.get_by_role("radio", name="example.png").first
    first.focus()
    page.keyboard.press("ArrowDown")
    playwright.expect(page.get_by_role("radio", name="example (2).png")).to_be_checked()
    playwright.expect(page.locator("#caption")).to_have_text("example (2).png, 90 × 90 pixels")
    area = lambda: int(page.locator("#pixels1").inner_text().replace(",", ""))
    before = area()
    page.locator("#threshold").focus()
    page.keyboard.press("End")
    playwright.expect(page.locator("#limit")).to_have_text("0.99")
    assert area() < before
    with_mask = page.locator("#picture").evaluate("canvas => canvas.toDataURL()")
    page.get_by_role("checkbox", name="foreground").uncheck()
    assert page.locator("#picture").evaluate("canvas => canvas.toDataURL()") != with_mask
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1200, "height": 1000})
    assert page.locator("article h2").text_content() == "A <b>card</b>" and page.locator("article td").count() == 2


@browsing
@pytest.mark.parametrize("changes", [{"resize": "pad", "color": "ycrcb"}, {"channels": 1}, {"size": 96}])
def test_the_network_gets_the_predictors_bytes(page, changes):
    preprocessing = Preprocessing(**{"size": 64, **changes})
    settings = {name: getattr(preprocessing, name) for name in ("size", "resize", "color", "channels")}
    for height, width in ((128, 192), (50, 33), (77, 64), (30, 200)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        flat = np.dstack([pixels, pixels[..., 0]]).ravel().tolist()
        found = page.evaluate("([flat, own, settings]) => Array.from(networkInput(Uint8Array.from(flat), own, settings))",
                              [flat, [height, width], settings])
        expected = normalize(torch.from_numpy(preprocessing.prepare(pixels)).permute(2, 0, 1)[None])
        assert np.array_equal(np.array(found, np.float32), expected.numpy().ravel())


@browsing
@pytest.mark.parametrize("classes, threshold", [(1, 0.3), (2, 0.5), (4, None), (4, 0.6)])
def test_the_network_is_answered_as_by_the_predictor(page, classes, threshold):
    logits = torch.randn(1, classes, 8, 8, generator=torch.Generator().manual_seed(classes)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    maps = class_probabilities(logits)[0].permute(1, 2, 0).numpy()[..., 0 if classes > 2 else 1:]
    for height, width in ((40, 61), (20, 31)):
        filled = [max(1, round(height * 32 / width)), 32]
        found = page.evaluate("([logits, filled, own, settings, limit]) => Array.from("
                              "decide(probabilities(logits, filled, settings), filled, own, settings.classes, limit))",
                              [logits.flatten().tolist(), filled, [height, width], {"size": 32, "classes": classes}, threshold or 0])
        expected = decide(undo_resize(maps, height, width, "pad"), threshold)
        assert (np.array(found).reshape(height, width) == expected).mean() >= 0.999


@browsing
@pytest.mark.parametrize("change, words", [(b"", "Ready"), (b" ", "could not be loaded")])
def test_the_runtime_comes_from_its_address_or_not_at_all(context, exported, runtime, change, words):
    """Served, with the runtime from the content delivery network: what has another checksum is refused."""
    page, asked = context.new_page(), []
    files = {web.CDN + name: runtime[kind] + change for kind, (name, _) in web.RUNTIME_FILES.items()}

    def answer(route):
        asked.append(route.request.url)
        body = files.get(route.request.url, exported.online.read_bytes())
        route.fulfill(body=body, content_type="text/html", headers={"Access-Control-Allow-Origin": "*"})

    page.route(lambda url: url.startswith("https:"), answer)
    page.goto("https://page.example/")
    said(page, words)
    page.close()
    assert asked == ["https://page.example/", *files]


def test_half_weights_are_given_up_where_they_change_the_answer(recorded, monkeypatch):
    monkeypatch.setattr(web, "PARITY", 0.05)
    assert len(web.lighten(*recorded)) < 0.7 * len(recorded[1])
    monkeypatch.setattr(web, "HALF_PARITY", 0)
    assert web.lighten(*recorded) == recorded[1]


def test_another_network_or_the_traces_of_a_machine_are_no_page(recorded):
    model, content, size = recorded
    assert not re.search(rb"/\w+\.py\b", content)  # a path of the code that recorded it
    with pytest.raises(ValueError) as caught:
        web.lighten(QTSeg(**model.config).eval(), content, size)
    one_sentence(caught, "differs from PyTorch's", "nothing was written")


@browsing
def test_look_inside_shows_the_explorers_numbers(page, checkpoint, tmp_path):
    """Stages, blocks, heads and directions at clicked pixels, against `TokenExplorer`; then what is typed, and a phone."""
    picture(1, 300, 401).save(tmp_path / "eyes.png")
    masks_of(page, [tmp_path / "eyes.png"])
    page.get_by_text("Look inside").click()
    playwright.expect(page.locator("#gaze")).to_be_visible(timeout=60_000)
    explorer = TokenExplorer(Predictor(checkpoint, device="cpu"), [tmp_path / "eyes.png"])
    assert web.inside_settings(explorer.network)["heat"] == HEAT[:, 0].tolist()
    text, box = lambda name: page.locator(name).inner_text(), page.locator("#gaze").bounding_box()
    choice = lambda name: page.get_by_role("spinbutton" if name in "xy" else "combobox", name=name, exact=True)
    number = lambda name: int(choice(name).input_value())
    arrows = dict(zip(DIRECTIONS, ("token → features", "features → token")))
    for stage, block, head, token, direction, across, down in [
            (16, 1, "mean", "foreground", DIRECTIONS[0], 0.5, 0.5), (32, 3, 2, "background", DIRECTIONS[1], 0.1, 0.9),
            (8, 1, 8, "foreground", DIRECTIONS[1], 0.4, 0.45), (32, 2, "mean", "foreground", DIRECTIONS[1], 0.99, 0.01),
            (16, 2, 5, "background", DIRECTIONS[0], 0.6, 0.3), (8, "final", 3, "foreground", DIRECTIONS[0], 0.3, 0.7)]:
        for name, value in [("Stride", stage), ("Block", block), ("Head", head), ("Token", token), ("Direction", arrows[direction])]:
            choice(name).select_option(label=str(value))
        page.locator("#gaze").click(position={"x": box["width"] * across, "y": box["height"] * down})
        assert abs(number("x") - 256 * across) < 2 and abs(number("y") - 256 * down) < 2
        explorer.set(stage=stage, block=block, head=head, token=token, direction=direction, x=number("x"), y=number("y"))
        answer, attention = explorer.answer(), explorer.attention()
        for row, name in zip(text("#shares").splitlines(), explorer.tokens, strict=True):
            word, logit, share = row.split("\t")
            assert word == name and abs(float(logit) - answer["logit"][name]) < 0.05
            assert abs(float(share) - answer["attention"][name]) < 1e-3
        found = [float(text(f"#{name}")) for name in ("here", "least", "most")]
        expected = [attention[explorer.y, explorer.x], attention.min(), attention.max()]
        assert np.allclose(found, expected, rtol=0, atol=min(1e-3, 0.01 * attention.max()))
        assert text("#pixel") == f"Class of pixel ({explorer.x}, {explorer.y}): {explorer.answers_to()}"
        found, expected = (re.split(r"(\d+(?:\.\d+)?)", words) for words in (text("#looked"), explorer.looked()))
        assert found[::2] == expected[::2]
        for one, other in zip(found[1::2], expected[1::2]):  # the last digit may differ by one
            assert abs(float(one) - float(other)) < 1.1 * 10 ** -len(other.partition(".")[2])
    choice("x").fill("999")
    page.keyboard.press("Enter")
    assert number("x") == 255
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1200, "height": 1000})
    page.get_by_text("Look inside").click()


@pytest.mark.parametrize("npm, words", [(None, "Node.js"), ("false", "could not download")])
def test_a_missing_runtime_is_one_sentence(monkeypatch, npm, words):
    monkeypatch.setattr(web.shutil, "which", lambda name: npm)
    with pytest.raises(OSError) as caught:
        web.fetch_runtime()
    one_sentence(caught, words)


def test_a_network_without_a_page_is_one_sentence(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "windows")
    stored = json.loads((folder / PREPROCESSING_FILE).read_text())
    (folder / PREPROCESSING_FILE).write_text(json.dumps({**stored, "window": 64}))
    assert main(["export", str(folder), "--web", str(tmp_path / "page")]) == 1
    assert capsys.readouterr().err.endswith("this one has 3 channel(s) and window 64\n")
    assert main(["export", str(folder), "--offline"]) == 1 and "go with --web DIR" in capsys.readouterr().err
