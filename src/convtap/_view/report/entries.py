"""Names the row and the map of each captured tensor, and writes the index."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from convtap._errors import plural
from convtap._result.call import shown_value
from convtap._tensors.nested import walk_tensors
from convtap._view.outputs import CapturedOutputs
from convtap._view.pictures import Pictures
from convtap._view.report.blocks import Block, blocks
from convtap._view.report.page import MAX_ROWS, Section, escape, name_html


class Entries:
    """The captured tensors of the page.

    Attributes:
        items: (key, layer) of each tensor that has a row, in execution order.
        row: the anchor of the row, by key.
        map: the anchor of the picture, by key.
        drawn: (key, layer) of each picture.
    """

    def __init__(self, outputs: CapturedOutputs, found: Pictures) -> None:
        every = [
            [(f"{call.key}{path}", call.layer) for path, _ in walk_tensors(shown_value(call))] for call in outputs.calls
        ]
        layers = dict(itertools.chain.from_iterable(every))
        self.items = list(itertools.chain.from_iterable(every[:MAX_ROWS]))
        self.row = {key: f"row-{number}" for number, (key, _) in enumerate(self.items)}
        self.map = {picture.key: f"map-{number}" for number, picture in enumerate(found.outputs)}
        self.drawn = [(picture.key, layers[picture.key]) for picture in found.outputs]

    def link(self, key: str) -> str:
        """Returns the name of a tensor as HTML, linked to its picture if it has one."""
        name = f'<span class="name">{name_html(key)}</span>'
        return f'<a href="#{self.map[key]}">{name}</a>' if key in self.map else name


def folded(found: list[Block] | None, parts: Sequence[str], warns: Sequence[str]) -> str:
    """Returns the parts of a page in sequence, each block in an element that unfolds."""
    if found is None:
        return "".join(parts)
    return "".join(
        f'<details class="block"><summary>{label_html(names)}{block_note(positions, warns)}</summary>'
        f"{''.join(parts[position] for position in positions)}</details>"
        for names, positions in found
    )


def label_html(names: Sequence[str]) -> str:
    """Returns the name of a block as HTML."""
    return " … ".join(map(name_html, names))


def block_note(positions: Sequence[int], warns: Sequence[str]) -> str:
    """Returns the counts of tensors and warnings in a block."""
    bad = sum(bool(warns[position]) for position in positions)
    alarm = f' <span class="alarm">{bad:,} with NaN or Inf</span>' if bad else ""
    return f" <span>{plural(len(positions), 'output')}</span>{alarm}"


def index(sections: list[Section], entries: Entries | None) -> str:
    """Returns the index: the sections, a filter field, and every captured tensor."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.heading)}</a>' for section in sections)
    items = [] if entries is None else entries.items
    lists = "" if entries is None else _lists(entries)
    return (
        f'<nav class="index" aria-label="Index"><div class="sections">{links}</div>'
        '<input type="search" placeholder="Filter layers" aria-label="Filter layers by name" data-script hidden>'
        f'<output aria-live="polite"></output><details class="list" open><summary>Index · {len(items):,}</summary>'
        f'<div class="entries"><div>{lists}</div></div></details></nav>'
    )


def _lists(entries: Entries) -> str:
    items, found = entries.items, blocks(entries.items)
    if found is None:
        return _list(entries, range(len(items)))
    return "".join(
        f'<details class="block"><summary><b>{len(positions):,}</b>{label_html(names)}</summary>'
        f"{_list(entries, positions)}</details>"
        for names, positions in found
    )


def _list(entries: Entries, positions: Sequence[int]) -> str:
    lines = []
    for position in positions:
        key, _ = entries.items[position]
        anchor = entries.map.get(key, entries.row[key])
        lines.append(f'<li><a class="name" href="#{anchor}">{name_html(key)}</a></li>')
    return f"<ol>{''.join(lines)}</ol>"
