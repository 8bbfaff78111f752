"""The table that convtap's views print, as text and as HTML."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from convtap._errors import InvalidType, InvalidValue
from convtap._public import public
from convtap._spelling import printable

#: The maximum number of rows that a table shows by default, which is a screen or two.
MOST = 100

#: The maximum number of rows that a notebook shows unfolded.
FOLD = 30

# Note: [Tables in notebooks]
# Assumption: Jupyter, VS Code and Colab show the HTML in their own light or dark themes, which align cells to the right.
# Failure: right-aligned names are hard to read, and a colour that fits one theme is invisible in the other.
# Choice: inline styles, which no theme overrides, set the alignment and the padding. Lines and text keep the theme's colour.
#   Rows beyond FOLD are a second table in <details>, which opens without a script. Both have the same column widths.
_LEFT, _RIGHT = "text-align:left;padding:2px 10px", "text-align:right;padding:2px 10px"

_MEASURED = re.compile(r"[−-]?[\d.,]+(e[+-]?\d+)?\s?(%|B|[KMGT]iB)")

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Formats a number of bytes in binary units, such as ``1.5 MiB``."""
    size = float(count)
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def cell(value: Any) -> str:
    """Formats a cell: a float with four significant digits, None as empty text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


class Rows(Sequence[tuple[Any, ...]]):
    """Rows that are built when they are read.

    Args:
        items: one item per row.
        build: a function that returns the cells of an item's row.
    """

    def __init__(self, items: Sequence[Any], build: Callable[[Any], Sequence[Any]]) -> None:
        self._items = items
        self._build = build

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [tuple(self._build(item)) for item in self._items[index]]
        return tuple(self._build(self._items[index]))


def checked_rows(rows: Any) -> int | None:
    """Checks the option ``rows``: the maximum number of rows to show, or None for all.

    Raises:
        InvalidType: ``rows`` is neither an int nor None.
        InvalidValue: ``rows`` is less than 1.
    """
    if rows is None:
        return None
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise InvalidType(
            f"rows is a {type(rows).__name__}. Pass the maximum number of rows to show, or rows=None for all."
        )
    if rows < 1:
        raise InvalidValue(f"rows={rows} shows nothing. Pass the maximum number of rows to show, or rows=None for all.")
    return rows


@public
class Table(Sequence[Any]):
    """Rows under named columns, shown by ``print`` as text and by a notebook as HTML.

    A long table shows its first and last rows, and ``print(table.summary(rows=None))`` shows all of them. Indexing and
    iteration reach every row.

    Args:
        columns: the heading of each column.
        rows: the rows, each a sequence of cells as long as ``columns``.
        title: a line above the table.
        notes: lines below the table.
        items: the items that indexing and iteration return, one per row; None for the rows themselves.
        most: the maximum number of rows to show, the first and the last; None for all.
        marked: positions of rows that the table shows in any case.
        whole: the code that shows all rows.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        title: str = "",
        notes: Sequence[str] = (),
        items: Sequence[Any] | None = None,
        *,
        most: int | None = MOST,
        marked: Collection[int] = (),
        whole: str = "print(table.summary(rows=None))",
    ) -> None:
        self.columns = tuple(columns)
        self.title = title
        self.notes = tuple(note for note in notes if note)
        self._marked = tuple(itertools.islice(marked, MOST))
        self.whole = whole
        places = _places(len(rows), checked_rows(most), self._marked)
        everything = len(places) == len(rows)
        # the shown rows are built here, so that they do not change later
        self._shown = [(place, tuple(rows[place])) for place in places]
        self.rows: Sequence[tuple[Any, ...]] = [row for _, row in self._shown]
        if not everything:
            self.rows = rows if isinstance(rows, Rows) else [tuple(row) for row in rows]
        self._items: Sequence[Any] = self.rows if items is None else items

    def __setstate__(self, state: dict[str, Any]) -> None:
        missing = {"whole": "", "_marked": (), "_shown": list(enumerate(state["rows"]))}
        self.__dict__.update({**missing, **state})  # a pickle of version 0.1.0 has and shows all of its rows

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns the same table with another number of shown rows.

        Args:
            rows: the maximum number of rows to show, the first and the last; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        return Table(
            self.columns,
            self.rows,
            self.title,
            self.notes,
            self._items,
            most=rows,
            marked=self._marked,
            whole=self.whole,
        )

    def _lines(self) -> Iterator[tuple[Any, ...] | int]:
        """Yields the shown rows, and between them the numbers of hidden rows."""
        following = 0
        for place, row in self._shown:
            if place > following:
                yield place - following
            yield row
            following = place + 1

    def _notes(self) -> list[str]:
        shown, total = len(self._shown), len(self.rows)
        hidden = [f"{shown:,} of {total:,} rows shown: {self.whole} shows all"] if shown < total else []
        return [*hidden, *self.notes]

    def _is_numeric(self, column: int) -> bool:
        return bool(self._shown) and all(
            row[column] is None or (isinstance(row[column], (int, float)) and not isinstance(row[column], bool))
            for _, row in self._shown
        )

    def __str__(self) -> str:
        lines = [one if isinstance(one, int) else [printable(cell(value)) for value in one] for one in self._lines()]
        cells = [one for one in lines if not isinstance(one, int)]
        numeric = [self._is_numeric(i) for i in range(len(self.columns))]
        widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(self.columns)]

        def line(row: Sequence[str] | int) -> str:
            if isinstance(row, int):
                return f"… {_rows(row)} …"
            padded = (
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(row, widths, numeric, strict=True)
            )
            return "  ".join(padded).rstrip()

        body = [line(self.columns), line(["-" * width for width in widths]), *map(line, lines)] if cells else []
        return printable("\n".join([*([self.title] if self.title else []), *body, *self._notes()]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = list(self._lines())
        title = f"<div>{html.escape(self.title)}</div>" if self.title else ""
        shown = self._html_table(lines[:FOLD]) if lines else ""
        if len(lines) > FOLD:
            rest = lines[FOLD:]
            count = _rows(sum(not isinstance(line, int) for line in rest))
            shown += f'<details><summary style="cursor:pointer">{count}</summary>{self._html_table(rest)}</details>'
        notes = "".join(f'<div style="padding:2px 0">{html.escape(note)}</div>' for note in self._notes())
        return f"<div>{title}{shown}{notes}</div>"

    def _html_table(self, lines: Sequence[Sequence[Any] | int]) -> str:
        """Returns the HTML of some rows with headings. See Note: [Tables in notebooks]."""
        sides = [_RIGHT if self._is_measured(i) else _LEFT for i in range(len(self.columns))]
        heads = zip(sides, self.columns, strict=True)
        head = "".join(f'<th style="{side};border-bottom:1px solid">{html.escape(name)}</th>' for side, name in heads)

        def line(row: Sequence[Any] | int) -> str:
            if isinstance(row, int):
                return f'<td colspan="{len(self.columns)}" style="text-align:center">… {_rows(row)} …</td>'
            cells = zip(sides, row, strict=True)
            return "".join(f'<td style="{side}">{html.escape(cell(value))}</td>' for side, value in cells)

        columns = "".join(f'<col style="width:{width}ch">' for width in self._widths()) if self._is_folded else ""
        body = "".join(f"<tr>{line(row)}</tr>" for row in lines)
        layout = ";table-layout:fixed;overflow-wrap:anywhere" if columns else ""
        style = f"border-collapse:collapse;font-variant-numeric:tabular-nums{layout}"
        return f'<table style="{style}">{columns}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'

    @property
    def _is_folded(self) -> bool:
        return sum(1 for _ in self._lines()) > FOLD

    def _widths(self) -> list[int]:
        """Returns the widths of the columns in characters, for a folded table."""
        texts = [[name, *(cell(row[i]) for _, row in self._shown)] for i, name in enumerate(self.columns)]
        return [min(max(map(len, column)), 60) + 4 for column in texts]

    def _is_measured(self, column: int) -> bool:
        """Returns whether a column holds numbers, maybe with a unit such as ``1.5 MiB``."""
        if self._is_numeric(column):
            return True
        texts = [cell(row[column]) for _, row in self._shown if row[column] is not None]
        return bool(texts) and all(_MEASURED.fullmatch(text) for text in texts)


def _places(count: int, most: int | None, marked: Collection[int]) -> Sequence[int]:
    """Returns the positions of the rows to show, out of ``count`` rows."""
    if most is None or count <= most:
        return range(count)
    first = most - most // 2
    return sorted({*range(first), *range(count - most // 2, count), *marked})


def _rows(count: int) -> str:
    return f"{count:,} more row{'' if count == 1 else 's'}"
