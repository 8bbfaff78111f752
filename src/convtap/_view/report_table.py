"""The report's table: one row a tensor that was captured, with its statistics and how its values are spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convtap._errors import plural
from convtap._table import cell, human_bytes
from convtap._tensors.memory import tensor_bytes
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import dtype_text, shapes_text, statistics
from convtap._view.orient import Orientation
from convtap._view.page import escape, sortable
from convtap._view.spread import QUANTILES, Spread, linear_up_to, spreads
from convtap._view.svg import box, common_scale

if TYPE_CHECKING:
    from convtap._result.activations import Activations

#: More rows than this make a page that no browser opens at once.
MAX_ROWS = 2000

_COLUMNS = [
    ("layer", False),
    ("shape", False),
    ("dtype", False),
    ("bytes", True),
    ("min", True),
    ("mean", True),
    ("max", True),
    ("std", True),
    ("zeros", True),
    ("NaN", True),
    ("Inf", True),
    ("dead channels", True),
    ("1–25–50–75–99 %", True),
]


def statistics_table(acts: Activations, orientation: Orientation) -> str:
    """The table, sortable; headed by what it leaves out, if it does."""
    calls = acts.calls()
    found = spreads(acts, orientation, calls=calls[:MAX_ROWS])
    widths = [max(map(abs, spread.quantiles)) for spread in found if spread.quantiles is not None]
    place = common_scale(widths, linear_up_to(widths))
    tensors = [tensor for call in calls[:MAX_ROWS] for _, tensor in walk_tensors(call.output)]
    rows = [_row(spread, tensor, place) for spread, tensor in zip(found, tensors, strict=True)]
    left_out = ""
    if len(calls) > MAX_ROWS:
        left_out = (
            f"<p class='alarm'>The first {MAX_ROWS:,} of {plural(len(calls), 'call')}; acts.summary() has all.</p>"
        )
    note = (
        "<p class='soft'>Of the finite values; std is that of the population. A channel is dead if it has the same value in "
        "every input at every frame. Which axis is the channels is known from the layer's type, the timeline, or "
        "channels_last=; where it was assumed, a question mark says so. The boxes have one scale, with zero in the middle. A "
        "heading sorts.</p>"
    )
    return left_out + note + sortable(_COLUMNS, rows)


def _row(spread: Spread, tensor: Any, place: Any) -> list[tuple[str, Any]]:
    low, mean, high, std, _, nan, inf = statistics(tensor)
    numbers = [(escape(cell(value)), value) for value in (low, mean, high, std)]
    zeros = "" if spread.zeros is None else f"{100 * spread.zeros:.1f}%"
    size = tensor_bytes(tensor)
    return [
        (escape(spread.name), None),
        (escape(shapes_text(tensor.shape)), None),
        (escape(dtype_text(tensor.dtype)), None),
        (escape(human_bytes(size)), size),
        *numbers,
        (zeros, spread.zeros),
        *((_alarm(count), count) for count in (nan, inf)),
        (spread.dead_text, spread.dead if spread.channels else None),
        _box(spread, place),
    ]


def _alarm(count: int | None) -> str:
    return f'<span class="alarm">{count:,}</span>' if count else cell(count)


def _box(spread: Spread, place: Any) -> tuple[str, Any]:
    if spread.quantiles is None:
        return "", None
    text = ", ".join(f"{percent} %: {value:.4g}" for percent, value in zip(QUANTILES, spread.quantiles, strict=True))
    return f'<span title="{text}">{box(spread.quantiles, place)}</span>', spread.quantiles[2]
