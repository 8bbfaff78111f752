"""Draws how the values of layers are spread: quantiles, zeros, dead channels, one row a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from convtap._view import draw as _draw
from convtap._view.labels import shortened
from convtap._view.spread import Spread, linear_up_to

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP, _BOTTOM, _BETWEEN, _SIDE, _WARNED = 34, 38, 28, 130, 130
_SIGN = 7.0  # pixels that one sign of a label needs at most, nearly always
_CROWDED = 20


def spread_figure(found: list[Spread], below: int = 0) -> Figure:
    """Draws one row a layer, and leaves so many pixels free below."""
    step = 26 if len(found) <= _CROWDED else 17
    labels = [shortened(spread.name, 40) for spread in found]
    left = 24 + max(40, int(_SIGN * max(map(len, labels))))
    height = step * len(found)
    figure = _draw.new_figure(_draw.WIDTH, _TOP + height + _BOTTOM + below)
    warned = _WARNED if any(spread.warning for spread in found) else 0
    width = _draw.WIDTH - left - 2 * (_SIDE + _BETWEEN) - warned - 24
    axes = []
    for extent, title in (
        (width, "values: 1 – 25 – 50 – 75 – 99 %"),
        (_SIDE, "exactly zero"),
        (_SIDE, "dead channels"),
    ):
        axes.append(_draw.place(figure, left, _TOP, extent, height))
        axes[-1].set_title(title, fontsize=8, weight="bold", pad=4)
        left += extent + _BETWEEN
    _quantiles(axes[0], [spread.quantiles for spread in found])
    _shares(axes[1], [spread.zeros for spread in found], [_percent(spread.zeros) for spread in found])
    _shares(axes[2], [spread.dead_share for spread in found], [spread.dead_text for spread in found])
    for ax in axes:
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.set_yticks([])
    axes[0].set_yticks(range(len(found)), labels, fontsize=8, parse_math=False)
    for row, spread in enumerate(found):
        middle = _TOP + int((row + 0.5) * step)
        _draw.write(figure, left - 16, middle, spread.warning, color=_draw.ALARM, fontsize=7, va="center")
    return figure


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _quantiles(axes: Axes, rows: list[tuple[float, ...] | None]) -> None:
    """Draws the 1 % to 99 % quantiles of each row as a thin bar, the quartiles as a thick one, the median as a line."""
    for position, row in enumerate(rows):
        if row is None:
            continue
        low, first, median, third, high = row
        axes.plot([low, high], [position, position], color=_draw.INK, lw=1.2, solid_capstyle="butt")
        axes.barh(position, third - first, left=first, height=0.56, color="#8fbde0", ec=_draw.INK, lw=0.6)
        ends = [position - 0.28, position + 0.28]
        axes.plot([median, median], ends, color=_draw.ALARM, lw=1.6, solid_capstyle="butt")
    _scale(axes, [max(abs(row[0]), abs(row[-1])) for row in rows if row is not None])
    axes.axvline(0, color=_draw.INK, lw=0.5, zorder=0)
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


def _shares(axes: Axes, shares: list[float | None], texts: list[str]) -> None:
    """Draws shares between 0 and 1 as bars, each with its text."""
    axes.barh(
        range(len(shares)), [share or 0.0 for share in shares], height=0.56, color="#f0a07c", ec=_draw.INK, lw=0.4
    )
    for position, text in enumerate(texts):
        axes.text(0.02, position, text, fontsize=7, va="center")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
