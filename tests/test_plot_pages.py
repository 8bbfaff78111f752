"""Pictures of many layers: an index, and the maps on several pages; and the windows that drive a channel most."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from convtap import Hit, InvalidType, InvalidValue, Statistics, Unsupported, statistics, top
from convtap._view import pages as view_pages
from convtap.plot import pages, plot, windows
from tests.figures import captured, crowded, maps, texts


def many(count):
    return captured(*(torch.randn(1, 4, 20) for _ in range(count)))


def height(figure):
    return round(figure.bbox.height)


# -- many layers


def test_maps_that_are_too_high_become_an_index_of_all_layers():
    acts = many(80)
    figure = plot(acts, signal=torch.randn(50))
    assert height(figure) <= 6000
    assert not maps(figure)
    assert {f"convs.{i}" for i in range(80)} <= {text.get_text() for text in figure.texts}
    assert "index of 80 outputs" in texts(figure)
    assert "convtap.plot.pages(acts)" in texts(figure)
    assert crowded(figure) == ([], [])


def test_a_spike_of_one_frame_is_in_the_index():
    values = torch.zeros(1, 200, 20_000)
    values[0, 150, 12_345] = -3.0
    figure = plot(captured(*[torch.zeros(1, 4, 20)] * 70, values))
    strips = np.asarray(figure.axes[0].images[0].get_array())
    found = np.argwhere((strips == (6, 28, 66)).all(axis=-1))  # the end of the scale from zero down
    assert (found[:, 0] // 18 == 70).all()
    # one bin of 225 has frame 12345, and is two pixels of 450 wide
    assert set(found[:, 1]) <= {2 * (12_345 * 225 // 20_000) + i for i in (-1, 0, 1)}
    assert len(found)


def test_pages_draw_each_map_once_where_the_index_says(monkeypatch):
    monkeypatch.setattr(view_pages, "_PAGE", 700)  # of 3,000 pixels, with as many more layers
    index, *others = pages(many(20), signal=torch.randn(50))
    assert all(height(figure) <= 700 for figure in others)
    assert sum(len(maps(figure)) for figure in others) == 20
    assert crowded(index) == ([], [])
    written = [text.get_text() for text in index.texts]
    listed = {}
    for text in written:
        if text.startswith("convs."):
            name = text
        elif re.fullmatch(r"page \d+", text):
            listed[name] = int(text.split()[1])
    drawn = {
        text.get_text().split()[0]: number
        for number, figure in enumerate(others, 2)
        for text in figure.texts
        if text.get_text().startswith("convs.")
    }
    assert listed == drawn
    assert len(drawn) == 20
    total = len(others) + 1
    assert [f"page {number} of {total}" in texts(figure) for number, figure in enumerate(others, 2)] == [True] * len(
        others
    )


def test_a_few_maps_are_one_page():
    (figure,) = pages(many(3))
    assert len(maps(figure)) == 3


def test_more_layers_than_an_index_holds_are_on_several_pages_of_it(monkeypatch):
    acts = many(660)
    with pytest.raises(Unsupported, match=r"660 outputs do not fit.*convtap\.plot\.pages\(acts\).*layers="):
        plot(acts)
    monkeypatch.setattr(view_pages, "MOST", 6)
    monkeypatch.setattr(view_pages, "_PAGE", 700)
    first, second, *_ = pages(acts, layers=[f"convs.{i}" for i in range(10)])
    assert "convs.5" in texts(first)
    assert "convs.6" not in texts(first)
    assert "convs.9" in texts(second)


def test_statistics_of_many_layers_have_one_row_each():
    with torch.no_grad(), statistics(conv := nn.Conv1d(2, 2, 1)) as stats:
        conv(torch.randn(1, 2, 9))
    (layer,) = stats.values()
    figure = Statistics({f"encoder.{i}": layer for i in range(300)}).plot()
    assert height(figure) <= 6000
    assert len(figure.axes[0].get_yticklabels()) == 300
    assert figure.axes[3].images[0].get_array().shape == (300, 2)
    assert crowded(Statistics({f"encoder.{i}": layer for i in range(25)}).plot()) == ([], [])


# -- the windows of hits


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(2, 3, 9, padding=4)), torch.randn(6, 2, 100)
    return top(model, x, "0", 5), x


def test_each_window_shows_the_samples_that_the_frame_saw(found):
    hits, x = found
    figure = windows(hits, x)
    assert len(figure.axes) == len(hits) == 15
    assert {"channel 0  ·  5 windows", "channel 2  ·  5 windows"} <= {text.get_text() for text in figure.texts}
    for axes, hit in zip(figure.axes, hits, strict=True):
        inside = np.arange(max(0, hit.start), min(100, hit.stop))
        shift = None
        for channel, line in enumerate([line for line in axes.lines if len(line.get_xdata()) == 9]):
            values = line.get_ydata()[inside - hit.start]
            np.testing.assert_array_equal(
                np.isfinite(line.get_ydata()), np.isin(np.arange(hit.start, hit.stop), inside)
            )
            moved = values - x[hit.sample, channel, inside].numpy()
            np.testing.assert_allclose(moved, moved[0], atol=1e-5)
            assert shift is None or moved[0] < shift
            shift = moved[0]
        assert axes.get_title("left").replace("−", "-") == f"input {hit.sample} · {hit.start} to {hit.stop - 1}"
        assert float(axes.get_title("right").replace("−", "-")) == pytest.approx(hit.value, rel=0.01)
    assert crowded(figure) == ([], [])


def test_positions_are_in_seconds_with_a_sample_rate(found):
    hits, x = found
    hit = hits[0]
    axes = windows([hit], x, sample_rate=100).axes[0]
    assert axes.get_title("left").replace("−", "-").endswith(f"· {hit.start / 100:.2f} to {hit.stop / 100:.2f} s")
    assert axes.get_xlim() == pytest.approx((-0.005, 0.085))


def test_inputs_of_many_channels_are_maps():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(12, 1, 5)), torch.randn(4, 12, 60)
    (hit,) = hits = top(model, x, "0", 1)
    image = windows(hits, x).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), x[hit.sample, :, hit.start : hit.stop])


def sequences(width):
    letters = torch.randint(0, 4, (8, 300), generator=torch.Generator().manual_seed(0))
    x = nn.functional.one_hot(letters, 4).transpose(1, 2).float()
    torch.manual_seed(0)
    return top(nn.Sequential(nn.Conv1d(4, 2, width, padding=width // 2)), x, "0", 6), x, letters


def test_one_hot_sequences_are_rows_of_letters():
    hits, x, letters = sequences(11)
    figure = windows(hits, x, letters="ACGT")
    rows = [[] for _ in hits]
    for number, axes in enumerate(figure.axes):
        for text in sorted(axes.texts, key=lambda text: text.get_position()):
            rows[6 * number + int(text.get_position()[1])].append(text.get_text())
    for row, hit in zip(rows, hits, strict=True):
        seen = letters[hit.sample, max(0, hit.start) : hit.stop]
        assert "".join(row) == "".join("ACGT"[i] for i in seen)
    assert crowded(figure) == ([], [])


def test_long_sequences_are_rows_of_colours():
    hits, x, letters = sequences(201)
    figure = windows(hits, x, letters="ACGT")
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image.shape == (6, 201, 3)
    colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert list(colours) == list("ACGT")
    first = hits[0]
    for position in range(201):
        if 0 <= first.start + position < 300:
            letter = "ACGT"[letters[first.sample, first.start + position]]
            written = "#{:02x}{:02x}{:02x}".format(*(round(255 * part) for part in image[0, position]))
            assert written == colours[letter]


def test_a_position_without_one_letter_is_a_dot():
    x = torch.zeros(1, 4, 5)
    x[0, 2, 0], x[0, :, 1] = 1.0, 0.25
    axes = windows([Hit(0, 0, 0, 5, 1.0, 0)], x, letters="ACGT").axes[0]
    assert "".join(text.get_text() for text in axes.texts) == "G····"


def test_bad_letters_are_named(found):
    hits, x = found
    for letters, error, message in (
        ("ACGT", InvalidValue, "has 4 letters, but the inputs have 2 channels"),
        ("AC", InvalidValue, "is not one-hot.*Remove letters='AC'"),
        (4, InvalidType, "letters is 4, not a string. Pass one letter per channel"),
    ):
        with pytest.raises(error, match=message):
            windows(hits, x, letters=letters)
    with pytest.raises(InvalidValue, match="hits is empty"):
        windows([], x)
    with pytest.raises(InvalidValue, match="sample_rate=0"):
        windows(hits, x, sample_rate=0)
    with pytest.raises(Unsupported, match=r"the limit is 6,000\. .*windows\(hits\[:50\], x\)"):
        windows(list(hits) * 100, x)
