"""Dual-mix attention: each branch by hand, the fast block against the plain one, precision, and what the decoder shows."""
from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from conftest import golden_images
from test_golden import KEYS, SAMPLED, places
from torch import nn

from qtseg.network import fast_attention
from qtseg.network.attention import Attention
from qtseg.network.dma import ChannelMixing, DMABlock, SpatialGate
from qtseg.network.fast import accelerate
from qtseg.network.model import QTSeg
from qtseg.training.config import TrainConfig
from qtseg.training.losses import ce_dice_loss
from qtseg.view.token_explorer import TokenExplorer

SMALL = dict(decoder="dma", width=8, depths=(1, 2, 1), mlp_width=32)


@pytest.fixture
def always_fast(monkeypatch):
    """The fast forms at any size: maps of small images are below what pays."""
    monkeypatch.setattr(fast_attention, "_pays", lambda few, many, head_width: True)


def random_gammas(module: nn.Module) -> nn.Module:
    """γ starts at 0, which would hide the channel branch."""
    for part in module.modules():
        if isinstance(part, ChannelMixing):
            nn.init.normal_(part.gamma)
    return module


def test_the_spatial_gate_by_hand():
    """1 + sigmoid of a 7×7 convolution of mean and maximum over channels; outside the map are zeros."""
    torch.manual_seed(0)
    gate, x, size = SpatialGate().double(), torch.randn(2, 5 * 4, 3, dtype=torch.float64), (5, 4)
    kernel = gate.conv.weight.detach().numpy()[0]  # [2, 7, 7]
    maps = x.numpy().reshape(2, 5, 4, 3)
    padded = np.pad(np.stack([maps.mean(-1), maps.max(-1)], axis=1), ((0, 0), (0, 0), (3, 3), (3, 3)))
    expected = np.array([[[(padded[b, :, row:row + 7, column:column + 7] * kernel).sum() for column in range(4)] for row in range(5)] for b in range(2)])
    expected = (1 + 1 / (1 + np.exp(-expected))).reshape(2, 20, 1)
    for naive in (True, False):
        gate.use_naive = naive
        np.testing.assert_allclose(gate(x, size).detach().numpy(), expected, rtol=1e-12)


def test_the_channel_branch_by_hand():
    """Of three channels the third is the first's opposite: each gives its weight to the other, the second to the third."""
    x = torch.tensor([[[1.0, 0.0, -1.0], [2.0, 1.0, -2.0]]], dtype=torch.float64)  # two pixels, three channels
    products = np.array([[5.0, 2, -5], [2, 1, -2], [-5, -2, 5]])
    weights = np.exp(products.max(axis=1, keepdims=True) - products)
    weights /= weights.sum(axis=1, keepdims=True)
    assert weights.argmax(axis=1).tolist() == [2, 2, 0]
    branch = ChannelMixing().double()
    for gamma in (0.0, 0.5):
        nn.init.constant_(branch.gamma, gamma)
        for naive in (True, False):
            branch.use_naive = naive
            np.testing.assert_allclose(branch.weights(x).numpy()[0], weights, rtol=1e-12)
            np.testing.assert_allclose(branch(x).detach().numpy()[0], x.numpy()[0] + gamma * x.numpy()[0] @ weights.T, rtol=1e-12)


@pytest.mark.parametrize("form", ["float16", "bfloat16", "autocast"])
def test_channels_are_compared_in_float32(form):
    """Products over 4096 pixels pass float16's largest number, and in bfloat16 others would be the smallest."""
    torch.manual_seed(0)
    branch, x = ChannelMixing(), (5 + torch.randn(1, 4096, 16)).bfloat16().float()
    exact = branch.weights(x)
    if form == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = branch.weights(x)
        assert torch.equal(found, exact)
    else:
        found = branch.weights(x.to(getattr(torch, form)))
        assert found.dtype == getattr(torch, form)
        torch.testing.assert_close(found.float(), exact, atol=1e-2, rtol=0)
    products = x.bfloat16().transpose(1, 2) @ x.bfloat16()
    assert ((-products.float()).softmax(dim=2) - exact).abs().max() > 0.1, "this test can tell"


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (4, 7), (16, 10)])
def test_the_fast_block_in_outputs_and_gradients(always_fast, tokens, size):
    torch.manual_seed(0)
    plain = random_gammas(DMABlock(width=16, heads=4, mlp_width=24)).double()
    fast = copy.deepcopy(plain)
    accelerate(holder := nn.ModuleList([fast]))
    assert type(holder[0]) is fast_attention.FastDMABlock
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True)
              for shape in ((2, tokens, 16), (2, size[0] * size[1], 16), (1, size[0] * size[1], 16))]
    found = []
    for block in (plain, fast):
        outputs = block(*inputs, size)
        total = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(total, [*inputs, *block.parameters()])])
    for expected, computed in zip(*found, strict=True):
        torch.testing.assert_close(computed, expected, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("key", [key for release, key in KEYS if release == "v0.3.1" and "logits" in key])
def test_golden_numbers_of_the_fast_block(always_fast, golden_model, key):
    """Small images do not reach it otherwise."""
    classes, *size, tensor = re.fullmatch(r"masks(\d)_(\d+)x(\d+)x(\d+)/(\w+)", key).groups()
    model, x = golden_model(int(classes), "dma").fuse(), golden_images(*map(int, size))
    with torch.no_grad():
        found = (model(x) if tensor == "logits" else model.decoder(model.encode(x).bridge)).numpy()
    assert np.abs(found.ravel()[places(key, found.size)] - SAMPLED["v0.3.1"][key]).max() <= 1e-4


@pytest.mark.parametrize("classes", [1, 3])
def test_all_forms_of_the_network(always_fast, classes):
    """Logits and gradients in double precision, with γ and BatchNorm's statistics away from their start."""
    torch.manual_seed(0)
    model = random_gammas(QTSeg(classes, **SMALL)).double()
    x, target = torch.rand(2, 3, 70, 40, dtype=torch.float64) * 2 - 1, torch.randint(0, max(classes, 2), (2, 70, 40))
    assert sum(type(part) is fast_attention.FastDMABlock for part in model.modules()) == 4
    found = []
    for form in (model.naive(), model):
        logits = form(x)
        ce_dice_loss(logits, target).backward()
        found.append([logits.detach(), *(parameter.grad for parameter in form.parameters())])
    for others in zip(*found, strict=True):
        for other in others[1:]:
            torch.testing.assert_close(other, others[0], atol=1e-10, rtol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.fuse()(x), model.naive()(x), atol=1e-10, rtol=1e-7)


def test_the_fast_block_goes_back_where_it_must(always_fast):
    """For attention weights, for hooks, and in `naive()`: the attentions themselves are called then."""
    torch.manual_seed(0)
    model = random_gammas(QTSeg(**SMALL)).eval().fuse()
    attention, x = model.decoder.stage8.blocks[0].token_to_spatial, torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = model(x)
        seen = []
        handle = attention.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
        assert len(seen) == 1
        handle.remove()
        torch.testing.assert_close(model.decode(model.encode(x)).low_res_logits, model.decoder(model.encode(x).bridge), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_recorded_attention(fused):
    """Both branches, their mean under MQM's name, and the channels; every row sums to one."""
    torch.manual_seed(0)
    model = random_gammas(QTSeg(3, **SMALL)).eval()
    model = model.fuse() if fused else model
    with torch.no_grad():
        stages = model.decode(model.encode(torch.rand(2, 3, 64, 96) * 2 - 1)).stages
    for stage, width, depth in zip(stages, (128, 64, 32), (1, 2, 1), strict=True):
        pixels = stage.features.shape[-2] * stage.features.shape[-1]
        assert len(stage.attention) == depth + 1 and stage.features.shape[1] == width
        for kept in stage.attention[:-1]:
            shapes = {"spatial": (8, 3, pixels), "channel": (8, 3, pixels), "token_to_feature": (8, 3, pixels),
                      "feature_to_token": (8, pixels, 3), "channel_to_channel": (1, width, width)}
            assert {name: tuple(weights.shape[1:]) for name, weights in kept.items()} == shapes
            for weights in kept.values():
                torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
            torch.testing.assert_close(kept["token_to_feature"], (kept["spatial"] + kept["channel"]) / 2)
            assert not torch.equal(kept["spatial"], kept["channel"])


def test_it_starts_without_the_channel_branch():
    """γ is one number per block and 0 at first: then the branch passes its input on."""
    model = QTSeg(**SMALL)
    branches = [part for part in model.modules() if isinstance(part, ChannelMixing)]
    x = torch.randn(1, 6, 8)
    assert len(branches) == 4 and all(torch.equal(branch(x), x) and branch.gamma.shape == (1,) for branch in branches)


def test_heads_and_positions_are_checked_as_in_mqm():
    for changes, words in (({"heads": 3}, "3 heads do not divide"), ({"position": "sinus"}, "unknown position 'sinus'")):
        with pytest.raises(ValueError, match=words):
            QTSeg(**{**SMALL, **changes})
    assert TrainConfig(decoder="dma").decoder == "dma"


def test_the_token_explorer_shows_it():
    torch.manual_seed(0)
    model = random_gammas(QTSeg(**SMALL)).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    panel = TokenExplorer(model, image)
    for stage, block in ((32, 1), (16, 2), (8, "final")):
        panel.set(stage=stage, block=block)
        assert panel.attention().shape == (64, 96)
    panel.set(stage=16, block=1, direction="feature_to_token")
    assert 0 < panel.attention().mean() < 1


def test_no_attention_is_left_plain():
    """All attention of a block is between tokens and pixels, so that each has its fast class."""
    model = QTSeg(**SMALL).fuse()
    assert not [name for name, part in model.named_modules() if type(part) is Attention]
