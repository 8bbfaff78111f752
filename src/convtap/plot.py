"""Pictures of a capture: feature maps below the signal on one time axis, how values are spread, single channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._view import draw as _draw
from convtap._view.cells import PERCENTILE, STEPS, Array, palette
from convtap._view.choose import Chosen, checked_count
from convtap._view.draw import ACROSS, COLUMNS, LEFT, WIDTH
from convtap._view.labels import shortened
from convtap._view.orient import Orientation
from convtap._view.pictures import MAX_LINES, Picture, pictures, signal_map
from convtap._view.signal import one_signal
from convtap._view.timeaxis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convtap._result.activations import Activations
    from convtap._result.statistics import Statistics

_TITLE, _TICKS, _GAP, _FOOT = 17, 15, 7, 62
_TITLE_SIGN, _NOTE_SIGN = 8.0, 5.6  # pixels that one sign of a title or a note needs at most, nearly always
_ROOMY = 12  # up to so many maps each gets twice the height


def plot(
    acts: Activations,
    sample: int = 0,
    layers: Chosen = None,
    signal: Any = None,
    sample_rate: float | None = None,
    timeline: Any = None,
    channels: int = 64,
    channels_last: bool | Chosen = None,
) -> Figure:
    """Draws what each layer gave for one input: one (channels × time) map a call, in execution order, the signal on top.

    Blue is below zero, red above, white at zero. Each map has its own colour limit, written in its title: 99 % of its
    cells are within it, and the others have the full colour. A map with more frames than columns shows each bin of frames
    as two columns, its minimum and its maximum; one with more channels than rows shows neighbouring channels as one row,
    which has at each frame the value furthest from zero. Its title says so. NaN is black, Inf is yellow, both are counted
    in the title and marked above the map. An output without a time axis is drawn as bars, one a channel.

    Args:
        acts: what a block collected.
        sample: which input, numbered from 0 through all forward passes.
        layers: what to draw: a name, a call key (``"conv#1"``), a glob, a ``re.Pattern``, or several; None for every call.
        signal: the model's input, to draw on top: (B, C, T), (B, T), (C, T) or (T,); (B, T, C) if the timeline, Keras or
            ``channels_last=True`` says so.
        sample_rate: input samples a second: the time axis is in seconds.
        timeline: ``convtap.timeline(model, x)``: everything is drawn on one time axis, each frame around the centre of what
            it sees and as wide as the stride. Without it each map is stretched over the width, with its frames numbered.
        channels: the most rows of a map.
        channels_last: which outputs are (B, T, C): True for all, False for none, or a name, glob or pattern of layers, or
            several. None: as the timeline says, or the layers' types (Conv1d, LayerNorm, Linear, attention, recurrent and
            Keras layers); the title of a map says where (B, C, T) was assumed.

    Returns:
        A matplotlib Figure. A notebook shows it; elsewhere use ``figure.savefig("maps.png")``.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: ``layers`` means nothing that is here.
        OutOfRange: there is no such input.
        ConvtapError: another argument cannot be used (then it is a TypeError or a ValueError as well).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> figure = acts.plot(sample=1)
        >>> len(figure.axes)  # two maps, and what the colours mean
        3
    """
    rows = checked_count("channels", channels)
    axis = TimeAxis(timeline, sample_rate, has_signal=signal is not None)
    top = None if signal is None else one_signal(acts, signal, sample, axis, channels_last)
    if top is not None:
        axis.widen(axis.signal_extent(top.shape[1]))
    orientation = Orientation(acts, axis, channels_last)
    drawn, _ = pictures(acts, sample, layers, rows=rows, columns=COLUMNS, axis=axis, orientation=orientation)
    return _column(drawn, top, axis)


# -- the layout: panels one below the other, all heights in whole pixels


@dataclass(frozen=True)
class _Panel:
    title: str
    right: str
    warning: str
    height: int
    picture: Picture | None = None
    ticks: bool = True

    @property
    def total(self) -> int:
        return _TITLE + self.height + (_TICKS if self.ticks else 0) + _GAP


def _map_height(rows: int, roomy: bool) -> int:
    """A whole number of pixels a row, at least one."""
    return rows * max(1, round((128 if roomy else 64) / rows))


def _panel(picture: Picture, roomy: bool, axis: TimeAxis, labelled: bool) -> _Panel:
    shape = ", ".join(f"{size:,}" for size in picture.shape) + ("," if len(picture.shape) == 1 else "")
    notes = " · ".join(picture.notes)
    room = ACROSS - _NOTE_SIGN * (len(notes) + len(picture.warning) + 4)
    title = f"{shortened(picture.key, max(24, int(room / _TITLE_SIGN) - len(shape) - 6))}  ({shape})"
    if picture.kind == "nothing":
        return _Panel(title, "", f"not drawn: {shortened(notes, 150)}", 22, picture, ticks=False)
    height = _map_height(len(picture.cells), roomy) if picture.kind == "map" else (90 if roomy else 56)
    ticks = picture.extent is None or labelled or roomy
    return _Panel(title, notes, picture.warning, height, picture, ticks)


def _signal_panel(signal: Array, axis: TimeAxis) -> _Panel:
    channels, samples = signal.shape
    title, unit = f"signal  ({channels:,}, {samples:,})", f"time in {axis.unit}"
    if channels > MAX_LINES:
        picture = signal_map(signal, 64, COLUMNS, axis)
        height = _map_height(len(picture.cells), roomy=True)
        return _Panel(title, " · ".join((*picture.notes, unit)), picture.warning, height, picture)
    bad = int((~np.isfinite(signal)).sum())
    warning = f"{bad:,} NaN or Inf" if bad else ""
    return _Panel(title, unit, warning, max(80, 36 * channels))


def _column(drawn: list[Picture], signal: Array | None, axis: TimeAxis) -> Figure:
    roomy = len(drawn) <= _ROOMY
    count = len(drawn)
    panels = [_panel(picture, roomy, axis, (i + 1) % _ROOMY == 0 or i == count - 1) for i, picture in enumerate(drawn)]
    if signal is not None:
        panels.insert(0, _signal_panel(signal, axis))
    maps = any(picture.kind == "map" for picture in drawn)
    figure = _draw.new_figure(WIDTH, sum(panel.total for panel in panels) + (_FOOT if maps else 8))
    top = 4
    for panel in panels:
        _draw_panel(figure, panel, top + _TITLE, signal, axis)
        top += panel.total
    if maps:
        _footer(figure, top, axis)
    return figure


def _draw_panel(figure: Figure, panel: _Panel, top: int, signal: Array | None, axis: TimeAxis) -> None:
    _draw.write(figure, LEFT, top - 2, panel.title, weight="bold")
    _draw.write(figure, LEFT + ACROSS, top - 2, panel.right, ha="right", fontsize=7)
    picture = panel.picture
    if picture is not None and picture.kind == "nothing":
        _draw.write(figure, LEFT, top + 12, panel.warning, color=_draw.ALARM)
        return
    axes = _draw.place(figure, LEFT, top, ACROSS, panel.height)
    if panel.warning:
        right = LEFT + ACROSS - int(_NOTE_SIGN * (len(panel.right) + 2))
        _draw.write(figure, right, top - 2, panel.warning, ha="right", fontsize=7, color=_draw.ALARM, weight="bold")
    if picture is None:
        assert signal is not None
        _draw.draw_signal(axes, signal, axis)
    elif picture.kind == "bars":
        _draw.draw_bars(axes, picture)
        axes.set_ylabel("value", fontsize=7, labelpad=1)
    else:
        _draw.draw_map(axes, picture)
        axes.set_ylabel("channel", fontsize=7, labelpad=1)
        if picture.extent is not None and axis.bounds is not None:
            axes.set_xlim(axis.bounds)
        else:
            _draw.whole_ticks(axes, picture.frames)
    if not panel.ticks:
        axes.tick_params(labelbottom=False)


def _footer(figure: Figure, top: int, axis: TimeAxis) -> None:
    """The unit of the time axis, and what the colours mean."""
    unit = f"time in {axis.unit}" if axis.has_timeline else "frames of each layer"
    _draw.write(figure, LEFT + ACROSS // 2, top + 8, unit, ha="center", va="center", fontsize=7)
    bar = _draw.place(figure, LEFT, top + 20, 200, 9)
    bar.imshow(palette()[None, : 2 * STEPS + 1], aspect="auto", extent=(-1, 1, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([-1, 0, 1], ["−limit", "0", "limit"])
    text = f"each map has its own limit (colour ± above it): {PERCENTILE} % of its cells are within it · NaN black · Inf yellow"
    _draw.write(figure, LEFT + 225, top + 25, text, va="center", fontsize=7)


def distributions(
    acts: Activations, layers: Chosen = None, timeline: Any = None, channels_last: bool | Chosen = None
) -> Figure:
    """Draws how each layer's values are spread over all inputs: quantiles, zeros, dead channels.

    Args:
        acts: what a block collected.
        layers: which layers, as in ``plot``; None for all.
        timeline: what ``convtap.timeline`` gives, as in ``plot``.
        channels_last: which outputs are (B, T, C), as in ``plot``.

    Returns:
        A matplotlib Figure with one row a layer, over all inputs: the 1 % to 99 % quantiles (thin), the quartiles (thick) and
        the median (red) of the finite values; the share of exact zeros; the share of dead channels. A layer that runs
        several times in one forward pass, such as a shared activation, has one row for each of these runs: ``act#0``,
        ``act#1``, …. A channel is dead if it has the same value in every input at every frame (if there is one value only:
        if that is zero). A question mark says where the channels were assumed to be axis 1.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: ``layers`` means nothing that is here.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> from convtap.plot import distributions
        >>> figure = distributions(acts)
    """
    from convtap._view.spread import spreads
    from convtap._view.spread_figure import spread_figure

    axis = TimeAxis(timeline, None, has_signal=False)
    found = spreads(acts, Orientation(acts, axis, channels_last), layers)
    return spread_figure(found)


def channels(
    acts: Activations,
    layer: str,
    sample: int = 0,
    channels: Any = 64,
    timeline: Any = None,
    channels_last: bool | Chosen = None,
) -> Figure:
    """Draws single channels of one layer for one input, each as its own small line over the frames.

    Args:
        acts: what a block collected.
        layer: the layer's name or a call key.
        sample: which input, numbered from 0 through all forward passes.
        channels: how many, from channel 0 on; or which, such as ``[3, 17]`` or ``range(64, 128)``.
        timeline: what ``convtap.timeline`` gives, as in ``plot``.
        channels_last: which outputs are (B, T, C), as in ``plot``.

    Returns:
        A matplotlib Figure; all its lines have the same scale. An output without a time axis is drawn as bars.

    Raises:
        MissingExtra: matplotlib is not installed.
        LayerNotFound: ``layer`` is not here.
        AmbiguousCall: the layer ran several times.
        OutOfRange: there is no such input, or no such channel.
        ConvtapError: an argument cannot be used, or the layer has no rows an input.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> from convtap.plot import channels
        >>> len(channels(acts, "2").axes)
        8
    """
    from convtap._view.multiples import one_map, small_multiples

    key, values = one_map(acts, layer, sample, timeline, channels_last)
    return small_multiples(key, values, channels)


def statistics(stats: Statistics, layers: str | Sequence[str] | None = None) -> Figure:
    """Draws the distribution of each layer's values, and a map of its dead and saturated channels.

    Args:
        stats: what ``convtap.statistics`` collected.
        layers: names or globs of layers; None for all.

    Returns:
        A matplotlib Figure: one row a layer as in ``distributions``, and one as channels from left to right. A column of
        several channels shows the worst of them.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: there are no statistics.
        LayerNotFound: ``layers`` names nothing that is here.
    """
    from convtap._view.statistics_figure import statistics_figure

    return statistics_figure(stats, layers)
