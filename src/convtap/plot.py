"""Draws captures with matplotlib: feature maps, distributions and channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from convtap._errors import InvalidType
from convtap._result.activations import Activations, log_of
from convtap._view.channel_lines import one_map, small_multiples
from convtap._view.draw import COLUMNS
from convtap._view.hit_windows import windows_figure
from convtap._view.outputs import CapturedOutputs, Chosen, checked_count
from convtap._view.pages import one_figure, page_figures
from convtap._view.pictures import pictures
from convtap._view.spread import spread_figure, spreads
from convtap._view.time_axis import Span, TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convtap._result.statistics import Statistics
    from convtap._time.hit import Hit


def plot(
    acts: Activations,
    sample: int = 0,
    layers: Chosen = None,
    signal: Any = None,
    sample_rate: float | None = None,
    timeline: Any = None,
    channels: int = 64,
    channels_last: bool | Chosen = None,
    span: Span = None,
) -> Figure:
    """Draws each layer's output for one input, as one (channels × time) map per call.

    The maps are in execution order. Blue is below zero, white is zero, and red is above zero. Each map has its own colour
    limit, written in its title: 99 % of its cells are within the limit, and the others have the full colour. The scale of
    an output without negative values, such as a ReLU's, starts at zero. The scale of an output without positive values
    ends at zero.

    If a map has more frames than columns, each bin of frames is drawn as two columns, its minimum and its maximum. If it has
    more channels than rows, neighbouring channels share a row, which shows at each frame the value furthest from zero. The
    title says so. NaN is black and Inf is yellow. The title counts both, and marks above the map show where they are. An
    output without a time axis is drawn as one bar per channel.

    If all maps together would be higher than 6,000 pixels (about 60 maps), the figure is an index with one strip per output.
    ``pages`` then draws the maps on several pages.

    Args:
        acts: the outputs of a capture.
        sample: the number of the input, counted from 0 across all forward passes.
        layers: the calls to draw; None for every call. Pass a name, a call key (``"conv#1"``), a glob, a ``re.Pattern``, or
            several of them.
        signal: the model's input, drawn above the maps: (B, C, T), (B, T), (C, T) or (T,). It is (B, T, C) for a timeline
            that follows axis 1, for Keras, or with ``channels_last=True``.
        sample_rate: input samples per second. The time axis is then in seconds.
        timeline: the result of ``convtap.timeline(model, x)``. With it everything is drawn on one time axis: a frame lies
            around the centre of its receptive field and is as wide as the stride. Without it each map has the full width,
            and its frames are numbered.
        channels: the maximum number of rows of a map.
        channels_last: which outputs are (B, T, C): True for all, False for none, or one or several names, globs or patterns
            of layers. With None, the timeline or the layer's type decides (Conv1d, LayerNorm, Linear, attention, recurrent
            and Keras layers), and the title of a map says if (B, C, T) was assumed.
        span: the part of the input to show for the signal and all layers, as ``(start, stop)``. It is in samples, up to
            ``stop - 1``, or in seconds with ``sample_rate``. Needs ``timeline``.

    Returns:
        A matplotlib Figure. A notebook shows it. In a script, save it with ``figure.savefig("maps.png")``.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: ``layers`` matches no captured call.
        OutOfRange: the input does not exist, or ``span`` is not within it.
        Unsupported: the capture has more than 650 outputs, too many for an index on one page.
        ConvtapError: another argument is invalid (also a TypeError or a ValueError).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> figure = acts.plot(sample=1)
        >>> len(figure.axes)  # two maps and the colour scale
        3
    """
    axis = TimeAxis(timeline, sample_rate, has_signal=signal is not None, span=span)
    outputs = _outputs_of(acts, axis, channels_last)
    return one_figure(pictures(outputs, sample, layers, signal, checked_count("channels", channels), COLUMNS), axis)


def pages(
    acts: Activations,
    sample: int = 0,
    layers: Chosen = None,
    signal: Any = None,
    sample_rate: float | None = None,
    timeline: Any = None,
    channels: int = 64,
    channels_last: bool | Chosen = None,
    span: Span = None,
) -> list[Figure]:
    """Draws the maps of ``plot`` on pages of at most 3,000 pixels, after an index.

    Args:
        acts: the outputs of a capture.
        sample: the number of the input, as in ``plot``.
        layers: the calls to draw, as in ``plot``.
        signal: the model's input, as in ``plot``, at the top of each page.
        sample_rate: input samples per second, as in ``plot``.
        timeline: the result of ``convtap.timeline``, as in ``plot``.
        channels: the maximum number of rows of a map.
        channels_last: which outputs are (B, T, C), as in ``plot``.
        span: the part of the input to show, as in ``plot``.

    Returns:
        A list of matplotlib Figures. The first is the index, with a strip and a page number for each output. The index has
        one page per 325 outputs. If all maps fit on one page, the list has only that page.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured, LayerNotFound, OutOfRange, ConvtapError: as in ``plot``.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> from convtap.plot import pages
        >>> model = nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1) for _ in range(40)))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> len(pages(acts))  # the index and two pages
        3
    """
    axis = TimeAxis(timeline, sample_rate, has_signal=signal is not None, span=span)
    outputs = _outputs_of(acts, axis, channels_last)
    return page_figures(pictures(outputs, sample, layers, signal, checked_count("channels", channels), COLUMNS), axis)


def distributions(
    acts: Activations, layers: Chosen = None, timeline: Any = None, channels_last: bool | Chosen = None
) -> Figure:
    """Draws the distribution of each layer's values over all inputs.

    Each layer has one row: the 1 % to 99 % quantiles (thin), the quartiles (thick) and the median (red) of the finite values,
    the share of exact zeros, and the share of dead channels. A layer that runs several times in one forward pass, such as a
    shared activation, has one row for each of these runs: ``act#0``, ``act#1``, …. A channel is dead if it has the same value
    in every input at every frame. A channel with only one value is dead if that value is zero. A question mark after an axis
    says that convtap assumed it to be the channels.

    Args:
        acts: the outputs of a capture.
        layers: the layers to draw, as in ``plot``; None for all.
        timeline: the result of ``convtap.timeline``, as in ``plot``.
        channels_last: which outputs are (B, T, C), as in ``plot``.

    Returns:
        A matplotlib Figure.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: ``layers`` matches no captured call.
        ConvtapError: another argument is invalid (also a TypeError or a ValueError).

    Examples:
        >>> import torch
        >>> from convtap import capture
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> from convtap.plot import distributions
        >>> figure = distributions(acts)
    """
    return spread_figure(spreads(_outputs_of(acts, TimeAxis(timeline), channels_last), layers))


def channels(
    acts: Activations,
    layer: str,
    sample: int = 0,
    channels: Any = 64,
    timeline: Any = None,
    channels_last: bool | Chosen = None,
    *,
    signal: Any = None,
    sample_rate: float | None = None,
    span: Span = None,
) -> Figure:
    """Draws channels of one layer for one input, each as a small line over time.

    All lines have the same scale. An output without a time axis is drawn as bars.

    Args:
        acts: the outputs of a capture.
        layer: the layer's name or a call key.
        sample: the number of the input, counted from 0 across all forward passes.
        channels: the number of channels, starting at channel 0, or the channels to draw, such as ``[3, 17]`` or
            ``range(64, 128)``.
        timeline: the result of ``convtap.timeline``, as in ``plot``. With it the lines lie over the input's time, without it
            over the layer's frames.
        channels_last: which outputs are (B, T, C), as in ``plot``.
        signal: the model's input, as in ``plot``, above each column of lines.
        sample_rate: input samples per second. The time axis is then in seconds.
        span: the part of the input to show, as in ``plot``.

    Returns:
        A matplotlib Figure.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: the layer did not run on this input.
        AmbiguousCall: the layer ran several times on this input.
        OutOfRange: the input or a channel does not exist, or ``span`` is not within the input.
        Unsupported: the picture would be higher than 6,000 pixels, or the layer has no known place for ``span``.
        ConvtapError: an argument is invalid, or the layer's output does not have one row per input.

    Examples:
        >>> import torch
        >>> from convtap import capture
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> from convtap.plot import channels
        >>> len(channels(acts, "0").axes)
        8
    """
    axis = TimeAxis(timeline, sample_rate, has_signal=signal is not None, span=span)
    found = one_map(_outputs_of(acts, axis, channels_last), layer, sample, signal)
    return small_multiples(found, channels, axis)


def windows(hits: Iterable[Hit], x: Any, *, sample_rate: float | None = None, letters: str | None = None) -> Figure:
    """Draws the input windows of hits, which drive each channel most.

    The windows of each channel stand together, in the order of the hits, and all have the same scale. Above each window are
    the number of its input, its first and its last sample, and the layer's output. Samples outside the signal are grey.

    Args:
        hits: hits that ``convtap.top`` returned, or some of them, such as ``hits[:20]``.
        x: all inputs of the data set, as in ``convtap.windows``.
        sample_rate: input samples per second. Positions are then in seconds.
        letters: one letter per channel of one-hot inputs, such as ``"ACGT"``, to draw each window as a row of letters. With
            None, windows are lines, or maps if the inputs have more than 8 channels.

    Returns:
        A matplotlib Figure.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidValue: ``hits`` is empty, the windows differ in length, or ``letters`` does not fit the inputs.
        OutOfRange: ``x`` does not hold the input of a hit.
        InvalidType: ``hits`` holds other objects, or ``x`` is a single input or cannot be indexed by sample number.
        Unsupported: the picture would be higher than 6,000 pixels.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import top
        >>> from convtap.plot import windows
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 9))
        >>> x = torch.randn(8, 1, 200)
        >>> figure = windows(top(model, x, "0", 4), x)
        >>> len(figure.axes)  # four windows of each of two channels
        8
    """
    return windows_figure(hits, x, sample_rate, letters)


def _outputs_of(acts: Activations, axis: TimeAxis, channels_last: bool | Chosen) -> CapturedOutputs:
    """Returns the outputs of ``acts``, after a check of its type."""
    if not isinstance(acts, Activations):
        raise InvalidType(
            f"acts is a {type(acts).__name__}, not the result of a capture. Pass the acts of: with capture(model) as acts: …"
        )
    return CapturedOutputs(log_of(acts), axis, channels_last)


def statistics(stats: Statistics, layers: str | Sequence[str] | None = None) -> Figure:
    """Draws the distribution of each layer's values and a map of its channels.

    Each layer has one row as in ``distributions``, and one row of the map, with its channels from left to right. The map
    shows which channels are dead, saturated, or have NaN or Inf. A column of several channels shows the worst of them.

    Args:
        stats: the result of ``convtap.statistics``.
        layers: names or globs of layers; None for all.

    Returns:
        A matplotlib Figure.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: ``stats`` is empty.
        LayerNotFound: ``layers`` matches no layer of ``stats``.
        InvalidType: ``layers`` is not a string or a list of strings.
    """
    from convtap._view.statistics_figure import statistics_figure

    return statistics_figure(stats, layers)
