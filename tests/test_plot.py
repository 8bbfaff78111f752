"""Pictures: nothing extreme is lost, everything lies where it belongs, and what is no number is seen."""

from __future__ import annotations

import gc
import io
import os
import pickle
import re
import subprocess
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from convtap import AmbiguousCall, LayerNotFound, MissingExtra, NotCaptured, Unsupported, capture, load
from convtap._errors import InvalidType, InvalidValue, OutOfRange
from convtap._view.cells import shrink
from convtap.plot import channels, distributions, plot
from tests.figures import Entry, captured, maps, texts


class Unknown:
    """A layer whose place nobody knows."""

    start = stride = None

    def centre(self, t):
        raise Unsupported("unknown")


def pixels(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


# -- maps


def test_a_small_map_is_drawn_value_for_value():
    values = torch.randn(1, 5, 40)
    (image,) = maps(plot(captured(values)))
    np.testing.assert_array_equal(np.asarray(image.get_array()), values[0].numpy())


def test_every_minimum_and_maximum_of_a_long_map_is_in_the_picture():
    values = torch.randn(1, 3, 160_000)
    values[0, 1, 77_777], values[0, 1, 77_780] = 50.0, -60.0
    (image,) = maps(plot(captured(values)))
    cells = np.asarray(image.get_array())
    assert cells.shape[1] <= 450
    for channel in range(3):
        assert cells[channel].max() == values[0, channel].max()
        assert cells[channel].min() == values[0, channel].min()
    # 225 bins of 160000 // 225 frames: each pair of columns is the minimum and the maximum of its own bin
    bounds = [i * 160_000 // 225 for i in range(226)]
    for i in (0, 100, 224):
        part = values[0, 2, bounds[i] : bounds[i + 1]]
        assert tuple(cells[2, 2 * i : 2 * i + 2]) == (part.min().item(), part.max().item())


def test_one_spike_among_1024_channels_and_20000_frames_reaches_the_pixels():
    values = torch.zeros(1, 1024, 20_000)
    values[0, 700, 12_345] = -3.0
    image = pixels(plot(captured(values)))[28:140, 88:980]  # inside the frame of the map
    deepest_blue = (image == (6, 28, 66)).all(axis=-1)  # the end of the scale from zero down
    assert deepest_blue.sum() >= 2


def test_a_row_of_many_channels_has_the_value_furthest_from_zero():
    values = torch.zeros(1, 128, 4)
    values[0, 2, 1], values[0, 3, 1] = 1.0, -2.0  # two channels a row: 2 and 3 share the second
    figure = plot(captured(values))
    cells = np.asarray(maps(figure)[0].get_array())
    assert cells.shape == (64, 4)
    assert cells[1, 1] == -2.0
    assert "2 channels a row" in texts(figure)


def test_channels_sets_the_number_of_rows():
    figure = plot(captured(torch.randn(1, 128, 4)), channels=128)
    assert maps(figure)[0].get_array().shape == (128, 4)


def test_the_colours_are_symmetric_about_zero_and_limited_by_the_stated_percentile():
    values = torch.linspace(-1, 1, 1001)[300:700].reshape(1, 4, 100).clone()
    figure = plot(captured(values))
    expected = np.percentile(np.abs(values.numpy()), 99)
    low, high = maps(figure)[0].get_clim()
    assert (low, high) == pytest.approx((-expected, expected))
    assert f"colour ±{expected:.3g}, peak {values.abs().max().item():.3g}" in texts(figure)
    assert "99 % of its cells are within it" in texts(figure)


def test_a_map_of_mostly_zeros_keeps_its_spikes_at_full_colour():
    values = torch.zeros(1, 4, 1000)
    values[0, 0, 3] = 5.0
    assert maps(plot(captured(values)))[0].get_clim() == (0.0, 5.0)


def test_a_map_of_zeros_says_so():
    assert "all zero" in texts(plot(captured(torch.zeros(1, 4, 10))))


def test_titles_have_names_and_shapes():
    written = texts(plot(captured(torch.randn(1, 4, 10), torch.randn(1, 7, 1200))))
    assert "convs.0  (4, 10)" in written
    assert "convs.1  (7, 1,200)" in written


def test_titles_are_never_read_as_mathematics():
    model = nn.ModuleDict({"$\\frac$": nn.Conv1d(1, 2, 1)})
    with capture(model) as acts:
        model["$\\frac$"](torch.randn(1, 1, 9))
    for figure in (plot(acts), distributions(acts), channels(acts, "$\\frac$")):
        assert pixels(figure).any()
        assert "$\\frac$" in texts(figure)


def test_a_long_name_is_shortened_in_the_middle():
    model = nn.ModuleDict({"a" * 200 + "_end": nn.Conv1d(1, 2, 1)})
    with capture(model) as acts:
        model["a" * 200 + "_end"](torch.randn(1, 1, 9))
    assert re.search("aaa…a+_end", texts(plot(acts)))


def test_50_layers_are_drawn_on_one_picture():
    figure = plot(captured(*(torch.randn(1, 64, 300) for _ in range(50))))
    assert len(maps(figure)) == 50
    assert all(round(axes.get_position().height * figure.bbox.height, 3) == 64 for axes in figure.axes[:50])


def test_loaded_outputs_are_drawn_like_captured_ones(tmp_path):
    acts = captured(torch.randn(2, 4, 10), batch=2)
    acts.save(tmp_path / "acts.safetensors")
    (image,) = maps(load(tmp_path / "acts.safetensors").plot(sample=1))
    np.testing.assert_array_equal(image.get_array(), acts.sample(1)["convs.0"])


# -- the inputs, calls and layers


def test_sample_chooses_the_input_through_all_passes():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    first, second = torch.randn(2, 1, 20), torch.randn(3, 1, 20)
    with capture(model) as acts:
        model(first)
        model(second)
    (image,) = maps(plot(acts, sample=3))
    np.testing.assert_allclose(image.get_array(), model(second)[1].detach(), rtol=1e-4, atol=1e-6)
    assert "0#1  (2, 18)" in texts(plot(acts, sample=-1))


def test_layers_chooses_by_name_key_glob_and_pattern():
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1))
    with capture(model) as acts:
        model[0](model[0](model(torch.randn(1, 1, 8))))
    assert len(maps(plot(acts, sample=0, layers=["0", "2"]))) == 2
    assert len(maps(plot(acts, layers="0#0"))) == 1
    assert len(maps(plot(acts, layers="[12]"))) == 2
    assert len(maps(plot(acts, layers=re.compile("1|2")))) == 2


# -- time


def test_frames_lie_around_the_centre_of_what_they_see():
    acts = captured(torch.randn(1, 4, 10), torch.randn(1, 4, 5))
    line = {"convs.0": Entry(-2, 4, 5), "convs.1": Entry(0, Fraction(1, 2), 1)}
    figure = plot(acts, signal=torch.randn(1, 1, 40), timeline=line)
    # frame 0 of the first: centre -2 + 4/2 = 0, stride 4, so from -2; frame 9: centre 36, so to 38
    assert maps(figure)[0].get_extent()[:2] == [-2, 38]
    # frames half a sample apart: centres 0 … 2, from -0.25 to 2.25
    assert maps(figure)[1].get_extent()[:2] == [-0.25, 2.25]
    # one axis for all: the signal's 40 samples lie from -0.5 to 39.5
    limits = {axes.get_xlim() for axes in figure.axes[:3]}
    assert limits == {(-2, 39.5)}
    assert "time in input samples" in texts(figure)


def test_sample_rate_makes_seconds():
    figure = plot(captured(torch.randn(1, 4, 10)), timeline={"convs.0": Entry(0, 100, 1)}, sample_rate=1000)
    assert maps(figure)[0].get_extent()[:2] == pytest.approx([-0.05, 0.95])
    assert "time (s)" in texts(figure)


def test_a_map_that_covers_a_part_of_the_axis_has_fewer_columns():
    acts = captured(torch.randn(1, 4, 4000), torch.randn(1, 4, 4000))
    line = {"convs.0": Entry(0, 1, 1), "convs.1": Entry(0, 4, 1)}
    narrow, wide = (image.get_array().shape[1] for image in maps(plot(acts, timeline=line)))
    assert wide == 450
    assert narrow <= 450 / 4


@pytest.mark.parametrize("line", [{}, {"convs.0": Unknown()}])
def test_a_layer_without_a_place_on_the_axis_says_so(line):
    figure = plot(captured(torch.randn(1, 4, 10)), timeline=line)
    assert "not on the time axis" in texts(figure)
    assert maps(figure)[0].get_extent()[:2] == [-0.5, 9.5]


def test_calls_of_one_layer_are_not_drawn_on_top_of_each_other():
    conv = nn.Conv1d(1, 1, 1)
    model = nn.Sequential(conv, conv)
    with capture(model) as acts:
        model(torch.randn(1, 1, 8))
    by_name = {"0": Entry(0, 1, 1)}
    assert texts(plot(acts, timeline=by_name)).count("not on the time axis") == 2
    assert texts(plot(acts, layers="0#1", timeline=by_name)).count("not on the time axis") == 1
    by_call = {"0#0": Entry(0, 1, 1), "0#1": Entry(100, 1, 1)}
    assert [image.get_extent()[0] for image in maps(plot(acts, timeline=by_call))] == [-0.5, 99.5]


def test_a_layer_has_its_place_in_every_forward_pass():
    model = nn.Sequential(nn.Conv1d(1, 1, 1))
    with capture(model) as acts:
        for _ in range(2):
            model(torch.randn(1, 1, 8))
    figure = plot(acts, sample=1, timeline={"0": Entry(100, 1, 1)})
    assert maps(figure)[0].get_extent()[0] == 99.5


def test_time_that_is_cut_into_segments_has_no_place():
    entry = Entry(0, 1, 1)
    entry.segments = 4
    assert "not on the time axis" in texts(plot(captured(torch.randn(1, 4, 10)), timeline={"convs.0": entry}))


# -- signals


@pytest.mark.parametrize("shape", [(2, 1, 30), (1, 30), (30,)])
def test_a_signal_of_one_channel_is_a_line(shape):
    acts = captured(torch.randn(2, 4, 30), batch=2)
    signal = torch.randn(shape)
    line = plot(acts, sample=1, signal=signal).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), signal.reshape(-1, 30)[-1])
    np.testing.assert_allclose(line.get_xdata(), np.arange(30))


def test_two_axes_count_inputs_where_the_model_was_given_two():
    model = nn.Conv1d(1, 2, 3)
    x = torch.randn(3, 30)

    class Unsqueezes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = model

        def forward(self, x):
            return self.conv(x[:, None])

    outer = Unsqueezes()
    with capture(outer) as acts:
        outer(x)
    np.testing.assert_allclose(plot(acts, sample=2, signal=x).axes[0].lines[0].get_ydata(), x[2])


def test_channels_of_a_signal_are_lines_up_to_eight_and_a_map_beyond():
    acts = captured(torch.randn(1, 4, 30))
    assert len(plot(acts, signal=torch.randn(1, 3, 30)).axes[0].lines) == 3
    figure = plot(acts, signal=torch.randn(1, 12, 30))
    assert figure.axes[0].images[0].get_array().shape == (12, 30)
    assert "signal  (12, 30)" in texts(figure)


def test_a_spike_in_a_long_signal_is_drawn():
    signal = np.zeros(160_000)
    signal[99_999] = 7.0
    patch = plot(captured(torch.randn(1, 4, 30)), signal=signal).axes[0].collections[0]
    assert patch.get_paths()[0].vertices[:, 1].max() == 7.0


# -- what is no number, and what has no time


def test_nan_and_inf_are_counted_marked_and_coloured():
    values = torch.randn(1, 8, 20_000)
    values[0, 3, 500] = float("nan")
    values[0, 5, 15_000] = float("inf")
    values[0, 5, 15_001] = -float("inf")
    figure = plot(captured(values))
    assert "1 NaN, 2 Inf" in texts(figure)
    found = pixels(figure)[28:140, 88:980].reshape(-1, 3)  # inside the frame of the map
    assert (found == (0, 0, 0)).all(axis=1).sum() > 10
    assert (found == (255, 205, 0)).all(axis=1).sum() > 10
    axes = next(axes for axes in figure.axes if axes.get_ylabel() == "channel")
    assert np.isfinite(axes.images[0].get_clim()).all()
    (marks,) = [line for line in axes.lines if line.get_marker() == "v"]
    # 225 bins of 20000 frames: NaN in both columns of bin 500 // 88 = 5, which are centred on 10.5 and 11.5 of 450
    assert marks.get_xdata()[:2] == pytest.approx([-0.5 + c * 20_000 / 450 for c in (10.5, 11.5)])


def test_a_map_without_a_finite_value_is_drawn():
    figure = plot(captured(torch.full((1, 4, 10), float("nan"))))
    assert "40 NaN" in texts(figure)
    assert "no finite value" in texts(figure)


def test_nan_in_the_signal_is_counted_and_marked():
    signal = torch.randn(30)
    signal[4] = float("nan")
    figure = plot(captured(torch.randn(1, 4, 30)), signal=signal)
    assert "1 NaN or Inf" in texts(figure)
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines if line.get_marker() == "x"] == [[4]]


def test_an_output_without_a_time_axis_is_bars():
    values = torch.tensor([[1.0, -2.0, 0.5, float("nan")]])
    figure = plot(captured(values))
    heights = sorted(patch.get_height() for patch in figure.axes[0].patches if patch.get_height())
    assert heights == [-2.0, 0.5, 1.0]
    assert "no time axis: one bar per channel" in texts(figure)
    assert "1 NaN" in texts(figure)


def test_many_bars_keep_the_range_of_their_channels():
    values = torch.zeros(1, 1024)
    values[0, 501], values[0, 502] = 3.0, -4.0  # four channels a bar: both in the one of 500 … 503
    heights = [patch.get_height() for patch in plot(captured(values)).axes[0].patches]
    assert (min(heights), max(heights)) == (-4.0, 3.0)
    assert len(heights) == 2 * 256


def test_a_layer_of_unknown_layout_says_which_axis_was_taken_as_time():
    model = nn.Sequential(nn.Unflatten(1, (1, 20)))
    with capture(model, types=nn.Unflatten) as acts:
        model(torch.randn(1, 20, 3)[:, :, 0])
    assert "last axis taken as time" in texts(plot(acts))
    assert "taken as time" not in texts(plot(captured(torch.randn(1, 4, 10))))


def test_the_timeline_says_which_axis_is_time():
    model = nn.Sequential(nn.Linear(3, 5))
    with capture(model, types=nn.Linear) as acts:
        y = model(torch.randn(1, 20, 3))
    entry = Entry(0, 1, 1)
    entry.dim = -2
    figure = plot(acts, timeline={"0": entry})
    np.testing.assert_array_equal(maps(figure)[0].get_array(), y[0].detach().numpy().T)
    assert maps(figure)[0].get_extent()[:2] == [-0.5, 19.5]
    assert "time is axis -2" in texts(figure)


def test_the_place_of_a_structure_is_that_of_one_of_its_tensors():
    class Two(nn.Conv1d):
        def forward(self, x):
            y = super().forward(x)
            return y, y * 2

    model = nn.Sequential(Two(1, 2, 3))
    with capture(model) as acts:
        model(torch.randn(1, 1, 12))
    entry = Entry(0, 1, 3)
    entry.path = "[1]"
    figure = plot(acts, timeline={"0": entry})
    assert [image.get_extent()[:2] for image in maps(figure)] == [[-0.5, 9.5], [0.5, 10.5]]
    assert texts(figure).count("not on the time axis") == 1


def test_rows_that_are_not_the_inputs_are_named_and_the_rest_is_drawn():
    figure = plot(captured(torch.randn(2, 4, 10), torch.randn(7, 4, 10), batch=2))
    assert len(maps(figure)) == 1
    assert (
        "not drawn: the rows of 'convs.1' with shape (7, 4, 10) are not the inputs, since axis 0 is 7 and the input batch is 2"
        in texts(figure)
    )


def test_an_empty_output_is_named():
    assert "it is empty" in texts(plot(captured(torch.zeros(1, 4, 0), torch.randn(1, 4, 9))))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64]
)
def test_every_type_of_number_is_drawn(dtype):
    values = torch.ones(1, 4, 10).to(dtype)
    figure = plot(captured(values.clone()))
    assert (np.asarray(maps(figure)[0].get_array()) == 1).all()


def test_extreme_magnitudes_are_drawn():
    values = torch.full((1, 4, 10), 3e38)
    values[0, 0] = -3e38
    assert pixels(plot(captured(values))).any()


# -- shrinking, for any shape


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(2, 300),
    st.integers(1, 20),
    st.integers(2, 60),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_shrinking_keeps_the_furthest_value_and_every_nan(channels, frames, rows, columns, seed, broken):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((channels, frames)).astype(np.float32)
    peak = values.flat[np.abs(values).argmax()]
    cells = shrink(values, rows, columns).values
    assert cells.shape[0] <= rows
    assert cells.shape[1] <= columns
    assert peak in cells
    if channels <= rows:
        np.testing.assert_array_equal(cells.max(axis=1), values.max(axis=1))
        np.testing.assert_array_equal(cells.min(axis=1), values.min(axis=1))
    if broken:
        values[generator.integers(channels), generator.integers(frames)] = np.nan
        assert np.isnan(shrink(values, rows, columns).values).any()


# -- the figure


def test_a_figure_touches_neither_pyplot_nor_the_backend():
    code = (
        "import sys, torch, matplotlib\n"
        "from torch import nn\n"
        "from convtap import capture\n"
        "model = nn.Sequential(nn.Conv1d(1, 4, 3))\n"
        "with capture(model) as acts: model(torch.randn(1, 1, 50))\n"
        "figure = acts.plot()\n"
        "assert figure._repr_png_()[:4] == b'\\x89PNG'\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams._get('backend') is matplotlib.rcsetup._auto_backend_sentinel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment():
    return {**os.environ, "PYTHONPATH": "src", "MPLBACKEND": "", "DISPLAY": ""}


def test_a_figure_is_a_matplotlib_figure_that_is_freed_and_pickles():
    figure = plot(captured(torch.randn(1, 4, 10)))
    assert isinstance(figure, Figure)
    copy = pickle.loads(pickle.dumps(figure))
    assert isinstance(copy, Figure)
    assert copy._repr_png_() == figure._repr_png_()
    gone = weakref.ref(figure)
    del figure
    gc.collect()
    assert gone() is None


def test_without_matplotlib_the_error_names_the_pip_command(monkeypatch):
    acts = captured(torch.randn(1, 4, 10))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (acts.plot, lambda: distributions(acts), lambda: channels(acts, "convs.0")):
        with pytest.raises(MissingExtra, match=re.escape("pip install 'convtap[plot]'")):
            draw()


# -- distributions


def test_distributions_are_those_that_numpy_computes():
    values = torch.randn(2, 4, 300)
    values[:, 1] = 0.0
    values[:, 2] = 0.25
    values[0, 0, 0] = float("nan")
    acts = captured(values, batch=2)
    figure = distributions(acts)
    finite = values.numpy()[np.isfinite(values.numpy())]
    thin = figure.axes[0].lines[0].get_xdata()
    np.testing.assert_allclose(thin, np.percentile(finite, [1, 99]), rtol=1e-6)
    box = figure.axes[0].patches[0]
    np.testing.assert_allclose([box.get_x(), box.get_x() + box.get_width()], np.percentile(finite, [25, 75]), atol=1e-7)
    written = texts(figure)
    assert "25 %" in written  # one channel of four is zero
    assert "2 of 4" in written  # and two never change
    assert "1 NaN" in written


def test_a_channel_that_changes_in_one_input_only_is_alive():
    values = torch.ones(3, 2, 5)
    values[2, 1, 4] = 2.0
    assert "1 of 2" in texts(distributions(captured(values, batch=3)))


def test_distributions_join_the_calls_of_a_layer():
    model = nn.Sequential(nn.Conv1d(1, 2, 3))
    with capture(model) as acts:
        model(torch.randn(2, 1, 20))
        model(torch.randn(2, 1, 30))
    figure = distributions(acts)
    both = np.concatenate([call.output.numpy().ravel() for call in acts.calls()])
    assert len(figure.axes[0].patches) == 1
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), np.percentile(both, [1, 99]), rtol=1e-6)


def test_distributions_keep_the_runs_of_a_shared_activation_apart():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.convs = nn.ModuleList([nn.Conv1d(2, 2, 3) for _ in range(3)])

        def forward(self, x):
            for conv in self.convs:
                x = self.act(conv(x) * 10)
            return x

    model, inputs = Shared(), (torch.randn(2, 2, 20), torch.randn(1, 2, 30))
    with torch.no_grad(), capture(model, ["act", "convs.1"]) as acts:
        for x in inputs:
            model(x)
    figure = distributions(acts)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["act#0", "convs.1", "act#1", "act#2"]
    expected = []
    for x in inputs:
        with torch.no_grad():
            expected.append(torch.relu(model.convs[0](x) * 10).numpy().ravel())
    thin = figure.axes[0].lines[0].get_xdata()
    np.testing.assert_allclose(thin, np.percentile(np.concatenate(expected), [1, 99]), rtol=1e-5)
    only = distributions(acts, "act#4")  # a key of one call: the second run, in the second pass
    assert [label.get_text() for label in only.axes[0].get_yticklabels()] == ["act#1"]


def test_layers_of_very_different_scale_share_a_logarithmic_axis():
    acts = captured(*(torch.randn(1, 2, 50) * 10.0**power for power in range(-3, 3)))
    assert distributions(acts).axes[0].get_xscale() == "symlog"


# -- single channels


def test_each_channel_has_its_own_line():
    values = torch.randn(1, 6, 40)
    figure = channels(captured(values), "convs.0")
    assert len(figure.axes) == 6
    for axes, row in zip(figure.axes, values[0], strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), row)
    assert len({axes.get_ylim() for axes in figure.axes}) == 1


def test_the_first_64_channels_are_shown_and_the_title_says_so():
    acts = captured(torch.randn(1, 1024, 40))
    figure = channels(acts, "convs.0")
    assert len(figure.axes) == 64
    assert "channels 0–63 of 1,024" in texts(figure)
    assert "channels 3, 1023 of 1,024" in texts(channels(acts, "convs.0", channels=[3, -1]))


def test_channels_of_an_output_without_time_are_bars():
    assert len(channels(captured(torch.tensor([[1.0, 2.0]])), "convs.0").axes[0].patches) == 4


# -- what cannot be drawn


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"layers": "convs.9"},
            LayerNotFound,
            r"no captured layer matches 'convs.9'.*convs\.0.*Did you mean 'convs.0'",
        ),
        ({"layers": []}, InvalidValue, "layers is empty. Pass layers=None"),
        ({"layers": 3}, InvalidType, "layers has a selector of type int"),
        ({"layers": [3]}, InvalidType, "layers has a selector of type int"),
        ({"sample": 1}, OutOfRange, "sample 1 does not exist, since the capture has 1 input"),
        ({"sample": "first"}, InvalidType, "sample is a str"),
        ({"sample": True}, InvalidType, "sample is a bool"),
        ({"channels": 0}, InvalidValue, "channels=0 is less than 1"),
        ({"channels": 2.5}, InvalidType, "channels is 2.5"),
        ({"sample_rate": 16000}, InvalidValue, "sample_rate=16000 has no effect without a signal or a timeline"),
        ({"sample_rate": -1, "signal": [0.0, 1.0]}, InvalidValue, "sample_rate=-1 is not a positive number"),
        ({"sample_rate": "16k", "signal": [0.0, 1.0]}, InvalidType, "sample_rate is '16k'"),
        ({"timeline": 3}, InvalidType, "timeline is a int"),
        ({"signal": {"x": 1}}, InvalidType, "signal is a dict"),
        ({"signal": torch.zeros(4, 1, 10)}, InvalidValue, "signal has 4 inputs along axis 0, but the capture has 1"),
        ({"signal": torch.zeros(0)}, InvalidValue, r"signal has shape \(0,\)"),
        ({"signal": torch.zeros(1, 1, 1, 1)}, InvalidValue, r"signal has shape \(1, 1, 1, 1\)"),
        ({"signal": object()}, InvalidType, "signal is a object"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(options, error, message):
    acts = captured(torch.randn(1, 4, 10))
    with pytest.raises(error, match=message):
        acts.plot(**options)


def test_nothing_captured_is_said():
    acts = captured(torch.randn(1, 4, 10))
    acts.clear()
    for draw in (acts.plot, lambda: distributions(acts), lambda: channels(acts, "convs.0")):
        with pytest.raises(NotCaptured, match="no outputs were captured, so the picture would be empty"):
            draw()


def test_what_is_no_capture_is_named():
    for draw in (plot, distributions, lambda acts: channels(acts, "convs.0")):
        with pytest.raises(InvalidType, match="acts is a dict, not the result of a capture. Pass the acts of"):
            draw({})


def test_a_layer_of_another_pass_is_said():
    model = nn.ModuleList([nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)])
    with capture(model) as acts:
        model[0](torch.randn(1, 1, 8))
        model[0](torch.randn(1, 1, 8))
        model[1](torch.randn(1, 1, 8))
    with pytest.raises(LayerNotFound, match="1 did not run in the forward pass of sample 0"):
        acts.plot(layers="1")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "convs.9"}, LayerNotFound, "sample 0 has no output 'convs.9'"),
        ({"layer": 0}, InvalidType, "layer is a int"),
        ({"layer": "convs.0", "channels": [9]}, OutOfRange, "channel 9 does not exist: the layer has 4 channels"),
        ({"layer": "convs.0", "channels": []}, InvalidValue, "channels is empty"),
        ({"layer": "convs.0", "channels": "all"}, InvalidType, "channels is 'all'"),
        ({"layer": "convs.0", "channels": 0}, InvalidValue, "channels=0 is less than 1"),
        ({"layer": "convs.1"}, Unsupported, r"'convs.1' has no values to draw: its shape is \(4, 0\)"),
    ],
)
def test_a_bad_argument_of_channels_is_named_with_its_value(options, error, message):
    acts = captured(torch.randn(1, 4, 10), torch.zeros(1, 4, 0))
    with pytest.raises(error, match=message):
        channels(acts, **options)


def test_channels_of_a_layer_that_ran_twice_need_a_key():
    chunked = nn.Sequential(conv := nn.Conv1d(1, 1, 1), conv)
    with capture(chunked) as acts:
        chunked(torch.randn(1, 1, 8))
    with pytest.raises(AmbiguousCall, match="ran 2 times"):
        channels(acts, "0")
    assert len(channels(acts, "0#1").axes) == 1
