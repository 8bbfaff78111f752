"""Renames the layers of a log, or joins the logs of two captures."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from convtap._errors import InvalidType, InvalidValue, brief, listed
from convtap._result.call import Call, LayerRecord, moved
from convtap._result.log import Log
from convtap._result.lookup import missing
from convtap._result.origin import Origin


def renamed(log: Log, names: Any) -> Log:
    """Returns a log of the same calls with other names for some layers.

    Raises:
        InvalidType: ``names`` is not a mapping of names to names.
        InvalidValue: two layers would have the same name.
        LayerNotFound: a layer does not exist.
    """
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for pair in names.items() for name in pair):
        raise InvalidType(
            f"names={brief(names)} is not a mapping of names to names. Write for example acts.rename({{'encoder.0': 'early'}})."
        )
    new: dict[str, str] = {}
    for old, name in names.items():
        resolved = log.resolve(old)
        if resolved is None:
            raise missing(log, old)
        new[resolved] = name
    known = [new.get(name, name) for name in log.names()]
    twice = [name for name, count in Counter(known).items() if count > 1]
    if twice:
        raise InvalidValue(f"two layers would be named {listed(map(repr, twice))}. Give each layer a name of its own.")
    records = {new.get(name, name): _record(record, new.get(name, name)) for name, record in log.records.items()}
    found = dataclasses.replace(
        log,
        calls={key: moved(call, records[new.get(call.name, call.name)]) for key, call in log.calls.items()},
        selected=dict.fromkeys(new.get(name, name) for name in log.selected),
        exact=tuple(new.get(name, name) for name in log.exact),
        records=records,
        inputs=dict(log.inputs),
        unclear=dict(log.unclear),
        notes=list(log.notes),
        is_open=False,
    )
    found.tell_apart()
    return found


def _record(record: LayerRecord, name: str) -> LayerRecord:
    found = copy.copy(record)
    found.name = name
    return found


def joined(first: Log, second: Log) -> Log:
    """Returns a log with the calls of two logs, those of the second last.

    The passes of the second log get the numbers that follow.
    """
    passes = [*first.inputs, *(call.forward for call in first.calls.values())]
    shift = max(passes, default=-1) + 1
    records = {name: copy.copy(record) for name, record in first.records.items()}
    for name, record in second.records.items():
        records[name] = _sum(records[name], record, shift) if name in records else _shifted(record, shift)
    calls: dict[Any, Call] = {}
    for log, plus in ((first, 0), (second, shift)):
        for call in log.calls.values():
            calls[len(calls)] = moved(call, records[call.name], call.forward + plus)
    found = Log(
        calls=calls,
        selected=dict.fromkeys((*first.selected, *second.selected)),
        exact=tuple(dict.fromkeys((*first.exact, *second.exact))),
        records=records,
        inputs={**first.inputs, **{number + shift: shape for number, shape in second.inputs.items()}},
        unclear={**first.unclear, **{n + shift: (why, one + shift) for n, (why, one) in second.unclear.items()}},
        aliases=list(dict.fromkeys((*first.aliases, *second.aliases))),
        notes=list(dict.fromkeys((*first.notes, *second.notes))),
        origin=_joined_origin(first.origin, second.origin),
    )
    found.numbered()
    found.tell_apart()
    return found


def _joined_origin(first: Origin | None, second: Origin | None) -> Origin | None:
    return first.joined(second) if first is not None and second is not None else first or second


def _shifted(record: LayerRecord, shift: int) -> LayerRecord:
    found = copy.copy(record)
    found.last_pass = record.last_pass + shift if record.last_pass >= 0 else -1
    return found


def _sum(first: LayerRecord, second: LayerRecord, shift: int) -> LayerRecord:
    found = _shifted(second, shift)
    for count in ("captured", "ran", "held", "cleared", "bypasses"):
        setattr(found, count, getattr(first, count) + getattr(second, count))
    found.bypassed = first.bypassed or second.bypassed
    found.computed = first.computed or second.computed
    found.layout = first.layout if first.layout == second.layout else None
    return found
