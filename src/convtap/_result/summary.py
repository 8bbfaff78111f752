"""The table of a capture, with one line per call."""

from __future__ import annotations

import functools
from typing import Any

from convtap._errors import NotCaptured, listed, plural
from convtap._result.call import Call, held_bytes, value_bytes
from convtap._result.coverage import Coverage
from convtap._result.log import Log
from convtap._table import Rows, Table, human_bytes
from convtap._tensors.statistics import STATISTICS, dtype_text, shapes_text, statistics

#: Above this number of calls, the totals do not consider shared memory, which takes microseconds per call to find.
_MANY = 10_000


def call_table(log: Log, stats: bool, most: int | None, coverage: Coverage) -> Table:
    """Makes the table of a log, and computes only the rows that it shows."""
    columns = ["layer", "shape", "dtype", "device", "bytes", *(STATISTICS if stats else ())]
    calls = log.numbered()
    places = list(log.calls)
    rows = Rows(places, functools.partial(_row, log, places, stats))
    title = "" if rows else "no outputs captured"
    notes = [_totals(calls, coverage), *log.notes]
    return Table(columns, rows, title, notes, most=most, whole="print(acts.summary(rows=None))")


def _totals(calls: list[Call], coverage: Coverage) -> str:
    missing = [name for state in (coverage.idle, coverage.bypassed, coverage.unactivated) for name in state]
    rest = f"; not captured: {listed(missing, 4)} (acts.coverage says why)" if missing else ""
    if len(calls) > _MANY:
        size = f"{human_bytes(value_bytes(calls))} of values (acts.nbytes counts shared memory once)"
    else:
        size = human_bytes(sum(held_bytes(calls).values()))
    return f"{plural(len(calls), 'call')}, {size}{rest}"


def _row(log: Log, places: list[Any], stats: bool, place: Any) -> list[Any]:
    """Returns the cells of a call.

    Args:
        log: the log.
        places: the keys of the table's calls in the log.
        stats: whether to add statistics.
        place: the key of the call.
    """
    call = log.calls.get(place)
    if call is None:
        raise NotCaptured(
            f"row {places.index(place)} is not available, since its output was cleared after this table was made. Make the "
            "table with acts.summary(rows=None), which computes all rows at once."
        )
    key = call.key
    device = "" if call.device is None else str(call.device)
    row: list[Any] = [key, shapes_text(call.shape), dtype_text(call.dtype), device, human_bytes(call.nbytes)]
    return [*row, *(statistics(call.output, key) if stats else ())]
