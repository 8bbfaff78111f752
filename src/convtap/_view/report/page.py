"""Writes the frame of a self-contained HTML page, and escapes text."""

from __future__ import annotations

import html
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from convtap._view.cells import printable
from convtap._view.report.codes import LINEAR, OUTER

#: The maximum number of rows, since browsers open a page with more rows slowly.
MAX_ROWS = 2000

# The policy allows only the style, the script and the pictures inside the page, and forbids all network requests.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Section(NamedTuple):
    """A section of the page.

    Attributes:
        anchor: the id of its element.
        heading: its heading.
        html: its content.
        attributes: further attributes of its element.
        can_unfold: whether it has a button that unfolds everything.
    """

    anchor: str
    heading: str
    html: str
    attributes: str = ""
    can_unfold: bool = False


def escape(text: Any) -> str:
    """Escapes text for any place in the page, including attributes.

    No part of it is parsed as markup, and no character is invisible.
    """
    return html.escape(printable(str(text)), quote=True)


def escaped_lines(text: str) -> str:
    """Escapes free text like ``escape``, but keeps line breaks and the width of tabs."""
    return "\n".join(escape(line.expandtabs(4)) for line in text.splitlines())


def name_html(name: str) -> str:
    """Returns the name of a layer as HTML with line breaks allowed after its dots.

    The part before the last dot is soft.
    """
    around, dot, last = escape(name).rpartition(".")
    return f"<i>{around.replace('.', '.<wbr>')}.<wbr></i>{last}" if dot else last


def page(title: str, head: str, index: str, sections: list[Section], style: str = "") -> str:
    """Returns the whole page: the index, the head and the sections."""
    body = "".join(map(_section, sections))
    return (
        f'<!DOCTYPE html><html lang="en" data-linear="{LINEAR}" data-outer="{OUTER}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_file('page.css')}{style}</style></head><body>{index}"
        f"<main><h1>{escape(title)}</h1>{head}{body}</main><script>{_file('page.js')}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    tool = (
        '<button class="tool unfold" type="button" data-script hidden>unfold all</button>' if section.can_unfold else ""
    )
    return (
        f'<section id="{section.anchor}"{section.attributes}><h2><span>{escape(section.heading)}</span>{tool}</h2>'
        f"{section.html}</section>"
    )


@cache
def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
