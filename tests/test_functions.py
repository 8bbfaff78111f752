"""Convolutions called as functions: naming, once each, bypasses, and models that must not be changed."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from convtap import CoverageWarning, LayerNotFound, NotCaptured, capture, list_layers
from tests.models import FunctionalConvs, PaddedConv, UsesFusedKernel
from tests.reference import patched_conv1d, same

X = torch.randn(2, 1, 12)


def test_each_function_call_is_captured_under_its_weights_owner():
    model = FunctionalConvs()
    with patched_conv1d() as expected:
        plain = model(X)
    with capture(model) as acts:
        y = model(X)
    assert torch.equal(y, plain)
    assert list(acts) == ["kernel", "kernels.0", "kernels.1", "linear", "conv", "F.conv1d"]
    assert same(list(acts.values())[:5], expected)  # the last one is torch.conv1d, which the reference does not replace
    assert torch.equal(acts["F.conv1d"].relu(), y)
    assert {call.via for call in acts.calls()} == {"function"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("kernel", ["kernel"]),
        ("kernels.*", ["kernels.0", "kernels.1"]),
        ("kernels.1", ["kernels.1"]),
        ("F.conv1d", ["F.conv1d"]),
        (["conv", "linear"], ["linear", "conv"]),
        (0, ["conv"]),
        ("*", ["kernel", "kernels.0", "kernels.1", "linear", "conv", "F.conv1d"]),
        (nn.Conv1d, ["conv"]),
    ],
    ids=repr,
)
def test_function_calls_join_the_selection_by_the_same_names(layers, expected):
    model = FunctionalConvs()
    with capture(model, layers) as acts:
        model(X)
    assert list(acts) == expected


def test_a_parameters_name_that_did_not_run_is_not_silent():
    model = FunctionalConvs()
    model.spare = nn.Parameter(torch.randn(1, 1, 1))
    with (
        pytest.raises(NotCaptured, match="1 layer selected by name did not run: spare"),
        capture(model, ["spare", "kernel"]),
    ):
        model(X)
    with pytest.raises(LayerNotFound, match=r"no layer is named 'kernell'.*Did you mean 'kernel"):
        capture(model, "kernell")


def test_functional_false_sees_modules_only_and_warns_of_what_did_not_run():
    model = FunctionalConvs()
    model.extra = nn.Conv1d(1, 1, 1)
    with (
        pytest.warns(CoverageWarning, match="1 of 2 selected layers did not run as modules: conv.*functional=False"),
        capture(model, functional=False) as acts,
    ):
        model.extra(X)
        model(X)
    assert list(acts) == ["extra"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PaddedConv(1, 3, 3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 3, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(1, 3, 3)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Conv1d(1, 3, 3)),
        lambda: nn.Conv1d(1, 3, 3, padding=1, padding_mode="circular"),
    ],
    ids=["padded subclass", "weight norm", "spectral norm", "orthogonal", "circular padding"],
)
def test_a_module_that_runs_is_captured_once_however_it_gets_its_weight(make):
    model = nn.Sequential(make(), nn.ReLU(inplace=True)).eval()
    expected = model[0](X).detach().clone()
    with capture(model) as acts:
        model(X)
    assert list(acts) == ["0"]
    assert acts.calls()[0].via == "module"
    assert torch.equal(acts["0"], expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")  # the old form is what is tested
def test_old_weight_norm_is_captured_once():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(1, 3, 3)))
    with capture(model) as acts:
        y = model(X)
    assert list(acts) == ["0"]
    assert torch.equal(acts["0"], y)


def test_a_module_and_a_function_call_with_its_weight_count_as_two_calls():
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 1, 3, padding=1)})
    model.forward = lambda x: model["conv"](F.conv1d(x, model["conv"].weight, padding=1))
    with capture(model) as acts:
        model(X)
    assert [(call.key, call.via) for call in acts.calls()] == [("conv#0", "function"), ("conv#1", "module")]


def test_a_layers_forward_called_directly_is_seen_as_a_function():
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 2, 3)})
    model.forward = lambda x: model["conv"].forward(x)
    with capture(model) as acts:
        y = model(X)
    assert acts.calls()[0].via == "function"
    assert torch.equal(acts["conv"], y)


def test_a_users_own_convolution_class_counts_once_when_its_type_is_asked_for():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 1, 3))

        def forward(self, x):
            return F.conv1d(x, self.weight) * 2

    model = nn.ModuleDict({"mine": Mine()})
    with capture(model, types=(nn.Conv1d, Mine)) as acts:
        y = model["mine"](X)
    assert list(acts) == ["mine"]
    assert torch.equal(acts["mine"], y)
    with capture(model) as acts:
        model["mine"](X)
    assert torch.equal(acts["mine"] * 2, y)


def test_views_and_reshapes_of_a_weight_belong_to_its_owner_and_computed_weights_to_nobody():
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 3)})
    weights = {
        "view": lambda w: w.view(2, 2, 3),
        "detach": lambda w: w.detach(),
        "data": lambda w: w.data,
        "scaled": lambda w: w * 2,
        "cast": lambda w: w.double().float(),
    }
    x = torch.randn(1, 2, 9)
    for name, change in weights.items():
        model.forward = lambda x, change=change: F.conv1d(x, change(model["conv"].weight))
        with capture(model) as acts:
            y = model(x)
        assert list(acts) == ["conv" if name in ("view", "detach", "data") else "F.conv1d"], name
        assert torch.equal(acts.calls()[0].output, y)
        if name == "scaled":
            assert acts.coverage["conv"].state == "idle"
            assert "a convolution with a weight computed from its own has the name 'F.conv1d'" in str(acts.coverage)


def test_other_spellings_of_the_same_convolution():
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 2, 3)})
    w, b = model["conv"].weight, model["conv"].bias
    aten = torch.ops.aten
    spellings = [
        lambda x: torch.conv1d(x, w, b),
        lambda x: F.conv1d(input=x, weight=w, bias=b),
        lambda x: aten.conv1d.default(x, w, b),
        lambda x: aten.conv1d.padding(x, w, b, [1], "valid"),
        lambda x: aten.conv1d(x, w, b),
        lambda x: torch.convolution(x, w, b, (1,), (0,), (1,), False, (0,), 1),
        lambda x: aten.convolution.default(x, w, b, [1], [0], [1], False, [0], 1),
        lambda x: aten.convolution(x, w, b, [1], [0], [1], False, [0], 1),
    ]
    expected = F.conv1d(X, w, b)
    for i, spelling in enumerate(spellings):
        model.forward = spelling
        with capture(model) as acts:
            model(X)
        assert list(acts) == ["conv"], i
        torch.testing.assert_close(acts["conv"], expected)


def test_transposed_and_two_dimensional_convolutions_are_not_1d_convolutions():
    w1, w2 = torch.randn(1, 2, 3), torch.randn(2, 1, 3, 3)
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 2, 3)})

    model.forward = lambda x: (
        F.conv_transpose1d(x, w1),
        torch.convolution(x, w1, None, (1,), (0,), (1,), True, (0,), 1),
        F.conv2d(torch.randn(1, 1, 5, 5), w2),
        model["conv"](x),
    )
    with capture(model) as acts:
        model(X)
    assert list(acts) == ["conv"]


def test_a_convolution_outside_the_model_is_not_captured():
    model = FunctionalConvs()
    with capture(model) as acts:
        x = F.conv1d(torch.randn(2, 1, 14), torch.ones(1, 1, 3))
        model(x)
        F.conv1d(x, torch.ones(1, 1, 3))
        nn.Conv1d(1, 1, 3)(x)
    assert len(acts) == 6


def test_a_convolution_with_the_models_weight_in_the_body_is_captured():
    model = FunctionalConvs()
    with capture(model, "kernel") as acts:
        y = F.conv1d(X, model.kernel)
    assert torch.equal(acts["kernel"], y)


# -- bypasses


def test_a_weight_that_a_fused_kernel_took_is_reported_as_bypassed():
    model = UsesFusedKernel()
    with (
        pytest.raises(
            NotCaptured,
            match=r"the weight of 1 selected layer was read, but convtap saw no convolution: "
            r"conv \(bypassed in 1 pass: weight read by torch.Tensor.squeeze \(models.py:\d+\)\)"
            r".*list_layers\(model, example=x\)",
        ),
        capture(model) as acts,
    ):
        model(X)
    assert list(acts) == ["inp"]
    assert acts.coverage.bypassed == ["conv"]
    said = r"bypassed in 1 pass: weight read by torch.Tensor.squeeze \(models.py:\d+\)"
    assert re.fullmatch(said, str(acts.coverage["conv"]))
    with pytest.warns(CoverageWarning, match="conv"), capture(model, strict=False):
        model(X)
    assert re.fullmatch(said, list_layers(model, example=X)[1].used)


@pytest.mark.parametrize(
    ("use", "reader"),
    [
        (lambda w: torch.einsum("oik->ok", [w]), "torch.functional.einsum"),
        (lambda w: torch.stack([w, w]), "torch.stack"),
        (lambda w: torch.mul(input=torch.ones(1), other=w), "torch.mul"),
    ],
    ids=["a list that is not the first argument", "a list", "a keyword"],
)
def test_a_weight_is_seen_wherever_it_is_among_the_arguments(use, reader):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.read = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 3)

        def forward(self, x):
            return self.seen(x), use(self.read.weight)

    model = Model()
    with pytest.raises(
        NotCaptured, match=rf"read \(bypassed in 1 pass: weight read by .*{re.escape(reader.split('.')[-1])}"
    ):
        with capture(model):
            model(X[:, :1])


def test_a_layer_that_is_captured_in_one_pass_and_bypassed_in_others_is_a_warning():
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1, groups=2)})
    model.forward = lambda x: model["conv"](x) if x.shape[-1] > 1 else x * model["conv"].weight[:, 0]
    with (
        pytest.warns(
            CoverageWarning, match=r"conv \(captured 1 time, bypassed in 2 passes: weight read by torch.Tensor"
        ),
        capture(model) as acts,
    ):
        model(torch.ones(1, 2, 5))
        model(torch.ones(1, 2, 1))
        model(torch.ones(1, 2, 1))
    assert acts.coverage.captured == ["conv"] == acts.coverage.bypassed


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.data * 1,
        lambda w: w.detach().squeeze(1),
        lambda w: w.T if w.dim() == 2 else w.mT,
        lambda w: w.data_ptr(),
        lambda w: w.to(torch.float64),
        lambda w: w.contiguous(),
        lambda w: w[0],
        lambda w: torch.matmul(w[..., 0], w[..., 0].t()),
        lambda w: torch.einsum("oik,oik->o", w, w),
        lambda w: torch.cat([w, w]),
        lambda w: F.linear(torch.ones(3), w.flatten(0, 1)),
        lambda w: FusedTakesAll.apply(w * 1),
    ],
)
def test_ways_to_read_a_weight_are_noticed(read):
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 1, 3), "used": nn.Conv1d(1, 1, 1)})

    def forward(x):
        read(model["conv"].weight)
        return model["used"](x)

    model.forward = forward
    with pytest.raises(NotCaptured, match="conv .bypassed in 1 pass"), capture(model):
        model(X)


class FusedTakesAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sum()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda w: w.shape,
        lambda w: w.dtype,
        lambda w: (w.size(0), w.dim(), w.numel(), w.device, w.requires_grad, w.is_cuda, w.grad, len(w)),
        lambda w: w.stride(),
        lambda w: nn.init.uniform_(w),
        lambda w: (w.new_ones(1), torch.zeros_like(w), torch.ones(1).type_as(w)),
        lambda w: (w.detach(), w.data.shape, w.cpu().device),
        lambda w: repr(type(w)),
    ],
)
def test_metadata_is_no_read(harmless):
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 1, 3), "used": nn.Conv1d(1, 1, 1)})

    def forward(x):
        harmless(model["conv"].weight)
        return model["used"](x)

    model.forward = forward
    with capture(model) as acts:
        model(X)
    assert acts.coverage["conv"].state == "idle"


def test_training_inside_the_block_raises_no_alarm():
    model = nn.ModuleDict({"conv": nn.Conv1d(1, 1, 3), "used": nn.Conv1d(1, 1, 1)})
    model.forward = lambda x: model["used"](x)
    optimizer = torch.optim.AdamW(model.parameters())
    with capture(model) as acts:
        loss = model(X).pow(2).mean() + sum(p.pow(2).sum() for p in model.parameters())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.state_dict()
        sum(p.sum() for p in model.parameters())
    assert acts.coverage["conv"].state == "idle"


def test_a_weight_renormalized_in_forward_before_the_module_runs_is_no_bypass():
    class MaxNorm(nn.Conv1d):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
            return super().forward(x)

    model = nn.Sequential(MaxNorm(1, 2, 3), nn.ReLU(inplace=True))
    with capture(model) as acts:
        model(X)
    assert acts.coverage["0"].state == "captured"


def test_the_convolution_of_a_layer_that_is_not_selected_is_its_own_and_no_bare_function():
    model = nn.Sequential(weight_norm(nn.Conv1d(1, 2, 3)), nn.Conv1d(2, 2, 3), FreeKernel())
    with capture(model, ["1", "F.conv1d"]) as acts:
        model(X)
    assert list(acts) == ["1", "F.conv1d"]
    assert tuple(acts["F.conv1d"].shape) == (2, 2, 8)  # 12 - 2 - 2


class FreeKernel(nn.Module):
    def forward(self, x):
        return F.conv1d(x, torch.ones(2, 2, 1))


def test_a_computed_weight_whose_layer_raised_is_no_bypass():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.normed = nn.Conv1d(1, 2, 3), weight_norm(nn.Conv1d(2, 2, 3))

        def forward(self, x):
            try:
                return self.normed(x)
            except RuntimeError:  # too few channels
                return self.first(x)

    model = Catches()
    with capture(model) as acts:
        model(X)
    assert list(acts) == ["first"]
    assert acts.coverage["normed"].state == "idle"
