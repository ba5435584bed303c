"""What several tests share: the repository's root, the golden numbers and the weights they belong to."""
from __future__ import annotations

import functools
import json
import math
import os
import sys
import zipfile
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from qtseg.data.phantom_sets import write_prepared
from qtseg.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))


def shared_folder() -> Path:
    """Reference numbers and real images that never enter the repository; tests that need them skip where it is absent."""
    return Path(os.environ.get("QTSEG_SHARED", ROOT.parent / "shared"))


def one_sentence(caught: pytest.ExceptionInfo, *words: str) -> None:
    """The refusal names all of `words`, in a message without a line break."""
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def zipped(source: Path, target: Path, prefix: str = "") -> Path:
    """A folder's files as a .zip, in order, each name behind `prefix`; returns the target."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(source).as_posix())
    return target


def run_notebook(notebook: Path, output: Path, /, **parameters) -> None:
    """Execute a notebook through papermill into `output`, whose folder is where its kernel works."""
    import papermill

    papermill.execute_notebook(str(notebook), str(output), parameters, kernel_name="python3", progress_bar=False, cwd=str(output.parent))


def code_cells(notebook: Path) -> tuple[list[str], int]:
    """The sources of a papermill notebook's code cells, and the place of its parameters among them."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells], next(
        number for number, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))


def parameters_of(notebook: Path) -> dict:
    """A papermill notebook's parameters and their defaults."""
    sources, place = code_cells(notebook)
    given: dict = {}
    exec(sources[place], given)
    del given["__builtins__"]
    return given


def refused_parameters(notebook: Path, /, **parameters) -> str:
    """The message with which a papermill notebook refuses parameters.

    Imports, parameters, what papermill injects after them, and the cells that check: all in this process, since a kernel takes seconds to start.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    sources, place = code_cells(notebook)
    space: dict = {}
    with patch("qtseg.training.hardware.keep_freed_memory"), pytest.raises(ValueError) as error:
        for number in range(place - 1, place + 3):
            exec(TransformerManager().transform_cell(sources[number]), space)
            if number == place:
                space |= parameters
    return str(error.value)


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The formula that fills an official state dict's entry, so that outputs can be compared without any download."""
    rng, leaf = np.random.default_rng(zlib.crc32(name.encode())), name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape)
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape)
    if leaf in ("running_mean", "bias"):
        return 0.1 * rng.standard_normal(shape)
    if leaf == "positional_encoding_gaussian_matrix":
        return rng.standard_normal(shape)
    if leaf == "gamma":
        return np.full(shape, 0.1)
    noise = rng.standard_normal(shape)
    return 1 + 0.1 * noise if len(shape) == 1 else noise / math.sqrt(math.prod(shape[1:]))


def golden_state(model) -> dict[str, torch.Tensor]:
    """A state dict under the official names, filled by the formula."""
    from qtseg.network.official import to_official

    return {name: torch.from_numpy(np.asarray(golden_weight(name, tuple(tensor.shape)))).to(tensor.dtype)
            for name, tensor in to_official(model).items()}


def golden_images(batch: int, height: int, width: int) -> torch.Tensor:
    """The input that belongs to the golden numbers of one size: [batch, 3, height, width] in [-1, 1]."""
    rng = np.random.default_rng(zlib.crc32(f"image:{batch}x3x{height}x{width}".encode()))
    return torch.from_numpy(rng.uniform(-1, 1, (batch, 3, height, width))).float()


@pytest.fixture(scope="session")
def golden_model():
    """A function: classes, decoder -> QTSeg with the golden weights, in evaluation mode; each built once."""
    from qtseg.network.model import QTSeg
    from qtseg.network.official import to_official

    @functools.cache
    def build(classes: int, decoder: str = "mqm") -> QTSeg:
        model = QTSeg(classes=classes, decoder=decoder)
        state = golden_state(model)
        for name, tensor in to_official(model).items():
            tensor.copy_(state[name])
        return model.eval()

    return build


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """24 phantom images of 64×64 in a prepared folder."""
    return write_prepared(tmp_path_factory.mktemp("phantoms") / "set", "dermoscopy", 24, 64, 0)


@pytest.fixture
def tiny(phantoms, tmp_path):
    """A function: changes -> the configuration of a run of seconds, in a folder of its own."""

    def make(**changes) -> TrainConfig:
        values = dict(data=str(phantoms), cache=str(phantoms.parent / "cache"), size=64, width=4, depths=[1, 1, 1], mlp_width=32, epochs=3,
                      batch=4, valid_batch=4, device="cpu", runs=str(tmp_path), name="run", progress=False)
        return TrainConfig.from_dict(values | changes)

    return make
