"""The table of a capture: one line a call, with the statistics of its values if they are asked for."""

from __future__ import annotations

import functools
from typing import Any

from convtap._errors import NotCaptured, listed, plural
from convtap._result.call import Call, held_bytes, value_bytes
from convtap._result.coverage import Coverage
from convtap._result.log import Log
from convtap._table import Rows, Table, human_bytes
from convtap._tensors.statistics import STATISTICS, dtype_text, shapes_text, statistics

#: Above so many calls, the line of totals sums the bytes of the values: to find shared memory takes microseconds a call.
_MANY = 10_000


def call_table(log: Log, stats: bool, most: int | None, coverage: Coverage) -> Table:
    """Makes the table of a log; only the rows that it shows are computed here."""
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
    """The cells of a call, from its place in the log and those of all calls of the table."""
    call = log.calls.get(place)
    if call is None:
        raise NotCaptured(
            f"row {places.index(place)} was cleared since this table was made, which has its first and last rows only. Make "
            "it with acts.summary(rows=None) to have all rows at once."
        )
    key = call.key
    device = "" if call.device is None else str(call.device)
    row: list[Any] = [key, shapes_text(call.shape), dtype_text(call.dtype), device, human_bytes(call.nbytes)]
    return [*row, *(statistics(call.output, key) if stats else ())]
