"""Draw nbs/images/network.svg, the front page's picture: the network with the shapes that hooks measure on the real model."""
from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch

from qtseg.network.model import QTSeg

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "images" / "network.svg"
COLORS = {"encoder": "#cfe3f5", "bridge": "#fde3c8", "decoder": "#d9ecd9", "plain": "#f3f3f3"}
matplotlib.rcParams["svg.hashsalt"] = "qtseg"


def measure(size: int = 512) -> dict[str, str]:
    """Shapes of every step for one RGB image, written as channels × height × width or tokens × features."""
    model, images = QTSeg().eval(), torch.zeros(1, 3, size, size)
    with torch.no_grad():
        encoding = model.encode(images)
        decoding = model.decode(encoding)
        logits = model(images)
    tensors = {"image": images, "low": decoding.low_res_logits, "logits": logits}
    for i, stride in enumerate((8, 16, 32)):
        tensors |= {f"encoder{stride}": encoding.encoder[i], f"bridge{stride}": encoding.bridge[i]}
    for stage, stride in zip(decoding.stages, (32, 16, 8)):
        tensors[f"tokens{stride}"] = stage.tokens
    shapes = {name: " × ".join(map(str, tensor.shape[1:])) for name, tensor in tensors.items()}
    return shapes | {part: f"{sum(p.numel() for p in getattr(model, part).parameters()):,}" for part in ("encoder", "bridge", "decoder")}


def box(axes, x: float, y: float, text: str, kind: str, width: float = 1.7, height: float = 0.78) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.08",
                                  facecolor=COLORS[kind], edgecolor="#555555", linewidth=1))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color="#555555", linewidth=1.1, shrinkA=0, shrinkB=0))


def draw(shapes: dict[str, str]) -> plt.Figure:
    """Columns are the three parts, rows the three strides; the decoder runs from the coarse row to the fine one."""
    figure, axes = plt.subplots(figsize=(10.4, 4.6))
    rows = {8: 2.6, 16: 1.4, 32: 0.2}
    box(axes, 0.2, 1.4, f"image\n{shapes['image']}", "plain", 1.4)
    for stride, y in rows.items():
        box(axes, 2.5, y, f"stride {stride}\n{shapes[f'encoder{stride}']}", "encoder")
        box(axes, 5.0, y, f"mixed, stride {stride}\n{shapes[f'bridge{stride}']}", "bridge")
        box(axes, 7.7, y, f"two-way blocks ×{ {8: 1, 16: 2, 32: 3}[stride] }\ntokens {shapes[f'tokens{stride}']}", "decoder", 2.1)
        arrow(axes, (0.9, 1.4), (1.63, y))
        for other in rows.values():
            arrow(axes, (3.37, y), (4.13, other))
        arrow(axes, (5.87, y), (6.63, y))
    for lower, upper in ((32, 16), (16, 8)):
        arrow(axes, (7.7, rows[lower] + 0.41), (7.7, rows[upper] - 0.41))
    box(axes, 10.3, 2.6, f"tokens · features\n{shapes['low']}", "decoder", 1.8)
    box(axes, 10.3, 1.4, f"logits\n{shapes['logits']}", "plain", 1.8)
    arrow(axes, (8.77, 2.6), (9.38, 2.6))
    arrow(axes, (10.3, 2.19), (10.3, 1.81))
    box(axes, 10.3, 0.2, "C learned\nquery tokens", "decoder", 1.8)
    arrow(axes, (9.38, 0.2), (8.77, 0.2))
    for x, part, title in ((2.5, "encoder", "CNN encoder"), (5.0, "bridge", "bridge (MLFF)"), (8.6, "decoder", "mask decoder (MQM)")):
        axes.text(x, 3.45, title, ha="center", fontsize=12, weight="bold")
        axes.text(x, 3.17, f"{shapes[part]} parameters", ha="center", fontsize=9, color="#444444")
    axes.text(7.82, 0.8, "upscaled features, next tokens", ha="left", va="center", fontsize=8, color="#444444")
    axes.text(10.42, 2.0, "bilinear", ha="left", va="center", fontsize=8, color="#444444")
    axes.set(xlim=(-0.6, 11.3), ylim=(-0.35, 3.75))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    draw(measure()).savefig(TARGET, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    print(f"wrote {TARGET}")
