"""What the tests of pictures share: models with given outputs, places on a time axis, and what a figure shows."""

from __future__ import annotations

from fractions import Fraction

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch import nn

from convtap import capture


class Entry:
    """A layer on the time axis, as ``timeline`` describes it."""

    def __init__(self, start, stride, receptive_field):
        self.start, self.stride, self.receptive_field = start, stride, receptive_field

    def centre(self, t):
        return self.start + t * self.stride + Fraction(self.receptive_field - 1, 2)


class Given(nn.Conv1d):
    """A convolution that copies its input."""

    def __init__(self):
        super().__init__(1, 1, 1)

    def forward(self, x):
        return x * 1


def captured(*outputs, batch=1):
    """Returns a capture of layers ``convs.0``, ``convs.1``, … with these outputs."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(Given() for _ in outputs)

        def forward(self, x):
            for conv, output in zip(self.convs, outputs, strict=True):
                conv(output)

    model = Fixed()
    with capture(model) as acts:
        model(torch.zeros(batch, 1, 10))
    return acts


def texts(figure):
    """Returns everything that is written in a figure."""
    return " | ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def maps(figure):
    """Returns the images of a figure that are maps of channels over time."""
    return [axes.images[0] for axes in figure.axes if axes.images and axes.get_ylabel() == "channel"]


def boxes(figure):
    """Returns each text that a figure shows, with its box in pixels."""
    FigureCanvasAgg(figure).draw()
    shown = {id(text) for axis in _axes(figure) for text in _ticks(axis)}
    hidden = {id(text) for axis in _axes(figure) for text in _labels(axis)} - shown
    return [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def _axes(figure):
    return [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]


def _labels(axis):
    return [label for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)]


def _ticks(axis):
    low, high = sorted(axis.get_view_interval())
    slack = 1e-6 * (high - low)
    return [
        tick.label1
        for tick in axis.get_major_ticks()
        if tick.label1.get_visible() and low - slack <= tick.get_loc() <= high + slack
    ]


def crowded(figure):
    """Returns the texts of a figure that lie on one another, and those that its edge cuts."""
    found, (width, height) = boxes(figure), figure.canvas.get_width_height()
    cut = [text for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    on = []
    for i, (text, box) in enumerate(found):
        for other, near in found[i + 1 :]:
            across = min(box.x1, near.x1) - max(box.x0, near.x0)
            down = min(box.y1, near.y1) - max(box.y0, near.y0)
            if across > 0.5 and down > 2:  # a box has two pixels of air above its letters
                on.append((text, other))
    return cut, on
