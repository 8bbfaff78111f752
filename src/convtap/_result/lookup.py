"""Finds a call by its key, or explains why it does not exist."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from convtap._errors import AmbiguousCall, LayerNotFound, brief, did_you_mean, listed
from convtap._result.call import Call
from convtap._result.log import Log
from convtap._select.parts import find


def find_output(log: Log, key: str) -> Any:
    """Returns the output or the part of an output that a key names, or ``MISSING``.

    Raises:
        AmbiguousCall: the layer ran several times.
        LayerNotFound: the call exists, but its output does not have the part.
    """
    return find(key, partial(find_call, log))


def find_call(log: Log, key: str) -> Call | None:
    """Returns the call that a key names, or None.

    Raises:
        AmbiguousCall: the layer ran several times.
    """
    name = log.resolve(key)
    if name is None:
        return _numbered_call(log, key)
    record = log.records.get(name)
    if record is None or not record.held:
        return None
    if record.held > 1:
        raise _ambiguous(log, name)
    return next(iter(log.runs(name)), None)


def _numbered_call(log: Log, key: str) -> Call | None:
    """Returns the call of a key such as ``conv#1`` or ``lstm#1[0]``, or None."""
    for found in reversed(list(_NUMBER.finditer(key))):
        stem, number, part = key[: found.start()], int(found[1]), key[found.end() :]
        for layer, separator in ((stem, "#"), (stem.removesuffix("#"), "##")):
            name = log.resolve(layer + part)
            record = None if name is None else log.records.get(name)
            if record is not None and (record.separator, record.part) == (separator, part) and record.held > 1:
                return next(iter(log.runs(record.name)[number : number + 1]), None)
    return None


#: The number of a call.
_NUMBER = re.compile(r"#(0|[1-9][0-9]*)(?![0-9])")


def _ambiguous(log: Log, name: str) -> AmbiguousCall:
    record = log.records[name]
    held = record.held
    return AmbiguousCall(
        f"{name!r} ran {held} times, so its name alone is ambiguous. Read one output with "
        f"acts[{record.key(1, held)!r}], all of them with acts.calls({name!r}), or join them with acts.cat({name!r})."
    )


def not_a_name(log: Log, key: Any) -> LayerNotFound:
    """Returns the error for a key that is not a name, such as a position."""
    calls = list(log.calls.values())
    if isinstance(key, int) and not isinstance(key, bool) and -len(calls) <= key < len(calls):
        position = key % len(calls)
        return LayerNotFound(
            f"the key {key} is not a name. Write acts.calls()[{position}] for {_ordinal(position + 1)}, of "
            f"layer {calls[position].name!r}."
        )
    return LayerNotFound(f"the key {brief(key)} is not a name. Use one of these names: {listed(log.index())}.")


def missing(log: Log, key: str) -> LayerNotFound:
    """Returns the error for a name without an output."""
    name = log.resolve(key)
    if name is not None:
        state = log.state(name)
        if state.captured:
            why = "its outputs were cleared"
        elif state.unactivated:
            why = (
                f"it {state}. Capture it with at='output', capture the activations with types=nn.ReLU, or pass the type of its "
                "activation as activations=(...)"
            )
        else:
            why = f"it is {state}"
        return LayerNotFound(f"{key!r} was selected, but {why}. Captured here: {listed(log.index())}.")
    known = list(dict.fromkeys([*log.index(), *log.names()]))
    return LayerNotFound(f"no output is named {key!r}. Captured here: {listed(log.index())}.{did_you_mean(key, known)}")


def _ordinal(number: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    return f"the {words[number - 1]} call" if number <= len(words) else f"call number {number}"
