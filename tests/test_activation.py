"""at="activation": what comes after the activation, as if the model had been rewritten by hand to return it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convtap import LayerNotFound, NotCaptured, Unsupported, capture, load
from tests.models import FiveConvs, FunctionalConvs
from tests.reference import same

X = torch.randn(3, 2, 24)


class Then(nn.Module):
    """Two convolutions, each followed by what is given."""

    def __init__(self, then) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.bias = nn.Parameter(torch.randn(4, 1))
        self.norm, self.group, self.layer = nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.prelu, self.drop = nn.PReLU(4), nn.Dropout(0.5)
        self.then = then
        self.kept: list[torch.Tensor] = []

    def after(self, x):
        y = self.then(self, x)
        self.kept.append(y.detach().clone())
        return y

    def forward(self, x):
        return self.after(self.b(self.after(self.a(x))))


ACTIVATIONS = {
    "nn.ReLU": lambda m, x: nn.ReLU()(x),
    "nn.ReLU(inplace)": lambda m, x: nn.ReLU(inplace=True)(x),
    "F.relu": lambda m, x: F.relu(x),
    "F.relu_": lambda m, x: F.relu_(x),
    "torch.relu": lambda m, x: torch.relu(x),
    "relu_()": lambda m, x: x.relu_(),
    "F.relu(input=)": lambda m, x: F.relu(input=x),
    "F.gelu": lambda m, x: F.gelu(x),
    "nn.GELU(tanh)": lambda m, x: nn.GELU("tanh")(x),
    "nn.SiLU(inplace)": lambda m, x: nn.SiLU(inplace=True)(x),
    "F.elu(inplace)": lambda m, x: F.elu(x, inplace=True),
    "F.leaky_relu": lambda m, x: F.leaky_relu(x, 0.2),
    "PReLU": lambda m, x: m.prelu(x),
    "tanh": lambda m, x: torch.tanh(x),
    "sigmoid_": lambda m, x: x.sigmoid_(),
    "clamp": lambda m, x: x.clamp(min=0),
    "Softplus": lambda m, x: nn.Softplus()(x),
    "Threshold": lambda m, x: nn.Threshold(0.1, 0.0)(x),
    "BatchNorm": lambda m, x: F.relu(m.norm(x), inplace=True),
    "GroupNorm": lambda m, x: F.gelu(m.group(x)),
    "LayerNorm with transposes": lambda m, x: F.gelu(m.layer(x.transpose(1, 2)).transpose(1, 2)),
    "dropout": lambda m, x: F.relu(m.drop(x)),
    "bias": lambda m, x: F.relu(x + m.bias),
    "bias in place": lambda m, x: x.add_(m.bias).relu_(),
    "number": lambda m, x: F.relu(1.0 + x),
    "causal trim": lambda m, x: F.relu(F.pad(x, (2, 0))[..., :-2]),
    "everything": lambda m, x: F.relu(m.norm(m.drop(x[..., :].contiguous() + m.bias)).float()),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_comes_after_the_activation(name, training):
    model = Then(ACTIVATIONS[name]).train(training)
    torch.manual_seed(5)
    plain = model(X)
    expected = list(model.kept)
    model.kept.clear()
    torch.manual_seed(5)
    with capture(model, at="activation") as acts:
        y = model(X)
    assert torch.equal(y, plain)
    assert list(acts) == ["a", "b"]
    assert same(list(acts.values()), expected)
    assert acts.coverage.captured == ["a", "b"]


def test_glu_halves_the_channels():
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.GLU(1), nn.Conv1d(4, 2, 1))
    with capture(model, at="activation") as acts:
        model(X)
    assert torch.equal(acts["0"], F.glu(model[0](X), 1))
    assert acts.coverage.unactivated == ["2"]


class Snake1d(nn.Module):
    """An activation that PyTorch does not bring: x + sin²(αx) / α."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x):
        return x + torch.sin(self.alpha * x).pow(2) / self.alpha


def test_module_types_of_ones_own_count_as_activations():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), Snake1d(4), nn.Conv1d(4, 4, 3), nn.ReLU())
    with capture(model, at="activation", activations=(Snake1d,)) as acts:
        model(X)
    first = model[1](model[0](X))
    assert same(dict(acts), {"0": first, "2": model[3](model[2](first))})
    with capture(model, at="activation") as acts:
        model(X)
    assert list(acts) == ["2"]


class OwnNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def test_a_norm_of_ones_own_is_looked_through():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), OwnNorm(), nn.GELU())
    with capture(model, at="activation") as acts:
        y = model(X)
    assert torch.equal(acts["0"], y)


def test_a_convolution_that_no_activation_follows_is_reported_and_reading_it_says_so(tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.ReLU())
    with capture(model, at="activation") as acts:
        model(X)
        model(X)
    assert list(acts) == ["1#0", "1#1"]
    for told in (acts, _saved(acts, tmp_path)):
        assert told.coverage.unactivated == ["0"]
        assert told.coverage["0"].state == "not activated"
        assert str(told.coverage["0"]) == "ran 2 times without an activation after it"
        with pytest.raises(
            LayerNotFound, match=r"it ran 2 times without an activation after it. Capture it with at='output'"
        ):
            told["0"]
    with pytest.raises(NotCaptured, match="no activation followed"), capture(model, "0", at="activation"):
        model(X)


def _saved(acts, tmp_path):
    acts.save(tmp_path / "a")
    return load(tmp_path / "a")


def test_an_addition_of_two_signals_is_no_bias():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.b(F.relu(self.a(x) + x))

    model = Residual()
    with pytest.raises(NotCaptured, match="no activation followed"), capture(model, at="activation"):
        model(X)


def test_the_first_activation_counts_when_several_consume_the_output():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 8, 3)

        def forward(self, x):
            y = self.conv(x)
            return torch.tanh(y[:, :4]) * torch.sigmoid(y[:, 4:])

    model = Gate()
    with capture(model, at="activation") as acts:
        model(X)
    assert list(acts) == ["conv"]
    assert torch.equal(acts["conv"], torch.tanh(model.conv(X)[:, :4]))


def test_functional_convolutions_are_followed_too():
    model = FunctionalConvs()
    x = torch.randn(2, 1, 12)
    with capture(model) as outputs:
        model(x)
    with capture(model, at="activation") as acts:
        model(x)
    assert same(dict(acts), {name: output.relu() for name, output in outputs.items()})


def test_gradients_flow_through_the_captured_activation():
    model = FiveConvs(inplace=False)
    x = torch.randn(2, 1, 20)
    hidden, y = [], x
    for conv in model.convs:
        hidden.append(F.relu(conv(y)))
        y = hidden[-1]
    expected = torch.autograd.grad(y.pow(2).sum(), hidden)
    with capture(model, at="activation", detach=False) as acts:
        loss = model(x).pow(2).sum()
    assert same(torch.autograd.grad(loss, list(acts.values())), expected)


def test_several_calls_and_passes_keep_their_numbers():
    conv = nn.Conv1d(2, 2, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.Tanh())
    with capture(model, at="activation") as acts:
        y = model(X)
    assert list(acts) == ["0#0", "0#1"]
    assert torch.equal(acts["0#0"], conv(X).relu())
    assert torch.equal(acts["0#1"], y)


def test_reduce_keep_and_samples_work_after_the_activation():
    model = FiveConvs(inplace=True)
    x = torch.randn(2, 1, 20)
    with capture(model, at="activation") as whole:
        model(x)
    with capture(model, at="activation", reduce=lambda t: t.amax(-1), keep="last") as acts:
        model(x)
        model(x)
    assert same(dict(acts), {name: output.amax(-1) for name, output in whole.items()})
    assert same(whole.sample(1), {name: output[1] for name, output in whole.items()})


def test_where_functions_are_not_seen_it_is_refused():
    model = FiveConvs()
    with pytest.raises(Unsupported, match=r"at='activation' does not work with functional=False.*Pass functional=True"):
        capture(model, at="activation", functional=False).__enter__()
    with pytest.raises(ValueError, match=r"activations= has no effect with at='output'"):
        capture(model, activations=(nn.ReLU,))
    with pytest.raises(TypeError, match=r"activations holds 'relu', which is not a module type. Write activations="):
        capture(model, at="activation", activations="relu")


def test_torchscript_is_refused():
    script = torch.jit.script(FiveConvs())
    with pytest.raises(Unsupported, match="at='activation' does not work for layers inside TorchScript"):
        capture(script, at="activation").__enter__()


def test_a_real_model_against_its_own_layers():
    transformers = pytest.importorskip("transformers", reason="transformers comes with the test extra")
    config = transformers.Wav2Vec2Config(
        conv_dim=(8,) * 7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
    )
    model = transformers.Wav2Vec2Model(config).eval()
    x, expected = torch.randn(1, 2000), []
    handles = [
        layer.register_forward_hook(lambda m, a, y: expected.append(y.clone()))
        for layer in model.feature_extractor.conv_layers
    ]
    with torch.no_grad():
        model(x)
        for handle in handles:
            handle.remove()
        with capture(model, "feature_extractor.*", at="activation") as acts:
            model(x)
    assert same(list(acts.values()), expected)
