"""Computes and draws each layer's quantiles, zeros and dead channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._result.call import Call, shown_value
from convtap._tensors.memory import has_no_values
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import real_values
from convtap._view import draw
from convtap._view.cells import Array, count_bad, shortened
from convtap._view.outputs import CapturedOutputs, Chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTILES = (1, 25, 50, 75, 99)


@dataclass(frozen=True)
class Spread:
    """The spread of one layer's values.

    Attributes:
        name: the layer's name, with the path of the tensor if the layer returns several.
        quantiles: the quantiles of the finite values at QUANTILES percent, or None if no value is finite.
        zeros: the share of exact zeros among all values, or None without values.
        dead: the number of channels with the same value everywhere. A channel with only one value counts if it is zero.
        channels: the number of channels, or 0 if the calls differ in it.
        warning: the counts of NaN and Inf as text, or an empty string.
        assumed: the axis that was assumed to be the channels, such as ``"axis 1"``; empty if the axis is known.
    """

    name: str
    quantiles: tuple[float, ...] | None = None
    zeros: float | None = None
    dead: int = 0
    channels: int = 0
    warning: str = ""
    assumed: str = ""

    @property
    def dead_text(self) -> str:
        """The number of dead channels as text, with the assumed channel axis."""
        assumed = f" ({self.assumed}?)" if self.assumed else ""
        return f"{self.dead:,} of {self.channels:,}{assumed}" if self.channels else "–"


def spreads(outputs: CapturedOutputs, layers: Chosen = None) -> list[Spread]:
    """Computes the spread of each chosen layer over all inputs, one layer at a time.

    A layer that ran several times in one forward pass has one spread per run: ``act#0``, ``act#1``, …
    """
    keys = outputs.keys_in_pass()
    groups: dict[str, list[tuple[Call, str]]] = {}
    for call in outputs.chosen(layers):
        for path, _ in walk_tensors(shown_value(call)):
            groups.setdefault(f"{keys[id(call)]}{path}", []).append((call, path))
    return [spread_of(outputs, name, tensors) for name, tensors in groups.items()]


def spread_of(outputs: CapturedOutputs, name: str, tensors: list[tuple[Call, str]]) -> Spread:
    """Computes the spread of all values of tensors, given as (call, path)."""
    parts, assumed = [], ""
    for call, path in tensors:
        tensor = dict(walk_tensors(call.output))[path]
        if not has_no_values(tensor):
            array = real_values(tensor.detach()).cpu().numpy()
            axes = outputs.axes(call, path, tensor)
            parts.append(_by_channel(array, axes.channel or 0))
            if not axes.sure:
                assumed = "last axis" if axes.channel == -1 else f"axis {array.ndim + (axes.channel or 0)}"
    values = (
        parts[0].reshape(-1) if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *map(np.ravel, parts)])
    )
    if not values.size:
        return Spread(name, assumed=assumed)
    finite = values[np.isfinite(values)]
    quantiles = tuple(float(q) for q in np.percentile(finite, QUANTILES)) if finite.size else None
    dead, channels = (_dead(parts), len(parts[0])) if len({len(part) for part in parts}) == 1 else (0, 0)
    return Spread(name, quantiles, float((values == 0).mean()), dead, channels, count_bad(values), assumed)


def _by_channel(array: Array, channel: int) -> Array:
    """Returns all values of an output as (channels, values)."""
    if array.ndim == 0:
        return array.reshape(1, 1)
    return np.moveaxis(array, channel, 0).reshape(array.shape[channel], -1)


def _dead(parts: list[Array]) -> int:
    parts = [part for part in parts if part.size]
    low = np.min([part.min(axis=1) for part in parts], axis=0)
    high = np.max([part.max(axis=1) for part in parts], axis=0)
    is_one_value = sum(part.shape[1] for part in parts) == 1
    return int((low == (0 if is_one_value else high)).sum())


def linear_up_to(widths: list[float]) -> float | None:
    """Returns the power of ten up to which the common scale is linear.

    It is None if one linear scale shows every layer.
    """
    widths = sorted(width for width in widths if width > 0)
    if not widths or widths[-1] <= 10 * widths[len(widths) // 2]:
        return None
    return float(10.0 ** math.floor(math.log10(widths[len(widths) // 4])))


# -- the figure: one row per layer

TOP = 34
_BOTTOM, _BETWEEN, _BAR, _WARNED, _MARGIN = 38, 24, 70, 130, 24
_SIGN, _NUMBER_SIGN = 7.0, 5.6  # pixels that a character of a label or a number needs at most, with rare exceptions
_CROWDED = 20


def row_height(count: int) -> int:
    """Returns the height in pixels of a row in a figure with ``count`` rows."""
    return 26 if count <= _CROWDED else 17


def label_width(labels: list[str]) -> int:
    """Returns the width in pixels that labels need on the left."""
    return _MARGIN + max(40, int(_SIGN * max(map(len, labels))))


def spread_figure(found: list[Spread], below: int = 0, beside: int = 0) -> Figure:
    """Draws one row per layer, with free pixels below or beside the rows."""
    step = row_height(len(found))
    labels = [shortened(spread.name, 40) for spread in found]
    zeros = ["–" if one.zeros is None else f"{100 * one.zeros:.3g} %" for one in found]
    dead = [one.dead_text for one in found]
    left, height = label_width(labels), step * len(found)
    figure = draw.new_figure(draw.WIDTH, TOP + height + _BOTTOM + below, "Draw fewer layers: layers=['encoder.*'].")
    warned = _WARNED if any(spread.warning for spread in found) else 0
    sides = [_BAR + 8 + int(_NUMBER_SIGN * max(map(len, texts))) for texts in (zeros, dead)]
    width = draw.WIDTH - left - sum(sides) - 2 * _BETWEEN - warned - beside - _MARGIN
    axes = draw.place(figure, left, TOP, width, height)
    draw.write(figure, left, TOP - 6, "values: 1 – 25 – 50 (red) – 75 – 99 %", weight="bold")
    _quantiles(axes, [spread.quantiles for spread in found])
    axes.set_yticks(range(len(found)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(found) - 0.5, -0.5)
    left += width + _BETWEEN
    shares = [one.zeros or 0.0 for one in found]
    _shares(figure, left, "exactly zero", shares, zeros, height)
    left += sides[0] + _BETWEEN
    shares = [one.dead / one.channels if one.channels else 0.0 for one in found]
    _shares(figure, left, "dead channels", shares, dead, height)
    for row, spread in enumerate(found):
        middle = TOP + int((row + 0.5) * step)
        draw.write(figure, left + sides[1] + 4, middle, spread.warning, color=draw.ALARM, fontsize=7, va="center")
    return figure


def _quantiles(axes: Axes, rows: list[tuple[float, ...] | None]) -> None:
    """Draws the quantiles of each row.

    The 1 % to 99 % quantiles are a thin bar, the quartiles a thick bar, and the median is a dot. A dot stays visible at zero,
    on the edge of a box and of the axes.
    """
    known = [(position, *row) for position, row in enumerate(rows) if row is not None]
    if known:
        positions, low, first, median, third, high = np.asarray(known).T
        axes.plot([low, high], [positions, positions], color=draw.INK, lw=1.2, solid_capstyle="butt")
        axes.barh(positions, third - first, left=first, height=0.56, color="#8fbde0", ec=draw.INK, lw=0.6)
        style: dict[str, Any] = {"ms": 4.5, "mec": "white", "mew": 0.7, "zorder": 3, "clip_on": False}
        axes.plot(median, positions, "o", color=draw.ALARM, **style)
    _scale(axes, [max(abs(row[0]), abs(row[-1])) for row in rows if row is not None])
    axes.axvline(0, color=draw.INK, lw=0.5, zorder=0)
    axes.grid(axis="x", lw=0.3, alpha=0.6)
    axes.set_axisbelow(True)


def _scale(axes: Axes, widths: list[float]) -> None:
    linear = linear_up_to(widths)
    if linear is None:
        axes.set_xlabel("finite values", fontsize=7)
        axes.locator_params(axis="x", nbins=7)
        return
    axes.set_xscale("symlog", linthresh=linear)
    axes.set_xlabel(f"finite values (logarithmic beyond ±{linear:g})", fontsize=7)
    low, high = round(math.log10(linear)), math.ceil(math.log10(max(widths)))
    powers = [10.0**power for power in range(high, low, -max(1, math.ceil((high - low) / 3)))]
    axes.set_xticks([*(-power for power in powers), 0, *reversed(powers)])
    axes.set_xticks([], minor=True)


def _shares(figure: Figure, left: int, title: str, shares: list[float], texts: list[str], height: int) -> None:
    """Draws shares between 0 and 1 as bars, each with its number beside it."""
    axes = draw.place(figure, left, TOP, _BAR, height)
    draw.write(figure, left, TOP - 6, title, weight="bold")
    axes.barh(range(len(shares)), shares, height=0.56, color="#f0a07c", ec=draw.INK, lw=0.4)
    for position, text in enumerate(texts):
        middle = TOP + int((position + 0.5) * height / len(texts))
        draw.write(figure, left + _BAR + 8, middle, text, fontsize=7, va="center")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 1], ["0", "100 %"])
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_yticks([])
