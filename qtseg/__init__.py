"""QTSeg: a query-token network for 2D medical image segmentation."""
__version__ = "0.2.0"

import lazy_loader

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
