"""The network equals the published one, number by number, in all its forms."""
from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden_images, shared_folder

from qtseg.network.model import QTSeg
from qtseg.network.names import official_names
from qtseg.network.official import to_official

HERE = Path(__file__).parent / "golden"
SAMPLED = np.load(HERE / "v0.1.0_sampled.npz")  # 256 values of every golden tensor, at places that its name determines
FULL = shared_folder() / "reference" / "golden_v0.1.0.npz"
KEYS = sorted(SAMPLED.files)


def places(key: str, size: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).choice(size, min(size, 256), replace=False)


def outputs(model: QTSeg, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    images = golden_images(batch, height, width)
    with torch.no_grad():
        encoding = model.encode(images)
        tensors = {"low_res_logits": model.decode(encoding).low_res_logits, "logits": model(images)}
    for box, levels in encoding._asdict().items():
        tensors |= {f"{box}_{i}": level for i, level in enumerate(levels)}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def computed(golden_model):
    """(form, classes, size) -> every tensor that has a golden number; computed once each."""
    results = {}

    def get(form: str, classes: int, size: str) -> dict[str, np.ndarray]:
        if (form, classes, size) not in results:
            model = golden_model(classes)
            model = {"fast": lambda: model, "naive": model.naive, "fused": model.fuse}[form]()
            results[form, classes, size] = outputs(model, *map(int, size.split("x")))
        return results[form, classes, size]

    return get


@pytest.mark.parametrize("form", ["fast", "naive", "fused"])
@pytest.mark.parametrize("key", KEYS)
def test_golden_numbers(computed, form, key):
    """Every key of the golden file: encoder and bridge to 1e-5, logits to 1e-4."""
    classes, size, tensor = re.fullmatch(r"masks(\d)_([\dx]+)/(\w+)", key).groups()
    found = computed(form, int(classes), size)[tensor]
    bar = 1e-4 if "logits" in tensor else 1e-5
    assert np.abs(found.ravel()[places(key, found.size)] - SAMPLED[key]).max() <= bar
    if FULL.is_file():
        golden = np.load(FULL)[key]
        assert found.shape == golden.shape
        assert np.abs(found - golden).max() <= bar


@pytest.mark.skipif(not FULL.is_file(), reason=f"the full golden numbers are not at {FULL}")
def test_the_committed_sample_is_the_golden_file():
    full = np.load(FULL)
    assert sorted(full.files) == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(full[key].ravel()[places(key, full[key].size)], SAMPLED[key])


def test_parameter_counts():
    model = QTSeg()
    counts = [sum(p.numel() for p in box.parameters()) for box in (model.encoder, model.bridge, model.decoder, model)]
    assert counts == [2_259_536, 279_424, 7_148_224, 9_687_184]


def test_every_official_name_is_mapped_exactly_once():
    """626 official names with their shapes, none twice, none of ours left over."""
    official = json.loads((HERE / "v0.1.0_state_dict.json").read_text())
    model = QTSeg()
    names = [name for ours in model.state_dict() for name in official_names(ours, tokens=2)]
    assert len(names) == len(set(names)) == len(official) == 626
    assert {name: list(tensor.shape) for name, tensor in to_official(model).items()} == official


def test_state_dict_names_are_stable():
    """A renamed parameter would orphan every checkpoint that people have: change this file only with a migration."""
    ours = json.loads((HERE / "qtseg_state_dict.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in QTSeg().state_dict().items()} == ours
