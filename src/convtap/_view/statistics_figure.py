"""Draws statistics: each layer's distribution, and a map of its channels."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._errors import InvalidType, NotCaptured
from convtap._result.layer_statistics import LayerStatistics
from convtap._result.statistics import Statistics
from convtap._view import draw as _draw
from convtap._view.cells import Array, edges, shortened, written_bad
from convtap._view.spread import QUANTILES, TOP, Spread, label_width, row_height, spread_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The states of a channel, from harmless to worst. A cell of several channels shows the worst of them.
_STATES = (("", "#f2f2f2"), ("saturated", "#e8a33d"), ("dead", "#2b3a4a"), ("NaN or Inf", _draw.ALARM))
_NOTHING = "#ffffff"
_ROW, _TITLE, _FOOT, _SIGN = 14, 26, 46, 7.0
#: With more layers than this, the map of channels is to the right of the rows, so that each layer has one row.
_MANY, _BESIDE = 20, 200


def statistics_figure(stats: Statistics, layers: Any) -> Figure:
    """Draws one row per layer, and a map of channels below the rows or beside them.

    Raises:
        LayerNotFound: ``layers`` matches no layer of ``stats``.
        NotCaptured: ``stats`` is empty.
    """
    found = _chosen(stats, layers)
    if not found:
        raise NotCaptured("the statistics are empty. Run the model inside: with statistics(model) as stats: model(x)")
    spreads, rows = [_spread(layer) for layer in found], [layer for layer in found if layer.channels]
    if not rows:
        return spread_figure(spreads)
    if len(found) > _MANY:
        figure = spread_figure(spreads, beside=_BESIDE + 24)
        left, height = _draw.WIDTH - _BESIDE - 24, row_height(len(found))
        _channel_map(figure, found, left, TOP, _BESIDE, height)
        return figure
    height = _TITLE + _ROW * len(rows) + _FOOT
    figure = spread_figure(spreads, below=height)
    labels = [shortened(layer.name, 40) for layer in rows]
    left, top = label_width(labels), int(figure.get_size_inches()[1] * _draw.DPI) - height + _TITLE
    axes = _channel_map(figure, rows, left, top, _draw.WIDTH - left - _draw.RIGHT, _ROW)
    axes.set_yticks(range(len(rows)), labels, fontsize=7, parse_math=False)
    return figure


def _chosen(stats: Statistics, layers: Any) -> list[LayerStatistics]:
    if layers is None:
        return list(stats.values())
    wanted = [layers] if isinstance(layers, str) else layers
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise InvalidType(f"layers is a {type(layers).__name__}, not a string. Pass a name, a glob, or a list of them.")
    names: dict[str, None] = {}
    for one in wanted:
        globbed = [name for name in stats if fnmatch.fnmatchcase(name, one)]
        names.update(dict.fromkeys(globbed or [stats[one].name]))  # the error of stats lists its layers
    return [stats[name] for name in stats if name in names]


def _spread(layer: LayerStatistics) -> Spread:
    whole = layer.whole
    count, nan, inf = int(whole.count), int(whole.nan), int(whole.inf)
    has_quantiles = layer.relative_error is not None and count > nan + inf
    quantiles = tuple(whole.quantile([share / 100 for share in QUANTILES]).tolist()) if has_quantiles else None
    zeros = int(whole.zeros) / count if count else None
    return Spread(layer.name, quantiles, zeros, len(layer.dead), layer.channels or 0, written_bad(nan, inf))


def states_of(layer: LayerStatistics) -> Array:
    """Returns the state of each channel.

    It is 0, or 1 if the channel is saturated, 2 if it is dead, and 3 if it has NaN or Inf.
    """
    found = np.zeros(layer.channels or 0, np.int64)
    found[layer.saturated] = 1
    found[layer.dead] = 2
    found[(layer.nan + layer.inf).numpy() > 0] = 3
    return found


def _channel_map(
    figure: Figure, layers: list[LayerStatistics], left: int, top: int, width: int, row_pixels: int
) -> Axes:
    """Draws channels from left to right and layers from top to bottom."""
    from matplotlib.colors import ListedColormap

    most = max(layer.channels or 0 for layer in layers)
    bounds = edges(most, width)
    cells = np.full((len(layers), len(bounds) - 1), -1)
    for row, layer in enumerate(layers):
        states = np.concatenate([states_of(layer), np.full(most - (layer.channels or 0), -1)])
        cells[row] = np.maximum.reduceat(states, bounds[:-1])
    axes = _draw.place(figure, left, top, width, row_pixels * len(layers))
    colours = ListedColormap([_NOTHING, *(colour for _, colour in _STATES)])
    extent = (-0.5, most - 0.5, len(layers) - 0.5, -0.5)
    axes.imshow(
        cells, cmap=colours, vmin=-1, vmax=len(_STATES) - 1, aspect="auto", interpolation="nearest", extent=extent
    )
    axes.set_yticks([])
    axes.locator_params(axis="x", integer=True, nbins=max(2, width // 60))
    axes.set_xlabel("channel", fontsize=7)
    at = left
    for name, colour in _STATES[1:]:
        _draw.write(figure, at, top - 6, f"■ {name}", color=colour, fontsize=7)
        at += 20 + int(_SIGN * len(name))
    return axes
