"""What a comparison says: the rows, the first one over the tolerance, and what has no partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convtap._debug.metrics import Difference, Tolerance, difference, step
from convtap._errors import InvalidValue, listed
from convtap._public import public
from convtap._result.keys import numbered, separator
from convtap._table import MOST, Rows, Table
from convtap._tensors.nested import walk_tensors

OUTPUT = "<output>"


@public
class Comparison:
    """What ``compare`` found, in the execution order of ``a``. Print it, iterate over it, or read ``first``.

    Attributes:
        rows: one ``Difference`` for each output that has a partner.
        only_a: the keys of calls of ``a`` that have none.
        only_b: those of ``b``.
        notes: how layers were paired, and what else is to say.
    """

    def __init__(
        self, rows: list[Difference], only_a: list[str], only_b: list[str], tolerance: Tolerance, notes: Iterable[str]
    ) -> None:
        self.rows = rows
        self.only_a = only_a
        self.only_b = only_b
        self.notes = [note for note in notes if note]
        self._tolerance = tolerance

    @property
    def first(self) -> Difference | None:
        """The first row over the tolerance, or None if there is none."""
        return next((row for row in self.rows if row.over), None)

    @property
    def agrees(self) -> bool:
        """Whether no row is over the tolerance, and every call of a compared layer has a partner."""
        return self.first is None and not self.only_a and not self.only_b

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain Python values; infinite ones stay ``float("inf")``."""
        first = self.first
        return {
            "rows": [row.to_dict() for row in self.rows],
            "first": None if first is None else first.name,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "agrees": self.agrees,
            "tolerance": {
                "atol": self._tolerance.atol,
                "rtol": self._tolerance.rtol,
                "sqnr_db": self._tolerance.sqnr_db,
            },
            "notes": list(self.notes),
        }

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line an output.

        Args:
            rows: the most outputs to print: the first and the last, and the first over the tolerance; None for all.

        Raises:
            InvalidType, InvalidValue: ``rows`` is not a positive int or None.
        """
        first = self.first
        renamed = any(row.name != row.partner for row in self.rows)

        def cells(row: Difference) -> tuple[Any, ...]:
            mark = "← first over" if row is first else "over" if row.over else ""
            numbers = (row.max_abs, row.relative, row.sqnr_db, row.cosine)
            names = (row.name, row.partner) if renamed else (row.name,)
            return (*names, str(row.shape), *numbers, "; ".join(filter(None, (mark, row.note))))

        columns: tuple[str, ...] = ("a", "b") if renamed else ("layer",)
        title = f"{sum(row.over for row in self.rows)} of {len(self.rows)} over: {self._tolerance.text}"
        notes = [
            f"only in a: {listed(self.only_a)}" if self.only_a else "",
            f"only in b: {listed(self.only_b)}" if self.only_b else "",
            *self.notes,
        ]
        columns = (*columns, "shape", "max abs", "relative", "SQNR dB", "cosine", "")
        marked = [place for place, row in enumerate(self.rows) if row is first]
        whole = "print(comparison.summary(rows=None))"
        return Table(columns, Rows(self.rows, cells), title, notes, most=rows, marked=marked, whole=whole)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


@dataclass
class _Row:
    """A difference before it is known how often each layer runs, on which its key depends."""

    name: str
    partner: str
    indices: tuple[int, int]
    path: str
    found: Difference


class Ledger:
    """Collects the rows of a comparison while it goes on.

    Attributes:
        parts: by the names of parts of outputs (``lstm[0]``), their paths.
    """

    def __init__(self, pairs: Mapping[str, str], tolerance: Tolerance) -> None:
        self._pairs = pairs
        self._tolerance = tolerance
        self._rows: list[_Row] = []
        self._lone: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
        self._counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._coarsest = 0.0
        self.parts: dict[str, str] = {}

    def saw(self, side: int) -> bool:
        """Whether there was any call on a side."""
        return bool(self._counts[side])

    def skip(self, side: int, name: str) -> None:
        """Notes a call that is not compared, so that the others of its layer have its number."""
        self._counts[side][name] += 1

    def lone(self, side: int, name: str, index: int) -> None:
        """Notes a call without a partner, on side 0 (``a``) or 1 (``b``)."""
        self._counts[side][name] += 1
        self._lone[side].append((name, index))

    def compare(
        self,
        name: str,
        partner: str,
        index: int,
        a: Any,
        b: Any,
        note: str = "",
        floor: float = 0.0,
        partner_index: int | None = None,
    ) -> None:
        """Compares two outputs, tensor by tensor.

        Args:
            name: the layer of ``a``.
            partner: that of ``b``.
            index: the number of the call.
            a: the output of ``a``.
            b: that of ``b``.
            note: what else is to say.
            partner_index: the number of the call of ``b``, if it is another one.
            floor: the step of a layer that computes more coarsely than the type of its output says.
        """
        self._counts[0][name] += 1
        self._counts[1][partner] += 1
        indices = (index, index if partner_index is None else partner_index)
        left, right = dict(walk_tensors(a)), dict(walk_tensors(b))
        for path in [path for path in left if path in right]:
            x, y = left[path], right[path]
            self._coarsest = max(self._coarsest, step(x), step(y), floor)
            found = difference(name, partner, x, y, self._tolerance, self._coarsest)
            found = replace(found, note="; ".join(filter(None, (found.note, note))))
            self._rows.append(_Row(name, partner, indices, path, found))
        for side, mine, other in ((0, left, right), (1, right, left)):
            for path in [path for path in mine if path not in other]:
                self._lone[side].append((f"{(name, partner)[side]}{path}", indices[side]))

    def close(self, notes: list[str]) -> Comparison:
        """Ends the comparison.

        Raises:
            InvalidValue: there is nothing in it.
        """
        lone = [[self._key(side, name, index) for name, index in self._lone[side]] for side in (0, 1)]
        if not any(row.name != OUTPUT for row in self._rows):
            raise InvalidValue(
                f"no layer of a has a partner in b. a ran {listed(lone[0])}; b ran {listed(lone[1])}. Say which belong "
                "together with map={name in a: name in b}."
            )
        rows = [
            replace(
                row.found,
                name=self._key(0, row.name, row.indices[0], row.path),
                partner=self._key(1, row.partner, row.indices[1], row.path),
            )
            for row in self._rows
        ]
        return Comparison(rows, lone[0], lone[1], self._tolerance, notes)

    def _key(self, side: int, name: str, index: int, path: str = "") -> str:
        part = self.parts.get(name, "")
        layer, counts = name.removesuffix(part), self._counts[side]
        return numbered(layer, index, counts[name], separator(layer, counts), part) + path
