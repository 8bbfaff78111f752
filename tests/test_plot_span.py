"""Pictures of a part of the input, of one sign, and of single channels over the input's time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from convtap import InvalidType, InvalidValue, OutOfRange, Unsupported, capture, timeline
from convtap._view.cells import STEPS, colour_indices, palette
from convtap._view.time_axis import TimeAxis
from convtap.plot import channels, distributions, plot
from tests.figures import Entry, boxes, captured, crowded, maps, texts

LINE = {"convs.0": Entry(0, 10, 1)}  # frame t lies around sample 10 t


@pytest.fixture(scope="module")
def long():
    return captured(torch.randn(1, 4, 10_000, generator=torch.Generator().manual_seed(0)))


def given(acts):
    return acts["convs.0"][0].numpy()


# -- the span


def test_span_shows_each_frame_that_lies_in_it_as_a_cell(long):
    (image,) = maps(figure := plot(long, timeline=LINE, span=(500, 700)))
    # samples 500 … 699 are drawn from 499.5 to 699.5: frame 50 covers 495 to 505, frame 70 covers 695 to 705
    np.testing.assert_array_equal(image.get_array(), given(long)[:, 50:71])
    assert image.get_extent()[:2] == [495, 705]
    assert image.axes.get_xlim() == (499.5, 699.5)
    assert "frames 50 to 70" in texts(figure)


def test_span_is_in_seconds_with_a_sample_rate(long):
    (image,) = maps(plot(long, timeline=LINE, sample_rate=1000, span=(0.5, 0.7)))
    np.testing.assert_array_equal(image.get_array(), given(long)[:, 50:71])
    assert image.axes.get_xlim() == pytest.approx((0.4995, 0.6995))


def test_span_zooms_the_signal_too(long):
    signal = torch.randn(100_000)
    figure = plot(long, signal=signal, timeline=LINE, span=(500, 700))
    line = figure.axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(500, 700))
    np.testing.assert_allclose(line.get_ydata(), signal[500:700])
    assert figure.axes[0].get_xlim() == (499.5, 699.5)
    assert "samples 500 to 699" in texts(figure)


def test_a_peak_stays_over_its_sample_at_every_zoom():
    conv = nn.Conv1d(1, 1, 9, stride=4, padding=4, bias=False)
    nn.init.ones_(conv.weight)
    conv.weight.data[0, 0, 4] = 5.0
    model, x = nn.Sequential(conv), torch.zeros(1, 1, 40_000)
    x[0, 0, 20_000] = 1.0
    with torch.no_grad(), capture(model) as acts:
        model(x)
    times = timeline(model, x)
    for span in (None, (19_900, 20_100), (19_990, 20_010)):
        (image,) = maps(plot(acts, timeline=times, span=span))
        cells, (first, last) = np.asarray(image.get_array())[0], image.get_extent()[:2]
        width = (last - first) / len(cells)
        peak = first + (cells.argmax() + 0.5) * width
        assert abs(peak - 20_000) <= width


def test_any_span_shows_the_frames_that_overlap_it():
    draw = np.random.default_rng(0)
    for _ in range(200):
        start, stride, frames = draw.integers(-20, 20), int(draw.integers(1, 30)), int(draw.integers(2, 400))
        first = int(draw.integers(0, 2000))
        axis = TimeAxis({}, span=(first, first + int(draw.integers(1, 500))))
        extent = (float(start - stride / 2), float(start + stride * frames - stride / 2))
        part, shown = axis.visible(extent, frames)
        low, high = axis.bounds
        centres = start + stride * np.arange(frames)
        expected = np.flatnonzero((centres + stride / 2 > low) & (centres - stride / 2 < high))
        assert list(range(part.start, part.stop)) == expected.tolist()
        if len(expected):
            assert shown == pytest.approx((centres[expected[0]] - stride / 2, centres[expected[-1]] + stride / 2))


@pytest.mark.parametrize(
    ("span", "error", "message"),
    [
        ((700, 500), InvalidValue, r"ends before it begins\. Write span=\(500, 700\)\."),
        ((500, 500), InvalidValue, r"span=\(500, 500\) is empty"),
        ((0, float("nan")), InvalidValue, "is not finite"),
        ((0, float("inf")), InvalidValue, "is not finite"),
        (500, InvalidType, r"span is 500, not a pair of numbers\..* span=\(start, stop\)"),
        ((1, 2, 3), InvalidType, r"span is \(1, 2, 3\)"),
        ("12", InvalidType, "span is '12'"),
        ((False, True), InvalidType, "not a pair of numbers"),
        ((99_000, 200_000), OutOfRange, r"from -5 to 99,996 input samples\. .* span=\(99000, 99996\)"),
        ((-50, 50), OutOfRange, r"is not within the time axis.* span=\(-5, 50\)"),
        ((200_000, 300_000), OutOfRange, r"span=\(-5, 99996\)"),
    ],
)
def test_a_span_that_cannot_be_shown_is_refused_with_one_that_can(long, span, error, message):
    line = {"convs.0": Entry(0, 10, 1)}
    with pytest.raises(error, match=message) as caught:
        plot(long, timeline=line, span=span)
    advice = re.search(r"span=\((-?[\d.]+), (-?[\d.]+)\)\.$", str(caught.value))
    if advice is not None:
        assert plot(long, timeline=line, span=tuple(map(float, advice.groups())))


def test_a_span_without_a_timeline_says_what_to_pass(long):
    for draw in (lambda: plot(long, span=(0, 10)), lambda: channels(long, "convs.0", span=(0, 10))):
        with pytest.raises(InvalidValue, match=r"Pass timeline=convtap\.timeline\(model, x\)"):
            draw()


def test_layers_that_a_span_does_not_reach_say_so():
    acts = captured(torch.randn(1, 2, 100), torch.randn(1, 2, 100), torch.randn(1, 2, 100))
    line = {"convs.0": Entry(0, 10, 1), "convs.1": Entry(0, 1, 1)}
    figure = plot(acts, timeline=line, span=(500, 600))
    assert "it has no frames in the span" in texts(figure)
    assert "not on the time axis" in texts(figure)
    assert [image.get_array().shape[1] for image in maps(figure)] == [11, 100]


def test_samples_that_no_frame_is_centred_on_can_be_shown():
    model, x = nn.Sequential(nn.Conv1d(1, 1, 400, stride=320)), torch.zeros(1, 1, 3000)
    with torch.no_grad(), capture(model) as acts:
        model(x)
    times = timeline(model, torch.zeros(1, 1, 9000))
    assert plot(acts, timeline=times, span=(0, 3000))
    with pytest.raises(OutOfRange, match="to 3,000 input samples"):
        plot(acts, timeline=times, span=(0, 3001))


def test_a_signal_of_many_channels_says_which_samples_are_shown(long):
    figure = plot(long, signal=torch.randn(12, 100_000), timeline=LINE, span=(500, 700))
    assert figure.axes[0].images[0].get_array().shape == (12, 200)
    assert "samples 500 to 699" in texts(figure)


def test_nan_outside_of_the_span_is_still_counted():
    values = torch.randn(1, 2, 1000)
    values[0, 0, 900], values[0, 0, 55] = float("nan"), float("inf")
    acts = captured(values)
    assert "1 NaN, 1 Inf (1 Inf in the span)" in texts(plot(acts, timeline=LINE, span=(500, 700)))
    assert "1 NaN, 1 Inf (none in the span)" in texts(plot(acts, timeline=LINE, span=(2000, 2100)))


def test_zeros_and_ones_are_blocks_as_wide_as_a_sample():
    letters = torch.eye(4)[torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(0))].T
    blocks = plot(captured(torch.randn(1, 2, 40)), signal=letters[None]).axes[0].patches
    assert len(blocks) == 4
    for row, block in zip(letters.numpy(), blocks, strict=True):
        values, edges, baseline = block.get_data()
        np.testing.assert_allclose(values - baseline, row, atol=1e-6)
        np.testing.assert_allclose(edges, np.arange(41) - 0.5)


# -- values of one sign


@pytest.mark.parametrize(("sign", "ends"), [(1, (0, 1)), (-1, (-1, 0))])
def test_values_of_one_sign_have_a_scale_from_zero(sign, ends):
    values = sign * torch.relu(torch.randn(1, 4, 200, generator=torch.Generator().manual_seed(0)))
    figure = plot(captured(values))
    limit = float(np.percentile(values.abs().numpy(), 99))
    assert maps(figure)[0].get_clim() == pytest.approx(tuple(limit * end for end in ends))
    written = f"0 to {limit:.3g}" if sign > 0 else f"−{limit:.3g} to 0"
    assert f"colour {written}, peak" in texts(figure)


def test_the_scales_below_are_those_that_the_maps_have():
    both, above = torch.randn(1, 4, 30), torch.rand(1, 4, 30)
    ticks = [
        [label.get_text() for label in axes.get_xticklabels()]
        for axes in plot(captured(both, above)).axes
        if axes.get_ylabel() == "" and axes.images
    ]
    assert ticks == [["−limit", "0", "limit"], ["0", "limit"]]


def test_zoom_does_not_change_the_kind_of_scale():
    values = torch.rand(1, 2, 1000)
    values[0, 0, 900] = -1.0
    low, high = maps(plot(captured(values), timeline=LINE, span=(500, 700)))[0].get_clim()
    assert low == -high


@pytest.mark.parametrize("side", [1, -1])
def test_a_scale_from_zero_goes_evenly_from_white_to_dark(side):
    light = palette(side)[: 2 * STEPS + 1].astype(int).sum(axis=1)[::side]
    assert light[0] == 3 * 255
    assert (np.diff(light) <= 0).all()
    cells = side * np.array([[0.0, 0.5, 1.0, 7.0]])
    found = colour_indices(cells, 1.0, side)[0].astype(int)
    assert found.tolist() == ([0, STEPS, 2 * STEPS, 2 * STEPS] if side > 0 else [2 * STEPS, STEPS, 0, 0])


# -- labels


def test_bars_are_labelled_as_channels_and_maps_as_time():
    acts = captured(torch.randn(1, 4, 10), torch.randn(1, 6))
    figure = plot(acts, timeline={"convs.0": Entry(0, 100, 1)}, sample_rate=1000)
    found = {text: box for text, box in boxes(figure) if text in ("channel", "time (s)") and box.x1 < 60}
    image, bars = (axes.get_window_extent() for axes in figure.axes[:2])
    assert image.y0 - 20 < found["time (s)"].y0 < image.y0
    assert bars.y0 - 20 < found["channel"].y0 < bars.y0


def test_no_text_lies_on_another_or_is_cut():
    wide = captured(torch.randn(1, 80, 10_000) * 1e-6, torch.relu(torch.randn(1, 9, 5000)) * 1e6, torch.randn(1, 700))
    line = {"convs.0": Entry(0, 100, 1), "convs.1": Entry(0, 200, 1)}
    signal = torch.randn(3, 1_000_000) * 1e5
    for figure in (
        plot(wide, signal=signal, timeline=line),
        plot(wide, signal=signal, timeline=line, span=(990_000, 990_100)),
        plot(wide, signal=signal, timeline=line, sample_rate=44_100, span=(20.0, 20.01)),
        channels(wide, "convs.1", channels=9, signal=signal, timeline=line, span=(990_000, 999_900)),
        distributions(wide),
    ):
        assert crowded(figure) == ([], [])


# -- single channels


def test_channels_lie_over_the_time_of_the_input_below_the_signal(long):
    signal = torch.randn(100_000)
    options = {"signal": signal, "sample_rate": 1000, "timeline": LINE, "span": (0.5, 0.7)}
    figure = channels(long, "convs.0", channels=[0, 2], **options)
    above, lines = figure.axes[:2], figure.axes[2:]
    for axes in above:
        np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(500, 700) / 1000)
        np.testing.assert_allclose(axes.lines[0].get_ydata(), signal[500:700])
    for axes, channel in zip(lines, (0, 2), strict=True):
        np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(50, 71) / 100)
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), given(long)[channel, 50:71])
    assert all(axes.get_xlim() == pytest.approx((0.4995, 0.6995)) for axes in figure.axes)
    assert "time in seconds" in texts(figure)
    assert "frames 50 to 70" in texts(figure)


def test_channels_without_a_timeline_count_frames_below_a_signal_in_seconds(long):
    figure = channels(long, "convs.0", channels=1, signal=torch.randn(100_000), sample_rate=1000)
    assert figure.axes[0].get_xlim() == pytest.approx((-0.0005, 99.9995))
    assert figure.axes[1].get_xlim() == (-0.5, 9999.5)
    assert "frame" in [text.get_text() for text in figure.texts]


def test_what_channels_cannot_zoom_is_said():
    acts = captured(torch.randn(1, 2, 100), torch.randn(1, 5), torch.randn(1, 2, 5))
    line = {"convs.0": Entry(0, 10, 1), "convs.2": Entry(0, 1, 1)}
    with pytest.raises(Unsupported, match=r"does not apply to 'convs\.1'.*Remove span"):
        channels(acts, "convs.1", timeline=line, span=(0, 10))
    with pytest.raises(OutOfRange, match="from -5 to 996"):
        channels(acts, "convs.0", timeline=line, span=(2000, 3000))
    with pytest.raises(Unsupported, match=r"has no frames in span.*another span"):
        channels(acts, "convs.2", timeline=line, signal=torch.zeros(100), span=(50, 60))


def test_more_channels_than_a_picture_holds_are_refused_with_the_remedy():
    with pytest.raises(Unsupported, match=r"the limit is 6,000\. .*channels=range\(0, 64\)"):
        channels(captured(torch.randn(1, 1000, 4)), "convs.0", channels=1000)


# -- distributions


def test_a_median_at_zero_is_a_dot_at_zero():
    values = torch.relu(torch.randn(1, 3, 400) - 0.5)
    (dot,) = [line for line in distributions(captured(values)).axes[0].lines if line.get_marker() == "o"]
    assert np.median(values) == 0
    assert list(dot.get_xdata()) == [0]


def test_numbers_stand_beside_the_bars():
    values = torch.relu(torch.randn(1, 3, 400))
    figure = distributions(captured(values, torch.zeros(1, 3, 9), torch.randn(1, 3, 9)))
    bars = [axes.get_window_extent() for axes in figure.axes[1:]]
    below = min(bar.y0 for bar in bars)
    numbers = [box for text, box in boxes(figure) if re.fullmatch(r"[\d.]+ %|\d of 3", text) and box.y0 > below]
    assert len(numbers) == 6
    assert all(number.x0 > bar.x1 or number.x1 < bar.x0 for number in numbers for bar in bars)
