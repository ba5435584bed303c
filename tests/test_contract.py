"""One contract for every model: add a builder to MODELS and it must pass all of this."""
from __future__ import annotations

import copy
import functools

import pytest
import torch

from qtseg.network.positions import POSITIONS
from qtseg.network.bridges import BRIDGES
from qtseg.network.decoders import DECODERS
from qtseg.training.losses import ce_dice_loss
from qtseg.network.baselines import BASELINES, NETWORKS, Baseline, pretrained
from qtseg.network.model import QTSeg

SMALL = functools.partial(QTSeg, width=8, depths=(1, 1, 1), mlp_width=32)
MODELS = {
    "qtseg": QTSeg,
    "dual-mix attention": functools.partial(SMALL, decoder="dma"),
    "projection, one stage, learned position": functools.partial(SMALL, bridge="projection", decoder="mqm_single", position="learned"),
    "one level, convolutions": functools.partial(SMALL, bridge="single", decoder="conv"),
    "resnet18, no position": functools.partial(SMALL, encoder="resnet18", position="none"),
    "efficientnet_lite0": functools.partial(SMALL, encoder="efficientnet_lite0"),
    "mit_b0, identity": functools.partial(SMALL, encoder="mit_b0", bridge="identity"),
    **{name: functools.partial(Baseline, name, "mit_b0" if name == "segformer" else "resnet18") for name in BASELINES},
}
NOT_READ = {"one level, convolutions": ("encoder.neck_down", "encoder.bottom_up")}  # this bridge reads stride 8, made before these
OTHERS_ENCODER = {"resnet18, no position", "mit_b0, identity"}  # with parts that other models of the contract have, too
DIES_OF_ZERO = {"mit_b0, identity", "segformer"}  # LayerNorm on exactly zero: gradients × 1000, in MiT again and again
NEEDS_TWO = {"deeplabv3plus"}  # pools whole images to one value: BatchNorm cannot learn from one of them


@functools.lru_cache(maxsize=2)
def built(name: str, **options):
    torch.manual_seed(0)
    return MODELS[name](**options)


@pytest.fixture(params=MODELS, scope="module")  # all tests of one model, then the next: its copies are cheap
def name(request) -> str:
    return request.param


@pytest.fixture
def build(name):
    """A builder of one model, always with the same weights: build(classes=2, in_channels=3)."""
    return lambda **options: copy.deepcopy(built(name, **options))


@pytest.fixture
def build_small(name, build):
    """The same for tests that record the graph, of networks with parts of our own; the published depths only repeat its blocks."""
    if name in BASELINES or name in OTHERS_ENCODER:
        pytest.skip("the graphs of timm's and segmentation-models-pytorch's parts are tested there")
    return functools.partial(build, **SMALL.keywords) if name == "qtseg" else build


def images(batch: int = 2, channels: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def loss_of(model, x: torch.Tensor, classes: int) -> torch.Tensor:
    target = torch.randint(0, max(classes, 2), (len(x), *x.shape[-2:]), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)  # some baselines drop channels at random in training
    return ce_dice_loss(model(x), target)


def gradients(model, name: str) -> dict[str, torch.Tensor]:
    """Every parameter's gradient by name, of those that the forward pass reads; asserts that all are there and finite."""
    unread = NOT_READ.get(name, ())
    found = {entry: parameter.grad for entry, parameter in model.named_parameters() if not entry.startswith(unread)}
    assert not [entry for entry, gradient in found.items() if gradient is None or not gradient.isfinite().all()]
    return found


def test_every_choice_is_in_the_contract():
    chosen = [builder.keywords for builder in MODELS.values() if isinstance(builder, functools.partial)]
    for part, choices in {"bridge": BRIDGES, "decoder": DECODERS, "position": POSITIONS}.items():
        paper = {"bridge": "mlff", "decoder": "mqm", "position": "fourier"}[part]
        assert {options.get(part, paper) for options in chosen} == set(choices), part
    assert set(NETWORKS) <= set(MODELS)


def test_any_size_and_a_batch_of_one(name, build):
    model = build()
    for height, width in [(32, 64), (33, 47), (130, 97), *([(500, 375)] if name == "qtseg" else [])]:
        for training in (True, False):
            one = 2 if training and name in NEEDS_TWO else 1
            with torch.no_grad():
                logits = model.train(training)(images(one, height=height, width=width))
            assert logits.shape == (one, 2, height, width) and logits.isfinite().all()


def has_no_gradient(name: str, classes: int) -> bool:
    """Softmax ignores what is added to every score: the keys' bias. One token alone is looked at whatever it is."""
    one_token = classes == 1 and ("self_attention" in name or "feature_to_token" in name)
    return name.endswith("key.bias") or (one_token and (".query." in name or ".key." in name))


@pytest.mark.parametrize("classes, channels", [(1, 3), (2, 1), (3, 4), (7, 3)])
def test_classes_and_channels_and_gradients_everywhere(name, build, classes, channels):
    model, x = build(classes=classes, in_channels=channels), images(2, channels)
    loss_of(model, x, classes).backward()
    for entry, gradient in gradients(model, name).items():
        if not has_no_gradient(entry, classes):
            assert gradient.abs().max() > 0, f"{entry} gets no gradient"
    with torch.no_grad():
        assert model(x).shape == (2, classes, 64, 64)


def test_forms_agree_in_logits_and_gradients(name, build):
    """In double precision: a rounding error that carries one value over a ReLU's corner changes its gradient."""
    dtype, width = torch.float64, 32 if name in BASELINES else 64
    model, x = build().to(dtype), images(width=width).to(dtype)
    naive = model.naive()
    results = []
    for form in (model, naive):
        loss_of(form, x, 2).backward()
        results.append(gradients(form, name))
    for entry, gradient in results[0].items():
        scale = results[1][entry].abs().max().clamp(min=1e-6)
        assert (gradient - results[1][entry]).abs().max() / scale < 1e-2 or entry.endswith("key.bias"), entry
    with torch.no_grad():
        expected = naive.eval()(x)
        torch.testing.assert_close(model.eval()(x), expected, atol=1e-4, rtol=1e-4)
        fused = model.fuse()
        torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules()), "all of these models fold entirely"


def test_save_and_load_give_the_same_model(build, tmp_path):
    model = build(classes=3).eval()
    model.save_pretrained(tmp_path)
    loaded = pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config == model.config and list(loaded.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))

    other = build(classes=3)  # as in a study with frozen encoders: trained under one head, kept still under another
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    head = {entry: tensor.clone() for entry, tensor in other.state_dict().items() if not entry.startswith(other.encoder_prefix)}
    assert other.load_encoder(tmp_path) is other
    assert all(torch.equal(tensor, other.encoder.state_dict()[entry]) for entry, tensor in model.encoder.state_dict().items())
    assert head and all(torch.equal(tensor, other.state_dict()[entry]) for entry, tensor in head.items())


def test_two_runs_give_the_same_numbers(build):
    def trained():
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, images(width=32), 2).backward()
            optimizer.step()
        return model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_constant_images_give_finite_logits_and_gradients(name, build):
    """In training beside another image: a batch of nothing but zeros leaves BatchNorm no variance to divide by."""
    model, x = build(), images(4)
    x[:3] = torch.tensor([-1.0, 0.01 if name in DIES_OF_ZERO else 0.0, 1.0])[:, None, None, None]
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()
    loss = ce_dice_loss(model.train()(x), torch.zeros(4, 64, 64, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite() and gradients(model, name)


def test_autocast_bf16(name, build):
    model, x = build().eval(), images()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x).float()
    assert rough.isfinite().all()
    assert (rough - exact).abs().max() <= 0.1 * exact.abs().max().clamp(min=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model.train(), x, 2)
    loss.backward()
    gradients(model, name)


def test_compiles_without_graph_breaks(build_small):
    torch.compiler.reset()
    model, x = build_small().eval(), images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected, atol=1e-4, rtol=1e-4)


def test_trains_compiled():
    """The paper's parts through the whole of the compiler but its code generation, backward included."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = SMALL()
    loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), images(), 2).backward()
    gradients(model, "qtseg")


def test_exports(build_small):
    model, x = build_small().eval(), images()
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x), atol=1e-4, rtol=1e-4)


def test_attention_weights_can_be_asked_for(name, build):
    if name in BASELINES:
        pytest.skip("baselines have neither a bridge nor tokens to show")
    model = build(classes=3).eval()
    with torch.no_grad():
        encoding = model.encode(images(2, height=64, width=96))
        stages, low_res_logits = model.decode(encoding)
    assert [tuple(level.shape[-2:]) for level in encoding.encoder] == [tuple(level.shape[-2:]) for level in encoding.bridge] == [(8, 12), (4, 6), (2, 3)]
    assert low_res_logits.shape == (2, 3, 32, 48)
    expected = {"mqm": (2, 1, 0), "dma": (2, 1, 0), "mqm_single": (0,), "conv": ()}[model.config["decoder"]]  # places in `depths`, coarse to fine
    assert len(stages) == len(expected)
    for stage, place in zip(stages, expected):
        pixels = stage.features.shape[-2] * stage.features.shape[-1]
        assert len(stage.attention) == model.config["depths"][place] + 1
        assert stage.attention[0]["token_to_feature"].shape == stage.attention[-1]["final"].shape == (2, 8, 3, pixels)
        assert stage.attention[0]["feature_to_token"].shape == (2, 8, pixels, 3)
        sums = stage.attention[0]["feature_to_token"].sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_wrong_images_are_refused_in_one_sentence(name, build):
    model = build()
    for bad, words in [(torch.zeros(1, 3, 31, 64), "at least 32"), (torch.zeros(1, 4, 64, 64), r"\[B, 3, H, W\]"),
                       (torch.zeros(3, 64, 64), r"\[B, 3, H, W\]"),
                       (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point")]:
        with pytest.raises(ValueError, match=words):
            model.eval()(bad)
    with pytest.raises(ValueError, match="train on two images or more"):
        model.train()(torch.zeros(1, 3, 32, 32))
    if name in NEEDS_TWO:
        with pytest.raises(ValueError, match="train on two images or more"):
            model(torch.zeros(1, 3, 64, 64))


def test_frozen_encoder_keeps_its_weights(build):
    model = build().freeze_encoder()
    loss_of(model, images(), 2).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    rest = {entry: p for entry, p in model.named_parameters() if not entry.startswith(model.encoder_prefix)}
    assert rest and all(parameter.grad is not None for parameter in rest.values())
    assert all(parameter.requires_grad for parameter in model.unfreeze_encoder().parameters())
