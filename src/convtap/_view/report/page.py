"""Writes the frame of an HTML page that needs nothing but itself: its style, its one script, and escaping."""

from __future__ import annotations

import html
from typing import Any

from convtap._view.cells import printable

#: More rows than this make a page that no browser opens at once.
MAX_ROWS = 2000

# The page may load nothing from anywhere: only its own style, its own script and the pictures inside it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light; --ink: #22303d; --soft: #5b6b7a; --line: #d5dde5; --alarm: #b00000; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1240px; color: var(--ink); background: #fff;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 28px 0 8px; border-bottom: 1px solid var(--line); padding-bottom: 3px; }
p { margin: 4px 0; } .soft { color: var(--soft); } .alarm { color: var(--alarm); font-weight: 600; }
nav a { margin-right: 14px; } a { color: #17589f; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
td.number, th.number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 17ch; max-width: min(44vw, 420px); }
.plain td { white-space: normal; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #17589f; }
th button::after { content: " ↕"; color: #9aa8b5; }
th[aria-sort=ascending] button::after { content: " ↑"; color: inherit; }
th[aria-sort=descending] button::after { content: " ↓"; color: inherit; }
figure { margin: 0 0 12px; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
.track { position: relative; border: 1px solid var(--line); background: #f4f6f8; overflow: hidden; }
.track > * { position: absolute; top: 0; height: 100%; display: block; }
.track img { image-rendering: pixelated; }
.marks { position: relative; height: 7px; font-size: 8px; line-height: 7px; color: var(--alarm); }
.marks span { position: absolute; transform: translateX(-50%); }
.scale { position: relative; height: 17px; font-size: 11px; color: var(--soft); overflow: hidden; }
.scale span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.scale span.first { transform: none; } .scale span.last { transform: translateX(-100%); }
.legend { display: inline-block; width: 180px; height: 11px; border: 1px solid var(--line); vertical-align: middle; }
details { padding-left: 14px; } details > p { padding-left: 28px; } summary { cursor: pointer; }
.tree { font: 13px/1.6 ui-monospace, monospace; overflow-x: auto; white-space: nowrap; } .tree p { margin: 0; }
.tree > details { padding-left: 0; }
.captured { color: #0a6b2d; font-weight: 600; } .idle, .not-activated { color: var(--soft); }
.bypassed { color: var(--alarm); font-weight: 600; }
@media (max-width: 640px) and (max-resolution: 1.5dppx) { .track img { image-rendering: auto; } }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const numeric = head.classList.contains("number");
    const value = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent;
      return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
    };
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (!numeric) return sign * x.localeCompare(y, undefined, { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
    body.append(...[...body.rows].sort(order));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  });
}
"""


def escape(text: Any) -> str:
    """Escapes text for any place in the page, attributes included: none of it is read as markup or is invisible."""
    return html.escape(printable(str(text)), quote=True)


def page(title: str, sections: list[tuple[str, str, str]], lead: str) -> str:
    """Writes the whole page. A section is its anchor, its heading and its HTML."""
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>{html}</section>' for anchor, heading, html in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{lead}<nav>{links}</nav>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def sortable(columns: list[tuple[str, bool]], rows: list[list[tuple[str, Any]]]) -> str:
    """Writes a table that sorts by a click on a heading.

    Args:
        columns: headings, each with whether it holds numbers.
        rows: cells: their HTML, and what to sort numbers by (None if there is nothing).
    """
    heads = "".join(
        f'<th scope="col"{_number(numeric)}><button type="button">{escape(name)}</button></th>'
        for name, numeric in columns
    )
    lines = []
    for row in rows:
        cells = []
        for (text, value), (_, numeric) in zip(row, columns, strict=True):
            sort = f' data-value="{"" if value is None else repr(value)}"' if numeric else ""
            cells.append(f"<td{_number(numeric)}{sort}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(numeric: bool) -> str:
    return ' class="number"' if numeric else ""
