"""`view.mask_explorer`, the widgets that look inside: TokenExplorer, ShapeTracer, LossLab; their numbers against independent computations."""
from __future__ import annotations

import dataclasses
import gc
import json
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from traitlets import TraitError

from qtseg.data.dataset import normalize
from qtseg.data.preprocessing import PREPROCESSING_FILE, Preprocessing
from qtseg.prediction.predictor import Predictor
from qtseg.training.losses import binary_dice_loss, cross_entropy_loss
from qtseg.network.model import QTSeg
from qtseg.data.phantoms import phantom
from qtseg.view.loss_lab import LAB_LOSSES, LossLab, disc_logits, loss_along, push, signed
from qtseg.view.layers import flat
from qtseg.view.shape_tracer import ShapeTracer, trace
from qtseg.view.token_explorer import TokenExplorer, token_steps
from qtseg.view.tokens import STRIDES, decode_image, logits_after, network_input, over_pixels, token_attention


def small(classes: int = 2, seed: int = 0, **options) -> QTSeg:
    torch.manual_seed(seed)
    return QTSeg(classes=classes, **{"width": 4, "depths": [1, 2, 3], "mlp_width": 32, **options}).eval()


def image(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.ascontiguousarray(phantom("endoscopy", seed, max(height, width))[0][:height, :width])


@pytest.fixture(scope="module")
def network() -> QTSeg:
    return small(classes=3)


@pytest.fixture
def explorer(network) -> TokenExplorer:
    return TokenExplorer(network, [image(seed=seed) for seed in range(3)])


def controls(panel, description: str) -> list:
    """The controls of a widget on display that carry a description."""
    found, waiting = [], [panel.view]
    for part in waiting:
        waiting += getattr(part, "children", ())  # grows while it is walked
        found += [part] if getattr(part, "description", None) == description else []
    return found


def picture(panel) -> bytes:
    """All panels and their titles as bytes."""
    return b"".join(one.title.encode() + flat(one).tobytes() for one in panel.panels())


# ---------------------------------------------------------------- what the decoder did
@pytest.mark.parametrize("looked", [0, 1, 2, 3])
@pytest.mark.parametrize("classes", [1, 3])
def test_early_exit_is_the_network_with_silenced_stages(classes, looked):
    """A second network: no blocks in the stages after the exit, and a final attention that adds nothing."""
    whole = small(classes)
    depths = [depth if 2 - place < looked else 0 for place, depth in enumerate(whole.config["depths"])]  # strides 8, 16, 32
    silenced = small(classes, depths=depths)
    silenced.load_state_dict({name: whole.state_dict()[name] for name in silenced.state_dict()})
    for stride in STRIDES[looked:]:
        nn.init.zeros_(silenced.decoder.get_submodule(f"stage{stride}.final_attention.out").weight)
        nn.init.zeros_(silenced.decoder.get_submodule(f"stage{stride}.final_attention.out").bias)
    with torch.inference_mode():
        levels = whole.encode(torch.rand(2, 3, 64, 96) * 2 - 1).bridge
        stages, low_res_logits = whole.decode(levels)
        found = logits_after(looked, whole.decoder, levels, stages)
        assert found.shape == (2, classes, 32, 48)
        torch.testing.assert_close(found, silenced.decode(levels).low_res_logits, atol=1e-5, rtol=1e-5)
        if looked == 3:
            torch.testing.assert_close(found, low_res_logits, atol=1e-5, rtol=0)
        else:
            assert (found - low_res_logits).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 75), (33, 97)])
@pytest.mark.parametrize("classes", [1, 3])
def test_decoded_agrees_with_the_network(classes, height, width):
    whole, picture = small(classes), image(height, width)
    decoded = decode_image(whole, picture)
    with torch.inference_mode():
        logits = whole(normalize(torch.from_numpy(picture).permute(2, 0, 1)[None]))[0]
    np.testing.assert_allclose(decoded.logits, logits.numpy(), atol=1e-5)
    mask = logits.argmax(dim=0) if classes > 1 else logits[0] > 0
    assert (decoded.mask == mask.numpy()).mean() > 0.999 and decoded.mask.dtype == np.uint8
    exits, products = decoded.readings["early exit"], decoded.readings["product"]
    assert len(exits.masks) == 4 and len(products.masks) == 3 and exits.dice[-1] == 100
    for maps in exits.probabilities + products.probabilities:
        assert maps.shape == (max(classes, 2), height, width)
        np.testing.assert_allclose(maps.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("place", range(3))
def test_attention_sums_to_one(network, place):
    stage = decode_image(network, image(64, 96)).stages[place]
    rows, columns = 64 // STRIDES[place], 96 // STRIDES[place]
    for block in (*range(1, len(stage.attention)), "final"):
        for head in ("mean", 1, 8):
            seen = token_attention(stage, 2, block, head)
            assert seen.shape == (rows, columns) and seen.sum() == pytest.approx(1, abs=1e-5)
            if block != "final":
                shares = [token_attention(stage, token, block, head, "feature_to_token") for token in range(3)]
                np.testing.assert_allclose(sum(shares), 1, atol=1e-5)
    one = [token_attention(stage, 1, 1, head) for head in range(1, 9)]
    np.testing.assert_allclose(token_attention(stage, 1, 1, "mean"), np.mean(one, axis=0), atol=1e-6)


def test_over_pixels_repeats_and_cuts():
    maps = np.arange(6).reshape(2, 3)
    spread = over_pixels(maps, 4, 7, 10)
    assert spread.shape == (7, 10) and all(spread[row, column] == maps[row // 4, column // 4] for row in range(7) for column in range(10))


@pytest.mark.parametrize("color", ["rgb", "ycrcb"])
@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_network_input_is_what_the_predictor_sees(network, color, resize):
    """The explorer's last mask must be the predictor's, for every way of preparing an image."""
    preparing = Preprocessing(64, resize, color, ("background", "a", "b"))
    predictor = Predictor(network, preparing, 3, device="cpu")
    picture = image(60, 90)
    rgb, pixels = network_input(predictor, picture)
    expected = torch.from_numpy(preparing.prepare(picture)).permute(2, 0, 1)[None]
    assert torch.equal(pixels, normalize(expected)) and rgb.shape == (64, 64, 3)
    square = decode_image(predictor, rgb)  # a picture of the network's own size: nothing to undo
    assert (square.mask == predictor(rgb)).mean() > 0.999


# ---------------------------------------------------------------- TokenExplorer
def test_the_network_runs_once_per_image(network):
    runs = []
    hook = network.encoder.register_forward_hook(lambda *_: runs.append(1))
    try:
        panel = TokenExplorer(network, [image(seed=seed) for seed in range(10)])
        panel.view
        for stage in STRIDES:
            panel.set(stage=stage, head=3, opacity=0.3, x=5)
        assert len(runs) == 1
        panel.index = 1
        panel.index = 0
        assert len(runs) == 2
        for index in range(10):
            panel.index = index
        assert len(runs) == 10
        panel.index = 0  # dropped long ago
        assert len(runs) == 11
    finally:
        hook.remove()


@pytest.mark.parametrize(("setting", "value"), [("index", 1), ("stage", 32), ("block", 2), ("block", "final"), ("head", 5),
                                                ("direction", "feature_to_token"), ("token", "class 1"), ("reading", "product"),
                                                ("opacity", 0.1), ("x", 3), ("y", 60)])
def test_every_setting_changes_the_picture(explorer, setting, value):
    def seen():
        return picture(explorer), explorer.mark(), token_steps(explorer)
    before = seen()
    explorer.set(**{setting: value})
    assert seen() != before
    explorer.still()


def test_a_network_of_crops_has_no_attention_over_the_whole_image(network):
    predictor = Predictor(network, Preprocessing(96, window=64, class_names=("ground", "one", "two")), 3, device="cpu")
    with pytest.raises(ValueError, match="windows of 64 pixels.*give its `network` instead"):
        TokenExplorer(predictor, image())
    assert TokenExplorer(predictor.network, image(64, 64)).attention().shape == (64, 64)


def test_a_stage_with_fewer_blocks_shows_its_last(explorer):
    explorer.set(stage=32, block=3, direction="feature_to_token")
    assert (explorer.block, explorer.direction) == (3, "feature_to_token")
    explorer.stage = 8
    assert explorer.block == 1
    explorer.block = "final"
    assert explorer.direction == "token_to_feature"  # the final attention knows no other
    bare = TokenExplorer(small(depths=[0, 0, 1]), image())
    bare.stage = 8
    assert bare.block == "final" and "attention" not in bare.answer() and picture(bare) and "logit" in bare.text()


def test_answer_is_the_logit_and_the_shares_of_the_pixel(network):
    panel, picture = TokenExplorer(network, image(50, 75), ["ground", "one", "two"]), image(50, 75)
    panel.set(x=70, y=41, stage=16, block=2, head=4)
    with torch.inference_mode():
        pixels = normalize(torch.from_numpy(picture).permute(2, 0, 1)[None])
        logits, decoding = network(pixels), network.decode(network.encode(pixels))
    answer = panel.answer()
    assert list(answer["logit"]) == ["ground", "one", "two"]
    np.testing.assert_allclose(list(answer["logit"].values()), logits[0, :, 41, 70], atol=1e-4)
    weights = decoding.stages[1].attention[1]["feature_to_token"][0, 3]  # [pixels, tokens]
    np.testing.assert_allclose(list(answer["attention"].values()), weights[41 // 16 * 6 + 70 // 16], atol=1e-5)  # 75 is padded to 96
    highest, second = logits[0, :, 41, 70].topk(2).values
    assert highest - second > 1e-3, "the pixel is clear, so that rounding cannot decide"
    assert panel.answers_to() == ["ground", "one", "two"][int(logits[0, :, 41, 70].argmax())]


def test_focus_is_one_where_attention_is_even(explorer):
    explorer.attention = lambda: np.full((64, 64), 1 / 4096, np.float32)
    for token in explorer.tokens:
        explorer.token = token
        ratio, share = explorer.focus()
        assert share == pytest.approx((explorer.decoded.mask == explorer.names.index(token)).mean())
        assert ratio == pytest.approx(1) if share else np.isnan(ratio)


def test_drags_choose_the_pixel_and_thumbnails_the_stage(explorer):
    [strip] = [part for part in explorer.view.children if hasattr(part, "items")]
    explorer.page.canvas.drag = [1, 1, 3, 3, 48.3, 16.9]
    assert (explorer.x, explorer.y) == (48, 16) and explorer.page.canvas.mark == [48.5, 16.5]
    explorer.page.canvas.drag = [2, 0, 3, 3, -5, 9999]
    assert (explorer.x, explorer.y) == (0, 63)
    strip.chosen = 32
    assert explorer.stage == 32 and [item["title"] for item in strip.items] == ["no stage", "+ stride 32", "+ stride 16", "+ stride 8"]
    assert "<th>no stage</th><th>+ stride 32</th><th>+ stride 16</th><th>+ stride 8</th>" in explorer.text()
    explorer.reading = "product"
    assert "no stage" not in explorer.text() and "<th>+ stride 32</th>" in explorer.text()
    strip.chosen = 0
    assert explorer.stage == 32, "before the first stage there is no attention"
    explorer.stage = 8
    assert strip.chosen == 8


@pytest.mark.parametrize(("key", "setting", "value"), [("ArrowRight", "index", 1), ("ArrowLeft", "index", 2), ("ArrowUp", "stage", 32),
                                                       ("ArrowDown", "stage", 8), ("b", "block", 2), ("h", "head", 1),
                                                       ("t", "token", "background"), ("d", "direction", "feature_to_token")])
def test_keys(explorer, key, setting, value):
    assert key in explorer.CANVAS["hears"]
    explorer.key(key)
    assert getattr(explorer, setting) == value


@pytest.mark.parametrize(("setting", "value"), [("stage", 4), ("block", 4), ("block", 0), ("head", 9), ("token", "lesion"), ("x", 64),
                                                ("index", 3), ("opacity", 1.1), ("direction", "self"), ("reading", "tea leaves")])
def test_impossible_settings_are_refused(explorer, setting, value):
    before = explorer.trait_values()
    with pytest.raises(TraitError, match=setting):
        explorer.set(**{setting: value})
    assert explorer.trait_values() == before


def test_controls_and_settings_follow_each_other(explorer):
    (stride,), (x,), (block,) = (controls(explorer, name) for name in ("stride", "x", "block"))
    shown = dict(explorer.page.canvas.sheets)
    stride.value = 32
    assert explorer.stage == 32 and explorer.page.canvas.sheets != shown
    block.value = 3
    explorer.stage = 8
    assert (stride.value, block.value) == (8, 1)
    explorer.x = 7
    assert x.value == 7


def test_images_of_different_sizes(network):
    panel = TokenExplorer(network, [image(96, 96), image(40, 64)])
    (x,) = controls(panel, "x")
    panel.set(x=95, y=95)
    panel.index = 1
    assert (panel.x, panel.y) == (63, 39) and x.max == 63
    panel.index = 0
    assert x.max == 95 and picture(panel)


def test_a_token_that_wins_nothing_says_so(explorer):
    explorer.decoded.mask[:] = 0
    for direction in ("token_to_feature", "feature_to_token"):
        explorer.direction = direction
        assert "wins no pixel" in explorer.text() and "nan" not in explorer.text()


def test_class_names_must_fit(network):
    with pytest.raises(ValueError, match="3 names"):
        TokenExplorer(network, image(), ["background", "lesion"])


def test_sources_and_images_in_every_form(network, tmp_path):
    """A checkpoint or a run by its path; images as paths, arrays, PIL images, folders."""
    picture, run = image(), tmp_path / "run"
    network.save_pretrained(run / "best_dice")
    settings = Preprocessing(64, "squash", "rgb", ("ground", "one", "two"))
    (run / "best_dice" / PREPROCESSING_FILE).write_text(json.dumps(dataclasses.asdict(settings)))
    (tmp_path / "images").mkdir()
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    expected = TokenExplorer(network, picture).decoded.logits
    sources = [run] * 6 + [str(run / "best_dice")]
    forms = [picture, [picture], Image.fromarray(picture), tmp_path / "images" / "a.png", [str(tmp_path / "images" / "a.png")], tmp_path / "images", picture]
    for source, images in zip(sources, forms, strict=True):
        panel = TokenExplorer(source, images)
        assert panel.names == ("ground", "one", "two")
        np.testing.assert_allclose(panel.decoded.logits, expected, atol=1e-4)
        assert np.array_equal(ShapeTracer(source, images, depth=1).image, picture)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: name a checkpoint"):
        TokenExplorer(tmp_path / "nowhere", picture)
    for widget in (TokenExplorer, ShapeTracer):
        with pytest.raises(ValueError, match="NoneType is nothing to look at"):
            widget(network, None)


@pytest.mark.parametrize("size", ["image.png", np.zeros((8, 8)), None, True, 8, 10**6, 96.0])
def test_loss_lab_takes_a_size_and_says_so(size):
    with pytest.raises(ValueError, match="LossLab draws its own discs: size is the side"):
        LossLab(size)


@pytest.mark.parametrize("source", [nn.Conv2d(3, 2, 1), object()])
def test_a_network_without_tokens_is_refused(source):
    with pytest.raises(ValueError, match="query tokens"):
        TokenExplorer(source, image())


# ---------------------------------------------------------------- ShapeTracer
def test_trace_counts_the_published_network():
    boxes = trace(QTSeg(), torch.zeros(1, 3, 512, 512))
    whole = boxes[0]
    assert (whole.name, whole.depth, whole.shapes, whole.parameters) == ("", 0, [(1, 2, 512, 512)], 9_687_184)
    assert whole.multiply_adds == 2_255_888_896
    parts = [box for box in boxes if box.depth == 1]
    assert [(box.name, box.parameters) for box in parts] == [("encoder", 2_259_536), ("bridge", 279_424), ("decoder", 7_148_224)]
    assert sum(box.multiply_adds for box in parts) == whole.multiply_adds
    by_name = {box.name: box for box in boxes}
    assert by_name["encoder.stage8"].shapes == [(1, 64, 64, 64)] and by_name["bridge"].shapes[2] == (1, 256, 16, 16)
    assert by_name["decoder.stage16"].shapes == [(1, 2, 128), (1, 128, 32, 32), (1, 2, 64)]


@pytest.mark.parametrize("form", ["as built", "naive", "fuse"])
def test_trace_in_every_form(network, form):
    one = network if form == "as built" else getattr(network, form)()
    boxes = trace(one, torch.zeros(2, 3, 64, 64))
    assert boxes[0].shapes == [(2, 3, 64, 64)] and boxes[0].multiply_adds == trace(network, torch.zeros(2, 3, 64, 64))[0].multiply_adds


class Odd(nn.Module):
    """A module called twice, outputs in a dictionary, one output that is no map, a module that is never called."""

    def __init__(self):
        super().__init__()
        self.conv, self.idle = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))

    def forward(self, x):
        y = self.conv(F.relu(self.conv(x)))
        return {"map": y, "rest": (self.pool(y), [y.mean()])}


def test_trace_of_any_module():
    odd = Odd().train()
    boxes = trace(odd, torch.rand(2, 3, 8, 10), depth=1)
    assert [box.name for box in boxes] == ["", "conv", "conv", "pool"]
    assert boxes[0].shapes == [(2, 3, 8, 10), (2, 5), ()] and boxes[3].maps is None and boxes[3].channels == []
    assert boxes[1].multiply_adds == 2 * 3 * 3 * 9 * 80 and boxes[3].multiply_adds == 2 * 3 * 5
    assert boxes[0].multiply_adds == 2 * boxes[1].multiply_adds + boxes[3].multiply_adds
    assert odd.training and not odd._forward_hooks and not odd.conv._forward_hooks  # the original is as it was
    assert all(parameter.requires_grad for parameter in odd.parameters())
    assert [box.name for box in trace(odd, torch.rand(1, 3, 8, 8), depth=2)][-3:] == ["pool.0", "pool.1", "pool.2"]


def test_trace_keeps_the_liveliest_channels():
    conv = nn.Conv2d(3, 40, 1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[[4, 17, 30]] = 1.0
    box = trace(nn.Sequential(conv), torch.rand(2, 3, 6, 5))[1]
    assert box.maps.shape == (16, 6, 5) and {4, 17, 30} <= set(box.channels) and box.channels == sorted(box.channels)
    with torch.no_grad():
        np.testing.assert_array_equal(box.maps.std(axis=(1, 2)) > 0, [channel in (4, 17, 30) for channel in box.channels])


@pytest.mark.parametrize("shape", [(64, 64), (40, 90)])
def test_tracer_shows_every_box(network, shape):
    tracer = ShapeTracer(network, image(*shape), batch=2)
    (slider,) = controls(tracer, "step")[-1:]
    pictures = set()
    for step in range(len(tracer.boxes)):
        tracer.step = step
        pictures.add(picture(tracer))
        assert tracer.boxes[step].kind in tracer.text()
    assert len(pictures) == len(tracer.boxes) and slider.value == tracer.step
    assert tracer.boxes[0].shapes == [(2, 3, *shape)]


def test_tracer_go_click_and_keys(network):
    tracer = ShapeTracer(network, image())
    tracer.go("decoder.mask_head")
    assert tracer.boxes[tracer.step].name == "decoder.mask_head"
    with pytest.raises(ValueError, match="encoder.down8"):
        tracer.go("encoder.down3")
    [strip] = [part for part in tracer.view.children if hasattr(part, "items")]
    assert len(strip.items) == len(tracer.boxes) and strip.chosen == tracer.step
    strip.chosen = 5
    assert tracer.step == 5
    tracer.key("ArrowRight")
    assert tracer.step == 6
    tracer.set(step=0)
    tracer.key("ArrowLeft")
    assert tracer.step == len(tracer.boxes) - 1


def test_tracer_takes_other_models_and_refuses_functions():
    predictor = Predictor(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), Preprocessing(64), 2, device="cpu")
    tracer = ShapeTracer(predictor, image(50, 70))
    assert tracer.boxes[0].shapes == [(1, 2, 64, 64)] and [box.kind for box in tracer.boxes] == ["Sequential", "Conv2d"]
    with pytest.raises(ValueError, match="torch.nn.Module"):
        ShapeTracer(Predictor(lambda images: images[:, :2], Preprocessing(64), 2, device="cpu"), image())


# ---------------------------------------------------------------- LossLab
def test_disc_is_a_disc():
    logits = disc_logits(40, 12, 25, 8, confidence=3, softness=0.5)[0, 0]
    assert logits.shape == (40, 40) and logits.abs().max() <= 3 and float((logits > 0).sum()) == pytest.approx(np.pi * 64, rel=0.05)
    rows, columns = torch.nonzero(logits > 0, as_tuple=True)
    assert float(columns.float().mean() + 0.5) == pytest.approx(12) and float(rows.float().mean() + 0.5) == pytest.approx(25)


@pytest.mark.parametrize("name", LAB_LOSSES)
def test_push_agrees_with_differences(name):
    """Gradient and pull by central differences, in float64."""
    target, place, epsilon = (disc_logits(24, 12, 12, 5) > 0)[0].long(), (9.0, 10.0, 4.0), 1e-4
    one = push(name, target, *place)
    logits = disc_logits(24, *place).double()
    loss = LAB_LOSSES[name]
    assert one.loss == pytest.approx(float(loss(logits, target)), rel=1e-5)
    for row, column in ((10, 9), (12, 14), (2, 3)):
        step = torch.zeros_like(logits)
        step[0, 0, row, column] = epsilon
        slope = float(loss(logits + step, target) - loss(logits - step, target)) / (2 * epsilon)
        assert one.gradient[row, column] == pytest.approx(slope, rel=1e-3, abs=1e-9)
    for axis in range(3):
        moved = [torch.tensor(place, dtype=torch.float64) for _ in range(2)]
        moved[0][axis] += epsilon
        moved[1][axis] -= epsilon
        up, down = (float(loss(disc_logits(24, *one_place).double(), target)) for one_place in moved)
        assert one.pull[axis] == pytest.approx(-(up - down) / (2 * epsilon), rel=1e-2, abs=1e-5)


def test_one_logit_says_what_two_channels_say():
    target = (disc_logits(24, 12, 12, 5) > 0)[0].long()
    logits = disc_logits(24, 9, 10, 4)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    assert push("cross-entropy", target, 9, 10, 4).loss == pytest.approx(float(cross_entropy_loss(two, target)), rel=1e-5)
    assert push("Dice", target, 9, 10, 4).loss == pytest.approx(float(binary_dice_loss(two, target)), rel=1e-5)


@pytest.mark.parametrize("name", LAB_LOSSES)
def test_descent_finds_the_target(name):
    lab = LossLab()
    lab.set(loss=name, x=36.0, y=40.0)
    before = lab.pushes()[name].loss
    lab.descend(60)
    assert lab.pushes()[name].loss < 0.4 * before and np.hypot(lab.x - 48, lab.y - 48) < 1.5
    lab.descend(0)


@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("extreme", [{}, {"target_radius": 0.0}, {"x": 0.0, "y": 0.0, "radius": 1.0}, {"confidence": 20.0, "softness": 0.5}])
def test_lab_draws_and_descends_everywhere(size, extreme):
    lab = LossLab(size)
    lab.set(**extreme)
    shape = [flat(panel).shape for panel in lab.panels()]
    for lab.loss in LAB_LOSSES:
        lab.descend(5)
    assert [flat(panel).shape for panel in lab.panels()] == shape and np.isfinite([lab.x, lab.y, lab.radius]).all() and "nan" not in lab.text()
    lab.still()


def test_lab_drag_wheel_and_keys():
    lab = LossLab()
    before, canvas = picture(lab), lab.view and lab.page.canvas
    canvas.drag = [1, 1, 3, 3, 24, 48]
    assert (lab.x, lab.y) == (24, 48) and picture(lab) != before
    canvas.drag = [2, 5, 3, 3, 5, 5]  # the curves
    assert (lab.x, lab.y) == (24, 48)
    canvas.turns = 3.0
    assert lab.radius == pytest.approx(0.15 * 96 + 3)
    lab.key("ArrowLeft")
    lab.key("-")
    assert (lab.x, lab.radius) == (23, pytest.approx(0.15 * 96 + 2))
    lab.set(x=0.0, radius=48.0)
    lab.key("ArrowLeft")
    canvas.turns = 8.0
    assert (lab.x, lab.radius) == (0, 48)
    before = picture(lab)
    lab.same_scale = True
    assert picture(lab) != before
    with pytest.raises(TraitError, match="radius must be from 1 to 48"):
        lab.radius = 49


def test_losses_along_x_meet_the_current_ones():
    target = (disc_logits(48, 24, 24, 8) > 0)[0].long()
    along = loss_along(48, target, 20.0, 6.0, 4.0, 3.0, points=13)
    for name, values in along.items():
        assert values.shape == (13,) and values[5] == pytest.approx(push(name, target, 20.0, 20.0, 6.0, 4.0, 3.0).loss, rel=1e-5)
        assert values.argmin() == 6  # nearest to the target


def test_signed_colors():
    colors = signed(np.array([[-2.0, -1.0, 0.0, 1.0, 5.0]]), 1.0)[0].astype(int)
    assert (colors[0] == colors[1]).all() and (colors[3] == colors[4]).all() and colors[2].min() > 240
    assert colors[0][2] > colors[0][0] and colors[4][0] > colors[4][2]  # blue below, orange above
    assert (signed(np.zeros((2, 2)), 0.0) > 240).all()


# ---------------------------------------------------------------- all three
def living_widgets() -> int:
    """How many ipywidgets exist in this process, in version 7 and in 8."""
    from ipywidgets.widgets import widget

    gc.collect()
    known = getattr(widget, "_instances", None)
    return len(widget.Widget.widgets if known is None else known)


@pytest.mark.parametrize(("make", "change"), [
    (lambda: TokenExplorer(small(), image()), lambda panel, i: panel.set(x=i % 64, stage=STRIDES[i % 3])),
    (lambda: ShapeTracer(small(), image()), lambda panel, i: panel.set(step=i % len(panel.boxes))),
    (lambda: LossLab(16), lambda panel, i: panel.set(x=i % 16, y=i // 8 % 4)),
], ids=["TokenExplorer", "ShapeTracer", "LossLab"])
def test_updates_leave_nothing_behind(make, change):
    panel = make()
    panel.view
    for i in range(40):  # fills every cache
        change(panel, i)
    widgets = living_widgets()
    tracemalloc.start()
    for i in range(40, 60):  # what is shown now was made since the start
        change(panel, i)
    first = tracemalloc.get_traced_memory()[0]
    for i in range(60, 120):
        change(panel, i)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert living_widgets() == widgets and grown < 300_000, f"{grown} bytes more"
