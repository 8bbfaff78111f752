"""Writes the report's table: one row a captured tensor, with its statistics and the spread of its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from convtap._errors import plural
from convtap._table import cell, human_bytes
from convtap._tensors.memory import tensor_bytes
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import dtype_text, shapes_text, statistics
from convtap._view.outputs import CapturedOutputs
from convtap._view.report.image import box
from convtap._view.report.page import MAX_ROWS, escape, sortable
from convtap._view.spread import QUANTILES, Spread, linear_up_to, spread_of

_TEXT = ("layer", "shape", "dtype")
_NUMBERS = ("bytes", "min", "mean", "max", "std", "zeros", "NaN", "Inf", "dead channels", "1–25–50–75–99 %")
_NOTE = (
    "<p class='soft'>Of the finite values; std is that of the population. A channel is dead if it has the same value in "
    "every input at every frame. Which axis is the channels is known from the layer's type, the timeline, or "
    "channels_last=; where it was assumed, a question mark says so. The boxes have one scale, with zero in the middle. A "
    "heading sorts.</p>"
)


def statistics_table(outputs: CapturedOutputs) -> str:
    """Writes the table, sortable; headed by what it leaves out, if it does."""
    found = []
    for call in outputs.calls[:MAX_ROWS]:
        for path, tensor in walk_tensors(call.output):
            found.append((spread_of(outputs, f"{call.key}{path}", [(call, path)]), tensor))
    place = _common_scale([max(map(abs, spread.quantiles)) for spread, _ in found if spread.quantiles is not None])
    left_out, calls = "", len(outputs.calls)
    if calls > MAX_ROWS:
        left_out = f"<p class='alarm'>The first {MAX_ROWS:,} of {plural(calls, 'call')}; acts.summary() has all.</p>"
    columns = [*((name, False) for name in _TEXT), *((name, True) for name in _NUMBERS)]
    return left_out + _NOTE + sortable(columns, [_row(spread, tensor, place) for spread, tensor in found])


def _common_scale(widths: list[float]) -> Callable[[float], float]:
    """Returns a function from a value to its place between -1 and 1, one for all layers; logarithmic if they differ a lot."""
    most, linear = max(widths, default=0.0) or 1.0, linear_up_to(widths)
    if linear is None:
        return lambda value: value / most
    return lambda value: math.asinh(value / linear) / math.asinh(most / linear)


def _row(spread: Spread, tensor: Tensor, place: Callable[[float], float]) -> list[tuple[str, Any]]:
    """Returns the cells of a row: their HTML, and what to sort by."""
    low, mean, high, std, _, nan, inf = statistics(tensor)
    size = tensor_bytes(tensor)
    texts = (spread.name, shapes_text(tensor.shape), dtype_text(tensor.dtype))
    return [
        *((escape(text), None) for text in texts),
        (escape(human_bytes(size)), size),
        *((escape(cell(value)), value) for value in (low, mean, high, std)),
        ("" if spread.zeros is None else f"{100 * spread.zeros:.1f}%", spread.zeros),
        *((f'<span class="alarm">{count:,}</span>' if count else cell(count), count) for count in (nan, inf)),
        (spread.dead_text, spread.dead if spread.channels else None),
        _box(spread, place),
    ]


def _box(spread: Spread, place: Callable[[float], float]) -> tuple[str, Any]:
    if spread.quantiles is None:
        return "", None
    text = ", ".join(f"{percent} %: {value:.4g}" for percent, value in zip(QUANTILES, spread.quantiles, strict=True))
    return f'<span title="{text}">{box(spread.quantiles, place)}</span>', spread.quantiles[2]
