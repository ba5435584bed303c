"""Keep what a run found, small enough to commit: `python tools/results.py runs/isic2018_cpu …` copies it to results/.

Numbers, history and curves are kept; pictures of the images are not, because most data sets forbid handing them on.
`make sync` turns results/*/metrics.json into the table on the front page.
"""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("metrics.json", "history.csv", "curves.png", "dice.png")
TITLES = {"demo": "phantoms, all four families", "isic2018_cpu": "ISIC 2018, 1600 train, 400 validate",
          "bkai_cpu": "BKAI-IGH NeoPolyp, binary, folds 0–2 train, fold 3 validates"}


def keep(run: Path, root: Path = ROOT) -> Path:
    """Copy a finished run's numbers and figures to results/<name>; SystemExit names what is missing."""
    missing = [name for name in KEPT if not (run / name).is_file()]
    if missing:
        sys.exit(f"{run} is not a finished run of train.ipynb: {', '.join(missing)} missing")
    target = root / "results" / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run / name, target / name)
    return target


def table(root: Path = ROOT) -> str:
    """The results as a Markdown table: a row for each folder in results/."""
    rows = ["| data | split scored | size | epochs | Dice | IoU | minutes | images/s | hardware, command |", "|---|---|---|---|---|---|---|---|---|"]
    for path in sorted((root / "results").glob("*/metrics.json")):
        m, name = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        c, train, part = m["config"], m["train"], "test" if m["images"]["test"] else "validation"
        machine = m["hardware"]["processor"] if m["hardware"]["device"] == "cpu" else m["hardware"]["device"]
        rows.append(f"| {TITLES.get(name, name)} | {part}, {m['images']['test'] or m['images']['valid']} images | {c['size']}² | {train['epochs']} "
                    f"| {m['test']['dice']:.2f} | {m['test']['iou']:.2f} | {train['seconds'] / 60:.0f} | {train['images_per_second']:.1f} "
                    f"| {machine}, {m['hardware']['cores']} cores, `params/{name}.yaml`; [curves](../results/{name}/curves.png), "
                    f"[Dice of every image](../results/{name}/dice.png) |")
    return "\n".join(rows)


if __name__ == "__main__":
    for folder in sys.argv[1:] or sys.exit(__doc__):
        print("kept", keep(Path(folder)).relative_to(ROOT))
