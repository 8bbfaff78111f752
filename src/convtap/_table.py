"""A table of rows: how every view in convtap shows itself, as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Writes a number of bytes in binary units: ``1.5 MiB``."""
    size = float(count)
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def cell(value: Any) -> str:
    """Writes one cell: floats with four significant digits, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


class Table(Sequence[Any]):
    """Rows under named columns. ``print`` shows it aligned, a notebook shows it as HTML.

    Args:
        columns: one heading a column.
        rows: the rows; each is a sequence of cells as long as ``columns``.
        title: a line above the table.
        notes: lines below it.
        items: what indexing and iteration give, one for each row (the rows themselves if None).
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        title: str = "",
        notes: Sequence[str] = (),
        items: Sequence[Any] | None = None,
    ) -> None:
        self.columns = tuple(columns)
        self.rows = [tuple(row) for row in rows]
        self.title = title
        self.notes = tuple(note for note in notes if note)
        self._items: Sequence[Any] = self.rows if items is None else items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def _is_numeric(self, column: int) -> bool:
        return bool(self.rows) and all(
            row[column] is None or (isinstance(row[column], (int, float)) and not isinstance(row[column], bool))
            for row in self.rows
        )

    def __str__(self) -> str:
        cells = [[cell(value) for value in row] for row in self.rows]
        numeric = [self._is_numeric(i) for i in range(len(self.columns))]
        widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(self.columns)]

        def line(row: Sequence[str]) -> str:
            padded = (
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, numeric, strict=True)
            )
            return "  ".join(padded).rstrip()

        body = [line(self.columns), line(["-" * width for width in widths]), *map(line, cells)] if cells else []
        return "\n".join([*([self.title] if self.title else []), *body, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        escape = html.escape
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell(value))}</td>" for value in row) + "</tr>" for row in self.rows
        )
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if self.rows else ""
        return f"<div>{table or escape(self.title)}{notes}</div>"
