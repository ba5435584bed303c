"""The live demo, as `qtseg export phantoms --web` writes it, with a phantom of each family to try: `python site/demo.py FOLDER`."""
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
