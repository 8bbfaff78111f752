"""Writes the report's table, with the statistics of each captured tensor."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from convtap._errors import plural
from convtap._table import cell, human_bytes
from convtap._tensors.memory import tensor_bytes
from convtap._tensors.nested import walk_tensors
from convtap._tensors.statistics import dtype_text, shapes_text, statistics
from convtap._view.cells import written_bad
from convtap._view.outputs import CapturedOutputs
from convtap._view.pictures import Picture, Pictures
from convtap._view.report.blocks import blocks
from convtap._view.report.entries import Entries, block_note, label_html
from convtap._view.report.image import box, thumbnail
from convtap._view.report.page import MAX_ROWS, escape
from convtap._view.spread import QUANTILES, Spread, linear_up_to, spread_of

#: The headings, each with whether its column holds numbers. The column of thumbnails is not sortable.
_COLUMNS = (
    ("layer", False),
    ("shape, type, size", True),
    ("min", True),
    ("mean", True),
    ("max", True),
    ("std", True),
    ("zeros", True),
    ("dead channels", True),
    ("NaN, Inf", True),
    ("quantiles", True),
)
_NOTE = (
    "<p class='hint'>The statistics are of the finite values, and std is the population standard deviation. A channel is "
    "dead if it has the same value in every input at every frame. The channel axis comes from channels_last=, the timeline "
    "or the layer's type. A question mark follows an axis that was assumed. All quantiles have the same scale, with "
    "zero in the middle: the line spans 1 to 99 %, the box spans 25 to 75 %, and the median is red. Click a heading to sort "
    "up, down, or in execution order. Click a name to go to the picture.</p>"
)


def statistics_table(outputs: CapturedOutputs, entries: Entries, drawn: Pictures) -> str:
    """Returns the table, folded by block, with a note if it is truncated."""
    found = []
    for call in outputs.calls[:MAX_ROWS]:
        for path, tensor in walk_tensors(call.output):
            found.append((spread_of(outputs, f"{call.key}{path}", [(call, path)]), tensor))
    place = _common_scale([max(map(abs, spread.quantiles)) for spread, _ in found if spread.quantiles is not None])
    left_out, calls = "", len(outputs.calls)
    if calls > MAX_ROWS:
        left_out = (
            f"<p class='alarm'>Shown: the first {MAX_ROWS:,} of {plural(calls, 'call')}. acts.summary() has all.</p>"
        )
    thumbnails = {picture.key: _thumbnail(picture) for picture in drawn.outputs}
    rows = [_row(spread, tensor, place, entries, thumbnails) for spread, tensor in found]
    heads = "".join(
        f'<th scope="col" data-label="{name}"{_number(numeric)}><button type="button">{name}</button></th>'
        for name, numeric in _COLUMNS
    )
    bodies = _bodies(entries, rows, [spread.warning for spread, _ in found])
    return (
        f'{left_out}{_NOTE}<table class="layers"><thead><tr><th scope="col" class="soft">map</th>{heads}</tr>'
        f"</thead>{bodies}</table>"
    )


def labels() -> str:
    """Returns the style that puts headings beside cells, if the page is narrow."""
    rules = "".join(
        f'.layers tbody td:nth-child({number})::before {{ content: "{name}"; }}\n'
        for number, (name, _) in enumerate(_COLUMNS, 2)
        if number > 2
    )
    return f"@media screen and (max-width: 999px) {{\n{rules}}}\n"


def _bodies(entries: Entries, rows: list[str], warns: list[str]) -> str:
    """Returns the rows, with one table body and heading per block."""
    found = blocks(entries.items)
    if found is None:
        return f"<tbody>{''.join(rows)}</tbody>"
    width = len(_COLUMNS) + 1
    return "".join(
        f'<tbody><tr class="block"><th scope="rowgroup" colspan="{width}"><button class="tool" type="button">'
        f"{label_html(names)}</button>{block_note(positions, warns)}</th></tr>"
        f"{''.join(rows[position] for position in positions)}</tbody>"
        for names, positions in found
    )


def _common_scale(widths: list[float]) -> Callable[[float], float]:
    """Returns a function from a value to its place between -1 and 1 for all layers.

    The scale is logarithmic if the layers differ a lot.
    """
    most, linear = max(widths, default=0.0) or 1.0, linear_up_to(widths)
    if linear is None:
        return lambda value: value / most
    return lambda value: math.asinh(value / linear) / math.asinh(most / linear)


def _row(
    spread: Spread, tensor: Tensor, place: Callable[[float], float], entries: Entries, thumbnails: dict[str, str]
) -> str:
    low, mean, high, std, _, nan, inf = statistics(tensor)
    size = tensor_bytes(tensor)
    about = (
        f"{escape(shapes_text(tensor.shape))}<small>{escape(dtype_text(tensor.dtype))} · {human_bytes(size)}</small>"
    )
    cells = [
        (about, size),
        *((escape(cell(value)), value) for value in (low, mean, high, std)),
        ("" if spread.zeros is None else f"{100 * spread.zeros:.1f}%", spread.zeros),
        (spread.dead_text, spread.dead if spread.channels else None),
        (f'<span class="alarm">{written_bad(nan, inf)}</span>' if nan or inf else "0", nan + inf),
        _box(spread, place),
    ]
    thumbnail = thumbnails.get(spread.name, "")
    if thumbnail:
        thumbnail = f'<a href="#{entries.map[spread.name]}" tabindex="-1">{thumbnail}</a>'
    numbers = "".join(
        f'<td class="number" data-value="{"" if value is None else repr(value)}">{text}</td>' for text, value in cells
    )
    row = entries.row[spread.name]
    return f'<tr id="{row}"><td>{thumbnail}</td><td>{entries.link(spread.name)}</td>{numbers}</tr>'


def _thumbnail(picture: Picture) -> str:
    if picture.kind not in ("map", "bars"):
        return ""
    data = base64.b64encode(thumbnail(picture.cells, picture.kind == "map", picture.side)).decode()
    return f'<img class="thumbnail" loading="lazy" alt="" src="data:image/png;base64,{data}">'


def _number(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _box(spread: Spread, place: Callable[[float], float]) -> tuple[str, Any]:
    if spread.quantiles is None:
        return "", None
    text = ", ".join(f"{percent} %: {value:.4g}" for percent, value in zip(QUANTILES, spread.quantiles, strict=True))
    return f'<span title="{text}">{box(spread.quantiles, place)}</span>', spread.quantiles[2]
