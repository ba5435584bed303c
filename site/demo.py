"""`python site/demo.py FOLDER` writes the live demo: `qtseg export phantoms --web`, with a phantom of each family."""
import sys
import tempfile
from pathlib import Path

from PIL import Image

from qtseg import phantom
from qtseg.data.phantoms import FAMILIES
from qtseg.prediction.cards import model_card
from qtseg.prediction.web import export_web

with tempfile.TemporaryDirectory() as folder:
    examples = [Path(folder, f"{family}.png") for family in FAMILIES]
    for family, path in zip(FAMILIES, examples, strict=True):
        Image.fromarray(phantom(family, seed=1)[0]).save(path)
    export_web("phantoms", sys.argv[1], model_card("phantoms"), examples=examples)
