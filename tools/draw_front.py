"""Draw nbs/images/front.png, the front page's picture: the attention of the polyp's token and the mask, stage by stage."""
from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.colors import PowerNorm

from qtseg import Predictor, phantom
from qtseg.data.preprocessing import outline_masks
from qtseg.evaluation.metrics import MEASURES, confusion_counts, scores_in_percent
from qtseg.view.pictures import new_figure
from qtseg.view.tokens import STRIDES, decode_image, over_pixels, token_attention

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "images" / "front.png"
FAMILY, SEED, SIZE = "endoscopy", 5002, 256  # a phantom that the shipped network was not trained on


def draw(target: Path = TARGET) -> None:
    """Run the shipped network on one phantom and write the picture."""
    torch.set_num_threads(1)
    image, mask = phantom(FAMILY, SEED, SIZE)
    decoded = decode_image(Predictor("phantoms", device="cpu"), image)
    reading, figure = decoded.readings["early exit"], new_figure(9, 4.4)
    figure.set_layout_engine("compressed")
    top, bottom = rows = figure.subplots(2, 4)
    top[0].imshow(outline_masks(image, mask, width=2))
    top[0].set_title("phantom, two polyps", fontsize=8.5)
    for axes, stage, stride in zip(top[1:], decoded.stages, STRIDES):
        attention = over_pixels(token_attention(stage, token=1), stride, SIZE, SIZE)
        looks = axes.imshow(attention / attention.max(), cmap="Oranges", norm=PowerNorm(0.5, 0, 1))
        share = 100 * attention[mask > 0].sum() / attention.sum()
        axes.set_title(f"stride {stride}: {share:.0f} % on the polyps", fontsize=8.5)
    targets = torch.from_numpy(mask > 0).long()[None]
    steps = ("before stride 32", *(f"after stride {stride}" for stride in STRIDES))
    for axes, chance, found, step in zip(bottom, reading.probabilities, reading.masks, steps):
        wins = axes.imshow(chance[1], cmap="Blues", vmin=0, vmax=1)
        counts = confusion_counts(torch.from_numpy(found).long()[None], targets, 2)
        axes.set_title(f"{step}: Dice {scores_in_percent(counts)[0, 0, MEASURES.index('dice')]:.0f}", fontsize=8.5)
    for axes in (*top[1:], *bottom):
        axes.contour(mask > 0, [0.5], colors="black", linewidths=0.7)
    for row, drawn, label in ((top, looks, "attention of the token\n(share of its largest)"), (bottom, wins, "probability of polyp")):
        figure.colorbar(drawn, ax=row, label=label, ticks=[0, 0.25, 0.5, 1], aspect=14)
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
    figure.savefig(target, dpi=110, facecolor="white")


if __name__ == "__main__":
    draw()
    print(f"wrote {TARGET}")
