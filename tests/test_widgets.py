"""The widgets without a browser: state, controls, events, picture bytes; also run against ipywidgets 7.7, which Colab has."""
from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from traitlets import Bool, Enum, Float, Int, TraitError, Tuple, observe, validate

from qtseg.training.augmentation import Augmentation
from qtseg.training.operations import OPERATIONS
from qtseg.data.mask_values import IGNORE
from qtseg.data.preprocessing import Preprocessing
from qtseg.data.segmentation import SegmentationData
from qtseg.evaluation.scores import THRESHOLDS, decide, mask_scores
from qtseg.prediction.folders import predict_files
from qtseg.prediction.predictor import Predictor
from qtseg.data.phantom_sets import write_prepared
from qtseg.data.phantoms import phantom
from qtseg.view.album import SavedPredictions, as_cases, entropy, one_hot
from qtseg.view.canvas import Canvas
from qtseg.view.layers import Layer, Panel, encoded, flat, palette, still
from qtseg.view.mask_explorer import ORDERS, VIEWS, MaskExplorer, explorer_panel
from qtseg.view.playground import KNOBS, AugmentationPlayground
from qtseg.view.viewer import Viewer, some_of, table

ipywidgets = pytest.importorskip("ipywidgets", reason="controls are ipywidgets: pip install ipywidgets anywidget")
pytest.importorskip("anywidget", reason="the canvas needs anywidget: pip install anywidget")


class Toy(Viewer):
    """The smallest widget: one gray picture."""

    CANVAS = {"hears": ["ArrowLeft"], "tool": "drag", "wheel": "turn"}
    level = Float(0.5, min=0, max=1)
    mode = Enum(("a", "b"), "a")
    parts = Tuple(("x",))
    steps = Int(1, min=0, max=3)
    on = Bool(False)
    drawn = 0

    @validate("parts")
    def _known(self, proposal):
        return some_of("parts", proposal["value"], ("x", "y", "z"), least=1)

    @observe("mode")
    def _another(self, change):
        self.set(steps=0)

    def panels(self):
        self.drawn += 1
        return [Panel("gray", [Layer(np.full((20, 30, 3), round(255 * self.level), np.uint8))])]

    def text(self):
        return table(("level", "mode"), [(f"{self.level:.2f}", self.mode)])

    def controls(self, make):
        return [make.row(make.control("FloatSlider", "level", min=0, max=1, step=0.01), make.control("Dropdown", "mode", options=["a", "b"])),
                make.row(*make.toggles("parts", [("X", "x"), ("Y", "y"), ("Z", "z")]), make.control("Checkbox", "on")),
                make.row(make.control("IntSlider", "steps", min=0, max=3), make.button("adjust", "half", self.set_trait, "level", 0.5))], []

    def click(self, panel, x, y):
        self.level = x / 30

    def dragged(self, new, panel, start, now):
        self.heard = new, panel, start, now

    def turned(self, steps):
        self.heard = steps

    def key(self, name):
        self.level = 0.25


def controls(panel) -> dict:
    """Every control of a widget by its description, buttons by their tooltip."""
    found, boxes = {}, [panel.view]
    for box in boxes:
        boxes += getattr(box, "children", ())
        if name := getattr(box, "description", "") or getattr(box, "tooltip", ""):
            found[name] = box
    return found


def shown(panel) -> np.ndarray:
    """The first sheet that the browser was sent."""
    canvas = panel.page.canvas
    data = canvas.sheets[canvas.panels[0]["layers"][0]["parts"][0]["sheet"]]
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def send(widget, /, **message) -> None:
    """What the canvas in the browser sends."""
    widget.view
    widget.page.canvas.receive(message)


# ---- the base

def test_controls_and_attributes_follow_each_other_and_draw_once():
    toy = Toy()
    toy.level = 0.75
    assert toy.drawn == 0, "nothing is drawn before anybody looks"
    found = controls(toy)
    assert toy.drawn == 1 and found["level"].value == 0.75
    found["level"].value = 0.25
    assert toy.level == 0.25 and toy.drawn == 2
    toy.set(level=0.5, mode="b", parts=("z", "x"), on=True)
    assert toy.drawn == 3 and toy.parts == ("x", "z") and toy.steps == 0
    assert (found["level"].value, found["mode"].value, found["Z"].value, found["Y"].value, found["on"].value) == (0.5, "b", True, False, True)
    found["X"].value = False
    assert toy.parts == ("z",)
    found["Z"].value = False
    assert toy.parts == ("z",) and found["Z"].value and "parts must be 1 or more of" in toy.page.line.value, "refused, said, and taken back"
    drawn = toy.drawn
    toy.set(level=0.5)
    found["half"].click()
    assert toy.drawn == drawn, "no change, no picture"
    toy.set(level=np.float32(0.25))
    assert abs(int(shown(toy).mean()) - 64) <= 1 and "0.25" in toy.page.line.value


@pytest.mark.parametrize("change, words", [({"level": 2}, "'level' trait .* should not be greater than 1, but a value of 2.0"), ({"level": "much"}, "'level' trait .* expected a float"),
                                           ({"mode": "c"}, "'mode' trait .* expected any of .*'a', 'b'.*, not .*'c'"), ({"steps": 1.5}, "'steps' trait .* expected an int"),
                                           ({"steps": 4}, "'steps' trait .* should not be greater than 3"), ({"parts": ()}, "parts must be 1 or more of 'x', 'y', 'z'"),
                                           ({"parts": ("q",)}, "parts must be"), ({"on": 3}, "'on' trait .* expected a boolean"), ({"lvl": 1}, "Toy does not have a trait named lvl")])
def test_a_senseless_value_is_refused_and_nothing_changes(change, words):
    toy = Toy()
    before = toy.trait_values()
    with pytest.raises(TraitError, match=words):
        toy.set(**{"mode": "b", **change})
    assert toy.trait_values() == before


def test_the_canvas_reports():
    toy = Toy()
    send(toy, kind="click", panel=0, x=15, y=4)
    assert toy.level == 0.5
    canvas = toy.page.canvas
    canvas.drag = [1, 0, 3, 4, 5, 6]
    assert toy.heard == (True, 0, (3, 4), (5, 6))
    canvas.drag = [1, 0, 3, 4, 7, 6]
    assert toy.heard == (False, 0, (3, 4), (7, 6))
    canvas.turns = 2.0
    canvas.turns = 5.0
    assert toy.heard == 3
    send(toy, kind="key", key="ArrowLeft")
    assert toy.level == 0.25 and abs(int(shown(toy).mean()) - 64) <= 1
    send(toy, kind="click", panel=0, x=45, y=0)
    assert "should not be greater than 1, but a value of 1.5" in toy.page.line.value and toy.level == 0.25, "errors of events are shown"


def test_large_pictures_are_sent_reduced_and_in_detail_where_one_looks():
    rng, canvas = np.random.default_rng(0), Canvas()
    image, mask = rng.integers(0, 256, (1500, 2000, 3), np.uint8), rng.integers(0, 2, (1500, 2000), np.uint8)
    canvas.show([Panel("a", [Layer(image), Layer(mask, palette([1]), 0.5, "mask")])])
    assert canvas.reduced and len(canvas.sheets) == 2 and canvas.panels[0]["size"] == (2000, 1500)
    whole = Image.open(io.BytesIO(canvas.sheets[canvas.panels[0]["layers"][1]["parts"][0]["sheet"]]))
    assert whole.size == (1600, 1200) and whole.mode == "P"
    canvas.zoom, canvas.window = 4.0, [0.25, 0.5, 0.5, 0.75]
    part = canvas.panels[0]["layers"][1]["parts"][1]
    sharp = Image.open(io.BytesIO(canvas.sheets[part["sheet"]]))
    assert part["box"] == (0.25, 0.5, 0.5, 0.75) and np.array_equal(np.asarray(sharp), mask[750:1125, 500:1000]), "the true pixels"
    kept = dict(canvas.sheets)
    canvas.show([Panel("a", [Layer(image), Layer(mask.copy(), palette([1]), 0.2, "mask")])], seen=7)
    assert len(kept.keys() & canvas.sheets.keys()) == 2 and canvas.seen == 7, "the image is not encoded again"


def test_without_ipywidgets_pictures_and_settings_work_and_the_remedy_is_named():
    code = ("import sys; sys.modules['ipywidgets'] = None\nimport numpy as np\nfrom qtseg.view.playground import AugmentationPlayground\n"
            "p = AugmentationPlayground(np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), np.uint8))\np.rotate = 30\nprint(len(p.panels()), p.still().size)\n"
            "try:\n    p.view\nexcept ModuleNotFoundError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "2 (484, 294)" and "pip install ipywidgets anywidget" in done.stdout


def test_a_widget_displays_live_and_as_a_still():
    formatted = pytest.importorskip("IPython.core.formatters").DisplayFormatter().format(Toy())[0]
    assert formatted["application/vnd.jupyter.widget-view+json"]["version_major"] == 2
    assert formatted["image/png"][:4] == b"\x89PNG"
    assert formatted["text/plain"].startswith("Toy(level=0.5, mode='a'")


def test_a_closed_widget_lets_its_parts_go_and_can_be_shown_again():
    toy = Toy()
    first = toy.view
    parts = list(first.children)
    toy.close()
    assert all(part.comm is None for part in (first, *parts))
    toy.level = 0.75
    assert toy.drawn == 1 and toy.view is not first and controls(toy)["level"].value == 0.75


def test_a_sheet_is_a_file_close_to_its_layer():
    picture, mask = phantom("dermoscopy", 0, 128)
    back = cv2.imdecode(np.frombuffer(encoded(Layer(picture)), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert back.shape == picture.shape and np.abs(back.astype(int) - picture).mean() < 3
    colors = palette([1])
    for layer in (Layer(mask, colors), Layer(colors[mask])):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded(layer))).convert("RGBA"))[mask == 1], colors[mask][mask == 1])


def test_the_still_holds_titles_pictures_and_words():
    panel = Panel("<title>", [Layer(np.full((10, 20, 3), 7, np.uint8))])
    bare, worded = still([panel], "", side=200), still([panel], "<b>many</b> words &amp; " * 30, side=200)
    assert bare.size == (200, 118) and worded.size[0] == 200 and worded.size[1] >= 118 + 3 * 18
    assert (np.asarray(bare.convert("RGB"))[20:] == 7).all()


def test_the_still_keeps_the_squares_of_a_legend():
    plain = "a ■ of a file name"
    words = f"<span style='color:rgb(86, 180, 233)'>■</span> true &nbsp; <span style='color:#D55E00'>■</span> false<br>{plain}"
    sheet = np.asarray(still([Panel("", [Layer(np.full((10, 20, 3), 7, np.uint8))])], words, side=300).convert("RGB")).astype(int)
    squares = [np.argwhere(np.abs(sheet - color).max(axis=2) < 4) for color in ((86, 180, 233), (213, 94, 0))]
    assert all(np.ptp(places, axis=0).tolist() == [9, 9] for places in squares), "two squares of 10 x 10 pixels"
    assert squares[0][:, 0].min() == squares[1][:, 0].min() and squares[0][:, 1].max() < squares[1][:, 1].min()


# ---- MaskExplorer

PAIRS = [(image, (mask > 0).astype(np.uint8)) for image, mask in (phantom("dermoscopy", seed, 64) for seed in range(5))]


def smooth(mask: np.ndarray, shift: int) -> np.ndarray:
    chance = cv2.GaussianBlur(np.roll(mask, shift, axis=1).astype(np.float32), (0, 0), 3)
    return np.stack([1 - chance, chance], axis=2)


MAPS = [smooth(mask, shift) for (_, mask), shift in zip(PAIRS, (2, 9, 1, 6, 0))]


@pytest.fixture
def explorer():
    return MaskExplorer(PAIRS, MAPS, ("background", "lesion"))


def test_scores_are_those_of_the_evaluation(explorer):
    for index in range(5):
        for threshold in (0.3, 0.5, 0.77):
            explorer.set(index=index, threshold=threshold)
            expected = mask_scores(decide(MAPS[index], threshold), PAIRS[index][1], 2, surface=False)[1][:, :4]
            assert np.array_equal(explorer.scores[0], expected)
            assert f"<td>lesion</td><td>{expected[0, 2]:.2f}</td>" in explorer.text() and f"threshold {threshold:.2f}" in explorer.text()


def test_jumps(explorer):
    dice = np.array([mask_scores(decide(one, 0.5), mask, 2, surface=False)[1][0, 2] for one, (_, mask) in zip(MAPS, PAIRS)])
    explorer.go("worst")
    assert explorer.index == dice.argmin() and np.allclose(explorer.ranking.dice(0.5), dice)
    explorer.go("best")
    assert explorer.index == dice.argmax()
    explorer.go("uncertain")
    assert explorer.index == np.argmax([entropy(one) for one in MAPS])
    explorer.go(4)
    explorer.go("next")
    assert explorer.index == 0
    explorer.go("previous")
    assert explorer.index == 4
    seen = {explorer.go("random") or explorer.index for _ in range(60)}
    assert seen == set(range(5))
    for nonsense in ("sideways", 5, -1):
        with pytest.raises(TraitError, match="index"):
            explorer.go(nonsense)
    for order, first in zip(ORDERS, (0, dice.argmin(), dice.argmax(), explorer.ranking.sequence("uncertain", None)[0])):
        explorer.order = order
        assert explorer.sequence()[0] == first and sorted(explorer.sequence()) == list(range(5))
    explorer.set(order="worst first", index=int(dice.argmin()))
    explorer.go("next")
    assert explorer.index == dice.argsort()[1]


def test_ranking_follows_the_threshold(explorer):
    explorer.go("worst")
    for threshold in THRESHOLDS[[1, 9, 17]].tolist():
        expected = [mask_scores(decide(one, np.float32(threshold)), mask, 2, surface=False)[1][0, 2] for one, (_, mask) in zip(MAPS, PAIRS)]
        assert np.allclose(explorer.ranking.dice(threshold), expected)


def test_every_view_shows_what_it_should(explorer):
    explorer.set(views=VIEWS, opacity=1.0)
    assert [panel.title for panel in explorer.panels()] == list(VIEWS)
    (image, mask), draw = PAIRS[0], lambda view: flat(explorer_panel(explorer, view))
    target = draw("target")
    assert (target[mask == 1] == (86, 180, 233)).all() and np.array_equal(target[mask == 0], image[mask == 0])
    pictures = [draw(view) for view in VIEWS]
    assert all(not np.array_equal(one, other) for row, one in enumerate(pictures) for other in pictures[:row])
    error, found = draw("error"), explorer.masks[0]
    assert (error[(mask == 1) & (found == 1)] == (86, 180, 233)).all() and (error[(mask == 0) & (found == 1)] == (213, 94, 0)).all()
    assert (error[(mask == 1) & (found == 0)] == (240, 228, 66)).all()
    explorer.style = "contour"
    assert len(draw("target")) > 64 and len(np.unique(explorer_panel(explorer, "target").layers[1].pixels)) == 2, "lines are finer than pixels"
    explorer.set(style="fill", classes=())
    assert np.array_equal(draw("target"), image)


def test_clicks_find_pixels(explorer):
    explorer.view
    explorer.click(1, 15.3, 50.9)
    assert (explorer.row, explorer.column) == (50, 15) and explorer.page.canvas.mark == [15.5, 50.5]
    assert f"RGB {tuple(PAIRS[0][0][50, 15].tolist())}" in explorer.text()
    explorer.click(0, -3, 64)
    assert (explorer.row, explorer.column) == (63, 0)


def test_zoom_is_the_same_in_python_controls_and_browser(explorer):
    found, drawn = controls(explorer), []
    explorer.page.canvas.observe(drawn.append, "sheets")
    explorer.page.canvas.zoom = 4.0  # what the wheel does
    assert explorer.zoom == 4 == found["zoom"].value
    found["x"].value = 0.25
    assert explorer.page.canvas.x == 0.25 and not drawn, "no picture is sent for it"
    near = np.asarray(explorer.still().convert("RGB"))
    explorer.zoom = 1
    assert not np.array_equal(near, np.asarray(explorer.still().convert("RGB"))) and explorer.page.canvas.zoom == 1
    with pytest.raises(TraitError, match="zoom"):
        explorer.zoom = 33


def test_keys_do_what_buttons_do(explorer):
    found = controls(explorer)
    explorer.key("ArrowRight")
    assert explorer.index == 1 == found["image"].value
    found["next image"].click()
    assert explorer.index == 2
    explorer.key("ArrowUp")
    assert explorer.threshold == 0.55 == found["threshold"].value
    explorer.key("w")
    worst = explorer.index
    explorer.index = 0
    found["worst image"].click()
    assert explorer.index == worst
    explorer.key("+")
    explorer.key("c")
    assert explorer.zoom == 1.5 and explorer.style == "contour"
    explorer.key("0")
    assert explorer.zoom == 1
    assert all(explorer.key(name) is None for name in explorer.CANVAS["hears"]), "every key that the canvas passes on is known"
    found["probability"].value = True
    assert explorer.views == VIEWS
    [strip] = [part for part in explorer.view.children if hasattr(part, "items")]
    strip.chosen = 4
    assert explorer.index == 4 and [item["value"] for item in strip.items] == list(range(5))
    found["order"].value = "worst first"
    assert [item["value"] for item in strip.items] == explorer.sequence()


def test_another_image_of_another_size_moves_the_limits():
    tall = np.zeros((40, 20, 3), np.uint8), np.zeros((40, 20), np.uint8)
    explorer = MaskExplorer([PAIRS[0], tall], [PAIRS[0][1], tall[1]])
    found = controls(explorer)
    explorer.set(row=60, column=60)
    explorer.index = 1
    assert (explorer.row, explorer.column) == (-1, -1) and (found["row"].max, found["column"].max) == (39, 19)
    assert "<td>100.00</td>" in explorer.text(), "nothing there, nothing found"
    explorer.index = 0
    assert found["row"].max == 63


def test_networks_run_once_per_image():
    class Counting:
        class_names, calls = ("background", "lesion"), 0

        def probabilities(self, image):
            self.calls += 1
            return MAPS[0]

    model = Counting()
    explorer = MaskExplorer(PAIRS[:1], model)
    explorer.view
    for threshold in (0.2, 0.4, 0.6):
        explorer.set(threshold=threshold, zoom=1 + threshold)
    explorer.go("worst")
    assert model.calls == 1


def test_two_models_three_classes_and_no_target():
    image, mask = phantom("endoscopy", 3, 64)
    names = ("background", "non-neoplastic polyp", "neoplastic polyp")
    explorer = MaskExplorer([(image, mask)], {"first": [mask], "second": [one_hot(np.where(mask == 1, 2, mask), 3)]}, names, size=64)
    assert explorer.most_probable and [panel.title for panel in explorer.panels()][2:4] == ["first: prediction", "first: error"] and len(explorer.panels()) == 8
    assert explorer.scores.shape == (2, 2, 4) and (explorer.scores[0, :, 2] == 100).all() and explorer.scores[1].min() < 100
    assert "<td>first</td><td>non-neoplastic polyp</td><td>100.00</td>" in explorer.text()
    assert "neoplastic polyp" in controls(explorer) and "most probable" in controls(explorer)
    alone = MaskExplorer([(image, None)], [one_hot(mask, 3)], names)
    assert alone.views == ("image", "prediction", "probability") and alone.scores is None and "Dice" not in alone.text()
    alone.views = VIEWS
    assert [panel.title for panel in alone.panels()][1] == "target: not there", "what is not there keeps its place"
    with pytest.raises(ValueError, match="without targets no image is the worst"):
        alone.go("worst")
    with pytest.raises(ValueError, match="a ranking needs a prediction"):
        MaskExplorer([(image, mask)]).go("best")
    with pytest.raises(TraitError, match="order cannot be 'best first': without targets"):
        alone.order = "best first"


def test_names_are_words_not_html():
    explorer = MaskExplorer(PAIRS[:1], {"<b>x": MAPS[:1]}, ("background", "<i>"), size=64)
    explorer.click(0, 10, 30)
    assert "<td>&lt;b&gt;x</td><td>&lt;i&gt;</td>" in explorer.text() and "<i>" not in explorer.text()


@pytest.mark.parametrize("items, predictors, words", [([], None, "nothing to look at"), (PAIRS, MAPS[:2], "5 images need as many predictions, got 2"),
                                                      ([PAIRS[0]], [np.zeros((3, 3), np.uint8)], "the image has (64, 64) pixels, its prediction (3, 3)"),
                                                      ([(PAIRS[0][0], 2 * PAIRS[0][1])], None, "its target holds class 2, the classes are background, foreground")])
def test_what_does_not_fit_is_refused(items, predictors, words):
    with pytest.raises(ValueError) as error:
        MaskExplorer(items, predictors)
    assert words in str(error.value)


class Bright(torch.nn.Module):
    """A network in one line: bright pixels are foreground."""

    def forward(self, images):
        return torch.cat([0 * images[:, :1], 5 * images.mean(1, keepdim=True)], dim=1)


def test_a_split_a_predictor_and_what_it_wrote(tmp_path):
    data = SegmentationData.open(write_prepared(tmp_path / "set", "dermoscopy", 10, 48), size=32, cache=tmp_path / "cache", progress=False)
    predictor = Predictor(Bright(), Preprocessing(size=32, class_names=("background", "lesion")), 2, device="cpu")
    live = MaskExplorer(data.test, predictor)
    assert live.album.class_names == ("background", "lesion")
    assert np.array_equal(live.masks[0], predictor(data.test.paths[0][0])) and np.array_equal(live.target, data.test.original_mask(0))
    folder = tmp_path / "set" / "images"
    predict_files(predictor, folder, tmp_path / "hard", progress=False)
    predict_files(predictor, folder, tmp_path / "soft", progress=False, probability="npz")
    hard, soft = MaskExplorer(tmp_path / "hard"), MaskExplorer(data.test, {"soft": tmp_path / "soft"})
    assert len(hard.album.cases) == 10 and hard.views == ("image", "prediction", "probability")
    row = [case.path for case in hard.album.cases].index(data.test.paths[0][0].absolute())
    hard.index = row
    assert np.array_equal(hard.masks[0], live.masks[0]) and set(np.unique(hard.probabilities[0])) <= {0, 1}
    assert np.allclose(soft.probabilities[0], live.probabilities[0], atol=1e-6)
    assert [case.name for case in as_cases(folder)] == sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match="holds no prediction for"):
        SavedPredictions(tmp_path / "hard").read(tmp_path / "other.png")
    with pytest.raises(ValueError, match="is no folder that qtseg predict wrote"):
        MaskExplorer(folder, folder)


# ---- AugmentationPlayground

@pytest.fixture
def playground():
    image, mask = phantom("endoscopy", 3, 96)
    return AugmentationPlayground(image, mask, size=96)


def test_untouched_it_changes_nothing(playground):
    image, mask = playground.result()
    assert playground.steps() == [] and np.array_equal(image, playground.image) and np.array_equal(mask, playground.mask)
    assert "nothing happens" in playground.text() and "100.0 %" in playground.text()


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_what_the_recipe_draws_can_be_set_by_hand(playground, strength):
    """The sliders can say everything that the recipe can draw, and then give what training would have got."""
    playground.strength, met = strength, set()
    for seed in range(100):
        playground.draw(seed)
        recipe = Augmentation(strength=strength)
        images, masks = recipe(torch.from_numpy(playground.image).permute(2, 0, 1)[None].contiguous(), torch.from_numpy(playground.mask)[None], seed)
        expected = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        image, mask = playground.result()
        assert np.abs(image.astype(int) - expected).max() <= 1 and (mask != masks[0].numpy()).mean() < 1e-3
        met |= {name for name, _ in playground.steps()}
    assert met == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_has_settings_that_do_something(playground, operation):
    for name in KNOBS[operation].settings:
        playground.reset()
        playground.set(**{name: {"vertical_flip": True, "horizontal_flip": True, "scale_x": 2, "scale_y": 2, "rotate": 30, "shear": 20, "gaussian_blur": 2}.get(name, 0.15)})
        assert [step for step, _ in playground.steps()] == [operation]
        image, mask = playground.result()
        assert not np.array_equal(image, playground.image)
        assert np.array_equal(mask, playground.mask) == (OPERATIONS[operation].kind == "photometric")


def test_order_matters_and_reset_restores_it(playground):
    playground.set(scale_x=0.5, rotate=45)
    first = playground.result()[1]
    playground.order = tuple(reversed(playground.order))
    assert (playground.result()[1] != first).any()
    playground.shuffle()
    assert sorted(playground.order) == sorted(OPERATIONS)
    playground.reset()
    assert playground.order == tuple(OPERATIONS) and playground.steps() == []
    with pytest.raises(TraitError, match="each once"):
        playground.order = ("rotate",)


def test_pointer_wheel_keys_and_controls(playground):
    found = controls(playground)
    canvas = playground.page.canvas
    canvas.drag = [1, 0, 10, 10, 34, -14]
    assert (playground.translate_x, playground.translate_y) == (0.25, -0.25) == (found["translate x"].value, found["translate y"].value)
    canvas.drag = [2, 1, 50, 50, 50, 74]
    assert (playground.translate_x, playground.translate_y) == (0.25, 0.0), "a new drag goes on from where the last ended"
    playground.translate_y = -0.25
    canvas.turns = 3.0
    assert playground.rotate == 15 == found["rotate"].value
    found["horizontal flip"].value = True
    assert "horizontal_flip → rotate → translate" in playground.text()
    assert all(playground.key(name) is None for name in playground.CANVAS["hears"])
    found["back to the unchanged image"].click()
    def after() -> bytes:
        return flat(playground.panels()[1]).tobytes()
    before = after()
    pictures = [found["draw"].click() or after() for _ in range(6)]  # the recipe may draw nothing at all
    assert sum(picture != before for picture in pictures) >= 3 and playground.seed >= 6


def test_an_image_and_a_mask_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"an image and its mask must be of one size, got \(8, 8\) and \(8, 9\)"):
        AugmentationPlayground(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), np.uint8))


# ---- what a widget is given

def given(folder: Path) -> dict:
    """One image and its mask in every form that widgets take."""
    image, mask = PAIRS[0]
    folder.mkdir(exist_ok=True)
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.gif")
    return {"arrays": (image, mask), "PIL": (Image.fromarray(image), Image.fromarray(mask)),
            "paths": (folder / "image.png", str(folder / "mask.gif"))}


def test_widgets_take_paths_arrays_pil_images_and_data(tmp_path):
    for name, (image, mask) in given(tmp_path / "forms").items():
        for items in ([(image, mask)], [[image, mask]]):
            explorer = MaskExplorer(items)
            assert np.array_equal(explorer.image, PAIRS[0][0]) and np.array_equal(explorer.target, PAIRS[0][1]), name
        for items in (image, [image], [(image, None)]):
            explorer = MaskExplorer(items)
            assert np.array_equal(explorer.image, PAIRS[0][0]) and explorer.target is None and explorer.views == ("image",)
        playground = AugmentationPlayground(image, mask, size=64)
        assert np.array_equal(playground.image, PAIRS[0][0]) and np.array_equal(playground.mask, PAIRS[0][1])
        with pytest.raises(ValueError, match="needs an image and its mask"):
            AugmentationPlayground(image)
    assert len(as_cases(np.stack([image for image, _ in PAIRS]))) == len(as_cases(iter(PAIRS))) == 5
    assert [case.name for case in as_cases([tmp_path / "forms" / "image.png"])] == ["image.png"]


def test_splits_and_data_sets_are_taken_whole(tmp_path):
    write_prepared(tmp_path / "set", "endoscopy", 16, 64)
    data = SegmentationData.open(tmp_path / "set", classes=3, size=64, progress=False)
    split = data.test or data.valid
    assert [case.name for case in as_cases(data)] == split.ids == [case.name for case in as_cases(split)]
    playground = AugmentationPlayground(data, size=64)
    assert np.array_equal(playground.mask, split.original_mask(0))


@pytest.mark.parametrize("items, words", [
    (None, "NoneType is nothing to look at"), (5, "int is nothing to look at"), ({"a": 1}, "dict is nothing to look at"), (b"x", "bytes is nothing"),
    ([None], "image 0 is a NoneType"), ([3.5], "image 0 is a float"), ([{}], "image 0 is a dict"), ([], "nothing to look at"),
    ("nowhere.png", "nowhere.png is not there"), (np.zeros((8, 8, 3)), "uint8"), ([(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)))], "whole numbers"),
    ([(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))], "whole numbers"),
], ids=str)
def test_everything_else_is_refused_in_one_sentence(items, words):
    for widget in (MaskExplorer, AugmentationPlayground):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            widget(items)
        assert widget is AugmentationPlayground or words in str(caught.value)
        assert "\n" not in str(caught.value) and type(caught.value) in (ValueError, FileNotFoundError)


def test_ignored_pixels_count_nowhere():
    image, mask = PAIRS[0]
    marked = mask.copy()
    marked[:20] = IGNORE
    explorer, cut = (MaskExplorer([(image, target)], [np.roll(mask, 9, 0)]) for target in (marked, mask))
    counted = mask_scores(np.roll(mask, 9, 0)[20:], mask[20:], 2, surface=False)[1][:, :4]
    np.testing.assert_allclose(explorer.scores[0], counted, atol=1e-6)
    explorer.go("worst")
    explorer.set(row=3, column=4, views=("target", "error"))
    assert "<td>target</td><td>ignored</td>" in explorer.text() and len(explorer.panels()) == 2
    assert not np.allclose(explorer.scores, cut.scores)


def test_a_mask_of_too_many_classes_and_names_that_are_code(tmp_path):
    image, mask = PAIRS[0]
    evil = "<img src=x onerror=alert(1)>"
    explorer = MaskExplorer([(image, mask)], {evil: [mask]}, (evil, f"{evil}\x1b[31m"))
    explorer.set(row=3, column=4)
    explorer.album.cases[0] = explorer.album.cases[0]._replace(name=f"{evil}.png")
    assert "<img" not in explorer.text() and "\x1b" not in explorer.text() and "img src=x" in explorer.text()
    explorer.view
    explorer.page.complain(ValueError(evil + "\x07"))
    assert "<img" not in explorer.page.line.value and "\x07" not in explorer.page.line.value
    with pytest.raises(ValueError, match="holds class 7"):
        MaskExplorer([(image, np.full_like(mask, 7))])


@pytest.mark.parametrize("damage", [b"no archive", None, "large", "other"])
def test_damaged_probabilities_are_refused_in_one_sentence(tmp_path, damage):
    image, mask = PAIRS[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    Image.fromarray(mask).save(tmp_path / "out" / "a_mask.png")
    (tmp_path / "out" / "predictions.json").write_text(json.dumps({"images": str(tmp_path), "preprocessing": {"class_names": ["a", "b"]}}))
    (tmp_path / "out" / "predictions.csv").write_text("file,mask\na.png,a_mask.png\n")
    saved, explorer = tmp_path / "out" / "a_mask_probability.npz", MaskExplorer(tmp_path / "out")
    assert np.array_equal(explorer.masks[0], mask)
    if isinstance(damage, bytes):
        saved.write_bytes(damage)
    else:
        shape = {"large": (4000, 4000, 2), "other": (64, 64, 3)}.get(damage, (64, 64, 2))
        np.savez_compressed(saved, **{"other" if damage is None else "probabilities": np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match="a_mask_probability.npz holds .*run qtseg predict again"):
        SavedPredictions(tmp_path / "out").read(tmp_path / "a.png")


# ---- messages that no browser of ours sends

def deep(levels: int = 100_000) -> list:
    nested = []
    for _ in range(levels):
        nested = [nested]
    return nested


CLICK, STROKE = {"kind": "click", "panel": 0}, {"kind": "stroke", "id": 1, "panel": 0, "tool": "brush", "brush": {}, "points": [1, 2, 0.5]}


@pytest.mark.parametrize("message", [
    None, [], "click", 5, {}, {"kind": None}, {"kind": []}, {"kind": "explode"}, {"kind": {"kind": "key"}}, {"kind": deep()},
    {**CLICK, "x": "1", "y": 2}, {**CLICK, "x": float("nan"), "y": 0}, {**CLICK, "x": 1e300, "y": 0}, {**CLICK, "x": None, "y": 0}, {**CLICK, "x": deep(), "y": 0},
    {**CLICK, "x": 1, "y": 2, "panel": -1}, {"kind": "click", "x": 1, "y": 2}, {"kind": "key"}, {"kind": "key", "key": 5}, {"kind": "key", "key": "F1"},
    {"kind": "key", "key": "x" * 10**6}, {**STROKE, "points": []}, {**STROKE, "points": [1, 2]}, {**STROKE, "points": [1, 2, float("inf")]},
    {**STROKE, "tool": "axe"}, {**STROKE, "id": 1.5}, {**STROKE, "brush": None}, {**STROKE, "points": [0] * 300_000},
], ids=range(28))
def test_broken_messages_are_ignored(message):
    heard = []
    Canvas(heard.append).receive(message)
    assert not [one for one in heard if one["kind"] != "key"]
    for panel in (Toy(), AugmentationPlayground(*PAIRS[0])):
        panel.view
        before = panel.trait_values()
        panel.page.canvas.receive(message)
        assert panel.trait_values() == before


def test_messages_with_more_than_wanted_are_heard_and_errors_are_said():
    toy = Toy()
    send(toy, kind="click", panel=0, x=15.0, y=5, more=deep(), shift=1)
    assert toy.level == 0.5
    got = []
    Canvas(got.append).receive(STROKE)
    assert got == [STROKE]
    explorer = MaskExplorer(PAIRS, MAPS)
    explorer.view
    explorer.album.cases[1] = explorer.album.cases[1]._replace(image=lambda: 1 / 0)
    send(explorer, kind="key", key="ArrowRight")
    assert "ZeroDivisionError" in explorer.page.line.value, "what cannot be drawn is said, not raised"


# ---- endurance

@pytest.mark.parametrize("make, moves", [
    (lambda: MaskExplorer(PAIRS, MAPS, size=64),
     [("threshold", 0.3), ("opacity", 0.2), ("zoom", 2.0), ("index", 3), ("style", "both"), ("threshold", 0.6), ("opacity", 0.7), ("zoom", 1.0), ("index", 0), ("style", "fill")]),
    (lambda: AugmentationPlayground(*PAIRS[0], size=64),
     [("rotate", 10), ("scale_x", 1.5), ("lines", True), ("rotate", 0), ("scale_x", 1), ("lines", False)])],
    ids=["explorer", "playground"])
def test_many_updates_leave_nothing_behind(make, moves):
    panel = make()
    registry = getattr(ipywidgets.widgets.widget, "_instances", None)  # ipywidgets 8
    registry = ipywidgets.Widget.widgets if registry is None else registry  # ipywidgets 7
    panel.view

    def state() -> tuple[int, int]:
        gc.collect()
        observers = sum(len(callbacks) for control in controls(panel).values() for kinds in control._trait_notifiers.values() for callbacks in kinds.values())
        return len(registry), observers

    def work(rounds: int) -> None:
        for turn in range(rounds):
            setattr(panel, *moves[turn % len(moves)])

    work(20)
    before = state()
    tracemalloc.start()
    work(30)  # what is shown now was made since the start
    start = tracemalloc.get_traced_memory()[0]
    work(120)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert state() == before, "widgets or observers piled up"
    assert grown < 150_000, f"{grown / 1e6:.2f} MB more after 120 updates"
