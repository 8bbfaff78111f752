"""Draws a capture with matplotlib: feature maps below the signal, how values are spread, and single channels."""

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
    """Draws each layer's output for one input: one (channels × time) map a call, in execution order.

    Blue is below zero, red above, white at zero. Each map has its own colour limit, written in its title: 99 % of its
    cells are within it, and the others have the full colour. An output without values below zero, such as a ReLU's, has a
    scale from zero up, and one without values above zero a scale from zero down.

    A map with more frames than columns shows each bin of frames as two columns, its minimum and its maximum; one with more
    channels than rows shows neighbouring channels as one row, which has at each frame the value furthest from zero. Its
    title says so. NaN is black, Inf is yellow, both are counted in the title and marked above the map. An output without a
    time axis is drawn as bars, one a channel.

    If the maps together would be higher than 6,000 pixels (about 60 of them), the figure is an index: one strip an output.
    ``pages`` then draws the maps on several pages.

    Args:
        acts: the outputs of a capture.
        sample: which input, numbered from 0 through all forward passes.
        layers: which calls: a name, a call key (``"conv#1"``), a glob, a ``re.Pattern``, or several; None for every call.
        signal: the model's input, drawn on top: (B, C, T), (B, T), (C, T) or (T,); (B, T, C) with a timeline that follows axis
            1, with Keras, or with ``channels_last=True``.
        sample_rate: input samples a second: the time axis is in seconds.
        timeline: ``convtap.timeline(model, x)``: everything is drawn on one time axis, each frame around the centre of its
            receptive field and as wide as the stride. Without it each map has the full width, with its frames numbered.
        channels: the most rows of a map.
        channels_last: which outputs are (B, T, C): True for all, False for none, or a name, glob or pattern of layers, or
            several. None: as the timeline or the layers' types say (Conv1d, LayerNorm, Linear, attention, recurrent and
            Keras layers); the title of a map says if (B, C, T) was assumed.
        span: ``(start, stop)`` zooms the signal and all layers on this part of the input: in samples, of which the last is
            ``stop - 1``, or in seconds with ``sample_rate``. It needs ``timeline``.

    Returns:
        A matplotlib Figure. A notebook shows it; elsewhere use ``figure.savefig("maps.png")``.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: ``layers`` matches no captured call.
        OutOfRange: there is no such input, or ``span`` is not within it.
        Unsupported: there are more than 650 outputs, too many for an index on one page.
        ConvtapError: another argument cannot be used (then it is a TypeError or a ValueError as well).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> figure = acts.plot(sample=1)
        >>> len(figure.axes)  # two maps and the scale of colours
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
    """Draws the maps of ``plot`` on pages of at most 3,000 pixels, behind an index.

    Args:
        acts: the outputs of a capture.
        sample: which input, as in ``plot``.
        layers: which calls, as in ``plot``.
        signal: the model's input, as in ``plot``, on top of each page.
        sample_rate: input samples a second, as in ``plot``.
        timeline: the result of ``convtap.timeline``, as in ``plot``.
        channels: the most rows of a map.
        channels_last: which outputs are (B, T, C), as in ``plot``.
        span: the part of the input to show, as in ``plot``.

    Returns:
        A list of matplotlib Figures. The first is the index, with a strip and a page number for each output (two of more
        than 325 outputs, and so on). If all maps fit on one page, it is the only one.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured, LayerNotFound, OutOfRange, ConvtapError: as ``plot``.

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
    """Draws the spread of each layer's values over all inputs: quantiles, zeros, dead channels.

    Args:
        acts: the outputs of a capture.
        layers: which layers, as in ``plot``; None for all.
        timeline: the result of ``convtap.timeline``, as in ``plot``.
        channels_last: which outputs are (B, T, C), as in ``plot``.

    Returns:
        A matplotlib Figure with one row a layer, over all inputs: the 1 % to 99 % quantiles (thin), the quartiles (thick) and
        the median (red) of the finite values; the share of exact zeros; the share of dead channels. A layer that runs
        several times in one forward pass, such as a shared activation, has one row for each of these runs: ``act#0``,
        ``act#1``, …. A channel is dead if it has the same value in every input at every frame (if there is one value only:
        if that is zero). A question mark follows the axis that was assumed to be the channels.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: ``layers`` matches no captured call.

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
    """Draws single channels of one layer for one input, each as its own small line over time.

    Args:
        acts: the outputs of a capture.
        layer: the layer's name or a call key.
        sample: which input, numbered from 0 through all forward passes.
        channels: how many, from channel 0 on; or which, such as ``[3, 17]`` or ``range(64, 128)``.
        timeline: the result of ``convtap.timeline``, as in ``plot``: the lines lie over the input's time. Without it they
            lie over the layer's frames.
        channels_last: which outputs are (B, T, C), as in ``plot``.
        signal: the model's input, as in ``plot``, above each column of lines.
        sample_rate: input samples a second: the time axis is in seconds.
        span: the part of the input to show, as in ``plot``.

    Returns:
        A matplotlib Figure; all its lines have the same scale. An output without a time axis is drawn as bars.

    Raises:
        MissingExtra: matplotlib is not installed.
        NotCaptured: nothing was captured.
        LayerNotFound: the layer did not run on this input.
        AmbiguousCall: the layer ran several times on this input.
        OutOfRange: there is no such input, or no such channel, or ``span`` is not within the input.
        Unsupported: the picture would be higher than 6,000 pixels, or ``span`` is given and the layer's place is unknown.
        ConvtapError: an argument cannot be used, or the layer's output has no row for each input.

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
    """Draws the input windows of hits: what drives each channel most.

    Args:
        hits: the hits that ``convtap.top`` returned, or some of them, such as ``hits[:20]``.
        x: all inputs of the data set, as in ``convtap.windows``.
        sample_rate: input samples a second: positions are in seconds.
        letters: one letter for each channel of one-hot inputs, such as ``"ACGT"``: each window is a row of letters. None for
            lines, or a map of inputs with more than 8 channels.

    Returns:
        A matplotlib Figure: the windows of each channel together, in the order of the hits, all with one scale. Above each
        window are the number of its input, its first and its last sample, and the layer's output. Samples outside of the
        signal are grey.

    Raises:
        MissingExtra: matplotlib is not installed.
        InvalidValue: there are no hits, their windows differ in length, or ``letters`` does not fit the inputs.
        OutOfRange: ``x`` does not hold the input of a hit.
        InvalidType: ``hits`` holds something else, or ``x`` is a single input or is not indexed by sample number.
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
    """Turns the public argument into the log that everything below reads."""
    if not isinstance(acts, Activations):
        raise InvalidType(
            f"acts is a {type(acts).__name__}, not a capture's outputs. Pass acts of: with capture(model) as acts: model(x)"
        )
    return CapturedOutputs(log_of(acts), axis, channels_last)


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
