"""The fast and the fused form compute what the naive one computes, in outputs and gradients, whatever the size; the instruments measure."""
from __future__ import annotations

import copy
import pickle
import sys
import time
from collections import Counter

import pytest
import torch
from torch import nn

from qtseg.evaluation import timing
from qtseg.network import fast as network_fast
from qtseg.network.attention import Attention
from qtseg.network.blocks import ConvBNAct, TwoForms
from qtseg.network.bridge import UpConvBNAct
from qtseg.data.segmentation import SegmentationData
from qtseg.network.mqm import MaskHead
from qtseg.training.losses import ce_dice_loss
from qtseg.network.model import QTSeg
from qtseg.training.config import TrainConfig
from qtseg.training.trainer import Trainer

SIZES = [(1, 64, 64), (2, 33, 47), (1, 32, 160), (3, 96, 64), (1, 200, 136)]  # batch, height, width


def small(classes: int = 2) -> QTSeg:
    torch.manual_seed(0)
    return QTSeg(classes=classes, width=8, depths=[1, 1, 1], mlp_width=64)


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ce_dice_loss(model(x), target).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-3) -> None:
    """Each within `relative` of its own largest entry; a gradient that is zero but for rounding within the network's largest."""
    floor = 1e-3 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = torch.maximum(gradient.abs().max(), floor)
        assert (found[name] - gradient).abs().max() <= relative * scale, name


def accelerated(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    network_fast.accelerate(twin)
    return twin


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module) for module in model.modules())


def test_fast_forms_stand_where_they_belong():
    network = QTSeg(width=8)
    for form in (network, network.fuse(), copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        found = kinds(form)
        assert found[network_fast.FewQueriesAttention] == 6 + 3  # one in each block, one at the end of each stage
        assert found[network_fast.FewKeysAttention] == found[Attention] == found[network_fast.FastFeedForward] == 6  # Attention: among tokens
        assert found[network_fast.FastConvBNAct] > 50 and found[network_fast.FastUpConvBNAct] == 3 and found[network_fast.FastMaskHead] == 1
        assert found[network_fast.FastUpConv] == 3 + 4  # the bridge's, and two between stages, two in the mask head
        assert not found[ConvBNAct] + found[UpConvBNAct] + found[MaskHead]
    naive = network.naive()
    assert not kinds(naive).keys() & network_fast.READABLE.keys(), "the naive form has the lessons' classes"
    assert all(module.use_naive for module in naive.modules() if isinstance(module, TwoForms))
    assert naive.state_dict().keys() == network.state_dict().keys()
    network_fast.accelerate(naive)
    assert kinds(naive) == kinds(network) and not any(module.use_naive for module in naive.modules() if isinstance(module, TwoForms))


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("batch, height, width", SIZES)
def test_logits_equal_the_naive_form(classes, batch, height, width):
    model, x = small(classes).eval(), images(batch, height, width)
    with torch.no_grad():
        expected = model.naive()(x)
        for form in (model, model.fuse()):
            torch.testing.assert_close(form(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("batch, height, width", SIZES)
def test_gradients_equal_the_naive_form(classes, batch, height, width):
    """In double precision, where rounding cannot hide an error.

    A single image is compared with the naive form's answer to the same image twice, which has the same gradients: for one
    image alone PyTorch 2.15's BatchNorm gets the naive form's gradients wrong on a CPU (input contiguous, gradient channels
    last with another stride at the axis of length one); finite differences agree with the fast form.
    """
    model, x = small(classes).double(), images(batch, height, width).double()
    target = torch.randint(0, max(classes, 2), (batch, height, width), generator=torch.Generator().manual_seed(2))
    twice = (torch.cat([x, x]), torch.cat([target, target])) if batch == 1 else (x, target)
    expected = gradients(model.naive(), *twice)
    assert_same_gradients(gradients(model, x, target), expected, relative=1e-6)


def test_gradients_at_full_width_in_single_precision():
    torch.manual_seed(0)
    model, x = QTSeg().train(), images(2, 128, 128)
    target = (x[:, 0] > 0.5).long()
    expected = gradients(model.naive(), x, target)
    assert_same_gradients(gradients(model, x, target), expected)


@pytest.mark.parametrize("kind, shapes", [(network_fast.FewQueriesAttention, (3, 50)), (network_fast.FewKeysAttention, (50, 3))])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_attention_equals_the_plain_form_below_and_above_its_limit(kind, shapes, heads, tokens):
    torch.manual_seed(0)
    plain = Attention(32, 16, heads).double()
    fast = copy.deepcopy(plain)
    fast.__class__ = kind
    queries, keys = (torch.randn(2, tokens if n == 3 else n, 32, dtype=torch.float64, requires_grad=True) for n in shapes)
    values = torch.randn_like(keys).requires_grad_()
    found = []
    for module in (plain, fast):
        inputs = (queries, keys, values)
        output = module.naive_forward(*inputs) if module is plain else module(*inputs)
        found.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *module.parameters()])])
    for expected, computed in zip(*found):
        torch.testing.assert_close(computed, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("classes", [1, 3])
def test_fast_mask_head_equals_the_plain_form_for_any_chunk(chunk, classes):
    torch.manual_seed(0)
    plain = MaskHead(16).double()
    fast = copy.deepcopy(plain)
    fast.__class__, fast.chunk = network_fast.FastMaskHead, chunk
    tokens = torch.randn(2, classes, 16, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for output, module in ((plain.naive_forward(tokens, features), plain), (fast(tokens, features), fast)):
        found.append([output, *torch.autograd.grad(output.square().sum(), [tokens, features, *module.parameters()])])
    assert found[0][0].shape == (2, classes, 12, 20)
    for expected, computed in zip(*found):
        torch.testing.assert_close(computed, expected, atol=1e-9, rtol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(fast(tokens, features), found[0][0], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_fast_blocks_equal_the_plain_ones_in_training(form):
    """Output, gradients and the counted statistics, in training and evaluation; frozen weights get no gradient."""
    torch.manual_seed(0)
    for plain, fast in ((ConvBNAct(4, 6), network_fast.FastConvBNAct), (UpConvBNAct(4, 6, 2), network_fast.FastUpConvBNAct)):
        plain = plain.double()
        twin = copy.deepcopy(plain)
        twin.__class__ = fast
        x = torch.randn(3, 4, 5, 7, dtype=torch.float64).to(memory_format=form).requires_grad_()
        found = [[y := block(x), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()]), *block.buffers()]
                 for block in (plain, twin)]
        for expected, computed in zip(*found):
            torch.testing.assert_close(computed, expected, atol=1e-10, rtol=1e-10)
        assert twin.norm.num_batches_tracked == 1
        torch.testing.assert_close(twin.eval()(x), plain.eval()(x))
        twin.train().requires_grad_(False)(x).sum().backward()
        assert x.grad is not None and all(parameter.grad is None for parameter in twin.parameters())


def test_fast_mask_head_keeps_no_wide_map():
    """Nothing of the last step's width is saved for the backward pass."""
    torch.manual_seed(0)
    saved = {}
    for form in (MaskHead, network_fast.FastMaskHead):
        head, sizes = MaskHead(16), []
        head.__class__, head.chunk = form, 256
        note = lambda tensor: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            head(torch.randn(1, 2, 16, requires_grad=True), torch.randn(1, 16, 32, 32, requires_grad=True))
        saved[form] = max(sizes)
    assert saved[MaskHead] >= 16 * 32 * 32 * 16 > 2 * saved[network_fast.FastMaskHead]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # PyTorch, when its switch is used
@pytest.mark.parametrize("batch, height, width", SIZES)
def test_fused_form_is_the_same_without_one_dnn(batch, height, width, monkeypatch):
    """oneDNN's operators are undocumented: a PyTorch that lacks them, or has oneDNN switched off, goes the readable way."""
    fused, x = small().fuse(), images(batch, height, width)
    with torch.no_grad():
        expected = fused(x)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=0)
        for module in (network_fast, timing):
            monkeypatch.setattr(module, "HAS_ONE_DNN", False)
        torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=0)
    assert timing.operations(lambda: small()(x)) > 0


@pytest.mark.skipif(not network_fast.HAS_ONE_DNN, reason="this PyTorch has no oneDNN")
def test_weights_kept_for_one_dnn_follow_their_originals():
    """New weights, a copy, a pickle, another type: never an answer from weights that are no longer there."""
    torch.manual_seed(0)
    fused, other, x = small().fuse(), small().fuse(), images(2, 64, 96)
    for name, tensor in other.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    with torch.no_grad():
        before, expected = fused(x), other(x)
        assert any(getattr(module, "_packed", None) for module in fused.modules()), "nothing was kept, so nothing is tested"
        twin, pickled = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
        assert not any(getattr(module, "_packed", None) for form in (twin, pickled) for module in form.modules())
        fused.load_state_dict(other.state_dict())
        torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=0)
        for form in (twin, pickled):
            torch.testing.assert_close(form(x), before, atol=1e-5, rtol=0)
        torch.testing.assert_close(twin.double()(x.double()), before.double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(twin.float()(x), before, atol=1e-4, rtol=0)
        rounded = pickled.half().float()  # was used before, so it has kept something
        torch.testing.assert_close(rounded(x), copy.deepcopy(rounded)(x), atol=0, rtol=0)
        pickled.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(pickled(x), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(before, expected, atol=1e-3)


@pytest.mark.skipif(not network_fast.HAS_ONE_DNN, reason="this PyTorch has no oneDNN")
def test_convolutions_sort_their_weights_for_the_size_they_are_given(monkeypatch):
    """oneDNN sorts weights that are in the order of another size again in every call, which took up to six times as long."""
    fused, sort, sizes = small().fuse(), torch.ops.mkldnn._reorder_convolution_weight, []
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", lambda *given: sizes.append(given[-1]) or sort(*given))
    counts, shapes = [], [(1, 32, 32), (1, 64, 96), (1, 64, 96), (2, 64, 96), (1, 32, 32)]
    with torch.no_grad():
        for shape in shapes:
            before = len(sizes)
            torch.testing.assert_close(fused(images(*shape)), copy.deepcopy(fused)(images(*shape)), atol=1e-5, rtol=0)
            counts.append(len(sizes) - before)
    convolutions = counts[0] // 2  # the fused network and its copy, which keeps nothing yet
    assert convolutions > 0 and counts == [convolutions * n for n in (2, 2, 1, 2, 2)]


@pytest.mark.skipif(not network_fast.HAS_ONE_DNN, reason="this PyTorch has no oneDNN")
def test_kept_weights_follow_what_happens_to_a_layer_alone():
    """New memory in an old weight is noticed; a write to .data is not counted by PyTorch, and forgotten when told."""
    torch.manual_seed(0)
    fused, x = small().fuse(), images(1, 64, 64)
    encoder, matrix = fused.encoder.down4.conv, fused.decoder.stage8.position.gaussian_matrix
    layer = fused.decoder.stage32.blocks[0].feed_forward.expand
    changes = {"half and back": lambda: encoder.half().float(), "new data": lambda: setattr(layer.weight, "data", 2 * layer.weight),
               "vector": lambda: nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(layer.parameters()), layer.parameters())}
    writes = {"written": lambda: encoder.weight.data.mul_(2), "linear": lambda: layer.weight.data.neg_(), "matrix": lambda: matrix.data.neg_()}
    with torch.no_grad():
        for name, change in {**changes, **writes}.items():
            before = fused(x)
            change()
            if name in writes:
                network_fast.forget_kept(fused)
            torch.testing.assert_close(fused(x), copy.deepcopy(fused)(x), atol=1e-5, rtol=0, msg=name)
            assert not torch.equal(fused(x), before), name


@pytest.mark.parametrize("form", ["plain", "folded", "training", "fused", "enlarging", "enlarging fused"])
def test_hooks_hold_what_they_were_given(form):
    """SiLU works in place without gradients, and fast forms skip steps: with a hook on a step its values stay."""
    torch.manual_seed(0)
    block = UpConvBNAct(8, 8, scale=2) if "enlarging" in form else ConvBNAct(8, 8)
    block.norm.running_mean.uniform_(-1, 1)
    block = accelerated(nn.Sequential(block)) if "fused" in form or form == "training" else nn.Sequential(block)
    block.train(form == "training")
    x, seen = torch.randn(2, 8, 16, 16), {}
    if form == "folded" or "fused" in form:
        block.requires_grad_(False)[0].fold()
    step = block[0].norm
    with torch.set_grad_enabled(form == "training"):
        expected = copy.deepcopy(block)(x)
        step.register_forward_hook(lambda module, inputs, output: seen.update(output=output, copy=output.detach().clone()))
        result = block(x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert torch.equal(seen["output"], seen["copy"])
    torch.testing.assert_close(nn.functional.silu(seen["output"]), result, atol=1e-6, rtol=0)
    with torch.no_grad():
        inputs = {}
        block[0].conv.register_forward_hook(lambda module, inputs_, output: inputs.update(output=output, copy=output.clone())) \
            if hasattr(block[0], "conv") else None
        block(x)
    assert not inputs or torch.equal(inputs["output"], inputs["copy"])


def test_what_is_trained_is_not_kept_for_one_dnn():
    """PyTorch's fused optimizers write to weights without raising their version: validation must see the new ones all the same."""
    torch.manual_seed(0)
    model, x = small(), images(2, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), model.naive()(x), atol=1e-4, rtol=0)
        optimizer.zero_grad()
        ce_dice_loss(model.train()(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()


def test_fused_form_gives_images_a_gradient():
    """What is drawn as a saliency map: the way that oneDNN knows no gradients for is not taken."""
    model, x = small().eval(), images(2, 64, 64).requires_grad_()
    found = [torch.autograd.grad(form(x).square().sum(), x)[0] for form in (model.naive(), model.fuse())]
    torch.testing.assert_close(found[1], found[0], atol=1e-4 * found[0].abs().max().item(), rtol=0)


def test_operations_are_counted_alike_in_all_forms():
    """Convolutions and products behind oneDNN's operators count, too; absorbed attention needs fewer."""
    model, x = QTSeg(width=8).eval(), images(1, 256, 256)
    naive, fused = (timing.operations(lambda form=form: torch.no_grad()(form)(x)) for form in (model.requires_grad_(False).naive(), model.fuse()))
    assert 0.8 * naive < fused < naive, "absorbed attention is counted as what it does"


def test_frozen_and_unusual_normalization_goes_the_readable_way():
    """BatchNorm that doesn't move, or averages in another way, is none that the fast form knows."""
    torch.manual_seed(0)
    for change in (lambda norm: norm.eval(), lambda norm: setattr(norm, "momentum", None)):
        plain, x = ConvBNAct(3, 8), torch.randn(2, 3, 8, 8)
        change(plain.norm)
        fast = accelerated(plain)
        torch.testing.assert_close(fast(x), plain(x))
        torch.testing.assert_close(fast.state_dict(), plain.state_dict())


def test_one_compiled_graph_serves_many_sizes():
    """No graph break, and no recompilation from the second size on."""
    torch.compiler.reset()
    graphs = []
    model = small().fuse()
    compiled = torch.compile(model, fullgraph=True, dynamic=True,
                             backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for batch, height, width in ((2, 64, 96), (3, 160, 128), (4, 96, 256)):
            x = images(batch, height, width)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("forms", ["naive", "fast"])
def test_training_takes_the_forms_it_is_told(forms, tmp_path):
    data = SegmentationData.open("phantoms:nuclei:8", size=32, classes=2, cache=str(tmp_path), progress=False)
    config = TrainConfig(width=8, depths=[1, 1, 1], mlp_width=32, batch=4, device="cpu", forms=forms)
    trainer = Trainer(config, data)
    loss, _ = trainer.step(next(trainer.begin_epoch()))
    assert loss.isfinite()
    found = kinds(trainer.model)
    assert bool(found[network_fast.FewKeysAttention]) is bool(found[network_fast.FastMaskHead]) is (forms == "fast")
    trainer.model.save_pretrained(tmp_path / "saved")
    assert kinds(QTSeg.from_pretrained(tmp_path / "saved"))[network_fast.FastMaskHead] == 1, "a checkpoint has no form"


def test_an_adapter_in_a_layer_and_a_hook_on_it_are_called():
    """The fast forms read weights without calling their layers: not where that would leave something out."""
    class Adapter(nn.Linear):
        def forward(self, x):
            return 100 * super().forward(x)

    torch.manual_seed(0)
    x = images(2, 256, 256)
    for name in ("token_to_feature.query", "token_to_feature.value", "feature_to_token.value", "feature_to_token.out", "feed_forward.expand"):
        model, seen = small().eval().requires_grad_(False), []
        layer = model.decoder.stage8.blocks[0].get_submodule(name)
        before = model(x)
        layer.__class__ = Adapter
        assert (model(x) - before).abs().max() > 1e-3, name
        torch.testing.assert_close(model(x), model.naive()(x), atol=1e-4, rtol=0)
        layer.__class__ = nn.Linear
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(model(x), before, atol=1e-4, rtol=0)
        assert len(seen) == 1, name


def test_a_backward_hook_on_a_step_is_called():
    block, seen = accelerated(nn.Sequential(ConvBNAct(4, 4))), []
    block[0].norm.register_full_backward_hook(lambda *_: seen.append(1))
    block(torch.randn(2, 4, 8, 8)).sum().backward()
    assert seen == [1]


def test_a_plain_training_loop_is_what_fit_computes():
    """As built, in training: compiled without breaks, and the same step."""
    torch.manual_seed(0)
    model, x = small().train(), images(2, 64, 96)
    target = (x[:, 0] > 0).long()
    expected = gradients(model, x, target)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_same_gradients({name.removeprefix("_orig_mod."): one for name, one in gradients(compiled, x, target).items()}, expected)


def test_jobs_take_turns_and_are_timed():
    calls = []
    jobs = {"short": lambda: calls.append("short"), "long": lambda: (calls.append("long"), time.sleep(0.01))}
    times = timing.interleaved_times(jobs, rounds=3, warm_up=1)
    assert calls == ["short", "long", "long", "short"] * 2
    assert [len(values) for values in times.values()] == [3, 3] and times["long"] == sorted(times["long"])
    assert min(times["long"]) >= 10
    lines = timing.timing_lines({"a": [10.0, 20.0, 40.0], "bb": [5.0, 5.0, 6.0]})
    assert "20.0 ms" in lines[0] and "1.00×" in lines[0] and "4.00×" in lines[1]


def test_boxes_add_up():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    times = timing.box_times(model, torch.randn(2, 4), ["0", "1"], rounds=3)
    assert list(times) == ["0", "1", "rest"] and all(value >= 0 for value in times.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its highest memory use")
def test_memory_growth_sees_a_tensor_come_and_go():
    assert 75 < timing.memory_growth(lambda: torch.ones(20_000_000).sum()) < 130  # 80 MB of float32
    assert timing.memory_growth(lambda: None) < 20


def test_operations_and_exponent():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert timing.operations(lambda: a @ b) == 2 * 3 * 4 * 5
    assert timing.growth_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert timing.matrix_rate(side=64) > 0 and timing.copy_rate(megabytes=1) > 0
