"""The network equals the published one, number by number, in all its forms."""
from __future__ import annotations

import functools
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
DECODERS = {"v0.1.0": "mqm", "v0.3.1": "dma"}  # release -> its decoder
SAMPLED = {release: np.load(HERE / f"{release}_sampled.npz") for release in DECODERS}  # 256 values of every golden tensor, at places that its name determines
FULL = {release: shared_folder() / "reference" / f"golden_{release}.npz" for release in DECODERS}
KEYS = [(release, key) for release in DECODERS for key in sorted(SAMPLED[release].files)]


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
    """(release, form, classes, size) -> every tensor that has a golden number; computed once each."""
    @functools.cache
    def get(release: str, form: str, classes: int, size: str) -> dict[str, np.ndarray]:
        model = golden_model(classes, DECODERS[release])
        model = {"fast": lambda: model, "naive": model.naive, "fused": model.fuse}[form]()
        return outputs(model, *map(int, size.split("x")))

    return get


@pytest.mark.parametrize("form", ["fast", "naive", "fused"])
@pytest.mark.parametrize("release, key", KEYS)
def test_golden_numbers(computed, form, release, key):
    """Every key of the golden file: encoder and bridge to 1e-5, logits to 1e-4."""
    classes, size, tensor = re.fullmatch(r"masks(\d)_([\dx]+)/(\w+)", key).groups()
    found = computed(release, form, int(classes), size)[tensor]
    bar = 1e-4 if "logits" in tensor else 1e-5
    assert np.abs(found.ravel()[places(key, found.size)] - SAMPLED[release][key]).max() <= bar
    if FULL[release].is_file():
        golden = np.load(FULL[release])[key]
        assert found.shape == golden.shape
        assert np.abs(found - golden).max() <= bar


@pytest.mark.parametrize("release", DECODERS)
def test_the_committed_sample_is_the_golden_file(release):
    if not FULL[release].is_file():
        pytest.skip(f"the full golden numbers are not at {FULL[release]}")
    full, sampled = np.load(FULL[release]), SAMPLED[release]
    assert sorted(full.files) == sorted(sampled.files)
    for key in full.files:
        np.testing.assert_array_equal(full[key].ravel()[places(key, full[key].size)], sampled[key])


@pytest.mark.parametrize("decoder, expected", [("mqm", [2_259_536, 279_424, 7_148_224, 9_687_184]), ("dma", [2_259_536, 279_424, 6_675_890, 9_214_850])])
def test_parameter_counts(decoder, expected):
    model = QTSeg(decoder=decoder)
    assert [sum(p.numel() for p in box.parameters()) for box in (model.encoder, model.bridge, model.decoder, model)] == expected


@pytest.mark.parametrize("release, count", [("v0.1.0", 626), ("v0.3.1", 614)])
def test_every_official_name_is_mapped_exactly_once(release, count):
    """All official names with their shapes, none twice, none of ours left over."""
    official = json.loads((HERE / f"{release}_state_dict.json").read_text())
    model = QTSeg(decoder=DECODERS[release])
    names = [name for ours in model.state_dict() for name in official_names(ours, 2, DECODERS[release])]
    assert len(names) == len(set(names)) == len(official) == count
    assert {name: list(tensor.shape) for name, tensor in to_official(model).items()} == official


@pytest.mark.parametrize("decoder, file", [("mqm", "qtseg_state_dict.json"), ("dma", "qtseg_dma_state_dict.json")])
def test_state_dict_names_are_stable(decoder, file):
    """A renamed parameter would orphan every checkpoint that people have: change this file only with a migration."""
    ours = json.loads((HERE / file).read_text())
    assert {name: list(tensor.shape) for name, tensor in QTSeg(decoder=decoder).state_dict().items()} == ours
