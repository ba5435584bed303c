"""One contract for every model: add a builder to MODELS and it must pass all of this."""
from __future__ import annotations

import copy
import functools

import pytest
import torch

from qtseg.losses import ce_dice_loss
from qtseg.model import QTSeg

MODELS = {
    "qtseg": QTSeg,
    "qtseg-width8": functools.partial(QTSeg, width=8),
    "qtseg-identity": functools.partial(QTSeg, width=8, bridge="identity"),
}


@pytest.fixture(params=MODELS)
def build(request):
    """A builder of one model, seeded: build(classes=2, in_channels=3)."""

    def make(**options):
        torch.manual_seed(0)
        return MODELS[request.param](**options)

    return make


def images(batch: int = 2, channels: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def loss_of(model, x: torch.Tensor, classes: int) -> torch.Tensor:
    target = torch.randint(0, max(classes, 2), (len(x), *x.shape[-2:]), generator=torch.Generator().manual_seed(2))
    return ce_dice_loss(model(x), target)


@pytest.mark.parametrize("height, width", [(32, 64), (33, 47), (64, 64), (500, 375)])
@pytest.mark.parametrize("training", [False, True])
def test_any_size_and_a_batch_of_one(build, height, width, training):
    model = build().train(training)
    with torch.no_grad():
        logits = model(images(1, height=height, width=width))
    assert logits.shape == (1, 2, height, width)
    assert logits.isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_classes_and_channels(build, classes, channels):
    model = build(classes=classes, in_channels=channels)
    x = images(2, channels)
    loss_of(model, x, classes).backward()
    assert model(x).shape == (2, classes, 64, 64)


def has_no_gradient(name: str, classes: int) -> bool:
    """Softmax ignores what is added to every score: the keys' bias. One token alone is looked at whatever it is."""
    one_token = classes == 1 and ("self_attention" in name or "feature_to_token" in name)
    return name.endswith("key.bias") or (one_token and (".query." in name or ".key." in name))


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_gradients_reach_every_parameter_that_can_have_one(build, classes):
    model = build(classes=classes)
    loss_of(model, images(), classes).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not has_no_gradient(name, classes):
            assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"


def test_forms_agree_in_logits_and_gradients(build):
    model, x = build(), images()
    naive = model.naive()
    results = []
    for form in (model, naive):
        loss_of(form, x, 2).backward()
        results.append({name: parameter.grad for name, parameter in form.named_parameters()})
    for name, gradient in results[0].items():
        scale = results[1][name].abs().max().clamp(min=1e-6)
        assert (gradient - results[1][name]).abs().max() / scale < 1e-2 or name.endswith("key.bias"), name
    with torch.no_grad():
        expected = naive.eval()(x)
        torch.testing.assert_close(model.eval()(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.fuse()(x), expected, atol=1e-4, rtol=1e-4)


def test_save_and_load_give_the_same_model(build, tmp_path):
    model = build(classes=3).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config and list(loaded.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_two_runs_give_the_same_numbers(build):
    def trained():
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, images(), 2).backward()
            optimizer.step()
        return model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_constant_images_give_finite_logits_and_gradients(build, value):
    """In training beside another image: a batch of nothing but zeros leaves BatchNorm no variance to divide by."""
    model = build()
    with torch.no_grad():
        assert model.eval()(torch.full((1, 3, 64, 64), value)).isfinite().all()
    x = images()
    x[0] = value
    loss = ce_dice_loss(model.train()(x), torch.zeros(2, 64, 64, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_bf16(build):
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
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiles_without_graph_breaks(build):
    torch.compiler.reset()
    model, x = build().eval(), images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)(x), expected, atol=1e-4, rtol=1e-4)
    loss_of(torch.compile(model.train(), backend="aot_eager", fullgraph=True), x, 2).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_exports(build):
    model, x = build().eval(), images()
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x), atol=1e-4, rtol=1e-4)


def test_attention_weights_can_be_asked_for(build):
    model = build(classes=3).eval()
    with torch.no_grad():
        encoding = model.encode(images(2, height=64, width=96))
        stages, low_res_logits = model.decode(encoding)
    assert [tuple(level.shape[-2:]) for level in encoding.encoder] == [tuple(level.shape[-2:]) for level in encoding.bridge] == [(8, 12), (4, 6), (2, 3)]
    assert low_res_logits.shape == (2, 3, 32, 48)
    for stage, blocks in zip(stages, (3, 2, 1)):
        pixels = stage.features.shape[-2] * stage.features.shape[-1]
        assert len(stage.attention) == blocks + 1
        assert stage.attention[0]["token_to_feature"].shape == stage.attention[-1]["final"].shape == (2, 8, 3, pixels)
        assert stage.attention[0]["feature_to_token"].shape == (2, 8, pixels, 3)
        sums = stage.attention[0]["feature_to_token"].sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("bad, words", [
    (torch.zeros(1, 3, 31, 64), "at least 32"),
    (torch.zeros(1, 4, 64, 64), r"\[B, 3, H, W\]"),
    (torch.zeros(3, 64, 64), r"\[B, 3, H, W\]"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point"),
])
def test_wrong_images_are_refused_in_one_sentence(build, bad, words):
    with pytest.raises(ValueError, match=words):
        build().eval()(bad)
    with pytest.raises(ValueError, match="32×32"):
        build().train()(torch.zeros(1, 3, 32, 32))


def test_frozen_encoder_keeps_its_weights(build):
    model = build().freeze_encoder()
    loss_of(model, images(), 2).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert all(parameter.requires_grad for parameter in model.unfreeze_encoder().parameters())
