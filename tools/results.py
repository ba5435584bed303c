"""Keep what a run found, small enough to commit: `python tools/results.py runs/isic2018_cpu …` copies it to results/.

Numbers, history and curves are kept; pictures of the images are not, because most data sets forbid handing them on. A folder that
report.ipynb wrote goes to results/studies/, together with the numbers of the study's runs, so that the study can go on from there;
one of benchmark.ipynb goes to results/benchmarks/. `make sync` turns their JSON files into tables on the front page and in
results/README.md.
"""
from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qtseg.study.tables import COUNTERPARTS, DATA_SETS, PUBLISHED, what_differs

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # what train.ipynb, report.ipynb or benchmark.ipynb writes -> where it goes, what is kept
    "metrics.json": ("results", ("metrics.json", "history.csv", "curves.png", "dice.png")),
    "report.json": ("results/studies", ("report.md", "report.json", "runs.csv", "summary.csv", "comparison.csv", "costs.csv", "dots.png",
                                        "differences.png", "bubble.png", "curves.png")),
    "benchmark.json": ("results/benchmarks", ("benchmark.json", "inference.png", "training.png", "growth.png")),
}
RUN = ("run.json", "metrics.json", "history.csv")  # of each run of a study, in results/studies/STUDY/runs/RUN
CASES = (("inference", 512, 1), ("inference", 512, 4), ("training", 512, 4), ("training", 256, 8))  # of the speed table
SHORT = ("data", "network", "Dice", "IoU", "epochs", "minutes")  # columns on the front page
LONG = ("data", "split", "scored", "network", "size", "epochs", "Dice", "IoU", "minutes", "images/s", "hardware", "files")  # in results/README.md
DATA = {"demo": ("phantoms of all four families", "70 % train, 15 % validate, 15 % test"),  # first word of a run's name -> what it was trained on, how that was split
        "isic2018": ("ISIC 2018, skin lesions", "1600 train, 400 validate"),
        "bkai": ("BKAI-IGH NeoPolyp, polyps", "folds 0–2 train, fold 3 validates"),
        "dsb2018": ("Data Science Bowl 2018, nuclei", "folds 0–2 train, fold 3 validates")}
NETWORKS, ENCODERS = {"qtseg": "QTSeg", "unet": "U-Net"}, {"fpn": "", "efficientnet_lite0": ", EfficientNet-Lite0"}
STUDIES = ("bkai_lite0_192", "isic2018_128", "versions_phantoms")  # in results/README.md; results/studies holds all


def keep(folder: Path, root: Path = ROOT) -> Path:
    """Copy a finished run's, report's or benchmark's numbers and figures to results/; SystemExit names what is missing."""
    place, kept = next((kind for name, kind in KINDS.items() if (folder / name).is_file()), KINDS["metrics.json"])
    if (folder / "benchmark.json").is_file():  # a benchmark of some sections draws some of the figures
        kept = [name for name in kept if (folder / name).is_file()]
    missing = [name for name in kept if not (folder / name).is_file()]
    if missing:
        sys.exit(f"{folder} is no finished folder of train.ipynb, report.ipynb or benchmark.ipynb: {', '.join(missing)} missing")
    target = root / place / folder.name
    target.mkdir(parents=True, exist_ok=True)
    for name in kept:
        shutil.copyfile(folder / name, target / name)
    if place == "results/studies":
        keep_runs(json.loads((folder / "report.json").read_text(encoding="utf-8"))["runs"], target / "runs")
    return target


def keep_runs(runs: Sequence[dict], target: Path) -> None:
    """Copy the numbers of a study's finished runs, and its study.json: `cp -r` to RUNS/STUDY, and `qtseg study` goes on."""
    for run in (Path(row["folder"]) for row in runs if row["state"] == "done"):
        (target / run.name).mkdir(parents=True, exist_ok=True)
        for name in RUN:
            shutil.copyfile(run / name, target / run.name / name)
        shutil.copyfile(run.parent / "study.json", target / "study.json")


def machine(hardware: dict) -> str:
    """What a run or a benchmark was computed on; a benchmark also names the processor's instructions."""
    name = hardware["processor"] if hardware["device"] == "cpu" else hardware["device"]
    return ", ".join(filter(None, [name, f"{hardware['cores']} cores", hardware.get("instructions")]))


def table(columns: Sequence[str] = LONG, root: Path = ROOT) -> str:
    """The results as a Markdown table: a row for each run in results/, without further seeds in the short one. Links start from results/."""
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for path in sorted((root / "results").glob("*/metrics.json")):
        m, name = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        recipe, _, seed = name.partition("_seed")  # the name of its parameter file
        if seed and columns == SHORT:
            continue
        c, train, scored = m["config"], m["train"], "test" if m["images"]["test"] else "validation"
        model, encoder = c.get("model", "qtseg"), c.get("encoder", "fpn")
        data, split = DATA.get(recipe.partition("_")[0], (name, ""))
        cells = {
            "data": data, "split": split,
            "network": NETWORKS.get(model, model) + ENCODERS.get(encoder, f", {encoder} encoder") + (", version 2" if c["decoder"] == "dma" else "")
                       + (", ImageNet weights" if c["encoder_weights"] else ", from scratch") + (f", seed {seed}" if seed else ""),
            "scored": f"{scored}, {m['images']['test'] or m['images']['valid']} images", "size": f"{c['size']}²",
            "epochs": train["epochs"], "Dice": f"{m['test']['dice']:.2f}", "IoU": f"{m['test']['iou']:.2f}",
            "minutes": f"{train['seconds'] / 60:.0f}", "images/s": f"{train['images_per_second']:.1f}",
            "hardware": machine(m["hardware"]),
            "files": f"[parameters](../nbs/experiments/params/{recipe}.yaml), [scores]({name}/metrics.json), [curves]({name}/curves.png), "
                     f"[Dice of every image]({name}/dice.png)"}
        rows.append(f"| {' | '.join(str(cells[column]) for column in columns)} |")
    return "\n".join(rows)


def paper_table(root: Path = ROOT) -> str:
    """Every run beside the paper's result of its network on that data set, as a Markdown table, with what differs."""
    rows = ["| data | run | Dice, IoU | the paper's | what differs from the paper's experiment |", "|---|---|---|---|---|"]
    for path in sorted((root / "results").glob("*/metrics.json")):
        m = json.loads(path.read_text(encoding="utf-8"))
        data = next((word for word in DATA_SETS if path.parent.name.startswith(word)), None)
        if data is None or "_seed" in path.parent.name:
            continue
        ours = m["config"].get("model", "qtseg") == "qtseg"
        method = "QTSeg v2" if ours else COUNTERPARTS[m["config"]["model"]]
        _, dice, iou = PUBLISHED[method][data]
        differs = ["version 1"] * (ours and m["config"]["decoder"] == "mqm") + what_differs({**m["config"], "decoder": "mqm"}, m["images"])
        rows.append(f"| {DATA[path.parent.name.partition('_')[0]][0]} | `{path.parent.name}` | {m['test']['dice']:.2f}, {m['test']['iou']:.2f} "
                    f"| {method}, {DATA_SETS[data]}: {dice:.2f}, {iou:.2f} | {'; '.join(differs)} |")
    return "\n".join(rows)


def study_table(root: Path = ROOT) -> str:
    """STUDIES as a Markdown table: a row for each arm, its difference from the reference beside it."""
    rows = ["| study, arm | runs | Dice | difference, 95 % interval | p (Holm) | multiply-adds | ms an image |", "|---|---|---|---|---|---|---|"]
    for name in STUDIES:
        report = json.loads((root / "results/studies" / name / "report.json").read_text(encoding="utf-8"))
        differences = {row["arm"]: row for row in report["comparison"]}
        costs = {row["arm"]: row for row in report["costs"]}
        for row in report["summary"]:
            difference, cost = differences.get(row["arm"]), costs[row["arm"]]
            apart, spread = "reference | ", f" ± {row['dice_sd']:.2f}" if row["n"] > 1 else ""
            if difference:
                apart = f"{difference['difference']:+.2f}" + (
                    f" [{difference['low']:+.2f}, {difference['high']:+.2f}] | {difference['p_holm']:.2f}" if difference["n"] > 1 else " | ")
            rows.append(f"| [{name}](studies/{name}/report.md), {row['arm']} | {row['n']} | {row['dice_mean']:.2f}{spread} "
                        f"| {apart} | {cost['multiply_adds'] / 1e9:.2f} G | {cost['latency_ms']:.1f} |")
    return "\n".join(rows)


def times_table(rows: Sequence[dict]) -> str:
    """Milliseconds of each network, and how many times as fast it is as the naive one there; the largest differences of logits below."""
    lines, measured, apart = [], {}, {"float32": [], "bf16": []}
    for row in rows:
        if row["section"] in ("inference", "training") and "ms" in row:
            measured.setdefault(row["name"], {})[row["section"], row["size"], row["batch"]] = row
            if "difference" in row:
                apart["bf16" if row["name"].endswith("bf16") else "float32"].append(row["difference"])
    for name, cases in measured.items():
        cells = [f"{cases[case]['ms']:.0f} ms, {cases[case]['times_as_fast']:.2f}×" if case in cases else "" for case in CASES]
        memory = cases.get(("training", 512, 4), {}).get("memory_mb")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} | {'' if memory is None else f'{memory:.0f} MB'} |")
    if not lines:
        return ""
    head = ["| network | " + " | ".join(f"{section} {batch} × {size}²" for section, size, batch in CASES) + " | memory of a step 4 × 512² |", "|---" * (len(CASES) + 2) + "|"]
    differences = ", ".join(f"{max(values):.0e} in {name}" for name, values in apart.items() if values)
    return "\n".join([*head, *lines]) + f"\n\nLargest difference of a logit from the naive network's: {differences}."


def claims_table(claims: Sequence[dict]) -> str:
    """What a benchmark measured of the claims, beside their bars."""
    lines = ["| claim | measured | bar | |", "|---|---|---|---|"]
    for one in claims:
        if (value := one["measured"]) is not None:
            less, bar = one["less_is_better"], one["bar"]
            lines.append(f"| {one['claim']} | {value:.2f} | {'≤' if less else '≥'} {bar} | {'reached' if (value <= bar if less else value >= bar) else '**missed**'} |")
    return "\n".join(lines) if lines[2:] else ""


def busy_table(rows: Sequence[dict]) -> str:
    """Times beside busy processes, and in brackets how many times as long as the fair share of the best idle time."""
    found = {(row["job"], row["name"], row["neighbors"]): row for row in rows if row["section"] == "busy" and row.get("over_fair_share")}
    levels = sorted({neighbors for _, _, neighbors in found})
    lines = ["| work: setting | " + " | ".join(f"beside {n} busy process(es)" for n in levels) + " |", "|---" * (len(levels) + 1) + "|"]
    for job, name in dict.fromkeys((job, name) for job, name, _ in found):
        cells = [f"{found[job, name, n]['ms']:.0f} ms ({found[job, name, n]['over_fair_share']:.2f})" for n in levels]
        lines.append(f"| {job}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines) if found else ""


def speed_table(root: Path = ROOT) -> str:
    """Every benchmark in results/benchmarks as Markdown tables: times, claims, slowdowns beside busy processes."""
    parts = []
    for path in sorted((root / "results/benchmarks").glob("*/benchmark.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        tables = times_table(report["rows"]), claims_table(report["claims"]), busy_table(report["rows"])
        parts += [f"**{machine(report['hardware'])}, `params/{path.parent.name}.yaml`**", *filter(None, tables)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    for folder in sys.argv[1:] or sys.exit(__doc__):
        print("kept", keep(Path(folder)))
