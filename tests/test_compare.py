"""``compare``: differences that were planted, and numbers that NumPy computes from plain runs of both models."""

import contextlib
import copy
import gc
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantized.dynamic as nnqd
import torch.ao.quantization as quantization
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from convtap._capture.capture import capture
from convtap._debug.compare import compare
from convtap._debug.finite import finite
from convtap._debug.stream import Stream
from convtap._errors import InvalidType, InvalidValue, LayerNotFound, Unsupported
from convtap._result.load import load
from tests.process import run_python

# torch itself warns at every step of its own quantization that it will move to another package
quantizing = pytest.mark.filterwarnings("ignore:.*(quantiz|reduce_range|observer).*")


class Net(nn.Module):
    """Convolution, BatchNorm and ReLU, twice, and one more convolution."""

    def __init__(self, bn=True):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 8, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv1d(8, 8, 5, padding=2)
        self.bn2 = nn.BatchNorm1d(8)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv1d(8, 4, 5, padding=2)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.conv3(x)


def net():
    """A Net in eval mode, whose running statistics are not the trivial ones."""
    model = Net()
    for _ in range(3):
        model(torch.randn(8, 1, 64) * 2 + 1)
    return model.eval()


def plain(depth=3, names=None):
    names = names or [f"conv{i}" for i in range(depth)]
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Conv1d(2, 2, 3, padding=1))
    return model.eval()


def outputs_by_hand(model, x, types=nn.Conv1d):
    """Clones of all outputs of a type, by torch's own hooks."""
    found = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: found.__setitem__(name, out.detach().clone()))
        for name, module in model.named_modules()
        if isinstance(module, types)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


X = torch.linspace(-2, 2, 2 * 2 * 40).reshape(2, 2, 40).sin()
SIGNAL = torch.linspace(-20, 20, 4 * 64).reshape(4, 1, 64).sin()


def test_the_numbers_are_those_of_numpy():
    a, b = plain(), plain()
    hand_a, hand_b = outputs_by_hand(a, X), outputs_by_hand(b, X)
    result = compare(a, b, example=X)
    for row in result.rows[:-1]:
        x, y = hand_a[row.name].double().numpy(), hand_b[row.name].double().numpy()
        norm = np.linalg.norm
        assert row.max_abs == pytest.approx(np.abs(x - y).max())
        assert row.relative == pytest.approx(norm(x - y) / norm(x))
        assert row.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))
        assert row.cosine == pytest.approx((x * y).sum() / norm(x) / norm(y))
        assert row.shape == (2, 2, 40)


def test_equal_models_agree_and_their_noise_is_nothing():
    a = plain()
    result = compare(a, copy.deepcopy(a), example=X)
    assert [row.name for row in result] == ["conv0", "conv1", "conv2", "<output>"]
    assert result.agrees
    assert result.first is None
    assert {(row.max_abs, row.relative, row.sqnr_db) for row in result} == {(0.0, 0.0, math.inf)}


def test_the_planted_wrong_layer_is_the_first_over():
    a = plain(5)
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[2].weight[1, 0, 1] += 0.1
    result = compare(a, b, example=X)
    assert result.first.name == "conv2"
    assert [row.over for row in result] == [False, False, True, True, True, True]
    assert "4 of 6 over" in str(result)
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines if "← first over" in line] == ["conv2"]
    assert "← first over" in result._repr_html_()


def test_atol_and_rtol_are_elementwise_against_a():
    a = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False))
    b = copy.deepcopy(a)
    x = torch.tensor([[[1.0, 100.0]]])
    with torch.no_grad():
        a[0].weight.fill_(1.0)
        b[0].weight.fill_(1.01)  # errors 0.01 and 1
    for atol, rtol, over in ((1.01, None, False), (0.9, None, True), (None, 0.0101, False), (None, 0.009, True)):
        assert (compare(a, b, example=x, atol=atol, rtol=rtol).first is not None) is over
    assert (
        compare(a, b, example=x, atol=0.005, rtol=0.005).first is not None
    )  # 0.01 against 0.005 + 0.005 · 1, 1 against 0.505
    assert compare(a, b, example=x, sqnr_db=39).first is None  # 20 · log10(100) = 40 dB
    assert compare(a, b, example=x, sqnr_db=41).first is not None


def test_bfloat16_agrees_with_float32_at_its_own_precision():
    a = net()
    b = copy.deepcopy(a).bfloat16()
    result = compare(a, b, example=SIGNAL)
    assert result.first is None
    assert {row.dtypes for row in result} == {("float32", "bfloat16")}
    with torch.no_grad():
        b.conv2.weight[3] += 1
    assert compare(a, b, example=SIGNAL).first.name == "conv2"


def test_a_folded_batchnorm_is_compared_with_the_batchnorm():
    a = net()
    b = copy.deepcopy(a)
    b.conv1, b.bn1 = fuse_conv_bn_eval(b.conv1, b.bn1), nn.Identity()
    b.conv2, b.bn2 = fuse_conv_bn_eval(b.conv2, b.bn2), nn.Identity()
    result = compare(a, b, example=SIGNAL)
    assert [(row.name, row.partner) for row in result] == [
        ("bn1", "conv1"),
        ("bn2", "conv2"),
        ("conv3", "conv3"),
        ("<output>", "<output>"),
    ]
    assert result.agrees
    assert "b fuses conv1 … bn1" in str(result)
    back = compare(b, a, example=SIGNAL)
    assert [(row.name, row.partner) for row in back][:2] == [("conv1", "bn1"), ("conv2", "bn2")]
    assert back.agrees
    with torch.no_grad():
        b.conv2.bias[0] += 1
    assert compare(a, b, example=SIGNAL).first.name == "bn2"


def test_a_batchnorm_defined_elsewhere_is_found_by_what_it_is_given():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
            self.convs = nn.ModuleList([nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3)])

        def forward(self, x):
            for conv, norm in zip(self.convs, reversed(self.norms), strict=True):
                x = norm(conv(x))
            return x

    a = Apart()
    a(torch.randn(8, 2, 30) + 3)
    a.eval()
    b = copy.deepcopy(a)
    for i in (0, 1):
        b.convs[i] = fuse_conv_bn_eval(b.convs[i], b.norms[1 - i])
    b.norms = nn.ModuleList([nn.Identity(), nn.Identity()])
    result = compare(a, b, example=X)
    assert [(row.name, row.partner) for row in result][:2] == [("norms.1", "convs.0"), ("norms.0", "convs.1")]
    assert result.agrees


def test_a_functional_relu_after_a_folded_convolution_is_no_member():
    class Functional(Net):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            return self.conv3(F.relu(self.bn2(self.conv2(x))))

    a = net()
    b = Functional().eval()
    b.load_state_dict(a.state_dict())
    b.conv1, b.bn1 = fuse_conv_bn_eval(b.conv1, b.bn1), nn.Identity()
    result = compare(a, b, example=SIGNAL)
    assert (result.rows[0].name, result.rows[0].partner) == ("bn1", "conv1")
    assert result.agrees


@quantizing
def test_fused_modules_are_compared_with_the_relu():
    a = net()
    b = quantization.fuse_modules(copy.deepcopy(a), [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"]])
    result = compare(a, b, example=SIGNAL)
    assert [(row.name, row.partner) for row in result][:3] == [
        ("relu1", "conv1"),
        ("relu2", "conv2"),
        ("conv3", "conv3"),
    ]
    assert result.agrees


class Shared(nn.Module):
    """One ReLU after every convolution."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.c1, self.c2, self.c3 = nn.Conv1d(1, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return self.act(self.c3(self.act(self.c2(self.act(self.c1(x))))))


class PartlyFused(Shared):
    """The same with the second convolution and its ReLU in one module."""

    def __init__(self):
        super().__init__()
        self.c2 = nni.ConvReLU1d(nn.Conv1d(4, 4, 3), nn.ReLU())

    def forward(self, x):
        return self.act(self.c3(self.c2(self.act(self.c1(x)))))


def test_agrees_follows_from_the_layers_and_not_from_other_calls_of_a_shared_relu():
    a, b = Shared().eval(), PartlyFused().eval()
    state = {key.replace("c2.", "c2.0."): value for key, value in a.state_dict().items()}
    b.load_state_dict(state)
    result = compare(a, b, example=SIGNAL)
    assert [(row.name, row.partner) for row in result] == [
        ("c1", "c1"),
        ("act#1", "c2"),
        ("c3", "c3"),
        ("<output>", "<output>"),
    ]
    assert (result.only_a, result.only_b, result.agrees) == ([], [], True)
    assert compare(a, b, example=SIGNAL, layers="c3").agrees
    assert compare(a, b, example=SIGNAL, layers=["c2"]).rows[0].name == "act#1"
    with torch.no_grad():
        b.c2[0].weight[0] += 0.5
        mine = F.relu(a.c2(F.relu(a.c1(SIGNAL)))).numpy()
        theirs = F.relu(b.c2[0](F.relu(b.c1(SIGNAL)))).numpy()
    row = compare(a, b, example=SIGNAL).first
    assert row.name == "act#1"
    assert row.relative == pytest.approx(np.linalg.norm(mine - theirs) / np.linalg.norm(mine), rel=1e-4)
    b.c2 = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU())  # which compares the layer itself
    assert not compare(a, b, example=SIGNAL).agrees


def test_each_call_of_a_layer_is_paired_with_what_was_folded_into_it():
    class Twice(nn.Module):
        def __init__(self, conv, norms):
            super().__init__()
            self.conv, self.norms = conv, norms

        def forward(self, x):
            for norm in self.norms:
                x = norm(self.conv(x)).tanh()
            return x

    norm = nn.BatchNorm1d(2)
    norm.running_mean += 1
    a = Twice(nn.Conv1d(2, 2, 3), nn.ModuleList([norm, norm])).eval()
    b = Twice(fuse_conv_bn_eval(a.conv, norm), nn.ModuleList([nn.Identity(), nn.Identity()])).eval()
    result = compare(a, b, example=X)
    assert [(row.name, row.partner) for row in result][:2] == [("norms.0#0", "conv#0"), ("norms.0#1", "conv#1")]
    assert result.agrees


# -- modes


def test_models_in_train_mode_are_compared_in_eval_mode_which_is_said():
    a = net()
    b = copy.deepcopy(a)
    assert compare(a, b, example=SIGNAL).notes == []
    for left, right, was in ((a, b.train(), "b was"), (b, a, "a was"), (b, b, "a and b were")):
        result = compare(left, right, example=SIGNAL)
        assert result.agrees
        assert result.notes == [
            f"both ran in eval mode, but {was} in train mode. Pass mode='train' to compare both in train mode, or mode=None to "
            "compare them as they are"
        ]
    b.eval().bn1.train()
    assert "parts of b were in train mode" in str(compare(a, b, example=SIGNAL))


def test_mode_chooses_how_models_are_compared_and_leaves_them_as_they_were():
    a = net()
    b = copy.deepcopy(a).train()
    x = SIGNAL * 3 + 2  # whose statistics are not the running ones
    before = copy.deepcopy(b.state_dict())
    result = compare(a, b, example=x, mode=None)
    with torch.no_grad():
        mine, theirs = copy.deepcopy(a)(x).numpy(), copy.deepcopy(b)(x).numpy()
    assert result.rows[-1].relative == pytest.approx(np.linalg.norm(mine - theirs) / np.linalg.norm(mine), rel=1e-4)
    assert "each ran in its own mode: a in eval mode, b in train mode" in result.notes
    assert not result.agrees
    with torch.no_grad():
        a.bn1.running_mean += 5  # train mode does not look at it
    assert compare(a, b, example=x, mode="train").agrees
    assert compare(a, b, example=x, mode="train").notes == ["both ran in train mode"]
    assert not compare(a, b, example=x).agrees
    assert (a.training, b.training, b.bn1.training) == (False, True, True)
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in before.items())
    with pytest.raises(InvalidValue, match="mode='test' is invalid. Pass 'eval', 'train' or None"):
        compare(a, b, example=x, mode="test")


def test_dropout_is_the_same_on_both_sides_in_train_mode():
    a = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Dropout(0.5), nn.Conv1d(2, 2, 3))
    assert compare(a, copy.deepcopy(a), example=X, mode="train").agrees
    dropped = compare(a, copy.deepcopy(a).eval(), example=X, mode=None)
    assert [row.name for row in dropped if row.over] == ["2", "<output>"]


def test_a_model_without_convolutions_gets_the_advice_of_every_function():
    a, b = nn.Sequential(nn.Linear(40, 3)), nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(
        LayerNotFound, match=r"side a: the Sequential has no Conv1d, but it has 1 Linear\. Pass types=nn\.M"
    ):
        compare(a, copy.deepcopy(a), example=X)
    with pytest.raises(
        LayerNotFound, match=r"side b: the Sequential has no Conv1d, but it has 1 Conv2d\. Pass types=nn\.C"
    ):
        compare(plain(), b, example=X)
    assert compare(a, copy.deepcopy(a), example=X, types=nn.Module).agrees


class Quantizable(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.quant, self.net, self.dequant = quantization.QuantStub(), net, quantization.DeQuantStub()

    def forward(self, x):
        return self.dequant(self.net(self.quant(x)))


@contextlib.contextmanager
def engine():
    before = torch.backends.quantized.engine
    supported = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "x86" if "x86" in supported else "qnnpack"
    try:
        yield torch.backends.quantized.engine
    finally:
        torch.backends.quantized.engine = before


@quantizing
def test_static_quantization_is_dequantized_and_compared_with_the_fused_members():
    a = net()
    b = quantization.fuse_modules(copy.deepcopy(a), [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"]])
    with engine() as name:
        b = Quantizable(b).eval()
        b.qconfig = quantization.get_default_qconfig(name)
        b = quantization.prepare(b)
        b(SIGNAL)
        b = quantization.convert(b)
        result = compare(a, b, example=SIGNAL)
        wrong = copy.deepcopy(a)
        with torch.no_grad():
            wrong.conv2.weight[0] += 1
        planted = compare(wrong, b, example=SIGNAL)
    assert [(row.name, row.partner) for row in result][:3] == [
        ("relu1", "net.conv1"),
        ("relu2", "net.conv2"),
        ("conv3", "net.conv3"),
    ]
    assert result.first is None
    assert result.rows[0].dtypes == ("float32", "quint8")
    assert 20 < result.rows[2].sqnr_db < 60
    assert planted.first.name == "relu2"


@quantizing
def test_dynamic_quantization_has_the_tolerance_of_eight_bits():
    # Inputs of both signs: torch 2.13's dynamic Conv1d is itself far off (0.8 of its output) where they have one only.
    a = plain(3)
    for layer in a:
        nn.init.zeros_(layer.bias)
    with engine():
        b = quantization.quantize_dynamic(
            copy.deepcopy(a), {nn.Conv1d: quantization.default_dynamic_qconfig}, mapping={nn.Conv1d: nnqd.Conv1d}
        )
        assert isinstance(b[1], nnqd.Conv1d)
        result = compare(a, b, example=X)
        wrong = copy.deepcopy(a)
        with torch.no_grad():
            wrong[1].weight[0] += 1
        planted = compare(wrong, b, example=X)
    assert result.first is None
    assert result.rows[0].relative > 1e-3  # so float32's own tolerance would have called it wrong
    assert planted.first.name == "conv1"


# -- captures


def test_captures_and_loaded_captures(tmp_path):
    a, b = plain(), plain()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b[1].bias += 0.5
    with capture(a) as one:
        a(X)
    with capture(b) as two:
        b(X)
    one.save(tmp_path / "a.safetensors")
    result = compare(load(tmp_path / "a.safetensors"), two)
    assert [row.name for row in result] == ["conv0", "conv1", "conv2"]
    assert result.first.name == "conv1"


def test_repeated_calls_are_compared_one_by_one():
    conv = plain(1)
    with capture(conv) as one:
        conv(X)
        conv(X)
    with capture(conv) as two:
        conv(X)
        conv(2 * X)
        conv(X)
    result = compare(one, two)
    assert [(row.name, row.partner, row.over) for row in result] == [
        ("conv0#0", "conv0#0", False),
        ("conv0#1", "conv0#1", True),
    ]
    assert result.only_b == ["conv0#2"]
    assert not result.agrees
    assert "only in b: conv0#2" in str(result)


def test_names_may_be_mapped():
    a, b = plain(2, ["one", "two"]), plain(2, ["two", "one"])
    b.two.load_state_dict(a.one.state_dict())
    b.one.load_state_dict(a.two.state_dict())
    assert compare(a, b, example=X, map={"one": "two", "two": "one"}).agrees
    assert compare(a, b, example=X).first is not None  # by name, which is another pairing


def test_other_names_are_paired_by_order_if_the_structures_match():
    a, b = plain(3), plain(3, ["x", "y", "z"])
    b.load_state_dict(
        {f"{new}.{key}": a.state_dict()[f"conv{i}.{key}"] for i, new in enumerate("xyz") for key in ("weight", "bias")}
    )
    result = compare(a, b, example=X)
    assert [(row.name, row.partner) for row in result][:3] == [("conv0", "x"), ("conv1", "y"), ("conv2", "z")]
    assert result.agrees
    assert "paired by order" in str(result)


def test_what_has_no_partner_is_listed():
    a, b = plain(3), plain(2)
    b.add_module("other", nn.Conv1d(2, 2, 5, padding=2))
    b.load_state_dict({**a.state_dict(), **b.other.state_dict(prefix="other.")}, strict=False)
    result = compare(a, b, example=X)
    assert result.only_a == ["conv2"]
    assert result.only_b == ["other"]
    assert [row.name for row in result] == ["conv0", "conv1", "<output>"]


def test_nothing_in_common_is_an_error_that_lists_both():
    a = plain(2)
    b = nn.Sequential(nn.Conv1d(2, 3, 3))
    with pytest.raises(
        InvalidValue, match=r"no layer of a has a partner in b: a ran conv0, conv1, and b ran 0. .*map="
    ):
        compare(a, b, example=X)


def test_different_shapes_are_listed_and_not_fatal():
    a, b = plain(2), plain(2)
    b[0] = nn.Conv1d(2, 2, 3)
    result = compare(a, b, example=X)
    assert result.first.name == "conv0"
    assert result.first.max_abs is None
    assert "shapes differ: (2, 2, 40) and (2, 2, 38)" in str(result)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_on_one_side_only_is_over_and_on_both_is_no_difference(value):
    a = plain(1)
    b = copy.deepcopy(a)
    x = X.clone()
    x[0, 0, 5] = value
    assert compare(a, b, example=x).agrees
    with torch.no_grad():
        b[0].bias[1] = value
    row = compare(a, b, example=X, atol=1e9).first
    assert row.max_abs == math.inf
    assert row.note == "not finite: 0 in a, 80 in b"  # one channel of two samples


def test_a_complex_output_is_compared_with_a_real_one_by_both_parts():
    class Sized(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 1, bias=False, dtype=dtype)

        def forward(self, x):
            return self.conv(x.to(self.conv.weight.dtype))

    a, b = Sized(torch.float32), Sized(torch.complex64)
    b.conv.weight.data = torch.complex(a.conv.weight.data, torch.full((2, 1, 1), 0.25))
    x = torch.randn(1, 1, 2)  # (B, C, T) is (1, 2, 2): pairs of numbers would broadcast
    row = compare(a, b, example=x).first
    with torch.no_grad():
        mine, theirs = a(x).numpy(), b(x).numpy()
    assert row.relative == pytest.approx(np.linalg.norm(mine - theirs) / np.linalg.norm(mine), rel=1e-5)


def test_to_dict_is_plain():
    a, b = plain(2), plain(2)
    found = compare(a, b, example=X, sqnr_db=30).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["first"] == "conv0"
    assert found["tolerance"] == {"atol": None, "rtol": None, "sqnr_db": 30.0}


# -- streaming


def test_models_are_compared_layer_by_layer(monkeypatch):
    import convtap._debug.comparison as module

    held = []
    a, b = plain(12), plain(12)
    original = module.difference

    def watching(*args):
        gc.collect()
        held.append(sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (2, 2, 40)))
        return original(*args)

    monkeypatch.setattr(module, "difference", watching)
    x = X.clone()
    compare(a, b, example=x)
    assert len(held) == 13
    assert max(held[2:-1]) <= min(held[2:-1]) + 2  # the same at every layer: nothing piles up


def test_both_runs_see_the_same_random_numbers_and_leave_none_used():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(2, 2, 3)
            self.two = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            x = self.one(x + torch.randn_like(x))
            return self.two(x + torch.randn_like(x)) + torch.randn(1)

    a = Noisy()
    b = copy.deepcopy(a)
    before = torch.get_rng_state()
    assert compare(a, b, example=X).agrees
    assert torch.equal(torch.get_rng_state(), before)


def test_the_modes_are_restored_also_if_modules_are_shared():
    a = net().train()
    b = copy.deepcopy(a)
    b.conv1 = a.conv1
    b.bn2.eval()
    statistics = a.bn1.running_mean.clone()
    compare(a, b, example=SIGNAL)
    compare(a, a, example=SIGNAL)
    assert a.training
    assert all(module.training for module in a.modules())
    assert [name for name, module in b.named_modules() if not module.training] == ["bn2"]
    assert torch.equal(a.bn1.running_mean, statistics)
    assert all(module._forward_hooks == {} for module in a.modules())


def test_a_model_that_fails_halfway_says_so_and_leaves_no_thread():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv1d(2, 2, 3)
            self.two = nn.Conv1d(3, 2, 3)
            self.broken = False

        def forward(self, x):
            x = self.one(x)
            return self.two(x) if self.broken else x

    a, b = Fails(), Fails()
    a.broken = True
    with pytest.raises(RuntimeError, match="channels"):
        compare(a, b, example=X)
    assert not [thread for thread in threading.enumerate() if thread.name == "convtap-compare"]
    assert a.one._forward_hooks == b.one._forward_hooks == {}


def test_an_error_while_comparing_ends_both_runs(monkeypatch):
    import convtap._debug.comparison as module

    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "difference", fails)
    a = plain()
    with pytest.raises(ZeroDivisionError):
        compare(a, copy.deepcopy(a), example=X)
    assert not [thread for thread in threading.enumerate() if thread.name == "convtap-compare"]
    assert all(module._forward_hooks == {} for module in a.modules())


def test_autocast_is_taken_along():
    a = plain()
    with torch.autocast("cpu", torch.bfloat16):
        result = compare(a, copy.deepcopy(a), example=X)
    assert {row.dtypes for row in result} == {("bfloat16", "bfloat16")}


def test_functional_convolutions_are_compared_by_their_weight_s_owner():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3)
            self.kernel = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x):
            return F.conv1d(F.conv1d(x, self.conv.weight), self.kernel)

    a = Functional()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.kernel += 0.1
    result = compare(a, b, example=X)
    assert [row.name for row in result] == ["conv", "kernel", "<output>"]
    assert result.first.name == "kernel"


def test_layers_choose_and_keyword_examples_work():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()

        def forward(self, *, audio):
            return {"logits": self.net(audio), "none": None}

    a = Keyword()
    result = compare(a, copy.deepcopy(a), example={"audio": X}, layers="net.conv1")
    assert [row.name for row in result] == ["net.conv1", "<output>[logits]"]


# -- compiled


def test_a_compiled_side_runs_compiled_and_its_wrong_layer_is_found():
    a = plain(4)
    b = torch.compile(copy.deepcopy(a), backend="aot_eager")
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    result = compare(a, b, example=X)
    assert frames["ok"] > before
    assert [row.name for row in result] == ["conv0", "conv1", "conv2", "conv3", "<output>"]
    assert result.agrees
    assert "compiled: b" in str(result)
    with torch.no_grad():
        b._orig_mod[2].bias += 1
    assert compare(a, b, example=X).first.name == "conv2"
    assert compare(b, a, example=X).first.name == "conv2"
    assert compare(b, b, example=X).agrees


def test_a_fault_that_only_the_compiler_makes_is_found():
    def wrong(graph, inputs):  # a backend that leaves out the last convolution's bias
        node = [n for n in graph.graph.nodes if "conv" in str(n.target) or n.op == "call_module"][-1]
        with graph.graph.inserting_after(node):
            shifted = graph.graph.call_function(torch.add, (node, 1.0))
        node.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)
        graph.recompile()
        return graph

    a = plain(3)
    result = compare(a, torch.compile(a, backend=wrong), example=X)
    assert result.first.name in ("conv2", "<output>")
    assert not result.agrees


def test_a_compiled_side_is_never_quietly_eager():
    a = plain(2)
    b = torch.compile(copy.deepcopy(a), backend="eager")
    with pytest.raises(Unsupported, match=r"side b is compiled.*run eagerly here"), finite(a):
        compare(a, b, example=X)
    part = copy.deepcopy(a)
    part[1].compile(backend="eager")
    with pytest.raises(Unsupported, match=r"side b has parts that are compiled by themselves, .*: conv1"):
        compare(a, part, example=X)


# -- bad input


def test_bad_input_says_what_to_write():
    a = plain(1)
    with capture(a) as acts:
        a(X)
    with pytest.raises(InvalidValue, match=r"compare\(a, b, example=x\)"):
        compare(a, a)
    with pytest.raises(InvalidType, match="got Sequential and Activations"):
        compare(a, acts)
    with pytest.raises(InvalidType, match="got Tensor and Tensor"):
        compare(X, X)
    with pytest.raises(
        LayerNotFound, match=r"map names 'conv9', and side b has no such layer. It has conv0. Did you mean 'conv0'\?"
    ):
        compare(a, a, example=X, map={"conv0": "conv9"})
    with pytest.raises(InvalidType, match="map is a list"):
        compare(acts, acts, map=["conv0"])
    with pytest.raises(InvalidValue, match=r"atol=-1 is not a tolerance"):
        compare(acts, acts, atol=-1)
    with pytest.raises(InvalidType, match="sqnr_db is a str"):
        compare(acts, acts, sqnr_db="30")
    with pytest.raises(LayerNotFound, match="Did you mean 'conv0'"):
        compare(a, a, example=X, layers="conv")
    with pytest.raises(InvalidType, match="example is a list"):
        compare(a, a, example=[X])


def test_three_thousand_comparisons_end_however_the_threads_are_switched():
    """A run that has ended, while its thread is still there, was waited for without an end."""
    script = """
import sys, torch
from torch import nn
from convtap import compare
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
model, x = nn.Sequential(nn.Conv1d(1, 1, 3), nn.ReLU()), torch.randn(1, 1, 9)
for _ in range(3000):
    assert compare(model, model, example=x).agrees
print("well")
"""
    done = run_python(script)
    assert "well" in done.stdout, done.stderr[-2000:]


def test_a_run_that_has_ended_is_closed_although_its_thread_is_still_there():
    class Lingers(Stream):
        def _run(self):
            super()._run()
            time.sleep(0.5)  # as long as the system likes

    stream = Lingers(nn.Conv1d(1, 1, 3), None, nn.Conv1d, torch.randn(1, 1, 9))
    assert len(list(stream)) == 1
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


class NamedLikeACall(nn.Module):
    """Has a layer named as the first call of another one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(2, 2, 1)
        self.add_module("a#0", nn.Conv1d(2, 2, 1))

    def forward(self, x):
        return self.get_submodule("a#0")(self.a(self.a(x)))


def test_no_two_rows_of_a_comparison_have_one_key():
    model = NamedLikeACall()
    found = compare(model, copy.deepcopy(model), example=torch.randn(1, 2, 5))
    assert [row.name for row in found.rows] == ["a##0", "a##1", "a#0", "<output>"]
    assert found.agrees


# -- arrays from elsewhere


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())

    def by_numpy(self, x):
        """The outputs of both layers, computed without torch."""
        first = convolved(x, self.conv1)
        return first, convolved(np.maximum(first, 0), self.conv2)


def convolved(x, layer):
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-1], axis=-1)
    return np.einsum("bctk,ock->bot", windows, weight) + bias[:, None]


def captured(model, *inputs, **options):
    with torch.no_grad(), capture(model, **options) as acts:
        for x in inputs:
            model(x)
    return acts


def test_arrays_are_compared_with_a_capture_by_name():
    model = Small()
    first, second = model.by_numpy(X.numpy())
    acts = captured(model, X)
    arrays = {"conv1": first, "conv2": second}
    assert compare(acts, arrays).agrees
    assert compare(arrays, acts).agrees
    assert compare(acts, {"conv2": torch.from_numpy(second), "conv1": first.astype(np.float64)}).agrees
    wrong = second.copy()
    wrong[0, 1, 5] += 0.5
    result = compare(acts, {"conv1": first, "conv2": wrong})
    assert result.first.name == "conv2"
    assert result.first.max_abs == pytest.approx(0.5, rel=1e-4)
    assert result.first.relative == pytest.approx(0.5 / np.linalg.norm(second), rel=1e-4)
    assert compare(acts, {"conv1": first}).only_a == ["conv2"]


def test_arrays_of_other_names_are_paired_by_map_or_by_order():
    model = Small()
    first, second = model.by_numpy(X.numpy())
    acts = captured(model, X)
    by_order = compare(acts, {"/conv1/Conv_output_0": first, "/conv2/Conv_output_0": second})
    assert [row.partner for row in by_order] == ["/conv1/Conv_output_0", "/conv2/Conv_output_0"]
    assert by_order.agrees
    assert "paired by order" in str(by_order)
    mapped = compare(acts, {"out": second, "StatefulPartitionedCall:0": first}, map={"conv2": "out"})
    assert [(row.name, row.partner) for row in mapped] == [("conv1", "StatefulPartitionedCall:0"), ("conv2", "out")]
    with pytest.raises(
        LayerNotFound, match="map names 'outt', and side b has no such layer. It has out. Did you mean 'out'"
    ):
        compare(acts, {"out": second}, map={"conv2": "outt"})


def test_arrays_of_calls_and_of_parts_have_their_keys():
    model = Small()
    acts = captured(model, X, 2 * X)
    firsts = [model.by_numpy(x.numpy())[0] for x in (X, 2 * X)]
    result = compare(acts, {"conv1#0": firsts[0], "conv1#1": firsts[1]}, map={"conv1": "conv1"})
    assert [row.name for row in result] == ["conv1#0", "conv1#1"]
    assert not any(row.over for row in result)
    lstm = nn.LSTM(2, 3, batch_first=True)
    data = torch.randn(1, 5, 2)
    acts = captured(lstm, data, types=nn.Module)
    with torch.no_grad():
        output, (hidden, cell) = lstm(data)
    assert compare(acts, {"(root)[0]": output.numpy()}).agrees
    whole = compare(acts, {"(root)": (output.numpy(), (hidden.numpy(), cell.numpy()))})
    assert [row.name for row in whole] == ["(root)[0]", "(root)[1][0]", "(root)[1][1]"]
    assert whole.agrees


def test_arrays_in_other_layouts_of_memory_have_the_same_numbers():
    model = Small()
    first, _ = model.by_numpy(X.numpy())
    acts = captured(model, X, layers="conv1")
    fixed = first.astype(">f4")
    fixed.flags.writeable = False
    for array in (np.asfortranarray(first), first[..., ::-1].copy()[..., ::-1], fixed, first.astype(np.longdouble)):
        assert compare(acts, {"conv1": array}).agrees


@pytest.mark.parametrize(
    ("arrays", "error", "match"),
    [
        ({}, InvalidValue, r"the mapping of arrays is empty. Pass \{'conv1': array\}"),
        ({1: np.ones(1)}, InvalidType, r"the name 1 of an array is a int, not a str. Pass \{'conv1': array\}."),
        ({"conv1": "text"}, InvalidType, "'conv1' is a str. Pass an array or a tensor"),
        ({"conv1": object()}, InvalidType, r"'conv1' holds a object, which is not an array. Pass \{'conv1': array\}"),
        (
            {"conv1": np.array(["a"])},
            InvalidType,
            r"'conv1' is an array of <U1. Pass numbers: array.astype\('float32'\)",
        ),
        ({"conv1": np.ma.masked_array([1.0], [True])}, InvalidValue, r"'conv1' is a masked array.*array.filled\(0.0\)"),
    ],
)
def test_arrays_that_cannot_be_compared_are_refused(arrays, error, match):
    with pytest.raises(error, match=match):
        compare(captured(Small(), X), arrays)


def test_arrays_alone_or_beside_a_model_are_refused():
    for a, b in (({"a": np.ones(1)}, {"a": np.ones(1)}), (Small(), {"a": np.ones(1)})):
        with pytest.raises(InvalidType, match=r"a capture and arrays by name: compare\(acts, "):
            compare(a, b)


# -- joined calls


def test_chunks_of_a_stream_are_joined_on_time():
    model = Small()
    chunks = [X[..., start : start + 13] for start in (0, 9, 18, 27)]  # four frames more than a chunk returns
    offline, streaming = captured(model, X), captured(model, *chunks)
    assert not compare(offline, streaming).agrees
    result = compare(offline, streaming, calls="cat")
    assert [(row.name, row.shape) for row in result][1] == ("conv2", (2, 2, 36))
    with torch.no_grad():
        model.conv2.bias += 0.25
    wrong = compare(offline, captured(model, *chunks), calls="cat")
    assert "conv2" in {row.name for row in wrong if row.over}


def test_joined_calls_agree_with_numpy():
    model = Small()
    chunks = [X[..., start : start + 13] for start in (0, 9, 18, 27)]
    seconds = [model.by_numpy(chunk.numpy())[1] for chunk in chunks]
    streaming = captured(model, *chunks, layers="conv2")
    assert compare(captured(model, X, layers="conv2"), streaming, calls="cat").agrees
    assert compare(streaming, {"conv2": np.concatenate(seconds, -1)}, calls="cat").agrees
    by_key = {f"conv2#{i}": second for i, second in enumerate(seconds)}
    assert compare(captured(model, X, layers="conv2"), by_key, calls="cat").agrees


def test_calls_of_a_single_signal_and_of_channels_last_layers_are_joined_on_their_own_axis():
    conv = nn.Conv1d(2, 3, 1)
    signal = X[0]  # (C, T)
    assert compare(captured(conv, signal), captured(conv, signal[:, :7], signal[:, 7:]), calls="cat").agrees
    linear = nn.Linear(2, 3)
    frames = X.transpose(1, 2)  # (B, T, C)
    parts = captured(linear, frames[:, :7], frames[:, 7:], types=nn.Linear)
    result = compare(captured(linear, frames, types=nn.Linear), parts, calls="cat")
    assert result.agrees
    assert result.rows[0].shape == (2, 40, 3)


def test_of_what_has_no_time_axis_the_last_call_is_compared():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x, state=None):
            return self.lstm(x, state)

    model = Stateful()
    frames = X.transpose(1, 2)
    offline = captured(model, frames, layers="lstm", types=nn.LSTM)
    with torch.no_grad(), capture(model, "lstm", types=nn.LSTM) as streaming:
        _, state = model(frames[:, :7])
        model(frames[:, 7:], state)
    result = compare(offline, streaming, calls="cat")
    assert [row.name for row in result] == ["lstm[0]", "lstm[1][0]", "lstm[1][1]"]
    assert result.agrees
    assert result.notes == ["of the last call, without a time axis to join: lstm[1][0], lstm[1][1]"]


def test_a_layer_that_runs_twice_in_each_chunk_has_two_outputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    class InChunks(Twice):
        def forward(self, x):
            return torch.cat([self.conv(chunk) for chunk in x.split(9, -1)], -1)

    model = Twice()
    result = compare(captured(model, X), captured(model, X[..., :9], X[..., 9:]), calls="cat")
    assert [row.name for row in result] == ["conv#0", "conv#1"]
    assert result.agrees
    chunked, once = InChunks(), nn.Sequential()
    once.add_module("conv", chunked.conv)
    assert compare(captured(once, X), captured(chunked, X), calls="cat").agrees


def test_calls_that_are_no_chunks_of_one_output_are_refused():
    model = Small()
    acts = captured(model, X, X[:1])
    with pytest.raises(InvalidValue, match=r"the calls of 'conv1' have shapes .*one by one: calls='keys'"):
        compare(acts, acts, calls="cat")
    with pytest.raises(InvalidValue, match="calls='join' is invalid. Pass 'keys', or 'cat'"):
        compare(acts, acts, calls="join")
    with pytest.raises(InvalidValue, match="calls='cat' works for captures only"):
        compare(model, model, example=X, calls="cat")
