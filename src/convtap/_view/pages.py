"""Divides many feature maps into pages, after an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convtap._errors import Unsupported, plural
from convtap._view.draw import MAX_HEIGHT
from convtap._view.index_page import MOST, MOST_AT_ALL, index_page
from convtap._view.maps import feature_maps, height_of
from convtap._view.pictures import Picture, Pictures
from convtap._view.time_axis import TimeAxis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The maximum height in pixels of a page, if there are several pages.
_PAGE = 3000


def one_figure(found: Pictures, axis: TimeAxis) -> Figure:
    """Draws the maps, or their index if the maps would be too high for one picture."""
    if height_of(found) <= MAX_HEIGHT:
        return feature_maps(found, axis)
    if len(found.outputs) > MOST_AT_ALL:
        raise Unsupported(
            f"{len(found.outputs):,} outputs do not fit into a picture of {MAX_HEIGHT:,} pixels. Draw several pages with "
            "convtap.plot.pages(acts), or fewer outputs with acts.plot(layers=['encoder.*'])."
        )
    return index_page(
        found,
        axis,
        f"index of {plural(len(found.outputs), 'output')}: their maps would be {height_of(found):,} pixels high. "
        "Draw several pages with convtap.plot.pages(acts), or fewer outputs with layers=.",
    )


def page_figures(found: Pictures, axis: TimeAxis) -> list[Figure]:
    """Draws the maps on one page, or on several pages after an index."""
    parts = _parts(found)
    if len(parts) == 1:
        return [feature_maps(found, axis)]
    before = -(-len(found.outputs) // MOST)
    total = before + len(parts)
    numbers = [before + number for number, part in enumerate(parts, 1) for _ in part]
    figures = []
    for number in range(before):
        some = slice(number * MOST, (number + 1) * MOST)
        heading = f"page {number + 1} of {total}: index of {plural(len(found.outputs), 'output')}"
        figures.append(index_page(found._replace(outputs=found.outputs[some]), axis, heading, numbers[some]))
    for number, part in enumerate(parts, before + 1):
        figures.append(feature_maps(found._replace(outputs=part), axis, f"page {number} of {total}"))
    return figures


def _parts(found: Pictures) -> list[list[Picture]]:
    """Returns the outputs of each page: as many as fit, and at least one."""
    parts: list[list[Picture]] = []
    for picture in found.outputs:
        if parts and height_of(found._replace(outputs=[*parts[-1], picture]), "page") <= _PAGE:
            parts[-1].append(picture)
        else:
            parts.append([picture])
    return parts
