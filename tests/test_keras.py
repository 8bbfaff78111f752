"""Keras 3 on the torch backend: what a second Keras model with several outputs gives, without building it."""

from __future__ import annotations

import os
import warnings

import pytest

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras", reason="keras comes with the test extra")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from convtap import LayerNotFound, NotCaptured, Unsupported, capture, compare, list_layers  # noqa: E402
from tests.reference import same  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:keras.*")
X = np.random.default_rng(0).standard_normal((6, 40, 2)).astype("float32")


def five_convs():
    inputs = keras.Input((40, 2))
    x = inputs
    for i in range(1, 6):
        x = keras.layers.Conv1D(3 + i, 5, padding="same", activation="relu", name=f"conv{i}")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling1D()(x)))


def with_several_outputs(model, names):
    """The way people do it: a second model that returns the layers' outputs."""
    return keras.Model(model.inputs, [model.get_layer(name).output for name in names])


NAMES = [f"conv{i}" for i in range(1, 6)]


def test_the_call_gives_what_a_model_with_several_outputs_gives():
    model = five_convs()
    expected = [output.detach() for output in with_several_outputs(model, NAMES)(X)]
    plain = model(X).detach()
    before = {layer.name: set(layer.__dict__) for layer in model.layers}
    with capture(model) as acts:
        y = model(X)
    assert torch.equal(y.detach(), plain)
    assert same(list(acts.items()), list(zip(NAMES, expected, strict=True)))
    assert {call.via for call in acts.calls()} == {"keras"}
    assert {layer.name: set(layer.__dict__) for layer in model.layers} == before
    assert same(acts.sample(2), {name: output[2] for name, output in zip(NAMES, expected, strict=True)})


def test_predict_gives_it_batch_by_batch():
    model = five_convs()
    expected = with_several_outputs(model, NAMES).predict(X, verbose=0, batch_size=4)
    plain = model.predict(X, verbose=0, batch_size=4)
    with capture(model) as acts:
        predicted = model.predict(X, verbose=0, batch_size=4)
    np.testing.assert_array_equal(predicted, plain)
    for name, output in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(acts.cat(name).numpy(), output)
    assert [call.forward for call in acts.calls("conv1")] == [0, 1]
    assert len(acts.samples()) == 6


def test_layers_that_run_twice_nested_models_and_sequential_models():
    shared = keras.layers.Conv1D(2, 3, padding="same", name="shared")
    inner = keras.Sequential([keras.Input((40, 2)), keras.layers.Conv1D(4, 3, name="deep")], name="inner")
    inputs = keras.Input((40, 2))
    model = keras.Model(inputs, inner(shared(shared(inputs))))
    with capture(model) as acts:
        y = model(X)
    assert list(acts) == ["shared#0", "shared#1", "inner.deep"]
    assert torch.equal(acts["shared#0"], shared(X).detach())
    assert torch.equal(acts["inner.deep"], y.detach())
    sequential = keras.Sequential(
        [keras.Input((40, 2)), keras.layers.Conv1D(4, 3, name="a"), keras.layers.ReLU(name="r")]
    )
    with capture(sequential) as acts:
        y = sequential(X)
    assert list(acts) == ["a"]
    assert torch.equal(acts["a"].relu(), y.detach())


def test_selection_by_name_glob_type_and_position():
    model = five_convs()
    for layers, expected in (("conv3", ["conv3"]), ("conv[12]", NAMES[:2]), (-1, NAMES[4:]), ("head", ["head"])):
        with capture(model, layers) as acts:
            model(X)
        assert list(acts) == expected
    with capture(model, types=keras.layers.Dense) as acts:
        model(X)
    assert list(acts) == ["head"]
    with pytest.raises(
        LayerNotFound,
        match=r"no layer is named 'conv9'. The model has these Conv1d layers: conv1, .*Did you mean 'conv",
    ):
        capture(model, "conv9")
    assert [row.type for row in list_layers(model)] == ["Conv1D"] * 5
    assert list_layers(model, example=torch.from_numpy(X))[0].used == "Keras × 1"


def test_inputs_gradients_and_stop():
    model = five_convs()
    expected = with_several_outputs(model, NAMES)(X)
    with capture(model, "conv2", at="input") as acts:
        model(X)
    assert torch.equal(acts["conv2"], expected[0].detach())
    with capture(model, detach=False) as acts:
        loss = model(X).sum()
    gradients = torch.autograd.grad(loss, [acts[name] for name in NAMES])
    assert [tuple(g.shape) for g in gradients] == [tuple(e.shape) for e in expected]
    assert all(g.abs().sum() > 0 for g in gradients)
    with capture(model, "conv2", stop=True) as acts:
        model(X)
        pytest.fail("the model went on")
    assert list(acts) == ["conv2"]


def test_overlapping_blocks_and_errors_leave_the_layers_as_they_were():
    model = five_convs()
    before = {layer.name: set(layer.__dict__) for layer in model.layers}
    a, b = capture(model), capture(model, "conv2")
    in_a, in_b = a.__enter__(), b.__enter__()
    model(X)
    a.__exit__(None, None, None)
    model(X)
    b.__exit__(None, None, None)
    assert (len(in_a), len(in_b)) == (5, 2)
    assert {layer.name: set(layer.__dict__) for layer in model.layers} == before
    with pytest.raises(ZeroDivisionError), capture(model):
        model(X)
        raise ZeroDivisionError
    assert {layer.name: set(layer.__dict__) for layer in model.layers} == before


def test_a_model_built_inside_a_block_records_no_symbolic_call():
    model = five_convs()
    with capture(model) as acts:
        with_several_outputs(model, NAMES)
        fresh = keras.Input((40, 2))
        keras.Model(fresh, model(fresh))
        model(X)
    assert len(acts) == 5


def test_shapes_that_keras_asks_for_in_a_first_fit_are_no_calls():
    model = five_convs()
    y = np.zeros(model(X).shape)
    model.compile(loss="mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy's, about what Keras itself calls
        with capture(model, keep="last") as acts:
            model.fit(np.asarray(X), y, batch_size=len(X), verbose=0)
    assert list(acts) == NAMES
    assert {output.device.type for output in acts.values()} == {"cpu"}


def test_a_keras_layer_is_listed_with_its_geometry():
    model = keras.Sequential([keras.Input((40, 2)), keras.layers.Conv1D(3, 5, strides=2, name="k")])
    row = list_layers(model)[0]
    assert (row.kernel, row.stride, row.dilation) == (5, 2, 1)


def test_a_keras_layer_inside_a_torch_model():
    layer = keras.layers.Conv1D(3, 3, name="k")
    layer.build((None, 40, 2))

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = layer
            self.conv = nn.Conv1d(3, 2, 3)

        def forward(self, x):
            return self.conv(self.k(x).transpose(1, 2))

    model = Mixed()
    with capture(model) as acts:
        y = model(torch.from_numpy(X))
    assert list(acts) == ["k", "conv"]
    assert torch.equal(acts["conv"], y)


def test_keras_on_another_backend_is_refused_with_the_environment_variable():
    # A layer of another backend has the same Layer class at the same place, and no torch module among its bases; the
    # other backends themselves need half a gigabyte of packages.
    layer = type("Layer", (), {"__module__": "keras.src.layers.layer"})
    model = type("Functional", (layer,), {"__module__": "keras.src.models.functional"})()
    with pytest.raises(
        Unsupported, match="runs on another backend than torch.*KERAS_BACKEND=torch before keras is imported"
    ):
        capture(model)


def test_at_activation_gives_the_built_in_activation_or_the_one_that_follows():
    inputs = keras.Input((40, 2))
    x = keras.layers.Conv1D(3, 5, activation="relu", name="built_in")(inputs)
    x = keras.layers.ReLU(name="after")(keras.layers.Conv1D(3, 5, name="plain")(x))
    model = keras.Model(inputs, keras.layers.Conv1D(2, 3, name="none")(x))
    expected = with_several_outputs(model, ["built_in", "after"])(X)
    with capture(model, at="activation") as acts:
        model(X)
    assert list(acts) == ["built_in", "plain"]
    assert same(list(acts.values()), [output.detach() for output in expected])
    assert acts.coverage.unactivated == ["none"]


def twins(norm, activation):
    """A Keras layer between a Conv1D and an activation, and torch modules (B, C, T) that compute the same."""
    layers = keras.layers
    torch_norm, keras_norm = {
        "batch": (nn.BatchNorm1d(4, eps=1e-3), layers.BatchNormalization(name="norm")),
        "group": (nn.GroupNorm(2, 4, eps=1e-3), layers.GroupNormalization(2, name="norm")),
        "dropout": (nn.Dropout(0.5), layers.Dropout(0.5, name="norm")),
        "noise": (nn.Identity(), layers.GaussianNoise(0.5, name="norm")),
        "identity": (nn.Identity(), layers.Identity(name="norm")),
        "linear": (nn.Identity(), layers.Activation("linear", name="norm")),
    }[norm]
    torch_act, keras_act = {
        "ReLU": (nn.ReLU(), layers.ReLU(name="act")),
        "relu": (nn.ReLU(), layers.Activation("relu", name="act")),
        "leaky": (nn.LeakyReLU(0.2), layers.LeakyReLU(0.2, name="act")),
        "mish": (nn.Mish(), layers.Activation("mish", name="act")),  # Keras computes x * tanh(softplus(x))
        "capped": (nn.ReLU6(), layers.ReLU(max_value=6, name="act")),
        "shifted": (nn.Threshold(0.1, 0.0), layers.ReLU(threshold=0.1, name="act")),
    }[activation]
    conv = nn.Conv1d(2, 4, 5)
    twin = nn.Sequential(conv, torch_norm, torch_act, nn.Conv1d(4, 1, 1)).eval()
    head = [layers.Conv1D(4, 5, name="conv"), keras_norm, keras_act, layers.Conv1D(1, 1, name="last")]
    return twin, head


def with_weights_of(twin, model):
    """Gives the Keras layers the weights of the torch twin: Keras has (K, C_in, C_out)."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(twin[1], (nn.BatchNorm1d, nn.GroupNorm)):
        values = [*twin[1].parameters(), *(b for b in twin[1].buffers() if b.dim())]
        for value in values:
            value.data.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        model.get_layer("norm").set_weights([value.detach().numpy() for value in values])
    for name, conv in (("conv", twin[0]), ("last", twin[3])):
        model.get_layer(name).set_weights([conv.weight.detach().permute(2, 1, 0).numpy(), conv.bias.detach().numpy()])


class Subclassed(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.conv, self.norm, self.act, self.last = parts

    def call(self, x):
        return self.last(self.act(inputs=self.norm(self.conv(x))))


def functional(parts):
    inputs = x = keras.Input((40, 2))
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    "build", [functional, lambda parts: keras.Sequential([keras.Input((40, 2)), *parts]), Subclassed]
)
@pytest.mark.parametrize(
    ("norm", "activation"),
    [
        ("batch", "ReLU"),
        ("group", "relu"),
        ("batch", "leaky"),
        ("dropout", "capped"),
        ("noise", "ReLU"),
        ("identity", "mish"),
        ("linear", "shifted"),
    ],
)
def test_at_activation_gives_what_the_torch_twin_gives(norm, activation, build):
    twin, parts = twins(norm, activation)
    model = build(parts)
    model(X)
    with_weights_of(twin, model)
    before = {layer.name: set(layer.__dict__) for layer in model.layers}
    with torch.no_grad(), capture(twin, "0", at="activation") as theirs:
        twin(torch.from_numpy(X).transpose(1, 2))
    with torch.no_grad(), capture(model, "conv", at="activation") as acts:
        model(X)
    torch.testing.assert_close(acts["conv"].transpose(1, 2), theirs["0"], atol=1e-5, rtol=1e-4)
    assert {layer.name: set(layer.__dict__) for layer in model.layers} == before


NORMS = [
    getattr(keras.layers, name) for name in ("LayerNormalization", "RMSNormalization") if hasattr(keras.layers, name)
]  # Keras 3.8 has the first alone


@pytest.mark.parametrize("norm", NORMS)
def test_at_activation_passes_through_normalization_of_channels(norm):
    model = functional([keras.layers.Conv1D(4, 5, name="conv"), norm(name="norm"), keras.layers.ReLU(name="act")])
    expected = with_several_outputs(model, ["act"])(X)
    with capture(model, at="activation") as acts:
        model(X)
    assert torch.equal(acts["conv"], (expected[0] if isinstance(expected, list) else expected).detach())


def test_at_activation_through_predict_of_a_trained_batchnorm():
    model = functional(twins("batch", "relu")[1])
    expected = with_several_outputs(model, ["act"]).predict(X, verbose=0, batch_size=4)
    with capture(model, "conv", at="activation") as acts:
        model.predict(X, verbose=0, batch_size=4)
    np.testing.assert_array_equal(acts.cat("conv").numpy(), expected)


def test_an_own_keras_activation_counts_if_it_is_named():
    class Snake(keras.layers.Layer):
        def call(self, x):
            return x + keras.ops.square(keras.ops.sin(x))

    model = functional([keras.layers.Conv1D(4, 5, name="conv"), keras.layers.BatchNormalization(), Snake(name="act")])
    with capture(model, at="activation", activations=(Snake,)) as acts:
        y = model(X)
    assert torch.equal(acts["conv"], y.detach())


def test_after_a_sum_with_another_signal_no_activation_is_the_convolution_s():
    inputs = keras.Input((40, 2))
    y = keras.layers.Conv1D(2, 3, padding="same", name="conv")(inputs)
    y = keras.layers.BatchNormalization()(y)
    model = keras.Model(inputs, keras.layers.ReLU()(keras.layers.Add()([y, inputs])))
    with pytest.raises(NotCaptured, match="no activation followed them: conv"), capture(model, at="activation"):
        model(X)


def test_messages_name_what_keras_has():
    dense = keras.Sequential([keras.Input((40, 2)), keras.layers.Dense(3)])
    with pytest.raises(LayerNotFound, match=r"no Conv1d, but it has 1 Dense\. Pass types=keras\.layers\.Layer\.$"):
        list_layers(dense)
    with capture(dense, types=keras.layers.Layer) as acts:  # what the message says
        y = dense(X)
    assert any(torch.equal(output, y.detach()) for output in acts.values())
    images = keras.Sequential([keras.Input((40, 8, 1)), keras.layers.Conv2D(3, 3, name="c2")])
    with pytest.raises(LayerNotFound, match=r"1 keras.layers.Conv2D\. Pass types=keras\.layers\.Conv2D\.$"):
        list_layers(images)
    assert [row.name for row in list_layers(images, types=keras.layers.Conv2D)] == ["c2"]
    model = functional(twins("batch", "ReLU")[1])
    with pytest.raises(LayerNotFound, match=r"'ac\*' matches 1 module of other types.*types=keras.layers.Layer or"):
        capture(model, "ac*")
    with pytest.raises(
        LayerNotFound, match=r"has no nn.ReLU, but it has .*1 ReLU\. Pass keras\.layers\.ReLU for its Keras layers"
    ):
        capture(model, nn.ReLU)
    with pytest.raises(
        LayerNotFound, match=r"no ReLU, but it has 1 keras\.layers\.ReLU, .*\. Pass types=keras\.layers\.ReLU\.$"
    ):
        list_layers(model, types=nn.ReLU)
    with pytest.raises(TypeError, match=r"types holds 3, .*types=keras\.layers\.Conv2D"):
        capture(model, types=3)


def test_unbuilt_models_layers_of_one_name_and_torch_modules_inside_keras():
    unbuilt = keras.Sequential([keras.layers.Conv1D(3, 3, name="first"), keras.layers.Conv1D(2, 3, name="second")])
    with capture(unbuilt) as acts:
        unbuilt(torch.from_numpy(X))
    assert list(acts) == ["first", "second"]

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = keras.layers.Conv1D(2, 3, name="c", padding="same")
            self.two = keras.layers.Conv1D(2, 3, name="c", padding="same")

        def call(self, x):
            return self.two(self.one(x))

    model = Twice()
    model(torch.from_numpy(X))
    with capture(model) as acts:
        y = model(torch.from_numpy(X))
    assert list(acts) == ["c", "c_1"]
    assert torch.equal(acts["c_1"], y.detach())


def test_training_records_no_symbolic_call():
    model = keras.Sequential([keras.Input((40, 2)), keras.layers.Conv1D(3, 3, name="a")])
    model.compile(loss="mse", optimizer="sgd")
    y = np.zeros((6, 38, 3), "float32")
    with capture(model) as acts:
        model.fit(X, y, epochs=1, batch_size=3, verbose=0)
    assert [(call.name, call.via, str(call.device)) for call in acts.calls()] == [("a", "keras", "cpu")] * 2


def test_keras_models_are_compared_as_their_calls_say():
    model = functional([keras.layers.Conv1D(4, 5, name="conv"), keras.layers.Dropout(0.5), keras.layers.Conv1D(1, 1)])
    same = compare(model, model, example=torch.from_numpy(X))
    assert same.agrees
    assert same.notes == []  # a flag of torch's that Keras does not read says nothing
    with pytest.raises(Unsupported, match="side a, a Keras model.*'training': True"):
        compare(model, model, example=torch.from_numpy(X), mode="train")
    trained = compare(model, model, example={"inputs": torch.from_numpy(X), "training": True})
    assert not any(row.over for row in trained if row.name == "conv")
