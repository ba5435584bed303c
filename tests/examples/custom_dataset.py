"""A Dataset of your own with albumentations: four channels, drawn on the fly."""
import sys

import albumentations
import numpy as np
import torch

from qtseg import TrainConfig, fit, phantom

TRAINING = albumentations.Compose([albumentations.HorizontalFlip(), albumentations.Affine(rotate=(-30, 30))])


class FourChannels(torch.utils.data.Dataset):
    def __init__(self, seeds, transform=None):
        self.seeds, self.transform = list(seeds), transform

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        image, mask = phantom("dermoscopy", seed=self.seeds[index], size=64)
        image = np.dstack([image, image.mean(axis=2).astype(np.uint8)])  # [64, 64, 4]
        pair = self.transform(image=image, mask=mask) if self.transform else {"image": image, "mask": mask}
        return torch.from_numpy(pair["image"]).permute(2, 0, 1), torch.from_numpy(pair["mask"]), f"seed {self.seeds[index]}"


if __name__ == "__main__":
    config = TrainConfig(width=4, depths=[1, 1, 1], mlp_width=32, epochs=2, batch=4, augment=False, runs=sys.argv[1], name="four")
    print(fit(config, data=(FourChannels(range(16), TRAINING), FourChannels(range(16, 20)))).metrics["valid"])
