"""Put a trained run's network into the wheel: `python tools/ship.py runs/phantoms` writes qtseg/weights/phantoms.

Weights are rounded to half precision, which halves the file. The card is that of `qtseg export`, with the scores of the run; what is
shipped differs from the run's checkpoint by the rounding, so the card states this and the digest of the shipped file.
"""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from qtseg.evaluation.runs import weights_sha256
from qtseg.prediction.cards import write_card

ROOT = Path(__file__).resolve().parent.parent


def ship(run: Path, root: Path = ROOT) -> Path:
    """Copy the selected checkpoint of a finished run into the package; FileNotFoundError where there is none."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    checkpoint = run / f"best_{metrics['selected_by']}"
    write_card(checkpoint)
    target = root / "qtseg" / "weights" / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(checkpoint / name, target / name)
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()},
              target / "model.safetensors")
    made = f"`qtseg train nbs/experiments/params/{run.name}.yaml`, then `python tools/ship.py {run}`"
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    card = card.replace(weights_sha256(checkpoint), weights_sha256(target)).replace("\n## Training data\n", f"""
Made by {made}, which rounds the weights to half precision; the scores below are those before rounding.

## Training data
""", 1).replace('Predictor("the folder that holds this file")', f'Predictor("{run.name}")')
    card = "\n".join(line for line in card.split("\n") if not line.startswith("<!--"))
    (target / "README.md").write_text(card, encoding="utf-8")
    return target


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(ship(Path(folder)))
