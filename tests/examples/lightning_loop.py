"""PyTorch Lightning trains QTSeg on our Dataset: its loop, our network, loss and images."""
import sys

import lightning
import torch
from torch.utils.data import DataLoader

from qtseg.data.dataset import normalize
from qtseg.data.segmentation import SegmentationData
from qtseg.training.losses import ce_dice_loss
from qtseg.network.model import QTSeg


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = QTSeg(classes=2, width=4, depths=[1, 1, 1], mlp_width=32)

    def training_step(self, batch, number):
        images, masks, ids = batch
        return ce_dice_loss(self.network(normalize(images)), masks.long())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


if __name__ == "__main__":
    data = SegmentationData.open("phantoms:dermoscopy:24", size=64, cache=sys.argv[1])
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=sys.argv[1], logger=False)
    trainer.fit(Module(), DataLoader(data.train, batch_size=4, shuffle=True, drop_last=True))
