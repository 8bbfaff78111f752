"""The result of ``compare`` for models and captures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from convtap._debug.metrics import Difference, Tolerance, difference, step
from convtap._errors import InvalidValue, listed
from convtap._public import public
from convtap._result.keys import numbered, separator, stems
from convtap._table import MOST, Rows, Table
from convtap._tensors.nested import walk_tensors

OUTPUT = "<output>"


class Run(NamedTuple):
    """One call of a layer, or a part of its output, such as ``[0]``."""

    layer: str
    number: int = 0
    part: str = ""

    @property
    def name(self) -> str:
        """The layer's name, with the part."""
        return self.layer + self.part


@public
class Comparison:
    """The result of ``compare`` for models and captures.

    Its rows are in the execution order of ``a``. Print it, iterate over it, or read ``first``.

    Attributes:
        rows: one ``Difference`` for each output that has a partner.
        only_a: the keys of calls of ``a`` without a partner.
        only_b: the keys of calls of ``b`` without a partner.
        notes: remarks, for example on how layers were paired.
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
        """The first row over the tolerance, or None."""
        return next((row for row in self.rows if row.over), None)

    @property
    def agrees(self) -> bool:
        """Whether no row is over the tolerance and every compared call has a partner."""
        return self.first is None and not self.only_a and not self.only_b

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as plain Python values, with Inf as ``float("inf")``."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "first": None if self.first is None else self.first.name,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "agrees": self.agrees,
            "tolerance": asdict(self._tolerance),
            "notes": list(self.notes),
        }

    def summary(self, rows: int | None = MOST) -> Table:
        """Returns a table with one line per output.

        Args:
            rows: the maximum number of outputs to print; None for all. A shortened table has the first and the last outputs,
                and always the first one over the tolerance.

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


class Ledger:
    """Collects the rows of a comparison.

    The keys of calls are known only at the end, when all calls are counted.
    """

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._rows: list[tuple[Run, Run, str, Difference]] = []
        self._lone: tuple[list[tuple[Run, str]], list[tuple[Run, str]]] = ([], [])
        self._counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._coarsest = 0.0
        self._stems: tuple[set[str], ...] = ()

    def saw(self, side: int) -> bool:
        """Returns whether a side had any call."""
        return bool(self._counts[side])

    def skip(self, side: int, name: str) -> None:
        """Counts a call that is not compared, so that later calls keep their numbers."""
        self._counts[side][name] += 1

    def lone(self, side: int, run: Run) -> None:
        """Notes a call without a partner, on side 0 (``a``) or 1 (``b``)."""
        self._counts[side][run.name] += 1
        self._lone[side].append((run, ""))

    def compare(self, mine: Run, theirs: Run, a: Any, b: Any, *, note: str = "", floor: float = 0.0) -> None:
        """Compares two outputs, tensor by tensor.

        Args:
            mine: the call of ``a``.
            theirs: the call of ``b``.
            a: the output of ``a``.
            b: the output of ``b``.
            note: a text for each row.
            floor: the step of a layer that computes more coarsely than its output's type.
        """
        self._counts[0][mine.name] += 1
        self._counts[1][theirs.name] += 1
        left, right = dict(walk_tensors(a)), dict(walk_tensors(b))
        for path in [path for path in left if path in right]:
            x, y = left[path], right[path]
            self._coarsest = max(self._coarsest, step(x), step(y), floor)
            found = difference(mine.name, theirs.name, x, y, self._tolerance, self._coarsest)
            found = replace(found, note="; ".join(filter(None, (found.note, note))))
            self._rows.append((mine, theirs, path, found))
        self._lone[0].extend((mine, path) for path in left if path not in right)
        self._lone[1].extend((theirs, path) for path in right if path not in left)

    def close(self, notes: Iterable[str]) -> Comparison:
        """Ends the comparison.

        Raises:
            InvalidValue: no layer has a partner.
        """
        self._stems = tuple(stems(counts) for counts in self._counts)
        lone = [[self._key(side, run) + path for run, path in self._lone[side]] for side in (0, 1)]
        if not any(mine.layer != OUTPUT for mine, *_ in self._rows):
            raise InvalidValue(
                f"no layer of a has a partner in b: a ran {listed(lone[0])}, and b ran {listed(lone[1])}. Pair them by name: "
                "map={'name in a': 'name in b'}."
            )
        rows = [
            replace(found, name=self._key(0, mine) + path, partner=self._key(1, theirs) + path)
            for mine, theirs, path, found in self._rows
        ]
        return Comparison(rows, lone[0], lone[1], self._tolerance, notes)

    def _key(self, side: int, run: Run) -> str:
        counts = self._counts[side]
        return numbered(run.layer, run.number, counts[run.name], separator(run.layer, self._stems[side]), run.part)
