"""QTSeg: a query-token network for 2D medical image segmentation."""
__version__ = "0.2.0"

import os
import sys

import lazy_loader

# OpenMP reads this when PyTorch is loaded: its waiting threads soon sleep, as other programs may need their cores
# (nbs/reference/training_hardware.ipynb).
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "network.model": ["QTSeg"],
    "network.baselines": ["pretrained"],
    "network.official": ["load_official"],
    "training.config": ["TrainConfig"],
    "training.loop": ["fit"],
    "evaluation.evaluate": ["evaluate"],
    "prediction.predictor": ["Predictor"],
    "data.segmentation": ["SegmentationData"],
    "data.phantoms": ["phantom"],
    "view.figures": ["show_masks"],
})
