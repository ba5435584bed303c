"""`view.figures`, visualization: pixels by an independent computation, colors that stay apart, figures that are whole and alone."""
from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import shared_folder
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from qtseg.view import figures as view_figures, pictures as view_pictures
from qtseg.colors import PREDICTION, TARGET, class_colors, hex_color
from qtseg.data.dataset import Batch
from qtseg.data.preprocessing import outline_masks
from qtseg.evaluation.metrics import confusion_counts
from qtseg.data.phantoms import CLASS_NAMES, phantom
from qtseg.training.callbacks import mask_pictures
from qtseg.training.run_folder import write_history

PIXELS = np.random.default_rng(0)


def noise(height=13, width=17):
    return PIXELS.integers(0, 256, (height, width, 3)).astype(np.uint8)


def labels(height=13, width=17, classes=4):
    return PIXELS.integers(0, classes, (height, width)).astype(np.uint8)


def blobs(seed, size=64):
    """Irregular regions of two classes with holes, some cut by the frame."""
    field = np.random.default_rng(seed).normal(size=(size, size))
    for _ in range(6):
        field = sum(np.roll(field, step, axis) for axis in (0, 1) for step in (-1, 0, 1)) / 6
    high, higher = np.quantile(field, [0.6, 0.85])
    return ((field > high).astype(np.uint8) + (field > higher)).astype(np.uint8)


# ---- overlay

@pytest.mark.parametrize("opacity", [0, 0.25, 0.5, 0.7, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (13, 17), (64, 64)])
def test_overlay_is_the_weighted_mean_where_painted_and_the_image_elsewhere(opacity, shape):
    image, mask = noise(*shape), labels(*shape)
    given = image.copy()
    shown = view_pictures.overlay(image, mask, opacity)
    expected = image.astype(float)
    for y, x in np.argwhere(mask > 0):
        expected[y, x] = (1 - opacity) * expected[y, x] + opacity * np.array(view_pictures.CLASS_COLORS[mask[y, x]])
    assert shown.dtype == np.uint8 and np.abs(shown - expected).max() <= 0.5 + 1e-4
    assert (shown[mask == 0] == image[mask == 0]).all()
    assert (image == given).all(), "the image given is not painted on"
    if opacity == 0:
        assert (shown == image).all()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int32, np.int64, np.uint32])
def test_overlay_takes_any_whole_numbers_and_any_memory_layout(dtype):
    image, mask = noise(20, 30)[::2, ::3], labels(10, 10, 2)
    expected = view_pictures.overlay(np.ascontiguousarray(image), mask)
    assert (view_pictures.overlay(image, mask.astype(dtype)) == expected).all()
    assert (view_pictures.overlay(image, np.asfortranarray(mask.astype(dtype))) == expected).all()


def test_overlay_shows_the_chosen_classes_in_the_chosen_colors():
    image, mask = noise(), labels()
    shown = view_pictures.overlay(image, mask, 1, classes=[2])
    assert (shown[mask == 2] == view_pictures.CLASS_COLORS[2]).all() and (shown[mask != 2] == image[mask != 2]).all()
    shown = view_pictures.overlay(image, mask, 1, colors=[(1, 2, 3), None, (4, 5, 6), (7, 8, 9)])
    assert (shown[mask == 0] == (1, 2, 3)).all() and (shown[mask == 1] == image[mask == 1]).all()
    assert (shown[mask == 3] == (7, 8, 9)).all()
    assert (view_pictures.overlay(image, mask, classes=[]) == image).all()


def test_classes_beyond_the_last_color_begin_again_with_the_first_foreground_class():
    colors = [view_pictures.class_color(label) for label in range(256)]
    assert colors[0] is None and None not in colors[1:]
    assert colors[8] == colors[1] == colors[15] and colors[7] == colors[14] and len(set(colors[1:8])) == 7


BAD = [
    (lambda: view_pictures.overlay(noise().astype(float), labels()), r"image must be a uint8 array .* float64"),
    (lambda: view_pictures.overlay(noise()[:, :, 0], labels()), r"got uint8 \(13, 17\)"),
    (lambda: view_pictures.overlay([[1]], labels()), "got list"),
    (lambda: view_pictures.overlay(noise(), labels(13, 16)), r"mask must be as high .* \(13, 17\), got \(13, 16\)"),
    (lambda: view_pictures.overlay(noise(), labels() / 1.0), "whole numbers .* float64"),
    (lambda: view_pictures.overlay(noise(), labels().astype(int) - 1), "indices 0 to 255, got -1"),
    (lambda: view_pictures.overlay(noise(), labels().astype(int) + 254), "got 254 to 257"),
    (lambda: view_pictures.overlay(noise(), -labels().astype(np.int8)), "indices 0 to 255, got -3"),
    (lambda: view_pictures.overlay(noise(), labels(), colors=[None]), "at least one more"),
    (lambda: view_pictures.error_kinds(labels()[None], labels()[None]), r"target must hold whole numbers \[H, W\], got uint8 \(1, 13, 17\)"),
    (lambda: view_pictures.error_kinds(labels()[:0], labels()[:0]), r"got uint8 \(0, 17\)"),
    (lambda: view_pictures.overlay(noise(), labels(), 1.1), "opacity must lie between 0 and 1, got 1.1"),
    (lambda: view_pictures.overlay(noise(), labels(), float("nan")), "opacity"),
    (lambda: view_pictures.contours(noise()[..., :2], labels()), "image must be"),
    (lambda: view_pictures.contours(noise(), labels(1, 1)), "mask must be as high"),
    (lambda: view_pictures.contours(noise(), labels(), width=0), "width must be"),
    (lambda: view_pictures.error_map(labels(), labels(13, 16)), "prediction must be as high"),
    (lambda: view_pictures.error_map(labels(), labels(), noise(4, 4)), "mask must be as high"),
    (lambda: view_pictures.heat(np.array([[0, 1.5]])), r"rescale\(\) .* from 0 to 1.5"),
    (lambda: view_pictures.heat(np.array([[0, -0.1]])), "finite numbers"),
    (lambda: view_pictures.heat(np.array([[0, np.nan]])), "finite numbers"),
    (lambda: view_pictures.heat(np.zeros(3)), "finite numbers"),
    (lambda: view_pictures.heat(np.zeros((0, 3))), "finite numbers"),
    (lambda: view_pictures.heat(np.zeros((2, 3)), noise(3, 2)), r"\(2, 3\) and image \(3, 2\)"),
    (lambda: view_pictures.tile([], 2), "needs pictures"),
    (lambda: view_pictures.tile([noise()], 0), "column"),
    (lambda: view_pictures.tile([noise(), labels()], 2), "every picture"),
]


@pytest.mark.parametrize("call, sentence", BAD, ids=[sentence for _, sentence in BAD])
def test_what_does_not_fit_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- contours

def border(region):
    """Pixels of the region with a neighbor above, below, left or right that is outside; the frame is outside."""
    padded = np.pad(region, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inner


@pytest.mark.parametrize("seed", range(6))
def test_contours_run_over_the_border_pixels_of_each_class_and_nothing_else(seed):
    image, mask = noise(64, 64), blobs(seed)
    shown = view_pictures.contours(image, mask, (1, 2, 3))
    lines = border(mask == 1) | border(mask == 2)
    assert lines.sum() > 50 and (mask == 2).any()
    assert (shown[lines] == (1, 2, 3)).all() and (shown[~lines] == image[~lines]).all()


def test_contours_in_class_colors_of_chosen_classes_and_of_other_widths():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:20], mask[10:30, 40:50], mask[0, 0] = 1, 9, 1
    image = np.zeros((40, 60, 3), np.uint8)
    shown = view_pictures.contours(image, mask)
    assert (shown[10, 10:20] == view_pictures.CLASS_COLORS[1]).all() and (shown[10, 40:50] == view_pictures.CLASS_COLORS[2]).all()
    assert (shown[0, 0] == view_pictures.CLASS_COLORS[1]).all() and not image.any()
    assert not view_pictures.contours(image, mask, classes=[1])[:, 40:].any()
    wide = view_pictures.contours(image, mask, width=3)
    assert (wide[9:12, 12:18] == view_pictures.CLASS_COLORS[1]).all() and wide.any(2).sum() > 2 * shown.any(2).sum()
    assert (view_pictures.contours(image, np.zeros((40, 60), int)) == image).all()


def test_edges_lie_beside_the_line_and_nowhere_else():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:50] = 1
    image = np.full((40, 60, 3), 90, np.uint8)
    plain, edged = (view_pictures.contours(image, mask, (1, 2, 3), edge=edge) for edge in (0, 2))
    line = (plain == (1, 2, 3)).all(axis=2)
    black = (edged == 0).all(axis=2)
    near = np.zeros_like(line)
    for down in range(-3, 4):
        for right in range(-3, 4):
            near |= np.roll(line, (down, right), (0, 1))
    assert (edged[line] == (1, 2, 3)).all() and black.sum() > 3 * line.sum() and not black[~near].any()
    assert (edged[~near] == 90).all() and (edged[8, 20:40] == 0).all() and (edged[12, 20:40] == 0).all()


def test_outlines_of_target_and_prediction():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:50] = 1
    image = np.full((40, 60, 3), 90, np.uint8)
    both = outline_masks(image, mask, np.roll(mask, 5, 1))
    assert (both[10, 10:13] == TARGET).all() and (both[10, 20:50] == PREDICTION).all() and (image == 90).all()
    assert TARGET == (255, 255, 255) and not (outline_masks(image, mask) == PREDICTION).all(axis=2).any()
    batch = Batch(torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None], ["a"])
    assert (mask_pictures(batch, torch.from_numpy(np.roll(mask, 5, 1))[None].long()) == both).all(), "training draws the same"


# ---- error maps

def test_error_kinds_by_brute_force():
    target, prediction = labels(classes=3), labels(classes=3)
    kinds = view_pictures.error_kinds(target, prediction)
    for t, p, kind in zip(target.flat, prediction.flat, kinds.flat):
        assert kind == (0 if t == p == 0 else 1 if t == p else 2 if t == 0 else 3 if p == 0 else 4)
    assert kinds.dtype == np.uint8 and set(kinds.flat) == {0, 1, 2, 3, 4}


def test_the_error_map_counts_as_the_metrics_do():
    target, prediction = labels(classes=2), labels(classes=2)
    tp, fp, fn, tn = confusion_counts(*(torch.from_numpy(mask.astype(int))[None] for mask in (prediction, target)), 2)[0, 0].tolist()
    shown = view_pictures.error_map(target, prediction)
    counted = [(shown == color).all(2).sum() for color in (*view_pictures.ERROR_COLORS.values(), (0, 0, 0))]
    assert counted == [tp, fp, fn, 0, tn]
    assert (shown == view_pictures.error_map(target.astype(bool), prediction.astype(np.int64))).all()


def test_the_error_map_shows_the_image_in_gray():
    image, target, prediction = noise(), labels(classes=2), labels(classes=2)
    shown = view_pictures.error_map(target, prediction, image)
    right = (target == 0) & (prediction == 0)
    gray = shown[right].astype(int)
    assert (gray == gray[:, :1]).all()
    assert np.abs(gray[:, 0] - image[right] @ [0.299, 0.587, 0.114]).max() < 1.01
    assert (view_pictures.error_map(target, prediction, image, 1)[~right] == view_pictures.error_map(target, prediction)[~right]).all()


# ---- colors

def linear(colors):
    """sRGB 0..255 -> linear light 0..1."""
    share = np.asarray(colors, float) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(light):
    """Linear sRGB [N, 3] -> CIELAB (D65), by the standard's formula."""
    xyz = np.clip(light, 0, 1) @ np.array([[0.4124564, 0.2126729, 0.0193339], [0.3575761, 0.7151522, 0.1191920],
                                           [0.1804375, 0.0721750, 0.9503041]]) / (0.95047, 1, 1.08883)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


EYES = {  # linear RGB as seen; Machado, Oliveira and Fernandes (2009), severity 1
    "common": np.eye(3),
    "protanope": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranope": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanope": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def nearest(colors, eyes):
    seen = lab(linear(colors) @ EYES[eyes].T)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=2)
    return distances[np.triu_indices(len(seen), 1)].min()


@pytest.mark.parametrize("eyes", EYES)
def test_error_colors_stay_apart(eyes):
    assert nearest(list(view_pictures.ERROR_COLORS.values()), eyes) > 25


@pytest.mark.parametrize("eyes", EYES)
def test_the_first_three_classes_stay_apart(eyes):
    assert nearest(view_pictures.CLASS_COLORS[1:4], eyes) > 15
    assert nearest([TARGET, PREDICTION], eyes) > 40, "target and prediction"


def test_the_palette_is_one():
    table = class_colors(10)
    assert table.dtype == np.uint8 and table.shape == (10, 3) and not table[0].any()
    assert [tuple(color) for color in table[1:8].tolist()] == list(view_pictures.CLASS_COLORS[1:]) and (table[8:] == table[1:3]).all()
    assert tuple(table[1].tolist()) == PREDICTION == view_pictures.ERROR_COLORS["true positive"] and hex_color(PREDICTION) == "#56B4E9"
    assert len({tuple(color) for color in class_colors(8).tolist()}) == 8 and class_colors(1).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="at least one class"):
        class_colors(0)
    for wrong in ((1, 2), (0, 0, 256), (-1, 0, 0)):
        with pytest.raises(ValueError, match="a color is red, green and blue"):
            hex_color(wrong)


def test_red_and_green_would_fail_this_test():
    assert nearest([(200, 30, 30), (90, 110, 20)], "deuteranope") < 25 < nearest([(200, 30, 30), (90, 110, 20)], "common")


def test_error_colors_are_told_apart_without_color():
    grays = sorted(np.array(list(view_pictures.ERROR_COLORS.values())) @ [0.299, 0.587, 0.114])
    assert np.diff([0, *grays]).min() > 35
    assert [round(value) for value in grays] == [70, 119, 158, 213]


def test_heat_is_even_and_grows_lighter_for_every_eye():
    table = view_pictures.HEAT[:, 0]
    assert table.shape == (256, 3)
    steps = np.diff(lab(linear(table))[::8, 0])
    assert steps.max() < 1.6 * steps.min()
    for matrix in EYES.values():
        assert np.diff(lab(linear(table) @ matrix.T)[::8, 0]).min() > 0


def test_heat_is_viridis():
    colors = pytest.importorskip("matplotlib", reason="matplotlib is not installed: nothing to compare with").colormaps["viridis"].colors
    assert np.abs(255 * np.array(colors) - view_pictures.HEAT[:, 0]).max() <= 2


def test_heat_paints_by_rounding_and_blends_with_the_gray_image():
    values = np.array([[0, 1, 0.5, 100 / 255, 1 + 1e-6]])
    assert (view_pictures.heat(values)[0] == view_pictures.HEAT[[0, 255, 128, 100, 255], 0]).all()
    image = noise(4, 5)
    shown = view_pictures.heat(np.full((4, 5), 0.5), image, 0.6)
    gray = np.rint(image @ [0.299, 0.587, 0.114])[..., None]
    assert np.abs(shown - (0.4 * gray + 0.6 * view_pictures.HEAT[128, 0])).max() < 1.01


def test_rescale():
    assert view_pictures.rescale(np.array([[-3, 1], [5, -1]])).tolist() == [[0, 0.5], [1, 0.25]]
    assert not view_pictures.rescale(np.full((2, 2), 7)).any()


# ---- composing

@pytest.mark.parametrize("size", [(30, 50), (50, 30), (7, 200), (64, 64), (1, 1)])
def test_fit_to_keeps_the_aspect_and_centers(size):
    image, mask = np.full((*size, 3), 200, np.uint8), np.full(size, 3, np.uint8)
    shown, labeled = view_pictures.fit_to(image, 64, 96), view_pictures.fit_to(mask, 64, 96)
    inside = (shown == 200).all(2)
    assert shown.shape == (64, 96, 3) and labeled.shape == (64, 96) and (inside == (labeled == 3)).all()
    assert (shown[~inside] == view_pictures.GROUND).all() and not labeled[~inside].any()
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert inside.sum() == rows * columns and (rows == 64 or columns == 96)
    assert abs(rows - columns * size[0] / size[1]) <= max(1, size[0] / size[1])
    top, left = np.argwhere(inside)[0]
    assert top == (64 - rows) // 2 and left == (96 - columns) // 2


def test_fit_to_invents_no_classes():
    mask = labels(37, 21, 2) * 7
    assert set(view_pictures.fit_to(mask, 100, 100).flat) == {0, 7} == set(view_pictures.fit_to(mask, 9, 9).flat)


@pytest.mark.parametrize("number, columns, shape", [(1, 3, (10, 8)), (3, 3, (10, 28)), (4, 3, (22, 28)), (4, 1, (46, 8))])
def test_tile_puts_each_picture_in_its_place(number, columns, shape):
    pictures = [noise(10, 8) for _ in range(number)]
    sheet = view_pictures.tile(pictures, columns, gap=2)
    assert sheet.shape == (*shape, 3)
    for place, picture in enumerate(pictures):
        top, left = place // columns * 12, place % columns * 10
        assert (sheet[top:top + 10, left:left + 8] == picture).all()
    assert (view_pictures.tile([noise(10, 8), noise(4, 2)], 2, gap=0)[:3, 8:] == view_pictures.GROUND).all(), "the smaller one stands in the middle"


# ---- figures

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: no figures")
HISTORY = [{"epoch": e, "train_loss": 1 / e, "train_dice": 50.0 + e, **({"valid_loss": 2 / e, "valid_dice": 40.0 + e} if e % 2 else {})}
           for e in range(1, 8)]
IMAGE, MASK = phantom("endoscopy", 3, 96)
OTHER = np.roll(MASK, 7, axis=0)
FIGURES = {
    "show_masks": lambda: view_figures.show_masks(IMAGE, MASK, CLASS_NAMES["endoscopy"]),
    "show_masks without foreground": lambda: view_figures.show_masks(IMAGE, 0 * MASK),
    "show_errors": lambda: view_figures.show_errors(IMAGE, MASK, torch.from_numpy(OTHER)),
    "show_errors, all kinds": lambda: view_figures.show_errors(np.zeros((500, 900, 3), np.uint8), labels(500, 900, 3), labels(500, 900, 3)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_whole_white_and_known_to_no_pyplot(name):
    from matplotlib import pyplot, style
    from matplotlib.figure import Figure

    with style.context("dark_background"):
        figure = FIGURES[name]()
    assert isinstance(figure, Figure) and figure.get_facecolor() == (1, 1, 1, 1) and not pyplot.get_fignums()
    picture = np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"))
    assert (picture[[0, -1]] > 240).mean() > 0.9 and 0.001 < (picture < 128).all(2).mean() < 0.9
    height, width = picture.shape[:2]
    for text in [legend_text for legend in figure.legends for legend_text in legend.get_texts()] + [
            part for axes in figure.axes if axes.get_visible() for part in (axes.title, axes.xaxis.label, axes.yaxis.label)]:
        box = text.get_window_extent()
        assert text.get_text() == "" or (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1), text
        assert np.mean(matplotlib.colors.to_rgb(text.get_color())) < 0.3, "dark text on white"
    assert figure.axes and "image/png" in DisplayFormatter().format(figure)[0], "a notebook shows it, with pyplot (axes) or without"
    pickle.dumps(figure)


def shown_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_show_errors_counts_every_kind():
    kinds = np.bincount(view_pictures.error_kinds(MASK, OTHER).ravel(), minlength=5)
    assert kinds[4] == 0 or len(shown_texts(FIGURES["show_errors"]())) == 4
    binary = view_figures.show_errors(IMAGE, MASK > 0, OTHER > 0)
    counts = np.bincount(view_pictures.error_kinds(MASK > 0, OTHER > 0).ravel(), minlength=4)
    assert shown_texts(binary) == [f"true positive: {counts[1]} px", f"false positive: {counts[2]} px",
                                   f"false negative: {counts[3]} px"]


def test_names_stand_in_figures_letter_by_letter():
    name = "_a$\\frac{$b\x00"  # broken mathematics for matplotlib, and hidden from legends by its first letter
    figure = view_figures.show_masks(IMAGE, (MASK > 0), ["background", name])
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [text.replace(r"\$", "$") for text in shown_texts(figure)] == ["\u200b" + name.replace("\x00", r"\x00")]


def test_show_masks_names_the_classes_that_are_there():
    only = view_figures.show_masks(IMAGE, (MASK > 0) * 2, CLASS_NAMES["endoscopy"])
    assert shown_texts(only) == ["neoplastic polyp"] and shown_texts(view_figures.show_masks(IMAGE, MASK * 0 + 5)) == ["class 5"]
    assert shown_texts(view_figures.show_masks(IMAGE, 0 * MASK)) == ["no foreground"]


# ---- histories

def test_read_history_reads_what_training_wrote(tmp_path):
    write_history(tmp_path / "history.csv", HISTORY)
    assert view_figures.read_history(tmp_path) == HISTORY and "valid_dice" not in view_figures.read_history(tmp_path)[1]


@pytest.mark.parametrize("text", ["", "epoch\n", "a,b\n1,2\n", "epoch,loss\n1,many\n", "epoch,loss\n1,2,3\n",
                                  "epoch,loss\n1,\0\n", "epoch,loss\n1," + "9" * 200_000], ids=range(7))
def test_read_history_names_the_file_and_the_remedy(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="history.csv is missing: name a folder"):
        view_figures.read_history(tmp_path)
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(ValueError, match="history.csv is no training history .*copy the run folder again"):
        view_figures.read_history(tmp_path)


# ---- without matplotlib, and on real images

def test_importing_needs_no_matplotlib_and_figures_say_how_to_get_it():
    code = ("import sys; sys.modules['matplotlib'] = None; from qtseg.view import figures, pictures; import numpy as np\n"
            "picture, mask = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), int)\n"
            "pictures.tile([pictures.overlay(picture, mask), pictures.contours(picture, mask), pictures.error_map(mask, mask), pictures.heat(mask / 2)], 2)\n"
            "try:\n    figures.show_masks(picture, mask)\n"
            "except ModuleNotFoundError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "show_masks needs matplotlib: pip install matplotlib", done.stderr


def test_real_images_of_many_sizes():
    folder = shared_folder() / "data"
    archives = sorted(folder.glob("**/*.zip")) if folder.is_dir() else []
    if not archives:
        pytest.skip(f"{folder} holds no archives: it needs the project's real images")
    seen = 0
    for archive in archives[:4]:
        with zipfile.ZipFile(archive) as file:
            for name in [name for name in file.namelist() if name.lower().endswith((".jpg", ".png", ".jpeg"))][:3]:
                image = np.array(Image.open(io.BytesIO(file.read(name))).convert("RGB"))
                mask = (image[..., 0] > image[..., 0].mean()).astype(np.uint8)
                shown = view_pictures.error_map(mask, np.roll(mask, 9, 1), image)
                assert shown.shape == image.shape == view_pictures.contours(view_pictures.overlay(image, mask), mask, width=2).shape
                assert view_pictures.fit_to(image, 128, 128).shape == (128, 128, 3)
                seen += 1
    assert seen
