"""A network of your own, trained by `fit` on any data set that QTSeg opens."""
import sys

import torch
from torch import nn

from qtseg import TrainConfig, fit
from qtseg.training.callbacks import EMA, EarlyStopping


class SmallUNet(nn.Module):
    """One step down, one up: images [B, 3, H, W] -> logits [B, 2, H, W]."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.head = nn.Conv2d(2 * width, 2, 1)

    def forward(self, images):
        fine = self.down(images)
        return self.head(torch.cat([fine, self.middle(fine)], dim=1))


if __name__ == "__main__":
    folder = sys.argv[1]
    config = TrainConfig(data="phantoms:dermoscopy:24", size=64, epochs=3, batch=4, lr=0.01, cache=folder, runs=folder, name="unet")
    result = fit(config, model=SmallUNet(), callbacks=[EMA(0.9), EarlyStopping(patience=5)])
    print("test Dice", result.metrics["test"]["dice"])
