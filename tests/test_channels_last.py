"""Outputs that are (B, T, C): every reader of them gives what it gives of a (B, C, T) twin of the network."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

os.environ["KERAS_BACKEND"] = "torch"

from convtap import CoverageWarning, LayerNotFound, Unsupported, capture, load, timeline
from convtap._result.activations import log_of
from convtap._view.outputs import CapturedOutputs
from convtap._view.spread import spreads
from convtap._view.time_axis import TimeAxis
from convtap.plot import channels, distributions, plot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:keras.*")


class First(nn.Module):
    """(B, 3, T) → (B, 5, T) → (B, 4, T), in channels 1 and 2 of the last one zero everywhere."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Conv1d(3, 5, 1), nn.ReLU(), nn.Conv1d(5, 4, 1)
        with torch.no_grad():
            for parameter in (self.b.weight, self.b.bias):
                parameter[1:3] = 0

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Last(nn.Module):
    """The same numbers as (B, T, C): a kernel of one frame is a linear layer."""

    def __init__(self, twin):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)
        with torch.no_grad():
            for mine, other in ((self.a, twin.a), (self.b, twin.b)):
                mine.weight.copy_(other.weight[:, :, 0])
                mine.bias.copy_(other.bias)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


X = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(0)).double()


def both(**options):
    """The captures of both twins: (B, C, T), and (B, T, C)."""
    torch.manual_seed(1)
    first = First().double()
    last = Last(first).double()
    with torch.no_grad(), capture(first, types=(nn.Conv1d,), **options) as a:
        first(X)
    with torch.no_grad(), capture(last, types=(nn.Linear,), **options) as b:
        last(X.mT)
    return a, b


def spread_of(acts, timeline=None, channels_last=None):
    return spreads(CapturedOutputs(log_of(acts), TimeAxis(timeline), channels_last))


def cells(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.get_ylabel() == "channel"]


def texts(figure):
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# -- pictures


def test_maps_of_both_twins_are_the_same():
    a, b = both()
    for left, right, output in zip(cells(a.plot(1)), cells(b.plot(1)), b.values(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12)
        np.testing.assert_array_equal(right, output[1].numpy().T)
    assert "time is axis -2" in texts(b.plot())
    assert "taken as time" not in texts(b.plot())


def test_dead_channels_and_quantiles_of_both_twins_are_the_same():
    a, b = both()
    for left, right in zip(spread_of(a), spread_of(b), strict=True):
        np.testing.assert_allclose(left.quantiles, right.quantiles, rtol=1e-12)
        assert (left.dead, left.channels, left.zeros) == (right.dead, right.channels, right.zeros)
    flat = b["b"].reshape(-1, 4).numpy()
    expected = int((flat == flat[0]).all(axis=0).sum())
    assert expected == 2
    assert [found.dead_text for found in spread_of(b)] == ["0 of 5", "2 of 4"]
    assert "2 of 4" in texts(distributions(b))


def test_the_report_of_both_twins_has_the_same_dead_channels_and_maps(tmp_path):
    pages = []
    for number, acts in enumerate(both()):
        acts.report(tmp_path / f"{number}.html")
        pages.append((tmp_path / f"{number}.html").read_text())
    images = [re.findall(r'src="(data:image/png[^"]*)"', page) for page in pages]
    assert len(images[0]) == 4  # a thumbnail and a map each
    assert images[0] == images[1]
    for page in pages:
        assert "0 of 5" in page
        assert "2 of 4" in page
        assert "axis 1?" not in page


def test_lines_of_single_channels_of_both_twins_are_the_same():
    a, b = both()
    lines = [[axes.lines[0].get_ydata() for axes in channels(acts, "b").axes] for acts in (a, b)]
    assert len(lines[1]) == 4
    np.testing.assert_allclose(lines[0], lines[1], rtol=1e-12)


def test_a_block_of_unknown_layout_is_read_as_the_user_the_timeline_or_nobody_says():
    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    torch.manual_seed(1)
    model = nn.Sequential(Block(Last(First()))).eval()
    x = torch.randn(2, 30, 3)
    with torch.no_grad(), capture(model, types=Block) as acts:
        y = model(x)
    expected = y[0].numpy().T
    times = timeline(model, x, time_dim=1)
    for options in ({"channels_last": True}, {"channels_last": "0"}, {"channels_last": ["*"]}, {"timeline": times}):
        np.testing.assert_array_equal(cells(plot(acts, **options))[0], expected)
        assert "taken as" not in texts(plot(acts, **options))
        assert "2 of 4" in texts(distributions(acts, **options))
        assert len(channels(acts, "0", **options).axes) == 4
    np.testing.assert_array_equal(cells(plot(acts))[0], expected.T)
    assert "last axis taken as time" in texts(plot(acts))
    assert "of 30 (axis 1?)" in texts(distributions(acts))
    assert "last axis taken as time" in texts(channels(acts, "0"))
    np.testing.assert_array_equal(cells(plot(acts, timeline=times, channels_last=False))[0], expected.T)
    with pytest.raises(LayerNotFound, match="no captured layer matches 'nope'"):
        plot(acts, channels_last="nope")
    with pytest.raises(TypeError, match="selector of type int"):
        plot(acts, channels_last=3)


def test_the_report_says_where_the_axis_was_assumed(tmp_path):
    class Block(nn.Module):
        def forward(self, x):
            return x * 1

    model = Block()
    with capture(model, types=Block) as acts:
        model(torch.randn(2, 30, 3))
    acts.report(tmp_path / "a.html")
    assert "0 of 30 (axis 1?)" in (tmp_path / "a.html").read_text()
    acts.report(tmp_path / "b.html", channels_last=True)
    assert "0 of 3<" in (tmp_path / "b.html").read_text()


def test_the_signal_follows_the_time_axis_of_the_timeline(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 1)

        def forward(self, x):
            return self.conv(x.mT)

    model = Model().eval()
    x = torch.randn(2, 30, 3)
    times = timeline(model, x, time_dim=1)
    with torch.no_grad(), capture(model) as acts:
        model(x)
    for given in (x, x[1]):
        figure = plot(acts, sample=1, signal=given, timeline=times)
        assert "signal  (3, 30)" in texts(figure)
        heights = np.ptp([line.get_ydata() for line in figure.axes[0].lines], axis=1)
        np.testing.assert_allclose(heights, np.ptp(x[1].numpy(), axis=0), rtol=1e-6)
    acts.report(tmp_path / "r.html", signal=x, timeline=times)
    assert "(3, 30)" in (tmp_path / "r.html").read_text()
    assert "signal  (3, 30)" in texts(plot(acts, signal=x, channels_last=True))
    assert "signal  (30, 3)" in texts(plot(acts, signal=x))


# -- layers that say it


def axes_of_only(model, x, types):
    with torch.no_grad(), capture(model, types=types) as acts:
        model(x)
    call = acts.calls()[0]
    outputs = CapturedOutputs(log_of(acts), TimeAxis(None))
    tensor = call.output[0] if isinstance(call.output, tuple) else call.output
    return outputs.axes(call, "[0]" if isinstance(call.output, tuple) else "", tensor)


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("model", "shape", "types", "expected"),
    [
        (nn.LayerNorm(8), (2, 9, 8), nn.LayerNorm, (-1, -2, 0)),
        (nn.Linear(5, 8), (2, 9, 5), nn.Linear, (-1, -2, 0)),
        (nn.Linear(5, 8), (2, 5), nn.Linear, (-1, None, 0)),
        (nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.GELU()), (2, 9, 5), nn.GELU, (-1, -2, 0)),
        (nn.Sequential(nn.Conv1d(5, 8, 1), nn.Dropout(), nn.GELU()), (2, 5, 9), nn.GELU, (-2, -1, 0)),
        (nn.Sequential(nn.Linear(5, 8), nn.GELU()), (2, 9, 5), nn.Sequential, (-1, -2, 0)),
        (nn.BatchNorm1d(8), (2, 8, 9), nn.BatchNorm1d, (-2, -1, 0)),
        (nn.GroupNorm(2, 8), (2, 8, 9), nn.GroupNorm, (-2, -1, 0)),
        (nn.MaxPool1d(2), (2, 8, 9), nn.MaxPool1d, (-2, -1, 0)),
        (nn.ConvTranspose1d(5, 8, 3), (2, 5, 9), nn.ConvTranspose1d, (-2, -1, 0)),
        (Attends(batch_first=True), (2, 9, 8), nn.MultiheadAttention, (-1, -2, 0)),
        (Attends(), (9, 2, 8), nn.MultiheadAttention, (-1, -2, 1)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 9, 8), nn.TransformerEncoderLayer, (-1, -2, 0)),
        (nn.TransformerEncoderLayer(8, 2, 16), (9, 2, 8), nn.TransformerEncoderLayer, (-1, -2, 1)),
        (nn.LSTM(5, 4, bidirectional=True, batch_first=True), (2, 9, 5), nn.LSTM, (-1, -2, 0)),
        (nn.GRU(5, 8), (9, 2, 5), nn.GRU, (-1, -2, 1)),
        (nn.LazyConv1d(8, 1), (2, 5, 9), nn.Conv1d, (-2, -1, 0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_type_of_a_layer_says_which_axis_is_what(model, shape, types, expected):
    axes = axes_of_only(model.eval(), torch.randn(shape), types)
    assert axes[:3] == expected
    assert axes.sure
    assert axes.timed


@pytest.mark.parametrize(
    ("model", "shape", "types"),
    [
        (nn.ReLU(), (2, 8, 9), nn.ReLU),
        (nn.LayerNorm((8, 9)), (2, 8, 9), nn.LayerNorm),
        (nn.Sequential(nn.Linear(9, 9), nn.Flatten(2), nn.ReLU()), (2, 8, 9), nn.ReLU),
    ],
    ids=["alone", "over two axes", "behind a layer that may move axes"],
)
def test_a_layer_whose_type_does_not_say_it_is_assumed_to_be_channels_first(model, shape, types):
    axes = axes_of_only(model, torch.randn(shape), types)
    assert (axes.channel, axes.time, axes.sure, axes.timed) == (-2, -1, False, False)


def test_rows_and_pictures_of_time_first_layers_are_those_of_each_input():
    model = nn.TransformerEncoderLayer(8, 2, 16).eval()
    x = torch.randn(9, 2, 8)
    with torch.no_grad(), capture(model, types=nn.TransformerEncoderLayer) as acts:
        y = model(x)
        acts_inputs = acts._log.inputs
    assert acts_inputs == {0: (9, 2, 8)}
    # axis 0 of the model's own input is time as well, so its size is not the number of inputs
    with pytest.raises(Unsupported, match="axis 1 is 2 and the input batch is 9"):
        acts.samples()

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, x):
            return self.layer(x.transpose(0, 1))

    for batch in (2, 9):  # with 9, axis 0 has the size of the batch too
        turned, x = Turned().eval(), torch.randn(batch, 9, 8)
        with torch.no_grad(), capture(turned, types=nn.TransformerEncoderLayer) as acts:
            y = turned(x)
        for number, row in enumerate(acts.samples()):
            np.testing.assert_array_equal(row["layer"].numpy(), y[:, number].numpy())
        np.testing.assert_array_equal(cells(acts.plot(1))[0], y[:, 1].numpy().T)
        assert len(channels(acts, "layer").axes) == 8


def test_the_layout_is_kept_in_a_file_and_in_a_pickle(tmp_path):
    _, b = both()
    b.save(tmp_path / "a.safetensors")
    for copy in (load(tmp_path / "a.safetensors"), pickle.loads(pickle.dumps(b))):
        assert [found.dead_text for found in spread_of(copy)] == ["0 of 5", "2 of 4"]
        np.testing.assert_array_equal(cells(copy.plot(1))[1], b["b"][1].numpy().T)


def test_what_reduce_turned_is_turned_back():
    a, b = both(reduce=lambda t: t.mT)
    assert [found.dead_text for found in spread_of(a)] == ["0 of 5", "2 of 4"]
    assert [found.dead_text for found in spread_of(b)] == ["0 of 5", "2 of 4"]
    a, b = both(reduce=lambda t: t[:, :5, :5])  # nothing tells (5, 5) from its transpose
    assert next(found.dead_text for found in spread_of(a)) == "0 of 5 (axis 1?)"
    assert next(found.dead_text for found in spread_of(b)).endswith("of 5 (last axis?)")


def test_the_activation_of_a_convolution_may_be_channels_last():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv1d(3, 5, 1), nn.LayerNorm(5), nn.ReLU()

        def forward(self, x):
            return self.act(self.norm(self.conv(x).mT))

    model = Model().eval()
    with torch.no_grad(), capture(model, at="activation") as acts:
        y = model(torch.randn(2, 3, 30))
    np.testing.assert_array_equal(cells(acts.plot())[0], y[0].numpy().T)
    assert spread_of(acts)[0].channels == 5


def test_the_input_of_a_layer_has_its_layout():
    first = First()
    last = Last(first)
    with torch.no_grad(), capture(last, types=nn.Linear, at="input") as acts:
        last(X.float().mT)
    assert [found.channels for found in spread_of(acts)] == [3, 5]
    np.testing.assert_array_equal(cells(acts.plot())[0], X.float()[0].numpy())


# -- Keras


@pytest.fixture
def keras():
    return pytest.importorskip("keras", reason="keras comes with the test extra")


def keras_network(keras, data_format):
    axis = 1 if data_format == "channels_first" else -1
    shape = (2, 40) if axis == 1 else (40, 2)
    layers = keras.layers
    inputs = keras.Input(shape)
    x = layers.Conv1D(16, 3, padding="same", data_format=data_format, name="conv")(inputs)
    x = layers.BatchNormalization(axis=axis, name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dropout(0.1, name="drop")(x)
    x = layers.MaxPooling1D(2, data_format=data_format, name="pool")(x)
    return keras.Model(inputs, x)


def test_a_keras_network_of_16_channels_has_16(keras, tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 40, 2)).astype("float32")
    last, first = keras_network(keras, "channels_last"), keras_network(keras, "channels_first")
    first.set_weights(last.get_weights())
    kinds = keras.layers.Layer
    found = []
    for model, given in ((last, x), (first, x.transpose(0, 2, 1))):
        names = ["conv", "norm", "relu", "drop", "pool"]
        with torch.no_grad(), capture(model, names, types=kinds) as acts:
            model(given)
        found.append(acts)
    a, b = (spread_of(acts) for acts in found)
    for left, right in zip(a, b, strict=True):
        assert left.channels == right.channels == 16
        assert left.assumed == right.assumed == ""
        np.testing.assert_allclose(left.quantiles, right.quantiles, rtol=1e-4, atol=1e-6)
    for left, right, output in zip(*(cells(acts.plot(1)) for acts in found), found[0].values(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(left, output[1].cpu().numpy().T)
    found[0].report(tmp_path / "r.html", signal=x)
    assert "0 of 16" in (tmp_path / "r.html").read_text()
    assert "signal  (2, 40)" in texts(found[0].plot(signal=x))
    assert "signal  (2, 40)" in texts(found[1].plot(signal=x.transpose(0, 2, 1)))


def test_keras_layers_outside_of_a_graph_follow_their_model(keras):
    class Net(keras.Model):
        def __init__(self, data_format):
            super().__init__()
            self.conv = keras.layers.Conv1D(16, 3, data_format=data_format, name="conv")
            self.act = keras.layers.ReLU(name="act")

        def call(self, x):
            return self.act(self.conv(x))

    for data_format, shape in (("channels_last", (3, 40, 2)), ("channels_first", (3, 2, 40))):
        model = Net(data_format)
        model(np.zeros(shape, "float32"))
        with torch.no_grad(), capture(model, ["conv", "act"], types=keras.layers.Layer) as acts:
            model(np.random.default_rng(0).standard_normal(shape).astype("float32"))
        assert [(one.channels, one.assumed) for one in spread_of(acts)] == [(16, ""), (16, "")]


def test_keras_layers_that_are_always_channels_last(keras):
    layers = keras.layers
    inputs = keras.Input((40, 2))
    x = layers.LSTM(6, return_sequences=True, name="lstm")(inputs)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(7, activation="relu", name="dense")(x)
    model = keras.Model(inputs, layers.UpSampling1D(2, name="up")(layers.Add(name="add")([x, x])))
    with torch.no_grad(), capture(model, ["lstm", "norm", "dense", "add", "up"], types=layers.Layer) as acts:
        model(np.random.default_rng(0).standard_normal((3, 40, 2)).astype("float32"))
    assert [(one.channels, one.assumed) for one in spread_of(acts)] == [(6, ""), (6, ""), (7, ""), (7, ""), (7, "")]


# -- the time axis


class TimeFirst(nn.Module):
    """A layer that takes (T, B, C), in a model that takes (B, T, C)."""

    def __init__(self, inner):
        super().__init__()
        self.layer = inner

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Gate(nn.Module):
    def forward(self, x):
        return x.sigmoid()


def test_valid_rows_of_time_first_layers_are_cut_on_their_time():
    torch.manual_seed(0)
    model = TimeFirst(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)).eval()
    for batch in (2, 9):
        x = torch.randn(batch, 9, 8)
        times = timeline(model, x, time_dim=1)
        with torch.no_grad(), capture(model, types=nn.TransformerEncoderLayer) as acts:
            y = model(x)
        lengths = [3 + number % 5 for number in range(batch)]
        with pytest.warns(CoverageWarning, match="attention.*every frame of 'layer'"):  # it has no mask of the padding
            rows = acts.samples(lengths, times)
        for row, length, expected in zip(rows, lengths, y, strict=True):
            np.testing.assert_array_equal(row["layer"].numpy(), expected[:length].numpy())

        model.other, types = Gate(), Gate
        gated = TimeFirst(model.other).eval()
        with torch.no_grad(), capture(gated, types=types) as acts:
            gated(x)
        with pytest.raises(Unsupported, match=r"time on axis 0|axis 0 is 9 and the input batch is 2"):
            acts.samples(lengths, timeline(gated, x, time_dim=1))
