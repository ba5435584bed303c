"""What an ablation puts in the place of the paper's bridge, positions and decoder: each does what it says, and no more."""
from __future__ import annotations

import copy
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qtseg.network.blocks import TwoForms
from qtseg.network.bridges import BRIDGES
from qtseg.network.decoders import DECODERS, ConvDecoder
from qtseg.network.mqm import MQMStage
from qtseg.network.positions import POSITIONS, LearnedPositionalEncoding, PositionalEncoding
from qtseg.network.encoders import fold_batchnorms

CHANNELS = (16, 32, 64)  # width 4
SIZES = [(32, 64), (96, 160), (224, 32)]  # an odd number of pixels at stride 32, and a single one
SMALL = dict(depths=(1, 2, 1), mlp_width=16, heads=4)
ALL_DECODERS = [(name, position) for name in DECODERS for position in (POSITIONS if name != "conv" else ["fourier"])]


def levels(height: int, width: int, channels=CHANNELS, batch: int = 2) -> list[Tensor]:
    """The encoder's maps of images of this size, random."""
    return [torch.randn(batch, count, height // stride, width // stride) for count, stride in zip(channels, (8, 16, 32))]


def total(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A scalar that depends on every entry of the outputs in its own way."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)


def set_naive(module: nn.Module, naive: bool) -> nn.Module:
    for part in module.modules():
        if isinstance(part, TwoForms):
            part.use_naive = naive
    return module


def with_statistics(module: nn.Module) -> nn.Module:
    """In evaluation mode, after BatchNorm has seen other data than it starts with."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.2), nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module.eval()


def folded(module: nn.Module) -> nn.Module:
    """What `QTSeg.fuse` does to a part."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if hasattr(part, "fold"):
            part.fold()
    return twin


def multiply_adds(name: str, width: int, size: int) -> float:
    """Of a decoder for two classes and one image; shapes without memory are enough to count."""
    channels = [count * width for count in (4, 8, 16)]
    with torch.device("meta"):
        decoder, maps = DECODERS[name](channels, 2).eval(), levels(size, size, channels, batch=1)
        with FlopCounterMode(display=False) as counter:
            decoder(maps)
    return counter.get_total_flops() / 2


# Bridges

@pytest.mark.parametrize("name", BRIDGES)
@pytest.mark.parametrize("height, width", SIZES)
def test_a_bridge_keeps_every_shape(name, height, width):
    maps = levels(height, width)
    mixed = BRIDGES[name](CHANNELS)(maps)
    assert isinstance(mixed, tuple) and [output.shape for output in mixed] == [level.shape for level in maps]


@pytest.mark.parametrize("name, sources", [
    ("mlff", [{0, 1, 2}] * 3), ("identity", [{0}, {1}, {2}]), ("projection", [{0}, {1}, {2}]), ("single", [{0}] * 3)])
def test_a_bridge_mixes_the_levels_it_says(name, sources):
    maps = [level.requires_grad_() for level in levels(64, 96)]
    for output, wanted in zip(BRIDGES[name](CHANNELS).eval()(maps), sources):
        gradients = torch.autograd.grad(total(output), maps, allow_unused=True, retain_graph=True)
        assert {source for source, gradient in enumerate(gradients) if gradient is not None and gradient.any()} == wanted


@pytest.mark.parametrize("name", BRIDGES)
def test_a_bridge_trains_and_folds(name):
    bridge, maps = BRIDGES[name](CHANNELS), levels(96, 64)
    if name != "identity":  # nothing to train
        total(bridge(maps)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in bridge.parameters())
    with torch.no_grad():
        fused = folded(with_statistics(bridge))
        assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
        for one, other, naive in zip(fused(maps), bridge(maps), set_naive(copy.deepcopy(bridge), True)(maps)):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(naive, other, atol=1e-5, rtol=1e-4)


# Positions

@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_share_one_call(name, dtype):
    encoding = POSITIONS[name](12)
    for height, width in ((8, 8), (3, 5), (1, 1), (40, 24)):
        position = encoding(height, width, torch.zeros(1, dtype=dtype))
        assert position.shape == (1, height * width, 12) and position.dtype == dtype and position.isfinite().all()


def test_threads_share_one_cache_of_positions():
    """More sizes than are kept, and a matrix that is exchanged: every thread gets the encoding of its own size, whole."""
    torch.manual_seed(0)
    encoding = PositionalEncoding(16)
    sizes = [(3 + number, 5 + number % 3) for number in range(2 * encoding.kept)]
    expected = {size: encoding.naive_forward(*size, torch.zeros(())) for size in sizes}

    def asked(order: int) -> bool:
        rng = random.Random(order)
        turns = [rng.choice(sizes) for _ in range(300)]
        if order == 0:
            return all(encoding.gaussian_matrix.mul_(1) is not None and torch.equal(encoding(*size, torch.zeros(())), expected[size])
                       for size in turns)
        return all(torch.equal(encoding(*size, torch.zeros(())), expected[size]) for size in turns)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(asked, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(encoding._cache[2]) <= encoding.kept


def test_no_positions_are_zeros_that_take_no_memory():
    position = POSITIONS["none"](64)(100, 100, torch.ones(1))
    assert not position.any() and position.untyped_storage().nbytes() == 4 and not list(POSITIONS["none"](64).parameters())


def test_a_learned_grid_follows_the_size_of_the_map():
    """Its own size: the cells themselves. Half of it: means of 2×2 cells. A larger one: the same places, in between."""
    encoding, x = LearnedPositionalEncoding(6), torch.zeros(1)
    cells = encoding.grid[0]  # [6, 16, 16]
    as_map = lambda height, width: encoding(height, width, x)[0].T.unflatten(1, (height, width))
    torch.testing.assert_close(as_map(16, 16), cells)
    torch.testing.assert_close(as_map(8, 8), nn.functional.avg_pool2d(cells, 2))
    large = as_map(48, 80)  # a cell is 3 × 5 pixels, the pixel in the middle has its center
    torch.testing.assert_close(large[:, 1::3, 2::5], cells)
    torch.testing.assert_close(large[:, 24], large[:, 22] / 3 + large[:, 25] * 2 / 3)  # rows 22 and 25 go through centers


def test_a_learned_grid_is_interpolated_in_float32_and_never_kept():
    encoding = LearnedPositionalEncoding(6)
    exact = encoding(9, 7, torch.zeros(1)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoding(9, 7, torch.zeros(1)), exact)
        assert torch.equal(encoding(9, 7, torch.zeros(1, dtype=torch.bfloat16)), exact.bfloat16())
    with torch.inference_mode():  # a prediction first must not spoil the training after it
        encoding(9, 7, torch.zeros(1))
    (encoding(9, 7, torch.zeros(1)) * torch.randn(1, 63, 6)).sum().backward()
    assert encoding.grid.grad.abs().max() > 0
    with torch.no_grad():
        encoding.grid -= encoding.grid.grad
    assert not torch.allclose(encoding(9, 7, torch.zeros(1)), exact)


def test_a_learned_grid_starts_as_large_as_fourier_features():
    torch.manual_seed(0)
    squares = [POSITIONS[name](256)(16, 16, torch.zeros(1)).square().mean().item() for name in ("fourier", "learned")]
    assert squares == pytest.approx([0.5, 0.5], rel=0.05)


@pytest.mark.parametrize("name", POSITIONS)
def test_only_without_positions_does_the_order_of_pixels_not_count(name):
    """Pixels in another order: with "none" the same tokens, and features in that other order; else neither."""
    torch.manual_seed(0)
    stage = MQMStage(tokens=3, width=16, next_width=8, depth=2, heads=4, mlp_width=16, position=name)
    nn.init.normal_(stage.final_attention.query.weight, std=2)  # fresh attention hardly prefers any pixel
    tokens, features, order = torch.randn(2, 3, 16), torch.randn(2, 16, 5, 7), torch.randperm(35)
    shuffle = lambda maps: maps.flatten(2)[..., order].unflatten(2, (5, 7))
    with torch.no_grad():
        straight, other = stage(tokens, features), stage(tokens, shuffle(features))
    same = [torch.allclose(straight.tokens, other.tokens, atol=1e-5), torch.allclose(straight.next_tokens, other.next_tokens, atol=1e-5),
            torch.allclose(shuffle(straight.features), other.features, atol=1e-5)]
    assert same == [name == "none"] * 3


@pytest.mark.parametrize("build", [lambda: MQMStage(2, 16, 8, 1, 4, 16, position="sinus"),
                                   lambda: DECODERS["mqm"](CHANNELS, 2, position="sinus"),
                                   lambda: DECODERS["dma"](CHANNELS, 2, position="sinus"),
                                   lambda: DECODERS["mqm_single"](CHANNELS, 2, position="sinus")])
def test_unknown_positions_are_refused_in_one_sentence(build):
    with pytest.raises(ValueError, match="unknown position 'sinus': choose one of fourier, learned, none"):
        build()


# Decoders

@pytest.mark.parametrize("name, position", ALL_DECODERS)
@pytest.mark.parametrize("height, width", SIZES)
def test_a_decoder_reaches_stride_two(name, position, height, width):
    for classes in (1, 3):
        decoder = DECODERS[name](CHANNELS, classes, **SMALL, position=position).eval()
        with torch.no_grad():
            logits = decoder(levels(height, width))
        assert logits.shape == (2, classes, height // 2, width // 2) and logits.isfinite().all()


@pytest.mark.parametrize("name, position", ALL_DECODERS)
def test_gradients_reach_every_parameter_of_a_decoder(name, position):
    """Except the keys' biases: softmax ignores what is added to every score."""
    torch.manual_seed(0)
    decoder, maps = DECODERS[name](CHANNELS, 2, **SMALL, position=position), [level.requires_grad_() for level in levels(64, 96)]
    total(decoder(maps)).backward()
    for parameter_name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0 or parameter_name.endswith("key.bias"), parameter_name
    assert all(level.grad.abs().max() > 0 for level in maps), "every level counts"


@pytest.mark.parametrize("name, position", ALL_DECODERS)
def test_the_forms_of_a_decoder_agree(name, position):
    """In float64, where rounding hides nothing: outputs, gradients, and the copy whose BatchNorm is folded away."""
    torch.manual_seed(0)
    decoder = with_statistics(DECODERS[name](CHANNELS, 2, **SMALL, position=position)).double()
    maps, logits, gradients = [level.double() for level in levels(96, 64)], [], []
    for naive in (True, False):
        set_naive(decoder, naive).zero_grad()
        logits.append(decoder(maps))
        total(logits[-1]).backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters()])
    torch.testing.assert_close(*logits)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)
    with torch.no_grad():
        fused = folded(decoder)
        assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
        torch.testing.assert_close(fused(maps), logits[0])


@pytest.mark.parametrize("name, strides", [("mqm", [32, 16, 8]), ("dma", [32, 16, 8]), ("mqm_single", [8]), ("conv", [])])
def test_a_decoder_records_the_stages_that_it_has(name, strides):
    decoder, maps, steps = DECODERS[name](CHANNELS, 2, **SMALL).eval(), levels(64, 96), []
    with torch.no_grad():
        torch.testing.assert_close(decoder(maps, steps), decoder(maps), atol=1e-5, rtol=0)
    assert [stage.features.shape[-2:] for stage in steps] == [(64 // stride, 96 // stride) for stride in strides]
    for stage, stride in zip(steps, strides):
        depth = SMALL["depths"][int(math.log2(stride)) - 3]
        assert len(stage.attention) == depth + 1 and stage.attention[-1]["final"].shape == (2, 4, 2, 64 * 96 // stride**2)


def test_the_convolutional_decoder_costs_what_mqm_costs():
    """At the default width and 256×256 pixels to 5 %; elsewhere what grows differently may differ more."""
    mqm, conv = multiply_adds("mqm", 16, 256), multiply_adds("conv", 16, 256)
    assert abs(conv / mqm - 1) < 0.05 and mqm == pytest.approx(137.01e6, rel=1e-3)
    assert multiply_adds("conv", 32, 256) / multiply_adds("mqm", 32, 256) == pytest.approx(1, abs=0.1)
    assert multiply_adds("conv", 8, 256) / multiply_adds("mqm", 8, 256) == pytest.approx(1, abs=0.1)


def test_the_convolutional_decoder_reads_out_with_fixed_weights():
    """Its logits are a 1×1 convolution of the upscaled features, whatever the other arguments say."""
    torch.manual_seed(0)
    decoder = ConvDecoder(CHANNELS, 3, depths=(9, 9, 9), heads=7, mlp_width=1, position="fourier").eval()
    assert {key: value.shape for key, value in decoder.state_dict().items()} == {key: value.shape for key, value in ConvDecoder(CHANNELS, 3).state_dict().items()}
    seen = {}
    decoder.stage8.register_forward_hook(lambda module, inputs, output: seen.update(features=output))
    with torch.no_grad():
        logits = decoder(levels(64, 64))
        head = decoder.mask_head
        by_convolution = nn.functional.conv2d(head.upscale2(head.upscale4(seen["features"])), decoder.readout.weight[..., None, None], decoder.readout.bias)
    torch.testing.assert_close(logits, by_convolution, atol=1e-5, rtol=1e-4)


def test_the_default_decoder_is_the_papers():
    """A variant's argument must not move the default: the same seed draws the same weights with and without naming it."""
    states = []
    for options in ({}, {"position": "fourier"}):
        torch.manual_seed(0)
        states.append(DECODERS["mqm"](CHANNELS, 2, mlp_width=16, **options).state_dict())
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert isinstance(DECODERS["mqm"](CHANNELS, 2).stage8.position, PositionalEncoding)


class Strange(nn.Module):
    """Five pairs of convolution and batch normalization, of which only the first and the last may be folded."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(5))
        self.norms = nn.ModuleList(with_statistics(nn.BatchNorm2d(3)) for _ in range(5))
        nn.utils.parametrizations.weight_norm(self.convs[2])
        nn.utils.spectral_norm(self.convs[3]).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norms[0](self.convs[0](x))
        raw = self.convs[1](x)
        x = self.norms[1](raw) + raw.sigmoid()  # a second reader of what the convolution puts out
        x = self.norms[2](self.convs[2](x))
        x = self.norms[3](self.convs[3](x))
        return [x[:, :0], x, self.norms[4](self.convs[4](x))]  # MiT gives an empty map, too


def test_only_what_nobody_else_reads_is_folded():
    torch.manual_seed(0)
    network = Strange().eval()
    twin, x = copy.deepcopy(network), torch.randn(2, 3, 32, 40)
    assert fold_batchnorms(twin, in_channels=3) == 2
    assert [type(norm).__name__ for norm in twin.norms] == ["Identity", *3 * ["BatchNorm2d"], "Identity"]
    with torch.no_grad():
        for one, other in zip(network(x), twin(x)):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert twin.convs[1].bias is None and torch.equal(twin.convs[1].weight, network.convs[1].weight), "put back"
