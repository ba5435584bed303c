"""The annotation loop: which images come next, rounds of training, held-back images, and the notebooks around it."""
from __future__ import annotations

import ast
import json
import re

import cv2
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, run_notebook

from qtseg.data.phantoms import phantom
from qtseg.data.preprocessing import Preprocessing
from qtseg.data.segmentation import SegmentationData
from qtseg.data.simulation import sketched
from qtseg.evaluation.scores import FLIPS
from qtseg.files.text import read_json
from qtseg.network.model import QTSeg
from qtseg.prediction.predictor import Predictor, window_starts
from qtseg.study.doubt import by_doubt, greedy, look
from qtseg.study.rounds import ROUND_FILE, fine_tune, rounds, score_rounds
from qtseg.training.fine_tuning import fit_few
from qtseg.view.album import entropy
from qtseg.view.annotation import Annotation


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    """The checkpoint of a tiny network."""
    return str(QTSeg(width=4, depths=[1, 1, 1], mlp_width=16).save_pretrained(tmp_path_factory.mktemp("start") / "tiny"))


@pytest.fixture
def session(tmp_path) -> Annotation:
    """Eight photographs of 40 x 40 pixels in three classes, six of them annotated; a file that is no picture."""
    (tmp_path / "photos").mkdir()
    for number in range(8):
        cv2.imwrite(str(tmp_path / f"photos/{number}.png"), phantom("endoscopy", number, 40)[0])
    (tmp_path / "photos/broken.png").write_text("no picture")
    session = Annotation(tmp_path / "photos", classes=["background", "one", "two"])
    for number in range(6):
        session.files.save(str(number), phantom("endoscopy", number, 40)[1])
    return session


def test_the_next_image_is_doubtful_and_far_from_those_that_are_known():
    doubt, features = np.array([0.0, 0.9, 0.8, 0.3]), np.array([[0.0], [1.0], [1.2], [5.0]])
    assert greedy(doubt, features, np.array([True, False, False, False])) == [3, 2, 1]
    assert greedy(doubt, features, np.zeros(4, bool))[0] == 1, "nothing is known: doubt alone decides"
    twins = greedy(np.array([0.5, 0.9, 0.9, 0.1]), np.array([[0.0], [1.0], [1.0], [2.0]]), np.array([True, False, False, False]))
    assert twins == [1, 3, 2], "the second of two equal images comes last, however doubtful"
    assert greedy(doubt, features, np.ones(4, bool)) == []


@pytest.mark.parametrize("window, tta", [(None, False), (None, True), (32, False)])
def test_doubt_and_features_of_networks_that_see_windows_or_mirror_images(session, window, tta):
    """A checkpoint of random crops slides a window: its features are the mean over all windows, one row per image."""
    torch.manual_seed(0)
    network, preprocessing = QTSeg(3, width=4, depths=[1, 1, 1], mlp_width=16), Preprocessing(64, class_names=session.classes, window=window)
    predictor = Predictor(network, preprocessing, 3, device="cpu", tta=tta)
    names, doubt, features = look(predictor, session.files.paths)
    assert names == [f"{number}" for number in range(8)]
    pixels, _ = predictor.prepare(session.files.paths["3"])
    [(probabilities, _)] = predictor.through_network([(pixels, None)], 1)
    assert doubt[3] == pytest.approx(entropy(probabilities))
    image, starts = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, window_starts(64, window or 64, 0.25)
    parts = torch.stack([image[:, y:y + (window or 64), x:x + (window or 64)] for y in starts for x in starts])
    if tta:
        parts = torch.cat([parts.flip(sides) for sides in FLIPS])
    with torch.no_grad():
        expected = network.encoder(parts)[-1].mean(dim=(0, 2, 3))
    assert features.shape == (8, len(expected)) and np.allclose(features[3], expected, atol=1e-4)
    assert sorted(by_doubt(predictor, session.files.paths, session.files.rows)[:2]) == ["6", "7"]


def test_a_sketch_moves_the_outline_by_about_the_jitter():
    mask = phantom("endoscopy", 3, 200)[1]
    assert np.array_equal(sketched(mask, 0, 0), mask)
    assert np.array_equal(sketched(mask, 1), sketched(mask, 1)) and not np.array_equal(sketched(mask, 1), sketched(mask, 2))
    half = np.zeros((200, 200), np.uint8)
    half[:, 100:] = 2
    for jitter in (1, 2, 4):
        moved = np.concatenate([(sketched(half, seed, jitter) == 0).sum(axis=1) - 100 for seed in range(20)])
        assert moved.std() == pytest.approx(jitter, rel=0.2) and abs(moved.mean()) < jitter / 2
        assert set(np.unique(sketched(half, 0, jitter))) == {0, 2}


@pytest.mark.parametrize("images", [3, 40])
def test_few_images_train_for_the_given_number_of_steps(images, start, tmp_path):
    pairs = [(np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32), np.uint8))] * images
    data, steps = SegmentationData.from_datasets(pairs, pairs[:1]), []

    class Count:
        after_batch = staticmethod(lambda state: steps.append(state.step))

    fit_few(data, start, 20, [Count()], size=32, runs=str(tmp_path), device="cpu")
    assert 16 <= len(steps) <= 24


def test_rounds_never_train_on_what_is_held_back(session, start):
    folder = session.files.folder
    splits = [row["split"] for row in session.files.rows.values()]
    assert splits == ["train"] * 4 + ["valid", "train"]
    session.files.save("0", session.files.read("0")[1], answered=False)
    fine_tune(folder, start, 10, size=32, device="cpu")
    session.files.save("0", np.zeros((40, 40), np.uint8))
    fine_tune(folder, start, 10, size=32, device="cpu")
    done = rounds(folder)
    assert [path.name for path in done] == ["01", "02"]
    assert [read_json(path / ROUND_FILE)["trained"] for path in done] == [["1", "2", "3", "5"], ["0", "1", "2", "3", "5"]]
    assert all(read_json(path / ROUND_FILE)["held back"] == ["4"] for path in done)
    rows = score_rounds(folder)
    mask, target = Predictor(done[0], device="cpu")(folder / "images/4.png"), session.files.read("4")[1]
    dice = [200 * ((mask == label) & (target == label)).sum() / max((mask == label).sum() + (target == label).sum(), 1) for label in (1, 2)]
    dice = [100.0 if not ((mask == label) | (target == label)).any() else one for label, one in zip((1, 2), dice)]
    assert [row["trained"] for row in rows] == [4, 5] and rows[0]["dice"] == pytest.approx(np.mean(dice), abs=1e-3)


def test_a_round_that_fails_leaves_nothing(session, start):
    class Fail:
        def after_epoch(self, state):
            raise RuntimeError("the lights went out")

    with pytest.raises(RuntimeError, match="lights"):
        fine_tune(session.files.folder, start, 10, [Fail()], size=32, device="cpu")
    assert rounds(session.files.folder) == [] and not any((session.files.folder / "rounds").iterdir())


def test_the_next_images_open_with_a_suggestion(session, start):
    checkpoint = fine_tune(session.files.folder, start, 10, size=32, device="cpu")
    predictor = Predictor(checkpoint, device="cpu")
    order = by_doubt(predictor, session.files.paths, session.files.rows)
    assert sorted(order[:2]) == ["6", "7"] and order[2:] == ["broken"]
    session.names, session.network, session.suggests = [*session.files.rows, *order], predictor, True
    session.go(order[0])
    assert np.array_equal(session.drawing.suggestion, predictor(session.files.paths[order[0]]))
    session.draw("accept")
    assert session.files.rows.keys() >= {order[0]}
    session.go("0")
    assert session.drawing.suggestion is None, "what has an answer needs no suggestion"


def test_annotate_goes_from_masks_to_a_predicted_folder(session, start, tmp_path):
    run_notebook(ROOT / "nbs/experiments/annotate.ipynb", tmp_path / "out.ipynb", images=str(tmp_path / "photos"), start=start, steps=10, size=32)
    shown, folder = (tmp_path / "out.ipynb").read_text(), session.files.folder
    assert "| 1 | 5 | 0.0 |" in shown and "Dice of 1 held back" in shown
    assert {path.name for path in (folder / "predictions/01").glob("?.png")} == {f"{number}.png" for number in range(8)}
    assert (folder / "predictions/01/errors.csv").exists()


def test_the_annotation_study_goes_on_where_it_stopped(start, tmp_path):
    given = dict(data="phantoms:dermoscopy:12", size=32, start=start, counts=[2, 4], steps=10, folder=str(tmp_path / "arms"), cache=str(tmp_path / "cache"))
    name = re.sub(r"[^\w.-]+", "-", f"phantoms:dermoscopy:12-32-10-2.0-{start}-doubt-0") + ".json"
    before = {"images": 2, "dice": 1.0, "next": [5, 1, 0, 7], "core minutes": 0.0, "minutes": 0.0}
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / name).write_text(json.dumps({key: given[key] for key in ("data", "size", "start", "steps")}
                                                     | {"order": "doubt", "seed": 0, "jitter": 2.0, "rows": [before]}))
    run_notebook(ROOT / "nbs/experiments/annotation_study.ipynb", tmp_path / "out.ipynb", **given)
    [path] = (tmp_path / "arms").iterdir()
    first, second = json.loads(path.read_text())["rows"]
    assert first == before and second["images"] == 4 and second["next"] == before["next"]
    assert "1.0 (1.0 to 1.0)" in (tmp_path / "out.ipynb").read_text()


def test_lesson_14_shows_the_annotation_study():
    [cell] = [cell.source for cell in nbformat.read(ROOT / "nbs/14_own_images.ipynb", 4).cells if "\nmeasured = {" in cell.source]
    shown = ast.literal_eval(re.search(r"^measured = (\{.*?^\})", cell, re.DOTALL | re.MULTILINE)[1])
    found = {}
    for path in (ROOT / "results/annotation_study").glob("*.json"):
        one = json.loads(path.read_text())
        arm = f"{'ImageNet' if one['start'] == 'imagenet' else 'scratch'}, {'by doubt' if one['order'] == 'doubt' else 'at random'}"
        for row in one["rows"]:
            found.setdefault(("phantoms" if "phantoms" in one["data"] else "ISIC 2018", arm, row["images"]), []).append(row["dice"])
    said = {(data, arm, count): list(point) for data, arms in shown.items() for arm, points in arms.items() for count, point in zip((5, 20, 100), points)}
    assert said == {key: [round(np.mean(dice), 1), round(np.std(dice, ddof=1), 1)] for key, dice in found.items()}
