"""The table of a capture: one line a call, with the statistics of its values if they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from convtap._errors import NotCaptured, listed, plural
from convtap._result.coverage import Coverage
from convtap._result.log import Log
from convtap._table import Rows, Table, human_bytes
from convtap._tensors.statistics import STATISTICS, dtype_text, shapes_text, statistics


def call_table(log: Log, keys: Sequence[str], stats: bool, most: int | None, nbytes: int, coverage: Coverage) -> Table:
    """Makes the table of a log, whose calls have these keys; only the rows that it shows are computed here."""
    columns = ["layer", "shape", "dtype", "device", "bytes", *(STATISTICS if stats else ())]
    rows = Rows(list(zip(keys, log.calls, strict=True)), functools.partial(_row, log, stats))
    title = "" if rows else "no outputs captured"
    notes = [_totals(log, nbytes, coverage), *log.notes]
    return Table(columns, rows, title, notes, most=most, whole="print(acts.summary(rows=None))")


def _totals(log: Log, nbytes: int, coverage: Coverage) -> str:
    missing = [name for state in (coverage.idle, coverage.bypassed, coverage.unactivated) for name in state]
    rest = f"; not captured: {listed(missing, 4)} (acts.coverage says why)" if missing else ""
    return f"{plural(len(log.calls), 'call')}, {human_bytes(nbytes)}{rest}"


def _row(log: Log, stats: bool, of: tuple[str, Any]) -> list[Any]:
    """The cells of a call, from its key and its place in the log."""
    key, place = of
    call = log.calls.get(place)
    if call is None:
        raise NotCaptured(
            f"{key!r} was cleared since this table was made, which has its first and last rows only. Make it with "
            "acts.summary(rows=None) to have all rows at once."
        )
    device = "" if call.device is None else str(call.device)
    row: list[Any] = [key, shapes_text(call.shape), dtype_text(call.dtype), device, human_bytes(call.nbytes)]
    return [*row, *(statistics(call.output, key) if stats else ())]
