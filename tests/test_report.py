"""Reports: numbers against hand, scipy and statsmodels; runs that are missing, damaged or doubtful; tables, figures, the notebook."""
from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused_parameters, run_notebook
from qtseg.files.text import escape
from qtseg.network.model import QTSeg
from qtseg.training.config import TrainConfig

pytest.importorskip("pandas", reason="reports need pandas: pip install pandas")
stats = pytest.importorskip("scipy.stats", reason="reports need scipy: pip install scipy")
multitest = pytest.importorskip("statsmodels.stats.multitest", reason="compares with statsmodels: pip install statsmodels")

from qtseg.study import (drawing, report as study_report, results as study_results, statistics as study_statistics,
                         tables as study_tables)

NOTEBOOK = ROOT / "nbs/experiments/report.ipynb"
TINY = {"width": 4, "depths": [1, 1, 1], "mlp_width": 16}


def write_run(folder: Path, arm: str, seed: int, fold: int | None, dice: float, images: dict | None = None,
              epochs: int = 4, **config) -> None:
    """What a finished run leaves, as `fit` and `run_arm` write it."""
    folder.mkdir(parents=True)
    scores = {"loss": 0.3, "mae": (100 - dice) / 8, "acc": 100 - (100 - dice) / 8, "dice": dice, "iou": 100 * dice / (200 - dice)}
    values = TrainConfig.from_dict({"data": "phantoms:all:40", "size": 32, "seed": seed, "fold": fold, "epochs": epochs, **TINY, **config}).to_dict()
    metrics = {"test": scores, "test_is": "", "valid": scores, "selected_by": "dice", "config": values, "versions": {},
               "train": {"seconds": 10.0 * seed, "images_per_second": 3.0, "epochs": epochs},
               "images": images or {"train": 120, "valid": 30, "test": 0}, "hardware": {"device": "cpu", "processor": "an abacus", "threads": 1}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "fold": fold}))
    rows = [[epoch, 1 / epoch, dice * (1 - 0.5**epoch)] for epoch in range(1, epochs + 1)]
    (folder / "history.csv").write_text("epoch,valid_loss,valid_dice\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))


def write_study(root: Path, dice: dict[tuple, float | None], name: str = "tiny", **options) -> Path:
    """A study's folder: the Dice of each (arm, seed, fold), None for a run that has not begun; the first arm is the reference."""
    folder = root / name
    folder.mkdir(parents=True)
    arms, seeds, folds = (list(dict.fromkeys(key[place] for key in dice)) for place in range(3))
    (folder / "study.json").write_text(json.dumps({
        "study": name, "question": "?", "common": {}, "arms": {arm: {} for arm in arms}, "reference": arms[0], "seeds": seeds,
        "folds": None if folds == [None] else folds}))
    for (arm, seed, fold), value in dice.items():
        if value is not None:
            write_run(folder / (f"{arm}-seed{seed}" + ("" if fold is None else f"-fold{fold}")), arm, seed, fold, value, **options)
    return folder


def by_seed(**arms: list[float | None]) -> dict[tuple, float | None]:
    return {(arm, seed, None): value for arm, values in arms.items() for seed, value in enumerate(values, start=1)}


def priced(frame, *multiply_adds: int):
    """A table as `costs` makes it, without building any network."""
    arms = study_results.summarize(frame)[["study", "arm"]]
    return arms.assign(size=32, parameters=2_000_000, multiply_adds=multiply_adds or 3_000_000_000, latency_low=math.nan, latency_ms=math.nan,
                       latency_high=math.nan, device="an abacus")


def only(table):
    """The single row of a table."""
    assert len(table) == 1
    return table.iloc[0]


# ---- statistics ----

def test_interval_and_test_by_hand_and_by_scipy():
    differences = [2.0, 0.0, 1.0, 3.0, -1.0]  # mean 1, sd sqrt(2.5), standard error sqrt(0.5), t quantile 2.776
    found, expected = study_statistics.paired_interval(differences), stats.ttest_1samp(differences, 0)
    assert (found.n, found.mean) == (5, 1.0) and found.sd == pytest.approx(math.sqrt(2.5))
    assert (found.low, found.high) == (pytest.approx(1 - 2.7764451 * math.sqrt(0.5)), pytest.approx(1 + 2.7764451 * math.sqrt(0.5)))
    assert found.p == pytest.approx(expected.pvalue) and found.low == pytest.approx(expected.confidence_interval(0.95).low)
    assert study_statistics.paired_interval(differences, level=90).high == pytest.approx(expected.confidence_interval(0.90).high)


def test_overlapping_folds_widen_the_interval_by_nadeau_and_bengio():
    naive, corrected = (study_statistics.paired_interval([2.0, 0.0, 1.0, 3.0, -1.0], overlap) for overlap in (0.0, 0.25))
    assert (corrected.high - 1) / (naive.high - 1) == pytest.approx(math.sqrt((1 / 5 + 1 / 4) / (1 / 5))) == pytest.approx(1.5)
    t = 1 / math.sqrt((1 / 5 + 1 / 4) * 2.5)
    assert corrected.p == pytest.approx(2 * stats.t.sf(t, 4)) and corrected.p > naive.p


@pytest.mark.parametrize("differences, low, p", [([1.5], math.nan, math.nan), ([0.0, 0.0, 0.0], 0.0, 1.0), ([0.7, 0.7, 0.7], math.nan, math.nan)])
def test_what_cannot_be_known_is_not_said(differences, low, p):
    found = study_statistics.paired_interval(differences)
    assert (found.low, found.p) == (pytest.approx(low, nan_ok=True), pytest.approx(p, nan_ok=True))


def test_two_differences_give_the_interval_of_12_7_standard_errors():
    found = study_statistics.paired_interval([0.0, 2.0])
    assert found.high - 1 == pytest.approx(12.706205 * 1.0)  # sd sqrt(2), standard error 1


@pytest.mark.parametrize("wrong", [[], [1.0, math.nan], [[1.0, 2.0]]])
def test_no_differences_are_refused(wrong):
    with pytest.raises(ValueError, match="finite numbers"):
        study_statistics.paired_interval(wrong)


@pytest.mark.parametrize("differences, p", [([1.0], 1.0), ([1.0, 2.0], 0.5), ([1.0, 2.0, 4.0], 0.25), ([1.0, -2.0, 4.0], 0.75), ([0.0, 0.0], 1.0),
                                            ([0.1, 0.2, -0.3], 1.0), ([1.0] * 10, 2.0**-9)])
def test_sign_flips_by_hand(differences, p):
    assert study_statistics.sign_flip_p(differences) == p


def test_sign_flips_agree_with_scipy():
    differences = np.random.default_rng(3).normal(0.6, 1, 9)
    found = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert study_statistics.sign_flip_p(differences) == pytest.approx(found.pvalue)
    with pytest.raises(ValueError, match="1 to 20 differences, got 21"):
        study_statistics.sign_flip_p([1.0] * 21)


def test_holm_by_hand_keeps_what_was_not_asked():
    assert study_statistics.holm([0.01, math.nan, 0.04, 0.03]) == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)
    assert np.isnan(study_statistics.holm([math.nan])).all() and study_statistics.holm([]).size == 0


def test_holm_agrees_with_statsmodels():
    p = [*np.random.default_rng(2).uniform(0, 0.1, 6), 0.02, 0.02, 0.5, 0.9]  # ties, and products above 1
    assert study_statistics.holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


# ---- reading ----

def test_runs_are_read_with_what_is_unfinished(tmp_path):
    folder = write_study(tmp_path, by_seed(qtseg=[90.0, 91.0, None], unet=[89.0, None, None]))
    (folder / "unet-seed2").mkdir()
    (folder / "unet-seed3").mkdir()
    (folder / "unet-seed3/error.txt").write_text("RuntimeError: no memory left\n\nTraceback …\n")
    frame = study_results.read_runs(folder)
    assert list(frame.columns) == list(study_results.COLUMNS) and list(frame["state"]) == ["done", "done", "waiting", "done", "unfinished", "failed"]
    first = frame.iloc[0]
    assert (first["study"], first["reference"], first["arm"], first["seed"], first["dice"]) == ("tiny", "qtseg", "qtseg", 1, 90.0)
    assert (first["scored_on"], first["scored_images"], first["seconds"], first["hardware"]) == ("validation", 30, 10.0, "an abacus")
    sentence = study_tables.caveats(frame)[0]
    assert "3 of 6 runs are not finished" in sentence
    assert "qtseg-seed3 (waiting), unet-seed2 (unfinished), unet-seed3 (failed: RuntimeError: no memory left)" in sentence


def test_several_studies_and_runs_that_a_study_no_longer_plans(tmp_path):
    first = write_study(tmp_path, by_seed(qtseg=[90.0, 91.0]), "first")
    write_run(first / "dropped-seed1", "dropped", 1, None, 80.0)
    frame = study_results.read_runs([first, write_study(tmp_path, by_seed(qtseg=[70.0]), "second")])
    assert list(zip(frame["study"], frame["arm"])) == [("first", "qtseg"), ("first", "qtseg"), ("first", "dropped"), ("second", "qtseg")]


def test_every_damaged_file_is_named_at_once(tmp_path):
    folder = write_study(tmp_path, by_seed(qtseg=[90.0, 91.0, 92.0, 93.0]))
    (folder / "qtseg-seed1/metrics.json").write_text("{\"test\": ")
    (folder / "qtseg-seed2/metrics.json").write_text("{\"test\": {\"dice\": 3}}")
    text = (folder / "qtseg-seed3/metrics.json").read_text()
    (folder / "qtseg-seed3/metrics.json").write_text(text.replace('"dice": 92.0', '"dice": NaN'))
    with pytest.raises(ValueError) as error:
        study_results.read_runs(folder)
    for words in ("qtseg-seed1/metrics.json is no JSON that can be read", "qtseg-seed2/metrics.json is damaged (test.mae is missing",
                  "qtseg-seed3/metrics.json is damaged (test.dice should be a finite number, not nan)", "qtseg-seed1 to repeat this run"):
        assert words in str(error.value)
    assert "seed4" not in str(error.value)


DEEP, LONG = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize("name, text", [
    *((name, text) for name in ("study.json", "a-seed1/run.json", "a-seed1/metrics.json") for text in (f'{{"a": {DEEP}', f'{{"a": {LONG}}}', "[1]", "\x00")),
    ("study.json", '{"study": "tiny", "arms": ["a"], "reference": "a", "seeds": [1]}'), ("study.json", '{"study": "tiny", "arms": {"a": {}}, "reference": "a", "seeds": 1}'),
    ("study.json", '{"study": "tiny", "arms": {"../a": {}}, "reference": "../a", "seeds": [1]}'),
    ("study.json", '{"study": "<b>", "arms": {"a": {}}, "reference": "a", "seeds": [1]}'), ("study.json", '{"study": "tiny", "arms": {"a": {}}, "reference": ["a"], "seeds": [1]}'),
    ("study.json", '{"study": "tiny", "arms": {"a": {}}, "reference": "a", "seeds": [%s]}' % ", ".join(map(str, range(20_000)))),
    ("a-seed1/run.json", '{"arm": ["a"], "seed": 1, "fold": null}'), ("a-seed1/run.json", '{"arm": "a", "seed": "1", "fold": null}')])
def test_a_hostile_file_of_a_study_is_one_sentence(tmp_path, name, text):
    folder = write_study(tmp_path, by_seed(a=[90.0]))
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name) as error:
        study_results.read_runs(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize("part, key, value", [("config", "size", "32"), ("train", "seconds", 10**400), ("images", "train", None), ("test", "iou", True),
                                              ("config", "operations", {"flip": 1}), ("selected_by", None, "../../elsewhere"), ("hardware", None, [])])
def test_metrics_with_values_of_another_kind_are_refused(tmp_path, part, key, value):
    folder = write_study(tmp_path, by_seed(a=[90.0]))
    metrics = json.loads((folder / "a-seed1/metrics.json").read_text())
    metrics[part] = metrics[part] | {key: value} if key else value
    (folder / "a-seed1/metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="a-seed1/metrics.json is damaged") as error:
        study_results.read_runs(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_copied_run_and_a_folder_that_is_no_study_are_refused(tmp_path):
    folder = write_study(tmp_path, by_seed(qtseg=[90.0, 91.0]))
    shutil.copytree(folder / "qtseg-seed1", folder / "copy")
    with pytest.raises(ValueError, match="both call themselves qtseg-seed1: delete the copy"):
        study_results.read_runs(folder)
    (folder / "copy/run.json").write_text('{"arm": "qtseg", "seed": 7, "fold": null}')
    with pytest.raises(ValueError, match="is called qtseg-seed7, its metrics.json speaks of seed 1"):
        study_results.read_runs(folder)
    with pytest.raises(FileNotFoundError, match="study.json is missing: name the folder of a study"):
        study_results.read_runs(tmp_path)
    (folder / "study.json").write_text('{"study": "tiny", "arms": {"a": {}}, "reference": "b", "seeds": [1]}')
    with pytest.raises(ValueError, match="reference names the arm 'b', which is not there: a"):
        study_results.read_runs(folder)


def test_nothing_finished_is_one_sentence(tmp_path):
    frame = study_results.read_runs(write_study(tmp_path, by_seed(qtseg=[None, None])))
    for function in (study_results.summarize, study_results.compare, study_results.costs, drawing.draw_runs, drawing.learning_curves):
        with pytest.raises(ValueError, match="none of the 2 runs of tiny is finished"):
            function(frame)


# ---- summary and comparison ----

@pytest.mark.parametrize("dice", [[90.0], [90.0, 91.0], [90.0, 91.0, 95.0]])
def test_summary_of_one_two_and_three_seeds(tmp_path, dice):
    row = only(study_results.summarize(study_results.read_runs(write_study(tmp_path, by_seed(qtseg=dice)))))
    assert (row["n"], row["planned"], row["dice_mean"], row["dice_min"], row["dice_max"]) == (len(dice), len(dice), np.mean(dice), min(dice), max(dice))
    assert row["dice_sd"] == pytest.approx(np.std(dice, ddof=1) if len(dice) > 1 else math.nan, nan_ok=True)
    text = study_tables.summary_rows(study_results.summarize(study_results.read_runs(tmp_path / "tiny")))[1][5]
    assert text == {1: "90.00", 2: "90.50 ± 0.71", 3: "92.00 ± 2.65"}[len(dice)]


def test_seeds_are_the_unit_where_there_is_one_fold(tmp_path):
    ours, theirs, third = [91.0, 92.5, 90.0], [90.0, 90.5, 90.5], [85.0, 85.2, 85.9]
    frame = study_results.read_runs(write_study(tmp_path, by_seed(reference=theirs, ours=ours, third=third)))
    table = study_results.compare(frame).set_index("arm")
    expected = [stats.ttest_rel(values, theirs) for values in (ours, third)]
    assert list(table["unit"]) == ["seed", "seed"] and list(table["n"]) == [3, 3] and list(table["note"]) == ["", ""]
    assert list(table["p"]) == pytest.approx([one.pvalue for one in expected])
    assert table.loc["ours", "low"] == pytest.approx(expected[0].confidence_interval(0.95).low)
    assert list(table["p_holm"]) == pytest.approx(multitest.multipletests([one.pvalue for one in expected], method="holm")[1])
    assert list(table["p_flip_least"]) == [0.25, 0.25] and table.loc["third", "p_flip"] == 0.25
    other = study_results.compare(frame, "third", "mae").set_index("arm")
    assert set(other.index) == {"reference", "ours"} and other.loc["ours", "difference"] == pytest.approx((np.mean(third) - np.mean(ours)) / 8)


def test_folds_are_the_unit_where_there_are_several(tmp_path):
    difficulty, rng = [0.0, -4.0, 3.0, 1.0, -2.0], np.random.default_rng(1)
    dice = {(arm, seed, fold): 85 + difficulty[fold] + (arm == "b") + rng.normal() for arm in "ab" for fold in range(5) for seed in (1, 2, 3)}
    row = only(study_results.compare(study_results.read_runs(write_study(tmp_path, dice))))
    values = [np.mean([dice["b", seed, fold] - dice["a", seed, fold] for seed in (1, 2, 3)]) for fold in range(5)]
    expected = study_statistics.paired_interval(values, 30 / 120)  # held-out images per training image
    assert (row["unit"], row["n"], row["difference"], row["sd"]) == ("fold", 5, pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert (row["low"], row["p"]) == (pytest.approx(expected.low), pytest.approx(expected.p)) and row["p_flip"] == study_statistics.sign_flip_p(values)


def test_pairs_without_a_partner_are_named_and_left_out(tmp_path):
    dice = {(arm, seed, fold): 80.0 + seed + fold + (arm == "b") * fold for arm in "ab" for seed in (1, 2) for fold in (0, 1, 2)}
    dice |= {("a", 2, 1): None, ("b", 1, 2): None, ("b", 2, 2): None}
    row = only(study_results.compare(study_results.read_runs(write_study(tmp_path, dice))))
    assert row["unpaired"] == "b-seed2-fold1, a-seed1-fold2, a-seed2-fold2"
    assert (row["n"], row["difference"]) == (2, 0.5) and row["note"] == "two folds: the interval reaches 12.7 standard errors each way"
    assert row["high"] - 0.5 == pytest.approx(12.706205 * math.sqrt((1 / 2 + 1 / 4) * 0.5))


@pytest.mark.parametrize("reference, other, note, p", [([90.0], [91.0], "a single seed: no interval, no test", math.nan),
                                                       ([90.0, 91.0], [90.0, 91.0], "identical scores", 1.0),
                                                       ([90.0, 91.0], [90.5, 91.5], "the same difference in every seed: no spread to judge by", math.nan),
                                                       ([90.0, None], [None, 91.0], "no pair is finished", math.nan)])
def test_doubtful_comparisons_say_so(tmp_path, reference, other, note, p):
    table = study_results.compare(study_results.read_runs(write_study(tmp_path, by_seed(reference=reference, other=other))))
    row = only(table)
    assert row["note"] == note and row["p"] == pytest.approx(p, nan_ok=True) == pytest.approx(row["p_holm"], nan_ok=True)
    assert study_tables.comparison_rows(table)[1][-1].startswith(note)
    assert drawing.draw_differences(table)._repr_png_().startswith(b"\x89PNG")
    said = study_tables.describe_differences(table)
    assert len(said) == 1 and ("no arm can be tested" in said[0]) == math.isnan(p)


def test_compare_refuses_what_it_cannot_mean(tmp_path):
    first, second = (study_results.read_runs(write_study(tmp_path, by_seed(a=[90.0], b=[91.0]), name)) for name in ("one", "two"))
    for frame, options in ((study_results.read_runs([tmp_path / "one", tmp_path / "two"]), {}), (first, {"reference": "c"}), (second, {"measure": "loss"})):
        with pytest.raises(ValueError, match="compare one study"):
            study_results.compare(frame, **options)


def test_caveats_name_what_is_unlike(tmp_path):
    folder = write_study(tmp_path, {("a", 1, 0): 90.0, ("a", 1, 1): 91.0, ("b", 1, 0): 90.0}, images={"train": 90, "valid": 10, "test": 20})
    write_run(folder / "b-seed1-fold1", "b", 1, 1, 92.0, images={"train": 80, "valid": 10, "test": 20}, epochs=8)
    text = " ".join(study_tables.caveats(study_results.read_runs(folder)))
    for words in ("one seed", "scored on the same test images", "arms differ in epochs (4, 8)", "arms differ in training images (90, 80)"):
        assert words in text
    assert "validation split" not in text and "pixels" not in text and "hardware" not in text


# ---- costs, the paper, tables, files ----

def test_costs_are_those_of_the_networks_that_the_runs_describe(tmp_path):
    folder = write_study(tmp_path, by_seed(a=[90.0, 91.0], b=[92.0]))
    frame = study_results.read_runs(folder)
    table = study_results.costs(frame, rounds=2)
    network = QTSeg(**TINY)
    assert list(table["arm"]) == ["a", "b"] and list(table["size"]) == [32, 32]
    assert set(table["parameters"]) == {sum(p.numel() for p in network.parameters())}
    assert set(table["multiply_adds"]) == {study_results.multiply_adds(network, 32)}
    assert (table["latency_low"] <= table["latency_ms"]).all() and (table["latency_ms"] <= table["latency_high"]).all()
    silent = study_results.costs(frame[frame["arm"] == "a"], 64, rounds=0)
    assert silent["latency_ms"].isna().all() and set(silent["multiply_adds"]) == {study_results.multiply_adds(network, 64)}
    assert study_tables.arm_cost_rows(silent)[1][5] == "not measured"


def test_every_network_has_its_turn_in_every_round():
    turns = []
    networks = {(name,): lambda image, name=name: turns.append((name, tuple(image.shape))) for name in "abc"}
    quartiles = study_results._latencies(networks, 32, torch.device("cpu"), rounds=4)
    assert list(quartiles) == list(networks) and all(0 <= low <= middle <= high for low, middle, high in quartiles.values())
    rounds = ["".join(name for name, _ in turns[start:start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"] and {shape for _, shape in turns} == {(1, 3, 32, 32)}


def test_the_paper_stands_beside_with_what_differs(tmp_path):
    frame = study_results.read_runs([write_study(tmp_path, by_seed(qtseg=[90.0, 92.0]), data="data/bkai_512.zip", epochs=350),
                              write_study(tmp_path, by_seed(qtseg=[50.0]), "phantoms")])
    table = study_tables.beside_published(frame, priced(frame))
    assert list(table["method"]) == [*study_tables.PUBLISHED, "QTSeg v1: qtseg"], "no published row for phantoms"
    published = table.set_index("method").loc["U-Net"]
    assert (published["mae"], published["dice"], published["iou"], published["source"]) == (0.99, 87.25, 81.33, "published, BKAI")
    ours = table.iloc[-1]
    assert (ours["dice"], ours["source"], ours["parameters"], ours["multiply_adds"]) == (91.0, "tiny, 2 runs", 2.0, 3.0)
    assert ours["differs"].split("; ") == ["width 4 instead of 16", "depths [1, 1, 1] instead of [1, 2, 3]", "mlp_width 16 instead of 2048",
                                           "size 32 instead of 512", "encoder not pretrained"]


def test_what_differs_of_an_equal_run_is_nothing_and_isic_counts_its_images():
    paper = TrainConfig().to_dict() | {"encoder_weights": "fpn-nano.pth", "data": "isic2016"}
    assert study_tables.what_differs(paper, {"train": 900, "valid": 0, "test": 379}) == []
    assert study_tables.what_differs(paper, {"train": 1600, "valid": 400, "test": 0}) == ["1600 training and 400 scored images instead of 900 and 379"]
    assert "1 kinds of augmentation instead of 10" in study_tables.what_differs(paper | {"operations": ["vertical_flip"]}, {"train": 900, "valid": 0, "test": 379})


def test_sentences_follow_the_numbers(tmp_path):
    dice = by_seed(a=[90.0, 90.2, 89.9], b=[80.1, 80.3, 80.1], c=[90.3, 90.1, 90.2])
    frame = study_results.read_runs(write_study(tmp_path, dice))
    summary, comparison = study_results.summarize(frame), study_results.compare(frame)
    assert "best mean Dice is c's (90.20 ± 0.10, 3 runs), the worst b's (80.17)" in study_tables.describe_scores(summary)[0]
    assert "0.30 points apart (a): more than the 0.17 points between the best arm and the second, a" in study_tables.describe_scores(summary)[0]
    assert "the best mean MAE is c's" in study_tables.describe_scores(summary, "mae")[0]
    assert study_tables.describe_scores(study_results.summarize(frame[frame["seed"] == 1]))[0] == (
        "tiny: the best mean Dice is c's (90.30, 1 run), the worst b's (80.10). No arm was run twice: how far luck moves a score is unknown.")
    said = study_tables.describe_differences(comparison)[0]
    assert "1 of 2 differences in Dice has p < 0.05 after Holm's correction: b (−9.87 [" in said and "below 0.25" in said
    assert "all arms take 3.00 G" in study_tables.describe_costs(summary, priced(frame))[0]
    said = study_tables.describe_costs(summary, priced(frame, 300_000_000, 10_000_000, 200_000_000))[0]
    assert "run from 10.00 M (b) to 0.300 G (a), 30.0 times as many." in said and said.split("fewer of them: ")[1].startswith("c, b.")
    assert "to 0.110 G (a), 10 % more." in study_tables.describe_costs(summary, priced(frame, 110_000_000, 100_000_000, 100_000_000))[0]
    curves = drawing.learning_curves(frame)
    assert curves["tiny", "a"].shape == (4, 4) and curves["tiny", "a"][0].tolist() == pytest.approx([1, 90.0333 / 2, 89.9 / 2, 90.2 / 2], abs=1e-3)
    assert "between epochs 3 and 4 c rose most, by +5.64 points: training had not ended" in drawing.describe_curves(curves)[0]
    flat = {key: np.column_stack([curve[:, 0], *[np.full(4, 90.0)] * 3]) for key, curve in curves.items()}
    assert "no arm was still rising" in drawing.describe_curves(flat)[0]
    assert "cannot be seen" in drawing.describe_curves({key: curve[:2] for key, curve in curves.items()})[0]


FILES = {*(f"{name}.csv" for name in ("runs", "summary", "comparison", "costs", "published")),
         "report.json", "report.md", "dots.png", "differences.png", "bubble.png", "curves.png"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> study_report.Report:
    """The report of a study of two arms with two seeds each."""
    return study_report.build_report(write_study(tmp_path_factory.mktemp("whole"), by_seed(a=[90.0, 91.0], b_1=[91.0, 93.5])), rounds=1)


def test_a_report_is_written_whole_and_replaces_only_reports(tmp_path, whole, monkeypatch):
    output = tmp_path / "out"
    assert study_report.write_report(whole, output) == output and {path.name for path in output.iterdir()} == FILES
    told = json.loads((output / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["comparison"][0]["difference"] == 1.75 and told["runs"][0]["fold"] is None and told["sentences"] == whole.sentences
    assert [row["arm"] for row in csv.DictReader((output / "runs.csv").open())] == ["a", "a", "b_1", "b_1"]
    text = (output / "report.md").read_text()
    assert all(escape(sentence) in text for part in whole.sentences.values() for sentence in part) and "The paper has no results on this data." in text
    before = (output / "report.md").stat().st_mtime_ns

    def break_off(_):
        raise OSError("disk full")

    monkeypatch.setattr(study_report, "report_markdown", break_off)
    with pytest.raises(OSError, match="disk full"):
        study_report.write_report(whole, output)
    assert {path.name for path in output.iterdir()} == FILES and (output / "report.md").stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing half-written stays"
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").touch()
    with pytest.raises(FileExistsError, match="holds no report"):
        study_report.write_report(whole, tmp_path / "study")


def test_what_the_report_did_not_write_stays_and_what_it_no_longer_writes_goes(tmp_path, whole):
    output = tmp_path / "out"
    study_report.write_report(whole, output)
    (output / "pictures").mkdir()
    (output / "pictures/mine.png").touch()
    (output / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.txt").touch()
    (output / "caught").symlink_to(tmp_path / "elsewhere")
    study_report.write_report(dataclasses.replace(whole, figures={name: figure for name, figure in whole.figures.items() if name != "curves"}), output)
    assert {path.name for path in output.iterdir()} == FILES - {"curves.png"} | {"pictures", "notes.txt", "caught"}
    assert (output / "notes.txt").read_text() == "mine" and (output / "pictures/mine.png").is_file() and (tmp_path / "elsewhere/mine.txt").is_file()


def test_texts_of_a_study_stay_texts_in_markdown_and_in_spreadsheets(tmp_path):
    folder = write_study(tmp_path, by_seed(a=[90.0, 91.0], b=[None, None]))
    (folder / "b-seed1").mkdir()
    (folder / "b-seed1/error.txt").write_text('=HYPERLINK("x") <img src=x onerror=alert(1)> \x1b[2J | [a](javascript:b)\n')
    frame = study_results.read_runs(folder)
    whole = study_report.Report("dice", frame, study_results.summarize(frame), study_results.compare(frame), priced(frame), study_tables.beside_published(frame, priced(frame)),
                          study_tables.caveats(frame), {"scores": study_tables.describe_scores(study_results.summarize(frame)), "differences": [], "costs": [], "curves": []}, {})
    study_report.write_report(whole, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "onerror" in text and "<img" not in text and "](" not in text and "\x1b" not in text
    note = next(row["note"] for row in csv.DictReader((tmp_path / "out/runs.csv").open()) if row["state"] == "failed")
    assert note.startswith("'=HYPERLINK") and note.isprintable()


def test_a_single_arm_is_reported_without_comparison(tmp_path):
    whole = study_report.build_report(write_study(tmp_path, by_seed(a=[90.0])), rounds=0)
    assert set(whole.figures) == {"dots", "bubble", "curves"} and whole.sentences["differences"] == []
    assert "differences.png" not in study_report.report_markdown(whole)


def test_missing_library_is_one_sentence(monkeypatch, tmp_path):
    folder = write_study(tmp_path, by_seed(a=[90.0]))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="a report needs pandas: pip install pandas"):
        study_results.read_runs(folder)


# ---- the notebook ----

def test_notebook_reports_given_studies(tmp_path):
    dice = {(arm, seed, fold): 80.0 + seed + fold * len(arm) for arm in ("qtseg", "conv_decoder") for seed in (1, 2) for fold in (0, 1, 2)}
    folders = [write_study(tmp_path, dice | {("qtseg", 2, 2): None}),
               write_study(tmp_path, by_seed(a=[70.0, 71.0], b=[73.0, 72.5]), "second")]
    run_notebook(NOTEBOOK, tmp_path / "executed.ipynb", studies=[str(folder) for folder in folders], output="out", rounds=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    shown = (tmp_path / "executed.ipynb").read_text()
    assert "qtseg-seed2-fold2 (waiting)" in shown and "make mlflow" in shown and shown.count('"image/png"') == 4


@pytest.mark.parametrize("given, words", [({"study": ["x"], "rounds": "many"}, ("study is an unknown key", "rounds should be a valid integer, not 'many'")),
                                          ({"measure": "loss"}, ("measure should be 'mae', 'acc', 'dice' or 'iou', not 'loss'",))])
def test_notebook_refuses_wrong_parameters(given, words):
    said = refused_parameters(NOTEBOOK, **given)
    assert all(word in said for word in words)
